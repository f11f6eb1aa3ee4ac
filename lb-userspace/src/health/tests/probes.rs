use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use proptest::prelude::*;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpSocket, TcpStream},
};

use super::{
    GENEROUS, SHORT, Server, answering, any_port, any_port_ipv6, failure, hang, http, in_namespace,
    read_head, refusing, tcp, time_waits, try_probe,
};
use crate::config::Probe;

async fn http_failure(answer: impl Into<Vec<u8>>) -> String {
    let server = answering(answer).await;
    failure(server.address, http("/healthz"), GENEROUS).await
}

async fn http_success(answer: impl Into<Vec<u8>>) {
    let server = answering(answer).await;
    try_probe(server.address, http("/healthz"), GENEROUS)
        .await
        .unwrap();
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn without_a_probe_everything_succeeds() {
    let (address, _socket) = refusing();
    try_probe(address, Probe::None, SHORT).await.unwrap();
}

#[tokio::test]
async fn a_tcp_probe_succeeds_where_a_connection_is_accepted() {
    for address in [any_port(), any_port_ipv6()] {
        let server = Server::start_at(address, hang).await;
        try_probe(server.address, tcp(), GENEROUS).await.unwrap();
    }
}

#[tokio::test]
async fn a_refused_connection_is_named() {
    let (address, _socket) = refusing();
    for what in [tcp(), http("/")] {
        assert_eq!(
            failure(address, what, GENEROUS).await,
            "connect to ADDRESS: connection refused"
        );
    }
}

#[tokio::test]
async fn a_connection_that_nobody_answers_times_out() {
    let listener = TcpSocket::new_v4().unwrap();
    listener.bind(any_port()).unwrap();
    let listener = listener.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    // A full backlog drops further SYNs.
    let mut waiting = Vec::new();
    while let Ok(connected) = tokio::time::timeout(SHORT, TcpStream::connect(address)).await {
        waiting.push(connected.unwrap());
    }
    let started = Instant::now();
    for what in [tcp(), http("/")] {
        assert_eq!(
            failure(address, what, SHORT).await,
            "connect to ADDRESS: timed out after 300ms"
        );
    }
    assert!(started.elapsed() < GENEROUS);
}

/// With but one ephemeral port.
#[test]
fn a_probe_that_meets_itself_is_a_refused_connection() {
    let words = in_namespace(async || {
        std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40000").unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], 40_000));
        // Without the guard this would be a success: the system lets the socket meet itself.
        let itself = TcpStream::connect(address).await.unwrap();
        assert_eq!(itself.local_addr().unwrap(), itself.peer_addr().unwrap());
        itself.set_zero_linger().unwrap();
        drop(itself);
        failure(address, tcp(), GENEROUS).await
    });
    assert_eq!(words, "connect to ADDRESS: connection refused");
}

#[tokio::test]
async fn a_timeout_beyond_the_clock_is_no_panic() {
    let (address, _socket) = refusing();
    let words = failure(address, tcp(), Duration::MAX).await;
    assert_eq!(words, "connect to ADDRESS: connection refused");
}

#[tokio::test]
async fn probes_leave_no_time_wait() {
    let listening = Server::start(hang).await;
    let answering = answering("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
    // A port may be one that waits for another test's connection.
    let ports = [listening.address.port(), answering.address.port()];
    let before = ports.map(time_waits);
    for _ in 0..10 {
        try_probe(listening.address, tcp(), GENEROUS).await.unwrap();
        try_probe(answering.address, http("/"), GENEROUS).await.unwrap();
    }
    let after = ports.map(time_waits);
    assert!(
        after[0] <= before[0] && after[1] <= before[1],
        "{before:?} {after:?}"
    );
}

#[tokio::test]
async fn an_http_probe_asks_an_ipv6_backend_with_its_address_in_brackets() {
    let heads = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&heads);
    let server = Server::start_at(any_port_ipv6(), move |mut stream| {
        let seen = Arc::clone(&seen);
        async move {
            let head = read_head(&mut stream).await;
            seen.lock().unwrap().push(head);
            let _ = stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                .await;
        }
    })
    .await;
    let port = server.address.port();
    try_probe(server.address, http("/"), GENEROUS).await.unwrap();
    let head = heads.lock().unwrap().concat();
    assert!(head.contains(&format!("\r\nhost: [::1]:{port}\r\n")), "{head}");
    let closed = TcpSocket::new_v6().unwrap();
    closed.bind(any_port_ipv6()).unwrap();
    let words = failure(closed.local_addr().unwrap(), http("/"), GENEROUS).await;
    assert_eq!(words, "connect to ADDRESS: connection refused");
}

#[tokio::test]
async fn statuses_from_200_to_399_are_success() {
    for status in ["200 OK", "204 No Content", "299 So", "304 Not Modified", "399 "] {
        http_success(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n")).await;
    }
    http_success("HTTP/1.0 200 OK\r\n\r\nbody until the end of the connection").await;
    http_success("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
}

#[tokio::test]
async fn other_statuses_are_named() {
    for status in [101, 404, 400, 500, 503, 999] {
        let answer = format!("HTTP/1.1 {status} So\r\nContent-Length: 0\r\n\r\n");
        assert_eq!(
            http_failure(answer).await,
            format!("GET http://ADDRESS/healthz: status {status}")
        );
    }
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let elsewhere = answering("HTTP/1.1 503 So\r\n\r\n").await;
    let address = elsewhere.address;
    http_success(format!(
        "HTTP/1.1 302 Found\r\nLocation: http://{address}/\r\nContent-Length: 0\r\n\r\n"
    ))
    .await;
    assert_eq!(elsewhere.accepted(), 0);
}

#[tokio::test]
async fn the_request_carries_path_and_host() {
    let heads = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&heads);
    let server = Server::start(move |mut stream| {
        let seen = Arc::clone(&seen);
        async move {
            let head = read_head(&mut stream).await;
            seen.lock().unwrap().push(head);
            let _ = stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                .await;
        }
    })
    .await;
    for host in [None, Some("www.example.org".to_owned())] {
        let what = Probe::Http {
            port: None,
            path: "/a/b?c=d".into(),
            host,
        };
        try_probe(server.address, what, GENEROUS).await.unwrap();
    }
    let heads = heads.lock().unwrap();
    let [without, with] = &heads[..] else {
        panic!("{heads:?}")
    };
    assert!(without.starts_with("GET /a/b?c=d HTTP/1.1\r\n"), "{without}");
    assert!(
        without.contains(&format!("\r\nhost: {}\r\n", server.address)),
        "{without}"
    );
    assert!(with.contains("\r\nhost: www.example.org\r\n"), "{with}");
}

#[tokio::test]
async fn a_path_that_no_request_can_have_is_an_error_and_no_panic() {
    let server = Server::start(hang).await;
    let what = Probe::Http {
        port: None,
        path: "/with space".into(),
        host: Some("line\nfeed".into()),
    };
    let words = failure(server.address, what, GENEROUS).await;
    assert!(words.contains("the request cannot be built"), "{words}");
}

#[tokio::test]
async fn a_server_that_accepts_and_hangs_times_out() {
    let server = Server::start(hang).await;
    let words = failure(server.address, http("/healthz"), SHORT).await;
    assert_eq!(words, "GET http://ADDRESS/healthz: timed out after 300ms");
}

#[tokio::test]
async fn a_server_that_trickles_its_head_times_out() {
    let server = Server::start(async |mut stream: TcpStream| {
        read_head(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nX: ").await;
        while stream.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let words = failure(server.address, http("/healthz"), SHORT).await;
    assert_eq!(words, "GET http://ADDRESS/healthz: timed out after 300ms");
}

#[tokio::test]
async fn a_server_that_hangs_within_the_body_times_out() {
    let server = Server::start(async |mut stream: TcpStream| {
        read_head(&mut stream).await;
        let _ = stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
            .await;
        hang(stream).await;
    })
    .await;
    let words = failure(server.address, http("/healthz"), SHORT).await;
    assert_eq!(words, "GET http://ADDRESS/healthz: timed out after 300ms");
}

#[tokio::test]
async fn a_connection_closed_without_a_response_is_named() {
    for answer in ["", "HTTP/1.1 200 OK\r\nContent-"] {
        let words = http_failure(answer).await;
        assert_eq!(
            words, "GET http://ADDRESS/healthz: closed without a response",
            "{answer:?}"
        );
    }
}

#[tokio::test]
async fn a_reset_connection_is_named() {
    let server = Server::start(async |mut stream: TcpStream| {
        read_head(&mut stream).await;
        stream.set_zero_linger().unwrap();
    })
    .await;
    let words = failure(server.address, http("/healthz"), GENEROUS).await;
    assert_eq!(words, "GET http://ADDRESS/healthz: connection reset by peer");
}

#[tokio::test]
async fn half_a_body_is_named() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ] {
        let words = http_failure(answer).await;
        assert_eq!(
            words, "GET http://ADDRESS/healthz: closed within the body of the response",
            "{answer:?}"
        );
    }
}

#[tokio::test]
async fn garbage_is_a_malformed_response() {
    let long_head = format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    for answer in [
        "SSH-2.0-OpenSSH_9.2\r\n",
        "\0\u{1}\u{2}\u{3}",
        "HTTP/1.1 ok\r\n\r\n",
        "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnot a size\r\n",
        &long_head,
    ] {
        let words = http_failure(answer).await;
        let start = "GET http://ADDRESS/healthz: malformed response";
        assert!(words.starts_with(start), "{:?}: {words}", answer.get(..40));
    }
}

#[tokio::test]
async fn a_server_that_speaks_first_is_no_http_server() {
    let server = Server::start(async |mut stream: TcpStream| {
        let _ = stream.write_all(b"220 mail.example.org ESMTP\r\n").await;
        hang(stream).await;
    })
    .await;
    for _ in 0..20 {
        let words = failure(server.address, http("/healthz"), GENEROUS).await;
        assert!(
            words.starts_with("GET http://ADDRESS/healthz: malformed response"),
            "{words}"
        );
    }
}

#[tokio::test]
async fn an_endless_body_is_not_read_to_its_end() {
    let server = Server::start(async |mut stream: TcpStream| {
        read_head(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
        while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
    })
    .await;
    try_probe(server.address, http("/healthz"), GENEROUS)
        .await
        .unwrap();
}

#[tokio::test]
async fn endless_interim_answers_time_out() {
    let server = Server::start(async |mut stream: TcpStream| {
        read_head(&mut stream).await;
        while stream
            .write_all(b"HTTP/1.1 103 Early Hints\r\n\r\n")
            .await
            .is_ok()
        {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    let words = failure(server.address, http("/healthz"), SHORT).await;
    assert_eq!(words, "GET http://ADDRESS/healthz: timed out after 300ms");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn no_answer_however_built_panics_or_passes_without_a_good_status(
        start in prop_oneof![
            Just(""), Just("HTTP/1.1 "), Just("HTTP/1.1 200 OK\r\n"), Just("HTTP/1.1 200 OK\r\nContent-Length: "),
            Just("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"), Just("HTTP/1.1 503 So\r\n"),
        ],
        rest in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let answer = [start.as_bytes(), &rest].concat();
        let result = runtime.block_on(async {
            let server = answering(answer.clone()).await;
            try_probe(server.address, http("/"), GENEROUS).await
        });
        let good = answer.starts_with(b"HTTP/1.") && answer.get(9).is_some_and(|digit| b"23".contains(digit));
        prop_assert!(good || result.is_err(), "{:?}", String::from_utf8_lossy(&answer));
    }
}
