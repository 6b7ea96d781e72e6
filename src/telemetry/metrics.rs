//! Every series that the server exports, registered once, with its HELP text, present from the start.
//!
//! A [`Metrics`] is passed to whoever feeds it; there is no global recorder. [`Metrics::render`] is a page for Prometheus.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use ::metrics::{Counter, Gauge, Histogram, Label};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

pub use super::expert_load::{ExpertLoadSnapshot, LayerLoadSnapshot, Scope};
use super::{expert_load::ExpertLoad, exposition::Exposition};
use crate::{
    error::{Error, ErrorKind, Result},
    moe::LayerRouting,
};

/// Buckets of the time to the first token, in seconds; those of vLLM, so that dashboards compare.
const FIRST_TOKEN_BUCKETS: &[f64] =
    &[0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0];

/// Buckets of the time per token or step, in seconds; those of vLLM with three smaller ones for small models.
const TOKEN_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];

/// Buckets of the time per request and of its parts, in seconds; those of vLLM.
const REQUEST_BUCKETS: &[f64] =
    &[0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0];

/// Buckets of the parts of a step, in seconds: the smallest are for the engine's own part.
const PART_BUCKETS: &[f64] = &[
    0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0,
];

/// Buckets of the requests of a step.
const BATCH_BUCKETS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

/// Buckets of the tokens of a step.
const STEP_BUCKETS: &[f64] = &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// How often samples are moved from the histograms' buffers to their buckets if nobody scrapes.
const UPKEEP: Duration = Duration::from_secs(5);

/// The facts that `_info` series show, and what decides which series there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MetricsConfig {
    /// Name of the served model; the `model` label of all series.
    pub model: String,
    /// Version of the server.
    pub version: String,
    /// Commit that the server was built from; `unknown` outside a repository.
    pub git: String,
    /// Where the model runs, for example `cpu`.
    pub device: String,
    /// Element type of the weights, for example `f32`.
    pub dtype: String,
    /// How the router was trained (`train.estimator` of the checkpoint).
    pub estimator: String,
    /// Routing in force when a request says nothing.
    pub serving: String,
    /// Routing that the checkpoint was trained under.
    pub reference: String,
    /// Of the weights in force.
    pub generation: u64,
    /// Decoder layers.
    pub num_layers: usize,
    /// MoE layers, as (decoder layer from 0, number of experts).
    pub layers: Vec<(usize, usize)>,
    /// Experts per token under the serving routing, the most of any layer.
    pub top_k: usize,
    /// Longest sequence, in tokens: the last bucket of the size histograms.
    pub max_context: usize,
    /// Tokens of a block of the cache.
    pub cache_block_tokens: usize,
    /// Blocks of the cache.
    pub cache_blocks: usize,
}

/// Labels of one kind, with the texts that they are exported as.
macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)+
        }

        impl $name {
            /// All of them: each has its series from the start.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The text of the label.
            pub fn label(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }
        }
    };
}

label! {
    /// Methods of the service.
    Method {
        /// Streaming continuation.
        Generate = "Generate",
        /// Log-probabilities.
        Score = "Score",
        /// Text to tokens.
        Tokenize = "Tokenize",
        /// Tokens to text.
        Detokenize = "Detokenize",
        /// Description of the model.
        GetModelInfo = "GetModelInfo",
        /// Experts of each token of a text.
        TraceRouting = "TraceRouting",
        /// Log-probabilities under given experts.
        ReplayRouting = "ReplayRouting",
        /// The routing in force.
        GetRoutingPolicy = "GetRoutingPolicy",
        /// Another routing from now on.
        SetRoutingPolicy = "SetRoutingPolicy",
    }
}

label! {
    /// Outcomes of a call, named as in gRPC. Those that this server never gives by itself are `Unknown`.
    Code {
        /// Success.
        Ok = "OK",
        /// The client went away.
        Cancelled = "CANCELLED",
        /// Anything else.
        Unknown = "UNKNOWN",
        /// A field can never be right.
        InvalidArgument = "INVALID_ARGUMENT",
        /// The deadline passed.
        DeadlineExceeded = "DEADLINE_EXCEEDED",
        /// Another model was asked for.
        NotFound = "NOT_FOUND",
        /// The queue was full.
        ResourceExhausted = "RESOURCE_EXHAUSTED",
        /// Refused in this mode.
        FailedPrecondition = "FAILED_PRECONDITION",
        /// Too large.
        OutOfRange = "OUT_OF_RANGE",
        /// The server has no such method, or does not read the encoding of the message.
        Unimplemented = "UNIMPLEMENTED",
        /// A bug.
        Internal = "INTERNAL",
        /// Draining.
        Unavailable = "UNAVAILABLE",
    }
}

label! {
    /// How a request that was let in ended.
    Outcome {
        /// Stop token or stop string.
        Stop = "stop",
        /// Limit of tokens; end of a score.
        Length = "length",
        /// The client went away.
        Cancelled = "cancelled",
        /// The deadline passed.
        Deadline = "deadline",
        /// Anything else.
        Error = "error",
    }
}

label! {
    /// Why a well-formed request was not let in.
    Rejection {
        /// Too many wait.
        QueueFull = "queue_full",
        /// It came too late.
        Deadline = "deadline",
        /// The server is stopping.
        Draining = "draining",
        /// The prompt does not fit into the context.
        TooLong = "too_long",
    }
}

label! {
    /// Where the time of a step goes.
    Part {
        /// Attention of all layers.
        Attention = "attention",
        /// Feed-forward parts of all layers.
        Experts = "experts",
        /// The rest of the forward: embedding, norms, head.
        Rest = "rest",
        /// Scheduling, sampling, sending.
        Engine = "engine",
    }
}

/// A step of the engine.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Requests in its batch.
    pub requests: usize,
    /// Tokens in its batch.
    pub tokens: usize,
    /// Duration of the forward.
    pub forward: Duration,
    /// Part of it.
    pub attention: Duration,
    /// Part of it.
    pub experts: Duration,
    /// What the engine did before and after.
    pub engine: Duration,
    /// What the routers did.
    pub layers: &'a [LayerRouting],
}

/// A request that ended well.
#[derive(Clone, Copy, Debug)]
pub struct Completed {
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// From submission to the end.
    pub total: Duration,
    /// From submission to the first step.
    pub queue: Duration,
    /// From there to the first token, or to the end of a score.
    pub prefill: Duration,
    /// What it generated; `None` for a score.
    pub generated: Option<Generated>,
}

/// The generation of a [`Completed`] request.
#[derive(Clone, Copy, Debug)]
pub struct Generated {
    /// Tokens.
    pub tokens: usize,
    /// From the first token to the last.
    pub decode: Duration,
}

/// Handles to every series.
#[derive(Debug)]
pub struct Metrics {
    page: PrometheusHandle,
    /// When the histograms' buffers were last emptied.
    last_upkeep: Mutex<Instant>,
    expert_load: Mutex<ExpertLoad>,
    /// Of each [`Method`], of each [`Code`].
    requests: Vec<Vec<Counter>>,
    finished: Vec<Counter>,
    rejections: Vec<Counter>,
    engine_panics: Counter,
    prompt_tokens: Counter,
    generated_tokens: Counter,
    running: Gauge,
    waiting: Gauge,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    request_seconds: Histogram,
    queue_seconds: Histogram,
    prefill_seconds: Histogram,
    decode_seconds: Histogram,
    request_prompt_tokens: Histogram,
    request_generated_tokens: Histogram,
    step_tokens: Histogram,
    step_seconds: Histogram,
    step_requests: Histogram,
    /// Of each [`Part`].
    step_parts: Vec<Histogram>,
    time_per_output_token: Histogram,
    cache_usage: Gauge,
    preemptions: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
}

impl Metrics {
    /// Registers everything. Fails only if the exporter refuses its configuration.
    pub fn new(config: &MetricsConfig) -> Result<Self> {
        let recorder = builder(config).map_err(|error| Error::Internal(format!("metrics exporter: {error}")))?.build_recorder();
        ::metrics::with_local_recorder(&recorder, || info(config));
        Ok(::metrics::with_local_recorder(&recorder, || Self::register(config, recorder.handle())))
    }

    fn register(config: &MetricsConfig, page: PrometheusHandle) -> Self {
        let model = || vec![Label::new("model", config.model.clone())];
        let help = "Calls of the gRPC service that have ended, by method and status.";
        let requests = Method::ALL
            .iter()
            .map(|method| {
                let labels = |code: &Code| vec![Label::new("method", method.label()), Label::new("code", code.label())];
                Code::ALL.iter().map(|code| counter("hardmax_requests_total", help, labels(code))).collect()
            })
            .collect();
        let by_reason = |name, help, reasons: Vec<&'static str>| {
            reasons.into_iter().map(|reason| counter(name, help, vec![Label::new("reason", reason)])).collect()
        };
        let outcomes = Outcome::ALL.iter().map(|outcome| outcome.label()).collect();
        let rejections = Rejection::ALL.iter().map(|rejection| rejection.label()).collect();
        let seconds = |name, help| histogram(name, help, model());
        let now = Instant::now();
        Self {
            page,
            last_upkeep: Mutex::new(now),
            expert_load: Mutex::new(ExpertLoad::new(&config.model, &config.layers, now)),
            requests,
            finished: by_reason("hardmax_request_finished_total", "Requests that left the engine, by the reason of their end.", outcomes),
            rejections: by_reason(
                "hardmax_admission_rejections_total",
                "Well-formed requests that were not let into the engine, by reason.",
                rejections,
            ),
            engine_panics: counter("hardmax_engine_panics_total", "Panics in the engine's thread; their requests failed.", Vec::new()),
            prompt_tokens: counter(
                "hardmax_prompt_tokens_total",
                "Tokens of prompts that the model has read; not those found in the cache, and those of a preempted request again.",
                model(),
            ),
            generated_tokens: counter("hardmax_generated_tokens_total", "Tokens that the model has generated.", model()),
            running: gauge("hardmax_requests_running", "Requests in the batch now.", model()),
            waiting: gauge("hardmax_requests_waiting", "Requests in the queue now.", model()),
            time_to_first_token: seconds("hardmax_time_to_first_token_seconds", "From submission to the first generated token."),
            inter_token_latency: seconds("hardmax_inter_token_latency_seconds", "Between two generated tokens of a request."),
            request_seconds: seconds("hardmax_request_seconds", "From submission to the end, of requests that ended well."),
            queue_seconds: seconds("hardmax_queue_seconds", "From submission to the first step, of requests that ended well."),
            prefill_seconds: seconds(
                "hardmax_prefill_seconds",
                "From the first step to the first token, or to the end of a score, of requests that ended well.",
            ),
            decode_seconds: seconds("hardmax_decode_seconds", "From the first token to the last, of generations that ended well."),
            request_prompt_tokens: histogram(
                "hardmax_request_prompt_tokens",
                "Tokens of the prompt, of requests that ended well.",
                model(),
            ),
            request_generated_tokens: histogram(
                "hardmax_request_generated_tokens",
                "Tokens generated, of generations that ended well.",
                model(),
            ),
            step_tokens: histogram("hardmax_step_tokens", "Tokens of one step of the model, over all requests.", model()),
            step_seconds: seconds("hardmax_step_seconds", "Duration of one step of the model."),
            step_requests: histogram("hardmax_step_requests", "Requests in one step of the model.", model()),
            step_parts: Part::ALL
                .iter()
                .map(|part| {
                    let help = "Duration of the parts of a step: the model's attention, experts and rest, and the engine around it.";
                    let labels = vec![Label::new("model", config.model.clone()), Label::new("part", part.label())];
                    histogram("hardmax_step_part_seconds", help, labels)
                })
                .collect(),
            time_per_output_token: seconds(
                "hardmax_time_per_output_token_seconds",
                "Mean time between two tokens of a request, of generations of at least two tokens that ended well.",
            ),
            cache_usage: gauge("hardmax_kv_cache_usage_ratio", "Share of the cache blocks that requests hold, 0 to 1.", model()),
            preemptions: counter("hardmax_preemptions_total", "Requests that lost their place in the batch to others.", model()),
            prefix_queries: counter(
                "hardmax_prefix_cache_queries_total",
                "Tokens of admitted requests that were looked for in the cache.",
                model(),
            ),
            prefix_hits: counter("hardmax_prefix_cache_hits_total", "Tokens that were found there and not computed again.", model()),
        }
    }

    /// A call of the service has ended.
    pub fn request(&self, method: Method, code: Code) {
        if let Some(counter) = self.requests.get(method as usize).and_then(|codes| codes.get(code as usize)) {
            counter.increment(1);
        }
    }

    /// A request was not let in.
    pub fn rejected(&self, reason: Rejection) {
        if let Some(counter) = self.rejections.get(reason as usize) {
            counter.increment(1);
        }
    }

    /// A request that was let in has ended.
    pub fn finished(&self, outcome: Outcome) {
        if let Some(counter) = self.finished.get(outcome as usize) {
            counter.increment(1);
        }
    }

    /// It ended well.
    pub fn completed(&self, request: &Completed) {
        self.request_seconds.record(request.total);
        self.queue_seconds.record(request.queue);
        self.prefill_seconds.record(request.prefill);
        self.request_prompt_tokens.record(request.prompt_tokens as f64);
        if let Some(generated) = request.generated {
            self.decode_seconds.record(generated.decode);
            self.request_generated_tokens.record(generated.tokens as f64);
            if let Some(gaps) = u32::try_from(generated.tokens).ok().and_then(|tokens| tokens.checked_sub(1)).filter(|&gaps| gaps > 0) {
                self.time_per_output_token.record(generated.decode / gaps);
            }
        }
    }

    /// Requests in the engine now.
    pub fn set_requests(&self, running: usize, waiting: usize) {
        self.running.set(running as f64);
        self.waiting.set(waiting as f64);
    }

    /// Requests hold so many of all cache blocks.
    pub fn set_cache_usage(&self, held: usize, blocks: usize) {
        self.cache_usage.set(held as f64 / blocks.max(1) as f64);
    }

    /// A request lost its place.
    pub fn preempted(&self) {
        self.preemptions.increment(1);
    }

    /// Of so many tokens, so many were in the cache.
    pub fn prefix(&self, queried: usize, hit: usize) {
        self.prefix_queries.increment(queried as u64);
        self.prefix_hits.increment(hit as u64);
    }

    /// The model has read this much of a prompt.
    pub fn prompt_computed(&self, tokens: usize) {
        self.prompt_tokens.increment(tokens as u64);
    }

    /// A request has its first token, this long after it was submitted.
    pub fn first_token(&self, since_submission: Duration) {
        self.generated_tokens.increment(1);
        self.time_to_first_token.record(since_submission);
    }

    /// A request has another token, this long after the one before.
    pub fn next_token(&self, since_last: Duration) {
        self.generated_tokens.increment(1);
        self.inter_token_latency.record(since_last);
    }

    /// A panic was caught in the engine's thread.
    pub fn engine_panicked(&self) {
        self.engine_panics.increment(1);
    }

    /// A step is done. Also keeps the buffers of the histograms short when nobody scrapes.
    pub fn observe_step(&self, step: &Step<'_>) {
        self.step_requests.record(step.requests as f64);
        self.step_tokens.record(step.tokens as f64);
        self.step_seconds.record(step.forward);
        let rest = step.forward.saturating_sub(step.attention).saturating_sub(step.experts);
        for (histogram, part) in self.step_parts.iter().zip([step.attention, step.experts, rest, step.engine]) {
            histogram.record(part);
        }
        let now = Instant::now();
        lock(&self.expert_load).add(step.layers, now);
        let mut last = lock(&self.last_upkeep);
        if now.saturating_duration_since(*last) >= UPKEEP {
            *last = now;
            self.page.run_upkeep();
        }
    }

    /// Every series in the Prometheus text format.
    pub fn render(&self) -> String {
        let mut experts = Exposition::default();
        lock(&self.expert_load).write(&mut experts, Instant::now());
        self.render_common() + &experts.finish()
    }

    /// The same without the series of experts.
    pub(super) fn render_common(&self) -> String {
        self.page.render()
    }

    /// What each expert was given.
    pub fn expert_load(&self, scope: Scope) -> ExpertLoadSnapshot {
        lock(&self.expert_load).snapshot(scope, Instant::now())
    }
}

impl Code {
    /// From the number that gRPC gives a code.
    pub fn from_number(number: i32) -> Self {
        match number {
            0 => Self::Ok,
            1 => Self::Cancelled,
            3 => Self::InvalidArgument,
            4 => Self::DeadlineExceeded,
            5 => Self::NotFound,
            8 => Self::ResourceExhausted,
            9 => Self::FailedPrecondition,
            11 => Self::OutOfRange,
            12 => Self::Unimplemented,
            13 => Self::Internal,
            14 => Self::Unavailable,
            _ => Self::Unknown,
        }
    }
}

impl From<ErrorKind> for Code {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::InvalidArgument => Self::InvalidArgument,
            ErrorKind::OutOfRange => Self::OutOfRange,
            ErrorKind::NotFound => Self::NotFound,
            ErrorKind::FailedPrecondition => Self::FailedPrecondition,
            ErrorKind::ResourceExhausted => Self::ResourceExhausted,
            ErrorKind::Unavailable => Self::Unavailable,
            ErrorKind::DeadlineExceeded => Self::DeadlineExceeded,
            ErrorKind::Cancelled => Self::Cancelled,
            ErrorKind::Internal => Self::Internal,
        }
    }
}

/// A lock whose data are numbers: still good after a panic elsewhere.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn builder(config: &MetricsConfig) -> std::result::Result<PrometheusBuilder, metrics_exporter_prometheus::BuildError> {
    let sizes = sizes_up_to(config.max_context);
    let buckets: [(&str, &[f64]); 13] = [
        ("hardmax_time_to_first_token_seconds", FIRST_TOKEN_BUCKETS),
        ("hardmax_inter_token_latency_seconds", TOKEN_BUCKETS),
        ("hardmax_step_seconds", TOKEN_BUCKETS),
        ("hardmax_request_seconds", REQUEST_BUCKETS),
        ("hardmax_queue_seconds", REQUEST_BUCKETS),
        ("hardmax_prefill_seconds", REQUEST_BUCKETS),
        ("hardmax_decode_seconds", REQUEST_BUCKETS),
        ("hardmax_request_prompt_tokens", &sizes),
        ("hardmax_request_generated_tokens", &sizes),
        ("hardmax_step_tokens", STEP_BUCKETS),
        ("hardmax_step_requests", BATCH_BUCKETS),
        ("hardmax_step_part_seconds", PART_BUCKETS),
        ("hardmax_time_per_output_token_seconds", TOKEN_BUCKETS),
    ];
    buckets.into_iter().try_fold(PrometheusBuilder::new(), |builder, (name, buckets)| {
        builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)
    })
}

/// 1, 2, 5, 10, 20, ... and then `limit`.
fn sizes_up_to(limit: usize) -> Vec<f64> {
    let limit = limit.max(1) as f64;
    let series = (0..).flat_map(|power| [1.0, 2.0, 5.0].map(|step| step * 10f64.powi(power)));
    series.take_while(|&size| size < limit).chain([limit]).collect()
}

fn info(config: &MetricsConfig) {
    let labels = |pairs: &[(&'static str, &str)]| pairs.iter().map(|&(key, value)| Label::new(key, value.to_owned())).collect();
    let experts = config.layers.iter().map(|&(_, experts)| experts).max().unwrap_or(0);
    let build = labels(&[("version", &config.version), ("git", &config.git)]);
    gauge("hardmax_build_info", "The server; always 1.", build).set(1.0);
    let model = labels(&[
        ("model", &config.model),
        ("generation", &config.generation.to_string()),
        ("dtype", &config.dtype),
        ("device", &config.device),
        ("layers", &config.num_layers.to_string()),
        ("experts", &experts.to_string()),
        ("top_k", &config.top_k.to_string()),
    ]);
    gauge("hardmax_model_info", "The served model; always 1.", model).set(1.0);
    let routing = labels(&[
        ("model", &config.model),
        ("serving", &config.serving),
        ("reference", &config.reference),
        ("estimator", &config.estimator),
    ]);
    let help = "Routing in force, routing of the training, and how the router was trained; always 1.";
    gauge("hardmax_routing_info", help, routing).set(1.0);
    let cache = labels(&[
        ("model", &config.model),
        ("block_size", &config.cache_block_tokens.to_string()),
        ("num_blocks", &config.cache_blocks.to_string()),
    ]);
    gauge("hardmax_kv_cache_info", "Tokens of a cache block, and cache blocks; always 1.", cache).set(1.0);
}

fn counter(name: &'static str, help: &'static str, labels: Vec<Label>) -> Counter {
    ::metrics::describe_counter!(name, help);
    ::metrics::counter!(name, labels)
}

fn gauge(name: &'static str, help: &'static str, labels: Vec<Label>) -> Gauge {
    ::metrics::describe_gauge!(name, help);
    ::metrics::gauge!(name, labels)
}

fn histogram(name: &'static str, help: &'static str, labels: Vec<Label>) -> Histogram {
    ::metrics::describe_histogram!(name, help);
    ::metrics::histogram!(name, labels)
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;

    fn metrics() -> Metrics {
        let config = MetricsConfig {
            model: "demo \"x\"".into(),
            version: "0.1.0".into(),
            git: "unknown".into(),
            layers: vec![(0, 4), (2, 8)],
            num_layers: 3,
            top_k: 1,
            max_context: 128,
            ..MetricsConfig::default()
        };
        Metrics::new(&config).unwrap()
    }

    /// Types by family, and values by series.
    fn parse(text: &str) -> (HashMap<String, String>, HashMap<String, f64>) {
        let (mut types, mut helped, mut values) = (HashMap::new(), HashSet::new(), HashMap::new());
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(types.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} twice");
                assert!(helped.contains(name), "{name} has no HELP before its TYPE");
            } else if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                assert!(help.ends_with('.'), "{line}");
                helped.insert(name.to_owned());
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let name = series.split('{').next().unwrap();
                let family =
                    ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix).filter(|f| types.contains_key(*f)));
                assert!(types.contains_key(family.unwrap_or(name)), "{series} has no TYPE");
                assert!(values.insert(series.to_owned(), value.parse().unwrap()).is_none(), "{series} twice");
            }
        }
        (types, values)
    }

    #[test]
    fn everything_is_there_from_the_start() {
        let (types, values) = parse(&metrics().render());
        let expected = [
            ("requests_total", "counter"),
            ("request_finished_total", "counter"),
            ("admission_rejections_total", "counter"),
            ("engine_panics_total", "counter"),
            ("requests_running", "gauge"),
            ("requests_waiting", "gauge"),
            ("prompt_tokens_total", "counter"),
            ("generated_tokens_total", "counter"),
            ("time_to_first_token_seconds", "histogram"),
            ("inter_token_latency_seconds", "histogram"),
            ("request_seconds", "histogram"),
            ("queue_seconds", "histogram"),
            ("prefill_seconds", "histogram"),
            ("decode_seconds", "histogram"),
            ("request_prompt_tokens", "histogram"),
            ("request_generated_tokens", "histogram"),
            ("step_tokens", "histogram"),
            ("step_seconds", "histogram"),
            ("step_requests", "histogram"),
            ("step_part_seconds", "histogram"),
            ("time_per_output_token_seconds", "histogram"),
            ("kv_cache_usage_ratio", "gauge"),
            ("kv_cache_info", "gauge"),
            ("preemptions_total", "counter"),
            ("prefix_cache_queries_total", "counter"),
            ("prefix_cache_hits_total", "counter"),
            ("build_info", "gauge"),
            ("model_info", "gauge"),
            ("routing_info", "gauge"),
            ("expert_tokens_total", "counter"),
            ("expert_weight_sum_total", "counter"),
            ("expert_utilization_ratio", "gauge"),
            ("layer_balancedness_ratio", "gauge"),
            ("layer_load_cv", "gauge"),
            ("dead_experts", "gauge"),
            ("router_entropy_nats", "gauge"),
            ("router_non_finite_tokens_total", "counter"),
        ];
        let expected: HashMap<String, String> =
            expected.iter().map(|(name, kind)| (format!("hardmax_{name}"), (*kind).to_owned())).collect();
        assert_eq!(types, expected);
        for (series, value) in &values {
            assert_eq!(*value, if series.contains("_info{") { 1.0 } else { 0.0 }, "{series}");
        }
        let count = |prefix: &str| values.keys().filter(|series| series.starts_with(prefix)).count();
        assert_eq!(count("hardmax_requests_total{"), Method::ALL.len() * Code::ALL.len());
        assert_eq!(count("hardmax_request_finished_total{"), Outcome::ALL.len());
        assert_eq!(count("hardmax_admission_rejections_total{"), Rejection::ALL.len());
        assert_eq!(count("hardmax_expert_tokens_total{"), 12);
        assert_eq!(count("hardmax_time_to_first_token_seconds_bucket{"), FIRST_TOKEN_BUCKETS.len() + 1);
        assert_eq!(values["hardmax_routing_info{model=\"demo \\\"x\\\"\",serving=\"\",reference=\"\",estimator=\"\"}"], 1.0);
    }

    #[test]
    fn labels_match_their_counters() {
        let metrics = metrics();
        for (n, &method) in Method::ALL.iter().enumerate() {
            (0..=n).for_each(|_| metrics.request(method, Code::InvalidArgument));
        }
        for (n, &outcome) in Outcome::ALL.iter().enumerate() {
            (0..=n).for_each(|_| metrics.finished(outcome));
        }
        for (n, &rejection) in Rejection::ALL.iter().enumerate() {
            (0..=n).for_each(|_| metrics.rejected(rejection));
        }
        let (_, values) = parse(&metrics.render());
        for (n, method) in Method::ALL.iter().enumerate() {
            let series = |code: &str| format!("hardmax_requests_total{{method=\"{}\",code=\"{code}\"}}", method.label());
            assert_eq!((values[&series("INVALID_ARGUMENT")], values[&series("OK")]), (n as f64 + 1.0, 0.0));
        }
        for (n, outcome) in Outcome::ALL.iter().enumerate() {
            assert_eq!(values[&format!("hardmax_request_finished_total{{reason=\"{}\"}}", outcome.label())], n as f64 + 1.0);
        }
        for (n, rejection) in Rejection::ALL.iter().enumerate() {
            assert_eq!(values[&format!("hardmax_admission_rejections_total{{reason=\"{}\"}}", rejection.label())], n as f64 + 1.0);
        }
    }

    #[test]
    fn histograms_count_seconds() {
        let metrics = metrics();
        metrics.first_token(Duration::from_millis(30));
        metrics.next_token(Duration::from_millis(2));
        let [attention, experts, engine] = [1000, 2000, 30].map(Duration::from_micros);
        metrics.observe_step(&Step { requests: 3, tokens: 9, forward: Duration::from_millis(4), attention, experts, engine, layers: &[] });
        metrics.set_cache_usage(3, 12);
        metrics.preempted();
        metrics.prefix(20, 16);
        metrics.completed(&Completed {
            prompt_tokens: 7,
            total: Duration::from_secs(2),
            queue: Duration::ZERO,
            prefill: Duration::ZERO,
            generated: Some(Generated { tokens: 3, decode: Duration::from_secs(1) }),
        });
        let (_, values) = parse(&metrics.render());
        let model = "model=\"demo \\\"x\\\"\"";
        assert_eq!(values[&format!("hardmax_time_to_first_token_seconds_bucket{{{model},le=\"0.02\"}}")], 0.0);
        assert_eq!(values[&format!("hardmax_time_to_first_token_seconds_bucket{{{model},le=\"0.04\"}}")], 1.0);
        assert_eq!(values[&format!("hardmax_inter_token_latency_seconds_bucket{{{model},le=\"0.0025\"}}")], 1.0);
        assert_eq!(values[&format!("hardmax_request_seconds_sum{{{model}}}")], 2.0);
        assert_eq!(values[&format!("hardmax_request_prompt_tokens_bucket{{{model},le=\"10\"}}")], 1.0);
        assert_eq!(values[&format!("hardmax_step_tokens_bucket{{{model},le=\"8\"}}")], 0.0);
        assert_eq!(values[&format!("hardmax_generated_tokens_total{{{model}}}")], 2.0);
        assert_eq!(values[&format!("hardmax_time_per_output_token_seconds_sum{{{model}}}")], 0.5);
        assert_eq!(values[&format!("hardmax_step_requests_bucket{{{model},le=\"2\"}}")], 0.0);
        for (part, seconds) in [("attention", 0.001), ("experts", 0.002), ("rest", 0.001), ("engine", 0.000_03)] {
            assert_eq!(values[&format!("hardmax_step_part_seconds_sum{{{model},part=\"{part}\"}}")], seconds);
        }
        assert_eq!(values[&format!("hardmax_kv_cache_usage_ratio{{{model}}}")], 0.25);
        assert_eq!(values[&format!("hardmax_prefix_cache_hits_total{{{model}}}")], 16.0);
        assert_eq!(values[&format!("hardmax_kv_cache_info{{{model},block_size=\"0\",num_blocks=\"0\"}}")], 1.0);
    }

    #[test]
    fn codes_have_the_numbers_of_grpc() {
        assert_eq!(Code::from_number(0), Code::Ok);
        assert_eq!(Code::from_number(8), Code::ResourceExhausted);
        assert_eq!(Code::from_number(14), Code::Unavailable);
        assert_eq!(Code::from_number(12), Code::Unimplemented);
        assert_eq!([2, 99, -1].map(Code::from_number), [Code::Unknown; 3]);
        assert_eq!(Code::from(ErrorKind::OutOfRange), Code::OutOfRange);
    }

    #[test]
    fn sizes_end_at_the_context() {
        assert_eq!(sizes_up_to(30), [1.0, 2.0, 5.0, 10.0, 20.0, 30.0]);
        assert_eq!(sizes_up_to(20), [1.0, 2.0, 5.0, 10.0, 20.0]);
        assert_eq!(sizes_up_to(0), [1.0]);
    }
}
