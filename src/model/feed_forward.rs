//! The feed-forward part of a layer: one SwiGLU, or routed experts.

use candle_core::{DType, Tensor};

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
    /// `x [T, D]` f32 to `[T, D]` f32; its products take `products`.
    pub(super) fn forward(&self, x_td: &Tensor, products: DType, mode: &mut RoutingMode<'_>) -> Result<(Tensor, Option<LayerRouting>)> {
        match self {
            Self::Dense(mlp) => Ok((mlp.forward(&x_td.to_dtype(products)?)?.to_dtype(x_td.dtype())?, None)),
            Self::Moe(moe) => {
                let (y_td, routing) = moe.forward(x_td, mode)?;
                Ok((y_td, Some(routing)))
            }
        }
    }
}
