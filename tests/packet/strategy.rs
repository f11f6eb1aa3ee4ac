//! Which backend a new flow gets, against slot tables that tell each slot apart.

mod properties;
mod sequences;

use std::collections::BTreeSet;

use lb_common::{
    abi::{BackendFlags, MANY_SLOTS, Strategy},
    logic::hash::{client_hash, flow_hash, slot_of},
};
use xlb::datapath::{Operation, Pool};

use crate::{
    fixture::{DNS, Expected, Fixture, SETTINGS, WEB},
    frame::{ACK, Frame, SYN, address, tcp, udp},
};

fn clients() -> impl Iterator<Item = Frame> {
    (0..200u16).map(|number| {
        let mut syn = tcp("198.51.100.7:5000", WEB.vip, SYN);
        syn.source = address(&format!("198.51.{}.{}:{}", number % 7, number, 5000 + number));
        syn
    })
}

/// All slots hold the first backend but one, which holds the second: the one that the packet shall fall on.
fn expect_slot(fixture: &mut Fixture, frame: &Frame, slot: u32) {
    let mut slots = vec![WEB.backends[0].id; MANY_SLOTS as usize];
    slots[slot as usize] = WEB.backends[1].id;
    fixture.apply(Operation::PutPool(WEB.id, Pool::listed(&slots)));
    let expected = Expected::to_backend(&WEB, 1, frame, frame.source).new_flow();
    fixture.expect(&format!("slot {slot}"), &frame.bytes(), expected);
}

/// All clients fall on the slots that they shall: two tables of many backends tell the two digits of each one's slot.
fn expect_slots(fixture: &mut Fixture, slot: impl Fn(&Frame) -> u32) {
    const BASE: u32 = 257;
    const FIRST: u32 = 100;
    for digit in 0..BASE {
        let entry = WEB.backends[0].entry(WEB.id);
        fixture.apply(Operation::PutBackend(FIRST + digit, entry));
    }
    for divisor in [1, BASE] {
        let digit = |slot: u32| slot / divisor % BASE;
        let slots: Vec<u32> = (0..MANY_SLOTS).map(|slot| FIRST + digit(slot)).collect();
        fixture.apply(Operation::PutPool(WEB.id, Pool::listed(&slots)));
        for syn in clients() {
            fixture.run(&syn.bytes());
            let backend = fixture.flow(&syn).unwrap().backend;
            assert_eq!(backend - FIRST, digit(slot(&syn)), "{syn:?}");
            fixture.remove(&syn);
        }
    }
}

fn put_strategy(fixture: &mut Fixture, strategy: Strategy) {
    fixture.change_service(&WEB, |service| service.strategy = strategy.number());
}

#[test]
fn consistent_hash_takes_the_slot_of_the_whole_flow() {
    let mut fixture = Fixture::new();
    let slot = |syn: &Frame| slot_of(flow_hash(SETTINGS.seed, &syn.key()), MANY_SLOTS);
    let syn = clients().next().unwrap();
    expect_slot(&mut fixture, &syn, slot(&syn));
    fixture.remove(&syn);
    expect_slots(&mut fixture, slot);
}

#[test]
fn consistent_hash_takes_the_slot_of_the_whole_flow_for_udp() {
    let mut fixture = Fixture::new();
    let query = udp("198.51.100.7:5000", DNS.vip);
    let slot = slot_of(flow_hash(SETTINGS.seed, &query.key()), MANY_SLOTS);
    let mut slots = vec![DNS.backends[0].id; MANY_SLOTS as usize];
    slots[slot as usize] = DNS.backends[1].id;
    fixture.apply(Operation::PutPool(DNS.id, Pool::listed(&slots)));
    let expected = Expected::to_backend(&DNS, 1, &query, query.source).new_flow();
    fixture.expect("query", &query.bytes(), expected);
}

#[test]
fn ip_hash_takes_the_slot_of_the_clients_address() {
    let mut fixture = Fixture::new();
    put_strategy(&mut fixture, Strategy::IpHash);
    let slot = |syn: &Frame| slot_of(client_hash(SETTINGS.seed, &syn.key()), MANY_SLOTS);
    let syn = clients().next().unwrap();
    expect_slot(&mut fixture, &syn, slot(&syn));
    fixture.remove(&syn);
    expect_slots(&mut fixture, slot);
}

#[test]
fn ip_hash_puts_all_flows_of_a_client_on_one_backend_whatever_their_port() {
    let mut fixture = Fixture::new();
    put_strategy(&mut fixture, Strategy::IpHash);
    let slots: Vec<u32> = (0..MANY_SLOTS)
        .map(|slot| WEB.backends[slot as usize % 2].id)
        .collect();
    fixture.apply(Operation::PutPool(WEB.id, Pool::listed(&slots)));
    let mut backends = BTreeSet::new();
    for client in 1..=40 {
        let mut of_client = BTreeSet::new();
        for port in 0..20 {
            let syn = tcp(&format!("198.51.100.{client}:{}", 5000 + port), WEB.vip, SYN);
            fixture.run(&syn.bytes());
            of_client.insert(fixture.flow(&syn).unwrap().backend);
        }
        assert_eq!(of_client.len(), 1, "client {client}");
        backends.extend(of_client);
    }
    assert_eq!(backends.len(), 2);
}

#[test]
fn consistent_hash_spreads_the_flows_of_one_client() {
    let mut fixture = Fixture::new();
    let slots: Vec<u32> = (0..MANY_SLOTS)
        .map(|slot| WEB.backends[slot as usize % 2].id)
        .collect();
    fixture.apply(Operation::PutPool(WEB.id, Pool::listed(&slots)));
    for port in 0..2000u16 {
        let syn = tcp(&format!("198.51.100.7:{}", 5000 + port), WEB.vip, SYN);
        fixture.run(&syn.bytes());
    }
    let backends = fixture.counted().backends;
    for backend in WEB.backends {
        let flows = backends[&backend.id].flows;
        // A fair coin is 9 standard deviations off at 1,000 ± 200.
        assert!((800..1200).contains(&flows), "{flows} of 2000");
    }
}

#[test]
fn another_seed_gives_other_slots() {
    let mut fixture = Fixture::new();
    let seed = [1, 2];
    fixture.change_settings(|settings| settings.seed = seed);
    let syn = tcp("198.51.100.7:5000", WEB.vip, SYN);
    let slot = slot_of(flow_hash(seed, &syn.key()), MANY_SLOTS);
    assert_ne!(slot, slot_of(flow_hash(SETTINGS.seed, &syn.key()), MANY_SLOTS));
    expect_slot(&mut fixture, &syn, slot);
}

/// A flow whose record is lost, as after a failover to another node, falls on the same backend again.
#[test]
fn a_lost_flow_is_taken_up_on_the_backend_that_it_had() {
    let mut fixture = Fixture::new();
    let slots: Vec<u32> = (0..MANY_SLOTS)
        .map(|slot| WEB.backends[slot as usize % 2].id)
        .collect();
    fixture.apply(Operation::PutPool(WEB.id, Pool::listed(&slots)));
    for syn in clients() {
        fixture.run(&syn.bytes());
        let backend = fixture.flow(&syn).unwrap().backend;
        fixture.remove(&syn);
        let ack = tcp(&syn.source.to_string(), WEB.vip, ACK);
        fixture.run(&ack.bytes());
        assert_eq!(fixture.flow(&ack).unwrap().backend, backend);
    }
}

/// Which backends get slots is the daemon's to decide; the flags are for flows that are there.
#[test]
fn a_new_flow_goes_to_the_backend_of_its_slot_whatever_its_flags() {
    let mut fixture = Fixture::new();
    fixture.change_backend(&WEB, 0, |backend| backend.flags = BackendFlags::NEXT_HOP_KNOWN);
    let syn = tcp("198.51.100.7:5000", WEB.vip, SYN);
    let expected = Expected::to_backend(&WEB, 0, &syn, syn.source).new_flow();
    fixture.expect("SYN", &syn.bytes(), expected);
}
