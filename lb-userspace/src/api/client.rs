//! The commands' side of the control API.

use std::{
    io,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::{Method, StatusCode, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::{Change, Done, Refused};
use crate::observe::status::Status;

/// Why the daemon did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "no daemon answers on {}: start it with `xlb run`, or name its instance with `--instance` or its socket \
         with `--socket`",
        path.display()
    )]
    Unreachable { path: PathBuf },
    #[error("no permission to use the daemon's socket {}: run as root or as a member of its group", path.display())]
    Permission { path: PathBuf },
    #[error("the daemon on {} did not answer: {reason}", path.display())]
    Broken { path: PathBuf, reason: String },
    #[error("{}", .0.message)]
    Refused(Refused),
}

/// Asks for the state of the daemon.
///
/// # Errors
/// The daemon is not reachable or does not answer.
pub async fn status(socket: &Path) -> Result<Status, ClientError> {
    call(socket, Method::GET, "/v1/status").await
}

/// Makes the daemon read its configuration anew.
///
/// # Errors
/// As above; or the configuration is bad or cannot be applied: the running one stays.
pub async fn reload(socket: &Path) -> Result<Done, ClientError> {
    call(socket, Method::POST, "/v1/reload").await
}

/// Changes the administrative state of a backend.
///
/// # Errors
/// As above; or there is no such backend.
pub async fn administer(
    socket: &Path,
    service: &str,
    backend: &str,
    change: Change,
) -> Result<Done, ClientError> {
    let path = format!(
        "/v1/services/{}/backends/{}/{}",
        encoded(service),
        encoded(backend),
        change.name()
    );
    call(socket, Method::POST, &path).await
}

async fn call<T: DeserializeOwned>(socket: &Path, method: Method, path: &str) -> Result<T, ClientError> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => ClientError::Permission {
                path: socket.to_owned(),
            },
            _ => ClientError::Unreachable {
                path: socket.to_owned(),
            },
        })?;
    let broken = |reason: String| ClientError::Broken {
        path: socket.to_owned(),
        reason,
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| broken(error.to_string()))?;
    let connection = tokio::spawn(connection);
    let request = hyper::Request::builder()
        .method(method)
        .uri(path)
        .header("host", "xlb")
        .body(Empty::<Bytes>::new())
        .map_err(|error| broken(error.to_string()))?;
    let response = sender
        .send_request(request)
        .await
        .map_err(|error| broken(error.to_string()))?;
    let status = response.status();
    let body = response
        .into_body()
        .collect()
        .await
        .map_err(|error| broken(error.to_string()))?
        .to_bytes();
    connection.abort();
    if status == StatusCode::OK {
        return serde_json::from_slice(&body).map_err(|error| broken(error.to_string()));
    }
    match serde_json::from_slice(&body) {
        Ok(refused) => Err(ClientError::Refused(refused)),
        Err(_) => Err(broken(format!("status {status}"))),
    }
}

/// A name as one segment of a path (RFC 3986 section 2.1).
fn encoded(name: &str) -> String {
    name.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}
