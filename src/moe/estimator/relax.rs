//! Relaxations of one row: value and vector-Jacobian product. An expert whose logit is -inf is left out: its weight is 0,
//! and the others are what they would be without it.

use super::{Mask, Relaxation, dselect, entmax, soft_topk};
pub(super) use crate::moe::softmax::softmax;

impl Relaxation {
    /// Weights `p [E]` of the experts at router outputs `z`: `[E]` of them, more under [`Relaxation::SmoothStep`].
    pub fn value(&self, z: &[f64], p: &mut [f64]) {
        match *self {
            Self::SmoothStep { gamma, k } => dselect::value(z, gamma, k, p),
            _ => match Alive::of(z) {
                None => self.all(z, p),
                Some(alive) => {
                    let mut inner = vec![0.0; alive.z.len()];
                    self.all(&alive.z, &mut inner);
                    p.fill(0.0);
                    alive.scatter(&inner, p);
                }
            },
        }
    }

    /// `dz += Jᵀ v`, where `p` is the value at `z`.
    pub fn vjp(&self, z: &[f64], p: &[f64], v: &[f64], dz: &mut [f64]) {
        match *self {
            Self::SmoothStep { gamma, k } => dselect::vjp(z, gamma, k, p, v, dz),
            _ => match Alive::of(z) {
                None => self.all_vjp(z, p, v, dz),
                Some(alive) => {
                    let mut inner = vec![0.0; alive.z.len()];
                    self.all_vjp(&alive.z, &alive.gather(p), &alive.gather(v), &mut inner);
                    alive.scatter(&inner, dz);
                }
            },
        }
    }

    fn all(&self, z: &[f64], p: &mut [f64]) {
        match *self {
            Self::Softmax { temperature } => _ = softmax(z, temperature, p),
            Self::Sigmoid { temperature } => p.iter_mut().zip(z).for_each(|(p, z)| *p = sigmoid(z / temperature)),
            Self::SteepSigmoid { temperature, k } => steep_sigmoid(z, temperature, k, p),
            Self::Entmax { alpha, temperature } => entmax::value(z, alpha, temperature, p),
            Self::SoftTopK { kernel, width, k } => soft_topk::value(z, kernel, width, k, p),
            Self::KHot { temperature, k } => k_hot(z, temperature, k, p),
            Self::MaskedSoftmax { r, temperature, mask } => masked_softmax(z, r, temperature, mask, p),
            Self::SmoothStep { gamma, k } => dselect::value(z, gamma, k, p),
            Self::Relu => p.iter_mut().zip(z).for_each(|(p, z)| *p = z.max(0.0)),
        }
    }

    fn all_vjp(&self, z: &[f64], p: &[f64], v: &[f64], dz: &mut [f64]) {
        match *self {
            Self::Softmax { temperature } | Self::MaskedSoftmax { temperature, .. } => softmax_vjp(p, v, 1.0 / temperature, dz),
            Self::Sigmoid { temperature } => {
                dz.iter_mut().zip(p).zip(v).for_each(|((dz, p), v)| *dz += p * (1.0 - p) * v / temperature);
            }
            Self::SteepSigmoid { temperature, k } => steep_sigmoid_vjp(z, temperature, k, v, dz),
            Self::Entmax { alpha, temperature } => entmax::vjp(p, alpha, temperature, v, dz),
            Self::SoftTopK { kernel, width, k } => soft_topk::vjp(p, kernel, width, k, v, dz),
            Self::KHot { temperature, k } => k_hot_vjp(z, temperature, k, v, dz),
            Self::SmoothStep { gamma, k } => dselect::vjp(z, gamma, k, p, v, dz),
            Self::Relu => dz.iter_mut().zip(z).zip(v).for_each(|((dz, z), v)| *dz += if *z > 0.0 { *v } else { 0.0 }),
        }
    }
}

/// The experts of a row that are not left out.
struct Alive {
    index: Vec<usize>,
    z: Vec<f64>,
}

impl Alive {
    /// `None` where none is left out.
    fn of(z: &[f64]) -> Option<Self> {
        if !z.contains(&f64::NEG_INFINITY) {
            return None;
        }
        let (index, z) = z.iter().enumerate().filter(|(_, z)| **z > f64::NEG_INFINITY).unzip();
        Some(Self { index, z })
    }

    fn gather(&self, row: &[f64]) -> Vec<f64> {
        self.index.iter().map(|&e| row[e]).collect()
    }

    fn scatter(&self, inner: &[f64], row: &mut [f64]) {
        self.index.iter().zip(inner).for_each(|(&e, x)| row[e] += x);
    }
}

/// `dz += factor · p ⊙ (v - <p,v>)`.
pub(super) fn softmax_vjp(p: &[f64], v: &[f64], factor: f64, dz: &mut [f64]) {
    let inner = dot(p, v);
    dz.iter_mut().zip(p).zip(v).for_each(|((dz, p), v)| *dz += factor * p * (v - inner));
}

/// Which logits a masked softmax keeps: those near the largest.
pub(super) fn kept(z: &[f64], r: f64, mask: Mask) -> Vec<bool> {
    let max = max(z);
    z.iter()
        .map(|&z| match mask {
            // Where both are 0 the distance is 0 too.
            Mask::Code => max - z <= 2.0 * r * z.abs().max(max),
            Mask::Paper => max - z <= r * (z.abs() + max.abs()),
        })
        .collect()
}

fn masked_softmax(z: &[f64], r: f64, temperature: f64, mask: Mask, p: &mut [f64]) {
    let masked: Vec<f64> = z.iter().zip(kept(z, r, mask)).map(|(&z, kept)| if kept { z } else { f64::NEG_INFINITY }).collect();
    softmax(&masked, temperature, p);
}

/// Indices of the two logits between which the threshold of `k` experts lies; `None` if there are no more than k.
fn threshold(z: &[f64], k: usize) -> Option<[usize; 2]> {
    let mut order: Vec<usize> = (0..z.len()).collect();
    order.sort_by(|&a, &b| z[b].total_cmp(&z[a]).then(a.cmp(&b)));
    Some([*order.get(k.checked_sub(1)?)?, *order.get(k)?])
}

fn steep_sigmoid(z: &[f64], temperature: f64, k: usize, p: &mut [f64]) {
    let Some([last, next]) = threshold(z, k) else {
        return p.fill(1.0 / z.len() as f64);
    };
    let theta = 0.5 * (z[last] + z[next]);
    p.iter_mut().zip(z).for_each(|(p, z)| *p = sigmoid((z - theta) / temperature));
    let sum: f64 = p.iter().sum();
    p.iter_mut().for_each(|p| *p /= sum);
}

fn steep_sigmoid_vjp(z: &[f64], temperature: f64, k: usize, v: &[f64], dz: &mut [f64]) {
    let Some([last, next]) = threshold(z, k) else { return };
    let theta = 0.5 * (z[last] + z[next]);
    let steps: Vec<f64> = z.iter().map(|z| sigmoid((z - theta) / temperature)).collect();
    let sum: f64 = steps.iter().sum();
    let mean = dot(&steps, v) / sum;
    let mut down = 0.0;
    for ((dz, s), v) in dz.iter_mut().zip(&steps).zip(v) {
        let slope = s * (1.0 - s) * (v - mean) / (sum * temperature);
        *dz += slope;
        down += slope;
    }
    dz[last] -= 0.5 * down;
    dz[next] -= 0.5 * down;
}

/// The softmaxes of a k-hot relaxation, one after the other.
fn k_hot_steps(z: &[f64], temperature: f64, k: usize) -> Vec<Vec<f64>> {
    let mut logits = z.to_vec();
    let mut steps = Vec::with_capacity(k);
    for _ in 0..k {
        let mut q = vec![0.0; z.len()];
        softmax(&logits, temperature, &mut q);
        logits.iter_mut().zip(rest(&q)).for_each(|(a, rest)| *a += rest.ln());
        steps.push(q);
    }
    steps
}

/// `1 - q`, of the largest as the sum of the others: it keeps its digits when q rounds to 1.
fn rest(q: &[f64]) -> Vec<f64> {
    let top = (1..q.len()).fold(0, |best, e| if q[e] > q[best] { e } else { best });
    let others: f64 = q.iter().enumerate().filter(|(e, _)| *e != top).map(|(_, q)| q).sum();
    q.iter().enumerate().map(|(e, q)| if e == top { others } else { 1.0 - q }.max(f64::MIN_POSITIVE)).collect()
}

fn k_hot(z: &[f64], temperature: f64, k: usize, p: &mut [f64]) {
    p.fill(0.0);
    for q in k_hot_steps(z, temperature, k) {
        p.iter_mut().zip(q).for_each(|(p, q)| *p += q / k as f64);
    }
}

fn k_hot_vjp(z: &[f64], temperature: f64, k: usize, v: &[f64], dz: &mut [f64]) {
    // Gradient of the logits of the step after the one at hand.
    let mut after = vec![0.0; z.len()];
    for (step, q) in k_hot_steps(z, temperature, k).iter().enumerate().rev() {
        let u: Vec<f64> = if step + 1 == k {
            v.iter().map(|v| v / k as f64).collect()
        } else {
            v.iter().zip(&after).zip(rest(q)).map(|((v, after), rest)| v / k as f64 - after / rest).collect()
        };
        // `q_e Σ_i q_i (u_e - u_i)` pair by pair: u of a saturated expert is large, and differences would lose the rest.
        for (e, after) in after.iter_mut().enumerate() {
            let spread: f64 = q.iter().zip(&u).enumerate().filter(|(i, _)| *i != e).map(|(_, (q, other))| q * (u[e] - other)).sum();
            *after += q[e] * spread / temperature;
        }
    }
    dz.iter_mut().zip(after).for_each(|(dz, after)| *dz += after);
}

pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `ln(1 + e^x)`.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// Deviation of learned noise: softplus, and what the code of Shazeer et al. adds so that it is never 0.
pub(super) fn deviation(x: f64) -> f64 {
    softplus(x) + 1e-2
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(super) fn max(z: &[f64]) -> f64 {
    z.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

/// Bits that number `experts` experts.
pub(super) fn bits(experts: usize) -> usize {
    experts.next_power_of_two().trailing_zeros() as usize
}
