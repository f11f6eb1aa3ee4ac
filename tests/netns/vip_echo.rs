//! Echo requests to a VIP are answered, whether or not the host has it.

use tests::{ping::ping, services::Service};
use xlb::lab::{Family, Topology};

use crate::{
    matrix::{self, Forward, Group},
    scene::{balance, topology_of},
};

#[test]
fn echo_requests_to_a_vip_are_answered_in_both_families() {
    for forward in [Forward::Nat, Forward::Dsr, Forward::Gue] {
        for family in Family::ALL {
            let group = Group {
                forward,
                vip: family,
                backends: family,
            };
            let topology = topology_of(1);
            let daemon = balance(&topology, &[matrix::of_group(Service::tcp("web"), group, &["a"])]);
            let vip = Topology::vip(family);
            assert_eq!(ping(&topology.client, vip, 20).unwrap(), 20, "{group:?}");
            let status = daemon.status();
            assert_eq!(
                status.reasons["echo-answered"].packets, 20,
                "{:?}",
                status.reasons
            );
            // The other family's is no VIP here, and the host does not have it.
            let other = Topology::vip(Family::ALL.into_iter().find(|other| *other != family).unwrap());
            assert_eq!(ping(&topology.client, other, 1).unwrap(), 0, "{group:?}");
        }
    }
}
