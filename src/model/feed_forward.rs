//! The feed-forward part of a layer: one SwiGLU, or routed experts.

use candle_core::Tensor;

use crate::{
    error::Result,
    moe::{LayerRouting, MoeLayer, RoutingMode, SwiGlu},
};

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
