//! The feed-forward part of a layer: one SwiGLU, or routed experts.

use candle_core::Tensor;

use super::weights::SwiGluWeights;
use crate::{
    error::Result,
    moe::{LayerRouting, MoeLayer, RoutingMode},
    ops,
};

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

/// Dense or routed.
#[derive(Clone, Debug)]
pub(super) enum FeedForward {
    Dense(SwiGlu),
    Moe(Box<MoeLayer>),
}

impl FeedForward {
    pub(super) fn forward(&self, x_td: &Tensor, mode: &mut RoutingMode<'_>) -> Result<(Tensor, Option<LayerRouting>)> {
        match self {
            Self::Dense(mlp) => Ok((mlp.forward(x_td)?, None)),
            Self::Moe(moe) => {
                let (y_td, routing) = moe.forward(x_td, mode)?;
                Ok((y_td, Some(routing)))
            }
        }
    }
}
