//! One decoder for all families, and the trait by which the engine sees a model.

mod attention;
mod batch;
mod decoder;
mod feed_forward;
pub mod kv_cache;
pub mod load;
pub mod rope;
mod spec;
pub mod weights;

use candle_core::Tensor;

pub use self::{
    batch::{Batch, LogitRows, Span},
    decoder::{CachedDecoder, Decoder},
    spec::{FeedForwardSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm, ReferenceRouting, RopeScaling, RopeSpec},
};
use crate::{error::Result, moe::LayerRouting};

/// What the engine needs of a model. A fake of a few lines drives engine and service tests.
pub trait LanguageModel: Send {
    /// What the model is.
    fn spec(&self) -> &ModelSpec;

    /// Runs the new tokens of `batch`, reading and extending the cache slots that its spans name.
    fn forward(&mut self, batch: &Batch) -> Result<Forward>;

    /// The sequence in `slot` is over: what the slot holds may be freed.
    fn release(&mut self, slot: usize);
}

/// What a forward returns.
#[derive(Debug)]
pub struct Forward {
    /// `[R, V]` f32, one row for each of [`Batch::logit_rows`].
    pub logits: Tensor,
    /// One for each MoE layer, in order of depth.
    pub layers: Vec<LayerRouting>,
}

#[cfg(test)]
mod tests;
