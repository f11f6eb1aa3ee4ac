//! A configuration that holds no mistake: what the rest of the daemon works with.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    time::Duration,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use rustls::pki_types::ServerName;

use super::trust::Trust;

/// A whole configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Names of the interfaces that carry client or backend packets; at least one.
    pub interfaces: Vec<String>,
    pub xdp_mode: XdpMode,
    pub flow_table: FlowTable,
    pub limits: Limits,
    /// File with the key of the hash.
    pub seed_file: PathBuf,
    /// Path of the control socket; `None` stands for the instance's own under `/run/xlb`.
    pub socket: Option<PathBuf>,
    /// Where the outer source addresses of `ipip` come from.
    pub ipip_source: IpipSource,
    /// In the order of the file; names are unique and no two overlap.
    pub services: Vec<Service>,
}

/// Prefixes of the outer source addresses of `ipip`: each flow has one of its own, so that the receive queues of a
/// backend share the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpipSource {
    pub v4: Ipv4Net,
    /// At least 96 bits long, so that only the last word varies.
    pub v6: Ipv6Net,
}

/// Those that Katran uses: private addresses, and the discard prefix of RFC 6666.
pub const IPIP_SOURCE: IpipSource = IpipSource {
    v4: Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 16),
    v6: Ipv6Net::new_assert(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0), 96),
};

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

/// How many services and backends the maps are made for; `None` derives it from how many there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub services: Option<u32>,
    pub backends: Option<u32>,
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
    /// Prefixes whose new flows are allowed, all others denied; empty allows all but those in `deny`. The longest
    /// prefix that holds a source decides.
    pub allow: Vec<IpNet>,
    pub deny: Vec<IpNet>,
    pub new_flow_cap: Option<NewFlowCap>,
    pub when_all_down: WhenAllDown,
    /// For how long after it came up a backend's share grows; zero gives it the whole at once.
    pub slow_start: Duration,
    /// Backends that have to be up for the service to count as healthy.
    pub min_healthy: u32,
    /// Resets the TCP flows of a backend that leaves the configuration, instead of letting them end by themselves.
    pub reset_on_removal: bool,
    pub health: HealthCheck,
    /// Names and addresses are unique within the service.
    pub backends: Vec<Backend>,
}

/// How many new flows a source prefix may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewFlowCap {
    /// A second; at least 1.
    pub rate: u32,
    /// At once after a rest; at least 1.
    pub burst: u32,
    /// Bits of an IPv4 address that make a source, 1 to 32.
    pub prefix_v4: u8,
    /// Bits of an IPv6 address that make a source, 1 to 128.
    pub prefix_v6: u8,
}

/// What new flows get when no backend of a service is up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenAllDown {
    /// TCP a reset, UDP an ICMP error.
    #[default]
    Reject,
    /// A backend all the same, as if all that are enabled were up.
    TryAll,
}

/// Ports from the first to the last, both included; neither is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRange {
    pub first: u16,
    pub last: u16,
}

impl PortRange {
    /// Every port: `any`. Alone in a service's list.
    pub const ANY: Self = Self {
        first: 1,
        last: u16::MAX,
    };

    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// The ports that are in both.
    pub fn common(self, other: Self) -> Option<Self> {
        let (first, last) = (self.first.max(other.first), self.last.min(other.last));
        (first <= last).then_some(Self { first, last })
    }

    /// How many ports these are.
    pub fn count(self) -> u32 {
        u32::from(self.last - self.first) + 1
    }
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
    RoundRobin,
    LeastConnections,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forward {
    Nat,
    FullNat,
    Dsr,
    IpIp,
    Gue,
    Local,
}

impl Forward {
    /// Tells whether packets reach a backend as the client sent them: with the VIP and its port as destination.
    pub fn keeps_destination(self) -> bool {
        matches!(self, Self::Dsr | Self::IpIp | Self::Gue)
    }

    /// Tells whether packets travel inside another IP packet, which may be of the other address family.
    pub fn encapsulates(self) -> bool {
        matches!(self, Self::IpIp | Self::Gue)
    }
}

/// One server of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    pub name: String,
    pub address: IpAddr,
    /// `None` keeps the port that the client used; where the forward keeps it anyway, the service's or `None`.
    pub port: Option<u16>,
    /// Share of new flows in proportion to the other backends'; 0 gets none.
    pub weight: u32,
    /// Live flows that it takes; `None` for no limit.
    pub max_connections: Option<u32>,
    /// Gets new flows only while no other backend is up.
    pub backup: bool,
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
        if *self == Self::ANY {
            f.write_str("any")
        } else if self.first == self.last {
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
            Self::RoundRobin => "round-robin",
            Self::LeastConnections => "least-connections",
        })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nat => "nat",
            Self::FullNat => "full-nat",
            Self::Dsr => "dsr",
            Self::IpIp => "ipip",
            Self::Gue => "gue",
            Self::Local => "local",
        })
    }
}
