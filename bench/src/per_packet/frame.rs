//! The frames that are measured, built by a library that knows nothing of the data path.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;
use etherparse::{
    ArpEthIpv4Packet, ArpOperation, EtherType, Ethernet2Header, IpNumber, Ipv4Header, Ipv6FlowLabel,
    Ipv6Header, TcpHeader, UdpHeader,
};
use lb_common::logic::bench_flow;

const BALANCER: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ROUTER: [u8; 6] = [2, 0, 0, 0, 0, 0xaa];
/// What is before the last word of a client's IPv6 address.
const CLIENTS: [u16; 6] = [0xfc00, 2, 0, 0, 0, 0];
/// The shortest frame, without its check sequence.
const SHORTEST: usize = 60;

/// A frame, but for the flow that it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet {
    /// Of no flow.
    Arp,
    Ip(Ip),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip {
    pub transport: Transport,
    /// The end that is not the client.
    pub server: SocketAddr,
    /// Whether it goes to the server, or from there to the client.
    pub direction: Direction,
    /// Bytes after the TCP or UDP header.
    pub payload: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Syn,
    Ack,
    Udp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    ToServer,
    ToClient,
}

impl Packet {
    /// The frame as a client's flow has it, with the checksums computed over all of it.
    pub fn frame(&self, flow: u32) -> Result<Vec<u8>> {
        let mut frame = Vec::new();
        match self {
            Self::Arp => arp(&mut frame)?,
            Self::Ip(ip) => ip.write(flow, &mut frame)?,
        }
        frame.resize(frame.len().max(SHORTEST), 0);
        Ok(frame)
    }
}

fn arp(frame: &mut Vec<u8>) -> Result<()> {
    ethernet([0xff; 6], EtherType::ARP).write(frame)?;
    let request = ArpEthIpv4Packet {
        operation: ArpOperation::REQUEST,
        sender_mac: ROUTER,
        sender_ipv4: [10, 0, 0, 9],
        target_mac: [0; 6],
        target_ipv4: [10, 0, 0, 8],
    };
    frame.extend_from_slice(&request.to_bytes());
    Ok(())
}

fn ethernet(destination: [u8; 6], ether_type: EtherType) -> Ethernet2Header {
    Ethernet2Header {
        source: ROUTER,
        destination,
        ether_type,
    }
}

impl Ip {
    /// The client's address and port.
    pub fn client(&self, flow: u32) -> SocketAddr {
        let (address, port) = bench_flow::client(flow, self.server.is_ipv6());
        let address: IpAddr = if self.server.is_ipv4() {
            Ipv4Addr::from(u32::from_be(address)).into()
        } else {
            let [a, b, c, d, e, f] = CLIENTS;
            let last = u32::from_be(address);
            Ipv6Addr::new(a, b, c, d, e, f, (last >> 16) as u16, last as u16).into()
        };
        SocketAddr::new(address, u16::from_be(port))
    }

    fn write(&self, flow: u32, frame: &mut Vec<u8>) -> Result<()> {
        let (source, destination) = match self.direction {
            Direction::ToServer => (self.client(flow), self.server),
            Direction::ToClient => (self.server, self.client(flow)),
        };
        let payload = vec![b'x'; self.payload];
        let ports = (source.port(), destination.port());
        match (source.ip(), destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let length = (self.header_length() + self.payload).try_into()?;
                let mut header =
                    Ipv4Header::new(length, 64, self.number(), source.octets(), destination.octets())?;
                header.identification = 1;
                ethernet(BALANCER, EtherType::IPV4).write(frame)?;
                header.write(frame)?;
                if self.transport == Transport::Udp {
                    UdpHeader::with_ipv4_checksum(ports.0, ports.1, &header, &payload)?.write(frame)?;
                } else {
                    let mut tcp = self.tcp(ports);
                    tcp.checksum = tcp.calc_checksum_ipv4(&header, &payload)?;
                    tcp.write(frame)?;
                }
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let header = Ipv6Header {
                    traffic_class: 0,
                    flow_label: Ipv6FlowLabel::ZERO,
                    payload_length: (self.header_length() + self.payload).try_into()?,
                    next_header: self.number(),
                    hop_limit: 64,
                    source: source.octets(),
                    destination: destination.octets(),
                };
                ethernet(BALANCER, EtherType::IPV6).write(frame)?;
                header.write(frame)?;
                if self.transport == Transport::Udp {
                    UdpHeader::with_ipv6_checksum(ports.0, ports.1, &header, &payload)?.write(frame)?;
                } else {
                    let mut tcp = self.tcp(ports);
                    tcp.checksum = tcp.calc_checksum_ipv6(&header, &payload)?;
                    tcp.write(frame)?;
                }
            }
            // The client's family is the server's.
            _ => {}
        }
        frame.extend_from_slice(&payload);
        Ok(())
    }

    fn tcp(&self, ports: (u16, u16)) -> TcpHeader {
        let mut tcp = TcpHeader::new(ports.0, ports.1, 1000, 8192);
        match self.transport {
            Transport::Syn => tcp.syn = true,
            _ => {
                tcp.ack = true;
                tcp.acknowledgment_number = 2000;
            }
        }
        tcp
    }

    fn number(&self) -> IpNumber {
        match self.transport {
            Transport::Syn | Transport::Ack => IpNumber::TCP,
            Transport::Udp => IpNumber::UDP,
        }
    }

    /// Length of the TCP or UDP header.
    fn header_length(&self) -> usize {
        match self.transport {
            Transport::Syn | Transport::Ack => 20,
            Transport::Udp => 8,
        }
    }
}
