//! `xlb run`: the daemon.

use std::path::PathBuf;

use super::{exit, fail, require_root, start_log};
use crate::{allocator, config, daemon, instance::Instance};

/// Runs the daemon in the foreground, with its log on stderr
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The configuration
    #[arg(short, long, value_name = "FILE", default_value = config::DEFAULT_PATH)]
    config: PathBuf,
}

pub fn run(instance: Instance, socket: Option<PathBuf>, args: Args) -> u8 {
    allocator::keep_little();
    let config = match config::load(&args.config) {
        Ok(config) => config,
        Err(error) => {
            anstream::eprint!("{}", error.render(true));
            return error.exit_code();
        }
    };
    if let Err(code) = require_root("attaching a program to an interface") {
        return code;
    }
    start_log();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into()),
    };
    // SIGHUP reads the file again wherever the daemon's folder is then; a symbolic link may lead elsewhere by then.
    let path = std::path::absolute(&args.config).unwrap_or(args.config);
    match runtime.block_on(daemon::run(instance, path, config, socket)) {
        Ok(()) => exit::DONE,
        Err(error) => fail(&error),
    }
}
