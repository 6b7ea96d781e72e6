//! One SwiGLU that every token takes: the dense feed-forward part of a layer, or a shared expert.

use candle_core::Tensor;

use crate::{error::Result, model::weights::SwiGluWeights, ops};

/// `down(silu(gate x) ⊙ up x)`.
#[derive(Clone, Debug)]
pub struct SwiGlu {
    weights: SwiGluWeights,
}

impl SwiGlu {
    /// With the given weights.
    pub fn new(weights: SwiGluWeights) -> Self {
        Self { weights }
    }

    /// `x [T, D]` to `[T, D]`.
    pub fn forward(&self, x_td: &Tensor) -> Result<Tensor> {
        let hidden = ops::silu_mul(&ops::linear(x_td, &self.weights.gate_up)?)?;
        ops::linear(&hidden, &self.weights.down)
    }
}
