//! `ipip` (RFC 2003, RFC 2473, RFC 4213) and `gue`, variant 1: the packet travels in another one, as it is.

use aya_ebpf::bindings::xdp_md;
use lb_common::{
    abi::{Address, Backend, Forward, GUE_PORT, IPV4_IN_IP, IPV6_IN_IP, Reason, Settings, UDP},
    logic::{
        checksum::fold,
        headers::{DONT_FRAGMENT, Frame, Packet, ethertype},
        outer::{entropy, overhead},
    },
};
use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    udp::UdpHdr,
};

use super::{nat, write_ethernet};
use crate::{cursor::Cursor, maps, scratch::scratch};

/// Hops that an outer packet may go (RFC 1700: the default of IP).
const TTL: u8 = 64;

/// Tells whether a packet fits into the path to a backend with the headers that are put around it.
#[inline(always)]
pub fn fits(packet: &Packet, forward: u8, backend: &Backend) -> bool {
    let length = packet.end - packet.ip_offset + overhead(forward, backend.address.is_v4());
    backend.mtu == 0 || length <= backend.mtu
}

/// Puts a packet into another one to its backend and addresses the frame to the next hop.
///
/// A function that the verifier checks for itself, for its stack. Gives 0, or the index of the reason why it could not.
#[unsafe(no_mangle)]
pub extern "C" fn wrap(context: *mut xdp_md, forward: u32, backend_id: u32) -> u32 {
    let (Some(scratch), Some(settings), Some(backend)) =
        (scratch(), maps::settings(), maps::backend(backend_id))
    else {
        return Reason::Internal.index();
    };
    match try_wrap(context, &scratch.packet, settings, forward as u8, backend) {
        Ok(()) => 0,
        Err(reason) => reason.index(),
    }
}

#[inline(always)]
fn try_wrap(
    context: *mut xdp_md,
    packet: &Packet,
    settings: &Settings,
    forward: u8,
    backend: &Backend,
) -> Result<(), Reason> {
    let is_gue = forward == Forward::Gue.number();
    if is_gue && backend.source.0 == Address::default().0 {
        return Err(Reason::NoSourceAddress);
    }
    let frame = Cursor::new(context);
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
    let inner_length = packet.end - packet.ip_offset;
    let protocol = if is_gue {
        UDP
    } else if packet.is_v6 != 0 {
        IPV6_IN_IP
    } else {
        IPV4_IN_IP
    };
    let transport_offset = if outer_v4 {
        let ip = frame
            .view::<{ Ipv4Hdr::LEN }>(ip_offset)
            .ok_or(Reason::Internal)?;
        let source = if is_gue {
            backend.source.v4_word()
        } else {
            settings.ipip_source_v4.v4_word() | entropy & settings.ipip_varying_v4
        };
        // RFC 2003 section 3.1: what may not be fragmented inside may not outside; what may keeps its identification,
        // so that its parts are not mixed up. DSCP and ECN are copied (RFC 6040 section 4.1).
        let (identification, fragment) = if packet.dont_fragment != 0 {
            (0, DONT_FRAGMENT)
        } else {
            (packet.identification as u16, 0)
        };
        let words = [
            u16::from_be_bytes([0x45, packet.traffic_class]).to_be(),
            ((inner_length + headers) as u16).to_be(),
            identification,
            fragment,
            u16::from_be_bytes([TTL, protocol]).to_be(),
        ];
        let destination = backend.address.v4_word();
        let mut sum = 0;
        for word in words {
            sum += word as u32;
        }
        for word in [source, destination] {
            sum += (word & 0xffff) + (word >> 16);
        }
        ip.set_u16(0, words[0]);
        ip.set_u16(2, words[1]);
        ip.set_u16(4, words[2]);
        ip.set_u16(6, words[3]);
        ip.set_u16(8, words[4]);
        ip.set_u16(10, !fold(sum));
        ip.set_u32(12, source);
        ip.set_u32(16, destination);
        ip_offset + Ipv4Hdr::LEN
    } else {
        let ip = frame
            .view::<{ Ipv6Hdr::LEN }>(ip_offset)
            .ok_or(Reason::Internal)?;
        // The flow label carries the entropy too (RFC 6438).
        let first = 6 << 28 | (packet.traffic_class as u32) << 20 | entropy & 0xf_ffff;
        let payload = inner_length + headers - Ipv6Hdr::LEN as u32;
        ip.set_u32(0, first.to_be());
        ip.set_u16(4, (payload as u16).to_be());
        ip.set_u8(6, protocol);
        ip.set_u8(7, TTL);
        let source = if is_gue {
            &backend.source
        } else {
            &settings.ipip_source_v6
        };
        let varying = if is_gue {
            0
        } else {
            entropy & settings.ipip_varying_v6
        };
        ip.set_u32(8, source.0[0]);
        ip.set_u32(12, source.0[1]);
        ip.set_u32(16, source.0[2]);
        ip.set_u32(20, source.0[3] | varying);
        ip.set_u32(24, backend.address.0[0]);
        ip.set_u32(28, backend.address.0[1]);
        ip.set_u32(32, backend.address.0[2]);
        ip.set_u32(36, backend.address.0[3]);
        ip_offset + Ipv6Hdr::LEN
    };
    if is_gue {
        let udp = frame
            .view::<{ UdpHdr::LEN }>(transport_offset)
            .ok_or(Reason::Internal)?;
        // A port of the dynamic range (RFC 6335 section 6); no checksum, which RFC 6935 allows tunnels over IPv6 too.
        udp.set_u16(0, (0xc000 | entropy as u16 & 0x3fff).to_be());
        udp.set_u16(2, GUE_PORT.to_be());
        udp.set_u16(4, ((inner_length as usize + UdpHdr::LEN) as u16).to_be());
        udp.set_u16(6, 0);
    }
    Ok(())
}
