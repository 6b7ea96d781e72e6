//! The engine as its callers see it, on a fake model.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use tokio_stream::StreamExt;

use super::{
    fake::{self, Control, EOS, FakeModel, PATIENCE, VOCAB, Verdict},
    sampler, *,
};
use crate::{
    error::{ErrorKind, QueueLimit},
    model::{Batch, LogitRows},
    moe::trace::RoutingTrace,
    telemetry::metrics::{Metrics, MetricsConfig},
};

mod background;
mod cache;
mod decoder;
mod draws;
mod faults;
mod generations;
mod routing;
mod storm;
mod turns;

pub(super) fn metrics() -> Arc<Metrics> {
    let config = MetricsConfig { model: "fake".into(), layers: vec![(0, fake::EXPERTS)], max_context: 64, ..MetricsConfig::default() };
    Arc::new(Metrics::new(&config).unwrap())
}

fn start_with(model: FakeModel, config: EngineConfig, metrics: Arc<Metrics>) -> Engine {
    let parts = EngineParts {
        model: Box::new(model),
        generation: FIRST_GENERATION,
        background: None,
        tokenizer: fake::tokenizer(),
        eos_token_ids: vec![EOS],
        config,
        metrics,
    };
    Engine::start(parts).unwrap()
}

fn start(model: FakeModel, config: EngineConfig) -> Engine {
    start_with(model, config, metrics())
}

/// Value of a series without histogram buckets.
fn series(metrics: &Metrics, name: &str) -> f64 {
    let text = metrics.render();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// What a request came to.
#[derive(Debug)]
struct Answer {
    text: String,
    ids: Vec<u32>,
    logprobs: Vec<TokenLogprob>,
    /// Of all stretches.
    trace: Option<RoutingTrace>,
    end: std::result::Result<Finished, Error>,
}

impl Answer {
    fn finished(&self) -> &Finished {
        self.end.as_ref().unwrap()
    }

    fn kind(&self) -> ErrorKind {
        self.end.as_ref().unwrap_err().kind()
    }
}

async fn next(stream: &mut EventStream) -> Option<Event> {
    tokio::time::timeout(PATIENCE, stream.recv()).await.expect("an event")
}

async fn collect(mut stream: EventStream) -> Answer {
    let (mut text, mut ids, mut logprobs, mut trace) = (String::new(), Vec::new(), Vec::new(), None);
    let mut take = |tokens: Tokens| {
        text += &tokens.text;
        ids.extend(tokens.ids);
        logprobs.extend(tokens.logprobs);
        follow(&mut trace, tokens.trace);
    };
    let end = loop {
        match next(&mut stream).await.expect("a last event") {
            Event::Tokens(tokens) => take(tokens),
            Event::Finished(mut finished) => {
                take(std::mem::take(&mut finished.tail));
                break Ok(*finished);
            }
            Event::Failed(error) => break Err(error),
        }
    };
    assert!(next(&mut stream).await.is_none(), "nothing after the last event");
    Answer { text, ids, logprobs, trace, end }
}

/// Adds a stretch to those before it, on which it follows.
fn follow(trace: &mut Option<RoutingTrace>, next: Option<Box<RoutingTrace>>) {
    let Some(next) = next else { return };
    match trace {
        None => *trace = Some(*next),
        Some(trace) => {
            assert_eq!(next.first_position, trace.first_position + trace.num_tokens(), "a stretch is missing, or came twice");
            trace.append(&next);
        }
    }
}

/// What each choice of a request came to.
async fn collect_choices(mut stream: EventStream, choices: usize) -> Vec<Answer> {
    let mut parts: Vec<Vec<Tokens>> = vec![Vec::new(); choices];
    let mut ends: Vec<Option<Finished>> = vec![None; choices];
    while let Some(event) = next(&mut stream).await {
        match event {
            Event::Tokens(tokens) => parts[tokens.choice].push(tokens),
            Event::Finished(mut finished) => {
                parts[finished.choice].push(std::mem::take(&mut finished.tail));
                let choice = finished.choice;
                assert!(ends[choice].replace(*finished).is_none(), "each choice ends once");
            }
            Event::Failed(error) => panic!("{error}"),
        }
    }
    let joined = |parts: &[Tokens]| {
        let mut trace = None;
        parts.iter().for_each(|tokens| follow(&mut trace, tokens.trace.clone()));
        trace
    };
    let answer = |(parts, end): (Vec<Tokens>, Option<Finished>)| Answer {
        trace: joined(&parts),
        text: parts.iter().map(|tokens| tokens.text.as_str()).collect(),
        ids: parts.iter().flat_map(|tokens| tokens.ids.clone()).collect(),
        logprobs: parts.into_iter().flat_map(|tokens| tokens.logprobs).collect(),
        end: Ok(end.expect("every choice ends")),
    };
    parts.into_iter().zip(ends).map(answer).collect()
}

async fn ask(engine: &Engine, request: Request) -> Answer {
    collect(engine.submit(request).unwrap()).await
}

fn generate(prompt: &[u32], change: impl FnOnce(&mut GenerateParams)) -> Request {
    let mut params = GenerateParams::default();
    change(&mut params);
    Request { task: Task::Generate(params), ..fake::request(prompt) }
}

fn tokens(prompt: &[u32], count: usize) -> Request {
    generate(prompt, |p| p.max_new_tokens = Some(count))
}

#[tokio::test]
async fn a_batch_gives_each_request_what_it_gets_alone() {
    let requests: Vec<Request> = (0..8u32).map(|n| tokens(&(0..=n * 3).map(|i| i * 7 + n).collect::<Vec<_>>(), 5 + n as usize)).collect();
    let engine = start(FakeModel::sum(), fake::config());
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(ask(&engine, request.clone()).await);
    }
    for max_step_tokens in [1, 3, 7, 64] {
        let engine = start(FakeModel::sum(), EngineConfig { max_step_tokens, max_batch_requests: 5, ..fake::config() });
        let streams: Vec<EventStream> = requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
        for (stream, alone) in streams.into_iter().zip(&alone) {
            let together = collect(stream).await;
            assert_eq!((&together.ids, &together.text), (&alone.ids, &alone.text), "{max_step_tokens} tokens per step");
        }
    }
}

#[tokio::test]
async fn long_prompts_are_read_in_chunks_beside_decoding() {
    let (model, control) = FakeModel::sum().gated();
    let engine = start(model, EngineConfig { max_step_tokens: 4, ..fake::config() });
    let first = engine.submit(tokens(&[1], 4)).unwrap();
    assert_eq!(control.step().tokens, [1]);
    let second = engine.submit(tokens(&[2; 7], 1)).unwrap();
    control.decide(Verdict::Go);
    let shape = |batch: &Batch| batch.spans.iter().map(|span| (span.new, span.past, span.logits)).collect::<Vec<_>>();
    assert_eq!(shape(&control.go()), [(1, 1, LogitRows::Last), (3, 0, LogitRows::None)]);
    assert_eq!(shape(&control.go()), [(1, 2, LogitRows::Last), (3, 3, LogitRows::None)]);
    assert_eq!(shape(&control.go()), [(1, 3, LogitRows::Last), (1, 6, LogitRows::Last)]);
    assert_eq!(collect(first).await.ids, [1, 2, 4, 8]);
    assert_eq!(collect(second).await.ids, [14]);
}

#[tokio::test]
async fn ends() {
    let text = "ab🦀cd";
    let reason = |answer: &Answer| answer.finished().reason.clone();
    let engine = start(FakeModel::recite(text), fake::config());

    let answer = ask(&engine, generate(b"x".map(u32::from).as_slice(), |_| ())).await;
    assert_eq!((answer.text.as_str(), reason(&answer)), (text, FinishReason::EndOfSequence(EOS)));
    assert_eq!((answer.ids.len(), answer.finished().generated_tokens, answer.finished().prompt_tokens), (9, 9, 1));
    assert_eq!(answer.finished().generation, 1);

    let answer = ask(&engine, generate(&[120], |p| p.stop_token_ids = vec![u32::from(b'c')])).await;
    assert_eq!((answer.text.as_str(), reason(&answer)), ("ab🦀", FinishReason::StopToken(u32::from(b'c'))));
    assert_eq!(answer.ids.last(), Some(&u32::from(b'c')));

    for (stop, expected) in [("b🦀c", "a"), ("cd", "ab🦀"), ("ab", ""), ("d", "ab🦀c")] {
        let answer = ask(&engine, generate(&[120], |p| p.stop = vec!["zzz".into(), stop.into()])).await;
        assert_eq!((answer.text.as_str(), reason(&answer)), (expected, FinishReason::StopString(stop.into())));
    }

    let answer = ask(&engine, tokens(&[120], 3)).await;
    assert_eq!((answer.text.as_str(), reason(&answer)), ("ab\u{FFFD}", FinishReason::Length));
    let answer = ask(&engine, generate(&[120], |p| (p.stop, p.max_new_tokens) = (vec!["bx".into()], Some(2)))).await;
    assert_eq!((answer.text.as_str(), reason(&answer)), ("ab", FinishReason::Length), "what was held back comes at the end");
    let answer = ask(&engine, generate(&[120], |p| (p.stop, p.max_new_tokens) = (vec!["b".into()], Some(2)))).await;
    assert_eq!(reason(&answer), FinishReason::StopString("b".into()), "a stop string comes before the limit");
    let answer = ask(&engine, generate(&[120], |p| (p.stop, p.stop_token_ids) = (vec!["ab".into()], vec![u32::from(b'b')]))).await;
    assert_eq!((answer.text.as_str(), reason(&answer)), ("a", FinishReason::StopToken(u32::from(b'b'))));

    let answer = ask(&engine, generate(&[120], |p| p.ignore_eos = true)).await;
    assert_eq!((answer.text.as_str(), reason(&answer), answer.ids.len()), (text, FinishReason::Length, 32));
    let answer = ask(&engine, generate(&[120; 60], |p| p.ignore_eos = true)).await;
    assert_eq!((reason(&answer), answer.ids.len()), (FinishReason::Length, 4), "the context ends");
}

#[tokio::test]
async fn streamed_pieces_are_whole_characters() {
    let engine = start(FakeModel::recite("é🦀"), fake::config());
    let mut stream = engine.submit(fake::request(&[120])).unwrap();
    let mut pieces = Vec::new();
    while let Some(event) = stream.next().await {
        if let Event::Tokens(tokens) = event {
            pieces.push(tokens.text);
        }
    }
    assert_eq!(pieces, ["", "é", "", "", "", "🦀"]);
}

/// Logits without a pattern, from the history alone.
fn noise(history: &[u32]) -> Vec<f32> {
    let mut state = history.iter().fold(0x9E37_79B9u32, |hash, &token| (hash ^ token).wrapping_mul(0x0100_0193));
    (0..VOCAB)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 * 4.0
        })
        .collect()
}

#[tokio::test]
async fn a_seed_gives_the_same_text_in_any_company() {
    let sampled = |seed| {
        generate(&[9, 9], |p| {
            (p.temperature, p.seed, p.top_k, p.top_p, p.min_p) = (0.9, seed, 100, 0.95, 0.01);
            (p.max_new_tokens, p.ignore_eos, p.repetition_penalty) = (Some(20), true, 1.1);
        })
    };
    let engine = start(FakeModel::new(noise), fake::config());
    let alone = ask(&engine, sampled(5)).await.ids;
    assert_ne!(ask(&engine, sampled(6)).await.ids, alone);
    let engine = start(FakeModel::new(noise), EngineConfig { max_step_tokens: 3, ..fake::config() });
    let others: Vec<EventStream> = (10..14).map(|seed| engine.submit(sampled(seed)).unwrap()).collect();
    assert_eq!(ask(&engine, sampled(5)).await.ids, alone);
    for other in others {
        assert_eq!(collect(other).await.ids.len(), 20);
    }
}

#[tokio::test]
async fn logprobs_are_those_of_the_model() {
    let engine = start(FakeModel::new(noise), fake::config());
    let answer = ask(&engine, generate(&[7], |p| (p.logprobs, p.max_new_tokens, p.repetition_penalty) = (Some(3), Some(4), 5.0))).await;
    let mut history = vec![7];
    assert_eq!(answer.logprobs.len(), answer.ids.len());
    for (&id, found) in answer.ids.iter().zip(&answer.logprobs) {
        assert_eq!(found, &sampler::logprob(&noise(&history), id, 3));
        assert_eq!(found.alternatives.len(), 3);
        history.push(id);
    }
    assert!(ask(&engine, tokens(&[7], 2)).await.logprobs.is_empty());
}

#[tokio::test]
async fn scores() {
    let prompt: Vec<u32> = (0..11).map(|n| n * 13 % 200).collect();
    for max_step_tokens in [1, 4, 64] {
        let engine = start(FakeModel::new(noise), EngineConfig { max_step_tokens, ..fake::config() });
        let score = |prompt: &[u32]| Request { task: Task::Score { alternatives: 2 }, ..fake::request(prompt) };
        let busy = engine.submit(tokens(&[3, 4], 9)).unwrap();
        let answer = ask(&engine, score(&prompt)).await;
        let finished = answer.finished();
        assert_eq!(finished.prompt_logprobs.len(), prompt.len());
        assert_eq!(finished.prompt_logprobs[0], TokenLogprob { token: prompt[0], logprob: None, alternatives: Vec::new() });
        for n in 1..prompt.len() {
            assert_eq!(finished.prompt_logprobs[n], sampler::logprob(&noise(&prompt[..n]), prompt[n], 2));
        }
        assert_eq!((finished.generated_tokens, finished.reason.clone(), answer.ids.len()), (0, FinishReason::Length, 0));
        assert_eq!(finished.timing.decode, Duration::ZERO);
        assert_eq!(ask(&engine, score(&[5])).await.finished().prompt_logprobs.len(), 1);
        assert_eq!(collect(busy).await.ids.len(), 9);
    }
}

/// An engine of one slot, with a request that runs in it and waits in its first forward.
fn occupied(config: EngineConfig) -> (Engine, Control, EventStream) {
    let (model, control) = FakeModel::sum().gated();
    let engine = start(model, EngineConfig { max_batch_requests: 1, max_step_tokens: 2, ..config });
    let stream = engine.submit(tokens(&[1, 2, 3], 8)).unwrap();
    assert_eq!(control.step().tokens, [1, 2]);
    (engine, control, stream)
}

#[tokio::test]
async fn cancelling_while_prefilling_frees_the_slot() {
    let (engine, control, stream) = occupied(fake::config());
    drop(stream);
    let follower = engine.submit(tokens(&[9], 1)).unwrap();
    control.decide(Verdict::Go);
    assert_eq!(control.go().tokens, [9], "the very next step");
    assert_eq!(collect(follower).await.ids, [9]);
}

#[tokio::test]
async fn cancelling_while_decoding_frees_the_slot() {
    let (engine, control, mut stream) = occupied(fake::config());
    control.decide(Verdict::Go);
    control.go();
    assert!(matches!(next(&mut stream).await, Some(Event::Tokens(_))));
    control.step();
    drop(stream);
    let follower = engine.submit(tokens(&[9], 1)).unwrap();
    control.decide(Verdict::Go);
    assert_eq!(control.go().tokens, [9]);
    assert_eq!(collect(follower).await.ids, [9]);
}

#[tokio::test]
async fn cancelling_while_queued_frees_the_place() {
    let metrics = metrics();
    let (model, control) = FakeModel::sum().gated();
    let config = EngineConfig { max_batch_requests: 1, max_queue_requests: 1, ..fake::config() };
    let engine = start_with(model, config, metrics.clone());
    let running = engine.submit(tokens(&[1], 1)).unwrap();
    control.step();
    let queued = engine.submit(tokens(&[2], 1)).unwrap();
    assert_eq!((engine.status().running, engine.status().waiting), (1, 1));
    let refused = engine.submit(tokens(&[3], 1)).unwrap_err();
    assert!(matches!(refused, Error::QueueFull { limit: QueueLimit::Requests(1), .. }));
    assert_eq!(refused.kind(), ErrorKind::ResourceExhausted);
    drop(queued);
    control.decide(Verdict::Go);
    assert_eq!(collect(running).await.ids, [1]);
    tokio::time::timeout(PATIENCE, engine.drained()).await.unwrap();
    assert_eq!(series(&metrics, "hardmax_request_finished_total{reason=\"cancelled\"}"), 1.0);
    assert_eq!(series(&metrics, "hardmax_admission_rejections_total{reason=\"queue_full\"}"), 1.0);
    assert_eq!(series(&metrics, "hardmax_requests_waiting"), 0.0);
    let third = engine.submit(tokens(&[3], 1)).unwrap();
    assert_eq!(control.go().tokens, [3]);
    assert_eq!(collect(third).await.ids, [3]);
}

#[tokio::test]
async fn a_slow_reader_stalls_nobody() {
    let engine = start(FakeModel::sum(), EngineConfig { event_buffer: 3, max_batch_requests: 2, ..fake::config() });
    let slow = engine.submit(tokens(&[1], 20)).unwrap();
    for n in 2..10 {
        assert_eq!(ask(&engine, tokens(&[n], 20)).await.ids.len(), 20);
    }
    assert_eq!(engine.status().running, 1);
    let answer = collect(slow).await;
    assert_eq!(answer.ids.len(), 20);
    assert_eq!(answer.finished().reason, FinishReason::Length);
}

#[tokio::test]
async fn a_slow_reader_that_leaves_is_noticed() {
    let engine = start(FakeModel::sum(), EngineConfig { event_buffer: 2, ..fake::config() });
    let mut slow = engine.submit(tokens(&[1], 20)).unwrap();
    assert!(matches!(next(&mut slow).await, Some(Event::Tokens(_))));
    drop(slow);
    tokio::time::timeout(PATIENCE, engine.drained()).await.unwrap();
}

fn phase(answer: &Answer) -> &'static str {
    match answer.end {
        Err(Error::DeadlineExceeded { phase }) => phase,
        ref other => panic!("{other:?}"),
    }
}

const HOUR: Duration = Duration::from_secs(3600);

/// An engine whose clock goes an hour further each time the returned function is called.
fn start_with_jumps(model: FakeModel, config: EngineConfig, metrics: Arc<Metrics>) -> (Engine, impl Fn()) {
    let jumps = Arc::new(AtomicU32::new(0));
    let jump = {
        let jumps = jumps.clone();
        move || {
            jumps.fetch_add(1, Ordering::SeqCst);
        }
    };
    let clock = Box::new(move || Instant::now() + HOUR * jumps.load(Ordering::SeqCst));
    let parts = EngineParts {
        model: Box::new(model),
        generation: FIRST_GENERATION,
        background: None,
        tokenizer: fake::tokenizer(),
        eos_token_ids: vec![EOS],
        config,
        metrics,
    };
    (Engine::start_with_clock(parts, clock).unwrap(), jump)
}

#[tokio::test]
async fn deadlines_in_every_phase() {
    let with = |prompt: &[u32], deadline| Request { deadline: Some(deadline), ..tokens(prompt, 8) };
    let metrics = metrics();
    let (model, control) = FakeModel::sum().gated();
    let config = EngineConfig { max_batch_requests: 1, max_step_tokens: 2, ..fake::config() };
    let (engine, jump) = start_with_jumps(model, config, metrics.clone());

    let late = engine.submit(with(&[1], Instant::now())).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::DeadlineExceeded);

    let deadline = Instant::now() + HOUR / 2;
    let prefilling = engine.submit(with(&[1, 2, 3], deadline)).unwrap();
    control.step();
    let queued = engine.submit(with(&[4], deadline)).unwrap();
    jump();
    control.decide(Verdict::Go);
    assert_eq!(phase(&collect(prefilling).await), "prefilling");
    assert_eq!(phase(&collect(queued).await), "queued");

    let decoding = engine.submit(with(&[1], deadline + HOUR)).unwrap();
    control.go();
    control.step();
    jump();
    control.decide(Verdict::Go);
    assert_eq!(phase(&collect(decoding).await), "decoding");
    assert_eq!(series(&metrics, "hardmax_request_finished_total{reason=\"deadline\"}"), 3.0);
    assert_eq!(series(&metrics, "hardmax_admission_rejections_total{reason=\"deadline\"}"), 1.0);
}

#[tokio::test]
async fn a_deadline_reaches_a_blocked_reader() {
    let metrics = metrics();
    let (model, control) = FakeModel::sum().gated();
    let (engine, jump) = start_with_jumps(model, EngineConfig { event_buffer: 2, ..fake::config() }, metrics.clone());
    let stream = engine.submit(Request { deadline: Some(Instant::now() + HOUR / 2), ..tokens(&[1], 20) }).unwrap();
    control.step();
    // A request that decodes beside it shows that the blocked one is not scheduled any more.
    let other = engine.submit(tokens(&[2], 1)).unwrap();
    control.decide(Verdict::Go);
    assert_eq!(control.go().tokens, [2]);
    assert_eq!(collect(other).await.ids, [2]);
    jump();
    tokio::time::timeout(PATIENCE, engine.drained()).await.unwrap();
    let answer = collect(stream).await;
    assert_eq!((phase(&answer), answer.ids.len()), ("decoding", 1));
}

#[tokio::test]
async fn readers_that_never_read_do_not_keep_their_slots() {
    let config = EngineConfig { event_buffer: 2, max_batch_requests: 2, reader_timeout: Duration::from_millis(50), ..fake::config() };
    let metrics = metrics();
    let engine = start_with(FakeModel::sum(), config, metrics.clone());
    let stalled = [&[1], &[2]].map(|prompt| engine.submit(tokens(prompt, 20)).unwrap());
    assert_eq!(ask(&engine, tokens(&[3], 1)).await.ids.len(), 1);
    for stream in stalled {
        let answer = collect(stream).await;
        assert_eq!((answer.ids.len(), answer.kind()), (1, ErrorKind::Cancelled));
    }
    assert_eq!(series(&metrics, "hardmax_request_finished_total{reason=\"cancelled\"}"), 2.0);
}

#[tokio::test]
async fn draining_finishes_what_is_inside() {
    let (engine, control, running) = occupied(fake::config());
    let queued = engine.submit(tokens(&[5], 1)).unwrap();
    engine.drain();
    assert!(matches!(engine.submit(tokens(&[6], 1)), Err(Error::Draining)));
    assert!(engine.status().draining && engine.status().alive);
    control.decide(Verdict::Go);
    drop(control);
    tokio::time::timeout(PATIENCE, engine.drained()).await.unwrap();
    assert_eq!(collect(running).await.ids.len(), 8);
    assert_eq!(collect(queued).await.ids, [5]);
    assert_eq!((engine.status().running, engine.status().waiting), (0, 0));
}

#[tokio::test]
async fn shutdown_fails_what_is_left() {
    let (engine, control, running) = occupied(fake::config());
    let queued = engine.submit(tokens(&[5], 1)).unwrap();
    let other = engine.clone();
    let stopping = std::thread::spawn(move || other.shutdown());
    while !engine.status().draining {
        std::thread::yield_now();
    }
    control.decide(Verdict::Go);
    drop(control);
    tokio::time::timeout(PATIENCE, engine.closed()).await.unwrap();
    stopping.join().unwrap();
    assert_eq!(collect(queued).await.kind(), ErrorKind::Unavailable);
    let running = collect(running).await;
    assert_eq!((running.kind(), running.ids.len()), (ErrorKind::Unavailable, 0), "no step follows the one under way");
    assert!(matches!(engine.submit(tokens(&[6], 1)), Err(Error::Draining)));
    engine.shutdown();
}

#[tokio::test]
async fn the_last_handle_ends_the_thread() {
    let engine = start(FakeModel::sum(), fake::config());
    let stream = engine.submit(tokens(&[1], 32)).unwrap();
    let clone = engine.clone();
    drop(engine);
    assert!(clone.status().alive);
    drop(clone);
    match collect(stream).await.end {
        Err(Error::Draining) | Ok(_) => {}
        Err(other) => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_failing_forward_fails_its_batch_only() {
    for (verdict, panics) in [(Verdict::Fail, 0.0), (Verdict::Panic, 1.0), (Verdict::Misshape, 0.0)] {
        let metrics = metrics();
        let (model, control) = FakeModel::sum().gated();
        let engine = start_with(model, EngineConfig { max_batch_requests: 2, ..fake::config() }, metrics.clone());
        let first = engine.submit(tokens(&[1], 4)).unwrap();
        control.step();
        let second = engine.submit(tokens(&[2], 4)).unwrap();
        let queued = engine.submit(tokens(&[3], 2)).unwrap();
        control.decide(Verdict::Go);
        assert_eq!(control.step().spans.len(), 2);
        control.decide(verdict);
        assert_eq!(collect(first).await.kind(), ErrorKind::Internal);
        assert_eq!(collect(second).await.kind(), ErrorKind::Internal);
        drop(control);
        assert_eq!(collect(queued).await.ids, [3, 6]);
        assert_eq!(ask(&engine, tokens(&[4], 2)).await.ids, [4, 8]);
        assert_eq!(series(&metrics, "hardmax_engine_panics_total"), panics);
        assert_eq!(series(&metrics, "hardmax_request_finished_total{reason=\"error\"}"), 2.0);
    }
}

#[tokio::test]
async fn non_finite_logits_fail_one_sequence() {
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let model = FakeModel::new(move |history| {
            let mut row = fake::one_hot(history.iter().sum::<u32>() % 256);
            if history[0] == 13 && history.len() > 2 {
                row[100] = poison;
            }
            row
        });
        let (model, control) = model.gated();
        let engine = start(model, fake::config());
        let good = engine.submit(tokens(&[1], 6)).unwrap();
        control.step();
        let bad = engine.submit(tokens(&[13], 6)).unwrap();
        let bad_score = engine.submit(Request { task: Task::Score { alternatives: 0 }, ..fake::request(&[13, 1, 1]) }).unwrap();
        control.decide(Verdict::Go);
        drop(control);
        let bad = collect(bad).await;
        assert!(matches!(bad.end, Err(Error::NonFinite)));
        assert_eq!(bad.ids, [13, 26]);
        assert!(matches!(collect(bad_score).await.end, Err(Error::NonFinite)));
        assert_eq!(collect(good).await.ids, [1, 2, 4, 8, 16, 32]);
    }
}

#[tokio::test]
async fn bad_requests_and_configurations_are_refused() {
    let metrics = metrics();
    let engine = start_with(FakeModel::sum(), fake::config(), metrics.clone());
    assert_eq!(engine.submit(fake::request(&[])).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(engine.submit(fake::request(&[0; 65])).unwrap_err().kind(), ErrorKind::OutOfRange);
    assert_eq!(engine.submit(tokens(&[0], 33)).unwrap_err().kind(), ErrorKind::OutOfRange);
    assert_eq!(series(&metrics, "hardmax_admission_rejections_total{reason=\"too_long\"}"), 1.0);
    assert_eq!(engine.status().waiting, 0);
    for config in [
        EngineConfig { max_batch_requests: 0, ..fake::config() },
        EngineConfig { max_step_tokens: 0, ..fake::config() },
        EngineConfig { max_new_tokens: 0, ..fake::config() },
        EngineConfig { event_buffer: 1, ..fake::config() },
    ] {
        let model = Box::new(FakeModel::sum());
        let parts = EngineParts {
            model,
            generation: FIRST_GENERATION,
            background: None,
            tokenizer: fake::tokenizer(),
            eos_token_ids: vec![EOS],
            config,
            metrics: metrics.clone(),
        };
        assert_eq!(Engine::start(parts).unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
}

#[tokio::test]
async fn metrics_and_timing_follow_a_request() {
    let metrics = metrics();
    let engine = start_with(FakeModel::sum(), EngineConfig { max_step_tokens: 2, ..fake::config() }, metrics.clone());
    let answer = ask(&engine, tokens(&[1, 2, 3], 4)).await;
    let timing = answer.finished().timing;
    assert!(timing.prefill > Duration::ZERO && timing.decode > Duration::ZERO);
    for (name, value) in [
        ("hardmax_prompt_tokens_total", 3.0),
        ("hardmax_generated_tokens_total", 4.0),
        ("hardmax_request_finished_total{reason=\"length\"}", 1.0),
        ("hardmax_time_to_first_token_seconds_count", 1.0),
        ("hardmax_inter_token_latency_seconds_count", 3.0),
        ("hardmax_request_seconds_count", 1.0),
        ("hardmax_decode_seconds_count", 1.0),
        ("hardmax_request_generated_tokens_sum", 4.0),
        ("hardmax_step_tokens_sum", 6.0),
        ("hardmax_step_seconds_count", 5.0),
        ("hardmax_expert_tokens_total{model=\"fake\",layer=\"0\",expert=\"0\"}", 6.0),
        ("hardmax_dead_experts{model=\"fake\",layer=\"0\"}", 3.0),
        ("hardmax_requests_running", 0.0),
        ("hardmax_requests_waiting", 0.0),
    ] {
        assert_eq!(series(&metrics, name), value, "{name}");
    }
}
