//! What an operation makes of the contents, and how they are written down for people.

use std::{
    collections::BTreeMap,
    fmt::{self, Display},
    net::{IpAddr, SocketAddr},
};

use lb_common::abi::{
    Backend, BackendFlags, FILTER_ALLOW, FILTER_DENY, FilterKey, ROLE_BACKEND, ROLE_VIP, Service,
    ServiceFlags, ServiceKey, Settings, SettingsFlags, TCP, UDP,
};

use super::{Contents, Operation, Pool};

impl Contents {
    /// Does to the contents what the operation does to the maps; removing what is absent changes nothing.
    pub fn record(&mut self, operation: &Operation) {
        match operation {
            Operation::PutSettings(settings) => self.settings = *settings,
            Operation::PutAddress(address, roles) => drop(self.addresses.insert(*address, *roles)),
            Operation::RemoveAddress(address) => drop(self.addresses.remove(address)),
            Operation::PutBackend(id, backend) => drop(self.backends.insert(*id, *backend)),
            Operation::RemoveBackend(id) => drop(self.backends.remove(id)),
            Operation::PutPool(id, pool) => drop(self.pools.insert(*id, pool.clone())),
            Operation::RemovePool(id) => drop(self.pools.remove(id)),
            Operation::PutService(id, service) => drop(self.services.insert(*id, *service)),
            Operation::RemoveService(id) => drop(self.services.remove(id)),
            Operation::PutServiceKey(key, id) => drop(self.service_keys.insert(*key, *id)),
            Operation::RemoveServiceKey(key) => drop(self.service_keys.remove(key)),
            Operation::PutFilter(key, length, value) => {
                self.source_filters.insert((*key, *length), *value);
            }
            Operation::RemoveFilter(key, length) => drop(self.source_filters.remove(&(*key, *length))),
        }
    }
}

/// Writes the contents as one line for each entry, sorted by map and key; the same contents give the same lines.
///
/// A pool is its members and what its slot table is known by. The seed is secret and not written.
pub fn contents_dump(contents: &Contents) -> Vec<String> {
    let mut lines = Vec::new();
    // In the order that people expect rather than that of the words in the maps.
    let addresses: BTreeMap<IpAddr, u32> = contents
        .addresses
        .iter()
        .map(|(k, v)| ((*k).into(), *v))
        .collect();
    for (address, roles) in &addresses {
        let roles = names(*roles, &[(ROLE_VIP, "vip"), (ROLE_BACKEND, "backend")]);
        lines.push(format!("address {address} {roles}"));
    }
    for (id, backend) in &contents.backends {
        lines.push(format!("backend {id} {}", DisplayBackend(backend)));
    }
    for (id, service) in &contents.services {
        lines.push(format!("service {id} {}", DisplayService(service)));
    }
    let mut service_keys: Vec<_> = contents.service_keys.iter().collect();
    service_keys.sort_by_key(|(key, _)| (IpAddr::from(key.vip), u16::from_be(key.port), key.protocol));
    for (key, id) in service_keys {
        lines.push(format!("service-key {} service {id}", DisplayKey(key)));
    }
    if contents.settings != Settings::default() {
        lines.push(format!("settings {}", DisplaySettings(&contents.settings)));
    }
    for (id, pool) in &contents.pools {
        lines.push(format!("pool {id} {}", DisplayPool(pool)));
    }
    for ((key, length), value) in &contents.source_filters {
        lines.push(format!("source-filter {}", DisplayFilter(key, *length, *value)));
    }
    lines
}

struct DisplayBackend<'a>(&'a Backend);

impl Display for DisplayBackend<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backend = self.0;
        match backend.service_plus_one.checked_sub(1) {
            Some(service) => write!(f, "service {service} ")?,
            None => write!(f, "unused ")?,
        }
        match u16::from_be(backend.port) {
            0 => write!(f, "{}", backend.address)?,
            port => write!(f, "{}", SocketAddr::new(backend.address.into(), port))?,
        }
        write!(
            f,
            " generation {:08x} {}",
            backend.generation,
            names(u32::from(backend.flags), FLAGS)
        )?;
        if backend.ifindex != 0 {
            write!(f, " interface {} source {}", backend.ifindex, backend.source)?;
        }
        if backend.flags & BackendFlags::NEXT_HOP_KNOWN != 0 {
            write!(
                f,
                " link {} > {}",
                mac(backend.link.source()),
                mac(backend.link.destination())
            )?;
        }
        Ok(())
    }
}

const FLAGS: &[(u32, &str)] = &[
    (BackendFlags::NEXT_HOP_KNOWN as u32, "next-hop-known"),
    (BackendFlags::ACCEPTS_NEW as u32, "accepts-new"),
    (BackendFlags::KEEPS_UDP as u32, "keeps-udp"),
    (BackendFlags::UP as u32, "up"),
    (BackendFlags::DOWN as u32, "down"),
    (BackendFlags::DRAINING as u32, "draining"),
    (BackendFlags::DISABLED as u32, "disabled"),
    (BackendFlags::REMOVED as u32, "removed"),
    (BackendFlags::RESETS as u32, "resets"),
];

struct DisplayService<'a>(&'a Service);

impl Display for DisplayService<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let strategy = match self.0.strategy {
            1 => "consistent-hash",
            2 => "ip-hash",
            3 => "round-robin",
            4 => "least-connections",
            _ => "unknown-strategy",
        };
        let forward = match self.0.forward {
            1 => "nat",
            2 => "full-nat",
            3 => "dsr",
            4 => "ipip",
            5 => "gue",
            6 => "local",
            _ => "unknown-forward",
        };
        let unused = if self.0.in_use == 0 { " unused" } else { "" };
        write!(f, "{strategy} {forward}{unused}")?;
        for (bit, name) in SERVICE_FLAGS {
            if self.0.flags & bit != 0 {
                write!(f, " {name}")?;
            }
        }
        if self.0.new_flow_rate != 0 {
            let Service {
                new_flow_rate: rate,
                new_flow_burst: burst,
                rate_prefix_v4: v4,
                rate_prefix_v6: v6,
                ..
            } = self.0;
            write!(f, " new-flows {rate}/s burst {burst} of /{v4} or /{v6}")?;
        }
        Ok(())
    }
}

const SERVICE_FLAGS: &[(u16, &str)] = &[
    (ServiceFlags::HAS_FILTERS, "has-filters"),
    (ServiceFlags::DENIES_OTHERS, "denies-others"),
    (ServiceFlags::REMOVED, "removed"),
    (ServiceFlags::HAS_FULL, "has-full"),
];

struct DisplayPool<'a>(&'a Pool);

impl Display for DisplayPool<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Pool { members, table } = self.0;
        let members: Vec<String> = members.iter().map(ToString::to_string).collect();
        write!(
            f,
            "members {}",
            if members.is_empty() {
                "-".to_owned()
            } else {
                members.join(",")
            }
        )?;
        match table {
            Some(table) => write!(f, " slots {} table {:016x}", table.slots, table.digest),
            None => Ok(()),
        }
    }
}

struct DisplayKey<'a>(&'a ServiceKey);

impl Display for DisplayKey<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vip = SocketAddr::new(IpAddr::from(self.0.vip), u16::from_be(self.0.port));
        match self.0.protocol {
            TCP => write!(f, "tcp {vip}"),
            UDP => write!(f, "udp {vip}"),
            other => write!(f, "protocol-{other} {vip}"),
        }
    }
}

struct DisplayFilter<'a>(&'a FilterKey, u32, u32);

impl Display for DisplayFilter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(FilterKey { service, address }, length, value) = self;
        let before = if address.is_v4() { 32 + 96 } else { 32 };
        let bits = i64::from(*length) - before;
        write!(f, "service {service} {address}/{bits} ")?;
        match *value {
            FILTER_ALLOW => f.write_str("allow"),
            FILTER_DENY => f.write_str("deny"),
            other => write!(f, "{other:#x}"),
        }
    }
}

struct DisplaySettings<'a>(&'a Settings);

impl Display for DisplaySettings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let milliseconds = |nanoseconds| nanoseconds / 1_000_000;
        let Settings {
            source_port_first: first,
            source_port_count: count,
            flags,
            ..
        } = self.0;
        write!(
            f,
            "{}{}{}{}tcp-idle {} ms, tcp-opening {} ms, tcp-closing {} ms, udp-idle {} ms, {count} source ports from {first}",
            if flags & SettingsFlags::ANY_PORT == 0 {
                ""
            } else {
                "any-port, "
            },
            if flags & SettingsFlags::LOCAL == 0 {
                ""
            } else {
                "local, "
            },
            if flags & SettingsFlags::AGELESS == 0 {
                ""
            } else {
                "ageless, "
            },
            if flags & SettingsFlags::ON_LOOPBACK == 0 {
                ""
            } else {
                "on loopback, "
            },
            milliseconds(self.0.tcp_idle),
            milliseconds(self.0.tcp_opening),
            milliseconds(self.0.tcp_closing),
            milliseconds(self.0.udp_idle),
        )
    }
}

/// The names of the bits that are set, `-` for none and the bits as a number for those without a name.
fn names(bits: u32, table: &[(u32, &str)]) -> String {
    let mut names: Vec<String> = (table.iter())
        .filter(|(bit, _)| bits & bit != 0)
        .map(|(_, name)| (*name).to_owned())
        .collect();
    let unnamed = table.iter().fold(bits, |bits, (bit, _)| bits & !bit);
    if unnamed != 0 {
        names.push(format!("{unnamed:#x}"));
    }
    if names.is_empty() {
        "-".to_owned()
    } else {
        names.join(",")
    }
}

fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}
