//! VIPs that the balancer itself answers ARP for.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use tests::{
    daemon::{Daemon, outcome},
    http::Connection,
    machine::{self, eventually},
    services::Service,
};
use xlb::lab::Topology;

use crate::scene::{INTERFACES, nginx, topology};

/// In the client's own network, so that it asks by ARP instead of sending to a router.
const ON_LINK: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 100);

fn on_link(name: &str, vip: Ipv4Addr) -> Service {
    Service::tcp(name)
        .text("vip", &vip.to_string())
        .backend("a", "10.2.1.2:8080")
        .backend("b", "10.2.2.2:8080")
}

/// Whether the balancer has an address.
fn has(topology: &Topology, address: Ipv4Addr) -> bool {
    let bound = topology.balancer.run(|| UdpSocket::bind((address, 0)));
    bound.unwrap().is_ok()
}

#[test]
fn a_client_on_the_link_reaches_an_assigned_vip_until_it_is_given_up() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    let server = SocketAddr::new(ON_LINK.into(), 80);

    daemon.configure(&INTERFACES, &[on_link("web", ON_LINK)]);
    daemon.start_up();
    assert!(!has(&topology, ON_LINK));
    Connection::open(&topology.client, server).expect_err("nobody answers for a vip that is not assigned");

    daemon.configure(&INTERFACES, &[on_link("web", ON_LINK).with("assign-vip", true)]);
    daemon.done(&["reload"]);
    assert!(has(&topology, ON_LINK));
    let reached = || {
        Connection::open(&topology.client, server)
            .and_then(|mut open| open.get("/"))
            .is_ok()
    };
    // The client remembers for a moment that nobody answered.
    eventually("the vip is reached", Duration::from_secs(10), reached);
    let mut curl = topology.client.command(machine::CURL);
    let answer = outcome(curl.args([
        "--silent",
        "--fail",
        "--max-time",
        "30",
        &format!("http://{server}/"),
    ]));
    assert!(["a\n", "b\n"].contains(&answer.stdout.as_str()), "{answer:?}");

    // It stays while no daemon runs.
    daemon.kill();
    assert!(has(&topology, ON_LINK) && reached());
    daemon.start();
    assert!(has(&topology, ON_LINK) && reached());

    daemon.configure(&INTERFACES, &[on_link("web", ON_LINK)]);
    daemon.done(&["reload"]);
    assert!(!has(&topology, ON_LINK));

    daemon.configure(&INTERFACES, &[on_link("web", ON_LINK).with("assign-vip", true)]);
    daemon.done(&["reload"]);
    assert!(has(&topology, ON_LINK));
    daemon.terminate();
    assert!(has(&topology, ON_LINK));
    daemon.done(&["detach"]);
    assert!(!has(&topology, ON_LINK));
}

#[test]
fn an_address_of_somebody_else_stays_as_it_is() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let foreign = Ipv4Addr::new(10, 1, 0, 101);
    topology
        .balancer
        .add_address("eth0", &format!("{foreign}/24"))
        .unwrap();
    let mut daemon = Daemon::new(&topology.balancer);
    let own = on_link("own", ON_LINK).with("assign-vip", true);
    daemon.configure(
        &INTERFACES,
        &[own, on_link("foreign", foreign).with("assign-vip", true)],
    );
    daemon.start_up();
    for vip in [ON_LINK, foreign] {
        let server = SocketAddr::new(vip.into(), 80);
        let answer = Connection::open(&topology.client, server)
            .unwrap()
            .get("/")
            .unwrap();
        assert!(["a", "b"].contains(&answer.as_str()), "{vip}: {answer}");
    }
    daemon.configure(&INTERFACES, &[]);
    daemon.done(&["reload"]);
    assert!(!has(&topology, ON_LINK) && has(&topology, foreign));
    daemon.terminate();
    daemon.done(&["detach"]);
    for address in [foreign, Topology::BALANCER, "10.2.1.1".parse().unwrap()] {
        assert!(has(&topology, address), "{address} has gone");
    }
}
