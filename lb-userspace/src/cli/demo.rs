//! `xlb demo`: shows xlb at work on this machine.

use std::{
    io::{self, Write},
    time::Duration,
};

use super::{block_on, exit, fail, output::OutputFormat, require_root};
use crate::demo::{self, Plan, display::Display, stage, summary::Summary};

/// Shows xlb at work in network namespaces on this machine
///
/// Builds a client, a balancer and HTTP backends in network namespaces, makes connections, kills a backend, starts it
/// again, and shows how connections are spread and moved meanwhile. Exits with 0 only if no connection failed that
/// should not have. Nothing is left of it afterwards.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How long traffic is driven
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(6..=3600))]
    seconds: u16,

    /// How many backends there are
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=9))]
    backends: u8,

    /// How to print the result; with json it is all that is printed
    #[arg(short, long, value_enum, default_value_t)]
    output: OutputFormat,
}

pub fn run(args: &Args) -> u8 {
    if let Err(code) = require_root("building network namespaces") {
        return code;
    }
    // Before there is a second thread.
    if let Err(error) = stage::provide_bpffs() {
        return fail(&error);
    }
    let plan = Plan {
        length: Duration::from_secs(args.seconds.into()),
        backends: args.backends.into(),
    };
    let display = match args.output {
        OutputFormat::Table => Display::for_stdout(),
        OutputFormat::Json => Display::Silent,
    };
    let printed = block_on(demo::run(plan, display)).and_then(|summary| {
        let text = text(&summary, args.output)?;
        Ok((summary.ok, text))
    });
    match printed {
        Ok((ok, text)) => {
            // Who closed the output still gets the exit code.
            let _ = io::stdout().write_all(text.as_bytes());
            if ok { exit::DONE } else { exit::FAILED }
        }
        Err(error) => fail(&error),
    }
}

fn text(summary: &Summary, output: OutputFormat) -> anyhow::Result<String> {
    Ok(match output {
        OutputFormat::Table => format!("\n{}", summary.table()),
        OutputFormat::Json => format!("{}\n", serde_json::to_string_pretty(summary)?),
    })
}
