//! Who gets new flows of a service: a pool of backends, and which of them each slot leads to.

use std::{borrow::Cow, sync::Arc};

use lb_common::{
    abi::{FEW_SLOTS, MANY_SLOTS, rank_bits},
    logic::hash::siphash13,
};

use crate::compile::{maglev, round_robin};

/// The backends that new flows of a service are spread over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    /// Backend ids by rank, at most [`MAX_MEMBERS`](lb_common::abi::MAX_MEMBERS).
    pub members: Arc<[u32]>,
    /// Ranks by slot; without one each member has the slot of its rank.
    pub table: Option<Arc<RankTable>>,
}

impl Pool {
    /// A pool in which each member has one slot.
    pub fn of(members: impl Into<Arc<[u32]>>) -> Self {
        Self {
            members: members.into(),
            table: None,
        }
    }

    /// A pool of as many slots as are listed, with a backend id for each.
    pub fn listed(slots: &[u32]) -> Self {
        let mut members = slots.to_vec();
        members.sort_unstable();
        members.dedup();
        let rank = |id: &u32| members.binary_search(id).unwrap_or(0) as u16;
        let ranks: Vec<u16> = slots.iter().map(rank).collect();
        Self {
            table: Some(Arc::new(RankTable::listed(ranks))),
            members: members.into(),
        }
    }

    pub fn slots(&self) -> u32 {
        match &self.table {
            Some(table) => table.slots,
            None => self.members.len() as u32,
        }
    }

    /// Backend ids by slot, where the table is one that can be made; takes milliseconds.
    pub fn by_slot(&self) -> Option<Vec<u32>> {
        let Some(table) = &self.table else {
            return Some(self.members.to_vec());
        };
        let ranks = table.ranks()?;
        let id = |rank: &u16| self.members.get(usize::from(*rank)).copied().unwrap_or(0);
        Some(ranks.iter().map(id).collect())
    }
}

/// Ranks by slot, told by what they are made from: the ranks themselves are in the kernel's memory alone, where services
/// with the same table share one.
#[derive(Clone, Debug)]
pub struct RankTable {
    pub slots: u32,
    /// How many members have ranks in it.
    pub members: u32,
    /// Of what it is made from; the same for the same table on any node with the same seed.
    pub digest: u64,
    recipe: Recipe,
}

/// What the ranks of a table follow from.
#[derive(Clone, Debug)]
enum Recipe {
    /// Identities, in their order, and weights.
    ByHash(Vec<(u64, u32)>),
    /// Weights.
    InTurns(Vec<u32>),
    Listed(Vec<u16>),
    /// It was found in the kernel's memory.
    Unknown,
}

/// Raised with each change of what tables are made of the same members: a daemon that takes over maps then writes them
/// anew.
const VERSION: u64 = 1;

impl RankTable {
    /// A table by hash, of the members' identities with their weights; in the order of the identities.
    pub fn by_hash(members: Vec<(u64, u32)>, slots: u32) -> Self {
        debug_assert!([FEW_SLOTS, MANY_SLOTS].contains(&slots));
        let words = members.iter().flat_map(|(id, weight)| [*id, u64::from(*weight)]);
        Self {
            slots,
            members: members.len() as u32,
            digest: digest(1, slots, words),
            recipe: Recipe::ByHash(members),
        }
    }

    /// The turns of members of these weights, as many as `round_robin` makes.
    pub fn in_turns(weights: Vec<u32>) -> Self {
        let slots = round_robin::length(&weights);
        Self {
            slots,
            members: weights.len() as u32,
            digest: digest(2, slots, weights.iter().map(|weight| u64::from(*weight))),
            recipe: Recipe::InTurns(weights),
        }
    }

    /// A table of these ranks.
    pub fn listed(ranks: Vec<u16>) -> Self {
        let slots = ranks.len() as u32;
        Self {
            slots,
            members: ranks.iter().max().map_or(0, |rank| u32::from(*rank) + 1),
            digest: digest(3, slots, ranks.iter().map(|rank| u64::from(*rank))),
            recipe: Recipe::Listed(ranks),
        }
    }

    /// One that was found in the kernel's memory.
    pub(super) fn found(slots: u32, members: u32, digest: u64) -> Self {
        Self {
            slots,
            members,
            digest,
            recipe: Recipe::Unknown,
        }
    }

    /// The ranks, unless what they follow from is not known.
    pub fn ranks(&self) -> Option<Cow<'_, [u16]>> {
        match &self.recipe {
            Recipe::ByHash(members) => Some(maglev::ranks(members, self.slots).into()),
            Recipe::InTurns(weights) => Some(round_robin::turns(weights).into()),
            Recipe::Listed(ranks) => Some(ranks.into()),
            Recipe::Unknown => None,
        }
    }

    /// What it is known by.
    pub(super) fn key(&self) -> TableKey {
        (self.digest, self.slots, self.members)
    }

    /// Bits of a rank in the kernel's memory.
    pub(super) fn bits(&self) -> u32 {
        rank_bits(self.members)
    }
}

/// Digest, slots and members of a table.
pub(super) type TableKey = (u64, u32, u32);

impl PartialEq for RankTable {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for RankTable {}

fn digest(kind: u64, slots: u32, words: impl Iterator<Item = u64>) -> u64 {
    // Operators choose what is hashed: it needs no secret.
    let first = siphash13([VERSION, kind], [u64::from(slots)]);
    words.fold(first, |digest, word| siphash13([digest, kind], [word]))
}
