//! What each forward demands of the addresses and ports of vip and backends.

use std::{collections::HashMap, net::IpAddr};

use toml::Spanned;

use crate::config::{
    diagnostic::{Diagnostic, Span},
    raw::{RawBackend, RawService},
    validated::{Forward, PortRange},
    values::BackendAddress,
};

/// Tells of backends that the service's forward cannot reach.
pub(super) fn reach_every_backend(service: &RawService, found: &mut Vec<Diagnostic>) {
    // An unknown forward has been told, and what it would demand is not known.
    let Some(forward) = service.forward.or(Forward::Nat) else {
        return;
    };
    if !forward.encapsulates() {
        one_family(service, found);
    }
    if forward == Forward::Local {
        ports_of_processes(service, found);
    } else {
        loopback_is_local(service, found);
    }
    if forward.keeps_destination() {
        ports_kept(service, forward, found);
    }
}

/// A packet that reached a backend under a VIP would come back to the balancer. A process on this host may listen on
/// the VIP, if not on a port of a service.
pub(super) fn vips_are_no_backends(services: &[RawService], found: &mut Vec<Diagnostic>) {
    let mut vips: HashMap<IpAddr, Span> = HashMap::new();
    for vip in services.iter().filter_map(|service| service.vip.given()) {
        vips.entry(*vip.get_ref()).or_insert(vip.span());
    }
    for service in services {
        if service.forward.value() == Some(Forward::Local) {
            processes_apart_from_services(service, services, found);
            continue;
        }
        let own = service.vip.given();
        for address in addresses(service) {
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
                        "write the address that the server itself has on its network, or forward = \"local\" for a \
                         process on this host",
                    )
                    .with_related(span, whose),
                );
            }
        }
    }
}

/// What would be a process of `local` is a service: its clients and those of the process could not be told apart.
fn processes_apart_from_services(service: &RawService, services: &[RawService], found: &mut Vec<Diagnostic>) {
    for address in addresses(service) {
        let BackendAddress {
            address: backend,
            ports: Some(ports),
        } = *address.get_ref()
        else {
            continue;
        };
        // Ports of the same service are told with all addresses, not only the VIP.
        let others = services.iter().filter(|other| {
            !std::ptr::eq(*other, service)
                && other.vip.value() == Some(backend)
                && other.protocol.value() == service.protocol.value()
        });
        let taken = others.into_iter().find_map(|other| {
            let (range, port) = common(other, ports.range())?;
            Some((range, port, other.name.value().unwrap_or_default()))
        });
        if let Some((span, port, name)) = taken {
            found.push(
                Diagnostic::new(
                    address.span(),
                    format!("port {port} of {backend} is that of the service \"{name}\", not of a process"),
                    "write a port that a process on this host listens on and no service has",
                )
                .with_related(span, format!("the ports of \"{name}\"")),
            );
        }
    }
}

/// Rewriting and plain sending keep the family of a packet.
fn one_family(service: &RawService, found: &mut Vec<Diagnostic>) {
    let Some(vip) = service.vip.given() else {
        return;
    };
    let (family, example) = if vip.get_ref().is_ipv4() {
        ("IPv4", "10.0.0.11")
    } else {
        ("IPv6", "2001:db8::11")
    };
    for address in addresses(service) {
        let backend = address.get_ref().address;
        if vip.get_ref().is_ipv4() != backend.is_ipv4() {
            found.push(
                Diagnostic::new(
                    address.span(),
                    format!(
                        "the backend {backend} is of another address family than the vip {}: one service, one family",
                        vip.get_ref()
                    ),
                    format!(
                        "write the server's {family} address, such as \"{example}\", or forward = \"ipip\" or \"gue\", \
                         which reach backends of both families"
                    ),
                )
                .with_related(vip.span(), "the vip"),
            );
        }
    }
}

/// A loopback address means another host to each host.
fn loopback_is_local(service: &RawService, found: &mut Vec<Diagnostic>) {
    for address in addresses(service) {
        let backend = address.get_ref().address;
        if !backend.is_loopback() {
            continue;
        }
        let diagnostic = Diagnostic::new(
            address.span(),
            format!("{backend} is a loopback address, by which only forward \"local\" reaches a server"),
            "write forward = \"local\" for a process on this host, or else the address that the server has on the \
             network",
        );
        found.push(with_forward(diagnostic, service));
    }
}

/// A packet that keeps its destination keeps its port.
fn ports_kept(service: &RawService, forward: Forward, found: &mut Vec<Diagnostic>) {
    let Some(of_service) = service.ports.given() else {
        return;
    };
    let single = match of_service.get_ref().as_slice() {
        [range] if range.get_ref().count() == 1 => Some(range.get_ref().first),
        _ => None,
    };
    for address in addresses(service) {
        let Some(ports) = address.get_ref().ports.map(|ports| ports.range()) else {
            continue;
        };
        let why = match single {
            Some(port) if ports.count() == 1 && ports.first == port => continue,
            Some(port) => format!("packets arrive with port {port}, not {ports}"),
            None => {
                "packets arrive with the port that the client used, and the service has several".to_owned()
            }
        };
        let diagnostic = Diagnostic::new(
            address.span(),
            format!("`{forward}` does not change the port: {why}"),
            format!(
                "write \"{}\", without a port, and have the server listen on the service's, or forward = \"nat\" or \
                 \"full-nat\"",
                address.get_ref().address
            ),
        );
        found.push(with_forward(diagnostic, service));
    }
}

/// A process on this host listens on a port that is not the service's.
fn ports_of_processes(service: &RawService, found: &mut Vec<Diagnostic>) {
    let any = service.ports.given().and_then(|ports| {
        let mut ports = ports.get_ref().iter();
        ports.find(|range| *range.get_ref() == PortRange::ANY)
    });
    if let Some(any) = any {
        let diagnostic = Diagnostic::new(
            any.span(),
            "`local` needs a port for the processes that is not the service's, and \"any\" leaves none",
            "write the ports that clients use: 80, [80, 443] or \"8000-8099\"",
        );
        found.push(with_forward(diagnostic, service));
    }
    for address in addresses(service) {
        let BackendAddress {
            address: backend,
            ports,
        } = *address.get_ref();
        let Some(ports) = ports else {
            let example = std::net::SocketAddr::new(backend, 8000);
            let diagnostic = Diagnostic::new(
                address.span(),
                "`local` needs the port that the process listens on",
                format!("write it with the address, such as \"{example}\""),
            );
            found.push(with_forward(diagnostic, service));
            continue;
        };
        if let (None, Some((span, port))) = (any, common(service, ports.range())) {
            found.push(
                Diagnostic::new(
                    address.span(),
                    format!("port {port} is the service's own: with `local` the process needs another one"),
                    "have the process listen on a port that clients of the service do not use, and write that one",
                )
                .with_related(span, "the service's port"),
            );
        }
    }
}

/// The first of a service's ranges that has ports in common with another range, and these.
fn common(service: &RawService, other: PortRange) -> Option<(Span, PortRange)> {
    let ranges = service.ports.given()?.get_ref();
    ranges.iter().find_map(|range| {
        let common = range.get_ref().common(other)?;
        Some((range.span(), common))
    })
}

fn addresses(service: &RawService) -> impl Iterator<Item = &Spanned<BackendAddress>> {
    let backends: &[RawBackend] = &service.backends;
    backends.iter().filter_map(|backend| backend.address.given())
}

fn with_forward(diagnostic: Diagnostic, service: &RawService) -> Diagnostic {
    match service.forward.span() {
        Some(span) => diagnostic.with_related(span, "the forward"),
        None => diagnostic,
    }
}
