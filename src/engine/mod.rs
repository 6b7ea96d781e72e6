//! The engine: a bounded queue, one thread that owns the model, several requests in one batch.
//!
//! [`Engine`] is the handle of the async side. It checks a request, counts it in, and passes it to the thread ([`worker`]), which
//! repeats: take commands, let the [`scheduler`] divide a step, run the model on a ragged batch, let each [`sequence`] make
//! tokens of its logits ([`sampler`]) and text of its tokens ([`text`]), send events. Below that it measures the fidelity gap
//! ([`background`]), of what it served and of what it is asked to ([`measure`]), and lets others have the machine for a piece of work
//! ([`turns`]). Between two steps it can be given other weights ([`generations`]). The two sides share channels and one status; the async
//! side never touches a tensor.

mod background;
mod blocks;
mod generations;
mod measure;
mod request;
mod sampler;
mod scheduler;
mod sequence;
mod status;
mod stream;
mod text;
mod turns;
mod validate;
mod worker;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokenizers::Tokenizer;

pub use self::{
    background::ObservableSource,
    generations::{FIRST_GENERATION, Generation, InFlight, Switched, Tally},
    measure::{
        LayerFidelity, MAX_MEASURE_POLICIES, MeasureConfig, MeasureProgress, MeasureRequest, MeasureSlot, MeasureStream, PolicyFidelity,
    },
    request::{Event, FinishReason, Finished, GenerateParams, MAX_LOGPROBS, Milestones, Request, Task, Timing, TokenLogprob, Tokens},
    status::{EngineStatus, Mode},
    stream::EventStream,
    turns::{Share, Turns},
    validate::{MAX_ALLOWED_TOKENS, MAX_LOGIT_BIASES, MAX_STOP_BYTES, MAX_STOP_STRINGS, MAX_STOP_TOKENS},
};
use self::{
    generations::Generations,
    measure::Measurement,
    sampler::Drawer,
    sequence::Submission,
    status::Shared,
    stream::UnreadTraces,
    worker::{Clock, Command, Publication, Worker},
};
pub use crate::fidelity::shadow::{ShadowChoice, ShadowConfig};
use crate::{
    error::{Error, Result},
    model::{CacheShape, LanguageModel, ModelSpec},
    moe::policy::LayerChoices,
    telemetry::metrics::{Metrics, Rejection},
};

/// Name of the engine's thread, as the system shows it.
pub const THREAD_NAME: &str = "hardmax-engine";

/// Limits of an engine.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// Requests in one batch, each choice being one. At least 1.
    pub max_batch_requests: usize,
    /// Requests that may wait for a place in it; one more is refused with [`Error::QueueFull`].
    pub max_queue_requests: usize,
    /// Tokens that the prompts of waiting requests may have together; with more a request is refused with [`Error::QueueFull`], unless
    /// nothing waits.
    pub max_queue_tokens: usize,
    /// Tokens in one step, prompts and continuations together. Bounds the memory of a step. At least 1.
    pub max_step_tokens: usize,
    /// Tokens that one request may generate. At least 1.
    pub max_new_tokens: usize,
    /// Choices that one request may ask for. At least 1.
    pub max_choices: usize,
    /// Events that a slow reader may leave unread before its request pauses, and as many times 16 KiB of traces: the last step may go
    /// beyond that. At least 2: one is kept for the last event.
    pub event_buffer: usize,
    /// How long a request may wait for its reader before it ends: it holds a place that others could use.
    pub reader_timeout: Duration,
    /// Whether prompts are compared with what was computed before.
    pub prefix_cache: PrefixCache,
    /// The head start that a step of priority gives over requests that came earlier.
    pub priority_step: Duration,
    /// How much of the traffic is measured against the reference routing.
    pub shadow: ShadowConfig,
    /// Limits of what [`Engine::measure`] takes.
    pub measure: MeasureConfig,
}

/// What happens to computed blocks that nobody holds any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum PrefixCache {
    /// They stay until their memory is needed: a prompt that begins with the same tokens, under the same weights and routing, does not
    /// compute them again.
    #[default]
    On,
    /// They are free.
    Off,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_batch_requests: 16,
            max_queue_requests: 256,
            max_queue_tokens: 1 << 20,
            max_step_tokens: 512,
            max_new_tokens: 1024,
            max_choices: 8,
            event_buffer: 64,
            reader_timeout: Duration::from_secs(60),
            prefix_cache: PrefixCache::On,
            priority_step: Duration::from_secs(10),
            shadow: ShadowConfig::default(),
            measure: MeasureConfig::default(),
        }
    }
}

/// What an engine is made of.
pub struct EngineParts {
    /// Goes to the engine's thread, and is used and dropped there.
    pub model: Box<dyn LanguageModel>,
    /// Number of its weights: [`FIRST_GENERATION`] for those of a checkpoint as it was loaded.
    pub generation: u64,
    /// Where [`EngineConfig::shadow`] and [`EngineConfig::measure`] get models over the same weights. `None`: nothing is measured.
    pub background: Option<Box<dyn ObservableSource>>,
    /// Decodes what the model generates.
    pub tokenizer: Arc<Tokenizer>,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// Limits.
    pub config: EngineConfig,
    /// Fed by every step and request.
    pub metrics: Arc<Metrics>,
}

impl std::fmt::Debug for EngineParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineParts").field("spec", self.model.spec()).field("config", &self.config).finish_non_exhaustive()
    }
}

/// Handle to an engine; clones are the same engine. When the last one goes, the engine shuts down.
#[derive(Clone, Debug)]
pub struct Engine {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    thread: Mutex<Option<JoinHandle<()>>>,
    spec: ModelSpec,
    tokenizer: Arc<Tokenizer>,
    eos_token_ids: Vec<u32>,
    config: EngineConfig,
    cache: CacheShape,
    /// Of the next sequence.
    next_id: AtomicU64,
    /// Measurements inside; `None`: none is taken.
    measuring: Option<Arc<AtomicUsize>>,
}

impl EngineConfig {
    fn check(&self) -> Result<()> {
        let minima = [
            ("max_batch_requests", self.max_batch_requests, 1),
            ("max_step_tokens", self.max_step_tokens, 1),
            ("max_new_tokens", self.max_new_tokens, 1),
            ("max_choices", self.max_choices, 1),
            ("event_buffer", self.event_buffer, 2),
            ("shadow.max_tokens", self.shadow.max_tokens, 2),
            ("measure.max_tokens", self.measure.max_tokens, 2),
        ];
        if let Some((field, value, least)) = minima.into_iter().find(|&(_, value, least)| value < least) {
            return Err(Error::invalid(field, format!("{value} is below {least}")));
        }
        let shares = [("shadow.rate", self.shadow.rate), ("shadow.budget", self.shadow.budget), ("measure.budget", self.measure.budget)];
        match shares.into_iter().find(|(_, share)| !(0.0..=1.0).contains(share)) {
            Some((field, share)) => Err(Error::invalid(field, format!("{share} is not from 0 to 1"))),
            None => Ok(()),
        }
    }
}

impl Engine {
    /// Starts the thread. Fails with `InvalidArgument` where a limit of the configuration is below its minimum.
    pub fn start(parts: EngineParts) -> Result<Self> {
        Self::start_with_clock(parts, Box::new(Instant::now))
    }

    fn start_with_clock(parts: EngineParts, clock: Clock) -> Result<Self> {
        let EngineParts { model, generation, background, tokenizer, eos_token_ids, config, metrics } = parts;
        config.check()?;
        let spec = model.spec().clone();
        let cache = model.cache();
        if cache.block_tokens == 0 || cache.num_blocks == 0 {
            return Err(Error::invalid("kv_cache", format!("{} blocks of {} tokens", cache.num_blocks, cache.block_tokens)));
        }
        let shared = Arc::new(Shared::new(generation, metrics));
        #[expect(
            clippy::disallowed_methods,
            reason = "bounded by `count_in` and `MeasureSlot`: a request sends two commands at most, a measurement one; who publishes or \
                      wants a turn waits for it"
        )]
        let (commands, inbox) = mpsc::channel();
        let surroundings = sequence::Surroundings {
            tokenizer: tokenizer.clone(),
            eos_token_ids: eos_token_ids.iter().copied().collect(),
            vocab_size: spec.vocab_size,
            drawer: if model.draws() { Drawer::Model } else { Drawer::Sampler },
            // The last token is never read.
            max_context: spec.max_context.min(cache.tokens().saturating_add(1)),
            max_new_tokens: config.max_new_tokens,
            moe_layers: spec.moe_layers().map(|(layer, _)| layer).collect(),
        };
        let measuring = (background.is_some() && config.measure.max_requests > 0).then(Arc::default);
        let generations = Generations::new(generation, background);
        let worker = Worker::new(model, generations, clock, surroundings, &config, shared.clone(), inbox);
        let thread = worker.spawn()?;
        let thread = Mutex::new(Some(thread));
        let next_id = AtomicU64::new(1);
        let inner = Inner { shared, commands, thread, spec, tokenizer, eos_token_ids, config, cache, next_id, measuring };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Checks a request and puts it in the queue.
    ///
    /// Fails with `InvalidArgument` or `OutOfRange` (with the path of the field), `DeadlineExceeded`, `QueueFull`, `Draining` or `Tuning`.
    pub fn submit(&self, request: Request) -> Result<EventStream> {
        let inner = &*self.inner;
        let metrics = &inner.shared.metrics;
        let checked = validate::check(&request, &inner.spec, &inner.eos_token_ids, &inner.config).and_then(|()| self.check_cache(&request));
        checked.inspect_err(|error| {
            if matches!(error, Error::OutOfRange { field, .. } if !field.starts_with("sampling.")) {
                metrics.rejected(Rejection::TooLong);
            }
        })?;
        let submitted = Instant::now();
        if request.deadline.is_some_and(|deadline| deadline <= submitted) {
            metrics.rejected(Rejection::Deadline);
            return Err(Error::DeadlineExceeded { phase: "queued" });
        }
        let choices = match &request.task {
            Task::Generate(params) => params.n,
            Task::Score { .. } | Task::Read => 1,
        };
        let tickets = inner.shared.count_in(choices, request.prompt.len(), &inner.config)?;
        // One place more for each choice: every one may have an event in a step.
        let (events, reader) = tokio::sync::mpsc::channel(inner.config.event_buffer + choices - 1);
        let unread = Arc::new(UnreadTraces::new(inner.config.event_buffer));
        let first = inner.next_id.fetch_add(choices as u64, Ordering::Relaxed);
        let ids = first..first + choices as u64;
        let milestones = Arc::new(Milestones::new(submitted));
        let submission = Submission { request, events, unread: unread.clone(), milestones: milestones.clone(), ids: ids.clone(), tickets };
        inner.commands.send(Command::Submit(Box::new(submission))).map_err(|_| inner.shared.why_stopped())?;
        Ok(EventStream::new(reader, unread, inner.shared.clone(), inner.commands.clone(), ids, milestones))
    }

    /// A place for a measurement, to be taken before a long text is read.
    ///
    /// Fails with `QueueFull`, `Draining`, `Tuning`, or `FailedPrecondition` where this server measures nothing.
    pub fn measure_slot(&self) -> Result<MeasureSlot> {
        let inner = &*self.inner;
        let Some(measuring) = &inner.measuring else {
            let message = "this server takes no measurements: start it with --max-measure-requests above 0";
            return Err(Error::FailedPrecondition(message.into()));
        };
        let status = self.status();
        if status.draining || !status.alive {
            return Err(inner.shared.why_stopped());
        }
        if status.mode == Mode::TuneExclusive {
            return Err(Error::Tuning);
        }
        MeasureSlot::take(measuring, inner.config.measure.max_requests)
    }

    /// Measures the fidelity gap of a text between the steps of requests, within [`MeasureConfig::budget`].
    ///
    /// Fails with `InvalidArgument` or `OutOfRange` (with the path of the field), `DeadlineExceeded` or `Draining`.
    pub fn measure(&self, slot: MeasureSlot, request: MeasureRequest) -> Result<MeasureStream> {
        let inner = &*self.inner;
        let checked = request.check(&inner.spec, inner.cache, &inner.config.measure)?;
        if request.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(Error::DeadlineExceeded { phase: "queued" });
        }
        let (measurement, stream) = Measurement::new(request, checked, slot, inner.shared.clone());
        inner.commands.send(Command::Measure(Box::new(measurement))).map_err(|_| inner.shared.why_stopped())?;
        Ok(stream)
    }

    /// Refuses a prompt that was found too long before all its tokens were known, as [`Engine::submit`] would.
    pub fn refuse_too_long(&self, field: &str) -> Error {
        self.inner.shared.metrics.rejected(Rejection::TooLong);
        Error::out_of_range(field, format!("more than the {} tokens of the model's context", self.inner.spec.max_context))
    }

    /// Refuses what the cache could never hold, even alone.
    fn check_cache(&self, request: &Request) -> Result<()> {
        let (cache, context) = (self.inner.cache, self.inner.spec.max_context);
        let prompt = request.prompt.len();
        let (field, total) = match &request.task {
            Task::Score { .. } | Task::Read => ("input", prompt),
            // The last token is never read. What is not asked for by number is cut to what there is.
            Task::Generate(params) => {
                let new = params.max_new_tokens.unwrap_or(params.min_new_tokens.max(1)).min(context.saturating_sub(prompt));
                ("prompt", prompt + new.saturating_sub(1))
            }
        };
        if cache.blocks_for(total) <= cache.num_blocks {
            return Ok(());
        }
        let (needed, has) = (cache.blocks_for(total) * cache.block_tokens, cache.tokens());
        let message = format!("{prompt} tokens and their continuation take {needed} tokens of the cache, which has {has}");
        Err(Error::out_of_range(field, message))
    }

    /// The state of this moment.
    pub fn status(&self) -> EngineStatus {
        *self.inner.shared.status.borrow()
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.inner.spec
    }

    /// What it counts into.
    pub fn metrics(&self) -> &Metrics {
        &self.inner.shared.metrics
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.inner.tokenizer
    }

    /// Tokens that end a generation.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.inner.eos_token_ids
    }

    /// The blocks of the model's cache.
    pub fn cache(&self) -> CacheShape {
        self.inner.cache
    }

    /// Limits.
    pub fn config(&self) -> &EngineConfig {
        &self.inner.config
    }

    /// Says which routing is in force where a request chooses none: the fidelity gap of the traffic is that of this routing, and what
    /// was served under another is not part of it. As long as nobody has said, everything is. Where it is another routing than before,
    /// the samples in every [`Tally`] are forgotten.
    pub fn set_serving(&self, choices: LayerChoices) {
        let Inner { spec, shared, .. } = &*self.inner;
        let before = shared.set_serving(choices.clone());
        if !before.is_some_and(|before| background::same(spec, &before, &choices)) {
            shared.tallies.forget_samples();
        }
    }

    /// Whether `choices` is the routing in force where a request chooses none, by whatever name. As long as nobody has said, all are.
    pub fn serves(&self, choices: &LayerChoices) -> bool {
        background::in_force(&self.inner.shared, &self.inner.spec, choices)
    }

    /// Puts other weights in force between two steps: requests that are submitted after this returns run on them. Those inside go on as
    /// `in_flight` says; older weights stay in memory until the last of their requests has ended. Where requests still run on that number,
    /// it is their weights that come back, and not those that are given.
    ///
    /// Fails, and changes nothing, with `InvalidArgument` (`generation`), `Draining`, or `FailedPrecondition`: the number is in force
    /// already, or the weights do not fit the model that is served.
    pub async fn publish(&self, generation: Generation, in_flight: InFlight) -> Result<Switched> {
        let inner = &*self.inner;
        let (reply, switched) = tokio::sync::oneshot::channel();
        let publication = Publication { generation, in_flight, reply };
        inner.commands.send(Command::Publish(Box::new(publication))).map_err(|_| inner.shared.why_stopped())?;
        switched.await.map_err(|_| inner.shared.why_stopped())?
    }

    /// What has come of a generation so far.
    pub fn tally(&self, generation: u64) -> Tally {
        self.inner.shared.tallies.get(generation)
    }

    /// Where foreign work gets its turns on the machine. They are given where there is no request that can go on, and beside requests as
    /// [`Engine::set_share`] says.
    pub fn turns(&self) -> Turns {
        Turns::new(self.inner.commands.clone(), self.inner.shared.clone())
    }

    /// How much of the machine turns may have besides what requests leave; `None`, as at first: nothing. With [`Share::Exclusive`] new
    /// requests are refused with [`Error::Tuning`] once this returns, and those inside end first: see [`Engine::drained`].
    ///
    /// Fails with `InvalidArgument` on `share.duty_cycle`, or `Draining`.
    pub fn set_share(&self, share: Option<Share>) -> Result<()> {
        let inner = &*self.inner;
        share.map_or(Ok(()), Share::check)?;
        inner.commands.send(Command::SetShare(share)).map_err(|_| inner.shared.why_stopped())?;
        inner.shared.set_mode(Share::mode(share));
        Ok(())
    }

    /// Refuses new requests from now on; those inside go on.
    pub fn drain(&self) {
        self.inner.shared.update(|status| status.draining = true);
    }

    /// Resolves when no request runs or waits, at once if there is none. Without [`Engine::drain`] before, more may come.
    pub async fn drained(&self) {
        self.wait_for(|status| status.running + status.waiting == 0).await;
    }

    /// Resolves when the engine's thread is gone: after [`Engine::shutdown`], or because of a bug.
    pub async fn closed(&self) {
        self.wait_for(|status| !status.alive).await;
    }

    /// Resolves when tuning has all of the machine, or no longer has it.
    pub async fn exclusive_is(&self, exclusive: bool) {
        self.wait_for(|status| (status.mode == Mode::TuneExclusive) == exclusive).await;
    }

    async fn wait_for(&self, condition: impl FnMut(&EngineStatus) -> bool) {
        // The sender is part of `self`: waiting cannot fail.
        let _ = self.inner.shared.status.subscribe().wait_for(condition).await;
    }

    /// Fails what is inside with [`Error::Draining`] and ends the thread; waits for at most the step that is under way.
    pub fn shutdown(&self) {
        self.inner.shutdown();
    }
}

impl Inner {
    fn shutdown(&self) {
        // A thread that is gone needs no command.
        let _ = self.commands.send(Command::Shutdown);
        self.shared.update(|status| status.draining = true);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // Its panic was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shutdown();
    }
}
