//! `cargo xtask build`: the `xlb` binary, with the set-up that is missing.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{process, setup, toolchain::Toolchain};

/// Named explicitly, so that the flags of the static build do not reach the build scripts and macros, which
/// cannot be static. The artifacts have a folder of their own and disturb no other build.
pub(crate) const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Build target/release/xlb, optimized, as one static binary
    #[arg(long)]
    release: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    setup::run(setup::Scope::Build)?;
    let binary = if arguments.release {
        build_static(&[])?;
        publish_static()?
    } else {
        build_debug()?
    };
    println!("{}", binary.display());
    Ok(())
}

/// Builds the unoptimized `xlb` and returns its path.
///
/// # Errors
/// The build failed.
pub(crate) fn build_debug() -> Result<PathBuf> {
    // All builds select the whole workspace: the features of the dependencies are then always the same, and
    // nothing is compiled twice.
    let mut command = cargo("build")?;
    build("cargo build", command.args(["--workspace", "--bin", "xlb"]))?;
    Ok(process::target_dir().join("debug/xlb"))
}

/// Builds the static `xlb`, and other programs of the workspace.
///
/// # Errors
/// The build failed, or `xlb` is not static.
pub(crate) fn build_static(others: &[&str]) -> Result<()> {
    let mut command = cargo_static("build")?;
    command.args(["--workspace", "--bin", "xlb"]);
    command.args(others.iter().flat_map(|name| ["--bin", *name]));
    build("cargo build --release, static", &mut command)?;
    let binary = static_binary("xlb");
    // ldd fails for some static binaries, and says so on either stream.
    let output = Command::new("ldd")
        .arg(&binary)
        .output()
        .context("ldd did not start")?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    if !text.contains("statically linked") && !text.contains("not a dynamic executable") {
        bail!("{} is not static:\n{text}", binary.display());
    }
    Ok(())
}

/// The path of a program that [`build_static`] built.
pub(crate) fn static_binary(name: &str) -> PathBuf {
    process::target_dir()
        .join(STATIC_TARGET)
        .join("release")
        .join(name)
}

/// `cargo` in the workspace, with the eBPF toolchain that was chosen.
///
/// # Errors
/// That toolchain is not there.
pub(crate) fn cargo(subcommand: &str) -> Result<Command> {
    cargo_with(Toolchain::chosen()?, subcommand)
}

/// `cargo` in the workspace, with this eBPF toolchain.
///
/// # Errors
/// That toolchain is not there.
pub(crate) fn cargo_with(toolchain: Toolchain, subcommand: &str) -> Result<Command> {
    let mut command = Command::new("cargo");
    command
        .current_dir(process::workspace())
        .args([subcommand, "--locked"])
        .envs(toolchain.environment()?);
    Ok(command)
}

/// `cargo` for static, optimized programs.
///
/// # Errors
/// The eBPF toolchain is not there.
pub(crate) fn cargo_static(subcommand: &str) -> Result<Command> {
    let mut flags: Vec<String> = match (env::var("CARGO_ENCODED_RUSTFLAGS"), env::var("RUSTFLAGS")) {
        (Ok(encoded), _) => encoded.split('\x1f').map(str::to_owned).collect(),
        (_, Ok(plain)) => plain.split_whitespace().map(str::to_owned).collect(),
        _ => Vec::new(),
    };
    flags.retain(|flag| !flag.is_empty());
    flags.push("-Ctarget-feature=+crt-static".to_owned());
    let mut command = cargo(subcommand)?;
    command
        .args(["--release", "--target", STATIC_TARGET])
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    Ok(command)
}

fn build(what: &str, command: &mut Command) -> Result<()> {
    let status = process::run_openly(what, "", command, |_| ())?;
    if !status.success() {
        bail!("{what} failed");
    }
    Ok(())
}

/// Puts the static `xlb` where `cargo build --release` puts its own.
fn publish_static() -> Result<PathBuf> {
    let published = process::target_dir().join("release/xlb");
    let unfinished = published.with_extension("unfinished");
    fs::create_dir_all(published.parent().unwrap_or(Path::new("/")))?;
    // Renamed into place: cargo's own binary there is a hard link, and writing to it would change cargo's copy.
    fs::copy(static_binary("xlb"), &unfinished)
        .and_then(|_| fs::rename(&unfinished, &published))
        .with_context(|| format!("{} was not written", published.display()))?;
    Ok(published)
}
