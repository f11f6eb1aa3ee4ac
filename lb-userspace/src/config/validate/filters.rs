//! Who may start flows, and how many.

use std::collections::HashMap;

use ipnet::IpNet;

use crate::config::{
    diagnostic::{Diagnostic, Span},
    raw::RawService,
    validated::NewFlowCap,
};

const NEW_FLOW_PREFIX_V4: u8 = 32;
/// A host has a whole /64 of IPv6 to itself.
const NEW_FLOW_PREFIX_V6: u8 = 64;

/// The prefixes of `allow` and those of `deny`.
pub(super) fn sources(service: &RawService, found: &mut Vec<Diagnostic>) -> Option<(Vec<IpNet>, Vec<IpNet>)> {
    of_the_vips_family(service, found);
    each_given_once(service, found);
    let [allow, deny] = [&service.allow, &service.deny].map(|prefixes| {
        let prefixes = prefixes.or(Vec::new())?.into_iter();
        Some(prefixes.map(toml::Spanned::into_inner).collect::<Vec<_>>())
    });
    let mut allow = allow?;
    // All addresses, and there is no rest to deny: the same as no list, which costs a packet no look-up.
    if let [all] = allow[..]
        && all.prefix_len() == 0
    {
        allow.clear();
    }
    Some((allow, deny?))
}

pub(super) fn new_flow_cap(service: &RawService, found: &mut Vec<Diagnostic>) -> Option<Option<NewFlowCap>> {
    let Some(rate) = service.new_flow_rate.optional()? else {
        for (key, span) in [
            ("new-flow-burst", service.new_flow_burst.span()),
            ("new-flow-prefix-v4", service.new_flow_prefix_v4.span()),
            ("new-flow-prefix-v6", service.new_flow_prefix_v6.span()),
        ] {
            if let Some(span) = span {
                found.push(Diagnostic::new(
                    span,
                    format!("`{key}` is of no use without `new-flow-rate`"),
                    format!(
                        "write the new flows that a source may start a second, such as new-flow-rate = 100, or remove \
                         `{key}`"
                    ),
                ));
            }
        }
        return Some(None);
    };
    Some(Some(NewFlowCap {
        rate,
        burst: service.new_flow_burst.or(rate)?,
        prefix_v4: service.new_flow_prefix_v4.or(NEW_FLOW_PREFIX_V4)?,
        prefix_v6: service.new_flow_prefix_v6.or(NEW_FLOW_PREFIX_V6)?,
    }))
}

/// Clients have addresses of the VIP's family, so another prefix would hold none of them.
fn of_the_vips_family(service: &RawService, found: &mut Vec<Diagnostic>) {
    let Some(vip) = service.vip.given() else {
        return;
    };
    let (family, example) = if vip.get_ref().is_ipv4() {
        ("IPv4", "192.0.2.0/24")
    } else {
        ("IPv6", "2001:db8::/32")
    };
    for (_, prefix, span) in prefixes(service) {
        if prefix.addr().is_ipv4() != vip.get_ref().is_ipv4() {
            found.push(
                Diagnostic::new(
                    span,
                    format!(
                        "{prefix} is of another address family than the vip {}: no client of this service is in it",
                        vip.get_ref()
                    ),
                    format!("write a prefix of {family} addresses, such as \"{example}\", or remove it"),
                )
                .with_related(vip.span(), "the vip"),
            );
        }
    }
}

/// A prefix that is both allowed and denied has no meaning, and one that is given twice is a slip.
fn each_given_once(service: &RawService, found: &mut Vec<Diagnostic>) {
    let mut first: HashMap<IpNet, (&str, Span)> = HashMap::new();
    for (key, prefix, span) in prefixes(service) {
        let Some((first_key, first_span)) = first.get(&prefix) else {
            first.insert(prefix, (key, span));
            continue;
        };
        let (message, help) = if *first_key == key {
            (
                format!("{prefix} is given twice in `{key}`"),
                "write each prefix once",
            )
        } else {
            (
                format!("{prefix} is in both `allow` and `deny`"),
                "remove it from one of the two; of prefixes of different length the longest decides",
            )
        };
        found.push(Diagnostic::new(span, message, help).with_related(first_span.clone(), "first given here"));
    }
}

/// Every prefix of the service with its key, in the order of the file.
fn prefixes(service: &RawService) -> Vec<(&'static str, IpNet, Span)> {
    let mut prefixes = Vec::new();
    for (key, list) in [("allow", &service.allow), ("deny", &service.deny)] {
        let list = list.given().into_iter().flat_map(toml::Spanned::get_ref);
        prefixes.extend(list.map(|prefix| (key, *prefix.get_ref(), prefix.span())));
    }
    prefixes.sort_by_key(|(_, _, span)| span.start);
    prefixes
}
