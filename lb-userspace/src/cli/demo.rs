//! `xlb demo`: not built yet.

/// Shows xlb at work in network namespaces on this machine
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: &Args) -> u8 {
    anstream::eprintln!("xlb: the demo is not built yet");
    super::exit::FAILED
}
