//! The host forward against the tensors, for every kind of layer, and what it promises about batches.

use std::sync::Arc;

use candle_core::{DType, Device};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{
    super::{
        Batch, CacheShape, CachedDecoder, Decoder, FeedForwardSpec, Forward, LanguageModel, LogitRows, ModelSpec, MoeSpec, QkNorm,
        SharedWeights,
        weights::{AttentionWeights, FeedForwardWeights, LayerWeights, ModelWeights, MoeWeights, SharedExpertWeights, SwiGluWeights},
    },
    HostDecoder, HostOptions, HostWeights,
};
use crate::{
    error::ErrorKind,
    moe::{
        Routing, kernel,
        policy::{RoutingChoice, WeightForm},
    },
    ops::cpu::Reduction,
};

/// A model with every feature of the families in it: one dense layer, shared expert, biases, norms, clip, window.
fn spec(qk_norm: QkNorm, biases: bool, tied_head: bool) -> ModelSpec {
    let mut spec = super::super::tests::spec();
    let moe = MoeSpec { num_experts: 6, expert_width: 32, top_k: 2, weight_form: WeightForm::Raw, shared_expert_width: Some(48) };
    spec.layers[0].feed_forward = FeedForwardSpec::Moe(moe);
    spec.layers.push(spec.layers[0].clone());
    spec.layers[2].feed_forward = FeedForwardSpec::Dense { width: 40 };
    (spec.qk_norm, spec.qkv_bias, spec.out_bias, spec.tied_head) = (qk_norm, biases, biases, tied_head);
    spec.clip_qkv = biases.then_some(0.8);
    spec
}

fn weights(spec: &ModelSpec, dtype: DType) -> ModelWeights {
    let mut rng = StdRng::seed_from_u64(3);
    let mut random = |shape: &[usize], scale: f32, dtype: DType| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-scale..scale)).collect();
        candle_core::Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    };
    let (d, hd) = (spec.hidden_size, spec.head_dim);
    let (q, kv) = (spec.num_heads * hd, spec.num_kv_heads * hd);
    let mut layers = Vec::new();
    for layer in &spec.layers {
        let mut mlp = |width: usize| SwiGluWeights { gate_up: random(&[2 * width, d], 0.4, dtype), down: random(&[d, width], 0.4, dtype) };
        let feed_forward = match &layer.feed_forward {
            FeedForwardSpec::Dense { width } => FeedForwardWeights::Dense(mlp(*width)),
            FeedForwardSpec::Moe(moe) => {
                let shared = moe.shared_expert_width.map(&mut mlp);
                FeedForwardWeights::Moe(MoeWeights {
                    router: random(&[moe.num_experts, d], 1.5, DType::F32),
                    gate_up: random(&[moe.num_experts, 2 * moe.expert_width, d], 0.4, dtype),
                    down: random(&[moe.num_experts, d, moe.expert_width], 0.4, dtype),
                    shared: shared.map(|expert| SharedExpertWeights { expert, gate: random(&[1, d], 0.5, DType::F32) }),
                })
            }
        };
        let norms = match spec.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some([hd, hd]),
            QkNorm::Full => Some([q, kv]),
        };
        layers.push(LayerWeights {
            attention_norm: random(&[d], 1.5, DType::F32),
            attention: AttentionWeights {
                query: random(&[q, d], 0.4, dtype),
                key: random(&[kv, d], 0.4, dtype),
                value: random(&[kv, d], 0.4, dtype),
                output: random(&[d, q], 0.4, dtype),
                qkv_bias: spec.qkv_bias.then(|| [q, kv, kv].map(|n| random(&[n], 0.5, DType::F32))),
                output_bias: spec.out_bias.then(|| random(&[d], 0.5, DType::F32)),
                qk_norm: norms.map(|sizes| sizes.map(|n| random(&[n], 1.5, DType::F32))),
            },
            feed_forward_norm: random(&[d], 1.5, DType::F32),
            feed_forward,
        });
    }
    ModelWeights {
        embedding: random(&[spec.vocab_size, d], 1.0, dtype),
        layers,
        final_norm: random(&[d], 1.5, DType::F32),
        head: (!spec.tied_head).then(|| random(&[spec.vocab_size, d], 0.4, dtype)),
    }
}

const CACHE: CacheShape = CacheShape { block_tokens: 8, num_blocks: 64 };

fn host(spec: &Arc<ModelSpec>, weights: ModelWeights, quantize: bool, reduction: Reduction) -> HostDecoder {
    let weights = HostWeights::new(Arc::clone(spec), weights, HostOptions { quantize, reduction }).unwrap();
    HostDecoder::new(Arc::new(weights), CACHE).unwrap()
}

/// Sequences of several lengths and routings in one batch.
fn batch() -> Batch {
    let mut batch = Batch::default();
    let tokens = |n: u32, salt: u32| (0..n).map(|i| (i * 7 + salt) % 50).collect::<Vec<u32>>();
    batch.push(&[3, 9, 4], &tokens(21, 1), 0, RoutingChoice::Native, LogitRows::All);
    batch.push(&[0], &tokens(1, 2), 0, RoutingChoice::Soft { temperature: None }, LogitRows::All);
    batch.push(&[12, 11], &tokens(9, 3), 0, RoutingChoice::TopK { k: 1, weight_form: None }, LogitRows::All);
    batch
}

fn logits(model: &mut dyn LanguageModel, batch: &Batch) -> Vec<Vec<f32>> {
    model.forward(batch).unwrap().logits.to_vec2().unwrap()
}

fn furthest(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(b).flatten().all(|x| x.is_finite()));
    let scale = b.iter().flatten().fold(0f32, |scale, x| scale.max(x.abs()));
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / scale
}

#[test]
fn agrees_with_the_tensors() {
    for (qk_norm, biases, tied) in [(QkNorm::None, false, false), (QkNorm::PerHead, true, true), (QkNorm::Full, true, false)] {
        let spec = Arc::new(spec(qk_norm, biases, tied));
        let decoder = Decoder::new(Arc::clone(&spec), weights(&spec, DType::F32), &kernel::for_device(&Device::Cpu)).unwrap();
        let mut reference = CachedDecoder::new(decoder, CACHE).unwrap();
        for reduction in [Reduction::Fastest, Reduction::BatchInvariant] {
            let mut host = host(&spec, weights(&spec, DType::F32), false, reduction);
            let (found, wanted) = (host.forward(&batch()).unwrap(), reference.forward(&batch()).unwrap());
            let (a, b) = (found.logits.to_vec2().unwrap(), wanted.logits.to_vec2().unwrap());
            assert!(furthest(&a, &b) < 1e-5, "{qk_norm:?} {reduction:?}: {}", furthest(&a, &b));
            assert_eq!(found.layers.len(), wanted.layers.len());
            for (a, b) in found.layers.iter().zip(&wanted.layers) {
                assert_eq!((a.layer, &a.stats.expert_tokens, a.stats.routes), (b.layer, &b.stats.expert_tokens, b.stats.routes));
                assert_eq!(a.stats.near_ties, b.stats.near_ties);
                let (Routing::Sparse(a), Routing::Sparse(b)) = (&a.routing, &b.routing) else { panic!("dense") };
                assert_eq!((&a.offsets, &a.expert_ids), (&b.offsets, &b.expert_ids));
            }
            assert!(!found.time.attention.is_zero() && !found.time.experts.is_zero());
        }
    }
}

#[test]
fn narrow_weights_stay_near() {
    let spec = Arc::new(spec(QkNorm::PerHead, true, false));
    let mut exact = host(&spec, weights(&spec, DType::F32), false, Reduction::Fastest);
    // One token each: routing decides by logits that a narrow type may turn round, so all experts are mixed.
    let mut batch = Batch::default();
    (0..20).for_each(|i| batch.push(&[i], &[i], 0, RoutingChoice::Soft { temperature: Some(1.0) }, LogitRows::All));
    let wanted = logits(&mut exact, &batch);
    for (dtype, quantize, tolerance) in [(DType::BF16, false, 0.05), (DType::F32, true, 0.05), (DType::BF16, true, 0.06)] {
        for reduction in [Reduction::Fastest, Reduction::BatchInvariant] {
            let found = logits(&mut host(&spec, weights(&spec, dtype), quantize, reduction), &batch);
            assert!(furthest(&found, &wanted) < tolerance, "{dtype:?} {quantize}: {}", furthest(&found, &wanted));
            assert!(furthest(&found, &wanted) > 1e-5, "as exact as f32?");
        }
    }
}

/// With batch-invariant sums: alone, together, in chunks and token by token, all bits are the same, for all weights.
#[test]
fn the_promise_of_batch_invariance() {
    let spec = Arc::new(spec(QkNorm::PerHead, true, false));
    for (dtype, quantize) in [(DType::F32, false), (DType::BF16, false), (DType::BF16, true)] {
        let mut model = host(&spec, weights(&spec, dtype), quantize, Reduction::BatchInvariant);
        let batch = batch();
        let together = logits(&mut model, &batch);
        let mut row = 0;
        for span in &batch.spans {
            let tokens = &batch.tokens[row..row + span.new];
            for chunk in [span.new, 1, 3] {
                let mut alone = Vec::new();
                for (index, part) in tokens.chunks(chunk).enumerate() {
                    let mut batch = Batch::default();
                    batch.push(&[40, 50, 60], part, index * chunk, span.routing.clone(), LogitRows::All);
                    alone.extend(logits(&mut model, &batch));
                }
                assert_eq!(alone, together[row..row + span.new], "{dtype:?} {quantize} {:?} in parts of {chunk}", span.routing);
            }
            row += span.new;
        }
    }
}

/// Without: only rounding differs.
#[test]
fn the_fast_order_differs_by_rounding() {
    let spec = Arc::new(spec(QkNorm::None, false, false));
    let mut model = host(&spec, weights(&spec, DType::F32), false, Reduction::Fastest);
    let batch = batch();
    let together = logits(&mut model, &batch);
    let mut alone = Vec::new();
    for (position, token) in batch.tokens[..21].iter().enumerate() {
        let mut batch = Batch::default();
        batch.push(&[40, 50, 60], &[*token], position, RoutingChoice::Native, LogitRows::All);
        alone.extend(logits(&mut model, &batch));
    }
    assert!(furthest(&alone, &together[..21]) < 1e-5);
}

/// What came back is memory: values of an earlier step, of other sizes too, are nowhere in a later one, and steps of one shape share a place.
#[test]
fn recycled_forwards_leave_nothing_behind() {
    let spec = Arc::new(spec(QkNorm::None, false, false));
    let make = || host(&spec, weights(&spec, DType::F32), false, Reduction::BatchInvariant);
    let (mut recycling, mut fresh) = (make(), make());
    let place = |forward: &Forward| forward.read_logits(|logits| logits.as_ptr() as usize).unwrap();
    let mut last = None;
    for tokens in [5, 12, 3, 3, 3] {
        let mut batch = Batch::default();
        let tokens: Vec<u32> = (0..tokens).collect();
        batch.push(&[3, 9], &tokens, 0, RoutingChoice::TopK { k: 1, weight_form: None }, LogitRows::All);
        let (found, wanted) = (recycling.forward(&batch).unwrap(), fresh.forward(&batch).unwrap());
        assert_eq!(found.logits.to_vec2::<f32>().unwrap(), wanted.logits.to_vec2::<f32>().unwrap());
        assert_eq!(found.layers.len(), wanted.layers.len());
        for (a, b) in found.layers.iter().zip(&wanted.layers) {
            assert_eq!((a.layer, &a.stats), (b.layer, &b.stats));
            assert_eq!(a.router_logits.to_vec2::<f32>().unwrap(), b.router_logits.to_vec2::<f32>().unwrap());
            let (Routing::Sparse(a), Routing::Sparse(b)) = (&a.routing, &b.routing) else { panic!("dense") };
            assert_eq!(a, b);
        }
        let at = (tokens.len(), place(&found));
        assert!(last.is_none_or(|(length, place)| length != at.0 || place == at.1), "steps of one shape");
        last = Some(at);
        recycling.recycle(found);
    }
}

/// Other weights take the cache over: each sequence is what its own weights say alone, whichever the model had in between.
#[test]
fn weights_can_be_exchanged_over_one_cache() {
    let spec = Arc::new(spec(QkNorm::None, false, false));
    let (first, mut second) = (weights(&spec, DType::F32), weights(&spec, DType::F32));
    second.layers.iter_mut().for_each(|layer| layer.attention_norm = layer.attention_norm.abs().unwrap());
    let slices = |weights: &ModelWeights| {
        let options = HostOptions { quantize: false, reduction: Reduction::BatchInvariant };
        Arc::new(HostWeights::new(Arc::clone(&spec), weights.clone(), options).unwrap())
    };
    let tensors =
        |weights: &ModelWeights| Arc::new(Decoder::new(Arc::clone(&spec), weights.clone(), &kernel::for_device(&Device::Cpu)).unwrap());
    let host = |weights: &ModelWeights| HostDecoder::new(slices(weights), CACHE).unwrap();
    let cached = |weights: &ModelWeights| CachedDecoder::new(tensors(weights), CACHE).unwrap();
    let both = [&first, &second];
    exchanged(
        &mut host(&first),
        both.map(|weights| (SharedWeights::new(slices(weights)), Box::new(host(weights)) as Box<dyn LanguageModel>)),
    );
    exchanged(
        &mut cached(&first),
        both.map(|weights| (SharedWeights::new(tensors(weights)), Box::new(cached(weights)) as Box<dyn LanguageModel>)),
    );

    let other = Arc::new(ModelSpec { rms_norm_eps: 1e-3, ..ModelSpec::clone(&spec) });
    let stranger = HostWeights::new(other, first.clone(), HostOptions::default()).unwrap();
    let cases =
        [(SharedWeights::new(tensors(&first)), "another kind of model"), (SharedWeights::new(Arc::new(stranger)), "another model than")];
    for (weights, expected) in cases {
        let error = host(&first).exchange(weights).unwrap_err();
        assert!(error.kind() == ErrorKind::FailedPrecondition && error.to_string().contains(expected), "{error}");
    }
}

/// Two sequences in turns, one on each of the weights, against a model that has had no others.
fn exchanged(model: &mut dyn LanguageModel, weights: [(SharedWeights, Box<dyn LanguageModel>); 2]) {
    let (tables, tokens) = ([[1, 4], [3, 2]], |n: u32| (0..3).map(|i| (n * 5 + i * 7) % 50).collect::<Vec<u32>>());
    let mut weights = weights.into_iter().zip(tables).collect::<Vec<_>>();
    let mut seen: Vec<Vec<Vec<f32>>> = Vec::new();
    for step in 0..4 {
        for ((weights, alone), table) in &mut weights {
            model.exchange(weights.clone()).unwrap();
            let mut batch = Batch::default();
            batch.push(table, &tokens(step), 3 * step as usize, RoutingChoice::Native, LogitRows::All);
            let found = logits(model, &batch);
            assert_eq!(found, logits(alone.as_mut(), &batch));
            seen.push(found);
        }
    }
    assert_ne!(seen[0], seen[1], "the weights say different things");
}
