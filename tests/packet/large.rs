//! Frames in several buffers, as with an MTU of 9,000 bytes.

use lb_common::{
    abi::{
        BackendFlags,
        Reason::{BadIpLength, NotForService, Rejected, Reset, TooBigAnswered},
        Tags,
    },
    logic::icmp,
};

use crate::{
    fixture::{
        DIRECT, DIRECT6, DNS, DNS6, EVERY, Expected, Fixture, GUE, GUE6_UDP, SHOP, SHOP6, TUNNEL, TUNNEL6,
        TX, TestService, WEB, WEB6,
    },
    frame::{Frame, Outer, address, ends, packet_of, vlan},
};

/// More than a page, which is what one buffer has.
const LENGTH: usize = 6000;

fn client(service: &TestService) -> &'static str {
    if service.vip.is_ipv4() {
        "198.51.100.7:5000"
    } else {
        "[2001:db8:7::7]:5000"
    }
}

/// A packet whose frame has [`LENGTH`] bytes.
fn large(service: &TestService) -> Frame {
    let mut frame = packet_of(service.protocol, client(service), service.vip);
    frame.payload = vec![];
    let headers = frame.bytes().len();
    frame.payload = (0..LENGTH - headers).map(|at| (at * 31) as u8).collect();
    frame
}

#[test]
fn a_large_frame_is_translated_both_ways() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [WEB, SHOP, DNS, WEB6, SHOP6, DNS6] {
        let frame = large(&service);
        assert_eq!(frame.bytes().len(), LENGTH);
        let (verdict, output) = fixture.run(&frame.bytes());
        assert_eq!((verdict, output.len()), (TX, LENGTH));
        let small = Frame {
            payload: vec![],
            ..frame.clone()
        };
        let source = ends(&fixture.run(&small.bytes()).1).0;
        let expected = Expected::to_backend(&service, 0, &frame, source);
        fixture.expect("to the backend", &frame.bytes(), expected);
        let mut reply = Frame::answer(service.backends[0].address, source, frame.transport.clone());
        reply.payload = frame.payload.clone();
        let expected = Expected::to_client(&service, 0, &reply, &frame);
        fixture.expect("and back", &reply.bytes(), expected);
        // With other tags, which moves the header.
        fixture.change_backend(&service, 0, |backend| backend.tags = Tags([vlan(7), vlan(8)]));
        let link = service.backends[0].link();
        let sent = frame.sent(link, source, service.backends[0].address);
        let output = sent.on(link, Tags([vlan(7), vlan(8)])).bytes();
        fixture.expect(
            "with tags",
            &frame.bytes(),
            Expected::forwarded(&service, 0, output),
        );
    }
}

#[test]
fn a_large_frame_is_sent_on_and_encapsulated() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [DIRECT, DIRECT6] {
        let frame = large(&service);
        let expected = Expected::direct(&service, 0, &frame).new_flow();
        fixture.expect("dsr", &frame.bytes(), expected);
    }
    for service in [TUNNEL, TUNNEL6, GUE, GUE6_UDP] {
        for which in [0, 1] {
            fixture.all_slots(&service, service.backends[which].id);
            let mut frame = large(&service);
            frame.source.set_port(5000 + which as u16);
            let small = Frame {
                payload: vec![],
                ..frame.clone()
            };
            let outer = Outer::of(&fixture.run(&small.bytes()).1);
            let is_gue = [GUE.id, GUE6_UDP.id].contains(&service.id);
            let outer = Outer {
                source_port: outer.source_port.filter(|_| is_gue),
                ..outer
            };
            fixture.change_backend(&service, which, |backend| backend.mtu = 9000);
            let expected = Expected::forwarded(&service, which, frame.encapsulated(&outer));
            fixture.expect("fits", &frame.bytes(), expected);
            fixture.change_backend(&service, which, |_| ());
            let overhead = if service.backends[which].address.is_ipv4() {
                20
            } else {
                40
            };
            let fits = 1500 - overhead - if is_gue { 8 } else { 0 };
            let (error, quoted) = if service.vip.is_ipv4() {
                ((icmp::v4::UNREACHABLE, icmp::v4::FRAGMENTATION_NEEDED, fits), 68)
            } else {
                ((icmp::v6::TOO_BIG, 0, fits), 88)
            };
            let expected = Expected::answered(TooBigAnswered, frame.error(error, quoted).bytes());
            fixture.expect("does not fit", &frame.bytes(), expected.of(&service));
        }
    }
}

#[test]
fn a_large_frame_is_cut_to_what_answers_it() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [WEB, WEB6] {
        let frame = large(&service);
        fixture.run(&frame.bytes());
        fixture.change_backend(&service, 0, |backend| backend.flags |= BackendFlags::RESETS);
        let expected = Expected::answered(Reset, frame.reset().bytes()).of(&service);
        fixture.expect("reset", &frame.bytes(), expected);
    }
    for service in [DNS, DNS6] {
        fixture.all_slots(&service, 0);
        let frame = large(&service);
        let (error, quoted) = if service.vip.is_ipv4() {
            ((icmp::v4::UNREACHABLE, icmp::v4::PORT_UNREACHABLE, 0), 68)
        } else {
            ((icmp::v6::UNREACHABLE, icmp::v6::PORT_UNREACHABLE, 0), 88)
        };
        let expected = Expected::answered(Rejected, frame.error(error, quoted).bytes());
        fixture.expect("unreachable", &frame.bytes(), expected.of(&service));
    }
}

/// That it is longer than what is viewed of it is asked of the kernel only where its header says so.
#[test]
fn a_large_frame_for_another_host_is_counted_whole() {
    let mut fixture = Fixture::of(&EVERY);
    for (service, elsewhere) in [(WEB, "203.0.113.200:80"), (WEB6, "[2001:db8:ffff::1]:80")] {
        let mut frame = large(&service);
        frame.destination = address(elsewhere);
        fixture.expect("large", &frame.bytes(), Expected::passed(NotForService));
        frame.payload.truncate(100);
        fixture.expect("small", &frame.bytes(), Expected::passed(NotForService));
    }
}

/// The end of a frame is the end of its last buffer.
#[test]
fn a_large_frame_is_as_long_as_all_of_its_buffers() {
    let mut fixture = Fixture::of(&EVERY);
    for service in [WEB, WEB6] {
        let frame = large(&service);
        let whole = frame.bytes();
        let (verdict, output) = fixture.run(&whole[..LENGTH - 1]);
        assert_eq!(
            (verdict, &output[..]),
            (crate::fixture::DROP, &whole[..LENGTH - 1])
        );
        let counted = fixture.counted();
        assert_eq!(
            counted.reasons[&(None, BadIpLength)].packets,
            1 + u64::from(service.id == WEB6.id)
        );
        fixture.expect(
            "whole",
            &whole,
            Expected::to_backend(&service, 0, &frame, frame.source).new_flow(),
        );
        // What follows the packet in the frame is kept.
        let mut padded = frame.clone();
        padded.trailer = vec![0xee; 100];
        let (verdict, output) = fixture.run(&padded.bytes());
        let sent = padded.sent(
            service.backends[0].link(),
            padded.source,
            service.backends[0].address,
        );
        assert_eq!((verdict, output), (TX, sent.bytes()));
    }
}
