//! The flow table: an array of buckets, found by a keyed hash of the client's address and port. Docs/design/flow-table.md
//! has the reasons and the figures.
//!
//! A unit is written by whoever has swapped its meta word for a busy one, and read by comparing its key between two
//! looks at its meta word: no lock is held, no reader waits, and nobody gets one flow's meta with another's key.

#[cfg(not(target_arch = "bpf"))]
use core::sync::atomic::{AtomicU64, Ordering};

use super::{ageing, hash::siphash13_and};
use crate::abi::{Address, FlowKey, Kind, LINE, Meta, Settings, TcpState, UNITS};

/// The words of a bucket in memory that others write, too.
pub trait Words {
    /// Reads a word, in the order of the program.
    fn load(&self, at: usize) -> u64;
    /// Writes a word, after all that was written before.
    fn store(&self, at: usize, value: u64);
    /// Writes a word if it is `old`, and tells whether it was.
    fn swap(&self, at: usize, old: u64, new: u64) -> bool;
}

impl<W: Words> Words for &W {
    #[inline(always)]
    fn load(&self, at: usize) -> u64 {
        W::load(self, at)
    }

    #[inline(always)]
    fn store(&self, at: usize, value: u64) {
        W::store(self, at, value);
    }

    #[inline(always)]
    fn swap(&self, at: usize, old: u64, new: u64) -> bool {
        W::swap(self, at, old, new)
    }
}

/// In the daemon's memory.
#[cfg(not(target_arch = "bpf"))]
impl<const N: usize> Words for [AtomicU64; N] {
    fn load(&self, at: usize) -> u64 {
        self[at].load(Ordering::Acquire)
    }

    fn store(&self, at: usize, value: u64) {
        self[at].store(value, Ordering::Release);
    }

    fn swap(&self, at: usize, old: u64, new: u64) -> bool {
        self[at]
            .compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }
}

/// Hash of one end of a flow, which says where the flow is.
///
/// For a client's packet it is the source, for a reply the destination. So both directions of `nat` find the same entry.
#[inline(always)]
pub fn end_hash(seed: [u64; 2], address: &Address, port: u16, protocol: u32) -> u64 {
    let rest = ((protocol & 0xff) as u64) << 16 | port as u64;
    let [a, b, c, d] = &address.0;
    if address.is_v4() {
        return siphash13_and(seed, [], rest << 32 | *d as u64, 7);
    }
    let words = [(*a as u64) << 32 | *b as u64, (*c as u64) << 32 | *d as u64];
    siphash13_and(seed, words, rest, 3)
}

/// Index of the bucket for a hash.
#[inline(always)]
pub const fn bucket_of(hash: u64, buckets: u32) -> u32 {
    (((hash >> 32) * buckets as u64) >> 32) as u32
}

/// Index of the bucket for flows that find no room in the first.
#[inline(always)]
pub const fn second_bucket_of(hash: u64, buckets: u32) -> u32 {
    (((hash & 0xffff_ffff) * buckets as u64) >> 32) as u32
}

/// The cache line of the bucket in which a flow is looked for first: the index of its first word.
#[inline(always)]
pub const fn line_of(hash: u64) -> usize {
    (hash as usize & 1) * LINE
}

/// The other cache line of the bucket.
#[inline(always)]
pub const fn other_line(line: usize) -> usize {
    line ^ LINE
}

/// Index of the first word of a unit.
#[inline(always)]
pub const fn key_at(unit: usize) -> usize {
    2 * unit
}

/// Index of the second word of a unit.
#[inline(always)]
pub const fn meta_at(unit: usize) -> usize {
    2 * unit + 1
}

/// The bits of a short key, or of an alias's, that a reply can tell.
pub const CLIENT: u64 = 0xffff_ffff_ffff;
/// The bits of a long key that a client's packet can tell.
pub const PORTS: u64 = 0xffff_ffff;
/// The bits of a long key that a client's port takes.
pub const CLIENT_PORT: u64 = 0xffff;

/// Key of a flow over IPv4; all in network byte order. From the lowest bit: 32 bits of the client's address, 16 of its
/// port, 16 of the port that it connected to.
#[inline(always)]
pub const fn short_key(client: u32, client_port: u16, port: u16) -> u64 {
    client as u64 | (client_port as u64) << 32 | (port as u64) << 48
}

/// Key of any flow, less the client's address, which the next unit has; all in network byte order. From the lowest bit:
/// 16 bits of the client's port, 16 of the port that it connected to, 16 of the port that the backend sees it come
/// from, 16 of the backend's generation.
#[inline(always)]
pub const fn long_key(client_port: u16, port: u16, source_port: u16, generation: u32) -> u64 {
    client_port as u64
        | (port as u64) << 16
        | (source_port as u64) << 32
        | ((generation & 0xffff) as u64) << 48
}

/// Key of an alias. From the lowest bit: 32 bits of where the flow is, the bucket's index and three bits of the unit's;
/// 16 of the port that the backend sees the flow come from, 16 of the backend's port, both in network byte order.
#[inline(always)]
pub const fn alias_key(bucket: u32, unit: usize, source_port: u16, backend_port: u16) -> u64 {
    (bucket << 3 | unit as u32 & 7) as u64 | (source_port as u64) << 32 | (backend_port as u64) << 48
}

/// The bits of an alias's key that a reply can tell.
pub const ALIASED_PORTS: u64 = !0xffff_ffff;

/// What the key of a flow, or of an alias, has in it if replies of a 5-tuple may be its.
#[derive(Clone, Copy, Debug)]
pub struct ReplyKeys {
    alias: u64,
    short: u64,
    long: u64,
}

impl ReplyKeys {
    #[inline(always)]
    pub fn of(reply: &FlowKey) -> Self {
        Self {
            alias: alias_key(0, 0, reply.destination_port, reply.source_port),
            short: short_key(reply.destination.v4_word(), reply.destination_port, 0),
            long: reply.destination_port as u64,
        }
    }

    #[inline(always)]
    pub const fn are_of_alias(&self, key: u64) -> bool {
        key & ALIASED_PORTS == self.alias
    }

    #[inline(always)]
    pub const fn are_of_flow(&self, key: u64) -> bool {
        key & CLIENT == self.short || key & CLIENT_PORT == self.long
    }
}

/// Tells that no unit of a bucket but `own` holds a flow that replies may be of, or an alias of one, and that none is in
/// another bucket; that of a line whose flows all replies to the client's address and port are looked for among first.
///
/// Of two who write such flows, and ask after that, at most one is told so: keys are there before flows are seen, marks
/// before flows are elsewhere, and flows are published by a swap.
#[inline(always)]
pub fn is_alone<W: Words>(words: &W, line: usize, keys: &ReplyKeys, own: Option<usize>) -> bool {
    let mut step = 0;
    while step < UNITS {
        if step == UNITS / 2 && !overflows(words, mark_of(line)) {
            return true;
        }
        let unit = (line / 2 + step) & (UNITS - 1);
        step += 1;
        let key = words.load(key_at(unit));
        if !keys.are_of_alias(key) && !keys.are_of_flow(key) || own == Some(unit) {
            continue;
        }
        // What is gone leaves its key. Who writes a key has made the unit busy before.
        if meta_of(words, unit).is_some_and(|meta| !meta.is_empty() && !meta.is_left()) {
            return false;
        }
    }
    !overflows(words, BUCKET)
}

/// A flow as it was found: the indices are good for [`update`] and [`remove`] as long as its meta is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    pub unit: usize,
    pub key: u64,
    pub meta: Meta,
}

/// What a unit holds, if it is of a kind and the bits of its key under `mask` are `want`.
#[inline(always)]
pub fn at<W: Words>(words: &W, unit: usize, kind: Kind, want: u64, mask: u64) -> Option<Found> {
    let key = words.load(key_at(unit));
    if key & mask != want {
        return None;
    }
    let meta = Meta(words.load(meta_at(unit)));
    if !meta.is(kind) || meta.is_busy() || is_address(words, unit) || words.load(key_at(unit)) != key {
        return None;
    }
    // The first look is between two at the key, so it is of that; by the second nobody else has come meanwhile.
    let again = Meta(words.load(meta_at(unit)));
    again.is_of_same(meta).then_some(Found { unit, key, meta })
}

/// As [`at`] for a long flow of this client, at a unit of an even number.
#[inline(always)]
pub fn long_at<W: Words>(words: &W, unit: usize, client: &Address, want: u64, mask: u64) -> Option<Found> {
    let found = at(words, unit, Kind::Long, want, mask)?;
    let [a, b] = address_words(client);
    if words.load(key_at(unit + 1)) != a || words.load(meta_at(unit + 1)) != b {
        return None;
    }
    again(words, &found).is_some().then_some(found)
}

/// The client's address of a long flow, if it is still there.
#[inline(always)]
pub fn client_of_long<W: Words>(words: &W, found: &Found) -> Option<Address> {
    let a = words.load(key_at(found.unit + 1));
    let b = words.load(meta_at(found.unit + 1));
    again(words, found)?;
    Some(Address([a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32]))
}

/// Tells whether a unit is the second of a long flow.
#[inline(always)]
pub fn is_address<W: Words>(words: &W, unit: usize) -> bool {
    unit % 2 == 1 && Meta(words.load(meta_at(unit - 1))).is(Kind::Long)
}

#[inline(always)]
const fn address_words(address: &Address) -> [u64; 2] {
    let [a, b, c, d] = &address.0;
    [*a as u64 | (*b as u64) << 32, *c as u64 | (*d as u64) << 32]
}

/// Replaces the meta of a flow, unless somebody else has.
#[inline(always)]
pub fn update<W: Words>(words: &W, found: &Found, meta: Meta) -> bool {
    words.swap(meta_at(found.unit), found.meta.0, meta.0)
}

/// Removes a flow, unless its meta has changed; tells whether it did.
#[inline(always)]
pub fn remove<W: Words>(words: &W, found: &Found) -> bool {
    if !found.meta.is(Kind::Long) {
        return update(words, found, found.meta.emptied());
    }
    if !update(words, found, found.meta.busy(Kind::Long)) {
        return false;
    }
    free_long(words, found.unit);
    true
}

/// Frees the two units of a long flow that is busy.
#[inline(always)]
pub fn free_long<W: Words>(words: &W, unit: usize) {
    words.store(key_at(unit + 1), 0);
    words.store(meta_at(unit + 1), Meta::EMPTY.0);
    replace(words, unit, Meta::EMPTY);
}

/// Frees a unit that nobody else writes.
#[inline(always)]
pub fn free<W: Words>(words: &W, unit: usize) {
    replace(words, unit, Meta::EMPTY);
}

/// Writes the meta word of a unit that nobody else writes, but for a mark.
#[inline(always)]
fn replace<W: Words>(words: &W, unit: usize, meta: Meta) {
    let mut attempt = 0;
    while attempt < 4 {
        let former = Meta(words.load(meta_at(unit)));
        if words.swap(meta_at(unit), former.0, former.replaced(meta).0) {
            return;
        }
        attempt += 1;
    }
    words.store(meta_at(unit), meta.0);
}

/// The unit that has the mark of a bucket: flows that belong there are in their second bucket.
pub const BUCKET: usize = 0;

/// The unit that has the mark of a line: flows that are looked for there first are somewhere else. One that has no address.
#[inline(always)]
pub const fn mark_of(line: usize) -> usize {
    line / 2 + 2
}

/// Notes at a unit that flows are elsewhere; tells whether that has been noted, in spite of others who write.
#[inline(always)]
pub fn mark_overflow<W: Words>(words: &W, unit: usize) -> bool {
    let mut attempt = 0;
    while attempt < 4 {
        let meta = Meta(words.load(meta_at(unit)));
        if meta.overflows() || words.swap(meta_at(unit), meta.0, meta.with_overflow(true).0) {
            return true;
        }
        attempt += 1;
    }
    false
}

/// Tells whether it was noted at a unit that flows are elsewhere.
#[inline(always)]
pub fn overflows<W: Words>(words: &W, unit: usize) -> bool {
    Meta(words.load(meta_at(unit))).overflows()
}

/// What a flow is worth; who comes takes the place of the one that is worth least.
pub mod worth {
    /// A place without a flow, or one that is idle for too long.
    pub const NOTHING: u32 = 0;
    /// A connection that both ends have closed, or one has reset.
    pub const CLOSED: u32 = 2;
    /// What is worth so much or more goes on.
    pub const LIVE: u32 = 3;
    /// A flow that is opening, or of a single datagram; less for each tick that it is idle.
    pub const OPENING: u32 = 0x100;
    /// A connection that one end has closed.
    pub const CLOSING: u32 = 0x200;
    /// An open connection, or a flow of several datagrams; less for each tick that it is idle.
    pub const OPEN: u32 = 0x400;
    /// A unit that is being written.
    pub const BUSY: u32 = u32::MAX;
}

/// What a flow is worth now.
#[inline(always)]
pub fn worth(settings: &Settings, meta: Meta, now: u64) -> u32 {
    if meta.is_empty() {
        return worth::NOTHING;
    }
    if meta.is_busy() {
        return worth::BUSY;
    }
    if meta.is_left() {
        return worth::CLOSED;
    }
    let idle = ageing::idle_ticks(settings, meta, now);
    if ageing::is_over_after(settings, meta.state(), idle) {
        return worth::NOTHING;
    }
    match meta.state() {
        TcpState::Closed => worth::CLOSED,
        TcpState::SynSent | TcpState::SynReceived => worth::OPENING - idle,
        TcpState::None if !meta.is_confirmed() => worth::OPENING - idle,
        TcpState::FinClient | TcpState::FinBackend => worth::CLOSING,
        TcpState::Established | TcpState::None => worth::OPEN - idle,
    }
}

/// A unit, or two, that nobody but the caller writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    pub unit: usize,
    /// The flows that were there, which the caller counts as ended.
    pub evicted: [Meta; 2],
}

/// Makes room for a flow: the place that is worth least, and less than `limit`, of the line first and then of the other.
/// Nothing where there is none, or others are faster. `worth_at` tells what has to go at a unit, see [`place_worth`].
#[inline(always)]
pub fn make_room<W: Words>(
    words: &W,
    line: usize,
    kind: Kind,
    limit: u32,
    worth_at: impl Fn(usize) -> u32,
) -> Option<Room> {
    let (mut least, mut chosen) = (limit, UNITS);
    let first = line / 2;
    let mut step = 0;
    while step < UNITS {
        let unit = (first + step) & (UNITS - 1);
        let worth = worth_at(unit);
        if worth < least {
            (least, chosen) = (worth, unit);
            // The other line is read only where this one is full.
            if worth == worth::NOTHING {
                break;
            }
        }
        step += if matches!(kind, Kind::Long) { 2 } else { 1 };
    }
    if chosen == UNITS {
        return None;
    }
    take(words, chosen, kind, least, worth_at)
}

/// The meta word of a unit, unless it is the second of a long flow. Read before that is asked: where no long flow is there by
/// then, it was no address, or is another word by now.
#[inline(always)]
pub fn meta_of<W: Words>(words: &W, unit: usize) -> Option<Meta> {
    let meta = Meta(words.load(meta_at(unit)));
    (!is_address(words, unit)).then_some(meta)
}

/// Takes a place of a line where there is nothing; gives the unit. Others are not judged, and whoever is faster gets it.
#[inline(always)]
pub fn take_free<W: Words>(words: &W, line: usize, kind: Kind) -> Option<usize> {
    let mut even = line / 2;
    while even < line / 2 + 4 {
        let (first, second) = pair(words, even);
        if matches!(kind, Kind::Long) {
            let busy = second.busy(Kind::Short);
            if first.is_empty() && second.is_empty() && words.swap(meta_at(even + 1), second.0, busy.0) {
                if words.swap(meta_at(even), first.0, first.busy(Kind::Long).0) {
                    return Some(even);
                }
                words.swap(meta_at(even + 1), busy.0, second.0);
            }
        } else if first.is_empty() {
            if words.swap(meta_at(even), first.0, first.busy(kind).0) {
                return Some(even);
            }
        } else if !first.is(Kind::Long) && second.is_empty() && take_second(words, even, second, kind) {
            return Some(even + 1);
        }
        even += 2;
    }
    None
}

/// The meta words of the pair of units that a unit is of. In this order: where the first is no long flow's, the second was
/// no address, unless its flow has gone since; then it is not the same any more.
#[inline(always)]
fn pair<W: Words>(words: &W, unit: usize) -> (Meta, Meta) {
    let even = unit & !1;
    let second = Meta(words.load(meta_at(even + 1)));
    let first = Meta(words.load(meta_at(even)));
    (first, second)
}

/// What has to go for a flow of a kind at a unit, or two: their units and metas. Nothing where it cannot be there.
#[inline(always)]
fn in_the_way<W: Words>(words: &W, unit: usize, kind: Kind) -> Option<[(usize, Meta); 2]> {
    let (first, second) = pair(words, unit);
    let even = unit & !1;
    let (first, second) = ((even, first), (even + 1, second));
    let nothing = (even, Meta::EMPTY);
    if first.1.is(Kind::Long) {
        // Of the two units that it takes the first one is free for a short flow.
        return if unit == even {
            Some([first, nothing])
        } else {
            None
        };
    }
    if matches!(kind, Kind::Long) {
        return Some([first, second]);
    }
    Some([if unit == even { first } else { second }, nothing])
}

/// What has to go at a unit for a flow of a kind: the worth of the flow that is worth most. `worth_of` is given a unit and its
/// meta.
#[inline(always)]
pub fn place_worth<W: Words>(
    words: &W,
    unit: usize,
    kind: Kind,
    worth_of: impl Fn(usize, Meta) -> u32,
) -> u32 {
    let Some(places) = in_the_way(words, unit, kind) else {
        return worth::BUSY;
    };
    let mut most = worth::NOTHING;
    for (unit, meta) in places {
        if !meta.is_empty() {
            let worth = worth_of(unit, meta);
            most = if worth > most { worth } else { most };
        }
    }
    most
}

/// Takes the second unit of a pair, if this is still its meta, for a flow that needs no other; tells whether it did.
///
/// A long flow may have taken the pair since that was read, with an address whose end is the same word: clients choose their
/// addresses. Then the word is put back. Who takes the pair has its second unit first, so that none comes from now on.
#[inline(always)]
fn take_second<W: Words>(words: &W, even: usize, second: Meta, kind: Kind) -> bool {
    let busy = second.busy(kind);
    if !words.swap(meta_at(even + 1), second.0, busy.0) {
        return false;
    }
    if !Meta(words.load(meta_at(even))).is(Kind::Long) {
        return true;
    }
    words.swap(meta_at(even + 1), busy.0, second.0);
    false
}

#[inline(always)]
fn take<W: Words>(
    words: &W,
    unit: usize,
    kind: Kind,
    worth: u32,
    worth_at: impl Fn(usize) -> u32,
) -> Option<Room> {
    let even = unit & !1;
    let (first, second) = pair(words, unit);
    // Others may have come since it was judged, or come now: then the swap fails.
    if first.is_busy() || worth_at(unit) > worth {
        return None;
    }
    if first.is(Kind::Long) {
        if !words.swap(meta_at(even), first.0, first.busy(Kind::Long).0) {
            return None;
        }
        if !matches!(kind, Kind::Long) {
            words.store(key_at(even + 1), 0);
            words.store(meta_at(even + 1), Meta::EMPTY.0);
            replace(words, even, Meta::EMPTY.busy(kind));
        }
        return Some(Room {
            unit: even,
            evicted: [first, Meta::EMPTY],
        });
    }
    if !matches!(kind, Kind::Long) {
        let meta = if unit == even { first } else { second };
        let is_taken = !meta.is_busy()
            && if unit == even {
                words.swap(meta_at(even), meta.0, meta.busy(kind).0)
            } else {
                take_second(words, even, meta, kind)
            };
        if !is_taken {
            return None;
        }
        return Some(Room {
            unit,
            evicted: [meta, Meta::EMPTY],
        });
    }
    let busy = second.busy(Kind::Short);
    if second.is_busy() || !words.swap(meta_at(even + 1), second.0, busy.0) {
        return None;
    }
    if !words.swap(meta_at(even), first.0, first.busy(Kind::Long).0) {
        words.swap(meta_at(even + 1), busy.0, second.0);
        return None;
    }
    Some(Room {
        unit: even,
        evicted: [first, second],
    })
}

/// Writes a flow of any kind but a long one into the room that was made for it.
#[inline(always)]
pub fn put<W: Words>(words: &W, unit: usize, key: u64, meta: Meta) {
    words.store(key_at(unit), key);
    publish(words, unit, meta);
}

/// Writes a long flow into the room that was made for it.
#[inline(always)]
pub fn put_long<W: Words>(words: &W, unit: usize, key: u64, client: &Address, meta: Meta) {
    let [a, b] = address_words(client);
    words.store(key_at(unit), key);
    words.store(key_at(unit + 1), a);
    words.store(meta_at(unit + 1), b);
    publish(words, unit, meta);
}

/// By a swap, so that it is seen before anything that is read from now on. Does nothing where the unit is not the
/// caller's any more, or was written already.
#[inline(always)]
fn publish<W: Words>(words: &W, unit: usize, meta: Meta) {
    let mut attempt = 0;
    while attempt < 4 {
        let former = Meta(words.load(meta_at(unit)));
        if !former.is_busy() || words.swap(meta_at(unit), former.0, former.replaced(meta).0) {
            return;
        }
        attempt += 1;
    }
}

/// Looks at a flow once more; nothing if it is another one by now.
#[inline(always)]
pub fn again<W: Words>(words: &W, found: &Found) -> Option<Meta> {
    let meta = Meta(words.load(meta_at(found.unit)));
    if words.load(key_at(found.unit)) != found.key || !meta.is_of_same(found.meta) {
        return None;
    }
    Some(meta)
}

#[cfg(test)]
mod tests;
