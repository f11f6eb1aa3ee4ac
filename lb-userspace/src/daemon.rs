//! The daemon's tasks, channels and shutdown; nothing else.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::yield_now,
    time::{Instant, MissedTickBehavior, interval_at},
};
use tracing::{error, info, warn};

use crate::{
    allocator,
    api::{Request, server},
    config::Config,
    controller::{Controller, Parts},
    datapath::{Pins, Sizes, kernel::KernelDatapath},
    health::Driver,
    instance::Instance,
    map_sizes,
    net::{self, NextHopWatcher},
};

/// How often idle flows are ended and flows counted.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);
/// How often the maps are compared with what they shall hold.
const REPAIR_INTERVAL: Duration = Duration::from_secs(30);
/// How often shares of backends that start slowly are looked at.
const RAMP_INTERVAL: Duration = Duration::from_secs(1);
/// How often memory that is free is given back.
const RETURN_INTERVAL: Duration = Duration::from_secs(10);
/// How often counters are read for rates.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// Runs the daemon until SIGTERM or SIGINT; the data path goes on after it.
///
/// `socket` is where the control socket shall be, whatever the configuration says.
///
/// # Errors
/// What keeps it from starting; nothing half-attached is left behind then.
pub async fn run(
    instance: Instance,
    config_path: PathBuf,
    config: Config,
    socket: Option<PathBuf>,
) -> anyhow::Result<()> {
    let lock = lock(&instance.lock())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;

    let socket = socket
        .or_else(|| config.socket.clone())
        .unwrap_or_else(|| instance.socket());
    let pins = Pins::new(instance.name());
    let took_over = pins.exist();
    let sizes = map_sizes::of(&config);
    let listener = server::bind(&socket)?;
    let socket = SocketFile(socket);
    // What an earlier daemon has left running goes on; what this one has begun does not stay if it fails to start.
    let unfinished = Unfinished((!took_over).then(|| pins.clone()));
    let mut datapath = KernelDatapath::open(pins, sizes)?;
    datapath.start_packet_log()?;
    log_memory(&datapath);
    if took_over {
        info!("took over the maps of an earlier daemon, with their flows");
    }

    let (transitions, mut transition) = mpsc::channel(1024);
    let watcher = NextHopWatcher::start()?;
    let mut next_hops = watcher.next_hops();
    let parts = Parts {
        instance,
        config_path,
        config,
        datapath,
        driver: Driver::new(transitions),
        watcher,
    };
    let mut controller = match Controller::start(parts).await {
        Ok(controller) => controller,
        Err(error) => {
            // As the pins: what was asked of the kernel for a data path that stays is left.
            if !took_over && let Err(error) = net::release_neighbours().await {
                warn!("{:#}", anyhow::Error::from(error));
            }
            return Err(error);
        }
    };
    unfinished.finish();
    info!(
        "slot tables: {}",
        in_megabytes(controller.map_memory().slot_tables)
    );

    let (requests, mut request) = mpsc::channel(64);
    let mut api = tokio::spawn(server::serve(listener, requests));
    info!(socket = %socket.0.display(), "ready");

    allocator::give_back();

    let ticks = |period| {
        // The start has done by itself what is done anew at each.
        let mut ticks = interval_at(Instant::now() + period, period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    };
    let mut sweeps = ticks(SWEEP_INTERVAL);
    let mut repairs = ticks(REPAIR_INTERVAL);
    let mut samples = ticks(SAMPLE_INTERVAL);
    let mut ramps = ticks(RAMP_INTERVAL);
    let mut returns = ticks(RETURN_INTERVAL);
    loop {
        tokio::select! {
            Some(transition) = transition.recv() => controller.transition(transition),
            Ok(()) = next_hops.changed() => {
                let changed = next_hops.borrow_and_update().clone();
                controller.next_hops(changed);
                // At the start many come one after the other, and everything is compiled anew for each.
                allocator::give_back();
            }
            Some(request) = request.recv() => answer(&mut controller, request).await,
            _ = hang_up.recv() => if let Err(refused) = controller.reload().await {
                error!("reload: {}", refused.message);
            },
            _ = sweeps.tick() => controller.sweep_soon(),
            // Not at once: what else has happened comes between two steps.
            () = yield_now(), if controller.has_steps() => controller.step(),
            _ = ramps.tick(), if controller.is_ramping() => controller.ramp(),
            _ = repairs.tick() => controller.repair().await,
            _ = samples.tick() => controller.sample(),
            _ = returns.tick() => allocator::give_back(),
            result = &mut api => {
                bail!("the control API has ended: {result:?}");
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    info!("stopping; the data path goes on without the daemon, `xlb detach` removes it");
    api.abort();
    drop(socket);
    // Before the next daemon may begin: it removes what is there for this process alone.
    drop(controller);
    drop(lock);
    Ok(())
}

/// What the maps are made for, and what they take.
fn log_memory(datapath: &KernelDatapath) {
    let Sizes {
        flows,
        services,
        backends,
    } = datapath.sizes();
    let memory = datapath.memory();
    info!("flow table: {flows} flows, {}", in_megabytes(memory.flow_table));
    info!("services: room for {services}, {}", in_megabytes(memory.services));
    info!("backends: room for {backends}, {}", in_megabytes(memory.backends));
}

fn in_megabytes(bytes: u64) -> String {
    format!("{} MB", bytes / 1_000_000)
}

/// The control socket, which goes with the daemon.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Pins to remove unless the start is finished.
struct Unfinished(Option<Pins>);

impl Unfinished {
    fn finish(mut self) {
        self.0 = None;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(pins) = self.0.take()
            && let Err(error) = pins.remove_own_layout()
        {
            error!(
                "{:#}; `xlb detach` removes what is left",
                anyhow::Error::from(error)
            );
        }
    }
}

async fn answer(controller: &mut Controller, request: Request) {
    // Who asked may have gone away meanwhile; what was asked is done all the same.
    match request {
        Request::Status(answer) => drop(answer.send(controller.status())),
        Request::Reload(answer) => match controller.reload().await {
            Ok(done) => controller.answer_after_sweep(answer, done),
            Err(refused) => drop(answer.send(Err(refused))),
        },
        Request::Administer {
            service,
            backend,
            change,
            answer,
        } => match controller.administer(&service, &backend, change) {
            Ok(done) => controller.answer_after_sweep(answer, done),
            Err(refused) => drop(answer.send(Err(refused))),
        },
    }
}

/// Holds the instance: a second daemon would undo the work of the first.
///
/// # Errors
/// Another daemon holds it, or the lock file cannot be made.
pub fn lock(path: &Path) -> anyhow::Result<File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)
            .with_context(|| format!("making the folder {} failed", folder.display()))?;
    }
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("opening the lock file {} failed", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(
            "a daemon of this instance runs already and holds {}: stop it, or name another instance with `--instance`",
            path.display()
        ),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("locking {} failed", path.display()))
        }
    }
}
