//! Ends flows that are over, and counts those that live.

use std::{
    collections::{BTreeMap, BTreeSet},
    iter,
    time::SystemTime,
};

use lb_common::{
    abi::{BackendFlags, FlowKey, Forward, LiveCount, ServiceFlags, ServiceKey, SettingsFlags, TCP},
    logic::ageing,
};

use crate::{
    compile::{Directory, SourceFilters},
    datapath::{Contents, Datapath, DatapathError, Flow, Position, reply_key},
    model::{Administrative, Model},
};

/// What a sweep looks for.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// When it begins, on the clock of [`Flow::last_seen`].
    pub now: u64,
    /// Backends whose flows end now.
    pub ending: BTreeSet<u32>,
    /// Whether flows of sources that are denied end: filters have changed, or may have.
    pub judges_sources: bool,
    /// Backends whose TCP flows are to be told of: they are about to be reset.
    pub resetting: BTreeSet<u32>,
    /// What the sweep before has left in [`Swept::drift`].
    pub drift: BTreeMap<u32, i64>,
}

/// What a sweep has found and done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Flows that live on, by backend id: what [`Model::live_flows`] wants. A removed backend without any is in
    /// here with 0.
    pub live: BTreeMap<u32, u64>,
    /// Removed services that have no flow any more: what [`Model::left_services`] wants.
    pub left_services: BTreeSet<u32>,
    /// How many flows were removed.
    pub removed: u64,
    /// Whether the ages of all flows are by the ticks of the settings now: what [`Model::ages_are_renewed`] wants.
    pub are_ages_renewed: bool,
    /// By how much the counts of live flows are too high at least, by backend id; below zero, too low. What the next
    /// sweep finds as well is corrected.
    pub drift: BTreeMap<u32, i64>,
}

/// A TCP flow that is to be reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reset {
    /// The 5-tuple of the client's packets.
    pub client: FlowKey,
    /// That of the backend's replies; `None` where the backend answers the client directly.
    pub reply: Option<FlowKey>,
}

/// What one step of a sweep brings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    pub resets: Vec<Reset>,
    /// Clients' 5-tuples of TCP flows to processes on this host that end now, which their connections do not by
    /// themselves: the kernel has a socket of each.
    pub closes: Vec<FlowKey>,
    /// After the last step.
    pub swept: Option<Swept>,
}

/// A pass over the flow table, in steps of some thousand flows, between which the maps may change.
///
/// Ends the flows that are over: those idle for longer than their state allows and those whose service, port or
/// backend is gone, disabled or one of those that the scope names.
#[derive(Debug)]
pub struct Sweep {
    scope: Scope,
    position: Option<Position>,
    /// With the backend's id, when the sweep began.
    before: Vec<(u32, LiveCount)>,
    /// Backends and services that had left by then: all of their flows are met.
    removed_before: BTreeSet<u32>,
    left_before: BTreeSet<u32>,
    /// Whether flows did not age then; and since then by the same ticks.
    renews_ages: bool,
    /// See [`Swept::live`].
    live: BTreeMap<u32, u64>,
    /// Those of them that count as live: whose end has not been seen.
    open: BTreeMap<u32, u64>,
    /// Whether `open` is known to be exact.
    is_exact: bool,
    /// Services that have flows.
    services: BTreeSet<u32>,
    removed: u64,
}

impl Sweep {
    /// Begins a sweep.
    ///
    /// # Errors
    /// When the counts of live flows cannot be read.
    pub fn begin<D: Datapath + ?Sized>(
        datapath: &D,
        contents: &Contents,
        scope: &Scope,
    ) -> Result<Self, DatapathError> {
        let backends: Vec<u32> = contents.backends.keys().copied().collect();
        let removed_before = (contents.backends.iter())
            .filter(|(_, backend)| backend.flags & BackendFlags::REMOVED != 0)
            .map(|(id, _)| *id);
        Ok(Self {
            scope: scope.clone(),
            position: None,
            before: iter::zip(datapath.live_counts(&backends)?, backends)
                .map(|(count, id)| (id, count))
                .collect(),
            removed_before: removed_before.collect(),
            left_before: removed_services(contents).collect(),
            renews_ages: contents.settings.flags & SettingsFlags::AGELESS != 0,
            live: BTreeMap::new(),
            open: BTreeMap::new(),
            is_exact: true,
            services: BTreeSet::new(),
            removed: 0,
        })
    }

    /// Says that the ticks of ages have changed: those of the flows that were met are no good any more.
    pub fn ticks_have_changed(&mut self) {
        self.renews_ages = false;
    }

    /// Goes on with the flows that follow, given what the maps hold now.
    ///
    /// # Errors
    /// When the flow table cannot be read or changed; what was removed until then stays removed.
    pub fn step<D: Datapath + ?Sized>(
        &mut self,
        datapath: &mut D,
        contents: &Contents,
    ) -> Result<Step, DatapathError> {
        let sources = self.scope.judges_sources.then(|| SourceFilters::new(contents));
        let mut visited = Visited::default();
        let position = self.position.take();
        let next = datapath.some_flows(position, &mut |key, flow| match self.fate(
            key,
            flow,
            contents,
            sources.as_ref(),
        ) {
            Fate::Lives => visited.live.push((*key, *flow)),
            Fate::Idle => visited.idle.push((*key, *flow)),
            Fate::Cut => {
                if is_open_connection_of_process(key, flow) {
                    visited.closes.push(*key);
                }
                visited.cut.push(*key);
            }
        })?;
        self.removed += datapath.remove_flows(&visited.cut, u64::MAX)?;
        // A flow that a packet of was seen since is not idle any more.
        let last_seen = visited
            .idle
            .iter()
            .map(|(_, flow)| flow.last_seen)
            .max()
            .unwrap_or(0);
        let keys: Vec<FlowKey> = visited.idle.iter().map(|(key, _)| *key).collect();
        let removed = datapath.remove_flows(&keys, last_seen.saturating_add(1))?;
        self.removed += removed;
        for (_, flow) in &visited.live {
            self.count(flow);
        }
        if removed < visited.idle.len() as u64 {
            // Which ones came back to life is not known: count all, so that none loses its backend.
            for (_, flow) in &visited.idle {
                self.count(flow);
            }
            self.is_exact = false;
        }
        let resets = (visited.live.iter())
            .filter_map(|(key, flow)| self.reset(key, flow, contents))
            .collect();
        let is_reset = |flow: &Flow| self.scope.resetting.contains(&flow.backend);
        let mut closes = visited.closes;
        closes.extend(
            (visited.live.iter())
                .filter(|(key, flow)| is_reset(flow) && is_open_connection_of_process(key, flow))
                .map(|(key, _)| *key),
        );
        self.position = next;
        let swept = match self.position {
            Some(_) => None,
            None => Some(self.finish(datapath, contents)?),
        };
        // At last: with the last part of the table nobody looks at it any more.
        datapath.tidy_flows(position)?;
        Ok(Step {
            resets,
            closes,
            swept,
        })
    }

    /// What it looks for.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// Counts a flow that lives on.
    fn count(&mut self, flow: &Flow) {
        self.services.insert(flow.service);
        *self.live.entry(flow.backend).or_default() += 1;
        if flow.is_live() {
            *self.open.entry(flow.backend).or_default() += 1;
        }
    }

    fn finish<D: Datapath + ?Sized>(
        &mut self,
        datapath: &mut D,
        contents: &Contents,
    ) -> Result<Swept, DatapathError> {
        let drift = self.correct_drift(datapath, contents)?;
        let mut live = std::mem::take(&mut self.live);
        for (id, backend) in &contents.backends {
            if backend.flags & BackendFlags::REMOVED != 0 && self.removed_before.contains(id) {
                live.entry(*id).or_default();
            }
        }
        let left_services = removed_services(contents)
            .filter(|id| self.left_before.contains(id) && !self.services.contains(id));
        Ok(Swept {
            live,
            left_services: left_services.collect(),
            removed: self.removed,
            are_ages_renewed: self.renews_ages,
            drift,
        })
    }

    /// Corrects counts of live flows that were wrong in the sweep before, too; tells which others are wrong.
    fn correct_drift<D: Datapath + ?Sized>(
        &self,
        datapath: &mut D,
        contents: &Contents,
    ) -> Result<BTreeMap<u32, i64>, DatapathError> {
        let mut drift = BTreeMap::new();
        if !self.is_exact {
            return Ok(drift);
        }
        let still_there = (self.before.iter()).filter(|(id, _)| contents.backends.contains_key(id));
        let (ids, before): (Vec<u32>, Vec<LiveCount>) = still_there.copied().unzip();
        let after = datapath.live_counts(&ids)?;
        for (id, (before, after)) in iter::zip(ids, iter::zip(before, after)) {
            let met = self.open.get(&id).copied().unwrap_or(0);
            let by = least_drift(before, after, met);
            let former = self.scope.drift.get(&id).copied().unwrap_or(0);
            if by.signum() * former.signum() > 0 {
                let both = by.abs().min(former.abs()) * by.signum();
                datapath.adjust_live(id, -both)?;
            } else if by != 0 {
                drift.insert(id, by);
            }
        }
        Ok(drift)
    }

    /// What to provoke a reset of the flow by, if it is to be reset.
    fn reset(&self, key: &FlowKey, flow: &Flow, contents: &Contents) -> Option<Reset> {
        let is_open = is_open_connection(key, flow) && flow.forward != Forward::Local.number();
        if !is_open || !self.scope.resetting.contains(&flow.backend) {
            return None;
        }
        let backend = contents.backends.get(&flow.backend)?;
        Some(Reset {
            client: *key,
            reply: Forward::translates(flow.forward).then(|| reply_key(key, flow, backend)),
        })
    }

    fn fate(
        &self,
        key: &FlowKey,
        flow: &Flow,
        contents: &Contents,
        sources: Option<&SourceFilters<'_>>,
    ) -> Fate {
        let Some(backend) = contents.backends.get(&flow.backend) else {
            return Fate::Cut;
        };
        let is_other = flow
            .generation
            .is_some_and(|generation| generation != backend.generation as u16);
        let is_disabled = backend.flags & BackendFlags::DISABLED != 0;
        if is_other
            || is_disabled
            || self.scope.ending.contains(&flow.backend)
            || !belongs(key, flow, contents)
            || sources.is_some_and(|sources| !sources.allow(flow.service, key.source))
        {
            return Fate::Cut;
        }
        let (state, now) = (flow.tcp_state, self.scope.now);
        if ageing::is_over_since(&contents.settings, state, flow.last_seen, now) {
            Fate::Idle
        } else {
            Fate::Lives
        }
    }
}

/// By how much a count of live flows is too high at least, below zero too low; 0 where it may be right. Counted `before`
/// a sweep that has met so many, and `after` it.
///
/// Of those that were live before, all were met but those that have ended since, and others may be among them that have
/// begun since.
fn least_drift(before: LiveCount, after: LiveCount, met: u64) -> i64 {
    let began = after.opened.wrapping_sub(before.opened) as i64;
    let ended = after.ended.wrapping_sub(before.ended) as i64;
    let counted = before.opened.wrapping_sub(before.ended) as i64;
    let beyond = counted.wrapping_sub(met as i64);
    let (least, most) = (beyond.wrapping_sub(ended), beyond.wrapping_add(began));
    if least > 0 {
        least
    } else if most < 0 {
        most
    } else {
        0
    }
}

fn removed_services(contents: &Contents) -> impl Iterator<Item = u32> {
    let services = contents.services.iter();
    let removed = services.filter(|(_, service)| service.flags & ServiceFlags::REMOVED != 0);
    removed.map(|(id, _)| *id)
}

fn is_open_connection(key: &FlowKey, flow: &Flow) -> bool {
    key.protocol == u32::from(TCP) && flow.is_live()
}

fn is_open_connection_of_process(key: &FlowKey, flow: &Flow) -> bool {
    flow.forward == Forward::Local.number() && is_open_connection(key, flow)
}

/// Tells whether the destination of a flow is still one of its service.
fn belongs(key: &FlowKey, flow: &Flow, contents: &Contents) -> bool {
    let leads_there = |port: u16| {
        let key = ServiceKey {
            vip: key.destination,
            port,
            protocol: key.protocol as u8,
            _pad: 0,
        };
        contents.service_keys.get(&key) == Some(&flow.service)
    };
    contents.services.contains_key(&flow.service) && (leads_there(key.destination_port) || leads_there(0))
}

/// Backends whose drain has lasted for longer than their service's drain timeout: their flows end now.
pub fn drained(model: &Model, directory: &Directory, now: SystemTime) -> BTreeSet<u32> {
    let mut ids = BTreeSet::new();
    for service in &model.config.services {
        for (backend, id) in service.backends.iter().zip(directory.backends_of(service)) {
            let Administrative::Draining { since } = model.administrative_of(service, &backend.name) else {
                continue;
            };
            // A clock that was set back leaves the flows some more time.
            let is_over = now
                .duration_since(since)
                .is_ok_and(|drained| drained >= service.drain_timeout);
            if is_over {
                ids.insert(*id);
            }
        }
    }
    ids
}

/// What a step has met.
#[derive(Debug, Default)]
struct Visited {
    live: Vec<(FlowKey, Flow)>,
    idle: Vec<(FlowKey, Flow)>,
    cut: Vec<FlowKey>,
    /// Of those that are cut; see [`Step::closes`].
    closes: Vec<FlowKey>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Lives,
    /// Ends unless another packet comes.
    Idle,
    /// Ends in any case.
    Cut,
}

#[cfg(test)]
mod tests;
