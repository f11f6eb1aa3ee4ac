//! Probes and driver against real sockets on the loopback interface.

mod driver;
mod exec;
mod grpc;
mod https;
mod icmp;
mod probes;
mod udp;

use std::{
    net::{Ipv6Addr, SocketAddr},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
};

use super::{ProbeError, SocketOptions, Target, Turn, probe};
use crate::{
    config::{HealthCheck, Probe},
    model::Health,
};

/// Long enough for anything that must succeed on a busy machine.
const GENEROUS: Duration = Duration::from_secs(20);
/// A timeout that is to pass.
const SHORT: Duration = Duration::from_millis(300);

fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

fn any_port_ipv6() -> SocketAddr {
    SocketAddr::from((Ipv6Addr::LOCALHOST, 0))
}

fn tcp() -> Probe {
    Probe::Tcp { port: None }
}

fn http(path: &str) -> Probe {
    Probe::Http {
        port: None,
        path: path.into(),
        host: None,
    }
}

fn check(probe: Probe, interval: Duration, timeout: Duration, rise: u32, fall: u32) -> HealthCheck {
    HealthCheck {
        probe,
        interval,
        timeout,
        rise,
        fall,
    }
}

/// A listener whose connections are each handled by one call; it is closed when dropped.
struct Server {
    address: SocketAddr,
    /// Connections accepted so far.
    accepted: Arc<AtomicUsize>,
    _tasks: tokio::task::JoinSet<()>,
}

impl Server {
    async fn start<F>(handle: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Self::start_at(any_port(), handle).await
    }

    async fn start_at<F>(address: SocketAddr, handle: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let accepted = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&accepted);
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    // Too many open files, until some are closed.
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    continue;
                };
                counter.fetch_add(1, Ordering::SeqCst);
                connections.spawn(handle(stream));
                while connections.try_join_next().is_some() {}
            }
        });
        Self {
            address,
            accepted,
            _tasks: tasks,
        }
    }

    fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

/// An address at which nobody listens, for as long as the socket lives.
fn refusing() -> (SocketAddr, TcpSocket) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(any_port()).unwrap();
    (socket.local_addr().unwrap(), socket)
}

/// Keeps the connection until the other side has closed it.
async fn hang(mut stream: TcpStream) {
    let mut sink = [0; 1024];
    while matches!(stream.read(&mut sink).await, Ok(1..)) {}
}

/// Reads the head of a request.
async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => break,
        }
    }
    String::from_utf8(head).unwrap()
}

async fn try_probe(address: SocketAddr, what: Probe, timeout: Duration) -> Result<(), ProbeError> {
    probe(&target(address, what, timeout), &Turn::default()).await
}

fn target(address: SocketAddr, what: Probe, timeout: Duration) -> Target {
    Target {
        service: "web".into(),
        backend: "a".into(),
        address,
        check: check(what, timeout, timeout, 1, 1),
        socket: SocketOptions::default(),
        vip: None,
        initial: Health::Unknown,
    }
}

/// The words of the failure, the address left out.
async fn failure(address: SocketAddr, what: Probe, timeout: Duration) -> String {
    let error = try_probe(address, what, timeout).await.unwrap_err().to_string();
    error.replace(&address.to_string(), "ADDRESS")
}

/// Reads the request, answers with `bytes` and closes.
async fn answering(bytes: impl Into<Vec<u8>>) -> Server {
    let bytes = Arc::new(bytes.into());
    Server::start(move |mut stream| {
        let bytes = Arc::clone(&bytes);
        async move {
            read_head(&mut stream).await;
            let _ = stream.write_all(&bytes).await;
        }
    })
    .await
}

/// How many connections with this local or remote port wait for their end.
fn time_waits(port: u16) -> usize {
    let port = format!(":{port:04X}");
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .map(|table| {
            let sockets = std::fs::read_to_string(table).unwrap();
            // Columns: number, local address, remote address, state; 06 is TIME_WAIT.
            let waiting = sockets.lines().filter(|line| {
                let columns: Vec<_> = line.split_whitespace().collect();
                (columns[1].ends_with(&port) || columns[2].ends_with(&port)) && columns[3] == "06"
            });
            waiting.count()
        })
        .sum()
}

async fn wait_until(condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < GENEROUS, "the condition never came true");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Runs `work` in a network namespace of its own, which has the loopback interface alone; needs root.
fn in_namespace<T: Send + 'static>(work: impl AsyncFnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        ip("link set lo up");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(work())
    });
    thread.join().unwrap()
}

/// `ip` in the namespace of this thread.
fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

/// An interface behind which nobody answers, with the networks 192.0.2.0/24 and 2001:db8::/64.
fn add_lonely_interface() {
    ip("link add lonely type veth peer name other");
    ip("link set lonely up");
    ip("link set other up");
    ip("address add 192.0.2.1/24 dev lonely");
    ip("address add 2001:db8::1/64 dev lonely nodad");
    // The system gives up after three requests; it need not take three seconds.
    for family in ["ipv4", "ipv6"] {
        let path = format!("/proc/sys/net/{family}/neigh/lonely/retrans_time_ms");
        std::fs::write(path, "100").unwrap();
    }
}
