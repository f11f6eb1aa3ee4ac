//! What the data path has counted, summed over the CPUs unless said otherwise.

use std::collections::BTreeMap;

use lb_common::abi::{BackendCounters, Count, Totals};

/// A reading of the counters.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Packets by verdict, for each CPU.
    pub totals: Vec<Totals>,
    /// By reason index: packets that belong to no service.
    pub reasons: Vec<Count>,
    /// By service id and reason index.
    pub services: BTreeMap<u32, Vec<Count>>,
    /// With the backend's id, in the order of the ids.
    pub backends: Vec<(u32, BackendCounters)>,
}

impl Counters {
    /// The counters of a backend; zero where they were not read.
    pub fn of_backend(&self, id: u32) -> BackendCounters {
        let found = self.backends.binary_search_by_key(&id, |(id, _)| *id);
        found.map_or_else(|_| BackendCounters::default(), |index| self.backends[index].1)
    }
}

/// Adds one count to another.
pub(super) fn add(sum: &mut Count, count: &Count) {
    sum.packets += count.packets;
    sum.bytes += count.bytes;
}
