//! `hardmax serve` as a process, with a real checkpoint: from the command line to tokens, and from SIGTERM to status 0.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, ExitStatus, Stdio},
};

use hardmax::service::proto::{
    self, GenerateRequest, GetModelInfoRequest, RoutingPolicy, SamplingParams, ScoreRequest, Shadow, TokenIds, TokenizeRequest,
    generate_request::Prompt,
    inference_client::InferenceClient,
    routing_policy::{Native, Policy, Soft},
    score_request::Input,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value as Attribute;
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use crate::{
    otlp::Collector,
    support::{collect, soon},
};

/// A random-weight Mixtral, with what another implementation says to it.
const GOLDEN: &str = "tests/goldens/mixtral_gqa";

/// A running `hardmax serve`. Killed when dropped.
pub struct Server {
    child: Child,
    log: Option<BufReader<ChildStderr>>,
    pub grpc: String,
    /// The log line "model loaded".
    loaded: Value,
}

impl Server {
    /// Starts and waits until it serves.
    async fn start(model: PathBuf, flags: &'static [&str]) -> Self {
        Self::start_with(model, flags, &[]).await
    }

    /// The same, with more in its environment.
    pub async fn start_with(model: PathBuf, flags: &'static [&str], variables: &[(&'static str, &str)]) -> Self {
        Self::start_by(Command::new(env!("CARGO_BIN_EXE_hardmax")), model, flags, variables).await
    }

    /// The same, by a command that runs it with the arguments that it is given.
    pub async fn start_by(command: Command, model: PathBuf, flags: &'static [&str], variables: &[(&'static str, &str)]) -> Self {
        let variables: Vec<_> = variables.iter().map(|&(name, value)| (name, value.to_owned())).collect();
        soon(spawn_blocking(move || Self::spawn(command, &model, flags, variables))).await.unwrap()
    }

    fn spawn(mut command: Command, model: &Path, flags: &[&str], variables: Vec<(&str, String)>) -> Self {
        command.args(["serve", "--log-format", "json", "--listen", "127.0.0.1:0", "--metrics-listen", "off", "--model"]).arg(model);
        let mut child = command.args(flags).envs(variables).stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut until = |message: &str| loop {
            let mut line = String::new();
            assert!(log.read_line(&mut line).unwrap() > 0, "the server ended before it said '{message}'");
            let Ok(line) = serde_json::from_str::<Value>(&line) else { continue };
            if line["fields"]["message"] == message {
                return line["fields"].clone();
            }
        };
        let grpc = until("starting")["grpc"].as_str().unwrap().to_owned();
        assert_eq!(until("security posture")["grpc_open_to"], "this machine");
        let loaded = until("model loaded");
        until("serving");
        Self { child, log: Some(log), grpc, loaded }
    }

    /// Waits for the next line with this message: its fields.
    async fn says(&mut self, message: &'static str) -> Value {
        let mut log = self.log.take().unwrap();
        let read = spawn_blocking(move || {
            loop {
                let mut line = String::new();
                assert!(log.read_line(&mut line).unwrap() > 0, "the server ended before it said '{message}'");
                let fields = &serde_json::from_str::<Value>(&line).unwrap()["fields"];
                if fields["message"] == message {
                    return (fields.clone(), log);
                }
            }
        });
        let (fields, log) = soon(read).await.unwrap();
        self.log = Some(log);
        fields
    }

    /// Throws the rest of the log away: a pipe that nobody reads stops the server.
    pub fn drain_log(&mut self) {
        let log = self.log.take().unwrap();
        std::thread::spawn(move || log.lines().map_while(Result::ok).for_each(drop));
    }

    /// Of the process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// Waits for the end: exit status and the rest of the log.
    async fn ended(mut self) -> (ExitStatus, String) {
        let mut log = self.log.take().unwrap();
        let work = spawn_blocking(move || {
            let mut rest = String::new();
            log.read_to_string(&mut rest).unwrap();
            (self.child.wait().unwrap(), rest)
        });
        soon(work).await.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The golden checkpoint with a tokenizer, one token per character, that asks for truncation.
fn checkpoint() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("tiny");
    std::fs::create_dir(&model).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(Path::new(GOLDEN).join(file), model.join(file)).unwrap();
    }
    let vocab: BTreeMap<String, u32> = (0..80).map(|id| (char::from(b' ' + id as u8).to_string(), id)).collect();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": { "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0 },
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": { "type": "Fuse" },
        "model": { "type": "BPE", "vocab": vocab, "merges": [] },
    });
    std::fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    (folder, model)
}

fn golden(name: &str) -> Vec<u32> {
    let file = std::fs::read(Path::new(GOLDEN).join("golden.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    tensors.tensor(name).unwrap().data().chunks(8).map(|id| i64::from_le_bytes(id.try_into().unwrap()) as u32).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_checkpoint_is_served_and_drained() {
    let (_folder, model) = checkpoint();
    let server = Server::start(model, &["--top-k", "1"]).await;
    assert_eq!((&server.loaded["name"], &server.loaded["dtype"]), (&json!("tiny"), &json!("f32")));
    assert_eq!(server.loaded["serving_routing"], "top-1 (renorm)");
    let mut client = soon(InferenceClient::connect(format!("http://{}", server.grpc))).await.unwrap();
    let info = client.get_model_info(GetModelInfoRequest::default()).await.unwrap().into_inner();
    assert_eq!((info.model.as_str(), info.family.as_str(), info.eos_token_ids), ("tiny", "mixtral", vec![2]));

    let expected = golden("native.greedy");
    let request = GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds { ids: golden("input_ids") })),
        sampling: Some(SamplingParams { max_new_tokens: Some(expected.len() as u32), ignore_eos: Some(true), ..Default::default() }),
        routing: Some(RoutingPolicy { policy: Some(Policy::Native(Native {})) }),
        ..Default::default()
    };
    let (messages, end) = collect(client.generate(request).await.unwrap().into_inner()).await;
    assert!(end.is_none(), "{end:?}");
    let ids: Vec<u32> = messages.iter().flat_map(|message: &proto::GenerateResponse| message.token_ids.clone()).collect();
    assert_eq!(ids, expected);

    let long = TokenizeRequest { text: "NOT CUT".into(), ..Default::default() };
    assert_eq!(client.tokenize(long).await.unwrap().into_inner().tokens.len(), 7);

    // The client keeps its connection: that must not hold the server.
    server.signal("TERM");
    let (status, log) = server.ended().await;
    assert!(status.success(), "{log}");
    assert!(log.contains("\"draining\"") && log.contains("\"stopped\""), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_at_once() {
    let (_folder, model) = checkpoint();
    let mut server = Server::start(model, &["--drain-grace", "3600"]).await;
    server.signal("INT");
    server.says("draining").await;
    server.signal("INT");
    let (status, log) = server.ended().await;
    assert_eq!(status.code(), Some(1));
    assert!(log.contains("exiting at once"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_standard_variables_turn_traces_on() {
    let (_folder, model) = checkpoint();
    let collector = Collector::start().await;
    let variables = [("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint.as_str()), ("OTEL_SERVICE_NAME", "named")];
    let server = Server::start_with(model, &[], &variables).await;
    let mut client = soon(InferenceClient::connect(format!("http://{}", server.grpc))).await.unwrap();
    client.get_model_info(GetModelInfoRequest::default()).await.unwrap();
    server.signal("TERM");
    let (status, log) = server.ended().await;
    assert!(status.success(), "{log}");
    assert_eq!(collector.server().name, "hardmax.v1.Inference/GetModelInfo");
    assert_eq!(collector.service_name(), Some(Attribute::StringValue("named".into())));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_shadows_find_is_told_with_the_ids_of_the_request() {
    let (_folder, model) = checkpoint();
    let flags = &["--top-k", "1", "--shadow-rate", "1", "--shadow-budget", "1", "--shadow-outlier-kl", "0"];
    let mut server = Server::start(model, flags).await;
    let mut client = soon(InferenceClient::connect(format!("http://{}", server.grpc))).await.unwrap();
    let mut ask = async |trace_id: &str, routing: Option<Policy>| {
        let input = Some(Input::TokenIds(TokenIds { ids: golden("input_ids") }));
        let routing = routing.map(|policy| RoutingPolicy { policy: Some(policy) });
        let mut request = tonic::Request::new(ScoreRequest { input, routing, shadow: Shadow::Always.into(), ..Default::default() });
        request.metadata_mut().insert("traceparent", format!("00-{trace_id}-00f067aa0ba902b7-01").parse().unwrap());
        soon(client.score(request)).await.unwrap().into_inner().request_id
    };
    let told = |fields: &Value| [&fields["request"], &fields["trace_id"]].map(|id| id.as_str().unwrap().to_owned());

    let trace_id = "4bf92f3577b34da6a3ce929d0e0e4736";
    let request_id = ask(trace_id, None).await;
    let outlier = server.says("the serving routing is far from the reference on this request").await;
    assert_eq!(told(&outlier), [request_id, trace_id.into()]);
    assert!(outlier["kl"].as_f64().unwrap() > 0.0 && outlier["layer"].is_u64() && outlier["generation"] == 1, "{outlier}");

    let trace_id = "aaf92f3577b34da6a3ce929d0e0e4736";
    let request_id = ask(trace_id, Some(Policy::Soft(Soft { temperature: None }))).await;
    let other = server.says("measured under a routing that is not in force").await;
    assert_eq!(told(&other), [request_id, trace_id.into()]);
    assert!(other["kl"].as_f64().unwrap() > 0.0, "{other}");
}
