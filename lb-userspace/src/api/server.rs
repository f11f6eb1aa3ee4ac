//! The daemon's side of the control API.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
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
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
        Ok(listener)
    };
    make().map_err(|source| SocketError {
        path: path.to_owned(),
        source,
    })
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
