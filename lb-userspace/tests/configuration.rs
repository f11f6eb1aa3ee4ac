//! The configuration from its text: what is accepted, and what is told about everything else.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use proptest::prelude::*;
use xlb::config::{
    self, Command, Config, ConfigError, Diagnostics, Forward, HealthCheck, IPIP_SOURCE, NewFlowCap,
    PortRange, Probe, Protocol, Service, Strategy as Spread, Trust, WhenAllDown, XdpMode, raw::KEYS,
};

/// The smallest that balances something.
const SMALLEST: &str = r#"
interfaces = ["eth0"]
[[service]]
name = "web"
vip = "203.0.113.10"
port = 80
protocol = "tcp"
[[service.backend]]
address = "10.0.0.11:8080"
[[service.backend]]
address = "10.0.0.12:8080"
"#;

/// Every key but those of the API, each with another value than its default.
const EVERY_KEY: &str = r#"
interfaces = ["eth0", "bond0.100"]
xdp-mode = "native"
[flow-table]
size = 1_048_576
tcp-idle-timeout = "2h 30m"
udp-idle-timeout = "500ms"
[hash]
seed-file = "/var/lib/xlb/seed"
[ipip]
source-v4 = "100.64.0.0/10"
source-v6 = "2001:db8:f::/112"
[api]
socket = "/run/other.sock"
[[service]]
name = "web"
vip = "203.0.113.10"
port = ["8000-8099", 443, 80]
protocol = "tcp"
strategy = "ip-hash"
forward = "full-nat"
drain-timeout = "0s"
assign-vip = true
allow = ["192.0.2.0/24", "198.51.100.7/32"]
deny = ["192.0.2.128/25", "0.0.0.0/0"]
new-flow-rate = 100
new-flow-burst = 250
new-flow-prefix-v4 = 24
new-flow-prefix-v6 = 56
when-all-down = "try-all"
slow-start = "30s"
min-healthy = 2
reset-on-removal = true
[service.health]
type = "http"
path = "/healthz?deep=1"
host = "www.example.com"
port = 9000
interval = "500ms"
rise = 1
fall = 5
[[service.backend]]
name = "a"
address = "10.0.0.11"
weight = 0
[[service.backend]]
name = "b"
address = "10.0.0.12:8080"
weight = 65535
max-connections = 4294967295
[[service.backend]]
name = "c"
address = "10.0.0.13"
backup = true
"#;

#[test]
fn ten_lines_are_a_configuration_and_the_rest_is_defaults() {
    let config = parsed(SMALLEST);
    assert_eq!(config.interfaces, ["eth0"]);
    assert_eq!(config.xdp_mode, XdpMode::Auto);
    assert_eq!(config.flow_table.size, None);
    assert_eq!(config.flow_table.tcp_idle_timeout, Duration::from_secs(3600));
    assert_eq!(config.flow_table.udp_idle_timeout, Duration::from_secs(60));
    assert_eq!(config.seed_file, Path::new("/etc/xlb/seed"));
    assert_eq!(config.socket, None);
    assert_eq!(config.ipip_source, IPIP_SOURCE);
    let service = &config.services[0];
    assert_eq!(service.name, "web");
    assert_eq!(service.vip, "203.0.113.10".parse::<IpAddr>().unwrap());
    assert_eq!(service.ports, [PortRange { first: 80, last: 80 }]);
    assert_eq!(service.protocol, Protocol::Tcp);
    assert_eq!(service.strategy, Spread::ConsistentHash);
    assert_eq!(service.forward, Forward::Nat);
    assert_eq!(service.drain_timeout, Duration::from_secs(60));
    assert!(!service.assign_vip);
    assert_eq!(
        (service.allow.as_slice(), service.deny.as_slice()),
        (&[][..], &[][..])
    );
    assert_eq!(service.new_flow_cap, None);
    assert_eq!(service.when_all_down, WhenAllDown::Reject);
    assert_eq!((service.slow_start, service.min_healthy), (Duration::ZERO, 1));
    assert!(!service.reset_on_removal);
    assert!(
        service
            .backends
            .iter()
            .all(|backend| backend.max_connections.is_none() && !backend.backup)
    );
    assert_eq!(
        service.health,
        HealthCheck {
            probe: Probe::Tcp { port: None },
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(1),
            rise: 2,
            fall: 3,
        }
    );
    let backends: Vec<_> = service
        .backends
        .iter()
        .map(|backend| {
            (
                backend.name.as_str(),
                backend.address.to_string(),
                backend.port,
                backend.weight,
            )
        })
        .collect();
    assert_eq!(
        backends,
        [
            ("10.0.0.11:8080", "10.0.0.11".to_owned(), Some(8080), 100),
            ("10.0.0.12:8080", "10.0.0.12".to_owned(), Some(8080), 100),
        ]
    );
}

#[test]
fn defaults_that_are_written_out_change_nothing() {
    let written_out = SMALLEST
        .replace("interfaces = [\"eth0\"]", "interfaces = [\"eth0\"]\nxdp-mode = \"auto\"\nflow-table = { size = \"auto\", tcp-idle-timeout = \"1h\", udp-idle-timeout = \"60s\" }\nhash.seed-file = \"/etc/xlb/seed\"\nipip = { source-v4 = \"172.16.0.0/16\", source-v6 = \"100::/96\" }\napi = {}")
        .replace(
            "protocol = \"tcp\"",
            "protocol = \"tcp\"\nstrategy = \"consistent-hash\"\nforward = \"nat\"\ndrain-timeout = \"1m\"\nassign-vip = false\n\
             allow = [\"0.0.0.0/0\"]\ndeny = []\nwhen-all-down = \"reject\"\nslow-start = \"0s\"\nmin-healthy = 1\nreset-on-removal = false\n\
             health = { type = \"tcp\", interval = \"2s\", timeout = \"1s\", rise = 2, fall = 3 }",
        )
        .replace("address = \"10.0.0.11:8080\"", "address = \"10.0.0.11:8080\"\nweight = 100\nbackup = false");
    assert_eq!(parsed(&written_out), parsed(SMALLEST));
}

#[test]
fn every_key_can_say_something_else() {
    let config = parsed(EVERY_KEY);
    assert_eq!(config.interfaces, ["eth0", "bond0.100"]);
    assert_eq!(config.xdp_mode, XdpMode::Native);
    assert_eq!(config.flow_table.size, Some(1 << 20));
    assert_eq!(config.flow_table.tcp_idle_timeout, Duration::from_secs(9000));
    assert_eq!(config.flow_table.udp_idle_timeout, Duration::from_millis(500));
    assert_eq!(config.seed_file, Path::new("/var/lib/xlb/seed"));
    assert_eq!(config.socket.as_deref(), Some(Path::new("/run/other.sock")));
    let ipip_source = (
        config.ipip_source.v4.to_string(),
        config.ipip_source.v6.to_string(),
    );
    assert_eq!(
        ipip_source,
        ("100.64.0.0/10".to_owned(), "2001:db8:f::/112".to_owned())
    );
    let service = &config.services[0];
    let prefixes = |prefixes: &[_]| -> Vec<String> { prefixes.iter().map(ToString::to_string).collect() };
    assert_eq!(prefixes(&service.allow), ["192.0.2.0/24", "198.51.100.7/32"]);
    assert_eq!(prefixes(&service.deny), ["192.0.2.128/25", "0.0.0.0/0"]);
    assert_eq!(
        service.new_flow_cap,
        Some(NewFlowCap {
            rate: 100,
            burst: 250,
            prefix_v4: 24,
            prefix_v6: 56,
        })
    );
    assert_eq!(service.when_all_down, WhenAllDown::TryAll);
    assert_eq!(
        (service.slow_start, service.min_healthy),
        (Duration::from_secs(30), 2)
    );
    assert!(service.reset_on_removal);
    let limits: Vec<_> = service
        .backends
        .iter()
        .map(|backend| (backend.max_connections, backend.backup))
        .collect();
    assert_eq!(limits, [(None, false), (Some(u32::MAX), false), (None, true)]);
    let ports: Vec<_> = service
        .ports
        .iter()
        .map(|range| (range.first, range.last))
        .collect();
    assert_eq!(ports, [(80, 80), (443, 443), (8000, 8099)]);
    assert_eq!(
        (service.strategy, service.forward),
        (Spread::IpHash, Forward::FullNat)
    );
    assert_eq!(
        (service.drain_timeout, service.assign_vip),
        (Duration::ZERO, true)
    );
    assert_eq!(
        service.health,
        HealthCheck {
            probe: Probe::Http {
                port: Some(9000),
                path: "/healthz?deep=1".to_owned(),
                host: Some("www.example.com".to_owned()),
            },
            interval: Duration::from_millis(500),
            // Not longer than the interval.
            timeout: Duration::from_millis(500),
            rise: 1,
            fall: 5,
        }
    );
    assert_eq!((service.backends[0].port, service.backends[0].weight), (None, 0));
    assert_eq!(
        (service.backends[1].port, service.backends[1].weight),
        (Some(8080), 65535)
    );
}

/// The probe of the smallest configuration with this table `[service.health]`.
fn probe(health: &str) -> Probe {
    let table = format!("[service.health]\n{health}\n[[service.backend]]\naddress = \"10.0.0.11:8080\"\n");
    let text = SMALLEST.replacen("[[service.backend]]\naddress = \"10.0.0.11:8080\"\n", &table, 1);
    parsed(&text).services[0].health.probe.clone()
}

#[test]
fn each_probe_has_its_keys_and_their_defaults() {
    assert_eq!(
        probe("type = \"grpc\""),
        Probe::Grpc {
            port: None,
            host: None,
            service: String::new(),
        }
    );
    assert_eq!(
        probe("type = \"grpc\"\nservice = \"orders.v1.Orders\"\nhost = \"orders.example\"\nport = 50051"),
        Probe::Grpc {
            port: Some(50051),
            host: Some("orders.example".to_owned()),
            service: "orders.v1.Orders".to_owned(),
        }
    );
    let udp = |port, send: Option<&[u8]>, expect: Option<&[u8]>| Probe::Udp {
        port,
        send: send.map(<[u8]>::to_vec),
        expect: expect.map(<[u8]>::to_vec),
    };
    assert_eq!(probe("type = \"udp\""), udp(None, None, None));
    assert_eq!(
        probe("type = \"udp\"\nsend = \"ping\\r\\n\"\nexpect = \"pong\"\nport = 53"),
        udp(Some(53), Some(b"ping\r\n"), Some(b"pong"))
    );
    assert_eq!(
        probe("type = \"udp\"\nsend-hex = \"00 01ffFE\"\nexpect-hex = \"80\""),
        udp(None, Some(&[0, 1, 0xff, 0xfe]), Some(&[0x80]))
    );
    assert_eq!(probe("type = \"udp\"\nsend = \"\""), udp(None, Some(&[]), None));
    assert_eq!(probe("type = \"icmp\""), Probe::Icmp);
    let exec = |port, arguments: &[&str]| Probe::Exec {
        port,
        command: Command {
            program: PathBuf::from("/usr/lib/xlb/check"),
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
        },
    };
    assert_eq!(
        probe("type = \"exec\"\ncommand = [\"/usr/lib/xlb/check\"]"),
        exec(None, &[])
    );
    assert_eq!(
        probe("type = \"exec\"\ncommand = [\"/usr/lib/xlb/check\", \"a b\", \"\"]\nport = 1"),
        exec(Some(1), &["a b", ""])
    );
}

#[test]
fn the_name_in_the_certificate_is_that_of_the_host_unless_another_is_given() {
    let name = |health: &str| match probe(&format!("type = \"https\"\nverify = false\n{health}")) {
        Probe::Https { server_name, .. } => server_name.map(|name| name.to_str().into_owned()),
        other => panic!("{other:?}"),
    };
    assert_eq!(name(""), None);
    for (host, expected) in [
        ("www.example.com", "www.example.com"),
        ("www.example.com:8443", "www.example.com"),
        ("10.0.0.11:8443", "10.0.0.11"),
        ("[2001:db8::11]:8443", "2001:db8::11"),
        ("2001:db8::11", "2001:db8::11"),
    ] {
        assert_eq!(name(&format!("host = \"{host}\"")).as_deref(), Some(expected));
    }
    assert_eq!(
        name("host = \"www.example.com\"\nserver-name = \"inner.example\"").as_deref(),
        Some("inner.example")
    );
    // A host that no certificate can be for does not matter then.
    assert_eq!(
        name("host = \"a..b\"\nserver-name = \"10.0.0.1\"").as_deref(),
        Some("10.0.0.1")
    );
}

/// The certificate of an authority as PEM.
fn authority() -> String {
    let mut parameters = rcgen::CertificateParams::new([]).expect("no name is no bad name");
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().expect("there is randomness");
    parameters
        .self_signed(&key)
        .expect("an authority can be made")
        .pem()
}

#[test]
fn an_https_probe_trusts_the_system_a_file_or_anybody() {
    let trust = |health: &str| match probe(&format!("type = \"https\"\n{health}")) {
        Probe::Https { trust, .. } => trust,
        other => panic!("{other:?}"),
    };
    let count = |trust: &Trust| match trust {
        Trust::Authorities(authorities) => authorities.len(),
        Trust::Anybody => 0,
    };
    let system = trust("");
    assert!(count(&system) > 2, "{system:?}");
    assert_eq!(trust("verify = true"), system);
    assert_eq!(trust("verify = false"), Trust::Anybody);

    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ca.pem");
    let in_file = format!("ca-file = {:?}", file.display().to_string());
    fs::write(&file, ["# two of them\n", &authority(), &authority()].concat()).unwrap();
    let two = trust(&in_file);
    assert_eq!(count(&two), 2);
    assert_eq!(trust(&in_file), two);
    // Read anew each time: so a reload takes over what has changed.
    fs::write(&file, authority()).unwrap();
    assert_ne!(trust(&in_file), two);
    assert_ne!(two, system);
}

/// The smallest configuration with this in its table `health`; all of it is in line 7.
fn with_health(inline: &str) -> String {
    SMALLEST.replace(
        "protocol = \"tcp\"\n",
        &format!("protocol = \"tcp\"\nhealth = {{ {inline} }}\n"),
    )
}

#[test]
fn a_damaged_file_of_authorities_is_told_where_it_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ca.pem");
    let nonsense = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
    let key = rcgen::KeyPair::generate().unwrap().serialize_pem();
    for (contents, expected) in [
        (String::new(), "holds no certificate"),
        (key, "holds no certificate"),
        (
            authority() + nonsense,
            "has a certificate that cannot be used, number 2",
        ),
        (authority().replace("-----END", "-----FIN"), "is damaged"),
        ("x".repeat(5 << 20), "cannot be read: longer than 4194304 bytes"),
    ] {
        fs::write(&file, contents).unwrap();
        let start = "type = \"https\", ca-file = ";
        let text = with_health(&format!("{start}{:?}", file.display().to_string()));
        let told = rejected(&text).located();
        let place = (told.len(), told[0].line, told[0].column);
        assert_eq!(place, (1, 8, "health = { ".len() + start.len() + 1), "{told:#?}");
        let words = format!("{} {expected}", file.display());
        assert!(told[0].message.starts_with(&words), "{}", told[0].message);
    }
}

#[test]
fn authorities_are_of_no_use_where_nothing_is_verified() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ca.pem");
    fs::write(&file, authority()).unwrap();
    let ca_file = format!("ca-file = {:?}", file.display().to_string());

    let told = rejected(&with_health(&format!(
        "type = \"https\", verify = false, {ca_file}"
    )));
    let rendered = told.render(false);
    assert_eq!(told.found().len(), 1, "{rendered}");
    assert!(
        rendered.contains("`ca-file` is of no use where nothing is verified"),
        "{rendered}"
    );
    assert!(rendered.contains("switched off here"), "{rendered}");

    let told = rejected(&with_health(&format!("type = \"http\", {ca_file}"))).located();
    assert_eq!(told.len(), 1);
    assert_eq!(
        told[0].message,
        "`ca-file` is only for type \"https\", not for \"http\""
    );
}

#[test]
fn a_system_without_authorities_is_told_to_those_who_verify_with_them() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("xlb.toml");
    let check = |health: &str| {
        fs::write(&file, with_health(health)).unwrap();
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_xlb"))
            .args(["check", "-c"])
            .arg(&file)
            .env("SSL_CERT_FILE", directory.path().join("none.pem"))
            .env("SSL_CERT_DIR", directory.path().join("none"))
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, words) = check("type = \"https\"");
    assert_eq!(code, Some(78), "{words}");
    assert!(words.contains("xlb.toml:8:19"), "{words}");
    assert!(
        words.contains("this system has no authorities' certificates"),
        "{words}"
    );
    assert!(words.contains("install the package ca-certificates"), "{words}");
    let (code, words) = check("type = \"https\", verify = false");
    assert_eq!(code, Some(0), "{words}");
}

#[test]
fn every_family_protocol_forward_and_strategy_goes_together() {
    for (vip, backend) in [("203.0.113.10", "10.0.0.11"), ("2001:db8::10", "2001:db8:1::11")] {
        for protocol in ["tcp", "udp"] {
            for forward in ["nat", "full-nat", "dsr", "ipip", "gue", "local"] {
                for strategy in ["consistent-hash", "ip-hash", "round-robin", "least-connections"] {
                    let port = if forward == "local" { 8000 } else { 80 };
                    let address: IpAddr = backend.parse().unwrap();
                    let address = SocketAddr::new(address, port);
                    let service = &parsed(&format!(
                        "interfaces = [\"eth0\"]\n[[service]]\nname = \"s\"\nvip = \"{vip}\"\nport = 80\nassign-vip = true\n\
                         protocol = \"{protocol}\"\nforward = \"{forward}\"\nstrategy = \"{strategy}\"\n\
                         [[service.backend]]\naddress = \"{address}\"\n"
                    ))
                    .services[0];
                    assert_eq!(service.protocol.to_string(), protocol);
                    assert_eq!(service.forward.to_string(), forward);
                    assert_eq!(service.strategy.to_string(), strategy);
                    let server = &service.backends[0];
                    assert_eq!((server.address, server.port), (address.ip(), Some(port)));
                }
            }
        }
    }
}

#[test]
fn ipip_and_gue_reach_backends_of_either_family() {
    for forward in ["ipip", "gue"] {
        for vip in ["203.0.113.10", "2001:db8::10"] {
            let config = parsed(
                &SMALLEST
                    .replace("203.0.113.10", vip)
                    .replace("protocol", &format!("forward = \"{forward}\"\nprotocol"))
                    .replace("10.0.0.11:8080", "10.0.0.11")
                    .replace("10.0.0.12:8080", "2001:db8:1::12"),
            );
            let families: Vec<bool> = (config.services[0].backends.iter())
                .map(|backend| backend.address.is_ipv4())
                .collect();
            assert_eq!(families, [true, false]);
        }
    }
}

#[test]
fn ipv6_addresses_have_ports_and_ranges_in_brackets() {
    let config = parsed(
        &SMALLEST
            .replace("203.0.113.10", "2001:db8::10")
            .replace("10.0.0.11:8080", "[2001:db8::11]:8000-8001")
            .replace("10.0.0.12:8080", "2001:db8:0::12"),
    );
    let service = &config.services[0];
    assert_eq!(service.vip.to_string(), "2001:db8::10");
    let backends: Vec<_> = (service.backends.iter())
        .map(|backend| (backend.name.as_str(), backend.address.to_string(), backend.port))
        .collect();
    assert_eq!(
        backends,
        [
            ("[2001:db8::11]:8000", "2001:db8::11".to_owned(), Some(8000)),
            ("[2001:db8::11]:8001", "2001:db8::11".to_owned(), Some(8001)),
            ("2001:db8::12", "2001:db8::12".to_owned(), None),
        ]
    );
    let unique_local = SMALLEST
        .replace("203.0.113.10", "fd00::10")
        .replace("10.0.0.11:8080", "fd00::11")
        .replace("10.0.0.12:8080", "[fd00::12]:80");
    assert_eq!(parsed(&unique_local).services[0].backends[1].port, Some(80));
}

#[test]
fn any_is_every_port_however_it_is_written() {
    for port in ["\"any\"", "[\"any\"]", "\"1-65535\""] {
        let config = parsed(&SMALLEST.replace("port = 80", &format!("port = {port}")));
        assert_eq!(config.services[0].ports, [PortRange::ANY], "{port}");
        assert_eq!(config.services[0].ports[0].to_string(), "any");
    }
    let other_protocol = SMALLEST.replace("port = 80", "port = \"any\"")
        + &SMALLEST
            .replace("interfaces = [\"eth0\"]", "")
            .replace("web", "dns")
            .replace("tcp", "udp");
    assert_eq!(parsed(&other_protocol).services.len(), 2);
}

#[test]
fn all_ports_keep_theirs_where_a_backend_has_none_and_the_probe_says_which_to_ask() {
    let without_ports = SMALLEST
        .replace(
            "port = 80\n",
            "port = \"any\"\nhealth = { type = \"tcp\", port = 22 }\n",
        )
        .replace(":8080", "");
    let service = &parsed(&without_ports).services[0];
    assert_eq!(service.backends[0].port, None);
    assert_eq!(service.health.probe, Probe::Tcp { port: Some(22) });
    let unprobed = without_ports.replace("{ type = \"tcp\", port = 22 }", "{ type = \"none\" }");
    assert_eq!(parsed(&unprobed).services[0].health.probe, Probe::None);
    parsed(&unprobed.replace(
        "health = { type = \"none\" }\nprotocol = \"tcp\"",
        "protocol = \"udp\"",
    ));
}

#[test]
fn a_port_that_is_the_services_is_no_change_of_it() {
    for forward in ["dsr", "ipip", "gue"] {
        let text = SMALLEST
            .replace("protocol", &format!("forward = \"{forward}\"\nprotocol"))
            .replace("10.0.0.11:8080", "10.0.0.11:80")
            .replace("10.0.0.12:8080", "10.0.0.12:80-80");
        let ports: Vec<_> = (parsed(&text).services[0].backends.iter())
            .map(|backend| backend.port)
            .collect();
        assert_eq!(ports, [Some(80), Some(80)]);
    }
}

#[test]
fn local_reaches_processes_on_the_vip_on_loopback_and_on_other_addresses() {
    let local = SMALLEST.replace("protocol", "forward = \"local\"\nprotocol");
    for (vip, own, loopback) in [
        ("203.0.113.10", "203.0.113.10", "127.0.0.1"),
        ("2001:db8::10", "[2001:db8::10]", "[::1]"),
    ] {
        let text = local
            .replace("203.0.113.10", vip)
            .replace("10.0.0.11:8080", &format!("{own}:8000-8003"))
            .replace("10.0.0.12", loopback);
        let backends = &parsed(&text).services[0].backends;
        assert_eq!(backends.len(), 5);
        assert_eq!(backends[0].address, parsed(&text).services[0].vip);
        assert!(backends[4].address.is_loopback());
    }
    // Two clusters of processes behind one VIP.
    let other = local
        .replace("interfaces = [\"eth0\"]", "")
        .replace("web", "api")
        .replace("port = 80\n", "port = 81\n");
    parsed(&(local + &other).replace("10.0.0.1", "203.0.113.1"));
}

#[test]
fn the_whole_family_in_allow_is_no_filter_unless_a_longer_prefix_depends_on_it() {
    let with = |lists: &str| {
        let text = SMALLEST.replace("port = 80\n", &format!("port = 80\n{lists}\n"));
        parsed(&text).services.remove(0)
    };
    assert_eq!(with("allow = [\"0.0.0.0/0\"]"), parsed(SMALLEST).services[0]);
    let Service { allow, deny, .. } = with("allow = [\"0.0.0.0/0\"]\ndeny = [\"10.0.0.0/8\"]");
    assert_eq!((allow.len(), deny.len()), (0, 1));
    let Service { allow, deny, .. } =
        with("allow = [\"0.0.0.0/0\", \"10.1.0.0/16\"]\ndeny = [\"10.0.0.0/8\"]");
    assert_eq!((allow.len(), deny.len()), (2, 1));
}

#[test]
fn the_burst_of_new_flows_is_the_rate_unless_it_is_given() {
    let capped = SMALLEST.replace("port = 80\n", "port = 80\nnew-flow-rate = 50\n");
    assert_eq!(
        parsed(&capped).services[0].new_flow_cap,
        Some(NewFlowCap {
            rate: 50,
            burst: 50,
            prefix_v4: 32,
            prefix_v6: 64,
        })
    );
}

#[test]
fn each_server_of_a_range_has_the_limit_and_the_role_of_its_entry() {
    let text = SMALLEST.replace(
        "address = \"10.0.0.12:8080\"",
        "address = \"10.0.0.12:8000-8001\"\nmax-connections = 15\nbackup = true",
    );
    let limits: Vec<_> = (parsed(&text).services[0].backends.iter())
        .map(|backend| (backend.max_connections, backend.backup))
        .collect();
    assert_eq!(limits, [(None, false), (Some(15), true), (Some(15), true)]);
}

#[test]
fn a_udp_service_is_not_probed_unless_it_says_so() {
    let udp = SMALLEST.replace("\"tcp\"", "\"udp\"");
    assert_eq!(parsed(&udp).services[0].health.probe, Probe::None);
    let probed = udp.replace("port = 80\n", "port = 80\nhealth.type = \"tcp\"\n");
    assert_eq!(
        parsed(&probed).services[0].health.probe,
        Probe::Tcp { port: None }
    );
}

#[test]
fn a_backend_with_a_range_of_ports_is_one_backend_for_each() {
    let named = SMALLEST.replace(
        "address = \"10.0.0.11:8080\"",
        "name = \"a\"\naddress = \"10.0.0.11:8000-8003\"\nweight = 7",
    );
    let backends = &parsed(&named).services[0].backends;
    let names: Vec<_> = backends.iter().map(|backend| backend.name.as_str()).collect();
    assert_eq!(names, ["a-8000", "a-8001", "a-8002", "a-8003", "10.0.0.12:8080"]);
    assert_eq!(backends[3].port, Some(8003));
    assert_eq!(backends[3].weight, 7);

    let unnamed = SMALLEST.replace("10.0.0.11:8080", "10.0.0.11:8000-8001");
    let backends = &parsed(&unnamed).services[0].backends;
    assert_eq!(backends[1].name, "10.0.0.11:8001");
}

#[test]
fn one_address_is_two_backends_with_two_ports() {
    let config = parsed(
        &SMALLEST
            .replace("10.0.0.11:8080", "10.0.0.11:3000")
            .replace("10.0.0.12:8080", "10.0.0.11:3001"),
    );
    let ports: Vec<_> = config.services[0]
        .backends
        .iter()
        .map(|backend| backend.port)
        .collect();
    assert_eq!(ports, [Some(3000), Some(3001)]);
}

#[test]
fn a_daemon_may_run_without_services() {
    assert_eq!(parsed("interfaces = [\"eth0\"]").services, []);
}

#[test]
fn services_share_a_vip_when_port_or_protocol_differs() {
    let other = |name: &str, port: &str, protocol: &str| {
        SMALLEST
            .replace("interfaces = [\"eth0\"]", "")
            .replace("\"web\"", &format!("{name:?}"))
            .replace("port = 80\n", &format!("port = {port}\n"))
            .replace("\"tcp\"", &format!("{protocol:?}"))
    };
    let text = [
        SMALLEST,
        &other("b", "80", "udp"),
        &other("c", "\"81-90\"", "tcp"),
        &other("d", "91", "tcp"),
    ]
    .concat();
    assert_eq!(parsed(&text).services.len(), 4);
}

#[test]
fn each_broken_configuration_is_told_with_every_place_and_the_fix() {
    let files = files(&here("tests/broken"), "toml");
    assert!(files.len() >= 30, "only {} broken configurations", files.len());
    for file in files {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(&file).unwrap();
        let expected = Expectation::all_in(&text);
        assert!(!expected.is_empty(), "{name} expects nothing");
        let told = rejected(&text);
        let mut left: Vec<Told> = Told::all_of(&told, &text);
        for expectation in &expected {
            let found = left.iter().position(|told| expectation.is_met_by(told));
            let Some(found) = found else {
                panic!(
                    "{name}: {expectation:?} is not told, but:\n{}",
                    told.render(false)
                );
            };
            left.remove(found);
        }
        assert!(
            left.is_empty(),
            "{name}: {left:#?} is told, too:\n{}",
            told.render(false)
        );
    }
}

#[test]
fn missing_interfaces_are_told_at_the_top() {
    let told = rejected("# nothing\n").located();
    assert_eq!(told.len(), 1);
    assert_eq!((told[0].line, told[0].column), (1, 1));
    assert_eq!(told[0].message, "`interfaces` is missing");
    assert!(told[0].help.contains("interfaces = [\"eth0\"]"));
    assert_eq!(rejected("").located().len(), 1);
}

#[test]
fn five_errors_are_shown_at_once_as_in_the_stored_picture() {
    let text = fs::read_to_string(here("tests/five-errors/xlb.toml")).unwrap();
    let told = config::parse(&text, "/etc/xlb/xlb.toml").unwrap_err();
    assert_eq!(told.found().len(), 5);
    let expected = fs::read_to_string(here("tests/five-errors/expected.txt")).unwrap();
    assert_eq!(told.render(false), expected, "\n{}", told.render(false));
}

#[test]
fn a_file_of_garbage_is_told_without_end_to_programs_and_in_part_to_people() {
    let garbage: String = (0..5000)
        .map(|index| format!("key-{index} = {index}\n"))
        .collect();
    let told = rejected(&garbage);
    assert_eq!(told.located().len(), 5001);
    assert!(
        told.render(false)
            .ends_with("5001 errors in xlb.toml, of which the first 200 are shown\n")
    );
}

#[test]
fn colours_are_added_only_when_asked_for() {
    let told = rejected("interfaces = []");
    assert!(!told.render(false).contains('\u{1b}'));
    assert!(told.render(true).contains('\u{1b}'));
}

#[test]
fn text_of_the_file_cannot_smuggle_escape_sequences_into_the_terminal() {
    for text in [
        "interfaces = [\"\\u001b[2J\"]",
        "\"\\u001b[2J\" = 1",
        "interfaces = \u{1b}[2J",
        "x = \"\u{1b}[2J",
    ] {
        let told = rejected(text);
        assert!(
            !told.render(false).contains('\u{1b}'),
            "{}",
            told.render(false).escape_debug()
        );
        assert!(
            !told.to_string().contains('\u{1b}'),
            "{}",
            told.to_string().escape_debug()
        );
    }
}

#[test]
fn columns_count_characters_and_lines_end_in_either_way() {
    let told = rejected("interfaces = [\"eth0\"]\r\nflow-table = { \"größe\" = 1, size = 5 }\r\n").located();
    let places: Vec<_> = told.iter().map(|told| (told.line, told.column)).collect();
    assert_eq!(places, [(2, 16), (2, 36)]);
    assert!(!rejected("x = 1\r\ny = 2\r\n").render(false).contains('\r'));
    let rendered = rejected("interfaces = [\"ä\", 5]").render(false);
    assert!(rendered.contains("xlb.toml:1:20"), "{rendered}");
}

#[test]
fn an_unclosed_list_is_told_once_and_what_is_wrong_by_itself_further_down_as_well() {
    let told = rejected("interfaces = [\"eth0\"\nxdp-mode = \"auto\"\n[flow-table]\nsize = auto\n").located();
    let lines: Vec<_> = told.iter().map(|told| told.line).collect();
    assert!(lines == [1, 4] || lines == [2, 4], "{told:#?}");
}

#[test]
fn more_than_the_maps_hold_is_told_where_it_begins() {
    let service = |index: u32, port: &str, ports: &str| {
        format!(
            "[[service]]\nname = \"s{index}\"\nvip = \"10.1.{}.{}\"\nport = {port}\nprotocol = \"tcp\"\n\
             [[service.backend]]\naddress = \"10.0.0.1{ports}\"\n",
            index / 250,
            index % 250 + 1
        )
    };
    let many = |count: u32, port: &str, ports: &str| {
        let services: String = (0..count).map(|index| service(index, port, ports)).collect();
        format!("interfaces = [\"eth0\"]\n{services}")
    };
    assert_eq!(parsed(&many(16_383, "80", "")).services.len(), 16_383);
    let told = rejected(&many(16_384, "80", "")).located();
    assert_eq!(
        (told[0].line, told[0].message.as_str()),
        (2 + 16_383 * 7, "more than 16383 services")
    );
    let limited = |limit: &str, text: String| text.replacen('\n', &format!("\n[limits]\n{limit}\n"), 1);
    let few = limited("services = 2", many(2, "80", ""));
    assert_eq!(parsed(&few).limits.services, Some(2));
    let told = rejected(&limited("services = 2", many(3, "80", ""))).located();
    assert_eq!(
        (told[0].line, told[0].message.as_str()),
        (2 + 2 + 2 * 7, "more than 2 services")
    );
    assert_eq!(told[0].help, "write a higher limit, or \"auto\"");
    parsed(&limited("backends = 20", many(2, "80", ":1-10")));
    let told = rejected(&limited("backends = 20", many(3, "80", ":1-10"))).located();
    assert_eq!(
        (told[0].line, told[0].message.as_str()),
        (
            2 + 2 + 2 * 7 + 6,
            "more than 20 backends of all services together"
        )
    );

    // "any" is one key, whatever it stands for.
    parsed(&many(1100, "\"any\"", ":80"));
    parsed(&many(1, "[\"1-40000\", \"40001-65535\"]", ""));
    let told = rejected(&many(2, "\"1-65534\"", "")).located();
    assert_eq!(
        (told[0].line, told[0].message.as_str()),
        (2 + 7 + 3, "more than 65536 ports of all services together")
    );

    let prefixes = |count: u32| -> String {
        (0..count)
            .map(|index| format!("\"10.{}.{}.{}/32\",", index >> 16, index >> 8 & 255, index & 255))
            .collect()
    };
    let filtered = |count: u32| {
        let lists = format!(
            "port = 80\nallow = [\"0.0.0.0/0\"]\ndeny = [{}]\n",
            prefixes(count)
        );
        SMALLEST.replace("port = 80\n", &lists)
    };
    assert_eq!(parsed(&filtered(65_535)).services[0].deny.len(), 65_535);
    let told = rejected(&filtered(65_536)).located();
    assert_eq!(
        (told[0].line, told[0].message.as_str()),
        (
            8,
            "more than 65536 prefixes in `allow` and `deny` of all services together"
        )
    );

    parsed(&many(1, "80", ":1-65535"));
    let told = rejected(&many(500, "80", ":1-65535")).located();
    assert_eq!(told.len(), 1);
    assert_eq!(
        (told[0].line, told[0].message.as_str()),
        (
            2 + 4 * 7 + 6,
            "more than 262143 backends of all services together"
        )
    );
}

#[test]
fn every_key_is_read_and_refuses_a_value_of_no_use() {
    for table in KEYS {
        for key in table.keys {
            // Tables are no date; a date is nowhere of use.
            let line = format!("{key} = 1979-05-27");
            let text = match table.header {
                "" => line,
                "[service.health]" => format!("[[service]]\n[service.health]\n{line}"),
                "[[service.backend]]" => format!("[[service]]\n[[service.backend]]\n{line}"),
                header => format!("{header}\n{line}"),
            };
            let (line, column) = (text.lines().count(), key.len() + 4);
            let told = rejected(&text).located();
            assert!(
                told.iter().any(|told| (told.line, told.column) == (line, column)),
                "{} {key} is not read: {told:#?}",
                table.header
            );
        }
    }
}

#[test]
fn files_that_cannot_be_read_are_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let missing = config::load(&directory.path().join("none.toml")).unwrap_err();
    assert!(matches!(missing, ConfigError::Missing { .. }));
    assert_eq!(missing.exit_code(), 78);
    assert!(missing.render(false).contains("none.toml"));
    assert!(
        missing
            .render(false)
            .contains("help: name the file with `-c FILE`")
    );

    let no_file = config::load(directory.path()).unwrap_err();
    assert!(matches!(no_file, ConfigError::Unreadable { .. }));
    assert_eq!(no_file.exit_code(), 78);

    let binary = directory.path().join("binary.toml");
    fs::write(&binary, b"interfaces = [\"eth0\"]\nname = \"\xff\xfe\"").unwrap();
    let ConfigError::Invalid(told) = config::load(&binary).unwrap_err() else {
        panic!("not text, and yet not invalid");
    };
    let told = &told.located()[0];
    assert_eq!(
        (told.line, told.column, told.message.as_str()),
        (2, 9, "not UTF-8 text")
    );

    let good = directory.path().join("good.toml");
    fs::write(&good, SMALLEST).unwrap();
    assert_eq!(config::load(&good).unwrap(), parsed(SMALLEST));
}

#[test]
fn every_example_parses_and_together_they_show_every_strategy_and_forward() {
    let mut shown = BTreeSet::new();
    for file in files(&here("../examples"), "toml") {
        let config = config::load(&file).unwrap_or_else(|error| panic!("{}", error.render(false)));
        for service in config.services {
            shown.insert(service.strategy.to_string());
            shown.insert(service.forward.to_string());
        }
    }
    let mut all = [
        "consistent-hash",
        "ip-hash",
        "round-robin",
        "least-connections",
        "nat",
        "full-nat",
        "dsr",
        "ipip",
        "gue",
        "local",
    ];
    all.sort_unstable();
    assert!(shown.iter().eq(all.iter()), "the examples show {shown:?}");
}

#[test]
fn every_configuration_in_the_documentation_parses() {
    let mut seen = 0;
    for block in documentation().split("```toml\n").skip(1) {
        let text = block.split("```").next().unwrap();
        if let Err(told) = config::parse(text, "docs/configure.md") {
            panic!("{}", told.render(false));
        }
        seen += 1;
    }
    assert!(seen >= 2);
}

#[test]
fn the_documentation_has_exactly_the_keys_that_there_are() {
    let documented: BTreeSet<(String, String)> = documentation()
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| ")?.split(" | ");
            let table = cells.next()?.trim_matches('`');
            let key = cells.next()?.strip_prefix('`')?.strip_suffix('`')?;
            let table = if table == "(top)" { "" } else { table };
            Some((table.to_owned(), key.to_owned()))
        })
        .collect();
    let known: BTreeSet<(String, String)> = KEYS
        .iter()
        .flat_map(|table| {
            table
                .keys
                .iter()
                .map(|key| (table.header.to_owned(), (*key).to_owned()))
        })
        // The keys that hold other tables are headers.
        .filter(|(table, key)| {
            let tables: &[&str] = match table.as_str() {
                "" => &["flow-table", "limits", "hash", "ipip", "api", "service"],
                "[[service]]" => &["health", "backend"],
                _ => &[],
            };
            !tables.contains(&key.as_str())
        })
        .collect();
    assert_eq!(documented, known);
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        never_panics(&bytes);
    }

    #[test]
    fn no_text_of_toml_signs_makes_it_panic(text in "[\\[\\]{}=.,\"'#\\\\\n\r a-c0-9_é-]{0,80}") {
        never_panics(text.as_bytes());
    }

    #[test]
    fn no_mutation_of_a_valid_configuration_makes_it_panic(
        text in prop::sample::select(vec![SMALLEST, EVERY_KEY]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3), 1..8),
    ) {
        let mut bytes = text.as_bytes().to_vec();
        for (place, byte, change) in changes {
            if bytes.is_empty() {
                break;
            }
            let place = place.index(bytes.len());
            match change {
                0 => bytes[place] = byte,
                1 => bytes.insert(place, byte),
                _ => drop(bytes.remove(place)),
            }
        }
        never_panics(&bytes);
    }

    #[test]
    fn no_value_under_any_key_makes_it_panic(
        table in prop::sample::select(KEYS),
        key in any::<prop::sample::Index>(),
        value in "-?[0-9]{1,25}|\"[0-9a-z.:/ -]{0,40}\"|\\[(\"[0-9.:/-]{0,12}\",|[0-9]{1,6},){0,4}\\]|\\{\\}|\"[0-9]{1,20}(ns|ms|s|m|h|d|y)\"|\\PC{0,20}",
    ) {
        let key = table.keys[key.index(table.keys.len())];
        let prefix = match table.header {
            "[service.health]" | "[[service.backend]]" => "[[service]]\n",
            _ => "",
        };
        never_panics(format!("{prefix}{}\n{key} = {value}\n", table.header).as_bytes());
    }

    #[test]
    fn a_backend_is_accepted_exactly_where_its_family_and_port_can_be_reached(
        forward in prop::sample::select(vec!["nat", "full-nat", "dsr", "ipip", "gue", "local"]),
        (vip_is_v4, backend_is_v4) in any::<(bool, bool)>(),
        ports in prop::sample::select(vec![("80", vec![80]), ("[80, 443]", vec![80, 443]), ("\"any\"", vec![80, 443, 8000])]),
        port in prop::sample::select(vec![None, Some(80), Some(443), Some(8000)]),
    ) {
        let (written, ports) = ports;
        let vip = if vip_is_v4 { "203.0.113.10" } else { "2001:db8::10" };
        let address: IpAddr = if backend_is_v4 { "10.0.0.11" } else { "2001:db8:1::11" }.parse().unwrap();
        let address = port.map_or_else(|| address.to_string(), |port| SocketAddr::new(address, port).to_string());
        let text = format!(
            "interfaces = [\"eth0\"]\n[[service]]\nname = \"s\"\nvip = \"{vip}\"\nport = {written}\nprotocol = \"udp\"\n\
             forward = \"{forward}\"\n[[service.backend]]\naddress = \"{address}\"\n"
        );
        let family = vip_is_v4 == backend_is_v4 || ["ipip", "gue"].contains(&forward);
        let unreached = match (forward, port) {
            ("nat" | "full-nat", _) => 0,
            // Two mistakes: no port for the process, and none left for it.
            ("local", port) if written.contains("any") => 1 + usize::from(port.is_none()),
            ("local", port) => usize::from(port.is_none_or(|port| ports.contains(&port))),
            (_, port) => usize::from(port.is_some_and(|port| ports != [port])),
        };
        let told = config::parse(&text, "xlb.toml").map_or_else(|told| told.found().len(), |_| 0);
        prop_assert_eq!(told, usize::from(!family) + unreached, "{}", text);
    }

    #[test]
    fn a_prefix_has_nothing_beyond_its_length_or_the_help_names_one_that_has_not(
        words: (u32, u128),
        is_v4: bool,
        length in any::<prop::sample::Index>(),
        list in prop::sample::select(vec!["allow", "deny"]),
    ) {
        let (vip, prefix, network) = if is_v4 {
            let length = length.index(33);
            let network = words.0 & u32::MAX.checked_shl(32 - length as u32).unwrap_or(0);
            let text = |word: u32| format!("{}/{length}", Ipv4Addr::from(word));
            ("203.0.113.10", text(words.0), text(network))
        } else {
            let length = length.index(129);
            let network = words.1 & u128::MAX.checked_shl(128 - length as u32).unwrap_or(0);
            let text = |word: u128| format!("{}/{length}", Ipv6Addr::from(word));
            ("2001:db8::10", text(words.1), text(network))
        };
        let text = |prefix: &str| {
            SMALLEST
                .replace("203.0.113.10", vip)
                .replace("10.0.0.11:8080", if is_v4 { "10.0.0.11" } else { "2001:db8::11" })
                .replace("10.0.0.12:8080", if is_v4 { "10.0.0.12" } else { "2001:db8::12" })
                .replace("port = 80\n", &format!("port = 80\n{list} = [\"{prefix}\"]\n"))
        };
        prop_assert!(config::parse(&text(&network), "xlb.toml").is_ok());
        match config::parse(&text(&prefix), "xlb.toml") {
            Ok(_) => prop_assert_eq!(prefix, network),
            Err(told) => {
                prop_assert_ne!(&prefix, &network);
                prop_assert_eq!(told.found().len(), 1);
                prop_assert!(told.found()[0].help.contains(&format!("\"{network}\"")), "{}", told);
            }
        }
    }

    #[test]
    fn services_overlap_exactly_when_they_share_a_port(
        first in (1u16..30, 0u16..10),
        second in (1u16..30, 0u16..10),
        third in (1u16..30, 0u16..10),
    ) {
        let ranges = [first, second, third].map(|(first, length)| (first, first + length));
        let text: String = ranges
            .iter()
            .enumerate()
            .map(|(index, (first, last))| {
                format!(
                    "[[service]]\nname = \"s{index}\"\nvip = \"203.0.113.10\"\nport = \"{first}-{last}\"\nprotocol = \"tcp\"\n\
                     [[service.backend]]\naddress = \"10.0.0.11\"\n"
                )
            })
            .collect();
        let share = |one: usize, other: usize| ranges[one].0 <= ranges[other].1 && ranges[other].0 <= ranges[one].1;
        let accepted = config::parse(&format!("interfaces = [\"eth0\"]\n{text}"), "xlb.toml").is_ok();
        prop_assert_eq!(accepted, !(share(0, 1) || share(0, 2) || share(1, 2)));
    }
}

/// Parses, and whatever is told can be located and shown.
fn never_panics(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Err(told) = config::parse(&text, "xlb.toml") {
        assert!(!told.found().is_empty());
        assert_eq!(told.located().len(), told.found().len());
        assert!(told.render(false).contains("xlb.toml"));
        assert!(!told.to_string().is_empty());
    }
}

/// A line of a broken configuration that says what is told of the line above it: carets under the place, a part of
/// the message, `|` and a part of the help; or dashes under the other place and its label.
#[derive(Debug)]
struct Expectation {
    line: usize,
    column: usize,
    length: usize,
    related: bool,
    message: String,
    help: String,
}

impl Expectation {
    fn all_in(text: &str) -> Vec<Self> {
        let mut line_above = 0;
        let mut all = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let Some(comment) = line.strip_prefix('#') else {
                line_above = index + 1;
                continue;
            };
            let marks = comment.trim_start();
            let words = marks.trim_start_matches(['^', '-']);
            let (message, help) = words.trim().split_once(" | ").unwrap_or((words.trim(), ""));
            all.push(Self {
                line: line_above,
                column: 2 + comment.len() - marks.len(),
                length: marks.len() - words.len(),
                related: marks.starts_with('-'),
                message: message.to_owned(),
                help: help.to_owned(),
            });
        }
        all
    }

    fn is_met_by(&self, told: &Told) -> bool {
        (self.line, self.column, self.length, self.related)
            == (told.line, told.column, told.length, told.related)
            && told.message.contains(&self.message)
            && told.help.contains(&self.help)
    }
}

/// One place of a diagnostic.
#[derive(Debug)]
struct Told {
    line: usize,
    column: usize,
    length: usize,
    related: bool,
    message: String,
    help: String,
}

impl Told {
    fn all_of(told: &Diagnostics, text: &str) -> Vec<Self> {
        let place = |offset: usize| {
            let before = &text[..offset];
            let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
            (
                before.matches('\n').count() + 1,
                before[line_start..].chars().count() + 1,
            )
        };
        let mut all = Vec::new();
        for (diagnostic, located) in told.found().iter().zip(told.located()) {
            assert_eq!(place(diagnostic.span.start), (located.line, located.column));
            assert!(!located.help.is_empty());
            all.push(Self {
                line: located.line,
                column: located.column,
                length: text[diagnostic.span.clone()].chars().count().max(1),
                related: false,
                message: located.message,
                help: located.help,
            });
            if let Some((span, label)) = &diagnostic.related {
                let (line, column) = place(span.start);
                all.push(Self {
                    line,
                    column,
                    length: text[span.clone()].chars().count(),
                    related: true,
                    message: label.clone(),
                    help: String::new(),
                });
            }
        }
        all
    }
}

fn parsed(text: &str) -> Config {
    match config::parse(text, "xlb.toml") {
        Ok(config) => config,
        Err(told) => panic!("{}", told.render(false)),
    }
}

fn rejected(text: &str) -> Diagnostics {
    config::parse(text, "xlb.toml").expect_err(text)
}

fn documentation() -> String {
    fs::read_to_string(here("../docs/configure.md")).expect("docs/configure.md can be read")
}

fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
        .map(|entry| entry.expect("the directory can be listed").path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    files.sort();
    files
}

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
