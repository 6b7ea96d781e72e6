//! What watching costs: the throughput of an engine whose batch is always full, unwatched and watched in several ways, in turns.
//!
//! Every arm has an engine of its own over the same weights, and asks it the same requests in every turn. Arms take turns, and each is
//! compared with the first arm of its own turn; the second one is the first again, and says how much of a difference is noise.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde::Serialize;
use tokio::{task::JoinSet, time::sleep};

use super::{
    experiment::ExperimentConfig,
    stats::Sample,
    subject::{Subject, cache_for},
};
use crate::{
    engine::{Engine, EngineConfig, EngineParts, Event, GenerateParams, PrefixCache, Request, ShadowChoice, ShadowConfig, Task},
    error::{Error, Result},
    moe::policy::RoutingChoice,
    telemetry::metrics::{Metrics, MetricsConfig},
};

/// Requests that each client sends in one turn, one after the other.
const REQUESTS: usize = 8;

/// How often an engine is asked whether it has measured all that it took.
const POLL: Duration = Duration::from_millis(5);

/// The arms, the unwatched one first.
const ARMS: &[Arm] = &[
    Arm { name: "nothing", watch: |_| {} },
    Arm { name: "nothing, again", watch: |_| {} },
    Arm { name: "shadow at 1 %", watch: |setup| setup.engine.shadow.rate = 0.01 },
];

/// A way to be watched.
struct Arm {
    name: &'static str,
    /// Changes the unwatched setup.
    watch: fn(&mut Setup),
}

/// All that an arm may change.
struct Setup {
    engine: EngineConfig,
    metrics: MetricsConfig,
    /// Its prompt and id are those of a turn.
    request: Request,
}

/// Throughput of every arm.
#[derive(Clone, Debug, Serialize)]
pub struct OverheadReport {
    /// Requests at once.
    pub clients: usize,
    /// Routing of all of them.
    pub routing: String,
    /// Length of each prompt.
    pub prompt_tokens: usize,
    /// Tokens that each request generates.
    pub generate: usize,
    /// How often each arm ran.
    pub turns: usize,
    /// By arm.
    pub rows: Vec<OverheadRow>,
}

/// One arm.
#[derive(Clone, Debug, Serialize)]
pub struct OverheadRow {
    /// For people.
    pub arm: &'static str,
    /// Median over turns: generated tokens over the time of all requests of a turn.
    pub tokens_per_second: f64,
    /// Median over turns of the time of this arm over that of the first, less 1.
    pub overhead: f64,
    /// The least of any turn.
    pub least: f64,
    /// The most of any turn.
    pub most: f64,
    /// Shadow samples measured.
    pub samples: u64,
    /// Shadow samples dropped.
    pub dropped: u64,
}

/// An arm at work.
struct Running {
    name: &'static str,
    engine: Engine,
    metrics: Arc<Metrics>,
    request: Request,
    rate: Sample,
    overhead: Sample,
}

/// Runs every arm in every turn, with as many requests at once as the largest batch of `config`.
///
/// Fails where `routing` is the reference routing of the model: then a shadow has nothing to measure.
pub async fn measure(subject: &Subject, routing: RoutingChoice, config: &ExperimentConfig) -> Result<OverheadReport> {
    let spec = &subject.spec;
    let policies = |choice| spec.moe_layers().map(|(_, moe)| moe.resolve(choice, spec.reference)).collect::<Result<Vec<_>>>();
    if policies(routing)? == policies(spec.reference.choice())? {
        let message = format!("{routing} is what the model was trained under, so that nothing is measured: choose another, as top-1");
        return Err(Error::invalid("--routing", message));
    }
    let clients = config.batches.iter().copied().max().unwrap_or(1);
    let mut arms = ARMS.iter().map(|arm| arm.start(subject, routing, clients, config)).collect::<Result<Vec<_>>>()?;
    for turn in 0..=config.repeats {
        let mut first = None;
        for arm in &mut arms {
            let seconds = arm.turn(clients, config, turn, spec.vocab_size as u32).await?;
            let tokens = (clients * REQUESTS * config.generate) as f64;
            // The first turn warms up.
            if turn > 0 {
                arm.rate.push(tokens / seconds);
                arm.overhead.push(seconds / *first.get_or_insert(seconds) - 1.0);
            }
        }
    }
    Ok(OverheadReport {
        clients,
        routing: routing.to_string(),
        prompt_tokens: config.prompt_tokens,
        generate: config.generate,
        turns: config.repeats,
        rows: arms.iter().map(Running::row).collect(),
    })
}

impl Arm {
    fn start(&self, subject: &Subject, routing: RoutingChoice, clients: usize, config: &ExperimentConfig) -> Result<Running> {
        let spec = &subject.spec;
        let params = GenerateParams { max_new_tokens: Some(config.generate), ignore_eos: true, ..GenerateParams::default() };
        let mut setup = Setup {
            engine: EngineConfig {
                max_batch_requests: clients,
                max_new_tokens: config.generate.max(1),
                prefix_cache: PrefixCache::Off,
                shadow: ShadowConfig { rate: 0.0, ..ShadowConfig::default() },
                ..EngineConfig::default()
            },
            metrics: MetricsConfig {
                model: subject.name.clone(),
                layers: spec.moe_layers().map(|(layer, moe)| (layer, moe.num_experts)).collect(),
                num_layers: spec.layers.len(),
                max_context: spec.max_context,
                shadow: true,
                ..MetricsConfig::default()
            },
            request: Request {
                id: self.name.into(),
                trace_id: None,
                prompt: Vec::new(),
                task: Task::Generate(params),
                routing: routing.into(),
                trace: false,
                deadline: None,
                priority: 0,
                shadow: ShadowChoice::Sampled,
            },
        };
        (self.watch)(&mut setup);
        let metrics = Arc::new(Metrics::new(&setup.metrics)?);
        let engine = Engine::start(EngineParts {
            model: subject.model(cache_for(clients, config.prompt_tokens + config.generate))?,
            background: Some(subject.observables()),
            tokenizer: Arc::clone(&subject.tokenizer),
            eos_token_ids: Vec::new(),
            config: setup.engine,
            metrics: Arc::clone(&metrics),
        })?;
        Ok(Running { name: self.name, engine, metrics, request: setup.request, rate: Sample::default(), overhead: Sample::default() })
    }
}

impl Running {
    /// All requests of one turn, in seconds. What they left to be measured is waited for after that, so that the next arm has the machine
    /// to itself.
    async fn turn(&self, clients: usize, config: &ExperimentConfig, turn: usize, vocab_size: u32) -> Result<f64> {
        let mut work = JoinSet::new();
        let mut rng = StdRng::seed_from_u64(config.seed.wrapping_add(turn as u64));
        let mut prompt = || (0..config.prompt_tokens).map(|_| rng.random_range(0..vocab_size.max(1))).collect::<Vec<u32>>();
        let prompts: Vec<Vec<Vec<u32>>> = (0..clients).map(|_| (0..REQUESTS).map(|_| prompt()).collect()).collect();
        let begun = Instant::now();
        for prompts in prompts {
            let (engine, request) = (self.engine.clone(), self.request.clone());
            work.spawn(async move {
                for prompt in prompts {
                    complete(&engine, Request { prompt, ..request.clone() }).await?;
                }
                Ok::<(), Error>(())
            });
        }
        while let Some(client) = work.join_next().await {
            client.map_err(|error| Error::Internal(format!("a client failed: {error}")))??;
        }
        let seconds = begun.elapsed().as_secs_f64();
        while self.metrics.fidelity_snapshot().pending > 0 {
            sleep(POLL).await;
        }
        Ok(seconds)
    }

    fn row(&self) -> OverheadRow {
        let snapshot = self.metrics.fidelity_snapshot();
        let overhead = |percent| self.overhead.percentile(percent).unwrap_or(0.0);
        OverheadRow {
            arm: self.name,
            tokens_per_second: self.rate.median().unwrap_or(0.0),
            overhead: overhead(50.0),
            least: overhead(0.0),
            most: overhead(100.0),
            samples: snapshot.samples,
            dropped: snapshot.dropped,
        }
    }
}

/// One request to its end.
async fn complete(engine: &Engine, request: Request) -> Result<()> {
    let mut stream = engine.submit(request)?;
    while let Some(event) = stream.recv().await {
        if let Event::Failed(error) = event {
            return Err(error);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        bench::{Placement, Source},
        model::load::{DeviceKind, WeightType},
        ops::cpu::Reduction,
    };

    #[tokio::test]
    async fn every_arm_runs_in_every_turn() {
        let placement = Placement { device: DeviceKind::Cpu, weights: WeightType::F32, reduction: Reduction::Fastest, seed: 3 };
        let subject = Subject::load(&Source::Synthetic("tiny".parse().unwrap()), placement).unwrap();
        let config = ExperimentConfig {
            repeats: 3,
            rows_per_expert: 1,
            prompt_tokens: 8,
            batches: vec![1, 4],
            generate: 3,
            tie_tolerance: 0.0,
            seed: 1,
        };
        let error = measure(&subject, RoutingChoice::Native, &config).await.unwrap_err().to_string();
        assert!(error.starts_with("--routing: native is what the model was trained under"), "{error}");
        let top_1 = RoutingChoice::TopK { k: 1, weight_form: None };
        let report = measure(&subject, top_1, &config).await.unwrap();
        assert_eq!((report.clients, report.turns, report.rows.len()), (4, 3, ARMS.len()));
        assert_eq!((report.rows[0].overhead, report.rows[0].samples), (0.0, 0));
        assert!(report.rows.iter().all(|row| row.tokens_per_second > 0.0 && row.least <= row.overhead && row.overhead <= row.most));
    }
}
