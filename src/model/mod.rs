//! One decoder for all families, and the trait by which the engine sees a model.

mod attention;
mod batch;
mod decoder;
pub mod draw;
mod feed_forward;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod host;
pub mod kv_cache;
pub mod load;
pub mod placement;
pub mod rope;
mod shared;
mod spec;
pub mod weights;

use std::{any::Any, sync::Arc, time::Duration};

use candle_core::{Device, Tensor};

pub(crate) use self::decoder::Layerwise;
pub use self::{
    batch::{Batch, LogitRows, Span},
    decoder::{CachedDecoder, Decoder},
    draw::{Drawn, RowChoice, TokenDraw},
    shared::SharedWeights,
    spec::{FeedForwardSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm, ReferenceRouting, RopeScaling, RopeSpec},
};
use crate::{
    error::{Error, Result},
    moe::{LayerRouting, observe::MoeObserver},
    ops::cpu_slice,
};

/// What the engine needs of a model. A fake of a few lines drives engine and service tests.
pub trait LanguageModel: Send {
    /// What the model is.
    fn spec(&self) -> &ModelSpec;

    /// The blocks of its cache, which the caller gives out.
    fn cache(&self) -> CacheShape;

    /// Whether it carries out [`RowChoice::Token`]. One that does not ignores [`Batch::choices`] and hands out every row.
    fn draws(&self) -> bool {
        false
    }

    /// Runs the new tokens of `batch`, reading and writing the cache blocks that its spans name.
    fn forward(&mut self, batch: &Batch) -> Result<Forward>;

    /// Takes back what a forward returned, whose memory the next one can use. Nobody may hold a tensor of it any more.
    fn recycle(&mut self, forward: Forward) {
        drop(forward);
    }

    /// Runs on these weights from now on, and returns those before; the cache stays as it is, with keys and values of either.
    ///
    /// Fails with `FailedPrecondition` where they are not of this kind of model or of another [`ModelSpec`]; then nothing has changed.
    fn exchange(&mut self, weights: SharedWeights) -> Result<SharedWeights>;
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
    /// `[R, V]` f32: one row for each [`Drawn::Row`] of `drawn`, in order; one for each of [`Batch::logit_rows`] where that is empty.
    pub logits: Tensor,
    /// What became of each of [`Batch::logit_rows`], in order. Empty: all are in `logits`.
    pub drawn: Vec<Drawn>,
    /// One for each MoE layer, in order of depth. The load is always there; without [`Batch::routes`] the router logits may be `[0, E]`
    /// and the routing of no token.
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

/// Weights of the kind `W` that fit where a model with this spec runs. `spec_of` tells what they are made for.
fn fitting<W: Any + Send + Sync>(weights: &SharedWeights, spec: &ModelSpec, spec_of: impl Fn(&W) -> &ModelSpec) -> Result<Arc<W>> {
    let refused = |message: &str| Error::FailedPrecondition(format!("these weights {message}"));
    let weights =
        weights.get::<W>().ok_or_else(|| refused("are of another kind of model: make them with the options of the served one"))?;
    let theirs = spec_of(&weights);
    if std::ptr::eq(theirs, spec) || theirs == spec {
        return Ok(weights);
    }
    Err(refused("are of another model than the served one: publish changes values, not what the model is"))
}

#[cfg(test)]
pub(crate) mod tests;
