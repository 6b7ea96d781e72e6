//! The decoder: embedding, layers, head. One for all families, for serving and for training.

use std::{sync::Arc, time::Instant};

use candle_core::{DType, Device, Tensor};

use super::{
    Batch, CacheShape, FeedForwardSpec, Forward, ForwardTime, LanguageModel, ModelSpec, Observable, SharedWeights,
    attention::{Attention, AttentionInput, Masks},
    feed_forward::FeedForward,
    fitting,
    kv_cache::KvCache,
    rope::Rope,
    weights::{FeedForwardWeights, ModelWeights},
};
use crate::{
    error::{Error, Result},
    moe::{LayerRouting, MoeLayer, RoutingMode, SwiGlu, kernel::ExpertKernel, observe::MoeObserver, policy::LayerChoices},
    ops,
};

/// Weights in their places. Cheap to clone: tensors are shared.
#[derive(Clone, Debug)]
pub struct Decoder {
    spec: Arc<ModelSpec>,
    embedding: Tensor,
    layers: Vec<Layer>,
    final_norm: Tensor,
    head: Tensor,
    rope: Rope,
    /// What goes into products.
    products: DType,
}

#[derive(Clone, Debug)]
struct Layer {
    attention_norm: Tensor,
    attention: Attention,
    feed_forward_norm: Tensor,
    feed_forward: FeedForward,
}

impl Decoder {
    /// Puts `weights` in their places; experts run through `kernel`.
    ///
    /// Weights must have the shapes of `spec`, as those of [`crate::checkpoint`] do.
    pub fn new(spec: Arc<ModelSpec>, weights: ModelWeights, kernel: &Arc<dyn ExpertKernel>) -> Result<Self> {
        if spec.layers.len() != weights.layers.len() {
            return Err(Error::Internal(format!("{} layers of weights for {} of spec", weights.layers.len(), spec.layers.len())));
        }
        let products = weights.products();
        let mut layers = Vec::with_capacity(weights.layers.len());
        for (index, layer) in weights.layers.into_iter().enumerate() {
            let feed_forward = match (&spec.layers[index].feed_forward, layer.feed_forward) {
                (FeedForwardSpec::Dense { .. }, FeedForwardWeights::Dense(mlp)) => FeedForward::Dense(SwiGlu::new(mlp)),
                (FeedForwardSpec::Moe(moe), FeedForwardWeights::Moe(weights)) => {
                    FeedForward::Moe(Box::new(MoeLayer::new(index, moe.clone(), spec.reference, weights, Arc::clone(kernel))))
                }
                _ => return Err(Error::Internal(format!("layer {index}: spec and weights disagree on dense or routed"))),
            };
            layers.push(Layer {
                attention_norm: layer.attention_norm,
                attention: Attention::new(index, &spec, layer.attention),
                feed_forward_norm: layer.feed_forward_norm,
                feed_forward,
            });
        }
        let decoder = Self {
            rope: Rope::new(&spec.rope, spec.head_dim),
            head: weights.head.unwrap_or_else(|| weights.embedding.clone()),
            embedding: weights.embedding,
            final_norm: weights.final_norm,
            layers,
            products,
            spec,
        };
        Ok(decoder.with_products(products))
    }

    /// With this element type in its products instead of [`ModelWeights::products`]: for weights some of which are f32 masters of narrower ones.
    #[must_use]
    pub fn with_products(mut self, products: DType) -> Self {
        self.products = products;
        for layer in &mut self.layers {
            layer.attention.set_products(products);
            if let FeedForward::Moe(moe) = &mut layer.feed_forward {
                moe.set_products(products);
            }
        }
        self
    }

    /// What the model is.
    pub fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    /// Dtype of what goes into products, and of cached keys and values. The residual stream is f32.
    pub fn activations(&self) -> DType {
        self.products
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// Runs `batch`. Without a cache all spans must start at position 0.
    ///
    /// Serving mode is [`Decoder::serve`]; training passes its own [`RoutingMode`].
    pub fn forward(&self, batch: &Batch, mode: &mut RoutingMode<'_>, mut cache: Option<&mut KvCache>) -> Result<Forward> {
        check_batch(&self.spec, batch, cache.as_deref().map(KvCache::shape))?;
        let (mut x_td, input) = self.begin(batch)?;
        let (mut routings, mut time) = (Vec::new(), ForwardTime::default());
        for layer in &self.layers {
            let (next, routing) = self.layer(layer, &x_td, &input, mode, cache.as_deref_mut(), &mut time)?;
            x_td = next;
            routings.extend(routing);
        }
        let logits = self.logits(&x_td, &batch.logit_rows())?;
        Ok(Forward { logits, drawn: Vec::new(), layers: routings, time })
    }

    /// `batch`, whose spans start at position 0, layer by layer: for whoever keeps less of a forward than [`Decoder::forward`] does.
    pub(crate) fn layerwise<'a>(&'a self, batch: &'a Batch) -> Result<Layerwise<'a>> {
        check_batch(&self.spec, batch, None)?;
        let (embedded, input) = self.begin(batch)?;
        Ok(Layerwise { decoder: self, embedded, input })
    }

    /// `[T, D]` of the tokens, and what all layers share.
    fn begin<'a>(&self, batch: &'a Batch) -> Result<(Tensor, AttentionInput<'a>)> {
        let device = self.device();
        let tokens = Tensor::from_slice(&batch.tokens, batch.tokens.len(), device)?;
        let x_td = self.embedding.index_select(&tokens, 0)?.to_dtype(self.products)?.to_dtype(DType::F32)?;
        let positions: Vec<u32> = batch.spans.iter().flat_map(|span| span.past as u32..(span.past + span.new) as u32).collect();
        let (cos, sin) = self.rope.at(&positions, device)?;
        Ok((x_td, AttentionInput { batch, cos, sin, masks: Masks::default() }))
    }

    /// [`Decoder::forward`] with each span routed by its own choice.
    pub fn serve(&self, batch: &Batch, cache: Option<&mut KvCache>) -> Result<Forward> {
        self.serve_observed(batch, cache, None)
    }

    /// [`Decoder::serve`], shown to `observer`.
    pub fn serve_observed(&self, batch: &Batch, cache: Option<&mut KvCache>, observer: Option<&mut dyn MoeObserver>) -> Result<Forward> {
        let runs: Vec<(LayerChoices, usize)> = batch.spans.iter().map(|span| (span.routing.clone(), span.new)).collect();
        // Lent for as long as the runs: a trait object behind an `Option` does not shorten its lifetime by itself.
        let observer = observer.map(|observer| observer as &mut dyn MoeObserver);
        self.forward(batch, &mut RoutingMode::Serve { runs: &runs, observer }, cache)
    }

    fn layer(
        &self,
        layer: &Layer,
        x_td: &Tensor,
        input: &AttentionInput<'_>,
        mode: &mut RoutingMode<'_>,
        cache: Option<&mut KvCache>,
        time: &mut ForwardTime,
    ) -> Result<(Tensor, Option<LayerRouting>)> {
        let eps = self.spec.rms_norm_eps;
        let normed = ops::rms_norm(x_td, &layer.attention_norm, eps)?;
        let start = Instant::now();
        let attended = layer.attention.forward(&normed, input, cache)?;
        time.attention += start.elapsed();
        let x_td = (x_td + attended)?;
        let normed = ops::rms_norm(&x_td, &layer.feed_forward_norm, eps)?;
        let start = Instant::now();
        let (y_td, routing) = layer.feed_forward.forward(&normed, self.products, mode)?;
        time.experts += start.elapsed();
        Ok(((x_td + y_td)?, routing))
    }

    /// `[R, V]` f32 of the given rows.
    fn logits(&self, x_td: &Tensor, rows: &[u32]) -> Result<Tensor> {
        if rows.is_empty() {
            return Ok(Tensor::zeros((0, self.spec.vocab_size), DType::F32, self.device())?);
        }
        let picked = if rows.len() == x_td.dim(0)? {
            x_td.clone()
        } else {
            x_td.index_select(&Tensor::from_slice(rows, rows.len(), self.device())?, 0)?
        };
        let normed = ops::rms_norm(&picked, &self.final_norm, self.spec.rms_norm_eps)?;
        Ok(ops::linear(&normed.to_dtype(self.products)?, &self.head)?.to_dtype(DType::F32)?)
    }
}

/// A forward that is run layer by layer.
#[derive(Debug)]
pub(crate) struct Layerwise<'a> {
    decoder: &'a Decoder,
    embedded: Tensor,
    input: AttentionInput<'a>,
}

impl Layerwise<'_> {
    /// `[T, D]`, what the first layer takes.
    pub(crate) fn embedded(&self) -> &Tensor {
        &self.embedded
    }

    /// Number of layers.
    pub(crate) fn len(&self) -> usize {
        self.decoder.layers.len()
    }

    /// One layer: `x [T, D]` to `[T, D]`, and how it routed.
    pub(crate) fn layer(&self, index: usize, x_td: &Tensor, mode: &mut RoutingMode<'_>) -> Result<(Tensor, Option<LayerRouting>)> {
        self.decoder.layer(&self.decoder.layers[index], x_td, &self.input, mode, None, &mut ForwardTime::default())
    }

    /// What the last layer left to the logits of the batch.
    pub(crate) fn logits(&self, x_td: &Tensor) -> Result<Tensor> {
        self.decoder.logits(x_td, &self.input.batch.logit_rows())
    }
}

/// Checks what a forward relies on: tokens of the vocabulary, spans that cover them, block tables that fit `cache`.
pub(super) fn check_batch(spec: &ModelSpec, batch: &Batch, cache: Option<CacheShape>) -> Result<()> {
    if batch.tokens.is_empty() || batch.spans.iter().map(|span| span.new).sum::<usize>() != batch.tokens.len() {
        return Err(Error::Internal("the spans of a batch do not cover its tokens".into()));
    }
    let (choices, rows) = (batch.choices.len(), batch.num_logit_rows());
    if choices > 0 && choices != rows {
        return Err(Error::Internal(format!("{choices} choices for the {rows} rows of logits of a batch")));
    }
    if let Some(token) = batch.tokens.iter().find(|&&token| token as usize >= spec.vocab_size) {
        return Err(Error::invalid("token_ids", format!("{token} is not below {}, the size of the vocabulary", spec.vocab_size)));
    }
    for span in &batch.spans {
        if span.past + span.new > spec.max_context {
            let length = span.past + span.new;
            return Err(Error::out_of_range("token_ids", format!("{length} tokens, the context has {}", spec.max_context)));
        }
        if let LayerChoices::Each(choices) = &span.routing
            && choices.len() != spec.layers.len()
        {
            return Err(Error::invalid(
                "routing",
                format!("{} choices for {} layers: give one for each", choices.len(), spec.layers.len()),
            ));
        }
        let Some(cache) = cache else {
            if span.past > 0 {
                return Err(Error::Internal("a span with a past needs a cache".into()));
            }
            continue;
        };
        let table = batch.table(span);
        if table.len() < cache.blocks_for(span.past + span.new) || table.iter().any(|&block| block as usize >= cache.num_blocks) {
            return Err(Error::Internal(format!("the block table of a span of {} + {} tokens does not fit", span.past, span.new)));
        }
    }
    Ok(())
}

/// A decoder with the cache of the sequences it serves.
#[derive(Debug)]
pub struct CachedDecoder {
    decoder: Arc<Decoder>,
    cache: KvCache,
}

impl CachedDecoder {
    /// With an empty cache of this size. Fails as [`KvCache::new`] does.
    pub fn new(decoder: impl Into<Arc<Decoder>>, cache: CacheShape) -> Result<Self> {
        let decoder = decoder.into();
        let cache = KvCache::new(&decoder.spec, cache, decoder.products, decoder.device())?;
        Ok(Self { decoder, cache })
    }
}

impl LanguageModel for CachedDecoder {
    fn spec(&self) -> &ModelSpec {
        self.decoder.spec()
    }

    fn cache(&self) -> CacheShape {
        self.cache.shape()
    }

    fn forward(&mut self, batch: &Batch) -> Result<Forward> {
        self.decoder.serve(batch, Some(&mut self.cache))
    }

    fn exchange(&mut self, weights: SharedWeights) -> Result<SharedWeights> {
        let decoder = fitting(&weights, &self.decoder.spec, |decoder: &Decoder| &decoder.spec)?;
        let (theirs, ours) = (decoder.products, self.decoder.products);
        if theirs != ours || !decoder.device().same_device(self.decoder.device()) {
            let message =
                format!("these weights are {theirs:?} on {:?}: {ours:?} on {:?} is served", decoder.device(), self.decoder.device());
            return Err(Error::FailedPrecondition(message));
        }
        Ok(SharedWeights::new(std::mem::replace(&mut self.decoder, decoder)))
    }
}

impl Observable for CachedDecoder {
    fn forward_observed(&mut self, batch: &Batch, observer: &mut dyn MoeObserver) -> Result<Forward> {
        self.decoder.serve_observed(batch, Some(&mut self.cache), Some(observer))
    }
}
