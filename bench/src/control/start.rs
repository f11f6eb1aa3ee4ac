//! From the start of a daemon with one service to the first packet that goes to a client and back, and to its end.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{
    PATIENCE,
    configuration::{self, Size},
    network::Network,
};
use crate::balancer::{Daemon, configuration::PORT};

/// Between two packets of the client: how exactly the first answer is timed.
const TICK: Duration = Duration::from_micros(500);

/// Milliseconds of each round.
#[derive(Debug, Default)]
pub struct Times {
    /// From the start to the first answer that the client gets through the VIP.
    pub forwarding: Vec<f64>,
    /// From the start to the daemon's word that it is ready.
    pub ready: Vec<f64>,
    /// From SIGTERM to the end of the process.
    pub stopped: Vec<f64>,
}

/// Starts and stops the daemon, with nothing left of the one before.
///
/// # Errors
/// It does not start, or no packet comes back.
pub fn rounds(network: &Network, daemon: &mut Daemon, flow_table: Option<u32>, rounds: u32) -> Result<Times> {
    let backend = SocketAddr::new(network.backend_address(), PORT);
    daemon.configure(&configuration::small(
        &network.interfaces(),
        flow_table,
        &daemon.seed_file(),
        backend,
    ))?;
    let _echo = Echo::start(network, backend)?;
    let mut times = Times::default();
    for _ in 0..rounds {
        daemon.detach(network.balancer())?;
        let vip = SocketAddr::new(Size::vip(0), PORT);
        let client = network.client().spawn(move || first_answer(vip))?;
        // It has to be sending already.
        thread::sleep(Duration::from_millis(20));
        let start = daemon.start(network.balancer())?;
        let ready = daemon.await_ready(PATIENCE)?;
        let answered = client
            .join()
            .unwrap_or_else(|cause| std::panic::resume_unwind(cause))??;
        ensure!(answered > start, "the VIP answered before the daemon was started");
        let stopping = Instant::now();
        daemon.terminate()?;
        times.stopped.push(milliseconds(stopping.elapsed()));
        times.forwarding.push(milliseconds(answered - start));
        times.ready.push(milliseconds(ready - start));
    }
    daemon.detach(network.balancer())?;
    Ok(times)
}

pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Sends to the VIP again and again; gives the time of the first answer.
fn first_answer(vip: SocketAddr) -> Result<Instant> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.connect(vip)?;
    socket.set_read_timeout(Some(TICK))?;
    let start = Instant::now();
    let mut answer = [0; 16];
    while start.elapsed() < PATIENCE {
        // As long as nothing forwards, the kernel tells of unreachable hosts: in either call.
        let _ = socket.send(b"packet");
        match socket.recv(&mut answer) {
            Ok(6) => return Ok(Instant::now()),
            Ok(length) => anyhow::bail!("the answer has {length} bytes"),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => thread::sleep(TICK),
        }
    }
    anyhow::bail!("no packet came back through {vip} in {PATIENCE:?}")
}

/// A backend that sends back what it gets, until it is dropped.
struct Echo {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Echo {
    fn start(network: &Network, address: SocketAddr) -> Result<Self> {
        let socket = network
            .backend()
            .run(|| UdpSocket::bind(address))?
            .with_context(|| format!("{address} was not bound"))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let ends = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&ends);
        let thread = network.backend().spawn(move || {
            let mut packet = [0; 16];
            while !asked.load(Ordering::Relaxed) {
                if let Ok((length, from)) = socket.recv_from(&mut packet) {
                    let _ = socket.send_to(&packet[..length], from);
                }
            }
        })?;
        Ok(Self {
            ends,
            thread: Some(thread),
        })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
