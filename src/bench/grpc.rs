//! Load through gRPC: concurrent clients with connections of their own, and what the way there costs.
//!
//! All clients of a burst start together, with prompts that nobody has sent before. Where the server is in this
//! process, the same decode steps are also run on the model alone, in turns with the bursts, so that the difference is
//! what gRPC, scheduling, sampling and metrics cost. Clients and server share the cores: what the clients cost is in it.

use std::time::Instant;

use rand::{SeedableRng as _, rngs::StdRng};
use serde::Serialize;
use tokio::sync::watch;
use tonic::transport::Channel;

use super::{
    client::{Answer, Ask, End},
    stats::{Latency, Sample},
    steps::Runner,
    subject::{Subject, cache_for},
    target::{Facts, Page, Target},
};
use crate::{
    error::{Error, Result},
    moe::policy::RoutingChoice,
    service::proto::inference_client::InferenceClient,
};

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

/// The time of a decode step with all clients in it, from three places, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepTimes {
    /// From token to token, as clients see it.
    pub client: f64,
    /// The forward inside the engine, as its metrics say; absent without the port with metrics.
    pub engine: Option<f64>,
    /// The model alone; absent where the server is elsewhere, or its batch is smaller than the number of clients.
    pub model: Option<f64>,
}

impl StepTimes {
    /// What is added to the model's step, as a share of it.
    pub fn overhead(&self) -> Option<f64> {
        self.model.map(|model| self.client / model - 1.0)
    }

    /// What is added to the forward inside the engine, as a share of it. Both are of the same steps: it is the less noisy one, and it does
    /// not see where the server slows the forward down.
    pub fn overhead_in_engine(&self) -> Option<f64> {
        self.engine.map(|engine| self.client / engine - 1.0)
    }
}

/// What one burst gave.
struct Burst {
    answers: Vec<Answer>,
    /// Pages at the first moment when all clients decode, and at the last.
    pages: Option<(Page, Page)>,
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
        let mut connections = Vec::with_capacity(self.clients);
        for _ in 0..self.clients {
            connections.push(target.client().await?);
        }
        let fits = self.clients <= facts.max_batch_requests;
        let mut alone = match subject.filter(|_| fits) {
            Some(subject) => {
                let blocks = cache_for(self.clients, self.prompt_tokens + config.generate).num_blocks;
                let mut runner = Runner::new(subject, blocks, config.step_tokens, config.seed)?;
                let sequences = runner.sequences(self.clients, self.prompt_tokens, config.generate, self.routing)?;
                Some((runner, sequences))
            }
            None => None,
        };
        self.burst(target, &mut connections, facts, config.generate.min(2), rng).await?;
        let (mut rates, mut first, mut gaps) = (Sample::default(), Sample::default(), Sample::default());
        let (mut client, mut engine, mut model) = (Sample::default(), Sample::default(), Sample::default());
        for _ in 0..config.repeats {
            if let Some((runner, sequences)) = &mut alone {
                let run = runner.decode_run(sequences, config.generate, self.routing)?;
                run.steps.median().into_iter().for_each(|step| model.push(step));
            }
            let burst = self.burst(target, &mut connections, facts, config.generate, rng).await?;
            rates.push(burst.tokens_per_second().ok_or_else(|| Error::Internal("a burst without tokens".into()))?);
            burst.answers.iter().filter_map(Answer::time_to_first_token).for_each(|seconds| first.push(seconds));
            burst.answers.iter().flat_map(Answer::gaps).for_each(|seconds| gaps.push(seconds));
            if let Some(seconds) = burst.client_step().filter(|_| fits) {
                client.push(seconds);
                burst.engine_step().into_iter().for_each(|seconds| engine.push(seconds));
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
            steps: client.median().map(|client| StepTimes { client, engine: engine.median(), model: model.median() }),
        })
    }

    /// One request of each client, all at once.
    async fn burst(
        self,
        target: &Target,
        connections: &mut [InferenceClient<Channel>],
        facts: &Facts,
        generate: usize,
        rng: &mut StdRng,
    ) -> Result<Burst> {
        let progress = watch::Sender::new((0usize, 0usize));
        let mut tasks = tokio::task::JoinSet::new();
        for connection in connections.iter() {
            let ask = Ask::random(rng, facts.vocab_size, self.prompt_tokens, generate, self.routing);
            let (mut connection, progress) = (connection.clone(), progress.clone());
            tasks.spawn(async move {
                let answer = ask.send(&mut connection, || progress.send_modify(|(started, _)| *started += 1)).await;
                progress.send_modify(|(_, ended)| *ended += 1);
                answer
            });
        }
        let (mut watcher, clients) = (progress.subscribe(), connections.len());
        let pages = async {
            watcher.wait_for(|&(started, ended)| started == clients || ended > 0).await.ok()?;
            let before = target.page().await.ok()??;
            watcher.wait_for(|&(_, ended)| ended > 0).await.ok()?;
            Some((before, target.page().await.ok()??))
        };
        let collect = async {
            let mut answers = Vec::with_capacity(clients);
            while let Some(answer) = tasks.join_next().await {
                answers.push(answer.map_err(|error| Error::Internal(format!("a client failed: {error}")))?);
            }
            Ok::<_, Error>(answers)
        };
        let (answers, pages) = tokio::join!(collect, pages);
        let answers = answers?;
        match answers.iter().find(|answer| !matches!(answer.end, End::Finished)) {
            Some(answer) => Err(Error::FailedPrecondition(format!("a request ended early: {}", describe(&answer.end)))),
            None => Ok(Burst { answers, pages }),
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

    fn client_step(&self) -> Option<f64> {
        let (start, end) = self.window()?;
        let steps = self.answers.iter().map(|answer| answer.seconds_per_token(start, end));
        steps.collect::<Option<Sample>>()?.median()
    }

    fn engine_step(&self) -> Option<f64> {
        let (before, after) = self.pages.as_ref()?;
        after.mean_since(before, "hardmax_step_seconds")
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
        Burst { answers: arrivals.iter().map(answer).collect(), pages: None }
    }

    #[test]
    fn a_step_counts_where_all_clients_decode() {
        // The first client waits for the prompt of the second, then both go on at 10 ms.
        let together = burst(&[&[10, 50, 60, 70, 80], &[50, 60, 70, 80, 90]]);
        assert!((together.client_step().unwrap() - 0.010).abs() < 1e-9);
        assert!((together.tokens_per_second().unwrap() - 10.0 / 0.09).abs() < 1e-6);
        assert_eq!(burst(&[&[10, 20], &[30, 40]]).client_step(), None, "never together");
    }

    #[test]
    fn overheads_are_shares_of_what_they_are_added_to() {
        let steps = StepTimes { client: 0.0103, engine: Some(0.0102), model: Some(0.01) };
        assert!((steps.overhead().unwrap() - 0.03).abs() < 1e-9);
        assert!((steps.overhead_in_engine().unwrap() - 1.0 / 102.0).abs() < 1e-9);
    }
}
