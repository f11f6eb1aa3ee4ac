//! From the answer that changes a backend's health to the table that follows from it, seen from outside of the daemon.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{ArrayOfMaps, HashMap, Map, MapData};
use lb_common::abi::{Address, ServiceKey, TCP};
use xlb::datapath::kernel::Raw;

use super::{PATIENCE, configuration::Size, servers::Servers, start::milliseconds};
use crate::balancer::{Daemon, configuration::PORT};

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
    let table = SlotTable::of(size)?;
    let mut times = Times::default();
    for round in 0..rounds {
        let server = Size::server(size.watched(), round % size.backends);
        for fails in [true, false] {
            thread::sleep(QUIET);
            let before = table.id()?;
            let answered = servers.turn(server, fails)?;
            let changed = table
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

/// The kernel's map of the watched service's slots.
struct SlotTable {
    tables: ArrayOfMaps<MapData>,
    service: u32,
}

impl SlotTable {
    fn of(size: Size) -> Result<Self> {
        let pins = Daemon::pins();
        let open = |name: &str| {
            MapData::from_pin(pins.map(name)).with_context(|| format!("the map {name} was not opened"))
        };
        let keys: HashMap<_, Raw<ServiceKey>, u32> = Map::HashMap(open("SERVICE_KEYS")?).try_into()?;
        let key = ServiceKey {
            vip: Address::from(Size::vip(size.watched())),
            port: PORT.to_be(),
            protocol: TCP,
            _pad: 0,
        };
        Ok(Self {
            service: keys.get(&Raw(key), 0).context("the watched service has no key")?,
            tables: Map::ArrayOfMaps(open("SLOT_TABLES")?).try_into()?,
        })
    }

    /// The kernel's id of the table that is in use.
    fn id(&self) -> Result<u32> {
        let table = self
            .tables
            .get(&self.service, 0)
            .context("the watched service has no slots")?;
        Ok(table.info()?.id())
    }

    /// Gives the time when another table is in use.
    fn changed(&self, before: u32) -> Result<Instant> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            // The one before may go between the look at its id and at itself.
            if self.id().is_ok_and(|id| id != before) {
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
