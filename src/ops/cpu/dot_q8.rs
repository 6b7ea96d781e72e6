//! Few rows times 8-bit weights with AVX-512, in integers.
//!
//! Widening 8-bit weights to f32 costs more than reading them. Here a block of 32 activations becomes 16-bit integers with a scale of its
//! own (an error of 2^-16 of the largest of the block), pairs of products are summed exactly in 32 bits, and only those sums are scaled
//! and added in f32.

use std::{arch::x86_64::*, cell::RefCell, ops::Range};

use half::bf16;

use super::{
    dot::{Emit, FEW_ROWS},
    matrix::{Q8_BLOCK, Q8Rows},
    silu,
};

/// Blocks whose scales are multiplied at once: one vector.
const GROUP: usize = 16;

/// Weights that [`tile`] asks for ahead of time, at least half of it.
const TILE_AHEAD: usize = 8192;

/// Weights that [`narrow`] asks for ahead of time.
const AHEAD: usize = 4096;

/// Activations as integers.
#[derive(Default)]
struct Rows {
    /// `[rows][blocks · 32]`, zeros after the last element.
    integers: Vec<i16>,
    /// `[rows][blocks]`, rounded up to whole groups.
    scales: Vec<f32>,
    blocks: usize,
}

thread_local! {
    static ROWS: RefCell<Rows> = RefCell::default();
}

impl Rows {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn quantize(&mut self, x: &[&[f32]], k: usize) {
        self.blocks = k.div_ceil(Q8_BLOCK);
        let stride = self.stride();
        self.integers.resize(x.len() * stride * Q8_BLOCK, 0);
        self.scales.resize(x.len() * stride, 0.0);
        let outs = self.integers.chunks_exact_mut(stride * Q8_BLOCK).zip(self.scales.chunks_exact_mut(stride));
        for (row, (integers, scales)) in x.iter().zip(outs) {
            scales[self.blocks..].fill(0.0);
            for ((block, integers), scale) in row.chunks(Q8_BLOCK).zip(integers.chunks_exact_mut(Q8_BLOCK)).zip(scales) {
                let mask = |from: usize| ((1u32 << block.len().saturating_sub(from).min(16)) - 1) as u16;
                // SAFETY: masks keep what is beyond the row from being read; `integers` has 32 elements.
                unsafe {
                    let low = _mm512_maskz_loadu_ps(mask(0), block.as_ptr());
                    let high = _mm512_maskz_loadu_ps(mask(16), block.as_ptr().wrapping_add(16));
                    // What is no number stays none; a maximum alone would drop it.
                    let broken = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(low, high) != 0;
                    let largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
                    *scale = if broken || !largest.is_finite() { f32::NAN } else { largest / 32767.0 };
                    let inverse = _mm512_set1_ps(if *scale > f32::MIN_POSITIVE { 1.0 / *scale } else { 0.0 });
                    let narrow = |x: __m512| _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)));
                    _mm256_storeu_si256(integers.as_mut_ptr().cast(), narrow(low));
                    _mm256_storeu_si256(integers.as_mut_ptr().add(16).cast(), narrow(high));
                }
            }
        }
    }

    fn stride(&self) -> usize {
        self.blocks.next_multiple_of(GROUP)
    }
}

/// As [`super::dot::run`].
///
/// # Safety
/// The CPU has AVX-512 F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn run(x: &[&[f32]], weights: Q8Rows<'_>, k: usize, range: Range<usize>, pair: Option<usize>, emit: &mut impl Emit) {
    assert!(x.len() <= FEW_ROWS && x.iter().all(|row| row.len() == k), "rows of another length than the weights': this is a bug");
    let mut rows = ROWS.take();
    rows.quantize(x, k);
    match x.len() {
        0 => {}
        1 => columns::<1, 4>(&rows, weights, k, range, pair, emit),
        2 => columns::<2, 4>(&rows, weights, k, range, pair, emit),
        3 => columns::<3, 4>(&rows, weights, k, range, pair, emit),
        4 => columns::<4, 4>(&rows, weights, k, range, pair, emit),
        5 => columns::<5, 2>(&rows, weights, k, range, pair, emit),
        6 => columns::<6, 2>(&rows, weights, k, range, pair, emit),
        7 => columns::<7, 2>(&rows, weights, k, range, pair, emit),
        _ => columns::<8, 2>(&rows, weights, k, range, pair, emit),
    }
    ROWS.set(rows);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn columns<const M: usize, const N: usize>(
    x: &Rows,
    weights: Q8Rows<'_>,
    k: usize,
    range: Range<usize>,
    pair: Option<usize>,
    emit: &mut impl Emit,
) {
    let width = if pair.is_some() { N / 2 } else { N };
    let last = range.end.saturating_sub(1);
    for column in range.clone().step_by(width) {
        let made = width.min(range.end - column);
        let rows = std::array::from_fn(|j| (column + j % width).min(last) + j / width * pair.unwrap_or(0));
        let out = tile::<M, N>(x, weights, k, rows);
        for (i, products) in out.iter().enumerate() {
            match pair {
                None => emit.emit(i, column, &products[..made]),
                Some(_) => {
                    let mut hidden = [0f32; N];
                    (0..made).for_each(|j| hidden[j] = silu(products[j]) * products[j + width]);
                    emit.emit(i, column, &hidden[..made]);
                }
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn tile<const M: usize, const N: usize>(x: &Rows, weights: Q8Rows<'_>, k: usize, rows: [usize; N]) -> [[f32; N]; M] {
    let (blocks, stride) = (x.blocks, x.stride());
    let values = rows.map(|row| weights.values[row * k..(row + 1) * k].as_ptr());
    let scales = rows.map(|row| weights.scales[row * blocks..(row + 1) * blocks].as_ptr());
    // What a tile some thousands of bytes further on will read: the next one, unless rows are short.
    let ahead = N * k * (TILE_AHEAD / (N * k)).max(1);
    let mut sums = [[_mm512_setzero_ps(); N]; M];
    for group in (0..blocks).step_by(GROUP) {
        let count = (blocks - group).min(GROUP);
        // The scale of each block of products.
        let mut products = [[[0f32; GROUP]; N]; M];
        for j in 0..N {
            // SAFETY: `count` scales from `group` on lie within the row; the mask keeps the others from being read.
            let scale = unsafe { _mm256_maskz_loadu_epi16(((1u32 << count) - 1) as u16, scales[j].add(group).cast()) };
            let scale = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(scale)));
            for i in 0..M {
                // SAFETY: the scales of the activations are padded to whole groups.
                unsafe {
                    let own = _mm512_loadu_ps(x.scales.as_ptr().add(i * stride + group));
                    _mm512_storeu_ps(products[i][j].as_mut_ptr(), _mm512_mul_ps(scale, own));
                }
            }
        }
        for block in 0..count {
            let at = (group + block) * Q8_BLOCK;
            let mask = if k - at >= Q8_BLOCK { u32::MAX } else { (1u32 << (k - at)) - 1 };
            // SAFETY: the mask keeps what is beyond the row from being read; activations are padded to whole blocks.
            unsafe {
                let mut activations = [_mm512_setzero_si512(); M];
                for i in 0..M {
                    activations[i] = _mm512_loadu_si512(x.integers.as_ptr().add(i * stride * Q8_BLOCK + at).cast());
                }
                for j in 0..N {
                    // A line holds two blocks.
                    if block % 2 == 0 {
                        _mm_prefetch::<_MM_HINT_T0>(values[j].wrapping_add(at + ahead));
                    }
                    let weights = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, values[j].add(at)));
                    for i in 0..M {
                        let sum = _mm512_cvtepi32_ps(_mm512_madd_epi16(weights, activations[i]));
                        sums[i][j] = _mm512_fmadd_ps(sum, _mm512_set1_ps(products[i][j][block]), sums[i][j]);
                    }
                }
            }
        }
    }
    let mut out = [[0f32; N]; M];
    for i in 0..M {
        for j in 0..N {
            out[i][j] = _mm512_reduce_add_ps(sums[i][j]);
        }
    }
    out
}

/// `row`, of `values.len()` 8-bit weights, as bf16.
///
/// # Safety
/// The CPU has AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(crate) fn narrow(values: &[i8], scales: &[bf16], out: &mut [bf16]) {
    assert!(values.len() == out.len() && scales.len() == values.len().div_ceil(Q8_BLOCK));
    let whole = values.len() / Q8_BLOCK;
    for (block, scale) in scales.iter().take(whole).enumerate() {
        let at = block * Q8_BLOCK;
        let scale = _mm512_set1_ps(scale.to_f32());
        // SAFETY: 32 values from `at` on are within both slices.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(values.as_ptr().wrapping_add(at + AHEAD));
            let low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(values.as_ptr().add(at).cast())));
            let high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(values.as_ptr().add(at + 16).cast())));
            let pairs = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, scale), _mm512_mul_ps(low, scale));
            _mm512_storeu_si512(out.as_mut_ptr().add(at).cast(), std::mem::transmute::<__m512bh, __m512i>(pairs));
        }
    }
    for at in whole * Q8_BLOCK..values.len() {
        out[at] = bf16::from_f32(f32::from(values[at]) * scales[at / Q8_BLOCK].to_f32());
    }
}
