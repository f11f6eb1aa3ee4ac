//! What leaves: packets of probes become those of clients on the last part of their way.

use core::mem::offset_of;

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_ADJ_ROOM_ENCAP_L4_UDP,
};
use lb_common::{
    abi::{Address, FlowKey, Forward, PROBE_MARK_MASK, ProbePath},
    logic::{
        headers::{Fragment, Kind, Packet, decode},
        outer::{Outer, entropy, overhead},
    },
};
use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    frame::Skb,
    maps::{self, PROBES},
    program::transport,
};

/// Sends a packet with the mark of a path on it; nothing where that cannot be.
#[inline(always)]
pub fn travel(context: *mut __sk_buff, mark: u32) -> Option<()> {
    let path = maps::path(mark & !PROBE_MARK_MASK)?;
    let frame = Skb::new(context);
    let mut packet = Packet::default();
    let Ok(Kind::Transport) = decode(&frame, &mut packet) else {
        return None;
    };
    // A number may have been given to another path while the packet was under way.
    if packet.key.destination.0 != path.backend.0 || packet.fragment != Fragment::Whole as u8 {
        return None;
    }
    let answer = FlowKey {
        source: path.vip.by_words(),
        destination: packet.key.source.by_words(),
        source_port: packet.key.destination_port,
        destination_port: packet.key.source_port,
        protocol: packet.key.protocol,
    };
    PROBES.insert(&answer, &path.backend, 0).ok()?;

    let at = if packet.is_v6 == 0 {
        offset_of!(Ipv4Hdr, dst_addr)
    } else {
        offset_of!(Ipv6Hdr, dst_addr)
    };
    frame.replace_address(
        packet.ip_offset,
        packet.ip_offset + at as u32,
        &path.backend,
        &path.vip,
        Some(transport(&packet)),
    )?;
    // The 5-tuple that the backend sees inside.
    packet.key.destination = path.vip.by_words();
    if Forward::encapsulates(path.forward) {
        wrap(&frame, &packet, path)?;
    }
    // Not to be done twice where it meets the program on another interface below.
    // SAFETY: the context is the one that the kernel called the program with.
    unsafe { (*context).mark = 0 };
    Some(())
}

/// Puts the outer headers around a packet, of the family that it has itself.
#[inline(always)]
fn wrap(frame: &Skb, packet: &Packet, path: &ProbePath) -> Option<()> {
    let is_v4 = packet.is_v6 == 0;
    let is_gue = path.forward == Forward::Gue.number();
    let entropy = entropy(&packet.key);
    let outer = Outer {
        inner: packet,
        is_gue,
        source: outer_source(packet, path, entropy),
        destination: path.backend.by_words(),
        entropy,
    };
    let mut flags = if is_v4 {
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV4
    } else {
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV6
    } as u64;
    if is_gue {
        flags |= BPF_F_ADJ_ROOM_ENCAP_L4_UDP as u64;
    }
    // The kernel makes room behind an Ethernet header, not behind a tag: that of two which lies in the frame becomes
    // the one that is noted beside it, and the other way round.
    let tag = (packet.tags.0[0] != 0).then(|| frame.outer_tag(packet.tags.0[0]));
    if tag.is_some() {
        frame.pop_tag()?;
    }
    frame.make_room(overhead(path.forward, is_v4), flags)?;
    let ip_offset = EthHdr::LEN as u32;
    let transport_offset = if is_v4 {
        frame.store(ip_offset, &outer.ipv4())?;
        ip_offset + Ipv4Hdr::LEN as u32
    } else {
        frame.store(ip_offset, &outer.ipv6())?;
        ip_offset + Ipv6Hdr::LEN as u32
    };
    if is_gue {
        frame.store(transport_offset, &outer.udp())?;
    }
    match tag {
        Some(tag) => frame.push_tag(tag),
        None => Some(()),
    }
}

#[inline(always)]
fn outer_source(packet: &Packet, path: &ProbePath, entropy: u32) -> Address {
    if path.forward == Forward::Gue.number() {
        return packet.key.source.by_words();
    }
    let [a, b, c, d] = &path.outer_source.0;
    Address([*a, *b, *c, *d | entropy & path.outer_varying])
}
