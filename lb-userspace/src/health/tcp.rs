//! Probe `tcp`: a connection is accepted.

use std::{io, net::SocketAddr};

use tokio::net::{TcpSocket, TcpStream};

use super::{Failure, Limit, ProbeError};

/// Connects to `address` and closes again.
pub(super) async fn probe(address: SocketAddr, limit: Limit) -> Result<(), ProbeError> {
    connect(address, limit).await.map(drop)
}

/// Connects to `address` within the limit.
pub(super) async fn connect(address: SocketAddr, limit: Limit) -> Result<TcpStream, ProbeError> {
    let socket = socket(address).map_err(|source| ProbeError::Socket { address, source })?;
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
        .map_err(|failure| ProbeError::Connect { address, failure })
}

/// The one place where the socket of a probe is made.
fn socket(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // Closing resets the connection: no probe leaves a TIME_WAIT behind, on either side.
    socket.set_zero_linger()?;
    Ok(socket)
}
