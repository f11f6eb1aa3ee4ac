//! Connections get to the backends and their answers back.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{SocketAddr, TcpListener, UdpSocket},
};

use tests::{
    daemon::{Daemon, outcome},
    http::Connection,
    load::{assert_shares, requests},
    machine,
    nginx::Nginx,
    ping::ping,
    services::Service,
    udp::{self, UdpEcho},
};
use xlb::lab::Topology;

use crate::scene::{INTERFACES, WEB, nginx, source, topology, topology_of, web};

const EQUAL: [(&str, u32); 3] = [("a", 1), ("b", 1), ("c", 1)];

/// 3,000 requests on new connections: none fails, and each backend has its share.
fn three_thousand_requests_are_shared(forward: &str, weights: &[(&str, u32)]) {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    let mut service = Service::tcp("web").text("forward", forward);
    for ((name, weight), host) in weights.iter().zip(1..) {
        service = service.weighted(name, &format!("10.2.{host}.2:8080"), *weight);
    }
    daemon.configure(&INTERFACES, &[service]);
    daemon.start_up();

    let answers = requests(&topology.client, source(), WEB, machine::count(3000));
    assert_shares(&answers, weights);

    let status = daemon.status();
    let flows: u64 = status.services[0]
        .backends
        .iter()
        .map(|backend| backend.flows_total)
        .sum();
    assert_eq!(flows, machine::count(3000) as u64, "each connection is one flow");
    let packets = status.packets;
    assert_eq!(
        packets.received,
        packets.passed + packets.dropped + packets.transmitted + packets.redirected
    );
    assert_eq!(packets.dropped, 0, "{status:?}");
}

#[test]
fn nat_shares_three_thousand_connections_among_three_nginx() {
    three_thousand_requests_are_shared("nat", &EQUAL);
}

#[test]
fn full_nat_shares_three_thousand_connections_among_three_nginx() {
    three_thousand_requests_are_shared("full-nat", &EQUAL);
}

#[test]
fn nat_shares_by_weight() {
    three_thousand_requests_are_shared("nat", &[("a", 1), ("b", 2), ("c", 3)]);
}

#[test]
fn full_nat_shares_by_weight() {
    three_thousand_requests_are_shared("full-nat", &[("a", 1), ("b", 2), ("c", 3)]);
}

#[test]
fn curl_is_answered_and_gets_a_large_file_whole() {
    for forward in ["nat", "full-nat"] {
        let topology = topology();
        let _nginx = nginx(&topology);
        let mut daemon = Daemon::new(&topology.balancer);
        daemon.configure(&INTERFACES, &[web().text("forward", forward)]);
        daemon.start_up();

        let curl = |arguments: &[&str]| {
            let mut command = topology.client.command(machine::CURL);
            let timeout = machine::bound(std::time::Duration::from_secs(10))
                .as_secs()
                .to_string();
            command.args(["--silent", "--show-error", "--fail", "--max-time", &timeout]);
            let outcome = outcome(command.args(arguments));
            assert_eq!(outcome.code, 0, "curl {arguments:?}: {}", outcome.stderr);
            outcome.stdout
        };
        let name = curl(&[&format!("http://{WEB}/")]);
        assert!(["a\n", "b\n", "c\n"].contains(&name.as_str()), "{name}");
        let file = daemon.folder().join("downloaded");
        curl(&[&format!("http://{WEB}/big"), "-o", file.to_str().unwrap()]);
        assert!(
            std::fs::read(file).unwrap() == tests::nginx::big_file(),
            "the file differs"
        );
    }
}

#[test]
fn the_backend_sees_the_client_under_nat_and_the_balancer_under_full_nat() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    for (forward, expected) in [
        ("nat", ["10.1.0.2"; 3]),
        ("full-nat", ["10.2.1.1", "10.2.2.1", "10.2.3.1"]),
    ] {
        let service = |index: u16| {
            Service::tcp(&format!("web-{index}"))
                .with("port", 80 + index)
                .text("forward", forward)
                .backend("only", &format!("10.2.{}.2:8080", index + 1))
        };
        daemon.configure(&INTERFACES, &[service(0), service(1), service(2)]);
        daemon.start_up();
        for (peer, port) in expected.iter().zip(80..) {
            let server = SocketAddr::new(Topology::VIP.into(), port);
            let seen = Connection::open(&topology.client, server)
                .unwrap()
                .get("/peer")
                .unwrap();
            assert_eq!(seen, *peer, "{forward} to port {port}");
        }
        daemon.terminate();
    }
}

#[test]
fn udp_replies_come_from_the_vip() {
    let server = SocketAddr::new(Topology::VIP.into(), 5353);
    for forward in ["nat", "full-nat"] {
        let topology = topology();
        let hosts = topology.backends.iter().zip(["a", "b", "c"]).enumerate();
        let _echo: Vec<UdpEcho> = hosts
            .map(|(index, (host, name))| {
                UdpEcho::start(host, name, SocketAddr::new(topology.backend_address(index), 9000))
            })
            .collect();
        let mut daemon = Daemon::new(&topology.balancer);
        let service = Service::udp("dns")
            .text("forward", forward)
            .backend("a", "10.2.1.2:9000")
            .backend("b", "10.2.2.2:9000")
            .backend("c", "10.2.3.2:9000");
        daemon.configure(&INTERFACES, &[service]);
        daemon.start_up();

        let mut answers = BTreeMap::<String, usize>::new();
        let ask_all = || {
            for number in 0..machine::count(1000) as u16 {
                let socket = UdpSocket::bind(("10.1.0.2", 20_000 + number)).unwrap();
                let (name, peer) = udp::ask(&socket, server).unwrap();
                // The same flow again: the same backend.
                assert_eq!(udp::ask(&socket, server).unwrap(), (name.clone(), peer.clone()));
                match forward {
                    "nat" => assert_eq!(peer, "10.1.0.2"),
                    _ => assert!(peer.starts_with("10.2.") && peer.ends_with(".1"), "{peer}"),
                }
                *answers.entry(name).or_default() += 1;
            }
        };
        topology.client.run(ask_all).unwrap();
        let total: usize = answers.values().sum();
        for name in ["a", "b", "c"] {
            assert!(answers[name] * 5 > total, "{name} gets too little of {answers:?}");
        }
    }
}

#[test]
fn ip_hash_keeps_a_client_on_one_backend_whatever_its_port() {
    machine::require_root_nginx_and_curl();
    let clients = machine::count(200);
    let topology = Topology::with_client_addresses(3, clients).unwrap();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web().text("strategy", "ip-hash")]);
    daemon.start_up();

    let mut used = BTreeSet::new();
    for address in topology.client_addresses() {
        let answers = requests(&topology.client, SocketAddr::new(address, 10_000), WEB, 8);
        assert_eq!(answers.len(), 1, "{address} reaches {answers:?}");
        used.extend(answers.into_keys());
    }
    assert_eq!(used, BTreeSet::from(["a", "b", "c"].map(str::to_owned)));
}

#[test]
fn two_ports_of_one_address_are_two_backends() {
    let topology = topology_of(1);
    let _one = Nginx::start(&topology.backends[0], "one", "10.2.1.2:3000".parse().unwrap());
    let _two = Nginx::start(&topology.backends[0], "two", "10.2.1.2:3001".parse().unwrap());
    let mut daemon = Daemon::new(&topology.balancer);
    for forward in ["nat", "full-nat"] {
        let service = Service::tcp("web")
            .text("forward", forward)
            .backend("one", "10.2.1.2:3000")
            .backend("two", "10.2.1.2:3001");
        daemon.configure(&["eth0", "eth1"], &[service]);
        daemon.start_up();
        let first = if forward == "nat" {
            "10.1.0.2:10000"
        } else {
            "10.1.0.2:20000"
        };
        let answers = requests(
            &topology.client,
            first.parse().unwrap(),
            WEB,
            machine::count(1000),
        );
        assert_shares(&answers, &[("one", 1), ("two", 1)]);
        daemon.terminate();
    }
}

#[test]
fn what_is_for_no_service_passes_to_the_host() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web()]);
    daemon.start_up();

    // A server of the balancer itself, another port of the VIP's, and a backend that is asked directly.
    let listener = topology
        .balancer
        .run(|| TcpListener::bind("10.1.0.1:22"))
        .unwrap()
        .unwrap();
    let greeting = topology
        .balancer
        .spawn(move || {
            use std::io::Write;
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"SSH-2.0-test\r\n").unwrap();
        })
        .unwrap();
    let greeted = topology
        .client
        .run(|| {
            use std::io::Read;
            let mut stream = std::net::TcpStream::connect("10.1.0.1:22").unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        })
        .unwrap();
    greeting.join().unwrap().unwrap();
    assert_eq!(greeted, "SSH-2.0-test\r\n");

    let direct = "10.2.2.2:8080".parse().unwrap();
    assert_eq!(
        Connection::open(&topology.client, direct)
            .unwrap()
            .get("/")
            .unwrap(),
        "b"
    );

    let echoes = ping(&topology.client, "10.1.0.1".parse().unwrap(), 5).unwrap();
    assert_eq!(echoes, 5, "of five pings to the balancer");
    let echoes = ping(&topology.client, "10.2.3.2".parse().unwrap(), 5).unwrap();
    assert_eq!(echoes, 5, "of five pings to a backend, through the balancer");
    assert!(daemon.status().reasons.contains_key("not-for-service"));
}
