//! Backends that are clients of their own service.

use std::{collections::BTreeSet, net::SocketAddr};

use tests::{echo, echo::Echo, load::requests, nginx::Nginx, services::Service};
use xlb::lab::Family;

use crate::{
    matrix::{self, Forward, Group},
    scene::{balance, topology_of},
};

const CONNECTIONS: usize = 50;
const NAMES: [&str; 3] = ["a", "b", "c"];

#[test]
fn a_backend_reaches_its_own_service_by_nat_and_itself_by_it() {
    for forward in [Forward::Nat, Forward::FullNat] {
        for family in Family::ALL {
            let group = Group {
                forward,
                vip: family,
                backends: family,
            };
            let topology = topology_of(3);
            let hosts = topology.backends.iter().zip(NAMES).enumerate();
            let _nginx: Vec<Nginx<'_>> = hosts
                .map(|(index, (host, name))| Nginx::start(host, name, matrix::listen_address(group, index)))
                .collect();
            let daemon = balance(&topology, &[matrix::of_group(Service::tcp("web"), group, &NAMES)]);
            for (index, host) in topology.backends.iter().enumerate() {
                let source = SocketAddr::new(topology.backend_address_of(index, family), 10_000);
                let answers = requests(host, source, group.server(), CONNECTIONS);
                let names: BTreeSet<&str> = answers.keys().map(String::as_str).collect();
                assert_eq!(names, BTreeSet::from(NAMES), "{group:?}, from {source}");
                assert_eq!(answers.values().sum::<usize>(), CONNECTIONS);
            }
            let status = daemon.status();
            assert_eq!(status.packets.dropped, 0, "{:?}", status.services[0].reasons);
        }
    }
}

#[test]
fn datagrams_of_a_backend_to_its_own_service_are_answered_by_the_vip() {
    for family in Family::ALL {
        let group = Group {
            forward: Forward::Nat,
            vip: family,
            backends: family,
        };
        let topology = topology_of(1);
        let _echo = Echo::start(&topology.backends[0], "a", matrix::listen_address(group, 0));
        let _daemon = balance(&topology, &[matrix::of_group(Service::udp("dns"), group, &["a"])]);
        let address = topology.backend_address_of(0, family);
        let all = || {
            for number in 0..CONNECTIONS {
                let socket = echo::udp_socket(SocketAddr::new(address, 0)).unwrap();
                let answer = echo::ask(&socket, group.server(), &[number as u8; 700]).unwrap();
                // It is not itself to itself, or its answer would not come by the balancer.
                assert_ne!(answer.peer, address);
            }
        };
        topology.backends[0].run(all).unwrap();
    }
}
