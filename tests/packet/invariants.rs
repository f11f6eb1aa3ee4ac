//! What holds for any bytes at all, against the same decoder on this side of the kernel boundary.

use std::net::SocketAddr;

use lb_common::{
    abi::{
        Reason::{self, NoFlow, NotForService, TtlExceeded},
        TCP, VerdictClass,
    },
    logic::{
        checksum::of_bytes,
        headers::{Fragment, Kind, Packet, Undecodable, decode},
        tcp_state::opens,
    },
};
use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, RngSeed, TestRunner},
};

use crate::{
    fixture::{
        Counted, DNS, DROP, Expected, Fixture, MIRROR, PASS, REDIRECT, RELAY, SHOP, TX, TestService, WEB,
    },
    frame::{Frame, IP, SYN, TRANSPORT, Transport, ends, key, tcp, udp},
};

const SERVICES: [TestService; 5] = [WEB, SHOP, DNS, RELAY, MIRROR];

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

fn ends_of_packets() -> impl Strategy<Value = (SocketAddr, SocketAddr, u8)> {
    let anywhere =
        (any::<[u8; 4]>(), any::<u16>()).prop_map(|(octets, port)| SocketAddr::from((octets, port)));
    let client =
        (1..=250u8, 1..=9u16).prop_map(|(host, port)| SocketAddr::from(([198, 51, 100, host], 5000 + port)));
    let service = (0..SERVICES.len()).prop_map(|index| SERVICES[index]);
    prop_oneof![
        6 => (client.clone(), service.clone()).prop_map(|(client, service)| (client, service.vip, service.protocol)),
        2 => (client.clone(), service, 0..2usize)
            .prop_map(|(client, service, which)| (service.backends[which].address, client, service.protocol)),
        1 => (anywhere.clone(), anywhere.clone()).prop_map(|(from, to)| (from, to, TCP)),
        1 => (client, anywhere).prop_map(|(from, to)| (from, to, 17)),
    ]
}

/// Whole packets: to services, from backends and others.
fn packets() -> impl Strategy<Value = Frame> {
    (
        ends_of_packets(),
        any::<u8>(),
        prop_oneof![8 => Just(64u8), 1 => any::<u8>(), 1 => 0..3u8],
        (0..=10usize, 0..=10usize),
        vec(any::<u8>(), 0..80),
        vec(any::<u8>(), 0..20),
        any::<bool>(),
    )
        .prop_map(
            |(
                (source, destination, protocol),
                flags,
                ttl,
                (ip_words, tcp_words),
                payload,
                trailer,
                checksum,
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
                frame.ttl = ttl;
                frame.ip_options = vec![1; ip_words * 4];
                frame.payload = payload;
                frame.trailer = trailer;
                frame
            },
        )
}

/// Any bytes, and packets with a few bytes changed, cut or added to.
fn frames() -> impl Strategy<Value = Vec<u8>> {
    let changed = (
        packets(),
        vec((0..74usize, any::<u8>()), 0..4),
        prop_oneof![3 => Just(usize::MAX), 1 => 14..120usize],
    )
        .prop_map(|(frame, changes, length)| {
            let mut bytes = frame.bytes();
            for (at, value) in changes {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            bytes.truncate(length);
            bytes
        });
    prop_oneof![
        1 => vec(any::<u8>(), 14..200),
        9 => changed,
    ]
}

/// The checksums of IP and of TCP or UDP, as sums over all that they cover: 0 where they are right.
fn checksum_sums(bytes: &[u8], packet: &Packet) -> (u16, u16) {
    let total = usize::from(u16::from_be_bytes([bytes[IP + 2], bytes[IP + 3]]));
    let ip = of_bytes(&bytes[IP..packet.transport_offset as usize], 0);
    let transport = &bytes[packet.transport_offset as usize..IP + total];
    let length = match bytes[IP + 9] {
        TCP => transport.len(),
        _ => usize::from(u16::from_be_bytes([transport[4], transport[5]])),
    };
    if bytes[IP + 9] != TCP && transport[6..8] == [0, 0] {
        return (ip, 0);
    }
    let mut pseudo = bytes[IP + 12..IP + 20].to_vec();
    pseudo.extend_from_slice(&[0, bytes[IP + 9]]);
    pseudo.extend_from_slice(&(length as u16).to_be_bytes());
    pseudo.extend_from_slice(&transport[..length]);
    (ip, of_bytes(&pseudo, 0))
}

/// What the headers alone decide; `None` where the flow table has a say.
fn decided_by_headers(bytes: &[u8]) -> Result<Expected, Box<(Kind, Packet, Option<TestService>)>> {
    let is_vip = |address| SERVICES.iter().any(|service| address == service.vip.ip().into());
    let mut packet = Packet::default();
    let kind = match decode(&bytes, &mut packet) {
        Err(Undecodable::NotTransport(reason)) => return Ok(Expected::passed(reason)),
        Err(Undecodable::Malformed(reason)) if is_vip(packet.key.destination) => {
            return Ok(Expected::dropped(reason));
        }
        Err(Undecodable::Malformed(_)) => return Ok(Expected::passed(NotForService)),
        Ok(kind) => kind,
    };
    let service = SERVICES.into_iter().find(|service| {
        let to = key(service.vip, service.vip, service.protocol);
        (to.destination, to.destination_port, to.protocol)
            == (
                packet.key.destination,
                packet.key.destination_port,
                packet.key.protocol,
            )
    });
    let from_backend = SERVICES.iter().any(|service| {
        (service.backends.iter()).any(|backend| packet.key.source == backend.address.ip().into())
    });
    match (kind, service) {
        (Kind::Transport, Some(service)) if packet.ttl <= 1 => {
            Ok(Expected::dropped(TtlExceeded).of(&service))
        }
        (Kind::Transport, None) if !from_backend => Ok(Expected::passed(NotForService)),
        _ => Err(Box::new((kind, packet, service))),
    }
}

#[test]
fn any_frame_is_treated_as_its_headers_say() {
    let fixture = std::cell::RefCell::new(Fixture::new());
    let seen = std::cell::RefCell::new(std::collections::BTreeMap::<Reason, u32>::new());
    run(12_000, &frames(), |bytes| {
        let mut fixture = fixture.borrow_mut();
        let (kind, packet, service) = match decided_by_headers(&bytes) {
            Ok(expected) => {
                *seen.borrow_mut().entry(expected.reason()).or_default() += 1;
                fixture.expect("decided by headers", &bytes, expected);
                return Ok(());
            }
            Err(undecided) => *undecided,
        };
        let before = fixture.counted();
        let (verdict, output) = fixture.run(&bytes);
        let moved = fixture.counted().since(&before);
        let reason = check_counters(&moved, verdict, bytes.len())?;
        *seen.borrow_mut().entry(reason).or_default() += 1;
        // What these become depends on packets before them, and has tests of its own.
        if kind != Kind::Transport || packet.fragment != Fragment::Whole as u8 {
            return Ok(());
        }
        match (service, reason) {
            (_, Reason::Forwarded) if service.is_some() => {
                check_rewritten(&bytes, &output, &packet)?;
                let service = service.unwrap();
                let (_, to) = ends(&output);
                prop_assert_eq!(to, service.backends[0].address);
            }
            (None, Reason::Returned) => check_rewritten(&bytes, &output, &packet)?,
            (Some(_), NoFlow) => {
                prop_assert!(packet.tcp_flags != 0 && !opens(packet.tcp_flags));
                prop_assert_eq!(&output, &bytes);
            }
            (None, NoFlow | NotForService | TtlExceeded) => prop_assert_eq!(&output, &bytes),
            other => prop_assert!(false, "{:?}", other),
        }
        Ok(())
    });
    // A generator that no longer reaches a reason would leave the property empty.
    for reason in [
        Reason::NotIp,
        NotForService,
        Reason::Forwarded,
        Reason::Returned,
        NoFlow,
        TtlExceeded,
        Reason::BadIpVersion,
        Reason::BadIpHeaderLength,
        Reason::BadIpLength,
        Reason::BadSourceAddress,
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

/// One packet of one verdict, and one reason of the verdict's class.
fn check_counters(moved: &Counted, verdict: u32, length: usize) -> Result<Reason, TestCaseError> {
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
    Ok(key.1)
}

/// Nothing but MAC addresses, ends, time to live and checksums has changed, and checksums are right where they were.
fn check_rewritten(input: &[u8], output: &[u8], packet: &Packet) -> Result<(), TestCaseError> {
    prop_assert_eq!(input.len(), output.len());
    let transport = packet.transport_offset as usize;
    let checksum = transport + if input[IP + 9] == TCP { 16 } else { 6 };
    let may_change = |at: usize| {
        at < 12
            || at == IP + 8
            || (IP + 10..TRANSPORT).contains(&at)
            || (transport..transport + 4).contains(&at)
            || (checksum..checksum + 2).contains(&at)
    };
    for at in 0..input.len() {
        prop_assert!(may_change(at) || input[at] == output[at], "byte {}", at);
    }
    prop_assert_eq!(output[IP + 8], input[IP + 8] - 1);
    let mut rewritten = Packet::default();
    decode(&output, &mut rewritten).unwrap();
    let before = checksum_sums(input, packet);
    let after = checksum_sums(output, &rewritten);
    prop_assert_eq!(before.0 == 0, after.0 == 0, "IP checksum");
    prop_assert_eq!(before.1 == 0, after.1 == 0, "transport checksum");
    Ok(())
}

/// The whole output, for any packet of a service: rewriting by differences and building anew give the same bytes.
#[test]
fn any_packet_of_a_service_leaves_as_if_it_was_built_so() {
    let fixture = std::cell::RefCell::new(Fixture::new());
    run(3_000, &packets(), |frame| {
        let mut fixture = fixture.borrow_mut();
        let Some(service) = SERVICES.iter().find(|service| {
            service.vip == frame.destination && service.protocol == frame.key().protocol as u8
        }) else {
            return Ok(());
        };
        let bytes = frame.bytes();
        let (verdict, output) = fixture.run(&bytes);
        if verdict == DROP {
            prop_assert_eq!(output, bytes);
            return Ok(());
        }
        let backend = &service.backends[0];
        let (given, _) = ends(&output);
        let expected = frame.sent(backend.link(), given, backend.address).bytes();
        prop_assert_eq!(&output, &expected);

        let mut reply = Frame::answer(backend.address, given, frame.transport.clone());
        if let Transport::Tcp { flags, .. } = &mut reply.transport {
            *flags = 0x10;
        }
        reply.payload = frame.payload.clone();
        reply.payload.reverse();
        let (verdict, output) = fixture.run(&reply.bytes());
        let back = lb_common::abi::Link::new(frame.link.source(), frame.link.destination());
        prop_assert_eq!(verdict, TX);
        prop_assert_eq!(output, reply.sent(back, frame.destination, frame.source).bytes());
        Ok(())
    });
}
