//! Encapsulated frames, built by a library that knows nothing of the data path.

use std::net::{IpAddr, SocketAddr};

use etherparse::{IpEcn, IpNumber, Ipv4Header, Ipv6Header, UdpHeader};

/// What is around an inner packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrapping {
    Ipip,
    /// GUE of variant 1: no header of its own.
    GueDirect,
    /// GUE of variant 0, as Linux sends it: a header of 4 bytes.
    GueHeader,
}

impl Wrapping {
    pub const ALL: [Self; 3] = [Self::Ipip, Self::GueDirect, Self::GueHeader];
}

/// The port of GUE.
const GUE_PORT: u16 = 6080;

/// An inner packet in an outer one in an Ethernet frame.
#[derive(Clone, Debug)]
pub struct Encapsulated {
    pub to: [u8; 6],
    pub from: [u8; 6],
    /// VLAN tags, each with its ethertype.
    pub tags: Vec<[u8; 4]>,
    pub source: IpAddr,
    pub destination: IpAddr,
    pub wrapping: Wrapping,
    pub ecn: u8,
    /// What is between the outer IP header and the rest: options of IPv4, or a whole extension header of IPv6, whose
    /// first byte is replaced.
    pub options: Vec<u8>,
    /// Whether UDP has a checksum.
    pub checksum: bool,
    pub inner: Vec<u8>,
    /// What follows the outer packet in the frame.
    pub trailer: Vec<u8>,
}

impl Encapsulated {
    /// The frame as it is sent.
    pub fn frame(&self) -> Vec<u8> {
        let inner_protocol = if is_v6(&self.inner) { 41 } else { 4 };
        let (protocol, payload) = match self.wrapping {
            Wrapping::Ipip => (inner_protocol, self.inner.clone()),
            Wrapping::GueDirect => (17, self.gue(&self.inner)),
            Wrapping::GueHeader => (
                17,
                self.gue(&[&[0, inner_protocol, 0, 0], &self.inner[..]].concat()),
            ),
        };
        let packet = match self.destination {
            IpAddr::V6(_) if !self.options.is_empty() => {
                let options = [&[protocol], &self.options[1..], &payload[..]].concat();
                ip_packet(self.source, self.destination, 60, self.ecn, &[], &options)
            }
            _ => ip_packet(
                self.source,
                self.destination,
                protocol,
                self.ecn,
                &self.options,
                &payload,
            ),
        };
        self.ethernet(&packet)
    }

    /// The frame as it is after the outer headers have been taken away, with this inner packet.
    pub fn unwrapped(&self, inner: &[u8]) -> Vec<u8> {
        self.ethernet(inner)
    }

    fn ethernet(&self, packet: &[u8]) -> Vec<u8> {
        let ethertype: u16 = if is_v6(packet) { 0x86dd } else { 0x0800 };
        [
            &self.to[..],
            &self.from,
            self.tags.as_flattened(),
            &ethertype.to_be_bytes(),
            packet,
            &self.trailer,
        ]
        .concat()
    }

    fn gue(&self, payload: &[u8]) -> Vec<u8> {
        let (source, destination) = (
            SocketAddr::new(self.source, 50_000),
            SocketAddr::new(self.destination, GUE_PORT),
        );
        let mut datagram = udp(source, destination, payload);
        if !self.checksum {
            datagram[6..8].fill(0);
        }
        datagram
    }
}

fn is_v6(packet: &[u8]) -> bool {
    packet.first().is_some_and(|byte| byte >> 4 == 6)
}

/// A UDP datagram in an IP packet.
pub fn udp_packet(source: SocketAddr, destination: SocketAddr, ecn: u8, payload: &[u8]) -> Vec<u8> {
    ip_packet(
        source.ip(),
        destination.ip(),
        17,
        ecn,
        &[],
        &udp(source, destination, payload),
    )
}

/// An IP packet of the family of its ends; options are those of IPv4.
///
/// # Panics
/// When the ends are of two families, or it would be too long.
pub fn ip_packet(
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    ecn: u8,
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let header = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut ip = Ipv4Header::new(0, 64, IpNumber(protocol), source.octets(), destination.octets())
                .expect("a short header");
            ip.ecn = IpEcn::try_new(ecn).expect("two bits");
            ip.identification = 0x1234;
            ip.options = options.try_into().expect("whole words");
            ip.set_payload_len(payload.len()).expect("a short packet");
            ip.header_checksum = ip.calc_header_checksum();
            ip.to_bytes().to_vec()
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => Ipv6Header {
            traffic_class: 0xb8 | ecn,
            flow_label: 0x12345.try_into().expect("20 bits"),
            payload_length: payload.len().try_into().expect("a short packet"),
            next_header: IpNumber(protocol),
            hop_limit: 64,
            source: source.octets(),
            destination: destination.octets(),
        }
        .to_bytes()
        .to_vec(),
        ends => panic!("two families: {ends:?}"),
    };
    [&header, payload].concat()
}

fn udp(source: SocketAddr, destination: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut header = UdpHeader::without_ipv4_checksum(source.port(), destination.port(), payload.len())
        .expect("a short datagram");
    let checksum = match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            header.calc_checksum_ipv4_raw(source.octets(), destination.octets(), payload)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            header.calc_checksum_ipv6_raw(source.octets(), destination.octets(), payload)
        }
        ends => panic!("two families: {ends:?}"),
    };
    header.checksum = checksum.expect("a short datagram");
    [&header.to_bytes()[..], payload].concat()
}
