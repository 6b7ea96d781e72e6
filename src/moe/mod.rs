//! Mixture-of-Experts: router logits -> policy -> routing -> dispatch plan -> expert kernel -> combine.
//!
//! Shape legend: T tokens, E experts, k experts per token, R routed rows, D model width, F expert width.

pub mod balance_bias;
pub mod capacity;
pub mod choices;
pub mod collapse;
pub mod explore;
pub mod kernel;
mod layer;
pub mod loss;
pub mod loss_tensor;
pub mod plan;
pub mod policy;
pub mod remedy;
pub mod route;
mod stats;
mod swiglu;

use candle_core::Tensor;

pub(crate) use self::layer::{Routed, route_layer};
pub use self::{
    layer::{MoeLayer, RoutingMode},
    stats::{LayerRouting, RoutingStats},
    swiglu::SwiGlu,
};

/// Expert weights of every token: what a policy makes of router logits.
#[derive(Clone, Debug)]
pub enum Routing {
    /// Rows of different length: each token has its own number of experts.
    Sparse(SparseRouting),
    /// `[T, E]` f32, tracked: every expert runs (training under a soft policy).
    Dense(Tensor),
}

/// Chosen experts in compressed rows: those of token t are `offsets[t] .. offsets[t + 1]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SparseRouting {
    /// `[T + 1]`, ascending from 0.
    pub offsets: Vec<u32>,
    /// `[R]`; within a token by descending weight, equal weights by ascending index.
    pub expert_ids: Vec<u32>,
    /// `[R]`, for `expert_ids`.
    pub weights: Vec<f32>,
}

#[cfg(test)]
mod tests;
