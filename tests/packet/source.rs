//! Which sources may start flows, and how many.

use std::net::IpAddr;

use lb_common::abi::{
    Address, FILTER_ALLOW, FILTER_DENY, FilterKey, Forward,
    Reason::{SourceDenied, SourceRate},
    ServiceFlags,
};
use xlb::datapath::Operation;

use crate::{
    fixture::{DNS, DNS6, EVERY, Expected, Fixture, SHOP, TestService, WEB, WEB6},
    frame::{Frame, SYN, packet_of, tcp},
};

const SERVICES: [TestService; 4] = [WEB, DNS, WEB6, DNS6];

fn filter(service: u32, prefix: &str, value: u32) -> Operation {
    let (address, bits) = prefix.split_once('/').unwrap();
    let (address, bits): (IpAddr, u32) = (address.parse().unwrap(), bits.parse().unwrap());
    let bits = if address.is_ipv4() {
        32 + 96 + bits
    } else {
        32 + bits
    };
    let address = Address::from(address);
    Operation::PutFilter(FilterKey { service, address }, bits, value)
}

fn from(service: &TestService, source: &str, port: u16) -> Frame {
    let source: IpAddr = source.parse().unwrap();
    let source = std::net::SocketAddr::new(source, port);
    let mut frame = packet_of(service.protocol, &source.to_string(), service.vip);
    if service.id == WEB.id || service.id == WEB6.id {
        frame = tcp(&source.to_string(), service.vip, SYN);
    }
    frame
}

/// Starts a flow, or is dropped.
#[track_caller]
fn expect(fixture: &mut Fixture, service: &TestService, source: &str, allowed: bool) {
    static PORT: std::sync::atomic::AtomicU16 = std::sync::atomic::AtomicU16::new(1024);
    let frame = from(
        service,
        source,
        PORT.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
    );
    let expected = if allowed {
        Expected::to_backend(service, 0, &frame, frame.source).new_flow()
    } else {
        Expected::dropped(SourceDenied).of(service)
    };
    fixture.expect(&format!("{source}: {allowed}"), &frame.bytes(), expected);
    assert_eq!(fixture.flow(&frame).is_some(), allowed);
}

#[test]
fn the_longest_prefix_that_holds_a_source_decides() {
    let mut fixture = Fixture::of(&EVERY);
    let v4 = (
        [
            ("198.51.0.0/16", FILTER_ALLOW),
            ("198.51.100.0/24", FILTER_DENY),
            ("198.51.100.128/25", FILTER_ALLOW),
            ("198.51.100.200/32", FILTER_DENY),
        ],
        [
            ("198.51.99.1", true),
            ("198.51.101.1", true),
            ("198.51.100.0", false),
            ("198.51.100.127", false),
            ("198.51.100.128", true),
            ("198.51.100.199", true),
            ("198.51.100.200", false),
            ("198.51.100.201", true),
        ],
    );
    let v6 = (
        [
            ("2001:db8::/32", FILTER_ALLOW),
            ("2001:db8:7::/48", FILTER_DENY),
            ("2001:db8:7:8000::/49", FILTER_ALLOW),
            ("2001:db8:7:8000::5/128", FILTER_DENY),
        ],
        [
            ("2001:db8:6::1", true),
            ("2001:db8:8::1", true),
            ("2001:db8:7::1", false),
            ("2001:db8:7:7fff::1", false),
            ("2001:db8:7:8000::1", true),
            ("2001:db8:7:ffff::1", true),
            ("2001:db8:7:8000::5", false),
            ("2001:db8:7:8000::4", true),
        ],
    );
    let (outside_v4, outside_v6) = ("203.0.112.1", "2001:db9::1");
    for service in SERVICES {
        let (filters, sources) = if service.vip.is_ipv4() { v4 } else { v6 };
        let outside = if service.vip.is_ipv4() {
            outside_v4
        } else {
            outside_v6
        };
        for (prefix, value) in filters {
            fixture.apply(filter(service.id, prefix, value));
        }
        // Nothing is asked where the service says that there is nothing.
        expect(&mut fixture, &service, sources[2].0, true);
        for (flags, others) in [
            (ServiceFlags::HAS_FILTERS, true),
            (ServiceFlags::HAS_FILTERS | ServiceFlags::DENIES_OTHERS, false),
        ] {
            fixture.change_service(&service, |service| service.flags = flags);
            for (source, allowed) in sources {
                expect(&mut fixture, &service, source, allowed);
            }
            expect(&mut fixture, &service, outside, others);
        }
        fixture.change_service(&service, |_| ());
    }
}

#[test]
fn filters_are_those_of_one_service_and_everybody_is_a_prefix() {
    let mut fixture = Fixture::of(&EVERY);
    let denies = |service: &mut lb_common::abi::Service| service.flags = ServiceFlags::HAS_FILTERS;
    fixture.apply(filter(WEB.id, "0.0.0.0/0", FILTER_DENY));
    fixture.apply(filter(WEB6.id, "::/0", FILTER_DENY));
    for service in SERVICES {
        fixture.change_service(&service, denies);
    }
    expect(&mut fixture, &WEB, "198.51.100.7", false);
    expect(&mut fixture, &DNS, "198.51.100.7", true);
    expect(&mut fixture, &WEB6, "2001:db8:7::7", false);
    expect(&mut fixture, &DNS6, "2001:db8:7::7", true);
    fixture.change_service(&SHOP, |service| {
        service.flags = ServiceFlags::HAS_FILTERS | ServiceFlags::DENIES_OTHERS;
        service.forward = Forward::Nat.number();
    });
    expect(&mut fixture, &SHOP, "198.51.100.7", false);
}

#[test]
fn a_known_flow_passes_the_filter_and_the_cap() {
    let mut fixture = Fixture::of(&EVERY);
    for service in SERVICES {
        let source = if service.vip.is_ipv4() {
            "198.51.100.7"
        } else {
            "2001:db8:7::7"
        };
        let known = from(&service, source, 500);
        fixture.run(&known.bytes());
        fixture.change_service(&service, |service| {
            service.flags = ServiceFlags::HAS_FILTERS | ServiceFlags::DENIES_OTHERS;
            service.new_flow_rate = 1;
            service.new_flow_burst = 0;
        });
        expect(&mut fixture, &service, source, false);
        let expected = Expected::to_backend(&service, 0, &known, known.source);
        fixture.expect("known", &known.bytes(), expected);
    }
}

#[test]
fn a_source_prefix_starts_as_many_flows_as_its_burst() {
    let mut fixture = Fixture::of(&EVERY);
    for service in SERVICES {
        // One flow in a day and more: the test does not wait for it.
        fixture.change_service(&service, |service| {
            service.new_flow_rate = 0;
            service.new_flow_burst = 7;
            service.rate_prefix_v4 = 24;
            service.rate_prefix_v6 = 56;
        });
        let (hosts, others): (Vec<String>, _) = if service.vip.is_ipv4() {
            (
                (0..20).map(|host| format!("198.51.100.{}", host * 12)).collect(),
                ["198.51.101.1", "198.51.99.255"],
            )
        } else {
            (
                (0..20)
                    .map(|host| format!("2001:db8:7:{:x}::{host}", host * 12))
                    .collect(),
                ["2001:db8:7:100::", "2001:db8:6:ffff::1"],
            )
        };
        for (port, host) in hosts.iter().enumerate() {
            let frame = from(&service, host, 20_000 + port as u16);
            let expected = Expected::to_backend(&service, 0, &frame, frame.source).new_flow();
            fixture.expect("no cap", &frame.bytes(), expected);
        }
        fixture.change_service(&service, |service| {
            service.new_flow_rate = 1;
            service.new_flow_burst = 7;
            service.rate_prefix_v4 = 24;
            service.rate_prefix_v6 = 56;
        });
        let mut started = 0;
        for (port, host) in hosts.iter().enumerate() {
            let frame = from(&service, host, 30_000 + port as u16);
            let before = fixture.counted();
            fixture.run(&frame.bytes());
            let moved = fixture.counted().since(&before);
            if moved.reasons.contains_key(&(Some(service.id), SourceRate)) {
                assert!(fixture.flow(&frame).is_none());
            } else {
                started += 1;
            }
        }
        // One a second comes on top, and a slow machine takes some.
        assert!((7..=12).contains(&started), "{started}");
        for host in others {
            let frame = from(&service, host, 30_000);
            let expected = Expected::to_backend(&service, 0, &frame, frame.source).new_flow();
            fixture.expect("another prefix", &frame.bytes(), expected);
        }
    }
}
