//! From router logits to a [`Routing`].
//!
//! Serving: [`route_rows`] on host slices, each token with its own policy, always sparse (soft is E routes).
//! Training: [`route_dense`] on tracked tensors, one policy for all tokens, `[T, E]` weights.

use candle_core::{D, Tensor};
use rand::{Rng, rngs::StdRng};

use super::{
    Routing, RoutingStats, SparseRouting,
    policy::{RoutingPolicy, WeightForm},
};
use crate::{error::Result, ops};

impl SparseRouting {
    /// Tokens, T.
    pub fn num_tokens(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Routes of a token: a range into `expert_ids` and `weights`.
    pub fn routes(&self, token: usize) -> std::ops::Range<usize> {
        self.offsets[token] as usize..self.offsets[token + 1] as usize
    }
}

/// Routes each row of `logits [T, E]` by its own policy. `policies` gives one for each token.
///
/// A row with a non-finite logit gets no route and is listed in the second result.
pub fn route_rows(logits: &[f32], num_experts: usize, policies: impl Iterator<Item = RoutingPolicy>) -> (SparseRouting, RowReport) {
    let (mut routing, mut report) = (SparseRouting::default(), RowReport::default());
    route_rows_into(logits, num_experts, policies, &mut routing, &mut report);
    (routing, report)
}

/// [`route_rows`] into results of an earlier call, for their memory.
pub(super) fn route_rows_into(
    logits: &[f32],
    num_experts: usize,
    policies: impl Iterator<Item = RoutingPolicy>,
    routing: &mut SparseRouting,
    report: &mut RowReport,
) {
    routing.offsets.clear();
    routing.offsets.push(0);
    routing.expert_ids.clear();
    routing.weights.clear();
    let RowReport { non_finite, entropy_sum, scratch } = report;
    non_finite.clear();
    *entropy_sum = 0.0;
    for (token, (row, policy)) in logits.chunks_exact(num_experts).zip(policies).enumerate() {
        if row.iter().all(|z| z.is_finite()) {
            *entropy_sum += entropy(row, scratch);
            route_row(row, policy, scratch, routing);
        } else {
            non_finite.push(token as u32);
        }
        routing.offsets.push(routing.expert_ids.len() as u32);
    }
}

/// What [`route_rows`] saw besides the routes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowReport {
    /// Tokens with a non-finite router logit, ascending.
    pub non_finite: Vec<u32>,
    /// Sum over finite tokens of the entropy of `softmax(z)`, in nats.
    pub entropy_sum: f64,
    /// Probabilities of a row, for their memory.
    scratch: Vec<f32>,
}

fn route_row(row: &[f32], policy: RoutingPolicy, scratch: &mut Vec<f32>, routing: &mut SparseRouting) {
    match policy {
        RoutingPolicy::TopK { k, weight_form } => {
            softmax(row, 1.0, scratch);
            let first = routing.expert_ids.len();
            top_k(row, k, &mut routing.expert_ids);
            let chosen = &routing.expert_ids[first..];
            let total: f32 = match weight_form {
                WeightForm::Renorm => chosen.iter().map(|&e| scratch[e as usize]).sum(),
                WeightForm::Raw | WeightForm::Unit => 1.0,
            };
            let weight = |&e: &u32| match weight_form {
                WeightForm::Unit => 1.0 / chosen.len() as f32,
                WeightForm::Raw | WeightForm::Renorm => scratch[e as usize] / total,
            };
            routing.weights.extend(chosen.iter().map(weight));
        }
        // Gumbel-Softmax is a training policy; without noise it is the soft mixture.
        RoutingPolicy::Soft { temperature } | RoutingPolicy::GumbelSoftmax { temperature, .. } => {
            softmax(row, temperature, scratch);
            top_k(row, row.len(), &mut routing.expert_ids);
            let first = routing.weights.len();
            routing.weights.extend(routing.expert_ids[first..].iter().map(|&e| scratch[e as usize]));
        }
    }
}

/// Indices of the k largest, descending, ties by lowest index. Finite input; k up to `row.len()`.
fn top_k(row: &[f32], k: usize, out: &mut Vec<u32>) {
    let first = out.len();
    if k <= 4 {
        for _ in 0..k {
            let taken = &out[first..];
            let best = (0..row.len()).filter(|&e| !taken.contains(&(e as u32))).reduce(|best, e| if row[e] > row[best] { e } else { best });
            out.extend(best.map(|e| e as u32));
        }
        return;
    }
    out.extend(0..row.len() as u32);
    // Adding 0 makes -0 and 0 one value, as they are for `>` above.
    let key = |e: u32| row[e as usize] + 0.0;
    out[first..].sort_by(|&a, &b| key(b).total_cmp(&key(a)).then(a.cmp(&b)));
    out.truncate(first + k);
}

/// `softmax(row / temperature)` into `out`.
fn softmax(row: &[f32], temperature: f32, out: &mut Vec<f32>) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    out.clear();
    out.extend(row.iter().map(|z| ((z - max) / temperature).exp()));
    let sum: f32 = out.iter().sum();
    out.iter_mut().for_each(|p| *p /= sum);
}

fn entropy(row: &[f32], scratch: &mut Vec<f32>) -> f64 {
    softmax(row, 1.0, scratch);
    scratch.iter().map(|&p| if p > 0.0 { -f64::from(p) * f64::from(p).ln() } else { 0.0 }).sum()
}

/// Tracked weights `[T, E]` of all experts under one policy.
///
/// Gradients are those of `notes`-style definitions: soft and Gumbel exact; top-k raw and renormalised through the
/// softmax of the chosen (identically zero for renormalised top-1); unit weights are constant.
pub fn route_dense(logits_te: &Tensor, policy: RoutingPolicy, rng: &mut StdRng) -> Result<Routing> {
    let weights = match policy {
        RoutingPolicy::Soft { temperature } => ops::softmax(&(logits_te / f64::from(temperature))?)?,
        RoutingPolicy::GumbelSoftmax { temperature, noise } => {
            let noisy = (logits_te + (gumbel(logits_te, rng)? * f64::from(noise))?)?;
            ops::softmax(&(noisy / f64::from(temperature))?)?
        }
        RoutingPolicy::TopK { k, weight_form } => {
            let mask = top_k_mask(logits_te, k)?;
            let chosen = (ops::softmax(logits_te)? * &mask)?;
            match weight_form {
                WeightForm::Raw => chosen,
                WeightForm::Renorm => chosen.broadcast_div(&chosen.sum_keepdim(D::Minus1)?)?,
                WeightForm::Unit => (mask / k as f64)?,
            }
        }
    };
    Ok(Routing::Dense(weights))
}

/// 1 for the k largest of each row, 0 elsewhere; untracked.
fn top_k_mask(logits_te: &Tensor, k: usize) -> Result<Tensor> {
    let rows = logits_te.detach().to_vec2::<f32>()?;
    let mut mask = Vec::with_capacity(logits_te.elem_count());
    let mut chosen = Vec::with_capacity(k);
    for row in &rows {
        chosen.clear();
        top_k(row, k, &mut chosen);
        mask.extend((0..row.len() as u32).map(|e| if chosen.contains(&e) { 1f32 } else { 0.0 }));
    }
    Ok(Tensor::from_vec(mask, logits_te.shape(), logits_te.device())?)
}

/// Standard Gumbel noise of the shape of `like`, `-ln(-ln u)` with u kept off 0 and 1.
fn gumbel(like: &Tensor, rng: &mut StdRng) -> Result<Tensor> {
    let noise: Vec<f32> = (0..like.elem_count()).map(|_| -(-rng.random_range(1e-7f32..1.0 - 1e-7).ln()).ln()).collect();
    Ok(Tensor::from_vec(noise, like.shape(), like.device())?)
}

/// Load under dense weights: each token counts for the expert with its largest weight (what hard top-1 would choose);
/// weight mass is the mass given.
pub fn dense_stats(logits_te: &Tensor, weights_te: &Tensor) -> Result<RoutingStats> {
    let weights = weights_te.detach().to_vec2::<f32>()?;
    let mut stats = RoutingStats::new(weights_te.dim(1)?);
    let mut scratch = Vec::new();
    for (row, logits) in weights.iter().zip(logits_te.detach().to_vec2::<f32>()?) {
        stats.tokens += 1;
        if row.iter().any(|w| !w.is_finite()) {
            stats.non_finite += 1;
            continue;
        }
        let best = (1..row.len()).fold(0, |best, e| if row[e] > row[best] { e } else { best });
        stats.routes += 1;
        stats.expert_tokens[best] += 1;
        stats.expert_weights.iter_mut().zip(row).for_each(|(sum, &w)| *sum += f64::from(w));
        stats.entropy_sum += entropy(&logits, &mut scratch);
    }
    Ok(stats)
}
