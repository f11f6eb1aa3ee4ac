//! Programs that serve or balance, in the foreground, with what they need in a folder of their own.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use xlb::lab::Namespace;

use super::network::{BACKENDS, Network};
use crate::isolation;

/// How long a program may take until it listens, and to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// What each backend answers with, in bytes.
pub const BODY: usize = 1024;
/// The header that tells which backend answered.
pub const BACKEND_HEADER: &str = "X-Backend";

/// A program that runs as long as the value lives.
#[derive(Debug)]
pub struct Server(Child);

impl Server {
    /// Starts nginx with a configuration.
    pub fn nginx(namespace: &Namespace, folder: &Path, configuration: &str) -> Result<Self> {
        let file = folder.join("nginx.conf");
        fs::write(&file, configuration)?;
        let mut command = namespace.command("nginx");
        command
            .arg("-p")
            .arg(folder)
            .args(["-e", "error.log", "-c"])
            .arg(file);
        Self::start(command, folder)
    }

    /// Starts HAProxy with a configuration.
    pub fn haproxy(namespace: &Namespace, folder: &Path, configuration: &str) -> Result<Self> {
        let file = folder.join("haproxy.cfg");
        fs::write(&file, configuration)?;
        let mut command = namespace.command("haproxy");
        command.arg("-db").arg("-f").arg(file);
        Self::start(command, folder)
    }

    fn start(mut command: Command, folder: &Path) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let log = fs::File::create(folder.join("log"))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{name} did not start: `cargo xtask bench --end-to-end` installs it"))?;
        Ok(Self(child))
    }

    /// Waits until it takes connections.
    ///
    /// # Errors
    /// It ends, or does not listen in time.
    pub fn await_listening(
        &mut self,
        namespace: &Namespace,
        address: SocketAddr,
        folder: &Path,
    ) -> Result<()> {
        let start = Instant::now();
        loop {
            let connected = namespace.run(|| TcpStream::connect_timeout(&address, Duration::from_secs(1)))?;
            if connected.is_ok() {
                return Ok(());
            }
            if self.0.try_wait()?.is_some() || start.elapsed() > PATIENCE {
                bail!(
                    "nobody listens on {address}:\n{}{}",
                    fs::read_to_string(folder.join("log")).unwrap_or_default(),
                    fs::read_to_string(folder.join("error.log")).unwrap_or_default()
                );
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // By SIGTERM, so that nginx ends its workers, and killed where that does not help.
        let _ = kill(Pid::from_raw(self.0.id() as i32), Signal::SIGTERM);
        let start = Instant::now();
        while matches!(self.0.try_wait(), Ok(None)) {
            if start.elapsed() > PATIENCE {
                let _ = self.0.kill();
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Starts the backends; each listens on all these ports.
///
/// # Errors
/// nginx is not there, or does not start.
pub fn backends(network: &Network, ports: &[u16]) -> Result<Vec<Server>> {
    let listens: String = ports
        .iter()
        .map(|port| format!("listen {port} backlog=4096;\n"))
        .collect();
    let body = "x".repeat(BODY);
    let mut servers = Vec::new();
    for index in 0..BACKENDS {
        let namespace = &network.backends()[index];
        let folder = isolation::folder(&format!("backend{index}"))?;
        let configuration = format!(
            "{}http {{\naccess_log off;\nkeepalive_requests 1000000000;\nserver {{\n{listens}\
             add_header {BACKEND_HEADER} {index};\nlocation / {{ return 200 \"{body}\"; }}\n}}\n}}\n",
            nginx_head(1)
        );
        let mut server = Server::nginx(namespace, &folder, &configuration)?;
        for port in ports {
            server.await_listening(namespace, network.backend(index, *port), &folder)?;
        }
        servers.push(server);
    }
    Ok(servers)
}

/// What every configuration of nginx begins with.
pub fn nginx_head(workers: usize) -> String {
    format!(
        "user root;\ndaemon off;\nworker_processes {workers};\npid nginx.pid;\nerror_log error.log;\n\
         events {{ worker_connections 4096; }}\n"
    )
}
