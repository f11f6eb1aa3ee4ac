//! The control API: HTTP with JSON over a unix socket.

pub mod client;
pub mod server;

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::observe::status::Status;

/// What the daemon can be asked for, each with the way back for the answer.
#[derive(Debug)]
pub enum Request {
    Status(oneshot::Sender<Status>),
    Reload(oneshot::Sender<Result<Done, Refused>>),
    Administer {
        service: String,
        backend: String,
        change: Change,
        answer: oneshot::Sender<Result<Done, Refused>>,
    },
}

/// What an operator does to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Enable,
    Drain,
    Disable,
}

impl Change {
    /// The last part of the path.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Enable => "enable",
            Self::Drain => "drain",
            Self::Disable => "disable",
        }
    }
}

/// A request was carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// One sentence for the user.
    pub message: String,
    /// What went otherwise than a user might expect.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// A request was not carried out; nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    pub reason: Refusal,
    /// For the user, of one or more lines.
    pub message: String,
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// The configuration is bad.
    BadConfiguration,
    /// There is no such service or backend.
    NotFound,
    /// It was tried and failed.
    Failed,
}
