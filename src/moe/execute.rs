//! The experts of a training forward: weights `[T, E]` that can be differentiated, and the rows that an estimator asks
//! for. Each function returns the output `[T, D]` f32 and the rows that it pushed through an expert.

use candle_core::{D, DType, Device, Tensor};

use super::{LayerState, SparseRouting, estimator::RoutedBatch, kernel::Experts, plan::DispatchPlan};
use crate::{
    error::{Error, Result},
    ops::{self, device::RowIndex},
};

/// Most values of the merged experts of a batch: 1 GiB.
const MAX_MERGED: usize = 1 << 28;

/// Experts, and what they are to be run on.
pub(super) struct Run<'a> {
    pub(super) experts: &'a Experts,
    /// `[T, D]` f32.
    pub(super) x_td: &'a Tensor,
    /// `[T, E]` f32 on the host, where they were made: what is picked of them is picked there.
    pub(super) weights_te: &'a Tensor,
    /// What goes into products.
    pub(super) products: DType,
}

impl Run<'_> {
    /// Every expert on every token, as two matmuls: experts side by side, the weights applied between them.
    pub(super) fn all(&self) -> Result<(Tensor, u64)> {
        let hidden = ops::experts_in(&self.x_td.to_dtype(self.products)?, &self.experts.gate_up)?;
        let executed = hidden.dim(0)? * hidden.dim(1)?;
        let hidden = ops::weighted_swiglu(&hidden, &self.weights()?)?;
        Ok((ops::experts_down(&hidden, &self.experts.down)?.to_dtype(self.x_td.dtype())?, executed as u64))
    }

    /// The chosen rows only, sorted by expert.
    pub(super) fn chosen(&self, routed: &RoutedBatch) -> Result<(Tensor, u64)> {
        let rows = Rows::new(routed, self.x_td.device())?;
        let hidden = self.hidden(&rows)?;
        let (r, two_f) = hidden.dims2()?;
        let weights = rows.weights(self.weights_te)?.reshape((r, 1))?;
        let hidden = ops::weighted_swiglu(&hidden.reshape((r, 1, two_f))?, &weights)?.reshape((r, two_f / 2))?;
        let out = ops::grouped_linear(&hidden, &self.experts.down, &rows.plan.offsets)?;
        Ok((rows.sum(&out, self.x_td)?, r as u64))
    }

    /// The chosen rows, and for every other expert its running mean output in the place of its output (Default MoE,
    /// arXiv:2504.12463): `y = Σ_S w Y + Σ_{not S} w Ê`. `learn` moves the means to this batch, each by `1 - decay`.
    pub(super) fn with_means(&self, routed: &RoutedBatch, means: Means<'_>) -> Result<(Tensor, u64)> {
        let (d, num_experts, device) = (self.x_td.dim(1)?, routed.experts, self.x_td.device());
        let rows = Rows::new(routed, device)?;
        let hidden = ops::silu_mul(&self.hidden(&rows)?)?;
        let out = ops::grouped_linear(&hidden, &self.experts.down, &rows.plan.offsets)?.to_dtype(self.x_td.dtype())?;
        let r = out.dim(0)?;
        let own = rows.sum(&out.broadcast_mul(&rows.weights(self.weights_te)?.reshape((r, 1))?)?, self.x_td)?;
        means.state.means.resize(num_experts * d, 0.0);
        means.state.seen.resize(num_experts, false);
        let table = Tensor::from_slice(&means.state.means, (num_experts, d), device)?;
        let others = (self.weights()? * rows.unchosen(routed)?)?;
        let y_td = (own + others.matmul(&table)?)?;
        if let Some(decay) = means.learn {
            means.state.learn(&rows.plan, &out.detach().to_vec2::<f32>()?, decay);
        }
        Ok((y_td, r as u64))
    }

    /// One expert for each token, whose parameters are the mean of all (SMEAR, arXiv:2306.03745).
    pub(super) fn merged(&self) -> Result<(Tensor, u64)> {
        let (t, d) = self.x_td.dims2()?;
        let (e, two_f, _) = self.experts.gate_up.dims3()?;
        let f = two_f / 2;
        if t.saturating_mul(two_f * d) > MAX_MERGED {
            let message = format!("merging experts makes {two_f} x {d} weights for each of {t} tokens: make the batch smaller");
            return Err(Error::out_of_range("run.batch", message));
        }
        let (x_td, weights) = (self.x_td.to_dtype(self.products)?, self.weights()?.to_dtype(self.products)?);
        let flat = |stack: &Tensor, columns: usize| Ok::<_, Error>(stack.to_dtype(self.products)?.reshape((e, columns))?);
        let gate_up = weights.matmul(&flat(&self.experts.gate_up, two_f * d)?)?.reshape((t, two_f, d))?;
        let hidden = ops::silu_mul(&gate_up.matmul(&x_td.unsqueeze(D::Minus1)?)?.squeeze(D::Minus1)?)?;
        let down = weights.matmul(&flat(&self.experts.down, d * f)?)?.reshape((t, d, f))?;
        let y_td = down.matmul(&hidden.unsqueeze(D::Minus1)?)?.squeeze(D::Minus1)?;
        Ok((y_td.to_dtype(self.x_td.dtype())?, gate_up.dim(0)? as u64))
    }

    /// Gate and up projections of `rows`, `[R, 2F]`.
    fn hidden(&self, rows: &Rows) -> Result<Tensor> {
        ops::grouped_linear(&rows.spread(self.x_td, self.products)?, &self.experts.gate_up, &rows.plan.offsets)
    }

    /// `[T, E]` f32, where the experts are.
    fn weights(&self) -> Result<Tensor> {
        Ok(self.weights_te.to_device(self.x_td.device())?)
    }
}

/// Running means, and how fast they move; `None` where they stay.
pub(super) struct Means<'a> {
    pub(super) state: &'a mut LayerState,
    pub(super) learn: Option<f64>,
}

/// The chosen rows of a batch, sorted by expert, and the way there and back.
struct Rows {
    plan: DispatchPlan,
    way: Way,
    /// `[R]` on the host: place of each row's weight in `[T, E]`.
    places: Tensor,
    device: Device,
}

/// From tokens to rows and back.
enum Way {
    /// `[R]`: token of each row.
    Here(Tensor),
    Device(RowIndex),
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
        let way = match ops::runs_here(device) {
            true => Way::Here(Tensor::from_slice(&plan.tokens, count, device)?),
            false => {
                let rows: Vec<Vec<u32>> =
                    (0..plan.num_tokens()).map(|token| plan.routes(token).map(|(row, _)| row as u32).collect()).collect();
                Way::Device(RowIndex::new(&plan.tokens, &rows, device)?)
            }
        };
        Ok(Self { way, places: Tensor::from_vec(places, count, &Device::Cpu)?, plan, device: device.clone() })
    }

    /// Copies of tokens, `[R, D]`, as `dtype`.
    fn spread(&self, x_td: &Tensor, dtype: DType) -> Result<Tensor> {
        Ok(match &self.way {
            Way::Here(tokens) => x_td.index_select(tokens, 0)?.to_dtype(dtype)?,
            Way::Device(index) => index.spread(x_td, dtype)?,
        })
    }

    /// Weight of each row, `[R]`, tracked.
    fn weights(&self, weights_te: &Tensor) -> Result<Tensor> {
        Ok(weights_te.flatten_all()?.index_select(&self.places, 0)?.to_device(&self.device)?)
    }

    /// Rows added to their tokens, in the shape and element type of `like`.
    fn sum(&self, rows: &Tensor, like: &Tensor) -> Result<Tensor> {
        Ok(match &self.way {
            Way::Here(tokens) => like.zeros_like()?.index_add(tokens, rows, 0)?,
            Way::Device(index) => index.collect(rows, like.dim(0)?)?.to_dtype(like.dtype())?,
        })
    }

    /// `[T, E]`, 0 where an expert is chosen and 1 elsewhere; f32.
    fn unchosen(&self, routed: &RoutedBatch) -> Result<Tensor> {
        let mut mask = vec![1f32; routed.tokens * routed.experts];
        for (expert, rows) in self.plan.active() {
            self.plan.tokens[rows].iter().for_each(|&token| mask[token as usize * routed.experts + expert] = 0.0);
        }
        Ok(Tensor::from_vec(mask, (routed.tokens, routed.experts), &self.device)?)
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
