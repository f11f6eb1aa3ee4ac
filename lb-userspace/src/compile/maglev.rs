//! Slot tables by Maglev hashing (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer",
//! NSDI 2016, section 3.4), with weights.

use std::{cmp::Ordering, collections::BinaryHeap, net::IpAddr, sync::Arc};

use lb_common::{abi::SLOT_COUNT, logic::hash::siphash13};

use super::candidates::Candidate;
use crate::datapath::SlotTable;

/// What tells one server from the others on every node with the same seed.
///
/// The port is in host byte order, 0 for a backend that keeps the client's.
pub fn identity(seed: [u64; 2], address: IpAddr, port: u16) -> u64 {
    let address = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    siphash13(seed, [(address >> 64) as u64, address as u64, u64::from(port)])
}

/// Builds a table of `SLOT_COUNT` backend ids; all are 0 when no candidate has a weight.
///
/// The result depends on the set of candidates, not on their order.
pub fn table(candidates: &[Candidate]) -> SlotTable {
    let mut slots = vec![0; SLOT_COUNT as usize];
    let mut turns: BinaryHeap<Turn> = candidates.iter().filter_map(Turn::first).collect();
    for _ in 0..SLOT_COUNT {
        let Some(mut turn) = turns.peek_mut() else { break };
        turn.take_slot(&mut slots);
    }
    Arc::from(slots)
}

/// The next turn of one candidate to take a slot.
///
/// The k-th turn of a candidate is due at (k - 1/2) / weight. So each has taken its share, rounded, at any time, and
/// the order of any two does not depend on who else takes part: that keeps slots in place when one leaves.
#[derive(Debug)]
struct Turn {
    candidate: Candidate,
    /// 2k - 1.
    odd: u64,
    /// The slot that the candidate prefers among those that it has not tried.
    next: u32,
    skip: u32,
}

impl Turn {
    fn first(candidate: &Candidate) -> Option<Self> {
        (candidate.weight > 0).then(|| Self {
            candidate: *candidate,
            odd: 1,
            next: ((candidate.identity >> 32) % u64::from(SLOT_COUNT)) as u32,
            skip: ((candidate.identity & 0xffff_ffff) % u64::from(SLOT_COUNT - 1)) as u32 + 1,
        })
    }

    /// Takes the preferred slot that is free. The number of slots is prime, so that all are tried in turn.
    fn take_slot(&mut self, slots: &mut [u32]) {
        for _ in 0..SLOT_COUNT {
            let slot = self.next as usize;
            self.next = (self.next + self.skip) % SLOT_COUNT;
            if slots[slot] == 0 {
                slots[slot] = self.candidate.id;
                break;
            }
        }
        self.odd += 2;
    }
}

impl Ord for Turn {
    /// The greatest is the first to be due.
    fn cmp(&self, other: &Self) -> Ordering {
        // At most 2^18 times 2^32: does not overflow.
        let due = self.odd * u64::from(other.candidate.weight);
        let other_due = other.odd * u64::from(self.candidate.weight);
        (other_due.cmp(&due))
            .then_with(|| other.candidate.identity.cmp(&self.candidate.identity))
            .then_with(|| other.candidate.id.cmp(&self.candidate.id))
    }
}

impl PartialOrd for Turn {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Turn {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Turn {}

#[cfg(test)]
mod tests;
