//! What fits into the maps.

use crate::config::{
    diagnostic::{Diagnostic, Span},
    raw::RawService,
    validated::PortRange,
};
use lb_common::abi::{MAX_BACKENDS, MAX_SERVICE_KEYS, MAX_SERVICES, MAX_SOURCE_FILTERS};

/// Tells what does not fit in the maps; with more backends than that, they are not even made.
pub(super) fn suffices(services: &[RawService], found: &mut Vec<Diagnostic>) -> bool {
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
            ports.get_ref().iter().map(|range| keys(*range.get_ref())).sum(),
        ))
    });
    if let Some(span) = first_over(ports, u64::from(MAX_SERVICE_KEYS)) {
        let what = "ports of all services together";
        found.push(limit(span, what, u64::from(MAX_SERVICE_KEYS)));
    }
    let filters = services
        .iter()
        .flat_map(|service| [&service.allow, &service.deny])
        .filter_map(|prefixes| {
            let prefixes = prefixes.given()?;
            Some((prefixes.span(), prefixes.get_ref().len() as u64))
        });
    if let Some(span) = first_over(filters, u64::from(MAX_SOURCE_FILTERS)) {
        let what = "prefixes in `allow` and `deny` of all services together";
        found.push(limit(span, what, u64::from(MAX_SOURCE_FILTERS)));
    }
    let backends = services
        .iter()
        .flat_map(|service| &service.backends)
        .filter_map(|backend| {
            let address = backend.address.given()?;
            let servers = (address.get_ref().ports).map_or(1, |ports| ports.range().count());
            Some((address.span(), u64::from(servers)))
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

/// How many keys lead to a service by these ports: one for each, but only one for all.
fn keys(range: PortRange) -> u64 {
    if range == PortRange::ANY {
        1
    } else {
        u64::from(range.count())
    }
}
