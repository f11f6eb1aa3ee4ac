//! What fits into the maps.

use crate::config::{
    diagnostic::{Diagnostic, Span},
    raw::{Field, RawConfig, RawService},
    validated::PortRange,
    values::Size,
};
use lb_common::abi::{MAX_BACKENDS, MAX_MEMBERS, MAX_SERVICE_KEYS, MAX_SERVICES, MAX_SOURCE_FILTERS};

/// Tells what does not fit in the maps; with more backends than that, they are not even made.
pub(super) fn suffices(raw: &RawConfig, found: &mut Vec<Diagnostic>) -> bool {
    let services = &raw.services;
    let limit = |span: Span, what: &str, limit: u64| {
        Diagnostic::new(
            span,
            format!("more than {limit} {what}"),
            format!("remove some from here on: the maps in the kernel hold {limit}"),
        )
    };
    let (most_services, most_backends) = (
        most(&raw.services_limit, MAX_SERVICES),
        most(&raw.backends_limit, MAX_BACKENDS),
    );
    if let Some(first_over) = services.get(most_services.entries as usize) {
        found.push(most_services.exceeded(first_over.span.clone(), "services"));
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
    for service in services {
        if let Some(span) = first_over(backends(service), u64::from(MAX_MEMBERS)) {
            found.push(limit(span, "backends of one service", u64::from(MAX_MEMBERS)));
        }
    }
    let over = first_over(services.iter().flat_map(backends), most_backends.entries.into());
    if let Some(span) = &over {
        found.push(most_backends.exceeded(span.clone(), "backends of all services together"));
    }
    over.is_none()
}

/// How many there may be, and where that is said if it is.
struct Most {
    entries: u32,
    said: Option<Span>,
}

fn most(limit: &Field<Size>, limit_of_all: u32) -> Most {
    match limit.given().map(|size| (size.get_ref().entries(), size.span())) {
        Some((Some(entries), span)) => Most {
            entries,
            said: Some(span),
        },
        _ => Most {
            entries: limit_of_all,
            said: None,
        },
    }
}

impl Most {
    fn exceeded(&self, span: Span, what: &str) -> Diagnostic {
        let message = format!("more than {} {what}", self.entries);
        match &self.said {
            Some(said) => Diagnostic::new(span, message, "write a higher limit, or \"auto\"")
                .with_related(said.clone(), "the limit"),
            None => Diagnostic::new(
                span,
                message,
                format!(
                    "remove some from here on: the maps in the kernel hold {}",
                    self.entries
                ),
            ),
        }
    }
}

/// How many backends there are at each place of a service.
fn backends(service: &RawService) -> impl Iterator<Item = (Span, u64)> {
    service.backends.iter().filter_map(|backend| {
        let address = backend.address.given()?;
        let servers = (address.get_ref().ports).map_or(1, |ports| ports.range().count());
        Some((address.span(), u64::from(servers)))
    })
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
