//! What watching costs: the throughput of an engine whose batch is always full, unwatched and watched in several ways, in turns.
//!
//! Every arm has an engine of its own over the same weights, and asks it the same requests in every turn. Arms run one after the other,
//! every turn beginning with another one, and each is compared with the first arm of its own turn. The second arm is the first again, and
//! says how much of a difference is noise: on a shared machine far more than what is looked for. So what can be timed by itself is
//! told as well: measuring samples, counting the load in each step, writing the page of a scrape.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Tensor};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde::Serialize;
use tokio::{task::JoinSet, time::sleep};

use super::{
    cpu_time::CpuTime,
    experiment::ExperimentConfig,
    stats::Sample,
    subject::{Subject, cache_for},
};
use crate::{
    engine::{
        Engine, EngineConfig, EngineParts, Event, FIRST_GENERATION, GenerateParams, PrefixCache, Request, ShadowChoice, ShadowConfig, Task,
    },
    error::{Error, Result},
    model::MoeSpec,
    moe::{LayerRouting, Routing, RoutingStats, SparseRouting, policy::RoutingChoice},
    telemetry::metrics::{ExpertMetrics, Metrics, MetricsConfig, SeriesOptions, Step},
};

/// Requests that each client sends in one turn, one after the other.
const REQUESTS: usize = 16;

/// How often a Prometheus is thought to scrape, as in docker/prometheus. Here each arm is scraped once a turn, which is more often.
const SCRAPE_EVERY: Duration = Duration::from_secs(5);

/// How often what takes microseconds is done to time it.
const TIMED: u32 = 200;

/// Resamples of an interval.
const RESAMPLES: usize = 1000;

/// How often an engine is asked whether it has measured all that it took.
const POLL: Duration = Duration::from_millis(5);

/// The arms, the unwatched one first.
const ARMS: &[Arm] = &[
    Arm { name: "nothing", watched: Watched::Nothing, watch: |_| {} },
    Arm { name: "nothing, again", watched: Watched::Nothing, watch: |_| {} },
    Arm { name: "shadow at 1 %", watched: Watched::Samples, watch: |setup| setup.engine.shadow.rate = 0.01 },
    Arm { name: "per-expert metrics", watched: Watched::Experts, watch: |setup| setup.metrics.series.experts = ExpertMetrics::PerExpert },
    Arm { name: "every request traced", watched: Watched::Nothing, watch: |setup| setup.request.trace = true },
];

/// A way to be watched.
struct Arm {
    name: &'static str,
    watched: Watched,
    /// Changes the unwatched setup.
    watch: fn(&mut Setup),
}

/// What of an arm is timed by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watched {
    Nothing,
    /// Measuring samples.
    Samples,
    /// Counting and writing the load of experts.
    Experts,
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
    /// What can be timed by itself.
    pub parts: Vec<Part>,
}

/// Work of the watching that is timed by itself.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Part {
    /// For people.
    pub name: &'static str,
    /// That it takes each time.
    pub seconds: f64,
    /// How often it is done under this load.
    pub per_second: f64,
}

/// One arm.
#[derive(Clone, Debug, Serialize)]
pub struct OverheadRow {
    /// For people.
    pub arm: &'static str,
    /// Generated tokens over the time of all turns.
    pub tokens_per_second: f64,
    /// Of the time of all requests.
    pub time: Difference,
    /// Of the CPU time of the engine and of the threads that compute. `None` where the system does not count it.
    pub cpu: Option<Difference>,
    /// Shadow samples measured.
    pub samples: u64,
    /// Shadow samples dropped.
    pub dropped: u64,
}

/// What an arm takes more than the first one, as a share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Difference {
    /// Sum over turns, over that of the first arm, less 1.
    pub share: f64,
    /// In which that of many more turns would lie, in 95 of 100 cases.
    pub interval: [f64; 2],
}

/// What one turn took.
#[derive(Clone, Copy)]
struct Turn {
    seconds: f64,
    cpu: Option<f64>,
    /// Seconds of it in which samples were measured.
    measuring: f64,
}

/// An arm at work.
struct Running {
    name: &'static str,
    watched: Watched,
    engine: Engine,
    metrics: Arc<Metrics>,
    request: Request,
    /// Tokens of all turns.
    tokens: f64,
    /// Seconds of all turns in which samples were measured.
    measuring: f64,
    /// Seconds of this arm and of the first one, in each turn.
    time: Vec<(f64, f64)>,
    /// As above.
    cpu: Vec<(f64, f64)>,
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
        parts: parts(&arms, subject, clients)?,
    })
}

/// What can be timed by itself, in the engines of `arms`, which are idle.
fn parts(arms: &[Running], subject: &Subject, clients: usize) -> Result<Vec<Part>> {
    let scrapes = 1.0 / SCRAPE_EVERY.as_secs_f64();
    let mut parts = Vec::new();
    for arm in arms {
        let seconds: f64 = arm.time.iter().map(|(own, _)| own).sum();
        match arm.watched {
            Watched::Samples => {
                let samples = arm.metrics.fidelity_snapshot().samples.max(1) as f64;
                let each = arm.metrics.measuring_seconds() / samples;
                // Those that were measured within the time of the turns.
                let per_second = if each > 0.0 { arm.measuring / seconds / each } else { 0.0 };
                parts.push(Part { name: "measuring a sample", seconds: each, per_second });
            }
            Watched::Experts => {
                let layers = routed(subject, clients)?;
                let step = Step { requests: clients, tokens: clients, layers: &layers, ..Step::default() };
                let counting = timed(|| arm.metrics.observe_step(&step));
                let steps = arm.tokens / clients as f64 / seconds;
                parts.push(Part { name: "counting a step", seconds: counting, per_second: steps });
                let page = timed(|| drop(std::hint::black_box(arm.metrics.render())));
                parts.push(Part { name: "a scrape with per-expert series", seconds: page, per_second: scrapes });
            }
            Watched::Nothing => {}
        }
    }
    Ok(parts)
}

/// Mean seconds of `work`.
fn timed(mut work: impl FnMut()) -> f64 {
    let begun = Instant::now();
    (0..TIMED).for_each(|_| work());
    begun.elapsed().as_secs_f64() / f64::from(TIMED)
}

/// A step of so many tokens, as the layers tell it.
fn routed(subject: &Subject, tokens: usize) -> Result<Vec<LayerRouting>> {
    let layer = |(layer, moe): (usize, &MoeSpec)| {
        let mut stats = RoutingStats { tokens: tokens as u64, routes: tokens as u64, ..RoutingStats::new(moe.num_experts) };
        (0..tokens).for_each(|token| stats.expert_tokens[token % moe.num_experts] += 1);
        let router_logits = Tensor::zeros((tokens, moe.num_experts), DType::F32, &Device::Cpu)?;
        Ok(LayerRouting { layer, router_logits, routing: Routing::Sparse(SparseRouting::default()), stats })
    };
    subject.spec.moe_layers().map(layer).collect()
}

impl Part {
    /// Of the time of the engine.
    pub fn share(&self) -> f64 {
        self.seconds * self.per_second
    }
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
            generation: FIRST_GENERATION,
            background: Some(subject.observables()),
            tokenizer: Arc::clone(&subject.tokenizer),
            eos_token_ids: Vec::new(),
            config: setup.engine,
            metrics: Arc::clone(&metrics),
        })?;
        Ok(Running {
            name: self.name,
            watched: self.watched,
            engine,
            metrics,
            request: setup.request,
            tokens: 0.0,
            measuring: 0.0,
            time: Vec::new(),
            cpu: Vec::new(),
        })
    }
}

impl Running {
    /// All requests of one turn. What they left to be measured is waited for after that, so that the next arm has the machine to itself:
    /// with requests that do not end, there would be no time for it, and it would be dropped.
    async fn turn(&self, clients: usize, config: &ExperimentConfig, turn: usize, vocab_size: u32) -> Result<Turn> {
        let mut work = JoinSet::new();
        let mut rng = StdRng::seed_from_u64(config.seed.wrapping_add(turn as u64));
        let mut prompt = || (0..config.prompt_tokens).map(|_| rng.random_range(0..vocab_size.max(1))).collect::<Vec<u32>>();
        let prompts: Vec<Vec<Vec<u32>>> = (0..clients).map(|_| (0..REQUESTS).map(|_| prompt()).collect()).collect();
        let measured = self.metrics.measuring_seconds();
        let (begun, before) = (Instant::now(), CpuTime::now());
        let metrics = Arc::clone(&self.metrics);
        work.spawn_blocking(move || {
            std::hint::black_box(metrics.render());
            Ok(())
        });
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
        let measuring = self.metrics.measuring_seconds() - measured;
        while self.metrics.fidelity_snapshot().pending > 0 {
            sleep(POLL).await;
        }
        Ok(Turn { seconds, cpu, measuring })
    }

    fn note(&mut self, turn: Turn, first: Turn, tokens: f64) {
        self.tokens += tokens;
        self.measuring += turn.measuring;
        self.time.push((turn.seconds, first.seconds));
        self.cpu.extend(turn.cpu.zip(first.cpu));
    }

    fn row(&self) -> OverheadRow {
        let snapshot = self.metrics.fidelity_snapshot();
        OverheadRow {
            arm: self.name,
            tokens_per_second: self.tokens / self.time.iter().map(|(own, _)| own).sum::<f64>(),
            time: Difference::of(&self.time).unwrap_or_default(),
            cpu: Difference::of(&self.cpu),
            samples: snapshot.samples,
            dropped: snapshot.dropped,
        }
    }
}

impl Difference {
    /// Of what this arm and the first one took in each turn. The interval is a bootstrap over turns. `None` without a turn.
    fn of(turns: &[(f64, f64)]) -> Option<Self> {
        let share = |turns: &mut dyn Iterator<Item = (f64, f64)>| {
            let (own, first) = turns.fold((0.0, 0.0), |sum, turn| (sum.0 + turn.0, sum.1 + turn.1));
            if first > 0.0 { own / first - 1.0 } else { 0.0 }
        };
        let mut rng = StdRng::seed_from_u64(0);
        let mut again = || share(&mut (0..turns.len()).map(|_| turns[rng.random_range(0..turns.len())]));
        let resampled: Sample = (0..RESAMPLES).map(|_| again()).collect();
        let interval = [resampled.percentile(2.5)?, resampled.percentile(97.5)?];
        (!turns.is_empty()).then(|| Self { share: share(&mut turns.iter().copied()), interval })
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
        assert_eq!(report.parts.len(), 3);
        assert!(report.parts.iter().skip(1).all(|part| part.share() > 0.0 && part.share() < 1.0), "{:?}", report.parts);
    }

    #[test]
    fn a_difference_is_of_the_sums_and_its_interval_shrinks() {
        assert_eq!(Difference::of(&[]), None);
        assert_eq!(Difference::of(&[(0.0, 0.0)]), Some(Difference::default()), "a clock that stands still");
        // Turns of one or two seconds, of which every third costs this arm 3 % more: 1 % of all.
        let turn = |i: usize| (1.0 + (i % 2) as f64, [1.03, 1.0, 1.0][i % 3]);
        let turns = |n: usize| (0..n).map(|i| (turn(i).0 * turn(i).1, turn(i).0)).collect::<Vec<_>>();
        let width = |n: usize| {
            let Difference { share, interval: [low, high] } = Difference::of(&turns(n)).unwrap();
            assert!((share - 0.01).abs() < 1e-12 && low < share && share < high, "{share}: {low} to {high}");
            high - low
        };
        let ratio = width(60) / width(960);
        assert!((3.0..5.3).contains(&ratio), "a fourth for sixteen times the turns: {ratio}");
    }
}
