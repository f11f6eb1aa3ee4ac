//! How a command prints what it lists.

use std::io::{self, Write};

use super::exit;

/// The value of `-o`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OutputFormat {
    /// For people.
    #[default]
    Table,
    /// For programs: stable `snake_case` keys.
    Json,
}

/// Prints the result of a command on stdout and gives the exit code: a full disk is a failure, a reader that has
/// gone away is not.
pub(super) fn print(text: &str) -> u8 {
    let mut out = anstream::stdout();
    match writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            let _ = writeln!(anstream::stderr(), "xlb: writing the result failed: {error}");
            exit::FAILED
        }
        _ => exit::DONE,
    }
}
