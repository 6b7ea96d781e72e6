//! A call, apart from its message: its id, and when it is due.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tonic::{
    Extensions, Response, Status,
    metadata::{MetadataMap, MetadataValue},
};

use super::{Deadline, to_status};
use crate::{
    error::{Error, ErrorKind, Result},
    telemetry::otel::RequestSpan,
};

/// Longest request id, in bytes: it comes back in every message and in a header.
const MAX_REQUEST_ID: usize = 128;

/// The metadata key of a request id, both ways.
const REQUEST_ID: &str = "x-request-id";

/// What a request says about itself, outside its message.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) id: String,
    arrived: Instant,
    /// By `grpc-timeout`.
    deadline: Option<Instant>,
    pub(super) span: RequestSpan,
}

impl Call {
    /// The request id is `field`, else the metadata's, else a new one.
    pub(super) fn new(field: &str, metadata: &MetadataMap, extensions: &Extensions) -> Result<Self, Status> {
        let id = if !field.is_empty() {
            checked_id("request_id", field.as_bytes())
        } else if let Some(value) = metadata.get(REQUEST_ID) {
            checked_id(REQUEST_ID, value.as_bytes())
        } else {
            Ok(format!("{:016x}", rand::random::<u64>()))
        };
        let deadline = extensions.get::<Deadline>().map(|deadline| deadline.0);
        let id = id.map_err(|error| to_status(&error))?;
        let span = extensions.get::<RequestSpan>().cloned().unwrap_or_default();
        span.request_id(&id);
        Ok(Self { id, arrived: Instant::now(), deadline, span })
    }

    /// The trace that it belongs to.
    pub(super) fn trace_id(&self) -> Option<Arc<str>> {
        self.span.trace_id().cloned()
    }

    /// When the answer is due: the earlier of `grpc-timeout` and the field of the message.
    pub(super) fn due(&self, timeout_seconds: Option<f64>) -> Result<Option<Instant>> {
        let Some(seconds) = timeout_seconds else { return Ok(self.deadline) };
        if !(seconds.is_finite() && seconds > 0.0) {
            return Err(Error::invalid("timeout_seconds", format!("{seconds} is not a finite number above 0")));
        }
        // A timeout beyond the clock's range is none.
        let due = Duration::try_from_secs_f64(seconds).ok().and_then(|timeout| self.arrived.checked_add(timeout));
        Ok(due.into_iter().chain(self.deadline).min())
    }

    pub(super) fn status(&self, error: &Error) -> Status {
        let trace_id = self.span.trace_id().map(|id| &**id);
        if error.kind() == ErrorKind::Internal {
            tracing::error!(request_id = %self.id, trace_id, error = ?error, "request failed");
        } else {
            tracing::debug!(request_id = %self.id, trace_id, %error, "request refused");
        }
        let mut status = to_status(error);
        self.stamp(status.metadata_mut());
        status
    }

    pub(super) fn response<T>(&self, message: T) -> Response<T> {
        let mut response = Response::new(message);
        self.stamp(response.metadata_mut());
        response
    }

    fn stamp(&self, metadata: &mut MetadataMap) {
        if let Ok(id) = MetadataValue::try_from(&self.id) {
            metadata.insert(REQUEST_ID, id);
        }
    }
}

fn checked_id(field: &str, id: &[u8]) -> Result<String> {
    match str::from_utf8(id) {
        Ok(text) if (1..=MAX_REQUEST_ID).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic) => Ok(text.to_owned()),
        _ => Err(Error::invalid(field, format!("not 1 to {MAX_REQUEST_ID} visible ASCII characters"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_checked_before_they_are_echoed() {
        assert!(checked_id("request_id", b"a-1").is_ok());
        for bad in [&b""[..], b"a b", b"a\n", "\u{e9}".as_bytes(), b"\0", b"\xff", &[b'x'; 129]] {
            assert!(checked_id("request_id", bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_field_wins_over_the_metadata() {
        let mut metadata = MetadataMap::new();
        metadata.insert(REQUEST_ID, MetadataValue::from_static("from-metadata"));
        let id = |field, metadata| Call::new(field, metadata, &Extensions::new()).unwrap().id;
        assert_eq!(id("from-field", &metadata), "from-field");
        assert_eq!(id("", &metadata), "from-metadata");
        let (first, second) = (id("", &MetadataMap::new()), id("", &MetadataMap::new()));
        assert_ne!(first, second);
        assert_eq!(first.len(), 16);
    }
}
