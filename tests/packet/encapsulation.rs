//! `ipip` and `gue`: the packet travels in another one, as it is but for a hop.

use std::{collections::BTreeSet, net::IpAddr};

use lb_common::{
    abi::{
        Address, BackendFlags,
        Reason::{NextHopMissing, NoSourceAddress, TooBig, TooBigAnswered, TtlExceeded},
        Tags,
    },
    logic::icmp,
};

use crate::{
    fixture::{
        Expected, Fixture, GUE, GUE_UDP, GUE6, GUE6_UDP, SETTINGS, TUNNEL, TUNNEL_UDP, TUNNEL6, TUNNEL6_UDP,
        TestService,
    },
    frame::{Frame, IP, Outer, options, packet_of},
};

const IPIP: [TestService; 4] = [TUNNEL, TUNNEL_UDP, TUNNEL6, TUNNEL6_UDP];
const GUES: [TestService; 4] = [GUE, GUE_UDP, GUE6, GUE6_UDP];

fn tunnels() -> impl Iterator<Item = TestService> {
    IPIP.into_iter().chain(GUES)
}

fn is_gue(service: &TestService) -> bool {
    GUES.iter().any(|gue| gue.id == service.id)
}

fn fixture() -> Fixture {
    Fixture::of(&tunnels().collect::<Vec<_>>())
}

fn client(service: &TestService) -> &'static str {
    if service.vip.is_ipv4() {
        "198.51.100.7:5000"
    } else {
        "[2001:db8:7::7]:5000"
    }
}

fn packet(service: &TestService) -> Frame {
    packet_of(service.protocol, client(service), service.vip)
}

/// What shall be around a packet that has left: what differs from flow to flow is read from it, and checked to lie
/// where it may.
#[track_caller]
fn outer(service: &TestService, which: usize, output: &[u8]) -> Outer {
    let backend = &service.backends[which];
    let read = Outer::of(output);
    let expected = Outer {
        link: backend.link(),
        tags: Tags::default(),
        destination: backend.address.ip(),
        source: if is_gue(service) {
            backend.source()
        } else {
            read.source
        },
        flow_label: read.flow_label,
        source_port: if is_gue(service) { read.source_port } else { None },
    };
    match read.source {
        IpAddr::V4(source) if !is_gue(service) => assert_eq!(source.octets()[..2], [172, 16]),
        IpAddr::V6(source) if !is_gue(service) => assert_eq!(source.segments()[..6], [0x100, 0, 0, 0, 0, 0]),
        _ => {}
    }
    if is_gue(service) {
        assert!(read.source_port.unwrap() >= 0xc000, "a dynamic port");
    }
    expected
}

/// Overhead of a service towards a backend.
fn overhead(service: &TestService, which: usize) -> usize {
    let ip = if service.backends[which].address.is_ipv4() {
        20
    } else {
        40
    };
    ip + if is_gue(service) { 8 } else { 0 }
}

#[test]
fn a_packet_of_either_family_travels_in_one_of_either_family() {
    let mut fixture = fixture();
    for service in tunnels() {
        for which in [0, 1] {
            fixture.all_slots(&service, service.backends[which].id);
            let mut first = packet(&service);
            first.source.set_port(5000 + which as u16);
            let (_, output) = fixture.run(&first.bytes());
            let outer = outer(&service, which, &output);
            assert_eq!(output.len(), first.bytes().len() + overhead(&service, which));
            assert_eq!(output, first.encapsulated(&outer), "{service:?}");
            for payload in [0, 1, 2, 1300] {
                let mut data = first.clone();
                data.payload = vec![0xa5; payload];
                data.trailer = vec![0; payload % 7];
                if service.vip.is_ipv4() {
                    data.ip_options = vec![1; payload % 3 * 4];
                } else {
                    data.extensions = vec![options(60, payload as u8 % 3)];
                }
                // The same flow has the same outer addresses, ports and labels.
                let expected = Expected::forwarded(&service, which, data.encapsulated(&outer));
                fixture.expect("data", &data.bytes(), expected);
            }
        }
    }
}

/// RFC 6040 section 4.1, RFC 2003 section 3.1.
#[test]
fn traffic_class_and_do_not_fragment_are_copied_and_identification_where_it_may_be_fragmented() {
    let mut fixture = fixture();
    for service in tunnels() {
        for which in [0, 1] {
            fixture.all_slots(&service, service.backends[which].id);
            let mut frame = packet(&service);
            frame.source.set_port(5000 + which as u16);
            let (_, output) = fixture.run(&frame.bytes());
            let outer = outer(&service, which, &output);
            for traffic_class in [0, 1, 2, 3, 0xb8, 0xff] {
                for dont_fragment in [false, true] {
                    frame.traffic_class = traffic_class;
                    frame.dont_fragment = dont_fragment;
                    frame.identification = 0xfffe;
                    let expected = Expected::forwarded(&service, which, frame.encapsulated(&outer));
                    fixture.expect("marked", &frame.bytes(), expected);
                }
            }
        }
    }
}

/// The queues of the receiving host share the load by what is outside.
#[test]
fn what_tells_flows_apart_outside_differs_from_flow_to_flow_and_stays_for_one() {
    let mut fixture = fixture();
    for service in tunnels() {
        for which in [0, 1] {
            fixture.all_slots(&service, service.backends[which].id);
            let (mut addresses, mut ports, mut labels) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
            for number in 0..300u16 {
                let mut frame = packet(&service);
                frame.source.set_port(10_000 * (1 + which as u16) + number);
                let first = outer(&service, which, &fixture.run(&frame.bytes()).1);
                frame.payload = vec![1; usize::from(number)];
                assert_eq!(outer(&service, which, &fixture.run(&frame.bytes()).1), first);
                addresses.insert(first.source);
                ports.insert(first.source_port);
                labels.insert(first.flow_label);
            }
            // 300 of 16,384 meet 3 times by chance.
            let many = 285..=300;
            if is_gue(&service) {
                assert_eq!(addresses.len(), 1);
                assert!(many.contains(&ports.len()), "{} ports", ports.len());
            } else {
                assert!(many.contains(&addresses.len()), "{} addresses", addresses.len());
            }
            if service.backends[which].address.is_ipv6() {
                assert!(many.contains(&labels.len()), "{} labels", labels.len());
            }
        }
    }
}

#[test]
fn an_outer_source_that_does_not_vary_is_the_hosts_own() {
    let mut fixture = fixture();
    fixture.change_settings(|settings| {
        settings.ipip_varying_v4 = 0;
        settings.ipip_varying_v6 = 0;
    });
    for service in IPIP {
        let (_, output) = fixture.run(&packet(&service).bytes());
        assert_eq!(Address::from(Outer::of(&output).source), SETTINGS.ipip_source_v4);
        fixture.all_slots(&service, service.backends[1].id);
        let mut other = packet(&service);
        other.source.set_port(5001);
        let (_, output) = fixture.run(&other.bytes());
        assert_eq!(Address::from(Outer::of(&output).source), SETTINGS.ipip_source_v6);
    }
}

fn too_big(service: &TestService, mtu: usize) -> (u8, u8, u32) {
    if service.vip.is_ipv4() {
        (icmp::v4::UNREACHABLE, icmp::v4::FRAGMENTATION_NEEDED, mtu as u32)
    } else {
        (icmp::v6::TOO_BIG, 0, mtu as u32)
    }
}

/// Bytes that an error quotes of a packet that is long enough.
fn quoted(frame: &Frame) -> usize {
    if frame.is_v4() { 68 } else { 88 }
}

#[test]
fn a_packet_that_does_not_fit_is_answered_with_the_size_that_does() {
    let mut fixture = fixture();
    for service in tunnels() {
        for which in [0, 1] {
            fixture.all_slots(&service, service.backends[which].id);
            let mut frame = packet(&service);
            frame.source.set_port(5000 + which as u16);
            let (_, output) = fixture.run(&frame.bytes());
            let outer = outer(&service, which, &output);
            let fits = 1500 - overhead(&service, which);
            let headers = frame.ip_bytes().len() - frame.payload.len();
            frame.payload = vec![0xa5; fits - headers];
            let expected = Expected::forwarded(&service, which, frame.encapsulated(&outer));
            fixture.expect("fits", &frame.bytes(), expected);
            for (dont_fragment, more, trailer) in [(false, 1, 0), (true, 1, 9), (true, 600, 0)] {
                frame.dont_fragment = dont_fragment;
                frame.payload = vec![0x5a; fits - headers + more];
                frame.trailer = vec![0; trailer];
                let error = frame.error(too_big(&service, fits), quoted(&frame)).bytes();
                let expected = Expected::answered(TooBigAnswered, error).of(&service);
                fixture.expect("does not fit", &frame.bytes(), expected);
            }
            // The size is the route's, and no limit where that is not known.
            fixture.change_backend(&service, which, |backend| backend.mtu = 0);
            frame.trailer = vec![];
            let expected = Expected::forwarded(&service, which, frame.encapsulated(&outer));
            fixture.expect("no limit", &frame.bytes(), expected);
            fixture.change_backend(&service, which, |_| ());
        }
    }
}

/// RFC 8200 section 5: a path takes 1,280 bytes at least, and no sender goes below.
#[test]
fn no_sender_of_ipv6_is_told_less_than_1280_bytes() {
    let mut fixture = fixture();
    for service in [TUNNEL6, GUE6_UDP] {
        fixture.change_backend(&service, 0, |backend| backend.mtu = 1280);
        let mut frame = packet(&service);
        frame.payload = vec![0; 1240];
        let error = frame.error(too_big(&service, 1280), quoted(&frame)).bytes();
        let expected = Expected::answered(TooBigAnswered, error).of(&service);
        fixture.run(&packet(&service).bytes());
        fixture.expect("1,280 in 1,280", &frame.bytes(), expected);
    }
}

/// Who sent a later fragment does not know it by its ports, which are not quoted.
#[test]
fn a_later_fragment_that_does_not_fit_is_dropped_and_a_first_is_answered() {
    let mut fixture = fixture();
    for service in [TUNNEL_UDP, GUE_UDP, TUNNEL6_UDP, GUE6_UDP] {
        let mut frame = packet(&service);
        let (_, output) = fixture.run(&frame.bytes());
        let outer = outer(&service, 0, &output);
        frame.payload = vec![0xa5; 3400];
        let offsets = [0, 1480];
        let parts = frame.fragments(&offsets);
        let mut quoted = parts[0].clone();
        quoted.drain(..IP);
        quoted.truncate(if frame.is_v4() { 68 } else { 88 });
        let mut error = frame.error(too_big(&service, 1500 - overhead(&service, 0)), 0);
        error.payload = quoted;
        let expected = Expected::answered(TooBigAnswered, error.bytes()).of(&service);
        fixture.expect("first", &parts[0], expected);
        let expected = Expected::dropped(TooBig).of(&service);
        fixture.expect("later", &parts[1], expected);
        // Both fit.
        fixture.change_backend(&service, 0, |backend| backend.mtu = 2100);
        for (part, output) in parts.iter().zip(frame.fragments_encapsulated(&offsets, &outer)) {
            fixture.expect("fits", part, Expected::forwarded(&service, 0, output));
        }
    }
}

#[test]
fn a_packet_without_hops_next_hop_or_source_is_dropped() {
    let mut fixture = fixture();
    for service in tunnels() {
        let mut frame = packet(&service);
        frame.ttl = 1;
        let expected = Expected::dropped(TtlExceeded).of(&service);
        fixture.expect("time to live of 1", &frame.bytes(), expected);
        frame.ttl = 64;
        fixture.run(&frame.bytes());
        fixture.change_backend(&service, 0, |backend| {
            backend.flags &= !BackendFlags::NEXT_HOP_KNOWN;
        });
        let expected = Expected::dropped(NextHopMissing).of(&service);
        fixture.expect("no next hop", &frame.bytes(), expected);
        fixture.change_backend(&service, 0, |backend| backend.source = Address::default());
        let verdict = fixture.run(&frame.bytes()).0;
        if is_gue(&service) {
            let expected = Expected::dropped(NoSourceAddress).of(&service);
            fixture.expect("no source", &frame.bytes(), expected);
        } else {
            assert_eq!(
                verdict,
                service.backends[0].verdict(),
                "ipip has sources of its own"
            );
        }
    }
}
