//! The data path of xlb: one XDP program, one module per stage, in the order in which a packet meets them.
//!
//! `cursor → (lb_common::logic::headers) → service → flow → select → forward → verdict`; a known flow skips
//! `select`, a reply goes from `flow` straight to `forward`.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod flow;
#[cfg(target_arch = "bpf")]
mod forward;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod program;
#[cfg(target_arch = "bpf")]
mod select;
#[cfg(target_arch = "bpf")]
mod service;
#[cfg(target_arch = "bpf")]
mod verdict;

#[cfg(target_arch = "bpf")]
use lb_ebpf::cursor;

/// The program is for the kernel alone; on other targets the crate only takes part in `--workspace`.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
