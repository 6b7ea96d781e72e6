//! What the kernels compute, in plain f32 and in the obvious way.

mod attention;
pub mod e4m3;
mod fill;
mod grouped;
pub mod moe;
mod sample;

pub use self::{
    attention::{Paged, Shaping, attend, shape_token},
    fill::normal,
    grouped::{gather_rows, grouped, silu_mul},
    sample::sample,
};

/// `y [rows, n] = x [rows, k] · weight [n, k]ᵀ`.
pub fn linear(x: &[f32], weight: &[f32], k: usize) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32;
    x.chunks_exact(k).flat_map(|row| weight.chunks_exact(k).map(move |weight| dot(row, weight))).collect()
}

/// RMSNorm of each row of `weight.len()`.
pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let row = |row: &[f32]| {
        let squares = row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>() / row.len() as f64;
        let scale = 1.0 / (squares + f64::from(epsilon)).sqrt();
        row.iter().zip(weight).map(|(x, w)| (f64::from(*x) * scale * f64::from(*w)) as f32).collect::<Vec<_>>()
    };
    x.chunks_exact(weight.len()).flat_map(row).collect()
}
