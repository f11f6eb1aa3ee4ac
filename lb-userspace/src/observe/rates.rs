//! Packets and bytes a second, from two readings of the counters.

use std::time::{Duration, Instant};

use lb_common::abi::Count;

use crate::datapath::{Counters, by_id};

/// The last two readings.
#[derive(Debug, Default)]
pub struct Rates {
    earlier: Option<Reading>,
    later: Option<Reading>,
}

#[derive(Debug)]
struct Reading {
    taken: Instant,
    /// With the backend's id, in the order of the ids.
    traffic: Vec<(u32, Count)>,
}

/// What a backend gets and answers in a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rate {
    pub packets_per_second: f64,
    pub bytes_per_second: f64,
}

impl Rates {
    /// Takes a reading.
    pub fn add(&mut self, now: Instant, counters: &Counters) {
        let traffic = counters.backends.iter().map(|(id, backend)| {
            let (forwarded, returned) = (backend.forwarded, backend.returned);
            let sum = Count {
                packets: forwarded.packets + returned.packets,
                bytes: forwarded.bytes + returned.bytes,
            };
            (*id, sum)
        });
        self.earlier = self.later.replace(Reading {
            taken: now,
            traffic: traffic.collect(),
        });
    }

    /// The rate of a backend between the last two readings; zero before there are two.
    pub fn of(&self, backend: u32) -> Rate {
        let (Some(earlier), Some(later)) = (&self.earlier, &self.later) else {
            return Rate::default();
        };
        let seconds = (later.taken)
            .saturating_duration_since(earlier.taken)
            .max(Duration::from_millis(1))
            .as_secs_f64();
        let (Some(before), Some(after)) = (by_id(&earlier.traffic, backend), by_id(&later.traffic, backend))
        else {
            return Rate::default();
        };
        // Counters start again at zero when an id is given to another backend.
        Rate {
            packets_per_second: after.packets.saturating_sub(before.packets) as f64 / seconds,
            bytes_per_second: after.bytes.saturating_sub(before.bytes) as f64 / seconds,
        }
    }
}

#[cfg(test)]
mod tests {
    use lb_common::abi::BackendCounters;

    use super::*;

    fn reading(packets: u64) -> Counters {
        let forwarded = Count {
            packets,
            bytes: packets * 100,
        };
        let backend = BackendCounters {
            forwarded,
            ..BackendCounters::default()
        };
        Counters {
            backends: vec![(7, backend)],
            ..Counters::default()
        }
    }

    #[test]
    fn a_rate_is_the_difference_over_the_time() {
        let start = Instant::now();
        let mut rates = Rates::default();
        rates.add(start, &reading(10));
        assert_eq!(rates.of(7), Rate::default());
        rates.add(start + Duration::from_secs(2), &reading(30));
        assert_eq!(
            rates.of(7),
            Rate {
                packets_per_second: 10.0,
                bytes_per_second: 1000.0
            }
        );
    }

    #[test]
    fn a_counter_that_started_again_gives_no_negative_rate() {
        let start = Instant::now();
        let mut rates = Rates::default();
        rates.add(start, &reading(30));
        rates.add(start + Duration::from_secs(1), &reading(0));
        assert_eq!(rates.of(7), Rate::default());
    }
}
