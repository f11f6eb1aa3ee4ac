//! Packets that never arrive end all the same.

use std::time::Duration;

use tests::{daemon::Daemon, echo, machine::eventually, services::Service};
use xlb::lab::{Family, Topology};

use crate::scene::{configure, counted, topology_of};

/// Each balancer has the other one's VIP as its backend.
#[test]
fn two_balancers_that_send_to_each_other_end_it_by_the_time_to_live() {
    for (family, other_vip, other) in [
        (Family::V4, "203.0.113.20", "10.2.1.2"),
        (Family::V6, "2001:db8:10::20", "2001:db8:2:1::2"),
    ] {
        let topology = topology_of(1);
        let vip = Topology::vip(family).to_string();
        topology.balancer.add_route(other_vip, other).unwrap();
        topology.backends[0].pass_no_longer();
        let service = |vip: &str, backend: &str| {
            let service = Service::udp("dns").text("vip", vip);
            service.backend("other", backend)
        };
        let mut first = Daemon::new(&topology.balancer);
        configure(&first, &topology, &[service(&vip, other_vip)]);
        first.start_up();
        let mut second = Daemon::new(&topology.backends[0]);
        second.configure(&["eth0"], &[service(other_vip, &vip)]);
        second.start_up();

        let source = topology.client_addresses_of(family).next().unwrap();
        let send = || {
            let socket = echo::udp_socket((source, 0).into()).unwrap();
            let server = (Topology::vip(family), 5353);
            for _ in 0..10 {
                socket.send_to(b"round and round", server).unwrap();
            }
        };
        topology.client.run(send).unwrap();
        let both = |reason| counted(&first, reason) + counted(&second, reason);
        eventually("the loop ends", Duration::from_secs(10), || {
            both("ttl-exceeded") == 10
        });
        // Linux begins with 64, and the last one does not send it on.
        assert_eq!(both("forwarded"), 10 * 63, "{family:?}");
    }
}
