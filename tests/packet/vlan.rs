//! VLAN tags: one or two on the client's side, one or two on the backend's, or none.

use lb_common::{
    abi::{
        BackendFlags,
        Reason::{EchoAnswered, NotIp, Rejected, TooBigAnswered},
        TCP, Tags,
    },
    logic::icmp,
};

use crate::{
    fixture::{
        DIRECT, DIRECT6, DNS, DNS6, EVERY, Expected, Fixture, GUE, GUE6_UDP, PASS, SHOP, SHOP6, TUNNEL,
        TUNNEL6_UDP, TX, TestService, WEB, WEB6,
    },
    frame::{ACK, Frame, IP, Outer, SYN, SYN_ACK, Transport, ends, icmp, packet_of, service_vlan, tcp, vlan},
};

fn tags() -> [Tags; 5] {
    [
        Tags::default(),
        Tags([vlan(100), 0]),
        // The priority bits are part of a tag.
        Tags([vlan(0xe064), 0]),
        Tags([service_vlan(7), vlan(100)]),
        Tags([vlan(1), vlan(4094)]),
    ]
}

fn client(service: &TestService) -> &'static str {
    if service.vip.is_ipv4() {
        "198.51.100.7:5000"
    } else {
        "[2001:db8:7::7]:5000"
    }
}

fn tagged(service: &TestService, tags: Tags) -> Frame {
    let mut frame = packet_of(service.protocol, client(service), service.vip);
    frame.tags = tags;
    frame
}

#[test]
fn each_side_has_its_own_tags_and_replies_regain_those_of_the_client() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [WEB, SHOP, DNS, WEB6, SHOP6, DNS6] {
        for (number, of_client) in tags().into_iter().enumerate() {
            for of_backend in tags() {
                let what = format!("{of_client:x?} to {of_backend:x?}");
                fixture.change_backend(&service, 0, |backend| backend.tags = of_backend);
                let mut frame = tagged(&service, of_client);
                frame.source.set_port(5000 + number as u16);
                let (verdict, output) = fixture.run(&frame.bytes());
                assert_eq!(verdict, TX, "{what}");
                let untagged = Frame {
                    tags: Tags::default(),
                    ..frame.clone()
                };
                let (_, plain) = fixture.run(&untagged.bytes());
                let backend = &service.backends[0];
                let sent = |source| {
                    frame
                        .sent(backend.link(), source, backend.address)
                        .on(backend.link(), of_backend)
                };
                assert_eq!(output, plain, "{what}: the tags of the client make no difference");
                let at = IP + of_backend.count() as usize * 4;
                let mut without = output[..12].to_vec();
                without.extend_from_slice(&output[at - 2..]);
                let source = ends(&without).0;
                assert_eq!(output, sent(source).bytes(), "{what}");
                let expected = Expected::forwarded(&service, 0, sent(source).bytes());
                fixture.expect(&what, &frame.bytes(), expected);

                let transport = match service.protocol {
                    TCP => Transport::Tcp {
                        flags: SYN_ACK,
                        options: vec![],
                    },
                    _ => Transport::Udp { checksum: true },
                };
                let mut reply = Frame::answer(backend.address, source, transport);
                reply.tags = of_backend;
                reply.trailer = vec![0; 5];
                let expected = Expected::to_client(&service, 0, &reply, &frame);
                fixture.expect(&what, &reply.bytes(), expected);
            }
        }
    }
}

#[test]
fn a_packet_that_is_sent_on_as_it_is_gets_the_tags_of_the_backend() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [DIRECT, DIRECT6] {
        for of_client in tags() {
            for of_backend in tags() {
                fixture.change_backend(&service, 0, |backend| backend.tags = of_backend);
                let frame = tagged(&service, of_client);
                fixture.run(&frame.bytes());
                let link = service.backends[0].link();
                let sent = frame.sent(link, frame.source, frame.destination);
                let expected = Expected::forwarded(&service, 0, sent.on(link, of_backend).bytes());
                let what = format!("{of_client:x?} to {of_backend:x?}");
                fixture.expect(&what, &frame.bytes(), expected);
            }
        }
    }
}

#[test]
fn a_packet_that_is_encapsulated_loses_its_tags_and_gets_those_of_the_backend() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [TUNNEL, GUE, TUNNEL6_UDP, GUE6_UDP] {
        for which in [0, 1] {
            fixture.all_slots(&service, service.backends[which].id);
            let mut frame = tagged(&service, Tags::default());
            frame.source.set_port(5000 + which as u16);
            let outer = Outer::of(&fixture.run(&frame.bytes()).1);
            let is_gue = [GUE.id, GUE6_UDP.id].contains(&service.id);
            let outer = Outer {
                source_port: outer.source_port.filter(|_| is_gue),
                ..outer
            };
            for of_client in tags() {
                for of_backend in tags() {
                    fixture.change_backend(&service, which, |backend| backend.tags = of_backend);
                    frame.tags = of_client;
                    let outer = Outer {
                        tags: of_backend,
                        ..outer
                    };
                    let expected = Expected::forwarded(&service, which, frame.encapsulated(&outer));
                    let what = format!("{of_client:x?} to {of_backend:x?}");
                    fixture.expect(&what, &frame.bytes(), expected);
                }
            }
        }
    }
}

#[test]
fn replies_follow_the_client_to_other_tags() {
    let mut fixture = Fixture::new();
    let first = tagged(&WEB, Tags([vlan(100), 0]));
    fixture.run(&first.bytes());
    let other = tagged(&WEB, Tags([service_vlan(7), vlan(200)]));
    let inner_alone = tagged(&WEB, Tags([service_vlan(7), vlan(201)]));
    let untagged = tagged(&WEB, Tags::default());
    for frame in [first, other, inner_alone, untagged] {
        fixture.run(&frame.bytes());
        assert_eq!(fixture.client_link(&frame).unwrap().tags, frame.tags);
        let transport = Transport::Tcp {
            flags: ACK,
            options: vec![],
        };
        let reply = Frame::answer(WEB.backends[0].address, frame.source, transport);
        let expected = Expected::to_client(&WEB, 0, &reply, &frame);
        fixture.expect("reply", &reply.bytes(), expected);
    }
    assert_eq!(fixture.flows().len(), 1);
}

#[test]
fn a_tagged_packet_that_is_left_to_the_host_keeps_its_tags() {
    let mut fixture = Fixture::of(&[WEB, WEB6]);
    for service in [WEB, WEB6] {
        fixture.change_backend(&service, 0, |backend| {
            backend.flags &= !BackendFlags::NEXT_HOP_KNOWN;
            backend.tags = Tags([vlan(9), 0]);
        });
        for tags in tags() {
            let frame = tagged(&service, tags);
            let (verdict, _) = fixture.run(&frame.bytes());
            assert_eq!(verdict, PASS);
            let output = frame
                .sent(frame.link, frame.source, service.backends[0].address)
                .bytes();
            let expected = Expected::forwarded(&service, 0, vec![]).left_to_host(output);
            fixture.expect("next hop unknown", &frame.bytes(), expected);
        }
    }
}

#[test]
fn answers_carry_the_tags_of_what_they_answer() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [WEB, WEB6] {
        fixture.all_slots(&service, 0);
    }
    for tags in tags() {
        for (service, echo, reply) in [
            (WEB, icmp::v4::ECHO, icmp::v4::ECHO_REPLY),
            (WEB6, icmp::v6::ECHO, icmp::v6::ECHO_REPLY),
        ] {
            let what = format!("{tags:x?}");
            let source = client(&service)
                .rsplit_once(':')
                .unwrap()
                .0
                .trim_matches(['[', ']']);
            let mut request = icmp(source, service.vip.ip(), (echo, 0, 0x0007_0001), b"ping");
            request.tags = tags;
            let mut answer = request.clone();
            answer.link = request.back();
            (answer.source, answer.destination) = (request.destination, request.source);
            answer.transport = Transport::Icmp {
                kind: reply,
                code: 0,
                word: 0x0007_0001,
            };
            let expected = Expected::answered(EchoAnswered, answer.bytes());
            fixture.expect(&format!("echo, {what}"), &request.bytes(), expected);

            let mut syn = tcp(client(&service), service.vip, SYN);
            syn.tags = tags;
            let expected = Expected::answered(Rejected, syn.reset().bytes()).of(&service);
            fixture.expect(&format!("reset, {what}"), &syn.bytes(), expected);
        }
        for (service, error, quoted, mtu) in [
            (
                TUNNEL,
                (icmp::v4::UNREACHABLE, icmp::v4::FRAGMENTATION_NEEDED, 1480),
                68,
                1480,
            ),
            (GUE6_UDP, (icmp::v6::TOO_BIG, 0, 1472), 88, 1472),
        ] {
            let mut frame = tagged(&service, tags);
            fixture.run(&frame.bytes());
            frame.payload = vec![1; mtu];
            let expected = Expected::answered(TooBigAnswered, frame.error(error, quoted).bytes());
            fixture.expect("too big", &frame.bytes(), expected.of(&service));
        }
    }
}

#[test]
fn what_is_behind_a_third_tag_is_none_of_ours() {
    let mut fixture = Fixture::new();
    let frame = tagged(&WEB, Tags([service_vlan(7), vlan(100)]));
    let mut bytes = frame.bytes();
    bytes.splice(20..20, [0x81, 0x00, 0x00, 0x05]);
    fixture.expect("three tags", &bytes, Expected::passed(NotIp));
    let one = tagged(&WEB, Tags([vlan(100), 0])).bytes();
    for length in 14..18 + 20 {
        fixture.expect("cut", &one[..length], Expected::passed(NotIp));
    }
    let two = frame.bytes();
    for length in 14..22 + 20 {
        fixture.expect("cut", &two[..length], Expected::passed(NotIp));
    }
}
