//! `ipip` (RFC 2003, RFC 2473, RFC 4213) and `gue`, variant 1: the packet travels in another one, as it is.

use lb_common::{
    abi::{Address, Backend, Forward, Reason, Settings},
    logic::{
        headers::{Frame, Packet, ethertype},
        outer::{Outer, entropy, overhead},
    },
};
use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    udp::UdpHdr,
};

use super::{nat, write_ethernet};
use crate::cursor::Cursor;

/// Tells whether a packet fits into the path to a backend with the headers that are put around it.
#[inline(always)]
pub fn fits(packet: &Packet, forward: u8, backend: &Backend) -> bool {
    let length = packet.end - packet.ip_offset + overhead(forward, backend.address.is_v4());
    backend.mtu == 0 || length <= backend.mtu
}

/// Puts a packet into another one to its backend and addresses the frame to the next hop.
///
/// # Errors
/// Why it could not.
#[inline(always)]
pub fn wrap(
    frame: Cursor,
    packet: &Packet,
    settings: &Settings,
    forward: u8,
    backend: &Backend,
) -> Result<Cursor, Reason> {
    let is_gue = forward == Forward::Gue.number();
    if is_gue && backend.source.0 == Address::default().0 {
        return Err(Reason::NoSourceAddress);
    }
    nat::hop(&frame, packet).ok_or(Reason::Internal)?;

    let outer_v4 = backend.address.is_v4();
    let headers = overhead(forward, outer_v4);
    let tags = backend.tags.count() as i32 - packet.tags.count() as i32;
    let frame = frame
        .with_more_in_front(headers as i32 + tags * 4)
        .ok_or(Reason::NoHeadroom)?;

    let ether_type = if outer_v4 {
        ethertype::IPV4
    } else {
        ethertype::IPV6
    };
    let ip_offset =
        write_ethernet(&frame, &backend.link, &backend.tags, ether_type).ok_or(Reason::Internal)?;
    let entropy = entropy(&packet.key);
    let mut outer = Outer {
        inner: packet,
        is_gue,
        source: backend.source.by_words(),
        destination: backend.address.by_words(),
        entropy,
    };
    let transport_offset = if outer_v4 {
        if !is_gue {
            let varying = entropy & settings.ipip_varying_v4;
            outer.source.0[3] = settings.ipip_source_v4.v4_word() | varying;
        }
        let ip = frame
            .view::<{ Ipv4Hdr::LEN }>(ip_offset)
            .ok_or(Reason::Internal)?;
        let words = outer.ipv4();
        ip.set_u32(0, words[0]);
        ip.set_u32(4, words[1]);
        ip.set_u32(8, words[2]);
        ip.set_u32(12, words[3]);
        ip.set_u32(16, words[4]);
        ip_offset + Ipv4Hdr::LEN
    } else {
        if !is_gue {
            outer.source = settings.ipip_source_v6.by_words();
            outer.source.0[3] |= entropy & settings.ipip_varying_v6;
        }
        let ip = frame
            .view::<{ Ipv6Hdr::LEN }>(ip_offset)
            .ok_or(Reason::Internal)?;
        let words = outer.ipv6();
        ip.set_u32(0, words[0]);
        ip.set_u32(4, words[1]);
        ip.set_u32(8, words[2]);
        ip.set_u32(12, words[3]);
        ip.set_u32(16, words[4]);
        ip.set_u32(20, words[5]);
        ip.set_u32(24, words[6]);
        ip.set_u32(28, words[7]);
        ip.set_u32(32, words[8]);
        ip.set_u32(36, words[9]);
        ip_offset + Ipv6Hdr::LEN
    };
    if is_gue {
        let udp = frame
            .view::<{ UdpHdr::LEN }>(transport_offset)
            .ok_or(Reason::Internal)?;
        let words = outer.udp();
        udp.set_u32(0, words[0]);
        udp.set_u32(4, words[1]);
    }
    Ok(frame)
}
