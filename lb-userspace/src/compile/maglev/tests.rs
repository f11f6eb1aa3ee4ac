use std::{collections::BTreeMap, net::Ipv4Addr};

use lb_common::abi::{FEW_SLOTS, MANY_SLOTS};
use proptest::prelude::*;

use super::*;

const SEED: [u64; 2] = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];

/// A member with its number, which stands for its rank in these tests.
#[derive(Clone, Copy, Debug)]
struct Member {
    id: u32,
    identity: u64,
    weight: u32,
}

fn member(number: u32, weight: u32) -> Member {
    let address = IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + number));
    Member {
        id: number,
        identity: identity(SEED, address, 8080),
        weight,
    }
}

fn members(weights: impl IntoIterator<Item = u32>) -> Vec<Member> {
    (1..)
        .zip(weights)
        .map(|(number, weight)| member(number, weight))
        .collect()
}

/// Who has each slot; 0 for nobody.
fn table(members: &[Member], slots: u32) -> Vec<u32> {
    let pairs: Vec<(u64, u32)> = members
        .iter()
        .map(|member| (member.identity, member.weight))
        .collect();
    if members.iter().all(|member| member.weight == 0) {
        assert!(ranks(&pairs, slots).iter().all(|rank| *rank == 0));
        return vec![0; slots as usize];
    }
    let ranks = ranks(&pairs, slots);
    ranks.iter().map(|rank| members[usize::from(*rank)].id).collect()
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
fn weight_zero_gets_no_slot() {
    table(&members([]), FEW_SLOTS);
    table(&members([0, 0]), FEW_SLOTS);
    assert_eq!(
        counts(&table(&members([0, 5]), FEW_SLOTS)),
        BTreeMap::from([(2, FEW_SLOTS)])
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
        let counts = counts(&table(&members(weights.iter().copied()), MANY_SLOTS));
        assert_eq!(counts.get(&0), None);
        for (id, weight) in (1..).zip(*weights) {
            let share = f64::from(*weight) / sum * f64::from(MANY_SLOTS);
            let got = f64::from(counts.get(&id).copied().unwrap_or(0));
            let off = (got - share).abs();
            assert!(
                off <= share * 0.01 && off <= 1.0,
                "{weights:?}: {id} got {got} of {share}"
            );
        }
    }
}

/// The part of the others' slots that move at worst when one of so many equals leaves or joins.
fn most_moved(count: u32, slots: u32) -> f64 {
    let all = members((0..count).map(|_| 1));
    let with_all = table(&all, slots);
    let moved = [1, count / 2, count].map(|left_out| {
        let without: Vec<_> = all
            .iter()
            .copied()
            .filter(|member| member.id != left_out)
            .collect();
        let without = table(&without, slots);
        let leaving = moved(&with_all, &without, left_out);
        leaving.max(moved(&without, &with_all, left_out))
    });
    moved.into_iter().fold(0.0, f64::max)
}

#[test]
fn at_most_one_percent_of_the_other_slots_move_when_one_leaves_or_joins() {
    for (slots, counts) in [
        (FEW_SLOTS, &[3_u32, 6, 10, 12][..]),
        (MANY_SLOTS, &[3, 13, 100, 500, 1000]),
    ] {
        for count in counts {
            let moved = most_moved(*count, slots);
            assert!(
                moved <= 0.01,
                "{moved} moved of {slots} when one of {count} left or joined"
            );
        }
    }
}

#[test]
fn few_slots_move_when_the_heaviest_of_uneven_weights_leaves() {
    let all = members([100, 50, 50, 20, 300, 1]);
    let without: Vec<_> = all.iter().copied().filter(|c| c.weight != 300).collect();
    let share = moved(&table(&all, MANY_SLOTS), &table(&without, MANY_SLOTS), 5);
    assert!(share <= 0.02, "{share} moved");
}

#[test]
fn a_thousand_members_all_have_slots() {
    let all = members((0..1000).map(|i| if i == 0 { 1000 } else { 1 }));
    assert_eq!(counts(&table(&all, MANY_SLOTS)).len(), 1000);
}

/// The same table slot by slot and turn by turn, without what makes it fast.
fn plainly(members: &[Member], slots: u32) -> Vec<u32> {
    let mut table = vec![0; slots as usize];
    let mut turns: Vec<(Member, u64, u64)> = members
        .iter()
        .filter(|member| member.weight > 0)
        .map(|member| (*member, 1, (member.identity >> 32) % u64::from(slots)))
        .collect();
    for _ in 0..slots {
        let due = |one: &(Member, u64, u64), other: &(Member, u64, u64)| {
            let (first, second) = (
                one.1 * u64::from(other.0.weight),
                other.1 * u64::from(one.0.weight),
            );
            first.cmp(&second).then(one.0.identity.cmp(&other.0.identity))
        };
        let (member, odd, next) = turns.iter_mut().min_by(|one, other| due(one, other)).unwrap();
        let skip = (member.identity & 0xffff_ffff) % u64::from(slots - 1) + 1;
        while table[*next as usize] != 0 {
            *next = (*next + skip) % u64::from(slots);
        }
        table[*next as usize] = member.id;
        *next = (*next + skip) % u64::from(slots);
        *odd += 2;
    }
    table
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
        let all = members(weights);
        let mut other: Vec<_> = all.iter().map(|c| Member { id: c.id + offset, ..*c }).collect();
        other.rotate_left(rotation % all.len());
        let all = table(&all, FEW_SLOTS);
        let renamed: Vec<u32> = all.iter().map(|id| if *id == 0 { 0 } else { id + offset }).collect();
        prop_assert!(table(&other, FEW_SLOTS) == renamed);
    }

    #[test]
    fn what_makes_it_fast_changes_nothing(
        weights in proptest::collection::vec(1_u32..2000, 1..12),
        are_equal: bool,
        slots in proptest::sample::select(vec![251_u32, 257, 263, 1021, FEW_SLOTS]),
    ) {
        let all = members(weights.iter().map(|weight| if are_equal { 7 } else { *weight }));
        prop_assert!(table(&all, slots) == plainly(&all, slots));
    }

    #[test]
    fn each_gets_its_share_within_one_percent_of_all_slots(
        weights in proptest::collection::vec(1_u32..u32::MAX, 1..50),
    ) {
        let sum: f64 = weights.iter().map(|w| f64::from(*w)).sum();
        let counts = counts(&table(&members(weights.iter().copied()), MANY_SLOTS));
        prop_assert_eq!(counts.get(&0), None);
        for (id, weight) in (1..).zip(&weights) {
            let share = f64::from(*weight) / sum * f64::from(MANY_SLOTS);
            let got = f64::from(counts.get(&id).copied().unwrap_or(0));
            prop_assert!((got - share).abs() <= 0.01 * f64::from(MANY_SLOTS), "{} got {} of {}", id, got, share);
        }
    }
}
