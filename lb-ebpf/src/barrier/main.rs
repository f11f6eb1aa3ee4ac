//! Stands in for the XDP program, in front of the host's stack, while that changes its mode: nothing gets past it.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod program;

/// The program is for the kernel alone; on other targets the crate only takes part in `--workspace`.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
