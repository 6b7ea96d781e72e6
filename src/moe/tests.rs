//! Policies, plans, losses; the two forms of the layer against each other.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{Device, Tensor, Var};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{
    LayerRouting, LayerState, MoeLayer, Routing, RoutingMode, SparseRouting, TrainState,
    capacity::{Capacity, Order, Overflow},
    estimator::{Baseline, Estimator, EstimatorConfig, EstimatorSpec, Expected, Gradient, Purpose, catalog},
    kernel::{CpuKernel, ExpertKernel},
    plan::DispatchPlan,
    policy::{RoutingChoice, RoutingPolicy, WeightForm},
    route::route_rows,
};
use crate::model::{MoeSpec, ReferenceRouting, weights::MoeWeights};

mod through_candle;

const E: usize = 6;

fn random(shape: &[usize], rng: &mut StdRng) -> Tensor {
    let count = shape.iter().product();
    Tensor::from_vec((0..count).map(|_| rng.random_range(-1f32..1.0)).collect(), shape, &Device::Cpu).unwrap()
}

fn one(row: &[f32], policy: RoutingPolicy) -> SparseRouting {
    route_rows(row, row.len(), std::iter::once(policy)).0
}

fn top(k: usize, weight_form: WeightForm) -> RoutingPolicy {
    RoutingPolicy::TopK { k, weight_form }
}

#[test]
fn ties_go_to_the_lowest_index() {
    for k in 1..=6 {
        let routing = one(&[1.0, 3.0, 3.0, 0.0, 3.0, 1.0], top(k, WeightForm::Raw));
        assert_eq!(routing.expert_ids, [1, 2, 4, 0, 5, 3][..k]);
        let zeros = one(&[-0.0, 0.0, -1.0, 0.0, -0.0, -0.0], top(k, WeightForm::Raw));
        assert_eq!(zeros.expert_ids, [0, 1, 3, 4, 5, 2][..k], "-0 is 0");
    }
}

#[test]
fn weight_forms() {
    let logits = [0.0f32, 2.0, 1.0];
    let p: Vec<f32> = logits.iter().map(|z| z.exp() / logits.iter().map(|z| z.exp()).sum::<f32>()).collect();
    let close = |a: &[f32], b: &[f32]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
    assert!(close(&one(&logits, top(2, WeightForm::Raw)).weights, &[p[1], p[2]]));
    assert!(close(&one(&logits, top(2, WeightForm::Renorm)).weights, &[p[1] / (p[1] + p[2]), p[2] / (p[1] + p[2])]));
    assert!(close(&one(&logits, top(2, WeightForm::Unit)).weights, &[0.5, 0.5]));
    assert_eq!(one(&logits, top(1, WeightForm::Renorm)).weights, [1.0]);
    assert!(close(&one(&logits, RoutingPolicy::Soft { temperature: 1.0 }).weights, &[p[1], p[2], p[0]]));
    let sharp = one(&logits, RoutingPolicy::Soft { temperature: 0.01 });
    assert!(sharp.weights[0] > 0.999_999 && sharp.expert_ids[0] == 1);
}

#[test]
fn huge_logits_do_not_overflow() {
    for policy in [top(2, WeightForm::Raw), top(3, WeightForm::Renorm), RoutingPolicy::Soft { temperature: 1e-30 }] {
        let routing = one(&[3e38, -3e38, 3e38], policy);
        assert!(routing.weights.iter().all(|w| w.is_finite()), "{policy}: {routing:?}");
    }
}

#[test]
fn a_non_finite_row_is_alone() {
    let rows = [0.0, 1.0, f32::NAN, 1.0, 2.0, f32::INFINITY, 5.0, 4.0];
    let (routing, report) = route_rows(&rows, 2, std::iter::repeat(top(1, WeightForm::Renorm)));
    assert_eq!((routing.offsets.as_slice(), routing.expert_ids.as_slice()), (&[0, 1, 1, 1, 2][..], &[1, 0][..]));
    assert_eq!(report.non_finite, [1, 2]);
    assert!(report.entropy_sum.is_finite());
}

#[test]
fn near_ties_are_between_the_last_chosen_and_the_first_refused() {
    let near = |rows: &[f32], policy| route_rows(rows, 4, std::iter::repeat(policy)).1.near_ties;
    let k = |k| top(k, WeightForm::Renorm);
    // 1 against 1.005, 1 against 1.5, an exact tie, a tie of numbers so large that 0.01 is nothing to them, and no number.
    let rows = [[1.0, 1.005, 0.0, -1.0], [1.0, 1.5, 0.0, -1.0], [2.0, 2.0, 0.0, 0.0], [-3e38, 3e38, 3e38, 0.0], [f32::NAN, 0.0, 0.0, 0.0]];
    assert_eq!(near(rows.as_flattened(), k(1)), 3);
    assert_eq!(rows.map(|row| near(&row, k(2))), [0; 5]);
    assert_eq!(rows.map(|row| near(&row, k(3))), [0, 0, 1, 0, 0]);
    for all in [k(4), RoutingPolicy::Soft { temperature: 1.0 }] {
        assert_eq!(near(rows.as_flattened(), all), 0, "nobody is refused");
    }
    assert_eq!(near(&[0.0, 0.02, 0.0101, 0.0], k(1)), 1);
    assert_eq!(near(&[0.0, 0.02, 0.0099, 0.0], k(1)), 0);
    // Also where the choice is a sort.
    let eight = [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.995];
    let (_, report) = route_rows(&eight, 8, std::iter::once(k(7)));
    assert_eq!(report.near_ties, 1);
}

#[test]
fn rows_may_have_different_policies() {
    let rows = [0.0, 1.0, 2.0].repeat(3);
    let policies = [top(1, WeightForm::Renorm), RoutingPolicy::Soft { temperature: 1.0 }, top(2, WeightForm::Raw)];
    let (routing, _) = route_rows(&rows, 3, policies.into_iter());
    assert_eq!(routing.offsets, [0, 1, 4, 6]);
    for (token, policy) in policies.into_iter().enumerate() {
        let alone = one(&rows[..3], policy);
        assert_eq!(routing.weights[routing.routes(token)], alone.weights[..]);
    }
}

#[test]
fn plan_is_a_stable_sort_and_knows_the_way_back() {
    let routing = SparseRouting { offsets: vec![0, 2, 2, 3, 5], expert_ids: vec![3, 1, 1, 0, 3], weights: vec![0.1, 0.2, 0.3, 0.4, 0.5] };
    let plan = DispatchPlan::new(&routing, 4);
    assert_eq!(plan.offsets, [0, 1, 3, 3, 5]);
    assert_eq!(plan.tokens, [3, 0, 2, 0, 3]);
    assert_eq!(plan.routes(0).collect::<Vec<_>>(), [(3, 0.1), (1, 0.2)]);
    assert_eq!(plan.routes(1).count(), 0);
    assert_eq!(plan.active().collect::<Vec<_>>(), [(0, 0..1), (1, 1..3), (3, 3..5)]);
    let load = plan.load();
    assert_eq!((load.expert_tokens.as_slice(), load.dead(), load.routes, load.tokens), (&[1, 2, 0, 2][..], 1, 5, 4));
    assert!((load.expert_weights[3] - 0.6).abs() < 1e-6);
    assert!((load.balancedness() - 5.0 / 4.0 / 2.0).abs() < 1e-12);
}

#[test]
fn choices_are_read_and_written() {
    for text in ["native", "top-1", "top-2:raw", "top-8:unit", "mass-0.9", "mass-0.5:3", "mass-1:2:renorm", "soft", "soft:0.5"] {
        assert_eq!(text.parse::<RoutingChoice>().unwrap().to_string(), text);
    }
    for text in ["", "top", "top-", "top-x", "top-1:", "top-1:best", "mass", "mass-x", "mass-1:raw", "soft:warm", "native:1", "hard"] {
        assert!(text.parse::<RoutingChoice>().is_err(), "{text}");
    }
}

fn spec() -> MoeSpec {
    MoeSpec { num_experts: E, expert_width: 10, top_k: 2, weight_form: WeightForm::Raw, shared_expert_width: None }
}

fn layer(weights: MoeWeights) -> MoeLayer {
    let kernel: Arc<dyn ExpertKernel> = Arc::new(CpuKernel::default());
    MoeLayer::new(0, spec(), ReferenceRouting::Soft { temperature: 1.0 }, weights, kernel)
}

fn weights(rng: &mut StdRng) -> MoeWeights {
    MoeWeights { router: random(&[E, 8], rng), gate_up: random(&[E, 20, 8], rng), down: random(&[E, 8, 10], rng), shared: None }
}

fn serve(layer: &MoeLayer, x: &Tensor, choice: RoutingChoice) -> Vec<Vec<f32>> {
    let runs = [(choice.into(), x.dim(0).unwrap())];
    layer.forward(x, &mut RoutingMode::Serve { runs: &runs, observer: None }).unwrap().0.to_vec2().unwrap()
}

fn step(layer: &MoeLayer, x: &Tensor, policy: RoutingPolicy, state: &mut TrainState) -> (Tensor, LayerRouting) {
    layer.forward(x, &mut RoutingMode::Train { policy, state }).unwrap()
}

fn train(layer: &MoeLayer, x: &Tensor, policy: RoutingPolicy) -> Tensor {
    step(layer, x, policy, &mut TrainState::new(0)).0
}

/// A row of the catalogue in the middle of a run of 100 steps.
fn named(name: &str, k: Option<usize>) -> Option<Estimator> {
    let config = EstimatorConfig { name: name.into(), k, params: BTreeMap::new() };
    Some(EstimatorSpec::new(&config, E, 100, Purpose::Laboratory).ok()?.at(50, 100))
}

fn assert_close(a: &[Vec<f32>], b: &[Vec<f32>], what: &str) {
    let worst = a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(worst < 1e-5, "{what}: {worst}");
}

#[test]
fn top_k_of_all_experts_is_soft() {
    let rng = &mut StdRng::seed_from_u64(1);
    let (layer, x) = (layer(weights(rng)), random(&[13, 8], rng));
    let soft = serve(&layer, &x, RoutingChoice::Soft { temperature: None });
    for form in [WeightForm::Raw, WeightForm::Renorm] {
        assert_close(&serve(&layer, &x, RoutingChoice::TopK { k: E, weight_form: Some(form) }), &soft, "k = E");
    }
}

#[test]
fn serving_and_training_compute_the_same_function() {
    let rng = &mut StdRng::seed_from_u64(2);
    let (layer, x) = (layer(weights(rng)), random(&[13, 8], rng));
    let soft = train(&layer, &x, RoutingPolicy::Soft { temperature: 0.7 }).to_vec2().unwrap();
    assert_close(&soft, &serve(&layer, &x, RoutingChoice::Soft { temperature: Some(0.7) }), "soft");
    for (k, weight_form) in
        [(1, WeightForm::Raw), (2, WeightForm::Raw), (2, WeightForm::Renorm), (1, WeightForm::Renorm), (3, WeightForm::Unit)]
    {
        let hard = train(&layer, &x, top(k, weight_form)).to_vec2().unwrap();
        assert_close(&hard, &serve(&layer, &x, RoutingChoice::TopK { k, weight_form: Some(weight_form) }), "hard");
    }
}

/// Norm of the gradient that reaches the router from a loss on the layer's output.
fn router_gradient(policy: RoutingPolicy) -> f32 {
    let rng = &mut StdRng::seed_from_u64(3);
    let weights = weights(rng);
    let router = Var::from_tensor(&weights.router).unwrap();
    let layer = layer(MoeWeights { router: router.as_tensor().clone(), ..weights });
    let loss = train(&layer, &random(&[29, 8], rng), policy).sqr().unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    grads.get(&router).map_or(0.0, |g| g.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt())
}

/// The problem that this program is about: what is served has no gradient to train the router with.
#[test]
fn hard_top_1_gives_the_router_no_gradient() {
    assert_eq!(router_gradient(top(1, WeightForm::Unit)), 0.0, "the weight is the constant 1");
    assert_eq!(router_gradient(top(1, WeightForm::Renorm)), 0.0, "p / p is 1 whatever p is");
    assert!(router_gradient(top(1, WeightForm::Raw)) > 1e-2, "the probability itself does carry one");
    assert!(router_gradient(top(2, WeightForm::Renorm)) > 1e-2);
    assert!(router_gradient(RoutingPolicy::Soft { temperature: 1.0 }) > 1e-2);
    assert!(router_gradient(RoutingPolicy::Estimator(named("gumbel_soft", None).unwrap())) > 1e-2);
    assert!(router_gradient(RoutingPolicy::Estimator(named("ste", Some(1)).unwrap())) > 1e-2);
    assert_eq!(router_gradient(RoutingPolicy::Estimator(named("onehot", Some(1)).unwrap())), 0.0);
}

#[test]
fn noise_is_that_of_seed_and_step() {
    let rng = &mut StdRng::seed_from_u64(5);
    let (layer, x) = (layer(weights(rng)), random(&[13, 8], rng));
    let policy = RoutingPolicy::Estimator(named("gumbel_soft", None).unwrap());
    let at = |seed, number| {
        let state = &mut TrainState { step: number, ..TrainState::new(seed) };
        step(&layer, &x, policy, state).0.to_vec2::<f32>().unwrap()
    };
    assert_eq!(at(5, 3), at(5, 3));
    assert_ne!(at(5, 3), at(6, 3));
    assert_ne!(at(5, 3), at(5, 4));
    let quiet = step(&layer, &x, policy, &mut TrainState::evaluation(Vec::new())).0.to_vec2::<f32>().unwrap();
    assert_ne!(at(5, 3), quiet, "evaluation is without noise");
}

/// Rows that ran, counted, against what the catalogue says of every method.
#[test]
fn every_estimator_executes_what_it_says() {
    for row in catalog::CATALOG {
        for estimator in [Some(1), Some(2), None].into_iter().filter_map(|k| named(row.name, k)) {
            let rng = &mut StdRng::seed_from_u64(6);
            let weights = MoeWeights { router: random(&[estimator.router_width(E), 8], rng), ..weights(rng) };
            let copies = estimator.copies();
            let x = random(&[29, 8], rng).repeat((copies, 1)).unwrap();
            let (y, routing) = step(&layer(weights), &x, RoutingPolicy::Estimator(estimator), &mut TrainState::new(2));
            assert!(y.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|y| y.is_finite()), "{}", row.name);
            let executed = routing.stats.executed;
            match estimator.executed_per_token(E) {
                Expected::Exactly(n) => assert_eq!(executed, 29 * n as u64, "{}", row.name),
                Expected::AtMost(n) => {
                    assert!(executed < 29 * n as u64, "{}: {executed} is all of them", row.name);
                    assert_eq!(executed, routing.stats.routes, "{}", row.name);
                }
                Expected::Merged => assert_eq!(executed, 29, "{}", row.name),
            }
        }
    }
}

/// Outputs `[E, D]` of the experts for one token.
fn outputs(layer: &MoeLayer, x: &Tensor) -> Vec<Vec<f32>> {
    let route: Vec<u32> = (0..E as u32).collect();
    let state = &mut TrainState { fixed: Some(route.into()), ..TrainState::new(0) };
    step(layer, &x.repeat((E, 1)).unwrap(), top(1, WeightForm::Unit), state).0.to_vec2().unwrap()
}

#[test]
fn means_that_are_the_outputs_make_default_moe_the_soft_mixture() {
    let rng = &mut StdRng::seed_from_u64(7);
    let weights = weights(rng);
    let router = Var::from_tensor(&weights.router).unwrap();
    let layer = layer(MoeWeights { router: router.as_tensor().clone(), ..weights });
    let token = random(&[1, 8], rng);
    let (x, estimator) = (token.repeat((3, 1)).unwrap(), RoutingPolicy::Estimator(named("default_moe", Some(2)).unwrap()));
    let known = LayerState { means: outputs(&layer, &token).concat(), seen: vec![true; E], ..LayerState::default() };
    let gradient = |y: &Tensor| {
        let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        grads.get(&router).unwrap().to_vec2::<f32>().unwrap()
    };
    let mut state = TrainState { layers: vec![known], ..TrainState::new(0) };
    let (y, _) = step(&layer, &x, estimator, &mut state);
    let soft = train(&layer, &x, RoutingPolicy::Soft { temperature: 1.0 });
    assert_close(&y.to_vec2().unwrap(), &soft.to_vec2().unwrap(), "output");
    assert_close(&gradient(&y), &gradient(&soft), "gradient");

    let mut state = TrainState::new(0);
    let (_, routing) = step(&layer, &x, estimator, &mut state);
    let Routing::Dense { routed, .. } = routing.routing else { panic!("training routes densely") };
    let (learnt, wanted) = (state.layers[0].clone(), outputs(&layer, &token));
    for expert in 0..E {
        assert_eq!(learnt.seen[expert], routed.chosen.contains(&(expert as u32)));
        if learnt.seen[expert] {
            assert_close(&[learnt.means[expert * 8..][..8].to_vec()], &wanted[expert..=expert], "the first rows set a mean");
        }
    }
    let before = state.layers.clone();
    state.phase = super::estimator::Phase::Evaluate;
    step(&layer, &x, estimator, &mut state);
    assert_eq!(state.layers, before, "evaluation teaches nothing");
}

#[test]
fn a_merged_expert_of_a_sharp_router_is_the_chosen_one() {
    let rng = &mut StdRng::seed_from_u64(8);
    let (layer, x) = (layer(weights(rng)), random(&[13, 8], rng));
    let smear = named("smear", None).unwrap();
    let sharp = super::estimator::Relaxation::Softmax { temperature: 1e-4 };
    let state = &mut TrainState::evaluation(Vec::new());
    let merged = step(&layer, &x, RoutingPolicy::Estimator(Estimator { relaxation: sharp, ..smear }), state).0;
    let chosen = train(&layer, &x, top(1, WeightForm::Unit));
    assert_close(&merged.to_vec2().unwrap(), &chosen.to_vec2().unwrap(), "merged");
}

#[test]
fn a_token_for_which_there_is_no_room_passes_by() {
    let rng = &mut StdRng::seed_from_u64(9);
    let (layer, x) = (layer(weights(rng)), random(&[1, 8], rng).repeat((12, 1)).unwrap());
    let capacity = Capacity { factor: 1.0, overflow: Overflow::Drop, order: Order::Position };
    let state = &mut TrainState { capacity: Some(capacity), ..TrainState::new(0) };
    let (y, routing) = step(&layer, &x, top(1, WeightForm::Unit), state);
    let rows = y.to_vec2::<f32>().unwrap();
    assert_eq!(routing.stats.executed, 2, "12 tokens on 6 experts: 2 each, and all want the same");
    assert!(rows[..2].iter().flatten().any(|y| *y != 0.0) && rows[2..].iter().flatten().all(|y| *y == 0.0));
}

#[test]
fn jitter_reaches_the_router_and_not_the_experts() {
    let rng = &mut StdRng::seed_from_u64(10);
    let (layer, x) = (layer(weights(rng)), random(&[13, 8], rng));
    let at = |jitter, phase| {
        let state = &mut TrainState { jitter, phase, ..TrainState::new(0) };
        step(&layer, &x, RoutingPolicy::Soft { temperature: 1.0 }, state).1.router_logits.to_vec2::<f32>().unwrap()
    };
    use super::estimator::Phase::{Evaluate, Train};
    assert_ne!(at(0.1, Train), at(0.0, Train));
    assert_eq!(at(0.1, Evaluate), at(0.0, Train));
    let route: Arc<[u32]> = vec![0; 13].into();
    let fixed = |jitter| {
        let state = &mut TrainState { jitter, fixed: Some(route.clone()), ..TrainState::new(0) };
        step(&layer, &x, top(1, WeightForm::Unit), state).0.to_vec2::<f32>().unwrap()
    };
    assert_eq!(fixed(0.1), fixed(0.0));
}

#[test]
fn jitter_does_not_reach_the_greedy_copy() {
    let rng = &mut StdRng::seed_from_u64(11);
    let (layer, x) = (layer(weights(rng)), random(&[13, 8], rng).repeat((3, 1)).unwrap());
    let gradient = Gradient::Score { baseline: Baseline::SelfCritical, samples: 2 };
    let policy = RoutingPolicy::Estimator(Estimator { gradient, ..named("reinforce", Some(1)).unwrap() });
    let at = |jitter| {
        let state = &mut TrainState { jitter, copy_rows: 13, ..TrainState::new(0) };
        step(&layer, &x, policy, state).1.router_logits.to_vec2::<f32>().unwrap()
    };
    let (noisy, quiet) = (at(0.1), at(0.0));
    assert!(noisy[..26].iter().zip(&quiet[..26]).all(|(a, b)| a != b), "the draws");
    assert_eq!(noisy[26..], quiet[26..], "the greedy copy");
}
