//! Backends of a service: from entries to servers, each of them once, and enough of them.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
};

use crate::config::{
    diagnostic::{Diagnostic, Span},
    raw::{RawBackend, RawService},
    validated::{Backend, Forward},
    values::{self, BackendPorts},
};

const WEIGHT: u32 = 100;

/// All servers of a service: an entry with a range of ports is one for each.
pub(super) fn all(raw: &RawService, found: &mut Vec<Diagnostic>) -> Option<Vec<Backend>> {
    weights_not_all_zero(raw, found);
    not_all_backup(raw, found);
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
    if let Some(backends) = &backends {
        min_healthy_is_possible(raw, backends, found);
    }
    backends
}

/// The servers of one entry.
fn servers(entry: &RawBackend, found: &mut Vec<Diagnostic>) -> Option<Vec<Backend>> {
    let address = entry.address.value()?;
    // What is wrong was told; with something in its place the rest of the entry is checked all the same.
    let weight = entry.weight.or(WEIGHT).unwrap_or(WEIGHT);
    let backup = entry.backup.or(false).unwrap_or(false);
    let name = entry.name.value();
    let server = |name: String, port: Option<u16>| Backend {
        name,
        address: address.address,
        port,
        weight,
        max_connections: entry.max_connections.value(),
        backup,
    };
    let derived = |port: Option<u16>| match port {
        None => address.address.to_string(),
        Some(port) => SocketAddr::new(address.address, port).to_string(),
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
            if let Some((first, port)) = self.same_server(server.address, of_server(server, service), service)
            {
                clash.get_or_insert_with(|| {
                    let what = match port {
                        Some(port) => format!("{} port {port}", server.address),
                        None => server.address.to_string(),
                    };
                    let other = if keeps_port(service) {
                        "address"
                    } else {
                        "address or port"
                    };
                    Diagnostic::new(
                        address_span.clone(),
                        format!("{what} is already a backend of this service"),
                        format!(
                            "write another {other}, or remove one of the two; `weight` gives a backend a larger share"
                        ),
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
                .entry((server.address, of_server(server, service)))
                .or_insert(address_span.clone());
            if let Some(port) = of_server(server, service) {
                let ports = self.with_port.entry(server.address).or_default();
                ports.push((port, address_span.clone()));
            }
        }
        clash
    }

    /// Where a backend was given that some connections would reach at the same address and port, and that port.
    fn same_server(
        &self,
        address: IpAddr,
        port: Option<u16>,
        service: &RawService,
    ) -> Option<(Span, Option<u16>)> {
        if let Some(first) = self.addresses.get(&(address, port)) {
            return Some((first.clone(), port));
        }
        let of_service = |port: u16| {
            let ports = service.ports.given()?.get_ref();
            let own = ports.iter().any(|range| range.get_ref().contains(port));
            own.then_some(port)
        };
        match port {
            Some(port) => {
                let first = self.addresses.get(&(address, None))?;
                Some((first.clone(), Some(of_service(port)?)))
            }
            None => self
                .with_port
                .get(&address)?
                .iter()
                .find_map(|(port, first)| Some((first.clone(), Some(of_service(*port)?)))),
        }
    }
}

/// The port that tells a server from others at its address: none where packets keep theirs, whatever is written.
fn of_server(server: &Backend, service: &RawService) -> Option<u16> {
    server.port.filter(|_| !keeps_port(service))
}

fn keeps_port(service: &RawService) -> bool {
    service.forward.value().is_some_and(Forward::keeps_destination)
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

fn not_all_backup(service: &RawService, found: &mut Vec<Diagnostic>) {
    let all_backup = (service.backends.iter()).all(|backend| backend.backup.value() == Some(true));
    let last = service.backends.last().and_then(|backend| backend.backup.span());
    if let (true, Some(last)) = (all_backup, last) {
        found.push(
            Diagnostic::new(
                last,
                "every backend of this service is a backup, and none is there to be backed up",
                "remove `backup` from those that serve while they are up",
            )
            .with_related(service.span.clone(), "this service"),
        );
    }
}

/// Without its backup backends a service must be able to be healthy.
fn min_healthy_is_possible(service: &RawService, backends: &[Backend], found: &mut Vec<Diagnostic>) {
    let Some(min_healthy) = service.min_healthy.given() else {
        return;
    };
    let primary = backends.iter().filter(|backend| !backend.backup).count();
    // That there is none has been told.
    if primary == 0 || *min_healthy.get_ref() as usize <= primary {
        return;
    }
    let besides = if primary == backends.len() {
        ""
    } else {
        " besides the backup ones"
    };
    let (has, help) = match primary {
        1 => ("1 backend".to_owned(), "write 1, or leave the key out".to_owned()),
        _ => (
            format!("{primary} backends"),
            format!("write a number from 1 to {primary}"),
        ),
    };
    found.push(
        Diagnostic::new(
            min_healthy.span(),
            format!(
                "the service has {has}{besides}: {} of them can never be up",
                min_healthy.get_ref()
            ),
            help,
        )
        .with_related(service.span.clone(), "this service"),
    );
}

/// Where the name of an entry is; of its address where it has none of its own.
fn name_span(entry: &RawBackend) -> Span {
    (entry.name.span())
        .or_else(|| entry.address.span())
        .unwrap_or(0..0)
}
