//! Causal attention of ragged queries over cached keys and values, where they lie.
//!
//! Lanes are queries: up to 48 (token, head) pairs that share a key-value head are worked on at once, and keys and values are read
//! one element at a time, spread over the lanes, as in [`super::panel`]. Softmax runs on line, in chunks of positions that start at
//! multiples of [`CHUNK`], and every sum runs in order of position: what a query gets does not depend on the other queries, nor on
//! how a prompt was cut, nor on the blocks of the cache. Where the caller allows bf16 and the CPU has AMX, sequences with many new
//! tokens go over [`tiles`]; there the form, and so the last bits, depends on how many tokens of a prompt come at once.

#[cfg(target_arch = "x86_64")]
mod tiles;

use std::{cell::RefCell, ops::Range};

use super::{
    exp::exp,
    matmul::parallel,
    matrix::prefetch,
    pack::{BLOCK, Line},
    panel::{self, MAX_BLOCKS, MAX_ROWS},
    simd::{Bf16Unit, Isa, Portable, Simd},
    sink::Disjoint,
};

/// Positions whose scores are held at once.
const CHUNK: usize = 64;

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

/// `q [T, H, hd]`, T the new tokens of all sequences in order: `[T, H, hd]` into `out`.
///
/// `bf16`: what may multiply many queries, rounded to bf16; [`Bf16Unit::None`] keeps all in f32.
pub(crate) fn attention(isa: Isa, bf16: Bf16Unit, q: &[f32], sequences: &[KeyValue<'_>], shape: AttentionShape, out: &mut [f32]) {
    let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
    let tokens: usize = sequences.iter().map(|sequence| sequence.new).sum();
    assert!(
        q.len() == tokens * heads * head_dim && out.len() == q.len() && heads.is_multiple_of(kv_heads),
        "attention of other sizes: this is a bug"
    );
    assert!(isa.is_available(), "this CPU has no {isa:?}");
    let out = Disjoint::new(out);
    let queries = |sequence: &KeyValue<'_>| sequence.new * (heads / kv_heads);
    let form = |sequence: &KeyValue<'_>| Form::of(isa, bf16, queries(sequence));
    let groups = |sequence: &KeyValue<'_>| queries(sequence).div_ceil(form(sequence).lanes());
    let count = sequences.iter().map(|sequence| groups(sequence) * kv_heads).sum();
    parallel(count, |index| {
        // Late queries see more keys: the largest tasks first.
        let (mut rest, mut first_token) = (count - 1 - index, 0);
        for sequence in sequences {
            let mine = groups(sequence) * kv_heads;
            if rest >= mine {
                rest -= mine;
                first_token += sequence.new;
                continue;
            }
            let (group, kv_head, form) = (rest / kv_heads, rest % kv_heads, form(sequence));
            let queries = group * form.lanes()..queries(sequence).min((group + 1) * form.lanes());
            form.run(&Task { q, out: &out, sequence, shape, kv_head, first_token, queries });
            return;
        }
    });
}

/// How the queries of a sequence are worked.
#[derive(Clone, Copy, Debug)]
enum Form {
    /// In f32.
    Plain(Isa),
    /// In bf16; in f32 over these instructions where a value is not finite.
    #[cfg(target_arch = "x86_64")]
    Tiles(Isa),
}

impl Form {
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    fn of(isa: Isa, bf16: Bf16Unit, queries: usize) -> Self {
        #[cfg(target_arch = "x86_64")]
        if bf16 == Bf16Unit::Amx && queries >= tiles::MIN_LANES {
            return Self::Tiles(isa);
        }
        Self::Plain(isa)
    }

    /// Queries of a task.
    fn lanes(self) -> usize {
        match self {
            Self::Plain(isa) => BLOCK * if isa_lanes(isa) == BLOCK { MAX_BLOCKS } else { 1 },
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(_) => tiles::LANES,
        }
    }

    fn run(self, task: &Task<'_>) {
        match self {
            // SAFETY: `attention` has seen that the CPU has it; so below.
            #[cfg(target_arch = "x86_64")]
            Self::Plain(Isa::Avx512) => unsafe { run_avx512(task) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Plain(Isa::Avx2) => unsafe { run_avx2(task) },
            // SAFETY: Portable needs nothing.
            Self::Plain(Isa::Portable) => unsafe { run::<Portable>(task) },
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(isa) => {
                if !tiles::run(task) {
                    let plain = Self::Plain(isa);
                    for start in task.queries.clone().step_by(plain.lanes()) {
                        plain.run(&Task { queries: start..task.queries.end.min(start + plain.lanes()), ..*task });
                    }
                }
            }
        }
    }
}

fn isa_lanes(isa: Isa) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => 16,
        _ => 8,
    }
}

/// Queries of one sequence that share a key-value head.
struct Task<'a> {
    q: &'a [f32],
    out: &'a Disjoint<'a, f32>,
    sequence: &'a KeyValue<'a>,
    shape: AttentionShape,
    kv_head: usize,
    /// First new token of the sequence in `q`.
    first_token: usize,
    /// Token by token, and within a token head by head.
    queries: Range<usize>,
}

impl Task<'_> {
    /// The token of a query, counted from the first new one.
    fn token(&self, query: usize) -> usize {
        query / self.group()
    }

    /// Query heads of a key-value head.
    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    /// Where the elements of a query are.
    fn elements(&self, query: usize) -> Range<usize> {
        let head = self.kv_head * self.group() + query % self.group();
        let start = ((self.first_token + self.token(query)) * self.shape.heads + head) * self.shape.head_dim;
        start..start + self.shape.head_dim
    }
}

/// Rows of keys or values at equal distances.
#[derive(Clone, Copy, Debug, Default)]
struct Run {
    /// First element.
    first: usize,
    /// Elements from row to row.
    stride: usize,
    rows: usize,
}

/// Buffers of a task, by block of lanes.
#[derive(Default)]
struct Buffers {
    /// `[blocks][head_dim]`, scaled.
    queries: Vec<Line>,
    /// `[blocks][CHUNK]`.
    scores: Vec<Line>,
    /// `[blocks][head_dim]`.
    sums: Vec<Line>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn run_avx512(task: &Task<'_>) {
    // SAFETY: the target features are enabled here.
    unsafe { run::<super::simd::x86::Avx512>(task) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2(task: &Task<'_>) {
    // SAFETY: the target features are enabled here.
    unsafe { run::<super::simd::x86::Avx2>(task) }
}

/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn run<S: Simd>(task: &Task<'_>) {
    let (shape, sequence) = (task.shape, task.sequence);
    let hd = shape.head_dim;
    let blocks = task.queries.len().div_ceil(BLOCK);
    let mut buffers = BUFFERS.take();
    for (buffer, lines) in [(&mut buffers.queries, hd), (&mut buffers.scores, CHUNK), (&mut buffers.sums, hd)] {
        buffer.clear();
        buffer.resize(blocks * lines, Line::ZERO);
    }
    let Buffers { queries, scores, sums } = &mut buffers;
    // Lanes without a query see the past, and nobody sees them.
    let mut positions = [[sequence.past; BLOCK]; MAX_BLOCKS];
    let scale = 1.0 / (hd as f32).sqrt();
    for (lane, query) in task.queries.clone().enumerate() {
        positions[lane / BLOCK][lane % BLOCK] = sequence.past + task.token(query);
        let elements = &task.q[task.elements(query)];
        for (line, element) in queries[lane / BLOCK * hd..].iter_mut().zip(elements) {
            line.0[lane % BLOCK] = element * scale;
        }
    }
    let (oldest, newest) = (sequence.past + task.token(task.queries.start), sequence.past + task.token(task.queries.end - 1));
    let seen_from = |position: usize| shape.window.map_or(0, |window| (position + 1).saturating_sub(window));
    let mut largest = [Line([f32::NEG_INFINITY; BLOCK]); MAX_BLOCKS];
    let mut totals = [Line::ZERO; MAX_BLOCKS];

    let mut start = seen_from(oldest) / CHUNK * CHUNK;
    while start <= newest {
        let end = (newest + 1).min(start + CHUNK);
        // Scores of all lanes with the keys of this chunk.
        let mut row = 0;
        let mut runs = [Run::default(); CHUNK];
        let mut run_count = 0;
        for (first, stride, rows) in sequence.layout.runs(start..end, task.kv_head, shape) {
            runs[run_count] = Run { first, stride, rows };
            run_count += 1;
        }
        let runs = &runs[..run_count];
        for &Run { first, stride, rows: count } in runs {
            for tile in (0..count).step_by(MAX_ROWS / (BLOCK / S::LANES)) {
                let rows = (count - tile).min(MAX_ROWS / (BLOCK / S::LANES));
                // Values are read in strips across rows, which no hardware foresees: asked for here.
                for row in 0..rows {
                    let from = first + (tile + row) * stride;
                    (0..hd).step_by(BLOCK).for_each(|at| prefetch(sequence.values.as_ptr().wrapping_add(from + at)));
                }
                let w: [*const f32; MAX_ROWS] =
                    std::array::from_fn(|r| sequence.keys[first + (tile + r.min(rows - 1)) * stride..][..hd].as_ptr());
                let inputs: [*const f32; MAX_BLOCKS] =
                    std::array::from_fn(|b| queries[b.min(blocks - 1) * hd..][..hd].as_ptr().cast::<f32>());
                let mut products = [[Line::ZERO; MAX_BLOCKS]; MAX_ROWS];
                // SAFETY: the CPU has `S`; rows have hd elements, and the lines hd of them.
                unsafe { panel::products::<S>(w, &inputs[..blocks], hd, &mut products) };
                for b in 0..blocks {
                    for r in 0..rows {
                        scores[b * CHUNK + row + r] = products[r][b];
                    }
                }
                row += rows;
            }
        }
        // Where a lane must not look.
        let masked = end > oldest + 1 || start < seen_from(newest);
        if masked {
            for b in 0..blocks {
                let last = positions[b].map(|position| position as u32);
                let first = positions[b].map(|position| seen_from(position) as u32);
                for (line, position) in scores[b * CHUNK..b * CHUNK + row].iter_mut().zip(start as u32..) {
                    for lane in 0..BLOCK {
                        let hidden = (position > last[lane]) | (position < first[lane]);
                        line.0[lane] = if hidden { f32::NEG_INFINITY } else { line.0[lane] };
                    }
                }
            }
        }
        for b in 0..blocks {
            let scale = soften(&mut scores[b * CHUNK..b * CHUNK + row], &mut largest[b], &mut totals[b]);
            for line in &mut sums[b * hd..(b + 1) * hd] {
                for lane in 0..BLOCK {
                    line.0[lane] *= scale.0[lane];
                }
            }
        }
        // Values of this chunk, added in order of position.
        let values = |run: &Run| &sequence.values[run.first..run.first + (run.rows - 1) * run.stride + hd];
        if masked && !runs.iter().all(|run| all_finite(values(run))) {
            let mut row = 0;
            for &Run { first, stride, rows } in runs {
                for i in 0..rows {
                    // SAFETY: the CPU has `S`; a row of hd elements, and a line of scores for each block.
                    unsafe { add_seen::<S>(&sequence.values[first + i * stride..][..hd], &scores[row..], sums, hd, blocks) };
                    row += 1;
                }
            }
        } else {
            runs.iter().for_each(|run| assert!(values(run).len() >= hd));
            // SAFETY: the CPU has `S`; runs lie within the values, and scores have as many lines as the runs have rows.
            unsafe { add_values::<S>(sequence.values, runs, scores, sums, hd, blocks) };
        }
        start += CHUNK;
    }

    for (lane, query) in task.queries.clone().enumerate() {
        let (block, lane) = (lane / BLOCK, lane % BLOCK);
        let inverse = 1.0 / totals[block].0[lane];
        // SAFETY: each query has its own elements.
        let out = unsafe { task.out.slice(task.elements(query)) };
        for (to, line) in out.iter_mut().zip(&sums[block * hd..]) {
            *to = line.0[lane] * inverse;
        }
    }
    BUFFERS.set(buffers);
}

/// Scores to weights `exp(score - largest)`, 0 where the score is -∞; the factor for what was summed under the old `largest`.
#[inline(always)]
fn soften(scores: &mut [Line], largest: &mut Line, total: &mut Line) -> Line {
    let mut max = *largest;
    for line in scores.iter() {
        for lane in 0..BLOCK {
            max.0[lane] = if line.0[lane] > max.0[lane] { line.0[lane] } else { max.0[lane] };
        }
    }
    let mut factor = Line::ZERO;
    // A lane that has seen nothing yet has no largest score.
    let mut shift = max;
    for lane in 0..BLOCK {
        shift.0[lane] = if max.0[lane] == f32::NEG_INFINITY { 0.0 } else { max.0[lane] };
        factor.0[lane] = if largest.0[lane] == f32::NEG_INFINITY { 0.0 } else { exp(largest.0[lane] - shift.0[lane]) };
    }
    let mut sum = Line::ZERO;
    for line in scores {
        for lane in 0..BLOCK {
            let score = line.0[lane];
            let weight = if score == f32::NEG_INFINITY { 0.0 } else { exp(score - shift.0[lane]) };
            line.0[lane] = weight;
            sum.0[lane] += weight;
        }
    }
    for lane in 0..BLOCK {
        total.0[lane] = total.0[lane] * factor.0[lane] + sum.0[lane];
    }
    *largest = max;
    factor
}

/// Whether all are numbers.
#[inline(always)]
fn all_finite(values: &[f32]) -> bool {
    const INFINITY: u32 = 0x7F80_0000;
    values.iter().fold(0, |largest, value| largest.max(value.to_bits() & 0x7FFF_FFFF)) < INFINITY
}

/// [`add_values`] of one row, where some are not finite and some lanes must not see them: 0 times such a value is not 0. A row that is
/// not finite makes NaN of the lanes that see it, and is nothing to the others.
///
/// # Safety
/// The CPU has `S`; `row` has `hd` elements, scores a line for each block.
#[inline(always)]
unsafe fn add_seen<S: Simd>(row: &[f32], scores: &[Line], sums: &mut [Line], hd: usize, blocks: usize) {
    if all_finite(row) {
        // SAFETY: the caller's contract.
        unsafe { add_values::<S>(row, &[Run { first: 0, stride: hd, rows: 1 }], scores, sums, hd, blocks) };
        return;
    }
    for (b, lane) in (0..blocks).flat_map(|b| (0..BLOCK).map(move |lane| (b, lane))) {
        if scores[b * CHUNK].0[lane] != 0.0 {
            sums[b * hd..(b + 1) * hd].iter_mut().for_each(|line| line.0[lane] = f32::NAN);
        }
    }
}

/// `sums[b][d] += Σ_row values[row][d] · scores[b][row]`, in order of the rows of `runs`.
///
/// # Safety
/// The CPU has `S`; runs of rows of `hd` elements lie within `values`; scores of each block, [`CHUNK`] apart, have as many lines.
#[inline(always)]
unsafe fn add_values<S: Simd>(values: &[f32], runs: &[Run], scores: &[Line], sums: &mut [Line], hd: usize, blocks: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        if S::LANES == BLOCK {
            match blocks {
                3 => value_tiles::<S, 8, 3>(values, runs, scores, sums, hd),
                2 => value_tiles::<S, 8, 2>(values, runs, scores, sums, hd),
                _ => value_tiles::<S, 8, 1>(values, runs, scores, sums, hd),
            }
        } else {
            value_tiles::<S, 4, 2>(values, runs, scores, sums, hd);
        }
    }
}

/// # Safety
/// As [`add_values`], for `V · LANES / 16` blocks.
#[inline(always)]
unsafe fn value_tiles<S: Simd, const R: usize, const V: usize>(
    values: &[f32],
    runs: &[Run],
    scores: &[Line],
    sums: &mut [Line],
    hd: usize,
) {
    let halves = BLOCK / S::LANES;
    let mut d = 0;
    while d < hd {
        // Rows beyond the last repeat it: loaded before any is stored, they all store the same.
        let row = |r: usize| (d + r).min(hd - 1);
        // SAFETY: indices stay within the slices, by the caller's contract.
        unsafe {
            let mut tile = [[S::zero(); V]; R];
            for r in 0..R {
                for v in 0..V {
                    tile[r][v] = S::load(sums.as_ptr().add(v / halves * hd + row(r)).cast::<f32>().add(v % halves * S::LANES));
                }
            }
            let mut line = scores.as_ptr();
            for run in runs {
                let mut value = values.as_ptr().add(run.first);
                for _ in 0..run.rows {
                    let mut weights = [S::zero(); V];
                    for v in 0..V {
                        weights[v] = S::load(line.add(v / halves * CHUNK).cast::<f32>().add(v % halves * S::LANES));
                    }
                    for r in 0..R {
                        let value = S::splat(*value.add(row(r)));
                        for v in 0..V {
                            tile[r][v] = S::mul_add(value, weights[v], tile[r][v]);
                        }
                    }
                    line = line.add(1);
                    value = value.wrapping_add(run.stride);
                }
            }
            for r in 0..R {
                for v in 0..V {
                    S::store(tile[r][v], sums.as_mut_ptr().add(v / halves * hd + row(r)).cast::<f32>().add(v % halves * S::LANES));
                }
            }
        }
        d += R;
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    fn isas() -> Vec<Isa> {
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
        let mut isas = vec![Isa::Portable, Isa::detect()];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            isas.push(Isa::Avx2);
        }
        isas
    }

    /// In f32 on every instruction set, and in bf16 where the CPU has it.
    fn forms() -> Vec<(Isa, Bf16Unit)> {
        let mut forms: Vec<_> = isas().into_iter().map(|isa| (isa, Bf16Unit::None)).collect();
        if Bf16Unit::detect() != Bf16Unit::None {
            forms.push((Isa::detect(), Bf16Unit::detect()));
        }
        forms
    }

    fn random(count: usize, rng: &mut StdRng) -> Vec<f32> {
        (0..count).map(|_| rng.random_range(-2.0..2.0)).collect()
    }

    /// In f64, one query at a time. Keys and values `[tokens, kv_heads, head_dim]`.
    fn plain(q: &[f32], keys: &[f32], values: &[f32], past: usize, shape: AttentionShape) -> Vec<f64> {
        let AttentionShape { heads, kv_heads, head_dim: hd, window } = shape;
        let mut out = vec![0f64; q.len()];
        for (index, (q, out)) in q.chunks_exact(hd).zip(out.chunks_exact_mut(hd)).enumerate() {
            let (position, kv_head) = (past + index / heads, index % heads / (heads / kv_heads));
            let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
            let row = |p: usize| (p * kv_heads + kv_head) * hd..(p * kv_heads + kv_head + 1) * hd;
            let dot = |p: usize| keys[row(p)].iter().zip(q).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum::<f64>() / (hd as f64).sqrt();
            let scores: Vec<f64> = (first..=position).map(dot).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            for (p, score) in (first..=position).zip(&scores) {
                out.iter_mut().zip(&values[row(p)]).for_each(|(out, v)| *out += (score - max).exp() / total * f64::from(*v));
            }
        }
        out
    }

    /// Spreads flat rows over blocks of a cache; its table.
    fn paged(flat: &[f32], block_tokens: usize, shape: AttentionShape, seed: u64) -> (Vec<f32>, Vec<u32>) {
        let row = shape.kv_heads * shape.head_dim;
        let count = (flat.len() / row).div_ceil(block_tokens);
        let table: Vec<u32> = (0..count as u64).map(|b| ((b * 5 + seed) % (7 * count as u64 + 1)) as u32).collect();
        let blocks = *table.iter().max().unwrap() as usize + 1;
        let mut store = vec![f32::NAN; blocks * block_tokens * row];
        for (p, token) in flat.chunks_exact(row).enumerate() {
            for (head, values) in token.chunks_exact(shape.head_dim).enumerate() {
                let at = ((table[p / block_tokens] as usize * shape.kv_heads + head) * block_tokens + p % block_tokens) * shape.head_dim;
                store[at..at + shape.head_dim].copy_from_slice(values);
            }
        }
        (store, table)
    }

    #[test]
    fn agrees_with_plain_sums_and_depends_on_nothing_else() {
        let mut rng = StdRng::seed_from_u64(1);
        for (heads, kv_heads, head_dim, window) in
            [(1, 1, 8, None), (4, 2, 16, None), (6, 2, 10, Some(7)), (8, 1, 64, Some(70)), (3, 3, 34, None)]
        {
            let shape = AttentionShape { heads, kv_heads, head_dim, window };
            for tokens in [1, 5, 63, 64, 65, 150] {
                let (keys, values) = (random(tokens * kv_heads * head_dim, &mut rng), random(tokens * kv_heads * head_dim, &mut rng));
                let q = random(tokens * heads * head_dim, &mut rng);
                let wanted = plain(&q, &keys, &values, 0, shape);
                let row = heads * head_dim;
                for isa in isas() {
                    let mut whole = vec![0.0; q.len()];
                    let sequence = KeyValue { past: 0, new: tokens, keys: &keys, values: &values, layout: KeyLayout::Flat };
                    attention(isa, Bf16Unit::None, &q, &[sequence], shape, &mut whole);
                    let worst = whole.iter().zip(&wanted).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
                    assert!(whole.iter().all(|x| x.is_finite()) && worst < 3e-6, "{isa:?} {shape:?} {tokens}: {worst}");
                    // The same tokens in two pieces, over blocks of a cache, in a batch with another sequence.
                    for (block_tokens, cut) in [(8, tokens / 2), (16, tokens - 1), (24, tokens / 3), (256, tokens / 2)] {
                        let ((keys, key_table), (values, table)) =
                            (paged(&keys, block_tokens, shape, 3), paged(&values, block_tokens, shape, 3));
                        assert_eq!(key_table, table);
                        let layout = KeyLayout::Paged { table: &table, block_tokens };
                        let piece = |past, new| KeyValue { past, new, keys: &keys, values: &values, layout };
                        let mut pieces = vec![0.0; q.len() + row];
                        let mut queries = q[..row].to_vec();
                        queries.extend_from_slice(&q);
                        attention(
                            isa,
                            Bf16Unit::None,
                            &queries,
                            &[piece(0, 1), piece(0, cut), piece(cut, tokens - cut)].map(|s| s),
                            shape,
                            &mut pieces,
                        );
                        assert_eq!(pieces[row..], whole, "{isa:?} {shape:?} {tokens} {block_tokens} {cut}");
                    }
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn tiles_agree_with_plain_sums_of_what_is_rounded_and_depend_on_nothing_else() {
        if Bf16Unit::detect() != Bf16Unit::Amx {
            eprintln!("skipped: this CPU has no AMX");
            return;
        }
        let mut rng = StdRng::seed_from_u64(3);
        let isa = Isa::detect();
        let narrow = |values: Vec<f32>| values.into_iter().map(|x| half::bf16::from_f32(x).to_f32()).collect::<Vec<f32>>();
        for (heads, kv_heads, head_dim, window) in
            [(4, 1, 64, None), (6, 2, 10, Some(7)), (8, 1, 128, Some(200)), (3, 3, 34, None), (2, 1, 80, Some(33)), (5, 1, 32, None)]
        {
            let shape = AttentionShape { heads, kv_heads, head_dim, window };
            for tokens in [32, 33, 129, 300] {
                let count = tokens * kv_heads * head_dim;
                let (keys, values) = (narrow(random(count, &mut rng)), narrow(random(count, &mut rng)));
                let q = narrow(random(tokens * heads * head_dim, &mut rng));
                let wanted = plain(&q, &keys, &values, 0, shape);
                let mut whole = vec![f32::NAN; q.len()];
                let sequence = KeyValue { past: 0, new: tokens, keys: &keys, values: &values, layout: KeyLayout::Flat };
                attention(isa, Bf16Unit::Amx, &q, &[sequence], shape, &mut whole);
                let worst = whole.iter().zip(&wanted).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
                // Weights of 8 bits, values of at most 2.
                assert!(whole.iter().all(|x| x.is_finite()) && worst < 8e-3, "{shape:?} {tokens}: {worst}");
                let row = heads * head_dim;
                for (block_tokens, cut) in [(16, 32), (8, tokens - 32), (256, tokens / 2)] {
                    if cut.min(tokens - cut) < 32 {
                        continue;
                    }
                    let ((keys, _), (values, table)) = (paged(&keys, block_tokens, shape, 3), paged(&values, block_tokens, shape, 3));
                    let layout = KeyLayout::Paged { table: &table, block_tokens };
                    let piece = |past, new| KeyValue { past, new, keys: &keys, values: &values, layout };
                    let mut pieces = vec![0.0; q.len() + row];
                    let mut queries = q[..row].to_vec();
                    queries.extend_from_slice(&q);
                    let sequences = [piece(0, 1), piece(0, cut), piece(cut, tokens - cut)];
                    attention(isa, Bf16Unit::Amx, &queries, &sequences, shape, &mut pieces);
                    assert_eq!(pieces[row..], whole, "{shape:?} {tokens} {block_tokens} {cut}");
                }
            }
        }
    }

    /// One bad value makes nothing of what cannot see it: neither of earlier tokens of its prompt, nor of those whose window has passed.
    #[test]
    fn what_is_not_finite_reaches_only_who_sees_it() {
        let mut rng = StdRng::seed_from_u64(2);
        for (window, bad) in [(None, f32::NAN), (Some(9), f32::NAN), (Some(9), f32::INFINITY)] {
            let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 16, window };
            let (tokens, at) = (150, 70);
            let (keys, mut values) = (random(tokens * 16, &mut rng), random(tokens * 16, &mut rng));
            let q = random(tokens * 32, &mut rng);
            for (isa, bf16) in forms() {
                let run = |values: &[f32]| {
                    let mut out = vec![0.0; q.len()];
                    let sequence = KeyValue { past: 0, new: tokens, keys: &keys, values, layout: KeyLayout::Flat };
                    attention(isa, bf16, &q, &[sequence], shape, &mut out);
                    out
                };
                values[at * 16 + 3] = 0.5;
                let clean = run(&values);
                values[at * 16 + 3] = bad;
                for (token, (found, clean)) in run(&values).chunks_exact(32).zip(clean.chunks_exact(32)).enumerate() {
                    let sees = token >= at && window.is_none_or(|window| token < at + window);
                    assert_eq!(found.iter().any(|x| !x.is_finite()), sees, "{isa:?} {bf16:?} {window:?} {token}");
                    // What tiles cannot work is worked in f32.
                    let equal = found.iter().zip(clean).all(|(a, b)| (a - b).abs() <= if bf16 == Bf16Unit::None { 0.0 } else { 3e-2 });
                    assert!(sees || equal, "{isa:?} {bf16:?} {window:?} {token}");
                }
            }
        }
    }

    #[test]
    fn extremes_stay_finite() {
        let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 8, window: None };
        for size in [0.0, 1e-30, 1e3, 1e18] {
            let keys: Vec<f32> = (0..80 * 8).map(|i| if i % 3 == 0 { size } else { -size }).collect();
            for (isa, bf16) in forms() {
                let mut out = vec![0.0; 80 * 8];
                let sequence = KeyValue { past: 0, new: 80, keys: &keys, values: &vec![1.0; 80 * 8], layout: KeyLayout::Flat };
                attention(isa, bf16, &keys, &[sequence], shape, &mut out);
                let tolerance = if bf16 == Bf16Unit::None { 1e-5 } else { 8e-3 };
                assert!(out.iter().all(|x| (x - 1.0).abs() < tolerance), "{isa:?} {bf16:?} {size}");
            }
        }
    }
}
