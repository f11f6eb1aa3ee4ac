//! The demo's clients: threads in the client's namespace that make new connections, keep some open, and download.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::stage::SERVICE;
use crate::lab::{
    LabError, Namespace,
    http_client::{self, dial},
};

/// Clients at a time that make one new connection after the other.
const WORKERS: usize = 4;
/// From one connection of a worker to its next, unless the machine is slower.
const WORKER_PERIOD: Duration = Duration::from_millis(20);
/// Connections that stay open.
pub const KEPT: usize = 12;
/// From one request on a kept connection to its next.
const KEPT_PERIOD: Duration = Duration::from_millis(400);
/// A lost packet costs a second or more, which shall not count as a failure.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes a second of the download.
pub const DOWNLOAD_RATE: u64 = 256 * 1024;

/// What a client has seen. Times are counted from the start of the traffic.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    /// A new connection was tried.
    Attempt(Attempt),
    /// A connection that was kept open was cut.
    Cut(Cut),
}

/// A new connection and its first request.
#[derive(Clone, Debug, PartialEq)]
pub struct Attempt {
    pub began: Duration,
    pub ended: Duration,
    /// Index of the backend that answered, or what went wrong.
    pub outcome: Result<usize, Failure>,
    /// The number of the kept connection that it opens or opens again.
    pub keeps: Option<usize>,
}

/// The end of a kept connection that the client did not want.
#[derive(Clone, Debug, PartialEq)]
pub struct Cut {
    pub opened: Duration,
    pub noticed: Duration,
    pub kept: usize,
    /// Index of the backend that it was on.
    pub backend: usize,
    pub failure: Failure,
}

/// What went wrong with a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub text: String,
    /// Refused, reset or closed early: what the kernel does for a process that is dead.
    pub is_of_a_dead_process: bool,
}

/// How far the download has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Download {
    pub bytes: u64,
    pub expected: u64,
    pub complete: bool,
    /// Name of the backend that it comes through.
    pub backend: String,
    pub error: Option<String>,
}

/// The running clients.
#[derive(Debug)]
pub struct Clients {
    seen: Receiver<Seen>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

/// What the threads share.
#[derive(Clone)]
struct Shared {
    start: Instant,
    names: Arc<[String]>,
    addresses: Arc<[IpAddr]>,
    seen: Sender<Seen>,
    stop: Arc<AtomicBool>,
}

impl Clients {
    /// Starts them; `start` is the time that theirs is counted from.
    pub fn start(
        namespace: &Namespace,
        start: Instant,
        names: &[String],
        addresses: &[IpAddr],
    ) -> Result<Self, LabError> {
        let (sender, seen) = mpsc::channel();
        let stop = Arc::new(AtomicBool::new(false));
        let shared = Shared {
            start,
            names: names.into(),
            addresses: addresses.into(),
            seen: sender,
            stop: Arc::clone(&stop),
        };
        let mut threads = Vec::new();
        for worker in 0..WORKERS {
            let shared = shared.clone();
            threads.push(namespace.spawn(move || shared.connect_again_and_again(worker))?);
        }
        threads.push(namespace.spawn(move || shared.keep_connections())?);
        Ok(Self { seen, stop, threads })
    }

    /// What has been seen since the last call.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.try_iter().collect()
    }

    /// Lets them finish what they are at, and gives the rest of what they have seen.
    pub fn finish(self) -> anyhow::Result<Vec<Seen>> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            match thread.join() {
                Ok(ended) => ended?,
                Err(_) => anyhow::bail!("a client's thread has panicked"),
            }
        }
        Ok(self.seen.try_iter().collect())
    }
}

impl Shared {
    fn connect_again_and_again(&self, worker: usize) {
        let mut next = Instant::now() + WORKER_PERIOD * worker as u32 / WORKERS as u32;
        for count in worker.. {
            if self.sleep_until(next) {
                return;
            }
            next = (next + WORKER_PERIOD).max(Instant::now());
            let began = self.start.elapsed();
            let outcome = self.ask_anew(self.source(count));
            self.tell(Seen::Attempt(Attempt {
                began,
                ended: self.start.elapsed(),
                outcome,
                keeps: None,
            }));
        }
    }

    /// Asks on each kept connection in turn; opens it where it is not open.
    fn keep_connections(&self) {
        let mut connections: Vec<Option<(TcpStream, usize, Duration)>> = (0..KEPT).map(|_| None).collect();
        let mut next = Instant::now();
        loop {
            for (kept, connection) in connections.iter_mut().enumerate() {
                if self.sleep_until(next) {
                    return;
                }
                next = (next + KEPT_PERIOD / KEPT as u32).max(Instant::now());
                if let Some((stream, backend, opened)) = connection {
                    let (backend, opened) = (*backend, *opened);
                    let outcome = self.ask(stream).and_then(|answered| same(backend, answered));
                    let Err(failure) = outcome else { continue };
                    *connection = None;
                    self.tell(Seen::Cut(Cut {
                        opened,
                        noticed: self.start.elapsed(),
                        kept,
                        backend,
                        failure,
                    }));
                }
                let began = self.start.elapsed();
                let outcome = self.open(kept).map(|(stream, backend)| {
                    *connection = Some((stream, backend, began));
                    backend
                });
                self.tell(Seen::Attempt(Attempt {
                    began,
                    ended: self.start.elapsed(),
                    outcome,
                    keeps: Some(kept),
                }));
            }
        }
    }

    fn ask_anew(&self, source: Option<IpAddr>) -> Result<usize, Failure> {
        let mut stream = connect(source)?;
        send(&mut stream, "/", "close")?;
        self.answer(&mut stream)
    }

    fn open(&self, kept: usize) -> Result<(TcpStream, usize), Failure> {
        let mut stream = connect(self.source(kept))?;
        let backend = self.ask(&mut stream)?;
        Ok((stream, backend))
    }

    /// Asks on an open connection, and leaves it open.
    fn ask(&self, stream: &mut TcpStream) -> Result<usize, Failure> {
        send(stream, "/", "keep-alive")?;
        self.answer(stream)
    }

    /// The backend that answers.
    fn answer(&self, stream: &mut TcpStream) -> Result<usize, Failure> {
        let mut answer = Vec::new();
        let mut chunk = [0; 1024];
        loop {
            let length = stream.read(&mut chunk)?;
            answer.extend_from_slice(&chunk[..length]);
            match http_client::parse(&answer) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && length > 0 => {}
                Err(error) => return Err(error.into()),
                Ok(response) => {
                    let name = response.text();
                    let found = self.names.iter().position(|known| known == name.trim_end());
                    return found
                        .filter(|_| response.status == 200)
                        .ok_or_else(|| Failure::odd(format!("status {} from {name:?}", response.status)));
                }
            }
        }
    }

    fn source(&self, count: usize) -> Option<IpAddr> {
        self.addresses.get(count % self.addresses.len().max(1)).copied()
    }

    /// Tells whether it is time to stop.
    fn sleep_until(&self, time: Instant) -> bool {
        thread::sleep(time.saturating_duration_since(Instant::now()));
        self.stop.load(Ordering::Relaxed)
    }

    fn tell(&self, seen: Seen) {
        // Nobody listens any more when the demo is ending.
        let _ = self.seen.send(seen);
    }
}

impl Failure {
    fn odd(text: String) -> Self {
        Self {
            text,
            is_of_a_dead_process: false,
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, UnexpectedEof};
        Self {
            text: error.to_string(),
            is_of_a_dead_process: matches!(
                error.kind(),
                BrokenPipe | ConnectionRefused | ConnectionReset | UnexpectedEof
            ),
        }
    }
}

/// A download on a thread.
#[derive(Debug)]
pub struct Downloading {
    expected: u64,
    bytes: Arc<AtomicU64>,
    thread: JoinHandle<io::Result<Result<(), Failure>>>,
}

impl Downloading {
    /// Connects, and goes on by itself.
    pub fn start(namespace: &Namespace, source: Option<IpAddr>, expected: u64) -> Result<Self, LabError> {
        let bytes = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&bytes);
        let thread = namespace.spawn(move || download(source, expected, &counter))?;
        Ok(Self {
            expected,
            bytes,
            thread,
        })
    }

    /// Bytes that have arrived.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub fn expected(&self) -> u64 {
        self.expected
    }

    /// Tells whether it has come to an end, whole or not.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for its end, which silence on the connection brings about at the latest.
    pub fn finish(self, backend: &str) -> Download {
        let error = match self.thread.join() {
            Ok(Ok(Ok(()))) => None,
            Ok(Ok(Err(failure))) => Some(failure.text),
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("its thread has panicked".to_owned()),
        };
        let bytes = self.bytes.load(Ordering::Relaxed);
        Download {
            bytes,
            expected: self.expected,
            complete: error.is_none() && bytes == self.expected,
            backend: backend.to_owned(),
            error,
        }
    }
}

fn download(source: Option<IpAddr>, expected: u64, counter: &AtomicU64) -> Result<(), Failure> {
    let mut stream = connect(source)?;
    send(
        &mut stream,
        &format!("/bytes/{expected}?rate={DOWNLOAD_RATE}"),
        "close",
    )?;
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.extend_from_slice(&byte);
    }
    if !head.starts_with(b"HTTP/1.1 200") {
        return Err(Failure::odd("the answer is no 200".to_owned()));
    }
    let mut chunk = vec![0; 64 * 1024];
    loop {
        let length = stream.read(&mut chunk)?;
        if length == 0 {
            return Ok(());
        }
        if chunk[..length].iter().any(|byte| *byte != b'x') {
            return Err(Failure::odd("it holds bytes that were not sent".to_owned()));
        }
        counter.fetch_add(length as u64, Ordering::Relaxed);
    }
}

fn connect(source: Option<IpAddr>) -> io::Result<TcpStream> {
    let stream = dial(SERVICE, source, CONNECT_TIMEOUT)?;
    stream.set_read_timeout(Some(READ_TIMEOUT))?;
    stream.set_write_timeout(Some(READ_TIMEOUT))?;
    Ok(stream)
}

fn send(stream: &mut TcpStream, path: &str, connection: &str) -> io::Result<()> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {SERVICE}\r\nConnection: {connection}\r\n\r\n");
    stream.write_all(request.as_bytes())
}

/// A connection stays on its backend.
fn same(backend: usize, answered: usize) -> Result<(), Failure> {
    if backend == answered {
        return Ok(());
    }
    Err(Failure::odd(
        "another backend answered on an open connection".to_owned(),
    ))
}
