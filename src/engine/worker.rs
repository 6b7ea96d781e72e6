//! The engine's thread: commands, schedule, forward, sample, events.
//!
//! A failure stays where it arises. A forward that fails or panics ends the requests of its batch; a sequence whose logits are not
//! finite, or whose text cannot be decoded, ends alone with the other choices of its request. A panic anywhere else ends everything that is
//! inside, and the thread begins anew with the weights that it has and empty blocks.

use std::{
    any::Any,
    collections::{BTreeMap, BTreeSet},
    ops::{ControlFlow, Range},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    EngineConfig, Event, FinishReason, Finished, PrefixCache, THREAD_NAME, Task, Timing,
    background::{Background, Load, panic_message},
    blocks::{RoutingKeys, Salt},
    measure::Measurement,
    scheduler::{Admitted, Arrival, Limits, Scheduler, SequenceId, Share},
    sequence::{Progress, Rows, Sequence, Submission, Surroundings},
    status::Shared,
};
use crate::{
    error::{Error, Result},
    model::{Batch, Forward, LanguageModel, LogitRows, Span},
    moe::{
        LayerRouting,
        trace::{self, TracedLayer},
    },
    telemetry::metrics::{Completed, Generated, Outcome, Rejection, SampleOutcome, Step},
};

/// Generation of the weights that the engine starts with.
pub(super) const FIRST_GENERATION: u64 = 1;

/// Deep tensor graphs are dropped recursively.
const STACK_BYTES: usize = 16 << 20;

/// How long to wait for a command when every request waits for its reader.
const BLOCKED_PAUSE: Duration = Duration::from_millis(2);

/// What a request is told whose deadline leaves too little time to read its prompt.
const HOPELESS: &str = "queued: too little time is left to read the prompt";

/// How much faster than ever measured a prompt may be read before its deadline is called hopeless.
const BENEFIT_OF_DOUBT: f64 = 1.5;

/// What the handle and the streams ask of the thread.
#[derive(Debug)]
pub(super) enum Command {
    Submit(Box<Submission>),
    /// Nobody reads the events of these any more.
    Cancel(Range<SequenceId>),
    Measure(Box<Measurement>),
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
    limits: Limits,
    prefix_cache: PrefixCache,
    /// As in [`EngineConfig::reader_timeout`].
    reader_timeout: Duration,
    /// Arrivals are counted from here.
    born: Instant,
    /// No command is taken any more.
    stopping: bool,
    scheduler: Scheduler,
    sequences: BTreeMap<SequenceId, Sequence>,
    deadlines: BTreeSet<(Instant, SequenceId)>,
    /// Those that have sent something: their readers can be behind.
    streaming: BTreeSet<SequenceId>,
    /// Most tokens per second that a full step has computed lately; 0 before the first.
    speed: f64,
    routing_keys: RoutingKeys,
    background: Background,
    /// Kept from step to step for their memory.
    batch: Batch,
    shares: Vec<Share>,
}

/// How a sequence ends.
enum Ending {
    Finished(Box<Finished>),
    Failed(Error),
    /// Nobody listens.
    Cancelled,
    /// It was hopeless before anything was done for it: not let in after all.
    Shed,
}

/// Tells everyone that the thread is gone, however it goes.
struct LastWords(Arc<Shared>);

impl Drop for LastWords {
    fn drop(&mut self) {
        self.0.update(|status| (status.alive, status.running, status.waiting, status.waiting_tokens) = (false, 0, 0, 0));
    }
}

impl Worker {
    pub(super) fn new(
        model: Box<dyn LanguageModel>,
        clock: Clock,
        surroundings: Surroundings,
        config: &EngineConfig,
        background: Background,
        shared: Arc<Shared>,
        commands: mpsc::Receiver<Command>,
    ) -> Self {
        let EngineConfig { max_batch_requests, max_step_tokens, priority_step, .. } = *config;
        let limits = Limits { max_running: max_batch_requests, max_step_tokens, priority_step };
        let scheduler = Scheduler::new(limits, model.cache());
        Self {
            model,
            clock,
            surroundings,
            shared,
            commands,
            limits,
            prefix_cache: config.prefix_cache,
            reader_timeout: config.reader_timeout,
            born: Instant::now(),
            stopping: false,
            scheduler,
            sequences: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            streaming: BTreeSet::new(),
            speed: 0.0,
            routing_keys: RoutingKeys::default(),
            background,
            batch: Batch::default(),
            shares: Vec::new(),
        }
    }

    pub(super) fn spawn(self) -> Result<JoinHandle<()>> {
        let last_words = LastWords(self.shared.clone());
        thread::Builder::new()
            .name(THREAD_NAME.into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let _last_words = last_words;
                self.run();
            })
            .map_err(|error| Error::io("hardmax-engine (thread)", error))
    }

    fn run(mut self) {
        while !self.stopping {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.serve())) {
                self.report_panic(&*panic, "engine");
                self.start_anew();
            }
        }
    }

    fn serve(&mut self) {
        let mut pace = Pace::Idle;
        while self.take_commands(pace).is_continue() {
            let begun = Instant::now();
            self.sweep();
            self.admit();
            pace = if self.sequences.is_empty() {
                Pace::Idle
            } else if self.step(begun) {
                Pace::Busy
            } else {
                Pace::Blocked
            };
            let load = if let Pace::Busy = pace { Load::Busy(begun.elapsed()) } else { Load::Idle };
            if self.background.turn(load, &self.clock) {
                pace = Pace::Busy;
            }
        }
        self.stopping = true;
        self.end_all();
    }

    /// After a panic no count can be trusted: fails everything that is inside, and starts with empty blocks.
    fn start_anew(&mut self) {
        self.background.end(SampleOutcome::Failed, started_anew);
        self.scheduler = Scheduler::new(self.limits, self.model.cache());
        self.deadlines.clear();
        self.streaming.clear();
        let mut told = 0..0;
        for (id, sequence) in std::mem::take(&mut self.sequences) {
            let Sequence { events, group, ticket, .. } = sequence;
            drop(ticket);
            self.shared.metrics.finished(Outcome::Error);
            if !told.contains(&id) {
                told = group;
                let _ = events.try_send(Event::Failed(started_anew()));
            }
        }
        self.show_cache();
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
                Ok(Command::Cancel(ids)) => ids.for_each(|id| self.leave(id)),
                Ok(Command::Measure(measurement)) => self.background.measure(*measurement),
                Ok(Command::Shutdown) | Err(TryRecvError::Disconnected) => return ControlFlow::Break(()),
                Err(TryRecvError::Empty) => return ControlFlow::Continue(()),
            }
            command = self.commands.try_recv();
        }
    }

    fn enqueue(&mut self, submission: Submission) {
        let (events, ids) = (submission.events.clone(), submission.ids.clone());
        let arrival = self.arrival(&submission);
        let surroundings = &self.surroundings;
        let error = match catch_unwind(AssertUnwindSafe(|| Sequence::new(submission, surroundings))) {
            Ok(Ok(sequences)) => {
                for (id, sequence) in ids.zip(sequences) {
                    self.deadlines.extend(sequence.deadline.map(|deadline| (deadline, id)));
                    self.sequences.insert(id, sequence);
                }
                self.scheduler.enqueue(&arrival);
                return;
            }
            Ok(Err(error)) => error,
            Err(panic) => {
                self.report_panic(&*panic, "prompt");
                Error::Internal("reading the prompt panicked".into())
            }
        };
        ids.for_each(|_| self.shared.metrics.finished(Outcome::Error));
        let _ = events.try_send(Event::Failed(error));
    }

    /// Ends what nobody listens to any more. Whoever waited until the deadline left at the deadline.
    fn leave(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get(&id) else { return };
        let late = sequence.deadline.is_some_and(|deadline| deadline <= (self.clock)());
        let phase = sequence.phase();
        self.end(id, if late { Ending::Failed(Error::DeadlineExceeded { phase }) } else { Ending::Cancelled });
    }

    /// How the scheduler sees a request.
    fn arrival(&mut self, submission: &Submission) -> Arrival {
        let Submission { request, milestones, ids, .. } = submission;
        let generation = self.surroundings.generation;
        let common = self.routing_keys.key(&request.routing).map(|routing| Salt::Common { generation, routing });
        let salt = match (self.prefix_cache, &request.task) {
            // What is not computed leaves no trace.
            _ if request.trace => None,
            (PrefixCache::On, _) if common.is_some() => common,
            (_, Task::Generate(params)) if params.n > 1 => Some(Salt::Private(ids.start)),
            _ => None,
        };
        let at = milestones.submitted().saturating_duration_since(self.born);
        Arrival { ids: ids.clone(), at, priority: request.priority, tokens: request.prompt.len(), salt }
    }

    /// Ends what is too late, and what is not read.
    fn sweep(&mut self) {
        let (now, limit) = ((self.clock)(), self.reader_timeout);
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= now
        {
            let phase = self.sequences.get(&id).map_or("queued", Sequence::phase);
            self.deadlines.pop_first();
            self.end(id, Ending::Failed(Error::DeadlineExceeded { phase }));
        }
        let sequences = &mut self.sequences;
        let late = |id: &SequenceId| sequences.get_mut(id).and_then(|s| s.stalled(now)).is_some_and(|waited| waited >= limit);
        let late: Vec<SequenceId> = self.streaming.iter().copied().filter(late).collect();
        for id in late {
            self.end(id, Ending::Failed(Error::ReaderStalled { limit }));
        }
    }

    fn admit(&mut self) {
        while let Some(Admitted { id, reusable, reused }) = self.scheduler.admit(&self.sequences) {
            self.note_preempted();
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            sequence.ticket.run();
            if self.prefix_cache == PrefixCache::On {
                self.shared.metrics.prefix(reusable, reused);
            }
            sequence.cached_prompt_tokens.get_or_insert(reused.min(sequence.prompt_tokens()));
            let seconds = (sequence.tokens().len() - reused) as f64 / (self.speed * BENEFIT_OF_DOUBT);
            let hopeless = |deadline: Instant| {
                let left = deadline.saturating_duration_since((self.clock)());
                self.speed > 0.0 && left.as_secs_f64() < seconds
            };
            if sequence.first_step.is_none() && sequence.deadline.is_some_and(hopeless) {
                self.end(id, Ending::Shed);
            }
        }
        self.note_preempted();
    }

    /// Counts those that lost their place back into the queue.
    fn note_preempted(&mut self) {
        for id in self.scheduler.take_preempted() {
            self.shared.metrics.preempted();
            if let Some(sequence) = self.sequences.get_mut(&id) {
                let (request, trace_id) = (&*sequence.name, sequence.trace_id.as_deref());
                tracing::debug!(request, trace_id, tokens = sequence.tokens().len(), "preempted");
                sequence.ticket.wait();
            }
        }
    }

    /// One forward for everyone who can go on. `false` if nobody can.
    fn step(&mut self, begun: Instant) -> bool {
        let mut shares = std::mem::take(&mut self.shares);
        self.scheduler.plan(&self.sequences, &mut shares);
        self.note_preempted();
        if !shares.is_empty() {
            self.compute(&shares, begun);
        }
        self.shares = shares;
        !self.shares.is_empty()
    }

    fn compute(&mut self, shares: &[Share], begun: Instant) {
        let started = (self.clock)();
        let mut batch = std::mem::take(&mut self.batch);
        self.build(&mut batch, shares, started);
        let launched = Instant::now();
        let forward = self.forward(&batch);
        let (now, forward_time) = ((self.clock)(), launched.elapsed());
        let settled = forward.and_then(|forward| {
            self.measure(&batch, now.saturating_duration_since(started));
            let layers = self.traced_layers(shares, &forward.layers)?;
            let settled = forward.read_logits(|logits| self.settle(shares, &batch, (&layers, logits), now));
            settled.map_err(|error| format!("the logits cannot be read: {error}"))?;
            Ok(forward)
        });
        match settled {
            Ok(forward) => {
                self.show_cache();
                self.shared.metrics.observe_step(&Step {
                    requests: batch.spans.len(),
                    tokens: batch.tokens.len(),
                    forward: forward_time,
                    attention: forward.time.attention,
                    experts: forward.time.experts,
                    engine: begun.elapsed().saturating_sub(forward_time),
                    layers: &forward.layers,
                });
                self.model.recycle(forward);
            }
            Err(reason) => {
                for share in shares {
                    self.end(share.id, Ending::Failed(Error::Internal(reason.clone())));
                }
            }
        }
        self.batch = batch;
    }

    fn build(&mut self, batch: &mut Batch, shares: &[Share], now: Instant) {
        batch.clear();
        for &share in shares {
            let end = share.past + share.tokens;
            if let Some(sequence) = self.sequences.get_mut(&share.id) {
                sequence.begin_step(now);
                let (table, tokens) = (self.scheduler.table(share.id, end), sequence.tokens().get(share.past..end).unwrap_or_default());
                batch.push(table, tokens, share.past, sequence.routing.from_position(share.past), sequence.logit_rows(share));
            }
        }
    }

    /// Runs the model; a failure is told in words, because it is told to every request of the batch.
    fn forward(&mut self, batch: &Batch) -> Result<Forward, String> {
        let (model, vocab_size) = (&mut self.model, self.surroundings.vocab_size);
        let result = catch_unwind(AssertUnwindSafe(|| {
            let forward = model.forward(batch)?;
            let expected = (batch.spans.iter().map(rows).sum::<usize>(), vocab_size);
            match forward.logits.dims2()? {
                found if found == expected => Ok(forward),
                found => Err(Error::Internal(format!("logits of shape {found:?} instead of {expected:?}"))),
            }
        }));
        match result {
            Ok(Ok(forward)) => Ok(forward),
            Ok(Err(error)) => {
                tracing::error!(%error, spans = batch.spans.len(), tokens = batch.tokens.len(), "forward failed");
                Err(format!("the forward pass failed: {error}"))
            }
            Err(panic) => {
                self.report_panic(&*panic, "forward");
                // Nobody knows where it wrote.
                self.scheduler.forget_prefixes();
                Err("the forward pass panicked".into())
            }
        }
    }

    /// Notes how fast a full step was: the speed of prompts.
    fn measure(&mut self, batch: &Batch, time: Duration) {
        if batch.tokens.len() * 2 >= self.limits.max_step_tokens && batch.tokens.len() > batch.spans.len() && !time.is_zero() {
            self.speed = (batch.tokens.len() as f64 / time.as_secs_f64()).max(self.speed * 0.9);
            self.shared.speed.store(self.speed as u32, Ordering::Relaxed);
        }
    }

    /// What the traces of a step are made of: nothing where none is asked for.
    fn traced_layers<'a>(&self, shares: &[Share], layers: &'a [LayerRouting]) -> Result<Vec<TracedLayer<'a>>, String> {
        if !shares.iter().any(|share| self.sequences.get(&share.id).is_some_and(Sequence::is_traced)) {
            return Ok(Vec::new());
        }
        trace::traced_layers(layers).map_err(|error| format!("the routing cannot be read: {error}"))
    }

    fn report_panic(&self, panic: &(dyn Any + Send), place: &'static str) {
        tracing::error!(place, message = panic_message(panic), "panic in the engine; its requests fail, the engine goes on");
        self.shared.metrics.engine_panicked();
    }

    fn show_cache(&self) {
        let pool = self.scheduler.pool();
        self.shared.metrics.set_cache_usage(pool.held(), pool.shape().num_blocks);
    }

    /// Gives each sequence its rows, and its reader what came of them.
    fn settle(&mut self, shares: &[Share], batch: &Batch, (layers, logits): (&[TracedLayer<'_>], &[f32]), now: Instant) {
        let (mut rest, mut first) = (logits, 0);
        for (share, span) in shares.iter().zip(&batch.spans) {
            let Some((mine, others)) = rest.split_at_checked(rows(span) * self.surroundings.vocab_size) else { continue };
            self.advance(*share, Rows { logits: mine, layers, first, now });
            rest = others;
            first += span.new;
        }
    }

    fn advance(&mut self, share: Share, rows: Rows<'_>) {
        let Some(sequence) = self.sequences.get_mut(&share.id) else { return };
        let (before, surroundings) = (sequence.last_token, &self.surroundings);
        self.shared.metrics.prompt_computed(sequence.prompt_part(share));
        let progress = catch_unwind(AssertUnwindSafe(|| sequence.advance(share, rows, surroundings)));
        if sequence.last_token != before {
            match before {
                None => self.shared.metrics.first_token(rows.now.saturating_duration_since(sequence.submitted)),
                Some(before) => self.shared.metrics.next_token(rows.now.saturating_duration_since(before)),
            }
        }
        if let Ok(Ok(_)) = &progress {
            self.scheduler.computed(share, sequence.tokens());
        }
        match progress {
            Ok(Ok(Progress::Quiet)) => {}
            Ok(Ok(Progress::Tokens(tokens))) => {
                // There is room: a sequence without it is not scheduled. Of a closed channel its stream tells.
                let _ = sequence.events.try_send(Event::Tokens(tokens));
                self.streaming.insert(share.id);
            }
            Ok(Ok(Progress::Finished(finished))) => self.end(share.id, Ending::Finished(finished)),
            Ok(Err(error)) => {
                tracing::warn!(request = &*sequence.name, trace_id = sequence.trace_id.as_deref(), %error, "request failed");
                self.end(share.id, Ending::Failed(error));
            }
            Err(panic) => {
                self.report_panic(&*panic, "sampling");
                self.end(share.id, Ending::Failed(Error::Internal("sampling panicked".into())));
            }
        }
    }

    /// Frees what the sequence holds, counts it out, and then tells its reader. A failure ends the other choices of the request as well.
    fn end(&mut self, id: SequenceId, ending: Ending) {
        let Some(sequence) = self.take_out(id, &ending) else { return };
        if let Ending::Failed(_) | Ending::Shed = ending {
            for other in sequence.group.clone() {
                drop(self.take_out(other, &ending));
            }
        }
        if let Ending::Finished(finished) = &ending {
            self.shared.metrics.completed(&completed(&sequence, finished));
            self.background.offer(&sequence, finished.generation, (self.clock)());
        }
        if let Ending::Shed = ending {
            self.shared.metrics.rejected(Rejection::Deadline);
        }
        self.show_cache();
        let Sequence { events, ticket, .. } = sequence;
        drop(ticket);
        let event = match ending {
            Ending::Finished(finished) => Event::Finished(finished),
            Ending::Failed(error) => Event::Failed(error),
            Ending::Shed => Event::Failed(Error::DeadlineExceeded { phase: HOPELESS }),
            Ending::Cancelled => return,
        };
        // A reader that is gone needs no answer; for the others there is always one place left.
        let _ = events.try_send(event);
    }

    fn take_out(&mut self, id: SequenceId, ending: &Ending) -> Option<Sequence> {
        let sequence = self.sequences.remove(&id)?;
        self.scheduler.remove(id);
        self.streaming.remove(&id);
        if let Some(deadline) = sequence.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        if let Some(outcome) = outcome(ending) {
            self.shared.metrics.finished(outcome);
        }
        Some(sequence)
    }

    /// Ends everything that is left, and whatever was sent before the handle said so.
    fn end_all(&mut self) {
        self.shared.update(|status| status.draining = true);
        self.background.end(SampleOutcome::DroppedDraining, || Error::Draining);
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Submit(submission) = command {
                self.enqueue(*submission);
            }
        }
        while let Some((&id, _)) = self.sequences.first_key_value() {
            self.end(id, Ending::Failed(Error::Draining));
        }
    }
}

/// What everything that was inside when the engine panicked is told.
fn started_anew() -> Error {
    Error::Internal("the engine panicked and was started anew".into())
}

/// Rows of logits that a span asks for.
fn rows(span: &Span) -> usize {
    match span.logits {
        LogitRows::None => 0,
        LogitRows::Last => 1,
        LogitRows::All => span.new,
    }
}

/// `None` for what was not let in.
fn outcome(ending: &Ending) -> Option<Outcome> {
    Some(match ending {
        Ending::Finished(finished) if finished.reason == FinishReason::Length => Outcome::Length,
        Ending::Finished(_) => Outcome::Stop,
        Ending::Failed(Error::DeadlineExceeded { .. }) => Outcome::Deadline,
        Ending::Failed(Error::ReaderStalled { .. }) => Outcome::Cancelled,
        Ending::Failed(_) => Outcome::Error,
        Ending::Cancelled => Outcome::Cancelled,
        Ending::Shed => return None,
    })
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
