//! Which backend a new flow gets.

use lb_common::{
    abi::{Backend, FlowKey, LINE_WORDS, Part, PoolHeader, Reason, Service, Settings, Strategy},
    logic::hash::{client_hash, flow_hash, lot, slot_of},
};

use crate::maps::{self, LIVE};

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
        return least_connections(settings, &pool, key);
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
    let mut reason = Reason::NoBackend;
    let mut position = start;
    for _ in 0..TRIES {
        let id = pool.at(position);
        if id != 0
            && let Some(backend) = maps::backend(id)
        {
            if takes_more(id, backend) {
                return Ok(id);
            }
            reason = Reason::BackendsFull;
        }
        // A division, which the first one does without.
        position = (position + stride) % slots;
    }
    Err(reason)
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

    /// The id of the backend that a slot leads to; 0 where there is none.
    #[inline(always)]
    fn at(&self, slot: u32) -> u32 {
        let PoolHeader {
            ranks, bits, members, ..
        } = self.header;
        member(self.line, members, ranks, bits, slot)
    }

    /// The id of the member of a rank; 0 where there is none.
    #[inline(always)]
    fn member(&self, rank: u32) -> u32 {
        member(self.line, self.header.members, 0, 0, rank)
    }
}

/// The id of the member of a pool that a slot leads to, by ranks of some bits or by itself; 0 where there is none. A function
/// that the verifier checks for itself, once for all tries.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn member(pool: u32, members: u32, ranks: u32, bits: u32, slot: u32) -> u32 {
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

/// The backend with the fewest live flows for its weight.
#[inline(always)]
fn least_connections(settings: &Settings, pool: &Pool, key: &FlowKey) -> Result<u32, Reason> {
    let length = pool.header.members;
    let hash = flow_hash(settings.seed, key);
    let start = hash as u32 % length;
    let (mut best, mut best_live, mut best_weight, mut best_lot) = (0, 0, 0, 0);
    let mut reason = Reason::NoBackend;
    for position in 0..COMPARED {
        if position >= length {
            break;
        }
        let id = pool.member((start + position) % length);
        let Some(backend) = maps::backend(id) else {
            continue;
        };
        if id == 0 || backend.weight == 0 {
            continue;
        }
        let live = live(id);
        if backend.max_connections != 0 && live >= backend.max_connections as u64 {
            reason = Reason::BackendsFull;
            continue;
        }
        // (live + 1) / weight of each, without a division.
        let (load, least) = ((live + 1) * best_weight, (best_live + 1) * backend.weight as u64);
        // Among equals the flow's hash decides: by their order, one beside a busier one would get the other's share.
        let lot = lot(hash, id);
        if best == 0 || load < least || (load == least && lot < best_lot) {
            (best, best_live, best_weight, best_lot) = (id, live, backend.weight as u64, lot);
        }
    }
    if best == 0 { Err(reason) } else { Ok(best) }
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
