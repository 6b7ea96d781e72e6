//! The parts by themselves: relaxations, selection, noise.

use super::*;
use crate::moe::estimator::{Kernel, Mask, Regulariser, Relaxation, RoutedBatch, StepContext, relax};

fn value(relaxation: Relaxation, z: &[f64]) -> Vec<f64> {
    let mut p = vec![0.0; z.len()];
    relaxation.value(z, &mut p);
    p
}

/// Relaxations with one logit for each expert, that sum to 1.
fn mixtures() -> Vec<Relaxation> {
    let temperature = 0.7;
    let mut all = vec![
        Relaxation::Softmax { temperature },
        Relaxation::SteepSigmoid { temperature, k: 2 },
        Relaxation::Entmax { alpha: 1.5, temperature },
        Relaxation::Entmax { alpha: 2.0, temperature },
        Relaxation::Entmax { alpha: 1.2, temperature },
        Relaxation::KHot { temperature, k: 2 },
        Relaxation::MaskedSoftmax { r: 0.1, temperature, mask: Mask::Code },
    ];
    all.extend([Kernel::Laplace, Kernel::Logistic, Kernel::Clip].map(|kernel| Relaxation::SoftTopK { kernel, width: temperature, k: 2 }));
    all
}

#[test]
fn weights_sum_to_one_and_follow_the_logits() {
    for relaxation in mixtures() {
        for seed in 0..50 {
            let z = normals(seed, 7, 0.05 * (1 + seed) as f64);
            let p = value(relaxation, &z);
            assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-12 && p.iter().all(|p| *p >= 0.0), "{relaxation:?}: {p:?}");
            for (i, j) in (0..7).flat_map(|i| (0..7).map(move |j| (i, j))).filter(|(i, j)| z[*i] > z[*j]) {
                assert!(p[i] >= p[j] - 1e-12, "{relaxation:?}: {z:?} {p:?}");
            }
        }
    }
}

#[test]
fn an_expert_that_is_left_out_changes_nothing_for_the_others() {
    for relaxation in mixtures().into_iter().chain([Relaxation::Relu, Relaxation::Sigmoid { temperature: 2.0 }]) {
        let (z, v) = (normals(1, 6, 1.0), normals(2, 6, 1.0));
        let with = |row: &[f64], x: f64| [&row[..2], &[x], &row[2..]].concat();
        let (p, more) = (value(relaxation, &z), value(relaxation, &with(&z, f64::NEG_INFINITY)));
        assert_close(&more, &with(&p, 0.0), 0.0, "value");
        let (mut dz, mut more_dz) = (vec![0.0; 6], vec![0.0; 7]);
        relaxation.vjp(&z, &p, &v, &mut dz);
        relaxation.vjp(&with(&z, f64::NEG_INFINITY), &more, &with(&v, 5.0), &mut more_dz);
        assert_close(&more_dz, &with(&dz, 0.0), 0.0, "gradient");
    }
}

#[test]
fn nothing_overflows_far_from_zero() {
    for relaxation in mixtures().into_iter().chain([Relaxation::Relu, Relaxation::Sigmoid { temperature: 1e-3 }]) {
        for z in [[3e38, -3e38, 0.0, 1.0], [1e6, 1e6, -1e6, 1e6], [1e-300, 0.0, -0.0, 0.0], [800.0, 0.0, -800.0, 1.0]] {
            let p = value(relaxation, &z);
            let mut dz = vec![0.0; 4];
            relaxation.vjp(&z, &p, &[1.0, -2.0, 3.0, 0.5], &mut dz);
            assert!(p.iter().chain(&dz).all(|x| x.is_finite()), "{relaxation:?} at {z:?}: {p:?} {dz:?}");
            let mixture = mixtures().contains(&relaxation);
            assert!(!mixture || (p.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{relaxation:?} at {z:?}: {p:?}");
        }
    }
}

#[test]
fn steep_forms_become_hard_top_k() {
    let z = [0.3, 1.5, -0.2, 1.1, 0.9];
    let half = [0.0, 0.5, 0.0, 0.5, 0.0];
    let mut steep = vec![Relaxation::SteepSigmoid { temperature: 1e-3, k: 2 }, Relaxation::KHot { temperature: 1e-3, k: 2 }];
    steep.extend([Kernel::Laplace, Kernel::Logistic, Kernel::Clip].map(|kernel| Relaxation::SoftTopK { kernel, width: 1e-3, k: 2 }));
    for relaxation in steep {
        assert_close(&value(relaxation, &z), &half, 1e-12, &format!("{relaxation:?}"));
    }
}

/// LapSum's own way (Struski et al. 2025): between neighbouring logits the sum is `a + c e^b + d e^-b`, which a quadratic
/// equation solves.
fn lap_sum_threshold(z: &[f64], k: usize) -> f64 {
    let mut sorted = z.to_vec();
    sorted.sort_by(f64::total_cmp);
    let sum = |b: f64| z.iter().map(|z| if *z < b { 0.5 * (z - b).exp() } else { 1.0 - 0.5 * (b - z).exp() }).sum::<f64>();
    let above = |b: f64| sorted.iter().filter(|z| **z >= b).count() as f64;
    // In the gap that holds the threshold.
    let gap = sorted.iter().filter(|z| sum(**z) >= k as f64).count();
    let high = sorted.get(gap).copied().unwrap_or(f64::INFINITY);
    let low: f64 = sorted[..gap].iter().map(|z| 0.5 * z.exp()).sum();
    let up: f64 = sorted[gap..].iter().map(|z| 0.5 * (-z).exp()).sum();
    let n = if high.is_finite() { above(high) } else { 0.0 };
    // n - up e^b + low e^-b = k, as a quadratic in e^b.
    let (a, b, c) = (up, k as f64 - n, -low);
    if a == 0.0 { (-c / b).ln() } else { ((-b + (b * b - 4.0 * a * c).sqrt()) / (2.0 * a)).ln() }
}

#[test]
fn the_laplace_kernel_is_lap_sum_in_closed_form() {
    for seed in 0..100 {
        let z = normals(seed, 9, 1.0);
        for k in [1, 2, 5, 8] {
            let b = lap_sum_threshold(&z, k);
            let share = |z: &f64| if *z < b { 0.5 * (z - b).exp() } else { 1.0 - 0.5 * (b - z).exp() };
            let expected: Vec<f64> = z.iter().map(|z| share(z) / k as f64).collect();
            assert_close(&value(Relaxation::SoftTopK { kernel: Kernel::Laplace, width: 1.0, k }, &z), &expected, 1e-12, &format!("k {k}"));
        }
    }
}

#[test]
fn a_saturated_clip_has_no_gradient() {
    let (z, relaxation) = ([5.0, 4.0, 0.0, -1.0], Relaxation::SoftTopK { kernel: Kernel::Clip, width: 0.1, k: 2 });
    let p = value(relaxation, &z);
    assert_close(&p, &[0.5, 0.5, 0.0, 0.0], 0.0, "saturated");
    let mut dz = vec![0.0; 4];
    relaxation.vjp(&z, &p, &[1.0, -1.0, 2.0, 0.3], &mut dz);
    assert_eq!(dz, [0.0; 4]);
}

/// 49 times 1/49 is not 1.
#[test]
fn what_is_saturated_in_a_clip_has_no_gradient_at_any_k() {
    for k in 2..=128 {
        // All but one saturated, and two that share what is left.
        let z: Vec<f64> = (0..k + 2)
            .map(|e| {
                if e + 1 < k {
                    5.0
                } else if e <= k {
                    0.02 * (e + 1 - k) as f64
                } else {
                    -5.0
                }
            })
            .collect();
        let relaxation = Relaxation::SoftTopK { kernel: Kernel::Clip, width: 0.1, k };
        let p = value(relaxation, &z);
        let mut dz = vec![0.0; z.len()];
        relaxation.vjp(&z, &p, &normals(k as u64, z.len(), 1.0), &mut dz);
        let moved: Vec<usize> = (0..z.len()).filter(|e| dz[*e] != 0.0).collect();
        assert_eq!(moved, [k - 1, k], "k = {k}: {p:?}");
    }
}

#[test]
fn k_hot_begins_as_the_softmax_and_may_leave_the_simplex_of_choices() {
    let z = [2.5, 0.1, 0.0, -0.3];
    assert_close(&value(Relaxation::KHot { temperature: 1.0, k: 1 }, &z), &softmax(&z), 1e-15, "k = 1");
    let entries = value(Relaxation::KHot { temperature: 3.0, k: 2 }, &[9.0, 0.0, 0.0]);
    assert!(2.0 * entries[0] > 1.0, "an entry of the 2-hot exceeds 1: {entries:?}");
}

#[test]
fn masks_by_hand() {
    // z* = 1: the code keeps (1 - z) / max(|z|, 1) <= 2r, the paper 1 - z <= r (|z| + 1).
    for (z, r, code, paper) in [
        ([1.0, 0.81, 0.79, -3.0], 0.1, [true, true, false, false], [true, false, false, false]),
        ([1.0, 0.85, 0.75, 0.0], 0.1, [true, true, false, false], [true, true, false, false]),
        ([1.0, -1.0, 0.0, 1.0], 1.0, [true; 4], [true; 4]),
    ] {
        assert_eq!(relax::kept(&z, r, Mask::Code), code, "{z:?}");
        assert_eq!(relax::kept(&z, r, Mask::Paper), paper, "{z:?}");
    }
    assert_eq!(relax::kept(&[0.0, 0.0], 0.1, Mask::Code), [true, true], "all zero");
}

#[test]
fn selectors_end_on_single_experts() {
    let spec = spec("dselect_k", Some(2), &[], 8);
    let estimator = spec.at(0, 1);
    assert_eq!(estimator.router_width(8), 2 * (1 + 3));
    let count = |scale: f64| {
        // Scores, then bits 1, 0, 1 and 0, 1, 1: experts 5 and 6.
        let z: Vec<f64> = [0.4, -0.1, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0].iter().map(|z| scale * z).collect();
        estimator.route(&z, 8, &StepContext::train(Draw::new(0, 0, 0)))
    };
    assert_eq!(count(0.1).chosen.len(), 8, "bits are undecided: every expert runs");
    let routed = count(0.6);
    assert_eq!(routed.chosen, [5, 6]);
    let share = 1.0 / (1.0 + (-0.3f64).exp());
    assert_close(&[routed.weights[5], routed.weights[6]], &[share, 1.0 - share], 1e-15, "softmax of the scores");
}

#[test]
fn mass_off_the_experts_costs() {
    let Regulariser::Selectors { weight, gamma, k } = spec("dselect_k", Some(1), &[], 5).regulariser(0, STEPS) else { panic!() };
    assert_eq!((weight, gamma, k), (1e-6, 1.0, 1));
    let estimator = spec("dselect_k", Some(1), &[], 5).at(0, 1);
    let regulariser = Regulariser::Selectors { weight: 0.7, gamma, k };
    for (experts, seed) in [(5, 1), (8, 2)] {
        let width = estimator.router_width(experts);
        let z = normals(seed, 3 * width, 0.2);
        let of = |z: &[f64], dz: &mut [f64]| {
            let routed = estimator.route(z, experts, &StepContext::train(Draw::new(0, 0, 0)));
            regulariser.value_and_grad(0.7, z, &routed, dz).unwrap()
        };
        let mut dz = vec![0.0; z.len()];
        of(&z, &mut dz);
        for j in 0..z.len() {
            let at = |d: f64| {
                let mut near = z.clone();
                near[j] += d;
                of(&near, &mut vec![0.0; z.len()])
            };
            let expected = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((dz[j] - expected).abs() < 1e-7 * expected.abs().max(1e-2), "E = {experts}, column {j}: {} is not {expected}", dz[j]);
        }
    }
    // Bits 0, 1, 1 are code 6: no expert of five. Less of it is cheaper.
    let cost = |bit: f64| {
        let z = [0.0, -0.2, 0.3, bit];
        let routed = estimator.route(&z, 5, &StepContext::train(Draw::new(0, 0, 0)));
        regulariser.value_and_grad(1.0, &z, &routed, &mut [0.0; 4]).unwrap()
    };
    assert!(cost(0.4) > cost(0.2) && cost(0.2) > cost(0.0));
}

#[test]
fn relu_routing_arrives_at_its_sparsity() {
    // Logits of their own, moved by the penalty alone: λ must find the level at which two of eight stay active.
    let (experts, tokens) = (8, 64);
    let spec = spec("remoe", Some(2), &[("factor", Param::Number(1.05))], experts);
    let (estimator, regulariser) = (spec.at(0, 1), spec.regulariser(0, STEPS));
    let target: Vec<f64> = normals(5, tokens * experts, 1.0).iter().map(|z| z + 1.0).collect();
    let mut z = target.clone();
    let mut weight = regulariser.initial_weight();
    let mut active = Vec::new();
    for _ in 0..3000 {
        let routed = estimator.route(&z, experts, &StepContext::train(Draw::new(0, 0, 0)));
        active.push(routed.active(&z));
        // A task that pulls each weight to its target.
        let mut dz: Vec<f64> = z.iter().zip(&target).map(|(z, target)| (z - target) / tokens as f64).collect();
        regulariser.value_and_grad(weight, &z, &routed, &mut dz).unwrap();
        z.iter_mut().zip(dz).for_each(|(z, d)| *z -= 0.5 * d * tokens as f64 / 10.0);
        weight = regulariser.adapt(weight, routed.active(&z));
    }
    assert!(active[0] > 6.0, "{}", active[0]);
    let late = active[2000..].iter().sum::<f64>() / 1000.0;
    assert!((late - 2.0).abs() < 0.3, "{late} experts are active");
    let none = estimator.route(&[-1.0; 8], experts, &StepContext::train(Draw::new(0, 0, 0)));
    assert!(none.chosen.is_empty() && none.weights.iter().all(|w| *w == 0.0), "a token may have no expert");
}

/// Where nothing brings the active experts down, or up.
#[test]
fn the_weight_of_a_penalty_stays_a_number() {
    let regulariser = spec("remoe", Some(2), &[], 8).regulariser(0, STEPS);
    for active in [8.0, 0.0] {
        let weight = (0..10_000).fold(regulariser.initial_weight(), |weight, _| regulariser.adapt(weight, active));
        assert!(weight > 0.0 && weight <= 1e30, "{weight}");
    }
}

#[test]
fn the_bonus_rewards_entropy() {
    let spec = spec("reinforce", Some(1), &[("bonus", Param::Number(0.5))], 4);
    let z = [0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0];
    let routed = spec.at(0, 1).route(&z, 4, &StepContext::train(Draw::new(0, 0, 0)));
    let mut dz = vec![0.0; 8];
    let value = spec.regulariser(0, 1).value_and_grad(0.5, &z, &routed, &mut dz).unwrap();
    let p = softmax(&z[4..]);
    let entropy = -dot(&p, &p.iter().map(|p| p.ln()).collect::<Vec<_>>());
    assert!((value + 0.5 * (4f64.ln() + entropy) / 2.0).abs() < 1e-12);
    assert!(dz[4] > 0.0 && dz[5] < 0.0, "descent lowers the largest logit: {dz:?}");
    assert_eq!(spec.regulariser(STEPS, STEPS), Regulariser::EntropyBonus { weight: 0.5 });
    assert_eq!(super::spec("ste", None, &[], 4).regulariser(0, 1), Regulariser::None);
}

/// Without a floor the loss `load` would divide by what the router may drive to 0.
#[test]
fn learned_noise_never_ends() {
    let spec = spec("noisy_topk", Some(1), &[], 4);
    let z = [0.4, -0.3, 1.1, 0.0, -800.0, -800.0, -800.0, -30.0].repeat(3);
    let routed = spec.at(0, 1).route(&z, 4, &StepContext::train(Draw::new(0, 0, 0)));
    assert!(routed.deviation().unwrap().iter().all(|std| (*std - 0.01).abs() < 1e-9), "{:?}", routed.deviation());
    let input = crate::moe::loss::LossInput {
        z: &z,
        experts: 4,
        temperature: 1.0,
        choices: routed.wanted(),
        k: 1,
        sequences: &[],
        global_load: None,
        noise: routed.deviation().map(|std| crate::moe::loss::LossNoise { seen: routed.seen(), std }),
        teacher: None,
    };
    let mut dz = vec![0.0; z.len()];
    let value = crate::moe::loss::AuxLoss::Load.value_and_grad(&input, 1.0, &mut dz).unwrap();
    assert!(value.is_finite() && dz.iter().all(|d| d.abs() < 1e3), "{value}: {dz:?}");
}

/// A batch of one row.
fn one(spec: &EstimatorSpec, z: &[f64], ctx: &StepContext<'_>) -> RoutedBatch {
    spec.at(0, 1).route(z, 4, ctx)
}

#[test]
fn learned_noise_begins_at_the_softplus_of_zero() {
    let spec = spec("noisy_topk", Some(1), &[], 4);
    let ctx = StepContext::train(Draw::new(0, 0, 0));
    let routed = one(&spec, &[0.0; 8], &ctx);
    assert_close(routed.deviation().unwrap(), &[2f64.ln() + 0.01; 4], 1e-15, "ln 2 and the floor");
    let noise: Vec<f64> = (0..4).map(|e| ctx.draw.normal(Stream::Select, 0, e) * (2f64.ln() + 0.01)).collect();
    assert_close(routed.seen(), &noise, 1e-15, "what the choice sees");
    let calm = one(&spec, &[0.0; 8], &StepContext::evaluate(Draw::new(0, 0, 0)));
    assert!(calm.deviation().is_none() && calm.seen() == [0.0; 4], "there is no noise in evaluation");
}
