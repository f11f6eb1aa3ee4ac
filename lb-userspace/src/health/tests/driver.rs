use std::{
    net::SocketAddr,
    os::fd::AsRawFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv},
};
use tokio::{io::AsyncWriteExt, net::TcpStream, sync::mpsc, time::timeout};

use super::{GENEROUS, Server, any_port, check, hang, http, read_head, refusing, tcp, wait_until};
use crate::{
    config::{HealthCheck, Probe},
    health::{Driver, ProbeReport, SocketOptions, Target, Transition},
    model::Health,
};

const OFTEN: Duration = Duration::from_millis(100);

fn target(backend: &str, address: SocketAddr, check: HealthCheck, initial: Health) -> Target {
    Target {
        service: "web".into(),
        backend: backend.into(),
        address,
        check,
        socket: SocketOptions::default(),
        vip: None,
        initial,
    }
}

fn driver() -> (Driver, mpsc::Receiver<Transition>) {
    let (sender, receiver) = mpsc::channel(16);
    (Driver::new(sender), receiver)
}

async fn next(receiver: &mut mpsc::Receiver<Transition>) -> Transition {
    timeout(GENEROUS, receiver.recv()).await.unwrap().unwrap()
}

fn report(driver: &Driver, backend: &str) -> ProbeReport {
    driver.report().remove(&("web".into(), backend.into())).unwrap()
}

/// A server that answers 200 or 503 as it is told.
async fn switchable() -> (Server, Arc<AtomicBool>) {
    let healthy = Arc::new(AtomicBool::new(true));
    let told = Arc::clone(&healthy);
    let server = Server::start(move |mut stream| {
        let told = Arc::clone(&told);
        async move {
            read_head(&mut stream).await;
            let status = if told.load(Ordering::SeqCst) { 200 } else { 503 };
            let answer = format!("HTTP/1.1 {status} So\r\nContent-Length: 0\r\n\r\n");
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    })
    .await;
    (server, healthy)
}

#[tokio::test]
async fn the_first_probe_decides_at_once() {
    let (driver, mut receiver) = driver();
    let server = Server::start(hang).await;
    let (refusing, _socket) = refusing();
    // With this interval only the first probe can have said it.
    let check = check(tcp(), Duration::from_secs(3600), GENEROUS, 3, 3);
    driver.set_targets(vec![
        target("alive", server.address, check.clone(), Health::Unknown),
        target("dead", refusing, check, Health::Unknown),
    ]);
    let mut transitions = [next(&mut receiver).await, next(&mut receiver).await];
    transitions.sort_by(|one, other| one.backend.cmp(&other.backend));
    let [alive, dead] = transitions;
    assert_eq!(
        (alive.service.as_str(), alive.backend.as_str(), alive.health),
        ("web", "alive", Health::Up)
    );
    assert_eq!(
        alive.cause,
        format!("connect to {} succeeded (1 in a row)", server.address)
    );
    assert_eq!((dead.backend.as_str(), dead.health), ("dead", Health::Down));
    assert_eq!(
        dead.cause,
        format!("connect to {refusing}: connection refused (1 in a row)")
    );
}

#[tokio::test]
async fn a_backend_that_dies_and_returns_is_announced_each_time_once() {
    let (driver, mut receiver) = driver();
    let server = Server::start(hang).await;
    let address = server.address;
    let check = check(tcp(), OFTEN, OFTEN, 2, 3);
    driver.set_targets(vec![target("a", address, check.clone(), Health::Down)]);
    let up = next(&mut receiver).await;
    assert_eq!(up.cause, format!("connect to {address} succeeded (2 in a row)"));

    drop(server);
    let died = Instant::now();
    let down = next(&mut receiver).await;
    assert_eq!(down.health, Health::Down);
    assert_eq!(
        down.cause,
        format!("connect to {address}: connection refused (3 in a row)")
    );
    assert!(died.elapsed() < check.interval * check.fall + check.timeout + GENEROUS / 4);
    wait_until(|| report(&driver, "a").consecutive >= 5).await;

    let _server = Server::start_at(address, hang).await;
    assert_eq!(next(&mut receiver).await.health, Health::Up);
    wait_until(|| report(&driver, "a").consecutive >= 5).await;
    assert!(receiver.try_recv().is_err());
}

#[tokio::test]
async fn a_flapping_backend_changes_only_after_enough_in_a_row() {
    let (driver, mut receiver) = driver();
    let answers = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&answers);
    // Two of three answers are bad, but never three in a row.
    let server = Server::start(move |mut stream: TcpStream| {
        let count = Arc::clone(&count);
        async move {
            read_head(&mut stream).await;
            let good = count.fetch_add(1, Ordering::SeqCst).is_multiple_of(3);
            let status = if good { "200 OK" } else { "503 So" };
            let _ = stream
                .write_all(format!("HTTP/1.1 {status}\r\n\r\n").as_bytes())
                .await;
        }
    })
    .await;
    // A timeout that no busy machine exceeds: only the answers count.
    let check = check(http("/"), Duration::from_millis(5), GENEROUS, 1, 3);
    driver.set_targets(vec![target("a", server.address, check, Health::Unknown)]);
    assert_eq!(next(&mut receiver).await.health, Health::Up);
    wait_until(|| answers.load(Ordering::SeqCst) > 60).await;
    assert!(receiver.try_recv().is_err());
}

#[tokio::test]
async fn health_follows_what_the_server_answers() {
    let (driver, mut receiver) = driver();
    let (server, healthy) = switchable().await;
    let check = check(http("/healthz"), Duration::from_millis(20), GENEROUS, 2, 3);
    driver.set_targets(vec![target("a", server.address, check, Health::Unknown)]);
    assert_eq!(next(&mut receiver).await.health, Health::Up);
    for _ in 0..5 {
        healthy.store(false, Ordering::SeqCst);
        let down = next(&mut receiver).await;
        assert_eq!(down.health, Health::Down);
        let words = format!("GET http://{}/healthz: status 503 (3 in a row)", server.address);
        assert_eq!(down.cause, words);
        healthy.store(true, Ordering::SeqCst);
        assert_eq!(next(&mut receiver).await.health, Health::Up);
    }
}

#[tokio::test]
async fn unchanged_targets_go_on_undisturbed() {
    let (driver, mut receiver) = driver();
    let server = Server::start(hang).await;
    let check = check(tcp(), Duration::from_secs(3600), GENEROUS, 2, 3);
    let targets = vec![target("a", server.address, check, Health::Unknown)];
    for _ in 0..20 {
        driver.set_targets(targets.clone());
        tokio::task::yield_now().await;
    }
    assert_eq!(next(&mut receiver).await.health, Health::Up);
    for _ in 0..20 {
        driver.set_targets(targets.clone());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    wait_until(|| server.accepted() == 1).await;
    assert!(receiver.try_recv().is_err());
}

#[tokio::test]
async fn a_target_removed_while_probed_is_heard_of_no_more() {
    let (driver, mut receiver) = driver();
    let hanging = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&hanging);
    let server = Server::start(move |stream| {
        let count = Arc::clone(&count);
        async move {
            count.fetch_add(1, Ordering::SeqCst);
            hang(stream).await;
            count.fetch_sub(1, Ordering::SeqCst);
        }
    })
    .await;
    let check = check(http("/"), GENEROUS, GENEROUS, 1, 1);
    driver.set_targets(vec![target("a", server.address, check, Health::Unknown)]);
    wait_until(|| hanging.load(Ordering::SeqCst) == 1).await;
    driver.set_targets(Vec::new());
    assert!(driver.report().is_empty() && driver.health().is_empty());
    // The connection of the probe is closed with it.
    wait_until(|| hanging.load(Ordering::SeqCst) == 0).await;
    assert!(receiver.try_recv().is_err());
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn a_changed_check_keeps_health_and_probes_anew() {
    let (driver, mut receiver) = driver();
    let (server, healthy) = switchable().await;
    let seldom = Duration::from_secs(3600);
    let first = check(tcp(), seldom, GENEROUS, 2, 3);
    driver.set_targets(vec![target("a", server.address, first, Health::Unknown)]);
    assert_eq!(next(&mut receiver).await.health, Health::Up);

    healthy.store(false, Ordering::SeqCst);
    let second = check(http("/"), seldom, GENEROUS, 2, 2);
    driver.set_targets(vec![target("a", server.address, second, Health::Unknown)]);
    wait_until(|| report(&driver, "a").last_result.contains("status 503")).await;
    assert_eq!(
        (report(&driver, "a").health, report(&driver, "a").consecutive),
        (Health::Up, 1)
    );
    assert!(receiver.try_recv().is_err());

    // Only a threshold: what has been counted still counts.
    let third = check(http("/"), seldom, GENEROUS, 1, 2);
    driver.set_targets(vec![target("a", server.address, third, Health::Unknown)]);
    let down = next(&mut receiver).await;
    assert!(down.cause.ends_with("status 503 (2 in a row)"), "{}", down.cause);
}

#[tokio::test]
async fn another_address_is_another_server() {
    let (driver, mut receiver) = driver();
    let server = Server::start(hang).await;
    let (refusing, _socket) = refusing();
    let check = check(tcp(), Duration::from_secs(3600), GENEROUS, 2, 3);
    driver.set_targets(vec![target("a", server.address, check.clone(), Health::Unknown)]);
    assert_eq!(next(&mut receiver).await.health, Health::Up);
    driver.set_targets(vec![target("a", refusing, check, Health::Unknown)]);
    let down = next(&mut receiver).await;
    assert_eq!(
        (down.health, report(&driver, "a").address),
        (Health::Down, refusing)
    );
}

#[tokio::test]
async fn another_port_for_the_probe_alone_keeps_health() {
    let (driver, mut receiver) = driver();
    let server = Server::start(hang).await;
    let (refusing, _socket) = refusing();
    let seldom = Duration::from_secs(3600);
    let probe_at = |address: SocketAddr| {
        let probe = Probe::Tcp {
            port: Some(address.port()),
        };
        target(
            "a",
            address,
            check(probe, seldom, GENEROUS, 2, 3),
            Health::Unknown,
        )
    };
    driver.set_targets(vec![probe_at(server.address)]);
    assert_eq!(next(&mut receiver).await.health, Health::Up);
    driver.set_targets(vec![probe_at(refusing)]);
    wait_until(|| report(&driver, "a").last_result.contains("refused")).await;
    assert_eq!(report(&driver, "a").health, Health::Up);
}

#[tokio::test]
async fn without_a_probe_a_backend_is_up_at_once() {
    let (driver, mut receiver) = driver();
    let (refusing, _socket) = refusing();
    let none = check(Probe::None, OFTEN, OFTEN, 2, 3);
    driver.set_targets(vec![target("a", refusing, none.clone(), Health::Unknown)]);
    assert_eq!(report(&driver, "a").health, Health::Up);
    let up = next(&mut receiver).await;
    assert_eq!((up.health, up.cause.as_str()), (Health::Up, "no health check"));

    let probed = check(tcp(), OFTEN, OFTEN, 2, 1);
    driver.set_targets(vec![target("a", refusing, probed, Health::Unknown)]);
    assert_eq!(next(&mut receiver).await.health, Health::Down);
    driver.set_targets(vec![target("a", refusing, none, Health::Unknown)]);
    assert_eq!(next(&mut receiver).await.health, Health::Up);
}

#[tokio::test]
async fn probes_of_one_backend_never_overlap() {
    let (driver, mut receiver) = driver();
    let open = Arc::new(Mutex::new(Vec::<TcpStream>::new()));
    let most = Arc::new(AtomicUsize::new(0));
    let (open_here, most_here) = (Arc::clone(&open), Arc::clone(&most));
    let server = Server::start(move |mut stream: TcpStream| {
        let (open, most) = (Arc::clone(&open_here), Arc::clone(&most_here));
        async move {
            // A connection counts from its request on: an abandoned one may be accepted late, and is reset by then.
            if read_head(&mut stream).await.is_empty() {
                return;
            }
            let mut open = open.lock().unwrap();
            open.push(stream);
            // Asked of the kernel itself, of this one too: that one has been closed may not have been noticed yet.
            open.retain(|stream| {
                let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
                recv(stream.as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN)
            });
            most.fetch_max(open.len(), Ordering::SeqCst);
        }
    })
    .await;
    // The timeout is the interval, so that each probe ends when the next one starts.
    let check = check(http("/"), OFTEN, OFTEN, 1, 5);
    driver.set_targets(vec![target("a", server.address, check, Health::Up)]);
    let down = next(&mut receiver).await;
    assert!(
        down.cause.ends_with("timed out after 100ms (5 in a row)"),
        "{}",
        down.cause
    );
    wait_until(|| server.accepted() >= 8).await;
    assert_eq!(most.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_receiver_that_lags_behind_gets_the_latest_health() {
    let (sender, mut receiver) = mpsc::channel(1);
    let driver = Driver::new(sender);
    let (server, healthy) = switchable().await;
    let check = check(http("/"), Duration::from_millis(10), GENEROUS, 1, 1);
    let target = |name| target(name, server.address, check.clone(), Health::Unknown);
    driver.set_targets(vec![target("a"), target("b")]);
    // The channel has room for one; nobody reads, and probing goes on nevertheless.
    let all = |health| driver.health().values().all(|&other| other == health);
    for _ in 0..3 {
        wait_until(|| all(Health::Up)).await;
        healthy.store(false, Ordering::SeqCst);
        wait_until(|| all(Health::Down)).await;
        healthy.store(true, Ordering::SeqCst);
    }
    wait_until(|| all(Health::Up)).await;
    let mut known = std::collections::BTreeMap::new();
    while let Ok(Some(transition)) = timeout(Duration::from_millis(500), receiver.recv()).await {
        let before = known.insert(transition.backend, transition.health);
        assert_ne!(before, Some(transition.health));
    }
    assert_eq!(
        known.into_iter().collect::<Vec<_>>(),
        [("a".to_owned(), Health::Up), ("b".to_owned(), Health::Up)]
    );
}

#[tokio::test]
async fn a_dropped_driver_leaves_no_task_and_no_connection() {
    let metrics = tokio::runtime::Handle::current().metrics();
    let server = Server::start(|_| async {}).await;
    let before = metrics.num_alive_tasks();
    let (driver, receiver) = driver();
    let targets = (0..50)
        .map(|number| {
            let check = check(http("/"), OFTEN, OFTEN, 2, 3);
            target(&number.to_string(), server.address, check, Health::Up)
        })
        .collect();
    driver.set_targets(targets);
    assert!(metrics.num_alive_tasks() >= before + 50);
    wait_until(|| server.accepted() > 100).await;
    drop(driver);
    wait_until(|| metrics.num_alive_tasks() <= before).await;
    drop(receiver);
}

#[tokio::test]
async fn a_thousand_targets_are_all_probed_and_some_replaced() {
    let (driver, mut receiver) = driver();
    let server = Server::start(hang).await;
    let (refusing, _socket) = refusing();
    // Few files may be open where this runs: socket errors are then no verdict and the next round brings it.
    let check = check(tcp(), Duration::from_secs(1), Duration::from_secs(1), 1, 3);
    let targets = |address: &dyn Fn(usize) -> SocketAddr| -> Vec<Target> {
        (0..1000)
            .map(|number| {
                target(
                    &number.to_string(),
                    address(number),
                    check.clone(),
                    Health::Unknown,
                )
            })
            .collect()
    };
    driver.set_targets(targets(&|_| server.address));
    let mut up = std::collections::BTreeSet::new();
    while up.len() < 1000 {
        let transition = next(&mut receiver).await;
        match transition.health {
            Health::Up => up.insert(transition.backend),
            _ => up.remove(&transition.backend),
        };
    }
    driver.set_targets(targets(&|number| {
        if number < 500 { refusing } else { server.address }
    }));
    while up.len() > 500 {
        let transition = next(&mut receiver).await;
        match transition.health {
            Health::Down => up.remove(&transition.backend),
            _ => up.insert(transition.backend),
        };
    }
    assert!(up.iter().all(|backend| backend.parse::<usize>().unwrap() >= 500));
}

#[tokio::test]
async fn a_report_is_readable_json() {
    let (driver, mut receiver) = driver();
    let server = Server::start_at(any_port(), hang).await;
    let check = check(tcp(), Duration::from_secs(3600), GENEROUS, 2, 3);
    driver.set_targets(vec![target("a", server.address, check, Health::Unknown)]);
    let before = report(&driver, "a");
    assert_eq!(
        (before.health, before.last_probe, before.last_result.as_str()),
        (Health::Unknown, None, "")
    );
    next(&mut receiver).await;

    let json = serde_json::to_value(report(&driver, "a")).unwrap();
    assert_eq!(json["health"], "up");
    assert_eq!(json["address"], server.address.to_string());
    assert_eq!(
        json["last_result"],
        format!("connect to {} succeeded", server.address)
    );
    assert_eq!(json["consecutive"], 1);
    let moment = humantime::parse_rfc3339(json["last_probe"].as_str().unwrap()).unwrap();
    assert!(moment.elapsed().unwrap() < GENEROUS);
    let back: ProbeReport = serde_json::from_value(json).unwrap();
    assert_eq!(back.last_probe, Some(moment));
}
