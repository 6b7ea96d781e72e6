//! The running server: both ports, the layers, health, and the order in which it all stops.
//!
//! Stopping: NOT_SERVING at once; requests are still served while load balancers notice (`drain_grace`); then new ones
//! get UNAVAILABLE, and those in flight may finish (`drain_timeout`); the rest fails with a status; only then do the
//! engine and the connections go. A tuning job comes to the end of its step meanwhile, and saves its state.

use std::{convert::Infallible, fmt, future::Future, pin::pin, sync::Arc, time::Duration};

use tokenizers::Tokenizer;
use tokio::{
    net::TcpListener,
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, sleep, timeout, timeout_at},
};
use tonic::{
    codec::CompressionEncoding,
    server::NamedService,
    transport::{Server, server::TcpIncoming},
};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    engine::{Engine, EngineConfig, EngineParts, ObservableSource},
    error::{Error, Result},
    jobs::{Jobs, Registry},
    model::LanguageModel,
    service::{
        DeadlineLayer, FILE_DESCRIPTOR_SET, InferenceService, ObserveLayer, RoutingService, ServiceConfig, Services, TuningService,
        proto::{inference_server::InferenceServer, routing_server::RoutingServer, tuning_server::TuningServer},
    },
    telemetry::{
        http::{self, Page, Readiness},
        metrics::{Metrics, MetricsConfig},
        otel::Tracer,
        page::PageConfig,
    },
};

/// Name of the threads of a server's runtime, as the system shows it.
pub const IO_THREADS: &str = "hardmax-io";

/// How often an idle connection is asked whether it lives, and how long it has to answer.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));

/// Streams of one connection beyond what the engine can hold: health, reflection, and the requests that are refused.
const SPARE_STREAMS: usize = 128;

/// How long the engine has to come to the end of its step, and then clients to read their last messages.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the collector of traces has to take the last ones after that.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// The sockets, bound by the caller: tests bind port 0, and an address in use is told before a model is loaded.
#[derive(Debug)]
pub struct Listeners {
    /// gRPC.
    pub grpc: TcpListener,
    /// `/metrics`, `/healthz` and the live page; `None` for neither.
    pub metrics: Option<TcpListener>,
    /// The live page of that port.
    pub live_page: PageConfig,
}

/// A model in memory, with what is needed to serve it.
pub struct Loaded {
    /// Goes to the engine.
    pub model: Box<dyn LanguageModel>,
    /// Number of its weights.
    pub generation: u64,
    /// Goes to the engine. `None`: the fidelity gap is not measured.
    pub background: Option<Box<dyn ObservableSource>>,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// Limits of the engine.
    pub engine: EngineConfig,
    /// The face of the service.
    pub service: ServiceConfig,
    /// Where jobs and generations are. `None`: there are none.
    pub tuning: Option<Registry>,
}

/// How the server stops.
#[derive(Clone, Copy, Debug)]
pub struct DrainConfig {
    /// From NOT_SERVING to the refusal of new requests.
    pub grace: Duration,
    /// From there to the end of those that are not done.
    pub timeout: Duration,
}

/// Aborts its task when dropped.
#[derive(Debug)]
struct AbortOnDrop<T>(JoinHandle<T>);

/// The health of our services.
#[derive(Debug)]
struct Health(HealthReporter);

/// Loads with `load`, serves until `shutdown`, then drains. `tracer` makes the spans of requests.
///
/// Returns once everything has stopped: `Ok` after `shutdown`, an error if loading or a socket failed, or if the
/// engine had stopped by itself.
pub async fn run(
    listeners: Listeners,
    drain: DrainConfig,
    tracer: Tracer,
    load: impl FnOnce() -> Result<Loaded> + Send + 'static,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let mut shutdown = pin!(shutdown);
    let page = Arc::new(Page::default());
    let live_page = listeners.live_page;
    let _observers = listeners.metrics.map(|listener| AbortOnDrop(tokio::spawn(http::serve(listener, page.clone(), live_page))));

    let loading = tokio::task::spawn_blocking(load);
    let loaded = tokio::select! {
        loaded = loading => loaded.map_err(|error| Error::Internal(format!("loading failed: {error}")))??,
        () = &mut shutdown => {
            tracing::info!("stopped while loading");
            return Ok(());
        }
    };
    let cache = loaded.model.cache();
    let config = loaded.service.metrics(loaded.model.spec())?;
    let shadow = loaded.background.is_some() && loaded.engine.shadow.is_on();
    let tuning = loaded.tuning.is_some();
    let config = MetricsConfig { cache_block_tokens: cache.block_tokens, cache_blocks: cache.num_blocks, shadow, tuning, ..config };
    let metrics = Arc::new(Metrics::new(&config)?);
    let engine = Engine::start(EngineParts {
        model: loaded.model,
        generation: loaded.generation,
        background: loaded.background,
        tokenizer: loaded.tokenizer,
        eos_token_ids: loaded.eos_token_ids,
        config: loaded.engine,
        metrics: metrics.clone(),
    })?;
    let jobs = loaded.tuning.map(|registry| Jobs::new(registry, engine.clone()));
    let services = Services::new(engine.clone(), loaded.service.clone(), jobs.clone())?;
    page.show(metrics.clone());
    page.lend(Arc::new(services.playground()));

    let (health, health_service) = Health::new().await;
    let (stop, stopped) = oneshot::channel::<()>();
    let router = builder(engine.config())
        .layer(ObserveLayer::new(metrics, tracer.clone()))
        .layer(DeadlineLayer)
        .add_service(health_service)
        .add_service(reflection().build_v1().map_err(descriptor_error)?)
        .add_service(reflection().build_v1alpha().map_err(descriptor_error)?)
        .add_service(inference_server(services.inference(), &loaded.service))
        .add_service(routing_server(services.routing(), &loaded.service))
        .add_service(tuning_server(services.tuning(), &loaded.service));
    let incoming = TcpIncoming::from(listeners.grpc).with_nodelay(Some(true)).with_keepalive(Some(KEEPALIVE.0));
    let mut serving = AbortOnDrop(tokio::spawn(router.serve_with_incoming_shutdown(incoming, async {
        // A dropped sender stops the server as well.
        let _ = stopped.await;
    })));
    health.set(ServingStatus::Serving).await;
    page.set(Readiness::Serving);
    tracing::info!(model = %loaded.service.model_name, "serving");

    let engine_lives = tokio::select! {
        result = &mut serving.0 => return Err(ended(result)),
        () = &mut shutdown => true,
        never = follow_mode(&engine, &health, &page) => match never {},
        () = engine.closed() => {
            tracing::error!("the engine has stopped; the server answers NOT_SERVING until it is restarted");
            health.set(ServingStatus::NotServing).await;
            page.set(Readiness::Failed);
            tokio::select! {
                result = &mut serving.0 => return Err(ended(result)),
                () = &mut shutdown => false,
            }
        }
    };

    page.set(if engine_lives { Readiness::Draining } else { Readiness::Failed });
    health.set(ServingStatus::NotServing).await;
    stop_computing(&engine, jobs, drain, engine_lives).await;
    health.clear().await;
    let _ = stop.send(());
    if timeout(CLOSE_TIMEOUT, &mut serving.0).await.is_err() {
        tracing::warn!("some clients keep their connections open: closing them");
    }
    tracer.shutdown(FLUSH_TIMEOUT).await;
    tracing::info!("stopped");
    if engine_lives { Ok(()) } else { Err(Error::Internal("the engine had stopped".into())) }
}

/// Says that requests should go elsewhere while tuning has all of the machine.
async fn follow_mode(engine: &Engine, health: &Health, page: &Page) -> Infallible {
    let mut exclusive = false;
    loop {
        engine.exclusive_is(!exclusive).await;
        exclusive = !exclusive;
        health.set_mode(exclusive).await;
        page.set(if exclusive { Readiness::Tuning } else { Readiness::Serving });
    }
}

/// Lets the tuning job save its state, and requests end.
async fn stop_computing(engine: &Engine, jobs: Option<Jobs>, drain: DrainConfig, engine_lives: bool) {
    let mut leaving = jobs.map(|jobs| tokio::task::spawn_blocking(move || jobs.leave()));
    if engine_lives {
        drain_engine(engine, &mut leaving, drain).await;
    }
    if let Some(leaving) = leaving
        && timeout(CLOSE_TIMEOUT, leaving).await.is_err()
    {
        tracing::warn!("the tuning job has not ended: it goes on from its last saved state");
    }
}

async fn drain_engine(engine: &Engine, leaving: &mut Option<JoinHandle<()>>, drain: DrainConfig) {
    tracing::info!(grace = ?drain.grace, timeout = ?drain.timeout, "draining");
    let until = Instant::now() + drain.grace + drain.timeout;
    sleep(drain.grace).await;
    // The engine gives no turns once it drains, and without them a job cannot come to the end of its step, where it saves its state.
    if let Some(task) = leaving
        && timeout(drain.timeout / 2, task).await.is_ok()
    {
        *leaving = None;
    }
    engine.drain();
    if timeout_at(until, engine.drained()).await.is_err() {
        let status = engine.status();
        tracing::warn!(running = status.running, waiting = status.waiting, "the drain timeout has passed: ending the remaining requests");
    }
    shut_down(engine, CLOSE_TIMEOUT).await;
}

/// Ends the engine, once it is at the end of the step that is under way. What others compute in it may take any time.
async fn shut_down(engine: &Engine, most: Duration) {
    let engine = engine.clone();
    match timeout(most, tokio::task::spawn_blocking(move || engine.shutdown())).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%error, "the engine did not shut down"),
        Err(_) => tracing::warn!(after = ?most, "the engine does not come to the end of a step: stopping without it"),
    }
}

fn builder(engine: &EngineConfig) -> Server {
    let streams = engine.max_batch_requests.saturating_add(engine.max_queue_requests).saturating_add(SPARE_STREAMS);
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1))
        .max_concurrent_streams(u32::try_from(streams).unwrap_or(u32::MAX))
}

fn inference_server(service: InferenceService, config: &ServiceConfig) -> InferenceServer<InferenceService> {
    InferenceServer::new(service)
        .max_decoding_message_size(config.max_receive_bytes)
        .max_encoding_message_size(config.max_send_bytes)
        // Requests only: a compressed answer of one token is larger than a plain one.
        .accept_compressed(CompressionEncoding::Gzip)
}

fn routing_server(service: RoutingService, config: &ServiceConfig) -> RoutingServer<RoutingService> {
    RoutingServer::new(service)
        .max_decoding_message_size(config.max_receive_bytes)
        .max_encoding_message_size(config.max_send_bytes)
        .accept_compressed(CompressionEncoding::Gzip)
}

fn tuning_server(service: TuningService, config: &ServiceConfig) -> TuningServer<TuningService> {
    TuningServer::new(service)
        .max_decoding_message_size(config.max_receive_bytes)
        .max_encoding_message_size(config.max_send_bytes)
        .accept_compressed(CompressionEncoding::Gzip)
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

fn descriptor_error(error: tonic_reflection::server::Error) -> Error {
    Error::Internal(format!("the embedded descriptors cannot be read: {error}"))
}

/// The server task ended although nobody asked it to.
fn ended(result: Result<Result<(), tonic::transport::Error>, tokio::task::JoinError>) -> Error {
    match result {
        Ok(Ok(())) => Error::Internal("the gRPC server ended by itself".into()),
        Ok(Err(error)) => Error::Internal(format!("the gRPC server failed: {error}")),
        Err(error) => Error::Internal(format!("the gRPC server failed: {error}")),
    }
}

// === impl Loaded ===

impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loaded").field("engine", &self.engine).field("service", &self.service).finish_non_exhaustive()
    }
}

// === impl Health ===

impl Health {
    /// The reporter and its service. NOT_SERVING until set.
    async fn new() -> (Self, tonic_health::pb::health_server::HealthServer<impl tonic_health::pb::health_server::Health>) {
        let (reporter, service) = tonic_health::server::health_reporter();
        let health = Self(reporter);
        health.set(ServingStatus::NotServing).await;
        (health, service)
    }

    /// The server as a whole, which has the empty name, and the services that need the engine for requests.
    fn requests() -> [&'static str; 3] {
        ["", <InferenceServer<InferenceService> as NamedService>::NAME, <RoutingServer<RoutingService> as NamedService>::NAME]
    }

    /// All of them.
    fn names() -> impl Iterator<Item = &'static str> {
        Self::requests().into_iter().chain([<TuningServer<TuningService> as NamedService>::NAME])
    }

    /// While tuning has all of the machine, it is all that is served.
    async fn set_mode(&self, exclusive: bool) {
        let status = if exclusive { ServingStatus::NotServing } else { ServingStatus::Serving };
        for name in Self::requests() {
            self.0.set_service_status(name, status).await;
        }
    }

    async fn set(&self, status: ServingStatus) {
        for name in Self::names() {
            self.0.set_service_status(name, status).await;
        }
    }

    /// Ends open Watch streams, which would hold the connections open.
    async fn clear(mut self) {
        for name in Self::names() {
            self.0.clear_service_status(name).await;
        }
    }
}

// === impl AbortOnDrop ===

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::mpsc, thread};

    use tokenizers::models::bpe::BPE;

    use super::*;
    use crate::{
        engine::Share,
        model::{CacheShape, load::load_to_serve},
    };

    fn engine() -> Engine {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/mixtral_gqa");
        let (_, model) = load_to_serve(&golden, Default::default(), false).unwrap();
        Engine::start(EngineParts {
            model: model.start(CacheShape { block_tokens: 8, num_blocks: 4 }).unwrap(),
            generation: 1,
            background: None,
            tokenizer: Arc::new(Tokenizer::new(BPE::default())),
            eos_token_ids: Vec::new(),
            config: EngineConfig::default(),
            metrics: Arc::new(Metrics::new(&MetricsConfig::default()).unwrap()),
        })
        .unwrap()
    }

    /// A piece of work that comes to no end does not keep the server.
    #[tokio::test]
    async fn a_turn_without_an_end_is_left_behind() {
        let engine = engine();
        engine.set_share(Some(Share::Exclusive)).unwrap();
        let ((begin, begun), (go, held)) = (mpsc::sync_channel(1), mpsc::sync_channel::<()>(1));
        let turns = engine.turns();
        let turn = thread::spawn(move || {
            turns.run(|| {
                begin.send(()).unwrap();
                // Until the test lets go of it.
                let _ = held.recv();
            })
        });
        tokio::task::spawn_blocking(move || begun.recv()).await.unwrap().unwrap();
        timeout(Duration::from_secs(60), shut_down(&engine, Duration::from_millis(1))).await.expect("it waits for the turn");
        drop(go);
        let _ = turn.join().unwrap();
    }
}
