//! `cargo xtask bench`: what xlb costs, beside what it has to cost. The method is in `docs/bench.md`.
//!
//! What is measured has a folder: `per_packet`, the program under `BPF_PROG_TEST_RUN`; `control`, the daemon;
//! `end_to_end`, connections and requests of real clients and servers. The others are what any measurement needs: a
//! balancer to measure, a processor to itself, statistics and a report.

mod balancer;
mod control;
mod end_to_end;
mod isolation;
mod per_packet;
mod processor;
mod report;
mod statistics;

use std::{fs, io::Write, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Serialize;

use crate::per_packet::scenario::Scenario;

/// What xlb costs for each packet, beside what a balancer costs at least; or each connection, or what its daemon takes.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench")]
struct Arguments {
    /// Measures the daemon instead: start, a large configuration, a backend that fails, memory; each beside its target
    #[arg(long, conflicts_with_all = PER_PACKET)]
    control: bool,
    /// Services of the large configuration of --control
    #[arg(long, value_name = "N", default_value_t = 1000, requires = "control", value_parser = clap::value_parser!(u32).range(1..=50_000))]
    services: u32,
    /// Backends of each of these services
    #[arg(long, value_name = "N", default_value_t = 100, requires = "control", value_parser = clap::value_parser!(u32).range(2..=1000))]
    backends: u32,
    /// Seconds for which the daemon is watched while nothing happens; it compares all maps every 30 seconds
    #[arg(long, value_name = "N", default_value_t = 60, requires = "control", value_parser = clap::value_parser!(u32).range(1..))]
    idle: u32,
    /// Measures connections and requests through xlb, plain routing, nftables, HAProxy and nginx instead; with --vm in a
    /// virtual machine, and through IPVS, too
    #[arg(long, conflicts_with_all = PER_PACKET, conflicts_with_all = ["control", "flow_table"])]
    end_to_end: bool,
    /// Requests of each kind, in each round of --end-to-end and through each of them
    #[arg(long, value_name = "N", default_value_t = 20_000, requires = "end_to_end", value_parser = clap::value_parser!(u32).range(2..=50_000))]
    requests: u32,
    /// Has every interface copy what it receives, as a network card does, and not xlb's alone
    #[arg(long, requires = "end_to_end")]
    cards: bool,
    /// Only scenarios whose name has each of these words, such as "known nat 64k"; may be given again for more
    #[arg(long, value_name = "WORDS")]
    only: Vec<String>,
    /// Prints the names of the scenarios, and measures none
    #[arg(long)]
    list: bool,
    /// How often each is measured; the median counts [default: 11 for each packet, 5 otherwise]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Packets of each round; of new flows at most 100000 and what the flow table has room for, of floods a quarter
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(100..=100_000_000))]
    packets: u32,
    /// Flows that the flow table has room for [default: 4194304 for each packet, otherwise what xlb chooses]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1024..=16_777_216))]
    flow_table: Option<u32>,
    /// The processor that packets are handled on [default: the last]
    #[arg(long, value_name = "N")]
    cpu: Option<usize>,
    /// Prints the report as JSON
    #[arg(long)]
    json: bool,
    /// Writes a bar chart to this file, too
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// The program under test, which `cargo xtask bench` builds
    #[arg(long, value_name = "FILE", env = "XLB_BIN")]
    xlb: Option<PathBuf>,
}

/// Options that only the cost of a packet has.
const PER_PACKET: [&str; 5] = ["only", "list", "packets", "cpu", "svg"];

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    if arguments.control {
        let report = control::measure(
            &control::Plan {
                rounds: arguments.rounds.unwrap_or(5),
                services: arguments.services,
                backends: arguments.backends,
                flow_table: arguments.flow_table,
                idle: Duration::from_secs(arguments.idle.into()),
            },
            &enter(arguments)?,
        )?;
        return show(arguments, &report, report.draw());
    }
    if arguments.end_to_end {
        let plan = end_to_end::Plan {
            rounds: arguments.rounds.unwrap_or(5),
            requests: arguments.requests,
            is_of_cards: arguments.cards,
        };
        let report = end_to_end::measure(&plan, &enter(arguments)?)?;
        return show(arguments, &report, report.draw());
    }
    per_packet(arguments)
}

fn per_packet(arguments: &Arguments) -> Result<()> {
    let scenarios: Vec<Scenario> = Scenario::all()
        .into_iter()
        .filter(|scenario| scenario.is_named(&arguments.only))
        .collect();
    ensure!(
        !scenarios.is_empty(),
        "no scenario has the words of --only; --list shows the names"
    );
    if arguments.list {
        let names: String = scenarios
            .iter()
            .map(|scenario| format!("{}\n", scenario.name))
            .collect();
        return print(&names);
    }
    // Before what follows hides the file systems of the machine.
    let svg = arguments.svg.as_deref().map(std::path::absolute).transpose()?;
    let xlb = enter(arguments)?;

    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let report = per_packet::measure(
        &per_packet::Plan {
            rounds: arguments.rounds.unwrap_or(11),
            packets: arguments.packets,
            flow_table: arguments.flow_table.unwrap_or(4_194_304),
            cpu: arguments.cpu.unwrap_or(processors - 1),
        },
        &xlb,
        &scenarios,
    )?;
    if let Some(path) = svg {
        fs::write(&path, report::chart::draw(&report))
            .with_context(|| format!("{} was not written", path.display()))?;
    }
    show(arguments, &report, report::table::draw(&report))
}

/// Leaves the file systems of the machine, before the first thread; gives the path of the program under test.
fn enter(arguments: &Arguments) -> Result<PathBuf> {
    let xlb = arguments.xlb.as_deref().context("--xlb FILE is missing")?;
    let xlb = xlb
        .canonicalize()
        .with_context(|| format!("{} is not there", xlb.display()))?;
    isolation::enter()?;
    Ok(xlb)
}

/// Prints a report: as JSON where that was asked for, otherwise as this text.
fn show(arguments: &Arguments, report: &impl Serialize, text: String) -> Result<()> {
    print(&if arguments.json {
        serde_json::to_string_pretty(report)? + "\n"
    } else {
        text
    })
}

fn print(text: &str) -> Result<()> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .context("standard output was not written")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
        for ok in [&["--control", "--services", "3"][..], &["--only", "new"]] {
            assert!(
                Arguments::try_parse_from([&["bench"], ok].concat()).is_ok(),
                "{ok:?}"
            );
        }
        for wrong in [&["--control", "--only", "new"][..], &["--services", "3"]] {
            assert!(
                Arguments::try_parse_from([&["bench"], wrong].concat()).is_err(),
                "{wrong:?}"
            );
        }
    }
}
