//! The daemon's tasks, channels and shutdown; nothing else.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions, TryLockError},
    net::IpAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval},
};
use tracing::{error, info};

use crate::{
    api::{Request, server},
    config::Config,
    controller::{Controller, Parts},
    datapath::{
        Pins,
        kernel::{KernelDatapath, flow_table_memory},
    },
    flow_table_size,
    health::{Driver, Transition},
    instance::Instance,
    model::NextHop,
    net::{self, NextHopWatcher},
};

/// How often idle flows are ended and flows counted.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);
/// How often the maps are compared with what they shall hold.
const REPAIR_INTERVAL: Duration = Duration::from_secs(30);
/// How often counters are read for rates.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// Runs the daemon until SIGTERM or SIGINT; the data path goes on after it.
///
/// # Errors
/// What keeps it from starting; nothing half-attached is left behind then.
pub async fn run(instance: Instance, config_path: PathBuf, config: Config) -> anyhow::Result<()> {
    let lock = lock(&instance.lock())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;

    let socket = config.socket.clone().unwrap_or_else(|| instance.socket());
    let took_over = Pins::new(instance.name()).exist();
    let started = start(&instance, config_path, config, &socket).await;
    let Started {
        mut controller,
        mut transition,
        mut next_hops,
        listener,
    } = match started {
        Ok(started) => started,
        Err(error) => {
            // What an earlier daemon has left running goes on; what this one has begun does not stay.
            if !took_over {
                detach(&instance).await?;
            }
            return Err(error);
        }
    };

    let (requests, mut request) = mpsc::channel(64);
    let mut api = tokio::spawn(server::serve(listener, requests));
    info!(socket = %socket.display(), "ready");

    let ticks = |period| {
        let mut ticks = interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    };
    let mut sweeps = ticks(SWEEP_INTERVAL);
    let mut repairs = ticks(REPAIR_INTERVAL);
    let mut samples = ticks(SAMPLE_INTERVAL);
    loop {
        tokio::select! {
            Some(transition) = transition.recv() => controller.transition(transition),
            Ok(()) = next_hops.changed() => {
                let changed = next_hops.borrow_and_update().clone();
                controller.next_hops(changed);
            }
            Some(request) = request.recv() => answer(&mut controller, request).await,
            _ = hang_up.recv() => if let Err(refused) = controller.reload().await {
                error!("reload: {}", refused.message);
            },
            _ = sweeps.tick() => controller.sweep(),
            _ = repairs.tick() => controller.repair(),
            _ = samples.tick() => controller.sample(),
            result = &mut api => {
                bail!("the control API has ended: {result:?}");
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    info!("stopping; the data path goes on without the daemon, `xlb detach` removes it");
    api.abort();
    let _ = fs::remove_file(&socket);
    drop(lock);
    Ok(())
}

/// A daemon whose data path runs and whose socket is there.
struct Started {
    controller: Controller,
    transition: mpsc::Receiver<Transition>,
    next_hops: watch::Receiver<BTreeMap<IpAddr, NextHop>>,
    listener: UnixListener,
}

async fn start(
    instance: &Instance,
    config_path: PathBuf,
    config: Config,
    socket: &Path,
) -> anyhow::Result<Started> {
    let pins = Pins::new(instance.name());
    let took_over = pins.exist();
    let size = config.flow_table.size.unwrap_or_else(flow_table_size::automatic);
    let mut datapath = KernelDatapath::open(pins, size)?;
    datapath.start_packet_log()?;
    let size = datapath.flow_table_size()?;
    info!(
        "flow table: {size} flows, {} MB",
        flow_table_memory(size) / 1_000_000
    );
    if took_over {
        info!("took over the maps of an earlier daemon, with their flows");
    }

    let (transitions, transition) = mpsc::channel(1024);
    let watcher = NextHopWatcher::start()?;
    let next_hops = watcher.next_hops();
    let parts = Parts {
        instance: instance.clone(),
        config_path,
        config,
        datapath,
        driver: Driver::new(transitions),
        watcher,
    };
    Ok(Started {
        controller: Controller::start(parts).await?,
        transition,
        next_hops,
        listener: server::bind(socket)?,
    })
}

/// Removes what a daemon of this instance has left in the kernel: program, links and maps, with all flows, VIPs and
/// neighbours. Tells whether there was anything.
///
/// # Errors
/// Something cannot be removed; what came before it is gone.
pub async fn detach(instance: &Instance) -> anyhow::Result<bool> {
    let removed = Pins::new(instance.name()).remove_all()?;
    let vips = net::remove_vips().await?;
    let neighbours = net::release_neighbours().await?;
    Ok(removed || !vips.is_empty() || neighbours > 0)
}

async fn answer(controller: &mut Controller, request: Request) {
    // Who asked may have gone away meanwhile; what was asked is done all the same.
    match request {
        Request::Status(answer) => drop(answer.send(controller.status())),
        Request::Reload(answer) => drop(answer.send(controller.reload().await)),
        Request::Administer {
            service,
            backend,
            change,
            answer,
        } => {
            drop(answer.send(controller.administer(&service, &backend, change)));
        }
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
