//! The `xlb` daemon and command line as a library, for the binary and for the tests.
//!
//! `ARCHITECTURE.md` at the top of the repository tells which way a packet, a change of configuration, a health
//! transition and a metric take through these modules.

mod allocator;
pub mod api;
pub mod cli;
pub mod compile;
pub mod config;
pub mod controller;
pub mod daemon;
pub mod datapath;
pub mod demo;
pub mod health;
pub mod instance;
pub mod lab;
pub mod map_sizes;
pub mod model;
pub mod net;
pub mod observe;
pub mod reconcile;
pub mod seed;
