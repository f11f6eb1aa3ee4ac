//! The configuration file, in two steps: [`raw`] reads each value for itself and keeps its place in the text,
//! `validate` makes of them a [`Config`], which cannot hold a mistake. Both go on after an error, so that
//! everything that is wrong is told at once.

pub mod diagnostic;
pub mod raw;
mod syntax;
mod trust;
mod validate;
pub mod validated;
mod values;

use std::{
    fs, io,
    panic::resume_unwind,
    path::{Path, PathBuf},
    thread::{self, ScopedJoinHandle},
};

pub use diagnostic::{Diagnostic, Diagnostics};
pub use trust::{Trust, TrustError};
pub use validated::*;
pub use values::addresses::unusable;

/// Where the configuration is unless `-c` names another file.
pub const DEFAULT_PATH: &str = "/etc/xlb/xlb.toml";

/// Reads the configuration in the file at `path`.
///
/// # Errors
/// The file cannot be read, or what it says is wrong: then every mistake with its place.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    let bytes = fs::read(path).map_err(|source| {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => ConfigError::Missing { path },
            io::ErrorKind::PermissionDenied => ConfigError::Permission { path },
            _ => ConfigError::Unreadable { path, source },
        }
    })?;
    let name = path.display().to_string();
    let text = String::from_utf8(bytes).map_err(|error| syntax::not_utf8(&error, &name))?;
    Ok(parse(&text, &name)?)
}

/// Reads a configuration from its text; `name` is what diagnostics call it.
///
/// # Errors
/// Every mistake with its place, in the order of the text; never none. A text that is not TOML is told alone.
pub fn parse(text: &str, name: &str) -> Result<Config, Diagnostics> {
    // A thread has an arena of its own in glibc: what stays of a large text is then not strewn over the pages of the document,
    // which are given back.
    let parsed = thread::scope(|scope| {
        let spawned = thread::Builder::new().spawn_scoped(scope, || parse_here(text, name));
        spawned.map_or_else(|_| Ok(parse_here(text, name)), ScopedJoinHandle::join)
    });
    match parsed {
        #[expect(clippy::redundant_clone, reason = "the copy is in this thread's arena")]
        Ok(Ok(config)) => Ok(config.clone()),
        Ok(Err(diagnostics)) => Err(diagnostics),
        Err(panic) => resume_unwind(panic),
    }
}

fn parse_here(text: &str, name: &str) -> Result<Config, Diagnostics> {
    let mut found = Vec::new();
    let config = syntax::document(text, &mut found)
        .and_then(|document| validate::validate(&raw::read(&document, &mut found), &mut found));
    match config {
        Some(config) if found.is_empty() => Ok(config),
        _ => Err(Diagnostics::new(text, name, found)),
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("there is no configuration at {}", path.display())]
    Missing { path: PathBuf },
    #[error("no permission to read the configuration {}", path.display())]
    Permission { path: PathBuf },
    #[error("reading the configuration {} failed: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Invalid(#[from] Diagnostics),
}

impl ConfigError {
    /// The exit code of a command that ends with this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Permission { .. } => 77,
            Self::Missing { .. } | Self::Unreadable { .. } | Self::Invalid(_) => 78,
        }
    }

    /// What the user can do; `None` where each diagnostic says it for itself.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Missing { .. } => Some(
                "name the file with `-c FILE`, or make one; the smallest names one interface: \
                 `interfaces = [\"eth0\"]`"
                    .to_owned(),
            ),
            Self::Permission { path } => Some(format!(
                "run as root, or let this user read it: `chmod o+r {0}`, `chmod o+x` for its directories",
                path.display()
            )),
            Self::Unreadable { .. } => Some("name a readable file with `-c FILE`".to_owned()),
            Self::Invalid(_) => None,
        }
    }

    /// Everything that is wrong, for a terminal; `styled` adds colours as ANSI sequences.
    pub fn render(&self, styled: bool) -> String {
        match self {
            Self::Invalid(diagnostics) => diagnostics.render(styled),
            other => diagnostic::render_without_place(&other.to_string(), other.help().as_deref(), styled),
        }
    }
}
