//! Other weights between two steps: what is inside ends on its own, what comes runs on the new, and what nobody needs goes.

use std::sync::{Weak, atomic::AtomicBool};

use super::{
    cache::{nothing_is_left, sums},
    *,
};
use crate::{
    engine::fake::FakeWeights,
    model::{CacheShape, SharedWeights, load::WeightType},
    moe::policy::{RoutingChoice, WeightForm},
};

/// What [`FakeModel::sum`] says after `prompt` on weights that add `shift`.
fn shifted(prompt: &[u32], count: usize, shift: u32) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    (0..count).for_each(|_| tokens.push((tokens.iter().sum::<u32>() + shift) % 256));
    tokens.split_off(prompt.len())
}

/// Generation `number`, which adds `shift`, and the means to see it go.
fn generation(number: u64, shift: u32) -> (Generation, Weak<FakeWeights>) {
    let weights = Arc::new(FakeWeights(shift));
    let seen = Arc::downgrade(&weights);
    (Generation { number, weights: SharedWeights::new(weights), source: None }, seen)
}

/// Sent when this returns, on a runtime of one thread; the answer comes with the task.
pub(super) async fn publishing(engine: &Engine, generation: Generation, in_flight: InFlight) -> tokio::task::JoinHandle<Result<Switched>> {
    let engine = engine.clone();
    let task = tokio::spawn(async move { engine.publish(generation, in_flight).await });
    tokio::task::yield_now().await;
    task
}

async fn published(engine: &Engine, generation: Generation) -> Switched {
    tokio::time::timeout(PATIENCE, engine.publish(generation, InFlight::Finish)).await.expect("an answer").unwrap()
}

/// Number and weights of what is inside end as they began, in a step of their own; what comes has the new ones; the old go with the last
/// that ran on them.
#[tokio::test]
async fn requests_end_on_the_weights_that_they_began_on() {
    let metrics = metrics();
    let (model, control) = FakeModel::sum().gated();
    let engine = start_with(model, fake::config(), metrics.clone());
    assert_eq!((engine.status().generation, FIRST_GENERATION), (1, 1));
    let (second, second_seen) = generation(2, 5);
    let (third, third_seen) = generation(3, 9);

    let old = engine.submit(tokens(&[1, 2], 4)).unwrap();
    control.step();
    // Not begun yet, and inside all the same.
    let waiting = engine.submit(tokens(&[3], 3)).unwrap();
    let publish = publishing(&engine, second, InFlight::Finish).await;
    let new = engine.submit(tokens(&[1, 2], 3)).unwrap();
    control.decide(Verdict::Go);
    // Two forwards for one step: those of generation 1, then those of generation 2.
    assert_eq!(control.go().tokens, [3, 3]);
    let switched = publish.await.unwrap().unwrap();
    assert_eq!((switched.previous, switched.staying, switched.migrated), (1, 2, 0));
    assert_eq!(engine.status().generation, 2);
    assert_eq!(series(&metrics, "hardmax_model_info{model=\"fake\",generation=\"2\""), 1.0);
    let shown = |name: &str, label: &str| series(&metrics, &format!("hardmax_{name}{{model=\"fake\"{label}}}"));
    assert_eq!((shown("generation", ""), shown("generations_resident", "")), (2.0, 2.0));
    assert_eq!(["current", "older"].map(|age| shown("generation_requests", &format!(",age=\"{age}\""))), [0.0, 2.0]);
    assert_eq!(control.step().tokens, [1, 2]);
    let publish = publishing(&engine, third, InFlight::Finish).await;
    control.decide(Verdict::Go);
    drop(control);
    let switched = publish.await.unwrap().unwrap();
    assert_eq!((switched.previous, switched.staying), (2, 3));
    for (stream, prompt, count, shift, number) in [(old, &[1, 2][..], 4, 0, 1), (waiting, &[3], 3, 0, 1), (new, &[1, 2], 3, 5, 2)] {
        let answer = collect(stream).await;
        assert_eq!((&answer.ids, answer.finished().generation), (&shifted(prompt, count, shift), number));
    }
    let answer = ask(&engine, tokens(&[1, 2], 3)).await;
    assert_eq!((answer.ids, answer.end.unwrap().generation), (shifted(&[1, 2], 3, 9), 3));
    nothing_is_left(&engine, &metrics).await;
    assert!(second_seen.strong_count() == 0 && third_seen.strong_count() > 0, "what nobody runs on is gone");
    for (number, finished) in [(1, 2), (2, 1), (3, 1), (4, 0)] {
        assert_eq!(engine.tally(number), Tally { finished, ..Tally::default() });
    }
}

/// A prefix is known under its generation only, and known again when that comes back.
#[tokio::test]
async fn prefixes_are_those_of_a_generation() {
    let (model, control) = FakeModel::sum().gated();
    let engine = start(model, fake::config());
    let prompt: Vec<u32> = (0..17).collect();
    let ask = async |past: usize, shift: u32| {
        let stream = engine.submit(tokens(&prompt, 2)).unwrap();
        assert_eq!(control.go().spans[0].past, past);
        control.go();
        let answer = collect(stream).await;
        assert_eq!((&answer.ids, answer.finished().cached_prompt_tokens), (&shifted(&prompt, 2, shift), past));
    };
    ask(0, 0).await;
    ask(16, 0).await;
    published(&engine, generation(2, 7).0).await;
    ask(0, 7).await;
    ask(16, 7).await;
    // A rollback.
    let switched = published(&engine, generation(1, 0).0).await;
    assert_eq!(switched.previous, 2);
    ask(16, 0).await;
    published(&engine, generation(2, 7).0).await;
    ask(16, 7).await;
}

/// A request that lost its blocks before a publish computes them again on its own weights after it.
#[tokio::test]
async fn who_is_preempted_across_a_publish_says_the_same_in_the_end() {
    for (prefix_cache, choices) in [(PrefixCache::On, 1), (PrefixCache::Off, 3)] {
        let metrics = metrics();
        let (model, control) = FakeModel::sum().with_cache(8, 6).gated();
        let engine = start_with(model, EngineConfig { prefix_cache, max_queue_requests: 64, ..fake::config() }, metrics.clone());
        let (mut streams, mut publishes) = (Vec::new(), Vec::new());
        for number in 1..8 {
            let prompt = [number as u32; 9];
            streams.push(engine.submit(generate(&prompt, |p| (p.n, p.max_new_tokens) = (choices, Some(20)))).unwrap());
            if number == 1 {
                // Held until all of them are inside: together they do not fit.
                control.step();
            }
            publishes.push(publishing(&engine, generation(number + 1, number as u32).0, InFlight::Finish).await);
        }
        control.decide(Verdict::Go);
        drop(control);
        for publish in publishes {
            publish.await.unwrap().unwrap();
        }
        for (stream, number) in streams.into_iter().zip(1u32..) {
            for answer in collect_choices(stream, choices).await {
                assert_eq!(answer.ids, shifted(&[number; 9], 20, number - 1));
                assert_eq!(answer.finished().generation, u64::from(number));
            }
        }
        assert!(series(&metrics, "hardmax_preemptions_total") > 0.0);
        nothing_is_left(&engine, &metrics).await;
    }
}

/// With [`InFlight::Migrate`] a continuation goes on under the new weights, which see all of its tokens; what must not be of two does not.
#[tokio::test]
async fn what_is_migrated_goes_on_under_the_new_weights() {
    let metrics = metrics();
    let (model, control) = FakeModel::sum().gated();
    let engine = start_with(model, EngineConfig { max_step_tokens: 20, ..fake::config() }, metrics.clone());
    let second = generation(2, 50).0;
    let mut streams = vec![engine.submit(generate(&[1, 2], |p| (p.n, p.max_new_tokens) = (2, Some(3)))).unwrap()];
    control.step();
    let score = Request { task: Task::Score { alternatives: 0 }, ..fake::request(&[4; 25]) };
    let traced = Request { trace: true, ..tokens(&[7], 2) };
    streams.extend([score, traced, tokens(&[9], 2)].map(|request| engine.submit(request).unwrap()));
    control.decide(Verdict::Go);
    control.step();
    let publish = publishing(&engine, second, InFlight::Migrate).await;
    control.decide(Verdict::Go);
    drop(control);
    let switched = publish.await.unwrap().unwrap();
    assert_eq!((switched.previous, switched.staying, switched.migrated), (1, 2, 3));
    let mut streams = streams.into_iter();
    let mut next = || streams.next().unwrap();
    // Two tokens of the first weights (1 + 2, then with it 6), and one of the second, after both.
    for answer in collect_choices(next(), 2).await {
        assert_eq!((&answer.ids[..], answer.finished().generation), (&[3, 6, 62][..], 2));
    }
    let score = collect(next()).await;
    assert_eq!((score.finished().prompt_logprobs.len(), score.finished().generation), (25, 1));
    let traced = collect(next()).await;
    assert_eq!((&traced.ids, traced.finished().generation), (&sums(&[7], 2), 1));
    let last = collect(next()).await;
    assert_eq!((&last.ids[..], last.finished().generation), (&[9, 68][..], 2));
    nothing_is_left(&engine, &metrics).await;
}

#[tokio::test]
async fn what_cannot_be_published_changes_nothing() {
    let metrics = metrics();
    let engine = start_with(FakeModel::sum(), fake::config(), metrics.clone());
    let refused = async |generation: Generation| engine.publish(generation, InFlight::Finish).await.unwrap_err();
    assert!(matches!(refused(generation(0, 3).0).await, Error::InvalidArgument { field, .. } if field == "generation"));
    let foreign = Generation { number: 2, weights: SharedWeights::new(Arc::new("no weights")), source: None };
    for (generation, expected) in [(generation(1, 3).0, "generation 1 is in force already"), (foreign, "not those of a fake")] {
        let error = refused(generation).await;
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
        assert!(error.to_string().contains(expected), "{error}");
    }
    let answer = ask(&engine, tokens(&[1, 2], 3)).await;
    assert_eq!((answer.ids, answer.end.unwrap().generation, engine.status().generation), (sums(&[1, 2], 3), 1, 1));
    engine.shutdown();
    assert!(matches!(refused(generation(2, 3).0).await, Error::Draining));
}

/// What fails is counted where it ran, and what a client did to itself is not.
#[tokio::test]
async fn failures_are_counted_by_generation() {
    let (model, control) = FakeModel::sum().gated();
    let engine = start(model, fake::config());
    for (number, verdict) in [(1, Verdict::Fail), (2, Verdict::Panic)] {
        let failing = engine.submit(generate(&[1], |p| p.n = 2)).unwrap();
        control.step();
        control.decide(verdict);
        assert_eq!(collect(failing).await.kind(), ErrorKind::Internal);
        let cancelled = engine.submit(tokens(&[2], 4)).unwrap();
        control.step();
        drop(cancelled);
        control.decide(Verdict::Go);
        let publish = publishing(&engine, generation(number + 1, 1).0, InFlight::Finish).await;
        publish.await.unwrap().unwrap();
        assert_eq!(engine.tally(number), Tally { failed: 2, ..Tally::default() });
    }
    // After a panic the model has the weights in force, and the fake would notice others.
    let stream = engine.submit(tokens(&[1, 2], 2)).unwrap();
    drop(control);
    assert_eq!(collect(stream).await.ids, shifted(&[1, 2], 2, 1));
}

/// Many streams of every kind, over fifty publishes and rollbacks: none fails, each says what one generation says alone, what is submitted
/// after a publish runs on it, and in the end only the last set of weights is in memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_publishes_and_rollbacks_under_many_streams() {
    for in_flight in [InFlight::Finish, InFlight::Migrate] {
        let metrics = metrics();
        let config = EngineConfig { max_queue_requests: 64, max_batch_requests: 12, max_step_tokens: 24, ..fake::config() };
        let engine = start_with(FakeModel::sum().with_cache(4, 36), config, metrics.clone());
        let over = Arc::new(AtomicBool::new(false));
        let streams: Vec<_> = (0..32).map(|n| tokio::spawn(requests(engine.clone(), n, in_flight, over.clone()))).collect();
        let (mut weights, mut highest, mut staying, mut migrated) = (Vec::new(), 1, 0, 0);
        for n in 0..50 {
            // Every fifth time back to the one in the middle of all so far, of which some have requests and some have none.
            let number = if n % 5 == 4 { highest / 2 } else { highest + 1 };
            highest = highest.max(number);
            let (next, seen) = generation(number, shift(number));
            weights.push((number, seen));
            let switched = engine.publish(next, in_flight).await.unwrap();
            (staying, migrated) = (staying + switched.staying, migrated + switched.migrated);
            let answer = ask(&engine, tokens(&[n, 1], 5)).await;
            if in_flight == InFlight::Finish {
                assert_eq!((&answer.ids, answer.finished().generation), (&shifted(&[n, 1], 5, shift(number)), number));
            }
        }
        over.store(true, Ordering::SeqCst);
        let mut ended = 50;
        for stream in streams {
            ended += stream.await.unwrap();
        }
        ask(&engine, tokens(&[1], 1)).await;
        nothing_is_left(&engine, &metrics).await;
        // Of a number that came back while it had requests, it is their weights that did.
        let alive: Vec<u64> = weights.iter().filter(|(_, seen)| seen.strong_count() > 0).map(|&(number, _)| number).collect();
        assert_eq!(alive, [engine.status().generation], "memory is flat");
        let tally: u64 = (1..=highest).map(|number| engine.tally(number).finished).sum();
        assert_eq!(tally, ended + 1);
        assert_eq!(series(&metrics, "hardmax_request_finished_total{reason=\"error\"}"), 0.0);
        assert!(series(&metrics, "hardmax_preemptions_total") > 0.0 && series(&metrics, "hardmax_prefix_cache_hits_total") > 100.0);
        let expected = if in_flight == InFlight::Finish { staying > 100 } else { staying == 0 && migrated > 100 };
        assert!(expected, "{staying} stayed and {migrated} were migrated");
    }
}

/// What generation `number` adds.
fn shift(number: u64) -> u32 {
    (number as u32 - 1) * 37 % 256
}

/// Requests one after another until it is over; how many sequences ended.
async fn requests(engine: Engine, n: usize, in_flight: InFlight, over: Arc<AtomicBool>) -> u64 {
    let (mut ended, routings) = (0, [RoutingChoice::Native, RoutingChoice::TopK { k: 1, weight_form: Some(WeightForm::Unit) }]);
    let mut round = 0;
    while !over.load(Ordering::SeqCst) {
        round += 1;
        let prompt: Vec<u32> = (0..1 + (n + round) as u32 % 15).map(|i| i % 3 + n as u32 / 8).collect();
        let (choices, count) = (1 + 2 * usize::from(n % 8 == 3), 4 + (n + 3 * round) % 17);
        let request = generate(&prompt, |p| (p.n, p.max_new_tokens) = (choices, Some(count)));
        let request = Request { routing: routings[n % 2].into(), ..request };
        for answer in collect_choices(engine.submit(request).unwrap(), choices).await {
            // What was migrated has a beginning of older ones; the fake itself sees that no blocks are mixed.
            let (known, shift) = (if in_flight == InFlight::Finish { 0 } else { count - 1 }, shift(answer.finished().generation));
            let said: Vec<u32> = prompt.iter().chain(&answer.ids[..known]).copied().collect();
            assert_eq!(answer.ids[known..], shifted(&said, count - known, shift), "{prompt:?}");
            ended += 1;
        }
    }
    ended
}

/// Two sets of weights for one model of tensors or of slices, bit for bit what each says alone.
#[tokio::test]
async fn real_weights_are_not_mixed() {
    for forward in [decoder::Forward::Tensors, decoder::Forward::Host(WeightType::F32), decoder::Forward::Host(WeightType::Bf16)] {
        let room = CacheShape { block_tokens: 4, num_blocks: 200 };
        let engine_over = |routers| {
            let (model, weights) = decoder::scaled("mixtral_gqa", forward, room, routers);
            (decoder::start_over(model, EngineConfig { max_step_tokens: 9, max_queue_requests: 20, ..fake::config() }, metrics()), weights)
        };
        let mut alone = Vec::new();
        for routers in [1.0, 3.0] {
            let (engine, _) = engine_over(routers);
            let mut answers = Vec::new();
            for (request, choices) in decoder::requests() {
                answers.push(collect_choices(engine.submit(request).unwrap(), choices).await);
            }
            alone.push(answers);
        }
        assert!(alone[0].iter().flatten().zip(alone[1].iter().flatten()).any(|(a, b)| a.logprobs != b.logprobs));

        let (engine, first) = engine_over(1.0);
        let (_, second) = engine_over(3.0);
        let mut streams = Vec::new();
        for (number, weights) in [(2, &second), (1, &first), (2, &second), (3, &first)] {
            streams.extend(
                decoder::requests().into_iter().take(3).enumerate().map(|(n, (r, choices))| (n, engine.submit(r).unwrap(), choices)),
            );
            // Something has been computed of them.
            ask(&engine, tokens(&[5, 6], 2)).await;
            engine.publish(Generation { number, weights: weights.clone(), source: None }, InFlight::Finish).await.unwrap();
        }
        for (n, stream, choices) in streams {
            for (found, choice) in collect_choices(stream, choices).await.iter().zip(0..) {
                let alone: &Answer = &alone[(found.finished().generation as usize + 1) % 2][n][choice];
                assert_eq!((&found.ids, &found.logprobs), (&alone.ids, &alone.logprobs), "{forward:?}");
            }
        }
    }
}
