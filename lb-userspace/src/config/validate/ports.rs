//! Ports of services: each given once, each of one service.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
};

use toml::Spanned;

use crate::config::{
    diagnostic::{Diagnostic, Span},
    raw::RawService,
    validated::{PortRange, Protocol},
};

/// A service names each of its ports once, and nothing beside all of them.
pub(super) fn each_given_once(services: &[RawService], found: &mut Vec<Diagnostic>) {
    for service in services {
        let ports = service.ports.given().map(Spanned::get_ref);
        if let Some(diagnostic) = ports.and_then(|ports| beside_any(ports)) {
            found.push(diagnostic);
            continue;
        }
        for (range, other) in overlaps(ports.into_iter().flatten().map(|range| (range, ()))) {
            found.push(
                Diagnostic::new(
                    range.span(),
                    format!("port {} is given twice", range.shared(&other)),
                    "write each port once",
                )
                .with_related(other.span(), "first given here"),
            );
        }
    }
}

/// Two services may share an address, but no port of it in the same protocol.
pub(super) fn services_apart(services: &[RawService], found: &mut Vec<Diagnostic>) {
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
                        "the services \"{}\" and \"{}\" overlap: both take {protocol} port {} on {vip}",
                        name(earlier),
                        name(later),
                        range.shared(&other)
                    ),
                    "write another port, vip or protocol, or put the backends of both into one service",
                )
                .with_related(other.span(), format!("the ports of \"{}\"", name(earlier))),
            );
        }
    }
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

    /// The ports that an overlapping range has, too.
    fn shared(&self, other: &Self) -> PortRange {
        let range = *self.range.get_ref();
        range.common(*other.range.get_ref()).unwrap_or(range)
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

/// Tells of other ports in the same list as all of them.
fn beside_any(ports: &[Spanned<PortRange>]) -> Option<Diagnostic> {
    let any = ports
        .iter()
        .position(|range| *range.get_ref() == PortRange::ANY)?;
    let other = (0..ports.len()).find(|index| *index != any)?;
    let (any, other) = (&ports[any], &ports[other]);
    Some(
        Diagnostic::new(
            any.span(),
            "\"any\" is every port, so there is nothing to add to it",
            "write port = \"any\" alone, or only the ports that are meant",
        )
        .with_related(other.span(), "given beside it"),
    )
}
