//! Weights of 8 bits: 4 of exponent with a bias of 7, 3 of mantissa, no infinity; one f32 scale for each 128 x 128 block.

use crate::experts::{SCALE_BLOCK, scales_len};

/// The value of some bits.
pub fn decode(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let size = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if bits & 0x80 == 0 { size } else { -size }
}

/// The bits of the nearest value, up to 448; the even ones of two. NaN is 0x7f.
pub fn encode(value: f32) -> u8 {
    if value.is_nan() {
        return 0x7f;
    }
    let size = value.abs().min(448.0);
    let distance = |bits: u8| (f64::from(decode(bits)) - f64::from(size)).abs();
    let nearest = (0..0x7f).min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1)))).unwrap_or(0);
    nearest | u8::from(value.is_sign_negative()) << 7
}

/// `[experts, n, k]` as (values, scales).
pub fn quantize_blocks(weight: &[f32], experts: usize, n: usize, k: usize) -> (Vec<u8>, Vec<f32>) {
    let mut largest = vec![0f32; scales_len(experts, n, k)];
    let block = |at: usize| block_of(at, n, k);
    for (at, value) in weight.iter().enumerate() {
        let largest = &mut largest[block(at)];
        *largest = if value.is_finite() && !largest.is_nan() { largest.max(value.abs()) } else { f32::NAN };
    }
    let scales: Vec<f32> = largest.iter().map(|&largest| if largest == 0.0 { 1.0 } else { largest / 448.0 }).collect();
    let values = weight.iter().enumerate().map(|(at, value)| encode(value / scales[block(at)])).collect();
    (values, scales)
}

/// The weights that values and scales stand for.
pub fn widen(values: &[u8], scales: &[f32], n: usize, k: usize) -> Vec<f32> {
    values.iter().enumerate().map(|(at, &bits)| decode(bits) * scales[block_of(at, n, k)]).collect()
}

/// The block of an element of `[experts, n, k]`.
fn block_of(at: usize, n: usize, k: usize) -> usize {
    let (expert, row, column) = (at / (n * k), at / k % n, at % k);
    (expert * n.div_ceil(SCALE_BLOCK) + row / SCALE_BLOCK) * k.div_ceil(SCALE_BLOCK) + column / SCALE_BLOCK
}
