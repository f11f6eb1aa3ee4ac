//! What comes in: answers of VIPs to probes become those of the backends that the probes' sockets know.

use core::mem::offset_of;

use aya_ebpf::bindings::__sk_buff;
use lb_common::{
    abi::{Address, FlowKey, ICMP, TCP, UDP},
    logic::{
        headers::{Frame, Kind, Packet, View, decode},
        icmp::{LEN, is_error},
    },
};
use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::{
    frame::{Skb, Transport},
    maps,
    program::transport,
};

/// All headers that are looked at, with those that an ICMP error quotes.
const HEADERS: u32 = 128;

/// Gives an answer the source that the probe's socket expects. Nothing where a packet of probes cannot be changed.
#[inline(always)]
pub fn take(context: *mut __sk_buff) -> Option<()> {
    let frame = Skb::with_linear(context, HEADERS);
    let mut packet = Packet::default();
    match decode(&frame, &mut packet) {
        Ok(Kind::Transport) => match maps::backend(&packet.key) {
            Some(backend) => replace_source(&frame, &packet, &backend, Some(transport(&packet))),
            None => Some(()),
        },
        Ok(Kind::Icmp) => error(&frame, &packet),
        _ => Some(()),
    }
}

#[inline(always)]
fn replace_source(
    frame: &Skb,
    packet: &Packet,
    backend: &Address,
    transport: Option<Transport>,
) -> Option<()> {
    let at = if packet.is_v6 == 0 {
        offset_of!(Ipv4Hdr, src_addr)
    } else {
        offset_of!(Ipv6Hdr, src_addr)
    };
    frame.replace_address(
        packet.ip_offset,
        packet.ip_offset + at as u32,
        &packet.key.source,
        backend,
        transport,
    )
}

/// An ICMP error about a probe: the host finds the socket by the packet that is quoted.
#[inline(always)]
fn error(frame: &Skb, packet: &Packet) -> Option<()> {
    let is_v4 = packet.key.protocol == ICMP as u32;
    let Some(header) = frame.view::<LEN>(packet.transport_offset as usize) else {
        return Some(());
    };
    if !is_error(is_v4, header.u8(0)) {
        return Some(());
    }
    let quote = packet.transport_offset + LEN as u32;
    let Some(answer) = answer_to_quoted(frame, quote, is_v4) else {
        return Some(());
    };
    let Some(backend) = maps::backend(&answer) else {
        return Some(());
    };
    let checksum = packet.transport_offset + 2;
    if is_v4 {
        // The quoted header with its checksum adds up to the same as before, so that of the message stays right.
        let at = quote + offset_of!(Ipv4Hdr, dst_addr) as u32;
        frame.replace_v4(quote, at, &answer.source, &backend)?;
    } else {
        let at = quote + offset_of!(Ipv6Hdr, dst_addr) as u32;
        frame.replace_quoted_v6(at, &answer.source, &backend, checksum)?;
    }
    // A router on the way has its own address. From its own VIP the host would take no packet.
    if packet.key.source.0 != answer.source.0 {
        return Some(());
    }
    let transport = Transport {
        checksum,
        is_udp: false,
    };
    replace_source(frame, packet, &backend, (!is_v4).then_some(transport))
}

/// The 5-tuple of what would answer a quoted packet. Those of probes have neither options nor extension headers.
#[inline(always)]
fn answer_to_quoted(frame: &Skb, quote: u32, is_v4: bool) -> Option<FlowKey> {
    let quote = quote as usize;
    let mut answer = FlowKey::default();
    let (protocol, length) = if is_v4 {
        let ip = frame.view::<{ Ipv4Hdr::LEN }>(quote)?;
        if ip.u8(0) != 0x45 {
            return None;
        }
        answer.source = Address::from_v4_word(ip.u32(offset_of!(Ipv4Hdr, dst_addr)));
        answer.destination = Address::from_v4_word(ip.u32(offset_of!(Ipv4Hdr, src_addr)));
        (ip.u8(offset_of!(Ipv4Hdr, proto)), Ipv4Hdr::LEN)
    } else {
        let ip = frame.view::<{ Ipv6Hdr::LEN }>(quote)?;
        let at = offset_of!(Ipv6Hdr, dst_addr);
        answer.source = Address([ip.u32(at), ip.u32(at + 4), ip.u32(at + 8), ip.u32(at + 12)]);
        let at = offset_of!(Ipv6Hdr, src_addr);
        answer.destination = Address([ip.u32(at), ip.u32(at + 4), ip.u32(at + 8), ip.u32(at + 12)]);
        (ip.u8(offset_of!(Ipv6Hdr, next_hdr)), Ipv6Hdr::LEN)
    };
    if protocol != TCP && protocol != UDP {
        return None;
    }
    let ports = frame.view::<4>(quote + length)?;
    answer.source_port = ports.u16(2);
    answer.destination_port = ports.u16(0);
    answer.protocol = protocol as u32;
    Some(answer)
}
