//! `xlb decap` on a backend's host: real sockets get what a balancer has encapsulated.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::sys::signal::{SigHandler, Signal, signal};
use tests::{
    decap::Decap,
    encapsulation::{Encapsulated, Wrapping, udp_packet},
    http::Connection,
    machine::{self, bound, eventually},
    nginx::Nginx,
    packet_socket::PacketSocket,
    udp::UdpEcho,
};
use xlb::{datapath::pass::PassAll, lab::Namespace};

use crate::scene::has_program;

/// By family: the client, the backend's host, the VIP, and where outer packets come from.
const CLIENT: [&str; 2] = ["10.9.0.1", "2001:db8:9::1"];
const HOST: [&str; 2] = ["10.9.0.2", "2001:db8:9::2"];
const VIP: [&str; 2] = ["203.0.113.10", "2001:db8:1::10"];
const OUTER_SOURCE: [&str; 2] = ["172.16.3.4", "100::7"];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip(address), port)
}

/// A client and a backend's host on one network, which has the VIPs on its loopback interface.
struct Scene {
    client: Namespace,
    host: Namespace,
}

impl Scene {
    fn new() -> Self {
        machine::require_root_nginx_and_curl();
        let (client, host) = (Namespace::new("client").unwrap(), Namespace::new("host").unwrap());
        for interface in ["eth0", "eth1"] {
            Namespace::connect(&client, interface, &host, interface).unwrap();
            client.disable_offload(interface).unwrap();
            host.disable_offload(interface).unwrap();
        }
        for (prefix, family) in [(24, 0), (64, 1)] {
            client
                .add_address("eth0", &format!("{}/{prefix}", CLIENT[family]))
                .unwrap();
            host.add_address("eth0", &format!("{}/{prefix}", HOST[family]))
                .unwrap();
            host.add_address("lo", VIP[family]).unwrap();
        }
        let scene = Self { client, host };
        for (name, value) in [("rp_filter", "0"), ("arp_ignore", "1"), ("arp_announce", "2")] {
            for interface in ["all", "eth0", "eth1"] {
                scene
                    .host
                    .sysctl(&format!("net/ipv4/conf/{interface}/{name}"), value)
                    .unwrap();
            }
        }
        scene
    }

    /// `xlb decap` for both VIPs on `eth0`, with more arguments.
    fn decap(&self, more: &[&str]) -> Decap {
        let arguments = ["--interface", "eth0", "--vip", VIP[0], "--vip", VIP[1]];
        Decap::start(&self.host, &[&arguments[..], more].concat())
    }

    fn encapsulated(
        &self,
        interface: &str,
        outer: usize,
        wrapping: Wrapping,
        inner: Vec<u8>,
    ) -> Encapsulated {
        Encapsulated {
            to: self.host.link(interface).unwrap().mac.unwrap(),
            from: self.client.link(interface).unwrap().mac.unwrap(),
            tags: vec![],
            source: ip(OUTER_SOURCE[outer]),
            destination: ip(HOST[outer]),
            wrapping,
            ecn: 0,
            options: vec![],
            checksum: false,
            inner,
            trailer: vec![],
        }
    }

    /// Sends a datagram from a socket of the client's to a server of the VIP, encapsulated, and tells the answer
    /// that the socket gets, and from whom.
    fn ask(
        &self,
        interface: &str,
        (outer, inner): (usize, usize),
        wrapping: Wrapping,
        payload: &[u8],
    ) -> Option<(String, SocketAddr)> {
        let socket = self
            .client
            .run(|| UdpSocket::bind(at(CLIENT[inner], 0)))
            .unwrap()
            .unwrap();
        socket
            .set_read_timeout(Some(bound(Duration::from_millis(500))))
            .unwrap();
        let packet = udp_packet(socket.local_addr().unwrap(), at(VIP[inner], 53), 0, payload);
        let frame = self.encapsulated(interface, outer, wrapping, packet).frame();
        let wire = PacketSocket::open(&self.client, interface, Duration::from_secs(1));
        let mut answer = [0; 2048];
        // Whoever is asked first may have to resolve the client's address.
        for _ in 0..3 {
            wire.send(&frame);
            if let Ok((length, from)) = socket.recv_from(&mut answer) {
                return Some((String::from_utf8_lossy(&answer[..length]).into_owned(), from));
            }
        }
        None
    }

    fn servers(&self) -> [UdpEcho; 2] {
        [0, 1].map(|family| UdpEcho::start(&self.host, "backend", at(VIP[family], 53)))
    }

    /// That a datagram in each encapsulation is answered by the VIP.
    #[track_caller]
    fn expect_answers(&self, interface: &str, payload: &[u8]) {
        for families in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            for wrapping in Wrapping::ALL {
                let answer = self.ask(interface, families, wrapping, payload);
                let expected = (format!("backend {}", CLIENT[families.1]), at(VIP[families.1], 53));
                assert_eq!(answer, Some(expected), "{families:?} {wrapping:?}");
            }
        }
    }
}

#[test]
fn sockets_of_the_vip_get_datagrams_of_every_encapsulation_and_the_client_their_answers() {
    let scene = Scene::new();
    let _servers = scene.servers();
    for mode in ["auto", "native", "generic"] {
        let decap = scene.decap(&["--xdp-mode", mode]);
        let obtained = if mode == "generic" { "generic" } else { "native" };
        assert!(
            decap.log().contains(&format!("mode=\"{obtained}\"")),
            "{}",
            decap.log()
        );
        assert!(!decap.log().contains("WARN"), "{}", decap.log());
        scene.expect_answers("eth0", b"who is there");
        let outcome = decap.end(Signal::SIGTERM);
        assert_eq!(outcome.code, 0, "{outcome:?}");
        // Each of the twelve at least once.
        let unwrapped = outcome.stdout.lines().next().unwrap();
        assert!(unwrapped.starts_with("unwrapped "), "{outcome:?}");
        for part in [" packets, ", "ipip ", "gue "] {
            assert!(unwrapped.contains(part), "{outcome:?}");
        }
    }
    // It is the program that has unwrapped them.
    assert_eq!(
        scene.ask("eth0", (0, 0), Wrapping::GueDirect, b"who is there"),
        None
    );
}

#[test]
fn jumbo_frames_are_unwrapped_in_native_mode() {
    let scene = Scene::new();
    let _servers = scene.servers();
    for namespace in [&scene.client, &scene.host] {
        namespace.set_mtu("eth0", 9000).unwrap();
    }
    let _decap = scene.decap(&["--xdp-mode", "native"]);
    scene.expect_answers("eth0", &[b'x'; 8000]);
}

#[test]
fn several_interfaces_and_only_the_vips_and_sources_that_were_given() {
    let scene = Scene::new();
    let _servers = scene.servers();
    let arguments = [
        "--interface",
        "eth0",
        "eth1",
        "--vip",
        VIP[0],
        "--source",
        "172.16.0.0/16",
    ];
    let decap = Decap::start(&scene.host, &arguments);
    for interface in ["eth0", "eth1"] {
        let answer = scene.ask(interface, (0, 0), Wrapping::Ipip, b"who is there");
        assert!(answer.is_some(), "{interface}");
    }
    for (families, why) in [((0, 1), "another vip"), ((1, 0), "another source")] {
        assert_eq!(
            scene.ask("eth0", families, Wrapping::GueDirect, b"who is there"),
            None,
            "{why}"
        );
    }
    let outcome = decap.end(Signal::SIGINT);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    for part in ["not-for-vip 3", "source-not-allowed 3"] {
        assert!(outcome.stdout.contains(part), "{part}: {outcome:?}");
    }
}

/// Takes packets for the VIP from the client's side and sends them on, encapsulated: a balancer without a program.
struct Encapsulator {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<std::io::Result<()>>>,
}

impl Encapsulator {
    fn start(balancer: &Namespace, template: Encapsulated) -> Self {
        let from = PacketSocket::open(balancer, "eth0", Duration::from_millis(100));
        let to = PacketSocket::open(balancer, "eth1", Duration::from_millis(100));
        let vip = match ip(VIP[0]) {
            IpAddr::V4(vip) => vip.octets(),
            IpAddr::V6(_) => unreachable!("the first is of IPv4"),
        };
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let forward = move || {
            while !stopped.load(Ordering::Relaxed) {
                let Some(frame) = from.receive() else { continue };
                if frame.get(12..14) == Some(&[8, 0]) && frame.get(30..34) == Some(&vip[..]) {
                    let packet = Encapsulated {
                        inner: frame[14..].to_vec(),
                        ..template.clone()
                    };
                    to.send(&packet.frame());
                }
            }
        };
        let thread = balancer.spawn(forward).unwrap();
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Encapsulator {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[test]
fn a_connection_to_nginx_through_an_encapsulating_balancer_works_and_a_download_is_whole() {
    machine::require_root_nginx_and_curl();
    let [client, balancer, host] = ["client", "balancer", "host"].map(|name| Namespace::new(name).unwrap());
    Namespace::connect(&client, "eth0", &balancer, "eth0").unwrap();
    Namespace::connect(&balancer, "eth1", &host, "eth0").unwrap();
    for (namespace, interface, address) in [
        (&client, "eth0", "10.8.0.2/24"),
        (&balancer, "eth0", "10.8.0.1/24"),
        (&balancer, "eth1", "10.9.0.1/24"),
        (&host, "eth0", "10.9.0.2/24"),
    ] {
        namespace.add_address(interface, address).unwrap();
        namespace.disable_offload(interface).unwrap();
    }
    // Room for the outer headers between the balancer and the host.
    client.set_mtu("eth0", 1400).unwrap();
    client.add_route("0.0.0.0/0", "10.8.0.1").unwrap();
    host.add_route("0.0.0.0/0", "10.9.0.1").unwrap();
    host.add_address("lo", VIP[0]).unwrap();
    // Replies come back through the balancer; requests are for the encapsulator, and not for its stack.
    balancer.sysctl("net/ipv4/conf/eth1/forwarding", "1").unwrap();
    balancer.sysctl("net/ipv4/conf/eth0/forwarding", "0").unwrap();
    let _nginx = Nginx::start(&host, "backend", at(VIP[0], 80));
    let decap = Decap::start(&host, &["--interface", "eth0", "--vip", VIP[0]]);
    for wrapping in Wrapping::ALL {
        let _encapsulator = Encapsulator::start(
            &balancer,
            Encapsulated {
                to: host.link("eth0").unwrap().mac.unwrap(),
                from: balancer.link("eth1").unwrap().mac.unwrap(),
                tags: vec![],
                source: ip(OUTER_SOURCE[0]),
                destination: ip(HOST[0]),
                wrapping,
                ecn: 0,
                options: vec![],
                checksum: true,
                inner: vec![],
                trailer: vec![],
            },
        );
        let mut connection = Connection::open(&client, at(VIP[0], 80)).unwrap();
        assert_eq!(connection.get("/").unwrap(), "backend", "{wrapping:?}");
        assert_eq!(connection.get("/peer").unwrap(), "10.8.0.2", "{wrapping:?}");
        connection.download().finish().unwrap();
    }
    let outcome = decap.end(Signal::SIGTERM);
    assert!(outcome.stdout.contains("dropped 0 packets"), "{outcome:?}");
}

/// Ids of all loaded programs.
fn loaded() -> Vec<u32> {
    aya::programs::loaded_programs()
        .flatten()
        .map(|program| program.id())
        .collect()
}

#[test]
fn an_end_by_any_signal_leaves_nothing() {
    // Children inherit what nohup(1) does, under which they are not to end by a hang-up.
    // SAFETY: no handler is installed.
    unsafe { signal(Signal::SIGHUP, SigHandler::SigDfl) }.unwrap();
    let scene = Scene::new();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGKILL] {
        let decap = scene.decap(&["--interface", "eth1"]);
        for interface in ["eth0", "eth1"] {
            assert!(has_program(&scene.host, interface), "{interface} has no program");
        }
        let ids = decap.program_ids();
        assert!(
            !ids.is_empty() && ids.iter().all(|id| loaded().contains(id)),
            "{ids:?}"
        );
        let outcome = decap.end(signal);
        let graceful = [Signal::SIGTERM, Signal::SIGINT].contains(&signal);
        assert_eq!(outcome.code, if graceful { 0 } else { -1 }, "{outcome:?}");
        assert_eq!(
            outcome.stdout.lines().count(),
            if graceful { 3 } else { 0 },
            "{outcome:?}"
        );
        for interface in ["eth0", "eth1"] {
            assert!(
                !has_program(&scene.host, interface),
                "{signal}: {interface} has a program"
            );
        }
        // The kernel frees programs a moment after the last that held them.
        eventually("the program has gone", Duration::from_secs(10), || {
            let loaded = loaded();
            ids.iter().all(|id| !loaded.contains(id))
        });
    }
}

#[test]
fn an_interface_with_another_program_is_refused_and_the_others_are_left() {
    let scene = Scene::new();
    let index = scene.host.ifindex("eth1").unwrap();
    let _foreign = scene.host.run(|| PassAll::attach(index)).unwrap().unwrap();
    for mode in ["auto", "native", "generic"] {
        let arguments = ["--interface", "eth0", "eth1", "--vip", VIP[0], "--xdp-mode", mode];
        let outcome = Decap::refused(&scene.host, &arguments);
        assert_eq!(outcome.code, 1, "{outcome:?}");
        for part in ["eth1", "another XDP program", "ip link set dev eth1 xdp off"] {
            assert!(outcome.stderr.contains(part), "{mode}: {part}: {outcome:?}");
        }
        assert!(!has_program(&scene.host, "eth0"), "{mode}");
    }
}

#[test]
fn bad_arguments_are_refused_with_their_exit_codes() {
    let scene = Scene::new();
    for (arguments, code, parts) in [
        (
            &["--interface", "eth7", "--vip", VIP[0]][..],
            1,
            &["eth7", "eth0, eth1"][..],
        ),
        (&["--interface", "eth0"], 2, &["--vip"]),
        (&["--vip", VIP[0]], 2, &["--interface"]),
        (
            &["--interface", "eth0", "--vip", "203.0.113"],
            2,
            &["203.0.113'", "an address such as"],
        ),
        (
            &["--interface", "eth0", "--vip", "224.0.0.1"],
            2,
            &["a multicast address"],
        ),
        (
            &["--interface", "eth0", "--vip", VIP[0], "--source", "10/8"],
            2,
            &["a prefix such as"],
        ),
        (
            &["--interface", "eth0", "--vip", VIP[0], "--xdp-mode", "offload"],
            2,
            &["auto, native, generic"],
        ),
    ] {
        let outcome = Decap::refused(&scene.host, arguments);
        assert_eq!(outcome.code, code, "{outcome:?}");
        for part in parts {
            assert!(outcome.stderr.contains(part), "{part}: {outcome:?}");
        }
        assert!(!has_program(&scene.host, "eth0"));
    }
}

#[test]
fn a_host_that_would_drop_what_is_unwrapped_is_told_the_commands_that_mend_it() {
    let scene = Scene::new();
    scene.host.remove_address(ip(VIP[1])).unwrap();
    for (name, value) in [("rp_filter", "1"), ("arp_ignore", "0")] {
        scene
            .host
            .sysctl(&format!("net/ipv4/conf/all/{name}"), value)
            .unwrap();
        scene
            .host
            .sysctl(&format!("net/ipv4/conf/eth0/{name}"), value)
            .unwrap();
    }
    let decap = scene.decap(&[]);
    for command in [
        "`ip address add 2001:db8:1::10/128 dev lo`",
        "`sysctl -w net.ipv4.conf.eth0.rp_filter=2`",
        "`sysctl -w net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2`",
    ] {
        assert!(decap.log().contains(command), "{command}: {}", decap.log());
    }
    drop(decap);
    // What the commands do does mend it.
    scene.host.add_address("lo", VIP[1]).unwrap();
    for (key, value) in [
        ("eth0/rp_filter", "2"),
        ("all/arp_ignore", "1"),
        ("all/arp_announce", "2"),
    ] {
        scene.host.sysctl(&format!("net/ipv4/conf/{key}"), value).unwrap();
    }
    let decap = scene.decap(&[]);
    assert!(!decap.log().contains("WARN"), "{}", decap.log());
    let _servers = scene.servers();
    scene.expect_answers("eth0", b"who is there");
}

#[test]
fn addresses_and_interfaces_that_come_later_are_taken_in() {
    let scene = Scene::new();
    let _servers = scene.servers();
    let decap = Decap::start(&scene.host, &["--interface", "eth0", "eth1", "--vip", VIP[0]]);
    let asked = |scene: &Scene| {
        scene
            .ask("eth0", (0, 0), Wrapping::Ipip, b"who is there")
            .is_some()
    };
    assert!(asked(&scene));

    scene.host.remove_address(ip(HOST[0])).unwrap();
    scene.host.add_address("eth0", "10.9.0.3/24").unwrap();
    eventually("the former address is forgotten", Duration::from_secs(20), || {
        !asked(&scene)
    });
    scene
        .host
        .add_address("eth0", &format!("{}/24", HOST[0]))
        .unwrap();
    eventually("the address is known again", Duration::from_secs(20), || {
        asked(&scene)
    });

    let deleted = scene
        .host
        .command("ip")
        .args(["link", "delete", "eth1"])
        .status()
        .unwrap();
    assert!(deleted.success());
    eventually("the loss is told", Duration::from_secs(20), || {
        decap.log().contains("interface eth1 does not exist")
    });
    assert!(asked(&scene), "the other interface goes on");
    Namespace::connect(&scene.client, "eth1", &scene.host, "eth1").unwrap();
    eventually(
        "the new interface has the program",
        Duration::from_secs(20),
        || decap.log().matches("interface=\"eth1\"").count() == 2,
    );
    assert!(
        scene
            .ask("eth1", (0, 0), Wrapping::Ipip, b"who is there")
            .is_some()
    );
    assert_eq!(decap.end(Signal::SIGTERM).code, 0);
}
