//! The demo: a client, a balancer and backends on this machine, traffic between them, and a backend that is killed and
//! comes back.
//!
//! The daemon, the program in the kernel and the backends' processes are the real ones. [`run`] is the play, [`stage`]
//! builds what it needs and removes it, [`clients`] make the traffic, [`summary`] judges.

pub mod clients;
pub mod display;
pub mod stage;
pub mod summary;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Interval, MissedTickBehavior, interval},
};

use crate::{
    model::Health,
    observe::status::{BackendStatus, Status},
};
use clients::{Clients, DOWNLOAD_RATE, Downloading, Seen};
use display::{Display, Picture, Row};
use stage::Stage;
use summary::{Observations, Summary, Times};

/// What the health check of the demo's configuration promises.
pub mod promise {
    use std::time::Duration;

    pub const INTERVAL: Duration = Duration::from_millis(500);
    pub const TIMEOUT: Duration = Duration::from_millis(300);
    pub const RISE: u32 = 2;
    pub const FALL: u32 = 2;

    /// How long after a backend's death new connections may still go to it.
    pub fn bound() -> Duration {
        INTERVAL * FALL + TIMEOUT + Duration::from_millis(500)
    }
}

/// How often the daemon is asked.
const TICK: Duration = Duration::from_millis(100);
/// How long a backend that was started again may take to be up, on emulated processors too.
const RETURN_LIMIT: Duration = Duration::from_secs(30);
/// Shares and rates are those of so long.
const WINDOW: Duration = Duration::from_secs(1);

/// What is played.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How long traffic is driven; longer where the backend takes long to come back.
    pub length: Duration,
    pub backends: usize,
}

/// Plays the demo on the main thread; whatever it ends with, nothing is left of it.
///
/// # Errors
/// It cannot be built, a part of it fails, or a signal ends it.
pub async fn run(plan: Plan, display: Display) -> anyhow::Result<Summary> {
    let mut signals = [
        (SignalKind::interrupt(), "SIGINT"),
        (SignalKind::terminate(), "SIGTERM"),
        (SignalKind::hangup(), "SIGHUP"),
    ]
    .into_iter()
    .map(|(kind, name)| Ok((signal(kind)?, name)))
    .collect::<anyhow::Result<Vec<_>>>()?;
    let interrupted = std::future::poll_fn(|context| {
        for (signal, name) in &mut signals {
            if signal.poll_recv(context).is_ready() {
                return std::task::Poll::Ready(*name);
            }
        }
        std::task::Poll::Pending
    });
    tokio::select! {
        biased;
        name = interrupted => bail!("the demo was ended by {name}; nothing is left of it"),
        summary = play(plan, display) => summary,
    }
}

async fn play(plan: Plan, mut display: Display) -> anyhow::Result<Summary> {
    display.event(
        Duration::ZERO,
        "building network namespaces for a client, the balancer and the backends",
    );
    // Signals get their turn while this goes on.
    tokio::task::yield_now().await;
    let mut stage = Stage::build(plan.backends)?;
    let status = stage.ready().await?;
    let modes: Vec<&str> = status
        .interfaces
        .iter()
        .map(|interface| &*interface.xdp_mode)
        .collect();
    display.event(
        Duration::ZERO,
        &format!(
            "every backend is up; the program is attached to {} interfaces ({})",
            modes.len(),
            joined(modes)
        ),
    );

    let mut scene = Scene::open(stage, plan, display, status).await?;
    let victim = scene.victim();
    let name = scene.names[victim].clone();
    scene.watch_until(plan.length.mul_f64(0.25)).await?;

    let mut times = Times {
        killed: scene.start.elapsed(),
        ..Times::default()
    };
    scene.stage.kill_backend(victim)?;
    scene
        .display
        .event(times.killed, &format!("killed the process of {name}"));
    let deadline = times.killed + promise::bound();
    scene.watch_until(deadline).await?;
    let at_deadline = scene.backend(victim)?.flows_total;
    let pause = plan
        .length
        .mul_f64(0.6)
        .max(deadline + Duration::from_millis(300));
    scene.watch_until(pause).await?;

    let victim_flows = scene.backend(victim)?.flows_total;
    times.down = scene.when(victim, Health::Down, times.killed);
    times.restarted = scene.start.elapsed();
    scene
        .display
        .event(times.restarted, &format!("started {name} again"));
    scene.stage.restart_backend(victim)?;
    let limit = scene.start.elapsed() + RETURN_LIMIT;
    while scene.when(victim, Health::Up, times.restarted).is_none() && scene.start.elapsed() < limit {
        scene.watch().await?;
    }
    times.up = scene.when(victim, Health::Up, times.restarted);
    let rest = (plan.length / 6).max(Duration::from_secs(1));
    scene
        .watch_until(plan.length.max(scene.start.elapsed() + rest))
        .await?;
    times.ended = scene.start.elapsed();

    let seen = scene.close(times, at_deadline, victim_flows).await?;
    Ok(seen.judge())
}

/// What runs while it is watched.
struct Scene {
    // First, so that its last line is drawn before the stage goes.
    display: Display,
    clients: Clients,
    download: Downloading,
    /// Index of the backend that the download comes through.
    holder: usize,
    stage: Stage,
    names: Vec<String>,
    plan: Plan,
    start: Instant,
    ticks: Interval,
    status: Status,
    health: Vec<Health>,
    /// Every change of a backend's health.
    changes: Vec<(Duration, usize, Health)>,
    traffic: Traffic,
}

/// What the clients have seen.
#[derive(Default)]
struct Traffic {
    attempts: Vec<clients::Attempt>,
    cuts: Vec<clients::Cut>,
    /// On which backend each kept connection is.
    kept: BTreeMap<usize, usize>,
}

impl Scene {
    /// Starts the download, finds the backend that it comes through, and starts the other clients.
    async fn open(
        mut stage: Stage,
        plan: Plan,
        mut display: Display,
        mut status: Status,
    ) -> anyhow::Result<Self> {
        let names = stage.backend_names();
        let addresses = stage.client_addresses();
        // Still on its way when the killed backend is back.
        let expected = (plan.length.as_secs_f64() * 0.95 * DOWNLOAD_RATE as f64) as u64;
        let download = Downloading::start(stage.client(), addresses.first().copied(), expected)?;
        // It is the only flow so far.
        let holder = loop {
            if let Some(holder) = backends(&status)?
                .iter()
                .position(|backend| backend.flows_total > 0)
            {
                break holder;
            }
            if download.is_finished() {
                let end = download.finish("no backend");
                bail!("the download did not begin: {}", end.error.unwrap_or_default());
            }
            tokio::time::sleep(TICK / 2).await;
            status = stage.status().await?;
        };
        let start = Instant::now();
        let clients = Clients::start(stage.client(), start, &names, &addresses)?;
        display.event(
            Duration::ZERO,
            &format!(
                "a download of {expected} bytes has begun, through {}",
                names[holder]
            ),
        );
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            display,
            clients,
            download,
            holder,
            stage,
            health: backends(&status)?.iter().map(|backend| backend.health).collect(),
            names,
            plan,
            start,
            ticks,
            status,
            changes: Vec::new(),
            traffic: Traffic::default(),
        })
    }

    /// Index of the backend that is killed: not the one of the download.
    fn victim(&self) -> usize {
        (self.holder + 1) % self.names.len()
    }

    fn backend(&self, index: usize) -> anyhow::Result<&BackendStatus> {
        backends(&self.status)?
            .get(index)
            .context("the daemon has lost a backend of its configuration")
    }

    /// When a backend's health first became this, after a point in time.
    fn when(&self, backend: usize, health: Health, after: Duration) -> Option<Duration> {
        let mut changes = self.changes.iter();
        changes
            .find(|(when, index, became)| (*index, *became) == (backend, health) && *when >= after)
            .map(|(when, ..)| *when)
    }

    /// Watches until so long after the start, and once more.
    async fn watch_until(&mut self, time: Duration) -> anyhow::Result<()> {
        while self.start.elapsed() < time {
            self.watch().await?;
        }
        self.watch().await
    }

    /// Asks the daemon once, takes in what the clients have seen, and shows both.
    async fn watch(&mut self) -> anyhow::Result<()> {
        self.ticks.tick().await;
        self.status = self.stage.status().await?;
        let now = self.start.elapsed();
        let seen = self.clients.seen();
        self.traffic.take_in(seen);
        let changed: Vec<(usize, Health, String)> = backends(&self.status)?
            .iter()
            .enumerate()
            .filter(|(index, backend)| self.health.get(*index) != Some(&backend.health))
            .map(|(index, backend)| (index, backend.health, backend.probe.clone().unwrap_or_default()))
            .collect();
        for (index, health, probe) in changed {
            self.health[index] = health;
            self.changes.push((now, index, health));
            let word = health_word(health);
            self.display
                .event(now, &format!("{} is {word}: {probe}", self.names[index]));
        }
        let picture = self.picture(now)?;
        self.display.show(&picture);
        Ok(())
    }

    fn picture(&self, now: Duration) -> anyhow::Result<Picture> {
        let recent: Vec<&clients::Attempt> = self
            .traffic
            .attempts
            .iter()
            .rev()
            // Attempts come in nearly by the time they ended.
            .take_while(|attempt| attempt.ended + WINDOW * 2 >= now)
            .filter(|attempt| attempt.ended + WINDOW >= now)
            .collect();
        let answered = recent.iter().filter(|attempt| attempt.outcome.is_ok()).count();
        let rows = backends(&self.status)?
            .iter()
            .enumerate()
            .map(|(index, backend)| {
                let count = recent
                    .iter()
                    .filter(|attempt| attempt.outcome == Ok(index))
                    .count();
                Row {
                    name: backend.name.clone(),
                    share: count as f64 / answered.max(1) as f64,
                    health: backend.health,
                    flows: backend.flows_total,
                    kept: self.traffic.kept.values().filter(|on| **on == index).count(),
                }
            });
        Ok(Picture {
            now,
            length: self.plan.length,
            rows: rows.collect(),
            rate: answered,
            connections: self.traffic.attempts.len(),
            errors: self
                .traffic
                .attempts
                .iter()
                .filter(|attempt| attempt.outcome.is_err())
                .count(),
            downloaded: self.download.bytes() as f64 / self.download.expected().max(1) as f64,
            holder: self.names[self.holder].clone(),
        })
    }

    /// Ends the traffic, and gives what has been seen of it.
    async fn close(
        mut self,
        times: Times,
        at_deadline: u64,
        victim_flows: u64,
    ) -> anyhow::Result<Observations> {
        let now = self.start.elapsed();
        self.display.event(
            now,
            "waiting for the last connections and the rest of the download",
        );
        let victim = self.victim();
        while !self.download.is_finished() {
            self.watch().await?;
        }
        let late_flows = victim_flows.saturating_sub(at_deadline);
        let rest = self.clients.finish()?;
        self.traffic.take_in(rest);
        let packets = packets(&self.stage.status().await?);
        Ok(Observations {
            download: self.download.finish(&self.names[self.holder]),
            names: self.names,
            victim,
            times,
            attempts: self.traffic.attempts,
            cuts: self.traffic.cuts,
            late_flows,
            victim_flows,
            packets,
        })
    }
}

impl Traffic {
    fn take_in(&mut self, seen: Vec<Seen>) {
        for seen in seen {
            match seen {
                Seen::Attempt(attempt) => {
                    if let (Some(kept), Ok(backend)) = (attempt.keeps, &attempt.outcome) {
                        self.kept.insert(kept, *backend);
                    }
                    self.attempts.push(attempt);
                }
                Seen::Cut(cut) => {
                    self.kept.remove(&cut.kept);
                    self.cuts.push(cut);
                }
            }
        }
    }
}

/// The backends of the demo's service.
fn backends(status: &Status) -> anyhow::Result<&[BackendStatus]> {
    let service = status.services.first().context("the daemon has no service")?;
    Ok(&service.backends)
}

/// Packets by reason: of the service, and of none.
fn packets(status: &Status) -> BTreeMap<String, u64> {
    let of_services = status.services.iter().flat_map(|service| &service.reasons);
    let mut packets = BTreeMap::new();
    for (reason, traffic) in of_services.chain(&status.reasons) {
        *packets.entry(reason.clone()).or_default() += traffic.packets;
    }
    packets
}

fn health_word(health: Health) -> &'static str {
    match health {
        Health::Up => "up",
        Health::Down => "down",
        Health::Unknown => "unknown",
    }
}

fn joined(mut words: Vec<&str>) -> String {
    words.dedup();
    words.join(", ")
}
