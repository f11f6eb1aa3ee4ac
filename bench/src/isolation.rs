//! File systems of our own, so that nothing of a measurement can stay behind.
//!
//! Pins, sockets and files of the balancer are on file systems that are mounted for this process and its children
//! alone. The kernel frees them, and with them maps and programs, when the last of these processes ends, in whatever
//! way: with an error, by Ctrl-C, killed. Namespaces and daemon go by themselves, see `xlb::lab`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// What is hidden of the machine, and holds files of ours.
const FOLDER: &str = "/run";

/// Hides `/sys/fs/bpf` and [`FOLDER`] of the machine behind empty ones. To be called before other threads are started.
///
/// # Errors
/// This process is not root's, or may not mount.
pub fn enter() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "loading programs and making network namespaces needs root"
    );
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace was not made")?;
    // What is mounted from here on is not passed on to the machine.
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("the mounts of the machine were not left alone")?;
    for (kind, folder) in [("bpf", "/sys/fs/bpf"), ("tmpfs", FOLDER)] {
        mount(Some(kind), folder, Some(kind), MsFlags::empty(), none)
            .with_context(|| format!("a {kind} of our own was not mounted on {folder}"))?;
    }
    Ok(())
}

/// Makes a folder for a program's files, which goes with the file system.
///
/// # Errors
/// The folder cannot be made.
pub fn folder(name: &str) -> Result<PathBuf> {
    let folder = Path::new(FOLDER).join("xlb-bench").join(name);
    fs::create_dir_all(&folder).with_context(|| format!("{} was not made", folder.display()))?;
    Ok(folder)
}
