//! The real `xlb decap`.

use std::{
    fs,
    io::Read,
    path::PathBuf,
    process::{Child, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use xlb::lab::Namespace;

use crate::{
    daemon::{Outcome, outcome},
    machine::{self, eventually},
};

/// One that runs in a namespace; killed when dropped.
#[derive(Debug)]
pub struct Decap {
    process: Child,
    folder: TempDir,
}

impl Decap {
    /// Starts it, and returns once it is ready.
    ///
    /// # Panics
    /// When it ends instead.
    pub fn start(namespace: &Namespace, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let log = fs::File::create(folder.path().join("log")).expect("making a log");
        let process = namespace
            .command(machine::xlb())
            .arg("decap")
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("starting xlb decap");
        let mut decap = Self { process, folder };
        eventually("xlb decap is ready", Duration::from_secs(20), || {
            let log = decap.log();
            if let Ok(Some(status)) = decap.process.try_wait() {
                panic!("xlb decap has ended with {status}: {log}");
            }
            log.contains("ready")
        });
        decap
    }

    /// Runs one that is to refuse, to its end.
    pub fn refused(namespace: &Namespace, arguments: &[&str]) -> Outcome {
        outcome(namespace.command(machine::xlb()).arg("decap").args(arguments))
    }

    /// Sends a signal and waits for the end.
    pub fn end(mut self, signal: Signal) -> Outcome {
        kill(Pid::from_raw(self.process.id() as i32), signal).expect("signalling xlb decap");
        let mut status = None;
        eventually("xlb decap ends", Duration::from_secs(5), || {
            status = self.process.try_wait().expect("waiting for xlb decap");
            status.is_some()
        });
        let mut stdout = String::new();
        if let Some(pipe) = &mut self.process.stdout {
            pipe.read_to_string(&mut stdout).expect("reading what it prints");
        }
        Outcome {
            code: status.and_then(|status| status.code()).unwrap_or(-1),
            stdout,
            stderr: self.log(),
        }
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Ids of the programs that it holds.
    pub fn program_ids(&self) -> Vec<u32> {
        let folder = PathBuf::from(format!("/proc/{}/fdinfo", self.process.id()));
        let texts = fs::read_dir(folder)
            .expect("a running process")
            .filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok());
        let mut ids: Vec<u32> = texts
            .filter_map(|text| {
                let line = text.lines().find_map(|line| line.strip_prefix("prog_id:"))?;
                line.trim().parse().ok()
            })
            .collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}

impl Drop for Decap {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of xlb decap\n{}", self.log());
        }
        // Both fail only when it has ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
