//! The softmax of routing and of its losses.

/// `softmax(z / temperature)` into `out`; returns `logsumexp(z / temperature)`.
pub(super) fn softmax(z: &[f64], temperature: f64, out: &mut [f64]) -> f64 {
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    out.iter_mut().zip(z).for_each(|(p, z)| *p = ((z - max) / temperature).exp());
    let sum: f64 = out.iter().sum();
    out.iter_mut().for_each(|p| *p /= sum);
    max / temperature + sum.ln()
}
