//! Live flows are counted where they begin and end: once each.

use std::{thread::sleep, time::Duration};

use lb_common::abi::TCP;

use crate::{
    fixture::{DIRECT, DIRECT6, DNS, EVERY, Fixture, GUE_UDP, GUE6, SHOP, TUNNEL, TestService, WEB, WEB6},
    frame::{ACK, FIN_ACK, Frame, PSH, RST, SYN, SYN_ACK, Transport, ends, packet_of, tcp},
};

const TWO_WAY: [TestService; 3] = [WEB, SHOP, WEB6];
const ONE_WAY: [TestService; 4] = [DIRECT, DIRECT6, TUNNEL, GUE6];

fn client(service: &TestService) -> &'static str {
    if service.vip.is_ipv4() {
        "198.51.100.7:5000"
    } else {
        "[2001:db8:7::7]:5000"
    }
}

/// Segments of a flow, of the client or the backend, and how many flows are live after each.
fn expect(fixture: &mut Fixture, service: &TestService, script: &[(bool, u8, u64)]) {
    let mut source = None;
    for (step, (is_client, flags, live)) in script.iter().enumerate() {
        if *is_client {
            let (_, output) = fixture.run(&tcp(client(service), service.vip, *flags).bytes());
            if source.is_none() && TWO_WAY.iter().any(|two_way| two_way.id == service.id) {
                source = Some(ends(&output).0);
            }
        } else {
            let transport = Transport::Tcp {
                flags: *flags,
                options: vec![],
            };
            let answer = Frame::answer(service.backends[0].address, source.unwrap(), transport);
            fixture.run(&answer.bytes());
        }
        let counted = fixture.live(service.backends[0].id);
        assert_eq!(counted, *live, "step {step} of {script:x?}, {service:?}");
    }
    // What is removed has ended by that.
    let _ = fixture.remove(&tcp(client(service), service.vip, SYN));
    assert_eq!(fixture.live(service.backends[0].id), 0);
}

#[test]
fn a_flow_whose_both_ends_are_seen_is_live_until_both_have_finished_or_one_resets() {
    let mut fixture = Fixture::of(&EVERY);
    let (client, backend) = (true, false);
    for service in TWO_WAY {
        for script in [
            &[
                (client, SYN, 1),
                (client, SYN, 1),
                (backend, SYN_ACK, 1),
                (client, ACK, 1),
                (client, ACK | PSH, 1),
                (client, FIN_ACK, 1),
                (client, FIN_ACK, 1),
                (backend, FIN_ACK, 0),
                (backend, FIN_ACK, 0),
                (client, ACK, 0),
                (client, RST, 0),
            ][..],
            &[
                (client, SYN, 1),
                (backend, FIN_ACK, 1),
                (client, FIN_ACK, 0),
                (backend, RST, 0),
            ],
            &[
                (client, SYN, 1),
                (client, RST, 0),
                (client, RST, 0),
                (client, ACK, 0),
            ],
            &[(client, SYN, 1), (backend, RST, 0), (client, RST, 0)],
            &[(client, ACK, 1), (client, RST, 0)],
            &[(client, FIN_ACK, 1), (backend, FIN_ACK, 0)],
            &[(client, RST, 0), (client, SYN_ACK, 0)],
            // A new connection by the same ports: the old one has ended, or ends by that.
            &[
                (client, SYN, 1),
                (client, RST, 0),
                (client, SYN, 1),
                (client, RST, 0),
                (client, SYN, 1),
            ],
            &[
                (client, SYN, 1),
                (client, FIN_ACK, 1),
                (client, SYN, 1),
                (client, RST, 0),
            ],
            &[
                (client, SYN, 1),
                (client, ACK, 1),
                (backend, FIN_ACK, 1),
                (client, SYN, 1),
            ],
        ] {
            expect(&mut fixture, &service, script);
        }
    }
}

/// The backend's FIN is not seen, so that of the client is the end.
#[test]
fn a_flow_of_which_only_the_client_is_seen_is_live_until_that_has_finished() {
    let mut fixture = Fixture::of(&EVERY);
    for service in ONE_WAY {
        for script in [
            &[
                (true, SYN, 1),
                (true, ACK, 1),
                (true, FIN_ACK, 0),
                (true, FIN_ACK, 0),
                (true, ACK, 0),
                (true, SYN, 1),
                (true, RST, 0),
            ][..],
            &[(true, FIN_ACK, 0), (true, FIN_ACK, 0), (true, SYN, 1)],
            &[(true, ACK, 1), (true, RST, 0), (true, SYN, 1), (true, SYN, 1)],
        ] {
            expect(&mut fixture, &service, script);
        }
    }
}

#[test]
fn a_flow_that_has_idled_out_ends_when_the_next_begins() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [WEB, DNS, DIRECT, GUE_UDP] {
        let first = packet_of(service.protocol, client(&service), service.vip);
        fixture.run(&first.bytes());
        fixture.run(&first.bytes());
        assert_eq!(fixture.live(service.backends[0].id), 1);
        fixture.change_settings(|settings| {
            settings.tcp_idle = 1_000_000;
            settings.udp_idle = 1_000_000;
        });
        // Above two ticks of any timeout.
        sleep(Duration::from_millis(250));
        // Not seen by anybody yet.
        assert_eq!(fixture.live(service.backends[0].id), 1);
        fixture.all_slots(&service, service.backends[1].id);
        fixture.run(&first.bytes());
        assert_eq!(fixture.live(service.backends[0].id), 0);
        assert_eq!(fixture.live(service.backends[1].id), 1);
        fixture.change_settings(|_| ());
    }
}

#[test]
fn a_flow_that_leaves_a_backend_ends_there() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [WEB, DNS, SHOP, DIRECT] {
        let flags = if service.protocol == TCP { SYN } else { 0 };
        let mut first = packet_of(service.protocol, client(&service), service.vip);
        if flags == SYN {
            first = tcp(client(&service), service.vip, SYN);
        }
        fixture.run(&first.bytes());
        fixture.all_slots(&service, service.backends[1].id);
        fixture.change_backend(&service, 0, |backend| backend.flags = 0);
        fixture.run(&first.bytes());
        assert_eq!(fixture.live(service.backends[0].id), 0);
        assert_eq!(fixture.live(service.backends[1].id), 1);
        assert_eq!(fixture.remove(&first), 1);
        assert_eq!(fixture.live(service.backends[0].id), 0);
        assert_eq!(fixture.live(service.backends[1].id), 0);
    }
}

/// Twice as many opening flows as there is room for: each takes the place of one that it ends.
#[test]
fn a_flow_that_gives_way_to_another_ends_by_that() {
    let mut fixture = Fixture::with_flow_table(1024);
    for service in [WEB, SHOP, DNS] {
        for number in 0..3000_u16 {
            let mut first = packet_of(service.protocol, client(&service), service.vip);
            if service.protocol == TCP {
                first = tcp(client(&service), service.vip, SYN);
            }
            first.source.set_port(10_000 + number);
            fixture.run(&first.bytes());
        }
    }
    let flows = fixture.flows();
    assert!(flows.len() > 700, "{}", flows.len());
    for service in [WEB, SHOP, DNS] {
        let id = service.backends[0].id;
        let found = flows.values().filter(|flow| flow.backend == id).count();
        assert_eq!(fixture.live(id), found as u64, "{service:?}");
    }
}
