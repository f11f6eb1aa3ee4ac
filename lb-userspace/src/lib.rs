//! The `xlb` daemon and command line as a library, for the binary and for the tests.
//!
//! `ARCHITECTURE.md` at the top of the repository tells which way a packet, a change of configuration, a health
//! transition and a metric take through these modules.

pub mod cli;
pub mod config;
pub mod datapath;
pub mod health;
pub mod lab;
pub mod model;
pub mod net;
