//! Which backends start slowly: those that came up from `down`, and those that were added while the daemon runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use super::{Controller, servers};
use crate::{
    config::{Config, Probe, Service},
    model::{BackendName, Health, Model, slow_start::SlowStarts},
};

/// Backends on their way to their whole share.
#[derive(Debug, Default)]
pub(super) struct Rising {
    starts: SlowStarts,
    /// Added to the configuration, and not up since.
    added: BTreeSet<BackendName>,
}

impl Rising {
    pub(super) fn percents(&mut self, config: &Config) -> BTreeMap<BackendName, u32> {
        self.starts.percents(config, Instant::now())
    }

    pub(super) fn percents_of(&self, service: &Service) -> BTreeMap<BackendName, u32> {
        self.starts.percents_of(service, Instant::now())
    }

    /// Takes in how health has changed. Health that is known from before the daemon began is no change.
    fn follow(&mut self, before: &BTreeMap<BackendName, Health>, after: &BTreeMap<BackendName, Health>) {
        for (name, health) in after {
            self.follow_one(name, before.get(name).copied(), *health);
        }
    }

    fn follow_one(&mut self, name: &BackendName, before: Option<Health>, after: Health) {
        match (before, after) {
            (Some(Health::Up), Health::Up) | (_, Health::Unknown) => {}
            (before, Health::Up) => {
                if self.added.remove(name) || before == Some(Health::Down) {
                    self.starts.begin(name.clone(), Instant::now());
                }
            }
            (_, Health::Down) => self.starts.forget(name),
        }
    }

    /// Notes which backends of a configuration are new. What is not probed is up at once.
    fn expect(&mut self, former: &Model, present: &Model) {
        let known = servers(&former.config);
        let added = servers(&present.config).into_iter().filter(|(name, server)| {
            let is_renamed = present.health.contains_key(name);
            known.get(name) != Some(server) && !is_renamed
        });
        let added: BTreeSet<BackendName> = added.map(|(name, _)| name).collect();
        let services = present.config.services.iter();
        for service in services.filter(|service| service.health.probe == Probe::None) {
            let names = service
                .backends
                .iter()
                .map(|backend| (service.name.clone(), backend.name.clone()));
            for name in names.filter(|name| added.contains(name)) {
                self.starts.begin(name, Instant::now());
            }
        }
        self.added.extend(added);
    }
}

impl Controller {
    /// Tells whether a share grows with time.
    pub fn is_ramping(&self) -> bool {
        !self.rising.starts.is_empty()
    }

    /// Gives backends that start slowly as much as they get by now.
    pub fn ramp(&mut self) {
        if self.rising.percents(&self.model.config) != self.model.ramps {
            self.converge_or_retry();
        }
    }

    /// Takes over what the probes say.
    pub(super) fn follow_health(&mut self) {
        let health = self.driver.health();
        self.rising.follow(&self.model.health, &health);
        self.model.health = health;
    }

    /// Takes over what the probes say of one backend.
    pub(super) fn follow_health_of(&mut self, name: &BackendName) {
        let Some(health) = self.driver.health_of(name) else {
            return;
        };
        let before = self.model.health.insert(name.clone(), health);
        self.rising.follow_one(name, before, health);
    }

    /// Has the backends start slowly that the former model does not know.
    pub(super) fn expect_added(&mut self, former: &Model) {
        self.rising.expect(former, &self.model);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::fixture::{backend, model, service};

    fn name(backend: &str) -> BackendName {
        ("web".to_owned(), backend.to_owned())
    }

    fn web(backends: &[(&str, u8)]) -> Model {
        let backends = backends
            .iter()
            .map(|(name, host)| backend(name, *host, 0))
            .collect();
        let mut service = service("web", 10, &[80], backends);
        service.slow_start = Duration::from_secs(3600);
        model(vec![service])
    }

    fn follow(rising: &mut Rising, before: &[(&str, Health)], after: &[(&str, Health)]) {
        let of = |states: &[(&str, Health)]| {
            states
                .iter()
                .map(|(backend, health)| (name(backend), *health))
                .collect()
        };
        rising.follow(&of(before), &of(after));
    }

    #[test]
    fn a_backend_starts_slowly_when_it_comes_up_from_down_and_not_when_its_health_becomes_known() {
        use Health::{Down, Unknown, Up};
        let web = web(&[("a", 11), ("b", 12), ("c", 13), ("d", 14)]);
        let mut rising = Rising::default();
        follow(
            &mut rising,
            &[("a", Down), ("b", Unknown), ("d", Up)],
            &[("a", Up), ("b", Up), ("c", Up), ("d", Up)],
        );
        assert_eq!(rising.percents(&web.config), BTreeMap::from([(name("a"), 10)]));
        follow(&mut rising, &[("a", Up)], &[("a", Down)]);
        assert_eq!(rising.percents(&web.config), BTreeMap::new());
    }

    #[test]
    fn a_backend_that_is_added_starts_slowly_when_it_first_is_up() {
        use Health::{Unknown, Up};
        let before = web(&[("a", 11), ("moved", 12)]);
        let mut after = web(&[("a", 11), ("moved", 13), ("renamed", 14), ("b", 15)]);
        after.set_health("web", "renamed", Up);
        let mut rising = Rising::default();
        rising.expect(&before, &after);
        assert_eq!(rising.percents(&after.config), BTreeMap::new());
        let all = ["a", "moved", "renamed", "b"];
        follow(
            &mut rising,
            &all.map(|name| (name, Unknown)),
            &all.map(|name| (name, Up)),
        );
        let expected = BTreeMap::from([(name("b"), 10), (name("moved"), 10)]);
        assert_eq!(rising.percents(&after.config), expected);
    }

    #[test]
    fn a_backend_without_a_probe_starts_slowly_when_it_is_added() {
        let unprobed = |backends: &[(&str, u8)]| {
            let mut web = web(backends);
            web.config.services[0].health.probe = Probe::None;
            web
        };
        let mut rising = Rising::default();
        let after = unprobed(&[("a", 11), ("b", 12)]);
        rising.expect(&unprobed(&[("a", 11)]), &after);
        assert_eq!(rising.percents(&after.config), BTreeMap::from([(name("b"), 10)]));
    }
}
