//! One decoder for all families, and the trait by which the engine sees a model.

mod attention;
mod batch;
mod decoder;
mod feed_forward;
pub mod host;
pub mod kv_cache;
pub mod load;
pub mod rope;
mod spec;
pub mod weights;

use std::time::Duration;

use candle_core::{Device, Tensor};

pub use self::{
    batch::{Batch, LogitRows, Span},
    decoder::{CachedDecoder, Decoder},
    spec::{FeedForwardSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm, ReferenceRouting, RopeScaling, RopeSpec},
};
use crate::{
    error::Result,
    moe::{LayerRouting, observe::MoeObserver},
    ops::cpu_slice,
};

/// What the engine needs of a model. A fake of a few lines drives engine and service tests.
pub trait LanguageModel: Send {
    /// What the model is.
    fn spec(&self) -> &ModelSpec;

    /// The blocks of its cache, which the caller gives out.
    fn cache(&self) -> CacheShape;

    /// Runs the new tokens of `batch`, reading and writing the cache blocks that its spans name.
    fn forward(&mut self, batch: &Batch) -> Result<Forward>;

    /// Takes back what a forward returned, whose memory the next one can use. Nobody may hold a tensor of it any more.
    fn recycle(&mut self, forward: Forward) {
        drop(forward);
    }
}

/// A model whose MoE layers can be watched at work.
pub trait Observable: LanguageModel {
    /// [`LanguageModel::forward`], shown to `observer` layer by layer. It computes the same.
    fn forward_observed(&mut self, batch: &Batch, observer: &mut dyn MoeObserver) -> Result<Forward>;
}

/// The size of a cache of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    /// Tokens of one block.
    pub block_tokens: usize,
    /// Blocks, named from 0.
    pub num_blocks: usize,
}

/// What a forward returns.
#[derive(Debug)]
pub struct Forward {
    /// `[R, V]` f32, one row for each of [`Batch::logit_rows`].
    pub logits: Tensor,
    /// One for each MoE layer, in order of depth.
    pub layers: Vec<LayerRouting>,
    /// Where the time went.
    pub time: ForwardTime,
}

impl Forward {
    /// Lends the logits, row by row; copies them only from a device other than the CPU.
    pub fn read_logits<R>(&self, read: impl FnOnce(&[f32]) -> R) -> Result<R> {
        let host =
            if self.logits.device().is_cpu() { self.logits.contiguous()? } else { self.logits.to_device(&Device::Cpu)?.contiguous()? };
        cpu_slice::<f32, _>(&host, |logits| Ok(read(logits)))
    }
}

/// Time spent in the parts of a forward, over all layers. On a device that works asynchronously it is that of the launches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForwardTime {
    /// Attention with its projections and the cache.
    pub attention: Duration,
    /// Feed-forward parts: routers, dispatch, experts.
    pub experts: Duration,
}

#[cfg(test)]
mod tests;
