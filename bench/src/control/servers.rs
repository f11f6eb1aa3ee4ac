//! The servers of the watched service: they answer probes, one of them as it is told to.

use std::{
    io::{Read, Write},
    net::{IpAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::{PATIENCE, configuration::PROBE_PORT, network::Network};

/// How long a client may take to ask.
const REQUEST: Duration = Duration::from_secs(1);

/// The servers; they answer until the process ends.
#[derive(Clone, Debug, Default)]
pub struct Servers(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// The one that is to fail.
    failing: Option<IpAddr>,
    /// Whose next answer is waited for, and when it was given.
    awaited: Option<IpAddr>,
    answered: Option<Instant>,
}

impl Servers {
    /// # Errors
    /// The port cannot be had.
    pub fn start(network: &Network) -> Result<Self> {
        let listener = network
            .backend()
            .run(|| TcpListener::bind(("0.0.0.0", PROBE_PORT)))?
            .context("the servers' port was not bound")?;
        let servers = Self::default();
        let own = servers.clone();
        network.backend().spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that has gone away is no reason to stop.
                let _ = own.answer(stream);
            }
        })?;
        Ok(servers)
    }

    /// Has one server fail, or none; gives the time of its first answer after that.
    ///
    /// # Errors
    /// It is not probed.
    pub fn turn(&self, server: IpAddr, fails: bool) -> Result<Instant> {
        *self.lock() = State {
            failing: fails.then_some(server),
            awaited: Some(server),
            answered: None,
        };
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if let Some(answered) = self.lock().answered {
                return Ok(answered);
            }
            thread::sleep(Duration::from_micros(100));
        }
        bail!("{server} was not probed for {PATIENCE:?}")
    }

    fn answer(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let server = stream.local_addr()?.ip();
        stream.set_read_timeout(Some(REQUEST))?;
        let mut request = [0; 1024];
        // A probe's request is one segment.
        if stream.read(&mut request)? == 0 {
            return Ok(());
        }
        let mut state = self.lock();
        let status = if state.failing == Some(server) {
            "503 Service Unavailable"
        } else {
            "200 OK"
        };
        if state.awaited == Some(server) {
            state.awaited = None;
            state.answered = Some(Instant::now());
        }
        drop(state);
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
