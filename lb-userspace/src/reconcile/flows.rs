//! Ends flows that are over, and counts those that live.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::SystemTime,
};

use lb_common::{
    abi::{BackendFlags, Flow, FlowKey, Forward, LiveCount, ServiceKey, TCP, TcpState},
    logic::ageing,
};

use crate::{
    compile::{Directory, SourceFilters},
    datapath::{Contents, Datapath, DatapathError, Live, Position, reply_key},
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
}

/// What a sweep has found and done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Flows that live on, by backend id: what [`Model::live_flows`] wants. A removed backend without any is in
    /// here with 0.
    pub live: BTreeMap<u32, u64>,
    /// How many flows were removed.
    pub removed: u64,
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
    /// By backend id, when the sweep began.
    before: BTreeMap<u32, Live>,
    /// Backends that had left their service by then: all of their flows are met.
    removed_before: BTreeSet<u32>,
    /// See [`Swept::live`].
    live: BTreeMap<u32, u64>,
    /// Flows by backend id that were there when the sweep began and had not been counted as ended by then.
    open: BTreeMap<u32, u64>,
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
            before: datapath.live_counts(&backends)?,
            removed_before: removed_before.collect(),
            live: BTreeMap::new(),
            open: BTreeMap::new(),
            removed: 0,
        })
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
        let next = datapath.some_flows(self.position.take(), &mut |key, flow| match self.fate(
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
        *self.live.entry(flow.backend).or_default() += 1;
        // What began since is among the opened ones, and so is its end among the ended.
        let began_before = flow.created < self.scope.now;
        let has_ended = ageing::has_ended(flow.forward, TcpState::from_number(flow.tcp_state));
        // Its end is taken to be the last packet, and to be among the ended ones if that came since.
        let was_open = !has_ended || flow.last_seen >= self.scope.now;
        if began_before && was_open {
            *self.open.entry(flow.backend).or_default() += 1;
        }
    }

    /// Sets what makes live flows of the data path's counts: `opened - ended + base` is what was open when the sweep
    /// began, and follows what was opened and ended since.
    fn finish<D: Datapath + ?Sized>(
        &mut self,
        datapath: &mut D,
        contents: &Contents,
    ) -> Result<Swept, DatapathError> {
        for (id, Live { count, base }) in &self.before {
            let LiveCount { opened, ended } = *count;
            let open = self.open.get(id).copied().unwrap_or(0);
            let wanted = open.wrapping_sub(opened.wrapping_sub(ended));
            if wanted != *base && contents.backends.contains_key(id) {
                datapath.set_live_base(*id, wanted)?;
            }
        }
        let mut live = std::mem::take(&mut self.live);
        for (id, backend) in &contents.backends {
            if backend.flags & BackendFlags::REMOVED != 0 && self.removed_before.contains(id) {
                live.entry(*id).or_default();
            }
        }
        Ok(Swept {
            live,
            removed: self.removed,
        })
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
        let is_other = backend.generation != flow.generation;
        let is_disabled = backend.flags & BackendFlags::DISABLED != 0;
        if is_other
            || is_disabled
            || self.scope.ending.contains(&flow.backend)
            || !belongs(key, flow, contents)
            || sources.is_some_and(|sources| !sources.allow(flow.service, key.source))
        {
            return Fate::Cut;
        }
        let state = TcpState::from_number(flow.tcp_state);
        if ageing::is_over(&contents.settings, state, flow.last_seen, self.scope.now) {
            Fate::Idle
        } else {
            Fate::Lives
        }
    }
}

fn is_open_connection(key: &FlowKey, flow: &Flow) -> bool {
    key.protocol == u32::from(TCP) && !ageing::has_ended(flow.forward, TcpState::from_number(flow.tcp_state))
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
        for backend in &service.backends {
            let Administrative::Draining { since } = model.administrative_of(service, &backend.name) else {
                continue;
            };
            // A clock that was set back leaves the flows some more time.
            let is_over = now
                .duration_since(since)
                .is_ok_and(|drained| drained >= service.drain_timeout);
            let name = (service.name.clone(), backend.name.clone());
            ids.extend(directory.backends.get(&name).filter(|_| is_over));
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
