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

use tokio::sync::oneshot;

use super::{
    EngineConfig, Event, FinishReason, Finished, PrefixCache, THREAD_NAME, Timing,
    background::{Background, Load, panic_message},
    blocks::{RoutingKeys, Salt},
    generations::{Generation, Generations, InFlight, Resident, Switched},
    measure::Measurement,
    sampler::Drawer,
    scheduler::{Admitted, Arrival, Limits, Scheduler, SequenceId, Share},
    sequence::{Progress, Rows, Sequence, Submission, Surroundings},
    status::Shared,
    turns::{self, Lane, TurnRequest},
};
use crate::{
    error::{Error, ErrorKind, Result},
    model::{Batch, Drawn, Forward, LanguageModel, Span},
    moe::{
        LayerRouting,
        policy::LayerChoices,
        trace::{self, TracedLayer},
    },
    telemetry::metrics::{Completed, Generated, Outcome, Rejection, SampleOutcome, Step},
};

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
    Publish(Box<Publication>),
    Turn(TurnRequest),
    SetShare(Option<turns::Share>),
    Shutdown,
}

/// Other weights, and who waits for them to be in force.
#[derive(Debug)]
pub(super) struct Publication {
    pub(super) generation: Generation,
    pub(super) in_flight: InFlight,
    pub(super) reply: oneshot::Sender<Result<Switched>>,
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
    generations: Generations,
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
    /// The model's device is of no use any more, nor is this process.
    lost: bool,
    scheduler: Scheduler,
    sequences: BTreeMap<SequenceId, Sequence>,
    deadlines: BTreeSet<(Instant, SequenceId)>,
    /// Those that have sent something: their readers can be behind.
    streaming: BTreeSet<SequenceId>,
    /// Most tokens per second that a full step has computed lately; 0 before the first.
    speed: f64,
    routing_keys: RoutingKeys,
    background: Background,
    lane: Lane,
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

/// What sequences take of a forward, of which the next one has the first part.
#[derive(Clone, Copy)]
struct Computed<'a> {
    /// Of all; empty where none is traced.
    layers: &'a [TracedLayer<'a>],
    /// What became of each row of logits.
    drawn: &'a [Drawn],
    /// `[rows, V]`: one for each [`Drawn::Row`].
    logits: &'a [f32],
}

impl Computed<'_> {
    /// The part of a sequence that asked for so many `rows`, and the rest. There is no such part where it asked for more than there are.
    fn split(self, rows: usize, vocab_size: usize) -> Option<(Self, Self)> {
        let (mine, others) = self.drawn.split_at_checked(rows)?;
        let values = mine.iter().filter(|&&drawn| drawn == Drawn::Row).count() * vocab_size;
        let (logits, rest) = self.logits.split_at_checked(values)?;
        Some((Self { drawn: mine, logits, ..self }, Self { drawn: others, logits: rest, ..self }))
    }
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
        generations: Generations,
        clock: Clock,
        surroundings: Surroundings,
        config: &EngineConfig,
        shared: Arc<Shared>,
        commands: mpsc::Receiver<Command>,
    ) -> Self {
        let EngineConfig { max_batch_requests, max_step_tokens, priority_step, .. } = *config;
        let limits = Limits { max_running: max_batch_requests, max_step_tokens, priority_step };
        let scheduler = Scheduler::new(limits, model.cache());
        let source = generations.current().source.clone();
        let background = Background::new(source, model.spec().clone(), config, Arc::clone(&shared));
        let lane = Lane::new(Arc::clone(&shared));
        Self {
            model,
            generations,
            clock,
            surroundings,
            shared,
            commands,
            limits,
            prefix_cache: config.prefix_cache,
            reader_timeout: config.reader_timeout,
            born: Instant::now(),
            stopping: false,
            lost: false,
            scheduler,
            sequences: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            streaming: BTreeSet::new(),
            speed: 0.0,
            routing_keys: RoutingKeys::default(),
            background,
            lane,
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
            self.show_generations();
            if self.lost {
                break;
            }
            let load = if let Pace::Busy = pace { Load::Busy(begun.elapsed()) } else { Load::Idle };
            let more = self.background.turn(load, &self.clock);
            if self.lane.turn(load) || more {
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
            let Sequence { events, group, ticket, generation, .. } = sequence;
            drop(ticket);
            self.shared.metrics.finished(Outcome::Error);
            self.shared.tallies.ended(generation.number, false);
            if !told.contains(&id) {
                told = group;
                let _ = events.try_send(Event::Failed(started_anew()));
            }
        }
        self.return_to_current();
        self.show_cache();
        self.show_generations();
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
                Ok(Command::Publish(publication)) => self.publish(*publication),
                Ok(Command::Turn(request)) => self.lane.push(request),
                Ok(Command::SetShare(share)) => self.lane.set_share(share),
                Ok(Command::Shutdown) | Err(TryRecvError::Disconnected) => return ControlFlow::Break(()),
                Err(TryRecvError::Empty) => return ControlFlow::Continue(()),
            }
            command = self.commands.try_recv();
        }
    }

    fn enqueue(&mut self, submission: Submission) {
        let (events, ids) = (submission.events.clone(), submission.ids.clone());
        let arrival = self.arrival(&submission);
        let (surroundings, generation) = (&self.surroundings, self.generations.current());
        let error = match catch_unwind(AssertUnwindSafe(|| Sequence::new(submission, surroundings, generation))) {
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
        let generation = self.generations.current().number;
        // What is not computed leaves no trace.
        let salt = if request.trace { None } else { salt(self.prefix_cache, &mut self.routing_keys, &request.routing, ids, generation) };
        let at = milestones.submitted().saturating_duration_since(self.born);
        Arrival { ids: ids.clone(), at, priority: request.priority, tokens: request.prompt.len(), salt }
    }

    /// Puts other weights in force: what comes from now on runs on them, and of what is inside that which is to be migrated.
    fn publish(&mut self, publication: Publication) {
        let Publication { generation, in_flight, reply } = publication;
        let begun = Instant::now();
        let switched = self.generations.publish(&mut *self.model, generation).map(|previous| {
            let current = Arc::clone(self.generations.current());
            self.background.publish(current.source.clone());
            self.shared.set_generation(current.number);
            let migrated = if in_flight == InFlight::Migrate { self.migrate(&current) } else { 0 };
            let staying = self.sequences.values().filter(|sequence| sequence.generation.number != current.number).count();
            self.show_generations();
            let (took, generations) = (begun.elapsed(), self.generations.resident());
            tracing::info!(generation = current.number, previous, staying, migrated, generations, ?took, "other weights are in force");
            Switched { previous, staying, migrated, took }
        });
        // Whoever has gone does not want to know.
        let _ = reply.send(switched);
    }

    /// Lets continuations go on under other weights; how many.
    fn migrate(&mut self, to: &Arc<Resident>) -> usize {
        let (mut migrated, prefix_cache, keys) = (0, self.prefix_cache, &mut self.routing_keys);
        for (&id, sequence) in &mut self.sequences {
            if sequence.can_migrate() && sequence.generation.number != to.number {
                sequence.generation = Arc::clone(to);
                self.scheduler.restart(id, salt(prefix_cache, keys, &sequence.routing, &sequence.group, to.number));
                migrated += 1;
            }
        }
        self.note_preempted();
        migrated
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

    /// One forward for everyone who can go on, or one for each generation that they run on. `false` if nobody can.
    fn step(&mut self, mut begun: Instant) -> bool {
        let mut shares = std::mem::take(&mut self.shares);
        self.scheduler.plan(&self.sequences, &mut shares);
        self.note_preempted();
        // Among those of one generation, single tokens come first, which kernels do apart from prompts; then the order stays that of ranks.
        shares.sort_by_key(|share| (self.sequences.get(&share.id).map(|sequence| sequence.generation.number), share.tokens > 1));
        let mut rest = &shares[..];
        while let Some(generation) = rest.first().and_then(|share| self.sequences.get(&share.id)).map(|first| Arc::clone(&first.generation))
        {
            let others = rest.iter().position(|share| self.runs_on(share.id) != Some(generation.number));
            let (mine, others) = rest.split_at(others.unwrap_or(rest.len()));
            self.compute(&generation, mine, begun);
            (rest, begun) = (others, Instant::now());
        }
        self.return_to_current();
        self.shares = shares;
        !self.shares.is_empty()
    }

    fn runs_on(&self, id: SequenceId) -> Option<u64> {
        self.sequences.get(&id).map(|sequence| sequence.generation.number)
    }

    /// The model has the weights in force between steps, so that older ones go with their last sequence.
    fn return_to_current(&mut self) {
        if let Err(error) = self.generations.load_current(&mut *self.model) {
            tracing::error!(%error, "the weights in force cannot be run on");
        }
    }

    /// A forward of sequences that run on `generation`.
    fn compute(&mut self, generation: &Arc<Resident>, shares: &[Share], begun: Instant) {
        let started = (self.clock)();
        let mut batch = std::mem::take(&mut self.batch);
        self.build(&mut batch, shares, started);
        let launched = Instant::now();
        let loaded = self.generations.load(&mut *self.model, generation).map_err(|error| error.to_string());
        let forward = loaded.and_then(|()| self.forward(&batch));
        let (now, forward_time) = ((self.clock)(), launched.elapsed());
        let settled = forward.and_then(|forward| {
            self.measure(&batch, now.saturating_duration_since(started));
            // On a device a token that is no number reaches others of its step and sequence.
            if forward.layers.iter().any(|layer| layer.stats.non_finite > 0) {
                shares.iter().for_each(|share| self.scheduler.keep_private(share.id));
            }
            let (layers, drawn) = (traced_layers(&batch, &forward.layers)?, &forward.drawn[..]);
            let settled = forward.read_logits(|logits| self.settle(shares, &batch, Computed { layers: &layers, drawn, logits }, now));
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
        batch.routes = false;
        for &share in shares {
            let end = share.past + share.tokens;
            if let Some(sequence) = self.sequences.get_mut(&share.id) {
                sequence.begin_step(now);
                let (table, tokens) = (self.scheduler.table(share.id, end), sequence.tokens().get(share.past..end).unwrap_or_default());
                batch.push(table, tokens, share.past, sequence.routing.from_position(share.past), sequence.logit_rows(share));
                batch.routes |= sequence.is_traced();
                if self.surroundings.drawer == Drawer::Model {
                    let rows = batch.spans.last().map_or(0, Span::num_logit_rows);
                    batch.choices.extend(std::iter::repeat_n(sequence.row_choice(), rows));
                }
            }
        }
    }

    /// Runs the model; a failure is told in words, because it is told to every request of the batch.
    fn forward(&mut self, batch: &Batch) -> Result<Forward, String> {
        let (model, vocab_size) = (&mut self.model, self.surroundings.vocab_size);
        let result = catch_unwind(AssertUnwindSafe(|| checked(model.forward(batch)?, batch.num_logit_rows(), vocab_size)));
        match result {
            Ok(Ok(forward)) => Ok(forward),
            Ok(Err(error)) => {
                self.lost |= matches!(error, Error::DeviceLost(_));
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

    fn report_panic(&self, panic: &(dyn Any + Send), place: &'static str) {
        tracing::error!(place, message = panic_message(panic), "panic in the engine; its requests fail, the engine goes on");
        self.shared.metrics.engine_panicked();
    }

    fn show_cache(&self) {
        let pool = self.scheduler.pool();
        self.shared.metrics.set_cache_usage(pool.held(), pool.shape().num_blocks);
    }

    fn show_generations(&self) {
        let (current, resident) = (self.generations.current().number, self.generations.resident());
        let is_older = |sequence: &&Sequence| sequence.generation.number != current;
        let older = if resident > 1 { self.sequences.values().filter(is_older).count() } else { 0 };
        self.shared.metrics.set_generations(resident, self.sequences.len() - older, older);
    }

    /// Gives each sequence its rows, and its reader what came of them.
    fn settle(&mut self, shares: &[Share], batch: &Batch, computed: Computed<'_>, now: Instant) {
        let (mut rest, mut first) = (computed, 0);
        for (share, span) in shares.iter().zip(&batch.spans) {
            let Some((mine, others)) = rest.split(span.num_logit_rows(), self.surroundings.vocab_size) else { return };
            self.advance(*share, Rows { drawn: mine.drawn, logits: mine.logits, layers: mine.layers, first, now });
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
            self.background.offer(&sequence, (self.clock)());
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
        match ending {
            Ending::Finished(_) => self.shared.tallies.ended(sequence.generation.number, true),
            Ending::Failed(error) if error.kind() == ErrorKind::Internal => self.shared.tallies.ended(sequence.generation.number, false),
            Ending::Failed(_) | Ending::Cancelled | Ending::Shed => {}
        }
        Some(sequence)
    }

    /// Ends everything that is left, and whatever was sent before the handle said so.
    fn end_all(&mut self) {
        self.shared.update(|status| status.draining = true);
        self.background.end(SampleOutcome::DroppedDraining, || Error::Draining);
        self.lane.clear();
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

/// What blocks of a request depend on besides their tokens; `None`: they are nobody else's.
fn salt(
    prefix_cache: PrefixCache,
    keys: &mut RoutingKeys,
    routing: &LayerChoices,
    choices: &Range<SequenceId>,
    generation: u64,
) -> Option<Salt> {
    let common = if prefix_cache == PrefixCache::On { keys.key(routing) } else { None };
    let several = choices.end - choices.start > 1;
    let private = several.then_some(Salt::Private { request: choices.start, generation });
    common.map(|routing| Salt::Common { generation, routing }).or(private)
}

/// What everything that was inside when the engine panicked is told.
fn started_anew() -> Error {
    Error::Internal("the engine panicked and was started anew".into())
}

/// A forward that has an answer for each of the `rows` that were asked for; where the model drew none, that is spelt out.
fn checked(mut forward: Forward, rows: usize, vocab_size: usize) -> Result<Forward> {
    let drawn = &mut forward.drawn;
    if drawn.is_empty() {
        drawn.resize(rows, Drawn::Row);
    }
    if drawn.len() != rows {
        return Err(Error::Internal(format!("{} rows of logits answered instead of {rows}", drawn.len())));
    }
    let expected = (drawn.iter().filter(|&&drawn| drawn == Drawn::Row).count(), vocab_size);
    match forward.logits.dims2()? {
        found if found == expected => Ok(forward),
        found => Err(Error::Internal(format!("logits of shape {found:?} instead of {expected:?}"))),
    }
}

/// What the traces of a step are made of: nothing where none is asked for.
fn traced_layers<'a>(batch: &Batch, layers: &'a [LayerRouting]) -> Result<Vec<TracedLayer<'a>>, String> {
    if !batch.routes {
        return Ok(Vec::new());
    }
    trace::traced_layers(layers, batch.tokens.len()).map_err(|error| format!("the routing cannot be read: {error}"))
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
