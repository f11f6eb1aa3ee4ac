//! What the data path in the kernel and the `xlb` daemon must agree on, each type defined once.
//!
//! [`abi`] holds what crosses the kernel boundary in a map; [`logic`] holds pure functions that both sides use.
//! Nothing here allocates, calls a helper or touches a map, so the same code runs in the kernel, in the daemon
//! and in the tests.
#![cfg_attr(not(test), no_std)]

pub mod abi;
pub mod logic;
