//! Which backends new flows may have, and what clients get when there is none.

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use tests::{daemon::Daemon, echo, http::Connection, load::requests, machine, services::Service};
use xlb::{lab::Family, model::Health};

use crate::{
    matrix::{self, Forward, Group},
    scene::{
        INTERFACES, WEB, balance, configure, connection_to, counted, nginx, source, topology, topology_of,
        web,
    },
};

/// Probed where nobody listens.
const DOWN: &str = "type = \"tcp\"\nport = 9\ninterval = \"200ms\"\nfall = 1";

fn wait_until_down(daemon: &Daemon) {
    daemon.wait_for("all backends are down", |status| {
        let mut backends = status.services[0].backends.iter();
        backends.all(|backend| backend.health == Health::Down && backend.next_hop_problem.is_none())
    });
}

#[test]
fn without_a_backend_that_is_up_connections_are_refused_at_once() {
    for forward in [Forward::Nat, Forward::Gue] {
        for family in Family::ALL {
            let group = Group {
                forward,
                vip: family,
                backends: family,
            };
            let topology = topology_of(2);
            let mut daemon = Daemon::new(&topology.balancer);
            let names = ["a", "b"];
            configure(
                &daemon,
                &topology,
                &[matrix::of_group(Service::tcp("web"), group, &names).health(DOWN)],
            );
            daemon.start();
            wait_until_down(&daemon);
            let connect =
                || TcpStream::connect_timeout(&group.server(), machine::bound(Duration::from_secs(10)));
            let connected = topology
                .client
                .run(connect)
                .unwrap()
                .map_err(|error| error.kind());
            assert_eq!(connected.unwrap_err(), ErrorKind::ConnectionRefused, "{group:?}");
            // The first segment was answered; a client that hears nothing sends it again.
            assert_eq!(counted(&daemon, "rejected"), 1, "{group:?}");
            assert_eq!(daemon.status().packets.dropped, 0, "{group:?}");
        }
    }
}

#[test]
fn without_a_backend_that_is_up_datagrams_are_refused_at_once() {
    for family in Family::ALL {
        let group = Group {
            forward: Forward::Nat,
            vip: family,
            backends: family,
        };
        let topology = topology_of(1);
        let mut daemon = Daemon::new(&topology.balancer);
        let service = matrix::of_group(Service::udp("dns"), group, &["a"]).health(DOWN);
        configure(&daemon, &topology, &[service]);
        daemon.start();
        wait_until_down(&daemon);
        let address = topology.client_addresses_of(family).next().unwrap();
        for length in [0, 5, 1400] {
            let ask = || {
                let socket = echo::udp_socket(SocketAddr::new(address, 0))?;
                socket.connect(group.server())?;
                socket.send(&vec![7; length])?;
                socket.recv(&mut [0; 16])
            };
            let asked = topology.client.run(ask).unwrap().map_err(|error| error.kind());
            assert_eq!(
                asked,
                Err(ErrorKind::ConnectionRefused),
                "{family:?}, {length} bytes"
            );
        }
        assert_eq!(counted(&daemon, "rejected"), 3);
    }
}

#[test]
fn with_try_all_backends_that_are_down_are_asked_all_the_same() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    let service = web().text("when-all-down", "try-all").health(DOWN);
    daemon.configure(&INTERFACES, &[service]);
    daemon.start();
    wait_until_down(&daemon);
    let answers = requests(&topology.client, source(), WEB, 100);
    assert_eq!(answers.len(), 3, "{answers:?}");
    // Administrative state goes before: who is disabled is not tried.
    daemon.done(&["disable", "web", "c"]);
    let mut next = source();
    next.set_port(20_000);
    let answers = requests(&topology.client, next, WEB, 100);
    assert_eq!(answers.keys().collect::<Vec<_>>(), ["a", "b"], "{answers:?}");
}

#[test]
fn a_backup_backend_is_used_only_while_no_other_is_up() {
    let topology = topology_of(2);
    let mut nginx = nginx(&topology);
    let service = Service::tcp("web")
        .backend("a", "10.2.1.2:8080")
        .backend("b", "10.2.2.2:8080")
        .with_last("backup", true);
    let daemon = balance(&topology, &[service]);
    let answered_by = |port| {
        let mut first = source();
        first.set_port(port);
        let answers = requests(&topology.client, first, WEB, 50);
        answers.into_keys().collect::<Vec<_>>()
    };
    let becomes = |health, share| {
        daemon.wait_for("the first backend's health is known", |status| {
            let backend = &status.services[0].backends[0];
            backend.health == health && backend.share == share
        });
    };
    assert_eq!(answered_by(10_000), ["a"]);

    nginx[0].kill();
    becomes(Health::Down, 0.0);
    assert_eq!(answered_by(11_000), ["b"]);
    let mut on_backup = connection_to(&topology, "b");

    nginx[0].restart();
    becomes(Health::Up, 1.0);
    assert_eq!(answered_by(12_000), ["a"]);
    // Who is on the backup already stays.
    assert_eq!(on_backup.get("/").unwrap(), "b");
}

/// Waits for the sweeps that follow the start: flows that begin in the same tick of the clock as a sweep are missed in
/// the count of live flows until the next one, some seconds later.
fn wait_for_sweeps(daemon: &Daemon) {
    // A change is answered after a sweep.
    daemon.done(&["enable", "web", "a"]);
}

#[test]
fn a_backend_takes_no_more_connections_than_it_may_and_the_others_the_rest() {
    for strategy in ["consistent-hash", "ip-hash", "round-robin", "least-connections"] {
        let topology = topology_of(2);
        let _nginx = nginx(&topology);
        let service = Service::tcp("web")
            .text("strategy", strategy)
            .backend("a", "10.2.1.2:8080")
            .with_last("max-connections", 3)
            .backend("b", "10.2.2.2:8080");
        let daemon = balance(&topology, &[service]);
        wait_for_sweeps(&daemon);
        let open = || {
            let mut connection = Connection::open(&topology.client, WEB).unwrap();
            let name = connection.get("/").unwrap();
            (name, connection)
        };
        let connections: Vec<_> = (0..30).map(|_| open()).collect();
        let on_a = connections.iter().filter(|(name, _)| name == "a").count();
        // By the client's address all are on one.
        let expected = if strategy == "ip-hash" && on_a == 0 { 0 } else { 3 };
        assert_eq!(on_a, expected, "{strategy}");
        let live = daemon.backend("web", "a").live_flows;
        assert_eq!(live, expected as u64, "{strategy}");
    }
}

#[test]
fn a_full_service_takes_a_connection_when_another_has_ended() {
    let topology = topology_of(1);
    let _nginx = nginx(&topology);
    let service = Service::tcp("web")
        .backend("a", "10.2.1.2:8080")
        .with_last("max-connections", 2);
    let daemon = balance(&topology, &[service]);
    wait_for_sweeps(&daemon);
    let connect = || Connection::open(&topology.client, WEB);
    let first = connect().unwrap();
    let mut second = connect().unwrap();
    assert!(connect().is_err(), "the third connection of two");
    assert!(counted(&daemon, "backends-full") > 0);
    assert_eq!(second.get("/").unwrap(), "a");

    assert_eq!(first.get_last("/").unwrap(), "a");
    let mut third = connect().unwrap();
    assert_eq!(third.get("/").unwrap(), "a");
    assert_eq!(daemon.backend("web", "a").live_flows, 2);
}
