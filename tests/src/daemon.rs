//! The real daemon and its command line.

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use xlb::{
    datapath::Pins,
    instance::Instance,
    lab::Namespace,
    model::Health,
    observe::status::{BackendStatus, Status},
};

use crate::{
    machine::{self, eventually},
    services::Service,
};

/// An instance of xlb in a namespace. Dropping it kills its daemon and removes all that it has left.
#[derive(Debug)]
pub struct Daemon<'a> {
    namespace: &'a Namespace,
    instance: Instance,
    folder: TempDir,
    process: Option<Child>,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// -1 when a signal ended it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl<'a> Daemon<'a> {
    /// An instance of its own name, not started yet.
    pub fn new(namespace: &'a Namespace) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("test-{}-{number}", process::id());
        let folder = tempfile::tempdir().expect("a temporary folder");
        // The same in each run, so that flows are spread the same way.
        fs::write(folder.path().join("seed"), "000102030405060708090a0b0c0d0e0f").expect("writing the seed");
        Self {
            namespace,
            instance: name.parse().expect("a name of an instance"),
            folder,
            process: None,
        }
    }

    /// Writes its configuration.
    pub fn configure(&self, interfaces: &[&str], services: &[Service]) {
        self.configure_with("", interfaces, services);
    }

    /// As [`Self::configure`], with more keys at the top, or in tables before the services.
    pub fn configure_with(&self, keys: &str, interfaces: &[&str], services: &[Service]) {
        let seed = self.folder.path().join("seed");
        let services: String = services.iter().map(ToString::to_string).collect();
        let flow_table = if keys.contains("[flow-table]") {
            ""
        } else {
            "[flow-table]\nsize = 65536\n"
        };
        self.write(&format!(
            "interfaces = {interfaces:?}\n{keys}\n{flow_table}[hash]\nseed-file = \"{}\"\n{services}",
            seed.display()
        ));
    }

    /// Writes its configuration as it stands.
    pub fn write(&self, text: &str) {
        fs::write(self.config(), text).expect("writing the configuration");
    }

    pub fn config(&self) -> PathBuf {
        self.folder.path().join("xlb.toml")
    }

    /// Starts the daemon, and returns once it answers.
    ///
    /// # Panics
    /// When it ends instead.
    pub fn start(&mut self) {
        assert!(self.process.is_none(), "the daemon runs already");
        self.process = Some(self.spawn());
        eventually("the daemon is ready", Duration::from_secs(20), || {
            let ended = self.process.as_mut().map(|process| process.try_wait());
            if let Some(Ok(Some(status))) = ended {
                panic!("the daemon has ended with {status}");
            }
            self.instance.socket().exists() && self.xlb(&["status"]).code == 0
        });
    }

    /// Starts the daemon, and returns once all backends are up and their next hops known.
    pub fn start_up(&mut self) {
        self.start();
        self.wait_for("all backends are up", |status| {
            let mut backends = status.services.iter().flat_map(|service| &service.backends);
            backends.all(|backend| backend.health == Health::Up && backend.next_hop_problem.is_none())
        });
    }

    /// Starts the daemon and waits for its end: for one that is to refuse.
    pub fn run_to_end(&mut self) -> Outcome {
        let before = self.log().len();
        // Beside one that runs already.
        let first = self.process.take();
        self.process = Some(self.spawn());
        let mut status = None;
        eventually("the daemon refuses", Duration::from_secs(10), || {
            let process = self.process.as_mut().expect("it was started just now");
            status = process.try_wait().expect("waiting for the daemon");
            status.is_some()
        });
        self.process = first;
        Outcome {
            code: status.and_then(|status| status.code()).unwrap_or(-1),
            stdout: String::new(),
            stderr: self.log()[before..].to_owned(),
        }
    }

    fn spawn(&self) -> Child {
        let log = fs::File::options()
            .append(true)
            .create(true)
            .open(self.folder.path().join("log"))
            .expect("opening the daemon's log");
        self.namespace
            .command(machine::xlb())
            .args(["run", "-c"])
            .arg(self.config())
            .args(["--instance", self.instance.name()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("starting the daemon")
    }

    /// Ends the daemon with SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // Both fail only when it has ended by itself.
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Ends the daemon with SIGTERM.
    ///
    /// # Panics
    /// When it does not end, or not with success.
    pub fn terminate(&mut self) {
        self.signal(Signal::SIGTERM);
        let mut status = None;
        eventually("the daemon ends on SIGTERM", Duration::from_secs(5), || {
            let process = self.process.as_mut().expect("a running daemon");
            status = process.try_wait().expect("waiting for the daemon");
            status.is_some()
        });
        self.process = None;
        let status = status.expect("an end");
        assert!(
            status.success() && status.signal().is_none(),
            "the daemon ended with {status}"
        );
    }

    pub fn signal(&self, signal: Signal) {
        let process = self.process.as_ref().expect("a running daemon");
        kill(Pid::from_raw(process.id() as i32), signal).expect("signalling the daemon");
    }

    /// Runs a command of this instance in its namespace.
    pub fn xlb(&self, arguments: &[&str]) -> Outcome {
        let mut command = self.namespace.command(machine::xlb());
        outcome(command.args(["--instance", self.instance.name()]).args(arguments))
    }

    /// As [`Self::xlb`], for a command that is to succeed.
    ///
    /// # Panics
    /// When it does not.
    pub fn done(&self, arguments: &[&str]) -> String {
        let outcome = self.xlb(arguments);
        assert_eq!(outcome.code, 0, "xlb {}: {}", arguments.join(" "), outcome.stderr);
        outcome.stdout
    }

    /// What `xlb status -o json` says.
    pub fn status(&self) -> Status {
        let text = self.done(&["status", "-o", "json"]);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"))
    }

    /// A backend in the status.
    ///
    /// # Panics
    /// When there is none of that name.
    pub fn backend(&self, service: &str, backend: &str) -> BackendStatus {
        let services = self.status().services;
        let service = services.into_iter().find(|candidate| candidate.name == service);
        let backends = service.map(|service| service.backends).unwrap_or_default();
        let found = backends.into_iter().find(|candidate| candidate.name == backend);
        found.unwrap_or_else(|| panic!("no backend {backend} in the status"))
    }

    /// Waits until the status is as wanted.
    pub fn wait_for(&self, what: &str, holds: impl Fn(&Status) -> bool) {
        eventually(what, Duration::from_secs(15), || holds(&self.status()));
    }

    pub fn pins(&self) -> Pins {
        Pins::new(self.instance.name())
    }

    pub fn instance(&self) -> &Instance {
        &self.instance
    }

    /// A folder of this instance's own.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What its daemons have logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let configuration = fs::read_to_string(self.config()).unwrap_or_default();
            let status = self.xlb(&["status"]);
            eprintln!("--- configuration\n{configuration}");
            eprintln!("--- status\n{}{}", status.stdout, status.stderr);
            eprintln!("--- log of the daemon\n{}", self.log());
        }
        self.kill();
        if let Err(error) = self.pins().remove_all() {
            eprintln!("{error}");
        }
        if let Some(folder) = self.instance.socket().parent() {
            let _ = fs::remove_dir_all(folder);
        }
    }
}

/// Runs a command to its end.
///
/// # Panics
/// When it cannot be started.
pub fn outcome(command: &mut Command) -> Outcome {
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("running {command:?}: {error}"));
    Outcome {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
