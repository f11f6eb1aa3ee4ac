//! `xlb check`: parses and validates a configuration.

use std::{
    collections::BTreeSet,
    io::{self, Write},
    net::IpAddr,
    path::PathBuf,
};

use serde::Serialize;

use super::{block_on, output::OutputFormat};
use crate::{
    config::{self, Config, ConfigError, diagnostic::Located},
    controller, net,
};

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
    if let (OutputFormat::Table, Ok(config)) = (args.output, &result) {
        for warning in of_this_host(config) {
            writeln!(err, "warning: {warning}")?;
        }
    }
    out.flush()?;
    Ok(result.map_or_else(|error| error.exit_code(), |_| 0))
}

/// What this host lacks for the configuration, which may be another's: nothing where the kernel does not tell.
fn of_this_host(config: &Config) -> Vec<String> {
    let assigned: BTreeSet<IpAddr> = config
        .services
        .iter()
        .filter(|service| service.assign_vip)
        .map(|service| service.vip)
        .collect();
    let local = || controller::local_services(config);
    let addresses: BTreeSet<IpAddr> = local()
        .flat_map(controller::addresses_of)
        .filter(|address| !assigned.contains(address))
        .collect();
    if addresses.is_empty() {
        return Vec::new();
    }
    let missing = block_on(async { Ok(net::not_local(&addresses).await?) }).unwrap_or_default();
    let mut warnings = Vec::new();
    // Of a range of ports, too, each address is told once.
    let mut told = BTreeSet::new();
    for service in local() {
        if missing.contains(&service.vip) {
            warnings.push(controller::vip_not_local(service));
        }
        for backend in &service.backends {
            if missing.contains(&backend.address) && told.insert((&service.name, backend.address)) {
                warnings.push(format!(
                    "backend {:?} of {:?} with {}: {}",
                    backend.name,
                    service.name,
                    backend.address,
                    controller::BACKEND_NOT_LOCAL
                ));
            }
        }
    }
    warnings
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

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt, path::Path, thread};

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        check: Args,
    }

    /// Exit code, standard output and standard error of `xlb check` with these arguments.
    fn check(arguments: &[&str]) -> (u8, String, String) {
        let arguments = ["check"].iter().chain(arguments);
        let args = Command::try_parse_from(arguments).unwrap().check;
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = report(&args, &mut out, &mut anstream::StripStream::new(&mut err)).unwrap();
        (
            code,
            String::from_utf8(out).unwrap(),
            String::from_utf8(err).unwrap(),
        )
    }

    fn file(directory: &Path, text: &str) -> String {
        let path = directory.join("xlb.toml");
        fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    const VALID: &str = "interfaces = [\"eth0\", \"eth1\"]\n[[service]]\nname = \"web\"\nvip = \"203.0.113.10\"\nport = 80\n\
                         protocol = \"tcp\"\n[[service.backend]]\naddress = \"10.0.0.11:3000-3001\"\n";

    #[test]
    fn the_file_is_the_usual_one_unless_named() {
        let args = Command::try_parse_from(["check"]).unwrap().check;
        assert_eq!(args.config, Path::new("/etc/xlb/xlb.toml"));
        assert_eq!(args.output, OutputFormat::Table);
    }

    #[test]
    fn a_valid_file_is_summed_up_on_standard_output() {
        let directory = tempfile::tempdir().unwrap();
        let path = file(directory.path(), VALID);
        let expected = format!("{path} is valid: 1 service, 2 backends, on eth0, eth1\n");
        assert_eq!(check(&["-c", &path]), (0, expected, String::new()));

        let (code, out, err) = check(&["--config", &path, "-o", "json"]);
        assert_eq!((code, err.as_str()), (0, ""));
        let json: serde_json::Value = serde_json::from_str(&out).unwrap();
        let expected = serde_json::json!({
            "file": path, "valid": true, "errors": [], "interfaces": ["eth0", "eth1"], "services": 1, "backends": 2,
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn all_errors_are_shown_at_once_and_the_exit_code_says_bad_configuration() {
        let directory = tempfile::tempdir().unwrap();
        let path = file(
            directory.path(),
            &VALID.replace("80", "0").replace("\"tcp\"", "\"tpc\""),
        );
        let (code, out, err) = check(&["-c", &path]);
        assert_eq!((code, out.as_str()), (78, ""));
        assert!(err.contains(&format!("--> {path}:5:8")), "{err}");
        assert!(err.contains(&format!("--> {path}:6:12")), "{err}");
        assert!(err.ends_with(&format!("2 errors in {path}\n")), "{err}");

        let (code, out, err) = check(&["-c", &path, "-o", "json"]);
        assert_eq!((code, err.as_str()), (78, ""));
        let json: serde_json::Value = serde_json::from_str(&out).unwrap();
        let expected = serde_json::json!({
            "file": path,
            "valid": false,
            "errors": [
                {
                    "line": 5, "column": 8,
                    "message": "0 cannot be a port", "help": "write a number from 1 to 65535, without quotes",
                },
                {"line": 6, "column": 12, "message": "unknown protocol \"tpc\"", "help": "write \"tcp\""},
            ],
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn a_missing_file_is_a_bad_configuration_and_the_help_says_how_to_make_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("none.toml").display().to_string();
        let (code, out, err) = check(&["-c", &path]);
        assert_eq!((code, out.as_str()), (78, ""));
        assert!(
            err.starts_with(&format!("error: there is no configuration at {path}\n")),
            "{err}"
        );
        assert!(err.contains("interfaces = [\"eth0\"]"), "{err}");

        let (code, out, _) = check(&["-c", &path, "-o", "json"]);
        let json: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!((code, &json["errors"][0]["line"]), (78, &serde_json::Value::Null));
    }

    #[test]
    fn a_file_that_may_not_be_read_is_a_matter_of_permission() {
        let directory = tempfile::tempdir().unwrap();
        let path = file(directory.path(), VALID);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
        // Root may read everything; another user on this one thread may not.
        let nobody = nix::unistd::Uid::from_raw(65_534);
        let (code, out, err) = thread::spawn(move || {
            nix::unistd::setfsuid(nobody);
            check(&["-c", &path])
        })
        .join()
        .unwrap();
        assert_eq!((code, out.as_str()), (77, ""));
        assert!(err.contains("no permission to read"), "{err}");
        assert!(err.contains("run as root"), "{err}");
    }
}
