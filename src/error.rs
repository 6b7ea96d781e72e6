//! The one error type. It knows kinds, not transports: `service::status` maps kinds to gRPC codes, `main` to exit codes.

use std::{fmt, path::PathBuf, time::Duration};

use crate::checkpoint::CheckpointError;

/// `Result` with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, named where it arises.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field of a request or a flag has a value that can never be right.
    #[error("{field}: {message}")]
    InvalidArgument {
        /// Path of the field as its sender knows it, for example `sampling.top_p`.
        field: String,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// A value that is well formed and too large for this model or server.
    #[error("{field}: {message}")]
    OutOfRange {
        /// Path of the field as its sender knows it.
        field: String,
        /// The value, the limit, and what to do.
        message: String,
    },
    /// The named thing does not exist here.
    #[error("{0}")]
    NotFound(String),
    /// The operation is refused in the present mode or state.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The queue is full.
    #[error("the queue is full ({limit} may wait): try again later")]
    QueueFull {
        /// What may wait at once.
        limit: QueueLimit,
        /// When there may be room again.
        retry_after: Duration,
    },
    /// The server is stopping.
    #[error("the server is draining: send the request elsewhere")]
    Draining,
    /// Tuning has all of the machine.
    #[error("the server tunes with all of the machine: send the request elsewhere, or again later")]
    Tuning,
    /// The request's deadline passed.
    #[error("deadline exceeded while {phase}")]
    DeadlineExceeded {
        /// What the request was doing: `queued`, `prefilling` or `decoding`.
        phase: &'static str,
    },
    /// The client went away.
    #[error("cancelled by the client")]
    Cancelled,
    /// The client left its answer unread for too long; others can use its place.
    #[error("the answer was not read for {limit:?}")]
    ReaderStalled {
        /// How long a request may wait for its reader.
        limit: Duration,
    },
    /// A checkpoint folder cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A file cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A file cannot be written because there is no room for it.
    #[error("{path}: the disk is full: make room and go on from there", path = path.display())]
    DiskFull {
        /// The file.
        path: PathBuf,
    },
    /// A tensor operation failed. With checked input this is a bug, or the device is out of memory.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// The logits of one sequence are not finite: the request fails, its neighbours do not.
    #[error("the model produced non-finite logits for this input")]
    NonFinite,
    /// An invariant does not hold.
    #[error("{0} (this is a bug in hardmax)")]
    Internal(String),
    /// The device has failed in a way that this process cannot recover from: only a new one can use it again.
    #[error("the device is lost, and with it this process: {0}")]
    DeviceLost(String),
}

/// What a queue is full of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueLimit {
    /// So many requests.
    Requests(usize),
    /// Requests with so many prompt tokens together.
    Tokens(usize),
    /// So many measurements.
    Measurements(usize),
}

/// What a caller can do about an [`Error`]; the basis of status and exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// Change the request.
    InvalidArgument,
    /// Make the request smaller.
    OutOfRange,
    /// Ask for something that exists.
    NotFound,
    /// Change the server's mode, or the request.
    FailedPrecondition,
    /// Try again later.
    ResourceExhausted,
    /// Send the request elsewhere.
    Unavailable,
    /// Allow more time.
    DeadlineExceeded,
    /// Nobody is waiting for the answer.
    Cancelled,
    /// Report it.
    Internal,
}

impl fmt::Display for QueueLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Requests(n) => write!(f, "{n} requests"),
            Self::Tokens(n) => write!(f, "requests with {n} prompt tokens"),
            Self::Measurements(n) => write!(f, "{n} measurements"),
        }
    }
}

impl Error {
    /// The same about a field that its sender knows by another path: `from` at the beginning of the path becomes `to`.
    pub fn rooted(self, from: &str, to: &str) -> Self {
        let path = |field: String| match field.strip_prefix(from) {
            Some(rest) if rest.is_empty() || rest.starts_with('.') => format!("{to}{rest}"),
            _ => field,
        };
        match self {
            Self::InvalidArgument { field, message } => Self::InvalidArgument { field: path(field), message },
            Self::OutOfRange { field, message } => Self::OutOfRange { field: path(field), message },
            other => other,
        }
    }

    /// An [`Error::InvalidArgument`].
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::InvalidArgument { field: field.into(), message: message.into() }
    }

    /// An [`Error::OutOfRange`].
    pub fn out_of_range(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::OutOfRange { field: field.into(), message: message.into() }
    }

    /// An [`Error::Io`] about `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    /// The kind, by which transports choose their codes.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::InvalidArgument { .. } => ErrorKind::InvalidArgument,
            Self::OutOfRange { .. } => ErrorKind::OutOfRange,
            Self::NotFound(_) => ErrorKind::NotFound,
            Self::FailedPrecondition(_) => ErrorKind::FailedPrecondition,
            Self::QueueFull { .. } | Self::DiskFull { .. } => ErrorKind::ResourceExhausted,
            Self::Draining | Self::Tuning => ErrorKind::Unavailable,
            Self::DeadlineExceeded { .. } => ErrorKind::DeadlineExceeded,
            Self::Cancelled | Self::ReaderStalled { .. } => ErrorKind::Cancelled,
            Self::Checkpoint(_) | Self::Io { .. } | Self::Tensor(_) | Self::NonFinite | Self::Internal(_) | Self::DeviceLost(_) => {
                ErrorKind::Internal
            }
        }
    }
}
