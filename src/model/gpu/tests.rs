//! The forward of the GPU against that of the CPU. With the feature `cuda-emulated` it runs anywhere.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use hardmax_kernels::check::Outcome;

use super::{
    super::{
        Batch, CacheShape, FeedForwardSpec, LanguageModel, LayerSpec, LogitRows, ModelSpec, MoeSpec, QkNorm,
        draw::{Drawn, RowChoice, TokenDraw},
        load::{DeviceKind, ServingModel, ServingOptions, WeightType, load_to_serve, load_tuned},
        weights::ModelWeights,
    },
    parity::compare_models,
    *,
};
use crate::{
    bench::synthetic,
    checkpoint::{Delta, LoadOptions},
    error::ErrorKind,
    moe::{
        Routing,
        policy::{LayerChoices, Replay, RoutingChoice, WeightForm},
        trace::RoutingTrace,
    },
};

fn moe(top_k: usize, weight_form: WeightForm, shared_expert_width: Option<usize>) -> FeedForwardSpec {
    FeedForwardSpec::Moe(MoeSpec { num_experts: 5, expert_width: 24, top_k, weight_form, shared_expert_width })
}

fn layers(feed_forward: impl IntoIterator<Item = FeedForwardSpec>, windows: [Option<usize>; 2]) -> Vec<LayerSpec> {
    let windows = windows.into_iter().cycle();
    feed_forward.into_iter().zip(windows).map(|(feed_forward, sliding_window)| LayerSpec { sliding_window, feed_forward }).collect()
}

/// What families have, two or three things at a time.
fn specs() -> Vec<ModelSpec> {
    let plain = super::super::tests::spec();
    let mixtral =
        ModelSpec { layers: layers([moe(2, WeightForm::Renorm, None), moe(1, WeightForm::Raw, None)], [None, Some(6)]), ..plain.clone() };
    let olmoe = ModelSpec {
        num_kv_heads: 4,
        qk_norm: QkNorm::Full,
        clip_qkv: Some(0.9),
        layers: layers([moe(3, WeightForm::Raw, None), moe(3, WeightForm::Raw, None)], [None, None]),
        ..plain.clone()
    };
    let qwen2 = ModelSpec {
        qkv_bias: true,
        out_bias: true,
        tied_head: true,
        layers: layers(
            [moe(2, WeightForm::Raw, Some(16)), FeedForwardSpec::Dense { width: 40 }, moe(1, WeightForm::Unit, Some(16))],
            [Some(9), None],
        ),
        ..plain.clone()
    };
    let qwen3 = ModelSpec {
        num_kv_heads: 1,
        head_dim: 16,
        qk_norm: QkNorm::PerHead,
        layers: layers([FeedForwardSpec::Dense { width: 8 }, moe(5, WeightForm::Renorm, None)], [None, None]),
        ..plain
    };
    vec![mixtral, olmoe, qwen2, qwen3]
}

/// bf16 weights.
fn weights(spec: &Arc<ModelSpec>, seed: u64) -> ModelWeights {
    synthetic::weights(spec, DType::BF16, &Device::Cpu, seed).unwrap()
}

fn serving(spec: &Arc<ModelSpec>, weights: &ModelWeights, device: DeviceKind) -> ServingModel {
    let options = ServingOptions { device, weights: WeightType::Bf16, ..ServingOptions::default() };
    ServingModel::new(Arc::clone(spec), weights.clone(), options).unwrap()
}

const SHAPE: CacheShape = CacheShape { block_tokens: 8, num_blocks: 24 };

fn decoder(spec: &ModelSpec, seed: u64) -> GpuDecoder {
    let spec = Arc::new(spec.clone());
    GpuDecoder::new(Arc::new(GpuWeights::new(Arc::clone(&spec), weights(&spec, seed), false).unwrap()), SHAPE).unwrap()
}

fn check(outcomes: &[Outcome]) {
    let bad: Vec<&Outcome> = outcomes.iter().filter(|outcome| outcome.deviation.is_nan() || outcome.deviation > 1.0).collect();
    assert!(bad.is_empty() && !outcomes.is_empty(), "{bad:#?}");
}

#[test]
fn every_kind_of_model_computes_what_the_cpu_does() {
    for (seed, spec) in specs().into_iter().enumerate() {
        let spec = Arc::new(spec);
        let weights = weights(&spec, seed as u64);
        check(&compare_models(&serving(&spec, &weights, DeviceKind::Cpu), &serving(&spec, &weights, DeviceKind::Cuda), 30).unwrap());
    }
}

#[test]
fn the_demo_computes_what_the_cpu_does() {
    check(&parity::compare(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo"), true).unwrap());
}

/// Routes and load are those of the CPU, where no choice is near a tie.
#[test]
fn routes_and_load_are_told() {
    let spec = Arc::new(specs().remove(0));
    let weights = weights(&spec, 3);
    let mut batch = Batch::default();
    batch.push(&[0, 1], &[3, 1, 4, 1, 5, 9, 2, 6, 5], 0, RoutingChoice::TopK { k: 2, weight_form: None }, LogitRows::Last);
    batch.push(&[2], &[5, 3], 0, RoutingChoice::Soft { temperature: Some(0.5) }, LogitRows::None);
    let of = |device| serving(&spec, &weights, device).start(SHAPE).unwrap().forward(&batch).unwrap();
    let (cpu, gpu) = (of(DeviceKind::Cpu), of(DeviceKind::Cuda));
    for (cpu, gpu) in cpu.layers.iter().zip(&gpu.layers) {
        let (Routing::Sparse(expected), Routing::Sparse(found)) = (&cpu.routing, &gpu.routing) else { panic!("dense") };
        assert_eq!((&expected.offsets, &expected.expert_ids), (&found.offsets, &found.expert_ids));
        assert!(expected.weights.iter().zip(&found.weights).all(|(a, b)| (a - b).abs() < 0.05), "{expected:?} {found:?}");
        assert_eq!((cpu.layer, cpu.stats.tokens, cpu.stats.routes), (gpu.layer, gpu.stats.tokens, gpu.stats.routes));
        assert_eq!(cpu.stats.expert_tokens, gpu.stats.expert_tokens);
        assert!((cpu.stats.entropy_sum - gpu.stats.entropy_sum).abs() < 0.2);
        assert_eq!(gpu.router_logits.dims(), [11, 5]);
    }
    assert_eq!(gpu.layers.len(), 2);
    // Nobody asks for routes: the load is there, and nothing else.
    batch.routes = false;
    let quiet = of_gpu(&spec, &weights, &batch);
    for (quiet, told) in quiet.layers.iter().zip(&gpu.layers) {
        assert_eq!(quiet.stats, told.stats);
        assert_eq!(quiet.router_logits.dims(), [0, 5]);
    }
}

fn of_gpu(spec: &Arc<ModelSpec>, weights: &ModelWeights, batch: &Batch) -> Forward {
    serving(spec, weights, DeviceKind::Cuda).start(SHAPE).unwrap().forward(batch).unwrap()
}

/// Given experts are taken, whatever the router says.
#[test]
fn replayed_experts_are_taken() {
    let spec = Arc::new(specs().remove(0));
    let weights = weights(&spec, 5);
    let mut first = Batch::default();
    first.push(&[0], &[3, 1, 4], 0, RoutingChoice::Native, LogitRows::All);
    let native = of_gpu(&spec, &weights, &first);
    let traced = crate::moe::trace::traced_layers(&native.layers, 3).unwrap();
    let mut trace = RoutingTrace::new(0, vec![0, 1].into());
    trace.record(&traced, 0..3).unwrap();
    let replay = |trace: RoutingTrace| {
        let replay = Arc::new(Replay { trace, weight_form: None, rest: LayerChoices::default() });
        let mut batch = Batch::default();
        batch.push(&[0], &[3, 1, 4], 0, LayerChoices::Replay { replay, first: 0 }, LogitRows::All);
        of_gpu(&spec, &weights, &batch)
    };
    let again = replay(trace);
    let values = |forward: &Forward| forward.read_logits(<[f32]>::to_vec).unwrap();
    let (expected, found) = (values(&native), values(&again));
    assert!(expected.iter().zip(&found).all(|(a, b)| (a - b).abs() < 0.05), "{expected:?} {found:?}");
    assert_eq!(again.layers[0].stats.expert_tokens, native.layers[0].stats.expert_tokens);
}

/// A replay may give more experts than its own routing, or a neighbour's, would take.
#[test]
fn a_replay_of_all_experts_is_nobody_elses() {
    let spec = Arc::new(specs().remove(0));
    let weights = weights(&spec, 5);
    let soft = RoutingChoice::Soft { temperature: None };
    let mut first = Batch::default();
    first.push(&[0], &[3, 1, 4], 0, soft, LogitRows::All);
    let under_soft = of_gpu(&spec, &weights, &first);
    let mut trace = RoutingTrace::new(0, vec![0, 1].into());
    trace.record(&crate::moe::trace::traced_layers(&under_soft.layers, 3).unwrap(), 0..3).unwrap();
    let replay = Arc::new(Replay { trace, weight_form: Some(WeightForm::Raw), rest: LayerChoices::default() });
    let top_1 = RoutingChoice::TopK { k: 1, weight_form: None };
    let neighbour = |batch: &mut Batch| batch.push(&[1], &[9, 2], 0, top_1, LogitRows::All);
    let mut alone = Batch::default();
    neighbour(&mut alone);
    let mut both = Batch::default();
    both.push(&[0], &[3, 1, 4], 0, LayerChoices::Replay { replay, first: 0 }, LogitRows::All);
    neighbour(&mut both);
    let values = |forward: &Forward| forward.read_logits(<[f32]>::to_vec).unwrap();
    let (both, alone) = (values(&of_gpu(&spec, &weights, &both)), values(&of_gpu(&spec, &weights, &alone)));
    let expected = [values(&under_soft), alone].concat();
    assert!(both.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 0.05), "{both:?} {expected:?}");
}

/// Decode steps of four sequences whose tokens are drawn: the first runs, the second is recorded, and the others are launches of that.
#[test]
fn recorded_steps_follow_their_words() {
    let spec = specs().remove(0);
    let mut model = decoder(&spec, 7);
    let vocab = spec.vocab_size;
    let mut tokens: Vec<Vec<u32>> = (0..4).map(|i| vec![i, 2 * i + 1, 7]).collect();
    for round in 0..8 {
        let mut rows = Batch { routes: false, ..Batch::default() };
        let mut draws = rows.clone();
        for (index, tokens) in tokens.iter().enumerate() {
            let table = [index as u32 * 3, index as u32 * 3 + 1];
            let past = if round == 0 { 0 } else { tokens.len() - 1 };
            rows.push(&table, &tokens[past..], past, RoutingChoice::Native, LogitRows::Last);
            draws.push(&table, &tokens[tokens.len() - 1..], tokens.len() - 1, RoutingChoice::Native, LogitRows::Last);
            draws.choices.push(RowChoice::Token(TokenDraw::LIKELIEST));
        }
        let handed_out = model.forward(&rows).unwrap();
        let likeliest: Vec<u32> = handed_out.read_logits(|rows| rows.chunks_exact(vocab).map(argmax).collect()).unwrap();
        let drawn = model.forward(&draws).unwrap();
        assert_eq!(drawn.drawn, likeliest.iter().map(|&token| Drawn::Token(token)).collect::<Vec<_>>(), "round {round}");
        assert_eq!(drawn.logits.dims(), [0, vocab]);
        tokens.iter_mut().zip(likeliest).for_each(|(tokens, next)| tokens.push(next));
    }
}

fn argmax(row: &[f32]) -> u32 {
    (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32
}

/// Some rows are drawn, some handed out, in one batch.
#[test]
fn rows_are_drawn_and_handed_out_side_by_side() {
    let spec = specs().remove(1);
    let mut model = decoder(&spec, 2);
    let mut batch = Batch::default();
    for index in 0..3 {
        batch.push(&[index], &[index, 5, 6], 0, RoutingChoice::Native, LogitRows::Last);
    }
    let all = model.forward(&batch).unwrap();
    assert!(all.drawn.is_empty());
    batch.choices = vec![RowChoice::Logits, RowChoice::Token(TokenDraw::LIKELIEST), RowChoice::Logits];
    let some = model.forward(&batch).unwrap();
    let (all, rows) = (all.read_logits(<[f32]>::to_vec).unwrap(), some.read_logits(<[f32]>::to_vec).unwrap());
    let row = |index: usize| &all[index * spec.vocab_size..(index + 1) * spec.vocab_size];
    assert_eq!(rows, [row(0), row(2)].concat());
    assert_eq!(some.drawn, [Drawn::Row, Drawn::Token(argmax(row(1))), Drawn::Row]);
}

/// A token whose router says nothing that is a number is told, and no other suffers.
#[test]
fn broken_weights_are_told() {
    let spec = Arc::new(specs().remove(0));
    let sound = weights(&spec, 1);
    let broken = sound.map_named(&mut |name, tensor| {
        // Token 9 has an embedding of NaN.
        if name != "embedding" {
            return tensor.clone();
        }
        let mut rows = tensor.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
        rows[9].fill(f32::NAN);
        Tensor::new(rows, &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap()
    });
    let mut batch = Batch::default();
    batch.push(&[0], &[1, 9], 0, RoutingChoice::Native, LogitRows::Last);
    batch.push(&[1], &[1, 2], 0, RoutingChoice::Native, LogitRows::Last);
    batch.choices = vec![RowChoice::Token(TokenDraw::LIKELIEST); 2];
    let forward = of_gpu(&spec, &broken, &batch);
    assert_eq!(forward.drawn[0], Drawn::NonFinite);
    assert!(matches!(forward.drawn[1], Drawn::Token(_)));
    // The tokens of one sequence share tiles of keys: it fails as a whole.
    assert!(forward.layers.iter().all(|layer| (1..=2).contains(&layer.stats.non_finite)));
}

#[test]
fn other_weights_are_exchanged_and_recorded_steps_are_theirs() {
    let spec = Arc::new(specs().remove(0));
    let (one, two) = (weights(&spec, 1), weights(&spec, 2));
    let served = [serving(&spec, &one, DeviceKind::Cuda), serving(&spec, &two, DeviceKind::Cuda)];
    let mut model = served[0].start(SHAPE).unwrap();
    let mut batch = Batch { routes: false, ..Batch::default() };
    batch.push(&[0], &[11], 0, RoutingChoice::Native, LogitRows::Last);
    batch.choices.push(RowChoice::Token(TokenDraw { temperature: 1.0, uniform: 0.37, ..TokenDraw::LIKELIEST }));
    let alone: Vec<Vec<Drawn>> = served.iter().map(|served| served.start(SHAPE).unwrap().forward(&batch).unwrap().drawn).collect();
    for round in 0..4 {
        for (served, expected) in served.iter().zip(&alone) {
            model.exchange(served.shared()).unwrap();
            assert_eq!(&model.forward(&batch).unwrap().drawn, expected, "round {round}");
        }
    }
}

#[test]
fn shapes_without_kernels_are_refused() {
    let plain = specs().remove(0);
    let refused = |spec: ModelSpec, quantize: bool| {
        let sound = weights(&Arc::new(plain.clone()), 1);
        GpuWeights::new(Arc::new(spec), sound, quantize).unwrap_err().to_string()
    };
    assert!(refused(ModelSpec { hidden_size: 30, ..plain.clone() }, false).contains("hidden_size is 30"));
    assert!(refused(ModelSpec { head_dim: 264, ..plain.clone() }, false).contains("head_dim is 264"));
    assert!(refused(plain.clone(), true).contains("the width of an expert is 24"));
}

#[test]
fn classes_of_kernels_are_measured() {
    let mut model = decoder(&specs().remove(2), 1);
    model.measure().unwrap();
    let mut batch = Batch::default();
    batch.push(&[0], &[1, 2, 3], 0, RoutingChoice::Native, LogitRows::Last);
    model.forward(&batch).unwrap();
    let profile = model.take_profile();
    let classes: Vec<Class> = profile.milliseconds.iter().map(|entry| entry.0).collect();
    use Class::{Attention, Combine, Dense, Experts, Head, Norm, Projection, Routing};
    assert_eq!((profile.steps, classes), (1, vec![Norm, Projection, Attention, Routing, Experts, Dense, Combine, Head]));
    assert!(profile.milliseconds.iter().all(|entry| entry.1 > 0.0));
    assert_eq!(model.take_profile(), Profile::default());
}

/// Eight bits are the same model, less exactly; in both forms of the experts' products.
#[test]
fn experts_in_eight_bits_are_nearly_the_same_model() {
    let mut spec = specs().remove(0);
    spec.layers.truncate(1);
    if let FeedForwardSpec::Moe(moe) = &mut spec.layers[0].feed_forward {
        moe.expert_width = 32;
    }
    let spec = Arc::new(spec);
    let weights = weights(&spec, 4);
    let of = |dtype| {
        let options = ServingOptions { device: DeviceKind::Cuda, weights: dtype, ..ServingOptions::default() };
        let model = ServingModel::new(Arc::clone(&spec), weights.clone(), options).unwrap();
        (model.dtype(), model.weights().is_some(), model.start(CacheShape { block_tokens: 8, num_blocks: 24 }).unwrap())
    };
    let ((_, kept, mut bf16), (dtype, kept_8, mut fp8)) = (of(WeightType::Bf16), of(WeightType::Fp8));
    assert_eq!((dtype, kept, kept_8), ("fp8", true, false));
    let table: Vec<u32> = (0..12).collect();
    // 90 tokens of two experts of five are more than an expert streams.
    for tokens in [3, 90] {
        let mut batch = Batch::default();
        let prompt: Vec<u32> = (0..tokens).map(|token| token * 7 % 50).collect();
        batch.push(&table, &prompt, 0, RoutingChoice::Native, LogitRows::All);
        let values = |forward: Forward| forward.read_logits(<[f32]>::to_vec).unwrap();
        let (exact, rounded) = (values(bf16.forward(&batch).unwrap()), values(fp8.forward(&batch).unwrap()));
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let error = norm(&mut exact.iter().zip(&rounded).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied());
        assert!((1e-4..0.08).contains(&error), "{tokens} tokens: {error}");
    }
}

/// Experts that were rounded while they were read are those that were rounded afterwards, and have the tensors of a delta in their places.
#[test]
fn experts_are_rounded_while_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    let options = ServingOptions { device: DeviceKind::Cuda, weights: WeightType::Fp8, ..ServingOptions::default() };
    let (checkpoint, by_layer) = load_to_serve(&demo, options, false).unwrap();
    let load = LoadOptions { dtype: DType::BF16, device: DeviceKind::Cuda.open().unwrap(), progress: false };
    let whole = checkpoint.load(&load).unwrap();
    // One is rounded, one is in a layer, one is in none.
    let changed = BTreeMap::from([("layers.1.experts.down", 0.5), ("layers.1.router", 0.5), ("final_norm", 2.0)].map(|(name, factor)| {
        let (_, tensor) = whole.named().into_iter().find(|(known, _)| known == name).unwrap();
        (name.to_owned(), tensor.affine(factor, 0.0).unwrap().to_device(&Device::Cpu).unwrap())
    }));
    let spec = || Arc::new(checkpoint.spec().clone());
    let logits = |model: &ServingModel| {
        let mut batch = Batch::default();
        batch.push(&[0, 1], &[3, 1, 4, 1, 5, 9], 0, RoutingChoice::Native, LogitRows::All);
        model.start(SHAPE).unwrap().forward(&batch).unwrap().read_logits(<[f32]>::to_vec).unwrap()
    };
    let plain = logits(&by_layer);
    assert_eq!(plain, logits(&ServingModel::new(spec(), whole.clone(), options).unwrap()));

    let path = folder.path().join("routers.safetensors");
    let (base, routing) = (checkpoint.digest().unwrap(), checkpoint.routing().cloned().unwrap_or_default());
    let delta = |base: &str, tensors: &BTreeMap<String, Tensor>| {
        Delta { base: base.to_owned(), routing: routing.clone(), tensors: tensors.clone() }.write(&path).unwrap();
    };
    delta(&base, &changed);
    let (_, tuned) = load_tuned(&demo, Some(&path), options, false).unwrap();
    let tuned = logits(&tuned);
    assert_eq!(tuned, logits(&ServingModel::new(spec(), whole.with(&changed).unwrap(), options).unwrap()));
    assert_ne!(tuned, plain);

    let refused = || load_tuned(&demo, Some(&path), options, false).unwrap_err();
    let router = &changed["layers.1.router"];
    delta(&base, &BTreeMap::from([("layers.99.router".to_owned(), router.clone())]));
    assert!(refused().kind() == ErrorKind::NotFound && refused().to_string().contains("layers.99.router"), "{}", refused());
    delta(&base, &BTreeMap::from([("layers.0.router".to_owned(), router.narrow(0, 0, 1).unwrap())]));
    assert!(refused().kind() == ErrorKind::FailedPrecondition && refused().to_string().contains("layers.0.router"), "{}", refused());
    delta("another", &changed);
    assert!(refused().kind() == ErrorKind::FailedPrecondition && refused().to_string().contains("another"), "{}", refused());
}

#[test]
fn experts_in_eight_bits_take_half_the_memory() {
    let mut spec = specs().remove(0);
    let bytes = |spec: &ModelSpec, footprint: Footprint| footprint.bytes(spec);
    let of_experts = |spec: &ModelSpec| {
        spec.moe_layers().map(|(_, moe)| 3 * spec.hidden_size * moe.expert_width * moe.num_experts).sum::<usize>() as u64
    };
    let (whole, experts) = (bytes(&spec, Footprint::Whole(DType::BF16)), of_experts(&spec));
    assert_eq!(whole, 2 * spec.parameters().0);
    // Of the last layer in bf16 while it is rounded as well.
    let layers = spec.moe_layers().count() as u64;
    assert_eq!(bytes(&spec, Footprint::Quantized), whole - experts + 2 * experts / layers);
    // What is advised would fit; nothing where nothing does.
    let advice = |footprint, free| too_large(&spec, footprint, free);
    assert!(advice(Footprint::Whole(DType::F32), whole).contains("use --dtype bf16"));
    assert!(!advice(Footprint::Whole(DType::BF16), whole - 1).contains("--dtype"), "its experts are 24 wide");
    let mut wide = spec.clone();
    wide.layers.extend_from_within(..);
    for layer in &mut wide.layers {
        if let FeedForwardSpec::Moe(moe) = &mut layer.feed_forward {
            moe.expert_width = 32;
        }
    }
    let free = Footprint::Quantized.bytes(&wide);
    assert!(free < Footprint::Whole(DType::BF16).bytes(&wide));
    assert!(too_large(&wide, Footprint::Whole(DType::BF16), free).contains("use --dtype fp8"));
    assert!(!too_large(&wide, Footprint::Quantized, free - 1).contains("--dtype"));
    spec.layers.clear();
    assert_eq!(bytes(&spec, Footprint::Quantized), bytes(&spec, Footprint::Whole(DType::BF16)));
}
