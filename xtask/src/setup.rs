//! `cargo xtask setup`: what building and testing need, installed where it is missing.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{kernel::Kernel, packages, process, toolchain};

/// What the machine is set up for; each includes the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scope {
    Build,
    /// Virtual machines, with one kernel or another.
    Vm,
    Test,
}

/// A program or a file's whole path, the Debian package that has it, and what it is for.
type Need = (&'static str, &'static str, &'static str);

const FOR_VM: &[Need] = &[
    (
        "qemu-system-x86_64",
        "qemu-system-x86",
        "runs the virtual machines",
    ),
    ("cpio", "cpio", "packs the file system of a virtual machine"),
    ("depmod", "kmod", "orders the kernel modules of a virtual machine"),
    ("ip", "iproute2", "network interfaces and namespaces"),
];
const FOR_TESTS: &[Need] = &[
    ("nginx", "nginx-light", "the backends of the tests"),
    ("curl", "curl", "a client of the tests"),
];

/// What balances beside xlb in `cargo xtask bench --end-to-end`, and what that needs.
const FOR_COMPARISON: &[Need] = &[
    (
        "/usr/lib/nginx/modules/ngx_stream_module.so",
        "libnginx-mod-stream",
        "nginx as a balancer",
    ),
    ("haproxy", "haproxy", "a balancer to compare with"),
    ("nft", "nftables", "a balancer to compare with"),
    ("ab", "apache2-utils", "makes the connections"),
    ("ethtool", "ethtool", "offloads of the interfaces"),
];

/// A further one, that only kernels of the virtual machines have.
const FOR_COMPARISON_IN_VM: &[Need] = &[("ipvsadm", "ipvsadm", "a balancer to compare with")];

/// Installs everything that is missing for `scope`; does nothing, quickly, when nothing is.
///
/// # Errors
/// The first thing that could not be installed.
pub(crate) fn run(scope: Scope) -> Result<()> {
    toolchain::install_one()?;
    toolchain::install_linker()?;
    if scope >= Scope::Vm {
        let mut needs = FOR_VM.to_vec();
        if scope == Scope::Test {
            needs.extend(FOR_TESTS);
            // Their measurement is tested, too.
            needs.extend(FOR_COMPARISON);
        }
        install_missing(&needs)?;
        packages::busybox()?;
    }
    if scope == Scope::Test {
        add_component("clippy")?;
        add_component("rustfmt")?;
        install_other_toolchain();
        for release in Kernel::TESTED {
            Kernel::get(release)?;
        }
        mount_bpf()?;
    }
    Ok(())
}

/// Installs what other balancers need to be compared with xlb, here or in a virtual machine.
///
/// # Errors
/// The first thing that could not be installed.
pub(crate) fn comparison(is_in_vm: bool) -> Result<()> {
    let mut needs = [FOR_TESTS, FOR_COMPARISON].concat();
    if is_in_vm {
        run(Scope::Vm)?;
        needs.extend(FOR_COMPARISON_IN_VM);
    } else {
        run(Scope::Build)?;
    }
    install_missing(&needs)
}

/// The files that a virtual machine needs for the comparison: each program or file, and where it is there.
///
/// # Errors
/// One is missing.
pub(crate) fn comparison_files() -> Result<Vec<(PathBuf, PathBuf)>> {
    let needs = FOR_COMPARISON.iter().chain(FOR_COMPARISON_IN_VM);
    needs
        .map(|(name, package, _)| {
            let here = process::find_program(name)
                .with_context(|| format!("{name} of the Debian package {package} is missing"))?;
            let there = if name.starts_with('/') {
                PathBuf::from(name)
            } else {
                Path::new("/usr/bin").join(name)
            };
            Ok((here, there))
        })
        .collect()
}

fn install_missing(needs: &[Need]) -> Result<()> {
    let missing: Vec<_> = needs
        .iter()
        .filter(|(program, ..)| process::find_program(program).is_none())
        .map(|(_, package, reason)| (*package, *reason))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    packages::install(&missing)
}

/// The object is tested as both toolchains build it. One that cannot be had is no reason not to run the other
/// tests: `cargo xtask test` says in its table that it was not there.
fn install_other_toolchain() {
    let Ok(chosen) = toolchain::Toolchain::chosen() else {
        return;
    };
    if let Err(error) = chosen.other().install() {
        eprintln!("  {error:#}");
    }
}

fn add_component(name: &str) -> Result<()> {
    if process::output(
        Command::new("cargo").args([if name == "clippy" { "clippy" } else { "fmt" }, "--version"]),
    )
    .is_ok()
    {
        return Ok(());
    }
    process::run_quietly(
        &format!("rustup component {name}: checks the code"),
        Command::new("rustup").args(["component", "add", name]),
    )
}

fn mount_bpf() -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let mounted = mounts
        .lines()
        .any(|line| line.split(' ').nth(1) == Some("/sys/fs/bpf"));
    if mounted || !Path::new("/sys/fs/bpf").exists() {
        return Ok(());
    }
    process::require_root("mounting bpffs on /sys/fs/bpf")?;
    process::run_quietly(
        "mount bpffs on /sys/fs/bpf: the data path is pinned there",
        process::as_root("mount").args(["-t", "bpf", "bpf", "/sys/fs/bpf"]),
    )
}
