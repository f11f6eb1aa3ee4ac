use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// Who has each turn, numbered from 1 on.
fn turns_of(weights: &[u32]) -> Vec<u32> {
    let turns = turns(weights);
    assert_eq!(turns.len(), length(weights) as usize);
    turns.into_iter().map(|index| u32::from(index) + 1).collect()
}

fn counts(turns: &[u32]) -> BTreeMap<u32, usize> {
    let mut counts = BTreeMap::new();
    for id in turns {
        *counts.entry(*id).or_default() += 1;
    }
    counts
}

#[test]
fn turns_are_those_of_nginx() {
    // The example of nginx's commit that brought the algorithm, 52327e0627f4.
    assert_eq!(turns_of(&[5, 1, 1]), [1, 1, 2, 1, 3, 1, 1]);
    assert_eq!(turns_of(&[1, 1, 1]), [1, 2, 3]);
    assert_eq!(turns_of(&[2, 1]), [1, 2, 1]);
}

#[test]
fn a_round_is_as_short_as_the_weights_allow() {
    assert_eq!(turns_of(&[100, 100, 100]), [1, 2, 3]);
    assert_eq!(turns_of(&[200, 100]), [1, 2, 1]);
    assert_eq!(turns_of(&[7]), [1]);
}

#[test]
fn weights_that_do_not_fit_keep_their_proportion_and_nobody_goes_without() {
    let weights = [65_535, 65_534, 1, 2];
    let turns = turns_of(&weights);
    assert_eq!(turns.len(), MAX_LENGTH as usize);
    let counts = counts(&turns);
    assert_eq!(counts.values().sum::<usize>(), 65_536);
    assert_eq!(counts, BTreeMap::from([(1, 32_767), (2, 32_767), (3, 1), (4, 1)]));
}

#[test]
fn as_many_candidates_as_fit_all_get_a_turn() {
    let weights: Vec<u32> = (0..2000)
        .map(|number| if number == 7 { 65_535 } else { 1 + number % 97 })
        .collect();
    let turns = turns_of(&weights);
    assert_eq!(turns.len(), MAX_LENGTH as usize);
    assert_eq!(counts(&turns).len(), weights.len());
}

proptest! {
    #[test]
    fn any_window_of_a_round_has_each_in_its_share(
        weights in prop::collection::vec(1_u32..200, 1..8),
        start in any::<prop::sample::Index>(),
    ) {
        let turns = turns_of(&weights);
        let start = start.index(turns.len());
        let window: Vec<u32> = turns.iter().cycle().skip(start).take(turns.len()).copied().collect();
        let counts = counts(&window);
        let total: u32 = weights.iter().sum();
        for (id, weight) in (1..).zip(&weights) {
            let share = f64::from(*weight) * turns.len() as f64 / f64::from(total);
            let got = counts.get(&id).copied().unwrap_or(0) as f64;
            prop_assert!((got - share).abs() <= 1.0, "{} got {} of {}", id, got, share);
        }
    }

    #[test]
    fn a_scaled_round_has_each_in_its_share(weights in prop::collection::vec(20_000_u32..65_536, 4..8)) {
        let counts = counts(&turns_of(&weights));
        let total: u32 = weights.iter().sum();
        for (id, weight) in (1..).zip(&weights) {
            let share = f64::from(*weight) / f64::from(total) * counts.values().sum::<usize>() as f64;
            let got = counts[&id] as f64;
            prop_assert!((got - share).abs() <= 1.0, "{} got {} of {}", id, got, share);
        }
    }

    #[test]
    fn turns_are_spread_evenly(weights in prop::collection::vec(1_u32..50, 1..8)) {
        let turns = turns_of(&weights);
        let total = f64::from(weights.iter().sum::<u32>());
        let mut counts = vec![0_u32; weights.len()];
        for (number, id) in (1_u32..).zip(&turns) {
            counts[*id as usize - 1] += 1;
            for (count, weight) in counts.iter().zip(&weights) {
                let share = f64::from(number) * f64::from(*weight) / total;
                let off = f64::from(*count) - share;
                // Nobody is a turn ahead of its share, and what the others have had too little of is shared among them.
                prop_assert!(off < 1.0 && off > -2.0, "{:?}: {} of {} after {}", weights, count, share, number);
            }
        }
    }

    #[test]
    fn the_order_of_the_others_stays_when_one_of_equals_leaves(count in 2_usize..20, leaving in any::<prop::sample::Index>()) {
        let leaving = leaving.index(count) as u32 + 1;
        let renumbered = |turn: u32| if turn > leaving { turn - 1 } else { turn };
        let all = turns_of(&vec![3; count]);
        let expected: Vec<u32> = all.into_iter().filter(|turn| *turn != leaving).map(renumbered).collect();
        prop_assert_eq!(turns_of(&vec![3; count - 1]), expected);
    }
}
