//! Who may start flows, and how many.

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use tests::{
    echo::{self, Echo},
    http::Connection,
    machine,
    services::Service,
};
use xlb::lab::{Family, Topology};

use crate::{
    matrix::{self, Forward, Group},
    scene::{WEB, balance, configure, counted, nginx},
};

/// A lab of one backend and three addresses of the client.
fn lab() -> Topology {
    machine::require_root_nginx_and_curl();
    Topology::with_client_addresses(1, 3).unwrap()
}

fn by_nat(family: Family) -> Group {
    Group {
        forward: Forward::Nat,
        vip: family,
        backends: family,
    }
}

/// Whether a new socket of each client address is answered.
fn answered(topology: &Topology, group: Group) -> Vec<bool> {
    let ask = |address: IpAddr| {
        let socket = echo::udp_socket(SocketAddr::new(address, 0)).unwrap();
        let timeout = machine::bound(Duration::from_secs(1));
        socket.set_read_timeout(Some(timeout)).unwrap();
        echo::ask(&socket, group.server(), b"may I").is_ok()
    };
    let all = || topology.client_addresses_of(group.vip).map(ask).collect();
    topology.client.run(all).unwrap()
}

#[test]
fn the_longest_prefix_of_allow_and_deny_decides_who_starts_flows() {
    for family in Family::ALL {
        let group = by_nat(family);
        let topology = lab();
        let _echo = Echo::start(&topology.backends[0], "a", matrix::listen_address(group, 0));
        let service = matrix::of_group(Service::udp("dns"), group, &["a"]);
        let (network, hosts) = match family {
            Family::V4 => ("10.1.0.0/24", ["10.1.0.2/32", "10.1.0.3/32"]),
            Family::V6 => ("2001:db8:1::/64", ["2001:db8:1::2/128", "2001:db8:1::3/128"]),
        };
        let quoted = |prefixes: &[&str]| format!("{prefixes:?}");
        let daemon = balance(&topology, std::slice::from_ref(&service));
        for (allow, deny, expected) in [
            (quoted(&[]), quoted(&[hosts[0]]), [false, true, true]),
            (quoted(&hosts), quoted(&[]), [true, true, false]),
            (quoted(&[network]), quoted(&[hosts[1]]), [true, false, true]),
            (quoted(&[hosts[1]]), quoted(&[network]), [false, true, false]),
            (quoted(&[]), quoted(&[]), [true, true, true]),
        ] {
            let mut filtered = service.clone();
            for (key, value) in [("allow", &allow), ("deny", &deny)] {
                if value != "[]" {
                    filtered = filtered.with(key, value);
                }
            }
            configure(&daemon, &topology, &[filtered]);
            daemon.done(&["reload"]);
            let before = counted(&daemon, "source-denied");
            assert_eq!(
                answered(&topology, group),
                expected,
                "{family:?}: allow {allow}, deny {deny}"
            );
            let denied = expected.iter().filter(|allowed| !**allowed).count();
            assert_eq!(counted(&daemon, "source-denied") - before, denied as u64);
        }
    }
}

#[test]
fn a_source_that_is_denied_by_a_reload_loses_its_connections_and_nobody_else() {
    let topology = lab();
    let _nginx = nginx(&topology);
    let service = Service::tcp("web").backend("a", "10.2.1.2:8080");
    let daemon = balance(&topology, std::slice::from_ref(&service));
    let dial = |address: &str| {
        let source = Some(SocketAddr::new(address.parse().unwrap(), 0));
        topology.client.run(|| Connection::dial(WEB, source)).unwrap()
    };
    let (mut stays, mut goes) = (dial("10.1.0.2").unwrap(), dial("10.1.0.3").unwrap());
    for connection in [&mut stays, &mut goes] {
        assert_eq!(connection.get("/").unwrap(), "a");
    }
    configure(&daemon, &topology, &[service.with("deny", "[\"10.1.0.3/32\"]")]);
    daemon.done(&["reload"]);
    daemon.wait_for("the flow of the denied source has ended", |_| {
        tests::maps::flows(&daemon.pins()).len() == 1
    });
    assert_eq!(stays.get("/").unwrap(), "a");
    assert!(goes.get("/").is_err(), "a denied source is answered");
    assert!(counted(&daemon, "source-denied") > 0);
}

/// Sends a datagram from each of so many new sockets, and tells how many are answered.
fn burst(address: IpAddr, server: SocketAddr, sockets: usize) -> usize {
    let open = |_| {
        let socket = echo::udp_socket(SocketAddr::new(address, 0)).unwrap();
        socket.send_to(b"hello", server).unwrap();
        socket
    };
    let sockets: Vec<UdpSocket> = (0..sockets).map(open).collect();
    std::thread::sleep(machine::bound(Duration::from_millis(500)));
    let answer = |socket: &UdpSocket| -> io::Result<()> {
        socket.set_nonblocking(true)?;
        socket.recv(&mut [0; 64]).map(drop)
    };
    let answered = sockets.iter().filter(|socket| match answer(socket) {
        Ok(()) => true,
        Err(error) if error.kind() == ErrorKind::WouldBlock => false,
        Err(error) => panic!("{error}"),
    });
    answered.count()
}

#[test]
fn a_source_starts_no_more_flows_than_the_rate_allows_and_others_do_not_feel_it() {
    const SOCKETS: usize = 200;
    const BURST: usize = 20;
    const RATE: usize = 5;
    for family in Family::ALL {
        let group = by_nat(family);
        let topology = lab();
        let _echo = Echo::start(&topology.backends[0], "a", matrix::listen_address(group, 0));
        let service = matrix::of_group(Service::udp("dns"), group, &["a"])
            .with("new-flow-rate", RATE)
            .with("new-flow-burst", BURST);
        // The addresses of IPv6 are of one /64.
        let service = match family {
            Family::V4 => service,
            Family::V6 => service.with("new-flow-prefix-v6", 128),
        };
        let daemon = balance(&topology, &[service]);
        let mut addresses = topology.client_addresses_of(family);
        let (greedy, modest) = (addresses.next().unwrap(), addresses.next().unwrap());
        let start = Instant::now();
        let ask = || {
            let greedy = burst(greedy, group.server(), SOCKETS);
            (greedy, burst(modest, group.server(), BURST))
        };
        let (greedy, modest) = topology.client.run(ask).unwrap();
        let allowed = BURST + (start.elapsed().as_secs_f64() * RATE as f64) as usize + 1;
        assert!(
            (BURST..=allowed).contains(&greedy),
            "{family:?}: {greedy} of at most {allowed} flows"
        );
        assert_eq!(modest, BURST, "{family:?}");
        assert_eq!(counted(&daemon, "source-rate"), (SOCKETS - greedy) as u64);
    }
}
