//! Child processes: each is announced, none is silent for long, a failure names the command.

use std::{
    env,
    ffi::OsStr,
    io::{BufRead, BufReader, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// A silence of this length is broken by a line that says what still runs.
const HEARTBEAT: Duration = Duration::from_secs(8);
/// How long output is awaited after the process ended: a server that it left behind may hold the pipe open.
const AFTER_END: Duration = Duration::from_millis(500);

/// Runs a step whose output matters only if it fails; shows its last line and the elapsed time now and then.
///
/// # Errors
/// The step did not start, or failed: its output is printed before.
pub(crate) fn run_quietly(what: &str, command: &mut Command) -> Result<()> {
    eprintln!("→ {what}");
    let start = Instant::now();
    let mut output: Vec<u8> = Vec::new();
    let status = stream(what, "", command, |_, line| {
        output.extend_from_slice(line);
        None
    })?;
    if !status.success() {
        std::io::stderr().write_all(&output).ok();
        bail!("{what}: {} failed ({status})", display(command));
    }
    eprintln!("  done in {} s", start.elapsed().as_secs());
    Ok(())
}

/// Runs a command, passes its output through, each line after `mark`, and gives each line of its standard output
/// to `on_line`.
///
/// # Errors
/// The command did not start. That it failed is in the status.
pub(crate) fn run_openly(
    what: &str,
    mark: &str,
    command: &mut Command,
    mut on_line: impl FnMut(&str),
) -> Result<ExitStatus> {
    eprintln!("→ {what}");
    stream(what, mark, command, |source, line| {
        if source == Source::Out {
            on_line(&String::from_utf8_lossy(line));
        }
        Some(source)
    })
}

/// The standard output of a short command, trimmed.
///
/// # Errors
/// The command did not start or failed; its standard error is in the message.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{} did not start", display(command)))?;
    if !output.status.success() {
        bail!(
            "{} failed: {}",
            display(command),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A command that runs as root: directly, or through `sudo`.
pub(crate) fn as_root(program: impl AsRef<OsStr>) -> Command {
    if is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg("-n").arg(program);
    command
}

/// Fails unless this user is root or may become it without a password.
///
/// # Errors
/// Neither is the case: the message says what needed it.
pub(crate) fn require_root(what_for: &str) -> Result<()> {
    if is_root() || output(Command::new("sudo").args(["-n", "true"])).is_ok() {
        return Ok(());
    }
    bail!("{what_for} needs root: run this as root, or allow `sudo` without a password for this user")
}

pub(crate) fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// The first file of this name on the PATH or in the folders of administrators' programs.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain([
            "/usr/sbin".into(),
            "/sbin".into(),
            "/usr/bin".into(),
            "/bin".into(),
        ])
        .map(|folder| folder.join(name))
        .find(|program| program.is_file())
}

/// The root folder of the workspace.
pub(crate) fn workspace() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// The folder into which cargo builds.
pub(crate) fn target_dir() -> PathBuf {
    let chosen = env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    workspace().join(chosen)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Out,
    Err,
}

/// Runs a command; `sort` gets each line and says where it goes, if anywhere.
fn stream(
    what: &str,
    mark: &str,
    command: &mut Command,
    mut sort: impl FnMut(Source, &[u8]) -> Option<Source>,
) -> Result<ExitStatus> {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{} did not start", display(command)))?;
    let (sender, lines) = mpsc::channel();
    if let Some(out) = child.stdout.take() {
        forward(Source::Out, out, sender.clone());
    }
    if let Some(err) = child.stderr.take() {
        forward(Source::Err, err, sender);
    }

    let mut shown = Instant::now();
    let mut ended: Option<(ExitStatus, Instant)> = None;
    let mut last = String::new();
    loop {
        match lines.recv_timeout(Duration::from_millis(100)) {
            Ok((source, line)) => {
                // In one piece: other commands may run beside this one.
                let marked = [mark.as_bytes(), &line].concat();
                match sort(source, &line) {
                    Some(Source::Out) => std::io::stdout().write_all(&marked)?,
                    Some(Source::Err) => std::io::stderr().write_all(&marked)?,
                    None => {
                        last = String::from_utf8_lossy(&line).trim().chars().take(90).collect();
                        continue;
                    }
                }
                shown = Instant::now();
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => match ended {
                Some((_, when)) if when.elapsed() > AFTER_END => break,
                Some(_) => {}
                None => ended = child.try_wait()?.map(|status| (status, Instant::now())),
            },
        }
        if shown.elapsed() > HEARTBEAT {
            eprintln!("  … {what}: {} s {last}", start.elapsed().as_secs());
            shown = Instant::now();
        }
    }
    match ended {
        Some((status, _)) => Ok(status),
        None => Ok(child.wait()?),
    }
}

fn forward(source: Source, from: impl Read + Send + 'static, to: Sender<(Source, Vec<u8>)>) {
    thread::spawn(move || {
        let mut from = BufReader::new(from);
        loop {
            let mut line = Vec::new();
            match from.read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) if to.send((source, line)).is_err() => return,
                Ok(_) => {}
            }
        }
    });
}

fn display(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}
