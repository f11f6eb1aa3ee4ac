//! `xlb drain`, `xlb disable` and `xlb enable`: the administrative state of a backend.

use std::path::Path;

use super::{block_on, reload::report};
use crate::api::{Change, client};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the service
    service: String,
    /// Name of the backend
    backend: String,
}

pub fn run(socket: &Path, args: &Args, change: Change) -> u8 {
    report(block_on(async {
        Ok(client::administer(socket, &args.service, &args.backend, change).await?)
    }))
}
