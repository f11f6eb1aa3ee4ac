//! The command line: one file per command with its arguments, what it does and how it prints the result.

mod administer;
pub mod check;
mod decap;
mod demo;
mod demo_backend;
mod detach;
pub mod output;
mod reload;
mod run;
mod status;

use std::{future::Future, io::IsTerminal, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::{
    api::{Change, Refusal, client::ClientError},
    datapath::DatapathError,
    instance::{self, Instance},
    net::NetError,
    seed::SeedError,
};

/// Exit codes, as sysexits.h has those above 2.
pub mod exit {
    pub const DONE: u8 = 0;
    pub const FAILED: u8 = 1;
    pub const USAGE: u8 = 2;
    pub const UNREACHABLE: u8 = 69;
    pub const NO_PERMISSION: u8 = 77;
    pub const BAD_CONFIGURATION: u8 = 78;
}

/// An eBPF/XDP layer-4 load balancer
#[derive(Debug, Parser)]
#[command(name = "xlb", version, max_term_width = 100)]
struct Cli {
    /// The daemon to talk to or to be, where several run on one kernel
    #[arg(long, global = true, default_value = instance::DEFAULT, value_name = "NAME")]
    instance: Instance,

    /// The daemon's control socket, unless it is the instance's own
    #[arg(long, global = true, env = "XLB_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Args),
    Check(check::Args),
    Status(status::Args),
    Reload(reload::Args),
    /// Gives a backend no new flows; existing ones go on until they end or the drain timeout has passed
    Drain(administer::Args),
    /// Takes a backend out at once: no new flows, and existing ones end
    Disable(administer::Args),
    /// Gives a drained or disabled backend new flows again
    Enable(administer::Args),
    Demo(demo::Args),
    Detach(detach::Args),
    Decap(decap::Args),
    #[command(hide = true)]
    DemoBackend(demo_backend::Args),
}

/// Runs the command that the arguments name; the exit code is that of the contract.
pub fn main() -> ExitCode {
    // clap exits by itself with 2 on bad usage.
    let cli = Cli::parse();
    let socket = cli.socket.clone().unwrap_or_else(|| cli.instance.socket());
    let code = match cli.command {
        Command::Run(args) => run::run(cli.instance, cli.socket, args),
        Command::Check(args) => check::run(&args),
        Command::Status(args) => status::run(&socket, &args),
        Command::Reload(args) => reload::run(&socket, &args),
        Command::Drain(args) => administer::run(&socket, &args, Change::Drain),
        Command::Disable(args) => administer::run(&socket, &args, Change::Disable),
        Command::Enable(args) => administer::run(&socket, &args, Change::Enable),
        Command::Demo(args) => demo::run(&args),
        Command::Decap(args) => decap::run(&args),
        Command::Detach(args) => detach::run(&cli.instance, &args),
        Command::DemoBackend(args) => demo_backend::run(&args),
    };
    ExitCode::from(code)
}

/// Runs a future on one thread; commands do one thing at a time.
fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(future)
}

/// Prints an error with its causes and gives its exit code.
fn fail(error: &anyhow::Error) -> u8 {
    anstream::eprintln!("xlb: {error:#}");
    exit_code(error)
}

fn exit_code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if let Some(error) = cause.downcast_ref::<ClientError>() {
            return match error {
                ClientError::Unreachable { .. } | ClientError::Broken { .. } => exit::UNREACHABLE,
                ClientError::Permission { .. } => exit::NO_PERMISSION,
                ClientError::Refused(refused) if refused.reason == Refusal::BadConfiguration => {
                    exit::BAD_CONFIGURATION
                }
                ClientError::Refused(_) => exit::FAILED,
            };
        }
        if let Some(NetError::NotPermitted { .. }) = cause.downcast_ref::<NetError>() {
            return exit::NO_PERMISSION;
        }
        if let Some(SeedError::Malformed { .. }) = cause.downcast_ref::<SeedError>() {
            return exit::BAD_CONFIGURATION;
        }
        let io = cause.downcast_ref::<std::io::Error>();
        let datapath = cause.downcast_ref::<DatapathError>().map(|error| &error.source);
        if let Some(error) = io.or(datapath)
            && error.kind() == std::io::ErrorKind::PermissionDenied
        {
            return exit::NO_PERMISSION;
        }
    }
    exit::FAILED
}

/// Logs to stderr; `XLB_LOG` sets the level, `info` unless it is set.
fn start_log() {
    let filter = EnvFilter::try_from_env("XLB_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .with_target(false)
        .init();
}

/// The sentence for a user without the rights that a command needs, if they are missing.
fn require_root(what: &str) -> Result<(), u8> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    anstream::eprintln!("xlb: {what} needs root: run it with `sudo`");
    Err(exit::NO_PERMISSION)
}
