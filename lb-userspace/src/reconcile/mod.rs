//! The way from what the maps hold to what they shall hold; start, reload, health change, drain and repair are one.

pub mod apply;
pub mod flows;
pub mod plan;

pub use self::{
    apply::{Applied, ReconcileError, Reconciler},
    flows::{Reset, Scope, Step, Sweep, Swept, drained},
    plan::plan,
};

#[cfg(test)]
mod tests;
