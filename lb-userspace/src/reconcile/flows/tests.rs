use std::time::Duration;

use lb_common::abi::{Address, UDP};
use proptest::prelude::*;

use super::*;
use crate::{
    compile::{Compiled, SlotTables, compile},
    datapath::{Counters, Operation, memory::MemoryDatapath},
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

/// Of a client's packets to port 80 of service 0.
fn key(number: u32) -> FlowKey {
    FlowKey {
        source: Address([0, 0, 0, number]),
        source_port: 5000_u16.to_be(),
        destination: Address::from(std::net::Ipv4Addr::new(203, 0, 113, 10)),
        destination_port: 80_u16.to_be(),
        protocol: u32::from(TCP),
    }
}

fn flow(contents: &Contents, backend: u32, state: TcpState, idle: u64) -> Flow {
    Flow {
        last_seen: NOW - idle,
        backend,
        generation: contents.backends[&backend].generation,
        service: 0,
        tcp_state: state as u8,
        forward: Forward::Nat.number(),
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

fn now() -> Scope {
    Scope {
        now: NOW,
        ..Scope::default()
    }
}

/// A whole sweep, and the flows that it says are to be reset.
fn sweep_and_reset<D: Datapath>(datapath: &mut D, contents: &Contents, scope: &Scope) -> (Swept, Vec<Reset>) {
    let mut sweep = Sweep::begin(datapath, contents, scope).unwrap();
    let mut resets = Vec::new();
    loop {
        let step = sweep.step(datapath, contents).unwrap();
        resets.extend(step.resets);
        if let Some(swept) = step.swept {
            return (swept, resets);
        }
    }
}

fn sweep<D: Datapath>(datapath: &mut D, contents: &Contents, scope: &Scope) -> Swept {
    sweep_and_reset(datapath, contents, scope).0
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
        let swept = sweep(&mut datapath, &contents, &now());
        assert_eq!(
            swept,
            Swept {
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
    let swept = sweep(&mut datapath, &contents, &now());
    assert_eq!(
        swept,
        Swept {
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
    let scope = Scope {
        ending: drained_after(60),
        ..now()
    };
    let swept = sweep(&mut datapath, &compiled.contents, &scope);
    assert_eq!(
        swept,
        Swept {
            live: BTreeMap::from([(2, 1)]),
            removed: 1
        }
    );
}

#[test]
fn a_removed_backend_without_flows_is_reported_with_none() {
    let mut contents = compiled().1.contents;
    contents.backends.get_mut(&2).unwrap().flags = BackendFlags::REMOVED;
    let swept = sweep(&mut datapath([]), &contents, &now());
    assert_eq!(swept.live, BTreeMap::from([(2, 0)]));
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

    fn some_flows(
        &self,
        position: Option<Position>,
        visit: &mut dyn FnMut(&FlowKey, &Flow),
    ) -> Result<Option<Position>, DatapathError> {
        self.0.some_flows(position, visit)
    }

    fn remove_flows(&mut self, keys: &[FlowKey], unless_seen_since: u64) -> Result<u64, DatapathError> {
        self.0
            .flows
            .values_mut()
            .for_each(|flow| flow.last_seen = NOW - 1);
        self.0.remove_flows(keys, unless_seen_since)
    }

    fn remove_some_orphan_replies(
        &mut self,
        position: Option<Position>,
    ) -> Result<(u64, Option<Position>), DatapathError> {
        self.0.remove_some_orphan_replies(position)
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
    let swept = sweep(&mut datapath, &contents, &now());
    assert_eq!(
        swept,
        Swept {
            live: BTreeMap::from([(1, 1)]),
            removed: 0
        }
    );
    assert_eq!(datapath.0.flows.len(), 1);
}

#[test]
fn flows_end_with_the_port_of_their_service() {
    let mut contents = compiled().1.contents;
    let mut datapath = datapath([]);
    let good = flow(&contents, 1, TcpState::Established, 0);
    let other_port = FlowKey {
        destination_port: 81_u16.to_be(),
        ..key(1)
    };
    let other_protocol = FlowKey {
        protocol: u32::from(UDP),
        ..key(2)
    };
    let other_vip = FlowKey {
        destination: Address([1, 2, 3, 4]),
        ..key(3)
    };
    for key in [key(0), other_port, other_protocol, other_vip] {
        datapath.flows.insert(key, good);
    }
    assert_eq!(sweep(&mut datapath, &contents, &now()).removed, 3);
    assert_eq!(numbers(&datapath), [0]);

    // A service of all ports has those of other ports too, and the port may have gone to another service.
    datapath.flows.insert(other_port, good);
    let any = ServiceKey {
        port: 0,
        ..*contents.service_keys.keys().next().unwrap()
    };
    contents.service_keys.insert(any, 0);
    assert_eq!(sweep(&mut datapath, &contents, &now()).removed, 0);
    contents.service_keys.insert(any, 1);
    assert_eq!(sweep(&mut datapath, &contents, &now()).removed, 1);
    assert_eq!(numbers(&datapath), [0]);
}

#[test]
fn flows_of_denied_sources_end_when_sources_are_judged() {
    let (mut model, _) = compiled();
    model.config.services[0].deny = vec!["10.1.0.0/16".parse().unwrap()];
    let compiled = compile(&mut SlotTables::default(), &model, &Contents::default()).unwrap();
    let good = flow(&compiled.contents, 1, TcpState::Established, 0);
    let mut datapath = datapath([]);
    for source in ["10.1.2.3", "10.2.2.3"] {
        let source = source.parse::<std::net::IpAddr>().unwrap().into();
        datapath.flows.insert(FlowKey { source, ..key(0) }, good);
    }
    assert_eq!(sweep(&mut datapath, &compiled.contents, &now()).removed, 0);
    let scope = Scope {
        judges_sources: true,
        ..now()
    };
    assert_eq!(sweep(&mut datapath, &compiled.contents, &scope).removed, 1);
    let left: Vec<String> = datapath.flows.keys().map(|key| key.source.to_string()).collect();
    assert_eq!(left, ["10.2.2.3"]);
}

#[test]
fn open_tcp_flows_of_resetting_backends_are_told_with_both_of_their_ends() {
    let contents = compiled().1.contents;
    let client: Address = std::net::Ipv4Addr::new(192, 0, 2, 7).into();
    let open = |forward: Forward| Flow {
        forward: forward.number(),
        source_port: 40_000_u16.to_be(),
        ..flow(&contents, 1, TcpState::Established, 0)
    };
    for (forward, reply_to) in [
        (Forward::Nat, Some(client)),
        (Forward::FullNat, Some(contents.backends[&1].source)),
        (Forward::Dsr, None),
        (Forward::IpIp, None),
        (Forward::Gue, None),
    ] {
        let key = FlowKey {
            source: client,
            ..key(0)
        };
        let mut datapath = datapath([
            flow(&contents, 1, TcpState::Closed, 0),
            flow(&contents, 2, TcpState::Established, 0),
        ]);
        datapath.flows.insert(key, open(forward));
        let scope = Scope {
            resetting: BTreeSet::from([1]),
            ..now()
        };
        let (swept, resets) = sweep_and_reset(&mut datapath, &contents, &scope);
        assert_eq!(swept.removed, 0);
        let reply = reply_to.map(|destination| FlowKey {
            source: contents.backends[&1].address,
            source_port: 80_u16.to_be(),
            destination,
            destination_port: 40_000_u16.to_be(),
            protocol: u32::from(TCP),
        });
        assert_eq!(resets, [Reset { client: key, reply }], "{forward:?}");
    }
}

#[test]
fn connections_of_processes_are_closed_when_their_flows_are_cut_or_reset() {
    let mut contents = compiled().1.contents;
    contents.backends.get_mut(&1).unwrap().flags |= BackendFlags::DISABLED;
    let local = |backend, state| Flow {
        forward: Forward::Local.number(),
        ..flow(&contents, backend, state, 0)
    };
    let mut datapath = datapath([
        local(1, TcpState::Established),
        // Has ended.
        local(1, TcpState::Closed),
        // Lives on.
        local(2, TcpState::Established),
        // Of another host: nothing here to close.
        flow(&contents, 1, TcpState::Established, 0),
    ]);
    assert_eq!(closed(&mut datapath, &contents, &now()), [key(0)]);
    assert_eq!(numbers(&datapath), [2]);

    let scope = Scope {
        resetting: BTreeSet::from([2]),
        ..now()
    };
    assert_eq!(closed(&mut datapath, &contents, &scope), [key(2)]);
    assert_eq!(sweep_and_reset(&mut datapath, &contents, &scope).1, []);
}

/// The connections that a whole sweep says are to be closed.
fn closed<D: Datapath>(datapath: &mut D, contents: &Contents, scope: &Scope) -> Vec<FlowKey> {
    let mut sweep = Sweep::begin(datapath, contents, scope).unwrap();
    let mut closes = Vec::new();
    loop {
        let step = sweep.step(datapath, contents).unwrap();
        closes.extend(step.closes);
        if step.swept.is_some() {
            return closes;
        }
    }
}

#[test]
fn a_backend_that_leaves_during_a_sweep_is_not_reported_without_flows() {
    let mut contents = compiled().1.contents;
    let mut datapath = datapath([]);
    let mut sweep = Sweep::begin(&datapath, &contents, &now()).unwrap();
    // New flows may have been put on it behind the sweep's back until now.
    contents.backends.get_mut(&2).unwrap().flags = BackendFlags::REMOVED;
    let swept = loop {
        if let Some(swept) = sweep.step(&mut datapath, &contents).unwrap().swept {
            break swept;
        }
    };
    assert_eq!(swept.live, BTreeMap::new());
    assert_eq!(
        self::sweep(&mut datapath, &contents, &now()).live,
        BTreeMap::from([(2, 0)])
    );
}

#[test]
fn live_flows_are_recounted_whatever_the_counts_were() {
    let contents = compiled().1.contents;
    let mut datapath = datapath([
        flow(&contents, 1, TcpState::Established, SECOND),
        flow(&contents, 1, TcpState::SynSent, SECOND),
        flow(&contents, 1, TcpState::FinClient, SECOND),
        flow(&contents, 1, TcpState::Closed, SECOND),
        Flow {
            forward: Forward::Dsr.number(),
            ..flow(&contents, 1, TcpState::FinClient, SECOND)
        },
        flow(&contents, 1, TcpState::Established, 3601 * SECOND),
        flow(&contents, 2, TcpState::None, SECOND),
    ]);
    for (opened, ended) in [(0, 0), (100, 3), (3, 100), (u64::MAX, 1)] {
        for id in [1, 2] {
            datapath.live.entry(id).or_default().count = LiveCount { opened, ended };
        }
        sweep(&mut datapath, &contents, &now());
        let live = datapath.live_counts(&[1, 2]).unwrap();
        assert_eq!((live[&1].flows(), live[&2].flows()), (3, 1), "{opened} {ended}");
    }
}

#[test]
fn the_base_of_live_flows_is_written_when_it_changes_alone() {
    use crate::datapath::faulty::{FaultyDatapath, Schedule};
    let contents = compiled().1.contents;
    let inner = datapath([flow(&contents, 1, TcpState::Established, SECOND)]);
    let mut datapath = FaultyDatapath::new(inner, Schedule::Never);
    let mut calls_of_a_sweep = || {
        datapath.set_schedule(Schedule::Never);
        sweep(&mut datapath, &contents, &now());
        datapath.calls()
    };
    let (first, second) = (calls_of_a_sweep(), calls_of_a_sweep());
    assert_eq!(first, second + 1);
}

/// What happens to flows while a sweep is under way.
#[derive(Clone, Debug)]
enum Event {
    Opens(u32, u32),
    Ends(u32),
    IsSeen(u32),
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        (0_u32..60, 1_u32..3).prop_map(|(number, backend)| Event::Opens(number, backend)),
        (0_u32..60).prop_map(Event::Ends),
        (0_u32..60).prop_map(Event::IsSeen),
    ]
}

/// The program's part: records and counts as it does.
fn happen(datapath: &mut MemoryDatapath, contents: &Contents, event: &Event, time: u64) {
    let is_open = |flow: &Flow| TcpState::from_number(flow.tcp_state) != TcpState::Closed;
    match event {
        Event::Opens(number, backend) => {
            // A flow of this 5-tuple starts anew only once it is removed, to keep the two apart.
            if datapath.flows.contains_key(&key(*number)) {
                return;
            }
            let new = Flow {
                created: time,
                last_seen: time,
                ..flow(contents, *backend, TcpState::Established, 0)
            };
            datapath.flows.insert(key(*number), new);
            datapath.live.entry(*backend).or_default().count.opened += 1;
        }
        Event::Ends(number) => {
            let Some(flow) = datapath.flows.get_mut(&key(*number)).filter(|flow| is_open(flow)) else {
                return;
            };
            flow.tcp_state = TcpState::Closed as u8;
            flow.last_seen = time;
            datapath.live.entry(flow.backend).or_default().count.ended += 1;
        }
        Event::IsSeen(number) => {
            if let Some(flow) = datapath.flows.get_mut(&key(*number)).filter(|flow| is_open(flow)) {
                flow.last_seen = time;
            }
        }
    }
}

proptest! {
    #[test]
    fn live_flows_are_right_after_a_sweep_whatever_happened_before_and_meanwhile(
        before in prop::collection::vec(any_event(), 0..80),
        meanwhile in prop::collection::vec(prop::collection::vec(any_event(), 0..12), 8),
        bases in any::<[u64; 2]>(),
        lost in prop::collection::vec(0_u32..60, 0..10),
    ) {
        let contents = compiled().1.contents;
        let mut datapath = datapath([]);
        for (event, time) in before.iter().zip(NOW - 1000..) {
            happen(&mut datapath, &contents, event, time);
        }
        // Evicted unseen, and the daemon before this one has left what it thought.
        for number in &lost {
            datapath.flows.remove(&key(*number));
        }
        for (id, base) in [1, 2].into_iter().zip(bases) {
            datapath.live.entry(id).or_default().base = base;
        }
        let mut sweep = Sweep::begin(&datapath, &contents, &now()).unwrap();
        let mut time = NOW;
        let mut rounds = meanwhile.iter();
        loop {
            for event in rounds.next().into_iter().flatten() {
                happen(&mut datapath, &contents, event, time);
                time += 1;
            }
            if sweep.step(&mut datapath, &contents).unwrap().swept.is_some() {
                break;
            }
        }
        for id in [1, 2] {
            let open = datapath.flows.values().filter(|flow| {
                flow.backend == id && TcpState::from_number(flow.tcp_state) != TcpState::Closed
            });
            let expected = open.count() as u64;
            prop_assert_eq!(datapath.live_counts(&[id]).unwrap()[&id].flows(), expected, "backend {}", id);
        }
    }
}
