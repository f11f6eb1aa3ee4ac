//! Answers of our own, sent back in place of the packet: echo replies, TCP resets and ICMP errors.

use core::mem::offset_of;

use aya_ebpf::bindings::{xdp_action::XDP_TX, xdp_md};
use lb_common::{
    abi::{Address, Backend, ICMP, ICMPV6, Reason, TCP},
    logic::{
        checksum::{difference16, fold, update},
        headers::{DONT_FRAGMENT, Fragment, Frame, Packet, View, ethertype},
        icmp,
        outer::overhead,
        tcp_state::flags,
    },
};
use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};

use crate::{
    client_link::reversed,
    cursor::{Checked, Cursor},
    forward::write_ethernet,
    scratch::{Scratch, scratch},
    verdict::Verdict,
};

/// Hops that an answer may go.
const TTL: u8 = 64;
/// Smallest size of a path of IPv6, which no sender goes below (RFC 8200 section 5).
const MIN_MTU_V6: u32 = 1280;

/// Answers an echo request to a VIP.
#[inline(always)]
pub fn echo(frame: Cursor, packet: &Packet) -> Verdict {
    let verdict = Verdict::drop(Reason::Internal);
    if turn(&frame, packet).is_none() {
        return verdict;
    }
    let Some(header) = frame.view::<{ icmp::LEN }>(packet.transport_offset as usize) else {
        return verdict;
    };
    let old = header.u16(0);
    header.set_u8(
        0,
        if packet.is_v6 != 0 {
            icmp::v6::ECHO_REPLY
        } else {
            icmp::v4::ECHO_REPLY
        },
    );
    header.set_u16(2, update(header.u16(2), difference16(old, header.u16(0))));
    verdict.sent(XDP_TX, Reason::EchoAnswered)
}

/// Swaps the ends of a packet: MAC and IP addresses. No checksum but that of the time to live changes.
#[inline(always)]
fn turn(frame: &Cursor, packet: &Packet) -> Option<()> {
    let link = reversed(&packet.link);
    let ethernet = frame.view::<12>(0)?;
    ethernet.set_u32(0, link.0[0]);
    ethernet.set_u32(4, link.0[1]);
    ethernet.set_u32(8, link.0[2]);
    let (source, destination) = (&packet.key.destination, &packet.key.source);
    let offset = packet.ip_offset as usize;
    if packet.is_v6 != 0 {
        let ip = frame.view::<{ Ipv6Hdr::LEN }>(offset)?;
        ip.set_u8(offset_of!(Ipv6Hdr, hop_limit), TTL);
        set_address(&ip, offset_of!(Ipv6Hdr, src_addr), source);
        set_address(&ip, offset_of!(Ipv6Hdr, dst_addr), destination);
        return Some(());
    }
    let ip = frame.view::<{ Ipv4Hdr::LEN }>(offset)?;
    let old = ip.u16(offset_of!(Ipv4Hdr, ttl));
    ip.set_u8(offset_of!(Ipv4Hdr, ttl), TTL);
    let ttl = difference16(old, ip.u16(offset_of!(Ipv4Hdr, ttl)));
    let check = offset_of!(Ipv4Hdr, check);
    ip.set_u16(check, update(ip.u16(check), ttl));
    ip.set_u32(offset_of!(Ipv4Hdr, src_addr), source.v4_word());
    ip.set_u32(offset_of!(Ipv4Hdr, dst_addr), destination.v4_word());
    Some(())
}

#[inline(always)]
fn set_address(view: &Checked, at: usize, address: &Address) {
    view.set_u32(at, address.0[0]);
    view.set_u32(at + 4, address.0[1]);
    view.set_u32(at + 8, address.0[2]);
    view.set_u32(at + 12, address.0[3]);
}

/// Tells a client that no backend may get its packet, as a host without the service would (RFC 9293 section 3.10.7.1,
/// RFC 1122 section 3.2.2.1).
#[inline(always)]
pub fn rejection(context: *mut xdp_md, scratch: &mut Scratch, verdict: Verdict) -> Verdict {
    let packet = &scratch.packet;
    if packet.fragment != Fragment::Whole as u8 {
        return verdict.dropped(Reason::NoBackend);
    }
    if packet.key.protocol == TCP as u32 {
        if reset(context, BACK) != 0 {
            return verdict.dropped(Reason::NoBackend);
        }
        return verdict.sent(XDP_TX, Reason::Rejected);
    }
    if error(context, PORT_UNREACHABLE, 0) != 0 {
        return verdict.dropped(Reason::NoBackend);
    }
    verdict.sent(XDP_TX, Reason::Rejected)
}

/// Tells a client the size of packet that fits into the path to a backend.
#[inline(always)]
pub fn too_big(
    context: *mut xdp_md,
    scratch: &mut Scratch,
    verdict: Verdict,
    forward: u8,
    backend: &Backend,
) -> Verdict {
    let packet = &scratch.packet;
    let fits = (backend.mtu).saturating_sub(overhead(forward, backend.address.is_v4()));
    let fits = if packet.is_v6 != 0 && fits < MIN_MTU_V6 {
        MIN_MTU_V6
    } else {
        fits
    };
    // Who sent a later fragment does not know it by its ports.
    if packet.is_later_fragment() || error(context, TOO_BIG, fits) != 0 {
        return verdict.dropped(Reason::TooBig);
    }
    verdict.sent(XDP_TX, Reason::TooBigAnswered)
}

/// Tells the sender of a segment that the backend of its flow was removed.
#[inline(always)]
pub fn reset_of_sender(context: *mut xdp_md, scratch: &Scratch, verdict: Verdict) -> Verdict {
    if scratch.packet.fragment != Fragment::Whole as u8 || reset(context, BACK) != 0 {
        return verdict.dropped(Reason::NoBackend);
    }
    verdict.sent(XDP_TX, Reason::Reset)
}

/// Makes of a client's segment the reset that ends its flow at the backend: of the same sequence number, as any other
/// would be challenged (RFC 5961 section 3.2). Nothing where it is no whole segment.
#[inline(always)]
pub fn reset_of_backend(context: *mut xdp_md, scratch: &mut Scratch) -> Option<()> {
    if scratch.packet.fragment != Fragment::Whole as u8 || reset(context, ONWARD) != 0 {
        return None;
    }
    scratch.packet.end = scratch.packet.transport_offset + TcpHdr::LEN as u32;
    Some(())
}

/// Directions of [`reset`].
const BACK: u32 = 0;
const ONWARD: u32 = 1;

/// Makes of a whole TCP segment the reset that answers it (RFC 9293 section 3.10.7.1), or one in its place. Gives 0,
/// or 1 where it could not.
#[unsafe(no_mangle)]
extern "C" fn reset(context: *mut xdp_md, direction: u32) -> u32 {
    match scratch().and_then(|scratch| try_reset(context, &scratch.packet, direction)) {
        Some(()) => 0,
        None => 1,
    }
}

#[inline(always)]
fn try_reset(context: *mut xdp_md, packet: &Packet, direction: u32) -> Option<()> {
    let frame = Cursor::new(context);
    let offset = packet.transport_offset as usize;
    let tcp = frame.view::<{ TcpHdr::LEN }>(offset)?;
    let (sequence, acknowledgement) = (tcp.u32(4), tcp.u32(8));
    let header_length = (tcp.u8(12) >> 4) as u32 * 4;
    let payload = packet.end - packet.transport_offset - header_length;

    let frame = frame.cut_to(offset + TcpHdr::LEN)?;
    if direction == BACK {
        turn(&frame, packet)?;
    }
    let length = packet.transport_offset - packet.ip_offset + TcpHdr::LEN as u32;
    if packet.is_v6 != 0 {
        let ip = frame.view::<{ Ipv6Hdr::LEN }>(packet.ip_offset as usize)?;
        let payload_length = (length - Ipv6Hdr::LEN as u32) as u16;
        ip.set_u16(offset_of!(Ipv6Hdr, payload_len), payload_length.to_be());
    } else {
        let ip = frame.view::<{ Ipv4Hdr::LEN }>(packet.ip_offset as usize)?;
        let at = offset_of!(Ipv4Hdr, tot_len);
        let difference = difference16(ip.u16(at), (length as u16).to_be());
        ip.set_u16(at, (length as u16).to_be());
        let check = offset_of!(Ipv4Hdr, check);
        ip.set_u16(check, update(ip.u16(check), difference));
    }

    let opens = packet.tcp_flags & flags::SYN != 0;
    let ends = packet.tcp_flags & flags::FIN != 0;
    let (sequence, acknowledgement, tcp_flags) = if direction == ONWARD {
        (sequence, 0, flags::RST)
    } else if packet.tcp_flags & flags::ACK != 0 {
        (acknowledgement, 0, flags::RST)
    } else {
        let next = u32::from_be(sequence)
            .wrapping_add(payload)
            .wrapping_add(opens as u32 + ends as u32);
        (0, next.to_be(), flags::RST | flags::ACK)
    };
    let tcp = frame.view::<{ TcpHdr::LEN }>(offset)?;
    let ports = (packet.key.source_port as u32) << 16 | packet.key.destination_port as u32;
    let data_offset_and_flags = u16::from_be_bytes([5 << 4, tcp_flags]).to_be();
    if direction == BACK {
        tcp.set_u16(0, packet.key.destination_port);
        tcp.set_u16(2, packet.key.source_port);
    }
    tcp.set_u32(4, sequence);
    tcp.set_u32(8, acknowledgement);
    tcp.set_u16(12, data_offset_and_flags);
    tcp.set_u16(14, 0);
    tcp.set_u16(18, 0);
    let sum = pseudo_header(packet, TCP, TcpHdr::LEN as u32)
        + words(ports)
        + words(sequence)
        + words(acknowledgement)
        + data_offset_and_flags as u32;
    tcp.set_u16(16, !fold(sum));
    Some(())
}

/// The sum of a word's halves.
#[inline(always)]
const fn words(word: u32) -> u32 {
    (word & 0xffff) + (word >> 16)
}

/// The sum of the pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1).
#[inline(always)]
fn pseudo_header(packet: &Packet, protocol: u8, length: u32) -> u32 {
    let (source, destination) = (&packet.key.source.0, &packet.key.destination.0);
    let mut sum = words(source[3]) + words(destination[3]);
    if packet.is_v6 != 0 {
        sum += words(source[0]) + words(source[1]) + words(source[2]);
        sum += words(destination[0]) + words(destination[1]) + words(destination[2]);
    }
    sum + (protocol as u16).to_be() as u32 + (length as u16).to_be() as u32
}

/// Kinds of [`error`].
const PORT_UNREACHABLE: u32 = 0;
const TOO_BIG: u32 = 1;

/// Bytes of a packet that an error quotes: all headers of IPv4, or those without options where there are no more.
const QUOTED_V4: usize = 68;
const QUOTED_V4_SHORT: usize = 28;
const QUOTED_V6: usize = 88;
const QUOTED_V6_SHORT: usize = 48;

/// Makes of a packet the ICMP error about it, from its destination. Gives 0, or 1 where it could not.
#[unsafe(no_mangle)]
extern "C" fn error(context: *mut xdp_md, kind: u32, mtu: u32) -> u32 {
    let Some(scratch) = scratch() else { return 1 };
    let packet = &scratch.packet;
    let length = packet.end - packet.ip_offset;
    let headers = packet.transport_offset - packet.ip_offset;
    let made = if packet.is_v6 != 0 {
        if length as usize >= QUOTED_V6 {
            try_error::<QUOTED_V6>(context, packet, kind, mtu)
        } else if length as usize >= QUOTED_V6_SHORT && headers as usize == Ipv6Hdr::LEN {
            try_error::<QUOTED_V6_SHORT>(context, packet, kind, mtu)
        } else {
            None
        }
    } else if length as usize >= QUOTED_V4 {
        try_error::<QUOTED_V4>(context, packet, kind, mtu)
    } else if headers as usize == Ipv4Hdr::LEN {
        try_error::<QUOTED_V4_SHORT>(context, packet, kind, mtu)
    } else {
        None
    };
    match made {
        Some(()) => 0,
        None => 1,
    }
}

/// `QUOTED` is a multiple of 4.
#[inline(always)]
fn try_error<const QUOTED: usize>(context: *mut xdp_md, packet: &Packet, kind: u32, mtu: u32) -> Option<()> {
    let is_v6 = packet.is_v6 != 0;
    let (message_type, code) = match (is_v6, kind) {
        (true, TOO_BIG) => (icmp::v6::TOO_BIG, 0),
        (true, _) => (icmp::v6::UNREACHABLE, icmp::v6::PORT_UNREACHABLE),
        (false, TOO_BIG) => (icmp::v4::UNREACHABLE, icmp::v4::FRAGMENTATION_NEEDED),
        (false, _) => (icmp::v4::UNREACHABLE, icmp::v4::PORT_UNREACHABLE),
    };
    let ip_length = if is_v6 { Ipv6Hdr::LEN } else { Ipv4Hdr::LEN };
    let frame = Cursor::new(context)
        .cut_to(packet.ip_offset as usize + QUOTED)?
        .with_more_in_front((ip_length + icmp::LEN) as i32)?;
    let link = reversed(&packet.link);
    let ether_type = if is_v6 { ethertype::IPV6 } else { ethertype::IPV4 };
    let ip_offset = write_ethernet(&frame, &link, &packet.tags, ether_type)?;
    let (source, destination) = (&packet.key.destination, &packet.key.source);
    let length = icmp::LEN + QUOTED;
    if is_v6 {
        let ip = frame.view::<{ Ipv6Hdr::LEN }>(ip_offset)?;
        ip.set_u32(0, (6_u32 << 28).to_be());
        ip.set_u16(4, (length as u16).to_be());
        ip.set_u8(6, ICMPV6);
        ip.set_u8(7, TTL);
        set_address(&ip, 8, source);
        set_address(&ip, 24, destination);
    } else {
        let ip = frame.view::<{ Ipv4Hdr::LEN }>(ip_offset)?;
        let total = ((length + Ipv4Hdr::LEN) as u16).to_be();
        let version = u16::from_be_bytes([0x45, 0]).to_be();
        let ttl = u16::from_be_bytes([TTL, ICMP]).to_be();
        let sum = version as u32
            + total as u32
            + DONT_FRAGMENT as u32
            + ttl as u32
            + words(source.v4_word())
            + words(destination.v4_word());
        ip.set_u16(0, version);
        ip.set_u16(2, total);
        ip.set_u16(4, 0);
        ip.set_u16(6, DONT_FRAGMENT);
        ip.set_u16(8, ttl);
        ip.set_u16(10, !fold(sum));
        ip.set_u32(12, source.v4_word());
        ip.set_u32(16, destination.v4_word());
    }
    let quoted = frame.view::<QUOTED>(ip_offset + ip_length + icmp::LEN)?;
    let mut sum = fold(quoted.sum::<QUOTED>()) as u32;
    let first = u16::from_be_bytes([message_type, code]).to_be();
    sum += first as u32 + words(mtu.to_be());
    if is_v6 {
        sum += pseudo_header(packet, ICMPV6, length as u32);
    }
    let header = frame.view::<{ icmp::LEN }>(ip_offset + ip_length)?;
    header.set_u16(0, first);
    header.set_u16(2, !fold(sum));
    header.set_u32(4, mtu.to_be());
    Some(())
}
