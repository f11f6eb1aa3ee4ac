//! `xlb check`: parses and validates a configuration.

use std::{
    io::{self, Write},
    path::PathBuf,
};

use serde::Serialize;

use super::output::OutputFormat;
use crate::config::{self, Config, ConfigError, diagnostic::Located};

/// Parses and validates a configuration; prints every error with its line and the fix
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The configuration
    #[arg(short, long, value_name = "FILE", default_value = config::DEFAULT_PATH)]
    pub config: PathBuf,

    /// How to print the result
    #[arg(short, long, value_enum, default_value_t)]
    pub output: OutputFormat,
}

/// Checks the file and prints the result; returns the exit code: 0, 77 (no permission) or 78 (bad configuration).
pub fn run(args: &Args) -> u8 {
    // Both streams strip the colours where there is no terminal or NO_COLOR is set.
    // If nobody reads what is printed, that is no verdict on the file.
    report(args, &mut anstream::stdout(), &mut anstream::stderr()).unwrap_or(1)
}

/// Prints the result for people or programs; returns the exit code.
fn report(args: &Args, out: &mut impl Write, err: &mut impl Write) -> io::Result<u8> {
    let result = config::load(&args.config);
    match (args.output, &result) {
        (OutputFormat::Table, Ok(config)) => write!(out, "{}", summary(args, config))?,
        (OutputFormat::Table, Err(error)) => write!(err, "{}", error.render(true))?,
        (OutputFormat::Json, _) => {
            serde_json::to_writer_pretty(&mut *out, &Report::new(args, &result))?;
            writeln!(out)?;
        }
    }
    out.flush()?;
    Ok(result.map_or_else(|error| error.exit_code(), |_| 0))
}

fn summary(args: &Args, config: &Config) -> String {
    let counted = |count: usize, what: &str| match count {
        1 => format!("1 {what}"),
        _ => format!("{count} {what}s"),
    };
    let backends = config.services.iter().map(|service| service.backends.len()).sum();
    format!(
        "{} is valid: {}, {}, on {}\n",
        args.config.display(),
        counted(config.services.len(), "service"),
        counted(backends, "backend"),
        config.interfaces.join(", ")
    )
}

/// What `-o json` prints.
#[derive(Debug, Serialize)]
struct Report {
    file: String,
    valid: bool,
    /// Empty if and only if the file is valid.
    errors: Vec<ReportedError>,
    #[serde(flatten)]
    summary: Option<Summary>,
}

#[derive(Debug, Serialize)]
struct Summary {
    interfaces: Vec<String>,
    services: usize,
    backends: usize,
}

/// A mistake; one that concerns the whole file has no line.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum ReportedError {
    Located(Located),
    WholeFile {
        line: Option<usize>,
        column: Option<usize>,
        message: String,
        help: Option<String>,
    },
}

impl Report {
    fn new(args: &Args, result: &Result<Config, ConfigError>) -> Self {
        let errors = match result {
            Ok(_) => Vec::new(),
            Err(ConfigError::Invalid(diagnostics)) => diagnostics
                .located()
                .into_iter()
                .map(ReportedError::Located)
                .collect(),
            Err(error) => vec![ReportedError::WholeFile {
                line: None,
                column: None,
                message: error.to_string(),
                help: error.help(),
            }],
        };
        Self {
            file: args.config.display().to_string(),
            valid: result.is_ok(),
            errors,
            summary: result.as_ref().ok().map(|config| Summary {
                interfaces: config.interfaces.clone(),
                services: config.services.len(),
                backends: config.services.iter().map(|service| service.backends.len()).sum(),
            }),
        }
    }
}
