//! How a packet gets to its backend and a reply to its client.

mod nat;

use aya_ebpf::{
    bindings::xdp_action::{XDP_REDIRECT, XDP_TX},
    helpers::bpf_redirect,
};
use lb_common::{
    abi::{Address, Backend, BackendFlags, Flow, FlowKey, Forward, Link, Reason},
    logic::headers::{Frame, Segment},
};

use crate::{
    cursor::Cursor,
    flow::{Reply, backend_port, source_address},
    maps,
    verdict::{Verdict, add},
};

/// Sends a client's packet to the backend of its flow.
#[inline(always)]
pub fn to_backend(
    frame: &Cursor,
    segment: &Segment,
    verdict: Verdict,
    flow: &mut Flow,
    backend_id: u32,
    backend: &Backend,
) -> Verdict {
    remember_client_link(frame, flow);
    let source = source_address(flow.forward, &segment.key, backend);
    // The route may have gone since the flow was recorded.
    if source.0 == Address::default().0 {
        return verdict.dropped(Reason::NoSourceAddress);
    }
    let next_hop_known = backend.flags & BackendFlags::NEXT_HOP_KNOWN != 0;
    // From an address of its own, which full-nat writes, the host's stack takes no packet in (fib_validate_source).
    if !next_hop_known && flow.forward == Forward::FullNat.number() {
        return verdict.dropped(Reason::NextHopMissing);
    }
    let tuple = FlowKey {
        source,
        destination: backend.address.by_words(),
        source_port: flow.source_port,
        destination_port: backend_port(&segment.key, backend),
        protocol: segment.key.protocol,
    };
    if nat::rewrite(frame, segment, &tuple).is_none() {
        return verdict.dropped(Reason::Internal);
    }
    if let Some(counters) = maps::backend_counters(backend_id) {
        add(&mut counters.forwarded, frame.len() as u64);
    }
    if !next_hop_known {
        return verdict.passed(Reason::NextHopUnknown);
    }
    send(frame, verdict, backend.ifindex, backend.link, Reason::Forwarded)
}

/// Sends a backend's reply to the client of its flow.
#[inline(always)]
pub fn to_client(frame: &Cursor, segment: &Segment, reply: &Reply) -> Verdict {
    let verdict = Verdict::of_service(reply.flow.service);
    if segment.ttl <= 1 {
        return verdict.dropped(Reason::TtlExceeded);
    }
    let client = &reply.client;
    let tuple = FlowKey {
        source: client.destination.by_words(),
        destination: client.source.by_words(),
        source_port: client.destination_port,
        destination_port: client.source_port,
        protocol: client.protocol,
    };
    if nat::rewrite(frame, segment, &tuple).is_none() {
        return verdict.dropped(Reason::Internal);
    }
    if let Some(counters) = maps::backend_counters(reply.flow.backend) {
        add(&mut counters.returned, frame.len() as u64);
    }
    send(
        frame,
        verdict,
        reply.flow.client_ifindex,
        reply.flow.client_link,
        Reason::Returned,
    )
}

/// Replies go back the way that the client's packets come, so that the path needs no lookup; written only when it
/// has changed, to leave the cache line clean.
#[inline(always)]
fn remember_client_link(frame: &Cursor, flow: &mut Flow) {
    let Some(link) = frame.link_back() else { return };
    if flow.client_link.0[0] != link.0[0]
        || flow.client_link.0[1] != link.0[1]
        || flow.client_link.0[2] != link.0[2]
        || flow.client_ifindex != frame.ingress_ifindex
    {
        flow.client_link = link;
        flow.client_ifindex = frame.ingress_ifindex;
    }
}

/// Addresses the frame to the next hop and sends it out of an interface.
#[inline(always)]
fn send(frame: &Cursor, verdict: Verdict, ifindex: u32, link: Link, reason: Reason) -> Verdict {
    let Some(ethernet) = frame.view::<12>(0) else {
        return verdict.dropped(Reason::Internal);
    };
    ethernet.set_u32(0, link.0[0]);
    ethernet.set_u32(4, link.0[1]);
    ethernet.set_u32(8, link.0[2]);
    if ifindex == frame.ingress_ifindex {
        return verdict.sent(XDP_TX, reason);
    }
    // SAFETY: the helper takes numbers alone; an interface that is gone makes the kernel drop the packet.
    unsafe { bpf_redirect(ifindex, 0) };
    verdict.sent(XDP_REDIRECT, reason)
}
