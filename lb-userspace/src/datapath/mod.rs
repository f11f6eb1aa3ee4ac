//! The only door to the kernel's part of xlb: a trait in the words of the domain.
//!
//! [`Contents`] is everything that the reconciler governs; flows and counters are the kernel's own and only read.

pub mod barrier;
mod contents;
mod counters;
pub mod decap;
pub mod faulty;
mod hooks;
pub mod kernel;
mod local;
pub mod memory;
mod packet_log;
pub mod pass;
mod pins;
pub mod probes;
mod syscall;

use std::{collections::BTreeMap, io, sync::Arc};

use lb_common::abi::{
    Address, Backend, FilterKey, Flow, FlowKey, Forward, LiveCount, Service, ServiceKey, Settings,
};

pub use contents::contents_dump;
pub use counters::Counters;
pub use hooks::LinkKind;
pub use pins::Pins;

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
    /// Slot table by service id: `SLOT_COUNT` backend ids, 0 where there is none.
    pub slots: BTreeMap<u32, SlotTable>,
    /// By backend id, from 1 on; unused ids are absent.
    pub backends: BTreeMap<u32, Backend>,
    /// `FILTER_ALLOW` or `FILTER_DENY` by key and length in bits: 32 for the service and those of the prefix.
    pub source_filters: BTreeMap<(FilterKey, u32), u32>,
}

/// Backend ids by slot.
pub type SlotTable = Arc<[u32]>;

/// One change to one map; each takes effect at once and for itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    PutSettings(Settings),
    PutAddress(Address, u32),
    RemoveAddress(Address),
    PutBackend(u32, Backend),
    RemoveBackend(u32),
    /// Swaps the whole table in one step: no packet sees a half-written one.
    PutSlots(u32, SlotTable),
    RemoveSlots(u32),
    PutService(u32, Service),
    RemoveService(u32),
    PutServiceKey(ServiceKey, u32),
    RemoveServiceKey(ServiceKey),
    /// A key, its length in bits and the value.
    PutFilter(FilterKey, u32, u32),
    RemoveFilter(FilterKey, u32),
}

/// What is known of the live flows of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Live {
    /// By the data path.
    pub count: LiveCount,
    /// By the daemon; see [`Datapath::set_live_base`].
    pub base: u64,
}

impl Live {
    /// How many there are now; 0 where the parts were not read at one instant and contradict each other.
    pub const fn flows(&self) -> u64 {
        let flows = self
            .count
            .opened
            .wrapping_sub(self.count.ended)
            .wrapping_add(self.base);
        if flows > i64::MAX as u64 { 0 } else { flows }
    }
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position(Vec<u8>);

/// The 5-tuple of the replies of a flow that is translated; the data path builds the same.
pub fn reply_key(client: &FlowKey, flow: &Flow, backend: &Backend) -> FlowKey {
    FlowKey {
        // A process on this host may answer from any of its addresses: none is in the key.
        source: if flow.forward == Forward::Local.number() {
            Address::default()
        } else {
            backend.address
        },
        destination: if flow.forward == Forward::FullNat.number() {
            backend.source
        } else {
            client.source
        },
        source_port: if backend.port == 0 {
            client.destination_port
        } else {
            backend.port
        },
        destination_port: flow.source_port,
        protocol: client.protocol,
    }
}

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

    /// Reads back the same, where `known` is what the maps held last; slot tables may be taken from that where the
    /// kernel makes looking at them slow.
    fn refresh(&self, known: &Contents) -> Result<Contents, DatapathError> {
        let _ = known;
        self.read()
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

    /// Removes flows, each with the key of its replies, unless a packet of it was seen at or after `unless_seen_since`
    /// (nanoseconds of `CLOCK_MONOTONIC`; `u64::MAX` removes in any case). Tells how many were removed.
    fn remove_flows(&mut self, keys: &[FlowKey], unless_seen_since: u64) -> Result<u64, DatapathError>;

    /// Of some thousand keys of replies, the first ones or those from a position on, removes those that lead to no flow,
    /// or to one that has another by now. Tells how many were removed, and the position of those that follow.
    fn remove_some_orphan_replies(
        &mut self,
        position: Option<Position>,
    ) -> Result<(u64, Option<Position>), DatapathError>;

    /// Reads what is known of the live flows of these backends, by id.
    fn live_counts(&self, backends: &[u32]) -> Result<BTreeMap<u32, Live>, DatapathError>;

    /// Sets the number that makes live flows of what the data path counts: `opened - ended + base`, wrapping.
    fn set_live_base(&mut self, backend: u32, base: u64) -> Result<(), DatapathError>;

    /// Reads the counters of these services and backends, by id, and those that belong to none.
    fn counters(&self, services: &[u32], backends: &[u32]) -> Result<Counters, DatapathError>;
}
