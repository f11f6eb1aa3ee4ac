//! Decoding of a frame down to the ports: one decoder for the kernel, the tests and the fuzzers.

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use super::tcp_state::flags_are_sane;
use crate::abi::{Address, FlowKey, ICMP, ICMPV6, Link, Reason, TCP, Tags, UDP};

/// A frame whose bounds have to be checked before it is read.
pub trait Frame {
    /// Bytes of a frame that are known to be there.
    type View: View;

    /// Tells whether the frame has at least so many bytes, whether or not all of them can be viewed.
    fn reaches(&self, end: usize) -> bool;

    /// The `N` bytes at an offset, or nothing where the frame ends before.
    fn view<const N: usize>(&self, offset: usize) -> Option<Self::View>;

    /// Length of a packet of the host's own stack, which need not look like one of the network: what it sends to itself has
    /// loopback addresses, or the same one at both ends, and what it handles at once may be too long for an IP header to
    /// tell, which says 0 then (`iph_set_totlen`, Linux 6.3).
    #[inline(always)]
    fn length_in_stack(&self) -> Option<usize> {
        None
    }

    /// [`decode_extensions`] of this frame: a function of its own in the kernel, where its loop would be checked again for all
    /// that follows.
    #[inline(never)]
    fn extensions(&self, packet: &mut Packet, next: u8, offset: usize) -> u32
    where
        Self: Sized,
    {
        decode_extensions(self, packet, next, offset)
    }
}

/// Reads at offsets within the bytes that [`Frame::view`] has checked; words come as they lie in memory.
pub trait View {
    fn u8(&self, at: usize) -> u8;
    fn u16(&self, at: usize) -> u16;
    fn u32(&self, at: usize) -> u32;
}

/// EtherTypes in network byte order.
pub mod ethertype {
    pub const IPV4: u16 = 0x0800_u16.to_be();
    pub const IPV6: u16 = 0x86dd_u16.to_be();
    /// A VLAN tag (IEEE 802.1Q).
    pub const VLAN: u16 = 0x8100_u16.to_be();
    /// The outer of two VLAN tags (IEEE 802.1ad).
    pub const SERVICE_VLAN: u16 = 0x88a8_u16.to_be();
}

/// Length of a VLAN tag in bytes.
pub const TAG_LEN: usize = 4;
/// "More fragments" (RFC 791 section 3.1), in network byte order.
const MORE_FRAGMENTS: u16 = 0x2000_u16.to_be();
/// The offset of a fragment, in network byte order.
const FRAGMENT_OFFSET: u16 = 0x1fff_u16.to_be();
/// "Don't fragment", in network byte order.
pub const DONT_FRAGMENT: u16 = 0x4000_u16.to_be();
const MORE_FRAGMENTS_V6: u16 = 0x0001_u16.to_be();

/// Extension headers of IPv6 that are walked at most: RFC 8200 section 4.1 recommends an order of six.
const MAX_EXTENSION_HEADERS: usize = 6;
/// Numbers of extension headers (RFC 8200 section 4, RFC 4302).
pub mod extension {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const AUTHENTICATION: u8 = 51;
    pub const DESTINATION_OPTIONS: u8 = 60;
    /// Length of a fragment header in bytes.
    pub const FRAGMENT_LEN: usize = 8;
    /// The offset in bytes in the second word of a fragment header, in network byte order.
    pub const FRAGMENT_OFFSET: u16 = 0xfff8_u16.to_be();
}

/// A packet, decoded as far as a balancer looks.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// The 5-tuple; ports are 0 where the packet has none.
    pub key: FlowKey,
    /// MAC addresses as they came.
    pub link: Link,
    pub tags: Tags,
    /// What the fragments of one packet have in common; as it lies in the header.
    pub identification: u32,
    /// Offset of the IP header in the frame.
    pub ip_offset: u32,
    /// Offset of what follows the IP headers.
    pub transport_offset: u32,
    /// Offset of the end of the IP packet in the frame.
    pub end: u32,
    /// TCP flags as in the header; 0 for all else.
    pub tcp_flags: u8,
    /// Hops that it may still go.
    pub ttl: u8,
    /// Differentiated services and ECN (RFC 2474, RFC 3168).
    pub traffic_class: u8,
    /// Non-zero for IPv6.
    pub is_v6: u8,
    /// A [`Fragment`] as its number.
    pub fragment: u8,
    /// Non-zero where routers may not fragment it.
    pub dont_fragment: u8,
    pub _pad: u16,
}

/// Which part of a packet a frame has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// All of it.
    Whole = 0,
    /// The first part, with the ports.
    First = 1,
    /// Another part.
    Later = 2,
}

impl Packet {
    /// Tells whether it is a later fragment, which has no transport header.
    #[inline(always)]
    pub const fn is_later_fragment(&self) -> bool {
        self.fragment == Fragment::Later as u8
    }
}

/// What a packet is, as far as it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// TCP or UDP with its ports.
    Transport,
    /// A later fragment of TCP or UDP: its ports are those of the first.
    LaterFragment,
    /// A whole ICMP or ICMPv6 message.
    Icmp,
}

/// Why a frame is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undecodable {
    /// Nothing for a balancer, whatever its destination.
    NotTransport(Reason),
    /// Malformed: to be dropped with the reason if the destination, which [`Packet::key`] has, is a VIP.
    Malformed(Reason),
}

/// Decodes a frame from its Ethernet header down to the ports, into a packet that is all zeroes or of an earlier frame.
///
/// # Errors
/// What is neither TCP, UDP nor ICMP over IP, and each way in which such a packet can be malformed.
#[inline(always)]
pub fn decode<F: Frame>(frame: &F, packet: &mut Packet) -> Result<Kind, Undecodable> {
    let (ether_type, ip_offset) = decode_ethernet(frame, packet)?;
    // A frame for a group reaches every host of the network: were each to balance it, backends would get it several
    // times, and its destination is no address to answer from (RFC 1122 section 3.3.6 has hosts ignore it, too).
    let is_ip = ether_type == ethertype::IPV4 || ether_type == ethertype::IPV6;
    if is_ip && packet.link.is_for_group() {
        return Err(Undecodable::NotTransport(Reason::NotForService));
    }
    match ether_type {
        ethertype::IPV4 => decode_ipv4(frame, packet, ip_offset),
        ethertype::IPV6 => decode_ipv6(frame, packet, ip_offset),
        _ => Err(Undecodable::NotTransport(Reason::NotIp)),
    }
}

/// Decodes the Ethernet header and up to two VLAN tags; gives the EtherType of what follows and its offset.
#[inline(always)]
fn decode_ethernet<F: Frame>(frame: &F, packet: &mut Packet) -> Result<(u16, usize), Undecodable> {
    let not_ip = Undecodable::NotTransport(Reason::NotIp);
    packet.end = 0;
    packet.tags = Tags([0, 0]);
    let ethernet = frame.view::<{ EthHdr::LEN }>(0).ok_or(not_ip)?;
    packet.link = Link([ethernet.u32(0), ethernet.u32(4), ethernet.u32(8)]);
    let mut ether_type = ethernet.u16(offset_of!(EthHdr, ether_type));
    let mut ip_offset = EthHdr::LEN;
    if ether_type == ethertype::VLAN || ether_type == ethertype::SERVICE_VLAN {
        let tag = frame.view::<{ TAG_LEN + 2 }>(EthHdr::LEN - 2).ok_or(not_ip)?;
        packet.tags.0[0] = tag.u32(0);
        ether_type = tag.u16(TAG_LEN);
        ip_offset = EthHdr::LEN + TAG_LEN;
        if ether_type == ethertype::VLAN || ether_type == ethertype::SERVICE_VLAN {
            let tag = frame
                .view::<{ TAG_LEN + 2 }>(EthHdr::LEN + TAG_LEN - 2)
                .ok_or(not_ip)?;
            packet.tags.0[1] = tag.u32(0);
            ether_type = tag.u16(TAG_LEN);
            ip_offset = EthHdr::LEN + 2 * TAG_LEN;
        }
    }
    Ok((ether_type, ip_offset))
}

#[inline(always)]
fn decode_ipv4<F: Frame>(frame: &F, packet: &mut Packet, ip_offset: usize) -> Result<Kind, Undecodable> {
    let Some(ip) = frame.view::<{ Ipv4Hdr::LEN }>(ip_offset) else {
        return Err(Undecodable::NotTransport(Reason::NotIp));
    };
    let source = ip.u32(offset_of!(Ipv4Hdr, src_addr));
    let destination = ip.u32(offset_of!(Ipv4Hdr, dst_addr));
    packet.key.source = Address::from_v4_word(source);
    packet.key.destination = Address::from_v4_word(destination);
    let malformed = |reason| Err(Undecodable::Malformed(reason));

    let vihl = ip.u8(offset_of!(Ipv4Hdr, vihl));
    if vihl >> 4 != 4 {
        return malformed(Reason::BadIpVersion);
    }
    let header_length = ((vihl & 0x0f) as usize) * 4;
    let total_length = match (
        u16::from_be(ip.u16(offset_of!(Ipv4Hdr, tot_len))),
        frame.length_in_stack(),
    ) {
        (0, Some(length)) => length - ip_offset,
        (total_length, _) => total_length as usize,
    };
    if header_length < Ipv4Hdr::LEN || !frame.reaches(ip_offset + header_length) {
        return malformed(Reason::BadIpHeaderLength);
    }
    if total_length < header_length || !frame.reaches(ip_offset + total_length) {
        return malformed(Reason::BadIpLength);
    }
    if frame.length_in_stack().is_none() && (!may_be_source(source) || source == destination) {
        return malformed(Reason::BadSourceAddress);
    }
    let protocol = ip.u8(offset_of!(Ipv4Hdr, proto));
    if protocol != TCP && protocol != UDP && protocol != ICMP {
        return Err(Undecodable::NotTransport(Reason::NotForService));
    }
    let fragment_word = ip.u16(offset_of!(Ipv4Hdr, frags));
    packet.identification = ip.u16(offset_of!(Ipv4Hdr, id)) as u32;
    packet.dont_fragment = (fragment_word & DONT_FRAGMENT != 0) as u8;
    packet.ip_offset = ip_offset as u32;
    packet.end = (ip_offset + total_length) as u32;
    packet.ttl = ip.u8(offset_of!(Ipv4Hdr, ttl));
    packet.traffic_class = ip.u8(offset_of!(Ipv4Hdr, tos));
    packet.is_v6 = 0;
    packet.fragment = if fragment_word & FRAGMENT_OFFSET != 0 {
        Fragment::Later as u8
    } else if fragment_word & MORE_FRAGMENTS != 0 {
        Fragment::First as u8
    } else {
        Fragment::Whole as u8
    };
    let offset = u16::from_be(fragment_word & FRAGMENT_OFFSET) as usize * 8;
    decode_transport(frame, packet, protocol, ip_offset + header_length, offset)
}

#[inline(always)]
fn decode_ipv6<F: Frame>(frame: &F, packet: &mut Packet, ip_offset: usize) -> Result<Kind, Undecodable> {
    let Some(ip) = frame.view::<{ Ipv6Hdr::LEN }>(ip_offset) else {
        return Err(Undecodable::NotTransport(Reason::NotIp));
    };
    let at = offset_of!(Ipv6Hdr, src_addr);
    packet.key.source = Address([ip.u32(at), ip.u32(at + 4), ip.u32(at + 8), ip.u32(at + 12)]);
    let at = offset_of!(Ipv6Hdr, dst_addr);
    packet.key.destination = Address([ip.u32(at), ip.u32(at + 4), ip.u32(at + 8), ip.u32(at + 12)]);
    // A mapped address stands for an IPv4 one here, and has no place on the wire (RFC 4291 section 2.5.5.2).
    if packet.key.destination.is_v4() {
        return Err(Undecodable::NotTransport(Reason::NotForService));
    }
    let malformed = |reason| Err(Undecodable::Malformed(reason));
    let first_word = u32::from_be(ip.u32(0));
    if first_word >> 28 != 6 {
        return malformed(Reason::BadIpVersion);
    }
    let payload_length = match (
        u16::from_be(ip.u16(offset_of!(Ipv6Hdr, payload_len))),
        frame.length_in_stack(),
    ) {
        (0, Some(length)) => length - ip_offset - Ipv6Hdr::LEN,
        (payload_length, _) => payload_length as usize,
    };
    let end = ip_offset + Ipv6Hdr::LEN + payload_length;
    if !frame.reaches(end) {
        return malformed(Reason::BadIpLength);
    }
    packet.ip_offset = ip_offset as u32;
    packet.end = end as u32;
    packet.ttl = ip.u8(offset_of!(Ipv6Hdr, hop_limit));
    packet.traffic_class = (first_word >> 20) as u8;
    packet.is_v6 = 1;
    packet.dont_fragment = 1;
    packet.identification = 0;
    packet.fragment = Fragment::Whole as u8;
    if frame.length_in_stack().is_none()
        && (!may_be_source_v6(&packet.key.source) || packet.key.source.0 == packet.key.destination.0)
    {
        return malformed(Reason::BadSourceAddress);
    }

    let next = ip.u8(offset_of!(Ipv6Hdr, next_hdr));
    let offset = ip_offset + Ipv6Hdr::LEN;
    if next == TCP || next == UDP {
        return decode_transport(frame, packet, next, offset, 0);
    }
    uncode(frame.extensions(packet, next, offset))
}

/// Decodes what follows an IPv6 header, if it is not what most packets have: a header of the type `next` and at the offset.
/// Gives the result as a number, see [`uncode`].
#[inline(always)]
pub fn decode_extensions<F: Frame>(frame: &F, packet: &mut Packet, next: u8, offset: usize) -> u32 {
    code(try_decode_extensions(frame, packet, next, offset))
}

#[inline(always)]
fn try_decode_extensions<F: Frame>(
    frame: &F,
    packet: &mut Packet,
    mut next: u8,
    mut offset: usize,
) -> Result<Kind, Undecodable> {
    let malformed = |reason| Err(Undecodable::Malformed(reason));
    let mut fragment_offset = 0;
    for _ in 0..MAX_EXTENSION_HEADERS {
        if !is_extension(next) {
            break;
        }
        let Some(header) = frame.view::<8>(offset) else {
            return malformed(Reason::BadExtensionHeader);
        };
        if next == extension::FRAGMENT {
            if packet.fragment != Fragment::Whole as u8 || fragment_offset != 0 {
                return malformed(Reason::BadFragment);
            }
            let word = header.u16(2);
            fragment_offset = u16::from_be(word & extension::FRAGMENT_OFFSET) as usize;
            packet.identification = header.u32(4);
            packet.fragment = if fragment_offset != 0 {
                Fragment::Later as u8
            } else if word & MORE_FRAGMENTS_V6 != 0 {
                Fragment::First as u8
            } else {
                // An atomic fragment (RFC 6946) is a whole packet.
                Fragment::Whole as u8
            };
            offset += extension::FRAGMENT_LEN;
        } else if next == extension::AUTHENTICATION {
            offset += (header.u8(1) as usize + 2) * 4;
        } else {
            // A destination that is not the last one is no VIP's (RFC 8200 section 4.4); type 0 is dead (RFC 5095).
            if next == extension::ROUTING && header.u8(3) != 0 {
                return malformed(Reason::BadExtensionHeader);
            }
            offset += (header.u8(1) as usize + 1) * 8;
        }
        next = header.u8(0);
        if packet.fragment == Fragment::Later as u8 {
            break;
        }
    }
    if offset > packet.end as usize {
        return malformed(Reason::BadExtensionHeader);
    }
    if is_extension(next) && packet.fragment != Fragment::Later as u8 {
        return malformed(Reason::BadExtensionHeader);
    }
    if next != TCP && next != UDP && next != ICMPV6 {
        return Err(Undecodable::NotTransport(Reason::NotForService));
    }
    decode_transport(frame, packet, next, offset, fragment_offset)
}

#[inline(always)]
const fn is_extension(next: u8) -> bool {
    next == extension::HOP_BY_HOP
        || next == extension::ROUTING
        || next == extension::FRAGMENT
        || next == extension::AUTHENTICATION
        || next == extension::DESTINATION_OPTIONS
}

/// What follows the IP headers; `fragment_offset` is in bytes.
#[inline(always)]
fn decode_transport<F: Frame>(
    frame: &F,
    packet: &mut Packet,
    protocol: u8,
    offset: usize,
    fragment_offset: usize,
) -> Result<Kind, Undecodable> {
    let malformed = |reason| Err(Undecodable::Malformed(reason));
    let length = packet.end as usize - offset;
    packet.transport_offset = offset as u32;
    packet.key.protocol = protocol as u32;
    packet.key.source_port = 0;
    packet.key.destination_port = 0;
    packet.tcp_flags = 0;
    if protocol != TCP && protocol != UDP {
        // Fragments of ICMP are the host's business.
        if packet.fragment != Fragment::Whole as u8 {
            return Err(Undecodable::NotTransport(Reason::NotForService));
        }
        return Ok(Kind::Icmp);
    }
    if packet.fragment == Fragment::Later as u8 {
        // The last byte of a datagram has a place too (ping of death); and a part that would overwrite the flags of
        // the first is made to deceive filters (RFC 3128).
        if fragment_offset + length > u16::MAX as usize || (protocol == TCP && fragment_offset < TcpHdr::LEN)
        {
            return malformed(Reason::BadFragment);
        }
        return Ok(Kind::LaterFragment);
    }
    let whole = packet.fragment == Fragment::Whole as u8;
    let (ports, tcp_flags) = if protocol == TCP {
        match decode_tcp(frame, offset, length) {
            Ok(decoded) => decoded,
            Err(reason) => return malformed(reason),
        }
    } else {
        match decode_udp(frame, offset, length, whole) {
            Ok(ports) => (ports, 0),
            Err(reason) => return malformed(reason),
        }
    };
    if ports.0 == 0 || ports.1 == 0 {
        return malformed(Reason::ZeroPort);
    }
    packet.key.source_port = ports.0;
    packet.key.destination_port = ports.1;
    packet.tcp_flags = tcp_flags;
    Ok(Kind::Transport)
}

const NOT_TRANSPORT: u32 = 1 << 16;
const MALFORMED: u32 = 1 << 17;

/// A result as one number: a function of the kernel's own returns no more than a register.
#[inline(always)]
const fn code(result: Result<Kind, Undecodable>) -> u32 {
    match result {
        Ok(kind) => kind as u32,
        Err(Undecodable::NotTransport(reason)) => NOT_TRANSPORT | reason.index(),
        Err(Undecodable::Malformed(reason)) => MALFORMED | reason.index(),
    }
}

/// The result that [`code`] made a number of.
#[inline(always)]
const fn uncode(code: u32) -> Result<Kind, Undecodable> {
    if code & NOT_TRANSPORT != 0 {
        return Err(Undecodable::NotTransport(Reason::from_index(code & 0xffff)));
    }
    if code & MALFORMED != 0 {
        return Err(Undecodable::Malformed(Reason::from_index(code & 0xffff)));
    }
    match code {
        0 => Ok(Kind::Transport),
        1 => Ok(Kind::LaterFragment),
        _ => Ok(Kind::Icmp),
    }
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

/// Ports of a UDP header in network byte order. The first fragment of a datagram is shorter than it says.
#[inline(always)]
fn decode_udp<F: Frame>(frame: &F, offset: usize, length: usize, whole: bool) -> Result<(u16, u16), Reason> {
    if length < UdpHdr::LEN {
        return Err(Reason::TruncatedTransport);
    }
    let udp = frame
        .view::<{ UdpHdr::LEN }>(offset)
        .ok_or(Reason::TruncatedTransport)?;
    let udp_length = u16::from_be(udp.u16(offset_of!(UdpHdr, len))) as usize;
    if udp_length < UdpHdr::LEN || (whole && udp_length > length) {
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

/// Tells whether a host may use an IPv6 address as its source: not unspecified, the loopback's, multicast or mapped
/// (RFC 4291 sections 2.5.2, 2.5.3, 2.7 and 2.5.5.2).
#[inline(always)]
const fn may_be_source_v6(address: &Address) -> bool {
    let [a, b, c, d] = &address.0;
    let low = u32::from_be(*d) <= 1 && *a == 0 && *b == 0 && *c == 0;
    !low && u32::from_be(*a) >> 24 != 0xff && !address.is_v4()
}

impl Frame for &[u8] {
    type View = SliceView;

    fn reaches(&self, end: usize) -> bool {
        end <= self.len()
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

#[cfg(test)]
mod tests {
    use core::net::Ipv4Addr;
    use std::vec::Vec;

    use proptest::{collection::vec, prelude::*};
    use zerocopy::IntoBytes;

    use super::*;

    /// A TCP segment with its ACK from 198.51.100.7:5000 to 203.0.113.10:80, checksums left out.
    const ACK: [u8; 54] = [
        2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00, // Ethernet
        0x45, 0, 0, 40, 0x12, 0x34, 0, 0, 64, 6, 0, 0, 198, 51, 100, 7, 203, 0, 113, 10, // IP
        0x13, 0x88, 0, 80, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0, // TCP
    ];
    /// A UDP datagram without payload, in between the same.
    const DATAGRAM: [u8; 42] = [
        2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00, // Ethernet
        0x45, 0, 0, 28, 0x12, 0x34, 0, 0, 64, 17, 0, 0, 198, 51, 100, 7, 203, 0, 113, 10, // IP
        0x13, 0x88, 0, 80, 0, 8, 0, 0, // UDP
    ];

    /// [`ACK`] over IPv6, from 2001:db8::7 to 2001:db8::10.
    const ACK_V6: [u8; 74] = [
        2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x86, 0xdd, // Ethernet
        0x6b, 0x80, 0, 9, 0, 20, 6, 64, // IP
        0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, // from
        0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, // to
        0x13, 0x88, 0, 80, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0, // TCP
    ];
    /// Two VLAN tags with what follows the MAC addresses.
    const TAGS: [u8; 8] = [0x88, 0xa8, 0x20, 0x64, 0x81, 0, 0, 7];

    /// A frame with VLAN tags.
    fn tagged(frame: &[u8], tags: usize) -> Vec<u8> {
        [&frame[..12], &TAGS[8 - 4 * tags..], &frame[12..]].concat()
    }

    /// An IPv6 frame with an extension header before what follows its IP header.
    fn extended(frame: &[u8], number: u8, header: &[u8]) -> Vec<u8> {
        let mut frame = frame.to_vec();
        let mut header = header.to_vec();
        header[0] = frame[20];
        frame[20] = number;
        let length = u16::from_be_bytes([frame[18], frame[19]]) + header.len() as u16;
        frame[18..20].copy_from_slice(&length.to_be_bytes());
        frame.splice(54..54, header);
        frame
    }

    fn packet_v6() -> Packet {
        let ip = |last| core::net::IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, last]);
        Packet {
            key: FlowKey {
                source: ip(7).into(),
                destination: ip(0x10).into(),
                ..packet(TCP, 0x10).key
            },
            identification: 0,
            transport_offset: 54,
            end: 74,
            traffic_class: 0xb8,
            is_v6: 1,
            dont_fragment: 1,
            ..packet(TCP, 0x10)
        }
    }

    #[test]
    fn a_segment_over_ipv6_is_decoded_whole() {
        assert_eq!(decoded(&ACK_V6), Ok((Kind::Transport, packet_v6())));
    }

    #[test]
    fn tags_move_the_ip_header_and_are_kept() {
        for tags in 1..=2 {
            for (frame, expected) in [(&ACK[..], packet(TCP, 0x10)), (&ACK_V6, packet_v6())] {
                let moved = 4 * tags as u32;
                let words = [Tags::tag(0x88a8, 0x2064), Tags::tag(0x8100, 7), 0];
                let expected = Packet {
                    tags: Tags([words[2 - tags], words[3 - tags]]),
                    ip_offset: expected.ip_offset + moved,
                    transport_offset: expected.transport_offset + moved,
                    end: expected.end + moved,
                    ..expected
                };
                assert_eq!(decoded(&tagged(frame, tags)), Ok((Kind::Transport, expected)));
            }
        }
        let three = tagged(&tagged(&ACK, 2), 1);
        assert_eq!(reason_of(&three), Reason::NotIp);
    }

    #[test]
    fn extension_headers_move_the_transport_header() {
        for (number, header) in [
            (extension::HOP_BY_HOP, &[0, 0, 1, 4, 0, 0, 0, 0][..]),
            (
                extension::DESTINATION_OPTIONS,
                &[0, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            ),
            (extension::ROUTING, &[0, 0, 4, 0, 0, 0, 0, 0]),
            (extension::AUTHENTICATION, &[0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]),
        ] {
            let frame = extended(&ACK_V6, number, header);
            let moved = header.len() as u32;
            let expected = Packet {
                transport_offset: 54 + moved,
                end: 74 + moved,
                ..packet_v6()
            };
            assert_eq!(decoded(&frame), Ok((Kind::Transport, expected)), "{number}");
        }
    }

    #[test]
    fn fragments_of_both_families_are_told_from_whole_packets() {
        let v6 = |high, low| extended(&ACK_V6, extension::FRAGMENT, &[0, 0, high, low, 1, 2, 3, 4]);
        let first = decoded(&v6(0, 1)).unwrap();
        assert_eq!(first.0, Kind::Transport);
        assert_eq!(first.1.fragment, Fragment::First as u8);
        assert_eq!(first.1.identification.to_ne_bytes(), [1, 2, 3, 4]);
        let atomic = decoded(&v6(0, 0)).unwrap();
        assert_eq!(
            (atomic.0, atomic.1.fragment),
            (Kind::Transport, Fragment::Whole as u8)
        );
        let later = decoded(&v6(0x05, 0xa9)).unwrap();
        assert_eq!(
            (later.0, later.1.fragment),
            (Kind::LaterFragment, Fragment::Later as u8)
        );
        assert_eq!((later.1.key.source_port, later.1.key.destination_port), (0, 0));
        assert_eq!(reason_of(&v6(0, 0x11)), Reason::BadFragment);
        assert_eq!(reason_of(&v6(0xff, 0xf8)), Reason::BadFragment);

        let first = decoded(&changed(ACK, &[(20, 0x20)])).unwrap();
        assert_eq!(
            (first.0, first.1.fragment),
            (Kind::Transport, Fragment::First as u8)
        );
        let later = decoded(&changed(ACK, &[(21, 0xb9)])).unwrap();
        assert_eq!(
            (later.0, later.1.fragment),
            (Kind::LaterFragment, Fragment::Later as u8)
        );
    }

    /// What a frame is decoded to.
    fn decoded(bytes: &[u8]) -> Result<(Kind, Packet), Undecodable> {
        let mut packet = Packet::default();
        decode(&bytes, &mut packet).map(|kind| (kind, packet))
    }

    fn packet(protocol: u8, tcp_flags: u8) -> Packet {
        Packet {
            link: Link::new([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]),
            identification: u32::from(u16::from_ne_bytes([0x12, 0x34])),
            end: if protocol == TCP { 54 } else { 42 },
            key: FlowKey {
                source: Ipv4Addr::new(198, 51, 100, 7).into(),
                destination: Ipv4Addr::new(203, 0, 113, 10).into(),
                source_port: 5000_u16.to_be(),
                destination_port: 80_u16.to_be(),
                protocol: u32::from(protocol),
            },
            ip_offset: 14,
            transport_offset: 34,
            tcp_flags,
            ttl: 64,
            ..Packet::default()
        }
    }

    fn reason_of(bytes: &[u8]) -> Reason {
        match decoded(bytes) {
            Err(Undecodable::NotTransport(reason) | Undecodable::Malformed(reason)) => reason,
            Ok(packet) => panic!("{packet:?}"),
        }
    }

    /// A packet of the host's own stack, whose bytes are the first of `length`.
    struct OfStack<'a> {
        bytes: &'a [u8],
        length: usize,
    }

    impl<'a> Frame for OfStack<'a> {
        type View = <&'a [u8] as Frame>::View;

        fn reaches(&self, end: usize) -> bool {
            end <= self.length
        }

        fn view<const N: usize>(&self, offset: usize) -> Option<Self::View> {
            self.bytes.view::<N>(offset)
        }

        fn length_in_stack(&self) -> Option<usize> {
            Some(self.length)
        }
    }

    #[test]
    fn what_the_hosts_own_stack_handles_may_be_longer_than_a_header_can_tell_and_come_from_its_own_address() {
        // No total length, and the destination as the source.
        let v4 = changed(ACK, &[(16, 0), (17, 0), (26, 203), (27, 0), (28, 113), (29, 10)]);
        let mut v6 = [0; 74];
        v6[12..21].copy_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 6]);
        (v6[37], v6[53]) = (1, 1);
        v6[54..].copy_from_slice(&ACK[34..]);
        for (bytes, length) in [(&v4[..], 100_000), (&v6[..], 200_000)] {
            let mut packet = Packet::default();
            let kind = decode(&OfStack { bytes, length }, &mut packet);
            assert_eq!(kind, Ok(Kind::Transport));
            assert_eq!(packet.end as usize, length);
            assert_eq!(packet.key.source, packet.key.destination);
            assert!(
                matches!(decoded(bytes), Err(Undecodable::Malformed(_))),
                "from the network"
            );
        }
    }

    fn changed<const N: usize>(frame: [u8; N], changes: &[(usize, u8)]) -> [u8; N] {
        let mut frame = frame;
        for (at, value) in changes {
            frame[*at] = *value;
        }
        frame
    }

    #[test]
    fn a_tcp_segment_is_decoded_whole() {
        assert_eq!(decoded(&ACK), Ok((Kind::Transport, packet(TCP, 0x10))));
    }

    #[test]
    fn a_udp_datagram_is_decoded_whole() {
        assert_eq!(decoded(&DATAGRAM), Ok((Kind::Transport, packet(UDP, 0))));
    }

    #[test]
    fn a_frame_for_a_group_of_hosts_is_for_no_service() {
        for group in [[0xff; 6], [0x01, 0, 0x5e, 1, 2, 3], [0x03, 0xbf, 0, 0, 0, 1]] {
            let mut frame = ACK;
            frame[..6].copy_from_slice(&group);
            let expected = Err(Undecodable::NotTransport(Reason::NotForService));
            assert_eq!(decoded(&frame), expected, "{group:?}");
        }
    }

    #[test]
    fn options_move_the_transport_header() {
        let mut frame = ACK[..34].to_vec();
        frame.extend_from_slice(&[1; 40]);
        frame.extend_from_slice(&ACK[34..]);
        frame[14] = 0x4f;
        frame[17] = 80;
        let expected = Packet {
            transport_offset: 74,
            end: 94,
            ..packet(TCP, 0x10)
        };
        assert_eq!(decoded(&frame), Ok((Kind::Transport, expected)));
    }

    #[test]
    fn each_way_to_be_malformed_has_its_reason() {
        for (changes, reason) in [
            (&[(14, 0x65)][..], Reason::BadIpVersion),
            (&[(14, 0x44)], Reason::BadIpHeaderLength),
            (&[(14, 0x4f)], Reason::BadIpHeaderLength),
            (&[(17, 19)], Reason::BadIpLength),
            (&[(17, 41)], Reason::BadIpLength),
            (&[(26, 0)], Reason::BadSourceAddress),
            (&[(26, 127)], Reason::BadSourceAddress),
            (&[(26, 224)], Reason::BadSourceAddress),
            (&[(26, 255)], Reason::BadSourceAddress),
            (
                &[(26, 203), (27, 0), (28, 113), (29, 10)],
                Reason::BadSourceAddress,
            ),
            (&[(21, 0x01)], Reason::BadFragment),
            (&[(21, 0x02)], Reason::BadFragment),
            (&[(20, 0x1f), (21, 0xff)], Reason::BadFragment),
            (&[(17, 39)], Reason::TruncatedTransport),
            (&[(46, 0x40)], Reason::BadTcpOffset),
            (&[(46, 0x60)], Reason::BadTcpOffset),
            (&[(47, 0x00)], Reason::BadTcpFlags),
            (&[(34, 0), (35, 0)], Reason::ZeroPort),
            (&[(37, 0)], Reason::ZeroPort),
        ] {
            let frame = changed(ACK, changes);
            assert_eq!(
                decoded(&frame),
                Err(Undecodable::Malformed(reason)),
                "{changes:x?}"
            );
        }
        for (changes, reason) in [
            (&[(17, 27)][..], Reason::TruncatedTransport),
            (&[(39, 7)], Reason::BadUdpLength),
            (&[(39, 9)], Reason::BadUdpLength),
            (&[(38, 0xff)], Reason::BadUdpLength),
        ] {
            assert_eq!(reason_of(&changed(DATAGRAM, changes)), reason, "{changes:x?}");
        }
    }

    #[test]
    fn what_is_not_ip_is_told_from_what_is_not_transport() {
        assert_eq!(reason_of(&changed(ACK, &[(12, 0x08), (13, 0x06)])), Reason::NotIp);
        for length in 0..34 {
            assert_eq!(reason_of(&ACK[..length]), Reason::NotIp, "{length} bytes");
        }
        for protocol in (0..=u8::MAX).filter(|protocol| ![TCP, UDP, ICMP].contains(protocol)) {
            let frame = changed(ACK, &[(23, protocol)]);
            assert_eq!(
                decoded(&frame),
                Err(Undecodable::NotTransport(Reason::NotForService))
            );
        }
    }

    #[test]
    fn flags_of_ip_that_are_no_fragments_are_let_be() {
        for flags in [0x40, 0x80, 0xc0] {
            assert!(decoded(&changed(ACK, &[(20, flags)])).is_ok(), "{flags:#x}");
        }
    }

    /// Frames near to well-formed ones, cut and lengthened.
    fn frames() -> impl Strategy<Value = Vec<u8>> {
        let extension = prop_oneof![
            (0..3u8, any::<u8>()).prop_map(|(units, byte)| {
                let mut header = std::vec![byte; 8 + 8 * usize::from(units)];
                header[1] = units;
                (extension::DESTINATION_OPTIONS, header)
            }),
            any::<[u8; 8]>().prop_map(|header| (extension::FRAGMENT, header.to_vec())),
            (any::<[u8; 8]>(), 0..64u8).prop_map(|(header, number)| (number, header.to_vec())),
        ];
        let near = (
            0..3usize,
            vec(extension, 0..8),
            0..=2usize,
            vec((12..110usize, any::<u8>()), 0..4),
            0..200usize,
            any::<bool>(),
        )
            .prop_map(|(kind, extensions, tags, changes, length, resized)| {
                let mut frame = [&ACK[..], &DATAGRAM, &ACK_V6][kind].to_vec();
                if kind == 2 {
                    for (number, header) in extensions {
                        frame = extended(&frame, number, &header);
                    }
                }
                let mut frame = tagged(&frame, tags);
                for (at, value) in changes {
                    if let Some(byte) = frame.get_mut(at) {
                        *byte = value;
                    }
                }
                if resized {
                    frame.resize(length, 0);
                }
                frame
            });
        prop_oneof![vec(any::<u8>(), 0..120), near]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        #[test]
        fn no_bytes_make_it_panic_and_what_it_decodes_is_in_the_frame(frame in frames()) {
            let Ok((Kind::Transport, packet)) = decoded(&frame) else { return Ok(()) };
            let header = if packet.key.protocol == u32::from(TCP) { 20 } else { 8 };
            let (ip, at, end) = (packet.ip_offset as usize, packet.transport_offset as usize, packet.end as usize);
            prop_assert!(ip >= 14 && ip < at && at + header <= end && end <= frame.len());
            prop_assert_eq!(packet.key.source_port.to_ne_bytes(), [frame[at], frame[at + 1]]);
            prop_assert_eq!(packet.key.destination_port.to_ne_bytes(), [frame[at + 2], frame[at + 3]]);
            prop_assert_eq!(ip, 14 + 4 * packet.tags.count() as usize);
            if packet.is_v6 != 0 {
                let addresses = [packet.key.source, packet.key.destination];
                prop_assert_eq!(addresses.as_bytes(), &frame[ip + 8..ip + 40]);
                prop_assert_eq!(packet.ttl, frame[ip + 7]);
            } else {
                prop_assert_eq!(&packet.key.source.v4_word().to_ne_bytes()[..], &frame[ip + 12..ip + 16]);
                prop_assert_eq!(&packet.key.destination.v4_word().to_ne_bytes()[..], &frame[ip + 16..ip + 20]);
                prop_assert_eq!(packet.ttl, frame[ip + 8]);
            }
            prop_assert_eq!(packet.key.source.is_v4(), packet.is_v6 == 0);
            prop_assert_eq!(packet.key.destination.is_v4(), packet.is_v6 == 0);
            prop_assert_eq!(packet.tcp_flags == 0, header == 8);
            prop_assert!(packet.key.source_port != 0 && packet.key.destination_port != 0);
            prop_assert!(packet.key.source != packet.key.destination);
        }

        #[test]
        fn a_malformed_packet_names_its_destination(frame in frames()) {
            let mut packet = Packet::default();
            if let Err(Undecodable::Malformed(reason)) = decode(&&frame[..], &mut packet) {
                let ip = 14 + 4 * packet.tags.count() as usize;
                if frame[ip - 2..ip] == [0x08, 0x00] {
                    prop_assert_eq!(&packet.key.destination.v4_word().to_ne_bytes()[..], &frame[ip + 16..ip + 20]);
                } else {
                    prop_assert_eq!(packet.key.destination.as_bytes(), &frame[ip + 24..ip + 40]);
                }
                prop_assert_eq!(reason.class(), crate::abi::VerdictClass::Dropped);
            }
        }

        #[test]
        fn what_follows_the_packet_in_its_frame_makes_no_difference(frame in frames(), trailer in vec(any::<u8>(), 0..40)) {
            if let Ok(decoded_frame) = decoded(&frame) {
                let longer = [&frame[..], &trailer].concat();
                prop_assert_eq!(decoded(&longer), Ok(decoded_frame));
            }
        }
    }
}
