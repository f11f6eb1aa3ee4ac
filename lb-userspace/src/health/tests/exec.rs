use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tempfile::TempDir;
use tokio::sync::mpsc;

use super::{GENEROUS, SHORT, check, failure, target, try_probe, wait_until};
use crate::{
    config::{Command, Probe},
    health::{Driver, ProbeError, Turn, probe},
    model::Health,
};

fn address() -> SocketAddr {
    ([192, 0, 2, 11], 8080).into()
}

fn exec(program: &str, arguments: &[&str]) -> Probe {
    Probe::Exec {
        port: None,
        command: Command {
            program: PathBuf::from(program),
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
        },
    }
}

fn shell(script: &str) -> Probe {
    exec("/bin/sh", &["-c", script])
}

async fn succeeds(what: Probe) {
    try_probe(address(), what, GENEROUS).await.unwrap();
}

async fn fails(what: Probe) -> String {
    failure(address(), what, GENEROUS).await
}

/// A folder for what scripts write, as a path to paste into them.
fn folder() -> (TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display().to_string();
    (folder, path)
}

/// The ids of processes that scripts have written there, one in each file; waits until they are `count`.
async fn pids(folder: &Path, count: usize) -> Vec<u32> {
    let read = || -> Vec<u32> {
        let files = fs::read_dir(folder).unwrap();
        let texts = files.map(|file| fs::read_to_string(file.unwrap().path()).unwrap());
        texts.filter_map(|text| text.trim().parse().ok()).collect()
    };
    wait_until(|| read().len() == count).await;
    read()
}

/// Whether there is a process, dead ones that nobody has waited for included.
fn exists(pid: &u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[tokio::test]
async fn exit_code_zero_is_success_and_others_are_named() {
    succeeds(exec("/bin/true", &[])).await;
    assert_eq!(
        fails(exec("/bin/false", &[])).await,
        "run /bin/false: exit code 1"
    );
    assert_eq!(fails(shell("exit 42")).await, "run /bin/sh: exit code 42");
    assert_eq!(
        fails(shell("kill -SEGV $$")).await,
        "run /bin/sh: killed by SIGSEGV"
    );
}

#[tokio::test]
async fn arguments_arrive_as_they_are_written() {
    let script = r#"test "$#" = 3 && test "$1" = 'a  b' && test "$2" = '' && test "$3" = '$HOME;*'"#;
    succeeds(exec("/bin/sh", &["-c", script, "sh", "a  b", "", "$HOME;*"])).await;
}

#[tokio::test]
async fn the_environment_is_what_is_promised_and_no_more() {
    let (_folder, path) = folder();
    let script = format!(r"tr '\0' '\n' < /proc/$$/environ > {path}/environ; pwd > {path}/pwd");
    succeeds(shell(&script)).await;
    let environment = fs::read_to_string(format!("{path}/environ")).unwrap();
    let mut lines: Vec<_> = environment.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [
            "XLB_ADDRESS=192.0.2.11",
            "XLB_BACKEND=a",
            "XLB_PORT=8080",
            "XLB_SERVICE=web"
        ]
    );
    assert_eq!(fs::read_to_string(format!("{path}/pwd")).unwrap(), "/\n");
    // IPv6 without brackets, as most programs take it.
    let address = "[2001:db8::1]:443".parse().unwrap();
    let script = "test \"$XLB_ADDRESS\" = 2001:db8::1 && test \"$XLB_PORT\" = 443";
    try_probe(address, shell(script), GENEROUS).await.unwrap();
}

#[tokio::test]
async fn there_is_nothing_to_read_from_stdin() {
    succeeds(shell("test -z \"$(cat)\"")).await;
}

#[tokio::test]
async fn the_first_line_of_the_output_is_told() {
    let cases = [
        ("echo disk full; echo more; exit 1", "exit code 1: disk full"),
        ("echo disk full >&2; exit 1", "exit code 1: disk full"),
        ("echo first >&2; echo second; exit 3", "exit code 3: first"),
        ("printf '\\n  \\n no newline'; exit 1", "exit code 1: no newline"),
        // What a terminal would obey, and what is no text.
        ("printf '\\033[2Jx\\001\\n'; exit 1", "exit code 1: ?[2Jx?"),
        ("printf '\\377\\n'; exit 1", "exit code 1: \u{fffd}"),
    ];
    for (script, expected) in cases {
        assert_eq!(fails(shell(script)).await, format!("run /bin/sh: {expected}"));
    }
    let long = fails(shell("head -c 9999 /dev/zero | tr '\\0' x; exit 1")).await;
    let expected = format!("run /bin/sh: exit code 1: {}…", "x".repeat(200));
    assert_eq!(long, expected);
    // Of a success nothing is told.
    succeeds(shell("echo all is well")).await;
}

#[tokio::test]
async fn output_without_end_does_not_block_the_program() {
    succeeds(shell("head -c 5000000 /dev/zero")).await;
}

#[tokio::test]
async fn a_program_that_hangs_is_killed_with_all_that_it_has_started() {
    let (folder, path) = folder();
    let script = format!(
        "echo waiting for the database; sh -c 'echo $$ > {path}/child; exec sleep 1000' & echo $$ > {path}/parent; wait"
    );
    let words = tokio::spawn(async move { failure(address(), shell(&script), Duration::from_secs(1)).await });
    let pids = pids(folder.path(), 2).await;
    assert_eq!(
        words.await.unwrap(),
        "run /bin/sh: timed out after 1s: waiting for the database"
    );
    // Waited for, too: a zombie would still be there.
    wait_until(|| !pids.iter().any(exists)).await;
}

#[tokio::test]
async fn what_a_successful_program_leaves_running_is_killed() {
    let (folder, path) = folder();
    succeeds(shell(&format!("sleep 1000 & echo $! > {path}/child"))).await;
    let pids = pids(folder.path(), 1).await;
    wait_until(|| !pids.iter().any(exists)).await;
}

#[tokio::test]
async fn a_process_that_has_left_the_group_does_not_delay_the_result() {
    let (folder, path) = folder();
    let script = format!(
        "setsid sh -c 'echo $$ > {path}/child; exec sleep 1000' & while ! test -s {path}/child; do :; done"
    );
    succeeds(shell(&script)).await;
    let pids = pids(folder.path(), 1).await;
    assert!(exists(&pids[0]));
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pids[0] as i32),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
}

#[tokio::test]
async fn a_program_that_cannot_be_started_is_this_hosts_fault() {
    let (_folder, path) = folder();
    let script = format!("{path}/script");
    fs::write(&script, "#!/nonexistent/interpreter\n").unwrap();
    for (program, reason) in [
        ("/nonexistent/check", "no such file or directory"),
        (script.as_str(), "permission denied"),
        ("/etc", "permission denied"),
    ] {
        let error = try_probe(address(), exec(program, &[]), GENEROUS)
            .await
            .unwrap_err();
        assert!(matches!(error, ProbeError::Start { .. }), "{error:?}");
        assert_eq!(error.to_string(), format!("start {program}: {reason}"));
    }
}

#[tokio::test]
async fn a_probe_that_is_given_up_kills_its_process() {
    let (folder, path) = folder();
    let (sender, _receiver) = mpsc::channel(16);
    let driver = Driver::new(sender);
    let script = format!("echo $$ > {path}/$$; exec sleep 1000");
    driver.set_targets(vec![target(address(), shell(&script), GENEROUS)]);
    let pids = pids(folder.path(), 1).await;
    assert!(exists(&pids[0]));
    driver.set_targets(Vec::new());
    wait_until(|| !exists(&pids[0])).await;
}

#[tokio::test]
async fn a_dropped_driver_leaves_no_process() {
    let (folder, path) = folder();
    let (sender, _receiver) = mpsc::channel(16);
    let driver = Driver::new(sender);
    let script = format!("echo $$ > {path}/$$; exec sleep 1000");
    let targets = (0..20).map(|number| {
        let mut target = target(address(), shell(&script), GENEROUS);
        target.backend = number.to_string();
        target
    });
    driver.set_targets(targets.collect());
    let pids = pids(folder.path(), 20).await;
    drop(driver);
    wait_until(|| !pids.iter().any(exists)).await;
}

#[test]
fn a_runtime_that_ends_leaves_no_process() {
    let (folder, path) = folder();
    let script = format!("sleep 1000 & echo $! > {path}/child; echo $$ > {path}/parent; wait");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let pids = runtime.block_on(async {
        tokio::spawn(async move { try_probe(address(), shell(&script), GENEROUS).await });
        pids(folder.path(), 2).await
    });
    drop(runtime);
    // Nobody waits for them any more, but they are dead.
    let is_running = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.contains("State:") && !status.contains("State:\tZ")
    };
    let started = std::time::Instant::now();
    while pids.iter().any(is_running) {
        assert!(started.elapsed() < GENEROUS);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[tokio::test]
async fn a_run_waits_for_the_one_before_it_and_no_longer_than_the_timeout() {
    let turn = Turn::default();
    let before = Arc::clone(&turn).lock_owned().await;
    let hindered = probe(&target(address(), shell("exit 0"), SHORT), &turn).await;
    assert_eq!(
        hindered.unwrap_err().to_string(),
        "run /bin/sh: the run before it has not ended although it was killed"
    );
    let next = target(address(), shell("exit 0"), GENEROUS);
    let next = tokio::spawn(async move { probe(&next, &turn).await });
    tokio::task::yield_now().await;
    drop(before);
    next.await.unwrap().unwrap();
}

/// Each run looks whether one before it is still there.
#[tokio::test]
async fn at_most_one_program_runs_for_a_backend_however_often_the_check_changes() {
    let (_folder, path) = folder();
    let (sender, _receiver) = mpsc::channel(16);
    let driver = Driver::new(sender);
    fs::create_dir(format!("{path}/runs")).unwrap();
    let script = format!(
        "for run in {path}/runs/*; do test -e /proc/${{run##*/}} && touch {path}/overlap; done; touch {path}/runs/$$; exec sleep 1000"
    );
    let runs = || fs::read_dir(format!("{path}/runs")).unwrap().count();
    for round in 1..=20 {
        let mut target = target(address(), shell(&script), GENEROUS);
        target.check = check(target.check.probe, GENEROUS, GENEROUS, round, 1);
        driver.set_targets(vec![target]);
        wait_until(|| runs() as u32 == round).await;
    }
    assert!(!Path::new(&format!("{path}/overlap")).exists());
}

#[tokio::test]
async fn a_program_that_cannot_be_started_leaves_health_as_it_is() {
    let (sender, mut receiver) = mpsc::channel(16);
    let driver = Driver::new(sender);
    let mut target = target(
        address(),
        exec("/nonexistent/check", &[]),
        Duration::from_millis(20),
    );
    target.initial = Health::Up;
    driver.set_targets(vec![target]);
    let report = || driver.report().into_values().next().unwrap();
    wait_until(|| report().last_probe.is_some()).await;
    assert_eq!(
        (
            report().health,
            report().last_result.as_str(),
            report().consecutive
        ),
        (
            Health::Up,
            "start /nonexistent/check: no such file or directory",
            0
        )
    );
    assert!(receiver.try_recv().is_err());
}
