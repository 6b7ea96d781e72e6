//! Keys and values in blocks of a fixed number of tokens, allocated once. Which block belongs to whom is the engine's business; the
//! cache follows the block tables of a batch.
//!
//! Of each layer, keys and values are `[num_blocks, kv_heads, block_tokens, head_dim]`: the rows of one head in one block are adjacent, so
//! attention reads them in runs.

use candle_core::{DType, Device, Tensor};

use super::{Batch, CacheShape, ModelSpec};
use crate::{
    error::{Error, Result},
    ops::{cpu_slice, runs_here},
};

/// Cached keys and values of all layers.
#[derive(Debug)]
pub struct KvCache {
    shape: CacheShape,
    kv_heads: usize,
    head_dim: usize,
    layers: Vec<LayerCache>,
}

/// Keys and values of one layer.
#[derive(Debug)]
pub(super) enum LayerCache {
    /// f32 on the CPU: read and written in place. The operating system gives memory to a block when it is first written.
    Host { keys: Vec<f32>, values: Vec<f32> },
    /// Elsewhere: `[num_blocks · kv_heads · block_tokens, head_dim]`.
    Device { keys: Tensor, values: Tensor },
}

impl CacheShape {
    /// Blocks that `tokens` tokens take.
    pub fn blocks_for(self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens)
    }

    /// Tokens that all blocks hold.
    pub fn tokens(self) -> usize {
        self.num_blocks.saturating_mul(self.block_tokens)
    }
}

impl KvCache {
    /// An empty cache. Fails where a size is 0, or where there is not as much memory.
    pub fn new(spec: &ModelSpec, shape: CacheShape, dtype: DType, device: &Device) -> Result<Self> {
        let (kv_heads, head_dim) = (spec.num_kv_heads, spec.head_dim);
        if shape.block_tokens == 0 || shape.num_blocks == 0 || shape.num_blocks > u32::MAX as usize {
            return Err(Error::invalid("kv_cache", format!("{} blocks of {} tokens", shape.num_blocks, shape.block_tokens)));
        }
        let rows = shape.num_blocks.checked_mul(shape.block_tokens).and_then(|rows| rows.checked_mul(kv_heads));
        let too_large =
            || Error::out_of_range("kv_cache", format!("no memory for {} blocks of {} tokens", shape.num_blocks, shape.block_tokens));
        let elements = rows.and_then(|rows| rows.checked_mul(head_dim)).ok_or_else(too_large)?;
        let host = runs_here(device) && dtype == DType::F32;
        if host {
            // Asked for as a whole, so that a lack is an error and not an abort; given back at once.
            let all = elements.checked_mul(2 * spec.layers.len()).ok_or_else(too_large)?;
            Vec::<f32>::new().try_reserve_exact(all).map_err(|_| too_large())?;
        }
        let layer = |_| {
            if host {
                return Ok(LayerCache::Host { keys: vec![0.0; elements], values: vec![0.0; elements] });
            }
            let zeros = || Tensor::zeros((elements / head_dim, head_dim), dtype, device);
            Ok(LayerCache::Device { keys: zeros()?, values: zeros()? })
        };
        Ok(Self { shape, kv_heads, head_dim, layers: (0..spec.layers.len()).map(layer).collect::<Result<_>>()? })
    }

    /// Its blocks.
    pub fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Bytes of keys and values of one token in all layers.
    pub fn token_bytes(spec: &ModelSpec, dtype: DType) -> usize {
        2 * spec.layers.len() * spec.num_kv_heads * spec.head_dim * dtype.size_in_bytes()
    }

    /// Empty, and stored as on other devices.
    #[cfg(test)]
    pub(super) fn into_device_store(mut self) -> Self {
        let rows = self.shape.tokens() * self.kv_heads;
        for layer in &mut self.layers {
            let zeros = || Tensor::zeros((rows, self.head_dim), DType::F32, &Device::Cpu).unwrap();
            *layer = LayerCache::Device { keys: zeros(), values: zeros() };
        }
        self
    }

    pub(super) fn layer(&self, layer: usize) -> Result<&LayerCache> {
        self.layers.get(layer).ok_or_else(|| Error::Internal(format!("the cache has no layer {layer}")))
    }

    /// Keys and values of a layer on the host.
    pub(super) fn host_layer(&self, layer: usize) -> Result<(&[f32], &[f32])> {
        match self.layer(layer)? {
            LayerCache::Host { keys, values } => Ok((keys, values)),
            LayerCache::Device { .. } => Err(Error::Internal("the cache is not on the host".into())),
        }
    }

    /// Writes keys and values of the new tokens of `batch` from rows of `stride` elements, which hold the keys of all heads from `column`
    /// on, and then the values.
    ///
    /// The block tables must fit, as [`super::Decoder`] checks.
    pub(super) fn write_rows(&mut self, layer: usize, batch: &Batch, rows: &[f32], stride: usize, column: usize) -> Result<()> {
        let (block_tokens, kv_heads, head_dim) = (self.shape.block_tokens, self.kv_heads, self.head_dim);
        let width = kv_heads * head_dim;
        let Some(LayerCache::Host { keys, values }) = self.layers.get_mut(layer) else {
            return Err(Error::Internal(format!("the cache has no layer {layer} on the host")));
        };
        let mut rows = rows.chunks_exact(stride);
        for span in &batch.spans {
            let table = batch.table(span);
            for (position, row) in (span.past..span.past + span.new).zip(&mut rows) {
                let place = table[position / block_tokens] as usize * kv_heads * block_tokens + position % block_tokens;
                for (store, new) in [(&mut *keys, &row[column..column + width]), (&mut *values, &row[column + width..column + 2 * width])] {
                    for (head, new) in new.chunks_exact(head_dim).enumerate() {
                        let at = (place + head * block_tokens) * head_dim;
                        store[at..at + head_dim].copy_from_slice(new);
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes the keys and values `[T, kv_heads, head_dim]` of the new tokens of `batch` to their blocks.
    ///
    /// The block tables must fit, as [`super::Decoder`] checks.
    pub(super) fn write(&mut self, layer: usize, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        let (block_tokens, kv_heads, head_dim) = (self.shape.block_tokens, self.kv_heads, self.head_dim);
        // The first row of each token; those of its heads are `block_tokens` apart.
        let places = batch.spans.iter().flat_map(|span| {
            let table = batch.table(span);
            (span.past..span.past + span.new)
                .map(move |position| table[position / block_tokens] as usize * kv_heads * block_tokens + position % block_tokens)
        });
        let cache = self.layers.get_mut(layer).ok_or_else(|| Error::Internal(format!("the cache has no layer {layer}")))?;
        match cache {
            LayerCache::Host { keys, values } => {
                for (store, new) in [(keys, k), (values, v)] {
                    cpu_slice::<f32, _>(&new.contiguous()?, |new| {
                        for (token, place) in new.chunks_exact(kv_heads * head_dim).zip(places.clone()) {
                            for (head, row) in token.chunks_exact(head_dim).enumerate() {
                                let at = (place + head * block_tokens) * head_dim;
                                store[at..at + head_dim].copy_from_slice(row);
                            }
                        }
                        Ok(())
                    })?;
                }
            }
            LayerCache::Device { keys, values } => {
                let rows: Vec<u32> = places.flat_map(|place| (0..kv_heads).map(move |head| (place + head * block_tokens) as u32)).collect();
                let count = rows.len();
                let rows = Tensor::from_vec(rows, (count, 1), k.device())?.broadcast_as((count, head_dim))?.contiguous()?;
                for (store, new) in [(keys, k), (values, v)] {
                    store.scatter_set(&rows, &new.reshape((count, head_dim))?.to_dtype(store.dtype())?.contiguous()?, 0)?;
                }
            }
        }
        Ok(())
    }

    /// The first `tokens` rows of a sequence with this block table, `[tokens, kv_heads, head_dim]`, copied from `store`, a tensor of
    /// [`LayerCache::Device`].
    pub(super) fn gather(&self, store: &Tensor, table: &[u32], tokens: usize) -> Result<Tensor> {
        let CacheShape { block_tokens, num_blocks } = self.shape;
        let blocks = store.reshape((num_blocks, self.kv_heads, block_tokens, self.head_dim))?;
        let table = table.get(..self.shape.blocks_for(tokens)).unwrap_or(table);
        let picked = blocks.index_select(&Tensor::from_slice(table, table.len(), store.device())?, 0)?;
        let rows = picked.transpose(1, 2)?.reshape((table.len() * block_tokens, self.kv_heads, self.head_dim))?;
        Ok(rows.narrow(0, 0, tokens)?.contiguous()?)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::LogitRows, *};
    use crate::moe::policy::RoutingChoice;

    fn rows(tokens: usize, salt: usize) -> Tensor {
        let data: Vec<f32> = (0..tokens * 2 * 8).map(|i| (i * 7 + salt) as f32).collect();
        Tensor::from_vec(data, (tokens, 2, 8), &Device::Cpu).unwrap()
    }

    /// Both stores hold the same, in the same places, and the gathered rows are those that were written.
    #[test]
    fn host_and_device_agree() {
        let spec = super::super::tests::spec();
        let shape = CacheShape { block_tokens: 4, num_blocks: 6 };
        let mut host = KvCache::new(&spec, shape, DType::F32, &Device::Cpu).unwrap();
        let mut device = KvCache::new(&spec, shape, DType::F32, &Device::Cpu).unwrap().into_device_store();
        let mut batch = Batch::default();
        batch.push(&[5, 0], &[1; 7], 0, RoutingChoice::Native, LogitRows::None);
        batch.push(&[3], &[1; 2], 0, RoutingChoice::Native, LogitRows::None);
        let (k, v) = (rows(9, 1), rows(9, 1000));
        host.write(1, &batch, &k, &v).unwrap();
        device.write(1, &batch, &k, &v).unwrap();
        let (LayerCache::Host { keys, values }, LayerCache::Device { keys: dk, values: dv }) =
            (host.layer(1).unwrap(), device.layer(1).unwrap())
        else {
            panic!("the kinds of store")
        };
        assert_eq!(keys, &dk.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        assert_eq!(values, &dv.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        let whole = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(whole(&device.gather(dk, &[5, 0], 7).unwrap()), whole(&k.narrow(0, 0, 7).unwrap()));
        assert_eq!(whole(&device.gather(dv, &[3], 2).unwrap()), whole(&v.narrow(0, 7, 2).unwrap()));
    }

    #[test]
    fn impossible_sizes_are_errors() {
        let spec = super::super::tests::spec();
        for (block_tokens, num_blocks) in [(0, 1), (16, 0), (16, usize::MAX), (1 << 40, u32::MAX as usize)] {
            assert!(KvCache::new(&spec, CacheShape { block_tokens, num_blocks }, DType::F32, &Device::Cpu).is_err());
        }
    }
}
