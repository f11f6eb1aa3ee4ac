//! Malformed packets: dropped with their reason where they are for a VIP, left alone where they are not.

use std::net::{Ipv4Addr, SocketAddr};

use lb_common::{
    abi::{
        Reason::{
            self, BadExtensionHeader, BadFragment, BadIpHeaderLength, BadIpLength, BadIpVersion,
            BadSourceAddress, BadTcpFlags, BadTcpOffset, BadUdpLength, FragmentUnknown, NotForService, NotIp,
            TruncatedTransport, TtlExceeded, ZeroPort,
        },
        Tags,
    },
    logic::tcp_state::flags_are_sane,
};

use crate::{
    fixture::{DNS, DNS6, EVERY, Expected, Fixture, SHOP, TX, WEB, WEB6},
    frame::{ACK, Frame, IP, SYN, TRANSPORT, icmp, service_vlan, tcp, udp, vlan},
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
            // Nor with a protocol that is not looked into.
            let sctp = changed(&frame, |bytes| bytes[IP + 9] = 132);
            expect(&mut fixture, source, &sctp, BadSourceAddress);
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

/// What is done to a frame whose IP header is at an offset.
type Change = Box<dyn Fn(&mut Vec<u8>, usize)>;

fn bytes_at(at: usize, values: &'static [u8]) -> Change {
    Box::new(move |frame, ip| frame[ip + at..ip + at + values.len()].copy_from_slice(values))
}

/// Cuts or lengthens the IP packet to a length, and says so in its header.
fn ip_length(length: usize) -> Change {
    Box::new(move |frame, ip| {
        frame.resize(ip + length, 0);
        if frame[ip] >> 4 == 4 {
            set(frame, ip + 2, length as u16);
        } else {
            set(frame, ip + 4, length.saturating_sub(40) as u16);
        }
    })
}

/// Puts an extension header of a number before the transport header.
fn extended(number: u8, header: &'static [u8]) -> Change {
    Box::new(move |frame, ip| {
        let mut header = header.to_vec();
        header[0] = frame[ip + 6];
        frame[ip + 6] = number;
        let length = u16::from_be_bytes([frame[ip + 4], frame[ip + 5]]) + header.len() as u16;
        set(frame, ip + 4, length);
        frame.splice(ip + 40..ip + 40, header);
    })
}

fn all(changes: Vec<Change>) -> Change {
    Box::new(move |frame, ip| changes.iter().for_each(|change| change(frame, ip)))
}

/// Malformed or hostile headers: what is changed of a SYN over IPv4, and the reason for which it is dropped.
fn of_tcp_v4() -> Vec<(&'static str, Change, Reason)> {
    vec![
        ("version 0", bytes_at(0, &[0x05]), BadIpVersion),
        ("version 6", bytes_at(0, &[0x65]), BadIpVersion),
        ("version 15", bytes_at(0, &[0xf5]), BadIpVersion),
        ("header of 0 bytes", bytes_at(0, &[0x40]), BadIpHeaderLength),
        ("header of 16 bytes", bytes_at(0, &[0x44]), BadIpHeaderLength),
        (
            "header beyond the packet",
            all(vec![ip_length(40), bytes_at(0, &[0x4b])]),
            BadIpHeaderLength,
        ),
        ("total length 0", bytes_at(2, &[0, 0]), BadIpLength),
        ("total length 19", bytes_at(2, &[0, 19]), BadIpLength),
        ("largest total length", bytes_at(2, &[0xff, 0xff]), BadIpLength),
        ("no transport header", ip_length(20), TruncatedTransport),
        ("half of the ports", ip_length(22), TruncatedTransport),
        ("a TCP header but for a byte", ip_length(39), TruncatedTransport),
        (
            "options over the TCP header",
            bytes_at(0, &[0x4f]),
            TruncatedTransport,
        ),
        ("source 0.0.0.0", bytes_at(12, &[0, 0, 0, 0]), BadSourceAddress),
        (
            "source 127.0.0.1",
            bytes_at(12, &[127, 0, 0, 1]),
            BadSourceAddress,
        ),
        (
            "source 224.0.0.1",
            bytes_at(12, &[224, 0, 0, 1]),
            BadSourceAddress,
        ),
        (
            "source 240.0.0.1",
            bytes_at(12, &[240, 0, 0, 1]),
            BadSourceAddress,
        ),
        ("broadcast source", bytes_at(12, &[255; 4]), BadSourceAddress),
        (
            "the VIP's own (land)",
            bytes_at(12, &[203, 0, 113, 10]),
            BadSourceAddress,
        ),
        ("fragment over the ports", bytes_at(6, &[0x20, 0x01]), BadFragment),
        ("fragment over the flags", bytes_at(6, &[0x00, 0x02]), BadFragment),
        (
            "fragment beyond the largest packet",
            bytes_at(6, &[0x1f, 0xff]),
            BadFragment,
        ),
        (
            "fragment of no packet",
            bytes_at(6, &[0x01, 0x00]),
            FragmentUnknown,
        ),
        (
            "first fragment of 16 bytes",
            all(vec![ip_length(36), bytes_at(6, &[0x20, 0])]),
            TruncatedTransport,
        ),
        (
            "first fragment without the options",
            all(vec![
                ip_length(44),
                bytes_at(6, &[0x20, 0]),
                bytes_at(32, &[0x70]),
            ]),
            BadTcpOffset,
        ),
        ("data offset 0", bytes_at(32, &[0x00]), BadTcpOffset),
        ("data offset 16", bytes_at(32, &[0x40]), BadTcpOffset),
        (
            "data offset beyond the packet",
            all(vec![ip_length(44), bytes_at(32, &[0xf0])]),
            BadTcpOffset,
        ),
        ("no flags (null scan)", bytes_at(33, &[0x00]), BadTcpFlags),
        ("FIN alone", bytes_at(33, &[0x01]), BadTcpFlags),
        ("SYN, FIN", bytes_at(33, &[0x03]), BadTcpFlags),
        ("SYN, RST", bytes_at(33, &[0x06]), BadTcpFlags),
        (
            "FIN, PSH, URG (Christmas tree)",
            bytes_at(33, &[0x29]),
            BadTcpFlags,
        ),
        ("all flags", bytes_at(33, &[0xff]), BadTcpFlags),
        ("source port 0", bytes_at(20, &[0, 0]), ZeroPort),
        ("destination port 0", bytes_at(22, &[0, 0]), ZeroPort),
    ]
}

fn of_udp_v4() -> Vec<(&'static str, Change, Reason)> {
    vec![
        ("no transport header", ip_length(20), TruncatedTransport),
        ("a UDP header but for a byte", ip_length(27), TruncatedTransport),
        ("UDP length 0", bytes_at(24, &[0, 0]), BadUdpLength),
        ("UDP length 7", bytes_at(24, &[0, 7]), BadUdpLength),
        ("largest UDP length", bytes_at(24, &[0xff, 0xff]), BadUdpLength),
        ("source port 0", bytes_at(20, &[0, 0]), ZeroPort),
        ("destination port 0", bytes_at(22, &[0, 0]), ZeroPort),
        (
            "fragment beyond the largest packet",
            bytes_at(6, &[0x1f, 0xff]),
            BadFragment,
        ),
        (
            "fragment of no packet",
            bytes_at(6, &[0x00, 0x01]),
            FragmentUnknown,
        ),
        (
            "first fragment of 4 bytes",
            all(vec![ip_length(24), bytes_at(6, &[0x20, 0])]),
            TruncatedTransport,
        ),
        (
            "first fragment with UDP length 7",
            all(vec![bytes_at(6, &[0x20, 0]), bytes_at(24, &[0, 7])]),
            BadUdpLength,
        ),
    ]
}

fn of_tcp_v6() -> Vec<(&'static str, Change, Reason)> {
    const VIP: &[u8] = &[
        0x20, 0x01, 0x0d, 0xb8, 0x01, 0x13, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
    ];
    vec![
        ("version 0", bytes_at(0, &[0x00]), BadIpVersion),
        ("version 4", bytes_at(0, &[0x45]), BadIpVersion),
        ("version 7", bytes_at(0, &[0x7f]), BadIpVersion),
        ("largest payload length", bytes_at(4, &[0xff, 0xff]), BadIpLength),
        (
            "payload length 0 (jumbogram)",
            bytes_at(4, &[0, 0]),
            TruncatedTransport,
        ),
        ("no transport header", ip_length(40), TruncatedTransport),
        ("a TCP header but for a byte", ip_length(59), TruncatedTransport),
        ("unspecified source", bytes_at(8, &[0; 16]), BadSourceAddress),
        (
            "loopback source",
            bytes_at(8, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
            BadSourceAddress,
        ),
        ("multicast source", bytes_at(8, &[0xff, 0x02]), BadSourceAddress),
        (
            "mapped source",
            bytes_at(8, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 198, 51, 100, 7]),
            BadSourceAddress,
        ),
        ("the VIP's own (land)", bytes_at(8, VIP), BadSourceAddress),
        ("data offset 16", bytes_at(52, &[0x40]), BadTcpOffset),
        ("no flags", bytes_at(53, &[0x00]), BadTcpFlags),
        ("SYN, FIN", bytes_at(53, &[0x03]), BadTcpFlags),
        ("source port 0", bytes_at(40, &[0, 0]), ZeroPort),
        ("destination port 0", bytes_at(42, &[0, 0]), ZeroPort),
        (
            "hop-by-hop options beyond the packet",
            extended(0, &[0, 255, 1, 4, 0, 0, 0, 0]),
            BadExtensionHeader,
        ),
        (
            "destination options to the last byte",
            all(vec![ip_length(40), extended(60, &[0, 0, 1, 4, 0, 0, 0, 0])]),
            TruncatedTransport,
        ),
        (
            "an authentication header beyond the packet",
            extended(51, &[0, 255, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]),
            BadExtensionHeader,
        ),
        (
            "half an extension header",
            all(vec![ip_length(44), bytes_at(6, &[0])]),
            BadExtensionHeader,
        ),
        (
            "routing header with a segment left",
            extended(43, &[0, 0, 4, 1, 0, 0, 0, 0]),
            BadExtensionHeader,
        ),
        (
            "source routing of type 0 (RFC 5095)",
            extended(
                43,
                &[
                    0, 2, 0, 1, 0, 0, 0, 0, 0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9,
                ],
            ),
            BadExtensionHeader,
        ),
        (
            "seven extension headers",
            Box::new(|frame, ip| {
                for _ in 0..7 {
                    extended(60, &[0, 0, 1, 4, 0, 0, 0, 0])(frame, ip);
                }
            }),
            BadExtensionHeader,
        ),
        (
            "two fragment headers",
            all(vec![
                extended(44, &[0, 0, 0, 0, 0, 0, 0, 9]),
                extended(44, &[0, 0, 0, 1, 0, 0, 0, 9]),
            ]),
            BadFragment,
        ),
        (
            "fragment over the flags",
            extended(44, &[0, 0, 0, 8, 0, 0, 0, 9]),
            BadFragment,
        ),
        (
            "fragment beyond the largest packet",
            extended(44, &[0, 0, 0xff, 0xf8, 0, 0, 0, 9]),
            BadFragment,
        ),
        (
            "fragment of no packet",
            extended(44, &[0, 0, 0x05, 0xa8, 0, 0, 0, 9]),
            FragmentUnknown,
        ),
        (
            "first fragment of 16 bytes",
            all(vec![ip_length(56), extended(44, &[0, 0, 0, 1, 0, 0, 0, 9])]),
            TruncatedTransport,
        ),
        (
            "first fragment without the options",
            all(vec![
                ip_length(64),
                bytes_at(52, &[0x70]),
                extended(44, &[0, 0, 0, 1, 0, 0, 0, 9]),
            ]),
            BadTcpOffset,
        ),
    ]
}

fn of_udp_v6() -> Vec<(&'static str, Change, Reason)> {
    vec![
        ("no transport header", ip_length(40), TruncatedTransport),
        ("a UDP header but for a byte", ip_length(47), TruncatedTransport),
        ("UDP length 0 (jumbogram)", bytes_at(44, &[0, 0]), BadUdpLength),
        ("UDP length 7", bytes_at(44, &[0, 7]), BadUdpLength),
        ("largest UDP length", bytes_at(44, &[0xff, 0xff]), BadUdpLength),
        ("source port 0", bytes_at(40, &[0, 0]), ZeroPort),
        ("destination port 0", bytes_at(42, &[0, 0]), ZeroPort),
        (
            "fragment of no packet",
            extended(44, &[0, 0, 0, 8, 0, 0, 0, 9]),
            FragmentUnknown,
        ),
        (
            "fragment beyond the largest packet",
            extended(44, &[0, 0, 0xff, 0xf9, 0, 0, 0, 9]),
            BadFragment,
        ),
        (
            "first fragment of 4 bytes",
            all(vec![ip_length(44), extended(44, &[0, 0, 0, 1, 0, 0, 0, 9])]),
            TruncatedTransport,
        ),
    ]
}

/// Echo requests: what is changed of one. Those of another kind pass, which other tests look at.
fn of_icmp() -> Vec<(&'static str, Change, Reason)> {
    vec![
        (
            "no ICMP header",
            Box::new(|frame, ip| ip_length(if frame[ip] >> 4 == 4 { 20 } else { 40 })(frame, ip)),
            TruncatedTransport,
        ),
        (
            "an ICMP header but for a byte",
            Box::new(|frame, ip| ip_length(if frame[ip] >> 4 == 4 { 27 } else { 47 })(frame, ip)),
            TruncatedTransport,
        ),
        (
            "an error without a quote",
            Box::new(|frame, ip| {
                let (at, kind) = if frame[ip] >> 4 == 4 { (20, 3) } else { (40, 1) };
                frame[ip + at] = kind;
                ip_length(at + 8)(frame, ip);
            }),
            TruncatedTransport,
        ),
        (
            "an error that quotes no IP packet",
            Box::new(|frame, ip| {
                let (at, kind) = if frame[ip] >> 4 == 4 { (20, 11) } else { (40, 3) };
                frame[ip + at] = kind;
                ip_length(at + 8 + 60)(frame, ip);
                frame[ip + at + 8..].fill(0);
            }),
            TruncatedTransport,
        ),
        (
            "a source that no host may use",
            Box::new(|frame, ip| {
                let (at, length) = if frame[ip] >> 4 == 4 { (12, 4) } else { (8, 16) };
                frame[ip + at..ip + at + length].fill(0);
            }),
            BadSourceAddress,
        ),
    ]
}

/// Each with no tag, one and two; dropped with its reason for a VIP, and left alone where it is for another address.
#[test]
fn every_header_of_the_table_is_dropped_for_its_reason_and_passes_where_it_is_none_of_ours() {
    let mut fixture = Fixture::of(&EVERY);
    let v6 = "[2001:db8:7::7]:5000";
    let echo = |vip: std::net::IpAddr, source, kind| icmp(source, vip, (kind, 0, 1), b"ping");
    let tables = [
        (web(), of_tcp_v4()),
        (dns(), of_udp_v4()),
        (tcp(v6, WEB6.vip, SYN), of_tcp_v6()),
        (udp(v6, DNS6.vip), of_udp_v6()),
        (echo(WEB.vip.ip(), "198.51.100.7", 8), of_icmp()),
        (echo(WEB6.vip.ip(), "2001:db8:7::7", 128), of_icmp()),
    ];
    let mut entries = 0;
    for (frame, table) in tables {
        for (what, change, reason) in table {
            entries += 1;
            for tags in [
                Tags::default(),
                Tags([vlan(100), 0]),
                Tags([service_vlan(7), vlan(100)]),
            ] {
                let mut tagged = frame.clone();
                tagged.tags = tags;
                let mut bytes = tagged.bytes();
                let ip = IP + tags.count() as usize * 4;
                change(&mut bytes, ip);
                let what = format!("{what}, {} tags, {}", tags.count(), frame.destination);
                fixture.expect(&what, &bytes, Expected::dropped(reason));
                // Another address, and so the source that was the same.
                let ends = if frame.is_v4() {
                    [ip + 19, ip + 15]
                } else {
                    [ip + 39, ip + 23]
                };
                bytes[ends[0]] ^= 0x80;
                if what.contains("own") {
                    bytes[ends[1]] ^= 0x80;
                }
                let what = format!("{what}, not to a VIP");
                fixture.expect(&what, &bytes, Expected::passed(NotForService));
            }
        }
    }
    assert!(entries >= 90, "{entries}");
    assert!(fixture.flows().is_empty());
}

/// Nothing for a balancer, and nothing malformed: the host may know it.
#[test]
fn other_protocols_of_a_vip_pass() {
    let mut fixture = Fixture::of(&[WEB, WEB6]);
    let v6 = tcp("[2001:db8:7::7]:5000", WEB6.vip, SYN);
    for (frame, at, numbers) in [
        (web(), 9, &[0, 2, 4, 41, 47, 50, 51, 58, 89, 132, 255][..]),
        (
            v6.clone(),
            6,
            &[1, 2, 4, 41, 47, 50, 59, 89, 132, 135, 139, 140, 253],
        ),
    ] {
        for number in numbers {
            let bytes = changed(&frame, |bytes| bytes[IP + at] = *number);
            fixture.expect(
                &format!("protocol {number}"),
                &bytes,
                Expected::passed(NotForService),
            );
        }
    }
    let mut bytes = v6.bytes();
    extended(60, &[0, 0, 1, 4, 0, 0, 0, 0])(&mut bytes, IP);
    bytes[IP + 40] = 50;
    fixture.expect("ESP behind options", &bytes, Expected::passed(NotForService));
}
