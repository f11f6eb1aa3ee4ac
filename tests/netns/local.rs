//! Processes on the balancer's own host, behind one common port: for clients on the network and on the host itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    time::Duration,
};

use aya::{
    programs::{SchedClassifier, TcAttachType, tc},
    util::KernelVersion,
};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, setsockopt, socket, sockopt,
};
use tests::{
    daemon::Daemon,
    echo::{self, Answer, Conversation, Echo},
    http::Connection,
    load::requests,
    machine::{self, eventually},
    maps,
    nginx::{Nginx, big_file},
    services::Service,
};
use xlb::lab::{Family, Namespace, Topology};

use crate::scene::{WEB, connection_by};

const NAMES: [&str; 4] = ["i-8000", "i-8001", "i-8002", "i-8003"];
const UDP_PORT: u16 = 5353;

fn lab() -> Topology {
    lab_of(1)
}

fn lab_of(clients: usize) -> Topology {
    machine::require_root_nginx_and_curl();
    let topology = Topology::with_client_addresses(0, clients).unwrap();
    for address in ["10.1.0.1", "2001:db8:1::1"] {
        let address: IpAddr = address.parse().unwrap();
        assert!(
            topology
                .balancer
                .run(|| TcpListener::bind((address, 0)).is_ok())
                .unwrap()
        );
    }
    topology
}

/// Four instances that listen on ports 8000 to 8003 of an address, over TCP and UDP.
fn instances(topology: &Topology, address: IpAddr) -> Vec<Echo> {
    (8000..)
        .zip(NAMES)
        .map(|(port, name)| Echo::start(&topology.balancer, name, (address, port).into()))
        .collect()
}

fn nginx(topology: &Topology) -> Vec<Nginx<'_>> {
    let named = (8000..).zip(NAMES);
    named
        .map(|(port, name)| Nginx::start(&topology.balancer, name, (Ipv4Addr::LOCALHOST, port).into()))
        .collect()
}

/// Four instances behind port 80 of the lab's VIP.
fn cluster(address: IpAddr) -> Service {
    let vip = Topology::vip(family(address));
    local(Service::tcp("app"))
        .text("vip", &vip.to_string())
        .backend("i", &range(address))
}

/// The same over UDP.
fn udp_cluster(address: IpAddr) -> Service {
    let vip = Topology::vip(family(address));
    local(Service::udp("dns"))
        .text("vip", &vip.to_string())
        .backend("i", &range(address))
}

fn local(service: Service) -> Service {
    service
        .text("forward", "local")
        .text("strategy", "round-robin")
        .with("assign-vip", true)
        .health("type = \"none\"")
}

/// Of `cluster`, where they listen on loopback.
fn loopback() -> IpAddr {
    Ipv4Addr::LOCALHOST.into()
}

fn range(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => format!("{address}:8000-8003"),
        IpAddr::V6(address) => format!("[{address}]:8000-8003"),
    }
}

fn family(address: IpAddr) -> Family {
    if address.is_ipv4() { Family::V4 } else { Family::V6 }
}

fn any(family: Family) -> SocketAddr {
    match family {
        Family::V4 => (Ipv4Addr::UNSPECIFIED, 0).into(),
        Family::V6 => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// Where clients are, and the address that a process sees them under.
fn clients(topology: &Topology, family: Family) -> [(&'static str, &Namespace, IpAddr); 2] {
    let of_client = topology.client_addresses_of(family).next().unwrap();
    [
        ("network", &topology.client, of_client),
        // Who connects to an address of the own host does so from that.
        ("host", &topology.balancer, Topology::vip(family)),
    ]
}

/// Addresses that instances listen on and are configured with: any, the host's, the VIP, loopback.
fn places(family: Family) -> [(&'static str, IpAddr, IpAddr); 4] {
    let (unspecified, own, loopback): (&str, &str, &str) = match family {
        Family::V4 => ("0.0.0.0", "10.1.0.1", "127.0.0.1"),
        Family::V6 => ("::", "2001:db8:1::1", "::1"),
    };
    let parse = |address: &str| address.parse::<IpAddr>().unwrap();
    let vip = Topology::vip(family);
    [
        ("any address", parse(unspecified), vip),
        ("an address of the host", parse(own), parse(own)),
        ("the vip", vip, vip),
        ("loopback", parse(loopback), parse(loopback)),
    ]
}

#[test]
fn tcp_gets_to_instances_wherever_they_listen_and_wherever_the_client_is() {
    let topology = lab();
    let data = &big_file()[..1 << 20];
    for family in Family::ALL {
        let vip = Topology::vip(family);
        for (place, listen, configured) in places(family) {
            let mut daemon = Daemon::new(&topology.balancer);
            daemon.configure(&["eth0"], &[cluster(configured)]);
            daemon.start_up();
            let _instances = instances(&topology, listen);
            for (whence, client, seen_as) in clients(&topology, family) {
                let mut answers = BTreeSet::new();
                for _ in 0..8 * machine::cpus() {
                    let exchange = || Conversation::open(any(family), (vip, 80).into())?.exchange(data);
                    let Answer { name, peer } = client
                        .run(exchange)
                        .unwrap()
                        .unwrap_or_else(|error| panic!("{place}, {family:?}, from the {whence}: {error}"));
                    assert_eq!(peer, seen_as, "{place}, {family:?}, from the {whence}");
                    answers.insert(name);
                }
                assert_eq!(
                    answers,
                    BTreeSet::from(NAMES.map(str::to_owned)),
                    "{place}, from the {whence}"
                );
            }
            daemon.wait_for("all connections have ended", |status| {
                let mut backends = status.services[0].backends.iter();
                backends.all(|backend| backend.live_flows == 0)
            });
            let service = &daemon.status().services[0];
            assert_eq!(
                service.reasons.keys().collect::<Vec<_>>(),
                ["delivered", "returned"],
                "{place}"
            );
            let flows: u64 = service.backends.iter().map(|backend| backend.flows_total).sum();
            assert_eq!(flows, 16 * machine::cpus() as u64, "{place}");
        }
    }
}

#[test]
fn udp_gets_to_instances_and_is_answered_by_the_vip() {
    let topology = lab();
    let data = big_file();
    for family in Family::ALL {
        let server = SocketAddr::new(Topology::vip(family), UDP_PORT);
        for (place, listen, configured) in places(family) {
            let mut daemon = Daemon::new(&topology.balancer);
            daemon.configure(&["eth0"], &[udp_cluster(configured)]);
            daemon.start_up();
            let _instances = instances(&topology, listen);
            for (whence, client, seen_as) in clients(&topology, family) {
                let reached = !(listen.is_loopback() && whence == "network");
                let run = || {
                    let mut names = BTreeSet::new();
                    for _ in 0..8 * machine::cpus() {
                        let socket = echo::udp_socket(any(family))?;
                        socket.connect(server)?;
                        let mut name = None;
                        // Also what fragments hold alone.
                        for length in [0, 1, 1200, 1472, 4000, 9001] {
                            let answer = echo::ask_connected(&socket, &data[..length])?;
                            assert_eq!(answer.peer, seen_as, "{place}, {family:?}, from the {whence}");
                            assert_eq!(
                                *name.get_or_insert(answer.name.clone()),
                                answer.name,
                                "a flow has moved"
                            );
                        }
                        names.extend(name);
                    }
                    Ok::<_, io::Error>(names)
                };
                let names = client.run(run).unwrap();
                if reached {
                    let names = names
                        .unwrap_or_else(|error| panic!("{place}, {family:?}, from the {whence}: {error}"));
                    assert_eq!(
                        names,
                        BTreeSet::from(NAMES.map(str::to_owned)),
                        "{place}, from the {whence}"
                    );
                } else {
                    // No stack takes packets for loopback from the network: the client is told.
                    assert_eq!(
                        names.unwrap_err().kind(),
                        io::ErrorKind::ConnectionRefused,
                        "{place}"
                    );
                }
            }
        }
    }
}

#[test]
fn each_strategy_spreads_connections_and_ip_hash_keeps_a_client_on_its_instance() {
    const CLIENTS: usize = 24;
    let topology = lab_of(CLIENTS);
    let _instances = instances(&topology, loopback());
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&["eth0"], &[]);
    daemon.start();
    for strategy in ["consistent-hash", "ip-hash", "round-robin", "least-connections"] {
        daemon.configure(&["eth0"], &[cluster(loopback()).text("strategy", strategy)]);
        daemon.done(&["reload"]);
        let mut by_client = BTreeMap::<IpAddr, Vec<String>>::new();
        let mut network = Vec::new();
        for source in topology.client_addresses() {
            for _ in 0..4 {
                let open = || Conversation::open((source, 0).into(), WEB).unwrap();
                network.push((source, topology.client.run(open).unwrap()));
            }
        }
        // Of the host's own addresses any may be a client's.
        let own: IpAddr = "10.1.0.1".parse().unwrap();
        for _ in 0..4 {
            let open = || Conversation::open((own, 0).into(), WEB).unwrap();
            network.push((own, topology.balancer.run(open).unwrap()));
        }
        for (source, connection) in network {
            let Answer { name, peer } = connection.exchange(b"hello").unwrap();
            assert_eq!(peer, source);
            by_client.entry(source).or_default().push(name);
        }
        let counted = |name: &str| {
            by_client
                .values()
                .flatten()
                .filter(|answer| *answer == name)
                .count()
        };
        let counts = NAMES.map(counted);
        assert!(counts.iter().all(|count| *count > 0), "{strategy}: {counts:?}");
        if strategy == "ip-hash" {
            let split = by_client
                .values()
                .find(|names| names.iter().any(|name| name != &names[0]));
            assert_eq!(split, None, "a client is split");
        }
        if strategy == "round-robin" || strategy == "least-connections" {
            let spread = counts.iter().max().unwrap() - counts.iter().min().unwrap();
            assert!(spread <= machine::cpus(), "{strategy}: {counts:?}");
        }
        let none: Vec<Service> = Vec::new();
        daemon.configure(&["eth0"], &none);
        daemon.done(&["reload"]);
    }
}

#[test]
fn a_client_of_an_instance_that_is_gone_is_refused_until_its_health_is_known() {
    let topology = lab();
    let mut nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    // Not probed: as between two probes.
    daemon.configure(&["eth0"], &[cluster(loopback())]);
    daemon.start_up();
    nginx[1].kill();
    for (whence, client, _) in clients(&topology, Family::V4) {
        let mut refused = 0;
        for _ in 0..8 * machine::cpus() {
            match Connection::open(client, WEB) {
                Ok(mut connection) => assert_ne!(connection.get("/").unwrap(), NAMES[1]),
                Err(error) => {
                    assert_eq!(
                        error.kind(),
                        io::ErrorKind::ConnectionRefused,
                        "from the {whence}"
                    );
                    refused += 1;
                }
            }
        }
        assert!(refused > 0, "from the {whence}");
    }
    assert!(daemon.status().services[0].reasons["refused"].packets > 0);
    assert_eq!(
        daemon.backend("app", NAMES[1]).live_flows,
        0,
        "what was refused lives on"
    );

    let probed = cluster(loopback()).health("type = \"tcp\"\ninterval = \"50ms\"\nrise = 1\nfall = 1");
    daemon.configure(&["eth0"], std::slice::from_ref(&probed));
    daemon.done(&["reload"]);
    let up = |daemon: &Daemon<'_>| {
        let backends = daemon.status().services.remove(0).backends;
        backends.iter().filter(|backend| backend.share > 0.0).count()
    };
    eventually("three instances are up", Duration::from_secs(15), || {
        up(&daemon) == 3
    });
    let answers = requests(
        &topology.client,
        "10.1.0.2:30000".parse().unwrap(),
        WEB,
        machine::count(60),
    );
    assert_eq!(
        answers.into_keys().collect::<Vec<_>>(),
        [NAMES[0], NAMES[2], NAMES[3]]
    );

    for instance in &mut nginx {
        instance.kill();
    }
    eventually("no instance is up", Duration::from_secs(15), || up(&daemon) == 0);
    for (whence, client, _) in clients(&topology, Family::V4) {
        let error = Connection::open(client, WEB).unwrap_err();
        assert_eq!(
            error.kind(),
            io::ErrorKind::ConnectionRefused,
            "from the {whence}"
        );
    }
    for instance in &mut nginx {
        instance.restart();
    }
    eventually("all instances are up", Duration::from_secs(15), || {
        up(&daemon) == 4
    });
    requests(
        &topology.client,
        "10.1.0.2:40000".parse().unwrap(),
        WEB,
        machine::count(60),
    );
}

#[test]
fn another_process_on_the_vips_own_port_gets_none_of_the_services_clients() {
    let topology = lab();
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(
        &["eth0"],
        &[cluster(loopback()), udp_cluster(loopback()).with("port", 80)],
    );
    daemon.start_up();
    // Both protocols, on port 80 of any address.
    let _stranger = Echo::start(&topology.balancer, "stranger", "0.0.0.0:80".parse().unwrap());
    for (whence, client, _) in clients(&topology, Family::V4) {
        let connect = || TcpStream::connect_timeout(&WEB, Duration::from_millis(300));
        assert!(client.run(connect).unwrap().is_err(), "from the {whence}");
        let ask = || {
            let socket = echo::udp_socket(any(Family::V4))?;
            socket.set_read_timeout(Some(Duration::from_millis(300)))?;
            echo::ask(&socket, WEB, b"hello")
        };
        assert!(client.run(ask).unwrap().is_err(), "from the {whence}");
        // On other addresses it is none of xlb's business.
        let own = "10.1.0.1:80".parse().unwrap();
        let exchange = || {
            Conversation::open(any(Family::V4), own)
                .unwrap()
                .exchange(b"hello")
                .unwrap()
        };
        assert_eq!(
            client.run(exchange).unwrap().name,
            "stranger",
            "from the {whence}"
        );
    }
    for service in daemon.status().services {
        assert!(
            service.reasons["vip-occupied"].packets > 0,
            "{:?}",
            service.reasons
        );
    }
    let _instances = instances(&topology, loopback());
    for (_, client, _) in clients(&topology, Family::V4) {
        let exchange = || {
            Conversation::open(any(Family::V4), WEB)
                .unwrap()
                .exchange(b"hello")
                .unwrap()
        };
        assert_ne!(client.run(exchange).unwrap().name, "stranger");
    }
}

#[test]
fn a_client_port_is_used_again_at_once_after_the_instance_has_closed_the_connection() {
    let topology = lab();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&["eth0"], &[cluster(loopback())]);
    daemon.start_up();
    for (client, source) in [
        (&topology.client, "10.1.0.2:30000"),
        (&topology.balancer, "10.1.0.1:30000"),
    ] {
        for _ in 0..3 {
            // The server closes first, so its side of the connection waits (TIME_WAIT).
            requests(client, source.parse().unwrap(), WEB, 10);
        }
    }
}

#[test]
fn drain_disable_weights_and_limits_hold() {
    let topology = lab();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    let single = |service: Service| {
        NAMES.iter().zip(8000..).fold(service, |service, (name, port)| {
            service.weighted(
                name,
                &format!("127.0.0.1:{port}"),
                if port == 8003 { 0 } else { 100 },
            )
        })
    };
    let service = || single(local(Service::tcp("app")));
    daemon.configure(&["eth0"], &[service()]);
    daemon.start_up();
    let names = |from: u16| -> Vec<String> {
        let source = SocketAddr::new("10.1.0.2".parse().unwrap(), from);
        requests(&topology.client, source, WEB, machine::count(60))
            .into_keys()
            .collect()
    };
    assert_eq!(names(20_000), NAMES[..3], "weight 0 gets nothing");

    let mut kept = connection_by(&topology, WEB, NAMES[0]);
    daemon.done(&["drain", "app", NAMES[0]]);
    assert_eq!(names(21_000), NAMES[1..3]);
    assert_eq!(
        kept.get("/").unwrap(),
        NAMES[0],
        "what is there goes on while it drains"
    );
    assert_eq!(daemon.backend("app", NAMES[0]).live_flows, 1);
    daemon.done(&["enable", "app", NAMES[0]]);

    // Both clients: one of the host itself.
    let mut here = loop {
        let mut connection = Connection::open(&topology.balancer, WEB).unwrap();
        if connection.get("/").unwrap() == NAMES[0] {
            break connection;
        }
    };
    let mut other = connection_by(&topology, WEB, NAMES[1]);
    daemon.done(&["disable", "app", NAMES[0]]);
    for connection in [&mut kept, &mut here] {
        eventually("the connection ends", Duration::from_secs(5), || {
            connection.get("/").is_err()
        });
    }
    assert_eq!(other.get("/").unwrap(), NAMES[1]);
    assert_eq!(names(22_000), NAMES[1..3]);
    daemon.done(&["enable", "app", NAMES[0]]);

    let limited = local(Service::tcp("app")).backend(NAMES[0], "127.0.0.1:8000\"\nmax-connections = 2\n# \"");
    daemon.configure(&["eth0"], &[limited]);
    daemon.done(&["reload"]);
    let one = Connection::open(&topology.client, WEB).unwrap();
    let mut two = Connection::open(&topology.balancer, WEB).unwrap();
    let timeout = Duration::from_millis(500);
    for (_, client, _) in clients(&topology, Family::V4) {
        assert!(
            client
                .run(|| TcpStream::connect_timeout(&WEB, timeout).is_err())
                .unwrap()
        );
    }
    drop(one);
    eventually("a place is free again", Duration::from_secs(10), || {
        topology
            .client
            .run(|| TcpStream::connect_timeout(&WEB, timeout).is_ok())
            .unwrap()
    });
    assert_eq!(two.get("/").unwrap(), NAMES[0]);
}

#[test]
fn the_flow_table_empties_when_connections_have_ended_and_datagrams_have_stopped() {
    let topology = lab();
    let _instances = instances(&topology, Ipv4Addr::UNSPECIFIED.into());
    let mut daemon = Daemon::new(&topology.balancer);
    let own: IpAddr = "10.1.0.1".parse().unwrap();
    daemon.configure_with(
        "[flow-table]\nsize = 4096\nudp-idle-timeout = \"5s\"\n",
        &["eth0"],
        &[cluster(own), udp_cluster(own)],
    );
    daemon.start_up();
    let server = SocketAddr::new(Topology::vip(Family::V4), UDP_PORT);
    for (_, client, _) in clients(&topology, Family::V4) {
        let run = || {
            Conversation::open(any(Family::V4), WEB)
                .unwrap()
                .exchange(b"hello")
                .unwrap();
            let socket = echo::udp_socket(any(Family::V4)).unwrap();
            echo::ask(&socket, server, b"hello").unwrap();
        };
        client.run(run).unwrap();
    }
    let udp = || {
        maps::flows(&daemon.pins())
            .iter()
            .filter(|(key, _)| key.protocol == 17)
            .count()
    };
    assert_eq!(udp(), 2);
    eventually("flows of datagrams are gone", Duration::from_secs(30), || {
        udp() == 0
    });
    // Both ends have said FIN: counted as ended, and gone after the time for late segments.
    let status = daemon.status();
    let live: u64 = status
        .services
        .iter()
        .flat_map(|service| &service.backends)
        .map(|b| b.live_flows)
        .sum();
    assert_eq!(live, 0);
}

#[test]
fn downloads_go_on_over_reload_restart_and_crash_of_the_daemon() {
    let topology = lab();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&["eth0"], &[cluster(loopback())]);
    daemon.start_up();
    let network = Connection::open(&topology.client, WEB).unwrap().download();
    let host = Connection::open(&topology.balancer, WEB).unwrap().download();
    let new = |from: u16| {
        for (client, address) in [(&topology.client, "10.1.0.2"), (&topology.balancer, "10.1.0.1")] {
            let source = SocketAddr::new(address.parse().unwrap(), from);
            assert_eq!(requests(client, source, WEB, 40).len(), 4);
        }
    };
    let both = |_: &str| {
        network.proceeds();
        host.proceeds();
    };
    both("at first");
    daemon.configure(
        &["eth0"],
        &[cluster(loopback()).text("strategy", "consistent-hash")],
    );
    daemon.done(&["reload"]);
    both("after a reload");
    new(20_000);
    daemon.kill();
    both("without a daemon");
    new(21_000);
    daemon.start_up();
    both("with another daemon");
    new(22_000);
    daemon.terminate();
    daemon.start_up();
    both("after a restart");
    assert_eq!(
        daemon.status().services[0]
            .backends
            .iter()
            .map(|b| b.live_flows)
            .sum::<u64>(),
        2
    );
    network.finish().unwrap();
    host.finish().unwrap();
}

#[test]
fn programs_are_there_for_local_services_alone_and_detach_leaves_none() {
    let topology = lab();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&["eth0"], &[]);
    daemon.start();
    assert_eq!(hooked(&topology.balancer), [""; 0]);
    for _ in 0..2 {
        daemon.configure(&["eth0"], &[cluster(loopback())]);
        daemon.done(&["reload"]);
        assert_eq!(
            requests(
                &topology.client,
                "10.1.0.2:20000".parse().unwrap(),
                WEB,
                8 * machine::cpus()
            )
            .len(),
            4
        );
        let network = Connection::open(&topology.client, WEB).unwrap().download();
        network.proceeds();
        daemon.configure(&["eth0"], &[]);
        daemon.done(&["reload"]);
        assert_eq!(
            hooked(&topology.balancer),
            [""; 0],
            "no service is local any more"
        );
        let error = Connection::open(&topology.client, WEB).unwrap_err();
        // The VIP went with the service.
        assert_ne!(error.kind(), io::ErrorKind::ConnectionReset);
        drop(network);
    }
    daemon.configure(&["eth0"], &[cluster(loopback())]);
    daemon.done(&["reload"]);
    daemon.kill();
    requests(&topology.client, "10.1.0.2:21000".parse().unwrap(), WEB, 8);
    daemon.done(&["detach"]);
    assert_eq!(hooked(&topology.balancer), [""; 0]);
    // Nor what they hung on: a filter finds nothing to hang on.
    assert!(
        topology
            .balancer
            .run(|| tc::qdisc_add_clsact("lo").is_ok())
            .unwrap()
    );
    assert!(!daemon.pins().has_instance());
}

#[test]
fn instances_that_share_their_ports_are_delivered_to_where_the_kernel_can() {
    let topology = lab();
    let mut daemon = Daemon::new(&topology.balancer);
    let service = local(Service::tcp("app")).backend("one", "127.0.0.1:8000");
    let reused = local(Service::udp("dns")).backend("one", "127.0.0.1:8000");
    daemon.configure(&["eth0"], &[service, reused]);
    daemon.start_up();
    // Two processes on one port, as with `listen … reuseport`.
    let listen = || {
        let pair = [(); 2].map(|()| {
            let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None)?;
            setsockopt(&socket, sockopt::ReusePort, &true)?;
            bind(
                socket.as_raw_fd(),
                &"127.0.0.1:8000".parse::<SockaddrIn>().unwrap(),
            )?;
            nix::sys::socket::listen(&socket, Backlog::MAXCONN)?;
            Ok::<_, nix::Error>(TcpListener::from(socket))
        });
        pair.map(Result::unwrap)
    };
    let _listeners = topology.balancer.run(listen).unwrap();
    for (whence, client, _) in clients(&topology, Family::V4) {
        let connected = client
            .run(|| TcpStream::connect_timeout(&WEB, Duration::from_secs(5)))
            .unwrap();
        if hooks_are_links() {
            connected.unwrap_or_else(|error| panic!("from the {whence}: {error}"));
        } else {
            // Not silence, and counted.
            assert_eq!(
                connected.unwrap_err().kind(),
                io::ErrorKind::ConnectionRefused,
                "from the {whence}"
            );
            assert!(daemon.status().services[0].reasons["reuse-port"].packets > 0);
        }
    }
}

#[test]
fn connections_go_on_when_their_service_becomes_local_or_is_no_longer() {
    machine::require_root_nginx_and_curl();
    let topology = Topology::routed(1).unwrap();
    let _far = Nginx::start(&topology.backends[0], "far", "10.2.1.2:8080".parse().unwrap());
    let _near = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    let nat = local(Service::tcp("app"))
        .text("forward", "nat")
        .backend("far", "10.2.1.2:8080");
    let interfaces = ["eth0", "eth1"];
    daemon.configure(&interfaces, std::slice::from_ref(&nat));
    daemon.start_up();
    let translated = Connection::open(&topology.client, WEB).unwrap().download();
    translated.proceeds();
    daemon.configure(&interfaces, &[cluster(loopback())]);
    daemon.done(&["reload"]);
    let delivered = connection_by(&topology, WEB, NAMES[2]).download();
    delivered.proceeds();
    translated.proceeds();
    daemon.configure(&interfaces, &[nat]);
    daemon.done(&["reload"]);
    assert_eq!(
        Connection::open(&topology.client, WEB).unwrap().get("/").unwrap(),
        "far"
    );
    delivered.proceeds();
    translated.proceeds();
    delivered.finish().unwrap();
    translated.finish().unwrap();
}

#[test]
fn reset_on_removal_and_source_filters_end_connections_of_processes_too() {
    let topology = lab();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    let both = || {
        let service = local(Service::tcp("app")).with("reset-on-removal", true);
        service
            .backend(NAMES[0], "127.0.0.1:8000")
            .backend(NAMES[1], "127.0.0.1:8001")
    };
    daemon.configure(&["eth0"], &[both()]);
    daemon.start_up();
    let connections = || {
        NAMES[..2]
            .iter()
            .map(|name| connection_by(&topology, WEB, name))
            .collect::<Vec<_>>()
    };
    let mut open = connections();
    let mut here = loop {
        let mut connection = Connection::open(&topology.balancer, WEB).unwrap();
        if connection.get("/").unwrap() == NAMES[0] {
            break connection;
        }
    };
    daemon.configure(&["eth0"], &[both().without(NAMES[0])]);
    daemon.done(&["reload"]);
    for connection in [&mut open[0], &mut here] {
        eventually("the connection is reset", Duration::from_secs(5), || {
            connection.get("/").is_err()
        });
    }
    assert_eq!(open[1].get("/").unwrap(), NAMES[1]);

    daemon.configure(&["eth0"], &[both().with("deny", "[\"10.1.0.2/32\"]")]);
    daemon.done(&["reload"]);
    eventually("the denied connection ends", Duration::from_secs(5), || {
        open[1].get("/").is_err()
    });
    let denied = topology
        .client
        .run(|| TcpStream::connect_timeout(&WEB, Duration::from_millis(500)));
    assert!(denied.unwrap().is_err());
    assert!(daemon.status().services[0].reasons["source-denied"].packets > 0);
    Connection::open(&topology.balancer, WEB)
        .unwrap()
        .get("/")
        .unwrap();
}

#[test]
fn an_interface_that_was_made_anew_delivers_again() {
    let topology = lab();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&["eth0", "eth1"], &[cluster(loopback())]);
    for _ in 0..2 {
        let far = Namespace::new("far").unwrap();
        Namespace::connect(&topology.balancer, "eth1", &far, "eth0").unwrap();
        topology.balancer.add_address("eth1", "10.9.0.1/24").unwrap();
        far.add_address("eth0", "10.9.0.2/24").unwrap();
        far.add_route(&Topology::VIP.to_string(), "10.9.0.1").unwrap();
        if daemon.log().is_empty() {
            daemon.start_up();
        } else {
            daemon.done(&["reload"]);
        }
        let answer = Connection::open(&far, WEB).unwrap().get("/").unwrap();
        assert!(NAMES.contains(&answer.as_str()), "{answer}");
        drop(far);
        eventually("the interface is gone", Duration::from_secs(10), || {
            topology.balancer.ifindex("eth1").is_err()
        });
    }
    // What was on it went with it, which does not keep the rest from going.
    daemon.kill();
    daemon.done(&["detach"]);
    assert!(!daemon.pins().has_instance());
}

#[test]
fn a_vip_that_is_not_the_hosts_is_told() {
    let topology = lab();
    let mut daemon = Daemon::new(&topology.balancer);
    let service = cluster("10.1.0.2".parse().unwrap()).with("assign-vip", false);
    daemon.configure(&["eth0"], std::slice::from_ref(&service));
    daemon.start();
    let status = daemon.status();
    assert!(
        status
            .problems
            .iter()
            .any(|problem| problem.contains("no address of this host")),
        "{:?}",
        status.problems
    );
    let problem = status.services[0].backends[0].next_hop_problem.clone();
    assert_eq!(
        problem.as_deref(),
        Some("it is no address of this host, to which forward \"local\" delivers")
    );
    let config = daemon.config();
    let check = daemon.xlb(&["check", "-c", config.to_str().unwrap()]);
    assert_eq!(check.code, 0);
    let warnings = |of: &str| check.stderr.lines().filter(|line| line.contains(of)).count();
    assert_eq!(warnings("no address of this host"), 2, "{check:?}");
    assert_eq!(
        (warnings("warning: the vip "), warnings("warning: backend ")),
        (1, 1)
    );

    let vip = Topology::vip(Family::V4);
    topology.balancer.add_address("lo", &format!("{vip}/32")).unwrap();
    daemon.configure(&["eth0"], &[cluster(loopback()).with("assign-vip", false)]);
    daemon.done(&["reload"]);
    let status = daemon.status();
    assert_eq!(status.problems, [""; 0]);
    assert_eq!(status.services[0].backends[0].next_hop_problem, None);
    let check = daemon.xlb(&["check", "-c", config.to_str().unwrap()]);
    assert_eq!((check.code, check.stderr.as_str()), (0, ""));

    // One of two services on it has it assigned.
    topology.balancer.remove_address(vip).unwrap();
    let services = [
        cluster(loopback()),
        udp_cluster(loopback()).with("assign-vip", false),
    ];
    daemon.configure(&["eth0"], &services);
    let check = daemon.xlb(&["check", "-c", config.to_str().unwrap()]);
    assert_eq!((check.code, check.stderr.as_str()), (0, ""));
}

/// Whether this kernel has links in front of the stack and behind it (TCX), and not filters alone.
fn hooks_are_links() -> bool {
    KernelVersion::current().unwrap() >= KernelVersion::new(6, 6, 0)
}

/// Interfaces that have programs in front of the stack or behind it.
fn hooked(namespace: &Namespace) -> Vec<String> {
    let find = || {
        let mut found = Vec::new();
        for interface in ["lo", "eth0"] {
            for (hook, name) in [
                (TcAttachType::Ingress, "xlb_ingress"),
                (TcAttachType::Egress, "xlb_egress"),
            ] {
                // Before 6.6 there is no such query.
                let links =
                    SchedClassifier::query_tcx(interface, hook).map_or(0, |(_, programs)| programs.len());
                let has_filter = tc::qdisc_detach_program(interface, hook, name).is_ok();
                if links > 0 || has_filter {
                    found.push(format!("{hook:?} of {interface}"));
                }
            }
        }
        found
    };
    namespace.run(find).unwrap()
}
