//! Datagrams that are longer than a packet arrive whole, in both directions.

use std::{net::SocketAddr, time::Duration};

use tests::{echo, echo::Echo, machine, nginx, services::Service};
use xlb::lab::{Family, Route};

use crate::{
    matrix::{self, Forward, Group},
    scene::{balance, counted, topology_of},
};

const DATAGRAMS: usize = 200;
const SOCKETS: usize = 8;
const LENGTH: usize = 4000;

/// Sends the datagrams and compares what comes back. The first of each socket's may be lost where the client has yet to
/// learn what fits.
fn exchange(group: Group, backend_mtu: u32, learns: bool) {
    let topology = topology_of(1);
    let _decaps = matrix::prepare(&topology, group);
    topology.set_backend_mtu(backend_mtu).unwrap();
    // The network behind the balancer, whose own errors to the VIP would not come by it, is narrower than this link.
    for (everything, family) in [("0.0.0.0/0", Family::V4), ("::/0", Family::V6)] {
        let address = topology.backend_address_of(0, family).to_string();
        let gateway = address
            .strip_suffix('2')
            .map(|network| format!("{network}1"))
            .unwrap();
        let mut route = Route::by(everything.parse().unwrap(), gateway.parse().unwrap());
        route.mtu = Some(1500);
        topology.backends[0].set_route(&route).unwrap();
    }
    let _echo = Echo::start(&topology.backends[0], "a", matrix::listen_address(group, 0));
    let daemon = balance(&topology, &[matrix::of_group(Service::udp("dns"), group, &["a"])]);

    let address = topology.client_addresses_of(group.vip).next().unwrap();
    let data = nginx::big_file();
    let all = || {
        let bind = |_| echo::udp_socket(SocketAddr::new(address, 0)).unwrap();
        let sockets: Vec<_> = (0..SOCKETS).map(bind).collect();
        if learns {
            let timeout = machine::bound(Duration::from_millis(500));
            sockets[0].set_read_timeout(Some(timeout)).unwrap();
            let heard = (0..10).any(|_| echo::ask(&sockets[0], group.server(), &data[..LENGTH]).is_ok());
            assert!(heard, "{group:?}: ten datagrams were lost");
        }
        for number in 0..machine::count(DATAGRAMS) {
            let answer = echo::ask(
                &sockets[number % SOCKETS],
                group.server(),
                &data[number..][..LENGTH],
            );
            let answer = answer.unwrap_or_else(|error| panic!("{group:?}, datagram {number}: {error}"));
            assert_eq!(answer.name, "a");
        }
    };
    topology.client.run(all).unwrap();

    let status = daemon.status();
    let service = &status.services[0];
    assert_eq!(counted(&daemon, "too-big-answered") > 0, learns, "{group:?}");
    if !learns {
        assert_eq!(status.packets.dropped, 0, "{group:?}: {:?}", service.reasons);
    }
    // Three fragments are one flow's.
    assert!(service.reasons["forwarded"].packets >= 3 * machine::count(DATAGRAMS) as u64);
    assert_eq!(service.backends[0].flows_total, SOCKETS as u64, "{group:?}");
}

fn group(forward: Forward, family: Family) -> Group {
    Group {
        forward,
        vip: family,
        backends: family,
    }
}

#[test]
fn fragmented_datagrams_arrive_whole_by_nat() {
    for family in Family::ALL {
        exchange(group(Forward::Nat, family), 1500, false);
    }
}

#[test]
fn fragmented_datagrams_arrive_whole_by_full_nat() {
    for family in Family::ALL {
        exchange(group(Forward::FullNat, family), 1500, false);
    }
}

#[test]
fn fragmented_datagrams_arrive_whole_by_dsr() {
    for family in Family::ALL {
        exchange(group(Forward::Dsr, family), 1500, false);
    }
}

#[test]
fn fragmented_datagrams_arrive_whole_when_they_are_wrapped() {
    for forward in [Forward::IpIp, Forward::Gue] {
        for family in Family::ALL {
            exchange(group(forward, family), 1600, false);
        }
    }
}

#[test]
fn datagrams_whose_fragments_do_not_fit_once_wrapped_arrive_in_smaller_ones() {
    for forward in [Forward::IpIp, Forward::Gue] {
        for family in Family::ALL {
            exchange(group(forward, family), 1500, true);
        }
    }
}
