//! The state machine of one backend's health: no clock, no socket, no randomness.

use crate::model::Health;

/// What one probe said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Success,
    Failure,
}

/// Health of one backend and what led to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    health: Health,
    rise: u32,
    fall: u32,
    /// The last outcome and how often in a row it came.
    row: Option<(Outcome, u32)>,
}

impl State {
    /// Starts with a health known from elsewhere; `rise` successes in a row bring it up, `fall` failures down.
    pub fn new(health: Health, rise: u32, fall: u32) -> Self {
        Self {
            health,
            rise,
            fall,
            row: None,
        }
    }

    /// Takes the outcome of a probe and returns the new health if it is another one.
    pub fn record(&mut self, outcome: Outcome) -> Option<Health> {
        let count = match self.row {
            Some((last, count)) if last == outcome => count.saturating_add(1),
            _ => 1,
        };
        self.row = Some((outcome, count));

        let next = match (self.health, outcome) {
            // Nothing is known: the first result is the best there is.
            (Health::Unknown, Outcome::Success) => Health::Up,
            (Health::Unknown, Outcome::Failure) => Health::Down,
            (Health::Up, Outcome::Success) => Health::Up,
            (Health::Up, Outcome::Failure) if count >= self.fall => Health::Down,
            (Health::Up, Outcome::Failure) => Health::Up,
            (Health::Down, Outcome::Failure) => Health::Down,
            (Health::Down, Outcome::Success) if count >= self.rise => Health::Up,
            (Health::Down, Outcome::Success) => Health::Down,
        };
        let changed = next != self.health;
        self.health = next;
        changed.then_some(next)
    }

    /// Changes the thresholds; health and count stay, and the next outcome is judged by the new ones.
    pub fn set_thresholds(&mut self, rise: u32, fall: u32) {
        self.rise = rise;
        self.fall = fall;
    }

    /// Forgets the outcomes, for those to come are of another kind; health stays.
    pub fn forget_outcomes(&mut self) {
        self.row = None;
    }

    pub fn health(&self) -> Health {
        self.health
    }

    /// How many probes in a row had the same outcome, up to the last one.
    pub fn in_a_row(&self) -> u32 {
        self.row.map_or(0, |(_, count)| count)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        Outcome::{Failure, Success},
        *,
    };

    fn record_all(state: &mut State, outcomes: &[Outcome]) -> Vec<Option<Health>> {
        outcomes.iter().map(|&outcome| state.record(outcome)).collect()
    }

    #[test]
    fn every_transition_is_as_in_the_table() {
        // Health before, rise, fall, outcomes; health afterwards, at which outcome it changed.
        type Row = (Health, u32, u32, &'static [Outcome], Health, Option<usize>);
        let table: &[Row] = &[
            (Health::Unknown, 3, 3, &[Success], Health::Up, Some(0)),
            (Health::Unknown, 3, 3, &[Failure], Health::Down, Some(0)),
            (Health::Up, 2, 3, &[Success], Health::Up, None),
            (Health::Up, 2, 1, &[Failure], Health::Down, Some(0)),
            (Health::Up, 2, 3, &[Failure, Failure], Health::Up, None),
            (
                Health::Up,
                2,
                3,
                &[Failure, Failure, Failure],
                Health::Down,
                Some(2),
            ),
            (Health::Up, 2, 2, &[Failure, Success, Failure], Health::Up, None),
            (
                Health::Up,
                2,
                2,
                &[Failure, Success, Failure, Failure],
                Health::Down,
                Some(3),
            ),
            (Health::Down, 2, 3, &[Failure], Health::Down, None),
            (Health::Down, 1, 3, &[Success], Health::Up, Some(0)),
            (Health::Down, 2, 3, &[Success], Health::Down, None),
            (Health::Down, 2, 3, &[Success, Success], Health::Up, Some(1)),
            (
                Health::Down,
                2,
                3,
                &[Success, Failure, Success],
                Health::Down,
                None,
            ),
        ];
        for (before, rise, fall, outcomes, after, changed_at) in table {
            let mut state = State::new(*before, *rise, *fall);
            let taken = record_all(&mut state, outcomes);
            assert_eq!(state.health(), *after, "{before:?} {rise}/{fall} {outcomes:?}");
            for (index, transition) in taken.into_iter().enumerate() {
                let expected = (Some(index) == *changed_at).then_some(*after);
                assert_eq!(
                    transition, expected,
                    "{before:?} {rise}/{fall} {outcomes:?} at {index}"
                );
            }
        }
    }

    #[test]
    fn thresholds_of_zero_act_like_one() {
        let mut state = State::new(Health::Up, 0, 0);
        assert_eq!(state.record(Failure), Some(Health::Down));
        assert_eq!(state.record(Success), Some(Health::Up));
    }

    #[test]
    fn a_lower_threshold_changes_health_with_the_next_outcome_not_by_itself() {
        let mut state = State::new(Health::Up, 2, 5);
        record_all(&mut state, &[Failure, Failure, Failure]);
        state.set_thresholds(2, 2);
        assert_eq!((state.health(), state.in_a_row()), (Health::Up, 3));
        assert_eq!(state.clone().record(Success), None);
        assert_eq!(state.record(Failure), Some(Health::Down));
    }

    #[test]
    fn a_higher_threshold_counts_what_has_been_counted() {
        let mut state = State::new(Health::Up, 2, 2);
        state.record(Failure);
        state.set_thresholds(2, 3);
        assert_eq!(
            record_all(&mut state, &[Failure, Failure]),
            [None, Some(Health::Down)]
        );
    }

    #[test]
    fn forgotten_outcomes_do_not_count() {
        let mut state = State::new(Health::Up, 2, 2);
        state.record(Failure);
        state.forget_outcomes();
        assert_eq!((state.health(), state.in_a_row()), (Health::Up, 0));
        assert_eq!(
            record_all(&mut state, &[Failure, Failure]),
            [None, Some(Health::Down)]
        );
    }

    fn health() -> impl Strategy<Value = Health> {
        prop_oneof![Just(Health::Unknown), Just(Health::Up), Just(Health::Down)]
    }

    fn outcomes() -> impl Strategy<Value = Vec<Outcome>> {
        prop::collection::vec(prop_oneof![Just(Success), Just(Failure)], 0..60)
    }

    proptest! {
        #[test]
        fn health_changes_exactly_after_enough_outcomes_in_a_row(
            initial in health(), rise in 1u32..6, fall in 1u32..6, outcomes in outcomes(),
        ) {
            let mut state = State::new(initial, rise, fall);
            for (index, &outcome) in outcomes.iter().enumerate() {
                let before = state.health();
                let transition = state.record(outcome);
                // Counted anew from the whole history, the machine's own way is not trusted.
                let row = outcomes[..=index].iter().rev().take_while(|&&other| other == outcome).count();
                prop_assert_eq!(state.in_a_row() as usize, row);
                let expected = match outcome {
                    Success if before == Health::Unknown || row >= rise as usize => Health::Up,
                    Failure if before == Health::Unknown || row >= fall as usize => Health::Down,
                    _ => before,
                };
                prop_assert_eq!(state.health(), expected);
                prop_assert_eq!(transition, (expected != before).then_some(expected));
            }
        }

        #[test]
        fn no_two_transitions_in_a_row_are_identical(
            initial in health(), rise in 1u32..6, fall in 1u32..6, outcomes in outcomes(),
        ) {
            let mut state = State::new(initial, rise, fall);
            let transitions: Vec<_> = record_all(&mut state, &outcomes).into_iter().flatten().collect();
            prop_assert!(transitions.first() != Some(&initial));
            prop_assert!(transitions.windows(2).all(|pair| pair[0] != pair[1]));
        }

        #[test]
        fn failures_that_a_success_interrupts_never_bring_a_backend_down(
            fall in 2u32..6, rows in prop::collection::vec(0u32..5, 1..20),
        ) {
            let mut state = State::new(Health::Up, 1, fall);
            for row in rows {
                for _ in 0..row.min(fall - 1) {
                    prop_assert_eq!(state.record(Failure), None);
                }
                prop_assert_eq!(state.record(Success), None);
            }
        }

        #[test]
        fn changing_thresholds_alone_never_changes_health(
            initial in health(), outcomes in outcomes(), rise in 0u32..6, fall in 0u32..6,
        ) {
            let mut state = State::new(initial, 3, 3);
            record_all(&mut state, &outcomes);
            let before = (state.health(), state.in_a_row());
            state.set_thresholds(rise, fall);
            prop_assert_eq!((state.health(), state.in_a_row()), before);
        }
    }
}
