use super::rms_norm;

/// Where the keys and values of a sequence are: `[blocks, kv_heads, block_tokens, head_dim]` through a table of blocks.
#[derive(Clone, Copy, Debug)]
pub struct Paged<'a> {
    /// Of all sequences.
    pub keys: &'a [f32],
    /// Of all sequences.
    pub values: &'a [f32],
    /// Blocks of this sequence, in order.
    pub table: &'a [u32],
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Heads of a token.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl Paged<'_> {
    /// First element of a head of the token at `position`.
    pub fn place(&self, position: usize, head: usize) -> usize {
        let block = self.table[position / self.block_tokens] as usize;
        ((block * self.kv_heads + head) * self.block_tokens + position % self.block_tokens) * self.head_dim
    }
}

/// Attention of one sequence: `q [new, heads, head_dim]`, the first of them at position `past`; a query sees `window` positions up to its own.
pub fn attend(q: &[f32], past: usize, cache: Paged<'_>, heads: usize, window: Option<usize>) -> Vec<f32> {
    let (hd, group) = (cache.head_dim, heads / cache.kv_heads);
    let row = |(row, q): (usize, &[f32])| {
        let (position, head) = (past + row / heads, row % heads / group);
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
        let places: Vec<usize> = (first..=position).map(|position| cache.place(position, head)).collect();
        let dot = |at: &usize| q.iter().zip(&cache.keys[*at..*at + hd]).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>();
        let scores: Vec<f64> = places.iter().map(|at| dot(at) / (hd as f64).sqrt()).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - top).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let mut out = vec![0f64; hd];
        for (at, weight) in places.iter().zip(weights) {
            out.iter_mut().zip(&cache.values[*at..*at + hd]).for_each(|(out, v)| *out += weight / sum * f64::from(*v));
        }
        out.into_iter().map(|x| x as f32).collect::<Vec<_>>()
    };
    q.chunks_exact(hd).enumerate().flat_map(row).collect()
}

/// What is done to the queries, or to the keys, of one token: `[heads, head_dim]`.
#[derive(Clone, Copy, Debug)]
pub struct Shaping<'a> {
    /// As long as the token.
    pub bias: Option<&'a [f32]>,
    /// RMSNorm in runs of as many elements as there are weights.
    pub norm: Option<&'a [f32]>,
    /// Of the norm.
    pub epsilon: f32,
    /// Largest size afterwards.
    pub clip: Option<f32>,
    /// `[head_dim / 2]`, and the scale of the rotated; `None`: they are not rotated.
    pub rope: Option<(&'a [f32], f32)>,
}

/// One token, shaped. Angles are made in f32, as everywhere; what is done with them in f64.
pub fn shape_token(x: &[f32], position: u32, with: Shaping<'_>) -> Vec<f32> {
    let mut x = x.to_vec();
    if let Some(bias) = with.bias {
        x.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
    }
    if let Some(weight) = with.norm {
        x = rms_norm(&x, weight, with.epsilon);
    }
    if let Some(limit) = with.clip {
        x.iter_mut().for_each(|x| *x = x.clamp(-limit, limit));
    }
    if let Some((frequencies, scale)) = with.rope {
        let half = frequencies.len();
        for head in x.chunks_exact_mut(2 * half) {
            for (i, frequency) in frequencies.iter().enumerate() {
                let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
                let (low, high) = (f64::from(head[i]), f64::from(head[i + half]));
                head[i] = ((low * cos - high * sin) * f64::from(scale)) as f32;
                head[i + half] = ((high * cos + low * sin) * f64::from(scale)) as f32;
            }
        }
    }
    x
}
