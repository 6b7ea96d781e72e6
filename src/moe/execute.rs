//! The experts of a training forward: weights `[T, E]` that can be differentiated, and the rows that an estimator asks
//! for. Each function returns the output `[T, D]` and the rows that it pushed through an expert.

use candle_core::{D, Device, Tensor};

use super::{LayerState, SparseRouting, estimator::RoutedBatch, kernel::Experts, plan::DispatchPlan};
use crate::{
    error::{Error, Result},
    ops,
};

/// Most values of the merged experts of a batch: 1 GiB.
const MAX_MERGED: usize = 1 << 28;

/// Every expert on every token, as two matmuls: experts side by side, the weights applied between them.
pub(super) fn all(experts: &Experts, x_td: &Tensor, weights_te: &Tensor) -> Result<(Tensor, u64)> {
    let (t, d) = x_td.dims2()?;
    let (e, two_f, _) = experts.gate_up.dims3()?;
    let f = two_f / 2;
    let gate_up = experts.gate_up.reshape((e * two_f, d))?;
    let hidden = x_td.matmul(&gate_up.t()?)?.reshape((t, e, two_f))?;
    let executed = hidden.dim(0)? * hidden.dim(1)?;
    let hidden = ops::weighted_swiglu(&hidden, weights_te)?.reshape((t, e * f))?;
    let down = experts.down.transpose(1, 2)?.reshape((e * f, d))?;
    Ok((hidden.matmul(&down)?, executed as u64))
}

/// The chosen rows only, sorted by expert.
pub(super) fn chosen(experts: &Experts, x_td: &Tensor, weights_te: &Tensor, routed: &RoutedBatch) -> Result<(Tensor, u64)> {
    let rows = Rows::new(routed, x_td.device())?;
    let hidden = rows.hidden(experts, x_td)?;
    let (r, two_f) = hidden.dims2()?;
    let weights = rows.weights(weights_te)?.reshape((r, 1))?;
    let hidden = ops::weighted_swiglu(&hidden.reshape((r, 1, two_f))?, &weights)?.reshape((r, two_f / 2))?;
    let out = ops::grouped_linear(&hidden, &experts.down, &rows.plan.offsets)?;
    Ok((rows.sum(&out, x_td)?, r as u64))
}

/// The chosen rows, and for every other expert its running mean output in the place of its output (Default MoE,
/// arXiv:2504.12463): `y = Σ_S w Y + Σ_{not S} w Ê`. `learn` moves the means to this batch, each by `1 - decay`.
pub(super) fn with_means(
    experts: &Experts,
    x_td: &Tensor,
    weights_te: &Tensor,
    routed: &RoutedBatch,
    means: Means<'_>,
) -> Result<(Tensor, u64)> {
    let (d, num_experts) = (x_td.dim(1)?, routed.experts);
    let rows = Rows::new(routed, x_td.device())?;
    let hidden = ops::silu_mul(&rows.hidden(experts, x_td)?)?;
    let out = ops::grouped_linear(&hidden, &experts.down, &rows.plan.offsets)?;
    let r = out.dim(0)?;
    let own = rows.sum(&out.broadcast_mul(&rows.weights(weights_te)?.reshape((r, 1))?.to_dtype(out.dtype())?)?, x_td)?;
    means.state.means.resize(num_experts * d, 0.0);
    means.state.seen.resize(num_experts, false);
    let table = Tensor::from_slice(&means.state.means, (num_experts, d), x_td.device())?.to_dtype(x_td.dtype())?;
    let others = (weights_te * rows.unchosen(routed)?)?.to_dtype(x_td.dtype())?;
    let y_td = (own + others.matmul(&table)?)?;
    if let Some(decay) = means.learn {
        means.state.learn(&rows.plan, &out.detach().to_dtype(candle_core::DType::F32)?.to_vec2::<f32>()?, decay);
    }
    Ok((y_td, r as u64))
}

/// Running means, and how fast they move; `None` where they stay.
pub(super) struct Means<'a> {
    pub(super) state: &'a mut LayerState,
    pub(super) learn: Option<f64>,
}

/// One expert for each token, whose parameters are the mean of all (SMEAR, arXiv:2306.03745).
pub(super) fn merged(experts: &Experts, x_td: &Tensor, weights_te: &Tensor) -> Result<(Tensor, u64)> {
    let (t, d) = x_td.dims2()?;
    let (e, two_f, _) = experts.gate_up.dims3()?;
    let f = two_f / 2;
    if t.saturating_mul(two_f * d) > MAX_MERGED {
        let message = format!("merging experts makes {two_f} x {d} weights for each of {t} tokens: make the batch smaller");
        return Err(Error::out_of_range("run.batch", message));
    }
    let weights = weights_te.to_dtype(x_td.dtype())?;
    let gate_up = weights.matmul(&experts.gate_up.reshape((e, two_f * d))?)?.reshape((t, two_f, d))?;
    let hidden = ops::silu_mul(&gate_up.matmul(&x_td.unsqueeze(D::Minus1)?)?.squeeze(D::Minus1)?)?;
    let down = weights.matmul(&experts.down.reshape((e, d * f))?)?.reshape((t, d, f))?;
    let y_td = down.matmul(&hidden.unsqueeze(D::Minus1)?)?.squeeze(D::Minus1)?;
    Ok((y_td, gate_up.dim(0)? as u64))
}

/// The chosen rows of a batch, sorted by expert, and the way there and back.
struct Rows {
    plan: DispatchPlan,
    /// `[R]`: token of each row.
    tokens: Tensor,
    /// `[R]`: place of each row's weight in `[T, E]`.
    places: Tensor,
}

impl Rows {
    fn new(routed: &RoutedBatch, device: &Device) -> Result<Self> {
        let routing =
            SparseRouting { offsets: routed.offsets.clone(), expert_ids: routed.chosen.clone(), weights: vec![1.0; routed.chosen.len()] };
        let plan = DispatchPlan::new(&routing, routed.experts);
        let of_expert = |(expert, rows): (usize, std::ops::Range<usize>)| {
            plan.tokens[rows].iter().map(move |&token| token * routed.experts as u32 + expert as u32).collect::<Vec<_>>()
        };
        let places: Vec<u32> = plan.active().flat_map(of_expert).collect();
        let count = places.len();
        Ok(Self { tokens: Tensor::from_slice(&plan.tokens, count, device)?, places: Tensor::from_vec(places, count, device)?, plan })
    }

    /// Gate and up projections, `[R, 2F]`.
    fn hidden(&self, experts: &Experts, x_td: &Tensor) -> Result<Tensor> {
        ops::grouped_linear(&x_td.index_select(&self.tokens, 0)?, &experts.gate_up, &self.plan.offsets)
    }

    /// Weight of each row, `[R]`, tracked.
    fn weights(&self, weights_te: &Tensor) -> Result<Tensor> {
        Ok(weights_te.flatten_all()?.index_select(&self.places, 0)?)
    }

    /// Rows added to their tokens, in the shape of `like`.
    fn sum(&self, rows: &Tensor, like: &Tensor) -> Result<Tensor> {
        Ok(like.zeros_like()?.index_add(&self.tokens, rows, 0)?)
    }

    /// `[T, E]`, 0 where an expert is chosen and 1 elsewhere; f32.
    fn unchosen(&self, routed: &RoutedBatch) -> Result<Tensor> {
        let mut mask = vec![1f32; routed.tokens * routed.experts];
        for (expert, rows) in self.plan.active() {
            self.plan.tokens[rows].iter().for_each(|&token| mask[token as usize * routed.experts + expert] = 0.0);
        }
        Ok(Tensor::from_vec(mask, (routed.tokens, routed.experts), self.tokens.device())?)
    }
}

impl LayerState {
    /// `Ê ← decay · Ê + (1 - decay) · mean of the expert's rows`; its first rows set it. `rows` are sorted as in `plan`.
    fn learn(&mut self, plan: &DispatchPlan, rows: &[Vec<f32>], decay: f64) {
        for (expert, range) in plan.active() {
            let width = rows[range.start].len();
            if rows[range.clone()].iter().flatten().any(|value| !value.is_finite()) {
                continue; // The step will be skipped; the means must survive it.
            }
            let (count, first) = (range.len() as f64, !std::mem::replace(&mut self.seen[expert], true));
            for (column, mean) in self.means[expert * width..][..width].iter_mut().enumerate() {
                let batch = rows[range.clone()].iter().map(|row| f64::from(row[column])).sum::<f64>() / count;
                *mean = if first { batch } else { decay * f64::from(*mean) + (1.0 - decay) * batch } as f32;
            }
        }
    }
}
