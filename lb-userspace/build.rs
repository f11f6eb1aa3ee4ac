//! Builds the objects for the kernel and hands them to the crate as files `.o` in `OUT_DIR`: those of `xlb`, or, as the
//! build script of the crate `bench`, that of the measurements.
//!
//! They need a toolchain of their own: `-Zbuild-std` with rust-src, and a CPU that the flags name. Which one
//! is found as `cargo xtask setup` leaves it; `XLB_EBPF_TOOLCHAIN_CARGO`, `XLB_EBPF_TOOLCHAIN_RUSTC` and
//! `XLB_BPF_LINKER` override that.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

/// The nightly whose LLVM matches bpf-linker's.
const NIGHTLY: &str = "nightly-2026-05-20";
/// Debian's toolchain for its browsers, used where rustup has no such nightly.
const DEBIAN: (&str, &str) = ("/usr/bin/cargo", "/usr/bin/rustc");
const TARGET: &str = "bpfel-unknown-none";
/// The binaries of lb-ebpf that `xlb` holds: the data path, the program of `xlb decap`, those of probes, and the barrier.
const OBJECTS: &[&str] = &["lb-ebpf", "lb-ebpf-decap", "lb-ebpf-probe", "lb-ebpf-barrier"];
/// What measures them.
const BENCH_OBJECTS: &[&str] = &["lb-ebpf-bench"];

fn main() {
    if let Err(error) = build() {
        eprintln!("the eBPF objects were not built: {error}");
        eprintln!("`cargo xtask setup` installs what it needs");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    for name in [
        "XLB_EBPF_TOOLCHAIN_CARGO",
        "XLB_EBPF_TOOLCHAIN_RUSTC",
        "XLB_BPF_LINKER",
    ] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let workspace = PathBuf::from(variable("CARGO_MANIFEST_DIR")?).join("..");
    for path in [
        "lb-ebpf/src",
        "lb-ebpf/Cargo.toml",
        "lb-common/src",
        "lb-common/Cargo.toml",
    ] {
        println!("cargo:rerun-if-changed={}", workspace.join(path).display());
    }
    let out_dir = PathBuf::from(variable("OUT_DIR")?);
    let debug = variable("PROFILE")? == "debug";
    let (cargo, rustc) = toolchain()?;
    let linker = linker(&workspace)?;
    let objects = match variable("CARGO_PKG_NAME")?.as_str() {
        "bench" => BENCH_OBJECTS,
        _ => OBJECTS,
    };

    // A target directory of its own: the outer cargo holds the lock of the workspace's. One per profile, next to
    // the workspace's, so that a clean checkout has a clean object.
    let target_dir = out_dir.join("ebpf-target");
    let mut flags = OsString::from("-Cdebuginfo=2\x1f-Clink-arg=--btf\x1f-Ctarget-cpu=v3\x1f-Clinker=");
    flags.push(&linker);

    let mut command = Command::new(&cargo);
    command
        .current_dir(&workspace)
        .args(["build", "--release", "--locked", "--package", "lb-ebpf"])
        .args(objects.iter().flat_map(|name| ["--bin", name]))
        .args(["--target", TARGET, "-Zbuild-std=core"])
        .args(if debug { &["--features", "log"][..] } else { &[] })
        .arg("--target-dir")
        .arg(&target_dir);
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        // What the outer cargo set for itself would steer the inner one.
        if name.starts_with("CARGO") && name != "CARGO_HOME"
            || name.starts_with("RUST") && name != "RUSTUP_HOME"
        {
            command.env_remove(name);
        }
    }
    command
        .env("RUSTC", &rustc)
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .env("RUSTC_BOOTSTRAP", "1");
    let output = command
        .output()
        .map_err(|error| format!("{} did not start: {error}", cargo.display()))?;
    if !output.status.success() {
        return Err(format!(
            "{}\n{command:?} failed",
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    for name in objects {
        let object = target_dir.join(TARGET).join("release").join(name);
        std::fs::copy(&object, out_dir.join(format!("{name}.o")))
            .map_err(|error| format!("{} was not copied: {error}", object.display()))?;
    }
    Ok(())
}

/// Paths of the cargo and the rustc that build the object.
fn toolchain() -> Result<(PathBuf, PathBuf), String> {
    if let (Some(cargo), Some(rustc)) = (
        env::var_os("XLB_EBPF_TOOLCHAIN_CARGO"),
        env::var_os("XLB_EBPF_TOOLCHAIN_RUSTC"),
    ) {
        return Ok((cargo.into(), rustc.into()));
    }
    if let (Some(cargo), Some(rustc)) = (rustup_which("cargo"), rustup_which("rustc")) {
        return Ok((cargo, rustc));
    }
    if Path::new(DEBIAN.0).exists() && Path::new(DEBIAN.1).exists() {
        return Ok((DEBIAN.0.into(), DEBIAN.1.into()));
    }
    Err(format!(
        "neither rustup's {NIGHTLY} nor Debian's {} is there",
        DEBIAN.0
    ))
}

fn rustup_which(program: &str) -> Option<PathBuf> {
    let output = Command::new("rustup")
        .args(["which", "--toolchain", NIGHTLY, program])
        .output()
        .ok()?;
    let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    (output.status.success() && path.exists()).then_some(path)
}

fn linker(workspace: &Path) -> Result<PathBuf, String> {
    if let Some(linker) = env::var_os("XLB_BPF_LINKER") {
        return Ok(linker.into());
    }
    let installed = workspace.join("target/tools/bin/bpf-linker");
    if let Ok(path) = installed.canonicalize() {
        return Ok(path);
    }
    let on_path = env::var_os("PATH").and_then(|path| {
        env::split_paths(&path)
            .map(|folder| folder.join("bpf-linker"))
            .find(|path| path.exists())
    });
    on_path.ok_or_else(|| format!("bpf-linker is neither {} nor on the PATH", installed.display()))
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}
