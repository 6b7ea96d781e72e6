//! `POST /try`: one prompt, and which experts each of its tokens took.
//!
//! The port has no authentication, and a browser that can reach it also shows foreign pages. So what they could send without asking is
//! refused: only JSON is taken, for which a browser asks first and gets no permission, only from the page's own origin, and only under
//! an address or a known name, so that a foreign name that resolves to this machine (DNS rebinding) is no way in.

use std::{fmt, future::Future, net::IpAddr, pin::Pin};

use axum::{
    body::Bytes,
    extract::{State, rejection::BytesRejection},
    http::{HeaderMap, StatusCode, header},
    response::Response,
};
use serde::{Deserialize, Serialize};

use super::{Port, json};
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
struct Refused {
    #[serde(skip)]
    status: StatusCode,
    /// One of [`Trial`] or a header; empty where neither is wrong.
    field: String,
    message: String,
}

pub(super) async fn try_prompt(State(port): State<Port>, headers: HeaderMap, body: Result<Bytes, BytesRejection>) -> Response {
    match answer(&port, &headers, body).await {
        Ok(answer) => json(StatusCode::OK, &answer),
        Err(refused) => json(refused.status, &refused),
    }
}

async fn answer(port: &Port, headers: &HeaderMap, body: Result<Bytes, BytesRejection>) -> Result<Answer, Refused> {
    check_sender(headers, &port.config.hosts)?;
    let unread =
        |rejection: BytesRejection| Refused::new(rejection.status(), "", format!("{}: at most {MAX_BODY} bytes", rejection.body_text()));
    let body = body.map_err(unread)?;
    let trial: Trial = serde_json::from_slice(&body).map_err(|error| Refused::new(StatusCode::BAD_REQUEST, "", error.to_string()))?;
    let loading = || Refused::new(StatusCode::SERVICE_UNAVAILABLE, "", "the model is loading");
    let playground = port.page.playground().ok_or_else(loading)?;
    let busy = |_| Refused::new(StatusCode::TOO_MANY_REQUESTS, "", "another prompt is being tried on this server: wait for its end");
    let _permit = port.trials.try_acquire().map_err(busy)?;
    // A client that goes away drops this future, and with it the request.
    playground.run(trial).await.map_err(|error| Refused::from(&error))
}

/// Refuses what a foreign page could have sent.
fn check_sender(headers: &HeaderMap, hosts: &[String]) -> Result<(), Refused> {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    let host = text(header::HOST).unwrap_or_default();
    if !known_host(host, hosts) {
        let message = format!("'{host}' is neither an address nor localhost: name it in --live-page-hosts");
        return Err(Refused::new(StatusCode::FORBIDDEN, "host", message));
    }
    let own = |origin: &str| ["http://", "https://"].iter().any(|scheme| origin.strip_prefix(scheme) == Some(host));
    if text(header::ORIGIN).is_some_and(|origin| !own(origin)) {
        return Err(Refused::new(StatusCode::FORBIDDEN, "origin", "only the page of this server may send prompts"));
    }
    let kind = text(header::CONTENT_TYPE).unwrap_or_default();
    if kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    Err(Refused::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "content-type", "send application/json"))
}

/// An address, `localhost`, or one of `hosts`; with or without a port.
fn known_host(host: &str, hosts: &[String]) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.parse::<IpAddr>().is_ok() || name.eq_ignore_ascii_case("localhost") || hosts.iter().any(|known| known.eq_ignore_ascii_case(name))
}

impl Refused {
    fn new(status: StatusCode, field: &str, message: impl Into<String>) -> Self {
        Self { status, field: field.into(), message: message.into() }
    }
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
            // The page's fields are the last parts of the paths that the engine knows.
            Error::InvalidArgument { field, message } | Error::OutOfRange { field, message } => {
                Self::new(status, field.rsplit('.').next().unwrap_or_default(), message)
            }
            _ => Self::new(status, "", error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(headers: &[(&'static str, &str)]) -> Result<(), StatusCode> {
        let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        check_sender(&headers, &["gpu1.lan".into()]).map_err(|refused| refused.status)
    }

    #[test]
    fn hosts_are_addresses_or_known_names() {
        let hosts = ["gpu1.lan".to_owned()];
        for known in ["127.0.0.1", "127.0.0.1:9464", "[::1]:9464", "[::1]", "localhost:9464", "LOCALHOST", "gpu1.lan:80", "10.1.2.3:1"] {
            assert!(known_host(known, &hosts), "{known}");
        }
        for foreign in ["", "evil.example", "evil.example:9464", "localhost.evil.example", "127.0.0.1.evil.example:9464", "[evil]:1"] {
            assert!(!known_host(foreign, &hosts), "{foreign}");
        }
    }

    #[test]
    fn what_a_foreign_page_could_send_is_refused() {
        let own = ("host", "127.0.0.1:9464");
        let json = ("content-type", "application/json; charset=utf-8");
        assert_eq!(status(&[own, json]), Ok(()), "no browser");
        assert_eq!(status(&[own, json, ("origin", "http://127.0.0.1:9464")]), Ok(()));
        assert_eq!(status(&[("host", "gpu1.lan"), json, ("origin", "https://gpu1.lan")]), Ok(()), "behind a proxy that speaks TLS");
        for origin in ["null", "http://evil.example", "http://127.0.0.1:9465", "127.0.0.1:9464"] {
            assert_eq!(status(&[own, json, ("origin", origin)]), Err(StatusCode::FORBIDDEN), "{origin}");
        }
        assert_eq!(status(&[("host", "evil.example"), json, ("origin", "http://evil.example")]), Err(StatusCode::FORBIDDEN), "rebinding");
        assert_eq!(status(&[json]), Err(StatusCode::FORBIDDEN));
        for kind in ["text/plain", "application/x-www-form-urlencoded", ""] {
            assert_eq!(status(&[own, ("content-type", kind)]), Err(StatusCode::UNSUPPORTED_MEDIA_TYPE), "{kind}");
        }
    }
}
