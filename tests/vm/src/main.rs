//! The first process of a test VM: prepares the kernel, runs one program, and ends the VM with its exit code.
//!
//! `cargo xtask` puts into the initramfs, beside the program: `/vm/arguments` (the program and its arguments, each
//! ended by a zero byte), `/vm/environment` (`NAME=VALUE`, likewise), `/vm/terminal` (there when a person sits
//! at the other end) and `/vm/modules/` (in the order in which they load). The kernel logs to the first serial port;
//! the second is the program's standard input and output.

use std::{
    ffi::{CString, OsString},
    fs::{self, File, OpenOptions},
    io::{self, PipeReader, Write},
    os::{fd::AsRawFd, unix::ffi::OsStringExt, unix::process::ExitStatusExt},
    path::Path,
    process::{Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{
    mount::{MsFlags, mount},
    sys::{
        resource::{Resource, setrlimit},
        wait::{WaitStatus, wait},
    },
    unistd::Pid,
};

/// From include/uapi/linux/module.h.
const MODULE_INIT_COMPRESSED_FILE: libc::c_int = 4;
/// QEMU's `isa-debug-exit` device.
const EXIT_PORT: u16 = 0xf4;
/// A program's exit code 0 as the value for that device: above what a kernel that stops leaves behind.
const EXIT_BASE: u32 = 0x10;
/// QEMU's own exit status is `value * 2 + 1` in eight bits.
const LARGEST_EXIT_CODE: i32 = 111;

fn main() {
    let code = run().unwrap_or_else(|error| {
        tell(&format!("vm-init: {error:#}\n"));
        LARGEST_EXIT_CODE
    });
    end(code);
}

fn run() -> Result<i32> {
    mount_all()?;
    load_modules()?;
    // Before 5.11 maps count against this limit, and the failure is a misleading EINVAL.
    setrlimit(
        Resource::RLIMIT_MEMLOCK,
        nix::libc::RLIM_INFINITY,
        nix::libc::RLIM_INFINITY,
    )
    .context("RLIMIT_MEMLOCK was not raised")?;
    setrlimit(Resource::RLIMIT_NOFILE, 1 << 16, 1 << 16).context("RLIMIT_NOFILE was not raised")?;
    run_tool("/bin/ip", &["link", "set", "lo", "up"])?;

    let terminal = Path::new("/vm/terminal").exists();
    if !terminal {
        run_tool("/bin/stty", &["-F", "/dev/ttyS1", "raw", "-echo"])?;
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    tell(&format!("vm-init: kernel {} is up\n", release.trim()));
    run_program(terminal)
}

fn mount_all() -> Result<()> {
    for (kind, target) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("devpts", "/dev/pts"),
        ("tmpfs", "/run"),
        ("bpf", "/sys/fs/bpf"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("tracefs", "/sys/kernel/tracing"),
    ] {
        fs::create_dir_all(target).ok();
        mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("{kind} was not mounted on {target}"))?;
    }
    Ok(())
}

fn load_modules() -> Result<()> {
    let mut modules: Vec<_> = fs::read_dir("/vm/modules")?
        .collect::<io::Result<Vec<_>>>()?
        .into_iter()
        .map(|entry| entry.path())
        .collect();
    modules.sort();
    for module in modules {
        let file = File::open(&module)?;
        let compressed = module.extension().is_some_and(|extension| extension != "ko");
        let flags = if compressed {
            MODULE_INIT_COMPRESSED_FILE
        } else {
            0
        };
        let parameters = CString::default();
        // SAFETY: the descriptor is open and the parameter string ends with a zero byte, both for the whole call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_finit_module,
                file.as_raw_fd(),
                parameters.as_ptr(),
                flags,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("module {} was not loaded", module.display()));
        }
    }
    Ok(())
}

/// Runs the program to its end, and meanwhile reaps what others left to the first process.
fn run_program(terminal: bool) -> Result<i32> {
    let arguments = zero_ended("/vm/arguments")?;
    let environment = zero_ended("/vm/environment")?;
    let (program, arguments) = arguments.split_first().context("/vm/arguments is empty")?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/root").env_clear();
    for entry in environment {
        let entry = entry.into_string().ok().context("/vm/environment is not UTF-8")?;
        let (name, value) = entry
            .split_once('=')
            .context("an entry of /vm/environment has no =")?;
        command.env(name, value);
    }

    let copier = if terminal {
        let serial = OpenOptions::new().read(true).write(true).open("/dev/ttyS1")?;
        command
            .stdin(serial.try_clone()?)
            .stdout(serial.try_clone()?)
            .stderr(serial);
        None
    } else {
        // A pipe, so that the program sees what is true: there is no terminal.
        let (reader, writer) = io::pipe()?;
        command
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer);
        Some(thread::spawn(move || copy_to_serial(reader)))
    };
    let child = command
        .spawn()
        .with_context(|| format!("{} did not start", program.display()))?;
    drop(command);
    let status = wait_for(Pid::from_raw(child.id().cast_signed()))?;
    if let Some(copier) = copier {
        // What the program started may hold the pipe open: give the rest of the output a moment, not for ever.
        for _ in 0..20 {
            if copier.is_finished() {
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, signal) => {
            tell(&format!(
                "vm-init: signal {} ended the program\n",
                signal.unwrap_or(0)
            ));
            LARGEST_EXIT_CODE
        }
    })
}

fn wait_for(program: Pid) -> Result<ExitStatus> {
    loop {
        match wait().context("the program was not waited for")? {
            WaitStatus::Exited(pid, code) if pid == program => return Ok(ExitStatus::from_raw(code << 8)),
            WaitStatus::Signaled(pid, signal, _) if pid == program => {
                return Ok(ExitStatus::from_raw(signal as i32));
            }
            _ => {}
        }
    }
}

fn zero_ended(path: &str) -> Result<Vec<OsString>> {
    let bytes = fs::read(path).with_context(|| format!("{path} was not read"))?;
    let mut entries: Vec<_> = bytes
        .split(|byte| *byte == 0)
        .map(|entry| OsString::from_vec(entry.to_vec()))
        .collect();
    entries.pop();
    Ok(entries)
}

fn copy_to_serial(mut reader: PipeReader) {
    if let Ok(mut serial) = OpenOptions::new().write(true).open("/dev/ttyS1") {
        io::copy(&mut reader, &mut serial).ok();
    }
}

fn run_tool(program: &str, arguments: &[&str]) -> Result<()> {
    let status = Command::new(program)
        .args(arguments)
        .status()
        .with_context(|| format!("{program} did not start"))?;
    anyhow::ensure!(status.success(), "{program} {arguments:?} failed");
    Ok(())
}

/// Writes to both serial ports: the kernel's log keeps it, the person sees it.
fn tell(text: &str) {
    for port in ["/dev/ttyS0", "/dev/ttyS1"] {
        if let Ok(mut port) = OpenOptions::new().write(true).open(port) {
            port.write_all(text.as_bytes()).ok();
        }
    }
}

/// Ends the VM with `code`, after both serial ports sent everything.
fn end(code: i32) -> ! {
    for port in ["/dev/ttyS0", "/dev/ttyS1"] {
        if let Ok(port) = OpenOptions::new().write(true).open(port) {
            // SAFETY: the descriptor is open for the whole call.
            unsafe { libc::tcdrain(port.as_raw_fd()) };
        }
    }
    let value = EXIT_BASE + code.clamp(0, LARGEST_EXIT_CODE).cast_unsigned();
    // SAFETY: the port belongs to QEMU's exit device, which this VM always has; the write ends the VM, and
    // touches no memory of this process.
    unsafe {
        libc::ioperm(u64::from(EXIT_PORT), 4, 1);
        std::arch::asm!("out dx, eax", in("dx") EXIT_PORT, in("eax") value, options(nomem, nostack));
    }
    // Not reached; a first process that returned would be a kernel panic.
    loop {
        thread::park();
    }
}
