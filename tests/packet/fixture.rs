//! An instance of the data path with known services, whose every counter is watched.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddrV4},
    sync::atomic::{AtomicU32, Ordering},
};

use aya::programs::{TestRun, TestRunOptions, Xdp};
use lb_common::abi::{
    Address, Backend, BackendCounters, BackendFlags, Count, Flow, FlowKey, Forward, Link, ROLE_BACKEND,
    ROLE_VIP, Reason, SLOT_COUNT, Service, ServiceKey, Settings, Strategy, TCP, Totals, UDP,
};
use xlb::datapath::{
    Datapath, Operation, Pins,
    kernel::{KernelDatapath, PROGRAM},
};

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
    pub vip: SocketAddrV4,
    pub protocol: u8,
    pub forward: Forward,
    pub backends: [TestBackend; 2],
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct TestBackend {
    pub id: u32,
    pub address: SocketAddrV4,
    pub ifindex: u32,
}

const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// This host's address towards the backends: the source that `full-nat` writes.
pub(crate) const SOURCE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

const fn service(id: u32, port: u16, protocol: u8, forward: Forward, backend_port: u16) -> TestService {
    TestService {
        id,
        vip: SocketAddrV4::new(VIP, port),
        protocol,
        forward,
        backends: [
            TestBackend {
                id: 2 * id - 1,
                address: SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 11), backend_port),
                ifindex: INGRESS,
            },
            TestBackend {
                id: 2 * id,
                address: SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 12), backend_port),
                ifindex: OTHER_INTERFACE,
            },
        ],
    }
}

/// `nat`, TCP.
pub(crate) const WEB: TestService = service(1, 80, TCP, Forward::Nat, 8080);
/// `full-nat`, TCP.
pub(crate) const SHOP: TestService = service(2, 443, TCP, Forward::FullNat, 8443);
/// `nat`, UDP.
pub(crate) const DNS: TestService = service(3, 53, UDP, Forward::Nat, 5300);
/// `full-nat`, UDP.
pub(crate) const RELAY: TestService = service(4, 3478, UDP, Forward::FullNat, 3479);
/// `nat`, TCP, on the same servers and ports as [`WEB`].
pub(crate) const MIRROR: TestService = service(5, 8000, TCP, Forward::Nat, 8080);

const SERVICES: [TestService; 5] = [WEB, SHOP, DNS, RELAY, MIRROR];

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
    flags: 0,
    ipip_source_v4: Address::from_v4_word(u32::from_ne_bytes([172, 16, 0, 0])),
    ipip_source_v6: Address([0x100_0000_u32.to_be(), 0, 0, 0]),
    ipip_varying_v4: 0xffff_u32.to_be(),
    ipip_varying_v6: u32::MAX,
};

impl TestBackend {
    /// From the balancer to this backend.
    pub(crate) fn link(&self) -> Link {
        Link::new([0x02, 0, 0, 0, 1, self.id as u8], BALANCER_MAC)
    }

    /// The backend as it is when it is up.
    pub(crate) fn entry(&self, service: u32) -> Backend {
        Backend {
            address: Address::from(*self.address.ip()),
            source: Address::from(SOURCE),
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

/// The data path with [`WEB`], [`SHOP`], [`DNS`], [`RELAY`] and [`MIRROR`]; all slots of a service hold its first
/// backend.
pub(crate) struct Fixture {
    datapath: Option<KernelDatapath>,
    pins: Pins,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = self.pins.remove_all();
    }
}

/// Pins that no other test has.
pub(crate) fn unique_pins() -> Pins {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    Pins::new(&format!("packet-{}-{number}", std::process::id()))
}

impl Fixture {
    pub(crate) fn new() -> Self {
        Self::with_flow_table(65_536)
    }

    /// Room for so many flows.
    pub(crate) fn with_flow_table(size: u32) -> Self {
        let mut fixture = Self::empty(size);
        fixture.apply(Operation::PutSettings(SETTINGS));
        fixture.apply(Operation::PutAddress(Address::from(VIP), ROLE_VIP));
        for service in SERVICES {
            for backend in service.backends {
                fixture.apply(Operation::PutAddress(
                    Address::from(*backend.address.ip()),
                    ROLE_BACKEND,
                ));
                fixture.apply(Operation::PutBackend(backend.id, backend.entry(service.id)));
            }
            fixture.all_slots(&service, service.backends[0].id);
            let entry = Service {
                strategy: Strategy::ConsistentHash.number(),
                forward: service.forward.number(),
                in_use: 1,
                ..Service::default()
            };
            fixture.apply(Operation::PutService(service.id, entry));
            fixture.apply(Operation::PutServiceKey(
                ServiceKey {
                    vip: Address::from(*service.vip.ip()),
                    port: service.vip.port().to_be(),
                    protocol: service.protocol,
                    _pad: 0,
                },
                service.id,
            ));
        }
        fixture
    }

    /// No service, all maps empty.
    pub(crate) fn empty(flow_table_size: u32) -> Self {
        let pins = unique_pins();
        let mut fixture = Self { datapath: None, pins };
        fixture.datapath = Some(KernelDatapath::open(fixture.pins.clone(), flow_table_size).unwrap());
        fixture
    }

    pub(crate) fn pins(&self) -> &Pins {
        &self.pins
    }

    pub(crate) fn datapath(&mut self) -> &mut KernelDatapath {
        self.datapath.as_mut().unwrap()
    }

    /// Opens the maps again as a restarted daemon does.
    pub(crate) fn restart(&mut self, flow_table_size: u32) {
        drop(self.datapath.take());
        self.datapath = Some(KernelDatapath::open(self.pins.clone(), flow_table_size).unwrap());
    }

    pub(crate) fn apply(&mut self, operation: Operation) {
        self.datapath().apply(&operation).unwrap();
    }

    /// Gives all slots of a service to one backend, 0 for none.
    pub(crate) fn all_slots(&mut self, service: &TestService, backend: u32) {
        self.apply(Operation::PutSlots(
            service.id,
            vec![backend; SLOT_COUNT as usize].into(),
        ));
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

    pub(crate) fn change_settings(&mut self, change: impl FnOnce(&mut Settings)) {
        let mut settings = SETTINGS;
        change(&mut settings);
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
        let mut output = vec![0; 4096];
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

    /// Runs the program on a frame and compares its verdict, the whole frame that leaves and all counters.
    #[track_caller]
    pub(crate) fn expect(&mut self, what: &str, input: &[u8], expected: Expected) {
        let before = self.counted();
        let (verdict, output) = self.run(input);
        let moved = self.counted().since(&before);
        let expected_output = expected.output.as_deref().unwrap_or(input);
        assert_eq!(verdict, expected.verdict, "verdict: {what}; counted {moved:?}");
        assert_eq!(output, expected_output, "output: {what}");
        assert_eq!(moved, expected.moved(input.len()), "counters: {what}");
    }

    /// All counters.
    pub(crate) fn counted(&mut self) -> Counted {
        let services: Vec<u32> = (0..=6).collect();
        let backends: Vec<u32> = (0..=12).collect();
        let counters = self.datapath().counters(&services, &backends).unwrap();
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
        let mut reasons = BTreeMap::new();
        for reason in Reason::ALL {
            let index = reason.index() as usize;
            reasons.insert((None, *reason), counters.reasons[index]);
            for (service, counts) in &counters.services {
                reasons.insert((Some(*service), *reason), counts[index]);
            }
        }
        Counted {
            totals,
            reasons,
            backends: counters.backends,
        }
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
    /// By service, or none, and reason.
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
        let reasons = self
            .reasons
            .iter()
            .map(|(key, count)| (*key, grown(count, &before.reasons[key])))
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

    /// Counted for a service.
    pub(crate) fn of(self, service: &TestService) -> Self {
        Self {
            service: Some(service.id),
            ..self
        }
    }

    /// Sent to a backend from a source address and port, out of the backend's interface.
    pub(crate) fn to_backend(
        service: &TestService,
        which: usize,
        frame: &Frame,
        source: SocketAddrV4,
    ) -> Self {
        let backend = &service.backends[which];
        Self {
            verdict: if backend.ifindex == INGRESS { TX } else { REDIRECT },
            output: Some(frame.sent(backend.link(), source, backend.address).bytes()),
            backend: Some(backend.id),
            ..Self::passed(Reason::Forwarded).of(service)
        }
    }

    /// Sent to a client the way that its packets come.
    pub(crate) fn to_client(service: &TestService, which: usize, answer: &Frame, client: &Frame) -> Self {
        let back = Link::new(client.link.source(), client.link.destination());
        Self {
            verdict: TX,
            output: Some(answer.sent(back, client.destination, client.source).bytes()),
            backend: Some(service.backends[which].id),
            ..Self::passed(Reason::Returned).of(service)
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
