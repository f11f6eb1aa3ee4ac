//! A small blocking HTTP client whose source address can be chosen: one new connection per request.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use nix::sys::{
    socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket,
        sockopt::{IpBindAddressNoPort, SendTimeout},
    },
    time::TimeVal,
};

/// What a server answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    pub body: Vec<u8>,
}

impl Response {
    /// The body as text; bytes that are no UTF-8 are replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Gets `path`, and reads the whole answer.
///
/// # Errors
/// When no connection comes about, nothing is heard for as long as `timeout`, or the connection ends before the whole
/// body has come.
pub fn get(
    server: SocketAddr,
    path: &str,
    source: Option<IpAddr>,
    timeout: Duration,
) -> io::Result<Response> {
    let mut stream = dial(server, source, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    // HTTP/1.0, so that the end of the connection ends the body, and no server sends it in chunks.
    write!(
        stream,
        "GET {path} HTTP/1.0\r\nHost: {server}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    parse(&answer)
}

/// Connects within `timeout`, from the address `source` where one is given.
pub fn dial(server: SocketAddr, source: Option<IpAddr>, timeout: Duration) -> io::Result<TcpStream> {
    let family = if server.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    if let Some(source) = source {
        // The port is chosen when the peer is known, so that more connections fit than there are ports.
        setsockopt(&socket, IpBindAddressNoPort, &true)?;
        bind(
            socket.as_raw_fd(),
            &SockaddrStorage::from(SocketAddr::new(source, 0)),
        )?;
    }
    // Linux bounds connect(2) by this, too.
    setsockopt(
        &socket,
        SendTimeout,
        &TimeVal::new(timeout.as_secs() as i64, i64::from(timeout.subsec_micros())),
    )?;
    let start = Instant::now();
    connect(socket.as_raw_fd(), &SockaddrStorage::from(server)).map_err(|error| match error {
        nix::Error::EINPROGRESS => {
            let text = format!("no connection to {server} within {:?}", start.elapsed());
            io::Error::new(io::ErrorKind::TimedOut, text)
        }
        other => other.into(),
    })?;
    Ok(TcpStream::from(socket))
}

/// Takes an answer apart; [`io::ErrorKind::UnexpectedEof`] tells that it is not whole yet.
pub(crate) fn parse(answer: &[u8]) -> io::Result<Response> {
    let broken = |what: &str| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{what} in the server's answer"),
        )
    };
    let end = answer
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the connection ended before the headers did",
            )
        })?;
    let head = String::from_utf8_lossy(&answer[..end]);
    let mut lines = head.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.strip_prefix("HTTP/1."))
        .and_then(|line| line.split(' ').nth(1)?.parse().ok())
        .ok_or_else(|| broken("no status"))?;
    let mut body = answer[end + 4..].to_vec();
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map(|(_, value)| {
            value
                .trim()
                .parse::<usize>()
                .map_err(|_| broken("a length that is no number"))
        })
        .transpose()?;
    if let Some(length) = length {
        if body.len() < length {
            let text = format!("the connection ended after {} of {length} bytes", body.len());
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
        }
        body.truncate(length);
    }
    Ok(Response { status, body })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_answer_is_taken_apart() {
        let response = parse(b"HTTP/1.1 503 Busy\r\nX: y\r\ncontent-LENGTH: 3\r\n\r\nabc").unwrap();
        assert_eq!((response.status, response.text().as_str()), (503, "abc"));
        assert_eq!(
            parse(b"HTTP/1.0 200 OK\r\n\r\nto the end").unwrap().text(),
            "to the end"
        );
    }

    #[test]
    fn a_cut_answer_is_an_error() {
        for answer in [
            &b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab"[..],
            b"HTTP/1.1 200",
            b"",
        ] {
            assert_eq!(parse(answer).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
        assert_eq!(
            parse(b"SSH-2.0\r\n\r\n").unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }

    #[test]
    fn a_connection_that_nobody_answers_times_out() {
        let (client, sink) = (
            crate::lab::Namespace::new("client").unwrap(),
            crate::lab::Namespace::new("sink").unwrap(),
        );
        crate::lab::Namespace::connect(&client, "eth0", &sink, "eth0").unwrap();
        client.add_address("eth0", "10.0.0.1/24").unwrap();
        client
            .add_neighbour("eth0", [10, 0, 0, 2].into(), [2, 0, 0, 0, 0, 2])
            .unwrap();
        let address = ([10, 0, 0, 2], 80).into();
        let error = client
            .run(|| dial(address, None, Duration::from_millis(200)))
            .unwrap()
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    }
}
