//! An instance of the data path with known services, whose every counter is watched.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use aya::{
    maps::{Array, HashMap, PerCpuArray, PerCpuValues},
    programs::{TestRun, TestRunOptions, Xdp},
    util::nr_cpus,
};
use lb_common::{
    abi::{
        Address, Backend, BackendCounters, BackendFlags, Bucket, ClientLink, Count, FlowKey, Forward,
        FragmentKey, FragmentPorts, Kind, Link, LiveCount, MAX_CLIENT_LINKS, Meta, PerCpu, REASON_ENTRIES,
        ROLE_BACKEND, ROLE_VIP, Reason, Service, ServiceKey, Settings, SettingsFlags, SourceKey, SourceRate,
        Strategy, TCP, Totals, UDP, UNITS, buckets,
    },
    logic::{
        ageing,
        flow_table::{PORTS, key_at, long_key, meta_at, short_key},
    },
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use xlb::{
    datapath::{
        Contents, Datapath, Flow, Operation, Pins, Pool, Sizes,
        kernel::{KernelDatapath, PROGRAM, Raw, monotonic_now},
    },
    reconcile::plan,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::frame::{BALANCER_MAC, Frame};

pub(crate) const DROP: u32 = 1;
pub(crate) const PASS: u32 = 2;
pub(crate) const TX: u32 = 3;
pub(crate) const REDIRECT: u32 = 4;

/// The interface that test packets come in by: loopback, which a test run takes unless told otherwise.
pub(crate) const INGRESS: u32 = 1;
/// Another interface; a test run does not send, so it need not exist.
pub(crate) const OTHER_INTERFACE: u32 = 7;

/// A service of the fixture, with two backends each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TestService {
    pub id: u32,
    pub vip: SocketAddr,
    pub protocol: u8,
    pub forward: Forward,
    pub backends: [TestBackend; 2],
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct TestBackend {
    pub id: u32,
    pub address: SocketAddr,
    pub ifindex: u32,
}

const VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 10));
const VIP6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x10));
/// This host's addresses towards the backends: the sources that `full-nat` and `gue` write.
pub(crate) const SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
pub(crate) const SOURCE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1));

const fn v4(host: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 0, 0, host))
}

const fn v6(host: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, host))
}

const fn service(
    id: u32,
    vip: (IpAddr, u16),
    protocol: u8,
    forward: Forward,
    backends: [IpAddr; 2],
    backend_port: u16,
) -> TestService {
    TestService {
        id,
        vip: SocketAddr::new(vip.0, vip.1),
        protocol,
        forward,
        backends: [
            TestBackend {
                id: 2 * id - 1,
                address: SocketAddr::new(backends[0], backend_port),
                ifindex: INGRESS,
            },
            TestBackend {
                id: 2 * id,
                address: SocketAddr::new(backends[1], backend_port),
                ifindex: OTHER_INTERFACE,
            },
        ],
    }
}

const V4: [IpAddr; 2] = [v4(11), v4(12)];
const V6: [IpAddr; 2] = [v6(11), v6(12)];
/// A tunnel leads to either family.
const EITHER: [IpAddr; 2] = [v4(11), v6(12)];

/// `nat`, TCP.
pub(crate) const WEB: TestService = service(1, (VIP, 80), TCP, Forward::Nat, V4, 8080);
/// `full-nat`, TCP.
pub(crate) const SHOP: TestService = service(2, (VIP, 443), TCP, Forward::FullNat, V4, 8443);
/// `nat`, UDP.
pub(crate) const DNS: TestService = service(3, (VIP, 53), UDP, Forward::Nat, V4, 5300);
/// `full-nat`, UDP.
pub(crate) const RELAY: TestService = service(4, (VIP, 3478), UDP, Forward::FullNat, V4, 3479);
/// `nat`, TCP, on the same servers and ports as [`WEB`].
pub(crate) const MIRROR: TestService = service(5, (VIP, 8000), TCP, Forward::Nat, V4, 8080);
pub(crate) const WEB6: TestService = service(6, (VIP6, 80), TCP, Forward::Nat, V6, 8080);
pub(crate) const SHOP6: TestService = service(7, (VIP6, 443), TCP, Forward::FullNat, V6, 8443);
pub(crate) const DNS6: TestService = service(8, (VIP6, 53), UDP, Forward::Nat, V6, 5300);
pub(crate) const RELAY6: TestService = service(9, (VIP6, 3478), UDP, Forward::FullNat, V6, 3479);
/// `dsr`.
pub(crate) const DIRECT: TestService = service(10, (VIP, 81), TCP, Forward::Dsr, V4, 81);
pub(crate) const DIRECT_UDP: TestService = service(11, (VIP, 81), UDP, Forward::Dsr, V4, 81);
pub(crate) const DIRECT6: TestService = service(12, (VIP6, 81), TCP, Forward::Dsr, V6, 81);
/// `ipip`.
pub(crate) const TUNNEL: TestService = service(13, (VIP, 82), TCP, Forward::IpIp, EITHER, 82);
pub(crate) const TUNNEL_UDP: TestService = service(14, (VIP, 82), UDP, Forward::IpIp, EITHER, 82);
pub(crate) const TUNNEL6: TestService = service(15, (VIP6, 82), TCP, Forward::IpIp, EITHER, 82);
pub(crate) const TUNNEL6_UDP: TestService = service(16, (VIP6, 82), UDP, Forward::IpIp, EITHER, 82);
/// `gue`.
pub(crate) const GUE: TestService = service(17, (VIP, 83), TCP, Forward::Gue, EITHER, 83);
pub(crate) const GUE_UDP: TestService = service(18, (VIP, 83), UDP, Forward::Gue, EITHER, 83);
pub(crate) const GUE6: TestService = service(19, (VIP6, 83), TCP, Forward::Gue, EITHER, 83);
pub(crate) const GUE6_UDP: TestService = service(20, (VIP6, 83), UDP, Forward::Gue, EITHER, 83);
/// `local`.
pub(crate) const LOCAL: TestService = service(21, (VIP, 84), TCP, Forward::Local, V4, 8400);
pub(crate) const LOCAL6: TestService = service(22, (VIP6, 84), UDP, Forward::Local, V6, 8400);

/// Those that [`Fixture::new`] has.
pub(crate) const FIRST: [TestService; 5] = [WEB, SHOP, DNS, RELAY, MIRROR];
/// Those of every forward, family and protocol.
pub(crate) const EVERY: [TestService; 22] = [
    WEB,
    SHOP,
    DNS,
    RELAY,
    MIRROR,
    WEB6,
    SHOP6,
    DNS6,
    RELAY6,
    DIRECT,
    DIRECT_UDP,
    DIRECT6,
    TUNNEL,
    TUNNEL_UDP,
    TUNNEL6,
    TUNNEL6_UDP,
    GUE,
    GUE_UDP,
    GUE6,
    GUE6_UDP,
    LOCAL,
    LOCAL6,
];

/// Long enough that no flow of a test ends by itself.
const LONG: u64 = 3_600_000_000_000;

pub(crate) const SETTINGS: Settings = Settings {
    seed: [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210],
    tcp_idle: LONG,
    tcp_opening: LONG,
    tcp_closing: LONG,
    udp_idle: LONG,
    source_port_first: 1024,
    source_port_count: 31744,
    flags: SettingsFlags::LOCAL | SettingsFlags::ON_LOOPBACK,
    ipip_source_v4: Address::from_v4_word(u32::from_ne_bytes([172, 16, 0, 0])),
    ipip_source_v6: Address([0x100_0000_u32.to_be(), 0, 0, 0]),
    ipip_varying_v4: 0xffff_u32.to_be(),
    ipip_varying_v6: u32::MAX,
    tick_shifts: [ageing::tick_shift(LONG); 4],
    _pad: 0,
    table_seed: [0x0f1e_2d3c_4b5a_6978, 0x8796_a5b4_c3d2_e1f0],
};

impl TestBackend {
    /// From the balancer to this backend.
    pub(crate) fn link(&self) -> Link {
        Link::new([0x02, 0, 0, 0, 1, self.id as u8], BALANCER_MAC)
    }

    /// This host's address towards it.
    pub(crate) fn source(&self) -> IpAddr {
        if self.address.is_ipv4() { SOURCE } else { SOURCE6 }
    }

    /// The verdict on a packet that leaves to this backend.
    pub(crate) fn verdict(&self) -> u32 {
        if self.ifindex == INGRESS { TX } else { REDIRECT }
    }

    /// The backend as it is when it is up.
    pub(crate) fn entry(&self, service: u32) -> Backend {
        Backend {
            address: Address::from(self.address.ip()),
            source: Address::from(self.source()),
            ifindex: self.ifindex,
            link: self.link(),
            port: self.address.port().to_be(),
            flags: BackendFlags::NEXT_HOP_KNOWN
                | BackendFlags::ACCEPTS_NEW
                | BackendFlags::KEEPS_UDP
                | BackendFlags::UP,
            service_plus_one: service + 1,
            generation: 1,
            mtu: 1500,
            weight: 1,
            ..Backend::default()
        }
    }
}

/// The data path with some services; all slots of a service hold its first backend.
pub(crate) struct Fixture {
    /// `None` only while it is opened again.
    instance: Option<Instance>,
    pins: Pins,
    /// Whether another test may have the instance afterwards.
    is_lent: bool,
    /// Ids of services and backends whose counters are watched.
    watched: (BTreeSet<u32>, BTreeSet<u32>),
    /// What was counted last, as long as nothing can have changed it.
    counted: Option<Counted>,
}

/// A loaded program with its maps, and what the tests have put into them.
struct Instance {
    datapath: KernelDatapath,
    contents: Contents,
    /// Ids that were ever given to a backend.
    backends: BTreeSet<u32>,
}

/// Instances that tests have given back: to load the program takes longer than most tests.
/// They have no pins, so that nothing of them is left when the process ends.
static IDLE: Mutex<Vec<Instance>> = Mutex::new(Vec::new());

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = self.pins.remove_all();
        // What a test that failed has left is not known.
        if self.is_lent
            && !thread::panicking()
            && let Some(instance) = self.instance.take()
        {
            IDLE.lock().unwrap().push(instance);
        }
    }
}

impl Instance {
    fn open(pins: &Pins, sizes: Sizes) -> Self {
        Self {
            datapath: KernelDatapath::open(pins.clone(), sizes).unwrap(),
            contents: Contents::default(),
            backends: BTreeSet::new(),
        }
    }

    fn apply(&mut self, operation: &Operation) {
        self.datapath.apply(operation).unwrap();
        self.contents.record(operation);
        if let Operation::PutBackend(id, _) = operation {
            self.backends.insert(*id);
        }
    }

    /// Makes all maps as empty as they were at first.
    fn clear(&mut self) {
        let services: Vec<u32> = self.contents.pools.keys().copied().collect();
        for operation in plan(&self.contents, &Contents::default()) {
            self.apply(&operation);
        }
        for index in 0..buckets(self.datapath.sizes().flows) {
            self.empty("FLOWS", index, Bucket::default());
        }
        for index in 0..MAX_CLIENT_LINKS {
            self.empty("CLIENT_LINKS", index, ClientLink::default());
        }
        self.remove_all::<FragmentKey, FragmentPorts>("FRAGMENTS");
        self.remove_all::<SourceKey, SourceRate>("SOURCES");
        let backends = mem::take(&mut self.backends);
        let mut live: Array<_, Raw<LiveCount>> = self.map("LIVE");
        for id in &backends {
            live.set(*id, Raw(LiveCount::default()), 0).unwrap();
        }
        // Those of services and backends went with them.
        self.zero("PER_CPU", [0], PerCpu::default());
        self.zero("OPENINGS", [0], [0_u64; 2]);
        let cpus = nr_cpus().unwrap() as u32;
        for index in 0..cpus * REASON_ENTRIES {
            self.empty("COUNTERS", index, Count::default());
        }
        self.zero("ROUND_ROBIN", services, 0_u32);
    }

    fn map<'a, M>(&'a mut self, name: &str) -> M
    where
        M: TryFrom<&'a mut aya::maps::Map, Error = aya::maps::MapError>,
    {
        self.datapath
            .ebpf_mut()
            .map_mut(name)
            .unwrap()
            .try_into()
            .unwrap()
    }

    /// Writes an entry of an array that is not so: most are.
    fn empty<T>(&mut self, name: &str, index: u32, empty: T)
    where
        T: FromBytes + IntoBytes + Immutable + Copy + PartialEq + 'static,
    {
        let mut map: Array<_, Raw<T>> = self.map(name);
        if map.get(&index, 0).unwrap().0 != empty {
            map.set(index, Raw(empty), 0).unwrap();
        }
    }

    fn remove_all<K, V>(&mut self, name: &str)
    where
        K: FromBytes + IntoBytes + Immutable + Copy + 'static,
        V: FromBytes + IntoBytes + Immutable + Copy + 'static,
    {
        let mut map: HashMap<_, Raw<K>, Raw<V>> = self.map(name);
        let keys: Vec<_> = map.keys().map(Result::unwrap).collect();
        for key in keys {
            map.remove(&key).unwrap();
        }
    }

    fn zero<T>(&mut self, name: &str, indices: impl IntoIterator<Item = u32>, zero: T)
    where
        T: FromBytes + IntoBytes + Immutable + Copy + 'static,
    {
        let mut map: PerCpuArray<_, Raw<T>> = self.map(name);
        let cpus = nr_cpus().unwrap();
        for index in indices {
            let zeros = PerCpuValues::try_from(vec![Raw(zero); cpus]).unwrap();
            map.set(index, zeros, 0).unwrap();
        }
    }
}

/// The number of the second or so in which new flows are counted now.
pub(crate) fn openings_window() -> u64 {
    monotonic_now() >> 30
}

/// Pins that no other test has.
pub(crate) fn unique_pins() -> Pins {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    Pins::new(&format!("packet-{}-{number}", std::process::id()))
}

/// Runs on one CPU from now on: positions in a sequence are each CPU's own.
pub(crate) fn stay_on_this_cpu() {
    stay_on_cpu(nix::sched::sched_getcpu().unwrap());
}

/// The CPUs that this thread may run on.
pub(crate) fn allowed_cpus() -> Vec<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let is_allowed = |cpu: &usize| allowed.is_set(*cpu).unwrap();
    (0..CpuSet::count()).filter(is_allowed).collect()
}

/// Runs on this CPU from now on.
pub(crate) fn stay_on_cpu(cpu: usize) {
    let mut cpus = CpuSet::new();
    cpus.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(0), &cpus).unwrap();
}

impl Fixture {
    /// With the services of [`FIRST`].
    pub(crate) fn new() -> Self {
        Self::of(&FIRST)
    }

    /// With the services of [`EVERY`].
    pub(crate) fn every() -> Self {
        Self::of(&EVERY)
    }

    /// With these services alone.
    pub(crate) fn of(services: &[TestService]) -> Self {
        Self::lent().with(services)
    }

    /// With the services of [`FIRST`] and room for so many flows, pinned, and not used before.
    pub(crate) fn with_flow_table(size: u32) -> Self {
        Self::empty(size).with(&FIRST)
    }

    /// No service, no pins, and room for 65,536 flows; another test may have had the maps before.
    pub(crate) fn lent() -> Self {
        let pins = unique_pins();
        let idle = IDLE.lock().unwrap().pop();
        let instance = match idle {
            Some(mut instance) => {
                instance.clear();
                instance
            }
            None => {
                let instance = Instance::open(&pins, Sizes::of_flows(65_536));
                pins.remove_all().unwrap();
                instance
            }
        };
        Self::on(instance, pins, true)
    }

    /// No service and all maps empty, pinned, and not used before.
    pub(crate) fn empty(flow_table_size: u32) -> Self {
        Self::of_sizes(Sizes::of_flows(flow_table_size))
    }

    /// As [`Self::empty`], with room for so much.
    pub(crate) fn of_sizes(sizes: Sizes) -> Self {
        let pins = unique_pins();
        Self::on(Instance::open(&pins, sizes), pins, false)
    }

    fn on(instance: Instance, pins: Pins, is_lent: bool) -> Self {
        Self {
            instance: Some(instance),
            pins,
            is_lent,
            watched: ((0..=6).collect(), (0..=12).collect()),
            counted: None,
        }
    }

    /// As it is lent again, with other services.
    pub(crate) fn again(mut self, services: &[TestService]) -> Self {
        let mut instance = self.instance.take().unwrap();
        instance.clear();
        Self::on(instance, self.pins.clone(), self.is_lent).with(services)
    }

    pub(crate) fn with(mut self, services: &[TestService]) -> Self {
        self.apply(Operation::PutSettings(SETTINGS));
        for vip in [VIP, VIP6] {
            self.apply(Operation::PutAddress(Address::from(vip), ROLE_VIP));
        }
        for service in services {
            self.watched.0.insert(service.id);
            for backend in service.backends {
                self.watched.1.insert(backend.id);
                self.apply(Operation::PutAddress(
                    Address::from(backend.address.ip()),
                    ROLE_BACKEND,
                ));
                self.apply(Operation::PutBackend(backend.id, backend.entry(service.id)));
            }
            self.all_slots(service, service.backends[0].id);
            self.change_service(service, |_| ());
            self.apply(Operation::PutServiceKey(
                ServiceKey {
                    vip: Address::from(service.vip.ip()),
                    port: service.vip.port().to_be(),
                    protocol: service.protocol,
                    _pad: 0,
                },
                service.id,
            ));
        }
        self
    }

    pub(crate) fn pins(&self) -> &Pins {
        &self.pins
    }

    pub(crate) fn datapath(&mut self) -> &mut KernelDatapath {
        self.counted = None;
        &mut self.instance().datapath
    }

    fn instance(&mut self) -> &mut Instance {
        self.instance.as_mut().unwrap()
    }

    /// Opens the maps again as a restarted daemon does.
    pub(crate) fn restart(&mut self, flow_table_size: u32) {
        assert!(!self.is_lent, "its maps have no pins");
        drop(self.instance.take());
        self.instance = Some(Instance::open(&self.pins, Sizes::of_flows(flow_table_size)));
    }

    pub(crate) fn apply(&mut self, operation: Operation) {
        self.counted = None;
        self.instance().apply(&operation);
    }

    /// Gives all slots of a service to one backend, 0 for none.
    pub(crate) fn all_slots(&mut self, service: &TestService, backend: u32) {
        let members: Vec<u32> = [backend].into_iter().filter(|id| *id != 0).collect();
        self.apply(Operation::PutPool(service.id, Pool::of(members)));
    }

    /// Writes a backend that differs from what it was at the start.
    pub(crate) fn change_backend(
        &mut self,
        service: &TestService,
        which: usize,
        change: impl FnOnce(&mut Backend),
    ) {
        let backend = service.backends[which];
        let mut entry = backend.entry(service.id);
        change(&mut entry);
        self.apply(Operation::PutBackend(backend.id, entry));
    }

    /// Writes a service that differs from what it was at the start.
    pub(crate) fn change_service(&mut self, service: &TestService, change: impl FnOnce(&mut Service)) {
        let mut entry = Service {
            vip: Address::from(service.vip.ip()),
            strategy: Strategy::ConsistentHash.number(),
            forward: service.forward.number(),
            in_use: 1,
            ..Service::default()
        };
        change(&mut entry);
        self.apply(Operation::PutService(service.id, entry));
    }

    /// Gives a service these slots, as the strategies by position have them.
    pub(crate) fn sequence(&mut self, service: &TestService, backends: &[u32]) {
        let mut members = backends.to_vec();
        members.sort_unstable();
        members.dedup();
        let pool = if members.len() == backends.len() {
            Pool::of(backends)
        } else {
            Pool::listed(backends)
        };
        self.apply(Operation::PutPool(service.id, pool));
    }

    pub(crate) fn change_settings(&mut self, change: impl FnOnce(&mut Settings)) {
        let mut settings = SETTINGS;
        change(&mut settings);
        settings.tick_shifts = ageing::tick_shifts(&settings);
        if self.instance().contents.settings.tick_shifts != settings.tick_shifts {
            // As the daemon does: flows are seen now by the new ticks.
            let mut ageless = settings;
            ageless.flags |= SettingsFlags::AGELESS;
            self.apply(Operation::PutSettings(ageless));
            self.tidy();
        }
        self.apply(Operation::PutSettings(settings));
    }

    /// Runs the program on a frame: its verdict and the frame as it leaves.
    pub(crate) fn run(&mut self, input: &[u8]) -> (u32, Vec<u8>) {
        self.run_from(input, None)
    }

    /// As [`Self::run`], for a frame that comes in by an interface of this network namespace.
    pub(crate) fn run_from(&mut self, input: &[u8], ingress: Option<u32>) -> (u32, Vec<u8>) {
        let program: &Xdp = self
            .datapath()
            .ebpf_mut()
            .program(PROGRAM)
            .unwrap()
            .try_into()
            .unwrap();
        // Room for what is put around a packet.
        let mut output = vec![0; input.len().max(4096) + 256];
        // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let context = [0, input.len() as u32, 0, ingress.unwrap_or(0), 0, 0].map(u32::to_ne_bytes);
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(input),
                data_out: Some(&mut output),
                ctx_in: ingress.is_some().then_some(context.as_flattened()),
                ..TestRunOptions::default()
            })
            .unwrap();
        output.truncate(result.data_size_out as usize);
        (result.return_value, output)
    }

    /// As [`Self::run`], with the counters that have moved.
    pub(crate) fn run_counted(&mut self, input: &[u8]) -> (u32, Vec<u8>, Counted) {
        let before = self.counted.take().unwrap_or_else(|| self.counted());
        let (verdict, output) = self.run(input);
        let after = self.counted();
        let moved = after.since(&before);
        self.counted = Some(after);
        (verdict, output, moved)
    }

    /// Runs the program on a frame and compares its verdict, the whole frame that leaves and all counters.
    #[track_caller]
    pub(crate) fn expect(&mut self, what: &str, input: &[u8], expected: Expected) {
        let (verdict, output, moved) = self.run_counted(input);
        let expected_output = expected.output.as_deref().unwrap_or(input);
        assert_eq!(verdict, expected.verdict, "verdict: {what}; counted {moved:?}");
        assert_eq!(output, expected_output, "output: {what}");
        assert_eq!(moved, expected.moved(input.len()), "counters: {what}");
    }

    /// All counters.
    pub(crate) fn counted(&mut self) -> Counted {
        let (services, backends) = &self.watched;
        let (services, backends): (Vec<_>, Vec<_>) = (
            services.iter().copied().collect(),
            backends.iter().copied().collect(),
        );
        let counters = (self.instance().datapath).counters(&services, &backends).unwrap();
        let mut totals = Totals::default();
        for cpu in &counters.totals {
            assert_eq!(
                cpu.received,
                cpu.passed + cpu.dropped + cpu.transmitted + cpu.redirected
            );
            totals.received += cpu.received;
            totals.passed += cpu.passed;
            totals.dropped += cpu.dropped;
            totals.transmitted += cpu.transmitted;
            totals.redirected += cpu.redirected;
        }
        let of_service = |service: Option<u32>, counts: &[Count]| {
            let counts = Reason::ALL.iter().zip(counts.to_vec());
            counts.map(move |(reason, count)| ((service, *reason), count))
        };
        let of_services = counters.services.iter();
        let of_services = of_services.flat_map(|(id, counts)| of_service(Some(*id), counts));
        let mut counted = Counted {
            totals,
            reasons: of_service(None, &counters.reasons).chain(of_services).collect(),
            backends: counters.backends.into_iter().collect(),
        };
        counted.reasons.retain(|_, count| *count != Count::default());
        counted
    }

    /// Live flows of a backend.
    pub(crate) fn live(&mut self, backend: u32) -> u64 {
        self.datapath().live_counts(&[backend]).unwrap()[0].flows()
    }

    /// Has a backend have more live flows or fewer, as the daemon does when it has found a count wrong.
    pub(crate) fn adjust_live(&mut self, backend: u32, by: i64) {
        self.datapath().adjust_live(backend, by).unwrap();
    }

    /// Has all CPUs think that they have recorded as many new flows in this second or so as they may; gives its number.
    pub(crate) fn exhaust_openings(&mut self) -> u64 {
        let window = openings_window();
        self.instance().zero("OPENINGS", [0], [window, u64::MAX >> 1]);
        window
    }

    /// A whole pass of the daemon for what flows have left behind.
    pub(crate) fn tidy(&mut self) {
        let mut position = None;
        loop {
            position = self.datapath().tidy_flows(position).unwrap();
            if position.is_none() {
                return;
            }
        }
    }

    pub(crate) fn bucket(&mut self, index: u32) -> Bucket {
        let buckets: Array<_, Raw<Bucket>> = self.instance().map("FLOWS");
        buckets.get(&index, 0).unwrap().0
    }

    /// Writes a bucket of the flow table, as no program does.
    pub(crate) fn put_bucket(&mut self, index: u32, bucket: Bucket) {
        let mut buckets: Array<_, Raw<Bucket>> = self.instance().map("FLOWS");
        buckets.set(index, Raw(bucket), 0).unwrap();
    }

    fn buckets(&mut self) -> Vec<Bucket> {
        let buckets: Array<_, Raw<Bucket>> = self.instance().map("FLOWS");
        buckets.iter().map(|bucket| bucket.unwrap().0).collect()
    }

    /// Key and meta words of all units that are in use, other than those that addresses are in.
    pub(crate) fn units(&mut self) -> Vec<(u64, Meta)> {
        let mut units = Vec::new();
        for Bucket(words) in self.buckets() {
            let meta = |unit: usize| Meta(words[meta_at(unit)]);
            for unit in 0..UNITS {
                let is_address = unit % 2 == 1 && meta(unit - 1).is(Kind::Long);
                if !is_address && !meta(unit).is_empty() {
                    units.push((words[key_at(unit)], meta(unit)));
                }
            }
        }
        units
    }

    /// How many units of a kind there are.
    pub(crate) fn units_of(&mut self, kind: Kind) -> usize {
        self.units().iter().filter(|(_, meta)| meta.is(kind)).count()
    }

    /// The way back to the client of an IPv4 flow: the only one from its port to that of the service.
    pub(crate) fn client_link(&mut self, frame: &Frame) -> Option<ClientLink> {
        let key = frame.key();
        let (client, port) = (key.source_port, key.destination_port);
        let short = short_key(key.source.v4_word(), client, port);
        let long = long_key(client, port, 0, 0);
        let (_, meta) = self.units().into_iter().find(|(key, meta)| {
            let is_it = if meta.is(Kind::Short) {
                *key == short
            } else {
                meta.is(Kind::Long) && key & PORTS == long
            };
            is_it && !meta.is_left()
        })?;
        let links: Array<_, Raw<ClientLink>> = self.instance().map("CLIENT_LINKS");
        (meta.link() != 0).then(|| links.get(&meta.link(), 0).unwrap().0)
    }

    /// States of all ways back to clients, but for those that are free.
    pub(crate) fn link_states(&mut self) -> Vec<u64> {
        let links: Array<_, Raw<ClientLink>> = self.instance().map("CLIENT_LINKS");
        let states = links.iter().map(|link| link.unwrap().0.state);
        states.filter(|state| *state != ClientLink::FREE).collect()
    }

    pub(crate) fn flows(&mut self) -> BTreeMap<FlowKey, Flow> {
        let mut flows = BTreeMap::new();
        self.datapath()
            .flows(&mut |key, flow| {
                flows.insert(*key, *flow);
            })
            .unwrap();
        flows
    }

    /// The flow of a client's packet.
    pub(crate) fn flow(&mut self, frame: &Frame) -> Option<Flow> {
        self.flows().remove(&frame.key())
    }
}

/// What the data path has counted, or by how much that has grown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counted {
    pub totals: Totals,
    /// By service, or none, and reason; without those that are zero.
    pub reasons: BTreeMap<(Option<u32>, Reason), Count>,
    pub backends: BTreeMap<u32, BackendCounters>,
}

impl Counted {
    /// What has moved since an earlier reading; counters that have not are left out.
    pub(crate) fn since(&self, before: &Self) -> Self {
        let totals = Totals {
            received: self.totals.received - before.totals.received,
            passed: self.totals.passed - before.totals.passed,
            dropped: self.totals.dropped - before.totals.dropped,
            transmitted: self.totals.transmitted - before.totals.transmitted,
            redirected: self.totals.redirected - before.totals.redirected,
        };
        let grown = |now: &Count, before: &Count| Count {
            packets: now.packets - before.packets,
            bytes: now.bytes - before.bytes,
        };
        let none = Count::default();
        assert!(before.reasons.keys().all(|key| self.reasons.contains_key(key)));
        let reasons = self
            .reasons
            .iter()
            .map(|(key, count)| (*key, grown(count, before.reasons.get(key).unwrap_or(&none))))
            .filter(|(_, count)| *count != Count::default())
            .collect();
        let backends = self
            .backends
            .iter()
            .map(|(id, counters)| {
                let before = &before.backends[id];
                let moved = BackendCounters {
                    forwarded: grown(&counters.forwarded, &before.forwarded),
                    returned: grown(&counters.returned, &before.returned),
                    flows: counters.flows - before.flows,
                    ..BackendCounters::default()
                };
                (*id, moved)
            })
            .filter(|(_, counters)| *counters != BackendCounters::default())
            .collect();
        Self {
            totals,
            reasons,
            backends,
        }
    }
}

/// What shall become of one frame. Counters that it does not name shall not move.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    verdict: u32,
    reason: Reason,
    service: Option<u32>,
    /// `None` where the frame leaves as it came.
    output: Option<Vec<u8>>,
    backend: Option<u32>,
    new_flow: bool,
}

impl Expected {
    /// Left to the host, as it came.
    pub(crate) fn passed(reason: Reason) -> Self {
        Self {
            verdict: PASS,
            reason,
            service: None,
            output: None,
            backend: None,
            new_flow: false,
        }
    }

    /// Dropped, as it came.
    pub(crate) fn dropped(reason: Reason) -> Self {
        Self {
            verdict: DROP,
            ..Self::passed(reason)
        }
    }

    /// Answered in its place, on the interface it came in by.
    pub(crate) fn answered(reason: Reason, answer: Vec<u8>) -> Self {
        Self {
            verdict: TX,
            output: Some(answer),
            ..Self::passed(reason)
        }
    }

    /// A SYN is answered with a reset.
    pub(crate) fn rejected(frame: &Frame) -> Self {
        Self::answered(Reason::Rejected, frame.reset().bytes())
    }

    /// Counted for a service.
    pub(crate) fn of(self, service: &TestService) -> Self {
        Self {
            service: Some(service.id),
            ..self
        }
    }

    /// Sent to a backend from a source address and port, out of the backend's interface.
    pub(crate) fn to_backend(service: &TestService, which: usize, frame: &Frame, source: SocketAddr) -> Self {
        let backend = &service.backends[which];
        Self::forwarded(
            service,
            which,
            frame.sent(backend.link(), source, backend.address).bytes(),
        )
    }

    /// Sent to a backend as these bytes, out of the backend's interface.
    pub(crate) fn forwarded(service: &TestService, which: usize, output: Vec<u8>) -> Self {
        let backend = &service.backends[which];
        Self {
            verdict: backend.verdict(),
            output: Some(output),
            backend: Some(backend.id),
            ..Self::passed(Reason::Forwarded).of(service)
        }
    }

    /// Sent to a backend in its place, with MAC addresses of the backend's link alone (`dsr`).
    pub(crate) fn direct(service: &TestService, which: usize, frame: &Frame) -> Self {
        let link = service.backends[which].link();
        Self::forwarded(
            service,
            which,
            frame.sent(link, frame.source, frame.destination).bytes(),
        )
    }

    /// Sent to a client the way that its packets come.
    pub(crate) fn to_client(service: &TestService, which: usize, answer: &Frame, client: &Frame) -> Self {
        let sent = Frame {
            tags: client.tags,
            ..answer.sent(client.back(), client.destination, client.source)
        };
        Self::returned(service, which, sent.bytes())
    }

    /// Sent to a client as these bytes, the way that its packets come.
    pub(crate) fn returned(service: &TestService, which: usize, output: Vec<u8>) -> Self {
        Self {
            verdict: TX,
            output: Some(output),
            backend: Some(service.backends[which].id),
            ..Self::passed(Reason::Returned).of(service)
        }
    }

    /// An ICMP error about a flow of a service, sent on as these bytes with a verdict.
    pub(crate) fn error(service: &TestService, reason: Reason, verdict: u32, output: Vec<u8>) -> Self {
        Self {
            verdict,
            output: Some(output),
            ..Self::passed(reason).of(service)
        }
    }

    /// Rewritten, but left to the host's stack.
    pub(crate) fn left_to_host(self, output: Vec<u8>) -> Self {
        Self {
            verdict: PASS,
            reason: Reason::NextHopUnknown,
            ..self.with_output(output)
        }
    }

    /// Leaves as these bytes rather than as the frame says.
    pub(crate) fn with_output(self, output: Vec<u8>) -> Self {
        Self {
            output: Some(output),
            ..self
        }
    }

    /// A new flow is put on the backend.
    pub(crate) fn new_flow(self) -> Self {
        Self {
            new_flow: true,
            ..self
        }
    }

    pub(crate) fn reason(&self) -> Reason {
        self.reason
    }

    fn moved(&self, length: usize) -> Counted {
        let count = Count {
            packets: 1,
            bytes: length as u64,
        };
        let mut counted = Counted {
            reasons: BTreeMap::from([((self.service, self.reason), count)]),
            ..Counted::default()
        };
        counted.totals.received = 1;
        *match self.verdict {
            DROP => &mut counted.totals.dropped,
            TX => &mut counted.totals.transmitted,
            REDIRECT => &mut counted.totals.redirected,
            _ => &mut counted.totals.passed,
        } = 1;
        if let Some(id) = self.backend {
            let mut counters = BackendCounters {
                flows: u64::from(self.new_flow),
                ..BackendCounters::default()
            };
            let side = match self.reason {
                Reason::Returned => &mut counters.returned,
                _ => &mut counters.forwarded,
            };
            *side = count;
            counted.backends.insert(id, counters);
        }
        counted
    }
}
