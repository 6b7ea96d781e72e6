//! From a row of logits to a token, and to log-probabilities.
//!
//! Order: repetition penalty, temperature, min-p, top-k, top-p. Each filter sees the distribution that the one before left, scaled
//! to sum to 1. Log-probabilities are those of the model itself: of the row before all that.

use std::{borrow::Cow, cmp::Ordering, collections::HashSet};

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};

use super::request::{GenerateParams, TokenLogprob};
use crate::error::{Error, Result};

/// Below this temperature the likeliest token is all that is left, and the division would only overflow.
const GREEDY_BELOW: f32 = 1e-6;

/// Chooses the tokens of one sequence. Its random numbers are its own, so the other sequences of a batch change nothing.
pub(super) struct Sampler {
    rule: Rule,
    repetition_penalty: f32,
    /// Tokens of the prompt and of the continuation; empty where there is no penalty.
    seen: HashSet<u32>,
}

enum Rule {
    Greedy,
    Random {
        processor: Box<LogitsProcessor>,
        top_k: usize,
        /// Logits further below the largest than this are dropped: `temperature · ln(min_p)`.
        floor: Option<f32>,
    },
}

impl Sampler {
    /// A sampler for one choice of continuations of `prompt`.
    pub(super) fn new(params: &GenerateParams, prompt: &[u32], choice: usize, _eos_token_ids: &HashSet<u32>) -> Self {
        let rule = if params.temperature < GREEDY_BELOW || params.top_k == 1 {
            Rule::Greedy
        } else {
            let temperature = f64::from(params.temperature);
            let sampling =
                if params.top_p < 1.0 { Sampling::TopP { p: f64::from(params.top_p), temperature } } else { Sampling::All { temperature } };
            Rule::Random {
                processor: Box::new(LogitsProcessor::from_sampling(params.seed_of(choice), sampling)),
                top_k: params.top_k,
                floor: (params.min_p > 0.0).then(|| params.temperature * params.min_p.ln()),
            }
        };
        let seen = if params.repetition_penalty == 1.0 { HashSet::new() } else { prompt.iter().copied().collect() };
        Self { rule, repetition_penalty: params.repetition_penalty, seen }
    }

    /// The next token after a row `[V]`. Fails with [`Error::NonFinite`] if not all of it is finite.
    pub(super) fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        if logits.iter().any(|logit| !logit.is_finite()) {
            return Err(Error::NonFinite);
        }
        let penalised = self.repetition_penalty != 1.0;
        let mut logits = Cow::Borrowed(logits);
        if penalised {
            penalise(logits.to_mut(), &self.seen, self.repetition_penalty);
        }
        let token = match &mut self.rule {
            Rule::Greedy => argmax(&logits),
            Rule::Random { processor, top_k, floor } => {
                let (ids, values): (Vec<usize>, Vec<f32>) = candidates(&logits, *top_k, *floor).into_iter().unzip();
                let count = values.len();
                let index = processor.sample(&Tensor::from_vec(values, count, &Device::Cpu)?)?;
                ids[index as usize] as u32
            }
        };
        if penalised {
            self.seen.insert(token);
        }
        Ok(token)
    }
}

/// Divides positive and multiplies negative logits of seen tokens; the result stays finite.
fn penalise(logits: &mut [f32], seen: &HashSet<u32>, penalty: f32) {
    for &token in seen {
        if let Some(logit) = logits.get_mut(token as usize) {
            let scaled = if *logit >= 0.0 { *logit / penalty } else { *logit * penalty };
            *logit = scaled.clamp(f32::MIN, f32::MAX);
        }
    }
}

/// What min-p and top-k leave, in order of index: (index, logit), shifted so that the largest is 0 and no temperature overflows.
fn candidates(logits: &[f32], top_k: usize, floor: Option<f32>) -> Vec<(usize, f32)> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let floor = floor.unwrap_or(f32::NEG_INFINITY);
    let shifted = logits.iter().map(|logit| logit - max).enumerate();
    let mut kept: Vec<(usize, f32)> = shifted.filter(|&(_, logit)| logit >= floor).collect();
    if top_k > 0 && top_k < kept.len() {
        kept.select_nth_unstable_by(top_k, |&a, &b| descending(a, b));
        kept.truncate(top_k);
        kept.sort_unstable_by_key(|&(index, _)| index);
    }
    kept
}

/// Largest value first, equal values by index.
fn descending(a: (usize, f32), b: (usize, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Index of the largest value, the lowest of equal ones.
fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (index, &value) in row.iter().enumerate() {
        if value > row[best] {
            best = index;
        }
    }
    best as u32
}

/// The log-probability of `token` and of the `alternatives` likeliest tokens: log-softmax of `logits` as the model made
/// them, without penalty, temperature or filter, summed in f64.
pub(super) fn logprob(logits: &[f32], token: u32, alternatives: usize) -> TokenLogprob {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    let log_sum = f64::from(max) + sum.ln();
    let of = |logit: f32| (f64::from(logit) - log_sum) as f32;
    TokenLogprob {
        token,
        logprob: logits.get(token as usize).map(|&logit| of(logit)),
        alternatives: largest(logits, alternatives).into_iter().map(|(index, logit)| (index as u32, of(logit))).collect(),
    }
}

/// The `n` largest values with their indices, descending. `n` is small.
fn largest(row: &[f32], n: usize) -> Vec<(usize, f32)> {
    let mut best: Vec<(usize, f32)> = Vec::with_capacity(n + 1);
    for entry in row.iter().copied().enumerate() {
        if best.len() == n && best.last().is_none_or(|&last| descending(entry, last) == Ordering::Greater) {
            continue;
        }
        let place = best.partition_point(|&other| descending(other, entry) == Ordering::Less);
        best.insert(place, entry);
        best.truncate(n);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: [f32; 6] = [0.5, 3.0, -1.0, 3.0, 2.0, 0.0];

    fn draws(params: &GenerateParams, row: &[f32], n: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(params, &[], 0, &HashSet::new());
        (0..n).map(|_| sampler.sample(row).unwrap()).collect()
    }

    fn hot() -> GenerateParams {
        GenerateParams { temperature: 1.0, seed: 7, ..GenerateParams::default() }
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        assert_eq!(draws(&GenerateParams::default(), &ROW, 3), [1, 1, 1]);
        assert_eq!(draws(&GenerateParams { top_k: 1, ..hot() }, &ROW, 3), [1, 1, 1]);
    }

    #[test]
    fn the_seed_decides() {
        assert_eq!(draws(&hot(), &ROW, 50), draws(&hot(), &ROW, 50));
        assert_ne!(draws(&hot(), &ROW, 50), draws(&GenerateParams { seed: 8, ..hot() }, &ROW, 50));
    }

    fn support(params: GenerateParams) -> Vec<u32> {
        let mut tokens = draws(&params, &ROW, 2000);
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    #[test]
    fn filters_keep_what_they_should() {
        assert_eq!(support(hot()), [0, 1, 2, 3, 4, 5]);
        assert_eq!(support(GenerateParams { top_k: 2, ..hot() }), [1, 3]);
        assert_eq!(support(GenerateParams { top_k: 3, ..hot() }), [1, 3, 4]);
        assert_eq!(support(GenerateParams { top_k: 99, ..hot() }), [0, 1, 2, 3, 4, 5]);
        assert_eq!(support(GenerateParams { top_p: 0.5, ..hot() }), [1, 3]);
        assert_eq!(support(GenerateParams { top_p: 1e-9, ..hot() }), [1]);
        assert_eq!(support(GenerateParams { min_p: 0.3, ..hot() }), [1, 3, 4]);
        assert_eq!(support(GenerateParams { min_p: 0.999, ..hot() }), [1, 3]);
        assert_eq!(support(GenerateParams { top_k: 3, top_p: 0.99, min_p: 0.5, ..hot() }), [1, 3]);
    }

    #[test]
    fn top_p_is_a_share_of_what_top_k_left() {
        let row = [2.0, 2.0, 1.9, 1.9, 1.9, 1.9, 1.9, 1.9];
        let mut tokens = draws(&GenerateParams { top_k: 2, top_p: 0.6, ..hot() }, &row, 200);
        tokens.sort_unstable();
        tokens.dedup();
        assert_eq!(tokens, [0, 1]);
        assert!(draws(&GenerateParams { top_k: 2, top_p: 0.4, ..hot() }, &row, 200).iter().all(|&token| token == 0));
    }

    #[test]
    fn extremes_do_not_fail() {
        let rows = [vec![f32::MAX, f32::MIN, 0.0, 1.0], vec![f32::MIN; 4], vec![1e30, 1e30, -1e30, 3.0], vec![0.0]];
        for row in &rows {
            for temperature in [0.0, f32::MIN_POSITIVE, 1e-6, 1e-3, 1.0, f32::MAX] {
                for (repetition_penalty, min_p, top_p, top_k) in [
                    (1.0, 0.0, 1.0, 0),
                    (f32::MIN_POSITIVE, 0.999_999_9, f32::MIN_POSITIVE, 2),
                    (f32::MAX, f32::MIN_POSITIVE, 0.999, usize::MAX),
                ] {
                    let params = GenerateParams { temperature, repetition_penalty, min_p, top_p, top_k, ..hot() };
                    let mut sampler = Sampler::new(&params, &[0, 1, 99], 0, &HashSet::new());
                    for _ in 0..4 {
                        assert!((sampler.sample(row).unwrap() as usize) < row.len(), "{params:?} {row:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_penalty_counts_each_token_once() {
        let params = GenerateParams { repetition_penalty: 2.0, ..GenerateParams::default() };
        let mut sampler = Sampler::new(&params, &[1, 1, 1, 2], 0, &HashSet::new());
        assert_eq!(sampler.sample(&[1.0, 2.1, -1.0, 1.04]).unwrap(), 1, "2.1 / 2 is still the largest");
        assert_eq!(sampler.sample(&[-3.0, -1.0, -4.0, -2.1]).unwrap(), 1, "-1 · 2 is still the largest");
        assert_eq!(sampler.sample(&[-1.9, -1.0, -4.0, -2.1]).unwrap(), 0);
        assert_eq!(sampler.sample(&[-1.9, -1.0, -4.0, -2.1]).unwrap(), 1, "token 0 is seen now");
    }

    #[test]
    fn logprobs_are_a_log_softmax() {
        let row = [1.0f32, 2.0, 3.0, 3.0];
        let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        let entry = logprob(&row, 0, 3);
        assert_eq!(entry.token, 0);
        assert!((f64::from(entry.logprob.unwrap()) - (1.0 - sum.ln())).abs() < 1e-6);
        assert_eq!(entry.alternatives.iter().map(|&(token, _)| token).collect::<Vec<_>>(), [2, 3, 1]);
        assert!(logprob(&row, 0, 0).alternatives.is_empty());
        let total: f64 = (0..4).map(|t| f64::from(logprob(&row, t, 20).logprob.unwrap()).exp()).sum();
        assert!((total - 1.0).abs() < 1e-6);
        assert_eq!(logprob(&row, 0, 20).alternatives.len(), 4);
    }
}
