//! UDP servers and clients.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use xlb::lab::Namespace;

use crate::machine;

/// Answers each datagram with its name and the address that it sees the client under, until dropped.
#[derive(Debug)]
pub struct UdpEcho {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl UdpEcho {
    pub fn start(namespace: &Namespace, name: &str, listen: SocketAddr) -> Self {
        let socket = namespace.run(|| UdpSocket::bind(listen));
        let socket = socket.expect("a thread in the namespace").expect("a free port");
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .expect("a timeout");
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, name) = (Arc::clone(&stop), name.to_owned());
        let serve = move || {
            let mut datagram = [0; 2048];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((_, peer)) = socket.recv_from(&mut datagram) {
                    // A client that has gone needs no answer.
                    let _ = socket.send_to(format!("{name} {}", peer.ip()).as_bytes(), peer);
                }
            }
        };
        let thread = namespace.spawn(serve).expect("a thread in the namespace");
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for UdpEcho {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Sends a datagram, and tells the answer: the server's name and the address that it has seen.
///
/// # Errors
/// No answer comes, or it comes from another address than the one that was asked.
pub fn ask(socket: &UdpSocket, server: SocketAddr) -> io::Result<(String, String)> {
    socket.set_read_timeout(Some(machine::bound(Duration::from_secs(2))))?;
    socket.send_to(b"who is there", server)?;
    let mut answer = [0; 2048];
    let (length, from) = socket.recv_from(&mut answer)?;
    if from != server {
        return Err(io::Error::other(format!(
            "the answer comes from {from}, not {server}"
        )));
    }
    let text = String::from_utf8_lossy(&answer[..length]).into_owned();
    text.split_once(' ')
        .map(|(name, peer)| (name.to_owned(), peer.to_owned()))
        .ok_or_else(|| io::Error::other(format!("unexpected answer {text:?}")))
}
