//! Passes over the flow table, in steps: a table of a million flows takes seconds, and nothing else is to wait for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    net::SocketAddr,
    time::SystemTime,
};

use lb_common::abi::{Address, BackendFlags, FlowKey};
use tokio::sync::oneshot;
use tracing::warn;

use super::{Controller, chain};
use crate::{
    api::{Done, Refused},
    compile,
    datapath::{Contents, DatapathError, kernel::monotonic_now},
    net::{
        close::{Connection, close},
        poke::{Poke, Segment},
    },
    reconcile::{Reset, Scope, Step, Sweep, Swept, drained},
};

/// What is under way, and what is to begin after it.
#[derive(Debug, Default)]
pub(super) struct Sweeps {
    running: Option<Sweep>,
    /// To send when it has ended.
    answers: Vec<Answer>,
    next: Next,
    /// What the last one has left: see [`Scope::drift`].
    drift: BTreeMap<u32, i64>,
}

/// The sweep to begin next.
#[derive(Debug, Default)]
struct Next {
    is_wanted: bool,
    answers: Vec<Answer>,
    judges_sources: bool,
    /// Backends by id whose flows are to be reset from now on.
    resetting: BTreeSet<u32>,
}

#[derive(Debug)]
struct Answer {
    to: oneshot::Sender<Result<Done, Refused>>,
    done: Done,
}

impl Sweeps {
    /// Takes in what a change of the maps means for flows.
    pub(super) fn follow(&mut self, before: &Contents, after: &Contents) {
        let filters = |contents: &Contents| -> Vec<(u32, u16)> {
            let services = contents.services.iter();
            services.map(|(id, service)| (*id, service.flags)).collect()
        };
        if before.source_filters != after.source_filters || filters(before) != filters(after) {
            self.next.judges_sources = true;
            self.next.is_wanted = true;
        }
        if before.settings.tick_shifts != after.settings.tick_shifts {
            if let Some(sweep) = &mut self.running {
                sweep.ticks_have_changed();
            }
            self.next.is_wanted = true;
        }
        let resets = |contents: &Contents, id: &u32| {
            (contents.backends.get(id)).is_some_and(|backend| backend.flags & BackendFlags::RESETS != 0)
        };
        for id in after.backends.keys() {
            if resets(after, id) && !resets(before, id) {
                self.next.resetting.insert(*id);
                self.next.is_wanted = true;
            }
        }
    }

    /// Judges sources at first: filters may have changed while no daemon ran.
    pub(super) fn judging_sources() -> Self {
        Self {
            next: Next {
                is_wanted: true,
                judges_sources: true,
                ..Next::default()
            },
            ..Self::default()
        }
    }
}

impl Controller {
    /// Ends the flows that are there without a backend or a service: their ids may be given away from now on.
    ///
    /// # Errors
    /// The flow table cannot be read.
    pub(super) fn sweep_what_is_found(&mut self) -> Result<(), DatapathError> {
        let scope = Scope {
            now: monotonic_now(),
            ..Scope::default()
        };
        let mut sweep = self.reconciler.begin_sweep(&scope)?;
        loop {
            if let Some(swept) = self.reconciler.sweep(&mut sweep)?.swept {
                self.take_over(swept);
                return Ok(());
            }
        }
    }

    /// What was found is what the model says from now on.
    fn take_over(&mut self, swept: Swept) {
        self.sweeps.drift = swept.drift;
        self.model.live_flows = swept.live;
        self.model.left_services = swept.left_services;
        self.model.ages_are_renewed = swept.are_ages_renewed;
    }

    /// Has flows that are over end soon, the others counted, and removed backends without flows gone.
    pub fn sweep_soon(&mut self) {
        self.sweeps.next.is_wanted = true;
    }

    /// Answers once the flows that are over by now have ended.
    pub fn answer_after_sweep(&mut self, to: oneshot::Sender<Result<Done, Refused>>, done: Done) {
        self.sweeps.next.is_wanted = true;
        self.sweeps.next.answers.push(Answer { to, done });
    }

    /// Tells whether there is something to do for [`Self::step`].
    pub fn has_steps(&self) -> bool {
        self.sweeps.running.is_some() || self.sweeps.next.is_wanted
    }

    /// Goes on with what is under way, by some thousand flows: milliseconds.
    pub fn step(&mut self) {
        if let Some(sweep) = self.sweeps.running.take() {
            self.step_sweep(sweep);
        } else if self.sweeps.next.is_wanted {
            self.begin_sweep();
        }
        if self.sweeps.running.is_none() {
            for Answer { to, done } in mem::take(&mut self.sweeps.answers) {
                // Who asked may have gone away meanwhile.
                drop(to.send(Ok(done)));
            }
        }
    }

    fn begin_sweep(&mut self) {
        let next = mem::take(&mut self.sweeps.next);
        let scope = Scope {
            now: monotonic_now(),
            ending: drained(&self.model, &self.directory, SystemTime::now()),
            judges_sources: next.judges_sources,
            resetting: next.resetting,
            drift: mem::take(&mut self.sweeps.drift),
        };
        self.sweeps.answers = next.answers;
        match self.reconciler.begin_sweep(&scope) {
            Ok(sweep) => self.sweeps.running = Some(sweep),
            Err(error) => self.sweep_failed(&scope, error),
        }
    }

    fn step_sweep(&mut self, mut sweep: Sweep) {
        let Step {
            resets,
            closes,
            swept,
        } = match self.reconciler.sweep(&mut sweep) {
            Ok(step) => step,
            Err(error) => return self.sweep_failed(sweep.scope(), error),
        };
        if !resets.is_empty() {
            self.poker.poke(resets.iter().map(poke).collect());
        }
        if !closes.is_empty()
            && let Err(error) = close(&closes.iter().map(connection).collect::<Vec<_>>())
        {
            warn!(
                "connections whose flows have ended go on until they end by themselves: {}",
                chain(error)
            );
        }
        let Some(swept) = swept else {
            self.sweeps.running = Some(sweep);
            return;
        };
        self.problems.remove("sweep");
        self.take_over(swept);
        let has_failed = self.problems.contains_key("converge");
        if has_failed || compile::is_changed_by_sweep(&self.model, self.reconciler.actual()) {
            self.converge_or_retry();
        } else {
            // Those of services that were followed alone.
            self.tables.retain_used();
        }
        // If that has failed the next sweep does it again.
        self.model.ages_are_renewed = false;
    }

    /// Leaves what was to be done to the next sweep.
    fn sweep_failed(&mut self, scope: &Scope, error: DatapathError) {
        let warning = format!(
            "flows that are over stay until the next sweep, in some seconds: {}",
            chain(error)
        );
        let next = &mut self.sweeps.next;
        next.judges_sources |= scope.judges_sources;
        next.resetting.extend(&scope.resetting);
        for answer in &mut self.sweeps.answers {
            answer.done.warnings.push(warning.clone());
        }
        self.problem("sweep", &anyhow::anyhow!(warning));
    }
}

/// What has both ends of a flow send a packet, which the program answers with a reset for its sender, and passes on as
/// one for the other end where the client's packets are all that it sees: then the client has to send two.
fn poke(reset: &Reset) -> Poke {
    let back = |key: &FlowKey| Segment {
        source: end(key.destination, key.destination_port),
        destination: end(key.source, key.source_port),
    };
    let to_client = back(&reset.client);
    Poke {
        first: to_client,
        second: reset.reply.as_ref().map_or(to_client, back),
        apart: reset.reply.is_none(),
    }
}

/// The connection of a process on this host, given the 5-tuple of its client's packets.
fn connection(client: &FlowKey) -> Connection {
    Connection {
        local: end(client.destination, client.destination_port),
        remote: end(client.source, client.source_port),
    }
}

fn end(address: Address, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), u16::from_be(port))
}

#[cfg(test)]
mod tests {
    use lb_common::abi::{Backend, FILTER_DENY, FilterKey, Service};

    use super::*;

    #[test]
    fn both_ends_of_a_translated_flow_are_poked_as_they_know_the_other() {
        let key = |source: &str, destination: &str| {
            let (source, destination): (SocketAddr, SocketAddr) =
                (source.parse().unwrap(), destination.parse().unwrap());
            FlowKey {
                source: source.ip().into(),
                source_port: source.port().to_be(),
                destination: destination.ip().into(),
                destination_port: destination.port().to_be(),
                protocol: 6,
            }
        };
        let client = key("192.0.2.7:40000", "203.0.113.10:80");
        let reply = key("10.0.0.11:8080", "10.0.0.1:33000");
        let to_client = Segment {
            source: "203.0.113.10:80".parse().unwrap(),
            destination: "192.0.2.7:40000".parse().unwrap(),
        };
        let to_backend = Segment {
            source: "10.0.0.1:33000".parse().unwrap(),
            destination: "10.0.0.11:8080".parse().unwrap(),
        };
        let translated = Reset {
            client,
            reply: Some(reply),
        };
        let both = Poke {
            first: to_client,
            second: to_backend,
            apart: false,
        };
        assert_eq!(poke(&translated), both);
        let direct = Reset { client, reply: None };
        let twice = Poke {
            first: to_client,
            second: to_client,
            apart: true,
        };
        assert_eq!(poke(&direct), twice);
    }

    #[test]
    fn sources_are_judged_after_a_change_of_filters_alone() {
        let filter = (FilterKey::default(), 32);
        let service = |flags| Service {
            flags,
            ..Service::default()
        };
        let contents = |filters: &[((FilterKey, u32), u32)], flags| Contents {
            source_filters: filters.iter().copied().collect(),
            services: BTreeMap::from([(0, service(flags))]),
            ..Contents::default()
        };
        let (none, some, others) = (
            contents(&[], 0),
            contents(&[(filter, FILTER_DENY)], 1),
            contents(&[], 3),
        );
        for (before, after, expected) in [
            (&none, &none, false),
            (&some, &some, false),
            (&none, &some, true),
            (&some, &none, true),
            (&none, &others, true),
        ] {
            let mut sweeps = Sweeps::default();
            sweeps.follow(before, after);
            assert_eq!(
                (sweeps.next.judges_sources, sweeps.next.is_wanted),
                (expected, expected)
            );
        }
    }

    #[test]
    fn flows_are_reset_when_their_backend_begins_to_and_not_again() {
        let contents = |flags: &[u16]| Contents {
            backends: (1..)
                .zip(flags)
                .map(|(id, flags)| {
                    (
                        id,
                        Backend {
                            flags: *flags,
                            ..Backend::default()
                        },
                    )
                })
                .collect(),
            ..Contents::default()
        };
        let (gone, resets) = (
            BackendFlags::REMOVED,
            BackendFlags::REMOVED | BackendFlags::RESETS,
        );
        let mut sweeps = Sweeps::default();
        sweeps.follow(
            &contents(&[0, gone, resets]),
            &contents(&[resets, resets, resets, resets]),
        );
        assert_eq!(sweeps.next.resetting, BTreeSet::from([1, 2, 4]));
        assert!(sweeps.next.is_wanted);
        let mut sweeps = Sweeps::default();
        sweeps.follow(&contents(&[resets]), &contents(&[resets, gone]));
        assert!(sweeps.next.resetting.is_empty() && !sweeps.next.is_wanted);
    }
}
