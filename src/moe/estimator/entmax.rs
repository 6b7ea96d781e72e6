//! α-entmax (Peters, Niculae and Martins 2019): `p = [(α-1) z - t]_+^(1/(α-1))`, t such that the sum is 1.
//!
//! Exact by sorting for sparsemax (α = 2; Martins and Astudillo 2016) and entmax-1.5, by bisection otherwise. One-hot
//! exactly where the largest logit leads by `temperature / (α-1)`.

use super::relax::{dot, max};

/// Halvings after which the threshold is known to the last bit.
const HALVINGS: usize = 60;

/// Entmax of `z / temperature` into `p`.
pub(super) fn value(z: &[f64], alpha: f64, temperature: f64, p: &mut [f64]) {
    let max = max(z);
    let x: Vec<f64> = z.iter().map(|z| (alpha - 1.0) * (z - max) / temperature).collect();
    let threshold = match alpha {
        2.0 => sparsemax_threshold(&x),
        1.5 => entmax15_threshold(&x),
        _ => bisect(&x, alpha),
    };
    fill(&x, threshold, alpha, p);
    let sum: f64 = p.iter().sum();
    p.iter_mut().for_each(|p| *p /= sum);
}

/// `s ⊙ v - s <s,v>/<s,1>` with `s = p^(2-α)` on the support.
pub(super) fn vjp(p: &[f64], alpha: f64, temperature: f64, v: &[f64], dz: &mut [f64]) {
    let s: Vec<f64> = p.iter().map(|&p| if p > 0.0 { p.powf(2.0 - alpha) } else { 0.0 }).collect();
    let mean = dot(&s, v) / s.iter().sum::<f64>();
    dz.iter_mut().zip(&s).zip(v).for_each(|((dz, s), v)| *dz += s * (v - mean) / temperature);
}

fn fill(x: &[f64], threshold: f64, alpha: f64, p: &mut [f64]) {
    p.iter_mut().zip(x).for_each(|(p, x)| *p = (x - threshold).max(0.0).powf(1.0 / (alpha - 1.0)));
}

/// Largest first.
fn sorted(x: &[f64]) -> Vec<f64> {
    let mut sorted = x.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    sorted
}

fn sparsemax_threshold(x: &[f64]) -> f64 {
    let (mut sum, mut threshold) = (0.0, 0.0);
    for (j, u) in sorted(x).into_iter().enumerate() {
        sum += u;
        let size = (j + 1) as f64;
        if 1.0 + size * u > sum {
            threshold = (sum - 1.0) / size;
        }
    }
    threshold
}

fn entmax15_threshold(x: &[f64]) -> f64 {
    let (mut sum, mut squares, mut threshold) = (0.0, 0.0, 0.0);
    for (j, u) in sorted(x).into_iter().enumerate() {
        sum += u;
        squares += u * u;
        let size = (j + 1) as f64;
        let mean = sum / size;
        let delta = (1.0 - (squares - size * mean * mean)) / size;
        let candidate = mean - delta.max(0.0).sqrt();
        if candidate <= u {
            threshold = candidate;
        }
    }
    threshold
}

/// `x` with maximum 0: t lies in `[-1, -E^(1-α)]`; the lower end keeps a sum of at least 1.
pub(super) fn bisect(x: &[f64], alpha: f64) -> f64 {
    let (mut low, mut high) = (-1.0, -(x.len() as f64).powf(1.0 - alpha));
    let mut p = vec![0.0; x.len()];
    for _ in 0..HALVINGS {
        let middle = 0.5 * (low + high);
        fill(x, middle, alpha, &mut p);
        if p.iter().sum::<f64>() >= 1.0 {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}
