//! The slot table of a service, by its strategy.

use std::{collections::BTreeMap, sync::Arc};

use lb_common::abi::{self, LENGTH_SLOT, SLOT_COUNT};

use super::{candidates::Candidate, maglev, round_robin};
use crate::{
    config::Strategy,
    datapath::{Contents, SlotTable},
};

/// Slots of a sequence at most: all but the one that holds the length.
pub(super) const MAX_LENGTH: u32 = SLOT_COUNT - 1 - LENGTH_SLOT;

/// The slot tables of the last compilation: building one takes milliseconds, and most changes concern few services.
///
/// A memory of what can be computed again at any time: the result does not depend on it.
#[derive(Debug, Default)]
pub struct SlotTables(BTreeMap<u32, (Strategy, Vec<Candidate>, SlotTable)>);

impl SlotTables {
    /// The table of a service for these candidates.
    pub(super) fn get(&mut self, service: u32, strategy: Strategy, candidates: Vec<Candidate>) -> SlotTable {
        if let Some((known_strategy, known, table)) = self.0.get(&service)
            && (*known_strategy, known) == (strategy, &candidates)
        {
            return Arc::clone(table);
        }
        let table = table(strategy, &candidates);
        self.0.insert(service, (strategy, candidates, Arc::clone(&table)));
        table
    }

    /// Forgets services that are gone.
    pub(super) fn retain(&mut self, contents: &Contents) {
        self.0
            .retain(|service, _| contents.services.contains_key(service));
    }
}

/// Builds the table.
fn table(strategy: Strategy, candidates: &[Candidate]) -> SlotTable {
    match strategy {
        Strategy::ConsistentHash | Strategy::IpHash => maglev::table(candidates),
        Strategy::RoundRobin => sequence(&round_robin::turns(candidates)),
        // The program compares them all, by their live flows and their weights.
        Strategy::LeastConnections => {
            let ids: Vec<u32> = candidates.iter().map(|candidate| candidate.id).collect();
            sequence(&ids)
        }
    }
}

/// The table of a sequence: its length and then itself.
fn sequence(ids: &[u32]) -> SlotTable {
    let mut slots = vec![0; SLOT_COUNT as usize];
    slots[LENGTH_SLOT as usize] = ids.len() as u32;
    let after = LENGTH_SLOT as usize + 1;
    slots[after..after + ids.len()].copy_from_slice(ids);
    Arc::from(slots)
}

/// The share of new flows by backend id: of the slots, or for `least-connections` of the weights.
pub fn shares(contents: &Contents, service: u32) -> BTreeMap<u32, f64> {
    let mut shares = BTreeMap::<u32, f64>::new();
    let strategy = contents.services.get(&service).map(|entry| entry.strategy);
    let by_weight = strategy == Some(abi::Strategy::LeastConnections.number());
    for id in contents.slots_in_use(service) {
        let weight = contents.backends.get(id).map_or(0, |backend| backend.weight);
        *shares.entry(*id).or_default() += if by_weight { f64::from(weight) } else { 1.0 };
    }
    let total: f64 = shares.values().sum();
    shares.retain(|id, _| *id != 0);
    shares
        .values_mut()
        .for_each(|share| *share /= total.max(f64::MIN_POSITIVE));
    shares
}
