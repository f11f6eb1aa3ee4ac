use core::net::IpAddr;

use proptest::{collection::vec, prelude::*, sample::select};

use super::*;
use crate::logic::checksum::of_bytes;

/// The host of the tests: two addresses, two VIPs, and outer sources but those of 192.0.2.0/24.
struct Host;

impl Known for Host {
    fn is_own(&self, known: &Address) -> bool {
        [address("10.0.0.2"), address("2001:db8::2")].contains(known)
    }

    fn is_source(&self, known: &Address) -> bool {
        !known.is_v4() || known.v4_word().to_ne_bytes()[..3] != [192, 0, 2]
    }

    fn is_vip(&self, known: &Address) -> bool {
        [address("203.0.113.10"), address("2001:db8:1::10")].contains(known)
    }
}

fn address(text: &str) -> Address {
    text.parse::<IpAddr>().unwrap().into()
}

fn octets(text: &str) -> Vec<u8> {
    match text.parse().unwrap() {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// An IP packet of the family of its addresses.
fn ip(source: &str, destination: &str, protocol: u8, ecn: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet;
    if source.contains(':') {
        packet = vec![0x60, ecn << 4, 0, 0];
        packet.extend((payload.len() as u16).to_be_bytes());
        packet.extend([protocol, 64]);
    } else {
        packet = vec![0x45, 0xb8 | ecn];
        packet.extend((20 + payload.len() as u16).to_be_bytes());
        packet.extend([0x12, 0x34, 0x40, 0, 64, protocol, 0, 0]);
    }
    packet.extend(octets(source));
    packet.extend(octets(destination));
    if packet[0] == 0x45 {
        let sum = of_bytes(&packet, 0).to_ne_bytes();
        packet[10..12].copy_from_slice(&sum);
    }
    packet.extend(payload);
    packet
}

fn udp(port: u16, payload: &[u8]) -> Vec<u8> {
    let mut datagram = vec![0x30, 0x39];
    datagram.extend(port.to_be_bytes());
    datagram.extend((8 + payload.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    datagram
}

/// Ethernet with so many VLAN tags.
fn ethernet(tags: usize, packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    for tag in [[0x88, 0xa8, 0, 7], [0x81, 0, 0x20, 9]].iter().skip(2 - tags) {
        frame.extend(tag);
    }
    let ethertype = if packet[0] >> 4 == 6 { 0x86dd_u16 } else { 0x0800 };
    frame.extend(ethertype.to_be_bytes());
    frame.extend(packet);
    frame
}

const VIP: &str = "203.0.113.10";
const VIP6: &str = "2001:db8:1::10";

fn inner(family: Family, ecn: u8) -> Vec<u8> {
    match family {
        Family::V4 => ip("198.51.100.7", VIP, 17, ecn, &udp(53, b"question")),
        Family::V6 => ip("2001:db8:2::7", VIP6, 17, ecn, &udp(53, b"question")),
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Ipip,
    Gue1,
    Gue0,
}

const WAYS: [Way; 3] = [Way::Ipip, Way::Gue1, Way::Gue0];
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

fn protocol_of(inner: &[u8]) -> u8 {
    if inner[0] >> 4 == 6 { 41 } else { 4 }
}

/// What is around an inner packet, but for the outer IP header: its protocol and its payload.
fn around(way: Way, inner: &[u8]) -> (u8, Vec<u8>) {
    let gue0 = [&[0, protocol_of(inner), 0, 0], inner].concat();
    match way {
        Way::Ipip => (protocol_of(inner), inner.to_vec()),
        Way::Gue1 => (17, udp(6080, inner)),
        Way::Gue0 => (17, udp(6080, &gue0)),
    }
}

fn outer(family: Family, ecn: u8, protocol: u8, payload: &[u8]) -> Vec<u8> {
    match family {
        Family::V4 => ip("172.16.3.4", "10.0.0.2", protocol, ecn, payload),
        Family::V6 => ip("100::7", "2001:db8::2", protocol, ecn, payload),
    }
}

fn wrapped(family: Family, way: Way, inner: &[u8]) -> Vec<u8> {
    let (protocol, payload) = around(way, inner);
    outer(family, 0, protocol, &payload)
}

fn decided(frame: &[u8]) -> Decision {
    decide(&frame, &Host)
}

/// A frame with 4 in 4 by ipip, with bytes changed from the outer IP header on.
fn changed(changes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut frame = ethernet(0, &wrapped(Family::V4, Way::Ipip, &inner(Family::V4, 0)));
    for (at, bytes) in changes {
        frame[14 + at..14 + at + bytes.len()].copy_from_slice(bytes);
    }
    frame
}

#[test]
fn every_encapsulation_in_every_frame_is_unwrapped() {
    for (tags, around, within) in [0, 1, 2]
        .into_iter()
        .flat_map(|tags| FAMILIES.map(|around| (tags, around)))
        .flat_map(|(tags, around)| FAMILIES.map(|within| (tags, around, within)))
    {
        for way in WAYS {
            let packet = inner(within, 0);
            let frame = ethernet(tags, &wrapped(around, way, &packet));
            let expected = Unwrapping {
                reason: if way == Way::Ipip {
                    DecapReason::Ipip
                } else {
                    DecapReason::Gue
                },
                link_length: 14 + 4 * tags,
                outer_length: frame.len() - packet.len() - 14 - 4 * tags,
                inner: within,
                ecn: 0,
            };
            assert_eq!(
                decided(&frame),
                Decision::Unwrap(expected),
                "{within:?} in {around:?} by {way:?}, {tags} tags"
            );
        }
    }
}

#[test]
fn outer_options_of_ipv4_are_skipped() {
    let packet = inner(Family::V4, 0);
    let mut outer = ip("172.16.3.4", "10.0.0.2", 4, 0, &[&[1; 40][..], &packet].concat());
    outer[0] = 0x4f;
    let Decision::Unwrap(unwrapping) = decided(&ethernet(2, &outer)) else {
        panic!("not unwrapped");
    };
    assert_eq!(unwrapping.outer_length, 60);
}

#[test]
fn the_limit_that_linux_writes_into_destination_options_is_walked() {
    for way in WAYS {
        let (protocol, payload) = around(way, &inner(Family::V4, 0));
        let with = |options: [u8; 8]| {
            let payload = [&options[..], &payload].concat();
            decided(&ethernet(0, &outer(Family::V6, 0, 60, &payload)))
        };
        for good in [[4, 1, 4, 1, 1, 0], [1, 1, 0, 4, 1, 4]] {
            let [a, b, c, d, e, f] = good;
            let Decision::Unwrap(unwrapping) = with([protocol, 0, a, b, c, d, e, f]) else {
                panic!("{good:?}: not unwrapped");
            };
            assert_eq!(
                unwrapping.outer_length,
                48 + payload.len() - inner(Family::V4, 0).len()
            );
        }
        // A home address (RFC 6275), padding alone, one unit more, an option that has to be understood.
        for other in [
            [protocol, 0, 0xc9, 4, 0, 0, 0, 0],
            [protocol, 0, 1, 4, 0, 0, 0, 0],
            [protocol, 1, 4, 1, 4, 1, 1, 0],
            [protocol, 0, 4, 1, 4, 0x9e, 1, 0],
        ] {
            assert_eq!(
                with(other),
                Decision::Pass(DecapReason::OuterOptions),
                "{other:?}"
            );
        }
        assert_eq!(
            with([6, 0, 4, 1, 4, 1, 1, 0]),
            Decision::Pass(DecapReason::NotEncapsulated)
        );
    }
}

#[test]
fn what_is_around_another_packet_once_more_is_unwrapped_once() {
    let twice = ip("172.16.0.1", VIP, 4, 0, &inner(Family::V4, 0));
    let Decision::Unwrap(unwrapping) = decided(&ethernet(0, &wrapped(Family::V4, Way::Ipip, &twice))) else {
        panic!("not unwrapped");
    };
    assert_eq!(unwrapping.outer_length, 20);
}

#[test]
fn what_is_not_for_a_vip_of_this_host_passes() {
    let packet = inner(Family::V4, 0);
    let elsewhere = ip("198.51.100.7", "203.0.113.11", 17, 0, &udp(53, b"question"));
    let other_host = ip("172.16.3.4", "10.0.0.3", 4, 0, &packet);
    let other_source = ip("192.0.2.4", "10.0.0.2", 4, 0, &packet);
    let mapped_vip = ip(
        "2001:db8:2::7",
        "::ffff:203.0.113.10",
        17,
        0,
        &udp(53, b"question"),
    );
    let mapped_host = ip("100::7", "::ffff:10.0.0.2", 4, 0, &packet);
    let mapped_source = ip("::ffff:172.16.3.4", "2001:db8::2", 4, 0, &packet);
    let v6_fragment = outer(
        Family::V6,
        0,
        44,
        &[&[4, 0, 0, 1, 0, 0, 0, 1][..], &packet].concat(),
    );
    let mut group = changed(&[]);
    group[0] = 0x01;
    let frame = |packet: &[u8]| ethernet(1, packet);
    for (what, frame, reason) in [
        (
            "another inner destination",
            frame(&wrapped(Family::V6, Way::Ipip, &elsewhere)),
            DecapReason::NotForVip,
        ),
        (
            "an IPv4 VIP written as IPv6",
            frame(&wrapped(Family::V4, Way::Ipip, &mapped_vip)),
            DecapReason::NotForVip,
        ),
        ("another host", frame(&other_host), DecapReason::NotForThisHost),
        (
            "a host written as IPv6",
            frame(&mapped_host),
            DecapReason::NotForThisHost,
        ),
        ("a group", group, DecapReason::NotForThisHost),
        (
            "a source that is not allowed",
            frame(&other_source),
            DecapReason::SourceNotAllowed,
        ),
        (
            "a source written as IPv6",
            frame(&mapped_source),
            DecapReason::SourceNotAllowed,
        ),
        (
            "a first fragment",
            changed(&[(6, &[0x20, 0])]),
            DecapReason::OuterFragment,
        ),
        (
            "a later fragment",
            changed(&[(6, &[0, 1])]),
            DecapReason::OuterFragment,
        ),
        (
            "a fragment of IPv6",
            frame(&v6_fragment),
            DecapReason::OuterFragment,
        ),
        ("no encapsulation", frame(&packet), DecapReason::NotEncapsulated),
        (
            "another UDP port",
            frame(&outer(Family::V4, 0, 17, &udp(6081, &packet))),
            DecapReason::NotEncapsulated,
        ),
        (
            "ARP",
            [&[2; 12][..], &[8, 6], &[0; 46]].concat(),
            DecapReason::NotEncapsulated,
        ),
        (
            "three tags",
            [&[2; 12][..], &[0x81, 0, 0, 1].repeat(3), &[8, 0], &packet].concat(),
            DecapReason::NotEncapsulated,
        ),
        (
            "another version outside",
            changed(&[(0, &[0x65])]),
            DecapReason::NotEncapsulated,
        ),
        (
            "an outer header that is too short",
            changed(&[(0, &[0x44])]),
            DecapReason::NotEncapsulated,
        ),
        (
            "an outer packet without payload",
            changed(&[(2, &[0, 20])]),
            DecapReason::Truncated,
        ),
        (
            "an inner header that is cut",
            changed(&[(2, &[0, 39])]),
            DecapReason::Truncated,
        ),
        (
            "a frame that ends within it",
            changed(&[])[..14 + 39].to_vec(),
            DecapReason::Truncated,
        ),
        (
            "nothing in GUE",
            frame(&outer(Family::V4, 0, 17, &udp(6080, b""))),
            DecapReason::Truncated,
        ),
        ("a header alone", vec![2; 14], DecapReason::NotEncapsulated),
    ] {
        assert_eq!(decided(&frame), Decision::Pass(reason), "{what}");
    }
}

#[test]
fn gue_that_is_not_plain_passes() {
    let packet = inner(Family::V4, 0);
    for header in [
        [0x20, 4, 0, 0], // control
        [0x01, 4, 0, 0], // a header of one word more
        [0x00, 4, 0, 1], // a flag
        [0x00, 4, 0x80, 0],
        [0x00, 6, 0, 0], // TCP in GUE
        [0x00, 0, 0, 0],
        [0x50, 4, 0, 0], // variant 1, no version of IP
        [0x70, 4, 0, 0],
        [0x80, 4, 0, 0], // variants 2 and 3
        [0xc0, 4, 0, 0],
    ] {
        let payload = [&header[..], &packet].concat();
        for family in FAMILIES {
            let frame = ethernet(0, &outer(family, 0, 17, &udp(6080, &payload)));
            assert_eq!(
                decided(&frame),
                Decision::Pass(DecapReason::GueHeader),
                "{header:02x?}"
            );
        }
    }
}

#[test]
fn what_is_malformed_and_for_a_vip_is_dropped_and_for_others_passes() {
    let gue = |length: u16| {
        let mut datagram = udp(6080, &inner(Family::V4, 0));
        datagram[4..6].copy_from_slice(&length.to_be_bytes());
        ethernet(0, &outer(Family::V6, 0, 17, &datagram))
    };
    let v6 = |at: usize, bytes: &[u8]| {
        let packet = inner(Family::V6, 0);
        let mut frame = ethernet(2, &wrapped(Family::V4, Way::Gue0, &packet));
        let at = frame.len() - packet.len() + at;
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame
    };
    let marked = |family| {
        let packet = inner(family, 0);
        ethernet(0, &outer(Family::V4, 3, protocol_of(&packet), &packet))
    };
    let whole = changed(&[]).len();
    for (what, frame, reason) in [
        (
            "an outer length beyond the frame",
            changed(&[(2, &[1, 0])]),
            DecapReason::BadOuterLength,
        ),
        (
            "an outer length within its header",
            changed(&[(2, &[0, 19])]),
            DecapReason::BadOuterLength,
        ),
        (
            "a frame that is cut",
            changed(&[])[..whole - 1].to_vec(),
            DecapReason::BadOuterLength,
        ),
        (
            "a UDP length beyond the packet",
            gue(1000),
            DecapReason::BadOuterUdpLength,
        ),
        (
            "a UDP length within its header",
            gue(7),
            DecapReason::BadOuterUdpLength,
        ),
        (
            "IPv6 where IPv4 is said",
            changed(&[(20, &[0x65])]),
            DecapReason::BadInnerVersion,
        ),
        (
            "IPv4 where IPv6 is said",
            v6(0, &[0x45]),
            DecapReason::BadInnerVersion,
        ),
        (
            "an inner header that is too short",
            changed(&[(20, &[0x44])]),
            DecapReason::BadInnerHeaderLength,
        ),
        (
            "an inner header beyond the packet",
            changed(&[(20, &[0x4f])]),
            DecapReason::BadInnerHeaderLength,
        ),
        (
            "an inner length beyond the packet",
            changed(&[(22, &[0, 37])]),
            DecapReason::BadInnerLength,
        ),
        (
            "an inner length within its header",
            changed(&[(22, &[0, 19])]),
            DecapReason::BadInnerLength,
        ),
        (
            "an inner IPv6 length beyond the packet",
            v6(4, &[0, 17]),
            DecapReason::BadInnerLength,
        ),
        (
            "congestion on what does not know of it",
            marked(Family::V4),
            DecapReason::CongestionNotCapable,
        ),
        (
            "the same of IPv6",
            marked(Family::V6),
            DecapReason::CongestionNotCapable,
        ),
    ] {
        assert_eq!(decided(&frame), Decision::Drop(reason), "{what}");
        assert_eq!(reason.class(), crate::abi::VerdictClass::Dropped);

        // The same for another inner destination; of IPv4 at 16 and of IPv6 at 24 within the inner header.
        let at = frame
            .windows(4)
            .position(|bytes| bytes == octets(VIP))
            .unwrap_or_else(|| frame.windows(16).position(|bytes| bytes == octets(VIP6)).unwrap());
        let mut other = frame;
        other[at] ^= 0xff;
        assert_eq!(
            decided(&other),
            Decision::Pass(DecapReason::NotForVip),
            "{what}, for another"
        );
    }
}

#[test]
fn ecn_is_as_in_the_table_of_rfc_6040() {
    // Section 4.2, figure 4: a line for each inner field, with the outer ones not-ECT, ECT(0), ECT(1) and CE.
    const DROPPED: Option<u8> = None;
    let fields = [NOT_ECT, ECT_0, ECT_1, CE];
    for (inner_ecn, expected) in [
        (NOT_ECT, [Some(NOT_ECT), Some(NOT_ECT), Some(NOT_ECT), DROPPED]),
        (ECT_0, [Some(ECT_0), Some(ECT_0), Some(ECT_1), Some(CE)]),
        (ECT_1, [Some(ECT_1), Some(ECT_1), Some(ECT_1), Some(CE)]),
        (CE, [Some(CE), Some(CE), Some(CE), Some(CE)]),
    ] {
        assert_eq!(
            fields.map(|ecn| ecn_unwrapped(ecn, inner_ecn)),
            expected,
            "inner {inner_ecn}"
        );
        for (ecn, expected) in fields.into_iter().zip(expected) {
            for (around, within) in FAMILIES.into_iter().flat_map(|a| FAMILIES.map(|b| (a, b))) {
                let packet = inner(within, inner_ecn);
                let frame = ethernet(0, &outer(around, ecn, protocol_of(&packet), &packet));
                let found = match decided(&frame) {
                    Decision::Unwrap(unwrapping) => Some(unwrapping.ecn),
                    Decision::Drop(DecapReason::CongestionNotCapable) => None,
                    other => panic!("{other:?}"),
                };
                assert_eq!(
                    found, expected,
                    "{within:?} with {inner_ecn} in {around:?} with {ecn}"
                );
            }
        }
    }
}

/// Whole encapsulated frames, mostly; and then some with a few bytes changed, cut or added to.
fn frames() -> impl Strategy<Value = Vec<u8>> {
    let whole = (
        0..=2usize,
        select(&FAMILIES[..]),
        select(&FAMILIES[..]),
        select(&WAYS[..]),
        (0..4u8, 0..4u8),
    )
        .prop_map(|(tags, around_family, within, way, (outer_ecn, inner_ecn))| {
            let (protocol, payload) = around(way, &inner(within, inner_ecn));
            ethernet(tags, &outer(around_family, outer_ecn, protocol, &payload))
        });
    let near = (
        whole,
        vec(
            (
                12..130usize,
                prop_oneof![any::<u8>(), select(&[0u8, 4, 6, 17, 41, 60, 0x45, 0x60][..])],
            ),
            0..4,
        ),
        prop_oneof![3 => Just(None), 1 => (0..160usize).prop_map(Some)],
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
    prop_oneof![1 => vec(any::<u8>(), 0..160), 9 => near]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn no_bytes_make_it_panic_and_what_is_unwrapped_is_a_whole_packet_for_a_vip(frame in frames()) {
        let unwrapping = match decided(&frame) {
            Decision::Pass(reason) => {
                prop_assert_eq!(reason.class(), crate::abi::VerdictClass::Passed);
                return Ok(());
            }
            Decision::Drop(reason) => {
                prop_assert_eq!(reason.class(), crate::abi::VerdictClass::Dropped);
                return Ok(());
            }
            Decision::Unwrap(unwrapping) => unwrapping,
        };
        prop_assert_eq!(unwrapping.reason.class(), crate::abi::VerdictClass::Forwarded);
        prop_assert!([14, 18, 22].contains(&unwrapping.link_length));
        prop_assert!((20..=60 + 8 + 4).contains(&unwrapping.outer_length));
        let packet = &frame[unwrapping.link_length + unwrapping.outer_length..];
        match unwrapping.inner {
            Family::V4 => {
                let header = usize::from(packet[0] & 0x0f) * 4;
                let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
                prop_assert_eq!(packet[0] >> 4, 4);
                prop_assert!(header >= 20 && total >= header && total <= packet.len());
                prop_assert_eq!(&packet[16..20], &octets(VIP)[..]);
            }
            Family::V6 => {
                prop_assert_eq!(packet[0] >> 4, 6);
                prop_assert!(40 + usize::from(u16::from_be_bytes([packet[4], packet[5]])) <= packet.len());
                prop_assert_eq!(&packet[24..40], &octets(VIP6)[..]);
            }
        }
    }

    #[test]
    fn what_follows_the_packet_in_its_frame_makes_no_difference(frame in frames(), trailer in vec(any::<u8>(), 0..40)) {
        if let Decision::Unwrap(unwrapping) = decided(&frame) {
            let longer = [&frame[..], &trailer].concat();
            prop_assert_eq!(decided(&longer), Decision::Unwrap(unwrapping));
        }
    }

    #[test]
    fn a_changed_ecn_field_changes_nothing_else_and_has_the_checksum_of_its_header(
        before in 0..4u8, after in 0..4u8, traffic: u8
    ) {
        let packet = inner(Family::V4, before);
        let header = &packet[..20];
        let word = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        let (start, sum) = ipv4_with_ecn(word(0), word(10), after);
        let mut changed = header.to_vec();
        changed[..2].copy_from_slice(&start.to_ne_bytes());
        changed[10..12].copy_from_slice(&sum.to_ne_bytes());
        prop_assert_eq!(changed[0], header[0]);
        prop_assert_eq!(changed[1], (header[1] & 0xfc) | after);
        prop_assert_eq!(of_bytes(&changed, 0), 0);

        let second = ipv6_with_ecn(traffic, after);
        prop_assert_eq!(traffic_class_ecn(second), after);
        prop_assert_eq!(second & 0xcf, traffic & 0xcf);
    }
}
