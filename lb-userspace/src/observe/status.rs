//! What `xlb status` shows; in JSON the keys are stable.

use std::collections::BTreeMap;

use lb_common::abi::{Count, Reason, Totals};
use serde::{Deserialize, Serialize};

use crate::model::Health;

/// The state of a daemon and its data path.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub instance: String,
    pub pid: u32,
    pub uptime_seconds: u64,
    pub interfaces: Vec<InterfaceStatus>,
    pub flow_table: FlowTableStatus,
    pub maps: MapsStatus,
    /// Packets by verdict, over all CPUs.
    pub packets: PacketTotals,
    /// Packets that belong to no service, by reason; those without any are left out.
    pub reasons: BTreeMap<String, Traffic>,
    pub services: Vec<ServiceStatus>,
    /// What does not work, in a sentence each; empty when all is well.
    pub problems: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InterfaceStatus {
    pub name: String,
    /// `native` or `generic`.
    pub xdp_mode: String,
    /// Why native mode was not obtained.
    pub fallback: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlowTableStatus {
    pub size: u32,
    /// As of the last sweep.
    pub flows: u64,
    pub memory_bytes: u64,
}

/// How many there is room for, and what that takes of the kernel's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MapsStatus {
    pub services: u32,
    pub services_memory_bytes: u64,
    pub backends: u32,
    pub backends_memory_bytes: u64,
    pub slot_tables_memory_bytes: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PacketTotals {
    pub received: u64,
    pub passed: u64,
    pub dropped: u64,
    pub transmitted: u64,
    pub redirected: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    pub packets: u64,
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceStatus {
    pub name: String,
    pub vip: String,
    /// As in the configuration: `80`, `80,443`, `8000-8099`, `any`.
    pub port: String,
    pub protocol: String,
    pub strategy: String,
    pub forward: String,
    /// Whether at least `min_healthy` backends are healthy.
    pub healthy: bool,
    /// Backends that are up and that nothing but their own limits keeps from new flows, backup ones included.
    pub healthy_backends: u32,
    pub min_healthy: u32,
    /// Packets by reason; those without any are left out.
    pub reasons: BTreeMap<String, Traffic>,
    pub backends: Vec<BackendStatus>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackendStatus {
    pub name: String,
    pub address: String,
    pub weight: u32,
    /// Live flows that it takes; absent where there is no limit.
    pub max_connections: Option<u32>,
    /// Gets new flows only while no other backend of the service is up.
    pub backup: bool,
    /// `enabled`, `draining` or `disabled`.
    pub administrative: String,
    pub health: Health,
    /// What the last probe said; absent where there is no probe.
    pub probe: Option<String>,
    /// What stands in the way of packets to it; absent when the next hop is known.
    pub next_hop_problem: Option<String>,
    /// Share of the slot table: of new flows.
    pub share: f64,
    /// Flows in the table as of the last sweep, those included that have ended lately.
    pub flows: u64,
    /// Live flows now: those that `least-connections` compares and `max-connections` bounds.
    pub live_flows: u64,
    /// Flows that were ever put on it.
    pub flows_total: u64,
    pub forwarded: Traffic,
    pub returned: Traffic,
    /// Both ways, over the last second.
    pub packets_per_second: f64,
    pub bytes_per_second: f64,
}

impl From<Count> for Traffic {
    fn from(count: Count) -> Self {
        Self {
            packets: count.packets,
            bytes: count.bytes,
        }
    }
}

impl PacketTotals {
    /// Adds up the CPUs.
    pub fn of(cpus: &[Totals]) -> Self {
        cpus.iter().fold(Self::default(), |sum, cpu| Self {
            received: sum.received + cpu.received,
            passed: sum.passed + cpu.passed,
            dropped: sum.dropped + cpu.dropped,
            transmitted: sum.transmitted + cpu.transmitted,
            redirected: sum.redirected + cpu.redirected,
        })
    }
}

/// Counts by the name of their reason, without those that are zero.
pub fn by_reason(counts: &[Count]) -> BTreeMap<String, Traffic> {
    Reason::ALL
        .iter()
        .zip(counts)
        .filter(|(_, count)| count.packets > 0)
        .map(|(reason, count)| (reason.name().to_owned(), Traffic::from(*count)))
        .collect()
}
