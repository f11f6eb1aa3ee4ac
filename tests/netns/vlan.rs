//! Backends behind VLAN devices of the balancer.

use std::net::SocketAddr;

use lb_common::abi::{BackendFlags, Link, Tags};
use tests::{daemon::Daemon, machine, maps, nginx::Nginx, services::Service};
use xlb::lab::VlanTag;

use crate::scene::topology_of;

#[test]
fn the_way_to_a_backend_behind_vlan_devices_has_their_tags_and_the_interface_below() {
    if !machine::has_vlan_devices() {
        eprintln!("not run: this kernel has no VLAN devices (802.1Q)");
        return;
    }
    let topology = topology_of(1);
    let (balancer, backend) = (&topology.balancer, &topology.backends[0]);
    for (namespace, lower, last) in [(balancer, "eth1", 1), (backend, "eth0", 2)] {
        for (name, below, tag) in [
            ("customer", lower, VlanTag::Customer(100)),
            ("service", lower, VlanTag::Service(200)),
            ("stacked", "service", VlanTag::Customer(7)),
        ] {
            namespace.add_vlan(name, below, tag).unwrap();
        }
        for (name, network) in [("customer", "10.8.1"), ("stacked", "10.8.2")] {
            namespace
                .add_address(name, &format!("{network}.{last}/24"))
                .unwrap();
        }
    }
    balancer.set_mac("stacked", [2, 0, 0, 0, 0, 0x42]).unwrap();
    balancer.set_mtu("customer", 1496).unwrap();

    let backends = [
        ("plain", "10.2.1.2", "eth1", [0, 0], 1500),
        (
            "customer",
            "10.8.1.2",
            "customer",
            [Tags::tag(0x8100, 100), 0],
            1496,
        ),
        (
            "stacked",
            "10.8.2.2",
            "stacked",
            [Tags::tag(0x88a8, 200), Tags::tag(0x8100, 7)],
            1500,
        ),
    ];
    let _nginx: Vec<Nginx<'_>> = backends
        .iter()
        .map(|(name, address, ..)| {
            Nginx::start(backend, name, SocketAddr::new(address.parse().unwrap(), 8080))
        })
        .collect();
    let mut daemon = Daemon::new(balancer);
    let mut service = Service::tcp("web");
    for (name, address, ..) in backends {
        service = service.backend(name, &format!("{address}:8080"));
    }
    daemon.configure(&["eth0", "eth1"], &[service]);
    // The interface below is one of the configuration's, so no problem is told.
    daemon.start_up();

    let contents = maps::contents(&daemon.pins());
    let eth1 = balancer.ifindex("eth1").unwrap();
    for (name, address, device, tags, mtu) in backends {
        let address = address.parse::<std::net::IpAddr>().unwrap().into();
        let mut entries = contents.backends.values();
        let entry = entries.find(|entry| entry.address == address).unwrap();
        // VLAN devices of the backend's host have the MAC address of its interface.
        let from = balancer.link(device).unwrap().mac.unwrap();
        let to = backend.link("eth0").unwrap().mac.unwrap();
        assert_eq!(entry.ifindex, eth1, "{name}");
        assert_eq!(entry.tags, Tags(tags), "{name}");
        assert_eq!(entry.mtu, mtu, "{name}");
        assert_eq!(entry.link, Link::new(to, from), "{name}");
        assert_ne!(entry.flags & BackendFlags::NEXT_HOP_KNOWN, 0, "{name}");
    }
}
