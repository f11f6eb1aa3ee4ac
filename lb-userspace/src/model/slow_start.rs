//! How the share of a backend grows after it came up.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::BackendName;
use crate::config::{Config, Service};

/// Percent of its weight that a backend begins with.
const FIRST: u128 = 10;
/// Steps to the whole weight at most: each may mean new slot tables.
const STEPS: u32 = 20;
/// A step at least.
const SHORTEST_STEP: Duration = Duration::from_secs(1);

/// When backends came up whose share may still grow.
#[derive(Clone, Debug, Default)]
pub struct SlowStarts(BTreeMap<BackendName, Instant>);

impl SlowStarts {
    /// A backend has come up.
    pub fn begin(&mut self, backend: BackendName, now: Instant) {
        self.0.insert(backend, now);
    }

    /// A backend is not up any more.
    pub fn forget(&mut self, backend: &BackendName) {
        self.0.remove(backend);
    }

    /// Tells whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// As [`Self::percents`], of the backends of one service; nobody is forgotten.
    pub fn percents_of(&self, service: &Service, now: Instant) -> BTreeMap<BackendName, u32> {
        let names = service
            .backends
            .iter()
            .map(|backend| (service.name.clone(), backend.name.clone()));
        let percent_of = |name: BackendName| {
            let since = self.0.get(&name)?;
            let percent = percent(now.saturating_duration_since(*since), service.slow_start)?;
            Some((name, percent))
        };
        if self.is_empty() {
            return BTreeMap::new();
        }
        names.filter_map(percent_of).collect()
    }

    /// Percent of its weight by backend, of those that do not have the whole yet; the others are forgotten.
    pub fn percents(&mut self, config: &Config, now: Instant) -> BTreeMap<BackendName, u32> {
        let mut percents = BTreeMap::new();
        if self.is_empty() {
            return percents;
        }
        let named = config.services.iter().map(|service| (&service.name, service));
        let services: BTreeMap<&String, &Service> = named.collect();
        self.0.retain(|name, since| {
            let duration = (services.get(&name.0))
                .filter(|service| service.backends.iter().any(|backend| backend.name == name.1))
                .map_or(Duration::ZERO, |service| service.slow_start);
            let percent = percent(now.saturating_duration_since(*since), duration);
            percents.extend(percent.map(|percent| (name.clone(), percent)));
            percent.is_some()
        });
        percents
    }
}

/// Percent of its weight that a backend gets so long after it came up; `None` once that is the whole.
fn percent(elapsed: Duration, duration: Duration) -> Option<u32> {
    if elapsed >= duration {
        return None;
    }
    let step = (duration / STEPS).max(SHORTEST_STEP).min(duration).as_nanos();
    let steps = duration.as_nanos().div_ceil(step);
    let taken = elapsed.as_nanos() / step;
    let percent = FIRST + (100 - FIRST) * taken / steps;
    Some(percent as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::fixture::{backend, model, service};

    const SECOND: Duration = Duration::from_secs(1);

    fn percents_of(seconds: u32) -> Vec<u32> {
        let duration = SECOND * seconds;
        let mut percents: Vec<u32> = (0..seconds * 100)
            .map_while(|number| percent(SECOND / 100 * number, duration))
            .collect();
        percents.dedup();
        percents
    }

    #[test]
    fn a_share_grows_from_a_tenth_in_equal_steps_of_a_second_or_more() {
        assert_eq!(percents_of(10), [10, 19, 28, 37, 46, 55, 64, 73, 82, 91]);
        assert_eq!(percents_of(3), [10, 40, 70]);
        assert_eq!(percents_of(1), [10]);
        for seconds in [20, 21, 60, 600] {
            let percents = percents_of(seconds);
            assert_eq!((percents.len(), percents[0]), (20, 10), "{seconds}");
            assert!(percents.is_sorted(), "{seconds}");
        }
    }

    #[test]
    fn a_share_is_whole_after_the_duration() {
        assert_eq!(percent(SECOND * 10, SECOND * 10), None);
        assert_eq!(percent(Duration::ZERO, Duration::ZERO), None);
        assert_eq!(percent(SECOND / 10, SECOND / 2), Some(10));
        assert_eq!(percent(SECOND / 2, SECOND / 2), None);
    }

    #[test]
    fn a_start_is_forgotten_when_it_is_over_or_its_backend_gone_or_down() {
        let mut service = service("web", 10, &[80], vec![backend("a", 11, 0), backend("b", 12, 0)]);
        service.slow_start = SECOND * 10;
        let mut config = model(vec![service]).config;
        let name = |backend: &str| ("web".to_owned(), backend.to_owned());
        let start = Instant::now();
        let mut starts = SlowStarts::default();
        starts.begin(name("a"), start);
        starts.begin(name("b"), start + SECOND * 5);
        let percents = starts.percents(&config, start + SECOND * 5);
        assert_eq!(percents, BTreeMap::from([(name("a"), 55), (name("b"), 10)]));
        let of_service = starts.percents_of(&config.services[0], start + SECOND * 5);
        assert_eq!(of_service, percents);
        let percents = starts.percents(&config, start + SECOND * 10);
        assert_eq!(percents, BTreeMap::from([(name("b"), 55)]));
        assert!(!starts.is_empty());
        config.services[0].backends.pop();
        assert_eq!(starts.percents(&config, start + SECOND * 10), BTreeMap::new());
        assert!(starts.is_empty());
        starts.begin(name("a"), start);
        starts.forget(&name("a"));
        assert!(starts.is_empty());
    }
}
