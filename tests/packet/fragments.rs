//! Fragments: later ones follow the first, which alone has the ports.

use std::{fs, thread::sleep, time::Duration};

use aya::maps::{HashMap, MapData};
use lb_common::abi::{
    FragmentKey, FragmentPorts,
    Reason::{
        self, BadFragment, BadTcpOffset, FragmentUnknown, NoBackend, NoFlow, NotForService,
        TruncatedTransport,
    },
    TCP,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::{
    fixture::{
        DIRECT_UDP, DNS, DNS6, EVERY, Expected, Fixture, RELAY, RELAY6, SHOP, TUNNEL, TUNNEL_UDP,
        TUNNEL6_UDP, TestService, WEB, WEB6,
    },
    frame::{ACK, Frame, IP, Outer, SYN, TRANSPORT_V6, Transport, ends, packet_of, tcp, udp},
};

fn client(service: &TestService) -> &'static str {
    if service.vip.is_ipv4() {
        "198.51.100.7:5000"
    } else {
        "[2001:db8:7::7]:5000"
    }
}

/// A packet that is longer than a frame of Ethernet.
fn large(service: &TestService) -> Frame {
    let mut frame = packet_of(service.protocol, client(service), service.vip);
    frame.payload = (0..3500).map(|at| (at * 7) as u8).collect();
    frame
}

const OFFSETS: [usize; 4] = [0, 1480, 2504, 3504];

/// The fragments in another order, the first one first.
const ORDERS: [[usize; 4]; 3] = [[0, 1, 2, 3], [0, 3, 2, 1], [0, 2, 1, 3]];

#[test]
fn later_fragments_follow_the_first_in_any_order_both_ways() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [WEB, SHOP, DNS, RELAY, WEB6, DNS6, RELAY6] {
        for (number, order) in ORDERS.into_iter().enumerate() {
            let mut frame = large(&service);
            frame.identification = 0x4000 + number as u16;
            frame.source.set_port(5000 + number as u16);
            // The small one shows which source the flow has.
            let mut small = frame.clone();
            small.payload = vec![];
            let source = ends(&fixture.run(&small.bytes()).1).0;
            let backend = &service.backends[0];
            let outputs = frame
                .sent(backend.link(), source, backend.address)
                .fragments(&OFFSETS);
            let parts = frame.fragments(&OFFSETS);
            for at in order {
                let expected = Expected::forwarded(&service, 0, outputs[at].clone());
                fixture.expect(&format!("part {at} of {order:?}"), &parts[at], expected);
            }
            let mut reply = Frame::answer(backend.address, source, frame.transport.clone());
            reply.payload = frame.payload.clone();
            reply.identification = 0x5000 + number as u16;
            let outputs = reply
                .sent(frame.back(), frame.destination, frame.source)
                .fragments(&OFFSETS);
            let parts = reply.fragments(&OFFSETS);
            for at in order {
                let expected = Expected::returned(&service, 0, outputs[at].clone());
                fixture.expect(
                    &format!("part {at} of the reply, {order:?}"),
                    &parts[at],
                    expected,
                );
            }
        }
    }
}

#[test]
fn a_first_fragment_starts_a_flow_and_so_places_the_others() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [DNS, DNS6] {
        let frame = large(&service);
        let backend = &service.backends[0];
        let outputs = frame
            .sent(backend.link(), frame.source, backend.address)
            .fragments(&OFFSETS);
        let parts = frame.fragments(&OFFSETS);
        let expected = Expected::forwarded(&service, 0, outputs[0].clone()).new_flow();
        fixture.expect("first", &parts[0], expected);
        fixture.all_slots(&service, service.backends[1].id);
        for at in [3, 1, 2] {
            let expected = Expected::forwarded(&service, 0, outputs[at].clone());
            fixture.expect("later", &parts[at], expected);
        }
    }
}

#[test]
fn fragments_are_sent_on_by_dsr_and_encapsulated_each_for_itself() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [DIRECT_UDP, TUNNEL, TUNNEL_UDP, TUNNEL6_UDP] {
        let frame = large(&service);
        let mut small = frame.clone();
        small.payload = vec![];
        let (_, output) = fixture.run(&small.bytes());
        let offsets = [0, 1400, 2800];
        let outputs = if service.id == DIRECT_UDP.id {
            let link = service.backends[0].link();
            frame
                .sent(link, frame.source, frame.destination)
                .fragments(&offsets)
        } else {
            let outer = Outer {
                source_port: None,
                ..Outer::of(&output)
            };
            frame.fragments_encapsulated(&offsets, &outer)
        };
        let parts = frame.fragments(&offsets);
        for at in [0, 2, 1] {
            let expected = Expected::forwarded(&service, 0, outputs[at].clone());
            fixture.expect("part", &parts[at], expected);
        }
    }
}

#[test]
fn later_fragments_before_the_first_are_dropped_if_they_are_for_a_vip() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [WEB, DNS, WEB6, DNS6, TUNNEL_UDP] {
        let parts = large(&service).fragments(&OFFSETS);
        for at in [1, 2, 3] {
            fixture.expect("later", &parts[at], Expected::dropped(FragmentUnknown));
        }
        assert!(fixture.flows().is_empty());
        let mut reply = Frame::answer(
            service.backends[0].address,
            large(&service).source,
            large(&service).transport,
        );
        if service.id != TUNNEL_UDP.id {
            reply.payload = vec![1; 3500];
            let parts = reply.fragments(&OFFSETS);
            fixture.expect("of a backend", &parts[1], Expected::passed(NotForService));
        }
    }
}

/// What tells the parts of a packet: addresses, protocol and identification.
#[test]
fn fragments_of_other_packets_do_not_mix() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [DNS, DNS6] {
        let frame = large(&service);
        let parts = frame.fragments(&OFFSETS);
        fixture.run(&parts[0]);
        let mut other_host = frame.clone();
        other_host.source = if frame.is_v4() {
            "198.51.100.8:5000".parse().unwrap()
        } else {
            "[2001:db8:7::8]:5000".parse().unwrap()
        };
        let mut other_id = frame.clone();
        other_id.identification += 1;
        let mut other_protocol = frame.clone();
        other_protocol.transport = Transport::Tcp {
            flags: ACK,
            options: vec![],
        };
        for (what, other) in [
            ("host", &other_host),
            ("identification", &other_id),
            ("protocol", &other_protocol),
        ] {
            let parts = other.fragments(&OFFSETS);
            fixture.expect(what, &parts[1], Expected::dropped(FragmentUnknown));
        }
        // Two hosts with the same identification: each follows its own first, with its own ports.
        other_host.source.set_port(6000);
        fixture.run(&other_host.fragments(&OFFSETS)[0]);
        let backend = &service.backends[0];
        for frame in [&frame, &other_host] {
            let outputs = frame
                .sent(backend.link(), frame.source, backend.address)
                .fragments(&OFFSETS);
            let parts = frame.fragments(&OFFSETS);
            for at in [1, 2, 3] {
                let expected = Expected::forwarded(&service, 0, outputs[at].clone());
                fixture.expect("later", &parts[at], expected);
            }
        }
        // The identification is used again, with other ports.
        let mut again = frame.clone();
        again.source.set_port(7000);
        fixture.run(&again.fragments(&OFFSETS)[0]);
        fixture.run(&parts[1]);
        assert!(fixture.flow(&again).unwrap().last_seen >= fixture.flow(&frame).unwrap().last_seen);
        assert_eq!(
            fragment_ports(&mut fixture, &frame).unwrap().source_port,
            again.source.port().to_be()
        );
    }
}

/// The map by which later fragments find their ports; keys and values as their bytes.
fn fragments(fixture: &mut Fixture) -> HashMap<&mut MapData, [u8; 40], [u8; 16]> {
    fixture
        .datapath()
        .ebpf_mut()
        .map_mut("FRAGMENTS")
        .unwrap()
        .try_into()
        .unwrap()
}

fn fragment_key(frame: &Frame) -> FragmentKey {
    let key = frame.key();
    FragmentKey {
        source: key.source,
        destination: key.destination,
        identification: if frame.is_v4() {
            u32::from(frame.identification.to_be())
        } else {
            u32::from(frame.identification).to_be()
        },
        protocol: key.protocol,
    }
}

fn fragment_ports(fixture: &mut Fixture, frame: &Frame) -> Option<FragmentPorts> {
    let key = fragment_key(frame).as_bytes().try_into().unwrap();
    let value = fragments(fixture).get(&key, 0).ok()?;
    Some(FragmentPorts::read_from_bytes(&value).unwrap())
}

#[test]
fn a_first_fragment_is_remembered_for_thirty_seconds() {
    // The kernel's clock begins with the machine, and a virtual one may have started less than that ago.
    while uptime() < Duration::from_secs(31) {
        sleep(Duration::from_millis(100));
    }
    let mut fixture = Fixture::of(&EVERY);
    for service in [DNS, DNS6] {
        let frame = large(&service);
        let parts = frame.fragments(&OFFSETS);
        fixture.run(&parts[0]);
        let ports = fragment_ports(&mut fixture, &frame).unwrap();
        let mut seen_before = |nanoseconds: u64| {
            let earlier = FragmentPorts {
                seen: ports.seen.saturating_sub(nanoseconds),
                ..ports
            };
            let key: [u8; 40] = fragment_key(&frame).as_bytes().try_into().unwrap();
            let value: [u8; 16] = earlier.as_bytes().try_into().unwrap();
            fragments(&mut fixture).insert(key, value, 0).unwrap();
            fixture.run(&parts[1]).0
        };
        // The clock goes on while the test runs, which a slow machine may take some time for.
        assert_eq!(seen_before(15_000_000_000), service.backends[0].verdict());
        assert_eq!(seen_before(30_100_000_000), crate::fixture::DROP);
        fixture.expect("too late", &parts[2], Expected::dropped(FragmentUnknown));
    }
}

/// How long ago the machine has started.
fn uptime() -> Duration {
    let uptime = fs::read_to_string("/proc/uptime").unwrap();
    let seconds = uptime.split(' ').next().unwrap();
    Duration::from_secs_f64(seconds.parse().unwrap())
}

/// Dropped with the reason where the destination is a VIP; left alone where it is not.
fn expect_malformed(fixture: &mut Fixture, what: &str, bytes: &[u8], reason: Reason) {
    fixture.expect(what, bytes, Expected::dropped(reason));
    let mut elsewhere = bytes.to_vec();
    elsewhere[if bytes[12] == 0x08 { IP + 19 } else { IP + 39 }] ^= 0x80;
    let what = format!("{what}, not to a VIP");
    fixture.expect(&what, &elsewhere, Expected::passed(NotForService));
}

/// RFC 1858 and RFC 3128: what is split such that a filter does not see the flags, or sees others.
#[test]
fn fragments_that_split_or_overwrite_the_header_are_dropped() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [WEB, WEB6] {
        let mut frame = tcp(client(&service), service.vip, SYN);
        frame.payload = vec![0xa5; 40];
        for split in [8, 16] {
            let parts = frame.fragments(&[0, split]);
            expect_malformed(&mut fixture, "tiny", &parts[0], TruncatedTransport);
            expect_malformed(&mut fixture, "over the flags", &parts[1], BadFragment);
        }
        // With options the header goes on in the second.
        frame.transport = Transport::Tcp {
            flags: SYN,
            options: vec![1; 20],
        };
        let parts = frame.fragments(&[0, 24]);
        expect_malformed(&mut fixture, "options split", &parts[0], BadTcpOffset);
        // Behind the flags it may begin; its first was not taken.
        fixture.expect("later", &parts[1], Expected::dropped(FragmentUnknown));
        assert!(fixture.flows().is_empty());
    }
    for service in [DNS, DNS6] {
        let mut frame = large(&service);
        frame.payload = vec![0; 65_400];
        let mut parts = frame.fragments(&[0, 1480, 65_400]);
        fixture.run(&parts[0]);
        // The ping of death: its end is beyond what a packet may have.
        let last = parts.pop().unwrap();
        let headers = last.len() - 8;
        let mut long = last.clone();
        long.resize(headers + 136, 0);
        if frame.is_v4() {
            long[IP + 2..IP + 4].copy_from_slice(&156_u16.to_be_bytes());
        } else {
            long[IP + 4..IP + 6].copy_from_slice(&(8_u16 + 136).to_be_bytes());
        }
        expect_malformed(&mut fixture, "beyond the largest packet", &long, BadFragment);
        assert_eq!(fixture.run(&last).0, service.backends[0].verdict());
    }
    // Two fragment headers.
    let mut parts = large(&DNS6).fragments(&OFFSETS);
    let part = &mut parts[0];
    part.splice(TRANSPORT_V6..TRANSPORT_V6, [44, 0, 0, 1, 0, 0, 0, 9]);
    let length = u16::from_be_bytes([part[IP + 4], part[IP + 5]]) + 8;
    part[IP + 4..IP + 6].copy_from_slice(&length.to_be_bytes());
    expect_malformed(&mut fixture, "two headers", part, BadFragment);
}

/// A flow that is not there is not started by a part without flags; of UDP it may be, as by any datagram.
#[test]
fn a_later_fragment_whose_flow_is_gone_starts_one_of_udp_alone() {
    let mut fixture = Fixture::of(&EVERY);
    for (service, starts) in [(WEB, false), (WEB6, false), (DNS, true), (DNS6, true)] {
        let frame = large(&service);
        let parts = frame.fragments(&OFFSETS);
        fixture.run(&parts[0]);
        assert_eq!(fixture.remove(&frame), 1);
        let backend = &service.backends[0];
        let outputs = frame
            .sent(backend.link(), frame.source, backend.address)
            .fragments(&OFFSETS);
        let expected = if starts {
            Expected::forwarded(&service, 0, outputs[1].clone()).new_flow()
        } else {
            Expected::dropped(NoFlow).of(&service)
        };
        fixture.expect("later", &parts[1], expected);
    }
}

#[test]
fn fragments_are_not_answered_where_there_is_no_backend() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [WEB, DNS, WEB6, DNS6] {
        fixture.all_slots(&service, 0);
        let parts = large(&service).fragments(&OFFSETS);
        let expected = Expected::dropped(NoBackend).of(&service);
        fixture.expect("first", &parts[0], expected);
        let reason = if service.protocol == TCP {
            NoFlow
        } else {
            NoBackend
        };
        fixture.expect("later", &parts[1], Expected::dropped(reason).of(&service));
    }
}

#[test]
fn fragments_of_icmp_are_left_to_the_host() {
    let mut fixture = Fixture::of(&EVERY);
    for (service, kind) in [(WEB, 8), (WEB6, 128)] {
        let mut frame = udp(client(&service), service.vip);
        frame.source.set_port(0);
        frame.transport = Transport::Icmp {
            kind,
            code: 0,
            word: 1,
        };
        frame.payload = vec![1; 3000];
        for part in frame.fragments(&[0, 1480]) {
            fixture.expect("echo", &part, Expected::passed(NotForService));
        }
    }
}
