//! `full-nat`: the backend sees this host's address and a port that tells the flow.

use std::{collections::BTreeSet, net::SocketAddr};

use lb_common::{
    abi::{
        Address, BackendFlags,
        Reason::{NextHopMissing, NoFlow, NoSourceAddress, NoSourcePort},
        Settings,
    },
    logic::source_port::{candidate, first_choice},
};

use crate::{
    fixture::{DROP, Expected, Fixture, RELAY, SETTINGS, SHOP, SOURCE},
    frame::{ACK, Frame, PSH, SYN, SYN_ACK, Transport, ends, tcp, udp},
};

const CLIENT: &str = "198.51.100.7:5000";

/// The source that a flow is given where its first choice is free.
fn first_source(settings: &Settings, frame: &Frame) -> SocketAddr {
    let start = first_choice(settings, &frame.key());
    SocketAddr::new(SOURCE, candidate(settings, start, 0))
}

#[test]
fn a_connection_goes_to_its_backend_and_back() {
    let mut fixture = Fixture::new();
    for which in [0, 1] {
        fixture.all_slots(&SHOP, SHOP.backends[which].id);
        let mut syn = tcp(CLIENT, SHOP.vip, SYN);
        syn.source.set_port(5000 + which as u16);
        syn.ip_options = vec![1; which * 4];
        let source = first_source(&SETTINGS, &syn);
        let to_backend = Expected::to_backend(&SHOP, which, &syn, source);
        fixture.expect("SYN", &syn.bytes(), to_backend.new_flow());
        let syn_ack = Frame::answer(
            SHOP.backends[which].address,
            source,
            Transport::Tcp {
                flags: SYN_ACK,
                options: vec![1; 4],
            },
        );
        let to_client = Expected::to_client(&SHOP, which, &syn_ack, &syn);
        fixture.expect("SYN, ACK", &syn_ack.bytes(), to_client);
        for payload in [0, 1, 1460] {
            let mut data = syn.clone();
            data.transport = Transport::Tcp {
                flags: ACK | PSH,
                options: vec![],
            };
            data.payload = vec![0xa5; payload];
            data.trailer = vec![0; 3];
            let expected = Expected::to_backend(&SHOP, which, &data, source);
            fixture.expect("data", &data.bytes(), expected);
        }
    }
}

#[test]
fn udp_goes_to_its_backend_and_back() {
    let mut fixture = Fixture::new();
    let query = udp(CLIENT, RELAY.vip);
    let source = first_source(&SETTINGS, &query);
    let expected = Expected::to_backend(&RELAY, 0, &query, source);
    fixture.expect("query", &query.bytes(), expected.new_flow());
    let reply = Frame::answer(
        RELAY.backends[0].address,
        source,
        Transport::Udp { checksum: true },
    );
    fixture.expect(
        "reply",
        &reply.bytes(),
        Expected::to_client(&RELAY, 0, &reply, &query),
    );
}

#[test]
fn two_thousand_flows_to_one_backend_have_a_source_port_each() {
    let mut fixture = Fixture::new();
    let mut sources = BTreeSet::new();
    for number in 0..2000u16 {
        let mut syn = tcp(CLIENT, SHOP.vip, SYN);
        syn.source.set_port(10_000 + number);
        let (_, output) = fixture.run(&syn.bytes());
        let (source, _) = ends(&output);
        assert_eq!(source.ip(), SOURCE);
        let last = SETTINGS.source_port_first + SETTINGS.source_port_count - 1;
        assert!((SETTINGS.source_port_first..=last).contains(&source.port()));
        assert!(sources.insert(source), "{source} was given twice");
    }
    // Some have met, or the test has not shown that they are told apart.
    let mut firsts = BTreeSet::new();
    for number in 0..2000u16 {
        let mut syn = tcp(CLIENT, SHOP.vip, SYN);
        syn.source.set_port(10_000 + number);
        firsts.insert(first_source(&SETTINGS, &syn));
    }
    assert!(firsts.len() < 2000);
}

#[test]
fn the_same_source_port_serves_two_backends() {
    let mut fixture = Fixture::new();
    fixture.change_settings(|settings| settings.source_port_count = 1);
    for which in [0, 1] {
        fixture.all_slots(&SHOP, SHOP.backends[which].id);
        let mut syn = tcp(CLIENT, SHOP.vip, SYN);
        syn.source.set_port(5000 + which as u16);
        let source = SocketAddr::new(SOURCE, SETTINGS.source_port_first);
        let expected = Expected::to_backend(&SHOP, which, &syn, source).new_flow();
        fixture.expect("SYN", &syn.bytes(), expected);
    }
}

#[test]
fn every_source_port_is_given_before_a_flow_is_refused() {
    let mut fixture = Fixture::new();
    fixture.change_settings(|settings| settings.source_port_count = 8);
    for port in 0..8 {
        let mut syn = tcp(CLIENT, SHOP.vip, SYN);
        syn.source.set_port(5000 + port);
        assert_ne!(fixture.run(&syn.bytes()).0, DROP, "flow {port} of 8");
    }
    for port in 8..16 {
        let mut syn = tcp(CLIENT, SHOP.vip, SYN);
        syn.source.set_port(5000 + port);
        let expected = Expected::dropped(NoSourcePort).of(&SHOP);
        fixture.expect("one more", &syn.bytes(), expected);
        assert_eq!(fixture.flow(&syn), None);
    }
    // UDP has ports of its own.
    assert_ne!(fixture.run(&udp(CLIENT, RELAY.vip).bytes()).0, DROP);
}

#[test]
fn a_source_port_is_free_again_when_its_flow_is_over() {
    let mut fixture = Fixture::new();
    fixture.change_settings(|settings| settings.source_port_count = 1);
    let first = tcp(CLIENT, SHOP.vip, SYN);
    let mut second = tcp(CLIENT, SHOP.vip, SYN);
    second.source.set_port(5001);
    let source = SocketAddr::new(SOURCE, SETTINGS.source_port_first);
    fixture.expect(
        "first",
        &first.bytes(),
        Expected::to_backend(&SHOP, 0, &first, source).new_flow(),
    );
    fixture.expect(
        "second",
        &second.bytes(),
        Expected::dropped(NoSourcePort).of(&SHOP),
    );
    fixture.change_settings(|settings| {
        settings.source_port_count = 1;
        settings.tcp_opening = 1_000_000;
    });
    // Above two ticks of any timeout.
    std::thread::sleep(std::time::Duration::from_millis(250));
    fixture.expect(
        "second, when the first is over",
        &second.bytes(),
        Expected::to_backend(&SHOP, 0, &second, source).new_flow(),
    );
    let reply = Frame::answer(
        SHOP.backends[0].address,
        source,
        Transport::Tcp {
            flags: SYN_ACK,
            options: vec![],
        },
    );
    fixture.expect(
        "reply",
        &reply.bytes(),
        Expected::to_client(&SHOP, 0, &reply, &second),
    );
}

#[test]
fn a_backend_that_no_route_leads_to_gets_no_flow() {
    let mut fixture = Fixture::new();
    fixture.change_backend(&SHOP, 0, |backend| backend.source = Address::default());
    let syn = tcp(CLIENT, SHOP.vip, SYN);
    fixture.expect("SYN", &syn.bytes(), Expected::dropped(NoSourceAddress).of(&SHOP));
    assert_eq!(fixture.flow(&syn), None);
}

#[test]
fn a_flow_whose_route_has_gone_sends_nothing_from_no_address() {
    let mut fixture = Fixture::new();
    fixture.run(&tcp(CLIENT, SHOP.vip, SYN).bytes());
    fixture.change_backend(&SHOP, 0, |backend| {
        backend.source = Address::default();
        backend.flags &= !BackendFlags::NEXT_HOP_KNOWN;
    });
    let ack = tcp(CLIENT, SHOP.vip, ACK);
    fixture.expect("ACK", &ack.bytes(), Expected::dropped(NoSourceAddress).of(&SHOP));
}

#[test]
fn a_packet_whose_next_hop_is_unknown_is_dropped_because_the_host_would_drop_it_unseen() {
    let mut fixture = Fixture::new();
    fixture.run(&tcp(CLIENT, SHOP.vip, SYN).bytes());
    fixture.change_backend(&SHOP, 0, |backend| backend.flags &= !BackendFlags::NEXT_HOP_KNOWN);
    let ack = tcp(CLIENT, SHOP.vip, ACK);
    fixture.expect("ACK", &ack.bytes(), Expected::dropped(NextHopMissing).of(&SHOP));
}

#[test]
fn a_reply_to_a_flow_that_is_gone_is_dropped() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, SHOP.vip, SYN);
    let source = first_source(&SETTINGS, &syn);
    fixture.run(&syn.bytes());
    // The backend has another generation: its id was given to another server.
    fixture.change_backend(&SHOP, 0, |backend| backend.generation = 2);
    let reply = Frame::answer(
        SHOP.backends[0].address,
        source,
        Transport::Tcp {
            flags: SYN_ACK,
            options: vec![],
        },
    );
    fixture.expect("reply", &reply.bytes(), Expected::dropped(NoFlow));
}
