//! What the daemon takes: to start, to follow a large configuration and the health of its backends, and in memory.

mod configuration;
mod idle;
mod maglev;
mod memory;
mod network;
pub mod report;
mod servers;
mod start;
mod transition;

use std::{
    net::SocketAddr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use self::{
    configuration::Size,
    memory::Memory,
    network::Network,
    report::{Figure, Report, Unit},
    servers::Servers,
    start::milliseconds,
};
use crate::{
    balancer::{Daemon, configuration::PORT},
    report::Machine,
};

/// How it is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub rounds: u32,
    pub services: u32,
    /// Of each service.
    pub backends: u32,
    /// `None`: what the daemon chooses.
    pub flow_table: Option<u32>,
    /// How long the daemon is watched while nothing happens.
    pub idle: Duration,
}

/// For what takes much less.
const PATIENCE: Duration = Duration::from_secs(120);
/// Backends of the table that is built.
const TABLE_BACKENDS: u32 = 1000;

/// What is promised, in the figures' units.
const TABLE: f64 = 3.0;
const FORWARDING: f64 = 300.0;
const APPLIED: f64 = 2000.0;
const SWAPPED: f64 = 10.0;
const RESIDENT: f64 = 64.0;

/// Measures all of it.
///
/// # Errors
/// The network cannot be made, or a daemon with one service does not start. That the large configuration is not
/// followed is in the report.
pub fn measure(plan: &Plan, xlb: &Path) -> Result<Report> {
    let mut report = Report {
        machine: Machine::here(None)?,
        rounds: plan.rounds,
        services: plan.services,
        backends: plan.backends,
        figures: Vec::new(),
    };
    let mut add = |figure: Figure| {
        eprintln!("{}", figure.line());
        report.figures.push(figure);
    };
    let table = maglev::rounds(TABLE_BACKENDS, plan.rounds.max(10));
    add(Figure::new(
        "table of 65537 slots for 1000 backends built",
        Unit::Milliseconds,
        &table,
        Some(TABLE),
    ));

    let network = Network::new()?;
    let mut daemon = Daemon::new(xlb)?;
    let times = start::rounds(&network, &mut daemon, plan.flow_table, plan.rounds)?;
    let one_service = [
        (
            "start to first packet forwarded",
            times.forwarding,
            Some(FORWARDING),
        ),
        ("start to ready", times.ready, None),
        ("SIGTERM to end", times.stopped, None),
    ];
    for (what, values, target) in one_service {
        let name = format!("one service: {what}");
        add(Figure::new(name, Unit::Milliseconds, &values, target));
    }

    let names = Names::of(plan);
    match large(plan, &network, &mut daemon, &names) {
        Ok(figures) => figures.into_iter().for_each(add),
        Err(error) => {
            let promised = [
                (&names.applied, Unit::Milliseconds, APPLIED),
                (&names.down, Unit::Milliseconds, SWAPPED),
                (&names.up, Unit::Milliseconds, SWAPPED),
                (&names.resident, Unit::Mebibytes, RESIDENT),
            ];
            for (name, unit, target) in promised {
                add(Figure::missing(name, unit, Some(target), &error));
            }
        }
    }
    daemon.kill();
    daemon.detach(network.balancer())?;
    Ok(report)
}

/// What figures of the large configuration are called, measured or not.
struct Names {
    applied: String,
    down: String,
    up: String,
    resident: String,
    anonymous: String,
    peak: String,
    idle: String,
    stopped: String,
}

impl Names {
    fn of(plan: &Plan) -> Self {
        let name = |what: &str| format!("{} × {}: {what}", plan.services, plan.backends);
        Self {
            applied: name("start to all applied"),
            down: name("backend fails to table swapped"),
            up: name("backend recovers to table swapped"),
            resident: name("resident memory (VmRSS)"),
            anonymous: name("of it no file's (RssAnon)"),
            peak: name("most that was resident (VmHWM)"),
            idle: name("of one processor, while nothing happens"),
            stopped: name("SIGTERM to end"),
        }
    }
}

fn large(plan: &Plan, network: &Network, daemon: &mut Daemon, names: &Names) -> Result<Vec<Figure>> {
    let size = Size {
        services: plan.services,
        backends: plan.backends,
    };
    let servers = Servers::start(network)?;
    let text = size.text(&network.interfaces(), plan.flow_table, &daemon.seed_file());
    daemon.configure(&text)?;
    let mut applied = Vec::new();
    for _ in 0..plan.rounds {
        daemon.kill();
        daemon.detach(network.balancer())?;
        let start = daemon.start(network.balancer())?;
        let ready = daemon.await_ready(PATIENCE)?;
        applied.push(milliseconds(ready - start));
        await_all_up(size, daemon)?;
        // All that comes before the last service is there.
        network.connect(SocketAddr::new(Size::vip(size.watched()), PORT))?;
    }
    let times = transition::rounds(size, &servers, daemon, plan.rounds)?;
    // Before it is asked for its status, which takes memory as well.
    let memory = Memory::of(daemon.id().unwrap_or_default())?;
    let idle = idle::share(daemon.id().unwrap_or_default(), plan.idle)?;
    check(size, network, daemon)?;
    let stopping = Instant::now();
    daemon.terminate()?;
    let stopped = milliseconds(stopping.elapsed());
    let timed = |name: &str, values: &[f64], target| Figure::new(name, Unit::Milliseconds, values, target);
    let mebibytes = |name: &str, value: f64, target| Figure::new(name, Unit::Mebibytes, &[value], target);
    Ok(vec![
        timed(&names.applied, &applied, Some(APPLIED)),
        timed(&names.down, &times.down, Some(SWAPPED)),
        timed(&names.up, &times.up, Some(SWAPPED)),
        mebibytes(&names.resident, memory.resident, Some(RESIDENT)),
        mebibytes(&names.anonymous, memory.anonymous, None),
        mebibytes(&names.peak, memory.peak, None),
        Figure::new(&names.idle, Unit::Percent, &[idle], None),
        timed(&names.stopped, &[stopped], None),
    ])
}

/// Waits until the probes of the watched service have found its backends.
fn await_all_up(size: Size, daemon: &mut Daemon) -> Result<()> {
    let start = Instant::now();
    while transition::logged(&daemon.log()) < size.backends as usize {
        daemon.check_running()?;
        ensure!(
            start.elapsed() < PATIENCE,
            "the backends are not up after {PATIENCE:?}:\n{}",
            daemon.log()
        );
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Every backend of every service has its share.
fn check(size: Size, network: &Network, daemon: &Daemon) -> Result<()> {
    let status = daemon.status(network.balancer())?;
    let with_share = |service: &xlb::observe::status::ServiceStatus| {
        let backends = service.backends.iter();
        backends.filter(|backend| backend.share > 0.0).count()
    };
    let complete = status
        .services
        .iter()
        .filter(|service| with_share(service) == size.backends as usize)
        .count();
    ensure!(
        complete == size.services as usize && status.problems.is_empty(),
        "{complete} of {} services have all their backends; problems: {:?}",
        size.services,
        status.problems
    );
    Ok(())
}
