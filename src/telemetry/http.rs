//! The observer's port: `/metrics` for Prometheus, `/healthz` for whoever sends requests here: 503 while loading and draining, and the
//! live page ([`super::page`]) for people.

use std::sync::{Arc, OnceLock, RwLock};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
    serve::Listener,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_io_timeout::TimeoutStream;

use super::{
    metrics::Metrics,
    page::{self, PageConfig, Playground},
};

/// What the server can do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// The model is not in memory yet.
    Loading,
    /// Requests are served.
    Serving,
    /// Tuning has all of the machine: new requests should go elsewhere, or come later.
    Tuning,
    /// Stopping: new requests should go elsewhere.
    Draining,
    /// The engine is gone; only a restart helps.
    Failed,
}

/// What the port shows. The server writes it, the port reads it.
#[derive(Debug)]
pub struct Page {
    readiness: RwLock<Readiness>,
    /// The series depend on the model, so they exist once it is loaded.
    metrics: OnceLock<Arc<Metrics>>,
    playground: OnceLock<Arc<dyn Playground>>,
}

// === impl Page ===

impl Default for Page {
    fn default() -> Self {
        Self { readiness: RwLock::new(Readiness::Loading), metrics: OnceLock::new(), playground: OnceLock::new() }
    }
}

impl Page {
    /// From now on `/metrics` shows `metrics`; later calls change nothing.
    pub fn show(&self, metrics: Arc<Metrics>) {
        let _ = self.metrics.set(metrics);
    }

    /// From now on the live page tries prompts with `playground`; later calls change nothing.
    pub fn lend(&self, playground: Arc<dyn Playground>) {
        let _ = self.playground.set(playground);
    }

    /// From now on `/healthz` answers by `readiness`.
    pub fn set(&self, readiness: Readiness) {
        *self.readiness.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = readiness;
    }

    pub(super) fn metrics(&self) -> Option<&Metrics> {
        self.metrics.get().map(Arc::as_ref)
    }

    pub(super) fn playground(&self) -> Option<&dyn Playground> {
        self.playground.get().map(Arc::as_ref)
    }

    pub(super) fn readiness(&self) -> Readiness {
        *self.readiness.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Serves `page`; does not end. Connections that were taken live on when the future is dropped.
///
/// More people reach this port than that for requests, and both have the sockets of one process. So the number of connections is bounded,
/// and so is the time that one may keep the other side waiting: for the head of a request here, for its body in the handler, and for
/// the answer to be taken.
pub async fn serve(mut listener: TcpListener, page: Arc<Page>, config: PageConfig) {
    let (places, idle_timeout) = (Arc::new(Semaphore::new(config.max_connections)), config.idle_timeout);
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(idle_timeout);
    let own = Router::new().route("/metrics", get(metrics)).route("/healthz", get(healthz)).with_state(page.clone());
    let service = TowerToHyperService::new(own.merge(page::routes(page, config)));
    while let Ok(place) = places.clone().acquire_owned().await {
        let (socket, _) = Listener::accept(&mut listener).await;
        let mut socket = TimeoutStream::new(socket);
        socket.set_write_timeout(Some(idle_timeout));
        let connection = http.serve_connection(TokioIo::new(Box::pin(socket)), service.clone());
        tokio::spawn(async move {
            // Whatever the client did, it is its own loss.
            let _ = connection.await;
            drop(place);
        });
    }
}

async fn metrics(State(page): State<Arc<Page>>) -> Response {
    match page.metrics() {
        Some(metrics) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics.render()).into_response(),
        None => (StatusCode::SERVICE_UNAVAILABLE, "the model is loading\n").into_response(),
    }
}

async fn healthz(State(page): State<Arc<Page>>) -> (StatusCode, &'static str) {
    match page.readiness() {
        Readiness::Serving => (StatusCode::OK, "ok\n"),
        Readiness::Loading => (StatusCode::SERVICE_UNAVAILABLE, "the model is loading\n"),
        Readiness::Tuning => (StatusCode::SERVICE_UNAVAILABLE, "tuning\n"),
        Readiness::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
        Readiness::Failed => (StatusCode::SERVICE_UNAVAILABLE, "the engine has stopped\n"),
    }
}
