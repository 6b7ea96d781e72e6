//! Work below requests, on a small random checkpoint: what it measures is what an offline run measures, and no request feels it.

use std::sync::{Mutex, atomic::AtomicBool, mpsc};

use candle_core::{DType, Device};

use super::*;
use crate::{
    checkpoint::{Checkpoint, LoadOptions},
    engine::{
        background::{Background, Load, Source},
        measure::Measurement,
        status::Shared,
        worker::Clock,
    },
    fidelity::{case::Case, probe::Probe, run},
    model::{
        Forward, Observable, ReferenceRouting, SharedWeights,
        load::{ServingModel, ServingOptions},
        weights::FeedForwardWeights,
    },
    moe::{
        observe::MoeObserver,
        policy::{RoutingChoice, WeightForm},
    },
    ops::cpu::Reduction,
    telemetry::fidelity::FidelitySnapshot,
};

const ROOM: CacheShape = CacheShape { block_tokens: 8, num_blocks: 64 };
const TOP_1: RoutingChoice = RoutingChoice::TopK { k: 1, weight_form: None };

/// Experts of each layer of [`weights`].
const ALL: usize = 5;

/// A checkpoint whose native routing is top-2, in arithmetic that does not depend on how its tokens come in pieces.
fn weights(reference: ReferenceRouting) -> ServingModel {
    scaled(reference, 1.0)
}

/// The same with routers `routers` times as large.
fn scaled(reference: ReferenceRouting, routers: f64) -> ServingModel {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/mixtral_gqa");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let mut weights = checkpoint.load(&LoadOptions { dtype: DType::F32, device: Device::Cpu, progress: false }).unwrap();
    for layer in &mut weights.layers {
        if let FeedForwardWeights::Moe(moe) = &mut layer.feed_forward {
            moe.router = (&moe.router * routers).unwrap();
        }
    }
    let spec = ModelSpec { reference, ..checkpoint.spec().clone() };
    assert!(spec.moe_layers().all(|(_, moe)| moe.num_experts == ALL && moe.top_k == 2));
    let options = ServingOptions { reduction: Reduction::BatchInvariant, ..ServingOptions::default() };
    ServingModel::new(Arc::new(spec), weights, options).unwrap()
}

fn soft() -> ServingModel {
    weights(ReferenceRouting::Soft { temperature: 1.0 })
}

/// Everything that asks is measured, as soon as it can be.
fn all_that_ask() -> EngineConfig {
    let shadow = ShadowConfig { rate: 0.0, budget: 1.0, queue: 64, ..ShadowConfig::default() };
    EngineConfig { max_queue_requests: 64, shadow, measure: MeasureConfig { budget: 1.0, ..MeasureConfig::default() }, ..fake::config() }
}

fn start_over(weights: &ServingModel, source: impl ObservableSource + 'static, config: EngineConfig) -> (Engine, Arc<Metrics>) {
    start_with_clock(weights, source, config, Box::new(Instant::now))
}

fn start_with_clock(
    weights: &ServingModel,
    source: impl ObservableSource + 'static,
    config: EngineConfig,
    clock: Clock,
) -> (Engine, Arc<Metrics>) {
    let layers = weights.spec().moe_layers().map(|(layer, moe)| (layer, moe.num_experts)).collect();
    let facts = MetricsConfig { model: "golden".into(), layers, max_context: 64, shadow: true, ..MetricsConfig::default() };
    let metrics = Arc::new(Metrics::new(&facts).unwrap());
    let parts = EngineParts {
        model: weights.start(ROOM).unwrap(),
        generation: FIRST_GENERATION,
        background: Some(Box::new(source)),
        tokenizer: fake::tokenizer(),
        eos_token_ids: vec![],
        config,
        metrics: metrics.clone(),
    };
    (Engine::start_with_clock(parts, clock).unwrap(), metrics)
}

fn text(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 31 + i * i * 7) % 80).collect()
}

fn always(routing: RoutingChoice, request: Request) -> Request {
    Request { routing: routing.into(), shadow: ShadowChoice::Always, ..request }
}

/// The snapshot once so many samples have come to an end.
async fn ended(metrics: &Metrics, samples: u64) -> FidelitySnapshot {
    let end = async {
        loop {
            let snapshot = metrics.fidelity_snapshot();
            if snapshot.samples + snapshot.same + snapshot.other_routing + snapshot.dropped >= samples {
                return snapshot;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, end).await.expect("samples come to an end")
}

fn outcome(metrics: &Metrics, outcome: &str) -> f64 {
    series(metrics, &format!("hardmax_fidelity_samples_total{{model=\"golden\",outcome=\"{outcome}\"}}"))
}

fn near(found: f64, expected: f64, what: &str) {
    assert!((found - expected).abs() < 1e-9, "{what}: {found} instead of {expected}");
}

/// What a source's models do before a forward.
#[derive(Clone)]
struct Watched {
    weights: ServingModel,
    before: Arc<dyn Fn() + Send + Sync>,
    started: Arc<AtomicU32>,
}

impl Watched {
    fn new(weights: &ServingModel, before: impl Fn() + Send + Sync + 'static) -> Self {
        Self { weights: weights.clone(), before: Arc::new(before), started: Arc::default() }
    }
}

impl ObservableSource for Watched {
    fn start(&self, cache: CacheShape) -> Result<Box<dyn Observable>> {
        self.started.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(WatchedModel(self.weights.start_observable(cache)?, self.before.clone())))
    }
}

struct WatchedModel(Box<dyn Observable>, Arc<dyn Fn() + Send + Sync>);

impl LanguageModel for WatchedModel {
    fn spec(&self) -> &ModelSpec {
        self.0.spec()
    }

    fn cache(&self) -> CacheShape {
        self.0.cache()
    }

    fn forward(&mut self, batch: &Batch) -> Result<Forward> {
        self.0.forward(batch)
    }

    fn exchange(&mut self, weights: SharedWeights) -> Result<SharedWeights> {
        self.0.exchange(weights)
    }
}

impl Observable for WatchedModel {
    fn forward_observed(&mut self, batch: &Batch, observer: &mut dyn MoeObserver) -> Result<Forward> {
        (self.1)();
        self.0.forward_observed(batch, observer)
    }
}

/// A source whose forwards wait to be let through, each told of when it begins.
#[expect(clippy::disallowed_methods, reason = "a test sends a handful of messages")]
fn gated(weights: &ServingModel) -> (Watched, mpsc::Receiver<()>, mpsc::Sender<()>) {
    let (began, begins) = mpsc::channel();
    let (go, gate) = mpsc::channel();
    let gate = Mutex::new(gate);
    let before = move || {
        let _ = began.send(());
        // Once the test has let go of its end, everything passes.
        let _ = gate.lock().unwrap().recv_timeout(PATIENCE);
    };
    (Watched::new(weights, before), begins, go)
}

#[tokio::test]
async fn whoever_asks_is_measured_as_an_offline_run_would() {
    for max_tokens in [512, 20] {
        let weights = soft();
        let config = all_that_ask();
        let config = EngineConfig { shadow: ShadowConfig { max_tokens, ..config.shadow }, ..config };
        let (engine, metrics) = start_over(&weights, weights.clone(), config);
        let mut texts = Vec::new();
        for n in 0..5 {
            let choices = if n == 3 { 3 } else { 1 };
            let prompt = text(9 + 5 * n);
            let request = generate(&prompt, |p| (p.n, p.max_new_tokens, p.temperature, p.seed) = (choices, Some(8), 1.5, n as u64));
            for answer in collect_choices(engine.submit(always(TOP_1, request)).unwrap(), choices).await {
                let all: Vec<u32> = prompt.iter().chain(&answer.ids).copied().take(max_tokens).collect();
                texts.push(all);
            }
        }
        let score = always(TOP_1, Request { task: Task::Score { alternatives: 0 }, ..fake::request(&text(30)) });
        assert!(ask(&engine, score).await.end.is_ok());
        texts.push(text(30.min(max_tokens)));
        let found = ended(&metrics, texts.len() as u64).await;

        let cases = [RoutingChoice::Soft { temperature: None }, TOP_1].map(Case::from);
        let windows: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        let mut probe = Probe::of_gaps(weights.spec(), &cases).unwrap();
        let expected = run::run(&weights, &cases, &windows, Some(&mut probe), &mut |_| {}).unwrap()[0];
        assert_eq!((found.samples, found.dropped, found.tokens), (8, 0, expected.tokens));
        assert!(found.kl > 1e-4 && expected.tokens == texts.iter().map(|text| text.len() as u64).sum::<u64>());
        near(found.kl, expected.kl.mean, "kl");
        near(found.js, expected.js.mean, "js");
        near(found.logit_l2, expected.logit_l2.mean, "logit_l2");
        near(found.top1_agree, expected.top1_agree, "top-1");
        near(found.perplexity_gap, expected.perplexity.gap, "perplexity");
        assert_eq!(found.layers.len(), probe.layers.len());
        for (found, layer) in found.layers.iter().zip(&probe.layers) {
            let gap = &layer.gaps[0];
            assert_eq!(found.layer, layer.layer);
            near(found.l2_rel, gap.l2_rel.mean(), "l2_rel");
            near(found.cosine_distance, gap.cosine.mean(), "cosine");
            near(found.missed_mass, gap.missed_mass.mean(), "missed mass");
            near(found.overlap, gap.overlap.mean(), "overlap");
            let series_of = |measure: &str| {
                series(
                    &metrics,
                    &format!("hardmax_routing_fidelity_gap_sum{{model=\"golden\",layer=\"{}\",measure=\"{measure}\"}}", layer.layer),
                )
            };
            assert_eq!(series_of("argmax_disagree"), gap.argmax_disagree as f64);
        }
        assert!(series(&metrics, "hardmax_shadow_seconds_total") > 0.0);
        assert_eq!(series(&metrics, "hardmax_fidelity_samples_pending"), 0.0);
        super::cache::nothing_is_left(&engine, &metrics).await;
    }
}

#[tokio::test]
async fn no_request_feels_it() {
    let weights = soft();
    let answers = async |rate: f64| {
        let config = all_that_ask();
        let config = EngineConfig { shadow: ShadowConfig { rate, ..config.shadow }, ..config };
        let (engine, metrics) = start_over(&weights, weights.clone(), config);
        let requests = (0..12).map(|n| {
            let request = generate(&text(3 + 4 * n), |p| {
                (p.max_new_tokens, p.temperature, p.seed, p.logprobs) = (Some(10), if n % 2 == 0 { 0.0 } else { 0.8 }, n as u64, Some(2));
            });
            Request { routing: TOP_1.into(), ..request }
        });
        let streams: Vec<EventStream> = requests.map(|request| engine.submit(request).unwrap()).collect();
        let mut answers = Vec::new();
        for stream in streams {
            let answer = collect(stream).await;
            assert!(answer.end.is_ok());
            answers.push((answer.ids, answer.logprobs));
        }
        (answers, if rate > 0.0 { ended(&metrics, 12).await.samples } else { metrics.fidelity_snapshot().samples })
    };
    let (with, without) = (answers(1.0).await, answers(0.0).await);
    assert_eq!((with.1, without.1), (12, 0));
    assert!(with.0 == without.0, "tokens and their probabilities are the same bits");
}

#[tokio::test]
async fn equal_routings_have_no_gap() {
    let weights = soft();
    let (engine, metrics) = start_over(&weights, weights.clone(), all_that_ask());
    let all = RoutingChoice::TopK { k: ALL, weight_form: Some(WeightForm::Renorm) };
    ask(&engine, always(all, tokens(&text(20), 8))).await;
    let found = ended(&metrics, 1).await;
    assert!((found.samples, found.tokens) == (1, 28) && found.kl < 1e-9 && found.logit_l2 < 1e-5 && found.top1_agree == 1.0, "{found:?}");
    assert!(found.layers.iter().all(|layer| layer.l2_rel < 1e-6 && layer.missed_mass == 0.0 && layer.overlap == 1.0), "{found:?}");
    for temperature in [None, Some(1.0)] {
        ask(&engine, always(RoutingChoice::Soft { temperature }, tokens(&text(20), 8))).await;
    }
    assert_eq!((outcome(&metrics, "same"), outcome(&metrics, "done")), (2.0, 1.0), "the same policies are not even run");

    // What is served as it was trained has no gap whatever the traffic.
    let weights = self::weights(ReferenceRouting::OwnTopK { assumed: true });
    let source = Watched::new(&weights, || ());
    let (engine, metrics) = start_over(&weights, source.clone(), all_that_ask());
    ask(&engine, always(RoutingChoice::Native, tokens(&text(20), 8))).await;
    assert_eq!((outcome(&metrics, "same"), source.started.load(Ordering::SeqCst)), (1.0, 0));
}

#[tokio::test]
async fn what_is_off_costs_nothing() {
    let weights = soft();
    let off = ShadowConfig { rate: 1.0, ..ShadowConfig::off() };
    let never = ShadowConfig { rate: 0.0, ..all_that_ask().shadow };
    for (shadow, choice) in [(off, ShadowChoice::Always), (never.clone(), ShadowChoice::Sampled), (never, ShadowChoice::Never)] {
        let source = Watched::new(&weights, || ());
        let (engine, metrics) = start_over(&weights, source.clone(), EngineConfig { shadow, ..all_that_ask() });
        ask(&engine, Request { shadow: choice, routing: TOP_1.into(), ..tokens(&text(20), 8) }).await;
        tokio::time::timeout(PATIENCE, engine.drained()).await.unwrap();
        assert_eq!(source.started.load(Ordering::SeqCst), 0);
        let snapshot = metrics.fidelity_snapshot();
        assert_eq!((snapshot.samples, snapshot.same, snapshot.dropped), (0, 0, 0));
    }
}

#[tokio::test]
async fn what_is_dropped_is_counted() {
    let weights = soft();
    let (source, begins, go) = gated(&weights);
    let config = all_that_ask();
    let config = EngineConfig { shadow: ShadowConfig { rate: 1.0, queue: 2, budget: 1e-9, ..config.shadow }, ..config };
    let (engine, metrics) = start_over(&weights, source, config.clone());
    // Nothing is paid for while a choice runs: two wait, and two have no place.
    let request = || Request { routing: TOP_1.into(), ..generate(&text(30), |p| (p.n, p.max_new_tokens) = (4, Some(4))) };
    collect_choices(engine.submit(request()).unwrap(), 4).await;
    begins.recv_timeout(PATIENCE).unwrap();
    assert_eq!((outcome(&metrics, "dropped_queue"), series(&metrics, "hardmax_fidelity_samples_pending")), (2.0, 2.0));
    engine.drain();
    drop(go);
    let snapshot = ended(&metrics, 4).await;
    assert_eq!((snapshot.samples, outcome(&metrics, "dropped_draining")), (0, 2.0));
    assert_eq!(series(&metrics, "hardmax_fidelity_samples_pending"), 0.0);

    // Those that ask have half of the places, and what they lose is counted apart.
    let (engine, metrics) = start_over(&weights, weights.clone(), config);
    collect_choices(engine.submit(always(TOP_1, request())).unwrap(), 4).await;
    let snapshot = ended(&metrics, 4).await;
    assert_eq!((snapshot.samples, outcome(&metrics, "dropped_asked"), outcome(&metrics, "dropped_queue")), (1, 3.0, 0.0));

    let (engine, metrics) = start_over(&weights, weights.clone(), all_that_ask());
    let short = Request { task: Task::Score { alternatives: 0 }, ..fake::request(&[7]) };
    ask(&engine, always(TOP_1, short)).await;
    ended(&metrics, 1).await;
    assert_eq!(outcome(&metrics, "dropped_short"), 1.0);
}

#[tokio::test]
async fn only_the_routing_in_force_is_the_gap_of_the_server() {
    let weights = soft();
    let (source, begins, go) = gated(&weights);
    let config = all_that_ask();
    let config = EngineConfig { shadow: ShadowConfig { rate: 1.0, ..config.shadow }, ..config };
    let (engine, metrics) = start_over(&weights, source, config);
    let serve = async |routing: RoutingChoice, shadow| {
        assert!(ask(&engine, Request { routing: routing.into(), shadow, ..tokens(&text(20), 8) }).await.end.is_ok());
    };
    engine.set_serving(RoutingChoice::TopK { k: 2, weight_form: None }.into());

    serve(TOP_1, ShadowChoice::Sampled).await;
    assert_eq!(outcome(&metrics, "other_routing"), 1.0, "it has chosen for itself");
    assert!(begins.try_recv().is_err(), "and is not even measured");

    // In force by another name, until it is measured.
    serve(RoutingChoice::Native, ShadowChoice::Sampled).await;
    begins.recv_timeout(PATIENCE).unwrap();
    engine.set_serving(TOP_1.into());
    drop(go);
    assert_eq!(ended(&metrics, 2).await.other_routing, 2);

    begins.try_iter().for_each(drop);
    serve(RoutingChoice::Native, ShadowChoice::Always).await;
    let found = ended(&metrics, 3).await;
    assert_eq!((found.other_routing, found.samples, found.dropped, found.tokens), (3, 0, 0, 0));
    assert!(begins.try_recv().is_ok(), "who asks is measured, under whatever routing");
    assert_eq!(series(&metrics, "hardmax_output_fidelity_gap_count{model=\"golden\",measure=\"kl\"}"), 0.0);

    serve(TOP_1, ShadowChoice::Sampled).await;
    let found = ended(&metrics, 4).await;
    assert_eq!((found.other_routing, found.samples, found.tokens), (3, 1, 28));
}

#[tokio::test]
async fn a_tally_has_samples_of_one_routing() {
    let weights = soft();
    let config = all_that_ask();
    let config = EngineConfig { shadow: ShadowConfig { rate: 1.0, ..config.shadow }, ..config };
    let (engine, metrics) = start_over(&weights, weights.clone(), config);
    let top2 = RoutingChoice::TopK { k: 2, weight_form: None };
    assert!(engine.serves(&TOP_1.into()) && engine.serves(&top2.into()), "nobody has said");
    engine.set_serving(top2.into());
    assert!(ask(&engine, Request { routing: top2.into(), ..tokens(&text(20), 8) }).await.end.is_ok());
    ended(&metrics, 1).await;
    let of = || engine.tally(FIRST_GENERATION);
    // The same by another name.
    engine.set_serving(RoutingChoice::Native.into());
    assert!((of().samples, of().tokens, of().finished) == (1, 28, 1) && engine.serves(&top2.into()) && !engine.serves(&TOP_1.into()));
    engine.set_serving(TOP_1.into());
    assert_eq!(of(), Tally { finished: 1, ..Tally::default() });
}

#[tokio::test]
async fn a_panic_fails_one_sample() {
    let weights = soft();
    let fuse = Arc::new(AtomicU32::new(0));
    let forwards = fuse.clone();
    let source = Watched::new(&weights, move || {
        // The second piece of the first sample.
        assert_ne!(forwards.fetch_add(1, Ordering::SeqCst), 1, "as the test wished");
    });
    let (engine, metrics) = start_over(&weights, source.clone(), all_that_ask());
    let request = || always(TOP_1, tokens(&text(40), 8));
    let first = ask(&engine, request()).await.ids;
    ended(&metrics, 1).await;
    assert_eq!((outcome(&metrics, "failed"), outcome(&metrics, "done")), (1.0, 0.0));
    assert_eq!(ask(&engine, request()).await.ids, first);
    let snapshot = ended(&metrics, 2).await;
    assert_eq!((snapshot.samples, snapshot.tokens, source.started.load(Ordering::SeqCst)), (1, 48, 2), "on a new model");
    fuse.store(1, Ordering::SeqCst);
    let mut stream = begin(&engine, measure(40)).unwrap();
    let error = progress(&mut stream).await.unwrap_err();
    assert!(matches!(&error, Error::Internal(message) if message.contains("panicked")), "{error}");
    let mut stream = begin(&engine, measure(40)).unwrap();
    assert!(progress(&mut stream).await.unwrap().done);
    super::cache::nothing_is_left(&engine, &metrics).await;
}

#[tokio::test]
async fn a_panic_of_the_engine_itself_is_no_drain() {
    let weights = soft();
    let (source, begins, go) = gated(&weights);
    let explode = Arc::new(AtomicBool::new(false));
    let fuse = explode.clone();
    let clock = Box::new(move || if fuse.swap(false, Ordering::SeqCst) { panic!("as the test wished") } else { Instant::now() });
    let (engine, metrics) = start_with_clock(&weights, source, all_that_ask(), clock);
    // One piece of a sample, then one of a measurement; neither is done with it.
    ask(&engine, always(TOP_1, tokens(&text(40), 8))).await;
    begins.recv_timeout(PATIENCE).unwrap();
    let mut stream = begin(&engine, measure(40)).unwrap();
    go.send(()).unwrap();
    begins.recv_timeout(PATIENCE).unwrap();
    explode.store(true, Ordering::SeqCst);
    go.send(()).unwrap();
    let error = progress(&mut stream).await.unwrap_err();
    assert!(matches!(&error, Error::Internal(message) if message.contains("anew")), "{error}");
    ended(&metrics, 1).await;
    assert_eq!((outcome(&metrics, "failed"), outcome(&metrics, "dropped_draining")), (1.0, 0.0));
    drop(go);
    let mut stream = begin(&engine, measure(40)).unwrap();
    assert!(progress(&mut stream).await.unwrap().done, "the engine goes on");
}

fn begin(engine: &Engine, request: MeasureRequest) -> Result<MeasureStream> {
    engine.measure(engine.measure_slot()?, request)
}

fn measure(tokens: usize) -> MeasureRequest {
    let cases = vec![TOP_1.into(), RoutingChoice::Native.into()];
    MeasureRequest { id: "test".into(), tokens: text(tokens), cases, reference: None, window_tokens: None, deadline: None }
}

async fn progress(stream: &mut MeasureStream) -> Result<MeasureProgress> {
    tokio::time::timeout(PATIENCE, stream.recv()).await.expect("a message").expect("a last message")
}

#[tokio::test]
async fn a_measurement_is_an_offline_run() {
    let weights = soft();
    let (engine, metrics) = start_over(&weights, weights.clone(), all_that_ask());
    let busy = engine.submit(tokens(&text(20), 30)).unwrap();
    let request = MeasureRequest { window_tokens: Some(40), ..measure(1100) };
    let windows: Vec<&[u32]> = request.tokens.chunks(40).collect();
    let cases: Vec<Case> = [RoutingChoice::Soft { temperature: None }, TOP_1, RoutingChoice::Native].map(Case::from).into();
    let mut stream = begin(&engine, request.clone()).unwrap();
    let mut done = Vec::new();
    let last = loop {
        let message = progress(&mut stream).await.unwrap();
        done.push(message.tokens_done);
        let mut probe = Probe::of_gaps(weights.spec(), &cases).unwrap();
        let so_far = &windows[..message.tokens_done.div_ceil(40)];
        let expected = run::run(&weights, &cases, so_far, Some(&mut probe), &mut |_| {}).unwrap();
        assert_eq!(message.policies.len(), 2);
        for (case, (found, expected)) in message.policies.iter().zip(&expected).enumerate() {
            near(found.output.kl.mean, expected.kl.mean, "kl");
            near(found.output.kl.p95, expected.kl.p95, "kl p95");
            near(found.output.perplexity.gap, expected.perplexity.gap, "perplexity");
            assert_eq!(found.output.perplexity.interval, None, "a bootstrap is not for the engine's thread");
            for (found, layer) in found.layers.iter().zip(&probe.layers) {
                let gap = &layer.gaps[case];
                assert_eq!((found.layer, found.l2_rel, found.missed_mass), (layer.layer, gap.l2_rel.summary(), gap.missed_mass.summary()));
                near(found.exact, gap.exact as f64 / expected.tokens as f64, "exact");
            }
        }
        if message.done {
            break message;
        }
    };
    assert_eq!((done.as_slice(), last.tokens_total, last.generation), (&[520, 1040, 1100][..], 1100, 1));
    assert!(stream.recv().await.is_none(), "nothing after the last");
    assert_eq!(collect(busy).await.ids.len(), 30);
    super::cache::nothing_is_left(&engine, &metrics).await;
}

/// With the stream of what it tells.
fn measurement(spec: &ModelSpec, request: MeasureRequest) -> (Measurement, MeasureStream) {
    let checked = request.check(spec, ROOM, &MeasureConfig::default()).unwrap();
    let slot = MeasureSlot::take(&Arc::default(), 1).unwrap();
    Measurement::new(request, checked, slot, Arc::new(Shared::new(1, metrics())))
}

fn source(models: impl ObservableSource + 'static) -> Source {
    Source { generation: FIRST_GENERATION, models: Arc::new(models) }
}

#[tokio::test]
async fn what_is_told_is_told_in_pieces_and_not_after_every_window() {
    let weights = soft();
    let pieces = |request| {
        let (mut measurement, stream) = measurement(weights.spec(), request);
        let (mut pieces, source) = (Vec::new(), source(weights.clone()));
        loop {
            let (tokens, done) = measurement.advance(&source, weights.spec(), 128).unwrap();
            pieces.push(tokens);
            if done {
                return (pieces, stream);
            }
        }
    };
    let (found, mut stream) = pieces(measure(40));
    assert_eq!(found, [40, 0, 0], "each of two policies for itself");
    let message = progress(&mut stream).await.unwrap();
    assert!(message.done && message.policies.len() == 2);
    let (found, _) = pieces(MeasureRequest { window_tokens: Some(2), ..measure(1100) });
    assert_eq!((found.len(), found[256..260].to_vec()), (550 + 3 * 2, vec![0, 0, 2, 2]));

    // Nobody reads while it runs: some messages are missing, and what the last one says is whole.
    let (_, mut stream) = pieces(MeasureRequest { window_tokens: Some(32), ..measure(9 * 512) });
    let mut done = Vec::new();
    while let Some(message) = stream.recv().await {
        let message = message.unwrap();
        assert!(message.policies.iter().all(|policy| policy.output.tokens == message.tokens_done as u64));
        done.push(message.tokens_done);
    }
    assert_eq!(done, [512, 1024, 1536, 2048, 2560, 3072, 3584, 9 * 512]);
}

#[tokio::test]
async fn measurements_are_bounded_and_can_be_cancelled() {
    let weights = soft();
    let (source, begins, go) = gated(&weights);
    let (engine, _) = start_over(&weights, source, all_that_ask());
    let first = begin(&engine, measure(60)).unwrap();
    begins.recv_timeout(PATIENCE).unwrap();
    let second = begin(&engine, measure(60)).unwrap();
    let refused = begin(&engine, measure(60)).unwrap_err();
    assert!(matches!(&refused, Error::QueueFull { limit: QueueLimit::Measurements(2), .. }), "{refused}");
    drop(first);
    go.send(()).unwrap();
    // The next forward is of the second: the first is gone with its place.
    begins.recv_timeout(PATIENCE).unwrap();
    let third = begin(&engine, measure(60)).unwrap();
    drop(go);
    for mut stream in [second, third] {
        assert!(progress(&mut stream).await.unwrap().done);
    }
}

#[tokio::test]
async fn a_measurement_ends_at_its_deadline_and_with_the_server() {
    let weights = soft();
    let (source, begins, go) = gated(&weights);
    let (engine, _) = start_over(&weights, source, all_that_ask());
    let late = MeasureRequest { deadline: Some(Instant::now()), ..measure(60) };
    assert_eq!(begin(&engine, late).unwrap_err().kind(), ErrorKind::DeadlineExceeded);
    let deadline = Instant::now() + Duration::from_millis(20);
    let mut stream = begin(&engine, MeasureRequest { deadline: Some(deadline), ..measure(60) }).unwrap();
    begins.recv_timeout(PATIENCE).unwrap();
    tokio::time::sleep_until(deadline.into()).await;
    go.send(()).unwrap();
    assert!(matches!(progress(&mut stream).await, Err(Error::DeadlineExceeded { phase: "measuring" })));

    let mut stream = begin(&engine, measure(60)).unwrap();
    begins.recv_timeout(PATIENCE).unwrap();
    engine.drain();
    assert_eq!(begin(&engine, measure(60)).unwrap_err().kind(), ErrorKind::Unavailable);
    drop(go);
    assert!(matches!(progress(&mut stream).await, Err(Error::Draining)));

    let (source, begins, go) = gated(&weights);
    let (engine, _) = start_over(&weights, source, all_that_ask());
    let mut streams = [begin(&engine, measure(60)).unwrap(), begin(&engine, measure(60)).unwrap()];
    begins.recv_timeout(PATIENCE).unwrap();
    let closing = engine.clone();
    let shutdown = tokio::task::spawn_blocking(move || closing.shutdown());
    drop(go);
    for stream in &mut streams {
        assert!(matches!(progress(stream).await, Err(Error::Draining)));
    }
    shutdown.await.unwrap();
}

#[tokio::test]
async fn fields_are_named_as_clients_know_them() {
    let weights = soft();
    let config = EngineConfig { measure: MeasureConfig { max_tokens: 600, ..MeasureConfig::default() }, ..all_that_ask() };
    let (engine, _) = start_over(&weights, weights.clone(), config.clone());
    let base = measure(60);
    let top = |k| Case::from(RoutingChoice::TopK { k, weight_form: None });
    let context = weights.spec().max_context;
    let cases = [
        (MeasureRequest { tokens: vec![1], ..base.clone() }, "input: 1 tokens predict nothing"),
        (measure(601), "input: 601 tokens are above 600"),
        (MeasureRequest { tokens: vec![1, 1 << 20], ..base.clone() }, "token_ids[1]: "),
        (MeasureRequest { cases: Vec::new(), ..base.clone() }, "policies: nothing to measure"),
        (MeasureRequest { cases: vec![top(1); 9], ..base.clone() }, "policies: 9 are above 8"),
        (MeasureRequest { cases: vec![top(1), top(ALL + 1)], ..base.clone() }, "policies[1].top_k.k: 6 is not from 1 to 5"),
        (MeasureRequest { reference: Some(top(0)), ..base.clone() }, "reference.top_k.k: 0 is not"),
        (MeasureRequest { window_tokens: Some(1), ..base.clone() }, "window_tokens: 1 predicts nothing"),
        (MeasureRequest { window_tokens: Some(context + 1), ..base.clone() }, "window_tokens: "),
        (
            MeasureRequest { cases: vec![top(1); 8], window_tokens: Some(15), ..base.clone() },
            "window_tokens: 15 tokens under 9 routings, the reference among them, are more than 128, a fourth",
        ),
    ];
    for (request, expected) in cases {
        let error = begin(&engine, request).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error} instead of {expected}");
    }
    let config = EngineConfig { measure: MeasureConfig { max_requests: 0, ..config.measure }, ..config };
    let (engine, _) = start_over(&weights, weights.clone(), config);
    assert_eq!(begin(&engine, base.clone()).unwrap_err().kind(), ErrorKind::FailedPrecondition);
    assert_eq!(begin(&start(FakeModel::sum(), fake::config()), base).unwrap_err().kind(), ErrorKind::FailedPrecondition);
}

#[tokio::test]
async fn beside_requests_only_what_is_paid_for_runs() {
    let weights = soft();
    let (spec, watched) = (ModelSpec::clone(weights.spec()), Watched::new(&weights, || ()));
    let config = EngineConfig { measure: MeasureConfig { budget: 0.1, ..MeasureConfig::default() }, ..all_that_ask() };
    let shared = Arc::new(Shared::new(1, metrics()));
    let mut background = Background::new(Some(source(watched.clone())), spec.clone(), &config, shared);
    let (measurement, mut stream) = measurement(&spec, measure(300));
    background.measure(measurement);
    let clock: Clock = Box::new(Instant::now);
    let step = Load::Busy(Duration::from_millis(1));
    let mut turn = |load| background.turn(load, &clock);
    for _ in 0..150 {
        assert!(!turn(step));
    }
    assert_eq!(watched.started.load(Ordering::SeqCst), 0, "150 ms do not pay for a piece of 20");
    for _ in 0..100 {
        assert!(!turn(step));
    }
    assert_eq!(watched.started.load(Ordering::SeqCst), 1);
    while turn(Load::Idle) {}
    let mut done = false;
    while let Some(message) = stream.recv().await {
        done = message.unwrap().done;
    }
    assert!(done, "with nothing else to do it runs to its end");
}

/// Mean `KL(reference ‖ top-1)` of texts, as an offline run has it.
fn offline_kl(weights: &ServingModel, texts: &[&[u32]]) -> f64 {
    let cases = [RoutingChoice::Soft { temperature: None }, TOP_1].map(Case::from);
    run::run(weights, &cases, texts, None, &mut |_| {}).unwrap()[0].kl.mean
}

/// What began before a publish is measured on the weights of its beginning, whenever that is, and nothing of them stays.
#[tokio::test]
async fn samples_and_measurements_are_of_one_generation() {
    let reference = ReferenceRouting::Soft { temperature: 1.0 };
    let (first, second) = (weights(reference), scaled(reference, 4.0));
    let (source, begins, go) = gated(&first);
    let other = Watched::new(&second, || ());
    let held = [&source, &other].map(|watched| (watched.started.clone(), watched.before.clone()));
    let is_held = |n: usize| (Arc::strong_count(&held[n].0), Arc::strong_count(&held[n].1)) != (1, 1);
    let (engine, metrics) = start_over(&first, source, all_that_ask());
    let request = |n| always(TOP_1, tokens(&text(n), 8));
    let said = async |n: usize, stream: EventStream| -> Vec<u32> { text(n).into_iter().chain(collect(stream).await.ids).collect() };
    let windows = || MeasureRequest { window_tokens: Some(30), ..measure(60) };

    // A piece of a sample, then one of a measurement, in which the engine waits while others come.
    let a = said(40, engine.submit(request(40)).unwrap()).await;
    begins.recv_timeout(PATIENCE).unwrap();
    let before = begin(&engine, windows()).unwrap();
    go.send(()).unwrap();
    begins.recv_timeout(PATIENCE).unwrap();
    let waiting = engine.submit(request(21)).unwrap();
    let late = begin(&engine, windows()).unwrap();
    let generation = Generation { number: 2, weights: second.shared(), source: Some(Box::new(other)) };
    let publish = super::generations::publishing(&engine, generation, InFlight::Finish).await;
    drop(go);
    publish.await.unwrap().unwrap();
    let b = said(21, waiting).await;
    let c = said(33, engine.submit(request(33)).unwrap()).await;
    let found = ended(&metrics, 3).await;
    assert_eq!((found.samples, found.dropped), (3, 0));

    let (old, new) = (engine.tally(1), engine.tally(2));
    assert_eq!((old.samples, old.tokens, new.samples, new.tokens, new.finished), (2, 48 + 29, 1, 41, 1));
    near(old.kl / old.tokens as f64, offline_kl(&first, &[&a, &b]), "the first generation");
    near(new.kl / new.tokens as f64, offline_kl(&second, &[&c]), "the second generation");
    for (mut stream, weights, generation) in [(before, &first, 1), (late, &second, 2)] {
        let last = progress(&mut stream).await.unwrap();
        assert!(last.done && last.generation == generation);
        let (text, found) = (text(60), last.policies[0].output.kl.mean);
        near(found, offline_kl(weights, &text.chunks(30).collect::<Vec<_>>()), "a measurement");
    }
    // After one more step nothing is left of the first generation but what the test has; the second rests until another is in force.
    assert!(ask(&engine, tokens(&text(9), 1)).await.end.is_ok());
    assert!(!is_held(0) && is_held(1));
    let third = |source| Generation { number: 3, weights: first.shared(), source };
    let error = engine.publish(third(None), InFlight::Finish).await.unwrap_err();
    assert!(error.kind() == ErrorKind::FailedPrecondition && error.to_string().contains("without models to measure with"), "{error}");
    engine.publish(third(Some(Box::new(first.clone()))), InFlight::Finish).await.unwrap();
    assert!(ask(&engine, tokens(&text(9), 1)).await.end.is_ok());
    assert!(!is_held(1));
}
