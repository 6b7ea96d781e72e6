//! Three questions with a number for an answer: does the cost grow with all experts or with the active ones, is soft
//! routing as dear as its experts, and what is a cached prefix worth.

use rand::{SeedableRng as _, rngs::StdRng};
use serde::Serialize;

use super::{
    client::{Answer, Ask, End},
    grpc::describe,
    stats::Sample,
    steps::{Run, Runner, Sequences},
    subject::{Placement, Source, Subject, cache_for},
    synthetic::SyntheticSpec,
    target::Target,
    verify::{Verdict, judge},
};
use crate::{
    error::{Error, Result},
    moe::policy::RoutingChoice,
};

/// Numbers of experts that are compared.
const EXPERTS: [usize; 4] = [8, 16, 32, 64];

/// Length of the prompts of the experiment with numbers of experts.
const PROMPT: usize = 64;

/// Tokens of the suffix that follows a shared prefix.
const SUFFIX: usize = 16;

/// Tokens generated after a shared prefix: enough to see that the outputs are equal.
const AFTER_PREFIX: usize = 16;

/// A question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Experiment {
    /// Time per token with 8, 16, 32 and 64 experts of one size, top-1, and equal rows per expert.
    Experts,
    /// Time in experts under soft routing, against E/k times that under native routing.
    Soft,
    /// Time to first token of a second request that shares a prefix with the first, through gRPC.
    Prefix,
    /// Throughput of an engine with a full batch while it is watched, against the same engine unwatched.
    Overhead,
}

/// Models that differ in their number of experts.
#[derive(Clone, Debug, Serialize)]
pub struct ExpertsReport {
    /// What they have in common, with the number of experts of the last.
    pub shape: String,
    /// Element type of the large weights.
    pub dtype: &'static str,
    /// By number of experts.
    pub rows: Vec<ExpertsRow>,
}

/// One number of experts.
#[derive(Clone, Debug, Serialize)]
pub struct ExpertsRow {
    /// Number of experts.
    pub experts: usize,
    /// Tokens of one step: rows per expert times experts.
    pub tokens: usize,
    /// Median, in seconds.
    pub seconds_per_token: f64,
    /// Median, of the feed-forward part.
    pub experts_seconds_per_token: f64,
    /// Largest over mean number of rows of an expert: a random router is not quite fair.
    pub imbalance: f64,
    /// Median over runs of the time per token over that of the fewest experts in the same turn.
    pub relative: f64,
}

/// Soft against native in one kind of load.
#[derive(Clone, Debug, Serialize)]
pub struct SoftRow {
    /// `prefill` or `decode`.
    pub work: &'static str,
    /// Tokens of one step.
    pub tokens: usize,
    /// Median seconds in the feed-forward part per token, native.
    pub native_seconds_per_token: f64,
    /// As above, soft.
    pub soft_seconds_per_token: f64,
    /// Experts over experts per token.
    pub experts_over_k: f64,
    /// Median over turns of the soft time over `experts_over_k` times the native time.
    pub relative: f64,
}

/// A shared prefix.
#[derive(Clone, Debug, Serialize)]
pub struct PrefixReport {
    /// Tokens that both requests have in common.
    pub prefix_tokens: usize,
    /// Median seconds to the first token of the first request.
    pub first: f64,
    /// As above, of the second request.
    pub second: f64,
    /// Median over turns of the second over the first.
    pub relative: f64,
    /// Second requests whose output equals that of a server without the prefix.
    pub equal: usize,
    /// Second requests whose first different token was nearly tied.
    pub near_ties: usize,
    /// Second requests with another output.
    pub different: usize,
}

/// How an experiment is run.
#[derive(Clone, Debug, PartialEq)]
pub struct ExperimentConfig {
    /// Turns; all arms run once in each.
    pub repeats: usize,
    /// Rows per expert.
    pub rows_per_expert: usize,
    /// Most tokens of one step, and length of prompts and prefixes.
    pub prompt_tokens: usize,
    /// Sequences that decode.
    pub batches: Vec<usize>,
    /// Steps of a decode run.
    pub generate: usize,
    /// As in [`judge`].
    pub tie_tolerance: f64,
    /// Of tokens.
    pub seed: u64,
}

/// A model whose cost is asked for, with its sequences.
struct Arm<'a> {
    experts: usize,
    tokens: usize,
    runner: Runner<'a>,
    sequences: Sequences,
    per_token: Sample,
    experts_per_token: Sample,
    relative: Sample,
    imbalance: f64,
}

/// Time per token of models that differ in their number of experts only. `base` gives everything else.
pub fn experts(base: &SyntheticSpec, placement: Placement, config: &ExperimentConfig) -> Result<ExpertsReport> {
    let subjects = EXPERTS.map(|experts| {
        let spec = SyntheticSpec { experts, top_k: 1, ..base.clone() };
        Subject::load(&Source::Synthetic(spec), placement).map(|subject| (experts, subject))
    });
    let subjects = subjects.into_iter().collect::<Result<Vec<_>>>()?;
    let Some((_, last)) = subjects.last() else { return Err(Error::Internal("no numbers of experts".into())) };
    let (shape, dtype) = (last.name.clone(), last.dtype);
    let length = PROMPT.min(base.context);
    let mut arms = Vec::with_capacity(subjects.len());
    for (experts, subject) in &subjects {
        let sequences = (config.rows_per_expert * experts).div_ceil(length);
        let tokens = sequences * length;
        let mut runner = Runner::new(subject, cache_for(sequences, length).num_blocks, tokens, config.seed)?;
        let sequences = runner.sequences(sequences, length, 0, RoutingChoice::Native)?;
        let (per_token, experts_per_token, relative) = Default::default();
        arms.push(Arm { experts: *experts, tokens, runner, sequences, per_token, experts_per_token, relative, imbalance: 0.0 });
    }
    for _ in 0..config.repeats {
        let mut fewest = None;
        for arm in &mut arms {
            let run = arm.runner.prefill_run(&mut arm.sequences, RoutingChoice::Native)?;
            let (total, experts) = per_token(&run);
            arm.per_token.push(total);
            arm.experts_per_token.push(experts);
            arm.relative.push(total / *fewest.get_or_insert(total));
            arm.imbalance = arm.imbalance.max(run.imbalance);
        }
    }
    let row = |arm: Arm<'_>| ExpertsRow {
        experts: arm.experts,
        tokens: arm.tokens,
        seconds_per_token: arm.per_token.median().unwrap_or(0.0),
        experts_seconds_per_token: arm.experts_per_token.median().unwrap_or(0.0),
        imbalance: arm.imbalance,
        relative: arm.relative.median().unwrap_or(0.0),
    };
    Ok(ExpertsReport { shape, dtype, rows: arms.into_iter().map(row).collect() })
}

/// Seconds per token: all, and in the feed-forward part.
fn per_token(run: &Run) -> (f64, f64) {
    let tokens = run.cost.tokens.max(1) as f64;
    (run.elapsed.as_secs_f64() / tokens, run.experts.as_secs_f64() / tokens)
}

/// Soft against native: a prefill of `prompt_tokens` in one step, and decoding at each batch size.
pub fn soft(subject: &Subject, config: &ExperimentConfig) -> Result<Vec<SoftRow>> {
    let (experts, active) = subject.spec.moe_layers().fold((0, 0), |(e, k), (_, moe)| (e + moe.num_experts, k + moe.top_k));
    if active == 0 {
        return Err(Error::FailedPrecondition("the model has no experts".into()));
    }
    let experts_over_k = experts as f64 / active as f64;
    let (native, soft) = (RoutingChoice::Native, RoutingChoice::Soft { temperature: None });
    let most = config.batches.iter().copied().max().unwrap_or(1);
    let blocks = cache_for(1, config.prompt_tokens).num_blocks.max(cache_for(most, config.generate).num_blocks);
    let mut runner = Runner::new(subject, blocks, config.prompt_tokens, config.seed)?;
    let mut rows = Vec::new();
    let mut compare = |work, tokens, run: &mut dyn FnMut(RoutingChoice) -> Result<Run>| -> Result<()> {
        let (mut natives, mut softs, mut relative) = (Sample::default(), Sample::default(), Sample::default());
        for _ in 0..config.repeats {
            let ((_, hard), (_, all)) = (per_token(&run(native)?), per_token(&run(soft)?));
            natives.push(hard);
            softs.push(all);
            relative.push(all / (experts_over_k * hard));
        }
        let median = |sample: &Sample| sample.median().unwrap_or(0.0);
        let (native_seconds_per_token, soft_seconds_per_token) = (median(&natives), median(&softs));
        rows.push(SoftRow { work, tokens, native_seconds_per_token, soft_seconds_per_token, experts_over_k, relative: median(&relative) });
        Ok(())
    };
    let mut prompt = runner.sequences(1, config.prompt_tokens, 0, native)?;
    compare("prefill", config.prompt_tokens, &mut |routing| runner.prefill_run(&mut prompt, routing))?;
    for &batch in &config.batches {
        let mut sequences = runner.sequences(batch, 0, config.generate, native)?;
        runner.decode_run(&mut sequences, 1, native)?;
        compare("decode", batch, &mut |routing| runner.decode_run(&mut sequences, config.generate, routing))?;
    }
    Ok(rows)
}

/// Asks `warm` twice with a shared prefix, and `cold`, a server of the same weights that never sees the prefix first, once: its answer to
/// the second request is the expected one.
pub async fn prefix(warm: &Target, cold: &Target, config: &ExperimentConfig) -> Result<PrefixReport> {
    let facts = warm.facts().await?;
    let longest = config.prompt_tokens + SUFFIX + AFTER_PREFIX;
    if longest > facts.max_context {
        let message = format!("{longest} tokens with suffix and continuation, the context has {}", facts.max_context);
        return Err(Error::out_of_range("--prompt-tokens", message));
    }
    let (mut warm, mut cold) = (warm.client().await?, cold.client().await?);
    let mut rng = StdRng::seed_from_u64(config.seed);
    let mut random = |tokens| Ask::random(&mut rng, facts.vocab_size, tokens, AFTER_PREFIX, RoutingChoice::Native);
    complete(&random(config.prompt_tokens).send(&mut warm, || ()).await)?;
    complete(&random(config.prompt_tokens).send(&mut cold, || ()).await)?;
    let (mut first, mut second, mut relative) = (Sample::default(), Sample::default(), Sample::default());
    let mut report =
        PrefixReport { prefix_tokens: config.prompt_tokens, first: 0.0, second: 0.0, relative: 0.0, equal: 0, near_ties: 0, different: 0 };
    for _ in 0..config.repeats {
        let prefix = random(config.prompt_tokens);
        let [one, two] = [random(SUFFIX), random(SUFFIX)].map(|suffix| {
            let prompt = prefix.prompt.iter().chain(&suffix.prompt).copied().collect();
            Ask { prompt, ..suffix }
        });
        let before = one.send(&mut warm, || ()).await;
        let after = two.send(&mut warm, || ()).await;
        let expected = two.send(&mut cold, || ()).await;
        let (before, after_seconds) = (complete(&before)?, complete(&after)?);
        complete(&expected)?;
        first.push(before);
        second.push(after_seconds);
        relative.push(after_seconds / before);
        match judge(&mut cold, &two, &expected.tokens, &after.tokens, config.tie_tolerance).await? {
            Verdict::Equal => report.equal += 1,
            Verdict::NearTie { .. } => report.near_ties += 1,
            Verdict::Different { .. } => report.different += 1,
        }
    }
    let median = |sample: &Sample| sample.median().unwrap_or(0.0);
    (report.first, report.second, report.relative) = (median(&first), median(&second), median(&relative));
    Ok(report)
}

/// Time to first token of an answer that came to its end.
fn complete(answer: &Answer) -> Result<f64> {
    let ended = || Error::FailedPrecondition(format!("a request ended early: {}", describe(&answer.end)));
    answer.time_to_first_token().filter(|_| matches!(answer.end, End::Finished)).ok_or_else(ended)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::load::{DeviceKind, WeightType};

    const PLACEMENT: Placement =
        Placement { device: DeviceKind::Cpu, weights: WeightType::F32, reduction: crate::ops::cpu::Reduction::Fastest, seed: 3 };

    fn config() -> ExperimentConfig {
        ExperimentConfig {
            repeats: 2,
            rows_per_expert: 8,
            prompt_tokens: 32,
            batches: vec![1, 4],
            generate: 3,
            tie_tolerance: 0.0,
            seed: 1,
        }
    }

    #[test]
    fn tokens_grow_with_experts() {
        let report = experts(&"tiny,layers=1".parse().unwrap(), PLACEMENT, &config()).unwrap();
        let rows = report.rows;
        let shapes: Vec<_> = rows.iter().map(|row| (row.experts, row.tokens)).collect();
        assert_eq!(shapes, [(8, 64), (16, 128), (32, 256), (64, 512)]);
        assert_eq!(rows[0].relative, 1.0);
        assert!(rows.iter().all(|row| row.seconds_per_token > row.experts_seconds_per_token && row.imbalance >= 1.0));
    }

    #[test]
    fn soft_is_compared_with_native_in_each_load() {
        let subject = Subject::load(&Source::Synthetic("tiny".parse().unwrap()), PLACEMENT).unwrap();
        let rows = soft(&subject, &config()).unwrap();
        assert_eq!(rows.iter().map(|row| (row.work, row.tokens)).collect::<Vec<_>>(), [("prefill", 32), ("decode", 1), ("decode", 4)]);
        assert!(rows.iter().all(|row| row.experts_over_k == 2.0 && row.relative > 0.0));
    }
}
