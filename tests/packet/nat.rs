//! `nat`: the client's address is kept, the destination is the backend's.

use std::net::SocketAddr;

use lb_common::abi::Reason::{NotForService, TtlExceeded};

use crate::{
    fixture::{DNS, EVERY, Expected, Fixture, MIRROR, OTHER_INTERFACE, REDIRECT, WEB, WEB6},
    frame::{ACK, Frame, IP, PSH, SYN, SYN_ACK, TRANSPORT, Transport, address, ends, tcp, udp},
};

const CLIENT: &str = "198.51.100.7:5000";

fn answer(which: usize, client: SocketAddr, flags: u8) -> Frame {
    let transport = Transport::Tcp {
        flags,
        options: vec![],
    };
    Frame::answer(WEB.backends[which].address, client, transport)
}

#[test]
fn a_connection_goes_to_its_backend_and_back() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, WEB.vip, SYN);
    let to_backend = Expected::to_backend(&WEB, 0, &syn, syn.source);
    fixture.expect("SYN", &syn.bytes(), to_backend.new_flow());
    let syn_ack = answer(0, syn.source, SYN_ACK);
    fixture.expect(
        "SYN, ACK",
        &syn_ack.bytes(),
        Expected::to_client(&WEB, 0, &syn_ack, &syn),
    );
    for payload in [0, 1, 2, 1460] {
        let mut data = tcp(CLIENT, WEB.vip, ACK | PSH);
        data.payload = vec![0xa5; payload];
        fixture.expect(
            "data",
            &data.bytes(),
            Expected::to_backend(&WEB, 0, &data, data.source),
        );
        let mut data = answer(0, syn.source, ACK | PSH);
        data.payload = vec![0x5a; payload];
        fixture.expect(
            "data of the backend",
            &data.bytes(),
            Expected::to_client(&WEB, 0, &data, &syn),
        );
    }
}

/// The second half of a flow's record has the address, which looks like the key of a flow that has the port.
#[test]
fn a_flow_over_ipv6_from_a_port_that_its_address_begins_with_is_recorded_once() {
    let mut fixture = Fixture::of(&EVERY);
    let client = "[2001:db8:7::7]:8193"; // 0x2001
    let syn = tcp(client, WEB6.vip, SYN);
    let to_backend = Expected::to_backend(&WEB6, 0, &syn, syn.source);
    fixture.expect("SYN", &syn.bytes(), to_backend.new_flow());
    assert_eq!(fixture.flows().len(), 1);
    assert_eq!(fixture.live(WEB6.backends[0].id), 1);
    let transport = Transport::Tcp {
        flags: SYN_ACK,
        options: vec![],
    };
    let reply = Frame::answer(WEB6.backends[0].address, syn.source, transport);
    fixture.expect(
        "SYN, ACK",
        &reply.bytes(),
        Expected::to_client(&WEB6, 0, &reply, &syn),
    );
}

#[test]
fn a_backend_on_another_interface_is_reached_by_redirect() {
    let mut fixture = Fixture::new();
    fixture.all_slots(&WEB, WEB.backends[1].id);
    let syn = tcp(CLIENT, WEB.vip, SYN);
    assert_eq!(WEB.backends[1].ifindex, OTHER_INTERFACE);
    let expected = Expected::to_backend(&WEB, 1, &syn, syn.source);
    assert_eq!(fixture.run(&syn.bytes()).0, REDIRECT);
    fixture.expect("SYN once more", &syn.bytes(), expected);
    let syn_ack = answer(1, syn.source, SYN_ACK);
    fixture.expect(
        "SYN, ACK",
        &syn_ack.bytes(),
        Expected::to_client(&WEB, 1, &syn_ack, &syn),
    );
}

#[test]
fn udp_goes_to_its_backend_and_back() {
    let mut fixture = Fixture::new();
    let query = udp(CLIENT, DNS.vip);
    let expected = Expected::to_backend(&DNS, 0, &query, query.source);
    fixture.expect("query", &query.bytes(), expected.new_flow());
    let reply = Frame::answer(
        DNS.backends[0].address,
        query.source,
        Transport::Udp { checksum: true },
    );
    fixture.expect(
        "reply",
        &reply.bytes(),
        Expected::to_client(&DNS, 0, &reply, &query),
    );
    fixture.expect(
        "query once more",
        &query.bytes(),
        Expected::to_backend(&DNS, 0, &query, query.source),
    );
}

#[test]
fn a_backend_without_a_port_is_reached_on_the_one_that_the_client_used() {
    let mut fixture = Fixture::new();
    for service in [WEB, DNS] {
        fixture.change_backend(&service, 0, |backend| backend.port = 0);
    }
    let kept = |which: SocketAddr, port| SocketAddr::new(which.ip(), port);
    let syn = tcp(CLIENT, WEB.vip, SYN);
    let backend = kept(WEB.backends[0].address, WEB.vip.port());
    let output = syn.sent(WEB.backends[0].link(), syn.source, backend).bytes();
    let expected = Expected::to_backend(&WEB, 0, &syn, syn.source).new_flow();
    fixture.expect("SYN", &syn.bytes(), expected.with_output(output));
    let mut syn_ack = answer(0, syn.source, SYN_ACK);
    syn_ack.source = backend;
    fixture.expect(
        "SYN, ACK",
        &syn_ack.bytes(),
        Expected::to_client(&WEB, 0, &syn_ack, &syn),
    );
}

#[test]
fn ip_options_and_tcp_options_are_kept_both_ways() {
    let mut fixture = Fixture::new();
    let options = vec![2, 4, 0x05, 0xb4, 4, 2, 1, 3, 3, 7, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0];
    for words in [1, 5, 10] {
        let mut syn = tcp(CLIENT, WEB.vip, SYN);
        syn.source.set_port(5000 + words);
        syn.transport = Transport::Tcp {
            flags: SYN,
            options: options.clone(),
        };
        syn.ip_options = vec![1; usize::from(words) * 4];
        let expected = Expected::to_backend(&WEB, 0, &syn, syn.source).new_flow();
        fixture.expect("SYN with options", &syn.bytes(), expected);
        let mut reply = answer(0, syn.source, SYN_ACK);
        reply.ip_options = vec![1; usize::from(words) * 4];
        reply.transport = Transport::Tcp {
            flags: SYN_ACK,
            options: options.clone(),
        };
        fixture.expect(
            "reply with options",
            &reply.bytes(),
            Expected::to_client(&WEB, 0, &reply, &syn),
        );
    }
}

#[test]
fn what_follows_the_ip_packet_in_the_frame_is_kept() {
    let mut fixture = Fixture::new();
    let mut ack = tcp(CLIENT, WEB.vip, ACK);
    ack.payload = vec![];
    ack.trailer = vec![0xee; 6];
    assert_eq!(ack.bytes().len(), 60);
    let expected = Expected::to_backend(&WEB, 0, &ack, ack.source).new_flow();
    fixture.expect("padded to the least of Ethernet", &ack.bytes(), expected);
    let mut reply = answer(0, ack.source, ACK);
    reply.trailer = vec![0xdd; 31];
    fixture.expect(
        "padded reply",
        &reply.bytes(),
        Expected::to_client(&WEB, 0, &reply, &ack),
    );
}

/// The checksum is updated by what changes, so a packet that was damaged on its way stays recognisably so.
#[test]
fn a_damaged_packet_does_not_get_a_valid_checksum() {
    let mut fixture = Fixture::new();
    let ack = tcp(CLIENT, WEB.vip, ACK);
    let mut damaged = ack.bytes();
    damaged[TRANSPORT + 25] ^= 0x10;
    let mut output = ack
        .sent(WEB.backends[0].link(), ack.source, WEB.backends[0].address)
        .bytes();
    output[TRANSPORT + 25] ^= 0x10;
    let expected = Expected::to_backend(&WEB, 0, &ack, ack.source).new_flow();
    fixture.expect("one bit of the payload", &damaged, expected.with_output(output));
}

#[test]
fn type_of_service_identification_and_do_not_fragment_are_kept() {
    let mut fixture = Fixture::new();
    let ack = tcp(CLIENT, WEB.vip, ACK);
    let change = |mut bytes: Vec<u8>| {
        bytes[IP + 1] = 0xb9;
        bytes[IP + 4..IP + 8].copy_from_slice(&[0xff, 0xfe, 0x40, 0x00]);
        let header = etherparse::Ipv4Header::from_slice(&bytes[IP..]).unwrap().0;
        bytes[IP + 10..IP + 12].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
        bytes
    };
    let sent = ack.sent(WEB.backends[0].link(), ack.source, WEB.backends[0].address);
    let expected = Expected::to_backend(&WEB, 0, &ack, ack.source).new_flow();
    fixture.expect(
        "marked",
        &change(ack.bytes()),
        expected.with_output(change(sent.bytes())),
    );
}

#[test]
fn a_reply_whose_time_to_live_is_used_up_is_dropped_and_counted_for_the_service() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, WEB.vip, SYN);
    fixture.run(&syn.bytes());
    let mut reply = answer(0, syn.source, SYN_ACK);
    reply.ttl = 1;
    fixture.expect("reply", &reply.bytes(), Expected::dropped(TtlExceeded).of(&WEB));
}

#[test]
fn what_a_backend_sends_outside_of_flows_passes_as_it_came() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, WEB.vip, SYN);
    fixture.run(&syn.bytes());
    let mut from_other_port = answer(0, syn.source, ACK);
    from_other_port.source.set_port(22);
    let mut to_other_port = answer(0, syn.source, ACK);
    to_other_port.destination.set_port(5001);
    let mut to_other_client = answer(0, syn.source, ACK);
    to_other_client.destination = address("198.51.100.8:5000");
    let other_backend = answer(1, syn.source, ACK);
    let mut other_protocol = answer(0, syn.source, ACK);
    other_protocol.transport = Transport::Udp { checksum: true };
    for (what, frame) in [
        ("from another port", from_other_port),
        ("to another port", to_other_port),
        ("to another client", to_other_client),
        ("from another backend", other_backend),
        ("by another protocol", other_protocol),
    ] {
        fixture.expect(what, &frame.bytes(), Expected::passed(NotForService));
    }
}

/// With `nat` the replies of one server are told apart by the client's port alone.
#[test]
fn two_services_on_one_server_serve_the_same_client_port() {
    let mut fixture = Fixture::new();
    assert_eq!(WEB.backends[0].address, MIRROR.backends[0].address);
    let (web, mirror) = (tcp(CLIENT, WEB.vip, SYN), tcp(CLIENT, MIRROR.vip, SYN));
    let expected = Expected::to_backend(&WEB, 0, &web, web.source).new_flow();
    fixture.expect("SYN to the one", &web.bytes(), expected);
    let (_, output) = fixture.run(&mirror.bytes());
    let (given, _) = ends(&output);
    assert_eq!(given.ip(), mirror.source.ip());
    assert_ne!(given.port(), mirror.source.port());
    fixture.expect(
        "SYN to the other once more",
        &mirror.bytes(),
        Expected::to_backend(&MIRROR, 0, &mirror, given),
    );
    let reply = answer(0, web.source, SYN_ACK);
    fixture.expect(
        "reply of the one",
        &reply.bytes(),
        Expected::to_client(&WEB, 0, &reply, &web),
    );
    let reply = answer(0, given, SYN_ACK);
    fixture.expect(
        "reply of the other",
        &reply.bytes(),
        Expected::to_client(&MIRROR, 0, &reply, &mirror),
    );
}
