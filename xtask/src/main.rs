//! The project's commands: `cargo xtask COMMAND`. This file dispatches; each command has a file of its own.

mod bench;
mod build;
mod kernel;
mod packages;
mod process;
mod run;
mod setup;
mod test;
mod tidy;
mod toolchain;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Builds, sets up, tests, runs and measures xlb")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Installs what building and testing need and is missing
    Setup,
    /// Builds target/debug/xlb, or target/release/xlb as one static binary
    Build(build::Arguments),
    /// Runs all the checks and tests, on this kernel and in virtual machines
    Test(test::Arguments),
    /// Runs `xlb demo`, or a shell, in a virtual machine
    Run(run::Arguments),
    /// Measures what xlb costs, beside what it costs at least and what others cost
    Bench(bench::Arguments),
    /// Checks the rules of the code that no compiler checks
    Tidy,
    /// Runs a program in a virtual machine (`test` runs test binaries through this)
    #[command(hide = true)]
    Vm(vm::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Setup => setup::run(setup::Scope::Test),
        Command::Build(arguments) => build::run(&arguments),
        Command::Test(arguments) => return finish(test::run(&arguments)),
        Command::Run(arguments) => return finish(run::run(&arguments)),
        Command::Bench(arguments) => return finish(bench::run(&arguments)),
        Command::Tidy => tidy::run(),
        Command::Vm(arguments) => return finish(vm::run(&arguments)),
    };
    finish(result.map(|()| ExitCode::SUCCESS))
}

fn finish(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
