//! What is UDP's own: a checksum that may be missing, and flows without an end.

use lb_common::abi::{BackendFlags, TcpState};

use crate::{
    fixture::{DNS, Expected, Fixture, RELAY, SETTINGS, SOURCE},
    frame::{Frame, TRANSPORT, Transport, udp},
};

const CLIENT: &str = "198.51.100.7:5000";

#[test]
fn a_datagram_without_a_checksum_leaves_without_one() {
    let mut fixture = Fixture::new();
    let mut query = udp(CLIENT, DNS.vip);
    query.transport = Transport::Udp { checksum: false };
    let expected = Expected::to_backend(&DNS, 0, &query, query.source).new_flow();
    fixture.expect("query", &query.bytes(), expected);
    let reply = Frame::answer(
        DNS.backends[0].address,
        query.source,
        Transport::Udp { checksum: false },
    );
    fixture.expect(
        "reply",
        &reply.bytes(),
        Expected::to_client(&DNS, 0, &reply, &query),
    );
}

/// A computed checksum of zero is sent as all ones, because zero means that there is none (RFC 768).
#[test]
fn a_checksum_that_comes_out_as_zero_leaves_as_all_ones() {
    let mut fixture = Fixture::new();
    let mut query = udp(CLIENT, DNS.vip);
    query.payload = vec![0; 8];
    let backend = &DNS.backends[0];
    let sent = query.sent(backend.link(), query.source, backend.address).bytes();
    // The word that the sum lacks to all ones.
    let lacking = [sent[TRANSPORT + 6], sent[TRANSPORT + 7]];
    query.payload[2..4].copy_from_slice(&lacking);
    let sent = query.sent(backend.link(), query.source, backend.address).bytes();
    assert_eq!(sent[TRANSPORT + 6..TRANSPORT + 8], [0xff, 0xff]);
    assert_ne!(
        query.bytes()[TRANSPORT + 6..TRANSPORT + 8],
        [0xff, 0xff],
        "the input has another"
    );
    let expected = Expected::to_backend(&DNS, 0, &query, query.source).new_flow();
    fixture.expect("query", &query.bytes(), expected);
}

#[test]
fn a_checksum_of_all_ones_that_comes_in_is_changed_as_any_other() {
    let mut fixture = Fixture::new();
    let mut query = udp(CLIENT, DNS.vip);
    query.payload = vec![0; 8];
    let lacking = query.bytes()[TRANSPORT + 6..TRANSPORT + 8].to_vec();
    query.payload[2..4].copy_from_slice(&lacking);
    assert_eq!(query.bytes()[TRANSPORT + 6..TRANSPORT + 8], [0xff, 0xff]);
    let expected = Expected::to_backend(&DNS, 0, &query, query.source).new_flow();
    fixture.expect("query", &query.bytes(), expected);
}

#[test]
fn a_datagram_that_is_shorter_than_its_packet_is_served() {
    let mut fixture = Fixture::new();
    let query = udp(CLIENT, DNS.vip);
    let mut bytes = query.bytes();
    // UDP length of 12 in a packet with room for more; the checksum is missing, so that it is right.
    bytes[TRANSPORT + 4..TRANSPORT + 8].copy_from_slice(&[0, 12, 0, 0]);
    let backend = &DNS.backends[0];
    let mut output = query.sent(backend.link(), query.source, backend.address).bytes();
    output[TRANSPORT + 4..TRANSPORT + 8].copy_from_slice(&[0, 12, 0, 0]);
    let expected = Expected::to_backend(&DNS, 0, &query, query.source).new_flow();
    fixture.expect("UDP length of 12", &bytes, expected.with_output(output));
}

#[test]
fn an_empty_datagram_is_served() {
    let mut fixture = Fixture::new();
    let mut query = udp(CLIENT, DNS.vip);
    query.payload = vec![];
    let expected = Expected::to_backend(&DNS, 0, &query, query.source).new_flow();
    fixture.expect("no payload", &query.bytes(), expected);
}

#[test]
fn a_flow_has_no_tcp_state_whatever_its_datagrams_hold() {
    let mut fixture = Fixture::new();
    let mut query = udp(CLIENT, DNS.vip);
    query.payload = vec![0xff; 40];
    fixture.run(&query.bytes());
    fixture.run(&query.bytes());
    assert_eq!(fixture.flow(&query).unwrap().tcp_state, TcpState::None);
}

#[test]
fn a_flow_stays_on_its_backend_when_the_slots_change() {
    let mut fixture = Fixture::new();
    let query = udp(CLIENT, DNS.vip);
    fixture.run(&query.bytes());
    fixture.all_slots(&DNS, DNS.backends[1].id);
    let expected = Expected::to_backend(&DNS, 0, &query, query.source);
    fixture.expect("known flow", &query.bytes(), expected);
}

#[test]
fn a_flow_stays_on_a_draining_backend_and_leaves_one_that_does_not_keep_it() {
    let mut fixture = Fixture::new();
    let query = udp(CLIENT, DNS.vip);
    fixture.run(&query.bytes());
    fixture.all_slots(&DNS, DNS.backends[1].id);
    fixture.change_backend(&DNS, 0, |backend| backend.flags &= !BackendFlags::ACCEPTS_NEW);
    let expected = Expected::to_backend(&DNS, 0, &query, query.source);
    fixture.expect("draining", &query.bytes(), expected);
    fixture.change_backend(&DNS, 0, |backend| backend.flags &= !BackendFlags::KEEPS_UDP);
    let expected = Expected::to_backend(&DNS, 1, &query, query.source).new_flow();
    fixture.expect("down", &query.bytes(), expected);
    let reply = Frame::answer(
        DNS.backends[1].address,
        query.source,
        Transport::Udp { checksum: true },
    );
    fixture.expect(
        "reply of the other",
        &reply.bytes(),
        Expected::to_client(&DNS, 1, &reply, &query),
    );
}

#[test]
fn a_full_nat_datagram_without_a_checksum_leaves_without_one() {
    let mut fixture = Fixture::new();
    let mut query = udp(CLIENT, RELAY.vip);
    query.transport = Transport::Udp { checksum: false };
    let start = lb_common::logic::source_port::first_choice(&SETTINGS, &query.key());
    let port = lb_common::logic::source_port::candidate(&SETTINGS, start, 0);
    let source = std::net::SocketAddr::new(SOURCE, port);
    let expected = Expected::to_backend(&RELAY, 0, &query, source).new_flow();
    fixture.expect("query", &query.bytes(), expected);
}
