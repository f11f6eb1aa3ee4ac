//! What the demo plays on: namespaces, a real daemon, real backend processes; and how all of it goes again.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        signal::{Signal, kill},
        statfs::{BPF_FS_MAGIC, statfs},
    },
    unistd::Pid,
};

use super::promise;
use crate::{
    api::client,
    daemon,
    datapath::Pins,
    instance::Instance,
    lab::{Namespace, Topology},
    observe::status::Status,
};

/// Where the clients connect to.
pub const SERVICE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Topology::VIP), 80);
/// More than one, as a service has.
const CLIENT_ADDRESSES: usize = 8;
const BACKEND_PORT: u16 = 8080;
/// For the processes to start and the first probes, on emulated processors too.
const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// Instances of the demo are named by this and the process id.
const INSTANCE_PREFIX: &str = "demo-";
const BPFFS: &str = "/sys/fs/bpf";

/// Everything that runs; dropping it ends and removes it.
///
/// The processes are killed by the kernel when the thread that made the stage ends, so that has to be the main one.
#[derive(Debug)]
pub struct Stage {
    topology: Topology,
    instance: Instance,
    /// Socket, configuration, seed and log of the daemon.
    folder: PathBuf,
    daemon: Option<Child>,
    /// In the order of their names; nothing where one has been killed.
    backends: Vec<Option<Child>>,
}

/// Gives this process a bpffs of its own where none is mounted; only a process of one thread sees it everywhere.
///
/// # Errors
/// The kernel has none, or refuses to mount it.
pub fn provide_bpffs() -> anyhow::Result<()> {
    if statfs(BPFFS).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC) {
        return Ok(());
    }
    let nothing: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| {
            let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(nothing, "/", nothing, flags, nothing)
        })
        .and_then(|()| mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), nothing))
        .with_context(|| {
            format!("bpffs is not mounted on {BPFFS}, and mounting it for the demo alone failed; run `mount -t bpf bpf {BPFFS}`")
        })
}

/// Names of the backends: a, b, c, …
pub fn backend_names(count: usize) -> Vec<String> {
    ('a'..='z').take(count).map(String::from).collect()
}

impl Stage {
    /// Builds the namespaces and starts the processes; [`Self::ready`] tells when they work.
    ///
    /// # Errors
    /// What cannot be made or started; nothing is left behind then.
    pub fn build(backends: usize) -> anyhow::Result<Self> {
        let instance: Instance = format!("{INSTANCE_PREFIX}{}", std::process::id()).parse()?;
        let folder = folder(&instance);
        remove_leftovers(&folder);
        let mut stage = Self {
            topology: Topology::with_client_addresses(backends, CLIENT_ADDRESSES)?,
            instance,
            folder,
            daemon: None,
            backends: Vec::new(),
        };
        fs::create_dir_all(&stage.folder)
            .with_context(|| format!("making the folder {} failed", stage.folder.display()))?;
        for index in 0..backends {
            let started = stage.spawn_backend(index)?;
            stage.backends.push(Some(started));
        }
        stage.daemon = Some(stage.spawn_daemon()?);
        Ok(stage)
    }

    /// Waits until the daemon answers and sends to every backend.
    ///
    /// # Errors
    /// A process has ended, or it takes too long; the daemon's log is part of the message.
    pub async fn ready(&mut self) -> anyhow::Result<Status> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            self.check()?;
            let status = client::status(&self.instance.socket()).await;
            if let Ok(status) = status
                && status
                    .services
                    .iter()
                    .flat_map(|service| &service.backends)
                    .all(|backend| backend.share > 0.0 && backend.next_hop_problem.is_none())
            {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!(
                    "the backends are not up after {} s{}",
                    START_LIMIT.as_secs(),
                    self.log()
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What the daemon says.
    pub async fn status(&mut self) -> anyhow::Result<Status> {
        self.check()?;
        let asked = tokio::time::timeout(STOP_LIMIT, client::status(&self.instance.socket())).await;
        match asked {
            Ok(Ok(status)) => Ok(status),
            Ok(Err(error)) => {
                Err(anyhow::Error::new(error).context(format!("asking the daemon{}", self.log())))
            }
            Err(_) => bail!(
                "the daemon has not answered for {} s{}",
                STOP_LIMIT.as_secs(),
                self.log()
            ),
        }
    }

    /// Kills a backend's process, as `kill -9` does.
    pub fn kill_backend(&mut self, index: usize) -> anyhow::Result<()> {
        if let Some(mut process) = self.backends.get_mut(index).and_then(Option::take) {
            process.kill()?;
            process.wait()?;
        }
        Ok(())
    }

    /// Starts a killed backend again.
    pub fn restart_backend(&mut self, index: usize) -> anyhow::Result<()> {
        let process = self.spawn_backend(index)?;
        if let Some(place) = self.backends.get_mut(index) {
            *place = Some(process);
        }
        Ok(())
    }

    pub fn client(&self) -> &Namespace {
        &self.topology.client
    }

    pub fn client_addresses(&self) -> Vec<std::net::IpAddr> {
        self.topology.client_addresses().collect()
    }

    pub fn backend_names(&self) -> Vec<String> {
        backend_names(self.topology.backends.len())
    }

    /// An error if a process has ended that should run.
    fn check(&mut self) -> anyhow::Result<()> {
        if let Some(daemon) = &mut self.daemon
            && let Some(ended) = daemon.try_wait()?
        {
            bail!("the daemon has ended with {ended}{}", self.log());
        }
        for (index, backend) in self.backends.iter_mut().enumerate() {
            if let Some(process) = backend
                && let Some(ended) = process.try_wait()?
            {
                bail!(
                    "the process of backend {} has ended with {ended}{}",
                    index + 1,
                    self.log()
                );
            }
        }
        Ok(())
    }

    fn spawn_backend(&self, index: usize) -> anyhow::Result<Child> {
        let name = self.backend_names().swap_remove(index);
        let listen = SocketAddr::new(self.topology.backend_address(index), BACKEND_PORT);
        let namespace = &self.topology.backends[index];
        self.spawn(
            namespace,
            ["demo-backend", "--name", &name, "--listen", &listen.to_string()],
        )
        .with_context(|| format!("starting backend {name}"))
    }

    fn spawn_daemon(&self) -> anyhow::Result<Child> {
        let path = self.folder.join("xlb.toml");
        fs::write(&path, self.configuration()).with_context(|| format!("writing {}", path.display()))?;
        let arguments: [&OsStr; 5] = [
            "run".as_ref(),
            "-c".as_ref(),
            path.as_ref(),
            "--instance".as_ref(),
            self.instance.name().as_ref(),
        ];
        self.spawn(&self.topology.balancer, arguments)
            .context("starting the daemon")
    }

    fn spawn(
        &self,
        namespace: &Namespace,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> anyhow::Result<Child> {
        use std::os::unix::process::CommandExt;
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_path())?;
        let mut command: Command = namespace.command(env::current_exe()?);
        Ok(command
            .args(arguments)
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            // Ctrl-C is for the demo, which then ends them in order.
            .process_group(0)
            .spawn()?)
    }

    fn configuration(&self) -> String {
        let interfaces = self.topology.balancer_interfaces();
        let backends: String = self
            .backend_names()
            .iter()
            .enumerate()
            .map(|(index, name)| {
                let address = SocketAddr::new(self.topology.backend_address(index), BACKEND_PORT);
                format!("\n[[service.backend]]\nname = {name:?}\naddress = \"{address}\"\n")
            })
            .collect();
        let vip: Ipv4Addr = Topology::VIP;
        format!(
            "interfaces = {interfaces:?}\n\n[flow-table]\nsize = 16384\n\n[hash]\nseed-file = {seed:?}\n\n\
             [[service]]\nname = \"demo\"\nvip = \"{vip}\"\nport = {port}\nprotocol = \"tcp\"\n\
             strategy = \"consistent-hash\"\nforward = \"nat\"\n\n[service.health]\ntype = \"http\"\n\
             path = \"/healthz\"\ninterval = \"{interval}ms\"\ntimeout = \"{timeout}ms\"\nrise = {rise}\nfall = {fall}\n\
             {backends}",
            seed = self.folder.join("seed"),
            port = SERVICE.port(),
            interval = promise::INTERVAL.as_millis(),
            timeout = promise::TIMEOUT.as_millis(),
            rise = promise::RISE,
            fall = promise::FALL,
        )
    }

    fn log_path(&self) -> PathBuf {
        self.folder.join("log")
    }

    /// The last lines of the log, for an error message.
    fn log(&self) -> String {
        const LINES: usize = 6;
        let text = fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let last = lines[lines.len().saturating_sub(LINES)..].join("\n  ");
        if last.is_empty() {
            String::new()
        } else {
            format!("; its log ends with\n  {last}")
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for mut backend in self.backends.drain(..).flatten() {
            let _ = backend.kill();
            let _ = backend.wait();
        }
        if let Some(daemon) = self.daemon.take() {
            stop(daemon);
        }
        // The namespaces go with their last descriptor, after this.
        if let Err(error) = Pins::new(self.instance.name()).remove_all() {
            anstream::eprintln!(
                "xlb: {error}; `xlb detach --instance {}` tries again",
                self.instance
            );
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Stops the daemon as an operator does; kills it when it does not obey.
fn stop(mut daemon: Child) {
    let _ = kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM);
    let deadline = Instant::now() + STOP_LIMIT;
    while matches!(daemon.try_wait(), Ok(None)) {
        if Instant::now() > deadline {
            let _ = daemon.kill();
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Removes what demos that were killed have left: pins, and folders beside this demo's own.
fn remove_leftovers(own: &Path) {
    let pins = Path::new(BPFFS).join("xlb");
    let mut names: Vec<String> = [Some(pins.as_path()), own.parent()]
        .into_iter()
        .flatten()
        .flat_map(fs::read_dir)
        .flat_map(Iterator::flatten)
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names.dedup();
    for name in names {
        let Some(instance) = abandoned(&name) else {
            continue;
        };
        // What cannot be removed now is tried again by the next demo.
        let _ = Pins::new(instance.name()).remove_all();
        let _ = fs::remove_dir_all(folder(&instance));
    }
}

/// The instance of that name if it is a demo's whose process is gone, and no daemon holds it.
fn abandoned(name: &str) -> Option<Instance> {
    let process: u32 = name.strip_prefix(INSTANCE_PREFIX)?.parse().ok()?;
    let instance: Instance = name.parse().ok()?;
    let lives = Path::new("/proc").join(process.to_string()).exists();
    let is_held = File::open(instance.lock()).is_ok_and(|_| daemon::lock(&instance.lock()).is_err());
    (!lives && !is_held).then_some(instance)
}

/// Where an instance has its socket and lock.
fn folder(instance: &Instance) -> PathBuf {
    instance.socket().parent().map(Path::to_owned).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_instances_of_demos_whose_process_is_gone_are_abandoned() {
        let own = format!("demo-{}", std::process::id());
        for name in ["default", "demo", "demo-", "demo-x", "web-1", &own] {
            assert!(abandoned(name).is_none(), "{name}");
        }
        // Above the largest process id that Linux has.
        let gone = format!("demo-{}", 1_u32 << 22 | 1);
        assert_eq!(abandoned(&gone).unwrap().name(), gone);
    }

    #[test]
    fn the_configuration_is_valid() {
        let folder = tempfile::tempdir().unwrap();
        let stage = Stage {
            topology: Topology::with_client_addresses(2, 1).unwrap(),
            instance: "demo-test".parse().unwrap(),
            folder: folder.path().join("demo"),
            daemon: None,
            backends: Vec::new(),
        };
        let path = folder.path().join("xlb.toml");
        fs::write(&path, stage.configuration()).unwrap();
        let config = crate::config::load(&path).unwrap();
        let health = &config.services[0].health;
        assert_eq!(
            (health.interval, health.timeout, health.fall),
            (promise::INTERVAL, promise::TIMEOUT, promise::FALL)
        );
        assert_eq!(config.services[0].backends.len(), 2);
    }
}
