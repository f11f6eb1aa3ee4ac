//! What the tests share: real servers, the real daemon, clients, and what the machine has to have.

pub mod daemon;
pub mod decap;
pub mod echo;
pub mod encapsulation;
pub mod http;
pub mod load;
pub mod machine;
pub mod maps;
pub mod nginx;
pub mod packet_socket;
pub mod ping;
pub mod services;
pub mod udp;
