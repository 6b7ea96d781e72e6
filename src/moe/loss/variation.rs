//! Squared coefficients of variation, of importance and of load (Shazeer et al. 2017).

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use super::{
    AuxLoss, lacks,
    softmax::{Sink, View},
};
use crate::error::{Error, Result};

/// `CV²(Σ_t p_t)`.
pub(super) fn importance(view: &View<'_>, sink: &mut Sink<'_>) -> f64 {
    let (value, gradient) = cv_squared(&view.sum_p(&view.live));
    view.live.iter().for_each(|&t| sink.through_p(view, t, |e| gradient[e]));
    value
}

/// `CV²(mean_t Φ((z_te - thr_t) / σ_te))`.
pub(super) fn load(view: &View<'_>, sink: &mut Sink<'_>) -> Result<f64> {
    let noise = view.input.noise.ok_or_else(|| lacks(AuxLoss::Load, "noise on the choice"))?;
    let (experts, n) = (view.experts(), view.tokens());
    let all = view.input.choices.tokens() * experts;
    if noise.seen.len() != all || (noise.std.len() != 1 && noise.std.len() != all) {
        let message = format!("noise of {} logits with {} deviations for {all}", noise.seen.len(), noise.std.len());
        return Err(Error::Internal(message));
    }
    let std = |t: usize, e: usize| noise.std.get(t * experts + e).or(noise.std.first()).copied().unwrap_or(1.0);
    let win = |t: usize| {
        let (z, threshold) = (view.z(t), kth_largest(view.row(noise.seen, t), view.input.k));
        (0..experts).map(move |e| (z[e] - threshold) / std(t, e))
    };
    let mut mean = vec![0.0; experts];
    for &t in &view.live {
        mean.iter_mut().zip(win(t)).for_each(|(mean, x)| *mean += normal_cdf(x) / n);
    }
    let (value, gradient) = cv_squared(&mean);
    for &t in &view.live {
        let slope: Vec<f64> = win(t).enumerate().map(|(e, x)| gradient[e] * density(x) / std(t, e) / n).collect();
        sink.direct(view, t, |e| slope[e]);
    }
    Ok(value)
}

/// Population variance over squared mean, and its gradient; 0 where the mean is.
fn cv_squared(x: &[f64]) -> (f64, Vec<f64>) {
    let n = x.len().max(1) as f64;
    let mean = x.iter().sum::<f64>() / n;
    if mean == 0.0 {
        return (0.0, vec![0.0; x.len()]);
    }
    let value = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n / mean.powi(2);
    (value, x.iter().map(|x| 2.0 / (n * mean) * ((x - mean) / mean - value)).collect())
}

/// The k-th largest; k = 0 counts as 1, and beyond the row as its last.
fn kth_largest(row: &[f64], k: usize) -> f64 {
    let mut sorted = row.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    sorted.get(k.clamp(1, row.len().max(1)) - 1).copied().unwrap_or(0.0)
}

fn density(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * PI).sqrt()
}

/// Φ: its power series around 0, and the continued fraction of its tail (Abramowitz and Stegun, 26.2.11 and 26.2.14).
fn normal_cdf(x: f64) -> f64 {
    let tail = x.abs() * FRAC_1_SQRT_2 > 3.0;
    if tail {
        let fraction = (1..=40).rev().fold(x.abs(), |inner, i| x.abs() + f64::from(i) / inner);
        let upper = density(x) / fraction;
        return if x > 0.0 { 1.0 - upper } else { upper };
    }
    let (mut term, mut sum) = (x, x);
    for i in 1..100 {
        term *= x * x / f64::from(2 * i + 1);
        sum += term;
    }
    0.5 + density(x) * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_normal_distribution_function() {
        for (x, expected) in [
            (0.0, 0.5),
            (1.0, 0.841_344_746_068_542_9),
            (-1.0, 0.158_655_253_931_457_05),
            (3.0, 0.998_650_101_968_369_9),
            (-4.0, 3.167_124_183_311_992e-5),
            (-5.0, 2.866_515_718_791_939e-7),
            (-10.0, 7.619_853_024_160_525e-24),
        ] {
            let got = normal_cdf(x);
            assert!((got - expected).abs() <= 1e-12 * expected, "Φ({x}) = {got}");
        }
        let seam = 3.0 / FRAC_1_SQRT_2;
        assert!((normal_cdf(-seam - 1e-12) / normal_cdf(-seam + 1e-12) - 1.0).abs() < 1e-10);
    }
}
