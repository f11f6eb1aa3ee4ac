//! What most tests begin with: three nginx backends `a`, `b` and `c` behind a balancer.

use std::net::{IpAddr, SocketAddr};

use tests::{daemon::Daemon, http::Connection, machine, nginx::Nginx, services::Service};
use xlb::{
    datapath::pass::PassAll,
    lab::{Namespace, Topology},
};

/// Where the clients connect to.
pub const WEB: SocketAddr = SocketAddr::new(IpAddr::V4(Topology::VIP), 80);

/// Interfaces of the balancer of [`topology`].
pub const INTERFACES: [&str; 4] = ["eth0", "eth1", "eth2", "eth3"];

/// The address that requests come from, and the first of their ports.
pub fn source() -> SocketAddr {
    "10.1.0.2:10000".parse().unwrap()
}

/// A client, a balancer and three hosts for backends.
pub fn topology() -> Topology {
    topology_of(3)
}

pub fn topology_of(backends: usize) -> Topology {
    machine::require_root_nginx_and_curl();
    Topology::routed(backends).unwrap()
}

/// An nginx on port 8080 of each host.
pub fn nginx(topology: &Topology) -> Vec<Nginx<'_>> {
    let hosts = topology.backends.iter().zip(["a", "b", "c", "d"]).enumerate();
    hosts
        .map(|(index, (host, name))| {
            Nginx::start(host, name, SocketAddr::new(topology.backend_address(index), 8080))
        })
        .collect()
}

/// The service `web` over the three.
pub fn web() -> Service {
    Service::tcp("web")
        .backend("a", "10.2.1.2:8080")
        .backend("b", "10.2.2.2:8080")
        .backend("c", "10.2.3.2:8080")
}

/// Starts a daemon on all interfaces of the balancer, and waits until all backends may get packets.
pub fn balance<'a>(topology: &'a Topology, services: &[Service]) -> Daemon<'a> {
    let mut daemon = Daemon::new(&topology.balancer);
    configure(&daemon, topology, services);
    daemon.start_up();
    daemon
}

/// Writes the configuration of a daemon on all interfaces of the balancer.
pub fn configure(daemon: &Daemon, topology: &Topology, services: &[Service]) {
    let interfaces = topology.balancer_interfaces();
    let interfaces: Vec<&str> = interfaces.iter().map(String::as_str).collect();
    daemon.configure(&interfaces, services);
}

/// Packets that the first service has counted for a reason.
pub fn counted(daemon: &Daemon, reason: &str) -> u64 {
    let status = daemon.status();
    let traffic = status.services[0].reasons.get(reason);
    traffic.map_or(0, |traffic| traffic.packets)
}

/// An open connection to a certain backend of `web`.
pub fn connection_to(topology: &Topology, backend: &str) -> Connection {
    connection_by(topology, WEB, backend)
}

/// An open connection to a certain backend of a service.
pub fn connection_by(topology: &Topology, service: SocketAddr, backend: &str) -> Connection {
    for _ in 0..200 {
        let mut connection = Connection::open(&topology.client, service).unwrap();
        if connection.get("/").unwrap() == backend {
            return connection;
        }
    }
    panic!("of 200 connections none went to {backend}");
}

/// Whether an interface has an XDP program: it takes no second one.
pub fn has_program(namespace: &Namespace, interface: &str) -> bool {
    let index = namespace.ifindex(interface).unwrap();
    match namespace.run(|| PassAll::attach(index)).unwrap() {
        Ok(_) => false,
        Err(error) if error.source.raw_os_error() == Some(libc::EBUSY) => true,
        Err(error) => panic!("{error}"),
    }
}
