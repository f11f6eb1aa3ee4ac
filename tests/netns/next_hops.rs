//! The ways to the backends change.

use std::{net::SocketAddr, thread, time::Duration};

use tests::{
    daemon::Daemon,
    http::Connection,
    load::{assert_shares, requests},
    machine::{self, eventually},
    nginx::Nginx,
    services::Service,
};
use xlb::lab::{Namespace, Topology};

use crate::scene::{INTERFACES, WEB, nginx, source, topology, topology_of, web};

fn one_backend() -> Service {
    Service::tcp("web")
        .health("type = \"none\"")
        .backend("a", "10.2.1.2:8080")
}

/// Whether a new connection is answered.
fn is_answered(topology: &Topology) -> bool {
    Connection::open(&topology.client, WEB)
        .and_then(|mut open| open.get("/"))
        .is_ok()
}

#[test]
fn traffic_resumes_when_a_backend_comes_back_with_another_mac() {
    let topology = topology_of(1);
    let backend = &topology.backends[0];
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&["eth0", "eth1"], &[one_backend()]);
    daemon.start_up();
    let mut idle = Connection::open(&topology.client, WEB).unwrap();
    assert_eq!(idle.get("/").unwrap(), "a");

    let resumes = |idle: &mut Connection| {
        eventually("new connections are answered", Duration::from_secs(60), || {
            is_answered(&topology)
        });
        assert_eq!(idle.get("/").unwrap(), "a", "an existing connection goes on");
    };

    // As when its interface is replaced: the carrier goes, and comes back with another address.
    backend.set_down("eth0").unwrap();
    eventually("the carrier has gone", Duration::from_secs(10), || {
        !topology.balancer.link("eth1").unwrap().running
    });
    backend.set_mac("eth0", [2, 0, 0, 0, 0, 0x77]).unwrap();
    backend.set_up("eth0").unwrap();
    backend.add_route("0.0.0.0/0", "10.2.1.1").unwrap();
    resumes(&mut idle);

    // As when the address moves to another host, which announces it.
    backend.sysctl("net/ipv4/conf/eth0/arp_notify", "1").unwrap();
    backend.set_mac("eth0", [2, 0, 0, 0, 0, 0x78]).unwrap();
    resumes(&mut idle);

    // As when it does not: the kernel has to find out, after half a minute unless told to be quicker.
    for (key, value) in [
        ("base_reachable_time_ms", "1000"),
        ("delay_first_probe_time", "1"),
    ] {
        topology
            .balancer
            .sysctl(&format!("net/ipv4/neigh/eth1/{key}"), value)
            .unwrap();
    }
    // It goes by the new times when the old ones have passed, or it hears of the neighbour.
    backend.set_mac("eth0", [2, 0, 0, 0, 0, 0x79]).unwrap();
    resumes(&mut idle);
    backend.sysctl("net/ipv4/conf/eth0/arp_notify", "0").unwrap();
    backend.set_mac("eth0", [2, 0, 0, 0, 0, 0x7a]).unwrap();
    resumes(&mut idle);
    assert_eq!(daemon.backend("web", "a").next_hop_problem, None);
}

#[test]
fn a_backend_behind_a_router_is_reached() {
    for forward in ["nat", "full-nat"] {
        let topology = topology();
        let _nginx = nginx(&topology);
        // The third host is a router to another network.
        let (router, far) = (&topology.backends[2], Namespace::new("far").unwrap());
        Namespace::connect(router, "eth1", &far, "eth0").unwrap();
        router.sysctl("net/ipv4/ip_forward", "1").unwrap();
        router.add_address("eth1", "10.9.0.1/24").unwrap();
        router.disable_offload("eth1").unwrap();
        far.add_address("eth0", "10.9.0.2/24").unwrap();
        far.add_route("0.0.0.0/0", "10.9.0.1").unwrap();
        far.disable_offload("eth0").unwrap();
        topology.balancer.add_route("10.9.0.0/24", "10.2.3.2").unwrap();
        let _far_nginx = Nginx::start(&far, "far", "10.9.0.2:8080".parse().unwrap());

        let mut daemon = Daemon::new(&topology.balancer);
        let service = web().without("c").backend("far", "10.9.0.2:8080");
        daemon.configure(&INTERFACES, &[service.text("forward", forward)]);
        daemon.start_up();
        let answers = requests(&topology.client, source(), WEB, machine::count(1000));
        for name in ["a", "b", "far"] {
            assert!(answers.contains_key(name), "{answers:?}");
        }
        assert_eq!(answers.len(), 3, "{answers:?}");
    }
}

#[test]
fn the_first_connection_after_the_start_is_answered() {
    let topology = topology_of(1);
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&["eth0", "eth1"], &[one_backend()]);
    daemon.start();
    // Whether the neighbour is resolved by now or not.
    assert_eq!(
        Connection::open(&topology.client, WEB).unwrap().get("/").unwrap(),
        "a"
    );
}

#[test]
fn a_backend_whose_neighbour_answers_late_gets_its_connections() {
    let topology = topology_of(1);
    let backend = &topology.backends[0];
    let mut daemon = Daemon::new(&topology.balancer);
    backend.set_down("eth0").unwrap();
    daemon.configure(&["eth0", "eth1"], &[one_backend()]);
    daemon.start();
    let problem = daemon
        .backend("web", "a")
        .next_hop_problem
        .expect("a problem with the next hop");
    assert!(!problem.is_empty());

    // A client that asks before the backend is there, and keeps asking as TCP does.
    let server: SocketAddr = WEB;
    let early = topology
        .client
        .spawn(move || Connection::dial(server, None).is_ok())
        .unwrap();
    thread::sleep(Duration::from_millis(500));
    backend.set_up("eth0").unwrap();
    backend.add_route("0.0.0.0/0", "10.2.1.1").unwrap();
    let _nginx = nginx(&topology);
    eventually("connections are answered", Duration::from_secs(15), || {
        is_answered(&topology)
    });
    daemon.wait_for("the next hop is known", |status| {
        status.services[0].backends[0].next_hop_problem.is_none()
    });
    // It may have given up in that time, but it must not hang.
    let _ = early.join().unwrap().unwrap();
    requests(&topology.client, source(), WEB, machine::count(100));
}

#[test]
fn the_loss_of_one_next_hop_leaves_the_other_backends_alone() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web()]);
    daemon.start_up();
    topology.backends[2].set_down("eth0").unwrap();
    daemon.wait_for("c is down", |status| {
        status.services[0].backends[2].health == xlb::model::Health::Down
    });
    let answers = requests(&topology.client, source(), WEB, machine::count(1000));
    assert_eq!(answers.len(), 2, "{answers:?}");
    topology.backends[2].set_up("eth0").unwrap();
    topology.backends[2].add_route("0.0.0.0/0", "10.2.3.1").unwrap();
    daemon.wait_for("c is up", |status| {
        let backend = &status.services[0].backends[2];
        backend.health == xlb::model::Health::Up && backend.next_hop_problem.is_none()
    });
    let source = "10.1.0.2:20000".parse().unwrap();
    let answers = requests(&topology.client, source, WEB, machine::count(3000));
    assert_shares(&answers, &[("a", 1), ("b", 1), ("c", 1)]);
}

#[test]
fn a_backend_of_forward_local_is_to_be_this_host_itself() {
    let topology = topology_of(1);
    let mut daemon = Daemon::new(&topology.balancer);
    let service = Service::tcp("web")
        .text("forward", "local")
        .health("type = \"none\"")
        .backend("own", "10.1.0.1:8080")
        .backend("loopback", "127.0.0.2:8080")
        .backend("other", "10.2.1.2:8080");
    daemon.configure(&["eth0", "eth1"], &[service]);
    daemon.start();
    let problem = |backend| daemon.backend("web", backend).next_hop_problem;
    assert_eq!(problem("own"), None);
    assert_eq!(problem("loopback"), None);
    assert_eq!(
        problem("other").as_deref(),
        Some("it is no address of this host, to which forward \"local\" delivers")
    );
}
