//! Launches of the parts of a layer, routed experts apart.

use hardmax_kernels::{
    View,
    attention::{self, Attend, Heads, Prepare},
    bf16,
    experts::stream_linear,
    grouped::SiluMul,
    linear::{Blas, Float, Linear},
    norm::{AddBias, Embed, RmsNorm},
};

use super::{
    super::{ModelSpec, QkNorm},
    Machine, Step,
    arena::Place,
    cache::Cache,
    profile::Class,
    weights::{Attention, FeedForward, GpuWeights, Layer, SwiGlu},
};
use crate::error::Result;

/// Rows up to which a product is the reading of its weights.
const STREAMED_ROWS: usize = 32;

/// Heads of a model's layers.
pub(super) fn heads(spec: &ModelSpec) -> Heads {
    Heads { heads: spec.num_heads, kv_heads: spec.num_kv_heads, head_dim: spec.head_dim }
}

/// A product over all tokens: `y [rows, n] (+)= x [rows, k] · weight [n, k]ᵀ`, rows of y `stride` apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product<'a, O: Float> {
    pub(super) x: View<'a, bf16>,
    pub(super) weight: View<'a, bf16>,
    pub(super) y: View<'a, O>,
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) add: bool,
}

impl<O: Float> Product<'_, O> {
    /// Few rows stream the weights, which no other row has a part in: they do not depend on the batch. Many go through cuBLAS.
    pub(super) fn launch(self, blas: &mut Blas, stream: hardmax_kernels::Stream) -> Result<()> {
        let Self { x, weight, y, stride, rows, n, k, add } = self;
        let product = Linear { x, weight, y, stride, rows, n, k, add };
        if rows <= STREAMED_ROWS {
            return Ok(stream_linear(product, stream)?);
        }
        Ok(blas.linear(product)?)
    }
}

impl Machine {
    /// Rows of the embedding into the residual stream.
    pub(super) fn embed(&mut self, weights: &GpuWeights, step: &Step<'_>) -> Result<()> {
        self.clock.start(self.stream)?;
        let embed = Embed {
            table: weights.embedding.view(),
            tokens: self.words.device.view().part(step.layout.tokens.clone()),
            x: self.arena.view(step.values.x),
            rows: step.sizes.tokens,
            width: step.spec.hidden_size,
            vocabulary: step.spec.vocab_size,
        };
        Ok(embed.launch(self.stream)?)
    }

    /// Adds attention over what precedes to the residual stream.
    pub(super) fn attention(&mut self, index: usize, layer: &Layer, cache: &Cache, weights: &GpuWeights, step: &Step<'_>) -> Result<()> {
        self.norm(layer.attention_norm.view(), false, step)?;
        self.project(&layer.attention, step)?;
        self.attend(index, &layer.attention, cache, weights, step)?;
        let (spec, values, tokens, d) = (step.spec, step.values, step.sizes.tokens, step.spec.hidden_size);
        let Self { stream, blas, arena, clock, .. } = self;
        let (x, weight) = (arena.view(values.attended), layer.attention.output.view());
        let product =
            Product { x, weight, y: arena.view(values.x), stride: d, rows: tokens, n: d, k: spec.num_heads * spec.head_dim, add: true };
        product.launch(blas, *stream)?;
        if let Some(bias) = &layer.attention.output_bias {
            AddBias { x: arena.view(values.x), bias: bias.view(), rows: tokens, width: d }.launch(*stream)?;
        }
        clock.mark(*stream, Class::Projection)
    }

    /// Queries, keys and values of the normed rows, side by side.
    fn project(&mut self, attention: &Attention, step: &Step<'_>) -> Result<()> {
        let (spec, values, heads) = (step.spec, step.values, heads(step.spec));
        let Self { stream, blas, arena, clock, .. } = self;
        let (x, qkv) = (arena.view(values.normed), arena.view(values.qkv));
        let (q_width, kv_width) = (heads.width(), spec.num_kv_heads * spec.head_dim);
        let parts = [(&attention.query, 0, q_width), (&attention.key, q_width, kv_width), (&attention.value, q_width + kv_width, kv_width)];
        for (weight, column, n) in parts {
            let product = Product {
                x,
                weight: weight.view(),
                y: qkv.part(column..),
                stride: heads.qkv_width(),
                rows: step.sizes.tokens,
                n,
                k: spec.hidden_size,
                add: false,
            };
            product.launch(blas, *stream)?;
        }
        clock.mark(*stream, Class::Projection)
    }

    /// Writes the new keys and values to the cache, and attends over it.
    fn attend(&mut self, index: usize, attention: &Attention, cache: &Cache, weights: &GpuWeights, step: &Step<'_>) -> Result<()> {
        let (spec, values, layout) = (step.spec, step.values, step.layout);
        let (stream, arena, words) = (self.stream, &self.arena, self.words.device.view());
        let (keys, cached_values) = cache.layer(index);
        let cache = attention::Cache {
            keys,
            values: cached_values,
            blocks: cache.shape.num_blocks,
            block_tokens: cache.shape.block_tokens,
            table: words.part(layout.tables.clone()),
            table_stride: step.sizes.stride,
        };
        let prepare = Prepare {
            qkv: arena.view(values.qkv),
            bias: attention.qkv_bias.as_ref().map(|[q, k, v]| [q.view(), k.view(), v.view()]),
            norm: match (spec.qk_norm, &attention.qk_norm) {
                (QkNorm::PerHead, Some([q, k])) => attention::QkNorm::PerHead([q.view(), k.view()]),
                (QkNorm::Full, Some([q, k])) => attention::QkNorm::Full([q.view(), k.view()]),
                _ => attention::QkNorm::None,
            },
            epsilon: spec.rms_norm_eps as f32,
            clip: spec.clip_qkv,
            inverse_frequencies: self.frequencies.view(),
            rope_scale: weights.rope.scale(),
            sequence: words.part(layout.sequence.clone()),
            position: words.part(layout.position.clone()),
            q: arena.view(values.query),
            cache,
            heads: heads(spec),
            tokens: step.sizes.tokens,
        };
        prepare.launch(stream)?;
        let (query_start, past) = (words.part(layout.query_start.clone()), words.part(layout.past.clone()));
        for launch in step.attention {
            let first = launch.sequences.start;
            let attend = Attend {
                q: arena.view(values.query),
                query_start: query_start.part(first..),
                past: past.part(first..),
                out: arena.view(values.attended),
                workspace: arena.view(values.attention_workspace),
                cache: attention::Cache { table: cache.table.part(first * cache.table_stride..), ..cache },
                heads: heads(spec),
                window: attention.window,
                tokens: launch.tokens,
                sequences: launch.sequences.len(),
                longest_new: launch.longest_new,
                splits: launch.splits,
            };
            attend.launch(stream)?;
        }
        self.clock.mark(stream, Class::Attention)
    }

    /// Adds what a dense layer makes to the residual stream.
    pub(super) fn dense(&mut self, layer: &Layer, mlp: &SwiGlu, width: usize, step: &Step<'_>) -> Result<()> {
        self.norm(layer.feed_forward_norm.view(), false, step)?;
        self.mlp(mlp, width, step.values.x, true, step)?;
        self.clock.mark(self.stream, Class::Dense)
    }

    /// `down(silu(gate x) ⊙ up x)` of the normed rows, into `y [T, D]` or added to it.
    pub(super) fn mlp<O: Float>(&mut self, mlp: &SwiGlu, width: usize, y: Place<O>, add: bool, step: &Step<'_>) -> Result<()> {
        let (values, rows, d) = (step.values, step.sizes.tokens, step.spec.hidden_size);
        let Self { stream, blas, arena, words, .. } = self;
        let (gate_up, hidden) = (arena.view(values.gate_up), arena.view(values.hidden));
        let (x, weight) = (arena.view(values.normed), mlp.gate_up.view());
        Product { x, weight, y: gate_up, stride: 2 * width, rows, n: 2 * width, k: d, add: false }.launch(blas, *stream)?;
        // One expert, whose rows are all.
        let offsets = words.device.view().part(step.layout.all_tokens.clone());
        SiluMul { gate_up, offsets, out: hidden, experts: 1, max_rows: rows, width }.launch(*stream)?;
        let down = Product { x: hidden, weight: mlp.down.view(), y: arena.view(y), stride: d, rows, n: d, k: width, add };
        down.launch(blas, *stream)
    }

    /// RMSNorm of the residual stream, and where it is `wide`, the same in f32.
    pub(super) fn norm(&mut self, weight: View<'_, f32>, wide: bool, step: &Step<'_>) -> Result<()> {
        let (arena, values) = (&self.arena, step.values);
        let norm = RmsNorm {
            x: arena.view(values.x),
            pick: None,
            weight,
            out: arena.view(values.normed),
            out_f32: wide.then(|| arena.view(values.wide)),
            epsilon: step.spec.rms_norm_eps as f32,
            rows: step.sizes.tokens,
            width: step.spec.hidden_size,
        };
        norm.launch(self.stream)?;
        self.clock.mark(self.stream, Class::Norm)
    }

    /// Adds what the feed-forward part of a layer makes to the residual stream.
    pub(super) fn feed_forward(&mut self, index: usize, layer: &Layer, step: &Step<'_>, watch: &mut super::watch::Watch<'_>) -> Result<()> {
        match &layer.feed_forward {
            FeedForward::Dense { mlp, width } => self.dense(layer, mlp, *width, step),
            FeedForward::Moe(moe) => self.moe(index, layer, moe, step, watch),
        }
    }
}
