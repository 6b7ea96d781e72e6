//! A model on the GPU against the same on the CPU, and against itself: in batches and alone, in chunks and at once, recorded and not.

use std::{ops::Range, path::Path, sync::Arc};

use hardmax_kernels::check::{Outcome, Random};

use super::super::{
    Batch, CacheShape, Forward, LanguageModel, LogitRows, ModelSpec,
    draw::{Drawn, RowChoice, TokenDraw},
    load::{DeviceKind, ServingModel, ServingOptions, WeightType, load_to_serve},
};
use crate::{
    error::{Error, Result},
    moe::policy::RoutingChoice,
};

/// KL divergence of a next-token distribution on the GPU from that on the CPU that counts as the same model, in nats, for the median token: both have
/// bf16 weights, and round activations to bf16 in other places.
const ALLOWED_DIVERGENCE: f64 = 2e-3;

/// The same of two forms of one step on the GPU, which differ in the order of sums.
const ALLOWED_REORDERING: f64 = 5e-4;

/// Where a router is near a tie, rounding chooses another expert, and the token is another one: of divergences above this, in nats ...
const OUTLIER: f64 = 0.1;

/// ... there may be so many, as a share of all tokens.
const ALLOWED_OUTLIERS: f64 = 0.05;

const BLOCK_TOKENS: usize = 16;

/// Sequences of a batch.
const SEQUENCES: usize = 6;

/// Compares the model of a folder on both.
pub fn compare(folder: &Path, quick: bool) -> Result<Vec<Outcome>> {
    let load = |device| {
        let options = ServingOptions { device, weights: WeightType::Bf16, ..ServingOptions::default() };
        Ok::<_, Error>(load_to_serve(folder, options, true)?.1)
    };
    compare_models(&load(DeviceKind::Cpu)?, &load(DeviceKind::Cuda)?, if quick { 40 } else { 200 })
}

/// [`compare`] of models that are loaded, on prompts of up to so many tokens.
pub(super) fn compare_models(cpu: &ServingModel, gpu: &ServingModel, longest: usize) -> Result<Vec<Outcome>> {
    let spec = Arc::clone(cpu.spec());
    let longest = longest.min(spec.max_context - STEPS);
    let blocks = (longest + STEPS).div_ceil(BLOCK_TOKENS);
    let shape = CacheShape { block_tokens: BLOCK_TOKENS, num_blocks: blocks * SEQUENCES };
    let (mut cpu, mut gpu) = (cpu.start(shape)?, gpu.start(shape)?);
    let prompts = prompts(&spec, longest);
    let mut outcomes = Vec::new();
    for routing in routings(&spec) {
        let shape = format!("{routing}, {} prompts of up to {longest} tokens", prompts.len());
        let of_cpu = rows(&whole(&prompts, routing), &mut *cpu)?;
        let of_gpu = rows(&whole(&prompts, routing), &mut *gpu)?;
        outcomes.push(outcome("model: CPU and GPU", &shape, &of_cpu, &of_gpu, spec.vocab_size, ALLOWED_DIVERGENCE));
        let mut alone = Vec::new();
        for index in 0..prompts.len() {
            alone.extend(rows(&whole_of(&prompts, routing, index..index + 1), &mut *gpu)?);
        }
        outcomes.push(outcome("model: in a batch and alone", &shape, &alone, &of_gpu, spec.vocab_size, ALLOWED_REORDERING));
        let chunked = in_chunks(&prompts, routing, |_| 7, &mut *gpu)?;
        outcomes.push(outcome("model: at once and in chunks", &shape, &of_gpu, &chunked, spec.vocab_size, ALLOWED_REORDERING));
        let mixed = in_chunks(&prompts, routing, |index| if index < SEQUENCES / 2 { 1 } else { 23 }, &mut *gpu)?;
        outcomes.push(outcome("model: chunks beside single tokens", &shape, &of_gpu, &mixed, spec.vocab_size, ALLOWED_REORDERING));
    }
    outcomes.push(recorded_steps(&prompts, &mut *gpu, spec.vocab_size)?);
    Ok(outcomes)
}

/// Decode steps of [`recorded_steps`].
const STEPS: usize = 6;

fn routings(spec: &ModelSpec) -> Vec<RoutingChoice> {
    let top = |k| RoutingChoice::TopK { k, weight_form: None };
    let experts = spec.moe_layers().map(|(_, moe)| moe.num_experts).min().unwrap_or(0);
    let hard = [1, 2].into_iter().filter(|&k| k <= experts).map(top);
    let mass = RoutingChoice::Mass { threshold: 0.7, max_k: None, weight_form: None };
    [RoutingChoice::Native, RoutingChoice::Soft { temperature: None }, mass].into_iter().chain(hard).collect()
}

/// Token ids that a model of language has never seen in this order: all the harder for it.
fn prompts(spec: &ModelSpec, longest: usize) -> Vec<Vec<u32>> {
    let mut random = Random::new(17);
    let mut prompt = |len: usize| (0..len.max(1)).map(|_| random.below(spec.vocab_size) as u32).collect();
    (0..SEQUENCES).map(|index| prompt(longest * (index + 1) / SEQUENCES)).collect()
}

/// Blocks of a sequence: every [`SEQUENCES`]th, so that those of a sequence are not in a row.
fn table(sequence: usize, tokens: usize) -> Vec<u32> {
    (0..tokens.div_ceil(BLOCK_TOKENS)).map(|block| (block * SEQUENCES + sequence) as u32).collect()
}

/// A batch of which nobody wants the routes.
fn quiet() -> Batch {
    Batch { routes: false, ..Batch::default() }
}

fn whole(prompts: &[Vec<u32>], routing: RoutingChoice) -> Batch {
    whole_of(prompts, routing, 0..prompts.len())
}

fn whole_of(prompts: &[Vec<u32>], routing: RoutingChoice, which: Range<usize>) -> Batch {
    let mut batch = quiet();
    for index in which {
        let prompt = &prompts[index];
        batch.push(&table(index, prompt.len()), prompt, 0, routing, LogitRows::All);
    }
    batch
}

fn rows(batch: &Batch, model: &mut dyn LanguageModel) -> Result<Vec<f32>> {
    model.forward(batch)?.read_logits(<[f32]>::to_vec)
}

/// All prompts together, `chunk` tokens of each at a time; rows in the order of [`whole`].
fn in_chunks(
    prompts: &[Vec<u32>],
    routing: RoutingChoice,
    chunk: impl Fn(usize) -> usize,
    model: &mut dyn LanguageModel,
) -> Result<Vec<f32>> {
    let vocab = model.spec().vocab_size;
    let mut rows_of = vec![Vec::new(); prompts.len()];
    let mut past = vec![0; prompts.len()];
    while past.iter().zip(prompts).any(|(&past, prompt)| past < prompt.len()) {
        let mut batch = quiet();
        let mut new = Vec::new();
        for (index, prompt) in prompts.iter().enumerate().filter(|&(index, prompt)| prompt.len() > past[index]) {
            let end = (past[index] + chunk(index)).min(prompt.len());
            batch.push(&table(index, end), &prompt[past[index]..end], past[index], routing, LogitRows::All);
            new.push((index, end - past[index]));
        }
        new.iter().for_each(|&(index, count)| past[index] += count);
        let logits = rows(&batch, model)?;
        let mut rest = &logits[..];
        for (index, count) in new {
            let (mine, others) = rest.split_at(count * vocab);
            rows_of[index].extend_from_slice(mine);
            rest = others;
        }
    }
    Ok(rows_of.concat())
}

/// Decode steps whose tokens are drawn on the device, which are recorded at the second and launched from the third on, against the likeliest tokens of
/// steps that hand out their rows.
fn recorded_steps(prompts: &[Vec<u32>], model: &mut dyn LanguageModel, vocab: usize) -> Result<Outcome> {
    let mut likeliest = Vec::new();
    let mut divergent = 0usize;
    for draws in [false, true] {
        let mut tokens: Vec<Vec<u32>> = prompts.to_vec();
        let mut past = vec![0; prompts.len()];
        for step in 0..STEPS {
            let mut batch = quiet();
            for (index, tokens) in tokens.iter().enumerate() {
                let table = table(index, tokens.len());
                batch.push(&table, &tokens[past[index]..], past[index], RoutingChoice::Native, LogitRows::Last);
                past[index] = tokens.len();
            }
            if draws {
                batch.choices = vec![RowChoice::Token(TokenDraw::LIKELIEST); prompts.len()];
            }
            let forward = model.forward(&batch)?;
            let next = if draws { drawn(&forward) } else { forward.read_logits(|rows| rows.chunks_exact(vocab).map(argmax).collect())? };
            if draws {
                divergent += next.iter().zip(&likeliest[step]).filter(|(a, b)| a != b).count();
            }
            // The same tokens go on in both, so that one that differs is one that differs.
            let go_on: &Vec<u32> = if draws { &likeliest[step] } else { &next };
            tokens.iter_mut().zip(go_on).for_each(|(tokens, &next)| tokens.push(next));
            if !draws {
                likeliest.push(next);
            }
        }
    }
    let shape = format!("{} sequences, {STEPS} steps", prompts.len());
    Ok(Outcome { kernel: "model: tokens drawn in recorded steps", shape, deviation: divergent as f64 * 2.0 })
}

fn drawn(forward: &Forward) -> Vec<u32> {
    let token = |drawn: &Drawn| match drawn {
        Drawn::Token(token) => *token,
        Drawn::Row | Drawn::NonFinite => u32::MAX,
    };
    forward.drawn.iter().map(token).collect()
}

fn argmax(row: &[f32]) -> u32 {
    (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32
}

fn outcome(kernel: &'static str, shape: &str, expected: &[f32], found: &[f32], vocab: usize, allowed: f64) -> Outcome {
    let same = expected.len() == found.len();
    if !same || expected.is_empty() {
        return Outcome { kernel, shape: shape.to_owned(), deviation: f64::INFINITY };
    }
    let divergences = divergences(expected, found, vocab);
    let (median, tokens) = (divergences[divergences.len() / 2], divergences.len() as f64);
    let outliers = divergences.iter().filter(|divergence| divergence.is_nan() || **divergence > OUTLIER).count() as f64 / tokens;
    let deviation = if median.is_nan() { f64::INFINITY } else { f64::max(median / allowed, outliers / ALLOWED_OUTLIERS) };
    Outcome { kernel, shape: format!("{shape}: median {median:.1e} nats, {:.1} % above {OUTLIER}", 100.0 * outliers), deviation }
}

/// `KL(softmax(expected) ‖ softmax(found))` of each row, in nats, ascending.
fn divergences(expected: &[f32], found: &[f32], vocab: usize) -> Vec<f64> {
    let log_softmax = |row: &[f32]| {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&z| f64::from(z - max).exp()).sum();
        row.iter().map(|&z| f64::from(z - max) - sum.ln()).collect::<Vec<f64>>()
    };
    let divergence = |(p, q): (&[f32], &[f32])| {
        let (p, q) = (log_softmax(p), log_softmax(q));
        p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
    };
    let mut divergences: Vec<f64> = expected.chunks_exact(vocab).zip(found.chunks_exact(vocab)).map(divergence).collect();
    divergences.sort_by(f64::total_cmp);
    divergences
}
