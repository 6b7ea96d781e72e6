//! `hardmax serve`: flags, loading, signals.

use std::{
    fmt, io,
    net::{SocketAddr, ToSocketAddrs as _},
    num::NonZeroUsize,
    path::PathBuf,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use clap::{Args, builder::NonEmptyStringValueParser};
use tokenizers::Tokenizer;
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
};

use super::{cache::CacheArgs, compute::ComputeArgs, otlp::OtlpArgs, series::SeriesArgs, tuning::TuningArgs};
use crate::{
    checkpoint::Checkpoint,
    engine::{EngineConfig, FIRST_GENERATION, MeasureConfig, ShadowConfig},
    error::{Error, Result},
    jobs::Registry,
    model::{ModelSpec, kv_cache::KvCache, load::load_tuned},
    moe::policy::{RoutingChoice, RoutingRule},
    ops::start_compute_threads,
    server::{self, DrainConfig, Listeners, Loaded},
    service::{SamplingDefaults, ServiceConfig},
    telemetry::page::{PageConfig, PageMode},
};

/// Whether the routing of a running server may be changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum RuntimeRouting {
    /// By any client.
    #[default]
    On,
    /// By nobody.
    Off,
}

/// Serve a checkpoint over gRPC.
///
/// SIGTERM and SIGINT drain: the server says NOT_SERVING, lets what runs end, and exits with status 0. A second signal
/// exits at once.
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// Checkpoint folder in Hugging Face layout: config.json, safetensors, tokenizer.json.
    #[arg(long, env = "HARDMAX_MODEL", value_name = "DIR", default_value = "models/demo")]
    pub model: PathBuf,
    /// What `hardmax tune` changed: a file that it wrote over this very checkpoint. Default: nothing.
    #[arg(long, env = "HARDMAX_DELTA", value_name = "FILE")]
    pub delta: Option<PathBuf>,
    /// The name by which clients may ask for the model. Default: the name of the folder.
    #[arg(long, env = "HARDMAX_MODEL_NAME", value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub model_name: Option<String>,
    /// Address of the gRPC port. There is no TLS and no authentication: keep it on a trusted network.
    #[arg(long, env = "HARDMAX_LISTEN", value_name = "ADDRESS", default_value = "127.0.0.1:50051", value_parser = address)]
    pub listen: SocketAddr,
    /// Address of the port with /metrics, /healthz and the live page, or `off`.
    #[arg(long, env = "HARDMAX_METRICS_LISTEN", value_name = "ADDRESS|off", default_value = "127.0.0.1:9464")]
    pub metrics_listen: MetricsListen,
    /// The live page on that port. `read-only` has no box to try prompts, which costs the time of the model.
    #[arg(long, env = "HARDMAX_LIVE_PAGE", value_enum, default_value_t)]
    pub live_page: PageMode,
    /// Names under which browsers may see the live page, besides addresses and localhost. Others are refused, so that no foreign site can
    /// lead a browser here under a name of its own.
    #[arg(long, env = "HARDMAX_LIVE_PAGE_HOSTS", value_name = "NAME,...", value_delimiter = ',', value_parser = host_name)]
    pub live_page_hosts: Vec<String>,
    /// Connections to that port at once, those of Prometheus included. More wait.
    #[arg(long, env = "HARDMAX_METRICS_MAX_CONNECTIONS", value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub metrics_max_connections: u32,
    /// How long a client of that port may keep a connection waiting, for a request or by not taking an answer, before it is closed.
    #[arg(long, env = "HARDMAX_METRICS_IDLE_TIMEOUT", value_name = "SECONDS", default_value = "30", value_parser = patience)]
    pub metrics_idle_timeout: Duration,
    /// What that port exports.
    #[command(flatten)]
    pub series: SeriesArgs,
    /// Where the model runs, and how.
    #[command(flatten)]
    pub compute: ComputeArgs,
    /// Routing of requests that choose none: `native` (as the checkpoint says), `top-K`, `top-K,K,...` (one for each MoE layer),
    /// `mass-P` or `mass-P:MAX_K` (as few experts as hold that share of the router's probability), each of these with
    /// `:raw|renorm|unit` for the weights, `soft` or `soft:TEMPERATURE`. Default: native.
    #[arg(long, env = "HARDMAX_ROUTING", value_name = "ROUTING")]
    pub routing: Option<RoutingRule>,
    /// Short for `--routing top-1` or `--routing top-2`.
    #[arg(long, env = "HARDMAX_TOP_K", value_name = "K", value_parser = clap::value_parser!(u8).range(1..=2), conflicts_with = "routing")]
    pub top_k: Option<u8>,
    /// Whether clients may change the routing of requests that choose none (`hardmax.v1.Routing/SetRoutingPolicy`).
    #[arg(long, env = "HARDMAX_RUNTIME_ROUTING", value_enum, default_value_t)]
    pub runtime_routing: RuntimeRouting,
    /// Requests that run at once, in one batch.
    #[arg(long, env = "HARDMAX_MAX_BATCH_REQUESTS", value_name = "N", default_value = "16")]
    pub max_batch_requests: NonZeroUsize,
    /// Requests that may wait for a place in the batch; 0 for none. One more is refused with RESOURCE_EXHAUSTED.
    #[arg(long, env = "HARDMAX_MAX_QUEUE_REQUESTS", value_name = "N", default_value_t = 256)]
    pub max_queue_requests: usize,
    /// Tokens of one forward pass, over all requests. Longer prompts take several passes, so that running requests
    /// do not wait for them.
    #[arg(long, env = "HARDMAX_MAX_STEP_TOKENS", value_name = "N", default_value = "512")]
    pub max_step_tokens: NonZeroUsize,
    /// Tokens that the prompts of waiting requests may have together. A request with more is refused with RESOURCE_EXHAUSTED,
    /// unless nothing waits.
    #[arg(long, env = "HARDMAX_MAX_QUEUE_TOKENS", value_name = "N", default_value_t = EngineConfig::default().max_queue_tokens)]
    pub max_queue_tokens: usize,
    /// The head start in the queue that each step of a request's priority gives it, so that low ones wait for so long only.
    /// Priorities beyond 100 and -100 count as those.
    #[arg(long, env = "HARDMAX_PRIORITY_STEP", value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub priority_step: Duration,
    /// The cache of keys and values.
    #[command(flatten)]
    pub cache: CacheArgs,
    /// Most tokens that a request may generate, and the number for requests that do not say.
    #[arg(long, env = "HARDMAX_MAX_NEW_TOKENS", value_name = "N", default_value = "1024")]
    pub max_new_tokens: NonZeroUsize,
    /// Most continuations that a request may ask for (`n`).
    #[arg(long, env = "HARDMAX_MAX_CHOICES", value_name = "N", default_value = "8")]
    pub max_choices: NonZeroUsize,
    /// Messages that may wait for a slow reader before its request pauses, and as many times 16 KiB of routing traces.
    #[arg(long, env = "HARDMAX_EVENT_BUFFER", value_name = "N", default_value = "64", value_parser = clap::value_parser!(u32).range(2..))]
    pub event_buffer: u32,
    /// How long a request may wait for its reader before it ends with CANCELLED: it holds a place in the batch.
    #[arg(long, env = "HARDMAX_READER_TIMEOUT", value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    pub reader_timeout: Duration,
    /// Largest request message. Larger ones are refused with OUT_OF_RANGE.
    #[arg(long, env = "HARDMAX_MAX_RECEIVE_MESSAGE_BYTES", value_name = "BYTES", default_value = "4194304")]
    pub max_receive_message_bytes: NonZeroUsize,
    /// Longest text of a Tokenize, and as many tokens of a Detokenize. Either keeps a core busy for a time in proportion.
    /// Prompts are bounded by the model's context.
    #[arg(long, env = "HARDMAX_MAX_TOKENIZE_BYTES", value_name = "BYTES", default_value = "262144")]
    pub max_tokenize_bytes: NonZeroUsize,
    /// Largest response message. A Score with many alternatives is the only large one.
    #[arg(long, env = "HARDMAX_MAX_SEND_MESSAGE_BYTES", value_name = "BYTES", default_value = "67108864")]
    pub max_send_message_bytes: NonZeroUsize,
    /// After SIGTERM or SIGINT the server says NOT_SERVING and still serves for this long, so that load balancers can
    /// notice. Behind one, set it above the interval of its health checks.
    #[arg(long, env = "HARDMAX_DRAIN_GRACE", value_name = "SECONDS", default_value = "0", value_parser = seconds)]
    pub drain_grace: Duration,
    /// After that grace, how long running requests may take to end.
    #[arg(long, env = "HARDMAX_DRAIN_TIMEOUT", value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub drain_timeout: Duration,
    /// Tracing.
    #[command(flatten)]
    pub otlp: OtlpArgs,
    /// Threads that compute. Default: one for each core.
    #[arg(long, env = "HARDMAX_THREADS", value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    /// Measuring the fidelity gap.
    #[command(flatten)]
    pub fidelity: FidelityArgs,
    /// Tuning inside the server.
    #[command(flatten)]
    pub tuning: TuningArgs,
}

/// Measuring the fidelity gap: of live traffic, and of texts on request.
#[derive(Args, Clone, Debug)]
pub struct FidelityArgs {
    /// Share of the requests that are measured against the reference routing, from 0 to 1, after they have ended and below all others.
    #[arg(long, env = "HARDMAX_SHADOW_RATE", value_name = "SHARE", default_value = "0.01", value_parser = share)]
    pub shadow_rate: f64,
    /// Share of the time in which requests are worked on that may be spent on that beside it; while there are none it is not limited.
    /// 0 turns it off, series and all.
    #[arg(long, env = "HARDMAX_SHADOW_BUDGET", value_name = "SHARE", default_value = "0.01", value_parser = share)]
    pub shadow_budget: f64,
    /// Requests that may wait to be measured, at most half of them (rounded up) because they ask for it. More are dropped and counted, and
    /// so is what has waited for a minute.
    #[arg(long, env = "HARDMAX_SHADOW_QUEUE", value_name = "N", default_value_t = ShadowConfig::default().queue)]
    pub shadow_queue: usize,
    /// Tokens of such a request that are measured: the first ones, prompt and continuation. From the first sample on a cache for twice as
    /// many is kept beside that of requests.
    #[arg(long, env = "HARDMAX_SHADOW_MAX_TOKENS", value_name = "N", default_value = "512", value_parser = clap::value_parser!(u32).range(2..=8192))]
    pub shadow_max_tokens: u32,
    /// A request whose mean KL(reference || serving) is above this is told in the log, with its id.
    #[arg(long, env = "HARDMAX_SHADOW_OUTLIER_KL", value_name = "NATS", default_value_t = ShadowConfig::default().outlier_kl)]
    pub shadow_outlier_kl: f64,
    /// Share of the time in which requests are worked on that MeasureFidelity may take beside it. 0: it runs only while there are none.
    #[arg(long, env = "HARDMAX_MEASURE_BUDGET", value_name = "SHARE", default_value = "0.1", value_parser = share)]
    pub measure_budget: f64,
    /// Calls of MeasureFidelity at once, of which one runs. One more is refused with RESOURCE_EXHAUSTED. 0 refuses all with
    /// FAILED_PRECONDITION. While one runs it has a cache of its own, of at most a fourth of --kv-cache-tokens: larger windows are refused
    /// with OUT_OF_RANGE.
    #[arg(long, env = "HARDMAX_MAX_MEASURE_REQUESTS", value_name = "N", default_value_t = MeasureConfig::default().max_requests)]
    pub max_measure_requests: usize,
    /// Tokens of one text of MeasureFidelity. More are refused with OUT_OF_RANGE.
    #[arg(long, env = "HARDMAX_MAX_MEASURE_TOKENS", value_name = "N", default_value = "65536", value_parser = clap::value_parser!(u32).range(2..))]
    pub max_measure_tokens: u32,
}

/// The observer's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricsListen {
    /// No port.
    Off,
    /// A port on this address.
    At(SocketAddr),
}

/// Serves until SIGTERM or SIGINT, then drains. A second signal exits at once.
pub fn run(args: ServeArgs) -> Result<()> {
    start_compute_threads(args.threads)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name(server::IO_THREADS).build();
    let runtime = runtime.map_err(|error| Error::Internal(format!("no runtime: {error}")))?;
    let result = runtime.block_on(serve(args));
    // A load that was interrupted is not waited for.
    runtime.shutdown_background();
    result
}

async fn serve(args: ServeArgs) -> Result<()> {
    let shutdown = signals()?;
    let grpc = bind("--listen", args.listen).await?;
    let metrics = match args.metrics_listen {
        MetricsListen::Off => None,
        MetricsListen::At(address) => Some(bind("--metrics-listen", address).await?),
    };
    announce(&args, &grpc, metrics.as_ref());
    let tracer = args.otlp.tracer()?;
    let drain = DrainConfig { grace: args.drain_grace, timeout: args.drain_timeout };
    let live_page = args.page_config();
    server::run(Listeners { grpc, metrics, live_page }, drain, tracer, move || load_model(&args), shutdown).await
}

async fn bind(flag: &str, address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::AddrInUse => ". Another program has it: stop that, or choose another port",
            io::ErrorKind::PermissionDenied => ". Ports below 1024 need privileges: choose a higher one",
            io::ErrorKind::AddrNotAvailable => ". No interface of this machine has that address",
            _ => "",
        };
        Error::FailedPrecondition(format!("cannot listen on {flag} {address}: {error}{advice}"))
    })
}

/// Done at the first signal; at the second the process exits.
fn signals() -> Result<impl Future<Output = ()>> {
    let listen = |kind| signal(kind).map_err(|error| Error::Internal(format!("cannot listen for signals: {error}")));
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    let (first, seen) = oneshot::channel();
    tokio::spawn(async move {
        either(&mut terminate, &mut interrupt).await;
        let _ = first.send(());
        tracing::info!("stopping; a second signal exits at once");
        either(&mut terminate, &mut interrupt).await;
        tracing::warn!("second signal: exiting at once");
        std::process::exit(1);
    });
    Ok(async {
        if seen.await.is_err() {
            // Without the task there are no signals: serve on.
            std::future::pending::<()>().await;
        }
    })
}

async fn either(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

fn announce(args: &ServeArgs, grpc: &TcpListener, metrics: Option<&TcpListener>) {
    let address = |listener: &TcpListener| listener.local_addr().map_or_else(|_| "?".into(), |address| address.to_string());
    let observers = metrics.map_or_else(|| "off".into(), address);
    tracing::info!(grpc = %address(grpc), metrics = %observers, model = %args.model.display(), "starting");
    let [grpc_open_to, metrics_open_to, live_page_prompts_open_to] = open_to(args);
    tracing::info!(tls = "none", authentication = "none", grpc_open_to, metrics_open_to, live_page_prompts_open_to, "security posture");
}

/// To whom requests, metrics, and the prompts of the live page are open.
fn open_to(args: &ServeArgs) -> [&'static str; 3] {
    let open = |address: SocketAddr| if address.ip().is_loopback() { "this machine" } else { "the network" };
    let metrics = match args.metrics_listen {
        MetricsListen::Off => "nobody",
        MetricsListen::At(address) => open(address),
    };
    // Who may scrape may also ask the model, where the live page has its box.
    let prompts = if args.live_page == PageMode::Full { metrics } else { "nobody" };
    [open(args.listen), metrics, prompts]
}

/// `ADDRESS:PORT`, or `NAME:PORT` with a name that this machine can look up; of several addresses, an IPv4 one.
fn address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    if !text.rsplit_once(':').is_some_and(|(name, port)| !name.is_empty() && port.parse::<u16>().is_ok()) {
        return Err("not an address and a port, such as 127.0.0.1:50051, [::1]:50051 or localhost:50051".into());
    }
    let found: Vec<SocketAddr> = text.to_socket_addrs().map_err(|error| format!("the name cannot be looked up: {error}"))?.collect();
    let preferred = found.iter().find(|address| address.is_ipv4()).or(found.first());
    preferred.copied().ok_or_else(|| "the name has no address".into())
}

/// A number from 0 to 1.
pub(super) fn share(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..=1.0).contains(&value) { Ok(value) } else { Err("not from 0 to 1".into()) }
}

/// Of a connection: with none nothing could be said, and a day is as good as for ever.
fn patience(text: &str) -> Result<Duration, String> {
    let range = Duration::from_millis(1)..=Duration::from_secs(86_400);
    seconds(text).and_then(|time| if range.contains(&time) { Ok(time) } else { Err("must be 0.001 to 86400 seconds".into()) })
}

/// A name as browsers say it, without the port. Nothing, as of an empty variable, is no name.
fn host_name(text: &str) -> Result<String, String> {
    let name = text.trim();
    if name.contains([':', '/']) {
        return Err("a name alone, as gpu1.example: without http:// and without a port".into());
    }
    Ok(name.to_owned())
}

/// Seconds as a number, with or without a fraction.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let value: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(value).map_err(|error| error.to_string())
}

// === impl ServeArgs ===

impl ServeArgs {
    /// Routing of requests that choose none.
    pub fn serving_routing(&self) -> RoutingRule {
        match self.top_k {
            Some(k) => RoutingChoice::TopK { k: k.into(), weight_form: None }.into(),
            None => self.routing.clone().unwrap_or_default(),
        }
    }

    /// The name that clients use.
    pub fn served_name(&self) -> String {
        let folder = || {
            let absolute = std::path::absolute(&self.model).ok()?;
            Some(absolute.file_name()?.to_string_lossy().into_owned())
        };
        self.model_name.clone().or_else(folder).unwrap_or_else(|| "model".into())
    }

    fn page_config(&self) -> PageConfig {
        PageConfig {
            mode: self.live_page,
            hosts: self.live_page_hosts.iter().filter(|name| !name.is_empty()).cloned().collect(),
            max_connections: self.metrics_max_connections as usize,
            idle_timeout: self.metrics_idle_timeout,
        }
    }

    fn engine_config(&self) -> EngineConfig {
        EngineConfig {
            max_batch_requests: self.max_batch_requests.get(),
            max_queue_requests: self.max_queue_requests,
            max_step_tokens: self.max_step_tokens.get(),
            max_new_tokens: self.max_new_tokens.get(),
            max_choices: self.max_choices.get(),
            event_buffer: self.event_buffer as usize,
            reader_timeout: self.reader_timeout,
            max_queue_tokens: self.max_queue_tokens,
            prefix_cache: self.cache.prefix_cache,
            priority_step: self.priority_step,
            shadow: self.fidelity.shadow(),
            measure: self.fidelity.measure(),
        }
    }
}

// === impl FidelityArgs ===

impl FidelityArgs {
    fn shadow(&self) -> ShadowConfig {
        ShadowConfig {
            rate: self.shadow_rate,
            budget: self.shadow_budget,
            queue: self.shadow_queue,
            max_tokens: self.shadow_max_tokens as usize,
            outlier_kl: self.shadow_outlier_kl,
        }
    }

    fn measure(&self) -> MeasureConfig {
        MeasureConfig { max_requests: self.max_measure_requests, max_tokens: self.max_measure_tokens as usize, budget: self.measure_budget }
    }
}

// === impl MetricsListen ===

impl FromStr for MetricsListen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            text => address(text).map(Self::At).map_err(|error| format!("{error}; or 'off'")),
        }
    }
}

impl fmt::Display for MetricsListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::At(address) => address.fmt(f),
        }
    }
}

// === loading ===

/// Loads the checkpoint and puts together what the server needs of it.
fn load_model(args: &ServeArgs) -> Result<Loaded> {
    let (checkpoint, weights) = load_tuned(&args.model, args.delta.as_deref(), args.compute.options(), true)?;
    let tokenizer = Arc::new(tokenizer(&checkpoint)?);
    let (spec, routing, engine) = (Arc::clone(weights.spec()), args.serving_routing(), args.engine_config());
    spec.layer_choices(&routing, "--routing")?;
    let service = ServiceConfig {
        model_name: args.served_name(),
        device: args.compute.device.to_string(),
        dtype: weights.dtype().to_owned(),
        routing,
        runtime_routing: args.runtime_routing == RuntimeRouting::On,
        sampling: SamplingDefaults::from(checkpoint.generation()),
        max_receive_bytes: args.max_receive_message_bytes.get(),
        max_tokenize_bytes: args.max_tokenize_bytes.get(),
        max_send_bytes: args.max_send_message_bytes.get(),
        series: args.series.options(),
    };
    tracing::info!(
        name = %service.model_name,
        family = %spec.family,
        layers = spec.layers.len(),
        device = %service.device,
        dtype = %service.dtype,
        serving_routing = %describe(&spec, &service.routing),
        reference_routing = %describe(&spec, &spec.reference.choice().into()),
        "model loaded"
    );
    tracing::info!(
        max_context_tokens = spec.max_context,
        max_batch_requests = engine.max_batch_requests,
        max_queue_requests = engine.max_queue_requests,
        max_queue_tokens = engine.max_queue_tokens,
        max_step_tokens = engine.max_step_tokens,
        max_new_tokens = engine.max_new_tokens,
        max_choices = engine.max_choices,
        max_receive_message_bytes = service.max_receive_bytes,
        max_tokenize_bytes = service.max_tokenize_bytes,
        max_send_message_bytes = service.max_send_bytes,
        "limits"
    );
    let eos_token_ids = checkpoint.generation().eos_token_ids.clone();
    let cache = args.cache.shape(&weights, &engine)?;
    tracing::info!(
        tokens = cache.tokens(),
        blocks = cache.num_blocks,
        block_tokens = cache.block_tokens,
        mebibytes = (cache.tokens() * KvCache::token_bytes(&spec, weights.cache_dtype())) >> 20,
        prefix_cache = ?engine.prefix_cache,
        "key-value cache"
    );
    tracing::info!(
        shadow_rate = engine.shadow.rate,
        shadow_budget = engine.shadow.budget,
        shadow_queue = engine.shadow.queue,
        shadow_max_tokens = engine.shadow.max_tokens,
        measure_budget = engine.measure.budget,
        max_measure_requests = engine.measure.max_requests,
        max_measure_tokens = engine.measure.max_tokens,
        "fidelity"
    );
    let tuning = args.tuning.setup().map(|setup| Registry::open(setup, checkpoint, weights.clone())).transpose()?;
    let (generation, weights) = tuning.as_ref().map_or((FIRST_GENERATION, weights), Registry::current);
    let model = weights.start(cache)?;
    Ok(Loaded { model, generation, background: Some(Box::new(weights)), tokenizer, eos_token_ids, engine, service, tuning })
}

/// The tokenizer, without the truncation and padding that training may have left in its file: a prompt that is too long
/// is refused, not shortened.
fn tokenizer(checkpoint: &Checkpoint) -> Result<Tokenizer> {
    let mut tokenizer = checkpoint.tokenizer()?;
    tokenizer.with_padding(None);
    let plain = tokenizer.with_truncation(None).map(|_| ());
    plain.map_err(|error| Error::Internal(format!("truncation cannot be turned off: {error}")))?;
    Ok(tokenizer)
}

/// What a rule comes to in the first MoE layer, where it is the same in all.
fn describe(spec: &ModelSpec, rule: &RoutingRule) -> String {
    let RoutingRule::Same(choice) = rule else { return rule.to_string() };
    match spec.moe_layers().next().map(|(_, moe)| moe.resolve(*choice, spec.reference)) {
        Some(Ok(policy)) if *choice == RoutingChoice::Native => format!("native, {policy}"),
        Some(Ok(policy)) => policy.to_string(),
        None | Some(Err(_)) => choice.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        serve: ServeArgs,
    }

    fn parse(flags: &[&str]) -> Result<ServeArgs, clap::Error> {
        Line::try_parse_from(std::iter::once("serve").chain(flags.iter().copied())).map(|line| line.serve)
    }

    #[test]
    fn routing_has_two_spellings_and_one_meaning() {
        assert_eq!(parse(&[]).unwrap().serving_routing(), RoutingRule::default());
        let one = RoutingRule::from(RoutingChoice::TopK { k: 1, weight_form: None });
        assert_eq!(parse(&["--top-k", "1"]).unwrap().serving_routing(), one);
        assert_eq!(parse(&["--routing", "top-1"]).unwrap().serving_routing(), one);
        let both = parse(&["--top-k", "1", "--routing", "top-1"]).unwrap_err();
        assert_eq!(both.kind(), clap::error::ErrorKind::ArgumentConflict);
        assert!(parse(&["--top-k", "3"]).is_err());
        assert!(parse(&["--routing", "top-one"]).is_err());
    }

    #[test]
    fn values_are_checked_when_they_are_read() {
        for flags in [
            ["--max-batch-requests", "0"],
            ["--priority-step", "x"],
            ["--listen", "50051"],
            ["--metrics-listen", "no"],
            ["--drain-grace", "-1"],
            ["--shadow-rate", "1.1"],
            ["--shadow-budget", "-0.1"],
            ["--measure-budget", "nan"],
            ["--shadow-max-tokens", "1"],
            ["--metrics-max-connections", "0"],
            ["--metrics-idle-timeout", "0"],
            ["--metrics-idle-timeout", "1e19"],
            ["--live-page-hosts", "gpu1.lan:9464"],
            ["--live-page-hosts", "http://gpu1.lan"],
            ["--max-tuning-tokens", "0"],
            ["--tuning-keep", "0"],
            ["--publish-watch", "86401"],
            ["--publish-max-gap-ratio", "0"],
            ["--publish-max-error-rate", "1.1"],
        ] {
            assert!(parse(&flags).is_err(), "{flags:?}");
        }
        for (text, expected) in [("127.0.0.1:7", "127.0.0.1:7"), ("[::1]:7", "[::1]:7")] {
            assert_eq!(address(text).unwrap().to_string(), expected);
        }
        assert!(address("localhost:7").is_ok_and(|address| address.ip().is_loopback() && address.port() == 7));
        for bad in ["", "7", ":7", "localhost", "localhost:", "localhost:x", "localhost:70000"] {
            assert!(address(bad).is_err_and(|error| error.contains("127.0.0.1:50051")), "{bad}");
        }
        assert_eq!(parse(&["--live-page-hosts", "a, b"]).unwrap().live_page_hosts, ["a", "b"]);
        assert_eq!(host_name("").as_deref(), Ok(""), "an empty variable is no error");
        let args = parse(&["--metrics-listen", "off", "--drain-timeout", "0.5"]).unwrap();
        assert_eq!(args.metrics_listen, MetricsListen::Off);
        assert_eq!(args.drain_timeout, Duration::from_millis(500));
    }

    #[test]
    fn tuning_has_a_folder_of_its_own() {
        assert!(parse(&["--tuning-data", "texts"]).unwrap().tuning.setup().is_none());
        let setup = parse(&["--tuning-dir", "t", "--tuning-data", "a,b", "--publish-watch", "0"]).unwrap().tuning.setup().unwrap();
        assert_eq!((setup.data, setup.keep, setup.guard.watch), (vec!["a".into(), "b".into()], 16, Duration::ZERO));
        // The folder has deltas of its own.
        assert!(parse(&["--tuning-dir", "t", "--delta", "d"]).is_err());
    }

    #[test]
    fn the_posture_knows_the_box_of_the_live_page() {
        let open = |flags: &[&str]| open_to(&parse(flags).unwrap());
        assert_eq!(open(&[]), ["this machine"; 3]);
        let wide = ["--listen", "0.0.0.0:1", "--metrics-listen", "0.0.0.0:2", "--live-page", "read-only"];
        assert_eq!(open(&wide[..4]), ["the network"; 3]);
        assert_eq!(open(&wide), ["the network", "the network", "nobody"]);
        assert_eq!(open(&["--metrics-listen", "off"]), ["this machine", "nobody", "nobody"]);
    }

    #[test]
    fn the_served_name_is_the_folder_unless_given() {
        assert_eq!(parse(&[]).unwrap().served_name(), "demo");
        assert_eq!(parse(&["--model", "some/where/"]).unwrap().served_name(), "where");
        assert_eq!(parse(&["--model-name", "x"]).unwrap().served_name(), "x");
        assert!(parse(&["--model-name", ""]).is_err(), "as an empty variable in a compose file would say");
    }
}
