//! How fast flows begin where each is to be recorded.
//!
//! A flow table may record a limited number of new flows in a while, so that a flood cannot push out those that live;
//! packets of the others are forwarded all the same. What is measured within that limit comes in bursts with pauses.

use std::{
    thread,
    time::{Duration, Instant},
};

/// Flows of one burst while nothing is timed: fewer than a processor may record before the next one.
pub const BURST: u32 = 120_000;
/// Flows of one round whose flows are to be recorded, each.
pub const RECORDED: u32 = 100_000;
/// Flows that leave nothing of the limit, right before a flood is timed.
pub const EXHAUSTING: u32 = 150_000;
/// From the end of a burst to the next: more than the 2³⁰ ns for which a limit holds, so that no two bursts share one.
const PAUSE: Duration = Duration::from_millis(1080);

/// When the next burst may begin.
#[derive(Debug)]
pub struct Pace {
    pause: Duration,
    last: Option<Instant>,
}

impl Pace {
    /// Bursts after pauses, so that all their flows may be recorded.
    pub fn within_budget() -> Self {
        Self {
            pause: PAUSE,
            last: None,
        }
    }

    /// One burst after the other.
    pub fn unlimited() -> Self {
        Self {
            pause: Duration::ZERO,
            last: None,
        }
    }

    /// Returns when the next burst may begin.
    pub fn wait(&self) {
        if let Some(due) = self.due() {
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }

    /// `None`: at once.
    fn due(&self) -> Option<Instant> {
        self.last.map(|last| last + self.pause)
    }

    /// A burst has just ended.
    pub fn burst_ended(&mut self) {
        self.last = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_burst_begins_at_once_and_the_next_after_a_pause() {
        let mut pace = Pace::within_budget();
        assert_eq!(pace.due(), None);
        let before = Instant::now();
        pace.burst_ended();
        assert!(pace.due() >= Some(before + PAUSE));
        pace.wait();
        assert!(before.elapsed() >= PAUSE);
    }

    #[test]
    fn bursts_without_a_limit_do_not_wait() {
        let mut pace = Pace::unlimited();
        pace.burst_ended();
        assert!(pace.due() <= Some(Instant::now()));
    }
}
