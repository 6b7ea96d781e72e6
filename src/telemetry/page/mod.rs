//! The live page: what the server does, drawn in a browser, and a box to try a prompt.
//!
//! `/` is one document with its style and script in it; the only other file is plotly.js, which comes from the crate of that name through
//! the build script. Nothing is loaded from elsewhere. The document asks for [`/live.json`](live) every two seconds.

mod live;
mod playground;
mod samples;
mod sender;

use std::{
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    extract::{DefaultBodyLimit, State},
    http::{HeaderMap, HeaderName, StatusCode, header},
    middleware,
    response::{Html, IntoResponse, Response},
    routing::{get, post},
};
use serde::Serialize;
use tokio::sync::Semaphore;

use self::live::Live;
pub use self::playground::{Answer, MAX_NEW_TOKENS, MAX_ROUTES, Playground, Running, TokenRoutes, TracedToken, Trial};
use super::http::Page;

/// plotly.js, compressed by the build script. It is sent as it is: there is no browser that cannot read it.
const PLOTLY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/plotly.js.gz"));

/// Names [`PLOTLY`]: another version has another address.
const PLOTLY_VERSION: &str = env!("HARDMAX_PLOTLY");

/// The document, but for what differs between answers.
static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
    include_str!("index.html")
        .replace("{{style}}", include_str!("page.css"))
        .replace("{{script}}", include_str!("page.js"))
        .replace("{{plotly}}", &format!("/assets/plotly.js?v={PLOTLY_VERSION}"))
        .replace("{{max_new_tokens}}", &MAX_NEW_TOKENS.to_string())
});

/// How much of the live page there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum PageMode {
    /// All of it.
    #[default]
    Full,
    /// Without the box that tries prompts.
    ReadOnly,
    /// None: /metrics and /healthz only.
    Off,
}

/// The live page of a server, and what anybody may take of its port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageConfig {
    /// How much of it there is.
    pub mode: PageMode,
    /// Names, besides addresses and `localhost`, under which browsers may see it.
    pub hosts: Vec<String>,
    /// Connections at once, those for /metrics included. More wait.
    pub max_connections: usize,
    /// How long a connection may take for the head of a request, counted from its begin or the answer before, for the body, or to take
    /// the next part of an answer. Then it is closed.
    pub idle_timeout: Duration,
}

impl Default for PageConfig {
    fn default() -> Self {
        Self { mode: PageMode::default(), hosts: Vec::new(), max_connections: 128, idle_timeout: Duration::from_secs(30) }
    }
}

/// What the handlers share.
#[derive(Clone, Debug)]
struct Port {
    page: Arc<Page>,
    config: Arc<PageConfig>,
    start: Instant,
    /// Permits for prompts.
    trials: Arc<Semaphore>,
}

/// The routes of the page.
pub(super) fn routes(page: Arc<Page>, config: PageConfig) -> Router {
    if config.mode == PageMode::Off {
        return Router::new();
    }
    let mut routes = Router::new().route("/", get(document)).route("/live.json", get(live_json)).route("/assets/plotly.js", get(plotly));
    if config.mode == PageMode::Full {
        routes = routes.route("/try", post(playground::try_prompt).layer(DefaultBodyLimit::max(playground::MAX_BODY)));
    }
    let trials = Arc::new(Semaphore::new(playground::AT_ONCE));
    let port = Port { page, config: Arc::new(config), start: Instant::now(), trials };
    let known = middleware::from_fn_with_state(port.clone(), sender::known_name);
    // Of the routes alone: what is not there is not there under any name.
    routes.route_layer(known).layer(middleware::map_response(guard)).with_state(port)
}

/// Browsers take no answer for what it does not say that it is, and no other site may embed one.
async fn guard(response: Response) -> impl IntoResponse {
    let headers = [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ];
    (headers, response)
}

async fn document(State(port): State<Port>) -> impl IntoResponse {
    let nonce = format!("{:032x}", rand::random::<u128>());
    // plotly.js writes rules into a style element of its own, hence 'unsafe-inline', which reaches no script.
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let mode = if port.config.mode == PageMode::Full { "full" } else { "read-only" };
    let document = DOCUMENT.replace("{{nonce}}", &nonce).replace("{{mode}}", mode);
    ([(header::CONTENT_SECURITY_POLICY, policy), (header::CACHE_CONTROL, "no-store".into())], Html(document))
}

async fn live_json(State(port): State<Port>) -> Response {
    let live = Live::new(port.page.readiness(), port.start.elapsed().as_secs_f64(), port.page.metrics());
    json(StatusCode::OK, &live)
}

async fn plotly(headers: HeaderMap) -> Response {
    let tag = format!("\"{PLOTLY_VERSION}\"");
    let known = headers.get(header::IF_NONE_MATCH).and_then(|tags| tags.to_str().ok()).is_some_and(|tags| tags.contains(&tag));
    let caching = [(header::ETAG, tag), (header::CACHE_CONTROL, "public, max-age=31536000, immutable".into())];
    if known {
        return (StatusCode::NOT_MODIFIED, caching).into_response();
    }
    let kind = [(header::CONTENT_TYPE, "text/javascript; charset=utf-8"), (header::CONTENT_ENCODING, "gzip")];
    (caching, kind, Body::from(PLOTLY)).into_response()
}

/// `value` as an answer that nobody keeps.
fn json(status: StatusCode, value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(body) => (status, [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")], body).into_response(),
        Err(error) => {
            tracing::error!(%error, "an answer cannot be written as JSON");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}
