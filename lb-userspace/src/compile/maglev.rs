//! Slot tables by Maglev hashing (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer",
//! NSDI 2016, section 3.4), with weights.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BinaryHeap},
    net::IpAddr,
};

use lb_common::logic::hash::siphash13;

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

/// Who gets each of so many slots, a prime: the index of one of the members, given their identities and weights.
///
/// Who gets a slot depends on the set of members, not on their order, as long as no two have the same identity. Without a
/// member of some weight all are 0.
pub fn ranks(members: &[(u64, u32)], slots: u32) -> Vec<u16> {
    let mut table = Table::new(slots);
    let mut classes = classes(members, slots);
    while table.free > 0 {
        let Some(first) = classes.pop() else { break };
        let mut due = vec![first];
        while classes.peek().is_some_and(|class| class.cmp(&due[0]).is_eq()) {
            due.extend(classes.pop());
        }
        let are_several = due.len() > 1;
        let mut turns: Vec<&mut Turn> = due.iter_mut().flat_map(|class| &mut class.turns).collect();
        if are_several {
            turns.sort_unstable_by_key(|turn| turn.order());
        }
        for turn in turns.into_iter().take(table.free as usize) {
            turn.take_slot(&mut table);
        }
        classes.extend(due.into_iter().map(Class::next));
    }
    table.ranks
}

/// The members of some weight, those of the same weight together.
fn classes(members: &[(u64, u32)], slots: u32) -> BinaryHeap<Class> {
    let mut classes = BTreeMap::<u32, Vec<Turn>>::new();
    for (rank, (identity, weight)) in (0_u32..).zip(members).filter(|(_, (_, weight))| *weight > 0) {
        let turns = classes.entry(*weight).or_default();
        turns.push(Turn::first(rank as u16, *identity, slots));
    }
    let class = |(weight, mut turns): (u32, Vec<Turn>)| {
        turns.sort_unstable_by_key(Turn::order);
        Class {
            weight,
            odd: 1,
            turns,
        }
    };
    classes.into_iter().map(class).collect()
}

/// Members of the same weight, whose turns to take a slot are at the same times.
///
/// The k-th turn of a member is due at (k - 1/2) / weight, and of those that are due at once the least identity is first. So
/// each has taken its share, rounded, at any time, and the order of any two does not depend on who else takes part: that
/// keeps slots in place when one leaves.
#[derive(Debug)]
struct Class {
    weight: u32,
    /// 2k - 1.
    odd: u64,
    /// In their order.
    turns: Vec<Turn>,
}

impl Class {
    fn next(mut self) -> Self {
        self.odd += 2;
        self
    }
}

impl Ord for Class {
    /// The greatest is the first to be due.
    fn cmp(&self, other: &Self) -> Ordering {
        // At most 2^18 times 2^32: does not overflow.
        let due = self.odd * u64::from(other.weight);
        let other_due = other.odd * u64::from(self.weight);
        other_due.cmp(&due)
    }
}

impl PartialOrd for Class {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Class {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Class {}

/// Free slots at which they are compared rather than tried: most tries would be in vain.
const FEW: u32 = 256;

/// The slots as far as they are taken.
#[derive(Debug)]
struct Table {
    slots: u32,
    ranks: Vec<u16>,
    free: u32,
    /// A bit for each slot that is taken.
    taken: Vec<u64>,
    /// The slots that are free, once they are few.
    last: Vec<u32>,
}

impl Table {
    fn new(slots: u32) -> Self {
        Self {
            slots,
            ranks: vec![0; slots as usize],
            free: slots,
            taken: vec![0; slots.div_ceil(64) as usize],
            last: if slots <= FEW {
                (0..slots).collect()
            } else {
                Vec::new()
            },
        }
    }

    fn is_taken(&self, slot: u32) -> bool {
        self.taken[slot as usize / 64] >> (slot % 64) & 1 != 0
    }

    fn take(&mut self, slot: u32, rank: u16) {
        self.taken[slot as usize / 64] |= 1 << (slot % 64);
        self.ranks[slot as usize] = rank;
        self.free -= 1;
        if self.free == FEW {
            self.last = (0..self.slots).filter(|slot| !self.is_taken(*slot)).collect();
        }
    }
}

/// Where a member is in the sequence of the slots that it prefers.
#[derive(Debug)]
struct Turn {
    rank: u16,
    identity: u64,
    /// The slot that the member prefers among those that it has not tried.
    next: u32,
    skip: u32,
    /// What `skip` times this is 1 of, modulo the number of slots; 0 as long as nobody has asked.
    inverse: u32,
}

impl Turn {
    fn first(rank: u16, identity: u64, slots: u32) -> Self {
        Self {
            rank,
            identity,
            next: ((identity >> 32) % u64::from(slots)) as u32,
            skip: ((identity & 0xffff_ffff) % u64::from(slots - 1)) as u32 + 1,
            inverse: 0,
        }
    }

    fn order(&self) -> (u64, u16) {
        (self.identity, self.rank)
    }

    /// Takes the preferred slot that is free. The number of slots is prime, so that all are tried in turn.
    fn take_slot(&mut self, table: &mut Table) {
        if table.free <= FEW {
            self.take_one_of_few(table);
            return;
        }
        loop {
            let slot = self.next;
            self.next += self.skip;
            if self.next >= table.slots {
                self.next -= table.slots;
            }
            if !table.is_taken(slot) {
                table.take(slot, self.rank);
                return;
            }
        }
    }

    /// As [`Self::take_slot`]: of each free slot it is known how many tries away it is.
    fn take_one_of_few(&mut self, table: &mut Table) {
        let slots = u64::from(table.slots);
        if self.inverse == 0 {
            self.inverse = inverse(self.skip, table.slots);
        }
        let tries = |slot: u32| {
            let distance = u64::from(slot + table.slots - self.next);
            distance * u64::from(self.inverse) % slots
        };
        let nearest = (table.last.iter().enumerate()).min_by_key(|(_, slot)| tries(**slot));
        let Some((index, slot)) = nearest.map(|(index, slot)| (index, *slot)) else {
            return;
        };
        table.last.swap_remove(index);
        self.next = (slot + self.skip) % table.slots;
        table.take(slot, self.rank);
    }
}

/// The inverse of a number modulo a prime (Fermat).
fn inverse(number: u32, prime: u32) -> u32 {
    let (mut base, mut exponent, mut result) = (u64::from(number), prime - 2, 1);
    while exponent > 0 {
        if exponent & 1 != 0 {
            result = result * base % u64::from(prime);
        }
        base = base * base % u64::from(prime);
        exponent >>= 1;
    }
    result as u32
}

#[cfg(test)]
mod tests;
