//! Probes and driver against real sockets on the loopback interface.

mod driver;
mod probes;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpSocket, TcpStream},
};

use crate::config::{HealthCheck, Probe};

/// Long enough for anything that must succeed on a busy machine.
const GENEROUS: Duration = Duration::from_secs(20);

fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
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
