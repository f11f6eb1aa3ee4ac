use std::net::IpAddr;

use lb_common::abi;
use proptest::prelude::*;

use super::*;
use crate::model::fixture::service;

fn prefixes(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn filtered(vip: &str, allow: &[&str], deny: &[&str]) -> Service {
    Service {
        vip: vip.parse().unwrap(),
        allow: prefixes(allow),
        deny: prefixes(deny),
        ..service("web", 10, &[80], Vec::new())
    }
}

/// Service 7.
fn contents(service: &Service) -> Contents {
    let entry = abi::Service {
        flags: flags(service),
        ..abi::Service::default()
    };
    Contents {
        services: [(7, entry)].into(),
        source_filters: of_service(7, service).collect(),
        ..Contents::default()
    }
}

fn allows(service: &Service, source: &str) -> bool {
    let source: IpAddr = source.parse().unwrap();
    SourceFilters::new(&contents(service)).allow(7, source.into())
}

#[test]
fn the_length_of_a_key_counts_the_service_and_the_mapping() {
    let service = filtered("203.0.113.10", &["10.0.0.0/8"], &["10.1.2.3/32", "0.0.0.0/0"]);
    let filters: Vec<_> = of_service(7, &service)
        .map(|((key, length), value)| (key.service, key.address.to_string(), length, value))
        .collect();
    assert_eq!(
        filters,
        [
            (7, "10.0.0.0".to_owned(), 32 + 96 + 8, FILTER_ALLOW),
            (7, "10.1.2.3".to_owned(), 32 + 128, FILTER_DENY),
            (7, "0.0.0.0".to_owned(), 32 + 96, FILTER_DENY),
        ]
    );
    let service = filtered("2001:db8::10", &[], &["2001:db8:1::/48"]);
    let ((key, length), value) = of_service(7, &service).next().unwrap();
    assert_eq!(
        (key.address.to_string().as_str(), length, value),
        ("2001:db8:1::", 32 + 48, FILTER_DENY)
    );
}

#[test]
fn bits_beyond_the_prefix_do_not_count() {
    let service = filtered("203.0.113.10", &[], &["10.1.2.3/8"]);
    let ((key, _), _) = of_service(7, &service).next().unwrap();
    assert_eq!(key.address.to_string(), "10.0.0.0");
}

#[test]
fn without_filters_all_sources_are_allowed() {
    let service = filtered("203.0.113.10", &[], &[]);
    assert_eq!(flags(&service), 0);
    assert!(allows(&service, "192.0.2.1"));
}

#[test]
fn prefixes_that_allow_deny_all_others() {
    let service = filtered("203.0.113.10", &["192.0.2.0/24"], &[]);
    assert_eq!(
        flags(&service),
        ServiceFlags::HAS_FILTERS | ServiceFlags::DENIES_OTHERS
    );
    assert!(allows(&service, "192.0.2.255"));
    assert!(!allows(&service, "192.0.3.0"));
}

#[test]
fn the_longest_prefix_decides() {
    let service = filtered("203.0.113.10", &["10.1.0.0/16"], &["10.0.0.0/8", "10.1.2.0/24"]);
    assert!(allows(&service, "10.1.3.1"));
    assert!(!allows(&service, "10.1.2.1"));
    assert!(!allows(&service, "10.2.0.1"));

    let service = filtered("203.0.113.10", &[], &["10.0.0.0/8"]);
    assert_eq!(flags(&service), ServiceFlags::HAS_FILTERS);
    assert!(!allows(&service, "10.0.0.1"));
    assert!(allows(&service, "11.0.0.1"));
}

#[test]
fn a_prefix_of_the_other_family_holds_no_client() {
    let service = filtered("203.0.113.10", &[], &["::/0"]);
    assert_eq!(flags(&service), 0);
    assert!(allows(&service, "192.0.2.1"));
    let service = filtered("203.0.113.10", &["::/0"], &[]);
    assert!(
        !allows(&service, "192.0.2.1"),
        "others than the allowed are denied"
    );
}

#[test]
fn filters_are_those_of_the_service_alone() {
    let service = filtered("203.0.113.10", &["192.0.2.0/24"], &[]);
    let mut contents = contents(&service);
    contents.services.insert(
        8,
        abi::Service {
            flags: flags(&service),
            ..abi::Service::default()
        },
    );
    let source: IpAddr = "192.0.2.1".parse().unwrap();
    let filters = SourceFilters::new(&contents);
    assert!(filters.allow(7, source.into()));
    assert!(!filters.allow(8, source.into()));
    assert!(filters.allow(9, source.into()), "there is no such service");
}

proptest! {
    /// The kernel's way: of all entries whose first bits are those of the address, the one with the most.
    #[test]
    fn sources_are_judged_as_a_trie_of_prefixes_judges_them(
        prefixes in prop::collection::vec((any::<[bool; 4]>(), 0_u8..=4, any::<bool>()), 0..8),
        source in any::<[bool; 4]>(),
        is_v4 in any::<bool>(),
    ) {
        // Four bits in the middle of the address make collisions likely; all others are the same.
        let bits = |bits: [bool; 4]| bits.iter().fold(0_u8, |sum, bit| sum << 1 | u8::from(*bit));
        let address = |four: [bool; 4]| -> IpAddr {
            let octet = 0xa0 | bits(four);
            if is_v4 { [10, octet, 1, 1].into() } else { [0x2001, 0xdb00 | u16::from(octet), 0, 0, 0, 0, 0, 1].into() }
        };
        let before = if is_v4 { 12 } else { 28 };
        let mut service = filtered(if is_v4 { "203.0.113.10" } else { "2001:db8::10" }, &[], &[]);
        for (four, length, is_allowed) in prefixes {
            let prefix = IpNet::new(address(four), before + length).unwrap().trunc();
            if service.allow.contains(&prefix) || service.deny.contains(&prefix) {
                continue;
            }
            if is_allowed { service.allow.push(prefix) } else { service.deny.push(prefix) }
        }
        let contents = contents(&service);
        let source = Address::from(address(source));
        let key_bits = |key: &FilterKey| {
            let address: [u8; 16] = zerocopy::transmute!(key.address);
            let mut bytes = key.service.to_ne_bytes().to_vec();
            bytes.extend(address);
            bytes.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect::<Vec<u8>>()
        };
        let sought = key_bits(&FilterKey { service: 7, address: source });
        let longest = contents
            .source_filters
            .iter()
            .filter(|((key, length), _)| key_bits(key)[..*length as usize] == sought[..*length as usize])
            .max_by_key(|((_, length), _)| *length);
        let expected = match longest {
            Some((_, value)) => *value == FILTER_ALLOW,
            None => service.allow.is_empty(),
        };
        prop_assert_eq!(SourceFilters::new(&contents).allow(7, source), expected);
    }
}
