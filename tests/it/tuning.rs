//! `hardmax.v1.Tuning` on the shipped model: the life of a job, and everything that can be asked wrongly. Jobs are a few steps on a few words.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use hardmax::{
    checkpoint::{Checkpoint, Delta},
    service::proto::{
        self, ExportGenerationRequest, GetModelInfoRequest, GetTuningRequest, ListGenerationsRequest, ListTuningsRequest,
        PauseTuningRequest, PublishRequest, ResumeTuningRequest, RollbackRequest, StartTuningRequest, StopTuningRequest, TokenIds,
        TuningConfig, TuningData, TuningGates, TuningJob, TuningOptimizer, TuningParameter, TuningRouting, TuningRun, TuningSchedule,
        TuningShare, TuningState, TuningTarget, WatchTuningRequest, WatchTuningResponse,
        export_generation_request::Form,
        get_model_info_response::Mode,
        start_tuning_request::Part,
        tuning_client::TuningClient,
        tuning_share::{Exclusive, Share},
        watch_tuning_response::Event,
    },
};
use tonic::{Code, Status, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_types::StatusExt as _;

use crate::{
    process::Server,
    routing::rule,
    support::{MODEL, Options, TestServer, collect, generate, soon},
};

/// Training of an unoptimised build beside other tests.
pub const LONG: Duration = Duration::from_secs(120);

type Client = TuningClient<Channel>;

pub fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo")
}

/// A little text of the shipped model's kind.
pub fn words() -> String {
    fs::read_to_string(demo().join("data/heldout.txt")).unwrap()[..2000].to_owned()
}

/// Routers, `steps` steps of two short windows, far enough that it shows.
pub fn short(steps: u32) -> TuningConfig {
    TuningConfig {
        optimizer: Some(TuningOptimizer { learning_rate: Some(0.5), warmup_steps: Some(0), ..TuningOptimizer::default() }),
        run: Some(TuningRun {
            steps: Some(steps),
            windows: Some(2),
            micro_windows: Some(1),
            window_tokens: Some(16),
            eval_every: Some(2),
            eval_tokens: Some(32),
            save_every: Some(1),
            ..TuningRun::default()
        }),
        ..TuningConfig::default()
    }
}

pub fn text(text: &str) -> Part {
    Part::Text(text.into())
}

/// Sends these messages, and no more.
async fn send(client: &mut Client, parts: Vec<Part>) -> Result<TuningJob, Status> {
    let messages = parts.into_iter().map(|part| StartTuningRequest { part: Some(part) });
    let answer = soon(client.start_tuning(tokio_stream::iter(messages.collect::<Vec<_>>()))).await?;
    Ok(answer.into_inner().job.unwrap())
}

pub async fn start(client: &mut Client, config: TuningConfig) -> TuningJob {
    send(client, vec![Part::Config(config), text(&words())]).await.unwrap()
}

pub async fn watch(client: &mut Client, id: &str) -> tonic::Streaming<WatchTuningResponse> {
    soon(client.watch_tuning(WatchTuningRequest { id: id.into(), after: 0 })).await.unwrap().into_inner()
}

/// Reads on until something happens.
pub async fn until(
    stream: &mut tonic::Streaming<WatchTuningResponse>,
    wanted: impl Fn(&WatchTuningResponse) -> bool,
) -> WatchTuningResponse {
    let found = async {
        loop {
            let message = stream.message().await.unwrap().expect("the job has not ended");
            if wanted(&message) {
                return message;
            }
        }
    };
    tokio::time::timeout(LONG, found).await.expect("this takes too long")
}

fn step(message: &WatchTuningResponse) -> Option<u32> {
    match &message.event {
        Some(Event::Step(step)) => Some(step.step),
        _ => None,
    }
}

/// Everything that a job did, and the job, once it has ended.
pub async fn ended(client: &mut Client, id: &str) -> (Vec<WatchTuningResponse>, TuningJob) {
    let mut stream = watch(client, id).await;
    let all = async {
        let mut messages = Vec::new();
        while let Some(message) = stream.message().await.unwrap() {
            messages.push(message);
        }
        messages
    };
    let messages = tokio::time::timeout(LONG, all).await.expect("this takes too long");
    let job = soon(client.get_tuning(GetTuningRequest { id: id.into() })).await.unwrap().into_inner();
    (messages, job)
}

fn publish_anyway(id: &str) -> PublishRequest {
    PublishRequest { id: id.into(), override_gates: true, ..PublishRequest::default() }
}

fn exclusive() -> Option<TuningShare> {
    Some(TuningShare { share: Some(Share::Exclusive(Exclusive {})) })
}

fn duty(duty: f64) -> Option<TuningShare> {
    Some(TuningShare { share: Some(Share::DutyCycle(duty)) })
}

/// The field that a status is about.
fn field(status: &Status) -> String {
    let details = status.get_details_bad_request();
    details.and_then(|details| Some(details.field_violations.first()?.field.clone())).unwrap_or_default()
}

async fn info(server: &TestServer) -> proto::GetModelInfoResponse {
    let request = GetModelInfoRequest { model: String::new() };
    soon(server.client().await.get_model_info(request)).await.unwrap().into_inner()
}

/// The generation that a short request ran on.
async fn generation(server: &TestServer) -> u64 {
    let stream = soon(server.client().await.generate(generate("In the", 2))).await.unwrap().into_inner();
    let (messages, end) = collect(stream).await;
    assert!(end.is_none(), "{end:?}");
    messages.last().unwrap().finish.as_ref().unwrap().generation
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_life_of_a_job() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(Options::tuning(dir.path(), &[])).await;
    let mut client = TuningClient::new(server.channel().await);
    let words = words();
    let (one, other) = words.split_at(words.floor_char_boundary(1000));
    let config = TuningConfig { request_id: "my-start".into(), actor: "a test".into(), share: duty(0.5), ..short(100_000) };
    let ids = Part::TokenIds(TokenIds { ids: (10..40).collect() });
    let job = send(&mut client, vec![Part::Config(config), text(one), ids, text(other)]).await.unwrap();
    assert_eq!((job.state(), job.base_generation, job.generation, job.steps), (TuningState::Running, 1, 0, 100_000));
    assert!(job.train_tokens > 100 && job.heldout_tokens > 10 && job.data_sha256.len() == 64, "{job:?}");
    let memory = job.memory.unwrap();
    assert!(memory.total >= memory.variables && memory.variables > 0 && memory.data > 0, "{memory:?}");
    assert_eq!((job.trained.len(), job.share), (4, duty(0.5)));
    let told = job.config.unwrap();
    assert_eq!((told.target(), told.routing.unwrap().estimator.as_str()), (TuningTarget::Router, "soft"));

    // It runs, beside requests; who comes late reads the same.
    let mut stream = watch(&mut client, &job.id).await;
    until(&mut stream, |message| step(message).is_some_and(|step| step >= 3)).await;
    assert_eq!(generation(&server).await, 1);
    let facts = info(&server).await;
    assert_eq!((facts.mode(), facts.tuning_job.as_str(), facts.previous_generation), (Mode::Tune, job.id.as_str(), None));
    let mut late = watch(&mut client, &job.id).await;
    let first = until(&mut late, |message| step(message).is_some()).await;
    assert_eq!((step(&first), first.history), (Some(1), true));
    let Some(Event::Step(first)) = first.event else { unreachable!() };
    assert!(first.losses["lm"] > 0.0 && first.grad_norm.unwrap() > 0.0 && first.share == 0.5 && first.loads.len() == 4, "{first:?}");
    let evaluation = until(&mut late, |message| matches!(message.event, Some(Event::Evaluation(_)))).await;
    let Some(Event::Evaluation(evaluation)) = evaluation.event else { unreachable!() };
    let figures = evaluation.figures.unwrap();
    let layers: Vec<u32> = figures.routings[0].layers.iter().map(|layer| layer.layer).collect();
    assert!(evaluation.step == 2 && figures.tokens > 0 && figures.routings[0].perplexity > 1.0 && layers == [0, 1, 2, 3], "{figures:?}");

    // It pauses, and goes on with another share.
    let who = || "a test".to_owned();
    let paused = soon(client.pause_tuning(PauseTuningRequest { id: job.id.clone(), actor: who() })).await.unwrap().into_inner();
    assert_eq!(paused.state(), TuningState::Paused);
    assert_eq!((info(&server).await.mode(), paused.step >= 3), (Mode::Serve, true));
    let resume = ResumeTuningRequest { id: job.id.clone(), share: duty(0.9), actor: who() };
    let resumed = soon(client.resume_tuning(resume)).await.unwrap().into_inner();
    assert_eq!((resumed.state(), resumed.share), (TuningState::Running, duty(0.9)));
    until(&mut stream, |message| step(message).is_some_and(|step| step > paused.step) && !message.history).await;
    let stop = StopTuningRequest { id: job.id.clone(), keep_candidate: true, actor: who() };
    let done = tokio::time::timeout(LONG, client.stop_tuning(stop)).await.unwrap().unwrap().into_inner();
    assert_eq!(done.state(), TuningState::Done, "{}", done.detail);
    let (messages, done) = ended(&mut client, &job.id).await;
    assert!(messages.windows(2).all(|pair| pair[0].sequence < pair[1].sequence));
    assert!(done.step > paused.step && !done.verdicts.is_empty() && done.before.is_some() && done.latest.is_some(), "{done:?}");

    // Its candidate comes into force, and goes again.
    let published = soon(client.publish(publish_anyway(&job.id))).await.unwrap().into_inner();
    assert_eq!((published.generation, published.previous, published.verdicts), (2, 1, done.verdicts));
    let facts = info(&server).await;
    assert_eq!((facts.generation, facts.previous_generation, facts.tuning_job.as_str(), facts.mode()), (2, Some(1), "", Mode::Serve));
    assert_eq!(generation(&server).await, 2);
    let back = soon(client.rollback(RollbackRequest { actor: who(), ..RollbackRequest::default() })).await.unwrap().into_inner();
    assert_eq!((back.generation, back.previous), (1, 2));
    assert_eq!(generation(&server).await, 1);
    let jobs = soon(client.list_tunings(ListTuningsRequest {})).await.unwrap().into_inner().jobs;
    assert_eq!(jobs.iter().map(|job| (job.id.as_str(), job.generation)).collect::<Vec<_>>(), [(job.id.as_str(), 2)]);
    let there = soon(client.list_generations(ListGenerationsRequest {})).await.unwrap().into_inner().generations;
    let seen: Vec<_> = there.iter().map(|it| (it.number, it.current, it.parent, it.job.as_str(), it.tensors)).collect();
    assert_eq!(seen, [(1, true, 0, "", 0), (2, false, 1, job.id.as_str(), 4)]);
    assert!(there[1].bytes > 0 && there[1].figures.is_some() && there[1].published > 1e9, "{:?}", there[1]);

    exports(&mut client).await;
}

/// Generation 2 as files.
async fn exports(client: &mut Client) {
    let export =
        |form: Form, name: &str| ExportGenerationRequest { generation: 2, name: name.into(), form: form.into(), ..Default::default() };
    let delta = soon(client.export_generation(export(Form::Delta, "routers"))).await.unwrap().into_inner();
    let whole = soon(client.export_generation(export(Form::Checkpoint, "whole"))).await.unwrap().into_inner();
    assert!(delta.bytes > 0 && delta.bytes < whole.bytes && delta.sha256.len() == 64 && whole.sha256.len() == 64);
    let (base, tuned) = (Checkpoint::open(&demo()).unwrap(), Checkpoint::open(Path::new(&whole.path)).unwrap());
    let delta = Delta::read(Path::new(&delta.path)).unwrap();
    base.check_delta(&delta).unwrap();
    assert_eq!((delta.tensors.len(), tuned.spec().vocab_size), (4, base.spec().vocab_size));
    for (name, code) in [
        ("routers", Code::FailedPrecondition),
        ("", Code::InvalidArgument),
        ("..", Code::InvalidArgument),
        ("a/b", Code::InvalidArgument),
        ("/tmp/x", Code::InvalidArgument),
        ("a\0b", Code::InvalidArgument),
    ] {
        let status = soon(client.export_generation(export(Form::Delta, name))).await.unwrap_err();
        assert_eq!(status.code(), code, "{name:?}: {}", status.message());
    }
}

fn routing(routing: TuningRouting) -> TuningConfig {
    TuningConfig { routing: Some(routing), ..short(2) }
}

fn run(change: impl FnOnce(&mut TuningRun)) -> TuningConfig {
    let mut config = short(2);
    change(config.run.as_mut().unwrap());
    config
}

fn bad_settings() -> Vec<(TuningConfig, Code, &'static str)> {
    use Code::{FailedPrecondition, InvalidArgument, NotFound};
    let parameter = TuningParameter { value: Some(proto::tuning_parameter::Value::Number(1.0)) };
    let named = |name: &str| TuningConfig { target: TuningTarget::Named.into(), tensors: vec![name.into()], ..short(2) };
    vec![
        (routing(TuningRouting { estimator: "stee".into(), ..Default::default() }), InvalidArgument, "config.routing.estimator"),
        (
            routing(TuningRouting { losses: HashMap::from([("balanc".into(), TuningSchedule::default())]), ..Default::default() }),
            InvalidArgument,
            "config.routing.losses.balanc",
        ),
        (
            routing(TuningRouting { parameters: HashMap::from([("temprature".into(), parameter)]), ..Default::default() }),
            InvalidArgument,
            "config.routing.parameters.temprature",
        ),
        (routing(TuningRouting { k: Some(99), estimator: "raw_topk".into(), ..Default::default() }), InvalidArgument, "config.routing.k"),
        (named("layers.9"), InvalidArgument, "config.tensors"),
        (named("layers.0.router\0"), InvalidArgument, "config.tensors"),
        (TuningConfig { target: 77, ..short(2) }, InvalidArgument, "config.target"),
        (run(|run| run.steps = Some(0)), InvalidArgument, "config.run.steps"),
        (run(|run| run.window_tokens = Some(1 << 20)), InvalidArgument, "config.run.window_tokens"),
        (run(|run| run.micro_windows = Some(3)), InvalidArgument, "config.run.micro_windows"),
        (run(|run| run.max_seconds = Some(f64::NAN)), InvalidArgument, "config.run.max_seconds"),
        (run(|run| run.max_memory_bytes = Some(1)), FailedPrecondition, ""),
        (
            TuningConfig { gates: Some(TuningGates { max_gap_ratio: Some(f64::NAN), ..Default::default() }), ..short(2) },
            InvalidArgument,
            "config.gates.max_gap_ratio",
        ),
        (TuningConfig { share: duty(1.0), ..short(2) }, InvalidArgument, "config.share.duty_cycle"),
        (TuningConfig { share: Some(TuningShare { share: None }), ..short(2) }, InvalidArgument, "config.share"),
        (TuningConfig { model: "another".into(), ..short(2) }, NotFound, ""),
        (TuningConfig { model: MODEL.into(), actor: "a".repeat(1000), ..short(2) }, InvalidArgument, "config.actor"),
        (TuningConfig { request_id: "two words".into(), ..short(2) }, InvalidArgument, "request_id"),
    ]
}

fn bad_texts() -> Vec<(Vec<Part>, Code, &'static str)> {
    use Code::{InvalidArgument, OutOfRange};
    let config = || Part::Config(short(2));
    let ids = |ids: Vec<u32>| Part::TokenIds(TokenIds { ids });
    vec![
        (vec![], InvalidArgument, "config"),
        (vec![text(&words())], InvalidArgument, "config"),
        (vec![config()], InvalidArgument, "data"),
        (vec![config(), text("a few words")], InvalidArgument, "data"),
        (vec![config(), text(&words()), text("binary\0text")], InvalidArgument, "data"),
        (vec![config(), text(&words()), ids(vec![u32::MAX])], InvalidArgument, "data"),
        (vec![config(), text(&words()), config()], InvalidArgument, "config"),
        (vec![config(), text(&words()), ids(vec![5; 5000])], OutOfRange, "data"),
        (vec![config(), text(&words().repeat(20))], OutOfRange, "data"),
        (vec![Part::Config(TuningConfig { data: data(&[], &["a"], ""), ..short(2) })], InvalidArgument, "config.data.heldout_paths"),
        (vec![Part::Config(TuningConfig { data: data(&[], &[], "--"), ..short(2) })], InvalidArgument, "config.data.separator"),
    ]
}

fn data(paths: &[&str], heldout: &[&str], separator: &str) -> Option<TuningData> {
    let owned = |paths: &[&str]| paths.iter().map(|&path| path.to_owned()).collect();
    Some(TuningData { paths: owned(paths), heldout_paths: owned(heldout), separator: separator.into(), heldout_share: None })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_start_says_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(Options::tuning(dir.path(), &[])).await;
    let mut client = TuningClient::new(server.channel().await);
    for (index, (config, code, place)) in bad_settings().into_iter().enumerate() {
        let status = send(&mut client, vec![Part::Config(config), text(&words())]).await.unwrap_err();
        assert_eq!((status.code(), field(&status).as_str()), (code, place), "setting {index}: {}", status.message());
    }
    for (index, (parts, code, place)) in bad_texts().into_iter().enumerate() {
        let status = send(&mut client, parts).await.unwrap_err();
        assert_eq!((status.code(), field(&status).as_str()), (code, place), "text {index}: {}", status.message());
    }
    let named = data(&["a.txt"], &[], "");
    let status = send(&mut client, vec![Part::Config(TuningConfig { data: named, ..short(2) })]).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "no folder is allowed: {}", status.message());
    assert!(soon(client.list_tunings(ListTuningsRequest {})).await.unwrap().into_inner().jobs.is_empty(), "nothing is left of them");
    assert_eq!(generation(&server).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_files_below_the_folders_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let allowed = dir.path().join("texts");
    fs::create_dir_all(allowed.join("sub")).unwrap();
    fs::write(allowed.join("good.txt"), words()).unwrap();
    fs::write(allowed.join("few.txt"), &words()[..200]).unwrap();
    fs::write(allowed.join("binary"), [b'a', 0xFF, 0x00]).unwrap();
    fs::write(dir.path().join("secret.txt"), words()).unwrap();
    symlink(dir.path().join("secret.txt"), allowed.join("link.txt")).unwrap();
    symlink(allowed.join("few.txt"), allowed.join("sub/inside.txt")).unwrap();
    assert!(Command::new("mkfifo").arg(allowed.join("fifo")).status().unwrap().success());
    let server = TestServer::start(Options::tuning(dir.path(), &[&allowed])).await;
    let mut client = TuningClient::new(server.channel().await);
    let path = |name: &str| allowed.join(name).to_str().unwrap().to_owned();
    let place = "config.data.paths[0]";
    for bad in ["absent.txt", "../secret.txt", "link.txt", "fifo", "sub", "", "binary", "good.txt\0"] {
        let named = data(&[&path(bad)], &[], "");
        let status = send(&mut client, vec![Part::Config(TuningConfig { data: named, ..short(2) })]).await.unwrap_err();
        assert_eq!((status.code(), field(&status).as_str()), (Code::InvalidArgument, place), "{bad}: {}", status.message());
    }
    let good = path("good.txt");
    let both = vec![Part::Config(TuningConfig { data: data(&[&good], &[], ""), ..short(2) }), text("and this")];
    assert_eq!(field(&send(&mut client, both).await.unwrap_err()), "text");
    let heldout = vec![Part::Config(TuningConfig { data: data(&[&good], &[&path("fifo")], ""), ..short(2) })];
    assert_eq!(field(&send(&mut client, heldout).await.unwrap_err()), "config.data.heldout_paths[0]");
    let fine = data(&[&good], &[&path("sub/inside.txt")], "\n\n");
    let job = send(&mut client, vec![Part::Config(TuningConfig { data: fine, ..short(2) })]).await.unwrap();
    assert!(job.heldout_tokens > 10 && job.train_tokens > 100, "{job:?}");
    assert_eq!(ended(&mut client, &job.id).await.1.state(), TuningState::Done);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_run_one_at_a_time_and_only_a_finished_one_is_published() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(Options::tuning(dir.path(), &[])).await;
    let mut client = TuningClient::new(server.channel().await);
    let refused = |status: Status, part: &str| {
        assert!(status.code() == Code::FailedPrecondition && status.message().contains(part), "{part}: {status:?}");
    };
    let first = start(&mut client, short(100_000)).await;
    refused(send(&mut client, vec![Part::Config(short(2)), text(&words())]).await.unwrap_err(), &first.id);
    refused(soon(client.publish(publish_anyway(&first.id))).await.unwrap_err(), &first.id);
    let pause = PauseTuningRequest { id: first.id.clone(), ..Default::default() };
    soon(client.pause_tuning(pause.clone())).await.unwrap();
    refused(soon(client.pause_tuning(pause)).await.unwrap_err(), "paused");
    refused(soon(client.publish(publish_anyway(&first.id))).await.unwrap_err(), &first.id);

    // Two are done on generation 1; once one of them is published, the other is of weights that are no longer in force.
    let mut done = Vec::new();
    for _ in 0..2 {
        let job = start(&mut client, short(2)).await;
        let resume = ResumeTuningRequest { id: first.id.clone(), ..Default::default() };
        if done.is_empty() {
            refused(soon(client.resume_tuning(resume)).await.unwrap_err(), &job.id);
        }
        let (_, job) = ended(&mut client, &job.id).await;
        assert_eq!(job.state(), TuningState::Done, "{}", job.detail);
        done.push(job);
    }
    let [one, other] = &done[..] else { unreachable!() };
    assert_eq!(one.data_sha256, other.data_sha256);
    let gates = one.verdicts.iter().find(|verdict| !verdict.passed);
    if gates.is_some() {
        refused(soon(client.publish(PublishRequest { id: one.id.clone(), ..Default::default() })).await.unwrap_err(), "override");
    }
    soon(client.publish(publish_anyway(&one.id))).await.unwrap();
    refused(soon(client.publish(publish_anyway(&one.id))).await.unwrap_err(), &one.id);
    refused(soon(client.publish(publish_anyway(&other.id))).await.unwrap_err(), "generation 1");
    refused(soon(client.rollback(RollbackRequest { generation: Some(2), ..Default::default() })).await.unwrap_err(), "in force");
    soon(client.rollback(RollbackRequest::default())).await.unwrap();
    let published = soon(client.publish(publish_anyway(&other.id))).await.unwrap().into_inner();
    assert_eq!((published.generation, published.previous), (3, 1), "a number never names two sets of weights");

    let stop = StopTuningRequest { id: first.id.clone(), ..Default::default() };
    let stopped = soon(client.stop_tuning(stop.clone())).await.unwrap().into_inner();
    assert_eq!(stopped.state(), TuningState::Stopped);
    refused(soon(client.stop_tuning(stop)).await.unwrap_err(), "stopped");
    refused(soon(client.publish(publish_anyway(&first.id))).await.unwrap_err(), &first.id);
}

/// What a gate says is of the routing that the job measured under.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_candidate_for_another_routing_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(Options::tuning(dir.path(), &[])).await;
    let mut client = TuningClient::new(server.channel().await);
    let soft = TuningRouting { serving: Some(rule("soft")), ..TuningRouting::default() };
    let any = TuningGates { max_perplexity_ratio: Some(1e6), max_gap_ratio: Some(1e6), max_new_dead_experts: Some(99) };
    let job = start(&mut client, TuningConfig { gates: Some(any), ..routing(soft) }).await;
    let (_, job) = ended(&mut client, &job.id).await;
    assert!(job.state() == TuningState::Done && job.verdicts.iter().all(|verdict| verdict.passed), "{job:?}");
    let status = soon(client.publish(PublishRequest { id: job.id.clone(), ..PublishRequest::default() })).await.unwrap_err();
    let both = status.message().contains("was measured under soft, and native is in force");
    assert!(status.code() == Code::FailedPrecondition && both, "{status:?}");
    assert_eq!(soon(client.publish(publish_anyway(&job.id))).await.unwrap().into_inner().generation, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_there_is_not_found() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(Options::tuning(dir.path(), &[])).await;
    let mut client = TuningClient::new(server.channel().await);
    for id in ["t99", "", "t01", "../t1"] {
        let id = || id.to_owned();
        for status in [
            soon(client.get_tuning(GetTuningRequest { id: id() })).await.unwrap_err(),
            soon(client.watch_tuning(WatchTuningRequest { id: id(), after: 0 })).await.unwrap_err(),
            soon(client.pause_tuning(PauseTuningRequest { id: id(), ..Default::default() })).await.unwrap_err(),
            soon(client.resume_tuning(ResumeTuningRequest { id: id(), ..Default::default() })).await.unwrap_err(),
            soon(client.stop_tuning(StopTuningRequest { id: id(), ..Default::default() })).await.unwrap_err(),
            soon(client.publish(publish_anyway(&id()))).await.unwrap_err(),
        ] {
            assert_eq!(status.code(), Code::NotFound, "{:?}: {status:?}", id());
        }
    }
    let of = |generation| RollbackRequest { generation, ..Default::default() };
    assert_eq!(soon(client.rollback(of(Some(9)))).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(soon(client.rollback(of(None))).await.unwrap_err().code(), Code::FailedPrecondition, "nothing is before the first");
    let export = ExportGenerationRequest { generation: 9, name: "x".into(), ..Default::default() };
    assert_eq!(soon(client.export_generation(export)).await.unwrap_err().code(), Code::NotFound);
    let export = ExportGenerationRequest { generation: 1, name: "x".into(), form: 9, ..Default::default() };
    assert_eq!(field(&soon(client.export_generation(export)).await.unwrap_err()), "form");
    let rollback = RollbackRequest { in_flight: 9, ..Default::default() };
    assert_eq!(field(&soon(client.rollback(rollback)).await.unwrap_err()), "in_flight");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_a_tuning_folder_says_so() {
    let server = TestServer::start(Options::default()).await;
    let mut client = TuningClient::new(server.channel().await);
    let statuses = [
        send(&mut client, vec![Part::Config(short(2)), text(&words())]).await.unwrap_err(),
        soon(client.list_tunings(ListTuningsRequest {})).await.unwrap_err(),
        soon(client.get_tuning(GetTuningRequest::default())).await.unwrap_err(),
        soon(client.watch_tuning(WatchTuningRequest::default())).await.unwrap_err(),
        soon(client.pause_tuning(PauseTuningRequest::default())).await.unwrap_err(),
        soon(client.resume_tuning(ResumeTuningRequest::default())).await.unwrap_err(),
        soon(client.stop_tuning(StopTuningRequest::default())).await.unwrap_err(),
        soon(client.publish(PublishRequest::default())).await.unwrap_err(),
        soon(client.rollback(RollbackRequest::default())).await.unwrap_err(),
        soon(client.export_generation(ExportGenerationRequest::default())).await.unwrap_err(),
    ];
    for status in statuses {
        assert!(status.code() == Code::FailedPrecondition && status.message().contains("--tuning-dir"), "{status:?}");
    }
    let there = soon(client.list_generations(ListGenerationsRequest {})).await.unwrap().into_inner().generations;
    assert_eq!(there.iter().map(|it| (it.number, it.current)).collect::<Vec<_>>(), [(1, true)]);
    let facts = info(&server).await;
    assert_eq!((facts.mode(), facts.tuning_job.as_str(), facts.previous_generation), (Mode::Serve, "", None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_all_of_the_machine_requests_are_sent_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(Options::tuning(dir.path(), &[])).await;
    let mut client = TuningClient::new(server.channel().await);
    let channel = server.channel().await;
    let health = async |name: &str| {
        let answer = soon(HealthClient::new(channel.clone()).check(HealthCheckRequest { service: name.into() })).await;
        answer.unwrap().into_inner().status()
    };
    let becomes = async |names: &[&str], status: ServingStatus| {
        for name in names {
            let there = async {
                while health(name).await != status {
                    tokio::task::yield_now().await;
                }
            };
            soon(there).await;
        }
    };
    let requests = ["", "hardmax.v1.Inference", "hardmax.v1.Routing"];
    let job = start(&mut client, TuningConfig { share: exclusive(), ..short(100_000) }).await;
    becomes(&requests, ServingStatus::NotServing).await;
    assert_eq!(health("hardmax.v1.Tuning").await, ServingStatus::Serving);
    let refused = soon(server.client().await.generate(generate("In the", 2))).await.unwrap_err();
    assert!(refused.code() == Code::Unavailable && refused.get_details_retry_info().is_some(), "{refused:?}");
    let healthz = async |expected: &str| {
        let there = async {
            while server.get("/healthz").await.1 != expected {
                tokio::task::yield_now().await;
            }
        };
        soon(there).await;
    };
    healthz("tuning\n").await;
    assert!(server.get("/healthz").await.0.contains("503"));
    assert_eq!(info(&server).await.mode(), Mode::TuneExclusive);

    // Another share ends that while the job runs.
    let resume = ResumeTuningRequest { id: job.id.clone(), share: duty(0.2), ..Default::default() };
    assert_eq!(soon(client.resume_tuning(resume)).await.unwrap().into_inner().share, duty(0.2));
    becomes(&requests, ServingStatus::Serving).await;
    healthz("ok\n").await;
    assert_eq!(generation(&server).await, 1);
    soon(client.stop_tuning(StopTuningRequest { id: job.id, ..Default::default() })).await.unwrap();
    assert_eq!(info(&server).await.mode(), Mode::Serve);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_goes_on_when_the_server_is_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = TestServer::start(Options::tuning(dir.path(), &[])).await;
    let mut client = TuningClient::new(server.channel().await);
    let job = start(&mut client, short(100_000)).await;
    let mut stream = watch(&mut client, &job.id).await;
    let before = until(&mut stream, |message| step(message).is_some_and(|step| step >= 2)).await;
    server.signal();
    let end = async {
        loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                other => return other,
            }
        }
    };
    // The job has not ended, so its watch has not either.
    assert_eq!(soon(end).await.unwrap_err().code(), Code::Unavailable);
    drop((stream, client));
    server.ended().await.unwrap();

    let server = TestServer::start(Options::tuning(dir.path(), &[])).await;
    let mut client = TuningClient::new(server.channel().await);
    let mut stream = watch(&mut client, &job.id).await;
    let first = until(&mut stream, |message| step(message).is_some()).await;
    assert_eq!((step(&first), first.history), (Some(1), true), "what was done is known");
    let after = step(&before).unwrap();
    until(&mut stream, |message| step(message).is_some_and(|step| step > after) && !message.history).await;
    let stop = StopTuningRequest { id: job.id.clone(), ..Default::default() };
    assert_eq!(soon(client.stop_tuning(stop)).await.unwrap().into_inner().state(), TuningState::Stopped);
}

/// Runs what follows it where `folder` is on a disk of half a MiB; `None` where this machine does not let us.
fn on_a_small_disk(folder: &Path) -> Option<Command> {
    let within = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c"]).arg(format!("mount -t tmpfs -o size=512k none \"$0\" && {script}")).arg(folder);
        command
    };
    let works = within("true").output().is_ok_and(|output| output.status.success());
    works.then(|| {
        let mut command = within("exec \"$@\"");
        command.arg(env!("CARGO_BIN_EXE_hardmax"));
        command
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_stops_nothing_but_the_job() {
    let dir = tempfile::tempdir().unwrap();
    let Some(command) = on_a_small_disk(dir.path()) else {
        println!("skipped: `unshare -rm` and a mount of tmpfs are not permitted here");
        return;
    };
    let variables = [("HARDMAX_TUNING_DIR", dir.path().to_str().unwrap())];
    let mut server = Server::start_by(command, demo(), &[], &variables).await;
    server.drain_log();
    let channel = soon(Channel::from_shared(format!("http://{}", server.grpc)).unwrap().connect()).await.unwrap();
    let mut client = TuningClient::new(channel);
    // 800 kB of tokens.
    let long = Part::TokenIds(TokenIds { ids: vec![5; 200_000] });
    let status = send(&mut client, vec![Part::Config(short(2)), long]).await.unwrap_err();
    assert!(status.code() == Code::ResourceExhausted && status.message().contains("full"), "{status:?}");
    assert!(soon(client.list_tunings(ListTuningsRequest {})).await.unwrap().into_inner().jobs.is_empty());

    // The state of the whole model has no room.
    let job = start(&mut client, TuningConfig { target: TuningTarget::All.into(), ..short(100) }).await;
    let mut stream = watch(&mut client, &job.id).await;
    let paused = |message: &WatchTuningResponse| matches!(&message.event, Some(Event::Job(job)) if job.state() == TuningState::Paused);
    let Some(Event::Job(paused)) = until(&mut stream, paused).await.event else { unreachable!() };
    assert!(paused.detail.contains("full"), "{}", paused.detail);
    soon(client.stop_tuning(StopTuningRequest { id: job.id, ..Default::default() })).await.unwrap();

    let job = start(&mut client, short(2)).await;
    assert_eq!(ended(&mut client, &job.id).await.1.state(), TuningState::Done);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_line_tunes_inside_a_server() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(Options::tuning(dir.path(), &[])).await;
    let url = format!("http://{}", server.grpc);
    let file = |name: &str, content: &[u8]| {
        fs::write(dir.path().join(name), content).unwrap();
        dir.path().join(name).to_str().unwrap().to_owned()
    };
    let (good, binary) = (file("text.txt", words().as_bytes()), file("binary", &[b'a', 0xFF]));
    let strict = file("strict.toml", b"[gates]\nmax_perplexity_ratio = 0.001\n");
    let hardmax = async |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hardmax"));
        command.args(["tune", "--server", &url]).args(arguments);
        let work = tokio::task::spawn_blocking(move || command.output().unwrap());
        let output = tokio::time::timeout(LONG, work).await.unwrap().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let run = ["--steps", "2", "--windows", "2", "--micro-windows", "1", "--window-tokens", "16", "--separator", "\\n\\n"];
    let start = ["--data", &good, "--share", "0.9", "--actor", "a test"];
    let (code, out, log) = hardmax(&[&start[..], &run, &["--publish", "--override"]].concat()).await;
    assert_eq!(code, Some(0), "{log}");
    for part in ["native     after", "gate perplexity: ", "generation 2 is in force, before it was 1; "] {
        assert!(out.contains(part), "{part}: {out}");
    }
    assert!(log.contains("job t1: ") && log.contains("values of 4 tensors learn"), "{log}");

    let (code, out, log) = hardmax(&[&start[..], &run, &["--recipe", &strict, "--publish"]].concat()).await;
    assert_eq!(code, Some(1), "the gate does not hold: {out}");
    assert!(out.contains("gate perplexity: does not hold") && log.contains("FAILED_PRECONDITION"), "{log}");
    let (code, out, _) = hardmax(&["--watch", "t2"]).await;
    assert_eq!((code, out.contains("gate perplexity: does not hold")), (Some(1), true), "{out}");
    let (code, out, log) = hardmax(&["--rollback"]).await;
    assert_eq!((code, out.contains("generation 1 is in force, before it was 2")), (Some(0), true), "{out}{log}");
    let (code, out, _) = hardmax(&["--list"]).await;
    let rows: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        (code, &rows[1][..2], &rows[2][..2], &rows[5][..3]),
        (Some(0), &["t1", "done"][..], &["t2", "done"][..], &["1", "in", "force"][..])
    );

    for (arguments, code, said) in [
        (&["--data", &good, "--estimator", "stee"][..], 1, "INVALID_ARGUMENT: config.routing.estimator"),
        (&["--data", &good, &binary], 2, "data[1]: "),
        (&["--watch", "t9"], 1, "NOT_FOUND"),
        (&["--pause", "t1"], 1, "FAILED_PRECONDITION"),
        (&["--data", &good, "--share", "2"], 2, "--share"),
    ] {
        let (found, _, log) = hardmax(arguments).await;
        assert!(found == Some(code) && log.contains(said), "{arguments:?}: {found:?} {log}");
    }
    let jobs = TuningClient::new(server.channel().await).list_tunings(ListTuningsRequest {}).await.unwrap().into_inner().jobs;
    assert_eq!(jobs.len(), 2, "nothing is begun on half a text");
}

/// A server on `folder` as a process, and a client of it.
async fn serve_on(folder: &Path) -> (Server, Client) {
    let mut server = Server::start_with(demo(), &[], &[("HARDMAX_TUNING_DIR", folder.to_str().unwrap())]).await;
    server.drain_log();
    let channel = soon(Channel::from_shared(format!("http://{}", server.grpc)).unwrap().connect()).await.unwrap();
    (server, TuningClient::new(channel))
}

/// As if it had not been killed: the job comes to the same candidate, to the byte, and what was published is in force.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (mut server, mut client) = serve_on(dir.path()).await;
    let killed = start(&mut client, short(12)).await.id;
    for at in [2, 5, 9] {
        let mut stream = watch(&mut client, &killed).await;
        until(&mut stream, |message| step(message).is_some_and(|step| step >= at)).await;
        // With SIGKILL.
        drop((stream, client, server));
        (server, client) = serve_on(dir.path()).await;
    }
    let (messages, job) = ended(&mut client, &killed).await;
    assert_eq!((job.state(), job.step), (TuningState::Done, 12), "{}", job.detail);
    assert_eq!(messages.iter().filter_map(step).collect::<Vec<_>>(), (1..=12).collect::<Vec<_>>());
    let undisturbed = start(&mut client, short(12)).await.id;
    assert_eq!(ended(&mut client, &undisturbed).await.1.state(), TuningState::Done);
    let candidate = |id: &str| fs::read(dir.path().join("jobs").join(id).join("candidate.safetensors")).unwrap();
    assert!(candidate(&killed) == candidate(&undisturbed));

    assert_eq!(soon(client.publish(publish_anyway(&killed))).await.unwrap().into_inner().generation, 2);
    drop((client, server));
    let (_server, mut client) = serve_on(dir.path()).await;
    let generations = soon(client.list_generations(ListGenerationsRequest {})).await.unwrap().into_inner().generations;
    let current = generations.iter().find(|generation| generation.current).unwrap();
    assert_eq!((current.number, current.job.as_str()), (2, killed.as_str()));
}
