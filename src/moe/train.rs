//! The training forward of a MoE layer: router logits to weights by an estimator, and the experts that it asks for.
//!
//! Routing itself is f64 on slices, see [`super::estimator`]. It meets autograd in one operation, whose forward is the
//! weights and whose backward is the estimator's: the gradient that arrives at a weight is the credit of its expert.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, bail};
use serde::{Deserialize, Serialize};

use super::{
    LayerRouting, MoeLayer, Routing,
    capacity::Capacity,
    draw::{Draw, Stream},
    estimator::{Combine, Estimator, Execution, Phase, RoutedBatch, StepContext},
    execute::{Means, Run},
    explore::{self, Exploration},
};
use crate::{
    error::{Error, Result},
    ops::{self, OnHost},
};

/// What a step adds to the policy, the same in all layers, and what layers remember from step to step.
#[derive(Clone, Debug)]
pub struct TrainState {
    /// Of all noise. Noise is a function of seed, step, layer, row and column: no generator is carried along.
    pub seed: u64,
    /// Steps done before this one.
    pub step: usize,
    /// Evaluation is without noise, exploration and capacity, and leaves the layers' memory alone.
    pub phase: Phase,
    /// Random changes of the choice.
    pub explore: Exploration,
    /// The router sees `x ⊙ u`, u uniform in `1 ± jitter` (Switch Transformer); the experts see x, and a greedy copy of
    /// the data is without. 0 is none.
    pub jitter: f64,
    /// Most rows of an expert; `None` is dropless.
    pub capacity: Option<Capacity>,
    /// Rows of one copy of the data, where the forward runs several of them ([`Estimator::copies`]); else `usize::MAX`.
    pub copy_rows: usize,
    /// Expert of each row in the place of the router's outputs, which are then 1 for it and 0 for the others; the router
    /// gets no gradient. For controls whose route is known.
    pub fixed: Option<Arc<[u32]>>,
    /// By decoder layer, from 0; grows with the first forward.
    pub layers: Vec<LayerState>,
    /// By decoder layer, for those whose router does not learn: what it routes by, in the place of the step's policy. Empty is
    /// none.
    pub served: Arc<[Option<Estimator>]>,
}

/// What one layer remembers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LayerState {
    /// `[E]`, added to the scores that experts are selected by, and to nothing else; empty is none.
    pub bias: Vec<f64>,
    /// `[E, D]`, running mean outputs of the experts; empty before the first step that needs them.
    pub means: Vec<f32>,
    /// `[E]`, whether an expert has had a row, so that its mean means anything.
    pub seen: Vec<bool>,
}

impl TrainState {
    /// The first step of a run without exploration or limits.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            step: 0,
            phase: Phase::Train,
            explore: Exploration::NONE,
            jitter: 0.0,
            capacity: None,
            copy_rows: usize::MAX,
            fixed: None,
            layers: Vec::new(),
            served: Arc::default(),
        }
    }

    /// For the evaluation of a model that remembers `layers`.
    pub fn evaluation(layers: Vec<LayerState>) -> Self {
        Self { phase: Phase::Evaluate, layers, ..Self::new(0) }
    }

    /// The memory of a decoder layer.
    pub fn layer_mut(&mut self, index: usize) -> &mut LayerState {
        if self.layers.len() <= index {
            self.layers.resize(index + 1, LayerState::default());
        }
        &mut self.layers[index]
    }

    /// What a decoder layer routes by under the step's `policy`.
    fn estimator(&self, layer: usize, policy: Estimator) -> Estimator {
        self.served.get(layer).copied().flatten().unwrap_or(policy)
    }

    fn draw(&self, layer: usize) -> Draw {
        Draw::new(self.seed, self.step, layer)
    }

    fn context(&self, layer: usize) -> StepContext<'_> {
        StepContext {
            draw: self.draw(layer),
            phase: self.phase,
            bias: self.layers.get(layer).map(|layer| layer.bias.as_slice()).filter(|bias| !bias.is_empty()),
            explore: self.explore,
            capacity: self.capacity,
            copy_rows: self.copy_rows,
        }
    }
}

/// `x [T, D]` f32 to the mixture of its experts `[T, D]` f32, without a shared expert, and what the router did.
pub(super) fn forward(layer: &MoeLayer, x_td: &Tensor, policy: Estimator, state: &mut TrainState) -> Result<(Tensor, LayerRouting)> {
    let estimator = state.estimator(layer.index, policy);
    let num_experts = layer.experts.gate_up.dim(0)?;
    let router_logits = match &state.fixed {
        Some(route) => one_hot(route, num_experts, x_td)?,
        None => {
            let noisy = estimator.greedy_from(state.copy_rows);
            ops::linear(&jittered(&x_td.to_dtype(DType::F32)?, state, layer.index, noisy)?, &layer.router)?
        }
    };
    let z = Arc::new(host_f64(&router_logits)?);
    let routed = Arc::new(estimator.route(&z, num_experts, &state.context(layer.index)));
    let mut stats = routed.stats(&z);

    let gradient = Arc::new(OnceLock::new());
    let op = RouteOp { estimator, routed: Arc::clone(&routed), z: Arc::clone(&z), gradient: Arc::clone(&gradient) };
    // Routed on the host in any case: the experts that it chooses are what the next launches are made of.
    let weights_te = OnHost::copied(&router_logits)?.apply(op)?;
    let run = Run { experts: &layer.experts, x_td, weights_te: &weights_te, products: layer.products };
    let (y_td, executed) = match (estimator.combine, routed.execution) {
        (Combine::Merged, _) => run.merged()?,
        (Combine::Means { decay }, _) => {
            let learn = (state.phase == Phase::Train).then_some(decay);
            let means = Means { state: state.layer_mut(layer.index), learn };
            run.with_means(&routed, means)?
        }
        (Combine::Mixture(_), Execution::All) => run.all()?,
        (Combine::Mixture(_), Execution::Chosen) => run.chosen(&routed)?,
    };
    stats.executed = executed;
    let routing = Routing::Dense { weights: weights_te, routed, z, gradient };
    Ok((y_td, LayerRouting { layer: layer.index, router_logits, routing, stats }))
}

/// `[T, E]`, 1 for the expert of each row of `x_td`.
fn one_hot(route: &[u32], num_experts: usize, x_td: &Tensor) -> Result<Tensor> {
    let t = x_td.dim(0)?;
    if route.len() != t || route.iter().any(|&expert| expert as usize >= num_experts) {
        return Err(Error::Internal(format!("{} fixed routes to {num_experts} experts for {t} tokens", route.len())));
    }
    let mut z = vec![0f32; t * num_experts];
    route.iter().zip(z.chunks_mut(num_experts)).for_each(|(&expert, row)| row[expert as usize] = 1.0);
    Ok(Tensor::from_vec(z, (t, num_experts), x_td.device())?)
}

/// The router's copy of its input, with noise on the first `noisy` rows.
fn jittered(x_td: &Tensor, state: &TrainState, layer: usize, noisy: usize) -> Result<Tensor> {
    if state.jitter <= 0.0 || state.phase == Phase::Evaluate {
        return Ok(x_td.clone());
    }
    let ((t, d), draw) = (x_td.dims2()?, state.draw(layer));
    let mut factors = vec![1.0; t * d];
    explore::jitter(&mut factors, d, state.jitter, noisy, |token, column| draw.uniform(Stream::Jitter, token, column));
    Ok((x_td * Tensor::from_vec(factors, (t, d), x_td.device())?.to_dtype(x_td.dtype())?)?)
}

/// The values of a tensor, row-major, on the host.
fn host_f64(tensor: &Tensor) -> candle_core::Result<Vec<f64>> {
    tensor.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()
}

/// Router outputs `[T, G]` to weights `[T, E]`: the one place where estimators meet autograd.
struct RouteOp {
    estimator: Estimator,
    routed: Arc<RoutedBatch>,
    /// `[T, G]`, what was routed.
    z: Arc<Vec<f64>>,
    /// Where backward leaves the norm of what it returns.
    gradient: Arc<OnceLock<f64>>,
}

impl CustomOp1 for RouteOp {
    fn name(&self) -> &'static str {
        "route"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let RoutedBatch { tokens, experts, weights, .. } = &*self.routed;
        if layout.shape().elem_count() != self.z.len() || weights.len() != tokens * experts {
            bail!("route: weights for {tokens} tokens do not fit logits {:?}", layout.shape());
        }
        let weights = match storage {
            CpuStorage::F32(_) => CpuStorage::F32(weights.iter().map(|&w| w as f32).collect()),
            CpuStorage::F64(_) => CpuStorage::F64(weights.clone()),
            _ => bail!("route: only for f32 and f64"),
        };
        Ok((weights, Shape::from((*tokens, *experts))))
    }

    fn bwd(&self, arg: &Tensor, _res: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let mut dz = vec![0.0; self.z.len()];
        self.estimator.vjp(&self.z, &self.routed, &host_f64(grad)?, &mut dz);
        let _ = self.gradient.set(dz.iter().map(|d| d * d).sum::<f64>().sqrt());
        // A token that could not be routed must not pass for one without a gradient.
        let columns = self.z.len().checked_div(self.routed.tokens).unwrap_or(0).max(1);
        for (row, dz) in self.z.chunks(columns).zip(dz.chunks_mut(columns)) {
            if row.iter().any(|z| !z.is_finite()) {
                dz.fill(f64::NAN);
            }
        }
        Ok(Some(Tensor::from_vec(dz, arg.shape(), arg.device())?.to_dtype(arg.dtype())?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::moe::policy::{RoutingPolicy, WeightForm};

    const Z: [f64; 8] = [0.3, -0.2, 1.1, 0.6, -0.9, 0.8, 0.1, -0.4];

    fn op(estimator: Estimator, z: &[f64]) -> RouteOp {
        let routed = Arc::new(estimator.route(z, 4, &StepContext::train(Draw::new(0, 0, 0))));
        RouteOp { estimator, routed, z: Arc::new(z.to_vec()), gradient: Arc::default() }
    }

    /// `<c, w(z)>` and its gradient, through candle.
    fn weighted(estimator: Estimator, z: &[f64], credit: &Tensor) -> (f64, Vec<f64>, Option<f64>) {
        let var = Var::from_tensor(&Tensor::from_slice(z, (2, 4), &Device::Cpu).unwrap()).unwrap();
        let op = op(estimator, z);
        let norm = Arc::clone(&op.gradient);
        let sum = (OnHost::copied(&var).unwrap().apply(op).unwrap() * credit).unwrap().sum_all().unwrap();
        let grads = sum.backward().unwrap();
        let gradient = grads.get(&var).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        (sum.to_scalar().unwrap(), gradient, norm.get().copied())
    }

    #[test]
    fn the_operation_has_the_gradient_of_its_weights() {
        let credit = Tensor::new(&[[0.7, -1.0, 0.4, 2.0], [1.5, 0.2, -0.3, 0.9f64]], &Device::Cpu).unwrap();
        let policies = [
            RoutingPolicy::Soft { temperature: 0.7 },
            RoutingPolicy::TopK { k: 1, weight_form: WeightForm::Raw },
            RoutingPolicy::TopK { k: 2, weight_form: WeightForm::Raw },
            RoutingPolicy::TopK { k: 2, weight_form: WeightForm::Renorm },
        ];
        for policy in policies {
            let of = |z: &[f64]| weighted(policy.estimator(), z, &credit);
            let (_, found, norm) = of(&Z);
            assert!((norm.unwrap() - found.iter().map(|d| d * d).sum::<f64>().sqrt()).abs() < 1e-12);
            for i in 0..Z.len() {
                let at = |h: f64| {
                    let mut z = Z;
                    z[i] += h;
                    of(&z).0
                };
                let wanted = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!((found[i] - wanted).abs() < 1e-5 * wanted.abs().max(1e-2), "{policy}: {} and {wanted}", found[i]);
            }
        }
    }

    #[test]
    fn a_token_that_could_not_be_routed_has_no_finite_gradient() {
        let mut z = Z;
        z[1] = f64::NAN;
        let credit = Tensor::ones((2, 4), DType::F64, &Device::Cpu).unwrap();
        let (_, found, _) = weighted(RoutingPolicy::TopK { k: 1, weight_form: WeightForm::Raw }.estimator(), &z, &credit);
        assert!(found[..4].iter().all(|d| d.is_nan()) && found[4..].iter().all(|d| d.is_finite()), "{found:?}");
    }
}
