//! Work of the engine's thread below requests: shadow samples of what was served, and measurements that somebody asked for.
//!
//! Both run several routings side by side over tokens, piece by piece, on models of their own over the weights that are served: a sample
//! on those that served it, a measurement on those in force at its first piece, and each keeps them until its end. The worker gives them a
//! turn after each of its steps. While requests run, a piece runs only where its share of the time pays for it; while none does, pieces
//! follow one another, and a request that comes waits for one of them. What goes wrong here ends a sample or a measurement and nothing
//! else. Nothing is allocated before there is something to measure.

use std::{
    any::Any,
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{EngineConfig, measure::Measurement, sequence::Sequence, status::Shared, worker::Clock};
use crate::{
    error::{Error, Result},
    fidelity::{
        case::Case,
        pacing::{Credit, PieceSize},
        probe::{LayerProbe, Probe},
        run::{Chunk, OutputValues, SideBySide},
        shadow::{Dropped, Shadow, ShadowChoice, ShadowConfig},
        summary::{KEPT, Values},
    },
    model::{CacheShape, ModelSpec, Observable, load::ServingModel},
    moe::policy::LayerChoices,
    telemetry::{
        fidelity::{FidelitySample, LayerSample, TokenValues},
        metrics::SampleOutcome,
    },
};

/// Routings of a sample: the reference, and the one that it was served under.
const SIDES: usize = 2;

/// Makes models over the weights that are served, each with a cache of its own, on the engine's thread.
pub trait ObservableSource: Send + Sync {
    /// A model with an empty cache of this size.
    fn start(&self, cache: CacheShape) -> Result<Box<dyn Observable>>;
}

impl ObservableSource for ServingModel {
    fn start(&self, cache: CacheShape) -> Result<Box<dyn Observable>> {
        self.start_observable(cache)
    }
}

/// Models over the weights of one generation.
#[derive(Clone)]
pub(super) struct Source {
    pub(super) generation: u64,
    pub(super) models: Arc<dyn ObservableSource>,
}

/// Routings side by side, with what is seen of their layers.
#[derive(Debug)]
pub(super) struct Probed {
    pub(super) sides: SideBySide,
    pub(super) probe: Probe,
}

/// What the worker has just done for requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Load {
    /// Nothing: there is none that can go on.
    Idle,
    /// A step, which took so long.
    Busy(Duration),
}

/// All work below requests.
pub(super) struct Background {
    /// Of the generation in force.
    source: Option<Source>,
    spec: ModelSpec,
    shared: Arc<Shared>,
    shadows: Shadows,
    measurements: Measurements,
    /// Whose turn it is where both could have it.
    shadow_next: bool,
}

/// Samples of what was served.
struct Shadows {
    waiting: Shadow<Sample>,
    /// The one that is measured.
    current: Option<(Sample, Probed)>,
    /// The model between two samples, of the generation in force.
    resting: Option<Box<dyn Observable>>,
    credit: Credit,
    size: PieceSize,
}

/// What was served.
struct Sample {
    origin: Origin,
    source: Source,
    tokens: Vec<u32>,
    /// The reference first.
    cases: [Case; SIDES],
}

/// Where a sample came from, for the log.
struct Origin {
    request: Arc<str>,
    trace_id: Option<Arc<str>>,
}

/// Measurements, of which the first runs.
struct Measurements {
    queue: VecDeque<Measurement>,
    credit: Credit,
    /// For as many routings as the last one had.
    size: PieceSize,
}

impl Probed {
    /// On `model` if there is one, else on a new one for windows of at most `longest` tokens.
    pub(super) fn start(
        source: &Source,
        spec: &ModelSpec,
        model: Option<Box<dyn Observable>>,
        cases: &[Case],
        longest: usize,
    ) -> Result<Self> {
        let probe = Probe::of_gaps(spec, cases)?;
        let model = model.map_or_else(|| source.models.start(SideBySide::cache(cases.len(), longest)), Ok)?;
        Ok(Self { sides: SideBySide::new(model, cases.to_vec()), probe })
    }

    pub(super) fn step(&mut self, window: &[u32], most: usize) -> Result<Chunk> {
        self.sides.step(window, most, Some(&mut self.probe))
    }
}

impl Background {
    /// Without a source nothing is ever measured.
    pub(super) fn new(source: Option<Source>, spec: ModelSpec, config: &EngineConfig, shared: Arc<Shared>) -> Self {
        let shadow = if source.is_some() { config.shadow.clone() } else { ShadowConfig::off() };
        let shadows = Shadows {
            credit: Credit::new(shadow.budget),
            waiting: Shadow::new(shadow, rand::random()),
            current: None,
            resting: None,
            size: PieceSize::new(SIDES),
        };
        let credit = Credit::new(config.measure.budget);
        let measurements = Measurements { queue: VecDeque::new(), credit, size: PieceSize::new(1) };
        Self { source, spec, shared, shadows, measurements, shadow_next: true }
    }

    /// Other weights are in force: what begins from now on is measured on models of `source`.
    pub(super) fn publish(&mut self, source: Option<Source>) {
        self.source = source;
        self.shadows.resting = None;
    }

    /// A sequence has ended well: its tokens may become a sample.
    pub(super) fn offer(&mut self, sequence: &Sequence, now: Instant) {
        // Given experts are no routing to be judged.
        let replayed = matches!(sequence.routing, LayerChoices::Replay { .. });
        if replayed || !self.shadows.waiting.takes(sequence.shadow) {
            return;
        }
        let Some(source) = &sequence.generation.source else { return };
        match self.take(sequence, source, now) {
            Ok(()) => self.show_pending(),
            Err(outcome) => self.shared.metrics.fidelity_outcome(outcome),
        }
    }

    /// Puts a sequence in the queue of samples, or says why not.
    fn take(&mut self, sequence: &Sequence, source: &Source, now: Instant) -> Result<(), SampleOutcome> {
        let reference = Case::from(self.spec.reference.choice());
        let served = Case { name: "serving".into(), choices: sequence.routing.clone() };
        if sequence.shadow != ShadowChoice::Always && !in_force(&self.shared, &self.spec, &served.choices) {
            return Err(SampleOutcome::OtherRouting);
        }
        if same(&self.spec, &reference.choices, &served.choices) {
            return Err(SampleOutcome::Same);
        }
        let most = self.shadows.longest(&self.spec);
        let tokens = &sequence.tokens()[..sequence.tokens().len().min(most)];
        let origin = || Origin { request: sequence.name.clone(), trace_id: sequence.trace_id.clone() };
        let sample = || Sample { origin: origin(), source: source.clone(), tokens: tokens.to_vec(), cases: [reference, served] };
        self.shadows.waiting.push(sequence.shadow, tokens.len(), now, sample).map_err(outcome)
    }

    pub(super) fn measure(&mut self, measurement: Measurement) {
        self.measurements.queue.push_back(measurement);
    }

    fn is_empty(&self) -> bool {
        self.shadows.is_empty() && self.measurements.queue.is_empty()
    }

    /// Runs a piece if there is one and it may run now. Whether another one could follow at once.
    pub(super) fn turn(&mut self, load: Load, clock: &Clock) -> bool {
        if let Load::Busy(worked) = load {
            self.shadows.credit.earn(worked, self.shadows.size.cost());
            self.measurements.credit.earn(worked, self.measurements.size.cost());
        }
        if self.is_empty() {
            return false;
        }
        if self.shared.status.borrow().draining {
            self.end(SampleOutcome::DroppedDraining, || Error::Draining);
            return false;
        }
        self.sweep(clock());
        let idle = load == Load::Idle;
        let shadow = !self.shadows.is_empty() && (idle || self.shadows.credit.affords(self.shadows.size.cost()));
        let measure = !self.measurements.queue.is_empty() && (idle || self.measurements.credit.affords(self.measurements.size.cost()));
        if shadow && (self.shadow_next || !measure) {
            self.shadow_next = false;
            self.shadow_piece(idle);
        } else if measure {
            self.shadow_next = true;
            self.measure_piece(idle);
        }
        idle && !self.is_empty()
    }

    /// Drops what has waited for too long, and what nobody waits for.
    fn sweep(&mut self, now: Instant) {
        for dropped in self.shadows.waiting.expire(now) {
            self.drop_samples(1, outcome(dropped));
        }
        let queue = &mut self.measurements.queue;
        for _ in 0..queue.len() {
            let Some(measurement) = queue.pop_front() else { return };
            if measurement.deadline.is_some_and(|deadline| deadline <= now) {
                measurement.fail(Error::DeadlineExceeded { phase: "measuring" });
            } else if !measurement.is_cancelled() {
                queue.push_back(measurement);
            }
        }
    }

    fn drop_samples(&self, samples: usize, outcome: SampleOutcome) {
        (0..samples).for_each(|_| self.shared.metrics.fidelity_outcome(outcome));
        if samples > 0 {
            self.show_pending();
        }
    }

    fn show_pending(&self) {
        self.shared.metrics.set_fidelity_pending(self.shadows.waiting.len() + usize::from(self.shadows.current.is_some()));
    }

    fn shadow_piece(&mut self, idle: bool) {
        let Self { source, spec, shared, shadows, .. } = self;
        let Some((sample, work)) = shadows.next() else { return };
        let current = source.as_ref().is_some_and(|source| source.generation == sample.source.generation);
        let begun = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| shadows.advance(spec, &sample, work, current)));
        let spent = begun.elapsed();
        shared.metrics.fidelity_spent(spent);
        if !idle {
            shadows.credit.spend(spent);
        }
        match result {
            Ok(Ok(Step::Piece(work))) => shadows.current = Some((sample, work)),
            // The routing in force may have changed since the request ended.
            Ok(Ok(Step::Done(measured))) if in_force(shared, spec, &sample.cases[1].choices) => {
                shared.metrics.fidelity_sample(&measured);
                shared.tallies.measured(sample.source.generation, measured.tokens, measured.kl.sum);
                sample.tell_outlier(&measured, shadows.waiting.config().outlier_kl);
            }
            Ok(Ok(Step::Done(measured))) => {
                shared.metrics.fidelity_outcome(SampleOutcome::OtherRouting);
                sample.tell_other(&measured);
            }
            failed => {
                let reason = reason(failed.map(|result| result.map(drop)));
                let (request, trace_id, generation) = sample.told();
                tracing::warn!(request, trace_id, generation, reason, "a shadow sample failed; no request is concerned");
                shared.metrics.fidelity_outcome(SampleOutcome::Failed);
            }
        }
        self.show_pending();
    }

    fn measure_piece(&mut self, idle: bool) {
        let Self { source: Some(source), spec, measurements, .. } = self else { return };
        let Some(mut measurement) = measurements.next() else { return };
        let most = measurements.size.tokens();
        let begun = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| measurement.advance(source, spec, most)));
        let spent = begun.elapsed();
        if !idle {
            measurements.credit.spend(spent);
        }
        match result {
            Ok(Ok((tokens, done))) => {
                // What only told how far it is says nothing about the size of pieces.
                if tokens > 0 {
                    measurements.size.ran(tokens, spent);
                }
                if !done {
                    measurements.queue.push_front(measurement);
                }
            }
            Ok(Err(error)) => measurement.fail(error),
            Err(panic) => {
                let message = reason(Err(panic));
                tracing::error!(request = measurement.id, message, "a measurement panicked; no other request is concerned");
                measurement.fail(Error::Internal("measuring panicked".into()));
            }
        }
    }

    /// Ends everything: the server stops, or nothing that was known can be trusted. Samples have this outcome, measurements are told `why`.
    pub(super) fn end(&mut self, outcome: SampleOutcome, why: fn() -> Error) {
        let samples = self.shadows.waiting.clear() + usize::from(self.shadows.current.take().is_some());
        self.drop_samples(samples, outcome);
        self.shadows.resting = None;
        self.measurements.queue.drain(..).for_each(|measurement| measurement.fail(why()));
    }
}

/// What a piece of a sample led to.
enum Step {
    Piece(Probed),
    Done(FidelitySample),
}

impl Shadows {
    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.current.is_none()
    }

    /// Tokens of the longest sample. Up to [`KEPT`] every one of them is in the histograms.
    fn longest(&self, spec: &ModelSpec) -> usize {
        self.waiting.config().max_tokens.min(spec.max_context).min(KEPT)
    }

    /// The sample that is at work, else the one that has waited longest.
    fn next(&mut self) -> Option<(Sample, Option<Probed>)> {
        match self.current.take() {
            Some((sample, work)) => Some((sample, Some(work))),
            None => self.waiting.pop().map(|sample| (sample, None)),
        }
    }

    /// One piece. After a failure the model is gone with its work, and the next sample has a new one. Only one over the weights in force,
    /// as `current` says, is kept for it.
    fn advance(&mut self, spec: &ModelSpec, sample: &Sample, work: Option<Probed>, current: bool) -> Result<Step> {
        let longest = self.longest(spec);
        let begin = || {
            let model = if current { self.resting.take() } else { None };
            Probed::start(&sample.source, spec, model, &sample.cases, longest)
        };
        let mut work = work.map_or_else(begin, Ok)?;
        // A new model is paid for, and says nothing of pieces.
        let begun = Instant::now();
        let chunk = work.step(&sample.tokens, self.size.tokens())?;
        self.size.ran(chunk.tokens, begun.elapsed());
        if !chunk.done {
            return Ok(Step::Piece(work));
        }
        let Probed { sides, probe } = work;
        let measured = sides.values().first().filter(|values| values.tokens() > 0).map(|values| measured(values, &probe.layers));
        if current {
            self.resting = Some(sides.into_model());
        }
        measured.map(Step::Done).ok_or(Error::NonFinite)
    }
}

impl Measurements {
    /// The first one.
    fn next(&mut self) -> Option<Measurement> {
        let measurement = self.queue.pop_front()?;
        if self.size.routings() != measurement.sides() {
            self.size = PieceSize::new(measurement.sides());
        }
        Some(measurement)
    }
}

impl Sample {
    /// Request, trace and generation.
    fn told(&self) -> (&str, Option<&str>, u64) {
        (&self.origin.request, self.origin.trace_id.as_deref(), self.source.generation)
    }

    /// What an operator should look at, with all that leads to the request.
    fn tell_outlier(&self, sample: &FidelitySample, limit: f64) {
        let kl = sample.mean_kl();
        if kl <= limit {
            return;
        }
        let mean = |layer: &LayerSample| layer.l2_rel.sum / layer.l2_rel.values.len().max(1) as f64;
        let worst = sample.layers.iter().max_by(|a, b| mean(a).total_cmp(&mean(b)));
        let (layer, l2_rel) = worst.map_or((None, None), |layer| (Some(layer.layer), Some(mean(layer))));
        let ((request, trace_id, generation), tokens) = (self.told(), sample.tokens);
        tracing::warn!(
            request,
            trace_id,
            generation,
            tokens,
            kl,
            layer,
            l2_rel,
            "the serving routing is far from the reference on this request"
        );
    }

    /// What came of a routing that is not the server's: nobody but who asked for it has a use for it.
    fn tell_other(&self, sample: &FidelitySample) {
        let ((request, trace_id, generation), tokens, kl) = (self.told(), sample.tokens, sample.mean_kl());
        tracing::info!(request, trace_id, generation, tokens, kl, "measured under a routing that is not in force");
    }
}

/// Whether two routings are the same rule in every layer.
pub(super) fn same(spec: &ModelSpec, a: &LayerChoices, b: &LayerChoices) -> bool {
    let policies = |choices: &LayerChoices| Case { name: String::new(), choices: choices.clone() }.policies(spec);
    matches!((policies(a), policies(b)), (Ok(a), Ok(b)) if a == b)
}

/// Whether `served` is what requests without a routing of their own are served under now: its gap is that of the server.
pub(super) fn in_force(shared: &Shared, spec: &ModelSpec, served: &LayerChoices) -> bool {
    shared.serving().is_none_or(|serving| same(spec, &serving, served))
}

fn outcome(dropped: Dropped) -> SampleOutcome {
    match dropped {
        Dropped::Queue => SampleOutcome::DroppedQueue,
        Dropped::Late => SampleOutcome::DroppedBudget,
        Dropped::Asked => SampleOutcome::DroppedAsked,
        Dropped::Short => SampleOutcome::DroppedShort,
    }
}

/// What went wrong, in words.
fn reason(failed: std::thread::Result<Result<()>>) -> String {
    match failed {
        Ok(Ok(())) => "nothing".into(),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => format!("panic: {}", panic_message(&*panic)),
    }
}

/// What a panic said.
pub(super) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message")
}

fn measured(output: &OutputValues, layers: &[LayerProbe]) -> FidelitySample {
    let (predicted_tokens, reference_nats, serving_nats) = output.paired().sums();
    FidelitySample {
        tokens: output.tokens(),
        kl: token_values(output.kl()),
        js: token_values(output.js()),
        logit_l2: token_values(output.logit_l2()),
        top1_disagreements: output.top1_disagreements(),
        predicted_tokens: predicted_tokens as u64,
        reference_nats,
        serving_nats,
        layers: layers.iter().map(measured_layer).collect(),
    }
}

fn measured_layer(layer: &LayerProbe) -> LayerSample {
    let gap = &layer.gaps[0];
    let overlap = token_values(&gap.overlap);
    let (tokens, others) = (overlap.values.len(), gap.argmax_disagree as usize);
    LayerSample {
        layer: layer.layer,
        l2_rel: token_values(&gap.l2_rel),
        cosine_distance: token_values(&gap.cosine),
        missed_mass: token_values(&gap.missed_mass),
        expert_disagree: TokenValues {
            sum: gap.overlap.count() as f64 - overlap.sum,
            values: overlap.values.iter().map(|overlap| 1.0 - overlap).collect(),
        },
        argmax_disagree: TokenValues {
            sum: others as f64,
            values: (0..tokens).map(|token| if token < others { 1.0 } else { 0.0 }).collect(),
        },
    }
}

fn token_values(values: &Values) -> TokenValues {
    TokenValues { sum: values.sum(), values: values.kept().to_vec() }
}
