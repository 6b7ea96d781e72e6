//! From the crate's errors to gRPC statuses: one exhaustive match, and the details of `google.rpc` that go with a code.

use std::time::Duration;

use tonic::{Code, Status, metadata::MetadataValue};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::error::{Error, ErrorKind};

/// After this long a load balancer may have found another server.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Longest message of a status, in bytes: it travels in an HTTP/2 header, and clients refuse large ones.
const MAX_MESSAGE: usize = 1024;

/// The status of an error, with its details. The message is that of the error, shortened if very long.
pub fn to_status(error: &Error) -> Status {
    let mut status = Status::with_error_details(code(error.kind()), short(&error.to_string()), details(error));
    if let Some(delay) = retry_after(error) {
        status.metadata_mut().insert("grpc-retry-pushback-ms", MetadataValue::from(delay.as_millis() as u64));
    }
    status
}

/// The name of a code as the gRPC specification spells it.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::InvalidArgument => Code::InvalidArgument,
        ErrorKind::OutOfRange => Code::OutOfRange,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::FailedPrecondition => Code::FailedPrecondition,
        ErrorKind::ResourceExhausted => Code::ResourceExhausted,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::DeadlineExceeded => Code::DeadlineExceeded,
        ErrorKind::Cancelled => Code::Cancelled,
        ErrorKind::Internal => Code::Internal,
    }
}

fn details(error: &Error) -> ErrorDetails {
    match error {
        Error::InvalidArgument { field, message } | Error::OutOfRange { field, message } => {
            ErrorDetails::with_bad_request_violation(short(field), short(message))
        }
        _ => match retry_after(error) {
            Some(delay) => ErrorDetails::with_retry_info(Some(delay)),
            None => ErrorDetails::new(),
        },
    }
}

fn retry_after(error: &Error) -> Option<Duration> {
    match error {
        Error::QueueFull { retry_after, .. } => Some(*retry_after),
        _ => (error.kind() == ErrorKind::Unavailable).then_some(RETRY_AFTER),
    }
}

/// The first line of `text`, cut at a character.
fn short(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    match line.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|&end| end <= MAX_MESSAGE).last() {
        Some(end) if end < line.len() => format!("{} ...", &line[..end]),
        _ => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::QueueLimit;

    #[test]
    fn bad_arguments_name_the_field() {
        for error in [Error::invalid("sampling.top_p", "2 is above 1"), Error::out_of_range("sampling.top_p", "2 is above 1")] {
            let status = to_status(&error);
            let bad = status.get_details_bad_request().expect("details");
            assert_eq!(bad.field_violations[0].field, "sampling.top_p");
            assert_eq!(bad.field_violations[0].description, "2 is above 1");
            assert_eq!(status.message(), "sampling.top_p: 2 is above 1");
        }
    }

    #[test]
    fn what_may_be_retried_says_when() {
        let retry_after = Duration::from_millis(2500);
        let full = |limit| (Error::QueueFull { limit, retry_after }, Code::ResourceExhausted, retry_after, "2500");
        let later = |error| (error, Code::Unavailable, RETRY_AFTER, "1000");
        let cases = [full(QueueLimit::Requests(3)), full(QueueLimit::Tokens(100)), later(Error::Draining), later(Error::Tuning)];
        for (error, code, delay, pushback) in cases {
            let status = to_status(&error);
            assert_eq!(status.code(), code);
            assert_eq!(status.get_details_retry_info().and_then(|info| info.retry_delay), Some(delay));
            assert_eq!(status.metadata().get("grpc-retry-pushback-ms").map(|ms| ms.as_bytes()), Some(pushback.as_bytes()));
        }
    }

    #[test]
    fn a_full_disk_is_an_exhausted_resource() {
        let status = to_status(&Error::DiskFull { path: "jobs/t1".into() });
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().starts_with("jobs/t1: the disk is full"), "{}", status.message());
    }

    #[test]
    fn messages_fit_into_a_header() {
        let status = to_status(&Error::NotFound(format!("{}\nsecond line", "é".repeat(10_000))));
        assert!(status.message().len() <= MAX_MESSAGE + 4);
        assert!(status.message().ends_with("é ..."));
        assert_eq!(to_status(&Error::Internal(String::new())).code(), Code::Internal);
    }
}
