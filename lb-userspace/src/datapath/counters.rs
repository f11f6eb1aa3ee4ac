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
    /// By backend id.
    pub backends: BTreeMap<u32, BackendCounters>,
}

/// Adds one count to another.
pub(super) fn add(sum: &mut Count, count: &Count) {
    sum.packets += count.packets;
    sum.bytes += count.bytes;
}
