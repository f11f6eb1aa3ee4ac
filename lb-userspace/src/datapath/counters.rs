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
        by_id(&self.backends, id).unwrap_or_default()
    }
}

/// What goes with an id in a list in the order of the ids.
pub fn by_id<T: Copy>(list: &[(u32, T)], id: u32) -> Option<T> {
    let found = list.binary_search_by_key(&id, |(id, _)| *id);
    found.ok().map(|index| list[index].1)
}

/// Adds one count to another.
pub(super) fn add(sum: &mut Count, count: &Count) {
    sum.packets += count.packets;
    sum.bytes += count.bytes;
}
