//! What is measured: packets, what the flow table knows of them, and what is to become of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lb_common::abi::Reason;
use serde::{Deserialize, Serialize};

use super::frame::{Direction, Ip, Packet, Transport};
use crate::balancer::{
    configuration::{Family, Forward, NAT_PORT, PORT, VIP_4_IN_6},
    replying_backend,
};

/// One row of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// Words from the general to the particular.
    pub name: String,
    pub kind: Kind,
    /// What is timed.
    pub packet: Packet,
    /// What makes the flows known before.
    pub opener: Packet,
    /// What becomes of each packet: one of these.
    pub reasons: &'static [Reason],
    /// Bytes that each packet grows by.
    pub grows: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Packets of no service, from so many sources.
    Pass { flows: u32 },
    /// Packets of so many flows that are in the flow table.
    Known { flows: u32 },
    /// Each packet begins a flow, and the flow table has room for it; so many that all may be recorded, then a pause.
    New,
    /// Each packet begins a flow, of a table full of others, and faster than any table may record them.
    Flood,
}

/// Numbers of flows, and how they are written in names.
const FLOWS: [(u32, &str); 4] = [(1, "1"), (1000, "1k"), (64_000, "64k"), (1_000_000, "1m")];
/// What a client sends in a protocol over a family.
const TRAFFIC: [(&str, Transport, Family); 4] = [
    ("tcp4", Transport::Ack, Family::V4),
    ("udp4", Transport::Udp, Family::V4),
    ("tcp6", Transport::Ack, Family::V6),
    ("udp6", Transport::Udp, Family::V6),
];
/// Addresses of no service.
const NO_VIP: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 200, 9, 9)),
    IpAddr::V6(Ipv6Addr::new(0xfc00, 9, 0, 0, 0, 0, 0, 9)),
];
/// Payload that fills an outer packet up to the MTU of 1500.
const LARGE: usize = 1440;

impl Kind {
    /// Numbers of flows that packets are of: from 0 to before this one.
    pub fn flows(self) -> u64 {
        match self {
            Self::Pass { flows } | Self::Known { flows } => flows.into(),
            // Never the same twice.
            Self::New | Self::Flood => u64::MAX,
        }
    }

    /// Whether flows are to begin no faster than a flow table records them.
    pub fn is_within_budget(self) -> bool {
        matches!(self, Self::Known { .. } | Self::New)
    }
}

impl Scenario {
    /// All of them, in the order of the report.
    pub fn all() -> Vec<Self> {
        let mut all = vec![Self::pass("pass arp", Packet::Arp, 1)];
        for (traffic, transport, family) in TRAFFIC {
            all.push(Self::pass(
                &format!("pass {traffic}"),
                to(NO_VIP[family as usize], transport),
                1,
            ));
        }
        all.push(Self::pass("pass tcp4 64k", to(NO_VIP[0], Transport::Ack), 64_000));
        for forward in Forward::ALL {
            for (traffic, transport, family) in TRAFFIC {
                let vip = forward.vip(family);
                for (flows, number) in FLOWS {
                    let name = format!("known {} {traffic} {number}", forward.name());
                    let grows = outer_length(forward, family);
                    all.push(Self::known(&name, vip, transport, flows, grows));
                }
            }
        }
        for (traffic, transport, family) in TRAFFIC {
            for (flows, number) in FLOWS {
                all.extend(Self::reply(
                    &format!("known nat-reply {traffic} {number}"),
                    family,
                    transport,
                    flows,
                ));
            }
        }
        let (tcp, outer) = (Transport::Ack, outer_length(Forward::Ipip, Family::V6));
        all.push(Self::known(
            "known ipip tcp4in6 64k",
            VIP_4_IN_6,
            tcp,
            64_000,
            outer,
        ));
        all.push(Self::large("known ipip tcp4 64k 1480-bytes"));
        for forward in Forward::ALL {
            for (traffic, transport, family) in TRAFFIC {
                let first = if transport == Transport::Ack {
                    Transport::Syn
                } else {
                    transport
                };
                let name = format!("new {} {traffic}", forward.name());
                all.push(Self::unknown(&name, Kind::New, forward, family, first));
            }
        }
        for forward in Forward::ALL {
            for (family, digit) in [(Family::V4, 4), (Family::V6, 6)] {
                for (flags, transport) in [("syn", Transport::Syn), ("ack", Transport::Ack)] {
                    let name = format!("flood {} tcp{digit} {flags}", forward.name());
                    all.push(Self::unknown(&name, Kind::Flood, forward, family, transport));
                }
            }
        }
        all
    }

    /// Tells whether this is one of those that are asked for: its name has all the words of one of them, or nothing was
    /// asked for.
    pub fn is_named(&self, asked: &[String]) -> bool {
        let has = |word: &str| self.name.split(' ').any(|own| own == word);
        asked.is_empty() || asked.iter().any(|words| words.split_whitespace().all(has))
    }

    /// What becomes of the packets that make its flows known.
    pub fn opened(&self) -> &'static [Reason] {
        match self.kind {
            Kind::Flood => self.reasons,
            _ => &[Reason::Forwarded],
        }
    }

    pub fn may_be_dropped(&self) -> bool {
        self.reasons.contains(&Reason::FlowTableFull)
    }

    /// Every packet that it sends.
    #[cfg(test)]
    pub fn packets(&self) -> [Packet; 2] {
        [self.packet, self.opener]
    }

    /// The floor's part: IPv4 alone, and nothing but packets from clients; the nearest that it has.
    pub fn of_floor(&self) -> Self {
        let vip = Forward::Ipip.vip(Family::V4);
        let of = |transport| Self {
            packet: to(vip, transport),
            opener: to(vip, Transport::Syn),
            grows: outer_length(Forward::Ipip, Family::V4),
            ..self.clone()
        };
        match self.kind {
            Kind::Pass { .. } => Self {
                packet: to(NO_VIP[0], Transport::Ack),
                grows: 0,
                ..self.clone()
            },
            Kind::Known { .. } => of(Transport::Ack),
            Kind::New | Kind::Flood => of(Transport::Syn),
        }
    }

    fn pass(name: &str, packet: Packet, flows: u32) -> Self {
        let reasons: &[Reason] = if packet == Packet::Arp {
            &[Reason::NotIp]
        } else {
            &[Reason::NotForService]
        };
        Self {
            name: name.to_owned(),
            kind: Kind::Pass { flows },
            packet,
            opener: packet,
            reasons,
            grows: 0,
        }
    }

    fn known(name: &str, vip: IpAddr, transport: Transport, flows: u32, grows: usize) -> Self {
        Self {
            name: name.to_owned(),
            kind: Kind::Known { flows },
            packet: to(vip, transport),
            opener: to(vip, opener(transport)),
            reasons: &[Reason::Forwarded],
            grows,
        }
    }

    fn large(name: &str) -> Self {
        let vip = Forward::Ipip.vip(Family::V4);
        let large = Self::known(
            name,
            vip,
            Transport::Ack,
            64_000,
            outer_length(Forward::Ipip, Family::V4),
        );
        let packet = match large.packet {
            Packet::Ip(ip) => Packet::Ip(Ip { payload: LARGE, ..ip }),
            Packet::Arp => Packet::Arp,
        };
        Self { packet, ..large }
    }

    /// Packets of the backend of `nat` to its clients.
    fn reply(name: &str, family: Family, transport: Transport, flows: u32) -> Option<Self> {
        let backend = replying_backend(family)?;
        let packet = Packet::Ip(Ip {
            transport,
            server: SocketAddr::new(backend, NAT_PORT),
            direction: Direction::ToClient,
            payload: payload(transport),
        });
        Some(Self {
            packet,
            reasons: &[Reason::Returned],
            ..Self::known(name, Forward::Nat.vip(family), transport, flows, 0)
        })
    }

    fn unknown(name: &str, kind: Kind, forward: Forward, family: Family, transport: Transport) -> Self {
        let packet = to(forward.vip(family), transport);
        // Connections that nobody has seen begin take the place of none that is open, and do not go on without a record.
        let has_no_room = kind == Kind::Flood && forward == Forward::Nat && transport == Transport::Ack;
        Self {
            name: name.to_owned(),
            kind,
            packet,
            opener: packet,
            reasons: if has_no_room {
                &[Reason::Forwarded, Reason::FlowTableFull]
            } else {
                &[Reason::Forwarded]
            },
            grows: outer_length(forward, family),
        }
    }
}

/// A client's packet.
fn to(vip: IpAddr, transport: Transport) -> Packet {
    Packet::Ip(Ip {
        transport,
        server: SocketAddr::new(vip, PORT),
        direction: Direction::ToServer,
        payload: payload(transport),
    })
}

/// Payload that makes an IPv4 frame 64 bytes, or none.
fn payload(transport: Transport) -> usize {
    match transport {
        Transport::Syn => 0,
        Transport::Ack => 10,
        Transport::Udp => 22,
    }
}

/// How a flow begins.
fn opener(transport: Transport) -> Transport {
    match transport {
        Transport::Udp => Transport::Udp,
        Transport::Syn | Transport::Ack => Transport::Syn,
    }
}

/// Length of the outer header to a backend of this family.
fn outer_length(forward: Forward, family: Family) -> usize {
    match (forward, family) {
        (Forward::Ipip, Family::V4) => 20,
        (Forward::Ipip, Family::V6) => 40,
        (Forward::Nat | Forward::Dsr, _) => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_forward_direction_family_and_protocol_has_its_scenarios() {
        let all = Scenario::all();
        let names: BTreeSet<&str> = all.iter().map(|scenario| scenario.name.as_str()).collect();
        assert_eq!(names.len(), all.len(), "a name is there twice");
        for forward in ["ipip", "nat", "nat-reply", "dsr"] {
            for traffic in ["tcp4", "udp4", "tcp6", "udp6"] {
                for flows in ["1", "1k", "64k", "1m"] {
                    assert!(names.contains(format!("known {forward} {traffic} {flows}").as_str()));
                }
            }
        }
    }

    #[test]
    fn scenarios_are_chosen_by_whole_words() {
        let named = |asked: &[&str]| {
            let asked: Vec<String> = asked.iter().map(|words| (*words).to_owned()).collect();
            Scenario::all()
                .iter()
                .filter(|scenario| scenario.is_named(&asked))
                .count()
        };
        assert_eq!(named(&[]), Scenario::all().len());
        assert_eq!(named(&["known tcp4 nat 1k"]), 1);
        assert_eq!(named(&["known nat 1"]), 4);
        assert_eq!(named(&["known nat 1", "known nat-reply 1"]), 8);
        assert_eq!(named(&["kno"]), 0);
    }
}
