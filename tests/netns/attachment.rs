//! How the program gets onto interfaces and off them again.

use std::{
    fs,
    os::unix::process::CommandExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use tests::{
    daemon::{Daemon, outcome},
    http::Connection,
    load::{Load, failures, requests},
    machine,
    ping::ping,
};
use xlb::{
    datapath::{
        LinkKind, Pins,
        barrier::{self, Barrier},
        pass::PassAll,
    },
    lab::{Namespace, Topology},
};

use crate::scene::{INTERFACES, WEB, connection_to, has_program, nginx, source, topology, web};

fn modes(daemon: &Daemon) -> Vec<(String, String, Option<String>)> {
    let interfaces = daemon.status().interfaces.into_iter();
    interfaces
        .map(|interface| (interface.name, interface.xdp_mode, interface.fallback))
        .collect()
}

fn all(mode: &str) -> Vec<(String, String, Option<String>)> {
    INTERFACES
        .map(|name| (name.to_owned(), mode.to_owned(), None))
        .to_vec()
}

#[test]
fn auto_gets_native_mode_on_veth_and_says_so() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    for mode in ["auto", "native"] {
        daemon.configure_with(&format!("xdp-mode = \"{mode}\""), &INTERFACES, &[web()]);
        daemon.start_up();
        assert_eq!(modes(&daemon), all("native"));
        let table = daemon.done(&["status"]);
        assert!(table.contains("on eth0 (native), eth1 (native), "), "{table}");
        daemon.terminate();
    }
}

#[test]
fn generic_mode_balances_and_says_so() {
    for forward in ["nat", "full-nat"] {
        let topology = topology();
        let _nginx = nginx(&topology);
        let mut daemon = Daemon::new(&topology.balancer);
        daemon.configure_with(
            "xdp-mode = \"generic\"",
            &INTERFACES,
            &[web().text("forward", forward)],
        );
        daemon.start_up();
        assert_eq!(modes(&daemon), all("generic"));
        let answers = requests(&topology.client, source(), WEB, machine::count(300));
        assert_eq!(answers.into_keys().collect::<Vec<_>>(), ["a", "b", "c"]);
        let download = connection_to(&topology, "b").download();
        download.proceeds();
        download.finish().unwrap();
    }
}

#[test]
fn the_mode_changes_on_reload_and_connections_go_on() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure_with("xdp-mode = \"generic\"", &INTERFACES, &[web()]);
    daemon.start_up();
    let download = connection_to(&topology, "b").download();
    download.proceeds();
    daemon.configure_with("xdp-mode = \"native\"", &INTERFACES, &[web()]);
    daemon.done(&["reload"]);
    assert_eq!(modes(&daemon), all("native"));
    download.proceeds();
    download.finish().unwrap();
    requests(&topology.client, source(), WEB, machine::count(100));
}

/// A counter of IPv4 or TCP in a namespace (`/proc/net/snmp`).
fn counter(namespace: &Namespace, protocol: &str, name: &str) -> u64 {
    let table = namespace.run(|| fs::read_to_string("/proc/thread-self/net/snmp"));
    let table = table.unwrap().unwrap();
    let mut lines = table
        .lines()
        .filter_map(|line| line.strip_prefix(protocol)?.strip_prefix(": "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut counters = names.split(' ').zip(values.split(' '));
    counters
        .find(|(known, _)| *known == name)
        .unwrap()
        .1
        .parse()
        .unwrap()
}

#[test]
fn the_stack_gets_no_packet_of_a_connection_while_the_mode_changes() {
    const DOWNLOADS: usize = 3;
    const CHANGES: usize = 12;
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure_with("xdp-mode = \"generic\"", &INTERFACES, &[web()]);
    daemon.start_up();
    let stop = Arc::new(AtomicBool::new(false));
    let download = || {
        let stop = Arc::clone(&stop);
        let work = move || {
            while !stop.load(Ordering::Relaxed) {
                Connection::dial(WEB, None)?.get_last("/big")?;
            }
            Ok::<(), std::io::Error>(())
        };
        topology.client.spawn(work).unwrap()
    };
    let downloads: Vec<_> = (0..DOWNLOADS).map(|_| download()).collect();
    let received = || counter(&topology.client, "Tcp", "InSegs");
    for mode in ["native", "generic"].into_iter().cycle().take(CHANGES) {
        let before = received();
        machine::eventually("segments come", Duration::from_secs(5), || {
            received() > before + 300
        });
        daemon.configure_with(&format!("xdp-mode = \"{mode}\""), &INTERFACES, &[web()]);
        daemon.done(&["reload"]);
        assert_eq!(modes(&daemon), all(mode));
        // The host forwards, and the client resets what comes from a backend's address.
        let forwarded = counter(&topology.balancer, "Ip", "ForwDatagrams");
        let resets = counter(&topology.client, "Tcp", "OutRsts");
        assert_eq!((forwarded, resets), (0, 0), "to {mode}");
    }
    stop.store(true, Ordering::Relaxed);
    for download in downloads {
        download.join().unwrap().unwrap().unwrap();
    }
    assert!(!daemon.log().contains("may end their connections"));
}

#[test]
fn a_barrier_keeps_packets_from_the_stack_until_it_is_dropped_removed_or_over() {
    let topology = topology();
    let pins = Pins::new(&format!("barrier-{}", std::process::id()));
    let index = topology.balancer.ifindex("eth0").unwrap();
    let raise = |kind, limit| {
        let raise = || Barrier::raise(kind, &pins, "eth0", index, limit);
        topology.balancer.run(raise).unwrap().unwrap()
    };
    let answered = || ping(&topology.client, Topology::BALANCER.into(), 1).unwrap() == 1;
    let (long, none) = (Duration::from_secs(3600), Duration::ZERO);
    let mut kinds = vec![LinkKind::Clsact];
    if LinkKind::of_this_kernel() == LinkKind::Tcx {
        kinds.push(LinkKind::Tcx);
    }
    assert!(answered());
    for kind in kinds {
        let barrier = raise(kind, long);
        assert!(!answered(), "{kind:?}");
        topology.balancer.run(|| drop(barrier)).unwrap();
        assert!(answered(), "{kind:?}");
        let barrier = raise(kind, none);
        assert!(answered(), "{kind:?}: it is over and drops");
        topology.balancer.run(|| drop(barrier)).unwrap();
    }

    // As one that is killed leaves it; what comes next may be a barrier of its own, or none.
    std::mem::forget(raise(LinkKind::Clsact, none));
    std::mem::forget(raise(LinkKind::Clsact, long));
    assert!(!answered(), "the one that was left is still there");
    topology
        .balancer
        .run(|| barrier::remove_left_behind(&pins))
        .unwrap()
        .unwrap();
    assert!(answered());
    std::mem::forget(raise(LinkKind::Clsact, long));
    assert!(topology.balancer.run(|| pins.remove_all()).unwrap().unwrap());
    assert!(answered());
}

#[test]
fn an_interface_with_another_program_is_refused_and_nothing_stays_attached() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let index = topology.balancer.ifindex("eth2").unwrap();
    let foreign = topology.balancer.run(|| PassAll::attach(index)).unwrap().unwrap();
    let mut daemon = Daemon::new(&topology.balancer);
    for mode in ["auto", "native", "generic"] {
        daemon.configure_with(&format!("xdp-mode = \"{mode}\""), &INTERFACES, &[web()]);
        let outcome = daemon.run_to_end();
        assert_eq!(outcome.code, 1, "{mode}: {outcome:?}");
        for part in ["eth2", "another XDP program", "ip link set dev eth2 xdp off"] {
            assert!(
                outcome.stderr.contains(part),
                "{mode}: {part}: {}",
                outcome.stderr
            );
        }
        for interface in ["eth0", "eth1", "eth3"] {
            assert!(
                !has_program(&topology.balancer, interface),
                "{mode}: {interface} has a program"
            );
        }
        assert!(
            !daemon.pins().exist() && !daemon.pins().links().exists(),
            "{mode}: pins stay"
        );
    }

    // The same when it is to be added to those of a running daemon.
    daemon.configure(&["eth0", "eth1"], &[web().without("b").without("c")]);
    daemon.start_up();
    daemon.configure(&["eth0", "eth1", "eth3", "eth2"], &[web()]);
    let outcome = daemon.xlb(&["reload"]);
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert!(outcome.stderr.contains("eth2"), "{}", outcome.stderr);
    assert!(
        !has_program(&topology.balancer, "eth3"),
        "eth3 was attached on the way"
    );
    requests(&topology.client, source(), WEB, machine::count(100));
    drop(foreign);
    daemon.done(&["reload"]);
    drop(connection_to(&topology, "b"));
}

#[test]
fn a_start_without_a_control_socket_leaves_nothing_attached() {
    let topology = topology();
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure_with("[api]\nsocket = \"/proc/xlb/xlb.sock\"", &INTERFACES, &[web()]);
    let outcome = daemon.run_to_end();
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert!(
        outcome.stderr.contains("/proc/xlb/xlb.sock"),
        "{}",
        outcome.stderr
    );
    for interface in INTERFACES {
        assert!(
            !has_program(&topology.balancer, interface),
            "{interface} has a program"
        );
    }
    assert!(!daemon.pins().exist());
}

#[test]
fn detach_leaves_nothing_and_waits_for_the_end_of_the_daemon() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web()]);
    daemon.start_up();
    let refused = daemon.xlb(&["detach"]);
    assert_eq!(refused.code, 1);
    assert!(
        refused.stderr.contains("a daemon of this instance runs already"),
        "{refused:?}"
    );
    requests(&topology.client, source(), WEB, machine::count(100));

    daemon.kill();
    for interface in INTERFACES {
        assert!(
            has_program(&topology.balancer, interface),
            "{interface} has no program"
        );
    }
    let instance = daemon.instance().to_string();
    assert_eq!(
        daemon.done(&["detach"]),
        format!("detached instance {instance}\n")
    );
    for interface in INTERFACES {
        assert!(
            !has_program(&topology.balancer, interface),
            "{interface} has a program"
        );
    }
    assert!(!std::path::Path::new("/sys/fs/bpf/xlb").join(&instance).exists());
    assert_eq!(
        daemon.done(&["detach"]),
        format!("instance {instance} has nothing attached\n")
    );

    // And it can be started anew.
    daemon.start_up();
    requests(
        &topology.client,
        "10.1.0.2:20000".parse().unwrap(),
        WEB,
        machine::count(100),
    );
}

/// From there nothing could be done about its VIPs and neighbours, and those that are there are another's.
#[test]
fn detach_in_another_network_namespace_says_so_and_changes_nothing() {
    let topology = topology();
    let _nginx = nginx(&topology);
    let mut daemon = Daemon::new(&topology.balancer);
    daemon.configure(&INTERFACES, &[web()]);
    daemon.start_up();
    daemon.kill();
    let instance = daemon.instance().to_string();
    let detach = |namespace: &Namespace| {
        let mut command = namespace.command(machine::xlb());
        command.args(["--instance", &instance, "detach"]);
        command
    };
    let is_refused = || {
        let refused = outcome(&mut detach(&topology.client));
        let says_why = refused.stderr.contains("in another network namespace");
        assert!(refused.code == 1 && says_why, "{refused:?}");
    };
    is_refused();
    // As what an older version has left.
    let links = daemon.pins().links();
    let layout = links.parent().unwrap();
    fs::rename(layout, layout.with_file_name("v0")).unwrap();
    is_refused();

    // As under `ip netns exec`.
    let mut hidden = detach(&topology.balancer);
    let hide = || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let (none, flags) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
        mount(none, "/", none, flags, none)?;
        umount2("/sys/fs/bpf", MntFlags::MNT_DETACH)?;
        Ok(())
    };
    // SAFETY: it makes system calls alone.
    unsafe { hidden.pre_exec(hide) };
    let refused = outcome(&mut hidden);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("bpffs is not mounted"), "{refused:?}");

    assert!(
        INTERFACES
            .iter()
            .all(|interface| has_program(&topology.balancer, interface))
    );
    assert!(daemon.pins().has_instance());
    daemon.done(&["detach"]);
    assert!(!daemon.pins().has_instance());
    assert!(
        !INTERFACES
            .iter()
            .any(|interface| has_program(&topology.balancer, interface))
    );
}

#[test]
fn detach_of_an_instance_whose_interfaces_are_gone_leaves_the_vips_of_another() {
    let here = topology();
    let _nginx = nginx(&here);
    let mut other = Daemon::new(&here.balancer);
    other.configure(&INTERFACES, &[web().with("assign-vip", true)]);
    other.start_up();
    let gone = topology();
    let _its_nginx = nginx(&gone);
    let mut daemon = Daemon::new(&gone.balancer);
    daemon.configure(&INTERFACES, &[web()]);
    daemon.start_up();
    daemon.kill();
    for interface in INTERFACES {
        let removed = outcome(gone.balancer.command("ip").args(["link", "del", interface]));
        assert_eq!(removed.code, 0, "{removed:?}");
    }
    let has_vip = || {
        let addresses = outcome(here.balancer.command("ip").args(["-o", "address"]));
        addresses.stdout.contains(&format!(" {}/32 ", WEB.ip()))
    };
    assert!(has_vip());
    let instance = daemon.instance().to_string();
    let mut command = here.balancer.command(machine::xlb());
    let done = outcome(command.args(["--instance", &instance, "detach"]));
    assert!(done.stderr.contains("are left alone"), "{done:?}");
    assert_eq!(
        (done.code, done.stdout),
        (0, format!("detached instance {instance}\n"))
    );
    assert!(has_vip());
}

#[test]
fn two_instances_on_one_kernel_do_not_disturb_each_other() {
    let (one, two) = (topology(), topology());
    let (_nginx_one, _nginx_two) = (nginx(&one), nginx(&two));
    let (mut first, mut second) = (Daemon::new(&one.balancer), Daemon::new(&two.balancer));
    // The same interfaces, vip and ports in both.
    first.configure(&INTERFACES, &[web()]);
    second.configure(&INTERFACES, &[web().without("a")]);
    first.start_up();
    let start = Instant::now();
    let load = Load::start(&one.client, WEB);
    let download = connection_to(&one, "a").download();
    second.start_up();
    let answers = requests(&two.client, source(), WEB, machine::count(500));
    assert_eq!(answers.into_keys().collect::<Vec<_>>(), ["b", "c"]);
    second.done(&["disable", "web", "b"]);
    assert_eq!(first.backend("web", "b").administrative, "enabled");
    assert_eq!(second.status().services[0].backends.len(), 2);
    second.terminate();
    second.done(&["detach"]);
    std::thread::sleep(machine::bound(Duration::from_millis(500)));
    let made = load.stop();
    assert_eq!(failures(&made, start), [""; 0], "of {} requests", made.len());
    download.finish().unwrap();
}
