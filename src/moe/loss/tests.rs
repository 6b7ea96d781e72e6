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

/// A batch on which every loss is defined: two sequences and a token outside them, a token with NaN, noise, a teacher,
/// and more columns than experts.
struct Batch {
    z: Vec<f64>,
    choices: Choices,
    k: usize,
    seen: Vec<f64>,
    std: Vec<f64>,
    teacher: Vec<f64>,
}

const EXPERTS: usize = 5;
const WIDTH: usize = 7;
const TOKENS: usize = 11;

impl Batch {
    fn new(k: usize) -> Self {
        let z: Vec<f64> = numbers(TOKENS * WIDTH, 3).iter().map(|n| 2.0 * n).collect();
        let logits: Vec<f64> = z.chunks_exact(WIDTH).flat_map(|row| &row[..EXPERTS]).copied().collect();
        let seen: Vec<f64> = logits.iter().zip(numbers(TOKENS * EXPERTS, 4)).map(|(z, n)| z + 0.5 * n).collect();
        let std = numbers(TOKENS * EXPERTS, 5).iter().map(|n| 1.0 + 0.5 * n).collect();
        let mut teacher = vec![0.0; TOKENS * EXPERTS];
        for (p, z) in teacher.chunks_exact_mut(EXPERTS).zip(numbers(TOKENS * EXPERTS, 6).chunks_exact(EXPERTS)) {
            softmax::softmax(z, 0.5, p);
        }
        Self { choices: top_k(&z, EXPERTS, WIDTH, k), z, k, seen, std, teacher }
    }

    fn input(&self) -> LossInput<'_> {
        LossInput {
            sequences: &[0..4, 4..10],
            global_load: Some(&[3.0, 9.0, 1.0, 0.0, 7.0]),
            noise: Some(LossNoise { seen: &self.seen, std: &self.std }),
            teacher: Some(&self.teacher),
            ..input(&self.z, EXPERTS, &self.choices, self.k)
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for k in [1, 2] {
        let batch = Batch::new(k);
        for temperature in [1.0, 0.4] {
            for loss in AuxLoss::ALL {
                let error = fd_error(loss, &LossInput { temperature, ..batch.input() });
                assert!(error < 1e-7, "{loss} k={k} τ={temperature}: {error:e}");
            }
        }
    }
}

#[test]
fn distillation_at_the_output() {
    let (classes, t) = (4, 2.0);
    let (teacher, student) = (numbers(12, 7), numbers(12, 8));
    let value = |student: &[f64]| distill_kl(&teacher, student, classes, t, &mut [0.0; 12]);
    let mut gradient = vec![0.0; 12];
    assert!(distill_kl(&teacher, &student, classes, t, &mut gradient) > 0.0);
    for i in 0..12 {
        let at = |shift: f64| {
            let mut student = student.clone();
            student[i] += shift;
            value(&student)
        };
        assert!((gradient[i] - (at(1e-5) - at(-1e-5)) / 2e-5).abs() < 1e-8 * t * t, "logit {i}");
    }
    assert!(value(&teacher).abs() < 1e-15, "nothing to learn from oneself");
}

#[test]
fn values_at_an_even_load() {
    let (experts, tokens) = (4, 8);
    // Sharp logits, each expert the first choice of as many tokens and the second of as many.
    let z: Vec<f64> =
        (0..tokens).flat_map(|t| (0..experts).map(move |e| [40.0, 39.0, 0.0, 0.0][(e + experts - t % experts) % experts])).collect();
    for k in [1, 2] {
        let choices = top_k(&z, experts, experts, k);
        let sharp = LossInput { noise: Some(LossNoise { seen: &z, std: &[1.0] }), teacher: Some(&z), ..input(&z, experts, &choices, k) };
        for (loss, expected) in [
            (AuxLoss::Switch, 1.0),
            (AuxLoss::TopK, 1.0),
            (AuxLoss::HuggingFace, k as f64),
            (AuxLoss::GShard, 1.0),
            (AuxLoss::GlobalBatch, 1.0),
            (AuxLoss::Sequence, 1.0),
            (AuxLoss::Importance, 0.0),
            (AuxLoss::Load, 0.0),
            (AuxLoss::MarginalEntropy, -(experts as f64).ln()),
        ] {
            let got = value(loss, &sharp);
            assert!((got - expected).abs() < 1e-12, "{loss} at k={k}: {got}");
            let recorded = loss.convention().map(|convention| if convention == "per_slot" { k as f64 } else { 1.0 });
            assert!(recorded.is_none_or(|value| value == expected), "{loss} at k={k}");
        }
    }
}

/// Supports of one to three experts, each expert in as many of them: what is recorded as normalised is 1.
#[test]
fn values_at_an_even_load_of_supports() {
    let (experts, sizes) = (4, [1, 3, 2, 3]);
    let rows =
        sizes.iter().flat_map(|&size| (0..experts as u32).map(move |first| (first..first + size).map(|e| e % 4).collect::<Vec<_>>()));
    let choices = Choices::from_rows(rows);
    let z = vec![0.0; 16 * experts];
    let even = LossInput { sequences: &[0..4, 4..16], ..input(&z, experts, &choices, 1) };
    for (loss, expected) in [
        (AuxLoss::TopK, 1.0),
        (AuxLoss::GlobalBatch, 1.0),
        (AuxLoss::Sequence, 1.0),
        // The mean number of choices.
        (AuxLoss::HuggingFace, 9.0 / 4.0),
    ] {
        assert!((value(loss, &even) - expected).abs() < 1e-12, "{loss}: {}", value(loss, &even));
    }
    let active = vec![1.0; 16 * experts];
    assert!((value(AuxLoss::ReluL1, &LossInput { z: &active, ..even }) - 9.0).abs() < 1e-12, "9/4 active experts, in each of 4");
}

#[test]
fn values_when_one_expert_takes_all() {
    let (experts, tokens) = (4, 6);
    let z: Vec<f64> = (0..tokens).flat_map(|_| [800.0, 0.0, 0.0, 0.0]).collect();
    let choices = top_k(&z, experts, experts, 1);
    let collapsed = input(&z, experts, &choices, 1);
    for loss in [AuxLoss::Switch, AuxLoss::TopK, AuxLoss::HuggingFace, AuxLoss::GShard, AuxLoss::GlobalBatch, AuxLoss::Sequence] {
        assert_eq!(value(loss, &collapsed), 4.0, "{loss}");
    }
    assert_eq!(value(AuxLoss::Importance, &collapsed), 3.0, "E - 1");
    for loss in [AuxLoss::TokenEntropy, AuxLoss::MarginalEntropy, AuxLoss::MutualInformation] {
        let mut dz = vec![0.0; z.len()];
        assert_eq!(loss.value_and_grad(&collapsed, 1.0, &mut dz).unwrap(), 0.0, "{loss}");
        assert!(dz.iter().all(|d| d.is_finite()), "{loss}: probabilities of 0 are no NaN");
    }
    let zero = vec![0.0; z.len()];
    let even = input(&zero, experts, &choices, 1);
    assert!((value(AuxLoss::RouterZ, &even) - 4f64.ln().powi(2)).abs() < 1e-15);
    assert!((value(AuxLoss::TokenEntropy, &even) - 4f64.ln()).abs() < 1e-15);
    assert!(value(AuxLoss::MutualInformation, &even).abs() < 1e-15, "no information in an undecided router");
}

#[test]
fn one_micro_batch_is_the_global_batch() {
    let batch = Batch::new(2);
    let counts = batch.choices.rows().counts(0..TOKENS, EXPERTS);
    let of = |loss: AuxLoss, input: &LossInput<'_>| {
        let mut dz = vec![0.0; input.z.len()];
        (loss.value_and_grad(input, 1.0, &mut dz).unwrap(), dz)
    };
    let top_k = of(AuxLoss::TopK, &batch.input());
    assert_eq!(of(AuxLoss::GlobalBatch, &LossInput { global_load: Some(&counts), ..batch.input() }), top_k);
    assert_eq!(of(AuxLoss::GlobalBatch, &LossInput { global_load: None, ..batch.input() }), top_k);
    assert_eq!(of(AuxLoss::Sequence, &LossInput { sequences: &[], ..batch.input() }), top_k, "the batch is one sequence");
}

#[test]
fn pooled_layers_would_hide_a_collapse() {
    // Two layers that collapsed onto different experts: each has the value E by itself.
    let layers = [[20.0, 0.0].repeat(4), [0.0, 20.0].repeat(4)];
    let alone: Vec<f64> = layers.iter().map(|z| value(AuxLoss::HuggingFace, &input(z, 2, &top_k(z, 2, 2, 1), 1))).collect();
    let pooled: Vec<f64> = layers.concat();
    assert!(alone.iter().all(|v| (v - 2.0).abs() < 1e-6), "{alone:?}");
    assert!((value(AuxLoss::HuggingFace, &input(&pooled, 2, &top_k(&pooled, 2, 2, 1), 1)) - 1.0).abs() < 1e-12);
}

#[test]
fn a_token_that_is_not_finite_counts_for_nothing() {
    let batch = Batch::new(2);
    let live = |t: usize| t != 4;
    let mut z = batch.z.clone();
    z[4 * WIDTH + 1] = f64::NAN;
    let rows = |full: &[f64], width: usize| -> Vec<f64> {
        full.chunks_exact(width).enumerate().filter(|(t, _)| live(*t)).flat_map(|(_, row)| row).copied().collect()
    };
    let all: Vec<Vec<u32>> = (0..TOKENS).map(|t| batch.choices.rows().of(t).to_vec()).collect();
    let holed = Choices::from_rows(all.iter().enumerate().map(|(t, row)| if live(t) { row.as_slice() } else { &[] }));
    let without = Choices::from_rows(all.iter().enumerate().filter(|(t, _)| live(*t)).map(|(_, row)| row));
    let (small_z, seen, std, teacher) =
        (rows(&z, WIDTH), rows(&batch.seen, EXPERTS), rows(&batch.std, EXPERTS), rows(&batch.teacher, EXPERTS));
    for loss in AuxLoss::ALL {
        let input = LossInput { z: &z, choices: holed.rows(), sequences: &[0..5, 5..11], ..batch.input() };
        let mut dz = vec![0.0; z.len()];
        let got = loss.value_and_grad(&input, 1.0, &mut dz).unwrap();
        let noise = Some(LossNoise { seen: &seen, std: &std });
        let small =
            LossInput { z: &small_z, choices: without.rows(), sequences: &[0..4, 4..10], noise, teacher: Some(&teacher), ..batch.input() };
        assert!((got - value(loss, &small)).abs() < 1e-12, "{loss}");
        assert!(dz.iter().all(|d| d.is_finite()) && dz[4 * WIDTH..5 * WIDTH] == [0.0; WIDTH], "{loss}");
    }
}

#[test]
fn gradients_are_scaled_and_added() {
    let batch = Batch::new(2);
    for loss in AuxLoss::ALL {
        let mut once = vec![0.0; batch.z.len()];
        loss.value_and_grad(&batch.input(), 1.0, &mut once).unwrap();
        let mut twice = once.clone();
        loss.value_and_grad(&batch.input(), -0.5, &mut twice).unwrap();
        assert!(twice.iter().zip(&once).all(|(b, a)| (b - 0.5 * a).abs() < 1e-15), "{loss}");
    }
}

#[test]
fn what_a_loss_lacks_is_said() {
    let batch = Batch::new(1);
    let bare = LossInput { noise: None, teacher: None, ..batch.input() };
    for (loss, what) in [(AuxLoss::Load, "noise"), (AuxLoss::RouterKl, "a teacher")] {
        let error = loss.value_and_grad(&bare, 1.0, &mut vec![0.0; batch.z.len()]).unwrap_err().to_string();
        assert!(error.contains(&format!("the loss {loss} was asked for without {what}")), "{error}");
    }
    let cut = LossInput { z: &batch.z[1..], ..batch.input() };
    assert!(AuxLoss::Switch.value_and_grad(&cut, 1.0, &mut vec![0.0; batch.z.len() - 1]).is_err());
    assert!(AuxLoss::Switch.value_and_grad(&batch.input(), 1.0, &mut []).is_err());
    let none = Choices::default();
    for loss in AuxLoss::ALL {
        let nothing = LossInput { noise: Some(LossNoise { seen: &[], std: &[] }), teacher: Some(&[]), ..input(&[], 4, &none, 1) };
        let got = value(loss, &nothing);
        assert!(got.is_finite(), "{loss} of no token: {got}");
    }
}
