//! The flow table in the kernel's memory: the searches and the room for new flows, as functions that the verifier checks
//! for themselves. How it works is in `lb_common::logic::flow_table`.

use lb_common::{
    abi::{Address, Backend, FlowKey, Forward, Kind, LINE, Meta, Settings, UDP},
    logic::{
        ageing,
        flow_table::{
            self, ALIASED_PORTS, BUCKET, CLIENT, CLIENT_PORT, Found, PORTS, ReplyKeys, Words, alias_key,
            bucket_of, end_hash, key_at, line_of, long_key, mark_of, mark_overflow, meta_at, other_line,
            overflows, second_bucket_of, short_key, worth,
        },
    },
};

use crate::{
    bucket::InKernel,
    flow::now,
    maps,
    scratch::{Scratch, scratch},
};

/// Where a flow is, as a number: the index of its bucket, and three bits of its unit.
pub type Location = u64;

/// Not a location: there is no such flow.
pub const NOWHERE: Location = u64::MAX;
/// Not a location: there was such a flow, but its client has another backend by now.
pub const LEFT: Location = u64::MAX - 1;
/// Not a location: another CPU writes such a flow right now.
pub const WRITING: Location = u64::MAX - 2;

/// What a search is for: a 5-tuple of [`Scratch`], and more about replies.
pub mod of {
    pub const PACKET: u32 = 0;
    pub const CLIENT: u32 = 1;
    pub const REPLY: u32 = 2;
    /// The bits that name the 5-tuple.
    pub const TUPLE: u32 = 3;
    /// Of processes on this host, and of no other backends; else the other way round. Their address may be any.
    pub const LOCAL: u32 = 4;
    /// For a source port that is to be claimed: a flow that is being written has it, too.
    pub const CLAIM: u32 = 8;
}

#[inline(always)]
fn bucket(index: u32) -> Option<InKernel> {
    maps::FLOWS.get_ptr_mut(index).map(InKernel)
}

/// The flow that a search has found, as it was then.
#[derive(Clone, Copy)]
pub struct Entry {
    pub location: Location,
    pub key: u64,
    pub meta: Meta,
}

impl Entry {
    /// What the last search has found.
    #[inline(always)]
    pub fn found(scratch: &Scratch, location: Location) -> Self {
        Self {
            location,
            key: scratch.found_key,
            meta: Meta(scratch.found_meta),
        }
    }

    #[inline(always)]
    fn parts(&self) -> Option<(InKernel, Found)> {
        let bucket = bucket((self.location >> 3) as u32)?;
        let found = Found {
            unit: self.location as usize & 7,
            key: self.key,
            meta: self.meta,
        };
        Some((bucket, found))
    }

    /// Source port that the backend sees, network byte order, of a client's port.
    #[inline(always)]
    pub fn source_port(&self, client_port: u16) -> u16 {
        if self.meta.is(Kind::Long) {
            (self.key >> 32) as u16
        } else {
            client_port
        }
    }

    /// The generation of the backend that a long flow began with, and that of any other.
    #[inline(always)]
    pub fn is_of_generation(&self, generation: u32) -> bool {
        !self.meta.is(Kind::Long) || (self.key >> 48) as u32 == generation & 0xffff
    }

    /// Replaces what is known of the flow, unless somebody else has; tells whether it did.
    #[inline(always)]
    pub fn update(&mut self, meta: Meta) -> bool {
        let Some((bucket, found)) = self.parts() else {
            return false;
        };
        if !flow_table::update(&bucket, &found, meta) {
            return false;
        }
        self.meta = meta;
        true
    }

    /// Looks at the flow once more, where [`Self::update`] has failed; tells whether it is still the same.
    #[inline(always)]
    pub fn look_again(&mut self) -> bool {
        let Some((bucket, found)) = self.parts() else {
            return false;
        };
        match flow_table::again(&bucket, &found) {
            Some(meta) => {
                self.meta = meta;
                true
            }
            None => false,
        }
    }

    /// Removes the flow, unless its meta has changed; tells whether it did.
    #[inline(always)]
    pub fn remove(&self) -> bool {
        (self.parts()).is_some_and(|(bucket, found)| flow_table::remove(&bucket, &found))
    }
}

#[inline(always)]
pub fn tuple(scratch: &Scratch, which: u32) -> &FlowKey {
    match which & of::TUPLE {
        of::PACKET => &scratch.packet.key,
        of::CLIENT => &scratch.client,
        _ => &scratch.reply,
    }
}

/// Where the flow is that a 5-tuple is the client's of; it is left in the scratch memory, see [`Entry::found`].
#[inline(always)]
pub fn find_client(hash: u64, service_id: u32, which: u32) -> Location {
    let (index, line) = place(hash, 0);
    match client_in(index, line as u32, service_id, which) {
        NOWHERE if has_mark(index, mark_of(line)) => find_client_elsewhere(hash, service_id, which),
        location => location,
    }
}

#[inline(always)]
fn has_mark(index: u32, unit: usize) -> bool {
    bucket(index).is_some_and(|bucket| overflows(&bucket, unit))
}

/// The flow of a client's packet, by [`Scratch::hash`]. Without a call where it is in the line that most are.
#[inline(always)]
pub fn of_packet(scratch: &mut Scratch, service_id: u32) -> Option<Entry> {
    let key = &scratch.packet.key;
    let hash = scratch.hash;
    let (index, line) = place(hash, 0);
    let bucket = bucket(index)?;
    let mut found = None;
    if key.source.is_v4() {
        let want = short_key(key.source.v4_word(), key.source_port, key.destination_port);
        found = short_of_client(&bucket, line, want, service_id);
    }
    if found.is_none() {
        found = long_of_client(&bucket, line, key, service_id);
    }
    if let Some(found) = found {
        return Some(Entry {
            location: location(index, found.unit),
            key: found.key,
            meta: found.meta,
        });
    }
    if !overflows(&bucket, mark_of(line)) {
        return None;
    }
    match find_client_elsewhere(hash, service_id, of::PACKET) {
        NOWHERE => None,
        location => Some(Entry::found(scratch, location)),
    }
}

#[inline(always)]
fn location(index: u32, unit: usize) -> Location {
    (index << 3 | unit as u32) as u64
}

/// As [`find_client`], where the line that it is in mostly has a mark.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_client_elsewhere(hash: u64, service_id: u32, which: u32) -> Location {
    for step in 1..4 {
        let (index, line) = place(hash, step >> 1);
        let line = if step & 1 == 0 { line } else { other_line(line) };
        let location = client_in(index, line as u32, service_id, which);
        if location != NOWHERE {
            return location;
        }
        if step == 1 && !has_mark(index, BUCKET) {
            return NOWHERE;
        }
    }
    NOWHERE
}

/// As [`find_client`], in one line of a bucket.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn client_in(index: u32, line: u32, service_id: u32, which: u32) -> Location {
    let (Some(scratch), Some(bucket)) = (scratch(), bucket(index)) else {
        return NOWHERE;
    };
    let key = tuple(scratch, which);
    let line = line as usize & LINE;
    if key.source.is_v4() {
        let want = short_key(key.source.v4_word(), key.source_port, key.destination_port);
        if let Some(found) = short_of_client(&bucket, line, want, service_id) {
            return leave(scratch, index, &found);
        }
    }
    match long_of_client(&bucket, line, key, service_id) {
        Some(found) => leave(scratch, index, &found),
        None => NOWHERE,
    }
}

/// The bucket in which a flow is looked for first, or secondly, and the line there.
#[inline(always)]
fn place(hash: u64, round: u32) -> (u32, usize) {
    let buckets = maps::flow_buckets();
    if round == 0 {
        (bucket_of(hash, buckets), line_of(hash))
    } else {
        (second_bucket_of(hash, buckets), line_of(hash))
    }
}

#[inline(always)]
fn leave(scratch: &mut Scratch, index: u32, found: &Found) -> Location {
    scratch.found_key = found.key;
    scratch.found_meta = found.meta.0;
    location(index, found.unit)
}

#[inline(always)]
fn is_of_client(found: &Found, service_id: u32) -> bool {
    found.meta.service() == service_id && !found.meta.is_left()
}

#[inline(always)]
fn short_of_client(bucket: &InKernel, line: usize, want: u64, service_id: u32) -> Option<Found> {
    let first = line / 2;
    let mut step = 0;
    while step < 4 {
        if let Some(found) = flow_table::at(bucket, first + step, Kind::Short, want, u64::MAX)
            && is_of_client(&found, service_id)
        {
            return Some(found);
        }
        step += 1;
    }
    None
}

#[inline(always)]
fn long_of_client(bucket: &InKernel, line: usize, key: &FlowKey, service_id: u32) -> Option<Found> {
    let want = long_key(key.source_port, key.destination_port, 0, 0);
    let first = line / 2;
    let mut step = 0;
    while step < 4 {
        if let Some(found) = flow_table::long_at(bucket, first + step, &key.source, want, PORTS)
            && is_of_client(&found, service_id)
        {
            return Some(found);
        }
        step += 2;
    }
    None
}

/// Where the flow is that a 5-tuple is that of replies of, other than at [`Scratch::except`]; it is left in the scratch
/// memory, see [`Entry::found`], and its client's 5-tuple in [`Scratch::client`].
#[inline(always)]
pub fn find_reply(hash: u64, which: u32) -> Location {
    let mut nowhere = NOWHERE;
    for step in 0..4 {
        let (index, line) = place(hash, step >> 1);
        let searched = if step & 1 == 0 { line } else { other_line(line) };
        match reply_in(index, searched as u32, which) {
            NOWHERE => {}
            LEFT => nowhere = LEFT,
            location => return location,
        }
        let mark = match step {
            0 => mark_of(line),
            1 => BUCKET,
            _ => continue,
        };
        if !has_mark(index, mark) {
            break;
        }
    }
    nowhere
}

/// Tells that no other flow than that at a location has the 5-tuple in [`Scratch::reply`], which ends where the packet in the
/// scratch memory comes from, for its replies. `false` where that takes more than a look at one bucket.
#[inline(always)]
pub fn is_alone(scratch: &Scratch, own: Location) -> bool {
    let (index, line) = place(scratch.hash, 0);
    let own = if own == NOWHERE {
        None
    } else {
        Some(own as usize & 7)
    };
    bucket(index)
        .is_some_and(|bucket| flow_table::is_alone(&bucket, line, &ReplyKeys::of(&scratch.reply), own))
}

/// As [`find_reply`], in one line of a bucket.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn reply_in(index: u32, line: u32, which: u32) -> Location {
    let (Some(scratch), Some(bucket)) = (scratch(), bucket(index)) else {
        return NOWHERE;
    };
    let keys = ReplyKeys::of(tuple(scratch, which));
    let first = (line as usize & LINE) / 2;
    let mut nowhere = NOWHERE;
    for step in 0..4 {
        let unit = first + step;
        // Told apart here, but for a few, since each call costs more than this.
        let key = bucket.load(key_at(unit));
        if keys.are_of_alias(key) {
            match aliased(index, unit as u32, which) {
                NOWHERE => {}
                LEFT => nowhere = LEFT,
                location => return location,
            }
        }
        if keys.are_of_flow(key) {
            match replied(index, unit as u32, which) {
                NOWHERE => {}
                LEFT => nowhere = LEFT,
                location => return location,
            }
        }
    }
    nowhere
}

/// The flow that a packet is a reply of, as [`find_reply`]. Without a call where it is of the kind and in the line that
/// most are.
#[inline(always)]
pub fn of_reply_packet(scratch: &mut Scratch, hash: u64) -> Location {
    scratch.except = NOWHERE;
    let reply = &scratch.packet.key;
    let client = reply.destination.by_words();
    let (index, line) = place(hash, 0);
    if let Some(bucket) = bucket(index)
        && let Some((found, ports)) = plain_reply(&bucket, line, reply)
    {
        let location = answers(scratch, of::PACKET, index, &found, ports, client);
        if location != NOWHERE && location != LEFT {
            return location;
        }
    }
    find_reply_of_packet(hash)
}

/// As [`find_reply`], of the packet itself.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_reply_of_packet(hash: u64) -> Location {
    find_reply(hash, of::PACKET)
}

/// A flow in one line of a bucket whose client a reply is for and that no alias leads to; with its client's port and the
/// port it connected to.
#[inline(always)]
fn plain_reply(bucket: &InKernel, line: usize, reply: &FlowKey) -> Option<(Found, (u16, u16))> {
    let client = &reply.destination;
    let first = line / 2;
    let mut step = 0;
    if client.is_v4() {
        let want = short_key(client.v4_word(), reply.destination_port, 0);
        while step < 4 {
            if let Some(found) = flow_table::at(bucket, first + step, Kind::Short, want, CLIENT) {
                return Some((found, ((found.key >> 32) as u16, (found.key >> 48) as u16)));
            }
            step += 1;
        }
        return None;
    }
    let want = reply.destination_port as u64;
    while step < 4 {
        if let Some(found) = flow_table::long_at(bucket, first + step, client, want, CLIENT_PORT)
            && is_plain(&found, reply)
        {
            return Some((found, (found.key as u16, (found.key >> 16) as u16)));
        }
        step += 2;
    }
    None
}

/// Tells whether replies of a long flow are for its client's address and port, so that no alias leads to it.
#[inline(always)]
fn is_plain(found: &Found, reply: &FlowKey) -> bool {
    (found.key >> 32) as u16 == reply.destination_port && found.meta.forward() != Forward::FullNat.number()
}

/// As [`find_reply`], at one unit of a bucket and unless an alias leads to the flow: a function that the verifier checks
/// for itself, once for all of them.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn replied(index: u32, unit: u32, which: u32) -> Location {
    let (Some(scratch), Some(bucket)) = (scratch(), bucket(index)) else {
        return NOWHERE;
    };
    let (reply, unit) = (tuple(scratch, which), unit as usize & 7);
    let client = &reply.destination;
    if client.is_v4() {
        let want = short_key(client.v4_word(), reply.destination_port, 0);
        if let Some(found) = flow_table::at(&bucket, unit, Kind::Short, want, CLIENT) {
            let ports = ((found.key >> 32) as u16, (found.key >> 48) as u16);
            return answers(scratch, which, index, &found, ports, client.by_words());
        }
    }
    // Or the flow whose second unit this is: that a number is even is more than the verifier can tell.
    let want = reply.destination_port as u64;
    if let Some(found) = flow_table::long_at(&bucket, unit & 6, client, want, CLIENT_PORT)
        && is_plain(&found, reply)
    {
        let ports = (found.key as u16, (found.key >> 16) as u16);
        return answers(scratch, which, index, &found, ports, client.by_words());
    }
    NOWHERE
}

/// As [`replied`], for a flow that an alias at the unit leads to.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn aliased(index: u32, unit: u32, which: u32) -> Location {
    let (Some(scratch), Some(aliases)) = (scratch(), bucket(index)) else {
        return NOWHERE;
    };
    let (reply, unit) = (tuple(scratch, which), unit as usize & 7);
    let want = alias_key(0, 0, reply.destination_port, reply.source_port);
    match flow_table::at(&aliases, unit, Kind::Alias, want, ALIASED_PORTS) {
        Some(alias) => leads_to(scratch, which, &alias),
        None => NOWHERE,
    }
}

/// The flow that an alias leads to.
#[inline(always)]
fn leads_to(scratch: &mut Scratch, which: u32, alias: &Found) -> Location {
    let reply = tuple(scratch, which);
    let index = alias.key as u32 >> 3;
    let (Some(bucket), Some(backend)) = (bucket(index), maps::backend(alias.meta.backend())) else {
        return NOWHERE;
    };
    let location = alias.key as u32 as Location;
    if which & of::CLAIM != 0 && location != scratch.except && is_being_written(&bucket, location) {
        // Whose it will be is not known yet: rather another port than the same.
        return if backend.address.0 == reply.source.0 {
            WRITING
        } else {
            NOWHERE
        };
    }
    let want = (reply.destination_port as u64) << 32;
    let Some(found) = flow_table::at(&bucket, alias.key as usize & 6, Kind::Long, want, 0xffff << 32) else {
        return NOWHERE;
    };
    let Some(client) = flow_table::client_of_long(&bucket, &found) else {
        return NOWHERE;
    };
    let source = if found.meta.forward() == Forward::FullNat.number() {
        &backend.source
    } else {
        &client
    };
    if !found.meta.of_kind(Kind::Alias).is_of_same(alias.meta) || source.0 != reply.destination.0 {
        return NOWHERE;
    }
    let ports = (found.key as u16, (found.key >> 16) as u16);
    answers(scratch, which, index, &found, ports, client)
}

#[inline(always)]
fn is_being_written(bucket: &InKernel, location: Location) -> bool {
    Meta(bucket.load(meta_at(location as usize & 6))).is_busy()
}

/// The location of a flow, if a 5-tuple is one of replies of its backend.
#[inline(always)]
fn answers(
    scratch: &mut Scratch,
    which: u32,
    index: u32,
    found: &Found,
    (client_port, port): (u16, u16),
    client: Address,
) -> Location {
    let location = location(index, found.unit);
    let reply = tuple(scratch, which);
    if location == scratch.except || !is_answered_by(found.meta, port, reply, which) {
        return NOWHERE;
    }
    if found.meta.is_left() {
        return LEFT;
    }
    let Some(service) = maps::service(found.meta.service()) else {
        return NOWHERE;
    };
    scratch.client = FlowKey {
        source: client,
        destination: service.vip.by_words(),
        source_port: client_port,
        destination_port: port,
        protocol: reply.protocol,
    };
    leave(scratch, index, found)
}

/// Tells whether a 5-tuple is one of replies of a flow's backend, by its source and protocol.
#[inline(always)]
fn is_answered_by(meta: Meta, port: u16, reply: &FlowKey, which: u32) -> bool {
    let Some(backend) = maps::backend(meta.backend()) else {
        return false;
    };
    let is_local = meta.forward() == Forward::Local.number();
    is_local == (which & of::LOCAL != 0)
        && Forward::has_reply_key(meta.forward(), reply.protocol)
        && meta.is_udp() == (reply.protocol == UDP as u32)
        && backend_port(port, backend) == reply.source_port
        // A process on this host that is bound to no address answers from the one that the route to the client has,
        // whatever address the client's packet was for.
        && (is_local || backend.address.0 == reply.source.0)
}

/// The port that a backend is reached on, of the one that the client has connected to.
#[inline(always)]
pub fn backend_port(port: u16, backend: &Backend) -> u16 {
    if backend.port == 0 { port } else { backend.port }
}

/// What has to go at a unit for a flow of a kind, as [`flow_table::place_worth`]. A function that the verifier checks for
/// itself, once for all units.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn worth_at(index: u32, unit: u32, kind: u32) -> u32 {
    let Some(bucket) = bucket(index) else {
        return worth::BUSY;
    };
    let kind = if kind == Kind::Long as u32 {
        Kind::Long
    } else {
        Kind::Short
    };
    let worth_of = |unit, meta| worth_now(bucket.load(key_at(unit)), meta);
    flow_table::place_worth(&bucket, unit as usize & 7, kind, worth_of)
}

/// What a flow is worth now, see [`flow_table::worth`]; an alias is worth what its flow is.
#[inline(always)]
fn worth_now(key: u64, mut meta: Meta) -> u32 {
    let Some(settings) = maps::settings() else {
        return worth::BUSY;
    };
    if meta.is(Kind::Alias) && !meta.is_busy() {
        let alias = meta;
        let Some(bucket) = bucket(key as u32 >> 3) else {
            return worth::NOTHING;
        };
        let unit = key as usize & 6;
        meta = Meta(bucket.load(meta_at(unit)));
        let is_its = meta.of_kind(Kind::Alias).is_of_same(alias)
            && meta.is(Kind::Long)
            && (bucket.load(key_at(unit)) >> 32) as u16 == (key >> 32) as u16;
        if !meta.is_busy() && !is_its {
            return worth::NOTHING;
        }
    }
    flow_table::worth(settings, meta, now())
}

/// Makes room for a flow of a kind, see [`flow_table::make_room`]; gives its location or [`NOWHERE`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn make_room(hash: u64, kind: u32, limit: u32) -> Location {
    let (first, line) = place(hash, 0);
    let (second, _) = place(hash, 1);
    // No flow that goes on gives way while there is room for another in either bucket.
    let free = if limit < worth::LIVE { limit } else { worth::LIVE };
    for step in 0..4 {
        let index = if step & 1 == 0 { first } else { second };
        let limit = if step < 2 { free } else { limit };
        let location = room_in(index, line as u32, kind, limit);
        if location == NOWHERE {
            continue;
        }
        let unit = location as usize & 7;
        if index == first && unit & 4 == line / 2 {
            return location;
        }
        // Before the flow can be seen there.
        if let Some(home) = bucket(first)
            && mark_overflow(&home, mark_of(line))
            && (index == first || mark_overflow(&home, BUCKET))
        {
            return location;
        }
        free_room(location);
        return NOWHERE;
    }
    NOWHERE
}

/// As [`make_room`], in one bucket.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn room_in(index: u32, line: u32, kind: u32, limit: u32) -> Location {
    let kind = match kind {
        1 => Kind::Short,
        2 => Kind::Long,
        _ => Kind::Alias,
    };
    let Some(bucket) = bucket(index) else {
        return NOWHERE;
    };
    let line = line as usize & LINE;
    let worth = |unit| worth_at(index, unit as u32, kind as u32);
    let Some(room) = flow_table::make_room(&bucket, line, kind, limit, worth) else {
        return NOWHERE;
    };
    for meta in room.evicted {
        count_end(meta);
    }
    location(index, room.unit)
}

/// Takes a place with nothing in the line where a flow is looked for first; gives its location or [`NOWHERE`].
#[inline(always)]
pub fn free_place(hash: u64, kind: Kind) -> Location {
    match take_free(hash, kind) {
        Some((index, _, unit)) => location(index, unit),
        None => NOWHERE,
    }
}

/// Takes such a place; gives the index of its bucket, the bucket and the unit.
#[inline(always)]
fn take_free(hash: u64, kind: Kind) -> Option<(u32, InKernel, usize)> {
    let (index, line) = place(hash, 0);
    let bucket = bucket(index)?;
    let unit = flow_table::take_free(&bucket, line, kind)?;
    Some((index, bucket, unit))
}

/// Writes the flow of the packet in the scratch memory into such a place; gives its location or [`NOWHERE`].
#[inline(always)]
pub fn put_in_free_place(scratch: &Scratch, meta: Meta, key: u64) -> Location {
    let kind = if meta.is(Kind::Long) {
        Kind::Long
    } else {
        Kind::Short
    };
    let Some((index, bucket, unit)) = take_free(scratch.hash, kind) else {
        return NOWHERE;
    };
    write(scratch, &bucket, unit, key, meta);
    location(index, unit)
}

/// Writes a flow, or an alias, at a unit that was taken for it.
#[inline(always)]
fn write(scratch: &Scratch, bucket: &InKernel, unit: usize, key: u64, meta: Meta) {
    if meta.is(Kind::Long) {
        flow_table::put_long(bucket, unit & 6, key, &scratch.packet.key.source, meta);
    } else {
        flow_table::put(bucket, unit & 7, key, meta);
    }
}

/// Counts the end of a flow that another takes the place of.
#[inline(always)]
pub fn count_end(meta: Meta) {
    if (meta.is(Kind::Short) || meta.is(Kind::Long))
        && !meta.is_left()
        && !ageing::has_ended(meta.forward(), meta.state())
    {
        maps::count_ended(meta.backend());
    }
}

/// Writes the flow of the packet in the scratch memory, or its alias, where there is room for it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn put(location: Location, key: u64, meta: u64) -> u32 {
    let (Some(scratch), Some(bucket)) = (scratch(), bucket((location >> 3) as u32)) else {
        return 1;
    };
    write(scratch, &bucket, location as usize, key, Meta(meta));
    0
}

/// [`hash_of_reply`] of the 5-tuple in [`Scratch::reply`], for ways that are long enough.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hash_of_scratch_reply() -> u64 {
    match (scratch(), maps::settings()) {
        (Some(scratch), Some(settings)) => hash_of_reply(settings, &scratch.reply),
        _ => 0,
    }
}

/// Frees the room for a flow that has not been written.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn free_room(location: Location) -> u32 {
    if let Some(bucket) = bucket((location >> 3) as u32) {
        let unit = location as usize & 7;
        if Meta(bucket.load(meta_at(unit))).is(Kind::Long) {
            flow_table::free_long(&bucket, unit & 6);
        } else {
            flow_table::free(&bucket, unit);
        }
    }
    0
}

/// Removes a flow or an alias that was written with this meta, unless its place has become another's.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn take_back(location: Location, meta: u64) -> u32 {
    let Some(bucket) = bucket((location >> 3) as u32) else {
        return 1;
    };
    let mut entry = Entry {
        location,
        key: bucket.load(key_at(location as usize & 7)),
        meta: Meta(meta),
    };
    // Once more where only a mark was new, or a packet has come for it.
    if !entry.remove() && entry.look_again() {
        entry.remove();
    }
    0
}

/// Hash of the end of a flow that is the source of its client's packets.
#[inline(always)]
pub fn hash_of_client(settings: &Settings, key: &FlowKey) -> u64 {
    end_hash(settings.table_seed, &key.source, key.source_port, key.protocol)
}

/// Hash of the end of a flow that is the destination of its replies.
#[inline(always)]
pub fn hash_of_reply(settings: &Settings, key: &FlowKey) -> u64 {
    end_hash(
        settings.table_seed,
        &key.destination,
        key.destination_port,
        key.protocol,
    )
}
