//! Probe `exec`: a program on this host exits with 0.

use std::{
    convert::Infallible,
    io,
    os::fd::{FromRawFd, OwnedFd},
    process::{ExitStatus, Stdio},
    sync::Arc,
};

use nix::{
    libc,
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::{
    io::{AsyncReadExt, Interest, unix::AsyncFd},
    net::unix::pipe,
    process::{self, Child},
    sync::{Mutex, OwnedMutexGuard, oneshot},
    task,
};

use super::{Attempt, Failure, Limit, ProbeError, Target, shortened};
use crate::config::Command;

/// Bytes of the output that are kept to find its first line in; the rest is read and thrown away.
const OUTPUT_BOUND: usize = 4096;

/// Whose turn it is among the runs for one backend: a run has it until its process is gone.
pub type Turn = Arc<Mutex<()>>;

/// Runs the program once; it and all that it has started are killed at the end, at the limit, or when the future is
/// dropped.
pub(super) async fn probe(
    target: &Target,
    command: &Command,
    turn: &Turn,
    limit: Limit,
) -> Result<(), ProbeError> {
    let attempt = || Attempt::Run(command.program.clone());
    // A process that hangs in the kernel outlives its SIGKILL.
    let Ok(turn) = limit.on(async { Ok(Arc::clone(turn).lock_owned().await) }).await else {
        return Err(attempt().failed(Failure::StillRunning));
    };
    let (reader, writer) = io::pipe().map_err(|source| start_error(command, source))?;
    let mut output = Output::new(reader).map_err(|source| start_error(command, source))?;
    let process = prepare(target, command, writer).map_err(|source| start_error(command, source))?;
    // Starting blocks until the file is read, and many may start at once.
    let started = async { Ok(task::spawn_blocking(move || Run::start(process, turn)).await) };
    let running = limit
        .on(started)
        .await
        .map_err(|failure| attempt().failed(failure))?
        .unwrap_or_else(|error| Err(io::Error::other(error)))
        .map_err(|source| start_error(command, source))?;

    let (alive, ended) = oneshot::channel::<Infallible>();
    let mut supervisor = task::spawn(running.supervise(ended));
    let exit = async {
        loop {
            tokio::select! {
                () = output.read() => {}
                status = &mut supervisor => {
                    output.take_rest();
                    return status.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(Failure::Io);
                }
            }
        }
    };
    let result = limit.on(exit).await;
    drop(alive);
    let failure = match result {
        Ok(status) if status.success() => return Ok(()),
        Ok(status) => end(status),
        Err(failure) => failure.to_string(),
    };
    Err(attempt().failed(Failure::Process {
        end: failure,
        output: output.first_line(),
    }))
}

fn start_error(command: &Command, source: io::Error) -> ProbeError {
    ProbeError::Start {
        program: command.program.clone(),
        source,
    }
}

/// The process as it is to be: nothing of the daemon's environment, and a process group of its own.
fn prepare(target: &Target, command: &Command, output: io::PipeWriter) -> io::Result<process::Command> {
    let mut process = process::Command::new(&command.program);
    process
        .args(&command.arguments)
        .env_clear()
        .env("XLB_SERVICE", &target.service)
        .env("XLB_BACKEND", &target.backend)
        .env("XLB_ADDRESS", target.address.ip().to_string())
        .env("XLB_PORT", target.address.port().to_string())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .process_group(0)
        .kill_on_drop(true);
    Ok(process)
}

/// A process that runs, with its turn.
struct Run {
    child: Child,
    /// Readable when the process has exited.
    exited: AsyncFd<OwnedFd>,
    _turn: OwnedMutexGuard<()>,
}

impl Run {
    fn start(mut process: process::Command, turn: OwnedMutexGuard<()>) -> io::Result<Self> {
        let child = process.spawn()?;
        let exited = pidfd(&child).inspect_err(|_| kill_group(&child))?;
        Ok(Self {
            child,
            exited,
            _turn: turn,
        })
    }

    /// Awaits the end of the process, or of `ended`, and leaves nothing of its group behind.
    async fn supervise(mut self, ended: oneshot::Receiver<Infallible>) -> io::Result<ExitStatus> {
        tokio::select! {
            ready = self.exited.readable() => drop(ready?),
            _ = ended => {}
        }
        // Before the process is waited for: until then its id, which is that of the group, belongs to nobody else.
        kill_group(&self.child);
        self.child.wait().await
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        kill_group(&self.child);
    }
}

fn kill_group(leader: &Child) {
    // There is no id any more where the process has been waited for.
    if let Some(pid) = leader.id() {
        // It fails only where there is nobody left to kill.
        let _ = killpg(Pid::from_raw(pid as i32), Signal::SIGKILL);
    }
}

/// A descriptor that is readable when the process has exited.
fn pidfd(child: &Child) -> io::Result<AsyncFd<OwnedFd>> {
    let pid = child.id().ok_or(io::ErrorKind::NotFound)?;
    // SAFETY: the call takes two numbers and touches no memory of ours.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, which nobody else has.
    let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor as i32) };
    // SAFETY: an owned descriptor stays the same one, and open, for as long as it is owned.
    unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }.map_err(io::Error::from)
}

/// What the process writes to stdout and stderr.
struct Output {
    /// `None` after its end.
    pipe: Option<pipe::Receiver>,
    start: Vec<u8>,
}

impl Output {
    fn new(reader: io::PipeReader) -> io::Result<Self> {
        Ok(Self {
            pipe: Some(pipe::Receiver::from_owned_fd(reader.into())?),
            start: Vec::new(),
        })
    }

    /// Reads some of it; never ends where there is no more.
    async fn read(&mut self) {
        let Some(pipe) = &mut self.pipe else {
            return std::future::pending().await;
        };
        let mut chunk = [0; OUTPUT_BOUND];
        match pipe.read(&mut chunk).await {
            Ok(length @ 1..) => self.keep(&chunk[..length]),
            Ok(0) | Err(_) => self.pipe = None,
        }
    }

    /// Takes what is there already, without waiting for those who left the group and still hold the pipe.
    fn take_rest(&mut self) {
        let mut chunk = [0; OUTPUT_BOUND];
        while self.start.len() < OUTPUT_BOUND {
            match self.pipe.as_ref().map(|pipe| pipe.try_read(&mut chunk)) {
                Some(Ok(length @ 1..)) => self.keep(&chunk[..length]),
                _ => return,
            }
        }
    }

    fn keep(&mut self, chunk: &[u8]) {
        let room = OUTPUT_BOUND - self.start.len();
        self.start.extend(&chunk[..chunk.len().min(room)]);
    }

    /// The first line that says something.
    fn first_line(&self) -> String {
        let text = String::from_utf8_lossy(&self.start);
        shortened(
            text.lines()
                .map(str::trim)
                .find(|line| !line.is_empty())
                .unwrap_or(""),
        )
    }
}

/// How a process has ended.
fn end(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal().map(Signal::try_from)) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(Ok(signal))) => format!("killed by {signal}"),
        (None, _) => status.to_string(),
    }
}
