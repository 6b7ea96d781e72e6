//! Many clients for a long time, with lengths, cancellations and deadlines drawn at random; then the accounts.
//!
//! Clients draw their requests from a fixed set of prompts. Whatever tokens a stream delivered, to its end or until it
//! was cancelled or too late, are compared with what the same server says when it is asked alone, after the load. At the
//! end nothing may run, wait or hold a block, the engine must not have panicked, and memory must not have grown.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde::Serialize;
use tokio::{
    task::JoinSet,
    time::{interval, sleep},
};

use super::{
    client::{Answer, Ask, End},
    grpc::describe,
    stats::{BoundedSample, Latency, Sample},
    subject::resident_memory,
    target::{Facts, Page, Target},
    verify::{Verdict, judge},
};
use crate::{
    error::{Error, Result},
    moe::policy::RoutingChoice,
};

/// How long a client waits after it was refused.
const BACK_OFF: Duration = Duration::from_millis(50);

/// Requests that every client sends at least, however slow the server is.
const LEAST_REQUESTS: usize = 4;

/// How often memory is read.
const MEMORY_PERIOD: Duration = Duration::from_secs(1);

/// Growth of memory from the second quarter to the last that is no leak: a share, and allocator noise.
const MEMORY_GROWTH: (f64, f64) = (0.02, (16 << 20) as f64);

/// Fewer readings are not judged.
const MEMORY_READINGS: usize = 16;

/// Shares of requests, in percent, that go away by themselves and that have a deadline; the rest runs to its end.
const CANCELLED_PERCENT: u32 = 15;
/// As above.
const DEADLINE_PERCENT: u32 = 15;

/// Deadlines are drawn between these, evenly in their logarithm.
const DEADLINES: (Duration, Duration) = (Duration::from_millis(2), Duration::from_secs(20));

/// What to run.
#[derive(Clone, Debug, PartialEq)]
pub struct SoakConfig {
    /// How long requests are sent.
    pub duration: Duration,
    /// Concurrent clients.
    pub clients: usize,
    /// Distinct prompts.
    pub prompts: usize,
    /// Longest prompt.
    pub prompt_tokens: usize,
    /// Longest continuation.
    pub generate: usize,
    /// Each prompt has one of them.
    pub routings: Vec<RoutingChoice>,
    /// Largest accepted difference of log-probabilities where a token differs, in nats; 0 demands equality.
    pub tie_tolerance: f64,
    /// Of everything that is drawn.
    pub seed: u64,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct SoakReport {
    /// Seconds of load.
    pub seconds: f64,
    /// Concurrent clients.
    pub clients: usize,
    /// Requests by how they ended.
    pub ends: BTreeMap<&'static str, u64>,
    /// Tokens that arrived, per second.
    pub tokens_per_second: f64,
    /// From request to first token.
    pub time_to_first_token: Latency,
    /// Between messages of a stream.
    pub inter_token: Latency,
    /// Streams whose tokens were compared.
    pub compared: u64,
    /// Of these, those that ran to their end.
    pub compared_finished: u64,
    /// Streams equal to the solo run.
    pub equal: u64,
    /// Streams whose first difference was a near tie.
    pub near_ties: u64,
    /// Streams that differ.
    pub different: u64,
    /// Largest accepted difference of log-probabilities.
    pub tie_tolerance: f64,
    /// Largest difference of log-probabilities at a first different token.
    pub largest_gap: f64,
    /// Memory of this process, in bytes, once a second; empty where the server is elsewhere.
    pub resident_bytes: Vec<u64>,
    /// Growth from the second quarter to the last, in bytes; absent where there is too little to judge.
    pub resident_growth: Option<f64>,
    /// Values of `/metrics` once everything had ended.
    pub server: BTreeMap<String, f64>,
    /// What should not be; empty if all is well.
    pub violations: Vec<String>,
}

/// Values of the last page that are told, and whether they must be 0.
const SERVER_VALUES: &[(&str, bool)] = &[
    ("hardmax_requests_running", true),
    ("hardmax_requests_waiting", true),
    ("hardmax_kv_cache_usage_ratio", true),
    ("hardmax_engine_panics_total", true),
    ("hardmax_preemptions_total", false),
    ("hardmax_prefix_cache_queries_total", false),
    ("hardmax_prefix_cache_hits_total", false),
];

/// Counts and times of one client, or of all.
#[derive(Debug, Default)]
struct Tally {
    ends: BTreeMap<&'static str, u64>,
    failures: Vec<String>,
    tokens: usize,
    /// Of each client that was merged.
    first: Vec<BoundedSample>,
    gaps: Vec<BoundedSample>,
    /// By prompt, what was delivered: how often, and how often to the end.
    outputs: HashMap<usize, HashMap<Vec<u32>, (u64, u64)>>,
}

impl SoakConfig {
    /// Fails where the server cannot do it, with the flag that asks for it.
    pub fn check(&self, facts: &Facts) -> Result<()> {
        let zero = [
            ("--clients", self.clients),
            ("--prompts", self.prompts),
            ("--prompt-tokens", self.prompt_tokens),
            ("--generate", self.generate),
        ];
        if let Some((flag, _)) = zero.into_iter().find(|&(_, value)| value == 0) {
            return Err(Error::invalid(flag, "0 is nothing to measure"));
        }
        if !(self.tie_tolerance.is_finite() && self.tie_tolerance >= 0.0) {
            return Err(Error::invalid("--tie-tolerance", format!("{} is not a finite number from 0", self.tie_tolerance)));
        }
        if self.generate > facts.max_new_tokens {
            return Err(Error::out_of_range(
                "--generate",
                format!("{} is above {}, the limit of the server", self.generate, facts.max_new_tokens),
            ));
        }
        if self.prompt_tokens + self.generate > facts.max_context {
            let message = format!(
                "{} and --generate {} are more than the {} tokens of the context",
                self.prompt_tokens, self.generate, facts.max_context
            );
            return Err(Error::out_of_range("--prompt-tokens", message));
        }
        Ok(())
    }

    /// Prompts of mixed lengths, each with a length of its continuation and a routing.
    fn cases(&self, vocab_size: u32) -> Vec<Ask> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let mut case = |index: usize| {
            let tokens = log_uniform(&mut rng, 1.0, self.prompt_tokens as f64).round() as usize;
            let new_tokens = rng.random_range(1..=self.generate);
            let routing = self.routings.get(index % self.routings.len().max(1)).copied().unwrap_or_default();
            Ask::random(&mut rng, vocab_size, tokens.clamp(1, self.prompt_tokens), new_tokens, routing)
        };
        (0..self.prompts).map(&mut case).collect()
    }
}

/// Evenly distributed in its logarithm.
fn log_uniform(rng: &mut StdRng, low: f64, high: f64) -> f64 {
    (low.ln() + rng.random_range(0.0..=1.0) * (high.ln() - low.ln())).exp()
}

/// Loads `target`, checks what it said, and reports. `in_process`: the server's memory is that of this process.
///
/// Violations are in the report; an error means that the soak could not be done.
pub async fn soak(target: &Target, config: &SoakConfig, in_process: bool) -> Result<SoakReport> {
    let facts = target.facts().await?;
    config.check(&facts)?;
    let cases = config.cases(facts.vocab_size);
    let start = Instant::now();
    let (tally, resident) = tokio::join!(load(target, config, &cases), memory(config.duration, in_process));
    let (mut tally, seconds) = (tally?, start.elapsed().as_secs_f64());
    tracing::info!(seconds, tokens = tally.tokens, "load has ended; waiting for the server to be idle");
    let page = target.idle_page().await?;
    let mut report = SoakReport {
        seconds,
        clients: config.clients,
        tokens_per_second: tally.tokens as f64 / seconds,
        time_to_first_token: BoundedSample::latency(tally.first.iter()),
        inter_token: BoundedSample::latency(tally.gaps.iter()),
        compared: 0,
        compared_finished: 0,
        equal: 0,
        near_ties: 0,
        different: 0,
        tie_tolerance: config.tie_tolerance,
        largest_gap: 0.0,
        resident_growth: growth(&resident),
        resident_bytes: resident,
        server: BTreeMap::new(),
        violations: std::mem::take(&mut tally.failures),
        ends: std::mem::take(&mut tally.ends),
    };
    report.judge_memory();
    if let Some(page) = page {
        report.judge_server(&page);
    }
    report.compare(target, config, &cases, &tally).await?;
    Ok(report)
}

/// All clients until the time is over.
async fn load(target: &Target, config: &SoakConfig, cases: &[Ask]) -> Result<Tally> {
    let until = Instant::now() + config.duration;
    let cases: std::sync::Arc<[Ask]> = cases.into();
    let mut clients = JoinSet::new();
    for index in 0..config.clients {
        let mut connection = target.client().await?;
        let (cases, seed) = (cases.clone(), config.seed.wrapping_add(1 + index as u64));
        clients.spawn(async move {
            let mut rng = StdRng::seed_from_u64(seed);
            let (mut tally, mut requests) = (Tally::default(), 0);
            while Instant::now() < until || requests < LEAST_REQUESTS {
                requests += 1;
                let case = rng.random_range(0..cases.len());
                let ask = fate(&cases[case], &mut rng);
                let answer = ask.send(&mut connection, || ()).await;
                let refused = matches!(answer.end, End::Refused);
                tally.add(case, answer);
                if refused {
                    sleep(BACK_OFF).await;
                }
            }
            tally
        });
    }
    let mut all = Tally::default();
    while let Some(tally) = clients.join_next().await {
        all.merge(tally.map_err(|error| Error::Internal(format!("a client failed: {error}")))?);
    }
    Ok(all)
}

/// The request as it is, or with a cancellation or a deadline.
fn fate(case: &Ask, rng: &mut StdRng) -> Ask {
    let mut ask = case.clone();
    match rng.random_range(0..100) {
        draw if draw < CANCELLED_PERCENT => ask.cancel_after = Some(rng.random_range(0..ask.new_tokens)),
        draw if draw < CANCELLED_PERCENT + DEADLINE_PERCENT => {
            let seconds = log_uniform(rng, DEADLINES.0.as_secs_f64(), DEADLINES.1.as_secs_f64());
            ask.timeout = Some(Duration::from_secs_f64(seconds));
        }
        _ => {}
    }
    ask
}

/// Reads the memory of this process once a period.
async fn memory(duration: Duration, in_process: bool) -> Vec<u64> {
    let mut readings = Vec::new();
    if in_process {
        let (until, mut ticks) = (Instant::now() + duration, interval(MEMORY_PERIOD));
        while Instant::now() < until {
            ticks.tick().await;
            readings.extend(resident_memory());
        }
    }
    readings
}

/// Median of the last quarter less that of the second.
fn growth(resident: &[u64]) -> Option<f64> {
    let quarter = resident.len() / 4;
    if resident.len() < MEMORY_READINGS {
        return None;
    }
    let median = |part: &[u64]| part.iter().map(|&bytes| bytes as f64).collect::<Sample>().median();
    Some(median(resident.get(resident.len() - quarter..)?)? - median(resident.get(quarter..2 * quarter)?)?)
}

impl Tally {
    fn add(&mut self, case: usize, answer: Answer) {
        let end = match &answer.end {
            End::Finished => "finished",
            End::Cancelled => "cancelled",
            End::Deadline => "deadline",
            End::Refused => "refused",
            End::Failed(_) => {
                // One of each kind is enough to look for.
                let failure = format!("a request failed: {}", describe(&answer.end));
                if !self.failures.contains(&failure) {
                    self.failures.push(failure);
                }
                "failed"
            }
        };
        *self.ends.entry(end).or_default() += 1;
        self.tokens += answer.tokens.len();
        self.first.resize_with(self.first.len().max(1), BoundedSample::default);
        self.gaps.resize_with(self.gaps.len().max(1), BoundedSample::default);
        answer.time_to_first_token().into_iter().for_each(|seconds| self.first[0].push(seconds));
        answer.gaps().for_each(|seconds| self.gaps[0].push(seconds));
        if !answer.tokens.is_empty() {
            let finished = u64::from(matches!(answer.end, End::Finished));
            let (count, to_the_end) = self.outputs.entry(case).or_default().entry(answer.tokens).or_default();
            *count += 1;
            *to_the_end += finished;
        }
    }

    fn merge(&mut self, other: Self) {
        for (end, count) in other.ends {
            *self.ends.entry(end).or_default() += count;
        }
        for failure in other.failures {
            if !self.failures.contains(&failure) {
                self.failures.push(failure);
            }
        }
        self.tokens += other.tokens;
        self.first.extend(other.first);
        self.gaps.extend(other.gaps);
        for (case, outputs) in other.outputs {
            let mine = self.outputs.entry(case).or_default();
            for (tokens, (count, finished)) in outputs {
                let entry = mine.entry(tokens).or_default();
                (entry.0, entry.1) = (entry.0 + count, entry.1 + finished);
            }
        }
    }
}

impl SoakReport {
    fn judge_memory(&mut self) {
        let Some(growth) = self.resident_growth else { return };
        let last = self.resident_bytes.last().map_or(0.0, |&bytes| bytes as f64);
        if growth > MEMORY_GROWTH.0 * last + MEMORY_GROWTH.1 {
            self.violations.push(format!("memory grew by {:.1} MB after warm-up", growth / 1e6));
        }
    }

    fn judge_server(&mut self, page: &Page) {
        for &(name, must_be_zero) in SERVER_VALUES {
            let Some(value) = page.sum(name) else {
                self.violations.push(format!("/metrics has no {name}"));
                continue;
            };
            self.server.insert(name.to_owned(), value);
            if must_be_zero && value != 0.0 {
                self.violations.push(format!("{name} is {value} with nothing to do"));
            }
        }
    }

    /// Asks each prompt alone, and holds against it what was delivered under load.
    async fn compare(&mut self, target: &Target, config: &SoakConfig, cases: &[Ask], tally: &Tally) -> Result<()> {
        let mut client = target.client().await?;
        for (index, ask) in cases.iter().enumerate() {
            let Some(outputs) = tally.outputs.get(&index) else { continue };
            let solo = ask.send(&mut client, || ()).await;
            if !matches!(solo.end, End::Finished) {
                self.violations.push(format!("the solo run of prompt {index}: {}", describe(&solo.end)));
                continue;
            }
            for (tokens, &(count, finished)) in outputs {
                self.compared += count;
                self.compared_finished += finished;
                let short = finished > 0 && tokens.len() != solo.tokens.len();
                let verdict = judge(&mut client, ask, &solo.tokens, tokens, config.tie_tolerance).await?;
                match verdict {
                    Verdict::Equal if !short => self.equal += count,
                    Verdict::Equal => {
                        self.different += count;
                        self.violations.push(format!(
                            "prompt {index} ended after {} tokens, alone after {}",
                            tokens.len(),
                            solo.tokens.len()
                        ));
                    }
                    Verdict::NearTie { gap, .. } => {
                        self.near_ties += count;
                        self.largest_gap = self.largest_gap.max(gap);
                    }
                    Verdict::Different { position, gap } => {
                        self.different += count;
                        self.largest_gap = self.largest_gap.max(gap);
                        self.violations.push(format!(
                            "prompt {index} ({} tokens, {}) differs from its solo run at token {position}: {gap:.6} nats apart",
                            ask.prompt.len(),
                            ask.routing
                        ));
                    }
                }
            }
        }
        if self.compared_finished == 0 {
            self.violations.push("no stream ran to its end: nothing was compared".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> SoakConfig {
        SoakConfig {
            duration: Duration::from_secs(1),
            clients: 4,
            prompts: 40,
            prompt_tokens: 100,
            generate: 10,
            routings: vec![RoutingChoice::Native, RoutingChoice::Soft { temperature: None }],
            tie_tolerance: 0.0,
            seed: 5,
        }
    }

    #[test]
    fn prompts_have_mixed_lengths() {
        let cases = config().cases(50);
        assert_eq!(cases.len(), 40);
        let length = |ask: &Ask| ask.prompt.len();
        assert!(cases.iter().all(|ask| (1..=100).contains(&length(ask)) && (1..=10).contains(&ask.new_tokens)));
        assert!(cases.iter().any(|ask| length(ask) < 10) && cases.iter().any(|ask| length(ask) > 50));
        assert_eq!(cases.iter().filter(|ask| ask.routing == RoutingChoice::Native).count(), 20);
        assert_eq!(cases, config().cases(50), "the seed decides");
    }

    #[test]
    fn fates_are_mixed() {
        let (mut rng, case) = (StdRng::seed_from_u64(1), config().cases(50).remove(0));
        let fates: Vec<Ask> = (0..1000).map(|_| fate(&case, &mut rng)).collect();
        let cancelled = fates.iter().filter(|ask| ask.cancel_after.is_some()).count();
        let late = fates.iter().filter(|ask| ask.timeout.is_some()).count();
        assert!((100..200).contains(&cancelled) && (100..200).contains(&late), "{cancelled} {late}");
        assert!(fates.iter().all(|ask| ask.cancel_after.is_none_or(|after| after < ask.new_tokens)));
    }

    #[test]
    fn growth_is_measured_after_warm_up() {
        let flat: Vec<u64> = (0..40).map(|i| if i < 10 { i * 100 } else { 1000 + i % 2 }).collect();
        assert!(growth(&flat).unwrap().abs() < 2.0);
        let leak: Vec<u64> = (0..40).map(|i| i * 100).collect();
        assert_eq!(growth(&leak), Some(2000.0));
        assert_eq!(growth(&leak[..8]), None);
    }
}
