//! From what is written to a [`Config`]: what single values cannot show, and the defaults.

use std::{
    cell::OnceCell,
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    path::PathBuf,
    time::Duration,
};

use lb_common::abi::{MAX_BACKENDS, MAX_SERVICE_KEYS, MAX_SERVICES};
use rustls::pki_types::ServerName;
use toml::Spanned;

use super::{
    diagnostic::{Diagnostic, Span},
    raw::{Field, RawBackend, RawConfig, RawHealth, RawService},
    trust::Trust,
    validated::{
        Backend, Config, FlowTable, Forward, HealthCheck, PortRange, Probe, Protocol, Service, Strategy,
    },
    values::{self, BackendPorts, FlowTableSize, ProbeType},
};

const TCP_IDLE_TIMEOUT: Duration = Duration::from_secs(60 * 60);
const UDP_IDLE_TIMEOUT: Duration = Duration::from_secs(60);
const SEED_FILE: &str = "/etc/xlb/seed";
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);
const INTERVAL: Duration = Duration::from_secs(2);
const TIMEOUT: Duration = Duration::from_secs(1);
const RISE: u32 = 2;
const FALL: u32 = 3;
const REQUEST_PATH: &str = "/";
const WEIGHT: u32 = 100;

/// The configuration, unless something in it is wrong; everything that is wrong is added to `found`.
pub(super) fn validate(raw: &RawConfig, found: &mut Vec<Diagnostic>) -> Option<Config> {
    unique_interfaces(raw, found);
    unique_service_names(&raw.services, found);
    ports_within_service(&raw.services, found);
    services_apart(&raw.services, found);
    vips_are_no_backends(&raw.services, found);
    if !within_capacity(&raw.services, found) {
        return None;
    }
    let services: Vec<Option<Service>> = {
        let system = SystemTrust::default();
        raw.services
            .iter()
            .map(|raw| service(raw, &system, found))
            .collect()
    };
    Some(Config {
        interfaces: unspanned(raw.interfaces.value()?),
        xdp_mode: raw.xdp_mode.or(Default::default())?,
        flow_table: FlowTable {
            size: match raw.flow_table_size.or(FlowTableSize::Auto)? {
                FlowTableSize::Auto => None,
                FlowTableSize::Entries(entries) => Some(entries),
            },
            tcp_idle_timeout: raw.tcp_idle_timeout.or(TCP_IDLE_TIMEOUT)?,
            udp_idle_timeout: raw.udp_idle_timeout.or(UDP_IDLE_TIMEOUT)?,
        },
        seed_file: raw.seed_file.or(PathBuf::from(SEED_FILE))?,
        socket: raw.socket.optional()?,
        services: services.into_iter().collect::<Option<_>>()?,
    })
}

fn service(raw: &RawService, system: &SystemTrust, found: &mut Vec<Diagnostic>) -> Option<Service> {
    address_families(raw, found);
    weights_not_all_zero(raw, found);
    let backends = backends(raw, found);
    let health = match (&raw.health, raw.protocol.value()) {
        (Some(health), _) => health_check(health, system, found),
        (None, Some(protocol)) => Some(default_health_check(protocol)),
        (None, None) => None,
    };
    let mut ports = unspanned(raw.ports.value()?);
    ports.sort_unstable();
    Some(Service {
        name: raw.name.value()?,
        vip: raw.vip.value()?,
        ports,
        protocol: raw.protocol.value()?,
        strategy: raw.strategy.or(Strategy::ConsistentHash)?,
        forward: raw.forward.or(Forward::Nat)?,
        drain_timeout: raw.drain_timeout.or(DRAIN_TIMEOUT)?,
        assign_vip: raw.assign_vip.or(false)?,
        health: health?,
        backends: backends?,
    })
}

/// All servers of a service: an entry with a range of ports is one for each.
fn backends(raw: &RawService, found: &mut Vec<Diagnostic>) -> Option<Vec<Backend>> {
    let mut backends = Some(Vec::new());
    let mut places = BackendPlaces::default();
    for entry in &raw.backends {
        let servers = servers(entry, found);
        if let Some(diagnostic) = places.clash(entry, servers.as_deref().unwrap_or_default(), raw) {
            found.push(diagnostic);
        }
        backends = backends.zip(servers).map(|(mut all, servers)| {
            all.extend(servers);
            all
        });
    }
    backends
}

/// The servers of one entry.
fn servers(entry: &RawBackend, found: &mut Vec<Diagnostic>) -> Option<Vec<Backend>> {
    let address = entry.address.value()?;
    // What is wrong was told; with something in its place the rest of the entry is checked all the same.
    let weight = entry.weight.or(WEIGHT).unwrap_or(WEIGHT);
    let name = entry.name.value();
    let server = |name: String, port: Option<u16>| Backend {
        name,
        address: address.address,
        port,
        weight,
    };
    let derived = |port: Option<u16>| match port {
        None => address.address.to_string(),
        Some(port) => std::net::SocketAddr::new(address.address, port).to_string(),
    };
    let range = match address.ports {
        None => return Some(vec![server(name.unwrap_or_else(|| derived(None)), None)]),
        Some(BackendPorts::One(port)) => {
            return Some(vec![server(
                name.unwrap_or_else(|| derived(Some(port))),
                Some(port),
            )]);
        }
        Some(BackendPorts::Each(range)) => range,
    };
    let Some(name) = name else {
        let ports = range.first..=range.last;
        return Some(
            ports
                .map(|port| server(derived(Some(port)), Some(port)))
                .collect(),
        );
    };
    (range.first..=range.last)
        .map(|port| Ok(server(values::name_with_port(&name, port)?, Some(port))))
        .collect::<Result<_, values::Problem>>()
        .map_err(|problem| {
            found.push(Diagnostic::new(name_span(entry), problem.message, problem.help));
        })
        .ok()
}

/// Where the names and addresses of a service's backends were first given.
#[derive(Default)]
struct BackendPlaces {
    names: HashMap<String, Span>,
    addresses: HashMap<(IpAddr, Option<u16>), Span>,
    /// By address alone, to compare those with a port to those without.
    with_port: HashMap<IpAddr, Vec<(u16, Span)>>,
}

impl BackendPlaces {
    /// Remembers the servers of an entry and tells the first that was there before.
    fn clash(&mut self, entry: &RawBackend, servers: &[Backend], service: &RawService) -> Option<Diagnostic> {
        let address_span = entry.address.given()?.span();
        let mut clash = None;
        for server in servers {
            if let Some((first, port)) = self.same_server(server, service) {
                clash.get_or_insert_with(|| {
                    let what = match port {
                        Some(port) => format!("{} port {port}", server.address),
                        None => server.address.to_string(),
                    };
                    Diagnostic::new(
                        address_span.clone(),
                        format!("{what} is already a backend of this service"),
                        "write another address or port, or remove one of the two; `weight` gives a backend a larger \
                         share",
                    )
                    .with_related(first, "first given here")
                });
            } else if let Some(first) = self.names.get(&server.name) {
                clash.get_or_insert_with(|| {
                    Diagnostic::new(
                        name_span(entry),
                        format!(
                            "the name \"{}\" is already that of a backend of this service",
                            server.name
                        ),
                        "write another name: commands and metrics tell backends apart by it",
                    )
                    .with_related(first.clone(), "first given here")
                });
            }
        }
        for server in servers {
            self.names.entry(server.name.clone()).or_insert(name_span(entry));
            self.addresses
                .entry((server.address, server.port))
                .or_insert(address_span.clone());
            if let Some(port) = server.port {
                let ports = self.with_port.entry(server.address).or_default();
                ports.push((port, address_span.clone()));
            }
        }
        clash
    }

    /// Where a backend was given that some connections would reach at the same address and port, and that port.
    fn same_server(&self, server: &Backend, service: &RawService) -> Option<(Span, Option<u16>)> {
        if let Some(first) = self.addresses.get(&(server.address, server.port)) {
            return Some((first.clone(), server.port));
        }
        let of_service = |port: u16| {
            let ports = service.ports.given()?.get_ref();
            ports
                .iter()
                .any(|range| (range.get_ref().first..=range.get_ref().last).contains(&port))
                .then_some(port)
        };
        match server.port {
            Some(port) => {
                let first = self.addresses.get(&(server.address, None))?;
                Some((first.clone(), Some(of_service(port)?)))
            }
            None => self
                .with_port
                .get(&server.address)?
                .iter()
                .find_map(|(port, first)| Some((first.clone(), Some(of_service(*port)?)))),
        }
    }
}

/// The authorities of this system, read once for all services and only when one of them needs them.
#[derive(Default)]
struct SystemTrust(OnceCell<Option<Trust>>);

impl SystemTrust {
    fn get(&self) -> Option<Trust> {
        self.0.get_or_init(Trust::of_system).clone()
    }
}

fn health_check(raw: &RawHealth, system: &SystemTrust, found: &mut Vec<Diagnostic>) -> Option<HealthCheck> {
    timeout_within_interval(raw, found);
    let probe_type = raw.probe_type.value()?;
    keys_of_other_probes(raw, probe_type, found);
    let port = raw.port.optional();
    let probe = match probe_type {
        ProbeType::None => Probe::None,
        ProbeType::Tcp => Probe::Tcp { port: port? },
        ProbeType::Http => Probe::Http {
            port: port?,
            path: raw.path.or(REQUEST_PATH.to_owned())?,
            host: raw.host.optional()?,
        },
        ProbeType::Https => {
            let (trust, server_name) = (trust(raw, system, found), server_name(raw, found));
            Probe::Https {
                port: port?,
                path: raw.path.or(REQUEST_PATH.to_owned())?,
                host: raw.host.optional()?,
                server_name: server_name?,
                trust: trust?,
            }
        }
        ProbeType::Grpc => Probe::Grpc {
            port: port?,
            host: raw.host.optional()?,
            service: raw.service.or(String::new())?,
        },
        ProbeType::Udp => {
            let send = text_or_hex(["send", "send-hex"], [&raw.send, &raw.send_hex], found);
            let expect = text_or_hex(["expect", "expect-hex"], [&raw.expect, &raw.expect_hex], found);
            Probe::Udp {
                port: port?,
                send: send?,
                expect: expect?,
            }
        }
        ProbeType::Icmp => Probe::Icmp,
        ProbeType::Exec => {
            if let (Field::Absent, Some(place)) = (&raw.command, raw.probe_type.span()) {
                found.push(Diagnostic::new(
                    place,
                    "type \"exec\" needs a `command`",
                    format!("write {}", values::COMMAND),
                ));
            }
            Probe::Exec {
                port: port?,
                command: raw.command.value()?,
            }
        }
    };
    let interval = raw.interval.or(INTERVAL)?;
    Some(HealthCheck {
        probe,
        interval,
        timeout: raw.timeout.or(TIMEOUT.min(interval))?,
        rise: raw.rise.or(RISE)?,
        fall: raw.fall.or(FALL)?,
    })
}

/// A key that the type has no use for is a misunderstanding: it is told, not ignored.
fn keys_of_other_probes(raw: &RawHealth, probe_type: ProbeType, found: &mut Vec<Diagnostic>) {
    use ProbeType::{Exec, Grpc, Http, Https, Tcp, Udp};
    let keys: [(&str, Option<Span>, &[ProbeType]); 12] = [
        ("path", raw.path.span(), &[Http, Https]),
        ("host", raw.host.span(), &[Http, Https, Grpc]),
        ("server-name", raw.server_name.span(), &[Https]),
        ("ca-file", raw.ca_file.span(), &[Https]),
        ("verify", raw.verify.span(), &[Https]),
        ("service", raw.service.span(), &[Grpc]),
        ("send", raw.send.span(), &[Udp]),
        ("send-hex", raw.send_hex.span(), &[Udp]),
        ("expect", raw.expect.span(), &[Udp]),
        ("expect-hex", raw.expect_hex.span(), &[Udp]),
        ("command", raw.command.span(), &[Exec]),
        ("port", raw.port.span(), &[Tcp, Http, Https, Grpc, Udp, Exec]),
    ];
    for (key, span, types) in keys {
        let Some(span) = span.filter(|_| !types.contains(&probe_type)) else {
            continue;
        };
        let words: Vec<&str> = types.iter().map(|probe_type| probe_type.word()).collect();
        found.push(Diagnostic::new(
            span,
            format!(
                "`{key}` is only for type {}, not for \"{}\"",
                values::alternatives(&words),
                probe_type.word()
            ),
            format!("write type = \"{}\", or remove `{key}`", words[0]),
        ));
    }
}

fn trust(raw: &RawHealth, system: &SystemTrust, found: &mut Vec<Diagnostic>) -> Option<Trust> {
    if raw.verify.or(true)? {
        return match raw.ca_file.optional()? {
            Some(trust) => Some(trust),
            None => system.get().or_else(|| {
                found.push(Diagnostic::new(
                    raw.probe_type.span()?,
                    "this system has no authorities' certificates to verify with",
                    "install the package ca-certificates, or write ca-file = \"/etc/xlb/ca.pem\"",
                ));
                None
            }),
        };
    }
    if let (Some(ca_file), Some(verify)) = (raw.ca_file.span(), raw.verify.span()) {
        found.push(
            Diagnostic::new(
                ca_file,
                "`ca-file` is of no use where nothing is verified",
                "remove `ca-file`, or remove verify = false",
            )
            .with_related(verify, "switched off here"),
        );
    }
    Some(Trust::Anybody)
}

/// Whose certificate it has to be: `server-name`, or else `host` without its port.
fn server_name(raw: &RawHealth, found: &mut Vec<Diagnostic>) -> Option<Option<ServerName<'static>>> {
    if let Some(name) = raw.server_name.optional()? {
        return Some(Some(name));
    }
    let Some(host) = raw.host.given() else {
        return Some(None);
    };
    let written = host.get_ref().as_str();
    let name = match (written.parse::<IpAddr>(), written.strip_prefix('[')) {
        (Ok(_), _) => written,
        (_, Some(rest)) => rest.split(']').next().unwrap_or(rest),
        (_, None) => written.split(':').next().unwrap_or(written),
    };
    match ServerName::try_from(name.to_owned()) {
        Ok(name) => Some(Some(name)),
        Err(_) => {
            found.push(Diagnostic::new(
                host.span(),
                format!("{} cannot be the name in a certificate", values::quoted(name)),
                "write the name that the certificate is for under `server-name`",
            ));
            None
        }
    }
}

/// Bytes that are given as text or in hexadecimal.
fn text_or_hex(
    keys: [&str; 2],
    [text, hex]: [&Field<Vec<u8>>; 2],
    found: &mut Vec<Diagnostic>,
) -> Option<Option<Vec<u8>>> {
    if let (Some(text), Some(hex)) = (text.span(), hex.span()) {
        found.push(
            Diagnostic::new(
                hex,
                format!("`{}` and `{}` say the same in two ways", keys[0], keys[1]),
                format!("remove `{}` or `{}`", keys[0], keys[1]),
            )
            .with_related(text, "the other one"),
        );
    }
    Some(text.optional()?.or(hex.optional()?))
}

/// What holds without a table `[service.health]`: UDP has no answer that would mean "up" for every server.
fn default_health_check(protocol: Protocol) -> HealthCheck {
    HealthCheck {
        probe: match protocol {
            Protocol::Tcp => Probe::Tcp { port: None },
            Protocol::Udp => Probe::None,
        },
        interval: INTERVAL,
        timeout: TIMEOUT,
        rise: RISE,
        fall: FALL,
    }
}

fn timeout_within_interval(raw: &RawHealth, found: &mut Vec<Diagnostic>) {
    let (Some(timeout), Some(interval)) = (raw.timeout.given(), raw.interval.or(INTERVAL)) else {
        return;
    };
    if *timeout.get_ref() <= interval {
        return;
    }
    let diagnostic = Diagnostic::new(
        timeout.span(),
        format!(
            "the timeout {} is longer than the interval {}",
            humantime::format_duration(*timeout.get_ref()),
            humantime::format_duration(interval)
        ),
        format!(
            "write a timeout of at most \"{0}\", or an interval of at least \"{1}\"",
            humantime::format_duration(interval),
            humantime::format_duration(*timeout.get_ref())
        ),
    );
    found.push(match raw.interval.given() {
        Some(given) => diagnostic.with_related(given.span(), "the interval"),
        None => diagnostic,
    });
}

fn unique_interfaces(raw: &RawConfig, found: &mut Vec<Diagnostic>) {
    let mut first: HashMap<&str, Span> = HashMap::new();
    for interface in raw.interfaces.given().into_iter().flat_map(Spanned::get_ref) {
        if let Some(first) = first.get(interface.get_ref().as_str()) {
            found.push(
                Diagnostic::new(
                    interface.span(),
                    format!("the interface \"{}\" is given twice", interface.get_ref()),
                    "write each interface once",
                )
                .with_related(first.clone(), "first given here"),
            );
        } else {
            first.insert(interface.get_ref(), interface.span());
        }
    }
}

fn unique_service_names(services: &[RawService], found: &mut Vec<Diagnostic>) {
    let mut first: HashMap<&str, Span> = HashMap::new();
    for name in services.iter().filter_map(|service| service.name.given()) {
        if let Some(first) = first.get(name.get_ref().as_str()) {
            found.push(
                Diagnostic::new(
                    name.span(),
                    format!("the name \"{}\" is already that of a service", name.get_ref()),
                    "write another name: commands and metrics tell services apart by it",
                )
                .with_related(first.clone(), "first given here"),
            );
        } else {
            first.insert(name.get_ref(), name.span());
        }
    }
}

fn ports_within_service(services: &[RawService], found: &mut Vec<Diagnostic>) {
    for service in services {
        let ports = service.ports.given().map(Spanned::get_ref);
        for (range, other) in overlaps(ports.into_iter().flatten().map(|range| (range, ()))) {
            found.push(
                Diagnostic::new(
                    range.span(),
                    format!("port {} is given twice", shared(&range, &other)),
                    "write each port once",
                )
                .with_related(other.span(), "first given here"),
            );
        }
    }
}

/// Two services may share an address, but no port of it in the same protocol.
fn services_apart(services: &[RawService], found: &mut Vec<Diagnostic>) {
    let mut by_address: BTreeMap<(IpAddr, Protocol), Vec<&RawService>> = BTreeMap::new();
    for service in services {
        if let (Some(vip), Some(protocol)) = (service.vip.value(), service.protocol.value()) {
            by_address.entry((vip, protocol)).or_default().push(service);
        }
    }
    for ((vip, protocol), services) in by_address {
        let ports = services.iter().enumerate().flat_map(|(index, service)| {
            let ports = service.ports.given().map(Spanned::get_ref);
            ports.into_iter().flatten().map(move |range| (range, index))
        });
        let mut told = HashSet::new();
        for (range, other) in overlaps(ports) {
            let (later, earlier) = (services[range.owner], services[other.owner]);
            if range.owner == other.owner || !told.insert((range.owner, other.owner)) {
                continue;
            }
            let name = |service: &RawService| {
                service
                    .name
                    .value()
                    .unwrap_or_else(|| "without a name".to_owned())
            };
            found.push(
                Diagnostic::new(
                    range.span(),
                    format!(
                        "the services \"{}\" and \"{}\" overlap: both take {} port {} on {vip}",
                        name(earlier),
                        name(later),
                        match protocol {
                            Protocol::Tcp => "tcp",
                            Protocol::Udp => "udp",
                        },
                        shared(&range, &other)
                    ),
                    "write another port, vip or protocol, or put the backends of both into one service",
                )
                .with_related(other.span(), format!("the ports of \"{}\"", name(earlier))),
            );
        }
    }
}

/// A packet that reached a backend under a VIP would come back to the balancer.
fn vips_are_no_backends(services: &[RawService], found: &mut Vec<Diagnostic>) {
    let mut vips: HashMap<IpAddr, Span> = HashMap::new();
    for vip in services.iter().filter_map(|service| service.vip.given()) {
        vips.entry(*vip.get_ref()).or_insert(vip.span());
    }
    for service in services {
        let own = service.vip.given();
        for address in service
            .backends
            .iter()
            .filter_map(|backend| backend.address.given())
        {
            let backend = address.get_ref().address;
            let vip = match own {
                Some(own) if *own.get_ref() == backend => Some((own.span(), "the vip of this service")),
                _ => vips
                    .get(&backend)
                    .map(|span| (span.clone(), "the vip of another service")),
            };
            if let Some((span, whose)) = vip {
                found.push(
                    Diagnostic::new(
                        address.span(),
                        format!("the backend's address {backend} is {whose}"),
                        "write the address that the server itself has on its network",
                    )
                    .with_related(span, whose),
                );
            }
        }
    }
}

/// The data path is built for IPv4 so far, and neither `nat` nor `full-nat` changes the family of a packet.
fn address_families(service: &RawService, found: &mut Vec<Diagnostic>) {
    let vip = service.vip.given();
    if let Some(vip) = vip.filter(|vip| vip.get_ref().is_ipv6()) {
        found.push(Diagnostic::new(
            vip.span(),
            "IPv6 is not built yet",
            "write an IPv4 address such as \"203.0.113.10\"",
        ));
    }
    for address in service
        .backends
        .iter()
        .filter_map(|backend| backend.address.given())
    {
        let backend = address.get_ref().address;
        match vip {
            Some(vip) if vip.get_ref().is_ipv4() != backend.is_ipv4() => found.push(
                Diagnostic::new(
                    address.span(),
                    format!(
                        "the backend {backend} is of another address family than the vip {}",
                        vip.get_ref()
                    ),
                    "write the server's IPv4 address, such as \"10.0.0.11:8080\"; the vip must be IPv4, too",
                )
                .with_related(vip.span(), "the vip"),
            ),
            _ if backend.is_ipv6() => found.push(Diagnostic::new(
                address.span(),
                "IPv6 is not built yet",
                "write an IPv4 address such as \"10.0.0.11:8080\"",
            )),
            _ => {}
        }
    }
}

fn weights_not_all_zero(service: &RawService, found: &mut Vec<Diagnostic>) {
    let all_zero = service.backends.iter().all(|backend| {
        backend
            .weight
            .given()
            .is_some_and(|weight| *weight.get_ref() == 0)
    });
    let last = service.backends.last().and_then(|backend| backend.weight.given());
    if let (true, Some(last)) = (all_zero, last) {
        found.push(
            Diagnostic::new(
                last.span(),
                "every backend of this service has weight 0, so no new flow gets one",
                "write a weight of 1 or more for at least one of them",
            )
            .with_related(service.span.clone(), "this service"),
        );
    }
}

/// Tells what does not fit in the maps; with more backends than that, they are not even made.
fn within_capacity(services: &[RawService], found: &mut Vec<Diagnostic>) -> bool {
    // Backend id 0 means "none".
    let max_backends = u64::from(MAX_BACKENDS - 1);
    let limit = |span: Span, what: &str, limit: u64| {
        Diagnostic::new(
            span,
            format!("more than {limit} {what}"),
            format!("remove some from here on: the maps in the kernel hold {limit}"),
        )
    };
    if let Some(first_over) = services.get(MAX_SERVICES as usize) {
        found.push(limit(
            first_over.span.clone(),
            "services",
            u64::from(MAX_SERVICES),
        ));
    }
    let ports = services.iter().filter_map(|service| {
        let ports = service.ports.given()?;
        Some((
            ports.span(),
            ports.get_ref().iter().map(|range| count(*range.get_ref())).sum(),
        ))
    });
    if let Some(span) = first_over(ports, u64::from(MAX_SERVICE_KEYS)) {
        let what = "ports of all services together";
        found.push(limit(span, what, u64::from(MAX_SERVICE_KEYS)));
    }
    let backends = services
        .iter()
        .flat_map(|service| &service.backends)
        .filter_map(|backend| {
            let address = backend.address.given()?;
            let servers = match address.get_ref().ports {
                Some(BackendPorts::Each(range)) => count(range),
                _ => 1,
            };
            Some((address.span(), servers))
        });
    let over = first_over(backends, max_backends);
    if let Some(span) = &over {
        found.push(limit(
            span.clone(),
            "backends of all services together",
            max_backends,
        ));
    }
    over.is_none()
}

/// The place where the running sum first exceeds the limit.
fn first_over(counts: impl Iterator<Item = (Span, u64)>, limit: u64) -> Option<Span> {
    let mut sum = 0;
    counts
        .into_iter()
        .find(|(_, count)| {
            sum += count;
            sum > limit
        })
        .map(|(span, _)| span)
}

/// A range of ports, where it is written and whose it is.
#[derive(Clone, Copy)]
struct Placed<'a, O> {
    range: &'a Spanned<PortRange>,
    owner: O,
}

impl<O> Placed<'_, O> {
    fn span(&self) -> Span {
        self.range.span()
    }
}

/// Each range that shares a port with another, the one that is later in the file first.
fn overlaps<'a, O: Copy>(
    ranges: impl Iterator<Item = (&'a Spanned<PortRange>, O)>,
) -> Vec<(Placed<'a, O>, Placed<'a, O>)> {
    let mut ranges: Vec<Placed<'a, O>> = ranges.map(|(range, owner)| Placed { range, owner }).collect();
    ranges.sort_by_key(|placed| (*placed.range.get_ref(), placed.span().start));
    let mut overlaps = Vec::new();
    let mut widest: Option<Placed<'a, O>> = None;
    for placed in ranges {
        match widest {
            Some(before) if before.range.get_ref().last >= placed.range.get_ref().first => {
                overlaps.push(if placed.span().start > before.span().start {
                    (placed, before)
                } else {
                    (before, placed)
                });
                if placed.range.get_ref().last > before.range.get_ref().last {
                    widest = Some(placed);
                }
            }
            _ => widest = Some(placed),
        }
    }
    overlaps
}

/// The ports that two overlapping ranges have in common.
fn shared<O>(one: &Placed<'_, O>, other: &Placed<'_, O>) -> String {
    let (one, other) = (one.range.get_ref(), other.range.get_ref());
    let (first, last) = (one.first.max(other.first), one.last.min(other.last));
    if first == last {
        first.to_string()
    } else {
        format!("{first}-{last}")
    }
}

fn count(range: PortRange) -> u64 {
    u64::from(range.last - range.first) + 1
}

fn name_span(entry: &RawBackend) -> Span {
    let derived_from = || entry.address.given().map(Spanned::span);
    let given: &Field<String> = &entry.name;
    given
        .given()
        .map(Spanned::span)
        .or_else(derived_from)
        .unwrap_or(0..0)
}

fn unspanned<T>(values: Vec<Spanned<T>>) -> Vec<T> {
    values.into_iter().map(Spanned::into_inner).collect()
}
