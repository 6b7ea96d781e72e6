//! What the async side asks of the engine, and what comes back.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use crate::{
    error::Error,
    fidelity::shadow::ShadowChoice,
    moe::{policy::LayerChoices, trace::RoutingTrace},
};

/// One prompt to work on.
#[derive(Clone, Debug)]
pub struct Request {
    /// For logs and traces.
    pub id: String,
    /// The trace that it belongs to, for log lines.
    pub trace_id: Option<Arc<str>>,
    /// Token ids, checked against the vocabulary by [`super::Engine::submit`].
    pub prompt: Vec<u32>,
    /// What to do with them.
    pub task: Task,
    /// Routing of its tokens.
    pub routing: LayerChoices,
    /// Tell which experts its tokens were given: [`Tokens::trace`]. Nothing is taken from the cache then.
    pub trace: bool,
    /// After this instant the request fails with `DeadlineExceeded`, in any state.
    pub deadline: Option<Instant>,
    /// Larger goes first; 0 is ordinary.
    pub priority: i32,
    /// Whether it is measured against the reference routing when it has ended well.
    pub shadow: ShadowChoice,
}

/// What to do with a prompt.
#[derive(Clone, Debug)]
pub enum Task {
    /// Continue it.
    Generate(GenerateParams),
    /// Report the log-probability of each of its tokens, with this many alternatives.
    Score {
        /// Likeliest alternatives per token, at most [`MAX_LOGPROBS`].
        alternatives: usize,
    },
    /// Only read it, for its [`Request::trace`].
    Read,
}

/// Most alternatives that can be asked for.
pub const MAX_LOGPROBS: usize = 20;

/// How to continue a prompt. Ranges are those of `hardmax.v1.SamplingParams`; [`super::Engine::submit`] checks them.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateParams {
    /// Independent continuations. The prompt is computed once for all of them.
    pub n: usize,
    /// Of each choice. `None`: what is left of the context, at most the engine's limit.
    pub max_new_tokens: Option<usize>,
    /// So many tokens come before whatever ends a choice: until then no token that would end it can be drawn, and no stop string is
    /// looked for.
    pub min_new_tokens: usize,
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// 0: off.
    pub top_k: usize,
    /// 1: off.
    pub top_p: f32,
    /// 0: off.
    pub min_p: f32,
    /// Drawn by the caller if the client gave none. Each choice has its own: [`GenerateParams::seed_of`].
    pub seed: u64,
    /// Not empty strings.
    pub stop: Vec<String>,
    /// In addition to the model's end-of-sequence tokens.
    pub stop_token_ids: Vec<u32>,
    /// Divides positive and multiplies negative logits of tokens that the prompt or the continuation has. 1: off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that the continuation has. 0: off.
    pub presence_penalty: f32,
    /// The same, once for each time that the continuation has the token. 0: off.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens; each at most once.
    pub logit_bias: Vec<(u32, f32)>,
    /// Nothing else can be drawn; each at most once. Empty: everything can.
    pub allowed_token_ids: Vec<u32>,
    /// Alternatives per generated token; `None` for no log-probabilities.
    pub logprobs: Option<usize>,
    /// Go on after the end-of-sequence token.
    pub ignore_eos: bool,
}

impl Default for GenerateParams {
    fn default() -> Self {
        Self {
            n: 1,
            max_new_tokens: None,
            min_new_tokens: 0,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            allowed_token_ids: Vec::new(),
            logprobs: None,
            ignore_eos: false,
        }
    }
}

impl GenerateParams {
    /// The seed of a choice: that of the request for choice 0, so that the first of several is what a single one would be.
    pub fn seed_of(&self, choice: usize) -> u64 {
        if choice == 0 {
            return self.seed;
        }
        // The finalizer of SplitMix64: seeds of neighbouring requests and choices do not meet.
        let mut z = self.seed.wrapping_add((choice as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

/// The log-probability of one token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Natural logarithm; `None` for the first token of a scored text.
    pub logprob: Option<f32>,
    /// Likeliest tokens, descending.
    pub alternatives: Vec<(u32, f32)>,
}

/// What the engine sends for a request. The `Tokens` of all choices are interleaved; each choice has one `Finished` after its own.
/// The stream ends after the last choice has finished, or with one `Failed` for all that have not.
#[derive(Debug)]
pub enum Event {
    /// Progress of a generation.
    Tokens(Tokens),
    /// The end of one choice. Boxed: it is sent once, and large.
    Finished(Box<Finished>),
    /// The end of everything, without a result.
    Failed(Error),
}

/// Newly generated tokens of one choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tokens {
    /// Which of [`GenerateParams::n`], from 0.
    pub choice: usize,
    /// What they added to the text; never half a character, never part of a stop string. May be empty.
    pub text: String,
    /// Usually one.
    pub ids: Vec<u32>,
    /// For `ids`, if asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// What the step read, if asked for: a stretch of the prompt, or the token before `ids`. The stretches of a choice follow on each
    /// other from position 0 on. While the prompt is read they come alone, without `ids`. The last token is never read.
    /// Boxed: most have none.
    pub trace: Option<Box<RoutingTrace>>,
}

/// The last word on a choice.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Which of [`GenerateParams::n`], from 0; 0 where nothing is generated.
    pub choice: usize,
    /// The last tokens of a generation, with the text that was held back.
    pub tail: Tokens,
    /// Why it ended.
    pub reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that were in the cache: computed for another request, or for an earlier choice of this one.
    pub cached_prompt_tokens: usize,
    /// Tokens generated, the one that stopped it included.
    pub generated_tokens: usize,
    /// For [`Task::Score`]: one for each token of the prompt.
    pub prompt_logprobs: Vec<TokenLogprob>,
    /// Split of time.
    pub timing: Timing,
    /// Generation of the weights that its last token is of; of all tokens, but where it was migrated ([`InFlight`](super::InFlight)).
    pub generation: u64,
}

/// Why a request ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model's end-of-sequence token.
    EndOfSequence(u32),
    /// A stop token of the request.
    StopToken(u32),
    /// A stop string of the request.
    StopString(String),
    /// `max_new_tokens`, or the end of the context; where nothing is generated, the end of the text.
    Length,
}

/// Where the time of a request went.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timing {
    /// From submission to the first step.
    pub queue: Duration,
    /// From there to the first token, or to the end where nothing is generated.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}

/// The moments that divide the life of a request, for all its choices together. The engine sets each as it comes; what a request that was
/// cancelled or failed did not come to stays unset.
#[derive(Debug)]
pub struct Milestones {
    submitted: Instant,
    first_step: OnceLock<Instant>,
    first_token: OnceLock<Instant>,
}

impl Milestones {
    pub(super) fn new(submitted: Instant) -> Self {
        Self { submitted, first_step: OnceLock::new(), first_token: OnceLock::new() }
    }

    /// It was put in the queue.
    pub fn submitted(&self) -> Instant {
        self.submitted
    }

    /// The first step that worked on it began.
    pub fn first_step(&self) -> Option<Instant> {
        self.first_step.get().copied()
    }

    /// A choice had its first token. A score has none.
    pub fn first_token(&self) -> Option<Instant> {
        self.first_token.get().copied()
    }

    /// Only the first of these calls counts.
    pub(super) fn set_first_step(&self, now: Instant) {
        let _ = self.first_step.set(now);
    }

    /// Only the first of these calls counts.
    pub(super) fn set_first_token(&self, now: Instant) {
        let _ = self.first_token.set(now);
    }
}
