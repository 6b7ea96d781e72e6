//! One choice of a request at work: its tokens, and what is made of its logits. How far the model has read them is the scheduler's business,
//! so that they can be read again: what was made of them stays.

use std::{
    collections::{BTreeMap, HashSet},
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use tokenizers::Tokenizer;
use tokio::sync::mpsc;

use super::{
    generations::Resident,
    request::{Event, FinishReason, Finished, GenerateParams, Milestones, Request, Task, Timing, TokenLogprob, Tokens},
    sampler::{self, Drawer, Sampler},
    scheduler::{Readiness, SequenceId, Sequences, Share},
    status::Ticket,
    stream::UnreadTraces,
    text::{Detokenizer, StopStrings},
};
use crate::{
    error::{Error, Result},
    fidelity::shadow::ShadowChoice,
    model::{Drawn, LogitRows, RowChoice},
    moe::{
        policy::LayerChoices,
        trace::{RoutingTrace, TracedLayer},
    },
};

/// After this long behind its reader a request gives its place to one that waits.
const STALLED_AFTER: Duration = Duration::from_secs(1);

/// A request on its way from the handle to the worker.
#[derive(Debug)]
pub(super) struct Submission {
    pub(super) request: Request,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) unread: Arc<UnreadTraces>,
    pub(super) milestones: Arc<Milestones>,
    /// One for each choice.
    pub(super) ids: Range<SequenceId>,
    /// One for each choice.
    pub(super) tickets: Vec<Ticket>,
}

/// What sequences need to know of the model and the server.
#[derive(Debug)]
pub(super) struct Surroundings {
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) eos_token_ids: HashSet<u32>,
    pub(super) vocab_size: usize,
    pub(super) drawer: Drawer,
    pub(super) max_context: usize,
    /// Decoder layers with experts.
    pub(super) moe_layers: Arc<[usize]>,
    /// Most tokens that a request may generate.
    pub(super) max_new_tokens: usize,
}

/// One choice of a request that waits or runs.
pub(super) struct Sequence {
    /// Of the request.
    pub(super) name: Arc<str>,
    /// Of the request, for log lines.
    pub(super) trace_id: Option<Arc<str>>,
    /// All choices of the request.
    pub(super) group: Range<SequenceId>,
    /// The weights that it runs on.
    pub(super) generation: Arc<Resident>,
    pub(super) events: mpsc::Sender<Event>,
    unread: Arc<UnreadTraces>,
    pub(super) ticket: Ticket,
    pub(super) routing: LayerChoices,
    pub(super) shadow: ShadowChoice,
    pub(super) deadline: Option<Instant>,
    pub(super) submitted: Instant,
    /// Start of the first step that worked on it.
    pub(super) first_step: Option<Instant>,
    pub(super) first_token: Option<Instant>,
    pub(super) last_token: Option<Instant>,
    /// Tokens of the prompt that were found in the cache when it was first admitted.
    pub(super) cached_prompt_tokens: Option<usize>,
    milestones: Arc<Milestones>,
    choice: usize,
    /// Since when its reader leaves no room in the channel.
    stalled_since: Option<Instant>,
    stalled: bool,
    /// Prompt and continuation.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    /// What was recorded and not told yet, if it is to be told.
    trace: Option<RoutingTrace>,
    task: Job,
}

enum Job {
    Generate(Box<Generation>),
    Score { alternatives: usize, logprobs: Vec<TokenLogprob> },
    Read,
}

struct Generation {
    sampler: Sampler,
    text: Detokenizer,
    stops: StopStrings,
    stop_tokens: HashSet<u32>,
    ignore_eos: bool,
    min_new_tokens: usize,
    logprobs: Option<usize>,
    limit: usize,
}

/// What a step made of a sequence.
#[derive(Debug)]
pub(super) enum Progress {
    /// Nothing to tell yet.
    Quiet,
    Tokens(Tokens),
    Finished(Box<Finished>),
}

/// What a step computed for one sequence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows<'a> {
    /// What became of each row that [`Sequence::logit_rows`] asked for.
    pub(super) drawn: &'a [Drawn],
    /// `[rows, V]`: one for each [`Drawn::Row`].
    pub(super) logits: &'a [f32],
    /// What the routers did for the whole step; empty where no sequence of it is traced.
    pub(super) layers: &'a [TracedLayer<'a>],
    /// The first row of the sequence in `layers`.
    pub(super) first: usize,
    /// End of the step.
    pub(super) now: Instant,
}

impl Rows<'_> {
    /// Checks that the logits of all rows are there, and finite.
    fn all(&self) -> Result<()> {
        if self.drawn.contains(&Drawn::NonFinite) || self.logits.iter().any(|logit| !logit.is_finite()) {
            return Err(Error::NonFinite);
        }
        match self.drawn.iter().find(|&&drawn| drawn != Drawn::Row) {
            None => Ok(()),
            Some(drawn) => Err(Error::Internal(format!("the model made {drawn:?} of a row that was asked for as it is"))),
        }
    }
}

impl Sequence {
    /// Sequences that nothing has been done for, one for each choice, to run on `generation`. Fails if the tokenizer cannot decode the
    /// prompt.
    pub(super) fn new(submission: Submission, surroundings: &Surroundings, generation: &Arc<Resident>) -> Result<Vec<Self>> {
        let Submission { request, events, unread, milestones, ids, tickets } = submission;
        let name: Arc<str> = request.id.into();
        let sequence = |(choice, ticket)| {
            let task = match &request.task {
                &Task::Score { alternatives } => {
                    let first = request.prompt.first().map(|&token| TokenLogprob { token, logprob: None, alternatives: Vec::new() });
                    Job::Score { alternatives, logprobs: first.into_iter().collect() }
                }
                Task::Generate(params) => Job::Generate(Box::new(Generation::new(params.clone(), choice, &request.prompt, surroundings)?)),
                Task::Read => Job::Read,
            };
            Ok(Self {
                name: name.clone(),
                trace_id: request.trace_id.clone(),
                group: ids.clone(),
                generation: Arc::clone(generation),
                events: events.clone(),
                unread: unread.clone(),
                ticket,
                routing: request.routing.clone(),
                shadow: request.shadow,
                deadline: request.deadline,
                submitted: milestones.submitted(),
                first_step: None,
                first_token: None,
                last_token: None,
                cached_prompt_tokens: None,
                milestones: milestones.clone(),
                choice,
                stalled_since: None,
                stalled: false,
                prompt_tokens: request.prompt.len(),
                tokens: request.prompt.clone(),
                trace: request.trace.then(|| RoutingTrace::new(0, Arc::clone(&surroundings.moe_layers))),
                task,
            })
        };
        tickets.into_iter().enumerate().map(sequence).collect()
    }

    /// Its reader has to catch up: there is a place in the channel for one event of each choice, and one for the last word; or what is in
    /// it is too large.
    fn blocked(&self) -> bool {
        self.events.capacity() <= self.group.clone().count() || self.unread.are_too_many()
    }

    /// How long it has been waiting for its reader; `None` if it is not.
    pub(super) fn stalled(&mut self, now: Instant) -> Option<Duration> {
        self.stalled_since = self.blocked().then(|| self.stalled_since.unwrap_or(now));
        let waited = self.stalled_since.map(|since| now.saturating_duration_since(since));
        self.stalled = waited.is_some_and(|waited| waited >= STALLED_AFTER);
        waited
    }

    /// Prompt and continuation.
    pub(super) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens of the prompt.
    pub(super) fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// The logits that a share is computed for. Those that were seen before a preemption are not asked for again.
    pub(super) fn logit_rows(&self, share: Share) -> LogitRows {
        let end = share.past + share.tokens;
        match &self.task {
            Job::Score { logprobs, .. } if end < logprobs.len() => LogitRows::None,
            Job::Score { .. } => LogitRows::All,
            Job::Generate(_) if end == self.tokens.len() => LogitRows::Last,
            Job::Generate(_) | Job::Read => LogitRows::None,
        }
    }

    /// What it needs of each of its rows, where the model can draw.
    pub(super) fn row_choice(&self) -> RowChoice {
        match &self.task {
            Job::Generate(generation) => generation.row_choice(),
            Job::Score { .. } | Job::Read => RowChoice::Logits,
        }
    }

    /// Tokens of the prompt in a share.
    pub(super) fn prompt_part(&self, share: Share) -> usize {
        (share.past + share.tokens).min(self.prompt_tokens).saturating_sub(share.past)
    }

    /// A step that works on it begins.
    pub(super) fn begin_step(&mut self, now: Instant) {
        if self.first_step.is_none() {
            self.first_step = Some(now);
            self.milestones.set_first_step(now);
        }
    }

    /// Whether its routing is to be told.
    pub(super) fn is_traced(&self) -> bool {
        self.trace.is_some()
    }

    /// Notes the routing of what a step computed of it, if that is asked for. What was read before a preemption has been noted.
    fn note_routing(&mut self, share: Share, rows: Rows<'_>) -> Result<()> {
        let Some(trace) = &mut self.trace else { return Ok(()) };
        let noted = (trace.first_position + trace.num_tokens()).saturating_sub(share.past).min(share.tokens);
        trace.record(rows.layers, rows.first + noted..rows.first + share.tokens)
    }

    /// What was noted since the last time. `None` without a word to say.
    fn take_trace(&mut self) -> Option<Box<RoutingTrace>> {
        let trace = self.trace.as_mut().filter(|trace| trace.num_tokens() > 0)?;
        let next = RoutingTrace::new(trace.first_position + trace.num_tokens(), Arc::clone(&trace.layers));
        self.unread.add(trace);
        Some(Box::new(std::mem::replace(trace, next)))
    }

    /// Nothing but what was noted.
    fn quiet(&mut self) -> Progress {
        match self.take_trace() {
            None => Progress::Quiet,
            trace => Progress::Tokens(Tokens { choice: self.choice, trace, ..Tokens::default() }),
        }
    }

    /// Takes the result of a step that computed `share`. After an error the sequence is over.
    pub(super) fn advance(&mut self, share: Share, rows: Rows<'_>, surroundings: &Surroundings) -> Result<Progress> {
        self.note_routing(share, rows)?;
        let end = share.past + share.tokens;
        match &mut self.task {
            Job::Score { alternatives, logprobs } => {
                rows.all()?;
                for (row, next) in rows.logits.chunks_exact(surroundings.vocab_size).zip(share.past + 1..) {
                    if next == logprobs.len()
                        && let Some(&token) = self.tokens.get(next)
                    {
                        logprobs.push(sampler::logprob(row, token, *alternatives));
                    }
                }
                if end < self.tokens.len() {
                    return Ok(Progress::Quiet);
                }
                let logprobs = std::mem::take(logprobs);
                Ok(self.finished(FinishReason::Length, Tokens::default(), logprobs, rows.now))
            }
            Job::Generate(_) | Job::Read if end < self.tokens.len() => Ok(self.quiet()),
            Job::Read => {
                let tail = Tokens { trace: self.take_trace(), ..Tokens::default() };
                Ok(self.finished(FinishReason::Length, tail, Vec::new(), rows.now))
            }
            Job::Generate(generation) => {
                let generated = self.tokens.len() - self.prompt_tokens + 1;
                let (tokens, end) = generation.next(rows, generated, surroundings)?;
                let tokens = Tokens { choice: self.choice, trace: self.take_trace(), ..tokens };
                self.tokens.extend(&tokens.ids);
                if self.first_token.is_none() {
                    self.first_token = Some(rows.now);
                    self.milestones.set_first_token(rows.now);
                }
                self.last_token = Some(rows.now);
                Ok(match end {
                    None => Progress::Tokens(tokens),
                    Some(reason) => self.finished(reason, tokens, Vec::new(), rows.now),
                })
            }
        }
    }

    fn finished(&self, reason: FinishReason, tail: Tokens, prompt_logprobs: Vec<TokenLogprob>, now: Instant) -> Progress {
        Progress::Finished(Box::new(Finished {
            choice: self.choice,
            tail,
            reason,
            prompt_tokens: self.prompt_tokens,
            cached_prompt_tokens: self.cached_prompt_tokens.unwrap_or(0),
            generated_tokens: self.tokens.len() - self.prompt_tokens,
            prompt_logprobs,
            timing: self.timing(now),
            generation: self.generation.number,
        }))
    }

    /// How the time until `now` divides.
    pub(super) fn timing(&self, now: Instant) -> Timing {
        let started = self.first_step.unwrap_or(now);
        let first_token = self.first_token.unwrap_or(now);
        Timing {
            queue: started.saturating_duration_since(self.submitted),
            prefill: first_token.saturating_duration_since(started),
            decode: self.last_token.unwrap_or(first_token).saturating_duration_since(first_token),
        }
    }

    /// Whether it can go on under other weights: what it has said so far is told as tokens, and of nothing but those.
    pub(super) fn can_migrate(&self) -> bool {
        self.generates() && !self.is_traced()
    }

    /// Whether it continues its prompt, rather than scoring it.
    pub(super) fn generates(&self) -> bool {
        matches!(self.task, Job::Generate(_))
    }

    /// What it is doing, for [`Error::DeadlineExceeded`].
    pub(super) fn phase(&self) -> &'static str {
        match (self.first_step, self.first_token) {
            (None, _) => "queued",
            (Some(_), None) => "prefilling",
            (Some(_), Some(_)) => "decoding",
        }
    }
}

impl Sequences for BTreeMap<SequenceId, Sequence> {
    fn readiness(&self, id: SequenceId) -> Readiness {
        match self.get(&id) {
            Some(sequence) if !sequence.blocked() => Readiness::Ready,
            Some(sequence) if sequence.stalled => Readiness::Stalled,
            _ => Readiness::Paused,
        }
    }

    fn tokens(&self, id: SequenceId) -> &[u32] {
        self.get(&id).map_or(&[], Sequence::tokens)
    }

    fn reusable(&self, id: SequenceId) -> usize {
        self.get(&id).map_or(0, |sequence| match &sequence.task {
            Job::Generate(_) => sequence.tokens.len() - 1,
            Job::Score { logprobs, .. } => logprobs.len() - 1,
            Job::Read => 0,
        })
    }
}

impl Generation {
    fn new(params: GenerateParams, choice: usize, prompt: &[u32], surroundings: &Surroundings) -> Result<Self> {
        let room = surroundings.max_context.saturating_sub(prompt.len());
        let wanted = params.max_new_tokens.unwrap_or(usize::MAX);
        Ok(Self {
            sampler: Sampler::new(&params, prompt, choice, &surroundings.eos_token_ids, surroundings.drawer),
            text: Detokenizer::new(surroundings.tokenizer.clone(), prompt)?,
            stops: StopStrings::new(params.stop),
            stop_tokens: params.stop_token_ids.into_iter().collect(),
            ignore_eos: params.ignore_eos,
            min_new_tokens: params.min_new_tokens,
            logprobs: params.logprobs,
            limit: wanted.min(surroundings.max_new_tokens).min(room),
        })
    }

    fn row_choice(&self) -> RowChoice {
        let draw = if self.logprobs.is_none() { self.sampler.by_model() } else { None };
        draw.map_or(RowChoice::Logits, RowChoice::Token)
    }

    /// The next token: what the sampler takes of the row, or what the model drew.
    fn token(&mut self, rows: Rows<'_>, vocab_size: usize) -> Result<u32> {
        let wrong = |message: String| Err(Error::Internal(format!("the model drew {message}")));
        match *rows.drawn {
            [Drawn::Row] => self.sampler.sample(rows.logits),
            [Drawn::NonFinite] => Err(Error::NonFinite),
            [Drawn::Token(_)] if self.row_choice() == RowChoice::Logits => wrong("a token where its row was asked for".into()),
            [Drawn::Token(token)] if token as usize >= vocab_size => wrong(format!("token {token} of a vocabulary of {vocab_size}")),
            [Drawn::Token(token)] => {
                self.sampler.take(token);
                Ok(token)
            }
            _ => wrong(format!("{} tokens instead of one", rows.drawn.len())),
        }
    }

    /// The token after a row, the `generated`th of this generation, and whether it is the last.
    ///
    /// A stop token comes before a stop string, and that before the limit. The text of a stop token is not part of the
    /// continuation; its id is.
    fn next(&mut self, rows: Rows<'_>, generated: usize, surroundings: &Surroundings) -> Result<(Tokens, Option<FinishReason>)> {
        let token = self.token(rows, surroundings.vocab_size)?;
        let early = generated <= self.min_new_tokens;
        let logprobs = self.logprobs.map(|alternatives| sampler::logprob(rows.logits, token, alternatives)).into_iter().collect();
        let mut tokens = Tokens { ids: vec![token], logprobs, ..Tokens::default() };
        let mut end = if !self.ignore_eos && surroundings.eos_token_ids.contains(&token) {
            Some(FinishReason::EndOfSequence(token))
        } else if self.stop_tokens.contains(&token) {
            Some(FinishReason::StopToken(token))
        } else {
            None
        };
        if end.is_none() {
            let piece = self.text.push(token)?;
            end = self.show(&piece, early, &mut tokens).or((generated >= self.limit).then_some(FinishReason::Length));
        }
        if !matches!(end, None | Some(FinishReason::StopString(_))) {
            let piece = self.text.flush()?;
            match self.show(&piece, early, &mut tokens) {
                None => tokens.text += &self.stops.finish(),
                Some(stop) if end == Some(FinishReason::Length) => end = Some(stop),
                Some(_) => {}
            }
        }
        Ok((tokens, end))
    }

    /// Adds what stop strings let through; the reason to end if one was found. An `early` piece has none.
    fn show(&mut self, piece: &str, early: bool, tokens: &mut Tokens) -> Option<FinishReason> {
        let passed = if early { self.stops.pass(piece) } else { self.stops.push(piece) };
        tokens.text += &passed.text;
        passed.stopped_by.map(FinishReason::StopString)
    }
}
