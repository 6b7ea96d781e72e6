//! Measuring the fidelity gap of a text because somebody asks: what is asked, and what comes back. [`super::background`] does it.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use tokio::sync::mpsc;
use tokio_stream::Stream;

use super::{
    background::{Probed, Source},
    status::Shared,
};
use crate::{
    error::{Error, QueueLimit, Result},
    fidelity::{
        case::Case,
        probe::LayerProbe,
        run::{OutputGaps, OutputValues},
        summary::Summary,
    },
    model::{CacheShape, ModelSpec},
};

/// Most routings that one measurement compares with the reference.
pub const MAX_MEASURE_POLICIES: usize = 8;

/// Tokens of a window where nothing is said, and neither the context nor the cache asks for less.
const WINDOW: usize = 512;

/// The cache of a measurement has at most this part of the tokens of that of requests, beside which it is allocated, but for whole blocks.
const CACHE_PART: usize = 4;

/// Tokens between two messages at least, the last one apart: what they say is found by selection among thousands of values.
const TOLD_EVERY: usize = 512;

/// Messages that a slow reader may leave unread. One place is kept for the last: later sums have the earlier ones in them.
const UNREAD: usize = 8;

/// When to ask again that has been refused for the number of measurements.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Limits of measurements.
#[derive(Clone, Debug, PartialEq)]
pub struct MeasureConfig {
    /// Measurements inside at once. One of them runs, the others wait; one more is refused with [`Error::QueueFull`]. 0 refuses all.
    pub max_requests: usize,
    /// Tokens of one text. At least 2.
    pub max_tokens: usize,
    /// Share of the time in which requests are worked on that may be spent beside it; at 0 they run only while there is no request.
    pub budget: f64,
}

/// A text to measure.
#[derive(Clone, Debug)]
pub struct MeasureRequest {
    /// For logs.
    pub id: String,
    /// Token ids, checked against the vocabulary.
    pub tokens: Vec<u32>,
    /// What to measure, from 1 to [`MAX_MEASURE_POLICIES`].
    pub cases: Vec<Case>,
    /// What to compare with; `None`: the routing that the checkpoint was trained under.
    pub reference: Option<Case>,
    /// The text is read in windows of so many tokens, each from an empty context; `None`: 512, or what context and cache allow.
    pub window_tokens: Option<usize>,
    /// After this instant it fails with `DeadlineExceeded`.
    pub deadline: Option<Instant>,
}

/// The sums after some windows.
#[derive(Clone, Debug)]
pub struct MeasureProgress {
    /// Tokens measured so far.
    pub tokens_done: usize,
    /// Tokens of the text.
    pub tokens_total: usize,
    /// One for each of [`MeasureRequest::cases`].
    pub policies: Vec<PolicyFidelity>,
    /// Nothing follows.
    pub done: bool,
    /// Generation of the weights, the same for all of the text.
    pub generation: u64,
}

/// The gap of one routing.
#[derive(Clone, Debug)]
pub struct PolicyFidelity {
    /// At the logits. The perplexity gap has no interval: a bootstrap would keep requests waiting.
    pub output: OutputGaps,
    /// The MoE layers, in order of depth.
    pub layers: Vec<LayerFidelity>,
}

/// The gap of one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerFidelity {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// For equal input, per token: relative L2 distance of the routed output.
    pub l2_rel: Summary,
    /// For equal input, per token: 1 - cosine of the same.
    pub cosine_distance: Summary,
    /// Per token: reference weight outside the served experts.
    pub missed_mass: Summary,
    /// Each on its own hidden state: experts in both over experts served.
    pub overlap: f64,
    /// Each on its own hidden state: share of tokens with exactly the same experts.
    pub exact: f64,
}

/// What comes back: any number of `Ok`, of which the last is `done`, or an `Err` as the last; then `None`. A reader that is behind misses
/// some of them, not the last.
///
/// **Dropping it cancels the measurement.**
#[derive(Debug)]
pub struct MeasureStream {
    progress: mpsc::Receiver<Result<MeasureProgress>>,
    shared: Arc<Shared>,
    ended: bool,
}

/// The place of one measurement among those that may be inside: [`super::Engine::measure_slot`]. It is given back when this is dropped.
#[derive(Debug)]
pub struct MeasureSlot(Arc<AtomicUsize>);

/// A measurement on the engine's thread.
#[derive(Debug)]
pub(super) struct Measurement {
    pub(super) id: String,
    pub(super) deadline: Option<Instant>,
    tokens: Vec<u32>,
    /// The reference first.
    cases: Vec<Case>,
    window: usize,
    /// Of the text, in whole windows.
    done: usize,
    /// Of those, at the last message.
    told: usize,
    /// What the next message says of the first policies, while it is made.
    telling: Option<Vec<PolicyFidelity>>,
    /// Of the weights that it is measured on: those in force at its first piece.
    generation: u64,
    /// `None` before the first piece.
    work: Option<Probed>,
    events: mpsc::Sender<Result<MeasureProgress>>,
    _slot: MeasureSlot,
}

impl Default for MeasureConfig {
    fn default() -> Self {
        Self { max_requests: 2, max_tokens: 1 << 16, budget: 0.1 }
    }
}

impl MeasureRequest {
    /// The cases, the reference first, and the tokens of a window.
    ///
    /// Fails with `InvalidArgument` or `OutOfRange` on the fields of `hardmax.v1.MeasureFidelityRequest`.
    pub(super) fn check(&self, spec: &ModelSpec, cache: CacheShape, config: &MeasureConfig) -> Result<(Vec<Case>, usize)> {
        let (tokens, limit) = (self.tokens.len(), config.max_tokens);
        if tokens < 2 {
            return Err(Error::invalid("input", format!("{tokens} tokens predict nothing: at least 2")));
        }
        if tokens > limit {
            return Err(Error::out_of_range("input", format!("{tokens} tokens are above {limit}, the limit of this server")));
        }
        super::validate::check_ids("token_ids", &self.tokens, spec)?;
        let cases = self.check_cases(spec)?;
        let window = self.check_window(spec, cache, cases.len())?;
        Ok((cases, window))
    }

    fn check_cases(&self, spec: &ModelSpec) -> Result<Vec<Case>> {
        let policies = self.cases.len();
        if policies == 0 {
            return Err(Error::invalid("policies", "nothing to measure: at least 1"));
        }
        if policies > MAX_MEASURE_POLICIES {
            return Err(Error::out_of_range("policies", format!("{policies} are above {MAX_MEASURE_POLICIES}, the limit")));
        }
        let reference = self.reference.clone().unwrap_or_else(|| spec.reference.choice().into());
        reference.policies(spec).map_err(|error| error.rooted("routing", "reference"))?;
        for (index, case) in self.cases.iter().enumerate() {
            case.policies(spec).map_err(|error| error.rooted("routing", &format!("policies[{index}]")))?;
        }
        Ok(std::iter::once(reference).chain(self.cases.iter().cloned()).collect())
    }

    fn check_window(&self, spec: &ModelSpec, cache: CacheShape, cases: usize) -> Result<usize> {
        let (field, context, room) = ("window_tokens", spec.max_context, cache.tokens() / CACHE_PART);
        let usual = || WINDOW.min(context).min(room / cases).max(2);
        let window = self.window_tokens.unwrap_or_else(usual).min(self.tokens.len());
        if self.window_tokens.is_some_and(|window| window < 2) {
            return Err(Error::invalid(field, format!("{window} predicts nothing: at least 2")));
        }
        if let Some(window) = self.window_tokens.filter(|&window| window > context) {
            return Err(Error::out_of_range(field, format!("{window} is above the {context} of the model's context")));
        }
        if window.saturating_mul(cases) > room {
            let message = format!(
                "{window} tokens under {cases} routings, the reference among them, are more than {room}, a fourth of the tokens of the \
                 cache: use smaller windows or fewer policies"
            );
            return Err(Error::out_of_range(field, message));
        }
        Ok(window)
    }
}

impl MeasureSlot {
    /// Takes one of `limit` places.
    pub(super) fn take(inside: &Arc<AtomicUsize>, limit: usize) -> Result<Self> {
        let place = |inside: usize| (inside < limit).then_some(inside + 1);
        match inside.fetch_update(Ordering::AcqRel, Ordering::Acquire, place) {
            Ok(_) => Ok(Self(inside.clone())),
            Err(_) => Err(Error::QueueFull { limit: QueueLimit::Measurements(limit), retry_after: RETRY_AFTER }),
        }
    }
}

impl Drop for MeasureSlot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Measurement {
    /// With the stream of what comes of it. `checked` is what [`MeasureRequest::check`] said.
    pub(super) fn new(
        request: MeasureRequest,
        checked: (Vec<Case>, usize),
        slot: MeasureSlot,
        shared: Arc<Shared>,
    ) -> (Self, MeasureStream) {
        let MeasureRequest { id, tokens, deadline, .. } = request;
        let (cases, window) = checked;
        let (events, progress) = mpsc::channel(UNREAD);
        let (done, told, telling, generation, work) = (0, 0, None, 0, None);
        let measurement = Self { id, deadline, tokens, cases, window, done, told, telling, generation, work, events, _slot: slot };
        (measurement, MeasureStream { progress, shared, ended: false })
    }

    /// Nobody waits for it any more.
    pub(super) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// Ends it without a result.
    pub(super) fn fail(self, error: Error) {
        // A reader that is gone needs no answer; for the others there is one place left.
        let _ = self.events.try_send(Err(error));
    }

    /// Routings side by side.
    pub(super) fn sides(&self) -> usize {
        self.cases.len()
    }

    /// One piece: at most so many tokens in every routing, or the sums of one. The first makes a model of `source`. How many tokens it
    /// read, and whether it was the last.
    pub(super) fn advance(&mut self, source: &Source, spec: &ModelSpec, most: usize) -> Result<(usize, bool)> {
        if let Some(telling) = self.telling.take() {
            return Ok((0, self.tell(telling)));
        }
        let work = match &mut self.work {
            Some(work) => work,
            none => {
                self.generation = source.generation;
                none.insert(Probed::start(source, spec, None, &self.cases, self.window)?)
            }
        };
        let window = &self.tokens[self.done..self.tokens.len().min(self.done + self.window)];
        let chunk = work.step(window, most)?;
        if chunk.done {
            self.done += window.len();
            // A reader that is behind is told later: the last message always has a place.
            let due = self.done - self.told >= TOLD_EVERY && self.events.capacity() > 1;
            self.telling = (due || self.done == self.tokens.len()).then(Vec::new);
        }
        Ok((chunk.tokens, false))
    }

    /// Adds the sums of the next policy to `telling`, and sends the message that has all of them. Whether it was the last one.
    fn tell(&mut self, mut telling: Vec<PolicyFidelity>) -> bool {
        let Some(work) = &self.work else { return false };
        let (values, case) = (work.sides.values(), telling.len());
        telling.extend(values.get(case).map(|output| PolicyFidelity::new(case, output, &work.probe.layers)));
        if telling.len() < values.len() {
            self.telling = Some(telling);
            return false;
        }
        let (tokens_done, tokens_total, generation) = (self.done, self.tokens.len(), self.generation);
        let done = tokens_done == tokens_total;
        self.told = tokens_done;
        let _ = self.events.try_send(Ok(MeasureProgress { tokens_done, tokens_total, policies: telling, done, generation }));
        done
    }
}

impl PolicyFidelity {
    fn new(case: usize, output: &OutputValues, layers: &[LayerProbe]) -> Self {
        Self { output: output.gaps_so_far(), layers: layers.iter().map(|layer| LayerFidelity::new(layer, case)).collect() }
    }
}

impl LayerFidelity {
    fn new(layer: &LayerProbe, case: usize) -> Self {
        let gap = &layer.gaps[case];
        Self {
            layer: layer.layer,
            l2_rel: gap.l2_rel.summary(),
            cosine_distance: gap.cosine.summary(),
            missed_mass: gap.missed_mass.summary(),
            overlap: gap.overlap.mean(),
            exact: gap.exact as f64 / gap.overlap.count().max(1) as f64,
        }
    }
}

impl MeasureStream {
    /// The next message; `None` after the last. Cancel safe.
    pub async fn recv(&mut self) -> Option<Result<MeasureProgress>> {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<MeasureProgress>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let message = ready!(self.progress.poll_recv(cx)).unwrap_or_else(|| Err(self.shared.why_stopped()));
        self.ended = message.as_ref().map_or(true, |progress| progress.done);
        Poll::Ready(Some(message))
    }
}

impl Stream for MeasureStream {
    type Item = Result<MeasureProgress>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll(cx)
    }
}
