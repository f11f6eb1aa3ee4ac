//! The data path goes on without the daemon, and the next daemon takes it over.

use std::time::{Duration, Instant};

use tests::{
    daemon::Daemon,
    http::Connection,
    load::{Load, failures, requests},
    machine, maps,
};
use xlb::model::Health;

use crate::scene::{INTERFACES, WEB, connection_to, nginx, source, topology, topology_of, web};

fn connections_go_on_while_no_daemon_runs(forward: &str, stop: impl FnOnce(&mut Daemon)) {
    let topology = topology_of(4);
    let mut nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    let service = web()
        .text("forward", forward)
        .text("drain-timeout", "10m")
        .backend("d", "10.2.4.2:8080");
    daemon.configure(&["eth0", "eth1", "eth2", "eth3", "eth4"], &[service]);
    daemon.start_up();
    // a stays as it is, b is down, c is disabled and d drains, with a download on it.
    let draining = connection_to(&topology, "d").download();
    nginx[1].kill();
    daemon.done(&["disable", "web", "c"]);
    daemon.done(&["drain", "web", "d"]);
    daemon.wait_for("b is down", |status| {
        status.services[0].backends[1].health == Health::Down
    });

    let start = Instant::now();
    let load = Load::start(&topology.client, WEB);
    let download = connection_to(&topology, "a").download();
    let mut idle = Connection::open(&topology.client, WEB).unwrap();
    assert_eq!(idle.get("/").unwrap(), "a");

    stop(&mut daemon);
    let answers = requests(&topology.client, source(), WEB, machine::count(500));
    assert_eq!(
        answers.into_keys().collect::<Vec<_>>(),
        ["a"],
        "new connections go on"
    );
    assert_eq!(idle.get("/").unwrap(), "a", "an idle connection goes on");
    download.proceeds();
    draining.proceeds();
    let before = maps::flows(&daemon.pins());
    assert!(before.len() >= machine::count(500));

    daemon.start();
    let status = daemon.status();
    let backends = &status.services[0].backends;
    let states: Vec<&str> = backends
        .iter()
        .map(|backend| backend.administrative.as_str())
        .collect();
    assert_eq!(states, ["enabled", "enabled", "disabled", "draining"]);
    let health: Vec<Health> = backends.iter().map(|backend| backend.health).collect();
    assert_eq!(health, [Health::Up, Health::Down, Health::Up, Health::Up]);
    assert!(
        status.flow_table.flows as usize >= before.len(),
        "{:?}",
        status.flow_table
    );
    assert!(daemon.log().contains("took over the maps"));

    let after = maps::flows(&daemon.pins());
    // Those of the load may have begun anew meanwhile, under the same port.
    let made = source().port()..source().port() + machine::count(500) as u16;
    let before: Vec<_> = before
        .iter()
        .filter(|(key, _)| made.contains(&u16::from_be(key.source_port)))
        .collect();
    let mut gone = 0;
    for (key, flow) in &before {
        match after.iter().find(|(other, _)| other == key) {
            Some((_, kept)) => assert_eq!(
                (kept.backend, kept.source_port),
                (flow.backend, flow.source_port),
                "the flow {key:?}"
            ),
            // Flows of the load that meet in a bucket take the place of one that has ended.
            None if !flow.is_live() => gone += 1,
            None => panic!("the flow {key:?} was not kept: {flow:?}"),
        }
    }
    assert!(
        gone <= before.len() / 10,
        "{gone} of {} flows were not kept",
        before.len()
    );
    download.proceeds();
    draining.proceeds();
    assert_eq!(idle.get("/").unwrap(), "a", "the idle connection goes on");
    std::thread::sleep(machine::bound(Duration::from_secs(1)));
    let made = load.stop();
    assert!(made.len() > 100);
    assert_eq!(failures(&made, start), [""; 0], "of {} requests", made.len());
    assert!(!download.has_ended() && !draining.has_ended());
    download.finish().unwrap();
    draining.finish().unwrap();

    // The new daemon is in charge: health is watched, and commands are obeyed.
    nginx[1].restart();
    daemon.wait_for("b is up", |status| {
        status.services[0].backends[1].health == Health::Up
    });
    daemon.done(&["enable", "web", "d"]);
    drop(connection_to(&topology, "b"));
    drop(connection_to(&topology, "d"));
}

#[test]
fn connections_go_on_after_kill_9_and_the_next_daemon_keeps_them() {
    connections_go_on_while_no_daemon_runs("nat", |daemon| daemon.kill());
    connections_go_on_while_no_daemon_runs("full-nat", |daemon| daemon.kill());
}

#[test]
fn connections_go_on_after_sigterm_and_the_next_daemon_keeps_them() {
    connections_go_on_while_no_daemon_runs("nat", |daemon| daemon.terminate());
    connections_go_on_while_no_daemon_runs("full-nat", |daemon| daemon.terminate());
}

#[test]
fn a_configuration_that_changed_meanwhile_is_taken_over_with_the_flows_that_it_keeps() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web()]);
    daemon.start_up();
    let download = connection_to(&topology, "a").download();
    daemon.kill();
    daemon.configure(&INTERFACES, &[web().without("b").text("strategy", "ip-hash")]);
    daemon.start();
    download.proceeds();
    assert_eq!(daemon.status().services[0].backends.len(), 2);
    download.finish().unwrap();
}

#[test]
fn a_second_daemon_of_an_instance_refuses_and_leaves_the_first_alone() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web()]);
    daemon.start_up();
    let second = daemon.run_to_end();
    assert_eq!(second.code, 1);
    assert!(
        second.stderr.contains("a daemon of this instance runs already"),
        "{}",
        second.stderr
    );
    drop(connection_to(&topology, "a"));
    assert_eq!(daemon.status().services[0].backends[0].health, Health::Up);
}

#[test]
fn a_daemon_is_ready_and_answers_within_seconds() {
    let topology = topology();
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web()]);
    for _ in 0..2 {
        let start = Instant::now();
        daemon.start();
        // Behind the first look for changes to the maps.
        daemon.status();
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        daemon.kill();
    }
}
