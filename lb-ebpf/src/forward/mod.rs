//! How a packet gets to its backend and a reply to its client.

pub mod encapsulation;
pub mod nat;

use aya_ebpf::{
    bindings::{
        xdp_action::{XDP_REDIRECT, XDP_TX},
        xdp_md,
    },
    helpers::bpf_redirect,
};
use lb_common::{
    abi::{Address, Backend, BackendFlags, FlowKey, Forward, Link, Reason, Settings, SettingsFlags, Tags},
    logic::headers::{Fragment, Frame, Packet, TAG_LEN, ethertype},
};

use crate::{
    answer, client_link,
    cursor::Cursor,
    flow::{Known, backend_port, source_address},
    fragment, maps,
    scratch::Scratch,
    verdict::{Verdict, add},
};

/// Index of the loopback interface in every network namespace (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;

/// Sends a client's packet to the backend of its flow.
#[inline(always)]
pub fn to_backend(
    context: *mut xdp_md,
    scratch: &mut Scratch,
    settings: &Settings,
    verdict: Verdict,
    known: &Known,
    backend: &Backend,
) -> Verdict {
    if known.forward == Forward::Local.number() {
        count_forwarded(scratch, known);
        return verdict.passed(Reason::Local);
    }
    let next_hop_known = backend.flags & BackendFlags::NEXT_HOP_KNOWN != 0;
    // The host's stack takes no packet in from an address of its own, which full-nat and gue write
    // (fib_validate_source), and would deliver or drop one that is still addressed to the VIP.
    let can_be_sent = next_hop_known || known.forward == Forward::Nat.number();
    let frame = Cursor::new(context);
    if Forward::translates(known.forward) {
        let client = &scratch.packet.key;
        let source = source_address(known.forward, client, backend);
        // The route may have gone since the flow was recorded.
        if source.0 == Address::default().0 {
            return verdict.dropped(Reason::NoSourceAddress);
        }
        if !can_be_sent {
            return verdict.dropped(Reason::NextHopMissing);
        }
        scratch.tuple = FlowKey {
            source,
            destination: backend.address.by_words(),
            source_port: known.source_port,
            destination_port: backend_port(client, backend),
            protocol: client.protocol,
        };
        if nat::rewrite(&frame, &scratch.packet, &scratch.tuple).is_none() {
            return verdict.dropped(Reason::Internal);
        }
        count_forwarded(scratch, known);
        if !next_hop_known {
            return verdict.passed(Reason::NextHopUnknown);
        }
    } else if !can_be_sent {
        return verdict.dropped(Reason::NextHopMissing);
    } else if Forward::encapsulates(known.forward) {
        if !encapsulation::fits(&scratch.packet, known.forward, backend) {
            return answer::too_big(context, scratch, verdict, known.forward, backend);
        }
        return match encapsulation::wrap(frame, &scratch.packet, settings, known.forward, backend) {
            Ok(frame) => {
                count_forwarded(scratch, known);
                redirect(&frame, verdict, backend.ifindex, Reason::Forwarded)
            }
            Err(reason) => verdict.dropped(reason),
        };
    } else {
        if nat::hop(&frame, &scratch.packet).is_none() {
            return verdict.dropped(Reason::Internal);
        }
        count_forwarded(scratch, known);
    }
    send(
        frame,
        &scratch.packet,
        verdict.sent(XDP_TX, Reason::Forwarded),
        backend.ifindex,
        &backend.link,
        &backend.tags,
    )
}

#[inline(always)]
fn count_forwarded(scratch: &Scratch, known: &Known) {
    if let Some(counters) = maps::backend_counters(known.backend_id) {
        add(&mut counters.forwarded, scratch.bytes);
    }
}

/// Sends a backend's reply to the client of its flow.
#[inline(always)]
pub fn to_client(frame: Cursor, scratch: &mut Scratch, known: &Known) -> Verdict {
    let verdict = Verdict::of_service(known.service_id);
    if scratch.packet.ttl <= 1 {
        return verdict.dropped(Reason::TtlExceeded);
    }
    if scratch.packet.fragment == Fragment::First as u8 {
        fragment::remember(scratch);
    }
    let client = &scratch.client;
    scratch.tuple = FlowKey {
        source: client.destination.by_words(),
        destination: client.source.by_words(),
        source_port: client.destination_port,
        destination_port: client.source_port,
        protocol: client.protocol,
    };
    if nat::rewrite(&frame, &scratch.packet, &scratch.tuple).is_none() {
        return verdict.dropped(Reason::Internal);
    }
    if let Some(counters) = maps::backend_counters(known.backend_id) {
        add(&mut counters.returned, scratch.bytes);
    }
    // There are more links than are noted: the host's stack knows the way, too.
    let Some(way) = client_link::get(known.link) else {
        return verdict.passed(Reason::NextHopUnknown);
    };
    send(
        frame,
        &scratch.packet,
        verdict.sent(XDP_TX, Reason::Returned),
        way.ifindex,
        &way.link,
        &way.tags,
    )
}

/// Addresses the frame to the next hop and sends it out of an interface. The verdict is that of a packet which leaves
/// by the interface it came in by.
#[inline(always)]
pub fn send(
    frame: Cursor,
    packet: &Packet,
    verdict: Verdict,
    ifindex: u32,
    link: &Link,
    tags: &Tags,
) -> Verdict {
    let same_tags = tags.0[0] == packet.tags.0[0] && tags.0[1] == packet.tags.0[1];
    let frame = if same_tags {
        let Some(ethernet) = frame.view::<12>(0) else {
            return verdict.dropped(Reason::Internal);
        };
        ethernet.set_u32(0, link.0[0]);
        ethernet.set_u32(4, link.0[1]);
        ethernet.set_u32(8, link.0[2]);
        frame
    } else {
        let more = (tags.count() as i32 - packet.tags.count() as i32) * TAG_LEN as i32;
        let Some(frame) = frame.with_more_in_front(more) else {
            return verdict.dropped(Reason::NoHeadroom);
        };
        let ether_type = if packet.is_v6 != 0 {
            ethertype::IPV6
        } else {
            ethertype::IPV4
        };
        if write_ethernet(&frame, link, tags, ether_type).is_none() {
            return verdict.dropped(Reason::Internal);
        }
        frame
    };
    redirect(&frame, verdict, ifindex, verdict.reason())
}

/// Sends a frame that is addressed already out of an interface.
#[inline(always)]
pub fn redirect(frame: &Cursor, verdict: Verdict, ifindex: u32, reason: Reason) -> Verdict {
    let ingress = frame.ingress_ifindex();
    if ifindex == ingress || ingress == LOOPBACK && is_test_run() {
        return verdict.sent(XDP_TX, reason);
    }
    // SAFETY: the helper takes numbers alone; an interface that is gone makes the kernel drop the packet.
    unsafe { bpf_redirect(ifindex, 0) };
    verdict.sent(XDP_REDIRECT, reason)
}

/// Tells whether a packet that came in by the loopback interface is one of a test run, which comes in there unless it
/// names an interface. That is told what becomes of a packet on one interface.
#[inline(always)]
fn is_test_run() -> bool {
    maps::settings().is_some_and(|settings| settings.flags & SettingsFlags::ON_LOOPBACK == 0)
}

/// Writes an Ethernet header with its VLAN tags; gives the offset of what follows it.
#[inline(always)]
pub fn write_ethernet(frame: &Cursor, link: &Link, tags: &Tags, ether_type: u16) -> Option<usize> {
    let ethernet = frame.view::<14>(0)?;
    ethernet.set_u32(0, link.0[0]);
    ethernet.set_u32(4, link.0[1]);
    ethernet.set_u32(8, link.0[2]);
    if tags.0[0] == 0 {
        ethernet.set_u16(12, ether_type);
        return Some(14);
    }
    let tagged = frame.view::<18>(0)?;
    tagged.set_u32(12, tags.0[0]);
    if tags.0[1] == 0 {
        tagged.set_u16(16, ether_type);
        return Some(18);
    }
    let tagged = frame.view::<22>(0)?;
    tagged.set_u32(16, tags.0[1]);
    tagged.set_u16(20, ether_type);
    Some(22)
}
