//! The `xlb` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    xlb::cli::main()
}
