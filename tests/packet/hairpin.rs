//! A backend as a client of its own service: its packets come back by this host, as under `full-nat`.

use lb_common::abi::{Address, Forward, Reason::NoSourceAddress};

use crate::{
    fixture::{DNS, DNS6, EVERY, Expected, Fixture, TestService, WEB, WEB6},
    frame::{Frame, SYN_ACK, Transport, ends, packet_of},
};

/// The packet of a backend to a VIP.
fn from_backend(service: &TestService, which: usize) -> Frame {
    let mut frame = packet_of(service.protocol, "192.0.2.1:1", service.vip);
    frame.source = service.backends[which].address;
    frame.source.set_port(40_000);
    if service.vip.is_ipv6() {
        frame = packet_of(service.protocol, "[::2]:1", service.vip);
        frame.source = service.backends[which].address;
        frame.source.set_port(40_000);
    }
    frame
}

#[test]
fn a_backend_that_is_a_client_is_answered_by_way_of_this_host_whichever_backend_it_gets() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [WEB, DNS, WEB6, DNS6] {
        for client in [0, 1] {
            // The same server too, which would else answer itself.
            for which in [0, 1] {
                fixture.all_slots(&service, service.backends[which].id);
                let mut first = from_backend(&service, client);
                first.source.set_port(40_000 + which as u16);
                let (_, output) = fixture.run(&first.bytes());
                let (source, to) = ends(&output);
                assert_eq!(to, service.backends[which].address);
                assert_eq!(source.ip(), service.backends[which].source());
                let flow = fixture.flow(&first).unwrap();
                assert_eq!(flow.forward, Forward::FullNat.number());
                let mut data = first.clone();
                data.payload = vec![1; 700];
                let expected = Expected::to_backend(&service, which, &data, source);
                fixture.expect("to the backend", &data.bytes(), expected);
                let transport = match first.transport.clone() {
                    Transport::Tcp { .. } => Transport::Tcp {
                        flags: SYN_ACK,
                        options: vec![],
                    },
                    other => other,
                };
                let reply = Frame::answer(service.backends[which].address, source, transport);
                let expected = Expected::to_client(&service, which, &reply, &first);
                fixture.expect("and back", &reply.bytes(), expected);
            }
        }
    }
}

#[test]
fn without_an_address_of_this_host_a_backend_gets_no_flow_to_its_own_service() {
    let mut fixture = Fixture::new();
    fixture.change_backend(&WEB, 0, |backend| backend.source = Address::default());
    let first = from_backend(&WEB, 1);
    let expected = Expected::dropped(NoSourceAddress).of(&WEB);
    fixture.expect("first", &first.bytes(), expected);
    // Other clients need none.
    let other = packet_of(WEB.protocol, "198.51.100.7:5000", WEB.vip);
    let expected = Expected::to_backend(&WEB, 0, &other, other.source).new_flow();
    fixture.expect("another client", &other.bytes(), expected);
}
