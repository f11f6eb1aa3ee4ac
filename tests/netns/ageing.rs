//! Flows end, and leave nothing behind.

use std::{
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use tests::{daemon::Daemon, machine::eventually, maps, services::Service, udp, udp::UdpEcho};
use xlb::{lab::Topology, observe::status::ServiceStatus};

use crate::scene::topology;

#[test]
fn idle_udp_flows_end_and_leave_empty_tables() {
    let topology = topology();
    let _a = UdpEcho::start(&topology.backends[0], "a", "10.2.1.2:9000".parse().unwrap());
    let _b = UdpEcho::start(&topology.backends[1], "b", "10.2.2.2:9000".parse().unwrap());
    let mut daemon = Daemon::new(&topology.balancer);
    let service = |forward: &str, port: u16| {
        Service::udp(forward)
            .text("forward", forward)
            .with("port", port)
            .backend("a", "10.2.1.2:9000")
            .backend("b", "10.2.2.2:9000")
    };
    let keys = "[flow-table]\nsize = 65536\nudp-idle-timeout = \"1s\"";
    let services = [service("nat", 5353), service("full-nat", 5354)];
    daemon.configure_with(keys, &["eth0", "eth1", "eth2"], &services);
    daemon.start_up();
    let servers = [5353, 5354].map(|port| SocketAddr::new(Topology::VIP.into(), port));

    // Beside those that end, one of each service that goes on.
    let alive = topology
        .client
        .run(|| UdpSocket::bind("10.1.0.2:40000"))
        .unwrap()
        .unwrap();
    let ask = |server| udp::ask(&alive, server).unwrap().0;
    let first = servers.map(ask);
    let many = || {
        for port in 20_000..20_100 {
            let socket = UdpSocket::bind(("10.1.0.2", port)).unwrap();
            for server in servers {
                udp::ask(&socket, server).unwrap();
            }
        }
    };
    topology.client.run(many).unwrap();
    eventually("the idle flows end", Duration::from_secs(12), || {
        assert_eq!(servers.map(ask), first);
        maps::flows(&daemon.pins()).len() == 2
    });
    for (key, _) in maps::flows(&daemon.pins()) {
        assert_eq!(u16::from_be(key.source_port), 40_000);
    }
    // One for that of `nat`, and for that of `full-nat` two and one that leads to it from its replies.
    eventually(
        "what leads to the others is gone",
        Duration::from_secs(12),
        || {
            assert_eq!(servers.map(ask), first);
            maps::units_in_use(&daemon.pins()) == 4
        },
    );

    drop(alive);
    eventually("the last flows end", Duration::from_secs(12), || {
        maps::flows(&daemon.pins()).is_empty()
    });
    eventually("the table is empty", Duration::from_secs(12), || {
        maps::units_in_use(&daemon.pins()) == 0
    });
    daemon.wait_for("the status knows", |status| status.flow_table.flows == 0);
    let services = daemon.status().services;
    let counted = |service: &ServiceStatus| service.backends.iter().map(|b| b.flows_total).sum();
    // The many may have taken longer than the timeout of the one.
    assert!(services.iter().map(counted).all(|flows: u64| flows >= 101));
}
