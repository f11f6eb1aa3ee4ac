//! The program of `xlb decap`: what it unwraps, what it passes as it came, what it drops.

mod fixture;

use std::net::{IpAddr, SocketAddr};

use lb_common::{
    abi::{Address, DecapReason},
    logic::encapsulation::{Decision, Family, Known, Unwrapping, decide, ipv4_with_ecn, ipv6_with_ecn},
};
use proptest::{
    collection::vec,
    prelude::*,
    sample::select,
    test_runner::{Config, RngSeed, TestRunner},
};
use tests::encapsulation::{Encapsulated, Wrapping, ip_packet, udp_packet};

use self::fixture::{Fixture, HOST, VIPS, ip};
use crate::fixture::{DROP, PASS};

/// An index for addresses of a family: 0 is IPv4 and 1 is IPv6.
const FAMILIES: [usize; 2] = [0, 1];
const CLIENTS: [&str; 2] = ["198.51.100.7", "2001:db8:2::7"];
/// Outer sources as the balancer has them: those of IPv4 in 172.16.0.0/16, those of IPv6 in 100::/64.
const OUTER_SOURCES: [&str; 2] = ["172.16.3.4", "100::7"];
const TAGS: [[u8; 4]; 2] = [[0x88, 0xa8, 0x00, 0x07], [0x81, 0x00, 0x20, 0x09]];

/// The option that Linux's ip6tnl puts into destination options: `init_tel_txopt` in net/ipv6/ip6_tunnel.c.
const LIMIT: [u8; 8] = [0, 0, 4, 1, 4, 1, 1, 0];

fn question(family: usize, ecn: u8) -> Vec<u8> {
    let client = SocketAddr::new(ip(CLIENTS[family]), 51_000);
    let vip = SocketAddr::new(ip(VIPS[family]), 53);
    udp_packet(client, vip, ecn, b"a question of odd length")
}

fn encapsulated(outer: usize, inner: usize, wrapping: Wrapping) -> Encapsulated {
    Encapsulated {
        to: [2, 0, 0, 0, 0, 2],
        from: [2, 0, 0, 0, 0, 1],
        tags: vec![],
        source: ip(OUTER_SOURCES[outer]),
        destination: ip(HOST[outer]),
        wrapping,
        ecn: 0,
        options: vec![],
        checksum: true,
        inner: question(inner, 0),
        trailer: vec![],
    }
}

fn reason_of(wrapping: Wrapping) -> DecapReason {
    match wrapping {
        Wrapping::Ipip => DecapReason::Ipip,
        Wrapping::GueDirect | Wrapping::GueHeader => DecapReason::Gue,
    }
}

/// Every outer and inner family in every wrapping.
fn combinations() -> Vec<Encapsulated> {
    let mut all = Vec::new();
    for (outer, inner) in FAMILIES
        .into_iter()
        .flat_map(|outer| FAMILIES.map(|inner| (outer, inner)))
    {
        all.extend(Wrapping::ALL.map(|wrapping| encapsulated(outer, inner, wrapping)));
    }
    all
}

/// What to do to an encapsulated packet, and what it is called.
type Change = (&'static str, fn(&mut Encapsulated));

#[test]
fn every_encapsulation_is_unwrapped_in_every_frame() {
    let mut fixture = Fixture::new();
    let changes: [Change; 8] = [
        ("plain", |_| {}),
        ("one tag", |packet| packet.tags = TAGS[1..].to_vec()),
        ("a service provider's tag", |packet| {
            packet.tags = TAGS[..1].to_vec();
        }),
        ("two tags", |packet| packet.tags = TAGS.to_vec()),
        ("two tags of customers", |packet| packet.tags = vec![TAGS[1]; 2]),
        ("a padded frame", |packet| packet.trailer = vec![0; 11]),
        ("no UDP checksum", |packet| packet.checksum = false),
        ("options", |packet| {
            packet.tags = TAGS.to_vec();
            packet.options = match packet.destination {
                IpAddr::V4(_) => vec![1; 40],
                IpAddr::V6(_) => LIMIT.to_vec(),
            };
        }),
    ];
    for packet in combinations() {
        for (what, change) in changes {
            let mut packet = packet.clone();
            change(&mut packet);
            fixture.expect(
                &format!("{what}: {packet:?}"),
                &packet.frame(),
                (PASS, &packet.unwrapped(&packet.inner), reason_of(packet.wrapping)),
            );
        }
    }
}

#[test]
fn ecn_is_carried_over_as_in_rfc_6040_and_the_checksum_fits() {
    let mut fixture = Fixture::new();
    const DROPPED: u8 = 4;
    // Section 4.2, figure 4, with the codes of RFC 3168: by inner field and, from not-ECT on, by outer field.
    let table = [
        (0b00, [0b00, 0b00, 0b00, DROPPED]),
        (0b10, [0b10, 0b10, 0b01, 0b11]),
        (0b01, [0b01, 0b01, 0b01, 0b11]),
        (0b11, [0b11, 0b11, 0b11, 0b11]),
    ];
    for (inner_ecn, expected) in table {
        for (outer_ecn, expected) in [0b00, 0b10, 0b01, 0b11].into_iter().zip(expected) {
            for mut packet in combinations() {
                let family = usize::from(packet.inner[0] >> 4 == 6);
                packet.ecn = outer_ecn;
                packet.inner = question(family, inner_ecn);
                let what = format!("{inner_ecn:02b} in {outer_ecn:02b}: {packet:?}");
                if expected == DROPPED {
                    fixture.expect_dropped(&what, &packet.frame(), DecapReason::CongestionNotCapable);
                } else {
                    let inner = question(family, expected);
                    let unwrapped = packet.unwrapped(&inner);
                    fixture.expect(
                        &what,
                        &packet.frame(),
                        (PASS, &unwrapped, reason_of(packet.wrapping)),
                    );
                }
            }
        }
    }
}

#[test]
fn a_frame_in_several_buffers_is_unwrapped() {
    let mut fixture = Fixture::new();
    for mut packet in combinations() {
        let family = usize::from(packet.inner[0] >> 4 == 6);
        let payload: Vec<u8> = (0..8000u32).map(|byte| byte as u8).collect();
        packet.inner = udp_packet(
            SocketAddr::new(ip(CLIENTS[family]), 51_000),
            SocketAddr::new(ip(VIPS[family]), 53),
            0,
            &payload,
        );
        let frame = packet.frame();
        let unwrapped = packet.unwrapped(&packet.inner);
        fixture.expect("8 KB", &frame, (PASS, &unwrapped, reason_of(packet.wrapping)));
        fixture.expect_dropped(
            "8 KB, cut",
            &frame[..frame.len() - 1],
            DecapReason::BadOuterLength,
        );
    }
}

#[test]
fn a_packet_in_two_encapsulations_is_unwrapped_once() {
    let mut fixture = Fixture::new();
    for wrapping in Wrapping::ALL {
        let mut packet = encapsulated(0, 0, wrapping);
        packet.inner = ip_packet(ip(CLIENTS[0]), ip(VIPS[0]), 4, 0, &[], &question(0, 0));
        let unwrapped = packet.unwrapped(&packet.inner);
        fixture.expect("twice", &packet.frame(), (PASS, &unwrapped, reason_of(wrapping)));
    }
}

#[test]
fn what_is_not_an_encapsulated_packet_for_a_vip_of_this_host_passes_as_it_came() {
    let mut fixture = Fixture::new();
    let elsewhere = |text: &str, family: usize| {
        let client = SocketAddr::new(ip(CLIENTS[family]), 51_000);
        udp_packet(client, SocketAddr::new(ip(text), 53), 0, b"question")
    };
    // 16 bytes of a destination are the last of an IPv6 header.
    let mapped_vip = {
        let mut packet = question(1, 0);
        packet[24..40].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 203, 0, 113, 10]);
        packet
    };
    let changes: [(Change, DecapReason); 8] = [
        (
            ("another host", |p| {
                p.destination = if p.destination.is_ipv4() {
                    ip("10.0.0.3")
                } else {
                    ip("2001:db8::3")
                }
            }),
            DecapReason::NotForThisHost,
        ),
        (
            ("a multicast destination", |p| {
                p.destination = if p.destination.is_ipv4() {
                    ip("224.0.0.1")
                } else {
                    ip("ff02::1")
                }
            }),
            DecapReason::NotForThisHost,
        ),
        (
            ("a broadcast frame", |p| p.to = [0xff; 6]),
            DecapReason::NotForThisHost,
        ),
        (
            ("a multicast frame", |p| p.to = [0x01, 0, 0x5e, 0, 0, 1]),
            DecapReason::NotForThisHost,
        ),
        (
            ("an inner packet of one byte", |p| p.inner.truncate(1)),
            DecapReason::Truncated,
        ),
        (
            ("an inner header that is cut", |p| p.inner.truncate(19)),
            DecapReason::Truncated,
        ),
        (
            ("three tags", |p| p.tags = vec![TAGS[1]; 3]),
            DecapReason::NotEncapsulated,
        ),
        (
            ("a version of IP that is none", |p| p.inner[0] = 0x75),
            DecapReason::GueHeader,
        ),
    ];
    for packet in combinations() {
        for ((what, change), reason) in changes {
            if reason == DecapReason::GueHeader && packet.wrapping != Wrapping::GueDirect {
                continue;
            }
            let mut packet = packet.clone();
            change(&mut packet);
            fixture.expect_passed(&format!("{what}: {packet:?}"), &packet.frame(), reason);
        }
        for (inner, family) in [("203.0.113.11", 0), ("2001:db8:1::11", 1), ("10.0.0.2", 0)] {
            let mut packet = packet.clone();
            packet.inner = elsewhere(inner, family);
            fixture.expect_passed(inner, &packet.frame(), DecapReason::NotForVip);
        }
        let mut packet = packet;
        packet.inner.clone_from(&mapped_vip);
        fixture.expect_passed("a mapped VIP", &packet.frame(), DecapReason::NotForVip);
    }
    for family in FAMILIES {
        let mut plain = encapsulated(family, family, Wrapping::Ipip);
        let inner = plain.inner.clone();
        plain.inner = question(family, 0);
        fixture.expect_passed(
            "the inner packet alone",
            &plain.unwrapped(&inner),
            DecapReason::NotEncapsulated,
        );
    }
    let mut arp = vec![0xff; 6];
    arp.extend([2, 0, 0, 0, 0, 1, 8, 6]);
    arp.extend([0; 46]);
    fixture.expect_passed("ARP", &arp, DecapReason::NotEncapsulated);
    fixture.expect_passed("an Ethernet header", &arp[..14], DecapReason::NotEncapsulated);
}

#[test]
fn fragments_and_extension_headers_of_the_outer_packet_pass_as_they_came() {
    let mut fixture = Fixture::new();
    for wrapping in Wrapping::ALL {
        let v4 = encapsulated(0, 0, wrapping).frame();
        for (what, field) in [("first", [0x20, 0]), ("middle", [0x20, 3]), ("last", [0, 3])] {
            let mut frame = v4.clone();
            frame[20..22].copy_from_slice(&field);
            fixture.expect_passed(what, &frame, DecapReason::OuterFragment);
        }
        let mut packet = encapsulated(1, 0, wrapping);
        // The next header is what the builder fills in; 60 is that of destination options.
        let with = |packet: &Encapsulated, kind: u8| {
            let mut frame = packet.frame();
            frame[14 + 6] = kind;
            frame
        };
        packet.options = vec![0, 0, 0, 1, 0, 0, 0, 1];
        fixture.expect_passed("a fragment", &with(&packet, 44), DecapReason::OuterFragment);
        fixture.expect_passed("hop by hop", &with(&packet, 0), DecapReason::NotEncapsulated);
        fixture.expect_passed("routing", &with(&packet, 43), DecapReason::NotEncapsulated);
        packet.options = vec![0, 0, 0xc9, 4, 0, 0, 0, 0];
        fixture.expect_passed("another option", &packet.frame(), DecapReason::OuterOptions);
        packet.options = [&LIMIT[..], &[1, 6, 0, 0, 0, 0, 0, 0]].concat();
        packet.options[1] = 1;
        fixture.expect_passed("longer options", &packet.frame(), DecapReason::OuterOptions);
    }
}

#[test]
fn gue_with_control_messages_options_or_other_protocols_passes_as_it_came() {
    let mut fixture = Fixture::new();
    for (outer, length) in [(0, 20), (1, 40)] {
        let frame = encapsulated(outer, 0, Wrapping::GueHeader).frame();
        let at = 14 + length + 8;
        for header in [
            [0x20, 4, 0, 0],
            [0x01, 4, 0, 0],
            [0x1f, 4, 0, 0],
            [0x00, 4, 0, 1],
            [0x00, 4, 0x80, 0],
            [0x00, 6, 0, 0],
            [0x00, 59, 0, 0],
            [0x50, 4, 0, 0],
            [0x70, 4, 0, 0],
            [0x80, 4, 0, 0],
            [0xc0, 4, 0, 0],
        ] {
            let mut frame = frame.clone();
            frame[at..at + 4].copy_from_slice(&header);
            fixture.expect_passed(&format!("{header:02x?}"), &frame, DecapReason::GueHeader);
        }
        for port in [6079_u16, 6081, 6080_u16.swap_bytes(), 0] {
            let mut frame = frame.clone();
            frame[14 + length + 2..14 + length + 4].copy_from_slice(&port.to_be_bytes());
            fixture.expect_passed("another port", &frame, DecapReason::NotEncapsulated);
        }
    }
}

#[test]
fn what_is_malformed_and_for_a_vip_is_dropped() {
    let mut fixture = Fixture::new();
    // Offsets are those within the outer packet, or within the inner one.
    #[derive(Clone, Copy)]
    enum At {
        Outer(usize),
        Inner(usize),
    }
    use At::{Inner, Outer};
    let v4_in = |wrapping| encapsulated(0, 0, wrapping);
    let v6_in = |wrapping| encapsulated(1, 1, wrapping);
    let mut cases = Vec::new();
    for wrapping in Wrapping::ALL {
        cases.extend([
            (
                "an outer length beyond the frame",
                v4_in(wrapping),
                Outer(2),
                vec![2, 0],
                DecapReason::BadOuterLength,
            ),
            (
                "an outer length within its header",
                v4_in(wrapping),
                Outer(2),
                vec![0, 19],
                DecapReason::BadOuterLength,
            ),
            (
                "an outer IPv6 length beyond the frame",
                v6_in(wrapping),
                Outer(4),
                vec![2, 0],
                DecapReason::BadOuterLength,
            ),
            (
                "an inner header that is too short",
                v4_in(wrapping),
                Inner(0),
                vec![0x44],
                DecapReason::BadInnerHeaderLength,
            ),
            (
                "an inner header beyond the packet",
                {
                    let mut packet = v4_in(wrapping);
                    packet.inner = ip_packet(ip(CLIENTS[0]), ip(VIPS[0]), 17, 0, &[], &[]);
                    packet
                },
                Inner(0),
                vec![0x46],
                DecapReason::BadInnerHeaderLength,
            ),
            (
                "an inner length beyond the packet",
                v4_in(wrapping),
                Inner(2),
                vec![0, 53],
                DecapReason::BadInnerLength,
            ),
            (
                "an inner length within its header",
                v4_in(wrapping),
                Inner(2),
                vec![0, 19],
                DecapReason::BadInnerLength,
            ),
            (
                "an inner IPv6 length beyond the packet",
                v6_in(wrapping),
                Inner(4),
                vec![0, 33],
                DecapReason::BadInnerLength,
            ),
        ]);
        if wrapping != Wrapping::Ipip {
            cases.extend([
                (
                    "a UDP length beyond the packet",
                    v4_in(wrapping),
                    Outer(24),
                    vec![0, 200],
                    DecapReason::BadOuterUdpLength,
                ),
                (
                    "a UDP length within its header",
                    v6_in(wrapping),
                    Outer(44),
                    vec![0, 7],
                    DecapReason::BadOuterUdpLength,
                ),
            ]);
        }
        if wrapping != Wrapping::GueDirect {
            cases.extend([
                (
                    "IPv6 where IPv4 is said",
                    v4_in(wrapping),
                    Inner(0),
                    vec![0x65],
                    DecapReason::BadInnerVersion,
                ),
                (
                    "IPv4 where IPv6 is said",
                    v6_in(wrapping),
                    Inner(0),
                    vec![0x45],
                    DecapReason::BadInnerVersion,
                ),
            ]);
        }
    }
    for (what, packet, at, bytes, reason) in cases {
        for tags in 0..=2 {
            let mut packet = packet.clone();
            packet.tags = TAGS[2 - tags..].to_vec();
            let frame = packet.frame();
            let offset = match at {
                Outer(offset) => 14 + 4 * tags + offset,
                Inner(offset) => frame.len() - packet.inner.len() + offset,
            };
            let with = |packet: &Encapsulated| {
                let mut frame = packet.frame();
                frame[offset..offset + bytes.len()].copy_from_slice(&bytes);
                frame
            };
            fixture.expect_dropped(&format!("{what}: {packet:?}"), &with(&packet), reason);
            // For an address that is no VIP the same is no business of ours.
            let last = if packet.inner[0] >> 4 == 6 { 39 } else { 19 };
            packet.inner[last] ^= 0x40;
            fixture.expect_passed(what, &with(&packet), DecapReason::NotForVip);
        }
    }
}

#[test]
fn only_packets_from_the_prefixes_that_were_given_are_unwrapped() {
    let allowed = |sources: &[&str]| {
        let mut fixture = Fixture::with_sources(sources);
        [
            "172.16.3.4",
            "172.17.0.1",
            "0.0.0.0",
            "100::7",
            "100:0:0:1::7",
            "2001:db8::1",
        ]
        .map(|source| {
            let source = ip(source);
            let mut packet = encapsulated(usize::from(source.is_ipv6()), 0, Wrapping::Ipip);
            packet.source = source;
            let frame = packet.frame();
            let (verdict, output) = fixture.run(&frame);
            assert_eq!(verdict, PASS);
            if output == frame {
                fixture.expect_passed("another source", &frame, DecapReason::SourceNotAllowed);
            }
            output != frame
        })
    };
    assert_eq!(allowed(&[]), [true; 6]);
    // An IPv4 address written as IPv6 is on no wire, and in no prefix.
    let mut packet = encapsulated(1, 0, Wrapping::Ipip);
    packet.source = ip("::ffff:172.16.3.4");
    for sources in [&[][..], &["172.16.0.0/16"], &["::/0"]] {
        let mut fixture = Fixture::with_sources(sources);
        fixture.expect_passed("a mapped source", &packet.frame(), DecapReason::SourceNotAllowed);
    }
    let balancer = ["172.16.0.0/16", "100::/64"];
    assert_eq!(allowed(&balancer), [true, false, false, true, false, false]);
    assert_eq!(
        allowed(&["172.16.3.4/32"]),
        [true, false, false, false, false, false]
    );
    // Neither family is a prefix of the other.
    assert_eq!(allowed(&["0.0.0.0/0"]), [true, true, true, false, false, false]);
    assert_eq!(allowed(&["::/0"]), [false, false, false, true, true, true]);
    assert_eq!(
        allowed(&["::/0", "172.16.0.0/12"]),
        [true, true, false, true, true, true]
    );
}

#[test]
fn the_addresses_of_the_host_change_while_it_runs() {
    let mut fixture = Fixture::new();
    let mut packet = encapsulated(0, 0, Wrapping::Ipip);
    packet.destination = ip("10.0.0.3");
    let (frame, unwrapped) = (packet.frame(), packet.unwrapped(&packet.inner));
    fixture.expect_passed("not yet", &frame, DecapReason::NotForThisHost);
    fixture
        .decap()
        .set_own_addresses(&[ip("10.0.0.3")].into())
        .unwrap();
    fixture.expect("now", &frame, (PASS, &unwrapped, DecapReason::Ipip));
    let former = encapsulated(0, 0, Wrapping::Ipip).frame();
    fixture.expect_passed("no longer", &former, DecapReason::NotForThisHost);
}

/// The fixture's addresses, for the decoder on this side of the kernel boundary.
struct Host;

impl Known for Host {
    fn is_own(&self, address: &Address) -> bool {
        HOST.map(|text| Address::from(ip(text))).contains(address)
    }

    fn is_source(&self, _: &Address) -> bool {
        true
    }

    fn is_vip(&self, address: &Address) -> bool {
        VIPS.map(|text| Address::from(ip(text))).contains(address)
    }
}

/// A frame as it leaves after that.
fn unwrapped(frame: &[u8], unwrapping: &Unwrapping) -> Vec<u8> {
    let link = unwrapping.link_length;
    let mut inner = frame[link + unwrapping.outer_length..].to_vec();
    match unwrapping.inner {
        Family::V4 => {
            let word = |at: usize| u16::from_ne_bytes([inner[at], inner[at + 1]]);
            let (start, sum) = ipv4_with_ecn(word(0), word(10), unwrapping.ecn);
            inner[..2].copy_from_slice(&start.to_ne_bytes());
            inner[10..12].copy_from_slice(&sum.to_ne_bytes());
        }
        Family::V6 => inner[1] = ipv6_with_ecn(inner[1], unwrapping.ecn),
    }
    [
        &frame[..link - 2],
        &unwrapping.inner.ethertype().to_ne_bytes(),
        &inner[..],
    ]
    .concat()
}

/// Any bytes, and encapsulated packets with a few bytes changed, cut or added to.
fn frames() -> impl Strategy<Value = Vec<u8>> {
    let whole = (
        select(combinations()),
        0..=2usize,
        (0..4u8, 0..4u8),
        any::<bool>(),
        vec(any::<u8>(), 0..12),
    )
        .prop_map(|(mut packet, tags, (outer_ecn, inner_ecn), options, trailer)| {
            packet.tags = TAGS[2 - tags..].to_vec();
            packet.ecn = outer_ecn;
            packet.inner = question(usize::from(packet.inner[0] >> 4 == 6), inner_ecn);
            if options {
                packet.options = if packet.destination.is_ipv4() {
                    vec![1; 8]
                } else {
                    LIMIT.to_vec()
                };
            }
            packet.trailer = trailer;
            packet.frame()
        });
    let telling = select(vec![
        0, 1, 4, 6, 17, 41, 44, 60, 0x44, 0x45, 0x46, 0x60, 0x81, 0x86,
    ]);
    let changed = (
        whole,
        vec((0..120usize, prop_oneof![any::<u8>(), telling]), 0..4),
        prop_oneof![3 => Just(None), 1 => (14..160usize).prop_map(Some)],
    )
        .prop_map(|(mut frame, changes, length)| {
            for (at, value) in changes {
                if let Some(byte) = frame.get_mut(at) {
                    *byte = value;
                }
            }
            if let Some(length) = length {
                frame.resize(length, 0);
            }
            frame
        });
    prop_oneof![1 => vec(any::<u8>(), 14..160), 9 => changed]
}

#[test]
fn any_frame_is_unwrapped_exactly_as_the_host_decides_and_otherwise_left_as_it_is() {
    let fixture = std::cell::RefCell::new(Fixture::new());
    let config = Config {
        cases: if tests::machine::is_emulated() {
            2000
        } else {
            20_000
        },
        rng_seed: RngSeed::Fixed(0x786c_6201),
        failure_persistence: None,
        ..Config::default()
    };
    let seen = std::cell::RefCell::new(std::collections::BTreeMap::<DecapReason, u32>::new());
    TestRunner::new(config)
        .run(&frames(), |frame| {
            let (verdict, output, reason) = match decide(&&frame[..], &Host) {
                Decision::Pass(reason) => (PASS, frame.clone(), reason),
                Decision::Drop(reason) => (DROP, frame.clone(), reason),
                Decision::Unwrap(unwrapping) => (PASS, unwrapped(&frame, &unwrapping), unwrapping.reason),
            };
            *seen.borrow_mut().entry(reason).or_default() += 1;
            let mut fixture = fixture.borrow_mut();
            let before = fixture.decap().counts().unwrap()[&reason].packets;
            prop_assert_eq!(fixture.run(&frame), (verdict, output));
            prop_assert_eq!(fixture.decap().counts().unwrap()[&reason].packets, before + 1);
            Ok(())
        })
        .unwrap();
    // The frames are of every kind that a frame alone can be of.
    for reason in DecapReason::ALL {
        let impossible = [DecapReason::SourceNotAllowed, DecapReason::Internal].contains(reason);
        assert!(
            impossible || seen.borrow().contains_key(reason),
            "no frame is {}",
            reason.name()
        );
    }
}
