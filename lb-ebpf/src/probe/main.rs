//! Health checks of `dsr`, `ipip` and `gue`: two programs between the host's stack and its interfaces, which have the
//! packets of probes travel like those of clients.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod answer;
#[cfg(target_arch = "bpf")]
mod frame;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod out;
#[cfg(target_arch = "bpf")]
mod program;

/// The programs are for the kernel alone; on other targets the crate only takes part in `--workspace`.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
