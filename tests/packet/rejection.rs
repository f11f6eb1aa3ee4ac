//! What no backend may get, and what belongs to a backend that was removed: the sender is told.

use lb_common::{
    abi::{
        BackendFlags,
        Reason::{NoBackend, NoFlow, Rejected, Reset},
        TCP, TcpState,
    },
    logic::icmp::{v4, v6},
};

use crate::{
    fixture::{
        DIRECT, DIRECT6, DNS, DNS6, EVERY, Expected, Fixture, GUE, GUE6, SHOP, SHOP6, TUNNEL, TUNNEL6,
        TestService, WEB, WEB6,
    },
    frame::{
        ACK, DESTINATION_OPTIONS, FIN_ACK, Frame, Outer, PSH, RST, RST_ACK, SYN, SYN_ACK, Transport, ends,
        options, tcp, udp,
    },
};

const ONE_WAY: [TestService; 6] = [DIRECT, DIRECT6, TUNNEL, TUNNEL6, GUE, GUE6];

fn client(service: &TestService) -> &'static str {
    if service.vip.is_ipv4() {
        "198.51.100.7:5000"
    } else {
        "[2001:db8:7::7]:5000"
    }
}

fn segment(service: &TestService, flags: u8) -> Frame {
    tcp(client(service), service.vip, flags)
}

/// RFC 9293 section 3.10.7.1: without ACK the reset acknowledges all that came, with it it has the sequence number
/// that the sender expects.
#[test]
fn a_segment_that_no_backend_may_get_is_answered_with_a_reset() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [WEB, SHOP, WEB6, SHOP6].into_iter().chain(ONE_WAY) {
        fixture.all_slots(&service, 0);
        for flags in [SYN, ACK, ACK | PSH, FIN_ACK] {
            for payload in [0, 1, 536, 1300] {
                for with_options in [false, true] {
                    let mut frame = segment(&service, flags);
                    frame.payload = vec![0xa5; payload];
                    frame.sequence = u32::MAX - 100;
                    frame.acknowledgement = 0x8765_4321;
                    frame.ttl = 3;
                    frame.trailer = vec![0; payload % 5];
                    if with_options {
                        frame.transport = Transport::Tcp {
                            flags,
                            options: vec![1; 40],
                        };
                        if service.vip.is_ipv4() {
                            frame.ip_options = vec![1; 12];
                        } else {
                            frame.extensions = vec![options(DESTINATION_OPTIONS, 2)];
                        }
                    }
                    let expected = Expected::answered(Rejected, frame.reset().bytes()).of(&service);
                    let what = format!("flags {flags:#x}, {payload} bytes, {service:?}");
                    fixture.expect(&what, &frame.bytes(), expected);
                }
            }
        }
        // There is no reset of a reset, and what answers nothing is none of a service's (RFC 9293 section 3.10.7.1).
        for flags in [RST, RST_ACK, SYN_ACK] {
            let frame = segment(&service, flags);
            let expected = Expected::dropped(NoFlow).of(&service);
            fixture.expect("no answer", &frame.bytes(), expected);
        }
    }
    assert!(fixture.flows().is_empty());
}

#[test]
fn a_datagram_that_no_backend_may_get_is_answered_with_port_unreachable() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [DNS, DNS6] {
        fixture.all_slots(&service, 0);
        let is_v4 = service.vip.is_ipv4();
        let error = if is_v4 {
            (v4::UNREACHABLE, v4::PORT_UNREACHABLE, 0)
        } else {
            (v6::UNREACHABLE, v6::PORT_UNREACHABLE, 0)
        };
        for payload in [0, 1, 2, 39, 40, 41, 500, 1300] {
            for checksum in [true, false] {
                let mut frame = udp(client(&service), service.vip);
                frame.transport = Transport::Udp { checksum };
                frame.payload = (0..payload).map(|at| at as u8 ^ 0x5a).collect();
                frame.traffic_class = 0xb8;
                frame.trailer = vec![0xee; payload % 4];
                // All headers, or those that are there.
                let (whole, short) = if is_v4 { (68, 28) } else { (88, 48) };
                let quoted = if frame.ip_bytes().len() >= whole {
                    whole
                } else {
                    short
                };
                let expected = Expected::answered(Rejected, frame.error(error, quoted).bytes());
                let what = format!("{payload} bytes, {service:?}");
                fixture.expect(&what, &frame.bytes(), expected.of(&service));
            }
        }
        let mut frame = udp(client(&service), service.vip);
        frame.payload = vec![1; 100];
        if is_v4 {
            frame.ip_options = vec![1; 40];
        } else {
            frame.extensions = vec![options(DESTINATION_OPTIONS, 2)];
        }
        let quoted = if is_v4 { 68 } else { 88 };
        let expected = Expected::answered(Rejected, frame.error(error, quoted).bytes());
        fixture.expect("with options", &frame.bytes(), expected.of(&service));
        // Its ports would not be in what can be quoted.
        frame.payload = vec![];
        if is_v4 {
            frame.ip_options = vec![1; 36];
        } else {
            frame.extensions = vec![options(DESTINATION_OPTIONS, 3)];
        }
        frame.payload = vec![];
        let expected = Expected::dropped(NoBackend).of(&service);
        fixture.expect("short with options", &frame.bytes(), expected);
    }
    assert!(fixture.flows().is_empty());
}

fn resets(fixture: &mut Fixture, service: &TestService) {
    fixture.change_backend(service, 0, |backend| {
        backend.flags = BackendFlags::NEXT_HOP_KNOWN | BackendFlags::REMOVED | BackendFlags::RESETS;
    });
    fixture.all_slots(service, service.backends[1].id);
}

fn state(fixture: &mut Fixture, frame: &Frame) -> TcpState {
    fixture.flow(frame).unwrap().tcp_state
}

#[test]
fn segments_of_both_ends_of_a_removed_backends_flow_are_answered_with_resets() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [WEB, SHOP, WEB6, SHOP6] {
        let syn = segment(&service, SYN);
        let source = ends(&fixture.run(&syn.bytes()).1).0;
        fixture.run(&segment(&service, ACK).bytes());
        let live = fixture.live(service.backends[0].id);
        assert_eq!(live, 1);
        resets(&mut fixture, &service);
        for payload in [0, 1, 1300] {
            let mut data = segment(&service, ACK | PSH);
            data.payload = vec![0xa5; payload];
            let expected = Expected::answered(Reset, data.reset().bytes()).of(&service);
            fixture.expect("client", &data.bytes(), expected);
            assert_eq!(state(&mut fixture, &syn), TcpState::Closed);
            assert_eq!(
                fixture.live(service.backends[0].id),
                0,
                "once, not for each segment"
            );
            // To the backend, in the client's name: the ends are those that it has sent to.
            let transport = Transport::Tcp {
                flags: ACK | PSH,
                options: vec![],
            };
            let mut data = Frame::answer(service.backends[0].address, source, transport);
            data.payload = vec![0x5a; payload];
            let expected = Expected::answered(Reset, data.reset().bytes()).of(&service);
            fixture.expect("backend", &data.bytes(), expected);
        }
        // What ends the flow anyway is sent on.
        let rst = segment(&service, RST);
        let expected = Expected::to_backend(&service, 0, &rst, source);
        fixture.expect("RST of the client", &rst.bytes(), expected);
        let transport = Transport::Tcp {
            flags: RST_ACK,
            options: vec![],
        };
        let rst = Frame::answer(service.backends[0].address, source, transport);
        let expected = Expected::to_client(&service, 0, &rst, &syn);
        fixture.expect("RST of the backend", &rst.bytes(), expected);
        // A new connection of the same ports goes elsewhere.
        let (_, output) = fixture.run(&syn.bytes());
        assert_eq!(ends(&output).1, service.backends[1].address);
        assert_eq!(fixture.flow(&syn).unwrap().backend, service.backends[1].id);
    }
}

/// The backend's own segment is the first that comes by.
#[test]
fn a_removed_backends_segment_is_answered_before_any_of_the_client() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [WEB, SHOP6] {
        let syn = segment(&service, SYN);
        let source = ends(&fixture.run(&syn.bytes()).1).0;
        resets(&mut fixture, &service);
        let transport = Transport::Tcp {
            flags: SYN_ACK,
            options: vec![2, 4, 5, 0xb4],
        };
        let syn_ack = Frame::answer(service.backends[0].address, source, transport);
        let expected = Expected::answered(Reset, syn_ack.reset().bytes()).of(&service);
        fixture.expect("SYN, ACK", &syn_ack.bytes(), expected);
        assert_eq!(state(&mut fixture, &syn), TcpState::Closed);
        assert_eq!(fixture.live(service.backends[0].id), 0);
    }
}

/// Where the backend's segments do not come by, the client's first is what its reset is made of.
#[test]
fn the_first_segment_of_a_one_way_flow_becomes_a_reset_for_the_backend_and_the_next_are_answered() {
    let mut fixture = Fixture::of(&EVERY);
    for service in ONE_WAY {
        for (number, payload) in [0, 1, 1300].into_iter().enumerate() {
            let of_flow = |flags| {
                let mut frame = segment(&service, flags);
                frame.source.set_port(5000 + number as u16);
                frame
            };
            fixture.change_backend(&service, 0, |_| ());
            fixture.all_slots(&service, service.backends[0].id);
            let before = fixture.live(service.backends[0].id);
            let (_, output) = fixture.run(&of_flow(SYN).bytes());
            fixture.run(&of_flow(ACK).bytes());
            assert_eq!(fixture.live(service.backends[0].id), before + 1);
            resets(&mut fixture, &service);

            let mut data = of_flow(ACK | PSH);
            data.payload = vec![0xa5; payload];
            data.transport = Transport::Tcp {
                flags: ACK | PSH,
                options: vec![1; 12],
            };
            data.trailer = vec![0; payload % 3];
            if service.vip.is_ipv4() {
                data.ip_options = vec![1; 4];
            } else {
                data.extensions = vec![options(DESTINATION_OPTIONS, 1)];
            }
            let reset = Frame {
                transport: Transport::Tcp {
                    flags: RST,
                    options: vec![],
                },
                window: 0,
                payload: vec![],
                trailer: vec![],
                ..data.clone()
            };
            let expected = if [DIRECT.id, DIRECT6.id].contains(&service.id) {
                Expected::direct(&service, 0, &reset)
            } else {
                let outer = Outer::of(&output);
                let is_gue = [GUE.id, GUE6.id].contains(&service.id);
                Expected::forwarded(
                    &service,
                    0,
                    reset.encapsulated(&Outer {
                        source_port: outer.source_port.filter(|_| is_gue),
                        ..outer
                    }),
                )
            };
            fixture.expect("first", &data.bytes(), expected);
            assert_eq!(state(&mut fixture, &data), TcpState::Closed);
            assert_eq!(fixture.live(service.backends[0].id), before);
            for flags in [ACK, ACK | PSH, FIN_ACK] {
                let next = of_flow(flags);
                let expected = Expected::answered(Reset, next.reset().bytes()).of(&service);
                fixture.expect("next", &next.bytes(), expected);
            }
            let rst = of_flow(RST);
            let (verdict, _) = fixture.run(&rst.bytes());
            assert_eq!(verdict, service.backends[0].verdict(), "is sent on");
        }
    }
}

#[test]
fn fragments_and_datagrams_of_a_removed_backend_are_not_reset() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [WEB, WEB6, DIRECT, TUNNEL6] {
        let mut data = segment(&service, ACK);
        fixture.run(&data.bytes());
        resets(&mut fixture, &service);
        data.payload = vec![1; 2000];
        for part in data.fragments(&[0, 1400]) {
            let expected = Expected::dropped(NoBackend).of(&service);
            fixture.expect("fragment", &part, expected);
        }
    }
    for service in [DNS, DNS6] {
        assert_ne!(service.protocol, TCP);
        let query = udp(client(&service), service.vip);
        fixture.run(&query.bytes());
        fixture.change_backend(&service, 0, |backend| backend.flags |= BackendFlags::RESETS);
        let expected = Expected::to_backend(&service, 0, &query, query.source);
        fixture.expect("datagram", &query.bytes(), expected);
    }
}
