use std::{collections::BTreeMap, net::Ipv4Addr};

use proptest::prelude::*;

use super::*;

const SEED: [u64; 2] = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];

fn candidate(number: u32, weight: u32) -> Candidate {
    let address = IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + number));
    Candidate {
        id: number,
        identity: identity(SEED, address, 8080),
        weight,
    }
}

fn candidates(weights: impl IntoIterator<Item = u32>) -> Vec<Candidate> {
    (1..)
        .zip(weights)
        .map(|(number, weight)| candidate(number, weight))
        .collect()
}

fn counts(table: &[u32]) -> BTreeMap<u32, u32> {
    let mut counts = BTreeMap::new();
    for id in table {
        *counts.entry(*id).or_default() += 1;
    }
    counts
}

/// Share of the slots that stayed with candidates in both tables but went from one of them to another.
fn moved(before: &[u32], after: &[u32], changed: u32) -> f64 {
    let others = before
        .iter()
        .zip(after)
        .filter(|(b, a)| **b != changed && **a != changed);
    let (mut all, mut moved) = (0_u32, 0_u32);
    for (b, a) in others {
        all += 1;
        moved += u32::from(a != b);
    }
    f64::from(moved) / f64::from(all)
}

#[test]
fn nobody_gives_an_empty_table() {
    assert_eq!(counts(&table(&[])), BTreeMap::from([(0, SLOT_COUNT)]));
}

#[test]
fn weight_zero_gets_no_slot() {
    assert_eq!(
        counts(&table(&candidates([0, 0]))),
        BTreeMap::from([(0, SLOT_COUNT)])
    );
    assert_eq!(
        counts(&table(&candidates([0, 5]))),
        BTreeMap::from([(2, SLOT_COUNT)])
    );
}

#[test]
fn slots_are_shared_by_weight() {
    let cases: &[&[u32]] = &[
        &[1, 1, 1],
        &[100, 100, 100],
        &[1, 2, 3],
        &[1, 1000],
        &[1, 10, 1000],
        &[7, 0, 13],
        &[u32::MAX, u32::MAX, u32::MAX / 2],
    ];
    for weights in cases {
        let sum: f64 = weights.iter().map(|w| f64::from(*w)).sum();
        let counts = counts(&table(&candidates(weights.iter().copied())));
        assert_eq!(counts.get(&0), None);
        for (id, weight) in (1..).zip(*weights) {
            let share = f64::from(*weight) / sum * f64::from(SLOT_COUNT);
            let got = f64::from(counts.get(&id).copied().unwrap_or(0));
            let off = (got - share).abs();
            assert!(
                off <= share * 0.01 && off <= 1.0,
                "{weights:?}: {id} got {got} of {share}"
            );
        }
    }
}

#[test]
fn at_most_one_percent_of_the_other_slots_move_when_one_leaves_or_joins() {
    for count in [3_u32, 10, 100] {
        let all = candidates((0..count).map(|_| 100));
        let with_all = table(&all);
        for left_out in [1, count / 2, count] {
            let without: Vec<_> = all.iter().copied().filter(|c| c.id != left_out).collect();
            let without = table(&without);
            let leaving = moved(&with_all, &without, left_out);
            let joining = moved(&without, &with_all, left_out);
            assert!(leaving <= 0.01, "{leaving} moved when {left_out} of {count} left");
            assert!(
                joining <= 0.01,
                "{joining} moved when {left_out} of {count} joined"
            );
        }
    }
}

#[test]
fn few_slots_move_when_the_heaviest_of_uneven_weights_leaves() {
    let all = candidates([100, 50, 50, 20, 300, 1]);
    let without: Vec<_> = all.iter().copied().filter(|c| c.weight != 300).collect();
    let share = moved(&table(&all), &table(&without), 5);
    assert!(share <= 0.02, "{share} moved");
}

#[test]
fn a_thousand_candidates_are_served_soon_enough() {
    let all = candidates((0..1000).map(|i| if i == 0 { 1000 } else { 1 }));
    let start = std::time::Instant::now();
    let table = table(&all);
    // Some milliseconds in a release build: the bound is for a build without optimisation on a busy machine.
    assert!(
        start.elapsed() < std::time::Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(counts(&table).len(), 1000);
}

#[test]
fn address_and_port_make_the_identity() {
    let a = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 11));
    let b = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 12));
    assert_ne!(identity(SEED, a, 3000), identity(SEED, a, 3001));
    assert_ne!(identity(SEED, a, 3000), identity(SEED, b, 3000));
    assert_ne!(identity(SEED, a, 3000), identity([1, 2], a, 3000));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn order_and_ids_do_not_matter(
        weights in proptest::collection::vec(0_u32..2000, 1..12),
        offset in 1_u32..1000,
        rotation in 0_usize..12,
    ) {
        let all = candidates(weights);
        let mut other: Vec<_> = all.iter().map(|c| Candidate { id: c.id + offset, ..*c }).collect();
        other.rotate_left(rotation % all.len());
        let renamed: Vec<u32> = table(&all).iter().map(|id| if *id == 0 { 0 } else { id + offset }).collect();
        prop_assert_eq!(&*table(&other), &*renamed);
    }

    #[test]
    fn each_gets_its_share_within_one_percent_of_all_slots(
        weights in proptest::collection::vec(1_u32..u32::MAX, 1..50),
    ) {
        let sum: f64 = weights.iter().map(|w| f64::from(*w)).sum();
        let counts = counts(&table(&candidates(weights.iter().copied())));
        prop_assert_eq!(counts.get(&0), None);
        for (id, weight) in (1..).zip(&weights) {
            let share = f64::from(*weight) / sum * f64::from(SLOT_COUNT);
            let got = f64::from(counts.get(&id).copied().unwrap_or(0));
            prop_assert!((got - share).abs() <= 0.01 * f64::from(SLOT_COUNT), "{} got {} of {}", id, got, share);
        }
    }
}
