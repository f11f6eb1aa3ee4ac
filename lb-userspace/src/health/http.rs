//! Probe `http`: a GET is answered with a status from 200 to 399; redirects are not followed.

use std::{error::Error, future::poll_fn, io, net::SocketAddr, pin::pin};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::{
    Request,
    body::Incoming,
    client::conn::http1,
    header::{CONNECTION, HOST, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Attempt, Failure, Limit, ProbeError, SocketOptions, tcp, tls};

/// Bytes of the body that are awaited: up to here the answer has to be whole, what follows is not read.
const BODY_BOUND: usize = 64 * 1024;
/// Bytes that the head of the answer may have.
const HEAD_BOUND: usize = 64 * 1024;

/// What the probes call themselves in a request.
pub(super) const AGENT: &str = concat!("xlb/", env!("CARGO_PKG_VERSION"));

/// What is asked for.
#[derive(Clone, Copy)]
pub(super) struct Get<'a> {
    pub(super) path: &'a str,
    /// What stands in the Host header; in its absence the address.
    pub(super) host: Option<&'a str>,
}

/// Gets a path from `address`.
pub(super) async fn probe(
    address: SocketAddr,
    get: Get<'_>,
    options: SocketOptions,
    limit: Limit,
) -> Result<(), ProbeError> {
    let stream = tcp::connect(address, options, limit).await?;
    limit
        .on(exchange(stream, address, get))
        .await
        .map_err(|failure| Attempt::get("http", address, get.path).failed(failure))
}

/// The authority of a request to `address`, which is not always how an address is written: the scope of a link-local
/// one has no place in it.
pub(super) fn authority(address: SocketAddr) -> String {
    match address {
        SocketAddr::V4(address) => address.to_string(),
        SocketAddr::V6(address) => format!("[{}]:{}", address.ip(), address.port()),
    }
}

/// Sends the request over `stream` and awaits an answer that means success.
pub(super) async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    address: SocketAddr,
    get: Get<'_>,
) -> Result<(), Failure> {
    let request = Request::get(get.path)
        .header(HOST, get.host.unwrap_or(&authority(address)))
        .header(USER_AGENT, AGENT)
        .header(CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(Failure::Request)?;
    let (mut sender, mut connection) = http1::Builder::new()
        .max_buf_size(HEAD_BOUND)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| failure(&error, Failure::NoResponse))?;
    let answer = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| failure(&error, Failure::NoResponse))?;
        match response.status().as_u16() {
            200..=399 => drain(response.into_body()).await,
            status => Err(Failure::Status(status)),
        }
    };
    let mut answer = pin!(answer);
    // Without hyper's orderly shutdown: the socket is reset, or the server would be left with a TIME_WAIT.
    let connection = poll_fn(|context| connection.poll_without_shutdown(context));
    tokio::select! {
        result = &mut answer => result,
        // The connection hands what it has got, or its error, over to the answer.
        _ = connection => answer.await,
    }
}

/// Reads the body to its end or to the bound.
async fn drain(mut body: Incoming) -> Result<(), Failure> {
    let mut read = 0;
    while read < BODY_BOUND {
        match body.frame().await {
            None => break,
            Some(Ok(frame)) => read += frame.data_ref().map_or(0, Bytes::len),
            Some(Err(error)) => return Err(failure(&error, Failure::HalfResponse)),
        }
    }
    Ok(())
}

/// Sorts an error of hyper's; `closed` says what the end of the connection means.
fn failure(error: &hyper::Error, closed: Failure) -> Failure {
    let cause = error.source();
    // A request that had not been sent is cancelled, with the connection's own error inside.
    if let Some(inner) = cause.and_then(|cause| cause.downcast_ref::<hyper::Error>()) {
        return failure(inner, closed);
    }
    let system = cause.and_then(|cause| cause.downcast_ref::<io::Error>());
    if let Some(number) = system.and_then(io::Error::raw_os_error) {
        return Failure::Io(io::Error::from_raw_os_error(number));
    }
    if let Some(Failure::Tls(error)) = system.and_then(tls::failure) {
        return Failure::Tls(error);
    }
    let ended = error.is_incomplete_message()
        || error.is_canceled()
        || error.is_closed()
        || system.is_some_and(|error| error.kind() == io::ErrorKind::UnexpectedEof);
    if ended {
        closed
    } else {
        Failure::Malformed(error.to_string())
    }
}
