//! The only door to the kernel's part of xlb: a trait in the words of the domain.
//!
//! [`Contents`] is everything that the reconciler governs; flows and counters are the kernel's own and only read.

pub mod barrier;
mod contents;
mod counters;
pub mod decap;
pub mod faulty;
mod flow;
mod flow_table;
mod hooks;
pub mod kernel;
mod local;
mod lookup;
pub mod memory;
mod packet_log;
pub mod pass;
mod pins;
mod pool;
mod pools;
pub mod probes;
mod syscall;

use std::{collections::BTreeMap, io};

use lb_common::abi::{
    Address, Backend, DEFAULT_BACKENDS, DEFAULT_FLOWS, DEFAULT_SERVICES, FilterKey, FlowKey, LiveCount,
    Service, ServiceKey, Settings,
};

pub use contents::contents_dump;
pub use counters::{Counters, by_id};
pub use flow::{Flow, reply_key};
pub use hooks::LinkKind;
pub use pins::Pins;
pub use pool::{Pool, RankTable};

/// What the maps hold, or shall hold, as far as the daemon decides it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    pub settings: Settings,
    /// Roles (`ROLE_VIP`, `ROLE_BACKEND`) by address.
    pub addresses: BTreeMap<Address, u32>,
    /// Service id by key.
    pub service_keys: BTreeMap<ServiceKey, u32>,
    /// By service id; unused ids are absent.
    pub services: BTreeMap<u32, Service>,
    /// Who gets new flows, by service id.
    pub pools: BTreeMap<u32, Pool>,
    /// By backend id, from 1 on; unused ids are absent.
    pub backends: BTreeMap<u32, Backend>,
    /// `FILTER_ALLOW` or `FILTER_DENY` by key and length in bits: 32 for the service and those of the prefix.
    pub source_filters: BTreeMap<(FilterKey, u32), u32>,
}

/// How much the maps of an instance are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub flows: u32,
    /// With those that have just left.
    pub services: u32,
    /// Of all services, with those that have just left.
    pub backends: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            flows: DEFAULT_FLOWS,
            services: DEFAULT_SERVICES,
            backends: DEFAULT_BACKENDS,
        }
    }
}

impl Sizes {
    /// Sizes for so many flows, of which nothing else is known.
    pub fn of_flows(flows: u32) -> Self {
        Self {
            flows,
            ..Self::default()
        }
    }
}

/// One change to one map; each takes effect at once and for itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    PutSettings(Settings),
    PutAddress(Address, u32),
    RemoveAddress(Address),
    PutBackend(u32, Backend),
    RemoveBackend(u32),
    /// Swaps the whole pool in one step: no packet sees a half-written one.
    PutPool(u32, Pool),
    RemovePool(u32),
    PutService(u32, Service),
    RemoveService(u32),
    PutServiceKey(ServiceKey, u32),
    RemoveServiceKey(ServiceKey),
    /// A key, its length in bits and the value.
    PutFilter(FilterKey, u32, u32),
    RemoveFilter(FilterKey, u32),
}

/// Why the kernel did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[error("{operation} failed on {object}")]
pub struct DatapathError {
    /// What was tried: `update`, `read`, `delete`, …
    pub operation: &'static str,
    /// The map or program, with the key where there is one.
    pub object: String,
    #[source]
    pub source: io::Error,
}

impl DatapathError {
    pub fn new(operation: &'static str, object: impl Into<String>, source: io::Error) -> Self {
        Self {
            operation,
            object: object.into(),
            source,
        }
    }
}

/// A place in a table of flows, of the data path that it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position(u32);

/// How a program is attached to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// In the driver.
    Native,
    /// In the stack, after the kernel has made a socket buffer: several times slower.
    Generic,
}

impl AttachMode {
    /// The name that users see.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::Native, Self::Generic]
            .into_iter()
            .find(|mode| mode.name() == name)
    }
}

/// The maps of one instance.
pub trait Datapath: Send {
    /// Reads back everything that the reconciler governs.
    fn read(&self) -> Result<Contents, DatapathError>;

    /// Says which changes are made next, in this order, so that what takes long can begin.
    fn prepare(&mut self, operations: &[Operation]) {
        let _ = operations;
    }

    /// Makes one change.
    fn apply(&mut self, operation: &Operation) -> Result<(), DatapathError>;

    /// Calls `visit` with some thousand flows of the table, the first ones or those from a position on, and returns the
    /// position of those that follow; a flow that comes or goes meanwhile may be seen or not.
    fn some_flows(
        &self,
        position: Option<Position>,
        visit: &mut dyn FnMut(&FlowKey, &Flow),
    ) -> Result<Option<Position>, DatapathError>;

    /// Calls `visit` with each flow of the table.
    fn flows(&self, visit: &mut dyn FnMut(&FlowKey, &Flow)) -> Result<(), DatapathError> {
        let mut position = None;
        loop {
            position = self.some_flows(position, visit)?;
            if position.is_none() {
                return Ok(());
            }
        }
    }

    /// Removes flows and counts their ends, unless a packet of it was seen at or after `unless_seen_since` (nanoseconds of
    /// `CLOCK_MONOTONIC`; `u64::MAX` removes in any case). Tells how many were removed.
    fn remove_flows(&mut self, keys: &[FlowKey], unless_seen_since: u64) -> Result<u64, DatapathError>;

    /// Removes what flows have left behind, of the same part of the table as [`Self::some_flows`] visits, and after the
    /// last part what none has used for two passes. While flows do not age ([`SettingsFlags::AGELESS`]) all of the part
    /// count as seen now.
    ///
    /// [`SettingsFlags::AGELESS`]: lb_common::abi::SettingsFlags::AGELESS
    fn tidy_flows(&mut self, position: Option<Position>) -> Result<Option<Position>, DatapathError>;

    /// Reads the counts of the flows of backends with these ids, in their order.
    fn live_counts(&self, backends: &[u32]) -> Result<Vec<LiveCount>, DatapathError>;

    /// Adds to the number of live flows of a backend, while the program counts on.
    fn adjust_live(&mut self, backend: u32, by: i64) -> Result<(), DatapathError>;

    /// Reads the counters of these services and backends, by id, and those that belong to none.
    fn counters(&self, services: &[u32], backends: &[u32]) -> Result<Counters, DatapathError>;
}
