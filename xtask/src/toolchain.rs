//! The toolchain of the eBPF object: which one, where it is, and how it gets here.
//!
//! `lb-userspace/build.rs` drives it, and finds it at the same places when nothing is said.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{packages, process};

/// Pinned by date, so that its LLVM is the one that bpf-linker links with.
const NIGHTLY: &str = "nightly-2026-05-20";
const LINKER_VERSION: &str = "0.13.0";
const LLVM: &str = "/usr/lib/llvm-22";
const DEBIAN_SOURCE: &str = "/usr/lib/rustlib/src/rust/library/core/src/lib.rs";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Toolchain {
    /// rustup's nightly, with rust-src.
    Nightly,
    /// Debian's Rust for its browsers, new enough and with sources, but not a nightly.
    Debian,
}

impl Toolchain {
    /// The toolchain that builds: the one that `XLB_EBPF_TOOLCHAIN` names, else the nightly if it is there.
    ///
    /// # Errors
    /// The variable names neither.
    pub(crate) fn chosen() -> Result<Self> {
        match env::var("XLB_EBPF_TOOLCHAIN").as_deref() {
            Ok("nightly") => Ok(Self::Nightly),
            Ok("debian") => Ok(Self::Debian),
            Ok(other) => {
                bail!("XLB_EBPF_TOOLCHAIN is {other:?}: write \"nightly\" or \"debian\", or unset it")
            }
            Err(_) => Ok(Self::default_here()),
        }
    }

    pub(crate) fn other(self) -> Self {
        match self {
            Self::Nightly => Self::Debian,
            Self::Debian => Self::Nightly,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Nightly => "nightly",
            Self::Debian => "debian",
        }
    }

    /// The paths of its cargo and its rustc, if it is complete.
    pub(crate) fn find(self) -> Option<(PathBuf, PathBuf)> {
        match self {
            Self::Nightly => {
                let cargo = rustup_which("cargo")?;
                let rustc = rustup_which("rustc")?;
                let root = rustc.parent()?.parent()?;
                let source = root.join("lib/rustlib/src/rust/library/core/src/lib.rs");
                source.exists().then_some((cargo, rustc))
            }
            Self::Debian => {
                let (cargo, rustc) = (Path::new("/usr/bin/cargo"), Path::new("/usr/bin/rustc"));
                let complete = cargo.exists() && rustc.exists() && Path::new(DEBIAN_SOURCE).exists();
                complete.then(|| (cargo.into(), rustc.into()))
            }
        }
    }

    /// What `lb-userspace/build.rs` must be told to use this toolchain: nothing where it is the default, so that
    /// `cargo build` and `cargo xtask build` agree and neither undoes the other's work.
    ///
    /// # Errors
    /// The toolchain is not there.
    pub(crate) fn environment(self) -> Result<Vec<(&'static str, PathBuf)>> {
        let (cargo, rustc) = self
            .find()
            .with_context(|| format!("the {} toolchain for eBPF is not there", self.name()))?;
        if self == Self::default_here() {
            return Ok(Vec::new());
        }
        Ok(vec![
            ("XLB_EBPF_TOOLCHAIN_CARGO", cargo),
            ("XLB_EBPF_TOOLCHAIN_RUSTC", rustc),
        ])
    }

    /// Installs the toolchain if it is missing.
    ///
    /// # Errors
    /// It could not be fetched.
    pub(crate) fn install(self) -> Result<()> {
        if self.find().is_some() {
            return Ok(());
        }
        match self {
            Self::Nightly => process::run_quietly(
                &format!("rustup toolchain {NIGHTLY} with rust-src: builds the eBPF object"),
                Command::new("rustup").args([
                    "toolchain",
                    "install",
                    NIGHTLY,
                    "--profile",
                    "minimal",
                    "-c",
                    "rust-src",
                    "--no-self-update",
                ]),
            ),
            Self::Debian => packages::install(&[
                ("rustc-web", "builds the eBPF object without a nightly"),
                ("cargo-web", "drives it"),
                ("rust-web-src", "the source of `core`, compiled for eBPF"),
            ]),
        }
    }

    fn default_here() -> Self {
        match Self::Nightly.find() {
            None if Self::Debian.find().is_some() => Self::Debian,
            _ => Self::Nightly,
        }
    }
}

/// Installs the toolchain that builds: the one asked for, or the nightly, or Debian's where rustup has no nightly.
///
/// # Errors
/// None could be installed.
pub(crate) fn install_one() -> Result<()> {
    let chosen = Toolchain::chosen()?;
    let Err(error) = chosen.install() else {
        return Ok(());
    };
    if env::var_os("XLB_EBPF_TOOLCHAIN").is_some() {
        return Err(error);
    }
    eprintln!("  {error:#}\n  Debian's toolchain is used instead");
    Toolchain::Debian.install()
}

/// Builds bpf-linker into `target/tools` if it is missing there.
///
/// # Errors
/// Its packages or it could not be installed.
pub(crate) fn install_linker() -> Result<()> {
    // Where lb-userspace/build.rs looks, whatever CARGO_TARGET_DIR says.
    let tools = process::workspace().join("target/tools");
    let version = process::output(Command::new(tools.join("bin/bpf-linker")).arg("--version"));
    if version.is_ok_and(|version| version.ends_with(LINKER_VERSION)) {
        return Ok(());
    }
    if !Path::new(LLVM).join("include/llvm-c/Core.h").exists() {
        packages::install(&[(
            "llvm-22-dev",
            "bpf-linker links with the LLVM of the eBPF toolchain",
        )])?;
    }
    process::run_quietly(
        &format!("bpf-linker {LINKER_VERSION} into target/tools: links the eBPF object"),
        Command::new("cargo")
            .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked"])
            .args(["--no-default-features", "--features", "llvm-22", "--force"])
            .arg("--root")
            .arg(&tools)
            .env("LLVM_PREFIX", LLVM)
            .env("LLVM_SYS_221_PREFIX", LLVM)
            // Our own flags and folders are not meant for it.
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env("CARGO_TARGET_DIR", tools.join("build")),
    )?;
    std::fs::remove_dir_all(tools.join("build")).ok();
    Ok(())
}

fn rustup_which(program: &str) -> Option<PathBuf> {
    let path =
        process::output(Command::new("rustup").args(["which", "--toolchain", NIGHTLY, program])).ok()?;
    let path = PathBuf::from(path);
    path.exists().then_some(path)
}
