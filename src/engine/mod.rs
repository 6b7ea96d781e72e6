//! The engine: a bounded queue, one thread that owns the model, several requests in one batch.
//!
//! [`Engine`] is the handle of the async side. It checks a request, counts it in, and passes it to the thread ([`worker`]), which
//! repeats: take commands, let the [`scheduler`] divide a step, run the model on a ragged batch, let each [`sequence`] make
//! tokens of its logits ([`sampler`]) and text of its tokens ([`text`]), send events. The two sides share channels and one
//! status; the async side never touches a tensor.

mod request;
mod sampler;
mod scheduler;
mod sequence;
mod stream;
mod text;
mod validate;
mod worker;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use std::{
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokenizers::Tokenizer;
use tokio::sync::watch;

pub use self::{
    request::{Event, FinishReason, Finished, GenerateParams, MAX_LOGPROBS, Request, Task, Timing, TokenLogprob, Tokens},
    stream::EventStream,
    validate::{MAX_ALLOWED_TOKENS, MAX_LOGIT_BIASES, MAX_STOP_BYTES, MAX_STOP_STRINGS, MAX_STOP_TOKENS},
};
use self::{
    sequence::Submission,
    worker::{Clock, Command, Worker},
};
use crate::{
    error::{Error, QueueLimit, Result},
    model::{LanguageModel, ModelSpec},
    telemetry::metrics::{Metrics, Rejection},
};

/// After this long a full queue may have room.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Limits of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Requests in one batch; each holds a cache slot. At least 1.
    pub max_batch_requests: usize,
    /// Requests that may wait for a slot; one more is refused with [`Error::QueueFull`].
    pub max_queue_requests: usize,
    /// Tokens in one step, prompts and continuations together. Bounds the memory of a step. At least 1.
    pub max_step_tokens: usize,
    /// Tokens that one request may generate. At least 1.
    pub max_new_tokens: usize,
    /// Choices that one request may ask for. At least 1.
    pub max_choices: usize,
    /// Events that a slow reader may leave unread before its request pauses. At least 2: one is kept for the last event.
    pub event_buffer: usize,
    /// How long a request may wait for its reader before it ends: it holds a slot that others could use.
    pub reader_timeout: Duration,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_batch_requests: 16,
            max_queue_requests: 256,
            max_step_tokens: 512,
            max_new_tokens: 1024,
            max_choices: 8,
            event_buffer: 64,
            reader_timeout: Duration::from_secs(60),
        }
    }
}

/// What an engine is made of.
pub struct EngineParts {
    /// Goes to the engine's thread, and is used and dropped there.
    pub model: Box<dyn LanguageModel>,
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

/// A moment in the life of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineStatus {
    /// Requests that hold a slot.
    pub running: usize,
    /// Requests that wait for one.
    pub waiting: usize,
    /// New requests are refused.
    pub draining: bool,
    /// The thread is there. `false` after [`Engine::shutdown`], or because of a bug.
    pub alive: bool,
    /// Of the weights in force.
    pub generation: u64,
}

/// Handle to an engine; clones are the same engine. When the last one goes, the engine shuts down.
#[derive(Clone, Debug)]
pub struct Engine {
    inner: Arc<Inner>,
}

/// What both sides see.
#[derive(Debug)]
struct Shared {
    status: watch::Sender<EngineStatus>,
    metrics: Arc<Metrics>,
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
}

impl EngineConfig {
    fn check(&self) -> Result<()> {
        let minima = [
            ("max_batch_requests", self.max_batch_requests, 1),
            ("max_step_tokens", self.max_step_tokens, 1),
            ("max_new_tokens", self.max_new_tokens, 1),
            ("max_choices", self.max_choices, 1),
            ("event_buffer", self.event_buffer, 2),
        ];
        match minima.into_iter().find(|&(_, value, least)| value < least) {
            Some((field, value, least)) => Err(Error::invalid(field, format!("{value} is below {least}"))),
            None => Ok(()),
        }
    }
}

impl Shared {
    /// Changes the status, and the gauges that show it, as one.
    fn update(&self, change: impl FnOnce(&mut EngineStatus)) {
        self.status.send_if_modified(|status| {
            let before = *status;
            change(status);
            self.metrics.set_requests(status.running, status.waiting);
            *status != before
        });
    }
}

impl Engine {
    /// Starts the thread. Fails with `InvalidArgument` where a limit of the configuration is below its minimum.
    pub fn start(parts: EngineParts) -> Result<Self> {
        Self::start_with_clock(parts, Box::new(Instant::now))
    }

    fn start_with_clock(parts: EngineParts, clock: Clock) -> Result<Self> {
        let EngineParts { model, tokenizer, eos_token_ids, config, metrics } = parts;
        config.check()?;
        let spec = model.spec().clone();
        let status = EngineStatus { running: 0, waiting: 0, draining: false, alive: true, generation: worker::FIRST_GENERATION };
        let shared = Arc::new(Shared { status: watch::Sender::new(status), metrics });
        #[expect(clippy::disallowed_methods, reason = "bounded by `count_in`, which also knows what is running")]
        let (commands, inbox) = mpsc::channel();
        let surroundings = sequence::Surroundings {
            tokenizer: tokenizer.clone(),
            eos_token_ids: eos_token_ids.iter().copied().collect(),
            vocab_size: spec.vocab_size,
            max_context: spec.max_context,
            max_new_tokens: config.max_new_tokens,
            generation: worker::FIRST_GENERATION,
        };
        let worker = Worker::new(model, clock, surroundings, &config, shared.clone(), inbox);
        let thread = worker.spawn()?;
        let thread = Mutex::new(Some(thread));
        Ok(Self { inner: Arc::new(Inner { shared, commands, thread, spec, tokenizer, eos_token_ids, config }) })
    }

    /// Checks a request and puts it in the queue.
    ///
    /// Fails with `InvalidArgument` or `OutOfRange` (with the path of the field), `DeadlineExceeded`, `QueueFull` or `Draining`.
    pub fn submit(&self, request: Request) -> Result<EventStream> {
        let inner = &*self.inner;
        let metrics = &inner.shared.metrics;
        validate::check(&request, &inner.spec, &inner.eos_token_ids, &inner.config).inspect_err(|error| {
            if matches!(error, Error::OutOfRange { field, .. } if !field.starts_with("sampling.")) {
                metrics.rejected(Rejection::TooLong);
            }
        })?;
        let submitted = Instant::now();
        if request.deadline.is_some_and(|deadline| deadline <= submitted) {
            metrics.rejected(Rejection::Deadline);
            return Err(Error::DeadlineExceeded { phase: "queued" });
        }
        self.count_in()?;
        let (events, reader) = tokio::sync::mpsc::channel(inner.config.event_buffer);
        let submission = Box::new(Submission { request, events, submitted });
        inner.commands.send(Command::Submit(submission)).map_err(|_| inner.shared.why_stopped())?;
        Ok(EventStream::new(reader, inner.shared.clone()))
    }

    /// Refuses a prompt that was found too long before all its tokens were known, as [`Engine::submit`] would.
    pub fn refuse_too_long(&self, field: &str) -> Error {
        self.inner.shared.metrics.rejected(Rejection::TooLong);
        Error::out_of_range(field, format!("more than the {} tokens of the model's context", self.inner.spec.max_context))
    }

    /// Takes a place in the queue. The queue is full when batch and queue together are: what a free slot will take at once does not wait.
    fn count_in(&self) -> Result<()> {
        let Inner { shared, config, .. } = &*self.inner;
        let places = config.max_batch_requests.saturating_add(config.max_queue_requests);
        let mut refusal = None;
        shared.update(|status| {
            if status.draining {
                refusal = Some((Some(Rejection::Draining), Error::Draining));
            } else if !status.alive {
                refusal = Some((None, Error::Internal("the engine thread died".into())));
            } else if status.running + status.waiting >= places {
                refusal = Some((
                    Some(Rejection::QueueFull),
                    Error::QueueFull { limit: QueueLimit::Requests(config.max_queue_requests), retry_after: RETRY_AFTER },
                ));
            } else {
                status.waiting += 1;
            }
        });
        let Some((reason, error)) = refusal else { return Ok(()) };
        if let Some(reason) = reason {
            shared.metrics.rejected(reason);
        }
        Err(error)
    }

    /// The state of this moment.
    pub fn status(&self) -> EngineStatus {
        *self.inner.shared.status.borrow()
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.inner.spec
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.inner.tokenizer
    }

    /// Tokens that end a generation.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.inner.eos_token_ids
    }

    /// Limits.
    pub fn config(&self) -> &EngineConfig {
        &self.inner.config
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
