//! More new flows than are recorded: what needs no record goes on without one, all else as ever.

use lb_common::abi::{Reason, Service, ServiceFlags};

use crate::{
    fixture::{
        DIRECT, DNS, EVERY, Expected, Fixture, GUE6, LOCAL, TUNNEL, TUNNEL_UDP, TX, TestService, WEB,
        openings_window,
    },
    frame::{ACK, Frame, PSH, RST, SYN, packet_of, tcp, udp},
};

/// Runs on a fixture while the CPU has recorded all that it records in a second, and gives what that makes of it.
fn in_flood<T>(prepare: impl Fn(&mut Fixture), run: impl Fn(&mut Fixture) -> T) -> (Fixture, T) {
    for _ in 0..100 {
        let mut fixture = Fixture::of(&EVERY);
        prepare(&mut fixture);
        let window = fixture.exhaust_openings();
        let result = run(&mut fixture);
        // Else a second began meanwhile.
        if openings_window() == window {
            return (fixture, result);
        }
    }
    panic!("no second was long enough");
}

fn client_of(service: &TestService, number: u8) -> String {
    if service.vip.is_ipv4() {
        format!("198.51.100.{number}:5000")
    } else {
        format!("[2001:db8:7::{number}]:5000")
    }
}

fn first_packet(service: &TestService, number: u8) -> Frame {
    let client = client_of(service, number);
    if service.protocol == lb_common::abi::TCP {
        tcp(&client, service.vip, SYN)
    } else {
        udp(&client, service.vip)
    }
}

#[test]
fn in_a_flood_flows_that_hashes_keep_in_place_are_not_recorded_and_go_where_they_would() {
    for service in [DIRECT, TUNNEL, TUNNEL_UDP, GUE6] {
        let packets = || (1..20).map(|number| first_packet(&service, number).bytes());
        let (mut fixture, sent) = in_flood(
            |_| (),
            |fixture| packets().map(|packet| fixture.run(&packet)).collect::<Vec<_>>(),
        );
        assert_eq!(fixture.flows().len(), 0, "{service:?}");
        assert_eq!(fixture.live(service.backends[0].id), 0);
        let mut calm = Fixture::of(&EVERY);
        let expected: Vec<_> = packets().map(|packet| calm.run(&packet)).collect();
        assert!(sent == expected, "{service:?}");
        assert_eq!(calm.flows().len(), 19, "{service:?}");
    }
}

#[test]
fn in_a_flood_packets_of_no_known_flow_go_where_their_first_would() {
    let ack = tcp("198.51.100.7:5000", TUNNEL.vip, ACK | PSH);
    let (mut fixture, sent) = in_flood(|_| (), |fixture| fixture.run(&ack.bytes()));
    assert_eq!(sent.0, TX);
    assert_eq!(fixture.flows().len(), 0);
    assert_eq!(sent, Fixture::of(&EVERY).run(&ack.bytes()));
}

#[test]
fn in_a_flood_flows_whose_replies_are_translated_are_recorded() {
    for service in [WEB, DNS] {
        let frame = first_packet(&service, 7);
        let (mut fixture, verdict) = in_flood(|_| (), |fixture| fixture.run(&frame.bytes()).0);
        assert_eq!(verdict, TX);
        assert_eq!(fixture.flows().len(), 1, "{service:?}");
    }
}

#[test]
fn in_a_flood_a_known_flow_stays_where_it_is() {
    let syn = tcp("198.51.100.7:5000", TUNNEL.vip, SYN);
    let ack = tcp("198.51.100.7:5000", TUNNEL.vip, ACK);
    let (_, sent) = in_flood(
        |fixture| {
            fixture.all_slots(&TUNNEL, TUNNEL.backends[1].id);
            fixture.run(&syn.bytes());
            fixture.all_slots(&TUNNEL, TUNNEL.backends[0].id);
        },
        |fixture| fixture.run(&ack.bytes()),
    );
    let mut other = Fixture::of(&EVERY);
    other.all_slots(&TUNNEL, TUNNEL.backends[1].id);
    other.run(&syn.bytes());
    assert_eq!(sent, other.run(&ack.bytes()));
}

/// What says how many there are counts records.
#[test]
fn in_a_flood_flows_that_are_counted_are_recorded() {
    let syn = first_packet(&TUNNEL, 7);
    let changes: [fn(&mut Service); 2] = [
        |entry| entry.flags |= ServiceFlags::HAS_FULL,
        |entry| {
            entry.new_flow_rate = 1000;
            entry.new_flow_burst = 1000;
            entry.rate_prefix_v4 = 32;
        },
    ];
    for change in changes {
        let (mut fixture, _) = in_flood(
            |fixture| fixture.change_service(&TUNNEL, change),
            |fixture| fixture.run(&syn.bytes()),
        );
        assert_eq!(fixture.flows().len(), 1);
    }
}

#[test]
fn in_a_flood_a_reset_of_a_connection_without_a_record_gets_to_its_backend() {
    let packet = |flags| tcp("198.51.100.7:5000", TUNNEL.vip, flags).bytes();
    let (mut fixture, sent) = in_flood(
        |_| (),
        |fixture| [SYN, ACK, RST].map(|flags| fixture.run(&packet(flags)).0),
    );
    assert_eq!(sent, [TX; 3]);
    assert_eq!(fixture.flows().len(), 0);
    let expected = Expected::dropped(Reason::NoFlow).of(&TUNNEL);
    Fixture::of(&EVERY).expect("without a flood", &packet(RST), expected);
}

#[test]
fn the_budget_is_there_again_in_the_next_second() {
    let (mut fixture, _) = in_flood(|_| (), |fixture| fixture.run(&first_packet(&TUNNEL, 1).bytes()));
    let window = openings_window();
    while openings_window() == window {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    fixture.run(&first_packet(&TUNNEL, 1).bytes());
    assert_eq!(fixture.flows().len(), 1);
}

/// Datagrams of a process on this host's service come from the address that was asked, which takes a record.
#[test]
fn in_a_flood_flows_of_processes_on_this_host_are_left_to_them() {
    let frame = packet_of(LOCAL.protocol, "198.51.100.7:5000", LOCAL.vip);
    let (mut fixture, counted) = in_flood(|_| (), |fixture| fixture.run_counted(&frame.bytes()));
    let mut calm = Fixture::of(&EVERY);
    assert_eq!(counted, calm.run_counted(&frame.bytes()));
    assert_eq!(fixture.flows(), calm.flows());
}
