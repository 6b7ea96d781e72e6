//! Load through gRPC: concurrent clients with connections of their own, and what the way there costs.
//!
//! All clients of a burst start together, with prompts that nobody has sent before. Where the server is in this
//! process, the same tokens then go through the model alone, so that the difference is what gRPC, scheduling, sampling and
//! metrics cost. Clients and server share the cores: what the clients cost is in it, and their CPU time is told apart.

use std::time::Instant;

use rand::{SeedableRng as _, rngs::StdRng};
use serde::Serialize;
use tokio::sync::watch;

use super::{
    client::{Answer, Ask, End},
    cpu_time::{CpuTime, StepCpu},
    stats::{Latency, Sample},
    steps::Runner,
    subject::{Subject, cache_for},
    target::{Facts, Page, Target},
};
use crate::{
    error::{Error, Result},
    moe::policy::RoutingChoice,
};

/// The histogram of forwards.
const STEP_SECONDS: &str = "hardmax_step_seconds";

/// What to run.
#[derive(Clone, Debug, PartialEq)]
pub struct GrpcConfig {
    /// Concurrent clients.
    pub clients: Vec<usize>,
    /// Lengths of prompts.
    pub prompt_tokens: Vec<usize>,
    /// Tokens that each client asks for.
    pub generate: usize,
    /// Routings.
    pub routings: Vec<RoutingChoice>,
    /// Bursts of each setting.
    pub repeats: usize,
    /// Most tokens of one step, for the model alone.
    pub step_tokens: usize,
    /// Of the tokens.
    pub seed: u64,
}

/// What one setting gave.
#[derive(Clone, Debug, Serialize)]
pub struct GrpcMeasurement {
    /// Of all tokens.
    pub routing: String,
    /// Concurrent clients.
    pub clients: usize,
    /// Length of each prompt.
    pub prompt_tokens: usize,
    /// Tokens that each client asked for.
    pub generate: usize,
    /// Median over bursts: generated tokens over the time from the first request to the last token.
    pub tokens_per_second: f64,
    /// Over all requests.
    pub time_to_first_token: Latency,
    /// Between messages, over all requests.
    pub inter_token: Latency,
    /// Median over bursts; absent where no step had all clients in it.
    pub steps: Option<StepTimes>,
}

/// Seconds of the steps of a burst. On a shared machine a few steps are slow for reasons of others: a median is compared with a median,
/// a mean with a mean.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepTime {
    /// Half of the steps were faster.
    pub median: f64,
    /// All time over all steps.
    pub mean: f64,
}

/// The time of a decode step with all clients in it, from three places: medians over bursts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepTimes {
    /// From token to token, as clients see it.
    pub client: StepTime,
    /// Mean seconds of the forward inside the engine, as its metrics say; absent without the port with metrics.
    pub engine: Option<f64>,
    /// The model alone with the same tokens; absent where the server is elsewhere, or its batch is smaller than the number of clients.
    pub model: Option<StepTime>,
    /// What is added to the model's step, as a share of it: median over bursts, each against its own replay.
    pub overhead: Option<StepTime>,
    /// What is added to the forward inside the engine, as a share of it. Both are of the same steps: it is the least noisy one, and it does
    /// not see where the server slows the forward down.
    pub overhead_in_engine: Option<f64>,
    /// CPU time by kind of thread; absent where the server is elsewhere, or the system does not count it.
    pub cpu: Option<StepCpu>,
}

/// What every burst of a setting said about its steps.
#[derive(Debug, Default)]
struct StepSamples {
    client: [Sample; 2],
    engine: Sample,
    model: [Sample; 2],
    overhead: [Sample; 2],
    overhead_in_engine: Sample,
    cpu: CpuTime,
    cpu_steps: f64,
}

impl StepSamples {
    fn push(&mut self, client: StepTime, engine: Option<f64>, model: Option<StepTime>) {
        push(&mut self.client, client);
        if let Some(engine) = engine {
            self.engine.push(engine);
            self.overhead_in_engine.push(client.mean / engine - 1.0);
        }
        if let Some(model) = model {
            push(&mut self.model, model);
            push(&mut self.overhead, StepTime { median: client.median / model.median - 1.0, mean: client.mean / model.mean - 1.0 });
        }
    }

    fn push_cpu(&mut self, (time, steps): (CpuTime, f64)) {
        self.cpu = self.cpu + time;
        self.cpu_steps += steps;
    }

    fn medians(&self) -> Option<StepTimes> {
        Some(StepTimes {
            client: medians(&self.client)?,
            engine: self.engine.median(),
            model: medians(&self.model),
            overhead: medians(&self.overhead),
            overhead_in_engine: self.overhead_in_engine.median(),
            cpu: (self.cpu_steps > 0.0).then(|| self.cpu.per_step(self.cpu_steps)),
        })
    }
}

fn push(samples: &mut [Sample; 2], time: StepTime) {
    samples.iter_mut().zip([time.median, time.mean]).for_each(|(sample, value)| sample.push(value));
}

fn medians([median, mean]: &[Sample; 2]) -> Option<StepTime> {
    Some(StepTime { median: median.median()?, mean: mean.median()? })
}

/// What one burst gave.
struct Burst {
    prompts: Vec<Vec<u32>>,
    /// In the order of `prompts`.
    answers: Vec<Answer>,
    /// At the first moment when all clients decode, and at the last.
    readings: Option<(Reading, Reading)>,
}

/// What is known of the server at one moment.
struct Reading {
    page: Page,
    cpu: Option<CpuTime>,
}

impl GrpcConfig {
    /// Fails where the server cannot run a setting, with the flag that asks for it.
    pub fn check(&self, facts: &Facts) -> Result<()> {
        for (flag, values) in [("--clients", &self.clients), ("--prompt-tokens", &self.prompt_tokens)] {
            if values.contains(&0) {
                return Err(Error::invalid(flag, "0 is nothing to measure"));
            }
        }
        if self.generate > facts.max_new_tokens {
            return Err(Error::out_of_range(
                "--generate",
                format!("{} is above {}, the limit of the server", self.generate, facts.max_new_tokens),
            ));
        }
        match self.prompt_tokens.iter().find(|&&tokens| tokens + self.generate > facts.max_context) {
            Some(tokens) => {
                let message =
                    format!("{tokens} and --generate {} are more than the {} tokens of the context", self.generate, facts.max_context);
                Err(Error::out_of_range("--prompt-tokens", message))
            }
            None => Ok(()),
        }
    }
}

/// Runs every setting against `target`, in turns with the model alone where `subject` is given.
pub async fn measure(target: &Target, subject: Option<&Subject>, config: &GrpcConfig) -> Result<Vec<GrpcMeasurement>> {
    let facts = target.facts().await?;
    config.check(&facts)?;
    let mut rng = StdRng::seed_from_u64(config.seed);
    let mut measurements = Vec::new();
    for &routing in &config.routings {
        for &prompt_tokens in &config.prompt_tokens {
            for &clients in &config.clients {
                let setting = Setting { routing, prompt_tokens, clients };
                let measurement = setting.measure(target, subject, config, &facts, &mut rng).await?;
                tracing::info!("{clients} clients, {prompt_tokens} tokens, {routing}: {:.1} tokens/s", measurement.tokens_per_second);
                measurements.push(measurement);
            }
        }
    }
    Ok(measurements)
}

#[derive(Clone, Copy)]
struct Setting {
    routing: RoutingChoice,
    prompt_tokens: usize,
    clients: usize,
}

impl Setting {
    async fn measure(
        self,
        target: &Target,
        subject: Option<&Subject>,
        config: &GrpcConfig,
        facts: &Facts,
        rng: &mut StdRng,
    ) -> Result<GrpcMeasurement> {
        let fits = self.clients <= facts.max_batch_requests;
        let mut alone = match subject.filter(|_| fits) {
            Some(subject) => {
                let blocks = cache_for(self.clients, self.prompt_tokens + config.generate).num_blocks;
                Some(Runner::new(subject, blocks, config.step_tokens, config.seed)?)
            }
            None => None,
        };
        let warm_up = self.burst(target, facts, config.generate.min(2), rng).await?;
        if let Some(runner) = &mut alone {
            warm_up.replay(runner, self.routing)?;
        }
        let (mut rates, mut first, mut gaps) = (Sample::default(), Sample::default(), Sample::default());
        let mut steps = StepSamples::default();
        for _ in 0..config.repeats {
            let burst = self.burst(target, facts, config.generate, rng).await?;
            rates.push(burst.tokens_per_second().ok_or_else(|| Error::Internal("a burst without tokens".into()))?);
            burst.answers.iter().filter_map(Answer::time_to_first_token).for_each(|seconds| first.push(seconds));
            burst.answers.iter().flat_map(Answer::gaps).for_each(|seconds| gaps.push(seconds));
            let model = match &mut alone {
                Some(runner) => burst.replay(runner, self.routing)?,
                None => None,
            };
            if let Some(client) = burst.client_step().filter(|_| fits) {
                steps.push(client, burst.engine_step(), model);
                burst.cpu().filter(|_| subject.is_some()).into_iter().for_each(|cpu| steps.push_cpu(cpu));
            }
        }
        Ok(GrpcMeasurement {
            routing: self.routing.to_string(),
            clients: self.clients,
            prompt_tokens: self.prompt_tokens,
            generate: config.generate,
            tokens_per_second: rates.median().unwrap_or(0.0),
            time_to_first_token: first.latency(),
            inter_token: gaps.latency(),
            steps: steps.medians(),
        })
    }

    /// One request of each client, all at once. Connections are new: while the model runs alone, nobody here would answer the server's pings.
    async fn burst(self, target: &Target, facts: &Facts, generate: usize, rng: &mut StdRng) -> Result<Burst> {
        let mut connections = Vec::with_capacity(self.clients);
        for _ in 0..self.clients {
            connections.push(target.client().await?);
        }
        let progress = watch::Sender::new((0usize, 0usize));
        let (mut tasks, mut prompts) = (Vec::with_capacity(connections.len()), Vec::with_capacity(connections.len()));
        for mut connection in connections {
            let ask = Ask::random(rng, facts.vocab_size, self.prompt_tokens, generate, self.routing);
            prompts.push(ask.prompt.clone());
            let progress = progress.clone();
            tasks.push(tokio::spawn(async move {
                let answer = ask.send(&mut connection, || progress.send_modify(|(started, _)| *started += 1)).await;
                progress.send_modify(|(_, ended)| *ended += 1);
                answer
            }));
        }
        let (mut watcher, clients) = (progress.subscribe(), self.clients);
        let readings = async {
            watcher.wait_for(|&(started, ended)| started == clients || ended > 0).await.ok()?;
            let before = Reading { page: target.page().await.ok()??, cpu: CpuTime::now() };
            watcher.wait_for(|&(_, ended)| ended > 0).await.ok()?;
            let cpu = CpuTime::now();
            Some((before, Reading { page: target.page().await.ok()??, cpu }))
        };
        let collect = async {
            let mut answers = Vec::with_capacity(clients);
            for task in tasks {
                answers.push(task.await.map_err(|error| Error::Internal(format!("a client failed: {error}")))?);
            }
            Ok::<_, Error>(answers)
        };
        let (answers, readings) = tokio::join!(collect, readings);
        let answers = answers?;
        match answers.iter().find(|answer| !matches!(answer.end, End::Finished)) {
            Some(answer) => Err(Error::FailedPrecondition(format!("a request ended early: {}", describe(&answer.end)))),
            None => Ok(Burst { prompts, answers, readings }),
        }
    }
}

/// For messages.
pub(super) fn describe(end: &End) -> String {
    match end {
        End::Finished => "finished".into(),
        End::Cancelled => "cancelled".into(),
        End::Deadline => "its deadline passed".into(),
        End::Refused => "refused: the server's queue is full".into(),
        End::Failed(status) => format!("{}: {}", crate::service::code_name(status.code()), status.message()),
    }
}

impl Burst {
    fn tokens_per_second(&self) -> Option<f64> {
        let start = self.answers.iter().map(|answer| answer.asked).min()?;
        let end = self.answers.iter().filter_map(|answer| answer.arrivals.last()).map(|(at, _)| *at).max()?;
        let tokens: usize = self.answers.iter().map(|answer| answer.tokens.len()).sum();
        Some(tokens as f64 / end.duration_since(start).as_secs_f64())
    }

    /// From the last first token to the first last token: when every client decodes.
    fn window(&self) -> Option<(Instant, Instant)> {
        let firsts = self.answers.iter().map(|answer| answer.arrivals.first().map(|(at, _)| *at));
        let lasts = self.answers.iter().map(|answer| answer.arrivals.last().map(|(at, _)| *at));
        let start = firsts.collect::<Option<Vec<_>>>()?.into_iter().max()?;
        let end = lasts.collect::<Option<Vec<_>>>()?.into_iter().min()?;
        (start < end).then_some((start, end))
    }

    fn client_step(&self) -> Option<StepTime> {
        let (start, end) = self.window()?;
        let means = self.answers.iter().map(|answer| answer.seconds_per_token(start, end));
        let steps: Sample = self.answers.iter().flat_map(|answer| answer.steps(start, end)).collect();
        Some(StepTime { median: steps.median()?, mean: means.collect::<Option<Sample>>()?.median()? })
    }

    fn engine_step(&self) -> Option<f64> {
        let (before, after) = self.readings.as_ref()?;
        after.page.mean_since(&before.page, STEP_SECONDS)
    }

    /// CPU time while all clients decode, and how many steps that were.
    fn cpu(&self) -> Option<(CpuTime, f64)> {
        let (before, after) = self.readings.as_ref()?;
        let steps = |page: &Page| page.sum(&format!("{STEP_SECONDS}_count"));
        Some((after.cpu? - before.cpu?, steps(&after.page)? - steps(&before.page)?))
    }

    /// The same tokens on the model alone; `None` where there are too few for a step.
    fn replay(&self, runner: &mut Runner<'_>, routing: RoutingChoice) -> Result<Option<StepTime>> {
        let prompts: Vec<&[u32]> = self.prompts.iter().map(Vec::as_slice).collect();
        let continuations: Vec<&[u32]> = self.answers.iter().map(|answer| answer.tokens.as_slice()).collect();
        let run = runner.replay(&prompts, &continuations, routing)?;
        let mean = run.elapsed.as_secs_f64() / run.steps.values().len() as f64;
        Ok(run.steps.median().map(|median| StepTime { median, mean }))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn burst(arrivals: &[&[u64]]) -> Burst {
        let asked = Instant::now();
        let answer = |times: &&[u64]| Answer {
            tokens: vec![0; times.len()],
            asked,
            arrivals: times.iter().map(|&ms| (asked + Duration::from_millis(ms), 1)).collect(),
            end: End::Finished,
        };
        Burst { prompts: Vec::new(), answers: arrivals.iter().map(answer).collect(), readings: None }
    }

    #[test]
    fn a_step_counts_where_all_clients_decode() {
        // The first client waits for the prompt of the second, then both go on at 10 ms.
        let together = burst(&[&[10, 50, 60, 70, 80], &[50, 60, 70, 80, 90]]);
        let step = together.client_step().unwrap();
        assert!((step.mean - 0.010).abs() < 1e-9 && (step.median - 0.010).abs() < 1e-9);
        let hiccup = burst(&[&[10, 20, 30, 70, 80], &[10, 20, 30, 70, 80]]).client_step().unwrap();
        assert!((hiccup.mean - 0.0175).abs() < 1e-9 && (hiccup.median - 0.010).abs() < 1e-9, "{hiccup:?}");
        assert!((together.tokens_per_second().unwrap() - 10.0 / 0.09).abs() < 1e-6);
        assert_eq!(burst(&[&[10, 20], &[30, 40]]).client_step(), None, "never together");
    }

    #[test]
    fn overheads_are_shares_of_what_they_are_added_to() {
        let mut samples = StepSamples::default();
        for slowness in [1.0, 2.0, 5.0] {
            let time = |median: f64, mean: f64| StepTime { median: median * slowness, mean: mean * slowness };
            samples.push(time(0.0103, 0.0122), Some(0.0120 * slowness), Some(time(0.01, 0.0116)));
        }
        let steps = samples.medians().unwrap();
        let overhead = steps.overhead.unwrap();
        assert!((overhead.median - 0.03).abs() < 1e-9 && (overhead.mean - 6.0 / 116.0).abs() < 1e-9, "{overhead:?}");
        assert!((steps.overhead_in_engine.unwrap() - 1.0 / 60.0).abs() < 1e-9);
        assert_eq!((steps.client.median, steps.cpu), (0.0206, None));
    }
}
