//! The configuration changes while the daemon runs.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use nix::sys::signal::Signal;
use tests::{
    daemon::Daemon,
    http::{self, Connection},
    load::requests,
    machine::{self, eventually},
    maps,
    services::Service,
};
use xlb::{
    datapath::{Contents, contents_dump},
    lab::Topology,
    model::Health,
};

use crate::scene::{
    INTERFACES, WEB, connection_by, connection_to, has_program, nginx, source, topology, web,
};

/// Where the service `other` is.
fn other_server() -> SocketAddr {
    SocketAddr::new(Topology::VIP.into(), 8443)
}

fn other() -> Service {
    Service::tcp("other")
        .with("port", 8443)
        .backend("c", "10.2.3.2:8080")
}

fn all_up(daemon: &Daemon) {
    daemon.wait_for("all backends are up", |status| {
        let mut backends = status.services.iter().flat_map(|service| &service.backends);
        backends.all(|backend| backend.health == Health::Up && backend.next_hop_problem.is_none())
    });
}

#[test]
fn services_backends_and_interfaces_are_added_live() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    let one = Service::tcp("web").backend("a", "10.2.1.2:8080");
    daemon.configure(&["eth0", "eth1"], std::slice::from_ref(&one));
    daemon.start_up();
    let download = connection_to(&topology, "a").download();
    assert!(!has_program(&topology.balancer, "eth2"));

    daemon.configure(&["eth0", "eth1", "eth2"], &[one.backend("b", "10.2.2.2:8080")]);
    let message = daemon.done(&["reload"]);
    assert!(message.contains("1 services"), "{message}");
    all_up(&daemon);
    assert!(has_program(&topology.balancer, "eth2"));
    drop(connection_to(&topology, "b"));
    download.proceeds();

    daemon.configure(&INTERFACES, &[web(), other()]);
    daemon.signal(Signal::SIGHUP);
    daemon.wait_for("the new service is there", |status| status.services.len() == 2);
    all_up(&daemon);
    let answer = Connection::open(&topology.client, other_server())
        .unwrap()
        .get("/");
    assert_eq!(answer.unwrap(), "c");
    drop(connection_to(&topology, "c"));
    download.proceeds();

    // And an interface is given up again.
    daemon.configure(&["eth0", "eth1", "eth2"], &[web().without("c")]);
    daemon.done(&["reload"]);
    assert!(!has_program(&topology.balancer, "eth3"));
    download.proceeds();
    download.finish().unwrap();
}

#[test]
fn a_removed_backend_keeps_its_connections_and_gets_no_new_ones() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web()]);
    daemon.start_up();
    let download = connection_to(&topology, "a").download();
    download.proceeds();
    daemon.configure(&INTERFACES, &[web().without("a")]);
    daemon.done(&["reload"]);
    let answers = requests(&topology.client, source(), WEB, machine::count(500));
    assert_eq!(answers.into_keys().collect::<Vec<_>>(), ["b", "c"]);
    // Over a sweep, which looks for backends without flows.
    std::thread::sleep(Duration::from_secs(6));
    download.proceeds();
    download.finish().unwrap();
}

#[test]
fn a_bad_configuration_changes_nothing_and_is_explained() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web()]);
    daemon.start_up();
    let before = maps::contents(&daemon.pins());

    daemon.configure(
        &INTERFACES,
        &[web().with("prot", 80), other().text("vip", "nonsense")],
    );
    let outcome = daemon.xlb(&["reload"]);
    assert_eq!(outcome.code, 78, "{outcome:?}");
    for part in ["unknown key", "prot", "nonsense", "xlb.toml:", "^"] {
        assert!(outcome.stderr.contains(part), "{part}: {}", outcome.stderr);
    }
    daemon.signal(Signal::SIGHUP);
    eventually("the log tells why", Duration::from_secs(5), || {
        daemon.log().contains("nonsense")
    });
    assert_eq!(maps::contents(&daemon.pins()), before);

    std::fs::remove_file(daemon.config()).unwrap();
    assert_eq!(daemon.xlb(&["reload"]).code, 78);
    assert_eq!(maps::contents(&daemon.pins()), before);
    requests(&topology.client, source(), WEB, machine::count(100));
}

#[test]
fn a_removed_service_ends_its_flows_and_leaves_empty_maps() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web(), other()]);
    daemon.start_up();
    let web_download = connection_to(&topology, "a").download();
    let other_download = Connection::open(&topology.client, other_server())
        .unwrap()
        .download();
    web_download.proceeds();
    other_download.proceeds();

    let services = |daemon: &Daemon| -> BTreeSet<u32> {
        let flows = maps::flows(&daemon.pins());
        flows.iter().map(|(_, flow)| flow.service).collect()
    };
    assert_eq!(services(&daemon).len(), 2);

    daemon.configure(&INTERFACES, &[web()]);
    daemon.done(&["reload"]);
    assert_eq!(services(&daemon).len(), 1);
    web_download.proceeds();
    let contents = maps::contents(&daemon.pins());
    assert_eq!(
        (
            contents.services.len(),
            contents.pools.len(),
            contents.backends.len()
        ),
        (1, 1, 3)
    );

    daemon.configure(&INTERFACES, &[]);
    daemon.done(&["reload"]);
    let contents = maps::contents(&daemon.pins());
    let nothing = Contents {
        settings: contents.settings,
        ..Contents::default()
    };
    assert_eq!(contents_dump(&contents), contents_dump(&nothing));
    assert_eq!(maps::flows(&daemon.pins()), []);
    eventually("what leads to flows is gone", Duration::from_secs(12), || {
        maps::units_in_use(&daemon.pins()) == 0
    });
    assert_eq!(daemon.status().services, []);
    // Nobody answers for the vip any more, so the clients hear nothing and give up.
    for download in [web_download, other_download] {
        eventually(
            "the client gives up",
            http::timeout() + Duration::from_secs(2),
            || download.has_ended(),
        );
        download.finish().unwrap_err();
    }

    daemon.configure(&INTERFACES, &[web()]);
    daemon.done(&["reload"]);
    all_up(&daemon);
    drop(connection_to(&topology, "a"));
}

#[test]
fn a_removed_port_ends_its_flows_alone() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web().with("port", "[80, 81]")]);
    daemon.start_up();
    let other = SocketAddr::new(WEB.ip(), 81);
    let kept = connection_to(&topology, "a").download();
    let ended = connection_by(&topology, other, "a").download();
    daemon.configure(&INTERFACES, &[web()]);
    daemon.done(&["reload"]);
    let ports: Vec<u16> = maps::flows(&daemon.pins())
        .iter()
        .map(|(key, _)| u16::from_be(key.destination_port))
        .collect();
    assert!(ports.contains(&80) && !ports.contains(&81), "{ports:?}");
    kept.proceeds();
    eventually(
        "the client gives up",
        http::timeout() + Duration::from_secs(2),
        || ended.has_ended(),
    );
    ended.finish().unwrap_err();
    kept.finish().unwrap();
}

#[test]
fn the_forward_of_a_service_changes_for_new_connections_alone() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web().text("forward", "nat")]);
    daemon.start_up();
    let download = connection_to(&topology, "a").download();
    let mut idle = connection_to(&topology, "a");
    assert_eq!(idle.get("/peer").unwrap(), "10.1.0.2");
    daemon.configure(&INTERFACES, &[web().text("forward", "full-nat")]);
    daemon.done(&["reload"]);
    assert_eq!(idle.get("/peer").unwrap(), "10.1.0.2");
    assert_eq!(connection_to(&topology, "a").get("/peer").unwrap(), "10.2.1.1");
    download.proceeds();
    download.finish().unwrap();
}

#[test]
fn a_missing_interface_is_named_and_nothing_stays_attached() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    let missing = "attach failed on eth9: No such device; this network namespace has lo, ";
    daemon.configure(&["eth0", "eth1", "eth9"], &[web()]);
    let outcome = daemon.run_to_end();
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert!(outcome.stderr.contains(missing), "{}", outcome.stderr);
    for interface in INTERFACES {
        assert!(
            !has_program(&topology.balancer, interface),
            "{interface} has a program"
        );
    }
    assert!(!daemon.pins().links().exists() && !daemon.pins().exist());

    // The same of a running daemon, which goes on as before.
    daemon.configure(&["eth0", "eth1", "eth2"], &[web().without("c")]);
    daemon.start_up();
    daemon.configure(&["eth0", "eth1", "eth2", "eth3", "eth9"], &[web()]);
    let outcome = daemon.xlb(&["reload"]);
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert!(outcome.stderr.contains(missing), "{}", outcome.stderr);
    assert!(
        !has_program(&topology.balancer, "eth3"),
        "eth3 was attached on the way"
    );
    assert_eq!(daemon.status().services[0].backends.len(), 2);
    requests(&topology.client, source(), WEB, machine::count(100));
}

#[test]
fn more_than_the_maps_have_room_for_is_refused_with_what_to_do_until_there_are_new_ones() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure_with("[limits]\nservices = 1", &INTERFACES, &[web()]);
    daemon.start_up();
    assert_eq!(daemon.status().maps.services, 1);

    daemon.configure_with("[limits]\nservices = 2", &INTERFACES, &[web(), other()]);
    let outcome = daemon.xlb(&["reload"]);
    assert_eq!(outcome.code, 1, "{outcome:?}");
    for words in [
        "2 services",
        "made for 1",
        "limits.services",
        "xlb detach",
        "the running configuration stays",
    ] {
        assert!(outcome.stderr.contains(words), "{words}: {}", outcome.stderr);
    }
    assert_eq!(daemon.status().services.len(), 1);
    requests(&topology.client, source(), WEB, machine::count(100));

    // A limit alone is a warning: what there is goes on.
    daemon.configure_with("[limits]\nservices = 2", &INTERFACES, &[web()]);
    let outcome = daemon.xlb(&["reload"]);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert!(
        outcome.stderr.contains("room for 1 services"),
        "{}",
        outcome.stderr
    );

    // A restart takes the pinned maps as they are.
    daemon.terminate();
    daemon.start_up();
    assert_eq!(daemon.status().maps.services, 1);
    daemon.terminate();
    daemon.done(&["detach"]);
    daemon.configure_with("[limits]\nservices = 2", &INTERFACES, &[web(), other()]);
    daemon.start_up();
    assert_eq!(daemon.status().maps.services, 2);
    requests(&topology.client, source(), WEB, machine::count(100));
}
