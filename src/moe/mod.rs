//! Mixture-of-Experts: router logits -> policy -> routing -> dispatch plan -> expert kernel -> combine.
//!
//! Shape legend: T tokens, E experts, k experts per token, R routed rows, D model width, F expert width.

pub mod advantage;
pub mod balance_bias;
pub mod capacity;
pub mod choices;
pub mod collapse;
pub mod draw;
pub mod estimator;
mod execute;
pub mod explore;
pub mod kernel;
mod layer;
pub mod loss;
pub mod observe;
pub mod plan;
pub mod policy;
pub mod remedy;
pub mod route;
mod softmax;
mod stats;
mod swiglu;
pub mod trace;
mod train;

use std::sync::{Arc, OnceLock};

use candle_core::Tensor;

use self::estimator::RoutedBatch;
pub(crate) use self::layer::Routed;
pub use self::{
    layer::{LayerRouting, MoeLayer, RoutingMode},
    stats::RoutingStats,
    swiglu::SwiGlu,
    train::{LayerState, TrainState},
};

/// Expert weights of every token: what a policy makes of router logits.
#[derive(Clone, Debug)]
pub enum Routing {
    /// Rows of different length: each token has its own number of experts.
    Sparse(SparseRouting),
    /// Training: weights that can be differentiated, zeros where an expert has no part.
    Dense {
        /// `[T, E]` f32 on the host, tracked where the router is trained.
        weights: Tensor,
        /// The same routing as plain numbers, with what its backward needs.
        routed: Arc<RoutedBatch>,
        /// `[T, G]`, the router outputs as plain numbers.
        z: Arc<Vec<f64>>,
        /// L2 norm of the gradient of `z` from all that comes after the weights, auxiliary losses apart; set by backward.
        gradient: Arc<OnceLock<f64>>,
    },
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
