//! A configuration that holds no mistake: what the rest of the daemon works with.

use std::{fmt, net::IpAddr, path::PathBuf, time::Duration};

use rustls::pki_types::ServerName;

use super::trust::Trust;

/// A whole configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Names of the interfaces that carry client or backend packets; at least one.
    pub interfaces: Vec<String>,
    pub xdp_mode: XdpMode,
    pub flow_table: FlowTable,
    /// File with the key of the hash.
    pub seed_file: PathBuf,
    /// Path of the control socket; `None` stands for the instance's own under `/run/xlb`.
    pub socket: Option<PathBuf>,
    /// In the order of the file; names are unique and no two overlap.
    pub services: Vec<Service>,
}

/// How the program is attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum XdpMode {
    #[default]
    Auto,
    Native,
    Generic,
}

/// Size and ageing of the flow table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowTable {
    /// Entries; `None` derives them from the machine's memory.
    pub size: Option<u32>,
    pub tcp_idle_timeout: Duration,
    pub udp_idle_timeout: Duration,
}

/// A service and its backends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub name: String,
    pub vip: IpAddr,
    /// Not empty, sorted, without overlap.
    pub ports: Vec<PortRange>,
    pub protocol: Protocol,
    pub strategy: Strategy,
    pub forward: Forward,
    pub drain_timeout: Duration,
    pub assign_vip: bool,
    pub health: HealthCheck,
    /// Names and addresses are unique within the service.
    pub backends: Vec<Backend>,
}

/// Ports from the first to the last, both included; neither is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRange {
    pub first: u16,
    pub last: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    ConsistentHash,
    IpHash,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forward {
    Nat,
    FullNat,
}

/// One server of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    pub name: String,
    pub address: IpAddr,
    /// `None` keeps the port that the client used.
    pub port: Option<u16>,
    /// Share of new flows in proportion to the other backends'; 0 gets none.
    pub weight: u32,
}

/// How the health of a service's backends is found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    pub probe: Probe,
    /// From the start of one probe to the start of the next.
    pub interval: Duration,
    /// After which a probe counts as failed; at most the interval.
    pub timeout: Duration,
    /// Successes in a row that make a backend `up`; at least 1.
    pub rise: u32,
    /// Failures in a row that make a backend `down`; at least 1.
    pub fall: u32,
}

/// What a probe does.
///
/// Without a port it goes to the backend's; to the first of the service's ports where the backend has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// No probe: the backend counts as `up`.
    None,
    /// A connection is accepted.
    Tcp { port: Option<u16> },
    /// A GET is answered with a status from 200 to 399.
    Http {
        port: Option<u16>,
        path: String,
        host: Option<String>,
    },
    /// The same over TLS.
    Https {
        port: Option<u16>,
        path: String,
        host: Option<String>,
        /// Whose certificate it has to be; `None` stands for the backend's address.
        server_name: Option<ServerName<'static>>,
        trust: Trust,
    },
    /// `grpc.health.v1.Health/Check` over HTTP/2 without TLS answers `SERVING`.
    Grpc {
        port: Option<u16>,
        host: Option<String>,
        /// What is asked for; empty stands for the server as a whole.
        service: String,
    },
    /// A datagram is answered; without anything to send or to expect, it is enough that it is not refused.
    Udp {
        port: Option<u16>,
        send: Option<Vec<u8>>,
        /// What the answer has to contain.
        expect: Option<Vec<u8>>,
    },
    /// An ICMP echo request is answered.
    Icmp,
    /// A program on this host exits with 0.
    Exec { port: Option<u16>, command: Command },
}

/// A program and its arguments, run without a shell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// Absolute path.
    pub program: PathBuf,
    pub arguments: Vec<String>,
}

impl Probe {
    /// The port that is configured for the probe itself.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::None | Self::Icmp => None,
            Self::Tcp { port }
            | Self::Http { port, .. }
            | Self::Https { port, .. }
            | Self::Grpc { port, .. }
            | Self::Udp { port, .. }
            | Self::Exec { port, .. } => *port,
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ConsistentHash => "consistent-hash",
            Self::IpHash => "ip-hash",
        })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nat => "nat",
            Self::FullNat => "full-nat",
        })
    }
}
