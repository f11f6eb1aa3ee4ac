//! ICMP: echo to a VIP is answered, and an error reaches the end that it is about, which knows the packet it quotes.

use std::net::SocketAddr;

use lb_common::{
    abi::{
        BackendFlags, Forward,
        Reason::{
            EchoAnswered, ErrorForwarded, ErrorReturned, Local, NextHopMissing, NotForService, TooBig,
            TruncatedTransport, TtlExceeded,
        },
        TCP, Tags,
    },
    logic::icmp::{v4, v6},
};

use crate::{
    fixture::{
        DIRECT, DIRECT_UDP, DIRECT6, DNS, DNS6, EVERY, Expected, Fixture, GUE, GUE_UDP, GUE6, GUE6_UDP,
        LOCAL, LOCAL6, RELAY, RELAY6, SHOP, SHOP6, TUNNEL, TUNNEL_UDP, TUNNEL6, TUNNEL6_UDP, TX, TestService,
        WEB, WEB6,
    },
    frame::{
        DESTINATION_OPTIONS, FRAGMENT, Frame, HOP_BY_HOP, IP, Outer, SYN_ACK, TRANSPORT, Transport, ends,
        icmp, options, packet_of, udp, vlan,
    },
};

const TRANSLATED: [TestService; 8] = [WEB, SHOP, DNS, RELAY, WEB6, SHOP6, DNS6, RELAY6];
const TUNNELS: [TestService; 8] = [
    TUNNEL,
    TUNNEL_UDP,
    TUNNEL6,
    TUNNEL6_UDP,
    GUE,
    GUE_UDP,
    GUE6,
    GUE6_UDP,
];

fn client(service: &TestService) -> &'static str {
    if service.vip.is_ipv4() {
        "198.51.100.7:5000"
    } else {
        "[2001:db8:7::7]:5000"
    }
}

/// A router that quotes a packet.
fn router(service: &TestService) -> &'static str {
    if service.vip.is_ipv4() {
        "192.0.2.254"
    } else {
        "2001:db8:fe::254"
    }
}

/// Too big, port unreachable, time exceeded, a bad parameter: type, code and the word that follows.
fn errors(service: &TestService) -> [(u8, u8, u32); 4] {
    if service.vip.is_ipv4() {
        [
            (v4::UNREACHABLE, v4::FRAGMENTATION_NEEDED, 1400),
            (v4::UNREACHABLE, v4::PORT_UNREACHABLE, 0),
            (v4::TIME_EXCEEDED, 0, 0),
            (v4::PARAMETER_PROBLEM, 0, 0x1400_0000),
        ]
    } else {
        [
            (v6::TOO_BIG, 0, 1400),
            (v6::UNREACHABLE, v6::PORT_UNREACHABLE, 0),
            (v6::TIME_EXCEEDED, 0, 0),
            (v6::PARAMETER_PROBLEM, 0, 40),
        ]
    }
}

/// How much of a packet is quoted: eight bytes after the IP header, up to the checksum of TCP, with it, all.
fn lengths(packet: &[u8]) -> Vec<usize> {
    let headers = if packet[0] >> 4 == 4 {
        usize::from(packet[0] & 15) * 4
    } else {
        40
    };
    [4, 7, 8, 9, 16, 17, 18, 20, 21]
        .into_iter()
        .map(|length| headers + length)
        .filter(|length| *length < packet.len())
        .chain([packet.len() - 1, packet.len()])
        .collect()
}

/// The quote of so many bytes that an end knows, of a packet that was sent on. Half of a checksum cannot be updated.
fn translated(known: &[u8], sent: &[u8], length: usize) -> Vec<u8> {
    let mut quote = known[..length].to_vec();
    let (protocol, headers) = if sent[0] >> 4 == 4 {
        (sent[9], usize::from(sent[0] & 15) * 4)
    } else {
        (sent[6], 40)
    };
    let checksum = headers + if protocol == TCP { 16 } else { 6 };
    if length == checksum + 1 {
        quote[checksum] = sent[checksum];
    }
    quote
}

fn answer_of(service: &TestService, to: SocketAddr) -> Frame {
    let transport = match service.protocol {
        TCP => Transport::Tcp {
            flags: SYN_ACK,
            options: vec![2, 4, 5, 0xb4],
        },
        _ => Transport::Udp { checksum: true },
    };
    Frame::answer(service.backends[0].address, to, transport)
}

#[test]
fn an_echo_request_to_a_vip_is_answered_whatever_its_length() {
    let mut fixture = Fixture::of(&[WEB, WEB6]);
    for (service, kind, reply) in [(WEB, v4::ECHO, v4::ECHO_REPLY), (WEB6, v6::ECHO, v6::ECHO_REPLY)] {
        for (at, length) in [0, 1, 2, 3, 56, 57, 1400, 1465].into_iter().enumerate() {
            let word = 0xabcd_0001 + at as u32;
            let mut request = icmp(
                router(&service),
                service.vip.ip(),
                (kind, 0, word),
                &vec![0xa5; length],
            );
            request.ttl = [255, 64, 1, 2][at % 4];
            request.traffic_class = 0x48;
            request.dont_fragment = at % 2 == 0;
            request.trailer = vec![0; at];
            if service.vip.is_ipv4() {
                request.ip_options = vec![1; at % 4 * 12];
            } else if at % 2 == 1 {
                request.extensions = vec![options(HOP_BY_HOP, 0), options(DESTINATION_OPTIONS, 3)];
            }
            let answer = Frame {
                link: request.back(),
                source: request.destination,
                destination: request.source,
                ttl: 64,
                transport: Transport::Icmp {
                    kind: reply,
                    code: 0,
                    word,
                },
                ..request.clone()
            };
            let expected = Expected::answered(EchoAnswered, answer.bytes());
            fixture.expect(&format!("{length} bytes"), &request.bytes(), expected);
            // What was damaged on its way stays recognisably so.
            let (mut damaged, mut answer) = (request.bytes(), answer.bytes());
            let at = damaged.len() - request.trailer.len() - 1;
            damaged[at] ^= 0x10;
            answer[at] ^= 0x10;
            fixture.expect("damaged", &damaged, Expected::answered(EchoAnswered, answer));
        }
    }
    assert!(fixture.flows().is_empty());
}

#[test]
fn icmp_that_is_neither_echo_to_a_vip_nor_an_error_passes() {
    let mut fixture = Fixture::of(&[WEB, WEB6]);
    for (service, echo, kinds) in [
        (WEB, v4::ECHO, &[0, 4, 5, 9, 10, 13, 14, 17, 42][..]),
        (WEB6, v6::ECHO, &[0, 129, 130, 133, 134, 135, 136, 137, 160]),
    ] {
        for kind in kinds {
            let frame = icmp(router(&service), service.vip.ip(), (*kind, 0, 1), b"body");
            fixture.expect("another type", &frame.bytes(), Expected::passed(NotForService));
        }
        let frame = icmp(router(&service), service.vip.ip(), (echo, 1, 1), b"body");
        fixture.expect("another code", &frame.bytes(), Expected::passed(NotForService));
        let backend = service.backends[0].address.ip();
        let frame = icmp(router(&service), backend, (echo, 0, 1), b"body");
        fixture.expect("not to a VIP", &frame.bytes(), Expected::passed(NotForService));
        let mut frame = icmp(router(&service), service.vip.ip(), (echo, 0, 1), b"");
        for length in 0..8 {
            let mut bytes = frame.bytes();
            let headers = bytes.len() - 8;
            bytes.truncate(headers + length);
            if service.vip.is_ipv4() {
                bytes[IP + 3] = 20 + length as u8;
            } else {
                bytes[IP + 5] = length as u8;
            }
            fixture.expect("cut", &bytes, Expected::dropped(TruncatedTransport));
            bytes.resize(headers + 40, 0);
            fixture.expect("padded", &bytes, Expected::dropped(TruncatedTransport));
        }
        frame.destination = SocketAddr::new(backend, 0);
        let mut bytes = frame.bytes();
        bytes.truncate(bytes.len() - 1);
        let at = if service.vip.is_ipv4() { IP + 3 } else { IP + 5 };
        bytes[at] -= 1;
        fixture.expect("cut, not to a VIP", &bytes, Expected::passed(NotForService));
    }
}

#[test]
fn an_error_about_a_backends_packet_reaches_the_backend_with_the_packet_that_it_sent() {
    let mut fixture = Fixture::of(&EVERY);
    for service in TRANSLATED {
        let mut first = packet_of(service.protocol, client(&service), service.vip);
        let source = ends(&fixture.run(&first.bytes()).1).0;
        let is_full_nat = source.ip() != first.source.ip();
        first.tags = Tags([vlan(5), 0]);
        let backend = &service.backends[0];
        for with_options in [false, true] {
            let mut reply = answer_of(&service, source);
            if with_options && service.vip.is_ipv4() {
                reply.ip_options = vec![1; 8];
            }
            let sent = reply.sent(first.back(), first.destination, first.source);
            // What the backend knows of it: but for the hop, what it sent.
            let known = Frame {
                ttl: sent.ttl,
                ..reply.clone()
            };
            let (sent, known) = (sent.ip_bytes(), known.ip_bytes());
            for error in errors(&service) {
                for length in lengths(&sent) {
                    let mut message = icmp(router(&service), service.vip.ip(), error, &sent[..length]);
                    message.trailer = vec![0; length % 3];
                    message.tags = first.tags;
                    let before = fixture.flow(&first);
                    let mut expected = message.sent(backend.link(), message.source, backend.address);
                    if is_full_nat {
                        // Only from there is a way back.
                        expected.source = SocketAddr::new(backend.source(), 0);
                    }
                    expected.destination.set_port(0);
                    expected.tags = Tags::default();
                    expected.payload = translated(&known, &sent, length);
                    let expected =
                        Expected::error(&service, ErrorForwarded, backend.verdict(), expected.bytes());
                    let what = format!("{error:?}, {length} bytes of {service:?}");
                    fixture.expect(&what, &message.bytes(), expected);
                    assert_eq!(fixture.flow(&first), before, "an error is no packet of the flow");
                }
            }
        }
    }
}

#[test]
fn an_error_about_a_clients_packet_reaches_the_client_with_the_packet_that_it_sent() {
    let mut fixture = Fixture::of(&EVERY);
    for service in TRANSLATED {
        for with_options in [false, true] {
            let mut first = packet_of(service.protocol, client(&service), service.vip);
            first.tags = Tags([vlan(5), 0]);
            if with_options && service.vip.is_ipv4() {
                first.ip_options = vec![1; 8];
            }
            let source = ends_of(&fixture.run(&first.bytes()).1, &service);
            let backend = &service.backends[0];
            let sent = first.sent(backend.link(), source, backend.address);
            let known = Frame {
                ttl: sent.ttl,
                ..first.clone()
            };
            let (sent, known) = (sent.ip_bytes(), known.ip_bytes());
            // A backend is known to the client as the VIP; a router has its own name.
            let backend_ip = backend.address.ip().to_string();
            for (sender, known_as) in [
                (router(&service), router(&service).parse().unwrap()),
                (&*backend_ip, service.vip.ip()),
            ] {
                for error in errors(&service) {
                    for length in lengths(&sent) {
                        let message = icmp(sender, source.ip(), error, &sent[..length]);
                        let mut expected = message.sent(first.back(), message.source, first.source);
                        expected.source = SocketAddr::new(known_as, 0);
                        expected.destination.set_port(0);
                        expected.tags = first.tags;
                        expected.payload = translated(&known, &sent, length);
                        let expected = Expected::error(&service, ErrorReturned, TX, expected.bytes());
                        let what = format!("{error:?}, {length} bytes of {service:?}");
                        fixture.expect(&what, &message.bytes(), expected);
                    }
                }
            }
        }
    }
}

/// The source of a packet that left to a backend.
fn ends_of(output: &[u8], service: &TestService) -> SocketAddr {
    let (source, destination) = ends(output);
    assert_eq!(destination, service.backends[0].address);
    source
}

/// RFC 768: zero means that there is none, and a sum of zero is sent as all ones.
#[test]
fn a_quoted_udp_checksum_stays_one_of_udp() {
    let mut fixture = Fixture::of(&[DNS, RELAY, DNS6]);
    for service in [DNS, RELAY, DNS6] {
        let mut query = udp(client(&service), service.vip);
        query.payload = vec![0, 0, 1];
        let source = ends(&fixture.run(&query.bytes()).1).0;
        let backend = &service.backends[0];
        for checksum in [false, true] {
            query.transport = Transport::Udp { checksum };
            if checksum {
                // The payload whose checksum is zero, sent as all ones.
                query.payload[..2].fill(0);
                let bytes = query.ip_bytes();
                let at = bytes.len() - 3 - 2;
                query.payload[..2].copy_from_slice(&bytes[at..at + 2]);
                let bytes = query.ip_bytes();
                assert_eq!(bytes[at..at + 2], [0xff, 0xff]);
            }
            let sent = query.sent(backend.link(), source, backend.address);
            let known = Frame {
                ttl: sent.ttl,
                ..query.clone()
            };
            let message = icmp(
                router(&service),
                source.ip(),
                errors(&service)[0],
                &sent.ip_bytes(),
            );
            let mut expected = message.sent(query.back(), message.source, query.source);
            expected.destination.set_port(0);
            expected.payload = known.ip_bytes();
            let expected = Expected::error(&service, ErrorReturned, TX, expected.bytes());
            fixture.expect(&format!("checksum {checksum}"), &message.bytes(), expected);
        }
    }
}

/// A datagram that its sender has split is quoted with its fragment header (RFC 8200 section 4.5).
#[test]
fn an_error_about_a_first_fragment_of_ipv6_is_translated_and_one_about_a_later_passes() {
    let mut fixture = Fixture::of(&[DNS6]);
    let mut query = udp(client(&DNS6), DNS6.vip);
    fixture.run(&query.bytes());
    query.payload = vec![0xa5; 3000];
    let backend = &DNS6.backends[0];
    let sent = query.sent(backend.link(), query.source, backend.address);
    let known = Frame {
        ttl: sent.ttl,
        ..query.clone()
    };
    let offsets = [0, 1440];
    let (sent, known) = (sent.fragments(&offsets), known.fragments(&offsets));
    for length in [40 + 8 + 8, 500, 1232] {
        let error = errors(&DNS6)[0];
        let message = icmp(router(&DNS6), query.source.ip(), error, &sent[0][IP..IP + length]);
        let mut expected = message.sent(query.back(), message.source, query.source);
        expected.destination.set_port(0);
        expected.payload = known[0][IP..IP + length].to_vec();
        let expected = Expected::error(&DNS6, ErrorReturned, TX, expected.bytes());
        fixture.expect("first", &message.bytes(), expected);
        let message = icmp(router(&DNS6), query.source.ip(), error, &sent[1][IP..IP + length]);
        fixture.expect("later", &message.bytes(), Expected::passed(NotForService));
    }
}

#[test]
fn an_error_to_a_vip_is_sent_on_as_it_is_to_the_backend_of_a_one_way_flow() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [DIRECT, DIRECT_UDP, DIRECT6].into_iter().chain(TUNNELS) {
        let first = packet_of(service.protocol, client(&service), service.vip);
        let (_, output) = fixture.run(&first.bytes());
        // The backend has answered the client directly, from the VIP.
        let mut reply = answer_of(&service, first.source);
        reply.source = service.vip;
        for error in errors(&service) {
            for length in lengths(&reply.ip_bytes()) {
                let mut message = icmp(
                    router(&service),
                    service.vip.ip(),
                    error,
                    &reply.ip_bytes()[..length],
                );
                message.traffic_class = 0xc0;
                let backend = &service.backends[0];
                let expected = if service.backends[1].address.is_ipv4() == service.vip.is_ipv4()
                    && ![TUNNEL6.id, TUNNEL6_UDP.id, GUE6.id, GUE6_UDP.id].contains(&service.id)
                {
                    message
                        .sent(backend.link(), message.source, message.destination)
                        .bytes()
                } else {
                    // In the queue of its flow.
                    let outer = Outer::of(&output);
                    let is_gue = [GUE.id, GUE_UDP.id, GUE6.id, GUE6_UDP.id].contains(&service.id);
                    message.encapsulated(&Outer {
                        source_port: outer.source_port.filter(|_| is_gue),
                        ..outer
                    })
                };
                let expected = Expected::error(&service, ErrorForwarded, backend.verdict(), expected);
                let what = format!("{error:?}, {length} bytes of {service:?}");
                fixture.expect(&what, &message.bytes(), expected);
            }
        }
        if TUNNELS.iter().any(|tunnel| tunnel.id == service.id) {
            let message = icmp(
                router(&service),
                service.vip.ip(),
                errors(&service)[0],
                &[&reply.ip_bytes()[..], &[0; 1450]].concat(),
            );
            // There is no error about an error (RFC 1122 section 3.2.2).
            let expected = Expected::dropped(TooBig).of(&service);
            fixture.expect("does not fit", &message.bytes(), expected);
        }
    }
}

#[test]
fn an_error_about_a_packet_of_a_process_on_this_host_passes() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [LOCAL, LOCAL6] {
        let first = packet_of(service.protocol, client(&service), service.vip);
        let mut reply = answer_of(&service, first.source);
        reply.source = service.vip;
        let mut message = icmp(
            router(&service),
            service.vip.ip(),
            errors(&service)[0],
            &reply.ip_bytes(),
        );
        message.ttl = 1;
        fixture.expect("of no flow", &message.bytes(), Expected::passed(NotForService));
        // The program that delivers records the flow; this one does so only where it takes the service for another.
        fixture.change_settings(|settings| settings.flags = 0);
        fixture.run(&first.bytes());
        fixture.change_settings(|_| ());
        assert_eq!(fixture.flow(&first).unwrap().forward, Forward::Local.number());
        fixture.expect("of a flow", &message.bytes(), Expected::passed(Local));
    }
}

#[test]
fn an_error_that_cannot_be_sent_on_is_dropped() {
    let mut fixture = Fixture::of(&EVERY);
    for service in TRANSLATED.into_iter().chain([DIRECT]).chain(TUNNELS) {
        let first = packet_of(service.protocol, client(&service), service.vip);
        let (_, output) = fixture.run(&first.bytes());
        let mut reply = answer_of(&service, first.source);
        reply.source = service.vip;
        let quote = reply.ip_bytes();
        let mut message = icmp(router(&service), service.vip.ip(), errors(&service)[0], &quote);
        message.ttl = 1;
        let expected = Expected::dropped(TtlExceeded).of(&service);
        fixture.expect("time to live of 1", &message.bytes(), expected);
        message.ttl = 2;
        fixture.change_backend(&service, 0, |backend| {
            backend.flags &= !BackendFlags::NEXT_HOP_KNOWN;
        });
        let expected = Expected::dropped(NextHopMissing).of(&service);
        fixture.expect("no next hop", &message.bytes(), expected);
        if TRANSLATED.iter().any(|translated| translated.id == service.id) {
            let source = ends(&output).0;
            let sent = first.sent(service.backends[0].link(), source, service.backends[0].address);
            let mut message = icmp(
                router(&service),
                source.ip(),
                errors(&service)[0],
                &sent.ip_bytes(),
            );
            message.ttl = 1;
            let expected = Expected::dropped(TtlExceeded).of(&service);
            fixture.expect("to the client", &message.bytes(), expected);
        }
    }
}

#[test]
fn errors_about_no_flow_pass() {
    let mut fixture = Fixture::of(&EVERY);
    for service in TRANSLATED.into_iter().chain([DIRECT, DIRECT6]).chain(TUNNELS) {
        let first = packet_of(service.protocol, client(&service), service.vip);
        let (_, output) = fixture.run(&first.bytes());
        let mut reply = answer_of(&service, first.source);
        reply.source = service.vip;
        reply.destination.set_port(5001);
        let error = errors(&service)[0];
        let quote = reply.ip_bytes();
        let to_vip = icmp(router(&service), service.vip.ip(), error, &quote);
        fixture.expect("another port", &to_vip.bytes(), Expected::passed(NotForService));
        reply.destination.set_port(5000);
        // Whatever is quoted of an echo reply.
        let ping = icmp(
            &service.vip.ip().to_string(),
            first.source.ip(),
            (0, 0, 1),
            b"ping",
        );
        for about in [
            ping.ip_bytes(),
            ping.ip_bytes()[..28.min(ping.ip_bytes().len())].to_vec(),
        ] {
            let message = icmp(router(&service), service.vip.ip(), error, &about);
            if service.vip.is_ipv4() || about.len() >= 40 {
                fixture.expect("a ping", &message.bytes(), Expected::passed(NotForService));
            }
        }
        if TRANSLATED.iter().any(|translated| translated.id == service.id) {
            let (source, backend) = ends(&output);
            let mut sent = first.sent(service.backends[0].link(), source, backend);
            sent.source.set_port(source.port() ^ 1);
            let message = icmp(router(&service), source.ip(), error, &sent.ip_bytes());
            fixture.expect("to a client", &message.bytes(), Expected::passed(NotForService));
            // Another server on the same port.
            sent.source = source;
            sent.destination = service.backends[1].address;
            let message = icmp(router(&service), source.ip(), error, &sent.ip_bytes());
            fixture.expect(
                "another server",
                &message.bytes(),
                Expected::passed(NotForService),
            );
        }
    }
}

#[test]
fn a_malformed_quote_is_dropped_if_it_is_for_a_vip() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [WEB, SHOP, DNS, WEB6, DNS6, DIRECT, TUNNEL6] {
        let first = packet_of(service.protocol, client(&service), service.vip);
        fixture.run(&first.bytes());
        let mut reply = answer_of(&service, first.source);
        reply.source = service.vip;
        let quote = reply.ip_bytes();
        let is_v4 = service.vip.is_ipv4();
        let headers = if is_v4 { 20 } else { 40 };
        let changed = |changes: &[(usize, u8)]| {
            let mut quote = quote.clone();
            for (at, value) in changes {
                quote[*at] = *value;
            }
            quote
        };
        let mut malformed = vec![
            ("no quote", vec![]),
            ("one byte", quote[..1].to_vec()),
            ("the IP header but a byte", quote[..headers - 1].to_vec()),
            ("no ports", quote[..headers].to_vec()),
            ("one port and a half", quote[..headers + 3].to_vec()),
            (
                "the version of the other family",
                changed(&[(0, if is_v4 { 0x65 } else { 0x40 })]),
            ),
            ("version 0", changed(&[(0, 0x05)])),
        ];
        if is_v4 {
            malformed.push(("a header of 16 bytes", changed(&[(0, 0x44)])));
            malformed.push(("options beyond the message", {
                let mut quote = quote[..24].to_vec();
                quote[0] = 0x4f;
                quote
            }));
        } else {
            malformed.push(("a fragment header that is cut", {
                let mut quote = quote[..44].to_vec();
                quote[6] = FRAGMENT;
                quote
            }));
        }
        for (what, quote) in malformed {
            let mut message = icmp(router(&service), service.vip.ip(), errors(&service)[0], &quote);
            fixture.expect(what, &message.bytes(), Expected::dropped(TruncatedTransport));
            // What follows the message in the frame is none of it.
            message.trailer = reply.ip_bytes();
            fixture.expect(what, &message.bytes(), Expected::dropped(TruncatedTransport));
            message.destination = SocketAddr::new(first.source.ip(), 0);
            let what = format!("{what}, not to a VIP");
            fixture.expect(&what, &message.bytes(), Expected::passed(NotForService));
        }
        let mut others = vec![("another protocol", changed(&[(if is_v4 { 9 } else { 6 }, 47)]))];
        if is_v4 {
            others.push(("a later fragment", changed(&[(7, 1)])));
        } else {
            others.push(("an extension header", changed(&[(6, HOP_BY_HOP)])));
        }
        for (what, quote) in others {
            let message = icmp(router(&service), service.vip.ip(), errors(&service)[0], &quote);
            fixture.expect(what, &message.bytes(), Expected::passed(NotForService));
        }
    }
    assert_eq!(TRANSPORT, IP + 20);
}
