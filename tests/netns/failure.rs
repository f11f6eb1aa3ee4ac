//! Backends that die, and what may not suffer from it.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use tests::{
    daemon::Daemon,
    http::{Connection, Download},
    load::{Load, Request, assert_shares, failures, requests},
    machine::{self, Pace},
    maps,
    services::Service,
};
use xlb::{lab::Topology, model::Health, observe::status::Status};

use crate::scene::{
    INTERFACES, WEB, connection_by, connection_to, nginx, source, topology, topology_of, web,
};

#[test]
fn a_killed_backend_is_avoided_in_time_and_gets_its_share_again() {
    for forward in ["nat", "full-nat"] {
        let topology = topology();
        let mut nginx = nginx(&topology);
        let mut daemon = Daemon::new(&topology.balancer);
        daemon.configure(&INTERFACES, &[web().text("forward", forward)]);
        daemon.start_up();

        let start = Instant::now();
        let load = Load::start(&topology.client, WEB);
        std::thread::sleep(machine::bound(Duration::from_millis(500)));
        nginx[2].kill();
        let killed = Instant::now();
        daemon.wait_for("the killed backend is down", |status| {
            status.services[0].backends[2].health == Health::Down
        });
        let detection = Pace::of_this_machine().detection();
        std::thread::sleep(
            detection.saturating_sub(killed.elapsed()) + machine::bound(Duration::from_secs(1)),
        );
        let requests_made = load.stop();

        let at = |from: Option<Instant>, to: Option<Instant>| -> Vec<Request> {
            let requests = requests_made.iter();
            requests
                .filter(|request| from.is_none_or(|from| request.at >= from))
                .filter(|request| to.is_none_or(|to| request.at < to))
                .cloned()
                .collect()
        };
        // A request that was under way when it was killed is its own, too.
        let before = at(
            None,
            killed.checked_sub(machine::bound(Duration::from_millis(50))),
        );
        let after = at(Some(killed + detection), None);
        assert!(
            before.len() > 50 && after.len() > 50,
            "{} and {}",
            before.len(),
            after.len()
        );
        assert_eq!(failures(&before, start), [""; 0], "before");
        assert_eq!(failures(&after, killed), [""; 0], "after {detection:?}");
        for request in &after {
            assert_ne!(request.answer.as_deref(), Ok("c"));
        }
        // The kernel of the killed one's host refuses connections; nothing else on the way does.
        for request in &requests_made {
            if let Err(error) = &request.answer {
                let is_its_own =
                    error.contains("refused") || error.contains("reset") || error.contains("end of file");
                assert!(is_its_own, "a request on another backend failed: {error}");
            }
        }

        nginx[2].restart();
        daemon.wait_for("the backend is up again", |status| {
            status.services[0].backends[2].health == Health::Up
        });
        let answers = requests(&topology.client, source(), WEB, machine::count(3000));
        assert_shares(&answers, &[("a", 1), ("b", 1), ("c", 1)]);
    }
}

#[test]
fn clients_of_the_other_backends_notice_nothing_of_a_death() {
    machine::require_root_nginx_and_curl();
    let topology = Topology::with_client_addresses(3, 60).unwrap();
    let mut nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    // By the client's address it is known beforehand whose a request will be.
    daemon.configure(&INTERFACES, &[web().text("strategy", "ip-hash")]);
    daemon.start_up();

    let ask = |address| {
        let connection = Connection::dial(WEB, Some(SocketAddr::new(address, 0)))?;
        connection.get_last("/")
    };
    let homes: Vec<_> = topology
        .client
        .run(|| {
            let addresses = topology.client_addresses();
            addresses
                .map(|address| (address, ask(address).unwrap()))
                .collect()
        })
        .unwrap();
    let others: Vec<_> = homes.into_iter().filter(|(_, home)| home != "c").collect();
    assert!(others.len() > 20, "{others:?}");

    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let clients = topology
        .client
        .spawn(move || {
            let mut made = 0;
            while !stopped.load(Ordering::Relaxed) {
                for (address, home) in &others {
                    let answer = ask(*address);
                    assert!(
                        answer
                            .as_ref()
                            .is_ok_and(|name| ["a", "b"].contains(&name.as_str())),
                        "request {made} from {address}, a client of {home}: {answer:?}"
                    );
                    made += 1;
                }
            }
            made
        })
        .unwrap();
    nginx[2].kill();
    daemon.wait_for("the killed backend is down", |status| {
        status.services[0].backends[2].health == Health::Down
    });
    nginx[2].restart();
    daemon.wait_for("the backend is up again", |status| {
        status.services[0].backends[2].health == Health::Up
    });
    stop.store(true, Ordering::Relaxed);
    let made = clients.join().expect("no request of theirs fails").unwrap();
    assert!(made > 100, "only {made} requests");
}

#[test]
fn long_downloads_outlive_whatever_happens_to_the_other_backends() {
    let topology = topology_of(4);
    let mut nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    let configure = |daemon: &Daemon, change: &dyn Fn(Service) -> Service| {
        let services = [("web", 80, "nat"), ("web-full", 81, "full-nat")];
        let services = services.map(|(name, port, forward)| {
            change(
                web()
                    .text("name", name)
                    .with("port", port)
                    .text("forward", forward),
            )
        });
        daemon.configure(&["eth0", "eth1", "eth2", "eth3", "eth4"], &services);
    };
    configure(&daemon, &|service| service);
    daemon.start_up();

    let start = Instant::now();
    let downloads = [80, 81].map(|port| {
        let server = SocketAddr::new(Topology::VIP.into(), port);
        connection_by(&topology, server, "a").download()
    });
    let proceed = || downloads.iter().for_each(Download::proceeds);
    proceed();

    nginx[1].kill();
    daemon.wait_for("b is down", |status| all(status, 1, Health::Down));
    proceed();
    nginx[1].restart();
    daemon.wait_for("b is up", |status| all(status, 1, Health::Up));
    proceed();

    daemon.done(&["reload"]);
    proceed();

    configure(&daemon, &|service| service.backend("d", "10.2.4.2:8080"));
    daemon.done(&["reload"]);
    daemon.wait_for("d is up", |status| all(status, 3, Health::Up));
    drop(connection_to(&topology, "d"));
    proceed();

    configure(&daemon, &|service| service.without("b"));
    daemon.signal(Signal::SIGHUP);
    daemon.wait_for("b and d are removed", |status| {
        status.services.iter().all(|service| service.backends.len() == 2)
    });
    proceed();

    for service in ["web", "web-full"] {
        daemon.done(&["drain", service, "c"]);
        proceed();
        daemon.done(&["enable", service, "c"]);
        daemon.done(&["disable", service, "c"]);
        proceed();
    }

    while start.elapsed() < Duration::from_secs(10) {
        proceed();
    }
    for download in downloads {
        assert!(!download.has_ended(), "it was over before all this was");
        download.finish().unwrap();
    }
}

/// Whether each service has a backend at this place, with this health and a known next hop.
fn all(status: &Status, index: usize, health: Health) -> bool {
    let mut backends = status.services.iter().map(|service| service.backends.get(index));
    backends.all(|backend| {
        backend.is_some_and(|backend| backend.health == health && backend.next_hop_problem.is_none())
    })
}

#[test]
fn when_one_of_three_leaves_the_others_keep_their_slots() {
    let topology = topology();
    let mut nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web()]);
    daemon.start_up();
    let before = owners(&daemon);

    let mut leaves = |how: &str, leave: &mut dyn FnMut(&mut Daemon)| {
        leave(&mut daemon);
        daemon.wait_for(how, |status| {
            let backend = status.services[0]
                .backends
                .iter()
                .find(|backend| backend.name == "c");
            backend.is_none_or(|backend| backend.share == 0.0)
        });
        assert_others_keep_their_slots(&before, &owners(&daemon), how);
    };
    leaves("drained", &mut |daemon| drop(daemon.done(&["drain", "web", "c"])));
    leaves("disabled", &mut |daemon| {
        drop(daemon.done(&["disable", "web", "c"]));
    });
    leaves("killed", &mut |daemon| {
        daemon.done(&["enable", "web", "c"]);
        daemon.wait_for("it is back", |status| status.services[0].backends[2].share > 0.3);
        nginx[2].kill();
    });
    leaves("removed", &mut |daemon| {
        let two: Service = web().without("c");
        daemon.configure(&INTERFACES, &[two]);
        daemon.done(&["reload"]);
    });
}

/// The backend's address that each slot of the only service leads to.
fn owners(daemon: &Daemon) -> Vec<String> {
    let contents = maps::contents(&daemon.pins());
    let service = contents.pools.keys().next().expect("a pool");
    let address = |id: &u32| {
        let backend = contents.backends.get(id);
        backend.map_or_else(String::new, |backend| backend.address.to_string())
    };
    maps::by_slot(&daemon.pins(), *service)
        .iter()
        .map(address)
        .collect()
}

/// At most one in a hundred slots of those that stay may change its owner.
fn assert_others_keep_their_slots(before: &[String], after: &[String], how: &str) {
    assert_eq!(before.len(), after.len());
    let stay = |owner: &String| owner == "10.2.1.2" || owner == "10.2.2.2";
    assert!(
        after.iter().all(stay),
        "{how}: a slot leads to the one that has left"
    );
    let theirs = before.iter().zip(after).filter(|(before, _)| stay(before));
    let (total, moved) = theirs.fold((0, 0), |(total, moved), (before, after)| {
        (total + 1, moved + usize::from(before != after))
    });
    assert!(
        total > 10_000 && moved * 100 <= total,
        "{how}: {moved} of {total} slots moved"
    );
}
