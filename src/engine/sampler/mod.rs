//! From a row of logits to a token, and to log-probabilities.
//!
//! In this order:
//! 1. For tokens seen before, repetition penalty (of prompt and continuation), then frequency and presence penalty (of the
//!    continuation alone).
//! 2. Logit bias.
//! 3. What may not be drawn goes: all but the allowed tokens; and those that end the continuation, until it has its least number.
//! 4. At temperature 0, or where only one token is left to choose, the likeliest, the lowest id of equals. Else temperature, min-p,
//!    top-k, top-p, and a draw. Each filter sees the distribution that the one before left, scaled to sum to 1.
//!
//! Log-probabilities are those of the model itself: of the row before all that.
//!
//! Where the model can draw, it does so for whoever needs nothing of the row but a token of step 4: [`Sampler::by_model`].

mod draw;
mod edits;
mod row;

use std::collections::HashSet;

use self::{
    draw::{Draw, Row},
    edits::Edits,
    row::{Key, Peak},
};
use super::request::{GenerateParams, TokenLogprob};
use crate::{
    error::{Error, Result},
    model::TokenDraw,
};

/// Below this temperature the likeliest token is all that is left, and the division would only overflow.
const GREEDY_BELOW: f32 = 1e-6;

/// Chooses the tokens of one choice. Its random numbers are its own, so the other sequences of a batch change nothing.
pub(super) struct Sampler {
    edits: Edits,
    /// Empty: all tokens.
    allowed: Vec<u32>,
    rule: Rule,
}

enum Rule {
    Greedy,
    Random(Draw),
}

/// Who draws the tokens for which nothing but the model's row is needed; it decides what a seed stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Drawer {
    /// The sampler, like all others.
    Sampler,
    /// The model: see [`LanguageModel::draws`](crate::model::LanguageModel::draws).
    Model,
}

impl Sampler {
    /// A sampler for one choice of continuations of `prompt`.
    pub(super) fn new(params: &GenerateParams, prompt: &[u32], choice: usize, eos_token_ids: &HashSet<u32>, drawer: Drawer) -> Self {
        let greedy = params.temperature < GREEDY_BELOW || params.top_k == 1;
        let rule = if greedy { Rule::Greedy } else { Rule::Random(Draw::new(params, params.seed_of(choice), drawer)) };
        Self { edits: Edits::new(params, prompt, eos_token_ids), allowed: params.allowed_token_ids.clone(), rule }
    }

    /// How a model that draws finds the next token; `None` if the row has to come here.
    pub(super) fn by_model(&self) -> Option<TokenDraw> {
        if !self.allowed.is_empty() || !self.edits.idle() {
            return None;
        }
        match &self.rule {
            Rule::Greedy => Some(TokenDraw::LIKELIEST),
            Rule::Random(draw) => draw.by_model(),
        }
    }

    /// Counts the next token of the continuation, which the model drew.
    pub(super) fn take(&mut self, token: u32) {
        self.edits.record(token);
        if let Rule::Random(draw) = &mut self.rule {
            draw.taken();
        }
    }

    /// The next token after a row `[V]`. Fails with [`Error::NonFinite`] if not all of it is finite.
    pub(super) fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let token = if self.edits.idle() {
            self.choose(logits, Values::Finite)?
        } else {
            row::finite_peak(logits)?;
            let mut edited = logits.to_vec();
            self.edits.apply(&mut edited);
            self.choose(&edited, Values::Edited)?
        };
        self.take(token);
        Ok(token)
    }

    fn choose(&mut self, logits: &[f32], values: Values) -> Result<u32> {
        if !self.allowed.is_empty() {
            return self.choose_allowed(logits, values);
        }
        match &mut self.rule {
            Rule::Greedy => {
                let peak = if values == Values::Finite { row::finite_peak(logits)? } else { row::peak(logits) };
                check_left(peak)?;
                Ok(peak.index as u32)
            }
            Rule::Random(draw) => {
                let (peak, maxima, finite) = row::maxima(logits);
                if values == Values::Finite && !finite {
                    return Err(Error::NonFinite);
                }
                check_left(peak)?;
                draw.of_row(&Row { values: logits, max: peak.value, maxima: &maxima })
            }
        }
    }

    fn choose_allowed(&mut self, logits: &[f32], values: Values) -> Result<u32> {
        if values == Values::Finite {
            row::finite_peak(logits)?;
        }
        let allowed = self.allowed.iter().filter_map(|&id| logits.get(id as usize).map(|&logit| Key::new(id, logit)));
        let keys: Vec<Key> = allowed.filter(|key| key.value() > f32::NEG_INFINITY).collect();
        let largest = *keys.iter().max().ok_or_else(nothing_left)?;
        match &mut self.rule {
            Rule::Greedy => Ok(largest.index()),
            Rule::Random(draw) => draw.of_keys(keys, largest.value()),
        }
    }
}

/// What is known of the values of a row.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Values {
    /// They are the model's own, and have to be finite.
    Finite,
    /// They were; negative infinity marks what may not be drawn.
    Edited,
}

fn check_left(peak: Peak) -> Result<()> {
    if peak.value == f32::NEG_INFINITY { Err(nothing_left()) } else { Ok(()) }
}

/// Requests that come to this are refused when they are submitted.
fn nothing_left() -> Error {
    Error::Internal("no token may be drawn".into())
}

/// The log-probability of `token` and of the `alternatives` likeliest tokens: log-softmax of `logits` as the model made
/// them, without penalty, temperature or filter.
pub(super) fn logprob(logits: &[f32], token: u32, alternatives: usize) -> TokenLogprob {
    let max = row::peak(logits).value;
    let log_sum = f64::from(max) + row::mass(logits, max, 1.0).ln();
    let of = |logit: f32| (f64::from(logit) - log_sum) as f32;
    TokenLogprob {
        token,
        logprob: logits.get(token as usize).map(|&logit| of(logit)),
        alternatives: largest(logits, alternatives).into_iter().map(|key| (key.index(), of(key.value()))).collect(),
    }
}

/// The `n` largest values, descending. `n` is small.
fn largest(row: &[f32], n: usize) -> Vec<Key> {
    let mut best: Vec<Key> = Vec::with_capacity(n + 1);
    let mut least = f32::NEG_INFINITY;
    for (&value, index) in row.iter().zip(0..) {
        // An equal one of a higher index does not displace.
        if n == 0 || (best.len() == n && value <= least) {
            continue;
        }
        let key = Key::new(index, value);
        best.insert(best.partition_point(|&other| other > key), key);
        best.truncate(n);
        least = best.last().map_or(least, |key| key.value());
    }
    best
}

#[cfg(test)]
mod tests;
