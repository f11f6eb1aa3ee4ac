//! `cargo xtask test`: all the checks and tests, each on every kernel and object that it is meant for.

use std::{
    env,
    path::Path,
    process::{Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::{
    build::{self, STATIC_TARGET},
    kernel::Kernel,
    process, setup, tidy,
    toolchain::Toolchain,
    vm,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Run only the tests whose name contains this
    filter: Option<String>,
    /// Run only one kind of test, without the checks
    #[arg(long)]
    only: Option<Kind>,
    /// The kernel release of the virtual machine [default: 6.1 and 6.12]
    #[arg(long)]
    kernel: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Unit and property tests
    Unit,
    /// The eBPF object under BPF_PROG_TEST_RUN, as each toolchain builds it
    Packet,
    /// Real clients and servers in network namespaces of this machine
    Netns,
    /// The packet and namespace tests again, on other kernels
    Vm,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let xtask = env::current_exe().context("the path of this program is not known")?;
    let wanted = |kind| arguments.only.is_none_or(|only| only == kind);
    setup::run(setup::Scope::Test)?;
    if wanted(Kind::Unit) || wanted(Kind::Packet) || wanted(Kind::Netns) {
        process::require_root("testing with the kernel")?;
    }
    let mut report = Report {
        filter: arguments.filter.clone(),
        suites: Vec::new(),
        remarks: Vec::new(),
    };

    if arguments.only.is_none() && arguments.filter.is_none() {
        checks(&mut report)?;
    }
    if wanted(Kind::Unit) {
        report.run(
            "unit",
            &mut [
                build::cargo("test")?.args(["--workspace", "--lib", "--bins"]),
                build::cargo("test")?.args(["--workspace", "--doc"]),
            ],
        );
    }
    if wanted(Kind::Unit) || wanted(Kind::Packet) || wanted(Kind::Netns) {
        on_this_kernel(&mut report, wanted)?;
    }
    if wanted(Kind::Packet) {
        with_other_toolchain(&mut report)?;
    }
    if wanted(Kind::Packet) || wanted(Kind::Vm) {
        match build::build_static(&[vm::INIT]) {
            Ok(()) => optimized(
                &mut report,
                arguments,
                &xtask,
                wanted(Kind::Packet),
                wanted(Kind::Vm),
            )?,
            Err(error) => report.failed("static build", &error),
        }
    }
    Ok(report.finish())
}

fn checks(report: &mut Report) -> Result<()> {
    report.check(
        "cargo fmt --check",
        Command::new("cargo").args(["fmt", "--all", "--check"]),
    );
    report.check(
        "cargo clippy",
        build::cargo("clippy")?.args(["--workspace", "--all-targets", "--", "-D", "warnings"]),
    );
    let started = Instant::now();
    match tidy::run() {
        Ok(()) => report.passed("cargo xtask tidy", started.elapsed()),
        Err(error) => report.failed("cargo xtask tidy", &error),
    }
    Ok(())
}

/// The debug build, whose object logs every packet.
fn on_this_kernel(report: &mut Report, wanted: impl Fn(Kind) -> bool) -> Result<()> {
    let xlb = match build::build_debug() {
        Ok(xlb) => xlb,
        Err(error) => {
            report.failed("debug build", &error);
            return Ok(());
        }
    };
    if wanted(Kind::Unit) {
        let mut command = build::cargo("test")?;
        report.run(
            "integration",
            &mut [with_root(&mut command, &xlb).args(INTEGRATION)],
        );
    }
    if wanted(Kind::Packet) {
        let mut command = build::cargo("test")?;
        report.run(
            "packet, debug object",
            &mut [with_root(&mut command, &xlb).args(PACKET)],
        );
    }
    if wanted(Kind::Netns) {
        let mut command = build::cargo("test")?;
        report.run("netns", &mut [with_root(&mut command, &xlb).args(NETNS)]);
    }
    Ok(())
}

/// The debug object as the other of the two toolchains builds it.
fn with_other_toolchain(report: &mut Report) -> Result<()> {
    let other = Toolchain::chosen()?.other();
    if other.find().is_none() {
        report.remarks.push(format!(
            "the object was not built with the {} toolchain: it could not be fetched",
            other.name()
        ));
        return Ok(());
    }
    let mut command = build::cargo_with(other, "test")?;
    let command = with_root(&mut command, &process::target_dir().join("debug/xlb"));
    report.run(
        &format!("packet, object by {}", other.name()),
        &mut [command.args(PACKET)],
    );
    Ok(())
}

/// The optimized and static build, which is what users get: here, and on the kernels of the virtual machines.
fn optimized(report: &mut Report, arguments: &Arguments, xtask: &Path, packet: bool, vm: bool) -> Result<()> {
    if packet {
        let mut command = build::cargo_static("test")?;
        let xlb = build::static_binary("xlb");
        report.run(
            "packet, release object",
            &mut [with_root(&mut command, &xlb).args(PACKET)],
        );
    }
    if !vm {
        return Ok(());
    }
    let kernels = match &arguments.kernel {
        Some(kernel) => vec![kernel.as_str()],
        None => Kernel::TESTED.to_vec(),
    };
    for kernel in &kernels {
        // Fetched one after the other.
        Kernel::get(kernel)?;
    }
    let chosen: Vec<String> = report.filter.iter().cloned().collect();
    let of_kernels: Vec<String> = if arguments.only.is_some() || !chosen.is_empty() {
        chosen.clone()
    } else {
        BY_KERNEL.iter().map(|module| format!("{module}::")).collect()
    };
    // Beside one another: a machine often waits, for a probe or for an idle flow's end.
    let outcomes: Vec<Result<Vec<Outcome>>> = thread::scope(|scope| {
        let runs: Vec<_> = kernels
            .iter()
            .map(|kernel| scope.spawn(|| on_kernel(kernel, xtask, &chosen, &of_kernels)))
            .collect();
        runs.into_iter()
            .map(|run| {
                run.join()
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("a run in a virtual machine panicked")))
            })
            .collect()
    });
    for outcome in outcomes {
        outcome?.into_iter().for_each(|outcome| report.include(outcome));
    }
    Ok(())
}

fn on_kernel(kernel: &str, xtask: &Path, packet: &[String], netns: &[String]) -> Result<Vec<Outcome>> {
    let suites = [("packet", PACKET, packet), ("netns", NETNS, netns)];
    suites
        .into_iter()
        .map(|(name, selection, filters)| {
            let mut command = build::cargo_static("test")?;
            let runner = [&xtask.display().to_string(), "vm", "--kernel", kernel];
            Ok(run_suite(
                &format!("vm {kernel}, {name}"),
                &format!("{kernel} | "),
                &mut [with_runner(&mut command, &runner).args(selection)],
                filters,
            ))
        })
        .collect()
}

/// The modules of namespace tests that run on other kernels too when all is tested: those whose subject the kernel has
/// a part in. The others test the daemon, which is the same everywhere; `--only vm` runs them as well.
const BY_KERNEL: &[&str] = &[
    "attachment",
    "decap",
    "fragments",
    "local",
    "matrix",
    "next_hops",
    "probe_paths",
    "restart",
    "vip",
    "vip_echo",
    "vlan",
];
/// Tests of the library and of the binary as a whole.
const INTEGRATION: &[&str] = &[
    "--workspace",
    "--test",
    "configuration",
    "--test",
    "attach",
    "--test",
    "demo",
    "--test",
    "short_run",
];
const PACKET: &[&str] = &["--workspace", "--test", "packet"];
const NETNS: &[&str] = &["--workspace", "--test", "netns"];

/// The tests themselves run as root, also where cargo does not.
fn with_root<'a>(command: &'a mut Command, xlb: &Path) -> &'a mut Command {
    command.env("XLB_BIN", xlb);
    if process::is_root() {
        return command;
    }
    with_runner(command, &["sudo", "-n", "-E"])
}

fn with_runner<'a>(command: &'a mut Command, runner: &[&str]) -> &'a mut Command {
    // Rust's notation of strings is TOML's, for paths that any sane machine has.
    command.args(["--config", &format!("target.{STATIC_TARGET}.runner={runner:?}")])
}

struct Suite {
    name: String,
    passed: u64,
    failed: u64,
    time: Duration,
}

struct Report {
    filter: Option<String>,
    suites: Vec<Suite>,
    remarks: Vec<String>,
}

impl Report {
    fn passed(&mut self, name: &str, time: Duration) {
        self.add(name, 1, 0, time);
    }

    fn failed(&mut self, name: &str, error: &anyhow::Error) {
        eprintln!("error: {error:#}");
        self.add(name, 0, 1, Duration::ZERO);
    }

    fn add(&mut self, name: &str, passed: u64, failed: u64, time: Duration) {
        self.suites.push(Suite {
            name: name.to_owned(),
            passed,
            failed,
            time,
        });
    }

    fn check(&mut self, name: &str, command: &mut Command) {
        let started = Instant::now();
        command.current_dir(process::workspace());
        match process::run_openly(name, "", command, |_| ()) {
            Ok(status) if status.success() => self.passed(name, started.elapsed()),
            Ok(status) => self.failed(name, &anyhow::anyhow!("{name} failed ({status})")),
            Err(error) => self.failed(name, &error),
        }
    }

    fn run(&mut self, name: &str, commands: &mut [&mut Command]) {
        let filters: Vec<String> = self.filter.iter().cloned().collect();
        self.include(run_suite(name, "", commands, &filters));
    }

    fn include(&mut self, outcome: Outcome) {
        self.suites.push(outcome.suite);
        self.remarks.extend(outcome.remark);
    }

    fn finish(mut self) -> ExitCode {
        let passed: u64 = self.suites.iter().map(|suite| suite.passed).sum();
        let mut failed: u64 = self.suites.iter().map(|suite| suite.failed).sum();
        if passed + failed == 0 {
            self.remarks
                .push("no test ran, which counts as a failure".to_owned());
            failed = 1;
        }
        println!(
            "\n{:<28} {:>7} {:>7} {:>8}",
            "suite", "passed", "failed", "seconds"
        );
        for suite in &self.suites {
            println!(
                "{:<28} {:>7} {:>7} {:>8.1}",
                suite.name,
                suite.passed,
                suite.failed,
                suite.time.as_secs_f32()
            );
        }
        for remark in &self.remarks {
            println!("{remark}");
        }
        println!("{passed} passed, {failed} failed");
        if failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

struct Outcome {
    suite: Suite,
    remark: Option<String>,
}

/// Runs `cargo test` commands as one suite, and counts what ran; each line that they print begins with `mark`.
fn run_suite(name: &str, mark: &str, commands: &mut [&mut Command], filters: &[String]) -> Outcome {
    let started = Instant::now();
    let mut counts = Counts::default();
    for command in commands {
        command.args(["--no-fail-fast", "--"]);
        // The tests of namespaces share the machine's names, pins and processors.
        if name.contains("netns") || name == "integration" {
            command.arg("--test-threads=1");
        }
        command.args(filters);
        let before = counts.failed;
        match process::run_openly(name, mark, command, |line| counts.read(line)) {
            // It failed to compile, or a test ended the process: no line says so.
            Ok(status) if !status.success() && counts.failed == before => counts.failed += 1,
            Ok(_) => {}
            Err(error) => {
                eprintln!("error: {error:#}");
                counts.failed += 1;
            }
        }
    }
    let mut remark = None;
    if counts.passed + counts.failed == 0 && filters.is_empty() {
        remark = Some(format!("{name}: no test ran, which counts as a failure"));
        counts.failed += 1;
    }
    if counts.ignored > 0 {
        let ignored = counts.ignored;
        remark = Some(format!(
            "{name}: {ignored} tests were ignored, which count as failures"
        ));
        counts.failed += ignored;
    }
    Outcome {
        suite: Suite {
            name: name.to_owned(),
            passed: counts.passed,
            failed: counts.failed,
            time: started.elapsed(),
        },
        remark,
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Counts {
    /// Adds a line such as `test result: ok. 3 passed; 0 failed; 0 ignored; …`; other lines say nothing.
    fn read(&mut self, line: &str) {
        let Some((_, result)) = line.split_once("test result: ") else {
            return;
        };
        let count = |what: &str| {
            result
                .split([';', '.'])
                .filter_map(|part| part.trim().strip_suffix(what))
                .find_map(|number| number.trim().parse::<u64>().ok())
                .unwrap_or(0)
        };
        self.passed += count("passed");
        self.failed += count("failed");
        self.ignored += count("ignored");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_modules_that_run_on_other_kernels_exist() {
        for module in BY_KERNEL {
            let file = process::workspace().join(format!("tests/netns/{module}.rs"));
            assert!(file.exists(), "{} is missing", file.display());
        }
    }

    #[test]
    fn the_counts_of_several_test_binaries_are_added() {
        let mut counts = Counts::default();
        counts.read("running 3 tests\n");
        counts.read("test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n");
        counts.read("test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 7 filtered out\n");
        assert_eq!(
            counts,
            Counts {
                passed: 15,
                failed: 2,
                ignored: 1
            }
        );
    }
}
