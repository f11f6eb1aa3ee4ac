//! The way from what the maps hold to what they shall hold; start, reload, health change, drain and repair are one.

pub mod plan;

pub use self::plan::plan;
