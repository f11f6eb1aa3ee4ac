//! The health of backends: a pure state machine, its driver and one file per probe.
//!
//! A probe's result goes to the backend's [`state`] machine; a change of health leaves the [`driver`] as a
//! [`Transition`] and becomes part of the model. Nothing in here touches a map.

mod driver;
mod http;
mod state;
mod tcp;

use std::{fmt, io, net::SocketAddr, time::Duration};

use nix::errno::Errno;
use tokio::time::Instant;

use crate::config::{HealthCheck, Probe};

pub use driver::{Driver, ProbeReport, Target, Transition};
pub use state::{Outcome, State};

/// Probes `address` once, as `check` says; takes at most the check's timeout.
pub async fn probe(address: SocketAddr, check: &HealthCheck) -> Result<(), ProbeError> {
    let limit = Limit::new(check.timeout);
    match &check.probe {
        Probe::None => Ok(()),
        Probe::Tcp { .. } => tcp::probe(address, limit).await,
        Probe::Http { path, host, .. } => http::probe(address, path, host.as_deref(), limit).await,
    }
}

/// What a probe did, and why it did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// This host's fault: it says nothing of the backend.
    #[error("open a socket towards {address}: {}", describe(.source))]
    Socket { address: SocketAddr, source: io::Error },
    #[error("{}: {failure}", Attempt::Connect(*.address))]
    Connect { address: SocketAddr, failure: Failure },
    #[error("{}: {failure}", Attempt::Get(*.address, .path))]
    Get {
        address: SocketAddr,
        path: String,
        failure: Failure,
    },
}

/// What came instead of success.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("timed out after {}", humantime::format_duration(*.0))]
    TimedOut(Duration),
    #[error("{}", describe(.0))]
    Io(io::Error),
    #[error("status {0}")]
    Status(u16),
    #[error("closed without a response")]
    NoResponse,
    #[error("closed within the body of the response")]
    HalfResponse,
    #[error("malformed response ({0})")]
    Malformed(String),
    #[error("the request cannot be built ({0})")]
    Request(hyper::http::Error),
}

/// What a probe tries, in the words of reports and errors.
enum Attempt<'a> {
    Nothing,
    Connect(SocketAddr),
    Get(SocketAddr, &'a str),
}

impl<'a> Attempt<'a> {
    fn of(address: SocketAddr, probe: &'a Probe) -> Self {
        match probe {
            Probe::None => Attempt::Nothing,
            Probe::Tcp { .. } => Attempt::Connect(address),
            Probe::Http { path, .. } => Attempt::Get(address, path),
        }
    }
}

impl fmt::Display for Attempt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Attempt::Nothing => f.write_str("no health check"),
            Attempt::Connect(address) => write!(f, "connect to {address}"),
            Attempt::Get(address, path) => write!(f, "GET http://{address}{path}"),
        }
    }
}

/// Until when a probe may take.
#[derive(Clone, Copy)]
struct Limit {
    timeout: Duration,
    end: Instant,
}

impl Limit {
    /// Starts now. The bound keeps the end within what the clock can express.
    fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            end: Instant::now() + timeout.min(driver::LONGEST_INTERVAL),
        }
    }

    async fn on<T>(self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        tokio::time::timeout_at(self.end, work)
            .await
            .unwrap_or(Err(Failure::TimedOut(self.timeout)))
    }
}

/// An error of the system in lowercase and without its number.
fn describe(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => Errno::from_raw(number).desc().to_lowercase(),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests;
