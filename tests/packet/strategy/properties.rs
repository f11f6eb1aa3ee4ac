//! What users expect of each strategy, over ten thousand flows and what the daemon compiles.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use lb_common::abi::{Address, Backend, LiveCount, Tags};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use tests::machine;
use xlb::{
    compile::{SlotTables, compile},
    config,
    datapath::{Datapath, Sizes},
    model::{Model, NextHop},
    reconcile::plan,
};

use crate::{
    fixture::{Fixture, SETTINGS, WEB},
    frame::{Frame, RST, SYN, tcp},
};

const FLOWS: usize = 10_000;

/// One service as the daemon would put it into the maps.
struct Balancer {
    fixture: Fixture,
    tables: SlotTables,
    strategy: &'static str,
    /// What the maps hold, by id.
    backends: BTreeMap<u32, Backend>,
}

impl Balancer {
    fn new(strategy: &'static str, weights: &[(u8, u32)]) -> Self {
        let mut balancer = Self {
            fixture: Fixture::lent(),
            tables: SlotTables::default(),
            strategy,
            backends: BTreeMap::new(),
        };
        balancer.set_backends(weights);
        balancer
    }

    /// Balances over these hosts of 10.0.0.0/24 by these weights.
    fn set_backends(&mut self, weights: &[(u8, u32)]) {
        let mut text = format!(
            "interfaces = [\"eth0\"]\n[[service]]\nname = \"web\"\nvip = \"{}\"\nport = {}\nprotocol = \"tcp\"\n\
             strategy = \"{}\"\n[service.health]\ntype = \"none\"\n",
            WEB.vip.ip(),
            WEB.vip.port(),
            self.strategy,
        );
        for (host, weight) in weights {
            text += &format!(
                "[[service.backend]]\nname = \"host-{host}\"\naddress = \"10.0.0.{host}:8080\"\nweight = {weight}\n"
            );
        }
        let way = |host: u8| NextHop {
            ifindex: 1,
            source: Ipv4Addr::new(10, 0, 0, 254).into(),
            source_mac: [2, 0, 0, 0, 0, 254],
            next_hop_mac: Some([2, 0, 0, 0, 0, host]),
            tags: Tags::default(),
            mtu: 1500,
        };
        let model = Model {
            config: config::parse(&text, "xlb.toml")
                .unwrap_or_else(|error| panic!("{}", error.render(false))),
            sizes: Sizes::default(),
            seed: SETTINGS.seed,
            source_ports: (SETTINGS.source_port_first, SETTINGS.source_port_count),
            health: BTreeMap::new(),
            administrative: BTreeMap::new(),
            next_hops: weights
                .iter()
                .map(|(host, _)| (IpAddr::from([10, 0, 0, *host]), way(*host)))
                .collect(),
            ramps: BTreeMap::new(),
            live_flows: BTreeMap::new(),
            left_services: BTreeSet::new(),
            ages_are_renewed: false,
        };
        let actual = self.fixture.datapath().read().unwrap();
        let desired = compile(&mut self.tables, &model, &actual).unwrap().contents;
        for operation in plan(&actual, &desired) {
            self.fixture.apply(operation);
        }
        self.backends = desired.backends;
    }

    /// Has all flows begin anew, and tells by client which host each was put on.
    fn spread(&mut self) -> BTreeMap<SocketAddr, u8> {
        let keys: Vec<_> = self.fixture.flows().into_keys().collect();
        self.fixture.datapath().remove_flows(&keys, u64::MAX).unwrap();
        for syn in flows() {
            self.fixture.run(&syn.bytes());
        }
        let hosts = self.hosts();
        assert_eq!(hosts.len(), FLOWS);
        hosts
    }

    /// Runs the first segment of a flow, and tells the host that it was put on.
    fn begin(&mut self, syn: &Frame) -> u8 {
        let before = self.live();
        self.fixture.run(&syn.bytes());
        let after = self.live();
        let mut grown = after.iter().filter(|(id, live)| **live > before[id]);
        let (id, _) = grown.next().expect("a backend for the flow");
        assert!(grown.next().is_none());
        host(self.backends[id].address)
    }

    /// Live flows of each backend, by id.
    fn live(&mut self) -> BTreeMap<u32, u64> {
        let ids: Vec<u32> = self.backends.keys().copied().collect();
        let counts = self.fixture.datapath().live_counts(&ids).unwrap();
        ids.into_iter().zip(counts.iter().map(LiveCount::flows)).collect()
    }

    /// By client, the host that each flow is on.
    fn hosts(&mut self) -> BTreeMap<SocketAddr, u8> {
        let table = self.fixture.flows();
        let host = |syn: Frame| {
            let flow = table.get(&syn.key())?;
            Some((syn.source, host(self.backends[&flow.backend].address)))
        };
        flows().filter_map(host).collect()
    }
}

/// Runs something on a certain CPU.
fn on_cpu<T>(cpu: usize, work: impl FnOnce() -> T) -> T {
    let this = Pid::from_raw(0);
    let before = sched_getaffinity(this).unwrap();
    let mut wanted = CpuSet::new();
    wanted.set(cpu).unwrap();
    sched_setaffinity(this, &wanted).unwrap();
    let value = work();
    sched_setaffinity(this, &before).unwrap();
    value
}

/// The first segments of all flows: twenty of each of five hundred clients.
fn flows() -> impl Iterator<Item = Frame> {
    const OF_A_CLIENT: usize = 20;
    (0..FLOWS).map(|number| {
        let (client, port) = (number / OF_A_CLIENT, number % OF_A_CLIENT);
        let (third, fourth) = (client / 250, client % 250 + 1);
        // The ports of a client are far apart, as those of a busy one are.
        let port = 1024 + port * 3001 + client;
        tcp(&format!("198.51.{third}.{fourth}:{port}"), WEB.vip, SYN)
    })
}

fn host(address: Address) -> u8 {
    match IpAddr::from(address) {
        IpAddr::V4(address) => address.octets()[3],
        IpAddr::V6(address) => panic!("{address} is no backend"),
    }
}

/// Hosts with equal weights.
fn equal(hosts: impl IntoIterator<Item = u8>) -> Vec<(u8, u32)> {
    hosts.into_iter().map(|host| (host, 100)).collect()
}

/// Flows that have moved from a host that stays to another one that was there before: nothing forced them to.
fn moved_without_need(before: &BTreeMap<SocketAddr, u8>, after: &BTreeMap<SocketAddr, u8>) -> usize {
    let used = |flows: &BTreeMap<SocketAddr, u8>| flows.values().copied().collect::<BTreeSet<u8>>();
    let (old, new) = (used(before), used(after));
    let pairs = before.iter().map(|(client, from)| (*from, after[client]));
    pairs
        .filter(|(from, to)| from != to && new.contains(from) && old.contains(to))
        .count()
}

#[test]
fn consistent_hash_moves_hardly_a_flow_without_need_when_a_backend_leaves_or_joins() {
    for hosts in [3, 10, 50] {
        let mut balancer = Balancer::new("consistent-hash", &equal(1..=hosts));
        let all = balancer.spread();
        balancer.set_backends(&equal((1..=hosts).filter(|host| *host != 2)));
        let without = balancer.spread();
        assert!(!without.values().any(|host| *host == 2));
        balancer.set_backends(&equal(1..=hosts));
        // Back to where it was, and so as if the backend had joined.
        assert_eq!(balancer.spread(), all, "{hosts} hosts");
        for (change, moved) in [
            ("leaves", moved_without_need(&all, &without)),
            ("joins", moved_without_need(&without, &all)),
        ] {
            assert!(
                moved <= FLOWS / 100,
                "of {hosts} hosts one {change}: {moved} of {FLOWS} flows moved"
            );
        }
    }
}

#[test]
fn consistent_hash_gives_each_backend_its_share_of_the_flows() {
    let weights = [(1, 100), (2, 200), (3, 300)];
    let spread = Balancer::new("consistent-hash", &weights).spread();
    for (host, weight) in weights {
        let flows = spread.values().filter(|backend| **backend == host).count();
        let expected = FLOWS * weight as usize / 600;
        // Five standard deviations of a fair draw are 250 at most.
        assert!(
            flows.abs_diff(expected) <= 250,
            "host {host}: {flows}, not {expected}"
        );
    }
}

#[test]
fn ip_hash_splits_no_client_and_shares_the_clients() {
    let spread = Balancer::new("ip-hash", &equal(1..=3)).spread();
    let mut by_client = BTreeMap::<IpAddr, BTreeSet<u8>>::new();
    for (client, host) in &spread {
        by_client.entry(client.ip()).or_default().insert(*host);
    }
    assert_eq!(by_client.len(), 500);
    let split: Vec<_> = by_client.iter().filter(|(_, hosts)| hosts.len() > 1).collect();
    assert!(split.is_empty(), "{split:?}");
    for host in 1..=3 {
        let clients = by_client.values().filter(|hosts| hosts.contains(&host)).count();
        // Five standard deviations of a fair draw are 53.
        assert!(
            clients.abs_diff(167) <= 53,
            "host {host} has {clients} clients of 500"
        );
    }
}

#[test]
fn ip_hash_moves_hardly_a_client_without_need_when_a_backend_leaves() {
    let mut balancer = Balancer::new("ip-hash", &equal(1..=10));
    let all = balancer.spread();
    balancer.set_backends(&equal(1..=9));
    let moved = moved_without_need(&all, &balancer.spread());
    // Five hundred clients are few: five of them, with all their flows.
    assert!(moved <= FLOWS / 100, "{moved} of {FLOWS} flows moved");
}

#[test]
fn round_robin_gives_each_backend_its_share_of_any_round_on_each_cpu() {
    for weights in [
        vec![(1, 100), (2, 100), (3, 100)],
        vec![(1, 100), (2, 200), (3, 500)],
    ] {
        let mut balancer = Balancer::new("round-robin", &weights);
        let cpus = machine::cpus();
        let mut turns = vec![Vec::new(); cpus];
        // Without a pattern, as packets come.
        let mut state = 1_u32;
        let on_cpus: Vec<usize> = flows()
            .map(|syn| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let cpu = (state >> 16) as usize % cpus;
                on_cpu(cpu, || balancer.fixture.run(&syn.bytes()));
                cpu
            })
            .collect();
        let hosts = balancer.hosts();
        for (cpu, syn) in on_cpus.into_iter().zip(flows()) {
            turns[cpu].push(hosts[&syn.source]);
        }
        let round: u32 = weights.iter().map(|(_, weight)| weight / 100).sum();
        for (cpu, turns) in turns.iter().enumerate() {
            assert!(turns.len() > FLOWS / cpus / 2, "CPU {cpu}: {}", turns.len());
            for (start, window) in turns.windows(round as usize).enumerate() {
                for (host, weight) in &weights {
                    let got = window.iter().filter(|turn| *turn == host).count() as u32;
                    assert!(
                        got.abs_diff(weight / 100) <= 1,
                        "CPU {cpu}, from turn {start}: host {host} of weight {weight} in {window:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn least_connections_keeps_held_connections_even_whatever_the_cpu() {
    let mut balancer = Balancer::new("least-connections", &equal(1..=3));
    let mut live = BTreeMap::from([(1, 0_usize), (2, 0), (3, 0)]);
    for (number, syn) in flows().enumerate() {
        let host = on_cpu(number % machine::cpus(), || balancer.begin(&syn));
        *live.entry(host).or_default() += 1;
        let (most, least) = (live.values().max().unwrap(), live.values().min().unwrap());
        assert!(most - least <= 1, "after {number} flows: {live:?}");
    }
}

#[test]
fn least_connections_spares_a_backend_whose_connections_stay_open() {
    let mut balancer = Balancer::new("least-connections", &equal(1..=3));
    let mut live = BTreeMap::from([(1, 0_usize), (2, 0), (3, 0)]);
    let mut got = live.clone();
    for (number, syn) in flows().enumerate() {
        let host = balancer.begin(&syn);
        *got.entry(host).or_default() += 1;
        *live.entry(host).or_default() += 1;
        let (most, least) = (live.values().max().unwrap(), live.values().min().unwrap());
        assert!(most - least <= 2, "after {number} flows: {live:?}");
        // Those of the first stay; the others' are over at once.
        if host != 1 {
            let rst = tcp(&syn.source.to_string(), WEB.vip, RST);
            balancer.fixture.run(&rst.bytes());
            *live.entry(host).or_default() -= 1;
        }
    }
    // In turns it would have got a third.
    assert!(got[&1] <= 2, "{got:?}");
    assert!(got[&2].abs_diff(got[&3]) <= FLOWS / 20, "{got:?}");
}

#[test]
fn least_connections_counts_connections_by_weight() {
    let weights = [(1, 100), (2, 200), (3, 300)];
    let mut balancer = Balancer::new("least-connections", &weights);
    let spread = balancer.spread();
    for (host, weight) in weights {
        let flows = spread.values().filter(|backend| **backend == host).count();
        let expected = FLOWS * weight as usize / 600;
        assert!(
            flows.abs_diff(expected) <= 2,
            "host {host}: {flows}, not {expected}"
        );
    }
}
