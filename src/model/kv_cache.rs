//! Keys and values of the sequences that the engine works on: one growing buffer per slot and layer.

use std::collections::HashMap;

use candle_core::Tensor;

use crate::error::{Error, Result};

/// Rows that a fresh buffer has room for.
const FIRST_CAPACITY: usize = 64;

/// Cached keys and values by slot.
#[derive(Debug, Default)]
pub struct KvCache {
    /// Per slot, one entry for each layer that has been written.
    slots: HashMap<usize, Vec<LayerCache>>,
}

/// Keys and values of one sequence in one layer, `[capacity, kv_heads, head_dim]`.
#[derive(Debug)]
struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

impl KvCache {
    /// Forgets what `slot` holds.
    pub fn release(&mut self, slot: usize) {
        self.slots.remove(&slot);
    }

    /// Slots that hold something.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// No slot holds anything.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Writes new keys and values `[new, kv_heads, head_dim]` after `past` rows, and returns all `past + new` rows.
    ///
    /// `limit` is the longest sequence. Layers must be written in order.
    pub fn append(
        &mut self,
        slot: usize,
        layer: usize,
        past: usize,
        keys: &Tensor,
        values: &Tensor,
        limit: usize,
    ) -> Result<(Tensor, Tensor)> {
        let new = keys.dim(0)?;
        let needed = past + new;
        let layers = self.slots.entry(slot).or_default();
        if past == 0 && layer == 0 {
            layers.clear();
        }
        if layer == layers.len() && past == 0 {
            let capacity = needed.next_power_of_two().max(FIRST_CAPACITY).min(limit.max(needed));
            layers.push(LayerCache { keys: grown(keys, 0, capacity)?, values: grown(values, 0, capacity)? });
        }
        let Some(cache) = layers.get_mut(layer) else {
            return Err(Error::Internal(format!("slot {slot} has no cache for layer {layer} at position {past}")));
        };
        if cache.keys.dim(0)? < needed {
            let capacity = needed.next_power_of_two().min(limit.max(needed));
            cache.keys = grown(&cache.keys, past, capacity)?;
            cache.values = grown(&cache.values, past, capacity)?;
        }
        cache.keys.slice_set(&keys.contiguous()?, 0, past)?;
        cache.values.slice_set(&values.contiguous()?, 0, past)?;
        Ok((cache.keys.narrow(0, 0, needed)?, cache.values.narrow(0, 0, needed)?))
    }
}

/// A zeroed buffer of `capacity` rows shaped as those of `rows`, with the first `keep` of them.
fn grown(rows: &Tensor, keep: usize, capacity: usize) -> Result<Tensor> {
    let (_, heads, width) = rows.dims3()?;
    let buffer = Tensor::zeros((capacity, heads, width), rows.dtype(), rows.device())?;
    if keep > 0 {
        buffer.slice_set(&rows.narrow(0, 0, keep)?.contiguous()?, 0, 0)?;
    }
    Ok(buffer)
}
