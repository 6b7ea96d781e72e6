//! The engine's thread: commands, schedule, forward, sample, events.
//!
//! A failure stays where it arises. A forward that fails or panics ends the requests of its batch; a sequence whose logits are not
//! finite, or whose text cannot be decoded, ends alone. The thread goes on with the weights that it has.

use std::{
    any::Any,
    collections::BTreeMap,
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    EngineConfig, Event, FinishReason, Finished, Shared, Timing,
    scheduler::{Limits, Place, Scheduler, SequenceId, Share, Work},
    sequence::{Progress, Rows, Sequence, Submission, Surroundings},
};
use crate::{
    error::{Error, Result},
    model::{Batch, Forward, LanguageModel, LogitRows},
    moe::LayerRouting,
    telemetry::metrics::{Completed, Generated, Outcome},
};

/// Generation of the weights that the engine starts with.
pub(super) const FIRST_GENERATION: u64 = 1;

/// Deep tensor graphs are dropped recursively.
const STACK_BYTES: usize = 16 << 20;

/// How long to wait for a command when every request waits for its reader.
const BLOCKED_PAUSE: Duration = Duration::from_millis(2);

/// What the handle asks of the thread.
#[derive(Debug)]
pub(super) enum Command {
    Submit(Box<Submission>),
    Shutdown,
}

/// What there is to do before the next command is waited for.
#[derive(Clone, Copy)]
enum Pace {
    /// Nothing: sleep until a command comes.
    Idle,
    /// Requests, none of which can go on.
    Blocked,
    Busy,
}

/// Tells the time by which deadlines are judged; tests have one that jumps.
pub(super) type Clock = Box<dyn Fn() -> Instant + Send>;

pub(super) struct Worker {
    model: Box<dyn LanguageModel>,
    clock: Clock,
    surroundings: Surroundings,
    shared: Arc<Shared>,
    commands: mpsc::Receiver<Command>,
    scheduler: Scheduler,
    sequences: BTreeMap<SequenceId, Sequence>,
    last_id: SequenceId,
    /// As in [`EngineConfig::reader_timeout`].
    reader_timeout: Duration,
}

/// What a forward gave, on the host.
struct Output {
    /// `[R, V]`; not read where no row was asked for.
    logits: Vec<f32>,
    layers: Vec<LayerRouting>,
}

/// How a sequence ends.
enum Ending {
    Finished(Box<Finished>),
    Failed(Error),
    /// Nobody listens.
    Cancelled,
}

/// Tells everyone that the thread is gone, however it goes.
struct LastWords(Arc<Shared>);

impl Drop for LastWords {
    fn drop(&mut self) {
        self.0.update(|status| (status.alive, status.running, status.waiting) = (false, 0, 0));
    }
}

impl Worker {
    pub(super) fn new(
        model: Box<dyn LanguageModel>,
        clock: Clock,
        surroundings: Surroundings,
        config: &EngineConfig,
        shared: Arc<Shared>,
        commands: mpsc::Receiver<Command>,
    ) -> Self {
        let limits = Limits { max_running: config.max_batch_requests, max_step_tokens: config.max_step_tokens };
        let scheduler = Scheduler::new(limits);
        let reader_timeout = config.reader_timeout;
        Self { model, clock, surroundings, shared, commands, scheduler, sequences: BTreeMap::new(), last_id: 0, reader_timeout }
    }

    pub(super) fn spawn(self) -> Result<JoinHandle<()>> {
        let last_words = LastWords(self.shared.clone());
        thread::Builder::new()
            .name("hardmax-engine".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let _last_words = last_words;
                self.run();
            })
            .map_err(|error| Error::io("hardmax-engine (thread)", error))
    }

    fn run(mut self) {
        let mut pace = Pace::Idle;
        while self.take_commands(pace).is_continue() {
            self.sweep();
            self.admit();
            pace = if self.sequences.is_empty() {
                Pace::Idle
            } else if self.step() {
                Pace::Busy
            } else {
                Pace::Blocked
            };
        }
        self.end_all();
    }

    /// Takes what has been sent, after waiting for the first command as long as the pace allows. Breaks at shutdown.
    fn take_commands(&mut self, pace: Pace) -> ControlFlow<()> {
        use std::sync::mpsc::{RecvTimeoutError, TryRecvError};
        let mut command = match pace {
            Pace::Idle => self.commands.recv().map_err(|_| TryRecvError::Disconnected),
            Pace::Busy => self.commands.try_recv(),
            Pace::Blocked => self.commands.recv_timeout(BLOCKED_PAUSE).map_err(|error| match error {
                RecvTimeoutError::Timeout => TryRecvError::Empty,
                RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
            }),
        };
        loop {
            match command {
                Ok(Command::Submit(submission)) => self.enqueue(*submission),
                Ok(Command::Shutdown) | Err(TryRecvError::Disconnected) => return ControlFlow::Break(()),
                Err(TryRecvError::Empty) => return ControlFlow::Continue(()),
            }
            command = self.commands.try_recv();
        }
    }

    fn enqueue(&mut self, submission: Submission) {
        let events = submission.events.clone();
        let surroundings = &self.surroundings;
        let error = match catch_unwind(AssertUnwindSafe(|| Sequence::new(submission, surroundings))) {
            Ok(Ok(sequence)) => {
                self.last_id += 1;
                self.sequences.insert(self.last_id, sequence);
                self.scheduler.enqueue(self.last_id);
                return;
            }
            Ok(Err(error)) => error,
            Err(panic) => {
                self.report_panic(&*panic, "prompt");
                Error::Internal("reading the prompt panicked".into())
            }
        };
        self.shared.metrics.finished(Outcome::Error);
        self.shared.update(|status| status.waiting = status.waiting.saturating_sub(1));
        let _ = events.try_send(Event::Failed(error));
    }

    /// Ends what is too late, what nobody listens to any more, and what is not read.
    fn sweep(&mut self) {
        let (now, limit) = ((self.clock)(), self.reader_timeout);
        let ends: Vec<(SequenceId, Ending)> = self
            .sequences
            .iter_mut()
            .filter_map(|(&id, sequence)| {
                let stalled = sequence.stalled(now).is_some_and(|waited| waited >= limit);
                // Whoever waits until the deadline leaves at the deadline.
                if sequence.deadline.is_some_and(|deadline| deadline <= now) {
                    Some((id, Ending::Failed(Error::DeadlineExceeded { phase: sequence.phase() })))
                } else if sequence.events.is_closed() {
                    Some((id, Ending::Cancelled))
                } else {
                    stalled.then_some((id, Ending::Failed(Error::ReaderStalled { limit })))
                }
            })
            .collect();
        for (id, ending) in ends {
            self.end(id, ending);
        }
    }

    fn admit(&mut self) {
        while self.scheduler.admit().is_some() {
            self.shared.update(|status| {
                status.running += 1;
                status.waiting = status.waiting.saturating_sub(1);
            });
        }
    }

    /// One forward for everyone who can go on. `false` if nobody can.
    fn step(&mut self) -> bool {
        let sequences = &self.sequences;
        let shares = self.scheduler.plan(|id| sequences.get(&id).map_or(Work::Blocked, Sequence::work));
        if shares.is_empty() {
            return false;
        }
        let started = (self.clock)();
        let batch = self.build(&shares, started);
        match self.forward(&batch) {
            Ok(output) => {
                let now = (self.clock)();
                self.shared.metrics.observe_step(batch.tokens.len(), now.saturating_duration_since(started), &output.layers);
                self.settle(&shares, &batch, &output.logits, now);
            }
            Err(reason) => {
                for share in &shares {
                    self.end(share.id, Ending::Failed(Error::Internal(reason.clone())));
                }
            }
        }
        true
    }

    fn build(&mut self, shares: &[Share], now: Instant) -> Batch {
        let mut batch = Batch::default();
        let cache = self.model.cache();
        let blocks = cache.blocks_for(self.surroundings.max_context) as u32;
        for share in shares {
            if let Some(sequence) = self.sequences.get_mut(&share.id) {
                sequence.first_step.get_or_insert(now);
                let (tokens, past) = sequence.next_tokens(share.tokens);
                let first = share.slot as u32 * blocks;
                let table: Vec<u32> = (first..first + cache.blocks_for(past + tokens.len()) as u32).collect();
                batch.push(&table, tokens, past, sequence.routing, sequence.logit_rows(share.tokens));
            }
        }
        batch
    }

    /// Runs the model; a failure is told in words, because it is told to every request of the batch.
    fn forward(&mut self, batch: &Batch) -> Result<Output, String> {
        let (model, vocab_size) = (&mut self.model, self.surroundings.vocab_size);
        let result = catch_unwind(AssertUnwindSafe(|| model.forward(batch).and_then(|forward| read(forward, batch, vocab_size))));
        match result {
            Ok(Ok(output)) => Ok(output),
            Ok(Err(error)) => {
                tracing::error!(%error, spans = batch.spans.len(), tokens = batch.tokens.len(), "forward failed");
                Err(format!("the forward pass failed: {error}"))
            }
            Err(panic) => {
                self.report_panic(&*panic, "forward");
                Err("the forward pass panicked".into())
            }
        }
    }

    fn report_panic(&self, panic: &(dyn Any + Send), place: &'static str) {
        let message = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
        tracing::error!(place, message = message.unwrap_or("no message"), "panic in the engine; its requests fail, the engine goes on");
        self.shared.metrics.engine_panicked();
    }

    /// Gives each sequence its rows, and its reader what came of them.
    fn settle(&mut self, shares: &[Share], batch: &Batch, logits: &[f32], now: Instant) {
        let mut rest = logits;
        for (share, span) in shares.iter().zip(&batch.spans) {
            let rows = match span.logits {
                LogitRows::None => 0,
                LogitRows::Last => 1,
                LogitRows::All => span.new,
            };
            let Some((mine, others)) = rest.split_at_checked(rows * self.surroundings.vocab_size) else { continue };
            rest = others;
            self.advance(share, Rows { logits: mine, now });
        }
    }

    fn advance(&mut self, share: &Share, rows: Rows<'_>) {
        let Some(sequence) = self.sequences.get_mut(&share.id) else { return };
        let (before, surroundings) = (sequence.last_token, &self.surroundings);
        self.shared.metrics.prompt_computed(sequence.prompt_part(share.tokens));
        let progress = catch_unwind(AssertUnwindSafe(|| sequence.advance(share.tokens, rows, surroundings)));
        if sequence.last_token != before {
            match before {
                None => self.shared.metrics.first_token(rows.now.saturating_duration_since(sequence.submitted)),
                Some(before) => self.shared.metrics.next_token(rows.now.saturating_duration_since(before)),
            }
        }
        match progress {
            Ok(Ok(Progress::Quiet)) => {}
            Ok(Ok(Progress::Tokens(tokens))) => {
                // There is room: a sequence without it is not scheduled. A closed channel is found by the next sweep.
                let _ = sequence.events.try_send(Event::Tokens(tokens));
            }
            Ok(Ok(Progress::Finished(finished))) => self.end(share.id, Ending::Finished(finished)),
            Ok(Err(error)) => {
                tracing::warn!(request = sequence.id, %error, "request failed");
                self.end(share.id, Ending::Failed(error));
            }
            Err(panic) => {
                self.report_panic(&*panic, "sampling");
                self.end(share.id, Ending::Failed(Error::Internal("sampling panicked".into())));
            }
        }
    }

    /// Frees what the sequence holds, counts it out, and then tells its reader.
    fn end(&mut self, id: SequenceId, ending: Ending) {
        let Some(sequence) = self.sequences.remove(&id) else { return };
        let place = self.scheduler.remove(id);
        self.shared.metrics.finished(outcome(&ending));
        if let Ending::Finished(finished) = &ending {
            self.shared.metrics.completed(&completed(&sequence, finished));
        }
        self.shared.update(|status| match place {
            Some(Place::Running(_)) => status.running = status.running.saturating_sub(1),
            _ => status.waiting = status.waiting.saturating_sub(1),
        });
        let event = match ending {
            Ending::Finished(finished) => Event::Finished(finished),
            Ending::Failed(error) => Event::Failed(error),
            Ending::Cancelled => return,
        };
        // A reader that is gone needs no answer; for the others there is always one place left.
        let _ = sequence.events.try_send(event);
    }

    /// Ends everything that is left, and whatever was sent before the handle said so.
    fn end_all(&mut self) {
        self.shared.update(|status| status.draining = true);
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Submit(submission) = command {
                self.enqueue(*submission);
            }
        }
        let ids: Vec<SequenceId> = self.sequences.keys().copied().collect();
        for id in ids {
            self.end(id, Ending::Failed(Error::Draining));
        }
    }
}

/// Copies the logits to the host.
fn read(forward: Forward, batch: &Batch, vocab_size: usize) -> Result<Output> {
    let rows = batch.logit_rows().len();
    let logits = if rows == 0 {
        Vec::new()
    } else {
        let (found_rows, found_columns) = forward.logits.dims2()?;
        if (found_rows, found_columns) != (rows, vocab_size) {
            return Err(Error::Internal(format!("logits of shape [{found_rows}, {found_columns}] instead of [{rows}, {vocab_size}]")));
        }
        forward.logits.flatten_all()?.to_vec1()?
    };
    Ok(Output { logits, layers: forward.layers })
}

fn outcome(ending: &Ending) -> Outcome {
    match ending {
        Ending::Finished(finished) if finished.reason == FinishReason::Length => Outcome::Length,
        Ending::Finished(_) => Outcome::Stop,
        Ending::Failed(Error::DeadlineExceeded { .. }) => Outcome::Deadline,
        Ending::Failed(Error::ReaderStalled { .. }) => Outcome::Cancelled,
        Ending::Failed(_) => Outcome::Error,
        Ending::Cancelled => Outcome::Cancelled,
    }
}

fn completed(sequence: &Sequence, finished: &Finished) -> Completed {
    let Timing { queue, prefill, decode } = finished.timing;
    Completed {
        prompt_tokens: finished.prompt_tokens,
        total: sequence.submitted.elapsed(),
        queue,
        prefill,
        generated: sequence.generates().then_some(Generated { tokens: finished.generated_tokens, decode }),
    }
}
