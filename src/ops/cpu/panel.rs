//! Many rows times a weight matrix: register tiles of weight rows by blocks of 16 packed tokens.
//!
//! Weights are read as they lie, one element of several rows at a time, spread over the lanes of a vector; lanes are tokens. Every
//! sum runs over k in order, in one lane: it depends neither on the other tokens nor on their number.

use super::{pack::Line, simd::Simd};

/// `out[r][v · LANES ..] = Σ_i w[r][i · step] · x[v][i]`, all sums in order of i. `x[v]` advances by 16 elements.
///
/// # Safety
/// The CPU has `S`; `w[r]` is readable at `i · step` and `x[v]` for LANES elements at `16 i`, for i below `k`.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd, const R: usize, const V: usize>(
    w: [*const f32; R],
    step: usize,
    x: [*const f32; V],
    k: usize,
) -> [[S::Vector; V]; R] {
    // SAFETY: the caller's contract.
    unsafe {
        let mut sums = [[S::zero(); V]; R];
        for i in 0..k {
            let x: [S::Vector; V] = std::array::from_fn(|v| S::load(x[v].add(16 * i)));
            for r in 0..R {
                let weight = S::splat(*w[r].add(i * step));
                for v in 0..V {
                    sums[r][v] = S::mul_add(weight, x[v], sums[r][v]);
                }
            }
        }
        sums
    }
}

/// Tile sizes of an instruction set: weight rows, blocks of tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileShape {
    pub(crate) rows: usize,
    pub(crate) blocks: usize,
}

impl TileShape {
    pub(crate) const fn of<S: Simd>() -> Self {
        if S::LANES == 16 { Self { rows: 8, blocks: 3 } } else { Self { rows: 4, blocks: 1 } }
    }
}

/// Most weight rows and blocks of any [`TileShape`].
pub(crate) const MAX_ROWS: usize = 8;
pub(crate) const MAX_BLOCKS: usize = 3;

/// Products of up to [`MAX_ROWS`] weight rows and [`MAX_BLOCKS`] blocks of tokens.
pub(crate) type Products = [[Line; MAX_BLOCKS]; MAX_ROWS];

/// `out[r][b] = w[r] · x[b]` for the rows of the shape and all of `x`, at most the blocks of the shape.
///
/// # Safety
/// As [`tile`]; `x` is not empty.
#[inline(always)]
pub(crate) unsafe fn products<S: Simd>(w: [*const f32; MAX_ROWS], x: &[*const f32], k: usize, out: &mut Products) {
    // SAFETY: the caller's contract; a block of 16 is one vector, or two.
    unsafe {
        if S::LANES == 16 {
            match *x {
                [a, b, c] => store::<S, 8, 3>(tile::<S, 8, 3>(w, 1, [a, b, c], k), out),
                [a, b] => store::<S, 8, 2>(tile::<S, 8, 2>(w, 1, [a, b], k), out),
                _ => store::<S, 8, 1>(tile::<S, 8, 1>(w, 1, [x[0]], k), out),
            }
        } else {
            let w = [w[0], w[1], w[2], w[3]];
            store::<S, 4, 2>(tile::<S, 4, 2>(w, 1, [x[0], x[0].add(8)], k), out);
        }
    }
}

/// # Safety
/// The CPU has `S`; `R` and `V · LANES / 16` do not exceed the sizes of `out`.
#[inline(always)]
unsafe fn store<S: Simd, const R: usize, const V: usize>(sums: [[S::Vector; V]; R], out: &mut Products) {
    for (sums, out) in sums.into_iter().zip(out) {
        for (v, sum) in sums.into_iter().enumerate() {
            let lane = v * S::LANES;
            // SAFETY: within the line, as LANES divides 16.
            unsafe { S::store(sum, out[lane / 16].0.as_mut_ptr().add(lane % 16)) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod bf16_pairs {
    //! The same with AVX512-BF16: pairs of bf16 instead of f32.

    use std::arch::x86_64::*;

    use super::{MAX_ROWS, Products};

    /// `w[r]` are `pairs` pairs of bf16, readable as such; `x[b]` are blocks of [`super::super::pack::Format::Bf16`].
    ///
    /// # Safety
    /// As the name says, and the CPU has AVX512-BF16. `x` has 1 to 3 blocks.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(crate) unsafe fn products(w: [*const u32; MAX_ROWS], x: &[*const f32], pairs: usize, out: &mut Products) {
        // SAFETY: the caller's contract.
        unsafe {
            match *x {
                [a, b, c] => tile::<3>(w, [a, b, c], pairs, out),
                [a, b] => tile::<2>(w, [a, b], pairs, out),
                _ => tile::<1>(w, [x[0]], pairs, out),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn tile<const B: usize>(w: [*const u32; MAX_ROWS], x: [*const f32; B], pairs: usize, out: &mut Products) {
        let mut sums = [[_mm512_setzero_ps(); B]; MAX_ROWS];
        for i in 0..pairs {
            for r in 0..MAX_ROWS {
                // SAFETY: the caller's contract. Any 512 bits are 32 bf16.
                unsafe {
                    let weights: __m512bh = std::mem::transmute(_mm512_set1_epi32(w[r].add(i).read_unaligned() as i32));
                    for b in 0..B {
                        let x: __m512bh = std::mem::transmute(_mm512_loadu_ps(x[b].add(16 * i)));
                        sums[r][b] = _mm512_dpbf16_ps(sums[r][b], weights, x);
                    }
                }
            }
        }
        for (sums, out) in sums.into_iter().zip(out) {
            for (sum, out) in sums.into_iter().zip(out) {
                // SAFETY: a line holds one vector, aligned.
                unsafe { _mm512_store_ps(out.0.as_mut_ptr(), sum) };
            }
        }
    }
}
