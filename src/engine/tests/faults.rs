//! What goes wrong, and what is refused: panics, hopeless deadlines, full queues, readers that are behind.

use std::sync::atomic::{AtomicBool, AtomicU64};

use super::{
    cache::{nothing_is_left, sums},
    *,
};

/// The clock is read outside of everything that is expected to panic.
#[tokio::test]
async fn a_panic_of_the_engine_itself_starts_it_anew() {
    let explode = Arc::new(AtomicBool::new(false));
    let fuse = explode.clone();
    let clock = Box::new(move || if fuse.swap(false, Ordering::SeqCst) { panic!("as the test wished") } else { Instant::now() });
    let (model, control) = FakeModel::sum().gated();
    let metrics = metrics();
    let config = EngineConfig { max_batch_requests: 2, ..fake::config() };
    let parts = EngineParts {
        model: Box::new(model),
        generation: FIRST_GENERATION,
        background: None,
        tokenizer: fake::tokenizer(),
        eos_token_ids: vec![EOS],
        config,
        metrics: metrics.clone(),
    };
    let engine = Engine::start_with_clock(parts, clock).unwrap();
    let running = engine.submit(generate(&[1; 9], |p| p.n = 2)).unwrap();
    control.step();
    let queued = engine.submit(tokens(&[2], 4)).unwrap();
    control.decide(Verdict::Go);
    control.step();
    explode.store(true, Ordering::SeqCst);
    control.decide(Verdict::Go);
    drop(control);
    for stream in [running, queued] {
        let answer = collect(stream).await;
        assert!(matches!(&answer.end, Err(Error::Internal(message)) if message.contains("anew")), "{answer:?}");
    }
    assert_eq!(ask(&engine, tokens(&[1; 9], 4)).await.ids, sums(&[1; 9], 4));
    assert_eq!(series(&metrics, "hardmax_engine_panics_total"), 1.0);
    assert_eq!(series(&metrics, "hardmax_request_finished_total{reason=\"error\"}"), 3.0);
    tokio::time::timeout(PATIENCE, engine.drained()).await.unwrap();
    assert_eq!(series(&metrics, "hardmax_kv_cache_usage_ratio"), 0.0);
    assert!(engine.status().alive);
    engine.shutdown();
    assert!(!engine.status().alive);
}

/// Whoever watches the process must see that it is of no use any more.
#[tokio::test]
async fn without_its_device_the_engine_ends() {
    let (model, control) = FakeModel::sum().gated();
    let engine = start(model, EngineConfig { max_batch_requests: 1, ..fake::config() });
    let running = engine.submit(tokens(&[1, 2], 4)).unwrap();
    control.step();
    let queued = engine.submit(tokens(&[3], 4)).unwrap();
    control.decide(Verdict::Lose);
    let answer = collect(running).await;
    assert!(matches!(&answer.end, Err(Error::Internal(message)) if message.contains("device is lost")), "{answer:?}");
    assert!(matches!(collect(queued).await.end, Err(Error::Draining)));
    tokio::time::timeout(PATIENCE, engine.closed()).await.unwrap();
    assert!(!engine.status().alive);
    assert!(engine.submit(tokens(&[3], 4)).is_err());
}

#[tokio::test]
async fn after_a_panic_of_the_model_nothing_is_known() {
    let prompt: Vec<u32> = (0..20).collect();
    let (model, control) = FakeModel::sum().gated();
    let engine = start(model, fake::config());
    for (verdict, past) in [(Verdict::Fail, 16), (Verdict::Panic, 0)] {
        let known = engine.submit(tokens(&prompt, 1)).unwrap();
        control.go();
        assert_eq!(collect(known).await.ids.len(), 1);
        let culprit = engine.submit(tokens(&[7], 1)).unwrap();
        control.step();
        control.decide(verdict);
        assert_eq!(collect(culprit).await.kind(), ErrorKind::Internal);
        let again = engine.submit(tokens(&prompt, 1)).unwrap();
        assert_eq!(control.go().spans[0].past, past);
        assert_eq!(collect(again).await.ids, sums(&prompt, 1));
    }
}

#[tokio::test]
async fn a_choice_that_fails_ends_its_request() {
    let metrics = metrics();
    // Only sampled choices differ: some of them say an even token first.
    let model = FakeModel::new(|history| {
        let mut row = noise(history);
        if history.len() > 3 && history[3].is_multiple_of(2) {
            row[0] = f32::NAN;
        }
        row
    });
    let engine = start_with(model, EngineConfig { max_choices: 8, ..fake::config() }, metrics.clone());
    let several = generate(&[1, 2, 3], |p| (p.n, p.temperature, p.seed, p.max_new_tokens, p.ignore_eos) = (8, 2.0, 1, Some(20), true));
    let mut stream = engine.submit(several).unwrap();
    let mut ends = Vec::new();
    while let Some(event) = next(&mut stream).await {
        match event {
            Event::Tokens(_) => {}
            end => ends.push(end),
        }
    }
    assert!(matches!(&ends[..], [Event::Failed(Error::NonFinite)]), "{ends:?}");
    assert_eq!(series(&metrics, "hardmax_request_finished_total{reason=\"error\"}"), 8.0);
    nothing_is_left(&engine, &metrics).await;
}

#[tokio::test]
async fn what_cannot_be_in_time_is_not_begun() {
    // Each row of a score takes an eighth of a second on this clock.
    let eighths = Arc::new(AtomicU64::new(0));
    let (ticks, clock_ticks) = (eighths.clone(), eighths.clone());
    let model = FakeModel::new(move |history| {
        ticks.fetch_add(1, Ordering::SeqCst);
        fake::one_hot(history.iter().sum::<u32>() % 256)
    });
    let start = Instant::now();
    let now = move || start + Duration::from_millis(125) * clock_ticks.load(Ordering::SeqCst) as u32;
    let clock = now.clone();
    let metrics = metrics();
    let config = EngineConfig { max_step_tokens: 8, prefix_cache: PrefixCache::Off, ..fake::config() };
    let parts = EngineParts {
        model: Box::new(model),
        generation: FIRST_GENERATION,
        background: None,
        tokenizer: fake::tokenizer(),
        eos_token_ids: vec![EOS],
        config,
        metrics: metrics.clone(),
    };
    let engine = Engine::start_with_clock(parts, Box::new(clock)).unwrap();
    let within = |seconds| Request { deadline: Some(now() + Duration::from_secs(seconds)), ..tokens(&[1; 40], 1) };

    let brief = Request { deadline: Some(now() + Duration::from_secs(1)), ..tokens(&[1; 3], 1) };
    assert_eq!(ask(&engine, brief).await.ids, [3], "nothing has been measured yet, nor is it by a step that is not full");
    ask(&engine, Request { task: Task::Score { alternatives: 0 }, ..fake::request(&[1; 8]) }).await;
    let shed = ask(&engine, within(2)).await;
    assert!(matches!(shed.end, Err(Error::DeadlineExceeded { phase }) if phase.contains("too little time")), "8 tokens a second");
    assert_eq!(ask(&engine, within(10)).await.ids, [40]);
    assert_eq!(series(&metrics, "hardmax_admission_rejections_total{reason=\"deadline\"}"), 1.0);
    assert_eq!(series(&metrics, "hardmax_request_finished_total{reason=\"deadline\"}"), 0.0);
    nothing_is_left(&engine, &metrics).await;
}

#[tokio::test]
async fn the_queue_is_bounded_by_tokens_too() {
    let metrics = metrics();
    let (model, control) = FakeModel::sum().gated();
    let config = EngineConfig { max_batch_requests: 1, max_queue_tokens: 10, ..fake::config() };
    let engine = start_with(model, config, metrics.clone());
    let running = engine.submit(tokens(&[1], 1)).unwrap();
    control.step();
    let queued = [engine.submit(tokens(&[2; 20], 1)).unwrap()];
    let refused = engine.submit(tokens(&[3], 1)).unwrap_err();
    assert!(matches!(refused, Error::QueueFull { limit: QueueLimit::Tokens(10), retry_after } if retry_after >= Duration::from_secs(1)));
    assert_eq!((engine.status().waiting, engine.status().waiting_tokens), (1, 20));
    drop(queued);
    control.decide(Verdict::Go);
    collect(running).await;
    tokio::time::timeout(PATIENCE, engine.drained()).await.unwrap();
    let next = engine.submit(tokens(&[3], 1)).unwrap();
    control.go();
    assert_eq!(collect(next).await.ids, [3]);
    assert_eq!(series(&metrics, "hardmax_admission_rejections_total{reason=\"queue_full\"}"), 1.0);
    nothing_is_left(&engine, &metrics).await;
}

#[tokio::test]
async fn larger_priorities_go_first() {
    let (model, control) = FakeModel::sum().gated();
    let engine = start(model, EngineConfig { max_batch_requests: 1, ..fake::config() });
    let mut streams = vec![engine.submit(tokens(&[1], 1)).unwrap()];
    control.step();
    for (token, priority) in [(2, -1), (3, 0), (4, 7), (5, 0)] {
        streams.push(engine.submit(Request { priority, ..tokens(&[token], 1) }).unwrap());
    }
    control.decide(Verdict::Go);
    let order: Vec<u32> = (0..4).map(|_| control.go().tokens[0]).collect();
    assert_eq!(order, [4, 3, 5, 2]);
    for stream in streams {
        assert_eq!(collect(stream).await.ids.len(), 1);
    }
}

/// Three events are within four places, two traces of 3000 tokens beyond the bytes of those.
#[tokio::test]
async fn traces_that_nobody_reads_pause_their_request() {
    let metrics = metrics();
    let (model, control) = FakeModel::sum().with_context(1 << 14).with_cache(16, 1024).gated();
    let engine = start_with(model, EngineConfig { event_buffer: 4, max_step_tokens: 3000, ..fake::config() }, metrics.clone());
    let traced = engine.submit(Request { task: Task::Read, trace: true, ..fake::request(&[1; 12_000]) }).unwrap();
    assert_eq!(control.go().tokens.len(), 3000);
    assert_eq!(control.step().tokens.len(), 3000);
    // A request that runs beside it shows that it is not scheduled any more.
    let other = engine.submit(tokens(&[2], 1)).unwrap();
    control.decide(Verdict::Go);
    assert_eq!(control.go().tokens, [2]);
    assert_eq!(collect(other).await.ids, [2]);
    drop(control);
    assert_eq!(collect(traced).await.trace.unwrap().num_tokens(), 12_000);
    nothing_is_left(&engine, &metrics).await;
}

#[tokio::test]
async fn a_reader_that_is_behind_gives_its_place_away_and_gets_it_back() {
    let metrics = metrics();
    let config = EngineConfig { max_batch_requests: 1, event_buffer: 2, reader_timeout: 2 * HOUR, ..fake::config() };
    let (model, control) = FakeModel::sum().gated();
    let (engine, jump) = start_with_jumps(model, config, metrics.clone());
    let slow = engine.submit(tokens(&[1; 9], 20)).unwrap();
    control.step();
    let other = engine.submit(tokens(&[2], 1)).unwrap();
    control.decide(Verdict::Go);
    // It is seen to be behind once before the clock jumps: a command makes the engine look.
    drop(engine.submit(tokens(&[3], 1)).unwrap());
    while engine.status().waiting > 1 {
        tokio::task::yield_now().await;
    }
    jump();
    assert_eq!(control.go().tokens, [2]);
    assert_eq!(collect(other).await.ids, [2]);
    drop(control);
    assert_eq!(collect(slow).await.ids, sums(&[1; 9], 20));
    assert_eq!(series(&metrics, "hardmax_preemptions_total"), 1.0);
    nothing_is_left(&engine, &metrics).await;
}
