//! Flows end, and leave nothing behind.

use std::{
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use tests::{daemon::Daemon, machine::eventually, maps, services::Service, udp, udp::UdpEcho};
use xlb::lab::Topology;

use crate::scene::topology;

#[test]
fn idle_udp_flows_end_and_leave_empty_tables() {
    let server = SocketAddr::new(Topology::VIP.into(), 5353);
    for forward in ["nat", "full-nat"] {
        let topology = topology();
        let _a = UdpEcho::start(&topology.backends[0], "a", "10.2.1.2:9000".parse().unwrap());
        let _b = UdpEcho::start(&topology.backends[1], "b", "10.2.2.2:9000".parse().unwrap());
        let mut daemon = Daemon::new(&topology.balancer);
        let service = Service::udp("dns")
            .text("forward", forward)
            .backend("a", "10.2.1.2:9000")
            .backend("b", "10.2.2.2:9000");
        let keys = "[flow-table]\nsize = 65536\nudp-idle-timeout = \"1s\"";
        daemon.configure_with(keys, &["eth0", "eth1", "eth2"], &[service]);
        daemon.start_up();

        // Beside those that end, one that goes on.
        let alive = topology
            .client
            .run(|| UdpSocket::bind("10.1.0.2:40000"))
            .unwrap()
            .unwrap();
        let many = || {
            for port in 20_000..20_200 {
                let socket = UdpSocket::bind(("10.1.0.2", port)).unwrap();
                udp::ask(&socket, server).unwrap();
            }
        };
        let (first, _) = udp::ask(&alive, server).unwrap();
        topology.client.run(many).unwrap();
        udp::ask(&alive, server).unwrap();
        eventually("the idle flows end", Duration::from_secs(12), || {
            assert_eq!(udp::ask(&alive, server).unwrap().0, first);
            maps::flows(&daemon.pins()).len() == 1
        });
        let (key, _) = maps::flows(&daemon.pins())[0];
        assert_eq!(u16::from_be(key.source_port), 40_000);
        assert_eq!(maps::replies(&daemon.pins()), 1);

        drop(alive);
        eventually("the last flow ends", Duration::from_secs(12), || {
            maps::flows(&daemon.pins()).is_empty()
        });
        assert_eq!(maps::replies(&daemon.pins()), 0);
        daemon.wait_for("the status knows", |status| status.flow_table.flows == 0);
        let counted: u64 = daemon.status().services[0]
            .backends
            .iter()
            .map(|b| b.flows_total)
            .sum();
        assert_eq!(counted, 201);
    }
}
