//! A daemon under test: its files, its process and what it says.

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use xlb::{datapath::Pins, lab::Namespace, observe::status::Status};

use crate::isolation;

const INSTANCE: &str = "bench";
/// The seed of the hash, the same in each run, so that flows are spread the same way.
const SEED: &str = "000102030405060708090a0b0c0d0e0f";
/// What the daemon logs when it has started.
const READY: &str = " ready";
/// How often its log is looked at.
const LOOK: Duration = Duration::from_millis(1);

/// The instance of xlb that is measured. Its daemon goes with the process that started it, its files and pins with the
/// file systems of [`isolation`].
#[derive(Debug)]
pub struct Daemon {
    xlb: PathBuf,
    folder: PathBuf,
    process: Option<Child>,
}

impl Daemon {
    /// Makes its folder; nothing runs yet.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn new(xlb: &Path) -> Result<Self> {
        let folder = isolation::folder("daemon")?;
        fs::write(folder.join("seed"), SEED)?;
        Ok(Self {
            xlb: xlb.to_owned(),
            folder,
            process: None,
        })
    }

    /// Path of the file with the seed, for the configuration.
    pub fn seed_file(&self) -> String {
        self.folder.join("seed").display().to_string()
    }

    /// What it reads when it starts or reloads.
    pub fn configure(&self, text: &str) -> Result<()> {
        fs::write(self.configuration(), text).context("the configuration was not written")
    }

    /// Starts it; gives the time right before. Nothing is awaited.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start(&mut self, namespace: &Namespace) -> Result<Instant> {
        let log = fs::File::create(self.log_file())?;
        let config = self.configuration().display().to_string();
        let mut command = self.command(namespace, &["run", "-c", &config]);
        command.stderr(log);
        let before = Instant::now();
        let process = command
            .spawn()
            .with_context(|| format!("{} did not start", self.xlb.display()))?;
        self.process = Some(process);
        Ok(before)
    }

    /// Waits until it says in its log that it is ready; gives the time.
    ///
    /// # Errors
    /// It ends, or takes longer than `patience`; what it logged is in the message.
    pub fn await_ready(&mut self, patience: Duration) -> Result<Instant> {
        let start = Instant::now();
        loop {
            if self.log().lines().any(|line| line.contains(READY)) {
                return Ok(Instant::now());
            }
            self.check_running()?;
            ensure!(
                start.elapsed() < patience,
                "the daemon is not ready after {patience:?}:\n{}",
                self.log()
            );
            thread::sleep(LOOK);
        }
    }

    /// # Errors
    /// It has ended; what it logged is in the message.
    pub fn check_running(&mut self) -> Result<()> {
        let ended = self.process.as_mut().map_or(Ok(None), Child::try_wait)?;
        match ended {
            None => Ok(()),
            Some(_) => bail!("the daemon has ended:\n{}", self.log()),
        }
    }

    pub fn is_started(&self) -> bool {
        self.process.is_some()
    }

    /// Id of its process; `None` where it was not started.
    pub fn id(&self) -> Option<u32> {
        self.process.as_ref().map(Child::id)
    }

    /// Has it stop as an administrator would, and waits for its end.
    ///
    /// # Errors
    /// It ends in another way.
    pub fn terminate(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else {
            return Ok(());
        };
        kill(Pid::from_raw(process.id() as i32), Signal::SIGTERM)?;
        let status = process.wait()?;
        ensure!(
            status.success(),
            "the daemon ended with code {:?}, signal {:?}:\n{}",
            status.code(),
            status.signal(),
            self.log()
        );
        Ok(())
    }

    /// Ends it at once.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // Both fail only when it has ended by itself.
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Removes what it has left in the kernel.
    ///
    /// # Errors
    /// What `xlb detach` says.
    pub fn detach(&self, namespace: &Namespace) -> Result<()> {
        self.ask(namespace, &["detach"]).map(drop)
    }

    /// # Errors
    /// The daemon does not answer.
    pub fn status(&self, namespace: &Namespace) -> Result<Status> {
        let output = self.ask(namespace, &["status", "-o", "json"])?;
        serde_json::from_slice(&output).context("xlb status was not understood")
    }

    /// What a command of `xlb` prints.
    ///
    /// # Errors
    /// What it says when it fails.
    pub fn ask(&self, namespace: &Namespace, arguments: &[&str]) -> Result<Vec<u8>> {
        let name = || format!("xlb {}", arguments.join(" "));
        let output = self
            .command(namespace, arguments)
            .stdout(Stdio::piped())
            .output()
            .with_context(|| format!("{} did not start", name()))?;
        ensure!(
            output.status.success(),
            "{}: {}",
            name(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(output.stdout)
    }

    /// What it has logged since it was started.
    pub fn log(&self) -> String {
        let log = fs::read(self.log_file()).unwrap_or_default();
        String::from_utf8_lossy(&log).trim().to_owned()
    }

    /// Paths of what it has pinned.
    pub fn pins() -> Pins {
        Pins::new(INSTANCE)
    }

    fn command(&self, namespace: &Namespace, arguments: &[&str]) -> Command {
        let mut command = namespace.command(&self.xlb);
        command
            .args(arguments)
            .args(["--instance", INSTANCE])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }

    fn configuration(&self) -> PathBuf {
        self.folder.join("xlb.toml")
    }

    fn log_file(&self) -> PathBuf {
        self.folder.join("log")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}
