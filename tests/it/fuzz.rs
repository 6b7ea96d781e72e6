//! Whatever bytes a client sends, the server answers with some status and goes on.

use prost::Message as _;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use tonic::Code;

use hardmax::service::proto::{
    self, DetokenizeRequest, GenerateRequest, GetExpertLoadRequest, GetRoutingPolicyRequest, MeasureFidelityRequest, ReplayRoutingRequest,
    ResetStatisticsRequest, RoutingPolicy, RoutingTrace, ScoreRequest, SetRoutingPolicyRequest, TokenIds, TokenizeRequest, TraceOptions,
    TraceRoutingRequest, measure_fidelity_request, replay_routing_request,
    routing_client::RoutingClient,
    routing_policy::{LayerTopK, Mass, Policy, Soft, TopK},
    sampling_params::LogitBias,
    score_request::Input,
    trace_routing_request,
};

use crate::support::{Options, RawCall, TestServer, collect, generate, soon};

const INFERENCE: [&str; 5] = ["Generate", "Score", "Tokenize", "Detokenize", "GetModelInfo"];

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

fn damaged(mut bytes: Vec<u8>, random: &mut StdRng) -> Vec<u8> {
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
