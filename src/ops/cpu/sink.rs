//! Where products go, and in which order they lie there.

use std::{marker::PhantomData, ops::Range};

use super::{
    dot::Emit,
    pack::{BLOCK, Format, Line},
    simd::Isa,
};

/// A buffer that tasks fill at places of their own.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: only `slice` touches the memory, and its contract forbids two users of one place.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(out: &'a mut [T]) -> Self {
        Self { start: out.as_mut_ptr(), len: out.len(), lifetime: PhantomData }
    }

    /// Panics if the range is outside of the buffer.
    ///
    /// # Safety
    /// Nobody else uses any place of `range` while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "that is what the type is for; the contract forbids aliases")]
    #[inline(always)]
    pub(crate) unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "write outside of the output: this is a bug");
        // SAFETY: in bounds; unaliased by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

/// What to do with what is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Store {
    Set,
    Add,
}

/// Takes the products of a task: values of one token for neighbouring columns, or of a block of tokens.
pub(crate) trait Sink: Emit {
    /// `values[c].0[t]` belongs to token `16 · block + t` and column `column + c`.
    fn block(&mut self, block: usize, column: usize, values: &[Line]);
}

/// Rows of a row-major matrix.
pub(crate) struct RowSink<'a> {
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(crate) isa: Isa,
    pub(crate) out: &'a Disjoint<'a, f32>,
    /// Elements from one row to the next.
    pub(crate) stride: usize,
    /// Rows of this product.
    pub(crate) rows: Range<usize>,
    /// Its first column.
    pub(crate) column: usize,
    pub(crate) store: Store,
}

impl Emit for RowSink<'_> {
    #[inline(always)]
    fn emit(&mut self, row: usize, column: usize, products: &[f32]) {
        debug_assert!(row < self.rows.len());
        let start = (self.rows.start + row) * self.stride + self.column + column;
        // SAFETY: products have disjoint rectangles of the output, and tasks disjoint columns of a product.
        let place = unsafe { self.out.slice(start..start + products.len()) };
        match self.store {
            Store::Set => place.copy_from_slice(products),
            Store::Add => place.iter_mut().zip(products).for_each(|(to, product)| *to += product),
        }
    }
}

impl Sink for RowSink<'_> {
    #[inline(always)]
    fn block(&mut self, block: usize, column: usize, values: &[Line]) {
        let first = block * BLOCK;
        let tokens = (self.rows.len() - first).min(BLOCK);
        #[cfg(target_arch = "x86_64")]
        if self.isa == Isa::Avx512 && values.len() == 16 {
            // SAFETY: the CPU has AVX-512, says `isa`.
            let rows = unsafe { transposed(values) };
            for (token, line) in rows.iter().take(tokens).enumerate() {
                self.emit(first + token, column, &line.0);
            }
            return;
        }
        let mut row = [0f32; 16];
        for token in 0..tokens {
            row.iter_mut().zip(values).for_each(|(to, line)| *to = line.0[token]);
            self.emit(first + token, column, &row[..values.len()]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(values: &[Line]) -> [Line; 16] {
    use std::arch::x86_64::{_mm512_load_ps, _mm512_setzero_ps, _mm512_store_ps};
    let mut vectors = [_mm512_setzero_ps(); 16];
    for (vector, line) in vectors.iter_mut().zip(values) {
        // SAFETY: a line is one vector, aligned.
        *vector = unsafe { _mm512_load_ps(line.0.as_ptr()) };
    }
    let mut out = [Line::ZERO; 16];
    for (line, vector) in out.iter_mut().zip(super::pack::x86::transpose(vectors)) {
        // SAFETY: a line is one vector, aligned.
        unsafe { _mm512_store_ps(line.0.as_mut_ptr(), vector) };
    }
    out
}

/// Activations for the next product, packed. Takes blocks only.
pub(crate) struct PackedSink<'a> {
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(crate) isa: Isa,
    pub(crate) format: Format,
    pub(crate) out: &'a Disjoint<'a, Line>,
    /// First line of this product.
    pub(crate) start: usize,
    /// Columns, which are the k of the next product.
    pub(crate) k: usize,
}

impl Emit for PackedSink<'_> {
    fn emit(&mut self, _row: usize, _column: usize, _products: &[f32]) {
        unreachable!("single rows are not packed: this is a bug");
    }
}

impl Sink for PackedSink<'_> {
    #[inline(always)]
    fn block(&mut self, block: usize, column: usize, values: &[Line]) {
        let start = self.start + block * self.format.block_lines(self.k);
        match self.format {
            Format::F32 => {
                // SAFETY: products have their own lines, and tasks disjoint columns of a product.
                unsafe { self.out.slice(start + column..start + column + values.len()) }.copy_from_slice(values);
            }
            Format::Bf16 => {
                debug_assert!(column.is_multiple_of(2) && values.len().is_multiple_of(2));
                // SAFETY: as above; columns come in pairs.
                let out = unsafe { self.out.slice(start + column / 2..start + (column + values.len()) / 2) };
                #[cfg(target_arch = "x86_64")]
                if self.isa == Isa::Avx512 {
                    // SAFETY: the CPU has AVX-512, says `isa`.
                    unsafe { pairs(values, out) };
                    return;
                }
                for (pair, out) in values.chunks_exact(2).zip(out) {
                    let bits = |x: f32| u32::from(half::bf16::from_f32(x).to_bits());
                    out.0 = std::array::from_fn(|t| f32::from_bits(bits(pair[0].0[t]) | bits(pair[1].0[t]) << 16));
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(values: &[Line], out: &mut [Line]) {
    use std::arch::x86_64::{_mm512_castsi512_ps, _mm512_load_ps, _mm512_or_si512, _mm512_slli_epi32, _mm512_store_ps};

    use super::pack::x86::round;
    for (pair, out) in values.chunks_exact(2).zip(out) {
        // SAFETY: a line is one vector, aligned.
        unsafe {
            let (even, odd) = (round(_mm512_load_ps(pair[0].0.as_ptr())), round(_mm512_load_ps(pair[1].0.as_ptr())));
            _mm512_store_ps(out.0.as_mut_ptr(), _mm512_castsi512_ps(_mm512_or_si512(even, _mm512_slli_epi32::<16>(odd))));
        }
    }
}
