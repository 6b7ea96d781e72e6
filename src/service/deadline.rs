//! `grpc-timeout`: from a header to an instant.
//!
//! tonic applies that header itself, but only until the response head, and ends the call as CANCELLED. This layer
//! sits inside tonic's, so it answers DEADLINE_EXCEEDED a moment earlier; after the head the engine keeps the deadline,
//! which it finds in [`Deadline`].

use std::{
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tonic::{
    body::Body,
    codegen::{BoxFuture, Service, http},
};
use tower::Layer;

use super::status::to_status;
use crate::error::{Error, Result};

/// How much earlier than tonic's timer ours fires: one tick of tokio's clock, so that their order is certain.
const HEAD_START: Duration = Duration::from_millis(1);

/// When to answer at the latest: a moment before the client stops waiting. An extension of every request that came with a `grpc-timeout`.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(pub Instant);

/// Makes a [`DeadlineService`].
#[derive(Clone, Copy, Debug)]
pub struct DeadlineLayer;

/// Ends a call as DEADLINE_EXCEEDED if its `grpc-timeout` passes before the response head.
#[derive(Clone, Debug)]
pub struct DeadlineService<S> {
    inner: S,
}

impl<S> Layer<S> for DeadlineLayer {
    type Service = DeadlineService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        DeadlineService { inner }
    }
}

impl<S> Service<http::Request<Body>> for DeadlineService<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let timeout = match grpc_timeout(request.headers()) {
            Ok(timeout) => timeout,
            Err(error) => return Box::pin(async move { Ok(to_status(&error).into_http()) }),
        };
        // A timeout beyond the clock's range is none.
        let Some(deadline) = timeout.and_then(|timeout| Instant::now().checked_add(timeout)) else {
            return Box::pin(self.inner.call(request));
        };
        let answer_by = deadline.checked_sub(HEAD_START).unwrap_or(deadline);
        request.extensions_mut().insert(Deadline(answer_by));
        let response = self.inner.call(request);
        Box::pin(async move {
            match tokio::time::timeout_at(answer_by.into(), response).await {
                Ok(response) => response,
                Err(_) => Ok(to_status(&Error::DeadlineExceeded { phase: "waiting for the answer" }).into_http()),
            }
        })
    }
}

/// The timeout of a request, as `TimeoutValue TimeoutUnit` of the gRPC specification: at most 8 digits, then a unit.
fn grpc_timeout(headers: &http::HeaderMap) -> Result<Option<Duration>> {
    let Some(header) = headers.get("grpc-timeout") else { return Ok(None) };
    header
        .to_str()
        .ok()
        .and_then(parse)
        .map(Some)
        .ok_or_else(|| Error::invalid("grpc-timeout", "not 1 to 8 digits followed by one of H, M, S, m, u, n"))
}

fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_specified() {
        let cases = [
            ("3H", Duration::from_secs(10_800)),
            ("2M", Duration::from_secs(120)),
            ("99999999S", Duration::from_secs(99_999_999)),
            ("15m", Duration::from_millis(15)),
            ("7u", Duration::from_micros(7)),
            ("0n", Duration::ZERO),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text), Some(expected), "{text}");
        }
        for text in ["", "S", "5", "100000000S", "-1S", "+1S", "1.5S", "1s", " 1S", "1é", "é"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
