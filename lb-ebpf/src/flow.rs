//! The flow table: what holds a connection on its backend. The kernel maps behind it are seen nowhere else.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::generated::bpf_ktime_get_coarse_ns,
};
use lb_common::{
    abi::{
        Address, Backend, BackendFlags, Flow, FlowKey, Forward, Link, Reason, Service, Settings, TCP, Tags,
        TcpState,
    },
    logic::{
        ageing,
        headers::Packet,
        source_port::{TRIES, candidate, first_choice},
        tcp_state::{Sender, first, flags, next, next_of_client_alone, opens},
    },
};

use crate::{
    cursor::Cursor,
    maps::{self, FLOWS, REPLIES},
    scratch::{Scratch, scratch},
    select, service, source,
};

/// Nanoseconds of `CLOCK_MONOTONIC_COARSE`: a tenth of the cost of the precise clock, and good to a tick.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper takes no argument.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// What a packet of a client's flow needs of it.
#[derive(Clone, Copy)]
pub struct Known {
    pub backend_id: u32,
    /// The [`Forward`] of the flow as its number.
    pub forward: u8,
    /// Source port that the backend sees, network byte order.
    pub source_port: u16,
    pub reset: Reset,
}

/// Who is to be told that a flow's backend was removed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Reset {
    /// Nobody: it was not, or the segment is a reset itself.
    None,
    /// The backend, by a reset in place of the client's segment: its own segments do not come by to be answered.
    OfBackend,
    /// The sender of the segment.
    OfSender,
}

/// The flow of a client's packet, brought up to date; nothing where the packet starts a new one.
#[inline(always)]
pub fn known(settings: &Settings, frame: &Cursor, packet: &Packet, now: u64) -> Option<Known> {
    let (flow, reset) = going_on(settings, packet, now)?;
    remember_client_link(frame, packet, flow);
    Some(Known::of(flow, reset))
}

/// As [`known`], where replies need no way back to the client.
#[inline(always)]
pub fn known_local(settings: &Settings, packet: &Packet, now: u64) -> Option<Known> {
    going_on(settings, packet, now).map(|(flow, reset)| Known::of(flow, reset))
}

#[inline(always)]
fn going_on(settings: &Settings, packet: &Packet, now: u64) -> Option<(&'static mut Flow, Reset)> {
    let flow = get(&packet.key)?;
    let backend = maps::backend(flow.backend)?;
    // The key of the old one's replies stays: another flow may have it by now, and while it leads here, a late
    // reply is known as such. The daemon removes it.
    if is_over(settings, flow, now) || !stays(flow, backend, packet) {
        if backend.generation == flow.generation {
            count_end(flow);
        }
        return None;
    }
    flow.last_seen = now;
    let reset = reset(backend, packet);
    let reset = if reset == Reset::OfSender && !Forward::translates(flow.forward) && !is_closed(flow) {
        Reset::OfBackend
    } else {
        reset
    };
    if reset != Reset::None {
        advance(flow, Sender::Client, flags::RST);
    } else if packet.tcp_flags != 0 {
        advance(flow, Sender::Client, packet.tcp_flags);
    }
    Some((flow, reset))
}

/// Brings the flow of a connection up to date that the kernel has a socket for, however long it was idle.
#[inline(always)]
pub fn seen(key: &FlowKey, sender: Sender, tcp_flags: u8) -> Option<&'static mut Flow> {
    let flow = get(key)?;
    if maps::backend(flow.backend)?.generation != flow.generation {
        return None;
    }
    flow.last_seen = now();
    advance(flow, sender, tcp_flags);
    Some(flow)
}

/// Tells whether packets of a client go to another host: where its service has become `local` since the flow began.
#[inline(always)]
pub fn leaves_host(key: &FlowKey) -> bool {
    get(key).is_some_and(|flow| flow.forward != Forward::Local.number())
}

/// Puts a client's packet that belongs to no flow on a backend and records the flow.
///
/// A function that the verifier checks for itself: it is the longest way, and few packets take it. Gives the flow as a
/// number, see [`Known::from_bits`].
#[unsafe(no_mangle)]
pub extern "C" fn begin(client_ifindex: u32, service_id: u32) -> u64 {
    let (Some(scratch), Some(service)) = (scratch(), maps::service(service_id)) else {
        return FAILED | Reason::Internal.index() as u64;
    };
    match try_begin(client_ifindex, scratch, service, service_id) {
        Ok(known) => known.into_bits(),
        Err(reason) => FAILED | reason.index() as u64,
    }
}

/// In a number of [`begin`] or [`claim`]: not what was asked for but a reason.
const FAILED: u64 = 1 << 63;

impl Known {
    #[inline(always)]
    fn of(flow: &Flow, reset: Reset) -> Self {
        Self {
            backend_id: flow.backend,
            forward: flow.forward,
            source_port: flow.source_port,
            reset,
        }
    }

    #[inline(always)]
    fn into_bits(self) -> u64 {
        (self.forward as u64) << 48 | (self.source_port as u64) << 32 | self.backend_id as u64
    }

    /// What [`begin`] made a number of.
    ///
    /// # Errors
    /// Why there is no flow.
    #[inline(always)]
    pub fn from_bits(bits: u64) -> Result<Self, Reason> {
        if bits & FAILED != 0 {
            return Err(Reason::from_index(bits as u32));
        }
        Ok(Self {
            backend_id: bits as u32,
            forward: (bits >> 48) as u8,
            source_port: (bits >> 32) as u16,
            reset: Reset::None,
        })
    }
}

#[inline(always)]
fn try_begin(
    client_ifindex: u32,
    scratch: &mut Scratch,
    service: &Service,
    service_id: u32,
) -> Result<Known, Reason> {
    let now = now();
    let packet = &scratch.packet;
    let is_tcp = packet.key.protocol == TCP as u32;
    let answers = packet.tcp_flags & (flags::SYN | flags::ACK) == flags::SYN | flags::ACK;
    if is_tcp && (packet.tcp_flags & flags::RST != 0 || answers || packet.is_later_fragment()) {
        return Err(Reason::NoFlow);
    }
    source::admit(service, service_id, &packet.key, now)?;
    let backend_id = select::backend(service_id)?;
    let Some(backend) = maps::backend(backend_id) else {
        return Err(Reason::Internal);
    };
    let forward = forward_of(service, &packet.key);
    let has_reply_key = Forward::has_reply_key(forward, packet.key.protocol);
    let source_port = if has_reply_key {
        claimed_source_port(forward, backend_id)?
    } else {
        packet.key.source_port
    };
    let packet = &scratch.packet;
    scratch.flow = Flow {
        last_seen: now,
        created: now,
        backend: backend_id,
        generation: backend.generation,
        service: service_id,
        client_ifindex,
        client_link: reversed(&packet.link),
        client_tags: Tags([packet.tags.0[0], packet.tags.0[1]]),
        source_port,
        tcp_state: if is_tcp {
            first(packet.tcp_flags) as u8
        } else {
            TcpState::None as u8
        },
        forward,
    };
    if FLOWS
        .insert(&scratch.packet.key, &scratch.flow, BPF_ANY as u64)
        .is_err()
    {
        if has_reply_key {
            let _ = REPLIES.remove(&scratch.reply);
        }
        return Err(Reason::FlowTableFull);
    }
    if let Some(counters) = maps::backend_counters(backend_id) {
        counters.flows += 1;
    }
    if !ageing::has_ended(forward, TcpState::from_number(scratch.flow.tcp_state)) {
        maps::count_opened(backend_id);
    }
    Ok(Known {
        backend_id,
        forward,
        source_port,
        reset: Reset::None,
    })
}

/// The forward of a new flow. A backend that is a client of its own service would be answered past this host, or by
/// itself: its source becomes this host's, so that the answer comes back here.
#[inline(always)]
fn forward_of(service: &Service, key: &FlowKey) -> u8 {
    if service.forward == Forward::Nat.number() && service::is_backend(&key.source) {
        Forward::FullNat.number()
    } else {
        service.forward
    }
}

/// The flow of a backend's packet, brought up to date, and whether the packet is to be answered with a reset; the
/// client's 5-tuple of it is put into [`Scratch::client`]. Nothing where the packet answers none.
#[inline(always)]
pub fn of_reply(scratch: &mut Scratch) -> Option<(&'static mut Flow, Reset)> {
    scratch.reply = scratch.packet.key.by_words();
    let (flow, backend) = replied(scratch)?;
    flow.last_seen = now();
    let reset = reset(backend, &scratch.packet);
    if reset != Reset::None {
        advance(flow, Sender::Backend, flags::RST);
    } else if scratch.packet.tcp_flags != 0 {
        advance(flow, Sender::Backend, scratch.packet.tcp_flags);
    }
    Some((flow, reset))
}

/// Whether a flow's packet is to be answered with a reset.
#[inline(always)]
fn reset(backend: &Backend, packet: &Packet) -> Reset {
    let resets = backend.flags & BackendFlags::RESETS != 0 && packet.key.protocol == TCP as u32;
    if resets && packet.tcp_flags & flags::RST == 0 {
        Reset::OfSender
    } else {
        Reset::None
    }
}

#[inline(always)]
fn is_closed(flow: &Flow) -> bool {
    flow.tcp_state == TcpState::Closed as u8
}

/// Tells whether a 5-tuple is, or was lately, that of a flow's replies.
#[inline(always)]
pub fn is_reply(key: &FlowKey) -> bool {
    REPLIES.get_ptr(key).is_some()
}

/// The flow that [`Scratch::reply`] leads to, and its backend, unless it has ended or gone to another one; the client's
/// 5-tuple of it is put into [`Scratch::client`].
#[inline(always)]
pub fn replied(scratch: &mut Scratch) -> Option<(&'static mut Flow, &'static Backend)> {
    let client = REPLIES.get_ptr(&scratch.reply)?;
    // SAFETY: an entry may be recycled under its reader; what was read is checked against the flow below.
    scratch.client = unsafe { &*client }.by_words();
    let flow = get(&scratch.client)?;
    let backend = maps::backend(flow.backend)?;
    if backend.generation != flow.generation
        || reply_source(flow.forward, backend).0 != scratch.reply.source.0
        || backend_port(&scratch.client, backend) != scratch.reply.source_port
        || flow.source_port != scratch.reply.destination_port
    {
        return None;
    }
    Some((flow, backend))
}

/// The flow that [`Scratch::client`] is the client's 5-tuple of, unless its backend has gone.
#[inline(always)]
pub fn of_client(scratch: &Scratch) -> Option<&'static mut Flow> {
    let flow = get(&scratch.client)?;
    let backend = maps::backend(flow.backend)?;
    if backend.generation != flow.generation {
        return None;
    }
    Some(flow)
}

/// Replies go back the way that the client's packets come, so that the path needs no lookup; written only when it
/// has changed, to leave the cache line clean.
#[inline(always)]
fn remember_client_link(frame: &Cursor, packet: &Packet, flow: &mut Flow) {
    let link = reversed(&packet.link);
    if flow.client_link.0[0] != link.0[0]
        || flow.client_link.0[1] != link.0[1]
        || flow.client_link.0[2] != link.0[2]
        || flow.client_ifindex != frame.ingress_ifindex()
        || flow.client_tags.0[0] != packet.tags.0[0]
        || flow.client_tags.0[1] != packet.tags.0[1]
    {
        flow.client_link = link;
        flow.client_ifindex = frame.ingress_ifindex();
        flow.client_tags = Tags([packet.tags.0[0], packet.tags.0[1]]);
    }
}

/// The link on which an answer goes back: the MAC addresses, swapped.
#[inline(always)]
pub fn reversed(link: &Link) -> Link {
    let [a, b, c] = link.0;
    // Six bytes are one and a half words, so each word of the result is joined from two halves.
    Link([
        (b >> 16) | (c << 16),
        (c >> 16) | (a << 16),
        (a >> 16) | (b << 16),
    ])
}

#[inline(always)]
fn get(key: &FlowKey) -> Option<&'static mut Flow> {
    // SAFETY: two CPUs may write the same flow, field by field; each value that can result is valid, and an entry
    // that is recycled under its reader leads to a backend that exists.
    FLOWS.get_ptr_mut(key).map(|flow| unsafe { &mut *flow })
}

/// Moves the state of a flow on.
#[inline(always)]
fn advance(flow: &mut Flow, sender: Sender, tcp_flags: u8) {
    let former = TcpState::from_number(flow.tcp_state);
    let state = if Forward::sees_replies(flow.forward) {
        next(former, sender, tcp_flags)
    } else {
        next_of_client_alone(former, tcp_flags)
    };
    if state as u8 != former as u8 {
        flow.tcp_state = state as u8;
        if !ageing::has_ended(flow.forward, former) && ageing::has_ended(flow.forward, state) {
            maps::count_ended(flow.backend);
        }
    }
}

/// Counts the end of a flow that another takes the place of.
#[inline(always)]
fn count_end(flow: &Flow) {
    if !ageing::has_ended(flow.forward, TcpState::from_number(flow.tcp_state)) {
        maps::count_ended(flow.backend);
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
fn stays(flow: &Flow, backend: &Backend, packet: &Packet) -> bool {
    if backend.generation != flow.generation {
        return false;
    }
    if packet.key.protocol != TCP as u32 {
        return backend.flags & BackendFlags::KEEPS_UDP != 0;
    }
    if !opens(packet.tcp_flags) {
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

/// The source of replies, as it is in their key. A process on this host that is bound to no address answers from the
/// one that the route to the client has, whatever address the client's packet was for: none is in the key.
#[inline(always)]
fn reply_source(forward: u8, backend: &Backend) -> Address {
    if forward == Forward::Local.number() {
        Address::default()
    } else {
        backend.address.by_words()
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

/// The source port of a new flow, network byte order.
///
/// # Errors
/// [`Reason::NoSourceAddress`], [`Reason::NoSourcePort`].
#[inline(always)]
fn claimed_source_port(forward: u8, backend_id: u32) -> Result<u16, Reason> {
    let claimed = claim(forward as u32, backend_id);
    if claimed & FAILED != 0 {
        Err(Reason::from_index(claimed as u32))
    } else {
        Ok(claimed as u16)
    }
}

/// A function that the verifier checks for itself, once for all that follows its loop. Gives the port.
#[unsafe(no_mangle)]
extern "C" fn claim(forward: u32, backend_id: u32) -> u64 {
    let (Some(scratch), Some(settings), Some(backend)) =
        (scratch(), maps::settings(), maps::backend(backend_id))
    else {
        return FAILED | Reason::Internal.index() as u64;
    };
    match claim_source_port(settings, scratch, forward as u8, backend, now()) {
        Ok(port) => port as u64,
        Err(reason) => FAILED | reason.index() as u64,
    }
}

/// Takes a source port that no other flow uses towards the backend, so that its replies are told apart: for
/// `nat` the client's own if it is free, which another service with the same backend may have taken. The key of the
/// replies is left in [`Scratch::reply`].
#[inline(always)]
fn claim_source_port(
    settings: &Settings,
    scratch: &mut Scratch,
    forward: u8,
    backend: &Backend,
    now: u64,
) -> Result<u16, Reason> {
    let full_nat = forward == Forward::FullNat.number();
    let client = &scratch.packet.key;
    let source = source_address(forward, client, backend);
    if source.0 == Address::default().0 {
        return Err(Reason::NoSourceAddress);
    }
    let start = first_choice(settings, client);
    scratch.reply = FlowKey {
        source: reply_source(forward, backend),
        destination: source,
        source_port: backend_port(client, backend),
        destination_port: client.source_port,
        protocol: client.protocol,
    };
    for attempt in 0..TRIES {
        if full_nat || attempt > 0 {
            scratch.reply.destination_port = candidate(settings, start, attempt).to_be();
        }
        if REPLIES
            .insert(&scratch.reply, &scratch.packet.key, BPF_NOEXIST as u64)
            .is_ok()
        {
            return Ok(scratch.reply.destination_port);
        }
        if is_free(settings, scratch, now)
            && REPLIES
                .insert(&scratch.reply, &scratch.packet.key, BPF_ANY as u64)
                .is_ok()
        {
            return Ok(scratch.reply.destination_port);
        }
    }
    Err(Reason::NoSourcePort)
}

/// Tells whether the flow that the key of replies leads to has ended, or is the one being recorded.
#[inline(always)]
fn is_free(settings: &Settings, scratch: &mut Scratch, now: u64) -> bool {
    let Some(client) = REPLIES.get_ptr(&scratch.reply) else {
        return true;
    };
    // SAFETY: as in `replied`; a recycled entry at worst leads to another attempt.
    scratch.client = unsafe { &*client }.by_words();
    if scratch.client == scratch.packet.key {
        return true;
    }
    match get(&scratch.client) {
        Some(flow) => flow.source_port != scratch.reply.destination_port || is_over(settings, flow, now),
        None => true,
    }
}
