//! `POST /try`: one prompt, and which experts each of its tokens took.

use std::{fmt, future::Future, pin::Pin};

use axum::{
    body::Bytes,
    extract::{FromRequest as _, Request, State, rejection::BytesRejection},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{Port, json, sender::check_origin};
use crate::error::{Error, ErrorKind};

/// Largest body, in bytes.
pub(super) const MAX_BODY: usize = 64 << 10;

/// Most tokens that a trial may generate.
pub const MAX_NEW_TOKENS: usize = 256;

/// Prompts at once. The page is for looking at one.
pub(super) const AT_ONCE: usize = 1;

/// Runs a prompt for the page. Telemetry knows no engine, so its owner lends it one.
pub trait Playground: fmt::Debug + Send + Sync {
    /// Runs it to its end. Dropping the future cancels it.
    fn run(&self, trial: Trial) -> Running<'_>;
}

/// A trial under way.
pub type Running<'a> = Pin<Box<dyn Future<Output = Result<Answer, Error>> + Send + 'a>>;

/// A prompt to try.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Trial {
    /// The text.
    pub prompt: String,
    /// At most [`MAX_NEW_TOKENS`].
    pub max_new_tokens: usize,
    /// As in `--routing`. The serving routing if missing.
    #[serde(default)]
    pub routing: Option<String>,
}

/// What became of a [`Trial`].
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Answer {
    /// The routing that was in force, as `--routing` writes it.
    pub routing: String,
    /// Of the weights.
    pub generation: u64,
    /// `stop` or `length`.
    pub finish: &'static str,
    /// Seconds from submission to the first token.
    pub first_token_seconds: f64,
    /// Seconds from the first token to the last.
    pub decode_seconds: f64,
    /// The MoE layers, L, as decoder layers from 0.
    pub layers: Vec<usize>,
    /// Those of the prompt, then the generated ones.
    pub tokens: Vec<TracedToken>,
}

/// A token and its way through the experts.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TracedToken {
    /// In the vocabulary.
    pub id: u32,
    /// What it adds to the text; empty in the middle of a character.
    pub text: String,
    /// Whether the model said it.
    pub generated: bool,
    /// Its routing; nothing for the last generated token, which the model has not read.
    #[serde(flatten)]
    pub routed: Option<TokenRoutes>,
}

/// How one token was routed; each list has one entry for each MoE layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TokenRoutes {
    /// (expert, weight) by descending router logit; at most [`MAX_ROUTES`] of them.
    pub routes: Vec<Vec<(u16, f64)>>,
    /// Of the softmax of the router logits, in nats.
    pub entropy: Vec<f64>,
    /// How far the last chosen router logit is above the first refused one. Infinite, which JSON writes as null, where all are chosen.
    pub margin: Vec<f64>,
}

/// Experts of a token and layer that an [`Answer`] names. Soft routing takes all, and nobody looks at a hundred.
pub const MAX_ROUTES: usize = 8;

/// Why there is no answer.
#[derive(Debug, Serialize)]
pub(super) struct Refused {
    #[serde(skip)]
    pub(super) status: StatusCode,
    /// One of [`Trial`] or a header; empty where neither is wrong.
    field: String,
    message: String,
}

pub(super) async fn try_prompt(State(port): State<Port>, request: Request) -> Response {
    match answer(&port, request).await {
        Ok(answer) => json(StatusCode::OK, &answer),
        Err(refused) => refused.into_response(),
    }
}

async fn answer(port: &Port, request: Request) -> Result<Answer, Refused> {
    check_origin(request.headers())?;
    let late = |_| Refused::new(StatusCode::REQUEST_TIMEOUT, "", "the prompt did not come in time");
    let unread =
        |rejection: BytesRejection| Refused::new(rejection.status(), "", format!("{}: at most {MAX_BODY} bytes", rejection.body_text()));
    let body = timeout(port.config.idle_timeout, Bytes::from_request(request, &())).await.map_err(late)?.map_err(unread)?;
    let trial: Trial = serde_json::from_slice(&body).map_err(|error| Refused::new(StatusCode::BAD_REQUEST, "", error.to_string()))?;
    let loading = || Refused::new(StatusCode::SERVICE_UNAVAILABLE, "", "the model is loading");
    let playground = port.page.playground().ok_or_else(loading)?;
    let busy = |_| Refused::new(StatusCode::TOO_MANY_REQUESTS, "", "another prompt is being tried on this server: wait for its end");
    let _permit = port.trials.try_acquire().map_err(busy)?;
    // A client that goes away drops this future, and with it the request.
    playground.run(trial).await.map_err(|error| Refused::from(&error))
}

impl Refused {
    pub(super) fn new(status: StatusCode, field: &str, message: impl Into<String>) -> Self {
        Self { status, field: field.into(), message: message.into() }
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        json(self.status, &self)
    }
}

/// The field of a [`Trial`] that the engine's path `path` came from, and which part of it is meant, as the beginning of a message.
fn of_the_page(path: &str) -> (&str, String) {
    let path = path.strip_prefix("sampling.").unwrap_or(path);
    let (field, rest) = path.split_once('.').unwrap_or((path, ""));
    let part = rest.rsplit('.').next().filter(|part| !part.is_empty());
    (field, part.map(|part| format!("{part}: ")).unwrap_or_default())
}

impl From<&Error> for Refused {
    fn from(error: &Error) -> Self {
        let status = match error.kind() {
            ErrorKind::InvalidArgument | ErrorKind::OutOfRange => StatusCode::BAD_REQUEST,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::FailedPrecondition => StatusCode::CONFLICT,
            ErrorKind::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
            ErrorKind::Unavailable | ErrorKind::Cancelled => StatusCode::SERVICE_UNAVAILABLE,
            ErrorKind::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            ErrorKind::Internal => {
                tracing::error!(?error, "a prompt of the live page failed");
                StatusCode::INTERNAL_SERVER_ERROR
            }
        };
        match error {
            Error::InvalidArgument { field, message } | Error::OutOfRange { field, message } => {
                let (field, part) = of_the_page(field);
                Self::new(status, field, format!("{part}{message}"))
            }
            _ => Self::new(status, "", error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_fields_of_the_page() {
        let cases = [
            ("prompt", "prompt", "wrong"),
            ("sampling.max_new_tokens", "max_new_tokens", "wrong"),
            ("routing", "routing", "wrong"),
            ("routing.top_k.k", "routing", "k: wrong"),
            ("routing.soft.temperature", "routing", "temperature: wrong"),
        ];
        for (path, field, message) in cases {
            let refused = Refused::from(&Error::invalid(path, "wrong"));
            assert_eq!((refused.status, refused.field.as_str(), refused.message.as_str()), (StatusCode::BAD_REQUEST, field, message));
        }
    }
}
