//! Choosing experts for one row.

use std::borrow::Cow;

use super::{Estimator, Mask, Relaxation, Selection, relax};

/// Choices up to this many are found by scanning; a sort is faster above.
const SCANS: usize = 2;

/// What a choice is made on. `[E]` each, -inf for experts that are left out of it.
pub(super) struct Candidates<'a> {
    /// Logits at which the relaxation was evaluated.
    pub(super) point: &'a [f64],
    /// Logits with noise, that of the first draw; under [`Relaxation::SmoothStep`], which has none, the weights.
    pub(super) seen: &'a [f64],
    /// Relaxed weights.
    pub(super) relaxed: &'a [f64],
    /// Added to the score.
    pub(super) bias: Option<&'a [f64]>,
}

impl Estimator {
    /// Chosen experts in order of choice. `noise` is that of an expert at a draw, for methods that draw one after the other.
    pub(super) fn choose(&self, row: &Candidates<'_>, noise: impl Fn(usize, usize) -> f64) -> Vec<u32> {
        match (self.selection, self.relaxation) {
            (Selection::All, _) => top_k(row.relaxed, row.relaxed.len()),
            (Selection::Support, _) => {
                let mut support = top_k(row.relaxed, row.relaxed.len());
                support.retain(|&e| row.relaxed[e as usize] > 0.0);
                support
            }
            (Selection::TopK { k }, Relaxation::MaskedSoftmax { r, mask, .. }) => row.one_after_the_other(k, r, mask, noise),
            (Selection::TopK { k }, Relaxation::Sigmoid { temperature }) if row.bias.is_some() => {
                let score: Vec<f64> = row.seen.iter().map(|&z| open(z, relax::sigmoid(z / temperature))).collect();
                top_k(&row.biased(&score), k)
            }
            (Selection::TopK { k }, _) => top_k(&row.biased(row.seen), k),
        }
    }
}

impl Candidates<'_> {
    fn biased<'a>(&self, score: &'a [f64]) -> Cow<'a, [f64]> {
        match self.bias {
            Some(bias) => score.iter().zip(bias).map(|(score, bias)| score + bias).collect(),
            None => Cow::Borrowed(score),
        }
    }

    /// Each time the largest among the logits near the largest of those left, under noise of its own: a draw lets in
    /// experts that the one before masked, and its candidates would else be known to have lost that one.
    fn one_after_the_other(&self, k: usize, r: f64, mask: Mask, noise: impl Fn(usize, usize) -> f64) -> Vec<u32> {
        let mut left = self.point.to_vec();
        let mut chosen = Vec::with_capacity(k);
        for draw in 0..k {
            let noisy: Vec<f64> = self.point.iter().enumerate().map(|(e, z)| z + noise(draw, e)).collect();
            let (score, kept) = (self.biased(&noisy), relax::kept(&left, r, mask));
            let near: Vec<f64> = (0..left.len()).map(|e| if kept[e] { open(left[e], score[e]) } else { f64::NEG_INFINITY }).collect();
            let Some(&best) = top_k(&near, 1).first() else { break };
            left[best as usize] = f64::NEG_INFINITY;
            chosen.push(best);
        }
        chosen
    }
}

/// The score of an expert that is not left out.
fn open(logit: f64, score: f64) -> f64 {
    if logit == f64::NEG_INFINITY { logit } else { score }
}

/// The k largest scores, descending, ties by the lowest index; never one at -inf.
pub(super) fn top_k(score: &[f64], k: usize) -> Vec<u32> {
    let open = (0..score.len() as u32).filter(|&e| score[e as usize] > f64::NEG_INFINITY);
    if k <= SCANS {
        let mut chosen = Vec::with_capacity(k);
        for _ in 0..k {
            let left = open.clone().filter(|e| !chosen.contains(e));
            let Some(best) = left.reduce(|best, e| if score[e as usize] > score[best as usize] { e } else { best }) else { break };
            chosen.push(best);
        }
        return chosen;
    }
    let mut order: Vec<u32> = open.collect();
    // Adding 0 makes -0 and 0 one value, as they are for `>` above.
    let key = |e: u32| score[e as usize] + 0.0;
    order.sort_unstable_by(|&a, &b| key(b).total_cmp(&key(a)).then(a.cmp(&b)));
    order.truncate(k);
    order
}
