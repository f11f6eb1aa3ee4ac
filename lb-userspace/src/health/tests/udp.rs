use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{net::UdpSocket, task::JoinSet};

use super::{
    GENEROUS, SHORT, add_lonely_interface, any_port, any_port_ipv6, failure, in_namespace, try_probe,
};
use crate::config::Probe;

fn udp(send: Option<&[u8]>, expect: Option<&[u8]>) -> Probe {
    Probe::Udp {
        port: None,
        send: send.map(<[u8]>::to_vec),
        expect: expect.map(<[u8]>::to_vec),
    }
}

/// A server that answers each datagram with `answer`, or with the datagram itself, or not at all.
struct Server {
    address: SocketAddr,
    received: Arc<Mutex<Vec<Vec<u8>>>>,
    _task: JoinSet<()>,
}

enum Answer {
    Echo,
    Bytes(&'static [u8]),
    Silence,
    FromAnotherPort,
}

impl Server {
    async fn start(address: SocketAddr, answer: Answer) -> Self {
        let socket = UdpSocket::bind(address).await.unwrap();
        let another = UdpSocket::bind(address).await.unwrap();
        let address = socket.local_addr().unwrap();
        let received = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&received);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut datagram = [0; 2048];
            loop {
                let (length, client) = socket.recv_from(&mut datagram).await.unwrap();
                let datagram = &datagram[..length];
                seen.lock().unwrap().push(datagram.to_vec());
                let _ = match answer {
                    Answer::Echo => socket.send_to(datagram, client).await,
                    Answer::Bytes(bytes) => socket.send_to(bytes, client).await,
                    Answer::Silence => continue,
                    Answer::FromAnotherPort => another.send_to(datagram, client).await,
                };
            }
        });
        Self {
            address,
            received,
            _task: task,
        }
    }

    fn received(&self) -> Vec<Vec<u8>> {
        self.received.lock().unwrap().clone()
    }
}

#[tokio::test]
async fn an_answer_is_success_and_the_server_gets_what_is_to_be_sent() {
    for address in [any_port(), any_port_ipv6()] {
        let server = Server::start(address, Answer::Echo).await;
        let sent: [&[u8]; 4] = [b"ping", b"\x00\xff\x80", b"", &[b'x'; 1200]];
        for bytes in sent {
            try_probe(server.address, udp(Some(bytes), None), GENEROUS)
                .await
                .unwrap();
        }
        // Without anything to send it is an empty datagram.
        try_probe(server.address, udp(None, None), GENEROUS)
            .await
            .unwrap();
        assert_eq!(server.received()[..4], sent);
        assert_eq!(server.received()[4..], [b""]);
    }
}

#[tokio::test]
async fn the_answer_has_to_contain_what_is_expected() {
    let server = Server::start(any_port(), Answer::Bytes(b"+PONG\r\n\xff")).await;
    for expected in [&b"+PONG"[..], b"PONG", b"\xff", b"+PONG\r\n\xff"] {
        try_probe(server.address, udp(Some(b"PING"), Some(expected)), GENEROUS)
            .await
            .unwrap();
        try_probe(server.address, udp(None, Some(expected)), GENEROUS)
            .await
            .unwrap();
    }
    for expected in [&b"pong"[..], b"+PONG\r\n\xff and more", b"PONG+"] {
        let words = failure(server.address, udp(Some(b"PING"), Some(expected)), GENEROUS).await;
        assert_eq!(
            words,
            "datagram to ADDRESS: the answer does not contain what is expected"
        );
    }
}

#[tokio::test]
async fn an_empty_answer_is_an_answer_but_contains_nothing() {
    let server = Server::start(any_port(), Answer::Bytes(b"")).await;
    try_probe(server.address, udp(Some(b"ping"), None), GENEROUS)
        .await
        .unwrap();
    let words = failure(server.address, udp(Some(b"ping"), Some(b"pong")), GENEROUS).await;
    assert_eq!(
        words,
        "datagram to ADDRESS: the answer does not contain what is expected"
    );
}

#[tokio::test]
async fn silence_is_a_failure_only_where_something_is_sent_or_expected() {
    let server = Server::start(any_port(), Answer::Silence).await;
    for what in [
        udp(Some(b"ping"), None),
        udp(Some(b""), None),
        udp(None, Some(b"pong")),
        udp(Some(b"ping"), Some(b"pong")),
    ] {
        let words = failure(server.address, what, SHORT).await;
        assert_eq!(words, "datagram to ADDRESS: timed out after 300ms");
    }
    try_probe(server.address, udp(None, None), SHORT).await.unwrap();
    assert_eq!(server.received().len(), 5);
}

#[tokio::test]
async fn an_answer_from_elsewhere_is_none() {
    let server = Server::start(any_port(), Answer::FromAnotherPort).await;
    let words = failure(server.address, udp(Some(b"ping"), None), SHORT).await;
    assert_eq!(words, "datagram to ADDRESS: timed out after 300ms");
    assert_eq!(server.received().len(), 1);
}

#[tokio::test]
async fn a_closed_port_is_a_failure_whatever_is_expected() {
    for address in [any_port(), any_port_ipv6()] {
        // Bound but connected to itself, so that it takes nothing from others.
        let closed = UdpSocket::bind(address).await.unwrap();
        let address = closed.local_addr().unwrap();
        closed.connect(address).await.unwrap();
        for what in [
            udp(None, None),
            udp(Some(b"ping"), None),
            udp(None, Some(b"pong")),
        ] {
            let words = failure(address, what, GENEROUS).await;
            assert_eq!(words, "datagram to ADDRESS: connection refused");
        }
    }
}

/// With but one ephemeral port.
#[test]
fn a_probe_that_meets_itself_is_a_refused_datagram() {
    let words = in_namespace(async || {
        std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40000").unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], 40_000));
        failure(address, udp(Some(b"ping"), None), GENEROUS).await
    });
    assert_eq!(words, "datagram to ADDRESS: connection refused");
}

#[test]
fn a_host_that_is_not_there_fails_even_where_no_answer_is_expected() {
    let words = in_namespace(async || {
        add_lonely_interface();
        let mut words = Vec::new();
        for address in ["192.0.2.2:53", "[2001:db8::2]:53", "198.51.100.1:53"] {
            words.push(failure(address.parse().unwrap(), udp(None, None), GENEROUS).await);
        }
        words
    });
    assert_eq!(
        words,
        [
            "datagram to ADDRESS: no route to host",
            "datagram to ADDRESS: no route to host",
            "datagram to ADDRESS: network is unreachable"
        ]
    );
}
