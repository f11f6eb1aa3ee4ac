//! Probe `https`: that of `http`, over TLS.

use std::net::SocketAddr;

use rustls::pki_types::ServerName;

use super::{Attempt, Limit, ProbeError, SocketOptions, http, tcp, tls};
use crate::config::Trust;

/// Gets a path from `address` over TLS, from a server whose certificate is trusted.
pub(super) async fn probe(
    address: SocketAddr,
    get: http::Get<'_>,
    server_name: Option<&ServerName<'static>>,
    trust: &Trust,
    options: SocketOptions,
    limit: Limit,
) -> Result<(), ProbeError> {
    let stream = tcp::connect(address, options, limit).await?;
    let stream = limit
        .on(tls::handshake(stream, address, server_name, trust))
        .await
        .map_err(|failure| Attempt::Handshake(address).failed(failure))?;
    limit
        .on(http::exchange(stream, address, get))
        .await
        .map_err(|failure| Attempt::get("https", address, get.path).failed(failure))
}
