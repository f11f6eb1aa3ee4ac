//! The configuration file: [`raw`] as it is written, [`validated`] as it can be relied on.

pub mod validated;

pub use validated::*;
