//! The flow table: what a flow keeps, when it ends, and that no flow gets the packets of another.

use std::{thread::sleep, time::Duration};

use lb_common::abi::{
    Flow, Forward, Link,
    Reason::{NoFlow, NotForService},
};
use xlb::datapath::Datapath;

use crate::{
    fixture::{DNS, Expected, Fixture, INGRESS, MIRROR, SHOP, TX, TestService, WEB},
    frame::{
        ACK, BALANCER_MAC, FIN_ACK, Frame, ROUTER_MAC, SYN, SYN_ACK, Transport, address, ends, tcp, udp,
    },
};

const CLIENT: &str = "198.51.100.7:5000";
/// Above a tick of the coarse clock by far.
const BEYOND: Duration = Duration::from_millis(60);
const SHORT: u64 = 5_000_000;

fn answer(service: &TestService, which: usize, to: std::net::SocketAddr, flags: u8) -> Frame {
    Frame::answer(
        service.backends[which].address,
        to,
        Transport::Tcp {
            flags,
            options: vec![],
        },
    )
}

impl Fixture {
    /// Removes the flow of a client's packet; tells how many were removed.
    pub(crate) fn remove(&mut self, frame: &Frame) -> u64 {
        self.datapath().remove_flows(&[frame.key()], u64::MAX).unwrap()
    }

    /// The keys of replies that lead to a flow of any kind.
    fn orphans(&mut self) -> u64 {
        let (removed, next) = self.datapath().remove_some_orphan_replies(None).unwrap();
        assert_eq!(next, None, "all are seen at once");
        removed
    }
}

#[test]
fn a_flow_is_recorded_whole() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, WEB.vip, SYN);
    fixture.run(&syn.bytes());
    let flow = fixture.flow(&syn).unwrap();
    assert!(flow.created > 0 && flow.last_seen == flow.created);
    let expected = Flow {
        last_seen: flow.last_seen,
        created: flow.created,
        backend: WEB.backends[0].id,
        generation: 1,
        service: WEB.id,
        client_ifindex: INGRESS,
        client_link: Link::new(ROUTER_MAC, BALANCER_MAC),
        client_tags: lb_common::abi::Tags::default(),
        source_port: 5000u16.to_be(),
        tcp_state: 1,
        forward: Forward::Nat.number(),
    };
    assert_eq!(flow, expected);
    assert_eq!(fixture.flows().len(), 1);
}

#[test]
fn packets_of_both_directions_keep_a_flow_young() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, WEB.vip, SYN);
    fixture.run(&syn.bytes());
    let first = fixture.flow(&syn).unwrap();
    sleep(BEYOND);
    fixture.run(&answer(&WEB, 0, syn.source, SYN_ACK).bytes());
    let second = fixture.flow(&syn).unwrap();
    assert!(second.last_seen > first.last_seen);
    sleep(BEYOND);
    fixture.run(&syn.bytes());
    let third = fixture.flow(&syn).unwrap();
    assert!(third.last_seen > second.last_seen);
    assert_eq!(third.created, first.created);
}

#[test]
fn an_idle_flow_ends_and_its_next_packet_starts_anew() {
    let ack = tcp(CLIENT, WEB.vip, ACK);
    let syn = tcp(CLIENT, WEB.vip, SYN);
    let fin = tcp(CLIENT, WEB.vip, FIN_ACK);
    let query = udp(CLIENT, DNS.vip);
    for (what, service, first) in [
        ("established", WEB, &ack),
        ("opening", WEB, &syn),
        ("closing", WEB, &fin),
        ("UDP", DNS, &query),
    ] {
        let mut fixture = Fixture::new();
        fixture.change_settings(|settings| match what {
            "established" => settings.tcp_idle = SHORT,
            "opening" => settings.tcp_opening = SHORT,
            "closing" => settings.tcp_closing = SHORT,
            _ => settings.udp_idle = SHORT,
        });
        fixture.run(&first.bytes());
        fixture.all_slots(&service, service.backends[1].id);
        sleep(BEYOND);
        let expected = Expected::to_backend(&service, 1, first, first.source).new_flow();
        fixture.expect(what, &first.bytes(), expected);
    }
}

#[test]
fn an_idle_flow_stays_while_its_own_timeout_has_not_passed() {
    let mut fixture = Fixture::new();
    // The timeouts of all states but the flow's own have passed.
    fixture.change_settings(|settings| {
        settings.tcp_opening = SHORT;
        settings.tcp_closing = SHORT;
        settings.udp_idle = SHORT;
    });
    let ack = tcp(CLIENT, WEB.vip, ACK);
    fixture.run(&ack.bytes());
    fixture.all_slots(&WEB, WEB.backends[1].id);
    sleep(BEYOND);
    fixture.expect(
        "established",
        &ack.bytes(),
        Expected::to_backend(&WEB, 0, &ack, ack.source),
    );
}

#[test]
fn a_flow_does_not_follow_an_id_that_was_given_to_another_server() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, WEB.vip, SYN);
    let ack = tcp(CLIENT, WEB.vip, ACK);
    fixture.run(&syn.bytes());
    fixture.all_slots(&WEB, WEB.backends[1].id);
    fixture.change_backend(&WEB, 0, |backend| backend.generation = 2);
    fixture.expect(
        "ACK",
        &ack.bytes(),
        Expected::to_backend(&WEB, 1, &ack, ack.source).new_flow(),
    );
}

#[test]
fn a_reply_of_a_server_whose_id_was_given_away_is_dropped() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, WEB.vip, SYN);
    fixture.run(&syn.bytes());
    fixture.change_backend(&WEB, 0, |backend| backend.generation = 2);
    let reply = answer(&WEB, 0, syn.source, SYN_ACK);
    fixture.expect("reply", &reply.bytes(), Expected::dropped(NoFlow));
}

#[test]
fn a_late_reply_of_the_backend_that_a_flow_has_left_is_dropped() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, WEB.vip, SYN);
    fixture.run(&syn.bytes());
    fixture.all_slots(&WEB, WEB.backends[1].id);
    fixture.change_backend(&WEB, 0, |backend| backend.flags = 0);
    let expected = Expected::to_backend(&WEB, 1, &syn, syn.source).new_flow();
    fixture.expect("SYN once more", &syn.bytes(), expected);
    let late = answer(&WEB, 0, syn.source, SYN_ACK);
    fixture.expect("late reply", &late.bytes(), Expected::dropped(NoFlow));
    let reply = answer(&WEB, 1, syn.source, SYN_ACK);
    let expected = Expected::to_client(&WEB, 1, &reply, &syn);
    fixture.expect("reply of the new backend", &reply.bytes(), expected);
}

/// As `10.0.0.11:3000` and `10.0.0.11:3001`: the address alone does not tell the backend.
#[test]
fn a_late_reply_is_dropped_when_the_new_backend_is_another_port_of_the_same_server() {
    for generation in [1, 2] {
        let mut fixture = Fixture::new();
        let port = WEB.backends[0].address.port() + 1;
        fixture.change_backend(&WEB, 1, |backend| {
            backend.address = WEB.backends[0].address.ip().into();
            backend.port = port.to_be();
        });
        let syn = tcp(CLIENT, WEB.vip, SYN);
        fixture.run(&syn.bytes());
        fixture.all_slots(&WEB, WEB.backends[1].id);
        fixture.change_backend(&WEB, 0, |backend| {
            backend.flags = 0;
            backend.generation = generation;
        });
        fixture.run(&syn.bytes());
        let late = answer(&WEB, 0, syn.source, SYN_ACK);
        fixture.expect("late reply", &late.bytes(), Expected::dropped(NoFlow));
        let mut reply = late;
        reply.source.set_port(port);
        let expected = Expected::to_client(&WEB, 1, &reply, &syn);
        fixture.expect("reply of the new backend", &reply.bytes(), expected);
    }
}

/// An idle flow's source port may be taken; when the idle flow comes back it takes another and leaves that alone.
#[test]
fn a_flow_that_starts_anew_leaves_the_source_port_that_another_has_taken() {
    let mut fixture = Fixture::new();
    let (web, mirror) = (tcp(CLIENT, WEB.vip, ACK), tcp(CLIENT, MIRROR.vip, SYN));
    fixture.change_settings(|settings| settings.tcp_idle = SHORT);
    fixture.run(&web.bytes());
    sleep(BEYOND);
    let expected = Expected::to_backend(&MIRROR, 0, &mirror, mirror.source).new_flow();
    fixture.expect("SYN takes the port of the idle flow", &mirror.bytes(), expected);
    let (verdict, output) = fixture.run(&web.bytes());
    let (given, _) = ends(&output);
    assert_eq!(verdict, TX);
    assert_ne!(given, web.source, "it would get the replies of the other");
    let reply = answer(&MIRROR, 0, mirror.source, SYN_ACK);
    let expected = Expected::to_client(&MIRROR, 0, &reply, &mirror);
    fixture.expect("reply of the other", &reply.bytes(), expected);
    let reply = answer(&WEB, 0, given, ACK);
    let expected = Expected::to_client(&WEB, 0, &reply, &web);
    fixture.expect("reply of the one", &reply.bytes(), expected);
}

#[test]
fn a_flow_that_is_removed_is_gone_in_both_directions() {
    for service in [WEB, SHOP] {
        let mut fixture = Fixture::new();
        let syn = tcp(CLIENT, service.vip, SYN);
        let (_, output) = fixture.run(&syn.bytes());
        let (given, _) = ends(&output);
        assert_eq!(fixture.remove(&syn), 1);
        assert_eq!(fixture.flow(&syn), None);
        let reply = answer(&service, 0, given, SYN_ACK);
        fixture.expect("reply", &reply.bytes(), Expected::passed(NotForService));
        assert_eq!(fixture.orphans(), 0);
        assert_eq!(fixture.remove(&syn), 0);
    }
}

#[test]
fn a_flow_that_was_seen_since_is_not_removed() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, WEB.vip, SYN);
    fixture.run(&syn.bytes());
    let flow = fixture.flow(&syn).unwrap();
    let key = syn.key();
    assert_eq!(
        fixture.datapath().remove_flows(&[key], flow.last_seen).unwrap(),
        0
    );
    assert_eq!(
        fixture
            .datapath()
            .remove_flows(&[key], flow.last_seen + 1)
            .unwrap(),
        1
    );
    assert!(fixture.flows().is_empty());
}

#[test]
fn keys_of_replies_that_lead_nowhere_are_removed_and_others_are_not() {
    let mut fixture = Fixture::new();
    let gone = tcp(CLIENT, WEB.vip, SYN);
    let mut stays = tcp(CLIENT, WEB.vip, SYN);
    stays.source.set_port(5001);
    fixture.run(&gone.bytes());
    fixture.run(&stays.bytes());
    // With its backend gone, the key of the replies cannot be told from the flow.
    fixture.apply(xlb::datapath::Operation::RemoveBackend(WEB.backends[0].id));
    assert_eq!(fixture.remove(&gone), 1);
    fixture.change_backend(&WEB, 0, |_| ());
    assert_eq!(fixture.orphans(), 1);
    assert_eq!(fixture.orphans(), 0);
    let reply = answer(&WEB, 0, stays.source, SYN_ACK);
    let expected = Expected::to_client(&WEB, 0, &reply, &stays);
    fixture.expect("reply of the flow that stays", &reply.bytes(), expected);
    let reply = answer(&WEB, 0, gone.source, SYN_ACK);
    fixture.expect(
        "reply of the one that is gone",
        &reply.bytes(),
        Expected::passed(NotForService),
    );
}

#[test]
fn the_key_of_replies_that_a_flow_has_left_behind_is_removed() {
    for service in [WEB, SHOP] {
        let mut fixture = Fixture::new();
        let syn = tcp(CLIENT, service.vip, SYN);
        fixture.run(&syn.bytes());
        assert_eq!(fixture.orphans(), 0);
        fixture.all_slots(&service, service.backends[1].id);
        fixture.change_backend(&service, 0, |backend| backend.flags = 0);
        let (_, output) = fixture.run(&syn.bytes());
        assert_eq!(fixture.orphans(), 1);
        assert_eq!(fixture.orphans(), 0);
        let reply = answer(&service, 1, ends(&output).0, SYN_ACK);
        let expected = Expected::to_client(&service, 1, &reply, &syn);
        fixture.expect("reply of the backend that it has", &reply.bytes(), expected);
    }
}

#[test]
fn a_full_flow_table_still_takes_new_flows() {
    let mut fixture = Fixture::with_flow_table(1024);
    for number in 0..5000u32 {
        let mut syn = tcp(CLIENT, WEB.vip, SYN);
        syn.source = address(&format!("198.51.{}.{}:7000", number / 250, 1 + number % 250));
        let expected = Expected::to_backend(&WEB, 0, &syn, syn.source).new_flow();
        if number < 4990 {
            assert_eq!(fixture.run(&syn.bytes()).0, TX, "flow {number}");
        } else {
            fixture.expect("one of the last", &syn.bytes(), expected);
            let reply = answer(&WEB, 0, syn.source, SYN_ACK);
            let expected = Expected::to_client(&WEB, 0, &reply, &syn);
            fixture.expect("its reply", &reply.bytes(), expected);
        }
    }
    assert!(fixture.flows().len() <= 1024);
}

#[test]
fn flows_that_only_differ_in_one_field_are_different_flows() {
    let mut fixture = Fixture::new();
    let flows = [
        tcp("198.51.100.7:5000", WEB.vip, SYN),
        tcp("198.51.100.7:5001", WEB.vip, SYN),
        tcp("198.51.100.8:5000", WEB.vip, SYN),
        tcp("198.51.100.7:5000", SHOP.vip, SYN),
        udp("198.51.100.7:5000", DNS.vip),
    ];
    for frame in &flows {
        fixture.run(&frame.bytes());
    }
    assert_eq!(fixture.flows().len(), flows.len());
    fixture.all_slots(&WEB, 0);
    let other = tcp("198.51.100.9:5000", WEB.vip, SYN);
    fixture.expect(
        "another address",
        &other.bytes(),
        Expected::rejected(&other).of(&WEB),
    );
}
