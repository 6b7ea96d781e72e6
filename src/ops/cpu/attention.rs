//! Causal attention of ragged queries over cached keys and values.
//!
//! Each (token, head) is computed alone and walks its keys in order of position: a result does not depend on the
//! batch, nor on how a prompt was cut into chunks.

use std::ops::Range;

use rayon::prelude::*;

/// Sizes that all sequences share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionShape {
    /// Query heads, H.
    pub(crate) heads: usize,
    /// Key and value heads, a divisor of H.
    pub(crate) kv_heads: usize,
    /// Width of a head.
    pub(crate) head_dim: usize,
    /// Positions that a query sees, itself included.
    pub(crate) window: Option<usize>,
}

/// Keys and values of one sequence, new ones included.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeyValue<'a> {
    /// Position of the first new token.
    pub(crate) past: usize,
    /// New tokens.
    pub(crate) new: usize,
    /// Rows as `layout` says.
    pub(crate) keys: &'a [f32],
    /// Rows as `layout` says.
    pub(crate) values: &'a [f32],
    /// Where its rows are.
    pub(crate) layout: KeyLayout<'a>,
}

/// Where the row of a position and a head is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum KeyLayout<'a> {
    /// `[past + new, kv_heads, head_dim]`.
    Flat,
    /// `[num_blocks, kv_heads, block_tokens, head_dim]`: position p is row `p % block_tokens` of block `table[p / block_tokens]`.
    Paged { table: &'a [u32], block_tokens: usize },
}

impl KeyLayout<'_> {
    /// The rows of `positions` of one head, as runs of (first element, elements from row to row, rows), in order.
    fn runs(self, positions: Range<usize>, kv_head: usize, shape: AttentionShape) -> impl Iterator<Item = (usize, usize, usize)> {
        let AttentionShape { kv_heads, head_dim, .. } = shape;
        // A flat sequence is one block that never ends.
        let (block_tokens, stride) = match self {
            Self::Flat => (usize::MAX, kv_heads * head_dim),
            Self::Paged { block_tokens, .. } => (block_tokens, head_dim),
        };
        (positions.start / block_tokens..positions.end.div_ceil(block_tokens)).map(move |block| {
            let first = block * block_tokens;
            let (from, to) = (positions.start.max(first), positions.end.min(first.saturating_add(block_tokens)));
            let base = match self {
                Self::Flat => kv_head * head_dim,
                Self::Paged { table, .. } => (table[block] as usize * kv_heads + kv_head) * block_tokens * head_dim,
            };
            (base + (from - first) * stride, stride, to - from)
        })
    }
}

/// `q [T, H, hd]`, T the new tokens of all sequences in order: `[T, H, hd]`.
pub(crate) fn attention(q: &[f32], sequences: &[KeyValue<'_>], shape: AttentionShape) -> Vec<f32> {
    let row = shape.heads * shape.head_dim;
    let owners: Vec<(usize, usize)> =
        sequences.iter().enumerate().flat_map(|(s, sequence)| (0..sequence.new).map(move |i| (s, sequence.past + i))).collect();
    let mut out = vec![0f32; q.len()];
    out.par_chunks_mut(row).zip(q.par_chunks(row)).zip(&owners).for_each_init(Vec::new, |scores, ((out, q), &(sequence, position))| {
        for head in 0..shape.heads {
            let span = head * shape.head_dim..(head + 1) * shape.head_dim;
            one_head(&q[span.clone()], &mut out[span], &sequences[sequence], head, position, shape, scores);
        }
    });
    out
}

fn one_head(
    q: &[f32],
    out: &mut [f32],
    sequence: &KeyValue<'_>,
    head: usize,
    position: usize,
    shape: AttentionShape,
    scores: &mut Vec<f32>,
) {
    let first = shape.window.map_or(0, |window| (position + 1).saturating_sub(window));
    let kv_head = head / (shape.heads / shape.kv_heads);
    let rows = || {
        let runs = sequence.layout.runs(first..position + 1, kv_head, shape);
        runs.flat_map(|(start, stride, rows)| (0..rows).map(move |row| start + row * stride..start + row * stride + shape.head_dim))
    };
    let scale = 1.0 / (shape.head_dim as f32).sqrt();

    scores.clear();
    scores.extend(rows().map(|row| dot(q, &sequence.keys[row]) * scale));
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0f32;
    scores.iter_mut().for_each(|s| {
        *s = (*s - max).exp();
        sum += *s;
    });
    for (row, weight) in rows().zip(scores.iter()) {
        let weight = weight / sum;
        out.iter_mut().zip(&sequence.values[row]).for_each(|(out, v)| *out += weight * v);
    }
}

/// Eight partial sums, which the compiler turns into vector lanes; then the tail.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a8.zip(b8) {
        for i in 0..8 {
            lanes[i] += a[i] * b[i];
        }
    }
    lanes.iter().sum::<f32>() + tail
}
