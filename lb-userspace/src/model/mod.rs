//! The desired state: configuration, health, administrative state and next hops in one; pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, SystemTime},
};

use lb_common::abi::Tags;
use serde::{Deserialize, Serialize};

use crate::{
    config::{Backend, Config, Probe, Service},
    datapath::Sizes,
};

pub mod slow_start;

/// Names a backend: that of its service and its own.
pub type BackendName = (String, String);

/// Everything that decides what the maps hold.
#[derive(Clone, Debug)]
pub struct Model {
    pub config: Config,
    /// What the maps are made for.
    pub sizes: Sizes,
    /// Key of the hash.
    pub seed: [u64; 2],
    /// Source ports for flows: the first and how many.
    pub source_ports: (u16, u16),
    /// By backend; absent means `unknown`.
    pub health: BTreeMap<BackendName, Health>,
    /// By backend; absent means `enabled`.
    pub administrative: BTreeMap<BackendName, Administrative>,
    /// Percent of its weight that a backend gets while it starts slowly, by backend; absent means the whole.
    pub ramps: BTreeMap<BackendName, u32>,
    /// By backend address; absent means not resolved.
    pub next_hops: BTreeMap<IpAddr, NextHop>,
    /// Flows by backend id, as the last sweep counted them. A backend that has left the configuration goes when it
    /// has 0 here; absent means not counted since it left.
    pub live_flows: BTreeMap<u32, u64>,
    /// Services by id that have left the configuration and of which the last sweep met no flow: they go.
    pub left_services: BTreeSet<u32>,
    /// Whether the last sweep has brought the ages of all flows to the ticks that the maps have now.
    pub ages_are_renewed: bool,
}

impl Model {
    /// Health of a backend; `up` where nothing is probed.
    pub fn health_of(&self, service: &Service, backend: &str) -> Health {
        if service.health.probe == Probe::None {
            return Health::Up;
        }
        let name = (service.name.clone(), backend.to_owned());
        self.health.get(&name).copied().unwrap_or_default()
    }

    /// Tells whether a backend is enabled and has a weight.
    pub fn is_enabled(&self, service: &Service, backend: &Backend) -> bool {
        backend.weight > 0 && self.administrative_of(service, &backend.name) == Administrative::Enabled
    }

    /// Tells whether a backend gets new flows or stands by to: it is enabled, has a weight and is up.
    pub fn is_usable(&self, service: &Service, backend: &Backend) -> bool {
        self.is_enabled(service, backend) && self.health_of(service, &backend.name) == Health::Up
    }

    /// How many backends of a service are usable, backup ones included: with `min-healthy` of them it is healthy.
    pub fn healthy_backends(&self, service: &Service) -> u32 {
        let is_usable = |backend: &&Backend| self.is_usable(service, backend);
        service.backends.iter().filter(is_usable).count() as u32
    }

    /// Administrative state of a backend.
    pub fn administrative_of(&self, service: &Service, backend: &str) -> Administrative {
        let name = (service.name.clone(), backend.to_owned());
        self.administrative.get(&name).copied().unwrap_or_default()
    }
}

/// What the probes say of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// Not probed yet: gets no new flows until the first probe has succeeded.
    #[default]
    Unknown,
    Up,
    Down,
}

/// What the operator wants of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Administrative {
    #[default]
    Enabled,
    /// No new flows; the existing ones stay until the service's drain timeout has passed since then.
    Draining { since: SystemTime },
    /// No new flows, and the existing ones end at once.
    Disabled,
}

/// The way to an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// Interface that the route leaves by; of a VLAN device the one below it.
    pub ifindex: u32,
    /// This host's address on that route.
    pub source: IpAddr,
    /// MAC address of the interface.
    pub source_mac: [u8; 6],
    /// MAC address of the neighbour; `None` while it is not resolved.
    pub next_hop_mac: Option<[u8; 6]>,
    /// VLAN tags that frames to it carry.
    pub tags: Tags,
    /// Largest IP packet that the route takes; 0 while it is not known.
    pub mtu: u32,
}

/// Idle time after which a TCP flow that is opening ends: the client has given up its SYN or its answer by then.
pub const TCP_OPENING_TIMEOUT: Duration = Duration::from_secs(60);
/// Idle time after which a TCP flow that is closing ends: twice a segment's life as Linux counts it.
pub const TCP_CLOSING_TIMEOUT: Duration = Duration::from_secs(60);

#[cfg(test)]
pub(crate) mod fixture;

#[cfg(test)]
mod tests {
    use super::{
        Administrative, Health,
        fixture::{backend, model, service},
    };
    use crate::config::Backend;

    #[test]
    fn a_backend_is_healthy_when_it_is_up_enabled_and_of_some_weight() {
        let backends = vec![
            backend("up", 1, 80),
            Backend {
                backup: true,
                ..backend("backup", 2, 80)
            },
            Backend {
                weight: 0,
                ..backend("weightless", 3, 80)
            },
            backend("disabled", 4, 80),
            backend("down", 5, 80),
            backend("unknown", 6, 80),
        ];
        let web = service("web", 10, &[80], backends);
        let mut model = model(vec![web.clone()]);
        assert_eq!(model.healthy_backends(&web), 0);
        for name in ["up", "backup", "weightless", "disabled"] {
            model.set_health("web", name, Health::Up);
        }
        model.set_health("web", "down", Health::Down);
        model.set_administrative("web", "disabled", Administrative::Disabled);
        assert_eq!(model.healthy_backends(&web), 2);
    }
}
