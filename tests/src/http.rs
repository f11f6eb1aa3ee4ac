//! HTTP clients: connections that stay open, and downloads that go on while something happens.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::sys::{
    socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket,
        sockopt::{IpBindAddressNoPort, RcvBuf, SendTimeout},
    },
    time::TimeVal,
};
use xlb::lab::Namespace;

use crate::{machine, nginx};

/// After which a client gives up.
pub fn timeout() -> Duration {
    machine::bound(Duration::from_secs(5))
}

/// One connection, on which one request follows the other.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<TcpStream>,
    server: SocketAddr,
}

impl Connection {
    /// Connects from a namespace.
    pub fn open(client: &Namespace, server: SocketAddr) -> io::Result<Self> {
        client
            .run(|| Self::dial(server, None))
            .map_err(io::Error::other)?
    }

    /// Connects from the namespace of this thread, from `source` where one is given; its port 0 is any.
    pub fn dial(server: SocketAddr, source: Option<SocketAddr>) -> io::Result<Self> {
        let family = if server.is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        };
        let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        if let Some(source) = source {
            setsockopt(&socket, IpBindAddressNoPort, &true)?;
            bind(socket.as_raw_fd(), &SockaddrStorage::from(source))?;
        }
        // Small, so that a download that is read slowly is also sent slowly.
        setsockopt(&socket, RcvBuf, &(128 << 10))?;
        // Linux bounds connect(2) by this, too.
        setsockopt(&socket, SendTimeout, &TimeVal::new(timeout().as_secs() as i64, 0))?;
        connect(socket.as_raw_fd(), &SockaddrStorage::from(server))?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(timeout()))?;
        Ok(Self {
            stream: BufReader::new(stream),
            server,
        })
    }

    /// Gets the text at `path`; any status but 200 is an error.
    pub fn get(&mut self, path: &str) -> io::Result<String> {
        self.request(path, "keep-alive")?;
        let length = self.answer()?;
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        Ok(String::from_utf8_lossy(&body).trim_end().to_owned())
    }

    /// As [`Self::get`], the last on this connection; the server closes it.
    pub fn get_last(mut self, path: &str) -> io::Result<String> {
        self.request(path, "close")?;
        let length = self.answer()?;
        let mut body = Vec::new();
        self.stream.read_to_end(&mut body)?;
        if body.len() != length {
            return Err(io::Error::other(format!("{} bytes of {length}", body.len())));
        }
        Ok(String::from_utf8_lossy(&body).trim_end().to_owned())
    }

    /// Begins to download `/big`.
    pub fn download(mut self) -> Download {
        let received = Arc::new(AtomicUsize::new(0));
        let hurry = Arc::new(AtomicBool::new(false));
        let (counter, hurried) = (Arc::clone(&received), Arc::clone(&hurry));
        let thread = thread::spawn(move || {
            self.request("/big", "keep-alive")?;
            let mut left = self.answer()?;
            let mut body = Vec::with_capacity(left);
            let mut chunk = vec![0; 16 << 10];
            while left > 0 {
                if !hurried.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(50));
                }
                let part = chunk.len().min(left);
                self.stream.read_exact(&mut chunk[..part])?;
                body.extend_from_slice(&chunk[..part]);
                left -= part;
                counter.fetch_add(part, Ordering::Relaxed);
            }
            Ok(body)
        });
        Download {
            received,
            hurry,
            thread,
        }
    }

    fn request(&mut self, path: &str, connection: &str) -> io::Result<()> {
        let server = self.server;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {server}\r\nConnection: {connection}\r\n\r\n");
        self.stream.get_mut().write_all(request.as_bytes())
    }

    /// Reads the head of an answer, and tells the length of its body.
    fn answer(&mut self) -> io::Result<usize> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if self.stream.read_until(b'\n', &mut head)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let head = String::from_utf8_lossy(&head).to_lowercase();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
        match length {
            Some(length) if head.starts_with("http/1.1 200 ") => Ok(length),
            _ => Err(io::Error::other(format!("unexpected answer: {head}"))),
        }
    }
}

/// A download that is read slowly, 320 KB a second, until it is told to finish.
#[derive(Debug)]
pub struct Download {
    received: Arc<AtomicUsize>,
    hurry: Arc<AtomicBool>,
    thread: JoinHandle<io::Result<Vec<u8>>>,
}

impl Download {
    /// Waits until more bytes have come, and fails if they do not.
    pub fn proceeds(&self) {
        let before = self.received.load(Ordering::Relaxed);
        machine::eventually("the download proceeds", Duration::from_secs(5), || {
            self.received.load(Ordering::Relaxed) > before + (128 << 10)
        });
    }

    /// Whether it has ended, in whatever way.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Reads the rest as fast as it comes.
    ///
    /// # Errors
    /// The connection was cut.
    pub fn finish(self) -> io::Result<()> {
        self.hurry.store(true, Ordering::Relaxed);
        let body = self
            .thread
            .join()
            .map_err(|_| io::Error::other("it panicked"))??;
        assert!(
            body == nginx::big_file(),
            "the downloaded file is not the one of the server"
        );
        Ok(())
    }
}
