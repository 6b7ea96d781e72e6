//! Activations in the order that the kernels for many rows read them: blocks of 16 tokens, within a block one element of all tokens
//! after the other.
//!
//! f32: `[k][16]`. bf16: `[ceil(k / 32) · 16][16][2]`, pairs of elements together, as AMX and AVX512-BF16 want them; rounded to nearest,
//! zeros after the last element. Missing tokens of the last block are zero.

use half::bf16;

use super::simd::Isa;

/// Tokens in a block.
pub(crate) const BLOCK: usize = 16;

/// One cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [f32; 16]);

impl Line {
    pub(crate) const ZERO: Self = Self([0.0; 16]);
}

/// Element types of packed activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    F32,
    Bf16,
}

impl Format {
    /// Lines of a block of tokens with `k` elements each.
    pub(crate) fn block_lines(self, k: usize) -> usize {
        match self {
            Self::F32 => k,
            Self::Bf16 => k.div_ceil(32) * 16,
        }
    }
}

/// Packs up to 16 rows of one length into `out`, which has [`Format::block_lines`].
pub(crate) fn pack(isa: Isa, format: Format, rows: &[&[f32]], out: &mut [Line]) {
    let k = rows.first().map_or(0, |row| row.len());
    assert!(rows.len() <= BLOCK && rows.iter().all(|row| row.len() == k) && out.len() == format.block_lines(k), "a bug");
    match isa {
        // SAFETY: the CPU has AVX-512, says `isa`.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { x86::pack(format, rows, k, out) },
        _ => portable(format, rows, 0, out),
    }
}

/// From element `start` on, of rows that are long enough.
fn portable(format: Format, rows: &[&[f32]], start: usize, out: &mut [Line]) {
    let k = rows.first().map_or(0, |row| row.len());
    match format {
        Format::F32 => {
            for (i, line) in (start..k).zip(out) {
                *line = Line::ZERO;
                line.0.iter_mut().zip(rows).for_each(|(to, row)| *to = row[i]);
            }
        }
        Format::Bf16 => {
            for (pair, line) in out.iter_mut().enumerate() {
                *line = Line::ZERO;
                for (to, row) in line.0.iter_mut().zip(rows) {
                    let at = |i: usize| row.get(start + 2 * pair + i).map_or(0, |&x| u32::from(bf16::from_f32(x).to_bits()));
                    *to = f32::from_bits(at(0) | at(1) << 16);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    //! AVX-512.

    use std::arch::x86_64::*;

    use super::{BLOCK, Format, Line, portable};

    /// `out[j][i] = rows[i][j]`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn transpose(r: [__m512; 16]) -> [__m512; 16] {
        let mut t = [_mm512_setzero_ps(); 16];
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        let mut q = [_mm512_setzero_ps(); 16];
        for i in 0..4 {
            let [a, b, c, d] = [t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]].map(|v| _mm512_castps_pd(v));
            q[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
            q[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
            q[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
            q[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
        }
        // q[4 i + c], 128-bit lane l: element 4 l + c of rows 4 i .. 4 i + 4.
        let mut out = [_mm512_setzero_ps(); 16];
        for c in 0..4 {
            let low = _mm512_shuffle_f32x4::<0x88>(q[c], q[4 + c]);
            let high = _mm512_shuffle_f32x4::<0xDD>(q[c], q[4 + c]);
            let low2 = _mm512_shuffle_f32x4::<0x88>(q[8 + c], q[12 + c]);
            let high2 = _mm512_shuffle_f32x4::<0xDD>(q[8 + c], q[12 + c]);
            out[c] = _mm512_shuffle_f32x4::<0x88>(low, low2);
            out[8 + c] = _mm512_shuffle_f32x4::<0xDD>(low, low2);
            out[4 + c] = _mm512_shuffle_f32x4::<0x88>(high, high2);
            out[12 + c] = _mm512_shuffle_f32x4::<0xDD>(high, high2);
        }
        out
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn pack(format: Format, rows: &[&[f32]], k: usize, out: &mut [Line]) {
        let (depth, lines) = match format {
            Format::F32 => (16, 16),
            Format::Bf16 => (32, 16),
        };
        let whole = k / depth;
        for (step, out) in out.chunks_exact_mut(lines).take(whole).enumerate() {
            let at = step * depth;
            let mut vectors = [_mm512_setzero_ps(); BLOCK];
            for (vector, row) in vectors.iter_mut().zip(rows) {
                let row = &row[at..at + depth];
                // SAFETY: `row` has `depth` elements.
                *vector = unsafe {
                    match format {
                        Format::F32 => _mm512_loadu_ps(row.as_ptr()),
                        Format::Bf16 => pairs(_mm512_loadu_ps(row.as_ptr()), _mm512_loadu_ps(row.as_ptr().add(16))),
                    }
                };
            }
            for (line, vector) in out.iter_mut().zip(transpose(vectors)) {
                // SAFETY: a line holds one vector, aligned.
                unsafe { _mm512_store_ps(line.0.as_mut_ptr(), vector) };
            }
        }
        portable(format, rows, whole * depth, &mut out[whole * lines..]);
    }

    /// 32 elements as bf16, two in each lane, in order.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn pairs(low: __m512, high: __m512) -> __m512 {
        let (low, high) = (round(low), round(high));
        // Even elements stay in the lower half of a lane, odd ones in the upper.
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        let (even, odd) = (_mm512_permutex2var_epi32(low, even, high), _mm512_permutex2var_epi32(low, odd, high));
        _mm512_castsi512_ps(_mm512_or_si512(even, _mm512_slli_epi32::<16>(odd)))
    }

    /// `row` rounded to bf16, as f32; zeros up to the end of the last line.
    #[target_feature(enable = "avx512f")]
    pub(crate) fn round_row(row: &[f32], out: &mut [Line]) {
        for (chunk, line) in row.chunks(16).zip(out) {
            let mask = ((1u32 << chunk.len()) - 1) as u16;
            // SAFETY: the mask keeps what is beyond the row from being read; a line holds one vector, aligned.
            unsafe {
                let rounded = _mm512_slli_epi32::<16>(round(_mm512_maskz_loadu_ps(mask, chunk.as_ptr())));
                _mm512_store_ps(line.0.as_mut_ptr(), _mm512_castsi512_ps(rounded));
            }
        }
    }

    /// The bf16 nearest to each element, in the lower half of its lane. Not a number stays that.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn round(x: __m512) -> __m512i {
        let bits = _mm512_castps_si512(x);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_finds_its_place() {
        for k in [1, 2, 15, 16, 17, 31, 32, 33, 64, 100] {
            for count in [1, 5, 16] {
                let values: Vec<Vec<f32>> = (0..count).map(|t| (0..k).map(|i| (t * 1000 + i) as f32 + 0.3).collect()).collect();
                let rows: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
                for isa in [Isa::Portable, Isa::detect()] {
                    let mut f32s = vec![Line([9.0; 16]); Format::F32.block_lines(k)];
                    pack(isa, Format::F32, &rows, &mut f32s);
                    let mut bf16s = vec![Line([9.0; 16]); Format::Bf16.block_lines(k)];
                    pack(isa, Format::Bf16, &rows, &mut bf16s);
                    for (t, i) in (0..16).flat_map(|t| (0..k).map(move |i| (t, i))) {
                        let wanted = values.get(t).map_or(0.0, |row| row[i]);
                        assert_eq!(f32s[i].0[t], wanted, "{isa:?} {k} {count}");
                        let pair = bf16s[i / 2].0[t].to_bits();
                        assert_eq!((pair >> (16 * (i % 2))) as u16, bf16::from_f32(wanted).to_bits(), "{isa:?} {k} {count}");
                    }
                    assert!(bf16s.iter().skip(k.div_ceil(2)).all(|line| line.0.iter().all(|x| x.to_bits() == 0)), "padding");
                }
            }
        }
    }

    #[test]
    fn rounding_is_to_nearest_even_and_keeps_what_is_no_number() {
        let values = [1.0, 1.003_906_3, 1.011_718_8, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1e-40, 3.0];
        let row: Vec<f32> = (0..32).map(|i| values[i % values.len()]).collect();
        for isa in [Isa::Portable, Isa::detect()] {
            let mut out = vec![Line::ZERO; 16];
            pack(isa, Format::Bf16, &[&row], &mut out);
            for (i, x) in row.iter().enumerate() {
                let found = bf16::from_bits((out[i / 2].0[0].to_bits() >> (16 * (i % 2))) as u16);
                assert!(found == bf16::from_f32(*x) || (found.is_nan() && x.is_nan()), "{isa:?} {x}: {found}");
            }
        }
    }
}
