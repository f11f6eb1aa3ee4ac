//! Probe `grpc`: `grpc.health.v1.Health/Check` answers `SERVING`.
//!
//! Its two messages have one field each, so they are written and read here; what they are in full is in
//! <https://github.com/grpc/grpc/blob/master/doc/health-checking.md>.

use std::{fmt, net::SocketAddr, pin::pin};

use bytes::Bytes;
use h2::{
    RecvStream,
    client::{Builder, SendRequest},
};
use hyper::{
    HeaderMap, Request,
    header::{CONTENT_TYPE, TE, USER_AGENT},
};
use tokio::net::TcpStream;

use super::{Attempt, Failure, Limit, ProbeError, SocketOptions, http, shortened, tcp};

/// Bytes of the answer's message with its prefix; what is awaited has 7.
const ANSWER_BOUND: usize = 4096;
/// Bytes of the answer's headers.
const HEAD_BOUND: u32 = 64 * 1024;

/// Asks the server at `address` for the health of `service`; `host` is the authority, in its absence the address.
pub(super) async fn probe(
    address: SocketAddr,
    service: &str,
    host: Option<&str>,
    options: SocketOptions,
    limit: Limit,
) -> Result<(), ProbeError> {
    let stream = tcp::connect(address, options, limit).await?;
    limit
        .on(exchange(stream, address, service, host))
        .await
        .map_err(|failure| {
            let service = service.to_owned();
            Attempt::HealthCheck { address, service }.failed(failure)
        })
}

async fn exchange(
    stream: TcpStream,
    address: SocketAddr,
    service: &str,
    host: Option<&str>,
) -> Result<(), Failure> {
    let own = http::authority(address);
    let request = Request::post(format!(
        "http://{}/grpc.health.v1.Health/Check",
        host.unwrap_or(&own)
    ))
    .header(CONTENT_TYPE, "application/grpc")
    .header(TE, "trailers")
    .header(USER_AGENT, http::AGENT)
    .body(())
    .map_err(Failure::Request)?;
    // h2 itself and not hyper around it, which would run the connection in a task of its own: that task outlives a
    // probe that timed out.
    let (sender, connection) = Builder::new()
        .enable_push(false)
        .max_header_list_size(HEAD_BOUND)
        .handshake(stream)
        .await?;
    let mut answer = pin!(answer(sender, request, message(service)));
    tokio::select! {
        result = &mut answer => result,
        // The connection hands what it has got, or its error, over to the answer.
        _ = connection => answer.await,
    }
}

async fn answer(sender: SendRequest<Bytes>, request: Request<()>, message: Bytes) -> Result<(), Failure> {
    let mut sender = sender.ready().await?;
    let (response, mut body) = sender.send_request(request, false)?;
    body.send_data(message, true)?;
    let (head, body) = response.await?.into_parts();
    if head.status != 200 {
        return Err(Failure::Status(head.status.as_u16()));
    }
    let is_grpc = |kind: &hyper::header::HeaderValue| kind.as_bytes().starts_with(b"application/grpc");
    if !head.headers.get(CONTENT_TYPE).is_some_and(is_grpc) {
        return Err(malformed("no gRPC: another content-type"));
    }
    // An answer that is an error may have no body, and its status among the headers.
    if let Some(status) = grpc_status(&head.headers) {
        status?;
        return Err(malformed("no message"));
    }
    let (message, trailers) = read(body).await?;
    grpc_status(&trailers).unwrap_or_else(|| Err(malformed("no grpc-status")))?;
    match ServingStatus::in_answer(&message) {
        Some(ServingStatus::SERVING) => Ok(()),
        Some(other) => Err(Failure::NotServing(other)),
        None => Err(malformed("no message of type HealthCheckResponse")),
    }
}

/// The body up to the bound, and the trailers.
async fn read(mut body: RecvStream) -> Result<(Vec<u8>, HeaderMap), Failure> {
    let mut bytes = Vec::new();
    while let Some(chunk) = body.data().await {
        bytes.extend(chunk?);
        if bytes.len() > ANSWER_BOUND {
            return Err(malformed("a message that is too long"));
        }
    }
    let trailers = body.trailers().await?;
    Ok((bytes, trailers.unwrap_or_default()))
}

/// What `grpc-status` says, where there is one.
fn grpc_status(headers: &HeaderMap) -> Option<Result<(), Failure>> {
    let text = |name| {
        headers
            .get(name)
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let status = text("grpc-status")?;
    Some(match status.parse::<u16>() {
        Ok(0) => Ok(()),
        Ok(code) => Err(Failure::GrpcStatus {
            code: GrpcCode(code),
            message: shortened(&text("grpc-message").unwrap_or_default()),
        }),
        Err(_) => Err(malformed("a grpc-status that is no number")),
    })
}

/// A `HealthCheckRequest` behind the prefix of gRPC: not compressed, and the length as four bytes.
fn message(service: &str) -> Bytes {
    let mut request = Vec::new();
    if !service.is_empty() {
        // Field 1, a string: its length, seven bits in a byte, and its bytes.
        request.push(0x0a);
        let mut length = service.len();
        while length > 0x7f {
            request.push(length as u8 | 0x80);
            length >>= 7;
        }
        request.push(length as u8);
        request.extend(service.as_bytes());
    }
    let mut message = vec![0];
    message.extend((request.len() as u32).to_be_bytes());
    message.extend(request);
    message.into()
}

/// A number of `HealthCheckResponse.ServingStatus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServingStatus(u64);

impl ServingStatus {
    const SERVING: Self = Self(1);

    /// The status in the answer's message, which has the prefix of gRPC before it.
    fn in_answer(answer: &[u8]) -> Option<Self> {
        let (&[compressed, length @ ..], mut message) = answer.split_first_chunk::<5>()?;
        if compressed != 0 || u32::from_be_bytes(length) as usize != message.len() {
            return None;
        }
        // A field that is not there has the value zero.
        let mut status = Self(0);
        while !message.is_empty() {
            // The number of the field, and in the lowest three bits what its value looks like.
            let tag = varint(&mut message)?;
            let value = match tag & 7 {
                0 => varint(&mut message)?,
                kind => {
                    let length = match kind {
                        1 => 8,
                        2 => usize::try_from(varint(&mut message)?).ok()?,
                        5 => 4,
                        _ => return None,
                    };
                    message = message.get(length..)?;
                    continue;
                }
            };
            if tag >> 3 == 1 {
                status = Self(value);
            }
        }
        Some(status)
    }
}

/// Takes a number off the front: seven bits in a byte, the lowest first, at most ten bytes.
fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for index in 0..10 {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << (7 * index);
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

impl fmt::Display for ServingStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("UNKNOWN"),
            1 => f.write_str("SERVING"),
            2 => f.write_str("NOT_SERVING"),
            3 => f.write_str("SERVICE_UNKNOWN"),
            other => write!(f, "the serving status {other}"),
        }
    }
}

/// A number of gRPC's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrpcCode(u16);

impl fmt::Display for GrpcCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 17] = [
            "OK",
            "CANCELLED",
            "UNKNOWN",
            "INVALID_ARGUMENT",
            "DEADLINE_EXCEEDED",
            "NOT_FOUND",
            "ALREADY_EXISTS",
            "PERMISSION_DENIED",
            "RESOURCE_EXHAUSTED",
            "FAILED_PRECONDITION",
            "ABORTED",
            "OUT_OF_RANGE",
            "UNIMPLEMENTED",
            "INTERNAL",
            "UNAVAILABLE",
            "DATA_LOSS",
            "UNAUTHENTICATED",
        ];
        match NAMES.get(usize::from(self.0)) {
            Some(name) => f.write_str(name),
            None => self.0.fmt(f),
        }
    }
}

fn malformed(what: &str) -> Failure {
    Failure::Malformed(what.to_owned())
}

impl From<h2::Error> for Failure {
    fn from(error: h2::Error) -> Self {
        // By its name; in words it may read like "not a result of an error".
        let reason = error
            .reason()
            .map(|reason| format!("{reason:?}"))
            .unwrap_or_default();
        if error.is_go_away() && error.is_remote() {
            return Self::GoAway(reason);
        }
        if error.is_reset() && error.is_remote() {
            return Self::StreamReset(reason);
        }
        let words = shortened(&error.to_string());
        match error.into_io() {
            Some(error) if error.raw_os_error().is_some() => Self::Io(error),
            Some(_) => Self::NoResponse,
            None => Self::Malformed(words),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn answer(message: &[u8]) -> Vec<u8> {
        let length = (message.len() as u32).to_be_bytes();
        [&[0], &length[..], message].concat()
    }

    #[test]
    fn a_request_is_as_protoc_would_write_it() {
        assert_eq!(message("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(message("db")[..], [0, 0, 0, 0, 4, 0x0a, 2, b'd', b'b']);
        let long = "x".repeat(200);
        assert_eq!(message(&long)[..8], [0, 0, 0, 0, 203, 0x0a, 0xc8, 1]);
    }

    #[test]
    fn the_status_is_found_among_fields_that_are_not_known() {
        let serving: [&[u8]; 5] = [
            &[8, 1],
            // The last one counts.
            &[8, 2, 8, 1],
            // Field 2 as a string, field 3 as 64 bits, field 4 as 32 bits, field 5 as a number.
            &[0x12, 3, b'a', b'b', b'c', 8, 1],
            &[0x19, 0, 0, 0, 0, 0, 0, 0, 0, 0x25, 0, 0, 0, 0, 8, 1],
            &[8, 1, 0x28, 0xff, 0xff, 3],
        ];
        for message in serving {
            assert_eq!(
                ServingStatus::in_answer(&answer(message)),
                Some(ServingStatus::SERVING),
                "{message:?}"
            );
        }
        assert_eq!(ServingStatus::in_answer(&answer(&[])), Some(ServingStatus(0)));
        assert_eq!(ServingStatus::in_answer(&answer(&[8, 2])), Some(ServingStatus(2)));
        // As a string, field 1 is not the status.
        assert_eq!(
            ServingStatus::in_answer(&answer(&[0x0a, 0])),
            Some(ServingStatus(0))
        );
    }

    #[test]
    fn damaged_answers_have_no_status() {
        let good = answer(&[8, 1]);
        for length in 0..good.len() {
            assert_eq!(ServingStatus::in_answer(&good[..length]), None, "{length}");
        }
        for damaged in [
            // Compressed; two messages; a length that leads beyond; a group; a number without an end.
            vec![1, 0, 0, 0, 2, 8, 1],
            [answer(&[8, 1]), answer(&[8, 1])].concat(),
            answer(&[0x12, 9, 8, 1]),
            answer(&[0x0b, 8, 1]),
            answer(&[8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]),
        ] {
            assert_eq!(ServingStatus::in_answer(&damaged), None, "{damaged:?}");
        }
    }

    proptest! {
        #[test]
        fn no_message_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            ServingStatus::in_answer(&bytes);
            ServingStatus::in_answer(&answer(&bytes));
        }
    }
}
