//! Grouped-query attention over a ragged batch, with or without a cache.

use std::cell::RefCell;

use candle_core::{DType, Device, Tensor};

use super::{
    Batch, ModelSpec, QkNorm, Span,
    kv_cache::{KvCache, LayerCache},
    weights::AttentionWeights,
};
use crate::{
    error::Result,
    ops::{
        self,
        cpu::{AttentionShape, Bf16Unit, Isa, KeyLayout, KeyValue},
        cpu_slice,
    },
};

/// Attention of one layer.
#[derive(Clone, Debug)]
pub(super) struct Attention {
    layer: usize,
    shape: AttentionShape,
    qk_norm: QkNorm,
    clip_qkv: Option<f32>,
    eps: f64,
    weights: AttentionWeights,
    /// What goes into products with weights; all else is f32.
    products: DType,
}

/// What all layers share in one forward.
#[derive(Debug)]
pub(super) struct AttentionInput<'a> {
    pub(super) batch: &'a Batch,
    /// `[T, hd / 2]` f32.
    pub(super) cos: Tensor,
    /// `[T, hd / 2]` f32.
    pub(super) sin: Tensor,
    /// For devices.
    pub(super) masks: Masks,
}

/// What queries may see, made for the first layer that asks: most layers of a model ask the same.
#[derive(Debug, Default)]
pub(super) struct Masks(RefCell<Vec<(MaskKey, Tensor)>>);

/// New tokens, tokens before them, window.
type MaskKey = (usize, usize, Option<usize>);

impl Masks {
    fn get(&self, key: MaskKey, device: &Device) -> Result<Tensor> {
        let known = self.0.borrow().iter().find(|(known, _)| *known == key).map(|(_, mask)| mask.clone());
        if let Some(mask) = known {
            return Ok(mask);
        }
        let (new, past, window) = key;
        let mask = ops::device::causal_mask(new, past, window, device)?;
        self.0.borrow_mut().push((key, mask.clone()));
        Ok(mask)
    }
}

impl Attention {
    pub(super) fn new(layer: usize, spec: &ModelSpec, weights: AttentionWeights) -> Self {
        let shape = AttentionShape {
            heads: spec.num_heads,
            kv_heads: spec.num_kv_heads,
            head_dim: spec.head_dim,
            window: spec.layers[layer].sliding_window,
        };
        let (qk_norm, clip_qkv, eps) = (spec.qk_norm, spec.clip_qkv, spec.rms_norm_eps);
        Self { layer, shape, qk_norm, clip_qkv, eps, weights, products: DType::F32 }
    }

    /// With this element type in products with weights.
    pub(super) fn set_products(&mut self, products: DType) {
        self.products = products;
    }

    /// `x [T, D]` f32 to `[T, D]` f32.
    pub(super) fn forward(&self, x_td: &Tensor, input: &AttentionInput<'_>, cache: Option<&mut KvCache>) -> Result<Tensor> {
        let (q, k, v) = self.project(x_td, input)?;
        let y_thd = match cache {
            Some(cache) => self.cached(&q, &k, &v, input, cache)?,
            None if ops::runs_here(q.device()) && q.dtype() == DType::F32 && !q.track_op() => {
                self.ragged(&q, &k, &v, &input.batch.spans)?
            }
            None => self.composed(&q, input, &split(&k, &v, &input.batch.spans)?)?,
        };
        let y_td = y_thd.reshape((x_td.dim(0)?, self.shape.heads * self.shape.head_dim))?;
        self.product(&y_td, &self.weights.output, self.weights.output_bias.as_ref())
    }

    /// `x [T, K]` times `weight [N, K]` transposed, plus `bias [N]`, f32.
    fn product(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let y = ops::linear(&x.to_dtype(self.products)?, weight)?.to_dtype(DType::F32)?;
        match bias {
            Some(bias) => Ok(y.broadcast_add(&bias.to_dtype(DType::F32)?)?),
            None => Ok(y),
        }
    }

    /// Queries `[T, H, hd]`, keys and values `[T, KV, hd]`; normalised, clipped and rotated.
    fn project(&self, x_td: &Tensor, input: &AttentionInput<'_>) -> Result<(Tensor, Tensor, Tensor)> {
        let weights = &self.weights;
        let [q_bias, k_bias, v_bias] = match &weights.qkv_bias {
            Some([q, k, v]) => [Some(q), Some(k), Some(v)],
            None => [None; 3],
        };
        let [q_norm, k_norm] = match &weights.qk_norm {
            Some([q, k]) => [Some(q), Some(k)],
            None => [None; 2],
        };
        let q = self.shaped(x_td, &weights.query, q_bias, q_norm, self.shape.heads)?;
        let k = self.shaped(x_td, &weights.key, k_bias, k_norm, self.shape.kv_heads)?;
        let v = self.shaped(x_td, &weights.value, v_bias, None, self.shape.kv_heads)?;
        Ok((ops::rope(&q, &input.cos, &input.sin)?, ops::rope(&k, &input.cos, &input.sin)?, v))
    }

    fn shaped(&self, x_td: &Tensor, weight: &Tensor, bias: Option<&Tensor>, norm: Option<&Tensor>, heads: usize) -> Result<Tensor> {
        let shape = (x_td.dim(0)?, heads, self.shape.head_dim);
        let flat = self.product(x_td, weight, bias)?;
        let normed = match (norm, self.qk_norm) {
            (Some(norm), QkNorm::PerHead) => ops::rms_norm(&flat.reshape(shape)?, norm, self.eps)?,
            (Some(norm), QkNorm::Full) => ops::rms_norm(&flat, norm, self.eps)?,
            (None, _) | (_, QkNorm::None) => flat,
        };
        let clipped = match self.clip_qkv {
            Some(limit) => normed.clamp(-limit, limit)?,
            None => normed,
        };
        Ok(clipped.reshape(shape)?)
    }

    /// Writes the new keys and values to the cache, and attends over it.
    fn cached(&self, q: &Tensor, k: &Tensor, v: &Tensor, input: &AttentionInput<'_>, cache: &mut KvCache) -> Result<Tensor> {
        let batch = input.batch;
        cache.write(self.layer, batch, k, v)?;
        match cache.layer(self.layer)? {
            LayerCache::Host { keys, values } => {
                let block_tokens = cache.shape().block_tokens;
                let sequence = |span: &Span| {
                    let layout = KeyLayout::Paged { table: &batch.blocks[span.blocks.clone()], block_tokens };
                    KeyValue { past: span.past, new: span.new, keys, values, layout }
                };
                self.loops(q, &batch.spans.iter().map(sequence).collect::<Vec<_>>())
            }
            LayerCache::Device { keys, values } => {
                let pair = |span: &Span| {
                    let (table, tokens) = (batch.table(span), span.past + span.new);
                    Ok((cache.gather(keys, table, tokens)?, cache.gather(values, table, tokens)?))
                };
                let pairs = batch.spans.iter().map(pair).collect::<Result<Vec<_>>>()?;
                self.composed(q, input, &pairs)
            }
        }
    }

    /// Without a cache: every sequence attends to its own new tokens.
    fn ragged(&self, q: &Tensor, k: &Tensor, v: &Tensor, spans: &[Span]) -> Result<Tensor> {
        let row = self.shape.kv_heads * self.shape.head_dim;
        cpu_slice::<f32, _>(&k.contiguous()?, |k| {
            cpu_slice::<f32, _>(&v.contiguous()?, |v| {
                let mut end = 0;
                let sequence = |span: &Span| {
                    let part = end * row..(end + span.new) * row;
                    end += span.new;
                    KeyValue { past: 0, new: span.new, keys: &k[part.clone()], values: &v[part], layout: KeyLayout::Flat }
                };
                self.loops(q, &spans.iter().map(sequence).collect::<Vec<_>>())
            })
        })
    }

    /// The CPU loops: no copy of the cache, no dependence on the batch.
    fn loops(&self, q: &Tensor, sequences: &[KeyValue<'_>]) -> Result<Tensor> {
        let q = q.contiguous()?;
        let mut out = vec![0f32; q.elem_count()];
        cpu_slice::<f32, _>(&q, |q| {
            ops::cpu::attention(Isa::detect(), Bf16Unit::None, q, sequences, self.shape, &mut out);
            Ok(())
        })?;
        Ok(Tensor::from_vec(out, q.shape(), q.device())?)
    }

    /// Tensor operations, differentiable: all sequences at once where they have one length and no past.
    fn composed(&self, q: &Tensor, input: &AttentionInput<'_>, pairs: &[(Tensor, Tensor)]) -> Result<Tensor> {
        let spans = &input.batch.spans;
        let uniform = spans.iter().all(|span| span.new == spans[0].new && span.past == 0);
        let mut start = 0;
        let mut parts = Vec::with_capacity(spans.len());
        if uniform && !spans.is_empty() {
            let keys: Vec<&Tensor> = pairs.iter().map(|(k, _)| k).collect();
            let values: Vec<&Tensor> = pairs.iter().map(|(_, v)| v).collect();
            let (keys, values) = (Tensor::cat(&keys, 0)?, Tensor::cat(&values, 0)?);
            if ops::runs_here(q.device()) && q.dtype() == DType::F32 {
                return ops::causal_attention(q, &keys, &values, spans.len(), self.shape);
            }
            parts.push(self.block([q, &keys, &values], input, spans.len(), (spans[0].new, 0))?);
        } else {
            for (span, (keys, values)) in spans.iter().zip(pairs) {
                let q = q.narrow(0, start, span.new)?;
                parts.push(self.block([&q, keys, values], input, 1, (span.new, span.past))?);
                start += span.new;
            }
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// `count` sequences of `new` tokens after `past`: q `[count · new, H, hd]`, k and v `[count · (past + new), KV, hd]`.
    fn block(&self, qkv: [&Tensor; 3], input: &AttentionInput<'_>, count: usize, (new, past): (usize, usize)) -> Result<Tensor> {
        let mask = input.masks.get((new, past, self.shape.window), qkv[0].device())?;
        Ok(ops::device::attention(qkv, &mask, count, self.shape)?)
    }
}

/// The keys and values of each span, `[new, KV, hd]`.
fn split(k: &Tensor, v: &Tensor, spans: &[Span]) -> Result<Vec<(Tensor, Tensor)>> {
    let mut start = 0;
    let pair = |span: &Span| {
        let pair = (k.narrow(0, start, span.new)?.contiguous()?, v.narrow(0, start, span.new)?.contiguous()?);
        start += span.new;
        Ok(pair)
    };
    spans.iter().map(pair).collect()
}
