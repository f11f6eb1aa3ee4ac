//! What `cargo xtask bench` measures with: the harness, an empty program to subtract, and the floor, which is what a
//! balancer can cost at least.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
// AtomicU64 cannot be added to on this target.
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics), allow(internal_features))]

#[cfg(target_arch = "bpf")]
mod floor;
#[cfg(target_arch = "bpf")]
mod harness;

#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// The programs are for the kernel alone; on other targets the crate only takes part in `--workspace`.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
