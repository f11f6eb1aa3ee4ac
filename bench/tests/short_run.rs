//! A short measurement of the real daemon, and its end by a signal; wants root.

#![allow(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::{
    collections::BTreeSet,
    env, fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// The `xlb` under test.
fn xlb() -> PathBuf {
    env::var_os("XLB_BIN").map_or_else(
        || PathBuf::from(env!("CARGO_BIN_EXE_xlb-bench")).with_file_name("xlb"),
        PathBuf::from,
    )
}

/// Of the cost of a packet.
fn bench(rounds: u32, options: &[&str]) -> Command {
    let mut command = program(rounds, options);
    // Few: the program of debug builds logs every packet.
    command.args(["--packets", "300", "--flow-table", "4096"]);
    command
}

/// Of the daemon.
fn control(rounds: u32, options: &[&str]) -> Output {
    let mut command = program(
        rounds,
        &["--control", "--flow-table", "4096", "--idle", "1", "--json"],
    );
    command.args(options).output().unwrap()
}

fn program(rounds: u32, options: &[&str]) -> Command {
    let xlb = xlb();
    assert!(
        xlb.exists(),
        "{} is not there: build it, or set XLB_BIN",
        xlb.display()
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_xlb-bench"));
    command
        .arg("--xlb")
        .arg(xlb)
        .arg("--rounds")
        .arg(rounds.to_string())
        .args(options);
    command
}

/// Ids of the processes that a thread of this one has started.
fn children(process: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let lists = tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace()
                .map(|id| id.parse().unwrap())
                .collect::<Vec<u32>>()
        })
        .collect()
}

fn is_running(process: u32) -> bool {
    let state = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let state = state.rsplit(") ").next().and_then(|rest| rest.chars().next());
    state.is_some_and(|state| state != 'Z')
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "not within a minute: {what}"
        );
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_short_measurement_has_figures_of_each_kind_of_scenario() {
    let only = [
        "pass arp",
        "known ipip tcp4 1k",
        "known nat-reply tcp6 1k",
        "new dsr udp4",
        "flood nat tcp6 ack",
    ];
    let options: Vec<&str> = only
        .iter()
        .flat_map(|only| ["--only", only])
        .chain(["--json"])
        .collect();
    let output = bench(2, &options).output().unwrap();
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{messages}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    let names: BTreeSet<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, only.into_iter().collect());
    for row in rows {
        let name = row["name"].as_str().unwrap();
        let reason = match name {
            "pass arp" => "not-ip",
            "known nat-reply tcp6 1k" => "returned",
            // More of them than there is room for.
            "flood nat tcp6 ack" => "forwarded or flow-table-full",
            _ => "forwarded",
        };
        assert_eq!(row["reason"], reason, "{row}");
        for figure in ["xlb_ns", "floor_ns", "harness_ns"] {
            assert!(row[figure]["median"].is_f64(), "{row}");
        }
        // What sends a packet on does more than the harness alone, on any machine.
        if row["reason"] != "not-ip" {
            assert!(row["xlb_ns"]["max"].as_f64().unwrap() > 0.0, "{row}");
        }
    }
    assert_eq!(report["rounds"], 2);
}

#[test]
fn a_short_measurement_of_the_daemon_has_a_value_for_each_figure() {
    let output = control(2, &["--services", "3", "--backends", "4"]);
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{messages}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let figures = report["figures"].as_array().unwrap();
    assert_eq!(figures.len(), 12);
    for figure in figures {
        assert!(figure["problem"].is_null(), "{figure}");
        // A small configuration may leave the daemon idle altogether.
        let least = if figure["unit"] == "%" { -1.0 } else { 0.0 };
        assert!(figure["value"]["min"].as_f64().unwrap() > least, "{figure}");
    }
    let targets = figures.iter().filter(|figure| figure["target"].is_f64());
    assert_eq!(targets.count(), 6);
    assert_eq!(report["services"], 3);
}

#[test]
fn a_short_measurement_end_to_end_has_figures_of_every_candidate() {
    has_figures_of_every_candidate(&["--end-to-end", "--requests", "200", "--json"]);
}

#[test]
fn candidates_are_measured_alike_where_interfaces_copy_what_they_receive() {
    has_figures_of_every_candidate(&["--end-to-end", "--requests", "200", "--json", "--cards"]);
}

fn has_figures_of_every_candidate(options: &[&str]) {
    let output = program(2, options).output().unwrap();
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{messages}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    let names: BTreeSet<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    for name in [
        "routing",
        "xlb nat",
        "xlb dsr",
        "nftables dnat",
        "haproxy tcp",
        "nginx stream",
    ] {
        assert!(names.contains(name), "{name} is missing: {messages}");
    }
    for row in rows {
        for kind in ["connections", "requests"] {
            assert!(row[kind]["per_second"]["min"].as_f64().unwrap() > 0.0, "{row}");
            assert!(row[kind]["cpu_us"]["min"].as_f64().unwrap() > 0.0, "{row}");
        }
    }
    assert_eq!(
        (report["rounds"].as_u64(), report["requests"].as_u64()),
        (Some(2), Some(200))
    );
}

#[test]
fn a_configuration_that_the_daemon_refuses_is_a_figure_that_is_missing() {
    let services = (lb_common::abi::MAX_SERVICES + 1).to_string();
    let output = control(1, &["--services", &services, "--backends", "2"]);
    assert!(output.status.success(), "{output:?}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let figures = report["figures"].as_array().unwrap();
    let missing = figures.iter().filter(|figure| {
        let problem = figure["problem"].as_str().unwrap_or_default();
        figure["value"].is_null() && problem.contains("services")
    });
    assert_eq!(missing.count(), 4);
}

#[test]
fn a_measurement_that_is_interrupted_leaves_nothing() {
    let pins = || {
        fs::read_dir("/sys/fs/bpf/xlb").map_or(0, |pins| {
            pins.flatten().filter(|pin| pin.file_name() == "bench").count()
        })
    };
    let before = pins();
    let mut process = bench(1_000_000, &[]).stderr(Stdio::piped()).spawn().unwrap();
    let is_started = || {
        children(process.id()).iter().any(|child| {
            let command = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
            command.split(|byte| *byte == 0).any(|word| word == b"run")
        })
    };
    eventually("the daemon is started", is_started);
    let daemons = children(process.id());
    kill(Pid::from_raw(process.id() as i32), Signal::SIGINT).unwrap();
    process.wait().unwrap();
    eventually("the daemon has ended", || {
        !daemons.iter().any(|daemon| is_running(*daemon))
    });
    assert_eq!(pins(), before);
}

#[test]
fn what_is_asked_for_wrongly_is_said() {
    let first_line = |options: &[&str]| {
        let mut process = bench(2, options).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stderr.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert!(!process.wait().unwrap().success(), "{options:?}");
        line
    };
    let line = first_line(&["--only", "know nat"]);
    assert!(line.contains("no scenario has the words"), "{line}");
    let line = first_line(&["--only", "pass arp", "--cpu", "4000"]);
    assert!(line.contains("pass arp") && line.contains("4000"), "{line}");
}
