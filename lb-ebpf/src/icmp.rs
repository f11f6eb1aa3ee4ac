//! ICMP: echo to a VIP is answered, and errors reach the end that they are about (RFC 792, RFC 4443).
//!
//! An error quotes the packet that it is about. Where that was translated, the quote is translated back, as the end
//! that gets it would not know it otherwise (RFC 5508 section 4).

use core::mem::offset_of;

use aya_ebpf::bindings::{xdp_action::XDP_TX, xdp_md};
use lb_common::{
    abi::{Address, BackendFlags, FlowKey, Forward, ICMP, Reason, TCP, UDP},
    logic::{
        checksum::{difference_of_addresses, difference16, update, update_udp},
        headers::{Frame, View, extension},
        icmp::{LEN, is_error, v4, v6},
    },
};
use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::{
    answer, client_link,
    cursor::{Checked, Cursor},
    flow::{self, Known, backend_port, source_address},
    forward::{self, encapsulation, nat},
    maps,
    scratch::{Scratch, scratch},
    service,
    verdict::Verdict,
};

/// An ICMP message: a function that the verifier checks for itself, gives a verdict as a number.
#[unsafe(no_mangle)]
pub extern "C" fn message(context: *mut xdp_md) -> u64 {
    let verdict = match scratch() {
        Some(scratch) => try_message(context, scratch),
        None => Verdict::drop(Reason::Internal),
    };
    verdict.into_bits()
}

#[inline(always)]
fn try_message(context: *mut xdp_md, scratch: &mut Scratch) -> Verdict {
    let frame = Cursor::new(context);
    let packet = &scratch.packet;
    let to_vip = service::is_vip(&packet.key.destination);
    let Some(header) = frame.view::<LEN>(packet.transport_offset as usize) else {
        return truncated(to_vip);
    };
    if packet.transport_offset + LEN as u32 > packet.end {
        return truncated(to_vip);
    }
    let message_type = header.u8(0);
    let is_v4 = packet.key.protocol == ICMP as u32;
    let echo = if is_v4 { v4::ECHO } else { v6::ECHO };
    if message_type == echo && header.u8(1) == 0 && to_vip {
        return answer::echo(frame, packet);
    }
    if !is_error(is_v4, message_type) {
        return Verdict::pass(Reason::NotForService);
    }
    match quoted(&frame, scratch) {
        Ok(quote) => about(context, scratch, &quote, to_vip),
        Err(Unquoted::Malformed) => truncated(to_vip),
        Err(Unquoted::Other) => Verdict::pass(Reason::NotForService),
    }
}

#[inline(always)]
fn truncated(to_vip: bool) -> Verdict {
    if to_vip {
        Verdict::drop(Reason::TruncatedTransport)
    } else {
        Verdict::pass(Reason::NotForService)
    }
}

/// Where the quoted packet's headers are.
struct Quote {
    ip_offset: usize,
    transport_offset: usize,
}

/// Why an error quotes no packet of a flow.
enum Unquoted {
    /// No IP header and ports, which every error has to quote (RFC 792, RFC 4443 section 2.4).
    Malformed,
    /// Neither TCP nor UDP, as an echo reply, or without ports, as a later fragment.
    Other,
}

/// Decodes the quoted packet: the reverse of its 5-tuple is put into [`Scratch::reply`].
#[inline(always)]
fn quoted(frame: &Cursor, scratch: &mut Scratch) -> Result<Quote, Unquoted> {
    let ip_offset = scratch.packet.transport_offset as usize + LEN;
    // What follows the message in the frame is none of it.
    let end = scratch.packet.end as usize;
    let (protocol, transport_offset) = if scratch.packet.is_v6 == 0 {
        let ip = frame
            .view::<{ Ipv4Hdr::LEN }>(ip_offset)
            .ok_or(Unquoted::Malformed)?;
        let vihl = ip.u8(0);
        let header_length = (vihl & 0x0f) as usize * 4;
        // Ports are in the first fragment alone.
        let offset = ip.u16(offset_of!(Ipv4Hdr, frags)) & 0x1fff_u16.to_be();
        if vihl >> 4 != 4 || header_length < Ipv4Hdr::LEN || ip_offset + header_length > end {
            return Err(Unquoted::Malformed);
        }
        if offset != 0 {
            return Err(Unquoted::Other);
        }
        scratch.reply.source = Address::from_v4_word(ip.u32(offset_of!(Ipv4Hdr, dst_addr)));
        scratch.reply.destination = Address::from_v4_word(ip.u32(offset_of!(Ipv4Hdr, src_addr)));
        (ip.u8(offset_of!(Ipv4Hdr, proto)), ip_offset + header_length)
    } else {
        let ip = frame
            .view::<{ Ipv6Hdr::LEN }>(ip_offset)
            .ok_or(Unquoted::Malformed)?;
        if ip.u8(0) >> 4 != 6 || ip_offset + Ipv6Hdr::LEN > end {
            return Err(Unquoted::Malformed);
        }
        let at = offset_of!(Ipv6Hdr, dst_addr);
        scratch.reply.source = Address([ip.u32(at), ip.u32(at + 4), ip.u32(at + 8), ip.u32(at + 12)]);
        let at = offset_of!(Ipv6Hdr, src_addr);
        scratch.reply.destination = Address([ip.u32(at), ip.u32(at + 4), ip.u32(at + 8), ip.u32(at + 12)]);
        let next = ip.u8(offset_of!(Ipv6Hdr, next_hdr));
        if next == extension::FRAGMENT {
            // The one extension header that the ends of a flow put in by themselves, as large datagrams need it.
            let header = frame
                .view::<{ extension::FRAGMENT_LEN }>(ip_offset + Ipv6Hdr::LEN)
                .ok_or(Unquoted::Malformed)?;
            if ip_offset + Ipv6Hdr::LEN + extension::FRAGMENT_LEN > end {
                return Err(Unquoted::Malformed);
            }
            if header.u16(2) & extension::FRAGMENT_OFFSET != 0 {
                return Err(Unquoted::Other);
            }
            (header.u8(0), ip_offset + Ipv6Hdr::LEN + extension::FRAGMENT_LEN)
        } else {
            (next, ip_offset + Ipv6Hdr::LEN)
        }
    };
    if protocol != TCP && protocol != UDP {
        return Err(Unquoted::Other);
    }
    let ports = frame.view::<4>(transport_offset).ok_or(Unquoted::Malformed)?;
    if transport_offset + 4 > end {
        return Err(Unquoted::Malformed);
    }
    scratch.reply.source_port = ports.u16(2);
    scratch.reply.destination_port = ports.u16(0);
    scratch.reply.protocol = protocol as u32;
    Ok(Quote {
        ip_offset,
        transport_offset,
    })
}

/// An error about a packet of a flow, or of none.
#[inline(always)]
fn about(context: *mut xdp_md, scratch: &mut Scratch, quote: &Quote, to_vip: bool) -> Verdict {
    let Some(settings) = maps::settings() else {
        return Verdict::drop(Reason::Internal);
    };
    if to_vip {
        // About a packet from a backend to a client: what answers it has the client's 5-tuple.
        scratch.client = scratch.reply.by_words();
        return match flow::of_client(settings, scratch) {
            Some(known) => to_backend(context, scratch, quote, &known),
            None => Verdict::pass(Reason::NotForService),
        };
    }
    // About a packet from a client to a backend, as it was sent on: what answers it is a reply.
    if !service::is_backend(&scratch.reply.source) {
        return Verdict::pass(Reason::NotForService);
    }
    match flow::quoted_reply(settings, scratch) {
        Some(known) => to_client(context, scratch, quote, &known),
        None => Verdict::pass(Reason::NotForService),
    }
}

#[inline(always)]
fn to_backend(context: *mut xdp_md, scratch: &mut Scratch, quote: &Quote, known: &Known) -> Verdict {
    if known.forward == Forward::Local.number() {
        return Verdict::pass(Reason::Local);
    }
    let verdict = Verdict::of_service(known.service_id).sent(XDP_TX, Reason::ErrorForwarded);
    if scratch.packet.ttl <= 1 {
        return verdict.dropped(Reason::TtlExceeded);
    }
    let Some(backend) = maps::backend(known.backend_id) else {
        return verdict.dropped(Reason::Internal);
    };
    if backend.flags & BackendFlags::NEXT_HOP_KNOWN == 0 {
        return verdict.dropped(Reason::NextHopMissing);
    }
    if Forward::encapsulates(known.forward) {
        if !encapsulation::fits(&scratch.packet, known.forward, backend) {
            return verdict.dropped(Reason::TooBig);
        }
        // The flow's own outer port or address: the error stays in the queue of its flow.
        scratch.packet.key = scratch.client.by_words();
        let (frame, Some(settings)) = (Cursor::new(context), maps::settings()) else {
            return verdict.dropped(Reason::Internal);
        };
        return match encapsulation::wrap(frame, &scratch.packet, settings, known.forward, backend) {
            Ok(frame) => forward::redirect(&frame, verdict, backend.ifindex, Reason::ErrorForwarded),
            Err(reason) => verdict.dropped(reason),
        };
    }
    let translated = if Forward::translates(known.forward) {
        let own = source_address(known.forward, &scratch.client, backend);
        // What the backend sent.
        scratch.tuple = FlowKey {
            source: backend.address.by_words(),
            destination: own,
            source_port: backend_port(&scratch.client, backend),
            destination_port: known.source_port,
            protocol: scratch.client.protocol,
        };
        // The error comes from where the client's packets seem to come from: under full-nat only that has a way back.
        let source = if known.forward == Forward::FullNat.number() {
            scratch.tuple.destination.by_words()
        } else {
            scratch.packet.key.source.by_words()
        };
        scratch.reply = scratch.client.by_words();
        scratch.client.source = source;
        scratch.client.destination = backend.address.by_words();
        translate(context, quote.ip_offset as u32, quote.transport_offset as u32) == 0
    } else {
        nat::hop(&Cursor::new(context), &scratch.packet).is_some()
    };
    if !translated {
        return verdict.dropped(Reason::TruncatedTransport);
    }
    forward::send(
        Cursor::new(context),
        &scratch.packet,
        verdict,
        backend.ifindex,
        &backend.link,
        &backend.tags,
    )
}

#[inline(always)]
fn to_client(context: *mut xdp_md, scratch: &mut Scratch, quote: &Quote, known: &Known) -> Verdict {
    let verdict = Verdict::of_service(known.service_id).sent(XDP_TX, Reason::ErrorReturned);
    if scratch.packet.ttl <= 1 {
        return verdict.dropped(Reason::TtlExceeded);
    }
    // What the client sent.
    scratch.tuple = scratch.client.by_words();
    // A backend is known to the client as the VIP; a router on the way has its own name.
    let source = if scratch.packet.key.source.0 == scratch.reply.source.0 {
        scratch.client.destination.by_words()
    } else {
        scratch.packet.key.source.by_words()
    };
    let destination = scratch.client.source.by_words();
    // From here on the outer addresses.
    scratch.client.source = source;
    scratch.client.destination = destination;
    if translate(context, quote.ip_offset as u32, quote.transport_offset as u32) != 0 {
        return verdict.dropped(Reason::TruncatedTransport);
    }
    let Some(way) = client_link::get(known.link) else {
        return verdict.passed(Reason::NextHopUnknown);
    };
    forward::send(
        Cursor::new(context),
        &scratch.packet,
        verdict,
        way.ifindex,
        &way.link,
        &way.tags,
    )
}

/// Gives the quoted packet, whose reversed 5-tuple is in [`Scratch::reply`], the one in [`Scratch::tuple`], and the
/// message the addresses in [`Scratch::client`].
///
/// A function that the verifier checks for itself. Gives 0, or 1 where the quote is too short.
#[unsafe(no_mangle)]
extern "C" fn translate(context: *mut xdp_md, ip_offset: u32, transport_offset: u32) -> u32 {
    let quote = Quote {
        ip_offset: ip_offset as usize,
        transport_offset: transport_offset as usize,
    };
    match scratch().and_then(|scratch| try_translate(&Cursor::new(context), scratch, &quote)) {
        Some(()) => 0,
        None => 1,
    }
}

#[inline(always)]
fn try_translate(frame: &Cursor, scratch: &mut Scratch, quote: &Quote) -> Option<()> {
    let (old, new) = (&scratch.reply, &scratch.tuple);
    let packet = &scratch.packet;
    let addresses = difference_of_addresses(&old.destination, &new.source)
        + difference_of_addresses(&old.source, &new.destination);
    let ports = difference16(old.destination_port, new.source_port)
        + difference16(old.source_port, new.destination_port);

    // All that changes in the quote counts for the checksum of the message, checksums in it too.
    let mut message = addresses + ports;
    if packet.is_v6 == 0 {
        let ip = frame.view::<{ Ipv4Hdr::LEN }>(quote.ip_offset)?;
        message += set_checksum(&ip, offset_of!(Ipv4Hdr, check), addresses);
        ip.set_u32(offset_of!(Ipv4Hdr, src_addr), new.source.v4_word());
        ip.set_u32(offset_of!(Ipv4Hdr, dst_addr), new.destination.v4_word());
    } else {
        let ip = frame.view::<{ Ipv6Hdr::LEN }>(quote.ip_offset)?;
        let at = offset_of!(Ipv6Hdr, src_addr);
        ip.set_u32(at, new.source.0[0]);
        ip.set_u32(at + 4, new.source.0[1]);
        ip.set_u32(at + 8, new.source.0[2]);
        ip.set_u32(at + 12, new.source.0[3]);
        let at = offset_of!(Ipv6Hdr, dst_addr);
        ip.set_u32(at, new.destination.0[0]);
        ip.set_u32(at + 4, new.destination.0[1]);
        ip.set_u32(at + 8, new.destination.0[2]);
        ip.set_u32(at + 12, new.destination.0[3]);
    }
    let transport = frame.view::<4>(quote.transport_offset)?;
    transport.set_u16(0, new.source_port);
    transport.set_u16(2, new.destination_port);
    // Routers quote at least 8 bytes, which have the checksum of UDP but not that of TCP.
    let quoted = packet.end as usize - quote.transport_offset;
    if new.protocol == UDP as u32 {
        if quoted >= UdpHdr::LEN
            && let Some(udp) = frame.view::<{ UdpHdr::LEN }>(quote.transport_offset)
        {
            let at = offset_of!(UdpHdr, check);
            let old = udp.u16(at);
            let new = update_udp(old, addresses + ports);
            udp.set_u16(at, new);
            message += difference16(old, new);
        }
    } else if quoted >= offset_of!(TcpHdr, check) + 2
        && let Some(tcp) = frame.view::<{ offset_of!(TcpHdr, check) + 2 }>(quote.transport_offset)
    {
        message += set_checksum(&tcp, offset_of!(TcpHdr, check), addresses + ports);
    }

    let outer = difference_of_addresses(&packet.key.source, &scratch.client.source)
        + difference_of_addresses(&packet.key.destination, &scratch.client.destination);
    // The pseudo header of ICMPv6 has the addresses (RFC 4443 section 2.3).
    if packet.is_v6 != 0 {
        message += outer;
    }
    let header = frame.view::<LEN>(packet.transport_offset as usize)?;
    header.set_u16(2, update(header.u16(2), message));
    nat::rewrite_ip(frame, packet, &scratch.client, outer)
}

/// Updates a checksum in the quote; gives the difference that this makes itself.
#[inline(always)]
fn set_checksum(view: &Checked, at: usize, difference: u32) -> u32 {
    let old = view.u16(at);
    let new = update(old, difference);
    view.set_u16(at, new);
    difference16(old, new)
}
