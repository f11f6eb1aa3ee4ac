//! `local`: a process on this host gets the packet as it is; the programs behind this one find the process.

use crate::{
    fixture::{Expected, Fixture, LOCAL, LOCAL6},
    frame::packet_of,
};

#[test]
fn a_packet_for_a_process_on_this_host_passes_as_it_came() {
    let mut fixture = Fixture::every();
    for (service, client) in [(LOCAL, "198.51.100.7:5000"), (LOCAL6, "[2001:db8:7::7]:5000")] {
        let mut packet = packet_of(service.protocol, client, service.vip);
        let expected = Expected::passed(lb_common::abi::Reason::Local);
        fixture.expect("first", &packet.bytes(), expected.clone());
        packet.ttl = 1;
        fixture.expect("from a neighbour that allows no hop", &packet.bytes(), expected);
    }
    assert!(fixture.flows().is_empty());
}
