//! Weight matrices as the kernels read them: f32, bf16 or 8-bit blocks, one row after the other.

use half::bf16;

use super::simd::Simd;

/// Elements of a row that share a scale in [`Data::Q8`].
pub(crate) const Q8_BLOCK: usize = 32;

/// `[rows, k]`, row-major.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a> {
    data: Data<'a>,
    rows: usize,
    k: usize,
}

/// The elements of a [`Matrix`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum Data<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    /// Integers `[rows, k]`, and a scale for each block of a row, `[rows, ceil(k / 32)]`.
    Q8 {
        values: &'a [i8],
        scales: &'a [bf16],
    },
}

impl<'a> Matrix<'a> {
    /// Panics if `data` is not `rows` times `k`.
    pub(crate) fn new(data: Data<'a>, rows: usize, k: usize) -> Self {
        let fits = match data {
            Data::F32(values) => values.len() == rows * k,
            Data::Bf16(values) => values.len() == rows * k,
            Data::Q8 { values, scales } => values.len() == rows * k && scales.len() == rows * k.div_ceil(Q8_BLOCK),
        };
        assert!(fits, "a matrix of another size than {rows} x {k}: this is a bug");
        Self { data, rows, k }
    }

    /// Rows `start .. start + rows`. Panics if there are fewer.
    pub(crate) fn part(&self, start: usize, rows: usize) -> Matrix<'a> {
        let range = start * self.k..(start + rows) * self.k;
        let data = match self.data {
            Data::F32(values) => Data::F32(&values[range]),
            Data::Bf16(values) => Data::Bf16(&values[range]),
            Data::Q8 { values, scales } => {
                let blocks = self.k.div_ceil(Q8_BLOCK);
                Data::Q8 { values: &values[range], scales: &scales[start * blocks..(start + rows) * blocks] }
            }
        };
        Matrix { data, rows, k: self.k }
    }

    /// One row as f32. Panics if there is no such row, or `out` is not as long.
    pub(crate) fn widen(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.k, "a row of another length: this is a bug");
        let range = row * self.k..(row + 1) * self.k;
        match self.data {
            Data::F32(values) => out.copy_from_slice(&values[range]),
            Data::Bf16(values) => out.iter_mut().zip(&values[range]).for_each(|(out, value)| *out = value.to_f32()),
            Data::Q8 { values, scales } => {
                let scales = &scales[row * self.k.div_ceil(Q8_BLOCK)..];
                let blocks = out.chunks_mut(Q8_BLOCK).zip(values[range].chunks(Q8_BLOCK)).zip(scales);
                for ((out, values), scale) in blocks {
                    out.iter_mut().zip(values).for_each(|(out, value)| *out = f32::from(*value) * scale.to_f32());
                }
            }
        }
    }

    pub(crate) fn data(&self) -> Data<'a> {
        self.data
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn k(&self) -> usize {
        self.k
    }

    /// bf16 or coarser: multiplying in bf16 loses little that is not lost already.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn is_narrow(&self) -> bool {
        !matches!(self.data, Data::F32(_))
    }
}

/// One row of weights.
///
/// # Safety
/// Of all functions: `at` and what follows it (LANES elements for `load`) lie within the row.
pub(crate) trait Row: Copy {
    unsafe fn load<S: Simd>(self, at: usize) -> S::Vector;
    unsafe fn get(self, at: usize) -> f32;
    /// Asks for the cache line of element `at`, which may lie beyond the row, or beyond all memory.
    fn prefetch(self, at: usize);
}

/// Rows of one matrix.
pub(crate) trait Rows: Copy + Sync {
    type Row: Row;
    /// Panics if there is no such row.
    fn row(self, row: usize, k: usize) -> Self::Row;
}

/// Asks for the cache line of an address, which need not be readable.
#[inline(always)]
pub(crate) fn prefetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; no address is wrong. SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

impl Row for *const f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, at: usize) -> S::Vector {
        // SAFETY: the caller's contract.
        unsafe { S::load(self.add(at)) }
    }

    #[inline(always)]
    unsafe fn get(self, at: usize) -> f32 {
        // SAFETY: the caller's contract.
        unsafe { *self.add(at) }
    }

    #[inline(always)]
    fn prefetch(self, at: usize) {
        prefetch(self.wrapping_add(at));
    }
}

impl Rows for &[f32] {
    type Row = *const f32;

    #[inline(always)]
    fn row(self, row: usize, k: usize) -> *const f32 {
        self[row * k..(row + 1) * k].as_ptr()
    }
}

impl Row for *const bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, at: usize) -> S::Vector {
        // SAFETY: the caller's contract.
        unsafe { S::load_bf16(self.add(at)) }
    }

    #[inline(always)]
    unsafe fn get(self, at: usize) -> f32 {
        // SAFETY: the caller's contract.
        unsafe { (*self.add(at)).to_f32() }
    }

    #[inline(always)]
    fn prefetch(self, at: usize) {
        prefetch(self.wrapping_add(at));
    }
}

impl Rows for &[bf16] {
    type Row = *const bf16;

    #[inline(always)]
    fn row(self, row: usize, k: usize) -> *const bf16 {
        self[row * k..(row + 1) * k].as_ptr()
    }
}

/// A row of 8-bit blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Q8Row {
    values: *const i8,
    scales: *const bf16,
}

impl Row for Q8Row {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, at: usize) -> S::Vector {
        // SAFETY: the caller's contract; blocks are a multiple of LANES, so that one scale is right for all lanes.
        unsafe { S::mul(S::load_i8(self.values.add(at)), S::splat((*self.scales.add(at / Q8_BLOCK)).to_f32())) }
    }

    #[inline(always)]
    unsafe fn get(self, at: usize) -> f32 {
        // SAFETY: the caller's contract.
        unsafe { f32::from(*self.values.add(at)) * (*self.scales.add(at / Q8_BLOCK)).to_f32() }
    }

    #[inline(always)]
    fn prefetch(self, at: usize) {
        prefetch(self.values.wrapping_add(at));
        if at.is_multiple_of(32 * Q8_BLOCK) {
            prefetch(self.scales.wrapping_add(at / Q8_BLOCK));
        }
    }
}

/// The integers and scales of a [`Data::Q8`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Q8Rows<'a> {
    pub(crate) values: &'a [i8],
    pub(crate) scales: &'a [bf16],
}

impl Rows for Q8Rows<'_> {
    type Row = Q8Row;

    #[inline(always)]
    fn row(self, row: usize, k: usize) -> Q8Row {
        let blocks = k.div_ceil(Q8_BLOCK);
        Q8Row { values: self.values[row * k..(row + 1) * k].as_ptr(), scales: self.scales[row * blocks..(row + 1) * blocks].as_ptr() }
    }
}

/// 8-bit blocks of `weights [rows, k]`: per block the scale is the smallest bf16 from `max |w| / 127` up, and each weight the
/// nearest multiple of it. The error of a weight is at most half a scale. (The layout of llama.cpp's Q8_0, with integers and
/// scales apart and bf16 scales, which widen with a shift.)
pub(crate) fn quantize_q8(weights: &[f32], k: usize, values: &mut [i8], scales: &mut [bf16]) {
    let blocks = k.div_ceil(Q8_BLOCK);
    assert!(
        weights.len() == values.len() && weights.len().is_multiple_of(k) && scales.len() == weights.len() / k * blocks,
        "sizes that do not fit: this is a bug"
    );
    for ((row, values), scales) in weights.chunks_exact(k).zip(values.chunks_exact_mut(k)).zip(scales.chunks_exact_mut(blocks)) {
        for ((block, values), scale) in row.chunks(Q8_BLOCK).zip(values.chunks_mut(Q8_BLOCK)).zip(scales) {
            let largest = block.iter().fold(0f32, |largest, w| largest.max(w.abs()));
            // What is no number stays none: `max` drops it, and as an integer it would be 0.
            let finite = block.iter().all(|w| w.is_finite());
            *scale = if finite { round_up(largest / 127.0) } else { bf16::NAN };
            let inverse = if scale.to_f32() >= f32::MIN_POSITIVE { 1.0 / scale.to_f32() } else { 0.0 };
            // Adding and subtracting it rounds to the nearest integer, ties to even, as vector code.
            const ROUND: f32 = 12_582_912.0;
            let nearest = |w: f32| (w * inverse + ROUND) - ROUND;
            values.iter_mut().zip(block).for_each(|(value, &w)| *value = nearest(w).clamp(-127.0, 127.0) as i8);
        }
    }
}

/// The smallest bf16 that is not below `x`, which is finite and not negative.
fn round_up(x: f32) -> bf16 {
    let near = bf16::from_f32(x);
    if near.to_f32() < x { bf16::from_bits(near.to_bits() + 1) } else { near }
}
