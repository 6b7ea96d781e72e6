//! Studies of the small checkpoints in tests/goldens.

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device};

use crate::{
    checkpoint::{Checkpoint, LoadOptions},
    fidelity::{
        case::Case,
        corpus::Corpus,
        floor::floor,
        measure::{OutputGap, missed_mass},
        probe::Probe,
        run::run,
        study::{Models, Options, study},
    },
    model::{
        Batch, CacheShape, CachedDecoder, Decoder, FeedForwardSpec, LogitRows, ModelSpec, Observable,
        load::{ServingModel, ServingOptions},
        weights::ModelWeights,
    },
    moe::{
        Routing, SparseRouting, kernel,
        observe::{MoeObserver, ObservedLayer},
        policy::{LayerChoices, RoutingChoice, RoutingPolicy, WeightForm},
        route::route_rows,
    },
    ops::cpu::Reduction,
};

const SHAPE: CacheShape = CacheShape { block_tokens: 8, num_blocks: 16 };

fn golden(name: &str) -> (Arc<ModelSpec>, ModelWeights) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let weights = checkpoint.load(&LoadOptions { dtype: DType::F32, device: Device::Cpu, progress: false }).unwrap();
    (Arc::new(checkpoint.spec().clone()), weights)
}

fn serving(name: &str) -> ServingModel {
    let (spec, weights) = golden(name);
    ServingModel::new(spec, weights, ServingOptions::default()).unwrap()
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 31 + i * i * 7) % 80).collect()
}

fn soft() -> Case {
    RoutingChoice::Soft { temperature: Some(1.0) }.into()
}

fn top(k: usize, weight_form: WeightForm) -> Case {
    RoutingChoice::TopK { k, weight_form: Some(weight_form) }.into()
}

/// The identity at every token of every layer, on what the experts put out, and that outputs which the forward has computed are those
/// that are computed anew.
#[derive(Debug, Default)]
struct Identity {
    tokens: usize,
    /// Of everything that was asked for.
    outputs: Vec<Vec<f32>>,
}

impl MoeObserver for Identity {
    fn layer(&mut self, seen: &ObservedLayer<'_>) -> crate::Result<()> {
        let (d, e, t) = (seen.width(), seen.spec.num_experts, seen.routing.num_tokens());
        let route = |policy| route_rows(seen.router_logits, e, std::iter::repeat_n(policy, t)).0;
        let all = route(RoutingPolicy::Soft { temperature: 1.0 });
        let outputs = seen.expert_outputs(&all)?;
        for (k, weight_form) in [(1, WeightForm::Renorm), (2, WeightForm::Renorm), (2, WeightForm::Raw), (e, WeightForm::Renorm)] {
            let hard = route(RoutingPolicy::TopK { k, weight_form });
            (0..t).for_each(|token| self.check(&all, &hard, &outputs, (token, d), weight_form));
        }
        self.outputs.push(outputs);
        Ok(())
    }
}

impl Identity {
    fn check(&mut self, soft: &SparseRouting, hard: &SparseRouting, outputs: &[f32], (token, d): (usize, usize), form: WeightForm) {
        let places = soft.routes(token);
        let (ids, weights) = (&soft.expert_ids[places.clone()], &soft.weights[places.clone()]);
        let row = |place: usize| &outputs[(places.start + place) * d..][..d];
        let chosen = &hard.expert_ids[hard.routes(token)];
        assert_eq!(chosen, &ids[..chosen.len()]);
        let mean = |range: std::ops::Range<usize>| -> Vec<f64> {
            let sum: f64 = weights[range.clone()].iter().map(|&w| f64::from(w)).sum();
            let at = |i: usize| range.clone().map(|place| f64::from(weights[place]) * f64::from(row(place)[i])).sum::<f64>();
            (0..d).map(|i| if sum > 0.0 { at(i) / sum } else { 0.0 }).collect()
        };
        let (inside, outside) = (mean(0..chosen.len()), mean(chosen.len()..ids.len()));
        let r = missed_mass(ids.iter().zip(weights), chosen);
        let expected = (0..d).map(|i| r * (outside[i] - if form == WeightForm::Renorm { inside[i] } else { 0.0 }));
        let mut mixed = [vec![0.0; d], vec![0.0; d]];
        let hard_weights = &hard.weights[hard.routes(token)];
        for (out, weights) in mixed.iter_mut().zip([weights, hard_weights]) {
            crate::fidelity::measure::mix(weights.iter().map(|&w| f64::from(w)), (0..weights.len()).map(row), out);
        }
        let size = mixed[0].iter().map(|y| y * y).sum::<f64>().sqrt();
        for ((reference, served), expected) in mixed[0].iter().zip(&mixed[1]).zip(expected) {
            assert!((reference - served - expected).abs() < 1e-5 * size.max(1e-3), "{reference} - {served} is not {expected}");
        }
        self.tokens += 1;
    }
}

fn batch(spec: &ModelSpec, routing: impl Into<LayerChoices>, n: usize) -> Batch {
    let mut batch = Batch::default();
    batch.push(&(0..SHAPE.num_blocks as u32).rev().collect::<Vec<_>>(), &tokens(n), 0, routing, LogitRows::All);
    assert!(n <= spec.max_context);
    batch
}

#[test]
fn the_identity_holds_in_every_layer_of_every_family() {
    for name in ["mixtral_gqa", "olmoe_clip", "qwen2_shared_sparse_step", "qwen3_mlp_only"] {
        let (spec, weights) = golden(name);
        let mut host =
            ServingModel::new(Arc::clone(&spec), weights.clone(), ServingOptions::default()).unwrap().start_observable(SHAPE).unwrap();
        let decoder = Decoder::new(Arc::clone(&spec), weights, &kernel::for_device(&Device::Cpu)).unwrap();
        let mut tensors = CachedDecoder::new(decoder, SHAPE).unwrap();
        let soft = RoutingChoice::Soft { temperature: None };
        let mut found = Vec::new();
        // Under native routing most outputs are computed for the observer, under soft routing none.
        for routing in [RoutingChoice::Native, soft] {
            for model in [&mut *host as &mut dyn Observable, &mut tensors] {
                let mut identity = Identity::default();
                let batch = batch(&spec, routing, 20);
                let watched = model.forward_observed(&batch, &mut identity).unwrap();
                let alone = model.forward(&batch).unwrap();
                let read = |forward: &crate::model::Forward| forward.read_logits(<[f32]>::to_vec).unwrap();
                assert_eq!(read(&watched), read(&alone), "{name}: who is watched computes the same");
                assert_eq!(identity.tokens, 4 * 20 * spec.moe_layers().count());
                found.push(identity.outputs);
            }
        }
        // The first layer has the same input under both routings.
        for other in &found[1..] {
            let largest = found[0][0].iter().zip(&other[0]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(largest < 1e-5, "{name}: {largest}");
        }
    }
}

#[test]
fn all_experts_have_no_gap() {
    for name in ["mixtral_gqa", "olmoe_clip", "qwen2_shared_sparse_step"] {
        let model = serving(name);
        let experts = model.spec().moe_layers().map(|(_, moe)| moe.num_experts).max().unwrap();
        let cases = [soft(), top(experts, WeightForm::Renorm), top(experts, WeightForm::Raw), top(1, WeightForm::Renorm)];
        let text = tokens(60);
        let mut probe = Probe::new(model.spec(), &cases, 3, 1, &[]).unwrap();
        let outputs = run(&model, &cases, &[&text[..]], Some(&mut probe), &mut |_| {}).unwrap();
        for all in &outputs[..2] {
            assert!(all.kl.max < 1e-9 && all.js.max < 1e-9 && all.logit_l2.max < 1e-5, "{name}: {all:?}");
            assert!(all.top1_agree == 1.0 && all.perplexity.gap.abs() < 1e-6 && all.tokens == 60);
        }
        assert!(outputs[2].kl.mean > 1e-3, "{name}: top-1 of a random model is another function");
        for layer in &probe.layers {
            let [all, raw, one] = [0, 1, 2].map(|case| &layer.gaps[case]);
            for gap in [all, raw] {
                assert!(gap.l2_rel.summary().max < 1e-6 && gap.missed_mass.summary().max == 0.0 && gap.margin.summary().count == 0);
                assert_eq!((gap.exact, gap.argmax_disagree), (60, 0));
            }
            assert!(one.l2_rel.summary().mean > 0.05 && one.missed_mass.summary().mean > 0.05);
            let squared: Vec<f64> = layer.ladder.iter().map(OutputGap::l2_rel).collect();
            assert!((one.pooled.l2_rel() - squared[0]).abs() < 1e-12 || name != "mixtral_gqa", "the ladder has the layer's own weights");
        }
        assert_eq!(probe.flipped[..2], [0, 0]);
    }
}

#[test]
fn every_route_is_counted() {
    let model = serving("qwen3_mlp_only");
    let cases = [soft(), RoutingChoice::Native.into(), top(2, WeightForm::Raw)];
    let text = tokens(50);
    let mut probe = Probe::new(model.spec(), &cases, 0, 1, &[1, 2]).unwrap();
    run(&model, &cases, &[&text[..30], &text[30..]], Some(&mut probe), &mut |_| {}).unwrap();
    for (layer, (_, moe)) in probe.layers.iter().zip(model.spec().moe_layers()) {
        let tokens = |case: usize| layer.loads[case].tokens.iter().sum::<u64>();
        assert_eq!([tokens(0), tokens(1), tokens(2)], [50 * moe.num_experts as u64, 50 * moe.top_k as u64, 100]);
        assert!((layer.loads[0].weights.iter().sum::<f64>() - 50.0).abs() < 1e-4);
    }
    assert_eq!(probe.tokens, 50);
}

#[test]
fn a_layer_can_have_a_routing_of_its_own() {
    let model = serving("qwen3_mlp_only");
    let spec = model.spec();
    let layers: Vec<usize> = spec.moe_layers().map(|(layer, _)| layer).collect();
    assert!(matches!(spec.layers[0].feed_forward, FeedForwardSpec::Dense { .. }));
    let hard = RoutingChoice::TopK { k: 1, weight_form: None };
    let soft = RoutingChoice::Soft { temperature: Some(1.0) };
    let mut host = model.start_observable(SHAPE).unwrap();
    let forward = host.forward(&batch(spec, Case::only(layers[1], hard, soft, spec).choices, 20)).unwrap();
    let per_token = |at: usize| match &forward.layers[at].routing {
        Routing::Sparse(routing) => routing.expert_ids.len() / 20,
        Routing::Dense { .. } => 0,
    };
    let experts = spec.moe_layers().next().unwrap().1.num_experts;
    assert_eq!([per_token(0), per_token(1)], [experts, 1]);

    // The same of every layer is the same routing.
    let each = Case::layer_k("--layer-k", spec, &[2, 2]).unwrap();
    let [a, b] = [each.choices, RoutingChoice::TopK { k: 2, weight_form: None }.into()]
        .map(|choices| host.forward(&batch(spec, choices, 20)).unwrap().read_logits(<[f32]>::to_vec).unwrap());
    assert_eq!(a, b);

    let short = LayerChoices::Each(vec![RoutingChoice::Native; 2].into());
    let error = host.forward(&batch(spec, short, 20)).unwrap_err().to_string();
    assert_eq!(error, "routing: 2 choices for 3 layers: give one for each");
    let message = |ks: &[usize]| Case::layer_k("--layer-k", spec, ks).unwrap_err().to_string();
    assert_eq!(message(&[1]), "--layer-k: 1 numbers for 2 MoE layers: give one for each");
    assert_eq!(message(&[1, 0]), "--layer-k: 0 for layer 2 is not from 1 to 6, its experts");
    assert_eq!(message(&[7, 1]), "--layer-k: 7 for layer 1 is not from 1 to 6, its experts");
}

#[test]
fn noise_is_small_and_not_nothing() {
    let (spec, weights) = golden("mixtral_gqa");
    let options = ServingOptions { reduction: Reduction::BatchInvariant, ..ServingOptions::default() };
    let model = |options| ServingModel::new(Arc::clone(&spec), weights.clone(), options).unwrap();
    let (main, other) = (model(ServingOptions::default()), model(options));
    let text = tokens(100);
    let case: Case = RoutingChoice::Native.into();
    let noise = floor(&main, (&other, "other sums"), &case, &[&text[..]]).unwrap();
    assert!(noise.output.kl.mean < 1e-6 && noise.output.tokens == 100 && noise.tokens_flipped < 0.05, "{noise:?}");
    let exact = floor(&other, (&other, "the same"), &case, &[&text[..]]).unwrap();
    assert_eq!((exact.output.logit_l2.max, exact.tokens_flipped), (0.0, 0.0), "a request gets the same bits in pieces of any size");
}

#[test]
fn a_study_says_all_of_it() {
    let model = serving("mixtral_gqa");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ids");
    let ids: Vec<String> = tokens(400).iter().map(u32::to_string).collect();
    std::fs::write(&file, ids.join(" ")).unwrap();
    let mut corpus = Corpus::new(64);
    corpus.add_token_ids(&[file]).unwrap();
    let top = |k| RoutingChoice::TopK { k, weight_form: None };
    let options = Options {
        reference: Some(RoutingChoice::Soft { temperature: None }),
        cases: [RoutingChoice::Native, top(1), top(2), RoutingChoice::Soft { temperature: None }].map(Case::from).into(),
        max_tokens: 1000,
        floor_tokens: 128,
        advice_tokens: 128,
        mean_k: vec![1.5],
    };
    let models = Models { served: model.clone(), others: vec![(model, "itself".into())] };
    let report = study(&models, &corpus, &options, &|token| token.to_string(), &mut |_, _| {}).unwrap();
    let names: Vec<(&str, usize)> = report.policies.iter().map(|policy| (policy.name.as_str(), policy.aliases.len())).collect();
    assert_eq!(names, [("native", 1), ("top-1", 0)], "native is top-2 here, and soft the reference");
    assert!(report.reference.assumed && report.policies.iter().all(|policy| policy.layers.len() == 2));
    assert!(report.policies[0].output.kl.mean < report.policies[1].output.kl.mean);
    let advice = report.advice.as_ref().unwrap();
    assert_eq!(advice.plans[0].k.iter().sum::<usize>(), 3);
    assert!((advice.blame.iter().map(|blame| blame.share).sum::<f64>() - 1.0).abs() < 1e-9);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["policies"][1]["layers"][0]["l2_rel"]["count"], 400);
    let text = report.to_string();
    for part in ["reference  soft", "noise", "Layers under top-1", "Which layers are to blame", "Verdict", "native (= top-2)"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(report.draw(folder.path()).unwrap(), ["gap-by-layer", "load", "coactivation", "tokens", "advice"]);
    assert!(folder.path().join("advice.svg").is_file() && folder.path().join("tokens.png").is_file());
}
