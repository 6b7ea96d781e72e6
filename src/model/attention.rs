//! Grouped-query attention over a ragged batch, with or without a cache.

use candle_core::{DType, Device, Tensor};

use super::{ModelSpec, QkNorm, Span, kv_cache::KvCache, weights::AttentionWeights};
use crate::{
    error::Result,
    ops::{
        self,
        cpu::{AttentionShape, KeyValue},
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
    max_context: usize,
    weights: AttentionWeights,
}

/// What all layers share in one forward.
#[derive(Debug)]
pub(super) struct AttentionInput<'a> {
    pub(super) spans: &'a [Span],
    /// `[T, hd / 2]` f32.
    pub(super) cos: Tensor,
    /// `[T, hd / 2]` f32.
    pub(super) sin: Tensor,
}

impl Attention {
    pub(super) fn new(layer: usize, spec: &ModelSpec, weights: AttentionWeights) -> Self {
        let shape = AttentionShape {
            heads: spec.num_heads,
            kv_heads: spec.num_kv_heads,
            head_dim: spec.head_dim,
            window: spec.layers[layer].sliding_window,
        };
        let (eps, max_context) = (spec.rms_norm_eps, spec.max_context);
        Self { layer, shape, qk_norm: spec.qk_norm, clip_qkv: spec.clip_qkv, eps, max_context, weights }
    }

    /// `x [T, D]` to `[T, D]`.
    pub(super) fn forward(&self, x_td: &Tensor, input: &AttentionInput<'_>, cache: Option<&mut KvCache>) -> Result<Tensor> {
        let (q, k, v) = self.project(x_td, input)?;
        let pairs = self.keys_and_values(&k, &v, input.spans, cache)?;
        let on_host = q.device().is_cpu() && q.dtype() == DType::F32 && !q.track_op();
        let y_thd = if on_host { self.ragged(&q, input.spans, &pairs)? } else { self.composed(&q, input.spans, &pairs)? };
        let y = ops::linear(&y_thd.reshape((x_td.dim(0)?, self.shape.heads * self.shape.head_dim))?, &self.weights.output)?;
        add_bias(y, self.weights.output_bias.as_ref())
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
        let flat = add_bias(ops::linear(x_td, weight)?, bias)?;
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

    /// All keys and values that each span attends to, `[past + new, KV, hd]`.
    fn keys_and_values(&self, k: &Tensor, v: &Tensor, spans: &[Span], mut cache: Option<&mut KvCache>) -> Result<Vec<(Tensor, Tensor)>> {
        let mut start = 0;
        let mut pairs = Vec::with_capacity(spans.len());
        for span in spans {
            let (k, v) = (k.narrow(0, start, span.new)?, v.narrow(0, start, span.new)?);
            pairs.push(match cache.as_deref_mut() {
                Some(cache) => cache.append(span.slot, self.layer, span.past, &k, &v, self.max_context)?,
                None => (k.contiguous()?, v.contiguous()?),
            });
            start += span.new;
        }
        Ok(pairs)
    }

    /// The CPU loops: no copy of the cache, no dependence on the batch.
    fn ragged(&self, q: &Tensor, spans: &[Span], pairs: &[(Tensor, Tensor)]) -> Result<Tensor> {
        // One sequence at a time: each lends its cache for the length of the loop over it.
        let q = q.contiguous()?;
        let row = self.shape.heads * self.shape.head_dim;
        let out = cpu_slice::<f32, _>(&q, |q| {
            let mut out = Vec::with_capacity(q.len());
            let mut start = 0;
            for (span, (keys, values)) in spans.iter().zip(pairs) {
                let q = &q[start * row..(start + span.new) * row];
                let part = cpu_slice::<f32, _>(keys, |keys| {
                    cpu_slice::<f32, _>(values, |values| {
                        let sequence = KeyValue { past: span.past, new: span.new, keys, values };
                        Ok(ops::cpu::attention(q, &[sequence], self.shape))
                    })
                })?;
                out.extend(part);
                start += span.new;
            }
            Ok(out)
        })?;
        Ok(Tensor::from_vec(out, q.shape(), q.device())?)
    }

    /// Tensor operations, differentiable: all sequences at once where they have one length and no past.
    fn composed(&self, q: &Tensor, spans: &[Span], pairs: &[(Tensor, Tensor)]) -> Result<Tensor> {
        let uniform = spans.iter().all(|span| span.new == spans[0].new && span.past == 0);
        let mut start = 0;
        let mut parts = Vec::with_capacity(spans.len());
        if uniform && !spans.is_empty() {
            let keys: Vec<&Tensor> = pairs.iter().map(|(k, _)| k).collect();
            let values: Vec<&Tensor> = pairs.iter().map(|(_, v)| v).collect();
            let (keys, values) = (Tensor::cat(&keys, 0)?, Tensor::cat(&values, 0)?);
            if q.device().is_cpu() && q.dtype() == DType::F32 {
                return ops::causal_attention(q, &keys, &values, spans.len(), self.shape);
            }
            parts.push(self.block(q, &keys, &values, spans.len(), 0)?);
        } else {
            for (span, (keys, values)) in spans.iter().zip(pairs) {
                parts.push(self.block(&q.narrow(0, start, span.new)?, keys, values, 1, span.past)?);
                start += span.new;
            }
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// `count` sequences of one length: q `[count · S, H, hd]`, k and v `[count · (past + S), KV, hd]`.
    fn block(&self, q: &Tensor, k: &Tensor, v: &Tensor, count: usize, past: usize) -> Result<Tensor> {
        let AttentionShape { heads, kv_heads, head_dim, window } = self.shape;
        let new = q.dim(0)? / count;
        let total = past + new;
        let q = q.reshape((count, new, heads, head_dim))?.transpose(1, 2)?.contiguous()?;
        let spread = |x: &Tensor| -> Result<Tensor> {
            let x = x.reshape((count, total, kv_heads, head_dim))?.transpose(1, 2)?.unsqueeze(2)?;
            let x = x.broadcast_as((count, kv_heads, heads / kv_heads, total, head_dim))?;
            Ok(x.reshape((count, heads, total, head_dim))?)
        };
        let (k, v) = (spread(k)?, spread(v)?);
        let scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? * (1.0 / (head_dim as f64).sqrt()))?.to_dtype(DType::F32)?;
        let scores = scores.broadcast_add(&mask(new, past, window, q.device())?)?;
        let weights = ops::softmax(&scores)?.to_dtype(v.dtype())?;
        let y = weights.matmul(&v)?;
        Ok(y.transpose(1, 2)?.reshape((count * new, heads, head_dim))?)
    }
}

fn add_bias(x: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        Some(bias) => Ok(x.broadcast_add(&bias.to_dtype(x.dtype())?)?),
        None => Ok(x),
    }
}

/// `[new, past + new]` f32: 0 where the query may look, negative infinity elsewhere.
fn mask(new: usize, past: usize, window: Option<usize>, device: &Device) -> Result<Tensor> {
    let allowed = |query: usize, key: usize| key <= query && window.is_none_or(|window| query - key < window);
    let rows =
        (past..past + new).flat_map(|query| (0..past + new).map(move |key| if allowed(query, key) { 0f32 } else { f32::NEG_INFINITY }));
    Ok(Tensor::from_vec(rows.collect(), (new, past + new), device)?)
}
