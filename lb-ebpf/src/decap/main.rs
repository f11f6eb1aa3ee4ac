//! `xlb decap` on a backend's host: an XDP program that unwraps `ipip` and `gue` for the VIPs of its maps.
//!
//! What it does with a frame is decided by `lb_common::logic::encapsulation`; `unwrap` does it.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod program;
#[cfg(target_arch = "bpf")]
mod unwrap;

/// The program is for the kernel alone; on other targets the crate only takes part in `--workspace`.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
