use std::time::Duration;

use lb_common::abi::Address;

use super::*;
use crate::{
    compile::{Compiled, SlotTables, compile},
    datapath::{Counters, Live, Operation, memory::MemoryDatapath},
    model::fixture::{backend, model, service},
};

const SECOND: u64 = 1_000_000_000;
const NOW: u64 = 100_000 * SECOND;

/// A service 0 with the backends 1 and 2.
fn compiled() -> (Model, Compiled) {
    let backends = vec![backend("a", 11, 0), backend("b", 12, 0)];
    let model = model(vec![service("web", 10, &[80], backends)]).all_up();
    let compiled = compile(&mut SlotTables::default(), &model, &Contents::default()).unwrap();
    (model, compiled)
}

fn key(number: u32) -> FlowKey {
    FlowKey {
        source: Address([0, 0, 0, number]),
        ..FlowKey::default()
    }
}

fn flow(contents: &Contents, backend: u32, state: TcpState, idle: u64) -> Flow {
    Flow {
        last_seen: NOW - idle,
        backend,
        generation: contents.backends[&backend].generation,
        service: 0,
        tcp_state: state as u8,
        ..Flow::default()
    }
}

fn datapath(flows: impl IntoIterator<Item = Flow>) -> MemoryDatapath {
    MemoryDatapath {
        flows: (0..).map(key).zip(flows).collect(),
        ..MemoryDatapath::default()
    }
}

fn numbers(datapath: &MemoryDatapath) -> Vec<u32> {
    datapath.flows.keys().map(|key| key.source.0[3]).collect()
}

#[test]
fn idle_flows_end_by_the_timeout_of_their_state() {
    let contents = compiled().1.contents;
    let cases = [
        (TcpState::None, 60),
        (TcpState::SynSent, 60),
        (TcpState::SynReceived, 60),
        (TcpState::Established, 3600),
        (TcpState::FinClient, 60),
        (TcpState::FinBackend, 60),
        (TcpState::Closed, 60),
    ];
    for (state, timeout) in cases {
        let mut datapath =
            datapath([timeout * SECOND, timeout * SECOND + 1].map(|idle| flow(&contents, 1, state, idle)));
        let swept = sweep(&mut datapath, &contents, NOW, &BTreeSet::new()).unwrap();
        assert_eq!(
            swept,
            Sweep {
                live: BTreeMap::from([(1, 1)]),
                removed: 1
            },
            "{state:?}"
        );
        assert_eq!(numbers(&datapath), [0], "{state:?}");
    }
}

#[test]
fn flows_end_with_their_backend_or_service() {
    let mut contents = compiled().1.contents;
    let good = flow(&contents, 1, TcpState::Established, 0);
    let flows = [
        good,
        Flow { backend: 3, ..good },
        Flow {
            backend: u32::MAX,
            ..good
        },
        Flow {
            generation: good.generation ^ 1,
            ..good
        },
        Flow { service: 1, ..good },
        flow(&contents, 2, TcpState::Established, 0),
    ];
    let mut datapath = datapath(flows);
    contents.backends.get_mut(&2).unwrap().flags |= BackendFlags::DISABLED;
    let swept = sweep(&mut datapath, &contents, NOW, &BTreeSet::new()).unwrap();
    assert_eq!(
        swept,
        Sweep {
            live: BTreeMap::from([(1, 1)]),
            removed: 5
        }
    );
    assert_eq!(numbers(&datapath), [0]);
}

#[test]
fn flows_of_a_backend_that_is_drained_end_and_those_of_others_stay() {
    let (mut model, compiled) = compiled();
    let since = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    model.set_administrative("web", "a", Administrative::Draining { since });
    let drained_after = |seconds| drained(&model, &compiled.directory, since + Duration::from_secs(seconds));
    assert_eq!(drained_after(59), BTreeSet::new());
    assert_eq!(drained_after(60), BTreeSet::from([1]));
    let clock_set_back = since - Duration::from_secs(500);
    assert_eq!(
        drained(&model, &compiled.directory, clock_set_back),
        BTreeSet::new()
    );

    let mut datapath = datapath([1, 2].map(|id| flow(&compiled.contents, id, TcpState::Established, 0)));
    let swept = sweep(&mut datapath, &compiled.contents, NOW, &drained_after(60)).unwrap();
    assert_eq!(
        swept,
        Sweep {
            live: BTreeMap::from([(2, 1)]),
            removed: 1
        }
    );
}

#[test]
fn a_removed_backend_without_flows_is_reported_with_none() {
    let mut contents = compiled().1.contents;
    contents.backends.get_mut(&2).unwrap().flags = BackendFlags::REMOVED;
    let swept = sweep(&mut datapath([]), &contents, NOW, &BTreeSet::new()).unwrap();
    assert_eq!(swept.live, BTreeMap::from([(2, 0)]));
}

#[test]
fn more_flows_than_are_collected_at_a_time_all_end() {
    let contents = compiled().1.contents;
    let dead = flow(&contents, 1, TcpState::Closed, 61 * SECOND);
    let cut = Flow { backend: 9, ..dead };
    let alive = flow(&contents, 2, TcpState::Established, 0);
    let mut datapath = datapath((0..99).map(|number| [dead, cut, alive][number % 3]));
    let swept = sweep_in_chunks(&mut datapath, &contents, NOW, &BTreeSet::new(), 4).unwrap();
    assert_eq!(
        swept,
        Sweep {
            live: BTreeMap::from([(2, 33)]),
            removed: 66
        }
    );
    assert_eq!(datapath.flows.len(), 33);
}

/// A packet of every idle flow arrives between the scan and the removal.
struct Revived(MemoryDatapath);

impl Datapath for Revived {
    fn read(&self) -> Result<Contents, DatapathError> {
        self.0.read()
    }

    fn apply(&mut self, operation: &Operation) -> Result<(), DatapathError> {
        self.0.apply(operation)
    }

    fn flows(&self, visit: &mut dyn FnMut(&FlowKey, &Flow)) -> Result<(), DatapathError> {
        self.0.flows(visit)
    }

    fn remove_flows(&mut self, keys: &[FlowKey], unless_seen_since: u64) -> Result<u64, DatapathError> {
        self.0
            .flows
            .values_mut()
            .for_each(|flow| flow.last_seen = NOW - 1);
        self.0.remove_flows(keys, unless_seen_since)
    }

    fn remove_orphan_replies(&mut self) -> Result<u64, DatapathError> {
        self.0.remove_orphan_replies()
    }

    fn live_counts(&self, backends: &[u32]) -> Result<BTreeMap<u32, Live>, DatapathError> {
        self.0.live_counts(backends)
    }

    fn set_live_base(&mut self, backend: u32, base: u64) -> Result<(), DatapathError> {
        self.0.set_live_base(backend, base)
    }

    fn counters(&self, services: &[u32], backends: &[u32]) -> Result<Counters, DatapathError> {
        self.0.counters(services, backends)
    }
}

#[test]
fn a_flow_that_comes_back_to_life_stays_and_keeps_its_backend() {
    let mut contents = compiled().1.contents;
    let idle = flow(&contents, 1, TcpState::Established, 3601 * SECOND);
    contents.backends.get_mut(&1).unwrap().flags = BackendFlags::REMOVED;
    let mut datapath = Revived(datapath([idle]));
    let swept = sweep(&mut datapath, &contents, NOW, &BTreeSet::new()).unwrap();
    assert_eq!(
        swept,
        Sweep {
            live: BTreeMap::from([(1, 1)]),
            removed: 0
        }
    );
    assert_eq!(datapath.0.flows.len(), 1);
}
