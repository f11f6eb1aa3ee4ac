//! Frames as they are sent and as they are expected, built by a library that knows nothing of the data path:
//! every checksum is computed over the whole packet.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use etherparse::{
    EtherType, Ethernet2Header, IpDscp, IpEcn, IpFragOffset, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header,
    NetSlice, SlicedPacket, TcpHeader, TransportSlice, UdpHeader, checksum::Sum16BitWords,
};
use lb_common::abi::{Address, FlowKey, GUE_PORT, ICMP, ICMPV6, Link, TCP, Tags, UDP};

pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const PSH: u8 = 0x08;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const SYN_ACK: u8 = SYN | ACK;
pub(crate) const FIN_ACK: u8 = FIN | ACK;
pub(crate) const RST_ACK: u8 = RST | ACK;

/// Offset of the IP header where there is no VLAN tag.
pub(crate) const IP: usize = 14;
/// Offset of the TCP or UDP header over IPv4 where there are no IP options.
pub(crate) const TRANSPORT: usize = IP + 20;
/// Offset of what follows the IPv6 header where there is no VLAN tag.
pub(crate) const TRANSPORT_V6: usize = IP + 40;

/// The router that a client's packets come from.
pub(crate) const ROUTER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];
/// The balancer's interface.
pub(crate) const BALANCER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x02];

/// Numbers of extension headers of IPv6.
pub(crate) const HOP_BY_HOP: u8 = 0;
pub(crate) const ROUTING: u8 = 43;
pub(crate) const FRAGMENT: u8 = 44;
pub(crate) const AUTHENTICATION: u8 = 51;
pub(crate) const DESTINATION_OPTIONS: u8 = 60;

/// A TCP, UDP or ICMP packet in an Ethernet frame; over IPv4 or IPv6, as its addresses are.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub link: Link,
    pub tags: Tags,
    /// The port is 0 for ICMP.
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub transport: Transport,
    /// Hop limit.
    pub ttl: u8,
    pub traffic_class: u8,
    pub flow_label: u32,
    pub identification: u16,
    pub dont_fragment: bool,
    /// Whole words; of IPv4.
    pub ip_options: Vec<u8>,
    /// Extension headers of IPv6: their numbers, and their bytes but for the first, which is the next number.
    pub extensions: Vec<(u8, Vec<u8>)>,
    pub sequence: u32,
    /// Written where the flags have ACK.
    pub acknowledgement: u32,
    pub window: u16,
    pub payload: Vec<u8>,
    /// What follows the IP packet in the frame.
    pub trailer: Vec<u8>,
}

#[derive(Clone, Debug)]
pub(crate) enum Transport {
    Tcp {
        flags: u8,
        options: Vec<u8>,
    },
    Udp {
        checksum: bool,
    },
    /// A message whose body is the payload, ICMP or ICMPv6 as the addresses are.
    Icmp {
        kind: u8,
        code: u8,
        /// What follows the checksum.
        word: u32,
    },
}

/// A TCP segment on its way to the balancer.
pub(crate) fn tcp(source: &str, destination: SocketAddr, flags: u8) -> Frame {
    let options = if flags & SYN != 0 {
        vec![2, 4, 0x05, 0xb4]
    } else {
        vec![]
    };
    frame(source, destination, Transport::Tcp { flags, options })
}

/// A UDP datagram on its way to the balancer.
pub(crate) fn udp(source: &str, destination: SocketAddr) -> Frame {
    frame(source, destination, Transport::Udp { checksum: true })
}

/// A packet of a protocol on its way to the balancer; of TCP a segment with ACK.
pub(crate) fn packet_of(protocol: u8, source: &str, destination: SocketAddr) -> Frame {
    match protocol {
        TCP => tcp(source, destination, ACK),
        _ => udp(source, destination),
    }
}

/// An ICMP message on its way to the balancer.
pub(crate) fn icmp(
    source: &str,
    destination: IpAddr,
    (kind, code, word): (u8, u8, u32),
    body: &[u8],
) -> Frame {
    let mut frame = frame(
        "192.0.2.1:1",
        SocketAddr::new(destination, 0),
        Transport::Icmp { kind, code, word },
    );
    frame.source = SocketAddr::new(source.parse().unwrap(), 0);
    frame.payload = body.to_vec();
    frame
}

fn frame(source: &str, destination: SocketAddr, transport: Transport) -> Frame {
    Frame {
        link: Link::new(BALANCER_MAC, ROUTER_MAC),
        tags: Tags::default(),
        source: address(source),
        destination,
        transport,
        ttl: 64,
        traffic_class: 0,
        flow_label: 0x2_fb1e,
        identification: 0x1234,
        dont_fragment: false,
        ip_options: vec![],
        extensions: vec![],
        sequence: 0x0102_0304,
        acknowledgement: 0x0506_0708,
        window: 0xfaf0,
        payload: b"payload of odd length".to_vec(),
        trailer: vec![],
    }
}

/// Parses `address:port` or `[address]:port`.
pub(crate) fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A VLAN tag (IEEE 802.1Q) of this id.
pub(crate) fn vlan(id: u16) -> u32 {
    Tags::tag(0x8100, id)
}

/// The outer of two VLAN tags (IEEE 802.1ad) of this id.
pub(crate) fn service_vlan(id: u16) -> u32 {
    Tags::tag(0x88a8, id)
}

impl Frame {
    /// This packet as it shall leave: other ends, another link, one hop less to live, all else as it is.
    pub(crate) fn sent(&self, link: Link, source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            link,
            source,
            destination,
            ttl: self.ttl - 1,
            ..self.clone()
        }
    }

    /// This packet on another link with other VLAN tags.
    pub(crate) fn on(&self, link: Link, tags: Tags) -> Self {
        Self {
            link,
            tags,
            ..self.clone()
        }
    }

    /// The packet of the other end: ends swapped, from another link.
    pub(crate) fn answer(source: SocketAddr, destination: SocketAddr, transport: Transport) -> Self {
        let mut frame = frame("192.0.2.1:1", destination, transport);
        frame.source = source;
        frame.link = Link::new(BALANCER_MAC, [0x02, 0, 0, 0, 0, 0x99]);
        frame.payload = b"answer".to_vec();
        frame
    }

    /// The way back on this frame's link.
    pub(crate) fn back(&self) -> Link {
        Link::new(self.link.source(), self.link.destination())
    }

    /// The TCP reset that answers this segment (RFC 9293 section 3.10.7.1), on its way back.
    pub(crate) fn reset(&self) -> Self {
        let Transport::Tcp { flags, .. } = self.transport else {
            panic!("no TCP segment: {self:?}");
        };
        let length = self.payload.len() as u32 + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        let (sequence, acknowledgement, flags) = if flags & ACK != 0 {
            (self.acknowledgement, 0, RST)
        } else {
            (0, self.sequence.wrapping_add(length), RST_ACK)
        };
        Self {
            link: self.back(),
            source: self.destination,
            destination: self.source,
            ttl: 64,
            transport: Transport::Tcp {
                flags,
                options: vec![],
            },
            sequence,
            acknowledgement,
            window: 0,
            payload: vec![],
            trailer: vec![],
            ..self.clone()
        }
    }

    /// The ICMP error about this packet on its way back: from its destination, and quoting so many bytes.
    pub(crate) fn error(&self, (kind, code, word): (u8, u8, u32), quoted: usize) -> Self {
        Self {
            link: self.back(),
            tags: self.tags,
            dont_fragment: true,
            identification: 0,
            flow_label: 0,
            ..icmp(
                &self.destination.ip().to_string(),
                self.source.ip(),
                (kind, code, word),
                &self.ip_bytes()[..quoted],
            )
        }
    }

    pub(crate) fn is_v4(&self) -> bool {
        self.source.is_ipv4()
    }

    fn protocol(&self) -> u8 {
        match self.transport {
            Transport::Tcp { .. } => TCP,
            Transport::Udp { .. } => UDP,
            Transport::Icmp { .. } if self.is_v4() => ICMP,
            Transport::Icmp { .. } => ICMPV6,
        }
    }

    pub(crate) fn key(&self) -> FlowKey {
        key(self.source, self.destination, self.protocol())
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.in_ethernet(&self.ip_bytes())
    }

    /// The frame around an IP packet.
    fn in_ethernet(&self, ip: &[u8]) -> Vec<u8> {
        let ether_type = if self.is_v4() {
            EtherType::IPV4
        } else {
            EtherType::IPV6
        };
        let mut bytes = ethernet(self.link, self.tags, ether_type);
        bytes.extend_from_slice(ip);
        bytes.extend_from_slice(&self.trailer);
        bytes
    }

    /// The IP packet alone.
    pub(crate) fn ip_bytes(&self) -> Vec<u8> {
        self.part(&self.transport_bytes(), None)
    }

    /// The fragments of this packet that begin at these offsets of what follows the IP headers: the first at 0.
    pub(crate) fn fragments(&self, offsets: &[usize]) -> Vec<Vec<u8>> {
        let whole = self.transport_bytes();
        let length = whole.len();
        let ends = offsets.iter().skip(1).chain([&length]);
        (offsets.iter().zip(ends))
            .map(|(start, end)| {
                let more = *end < whole.len();
                self.in_ethernet(&self.part(&whole[*start..*end], Some((*start, more))))
            })
            .collect()
    }

    /// An IP packet with this payload, which may be a fragment: at an offset, and with more to follow.
    fn part(&self, payload: &[u8], fragment: Option<(usize, bool)>) -> Vec<u8> {
        let (offset, more) = fragment.unwrap_or_default();
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let protocol = IpNumber(self.protocol());
                let mut ip =
                    Ipv4Header::new(0, self.ttl, protocol, source.octets(), destination.octets()).unwrap();
                ip.dscp = IpDscp::try_new(self.traffic_class >> 2).unwrap();
                ip.ecn = IpEcn::try_new(self.traffic_class & 3).unwrap();
                ip.identification = self.identification;
                ip.dont_fragment = self.dont_fragment;
                ip.more_fragments = more;
                ip.fragment_offset = IpFragOffset::try_new((offset / 8) as u16).unwrap();
                ip.options = self.ip_options[..].try_into().unwrap();
                ip.set_payload_len(payload.len()).unwrap();
                ip.header_checksum = ip.calc_header_checksum();
                [&ip.to_bytes()[..], payload].concat()
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut headers = self.extensions.clone();
                if fragment.is_some() {
                    let word = (offset as u16 | u16::from(more)).to_be_bytes();
                    let id = u32::from(self.identification).to_be_bytes();
                    headers.push((FRAGMENT, [&[0][..], &word, &id].concat()));
                }
                let (next, extensions) = chain(&headers, self.protocol());
                let ip = Ipv6Header {
                    traffic_class: self.traffic_class,
                    flow_label: Ipv6FlowLabel::try_new(self.flow_label).unwrap(),
                    payload_length: (extensions.len() + payload.len()) as u16,
                    next_header: IpNumber(next),
                    hop_limit: self.ttl,
                    source: source.octets(),
                    destination: destination.octets(),
                };
                [&ip.to_bytes()[..], &extensions, payload].concat()
            }
            ends => panic!("two families: {ends:?}"),
        }
    }

    /// The transport header and the payload.
    fn transport_bytes(&self) -> Vec<u8> {
        let header = match &self.transport {
            Transport::Tcp { flags, options } => {
                let (from, to) = (self.source.port(), self.destination.port());
                let mut tcp = TcpHeader::new(from, to, self.sequence, self.window);
                tcp.acknowledgment_number = if flags & ACK != 0 { self.acknowledgement } else { 0 };
                tcp.fin = flags & FIN != 0;
                tcp.syn = flags & SYN != 0;
                tcp.rst = flags & RST != 0;
                tcp.psh = flags & PSH != 0;
                tcp.ack = flags & ACK != 0;
                tcp.urg = flags & 0x20 != 0;
                tcp.set_options_raw(options).unwrap();
                tcp.checksum = match (self.source.ip(), self.destination.ip()) {
                    (IpAddr::V4(source), IpAddr::V4(destination)) => {
                        tcp.calc_checksum_ipv4_raw(source.octets(), destination.octets(), &self.payload)
                    }
                    _ => tcp.calc_checksum_ipv6_raw(
                        octets_v6(self.source.ip()),
                        octets_v6(self.destination.ip()),
                        &self.payload,
                    ),
                }
                .unwrap();
                tcp.to_bytes().to_vec()
            }
            Transport::Udp { checksum } => {
                let (from, to) = (self.source.port(), self.destination.port());
                let mut udp = UdpHeader::without_ipv4_checksum(from, to, self.payload.len()).unwrap();
                if *checksum {
                    udp.checksum = match (self.source.ip(), self.destination.ip()) {
                        (IpAddr::V4(source), IpAddr::V4(destination)) => {
                            udp.calc_checksum_ipv4_raw(source.octets(), destination.octets(), &self.payload)
                        }
                        _ => udp.calc_checksum_ipv6_raw(
                            octets_v6(self.source.ip()),
                            octets_v6(self.destination.ip()),
                            &self.payload,
                        ),
                    }
                    .unwrap();
                }
                udp.to_bytes().to_vec()
            }
            Transport::Icmp { kind, code, word } => {
                let mut sum = Sum16BitWords::new()
                    .add_2bytes([*kind, *code])
                    .add_4bytes(word.to_be_bytes())
                    .add_slice(&self.payload);
                if !self.is_v4() {
                    sum = sum
                        .add_16bytes(octets_v6(self.source.ip()))
                        .add_16bytes(octets_v6(self.destination.ip()))
                        .add_4bytes((self.payload.len() as u32 + 8).to_be_bytes())
                        .add_4bytes([0, 0, 0, ICMPV6]);
                }
                let checksum = sum.ones_complement().to_ne_bytes();
                [&[*kind, *code][..], &checksum, &word.to_be_bytes()].concat()
            }
        };
        [&header[..], &self.payload].concat()
    }

    /// This packet in another one, as `ipip` or, where there is a source port, `gue` shall send it.
    pub(crate) fn encapsulated(&self, outer: &Outer) -> Vec<u8> {
        self.part_encapsulated(
            &self.sent(self.link, self.source, self.destination).ip_bytes(),
            outer,
        )
    }

    /// As [`Self::encapsulated`], for a fragment of this packet as it comes: the frame's time to live is one more.
    pub(crate) fn fragments_encapsulated(&self, offsets: &[usize], outer: &Outer) -> Vec<Vec<u8>> {
        let sent = Self {
            tags: Tags::default(),
            ..self.sent(self.link, self.source, self.destination)
        };
        (sent.fragments(offsets).iter())
            .map(|fragment| self.part_encapsulated(&fragment[IP..], outer))
            .collect()
    }

    fn part_encapsulated(&self, inner: &[u8], outer: &Outer) -> Vec<u8> {
        let mut payload = vec![];
        let mut protocol = if self.is_v4() {
            IpNumber::IPV4
        } else {
            IpNumber::IPV6
        };
        if let Some(port) = outer.source_port {
            // RFC 6935: no checksum in a tunnel.
            let udp = UdpHeader::without_ipv4_checksum(port, GUE_PORT, inner.len()).unwrap();
            payload.extend_from_slice(&udp.to_bytes());
            protocol = IpNumber::UDP;
        }
        payload.extend_from_slice(inner);
        let (ether_type, ip) = match (outer.source, outer.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut ip = Ipv4Header::new(0, 64, protocol, source.octets(), destination.octets()).unwrap();
                ip.dscp = IpDscp::try_new(self.traffic_class >> 2).unwrap();
                ip.ecn = IpEcn::try_new(self.traffic_class & 3).unwrap();
                // What routers may not fragment inside they may not outside; IPv6 they never may.
                let may_not = self.dont_fragment || !self.is_v4();
                ip.dont_fragment = may_not;
                ip.identification = if may_not { 0 } else { self.identification };
                ip.set_payload_len(payload.len()).unwrap();
                ip.header_checksum = ip.calc_header_checksum();
                (EtherType::IPV4, ip.to_bytes().to_vec())
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let ip = Ipv6Header {
                    traffic_class: self.traffic_class,
                    flow_label: Ipv6FlowLabel::try_new(outer.flow_label).unwrap(),
                    payload_length: payload.len() as u16,
                    next_header: protocol,
                    hop_limit: 64,
                    source: source.octets(),
                    destination: destination.octets(),
                };
                (EtherType::IPV6, ip.to_bytes().to_vec())
            }
            ends => panic!("two families: {ends:?}"),
        };
        let mut bytes = ethernet(outer.link, outer.tags, ether_type);
        bytes.extend_from_slice(&ip);
        bytes.extend_from_slice(&payload);
        bytes.extend_from_slice(&self.trailer);
        bytes
    }
}

/// What is put around a packet. What of it depends on the flow is read from an output before it is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outer {
    pub link: Link,
    pub tags: Tags,
    pub source: IpAddr,
    pub destination: IpAddr,
    /// Of IPv6.
    pub flow_label: u32,
    /// Of `gue`.
    pub source_port: Option<u16>,
}

impl Outer {
    /// What is around a packet that has left.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let packet = SlicedPacket::from_ethernet(bytes).unwrap();
        let macs = packet
            .link
            .as_ref()
            .unwrap()
            .to_header()
            .unwrap()
            .ethernet2()
            .unwrap();
        let (source, destination, flow_label) = match packet.net.as_ref().unwrap() {
            NetSlice::Ipv4(ip) => (
                IpAddr::from(ip.header().source()),
                IpAddr::from(ip.header().destination()),
                0,
            ),
            NetSlice::Ipv6(ip) => (
                IpAddr::from(ip.header().source()),
                IpAddr::from(ip.header().destination()),
                ip.header().flow_label().value(),
            ),
            NetSlice::Arp(_) => panic!("not IP: {bytes:02x?}"),
        };
        let source_port = match &packet.transport {
            Some(TransportSlice::Udp(udp)) => Some(udp.source_port()),
            _ => None,
        };
        Self {
            link: Link::new(macs.destination, macs.source),
            tags: Tags::default(),
            source,
            destination,
            flow_label,
            source_port,
        }
    }
}

/// An Ethernet header with its VLAN tags.
fn ethernet(link: Link, tags: Tags, ether_type: EtherType) -> Vec<u8> {
    let header = Ethernet2Header {
        destination: link.destination(),
        source: link.source(),
        ether_type,
    }
    .to_bytes();
    let mut bytes = header[..12].to_vec();
    for tag in tags.0.into_iter().filter(|tag| *tag != 0) {
        bytes.extend_from_slice(&tag.to_ne_bytes());
    }
    bytes.extend_from_slice(&header[12..]);
    bytes
}

/// Extension headers, one after the other, and the number of the first of them, or of the last protocol.
pub(crate) fn chain(headers: &[(u8, Vec<u8>)], last: u8) -> (u8, Vec<u8>) {
    let mut bytes = vec![];
    for (at, (_, rest)) in headers.iter().enumerate() {
        bytes.push(headers.get(at + 1).map_or(last, |(number, _)| *number));
        bytes.extend_from_slice(rest);
    }
    (headers.first().map_or(last, |(number, _)| *number), bytes)
}

/// An extension header of options with so many units of eight bytes after the first.
pub(crate) fn options(number: u8, units: u8) -> (u8, Vec<u8>) {
    // One option of padding fills it (RFC 8200 section 4.2).
    let mut rest = vec![units, 1];
    let padding = usize::from(units) * 8 + 4;
    if padding > 255 {
        rest[1] = 0x1e;
    }
    rest.push(padding.min(255) as u8);
    rest.resize(usize::from(units) * 8 + 7, 0);
    (number, rest)
}

fn octets_v6(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(_) => panic!("not IPv6: {address}"),
        IpAddr::V6(address) => address.octets(),
    }
}

/// The 5-tuple as the maps hold it.
pub(crate) fn key(source: SocketAddr, destination: SocketAddr, protocol: u8) -> FlowKey {
    FlowKey {
        source: Address::from(source.ip()),
        destination: Address::from(destination.ip()),
        source_port: source.port().to_be(),
        destination_port: destination.port().to_be(),
        protocol: u32::from(protocol),
    }
}

/// The source and the destination of a TCP or UDP frame, read by the library.
pub(crate) fn ends(bytes: &[u8]) -> (SocketAddr, SocketAddr) {
    let packet = SlicedPacket::from_ethernet(bytes).unwrap();
    let (source, destination) = match &packet.net {
        Some(NetSlice::Ipv4(ip)) => (
            IpAddr::from(ip.header().source()),
            IpAddr::from(ip.header().destination()),
        ),
        Some(NetSlice::Ipv6(ip)) => (
            IpAddr::from(Ipv6Addr::from(ip.header().source())),
            IpAddr::from(Ipv6Addr::from(ip.header().destination())),
        ),
        _ => panic!("not IP: {bytes:02x?}"),
    };
    let (from, to) = match &packet.transport {
        Some(TransportSlice::Tcp(tcp)) => (tcp.source_port(), tcp.destination_port()),
        Some(TransportSlice::Udp(udp)) => (udp.source_port(), udp.destination_port()),
        other => panic!("neither TCP nor UDP: {other:?}"),
    };
    (SocketAddr::new(source, from), SocketAddr::new(destination, to))
}
