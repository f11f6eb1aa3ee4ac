//! Probe `udp`: a datagram is answered.

use std::{io, net::SocketAddr};

use tokio::net::UdpSocket;

use super::{Attempt, Failure, Limit, ProbeError, SocketOptions, socket};

/// Bytes of the longest datagram (RFC 768: a length of 16 bits).
const LONGEST_DATAGRAM: usize = 65_535;

/// Sends `payload`, or an empty datagram, to `address` and awaits an answer that contains `expected`.
///
/// With neither of the two nobody need answer: then it fails only if an ICMP error comes back within the limit.
pub(super) async fn probe(
    address: SocketAddr,
    payload: Option<&[u8]>,
    expected: Option<&[u8]>,
    options: SocketOptions,
    limit: Limit,
) -> Result<(), ProbeError> {
    let socket =
        socket::datagram(address, options).map_err(|source| ProbeError::Socket { address, source })?;
    match limit.on(exchange(&socket, address, payload, expected)).await {
        Err(Failure::TimedOut(_)) if payload.is_none() && expected.is_none() => Ok(()),
        result => result.map_err(|failure| Attempt::Exchange(address).failed(failure)),
    }
}

async fn exchange(
    connection: &UdpSocket,
    address: SocketAddr,
    payload: Option<&[u8]>,
    expected: Option<&[u8]>,
) -> Result<(), Failure> {
    // Connected, so that it receives from there alone, and ICMP errors.
    connection.connect(address).await.map_err(Failure::Io)?;
    // A closed port of the ephemeral range may be the socket's own: it would answer itself.
    if connection.local_addr().map_err(Failure::Io)? == address {
        return Err(Failure::Io(io::ErrorKind::ConnectionRefused.into()));
    }
    connection
        .send(payload.unwrap_or_default())
        .await
        .map_err(Failure::Io)?;
    let answer = socket::receive(connection, LONGEST_DATAGRAM)
        .await
        .map_err(Failure::Io)?;
    let is_expected = |expected: &[u8]| answer.windows(expected.len().max(1)).any(|part| part == expected);
    if expected.is_none_or(is_expected) {
        Ok(())
    } else {
        Err(Failure::OtherAnswer)
    }
}
