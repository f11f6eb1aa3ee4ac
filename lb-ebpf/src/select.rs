//! Which backend a new flow gets.

use lb_common::{
    abi::{Backend, FlowKey, LINE_WORDS, Part, PoolHeader, Reason, Service, Settings, Strategy},
    logic::hash::{client_hash, flow_hash, lot, slot_of},
};

use crate::{
    maps::{self, LIVE},
    scratch::scratch,
};

/// Slots that are tried until a backend takes the flow.
const TRIES: u32 = 128;
/// Backends that `least-connections` compares: all of a service that has no more, else some that the flow's hash says.
const COMPARED: u32 = 32;

/// The id of the backend for a new flow of a service.
///
/// # Errors
/// [`Reason::NoBackend`], [`Reason::BackendsFull`].
#[inline(always)]
pub fn backend(
    settings: &Settings,
    service: &Service,
    service_id: u32,
    key: &FlowKey,
) -> Result<u32, Reason> {
    let pool = Pool::of(service_id).ok_or(Reason::NoBackend)?;
    if service.strategy == Strategy::LeastConnections.number() {
        return chosen(least_connections(pool.line, pool.header.members));
    }
    let slots = pool.header.slots;
    let (start, stride) = if service.strategy == Strategy::RoundRobin.number() {
        (next_position(service_id, slots), 1)
    } else {
        let hash = if service.strategy == Strategy::IpHash.number() {
            client_hash(settings.seed, key)
        } else {
            flow_hash(settings.seed, key)
        };
        // A full backend's flows spread over the others.
        (slot_of(hash, slots), 1 + (hash as u32 & 0xfff))
    };
    let mut id = pool.taker_at(start);
    if !is_backend(id) {
        id = taker_after(service_id, start, stride, id);
    }
    chosen(id)
}

/// The pool of a service: who gets its new flows.
struct Pool {
    /// Where it begins.
    line: u32,
    header: PoolHeader,
}

impl Pool {
    /// Nothing where nobody gets new flows; else it has slots and members.
    #[inline(always)]
    fn of(service_id: u32) -> Option<Self> {
        let line = maps::pool(service_id);
        if line == 0 {
            return None;
        }
        let header = PoolHeader::from_words(maps::pool_line(line)?);
        (header.slots != 0 && header.members != 0).then_some(Self { line, header })
    }

    /// The id of the backend that a slot leads to, if it takes a flow; else [`NOBODY`] or [`FULL`].
    #[inline(always)]
    fn taker_at(&self, slot: u32) -> u32 {
        let PoolHeader {
            ranks, bits, members, ..
        } = self.header;
        taker_of(self.line, members, ranks, bits, slot)
    }
}

/// No backend's id: there is none.
const NOBODY: u32 = 0;
/// No backend's id: it takes no more flows.
const FULL: u32 = u32::MAX;

/// Tells whether it is an id. Both at once: of each way through a loop the verifier follows all that come after.
#[inline(always)]
const fn is_backend(id: u32) -> bool {
    id.wrapping_sub(1) < FULL - 1
}

/// An id; else why there is none, of [`NOBODY`] and [`FULL`].
#[inline(always)]
const fn chosen(id: u32) -> Result<u32, Reason> {
    if is_backend(id) {
        return Ok(id);
    }
    Err(if id == NOBODY {
        Reason::NoBackend
    } else {
        Reason::BackendsFull
    })
}

/// The id of the backend of the first slot of a service's pool after `slot`, by `stride`, that takes a flow; else [`NOBODY`] or
/// [`FULL`], with `others` for `slot` itself. A function that the verifier checks for itself, once for all strategies.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn taker_after(service_id: u32, slot: u32, stride: u32, mut others: u32) -> u32 {
    let Some(pool) = Pool::of(service_id) else {
        return NOBODY;
    };
    let mut slot = slot;
    for _ in 1..TRIES {
        slot = (slot + stride) % pool.header.slots;
        let PoolHeader {
            ranks, bits, members, ..
        } = pool.header;
        let id = taker(pool.line, members, ranks, bits, slot);
        if is_backend(id) {
            return id;
        }
        others |= id;
    }
    others
}

/// As [`Pool::taker_at`]. A function that the verifier checks for itself, once for all tries after the first.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn taker(pool: u32, members: u32, ranks: u32, bits: u32, slot: u32) -> u32 {
    taker_of(pool, members, ranks, bits, slot)
}

#[inline(always)]
fn taker_of(pool: u32, members: u32, ranks: u32, bits: u32, slot: u32) -> u32 {
    let id = member(pool, members, ranks, bits, slot);
    match maps::backend(id) {
        Some(backend) if id != NOBODY => {
            if takes_more(id, backend) {
                id
            } else {
                FULL
            }
        }
        _ => NOBODY,
    }
}

/// The id of the member of a pool that a slot leads to, by ranks of some bits or by itself; 0 where there is none.
#[inline(always)]
fn member(pool: u32, members: u32, ranks: u32, bits: u32, slot: u32) -> u32 {
    let rank = if bits == 0 {
        slot
    } else {
        let part = Part::of_rank(slot, bits);
        word(ranks + part.line, &part) & ((1 << (bits & 31)) - 1)
    };
    if rank >= members {
        return 0;
    }
    let part = Part::of_member(rank);
    word(pool + part.line, &part)
}

/// 32 bits of a line of pools; 0 where there is none.
#[inline(always)]
fn word(line: u32, part: &Part) -> u32 {
    match maps::pool_line(line) {
        Some(words) => (words[part.word & (LINE_WORDS - 1)] >> part.shift) as u32,
        None => 0,
    }
}

/// The id of the backend of a pool with the fewest live flows for its weight, for the packet in the scratch memory; else
/// [`NOBODY`] or [`FULL`]. A function that the verifier checks for itself, as few services need it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn least_connections(pool: u32, members: u32) -> u32 {
    let (Some(scratch), Some(settings)) = (scratch(), maps::settings()) else {
        return NOBODY;
    };
    let hash = flow_hash(settings.seed, &scratch.packet.key);
    let (mut best, mut best_live, mut best_weight, mut best_lot) = (NOBODY, 0, 0, 0);
    let mut others = NOBODY;
    for position in 0..COMPARED {
        if position >= members {
            break;
        }
        let rank = (hash as u32 % members + position) % members;
        let id = taker(pool, members, 0, 0, rank);
        if !is_backend(id) {
            others |= id;
            continue;
        }
        let weight = maps::backend(id).map_or(0, |backend| backend.weight as u64);
        if weight == 0 {
            continue;
        }
        let live = live(id);
        // (live + 1) / weight of each, without a division.
        let (load, least) = ((live + 1) * best_weight, (best_live + 1) * weight);
        // Among equals the flow's hash decides: by their order, one beside a busier one would get the other's share.
        let lot = lot(hash, id);
        if best == NOBODY || load < least || (load == least && lot < best_lot) {
            (best, best_live, best_weight, best_lot) = (id, live, weight, lot);
        }
    }
    if best == NOBODY { others } else { best }
}

/// This CPU's next position in the sequence of a service.
#[inline(always)]
fn next_position(service_id: u32, length: u32) -> u32 {
    let Some(position) = maps::round_robin(service_id) else {
        return 0;
    };
    let current = if *position < length { *position } else { 0 };
    *position = current + 1;
    current
}

#[inline(always)]
fn takes_more(id: u32, backend: &Backend) -> bool {
    backend.max_connections == 0 || live(id) < backend.max_connections as u64
}

/// Live flows of a backend, as far as they are known; at most `u32::MAX`.
#[inline(always)]
fn live(id: u32) -> u64 {
    let Some(count) = LIVE.get(id) else {
        return 0;
    };
    let live = count.flows();
    if live > u32::MAX as u64 {
        u32::MAX as u64
    } else {
        live
    }
}
