use std::{f32::consts::LOG2_E, ffi::c_void};

use super::{Cache, Heads};
use crate::{
    Error, Result, Stream, View, bf16,
    error::{check, expect_aligned, expect_len, int},
};

#[repr(C)]
struct Args {
    q: *const bf16,
    keys: *const bf16,
    values: *const bf16,
    table: *const u32,
    query_start: *const u32,
    past: *const u32,
    out: *mut bf16,
    workspace: *mut f32,
    scale: f32,
    tokens: i32,
    sequences: i32,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
    block_tokens: i32,
    table_stride: i32,
    window: i32,
    longest_new: i32,
    splits: i32,
}

unsafe extern "C" {
    fn hm_attend(args: *const Args, stream: *mut c_void) -> i32;
}

/// Softmax attention of the new tokens of a batch over what the cache holds of their sequences, themselves included.
///
/// The numbers of tokens and sequences are upper bounds (of a captured launch, say): what there is, the device says. Sequences without queries cost next to nothing;
/// rows of `out` that belong to no sequence stay what they are. A batch of long prompts *and* single tokens is better made in two launches,
/// each with a part of `query_start`, `past` and the table: one token does not fill the tile that a prompt wants.
///
/// What comes out for a sequence depends on that sequence, on `splits`, and on whether the longest of the launch fits the small tile (16 rows: tokens times heads
/// that share keys); otherwise not on who else is in the batch. A NaN of one sequence stays with it.
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    /// `[tokens, heads, head_dim]`.
    pub q: View<'a, bf16>,
    /// `[sequences + 1]`: where the queries of each sequence begin in `q`; the last is where they end. Never descending, at most `tokens`.
    pub query_start: View<'a, u32>,
    /// `[sequences]`: tokens of each sequence before its first query.
    pub past: View<'a, u32>,
    /// `[tokens, heads * head_dim]`.
    pub out: View<'a, bf16>,
    /// [`workspace_len`] elements.
    pub workspace: View<'a, f32>,
    /// Holds everything up to the last query of each sequence.
    pub cache: Cache<'a>,
    /// Of the layer.
    pub heads: Heads,
    /// A query sees as many positions, the last of which is its own; `None`: all.
    pub window: Option<usize>,
    /// Rows of `q`, at most.
    pub tokens: usize,
    /// Sequences, at most; up to 65,535.
    pub sequences: usize,
    /// Queries of the longest sequence, at most.
    pub longest_new: usize,
    /// Parts that the keys of a sequence are made in, of [`splits`].
    pub splits: usize,
}

const KERNEL: &str = "attend";
/// Rows of a tile for sequences of few rows and of the other, as `launch_width` in the source has them.
const FEW_ROWS: usize = 16;
const MANY_ROWS: usize = 128;
/// Blocks that a multiprocessor works on at once: shared memory and registers allow two or three.
const RESIDENT: usize = 2;
/// Keys that are worth a block.
const LEAST_KEYS: usize = 128;
/// Keys after which one block holds up all others.
const MOST_KEYS: usize = 4096;
const MAX_SPLITS: usize = 128;

/// Whether `new` queries of a sequence fit the small tile.
pub fn few(heads: Heads, new: usize) -> bool {
    new.max(1) * (heads.heads / heads.kv_heads.max(1)).max(1) <= FEW_ROWS
}

/// In how many parts to make the keys of each sequence: as many as fill the device, and, for single tokens, so many that one sequence of the longest
/// context does not run on alone for long; no more than the context is worth.
///
/// `sequences` of up to `longest_new` queries, of which the last of the longest sees `longest_context` keys. For a captured launch these are the numbers that it
/// has to serve; where they are much above those of a step, most blocks come up for nothing: better to capture for a few of them.
pub fn splits(heads: Heads, sequences: usize, longest_new: usize, longest_context: usize, multiprocessors: usize) -> usize {
    let rows = longest_new.max(1) * (heads.heads / heads.kv_heads.max(1)).max(1);
    let few = few(heads, longest_new);
    let blocks = (sequences.max(1) * heads.kv_heads.max(1)).saturating_mul(if few { 1 } else { rows.div_ceil(MANY_ROWS) });
    let slots = multiprocessors.max(1) * RESIDENT;
    let filling = slots / blocks;
    // Workspace and blocks without work stay within eight times what runs at once.
    let evening = if few { longest_context.div_ceil(MOST_KEYS).min(8 * slots / blocks) } else { 1 };
    filling.max(evening).min(longest_context / LEAST_KEYS).clamp(1, MAX_SPLITS)
}

/// Elements of [`Attend::workspace`]: none where there is one split.
pub fn workspace_len(heads: Heads, tokens: usize, splits: usize) -> usize {
    if splits <= 1 { 0 } else { tokens * heads.heads * splits * (heads.head_dim + 2) }
}

impl Attend<'_> {
    /// Launches it.
    pub fn launch(self, stream: Stream) -> Result<()> {
        let Self { q, query_start, past, out, workspace, cache, heads, tokens, sequences, longest_new, splits, .. } = self;
        if tokens == 0 || sequences == 0 || longest_new == 0 {
            return Ok(());
        }
        heads.check(KERNEL, tokens)?;
        cache.check(KERNEL, heads)?;
        expect_len(KERNEL, "q", q.len(), tokens * heads.width())?;
        expect_len(KERNEL, "out", out.len(), tokens * heads.width())?;
        expect_len(KERNEL, "query_start", query_start.len(), sequences + 1)?;
        expect_len(KERNEL, "past", past.len(), sequences)?;
        expect_len(KERNEL, "table", cache.table.len(), sequences * cache.table_stride)?;
        expect_len(KERNEL, "workspace", workspace.len(), workspace_len(heads, tokens, splits))?;
        expect_aligned(KERNEL, "q", q)?;
        expect_aligned(KERNEL, "out", out)?;
        if !(1..=MAX_SPLITS).contains(&splits) {
            return Err(Error::shape(KERNEL, format!("splits is {splits}; it has to be 1 to {MAX_SPLITS}")));
        }
        if self.window == Some(0) {
            return Err(Error::shape(KERNEL, "window is 0: a query sees itself at least"));
        }
        let args = Args {
            q: q.as_ptr(),
            keys: cache.keys.as_ptr(),
            values: cache.values.as_ptr(),
            table: cache.table.as_ptr(),
            query_start: query_start.as_ptr(),
            past: past.as_ptr(),
            out: out.as_mut_ptr(),
            workspace: workspace.as_mut_ptr(),
            scale: LOG2_E / (heads.head_dim as f32).sqrt(),
            tokens: int(KERNEL, "tokens", tokens)?,
            sequences: int(KERNEL, "sequences", sequences)?,
            heads: int(KERNEL, "heads", heads.heads)?,
            kv_heads: int(KERNEL, "kv_heads", heads.kv_heads)?,
            head_dim: int(KERNEL, "head_dim", heads.head_dim)?,
            block_tokens: int(KERNEL, "block_tokens", cache.block_tokens)?,
            table_stride: int(KERNEL, "table_stride", cache.table_stride)?,
            // Wider than any context is as good as none.
            window: self.window.and_then(|window| i32::try_from(window).ok()).unwrap_or(0),
            longest_new: int(KERNEL, "longest_new", longest_new.min(tokens))?,
            splits: int(KERNEL, "splits", splits)?,
        };
        // SAFETY: the views are as long as the shapes say; that lengths and table on the device keep to them is what their docs ask for.
        check(KERNEL, unsafe { hm_attend(&args, stream.raw()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QWEN3_MOE: Heads = Heads { heads: 32, kv_heads: 4, head_dim: 128 };

    #[test]
    fn splits_fill_the_device_and_no_more() {
        let of = |sequences, new, context| splits(QWEN3_MOE, sequences, new, context, 132);
        // One token: as many blocks as run at once, as long as each has something to do.
        assert_eq!((of(1, 1, 100), of(1, 1, 256), of(1, 1, 2048), of(1, 1, 131_072)), (1, 2, 16, 66));
        // Many of them fill the device by themselves...
        assert_eq!((of(66, 1, 4096), of(256, 1, 4096), of(1024, 1, 131_072)), (1, 1, 1));
        // ... but one long one must not be left to one block.
        assert_eq!((of(64, 1, 131_072), of(64, 1, 16_384)), (8, 4));
        // A chunk has enough rows, unless it is short and its past is long.
        assert_eq!((of(1, 2048, 4096), of(1, 64, 100_000), of(1, 64, 64)), (1, 16, 1));
    }

    #[test]
    fn splits_are_bounded() {
        for kv_heads in [1, 2, 8, 64] {
            for (sequences, new, context) in
                [(0, 0, 0), (1, 1, 1), (1, 1, usize::MAX), (1024, 1, 1 << 20), (7, 16_384, 1 << 20), (1, 3, 1 << 20)]
            {
                for multiprocessors in [0, 1, 4, 108, 144] {
                    let heads = Heads { heads: kv_heads * 8, kv_heads, head_dim: 64 };
                    let splits = splits(heads, sequences, new, context, multiprocessors);
                    assert!((1..=MAX_SPLITS).contains(&splits));
                    assert!(splits == 1 || splits * LEAST_KEYS <= context);
                    assert!(splits == 1 || splits * sequences * kv_heads <= 8 * RESIDENT * multiprocessors.max(1));
                }
            }
        }
    }

    #[test]
    fn workspaces_are_for_splits() {
        assert_eq!((workspace_len(QWEN3_MOE, 64, 1), workspace_len(QWEN3_MOE, 64, 3)), (0, 64 * 32 * 3 * 130));
    }
}
