//! Model-level runs: ragged batches straight into [`LanguageModel`], without queue, sampler or socket.
//!
//! Tokens are drawn at random, those of decoding too: a greedy continuation of random weights soon repeats itself, and
//! with it the experts that it reaches. Prompts go in as the engine would send them, in steps of bounded size.

use std::{
    fmt,
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde::Serialize;

use super::{
    cost::Cost,
    limits::{Limit, Limits, Readings},
    stats::{Latency, Sample},
    subject::{BLOCK_TOKENS, Subject, cache_for},
};
#[cfg(feature = "gpu")]
use crate::model::gpu::{Class, GpuDecoder, Profile};
use crate::{
    error::{Error, Result},
    model::{Batch, LanguageModel, LogitRows, ModelSpec, RowChoice, TokenDraw, load::DeviceKind},
    moe::policy::RoutingChoice,
};

/// Tokens of the run that warms up before prefill is timed.
const WARM_UP_TOKENS: usize = 32;

/// Prompts that a mixed run reads at least.
const MIXED_PROMPTS: usize = 2;

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// Reads prompts.
    Prefill,
    /// Continues sequences, a token each per step.
    Decode,
    /// Continues sequences while prompts come in, in the same steps.
    Mixed,
}

/// What to run.
#[derive(Clone, Debug, PartialEq)]
pub struct StepsConfig {
    /// Kinds of load.
    pub works: Vec<Work>,
    /// Routings of all tokens.
    pub routings: Vec<RoutingChoice>,
    /// Sequences at once.
    pub batches: Vec<usize>,
    /// Lengths of prompts, for prefill and mixed load.
    pub prompt_tokens: Vec<usize>,
    /// Tokens before the first timed one, for decode and mixed load.
    pub contexts: Vec<usize>,
    /// Steps of a decode run.
    pub generate: usize,
    /// Most tokens of one step.
    pub step_tokens: usize,
    /// Runs of each setting.
    pub repeats: usize,
    /// Of the tokens.
    pub seed: u64,
}

/// One row of the result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Setting {
    /// Kind of load.
    pub work: Work,
    /// Of all tokens.
    #[serde(serialize_with = "as_text")]
    pub routing: RoutingChoice,
    /// Sequences that decode, or prompts of a prefill.
    pub batch: usize,
    /// Length of each prompt; 0 for decode.
    pub prompt_tokens: usize,
    /// Tokens before the first timed one; 0 for prefill.
    pub context: usize,
}

/// What one setting gave.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    /// What was run.
    #[serde(flatten)]
    pub setting: Setting,
    /// Median over runs: all tokens over all time.
    pub tokens_per_second: f64,
    /// Median over runs: tokens of prompts over all time.
    pub prefill_tokens_per_second: f64,
    /// Median over runs: generated tokens over all time.
    pub decode_tokens_per_second: f64,
    /// Of each run, as `tokens_per_second`.
    pub runs: Sample,
    /// Duration of a step, over all runs.
    pub step_seconds: Latency,
    /// Median step of the median run, in seconds: what other layers are compared with.
    pub median_step_seconds: f64,
    /// Share of the time that went into attention over the cache, and into experts; absent of a GPU, which has `classes` instead.
    pub attention_share: Option<f64>,
    /// As `attention_share`.
    pub experts_share: Option<f64>,
    /// Where the time of a step goes on a GPU, in a run of its own: with clocks, each step is launched kernel by kernel.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<ClassTime>,
    /// Seconds in experts, per token; absent as `attention_share`.
    pub experts_seconds_per_token: Option<f64>,
    /// Bytes that must be read and written, per token.
    pub bytes_per_token: f64,
    /// Operations per token.
    pub flops_per_token: f64,
    /// As `bytes_per_token`, of a step.
    pub bytes_per_step: f64,
    /// Operations of a step.
    pub flops_per_step: f64,
    /// Distinct experts per layer and step.
    pub experts_per_layer: f64,
    /// Bytes of weights per second.
    pub weight_bandwidth: f64,
    /// The limits, read before, between and after the runs; absent where they were not asked for.
    pub limit: Option<Limit>,
    /// The readings of which `limit` has the medians.
    pub readings: Readings,
    /// All bytes over time, as a share of the bandwidth.
    pub bandwidth_share: Option<f64>,
    /// Operations over time, as a share of the limit.
    pub flops_share: Option<f64>,
    /// The larger of the two: the least time that the limits allow, over the time that it took.
    pub roofline_share: Option<f64>,
}

/// What kernels of one kind take.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClassTime {
    /// The kind.
    pub class: &'static str,
    /// In one step.
    pub milliseconds: f64,
    /// Of all kinds together.
    pub share: f64,
}

/// Sums over one run.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// Of all steps together.
    pub elapsed: Duration,
    /// Of each step, in seconds.
    pub steps: Sample,
    /// Of all steps together.
    pub cost: Cost,
    /// Tokens of prompts.
    pub prefilled: usize,
    /// Tokens that were decoded.
    pub decoded: usize,
    /// In attention over the cache. On a GPU, launching it.
    pub attention: Duration,
    /// In experts. As `attention`.
    pub experts: Duration,
    /// Largest over mean load of an expert, over the layers of the last step.
    pub imbalance: f64,
}

/// A model with sequences in its cache.
pub struct Runner<'a> {
    subject: &'a Subject,
    model: Model,
    rng: StdRng,
    step_tokens: usize,
}

enum Model {
    Any(Box<dyn LanguageModel>),
    /// With clocks.
    #[cfg(feature = "gpu")]
    Profiled(Box<GpuDecoder>),
}

impl Model {
    fn get(&mut self) -> &mut dyn LanguageModel {
        match self {
            Self::Any(model) => &mut **model,
            #[cfg(feature = "gpu")]
            Self::Profiled(model) => &mut **model,
        }
    }
}

/// Sequences of one length in the cache of a [`Runner`].
#[derive(Clone, Debug)]
pub struct Sequences {
    lanes: Vec<Lane>,
    context: usize,
}

/// A sequence: its blocks, and how many of its tokens are in them.
#[derive(Clone, Debug)]
struct Lane {
    blocks: Vec<u32>,
    past: usize,
}

fn as_text<S: serde::Serializer>(routing: &RoutingChoice, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(routing)
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Mixed => "mixed",
        })
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} × ", self.work, self.batch)?;
        match self.work {
            Work::Prefill => write!(f, "{} tokens", self.prompt_tokens)?,
            Work::Decode => write!(f, "context {}", self.context)?,
            Work::Mixed => write!(f, "context {} + prompts of {}", self.context, self.prompt_tokens)?,
        }
        write!(f, ", {}", self.routing)
    }
}

impl StepsConfig {
    /// Every setting, in the order in which they run.
    pub fn settings(&self) -> Vec<Setting> {
        let mut settings = Vec::new();
        for &work in &self.works {
            let prompts = if work == Work::Decode { &[0][..] } else { &self.prompt_tokens };
            let contexts = if work == Work::Prefill { &[0][..] } else { &self.contexts };
            for &routing in &self.routings {
                for &prompt_tokens in prompts {
                    for &context in contexts {
                        settings.extend(self.batches.iter().map(|&batch| Setting { work, routing, batch, prompt_tokens, context }));
                    }
                }
            }
        }
        settings
    }

    /// Fails where `spec` cannot run a setting, with the flag that asks for it.
    pub fn check(&self, spec: &ModelSpec) -> Result<()> {
        for (flag, values) in [("--batch", &self.batches), ("--prompt-tokens", &self.prompt_tokens)] {
            if values.contains(&0) {
                return Err(Error::invalid(flag, "0 is nothing to measure"));
            }
        }
        for (flag, value) in [("--generate", self.generate), ("--step-tokens", self.step_tokens), ("--repeats", self.repeats)] {
            if value == 0 {
                return Err(Error::invalid(flag, "0 is nothing to measure"));
            }
        }
        self.routings.iter().try_for_each(|&routing| {
            spec.check_routing(&routing.into()).map_err(|error| Error::invalid("--routing", format!("'{routing}': {error}")))
        })?;
        for setting in self.settings() {
            let (flag, length) = match setting.work {
                Work::Prefill => ("--prompt-tokens", setting.prompt_tokens),
                Work::Decode => ("--context", setting.context + self.generate),
                Work::Mixed => ("--context", (setting.context + self.mixed_steps(&setting)).max(setting.prompt_tokens)),
            };
            if length > spec.max_context {
                let message = format!("{setting}: {length} tokens, the model's context has {}", spec.max_context);
                return Err(Error::out_of_range(flag, message));
            }
            if setting.work == Work::Mixed && setting.batch >= self.step_tokens {
                let message = format!("{}: {} sequences that decode leave no room for a prompt", self.step_tokens, setting.batch);
                return Err(Error::invalid("--step-tokens", message));
            }
        }
        Ok(())
    }

    /// Tokens of prompts in one step of a mixed run.
    fn mixed_room(&self, setting: &Setting) -> usize {
        self.step_tokens.saturating_sub(setting.batch).max(1)
    }

    fn mixed_steps(&self, setting: &Setting) -> usize {
        (MIXED_PROMPTS * setting.prompt_tokens).div_ceil(self.mixed_room(setting)).max(2)
    }

    /// Prompts that may be under way in one step of a mixed run.
    fn mixed_lanes(&self, setting: &Setting) -> usize {
        self.mixed_room(setting).div_ceil(setting.prompt_tokens) + 1
    }

    /// Blocks that a setting needs.
    fn blocks(&self, setting: &Setting) -> usize {
        let blocks = |sequences, tokens| cache_for(sequences, tokens).num_blocks;
        match setting.work {
            Work::Prefill => blocks(setting.batch, setting.prompt_tokens),
            Work::Decode => blocks(setting.batch, setting.context + self.generate),
            Work::Mixed => {
                let decoding = blocks(setting.batch, setting.context + self.mixed_steps(setting));
                decoding + blocks(self.mixed_lanes(setting), setting.prompt_tokens)
            }
        }
    }
}

/// Runs every setting. `limits` are read around each run.
pub fn measure(subject: &Subject, config: &StepsConfig, mut limits: Option<&mut Limits>) -> Result<Vec<Measurement>> {
    config.check(&subject.spec)?;
    let settings = config.settings();
    let blocks = settings.iter().map(|setting| config.blocks(setting)).max().unwrap_or(1);
    let mut runner = Runner::new(subject, blocks, config.step_tokens, config.seed)?;
    let mut measurements = Vec::with_capacity(settings.len());
    for setting in settings {
        let measurement = runner.measure(config, setting, limits.as_deref_mut())?;
        tracing::info!("{}: {:.1} tokens/s", measurement.setting, measurement.tokens_per_second);
        measurements.push(measurement);
    }
    #[cfg(feature = "gpu")]
    {
        // Its cache makes room for that of the other.
        drop(runner);
        profile(subject, config, blocks, &mut measurements)?;
    }
    Ok(measurements)
}

/// Adds what kernels take, by their kinds, where the model is one of kernels.
#[cfg(feature = "gpu")]
fn profile(subject: &Subject, config: &StepsConfig, blocks: usize, measurements: &mut [Measurement]) -> Result<()> {
    let cache = crate::model::CacheShape { block_tokens: BLOCK_TOKENS, num_blocks: blocks };
    let Some(mut model) = subject.gpu_model(cache)? else { return Ok(()) };
    model.measure()?;
    let rng = StdRng::seed_from_u64(config.seed);
    let mut runner = Runner { subject, model: Model::Profiled(Box::new(model)), rng, step_tokens: config.step_tokens };
    for measurement in measurements {
        measurement.classes = runner.classes(config, &measurement.setting)?;
    }
    Ok(())
}

impl fmt::Debug for Runner<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runner").field("subject", &self.subject.name).finish_non_exhaustive()
    }
}

impl<'a> Runner<'a> {
    /// A model with `blocks` blocks of cache; steps of at most `step_tokens` tokens.
    pub fn new(subject: &'a Subject, blocks: usize, step_tokens: usize, seed: u64) -> Result<Self> {
        let cache = crate::model::CacheShape { block_tokens: BLOCK_TOKENS, num_blocks: blocks };
        Ok(Self { subject, model: Model::Any(subject.model(cache)?), rng: StdRng::seed_from_u64(seed), step_tokens })
    }

    /// All runs of one setting.
    pub fn measure(&mut self, config: &StepsConfig, setting: Setting, mut limits: Option<&mut Limits>) -> Result<Measurement> {
        let mut lanes = self.prepare(config, &setting)?;
        let (mut runs, mut readings) = (Vec::with_capacity(config.repeats), Readings::default());
        for _ in 0..config.repeats {
            if let Some(limits) = limits.as_deref_mut() {
                readings.extend(&limits.read()?);
            }
            runs.push(self.run(&mut lanes, config, &setting)?);
        }
        if let Some(limits) = limits {
            readings.extend(&limits.read()?);
        }
        summary(self.subject.device, setting, &runs, readings)
    }

    fn run(&mut self, lanes: &mut [Lane], config: &StepsConfig, setting: &Setting) -> Result<Run> {
        match setting.work {
            Work::Prefill => self.prefill(lanes, setting.prompt_tokens, setting.routing),
            Work::Decode => self.decode(lanes, setting.context, config.generate, setting.routing),
            Work::Mixed => self.mixed(lanes, config, setting),
        }
    }

    /// What kernels take in one run of a setting.
    #[cfg(feature = "gpu")]
    fn classes(&mut self, config: &StepsConfig, setting: &Setting) -> Result<Vec<ClassTime>> {
        let mut lanes = self.prepare(config, setting)?;
        self.take_profile();
        self.run(&mut lanes, config, setting)?;
        let profile = self.take_profile();
        let (all, steps) = (profile.milliseconds.iter().map(|entry| entry.1).sum::<f64>(), profile.steps.max(1) as f64);
        let time = |&(class, milliseconds): &(Class, f64)| ClassTime {
            class: class.name(),
            milliseconds: milliseconds / steps,
            share: milliseconds / all,
        };
        Ok(profile.milliseconds.iter().map(time).collect())
    }

    #[cfg(feature = "gpu")]
    fn take_profile(&mut self) -> Profile {
        match &mut self.model {
            Model::Any(_) => Profile::default(),
            Model::Profiled(model) => model.take_profile(),
        }
    }

    /// `count` sequences of `context` tokens each, with room for `more`. Their blocks are the first of the cache: sequences made earlier are
    /// overwritten.
    pub fn sequences(&mut self, count: usize, context: usize, more: usize, routing: RoutingChoice) -> Result<Sequences> {
        let mut lanes = lanes(0, count, context + more);
        self.prefill(&mut lanes, context, routing)?;
        Ok(Sequences { lanes, context })
    }

    /// Reads the tokens of the contexts again, others at random.
    pub fn prefill_run(&mut self, sequences: &mut Sequences, routing: RoutingChoice) -> Result<Run> {
        self.prefill(&mut sequences.lanes, sequences.context, routing)
    }

    /// Decodes `steps` tokens after the contexts.
    pub fn decode_run(&mut self, sequences: &mut Sequences, steps: usize, routing: RoutingChoice) -> Result<Run> {
        self.decode(&mut sequences.lanes, sequences.context, steps, routing)
    }

    /// Reads `prompts`, all of one length, and decodes after each of them the tokens of `continuations` step by step: what a server
    /// computed for the same requests. The run is that of the decoding.
    pub fn replay(&mut self, prompts: &[&[u32]], continuations: &[&[u32]], routing: RoutingChoice) -> Result<Run> {
        let shortest = |texts: &[&[u32]]| texts.iter().map(|text| text.len()).min().unwrap_or(0);
        // The last token is never read.
        let (context, steps) = (shortest(prompts), shortest(continuations).saturating_sub(1));
        let mut lanes = lanes(0, prompts.len().min(continuations.len()), context + steps);
        let (mut run, mut batch) = (Run::default(), Batch::default());
        for (lane, prompt) in lanes.iter_mut().zip(prompts) {
            for chunk in prompt[..context].chunks(self.step_tokens) {
                batch.clear();
                batch.push(&lane.blocks, chunk, lane.past, routing, LogitRows::None);
                lane.past += chunk.len();
                let forward = self.model.get().forward(&batch)?;
                self.model.get().recycle(forward);
            }
        }
        for step in 0..steps {
            batch.clear();
            for (lane, continuation) in lanes.iter_mut().zip(continuations) {
                batch.push(&lane.blocks, &continuation[step..=step], lane.past, routing, LogitRows::Last);
                lane.past += 1;
            }
            run.decoded += lanes.len();
            self.step(&mut batch, &mut run)?;
        }
        Ok(run)
    }

    /// Sequences with their contexts in the cache, after a warm-up.
    fn prepare(&mut self, config: &StepsConfig, setting: &Setting) -> Result<Vec<Lane>> {
        let (length, filled) = match setting.work {
            Work::Prefill => (setting.prompt_tokens, WARM_UP_TOKENS.min(setting.prompt_tokens)),
            Work::Decode => (setting.context + config.generate, setting.context),
            Work::Mixed => (setting.context + config.mixed_steps(setting), setting.context),
        };
        let mut lanes = lanes(0, setting.batch, length);
        let warmed = if setting.work == Work::Prefill { 1 } else { lanes.len() };
        self.prefill(&mut lanes[..warmed], filled, setting.routing)?;
        if setting.work == Work::Decode {
            self.decode(&mut lanes, setting.context, 1, setting.routing)?;
        }
        Ok(lanes)
    }

    fn prefill(&mut self, lanes: &mut [Lane], tokens: usize, routing: RoutingChoice) -> Result<Run> {
        lanes.iter_mut().for_each(|lane| lane.past = 0);
        let mut run = Run::default();
        while lanes.iter().any(|lane| lane.past < tokens) {
            let (mut batch, mut room) = (Batch::default(), self.step_tokens);
            for lane in lanes.iter_mut() {
                let new = (tokens - lane.past).min(room);
                if new > 0 {
                    self.push(&mut batch, lane, new, routing, tokens);
                    room -= new;
                }
            }
            run.prefilled += batch.tokens.len();
            self.step(&mut batch, &mut run)?;
        }
        Ok(run)
    }

    fn decode(&mut self, lanes: &mut [Lane], context: usize, steps: usize, routing: RoutingChoice) -> Result<Run> {
        lanes.iter_mut().for_each(|lane| lane.past = context);
        let mut run = Run::default();
        for _ in 0..steps {
            let mut batch = Batch::default();
            for lane in lanes.iter_mut() {
                let end = lane.past + 1;
                self.push(&mut batch, lane, 1, routing, end);
            }
            run.decoded += lanes.len();
            self.step(&mut batch, &mut run)?;
        }
        Ok(run)
    }

    /// Every step decodes a token of each lane, and fills the rest of the step with prompts, one after the other.
    fn mixed(&mut self, decoding: &mut [Lane], config: &StepsConfig, setting: &Setting) -> Result<Run> {
        decoding.iter_mut().for_each(|lane| lane.past = setting.context);
        let first_block = decoding.iter().map(|lane| lane.blocks.len()).sum();
        let mut prompts = lanes(first_block, config.mixed_lanes(setting), setting.prompt_tokens);
        let (mut run, mut current) = (Run::default(), 0);
        for _ in 0..config.mixed_steps(setting) {
            let mut batch = Batch::default();
            for lane in decoding.iter_mut() {
                let end = lane.past + 1;
                self.push(&mut batch, lane, 1, setting.routing, end);
            }
            run.decoded += decoding.len();
            let mut room = config.mixed_room(setting);
            run.prefilled += room;
            while room > 0 {
                let count = prompts.len();
                let Some(lane) = prompts.get_mut(current) else { break };
                let new = (setting.prompt_tokens - lane.past).min(room);
                self.push(&mut batch, lane, new, setting.routing, setting.prompt_tokens);
                room -= new;
                if lane.past == setting.prompt_tokens {
                    lane.past = 0;
                    current = (current + 1) % count;
                }
            }
            self.step(&mut batch, &mut run)?;
        }
        Ok(run)
    }

    /// Adds `new` random tokens of a lane; the one that makes it `end` tokens long gets logits.
    fn push(&mut self, batch: &mut Batch, lane: &mut Lane, new: usize, routing: RoutingChoice, end: usize) {
        let vocab = self.subject.spec.vocab_size as u32;
        let tokens: Vec<u32> = (0..new).map(|_| self.rng.random_range(0..vocab)).collect();
        let logits = if lane.past + new == end { LogitRows::Last } else { LogitRows::None };
        batch.push(&lane.blocks, &tokens, lane.past, routing, logits);
        lane.past += new;
    }

    /// One forward, with its logits on the host, or where the model draws, with the likeliest token of each row.
    fn step(&mut self, batch: &mut Batch, run: &mut Run) -> Result<()> {
        let model = self.model.get();
        batch.routes = false;
        if model.draws() {
            batch.choices = vec![RowChoice::Token(TokenDraw::LIKELIEST); batch.num_logit_rows()];
        }
        let start = Instant::now();
        let forward = model.forward(batch)?;
        forward.read_logits(|logits| std::hint::black_box(logits.len()))?;
        let elapsed = start.elapsed();
        run.elapsed += elapsed;
        run.steps.push(elapsed.as_secs_f64());
        run.attention += forward.time.attention;
        run.experts += forward.time.experts;
        run.cost += Cost::of(&self.subject.spec, self.subject.sizes, batch, forward.layers.iter().map(|layer| &layer.stats));
        run.imbalance = forward.layers.iter().map(|layer| 1.0 / layer.stats.balancedness()).fold(0.0, f64::max);
        model.recycle(forward);
        Ok(())
    }
}

/// `count` sequences with room for `tokens` tokens each, in blocks from `first` on.
fn lanes(first: usize, count: usize, tokens: usize) -> Vec<Lane> {
    let each = cache_for(1, tokens).num_blocks;
    let blocks = |lane: usize| (first + lane * each..first + (lane + 1) * each).map(|block| block as u32).collect();
    (0..count).map(|lane| Lane { blocks: blocks(lane), past: 0 }).collect()
}

/// Medians over `runs` on `device`.
fn summary(device: DeviceKind, setting: Setting, runs: &[Run], readings: Readings) -> Result<Measurement> {
    let nothing = || Error::Internal(format!("{setting}: nothing was run"));
    let rate = |count: &dyn Fn(&Run) -> usize| runs.iter().map(|run| count(run) as f64 / run.elapsed.as_secs_f64()).collect::<Sample>();
    let all = rate(&|run| run.prefilled + run.decoded);
    let (mut cost, mut steps, mut medians) = (Cost::default(), Sample::default(), Sample::default());
    let (mut elapsed, mut attention, mut experts) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    for run in runs {
        cost += run.cost;
        steps.extend(&run.steps);
        medians.push(run.steps.median().ok_or_else(nothing)?);
        elapsed += run.elapsed;
        attention += run.attention;
        experts += run.experts;
    }
    let tokens_per_second = all.median().ok_or_else(nothing)?;
    let limit = (!readings.bandwidth.is_empty()).then(|| readings.limit());
    let share = |per_token: f64, limit: f64| per_token * tokens_per_second / limit;
    let bandwidth_share = limit.map(|limit| share(cost.bytes_per_token(), limit.bandwidth));
    let flops_share = limit.map(|limit| share(cost.flops_per_token(), limit.flops));
    let all_steps = steps.values().len().max(1) as f64;
    // Clocks of the host tell how long a GPU was given work for.
    let on_host = device == DeviceKind::Cpu;
    let part = |time: Duration| on_host.then(|| time.as_secs_f64() / elapsed.as_secs_f64());
    Ok(Measurement {
        tokens_per_second,
        prefill_tokens_per_second: rate(&|run| run.prefilled).median().ok_or_else(nothing)?,
        decode_tokens_per_second: rate(&|run| run.decoded).median().ok_or_else(nothing)?,
        step_seconds: steps.latency(),
        median_step_seconds: medians.median().ok_or_else(nothing)?,
        attention_share: part(attention),
        experts_share: part(experts),
        experts_seconds_per_token: on_host.then(|| experts.as_secs_f64() / cost.tokens.max(1) as f64),
        classes: Vec::new(),
        bytes_per_token: cost.bytes_per_token(),
        flops_per_token: cost.flops_per_token(),
        bytes_per_step: cost.bytes() / all_steps,
        flops_per_step: cost.flops / all_steps,
        experts_per_layer: cost.experts_per_layer(),
        weight_bandwidth: cost.weight_bytes / cost.tokens.max(1) as f64 * tokens_per_second,
        bandwidth_share,
        flops_share,
        roofline_share: bandwidth_share.zip(flops_share).map(|(bandwidth, flops)| bandwidth.max(flops)),
        runs: all,
        limit,
        readings,
        setting,
    })
}

#[cfg(test)]
mod tests {
    use super::{
        super::subject::{Placement, Source},
        *,
    };
    use crate::model::load::{DeviceKind, WeightType};

    fn config() -> StepsConfig {
        StepsConfig {
            works: vec![Work::Prefill, Work::Decode, Work::Mixed],
            routings: vec![RoutingChoice::Native, RoutingChoice::Soft { temperature: None }],
            batches: vec![1, 3],
            prompt_tokens: vec![20],
            contexts: vec![0, 5],
            generate: 4,
            step_tokens: 16,
            repeats: 2,
            seed: 1,
        }
    }

    fn subject() -> Subject {
        let source = Source::Synthetic("tiny,context=64".parse().unwrap());
        Subject::load(
            &source,
            Placement { device: DeviceKind::Cpu, weights: WeightType::F32, reduction: crate::ops::cpu::Reduction::Fastest, seed: 3 },
        )
        .unwrap()
    }

    #[test]
    fn every_combination_runs_once() {
        let settings = config().settings();
        assert_eq!(settings.len(), 2 * 2 + 2 * 2 * 2 + 2 * 2 * 2);
        assert!(settings.iter().all(|setting| (setting.work == Work::Decode) == (setting.prompt_tokens == 0)));
    }

    #[test]
    fn all_works_measure_what_they_say() {
        let subject = subject();
        let measured = measure(&subject, &config(), None).unwrap();
        assert_eq!(measured.len(), config().settings().len());
        for m in &measured {
            let (prefill, decode) = (m.prefill_tokens_per_second, m.decode_tokens_per_second);
            assert_eq!(prefill > 0.0, m.setting.work != Work::Decode, "{}", m.setting);
            assert_eq!(decode > 0.0, m.setting.work != Work::Prefill, "{}", m.setting);
            assert_eq!((m.runs.values().len(), m.limit), (2, None));
            let experts = m.experts_per_layer;
            match m.setting.routing {
                RoutingChoice::Native => assert!((2.0..=4.0).contains(&experts), "{}: {experts}", m.setting),
                _ => assert_eq!(experts, 4.0, "{}", m.setting),
            }
            let steps = match (m.setting.work, m.setting.batch) {
                (Work::Prefill, batch) => (20 * batch as u64).div_ceil(16),
                (Work::Decode, _) => 4,
                (Work::Mixed, batch) => 40u64.div_ceil(16 - batch as u64),
            };
            assert_eq!(m.step_seconds.count as u64, 2 * steps, "{}", m.setting);
        }
    }

    #[test]
    fn a_replay_reads_the_tokens_it_is_given() {
        let subject = subject();
        let mut runner = Runner::new(&subject, 8, 3, 1).unwrap();
        let run = runner.replay(&[&[1, 2, 3, 4, 5], &[6, 7, 8, 9, 10]], &[&[11, 12, 13], &[14, 15, 16]], RoutingChoice::Native).unwrap();
        assert_eq!((run.decoded, run.prefilled, run.steps.values().len()), (4, 0, 2), "the last tokens are not read");
        // The lane of the first prompt goes on as if its tokens had come at once.
        let decoded = {
            let mut batch = Batch::default();
            batch.push(&[0], &[12], 6, RoutingChoice::Native, LogitRows::Last);
            runner.model.get().forward(&batch).unwrap().logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let at_once = {
            let mut batch = Batch::default();
            batch.push(&[7], &[1, 2, 3, 4, 5, 11, 12], 0, RoutingChoice::Native, LogitRows::Last);
            runner.model.get().forward(&batch).unwrap().logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert!(decoded.iter().zip(&at_once).all(|(a, b)| (a - b).abs() < 1e-4), "{decoded:?} {at_once:?}");
    }

    #[test]
    fn what_cannot_run_is_refused_with_its_flag() {
        let spec = subject().spec;
        let refused = |change: fn(&mut StepsConfig)| {
            let mut config = config();
            change(&mut config);
            config.check(&spec).unwrap_err().to_string()
        };
        assert!(config().check(&spec).is_ok());
        assert!(refused(|c| c.batches.push(0)).starts_with("--batch: 0"));
        assert!(refused(|c| c.generate = 0).starts_with("--generate: 0"));
        assert!(refused(|c| c.prompt_tokens = vec![65]).contains("65 tokens, the model's context has 64"));
        assert!(refused(|c| c.contexts = vec![62]).starts_with("--context: decode"));
        assert!(refused(|c| c.batches = vec![16]).starts_with("--step-tokens: 16: 16 sequences"));
        assert!(refused(|c| c.routings = vec![RoutingChoice::TopK { k: 5, weight_form: None }]).starts_with("--routing: 'top-5'"));
    }
}
