//! The forward: who is chosen, with which weight, what a run adds to it, and what cannot go wrong.

use super::*;
use crate::moe::{
    capacity::{Capacity, Order, Overflow},
    estimator::{Combine, Execution, Expected, NoiseKind, Phase, Selection, StepContext, Weights},
    explore::Exploration,
    policy::WeightForm,
};

fn draw() -> Draw {
    Draw::new(1, 2, 3)
}

#[test]
fn every_estimator_routes_every_token() {
    let (experts, tokens) = (8, 40);
    for spec in arms(experts) {
        let (name, estimator) = (spec.row().name, spec.at(STEPS / 2, STEPS));
        let z = normals(1, tokens * estimator.router_width(experts), 0.4);
        let routed = estimator.route(&z, experts, &StepContext::train(draw()));
        assert_eq!((routed.tokens, routed.weights.len(), routed.rows().tokens()), (tokens, tokens * experts, tokens), "{name}");
        for token in 0..tokens {
            let (chosen, weights) = (routed.rows().of(token), &routed.weights[token * experts..][..experts]);
            match estimator.selection {
                Selection::All => assert_eq!(chosen.len(), experts, "{name}"),
                Selection::TopK { k } => assert_eq!(chosen.len(), k, "{name}"),
                Selection::Support => assert!(chosen.len() == weights.iter().filter(|w| **w > 0.0).count(), "{name}"),
            }
            let mut distinct = chosen.to_vec();
            distinct.sort_unstable();
            distinct.dedup();
            assert_eq!(distinct.len(), chosen.len(), "{name}");
            let total: f64 = weights.iter().sum();
            let sums_to_one = match (estimator.weights, estimator.relaxation) {
                (Weights::Unit | Weights::Renorm, _) => true,
                (Weights::Relaxed, super::super::Relaxation::Relu) => false,
                (Weights::Relaxed, _) => true,
                (Weights::Chosen | Weights::Corrected { .. }, _) => false,
            };
            assert!(!sums_to_one || (total - 1.0).abs() < 1e-12, "{name}: {weights:?}");
            assert!(
                estimator.weights == Weights::Relaxed || (0..experts as u32).all(|e| chosen.contains(&e) || weights[e as usize] == 0.0)
            );
        }
        let runs = if routed.execution == Execution::All { experts * tokens } else { routed.chosen.len() };
        match estimator.executed_per_token(experts) {
            Expected::Merged => assert_eq!(estimator.combine, Combine::Merged),
            Expected::Exactly(n) => assert_eq!(runs * estimator.copies(), n * tokens, "{name}"),
            Expected::AtMost(n) => assert!(runs <= n * tokens && n == experts, "{name}"),
        }
    }
}

#[test]
fn dense_methods_run_all_and_sparse_ones_run_the_chosen() {
    // Experts per token as the methods' definitions have it, for E = 8 and the larger k.
    for (name, k, expected) in [
        ("onehot", Some(2), Expected::Exactly(2)),
        ("renorm_topk", Some(2), Expected::Exactly(2)),
        ("raw_topk", Some(1), Expected::Exactly(1)),
        ("noisy_topk", Some(2), Expected::Exactly(2)),
        ("ste", Some(1), Expected::Exactly(8)),
        ("ste_sparse", Some(1), Expected::Exactly(1)),
        ("densemixer", Some(2), Expected::Exactly(8)),
        ("reinmax", None, Expected::Exactly(8)),
        ("sparsemixer_v2", Some(2), Expected::Exactly(2)),
        ("default_moe", Some(2), Expected::Exactly(2)),
        ("gumbel_soft", None, Expected::Exactly(8)),
        ("gumbel_st", None, Expected::Exactly(8)),
        ("gumbel_topk", Some(2), Expected::Exactly(8)),
        ("soft", None, Expected::Exactly(8)),
        ("steep", None, Expected::Exactly(8)),
        ("steep_sigmoid", Some(2), Expected::Exactly(8)),
        ("sparsemax", None, Expected::AtMost(8)),
        ("entmax", None, Expected::AtMost(8)),
        ("soft_topk", Some(2), Expected::Exactly(8)),
        ("dselect_k", Some(2), Expected::AtMost(8)),
        ("reinforce", Some(2), Expected::Exactly(8)),
        ("smear", None, Expected::Merged),
        ("remoe", Some(2), Expected::AtMost(8)),
        ("sigmoid_topk", Some(2), Expected::Exactly(2)),
    ] {
        assert_eq!(spec(name, k, &[], 8).at(0, 1).executed_per_token(8), expected, "{name}");
    }
    let critical = spec("reinforce", Some(2), &[("baseline", word("self_critical"))], 8).at(0, 1);
    assert_eq!((critical.copies(), critical.executed_per_token(8)), (5, Expected::Exactly(10)));
}

#[test]
fn evaluation_is_without_noise_exploration_and_capacity() {
    let experts = 8;
    for spec in arms(experts) {
        let estimator = spec.at(STEPS / 2, STEPS);
        let z = normals(1, 20 * estimator.router_width(experts), 0.4);
        let wild = StepContext {
            explore: Exploration { epsilon: 0.9, dropout: 0.9 },
            capacity: Some(Capacity { factor: 0.1, overflow: Overflow::Drop, order: Order::Position }),
            phase: Phase::Evaluate,
            ..StepContext::train(draw())
        };
        let calm = estimator.route(&z, experts, &StepContext::evaluate(Draw::new(9, 9, 9)));
        let routed = estimator.route(&z, experts, &wild);
        assert_eq!((&routed.weights, &routed.chosen), (&calm.weights, &calm.chosen), "{}", spec.row().name);
        assert_eq!(routed.capacity, Default::default());
    }
}

#[test]
fn a_seed_fixes_the_noise_and_rows_do_not_depend_on_their_batch() {
    let experts = 5;
    for spec in arms(experts) {
        let estimator = spec.at(0, STEPS);
        let width = estimator.router_width(experts);
        let z = normals(1, 6 * width, 0.4);
        let ctx = StepContext::train(draw());
        let (all, fewer) = (estimator.route(&z, experts, &ctx), estimator.route(&z[..3 * width], experts, &ctx));
        assert_eq!(all.weights[..3 * experts], fewer.weights, "{}", spec.row().name);
        if estimator.noise.kind != NoiseKind::None {
            let other = estimator.route(&z, experts, &StepContext::train(Draw::new(1, 3, 3)));
            assert_ne!(all.seen(), other.seen(), "{}", spec.row().name);
        }
    }
}

#[test]
fn a_row_that_is_not_finite_reaches_no_expert() {
    let experts = 4;
    for spec in arms(experts) {
        let estimator = spec.at(0, STEPS);
        let width = estimator.router_width(experts);
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut z = normals(1, 3 * width, 0.4);
            z[width + width / 2] = bad;
            let routed = estimator.route(&z, experts, &StepContext::train(draw()));
            assert!(routed.rows().of(1).is_empty() && routed.weights[experts..2 * experts].iter().all(|w| *w == 0.0));
            let mut dz = vec![0.0; z.len()];
            estimator.vjp(&z, &routed, &normals(2, 3 * experts, 1.0), &mut dz);
            estimator.score(&z, &routed, &[1.0; 3], &mut dz);
            assert!(dz.iter().all(|d| d.is_finite()) && dz[width..2 * width].iter().all(|d| *d == 0.0), "{}", spec.row().name);
            assert_eq!(estimator.log_prob(&z, &routed)[1], 0.0);
            let stats = routed.stats(&z);
            assert_eq!((stats.tokens, stats.non_finite), (3, 1));
            assert!(stats.entropy_sum.is_finite() && stats.expert_weights.iter().all(|w| w.is_finite()));
        }
        let none = estimator.route(&[], experts, &StepContext::train(draw()));
        assert_eq!((none.tokens, none.offsets.as_slice(), none.weights.len()), (0, &[0][..], 0));
    }
}

#[test]
fn ties_go_to_the_lowest_index() {
    for (name, k) in [("raw_topk", 2), ("ste", 2), ("renorm_topk", 2), ("densemixer", 2)] {
        let routed = spec(name, Some(k), &[], 4).at(0, 1).route(&[0.5, 1.0, 1.0, 1.0], 4, &StepContext::train(draw()));
        assert_eq!(routed.chosen, [1, 2], "{name}");
    }
}

#[test]
fn all_experts_of_top_k_are_the_mixture() {
    let experts = 6;
    let z = normals(1, 10 * experts, 1.0);
    let ctx = StepContext::train(draw());
    let soft = spec("soft", None, &[], experts).at(0, 1).route(&z, experts, &ctx);
    for name in ["raw_topk", "renorm_topk", "ste", "ste_sparse", "densemixer"] {
        let routed = spec(name, Some(experts), &[], experts).at(0, 1).route(&z, experts, &ctx);
        assert_close(&routed.weights, &soft.weights, 1e-15, name);
    }
}

#[test]
fn what_is_served_is_the_top_k_of_the_logits_in_the_methods_own_weights() {
    let experts = 8;
    for spec in arms(experts) {
        let (name, estimator) = (spec.row().name, spec.at(STEPS, STEPS));
        let z = normals(7, 30 * estimator.router_width(experts), 0.4);
        for k in [1, 2] {
            let hard = estimator.hard(k);
            assert_eq!(
                (hard.router_width(experts), hard.executed_per_token(experts)),
                (estimator.router_width(experts), Expected::Exactly(k))
            );
            let routed = hard.route(&z, experts, &StepContext::train(draw()));
            let mut dz = vec![0.0; z.len()];
            hard.vjp(&z, &routed, &vec![1.0; 30 * experts], &mut dz);
            assert!(dz.iter().all(|d| *d == 0.0), "{name}");
            for (token, z) in z.chunks(estimator.router_width(experts)).enumerate() {
                let (chosen, weights) = (routed.rows().of(token), &routed.weights[token * experts..][..experts]);
                assert_eq!(chosen.len(), k, "{name}");
                if name != "dselect_k" {
                    let least = chosen.iter().map(|&e| z[e as usize]).fold(f64::INFINITY, f64::min);
                    assert_eq!(z[..experts].iter().filter(|z| **z >= least).count(), k, "{name}");
                }
                let total: f64 = weights.iter().sum();
                match estimator.serve {
                    WeightForm::Raw => {}
                    WeightForm::Renorm => assert!((total - 1.0).abs() < 1e-12, "{name}"),
                    WeightForm::Unit => chosen.iter().for_each(|&e| assert!((weights[e as usize] - 1.0 / k as f64).abs() < 1e-15)),
                }
            }
        }
    }
}

#[test]
fn hard_forwards_equal_what_is_served() {
    // The straight-through forward is the serving forward; top-k rows are too.
    let experts = 8;
    let z = normals(7, 30 * experts, 1.0);
    for (name, k) in [("ste", 1), ("ste", 2), ("ste_sparse", 2), ("renorm_topk", 2), ("raw_topk", 1), ("raw_topk", 2), ("densemixer", 2)] {
        let estimator = spec(name, Some(k), &[], experts).at(0, 1);
        let [trained, served] = [estimator, estimator.hard(k)].map(|estimator| estimator.route(&z, experts, &StepContext::train(draw())));
        assert_eq!((trained.weights, trained.chosen), (served.weights, served.chosen), "{name}");
    }
}

#[test]
fn a_bias_moves_the_choice_and_not_the_weight() {
    let z = [1.0, 0.9, 0.0, -1.0];
    let bias = [0.0, 0.0, 0.95, 0.0];
    let p = softmax(&z);
    for (name, weight) in [("raw_topk", p[2]), ("ste", 1.0)] {
        let estimator = spec(name, Some(1), &[], 4).at(0, 1);
        let routed = estimator.route(&z, 4, &StepContext { bias: Some(&bias), ..StepContext::train(draw()) });
        assert_eq!(routed.chosen, [0], "{name}");
        let bias = [0.0, 0.0, 1.05, 0.0];
        let routed = estimator.route(&z, 4, &StepContext { bias: Some(&bias), ..StepContext::train(draw()) });
        assert_eq!(routed.chosen, [2], "{name}");
        assert!((routed.weights[2] - weight).abs() < 1e-15, "{name}");
        assert_close(routed.relaxed(), &p, 1e-15, "p is what it was");
    }
    // Sigmoid scores take the bias after the sigmoid: 0.73, 0.71, 0.5 + 0.22.
    let sigmoid = spec("sigmoid_topk", Some(1), &[], 4).at(0, 1);
    let bias = [0.0, 0.0, 0.22, 0.0];
    assert_eq!(sigmoid.route(&z, 4, &StepContext { bias: Some(&bias), ..StepContext::train(draw()) }).chosen, [0]);
    let bias = [0.0, 0.0, 0.24, 0.0];
    assert_eq!(sigmoid.route(&z, 4, &StepContext { bias: Some(&bias), ..StepContext::train(draw()) }).chosen, [2]);
}

#[test]
fn exploration_draws_evenly_and_hides_experts() {
    let (experts, tokens) = (4, 20_000);
    let z: Vec<f64> = [5.0, 0.0, 0.0, 0.0].repeat(tokens);
    let estimator = spec("raw_topk", Some(1), &[], experts).at(0, 1);
    let share = |explore| {
        let routed = estimator.route(&z, experts, &StepContext { explore, ..StepContext::train(draw()) });
        routed.chosen.iter().filter(|e| **e == 0).count() as f64 / tokens as f64
    };
    let error = 4.0 * (0.25f64 / tokens as f64).sqrt();
    assert_eq!(share(Exploration::NONE), 1.0);
    assert!((share(Exploration { epsilon: 0.4, dropout: 0.0 }) - 0.7).abs() < error);
    let hidden = share(Exploration { epsilon: 0.0, dropout: 0.3 });
    // The last one of four is never hidden: 0.3 less the share in which it would have been the first expert of all hidden.
    assert!((hidden - (0.7 + 0.3f64.powi(4) / 4.0)).abs() < error, "{hidden}");
    let all =
        estimator.route(&z, experts, &StepContext { explore: Exploration { epsilon: 0.9, dropout: 0.9 }, ..StepContext::train(draw()) });
    assert!(all.weights.iter().all(|w| w.is_finite()) && all.chosen.len() == tokens);
}

#[test]
fn capacity_takes_from_the_choice() {
    let (experts, tokens) = (4, 8);
    let z: Vec<f64> = [2.0, 1.0, 0.0, -1.0].repeat(tokens);
    let estimator = spec("renorm_topk", Some(2), &[], experts).at(0, 1);
    let route = |overflow| {
        let capacity = Some(Capacity { factor: 1.0, overflow, order: Order::Position });
        estimator.route(&z, experts, &StepContext { capacity, ..StepContext::train(draw()) })
    };
    // Room for 4 rows each.
    let dropped = route(Overflow::Drop);
    assert_eq!((dropped.chosen.len(), dropped.capacity.dropped, dropped.wanted().chosen.len()), (8, 8, 16));
    assert!(dropped.rows().of(7).is_empty() && dropped.weights[7 * experts..].iter().all(|w| *w == 0.0));
    let rerouted = route(Overflow::Reroute);
    assert_eq!((rerouted.chosen.len(), rerouted.capacity.rerouted), (16, 8));
    assert_eq!(rerouted.rows().of(7), [2, 3]);
    let counted = [&dropped, &rerouted].map(|routed| routed.stats(&z)).map(|stats| (stats.routes, stats.dropped, stats.rerouted));
    assert_eq!(counted, [(8, 8, 0), (16, 0, 8)]);
    for routed in [&dropped, &rerouted] {
        let sums: Vec<f64> = routed.weights.chunks(experts).map(|row| row.iter().sum()).collect();
        assert!((0..tokens).all(|t| (sums[t] - if routed.rows().of(t).is_empty() { 0.0 } else { 1.0 }).abs() < 1e-15));
        let mut dz = vec![0.0; z.len()];
        estimator.vjp(&z, routed, &normals(1, tokens * experts, 1.0), &mut dz);
        assert!(dz.iter().all(|d| d.is_finite()));
    }
    // Draws one after the other keep the softmax they were drawn from.
    let masked = spec("sparsemixer_v2", Some(2), &[("r", Param::Number(2.0))], experts).at(0, 1);
    let capacity = Some(Capacity { factor: 0.5, overflow: Overflow::Reroute, order: Order::Position });
    let routed = masked.route(&z, experts, &StepContext { capacity, ..StepContext::train(draw()) });
    let mut dz = vec![0.0; z.len()];
    masked.vjp(&z, &routed, &normals(1, tokens * experts, 1.0), &mut dz);
    assert!(routed.capacity.rerouted + routed.capacity.dropped > 0 && dz.iter().chain(&routed.weights).all(|x| x.is_finite()));
}

#[test]
fn load_is_what_was_chosen() {
    let z = [1.0, 0.0, 3.0, /* */ 0.0, 2.0, 1.0];
    let ctx = StepContext::train(draw());
    let soft = spec("soft", None, &[], 3).at(0, 1);
    let stats = soft.route(&z, 3, &ctx).stats(&z);
    assert_eq!((stats.tokens, stats.routes, stats.expert_tokens.as_slice()), (2, 2, &[0, 1, 1][..]), "the largest weight counts");
    let (first, second) = (softmax(&z[..3]), softmax(&z[3..]));
    let both: Vec<f64> = first.iter().zip(&second).map(|(a, b)| a + b).collect();
    assert_close(&stats.expert_weights, &both, 1e-15, "mass");
    let entropy = -[first, second].concat().iter().map(|p| p * p.ln()).sum::<f64>();
    assert!((stats.entropy_sum - entropy).abs() < 1e-12);
    let top = spec("ste", Some(2), &[], 3).at(0, 1).route(&z, 3, &ctx).stats(&z);
    assert_eq!((top.routes, top.expert_tokens.as_slice()), (4, &[1, 1, 2][..]));
}
