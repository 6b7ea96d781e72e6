//! The cache as a client can see it: known prefixes, shared prompts, too little room.

use super::*;
use crate::moe::policy::{RoutingChoice, WeightForm};

/// What [`FakeModel::sum`] says after `prompt`.
pub(super) fn sums(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    (0..count).for_each(|_| tokens.push(tokens.iter().sum::<u32>() % 256));
    tokens.split_off(prompt.len())
}

/// Nobody holds a block, nobody is counted, nothing panicked.
pub(super) async fn nothing_is_left(engine: &Engine, metrics: &Metrics) {
    tokio::time::timeout(PATIENCE, engine.drained()).await.unwrap();
    assert_eq!(series(metrics, "hardmax_kv_cache_usage_ratio"), 0.0);
    assert_eq!(series(metrics, "hardmax_engine_panics_total"), 0.0);
    let status = engine.status();
    assert_eq!((status.running, status.waiting, status.waiting_tokens), (0, 0, 0));
}

fn pasts(batch: &Batch) -> Vec<(usize, usize)> {
    batch.spans.iter().map(|span| (span.past, span.new)).collect()
}

#[tokio::test]
async fn a_known_prefix_is_not_read_again() {
    let prompt: Vec<u32> = (0..21).collect();
    for (prefix_cache, known) in [(PrefixCache::On, 16), (PrefixCache::Off, 0)] {
        let metrics = metrics();
        let (model, control) = FakeModel::sum().gated();
        let engine = start_with(model, EngineConfig { prefix_cache, ..fake::config() }, metrics.clone());
        for past in [0, known] {
            let stream = engine.submit(tokens(&prompt, 2)).unwrap();
            assert_eq!(pasts(&control.go()), [(past, 21 - past)]);
            control.step();
            assert_eq!(series(&metrics, "hardmax_kv_cache_usage_ratio"), 3.0 / 64.0);
            control.decide(Verdict::Go);
            let answer = collect(stream).await;
            assert_eq!((&answer.ids, answer.finished().cached_prompt_tokens), (&sums(&prompt, 2), past));
        }
        let looked_for = if known > 0 { 40.0 } else { 0.0 };
        assert_eq!(series(&metrics, "hardmax_prefix_cache_queries_total"), looked_for);
        assert_eq!(series(&metrics, "hardmax_prefix_cache_hits_total"), known as f64);
        assert_eq!(series(&metrics, "hardmax_prompt_tokens_total"), 42.0 - known as f64);
        nothing_is_left(&engine, &metrics).await;
    }
}

#[tokio::test]
async fn a_prefix_is_known_under_its_routing_only() {
    let prompt: Vec<u32> = (0..17).collect();
    let top = |k, weight_form| RoutingChoice::TopK { k, weight_form };
    let soft = |temperature| RoutingChoice::Soft { temperature };
    let routings = [RoutingChoice::Native, top(1, None), top(2, None), top(2, Some(WeightForm::Unit)), soft(None), soft(Some(0.5))];
    let (model, control) = FakeModel::sum().gated();
    let engine = start(model, fake::config());
    for past in [0, 16] {
        for routing in routings {
            let stream = engine.submit(Request { routing: routing.into(), ..tokens(&prompt, 1) }).unwrap();
            assert_eq!(pasts(&control.go()), [(past, 17 - past)], "{routing}");
            assert_eq!(collect(stream).await.ids, sums(&prompt, 1));
        }
    }
}

#[tokio::test]
async fn a_score_reads_everything_and_leaves_it_to_others() {
    let prompt: Vec<u32> = (0..18).collect();
    let (model, control) = FakeModel::new(noise).gated();
    let engine = start(model, fake::config());
    let score = || Request { task: Task::Score { alternatives: 0 }, ..fake::request(&prompt) };
    for _ in 0..2 {
        let stream = engine.submit(score()).unwrap();
        assert_eq!(pasts(&control.go()), [(0, 18)]);
        assert_eq!(collect(stream).await.finished().prompt_logprobs.len(), 18);
    }
    let stream = engine.submit(tokens(&prompt, 1)).unwrap();
    assert_eq!(pasts(&control.go()), [(16, 2)]);
    assert_eq!(collect(stream).await.finished().cached_prompt_tokens, 16);
}

#[tokio::test]
async fn choices_share_one_reading_of_the_prompt() {
    let prompt: Vec<u32> = (0..20).collect();
    for prefix_cache in [PrefixCache::On, PrefixCache::Off] {
        let metrics = metrics();
        let (model, control) = FakeModel::sum().gated();
        let config = EngineConfig { prefix_cache, max_step_tokens: 12, ..fake::config() };
        let engine = start_with(model, config, metrics.clone());
        let stream = engine.submit(generate(&prompt, |p| (p.n, p.max_new_tokens) = (3, Some(4)))).unwrap();
        assert_eq!(pasts(&control.go()), [(0, 12)]);
        assert_eq!(pasts(&control.go()), [(12, 8)]);
        let batch = control.go();
        assert_eq!(pasts(&batch), [(20, 1), (16, 4), (16, 4)]);
        let tables: Vec<&[u32]> = batch.spans.iter().map(|span| batch.table(span)).collect();
        assert!(tables[1..].iter().all(|table| table[..2] == tables[0][..2] && table[2] != tables[0][2]));
        drop(control);
        for answer in collect_choices(stream, 3).await {
            assert_eq!((&answer.ids, answer.finished().prompt_tokens), (&sums(&prompt, 4), 20));
        }
        nothing_is_left(&engine, &metrics).await;
        assert_eq!(series(&metrics, "hardmax_request_finished_total{reason=\"length\"}"), 3.0);
    }
}

#[tokio::test]
async fn the_first_choice_is_what_a_single_one_would_be() {
    let sampled =
        |n: usize| generate(&[9, 9], |p| (p.n, p.temperature, p.seed, p.max_new_tokens, p.ignore_eos) = (n, 0.9, 5, Some(12), true));
    let engine = start(FakeModel::new(noise), fake::config());
    let single = ask(&engine, sampled(1)).await;
    let several = collect_choices(engine.submit(sampled(4)).unwrap(), 4).await;
    assert_eq!((&several[0].ids, &several[0].text), (&single.ids, &single.text));
    let different: std::collections::HashSet<&Vec<u32>> = several.iter().map(|answer| &answer.ids).collect();
    assert_eq!(different.len(), 4);
    let again = collect_choices(engine.submit(sampled(4)).unwrap(), 4).await;
    assert!(several.iter().zip(&again).all(|(a, b)| a.ids == b.ids));
}

#[tokio::test]
async fn more_choices_than_places_take_turns() {
    let metrics = metrics();
    let config = EngineConfig { max_batch_requests: 2, event_buffer: 2, max_choices: 16, ..fake::config() };
    let engine = start_with(FakeModel::sum(), config, metrics.clone());
    let answers = collect_choices(engine.submit(generate(&[3; 9], |p| (p.n, p.max_new_tokens) = (7, Some(5)))).unwrap(), 7).await;
    assert!(answers.iter().all(|answer| answer.ids == sums(&[3; 9], 5)));
    nothing_is_left(&engine, &metrics).await;
    let refused = engine.submit(generate(&[3], |p| p.n = 11)).unwrap_err();
    assert!(matches!(refused, Error::OutOfRange { field, .. } if field == "sampling.n"), "10 places in all");
}

#[tokio::test]
async fn who_loses_its_blocks_says_the_same_in_the_end() {
    for prefix_cache in [PrefixCache::On, PrefixCache::Off] {
        let metrics = metrics();
        let model = FakeModel::sum().with_cache(8, 6);
        let engine = start_with(model, EngineConfig { prefix_cache, ..fake::config() }, metrics.clone());
        let prompts: Vec<Vec<u32>> = (1..5).map(|n| vec![n; 9]).collect();
        let streams: Vec<EventStream> = prompts.iter().map(|prompt| engine.submit(tokens(prompt, 24)).unwrap()).collect();
        let score = engine.submit(Request { task: Task::Score { alternatives: 0 }, ..fake::request(&[7; 40]) }).unwrap();
        for (stream, prompt) in streams.into_iter().zip(&prompts) {
            assert_eq!(collect(stream).await.ids, sums(prompt, 24));
        }
        assert_eq!(collect(score).await.finished().prompt_logprobs.len(), 40);
        assert!(series(&metrics, "hardmax_preemptions_total") > 0.0);
        nothing_is_left(&engine, &metrics).await;
    }
}

/// A score that is preempted in the middle goes on where its log-probabilities end.
#[tokio::test]
async fn a_preempted_score_is_complete() {
    let metrics = metrics();
    let (model, control) = FakeModel::new(noise).with_cache(8, 5).gated();
    let engine = start_with(model, EngineConfig { max_step_tokens: 9, max_batch_requests: 2, ..fake::config() }, metrics.clone());
    let decoding = engine.submit(generate(&[1; 7], |p| (p.max_new_tokens, p.ignore_eos) = (Some(32), true))).unwrap();
    control.go();
    let prompt: Vec<u32> = (0..17).map(|n| n * 5).collect();
    let score = engine.submit(Request { task: Task::Score { alternatives: 1 }, ..fake::request(&prompt) }).unwrap();
    drop(control);
    let finished = collect(score).await;
    let logprobs = &finished.finished().prompt_logprobs;
    assert_eq!(logprobs.len(), 17);
    for n in 1..prompt.len() {
        assert_eq!(logprobs[n], sampler::logprob(&noise(&prompt[..n]), prompt[n], 1));
    }
    assert_eq!(collect(decoding).await.ids.len(), 32);
    nothing_is_left(&engine, &metrics).await;
}

#[tokio::test]
async fn what_can_never_fit_is_refused_with_the_numbers() {
    let metrics = metrics();
    let engine = start_with(FakeModel::sum().with_cache(8, 4), fake::config(), metrics.clone());
    for request in [tokens(&[1; 20], 14), tokens(&[1; 33], 1), generate(&[1; 33], |_| ())] {
        let Error::OutOfRange { field, message } = engine.submit(request).unwrap_err() else { panic!("another error") };
        assert_eq!(field, "prompt");
        assert!(message.contains("40 tokens of the cache, which has 32"), "{message}");
    }
    let score = Request { task: Task::Score { alternatives: 0 }, ..fake::request(&[1; 33]) };
    assert!(matches!(engine.submit(score), Err(Error::OutOfRange { field, .. }) if field == "input"));
    assert_eq!(series(&metrics, "hardmax_admission_rejections_total{reason=\"too_long\"}"), 4.0);
    assert_eq!(ask(&engine, tokens(&[1; 20], 13)).await.ids.len(), 13, "the last token is not read");
    let answer = ask(&engine, generate(&[1; 20], |_| ())).await;
    assert_eq!((answer.ids.len(), answer.finished().reason.clone()), (13, FinishReason::Length), "as many as fit");
}
