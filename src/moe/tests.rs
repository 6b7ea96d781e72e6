//! Policies, plans, losses; the two forms of the layer against each other.

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{
    MoeLayer, Routing, RoutingMode, SparseRouting,
    kernel::{CpuKernel, ExpertKernel},
    loss_tensor as loss,
    plan::DispatchPlan,
    policy::{RoutingChoice, RoutingPolicy, WeightForm},
    route::{route_dense, route_rows},
};
use crate::model::{MoeSpec, ReferenceRouting, weights::MoeWeights};

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
    for text in ["native", "top-1", "top-2:raw", "top-8:unit", "soft", "soft:0.5"] {
        assert_eq!(text.parse::<RoutingChoice>().unwrap().to_string(), text);
    }
    for text in ["", "top", "top-", "top-x", "top-1:", "top-1:best", "soft:warm", "native:1", "hard"] {
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
    let runs = [(choice, x.dim(0).unwrap())];
    layer.forward(x, &mut RoutingMode::Serve(&runs)).unwrap().0.to_vec2().unwrap()
}

fn train(layer: &MoeLayer, x: &Tensor, policy: RoutingPolicy) -> Tensor {
    layer.forward(x, &mut RoutingMode::Train { policy, rng: &mut StdRng::seed_from_u64(0) }).unwrap().0
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
    let quiet = train(&layer, &x, RoutingPolicy::GumbelSoftmax { temperature: 0.7, noise: 0.0 }).to_vec2().unwrap();
    assert_close(&quiet, &soft, "Gumbel without noise");
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
    assert!(router_gradient(top(1, WeightForm::Renorm)) < 1e-4, "p / p is 1 whatever p is");
    assert!(router_gradient(top(1, WeightForm::Raw)) > 1e-2, "the probability itself does carry one");
    assert!(router_gradient(top(2, WeightForm::Renorm)) > 1e-2);
    assert!(router_gradient(RoutingPolicy::Soft { temperature: 1.0 }) > 1e-2);
    assert!(router_gradient(RoutingPolicy::GumbelSoftmax { temperature: 1.0, noise: 1.0 }) > 1e-2);
}

#[test]
fn gumbel_noise_is_seeded_and_samples_by_the_softmax() {
    let z = Tensor::from_vec([0.0f32, 1.0, 2.0].repeat(4000), (4000, 3), &Device::Cpu).unwrap();
    let policy = RoutingPolicy::GumbelSoftmax { temperature: 0.1, noise: 1.0 };
    let sample = |seed| match route_dense(&z, policy, &mut StdRng::seed_from_u64(seed)).unwrap() {
        Routing::Dense(weights) => weights.to_vec2::<f32>().unwrap(),
        Routing::Sparse(_) => panic!("training routes densely"),
    };
    assert_eq!(sample(5), sample(5));
    let rows = sample(6);
    let share = rows.iter().filter(|row| row[2] > row[0] && row[2] > row[1]).count() as f64 / 4000.0;
    let wanted = 2f64.exp() / (1.0 + 1f64.exp() + 2f64.exp());
    assert!((share - wanted).abs() < 0.03, "{share} against {wanted}: argmax of z + G is a sample of softmax(z)");
}

#[test]
fn loss_values() {
    let even = Tensor::from_vec(vec![9.0f32, 0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 9.0], (3, 3), &Device::Cpu).unwrap();
    let value = |t: Tensor| t.to_scalar::<f32>().unwrap();
    assert!((value(loss::switch_balance(&even, 1.0).unwrap()) - 1.0).abs() < 1e-5, "1 at balance");
    let collapsed = Tensor::from_vec([40.0f32, 0.0, 0.0].repeat(3), (3, 3), &Device::Cpu).unwrap();
    assert!((value(loss::switch_balance(&collapsed, 1.0).unwrap()) - 3.0).abs() < 1e-5, "E when one takes all");
    let zero = Tensor::zeros((5, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
    assert!((value(loss::router_z(&zero).unwrap()) - 4f32.ln().powi(2)).abs() < 1e-6);
}
