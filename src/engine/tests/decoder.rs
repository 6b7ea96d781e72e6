//! The property that holds for the fake by construction, on a small random checkpoint of each family: whatever happens to a
//! request, its tokens and their probabilities are those that it gets alone, bit for bit.

use candle_core::Device;

use super::*;
use crate::{
    checkpoint::{Checkpoint, LoadOptions},
    model::{
        CacheShape, CachedDecoder, Decoder, SharedWeights,
        load::{DeviceKind, ServingModel, ServingOptions, WeightType, load, load_to_serve},
        weights::FeedForwardWeights,
    },
    moe::{kernel, policy::RoutingChoice},
    ops::cpu::Reduction,
};

/// Which of the forwards computes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Forward {
    Tensors,
    /// The one that serves on the CPU, with `--deterministic`.
    Host(WeightType),
}

const ROUTINGS: [RoutingChoice; 4] = [
    RoutingChoice::Native,
    RoutingChoice::TopK { k: 1, weight_form: None },
    RoutingChoice::TopK { k: 2, weight_form: None },
    RoutingChoice::Soft { temperature: None },
];

pub(super) fn decoder(case: &str, forward: Forward, cache: CacheShape) -> Box<dyn LanguageModel> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(case);
    match forward {
        Forward::Tensors => {
            let loaded = load(&folder, DeviceKind::Cpu, WeightType::F32, false).unwrap();
            Box::new(CachedDecoder::new(loaded.decoder, cache).unwrap())
        }
        Forward::Host(weights) => {
            let options = ServingOptions { device: DeviceKind::Cpu, weights, reduction: Reduction::BatchInvariant };
            load_to_serve(&folder, options, false).unwrap().1.start(cache).unwrap()
        }
    }
}

/// The same with routers `routers` times as large, and what another one of these can be given to run like it.
pub(super) fn scaled(case: &str, forward: Forward, cache: CacheShape, routers: f64) -> (Box<dyn LanguageModel>, SharedWeights) {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(case);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let weights = if let Forward::Host(weights) = forward { weights } else { WeightType::F32 };
    let mut loaded = checkpoint.load(&LoadOptions { dtype: weights.dtype(DeviceKind::Cpu), device: Device::Cpu, progress: false }).unwrap();
    for layer in &mut loaded.layers {
        if let FeedForwardWeights::Moe(moe) = &mut layer.feed_forward {
            moe.router = (&moe.router * routers).unwrap();
        }
    }
    let spec = Arc::new(checkpoint.spec().clone());
    if let Forward::Tensors = forward {
        let decoder = Arc::new(Decoder::new(spec, loaded, &kernel::for_device(&Device::Cpu)).unwrap());
        return (Box::new(CachedDecoder::new(decoder.clone(), cache).unwrap()), SharedWeights::new(decoder));
    }
    let options = ServingOptions { device: DeviceKind::Cpu, weights, reduction: Reduction::BatchInvariant };
    let model = ServingModel::new(spec, loaded, options).unwrap();
    (model.start(cache).unwrap(), model.shared())
}

pub(super) fn start_over(model: Box<dyn LanguageModel>, config: EngineConfig, metrics: Arc<Metrics>) -> Engine {
    Engine::start(EngineParts {
        model,
        generation: FIRST_GENERATION,
        background: None,
        tokenizer: fake::tokenizer(),
        eos_token_ids: vec![],
        config,
        metrics,
    })
    .unwrap()
}

pub(super) fn start_decoder(case: &str, forward: Forward, cache: CacheShape, config: EngineConfig, metrics: Arc<Metrics>) -> Engine {
    start_over(decoder(case, forward, cache), config, metrics)
}

/// Every routing, prompts of all lengths that begin alike in pairs, one of them with several sampled choices.
pub(super) fn requests() -> Vec<(Request, usize)> {
    let request = |n: u32| {
        let prompt: Vec<u32> = (0..3 + n * 2).map(|i| (i * 31 + n / 2 * 17) % 80).collect();
        let choices = if n == 7 { 3 } else { 1 };
        let request = generate(&prompt, |p| {
            (p.n, p.max_new_tokens, p.logprobs) = (choices, Some(12), Some(0));
            (p.temperature, p.seed) = (if n % 3 == 1 { 0.8 } else { 0.0 }, u64::from(n));
        });
        (Request { routing: ROUTINGS[n as usize / 2 % 4].into(), ..request }, choices)
    };
    (0..10).map(request).collect()
}

#[tokio::test]
async fn in_any_company_and_any_blocks() {
    let (mut preempted, mut hits) = (0.0, 0.0);
    let cases = [
        ("mixtral_gqa", Forward::Tensors),
        ("mixtral_gqa", Forward::Host(WeightType::Bf16)),
        ("mixtral_gqa", Forward::Host(WeightType::Q8)),
        ("olmoe_clip", Forward::Host(WeightType::F32)),
        ("qwen2_shared_sparse_step", Forward::Host(WeightType::F32)),
        ("qwen2_shared_sparse_step", Forward::Tensors),
        ("qwen3_yarn_tied", Forward::Host(WeightType::Bf16)),
    ];
    for (case, forward) in cases {
        let roomy = CacheShape { block_tokens: 16, num_blocks: 64 };
        let engine = start_decoder(case, forward, roomy, EngineConfig { prefix_cache: PrefixCache::Off, ..fake::config() }, metrics());
        let mut alone = Vec::new();
        for (request, choices) in requests() {
            alone.push(collect_choices(engine.submit(request).unwrap(), choices).await);
        }
        for (block_tokens, num_blocks, max_step_tokens) in [(4, 12, 5), (4, 26, 64), (8, 200, 7)] {
            let metrics = metrics();
            let config = EngineConfig { max_step_tokens, max_batch_requests: 6, max_queue_requests: 20, ..fake::config() };
            let engine = start_decoder(case, forward, CacheShape { block_tokens, num_blocks }, config, metrics.clone());
            // Twice, so that the second time prefixes are known.
            for round in 0..2 {
                let streams: Vec<_> = requests().into_iter().map(|(r, choices)| (engine.submit(r).unwrap(), choices)).collect();
                for ((stream, choices), alone) in streams.into_iter().zip(&alone) {
                    for (together, alone) in collect_choices(stream, choices).await.iter().zip(alone) {
                        let what = format!("{case}, {forward:?}, {num_blocks} blocks, {max_step_tokens} tokens per step, round {round}");
                        assert_eq!(together.ids, alone.ids, "{what}");
                        assert_eq!(together.logprobs, alone.logprobs, "{what}");
                    }
                }
            }
            super::cache::nothing_is_left(&engine, &metrics).await;
            preempted += series(&metrics, "hardmax_preemptions_total");
            hits += series(&metrics, "hardmax_prefix_cache_hits_total");
        }
    }
    assert!(preempted > 10.0 && hits > 500.0, "{preempted} preempted, {hits} tokens of known prefixes");
}
