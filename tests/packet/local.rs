//! `local`: a process on this host gets the packet as it is.

use lb_common::abi::{BackendFlags, Forward};

use crate::{
    fixture::{Expected, Fixture, LOCAL, LOCAL6, TestService},
    frame::{SYN, packet_of, tcp},
};

fn client(service: &TestService) -> &'static str {
    if service.vip.is_ipv4() {
        "198.51.100.7:5000"
    } else {
        "[2001:db8:7::7]:5000"
    }
}

#[test]
fn a_packet_for_a_process_on_this_host_passes_as_it_came_and_its_flow_is_recorded() {
    let mut fixture = Fixture::every();
    for service in [LOCAL, LOCAL6] {
        let first = packet_of(service.protocol, client(&service), service.vip);
        fixture.expect("first", &first.bytes(), Expected::local(&service, 0).new_flow());
        let flow = fixture.flow(&first).unwrap();
        assert_eq!(flow.backend, service.backends[0].id);
        assert_eq!(flow.forward, Forward::Local.number());
        fixture.all_slots(&service, service.backends[1].id);
        // No next hop is asked for, nor is there a hop.
        fixture.change_backend(&service, 0, |backend| {
            backend.flags &= !BackendFlags::NEXT_HOP_KNOWN;
        });
        fixture.expect("known", &first.bytes(), Expected::local(&service, 0));
    }
    fixture.change_backend(&LOCAL, 0, |_| ());
    fixture.all_slots(&LOCAL, LOCAL.backends[0].id);
    let mut near = tcp(client(&LOCAL), LOCAL.vip, SYN);
    near.source.set_port(5001);
    near.ttl = 1;
    let expected = Expected::local(&LOCAL, 0).new_flow();
    fixture.expect("from a neighbour that allows no hop", &near.bytes(), expected);
}
