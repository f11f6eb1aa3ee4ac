//! Servers that send back what they get over TCP and UDP, and clients that compare it.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, shutdown, socket};
use xlb::lab::Namespace;

use crate::http;

/// Sends back what it gets, with its name and the address that it sees the client under; until dropped.
///
/// Over TCP these follow when the client has sent all, over UDP they begin each answer.
#[derive(Debug)]
pub struct Echo {
    listener: Arc<TcpListener>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Echo {
    /// Starts one in a namespace, on the same port of both protocols.
    pub fn start(namespace: &Namespace, name: &str, listen: SocketAddr) -> Self {
        let bound = namespace.run(|| Ok((TcpListener::bind(listen)?, UdpSocket::bind(listen)?)));
        let (listener, datagrams): (TcpListener, UdpSocket) = bound
            .expect("a thread in the namespace")
            .unwrap_or_else(|error: io::Error| panic!("listening on {listen}: {error}"));
        datagrams
            .set_read_timeout(Some(Duration::from_millis(100)))
            .expect("a timeout");
        let (listener, stop) = (Arc::new(listener), Arc::new(AtomicBool::new(false)));
        let accept = {
            let (listener, name) = (Arc::clone(&listener), name.to_owned());
            move || {
                // Ends when the listener is shut down.
                while let Ok((stream, peer)) = listener.accept() {
                    let farewell = format!("{name} {}", peer.ip());
                    // A client that breaks off notices by itself.
                    thread::spawn(move || send_back(stream, &farewell));
                }
            }
        };
        let answer = {
            let (stop, name) = (Arc::clone(&stop), name.to_owned());
            move || answer_datagrams(&datagrams, &name, &stop)
        };
        let threads = vec![
            namespace.spawn(accept).expect("a thread in the namespace"),
            namespace.spawn(answer).expect("a thread in the namespace"),
        ];
        Self {
            listener,
            stop,
            threads,
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        let _ = shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn send_back(mut stream: TcpStream, farewell: &str) -> io::Result<()> {
    let mut chunk = vec![0; 64 << 10];
    loop {
        let length = stream.read(&mut chunk)?;
        if length == 0 {
            return stream.write_all(farewell.as_bytes());
        }
        stream.write_all(&chunk[..length])?;
    }
}

fn answer_datagrams(socket: &UdpSocket, name: &str, stop: &AtomicBool) {
    let mut datagram = vec![0; 64 << 10];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((length, peer)) = socket.recv_from(&mut datagram) {
            let mut answer = format!("{name} {}\n", peer.ip()).into_bytes();
            answer.extend_from_slice(&datagram[..length]);
            // A client that has gone needs no answer.
            let _ = socket.send_to(&answer, peer);
        }
    }
}

/// Who has answered, and what address it has seen the client under.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Answer {
    pub name: String,
    pub peer: IpAddr,
}

impl Answer {
    fn parse(text: &[u8]) -> io::Result<Self> {
        let text = String::from_utf8_lossy(text);
        let parsed = text.split_once(' ').and_then(|(name, peer)| {
            let name = name.to_owned();
            Some(Self {
                name,
                peer: peer.parse().ok()?,
            })
        });
        parsed.ok_or_else(|| io::Error::other(format!("unexpected answer {text:?}")))
    }
}

/// A TCP connection to an [`Echo`], from the namespace of the calling thread.
#[derive(Debug)]
pub struct Conversation(TcpStream);

impl Conversation {
    /// Connects from `source`; its port 0 is any.
    pub fn open(source: SocketAddr, server: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::from(bound(SockType::Stream, source)?);
        let timeout = Some(http::timeout());
        // Linux bounds connect(2) by this, too.
        stream.set_write_timeout(timeout)?;
        stream.set_read_timeout(timeout)?;
        connect(stream.as_raw_fd(), &SockaddrStorage::from(server))?;
        Ok(Self(stream))
    }

    /// Sends the data, and takes it back at the same time; then ends the connection.
    ///
    /// # Errors
    /// What comes back differs, or the connection is cut.
    pub fn exchange(self, data: &[u8]) -> io::Result<Answer> {
        let stream = &self.0;
        let received = thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let mut writer = stream;
                writer.write_all(data)?;
                writer.shutdown(Shutdown::Write)
            });
            let mut received = Vec::with_capacity(data.len() + 64);
            let mut reader = stream;
            reader.read_to_end(&mut received)?;
            sender
                .join()
                .map_err(|_| io::Error::other("the sender panicked"))??;
            Ok::<_, io::Error>(received)
        })?;
        match received.split_at_checked(data.len()) {
            Some((same, farewell)) if same == data => Answer::parse(farewell),
            _ => Err(io::Error::other(format!(
                "what came back, {} bytes, is not what was sent, {} bytes",
                received.len(),
                data.len()
            ))),
        }
    }
}

/// A UDP socket in the namespace of the calling thread, at a source; its port 0 is any.
pub fn udp_socket(source: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::from(bound(SockType::Datagram, source)?);
    socket.set_read_timeout(Some(http::timeout()))?;
    Ok(socket)
}

/// Sends a datagram to an [`Echo`] and takes it back.
///
/// # Errors
/// No answer comes, it comes from another address than the one that was asked, or it differs.
pub fn ask(socket: &UdpSocket, server: SocketAddr, data: &[u8]) -> io::Result<Answer> {
    socket.send_to(data, server)?;
    let mut answer = vec![0; data.len() + 256];
    let (length, from) = socket.recv_from(&mut answer)?;
    if from != server {
        return Err(io::Error::other(format!(
            "the answer comes from {from}, not {server}"
        )));
    }
    take_back(&answer[..length], data)
}

/// As [`ask`], on a socket that is connected: the kernel gives it answers of that server alone, and its refusals.
///
/// # Errors
/// As for [`ask`].
pub fn ask_connected(socket: &UdpSocket, data: &[u8]) -> io::Result<Answer> {
    socket.send(data)?;
    let mut answer = vec![0; data.len() + 256];
    let length = socket.recv(&mut answer)?;
    take_back(&answer[..length], data)
}

fn take_back(answer: &[u8], data: &[u8]) -> io::Result<Answer> {
    let length = answer.len();
    let head = answer.iter().position(|byte| *byte == b'\n').unwrap_or(length);
    if answer.get(head + 1..) != Some(data) {
        return Err(io::Error::other(
            "the datagram that came back is not the one that was sent",
        ));
    }
    Answer::parse(&answer[..head])
}

fn bound(kind: SockType, source: SocketAddr) -> io::Result<OwnedFd> {
    let family = if source.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(source))?;
    Ok(socket)
}
