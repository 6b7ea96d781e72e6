//! Keys and values of the sequences that are served.

use hardmax_kernels::{Buffer, Stream, View, bf16};

use super::super::{CacheShape, ModelSpec};
use crate::error::{Error, Result};

/// Of each layer keys and values, `[num_blocks, kv_heads, block_tokens, head_dim]`: as [`KvCache`](super::super::kv_cache::KvCache), in bf16.
#[derive(Debug)]
pub(super) struct Cache {
    pub(super) shape: CacheShape,
    layers: Vec<[Buffer<bf16>; 2]>,
}

impl Cache {
    /// An empty cache. Fails where a size is 0 or cannot be counted, or where there is not as much memory.
    pub(super) fn new(stream: Stream, spec: &ModelSpec, shape: CacheShape) -> Result<Self> {
        let counted = shape.block_tokens > 0 && (1..=u32::MAX as usize).contains(&shape.num_blocks);
        let per_token = spec.num_kv_heads * spec.head_dim;
        let elements = shape.num_blocks.checked_mul(shape.block_tokens).and_then(|tokens| tokens.checked_mul(per_token));
        let Some(elements) = elements.filter(|_| counted) else {
            return Err(Error::invalid("kv_cache", format!("{} blocks of {} tokens", shape.num_blocks, shape.block_tokens)));
        };
        // Zeros, so that whatever a kernel reads behind the last token of a block is a number: times the weight 0 it must be 0.
        let buffer = || Buffer::zeros(stream, elements, "keys and values (--kv-cache-tokens)");
        let layers = spec.layers.iter().map(|_| Ok([buffer()?, buffer()?])).collect::<Result<_>>()?;
        Ok(Self { shape, layers })
    }

    /// Keys and values of a layer.
    pub(super) fn layer(&self, layer: usize) -> (View<'_, bf16>, View<'_, bf16>) {
        let [keys, values] = &self.layers[layer];
        (keys.view(), values.view())
    }
}
