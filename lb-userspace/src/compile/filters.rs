//! Source filters: prefixes as the maps hold them, and what they say of an address.

use std::{cmp::Reverse, collections::BTreeMap};

use ipnet::IpNet;
use lb_common::abi::{Address, FILTER_ALLOW, FILTER_DENY, FilterKey, ServiceFlags};

use crate::{config::Service, datapath::Contents};

/// Bits of the service in a key.
const SERVICE_BITS: u32 = 32;
/// Bits of an IPv6 address before an IPv4 address that is mapped into it.
const MAPPED_BITS: u32 = 96;

/// The filters of a service, with the length of each key in bits.
///
/// Prefixes of the other family than the VIP's hold no client of it, and are left out: `::/0` would hold all mapped
/// IPv4 addresses.
pub(super) fn of_service(id: u32, service: &Service) -> impl Iterator<Item = ((FilterKey, u32), u32)> {
    let is_v4 = service.vip.is_ipv4();
    let allow = service.allow.iter().map(|prefix| (prefix, FILTER_ALLOW));
    let deny = service.deny.iter().map(|prefix| (prefix, FILTER_DENY));
    (allow.chain(deny))
        .filter(move |(prefix, _)| prefix.addr().is_ipv4() == is_v4)
        .map(move |(prefix, value)| (key(id, prefix), value))
}

/// Bits of [`ServiceFlags`].
pub(super) fn flags(service: &Service) -> u16 {
    let mut flags = 0;
    if of_service(0, service).next().is_some() {
        flags |= ServiceFlags::HAS_FILTERS;
    }
    if !service.allow.is_empty() {
        flags |= ServiceFlags::HAS_FILTERS | ServiceFlags::DENIES_OTHERS;
    }
    flags
}

fn key(service: u32, prefix: &IpNet) -> (FilterKey, u32) {
    let before = match prefix {
        IpNet::V4(_) => SERVICE_BITS + MAPPED_BITS,
        IpNet::V6(_) => SERVICE_BITS,
    };
    let address = Address::from(prefix.network());
    let length = before + u32::from(prefix.prefix_len());
    (FilterKey { service, address }, length)
}

/// Says of an address what the program would: the longest prefix that holds it decides.
#[derive(Debug)]
pub struct SourceFilters<'a> {
    contents: &'a Contents,
    /// Lengths of keys by service id, the longest first.
    lengths: BTreeMap<u32, Vec<u32>>,
}

impl<'a> SourceFilters<'a> {
    pub fn new(contents: &'a Contents) -> Self {
        let mut lengths = BTreeMap::<u32, Vec<u32>>::new();
        for (key, length) in contents.source_filters.keys() {
            lengths.entry(key.service).or_default().push(*length);
        }
        for lengths in lengths.values_mut() {
            lengths.sort_unstable_by_key(|length| Reverse(*length));
            lengths.dedup();
        }
        Self { contents, lengths }
    }

    /// Tells whether flows from the address may start at the service.
    pub fn allow(&self, service: u32, source: Address) -> bool {
        let flags = self
            .contents
            .services
            .get(&service)
            .map_or(0, |entry| entry.flags);
        if flags & ServiceFlags::HAS_FILTERS == 0 {
            return true;
        }
        let lengths = self.lengths.get(&service).map_or(&[][..], Vec::as_slice);
        let found = lengths.iter().find_map(|length| {
            let address = prefix(source, length.saturating_sub(SERVICE_BITS));
            let key = FilterKey { service, address };
            self.contents.source_filters.get(&(key, *length))
        });
        match found {
            Some(value) => *value == FILTER_ALLOW,
            None => flags & ServiceFlags::DENIES_OTHERS == 0,
        }
    }
}

/// The first bits of an address, the others 0.
fn prefix(address: Address, bits: u32) -> Address {
    let all = u128::from_be_bytes(zerocopy::transmute!(address));
    let kept = all & u128::MAX.checked_shl(128 - bits.min(128)).unwrap_or(0);
    zerocopy::transmute!(kept.to_be_bytes())
}

#[cfg(test)]
mod tests;
