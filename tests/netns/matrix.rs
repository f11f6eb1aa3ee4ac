//! Every family with every protocol, forward and strategy: real data over real sockets, and nothing left behind.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    net::{IpAddr, SocketAddr},
    sync::LazyLock,
    time::Duration,
};

use tests::{
    daemon::Daemon,
    decap::Decap,
    echo::{self, Answer, Conversation, Echo},
    machine::{self, eventually},
    maps,
    nginx::big_file,
    services::Service,
};
use xlb::{
    config,
    lab::{Family, Namespace, Topology},
};

/// Client addresses, so that `ip-hash` has something to tell apart.
const CLIENTS: usize = 16;
/// TCP connections of each client address, each with [`MEBIBYTE`] in both directions.
const CONNECTIONS: usize = 2;
const MEBIBYTE: usize = 1 << 20;
/// UDP sockets of each client address, and how many datagrams each sends: 1,200 together.
const SOCKETS: usize = 3;
const DATAGRAMS: usize = 25;
const PORT: u16 = 7007;
/// Where the servers listen if the forward changes the port.
const BACKEND_PORT: u16 = 8007;
const NAMES: [&str; 3] = ["a", "b", "c"];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Protocol {
    Tcp,
    Udp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Strategy {
    ConsistentHash,
    IpHash,
    RoundRobin,
    LeastConnections,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Forward {
    Nat,
    FullNat,
    Dsr,
    IpIp,
    Gue,
    Local,
}

impl Protocol {
    const ALL: [Self; 2] = [Self::Tcp, Self::Udp];

    fn word(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

impl Strategy {
    const ALL: [Self; 4] = [
        Self::ConsistentHash,
        Self::IpHash,
        Self::RoundRobin,
        Self::LeastConnections,
    ];

    fn word(self) -> &'static str {
        match self {
            Self::ConsistentHash => "consistent-hash",
            Self::IpHash => "ip-hash",
            Self::RoundRobin => "round-robin",
            Self::LeastConnections => "least-connections",
        }
    }
}

impl Forward {
    const ALL: [Self; 6] = [
        Self::Nat,
        Self::FullNat,
        Self::Dsr,
        Self::IpIp,
        Self::Gue,
        Self::Local,
    ];

    fn word(self) -> &'static str {
        match self {
            Self::Nat => "nat",
            Self::FullNat => "full-nat",
            Self::Dsr => "dsr",
            Self::IpIp => "ipip",
            Self::Gue => "gue",
            Self::Local => "local",
        }
    }

    pub fn encapsulates(self) -> bool {
        matches!(self, Self::IpIp | Self::Gue)
    }

    /// Packets get to the backends with the VIP as their destination.
    pub fn keeps_destination(self) -> bool {
        self == Self::Dsr || self.encapsulates()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Cell {
    group: Group,
    protocol: Protocol,
    strategy: Strategy,
}

/// Cells that share a lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    pub forward: Forward,
    pub vip: Family,
    pub backends: Family,
}

/// What is to be expected of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expectation {
    /// It balances.
    Runs,
    /// It cannot exist: `xlb check` refuses it with these words.
    Refused(&'static str),
}

impl Cell {
    /// The one place that says which cells there are, and why the others are not.
    fn expectation(self) -> Expectation {
        let Group {
            forward,
            vip,
            backends,
        } = self.group;
        match (vip, backends) {
            // What a client sends to an address of one family cannot be rewritten to the other.
            (Family::V4, Family::V6) | (Family::V6, Family::V4) if !forward.encapsulates() => {
                Expectation::Refused("address family")
            }
            _ => Expectation::Runs,
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Group {
            forward,
            vip,
            backends,
        } = self.group;
        write!(
            f,
            "{}-{vip:?}-over-{backends:?}-{}-{}",
            forward.word(),
            self.protocol.word(),
            self.strategy.word()
        )
    }
}

impl Group {
    fn all() -> impl Iterator<Item = Self> {
        let families = || Family::ALL.into_iter().flat_map(|v| Family::ALL.map(|b| (v, b)));
        let with = move |forward| {
            families().map(move |(vip, backends)| Self {
                forward,
                vip,
                backends,
            })
        };
        Forward::ALL.into_iter().flat_map(with)
    }

    fn cells(self) -> impl Iterator<Item = Cell> {
        let with = move |protocol| {
            Strategy::ALL.map(|strategy| Cell {
                group: self,
                protocol,
                strategy,
            })
        };
        Protocol::ALL.into_iter().flat_map(with)
    }

    pub fn server(self) -> SocketAddr {
        SocketAddr::new(Topology::vip(self.vip), PORT)
    }
}

/// A test for each group, and the list of them.
macro_rules! groups {
    ($($name:ident: $forward:ident, $vip:ident, $backends:ident;)*) => {
        const TESTED: &[Group] = &[$(Group {
            forward: Forward::$forward,
            vip: Family::$vip,
            backends: Family::$backends,
        }),*];

        $(#[test]
        fn $name() {
            balance(Group {
                forward: Forward::$forward,
                vip: Family::$vip,
                backends: Family::$backends,
            });
        })*
    };
}

groups! {
    nat_balances_ipv4: Nat, V4, V4;
    nat_balances_ipv6: Nat, V6, V6;
    full_nat_balances_ipv4: FullNat, V4, V4;
    full_nat_balances_ipv6: FullNat, V6, V6;
    dsr_balances_ipv4: Dsr, V4, V4;
    dsr_balances_ipv6: Dsr, V6, V6;
    ipip_balances_ipv4_in_ipv4: IpIp, V4, V4;
    ipip_balances_ipv4_in_ipv6: IpIp, V4, V6;
    ipip_balances_ipv6_in_ipv4: IpIp, V6, V4;
    ipip_balances_ipv6_in_ipv6: IpIp, V6, V6;
    gue_balances_ipv4_in_ipv4: Gue, V4, V4;
    gue_balances_ipv4_in_ipv6: Gue, V4, V6;
    gue_balances_ipv6_in_ipv4: Gue, V6, V4;
    gue_balances_ipv6_in_ipv6: Gue, V6, V6;
    local_balances_ipv4: Local, V4, V4;
    local_balances_ipv6: Local, V6, V6;
}

#[test]
fn every_cell_has_a_test_or_is_refused() {
    let expected: BTreeSet<Group> = Group::all()
        .filter(|group| group.cells().any(|cell| cell.expectation() == Expectation::Runs))
        .collect();
    assert_eq!(TESTED.iter().copied().collect::<BTreeSet<_>>(), expected);
    assert_eq!(TESTED.len(), expected.len());

    let topology = Topology::routed(0).unwrap();
    let daemon = Daemon::new(&topology.balancer);
    let (mut running, mut refused) = (Vec::new(), Vec::new());
    for (number, cell) in Group::all().flat_map(Group::cells).enumerate() {
        daemon.configure(&["eth0"], &[service(cell)]);
        let text = fs::read_to_string(daemon.config()).unwrap();
        let parsed = config::parse(&text, "xlb.toml").map_err(|diagnostics| diagnostics.render(false));
        // A port of its own, for one file of many.
        let service = service(cell).with("port", PORT + number as u16);
        match (cell.expectation(), parsed) {
            (Expectation::Runs, Ok(_)) => running.push(service),
            (Expectation::Refused(why), Err(error)) if error.contains(why) => refused.push(service),
            (expectation, parsed) => panic!("{cell}: {expectation:?}, but {parsed:?}"),
        }
    }
    assert_eq!((running.len(), refused.len()), (128, 64));
    for (services, code) in [(running, 0), (refused, 78)] {
        daemon.configure(&["eth0"], &services);
        let outcome = daemon.xlb(&["check", "-c", daemon.config().to_str().unwrap()]);
        assert_eq!(outcome.code, code, "{}", outcome.stderr);
    }
}

/// The service of a cell, over the three backends of the lab.
fn service(cell: Cell) -> Service {
    let service = match cell.protocol {
        Protocol::Tcp => Service::tcp(&cell.to_string()),
        Protocol::Udp => Service::udp(&cell.to_string()),
    };
    of_group(service, cell.group, &NAMES).text("strategy", cell.strategy.word())
}

/// Gives a service what is the group's, over the lab's backends by these names.
pub fn of_group(service: Service, group: Group, names: &[&str]) -> Service {
    let mut service = service
        .text("vip", &Topology::vip(group.vip).to_string())
        .with("port", PORT)
        .text("forward", group.forward.word())
        .health("type = \"none\"");
    for (index, name) in names.iter().enumerate() {
        let listen = listen_address(group, index);
        let address = if group.forward.keeps_destination() {
            backend_address(index, group.backends).to_string()
        } else {
            listen.to_string()
        };
        service = service.backend(name, &address);
    }
    service
}

/// As [`Topology::backend_address_of`], without one.
fn backend_address(index: usize, family: Family) -> IpAddr {
    let number = index + 1;
    match family {
        Family::V4 => format!("10.2.{number}.2"),
        Family::V6 => format!("2001:db8:2:{number}::2"),
    }
    .parse()
    .unwrap()
}

/// Where a backend's server listens.
pub fn listen_address(group: Group, index: usize) -> SocketAddr {
    match group.forward {
        Forward::Nat | Forward::FullNat => {
            SocketAddr::new(backend_address(index, group.backends), BACKEND_PORT)
        }
        Forward::Dsr | Forward::IpIp | Forward::Gue => group.server(),
        // Processes on the balancer itself.
        Forward::Local => SocketAddr::new(Topology::vip(group.backends), BACKEND_PORT + index as u16),
    }
}

/// Runs all cells of a group.
fn balance(group: Group) {
    machine::require_root_nginx_and_curl();
    let topology = Topology::with_client_addresses(NAMES.len(), CLIENTS).unwrap();
    let interfaces = topology.balancer_interfaces();
    let interfaces: Vec<&str> = interfaces.iter().map(String::as_str).collect();
    let _decaps = prepare(&topology, group);
    let hosts = (0..NAMES.len()).map(|index| match group.forward {
        Forward::Local => &topology.balancer,
        _ => &topology.backends[index],
    });
    let _servers: Vec<Echo> = (hosts.zip(NAMES).enumerate())
        .map(|(index, (host, name))| Echo::start(host, name, listen_address(group, index)))
        .collect();
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&interfaces, &[]);
    daemon.start();

    let cells = group.cells();
    for cell in cells.filter(|cell| cell.expectation() == Expectation::Runs) {
        daemon.configure(&interfaces, &[service(cell)]);
        daemon.done(&["reload"]);
        daemon.wait_for("the next hops are known", |status| {
            let backends = &status.services[0].backends;
            backends.iter().all(|backend| backend.next_hop_problem.is_none())
        });
        let answers = match cell.protocol {
            Protocol::Tcp => exchange_over_tcp(&topology, cell),
            Protocol::Udp => exchange_over_udp(&topology, cell),
        };
        check_answers(cell, &answers);
        check_counters(cell, &daemon, answers.len());

        daemon.configure(&interfaces, &[]);
        daemon.done(&["reload"]);
        eventually("the table is empty", Duration::from_secs(10), || {
            maps::units_in_use(&daemon.pins()) == 0
        });
    }
    let contents = maps::contents(&daemon.pins());
    assert!(contents.services.is_empty() && contents.backends.is_empty());
}

/// What the forward wants of the hosts.
pub fn prepare(topology: &Topology, group: Group) -> Vec<Decap> {
    if group.forward.keeps_destination() {
        topology.give_vips_to_backends().unwrap();
    }
    if group.forward == Forward::Local {
        let vips = Family::ALL.map(|family| Topology::vip(family).into());
        topology.balancer.add_addresses("lo", &vips).unwrap();
    }
    if !group.forward.encapsulates() {
        return Vec::new();
    }
    // Room for the longest headers around what fits into a frame of the client's.
    topology.set_backend_mtu(1600).unwrap();
    let vip = Topology::vip(group.vip).to_string();
    let start = |backend: &Namespace| {
        // Its program takes that one's place.
        backend.pass_no_longer();
        Decap::start(backend, &["--interface", "eth0", "--vip", &vip])
    };
    topology.backends.iter().map(start).collect()
}

/// What is sent.
static DATA: LazyLock<Vec<u8>> = LazyLock::new(big_file);

/// Who has answered each flow, by the client's address and port.
type Answers = BTreeMap<SocketAddr, Answer>;

fn exchange_over_tcp(topology: &Topology, cell: Cell) -> Answers {
    let data = &DATA[..machine::count(MEBIBYTE)];
    let server = cell.group.server();
    let mut answers = Answers::new();
    let all = || {
        // At once, so that there is a number of live flows for `least-connections` to compare.
        let open = |source| {
            let connection = Conversation::open(source, server);
            let connection = connection.unwrap_or_else(|error| panic!("{cell}, from {source}: {error}"));
            (source, connection)
        };
        let connections: Vec<_> = sources(topology, cell, CONNECTIONS).map(open).collect();
        for (source, connection) in connections {
            let answer = connection.exchange(data);
            let answer = answer.unwrap_or_else(|error| panic!("{cell}, from {source}: {error}"));
            answers.insert(source, answer);
        }
    };
    topology.client.run(all).unwrap();
    answers
}

fn exchange_over_udp(topology: &Topology, cell: Cell) -> Answers {
    let server = cell.group.server();
    let mut answers = Answers::new();
    let all = || {
        for (number, source) in sources(topology, cell, SOCKETS).enumerate() {
            let socket = echo::udp_socket(source).unwrap();
            for datagram in 0..machine::count(DATAGRAMS) {
                // All lengths up to what an Ethernet frame holds beside the longest headers.
                let length = (number * DATAGRAMS + datagram) * 7 % 1360;
                let payload = &DATA[number..number + length];
                let answer = echo::ask(&socket, server, payload);
                let answer = answer.unwrap_or_else(|error| {
                    panic!("{cell}, datagram {datagram} of {length} bytes from {source}: {error}")
                });
                let first = answers.entry(source).or_insert_with(|| answer.clone());
                assert_eq!(*first, answer, "{cell}: a flow has moved");
            }
        }
    };
    topology.client.run(all).unwrap();
    answers
}

/// So many ports of each of the client's addresses; others for each cell, so that no connection meets what is left
/// of the one before at a server.
fn sources(topology: &Topology, cell: Cell, each: usize) -> impl Iterator<Item = SocketAddr> + use<> {
    let number = cell.group.cells().position(|other| other == cell).unwrap();
    let first = 20_000 + 100 * number as u16;
    let addresses = topology.client_addresses_of(cell.group.vip);
    addresses
        .flat_map(move |address| (0..each).map(move |port| SocketAddr::new(address, first + port as u16)))
}

fn check_answers(cell: Cell, answers: &Answers) {
    let mut by_client = BTreeMap::<IpAddr, BTreeSet<&str>>::new();
    for (source, answer) in answers {
        by_client.entry(source.ip()).or_default().insert(&answer.name);
        let is_of_the_client = answer.peer == source.ip();
        // Each backend is reached by another interface, and so from another address of the balancer.
        let expected = cell.group.forward != Forward::FullNat;
        assert_eq!(
            is_of_the_client, expected,
            "{cell}: {source} is seen as {}",
            answer.peer
        );
    }
    let used: BTreeSet<&str> = by_client.values().flatten().copied().collect();
    assert_eq!(used, BTreeSet::from(NAMES), "{cell}: {answers:?}");
    if cell.strategy == Strategy::IpHash {
        assert!(
            by_client.values().all(|names| names.len() == 1),
            "{cell}: a client is split: {answers:?}"
        );
    }
    if matches!(cell.strategy, Strategy::RoundRobin | Strategy::LeastConnections) {
        let with = |name: &str| answers.values().filter(|answer| answer.name == name).count();
        let counts = NAMES.map(with);
        // One after the other, and on as many CPUs as there are.
        let spread = counts.iter().max().unwrap() - counts.iter().min().unwrap();
        assert!(spread <= machine::cpus(), "{cell}: {counts:?}");
    }
}

/// The program has done all of it: no packet was left to the host's stack, and none dropped.
fn check_counters(cell: Cell, daemon: &Daemon<'_>, flows: usize) {
    let status = daemon.status();
    let service = &status.services[0];
    let expected = match cell.group.forward {
        Forward::Nat | Forward::FullNat => vec!["forwarded", "returned"],
        Forward::Dsr | Forward::IpIp | Forward::Gue => vec!["forwarded"],
        Forward::Local => vec!["delivered", "returned"],
    };
    assert_eq!(service.reasons.keys().collect::<Vec<_>>(), expected, "{cell}");
    let counted: u64 = service.backends.iter().map(|backend| backend.flows_total).sum();
    assert_eq!(
        counted, flows as u64,
        "{cell}: each connection and each socket is one flow"
    );
    assert_eq!(status.packets.dropped, 0, "{cell}: {:?}", status.reasons);
}
