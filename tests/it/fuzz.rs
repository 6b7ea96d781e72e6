//! Whatever bytes a client sends, the server answers with some status and goes on.

use prost::Message as _;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use tonic::Code;

use hardmax::service::proto::{
    self, DetokenizeRequest, ExportGenerationRequest, GenerateRequest, GetExpertLoadRequest, GetRoutingPolicyRequest, GetTuningRequest,
    ListGenerationsRequest, ListTuningsRequest, MeasureFidelityRequest, PauseTuningRequest, PublishRequest, ReplayRoutingRequest,
    ResetStatisticsRequest, ResumeTuningRequest, RollbackRequest, RoutingPolicy, RoutingTrace, ScoreRequest, SetRoutingPolicyRequest,
    StartTuningRequest, StopTuningRequest, TokenIds, TokenizeRequest, TraceOptions, TraceRoutingRequest, TuningConfig, TuningDistillation,
    TuningEarlyStop, TuningGates, TuningOptimizer, TuningParameter, TuningRouting, TuningRun, TuningSchedule, TuningShare,
    WatchTuningRequest, measure_fidelity_request, replay_routing_request,
    routing_client::RoutingClient,
    routing_policy::{LayerTopK, Mass, Policy, Soft, TopK},
    sampling_params::LogitBias,
    score_request::Input,
    start_tuning_request, trace_routing_request, tuning_parameter, tuning_share,
};

use crate::support::{Options, RawCall, TestServer, collect, generate, soon};

const INFERENCE: [&str; 5] = ["Generate", "Score", "Tokenize", "Detokenize", "GetModelInfo"];

const TUNING: [&str; 12] = [
    "Generate",
    "Tuning/StartTuning",
    "Tuning/WatchTuning",
    "Tuning/PauseTuning",
    "Tuning/ResumeTuning",
    "Tuning/StopTuning",
    "Tuning/ListTunings",
    "Tuning/GetTuning",
    "Tuning/Publish",
    "Tuning/Rollback",
    "Tuning/ListGenerations",
    "Tuning/ExportGeneration",
];

const ROUTING: [&str; 9] = [
    "Generate",
    "Score",
    "Routing/MeasureFidelity",
    "Routing/TraceRouting",
    "Routing/ReplayRouting",
    "Routing/GetExpertLoad",
    "Routing/GetRoutingPolicy",
    "Routing/SetRoutingPolicy",
    "Routing/ResetStatistics",
];

fn random_bytes(random: &mut StdRng) -> Vec<u8> {
    let length = random.random_range(0..200);
    (0..length).map(|_| random.random()).collect()
}

fn ids() -> TokenIds {
    TokenIds { ids: vec![1, 2, 200] }
}

/// A valid message, so that its damaged copies get deeper than the decoder. `traces` are of [`ids`].
fn valid(method: &str, policy: Policy, traces: &[RoutingTrace]) -> Vec<u8> {
    let routing = Some(RoutingPolicy { policy: Some(policy) });
    let sampling = proto::SamplingParams {
        max_new_tokens: Some(3),
        temperature: Some(0.5),
        top_k: Some(5),
        top_p: Some(0.9),
        min_p: Some(0.1),
        seed: Some(1),
        stop: vec!["stop".into()],
        stop_token_ids: vec![3],
        repetition_penalty: Some(1.1),
        logprobs: Some(2),
        ignore_eos: Some(false),
        n: Some(1),
        min_new_tokens: Some(1),
        presence_penalty: Some(0.5),
        frequency_penalty: Some(-0.5),
        logit_bias: vec![LogitBias { token_id: 7, bias: 1.5 }],
        allowed_token_ids: vec![7, 8, 195, 182],
    };
    let options = Some(TraceOptions { omit_weights: false, omit_entropy: true, omit_near_ties: false });
    match method {
        "Generate" => GenerateRequest {
            sampling: Some(sampling),
            routing,
            priority: 3,
            timeout_seconds: Some(5.0),
            trace: options,
            shadow: proto::Shadow::Always.into(),
            ..generate("Größe", 3)
        }
        .encode_to_vec(),
        "Score" => {
            ScoreRequest { input: Some(Input::TokenIds(ids())), routing, alternatives: Some(2), ..Default::default() }.encode_to_vec()
        }
        "Tokenize" => TokenizeRequest { text: "Größe".into(), ..Default::default() }.encode_to_vec(),
        "Detokenize" => DetokenizeRequest { token_ids: ids().ids, ..Default::default() }.encode_to_vec(),
        "GetModelInfo" => proto::GetModelInfoRequest { model: "fake".into() }.encode_to_vec(),
        "Routing/MeasureFidelity" => MeasureFidelityRequest {
            input: Some(measure_fidelity_request::Input::TokenIds(ids())),
            policies: routing.into_iter().collect(),
            reference: Some(RoutingPolicy { policy: Some(Policy::Soft(Soft { temperature: Some(0.5) })) }),
            window_tokens: Some(2),
            ..Default::default()
        }
        .encode_to_vec(),
        "Routing/TraceRouting" => {
            let input = Some(trace_routing_request::Input::TokenIds(ids()));
            TraceRoutingRequest { input, routing, options, priority: 1, ..Default::default() }.encode_to_vec()
        }
        "Routing/ReplayRouting" => ReplayRoutingRequest {
            input: Some(replay_routing_request::Input::TokenIds(ids())),
            traces: traces.to_vec(),
            weight_form: Some(2),
            routing,
            alternatives: Some(1),
            ..Default::default()
        }
        .encode_to_vec(),
        "Routing/GetExpertLoad" => GetExpertLoadRequest { scope: 1, ..Default::default() }.encode_to_vec(),
        "Routing/GetRoutingPolicy" => GetRoutingPolicyRequest { model: "fake".into() }.encode_to_vec(),
        "Routing/SetRoutingPolicy" => SetRoutingPolicyRequest { serving: routing, ..Default::default() }.encode_to_vec(),
        "Routing/ResetStatistics" => ResetStatisticsRequest { model: "fake".into() }.encode_to_vec(),
        other => panic!("{other} has no message here"),
    }
}

/// The same about tuning. The job is that of no start here: it has no text.
fn valid_tuning(method: &str) -> Vec<u8> {
    let id = || "t1".to_owned();
    let actor = || "fuzz".to_owned();
    match method {
        "Tuning/StartTuning" => StartTuningRequest { part: Some(start_tuning_request::Part::Config(settings())) }.encode_to_vec(),
        "Tuning/WatchTuning" => WatchTuningRequest { id: id(), after: 3 }.encode_to_vec(),
        "Tuning/PauseTuning" => PauseTuningRequest { id: id(), actor: actor() }.encode_to_vec(),
        "Tuning/ResumeTuning" => ResumeTuningRequest { id: id(), share: settings().share, actor: actor() }.encode_to_vec(),
        "Tuning/StopTuning" => StopTuningRequest { id: id(), keep_candidate: true, actor: actor() }.encode_to_vec(),
        "Tuning/ListTunings" => ListTuningsRequest {}.encode_to_vec(),
        "Tuning/GetTuning" => GetTuningRequest { id: id() }.encode_to_vec(),
        "Tuning/Publish" => {
            PublishRequest { id: id(), override_gates: true, in_flight: 1, watch_seconds: Some(3.0), actor: actor() }.encode_to_vec()
        }
        "Tuning/Rollback" => RollbackRequest { generation: Some(2), in_flight: 1, actor: actor() }.encode_to_vec(),
        "Tuning/ListGenerations" => ListGenerationsRequest {}.encode_to_vec(),
        "Tuning/ExportGeneration" => {
            ExportGenerationRequest { generation: 1, name: "fuzz".into(), form: 1, actor: actor() }.encode_to_vec()
        }
        other => valid(other, Policy::TopK(TopK { k: 1, weight_form: None }), &[]),
    }
}

/// Every field is set.
fn settings() -> TuningConfig {
    let schedule = TuningSchedule {
        shape: "linear".into(),
        init: 1.0,
        r#final: Some(0.5),
        hold_start: Some(0.1),
        hold_end: Some(0.2),
        begin: None,
        until: None,
    };
    let temperature = TuningParameter { value: Some(tuning_parameter::Value::Schedule(schedule.clone())) };
    TuningConfig {
        request_id: "fuzz-1".into(),
        model: String::new(),
        actor: "fuzz".into(),
        target: proto::TuningTarget::Named.into(),
        tensors: vec!["layers.0.router".into(), "layers.1".into()],
        routing: Some(TuningRouting {
            estimator: "soft".into(),
            k: None,
            parameters: [("temperature".to_owned(), temperature)].into(),
            losses: [("z".to_owned(), schedule)].into(),
            serving: Some(RoutingPolicy { policy: Some(Policy::TopK(TopK { k: 1, weight_form: Some(2) })) }),
            reference: Some(RoutingPolicy { policy: Some(Policy::Soft(Soft { temperature: Some(1.0) })) }),
        }),
        optimizer: Some(TuningOptimizer {
            learning_rate: Some(1e-3),
            router_rate: Some(1.0),
            expert_rate: Some(0.3),
            final_ratio: Some(0.1),
            warmup_steps: Some(1),
            weight_decay: Some(0.0),
            beta1: Some(0.9),
            beta2: Some(0.95),
            clip_norm: Some(1.0),
        }),
        run: Some(TuningRun {
            steps: Some(2),
            windows: Some(2),
            micro_windows: Some(1),
            window_tokens: Some(16),
            seed: Some(1),
            eval_every: Some(1),
            eval_tokens: Some(16),
            save_every: Some(1),
            recompute_layers: true,
            max_seconds: Some(5.0),
            max_memory_bytes: Some(1 << 30),
            skip_limit: Some(2),
        }),
        distillation: Some(TuningDistillation { weight: Some(1.0), lm_weight: Some(0.0) }),
        early_stop: Some(TuningEarlyStop { patience: Some(2), min_change: Some(0.0) }),
        gates: Some(TuningGates { max_perplexity_ratio: Some(1.0), max_gap_ratio: Some(1.0), max_new_dead_experts: Some(0) }),
        share: Some(TuningShare { share: Some(tuning_share::Share::DutyCycle(0.5)) }),
        data: None,
    }
}

fn damaged(mut bytes: Vec<u8>, random: &mut StdRng) -> Vec<u8> {
    if bytes.is_empty() {
        return random_bytes(random);
    }
    for _ in 0..random.random_range(1..4) {
        let at = random.random_range(0..bytes.len());
        bytes[at] = random.random();
    }
    bytes
}

/// Sends so many messages that are damaged, random or not even framed; each has some answer, and the server is as it was.
async fn no_bytes_stop(server: &TestServer, methods: &[&str], rounds: usize, message: impl Fn(&str, &mut StdRng) -> Vec<u8>) {
    let mut random = StdRng::seed_from_u64(20);
    for round in 0..rounds {
        let method = *methods.choose(&mut random).unwrap();
        let mut body = if random.random_bool(0.5) { damaged(message(method, &mut random), &mut random) } else { random_bytes(&mut random) };
        let mut call = RawCall::raw(method, body.clone());
        if random.random_bool(0.2) {
            body.truncate(60);
            call = call.unframed();
        }
        let answer = call.send(server).await;
        assert!(answer.code().is_some(), "round {round}: {method} {body:?}: {answer:?}");
        assert!(!answer.message().contains("panicked"), "round {round}: {method} {body:?}: {answer:?}");
    }
    let mut client = server.client().await;
    let (messages, end) = collect(client.generate(generate("a", 4)).await.unwrap().into_inner()).await;
    assert!(end.is_none() && messages.last().unwrap().finish.is_some());
    assert_eq!(server.metric("hardmax_engine_panics_total", &[]).await, Some(0.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_bytes_stop_the_server() {
    let server = TestServer::start(Options::default()).await;
    let top_2 = || Policy::TopK(TopK { k: 2, weight_form: Some(1) });
    no_bytes_stop(&server, &INFERENCE, 400, |method, _| valid(method, top_2(), &[])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_bytes_about_routing_stop_the_server() {
    let server = TestServer::start(Options::demo()).await;
    let mut client = RoutingClient::new(server.channel().await);
    let input = Some(trace_routing_request::Input::TokenIds(ids()));
    let mut stream = soon(client.trace_routing(TraceRoutingRequest { input, ..Default::default() })).await.unwrap().into_inner();
    let mut traces = Vec::new();
    while let Some(message) = soon(stream.message()).await.unwrap() {
        traces.extend(message.trace);
    }
    let layers = traces[0].layers.len() as u32;
    let policies = [
        Policy::TopK(TopK { k: 1, weight_form: None }),
        Policy::LayerTopK(LayerTopK { k: (0..layers).map(|layer| 1 + layer % 2).collect(), weight_form: Some(2) }),
        Policy::Mass(Mass { threshold: 0.7, max_k: Some(3), weight_form: Some(1) }),
        Policy::Soft(Soft { temperature: None }),
    ];
    for method in ROUTING {
        for policy in &policies {
            let answer = RawCall::raw(method, valid(method, policy.clone(), &traces)).send(&server).await;
            assert_eq!(answer.code(), Some(Code::Ok), "{method} {policy:?}: {answer:?}");
        }
    }
    let message = |method: &str, random: &mut StdRng| valid(method, policies.choose(random).unwrap().clone(), &traces);
    no_bytes_stop(&server, &ROUTING, 200, message).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_bytes_about_tuning_stop_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(Options::tuning(dir.path(), &[dir.path()])).await;
    for method in TUNING {
        let answer = RawCall::raw(method, valid_tuning(method)).send(&server).await;
        let expected = match method {
            // No text follows.
            "Tuning/StartTuning" => Code::InvalidArgument,
            // It is the checkpoint.
            "Tuning/ExportGeneration" => Code::FailedPrecondition,
            "Generate" | "Tuning/ListTunings" | "Tuning/ListGenerations" => Code::Ok,
            _ => Code::NotFound,
        };
        assert_eq!(answer.code(), Some(expected), "{method}: {answer:?}");
    }
    no_bytes_stop(&server, &TUNING, 300, |method, _| valid_tuning(method)).await;
}
