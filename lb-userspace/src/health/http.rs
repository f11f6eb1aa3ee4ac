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
use tokio::net::TcpStream;

use super::{Failure, Limit, ProbeError, tcp};

/// Bytes of the body that are awaited: up to here the answer has to be whole, what follows is not read.
const BODY_BOUND: usize = 64 * 1024;
/// Bytes that the head of the answer may have.
const HEAD_BOUND: usize = 64 * 1024;

/// Gets `path` from `address`; `host` stands in the Host header, in its absence the address.
pub(super) async fn probe(
    address: SocketAddr,
    path: &str,
    host: Option<&str>,
    limit: Limit,
) -> Result<(), ProbeError> {
    let stream = tcp::connect(address, limit).await?;
    let answered = match request(address, path, host) {
        Ok(request) => limit.on(exchange(stream, request)).await,
        Err(error) => Err(Failure::Request(error)),
    };
    answered.map_err(|failure| ProbeError::Get {
        address,
        path: path.to_owned(),
        failure,
    })
}

fn request(
    address: SocketAddr,
    path: &str,
    host: Option<&str>,
) -> Result<Request<Empty<Bytes>>, hyper::http::Error> {
    // Not the address as it is written: the scope of a link-local one has no place in a Host header.
    let own = match address {
        SocketAddr::V4(address) => address.to_string(),
        SocketAddr::V6(address) => format!("[{}]:{}", address.ip(), address.port()),
    };
    Request::get(path)
        .header(HOST, host.unwrap_or(&own))
        .header(USER_AGENT, concat!("xlb/", env!("CARGO_PKG_VERSION")))
        .header(CONNECTION, "close")
        .body(Empty::new())
}

async fn exchange(stream: TcpStream, request: Request<Empty<Bytes>>) -> Result<(), Failure> {
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
