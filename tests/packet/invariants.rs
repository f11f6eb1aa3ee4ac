//! What holds for any bytes at all, against the same decoder on this side of the kernel boundary.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    net::{Ipv6Addr, SocketAddr},
};

use lb_common::{
    abi::{
        Address, Forward, ICMPV6,
        Reason::{self, EchoAnswered, NoFlow, NotForService, TruncatedTransport, TtlExceeded},
        TCP, Tags, UDP, VerdictClass,
    },
    logic::{
        checksum::of_bytes,
        headers::{Fragment, Kind, Packet, Undecodable, decode},
        icmp,
        tcp_state::opens,
    },
};
use proptest::{
    collection::vec,
    prelude::*,
    sample::select,
    test_runner::{Config, RngSeed, TestRunner},
};

use crate::{
    fixture::{Counted, DROP, EVERY, Expected, Fixture, PASS, REDIRECT, TX, TestService},
    frame::{
        DESTINATION_OPTIONS, FRAGMENT, Frame, HOP_BY_HOP, IP, Outer, ROUTING, SYN, Transport, ends,
        icmp as message, key, options, service_vlan, tcp, udp, vlan,
    },
};

/// The same cases in each run, so that a failure is one of the code and not of the day.
fn run<S: Strategy>(cases: u32, strategy: &S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let config = Config {
        cases,
        rng_seed: RngSeed::Fixed(0x786c_6200),
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new(config).run(strategy, test).unwrap();
}

/// One of a few clients, of the family of a service.
fn client(service: &TestService, host: u8, port: u16) -> SocketAddr {
    if service.vip.is_ipv4() {
        SocketAddr::from(([198, 51, 100, host], 5000 + port))
    } else {
        let address = Ipv6Addr::new(0x2001, 0xdb8, 7, 0, 0, 0, 0, u16::from(host));
        SocketAddr::new(address.into(), 5000 + port)
    }
}

fn ends_of_packets() -> impl Strategy<Value = (SocketAddr, SocketAddr, u8)> {
    let anywhere = (any::<[u8; 4]>(), any::<u16>()).prop_map(SocketAddr::from);
    let anywhere_v6 = (any::<[u16; 8]>(), any::<u16>())
        .prop_map(|(segments, port)| SocketAddr::new(Ipv6Addr::from(segments).into(), port));
    let of_service = (select(&EVERY[..]), 1..=60u8, 1..=5u16)
        .prop_map(|(service, host, port)| (service, client(&service, host, port)));
    prop_oneof![
        12 => of_service.clone().prop_map(|(service, client)| (client, service.vip, service.protocol)),
        4 => (of_service.clone(), 0..2usize)
            .prop_filter("a tunnel's backends are of either family", |((service, _), which)| {
                service.backends[*which].address.is_ipv4() == service.vip.is_ipv4()
            })
            .prop_map(|((service, client), which)| (service.backends[which].address, client, service.protocol)),
        // A backend as a client.
        1 => of_service.prop_filter("one family", |(service, _)| {
                service.backends[0].address.is_ipv4() == service.vip.is_ipv4()
            })
            .prop_map(|(service, _)| (service.backends[0].address, service.vip, service.protocol)),
        1 => (anywhere.clone(), anywhere).prop_map(|(from, to)| (from, to, TCP)),
        1 => (anywhere_v6.clone(), anywhere_v6).prop_map(|(from, to)| (from, to, UDP)),
    ]
}

fn tags() -> impl Strategy<Value = Tags> {
    prop_oneof![
        4 => Just(Tags::default()),
        1 => (0..=0xffff_u16).prop_map(|id| Tags([vlan(id), 0])),
        1 => (0..=0xffff_u16).prop_map(|id| Tags([service_vlan(7), vlan(id)])),
    ]
}

fn extensions() -> impl Strategy<Value = Vec<(u8, Vec<u8>)>> {
    let extension = prop_oneof![
        (0..4u8).prop_map(|units| options(DESTINATION_OPTIONS, units)),
        Just((ROUTING, vec![0, 4, 0, 0, 0, 0, 0])),
        Just((FRAGMENT, vec![0, 0, 0, 1, 2, 3, 4])),
    ];
    // Options for each hop come first, if at all (RFC 8200 section 4.1).
    let chain = (prop::option::of(0..4u8), vec(extension, 0..3)).prop_map(|(units, rest)| {
        let first = units.map(|units| options(HOP_BY_HOP, units));
        first.into_iter().chain(rest).collect()
    });
    prop_oneof![3 => Just(vec![]), 1 => chain]
}

/// Whole packets: to services, from backends and others.
fn packets() -> impl Strategy<Value = Frame> {
    (
        (ends_of_packets(), tags(), extensions()),
        (any::<u8>(), any::<u8>(), any::<bool>()),
        prop_oneof![8 => Just(64u8), 1 => any::<u8>(), 1 => 0..3u8],
        (0..=10usize, 0..=10usize),
        (
            prop_oneof![20 => vec(any::<u8>(), 0..80), 1 => vec(any::<u8>(), 1300..1600)],
            vec(any::<u8>(), 0..20),
        ),
        (any::<bool>(), 1..4u16),
    )
        .prop_map(
            |(
                ((source, destination, protocol), tags, extensions),
                (flags, traffic_class, dont_fragment),
                ttl,
                (ip_words, tcp_words),
                (payload, trailer),
                (checksum, identification),
            )| {
                let mut frame = if protocol == TCP {
                    let mut frame = tcp("192.0.2.1:1", destination, SYN);
                    // Mostly what connections use.
                    let flags = [0x02, 0x12, 0x10, 0x18, 0x11, 0x04, 0x14, flags][usize::from(flags % 8)];
                    frame.transport = Transport::Tcp {
                        flags,
                        options: vec![1; tcp_words * 4],
                    };
                    frame
                } else {
                    let mut frame = udp("192.0.2.1:1", destination);
                    frame.transport = Transport::Udp { checksum };
                    frame
                };
                frame.source = source;
                if source.is_ipv4() {
                    frame.ip_options = vec![1; ip_words * 4];
                } else {
                    frame.extensions = extensions;
                }
                Frame {
                    tags,
                    ttl,
                    traffic_class,
                    dont_fragment,
                    identification,
                    payload,
                    trailer,
                    ..frame
                }
            },
        )
}

/// A part of a packet; a few identifications, so that later ones follow a first that was there.
fn fragments() -> impl Strategy<Value = Vec<u8>> {
    (packets(), 1..8usize, any::<bool>()).prop_map(|(mut frame, units, is_first)| {
        frame.dont_fragment = false;
        frame.payload.resize(frame.payload.len().max(80), 0);
        frame.extensions.retain(|(number, _)| *number != FRAGMENT);
        let offset = if frame.key().protocol == u32::from(TCP) {
            24
        } else {
            0
        } + units * 8;
        let mut parts = frame.fragments(&[0, offset]);
        parts.swap_remove(usize::from(!is_first))
    })
}

/// Echo requests, and errors about what a service has sent or got.
fn messages() -> impl Strategy<Value = Vec<u8>> {
    (
        (select(&EVERY[..]), 1..=60u8, 1..=5u16, tags()),
        (0..3usize, any::<u8>(), any::<u8>()),
        prop_oneof![8 => Just(64u8), 1 => 0..3u8],
        (vec(any::<u8>(), 0..60), 0..120usize),
    )
        .prop_map(
            |((service, host, port, tags), (sort, kind, code), ttl, (payload, cut))| {
                let client = client(&service, host, port);
                let is_v4 = service.vip.is_ipv4();
                let router = if is_v4 { "192.0.2.254" } else { "2001:db8:fe::254" };
                let backend = service.backends[0].address;
                // What the VIP has sent to a client, or a client to a backend.
                let (from, to, reached) = if sort == 1 || backend.is_ipv4() != is_v4 {
                    (service.vip, client, service.vip)
                } else {
                    (client, backend, client)
                };
                let mut about = if service.protocol == TCP {
                    tcp("192.0.2.1:1", to, SYN)
                } else {
                    udp("192.0.2.1:1", to)
                };
                about.source = from;
                about.payload.clone_from(&payload);
                let quote = about.ip_bytes();
                let quote = &quote[..cut.min(quote.len())];
                let kinds = if is_v4 {
                    [3, 11, 12, 8, kind]
                } else {
                    [1, 2, 3, 128, kind]
                };
                let kind = kinds[usize::from(kind % 5)];
                let mut frame = if sort == 0 {
                    let echo = if is_v4 { icmp::v4::ECHO } else { icmp::v6::ECHO };
                    message(router, service.vip.ip(), (echo, code % 8 / 7, 7), &payload)
                } else {
                    message(router, reached.ip(), (kind, code % 6, 1400), quote)
                };
                frame.ttl = ttl;
                frame.tags = tags;
                frame.bytes()
            },
        )
}

/// Any bytes, and frames of all kinds, some with a few bytes changed, cut or added to.
fn frames() -> impl Strategy<Value = Vec<u8>> {
    let whole = prop_oneof![
        6 => packets().prop_map(|frame| frame.bytes()),
        2 => fragments(),
        2 => messages(),
    ];
    let changed = (
        whole,
        prop_oneof![1 => Just(vec![]), 1 => vec((0..110usize, any::<u8>()), 1..4)],
        prop_oneof![6 => Just(usize::MAX), 1 => 14..140usize],
    )
        .prop_map(|(mut bytes, changes, length)| {
            for (at, value) in changes {
                // No interface has a group's address (IEEE 802): an answer to it would not be decoded here.
                let value = if at == 6 { value & !1 } else { value };
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            bytes.truncate(length);
            bytes
        });
    prop_oneof![
        1 => vec(any::<u8>(), 14..200),
        12 => changed,
    ]
}

/// The checksums of IPv4 and of TCP, UDP or ICMP: whether they are right, or there are none.
fn checksums_are_right(bytes: &[u8], kind: Kind, packet: &Packet) -> (bool, bool) {
    let (ip, transport, end) = (
        packet.ip_offset as usize,
        packet.transport_offset as usize,
        packet.end as usize,
    );
    let is_v6 = packet.is_v6 != 0;
    let of_ip = is_v6 || of_bytes(&bytes[ip..transport], 0) == 0;
    if packet.fragment != Fragment::Whole as u8 {
        return (of_ip, true);
    }
    let protocol = packet.key.protocol as u8;
    let mut covered = &bytes[transport..end];
    if kind == Kind::Transport && protocol == UDP {
        let length = usize::from(u16::from_be_bytes([covered[4], covered[5]]));
        if covered[6..8] == [0, 0] {
            return (of_ip, true);
        }
        covered = &covered[..length];
    }
    let mut summed = vec![];
    if kind == Kind::Transport || protocol == ICMPV6 {
        let addresses = if is_v6 { ip + 8..ip + 40 } else { ip + 12..ip + 20 };
        summed.extend_from_slice(&bytes[addresses]);
        summed.extend_from_slice(&(covered.len() as u32).to_be_bytes());
        summed.extend_from_slice(&[0, 0, 0, protocol]);
    }
    summed.extend_from_slice(covered);
    (of_ip, of_bytes(&summed, 0) == 0)
}

fn is_vip(address: Address) -> bool {
    EVERY.iter().any(|service| address == service.vip.ip().into())
}

/// What the headers alone decide; `None` where the flow table has a say.
fn decided_by_headers(bytes: &[u8]) -> Result<Expected, Box<(Kind, Packet)>> {
    let mut packet = Packet::default();
    let kind = match decode(&bytes, &mut packet) {
        Err(Undecodable::NotTransport(reason)) => return Ok(Expected::passed(reason)),
        Err(Undecodable::Malformed(reason)) if is_vip(packet.key.destination) => {
            return Ok(Expected::dropped(reason));
        }
        Err(Undecodable::Malformed(_)) => return Ok(Expected::passed(NotForService)),
        Ok(kind) => kind,
    };
    let service = EVERY.into_iter().find(|service| {
        let to = key(service.vip, service.vip, service.protocol);
        (to.destination, to.destination_port, to.protocol)
            == (
                packet.key.destination,
                packet.key.destination_port,
                packet.key.protocol,
            )
    });
    let is_backend = |service: &TestService| {
        (service.backends.iter()).any(|backend| packet.key.source == backend.address.ip().into())
    };
    match (kind, service) {
        (Kind::Transport, Some(service)) if service.forward == Forward::Local => {
            Ok(Expected::passed(Reason::Local))
        }
        (Kind::Transport, Some(service)) if packet.ttl <= 1 => {
            Ok(Expected::dropped(TtlExceeded).of(&service))
        }
        (Kind::Transport, None) if !EVERY.iter().any(is_backend) => Ok(Expected::passed(NotForService)),
        (Kind::Icmp, _) => decided_by_icmp(bytes, packet),
        _ => Err(Box::new((kind, packet))),
    }
}

fn decided_by_icmp(bytes: &[u8], packet: Packet) -> Result<Expected, Box<(Kind, Packet)>> {
    let to_vip = is_vip(packet.key.destination);
    let transport = packet.transport_offset as usize;
    if packet.end as usize - transport < icmp::LEN {
        return Ok(if to_vip {
            Expected::dropped(TruncatedTransport)
        } else {
            Expected::passed(NotForService)
        });
    }
    let is_v4 = packet.is_v6 == 0;
    let echo = if is_v4 { icmp::v4::ECHO } else { icmp::v6::ECHO };
    let (kind, code) = (bytes[transport], bytes[transport + 1]);
    // The answer to an echo request is checked as all answers are.
    if icmp::is_error(is_v4, kind) || (kind == echo && code == 0 && to_vip) {
        Err(Box::new((Kind::Icmp, packet)))
    } else {
        Ok(Expected::passed(NotForService))
    }
}

#[test]
fn any_frame_is_treated_as_its_headers_say() {
    let fixture = RefCell::new(Fixture::every());
    let seen = RefCell::new(BTreeMap::<Reason, u32>::new());
    run(16_000, &frames(), |bytes| {
        let mut fixture = fixture.borrow_mut();
        let (kind, packet) = match decided_by_headers(&bytes) {
            Ok(expected) => {
                *seen.borrow_mut().entry(expected.reason()).or_default() += 1;
                fixture.expect("decided by headers", &bytes, expected);
                return Ok(());
            }
            Err(undecided) => *undecided,
        };
        let (verdict, output, moved) = fixture.run_counted(&bytes);
        let (service, reason) = check_counters(&moved, verdict, bytes.len())?;
        *seen.borrow_mut().entry(reason).or_default() += 1;
        let service = service.map(|id| EVERY[id as usize - 1]);
        if kind == Kind::Transport && reason == NoFlow && service.is_some() {
            prop_assert!(packet.tcp_flags != 0 && !opens(packet.tcp_flags));
        }
        match (reason.class(), service) {
            // Whatever is not sent leaves as it came.
            (VerdictClass::Passed | VerdictClass::Dropped, _) => prop_assert_eq!(&output, &bytes),
            (VerdictClass::Answered, _) => check_answer(&bytes, kind, &packet, &output)?,
            (VerdictClass::Forwarded, Some(service)) => {
                let is_reply = matches!(reason, Reason::Returned | Reason::ErrorReturned);
                if Forward::encapsulates(service.forward.number()) && !is_reply {
                    check_encapsulated(&bytes, &packet, &output, &service)?;
                } else {
                    check_rewritten(&bytes, kind, &packet, &output)?;
                }
            }
            (VerdictClass::Forwarded, None) => prop_assert!(false, "{:?} of no service", reason),
        }
        Ok(())
    });
    // A generator that no longer reaches a reason would leave the property empty.
    for reason in [
        Reason::NotIp,
        NotForService,
        Reason::Local,
        Reason::Forwarded,
        Reason::Returned,
        Reason::ErrorForwarded,
        Reason::ErrorReturned,
        EchoAnswered,
        Reason::TooBigAnswered,
        NoFlow,
        TtlExceeded,
        TruncatedTransport,
        Reason::BadIpVersion,
        Reason::BadIpHeaderLength,
        Reason::BadIpLength,
        Reason::BadExtensionHeader,
        Reason::BadSourceAddress,
        Reason::BadFragment,
        Reason::FragmentUnknown,
        Reason::BadTcpOffset,
        Reason::BadTcpFlags,
        Reason::BadUdpLength,
    ] {
        assert!(
            seen.borrow().contains_key(&reason),
            "{reason:?} did not occur: {:?}",
            seen.borrow()
        );
    }
}

/// One packet of one verdict, and one reason of the verdict's class; with the service that it was counted for.
fn check_counters(
    moved: &Counted,
    verdict: u32,
    length: usize,
) -> Result<(Option<u32>, Reason), TestCaseError> {
    let totals = [
        (PASS, moved.totals.passed),
        (DROP, moved.totals.dropped),
        (TX, moved.totals.transmitted),
        (REDIRECT, moved.totals.redirected),
    ];
    prop_assert_eq!(moved.totals.received, 1);
    for (action, count) in totals {
        prop_assert_eq!(count, u64::from(action == verdict), "verdict {}", verdict);
    }
    prop_assert_eq!(moved.reasons.len(), 1);
    let (key, count) = moved.reasons.first_key_value().unwrap();
    prop_assert_eq!((count.packets, count.bytes), (1, length as u64));
    let classes: &[_] = match verdict {
        PASS => &[VerdictClass::Passed],
        DROP => &[VerdictClass::Dropped],
        _ => &[VerdictClass::Forwarded, VerdictClass::Answered],
    };
    prop_assert!(classes.contains(&key.1.class()), "{:?}", key.1);
    Ok(*key)
}

/// A frame without its tags, and where its IP header is then.
fn untagged(bytes: &[u8], packet: &Packet) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.drain(12..packet.ip_offset as usize - 2);
    bytes
}

fn decoded(bytes: &[u8]) -> Result<(Kind, Packet), TestCaseError> {
    let mut packet = Packet::default();
    decode(&bytes, &mut packet)
        .map(|kind| (kind, packet))
        .map_err(|error| TestCaseError::fail(format!("what leaves is malformed: {error:?}, {bytes:02x?}")))
}

/// Nothing but MAC addresses, tags, ends, time to live and checksums has changed, in a quoted packet too, and checksums
/// are right where they were.
fn check_rewritten(input: &[u8], kind: Kind, packet: &Packet, output: &[u8]) -> Result<(), TestCaseError> {
    let (after_kind, after) = decoded(output)?;
    prop_assert_eq!(kind, after_kind);
    prop_assert_eq!(after.ttl, packet.ttl - 1);
    let right = checksums_are_right(input, kind, packet);
    let right_after = checksums_are_right(output, after_kind, &after);
    prop_assert_eq!(right, right_after, "checksums");
    let (plain, output) = (untagged(input, packet), untagged(output, &after));
    prop_assert_eq!(plain.len(), output.len());
    let transport = packet.transport_offset as usize - (packet.ip_offset as usize - IP);
    let is_v6 = packet.is_v6 != 0;
    let is_tcp = packet.key.protocol == u32::from(TCP);
    let may_change = |at: usize| {
        let of_ip = if is_v6 {
            at == IP + 7 || (IP + 8..IP + 40).contains(&at)
        } else {
            at == IP + 8 || (IP + 10..IP + 20).contains(&at)
        };
        let of_transport = match kind {
            Kind::LaterFragment => false,
            // The quote is compared by its length alone: what of it changes, tests of its own tell.
            Kind::Icmp => at >= transport + 2,
            Kind::Transport => {
                let checksum = transport + if is_tcp { 16 } else { 6 };
                (transport..transport + 4).contains(&at) || (checksum..checksum + 2).contains(&at)
            }
        };
        at < 12 || of_ip || of_transport
    };
    for at in 0..plain.len() {
        prop_assert!(may_change(at) || plain[at] == output[at], "byte {}", at);
    }
    Ok(())
}

/// What is inside is what came but for a hop, and the outer headers say how long it is.
fn check_encapsulated(
    input: &[u8],
    packet: &Packet,
    output: &[u8],
    service: &TestService,
) -> Result<(), TestCaseError> {
    let is_v4 = service.backends[0].address.is_ipv4();
    let is_gue = service.forward == Forward::Gue;
    let ip = if is_v4 { 20 } else { 40 };
    let overhead = ip + if is_gue { 8 } else { 0 };
    let mut inner = untagged(input, packet);
    inner.drain(..IP);
    if packet.is_v6 != 0 {
        inner[7] -= 1;
    } else {
        inner[8] -= 1;
        // The time to live is the high byte of its word (RFC 1624).
        let sum = u32::from(u16::from_be_bytes([inner[10], inner[11]])) + 0x100;
        let checksum = ((sum & 0xffff) + (sum >> 16)) as u16;
        inner[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
    prop_assert_eq!(&output[IP + overhead..], &inner[..]);
    let length = packet.end as usize - packet.ip_offset as usize + overhead;
    let outer = Outer::of(output);
    prop_assert_eq!(outer.destination, service.backends[0].address.ip());
    if is_v4 {
        prop_assert_eq!(
            usize::from(u16::from_be_bytes([output[IP + 2], output[IP + 3]])),
            length
        );
        prop_assert_eq!(of_bytes(&output[IP..IP + 20], 0), 0);
    } else {
        let payload = usize::from(u16::from_be_bytes([output[IP + 4], output[IP + 5]]));
        prop_assert_eq!(payload + 40, length);
    }
    if is_gue {
        let at = IP + ip + 4;
        let udp = usize::from(u16::from_be_bytes([output[at], output[at + 1]]));
        prop_assert_eq!(udp, length - ip);
    }
    Ok(())
}

/// An answer goes back where the packet came from, with all checksums right that it does not owe to that.
fn check_answer(input: &[u8], kind: Kind, packet: &Packet, output: &[u8]) -> Result<(), TestCaseError> {
    let (answer_kind, answer) = decoded(output)?;
    prop_assert_eq!(answer.key.source, packet.key.destination);
    prop_assert_eq!(answer.key.destination, packet.key.source);
    prop_assert_eq!(answer.tags, packet.tags);
    prop_assert_eq!(answer.link.destination(), packet.link.source());
    prop_assert_eq!(answer.link.source(), packet.link.destination());
    prop_assert_eq!(answer.ttl, 64);
    let right = checksums_are_right(output, answer_kind, &answer);
    if kind == Kind::Icmp {
        prop_assert_eq!(output.len(), input.len());
        prop_assert_eq!(right, checksums_are_right(input, kind, packet));
    } else {
        prop_assert!(output.len() <= 22 + 40 + 8 + 88);
        prop_assert!(right.1, "checksum");
    }
    Ok(())
}

/// The whole output, for any packet of a service: rewriting by differences and building anew give the same bytes.
#[test]
fn any_packet_of_a_service_leaves_as_if_it_was_built_so() {
    let fixture = RefCell::new(Fixture::every());
    run(4_000, &packets(), |frame| {
        let mut fixture = fixture.borrow_mut();
        let Some(service) = EVERY.iter().find(|service| {
            service.vip == frame.destination && service.protocol == frame.key().protocol as u8
        }) else {
            return Ok(());
        };
        let bytes = frame.bytes();
        let (verdict, output) = fixture.run(&bytes);
        if verdict == DROP || service.forward == Forward::Local {
            prop_assert_eq!(output, bytes);
            return Ok(());
        }
        let backend = &service.backends[0];
        let is_gue = service.forward == Forward::Gue;
        if Forward::encapsulates(service.forward.number()) {
            if frame.ip_bytes().len() + if is_gue { 28 } else { 20 } > 1500 {
                return Ok(());
            }
            let outer = Outer::of(&output);
            let expected = frame.encapsulated(&Outer {
                source_port: outer.source_port.filter(|_| is_gue),
                ..outer
            });
            prop_assert_eq!(output, expected);
            return Ok(());
        }
        let plain = Tags::default();
        if service.forward == Forward::Dsr {
            let sent = frame.sent(backend.link(), frame.source, frame.destination);
            prop_assert_eq!(output, sent.on(backend.link(), plain).bytes());
            return Ok(());
        }
        let (given, _) = ends(&output);
        let sent = frame.sent(backend.link(), given, backend.address);
        prop_assert_eq!(&output, &sent.on(backend.link(), plain).bytes());

        let mut reply = Frame::answer(backend.address, given, frame.transport.clone());
        if let Transport::Tcp { flags, .. } = &mut reply.transport {
            *flags = 0x10;
        }
        reply.payload = frame.payload.clone();
        reply.payload.reverse();
        let (verdict, output) = fixture.run(&reply.bytes());
        prop_assert_eq!(verdict, TX);
        let sent = reply.sent(frame.back(), frame.destination, frame.source);
        prop_assert_eq!(output, sent.on(frame.back(), frame.tags).bytes());
        Ok(())
    });
}
