//! The flow table: what holds a connection on its backend. The kernel maps behind it are seen nowhere else.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::generated::bpf_ktime_get_coarse_ns,
};
use lb_common::{
    abi::{
        Address, Backend, BackendFlags, Flow, FlowKey, Forward, Reason, Service, Settings, TCP, Tags,
        TcpState,
    },
    logic::{
        ageing,
        headers::Segment,
        source_port::{TRIES, candidate, first_choice},
        tcp_state::{Sender, first, flags, next, opens},
    },
};

use crate::{
    cursor::Cursor,
    maps::{self, FLOWS, REPLIES},
};

/// Nanoseconds of `CLOCK_MONOTONIC_COARSE`: a tenth of the cost of the precise clock, and good to a tick.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper takes no argument.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// The flow of a client's packet with its backend, brought up to date; nothing where the packet starts a new one.
#[inline(always)]
pub fn known(
    settings: &Settings,
    segment: &Segment,
    now: u64,
) -> Option<(&'static mut Flow, u32, &'static Backend)> {
    let flow = get(&segment.key)?;
    let backend_id = flow.backend;
    let backend = maps::backend(backend_id)?;
    // The key of the old one's replies stays: another flow may have it by now, and while it leads here, a late
    // reply is known as such. The daemon removes it.
    if is_over(settings, flow, now) || !stays(flow, backend, segment) {
        return None;
    }
    flow.last_seen = now;
    if segment.tcp_flags != 0 {
        advance(flow, Sender::Client, segment.tcp_flags);
    }
    Some((flow, backend_id, backend))
}

/// What a new flow is recorded from.
pub struct Record<'a> {
    pub frame: &'a Cursor,
    pub settings: &'a Settings,
    pub service: &'a Service,
    pub service_id: u32,
    pub backend_id: u32,
    pub backend: &'a Backend,
    pub now: u64,
}

/// Records a new flow of a client on a backend.
///
/// # Errors
/// [`Reason::NoFlow`] for a packet that cannot start one, [`Reason::NoSourcePort`], [`Reason::FlowTableFull`].
#[inline(always)]
pub fn record(new: &Record<'_>, segment: &Segment) -> Result<&'static mut Flow, Reason> {
    let is_tcp = segment.key.protocol == TCP as u32;
    let answers = segment.tcp_flags & (flags::SYN | flags::ACK) == flags::SYN | flags::ACK;
    if is_tcp && (segment.tcp_flags & flags::RST != 0 || answers) {
        return Err(Reason::NoFlow);
    }
    let source = source_address(new.service.forward, &segment.key, new.backend);
    if source.0 == Address::default().0 {
        return Err(Reason::NoSourceAddress);
    }
    let source_port = claim_source_port(new, segment, &source)?;
    let Some(client_link) = new.frame.link_back() else {
        return Err(Reason::Internal);
    };
    let flow = Flow {
        last_seen: new.now,
        created: new.now,
        backend: new.backend_id,
        generation: new.backend.generation,
        service: new.service_id,
        client_ifindex: new.frame.ingress_ifindex,
        client_link,
        client_tags: Tags::default(),
        source_port,
        tcp_state: if is_tcp {
            first(segment.tcp_flags) as u8
        } else {
            TcpState::None as u8
        },
        forward: new.service.forward,
    };
    if FLOWS.insert(&segment.key, &flow, BPF_ANY as u64).is_err() {
        let _ = REPLIES.remove(&reply_key(&segment.key, source_port, &source, new.backend));
        return Err(Reason::FlowTableFull);
    }
    if let Some(counters) = maps::backend_counters(new.backend_id) {
        counters.flows += 1;
    }
    get(&segment.key).ok_or(Reason::FlowTableFull)
}

/// A backend's reply and the flow that it belongs to.
pub struct Reply {
    /// The client's 5-tuple.
    pub client: FlowKey,
    pub flow: &'static mut Flow,
}

/// The flow of a backend's packet, brought up to date; nothing where the packet answers none.
///
/// # Errors
/// [`Reason::NoFlow`] where the flow has ended or gone to another backend.
#[inline(always)]
pub fn of_reply(segment: &Segment) -> Result<Option<Reply>, Reason> {
    let Some(client) = REPLIES.get_ptr(&segment.key) else {
        return Ok(None);
    };
    // SAFETY: an entry may be recycled under its reader; what was read is checked against the flow below.
    let client = unsafe { *client };
    let Some(flow) = get(&client) else {
        return Err(Reason::NoFlow);
    };
    let Some(backend) = maps::backend(flow.backend) else {
        return Err(Reason::NoFlow);
    };
    if backend.generation != flow.generation
        || backend.address != segment.key.source
        || backend_port(&client, backend) != segment.key.source_port
        || flow.source_port != segment.key.destination_port
    {
        return Err(Reason::NoFlow);
    }
    flow.last_seen = now();
    if segment.tcp_flags != 0 {
        advance(flow, Sender::Backend, segment.tcp_flags);
    }
    Ok(Some(Reply { client, flow }))
}

#[inline(always)]
fn get(key: &FlowKey) -> Option<&'static mut Flow> {
    // SAFETY: two CPUs may write the same flow, field by field; each value that can result is valid, and an entry
    // that is recycled under its reader leads to a backend that exists.
    FLOWS.get_ptr_mut(key).map(|flow| unsafe { &mut *flow })
}

#[inline(always)]
fn advance(flow: &mut Flow, sender: Sender, tcp_flags: u8) {
    let state = next(TcpState::from_number(flow.tcp_state), sender, tcp_flags) as u8;
    if state != flow.tcp_state {
        flow.tcp_state = state;
    }
}

#[inline(always)]
fn is_over(settings: &Settings, flow: &Flow, now: u64) -> bool {
    ageing::is_over(
        settings,
        TcpState::from_number(flow.tcp_state),
        flow.last_seen,
        now,
    )
}

/// Tells whether a flow goes on with a packet, or the packet starts a new one under the same 5-tuple.
#[inline(always)]
fn stays(flow: &Flow, backend: &Backend, segment: &Segment) -> bool {
    if backend.generation != flow.generation {
        return false;
    }
    if segment.key.protocol != TCP as u32 {
        return backend.flags & BackendFlags::KEEPS_UDP != 0;
    }
    if !opens(segment.tcp_flags) {
        return true;
    }
    flow.tcp_state < TcpState::FinClient as u8 && backend.flags & BackendFlags::ACCEPTS_NEW != 0
}

/// The source address that the backend sees.
#[inline(always)]
pub fn source_address(forward: u8, client: &FlowKey, backend: &Backend) -> Address {
    if forward == Forward::FullNat.number() {
        backend.source.by_words()
    } else {
        client.source.by_words()
    }
}

/// The port that the backend is reached on.
#[inline(always)]
pub fn backend_port(client: &FlowKey, backend: &Backend) -> u16 {
    if backend.port == 0 {
        client.destination_port
    } else {
        backend.port
    }
}

/// The 5-tuple of a backend's replies.
#[inline(always)]
fn reply_key(client: &FlowKey, source_port: u16, source: &Address, backend: &Backend) -> FlowKey {
    FlowKey {
        source: backend.address.by_words(),
        destination: source.by_words(),
        source_port: backend_port(client, backend),
        destination_port: source_port,
        protocol: client.protocol,
    }
}

/// Takes a source port that no other flow uses towards the backend, so that its replies are told apart: for
/// `nat` the client's own if it is free, which another service with the same backend may have taken.
#[inline(always)]
fn claim_source_port(new: &Record<'_>, segment: &Segment, source: &Address) -> Result<u16, Reason> {
    let full_nat = new.service.forward == Forward::FullNat.number();
    let start = first_choice(new.settings, &segment.key);
    let mut reply = reply_key(&segment.key, segment.key.source_port, source, new.backend);
    for attempt in 0..TRIES {
        if full_nat || attempt > 0 {
            reply.destination_port = candidate(new.settings, start, attempt).to_be();
        }
        if REPLIES.insert(&reply, &segment.key, BPF_NOEXIST as u64).is_ok() {
            return Ok(reply.destination_port);
        }
        if is_free(new, segment, &reply) && REPLIES.insert(&reply, &segment.key, BPF_ANY as u64).is_ok() {
            return Ok(reply.destination_port);
        }
    }
    Err(Reason::NoSourcePort)
}

/// Tells whether the flow that an entry of replies leads to has ended, or is the one being recorded.
#[inline(always)]
fn is_free(new: &Record<'_>, segment: &Segment, reply: &FlowKey) -> bool {
    let Some(client) = REPLIES.get_ptr(reply) else {
        return true;
    };
    // SAFETY: as in `of_reply`; a recycled entry at worst leads to another attempt.
    let client = unsafe { *client };
    if client == segment.key {
        return true;
    }
    match get(&client) {
        Some(flow) => flow.source_port != reply.destination_port || is_over(new.settings, flow, new.now),
        None => true,
    }
}
