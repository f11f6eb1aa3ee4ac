//! `xlb reload`: the daemon reads its configuration anew.

use std::path::Path;

use super::{block_on, fail, output::print};
use crate::api::{Done, client};

/// Makes the daemon read its configuration anew; a bad one changes nothing and is explained
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(socket: &Path, _args: &Args) -> u8 {
    report(block_on(async { Ok(client::reload(socket).await?) }))
}

/// Prints what was done, with warnings on stderr, or why not.
pub(super) fn report(result: anyhow::Result<Done>) -> u8 {
    match result {
        Ok(done) => {
            for warning in done.warnings {
                anstream::eprintln!("xlb: {warning}");
            }
            print(&done.message)
        }
        Err(error) => fail(&error),
    }
}
