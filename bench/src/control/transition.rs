//! From the answer that changes a backend's health to the table that follows from it, seen from outside of the daemon.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, Map, MapData};
use lb_common::abi::{Address, Service};
use xlb::datapath::kernel::Raw;

use super::{PATIENCE, configuration::Size, servers::Servers, start::milliseconds};
use crate::balancer::Daemon;

/// How often the table is looked at.
const LOOK: Duration = Duration::from_micros(50);
/// Between two transitions, so that one is over before the next begins.
const QUIET: Duration = Duration::from_millis(700);

/// Milliseconds of each round.
#[derive(Debug, Default)]
pub struct Times {
    pub down: Vec<f64>,
    pub up: Vec<f64>,
}

/// Has a backend of the watched service fail and recover.
///
/// # Errors
/// The daemon does not change the service's table.
pub fn rounds(size: Size, servers: &Servers, daemon: &mut Daemon, rounds: u32) -> Result<Times> {
    let pool = Pool::of(size)?;
    let mut times = Times::default();
    for round in 0..rounds {
        let server = Size::server(size.watched(), round % size.backends);
        for fails in [true, false] {
            thread::sleep(QUIET);
            let before = pool.line()?;
            let answered = servers.turn(server, fails)?;
            let changed = pool
                .changed(before)
                .with_context(|| format!("of the log:\n{}", tail(&daemon.log())))?;
            daemon.check_running()?;
            ensure!(
                changed > answered,
                "the table had changed before the backend answered"
            );
            let times = if fails { &mut times.down } else { &mut times.up };
            times.push(milliseconds(changed - answered));
        }
    }
    // Every backend comes up once at the start.
    let expected = size.backends as usize + 2 * rounds as usize;
    let log = daemon.log();
    ensure!(
        logged(&log) == expected,
        "{} transitions and not {expected}:\n{}",
        logged(&log),
        tail(&log)
    );
    Ok(times)
}

/// Where the watched service's pool is, in the kernel's memory.
struct Pool {
    pools: Array<MapData, u64>,
    service: u32,
}

impl Pool {
    fn of(size: Size) -> Result<Self> {
        let pins = Daemon::pins();
        let open = |name: &str| {
            MapData::from_pin(pins.map(name)).with_context(|| format!("the map {name} was not opened"))
        };
        let services: Array<_, Raw<Service>> = Map::Array(open("SERVICES")?).try_into()?;
        let vip = Address::from(Size::vip(size.watched()));
        let is_watched = |id: &u32| services.get(id, 0).is_ok_and(|Raw(service)| service.vip == vip);
        Ok(Self {
            service: (0..services.len())
                .find(is_watched)
                .context("the watched service has no entry")?,
            pools: Map::Array(open("POOLS")?).try_into()?,
        })
    }

    /// The line of the pool that is in use.
    fn line(&self) -> Result<u64> {
        (self.pools.get(&self.service, 0)).context("the watched service has no pool")
    }

    /// Gives the time when another table is in use.
    fn changed(&self, before: u64) -> Result<Instant> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if self.line()? != before {
                return Ok(Instant::now());
            }
            thread::sleep(LOOK);
        }
        bail!("the table of the service did not change in {PATIENCE:?}")
    }
}

/// How many transitions a daemon has logged.
pub fn logged(log: &str) -> usize {
    let lines = log.lines();
    lines.filter(|line| line.contains(" backend is ")).count()
}

/// The end of a log.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}
