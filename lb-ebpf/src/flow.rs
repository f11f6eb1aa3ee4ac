//! What holds a connection on its backend: the stage that finds a packet's flow, brings it up to date or begins it.

use core::ptr::read_volatile;

use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_coarse_ns};
use lb_common::{
    abi::{
        Address, Backend, BackendFlags, FlowKey, Forward, Kind, Meta, Reason, Service, Settings, TCP,
        TcpState,
    },
    logic::{
        ageing, flow_state,
        flow_table::{alias_key, long_key, short_key, worth},
        headers::Packet,
        source_port::{TRIES, candidate, first_choice},
        tcp_state::{Sender, first, flags, opens},
    },
};

use crate::{
    client_link,
    cursor::Cursor,
    flood::{self, is_over_budget, needs_no_record},
    flow_table::{
        self, Entry, LEFT, Location, NOWHERE, WRITING, count_end, find_client, find_reply, free_place,
        free_room, hash_of_client, hash_of_reply, hash_of_scratch_reply, is_alone, make_room, of, put,
        put_in_free_place, take_back,
    },
    maps,
    scratch::{Scratch, scratch},
    select, service, source,
};

/// Nanoseconds of `CLOCK_MONOTONIC_COARSE`: a tenth of the cost of the precise clock, and good to a tick.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper takes no argument.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// As [`now`], for every packet: the clock moves with the kernel's ticks, whose count is read at the price of a load,
/// and is kept as long as that stays the same.
#[inline(always)]
fn now_by(scratch: &mut Scratch) -> u64 {
    // SAFETY: the helper takes no argument.
    let tick = unsafe { bpf_jiffies64() };
    if scratch.clock_tick != tick {
        scratch.clock_tick = tick;
        scratch.clock = now();
    }
    scratch.clock
}

/// What a packet of a flow needs of it.
#[derive(Clone, Copy)]
pub struct Known {
    pub backend_id: u32,
    pub service_id: u32,
    /// The [`Forward`] of the flow as its number.
    pub forward: u8,
    /// Source port that the backend sees, network byte order.
    pub source_port: u16,
    /// Index of the link to the client.
    pub link: u32,
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
pub fn known(settings: &Settings, frame: &Cursor, scratch: &mut Scratch, service_id: u32) -> Option<Known> {
    let now = now_by(scratch);
    if opens(scratch.packet.tcp_flags) {
        let is_in_flood = flood::passes_table(service_id, &scratch.packet, now);
        scratch.is_in_flood = is_in_flood.into();
        if is_in_flood {
            return None;
        }
    }
    scratch.hash = hash_of_client(settings, &scratch.packet.key);
    let mut entry = flow_table::of_packet(scratch, service_id)?;
    let known = going_on(settings, &mut entry, &scratch.packet, now)?;
    if Forward::translates(known.forward) && !client_link::is(entry.meta.link(), frame, &scratch.packet) {
        let link = client_link::remember(frame.ingress_ifindex());
        entry.update(entry.meta.with_link(link));
    }
    Some(known)
}

/// As [`known`], where replies need no way back to the client. A function that the verifier checks for itself; gives the
/// flow as a number, see [`Known::from_bits`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn known_local(service_id: u32) -> u64 {
    match (scratch(), maps::settings()) {
        (Some(scratch), Some(settings)) => in_bits(try_known_local(settings, scratch, service_id)),
        _ => failed(Reason::Internal),
    }
}

#[inline(always)]
fn in_bits(known: Option<Known>) -> u64 {
    match known {
        Some(known) => known.into_bits(),
        None => failed(Reason::NoFlow),
    }
}

#[inline(always)]
fn try_known_local(settings: &Settings, scratch: &mut Scratch, service_id: u32) -> Option<Known> {
    scratch.is_in_flood = 0;
    scratch.hash = hash_of_client(settings, &scratch.packet.key);
    let location = find_client(scratch.hash, service_id, of::PACKET);
    if location == NOWHERE {
        return None;
    }
    going_on(
        settings,
        &mut Entry::found(scratch, location),
        &scratch.packet,
        now(),
    )
}

#[inline(always)]
fn going_on(settings: &Settings, entry: &mut Entry, packet: &Packet, now: u64) -> Option<Known> {
    let backend = maps::backend(entry.meta.backend())?;
    let stays = stays(entry, backend, packet);
    let resets = backend.flags & BackendFlags::RESETS != 0;
    // Of most packets there is no more to be looked at.
    if stays && !resets && flow_state::changes_nothing(settings, entry.meta, packet.tcp_flags, now) {
        return Some(Known::of(entry, packet.key.source_port, Reset::None));
    }
    if !stays || ageing::is_over(settings, entry.meta, now) {
        end(settings, entry, now);
        return None;
    }
    let reset = reset(backend, packet);
    let forward = entry.meta.forward();
    let reset = if reset == Reset::OfSender && !Forward::translates(forward) && !is_closed(entry.meta) {
        Reset::OfBackend
    } else {
        reset
    };
    let tcp_flags = if reset == Reset::None {
        packet.tcp_flags
    } else {
        flags::RST
    };
    advance(settings, entry, Sender::Client, tcp_flags, now);
    Some(Known::of(entry, packet.key.source_port, reset))
}

/// Ends a flow whose client's packet starts another. Where late replies of its backend can be told, they are to be.
#[inline(always)]
fn end(settings: &Settings, entry: &mut Entry, now: u64) {
    for _ in 0..2 {
        let meta = entry.meta;
        let has_ended = if Forward::sees_replies(meta.forward()) {
            let state = if meta.is_udp() {
                TcpState::None
            } else {
                TcpState::Closed
            };
            // By the ticks of its new state.
            let age = ageing::ticks(settings, state, now);
            entry.update(meta.with_state(state).with_age(age).left())
        } else {
            entry.remove()
        };
        if has_ended {
            return count_end(meta);
        }
        // Another CPU has ended it, or it has just gone on.
        if !entry.look_again() {
            return;
        }
    }
}

/// Brings the flow of a connection up to date that the kernel has a socket for, however long it was idle; its client's
/// 5-tuple is that of the packet or the one in [`Scratch::client`]. A function that the verifier checks for itself; gives
/// the flow as a number, see [`Known::from_bits`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn seen(service_id: u32, which: u32) -> u64 {
    match (scratch(), maps::settings()) {
        (Some(scratch), Some(settings)) => in_bits(try_seen(settings, scratch, service_id, which)),
        _ => failed(Reason::Internal),
    }
}

#[inline(always)]
fn try_seen(settings: &Settings, scratch: &mut Scratch, service_id: u32, which: u32) -> Option<Known> {
    let (key, sender) = if which == of::PACKET {
        (&scratch.packet.key, Sender::Client)
    } else {
        (&scratch.client, Sender::Backend)
    };
    let port = key.source_port;
    let location = find_client(hash_of_client(settings, key), service_id, which);
    if location == NOWHERE {
        return None;
    }
    let mut entry = Entry::found(scratch, location);
    advance(settings, &mut entry, sender, scratch.packet.tcp_flags, now());
    Some(Known::of(&entry, port, Reset::None))
}

/// Tells whether packets of a client go to another host: where its service has become `local` since the flow began.
#[inline(always)]
pub fn leaves_host(settings: &Settings, scratch: &Scratch, service_id: u32) -> bool {
    let location = find_client(
        hash_of_client(settings, &scratch.packet.key),
        service_id,
        of::PACKET,
    );
    location != NOWHERE && Entry::found(scratch, location).meta.forward() != Forward::Local.number()
}

/// In a number of a function that the verifier checks for itself: not what was asked for but a reason.
const FAILED: u64 = 1 << 63;

#[inline(always)]
const fn failed(reason: Reason) -> u64 {
    FAILED | reason.index() as u64
}

/// Puts a client's packet that belongs to no flow on a backend and records the flow. Gives the flow as a number, see
/// [`Known::from_bits`].
#[inline(always)]
pub fn begin(scratch: &mut Scratch, client_ifindex: u32, service_id: u32) -> u64 {
    let chosen = choose(scratch, client_ifindex, service_id);
    begin_on(scratch, chosen, service_id)
}

/// As [`begin`], where replies need no way back to the client.
#[inline(always)]
pub fn begin_local(scratch: &mut Scratch, service_id: u32) -> u64 {
    let chosen = choose_local(service_id);
    begin_on(scratch, chosen, service_id)
}

/// Records the flow that a backend was [chosen](choose) for.
///
/// Most new flows that no reply is translated of need no call for that. The rest are functions that the verifier checks for
/// themselves: it is the longest way, few packets take it, and the parts use the same stack one after the other. What they
/// tell each other is in the scratch memory.
#[inline(always)]
fn begin_on(scratch: &mut Scratch, chosen: u64, service_id: u32) -> u64 {
    if chosen == UNRECORDED {
        return count_unrecorded(scratch, service_id);
    }
    if chosen & FAILED != 0 {
        return chosen;
    }
    let is_recorded = if chosen == PLAIN {
        record_plain(scratch)
    } else {
        record_replied() == 0
    };
    if is_recorded {
        return count(scratch, service_id, scratch.packet.key.source_port);
    }
    let is_translated = if chosen == PLAIN { 0 } else { needs_source_port() };
    if is_translated & FAILED != 0 {
        return is_translated;
    }
    let location = room(is_translated as u32);
    if location == UNRECORDED {
        return count_unrecorded(scratch, service_id);
    }
    if location & FAILED != 0 {
        return location;
    }
    let port = if is_translated != 0 {
        claim(location)
    } else {
        record(location)
    };
    if port & FAILED != 0 {
        return port;
    }
    count(scratch, service_id, port as u16)
}

/// A new flow that no reply is translated of, and one that replies lead to.
const PLAIN: u64 = 0;
const REPLIED: u64 = 1;

/// Chooses a backend; leaves the flow's meta in the scratch memory. [`UNRECORDED`] where a flood is passed on, else [`PLAIN`]
/// or [`REPLIED`].
#[inline(always)]
fn choose(scratch: &mut Scratch, client_ifindex: u32, service_id: u32) -> u64 {
    let (Some(settings), Some(service)) = (maps::settings(), maps::service(service_id)) else {
        return failed(Reason::Internal);
    };
    let now = now_by(scratch);
    if !opens(scratch.packet.tcp_flags) {
        let is_in_flood = needs_no_record(service, scratch.packet.key.protocol) && is_over_budget(now);
        scratch.is_in_flood = is_in_flood.into();
    }
    match try_choose(settings, scratch, service, service_id, now) {
        Ok(meta) => {
            let link = if Forward::translates(meta.forward()) {
                client_link::remember(client_ifindex)
            } else {
                0
            };
            scratch.began_meta = meta.with_link(link).0;
            if is_in_flood_by(scratch) {
                UNRECORDED
            } else if Forward::has_reply_key(meta.forward(), scratch.packet.key.protocol) {
                REPLIED
            } else {
                PLAIN
            }
        }
        Err(reason) => failed(reason),
    }
}

/// As [`choose`], for [`begin_local`]. A function that the verifier checks for itself, once for TCP and UDP.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn choose_local(service_id: u32) -> u64 {
    // Before anything else is looked up, or the compiler adds to it before it is checked, which Linux 6.12 refuses.
    match scratch() {
        Some(scratch) => choose(scratch, 0, service_id),
        None => failed(Reason::Internal),
    }
}

/// Read as volatile each time: the verifier then has one case to follow for all that comes, and not two.
#[inline(always)]
fn is_in_flood_by(scratch: &Scratch) -> bool {
    // SAFETY: it is a reference.
    unsafe { read_volatile(&raw const scratch.is_in_flood) != 0 }
}

#[inline(always)]
fn try_choose(
    settings: &Settings,
    scratch: &Scratch,
    service: &Service,
    service_id: u32,
    now: u64,
) -> Result<Meta, Reason> {
    let packet = &scratch.packet;
    let is_tcp = packet.key.protocol == TCP as u32;
    let answers = packet.tcp_flags & (flags::SYN | flags::ACK) == flags::SYN | flags::ACK;
    // The reset of a connection that has no record ends it at the backend.
    let is_reset = packet.tcp_flags & flags::RST != 0 && !is_in_flood_by(scratch);
    if is_tcp && (is_reset || answers || packet.is_later_fragment()) {
        return Err(Reason::NoFlow);
    }
    source::admit(service, service_id, &packet.key, now)?;
    let backend_id = select::backend(settings, service, service_id, &packet.key)?;
    let forward = forward_of(service, &packet.key);
    let state = if is_tcp {
        first(packet.tcp_flags)
    } else {
        TcpState::None
    };
    Ok(Meta::new(Kind::Short, service_id, backend_id, forward)
        .with_state(state)
        .with_age(ageing::ticks(settings, state, now)))
}

/// Tells whether a flow that is [`REPLIED`] needs a source port other than the client's, so that its replies are told apart: by 1;
/// the 5-tuple of its replies is left in [`Scratch::reply`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn needs_source_port() -> u64 {
    let Some(scratch) = scratch() else {
        return failed(Reason::Internal);
    };
    let meta = Meta(scratch.began_meta);
    let client = &scratch.packet.key;
    let Some(backend) = maps::backend(meta.backend()) else {
        return failed(Reason::Internal);
    };
    let source = source_address(meta.forward(), client, backend);
    if source.0 == Address::default().0 {
        return failed(Reason::NoSourceAddress);
    }
    scratch.reply = reply_key(client, source, backend);
    if meta.forward() == Forward::FullNat.number() {
        return 1;
    }
    // Another service with the same backend may have the client's port.
    scratch.except = NOWHERE;
    // Both ends of the flow have the client's address and port.
    is_taken(scratch.hash).into()
}

/// Writes a new flow that is [`PLAIN`] where there is nothing, in the line that it is looked for in first; tells whether there
/// was room. So most are, with few steps; all others take the longer way.
#[inline(always)]
fn record_plain(scratch: &mut Scratch) -> bool {
    match maps::backend(Meta(scratch.began_meta).backend()) {
        Some(backend) => put_new(scratch, backend) != NOWHERE,
        None => false,
    }
}

/// As [`record_plain`], of a flow that is [`REPLIED`] and keeps its client's port, since nobody else has it: 0 if so. A
/// function that the verifier checks for itself; one alone, since a call may cost as much as all that it does.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn record_replied() -> u32 {
    let Some(scratch) = scratch() else {
        return 1;
    };
    let meta = Meta(scratch.began_meta);
    let Some(backend) = maps::backend(meta.backend()) else {
        return 1;
    };
    let client = &scratch.packet.key;
    if meta.forward() == Forward::FullNat.number() || client.source.0 == Address::default().0 {
        return 1;
    }
    scratch.reply = reply_key(client, client.source.by_words(), backend);
    if !is_alone(scratch, NOWHERE) {
        return 1;
    }
    let location = put_new(scratch, backend);
    if location == NOWHERE {
        return 1;
    }
    // Another CPU may have written one that has it, too: both see that, or one does.
    if is_alone(scratch, location) {
        return 0;
    }
    take_back(location, scratch.began_meta);
    1
}

/// Writes a new flow that keeps its client's port in a place with nothing, see [`put_in_free_place`]; leaves the kind of its
/// record in [`Scratch::began_meta`].
#[inline(always)]
fn put_new(scratch: &mut Scratch, backend: &Backend) -> Location {
    let key = &scratch.packet.key;
    let (kind, words) = if key.source.is_v4() {
        (Kind::Short, own_short_key(key))
    } else {
        (Kind::Long, own_long_key(key, backend))
    };
    let meta = Meta(scratch.began_meta).of_kind(kind);
    scratch.began_meta = meta.0;
    let location = put_in_free_place(scratch, meta, words);
    if location != NOWHERE {
        flood::count();
    }
    location
}

/// Key of a flow over IPv4 that keeps its client's port.
#[inline(always)]
fn own_short_key(key: &FlowKey) -> u64 {
    short_key(key.source.v4_word(), key.source_port, key.destination_port)
}

/// Key of any flow that keeps its client's port.
#[inline(always)]
fn own_long_key(key: &FlowKey, backend: &Backend) -> u64 {
    long_key(
        key.source_port,
        key.destination_port,
        key.source_port,
        backend.generation,
    )
}

/// The 5-tuple of a backend's replies to a client that it sees by this address and the client's port.
#[inline(always)]
fn reply_key(client: &FlowKey, source: Address, backend: &Backend) -> FlowKey {
    FlowKey {
        source: backend.address.by_words(),
        destination: source,
        source_port: backend_port(client, backend),
        destination_port: client.source_port,
        protocol: client.protocol,
    }
}

/// Makes room for the new flow; gives its location. Where there is none, a flow without replies to translate goes on
/// without a record: its next packets are selected anew, and hashes select the same.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn room(is_translated: u32) -> u64 {
    let Some(scratch) = scratch() else {
        return failed(Reason::Internal);
    };
    let key = &scratch.packet.key;
    let kind = if key.source.is_v4() && is_translated == 0 {
        Kind::Short
    } else {
        Kind::Long
    };
    let meta = Meta(scratch.began_meta).of_kind(kind);
    scratch.began_meta = meta.0;
    flood::count();
    let mut location = free_place(scratch.hash, kind);
    if location == NOWHERE {
        location = make_room(scratch.hash, kind as u32, limit(meta));
    }
    if location != NOWHERE {
        location
    } else if Forward::has_reply_key(meta.forward(), key.protocol) {
        failed(Reason::FlowTableFull)
    } else {
        UNRECORDED
    }
}

/// Not a location: that of a flow without a record.
const UNRECORDED: u64 = FAILED - 1;

/// What a flow is worth that has to make room for a new one: what is opening takes no place of what is open.
#[inline(always)]
fn limit(meta: Meta) -> u32 {
    if matches!(meta.state(), TcpState::Established | TcpState::FinClient) {
        // One that nobody has seen begin: an open one that was idle for as long as a quarter of its timeout goes for it.
        worth::OPEN - 32
    } else {
        worth::CLOSING
    }
}

/// Writes the new flow, whose source port is the client's; gives that.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn record(location: u64) -> u64 {
    let Some(scratch) = scratch() else {
        return failed(Reason::Internal);
    };
    let key = &scratch.packet.key;
    let meta = Meta(scratch.began_meta);
    let Some(backend) = maps::backend(meta.backend()) else {
        return failed(Reason::Internal);
    };
    let source_port = key.source_port;
    let words = if meta.is(Kind::Short) {
        own_short_key(key)
    } else {
        own_long_key(key, backend)
    };
    put(location, words, meta.0);
    if !Forward::has_reply_key(meta.forward(), key.protocol) {
        return source_port.into();
    }
    // As in `claim`.
    scratch.except = location;
    if is_taken(scratch.hash) == 0 {
        return source_port.into();
    }
    take_back(location, meta.0);
    failed(Reason::NoSourcePort)
}

/// Counts a new flow that goes on without a record; gives it as a number.
#[inline(always)]
fn count_unrecorded(scratch: &Scratch, service_id: u32) -> u64 {
    let meta = Meta(scratch.began_meta);
    let packet = &scratch.packet;
    // Of the others nobody knows which is the first.
    if opens(packet.tcp_flags)
        && let Some(counters) = maps::backend_counters(meta.backend())
    {
        counters.flows += 1;
    }
    begun(meta, service_id, packet.key.source_port)
}

/// Counts the new flow; gives it as a number.
#[inline(always)]
fn count(scratch: &Scratch, service_id: u32, source_port: u16) -> u64 {
    let meta = Meta(scratch.began_meta);
    if let Some(counters) = maps::backend_counters(meta.backend()) {
        counters.flows += 1;
    }
    if !ageing::has_ended(meta.forward(), meta.state()) {
        maps::count_opened(meta.backend());
    }
    begun(meta, service_id, source_port)
}

/// A new flow as a number.
#[inline(always)]
fn begun(meta: Meta, service_id: u32, source_port: u16) -> u64 {
    Known {
        backend_id: meta.backend(),
        service_id,
        forward: meta.forward(),
        source_port,
        link: meta.link(),
        reset: Reset::None,
    }
    .into_bits()
}

impl Known {
    #[inline(always)]
    fn of(entry: &Entry, client_port: u16, reset: Reset) -> Self {
        let meta = entry.meta;
        Self {
            backend_id: meta.backend(),
            service_id: meta.service(),
            forward: meta.forward(),
            source_port: entry.source_port(client_port),
            link: meta.link(),
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
    pub fn from_bits(bits: u64, service_id: u32) -> Result<Self, Reason> {
        if bits & FAILED != 0 {
            return Err(Reason::from_index(bits as u32));
        }
        Ok(Self {
            backend_id: bits as u32,
            service_id,
            forward: (bits >> 48) as u8,
            source_port: (bits >> 32) as u16,
            link: 0,
            reset: Reset::None,
        })
    }
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
fn is_closed(meta: Meta) -> bool {
    meta.state() as u8 == TcpState::Closed as u8
}

/// What is known of the flow that a 5-tuple is that of replies of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Reply<T> {
    /// Nothing.
    None,
    /// Its client has left that backend.
    Late,
    Of(T),
}

/// The flow of a backend's packet, brought up to date, and whether the packet is to be answered with a reset; the
/// client's 5-tuple of it is put into [`Scratch::client`].
#[inline(always)]
pub fn of_reply(settings: &Settings, scratch: &mut Scratch) -> Reply<Known> {
    let hash = hash_of_reply(settings, &scratch.packet.key);
    let location = flow_table::of_reply_packet(scratch, hash);
    let mut entry = match entry_of(scratch, location) {
        Reply::Of(entry) => entry,
        Reply::None => return Reply::None,
        Reply::Late => return Reply::Late,
    };
    let Some(backend) = maps::backend(entry.meta.backend()) else {
        return Reply::None;
    };
    let reset = reset(backend, &scratch.packet);
    let tcp_flags = if reset == Reset::None {
        scratch.packet.tcp_flags
    } else {
        flags::RST
    };
    advance(settings, &mut entry, Sender::Backend, tcp_flags, now_by(scratch));
    Reply::Of(Known::of(&entry, scratch.client.source_port, reset))
}

/// The flow that [`Scratch::reply`] leads to; the client's 5-tuple of it is put into [`Scratch::client`].
#[inline(always)]
pub fn quoted_reply(settings: &Settings, scratch: &mut Scratch) -> Option<Known> {
    let hash = hash_of_reply(settings, &scratch.reply);
    match replied(scratch, hash, of::REPLY) {
        Reply::Of(entry) => Some(Known::of(&entry, scratch.client.source_port, Reset::None)),
        Reply::None | Reply::Late => None,
    }
}

/// As [`of_reply`], for a datagram of a process whose source is in [`Scratch::reply`] as it is looked for.
#[inline(always)]
pub fn answered(settings: &Settings, scratch: &mut Scratch) -> Option<Known> {
    let hash = hash_of_reply(settings, &scratch.reply);
    match replied(scratch, hash, of::REPLY | of::LOCAL) {
        Reply::Of(mut entry) => {
            advance(settings, &mut entry, Sender::Backend, 0, now());
            Some(Known::of(&entry, scratch.client.source_port, Reset::None))
        }
        Reply::None | Reply::Late => None,
    }
}

#[inline(always)]
fn replied(scratch: &mut Scratch, hash: u64, which: u32) -> Reply<Entry> {
    scratch.except = NOWHERE;
    let location = find_reply(hash, which);
    entry_of(scratch, location)
}

#[inline(always)]
fn entry_of(scratch: &Scratch, location: u64) -> Reply<Entry> {
    match location {
        NOWHERE => Reply::None,
        LEFT => Reply::Late,
        _ => {
            let entry = Entry::found(scratch, location);
            match maps::backend(entry.meta.backend()) {
                Some(backend) if entry.is_of_generation(backend.generation) => Reply::Of(entry),
                // To an address that this host had then.
                _ => Reply::Late,
            }
        }
    }
}

/// The flow that [`Scratch::client`] is the client's 5-tuple of.
#[inline(always)]
pub fn of_client(settings: &Settings, scratch: &mut Scratch) -> Option<Known> {
    let service_id = service::find(of::CLIENT)?;
    let port = scratch.client.source_port;
    let location = find_client(hash_of_client(settings, &scratch.client), service_id, of::CLIENT);
    if location == NOWHERE {
        return None;
    }
    Some(Known::of(&Entry::found(scratch, location), port, Reset::None))
}

/// Moves the state of a flow on, and its age.
#[inline(always)]
fn advance(settings: &Settings, entry: &mut Entry, sender: Sender, tcp_flags: u8, now: u64) {
    for _ in 0..2 {
        let former = entry.meta;
        let meta = flow_state::advanced(settings, former, sender, tcp_flags, now);
        // Most packets change nothing: the cache line stays clean.
        if meta == former {
            return;
        }
        if entry.update(meta) {
            if !ageing::has_ended(former.forward(), former.state())
                && ageing::has_ended(meta.forward(), meta.state())
            {
                maps::count_ended(meta.backend());
            }
            return;
        }
        // Another CPU has moved it on, or it is another flow by now.
        if !entry.look_again() {
            return;
        }
    }
}

/// Tells whether a flow goes on with a packet, or the packet starts a new one under the same 5-tuple.
#[inline(always)]
fn stays(entry: &Entry, backend: &Backend, packet: &Packet) -> bool {
    if !entry.is_of_generation(backend.generation) || backend.service_plus_one == 0 {
        return false;
    }
    if packet.key.protocol != TCP as u32 {
        return backend.flags & BackendFlags::KEEPS_UDP != 0;
    }
    if !opens(packet.tcp_flags) {
        return true;
    }
    (entry.meta.state() as u8) < TcpState::FinClient as u8 && backend.flags & BackendFlags::ACCEPTS_NEW != 0
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
    flow_table::backend_port(client.destination_port, backend)
}

/// Tells whether another flow than the one at [`Scratch::except`] has the 5-tuple in [`Scratch::reply`], of this hash, for its
/// replies. One that is over does not have it any more after that.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn is_taken(hash: u64) -> u32 {
    let (Some(scratch), Some(settings)) = (scratch(), maps::settings()) else {
        return 1;
    };
    let is_local = Meta(scratch.began_meta).forward() == Forward::Local.number();
    let which = of::REPLY | of::CLAIM | if is_local { of::LOCAL } else { 0 };
    let location = find_reply(hash, which);
    if location == NOWHERE || location == LEFT {
        return 0;
    }
    if location == WRITING {
        return 1;
    }
    let found = Entry::found(scratch, location);
    // It would get the replies: they lead to the first that is found. Where a packet has just come for it, it goes on.
    if ageing::is_over(settings, found.meta, now()) && found.remove() {
        count_end(found.meta);
        return 0;
    }
    1
}

/// Where the search for a source port starts, see [`first_choice`]; by itself it takes stack only while it runs.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn first_port() -> u32 {
    match (scratch(), maps::settings()) {
        (Some(scratch), Some(settings)) => first_choice(settings, &scratch.packet.key),
        _ => 0,
    }
}

/// Takes a source port that no other flow uses towards the backend for the flow for which there is room at `location`, and
/// writes the flow there; gives the port. Where there is none, the room is free again.
///
/// A function that the verifier checks for itself, once for all that follows its loop.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn claim(location: u64) -> u64 {
    let (Some(scratch), Some(settings)) = (scratch(), maps::settings()) else {
        return failed(Reason::Internal);
    };
    let meta = Meta(scratch.began_meta);
    let start = first_port();
    for attempt in 0..TRIES {
        let port = candidate(settings, start, attempt).to_be();
        scratch.reply.destination_port = port;
        scratch.except = location;
        let hash = hash_of_scratch_reply();
        if is_taken(hash) != 0 {
            continue;
        }
        let alias = make_room(hash, Kind::Alias as u32, limit(meta));
        if alias == NOWHERE {
            continue;
        }
        put_alias(location, alias);
        // Another CPU may have taken the same port meanwhile: both see that, or one does.
        if is_taken(hash) == 0 {
            put_translated(location);
            return port.into();
        }
        take_back(alias, meta.of_kind(Kind::Alias).0);
    }
    free_room(location);
    failed(Reason::NoSourcePort)
}

/// Writes the new flow, whose source port is that of [`Scratch::reply`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn put_translated(location: u64) -> u32 {
    let Some(scratch) = scratch() else {
        return 1;
    };
    let meta = Meta(scratch.began_meta);
    let Some(backend) = maps::backend(meta.backend()) else {
        return 1;
    };
    let (client, port) = (&scratch.packet.key, scratch.reply.destination_port);
    let key = long_key(
        client.source_port,
        client.destination_port,
        port,
        backend.generation,
    );
    put(location, key, meta.0)
}

/// Writes the alias that leads to the new flow, before the flow is there.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn put_alias(location: u64, alias: u64) -> u32 {
    let Some(scratch) = scratch() else {
        return 1;
    };
    let key = alias_key(
        (location >> 3) as u32,
        location as usize & 7,
        scratch.reply.destination_port,
        scratch.reply.source_port,
    );
    put(alias, key, Meta(scratch.began_meta).of_kind(Kind::Alias).0)
}
