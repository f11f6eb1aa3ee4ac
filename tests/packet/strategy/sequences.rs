//! `round-robin` and `least-connections`, and backends that take no more.

use std::collections::BTreeMap;

use lb_common::{
    abi::{
        DEFAULT_BACKENDS, MANY_SLOTS,
        Reason::{BackendsFull, Rejected},
        Strategy,
    },
    logic::hash::siphash13,
};

use xlb::datapath::Pool;

use crate::{
    fixture::{Expected, Fixture, GUE_UDP, TUNNEL, TestService, WEB, stay_on_this_cpu},
    frame::{ACK, Frame, RST, SYN, packet_of, tcp},
};

const FLOWS: u32 = 10_000;
/// Ids that no service of the fixture has.
const BACKENDS: [u32; 3] = [101, 102, 103];

/// The first packet of one of many flows.
fn flow(service: &TestService, number: u32, flags: u8) -> Frame {
    let mut frame = match flags {
        0 => packet_of(service.protocol, "192.0.2.1:1", service.vip),
        flags => tcp("192.0.2.1:1", service.vip, flags),
    };
    let [_, a, b, c] = number.to_be_bytes();
    frame.source = ([100, a, b, c], 1024 + (number % 50_000) as u16).into();
    frame
}

/// A service by a strategy over [`BACKENDS`], with what each has beyond the first of the service.
fn with_strategy(
    fixture: &mut Fixture,
    service: &TestService,
    strategy: Strategy,
    sequence: &[u32],
    mut change: impl FnMut(u32, &mut lb_common::abi::Backend),
) {
    for (at, id) in BACKENDS.into_iter().enumerate() {
        let mut entry = service.backends[0].entry(service.id);
        entry.port = (9000 + at as u16).to_be();
        change(id, &mut entry);
        fixture.apply(xlb::datapath::Operation::PutBackend(id, entry));
    }
    fixture.change_service(service, |entry| entry.strategy = strategy.number());
    fixture.sequence(service, sequence);
}

/// The backend of each flow, as far as it has one.
fn backends(fixture: &mut Fixture, frames: impl Iterator<Item = Frame>) -> Vec<Option<u32>> {
    let frames: Vec<_> = frames.collect();
    for frame in &frames {
        fixture.run(&frame.bytes());
    }
    let flows = fixture.flows();
    frames
        .iter()
        .map(|frame| flows.get(&frame.key()).map(|flow| flow.backend))
        .collect()
}

fn counts(backends: &[Option<u32>]) -> BTreeMap<Option<u32>, usize> {
    let mut counts = BTreeMap::new();
    for backend in backends {
        *counts.entry(*backend).or_default() += 1;
    }
    counts
}

#[test]
fn round_robin_takes_turns_by_weight_in_every_window() {
    stay_on_this_cpu();
    let mut fixture = Fixture::of(&[WEB]);
    // 5, 2 and 1 of eight turns, smoothly.
    let [a, b, c] = BACKENDS;
    let sequence = [a, b, a, a, c, a, b, a];
    with_strategy(&mut fixture, &WEB, Strategy::RoundRobin, &sequence, |_, _| ());
    let order = backends(&mut fixture, (0..FLOWS).map(|number| flow(&WEB, number, SYN)));
    assert_eq!(order[..8], sequence.map(Some));
    for window in order.windows(8) {
        let counts = counts(window);
        assert_eq!([a, b, c].map(|id| counts[&Some(id)]), [5, 2, 1]);
    }
    // Packets of known flows take no turn.
    fixture.run(&flow(&WEB, 1, ACK).bytes());
    fixture.run(&flow(&WEB, 2, SYN).bytes());
    let next = backends(
        &mut fixture,
        (FLOWS..FLOWS + 8).map(|number| flow(&WEB, number, SYN)),
    );
    assert_eq!(next, sequence.map(Some));
}

#[test]
fn round_robin_goes_on_in_a_sequence_that_has_become_shorter() {
    stay_on_this_cpu();
    let mut fixture = Fixture::of(&[WEB]);
    let [a, b, c] = BACKENDS;
    with_strategy(
        &mut fixture,
        &WEB,
        Strategy::RoundRobin,
        &[a, b, c, a, b, c],
        |_, _| (),
    );
    backends(&mut fixture, (0..5).map(|number| flow(&WEB, number, SYN)));
    fixture.sequence(&WEB, &[b, c]);
    let next = backends(&mut fixture, (5..9).map(|number| flow(&WEB, number, SYN)));
    assert_eq!(next, [b, c, b, c].map(Some));
    fixture.sequence(&WEB, &[]);
    let syn = flow(&WEB, 9, SYN);
    let expected = Expected::answered(Rejected, syn.reset().bytes()).of(&WEB);
    fixture.expect("an empty sequence", &syn.bytes(), expected);
}

/// `ended` tells which flows end at once.
fn least_connections(service: &TestService, ended: impl Fn(u32, Option<u32>) -> bool, weights: [u32; 3]) {
    let mut fixture = Fixture::of(&[*service]);
    with_strategy(
        &mut fixture,
        service,
        Strategy::LeastConnections,
        &BACKENDS,
        |id, backend| backend.weight = weights[(id - BACKENDS[0]) as usize],
    );
    let total: u32 = weights.iter().sum();
    for number in 0..FLOWS {
        let frame = flow(service, number, if service.protocol == 6 { SYN } else { 0 });
        fixture.run(&frame.bytes());
        // The flow table is not read for each: which backend it has shows in the count that has grown.
        if number % 97 == 0 {
            let backend = fixture.flow(&frame).map(|flow| flow.backend);
            if ended(number, backend) {
                fixture.run(&flow(service, number, RST).bytes());
            }
        }
        let live = BACKENDS.map(|id| fixture.live(id));
        let sum: u64 = live.iter().sum();
        for (live, weight) in live.iter().zip(weights) {
            let share = sum * u64::from(weight);
            let difference = (live * u64::from(total)).abs_diff(share);
            assert!(
                difference <= 2 * u64::from(total),
                "{live:?} of {sum} by weight {weight} of {total}"
            );
        }
        if weights == [1; 3] {
            assert!(
                live.iter().max().unwrap() - live.iter().min().unwrap() <= 2,
                "{live:?}"
            );
        }
    }
}

#[test]
fn least_connections_keeps_live_flows_equal_while_those_of_one_backend_stay() {
    // Flows end on all but the first backend.
    least_connections(&WEB, |_, backend| backend != Some(BACKENDS[0]), [1; 3]);
}

#[test]
fn least_connections_keeps_live_flows_by_weight() {
    least_connections(&TUNNEL, |number, _| number % 2 == 0, [5, 2, 1]);
    least_connections(&GUE_UDP, |_, _| false, [1; 3]);
}

#[test]
fn least_connections_leaves_out_what_has_no_weight() {
    let mut fixture = Fixture::of(&[WEB]);
    with_strategy(
        &mut fixture,
        &WEB,
        Strategy::LeastConnections,
        &BACKENDS,
        |id, backend| backend.weight = u32::from(id != BACKENDS[1]),
    );
    let spread = counts(&backends(
        &mut fixture,
        (0..100).map(|number| flow(&WEB, number, SYN)),
    ));
    assert_eq!(
        spread,
        BTreeMap::from([(Some(BACKENDS[0]), 50), (Some(BACKENDS[2]), 50)])
    );
    // Held by the count of live flows, which the daemon sets right.
    let base = fixture.live(BACKENDS[0]);
    assert_eq!(base, 50);
}

/// Every strategy: a full backend's flows go to the others, and are refused only where all are full.
#[test]
fn a_backend_that_has_as_many_flows_as_it_takes_gets_no_more_and_the_others_get_them() {
    for strategy in [
        Strategy::ConsistentHash,
        Strategy::IpHash,
        Strategy::RoundRobin,
        Strategy::LeastConnections,
    ] {
        let mut fixture = Fixture::of(&[WEB]);
        let limits = [10, 400, 1000];
        with_strategy(&mut fixture, &WEB, strategy, &BACKENDS, |id, backend| {
            backend.max_connections = limits[(id - BACKENDS[0]) as usize];
        });
        if !Strategy::is_sequence(strategy.number()) {
            // Eight of ten slots lead to the one that is full soon, without an order as in a table of Maglev.
            let slots: Vec<u32> = (0..MANY_SLOTS)
                .map(|slot| match siphash13([1, 2], [u64::from(slot)]) % 10 {
                    0..=7 => BACKENDS[0],
                    8 => BACKENDS[1],
                    _ => BACKENDS[2],
                })
                .collect();
            fixture.apply(xlb::datapath::Operation::PutPool(WEB.id, Pool::listed(&slots)));
        }
        let spread = counts(&backends(
            &mut fixture,
            (0..1410).map(|number| flow(&WEB, number, SYN)),
        ));
        let expected = BTreeMap::from([
            (Some(BACKENDS[0]), 10),
            (Some(BACKENDS[1]), 400),
            (Some(BACKENDS[2]), 1000),
        ]);
        assert_eq!(spread, expected, "{strategy:?}");
        let more = flow(&WEB, 5000, SYN);
        let full = Expected::dropped(BackendsFull).of(&WEB);
        fixture.expect("all are full", &more.bytes(), full);
        // Known flows go on, and one that ends makes room for one.
        let of_first = (0..1410)
            .map(|number| flow(&WEB, number, ACK))
            .find(|frame| fixture.flow(frame).unwrap().backend == BACKENDS[0])
            .unwrap();
        assert_eq!(fixture.run(&of_first.bytes()).0, WEB.backends[0].verdict());
        let mut rst = tcp("192.0.2.1:1", WEB.vip, RST);
        rst.source = of_first.source;
        fixture.run(&rst.bytes());
        assert_eq!(fixture.live(BACKENDS[0]), 9);
        assert_eq!(
            backends(&mut fixture, [more].into_iter()),
            [Some(BACKENDS[0])],
            "{strategy:?}"
        );
        let more = flow(&WEB, 5001, SYN);
        let full = Expected::dropped(BackendsFull).of(&WEB);
        fixture.expect("full again", &more.bytes(), full);
        // What the daemon has counted is part of it.
        fixture.adjust_live(BACKENDS[1], -5);
        let five = backends(&mut fixture, (6000..6006).map(|number| flow(&WEB, number, SYN)));
        assert_eq!(counts(&five)[&Some(BACKENDS[1])], 5);
        assert_eq!(five.iter().filter(|backend| backend.is_none()).count(), 1);
    }
}

#[test]
fn a_hundred_and_twenty_eight_slots_are_tried_and_what_is_full_is_told_from_what_is_not_there() {
    const NOT_THERE: u32 = DEFAULT_BACKENDS + 2;
    let [full, free, _] = BACKENDS;
    let mut fixture = Fixture::of(&[WEB]);
    stay_on_this_cpu();
    with_strategy(
        &mut fixture,
        &WEB,
        Strategy::RoundRobin,
        &[full],
        |id, backend| backend.max_connections = u32::from(id == full),
    );
    let first = [flow(&WEB, 0, SYN)];
    assert_eq!(backends(&mut fixture, first.into_iter()), [Some(full)]);
    // The turn is now at the second slot: the first one is the last that is tried.
    let mut slots = vec![full; 128];
    slots[0] = free;
    fixture.sequence(&WEB, &slots);
    let last = [flow(&WEB, 1, SYN)];
    assert_eq!(backends(&mut fixture, last.into_iter()), [Some(free)]);
    let mut none_free = vec![full; 128];
    none_free[5] = NOT_THERE;
    let of_a_thousand = [vec![full; 999], vec![free]].concat();
    for sequence in [
        &none_free[..],
        &of_a_thousand,
        &[NOT_THERE, full],
        &[full, NOT_THERE],
    ] {
        fixture.sequence(&WEB, sequence);
        for number in 2..4 {
            let dropped = Expected::dropped(BackendsFull).of(&WEB);
            fixture.expect("full", &flow(&WEB, number, SYN).bytes(), dropped);
        }
    }
}
