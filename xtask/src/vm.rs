//! Virtual machines: QEMU boots a Debian kernel with one program and what it needs, and ends with its exit code.
//!
//! The first process in there is `tests/vm`.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{IsTerminal, Read, Write},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{build, kernel::Kernel, packages, process};

/// The program of the workspace that is the first process.
pub(crate) const INIT: &str = "vm-init";
/// Programs of this machine that the tests and the demo use, and that come along if they are here.
const TOOLS: &[&str] = &["sh", "bash", "ip", "tc", "ss", "nginx", "curl"];
/// How long a kernel may take to say its first word; beyond, the acceleration does not work.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// QEMU's status for `code` in the first process's exit device.
const STATUS_OF_SUCCESS: i32 = 0x10 * 2 + 1;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    kernel: String,
    /// Seconds after which the machine is stopped and the run has failed
    #[arg(long, default_value_t = 2400)]
    limit: u64,
    /// A static program of this machine and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    program: Vec<OsString>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let [program, rest @ ..] = arguments.program.as_slice() else {
        bail!("no program was given");
    };
    let mut inside = vec![OsString::from("/bin/program")];
    inside.extend_from_slice(rest);
    let code = boot(&Machine {
        kernel: &Kernel::get(&arguments.kernel)?,
        program: inside,
        files: vec![(PathBuf::from(program), PathBuf::from("bin/program"))],
        modules: &[],
        environment: vec!["XLB_BIN=/bin/xlb".to_owned(), "XLB_TEST_VM=1".to_owned()],
        terminal: false,
        keyboard: false,
        limit: Some(Duration::from_secs(arguments.limit)),
    })?;
    Ok(ExitCode::from(code))
}

#[derive(Debug)]
pub(crate) struct Machine<'a> {
    pub(crate) kernel: &'a Kernel,
    /// The program in the machine and its arguments.
    pub(crate) program: Vec<OsString>,
    /// Further programs: their path here, and there.
    pub(crate) files: Vec<(PathBuf, PathBuf)>,
    /// Modules that this run needs beside those of all.
    pub(crate) modules: &'a [&'a str],
    /// `NAME=VALUE`.
    pub(crate) environment: Vec<String>,
    /// The program's output is shown on a terminal.
    pub(crate) terminal: bool,
    /// What is typed here reaches the program.
    pub(crate) keyboard: bool,
    pub(crate) limit: Option<Duration>,
}

/// Boots the machine, shows the program's output as it comes, and returns its exit code.
///
/// # Errors
/// The machine did not start, stopped without an exit code, or exceeded its limit; the end of the kernel's log
/// is printed.
pub(crate) fn boot(machine: &Machine<'_>) -> Result<u8> {
    let folder = RunFolder::create()?;
    let initramfs = pack(machine, &folder.0)?;
    // One thread for all processors: with more, one may still run a breakpoint of the kernel's that another has just
    // replaced (text_poke_bp), of which the kernel then knows nothing and panics.
    let mut accelerations = vec!["tcg,thread=single"];
    if kvm_may_work() {
        accelerations.insert(0, "kvm");
    }
    for acceleration in accelerations {
        eprintln!("→ kernel {} in QEMU ({acceleration})", machine.kernel.version());
        match start(machine, &folder.0, &initramfs, acceleration)? {
            Some(code) => return Ok(code),
            None => eprintln!("  no word from the kernel"),
        }
    }
    show_log(&folder.0);
    bail!("kernel {} did not start in QEMU", machine.kernel.version())
}

/// Runs QEMU to its end. `None`: the kernel never spoke.
fn start(machine: &Machine<'_>, folder: &Path, initramfs: &Path, acceleration: &str) -> Result<Option<u8>> {
    // QEMU makes the terminal raw; what it was before is put back also if QEMU is stopped.
    let _terminal = machine.keyboard.then(SavedTerminal::save).transpose()?;
    let log = folder.join("kernel.log");
    let mut qemu = Qemu(
        Command::new("setpriv")
            // If this process is killed, the machine ends too.
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-machine", "q35", "-cpu", "max", "-m", "1536", "-smp", "2"])
            .args(["-accel", acceleration])
            .arg("-kernel")
            .arg(machine.kernel.image())
            .arg("-initrd")
            .arg(initramfs)
            .args([
                "-append",
                "console=ttyS0 panic=-1 oops=panic quiet no_timer_check",
            ])
            .arg("-chardev")
            .arg(format!("file,id=log,path={}", log.display()))
            .args(["-serial", "chardev:log"])
            .args([
                "-chardev",
                "stdio,id=program,signal=off",
                "-serial",
                "chardev:program",
            ])
            // Two virtio interfaces, joined by a wire.
            .args(["-netdev", &wire(0, 1), "-device", "virtio-net-pci,netdev=wire0"])
            .args(["-netdev", &wire(1, 0), "-device", "virtio-net-pci,netdev=wire1"])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"])
            // The sockets of the wire have short names, relative to here.
            .current_dir(folder)
            .stdin(if machine.keyboard {
                Stdio::inherit()
            } else {
                Stdio::null()
            })
            .stdout(Stdio::piped())
            .spawn()
            .context("setpriv and qemu-system-x86_64 did not start")?,
    );
    let spoke = Arc::new(AtomicBool::new(false));
    let output = qemu.0.stdout.take().context("QEMU has no output")?;
    let copier = {
        let spoke = Arc::clone(&spoke);
        thread::spawn(move || show(output, &spoke))
    };

    let started = Instant::now();
    let status = loop {
        if let Some(status) = qemu.0.try_wait()? {
            break status;
        }
        if !spoke.load(Ordering::Relaxed) && started.elapsed() > BOOT_LIMIT {
            return Ok(None);
        }
        if machine.limit.is_some_and(|limit| started.elapsed() > limit) {
            show_log(folder);
            bail!(
                "the virtual machine was stopped: it had not ended after {} s",
                started.elapsed().as_secs()
            );
        }
        thread::sleep(Duration::from_millis(20));
    };
    copier.join().ok();
    let code = status.code().and_then(exit_code);
    if code.is_none() {
        if acceleration == "kvm" && !spoke.load(Ordering::Relaxed) {
            return Ok(None);
        }
        show_log(folder);
        bail!(
            "the virtual machine stopped without an exit code: the kernel panicked or QEMU failed ({status})"
        );
    }
    eprintln!("  the machine ran for {:.1} s", started.elapsed().as_secs_f32());
    Ok(code)
}

/// One end of the wire between the two interfaces.
fn wire(from: u8, to: u8) -> String {
    format!("dgram,id=wire{from},local.type=unix,local.path=wire{from},remote.type=unix,remote.path=wire{to}")
}

fn exit_code(status: i32) -> Option<u8> {
    let code = status.checked_sub(STATUS_OF_SUCCESS)?;
    if code % 2 != 0 {
        return None;
    }
    u8::try_from(code / 2).ok()
}

/// On a host that is itself a paravirtual guest (`kvm_pvm`), KVM opens but hangs.
fn kvm_may_work() -> bool {
    let opens = File::options().read(true).write(true).open("/dev/kvm").is_ok();
    opens && !Path::new("/sys/module/kvm_pvm").exists()
}

fn show(mut output: impl Read, spoke: &AtomicBool) {
    let mut buffer = [0; 4096];
    let mut stdout = std::io::stdout();
    while let Ok(length @ 1..) = output.read(&mut buffer) {
        spoke.store(true, Ordering::Relaxed);
        let shown = stdout.write_all(&buffer[..length]).and_then(|()| stdout.flush());
        if shown.is_err() {
            return;
        }
    }
}

fn show_log(folder: &Path) {
    let log = fs::read(folder.join("kernel.log")).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = log.lines().collect();
    eprintln!("the end of the kernel's log:");
    for line in &lines[lines.len().saturating_sub(40)..] {
        eprintln!("  {line}");
    }
}

/// Builds the file system of the machine and packs it.
fn pack(machine: &Machine<'_>, folder: &Path) -> Result<PathBuf> {
    let root = folder.join("root");
    for name in [
        "usr/bin",
        "usr/sbin",
        "usr/lib",
        "usr/lib64",
        "etc",
        "root",
        "tmp",
        "vm/modules",
    ] {
        fs::create_dir_all(root.join(name))?;
    }
    for name in ["bin", "sbin", "lib", "lib64"] {
        std::os::unix::fs::symlink(format!("usr/{name}"), root.join(name))?;
    }
    for name in [
        "dev",
        "proc",
        "sys",
        "run",
        "var/log/nginx",
        "var/lib/nginx",
        "var/lib/xlb",
        "etc/xlb",
    ] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/var/www:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n",
    )?;
    fs::write(
        root.join("etc/group"),
        "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n",
    )?;
    fs::write(root.join("etc/hosts"), "127.0.0.1 localhost\n::1 localhost\n")?;

    let init = build::static_binary(INIT);
    let xlb = build::static_binary("xlb");
    ensure!(
        init.exists() && xlb.exists(),
        "{} is not built: `cargo xtask run` and `cargo xtask test` build it",
        init.display()
    );
    fs::copy(init, root.join("init"))?;
    install(&xlb, Path::new("bin/xlb"), &root)?;
    for (here, there) in &machine.files {
        install(here, there, &root)?;
    }
    for tool in TOOLS {
        if let Some(path) = process::find_program(tool) {
            let name = if *tool == "nginx" { "usr/sbin" } else { "usr/bin" };
            install(&path, &Path::new(name).join(tool), &root)?;
        }
    }
    install_busybox(&root)?;
    for (index, module) in machine.kernel.modules(machine.modules)?.iter().enumerate() {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        fs::copy(module, root.join(format!("vm/modules/{index:03}-{name}")))?;
    }
    write_program(machine, &root)?;

    let archive = folder.join("initramfs.cpio");
    let packed = Command::new("sh")
        .args([
            "-c",
            "find . | cpio --quiet --create --format=newc --owner=0:0 --file=\"$0\"",
        ])
        .arg(&archive)
        .current_dir(&root)
        .status()
        .context("cpio did not start")?;
    ensure!(packed.success(), "cpio did not pack {}", root.display());
    Ok(archive)
}

fn write_program(machine: &Machine<'_>, root: &Path) -> Result<()> {
    let mut environment = machine.environment.clone();
    environment.extend(["PATH=/bin:/sbin", "HOME=/root", "USER=root", "RUST_BACKTRACE=1"].map(str::to_owned));
    if machine.terminal {
        fs::write(root.join("vm/terminal"), "")?;
        let term = env::var("TERM").unwrap_or_else(|_| "vt100".to_owned());
        environment.push(format!("TERM={term}"));
    }
    for name in ["NO_COLOR", "XLB_LOG"] {
        if let Ok(value) = env::var(name) {
            environment.push(format!("{name}={value}"));
        }
    }
    let zero_ended = |entries: &mut dyn Iterator<Item = &OsStr>| {
        let mut bytes = Vec::new();
        for entry in entries {
            bytes.extend_from_slice(entry.as_bytes());
            bytes.push(0);
        }
        bytes
    };
    let arguments = zero_ended(&mut machine.program.iter().map(OsString::as_os_str));
    fs::write(root.join("vm/arguments"), arguments)?;
    let environment = zero_ended(&mut environment.iter().map(OsStr::new));
    fs::write(root.join("vm/environment"), environment)?;
    Ok(())
}

/// Copies a program and the libraries that it is linked with.
fn install(program: &Path, to: &Path, root: &Path) -> Result<()> {
    let copy = |from: &Path, to: &Path| -> Result<()> {
        let to = root.join(to.strip_prefix("/").unwrap_or(to));
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(from, &to).with_context(|| format!("{} was not copied", from.display()))?;
        Ok(())
    };
    copy(program, to)?;
    // A static program has none, and ldd fails for it.
    let libraries = process::output(Command::new("ldd").arg(program)).unwrap_or_default();
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        let library = Path::new(library);
        copy(library, library)?;
    }
    Ok(())
}

fn install_busybox(root: &Path) -> Result<()> {
    let busybox = packages::busybox()?;
    install(&busybox, Path::new("bin/busybox"), root)?;
    let names = process::output(Command::new(&busybox).arg("--list"))?;
    for name in names.lines() {
        let taken = ["bin", "sbin"]
            .iter()
            .any(|folder| root.join(folder).join(name).exists());
        if !taken {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
        }
    }
    Ok(())
}

/// A folder for one run, removed at its end; those that a killed run left are removed too.
struct RunFolder(PathBuf);

impl RunFolder {
    fn create() -> Result<Self> {
        let all = process::target_dir().join("vm/runs");
        fs::create_dir_all(&all)?;
        for entry in fs::read_dir(&all)?.flatten() {
            if !Path::new("/proc").join(entry.file_name()).exists() {
                fs::remove_dir_all(entry.path()).ok();
            }
        }
        let folder = all.join(std::process::id().to_string());
        fs::create_dir_all(&folder)?;
        Ok(Self(folder))
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// QEMU, stopped when this goes.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// The settings of the terminal, put back when this goes.
struct SavedTerminal(String);

impl SavedTerminal {
    fn save() -> Result<Self> {
        ensure!(std::io::stdin().is_terminal(), "there is no terminal");
        let output = Command::new("stty")
            .arg("-g")
            .stdin(Stdio::inherit())
            .output()
            .context("stty did not start")?;
        Ok(Self(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
    }
}

impl Drop for SavedTerminal {
    fn drop(&mut self) {
        Command::new("stty").arg(&self.0).status().ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_of_qemu_holds_the_exit_code_of_the_program() {
        assert_eq!(exit_code(33), Some(0));
        assert_eq!(exit_code(33 + 2 * 101), Some(101));
    }

    #[test]
    fn a_panic_or_a_failure_of_qemu_is_no_exit_code() {
        assert_eq!(exit_code(0), None);
        assert_eq!(exit_code(1), None);
    }
}
