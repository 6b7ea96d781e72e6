//! Weights come and go under load: no request fails, none sees two sets of weights, and nothing of them stays behind.

use std::{
    collections::BTreeMap,
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use hardmax::service::proto::{
    GenerateRequest, InFlight, PublishRequest, RollbackRequest, SamplingParams, TuningConfig, TuningRun, inference_client::InferenceClient,
    tuning_client::TuningClient,
};
use tokio::sync::watch;
use tonic::transport::Channel;

use crate::{
    process::Server,
    support::{generate, soon},
    tuning,
};

const CLIENTS: usize = 32;
const SWITCHES: usize = 50;
/// Candidates that are published on the way.
const JOBS: u64 = 3;
/// Of a continuation.
const TOKENS: u32 = 8;
/// Messages between two switches: a fourth of what all clients wait for, so that many begin on each generation.
const APART: usize = 64;
const PROMPTS: [&str; 4] = ["In the beginning", "And it came to pass", "The king", "There was a"];

/// A continuation.
struct Stream {
    prompt: usize,
    tokens: Vec<u32>,
    generation: u64,
    /// Longest wait for a message after the first one.
    gap: Duration,
}

async fn stream(client: &mut InferenceClient<Channel>, prompt: usize, heard: impl Fn()) -> Stream {
    let greedy = SamplingParams { max_new_tokens: Some(TOKENS), temperature: Some(0.0), ..SamplingParams::default() };
    let request = GenerateRequest { sampling: Some(greedy), ..generate(PROMPTS[prompt], TOKENS) };
    let mut messages = client.generate(request).await.expect("no request is refused").into_inner();
    let (mut tokens, mut gap, mut last) = (Vec::new(), Duration::ZERO, None::<Instant>);
    loop {
        let message = messages.message().await.expect("no request fails").expect("every stream says how it ended");
        heard();
        gap = gap.max(last.map_or(Duration::ZERO, |last| last.elapsed()));
        last = Some(Instant::now());
        tokens.extend(message.token_ids);
        if let Some(finish) = message.finish {
            return Stream { prompt, tokens, generation: finish.generation, gap };
        }
    }
}

/// Streams one after the other until told to stop.
async fn load(channel: Channel, index: usize, stop: Arc<AtomicBool>, messages: watch::Sender<usize>) -> Vec<Stream> {
    let (mut client, mut done) = (InferenceClient::new(channel), Vec::new());
    while !stop.load(Ordering::Relaxed) {
        let prompt = (index + done.len()) % PROMPTS.len();
        done.push(stream(&mut client, prompt, || messages.send_modify(|messages| *messages += 1)).await);
    }
    done
}

/// Bytes of a process in memory.
fn resident(process: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    1024.0 * line.trim().trim_end_matches(" kB").parse::<f64>().unwrap()
}

async fn back_to(client: &mut TuningClient<Channel>, generation: u64) {
    let request = RollbackRequest { generation: Some(generation), in_flight: InFlight::Finish.into(), ..RollbackRequest::default() };
    let answer = tokio::time::timeout(tuning::LONG, client.rollback(request)).await.unwrap().unwrap().into_inner();
    assert_eq!(answer.generation, generation);
}

/// Between two generations at every switch: a candidate as long as there are some, then those that there are.
async fn switch(client: &mut TuningClient<Channel>, index: usize) {
    let generation = 2 + (index as u64 / 2) % JOBS;
    match index % 2 {
        0 if (index as u64) < 2 * JOBS => {
            let id = format!("t{}", generation - 1);
            let request = PublishRequest { id, override_gates: true, ..PublishRequest::default() };
            let answer = tokio::time::timeout(tuning::LONG, client.publish(request)).await.unwrap().unwrap().into_inner();
            assert_eq!((answer.generation, answer.previous), (generation, 1));
        }
        0 => back_to(client, generation).await,
        _ => back_to(client, 1).await,
    }
}

/// What every prompt is continued with under every generation, alone.
async fn alone(tuning: &mut TuningClient<Channel>, channel: Channel) -> BTreeMap<(u64, usize), Vec<u32>> {
    let (mut client, mut said) = (InferenceClient::new(channel), BTreeMap::new());
    for generation in (2..2 + JOBS).chain([1]) {
        back_to(tuning, generation).await;
        for prompt in 0..PROMPTS.len() {
            let stream = stream(&mut client, prompt, || {}).await;
            assert_eq!(stream.generation, generation);
            said.insert((generation, prompt), stream.tokens);
        }
    }
    said
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_publishes_and_rollbacks_under_load() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("tuning");
    let variables = [("HARDMAX_TUNING_DIR", folder.to_str().unwrap()), ("HARDMAX_PUBLISH_WATCH", "0")];
    let mut server = Server::start_with(tuning::demo(), &["--deterministic"], &variables).await;
    server.drain_log();
    let connect = async || Channel::from_shared(format!("http://{}", server.grpc)).unwrap().connect().await.unwrap();
    let mut client = TuningClient::new(soon(connect()).await);
    for seed in 0..JOBS {
        let short = tuning::short(2);
        let run = TuningRun { seed: Some(seed), ..short.run.unwrap() };
        let job = tuning::start(&mut client, TuningConfig { run: Some(run), ..short }).await;
        assert_eq!(job.id, format!("t{}", seed + 1));
        tuning::ended(&mut client, &job.id).await;
    }

    let (stop, messages) = (Arc::new(AtomicBool::new(false)), watch::Sender::new(0));
    let mut heard = messages.subscribe();
    let mut clients = Vec::new();
    for index in 0..CLIENTS {
        let channel = soon(connect()).await;
        clients.push(tokio::spawn(load(channel, index, stop.clone(), messages.clone())));
    }
    let mut sizes = Vec::new();
    let mut next = CLIENTS * TOKENS as usize;
    for index in 0..SWITCHES {
        let reached = heard.wait_for(|heard| *heard >= next);
        tokio::time::timeout(tuning::LONG, reached).await.unwrap().unwrap();
        switch(&mut client, index).await;
        sizes.push(resident(server.id()));
        next = APART + *messages.borrow();
    }
    stop.store(true, Ordering::Relaxed);
    let mut streams = Vec::new();
    for client in clients {
        streams.extend(tokio::time::timeout(tuning::LONG, client).await.unwrap().unwrap());
    }

    let expected = alone(&mut client, soon(connect()).await).await;
    for stream in &streams {
        let alone = &expected[&(stream.generation, stream.prompt)];
        assert_eq!(&stream.tokens, alone, "{:?} under generation {}", PROMPTS[stream.prompt], stream.generation);
    }
    for generation in 1..2 + JOBS {
        let of = |generation: u64| (0..PROMPTS.len()).map(move |prompt| (generation, prompt));
        let same = of(generation).zip(of(generation % (1 + JOBS) + 1)).all(|(one, other)| expected[&one] == expected[&other]);
        assert!(!same, "generation {generation} says what another one says: equal streams prove nothing");
        assert!(streams.iter().any(|stream| stream.generation == generation), "nothing ran on generation {generation}");
    }
    let mean = |sizes: &[f64]| sizes.iter().sum::<f64>() / sizes.len() as f64;
    let (first, last) = (mean(&sizes[..10]), mean(&sizes[SWITCHES - 10..]));
    let gap = streams.iter().map(|stream| stream.gap).max().unwrap();
    println!(
        "{} streams, {SWITCHES} switches; {:.1} MiB resident at first, {:.1} at last; longest wait for a message {:.0} ms",
        streams.len(),
        first / f64::from(1 << 20),
        last / f64::from(1 << 20),
        1e3 * gap.as_secs_f64()
    );
    assert!(last <= 1.05 * first, "memory grows: {sizes:?}");
    // Set by tests/tuning/switches.sh, on a machine that does nothing else.
    if let Ok(most) = std::env::var("HARDMAX_TEST_LONGEST_GAP") {
        assert!(gap.as_secs_f64() <= most.parse().unwrap(), "a client waited for {gap:?}");
    }
}
