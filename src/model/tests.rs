//! The decoder as a whole: independence of batch and chunking, gradients of every variable.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{DType, Device, IndexOp, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{
    Batch, CacheShape, CachedDecoder, Decoder, FeedForwardSpec, LanguageModel, LayerSpec, LogitRows, ModelSpec, MoeSpec, QkNorm,
    ReferenceRouting, RopeScaling, RopeSpec,
    weights::{AttentionWeights, FeedForwardWeights, LayerWeights, ModelWeights, MoeWeights, SharedExpertWeights, SwiGluWeights},
};
use crate::{
    model::kv_cache::KvCache,
    moe::{
        RoutingMode, TrainState,
        estimator::{Combine, Estimator, EstimatorConfig, EstimatorSpec, Execution, Gradient, Purpose, Weights, catalog},
        kernel,
        policy::{RoutingChoice, RoutingPolicy, WeightForm},
    },
    ops::{self, as_on_a_device},
    train::trainable::{Learning, Part, Trainable},
};

pub(crate) fn spec() -> ModelSpec {
    let moe = MoeSpec { num_experts: 4, expert_width: 24, top_k: 1, weight_form: WeightForm::Renorm, shared_expert_width: None };
    ModelSpec {
        family: "mixtral".into(),
        vocab_size: 50,
        hidden_size: 32,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 8,
        qkv_bias: false,
        out_bias: false,
        qk_norm: QkNorm::None,
        clip_qkv: None,
        rms_norm_eps: 1e-5,
        rope: RopeSpec { theta: 10_000.0, scaling: RopeScaling::None },
        max_context: 96,
        tied_head: false,
        layers: vec![
            LayerSpec { sliding_window: None, feed_forward: FeedForwardSpec::Moe(moe.clone()) },
            LayerSpec { sliding_window: Some(6), feed_forward: FeedForwardSpec::Moe(moe) },
        ],
        reference: ReferenceRouting::Soft { temperature: 1.0 },
        estimator: "unknown".into(),
    }
}

fn model() -> (Arc<ModelSpec>, Trainable) {
    let spec = Arc::new(spec());
    let model = Trainable::init(&spec, |experts| experts, &mut StdRng::seed_from_u64(11), &Device::Cpu).unwrap();
    // A router near zero makes every choice a tie: spread it.
    for parameter in model.parameters().iter().filter(|p| p.name.ends_with("router")) {
        parameter.var.set(&(parameter.var.as_detached_tensor() * 60.0).unwrap()).unwrap();
    }
    (spec, model)
}

fn decoder() -> Decoder {
    let (spec, model) = model();
    Decoder::new(spec, model.detached(), &kernel::for_device(&Device::Cpu)).unwrap()
}

const CACHE: CacheShape = CacheShape { block_tokens: 8, num_blocks: 96 };

fn cached() -> CachedDecoder {
    CachedDecoder::new(decoder(), CACHE).unwrap()
}

/// A table for a whole context, other blocks for each of eight sequences, out of order and far apart.
fn table(sequence: usize) -> Vec<u32> {
    (0..12).map(|block| ((block * 8 + sequence) * 37 % 96) as u32).collect()
}

/// (prompt, routing) of eight different requests.
fn requests() -> Vec<(Vec<u32>, RoutingChoice)> {
    let routings = [
        RoutingChoice::Native,
        RoutingChoice::TopK { k: 2, weight_form: None },
        RoutingChoice::Soft { temperature: None },
        RoutingChoice::TopK { k: 1, weight_form: Some(WeightForm::Raw) },
    ];
    (0..8usize).map(|i| ((0..1 + 3 * i).map(|t| ((t * 7 + i * 13) % 50) as u32).collect(), routings[i % 4])).collect()
}

/// Greedy continuation of one request alone, the whole prompt at once.
fn alone(prompt: &[u32], routing: RoutingChoice, new: usize) -> (Vec<u32>, Vec<Vec<f32>>) {
    let mut model = cached();
    let (mut tokens, mut rows) = (Vec::new(), Vec::new());
    let (mut input, mut past) = (prompt.to_vec(), 0);
    for _ in 0..new {
        let mut batch = Batch::default();
        batch.push(&table(3), &input, past, routing, LogitRows::Last);
        let logits = model.forward(&batch).unwrap().logits.i(0).unwrap().to_vec1::<f32>().unwrap();
        past += input.len();
        input = vec![argmax(&logits)];
        tokens.push(input[0]);
        rows.push(logits);
    }
    (tokens, rows)
}

fn argmax(row: &[f32]) -> u32 {
    (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32
}

#[test]
fn a_batch_gives_each_request_the_bits_it_gets_alone() {
    let mut model = cached();
    let requests = requests();
    let mut state: BTreeMap<usize, (Vec<u32>, usize)> = requests.iter().enumerate().map(|(i, (p, _))| (i, (p.clone(), 0))).collect();
    let mut found: Vec<(Vec<u32>, Vec<Vec<f32>>)> = vec![Default::default(); requests.len()];
    for step in 0..6 {
        let mut batch = Batch::default();
        // Another order in every step.
        let order: Vec<usize> = (0..requests.len()).map(|i| (i * 3 + step) % requests.len()).collect();
        for &i in &order {
            let (input, past) = &state[&i];
            batch.push(&table(i), input, *past, requests[i].1, LogitRows::Last);
        }
        let logits = model.forward(&batch).unwrap().logits.to_vec2::<f32>().unwrap();
        for (row, &i) in logits.into_iter().zip(&order) {
            let entry = state.get_mut(&i).unwrap();
            *entry = (vec![argmax(&row)], entry.1 + entry.0.len());
            found[i].0.push(argmax(&row));
            found[i].1.push(row);
        }
    }
    for (i, (prompt, routing)) in requests.iter().enumerate() {
        assert_eq!(found[i], alone(prompt, *routing, 6), "request {i} under {routing}");
    }
}

/// Blocks of 1, 5 and 96 tokens.
#[test]
fn the_block_table_changes_no_bit() {
    let (prompt, routing) = (requests()[7].0.clone(), RoutingChoice::TopK { k: 2, weight_form: None });
    let whole = alone(&prompt, routing, 1).1;
    for (block_tokens, num_blocks) in [(1, 40), (5, 9), (96, 2)] {
        let mut model = CachedDecoder::new(decoder(), CacheShape { block_tokens, num_blocks }).unwrap();
        let table: Vec<u32> = (0..num_blocks as u32).rev().collect();
        let mut last = None;
        for (i, part) in prompt.chunks(7).enumerate() {
            let mut batch = Batch::default();
            batch.push(&table, part, i * 7, routing, LogitRows::Last);
            last = Some(model.forward(&batch).unwrap().logits.i(0).unwrap().to_vec1::<f32>().unwrap());
        }
        assert_eq!(last.as_ref(), whole.first(), "blocks of {block_tokens}");
    }
}

/// The path of other devices, which gathers the blocks, agrees with the loops of the CPU: chunks, windows, and several sequences.
#[test]
fn gathered_blocks_give_the_same_logits() {
    let decoder = decoder();
    let cache = || KvCache::new(decoder.spec(), CACHE, decoder.activations(), &Device::Cpu).unwrap();
    let (mut host, mut device) = (cache(), cache().into_device_store());
    let requests = &requests()[4..];
    for chunk in 0..4 {
        let mut batch = Batch::default();
        for (i, (prompt, routing)) in requests.iter().enumerate() {
            if let Some(part) = prompt.chunks(7).nth(chunk) {
                batch.push(&table(i), part, chunk * 7, *routing, LogitRows::All);
            }
        }
        let logits = [&mut host, &mut device].map(|cache| decoder.serve(&batch, Some(cache)).unwrap().logits);
        let difference = (&logits[0] - &logits[1]).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        assert!(difference.to_scalar::<f32>().unwrap() < 1e-4, "{difference}");
    }
}

#[test]
fn chunks_of_a_prompt_give_the_same_bits() {
    let (prompt, routing) = (requests()[7].0.clone(), RoutingChoice::Native);
    let whole = alone(&prompt, routing, 1).1;
    for chunk in [1, 2, 5, 21] {
        let mut model = cached();
        let mut last = None;
        for (i, part) in prompt.chunks(chunk).enumerate() {
            let mut batch = Batch::default();
            batch.push(&table(0), part, i * chunk, routing, LogitRows::Last);
            last = Some(model.forward(&batch).unwrap().logits.i(0).unwrap().to_vec1::<f32>().unwrap());
        }
        assert_eq!(last.as_ref(), whole.first(), "chunks of {chunk}");
    }
}

#[test]
fn blocks_are_reused() {
    let mut model = cached();
    let run = |model: &mut CachedDecoder, tokens: &[u32]| {
        let mut batch = Batch::default();
        batch.push(&table(0), tokens, 0, RoutingChoice::Native, LogitRows::Last);
        model.forward(&batch).unwrap().logits.to_vec2::<f32>().unwrap()
    };
    let first = run(&mut model, &[1, 2, 3]);
    run(&mut model, &[9; 40]);
    assert_eq!(run(&mut model, &[1, 2, 3]), first);
}

#[test]
fn logits_come_for_the_rows_asked_for() {
    let decoder = decoder();
    let mut batch = Batch::default();
    batch.push(&[], &[1, 2, 3], 0, RoutingChoice::Native, LogitRows::None);
    batch.push(&[], &[4, 5], 0, RoutingChoice::Native, LogitRows::All);
    batch.push(&[], &[6, 7, 8], 0, RoutingChoice::Native, LogitRows::Last);
    assert_eq!(batch.logit_rows(), [3, 4, 7]);
    let forward = decoder.serve(&batch, None).unwrap();
    assert_eq!(forward.logits.dims(), [3, 50]);
    assert_eq!(forward.layers.len(), 2);
    assert!(forward.layers.iter().all(|layer| layer.stats.tokens == 8 && layer.stats.routes == 8));
    let mut none = Batch::default();
    none.push(&[], &[1], 0, RoutingChoice::Native, LogitRows::None);
    assert_eq!(decoder.serve(&none, None).unwrap().logits.dims(), [0, 50]);
}

#[test]
fn impossible_batches_are_errors() {
    let decoder = decoder();
    let forward = |tokens: &[u32], past| {
        let mut batch = Batch::default();
        batch.push(&[], tokens, past, RoutingChoice::Native, LogitRows::Last);
        decoder.serve(&batch, None)
    };
    assert!(forward(&[50], 0).is_err(), "token outside the vocabulary");
    assert!(forward(&[], 0).is_err(), "nothing to do");
    assert!(forward(&[1; 97], 0).is_err(), "longer than the context");
    assert!(forward(&[1], 1).is_err(), "a past without a cache");
    let mut model = cached();
    let mut paged = |table: &[u32], tokens: &[u32], past| {
        let mut batch = Batch::default();
        batch.push(table, tokens, past, RoutingChoice::Native, LogitRows::Last);
        model.forward(&batch)
    };
    assert!(paged(&[7], &[1; 8], 0).is_ok());
    assert!(paged(&[7], &[1; 9], 0).is_err(), "a table that is too short");
    assert!(paged(&[96], &[1], 0).is_err(), "a block that is not there");
    assert!(paged(&[], &[1], 0).is_err(), "no table");
}

/// Every row of the catalogue at its defaults, at the largest and the smallest k that it can have of 1 and 2.
fn estimators() -> Vec<(String, Estimator)> {
    let mut found = Vec::new();
    for row in catalog::CATALOG {
        for k in [None, Some(1), Some(2)] {
            let config = EstimatorConfig { name: row.name.into(), k, params: BTreeMap::new() };
            if let Ok(spec) = EstimatorSpec::new(&config, 4, 100, Purpose::Laboratory) {
                found.push((format!("{} k={k:?}", row.name), spec.at(50, 100)));
            }
        }
    }
    assert!(found.len() > 40, "{}", found.len());
    found
}

/// A decoder whose routers have the outputs that an estimator reads.
fn for_estimator(estimator: &Estimator, learning: Learning) -> (Decoder, Trainable) {
    let spec = Arc::new(spec());
    let width = |experts| estimator.router_width(experts);
    let model = Trainable::init(&spec, width, &mut StdRng::seed_from_u64(11), &Device::Cpu).unwrap();
    for parameter in model.parameters().iter().filter(|p| p.part == Part::Router) {
        parameter.var.set(&(parameter.var.as_detached_tensor() * 20.0).unwrap()).unwrap();
    }
    let decoder = Decoder::new(spec, model.tracked(learning), &kernel::for_device(&Device::Cpu)).unwrap();
    (decoder, model)
}

#[test]
fn every_variable_gets_a_gradient() {
    check_every_gradient(DType::F32);
}

/// In the operations of a device, in f32 and with products of bf16: every master gets an f32 gradient.
#[test]
fn every_variable_gets_a_gradient_on_a_device() {
    as_on_a_device(|| [DType::F32, DType::BF16].into_iter().for_each(check_every_gradient));
}

fn check_every_gradient(products: DType) {
    let tokens: Vec<u32> = (0..48).map(|i| (i * i + 3 * i) as u32 % 50).collect();
    let targets: Vec<u32> = tokens.iter().map(|t| (t + 1) % 50).collect();
    for (name, estimator) in estimators() {
        let (decoder, model) = for_estimator(&estimator, Learning::All);
        let decoder = decoder.with_products(products);
        let mut batch = Batch::default();
        tokens.chunks(12).for_each(|part| batch.push(&[], part, 0, RoutingChoice::Native, LogitRows::All));
        let mut state = TrainState::new(1);
        let policy = RoutingPolicy::Estimator(estimator);
        let forward = decoder.forward(&batch, &mut RoutingMode::Train { policy, state: &mut state }, None).unwrap();
        let grads = ops::cross_entropy(&forward.logits, &targets).unwrap().backward().unwrap();
        // Weights that do not depend on the router.
        let constant = estimator.gradient == Gradient::Zero
            || estimator.gradient == Gradient::Exact && estimator.weights == Weights::Renorm && estimator.k() == 1
            || matches!(estimator.gradient, Gradient::Score { .. }) && estimator.k() == 1;
        for parameter in model.parameters() {
            let grad = grads.get(&parameter.var).unwrap_or_else(|| panic!("{name}: no gradient reaches {}", parameter.name));
            assert_eq!((grad.dtype(), grad.shape()), (DType::F32, parameter.var.shape()), "{name}: gradient of {}", parameter.name);
            let norm = grad.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            if constant && parameter.part == Part::Router {
                assert_eq!(norm, 0.0, "{name}: gradient of {}", parameter.name);
            } else {
                assert!(norm.is_finite() && norm > 0.0, "{name}: gradient of {} is {norm}", parameter.name);
            }
        }
        assert!(forward.layers.iter().all(|layer| layer.stats.tokens == 48 && layer.stats.executed > 0), "{name}");
    }
}

/// What is frozen gets no gradient at all, and the rest the one it has otherwise.
#[test]
fn frozen_parts_have_no_gradient() {
    let estimator = RoutingPolicy::Soft { temperature: 1.0 }.estimator();
    let of = |learning: Learning| {
        let (decoder, model) = for_estimator(&estimator, learning);
        let mut batch = Batch::default();
        batch.push(&[], &[3, 1, 4, 1, 5, 9, 2, 6], 0, RoutingChoice::Native, LogitRows::All);
        let policy = RoutingPolicy::Estimator(estimator);
        let forward = decoder.forward(&batch, &mut RoutingMode::Train { policy, state: &mut TrainState::new(1) }, None).unwrap();
        let grads = ops::cross_entropy(&forward.logits, &[1, 4, 1, 5, 9, 2, 6, 5]).unwrap().backward().unwrap();
        let flat = |grad: &candle_core::Tensor| grad.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        model.parameters().iter().map(|p| (p.part, grads.get(&p.var).map(flat))).collect::<Vec<_>>()
    };
    let all = of(Learning::All);
    for learning in [Learning::Experts, Learning::Router] {
        for ((part, found), (_, wanted)) in of(learning).iter().zip(&all) {
            assert_eq!(found.is_some(), learning.moves(*part), "{learning:?}: {part:?}");
            let close = |a: &Vec<f32>, b: &Vec<f32>| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(found.as_ref().zip(wanted.as_ref()).is_none_or(|(a, b)| close(a, b)), "{learning:?}: {part:?}");
        }
    }
}

#[test]
fn the_tracked_forward_is_the_served_one() {
    check_tracked_and_served();
    as_on_a_device(check_tracked_and_served);
}

fn check_tracked_and_served() {
    let (spec, model) = model();
    let kernel = kernel::for_device(&Device::Cpu);
    let tracked = Decoder::new(Arc::clone(&spec), model.tracked(Learning::All), &kernel).unwrap();
    let served = Decoder::new(spec, model.detached(), &kernel).unwrap();
    let hard = |k| RoutingChoice::TopK { k, weight_form: Some(WeightForm::Renorm) };
    let ste = |k| Estimator {
        combine: Combine::Mixture(Execution::All),
        ..RoutingPolicy::TopK { k, weight_form: WeightForm::Renorm }.estimator()
    };
    let straight = |k| Estimator { gradient: Gradient::StraightThrough { normalised: false }, ..ste(k) };
    let cases = [
        (RoutingChoice::Soft { temperature: Some(1.0) }, RoutingPolicy::Soft { temperature: 1.0 }),
        (RoutingChoice::Native, RoutingPolicy::TopK { k: 1, weight_form: WeightForm::Renorm }),
        (hard(1), RoutingPolicy::Estimator(straight(1))),
        (hard(2), RoutingPolicy::Estimator(straight(2))),
        (RoutingChoice::Soft { temperature: Some(1.0) }, RoutingPolicy::TopK { k: 4, weight_form: WeightForm::Raw }),
    ];
    for (choice, policy) in cases {
        let mut batch = Batch::default();
        batch.push(&[], &[3, 1, 4, 1, 5, 9, 2, 6], 0, choice, LogitRows::All);
        batch.push(&[], &[2, 7, 1, 8, 2, 8, 1, 8], 0, choice, LogitRows::All);
        let a = served.serve(&batch, None).unwrap().logits;
        let mut mode = RoutingMode::Train { policy, state: &mut TrainState::new(0) };
        let b = tracked.forward(&batch, &mut mode, None).unwrap().logits;
        let worst: f32 = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap();
        assert!(worst < 1e-4, "{policy}: {worst}");
    }
}

/// Models of every form of attention: windows, shared heads, norms of queries and keys, biases, clipping; dense layers and shared experts.
fn forms() -> Vec<(&'static str, ModelSpec)> {
    let with = |edit: &dyn Fn(&mut ModelSpec)| {
        let mut spec = spec();
        edit(&mut spec);
        spec
    };
    vec![
        ("windows and shared heads", spec()),
        ("a norm for each head", with(&|spec| spec.qk_norm = QkNorm::PerHead)),
        ("norms of whole projections", with(&|spec| spec.qk_norm = QkNorm::Full)),
        ("biases, clipping", with(&|spec| (spec.qkv_bias, spec.out_bias, spec.clip_qkv) = (true, true, Some(0.5)))),
        ("a dense layer, a shared expert, a tied head", {
            with(&|spec| {
                spec.layers[0].feed_forward = FeedForwardSpec::Dense { width: 20 };
                if let FeedForwardSpec::Moe(moe) = &mut spec.layers[1].feed_forward {
                    moe.shared_expert_width = Some(12);
                }
                spec.tied_head = true;
            })
        }),
    ]
}

/// Random weights of any spec; norms near 1.
fn any_weights(spec: &ModelSpec) -> ModelWeights {
    let rng = &mut StdRng::seed_from_u64(23);
    let (d, hd) = (spec.hidden_size, spec.head_dim);
    let (q, kv) = (spec.num_heads * hd, spec.num_kv_heads * hd);
    let mut make = |shape: &[usize]| {
        let scale = if shape.len() == 1 { 0.3 } else { 1.5 / (shape[shape.len() - 1] as f32).sqrt() };
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-scale..scale)).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let norm = |tensor: Tensor| (tensor + 1.0).unwrap();
    let (qk, layers) = (matches!(spec.qk_norm, QkNorm::PerHead), &spec.layers);
    let layers = layers.iter().map(|layer| LayerWeights {
        attention_norm: norm(make(&[d])),
        attention: AttentionWeights {
            query: make(&[q, d]),
            key: make(&[kv, d]),
            value: make(&[kv, d]),
            output: make(&[d, q]),
            qkv_bias: spec.qkv_bias.then(|| [make(&[q]), make(&[kv]), make(&[kv])]),
            output_bias: spec.out_bias.then(|| make(&[d])),
            qk_norm: (spec.qk_norm != QkNorm::None)
                .then(|| [norm(make(&[if qk { hd } else { q }])), norm(make(&[if qk { hd } else { kv }]))]),
        },
        feed_forward_norm: norm(make(&[d])),
        feed_forward: match &layer.feed_forward {
            FeedForwardSpec::Dense { width } => {
                FeedForwardWeights::Dense(SwiGluWeights { gate_up: make(&[2 * width, d]), down: make(&[d, *width]) })
            }
            FeedForwardSpec::Moe(moe) => FeedForwardWeights::Moe(MoeWeights {
                router: (make(&[moe.num_experts, d]) * 3.0).unwrap(),
                gate_up: make(&[moe.num_experts, 2 * moe.expert_width, d]),
                down: make(&[moe.num_experts, d, moe.expert_width]),
                shared: moe.shared_expert_width.map(|width| SharedExpertWeights {
                    expert: SwiGluWeights { gate_up: make(&[2 * width, d]), down: make(&[d, width]) },
                    gate: make(&[1, d]),
                }),
            }),
        },
    });
    let layers = layers.collect();
    let head = (!spec.tied_head).then(|| make(&[spec.vocab_size, d]));
    ModelWeights { embedding: make(&[spec.vocab_size, d]), layers, final_norm: norm(make(&[d])), head }
}

/// Loss and the gradient of every tensor, by name, of windows of one length or of several.
fn differentiated(spec: &ModelSpec, lengths: &[usize], products: DType) -> (f32, BTreeMap<String, Vec<f32>>) {
    let weights = any_weights(spec);
    let names = weights.named().into_iter().map(|(name, _)| name).collect();
    let model = Trainable::over(&weights, &names).unwrap();
    let decoder = Decoder::new(Arc::new(spec.clone()), model.tracked(Learning::All), &kernel::for_device(&Device::Cpu)).unwrap();
    let decoder = decoder.with_products(products);
    let (mut batch, mut targets) = (Batch::default(), Vec::new());
    for (index, &length) in lengths.iter().enumerate() {
        let tokens: Vec<u32> = (0..length).map(|i| (i * i + 7 * i + index * 11) as u32 % 50).collect();
        targets.extend(tokens.iter().map(|token| (token + 1) % 50));
        batch.push(&[], &tokens, 0, RoutingChoice::Native, LogitRows::All);
    }
    let policy = RoutingPolicy::Soft { temperature: 1.0 };
    let forward = decoder.forward(&batch, &mut RoutingMode::Train { policy, state: &mut TrainState::new(1) }, None).unwrap();
    let loss = ops::cross_entropy(&forward.logits, &targets).unwrap();
    let grads = loss.backward().unwrap();
    let gradient = |var: &candle_core::Var| grads.get(var).expect("a gradient").flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let gradients = model.parameters().iter().map(|parameter| (parameter.name.clone(), gradient(&parameter.var))).collect();
    (loss.to_scalar().unwrap(), gradients)
}

#[test]
fn a_device_has_the_gradients_of_the_cpu() {
    for (name, spec) in forms() {
        for lengths in [&[12, 12][..], &[3, 17, 8]] {
            let (loss, wanted) = differentiated(&spec, lengths, DType::F32);
            // Where a value is clipped or not by the rounding of bf16, its gradient is there or not.
            for (products, most) in [(DType::F32, 1e-4), (DType::BF16, 0.1)] {
                let (found_loss, found) = as_on_a_device(|| differentiated(&spec, lengths, products));
                assert!((found_loss - loss).abs() < most as f32 * loss, "{name}, {products:?}: {found_loss} and {loss}");
                for (tensor, wanted) in &wanted {
                    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|d| f64::from(d).powi(2)).sum::<f64>().sqrt();
                    let apart = norm(&mut wanted.iter().zip(&found[tensor]).map(|(a, b)| a - b));
                    let size = norm(&mut wanted.iter().copied());
                    assert!(size > 0.0 && apart < most * size, "{name}, {products:?}: {tensor}: {apart} of {size}");
                }
            }
        }
    }
}

/// Serving in the operations of a device: gathered blocks, chunks, the reference kernel; in bf16 near the logits of f32.
#[test]
fn a_device_serves_what_the_cpu_serves() {
    let run = |products: DType| {
        let mut model = CachedDecoder::new(decoder().with_products(products), CACHE).unwrap();
        let mut rows = Vec::new();
        for chunk in 0..4 {
            let mut batch = Batch::default();
            for (i, (prompt, routing)) in requests()[4..].iter().enumerate() {
                if let Some(part) = prompt.chunks(7).nth(chunk) {
                    batch.push(&table(i), part, chunk * 7, *routing, LogitRows::All);
                }
            }
            rows.extend(model.forward(&batch).unwrap().logits.to_vec2::<f32>().unwrap().concat());
        }
        rows
    };
    let wanted = run(DType::F32);
    for (products, most) in [(DType::F32, 1e-5), (DType::BF16, 0.03)] {
        let found = as_on_a_device(|| run(products));
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|z| f64::from(z).powi(2)).sum::<f64>().sqrt();
        let apart = norm(&mut wanted.iter().zip(&found).map(|(a, b)| a - b));
        let size = norm(&mut wanted.iter().copied());
        assert!(found.len() == wanted.len() && apart < most * size, "{products:?}: {apart} of {size}");
    }
}
