//! By which interface and link a packet leaves.

use std::{net::SocketAddr, process::Command, thread};

use lb_common::abi::{BackendFlags, Link, SettingsFlags};
use nix::{
    net::if_::if_nametoindex,
    sched::{CloneFlags, unshare},
};
use xlb::datapath::{AttachMode, kernel::Mode};

use crate::{
    fixture::{Expected, Fixture, INGRESS, REDIRECT, SHOP, SOURCE, TX, WEB},
    frame::{ACK, BALANCER_MAC, Frame, SYN, SYN_ACK, Transport, ends, tcp},
};

const CLIENT: &str = "198.51.100.7:5000";

#[test]
fn a_packet_whose_next_hop_is_unknown_is_rewritten_and_left_to_the_host() {
    let mut fixture = Fixture::new();
    fixture.change_backend(&WEB, 0, |backend| {
        backend.flags &= !BackendFlags::NEXT_HOP_KNOWN;
        backend.link = Link::default();
        backend.ifindex = 0;
    });
    let syn = tcp(CLIENT, WEB.vip, SYN);
    let output = syn.sent(syn.link, syn.source, WEB.backends[0].address).bytes();
    let expected = Expected::to_backend(&WEB, 0, &syn, syn.source).new_flow();
    fixture.expect("SYN", &syn.bytes(), expected.left_to_host(output));
    // The reply needs no next hop but that of the client, which is known.
    let reply = Frame::answer(
        WEB.backends[0].address,
        syn.source,
        Transport::Tcp {
            flags: SYN_ACK,
            options: vec![],
        },
    );
    let expected = Expected::to_client(&WEB, 0, &reply, &syn);
    fixture.expect("reply", &reply.bytes(), expected);
}

#[test]
fn a_next_hop_that_changes_is_followed_by_known_flows() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, WEB.vip, SYN);
    let ack = tcp(CLIENT, WEB.vip, ACK);
    fixture.run(&syn.bytes());
    let link = Link::new([0x02, 9, 9, 9, 9, 9], [0x02, 8, 8, 8, 8, 8]);
    fixture.change_backend(&WEB, 0, |backend| backend.link = link);
    let output = ack.sent(link, ack.source, WEB.backends[0].address).bytes();
    let expected = Expected::to_backend(&WEB, 0, &ack, ack.source);
    fixture.expect("ACK", &ack.bytes(), expected.with_output(output));
    fixture.change_backend(&WEB, 0, |backend| backend.ifindex = INGRESS + 1);
    assert_eq!(fixture.run(&ack.bytes()).0, REDIRECT);
}

#[test]
fn a_test_run_that_names_no_interface_is_told_what_one_interface_does() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, WEB.vip, SYN);
    fixture.all_slots(&WEB, WEB.backends[1].id);
    assert_eq!(fixture.run(&syn.bytes()).0, REDIRECT);
    // The loopback interface is the network's where the program is attached to it, else that of a test run alone.
    fixture.change_settings(|settings| settings.flags &= !SettingsFlags::ON_LOOPBACK);
    assert_eq!(fixture.run(&syn.bytes()).0, TX);
}

#[test]
fn replies_follow_the_client_to_another_router() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, WEB.vip, SYN);
    fixture.run(&syn.bytes());
    let mut ack = tcp(CLIENT, WEB.vip, ACK);
    ack.link = Link::new(BALANCER_MAC, [0x02, 7, 7, 7, 7, 7]);
    let expected = Expected::to_backend(&WEB, 0, &ack, ack.source);
    fixture.expect("ACK by another router", &ack.bytes(), expected);
    let reply = Frame::answer(
        WEB.backends[0].address,
        syn.source,
        Transport::Tcp {
            flags: ACK,
            options: vec![],
        },
    );
    let expected = Expected::to_client(&WEB, 0, &reply, &ack);
    fixture.expect("reply", &reply.bytes(), expected);
}

/// With interfaces that exist: a client's on one, a backend's on the other, each way out of the other one.
#[test]
fn packets_between_two_interfaces_are_redirected_both_ways() {
    // A thread of its own, because its network namespace goes with it.
    let test = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        for (one, other) in [("client0", "client1"), ("backend0", "backend1")] {
            let arguments = ["link", "add", one, "type", "veth", "peer", "name", other];
            assert!(Command::new("ip").args(arguments).status().unwrap().success());
            assert!(
                Command::new("ip")
                    .args(["link", "set", one, "up"])
                    .status()
                    .unwrap()
                    .success()
            );
        }
        let (client, backend) = (
            if_nametoindex("client0").unwrap(),
            if_nametoindex("backend0").unwrap(),
        );
        let mut fixture = Fixture::with_flow_table(1024);
        let interfaces = ["client0".to_owned(), "backend0".to_owned()];
        let attached = fixture.datapath().attach(&interfaces, Mode::Native).unwrap();
        assert!(
            attached
                .iter()
                .all(|attachment| attachment.mode == AttachMode::Native)
        );
        for service in [WEB, SHOP] {
            fixture.change_backend(&service, 0, |entry| entry.ifindex = backend);
            let syn = tcp(CLIENT, service.vip, SYN);
            let (verdict, output) = fixture.run_from(&syn.bytes(), Some(client));
            let (source, _) = ends(&output);
            assert_eq!(verdict, REDIRECT);
            assert_eq!(
                output,
                syn.sent(service.backends[0].link(), source, service.backends[0].address)
                    .bytes()
            );
            assert_eq!(fixture.client_link(&syn).unwrap().ifindex, client);

            let reply = Frame::answer(
                service.backends[0].address,
                source,
                Transport::Tcp {
                    flags: SYN_ACK,
                    options: vec![],
                },
            );
            let back = Link::new(syn.link.source(), syn.link.destination());
            let output = reply.sent(back, service.vip, syn.source).bytes();
            assert_eq!(
                fixture.run_from(&reply.bytes(), Some(backend)),
                (REDIRECT, output.clone())
            );
            // The client's packets come by the backend's interface from now on, and so go the replies.
            fixture.run_from(&tcp(CLIENT, service.vip, ACK).bytes(), Some(backend));
            assert_eq!(fixture.client_link(&syn).unwrap().ifindex, backend);
            assert_eq!(fixture.run_from(&reply.bytes(), Some(backend)), (TX, output));
        }
    });
    if let Err(panic) = test.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn the_source_that_full_nat_writes_is_the_backends() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, SHOP.vip, SYN);
    let (_, output) = fixture.run(&syn.bytes());
    assert_eq!(ends(&output).0.ip(), SOURCE);
    let other: std::net::IpAddr = "10.0.0.2".parse().unwrap();
    fixture.change_backend(&SHOP, 1, |backend| {
        backend.source = other.into();
    });
    fixture.all_slots(&SHOP, SHOP.backends[1].id);
    let mut syn = syn;
    syn.source = SocketAddr::new(syn.source.ip(), 5001);
    let (_, output) = fixture.run(&syn.bytes());
    assert_eq!(ends(&output).0.ip(), other);
}
