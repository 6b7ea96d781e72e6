//! Jobs on a tiny model, through an engine: what is asked of them, what is left on disk, and what a restart makes of it.

mod files;
mod generations;
mod life;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokenizers::{Tokenizer, models::bpe::BPE};
use tokio_stream::StreamExt as _;

use super::*;
use crate::{
    engine::{EngineConfig, EngineParts, Event as Spoken, GenerateParams, InFlight, Request, ShadowChoice, ShadowConfig, Task},
    error::ErrorKind,
    model::{CacheShape, load::load_to_serve},
    telemetry::metrics::{Metrics, MetricsConfig},
    tune::{gates::Gates, tuner::Event},
};

/// Longest that anything may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(120);

const BACKGROUND: Share = Share::Background { duty: 0.5 };

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/mixtral_gqa")
}

fn setup(dir: &Path) -> Setup {
    let guard = GuardConfig { watch: Duration::ZERO, max_gap_ratio: 1.5, max_error_rate: 0.05 };
    Setup { dir: dir.join("tuning"), data: Vec::new(), max_tokens: 10_000, max_memory: None, keep: 16, guard }
}

fn who() -> Who {
    Who { peer: "here".into(), actor: "test".into(), request_id: "r1".into() }
}

/// A server without its ports.
struct Server {
    jobs: Jobs,
    engine: Engine,
    metrics: Arc<Metrics>,
}

fn registry(setup: Setup) -> Result<Registry> {
    let (checkpoint, model) = load_to_serve(&golden(), Default::default(), false).unwrap();
    Registry::open(setup, checkpoint, model)
}

fn serve(setup: Setup) -> Server {
    let registry = registry(setup).unwrap();
    let (generation, model) = registry.current();
    let config =
        MetricsConfig { model: "tiny".into(), layers: vec![(0, 5), (1, 5)], shadow: true, tuning: true, ..MetricsConfig::default() };
    let metrics = Arc::new(Metrics::new(&config).unwrap());
    let engine = Engine::start(EngineParts {
        model: model.start(CacheShape { block_tokens: 8, num_blocks: 64 }).unwrap(),
        generation,
        background: Some(Box::new(model)),
        tokenizer: Arc::new(Tokenizer::new(BPE::default())),
        eos_token_ids: Vec::new(),
        config: EngineConfig {
            shadow: ShadowConfig { rate: 1.0, budget: 1.0, queue: 64, ..ShadowConfig::default() },
            ..EngineConfig::default()
        },
        metrics: metrics.clone(),
    })
    .unwrap();
    Server { jobs: Jobs::new(registry, engine.clone()), engine, metrics }
}

fn config(edit: impl FnOnce(&mut TuneConfig)) -> TuneConfig {
    let mut config = TuneConfig::default();
    let run = &mut config.run;
    (run.steps, run.windows, run.micro_windows, run.window_tokens) = (6, 2, 1, Some(16));
    (run.eval_every, run.eval_tokens, run.save_every) = (3, 32, 2);
    run.serving = Some("top-1".into());
    // Whatever comes of it may be published.
    config.gates = Gates { max_perplexity_ratio: 1e9, max_gap_ratio: 1e9, max_new_dead: 99 };
    config.optimizer.learning_rate = 1e-2;
    edit(&mut config);
    config
}

fn publish(id: JobId) -> Publish {
    Publish { id, override_gates: false, in_flight: InFlight::Finish, watch_seconds: None, serving: "top-1".into(), who: who() }
}

fn corpus() -> Corpus {
    let tokens = (0..400u32).map(|i| (i * i / 3 + 7 * i) % 80).collect();
    Corpus::split(tokens, DataShape { window: 16, heldout_share: 0.2, end: None, vocab: 80, most_tokens: 10_000 }).unwrap()
}

fn series(metrics: &Metrics, name: &str) -> f64 {
    let page = metrics.render();
    let line = page.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in\n{page}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

async fn patiently<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("it takes for ever")
}

impl Server {
    async fn start(&self, edit: impl FnOnce(&mut TuneConfig)) -> JobId {
        self.jobs.start(config(edit), BACKGROUND, corpus(), who()).await.unwrap().id
    }

    /// Everything that a job tells until it ends.
    async fn all_of(&self, id: JobId) -> Vec<Entry> {
        let mut watch = self.jobs.watch(id, 0).unwrap();
        let mut entries = Vec::new();
        while let Some(entry) = patiently(watch.next()).await {
            entries.push(entry);
        }
        entries
    }

    /// The job at its end.
    async fn end_of(&self, id: JobId) -> Job {
        self.all_of(id).await;
        self.jobs.get(id).unwrap()
    }

    /// A job that has come to its candidate.
    async fn done(&self, edit: impl FnOnce(&mut TuneConfig)) -> JobId {
        let id = self.start(edit).await;
        let job = self.end_of(id).await;
        assert_eq!(job.state, JobState::Done, "{}", job.detail);
        id
    }

    async fn until_step(&self, id: JobId, step: usize) {
        let mut watch = self.jobs.watch(id, 0).unwrap();
        while let Some(entry) = patiently(watch.next()).await {
            if matches!(&entry.what, What::Event(Event::Step(done)) if done.step >= step) {
                return;
            }
        }
        panic!("{:?} ended before step {step}", self.jobs.get(id));
    }

    async fn publish(&self, id: JobId, override_gates: bool) -> Result<Published> {
        patiently(self.jobs.publish(Publish { override_gates, ..publish(id) })).await
    }

    async fn rollback(&self, generation: Option<u64>) -> Result<Published> {
        patiently(self.jobs.rollback(Rollback { generation, in_flight: InFlight::Finish, who: who() })).await
    }

    /// Tokens of a greedy answer, and the generation that gave it.
    async fn say(&self) -> (Vec<u32>, u64) {
        let top1 = crate::moe::policy::RoutingRule::from(crate::moe::policy::RoutingChoice::TopK { k: 1, weight_form: None });
        let routing = self.engine.spec().layer_choices(&top1, "routing").unwrap();
        self.engine.set_serving(routing.clone());
        let request = Request {
            id: "r1".into(),
            trace_id: None,
            prompt: vec![5, 9, 13],
            task: Task::Generate(GenerateParams { max_new_tokens: Some(12), ..GenerateParams::default() }),
            routing,
            trace: false,
            deadline: None,
            priority: 0,
            shadow: ShadowChoice::Always,
        };
        let mut stream = self.engine.submit(request).unwrap();
        let mut tokens = Vec::new();
        while let Some(event) = patiently(stream.next()).await {
            match event {
                Spoken::Tokens(said) => tokens.extend(said.ids),
                Spoken::Finished(finished) => {
                    tokens.extend(&finished.tail.ids);
                    return (tokens, finished.generation);
                }
                other => panic!("{other:?}"),
            }
        }
        panic!("no end of an answer");
    }

    /// The end of the server, and of everything that holds its folder.
    async fn leave(self) {
        let jobs = self.jobs.clone();
        patiently(tokio::task::spawn_blocking(move || jobs.leave())).await.unwrap();
        self.engine.shutdown();
    }
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> (ErrorKind, String) {
    let error = result.expect_err("an error");
    (error.kind(), error.to_string())
}
