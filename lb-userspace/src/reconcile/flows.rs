//! Ends flows that are over, and counts those that live.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::SystemTime,
};

use lb_common::{
    abi::{BackendFlags, Flow, FlowKey, TcpState},
    logic::ageing,
};

use crate::{
    compile::Directory,
    datapath::{Contents, Datapath, DatapathError},
    model::{Administrative, Model},
};

/// Flows that one scan collects at most, to bound the memory: 2.6 MB of keys.
const CHUNK: usize = 65_536;
/// Scans of one sweep at most; what is left then waits for the next sweep.
const MAX_SCANS: usize = 64;

/// What a sweep has found and done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sweep {
    /// Flows that live on, by backend id: what [`Model::live_flows`] wants. A removed backend without any is in
    /// here with 0.
    pub live: BTreeMap<u32, u64>,
    /// How many flows were removed.
    pub removed: u64,
}

/// Ends the flows that are over: those idle for longer than their state allows and those whose service or backend is
/// gone, disabled or one of `ending` (backend ids).
///
/// `now` is on the clock of [`Flow::last_seen`].
///
/// # Errors
/// When the flow table cannot be read or changed; what was removed until then stays removed.
pub fn sweep<D: Datapath + ?Sized>(
    datapath: &mut D,
    contents: &Contents,
    now: u64,
    ending: &BTreeSet<u32>,
) -> Result<Sweep, DatapathError> {
    sweep_in_chunks(datapath, contents, now, ending, CHUNK)
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

fn sweep_in_chunks<D: Datapath + ?Sized>(
    datapath: &mut D,
    contents: &Contents,
    now: u64,
    ending: &BTreeSet<u32>,
    chunk: usize,
) -> Result<Sweep, DatapathError> {
    let mut removed = 0;
    for _ in 0..MAX_SCANS {
        let mut scan = Scan::default();
        datapath.flows(&mut |key, flow| {
            let is_full = scan.idle.len() + scan.cut.len() >= chunk;
            match fate(flow, contents, now, ending) {
                Fate::Lives => *scan.live.entry(flow.backend).or_default() += 1,
                Fate::Idle | Fate::Cut if is_full => scan.is_cut_short = true,
                Fate::Idle => scan.add_idle(key, flow),
                Fate::Cut => scan.cut.push(*key),
            }
        })?;
        removed += datapath.remove_flows(&scan.cut, u64::MAX)?;
        // A flow that a packet of was seen since the scan is not idle any more.
        let idle_removed = datapath.remove_flows(&scan.idle, scan.last_idle.saturating_add(1))?;
        removed += idle_removed;
        if scan.is_cut_short {
            continue;
        }
        let mut live = scan.live;
        if idle_removed < scan.idle.len() as u64 {
            // Which ones came back to life is not known: count all, so that none loses its backend.
            for (backend, flows) in scan.idle_by_backend {
                *live.entry(backend).or_default() += flows;
            }
        }
        for (id, backend) in &contents.backends {
            if backend.flags & BackendFlags::REMOVED != 0 {
                live.entry(*id).or_default();
            }
        }
        return Ok(Sweep { live, removed });
    }
    // The table fills faster than it is emptied: no count is certain, and no removed backend may go.
    Ok(Sweep {
        live: BTreeMap::new(),
        removed,
    })
}

/// What one scan of the flow table has found.
#[derive(Debug, Default)]
struct Scan {
    live: BTreeMap<u32, u64>,
    idle: Vec<FlowKey>,
    idle_by_backend: BTreeMap<u32, u64>,
    /// When the last packet of any of the idle flows was seen.
    last_idle: u64,
    cut: Vec<FlowKey>,
    /// There were more to remove than were collected.
    is_cut_short: bool,
}

impl Scan {
    fn add_idle(&mut self, key: &FlowKey, flow: &Flow) {
        self.idle.push(*key);
        *self.idle_by_backend.entry(flow.backend).or_default() += 1;
        self.last_idle = self.last_idle.max(flow.last_seen);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Lives,
    /// Ends unless another packet comes.
    Idle,
    /// Ends in any case.
    Cut,
}

fn fate(flow: &Flow, contents: &Contents, now: u64, ending: &BTreeSet<u32>) -> Fate {
    let Some(backend) = contents.backends.get(&flow.backend) else {
        return Fate::Cut;
    };
    let is_other = backend.generation != flow.generation;
    let is_disabled = backend.flags & BackendFlags::DISABLED != 0;
    if is_other
        || is_disabled
        || ending.contains(&flow.backend)
        || !contents.services.contains_key(&flow.service)
    {
        return Fate::Cut;
    }
    let state = TcpState::from_number(flow.tcp_state);
    if ageing::is_over(&contents.settings, state, flow.last_seen, now) {
        Fate::Idle
    } else {
        Fate::Lives
    }
}

#[cfg(test)]
mod tests;
