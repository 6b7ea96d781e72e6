//! Routings that are not one choice for all layers, traces of what was routed, and traces that are routed again: on a small random
//! checkpoint, whose routers are real.

use std::sync::Mutex;

use super::{
    decoder::{Forward, start_decoder, start_over},
    *,
};
use crate::{
    model::{CacheShape, Forward as Computed, SharedWeights, Span, load::WeightType},
    moe::policy::{LayerChoices, Replay, RoutingChoice, RoutingRule, WeightForm},
    telemetry::metrics::Scope,
};

const ROOMY: CacheShape = CacheShape { block_tokens: 16, num_blocks: 64 };
/// So few blocks that requests of 36 tokens lose their places.
const TIGHT: CacheShape = CacheShape { block_tokens: 4, num_blocks: 14 };
const HOST: Forward = Forward::Host(WeightType::F32);

fn decoder(case: &str, forward: Forward) -> Engine {
    start_decoder(case, forward, ROOMY, fake::config(), metrics())
}

fn small_steps() -> EngineConfig {
    EngineConfig { max_step_tokens: 7, max_batch_requests: 4, max_queue_requests: 20, ..fake::config() }
}

/// As many as asked for, of a vocabulary of 80.
fn text(tokens: u32) -> Vec<u32> {
    (0..tokens).map(|i| (i * 31 + 7) % 80).collect()
}

fn score(prompt: &[u32], routing: LayerChoices) -> Request {
    Request { task: Task::Score { alternatives: 0 }, routing, ..fake::request(prompt) }
}

fn read(prompt: &[u32], routing: impl Into<LayerChoices>) -> Request {
    Request { task: Task::Read, trace: true, routing: routing.into(), ..fake::request(prompt) }
}

async fn likelihoods(engine: &Engine, request: Request) -> Vec<Option<f32>> {
    ask(engine, request).await.finished().prompt_logprobs.iter().map(|token| token.logprob).collect()
}

async fn traced(engine: &Engine, request: Request) -> RoutingTrace {
    let answer = ask(engine, request).await;
    answer.end.unwrap();
    answer.trace.expect("a trace was asked for")
}

fn top(k: usize) -> RoutingChoice {
    RoutingChoice::TopK { k, weight_form: None }
}

fn replay(trace: RoutingTrace, weight_form: Option<WeightForm>, rest: RoutingChoice) -> LayerChoices {
    LayerChoices::Replay { replay: Arc::new(Replay { trace, weight_form, rest: rest.into() }), first: 0 }
}

#[tokio::test]
async fn a_text_is_traced_in_any_chunks_and_any_company() {
    for (case, forward) in [("mixtral_gqa", HOST), ("qwen2_shared_sparse_step", HOST), ("mixtral_gqa", Forward::Tensors)] {
        let whole = traced(&decoder(case, forward), read(&text(30), top(2))).await;
        assert_eq!((whole.first_position, whole.num_tokens()), (0, 30), "{case}");
        assert!(whole.layers.iter().all(|&layer| whole.row(29, layer).is_some_and(|row| row.experts.len() == 2)));
        assert_eq!((whole.entropy.len(), whole.margin.len()), (whole.num_rows(), whole.num_rows()));

        let metrics = metrics();
        let engine = start_decoder(case, forward, TIGHT, small_steps(), metrics.clone());
        let continued = |routing: RoutingChoice| {
            let request = generate(&text(22), |params| params.max_new_tokens = Some(14));
            Request { trace: true, routing: routing.into(), ..request }
        };
        let streams: Vec<_> = (0..4).map(|_| engine.submit(continued(top(2))).unwrap()).collect();
        let mut answers = Vec::new();
        for stream in streams {
            answers.push(collect(stream).await);
        }
        assert!(series(&metrics, "hardmax_preemptions_total") > 0.0, "{case}");
        for answer in answers {
            let mut text = text(22);
            text.extend(&answer.ids[..13]);
            let again = traced(&decoder(case, forward), read(&text, top(2))).await;
            let trace = answer.trace.unwrap();
            assert_eq!((&trace.offsets, &trace.expert_ids), (&again.offsets, &again.expert_ids), "{case}: all that was read, once");
        }
    }
}

#[tokio::test]
async fn each_choice_has_its_own_trace_and_nothing_comes_from_the_cache() {
    let engine = decoder("mixtral_gqa", HOST);
    let prompt = text(20);
    ask(&engine, read(&prompt, RoutingChoice::Native)).await.end.unwrap();
    let request = generate(&prompt, |p| (p.n, p.max_new_tokens, p.temperature, p.ignore_eos) = (3, Some(4), 1.0, true));
    let answers = collect_choices(engine.submit(Request { trace: true, ..request }).unwrap(), 3).await;
    for answer in answers {
        assert_eq!(answer.trace.as_ref().unwrap().num_tokens(), 20 + 4 - 1, "the last token is not read");
        assert_eq!(answer.finished().cached_prompt_tokens, 0);
    }
    let silent = ask(&engine, generate(&prompt, |p| p.max_new_tokens = Some(4))).await;
    assert!(silent.trace.is_none());
}

/// Other experts than those of `trace`, as many, whatever the router makes of them.
fn others(trace: &RoutingTrace, engine: &Engine) -> RoutingTrace {
    let experts = engine.spec().moe_layers().next().unwrap().1.num_experts as u16;
    let expert_ids = trace.expert_ids.iter().map(|id| (id + 1) % experts).collect();
    RoutingTrace { expert_ids, weights: Vec::new(), ..trace.clone() }
}

#[tokio::test]
async fn what_was_routed_is_routed_again() {
    for (case, forward) in [("mixtral_gqa", HOST), ("olmoe_clip", HOST), ("mixtral_gqa", Forward::Tensors)] {
        let engine = decoder(case, forward);
        let prompt = text(24);
        for routing in [top(1), top(2), RoutingChoice::Soft { temperature: Some(0.5) }] {
            let trace = traced(&engine, read(&prompt, routing)).await;
            let first = likelihoods(&engine, score(&prompt, routing.into())).await;
            // Under another routing but for the trace.
            let given = replay(trace.clone(), None, top(1));
            assert_eq!(likelihoods(&engine, score(&prompt, given)).await, first, "{case} {routing}: with its weights");
            if routing != (RoutingChoice::Soft { temperature: Some(0.5) }) {
                let ids = RoutingTrace { weights: Vec::new(), ..trace.clone() };
                let given = replay(ids, None, RoutingChoice::Native);
                assert_eq!(likelihoods(&engine, score(&prompt, given)).await, first, "{case} {routing}: with the router's weights");
            }
            // The first half as before, then otherwise.
            let rest = if routing == top(1) { top(2) } else { top(1) };
            let half = likelihoods(&engine, score(&prompt, replay(trace.part(0..12), None, rest))).await;
            let other = likelihoods(&engine, score(&prompt, rest.into())).await;
            assert_eq!(half[..12], first[..12]);
            assert_ne!(half[13..], first[13..], "{case} {routing}");
            assert_ne!(half[13..], other[13..], "{case} {routing}: it attends to the first half");
        }
    }
}

#[tokio::test]
async fn the_experts_of_a_replay_are_obeyed() {
    let engine = decoder("mixtral_gqa", HOST);
    let prompt = text(16);
    let trace = traced(&engine, read(&prompt, top(1))).await;
    let other = others(&trace, &engine);
    let routing = replay(other.clone(), None, RoutingChoice::Native);
    let obeyed = traced(&engine, read(&prompt, routing)).await;
    assert_eq!(obeyed.expert_ids, other.expert_ids);
    // Of the first layer, whose input is the same, it is certain.
    let first = obeyed.margin.iter().step_by(obeyed.layers.len());
    assert!(first.copied().all(|margin| margin < 0.0), "the router would have chosen otherwise");
    assert!(obeyed.weights.iter().all(|weight| *weight == 1.0), "Mixtral scales the chosen to 1");
    let raw = traced(&engine, read(&prompt, replay(other, Some(WeightForm::Raw), RoutingChoice::Native))).await;
    assert!(raw.weights.iter().step_by(raw.layers.len()).all(|weight| *weight < 0.5), "its probability, which is not the largest");
}

#[tokio::test]
async fn a_replay_is_obeyed_in_small_steps_and_after_a_preemption() {
    for (case, forward) in [("mixtral_gqa", HOST), ("qwen2_shared_sparse_step", HOST), ("mixtral_gqa", Forward::Tensors)] {
        let roomy = decoder(case, forward);
        let prompt = text(22);
        // It ends within a step.
        let given = others(&traced(&roomy, read(&prompt, top(2))).await.part(0..18), &roomy);
        let replayed = || replay(given.clone(), None, top(1));
        let continued = || {
            let request = generate(&prompt, |p| (p.max_new_tokens, p.logprobs) = (Some(14), Some(0)));
            Request { trace: true, routing: replayed(), ..request }
        };
        let (alone, scored) = (ask(&roomy, continued()).await, likelihoods(&roomy, score(&prompt, replayed())).await);
        let metrics = metrics();
        let engine = start_decoder(case, forward, TIGHT, small_steps(), metrics.clone());
        let streams: Vec<_> = (0..4).map(|_| engine.submit(continued()).unwrap()).collect();
        for stream in streams {
            let answer = collect(stream).await;
            assert_eq!((&answer.ids, &answer.logprobs), (&alone.ids, &alone.logprobs), "{case}, {forward:?}");
            assert_eq!(answer.trace.unwrap().part(0..18).expert_ids, given.expert_ids, "{case}, {forward:?}");
        }
        assert!(series(&metrics, "hardmax_preemptions_total") > 0.0, "{case}, {forward:?}");
        assert_eq!(likelihoods(&engine, score(&prompt, replayed())).await, scored, "{case}, {forward:?}");
    }
}

#[tokio::test]
async fn a_replay_neither_finds_nor_leaves_a_prefix() {
    let engine = decoder("mixtral_gqa", HOST);
    let prompt = text(36);
    let native = || generate(&prompt, |p| (p.max_new_tokens, p.logprobs) = (Some(6), Some(0)));
    let first = ask(&engine, native()).await;
    let given = others(&traced(&engine, read(&prompt, RoutingChoice::Native)).await.part(0..30), &engine);
    let replayed = || replay(given.clone(), None, RoutingChoice::Native);
    let scored = likelihoods(&engine, score(&prompt, replayed())).await;
    assert_eq!(scored, likelihoods(&decoder("mixtral_gqa", HOST), score(&prompt, replayed())).await);
    for _ in 0..2 {
        let answer = ask(&engine, Request { routing: replayed(), ..native() }).await;
        assert!(answer.finished().cached_prompt_tokens == 0 && answer.logprobs != first.logprobs);
    }
    let again = ask(&engine, native()).await;
    assert_eq!(again.finished().cached_prompt_tokens, 32);
    assert_eq!((again.ids, again.logprobs), (first.ids, first.logprobs));
}

/// Remembers what it was asked to compute.
struct Recorded {
    model: Box<dyn LanguageModel>,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl LanguageModel for Recorded {
    fn spec(&self) -> &ModelSpec {
        self.model.spec()
    }

    fn cache(&self) -> CacheShape {
        self.model.cache()
    }

    fn forward(&mut self, batch: &Batch) -> Result<Computed> {
        self.spans.lock().unwrap().extend_from_slice(&batch.spans);
        self.model.forward(batch)
    }

    fn exchange(&mut self, weights: SharedWeights) -> Result<SharedWeights> {
        self.model.exchange(weights)
    }
}

/// In a mix of all routings and tasks, with and without a trace, in small steps, under preemption and with known prefixes: the load of
/// every expert is what tokens were sent to it, as traces of the same texts tell one by one.
#[tokio::test]
async fn every_route_of_any_mix_is_counted_once() {
    let roomy = decoder("mixtral_gqa", HOST);
    let (spec, prompt) = (roomy.spec().clone(), text(22));
    let given = others(&traced(&roomy, read(&prompt, top(2))).await.part(0..18), &roomy);
    let routings: [LayerChoices; 6] = [
        top(1).into(),
        top(2).into(),
        RoutingChoice::Soft { temperature: Some(0.7) }.into(),
        spec.layer_choices(&RoutingRule::LayerTopK { k: [3, 1].into(), weight_form: None }, "k").unwrap(),
        RoutingChoice::Mass { threshold: 0.5, max_k: Some(4), weight_form: None }.into(),
        replay(given, None, top(3)),
    ];
    let layers: Vec<(usize, usize)> = spec.moe_layers().map(|(layer, moe)| (layer, moe.num_experts)).collect();
    let facts = MetricsConfig { model: "golden".into(), layers: layers.clone(), max_context: 128, ..MetricsConfig::default() };
    let metrics = Arc::new(Metrics::new(&facts).unwrap());
    let spans = Arc::new(Mutex::new(Vec::new()));
    let model = Recorded { model: decoder::decoder("mixtral_gqa", HOST, TIGHT), spans: spans.clone() };
    let engine = start_over(Box::new(model), small_steps(), metrics.clone());

    let continued = |routing: &LayerChoices, trace| {
        let request = generate(&prompt, |p| p.max_new_tokens = Some(14));
        Request { trace, routing: routing.clone(), ..request }
    };
    let mut streams = Vec::new();
    for (n, routing) in routings.iter().enumerate() {
        streams.push(engine.submit(continued(routing, n % 2 == 0)).unwrap());
        let other = if n % 2 == 0 { score(&prompt, routing.clone()) } else { read(&prompt, routing.clone()) };
        streams.push(engine.submit(other).unwrap());
    }
    let mut told = Vec::new();
    for stream in streams {
        let answer = collect(stream).await;
        answer.end.unwrap();
        told.push(answer.ids);
    }
    for _ in 0..2 {
        ask(&engine, continued(&routings[1], false)).await;
    }
    engine.shutdown();
    assert!(series(&metrics, "hardmax_preemptions_total") > 0.0 && series(&metrics, "hardmax_prefix_cache_hits_total") > 0.0);

    // What each routing makes of its whole text.
    let mut traces = Vec::new();
    for (routing, ids) in routings.iter().zip(told.iter().step_by(2)) {
        let whole: Vec<u32> = prompt.iter().chain(&ids[..13]).copied().collect();
        traces.push(traced(&roomy, read(&whole, routing.clone())).await);
    }
    for (routing, k) in [(0, [1, 1]), (1, [2, 2]), (2, [5, 5]), (3, [3, 1])] {
        assert!(traces[routing].offsets.windows(2).zip(k.iter().cycle()).all(|(row, k)| row[1] - row[0] == *k), "{:?}", routings[routing]);
    }
    let load = metrics.expert_load(Scope::Total);
    assert_eq!(load.layers.len(), layers.len());
    for (found, (layer, experts)) in load.layers.iter().zip(layers) {
        let (mut tokens, mut expected) = (0, vec![0; experts]);
        for span in spans.lock().unwrap().iter() {
            let of = routings.iter().position(|routing| *routing == span.routing.from_position(0)).unwrap();
            for position in span.past..span.past + span.new {
                tokens += 1;
                traces[of].row(position, layer).unwrap().experts.iter().for_each(|&expert| expected[usize::from(expert)] += 1);
            }
        }
        assert_eq!((found.layer, found.stats.tokens, &found.stats.expert_tokens), (layer, tokens, &expected));
        assert_eq!(found.stats.routes, expected.iter().sum::<u64>());
    }
}

#[tokio::test]
async fn replays_that_do_not_fit_are_refused() {
    let engine = decoder("mixtral_gqa", HOST);
    let prompt = text(8);
    let good = traced(&engine, read(&prompt, top(2))).await;
    let refused = |change: &dyn Fn(&mut RoutingTrace)| {
        let mut bad = good.clone();
        change(&mut bad);
        let error = engine.submit(score(&prompt, replay(bad, None, RoutingChoice::Native))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        error.to_string()
    };
    assert!(refused(&|t| t.layers = [0].into()).contains("layers"));
    assert!(refused(&|t| t.first_position = 1).contains("position 1"));
    assert!(refused(&|t| t.expert_ids[3] = 200).contains("200 is not below"));
    assert!(refused(&|t| t.expert_ids[1] = t.expert_ids[0]).contains("comes again"));
    assert!(refused(&|t| t.weights[2] = f32::NAN).contains("NaN"));
    assert!(refused(&|t| t.weights[2] = -1.0).contains("-1"));
    assert!(refused(&|t| t.weights[2] = 3e38).contains("1000"));
    assert!(refused(&|t| t.append(&t.part(0..8))).contains("16 tokens"));
}

#[tokio::test]
async fn layers_have_a_k_of_their_own() {
    let engine = decoder("mixtral_gqa", HOST);
    let spec = engine.spec().clone();
    let layers = spec.moe_layers().count();
    let choices = |ks: Vec<usize>| spec.layer_choices(&RoutingRule::LayerTopK { k: ks.into(), weight_form: None }, "k").unwrap();
    let prompt = text(20);
    let same = likelihoods(&engine, score(&prompt, top(1).into())).await;
    assert_eq!(likelihoods(&engine, score(&prompt, choices(vec![1; layers]))).await, same);
    let mixed: Vec<usize> = (0..layers).map(|layer| 1 + layer % 2).collect();
    let trace = traced(&engine, read(&prompt, choices(mixed.clone()))).await;
    for (layer, k) in spec.moe_layers().map(|(layer, _)| layer).zip(mixed.clone()) {
        assert!((0..20).all(|position| trace.row(position, layer).unwrap().experts.len() == k));
    }
    // In one batch with others, and with what is known of the same text under another routing.
    let requests: Vec<_> = [top(1).into(), choices(mixed.clone()), top(2).into(), choices(mixed)].map(|c| score(&prompt, c)).into();
    let streams: Vec<_> = requests.into_iter().map(|request| engine.submit(request).unwrap()).collect();
    let mut found = Vec::new();
    for stream in streams {
        found.push(collect(stream).await.finished().prompt_logprobs.clone());
    }
    assert_eq!(found[1], found[3]);
    assert!(found[0] != found[1] && found[1] != found[2]);
    let wrong = spec.layer_choices(&RoutingRule::LayerTopK { k: vec![1; layers + 1].into(), weight_form: None }, "routing.layer_top_k.k");
    assert!(wrong.unwrap_err().to_string().starts_with("routing.layer_top_k.k: "));
}

#[tokio::test]
async fn a_share_of_the_probability_takes_as_many_experts_as_it_needs() {
    let engine = decoder("mixtral_gqa", HOST);
    let prompt = text(32);
    let mass = |threshold, max_k| RoutingChoice::Mass { threshold, max_k, weight_form: Some(WeightForm::Raw) };
    let score = |choice: RoutingChoice| likelihoods(&engine, score(&prompt, choice.into()));
    let raw = |k| RoutingChoice::TopK { k, weight_form: Some(WeightForm::Raw) };
    assert_eq!(score(mass(1e-6, None)).await, score(raw(1)).await);
    assert_eq!(score(mass(1.0, Some(3))).await, score(raw(3)).await);
    let trace = traced(&engine, read(&prompt, mass(0.5, Some(4)))).await;
    let mut counts = [0; 5];
    for (row, &margin) in trace.margin.iter().enumerate() {
        let routes = trace.offsets[row] as usize..trace.offsets[row + 1] as usize;
        let held: f32 = trace.weights[routes.clone()].iter().sum();
        let without_last: f32 = trace.weights[routes.start..routes.end - 1].iter().sum();
        assert!((held >= 0.5 || routes.len() == 4) && without_last < 0.5 && margin >= 0.0);
        counts[routes.len()] += 1;
    }
    assert!(counts.iter().filter(|&&count| count > 0).count() > 1, "{counts:?}");
    let field = |choice: RoutingChoice| engine.submit(read(&prompt, choice)).unwrap_err().to_string();
    assert!(field(mass(0.0, None)).starts_with("routing.mass.threshold"));
    assert!(field(mass(f32::NAN, None)).starts_with("routing.mass.threshold"));
    assert!(field(mass(0.5, Some(99))).starts_with("routing.mass.max_k"));
}
