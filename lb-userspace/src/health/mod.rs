//! The health of backends: a pure state machine, its driver and one file per probe.
//!
//! A probe's result goes to the backend's [`state`] machine; a change of health leaves the [`driver`] as a
//! [`Transition`] and becomes part of the model. Nothing in here touches a map.

mod driver;
mod exec;
mod grpc;
mod http;
mod https;
mod icmp;
mod socket;
mod state;
mod tcp;
mod tls;
mod udp;

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use nix::errno::Errno;
use tokio::time::Instant;

use crate::config::Probe;

pub use driver::{Driver, ProbeReport, Target, Transition};
pub use exec::Turn;
pub use grpc::{GrpcCode, ServingStatus};
pub use socket::SocketOptions;
pub use state::{Outcome, State};

/// Probes the target once, as its check says; takes at most the check's timeout.
///
/// `turn` is the backend's own: of the programs that probe it, one runs at a time.
///
/// # Errors
/// The probe did not succeed, or this host could not even try.
pub async fn probe(target: &Target, turn: &Turn) -> Result<(), ProbeError> {
    let (address, options) = (target.address, target.socket);
    let limit = Limit::new(target.check.timeout);
    match &target.check.probe {
        Probe::None => Ok(()),
        Probe::Tcp { .. } => tcp::probe(address, options, limit).await,
        Probe::Http { path, host, .. } => {
            let host = host.as_deref();
            http::probe(address, http::Get { path, host }, options, limit).await
        }
        Probe::Https {
            path,
            host,
            server_name,
            trust,
            ..
        } => {
            let host = host.as_deref();
            let get = http::Get { path, host };
            https::probe(address, get, server_name.as_ref(), trust, options, limit).await
        }
        Probe::Grpc { host, service, .. } => {
            grpc::probe(address, service, host.as_deref(), options, limit).await
        }
        Probe::Udp { send, expect, .. } => {
            udp::probe(address, send.as_deref(), expect.as_deref(), options, limit).await
        }
        Probe::Icmp => icmp::probe(address.ip(), options, limit).await,
        Probe::Exec { command, .. } => exec::probe(target, command, turn, limit).await,
    }
}

/// What a probe did, and why it did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// This host's fault: it says nothing of the backend.
    #[error("open a socket towards {address}: {}", describe(.source))]
    Socket { address: SocketAddr, source: io::Error },
    /// The same.
    #[error("start {}: {}", .program.display(), describe(.source))]
    Start { program: PathBuf, source: io::Error },
    #[error("{attempt}: {failure}")]
    Failed { attempt: Attempt, failure: Failure },
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
    #[error("{}", tls::in_words(.0))]
    Tls(rustls::Error),
    /// What `grpc.health.v1.Health/Check` answered.
    #[error("{0}")]
    NotServing(ServingStatus),
    /// The call itself has failed.
    #[error("grpc-status {code}{}", after_colon(.message))]
    GrpcStatus { code: GrpcCode, message: String },
    /// The server ends the connection, with the name of its reason.
    #[error("closed with GOAWAY {0}")]
    GoAway(String),
    #[error("stream reset with {0}")]
    StreamReset(String),
    #[error("the answer does not contain what is expected")]
    OtherAnswer,
    /// A program has not ended with 0 within the timeout: how it has, and the first line of its output.
    #[error("{end}{}", after_colon(.output))]
    Process { end: String, output: String },
    #[error("the run before it has not ended although it was killed")]
    StillRunning,
}

/// What a probe tries, in the words of reports and errors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attempt {
    Nothing,
    Connect(SocketAddr),
    Get {
        scheme: &'static str,
        address: SocketAddr,
        path: String,
    },
    Handshake(SocketAddr),
    HealthCheck {
        address: SocketAddr,
        service: String,
    },
    Exchange(SocketAddr),
    Echo(IpAddr),
    Run(PathBuf),
}

impl Attempt {
    /// What a probe that succeeds does last.
    fn of(address: SocketAddr, probe: &Probe) -> Self {
        match probe {
            Probe::None => Self::Nothing,
            Probe::Tcp { .. } => Self::Connect(address),
            Probe::Http { path, .. } => Self::get("http", address, path),
            Probe::Https { path, .. } => Self::get("https", address, path),
            Probe::Grpc { service, .. } => Self::HealthCheck {
                address,
                service: service.clone(),
            },
            Probe::Udp { .. } => Self::Exchange(address),
            Probe::Icmp => Self::Echo(address.ip()),
            Probe::Exec { command, .. } => Self::Run(command.program.clone()),
        }
    }

    fn get(scheme: &'static str, address: SocketAddr, path: &str) -> Self {
        Self::Get {
            scheme,
            address,
            path: path.to_owned(),
        }
    }

    fn failed(self, failure: Failure) -> ProbeError {
        ProbeError::Failed {
            attempt: self,
            failure,
        }
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("no health check"),
            Self::Connect(address) => write!(f, "connect to {address}"),
            Self::Get {
                scheme,
                address,
                path,
            } => write!(f, "GET {scheme}://{address}{path}"),
            Self::Handshake(address) => write!(f, "TLS handshake with {address}"),
            Self::HealthCheck { address, service } if service.is_empty() => {
                write!(f, "gRPC health check of {address}")
            }
            Self::HealthCheck { address, service } => {
                write!(f, "gRPC health check of {address} for {service}")
            }
            Self::Exchange(address) => write!(f, "datagram to {address}"),
            Self::Echo(address) => write!(f, "ICMP echo to {address}"),
            Self::Run(program) => write!(f, "run {}", program.display()),
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

/// What came from elsewhere, fit for a log and a terminal: not endlessly long, without control characters.
fn shortened(text: &str) -> String {
    const LONGEST: usize = 200;
    let plain = |character: char| if character.is_control() { '?' } else { character };
    let mut shortened: String = text.chars().take(LONGEST).map(plain).collect();
    if text.chars().nth(LONGEST).is_some() {
        shortened.push('…');
    }
    shortened
}

/// A text that may be empty, behind another one.
fn after_colon(text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        format!(": {text}")
    }
}

#[cfg(test)]
mod tests;
