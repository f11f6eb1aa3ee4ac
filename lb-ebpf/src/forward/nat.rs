//! `nat` and `full-nat`: writes another 5-tuple into a packet and keeps its checksums right.

use core::mem::offset_of;

use lb_common::{
    abi::{FlowKey, TCP},
    logic::{
        checksum::{difference16, difference32, update, update_udp},
        headers::{Frame, Segment, View},
    },
};
use network_types::{ip::Ipv4Hdr, tcp::TcpHdr, udp::UdpHdr};

use crate::cursor::Cursor;

/// Gives an IPv4 packet the addresses and ports of `tuple` and takes one from its time to live.
///
/// Checksums are updated, not computed: a packet that was damaged stays recognisably so (RFC 1624). Nothing where
/// the frame is shorter than it was when it was decoded, which cannot be.
#[inline(always)]
pub fn rewrite(frame: &Cursor, segment: &Segment, tuple: &FlowKey) -> Option<()> {
    let old = &segment.key;
    let addresses = difference32(old.source.v4_word(), tuple.source.v4_word())
        + difference32(old.destination.v4_word(), tuple.destination.v4_word());
    let ports = difference16(old.source_port, tuple.source_port)
        + difference16(old.destination_port, tuple.destination_port);

    let ip = frame.view::<{ Ipv4Hdr::LEN }>(segment.ip_offset)?;
    let ttl_word = ip.u16(offset_of!(Ipv4Hdr, ttl));
    ip.set_u8(offset_of!(Ipv4Hdr, ttl), segment.ttl.wrapping_sub(1));
    let ttl = difference16(ttl_word, ip.u16(offset_of!(Ipv4Hdr, ttl)));
    ip.set_u16(
        offset_of!(Ipv4Hdr, check),
        update(ip.u16(offset_of!(Ipv4Hdr, check)), addresses + ttl),
    );
    ip.set_u32(offset_of!(Ipv4Hdr, src_addr), tuple.source.v4_word());
    ip.set_u32(offset_of!(Ipv4Hdr, dst_addr), tuple.destination.v4_word());

    // The pseudo header puts the addresses under the checksum of TCP and UDP too.
    if old.protocol == TCP as u32 {
        let tcp = frame.view::<{ TcpHdr::LEN }>(segment.transport_offset)?;
        tcp.set_u16(offset_of!(TcpHdr, source), tuple.source_port);
        tcp.set_u16(offset_of!(TcpHdr, dest), tuple.destination_port);
        tcp.set_u16(
            offset_of!(TcpHdr, check),
            update(tcp.u16(offset_of!(TcpHdr, check)), addresses + ports),
        );
    } else {
        let udp = frame.view::<{ UdpHdr::LEN }>(segment.transport_offset)?;
        udp.set_u16(offset_of!(UdpHdr, src), tuple.source_port);
        udp.set_u16(offset_of!(UdpHdr, dst), tuple.destination_port);
        udp.set_u16(
            offset_of!(UdpHdr, check),
            update_udp(udp.u16(offset_of!(UdpHdr, check)), addresses + ports),
        );
    }
    Some(())
}
