//! `cargo bench`: the expert kernel, the dense product, and a whole layer, against candle on the same weights.
//!
//! Every arm runs once in each turn, so that what else happens on the machine hits all alike; what is told is the median over turns,
//! and the median of the ratios within turns. Weights are larger than caches: one layer follows another.
//!
//!     cargo bench --bench kernels -- --rows 1,8,512 --turns 5

use std::{collections::HashMap, error::Error, num::NonZeroUsize, time::Instant};

use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::mixtral;
use clap::Parser;
use hardmax::{
    bench::{
        Placement, Source, Subject, micro,
        stats::Sample,
        subject::cache_for,
        synthetic::{self, SyntheticSpec},
    },
    model::{
        Batch, LanguageModel, LogitRows,
        load::{DeviceKind, WeightType},
        weights::{FeedForwardWeights, LayerWeights, ModelWeights},
    },
    moe::{kernel::Experts, policy::RoutingChoice},
    ops::cpu::{Arithmetic, Reduction},
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Time the kernels of hardmax and of candle on the same weights.
#[derive(Parser)]
struct Options {
    /// Rows: tokens of a step.
    #[arg(long, value_delimiter = ',', default_value = "1,2,8,32,128,512")]
    rows: Vec<usize>,
    /// Turns, of which medians are taken.
    #[arg(long, default_value = "5")]
    turns: NonZeroUsize,
    /// Shape of a layer, as of `hardmax bench --synthetic`.
    #[arg(long, default_value = "mixtral-0.9b,layers=1,vocab=64")]
    shape: SyntheticSpec,
    /// Bytes of weights that one sweep reads at least, in MiB.
    #[arg(long, default_value_t = 1024)]
    sweep_mib: usize,
    /// Element types of hardmax's weights; candle's are f32.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "f32,bf16")]
    dtype: Vec<WeightType>,
    /// Compare results only, once each.
    #[arg(long)]
    check: bool,
    /// What cargo passes to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

/// One way to do the work, and how long it took in each turn.
struct Arm<'a> {
    name: String,
    run: Box<dyn FnMut() -> Result<f64> + 'a>,
    seconds: Sample,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let layers = sweep(&options);
    println!("{} layers of {}; {} turns\n", layers, options.shape, options.turns);
    whole_layer(&options, layers)?;
    if !options.check {
        expert_kernel(&options, layers)?;
        dense_product(&options)?;
    }
    Ok(())
}

/// Layers of f32 that fill a sweep.
fn sweep(options: &Options) -> usize {
    let (all, _) = options.shape.model().parameters();
    ((options.sweep_mib << 20) / (4 * all as usize)).clamp(1, 64)
}

/// Runs all arms in turns and prints a line for each; the first is the baseline. `flops` is the work of one run.
fn compare(rows: usize, mut arms: Vec<Arm<'_>>, turns: usize, flops: f64) -> Result<()> {
    for arm in &mut arms {
        (arm.run)()?;
    }
    let mut ratios: Vec<Sample> = arms.iter().map(|_| Sample::default()).collect();
    for _ in 0..turns {
        let mut baseline = None;
        for (arm, ratios) in arms.iter_mut().zip(&mut ratios) {
            let seconds = (arm.run)()?;
            arm.seconds.push(seconds);
            ratios.push(*baseline.get_or_insert(seconds) / seconds);
        }
    }
    for (arm, ratios) in arms.iter().zip(&ratios) {
        let seconds = arm.seconds.median().unwrap_or(f64::NAN);
        let ratio = ratios.median().unwrap_or(f64::NAN);
        println!("| {rows:>4} | {:<24} | {:>10.1} | {:>8.1} | {ratio:>6.2} |", arm.name, seconds * 1e6, flops / seconds / 1e9);
    }
    Ok(())
}

fn head(title: &str) {
    println!(
        "{title}\n\n| rows | what                     | us         | GFLOP/s  | x      |\n|-----:|--------------------------|-----------:|---------:|-------:|"
    );
}

// === a whole layer ===

fn whole_layer(options: &Options, layers: usize) -> Result<()> {
    let spec = options.shape.model();
    let most = options.rows.iter().copied().max().unwrap_or(1);
    let config = candle_config(&options.shape)?;
    let mut weights = Vec::with_capacity(layers);
    for seed in 0..layers as u64 {
        weights.push(candle_weights(&synthetic::weights(&spec, DType::F32, &Device::Cpu, seed)?)?);
    }
    let mut models: Vec<(WeightType, Vec<Box<dyn LanguageModel>>)> = Vec::new();
    for &weights in &options.dtype {
        let model = |seed| -> Result<Box<dyn LanguageModel>> {
            let source = Source::Synthetic(options.shape.clone());
            let placement = Placement { device: DeviceKind::Cpu, weights, reduction: Reduction::Fastest, seed };
            Ok(Subject::load(&source, placement)?.model(cache_for(1, most))?)
        };
        models.push((weights, (0..layers as u64).map(model).collect::<Result<_>>()?));
    }
    check(&config, &weights, &mut models, options.shape.vocab)?;
    if options.check {
        return Ok(());
    }
    head("A layer with attention, router and experts, a prompt of so many tokens. x: against candle-transformers' Mixtral");
    let (_, active) = spec.parameters();
    for &rows in &options.rows {
        let ids: Vec<u32> = (0..rows).map(|i| ((13 + 7919 * i) % options.shape.vocab) as u32).collect();
        let mut arms = vec![Arm {
            name: "candle f32".into(),
            run: Box::new(|| {
                let mut total = 0.0;
                for weights in &weights {
                    let mut model = candle_model(&config, weights)?;
                    let x = Tensor::from_slice(&ids, (1, ids.len()), &Device::Cpu)?;
                    let start = Instant::now();
                    std::hint::black_box(model.forward(&x, 0)?);
                    total += start.elapsed().as_secs_f64();
                }
                Ok(total / weights.len() as f64)
            }),
            seconds: Sample::default(),
        }];
        for (dtype, models) in &mut models {
            let ids = &ids;
            arms.push(Arm {
                name: format!("hardmax {dtype:?}").to_lowercase(),
                run: Box::new(move || {
                    let mut total = 0.0;
                    for model in models.iter_mut() {
                        let batch = prompt(ids);
                        let start = Instant::now();
                        std::hint::black_box(model.forward(&batch)?);
                        total += start.elapsed().as_secs_f64();
                    }
                    Ok(total / models.len() as f64)
                }),
                seconds: Sample::default(),
            });
        }
        compare(rows, arms, options.turns.get(), 2.0 * active as f64 * rows as f64)?;
    }
    println!();
    Ok(())
}

fn prompt(ids: &[u32]) -> Batch {
    let mut batch = Batch::default();
    let blocks: Vec<u32> = (0..cache_for(1, ids.len()).num_blocks as u32).collect();
    batch.push(&blocks, ids, 0, RoutingChoice::Native, LogitRows::Last);
    batch
}

/// Both compute the same function: the logits after a short prompt agree.
fn check(
    config: &mixtral::Config,
    weights: &[HashMap<String, Tensor>],
    models: &mut [(WeightType, Vec<Box<dyn LanguageModel>>)],
    vocab: usize,
) -> Result<()> {
    let ids: Vec<u32> = (0..9).map(|i| ((5 + 31 * i) % vocab) as u32).collect();
    let x = Tensor::from_slice(&ids, (1, ids.len()), &Device::Cpu)?;
    let first = weights.first().ok_or("no layer fits")?;
    let expected = candle_model(config, first)?.forward(&x, 0)?.flatten_all()?;
    for (dtype, models) in models {
        let Some(model) = models.first_mut() else { continue };
        let found = model.forward(&prompt(&ids))?.logits.flatten_all()?;
        let worst = (found - &expected)?.abs()?.max(D::Minus1)?.to_scalar::<f32>()?;
        let spread = expected.abs()?.max(D::Minus1)?.to_scalar::<f32>()?;
        let tolerance = if *dtype == WeightType::F32 { 1e-4 } else { 0.1 };
        println!("hardmax {dtype:?} against candle f32: largest difference {worst:.1e} of logits up to {spread:.1}");
        if worst.is_nan() || worst > tolerance * spread {
            return Err(format!("the results differ by {worst}").into());
        }
    }
    println!();
    Ok(())
}

/// Under the names of a Mixtral checkpoint; the tensors are views.
fn candle_weights(weights: &ModelWeights) -> Result<HashMap<String, Tensor>> {
    let mut named = HashMap::from([
        ("model.embed_tokens.weight".to_owned(), weights.embedding.clone()),
        ("model.norm.weight".to_owned(), weights.final_norm.clone()),
        ("lm_head.weight".to_owned(), weights.head.clone().ok_or("the head is the embedding")?),
    ]);
    for (index, layer) in weights.layers.iter().enumerate() {
        let LayerWeights { attention_norm, attention, feed_forward_norm, feed_forward: FeedForwardWeights::Moe(moe) } = layer else {
            return Err("a layer without experts".into());
        };
        let mut name = |name: &str, tensor: Tensor| named.insert(format!("model.layers.{index}.{name}.weight"), tensor);
        name("input_layernorm", attention_norm.clone());
        name("post_attention_layernorm", feed_forward_norm.clone());
        name("self_attn.q_proj", attention.query.clone());
        name("self_attn.k_proj", attention.key.clone());
        name("self_attn.v_proj", attention.value.clone());
        name("self_attn.o_proj", attention.output.clone());
        name("block_sparse_moe.gate", moe.router.clone());
        let width = moe.down.dim(2)?;
        for expert in 0..moe.down.dim(0)? {
            let gate_up = moe.gate_up.get(expert)?;
            name(&format!("block_sparse_moe.experts.{expert}.w1"), gate_up.narrow(0, 0, width)?);
            name(&format!("block_sparse_moe.experts.{expert}.w3"), gate_up.narrow(0, width, width)?);
            name(&format!("block_sparse_moe.experts.{expert}.w2"), moe.down.get(expert)?);
        }
    }
    Ok(named)
}

fn candle_config(shape: &SyntheticSpec) -> Result<mixtral::Config> {
    if shape.head_dim * shape.heads != shape.hidden || shape.qk_norm + shape.shared_width > 0 {
        return Err("candle's Mixtral has heads as wide as the model together, no norm of heads, no shared expert".into());
    }
    let spec = shape.model();
    Ok(serde_json::from_value(serde_json::json!({
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.expert_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope.theta,
        "sliding_window": 1 << 30,
        "num_experts_per_tok": shape.top_k,
        "num_local_experts": shape.experts,
        "use_flash_attn": false,
    }))?)
}

/// A model without a past: candle's keeps its keys and values and cannot be told to forget them. The weights are shared.
fn candle_model(config: &mixtral::Config, weights: &HashMap<String, Tensor>) -> Result<mixtral::Model> {
    Ok(mixtral::Model::new(config, VarBuilder::from_tensors(weights.clone(), DType::F32, &Device::Cpu))?)
}

// === parts ===

fn expert_kernel(options: &Options, layers: usize) -> Result<()> {
    let spec = options.shape.model();
    head("Experts of a layer, rows spread evenly. x: against f32");
    let stacks = |dtype: DType| -> Result<Vec<Experts>> {
        let mut stacks = Vec::with_capacity(layers);
        for seed in 0..(layers * 4 / dtype.size_in_bytes()) as u64 {
            for layer in synthetic::weights(&spec, dtype, &Device::Cpu, seed)?.layers {
                if let FeedForwardWeights::Moe(moe) = layer.feed_forward {
                    stacks.push(Experts { gate_up: moe.gate_up, down: moe.down });
                }
            }
        }
        Ok(stacks)
    };
    let (single, narrow) = (stacks(DType::F32)?, stacks(DType::BF16)?);
    let arithmetic = Arithmetic::detect(Reduction::Fastest);
    let (d, k) = (options.shape.hidden, options.shape.top_k);
    for &rows in &options.rows {
        let x = activations(rows, d)?;
        let arm = |name: &str, stacks, arithmetic| Arm {
            name: name.into(),
            run: Box::new({
                let x = x.clone();
                move || Ok(micro::experts(arithmetic, stacks, &x, k)?.as_secs_f64())
            }),
            seconds: Sample::default(),
        };
        let arms = vec![
            arm("f32", &single[..], arithmetic),
            arm("bf16", &narrow[..], arithmetic),
            arm("bf16, batch-invariant", &narrow[..], Arithmetic::detect(Reduction::BatchInvariant)),
            arm("bf16, f32 arithmetic", &narrow[..], Arithmetic::exact()),
        ];
        let flops = 2.0 * 3.0 * (d * options.shape.expert_width * k * rows) as f64;
        compare(rows, arms, options.turns.get(), flops)?;
    }
    println!();
    Ok(())
}

fn dense_product(options: &Options) -> Result<()> {
    let (n, k) = (options.shape.expert_width, options.shape.hidden);
    head(&format!("Rows times a matrix of {n} × {k}, transposed. x: against candle's matmul"));
    let bytes = options.sweep_mib << 20;
    let (single, narrow) = (micro::Matrices::new(DType::F32, (n, k), bytes)?, micro::Matrices::new(DType::BF16, (n, k), bytes)?);
    let candle: Vec<Tensor> = (0..single.count()).map(|_| activations(n, k)).collect::<Result<_>>()?;
    let arithmetic = Arithmetic::detect(Reduction::Fastest);
    for &rows in &options.rows {
        let x_tensor = activations(rows, k)?;
        let x: Vec<f32> = x_tensor.flatten_all()?.to_vec1()?;
        let own = |matrices: &micro::Matrices| matrices.linear(arithmetic, &x).as_secs_f64();
        let arms = vec![
            Arm {
                name: "candle f32".into(),
                run: Box::new(|| {
                    let start = Instant::now();
                    for weight in &candle {
                        std::hint::black_box(x_tensor.matmul(&weight.t()?)?);
                    }
                    Ok(start.elapsed().as_secs_f64() / candle.len() as f64)
                }),
                seconds: Sample::default(),
            },
            Arm { name: "hardmax f32".into(), run: Box::new(|| Ok(own(&single))), seconds: Sample::default() },
            Arm { name: "hardmax bf16".into(), run: Box::new(|| Ok(own(&narrow))), seconds: Sample::default() },
        ];
        compare(rows, arms, options.turns.get(), 2.0 * (n * k * rows) as f64)?;
    }
    println!();
    Ok(())
}

fn activations(rows: usize, width: usize) -> Result<Tensor> {
    let values = (0..rows * width).map(|i| ((i * 7919) % 991) as f32 / 991.0 - 0.5).collect();
    Ok(Tensor::from_vec(values, (rows, width), &Device::Cpu)?)
}
