//! Probe `tcp`: a connection is accepted.

use std::{io, net::SocketAddr};

use tokio::net::TcpStream;

use super::{Attempt, Failure, Limit, ProbeError, SocketOptions, socket};

/// Connects to `address` and closes again.
pub(super) async fn probe(
    address: SocketAddr,
    options: SocketOptions,
    limit: Limit,
) -> Result<(), ProbeError> {
    connect(address, options, limit).await.map(drop)
}

/// Connects to `address` within the limit.
pub(super) async fn connect(
    address: SocketAddr,
    options: SocketOptions,
    limit: Limit,
) -> Result<TcpStream, ProbeError> {
    let socket = socket::stream(address, options).map_err(|source| ProbeError::Socket { address, source })?;
    let connected = async {
        let stream = socket.connect(address).await.map_err(Failure::Io)?;
        // A closed port of this host's own ephemeral range may be met by the connecting socket itself: both ends
        // open at the same time (RFC 9293 section 3.5), and nobody listens.
        if stream.local_addr().map_err(Failure::Io)? == address {
            return Err(Failure::Io(io::ErrorKind::ConnectionRefused.into()));
        }
        Ok(stream)
    };
    limit
        .on(connected)
        .await
        .map_err(|failure| Attempt::Connect(address).failed(failure))
}
