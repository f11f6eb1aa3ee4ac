//! The pool of a service, by its strategy.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use lb_common::abi::{FEW_SLOTS, MANY_SLOTS};

use super::{candidates::Candidate, round_robin};
use crate::{
    config::{Service, Strategy},
    datapath::{Contents, Pool, RankTable},
};

/// Weights of a pool together at most, in terms of the smallest, of a table of [`FEW_SLOTS`]. With more, members would be
/// left with too few slots each to keep them when another leaves: see docs/design/slot-tables.md.
const FEW: u64 = 12;

/// The slot tables that are in use: services with the same have one.
///
/// A memory of what can be told again at any time: the result does not depend on it.
#[derive(Debug, Default)]
pub struct SlotTables(HashMap<u64, Arc<RankTable>>);

impl SlotTables {
    /// The pool of a service for these candidates.
    pub(super) fn pool(&mut self, service: &Service, mut candidates: Vec<Candidate>) -> Pool {
        candidates.retain(|candidate| candidate.weight > 0);
        let divisor = candidates
            .iter()
            .fold(0, |divisor, candidate| {
                round_robin::gcd(divisor, candidate.weight)
            })
            .max(1);
        let table = match service.strategy {
            _ if candidates.len() <= 1 => None,
            Strategy::ConsistentHash | Strategy::IpHash => {
                // The same order on every node, and for every service.
                candidates
                    .sort_unstable_by_key(|candidate| (candidate.identity, candidate.weight, candidate.id));
                let members = candidates
                    .iter()
                    .map(|candidate| (candidate.identity, candidate.weight / divisor))
                    .collect();
                Some(RankTable::by_hash(members, slots_for(service)))
            }
            Strategy::RoundRobin if candidates.iter().any(|candidate| candidate.weight != divisor) => {
                let weights = candidates.iter().map(|candidate| candidate.weight / divisor);
                Some(RankTable::in_turns(weights.collect()))
            }
            // The program compares them all, by their live flows and their weights.
            Strategy::RoundRobin | Strategy::LeastConnections => None,
        };
        Pool {
            members: candidates.iter().map(|candidate| candidate.id).collect(),
            table: table.map(|table| self.known(table)),
        }
    }

    fn known(&mut self, table: RankTable) -> Arc<RankTable> {
        let known = self
            .0
            .entry(table.digest)
            .or_insert_with(|| Arc::new(table.clone()));
        if **known == table {
            Arc::clone(known)
        } else {
            Arc::new(table)
        }
    }

    /// Forgets tables that nobody has any more.
    pub fn retain_used(&mut self) {
        self.0.retain(|_, table| Arc::strong_count(table) > 1);
    }
}

/// How many slots the tables of a service by hash have. It follows from the configuration alone: were it other slots
/// because a backend is down, all flows would move.
fn slots_for(service: &Service) -> u32 {
    let weights = || service.backends.iter().map(|backend| u64::from(backend.weight));
    let smallest = weights().filter(|weight| *weight > 0).min().unwrap_or(1);
    let (sum, count) = (weights().sum::<u64>(), service.backends.len() as u64);
    if sum.div_ceil(smallest).max(count) <= FEW {
        FEW_SLOTS
    } else {
        MANY_SLOTS
    }
}

/// The share of new flows by backend id: that of the weights, to which slots and turns keep.
pub fn shares(contents: &Contents, service: u32) -> BTreeMap<u32, f64> {
    let members = contents.pools.get(&service).map_or(&[][..], |pool| &pool.members);
    let weight = |id: &u32| {
        contents
            .backends
            .get(id)
            .map_or(0.0, |backend| f64::from(backend.weight))
    };
    let total: f64 = members.iter().map(weight).sum();
    members
        .iter()
        .map(|id| (*id, weight(id) / total.max(f64::MIN_POSITIVE)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_that_no_pool_has_any_more_are_forgotten() {
        let mut tables = SlotTables::default();
        let kept = tables.known(RankTable::in_turns(vec![1, 2]));
        drop(tables.known(RankTable::in_turns(vec![1, 3])));
        tables.retain_used();
        assert_eq!(tables.0.into_values().collect::<Vec<_>>(), [kept]);
    }
}
