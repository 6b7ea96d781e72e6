//! Learning on weights that are there: some tensors move, the rest is shared and stays.

use std::collections::BTreeSet;

use candle_core::DType;

use super::*;
use crate::{
    model::{ModelSpec, weights::ModelWeights},
    moe::{
        estimator::Estimator,
        policy::{RoutingPolicy, WeightForm},
    },
    ops::as_on_a_device,
    train::learner::{Distillation, Micro, Start, StepReport},
};

/// A fresh model of the recipe under routing `lines`.
fn fresh(lines: &str) -> (TrainConfig, Learner) {
    let config = config(folder(routed(&format!("{lines}\nserve_k = 1"))).path());
    let plan = config.plan().unwrap();
    let spec = Arc::new(config.spec(&plan, 40));
    let learner = Learner::new(Setup { spec, plan, optimizer: config.optimizer.clone(), seed: 3 }).unwrap();
    (config, learner)
}

fn names(weights: &ModelWeights, chosen: impl Fn(&str) -> bool) -> BTreeSet<String> {
    weights.named().into_iter().map(|(name, _)| name).filter(|name| chosen(name)).collect()
}

/// Over copies of `weights`, the tensors that `chosen` names as variables.
fn over(
    like: &Learner,
    config: &TrainConfig,
    weights: &ModelWeights,
    chosen: impl Fn(&str) -> bool,
    served: Vec<Option<Estimator>>,
) -> Learner {
    let model = Trainable::over(weights, &names(weights, chosen)).unwrap();
    let (spec, plan, optimizer) = (Arc::clone(like.spec()), like.plan().clone(), config.optimizer.clone());
    Learner::over(Start { spec, plan, optimizer, expert_rate: 1.0, seed: 3, model, served: served.into(), recompute: false }).unwrap()
}

fn inputs() -> Vec<u32> {
    (0..64).map(|i| (i * i + 7 * i) as u32 % 40).collect()
}

fn text(inputs: &[u32]) -> Text<'_> {
    Text { inputs, targets: inputs, length: 16, route: None, teacher: None }
}

fn steps(learner: &mut Learner) -> Vec<StepReport> {
    (0..3).map(|step| learner.step(step, text(&inputs()), 1e-2).unwrap()).collect()
}

fn bits(weights: &ModelWeights) -> Vec<(String, Vec<f32>)> {
    let flat = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    weights.named().into_iter().map(|(name, tensor)| (name, flat(tensor))).collect()
}

#[test]
fn over_all_tensors_a_learner_is_the_one_that_made_them() {
    for lines in ["estimator = \"gumbel_soft\"\nlosses = { switch = 0.01 }", "estimator = \"raw_topk\"\nk = 2"] {
        let (config, mut whole) = fresh(lines);
        let start = bits(&whole.model().detached());
        let mut other = over(&whole, &config, &whole.model().detached(), |_| true, Vec::new());
        steps(&mut whole);
        assert_eq!(bits(&other.model().detached()), start, "copies, not the same storage");
        steps(&mut other);
        assert_eq!(bits(&other.model().detached()), bits(&whole.model().detached()), "{lines}");
    }
}

/// Whatever learns, dense or sparse, of f32 or of bf16 weights.
#[test]
fn what_does_not_learn_is_shared_and_keeps_its_bits() {
    check_what_is_shared();
    as_on_a_device(check_what_is_shared);
}

fn check_what_is_shared() {
    type Chosen = fn(&str) -> bool;
    let moves: [(&str, Chosen); 4] = [
        ("routers", |name| name.ends_with(".router")),
        ("routers and experts", |name| name.ends_with(".router") || name.contains(".experts.")),
        ("one layer", |name| name.starts_with("layers.1.")),
        ("the embedding, which is the head too", |name| name == "embedding"),
    ];
    for lines in ["estimator = \"soft\"", "estimator = \"ste\"", "estimator = \"raw_topk\"", "estimator = \"default_moe\"\nk = 1"] {
        let (config, like) = fresh(lines);
        for narrow in [false, true] {
            let large = |name: &str| !name.contains("norm") && !name.ends_with(".router");
            let base = like.model().detached().map_named(&mut |name, tensor| match narrow && large(name) {
                true => tensor.to_dtype(DType::BF16).unwrap(),
                false => tensor.copy().unwrap(),
            });
            for (what, chosen) in moves {
                let before = bits(&base);
                let mut learner = over(&like, &config, &base, chosen, Vec::new());
                let reports = steps(&mut learner);
                assert!(reports.iter().all(|report| report.lm_loss.is_finite()), "{lines}: {what}");
                let after = learner.model().detached();
                for ((name, old), (_, new)) in base.named().into_iter().zip(after.named()) {
                    let same = |a: &Tensor, b: &Tensor| {
                        a.dtype() == b.dtype() && std::ptr::eq(&*a.storage_and_layout().0, &*b.storage_and_layout().0)
                    };
                    assert_eq!(same(old, new), !chosen(&name), "{lines}: {what}: {name}");
                }
                let moved: BTreeSet<String> =
                    before.iter().zip(bits(&after)).filter(|(a, b)| **a != *b).map(|(a, _)| a.0.clone()).collect();
                assert_eq!(moved, names(&base, chosen), "{lines}: {what}, bf16: {narrow}");
                assert_eq!(bits(&base), before, "{lines}: {what}: nobody else's weights moved");
                assert!(!learner.model().has("final_norm"));
            }
        }
    }
    let (_, like) = fresh("estimator = \"soft\"");
    let unknown = Trainable::over(&like.model().detached(), &BTreeSet::from(["layers.7.router".to_owned()])).unwrap_err();
    assert_eq!(unknown.to_string(), "the model has no tensor layers.7.router");
}

/// Whatever learns, by whatever estimator, from f32 or bf16 weights: the same loss to the bit, and the same gradients.
#[test]
fn layers_that_are_run_again_have_the_gradients_of_the_whole() {
    check_layers_run_again();
    as_on_a_device(check_layers_run_again);
}

fn check_layers_run_again() {
    type Chosen = fn(&str) -> bool;
    let moves: [Chosen; 5] = [
        |name| name.ends_with(".router"),
        |name| name.ends_with(".router") || name.contains(".experts."),
        |name| name.starts_with("layers.1."),
        |name| name == "embedding" || name == "layers.0.key",
        |_| true,
    ];
    let routings = [
        "estimator = \"soft\"\nlosses = { switch = 0.1, router_z = 1e-2 }",
        "estimator = \"gumbel_soft\"",
        "estimator = \"ste\"",
        "estimator = \"raw_topk\"\nk = 2",
        "estimator = \"default_moe\"\nk = 1",
        "estimator = \"reinforce\"",
    ];
    for lines in routings {
        let (config, like) = fresh(lines);
        for narrow in [false, true] {
            let large = |name: &str| !name.contains("norm") && !name.ends_with(".router");
            let base = like.model().detached().map_named(&mut |name, tensor| match narrow && large(name) {
                true => tensor.to_dtype(DType::BF16).unwrap(),
                false => tensor.copy().unwrap(),
            });
            for (number, chosen) in moves.into_iter().enumerate() {
                let learner = |recompute: bool| {
                    let mut learner = over(&like, &config, &base, chosen, Vec::new());
                    learner.recompute = recompute;
                    for (index, part) in inputs().chunks(32).enumerate() {
                        learner.accumulate(Micro { step: 1, index, of: 2 }, text(part), &mut |work| work()).unwrap();
                    }
                    learner
                };
                let (mut whole, mut again) = (learner(false), learner(true));
                let pairs = whole.gradients().unwrap().iter().zip(again.gradients().unwrap().iter());
                for ((a, b), parameter) in pairs.zip(whole.model().parameters()) {
                    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|d| f64::from(d).powi(2)).sum::<f64>().sqrt();
                    let [a, b] = [a, b].map(|tensor| tensor.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap());
                    let apart = norm(&mut a.iter().zip(&b).map(|(a, b)| a - b));
                    let size = norm(&mut a.iter().copied());
                    assert!(apart <= 1e-6 * size, "{lines}, {number}, bf16: {narrow}: {}: {apart} of {size}", parameter.name);
                }
                let told = |learner: &mut Learner| {
                    let report = learner.apply(1, 1e-2).unwrap();
                    (report.loss, report.lm_loss, report.losses, report.layers, learner.memory().clone())
                };
                let (whole, again) = (told(&mut whole), told(&mut again));
                assert_eq!((whole.0, whole.1, whole.2, whole.3), (again.0, again.1, again.2, again.3), "{lines}, {number}");
                assert_eq!(whole.4.layers, again.4.layers, "{lines}, {number}: what layers remember");
            }
        }
    }
}

#[test]
fn micro_batches_add_up_to_their_step() {
    let (config, like) = fresh("estimator = \"soft\"\nlosses = { router_z = 1e-3 }");
    let base = like.model().detached();
    let learner = || over(&like, &config, &base, |name| name.ends_with(".router") || name.contains("experts"), Vec::new());
    let (mut whole, mut parts, inputs) = (learner(), learner(), inputs());
    let wanted = whole.step(0, text(&inputs), 1e-2).unwrap();
    for (index, part) in inputs.chunks(16).enumerate() {
        parts.accumulate(Micro { step: 0, index, of: 4 }, text(part), &mut |work| work()).unwrap();
    }
    let found = parts.apply(0, 1e-2).unwrap();
    let near = |a: f64, b: f64| (a - b).abs() < 1e-5 * a.abs().max(1e-3);
    assert!(near(found.lm_loss, wanted.lm_loss), "{} and {}", found.lm_loss, wanted.lm_loss);
    assert!(near(found.losses[0].1, wanted.losses[0].1) && near(found.task_gradient, wanted.task_gradient), "{found:?} {wanted:?}");
    assert_eq!(found.layers[0].tokens, wanted.layers[0].tokens);
    for ((name, a), (_, b)) in bits(&parts.model().detached()).into_iter().zip(bits(&whole.model().detached())) {
        // AdamW's first step is the sign of the gradient: only those that are nearly 0 may differ.
        let apart = a.iter().zip(&b).filter(|(a, b)| (*a - *b).abs() > 1e-3).count();
        assert!(apart * 200 <= a.len(), "{name}: {apart} of {}", a.len());
    }
    assert!(parts.apply(1, 1e-2).is_err(), "a step needs a batch");
}

/// Layer 0 keeps its router: it routes hard, as it will be served, and no auxiliary loss counts there.
#[test]
fn a_layer_with_a_frozen_router_routes_as_served() {
    let (config, like) = fresh("estimator = \"soft\"\nlosses = { switch = 0.5 }");
    let base = like.model().detached();
    let hard = RoutingPolicy::TopK { k: 1, weight_form: WeightForm::Renorm }.estimator();
    let chosen = |name: &str| name == "layers.1.router" || name == "layers.0.experts.down";
    let mut learner = over(&like, &config, &base, chosen, vec![Some(hard), None]);
    let report = learner.step(0, text(&inputs()), 1e-2).unwrap();
    let executed: Vec<u64> = report.layers.iter().map(|layer| layer.executed).collect();
    assert_eq!(executed, [64, 3 * 64], "one expert for each token, and all three");
    let mut alone = over(&like, &config, &base, |name| name == "layers.1.router", vec![Some(hard), None]);
    let losses = alone.step(0, text(&inputs()), 1e-2).unwrap().losses;
    assert!((losses[0].1 - report.losses[0].1).abs() < 1e-6, "of the one layer that learns: {losses:?}");
    assert!((0.9..3.1).contains(&losses[0].1), "and its own mean, not half of it: {losses:?}");
    let spec: &ModelSpec = learner.spec();
    assert_eq!(learner.memory().watch.len(), spec.layers.len());
}

/// A student that is its teacher has nothing to learn from it, and labels that do not count teach nothing.
#[test]
fn without_labels_only_the_teacher_counts() {
    let (config, like) = fresh("estimator = \"soft\"");
    let base = like.model().detached();
    let (inputs, chosen) = (inputs(), |name: &str| name.ends_with(".router"));
    let mut batch = crate::model::Batch::default();
    for window in inputs.chunks(16) {
        batch.push(&[], window, 0, RoutingChoice::Soft { temperature: Some(1.0) }, crate::model::LogitRows::All);
    }
    let decoder = crate::model::Decoder::new(Arc::clone(like.spec()), base.clone(), like.kernel()).unwrap();
    let logits = decoder.serve(&batch, None).unwrap().logits;
    let grad_norm = |lm_weight: f64, logits: &Tensor| {
        let teacher = Distillation { logits, weight: 1.0, lm_weight, routers: &[] };
        let mut learner = over(&like, &config, &base, chosen, Vec::new());
        let report = learner.step(0, Text { teacher: Some(teacher), ..text(&inputs) }, 0.0).unwrap();
        let crate::train::optimizer::Outcome::Updated { grad_norm, .. } = report.outcome else { panic!("skipped") };
        grad_norm
    };
    let (none, some) = (grad_norm(0.0, &logits), grad_norm(1.0, &logits));
    assert!(none < 1e-6 && some > 1e-3, "{none} and {some}");
    assert!((grad_norm(0.5, &logits) / some - 0.5).abs() < 1e-3);
    let flat = (logits * 0.0).unwrap();
    assert!(grad_norm(0.0, &flat) > 1e-4, "another teacher");
}

/// The base of a recipe in bf16, but for what is f32 in every model.
fn narrow(base: &ModelWeights) -> ModelWeights {
    let large = |name: &str| !name.contains("norm") && !name.ends_with(".router");
    base.map_named(&mut |name, tensor| if large(name) { tensor.to_dtype(DType::BF16).unwrap() } else { tensor.copy().unwrap() })
}

/// On a device steps have the losses of the CPU, and its gradients as long as the weights are the same: of f32 weights nearly to the bit, of bf16
/// ones within its rounding, by which a token may go to another expert.
#[test]
fn steps_on_a_device_are_those_of_the_cpu() {
    for lines in
        ["estimator = \"soft\"\nlosses = { switch = 0.1 }", "estimator = \"raw_topk\"\nk = 2", "estimator = \"default_moe\"\nk = 1"]
    {
        let (config, like) = fresh(lines);
        let whole = like.model().detached();
        for (base, of_loss, of_norm) in [(whole.clone(), 1e-3, 1e-3), (narrow(&whole), 2e-2, 0.2)] {
            let run = || {
                let mut learner = over(&like, &config, &base, |_| true, Vec::new());
                let reports = steps(&mut learner);
                (reports, learner.model().products(), bits(&learner.model().detached()))
            };
            let (wanted, _, _) = run();
            let (found, products, after) = as_on_a_device(run);
            assert_eq!(products, base.embedding.dtype(), "what goes into products on a device");
            let near = |a: f64, b: f64, most: f64| assert!((a - b).abs() < most * b, "{lines}, {products:?}: {a} and {b}");
            found.iter().zip(&wanted).for_each(|(found, wanted)| near(found.lm_loss, wanted.lm_loss, of_loss));
            let norm = |report: &StepReport| match report.outcome {
                crate::train::optimizer::Outcome::Updated { grad_norm, .. } => grad_norm,
                crate::train::optimizer::Outcome::Skipped => panic!("{lines}: skipped"),
            };
            near(norm(&found[0]), norm(&wanted[0]), of_norm);
            assert!(after.iter().all(|(_, values)| values.iter().all(|value| value.is_finite())));
        }
    }
}

/// Every update is far below the last bit of bf16: weights that were rounded after each would stay as they are for ever.
#[test]
fn updates_below_the_last_bit_of_bf16_add_up_in_the_masters() {
    let (config, like) = fresh("estimator = \"soft\"");
    let base = narrow(&like.model().detached());
    let chosen = |name: &str| name.ends_with("experts.down");
    as_on_a_device(|| {
        let mut learner = over(&like, &config, &base, chosen, Vec::new());
        let rounded = |learner: &Learner| -> Vec<Vec<f32>> {
            let named = learner.model().detached();
            let experts = named.named().into_iter().filter(|(name, _)| chosen(name));
            let flat =
                |t: &Tensor| t.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            experts.map(|(_, tensor)| flat(tensor)).collect()
        };
        let moved = |learner: &Learner, from: &[Vec<f32>]| {
            let pairs = |now: Vec<Vec<f32>>| now.concat().into_iter().zip(from.concat()).collect::<Vec<(f32, f32)>>();
            // Of those that are not small themselves: near 0 the last bit is too.
            let large: Vec<(f32, f32)> = pairs(rounded(learner)).into_iter().filter(|(_, was)| was.abs() > 0.05).collect();
            large.iter().filter(|(now, was)| now != was).count() as f64 / large.len() as f64
        };
        // The masters begin at values of bf16; half of the last bit of 0.05 is 2^-14, 6e-5, and a step of AdamW is the rate.
        let start = rounded(&learner);
        let first = learner.step(0, text(&inputs()), 1e-6).unwrap().lm_loss;
        assert_eq!(moved(&learner, &start), 0.0, "one update is lost to rounding");
        let masters = bits(&learner.model().detached()).into_iter().filter(|(name, _)| chosen(name));
        let masters: Vec<f32> = masters.flat_map(|(_, values)| values).collect();
        let differ = masters.iter().zip(start.concat()).filter(|(now, was)| **now != *was).count();
        assert!(differ * 10 > masters.len() * 9, "but kept in the masters: {differ} of {}", masters.len());
        let mut last = first;
        for step in 1..400 {
            last = learner.step(step, text(&inputs()), 1e-6).unwrap().lm_loss;
        }
        assert!(moved(&learner, &start) > 0.2, "they have added up: {}", moved(&learner, &start));
        assert!(last < first, "and the forward has seen it: {last} and {first}");
    });
}

/// Moments that are tensors of a device are saved, restored and renewed as those of the CPU.
#[test]
fn a_learner_on_a_device_is_saved_and_goes_on() {
    let (config, like) = fresh("estimator = \"raw_topk\"\nk = 2");
    let base = narrow(&like.model().detached());
    let new = || over(&like, &config, &base, |_| true, Vec::new());
    as_on_a_device(|| {
        let (mut whole, mut parts) = (new(), new());
        steps(&mut whole);
        steps(&mut parts);
        let mut again = new();
        again.reinstate(parts.capture().unwrap()).unwrap();
        for step in 3..5 {
            let [a, b] = [&mut whole, &mut again].map(|learner| learner.step(step, text(&inputs()), 1e-2).unwrap());
            assert_eq!((a.loss, a.outcome), (b.loss, b.outcome));
        }
        assert_eq!(bits(&whole.model().detached()), bits(&again.model().detached()));
    });
}
