//! Health checks of `dsr`, `ipip` and `gue` take the path of the service's packets: they prove the VIP on the backend.

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};

use aya::{
    EbpfLoader,
    programs::{SchedClassifier, TcAttachType, links::FdLink, tc},
};
use lb_common::abi::{Address, Forward, ProbePath};
use nix::sys::signal::Signal;
use tests::{
    daemon::Daemon,
    decap::Decap,
    http::Connection,
    machine::{self, Pace},
    services::Service,
    udp::UdpEcho,
};
use xlb::{
    config::{HealthCheck, Probe},
    datapath::{
        LinkKind, Pins,
        probes::{self, Probes},
    },
    health::{self, SocketOptions, Target, Turn},
    lab::{Namespace, VlanTag, http_backend::HttpBackend},
    model::Health,
    observe::status::Status,
};

/// By family: the balancer, the backend's host, and the VIP.
const BALANCER: [&str; 2] = ["10.9.0.1", "2001:db8:9::1"];
const HOST: [&str; 2] = ["10.9.0.2", "2001:db8:9::2"];
const VIP: [&str; 2] = ["203.0.113.10", "2001:db8:10::10"];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip(address), port)
}

/// A balancer and a backend's host on one network.
struct Scene {
    balancer: Namespace,
    host: Namespace,
}

impl Scene {
    fn new() -> Self {
        machine::require_root_nginx_and_curl();
        let (balancer, host) = (
            Namespace::new("balancer").unwrap(),
            Namespace::new("host").unwrap(),
        );
        Namespace::connect(&balancer, "eth0", &host, "eth0").unwrap();
        for (prefix, family) in [(24, 0), (64, 1)] {
            balancer
                .add_address("eth0", &format!("{}/{prefix}", BALANCER[family]))
                .unwrap();
            host.add_address("eth0", &format!("{}/{prefix}", HOST[family]))
                .unwrap();
        }
        for interface in ["all", "eth0"] {
            host.sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), "0")
                .unwrap();
        }
        Self { balancer, host }
    }

    fn with_vips() -> Self {
        let scene = Self::new();
        for vip in VIP {
            scene.host.add_address("lo", vip).unwrap();
        }
        scene
    }

    /// On all addresses of both families.
    fn server(&self) -> HttpBackend {
        HttpBackend::start(&self.host, "a", at("::", 80)).unwrap()
    }

    fn decap(&self) -> Decap {
        Decap::start(
            &self.host,
            &["--interface", "eth0", "--vip", VIP[0], "--vip", VIP[1]],
        )
    }

    /// One for each family: `web-0` and `web-1`.
    fn services(forward: &str, health: &str) -> [Service; 2] {
        [0, 1].map(|family| Self::service(&format!("web-{family}"), family, forward, health))
    }

    fn service(name: &str, family: usize, forward: &str, health: &str) -> Service {
        let pace = Pace::of_this_machine();
        Service::tcp(name)
            .text("vip", VIP[family])
            .text("forward", forward)
            .health(&format!(
                "{health}\ninterval = \"{0}ms\"\ntimeout = \"{0}ms\"",
                pace.interval.as_millis()
            ))
            .backend("a", HOST[family])
    }

    /// Programs that are on the balancer's interface, by this kind of link.
    fn programs(&self, kind: LinkKind) -> usize {
        [TcAttachType::Ingress, TcAttachType::Egress]
            .map(|place| match kind {
                LinkKind::Tcx => {
                    let query = || SchedClassifier::query_tcx("eth0", place);
                    self.balancer.run(query).unwrap().unwrap().1.len()
                }
                LinkKind::Clsact => {
                    let place = if matches!(place, TcAttachType::Ingress) {
                        "ingress"
                    } else {
                        "egress"
                    };
                    let mut tc = self.balancer.command("tc");
                    tc.args(["filter", "show", "dev", "eth0", place]);
                    let listed = tc.output().unwrap();
                    assert!(listed.status.success(), "{listed:?}");
                    String::from_utf8(listed.stdout)
                        .unwrap()
                        .matches(" direct-action ")
                        .count()
                }
            })
            .iter()
            .sum()
    }
}

/// Waits until the backends of all services have this health, and gives what their last probes said.
#[track_caller]
fn all_are(daemon: &Daemon<'_>, health: Health) -> Vec<String> {
    daemon.wait_for(&format!("all backends are {health:?}"), |status| {
        let mut backends = status.services.iter().flat_map(|service| &service.backends);
        backends.all(|backend| backend.health == health)
    });
    let services = daemon.status().services.into_iter();
    services
        .flat_map(|service| service.backends)
        .map(|backend| backend.probe.unwrap_or_default())
        .collect()
}

#[test]
fn a_backend_of_dsr_is_up_while_it_has_the_vip_whatever_its_own_address_answers() {
    let scene = Scene::new();
    let _server = scene.server();
    let mut daemon = Daemon::new(&scene.balancer);
    daemon.configure(&["eth0"], &Scene::services("dsr", "type = \"http\""));
    daemon.start();
    all_are(&daemon, Health::Down);
    for family in [0, 1] {
        // Asked without the mark of a path, it answers.
        let own = at(HOST[family], 80);
        let answer = Connection::open(&scene.balancer, own).unwrap().get("/").unwrap();
        assert_eq!(answer, "a");
        let attempt = format!("connect to {own} for {}: ", VIP[family]);
        // An IPv6 address of the balancer's may not have been ready for the first probe.
        daemon.wait_for("it is told that nobody answers", |status| {
            let said = status.services[family].backends[0].probe.as_deref();
            let why = said.and_then(|said| said.strip_prefix(&attempt));
            // Linux 6.1 answers that it has no route to an IPv6 address which is not its own.
            why.is_some_and(|why| {
                why.starts_with("timed out after ") || family == 1 && why == "network is unreachable"
            })
        });
    }
    for vip in VIP {
        scene.host.add_address("lo", vip).unwrap();
    }
    let said = all_are(&daemon, Health::Up);
    assert_eq!(said[0], "GET http://10.9.0.2:80/ for 203.0.113.10 succeeded");
    for vip in VIP {
        scene.host.remove_address(ip(vip)).unwrap();
    }
    all_are(&daemon, Health::Down);
}

#[test]
fn a_backend_without_the_vip_that_forwards_packets_is_down() {
    let scene = Scene::new();
    let _server = scene.server();
    // It sends packets for the VIP back to the balancer, which has a backend that answers.
    let other = Namespace::new("other").unwrap();
    Namespace::connect(&scene.balancer, "eth1", &other, "eth0").unwrap();
    // As network cards do: XDP sends on what came in, and would send checksums that are not filled in yet.
    for (namespace, interface) in [(&scene.balancer, "eth0"), (&scene.host, "eth0"), (&other, "eth0")] {
        namespace.disable_offload(interface).unwrap();
    }
    scene.balancer.add_address("eth1", "10.8.0.1/24").unwrap();
    other.add_address("eth0", "10.8.0.2/24").unwrap();
    other.add_address("lo", VIP[0]).unwrap();
    other.add_route("0.0.0.0/0", "10.8.0.1").unwrap();
    other.pass_all("eth0").unwrap();
    let _other_server = HttpBackend::start(&other, "other", at("0.0.0.0", 80)).unwrap();
    scene.host.sysctl("net/ipv4/ip_forward", "1").unwrap();
    scene.host.add_route("0.0.0.0/0", BALANCER[0]).unwrap();
    let mut daemon = Daemon::new(&scene.balancer);
    let service = Scene::service("web", 0, "dsr", "type = \"tcp\"").backend("other", "10.8.0.2");
    daemon.configure(&["eth0", "eth1"], &[service]);
    daemon.start();
    let health = |status: &Status| {
        let backends = status.services[0].backends.iter();
        backends.map(|backend| backend.health).collect::<Vec<_>>()
    };
    daemon.wait_for("only the other one is up", |status| {
        health(status) == [Health::Down, Health::Up]
    });
    // The other one could answer for it only now, and would have to twice.
    let pace = Pace::of_this_machine();
    thread::sleep(4 * pace.interval + pace.timeout);
    assert_eq!(health(&daemon.status()), [Health::Down, Health::Up]);
}

/// Its own address answers, so that a probe which takes another path would have it up.
#[test]
fn a_reload_that_is_refused_leaves_the_probes_on_their_path() {
    let scene = Scene::new();
    let _server = scene.server();
    let mut daemon = Daemon::new(&scene.balancer);
    let service = || Scene::service("web", 0, "dsr", "type = \"tcp\"");
    daemon.configure(&["eth0"], &[service()]);
    daemon.start();
    all_are(&daemon, Health::Down);
    daemon.configure(&["eth0", "eth9"], &[service()]);
    // A target that changes is asked at once: the own address would answer often enough.
    for _ in 0..20 {
        let outcome = daemon.xlb(&["reload"]);
        assert_eq!(outcome.code, 1, "{outcome:?}");
        thread::sleep(Duration::from_millis(20));
    }
    let status = daemon.status();
    assert_eq!(status.services[0].backends[0].health, Health::Down);
    assert!(status.problems.is_empty(), "{:?}", status.problems);
    let log = daemon.log();
    assert!(
        !log.contains("probe paths") && !log.contains("backend is up"),
        "{log}"
    );
}

#[test]
fn a_request_that_would_fill_a_packet_leaves_room_for_the_outer_headers() {
    for forward in ["ipip", "gue"] {
        let scene = Scene::with_vips();
        let _decap = scene.decap();
        let _server = scene.server();
        let mut daemon = Daemon::new(&scene.balancer);
        // With what else is in the request, some of them have a length that fits into 1500 bytes just so.
        let services: Vec<_> = (0..20)
            .map(|number| {
                let path = format!("/bytes/{}1", "0".repeat(1250 + 10 * number));
                let health = format!("type = \"http\"\npath = \"{path}\"\nport = 80");
                let name = format!("web-{number}");
                Scene::service(&name, 0, forward, &health).with("port", 8000 + number)
            })
            .collect();
        daemon.configure(&["eth0"], &services);
        daemon.start();
        all_are(&daemon, Health::Up);
    }
}

#[test]
fn a_backend_of_ipip_and_gue_is_up_while_it_unwraps() {
    for forward in ["ipip", "gue"] {
        let scene = Scene::with_vips();
        let _server = scene.server();
        let mut daemon = Daemon::new(&scene.balancer);
        daemon.configure(&["eth0"], &Scene::services(forward, "type = \"http\""));
        daemon.start();
        all_are(&daemon, Health::Down);
        let decap = scene.decap();
        all_are(&daemon, Health::Up);
        let outcome = decap.end(Signal::SIGKILL);
        assert_eq!(outcome.code, -1, "{outcome:?}");
        all_are(&daemon, Health::Down);
        let decap = scene.decap();
        all_are(&daemon, Health::Up);
        let outcome = decap.end(Signal::SIGTERM);
        // Nothing else was unwrapped, and all in the way that was asked for.
        let unwrapped = outcome.stdout.lines().next().unwrap();
        assert!(unwrapped.contains(forward), "{outcome:?}");
    }
}

#[test]
fn probes_of_every_kind_travel() {
    // Longer than a segment, so that it leaves in several.
    let path = format!("/bytes/{}1", "0".repeat(3000));
    for forward in ["dsr", "ipip", "gue"] {
        let scene = Scene::with_vips();
        let _decap = (forward != "dsr").then(|| scene.decap());
        let _server = scene.server();
        let _echo = [0, 1].map(|family| UdpEcho::start(&scene.host, "echo", at(VIP[family], 53)));
        let mut daemon = Daemon::new(&scene.balancer);
        let healths = [
            ("tcp", "type = \"tcp\"".to_owned()),
            ("http", format!("type = \"http\"\npath = \"{path}\"")),
            (
                "udp",
                "type = \"udp\"\nport = 53\nexpect = \"echo 10.9.0.1\"".to_owned(),
            ),
        ];
        let service = |number: usize, family: usize| {
            let (name, health) = &healths[number];
            let health = health.replace("10.9.0.1", BALANCER[family]);
            let health = if *name == "udp" {
                health
            } else {
                format!("{health}\nport = 80")
            };
            Scene::service(&format!("{name}-{family}"), family, forward, &health).with("port", 8000 + number)
        };
        let services: Vec<_> = (0..3)
            .flat_map(|number| [0, 1].map(|family| service(number, family)))
            .collect();
        daemon.configure(&["eth0"], &services);
        daemon.start();
        all_are(&daemon, Health::Up);
    }
}

#[test]
fn what_refuses_a_probe_is_told_at_once() {
    for forward in ["dsr", "ipip", "gue"] {
        let scene = Scene::with_vips();
        let _decap = (forward != "dsr").then(|| scene.decap());
        let mut daemon = Daemon::new(&scene.balancer);
        let [tcp, tcp_v6] = Scene::services(forward, "type = \"tcp\"\nport = 81");
        let [udp, udp_v6] =
            Scene::services(forward, "type = \"udp\"\nport = 82").map(|service| service.with("port", 82));
        let services = [
            tcp,
            tcp_v6,
            udp.text("name", "udp"),
            udp_v6.text("name", "udp-v6"),
        ];
        daemon.configure(&["eth0"], &services);
        daemon.start();
        for said in all_are(&daemon, Health::Down) {
            assert!(said.ends_with(": connection refused"), "{forward}: {said}");
        }
    }
}

#[test]
fn a_balancer_that_has_the_vip_itself_probes_all_the_same() {
    let scene = Scene::with_vips();
    let _server = scene.server();
    for (name, value) in [("arp_ignore", "1"), ("arp_announce", "2")] {
        scene
            .host
            .sysctl(&format!("net/ipv4/conf/all/{name}"), value)
            .unwrap();
    }
    let mut daemon = Daemon::new(&scene.balancer);
    let services = Scene::services("dsr", "type = \"tcp\"").map(|service| service.with("assign-vip", true));
    daemon.configure(&["eth0"], &services);
    daemon.start();
    all_are(&daemon, Health::Up);
    // Also a refusal, which comes with the VIP as its source.
    let services =
        Scene::services("dsr", "type = \"udp\"\nport = 82").map(|service| service.with("assign-vip", true));
    daemon.configure(&["eth0"], &services);
    daemon.done(&["reload"]);
    for said in all_are(&daemon, Health::Down) {
        assert!(said.ends_with(": connection refused"), "{said}");
    }
}

#[test]
fn backends_behind_one_vlan_tag_and_behind_two_are_probed() {
    if !machine::has_vlan_devices() {
        eprintln!("not run: this kernel has no VLAN devices (802.1Q)");
        return;
    }
    for forward in ["dsr", "ipip", "gue"] {
        let scene = Scene::with_vips();
        for (namespace, last) in [(&scene.balancer, 1), (&scene.host, 2)] {
            for (name, below, tag) in [
                ("customer", "eth0", VlanTag::Customer(100)),
                ("service", "eth0", VlanTag::Service(200)),
                ("stacked", "service", VlanTag::Customer(7)),
            ] {
                namespace.add_vlan(name, below, tag).unwrap();
            }
            for (name, network) in [("customer", "10.8.1"), ("stacked", "10.8.2")] {
                namespace
                    .add_address(name, &format!("{network}.{last}/24"))
                    .unwrap();
                namespace
                    .sysctl(&format!("net/ipv4/conf/{name}/rp_filter"), "0")
                    .unwrap();
            }
        }
        let _server = scene.server();
        let mut daemon = Daemon::new(&scene.balancer);
        let service = Scene::service("web", 0, forward, "type = \"http\"")
            .without("a")
            .backend("customer", "10.8.1.2")
            .backend("stacked", "10.8.2.2");
        daemon.configure(&["eth0"], &[service]);
        daemon.start();
        if forward == "dsr" {
            all_are(&daemon, Health::Up);
            scene.host.remove_address(ip(VIP[0])).unwrap();
            all_are(&daemon, Health::Down);
        } else {
            all_are(&daemon, Health::Down);
            let _decap = scene.decap();
            all_are(&daemon, Health::Up);
        }
    }
}

#[test]
fn the_programs_are_there_while_a_daemon_needs_them() {
    let scene = Scene::with_vips();
    let _server = scene.server();
    let mut daemon = Daemon::new(&scene.balancer);
    let with = |forward| Scene::services(forward, "type = \"tcp\"");
    daemon.configure(&["eth0"], &with("nat"));
    daemon.start();
    all_are(&daemon, Health::Up);
    let programs = || scene.programs(LinkKind::of_this_kernel());
    let left_behind = match LinkKind::of_this_kernel() {
        LinkKind::Tcx => 0,
        LinkKind::Clsact => 2,
    };
    assert_eq!(programs(), 0);
    daemon.configure(&["eth0"], &with("dsr"));
    for _ in 0..2 {
        daemon.done(&["reload"]);
        all_are(&daemon, Health::Up);
        assert_eq!(programs(), 2);
    }
    daemon.kill();
    assert_eq!(programs(), left_behind);
    daemon.start();
    all_are(&daemon, Health::Up);
    assert_eq!(programs(), 2);
    daemon.terminate();
    assert_eq!(programs(), 0);
    daemon.start();
    daemon.kill();
    assert_eq!(programs(), left_behind);
    daemon.configure(&["eth0"], &with("nat"));
    daemon.start();
    assert_eq!(programs(), 0, "no service needs them any more");
}

#[test]
fn programs_of_probes_and_of_local_services_are_beside_one_another() {
    let scene = Scene::with_vips();
    let _server = scene.server();
    let near = at("127.0.0.1", 8000);
    let _near = HttpBackend::start(&scene.balancer, "near", near).unwrap();
    let vip = at("203.0.113.20", 80);
    scene.host.add_route("203.0.113.20/32", BALANCER[0]).unwrap();
    let local = Service::tcp("near")
        .text("vip", &vip.ip().to_string())
        .text("forward", "local")
        .with("assign-vip", true)
        .backend("near", &near.to_string());
    let [dsr, _] = Scene::services("dsr", "type = \"tcp\"");
    let mut daemon = Daemon::new(&scene.balancer);
    daemon.configure(&["eth0"], &[]);
    daemon.start();
    for (has_dsr, has_local) in [
        (false, true),
        (true, true),
        (true, false),
        (true, true),
        (false, true),
    ] {
        let mut services = Vec::new();
        services.extend(has_dsr.then(|| dsr.clone()));
        services.extend(has_local.then(|| local.clone()));
        daemon.configure(&["eth0"], &services);
        daemon.done(&["reload"]);
        let programs = 2 * services.len();
        assert_eq!(scene.programs(LinkKind::of_this_kernel()), programs);
        all_are(&daemon, Health::Up);
        if has_local {
            let answer = Connection::open(&scene.host, vip).unwrap().get("/").unwrap();
            assert_eq!(answer, "near");
        }
        if has_dsr {
            scene.host.remove_address(ip(VIP[0])).unwrap();
            daemon.wait_for("the backend without the VIP is down", |status| {
                status.services[0].backends[0].health == Health::Down
            });
            scene.host.add_address("lo", VIP[0]).unwrap();
            all_are(&daemon, Health::Up);
        }
    }
}

#[test]
fn detach_leaves_none_of_the_programs_nor_what_they_hung_on() {
    for is_killed in [false, true] {
        let scene = Scene::with_vips();
        let _server = scene.server();
        let mut daemon = Daemon::new(&scene.balancer);
        daemon.configure(&["eth0"], &Scene::services("dsr", "type = \"tcp\""));
        daemon.start();
        all_are(&daemon, Health::Up);
        if is_killed {
            daemon.kill();
        } else {
            daemon.terminate();
        }
        daemon.done(&["detach"]);
        assert_eq!(scene.programs(LinkKind::of_this_kernel()), 0);
        let finds_none = || tc::qdisc_add_clsact("eth0").is_ok();
        assert!(scene.balancer.run(finds_none).unwrap());
        assert!(!daemon.pins().has_instance());
    }
}

#[test]
fn where_the_kernel_takes_no_program_backends_are_asked_themselves_and_the_status_says_so() {
    if LinkKind::of_this_kernel() == LinkKind::Clsact {
        eprintln!("not run: this kernel takes any number of programs");
        return;
    }
    let scene = Scene::new();
    let _server = scene.server();
    // The kernel has room for some 64 programs (BPF_MPROG_MAX).
    let mut others: Vec<FdLink> = Vec::new();
    loop {
        let mut loader = EbpfLoader::new();
        loader.map_max_entries("PATHS", 1).map_max_entries("PROBES", 64);
        let mut ebpf = loader.load(probes::OBJECT).unwrap();
        let program: &mut SchedClassifier = ebpf.program_mut("xlb_probe_in").unwrap().try_into().unwrap();
        program.load().unwrap();
        let attach = || program.attach("eth0", TcAttachType::Ingress);
        let Ok(id) = scene.balancer.run(attach).unwrap() else {
            break;
        };
        others.push(program.take_link(id).unwrap().try_into().unwrap());
        assert!(others.len() < 1000, "it always has room for one more");
    }
    let mut daemon = Daemon::new(&scene.balancer);
    daemon.configure(&["eth0"], &Scene::services("dsr", "type = \"tcp\""));
    daemon.start();
    assert_eq!(
        all_are(&daemon, Health::Up)[0],
        "connect to 10.9.0.2:80 succeeded"
    );
    let problems = daemon.status().problems;
    assert_eq!(problems.len(), 1, "{problems:?}");
    let words = "health checks of dsr, ipip and gue ask the backends' own addresses and do not find out whether the \
                 backends have the VIPs: attach failed on probe_in of eth0: ";
    assert!(problems[0].starts_with(words), "{problems:?}");
    // As soon as there is room, they take their path.
    drop(others);
    daemon.done(&["reload"]);
    all_are(&daemon, Health::Down);
    assert_eq!(daemon.status().problems, [""; 0]);
}

/// Probes a backend by the programs, attached in this way.
fn probe_by(probes: &Probes, path: &ProbePath) -> Result<(), String> {
    let target = Target {
        service: "web".into(),
        backend: "a".into(),
        address: SocketAddr::new(path.backend.into(), 80),
        check: HealthCheck {
            probe: Probe::Tcp { port: None },
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
            rise: 1,
            fall: 1,
        },
        socket: SocketOptions {
            mark: probes.mark(path),
            ..SocketOptions::default()
        },
        vip: Some(path.vip.into()),
        initial: Health::Unknown,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime
        .block_on(health::probe(&target, &Turn::default()))
        .map_err(|error| error.to_string())
}

#[test]
fn kernels_without_tcx_have_filters_of_clsact_and_no_second_one_after_a_kill() {
    let scene = Scene::with_vips();
    let _server = scene.server();
    let interfaces = ["eth0".to_owned()];
    let path = |family: usize| ProbePath {
        backend: ip(HOST[family]).into(),
        vip: ip(VIP[family]).into(),
        forward: Forward::Dsr.number(),
        ..ProbePath::default()
    };
    let filters = || scene.programs(LinkKind::Clsact);
    let pins = Pins::new(&format!("probes-{}", std::process::id()));
    let attach = || {
        let mut probes = Probes::load(LinkKind::Clsact, pins.clone()).unwrap();
        probes.set_paths(&[path(0), path(1)].into()).unwrap();
        probes.attach(&interfaces).unwrap();
        // Again, as every repair does.
        probes.attach(&interfaces).unwrap();
        probes
    };
    scene
        .balancer
        .run(|| {
            // As one that is killed leaves them.
            std::mem::forget(attach());
            assert_eq!(filters(), 2);
            let probes = attach();
            assert_eq!(filters(), 2);
            for family in [0, 1] {
                let result = probe_by(&probes, &path(family));
                assert_eq!(result, Ok(()), "{family}");
            }
            scene.host.remove_address(ip(VIP[0])).unwrap();
            let result = probe_by(&probes, &path(0)).unwrap_err();
            assert!(result.contains("timed out"), "{result}");
            drop(probes);
            assert_eq!(filters(), 0);
            std::mem::forget(attach());
            probes::remove_left_behind(&pins).unwrap();
            assert_eq!(filters(), 0);
            std::mem::forget(attach());
            assert!(pins.remove_all().unwrap());
            assert_eq!(filters(), 0);
        })
        .unwrap();
}

#[test]
fn a_path_that_goes_and_comes_back_is_followed_and_others_keep_their_marks() {
    machine::require_root_nginx_and_curl();
    let mut probes = Probes::load(LinkKind::of_this_kernel(), Pins::new("probes")).unwrap();
    let path = |host: u8| ProbePath {
        backend: Address::from(IpAddr::from([10, 0, 0, host])),
        ..ProbePath::default()
    };
    probes.set_paths(&[path(1), path(2)].into()).unwrap();
    let (one, two) = (probes.mark(&path(1)), probes.mark(&path(2)));
    assert_eq!((one, two), (Some(0x786c_0001), Some(0x786c_0002)));
    probes.set_paths(&[path(2)].into()).unwrap();
    assert_eq!((probes.mark(&path(1)), probes.mark(&path(2))), (None, two));
    probes.set_paths(&[path(2), path(3)].into()).unwrap();
    assert_eq!((probes.mark(&path(3)), probes.mark(&path(2))), (one, two));
}
