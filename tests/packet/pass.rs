//! What is for no service leaves as it came.

use std::net::SocketAddr;

use lb_common::{
    abi::Reason::{NotForService, NotIp},
    logic::headers::{Packet, Undecodable, decode},
};

use crate::{
    fixture::{DNS, Expected, Fixture, WEB},
    frame::{ACK, FIN, IP, SYN, TRANSPORT, address, tcp, udp},
};

const CLIENT: &str = "198.51.100.7:5000";

#[test]
fn a_frame_that_is_not_ip_passes_as_it_came() {
    let mut fixture = Fixture::new();
    let with_type = |ether_type: u16| {
        let mut bytes = tcp(CLIENT, WEB.vip, SYN).bytes();
        bytes[12..14].copy_from_slice(&ether_type.to_be_bytes());
        bytes
    };
    for (what, ether_type) in [
        ("ARP", 0x0806),
        ("a VLAN tag before what is none", 0x8100),
        ("an 802.3 length", 46),
        ("type 0", 0),
        ("0x0800 with its bytes swapped", 0x0008),
    ] {
        fixture.expect(what, &with_type(ether_type), Expected::passed(NotIp));
    }
}

#[test]
fn an_ipv4_frame_without_a_whole_ip_header_passes_as_it_came() {
    let mut fixture = Fixture::new();
    let whole = tcp(CLIENT, WEB.vip, SYN).bytes();
    for length in 14..TRANSPORT {
        fixture.expect(
            &format!("{length} bytes"),
            &whole[..length],
            Expected::passed(NotIp),
        );
    }
}

#[test]
fn short_garbage_of_every_length_passes_as_it_came() {
    let mut fixture = Fixture::new();
    for length in 14..=60 {
        for fill in [0x00, 0xff, 0x45] {
            fixture.expect(
                &format!("{length} times {fill:#x}"),
                &vec![fill; length],
                Expected::passed(NotIp),
            );
        }
    }
}

#[test]
fn a_packet_for_another_destination_passes_as_it_came() {
    let mut fixture = Fixture::new();
    let port = |vip: SocketAddr, port| SocketAddr::new(vip.ip(), port);
    for (what, frame) in [
        ("other port of the VIP", tcp(CLIENT, port(WEB.vip, 81), SYN)),
        ("other protocol on the VIP", udp(CLIENT, WEB.vip)),
        ("TCP to a UDP service", tcp(CLIENT, DNS.vip, SYN)),
        ("other address", tcp(CLIENT, address("203.0.113.11:80"), SYN)),
        ("a backend itself", tcp(CLIENT, WEB.backends[0].address, SYN)),
        (
            "from a backend, no reply",
            tcp("10.0.0.11:8080", address("198.51.100.7:5000"), ACK),
        ),
        ("time to live of 1", {
            let mut frame = udp(CLIENT, address("203.0.113.11:53"));
            frame.ttl = 1;
            frame
        }),
    ] {
        fixture.expect(what, &frame.bytes(), Expected::passed(NotForService));
    }
    assert!(fixture.flows().is_empty());
}

#[test]
fn another_protocol_than_tcp_and_udp_passes_as_it_came() {
    let mut fixture = Fixture::new();
    for (what, protocol) in [("ICMP", 1), ("IPIP", 4), ("GRE", 47), ("SCTP", 132), ("255", 255)] {
        let mut bytes = udp(CLIENT, WEB.vip).bytes();
        bytes[IP + 9] = protocol;
        fixture.expect(what, &bytes, Expected::passed(NotForService));
    }
}

#[test]
fn an_instance_without_services_passes_everything() {
    let mut fixture = Fixture::empty(1024);
    for frame in [
        tcp(CLIENT, WEB.vip, SYN),
        tcp(CLIENT, WEB.vip, FIN),
        udp(CLIENT, DNS.vip),
    ] {
        fixture.expect(
            &format!("{frame:?}"),
            &frame.bytes(),
            Expected::passed(NotForService),
        );
    }
}

/// Not one bit of a header makes the program touch a packet that the VIP is not the destination of.
#[test]
fn a_packet_for_another_destination_passes_whichever_bit_of_its_headers_is_flipped() {
    let mut fixture = Fixture::new();
    for frame in [
        tcp(CLIENT, address("203.0.113.200:80"), SYN),
        udp(CLIENT, address("203.0.113.200:53")),
    ] {
        let whole = frame.bytes();
        for bit in 0..(TRANSPORT + 20) * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 0x80 >> (bit % 8);
            let reason = match decode(&&bytes[..], &mut Packet::default()) {
                Err(Undecodable::NotTransport(reason)) => reason,
                _ => NotForService,
            };
            fixture.expect(&format!("bit {bit}"), &bytes, Expected::passed(reason));
        }
    }
}

#[test]
fn a_frame_for_a_group_of_hosts_passes_as_it_came() {
    let mut fixture = Fixture::new();
    for (what, mac) in [
        ("broadcast", [0xff; 6]),
        ("multicast", [0x01, 0x00, 0x5e, 0x01, 0x02, 0x03]),
    ] {
        let mut bytes = tcp(CLIENT, WEB.vip, SYN).bytes();
        bytes[..6].copy_from_slice(&mac);
        fixture.expect(what, &bytes, Expected::passed(NotForService));
    }
    assert!(fixture.flows().is_empty());
}
