//! Backends that are drained, disabled and enabled.

use std::time::{Duration, Instant};

use tests::{
    daemon::Daemon,
    load::{Load, assert_shares, failures, requests},
    machine::{self, eventually},
};
use xlb::model::Health;

use crate::scene::{INTERFACES, WEB, connection_to, nginx, source, topology, web};

/// How often the daemon looks for flows to end.
const SWEEP: Duration = Duration::from_secs(5);

#[test]
fn a_draining_backend_keeps_its_connections_until_the_drain_timeout() {
    for forward in ["nat", "full-nat"] {
        let topology = topology();
        let _nginx = nginx(&topology);
        let mut daemon = Daemon::new(&topology.balancer);
        daemon.configure(
            &INTERFACES,
            &[web().text("forward", forward).text("drain-timeout", "3s")],
        );
        daemon.start_up();
        let download = connection_to(&topology, "a").download();
        let other = connection_to(&topology, "b").download();
        let mut idle = connection_to(&topology, "a");

        let drained = Instant::now();
        let message = daemon.done(&["drain", "web", "a"]);
        assert!(message.contains("web/a is draining"), "{message}");
        assert_eq!(daemon.backend("web", "a").administrative, "draining");
        download.proceeds();
        assert_eq!(idle.get("/").unwrap(), "a", "an idle connection goes on");
        let answers = requests(&topology.client, source(), WEB, machine::count(500));
        assert_eq!(
            answers.into_keys().collect::<Vec<_>>(),
            ["b", "c"],
            "new connections avoid it"
        );
        if drained.elapsed() < Duration::from_secs(3) {
            assert!(!download.has_ended());
        }

        eventually("its flows end", SWEEP + Duration::from_secs(3), || {
            download.has_ended()
        });
        assert!(
            drained.elapsed() >= Duration::from_secs(3),
            "{:?}",
            drained.elapsed()
        );
        download.finish().unwrap_err();
        idle.get("/").unwrap_err();
        daemon.wait_for("it has no flows", |status| {
            status.services[0].backends[0].flows == 0
        });
        other.finish().unwrap();

        daemon.done(&["enable", "web", "a"]);
        let source = "10.1.0.2:20000".parse().unwrap();
        let answers = requests(&topology.client, source, WEB, machine::count(1000));
        assert!(
            answers.contains_key("a"),
            "enabled, it gets connections again: {answers:?}"
        );
    }
}

#[test]
fn disable_ends_the_connections_at_once_and_enable_brings_new_ones() {
    for forward in ["nat", "full-nat"] {
        let topology = topology();
        let _nginx = nginx(&topology);
        let mut daemon = Daemon::new(&topology.balancer);
        daemon.configure(&INTERFACES, &[web().text("forward", forward)]);
        daemon.start_up();
        let download = connection_to(&topology, "a").download();
        let other = connection_to(&topology, "b").download();
        download.proceeds();

        daemon.done(&["disable", "web", "a"]);
        eventually("the download is cut", Duration::from_secs(2), || {
            download.has_ended()
        });
        download.finish().unwrap_err();
        let state = daemon.backend("web", "a");
        assert_eq!((state.administrative.as_str(), state.flows), ("disabled", 0));
        let answers = requests(&topology.client, source(), WEB, machine::count(500));
        assert_eq!(answers.into_keys().collect::<Vec<_>>(), ["b", "c"]);
        // A reload does not forget what an operator has decided.
        daemon.done(&["reload"]);
        assert_eq!(daemon.backend("web", "a").administrative, "disabled");

        daemon.done(&["enable", "web", "a"]);
        let source = "10.1.0.2:20000".parse().unwrap();
        let answers = requests(&topology.client, source, WEB, machine::count(3000));
        assert_shares(&answers, &[("a", 1), ("b", 1), ("c", 1)]);
        other.finish().unwrap();
    }
}

#[test]
fn workers_are_stopped_after_a_drain_without_a_lost_call() {
    let topology = topology();
    let mut nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web()]);
    daemon.start_up();
    let start = Instant::now();
    let load = Load::start(&topology.client, WEB);
    for (index, worker) in ["a", "b", "c"].into_iter().enumerate() {
        let long_call = connection_to(&topology, worker).download();
        long_call.proceeds();
        daemon.done(&["drain", "web", worker]);
        std::thread::sleep(machine::bound(Duration::from_millis(300)));
        long_call.finish().expect("the long call ends well");
        nginx[index].kill();
        daemon.wait_for("the worker is down", |status| {
            status.services[0].backends[index].health == Health::Down
        });
        nginx[index].restart();
        daemon.wait_for("the worker is up", |status| {
            status.services[0].backends[index].health == Health::Up
        });
        daemon.done(&["enable", "web", worker]);
    }
    let made = load.stop();
    assert!(made.len() > 200, "{}", made.len());
    assert_eq!(failures(&made, start), [""; 0], "of {} calls", made.len());
}

#[test]
fn unknown_names_are_refused_with_those_that_exist() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web()]);
    daemon.start();
    for verb in ["drain", "disable", "enable"] {
        let outcome = daemon.xlb(&[verb, "wbe", "a"]);
        assert_eq!(outcome.code, 1);
        assert_eq!(
            outcome.stderr,
            "xlb: there is no service \"wbe\"; there are: web\n"
        );
        let outcome = daemon.xlb(&[verb, "web", "d"]);
        assert_eq!(outcome.code, 1);
        assert_eq!(
            outcome.stderr,
            "xlb: service \"web\" has no backend \"d\"; it has: a, b, c\n"
        );
    }
}

#[test]
fn without_a_daemon_its_commands_exit_with_69() {
    let topology = topology();
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web()]);
    let commands: [&[&str]; 5] = [
        &["status"],
        &["reload"],
        &["drain", "web", "a"],
        &["disable", "web", "a"],
        &["enable", "web", "a"],
    ];
    let unreachable = |daemon: &Daemon| {
        for command in commands {
            let outcome = daemon.xlb(command);
            assert_eq!(outcome.code, 69, "{command:?}: {outcome:?}");
            assert!(
                outcome.stderr.starts_with("xlb: no daemon answers on "),
                "{outcome:?}"
            );
            assert_eq!(outcome.stdout, "");
        }
    };
    unreachable(&daemon);
    daemon.start();
    daemon.kill();
    unreachable(&daemon);
}

#[test]
fn a_service_is_healthy_while_it_has_its_min_healthy_backends() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web().with("min-healthy", 2)]);
    daemon.start_up();
    let health = || {
        let service = &daemon.status().services[0];
        (service.healthy, service.healthy_backends, service.min_healthy)
    };
    assert_eq!(health(), (true, 3, 2));
    daemon.done(&["drain", "web", "a"]);
    assert_eq!(health(), (true, 2, 2));
    daemon.done(&["disable", "web", "b"]);
    assert_eq!(health(), (false, 1, 2));
    let table = daemon.done(&["status"]);
    assert!(
        table.contains("web tcp 203.0.113.10:80 consistent-hash nat not healthy (1 of at least 2 backends)"),
        "{table}"
    );
    daemon.done(&["enable", "web", "b"]);
    assert_eq!(health(), (true, 2, 2));
}
