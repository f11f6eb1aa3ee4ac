use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use h2::{Reason, server::SendResponse};
use hyper::{HeaderMap, Request, Response};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    GENEROUS, SHORT, Server, answering, any_port, any_port_ipv6, failure, hang, time_waits, try_probe,
    wait_until,
};
use crate::config::Probe;

const SERVING: &[u8] = &[0, 0, 0, 0, 2, 8, 1];

fn grpc(service: &str) -> Probe {
    Probe::Grpc {
        port: None,
        host: None,
        service: service.into(),
    }
}

/// How a server answers a request.
type Answer = fn(SendResponse<Bytes>);

/// What a server has been asked: the head and the message.
type Asked = Arc<Mutex<Vec<(Request<()>, Vec<u8>)>>>;

/// An HTTP/2 server that has each request answered by `answer`.
async fn server_at(address: SocketAddr, asked: Asked, answer: Answer) -> Server {
    Server::start_at(address, move |stream| {
        let asked = Arc::clone(&asked);
        async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, respond))) = connection.accept().await {
                let asked = Arc::clone(&asked);
                tokio::spawn(async move {
                    let (head, mut body) = request.into_parts();
                    let mut message = Vec::new();
                    while let Some(Ok(chunk)) = body.data().await {
                        message.extend(chunk);
                    }
                    asked
                        .lock()
                        .unwrap()
                        .push((Request::from_parts(head, ()), message));
                    answer(respond);
                });
            }
        }
    })
    .await
}

async fn server(answer: Answer) -> Server {
    server_at(any_port(), Asked::default(), answer).await
}

async fn grpc_failure(answer: Answer) -> String {
    let server = server(answer).await;
    failure(server.address, grpc(""), GENEROUS).await
}

fn head(status: u16) -> Response<()> {
    Response::builder()
        .status(status)
        .header("content-type", "application/grpc+proto")
        .body(())
        .unwrap()
}

fn trailers(status: &'static str, message: &'static str) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", status.parse().unwrap());
    if !message.is_empty() {
        trailers.insert("grpc-message", message.parse().unwrap());
    }
    trailers
}

fn respond(mut response: SendResponse<Bytes>, message: &'static [u8], status: &'static str) {
    let mut body = response.send_response(head(200), false).unwrap();
    body.send_data(Bytes::from_static(message), false).unwrap();
    body.send_trailers(trailers(status, "")).unwrap();
}

#[tokio::test]
async fn a_server_that_is_serving_is_up() {
    for address in [any_port(), any_port_ipv6()] {
        let asked = Asked::default();
        let server = server_at(address, Arc::clone(&asked), |response| {
            respond(response, SERVING, "0");
        })
        .await;
        try_probe(server.address, grpc(""), GENEROUS).await.unwrap();
        try_probe(server.address, grpc("orders.v1.Orders"), GENEROUS)
            .await
            .unwrap();
        let with_host = Probe::Grpc {
            port: None,
            host: Some("orders.example:443".into()),
            service: String::new(),
        };
        try_probe(server.address, with_host, GENEROUS).await.unwrap();

        let asked = asked.lock().unwrap();
        let authorities = [
            server.address.to_string(),
            server.address.to_string(),
            "orders.example:443".to_owned(),
        ];
        let messages: [&[u8]; 3] = [
            &[0, 0, 0, 0, 0],
            b"\0\0\0\0\x12\x0a\x10orders.v1.Orders",
            &[0, 0, 0, 0, 0],
        ];
        for ((request, message), (authority, expected)) in asked.iter().zip(authorities.iter().zip(messages))
        {
            assert_eq!(request.method(), "POST");
            assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
            assert_eq!(request.uri().authority().unwrap().as_str(), authority);
            assert_eq!(request.headers()["content-type"], "application/grpc");
            assert_eq!(request.headers()["te"], "trailers");
            assert_eq!(message, expected);
        }
        assert_eq!(asked.len(), 3);
    }
}

#[tokio::test]
async fn a_server_that_is_not_serving_is_named() {
    let cases: [(Answer, &str); 4] = [
        (|response| respond(response, &[0, 0, 0, 0, 0], "0"), "UNKNOWN"),
        (
            |response| respond(response, &[0, 0, 0, 0, 2, 8, 2], "0"),
            "NOT_SERVING",
        ),
        (
            |response| respond(response, &[0, 0, 0, 0, 2, 8, 3], "0"),
            "SERVICE_UNKNOWN",
        ),
        (
            |response| respond(response, &[0, 0, 0, 0, 2, 8, 9], "0"),
            "the serving status 9",
        ),
    ];
    for (answer, words) in cases {
        assert_eq!(
            grpc_failure(answer).await,
            format!("gRPC health check of ADDRESS: {words}")
        );
    }
    let server = server(|response| respond(response, &[0, 0, 0, 0, 2, 8, 2], "0")).await;
    assert_eq!(
        failure(server.address, grpc("orders"), GENEROUS).await,
        "gRPC health check of ADDRESS for orders: NOT_SERVING"
    );
}

#[tokio::test]
async fn a_call_that_fails_is_named_with_its_code_and_message() {
    let cases: [(Answer, &str); 4] = [
        // As servers without the health service answer: headers alone.
        (
            |mut response| {
                let mut head = head(200);
                head.headers_mut().extend(trailers("12", "unknown service"));
                response.send_response(head, true).unwrap();
            },
            "grpc-status UNIMPLEMENTED: unknown service",
        ),
        (
            |mut response| {
                let mut body = response.send_response(head(200), false).unwrap();
                body.send_trailers(trailers("5", "")).unwrap();
            },
            "grpc-status NOT_FOUND",
        ),
        // What came before counts for nothing.
        (
            |response| respond(response, SERVING, "14"),
            "grpc-status UNAVAILABLE",
        ),
        (|response| respond(response, SERVING, "99"), "grpc-status 99"),
    ];
    for (answer, words) in cases {
        assert_eq!(
            grpc_failure(answer).await,
            format!("gRPC health check of ADDRESS: {words}")
        );
    }
}

#[tokio::test]
async fn answers_that_are_no_grpc_are_named() {
    let cases: [(Answer, &str); 9] = [
        (
            |mut response| {
                response.send_response(head(404), true).unwrap();
            },
            "status 404",
        ),
        (
            |mut response| {
                response.send_response(Response::new(()), true).unwrap();
            },
            "malformed response (no gRPC: another content-type)",
        ),
        (
            |mut response| {
                let mut body = response.send_response(head(200), false).unwrap();
                body.send_data(Bytes::from_static(SERVING), true).unwrap();
            },
            "malformed response (no grpc-status)",
        ),
        (
            |mut response| {
                let mut head = head(200);
                head.headers_mut().extend(trailers("0", ""));
                response.send_response(head, true).unwrap();
            },
            "malformed response (no message)",
        ),
        (
            |response| respond(response, SERVING, "good"),
            "malformed response (a grpc-status that is no number)",
        ),
        (
            |response| respond(response, b"", "0"),
            "malformed response (no message of type HealthCheckResponse)",
        ),
        (
            |response| respond(response, b"not a message", "0"),
            "malformed response (no message of type HealthCheckResponse)",
        ),
        (
            |response| respond(response, &[0; 10_000], "0"),
            "malformed response (a message that is too long)",
        ),
        (
            |mut response| response.send_reset(Reason::INTERNAL_ERROR),
            "stream reset with INTERNAL_ERROR",
        ),
    ];
    for (answer, words) in cases {
        assert_eq!(
            grpc_failure(answer).await,
            format!("gRPC health check of ADDRESS: {words}")
        );
    }
}

#[tokio::test]
async fn servers_that_do_not_speak_http2_are_named() {
    // The preface of HTTP/2 is a head for HTTP/1, which the server answers.
    let other = answering("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").await;
    let words = failure(other.address, grpc(""), GENEROUS).await;
    assert!(
        words.starts_with("gRPC health check of ADDRESS: malformed response ("),
        "{words}"
    );
    let closing = answering("").await;
    let words = failure(closing.address, grpc(""), GENEROUS).await;
    // The rest of what was sent may meet a closed socket.
    assert!(
        [
            "gRPC health check of ADDRESS: closed without a response",
            "gRPC health check of ADDRESS: connection reset by peer",
            "gRPC health check of ADDRESS: broken pipe",
        ]
        .contains(&words.as_str()),
        "{words}"
    );
}

/// Reads the preface and the frames that come with it, answers with `frames` and keeps the connection.
async fn answering_with_frames(frames: &'static [u8]) -> Server {
    Server::start(async move |mut stream: TcpStream| {
        // Up to the message: a DATA frame of 5 bytes that ends stream 1.
        let mut read = Vec::new();
        while !read.ends_with(&[0, 0, 5, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0]) {
            match stream.read_u8().await {
                Ok(byte) => read.push(byte),
                Err(_) => return,
            }
        }
        let _ = stream.write_all(frames).await;
        hang(stream).await;
    })
    .await
}

const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];

#[tokio::test]
async fn a_server_that_goes_away_is_named() {
    // GOAWAY with the last stream 0, so that ours is not answered, and the reasons NO_ERROR and ENHANCE_YOUR_CALM.
    let polite = [
        &SETTINGS[..],
        &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    .concat();
    let angry = [
        &SETTINGS[..],
        &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 11],
    ]
    .concat();
    for (frames, reason) in [(polite, "NO_ERROR"), (angry, "ENHANCE_YOUR_CALM")] {
        let server = answering_with_frames(frames.leak()).await;
        let words = failure(server.address, grpc(""), GENEROUS).await;
        assert_eq!(
            words,
            format!("gRPC health check of ADDRESS: closed with GOAWAY {reason}")
        );
    }
}

#[tokio::test]
async fn a_server_that_goes_away_after_its_answer_is_up() {
    let server = Server::start(async |stream: TcpStream| {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        if let Some(Ok((_, response))) = connection.accept().await {
            connection.graceful_shutdown();
            respond(response, SERVING, "0");
        }
        while let Some(Ok(_)) = connection.accept().await {}
    })
    .await;
    for _ in 0..5 {
        try_probe(server.address, grpc(""), GENEROUS).await.unwrap();
    }
}

#[tokio::test]
async fn servers_that_hang_time_out_and_are_left_alone() {
    let hanging = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&hanging);
    let silent = Server::start(move |stream| {
        let count = Arc::clone(&count);
        async move {
            count.fetch_add(1, Ordering::SeqCst);
            hang(stream).await;
            count.fetch_sub(1, Ordering::SeqCst);
        }
    })
    .await;
    let half = server(|mut response| {
        let mut body = response.send_response(head(200), false).unwrap();
        body.send_data(Bytes::from_static(&SERVING[..4]), false).unwrap();
        tokio::spawn(async move {
            tokio::time::sleep(GENEROUS).await;
            drop(body);
        });
    })
    .await;
    let settled = answering_with_frames(&SETTINGS).await;
    for server in [&silent, &half, &settled] {
        let words = failure(server.address, grpc(""), SHORT).await;
        assert_eq!(words, "gRPC health check of ADDRESS: timed out after 300ms");
    }
    // No task of the probe keeps the connection.
    wait_until(|| hanging.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test]
async fn a_connection_that_breaks_within_the_answer_is_named() {
    let server = Server::start(async |stream: TcpStream| {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        if let Some(Ok((_, mut response))) = connection.accept().await {
            let mut body = response.send_response(head(200), false).unwrap();
            body.send_data(Bytes::from_static(&SERVING[..4]), false).unwrap();
            // The connection is driven no further than it takes to send that.
            let _ = tokio::time::timeout(SHORT, connection.accept()).await;
        }
    })
    .await;
    let words = failure(server.address, grpc(""), GENEROUS).await;
    assert!(
        words.starts_with("gRPC health check of ADDRESS: c"),
        "neither closed nor reset: {words}"
    );
}

#[tokio::test]
async fn grpc_probes_leave_no_time_wait() {
    let server = server(|response| respond(response, SERVING, "0")).await;
    for _ in 0..10 {
        try_probe(server.address, grpc(""), GENEROUS).await.unwrap();
    }
    assert_eq!(time_waits(server.address.port()), 0);
}

#[tokio::test]
async fn a_host_that_no_request_can_have_is_an_error_and_no_panic() {
    let server = Server::start(hang).await;
    let what = Probe::Grpc {
        port: None,
        host: Some("line\nfeed".into()),
        service: String::new(),
    };
    let words = failure(server.address, what, GENEROUS).await;
    assert!(words.contains("the request cannot be built"), "{words}");
}
