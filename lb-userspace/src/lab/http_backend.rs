//! A small HTTP server that answers with its name: the backends of the demo and of the tests.
//!
//! `GET /` answers with the name and a line feed, `GET /healthz` with `ok`, and `GET /bytes/N` with N bytes, at
//! `?rate=` bytes per second where that is given.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    extract::{Path, Query, State},
    http::header,
    response::IntoResponse,
    routing::get,
};
use bytes::Bytes;
use futures_util::stream;
use serde::Deserialize;
use tokio::{net::TcpListener, sync::oneshot};

use super::{LabError, Namespace, runtime};

/// A server on a thread in a namespace; dropping it cuts its connections and ends it.
#[derive(Debug)]
pub struct HttpBackend {
    address: SocketAddr,
    /// Dropped to stop.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<io::Result<io::Result<()>>>>,
}

impl HttpBackend {
    /// Starts to serve, and returns once connections are accepted.
    pub fn start(namespace: &Namespace, name: &str, listen: SocketAddr) -> Result<Self, LabError> {
        let (stop, stopped) = oneshot::channel();
        let listener = namespace
            .run(|| {
                let listener = std::net::TcpListener::bind(listen)?;
                listener.set_nonblocking(true)?;
                Ok((listener.local_addr()?, listener))
            })?
            .map_err(|source| namespace.failed(&format!("listening on {listen}"), source));
        let (address, listener) = listener?;
        let name = name.to_owned();
        let thread = namespace.spawn(move || {
            // The runtime goes with this block, and cuts what is still connected, as a killed process would.
            runtime()?.block_on(async {
                let listener = TcpListener::from_std(listener)?;
                tokio::select! {
                    ended = serve_on(listener, &name) => ended,
                    _ = stopped => Ok(()),
                }
            })
        })?;
        Ok(Self {
            address,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Where it listens; tells the port when it was started with port 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for HttpBackend {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            // What made it end early shows in the connections that it refused.
            let _ = thread.join();
        }
    }
}

/// Serves until it fails, in the namespace of this thread.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve(name: &str, listen: SocketAddr) -> io::Result<()> {
    serve_on(TcpListener::bind(listen).await?, name).await
}

async fn serve_on(listener: TcpListener, name: &str) -> io::Result<()> {
    let routes = Router::new()
        .route("/", get(async |State(name): State<Arc<str>>| format!("{name}\n")))
        .route("/healthz", get(async || "ok\n"))
        .route("/bytes/{count}", get(bytes))
        .with_state(Arc::from(name));
    axum::serve(listener, routes).await
}

#[derive(Deserialize)]
struct Pace {
    /// Bytes per second; absent means as fast as the client reads.
    rate: Option<u64>,
}

async fn bytes(Path(count): Path<u64>, Query(pace): Query<Pace>) -> impl IntoResponse {
    const CHUNK: u64 = 64 * 1024;
    // A paced stream goes out twenty times a second.
    let step = pace.rate.map_or(CHUNK, |rate| (rate / 20).clamp(1, CHUNK));
    let start = Instant::now();
    let chunks = stream::unfold(0, move |sent| async move {
        if sent == count {
            return None;
        }
        if let Some(rate) = pace.rate.filter(|rate| *rate > 0) {
            let due = Duration::from_secs_f64(sent as f64 / rate as f64);
            tokio::time::sleep_until((start + due).into()).await;
        }
        let length = step.min(count - sent);
        let chunk = Bytes::from(vec![b'x'; length as usize]);
        Some((Ok::<_, io::Error>(chunk), sent + length))
    });
    ([(header::CONTENT_LENGTH, count)], Body::from_stream(chunks))
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::lab::http_client;

    fn ask(namespace: &Namespace, address: SocketAddr, path: &str) -> io::Result<http_client::Response> {
        let loopback = IpAddr::from([127, 0, 0, 1]);
        namespace
            .run(|| http_client::get(address, path, Some(loopback), Duration::from_secs(10)))
            .unwrap()
    }

    #[test]
    fn a_backend_answers_with_its_name_its_health_and_bytes() {
        let namespace = Namespace::new("backend").unwrap();
        let backend = HttpBackend::start(&namespace, "a", ([127, 0, 0, 1], 0).into()).unwrap();
        let ask = |path| ask(&namespace, backend.address(), path).unwrap();
        assert_eq!(ask("/").text(), "a\n");
        assert_eq!(ask("/healthz").text(), "ok\n");
        assert_eq!(ask("/bytes/200000").body.len(), 200_000);
        assert_eq!(ask("/bytes/0").body.len(), 0);
        assert_eq!(ask("/nothing").status, 404);
    }

    #[test]
    fn a_paced_download_takes_its_time() {
        let namespace = Namespace::new("backend").unwrap();
        let backend = HttpBackend::start(&namespace, "a", ([127, 0, 0, 1], 0).into()).unwrap();
        let start = Instant::now();
        let response = ask(&namespace, backend.address(), "/bytes/10000?rate=20000").unwrap();
        assert_eq!(response.body.len(), 10_000);
        assert!(
            start.elapsed() >= Duration::from_millis(400),
            "{:?}",
            start.elapsed()
        );
    }

    #[test]
    fn a_dropped_backend_cuts_its_connections_and_refuses_new_ones() {
        let namespace = Namespace::new("backend").unwrap();
        let backend = HttpBackend::start(&namespace, "a", ([127, 0, 0, 1], 0).into()).unwrap();
        let address = backend.address();
        let download = namespace
            .spawn(move || {
                http_client::get(address, "/bytes/1000000?rate=1000", None, Duration::from_secs(60))
            })
            .unwrap();
        std::thread::sleep(Duration::from_millis(200));
        drop(backend);
        assert!(download.join().unwrap().unwrap().is_err());
        let refused = ask(&namespace, address, "/").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }
}
