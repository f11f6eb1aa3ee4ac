//! Which ids the services and backends of a configuration already have in the maps.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::abi::{self, Address, BackendFlags, ServiceKey};

use crate::{
    config::{Backend, PortRange, Protocol, Service},
    datapath::{Contents, Sizes},
};

/// In the key of a service of all ports: its only one.
const ANY_PORT: u16 = 0;

/// The keys of a service, in the order of its ports.
pub(super) fn keys(service: &Service) -> impl Iterator<Item = ServiceKey> {
    let vip = Address::from(service.vip);
    let protocol = match service.protocol {
        Protocol::Tcp => abi::TCP,
        Protocol::Udp => abi::UDP,
    };
    let is_any = service.ports.contains(&PortRange::ANY);
    let ports = service.ports.iter().filter(move |_| !is_any);
    (is_any.then_some(ANY_PORT).into_iter())
        .chain(ports.flat_map(|range| range.first..=range.last))
        .map(move |port| ServiceKey {
            vip,
            port: port.to_be(),
            protocol,
            _pad: 0,
        })
}

/// Finds the ids that services have by any of their keys, in the order of `services`.
///
/// When services were split or merged, the first in the order takes the id; none is given twice. What no key of its
/// own leads to may have had all ports before, or has them now.
pub(super) fn services(services: &[Service], actual: &Contents, sizes: &Sizes) -> Vec<Option<u32>> {
    let mut taken = BTreeSet::new();
    let mut take = |mut ids: &mut dyn Iterator<Item = u32>| {
        let id = (&mut ids).find(|id| *id < sizes.services && !taken.contains(id))?;
        taken.insert(id);
        Some(id)
    };
    let mut found: Vec<Option<u32>> = services
        .iter()
        .map(|service| take(&mut keys(service).filter_map(|key| actual.service_keys.get(&key).copied())))
        .collect();
    for (service, id) in services.iter().zip(&mut found).filter(|(_, id)| id.is_none()) {
        let Some(own) = keys(service).next() else { continue };
        let any = ServiceKey {
            port: ANY_PORT,
            ..own
        };
        if own != any {
            *id = take(&mut actual.service_keys.get(&any).copied().into_iter());
            continue;
        }
        let last = ServiceKey {
            port: u16::MAX,
            ..own
        };
        let of_vip = (actual.service_keys.range(any..=last)).filter(|(key, _)| key.protocol == own.protocol);
        *id = take(&mut of_vip.map(|(_, id)| *id));
    }
    found
}

/// What a backend is known by: service id, address and port as the maps have it.
pub(super) type BackendIdentity = (u32, Address, u16);

/// The identity of a backend of the configuration.
pub(super) fn of_backend(service: u32, backend: &Backend) -> BackendIdentity {
    (service, backend.address.into(), backend.port.unwrap_or(0).to_be())
}

/// Ids of the backends in the maps by their identity.
pub(super) fn backends(actual: &Contents, sizes: &Sizes) -> BTreeMap<BackendIdentity, u32> {
    let mut ids = BTreeMap::new();
    let in_use = |removed: u16| {
        (actual.backends.iter())
            .filter(move |(_, backend)| backend.flags & BackendFlags::REMOVED == removed)
            .filter(|(id, _)| (1..=sizes.backends).contains(*id))
    };
    for (id, backend) in in_use(0).chain(in_use(BackendFlags::REMOVED)) {
        if let Some(service) = backend.service_plus_one.checked_sub(1) {
            ids.entry((service, backend.address, backend.port)).or_insert(*id);
        }
    }
    ids
}
