//! `local`: packets for processes on this host pass as they came; another program hands them over.

use lb_common::abi::{Forward, Reason::Local};

use crate::{
    fixture::{DNS, EVERY, Expected, Fixture, LOCAL, LOCAL6, WEB},
    frame::{ACK, RST, SYN, packet_of, tcp, udp, vlan},
};

#[test]
fn a_packet_for_a_process_on_this_host_passes_as_it_came() {
    let mut fixture = Fixture::of(&EVERY);
    for (service, client) in [(LOCAL, "198.51.100.7:5000"), (LOCAL6, "[2001:db8:7::7]:5000")] {
        let mut frame = packet_of(service.protocol, client, service.vip);
        // From a neighbour that allows no hop, too.
        for ttl in [64, 1, 0] {
            frame.ttl = ttl;
            fixture.expect("whole", &frame.bytes(), Expected::passed(Local));
        }
        frame.tags.0[0] = vlan(9);
        fixture.expect("tagged", &frame.bytes(), Expected::passed(Local));
        frame.payload = vec![1; 3000];
        for part in frame.fragments(&[0, 1480]) {
            fixture.expect("fragment", &part, Expected::passed(Local));
        }
        // Without a backend the other program answers.
        fixture.all_slots(&service, 0);
        fixture.expect("no backend", &frame.bytes(), Expected::passed(Local));
    }
    for flags in [ACK, RST] {
        let frame = tcp("198.51.100.7:5001", LOCAL.vip, flags);
        fixture.expect("of no flow", &frame.bytes(), Expected::passed(Local));
    }
    assert!(fixture.flows().is_empty());
}

/// Its flow stays where it is, as with every change of a service.
#[test]
fn a_flow_that_is_older_than_its_services_forward_goes_on_to_its_backend() {
    let mut fixture = Fixture::of(&EVERY);
    for (service, first) in [
        (WEB, tcp("198.51.100.7:5000", WEB.vip, SYN)),
        (DNS, udp("198.51.100.7:5000", DNS.vip)),
    ] {
        fixture.run(&first.bytes());
        fixture.change_service(&service, |service| service.forward = Forward::Local.number());
        let expected = Expected::to_backend(&service, 0, &first, first.source);
        fixture.expect("known", &first.bytes(), expected);
        let mut other = first.clone();
        other.source.set_port(5001);
        fixture.expect("new", &other.bytes(), Expected::passed(Local));
    }
}
