//! Decoding of a frame down to the ports: one decoder for the kernel, the tests and the fuzzers.

use core::mem::offset_of;

use network_types::{eth::EthHdr, ip::Ipv4Hdr, tcp::TcpHdr, udp::UdpHdr};

use super::tcp_state::flags_are_sane;
use crate::abi::{Address, FlowKey, Reason, TCP, UDP};

/// A frame whose bounds have to be checked before it is read.
pub trait Frame {
    /// Bytes of a frame that are known to be there.
    type View: View;

    /// Length of the frame in bytes.
    fn len(&self) -> usize;

    /// Tells whether there is not a single byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The `N` bytes at an offset, or nothing where the frame ends before.
    fn view<const N: usize>(&self, offset: usize) -> Option<Self::View>;
}

/// Reads at offsets within the bytes that [`Frame::view`] has checked; words come as they lie in memory.
pub trait View {
    fn u8(&self, at: usize) -> u8;
    fn u16(&self, at: usize) -> u16;
    fn u32(&self, at: usize) -> u32;
}

/// `0x0800` in network byte order.
const ETHERTYPE_IPV4: u16 = 0x0800_u16.to_be();
/// "More fragments" and the offset (RFC 791 section 3.1), in network byte order.
const FRAGMENT_MASK: u16 = 0x3fff_u16.to_be();

/// A TCP or UDP packet, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub key: FlowKey,
    /// Offset of the IP header in the frame.
    pub ip_offset: usize,
    /// Offset of the TCP or UDP header in the frame.
    pub transport_offset: usize,
    /// TCP flags as in the header; 0 for UDP.
    pub tcp_flags: u8,
    pub ttl: u8,
}

/// Why a frame is no [`Segment`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undecodable {
    /// Nothing for a balancer, whatever its destination.
    NotTransport(Reason),
    /// Malformed: to be dropped with the reason if the destination is a VIP.
    Malformed { destination: Address, reason: Reason },
}

/// Decodes a frame from its Ethernet header down to the ports.
///
/// # Errors
/// What is not IPv4 with TCP or UDP in it, and each way in which such a packet can be malformed.
#[inline(always)]
pub fn decode<F: Frame>(frame: &F) -> Result<Segment, Undecodable> {
    let not_ip = Undecodable::NotTransport(Reason::NotIp);
    let ethernet = frame.view::<{ EthHdr::LEN }>(0).ok_or(not_ip)?;
    if ethernet.u16(offset_of!(EthHdr, ether_type)) != ETHERTYPE_IPV4 {
        return Err(not_ip);
    }
    decode_ipv4(frame, EthHdr::LEN)
}

#[inline(always)]
fn decode_ipv4<F: Frame>(frame: &F, ip_offset: usize) -> Result<Segment, Undecodable> {
    let Some(ip) = frame.view::<{ Ipv4Hdr::LEN }>(ip_offset) else {
        return Err(Undecodable::NotTransport(Reason::NotIp));
    };
    let destination = Address::from_v4_word(ip.u32(offset_of!(Ipv4Hdr, dst_addr)));
    let malformed = |reason| Undecodable::Malformed { destination, reason };

    let vihl = ip.u8(offset_of!(Ipv4Hdr, vihl));
    if vihl >> 4 != 4 {
        return Err(malformed(Reason::BadIpVersion));
    }
    let header_length = ((vihl & 0x0f) as usize) * 4;
    let total_length = u16::from_be(ip.u16(offset_of!(Ipv4Hdr, tot_len))) as usize;
    if header_length < Ipv4Hdr::LEN || ip_offset + header_length > frame.len() {
        return Err(malformed(Reason::BadIpHeaderLength));
    }
    if total_length < header_length || ip_offset + total_length > frame.len() {
        return Err(malformed(Reason::BadIpLength));
    }
    let source = ip.u32(offset_of!(Ipv4Hdr, src_addr));
    if !may_be_source(source) || source == destination.v4_word() {
        return Err(malformed(Reason::BadSourceAddress));
    }
    if ip.u16(offset_of!(Ipv4Hdr, frags)) & FRAGMENT_MASK != 0 {
        return Err(malformed(Reason::Fragment));
    }

    let protocol = ip.u8(offset_of!(Ipv4Hdr, proto));
    let transport_offset = ip_offset + header_length;
    let transport_length = total_length - header_length;
    let (ports, tcp_flags) = match protocol {
        TCP => decode_tcp(frame, transport_offset, transport_length).map_err(malformed)?,
        UDP => (
            decode_udp(frame, transport_offset, transport_length).map_err(malformed)?,
            0,
        ),
        _ => return Err(Undecodable::NotTransport(Reason::NotForService)),
    };
    if ports.0 == 0 || ports.1 == 0 {
        return Err(malformed(Reason::ZeroPort));
    }
    Ok(Segment {
        key: FlowKey {
            source: Address::from_v4_word(source),
            destination,
            source_port: ports.0,
            destination_port: ports.1,
            protocol: protocol as u32,
        },
        ip_offset,
        transport_offset,
        tcp_flags,
        ttl: ip.u8(offset_of!(Ipv4Hdr, ttl)),
    })
}

/// Ports in network byte order and flags of a TCP header.
#[inline(always)]
fn decode_tcp<F: Frame>(frame: &F, offset: usize, length: usize) -> Result<((u16, u16), u8), Reason> {
    if length < TcpHdr::LEN {
        return Err(Reason::TruncatedTransport);
    }
    let tcp = frame
        .view::<{ TcpHdr::LEN }>(offset)
        .ok_or(Reason::TruncatedTransport)?;
    let data_offset = ((tcp.u8(offset_of!(TcpHdr, _bitfield_1)) >> 4) as usize) * 4;
    if data_offset < TcpHdr::LEN || data_offset > length {
        return Err(Reason::BadTcpOffset);
    }
    let tcp_flags = tcp.u8(offset_of!(TcpHdr, _bitfield_1) + 1);
    if !flags_are_sane(tcp_flags) {
        return Err(Reason::BadTcpFlags);
    }
    Ok((
        (
            tcp.u16(offset_of!(TcpHdr, source)),
            tcp.u16(offset_of!(TcpHdr, dest)),
        ),
        tcp_flags,
    ))
}

/// Ports of a UDP header in network byte order.
#[inline(always)]
fn decode_udp<F: Frame>(frame: &F, offset: usize, length: usize) -> Result<(u16, u16), Reason> {
    if length < UdpHdr::LEN {
        return Err(Reason::TruncatedTransport);
    }
    let udp = frame
        .view::<{ UdpHdr::LEN }>(offset)
        .ok_or(Reason::TruncatedTransport)?;
    let udp_length = u16::from_be(udp.u16(offset_of!(UdpHdr, len))) as usize;
    if udp_length < UdpHdr::LEN || udp_length > length {
        return Err(Reason::BadUdpLength);
    }
    Ok((udp.u16(offset_of!(UdpHdr, src)), udp.u16(offset_of!(UdpHdr, dst))))
}

/// Tells whether a host may use an IPv4 address as its source: not in 0/8, 127/8, 224/4 or 240/4
/// (RFC 1122 section 3.2.1.3). The address is a word in network byte order.
#[inline(always)]
const fn may_be_source(word: u32) -> bool {
    let first = u32::from_be(word) >> 24;
    first != 0 && first != 127 && first < 224
}

impl Frame for &[u8] {
    type View = SliceView;

    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    fn view<const N: usize>(&self, offset: usize) -> Option<SliceView> {
        let mut view = SliceView { bytes: [0; 64] };
        view.bytes[..N].copy_from_slice(self.get(offset..offset.checked_add(N)?)?);
        Some(view)
    }
}

/// A copy of checked bytes, for callers outside the kernel.
#[derive(Clone, Copy, Debug)]
pub struct SliceView {
    bytes: [u8; 64],
}

impl View for SliceView {
    fn u8(&self, at: usize) -> u8 {
        self.bytes[at]
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_ne_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_ne_bytes([
            self.bytes[at],
            self.bytes[at + 1],
            self.bytes[at + 2],
            self.bytes[at + 3],
        ])
    }
}
