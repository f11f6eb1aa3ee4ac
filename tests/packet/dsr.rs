//! `dsr`: the packet goes to its backend as it came, but for MAC addresses and a hop.

use lb_common::abi::{
    BackendFlags, Forward,
    Reason::{NextHopMissing, NoFlow, NotForService, TtlExceeded},
    TcpState,
};

use crate::{
    fixture::{DIRECT, DIRECT_UDP, DIRECT6, Expected, Fixture, TestService},
    frame::{ACK, FIN_ACK, Frame, PSH, RST, SYN, options, packet_of, tcp},
};

const SERVICES: [TestService; 3] = [DIRECT, DIRECT_UDP, DIRECT6];

fn client(service: &TestService) -> &'static str {
    if service.vip.is_ipv4() {
        "198.51.100.7:5000"
    } else {
        "[2001:db8:7::7]:5000"
    }
}

#[test]
fn a_packet_leaves_with_other_mac_addresses_and_one_hop_less() {
    let mut fixture = Fixture::every();
    for service in SERVICES {
        for which in [0, 1] {
            fixture.all_slots(&service, service.backends[which].id);
            let mut first = packet_of(service.protocol, client(&service), service.vip);
            first.source.set_port(5000 + which as u16);
            first.traffic_class = 0xb9;
            let expected = Expected::direct(&service, which, &first).new_flow();
            fixture.expect("first", &first.bytes(), expected);
            for payload in [0, 1, 2, 1400] {
                let mut data = first.clone();
                data.payload = vec![0xa5; payload];
                data.trailer = vec![0; payload % 3];
                data.dont_fragment = payload % 2 == 0;
                if service.vip.is_ipv4() {
                    data.ip_options = vec![1; 8];
                } else {
                    data.extensions = vec![options(60, 1)];
                }
                let expected = Expected::direct(&service, which, &data);
                fixture.expect("data", &data.bytes(), expected);
            }
        }
    }
}

#[test]
fn a_flow_is_recorded_without_replies() {
    let mut fixture = Fixture::every();
    for service in SERVICES {
        let first = packet_of(service.protocol, client(&service), service.vip);
        fixture.run(&first.bytes());
        let flow = fixture.flow(&first).unwrap();
        assert_eq!(flow.forward, Forward::Dsr.number());
        assert_eq!(flow.source_port, first.source.port().to_be());
        // What the backend sends by this host is no reply of the flow.
        let passing = Frame::answer(service.backends[0].address, first.source, first.transport.clone());
        fixture.expect(
            "from the backend",
            &passing.bytes(),
            Expected::passed(NotForService),
        );
    }
}

/// Only the client's segments are seen.
#[test]
fn the_state_of_a_flow_follows_the_client_alone() {
    let mut fixture = Fixture::every();
    let segment = |flags| tcp(client(&DIRECT), DIRECT.vip, flags);
    for (flags, state) in [
        (SYN, TcpState::SynSent),
        (SYN, TcpState::SynSent),
        (ACK, TcpState::Established),
        (ACK | PSH, TcpState::Established),
        (FIN_ACK, TcpState::FinClient),
        (ACK, TcpState::FinClient),
        (SYN, TcpState::SynSent),
        (ACK, TcpState::Established),
        (RST, TcpState::Closed),
    ] {
        fixture.run(&segment(flags).bytes());
        let flow = fixture.flow(&segment(flags)).unwrap();
        assert_eq!(flow.tcp_state, state, "{flags:#x}");
    }
    let mut unknown = segment(RST);
    unknown.source.set_port(5001);
    let expected = Expected::dropped(NoFlow).of(&DIRECT);
    fixture.expect("RST of no flow", &unknown.bytes(), expected);
}

#[test]
fn a_packet_without_hops_or_next_hop_is_dropped() {
    let mut fixture = Fixture::every();
    for service in SERVICES {
        let mut frame = packet_of(service.protocol, client(&service), service.vip);
        frame.ttl = 1;
        let expected = Expected::dropped(TtlExceeded).of(&service);
        fixture.expect("time to live of 1", &frame.bytes(), expected);
        frame.ttl = 2;
        let expected = Expected::direct(&service, 0, &frame).new_flow();
        fixture.expect("time to live of 2", &frame.bytes(), expected);
        fixture.change_backend(&service, 0, |backend| {
            backend.flags &= !BackendFlags::NEXT_HOP_KNOWN;
        });
        // The host would take it for its own, or have no route for the VIP.
        let expected = Expected::dropped(NextHopMissing).of(&service);
        fixture.expect("no next hop", &frame.bytes(), expected);
    }
}

#[test]
fn the_slots_may_change_and_a_flow_stays() {
    let mut fixture = Fixture::every();
    for service in SERVICES {
        let first = packet_of(service.protocol, client(&service), service.vip);
        fixture.run(&first.bytes());
        fixture.all_slots(&service, service.backends[1].id);
        fixture.expect("known", &first.bytes(), Expected::direct(&service, 0, &first));
        let mut other = first.clone();
        other.source.set_port(5001);
        let expected = Expected::direct(&service, 1, &other).new_flow();
        fixture.expect("new", &other.bytes(), expected);
    }
}
