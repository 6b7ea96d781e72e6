//! Sparsemax and entmax against the `entmax` package: `tests/parity/make_entmax.py` wrote what it computes.

use serde::Deserialize;

use super::*;
use crate::moe::estimator::{Relaxation, entmax};

#[derive(Deserialize)]
struct Case {
    alpha: f64,
    z: Vec<f64>,
    p: Vec<f64>,
    v: Vec<f64>,
    vjp: Vec<f64>,
}

fn cases() -> Vec<Case> {
    serde_json::from_str(include_str!("../../../../tests/goldens/entmax.json")).unwrap()
}

#[test]
fn weights_and_gradients_are_those_of_the_package() {
    let cases = cases();
    assert!(cases.len() >= 50 && cases.iter().any(|case| case.alpha == 2.0) && cases.iter().any(|case| case.alpha == 1.5));
    for Case { alpha, z, p, v, vjp } in cases {
        let relaxation = Relaxation::Entmax { alpha, temperature: 1.0 };
        let (mut found, mut dz) = (vec![0.0; z.len()], vec![0.0; z.len()]);
        relaxation.value(&z, &mut found);
        assert_close(&found, &p, 1e-12, &format!("alpha {alpha}, z {z:?}"));
        relaxation.vjp(&z, &found, &v, &mut dz);
        // Its bisection stops where rows sum to 1 only to 1e-13 or so, and small p count in the gradient.
        assert_close(&dz, &vjp, 1e-9, &format!("gradient at alpha {alpha}, z {z:?}"));
    }
}

#[test]
fn exact_algorithms_agree_with_halving() {
    for alpha in [1.5, 2.0] {
        for row in 0..200 {
            let z = normals(row, 12, 0.1 + 0.02 * row as f64);
            let mut exact = vec![0.0; z.len()];
            entmax::value(&z, alpha, 1.0, &mut exact);
            let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let x: Vec<f64> = z.iter().map(|z| (alpha - 1.0) * (z - top)).collect();
            let threshold = entmax::bisect(&x, alpha);
            let halved: Vec<f64> = x.iter().map(|x| (x - threshold).max(0.0).powf(1.0 / (alpha - 1.0))).collect();
            assert_close(&exact, &halved, 1e-12, &format!("alpha {alpha}, row {row}"));
        }
    }
}

#[test]
fn one_hot_exactly_from_a_margin_on() {
    for (alpha, temperature) in [(2.0, 1.0), (1.5, 1.0), (1.25, 1.0), (1.5, 0.5), (2.0, 3.0)] {
        let margin = temperature / (alpha - 1.0);
        for (lead, one_hot) in [(margin * 0.99, false), (margin * 1.01, true)] {
            let mut p = vec![0.0; 3];
            Relaxation::Entmax { alpha, temperature }.value(&[lead, 0.0, -7.0], &mut p);
            assert_eq!(p[1] == 0.0, one_hot, "alpha {alpha}, lead {lead}: {p:?}");
            assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-15);
        }
    }
}
