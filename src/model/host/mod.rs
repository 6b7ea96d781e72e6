//! The forward of the CPU: plain slices, one buffer for each kind of value, everything of a layer in a handful of parallel loops.
//!
//! What [`Decoder`](super::Decoder) computes with tensors, for serving only: no gradients, f32 activations, weights f32, bf16 or 8-bit.
//! The tensor path stays the reference that the tests compare with.

mod layer;
mod matrix;
mod rows;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use self::{
    layer::{Layer, Step},
    matrix::{HostMatrix, vector},
};
use super::{
    Batch, CacheShape, Forward, ForwardTime, LanguageModel, ModelSpec, Observable, SharedWeights, decoder::check_batch, fitting,
    kv_cache::KvCache, rope::Rope, weights::ModelWeights,
};
use crate::{
    error::{Error, Result},
    moe::{LayerRouting, Routed, observe::MoeObserver},
    ops::{
        cpu::{Arithmetic, Input, KEPT_BYTES, Output, Product, Reduction, Scratch, Store, trim},
        refill,
    },
};

/// How weights are held and products computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostOptions {
    /// Large weights in blocks of 32 8-bit integers with a scale, made of the loaded ones: 8.5 bits per weight.
    pub quantize: bool,
    /// Order of sums.
    pub reduction: Reduction,
}

/// A decoder on the CPU, with the cache of the sequences it serves.
#[derive(Debug)]
pub struct HostDecoder {
    weights: Arc<HostWeights>,
    cache: KvCache,
    buffers: Buffers,
    spare: Spare,
}

/// What came back of an earlier forward.
#[derive(Debug, Default)]
struct Spare {
    logits: Option<Tensor>,
    /// The last is for the first layer.
    layers: Vec<LayerRouting>,
    /// Empty, with room for every layer.
    list: Vec<LayerRouting>,
}

/// The weights of a [`HostDecoder`]. Decoders may share them.
#[derive(Debug)]
pub struct HostWeights {
    spec: Arc<ModelSpec>,
    arithmetic: Arithmetic,
    embedding: HostMatrix,
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    head: HostMatrix,
    rope: Rope,
}

/// Values of a step. They grow to the largest step.
#[derive(Debug, Default)]
struct Buffers {
    /// Residual stream, `[T, D]`.
    x: Vec<f32>,
    /// What a norm makes of it, `[T, D]`.
    normed: Vec<f32>,
    /// Queries, keys and values, `[T, (H + 2 KV) · hd]`.
    qkv: Vec<f32>,
    /// `[T, H · hd]`, twice: queries in a row, and what attention makes of them.
    queries: Vec<f32>,
    attended: Vec<f32>,
    /// `[T, hd / 2]` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// `[T, E]`.
    router_logits: Vec<f32>,
    /// Outputs of experts, `[R, D]`.
    routed: Vec<f32>,
    route: Routed,
    scratch: Scratch,
}

impl HostWeights {
    /// Puts `weights` in their places. Weights are those of the CPU and have the shapes of `spec`, as those of [`crate::checkpoint`] do.
    pub fn new(spec: Arc<ModelSpec>, weights: ModelWeights, options: HostOptions) -> Result<Self> {
        if spec.layers.len() != weights.layers.len() {
            return Err(Error::Internal(format!("{} layers of weights for {} of spec", weights.layers.len(), spec.layers.len())));
        }
        let embedding = HostMatrix::new(&weights.embedding, options.quantize)?;
        let head = match weights.head {
            Some(head) => HostMatrix::new(&head, options.quantize)?,
            None => embedding.clone(),
        };
        let layers = weights.layers.into_iter().enumerate().map(|(index, layer)| Layer::new(index, &spec, layer, options.quantize));
        Ok(Self {
            arithmetic: Arithmetic::detect(options.reduction),
            embedding,
            layers: layers.collect::<Result<_>>()?,
            final_norm: vector(&weights.final_norm)?,
            head,
            rope: Rope::new(&spec.rope, spec.head_dim),
            spec,
        })
    }

    /// What the model is.
    pub fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }
}

impl HostDecoder {
    /// With an empty cache.
    pub fn new(weights: Arc<HostWeights>, shape: CacheShape) -> Result<Self> {
        let cache = KvCache::new(&weights.spec, shape, DType::F32, &Device::Cpu)?;
        Ok(Self { weights, cache, buffers: Buffers::default(), spare: Spare::default() })
    }

    /// Runs on the threads of rayon's pool, from the first operation to the last: handing loops from outside into the pool would cost
    /// two wake-ups each.
    fn run_in_pool(&mut self, batch: &Batch, observer: Option<&mut dyn MoeObserver>) -> Result<Forward> {
        let mut result = Err(Error::Internal("the forward did not run".into()));
        rayon::scope(|_| result = self.run(batch, observer));
        result
    }

    fn run(&mut self, batch: &Batch, observer: Option<&mut dyn MoeObserver>) -> Result<Forward> {
        let Self { weights, cache, buffers, spare } = self;
        let (spec, arithmetic) = (&weights.spec, &weights.arithmetic);
        check_batch(spec, batch, Some(cache.shape()))?;
        let d = spec.hidden_size;
        embed(&weights.embedding, &batch.tokens, d, &mut buffers.x)?;
        weights.rope.fill(batch.spans.iter().flat_map(|span| span.past..span.past + span.new), &mut buffers.cos, &mut buffers.sin);

        let mut layers = std::mem::take(&mut spare.list);
        layers.reserve(weights.layers.len());
        let (spare_layers, time) = (&mut spare.layers, ForwardTime::default());
        // Lent for as long as the step: a trait object behind an `Option` does not shorten its lifetime by itself.
        let observer = observer.map(|observer| observer as &mut dyn MoeObserver);
        let mut step = Step { spec, arithmetic, batch, cache, buffers, spare: spare_layers, observer, time, routed: 0 };
        for layer in &weights.layers {
            layers.extend(layer.forward(&mut step)?);
        }
        let (time, routed) = (step.time, step.routed);
        let logits = weights.logits(batch, buffers, spare.logits.take())?;
        buffers.scratch.trim();
        trim(&mut buffers.routed, routed);
        Ok(Forward { logits, drawn: Vec::new(), layers, time })
    }
}

impl HostWeights {
    /// `[R, V]` of the rows that the batch asks for.
    fn logits(&self, batch: &Batch, buffers: &mut Buffers, spare: Option<Tensor>) -> Result<Tensor> {
        let (spec, d) = (&self.spec, self.spec.hidden_size);
        let rows = batch.num_logit_rows();
        let head = self.head.lend();
        let matrix = head.matrix()?;
        if rows > 0 {
            let picked = batch.logit_rows();
            rows::grow(&mut buffers.normed, rows * d);
            for (row, normed) in picked.iter().zip(buffers.normed.chunks_exact_mut(d)) {
                rows::rms_norm(&buffers.x[*row as usize * d..][..d], &self.final_norm, spec.rms_norm_eps as f32, normed);
            }
        }
        refill(spare, (rows, spec.vocab_size), |logits| {
            let product = Product { weights: matrix, rows: 0..rows, column: 0 };
            let output = Output { values: logits, stride: spec.vocab_size, store: Store::Set };
            self.arithmetic.linear(&mut buffers.scratch, Input { x: &buffers.normed, k: d, source: None }, &[product], output);
        })
    }
}

/// The embeddings of `tokens`, `[T, D]`.
fn embed(embedding: &HostMatrix, tokens: &[u32], d: usize, x: &mut Vec<f32>) -> Result<()> {
    rows::grow(x, tokens.len() * d);
    let embedding = embedding.lend();
    let matrix = embedding.matrix()?;
    tokens.iter().zip(x.chunks_exact_mut(d)).for_each(|(&token, x)| matrix.widen(token as usize, x));
    Ok(())
}

impl LanguageModel for HostDecoder {
    fn spec(&self) -> &ModelSpec {
        &self.weights.spec
    }

    fn cache(&self) -> CacheShape {
        self.cache.shape()
    }

    fn forward(&mut self, batch: &Batch) -> Result<Forward> {
        self.run_in_pool(batch, None)
    }

    fn recycle(&mut self, forward: Forward) {
        let Forward { logits, mut layers, .. } = forward;
        let small = logits.elem_count() * size_of::<f32>() <= KEPT_BYTES;
        layers.reverse();
        let list = std::mem::replace(&mut self.spare.layers, layers);
        self.spare.logits = small.then_some(logits);
        self.spare.list = list;
        self.spare.list.clear();
    }

    fn exchange(&mut self, weights: SharedWeights) -> Result<SharedWeights> {
        let weights = fitting(&weights, &self.weights.spec, |weights: &HostWeights| &weights.spec)?;
        Ok(SharedWeights::new(std::mem::replace(&mut self.weights, weights)))
    }
}

impl Observable for HostDecoder {
    fn forward_observed(&mut self, batch: &Batch, observer: &mut dyn MoeObserver) -> Result<Forward> {
        self.run_in_pool(batch, Some(observer))
    }
}

#[cfg(test)]
mod tests;
