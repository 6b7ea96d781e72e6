//! Soft top-k with one shared threshold: `p = F((z - b) / width) / k`, b such that the sum is 1.
//!
//! F is a distribution function with a density symmetric about 0. One solver serves all three: the sum falls in b, so b
//! is found by Newton steps inside a bracket that halves when a step leaves it.

use super::{
    Kernel,
    relax::{dot, max, sigmoid},
};

/// Steps of the solver: Newton takes about eight, halving alone 60 where logits are of one size. Of the widest that f64
/// has halving alone is done after 1,100.
const STEPS: usize = 1200;

/// A share from which on it counts as 1: p times k need not be.
const SATURATED: f64 = 1.0 - 1e-12;

/// Relative error of the sum that no step would better.
const ROUNDING: f64 = 4.0 * f64::EPSILON;

/// The k largest softly, each at most 1/k. No more than k logits: all of them alike.
pub(super) fn value(z: &[f64], kernel: Kernel, width: f64, k: usize, p: &mut [f64]) {
    if z.len() <= k {
        return p.fill(1.0 / z.len() as f64);
    }
    let b = threshold(z, kernel, width, k);
    p.iter_mut().zip(z).for_each(|(p, z)| *p = kernel.share((z - b) / width) / k as f64);
}

/// `(q ⊙ v - q <q,v>/<q,1>) / (width k)` with q the density; 0 where every share is saturated.
pub(super) fn vjp(p: &[f64], kernel: Kernel, width: f64, k: usize, v: &[f64], dz: &mut [f64]) {
    if p.len() <= k {
        return;
    }
    let q: Vec<f64> = p.iter().map(|p| kernel.density_of_share(p * k as f64)).collect();
    let total: f64 = q.iter().sum();
    if total > 0.0 {
        let mean = dot(&q, v) / total;
        dz.iter_mut().zip(&q).zip(v).for_each(|((dz, q), v)| *dz += q * (v - mean) / (width * k as f64));
    }
}

fn threshold(z: &[f64], kernel: Kernel, width: f64, k: usize) -> f64 {
    let margin = width * kernel.inverse(k as f64 / z.len() as f64);
    let min = z.iter().copied().fold(f64::INFINITY, f64::min);
    let (mut low, mut high) = (min - margin, max(z) - margin);
    let mut b = 0.5 * (low + high);
    for _ in 0..STEPS {
        let (mut excess, mut slope) = (-(k as f64), 0.0);
        for z in z {
            let share = kernel.share((z - b) / width);
            excess += share;
            slope += kernel.density_of_share(share) / width;
        }
        if excess.abs() <= ROUNDING * k as f64 {
            break;
        }
        if excess > 0.0 {
            low = b;
        } else {
            high = b;
        }
        let newton = b + excess / slope;
        let next = if newton > low && newton < high { newton } else { 0.5 * (low + high) };
        if next == b {
            break;
        }
        b = next;
    }
    b
}

impl Kernel {
    /// `F(x)`.
    fn share(self, x: f64) -> f64 {
        match self {
            Self::Laplace if x < 0.0 => 0.5 * x.exp(),
            Self::Laplace => 1.0 - 0.5 * (-x).exp(),
            Self::Logistic => sigmoid(x),
            Self::Clip => x.clamp(0.0, 1.0),
        }
    }

    /// `F'(x)` where `F(x) = share`.
    fn density_of_share(self, share: f64) -> f64 {
        match self {
            Self::Laplace => share.min(1.0 - share),
            Self::Logistic => share * (1.0 - share),
            Self::Clip => f64::from(share > 0.0 && share < SATURATED),
        }
    }

    /// `F⁻¹(share)`, share in (0, 1).
    fn inverse(self, share: f64) -> f64 {
        match self {
            Self::Laplace if share <= 0.5 => (2.0 * share).ln(),
            Self::Laplace => -(2.0 * (1.0 - share)).ln(),
            Self::Logistic => (share / (1.0 - share)).ln(),
            Self::Clip => share,
        }
    }
}
