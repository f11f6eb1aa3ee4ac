//! Pure functions that both sides use.

pub mod ageing;
pub mod checksum;
pub mod encapsulation;
pub mod hash;
pub mod headers;
pub mod source_port;
pub mod tcp_state;
