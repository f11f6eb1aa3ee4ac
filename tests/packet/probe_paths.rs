//! The programs that have probes travel: whole frames, before and after.

use std::net::{IpAddr, SocketAddr};

use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use etherparse::{Icmpv4Type, Icmpv6Type, IpNumber, Ipv4Header, Ipv6Header, PacketBuilder, UdpHeader};
use lb_common::{
    abi::{Address, FlowKey, Forward, MAX_PROBE_PATHS, ProbePath},
    logic::outer::entropy,
};
use xlb::datapath::{LinkKind, probes::Probes};

use crate::fixture::unique_pins;

/// To the next program.
const NEXT: u32 = u32::MAX;
/// `TC_ACT_SHOT`.
const DROPPED: u32 = 2;

/// By family.
const HOST: [&str; 2] = ["10.0.0.1:40000", "[2001:db8::1]:40000"];
const BACKEND: [&str; 2] = ["10.0.0.11:80", "[2001:db8::11]:80"];
const VIP: [&str; 2] = ["203.0.113.10:80", "[2001:db8:10::10]:80"];
const ROUTER: [&str; 2] = ["10.0.0.254:0", "[2001:db8::fe]:0"];

const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const BACKEND_MAC: [u8; 6] = [2, 0, 0, 0, 0, 11];

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Tcp,
    Udp,
}

const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

/// The IP packet, with every checksum computed over the whole.
fn packet(protocol: Protocol, source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let payload = b"payload of odd length";
    let ip = match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            PacketBuilder::ipv4(source.octets(), destination.octets(), 1)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            PacketBuilder::ipv6(source.octets(), destination.octets(), 1)
        }
        ends => panic!("two families: {ends:?}"),
    };
    let mut bytes = Vec::new();
    match protocol {
        Protocol::Tcp => {
            let tcp = ip.tcp(source.port(), destination.port(), 1000, 2000).syn();
            tcp.write(&mut bytes, payload).unwrap();
        }
        Protocol::Udp => {
            let udp = ip.udp(source.port(), destination.port());
            udp.write(&mut bytes, payload).unwrap();
        }
    }
    bytes
}

/// An ICMP error from a host about a packet: nobody is there, or nobody listens.
fn error(from: SocketAddr, about: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    match (from.ip(), at(HOST[usize::from(from.is_ipv6())]).ip()) {
        (IpAddr::V4(from), IpAddr::V4(host)) => {
            let unreachable = Icmpv4Type::Unknown {
                type_u8: 3,
                code_u8: 3,
                bytes5to8: [0; 4],
            };
            let builder = PacketBuilder::ipv4(from.octets(), host.octets(), 64).icmpv4(unreachable);
            builder.write(&mut bytes, about).unwrap();
        }
        (IpAddr::V6(from), IpAddr::V6(host)) => {
            let unreachable = Icmpv6Type::Unknown {
                type_u8: 1,
                code_u8: 4,
                bytes5to8: [0; 4],
            };
            let builder = PacketBuilder::ipv6(from.octets(), host.octets(), 64).icmpv6(unreachable);
            builder.write(&mut bytes, about).unwrap();
        }
        ends => panic!("two families: {ends:?}"),
    }
    bytes
}

fn framed(from: [u8; 6], to: [u8; 6], packet: &[u8]) -> Vec<u8> {
    let ethertype: u16 = if packet[0] >> 4 == 6 { 0x86dd } else { 0x0800 };
    [&to[..], &from, &ethertype.to_be_bytes(), packet].concat()
}

fn leaving(packet: &[u8]) -> Vec<u8> {
    framed(HOST_MAC, BACKEND_MAC, packet)
}

fn arriving(packet: &[u8]) -> Vec<u8> {
    framed(BACKEND_MAC, HOST_MAC, packet)
}

/// What is expected around a packet.
fn wrapped(forward: Forward, path: &ProbePath, inner: &[u8], key: &FlowKey) -> Vec<u8> {
    let entropy = entropy(key);
    let mut protocol = if inner[0] >> 4 == 6 { 41 } else { 4 };
    let mut payload = inner.to_vec();
    if forward == Forward::Gue {
        let udp = UdpHeader::without_ipv4_checksum(0xc000 | entropy as u16 & 0x3fff, 6080, inner.len());
        payload = [&udp.unwrap().to_bytes()[..], inner].concat();
        protocol = 17;
    }
    let source = match forward {
        Forward::Gue => key.source,
        _ => {
            let mut source = path.outer_source;
            source.0[3] |= entropy & path.outer_varying;
            source
        }
    };
    let header = match (source.into(), path.backend.into()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let (source, destination) = (source.octets(), destination.octets());
            let mut ip = Ipv4Header::new(0, 64, IpNumber(protocol), source, destination).unwrap();
            ip.dont_fragment = true;
            ip.set_payload_len(payload.len()).unwrap();
            ip.header_checksum = ip.calc_header_checksum();
            ip.to_bytes().to_vec()
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => Ipv6Header {
            flow_label: (entropy & 0xf_ffff).try_into().unwrap(),
            payload_length: payload.len() as u16,
            next_header: IpNumber(protocol),
            hop_limit: 64,
            source: source.octets(),
            destination: destination.octets(),
            ..Ipv6Header::default()
        }
        .to_bytes()
        .to_vec(),
        ends => panic!("two families: {ends:?}"),
    };
    [header, payload].concat()
}

fn path(forward: Forward, family: usize) -> ProbePath {
    let (network, varying) = [("172.16.0.0", 0xffff_u32), ("100::", u32::MAX)][family];
    ProbePath {
        backend: at(BACKEND[family]).ip().into(),
        vip: at(VIP[family]).ip().into(),
        outer_source: network.parse::<IpAddr>().unwrap().into(),
        outer_varying: varying.to_be(),
        forward: forward.number(),
        ..ProbePath::default()
    }
}

struct Fixture(Probes);

impl Fixture {
    fn new(paths: &[ProbePath]) -> Self {
        let mut probes = Probes::load(LinkKind::of_this_kernel(), unique_pins()).unwrap();
        probes.set_paths(&paths.iter().copied().collect()).unwrap();
        Self(probes)
    }

    fn out(&mut self, mark: u32, frame: &[u8]) -> (u32, Vec<u8>) {
        self.run("xlb_probe_out", mark, frame)
    }

    fn arrive(&mut self, frame: &[u8]) -> (u32, Vec<u8>) {
        self.run("xlb_probe_in", 0, frame)
    }

    fn run(&mut self, program: &str, mark: u32, frame: &[u8]) -> (u32, Vec<u8>) {
        let program: &SchedClassifier = self.0.ebpf_mut().program(program).unwrap().try_into().unwrap();
        let mut output = vec![0; 4096];
        // `struct __sk_buff`: len, pkt_type, mark, and more that is zero.
        let mut context = [0_u32; 48];
        context[2] = mark;
        let context = context.map(u32::to_ne_bytes);
        let mut after = [0; 192];
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut output),
                ctx_in: Some(context.as_flattened()),
                ctx_out: Some(&mut after),
                ..TestRunOptions::default()
            })
            .unwrap();
        output.truncate(result.data_size_out as usize);
        // On its way to an interface below it would be taken for one that has yet to be changed.
        let keeps_mark = after[8..12] == mark.to_ne_bytes();
        assert_eq!(keeps_mark, mark == 0 || output == frame, "the mark {mark:x}");
        (result.return_value, output)
    }
}

/// Each forward of each family.
fn each(mut test: impl FnMut(&mut Fixture, Forward, usize, ProbePath, u32)) {
    let paths = [Forward::Dsr, Forward::IpIp, Forward::Gue]
        .map(|forward| [0, 1].map(|family| (forward, family, path(forward, family))));
    let paths = paths.as_flattened();
    let mut fixture = Fixture::new(&paths.iter().map(|(.., path)| *path).collect::<Vec<_>>());
    for (forward, family, path) in paths {
        let mark = fixture.0.mark(path).unwrap();
        test(&mut fixture, *forward, *family, *path, mark);
    }
}

#[test]
fn what_leaves_is_for_the_vip_and_wrapped_as_packets_of_clients_are() {
    each(|fixture, forward, family, path, mark| {
        for protocol in PROTOCOLS {
            let (host, backend, vip) = (at(HOST[family]), at(BACKEND[family]), at(VIP[family]));
            let inner = packet(protocol, host, vip);
            let key = FlowKey {
                source: host.ip().into(),
                destination: vip.ip().into(),
                source_port: host.port().to_be(),
                destination_port: vip.port().to_be(),
                protocol: if protocol == Protocol::Tcp { 6 } else { 17 },
            };
            let expected = match forward {
                Forward::Dsr => inner,
                _ => wrapped(forward, &path, &inner, &key),
            };
            let (verdict, output) = fixture.out(mark, &leaving(&packet(protocol, host, backend)));
            assert_eq!(verdict, NEXT, "{forward:?} {family} {protocol:?}");
            assert_eq!(output, leaving(&expected), "{forward:?} {family} {protocol:?}");
        }
    });
}

#[test]
fn answers_of_the_vip_are_those_of_the_backend_for_the_probes_that_left() {
    each(|fixture, forward, family, _, mark| {
        for protocol in PROTOCOLS {
            let (host, backend, vip) = (at(HOST[family]), at(BACKEND[family]), at(VIP[family]));
            let answer = arriving(&packet(protocol, vip, host));
            fixture.out(mark, &leaving(&packet(protocol, host, backend)));
            let expected = arriving(&packet(protocol, backend, host));
            assert_eq!(
                fixture.arrive(&answer),
                (NEXT, expected),
                "{forward:?} {family} {protocol:?}"
            );
            for (source, destination) in [
                (SocketAddr::new(vip.ip(), 81), host),
                (vip, SocketAddr::new(host.ip(), 40001)),
                (backend, host),
            ] {
                let other = arriving(&packet(protocol, source, destination));
                assert_eq!(fixture.arrive(&other), (NEXT, other.clone()));
            }
        }
    });
}

#[test]
fn errors_about_probes_are_about_what_the_socket_sent() {
    each(|fixture, forward, family, _, mark| {
        let (host, backend, vip) = (at(HOST[family]), at(BACKEND[family]), at(VIP[family]));
        for protocol in PROTOCOLS {
            fixture.out(mark, &leaving(&packet(protocol, host, backend)));
            let (about_vip, about_backend) = (packet(protocol, host, vip), packet(protocol, host, backend));
            for (from, seen_from) in [(vip, backend), (at(ROUTER[family]), at(ROUTER[family]))] {
                let (verdict, output) = fixture.arrive(&arriving(&error(from, &about_vip)));
                assert_eq!(verdict, NEXT);
                let transport = if family == 0 { 20 } else { 40 };
                // The checksum of TCP or UDP in the quote stays that of what was sent: nobody looks at it.
                let checksum = transport + if protocol == Protocol::Tcp { 16 } else { 6 };
                let mut quoted = about_backend.clone();
                quoted[checksum..checksum + 2].copy_from_slice(&about_vip[checksum..checksum + 2]);
                let expected = arriving(&error(seen_from, &quoted));
                assert_eq!(output, expected, "{forward:?} {family} {protocol:?} from {from}");
            }
        }
        let other = SocketAddr::new(vip.ip(), 81);
        let error = arriving(&error(vip, &packet(Protocol::Udp, host, other)));
        assert_eq!(fixture.arrive(&error), (NEXT, error.clone()));
    });
}

#[test]
fn a_datagram_without_a_checksum_stays_one() {
    let mut fixture = Fixture::new(&[path(Forward::Dsr, 0)]);
    let without = |source, destination| {
        let mut packet = packet(Protocol::Udp, source, destination);
        packet[26..28].fill(0);
        packet
    };
    let (host, backend, vip) = (at(HOST[0]), at(BACKEND[0]), at(VIP[0]));
    let left = fixture.out(0x786c_0001, &leaving(&without(host, backend)));
    assert_eq!(left, (NEXT, leaving(&without(host, vip))));
    let arrived = fixture.arrive(&arriving(&without(vip, host)));
    assert_eq!(arrived, (NEXT, arriving(&without(backend, host))));
}

#[test]
fn packets_of_others_stay_as_they_are_and_those_of_no_path_are_dropped() {
    each(|fixture, _, family, _, mark| {
        let to = |address: &str| leaving(&packet(Protocol::Tcp, at(HOST[family]), at(address)));
        let frame = to(BACKEND[family]);
        for other in [0, 1, 0x786b_0001, 0x786d_0001] {
            assert_eq!(fixture.out(other, &frame), (NEXT, frame.clone()));
        }
        // Of none, of one that is not set, and of one that leads elsewhere by now.
        for no_path in [0x786c_0000, 0x786c_0007, 0x786c_ffff] {
            assert_eq!(fixture.out(no_path, &frame).0, DROPPED, "{no_path:x}");
        }
        let elsewhere = to(["10.0.0.12:80", "[2001:db8::12]:80"][family]);
        assert_eq!(fixture.out(mark, &elsewhere).0, DROPPED);
        let mut no_ip = frame.clone();
        no_ip[12..14].copy_from_slice(&[0x08, 0x06]);
        assert_eq!(fixture.out(mark, &no_ip).0, DROPPED);
        assert_eq!(fixture.arrive(&no_ip), (NEXT, no_ip));
    });
}

#[test]
fn backends_that_there_are_no_marks_for_leave_the_others_theirs() {
    let path = |number: u32| ProbePath {
        backend: Address([1, 2, 3, number]),
        ..path(Forward::Dsr, 0)
    };
    let mut probes = Probes::load(LinkKind::of_this_kernel(), unique_pins()).unwrap();
    assert_eq!(probes.set_paths(&[path(70_000)].into()).unwrap(), 0);
    let mark = probes.mark(&path(70_000));
    // Mark 0 is none.
    let left_out = probes.set_paths(&(0..=70_000).map(path).collect()).unwrap();
    assert_eq!(left_out, 70_001 - (MAX_PROBE_PATHS as usize - 1));
    assert_eq!(probes.mark(&path(70_000)), mark);
    let marked = (0..=70_000)
        .filter(|number| probes.mark(&path(*number)).is_some())
        .count();
    assert_eq!(marked, MAX_PROBE_PATHS as usize - 1);
}
