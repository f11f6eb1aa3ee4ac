//! `xlb demo`, run as a user runs it; needs root.

#![expect(clippy::unwrap_used, reason = "what the tests share may panic as they may")]

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

fn demo(arguments: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_xlb"))
        .arg("demo")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for its end, and proves that nothing is left.
fn finish(child: Child) -> Output {
    let id = child.id();
    let output = child.wait_with_output().unwrap();
    assert_nothing_is_left(id);
    output
}

fn assert_nothing_is_left(id: u32) {
    for path in traces(id) {
        assert!(!path.exists(), "{} is left", path.display());
    }
    assert_eq!(children(id), BTreeSet::new());
}

/// Pins, and the folder of socket and configuration.
fn traces(id: u32) -> [PathBuf; 2] {
    [
        format!("/sys/fs/bpf/xlb/demo-{id}").into(),
        format!("/run/xlb/demo-{id}").into(),
    ]
}

/// Processes that the demo has started: they are in its process's care, or name its instance or its addresses.
fn children(id: u32) -> BTreeSet<u32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    numbers
        .filter(|process| {
            let read = |file: &str| fs::read_to_string(format!("/proc/{process}/{file}")).unwrap_or_default();
            let is_child = read("status").lines().any(|line| line == format!("PPid:\t{id}"));
            is_child
                || read("cmdline")
                    .split('\0')
                    .any(|word| word == format!("demo-{id}"))
        })
        .collect()
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}, not within a minute");
        thread::sleep(Duration::from_millis(20));
    }
}

/// The demo's process with these arguments among its own.
fn child_with(id: u32, arguments: &[&str]) -> Pid {
    let runs = |process: &u32| {
        let command = fs::read_to_string(format!("/proc/{process}/cmdline")).unwrap_or_default();
        let words: Vec<&str> = command.split('\0').collect();
        words.windows(arguments.len()).any(|window| window == arguments)
    };
    Pid::from_raw(children(id).into_iter().find(runs).unwrap() as i32)
}

/// Reads the output up to a line that holds this; gives the reader for the rest.
fn read_until(child: &mut Child, word: &str) -> BufReader<std::process::ChildStdout> {
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    line_with(&mut reader, word);
    reader
}

/// Reads up to a line that holds this.
fn line_with(reader: &mut impl BufRead, word: &str) -> String {
    let mut line = String::new();
    while !line.contains(word) {
        line.clear();
        let length = reader.read_line(&mut line).unwrap();
        assert!(length > 0, "the demo has ended before {word:?}");
    }
    line
}

#[test]
fn the_demo_ends_well_and_says_so_in_json() {
    let output = finish(demo(&["--seconds", "8", "-o", "json"]));
    let text = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}{errors}");
    assert_eq!(errors, "");

    let summary: Value = serde_json::from_str(&text).unwrap();
    let number = |key: &str| summary[key].as_u64().unwrap_or_else(|| panic!("{key} in {text}"));
    assert_eq!(summary["ok"], true);
    assert_eq!(number("failed"), 0);
    assert!(number("connections") > 100, "{text}");
    assert_eq!(number("connections"), number("succeeded") + number("excused"));
    assert_eq!(summary["download"]["complete"], true);
    assert_eq!(summary["download"]["bytes"], summary["download"]["expected"]);
    assert!(summary["detection_seconds"].as_f64() <= summary["bound_seconds"].as_f64());
    assert!(summary["return_seconds"].as_f64().is_some(), "{text}");

    let killed = summary["killed_backend"].as_str().unwrap();
    assert_ne!(summary["download"]["backend"], killed);
    let phases = summary["phases"].as_array().unwrap();
    let names: Vec<&str> = phases.iter().filter_map(|phase| phase["name"].as_str()).collect();
    assert_eq!(names, ["steady", "failing", "without", "returning", "again"]);
    for phase in phases {
        let backends = phase["backends"].as_object().unwrap();
        assert_eq!(backends.len(), 3);
        if ["steady", "again"].contains(&phase["name"].as_str().unwrap()) {
            assert!(backends.values().all(|count| count.as_u64() > Some(0)), "{phase}");
        }
        if phase["name"] == "without" {
            assert_eq!(backends[killed], 0, "{phase}");
        }
    }

    // Every kept connection is accounted for, and those of the dead backend went to others.
    let kept = &summary["kept_connections"];
    assert_eq!(kept["cut_otherwise"], 0);
    assert_eq!(summary["moved_flows"], kept["cut_with_backend"]);
    for reason in ["forwarded", "returned"] {
        assert!(summary["packets"][reason].as_u64() > Some(0), "{text}");
    }
}

#[test]
fn a_demo_without_a_terminal_prints_lines_and_a_summary() {
    let output = finish(demo(&["--seconds", "6", "--backends", "2"]));
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(!text.contains('\x1b'), "{text}");
    for part in [
        "killed the process of ",
        " is down: ",
        " is up: ",
        "new connections/s",
        "PHASE",
        "ok: no connection failed that should not have\n",
    ] {
        assert!(text.contains(part), "{part:?} is missing in:\n{text}");
    }
}

#[test]
fn an_interrupted_demo_leaves_nothing() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut child = demo(&["--seconds", "60"]);
        let mut rest = read_until(&mut child, "new connections/s");
        // The daemon and three backends run, so there is something to remove.
        assert_eq!(children(child.id()).len(), 4);
        assert!(traces(child.id()).iter().all(|path| path.exists()));

        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        rest.read_to_string(&mut String::new()).unwrap();
        let output = finish(child);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{errors}");
        assert_eq!(
            errors,
            format!(
                "xlb: the demo was ended by {}; nothing is left of it\n",
                signal.as_str()
            )
        );
    }
}

#[test]
fn a_killed_demo_takes_its_processes_along_and_the_next_removes_the_rest() {
    let mut child = demo(&["--seconds", "60"]);
    let id = child.id();
    let _rest = read_until(&mut child, "new connections/s");
    let started = children(id);
    assert_eq!(started.len(), 4);
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(Signal::SIGKILL as i32));
    eventually("its processes have ended", || {
        started.iter().all(|process| {
            !children(id).contains(process) && !PathBuf::from(format!("/proc/{process}")).exists()
        })
    });

    let mut next = demo(&["--seconds", "60"]);
    let mut rest = read_until(&mut next, "every backend is up");
    assert_nothing_is_left(id);
    kill(Pid::from_raw(next.id() as i32), Signal::SIGTERM).unwrap();
    rest.read_to_string(&mut String::new()).unwrap();
    finish(next);
}

#[test]
fn a_daemon_that_dies_ends_the_demo_with_what_it_said() {
    let mut child = demo(&["--seconds", "60"]);
    let mut rest = read_until(&mut child, "new connections/s");
    kill(child_with(child.id(), &["run", "-c"]), Signal::SIGKILL).unwrap();
    rest.read_to_string(&mut String::new()).unwrap();
    let output = finish(child);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(
        errors.starts_with("xlb: the daemon has ended with signal: 9"),
        "{errors}"
    );
}

#[test]
fn connections_that_should_not_have_failed_make_the_demo_fail() {
    let mut child = demo(&["--seconds", "6"]);
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    let begun = line_with(&mut reader, "has begun, through ");
    line_with(&mut reader, "new connections/s");
    // A backend that the demo does not kill falls silent: its connections time out, and the download with them.
    let name = begun.trim_end().rsplit(' ').next().unwrap();
    kill(child_with(child.id(), &["--name", name]), Signal::SIGSTOP).unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(finish(child).status.code(), Some(1), "{text}");
    for problem in [
        "connections failed that should not have",
        &format!("the download through {name} is not whole"),
        &format!("{name} got no new connection in the phase \"again\""),
    ] {
        let named = text
            .lines()
            .any(|line| line.starts_with("not ok: ") && line.contains(problem));
        assert!(named, "{problem:?} is missing in:\n{text}");
    }
    assert!(!text.contains("\nok: "), "{text}");
}

#[test]
fn a_demo_without_bpffs_brings_its_own() {
    // In a mount namespace where bpffs is hidden, as on a machine that has not mounted it.
    let hide = || {
        let nothing: Option<&str> = None;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(
            nothing,
            "/",
            nothing,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            nothing,
        )?;
        Ok(mount(
            Some("none"),
            "/sys/fs/bpf",
            Some("tmpfs"),
            MsFlags::empty(),
            nothing,
        )?)
    };
    let mut command = Command::new(env!("CARGO_BIN_EXE_xlb"));
    command.args(["demo", "--seconds", "6", "-o", "json"]);
    // SAFETY: between fork and exec the closure makes system calls alone; its short paths are put on the stack.
    unsafe { command.pre_exec(hide) };
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{text}{errors}");
}

#[test]
fn a_user_without_rights_is_told_in_one_sentence() {
    // Copied, because a user need not be able to read the folder of the build.
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("xlb");
    fs::copy(env!("CARGO_BIN_EXE_xlb"), &program).unwrap();
    fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let output = Command::new(&program)
        .arg("demo")
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(77));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "xlb: building network namespaces needs root: run it with `sudo`\n"
    );
}
