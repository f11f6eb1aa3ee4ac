//! From the desired state to exact map contents: ids, flags and pools; pure.
//!
//! What the maps hold now is an input, so that services and backends keep their ids, and their flows with them,
//! over every change and over a restart of the daemon.

mod candidates;
mod filters;
mod identity;
pub mod maglev;
mod probe_paths;
mod restore;
pub mod round_robin;
mod slots;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use lb_common::abi::{
    self, BackendFlags, Link, MAX_SERVICE_KEYS, MAX_SOURCE_FILTERS, ROLE_BACKEND, ROLE_VIP, ServiceFlags,
    SettingsFlags,
};
use lb_common::logic::ageing;

use self::candidates::Candidate;
pub use self::{
    filters::SourceFilters,
    probe_paths::probe_path,
    restore::{Restored, restore},
    slots::{SlotTables, shares},
};
use crate::{
    config::{Backend, Forward, Protocol, Service, Strategy},
    datapath::{Contents, Operation, Sizes},
    model::{Administrative, Health, Model, TCP_CLOSING_TIMEOUT, TCP_OPENING_TIMEOUT},
};

/// Name of the loopback interface in every network namespace.
const LOOPBACK: &str = "lo";

/// What the maps shall hold, and who is who in them.
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    pub contents: Contents,
    pub directory: Directory,
}

/// Ids of what the configuration names; backends that have left it are not in here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// By name.
    pub services: BTreeMap<String, u32>,
    /// By the name of the service, in the order of its backends.
    pub backends: BTreeMap<String, Vec<u32>>,
}

impl Directory {
    /// The ids of a service's backends, in their order; none where the service is not in here.
    pub fn backends_of(&self, service: &Service) -> &[u32] {
        self.backends.get(&service.name).map_or(&[], Vec::as_slice)
    }

    /// The ids of all backends.
    pub fn all_backends(&self) -> Vec<u32> {
        self.backends.values().flatten().copied().collect()
    }
}

/// Why a configuration does not fit into the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    #[error("the configuration has {needed} {objects}, {limit} fit: remove some")]
    TooMany {
        objects: &'static str,
        needed: usize,
        limit: usize,
    },
    #[error(
        "the configuration has {needed} {objects}, and the maps were made for {limit}: `limits.{objects}` (\"auto\", or at \
         least {needed}) takes effect with new maps, after `xlb detach`, which ends all flows, and a start"
    )]
    TooManyForMaps {
        /// As the key of the configuration is called.
        objects: &'static str,
        needed: usize,
        limit: u32,
    },
    /// Old entries leave the maps only after the new ones are in place.
    #[error(
        "the new configuration's {objects} do not fit beside the old ones: {needed} together, {limit} fit; \
         change the configuration in two steps, first without the services and backends to be replaced, or raise \
         `limits.{objects}`, which takes `xlb detach` and a new start"
    )]
    TooManyAtOnce {
        objects: &'static str,
        needed: usize,
        limit: usize,
    },
}

/// Says what the maps shall hold, given what they hold; compiling again from the result gives the same.
///
/// A backend that has left its service stays, marked as removed, until its last flow has ended; the mark says too whether
/// the service wants that by a reset. A service that is gone stays in the same way, out of reach, with its backends: flows
/// have their ids, which nobody else is to get before.
///
/// # Errors
/// When something does not fit into the maps, also together with what has to leave them first.
pub fn compile(tables: &mut SlotTables, model: &Model, actual: &Contents) -> Result<Compiled, CompileError> {
    let directory = assign_ids(&model.config.services, actual, &model.sizes)?;
    let mut contents = Contents {
        settings: settings(model, &actual.settings),
        ..Contents::default()
    };
    let mut backends = Vec::new();
    for service in &model.config.services {
        let Some(id) = directory.services.get(&service.name) else {
            continue;
        };
        let candidates = add_backends(&mut backends, *id, service, &directory, model, actual);
        contents.pools.insert(*id, tables.pool(service, candidates));
        add_service(&mut contents, *id, service);
    }
    tables.retain_used();
    // All at once: a tree that grows at its end is left half empty, and this is the largest.
    contents.backends = backends.into_iter().collect();
    add_removed_services(&mut contents, model, actual);
    add_removed_backends(&mut contents, &directory, model, actual);
    if contents.service_keys.keys().any(|key| key.port == 0) {
        contents.settings.flags |= SettingsFlags::ANY_PORT;
    }
    let is_local = |service: &abi::Service| service.forward == abi::Forward::Local.number();
    if contents.services.values().any(is_local) {
        contents.settings.flags |= SettingsFlags::LOCAL;
    }
    if model.config.interfaces.iter().any(|name| name == LOOPBACK) {
        contents.settings.flags |= SettingsFlags::ON_LOOPBACK;
    }
    add_addresses(&mut contents);
    check_limits(&contents, actual)?;
    Ok(Compiled { contents, directory })
}

/// Says what changes in the maps because health or administrative state of a service's backends has, where nothing else has: the same as
/// [`compile`] and a plan from its result, without a look at the other services.
///
/// Nothing where the service is not in the maps.
pub fn follow_states(
    tables: &mut SlotTables,
    model: &Model,
    service: &Service,
    directory: &Directory,
    actual: &Contents,
) -> Option<Vec<Operation>> {
    let id = *directory.services.get(&service.name)?;
    let mut backends = Vec::new();
    let candidates = add_backends(&mut backends, id, service, directory, model, actual);
    let pool = tables.pool(service, candidates);
    // The entries come before the pool that leads to them.
    let mut operations: Vec<Operation> = (backends.into_iter())
        .filter(|(id, backend)| actual.backends.get(id) != Some(backend))
        .map(|(id, backend)| Operation::PutBackend(id, backend))
        .collect();
    if actual.pools.get(&id) != Some(&pool) {
        operations.push(Operation::PutPool(id, pool));
    }
    Some(operations)
}

/// Tells whether [`compile`] says something else because of what the last sweep has found: something can go from the maps, or
/// flows age again. It mostly has not.
pub fn is_changed_by_sweep(model: &Model, actual: &Contents) -> bool {
    let is_ageless = actual.settings.flags & SettingsFlags::AGELESS != 0;
    let may_go = |(id, backend): (&u32, &abi::Backend)| {
        backend.flags & BackendFlags::REMOVED != 0 && model.live_flows.get(id) == Some(&0)
    };
    is_ageless && model.ages_are_renewed
        || !model.left_services.is_empty()
        || actual.backends.iter().any(may_go)
}

/// Finds the ids that exist and gives the lowest free ones to the others.
fn assign_ids(services: &[Service], actual: &Contents, sizes: &Sizes) -> Result<Directory, CompileError> {
    let mut directory = Directory::default();
    let backends = services.iter().map(|service| service.backends.len()).sum();
    check_size("services", services.len(), sizes.services)?;
    check_size("backends", backends, sizes.backends)?;

    // An id that no key leads to or has led to is out of reach of packets, whatever an interrupted change has left under
    // it; a retry finds it again.
    let removed = (actual.services.iter())
        .filter(|(_, service)| service.flags & ServiceFlags::REMOVED != 0)
        .map(|(id, _)| *id);
    let used_services: BTreeSet<u32> = (actual.service_keys.values().copied()).chain(removed).collect();
    let mut free_services = (0..sizes.services).filter(|id| !used_services.contains(id));
    let mut free_backends = (1..=sizes.backends).filter(|id| !actual.backends.contains_key(id));
    let known_backends = identity::backends(actual, sizes);

    for (service, known) in services.iter().zip(identity::services(services, actual, sizes)) {
        let id = known
            .or_else(|| free_services.next())
            .ok_or(CompileError::TooManyAtOnce {
                objects: "services",
                needed: used_services.len() + services.len(),
                limit: sizes.services as usize,
            })?;
        directory.services.insert(service.name.clone(), id);
        let mut ids = Vec::with_capacity(service.backends.len());
        for backend in &service.backends {
            let known = known_backends.get(&identity::of_backend(id, backend)).copied();
            let id = known
                .or_else(|| free_backends.next())
                .ok_or(CompileError::TooManyAtOnce {
                    objects: "backends",
                    needed: actual.backends.len() + backends,
                    limit: sizes.backends as usize,
                })?;
            ids.push(id);
        }
        directory.backends.insert(service.name.clone(), ids);
    }
    Ok(directory)
}

fn settings(model: &Model, actual: &abi::Settings) -> abi::Settings {
    let flow_table = &model.config.flow_table;
    let (source_port_first, source_port_count) = model.source_ports;
    let is_new = actual.tick_shifts == [0; 4];
    let mut settings = abi::Settings {
        seed: model.seed,
        tcp_idle: nanoseconds(flow_table.tcp_idle_timeout),
        tcp_opening: nanoseconds(TCP_OPENING_TIMEOUT),
        tcp_closing: nanoseconds(TCP_CLOSING_TIMEOUT),
        udp_idle: nanoseconds(flow_table.udp_idle_timeout),
        source_port_first,
        source_port_count,
        flags: 0,
        ipip_source_v4: IpAddr::V4(model.config.ipip_source.v4.network()).into(),
        ipip_source_v6: IpAddr::V6(model.config.ipip_source.v6.network()).into(),
        ipip_varying_v4: u32::from(model.config.ipip_source.v4.hostmask()).to_be(),
        ipip_varying_v6: (u128::from(model.config.ipip_source.v6.hostmask()) as u32).to_be(),
        tick_shifts: [0; 4],
        _pad: 0,
        // By another seed no flow would be found any more.
        table_seed: if is_new { model.seed } else { actual.table_seed },
    };
    settings.tick_shifts = ageing::tick_shifts(&settings);
    let is_ageless = actual.flags & SettingsFlags::AGELESS != 0;
    let has_other_ticks = !is_new && actual.tick_shifts != settings.tick_shifts;
    if has_other_ticks || is_ageless && !model.ages_are_renewed {
        settings.flags |= SettingsFlags::AGELESS;
    }
    settings
}

fn nanoseconds(duration: Duration) -> u64 {
    duration.as_nanos().try_into().unwrap_or(u64::MAX)
}

/// Adds the backends of a service by their ids; gives those that new flows may be put on.
fn add_backends(
    entries: &mut Vec<(u32, abi::Backend)>,
    id: u32,
    service: &Service,
    directory: &Directory,
    model: &Model,
    actual: &Contents,
) -> Vec<Candidate> {
    let mut candidates = Vec::new();
    let shares = candidates::shares(model, service);
    let backends = service
        .backends
        .iter()
        .zip(directory.backends_of(service).iter().copied());
    for ((backend, backend_id), share) in backends.zip(shares) {
        let candidate = Candidate::new(backend_id, model, backend, share.weight);
        let mut entry = abi::Backend {
            address: backend.address.into(),
            port: backend.port.unwrap_or(0).to_be(),
            flags: flags(model, service, backend, share.is_candidate),
            service_plus_one: id + 1,
            weight: share.weight,
            max_connections: backend.max_connections.unwrap_or(0),
            // From the server's identity rather than a counter: nothing has to remember which were given before,
            // and a server that returns to its id also returns to what is left of its flows.
            generation: (actual.backends.get(&backend_id))
                .map_or(candidate.identity as u32, |entry| entry.generation),
            ..abi::Backend::default()
        };
        set_next_hop(&mut entry, model);
        if let Some(former) = actual.backends.get(&backend_id) {
            follow_source(&mut entry, former, service.forward);
        }
        entries.push((backend_id, entry));
        if share.is_candidate {
            candidates.push(candidate);
        }
    }
    candidates
}

fn add_service(contents: &mut Contents, id: u32, service: &Service) {
    contents.services.insert(id, service_entry(service));
    contents
        .service_keys
        .extend(identity::keys(service).map(|key| (key, id)));
    contents.source_filters.extend(filters::of_service(id, service));
}

fn forward_in_maps(forward: Forward) -> abi::Forward {
    match forward {
        Forward::Nat => abi::Forward::Nat,
        Forward::FullNat => abi::Forward::FullNat,
        Forward::Dsr => abi::Forward::Dsr,
        Forward::IpIp => abi::Forward::IpIp,
        Forward::Gue => abi::Forward::Gue,
        Forward::Local => abi::Forward::Local,
    }
}

fn service_entry(service: &Service) -> abi::Service {
    let strategy = match service.strategy {
        Strategy::ConsistentHash => abi::Strategy::ConsistentHash,
        Strategy::IpHash => abi::Strategy::IpHash,
        Strategy::RoundRobin => abi::Strategy::RoundRobin,
        Strategy::LeastConnections => abi::Strategy::LeastConnections,
    };
    abi::Service {
        vip: service.vip.into(),
        strategy: strategy.number(),
        forward: forward_in_maps(service.forward).number(),
        flags: filters::flags(service) | limits_flag(service),
        in_use: 1,
        new_flow_rate: service.new_flow_cap.map_or(0, |cap| cap.rate),
        new_flow_burst: service.new_flow_cap.map_or(0, |cap| cap.burst),
        rate_prefix_v4: service.new_flow_cap.map_or(0, |cap| cap.prefix_v4),
        rate_prefix_v6: service.new_flow_cap.map_or(0, |cap| cap.prefix_v6),
        _pad: 0,
    }
}

/// [`ServiceFlags::HAS_FULL`], where it is so.
fn limits_flag(service: &Service) -> u16 {
    if service
        .backends
        .iter()
        .any(|backend| backend.max_connections.is_some())
    {
        ServiceFlags::HAS_FULL
    } else {
        0
    }
}

/// All flags but [`BackendFlags::NEXT_HOP_KNOWN`].
fn flags(model: &Model, service: &Service, backend: &Backend, is_candidate: bool) -> u16 {
    let health = model.health_of(service, &backend.name);
    let administrative = model.administrative_of(service, &backend.name);
    let mut flags = match health {
        Health::Unknown => 0,
        Health::Up => BackendFlags::UP,
        Health::Down => BackendFlags::DOWN,
    };
    flags |= match administrative {
        Administrative::Enabled => 0,
        Administrative::Draining { .. } => BackendFlags::DRAINING,
        Administrative::Disabled => BackendFlags::DISABLED,
    };
    if is_candidate {
        flags |= BackendFlags::ACCEPTS_NEW | BackendFlags::KEEPS_UDP;
    }
    if health != Health::Down && administrative != Administrative::Disabled {
        flags |= BackendFlags::KEEPS_UDP;
    }
    flags
}

/// Sets the way to the backend as far as it is known.
fn set_next_hop(entry: &mut abi::Backend, model: &Model) {
    let next_hop = model.next_hops.get(&IpAddr::from(entry.address));
    entry.flags &= !BackendFlags::NEXT_HOP_KNOWN;
    entry.ifindex = next_hop.map_or(0, |hop| hop.ifindex);
    entry.source = next_hop.map(|hop| hop.source.into()).unwrap_or_default();
    entry.link = Link::default();
    entry.tags = next_hop.map(|hop| hop.tags).unwrap_or_default();
    entry.mtu = next_hop.map_or(0, |hop| hop.mtu);
    if let Some((hop, mac)) = next_hop.and_then(|hop| Some((hop, hop.next_hop_mac?))) {
        entry.flags |= BackendFlags::NEXT_HOP_KNOWN;
        entry.link = Link::new(mac, hop.source_mac);
    }
}

/// Has the flows of a `full-nat` backend begin anew when this host's address towards it becomes another: replies to
/// the former one are not found under the new one, and a flow that is never idle would stay deaf for ever.
fn follow_source(entry: &mut abi::Backend, former: &abi::Backend, forward: Forward) {
    let unknown = abi::Address::default();
    if entry.source == unknown {
        // Remembered here: a route that comes back mostly brings the same address.
        entry.source = former.source;
    } else if forward == Forward::FullNat && former.source != unknown && former.source != entry.source {
        entry.generation = entry.generation.wrapping_add(1);
    }
}

/// Adds the services that have left the configuration but may still have flows: no key leads to them.
fn add_removed_services(contents: &mut Contents, model: &Model, actual: &Contents) {
    let has_led_to: BTreeSet<u32> = actual.service_keys.values().copied().collect();
    for (id, entry) in &actual.services {
        let is_removed = entry.flags & ServiceFlags::REMOVED != 0;
        if contents.services.contains_key(id)
            || *id >= model.sizes.services
            || !(is_removed || has_led_to.contains(id))
            || is_removed && model.left_services.contains(id)
        {
            continue;
        }
        let entry = abi::Service {
            flags: entry.flags | ServiceFlags::REMOVED,
            ..*entry
        };
        contents.services.insert(*id, entry);
    }
}

/// Adds the backends that have left their service but may still have flows.
fn add_removed_backends(contents: &mut Contents, directory: &Directory, model: &Model, actual: &Contents) {
    let resetting = (model.config.services.iter())
        .filter(|service| service.reset_on_removal && service.protocol == Protocol::Tcp)
        .filter_map(|service| directory.services.get(&service.name));
    let resetting: BTreeSet<u32> = resetting.copied().collect();
    for (id, entry) in &actual.backends {
        let Some(service) =
            (entry.service_plus_one.checked_sub(1)).filter(|service| contents.services.contains_key(service))
        else {
            continue;
        };
        let has_flows = model.live_flows.get(id) != Some(&0);
        if contents.backends.contains_key(id) || !(1..=model.sizes.backends).contains(id) || !has_flows {
            continue;
        }
        let resets = if resetting.contains(&service) {
            BackendFlags::RESETS
        } else {
            0
        };
        let mut entry = abi::Backend {
            flags: BackendFlags::REMOVED | resets,
            ..*entry
        };
        set_next_hop(&mut entry, model);
        contents.backends.insert(*id, entry);
    }
}

fn add_addresses(contents: &mut Contents) {
    for key in contents.service_keys.keys() {
        *contents.addresses.entry(key.vip).or_default() |= ROLE_VIP;
    }
    for backend in contents.backends.values() {
        *contents.addresses.entry(backend.address).or_default() |= ROLE_BACKEND;
    }
}

/// Checks what is found by key; ids have been checked when they were assigned, and with them addresses: there is room for
/// one for each service and each backend.
fn check_limits(contents: &Contents, actual: &Contents) -> Result<(), CompileError> {
    let (keys, limit) = (&contents.service_keys, MAX_SERVICE_KEYS as usize);
    check_limit("ports", keys.len(), limit)?;
    let leaving = actual
        .service_keys
        .keys()
        .filter(|key| !keys.contains_key(key))
        .count();
    check_limit_at_once("ports", keys.len() + leaving, limit)?;

    let (filters, limit) = (&contents.source_filters, MAX_SOURCE_FILTERS as usize);
    check_limit("source prefixes", filters.len(), limit)?;
    let leaving = actual
        .source_filters
        .keys()
        .filter(|key| !filters.contains_key(key))
        .count();
    check_limit_at_once("source prefixes", filters.len() + leaving, limit)
}

fn check_size(objects: &'static str, needed: usize, limit: u32) -> Result<(), CompileError> {
    if needed <= limit as usize {
        Ok(())
    } else {
        Err(CompileError::TooManyForMaps {
            objects,
            needed,
            limit,
        })
    }
}

fn check_limit(objects: &'static str, needed: usize, limit: usize) -> Result<(), CompileError> {
    if needed <= limit {
        Ok(())
    } else {
        Err(CompileError::TooMany {
            objects,
            needed,
            limit,
        })
    }
}

fn check_limit_at_once(objects: &'static str, needed: usize, limit: usize) -> Result<(), CompileError> {
    if needed <= limit {
        Ok(())
    } else {
        Err(CompileError::TooManyAtOnce {
            objects,
            needed,
            limit,
        })
    }
}

#[cfg(test)]
mod tests;
