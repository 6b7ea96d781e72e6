//! Attention of many queries on AMX tiles: both products in bf16 with f32 sums, softmax in f32.
//!
//! Up to [`LANES`] (token, head) pairs that share a key-value head are one task. Keys and values are rounded to bf16 a chunk at a
//! time, once for all of them: keys as they lie, `[position][head_dim]`, values turned round, `[head_dim][position]`, so that both
//! are the left operand of [`amx`], and queries and softmax weights the right one. Chunks start at multiples of [`CHUNK`] and sums
//! run in order of position: what a query gets does not depend on the queries beside it, as long as they are on tiles too: pieces
//! of a prompt with fewer than [`MIN_LANES`] queries, and tasks that see a value that is not finite, are worked in f32.

use std::{arch::x86_64::*, cell::RefCell};

use super::{
    super::{
        amx::{self, Left, Tiles},
        pack::{BLOCK, Format, Line, pack, x86::transpose},
        simd::{Bf16Unit, Isa},
    },
    Task,
};

/// Queries of a task: the more, the less often keys and values are rounded.
pub(super) const LANES: usize = 256;

/// Queries of a sequence from which tiles are worth their preparation.
pub(super) const MIN_LANES: usize = 32;

/// Positions whose keys and values are rounded at once, a multiple of a tile's depth.
const CHUNK: usize = 128;

/// Lines of scores or sums that one pair of blocks has for 32 rows.
const PAIR_LINES: usize = 4 * BLOCK;

/// Buffers of a task.
#[derive(Default)]
struct Buffers {
    /// `[blocks][width / 32 · 16]`, packed.
    queries: Vec<Line>,
    /// bf16 `[CHUNK][width]`.
    keys: Vec<Line>,
    /// bf16 `[width][CHUNK]`.
    values: Vec<Line>,
    /// Of one pair of blocks, as tiles leave them: `[CHUNK / 32][2][2][16 positions]` lines.
    scores: Vec<Line>,
    /// Of one pair of blocks: `[2][CHUNK / 2]` lines, packed.
    weights: Vec<Line>,
    /// `[blocks / 2][width / 32][2][2][16 elements]` lines.
    sums: Vec<Line>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// Line of `row` of block `b` of a pair, where tiles of two times 16 rows by two blocks lie one after the other.
#[inline(always)]
fn line_of(row: usize, b: usize) -> usize {
    row / 32 * PAIR_LINES + (row / 16 % 2 * 2 + b) * BLOCK + row % 16
}

/// Works the task. `false`, and nothing written, where a value is not finite in bf16: 0 times such a value is not 0, so that those who
/// must not see it need another way.
pub(super) fn run(task: &Task<'_>) -> bool {
    assert!(Bf16Unit::detect() == Bf16Unit::Amx, "this CPU has no tiles");
    // SAFETY: the CPU has AMX, AVX-512 and AVX512-BF16, says the assertion.
    unsafe { run_tiles(task) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn run_tiles(task: &Task<'_>) -> bool {
    let (shape, sequence) = (task.shape, task.sequence);
    let hd = shape.head_dim;
    let width = hd.next_multiple_of(32);
    let pairs = task.queries.len().div_ceil(2 * BLOCK);
    let query_lines = Format::Bf16.block_lines(hd);
    let mut buffers = BUFFERS.take();
    let Buffers { queries, keys, values, scores, weights, sums } = &mut buffers;
    for (buffer, lines) in [
        (&mut *queries, 2 * pairs * query_lines),
        (&mut *keys, CHUNK * width / 32),
        (&mut *values, width * CHUNK / 32),
        (&mut *scores, CHUNK / 32 * PAIR_LINES),
        (&mut *weights, CHUNK),
        (&mut *sums, pairs * width / 32 * PAIR_LINES),
    ] {
        if buffer.len() < lines {
            buffer.resize(lines, Line::ZERO);
        }
    }
    let sums = &mut sums[..pairs * width / 32 * PAIR_LINES];
    sums.fill(Line::ZERO);
    // What lies beyond the last element of a row is the zero that it was made with, unless heads had another width before.
    if !hd.is_multiple_of(32) {
        keys.fill(Line::ZERO);
        values.fill(Line::ZERO);
    }

    // Lanes without a query see the first new token's past, and nobody sees them.
    let mut positions = [sequence.past as i32; LANES];
    for (block, lines) in queries.chunks_exact_mut(query_lines).take(2 * pairs).enumerate() {
        let first = task.queries.start + block * BLOCK;
        let count = task.queries.end.saturating_sub(first).min(BLOCK);
        let mut rows: [&[f32]; BLOCK] = [&[]; BLOCK];
        for lane in 0..count {
            rows[lane] = &task.q[task.elements(first + lane)];
            positions[block * BLOCK + lane] = (sequence.past + task.token(first + lane)) as i32;
        }
        if count == 0 {
            lines.fill(Line::ZERO);
        } else {
            pack(Isa::Avx512, Format::Bf16, &rows[..count], lines);
        }
    }
    let (oldest, newest) = (sequence.past + task.token(task.queries.start), sequence.past + task.token(task.queries.end - 1));
    let seen_from = |position: usize| shape.window.map_or(0, |window| (position + 1).saturating_sub(window));
    let scale = _mm512_set1_ps(std::f32::consts::LOG2_E / (hd as f32).sqrt());
    let mut largest = [Line([f32::NEG_INFINITY; BLOCK]); LANES / BLOCK];
    let mut totals = [Line::ZERO; LANES / BLOCK];

    // SAFETY: the CPU has AMX; a task does not start another on its thread.
    let tiles = unsafe { Tiles::configure() };
    let mut finite = true;
    let mut start = seen_from(oldest) / CHUNK * CHUNK;
    while start <= newest {
        let end = (newest + 1).min(start + CHUNK);
        narrow_keys(task, start..end, keys, width);
        finite = turn_values(task, start..end, values);
        if !finite {
            break;
        }
        for pair in 0..pairs {
            let lanes = &positions[pair * 2 * BLOCK..][..2 * BLOCK];
            let real = (task.queries.len() - pair * 2 * BLOCK).min(2 * BLOCK);
            // In order of position.
            let (pair_oldest, pair_newest) = (lanes[0] as usize, lanes[real - 1] as usize);
            if start > pair_newest || end <= seen_from(pair_oldest) {
                continue;
            }
            let steps = (end.min(pair_newest + 1) - start).div_ceil(32);
            for step in 0..steps {
                let left = [0, 16].map(|row| Left {
                    start: keys[(step * 32 + row) * width / 32..].as_ptr().cast(),
                    stride: 2 * width,
                    next: std::ptr::null(),
                });
                let right = [0, 1].map(|b| queries[(2 * pair + b) * query_lines..][..query_lines].as_ptr().cast::<u8>());
                let out = scores[step * PAIR_LINES..][..PAIR_LINES].as_mut_ptr().cast::<f32>();
                // SAFETY: tiles are configured; 32 keys of `width` elements, two blocks as wide, and room for four tiles.
                unsafe { amx::two_by_two(left, right, width / 32, out) };
            }
            let masked = start + 32 * steps > pair_oldest + 1 || start < seen_from(pair_newest);
            for b in 0..2 {
                let block = 2 * pair + b;
                if masked {
                    let last: [i32; BLOCK] = std::array::from_fn(|lane| lanes[b * BLOCK + lane]);
                    hide(scores, b, start, 32 * steps, last, last.map(|position| seen_from(position as usize) as i32));
                }
                let factor = soften(scores, b, 32 * steps, scale, &mut largest[block], &mut totals[block], &mut weights[b * CHUNK / 2..]);
                if let Some(factor) = factor {
                    for row in 0..width {
                        let line = &mut sums[pair * width / 32 * PAIR_LINES + line_of(row, b)];
                        // SAFETY: a line holds one vector, aligned.
                        unsafe { _mm512_store_ps(line.0.as_mut_ptr(), _mm512_mul_ps(_mm512_load_ps(line.0.as_ptr()), factor)) };
                    }
                }
            }
            for part in 0..width / 32 {
                let left = [0, 16].map(|row| Left {
                    start: values[(part * 32 + row) * CHUNK / 32..].as_ptr().cast(),
                    stride: 2 * CHUNK,
                    next: std::ptr::null(),
                });
                let right = [0, 1].map(|b| weights[b * CHUNK / 2..][..CHUNK / 2].as_ptr().cast::<u8>());
                let out = sums[(pair * width / 32 + part) * PAIR_LINES..][..PAIR_LINES].as_mut_ptr().cast::<f32>();
                // SAFETY: tiles are configured; 32 rows of CHUNK values, of which `steps` tiles are read as of the weights, and four tiles.
                unsafe { amx::two_by_two_onto(left, right, steps, out) };
            }
        }
        start += CHUNK;
    }
    drop(tiles);
    if finite {
        write(task, sums, &totals, width);
    }
    BUFFERS.set(buffers);
    finite
}

/// Rounds the keys of `positions` into rows of `width`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn narrow_keys(task: &Task<'_>, positions: std::ops::Range<usize>, out: &mut [Line], width: usize) {
    let hd = task.shape.head_dim;
    let mut rows = out.chunks_exact_mut(width / 32);
    for (first, stride, count) in task.sequence.layout.runs(positions, task.kv_head, task.shape) {
        for (row, lines) in (0..count).zip(&mut rows) {
            let key = &task.sequence.keys[first + row * stride..][..hd];
            for (line, chunk) in lines.iter_mut().zip(key.chunks(32)) {
                let narrow = _mm512_cvtne2ps_pbh(load(chunk.get(16..).unwrap_or_default()), load(chunk));
                // SAFETY: a line holds one vector.
                unsafe { line.0.as_mut_ptr().cast::<__m512bh>().write(narrow) };
            }
        }
    }
}

/// Up to 16 elements, zeros after the last.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(values: &[f32]) -> __m512 {
    let mask = ((1u32 << values.len().min(16)) - 1) as u16;
    // SAFETY: the mask keeps what is beyond the slice from being read.
    unsafe { _mm512_maskz_loadu_ps(mask, values.as_ptr()) }
}

/// Rounds the values of `positions` into `[head_dim][CHUNK]`, zeros after the last position up to a multiple of 32. Whether all are finite.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn turn_values(task: &Task<'_>, positions: std::ops::Range<usize>, out: &mut [Line]) -> bool {
    let hd = task.shape.head_dim;
    let mut rows: [&[f32]; CHUNK] = [&[]; CHUNK];
    let mut count = 0;
    for (first, stride, run) in task.sequence.layout.runs(positions, task.kv_head, task.shape) {
        for row in 0..run {
            rows[count] = &task.sequence.values[first + row * stride..][..hd];
            count += 1;
        }
    }
    // Even words of both, then odd ones: element i of the first row beside element i of the second.
    let order: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
    // SAFETY: as many bytes as a vector.
    let order = unsafe { _mm512_loadu_si512(order.as_ptr().cast()) };
    let magnitude = _mm512_set1_epi32(0x7FFF_FFFF);
    let mut most = _mm512_setzero_si512();
    for step in 0..count.div_ceil(32) {
        for d in (0..hd).step_by(16) {
            let mut pairs = [_mm512_setzero_ps(); 16];
            for (j, pair) in pairs.iter_mut().enumerate() {
                let even = load(rows[step * 32 + 2 * j].get(d..).unwrap_or_default());
                let odd = load(rows[step * 32 + 2 * j + 1].get(d..).unwrap_or_default());
                most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(even), magnitude));
                most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(odd), magnitude));
                // SAFETY: both are vectors of 512 bits.
                let narrow: __m512i = unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even)) };
                *pair = _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, narrow));
            }
            for (i, row) in transpose(pairs).into_iter().enumerate().take(hd - d) {
                // SAFETY: a line holds one vector, aligned.
                unsafe { _mm512_store_ps(out[(d + i) * CHUNK / 32 + step].0.as_mut_ptr(), row) };
            }
        }
    }
    /// The first f32 that rounds to infinity.
    const TOO_LARGE: u32 = 0x7F7F_8000;
    _mm512_reduce_max_epu32(most) < TOO_LARGE
}

/// Scores of positions after `last` or before `first` become -∞.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn hide(scores: &mut [Line], b: usize, start: usize, rows: usize, last: [i32; BLOCK], first: [i32; BLOCK]) {
    // SAFETY: as many bytes as a vector, both.
    let (last, first) = unsafe { (_mm512_loadu_si512(last.as_ptr().cast()), _mm512_loadu_si512(first.as_ptr().cast())) };
    let nothing = _mm512_set1_ps(f32::NEG_INFINITY);
    for row in 0..rows {
        let position = _mm512_set1_epi32((start + row) as i32);
        let hidden = _mm512_cmpgt_epi32_mask(position, last) | _mm512_cmplt_epi32_mask(position, first);
        let line = &mut scores[line_of(row, b)];
        // SAFETY: a line holds one vector, aligned.
        unsafe { _mm512_mask_store_ps(line.0.as_mut_ptr(), hidden, nothing) };
    }
}

/// Softmax weights of block `b`, `2^((score - largest) · scale)`, packed in bf16 into `out`; the factor for what was summed under the
/// old `largest`, if it is not 1.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn soften(scores: &[Line], b: usize, rows: usize, scale: __m512, largest: &mut Line, total: &mut Line, out: &mut [Line]) -> Option<__m512> {
    // SAFETY: a line holds one vector, aligned; here and below.
    let (old, mut sum) = unsafe { (_mm512_load_ps(largest.0.as_ptr()), _mm512_load_ps(total.0.as_ptr())) };
    let mut max = [old; 4];
    for tile in (0..rows).step_by(16) {
        let lines = &scores[line_of(tile, b)..][..16];
        for (i, line) in lines.iter().enumerate() {
            // SAFETY: as above.
            max[i % 4] = unsafe { _mm512_max_ps(_mm512_load_ps(line.0.as_ptr()), max[i % 4]) };
        }
    }
    let max = _mm512_max_ps(_mm512_max_ps(max[0], max[1]), _mm512_max_ps(max[2], max[3]));
    // A lane that has seen nothing yet has no largest score.
    let seen = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(max, _mm512_set1_ps(f32::NEG_INFINITY));
    let shift = _mm512_maskz_mov_ps(seen, max);
    let factor = exp2(_mm512_mul_ps(_mm512_sub_ps(old, shift), scale));
    sum = _mm512_mul_ps(sum, factor);
    let half = _mm512_set1_epi32(0x8000);
    for tile in (0..rows).step_by(16) {
        let lines = &scores[line_of(tile, b)..][..16];
        for (two, out) in lines.as_chunks::<2>().0.iter().zip(&mut out[tile / 2..]) {
            // SAFETY: as above.
            let (even, odd) = unsafe { (_mm512_load_ps(two[0].0.as_ptr()), _mm512_load_ps(two[1].0.as_ptr())) };
            let even = exp2(_mm512_mul_ps(_mm512_sub_ps(even, shift), scale));
            let odd = exp2(_mm512_mul_ps(_mm512_sub_ps(odd, shift), scale));
            sum = _mm512_add_ps(_mm512_add_ps(sum, even), odd);
            // Weights are at most 1: half of the last place can be added without a look at what they are.
            let (even, odd) = (_mm512_add_epi32(_mm512_castps_si512(even), half), _mm512_add_epi32(_mm512_castps_si512(odd), half));
            let both = _mm512_mask_mov_epi16(_mm512_srli_epi32::<16>(even), 0xAAAA_AAAA, odd);
            // SAFETY: as above.
            unsafe { _mm512_store_ps(out.0.as_mut_ptr(), _mm512_castsi512_ps(both)) };
        }
    }
    // SAFETY: as above.
    unsafe {
        _mm512_store_ps(largest.0.as_mut_ptr(), max);
        _mm512_store_ps(total.0.as_mut_ptr(), sum);
    }
    (_mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(factor, _mm512_set1_ps(1.0)) != 0).then_some(factor)
}

/// `2^x` for x ≤ 0 within 3e-6 of itself; 0 below -150. NaN stays NaN.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp2(x: __m512) -> __m512 {
    // The second operand is the result where one is NaN.
    let x = _mm512_max_ps(_mm512_set1_ps(-200.0), x);
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT }>(x);
    let r = _mm512_sub_ps(x, n);
    // ln(2)^i / i!, from i = 5 down.
    let mut p = _mm512_set1_ps(1.333_355_8e-3);
    for c in [9.618_129e-3, 5.550_411e-2, 0.240_226_5, std::f32::consts::LN_2, 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, n)
}

/// Sums over totals to where each query has its elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn write(task: &Task<'_>, sums: &[Line], totals: &[Line], width: usize) {
    let hd = task.shape.head_dim;
    for first in (0..task.queries.len()).step_by(BLOCK) {
        let (block, count) = (first / BLOCK, (task.queries.len() - first).min(BLOCK));
        // SAFETY: a line holds one vector, aligned; here and below.
        let inverse = _mm512_div_ps(_mm512_set1_ps(1.0), unsafe { _mm512_load_ps(totals[block].0.as_ptr()) });
        for d in (0..hd).step_by(16) {
            let lines = &sums[block / 2 * width / 32 * PAIR_LINES + line_of(d, block % 2)..][..16];
            let mut rows = [inverse; 16];
            for (row, line) in rows.iter_mut().zip(lines) {
                // SAFETY: as above.
                *row = _mm512_mul_ps(unsafe { _mm512_load_ps(line.0.as_ptr()) }, inverse);
            }
            let mask = ((1u32 << (hd - d).min(16)) - 1) as u16;
            let rows = transpose(rows);
            for (lane, row) in rows.into_iter().enumerate().take(count) {
                // SAFETY: each query has its own elements, and the mask ends with them.
                unsafe {
                    let out = task.out.slice(task.elements(task.queries.start + first + lane));
                    _mm512_mask_storeu_ps(out[d..].as_mut_ptr(), mask, row);
                }
            }
        }
    }
}
