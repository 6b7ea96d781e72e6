//! Many requests at once, of every kind, some given up, some too late, in too few blocks.

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{
    cache::{nothing_is_left, sums},
    *,
};
use crate::moe::policy::RoutingChoice;

/// One request of the storm, and after how many events its reader leaves.
struct Drop {
    request: Request,
    choices: usize,
    patience: usize,
    /// What each choice says.
    expected: Vec<u32>,
    score: bool,
}

fn drops(rng: &mut StdRng, count: usize) -> Vec<Drop> {
    let routings = [RoutingChoice::Native, RoutingChoice::TopK { k: 1, weight_form: None }, RoutingChoice::Soft { temperature: None }];
    let one = |_| {
        // Few beginnings, so that prefixes are known.
        let mut prompt = vec![rng.random_range(1..3); rng.random_range(1..24)];
        prompt.extend((0..rng.random_range(0..4)).map(|_| rng.random_range(0..4)));
        let (choices, count) = (if rng.random_bool(0.2) { rng.random_range(2..5) } else { 1 }, rng.random_range(1..20));
        let score = choices == 1 && rng.random_bool(0.2);
        let mut request = generate(&prompt, |p| (p.n, p.max_new_tokens) = (choices, Some(count)));
        if score {
            request.task = Task::Score { alternatives: 0 };
        }
        request.routing = routings[rng.random_range(0..routings.len())].into();
        request.priority = rng.random_range(-1..=1);
        request.deadline = rng.random_bool(0.2).then(|| Instant::now() + Duration::from_micros(rng.random_range(0..20_000)));
        let patience = if rng.random_bool(0.25) { rng.random_range(0..12) } else { usize::MAX };
        let expected = if score { Vec::new() } else { sums(&prompt, count) };
        Drop { request, choices, patience, expected, score }
    };
    (0..count).map(one).collect()
}

/// Reads a stream, checks every token of it, and returns whether it came to its end.
async fn read(mut stream: EventStream, drop: Drop, pause: bool) -> bool {
    let mut said = vec![Vec::new(); drop.choices];
    let (mut events, mut finished) = (0, 0);
    while events < drop.patience {
        if pause {
            tokio::task::yield_now().await;
        }
        events += 1;
        match next(&mut stream).await {
            Some(Event::Tokens(tokens)) => said[tokens.choice].extend(tokens.ids),
            Some(Event::Finished(end)) => {
                said[end.choice].extend(&end.tail.ids);
                assert_eq!(said[end.choice], drop.expected);
                assert_eq!(end.prompt_logprobs.len(), if drop.score { drop.request.prompt.len() } else { 0 });
                finished += 1;
            }
            Some(Event::Failed(error)) => {
                assert!(matches!(error, Error::DeadlineExceeded { .. }) && drop.request.deadline.is_some(), "{error}");
                break;
            }
            None => break,
        }
        assert!(said.iter().all(|said| drop.expected.starts_with(said)), "nothing twice, nothing left out");
    }
    finished == drop.choices
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_finishes_or_fails_and_leaves_nothing() {
    let (mut preempted, mut hits, mut complete) = (0.0, 0.0, 0);
    for seed in 0..12 {
        let mut rng = StdRng::seed_from_u64(seed);
        let config = EngineConfig {
            max_batch_requests: rng.random_range(1..8),
            max_queue_requests: 1000,
            max_step_tokens: rng.random_range(1..40),
            event_buffer: rng.random_range(2..6),
            prefix_cache: if rng.random() { PrefixCache::On } else { PrefixCache::Off },
            ..fake::config()
        };
        let model = FakeModel::sum().with_cache(4, rng.random_range(12..30));
        let model = if seed % 2 == 1 { model.drawing() } else { model };
        let metrics = metrics();
        let engine = start_with(model, config, metrics.clone());
        let drops = drops(&mut rng, 60);
        let mut let_in = 0;
        let mut readers = Vec::new();
        for drop in drops {
            match engine.submit(drop.request.clone()) {
                Ok(stream) => {
                    let_in += drop.choices;
                    readers.push(tokio::spawn(read(stream, drop, rng.random())));
                }
                Err(error) => assert!(matches!(error, Error::DeadlineExceeded { .. }), "{error}"),
            }
        }
        for reader in readers {
            complete += usize::from(reader.await.unwrap());
        }
        nothing_is_left(&engine, &metrics).await;
        let ended: f64 = ["stop", "length", "cancelled", "deadline"]
            .map(|reason| series(&metrics, &format!("hardmax_request_finished_total{{reason=\"{reason}\"}}")))
            .iter()
            .sum();
        let shed = series(&metrics, "hardmax_admission_rejections_total{reason=\"deadline\"}");
        assert!(ended <= let_in as f64 && ended + shed * 4.0 >= let_in as f64, "{ended} of {let_in} ended, {shed} shed or late");
        preempted += series(&metrics, "hardmax_preemptions_total");
        hits += series(&metrics, "hardmax_prefix_cache_hits_total");
    }
    // How often depends on how fast readers are: these are far below what any machine shows.
    assert!(complete > 200 && preempted > 4.0 && hits > 100.0, "{complete} complete, {preempted} preempted, {hits} tokens known");
}
