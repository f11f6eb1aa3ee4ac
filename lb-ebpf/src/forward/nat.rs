//! `nat` and `full-nat`: writes another 5-tuple into a packet and keeps its checksums right.

use core::mem::offset_of;

use lb_common::{
    abi::{FlowKey, TCP},
    logic::{
        checksum::{difference_of_addresses, difference16, update, update_udp},
        headers::{Frame, Packet, View},
    },
};
use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::cursor::Cursor;

/// Gives a packet the addresses and ports of `tuple` and takes one from its time to live.
///
/// Checksums are updated, not computed: a packet that was damaged stays recognisably so (RFC 1624). Nothing where
/// the frame is shorter than it was when it was decoded, which cannot be.
#[inline(always)]
pub fn rewrite(frame: &Cursor, packet: &Packet, tuple: &FlowKey) -> Option<()> {
    let old = &packet.key;
    let addresses = difference_of_addresses(&old.source, &tuple.source)
        + difference_of_addresses(&old.destination, &tuple.destination);
    let ports = difference16(old.source_port, tuple.source_port)
        + difference16(old.destination_port, tuple.destination_port);
    rewrite_ip(frame, packet, tuple, addresses)?;

    // The pseudo header puts the addresses under the checksum of TCP and UDP too. It covers all fragments, and is in
    // the first.
    if packet.is_later_fragment() {
        return Some(());
    }
    let offset = packet.transport_offset as usize;
    if old.protocol == TCP as u32 {
        let tcp = frame.view::<{ TcpHdr::LEN }>(offset)?;
        tcp.set_u16(offset_of!(TcpHdr, source), tuple.source_port);
        tcp.set_u16(offset_of!(TcpHdr, dest), tuple.destination_port);
        tcp.set_u16(
            offset_of!(TcpHdr, check),
            update(tcp.u16(offset_of!(TcpHdr, check)), addresses + ports),
        );
    } else {
        let udp = frame.view::<{ UdpHdr::LEN }>(offset)?;
        udp.set_u16(offset_of!(UdpHdr, src), tuple.source_port);
        udp.set_u16(offset_of!(UdpHdr, dst), tuple.destination_port);
        udp.set_u16(
            offset_of!(UdpHdr, check),
            update_udp(udp.u16(offset_of!(UdpHdr, check)), addresses + ports),
        );
    }
    Some(())
}

/// Gives a packet the addresses of `tuple`, by `addresses` another sum, and takes one from its time to live.
#[inline(always)]
pub fn rewrite_ip(frame: &Cursor, packet: &Packet, tuple: &FlowKey, addresses: u32) -> Option<()> {
    let offset = packet.ip_offset as usize;
    if packet.is_v6 != 0 {
        let ip = frame.view::<{ Ipv6Hdr::LEN }>(offset)?;
        ip.set_u8(offset_of!(Ipv6Hdr, hop_limit), packet.ttl.wrapping_sub(1));
        let (source, destination) = (&tuple.source.0, &tuple.destination.0);
        let at = offset_of!(Ipv6Hdr, src_addr);
        ip.set_u32(at, source[0]);
        ip.set_u32(at + 4, source[1]);
        ip.set_u32(at + 8, source[2]);
        ip.set_u32(at + 12, source[3]);
        let at = offset_of!(Ipv6Hdr, dst_addr);
        ip.set_u32(at, destination[0]);
        ip.set_u32(at + 4, destination[1]);
        ip.set_u32(at + 8, destination[2]);
        ip.set_u32(at + 12, destination[3]);
        return Some(());
    }
    let ip = frame.view::<{ Ipv4Hdr::LEN }>(offset)?;
    let ttl_word = ip.u16(offset_of!(Ipv4Hdr, ttl));
    ip.set_u8(offset_of!(Ipv4Hdr, ttl), packet.ttl.wrapping_sub(1));
    let ttl = difference16(ttl_word, ip.u16(offset_of!(Ipv4Hdr, ttl)));
    ip.set_u16(
        offset_of!(Ipv4Hdr, check),
        update(ip.u16(offset_of!(Ipv4Hdr, check)), addresses + ttl),
    );
    ip.set_u32(offset_of!(Ipv4Hdr, src_addr), tuple.source.v4_word());
    ip.set_u32(offset_of!(Ipv4Hdr, dst_addr), tuple.destination.v4_word());
    Some(())
}

/// Takes one from a packet's time to live, and leaves all else.
#[inline(always)]
pub fn hop(frame: &Cursor, packet: &Packet) -> Option<()> {
    let offset = packet.ip_offset as usize;
    if packet.is_v6 != 0 {
        let ip = frame.view::<{ Ipv6Hdr::LEN }>(offset)?;
        ip.set_u8(offset_of!(Ipv6Hdr, hop_limit), packet.ttl.wrapping_sub(1));
        return Some(());
    }
    let ip = frame.view::<{ Ipv4Hdr::LEN }>(offset)?;
    let ttl_word = ip.u16(offset_of!(Ipv4Hdr, ttl));
    ip.set_u8(offset_of!(Ipv4Hdr, ttl), packet.ttl.wrapping_sub(1));
    let ttl = difference16(ttl_word, ip.u16(offset_of!(Ipv4Hdr, ttl)));
    ip.set_u16(
        offset_of!(Ipv4Hdr, check),
        update(ip.u16(offset_of!(Ipv4Hdr, check)), ttl),
    );
    Some(())
}
