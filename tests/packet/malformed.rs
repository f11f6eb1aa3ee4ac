//! Malformed packets: dropped with their reason where they are for a VIP, left alone where they are not.

use std::net::{Ipv4Addr, SocketAddr};

use lb_common::{
    abi::Reason::{
        self, BadFragment, BadIpHeaderLength, BadIpLength, BadIpVersion, BadSourceAddress, BadTcpFlags,
        BadTcpOffset, BadUdpLength, FragmentUnknown, NotForService, NotIp, TruncatedTransport, TtlExceeded,
        ZeroPort,
    },
    logic::tcp_state::flags_are_sane,
};

use crate::{
    fixture::{DNS, Expected, Fixture, SHOP, TX, WEB},
    frame::{ACK, Frame, IP, SYN, TRANSPORT, tcp, udp},
};

const CLIENT: &str = "198.51.100.7:5000";
/// No VIP.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 11);

fn web() -> Frame {
    tcp(CLIENT, WEB.vip, SYN)
}

fn dns() -> Frame {
    udp(CLIENT, DNS.vip)
}

fn set(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

fn changed(frame: &Frame, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = frame.bytes();
    change(&mut bytes);
    bytes
}

/// Dropped with the reason where the destination is a VIP; left alone where it is not.
fn expect(fixture: &mut Fixture, what: &str, bytes: &[u8], reason: Reason) {
    fixture.expect(what, bytes, Expected::dropped(reason));
    let mut elsewhere = bytes.to_vec();
    // A source that was the destination goes with it.
    if elsewhere[IP + 12..IP + 16] == elsewhere[IP + 16..IP + 20] {
        elsewhere[IP + 12..IP + 16].copy_from_slice(&ELSEWHERE.octets());
    }
    elsewhere[IP + 16..IP + 20].copy_from_slice(&ELSEWHERE.octets());
    fixture.expect(
        &format!("{what}, not to a VIP"),
        &elsewhere,
        Expected::passed(NotForService),
    );
}

#[test]
fn a_version_that_is_not_4_is_dropped() {
    let mut fixture = Fixture::new();
    for version in (0..16).filter(|version| *version != 4) {
        let bytes = changed(&web(), |bytes| bytes[IP] = version << 4 | 5);
        expect(&mut fixture, &format!("version {version}"), &bytes, BadIpVersion);
    }
}

#[test]
fn an_ip_header_length_under_20_bytes_or_beyond_the_frame_is_dropped() {
    let mut fixture = Fixture::new();
    for words in 0..5 {
        let bytes = changed(&web(), |bytes| bytes[IP] = 0x40 | words);
        expect(&mut fixture, &format!("{words} words"), &bytes, BadIpHeaderLength);
    }
    let whole = web().bytes();
    for words in 6..=15u8 {
        let mut bytes = whole[..IP + usize::from(words) * 4 - 1].to_vec();
        bytes[IP] = 0x40 | words;
        expect(
            &mut fixture,
            &format!("{words} words in one byte less"),
            &bytes,
            BadIpHeaderLength,
        );
    }
}

#[test]
fn a_total_length_under_the_header_or_beyond_the_frame_is_dropped() {
    let mut fixture = Fixture::new();
    let length = (web().bytes().len() - IP) as u16;
    for total in (0..20).chain([length + 1, length + 100, 0x7fff, 0xffff]) {
        let bytes = changed(&web(), |bytes| set(bytes, IP + 2, total));
        expect(
            &mut fixture,
            &format!("total length {total}"),
            &bytes,
            BadIpLength,
        );
    }
    let mut with_options = web();
    with_options.ip_options = vec![1; 8];
    let bytes = changed(&with_options, |bytes| set(bytes, IP + 2, 27));
    expect(&mut fixture, "shorter than its options", &bytes, BadIpLength);
}

#[test]
fn a_source_address_that_no_host_may_use_is_dropped() {
    let mut fixture = Fixture::new();
    for source in [
        "0.0.0.0",
        "0.1.2.3",
        "0.255.255.255",
        "127.0.0.1",
        "127.255.255.255",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "203.0.113.10",
    ] {
        for mut frame in [web(), dns()] {
            frame.source = SocketAddr::new(source.parse().unwrap(), 5000);
            expect(&mut fixture, source, &frame.bytes(), BadSourceAddress);
        }
    }
}

#[test]
fn the_addresses_next_to_those_that_no_host_may_use_are_served() {
    let mut fixture = Fixture::new();
    for source in ["1.0.0.0", "126.255.255.255", "128.0.0.0", "223.255.255.255"] {
        let mut frame = web();
        frame.source = SocketAddr::new(source.parse().unwrap(), 5000);
        let expected = Expected::to_backend(&WEB, 0, &frame, frame.source).new_flow();
        fixture.expect(source, &frame.bytes(), expected);
    }
}

#[test]
fn a_fragment_is_dropped_whichever_it_is() {
    let mut fixture = Fixture::new();
    for (what, field, tcp_reason, udp_reason) in [
        ("in the middle", 0x2003, FragmentUnknown, FragmentUnknown),
        ("last", 0x00b9, FragmentUnknown, FragmentUnknown),
        ("last at the largest offset", 0x1fff, BadFragment, BadFragment),
        ("over the TCP header", 0x2001, BadFragment, FragmentUnknown),
        ("over the TCP flags", 0x0002, BadFragment, FragmentUnknown),
        ("offset of 256", 0x0100, FragmentUnknown, FragmentUnknown),
    ] {
        for (frame, reason) in [(web(), tcp_reason), (dns(), udp_reason)] {
            let bytes = changed(&frame, |bytes| set(bytes, IP + 6, field));
            expect(&mut fixture, what, &bytes, reason);
        }
    }
}

#[test]
fn a_packet_that_may_not_be_fragmented_is_served() {
    let mut fixture = Fixture::new();
    let bytes = changed(&web(), |bytes| set(bytes, IP + 6, 0x4000));
    assert_eq!(fixture.run(&bytes).0, TX);
}

#[test]
fn a_packet_that_ends_within_its_tcp_or_udp_header_is_dropped() {
    let mut fixture = Fixture::new();
    for (frame, header) in [(web(), 20), (dns(), 8)] {
        for options in [0, 4, 40] {
            let mut frame = frame.clone();
            frame.ip_options = vec![1; options];
            let whole = frame.bytes();
            for length in 0..header {
                let total = 20 + options + length;
                let mut cut = whole[..IP + total].to_vec();
                set(&mut cut, IP + 2, total as u16);
                let what = format!("{length} bytes after {options} of options");
                expect(&mut fixture, &what, &cut, TruncatedTransport);
                // The same packet with padding behind it: the length is that of the IP header, not of the frame.
                cut.resize(IP + total + 60, 0);
                expect(
                    &mut fixture,
                    &format!("{what} and padding"),
                    &cut,
                    TruncatedTransport,
                );
            }
        }
    }
}

#[test]
fn a_tcp_data_offset_under_20_bytes_or_beyond_the_packet_is_dropped() {
    let mut fixture = Fixture::new();
    for words in 0..5 {
        let bytes = changed(&web(), |bytes| bytes[TRANSPORT + 12] = words << 4);
        expect(&mut fixture, &format!("{words} words"), &bytes, BadTcpOffset);
    }
    for words in 6..=15u8 {
        let mut frame = tcp(CLIENT, WEB.vip, ACK);
        frame.payload = vec![0; usize::from(words) * 4 - 21];
        frame.trailer = vec![0; 60];
        let bytes = changed(&frame, |bytes| bytes[TRANSPORT + 12] = words << 4);
        let what = format!("{words} words in one byte less");
        expect(&mut fixture, &what, &bytes, BadTcpOffset);
    }
}

#[test]
fn tcp_flags_that_no_connection_uses_are_dropped_and_all_others_are_not() {
    let mut fixture = Fixture::new();
    let mut insane = 0;
    for flags in 0..64u8 {
        let what = format!("flags {flags:#08b}");
        let bytes = changed(&tcp(CLIENT, WEB.vip, ACK), |bytes| bytes[TRANSPORT + 13] = flags);
        let (syn, fin, rst, ack) = (
            flags & 0x02 != 0,
            flags & 0x01 != 0,
            flags & 0x04 != 0,
            flags & 0x10 != 0,
        );
        let sane = match (syn, fin, rst) {
            (true, false, false) | (false, false, true) => true,
            (false, _, false) => ack,
            _ => false,
        };
        assert_eq!(sane, flags_are_sane(flags), "{what}");
        if sane {
            let (verdict, _) = fixture.run(&bytes);
            assert!(verdict == TX, "{what}: {verdict}");
        } else {
            insane += 1;
            expect(&mut fixture, &what, &bytes, BadTcpFlags);
            // ECN's bits (RFC 3168) make no difference.
            let with_ecn = changed(&tcp(CLIENT, WEB.vip, ACK), |bytes| {
                bytes[TRANSPORT + 13] = flags | 0xc0;
            });
            expect(&mut fixture, &format!("{what} and ECN"), &with_ecn, BadTcpFlags);
        }
        // So that each combination meets a flow that is there, which RST may not close for the next.
        fixture.run(&tcp(CLIENT, WEB.vip, SYN).bytes());
    }
    assert_eq!(insane, 40);
}

#[test]
fn a_udp_length_under_8_bytes_or_beyond_the_packet_is_dropped() {
    let mut fixture = Fixture::new();
    let length = (dns().bytes().len() - TRANSPORT) as u16;
    for udp_length in (0..8).chain([length + 1, length + 100, 0xffff]) {
        let mut frame = dns();
        frame.trailer = vec![0; 200];
        let bytes = changed(&frame, |bytes| set(bytes, TRANSPORT + 4, udp_length));
        expect(
            &mut fixture,
            &format!("UDP length {udp_length}"),
            &bytes,
            BadUdpLength,
        );
    }
}

#[test]
fn port_zero_on_either_side_is_dropped() {
    let mut fixture = Fixture::new();
    for frame in [web(), dns()] {
        for at in [TRANSPORT, TRANSPORT + 2] {
            let bytes = changed(&frame, |bytes| set(bytes, at, 0));
            expect(&mut fixture, &format!("port at {at}"), &bytes, ZeroPort);
        }
    }
}

#[test]
fn a_time_to_live_that_is_used_up_is_dropped_and_counted_for_the_service() {
    let mut fixture = Fixture::new();
    for ttl in [0, 1] {
        for (service, mut frame) in [(WEB, web()), (DNS, dns())] {
            frame.ttl = ttl;
            let expected = Expected::dropped(TtlExceeded).of(&service);
            fixture.expect(&format!("time to live of {ttl}"), &frame.bytes(), expected);
        }
    }
    assert!(fixture.flows().is_empty());
    let mut frame = web();
    frame.ttl = 2;
    let expected = Expected::to_backend(&WEB, 0, &frame, frame.source).new_flow();
    fixture.expect("time to live of 2", &frame.bytes(), expected);
}

#[test]
fn a_malformed_packet_for_a_vip_is_dropped_on_any_port_of_it() {
    let mut fixture = Fixture::new();
    let other = tcp(CLIENT, SocketAddr::new(WEB.vip.ip(), 22), SYN);
    let bytes = changed(&other, |bytes| bytes[TRANSPORT + 13] = 0);
    expect(&mut fixture, "no flags", &bytes, BadTcpFlags);
}

#[test]
fn a_malformed_packet_of_a_known_flow_is_dropped_and_does_not_touch_the_flow() {
    let mut fixture = Fixture::new();
    fixture.run(&web().bytes());
    let before = fixture.flow(&web()).unwrap();
    let bytes = changed(&web(), |bytes| bytes[TRANSPORT + 13] = 0x3f);
    expect(&mut fixture, "all flags", &bytes, BadTcpFlags);
    assert_eq!(fixture.flow(&web()), Some(before));
}

/// Where the program reads a header is found by the options before it, for each length that they can have.
#[test]
fn ip_options_of_every_length_are_read_over() {
    let mut fixture = Fixture::new();
    for words in 1..=10 {
        for (service, mut frame) in [(WEB, web()), (DNS, dns())] {
            frame.ip_options = (0..words * 4).map(|at| at as u8 | 0x80).collect();
            frame.source.set_port(6000 + words as u16);
            let expected = Expected::to_backend(&service, 0, &frame, frame.source).new_flow();
            fixture.expect(&format!("{words} words of options"), &frame.bytes(), expected);
        }
    }
}

/// Whatever is cut off a packet, the program tells it by its headers.
#[test]
fn a_frame_that_is_cut_anywhere_is_dropped_or_passed_as_it_came() {
    let mut fixture = Fixture::new();
    for service in [WEB, SHOP] {
        let whole = tcp(CLIENT, service.vip, SYN).bytes();
        for length in 14..whole.len() {
            let expected = if length < TRANSPORT {
                Expected::passed(NotIp)
            } else {
                Expected::dropped(BadIpLength)
            };
            fixture.expect(&format!("cut to {length}"), &whole[..length], expected);
        }
    }
}
