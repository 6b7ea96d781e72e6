//! The one struct that everybody feeds: a [`Metrics`] is passed in, there is no global recorder. Everything is registered once, from the
//! [catalogue](super::catalog), and present from the start; [`Metrics::render`] is a page for Prometheus.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use ::metrics::{Counter, Gauge, Histogram};
use metrics_exporter_prometheus::PrometheusHandle;

use super::{
    catalog,
    expert_load::ExpertLoad,
    exposition::Exposition,
    fidelity::{Fidelity, FidelitySample, FidelitySnapshot},
    info,
    register::{self, counter, gauge, histogram},
    tuning::{Tuning, TuningCurves, TuningSnapshot},
};
pub use super::{
    config::{ExpertMetrics, MetricsAliases, MetricsConfig, SeriesOptions},
    expert_load::{ExpertLoadSnapshot, LayerLoadSnapshot, Scope},
    labels::{
        Age, Code, GradientPart, LayerMeasure, LossPart, Method, Mode, Outcome, OutputMeasure, Part, PublishOutcome, Rejection,
        RollbackReason, SampleOutcome, Side, Stage, TunedRouting, TuningState,
    },
};
use crate::{
    error::{Error, Result},
    moe::LayerRouting,
};

/// How often samples are moved from the histograms' buffers to their buckets if nobody scrapes.
const UPKEEP: Duration = Duration::from_secs(5);

/// A step of the engine.
#[derive(Clone, Copy, Debug, Default)]
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
    /// What the `_info` series show.
    facts: Mutex<MetricsConfig>,
    /// When the histograms' buffers were last emptied.
    last_upkeep: Mutex<Instant>,
    expert_load: Mutex<ExpertLoad>,
    /// `None`: it is not measured.
    fidelity: Option<Mutex<Fidelity>>,
    /// `None`: there is none.
    tuning: Option<Mutex<Tuning>>,
    /// Of each [`Method`], of each [`Code`].
    requests: Vec<Vec<Counter>>,
    finished: Vec<Counter>,
    rejections: Vec<Counter>,
    engine_panics: Counter,
    prompt_tokens: Counter,
    generated_tokens: Counter,
    /// Under each of its names.
    running: Vec<Gauge>,
    /// Under each of its names.
    waiting: Vec<Gauge>,
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
    /// Under each of its names.
    cache_usage: Vec<Gauge>,
    preemptions: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    generation: Gauge,
    generations_resident: Gauge,
    /// Of each [`Age`].
    generation_requests: Vec<Gauge>,
    /// Of each [`Mode`].
    mode: Vec<Gauge>,
}

impl Metrics {
    /// Registers everything, and logs how many series that makes. Fails only if the exporter refuses its configuration.
    pub fn new(config: &MetricsConfig) -> Result<Self> {
        let recorder = register::recorder(config.max_context);
        let recorder = recorder.map_err(|error| Error::Internal(format!("metrics exporter: {error}")))?;
        let detail = config.series.detail(&config.layers);
        let now = Instant::now();
        let load = ExpertLoad::new(config, detail, now);
        let metrics = ::metrics::with_local_recorder(&recorder, || Self::register(config, recorder.handle(), load, now));
        let fidelity = config.shadow.then(|| Mutex::new(Fidelity::new(config, detail, now)));
        let tuning = config.tuning.then(|| Mutex::new(Tuning::new(&config.model)));
        let metrics = Self { fidelity, tuning, ..metrics };
        metrics.set_generation(config.generation);
        metrics.set_mode(Mode::default());
        tracing::info!(series = num_series(&metrics.render()), experts = %detail, "metrics");
        Ok(metrics)
    }

    fn register(config: &MetricsConfig, page: PrometheusHandle, expert_load: ExpertLoad, now: Instant) -> Self {
        let model = &[config.model.as_str()][..];
        let by_method =
            |method: &Method| Code::ALL.iter().map(|code| counter(&catalog::REQUESTS, &[method.label(), code.label()])).collect();
        let with_alias = |family, alias| match config.series.aliases {
            MetricsAliases::None => vec![gauge(family, model)],
            MetricsAliases::Vllm => vec![gauge(family, model), gauge(alias, model)],
        };
        Self {
            page,
            facts: Mutex::new(config.clone()),
            last_upkeep: Mutex::new(now),
            expert_load: Mutex::new(expert_load),
            fidelity: None,
            tuning: None,
            requests: Method::ALL.iter().map(by_method).collect(),
            finished: Outcome::LABELS.iter().map(|reason| counter(&catalog::FINISHED, &[reason])).collect(),
            rejections: Rejection::LABELS.iter().map(|reason| counter(&catalog::REJECTIONS, &[reason])).collect(),
            engine_panics: counter(&catalog::ENGINE_PANICS, &[]),
            prompt_tokens: counter(&catalog::PROMPT_TOKENS, model),
            generated_tokens: counter(&catalog::GENERATED_TOKENS, model),
            running: with_alias(&catalog::RUNNING, &catalog::VLLM_RUNNING),
            waiting: with_alias(&catalog::WAITING, &catalog::VLLM_WAITING),
            time_to_first_token: histogram(&catalog::TIME_TO_FIRST_TOKEN, model),
            inter_token_latency: histogram(&catalog::INTER_TOKEN_LATENCY, model),
            request_seconds: histogram(&catalog::REQUEST_SECONDS, model),
            queue_seconds: histogram(&catalog::QUEUE_SECONDS, model),
            prefill_seconds: histogram(&catalog::PREFILL_SECONDS, model),
            decode_seconds: histogram(&catalog::DECODE_SECONDS, model),
            request_prompt_tokens: histogram(&catalog::REQUEST_PROMPT_TOKENS, model),
            request_generated_tokens: histogram(&catalog::REQUEST_GENERATED_TOKENS, model),
            step_tokens: histogram(&catalog::STEP_TOKENS, model),
            step_seconds: histogram(&catalog::STEP_SECONDS, model),
            step_requests: histogram(&catalog::STEP_REQUESTS, model),
            step_parts: Part::LABELS.iter().map(|part| histogram(&catalog::STEP_PART_SECONDS, &[&config.model, part])).collect(),
            time_per_output_token: histogram(&catalog::TIME_PER_OUTPUT_TOKEN, model),
            cache_usage: with_alias(&catalog::CACHE_USAGE, &catalog::VLLM_CACHE_USAGE),
            preemptions: counter(&catalog::PREEMPTIONS, model),
            prefix_queries: counter(&catalog::PREFIX_QUERIES, model),
            prefix_hits: counter(&catalog::PREFIX_HITS, model),
            generation: gauge(&catalog::GENERATION, model),
            generations_resident: gauge(&catalog::GENERATIONS_RESIDENT, model),
            generation_requests: Age::LABELS.iter().map(|age| gauge(&catalog::GENERATION_REQUESTS, &[&config.model, age])).collect(),
            mode: Mode::LABELS.iter().map(|mode| gauge(&catalog::MODE_OF_SERVER, &[&config.model, mode])).collect(),
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
        self.running.iter().for_each(|gauge| gauge.set(running as f64));
        self.waiting.iter().for_each(|gauge| gauge.set(waiting as f64));
    }

    /// Requests hold so many of all cache blocks.
    pub fn set_cache_usage(&self, held: usize, blocks: usize) {
        self.cache_usage.iter().for_each(|gauge| gauge.set(held as f64 / blocks.max(1) as f64));
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

    /// Requests that choose no routing are served by `serving` from now on, with `top_k` experts per token at most. Where that is another
    /// routing, [`Metrics::recent_fidelity`] begins anew.
    pub fn set_serving(&self, serving: String, top_k: usize) {
        let before = {
            let mut facts = lock(&self.facts);
            facts.top_k = top_k;
            std::mem::replace(&mut facts.serving, serving.clone())
        };
        if before != serving {
            self.with_fidelity(|fidelity| fidelity.restart_window(Instant::now()));
        }
    }

    /// Requests that come run on the weights of this generation from now on.
    pub fn set_generation(&self, generation: u64) {
        lock(&self.facts).generation = generation;
        self.generation.set(generation as f64);
    }

    /// Requests run on so many generations, the one in force included: so many on that one, so many on older ones.
    pub fn set_generations(&self, resident: usize, current_requests: usize, older_requests: usize) {
        self.generations_resident.set(resident as f64);
        self.generation_requests.iter().zip([current_requests, older_requests]).for_each(|(gauge, requests)| gauge.set(requests as f64));
    }

    /// The machine is given to these from now on.
    pub fn set_mode(&self, mode: Mode) {
        self.mode.iter().zip(Mode::ALL).for_each(|(gauge, &of)| gauge.set(if of == mode { 1.0 } else { 0.0 }));
    }

    /// A tuning job is like this now: at its begin and end, after each step and each evaluation.
    pub fn tuning(&self, snapshot: &TuningSnapshot) {
        self.with_tuning(|tuning| tuning.set(snapshot));
    }

    /// A tuning job has learned from so many tokens, or `skipped` the step.
    pub fn tuning_step(&self, tokens: usize, skipped: bool) {
        self.with_tuning(|tuning| tuning.step(tokens, skipped));
    }

    /// Tuning jobs of each state that the server keeps.
    pub fn set_tuning_jobs(&self, count: impl Fn(TuningState) -> usize) {
        self.with_tuning(|tuning| tuning.set_jobs(count));
    }

    /// The engine has waited so long for a piece of tuning.
    pub fn turn(&self, took: Duration) {
        self.with_tuning(|tuning| tuning.turn(took));
    }

    /// Somebody wanted a candidate in force, and this became of it. Where it is, after [`Metrics::set_generation`].
    pub fn published(&self, outcome: PublishOutcome) {
        let generation = lock(&self.facts).generation;
        self.with_tuning(|tuning| tuning.published(outcome, generation));
    }

    /// Older weights are in force again, after [`Metrics::set_generation`].
    pub fn rolled_back(&self, reason: RollbackReason) {
        let generation = lock(&self.facts).generation;
        self.with_tuning(|tuning| tuning.rolled_back(reason, generation));
    }

    /// What the experts were given.
    pub fn expert_load(&self, scope: Scope) -> ExpertLoadSnapshot {
        lock(&self.expert_load).snapshot(scope, Instant::now())
    }

    /// [`Scope::Total`] and [`Metrics::fidelity_snapshot`] count from here. The series of the page go on: counters do not fall.
    pub fn reset_statistics(&self) {
        let now = Instant::now();
        lock(&self.expert_load).reset(now);
        self.with_fidelity(|fidelity| fidelity.reset(now));
    }

    /// A shadow sample was measured.
    pub fn fidelity_sample(&self, sample: &FidelitySample) {
        self.with_fidelity(|fidelity| fidelity.at(Instant::now()).add(sample));
    }

    /// A shadow sample ended in another way.
    pub fn fidelity_outcome(&self, outcome: SampleOutcome) {
        self.with_fidelity(|fidelity| fidelity.at(Instant::now()).count(outcome));
    }

    /// Time went into shadow samples.
    pub fn fidelity_spent(&self, spent: Duration) {
        self.with_fidelity(|fidelity| fidelity.spend(spent));
    }

    /// So many shadow samples wait or are being measured.
    pub fn set_fidelity_pending(&self, samples: usize) {
        self.with_fidelity(|fidelity| fidelity.set_pending(samples));
    }

    /// Time in which samples were measured, since the start.
    pub fn measuring_seconds(&self) -> f64 {
        self.fidelity.as_ref().map_or(0.0, |fidelity| lock(fidelity).measuring_seconds())
    }

    /// The gap of the traffic since the start, or since the statistics were reset.
    pub fn fidelity_snapshot(&self) -> FidelitySnapshot {
        self.fidelity.as_ref().map(|fidelity| lock(fidelity).snapshot(Instant::now())).unwrap_or_default()
    }

    /// The gap of the last ten minutes, in steps of half a minute, and of the routing that is served now.
    pub fn recent_fidelity(&self) -> FidelitySnapshot {
        self.fidelity.as_ref().map(|fidelity| lock(fidelity).recent(Instant::now())).unwrap_or_default()
    }

    fn with_fidelity(&self, change: impl FnOnce(&mut Fidelity)) {
        if let Some(fidelity) = &self.fidelity {
            change(&mut lock(fidelity));
        }
    }

    fn with_tuning(&self, change: impl FnOnce(&mut Tuning)) {
        if let Some(tuning) = &self.tuning {
            change(&mut lock(tuning));
        }
    }

    /// The tuning job and its curves, and what was last put in force.
    pub(super) fn tuning_curves(&self) -> Option<TuningCurves> {
        self.tuning.as_ref().map(|tuning| lock(tuning).curves())
    }

    /// Every series in the Prometheus text format. Numbers are copied under the locks that steps of the engine wait for, and written after.
    pub fn render(&self) -> String {
        let load = lock(&self.expert_load).copy(Instant::now());
        let fidelity = self.fidelity.as_ref().map(|fidelity| lock(fidelity).copy());
        let mut experts = Exposition::default();
        load.write(&mut experts);
        fidelity.iter().for_each(|fidelity| fidelity.write(&mut experts));
        self.tuning.iter().for_each(|tuning| lock(tuning).write(&mut experts));
        let mut page = self.render_common() + &experts.finish();
        let mut size = Exposition::default();
        size.single(&catalog::METRICS_SERIES, &[], num_series(&page) as f64 + 1.0);
        page += &size.finish();
        page
    }

    /// The same without the series of experts, of the gap and of tuning.
    pub(super) fn render_common(&self) -> String {
        let mut facts = Exposition::default();
        info::write(&lock(&self.facts), &mut facts);
        self.page.render() + &facts.finish()
    }
}

/// Series of a page.
fn num_series(page: &str) -> usize {
    page.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).count()
}

/// A lock whose data are numbers: still good after a panic elsewhere.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
