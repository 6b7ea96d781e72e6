//! The backward of every estimator against central differences of a function that has the gradient the method means.
//! Those functions are written out here from the definitions, and share nothing with what is tested.

use super::*;
use crate::moe::estimator::{Combine, Estimator, Execution, RoutedBatch, StepContext};

const H: f64 = 1e-5;
const ROWS: usize = 20;

/// A routed row, and what is held fixed while its router outputs move.
struct Frozen {
    name: &'static str,
    k: usize,
    z: Vec<f64>,
    experts: usize,
    routed: RoutedBatch,
    spec: EstimatorSpec,
}

impl Frozen {
    fn number(&self, name: &str) -> f64 {
        self.spec.number_at(name, STEPS / 2, STEPS).unwrap()
    }

    fn chosen(&self, e: usize) -> bool {
        self.routed.chosen.contains(&(e as u32))
    }

    /// Noise that the choice saw; -inf for an expert that was left out.
    fn noise(&self, e: usize) -> f64 {
        self.routed.seen()[e] - self.z[e]
    }

    /// The function of the router outputs whose gradient the estimator gives to them.
    fn meant(&self, z: &[f64]) -> Vec<f64> {
        let experts = self.experts;
        let over = |t: f64| softmax(&z[..experts].iter().map(|z| z / t).collect::<Vec<_>>());
        let masked = |p: Vec<f64>| p.iter().enumerate().map(|(e, p)| if self.chosen(e) { *p } else { 0.0 }).collect::<Vec<_>>();
        let normed = |p: Vec<f64>| {
            let p = masked(p);
            let sum: f64 = p.iter().sum();
            p.iter().map(|p| p / sum).collect::<Vec<_>>()
        };
        let estimator = self.spec.at(STEPS / 2, STEPS);
        let raw = estimator.serve == crate::moe::policy::WeightForm::Raw;
        match self.name {
            "onehot" => vec![0.0; experts],
            "renorm_topk" | "reinforce" => normed(over(1.0)),
            "raw_topk" => masked(over(1.0)),
            "noisy_topk" => {
                let deviation = |x: f64| (1.0 + x.exp()).ln() + 0.01;
                let noisy: Vec<f64> =
                    (0..experts).map(|e| z[e] + deviation(z[experts + e]) * self.noise(e) / deviation(self.z[experts + e])).collect();
                if raw { masked(softmax(&noisy)) } else { normed(softmax(&noisy)) }
            }
            "ste" => over(self.number("temperature")),
            "ste_sparse" => masked(over(self.number("temperature"))),
            "densemixer" if raw => over(1.0),
            "densemixer" => {
                let (p, fixed) = (over(1.0), masked(softmax(&self.z)));
                let fixed: f64 = fixed.iter().sum();
                let sum: f64 = masked(p.clone()).iter().sum();
                p.iter().enumerate().map(|(e, p)| if self.chosen(e) { p / sum } else { p / fixed }).collect()
            }
            "reinmax" => {
                let mut pi: Vec<f64> = softmax(&self.z).iter().map(|p| 0.5 * p).collect();
                pi[self.routed.chosen[0] as usize] += 0.5;
                let shifted: Vec<f64> = (0..experts).map(|e| pi[e].ln() + z[e] - self.z[e]).collect();
                softmax(&shifted).iter().zip(over(1.0)).map(|(s, p)| 2.0 * s - 0.5 * p).collect()
            }
            "sparsemixer_v2" => self.masked_draws(z),
            "default_moe" => over(1.0),
            "gumbel_soft" | "gumbel_st" => {
                let t = self.number("temperature");
                softmax(&(0..experts).map(|e| (z[e] + self.noise(e)) / t).collect::<Vec<_>>())
            }
            "gumbel_topk" => {
                let t = self.number("temperature");
                let mut logits: Vec<f64> = (0..experts).map(|e| z[e] + self.noise(e)).collect();
                let mut sum = vec![0.0; experts];
                for _ in 0..self.k {
                    let q = softmax(&logits.iter().map(|z| z / t).collect::<Vec<_>>());
                    for e in 0..experts {
                        sum[e] += q[e] / self.k as f64;
                        logits[e] += (1.0 - q[e]).ln();
                    }
                }
                sum
            }
            "soft" | "steep" => over(self.number("temperature")),
            "smear" => {
                let t = self.number("temperature");
                softmax(&(0..experts).map(|e| if self.noise(e).is_finite() { z[e] / t } else { f64::NEG_INFINITY }).collect::<Vec<_>>())
            }
            "steep_sigmoid" => {
                let t = self.number("temperature");
                let mut sorted = z.to_vec();
                sorted.sort_by(|a, b| b.total_cmp(a));
                let theta = (sorted[self.k - 1] + sorted[self.k]) / 2.0;
                let open: Vec<f64> = z.iter().map(|z| 1.0 / (1.0 + ((theta - z) / t).exp())).collect();
                let sum: f64 = open.iter().sum();
                open.iter().map(|open| open / sum).collect()
            }
            "sparsemax" => entmax(z, 2.0, self.number("temperature")),
            "entmax" => entmax(z, self.number("alpha"), self.number("temperature")),
            "soft_topk" => soft_top_k(z, &estimator, self.k),
            "dselect_k" => dselect(z, experts, self.k, self.number("gamma")),
            "remoe" => z.iter().map(|z| z.max(0.0)).collect(),
            "sigmoid_topk" => {
                let open: Vec<f64> = z.iter().map(|z| 1.0 / (1.0 + (-z / self.number("temperature")).exp())).collect();
                if raw { masked(open) } else { normed(open) }
            }
            other => panic!("{other} has no definition here"),
        }
    }

    /// Each draw from the masked softmax of what the draws before it left.
    fn masked_draws(&self, z: &[f64]) -> Vec<f64> {
        let flag = format!("{:?}", self.spec.at(0, 1));
        let (t, factor) = if flag.contains("star: true") { (2.0, 2.0) } else { (1.0, 1.0) };
        let (r, paper) = (self.number("r"), flag.contains("mask: Paper"));
        let mut value = vec![0.0; self.experts];
        let mut gone: Vec<usize> = Vec::new();
        for &drawn in &self.routed.chosen {
            let left = || (0..self.experts).filter(|e| !gone.contains(e));
            let top = left().map(|e| self.z[e]).fold(f64::NEG_INFINITY, f64::max);
            let far = |e: &usize| {
                let z = self.z[*e];
                if paper { top - z > r * (z.abs() + top.abs()) } else { (top - z) / z.abs().max(top) > 2.0 * r }
            };
            let sum: f64 = left().filter(|e| !far(e)).map(|e| (z[e] / t).exp()).sum();
            value[drawn as usize] += factor * (z[drawn as usize] / t).exp() / sum;
            gone.push(drawn as usize);
        }
        value
    }
}

/// The value in `[low, high]` at which a falling function is 1.
fn solve(mut low: f64, mut high: f64, falling: impl Fn(f64) -> f64) -> f64 {
    for _ in 0..200 {
        let middle = (low + high) / 2.0;
        if falling(middle) > 1.0 { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}

fn entmax(z: &[f64], alpha: f64, t: f64) -> Vec<f64> {
    let value = |tau: f64| z.iter().map(move |z| ((alpha - 1.0) * z / t - tau).max(0.0).powf(1.0 / (alpha - 1.0)));
    let reach = z.iter().fold(0.0, |most: f64, z| most.max(z.abs())) / t + 2.0;
    value(solve(-reach, reach, |tau| value(tau).sum())).collect()
}

fn soft_top_k(z: &[f64], estimator: &Estimator, k: usize) -> Vec<f64> {
    let crate::moe::estimator::Relaxation::SoftTopK { kernel, width, .. } = estimator.relaxation else { panic!("{estimator:?}") };
    let share = |x: f64| match kernel {
        crate::moe::estimator::Kernel::Laplace => 0.5 * (1.0 + x.signum() * (1.0 - (-x.abs()).exp())),
        crate::moe::estimator::Kernel::Logistic => 0.5 * (1.0 + (x / 2.0).tanh()),
        crate::moe::estimator::Kernel::Clip => x.clamp(0.0, 1.0),
    };
    let value = |b: f64| z.iter().map(move |z| share((z - b) / width) / k as f64);
    value(solve(-100.0, 100.0, |b| value(b).sum())).collect()
}

fn dselect(z: &[f64], experts: usize, k: usize, gamma: f64) -> Vec<f64> {
    let bits = (experts as f64).log2().ceil() as usize;
    let step = |t: f64| {
        let inside = -2.0 / gamma.powi(3) * t.powi(3) + 3.0 / (2.0 * gamma) * t + 0.5;
        if t <= -gamma / 2.0 {
            0.0
        } else if t >= gamma / 2.0 {
            1.0
        } else {
            inside
        }
    };
    let mix = softmax(&z[..k]);
    let selected = |s: usize, e: usize| {
        (0..bits)
            .map(|b| step(z[k + s * bits + b]))
            .enumerate()
            .fold(1.0, |r, (b, open)| r * if (e >> b) % 2 == 1 { open } else { 1.0 - open })
    };
    (0..experts).map(|e| (0..k).map(|s| mix[s] * selected(s, e)).sum()).collect()
}

/// Whether the choice, and what is exactly 0 or saturated, stays the same nearby: elsewhere there is no derivative.
fn smooth_at(estimator: &Estimator, z: &[f64], experts: usize, ctx: &StepContext<'_>) -> bool {
    let signature = |z: &[f64]| {
        let routed = estimator.route(z, experts, ctx);
        let order: Vec<bool> = (1..z.len()).map(|e| z[e] > z[e - 1]).collect();
        let ends: Vec<(bool, bool)> = routed.relaxed().iter().map(|p| (*p == 0.0, p * estimator.k() as f64 >= 1.0 - 1e-12)).collect();
        (routed.chosen, order, ends)
    };
    let here = signature(z);
    (0..z.len()).all(|j| {
        [-1e-3, 1e-3].into_iter().all(|d| {
            let mut near = z.to_vec();
            near[j] += d;
            signature(&near) == here
        })
    })
}

/// Rows of an arm where it has a derivative.
fn frozen(spec: &EstimatorSpec, experts: usize) -> Vec<Frozen> {
    let estimator = spec.at(STEPS / 2, STEPS);
    let width = estimator.router_width(experts);
    // The bits of a selector saturate outside ±½.
    let scale = if spec.row().name == "dselect_k" { 0.3 } else { 1.2 };
    let mut found = Vec::new();
    for seed in 0..1000 {
        let z = normals(seed, width, scale);
        let ctx = StepContext::train(Draw::new(seed, 3, 1));
        if smooth_at(&estimator, &z, experts, &ctx) {
            let routed = estimator.route(&z, experts, &ctx);
            found.push(Frozen { name: spec.row().name, k: estimator.k(), z, experts, routed, spec: spec.clone() });
        }
        if found.len() == ROWS {
            return found;
        }
    }
    panic!("{}: only {} smooth rows", spec.row().name, found.len());
}

#[test]
fn every_estimator_has_the_gradient_it_means() {
    for experts in [5, 8] {
        for spec in arms(experts) {
            let estimator = spec.at(STEPS / 2, STEPS);
            for (row, frozen) in frozen(&spec, experts).into_iter().enumerate() {
                let mut credit = normals(1000 + row as u64, experts, 1.0);
                // Without a run there is no credit.
                if frozen.routed.execution == Execution::Chosen && !matches!(estimator.combine, Combine::Means { .. }) {
                    (0..experts).filter(|e| !frozen.chosen(*e)).for_each(|e| credit[e] = 0.0);
                }
                let mut found = vec![0.0; frozen.z.len()];
                estimator.vjp(&frozen.z, &frozen.routed, &credit, &mut found);
                let expected: Vec<f64> = (0..frozen.z.len())
                    .map(|j| {
                        let at = |d: f64| {
                            let mut z = frozen.z.clone();
                            z[j] += d;
                            dot(&credit, &frozen.meant(&z))
                        };
                        (at(H) - at(-H)) / (2.0 * H)
                    })
                    .collect();
                let size = expected.iter().fold(1e-4, |most: f64, d| most.max(d.abs()));
                let what = format!("{} k={:?} E={experts} row {row} {estimator:?}", frozen.name, spec.k());
                assert_close(&found, &expected, 1e-5 * size, &what);
            }
        }
    }
}

#[test]
fn where_the_gradient_is_exact_the_weights_are_what_is_differentiated() {
    use crate::moe::estimator::{Gradient, Weights};
    for experts in [5, 8] {
        for spec in arms(experts) {
            let estimator = spec.at(STEPS / 2, STEPS);
            for frozen in frozen(&spec, experts) {
                let mut expected = frozen.meant(&frozen.z);
                match (estimator.gradient, estimator.weights) {
                    (Gradient::Exact | Gradient::Score { .. }, _) => {}
                    // Up to the coin.
                    (Gradient::Corrected { star }, Weights::Corrected { .. }) => {
                        let weights = frozen.routed.weights.iter().zip(&mut expected);
                        for (weight, expected) in weights.filter(|(weight, _)| **weight > 0.0) {
                            *expected /= if star { 2.0 } else { 1.0 };
                            let scale = weight / *expected;
                            assert!((scale - 1.0).abs() < 1e-12 || (scale - 1.0 / 3.0).abs() < 1e-12, "{scale}");
                            *expected *= scale;
                        }
                    }
                    _ => continue,
                }
                assert_close(&frozen.routed.weights, &expected, 1e-12, frozen.name);
            }
        }
    }
}

#[test]
fn the_published_formulas_hold_to_the_last_digits() {
    // Shazeer's and Switch's gradients, written out per logit.
    let experts = 8;
    for row in 0..20 {
        let (z, c) = (normals(row, experts, 1.0), normals(100 + row, experts, 1.0));
        let p = softmax(&z);
        for k in [1, 2] {
            for name in ["raw_topk", "renorm_topk"] {
                let estimator = spec(name, Some(k), &[], experts).at(0, 1);
                let routed = estimator.route(&z, experts, &StepContext::train(Draw::new(0, 0, 0)));
                let chosen = |e: usize| routed.chosen.contains(&(e as u32));
                let mut dz = vec![0.0; experts];
                estimator.vjp(&z, &routed, &c, &mut dz);
                let expected: Vec<f64> = (0..experts)
                    .map(|j| {
                        let (inner, own) = if name == "raw_topk" { (&p, p[j]) } else { (&routed.weights, routed.weights[j]) };
                        let sum: f64 = (0..experts).filter(|e| chosen(*e)).map(|e| inner[e] * c[e]).sum();
                        own * (if chosen(j) { c[j] } else { 0.0 } - sum)
                    })
                    .collect();
                assert_close(&dz, &expected, 1e-12, name);
                if name == "raw_topk" {
                    assert!(dz.iter().all(|d| *d != 0.0), "not 0 for any logit");
                }
            }
        }
    }
}

/// However improbable what epsilon, a bias or capacity chose.
#[test]
fn densemixer_is_bounded_by_its_credit() {
    use crate::moe::{
        capacity::{Capacity, Order, Overflow},
        explore::Exploration,
    };
    let z = [5.0, 5.0, -9.0].repeat(50);
    let credit = [1.0, -1.0, 0.5].repeat(50);
    let train = |seed| StepContext::train(Draw::new(seed, 0, 0));
    let capacity = |overflow| Some(Capacity { factor: 0.5, overflow, order: Order::Position });
    for k in [1, 2] {
        let estimator = spec("densemixer", Some(k), &[("form", word("renorm"))], 3).at(0, 1);
        let mut improbable = 0;
        for ctx in [
            StepContext { explore: Exploration { epsilon: 0.5, dropout: 0.0 }, ..train(1) },
            StepContext { bias: Some(&[0.0, 0.0, 20.0]), ..train(2) },
            StepContext { capacity: capacity(Overflow::Reroute), ..train(3) },
            StepContext { capacity: capacity(Overflow::Drop), bias: Some(&[0.0, 0.0, 20.0]), ..train(4) },
        ] {
            let routed = estimator.route(&z, 3, &ctx);
            let mut dz = vec![0.0; z.len()];
            estimator.vjp(&z, &routed, &credit, &mut dz);
            improbable += (0..50).filter(|t| routed.rows().of(*t) == [2]).count();
            // Weights over the sum, and those beside it, are at most 1; so are their differences from a mean, twice.
            assert!(dz.iter().all(|d| d.abs() <= 4.0), "{k}: {dz:?}");
        }
        assert!(improbable > 0, "k = {k}: expert 2 alone was chosen somewhere");
    }
}

/// Algorithm 2 of the paper at temperatures other than 1: only the half of π that is no draw is tempered.
#[test]
fn reinmax_is_its_algorithm_at_every_temperature() {
    let experts = 5;
    for (seed, temperature) in [1.0, 1.3, 2.0, 7.0].into_iter().cycle().take(40).enumerate() {
        let estimator = spec("reinmax", None, &[("temperature", number(temperature))], experts).at(0, 1);
        let (z, credit) = (normals(seed as u64, experts, 1.5), normals(100 + seed as u64, experts, 1.0));
        let routed = estimator.route(&z, experts, &StepContext::train(Draw::new(seed as u64, 0, 0)));
        let mut pi: Vec<f64> = softmax(&z.iter().map(|z| z / temperature).collect::<Vec<_>>()).iter().map(|p| 0.5 * p).collect();
        pi[routed.chosen[0] as usize] += 0.5;
        let surrogate = |near: &[f64]| {
            let shifted: Vec<f64> = (0..experts).map(|e| pi[e].ln() - z[e] + near[e]).collect();
            2.0 * dot(&credit, &softmax(&shifted)) - 0.5 * dot(&credit, &softmax(near))
        };
        let expected: Vec<f64> = (0..experts)
            .map(|j| {
                let at = |d: f64| {
                    let mut near = z.clone();
                    near[j] += d;
                    surrogate(&near)
                };
                (at(H) - at(-H)) / (2.0 * H)
            })
            .collect();
        let mut found = vec![0.0; experts];
        estimator.vjp(&z, &routed, &credit, &mut found);
        assert_close(&found, &expected, 1e-8, &format!("temperature {temperature}"));
        let drawn: Vec<f64> = (0..experts).map(|e| f64::from(routed.chosen == [e as u32])).collect();
        assert_eq!(routed.weights, drawn, "the forward is the draw itself");
    }
}

#[test]
fn broken_baselines_have_exactly_no_gradient() {
    let experts = 8;
    let broken = [
        spec("onehot", Some(1), &[], experts),
        spec("onehot", Some(2), &[], experts),
        spec("renorm_topk", Some(1), &[], experts),
        spec("noisy_topk", Some(1), &[("weights", word("renorm"))], experts),
        spec("sigmoid_topk", Some(1), &[("weights", word("renorm"))], experts),
    ];
    for spec in broken {
        let estimator = spec.at(0, 1);
        let z = normals(1, 50 * estimator.router_width(experts), 2.0);
        let routed = estimator.route(&z, experts, &StepContext::train(Draw::new(0, 0, 0)));
        let mut dz = vec![0.0; z.len()];
        estimator.vjp(&z, &routed, &normals(2, 50 * experts, 3.0), &mut dz);
        assert!(dz.iter().all(|d| *d == 0.0), "{}", spec.row().name);
    }
}

#[test]
fn credit_adds_up_and_what_is_there_stays() {
    let experts = 5;
    for spec in arms(experts) {
        let estimator = spec.at(STEPS / 2, STEPS);
        let z = normals(3, 4 * estimator.router_width(experts), 0.4);
        let routed = estimator.route(&z, experts, &StepContext::train(Draw::new(3, 0, 0)));
        let (a, b) = (normals(4, 4 * experts, 1.0), normals(5, 4 * experts, 1.0));
        let sum: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a + 2.0 * b).collect();
        let (mut one_by_one, mut together) = (vec![1.0; z.len()], vec![1.0; z.len()]);
        estimator.vjp(&z, &routed, &a, &mut one_by_one);
        for _ in 0..2 {
            estimator.vjp(&z, &routed, &b, &mut one_by_one);
        }
        estimator.vjp(&z, &routed, &sum, &mut together);
        assert_close(&one_by_one, &together, 1e-11, spec.row().name);
    }
}
