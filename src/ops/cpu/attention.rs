//! Causal attention of ragged queries over cached keys and values.
//!
//! Each (token, head) is computed alone and walks its keys in order of position: a result does not depend on the
//! batch, nor on how a prompt was cut into chunks.

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
    /// `[past + new, kv_heads, head_dim]`.
    pub(crate) keys: &'a [f32],
    /// `[past + new, kv_heads, head_dim]`.
    pub(crate) values: &'a [f32],
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
    let stride = shape.kv_heads * shape.head_dim;
    let at = |position: usize| position * stride + kv_head * shape.head_dim..position * stride + (kv_head + 1) * shape.head_dim;
    let scale = 1.0 / (shape.head_dim as f32).sqrt();

    scores.clear();
    scores.extend((first..=position).map(|p| dot(q, &sequence.keys[at(p)]) * scale));
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0f32;
    scores.iter_mut().for_each(|s| {
        *s = (*s - max).exp();
        sum += *s;
    });
    for (p, weight) in (first..=position).zip(scores.iter()) {
        let weight = weight / sum;
        out.iter_mut().zip(&sequence.values[at(p)]).for_each(|(out, v)| *out += weight * v);
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
