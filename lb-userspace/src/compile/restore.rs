//! What a restarted daemon reads back from the maps.

use std::{collections::BTreeMap, time::SystemTime};

use lb_common::abi::BackendFlags;

use super::identity;
use crate::{
    config::Config,
    datapath::{Contents, Sizes},
    model::{Administrative, BackendName, Health},
};

/// Health and administrative state of the backends that the maps and the configuration have in common.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Only what is known.
    pub health: BTreeMap<BackendName, Health>,
    /// Only what is not `enabled`.
    pub administrative: BTreeMap<BackendName, Administrative>,
}

/// Reads health and administrative state back from the flags; a drain begins anew at `now`.
pub fn restore(config: &Config, actual: &Contents, sizes: &Sizes, now: SystemTime) -> Restored {
    let mut restored = Restored::default();
    let ids = identity::backends(actual, sizes);
    for (service, service_id) in
        config
            .services
            .iter()
            .zip(identity::services(&config.services, actual, sizes))
    {
        let Some(service_id) = service_id else { continue };
        for backend in &service.backends {
            let id = ids.get(&identity::of_backend(service_id, backend));
            let Some(entry) = id.and_then(|id| actual.backends.get(id)) else {
                continue;
            };
            let name = (service.name.clone(), backend.name.clone());
            if let Some(health) = health(entry.flags) {
                restored.health.insert(name.clone(), health);
            }
            if let Some(administrative) = administrative(entry.flags, now) {
                restored.administrative.insert(name, administrative);
            }
        }
    }
    restored
}

fn health(flags: u16) -> Option<Health> {
    match (flags & BackendFlags::UP != 0, flags & BackendFlags::DOWN != 0) {
        (true, false) => Some(Health::Up),
        (false, true) => Some(Health::Down),
        _ => None,
    }
}

fn administrative(flags: u16, now: SystemTime) -> Option<Administrative> {
    if flags & BackendFlags::DISABLED != 0 {
        Some(Administrative::Disabled)
    } else if flags & BackendFlags::DRAINING != 0 {
        Some(Administrative::Draining { since: now })
    } else {
        None
    }
}
