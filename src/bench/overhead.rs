//! What watching costs: the throughput of an engine whose batch is always full, unwatched and watched in several ways, in turns.
//!
//! Every arm has an engine of its own over the same weights, and asks it the same requests in every turn. Arms run one after the other,
//! each turn beginning with another one, and each is compared with the first arm of its own turn. The second one is the first again, and
//! says how much of a difference is noise. On a shared machine the time of a turn swings far more than what is looked for, the CPU time
//! that it took much less; so both are told, each with an interval for its median.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde::Serialize;
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep},
};

use super::{
    cpu_time::CpuTime,
    experiment::ExperimentConfig,
    stats::Sample,
    subject::{Subject, cache_for},
};
use crate::{
    engine::{Engine, EngineConfig, EngineParts, Event, GenerateParams, PrefixCache, Request, ShadowChoice, ShadowConfig, Task},
    error::{Error, Result},
    moe::policy::RoutingChoice,
    telemetry::metrics::{ExpertMetrics, Metrics, MetricsConfig, SeriesOptions},
};

/// Requests that each client sends in one turn, one after the other.
const REQUESTS: usize = 16;

/// How often the metrics of every arm are read while it works: more often than a Prometheus does.
const SCRAPE: Duration = Duration::from_secs(1);

/// How often an engine is asked whether it has measured all that it took.
const POLL: Duration = Duration::from_millis(5);

/// The arms, the unwatched one first.
const ARMS: &[Arm] = &[
    Arm { name: "nothing", watch: |_| {} },
    Arm { name: "nothing, again", watch: |_| {} },
    Arm { name: "shadow at 1 %", watch: |setup| setup.engine.shadow.rate = 0.01 },
    Arm { name: "per-expert metrics", watch: |setup| setup.metrics.series.experts = ExpertMetrics::PerExpert },
    Arm { name: "every request traced", watch: |setup| setup.request.trace = true },
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
    /// Of the time of a turn.
    pub time: Difference,
    /// Of the CPU time of the engine and of the threads that compute, in a turn. `None` where the system does not count it.
    pub cpu: Option<Difference>,
    /// Shadow samples measured.
    pub samples: u64,
    /// Shadow samples dropped.
    pub dropped: u64,
}

/// What an arm takes more than the first one, as a share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Difference {
    /// Over that of the first arm in the same turn, less 1: median over turns.
    pub median: f64,
    /// In which the median of many more turns would lie, in 95 of 100 cases.
    pub interval: [f64; 2],
}

/// What one turn took.
#[derive(Clone, Copy)]
struct Turn {
    seconds: f64,
    cpu: Option<f64>,
}

/// An arm at work.
struct Running {
    name: &'static str,
    engine: Engine,
    metrics: Arc<Metrics>,
    request: Request,
    rate: Sample,
    time: Sample,
    cpu: Sample,
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
        let mut took = vec![None; arms.len()];
        for place in 0..arms.len() {
            let arm = (turn + place) % arms.len();
            took[arm] = Some(arms[arm].turn(clients, config, turn, spec.vocab_size as u32).await?);
        }
        // The first turn warms up.
        if let (Some(first), true) = (took[0], turn > 0) {
            let tokens = (clients * REQUESTS * config.generate) as f64;
            arms.iter_mut().zip(took.into_iter().flatten()).for_each(|(arm, turn)| arm.note(turn, first, tokens));
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
                series: SeriesOptions { experts: ExpertMetrics::Off, ..SeriesOptions::default() },
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
        let [rate, time, cpu] = [const { Sample::new() }; 3];
        Ok(Running { name: self.name, engine, metrics, request: setup.request, rate, time, cpu })
    }
}

impl Running {
    /// All requests of one turn. What they left to be measured is waited for after that, so that the next arm has the machine
    /// to itself.
    async fn turn(&self, clients: usize, config: &ExperimentConfig, turn: usize, vocab_size: u32) -> Result<Turn> {
        let mut work = JoinSet::new();
        let mut rng = StdRng::seed_from_u64(config.seed.wrapping_add(turn as u64));
        let mut prompt = || (0..config.prompt_tokens).map(|_| rng.random_range(0..vocab_size.max(1))).collect::<Vec<u32>>();
        let prompts: Vec<Vec<Vec<u32>>> = (0..clients).map(|_| (0..REQUESTS).map(|_| prompt()).collect()).collect();
        let (begun, before) = (Instant::now(), CpuTime::now());
        let scraper = tokio::spawn(scrape(Arc::clone(&self.metrics)));
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
        let cpu = CpuTime::now().zip(before).map(|(now, before)| now - before).map(|used| (used.compute + used.engine).as_secs_f64());
        scraper.abort();
        while self.metrics.fidelity_snapshot().pending > 0 {
            sleep(POLL).await;
        }
        Ok(Turn { seconds, cpu })
    }

    fn note(&mut self, turn: Turn, first: Turn, tokens: f64) {
        self.rate.push(tokens / turn.seconds);
        self.time.push(turn.seconds / first.seconds - 1.0);
        if let (Some(cpu), Some(first)) = (turn.cpu, first.cpu.filter(|&cpu| cpu > 0.0)) {
            self.cpu.push(cpu / first - 1.0);
        }
    }

    fn row(&self) -> OverheadRow {
        let snapshot = self.metrics.fidelity_snapshot();
        OverheadRow {
            arm: self.name,
            tokens_per_second: self.rate.median().unwrap_or(0.0),
            time: Difference::of(&self.time),
            cpu: (!self.cpu.is_empty()).then(|| Difference::of(&self.cpu)),
            samples: snapshot.samples,
            dropped: snapshot.dropped,
        }
    }
}

impl Difference {
    fn of(sample: &Sample) -> Self {
        Self { median: sample.median().unwrap_or(0.0), interval: sample.median_interval().unwrap_or_default() }
    }
}

/// Reads the metrics until it is ended.
async fn scrape(metrics: Arc<Metrics>) {
    let mut ticks = interval(SCRAPE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        std::hint::black_box(metrics.render());
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
        assert_eq!((report.rows[0].time, report.rows[0].samples), (Difference::default(), 0));
        assert!(report.rows.iter().all(|row| row.tokens_per_second > 0.0));
        let within = |it: &Difference| it.interval[0] <= it.median && it.median <= it.interval[1];
        assert!(report.rows.iter().all(|row| within(&row.time) && row.cpu.is_none_or(|cpu| within(&cpu))), "{report:?}");
    }
}
