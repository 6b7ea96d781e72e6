//! What a router wants, whatever training makes of it.

use super::*;
use crate::moe::{
    capacity::{Capacity, Order, Overflow},
    collapse::Monitor,
    estimator::StepContext,
    explore::Exploration,
    loss::{AuxLoss, LossInput},
};

const EXPERTS: usize = 8;
const TOKENS: usize = 800;

/// Router logits that lead by far for experts 0 to 5, each for its share of the tokens, and never for 6 and 7.
fn logits() -> Vec<f64> {
    let mut z = normals(1, TOKENS * EXPERTS, 0.1);
    z.chunks_exact_mut(EXPERTS).enumerate().for_each(|(t, row)| row[t % 6] += 9.0);
    z
}

fn wild() -> StepContext<'static> {
    StepContext {
        explore: Exploration { epsilon: 0.5, dropout: 0.5 },
        capacity: Some(Capacity { factor: 1.0, overflow: Overflow::Reroute, order: Order::Position }),
        ..StepContext::train(Draw::new(2, 0, 0))
    }
}

#[test]
fn exploration_and_capacity_hide_no_dead_expert() {
    for (name, k) in [("raw_topk", Some(1)), ("ste", Some(1)), ("noisy_topk", Some(1)), ("sigmoid_topk", Some(1))] {
        let estimator = spec(name, k, &[], EXPERTS).at(0, 1);
        let mut z = logits();
        if estimator.router_width(EXPERTS) > EXPERTS {
            z = z.chunks_exact(EXPERTS).flat_map(|row| [row, &[0.0; EXPERTS]].concat()).collect();
        }
        let routed = estimator.route(&z, EXPERTS, &wild());
        let ran = routed.rows().counts(0..TOKENS, EXPERTS);
        assert!(ran.iter().all(|n| *n > 50.0), "{name}: {ran:?}");
        let preference = estimator.preference(&z, &routed);
        let mut monitor = Monitor::new(EXPERTS, estimator.k(), 1000);
        monitor.observe(preference.choices.rows());
        assert_eq!(monitor.dead(), [6, 7], "{name}");
        assert!(preference.scores.iter().all(|score| score.is_finite()), "{name}: no expert is hidden");
    }
}

#[test]
fn dropout_makes_no_expert_dead() {
    // Each expert is wanted by a quarter of the tokens, and hidden from most of them.
    let z: Vec<f64> = (0..TOKENS).flat_map(|t| (0..4).map(move |e| if e == t % 4 { 5.0 } else { 0.0 })).collect();
    let estimator = spec("raw_topk", Some(1), &[], 4).at(0, 1);
    let context = StepContext { explore: Exploration { epsilon: 0.0, dropout: 0.9 }, ..StepContext::train(Draw::new(2, 0, 0)) };
    let preference = estimator.preference(&z, &estimator.route(&z, 4, &context));
    assert_eq!(preference.choices.rows().counts(0..TOKENS, 4), [200.0; 4]);
    assert_eq!(preference.scores, z);
}

#[test]
fn a_bias_takes_part_in_the_choice_and_not_in_the_score() {
    let (z, mut bias) = (logits(), [0.0; EXPERTS]);
    bias[7] = 20.0;
    let estimator = spec("raw_topk", Some(1), &[], EXPERTS).at(0, 1);
    let preference = estimator.preference(&z, &estimator.route(&z, EXPERTS, &StepContext { bias: Some(&bias), ..wild() }));
    assert!(preference.choices.chosen.iter().all(|e| *e == 7));
    assert_eq!(preference.scores, z);
}

#[test]
fn a_mixture_of_all_prefers_what_it_would_be_served_with() {
    for (name, k) in [("soft", None), ("gumbel_soft", None), ("steep_sigmoid", Some(2)), ("soft_topk", Some(2))] {
        let estimator = spec(name, k, &[], EXPERTS).at(0, STEPS);
        let z = logits();
        let preference = estimator.preference(&z, &estimator.route(&z, EXPERTS, &StepContext::train(Draw::new(2, 0, 0))));
        let served = estimator.hard(estimator.k()).route(&z, EXPERTS, &StepContext::evaluate(Draw::new(0, 0, 0)));
        assert_eq!(preference.choices.chosen.len(), TOKENS * estimator.k(), "{name}");
        assert_eq!(preference.choices.chosen, served.chosen, "{name}");
    }
}

/// Losses see the choices that the router made, whatever capacity left of them.
#[test]
fn capacity_changes_no_loss() {
    let (z, estimator) = (logits(), spec("raw_topk", Some(2), &[], EXPERTS).at(0, 1));
    for overflow in [Overflow::Drop, Overflow::Reroute] {
        let limited = Some(Capacity { factor: 0.3, overflow, order: Order::Position });
        let values = |capacity| {
            let routed = estimator.route(&z, EXPERTS, &StepContext { capacity, ..StepContext::train(Draw::new(2, 0, 0)) });
            let input = LossInput {
                z: &z,
                experts: EXPERTS,
                temperature: 1.0,
                choices: routed.wanted(),
                k: 2,
                sequences: &[],
                global_load: None,
                noise: None,
                teacher: None,
            };
            let of = |loss: AuxLoss| loss.value_and_grad(&input, 1.0, &mut vec![0.0; z.len()]).unwrap();
            let losses = AuxLoss::ALL.into_iter().filter(|loss| !matches!(loss, AuxLoss::Load | AuxLoss::RouterKl));
            (losses.map(of).collect::<Vec<_>>(), routed.chosen)
        };
        let (free, full) = (values(None), values(limited));
        assert_ne!(free.1, full.1);
        assert_eq!(free.0, full.0);
    }
}
