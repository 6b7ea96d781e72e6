//! The flags of the cache of keys and values, and its size where they say nothing.

use std::num::NonZeroUsize;

use clap::{
    Args,
    builder::{TypedValueParser, ValueParser},
};

use crate::{
    engine::{EngineConfig, PrefixCache},
    error::Result,
    memory,
    model::{
        CacheShape,
        kv_cache::KvCache,
        load::{DeviceKind, ServingModel},
    },
};

/// Most bytes that the cache takes unless it is told to.
const MOST_BYTES: u64 = 4 << 30;

/// Memory of a machine that does not say how much it has.
const ASSUMED_MEMORY: u64 = 4 << 30;

/// The cache of keys and values.
#[derive(Args, Clone, Copy, Debug)]
pub struct CacheArgs {
    /// Tokens whose keys and values are kept, over all requests. Default: --max-batch-requests full contexts, but at most
    /// 4 GiB and a fourth of the memory of the machine or cgroup; one full context may take half of it. On a GPU at most 65 % of
    /// the memory that is free when the weights are loaded. A request that
    /// could not fit alone is refused with OUT_OF_RANGE. Beside it MeasureFidelity takes up to a fourth as much while it runs, and
    /// shadow samples keep room for twice --shadow-max-tokens.
    #[arg(long, env = "HARDMAX_KV_CACHE_TOKENS", value_name = "N")]
    pub kv_cache_tokens: Option<NonZeroUsize>,
    /// Tokens of a block of the cache, a power of two from 8 to 256. Blocks are given out and shared as a whole.
    #[arg(long, env = "HARDMAX_BLOCK_TOKENS", value_name = "N", default_value = "16", value_parser = block_tokens())]
    pub block_tokens: usize,
    /// Whether a prompt that begins as an earlier one did, under the same routing, takes over what was computed for it.
    #[arg(long, env = "HARDMAX_PREFIX_CACHE", value_name = "on|off", value_enum, default_value = "on")]
    pub prefix_cache: PrefixCache,
}

fn block_tokens() -> ValueParser {
    let power = |tokens: u64| if tokens.is_power_of_two() { Ok(tokens as usize) } else { Err("not a power of two") };
    clap::value_parser!(u64).range(8..=256).try_map(power).into()
}

impl CacheArgs {
    /// The blocks for `model`. Fails only where there are more than can be numbered.
    pub(super) fn shape(&self, model: &ServingModel, engine: &EngineConfig) -> Result<CacheShape> {
        let spec = model.spec();
        let bytes = KvCache::token_bytes(spec, model.cache_dtype()) as u64;
        let tokens = match self.kv_cache_tokens {
            Some(tokens) => tokens.get(),
            None if model.device() == DeviceKind::Cuda => default_on_gpu(spec.max_context, engine.max_batch_requests, bytes)?,
            None => default_tokens(spec.max_context, engine.max_batch_requests, bytes, memory::limit().unwrap_or(ASSUMED_MEMORY)),
        };
        let num_blocks = tokens.div_ceil(self.block_tokens).min(u32::MAX as usize);
        Ok(CacheShape { block_tokens: self.block_tokens, num_blocks })
    }
}

/// Full contexts for a whole batch, as far as the memory goes that is free when the weights are there.
#[cfg(feature = "gpu")]
fn default_on_gpu(context: usize, batch: usize, token_bytes: u64) -> Result<usize> {
    Ok(tokens_on_gpu(context, batch, token_bytes, crate::model::gpu::free_memory()?))
}

/// There is no GPU in this build, and so no model on one.
#[cfg(not(feature = "gpu"))]
fn default_on_gpu(context: usize, batch: usize, token_bytes: u64) -> Result<usize> {
    Ok(tokens_on_gpu(context, batch, token_bytes, 0))
}

/// What is left is for the values of steps, and for the caches of measurements.
fn tokens_on_gpu(context: usize, batch: usize, token_bytes: u64, free: u64) -> usize {
    let fit = usize::try_from(free / 20 * 13 / token_bytes.max(1)).unwrap_or(usize::MAX);
    context.saturating_mul(batch).min(fit).max(1)
}

/// Full contexts for a whole batch, as far as memory goes.
fn default_tokens(context: usize, batch: usize, token_bytes: u64, memory: u64) -> usize {
    let fit = |bytes: u64| usize::try_from(bytes / token_bytes.max(1)).unwrap_or(usize::MAX);
    let most = fit(MOST_BYTES.min(memory / 4)).max(context.min(fit(memory / 2)));
    context.saturating_mul(batch).min(most).max(1)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        cache: CacheArgs,
    }

    fn parse(flags: &[&str]) -> Option<CacheArgs> {
        Line::try_parse_from(std::iter::once("serve").chain(flags.iter().copied())).ok().map(|line| line.cache)
    }

    #[test]
    fn blocks_are_powers_of_two() {
        assert_eq!(parse(&[]).unwrap().block_tokens, 16);
        for (tokens, good) in [("8", true), ("256", true), ("4", false), ("24", false), ("512", false), ("x", false)] {
            assert_eq!(parse(&["--block-tokens", tokens]).is_some(), good, "{tokens}");
        }
        assert_eq!(parse(&["--prefix-cache", "off"]).unwrap().prefix_cache, PrefixCache::Off);
        assert!(parse(&["--kv-cache-tokens", "0"]).is_none());
    }

    #[test]
    fn the_default_is_a_batch_of_contexts_within_memory() {
        const GIB: u64 = 1 << 30;
        assert_eq!(default_tokens(1000, 16, 1 << 10, 64 * GIB), 16_000);
        assert_eq!(default_tokens(1 << 17, 256, 1 << 10, 64 * GIB), 4 << 20, "4 GiB");
        assert_eq!(default_tokens(1 << 17, 256, 1 << 10, 4 * GIB), 1 << 20, "a fourth");
        assert_eq!(default_tokens(1 << 17, 256, 1 << 14, 4 * GIB), 1 << 17, "one context");
        assert_eq!(default_tokens(1 << 20, 256, 1 << 14, 4 * GIB), 1 << 17, "half a context, which is half of the memory");
        assert_eq!(default_tokens(1 << 20, 1, u64::MAX, GIB), 1);
        assert_eq!(tokens_on_gpu(1000, 16, 1 << 10, 64 * GIB), 16_000);
        assert_eq!(tokens_on_gpu(1 << 17, 256, 1 << 16, 100 * GIB), 65 * (1 << 14), "65 GiB");
        assert_eq!(tokens_on_gpu(10, 10, 1 << 10, 0), 1);
    }
}
