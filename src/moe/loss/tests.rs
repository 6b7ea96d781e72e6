//! Values at known points, and every gradient against finite differences.

use super::*;
use crate::moe::choices::Choices;

/// Reproducible numbers in (-1, 1).
fn numbers(n: usize, seed: u64) -> Vec<f64> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Top-k of every row, as selection makes them.
fn top_k(z: &[f64], experts: usize, width: usize, k: usize) -> Choices {
    Choices::from_rows(z.chunks_exact(width).map(|row| {
        let mut order: Vec<u32> = (0..experts as u32).collect();
        order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]).then(a.cmp(&b)));
        order.truncate(k);
        order
    }))
}

fn input<'a>(z: &'a [f64], experts: usize, choices: &'a Choices, k: usize) -> LossInput<'a> {
    LossInput { z, experts, temperature: 1.0, choices: choices.rows(), k, sequences: &[], global_load: None, noise: None, teacher: None }
}

fn value(loss: AuxLoss, input: &LossInput<'_>) -> f64 {
    loss.value_and_grad(input, 1.0, &mut vec![0.0; input.z.len()]).unwrap()
}

/// Largest difference between the gradient and central differences, relative to the largest component.
fn fd_error(loss: AuxLoss, input: &LossInput<'_>) -> f64 {
    let mut dz = vec![0.0; input.z.len()];
    loss.value_and_grad(input, 1.0, &mut dz).unwrap();
    let h = 1e-5;
    let numeric: Vec<f64> = (0..input.z.len())
        .map(|i| {
            let at = |shift: f64| {
                let mut z = input.z.to_vec();
                z[i] += shift;
                value(loss, &LossInput { z: &z, ..*input })
            };
            (at(h) - at(-h)) / (2.0 * h)
        })
        .collect();
    let size = numeric.iter().fold(0.0, |max: f64, n| max.max(n.abs()));
    assert!(size > 1e-6, "{}: the test point has a gradient", loss.id());
    dz.iter().zip(&numeric).fold(0.0, |max: f64, (a, n)| max.max((a - n).abs())) / size
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let (experts, width, tokens) = (5, 7, 11);
    let z: Vec<f64> = numbers(tokens * width, 3).iter().map(|n| 2.0 * n).collect();
    for k in [1, 2] {
        let choices = top_k(&z, experts, width, k);
        for temperature in [1.0, 0.4] {
            for loss in AuxLoss::ALL {
                let error = fd_error(loss, &LossInput { temperature, ..input(&z, experts, &choices, k) });
                assert!(error < 1e-7, "{} k={k} τ={temperature}: {error:e}", loss.id());
            }
        }
    }
}
