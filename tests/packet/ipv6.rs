//! IPv6: `nat` and `full-nat` both ways, extension headers, the hop limit, and addresses that stand for IPv4.

use std::net::SocketAddr;

use lb_common::{
    abi::{
        Address, ROLE_VIP,
        Reason::{self, BadExtensionHeader, BadSourceAddress, NoFlow, NotForService, TtlExceeded},
        ServiceKey, SettingsFlags, TCP, UDP,
    },
    logic::source_port::{candidate, first_choice},
};
use xlb::datapath::Operation;

use crate::{
    fixture::{DNS6, EVERY, Expected, Fixture, RELAY6, SETTINGS, SHOP6, SOURCE6, TX, TestService, WEB, WEB6},
    frame::{
        ACK, AUTHENTICATION, DESTINATION_OPTIONS, FIN_ACK, FRAGMENT, Frame, HOP_BY_HOP, IP, PSH, ROUTING,
        SYN, SYN_ACK, TRANSPORT_V6, Transport, address, ends, options, packet_of, tcp, udp,
    },
};

const CLIENT: &str = "[2001:db8:7::7]:5000";
const TRANSLATED: [TestService; 4] = [WEB6, SHOP6, DNS6, RELAY6];

fn of(service: &TestService, flags: u8) -> Frame {
    match service.protocol {
        TCP => tcp(CLIENT, service.vip, flags),
        _ => udp(CLIENT, service.vip),
    }
}

/// The source that a backend sees.
fn source(service: &TestService, frame: &Frame) -> SocketAddr {
    if [SHOP6.id, RELAY6.id].contains(&service.id) {
        let port = candidate(&SETTINGS, first_choice(&SETTINGS, &frame.key()), 0);
        SocketAddr::new(SOURCE6, port)
    } else {
        frame.source
    }
}

fn answer(service: &TestService, which: usize, to: SocketAddr, flags: u8) -> Frame {
    let transport = match service.protocol {
        TCP => Transport::Tcp {
            flags,
            options: vec![],
        },
        _ => Transport::Udp { checksum: true },
    };
    Frame::answer(service.backends[which].address, to, transport)
}

#[test]
fn a_flow_goes_to_its_backend_and_back() {
    let mut fixture = Fixture::of(&EVERY);
    for service in TRANSLATED {
        for which in [0, 1] {
            fixture.all_slots(&service, service.backends[which].id);
            let mut first = of(&service, SYN);
            first.source.set_port(5000 + which as u16);
            let source = source(&service, &first);
            let expected = Expected::to_backend(&service, which, &first, source);
            fixture.expect("first", &first.bytes(), expected.new_flow());
            let reply = answer(&service, which, source, SYN_ACK);
            let expected = Expected::to_client(&service, which, &reply, &first);
            fixture.expect("reply", &reply.bytes(), expected);
            for payload in [0, 1, 2, 1440] {
                let mut data = of(&service, ACK | PSH);
                data.source = first.source;
                data.payload = vec![0xa5; payload];
                data.trailer = vec![0; payload % 5];
                data.traffic_class = 0xb9;
                let expected = Expected::to_backend(&service, which, &data, source);
                fixture.expect("data", &data.bytes(), expected);
                let mut data = answer(&service, which, source, ACK);
                data.payload = vec![0x5a; payload];
                data.flow_label = 0xf_ffff;
                let expected = Expected::to_client(&service, which, &data, &first);
                fixture.expect("data of the backend", &data.bytes(), expected);
            }
            let fin = of(&service, FIN_ACK);
            let fin = Frame {
                source: first.source,
                ..fin
            };
            let expected = Expected::to_backend(&service, which, &fin, source);
            fixture.expect("FIN", &fin.bytes(), expected);
        }
    }
}

/// RFC 8200 section 8.1: a checksum that comes out as zero is sent as all ones, and one that is missing stays so.
#[test]
fn udp_checksums_are_those_of_udp() {
    let mut fixture = Fixture::of(&[DNS6]);
    let mut query = of(&DNS6, 0);
    query.payload = vec![0, 0];
    // The payload whose checksum is zero after the translation.
    let sent = query.sent(query.link, query.source, DNS6.backends[0].address);
    let bytes = sent.bytes();
    query.payload = bytes[TRANSPORT_V6 + 6..TRANSPORT_V6 + 8].to_vec();
    let expected = Expected::to_backend(&DNS6, 0, &query, query.source).new_flow();
    fixture.expect("all ones", &query.bytes(), expected);
    let output = fixture.run(&query.bytes()).1;
    assert_eq!(output[TRANSPORT_V6 + 6..TRANSPORT_V6 + 8], [0xff, 0xff]);

    query.transport = Transport::Udp { checksum: false };
    let expected = Expected::to_backend(&DNS6, 0, &query, query.source);
    fixture.expect("none", &query.bytes(), expected);
}

/// A routing header whose destination is the last one.
fn routing() -> (u8, Vec<u8>) {
    (ROUTING, vec![0, 4, 0, 0, 0, 0, 0])
}

/// An authentication header (RFC 4302) of so many words.
fn authentication(words: u8) -> (u8, Vec<u8>) {
    let mut rest = vec![0xab; usize::from(words) * 4 - 1];
    rest[0] = words - 2;
    (AUTHENTICATION, rest)
}

/// A fragment header of a whole packet (RFC 6946).
fn atomic() -> (u8, Vec<u8>) {
    (FRAGMENT, vec![0, 0, 0, 1, 2, 3, 4])
}

#[test]
fn extension_headers_are_walked_and_kept_both_ways() {
    let mut fixture = Fixture::of(&[WEB6, DNS6]);
    let chains = [
        vec![options(HOP_BY_HOP, 0)],
        vec![options(HOP_BY_HOP, 1)],
        vec![options(DESTINATION_OPTIONS, 7)],
        vec![routing()],
        vec![authentication(3)],
        vec![authentication(6)],
        vec![atomic()],
        vec![options(HOP_BY_HOP, 255)],
        vec![atomic(), atomic()],
        vec![
            options(HOP_BY_HOP, 0),
            options(DESTINATION_OPTIONS, 2),
            routing(),
            atomic(),
            authentication(5),
            options(DESTINATION_OPTIONS, 0),
        ],
        vec![options(DESTINATION_OPTIONS, 40); 6],
    ];
    for (number, extensions) in chains.into_iter().enumerate() {
        for service in [WEB6, DNS6] {
            let mut frame = of(&service, SYN);
            frame.source.set_port(6000 + number as u16);
            frame.extensions = extensions.clone();
            let what = format!("chain {number}");
            let expected = Expected::to_backend(&service, 0, &frame, frame.source).new_flow();
            fixture.expect(&what, &frame.bytes(), expected);
            let mut reply = answer(&service, 0, frame.source, SYN_ACK);
            reply.extensions = extensions.clone();
            let expected = Expected::to_client(&service, 0, &reply, &frame);
            fixture.expect(&what, &reply.bytes(), expected);
        }
    }
}

/// Dropped with the reason where the destination is a VIP; left alone where it is not.
fn expect_malformed(fixture: &mut Fixture, what: &str, bytes: &[u8], reason: Reason) {
    fixture.expect(what, bytes, Expected::dropped(reason));
    let mut elsewhere = bytes.to_vec();
    elsewhere[IP + 39] ^= 0x80;
    let what = format!("{what}, not to a VIP");
    fixture.expect(&what, &elsewhere, Expected::passed(NotForService));
}

#[test]
fn extension_headers_that_are_too_many_too_long_or_lead_elsewhere_are_dropped() {
    let mut fixture = Fixture::of(&[WEB6]);
    let with = |extensions: Vec<(u8, Vec<u8>)>| {
        let mut frame = of(&WEB6, SYN);
        frame.extensions = extensions;
        frame
    };
    let seven = with(vec![options(DESTINATION_OPTIONS, 0); 7]).bytes();
    expect_malformed(&mut fixture, "seven", &seven, BadExtensionHeader);
    let mut segments_left = routing();
    segments_left.1[2] = 1;
    let elsewhere = with(vec![segments_left]).bytes();
    expect_malformed(&mut fixture, "one segment left", &elsewhere, BadExtensionHeader);
    for (what, extension) in [
        ("options", options(DESTINATION_OPTIONS, 1)),
        ("routing", routing()),
        ("authentication", authentication(4)),
    ] {
        let mut bytes = with(vec![extension]).bytes();
        bytes[TRANSPORT_V6 + 1] = 255;
        let what = format!("{what} beyond the packet");
        expect_malformed(&mut fixture, &what, &bytes, BadExtensionHeader);
        // The frame is long enough, the packet is not.
        bytes.resize(bytes.len() + 2048, 0);
        expect_malformed(&mut fixture, &what, &bytes, BadExtensionHeader);
    }
    let mut nothing_follows = of(&WEB6, SYN).bytes();
    nothing_follows.truncate(TRANSPORT_V6);
    nothing_follows[IP + 4..IP + 6].fill(0);
    nothing_follows[IP + 6] = HOP_BY_HOP;
    expect_malformed(
        &mut fixture,
        "announced but not there",
        &nothing_follows,
        BadExtensionHeader,
    );
}

#[test]
fn a_hop_limit_that_is_used_up_is_dropped_and_counted_for_the_service() {
    let mut fixture = Fixture::of(&[WEB6, DNS6]);
    for service in [WEB6, DNS6] {
        let mut frame = of(&service, SYN);
        for ttl in [0, 1] {
            frame.ttl = ttl;
            let expected = Expected::dropped(TtlExceeded).of(&service);
            fixture.expect(&format!("hop limit of {ttl}"), &frame.bytes(), expected);
        }
        assert!(fixture.flow(&frame).is_none());
        frame.ttl = 2;
        let expected = Expected::to_backend(&service, 0, &frame, frame.source).new_flow();
        fixture.expect("hop limit of 2", &frame.bytes(), expected);
        let mut reply = answer(&service, 0, frame.source, SYN_ACK);
        reply.ttl = 1;
        let expected = Expected::dropped(TtlExceeded).of(&service);
        fixture.expect("reply", &reply.bytes(), expected);
    }
}

/// RFC 4291 section 2.5.5.2: they stand for IPv4 addresses in the maps, and have no place on the wire.
#[test]
fn addresses_that_stand_for_ipv4_ones_are_refused() {
    let mut fixture = Fixture::of(&[WEB, WEB6]);
    let port = WEB.vip.port();
    let vip = match WEB.vip.ip() {
        std::net::IpAddr::V4(vip) => SocketAddr::new(vip.to_ipv6_mapped().into(), port),
        std::net::IpAddr::V6(_) => unreachable!("an IPv4 VIP"),
    };
    let to_mapped = tcp(CLIENT, vip, SYN);
    fixture.expect("to a VIP", &to_mapped.bytes(), Expected::passed(NotForService));
    let from_mapped = tcp("[::ffff:198.51.100.7]:5000", WEB6.vip, SYN);
    expect_malformed(
        &mut fixture,
        "from a client",
        &from_mapped.bytes(),
        BadSourceAddress,
    );
    // A backend's reply that pretends: its IPv4 flow is not touched.
    let syn = tcp("198.51.100.7:5000", WEB.vip, SYN);
    fixture.run(&syn.bytes());
    let reply = Frame::answer(
        address(&format!("[::ffff:10.0.0.11]:{}", WEB.backends[0].address.port())),
        address("[::ffff:198.51.100.7]:5000"),
        Transport::Tcp {
            flags: SYN_ACK,
            options: vec![],
        },
    );
    fixture.expect("a reply", &reply.bytes(), Expected::passed(NotForService));
}

#[test]
fn a_source_address_that_no_host_may_use_is_dropped() {
    let mut fixture = Fixture::of(&[WEB6]);
    for source in ["::", "::1", "ff02::1", "ff0e::1", "2001:db8:113::10"] {
        let mut frame = of(&WEB6, SYN);
        frame.source = address(&format!("[{source}]:5000"));
        let mut bytes = frame.bytes();
        fixture.expect(source, &bytes, Expected::dropped(BadSourceAddress));
        // Nor with a protocol that is not looked into.
        bytes[IP + 6] = 132;
        fixture.expect(source, &bytes, Expected::dropped(BadSourceAddress));
    }
    for source in ["::2", "fe80::1", "fd00::9", "64:ff9b::1"] {
        let mut frame = of(&WEB6, SYN);
        frame.source = address(&format!("[{source}]:5000"));
        let expected = Expected::to_backend(&WEB6, 0, &frame, frame.source).new_flow();
        fixture.expect(source, &frame.bytes(), expected);
    }
}

#[test]
fn a_late_reply_of_the_backend_that_a_flow_has_left_is_dropped() {
    let mut fixture = Fixture::of(&TRANSLATED);
    for service in TRANSLATED {
        let first = of(&service, SYN);
        let (_, output) = fixture.run(&first.bytes());
        let late = answer(&service, 0, ends(&output).0, SYN_ACK);
        fixture.all_slots(&service, service.backends[1].id);
        fixture.change_backend(&service, 0, |backend| backend.flags = 0);
        let (_, output) = fixture.run(&first.bytes());
        fixture.expect("late reply", &late.bytes(), Expected::dropped(NoFlow));
        let reply = answer(&service, 1, ends(&output).0, SYN_ACK);
        let expected = Expected::to_client(&service, 1, &reply, &first);
        fixture.expect("reply of the new backend", &reply.bytes(), expected);
    }
}

/// A service of port 0 takes all ports of its VIP that no other service has; backends without a port keep them.
#[test]
fn a_service_of_any_port_takes_every_port_of_both_families_and_keeps_or_rewrites_it() {
    let mut fixture = Fixture::of(&EVERY);
    let vips = ["203.0.113.20", "2001:db8:113::20"];
    let clients = ["198.51.100.7:5000", CLIENT];
    for (service, (vip, client)) in [WEB, WEB6].iter().zip(vips.iter().zip(clients)) {
        let vip = SocketAddr::new(vip.parse().unwrap(), 0);
        for protocol in [TCP, UDP] {
            let key = ServiceKey {
                vip: Address::from(vip.ip()),
                port: 0,
                protocol,
                _pad: 0,
            };
            fixture.apply(Operation::PutServiceKey(key, service.id));
        }
        fixture.apply(Operation::PutAddress(Address::from(vip.ip()), ROLE_VIP));
        fixture.change_service(service, |entry| entry.vip = Address::from(vip.ip()));
        let syn = |port: u16| tcp(client, SocketAddr::new(vip.ip(), port), SYN);
        fixture.change_settings(|_| ());
        let frame = syn(1);
        let passed = Expected::passed(NotForService);
        fixture.expect("while there is no such service", &frame.bytes(), passed);
        fixture.change_settings(|settings| settings.flags |= SettingsFlags::ANY_PORT);
        for kept in [true, false] {
            fixture.change_backend(service, 0, |backend| {
                if kept {
                    backend.port = 0;
                }
            });
            for (at, port) in [1, 80, 8080, 65535].into_iter().enumerate() {
                for protocol in [TCP, UDP] {
                    let mut frame = packet_of(protocol, client, SocketAddr::new(vip.ip(), port));
                    frame.source.set_port(7000 + u16::from(kept) * 100 + at as u16);
                    let to = service.backends[0].address;
                    let to = SocketAddr::new(to.ip(), if kept { port } else { to.port() });
                    let output = frame.sent(service.backends[0].link(), frame.source, to).bytes();
                    let expected = Expected::forwarded(service, 0, output).new_flow();
                    fixture.expect("to any port", &frame.bytes(), expected);
                    let reply = Frame::answer(to, frame.source, frame.transport.clone());
                    let expected = Expected::to_client(service, 0, &reply, &frame);
                    fixture.expect("reply", &reply.bytes(), expected);
                }
            }
        }
        fixture.change_backend(service, 0, |_| ());
    }
    // The key of a port comes before that of all.
    let vip = SocketAddr::new(vips[0].parse().unwrap(), 443);
    let key = ServiceKey {
        vip: Address::from(vip.ip()),
        port: vip.port().to_be(),
        protocol: TCP,
        _pad: 0,
    };
    fixture.apply(Operation::PutServiceKey(key, crate::fixture::MIRROR.id));
    let syn = tcp("198.51.100.7:5001", vip, SYN);
    let expected = Expected::to_backend(&crate::fixture::MIRROR, 0, &syn, syn.source).new_flow();
    fixture.expect("the port of another service", &syn.bytes(), expected);
}

#[test]
fn families_have_flows_of_their_own() {
    let mut fixture = Fixture::of(&[WEB, WEB6]);
    for (service, client) in [(WEB, "198.51.100.7:5000"), (WEB6, CLIENT)] {
        assert_eq!(fixture.run(&tcp(client, service.vip, SYN).bytes()).0, TX);
    }
    assert_eq!(fixture.flows().len(), 2);
}
