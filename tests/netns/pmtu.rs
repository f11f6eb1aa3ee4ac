//! Paths that are narrower than both ends know: they are told, by whatever forward (RFC 1191, RFC 8201).

use std::net::SocketAddr;

use tests::{
    daemon::Daemon, echo::Conversation, echo::Echo, http::Connection, nginx, nginx::Nginx, services::Service,
};
use xlb::lab::{Family, Namespace, Topology};

use crate::{
    matrix::{self, Forward, Group},
    scene::{balance, counted, topology_of},
};

/// A host that has the lab's client as its router; the router's interface to it is `eth1`.
fn behind_the_client(topology: &Topology) -> Namespace {
    let far = Namespace::new("far").unwrap();
    Namespace::connect(&far, "eth0", &topology.client, "eth1").unwrap();
    for (key, value) in [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")] {
        topology.client.sysctl(&format!("net/{key}"), value).unwrap();
    }
    for (network, router, host, everything, client) in [
        (
            "10.3.0.0/24",
            "10.3.0.1/24",
            "10.3.0.2/24",
            "0.0.0.0/0",
            "10.1.0.2",
        ),
        (
            "2001:db8:3::/64",
            "2001:db8:3::1/64",
            "2001:db8:3::2/64",
            "::/0",
            "2001:db8:1::2",
        ),
    ] {
        topology.client.add_address("eth1", router).unwrap();
        far.add_address("eth0", host).unwrap();
        let (gateway, _) = router.split_once('/').unwrap();
        far.add_route(everything, gateway).unwrap();
        topology.balancer.add_route(network, client).unwrap();
    }
    far.disable_offload("eth0").unwrap();
    far
}

/// The path from the balancer to the client shrinks between two requests: the backend hears of it.
fn a_download_goes_on_when_the_path_shrinks(forward: Forward, vip: Family, backends: Family) {
    let group = Group {
        forward,
        vip,
        backends,
    };
    let topology = topology_of(1);
    let far = behind_the_client(&topology);
    let _decaps = matrix::prepare(&topology, group);
    let host = if forward == Forward::Local {
        &topology.balancer
    } else {
        &topology.backends[0]
    };
    let _nginx = Nginx::start(host, "a", matrix::listen_address(group, 0));
    let daemon = balance(&topology, &[matrix::of_group(Service::tcp("web"), group, &["a"])]);

    let mut connection = Connection::open(&far, group.server()).unwrap();
    assert_eq!(connection.get("/").unwrap(), "a");
    assert_eq!(counted(&daemon, "error-forwarded"), 0);
    topology.client.set_mtu("eth1", 1400).unwrap();
    let downloaded = connection.download().finish();
    downloaded.unwrap_or_else(|error| panic!("{group:?}: {error}"));
    nothing_is_dropped(&daemon);
    if forward == Forward::Local {
        // The stack hears of it by itself.
        return;
    }
    assert!(counted(&daemon, "error-forwarded") > 0, "{group:?}");

    // Whoever comes next has no more to learn.
    let told = counted(&daemon, "error-forwarded");
    let connection = Connection::open(&far, group.server()).unwrap();
    connection.download().finish().unwrap();
    assert_eq!(counted(&daemon, "error-forwarded"), told, "{group:?}");
}

fn nothing_is_dropped(daemon: &Daemon) {
    let status = daemon.status();
    assert_eq!(status.packets.dropped, 0, "{:?}", status.services[0].reasons);
}

#[test]
fn a_download_by_nat_goes_on_when_the_path_to_the_client_shrinks() {
    for family in Family::ALL {
        a_download_goes_on_when_the_path_shrinks(Forward::Nat, family, family);
    }
}

#[test]
fn a_download_by_full_nat_goes_on_when_the_path_to_the_client_shrinks() {
    for family in Family::ALL {
        a_download_goes_on_when_the_path_shrinks(Forward::FullNat, family, family);
    }
}

#[test]
fn a_download_by_dsr_goes_on_when_the_path_to_the_client_shrinks() {
    for family in Family::ALL {
        a_download_goes_on_when_the_path_shrinks(Forward::Dsr, family, family);
    }
}

#[test]
fn a_download_by_ipip_goes_on_when_the_path_to_the_client_shrinks() {
    for (vip, backends) in FAMILIES {
        a_download_goes_on_when_the_path_shrinks(Forward::IpIp, vip, backends);
    }
}

#[test]
fn a_download_by_gue_goes_on_when_the_path_to_the_client_shrinks() {
    for (vip, backends) in FAMILIES {
        a_download_goes_on_when_the_path_shrinks(Forward::Gue, vip, backends);
    }
}

#[test]
fn a_download_from_a_process_on_this_host_goes_on_when_the_path_to_the_client_shrinks() {
    for family in Family::ALL {
        a_download_goes_on_when_the_path_shrinks(Forward::Local, family, family);
    }
}

/// Inner and outer.
const FAMILIES: [(Family, Family); 4] = [
    (Family::V4, Family::V4),
    (Family::V4, Family::V6),
    (Family::V6, Family::V4),
    (Family::V6, Family::V6),
];

/// All links have the same MTU, so that a full segment does not fit once it is wrapped: the client is told.
fn an_upload_fits_after_the_client_was_told(forward: Forward) {
    for (vip, backends) in FAMILIES {
        let group = Group {
            forward,
            vip,
            backends,
        };
        let topology = topology_of(1);
        let _decaps = matrix::prepare(&topology, group);
        topology.set_backend_mtu(1500).unwrap();
        let _echo = Echo::start(&topology.backends[0], "a", matrix::listen_address(group, 0));
        let daemon = balance(&topology, &[matrix::of_group(Service::tcp("web"), group, &["a"])]);

        let source = SocketAddr::new(topology.client_addresses_of(vip).next().unwrap(), 0);
        let upload = || Conversation::open(source, group.server())?.exchange(&nginx::big_file()[..1 << 20]);
        let answer = topology.client.run(upload).unwrap();
        let answer = answer.unwrap_or_else(|error| panic!("{group:?}: {error}"));
        assert_eq!((answer.name.as_str(), answer.peer), ("a", source.ip()));
        let told = counted(&daemon, "too-big-answered");
        assert!(told > 0, "{group:?}");
        nothing_is_dropped(&daemon);

        // The client's host remembers.
        topology.client.run(upload).unwrap().unwrap();
        assert_eq!(counted(&daemon, "too-big-answered"), told, "{group:?}");
    }
}

#[test]
fn an_upload_by_ipip_without_room_for_more_headers_completes() {
    an_upload_fits_after_the_client_was_told(Forward::IpIp);
}

#[test]
fn an_upload_by_gue_without_room_for_more_headers_completes() {
    an_upload_fits_after_the_client_was_told(Forward::Gue);
}
