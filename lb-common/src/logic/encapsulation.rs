//! Decoding of `ipip` and `gue`: what `xlb decap` does with a frame, decided once for the kernel and the tests.
//!
//! Encapsulated is: IP protocol 4 and 41 over either family (RFC 2003, RFC 2473, RFC 4213), and UDP to port 6080 with
//! GUE (draft-ietf-intarea-gue-09) of variant 1, whose header is the inner IP header, or of variant 0 without options.

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    udp::UdpHdr,
};

use super::{
    checksum,
    headers::{Frame, TAG_LEN, View, ethertype},
};
use crate::abi::{Address, DecapReason, GUE_PORT, IPV4_IN_IP, IPV6_IN_IP, UDP};

/// What is known of addresses, in maps or in a test.
pub trait Known {
    /// Tells whether the host has an address.
    fn is_own(&self, address: &Address) -> bool;
    /// Tells whether packets from an outer source may be unwrapped.
    fn is_source(&self, address: &Address) -> bool;
    /// Tells whether an inner destination is a VIP.
    fn is_vip(&self, address: &Address) -> bool;
}

/// What shall become of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The outer headers go and the host gets what is inside.
    Unwrap(Unwrapping),
    /// The host gets the frame as it came.
    Pass(DecapReason),
    /// Nobody gets it: malformed, and for a VIP.
    Drop(DecapReason),
}

/// How a frame is unwrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unwrapping {
    /// [`DecapReason::Ipip`] or [`DecapReason::Gue`].
    pub reason: DecapReason,
    /// Length of the Ethernet header with its VLAN tags, in bytes: 14, 18 or 22.
    pub link_length: usize,
    /// Bytes between that and the inner IP header.
    pub outer_length: usize,
    pub inner: Family,
    /// The ECN field (RFC 3168) that the inner header has afterwards.
    pub ecn: u8,
}

/// The version of IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    /// The ethertype in network byte order.
    #[inline(always)]
    pub const fn ethertype(self) -> u16 {
        match self {
            Self::V4 => ethertype::IPV4,
            Self::V6 => ethertype::IPV6,
        }
    }

    #[inline(always)]
    fn of_protocol(protocol: u8) -> Option<Self> {
        match protocol {
            IPV4_IN_IP => Some(Self::V4),
            IPV6_IN_IP => Some(Self::V6),
            _ => None,
        }
    }
}

/// In the first byte of a MAC address: multicast or broadcast (IEEE 802, section 8.2.2).
const GROUP_BIT: u8 = 0x01;
/// "More fragments" and the offset (RFC 791 section 3.1), in network byte order.
const FRAGMENT_MASK: u16 = 0x3fff_u16.to_be();
/// IPv6 next headers: fragment and destination options (RFC 8200 sections 4.5 and 4.6).
const IPV6_FRAGMENT: u8 = 44;
const IPV6_DESTINATION_OPTIONS: u8 = 60;
/// The only extension header that is walked has one unit (RFC 8200 section 4.6).
const OPTIONS_LENGTH: usize = 8;
/// Type and length of the option "tunnel encapsulation limit" (RFC 2473 section 4.1.1), in network byte order.
const ENCAPSULATION_LIMIT: u16 = 0x0401_u16.to_be();
/// `PadN` that fills three bytes (RFC 8200 section 4.2), in network byte order.
const PAD_3: u16 = 0x0101_u16.to_be();
/// A GUE header of variant 0 without optional fields.
const GUE_LENGTH: usize = 4;

/// ECN fields (RFC 3168 section 5).
const ECN_MASK: u8 = 0b11;
const NOT_ECT: u8 = 0b00;
const ECT_1: u8 = 0b01;
const ECT_0: u8 = 0b10;
const CE: u8 = 0b11;

/// The outer headers of an encapsulated packet.
struct Outer {
    reason: DecapReason,
    source: Address,
    destination: Address,
    link_length: usize,
    /// Offset of the inner header in the frame.
    inner_offset: usize,
    inner: Family,
    /// Offset in the frame of the end of what is inside.
    end: usize,
    ecn: u8,
    /// Why the packet is malformed, to be told if it turns out to be for a VIP.
    malformed: Option<DecapReason>,
}

/// Decides about a frame.
///
/// An inner packet that is encapsulated once more is unwrapped once.
#[inline(always)]
pub fn decide<F: Frame>(frame: &F, known: &impl Known) -> Decision {
    match outer(frame) {
        Err(reason) => Decision::Pass(reason),
        Ok(outer) if !known.is_own(&outer.destination) => Decision::Pass(DecapReason::NotForThisHost),
        Ok(outer) if !known.is_source(&outer.source) => Decision::Pass(DecapReason::SourceNotAllowed),
        Ok(outer) => match outer.inner {
            Family::V4 => inner_ipv4(frame, &outer, known),
            Family::V6 => inner_ipv6(frame, &outer, known),
        },
    }
}

/// The outer headers, or why this is no encapsulated packet for a host.
#[inline(always)]
fn outer<F: Frame>(frame: &F) -> Result<Outer, DecapReason> {
    let none = DecapReason::NotEncapsulated;
    let ethernet = frame.view::<{ EthHdr::LEN }>(0).ok_or(none)?;
    let mut link_length = EthHdr::LEN;
    let mut ethertype = ethernet.u16(EthHdr::LEN - 2);
    if is_tag(ethertype) {
        link_length = EthHdr::LEN + TAG_LEN;
        ethertype = frame.view::<2>(link_length - 2).ok_or(none)?.u16(0);
        if is_tag(ethertype) {
            link_length = EthHdr::LEN + 2 * TAG_LEN;
            ethertype = frame.view::<2>(link_length - 2).ok_or(none)?.u16(0);
        }
    }
    let outer = match ethertype {
        ethertype::IPV4 => outer_ipv4(frame, link_length)?,
        ethertype::IPV6 => outer_ipv6(frame, link_length)?,
        _ => return Err(none),
    };
    // Each host of the network gets a frame for a group (RFC 1122 section 3.3.6).
    if ethernet.u8(0) & GROUP_BIT != 0 {
        return Err(DecapReason::NotForThisHost);
    }
    Ok(outer)
}

#[inline(always)]
fn is_tag(ethertype: u16) -> bool {
    ethertype == ethertype::VLAN || ethertype == ethertype::SERVICE_VLAN
}

#[inline(always)]
fn outer_ipv4<F: Frame>(frame: &F, link_length: usize) -> Result<Outer, DecapReason> {
    let none = DecapReason::NotEncapsulated;
    let ip = frame.view::<{ Ipv4Hdr::LEN }>(link_length).ok_or(none)?;
    let protocol = ip.u8(offset_of!(Ipv4Hdr, proto));
    let vihl = ip.u8(offset_of!(Ipv4Hdr, vihl));
    let header_length = ((vihl & 0x0f) as usize) * 4;
    if vihl >> 4 != 4 || header_length < Ipv4Hdr::LEN || !may_encapsulate(protocol) {
        return Err(none);
    }
    if ip.u16(offset_of!(Ipv4Hdr, frags)) & FRAGMENT_MASK != 0 {
        return Err(DecapReason::OuterFragment);
    }
    let total_length = u16::from_be(ip.u16(offset_of!(Ipv4Hdr, tot_len))) as usize;
    let end = link_length + total_length;
    let tunnel = Tunnel {
        source: Address::from_v4_word(ip.u32(offset_of!(Ipv4Hdr, src_addr))),
        destination: Address::from_v4_word(ip.u32(offset_of!(Ipv4Hdr, dst_addr))),
        link_length,
        end,
        ecn: ip.u8(offset_of!(Ipv4Hdr, tos)) & ECN_MASK,
        is_short: total_length < header_length || !frame.reaches(end),
    };
    payload(frame, &tunnel, link_length + header_length, protocol)
}

#[inline(always)]
fn outer_ipv6<F: Frame>(frame: &F, link_length: usize) -> Result<Outer, DecapReason> {
    let none = DecapReason::NotEncapsulated;
    let ip = frame.view::<{ Ipv6Hdr::LEN }>(link_length).ok_or(none)?;
    if ip.u8(0) >> 4 != 6 {
        return Err(none);
    }
    let mut protocol = ip.u8(offset_of!(Ipv6Hdr, next_hdr));
    let mut offset = link_length + Ipv6Hdr::LEN;
    if protocol == IPV6_FRAGMENT {
        return Err(DecapReason::OuterFragment);
    }
    if protocol == IPV6_DESTINATION_OPTIONS {
        let options = frame.view::<OPTIONS_LENGTH>(offset).ok_or(none)?;
        protocol = options.u8(0);
        if !may_encapsulate(protocol) {
            return Err(none);
        }
        // As Linux writes it (`init_tel_txopt` in net/ipv6/ip6_tunnel.c), or with its two options swapped.
        let pair = (options.u16(2), options.u16(5));
        if options.u8(1) != 0 || pair != (ENCAPSULATION_LIMIT, PAD_3) && pair != (PAD_3, ENCAPSULATION_LIMIT)
        {
            return Err(DecapReason::OuterOptions);
        }
        offset += OPTIONS_LENGTH;
    } else if !may_encapsulate(protocol) {
        return Err(none);
    }
    let payload_length = u16::from_be(ip.u16(offset_of!(Ipv6Hdr, payload_len))) as usize;
    let end = link_length + Ipv6Hdr::LEN + payload_length;
    let tunnel = Tunnel {
        source: address(&ip, offset_of!(Ipv6Hdr, src_addr)),
        destination: address(&ip, offset_of!(Ipv6Hdr, dst_addr)),
        link_length,
        end,
        ecn: traffic_class_ecn(ip.u8(1)),
        is_short: end < offset || !frame.reaches(end),
    };
    // Such addresses are on no wire; here they are what an IPv4 header has.
    if tunnel.source.is_v4() {
        return Err(DecapReason::SourceNotAllowed);
    }
    if tunnel.destination.is_v4() {
        return Err(DecapReason::NotForThisHost);
    }
    payload(frame, &tunnel, offset, protocol)
}

#[inline(always)]
fn may_encapsulate(protocol: u8) -> bool {
    protocol == IPV4_IN_IP || protocol == IPV6_IN_IP || protocol == UDP
}

/// What the outer IP header says.
struct Tunnel {
    source: Address,
    destination: Address,
    link_length: usize,
    /// Offset in the frame of the packet's end.
    end: usize,
    ecn: u8,
    /// The length in the header is wrong.
    is_short: bool,
}

/// From the outer IP header to the inner one, through UDP and GUE where they are between.
#[inline(always)]
fn payload<F: Frame>(frame: &F, tunnel: &Tunnel, offset: usize, protocol: u8) -> Result<Outer, DecapReason> {
    let (reason, inner_offset, inner, end, udp_is_short) = match Family::of_protocol(protocol) {
        Some(inner) => (DecapReason::Ipip, offset, inner, tunnel.end, false),
        None => {
            let none = DecapReason::NotEncapsulated;
            let udp = frame.view::<{ UdpHdr::LEN }>(offset).ok_or(none)?;
            if udp.u16(offset_of!(UdpHdr, dst)) != GUE_PORT.to_be() {
                return Err(none);
            }
            let length = u16::from_be(udp.u16(offset_of!(UdpHdr, len))) as usize;
            let end = offset + length;
            let (inner_offset, inner) = gue(frame, offset + UdpHdr::LEN)?;
            (
                DecapReason::Gue,
                inner_offset,
                inner,
                end,
                length < UdpHdr::LEN || end > tunnel.end,
            )
        }
    };
    Ok(Outer {
        reason,
        source: tunnel.source.by_words(),
        destination: tunnel.destination.by_words(),
        link_length: tunnel.link_length,
        inner_offset,
        inner,
        end,
        ecn: tunnel.ecn,
        malformed: if tunnel.is_short {
            Some(DecapReason::BadOuterLength)
        } else if udp_is_short {
            Some(DecapReason::BadOuterUdpLength)
        } else {
            None
        },
    })
}

/// Offset and family of what is in GUE.
#[inline(always)]
fn gue<F: Frame>(frame: &F, offset: usize) -> Result<(usize, Family), DecapReason> {
    let gue = frame.view::<GUE_LENGTH>(offset).ok_or(DecapReason::Truncated)?;
    match gue.u8(0) >> 4 {
        // Variant 1 (section 4): the two bits of the variant are the first of the inner packet's version.
        4 => return Ok((offset, Family::V4)),
        6 => return Ok((offset, Family::V6)),
        _ => {}
    }
    // Variant 0 (section 3.1), no control message, no optional fields, and so no flags for them.
    if gue.u8(0) != 0 || gue.u16(2) != 0 {
        return Err(DecapReason::GueHeader);
    }
    let inner = Family::of_protocol(gue.u8(1)).ok_or(DecapReason::GueHeader)?;
    Ok((offset + GUE_LENGTH, inner))
}

#[inline(always)]
fn inner_ipv4<F: Frame>(frame: &F, outer: &Outer, known: &impl Known) -> Decision {
    let header = match outer.malformed {
        None if outer.inner_offset + Ipv4Hdr::LEN > outer.end => None,
        _ => frame.view::<{ Ipv4Hdr::LEN }>(outer.inner_offset),
    };
    let Some(ip) = header else {
        return Decision::Pass(DecapReason::Truncated);
    };
    if !known.is_vip(&Address::from_v4_word(ip.u32(offset_of!(Ipv4Hdr, dst_addr)))) {
        return Decision::Pass(DecapReason::NotForVip);
    }
    if let Some(reason) = outer.malformed {
        return Decision::Drop(reason);
    }
    let vihl = ip.u8(offset_of!(Ipv4Hdr, vihl));
    if vihl >> 4 != 4 {
        return Decision::Drop(DecapReason::BadInnerVersion);
    }
    let header_length = ((vihl & 0x0f) as usize) * 4;
    if header_length < Ipv4Hdr::LEN || outer.inner_offset + header_length > outer.end {
        return Decision::Drop(DecapReason::BadInnerHeaderLength);
    }
    let total_length = u16::from_be(ip.u16(offset_of!(Ipv4Hdr, tot_len))) as usize;
    if total_length < header_length || outer.inner_offset + total_length > outer.end {
        return Decision::Drop(DecapReason::BadInnerLength);
    }
    unwrap(outer, ip.u8(offset_of!(Ipv4Hdr, tos)) & ECN_MASK)
}

#[inline(always)]
fn inner_ipv6<F: Frame>(frame: &F, outer: &Outer, known: &impl Known) -> Decision {
    let header = match outer.malformed {
        None if outer.inner_offset + Ipv6Hdr::LEN > outer.end => None,
        _ => frame.view::<{ Ipv6Hdr::LEN }>(outer.inner_offset),
    };
    let Some(ip) = header else {
        return Decision::Pass(DecapReason::Truncated);
    };
    let destination = address(&ip, offset_of!(Ipv6Hdr, dst_addr));
    // An IPv4 VIP is no destination of IPv6.
    if destination.is_v4() || !known.is_vip(&destination) {
        return Decision::Pass(DecapReason::NotForVip);
    }
    if let Some(reason) = outer.malformed {
        return Decision::Drop(reason);
    }
    if ip.u8(0) >> 4 != 6 {
        return Decision::Drop(DecapReason::BadInnerVersion);
    }
    let payload_length = u16::from_be(ip.u16(offset_of!(Ipv6Hdr, payload_len))) as usize;
    if outer.inner_offset + Ipv6Hdr::LEN + payload_length > outer.end {
        return Decision::Drop(DecapReason::BadInnerLength);
    }
    unwrap(outer, traffic_class_ecn(ip.u8(1)))
}

#[inline(always)]
fn unwrap(outer: &Outer, ecn: u8) -> Decision {
    match ecn_unwrapped(outer.ecn, ecn) {
        Some(ecn) => Decision::Unwrap(Unwrapping {
            reason: outer.reason,
            link_length: outer.link_length,
            outer_length: outer.inner_offset - outer.link_length,
            inner: outer.inner,
            ecn,
        }),
        None => Decision::Drop(DecapReason::CongestionNotCapable),
    }
}

/// The ECN field of a packet that is unwrapped, or nothing where it has to be dropped (RFC 6040 section 4.2).
#[inline(always)]
pub const fn ecn_unwrapped(outer: u8, inner: u8) -> Option<u8> {
    if outer == CE {
        if inner == NOT_ECT { None } else { Some(CE) }
    } else if outer == ECT_1 && inner == ECT_0 {
        Some(ECT_1)
    } else {
        Some(inner)
    }
}

/// The first two bytes of an IPv4 header with this ECN field, as they lie in memory, and the header's checksum for it.
#[inline(always)]
pub const fn ipv4_with_ecn(start: u16, checksum: u16, ecn: u8) -> (u16, u16) {
    // The field ends the second byte, which is the low one of the word on the wire.
    let changed = (start & !(ECN_MASK as u16).to_be()) | (ecn as u16).to_be();
    (
        changed,
        checksum::update(checksum, checksum::difference16(start, changed)),
    )
}

/// The second byte of an IPv6 header with this ECN field.
#[inline(always)]
pub const fn ipv6_with_ecn(second: u8, ecn: u8) -> u8 {
    (second & !(ECN_MASK << 4)) | (ecn << 4)
}

/// The ECN field in the second byte of an IPv6 header: four bits of the traffic class, four of the flow label.
#[inline(always)]
const fn traffic_class_ecn(second: u8) -> u8 {
    (second >> 4) & ECN_MASK
}

#[inline(always)]
fn address(view: &impl View, at: usize) -> Address {
    Address([
        view.u32(at),
        view.u32(at + 4),
        view.u32(at + 8),
        view.u32(at + 12),
    ])
}

#[cfg(test)]
mod tests;
