//! The daemon's side of the control API.

use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::UnixStream as StdUnixStream,
    },
    path::{Path, PathBuf},
};

use axum::{
    Json, Router,
    extract::{self, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot},
};

use super::{Change, Done, Refusal, Refused, Request};

/// Requests on their way to the controller.
type Requests = mpsc::Sender<Request>;

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
#[error("making the control socket {} failed", path.display())]
pub struct SocketError {
    path: PathBuf,
    source: io::Error,
}

/// Makes the control socket, for its owner and group alone; one that a dead daemon has left is replaced.
///
/// # Errors
/// Its folder or itself cannot be made.
pub fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    let make = || {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        remove_left_over(path)?;
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
        Ok(listener)
    };
    make().map_err(|source| SocketError {
        path: path.to_owned(),
        source,
    })
}

/// Removes the socket of a dead daemon, nothing else: not a file that the path names by mistake, nor the socket of
/// another instance.
fn remove_left_over(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "there is something else at this path: remove it, or name another path",
        )),
        Ok(_) => match StdUnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another program answers there: stop it, or name another path",
            )),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Serves the API until the listener fails.
///
/// # Errors
/// The listener fails.
pub async fn serve(listener: UnixListener, requests: Requests) -> io::Result<()> {
    axum::serve(listener, router(requests)).await
}

fn router(requests: Requests) -> Router {
    let mut router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/reload", post(reload));
    for change in [Change::Enable, Change::Drain, Change::Disable] {
        let path = format!("/v1/services/{{service}}/backends/{{backend}}/{}", change.name());
        let handler = move |State(requests): State<Requests>,
                            extract::Path(name): extract::Path<(String, String)>| {
            administer(requests, name, change)
        };
        router = router.route(&path, post(handler));
    }
    router.with_state(requests)
}

async fn status(State(requests): State<Requests>) -> Response {
    let (answer, status) = oneshot::channel();
    match ask(&requests, Request::Status(answer), status).await {
        Some(status) => Json(status).into_response(),
        None => stopping(),
    }
}

async fn reload(State(requests): State<Requests>) -> Response {
    let (answer, result) = oneshot::channel();
    respond(ask(&requests, Request::Reload(answer), result).await)
}

async fn administer(requests: Requests, (service, backend): (String, String), change: Change) -> Response {
    let (answer, result) = oneshot::channel();
    let request = Request::Administer {
        service,
        backend,
        change,
        answer,
    };
    respond(ask(&requests, request, result).await)
}

async fn ask<T>(requests: &Requests, request: Request, answer: oneshot::Receiver<T>) -> Option<T> {
    requests.send(request).await.ok()?;
    answer.await.ok()
}

fn respond(result: Option<Result<Done, Refused>>) -> Response {
    match result {
        Some(Ok(done)) => Json(done).into_response(),
        Some(Err(refused)) => {
            let status = match refused.reason {
                Refusal::BadConfiguration => StatusCode::UNPROCESSABLE_ENTITY,
                Refusal::NotFound => StatusCode::NOT_FOUND,
                Refusal::Failed => StatusCode::INTERNAL_SERVER_ERROR,
            };
            (status, Json(refused)).into_response()
        }
        None => stopping(),
    }
}

fn stopping() -> Response {
    let refused = Refused {
        reason: Refusal::Failed,
        message: "the daemon is stopping".to_owned(),
    };
    (StatusCode::SERVICE_UNAVAILABLE, Json(refused)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    }

    #[test]
    fn the_socket_of_a_dead_daemon_is_replaced_for_owner_and_group_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deeper/xlb.sock");
        runtime().block_on(async {
            drop(bind(&path).unwrap());
            assert!(path.exists());
            let _listener = bind(&path).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        });
    }

    #[test]
    fn a_socket_that_somebody_answers_on_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("xlb.sock");
        runtime().block_on(async {
            let _listener = bind(&path).unwrap();
            let error = format!("{:#}", anyhow::Error::from(bind(&path).unwrap_err()));
            assert!(error.contains("another program answers there"), "{error}");
            StdUnixStream::connect(&path).unwrap();
        });
    }

    #[test]
    fn a_file_that_is_no_socket_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        fs::write(&path, "kept").unwrap();
        runtime().block_on(async { bind(&path).unwrap_err() });
        assert_eq!(fs::read_to_string(&path).unwrap(), "kept");
    }
}
