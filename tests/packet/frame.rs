//! Frames as they are sent and as they are expected, built by a library that knows nothing of the data path:
//! every checksum is computed over the whole packet.

use std::net::{Ipv4Addr, SocketAddrV4};

use etherparse::{Ethernet2Header, IpNumber, Ipv4Header, TcpHeader, UdpHeader};
use lb_common::abi::{Address, FlowKey, Link, TCP, UDP};

pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const PSH: u8 = 0x08;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const SYN_ACK: u8 = SYN | ACK;
pub(crate) const FIN_ACK: u8 = FIN | ACK;

/// Offset of the IP header.
pub(crate) const IP: usize = 14;
/// Offset of the TCP or UDP header where there are no IP options.
pub(crate) const TRANSPORT: usize = IP + 20;

/// The router that a client's packets come from.
pub(crate) const ROUTER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];
/// The balancer's interface.
pub(crate) const BALANCER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x02];

/// A TCP or UDP packet over IPv4 in an Ethernet frame.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub link: Link,
    pub source: SocketAddrV4,
    pub destination: SocketAddrV4,
    pub transport: Transport,
    pub ttl: u8,
    /// Whole words.
    pub ip_options: Vec<u8>,
    pub payload: Vec<u8>,
    /// What follows the IP packet in the frame.
    pub trailer: Vec<u8>,
}

#[derive(Clone, Debug)]
pub(crate) enum Transport {
    Tcp { flags: u8, options: Vec<u8> },
    Udp { checksum: bool },
}

/// A TCP segment on its way to the balancer.
pub(crate) fn tcp(source: &str, destination: SocketAddrV4, flags: u8) -> Frame {
    let options = if flags & SYN != 0 {
        vec![2, 4, 0x05, 0xb4]
    } else {
        vec![]
    };
    frame(source, destination, Transport::Tcp { flags, options })
}

/// A UDP datagram on its way to the balancer.
pub(crate) fn udp(source: &str, destination: SocketAddrV4) -> Frame {
    frame(source, destination, Transport::Udp { checksum: true })
}

fn frame(source: &str, destination: SocketAddrV4, transport: Transport) -> Frame {
    Frame {
        link: Link::new(BALANCER_MAC, ROUTER_MAC),
        source: address(source),
        destination,
        transport,
        ttl: 64,
        ip_options: vec![],
        payload: b"payload of odd length".to_vec(),
        trailer: vec![],
    }
}

/// Parses `address:port`.
pub(crate) fn address(text: &str) -> SocketAddrV4 {
    text.parse().unwrap()
}

impl Frame {
    /// This packet as it shall leave: other ends, another link, one hop less to live, all else as it is.
    pub(crate) fn sent(&self, link: Link, source: SocketAddrV4, destination: SocketAddrV4) -> Self {
        Self {
            link,
            source,
            destination,
            ttl: self.ttl - 1,
            ..self.clone()
        }
    }

    /// The packet of the other end: ends swapped, from another link.
    pub(crate) fn answer(source: SocketAddrV4, destination: SocketAddrV4, transport: Transport) -> Self {
        let mut frame = frame("192.0.2.1:1", destination, transport);
        frame.source = source;
        frame.link = Link::new(BALANCER_MAC, [0x02, 0, 0, 0, 0, 0x99]);
        frame.payload = b"answer".to_vec();
        frame
    }

    /// The TCP reset that answers a SYN (RFC 9293 section 3.10.7.1), on its way back.
    pub(crate) fn reset_of_syn(&self) -> Vec<u8> {
        let mut tcp = TcpHeader::new(self.destination.port(), self.source.port(), 0, 0);
        tcp.acknowledgment_number = 0x0102_0304 + self.payload.len() as u32 + 1;
        tcp.rst = true;
        tcp.ack = true;
        let (source, destination) = (self.destination.ip().octets(), self.source.ip().octets());
        tcp.checksum = tcp.calc_checksum_ipv4_raw(source, destination, &[]).unwrap();
        let mut ip =
            Ipv4Header::new(tcp.header_len() as u16, 64, IpNumber::TCP, source, destination).unwrap();
        ip.identification = 0x1234;
        ip.header_checksum = ip.calc_header_checksum();
        let ethernet = Ethernet2Header {
            destination: self.link.source(),
            source: self.link.destination(),
            ether_type: etherparse::EtherType::IPV4,
        };
        [&ethernet.to_bytes()[..], &ip.to_bytes(), &tcp.to_bytes()].concat()
    }

    pub(crate) fn key(&self) -> FlowKey {
        let protocol = match self.transport {
            Transport::Tcp { .. } => TCP,
            Transport::Udp { .. } => UDP,
        };
        key(self.source, self.destination, protocol)
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let number = match self.transport {
            Transport::Tcp { .. } => IpNumber::TCP,
            Transport::Udp { .. } => IpNumber::UDP,
        };
        let mut ip = Ipv4Header::new(
            0,
            self.ttl,
            number,
            self.source.ip().octets(),
            self.destination.ip().octets(),
        )
        .unwrap();
        ip.identification = 0x1234;
        ip.options = self.ip_options[..].try_into().unwrap();
        let transport = self.transport_header();
        ip.set_payload_len(transport.len() + self.payload.len()).unwrap();
        ip.header_checksum = ip.calc_header_checksum();

        let mut bytes = Ethernet2Header {
            destination: self.link.destination(),
            source: self.link.source(),
            ether_type: etherparse::EtherType::IPV4,
        }
        .to_bytes()
        .to_vec();
        bytes.extend_from_slice(&ip.to_bytes());
        bytes.extend_from_slice(&transport);
        bytes.extend_from_slice(&self.payload);
        bytes.extend_from_slice(&self.trailer);
        bytes
    }

    fn transport_header(&self) -> Vec<u8> {
        let (source, destination) = (self.source.ip().octets(), self.destination.ip().octets());
        match &self.transport {
            Transport::Tcp { flags, options } => {
                let mut tcp =
                    TcpHeader::new(self.source.port(), self.destination.port(), 0x0102_0304, 0xfaf0);
                tcp.acknowledgment_number = if flags & ACK != 0 { 0x0506_0708 } else { 0 };
                tcp.fin = flags & FIN != 0;
                tcp.syn = flags & SYN != 0;
                tcp.rst = flags & RST != 0;
                tcp.psh = flags & PSH != 0;
                tcp.ack = flags & ACK != 0;
                tcp.urg = flags & 0x20 != 0;
                tcp.set_options_raw(options).unwrap();
                tcp.checksum = tcp
                    .calc_checksum_ipv4_raw(source, destination, &self.payload)
                    .unwrap();
                tcp.to_bytes().to_vec()
            }
            Transport::Udp { checksum } => {
                let (from, to) = (self.source.port(), self.destination.port());
                let mut udp = UdpHeader::without_ipv4_checksum(from, to, self.payload.len()).unwrap();
                if *checksum {
                    udp.checksum = udp
                        .calc_checksum_ipv4_raw(source, destination, &self.payload)
                        .unwrap();
                }
                udp.to_bytes().to_vec()
            }
        }
    }
}

/// The 5-tuple as the maps hold it.
pub(crate) fn key(source: SocketAddrV4, destination: SocketAddrV4, protocol: u8) -> FlowKey {
    FlowKey {
        source: Address::from(*source.ip()),
        destination: Address::from(*destination.ip()),
        source_port: source.port().to_be(),
        destination_port: destination.port().to_be(),
        protocol: u32::from(protocol),
    }
}

/// The source and the destination of a TCP or UDP frame, read by the library.
pub(crate) fn ends(bytes: &[u8]) -> (SocketAddrV4, SocketAddrV4) {
    let packet = etherparse::SlicedPacket::from_ethernet(bytes).unwrap();
    let Some(etherparse::NetSlice::Ipv4(ip)) = &packet.net else {
        panic!("not IPv4: {bytes:02x?}");
    };
    let (from, to) = match &packet.transport {
        Some(etherparse::TransportSlice::Tcp(tcp)) => (tcp.source_port(), tcp.destination_port()),
        Some(etherparse::TransportSlice::Udp(udp)) => (udp.source_port(), udp.destination_port()),
        other => panic!("neither TCP nor UDP: {other:?}"),
    };
    (
        SocketAddrV4::new(Ipv4Addr::from(ip.header().source()), from),
        SocketAddrV4::new(Ipv4Addr::from(ip.header().destination()), to),
    )
}
