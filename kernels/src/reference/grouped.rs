//! Of experts with many rows. [`crate::grouped`] has the shapes.

use super::linear;

/// `y[r] = weight[e] · x[r]` for the rows `offsets[e] .. offsets[e + 1]` of each expert.
pub fn grouped(x: &[f32], weight: &[f32], offsets: &[u32], n: usize, k: usize) -> Vec<f32> {
    let of_expert = |(rows, weight): (&[u32], &[f32])| linear(&x[rows[0] as usize * k..rows[1] as usize * k], weight, k);
    offsets.windows(2).zip(weight.chunks_exact(n * k)).flat_map(of_expert).collect()
}

/// The token of each slot in `rows`.
pub fn gather_rows(x: &[f32], rows: &[u32], slots: usize, width: usize) -> Vec<f32> {
    rows.iter().flat_map(|&slot| &x[slot as usize / slots * width..][..width]).copied().collect()
}

/// `silu(gate) · up` of rows `[gate, up]`.
pub fn silu_mul(gate_up: &[f32], width: usize) -> Vec<f32> {
    let row = |row: &[f32]| row[..width].iter().zip(&row[width..]).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect::<Vec<_>>();
    gate_up.chunks_exact(2 * width).flat_map(row).collect()
}
