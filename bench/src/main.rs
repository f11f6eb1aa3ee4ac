//! `cargo xtask bench`: what xlb costs, beside what it has to cost. The method is in `docs/bench.md`.
//!
//! What is measured has a folder: `per_packet`, the program under `BPF_PROG_TEST_RUN`. The others are what any
//! measurement needs: a balancer to measure, a processor to itself, statistics and a report.

mod balancer;
mod isolation;
mod per_packet;
mod processor;
mod report;
mod statistics;

use std::{fs, io::Write, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, ensure};
use clap::Parser;

use crate::per_packet::scenario::Scenario;

/// What xlb costs for each packet, beside what a balancer costs at least.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench")]
struct Arguments {
    /// Only scenarios whose name has each of these words, such as "known nat 64k"; may be given again for more
    #[arg(long, value_name = "WORDS")]
    only: Vec<String>,
    /// Prints the names of the scenarios, and measures none
    #[arg(long)]
    list: bool,
    /// How often each scenario is measured; the median counts
    #[arg(long, value_name = "N", default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Packets of each round; of new flows at most 100000 and what the flow table has room for, of floods a quarter
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(100..=100_000_000))]
    packets: u32,
    /// Flows that the flow table has room for
    #[arg(long, value_name = "N", default_value_t = 4_194_304, value_parser = clap::value_parser!(u32).range(1024..=16_777_216))]
    flow_table: u32,
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
    let xlb = arguments.xlb.as_deref().context("--xlb FILE is missing")?;
    let xlb = xlb
        .canonicalize()
        .with_context(|| format!("{} is not there", xlb.display()))?;
    // Both before the first thread: what follows hides the file systems of the machine.
    let svg = arguments.svg.as_deref().map(std::path::absolute).transpose()?;
    isolation::enter()?;

    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let report = per_packet::measure(
        &per_packet::Plan {
            rounds: arguments.rounds,
            packets: arguments.packets,
            flow_table: arguments.flow_table,
            cpu: arguments.cpu.unwrap_or(processors - 1),
        },
        &xlb,
        &scenarios,
    )?;
    if let Some(path) = svg {
        fs::write(&path, report::chart::draw(&report))
            .with_context(|| format!("{} was not written", path.display()))?;
    }
    print(&if arguments.json {
        serde_json::to_string_pretty(&report)? + "\n"
    } else {
        report::table::draw(&report)
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
    }
}
