//! Losses that even out the load: a product of counted shares, which are constants, and mean probabilities.

use std::ops::Range;

use super::softmax::{Sink, View};
use crate::error::{Error, Result};

/// f from the largest logit; ties to the lowest index.
pub(super) fn switch(view: &View<'_>, sink: &mut Sink<'_>) -> f64 {
    let mut counts = vec![0.0; view.experts()];
    for &t in &view.live {
        let z = view.z(t);
        counts[(1..z.len()).fold(0, |best, e| if z[e] > z[best] { e } else { best })] += 1.0;
    }
    product(view, sink, &view.live, &shares(counts, view.tokens()), 1.0)
}

/// f from all choices.
pub(super) fn top_k(view: &View<'_>, sink: &mut Sink<'_>) -> f64 {
    product(view, sink, &view.live, &chosen_shares(view, 0..view.input.choices.tokens()), 1.0)
}

/// The sum over the slots of a token in the place of their mean: rows of an expert over tokens.
pub(super) fn per_slot(view: &View<'_>, sink: &mut Sink<'_>) -> f64 {
    let counts = view.input.choices.counts(0..view.input.choices.tokens(), view.experts());
    product(view, sink, &view.live, &shares(counts, view.tokens()), 1.0)
}

/// `E² mean_e` is `E Σ_e`.
pub(super) fn gshard(view: &View<'_>, sink: &mut Sink<'_>) -> f64 {
    let counts = view.input.choices.first_counts(0..view.input.choices.tokens(), view.experts());
    product(view, sink, &view.live, &shares(counts, view.tokens()), 1.0)
}

/// f of the whole step; without one, of this batch.
pub(super) fn global_batch(view: &View<'_>, sink: &mut Sink<'_>) -> Result<f64> {
    let Some(load) = view.input.global_load else { return Ok(top_k(view, sink)) };
    if load.len() != view.experts() {
        return Err(Error::Internal(format!("a load of {} experts for {}", load.len(), view.experts())));
    }
    let whole = load.iter().sum::<f64>().max(1.0);
    Ok(product(view, sink, &view.live, &shares(load.to_vec(), whole), 1.0))
}

/// Each sequence by itself, f and P; the mean over sequences that have a token.
pub(super) fn sequence(view: &View<'_>, sink: &mut Sink<'_>) -> f64 {
    let whole = 0..view.input.choices.tokens();
    let ranges = if view.input.sequences.is_empty() { std::slice::from_ref(&whole) } else { view.input.sequences };
    let live = |range: &Range<usize>| view.live.iter().copied().filter(|t| range.contains(t)).collect::<Vec<_>>();
    let sequences: Vec<_> = ranges.iter().map(|range| (range.clone(), live(range))).filter(|(_, live)| !live.is_empty()).collect();
    let weight = 1.0 / sequences.len().max(1) as f64;
    let one = |(range, live): &(Range<usize>, Vec<usize>)| product(view, sink, live, &chosen_shares(view, range.clone()), weight);
    sequences.iter().map(one).sum()
}

/// The gradient of an active expert is the same for every token.
pub(super) fn relu_l1(view: &View<'_>, sink: &mut Sink<'_>) -> f64 {
    let n = view.tokens();
    // Over k T, however many are active: with the sum of them the penalty would not be one on their number.
    let f = shares(view.input.choices.counts(0..view.input.choices.tokens(), view.experts()), view.input.k.max(1) as f64 * n);
    let factor = view.experts() as f64 / n;
    let mut sum = 0.0;
    for &t in &view.live {
        let z = view.z(t);
        sum += z.iter().zip(&f).map(|(z, f)| f * z.max(0.0)).sum::<f64>();
        sink.direct(view, t, |e| if z[e] > 0.0 { factor * f[e] } else { 0.0 });
    }
    factor * sum
}

/// `weight · E Σ_e f_e P_e` over some tokens, with given shares `f [E]`.
fn product(view: &View<'_>, sink: &mut Sink<'_>, tokens: &[usize], f: &[f64], weight: f64) -> f64 {
    let factor = weight * view.experts() as f64 / tokens.len().max(1) as f64;
    tokens.iter().for_each(|&t| sink.through_p(view, t, |e| factor * f[e]));
    factor * view.sum_p(tokens).iter().zip(f).map(|(p, f)| p * f).sum::<f64>()
}

/// `n_e / Σ n` of a range: with k choices per token `n_e / (k T)`, and where their number differs over as many as there are.
fn chosen_shares(view: &View<'_>, range: Range<usize>) -> Vec<f64> {
    let counts = view.input.choices.counts(range, view.experts());
    let all = counts.iter().sum::<f64>().max(1.0);
    shares(counts, all)
}

fn shares(counts: Vec<f64>, whole: f64) -> Vec<f64> {
    counts.into_iter().map(|n| n / whole).collect()
}
