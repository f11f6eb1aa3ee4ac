//! The HTTP server that the demo puts behind the balancer.

use std::net::SocketAddr;

use super::{block_on, exit, fail};
use crate::lab::http_backend;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[arg(long)]
    name: String,
    #[arg(long)]
    listen: SocketAddr,
}

pub fn run(args: &Args) -> u8 {
    match block_on(async { Ok(http_backend::serve(&args.name, args.listen).await?) }) {
        Ok(()) => exit::DONE,
        Err(error) => fail(&error),
    }
}
