//! Models to test with: short to write down, or arbitrary.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    time::{Duration, SystemTime},
};

use ipnet::IpNet;
use lb_common::abi::Tags;
use proptest::prelude::*;

use super::{Administrative, Health, Model, NextHop};
use crate::{
    config::{
        Backend, Config, FlowTable, Forward, HealthCheck, IPIP_SOURCE, Limits, PortRange, Probe, Protocol,
        Service, Strategy as ByStrategy, WhenAllDown, XdpMode,
    },
    datapath::Sizes,
};

/// A model of these services in which nothing is known of any backend.
pub(crate) fn model(services: Vec<Service>) -> Model {
    Model {
        config: Config {
            interfaces: vec!["eth0".to_owned()],
            xdp_mode: XdpMode::Auto,
            flow_table: FlowTable {
                size: None,
                tcp_idle_timeout: Duration::from_secs(3600),
                udp_idle_timeout: Duration::from_secs(60),
            },
            limits: Limits::default(),
            seed_file: PathBuf::from("/etc/xlb/seed"),
            socket: None,
            ipip_source: IPIP_SOURCE,
            services,
        },
        sizes: Sizes::default(),
        seed: [1, 2],
        source_ports: (1024, 31_744),
        health: BTreeMap::new(),
        administrative: BTreeMap::new(),
        ramps: BTreeMap::new(),
        next_hops: BTreeMap::new(),
        live_flows: BTreeMap::new(),
        left_services: BTreeSet::new(),
        ages_are_renewed: false,
    }
}

/// A TCP service on 203.0.113.`vip`.
pub(crate) fn service(name: &str, vip: u8, ports: &[u16], backends: Vec<Backend>) -> Service {
    Service {
        name: name.to_owned(),
        vip: IpAddr::V4(Ipv4Addr::new(203, 0, 113, vip)),
        ports: ports
            .iter()
            .map(|port| PortRange {
                first: *port,
                last: *port,
            })
            .collect(),
        protocol: Protocol::Tcp,
        strategy: ByStrategy::ConsistentHash,
        forward: Forward::Nat,
        drain_timeout: Duration::from_secs(60),
        assign_vip: false,
        allow: Vec::new(),
        deny: Vec::new(),
        new_flow_cap: None,
        when_all_down: WhenAllDown::Reject,
        slow_start: Duration::ZERO,
        min_healthy: 1,
        reset_on_removal: false,
        health: HealthCheck {
            probe: Probe::Tcp { port: None },
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(1),
            rise: 2,
            fall: 3,
        },
        backends,
    }
}

/// A backend of weight 100 on 10.0.0.`host`; without a port if that is 0.
pub(crate) fn backend(name: &str, host: u8, port: u16) -> Backend {
    Backend {
        name: name.to_owned(),
        address: IpAddr::V4(Ipv4Addr::new(10, 0, 0, host)),
        port: (port != 0).then_some(port),
        weight: 100,
        max_connections: None,
        backup: false,
    }
}

/// The way to a neighbour on interface 3 from 10.0.0.1.
pub(crate) fn next_hop(host: u8) -> NextHop {
    NextHop {
        ifindex: 3,
        source: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)),
        source_mac: [2, 0, 0, 0, 0, 1],
        next_hop_mac: Some([2, 0, 0, 0, 0, host]),
        tags: Tags::default(),
        mtu: 1500,
    }
}

impl Model {
    /// Sets the health of a backend.
    pub(crate) fn set_health(&mut self, service: &str, backend: &str, health: Health) {
        self.health
            .insert((service.to_owned(), backend.to_owned()), health);
    }

    /// Sets the administrative state of a backend.
    pub(crate) fn set_administrative(
        &mut self,
        service: &str,
        backend: &str,
        administrative: Administrative,
    ) {
        self.administrative
            .insert((service.to_owned(), backend.to_owned()), administrative);
    }

    /// Makes every backend `up` and resolves the way to it.
    pub(crate) fn all_up(mut self) -> Self {
        for service in self.config.services.clone() {
            for backend in service.backends {
                self.set_health(&service.name, &backend.name, Health::Up);
                if let IpAddr::V4(address) = backend.address {
                    self.next_hops
                        .insert(backend.address, next_hop(address.octets()[3]));
                }
            }
        }
        self
    }
}

/// What services differ in, other than in their ports and backends.
#[derive(Clone, Debug)]
struct Kind {
    strategy: ByStrategy,
    allow: Vec<IpNet>,
    deny: Vec<IpNet>,
    tries_all: bool,
    reset_on_removal: bool,
}

impl Kind {
    fn shape(self, service: &mut Service) {
        service.strategy = self.strategy;
        service.allow = self.allow;
        service.deny = self.deny;
        service.reset_on_removal = self.reset_on_removal;
        if self.tries_all {
            service.when_all_down = WhenAllDown::TryAll;
        }
    }
}

fn any_kind() -> impl Strategy<Value = Kind> {
    let strategies = vec![
        ByStrategy::ConsistentHash,
        ByStrategy::IpHash,
        ByStrategy::RoundRobin,
        ByStrategy::LeastConnections,
    ];
    let prefixes = |prefixes: [&str; 3]| {
        let prefixes = prefixes.map(|prefix| prefix.parse::<IpNet>().expect("a prefix"));
        prop::sample::subsequence(prefixes.to_vec(), 0..=2)
    };
    let allow = prefixes(["10.0.0.0/8", "0.0.0.0/0", "2001:db8::/32"]);
    let deny = prefixes(["10.1.0.0/16", "192.0.2.1/32", "::/0"]);
    let parts = (
        prop::sample::select(strategies),
        allow,
        deny,
        any::<(bool, bool)>(),
    );
    parts.prop_map(|(strategy, allow, deny, (tries_all, reset_on_removal))| Kind {
        strategy,
        allow,
        deny,
        tries_all,
        reset_on_removal,
    })
}

/// Models over few names, ports and addresses, so that any two have much in common and much that differs.
pub(crate) fn any_model() -> impl Strategy<Value = Model> {
    let backend_state = (
        prop::sample::select(vec![
            Health::Unknown,
            Health::Up,
            Health::Up,
            Health::Up,
            Health::Down,
        ]),
        prop::sample::select(vec![
            Administrative::Enabled,
            Administrative::Enabled,
            Administrative::Draining {
                since: SystemTime::UNIX_EPOCH,
            },
            Administrative::Disabled,
        ]),
        0_u32..3,
        any::<bool>(),
    );
    let backends = prop::collection::btree_map((1_u8..5, 0_u16..2), backend_state, 0..4);
    let services = prop::collection::btree_map(0_usize..4, backends, 0..4);
    // To whom each of six ports goes; so services split, merge and swap ports.
    let ports = prop::collection::vec(0_usize..4, 6);
    let live_flows = prop::collection::btree_map(1_u32..12, 0_u64..2, 0..12);
    // By the number of the service.
    let kinds = prop::collection::vec(any_kind(), 4);
    let parts = (services, ports, kinds, live_flows, any::<bool>());
    parts.prop_map(|(services, ports, kinds, live_flows, other_seed)| {
        let mut model = model(Vec::new());
        for (number, backends) in services {
            let name = format!("service-{number}");
            let own: Vec<u16> = (80_u16..)
                .zip(&ports)
                .filter(|(_, owner)| **owner == number)
                .map(|(port, _)| port)
                .collect();
            if own.is_empty() {
                continue;
            }
            let mut list = Vec::new();
            for ((host, port), (health, administrative, weight, resolved)) in backends {
                let backend_name = format!("backend-{host}-{port}");
                model.set_health(&name, &backend_name, health);
                model.set_administrative(&name, &backend_name, administrative);
                let mut backend = Backend {
                    weight,
                    backup: host == 4,
                    ..backend(&backend_name, host, port * 8080)
                };
                if number == 2 {
                    backend.address = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, u16::from(host)).into();
                }
                if host == 3 {
                    model.ramps.insert((name.clone(), backend_name), 20);
                }
                if resolved {
                    model.next_hops.insert(backend.address, next_hop(host));
                }
                list.push(backend);
            }
            // The address of one of the services is also that of a backend.
            let mut service = service(&name, 10, &own, list);
            kinds[number].clone().shape(&mut service);
            match number {
                1 => service.vip = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 11)),
                2 => service.vip = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 10).into(),
                3 => service.vip = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)),
                _ => {}
            }
            // Of VIPs that others have no ports of.
            if number > 0 && own.len() > 2 {
                service.ports = vec![PortRange::ANY];
            }
            model.config.services.push(service);
        }
        model.live_flows = live_flows;
        model.seed = if other_seed { [3, 4] } else { [1, 2] };
        model
    })
}
