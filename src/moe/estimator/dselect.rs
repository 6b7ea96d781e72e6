//! DSelect-k (Hazimeh et al. 2021): `p = Σ_s softmax(v)_s r_s`, `r_se = Π_b S(ζ_sb)` or `1 - S(ζ_sb)` by bit b of e.
//!
//! S is a cubic step that reaches 0 and 1 exactly, so selectors end as single experts. Where E is no power of two the
//! codes above E are no experts, and the weights sum to less than 1 until [`regulariser`] has driven the mass off them.

use super::relax::{bits, softmax, softmax_vjp};

/// Columns of a router row: k scores, then `bits` columns of each selector.
struct Selectors<'a> {
    scores: &'a [f64],
    codes: std::slice::ChunksExact<'a, f64>,
}

fn selectors(z: &[f64], k: usize, experts: usize) -> Selectors<'_> {
    let (scores, codes) = z.split_at(k);
    Selectors { scores, codes: codes.chunks_exact(bits(experts).max(1)) }
}

pub(super) fn value(z: &[f64], gamma: f64, k: usize, p: &mut [f64]) {
    let Selectors { scores, codes } = selectors(z, k, p.len());
    let mut mix = vec![0.0; k];
    softmax(scores, 1.0, &mut mix);
    p.fill(0.0);
    let mut r = vec![0.0; p.len()];
    for (mix, code) in mix.iter().zip(with_no_bits(codes, k)) {
        selector(code, gamma, &mut r);
        p.iter_mut().zip(&r).for_each(|(p, r)| *p += mix * r);
    }
}

/// An expert whose weight is exactly 0 has a saturated bit in every selector, so whatever its `v` it adds nothing.
pub(super) fn vjp(z: &[f64], gamma: f64, k: usize, p: &[f64], v: &[f64], dz: &mut [f64]) {
    let v: Vec<f64> = p.iter().zip(v).map(|(&p, &v)| if p > 0.0 { v } else { 0.0 }).collect();
    let Selectors { scores, codes } = selectors(z, k, p.len());
    let mut mix = vec![0.0; k];
    softmax(scores, 1.0, &mut mix);
    let (d_scores, d_codes) = dz.split_at_mut(k);
    let width = bits(p.len());
    let mut value_of = vec![0.0; k];
    let mut r = vec![0.0; p.len()];
    for (s, code) in with_no_bits(codes, k).enumerate() {
        selector(code, gamma, &mut r);
        value_of[s] = super::relax::dot(&r, &v);
        selector_vjp(code, gamma, &v, mix[s], &mut d_codes[s * width..][..width]);
    }
    softmax_vjp(&mix, &value_of, 1.0, d_scores);
}

/// `Σ_s H(r_s)`, and `Σ_s 1 / Σ_e r_se` where E is no power of two: mean over rows, times `weight`. `dz += ∂/∂z`.
///
/// Entropy drives selectors to single experts; the second term keeps them on codes that are experts.
pub(super) fn regulariser(z: &[f64], experts: usize, gamma: f64, k: usize, weight: f64, dz: &mut [f64]) -> f64 {
    let width = bits(experts);
    let columns = k * (1 + width);
    let rows = z.len() / columns.max(1);
    let scale = weight / rows.max(1) as f64;
    let (mut r, mut v) = (vec![0.0; experts], vec![0.0; experts]);
    let mut total = 0.0;
    for (z, dz) in z.chunks_exact(columns).zip(dz.chunks_exact_mut(columns)).filter(|(z, _)| z.iter().all(|z| z.is_finite())) {
        let codes = selectors(z, k, experts).codes;
        for (s, code) in with_no_bits(codes, k).enumerate() {
            selector(code, gamma, &mut r);
            let mass: f64 = r.iter().sum();
            total += r.iter().map(|&r| if r > 0.0 { -r * r.ln() } else { 0.0 }).sum::<f64>();
            v.iter_mut().zip(&r).for_each(|(v, &r)| *v = if r > 0.0 { -(r.ln() + 1.0) } else { 0.0 });
            // A selector wholly off the experts has no gradient by which to come back.
            if !experts.is_power_of_two() && mass > 0.0 {
                total += 1.0 / mass;
                v.iter_mut().for_each(|v| *v -= 1.0 / (mass * mass));
            }
            selector_vjp(code, gamma, &v, scale, &mut dz[k + s * width..][..width]);
        }
    }
    scale * total
}

/// The code columns of each of `k` selectors; with one expert there are none.
fn with_no_bits<'a>(codes: std::slice::ChunksExact<'a, f64>, k: usize) -> impl Iterator<Item = &'a [f64]> {
    codes.chain(std::iter::repeat(&[][..])).take(k)
}

/// `r [E]` of one selector.
fn selector(code: &[f64], gamma: f64, r: &mut [f64]) {
    let steps: Vec<f64> = code.iter().map(|&t| step(t, gamma)).collect();
    for (e, r) in r.iter_mut().enumerate() {
        *r = steps.iter().enumerate().map(|(bit, s)| if e >> bit & 1 == 1 { *s } else { 1.0 - s }).product();
    }
}

/// `d_code += factor · (∂r/∂code)ᵀ v`.
fn selector_vjp(code: &[f64], gamma: f64, v: &[f64], factor: f64, d_code: &mut [f64]) {
    let steps: Vec<f64> = code.iter().map(|&t| step(t, gamma)).collect();
    for (bit, d_code) in d_code.iter_mut().enumerate() {
        let slope = factor * slope(code[bit], gamma);
        for (e, v) in v.iter().enumerate() {
            let others: f64 = (0..steps.len())
                .filter(|other| *other != bit)
                .map(|other| if e >> other & 1 == 1 { steps[other] } else { 1.0 - steps[other] })
                .product();
            *d_code += slope * v * if e >> bit & 1 == 1 { others } else { -others };
        }
    }
}

/// 0 below `-gamma/2`, 1 above `gamma/2`, a cubic between.
fn step(t: f64, gamma: f64) -> f64 {
    let u = t / gamma;
    if u <= -0.5 {
        0.0
    } else if u >= 0.5 {
        1.0
    } else {
        -2.0 * u.powi(3) + 1.5 * u + 0.5
    }
}

fn slope(t: f64, gamma: f64) -> f64 {
    let u = t / gamma;
    if u.abs() >= 0.5 { 0.0 } else { (1.5 - 6.0 * u * u) / gamma }
}
