//! `hardmax.v1.Routing` over a real socket: traces, replays, and the routing in force.

use hardmax::{
    engine::{EngineConfig, MeasureConfig},
    moe::policy::{RoutingChoice, RoutingRule},
    service::{
        proto::{
            self, GenerateRequest, GetExpertLoadRequest, GetModelInfoRequest, GetRoutingPolicyRequest, MeasureFidelityRequest,
            ReplayRoutingRequest, ResetStatisticsRequest, RoutingPolicy, ScoreRequest, SetRoutingPolicyRequest, TokenIds, TraceOptions,
            TraceRoutingRequest, TraceRoutingResponse, generate_request::Prompt, get_expert_load_request::Scope, measure_fidelity_request,
            replay_routing_request, routing_client::RoutingClient, score_request, trace_routing_request::Input,
        },
        routing_message,
    },
};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt as _;

use crate::support::{Options, TestServer, collect, generate, soon};

/// What makes a good request a bad one.
type Change<R> = &'static dyn Fn(&mut R);

async fn client(server: &TestServer) -> RoutingClient<Channel> {
    RoutingClient::new(server.channel().await)
}

/// As `--routing` spells it.
pub fn rule(text: &str) -> RoutingPolicy {
    routing_message(&text.parse::<RoutingRule>().unwrap())
}

fn field(status: &Status) -> String {
    status.get_details_bad_request().expect("BadRequest details").field_violations[0].field.clone()
}

fn trace(text: &str, routing: &str) -> TraceRoutingRequest {
    TraceRoutingRequest { input: Some(Input::Text(text.into())), routing: Some(rule(routing)), ..TraceRoutingRequest::default() }
}

async fn traced(client: &mut RoutingClient<Channel>, request: TraceRoutingRequest) -> Vec<TraceRoutingResponse> {
    let mut stream = soon(client.trace_routing(request)).await.unwrap().into_inner();
    let mut messages = Vec::new();
    while let Some(message) = soon(stream.message()).await.unwrap() {
        messages.push(message);
    }
    messages
}

const TEXT: &str = "And God said, Let there be light: and there was light. And God saw the light, that it was good.";

#[tokio::test]
async fn what_was_traced_is_replayed() {
    let server = TestServer::start(Options::demo()).await;
    let mut client = client(&server).await;
    let messages = traced(&mut client, trace(TEXT, "top-2")).await;
    let (last, others) = messages.split_last().unwrap();
    assert!(last.generation == Some(1) && others.iter().all(|message| message.generation.is_none()));
    let traces: Vec<proto::RoutingTrace> = messages.iter().map(|message| message.trace.clone().unwrap()).collect();
    let tokens: Vec<u32> = messages.iter().flat_map(|message| message.token_ids.clone()).collect();
    assert_eq!(traces.iter().map(|trace| trace.num_tokens as usize).sum::<usize>(), tokens.len());
    assert!(traces.iter().all(|trace| trace.experts_per_token == 2 && trace.expert_bytes == 1 && !trace.entropy.is_empty()));

    let mut inference = server.client().await;
    let input = || TokenIds { ids: tokens.clone() };
    let scored =
        ScoreRequest { input: Some(score_request::Input::TokenIds(input())), routing: Some(rule("top-2")), ..ScoreRequest::default() };
    let scored = soon(inference.score(scored)).await.unwrap().into_inner();
    let replay = ReplayRoutingRequest {
        input: Some(replay_routing_request::Input::TokenIds(input())),
        traces: traces.clone(),
        routing: Some(rule("top-1")),
        ..ReplayRoutingRequest::default()
    };
    let replayed = soon(client.replay_routing(replay.clone())).await.unwrap().into_inner();
    assert_eq!(replayed.tokens, scored.tokens, "the same experts with the same weights");
    assert_eq!((replayed.logprob_sum, replayed.perplexity), (scored.logprob_sum, scored.perplexity));

    // Other experts give other numbers, and what is not a trace is named.
    let mut other = replay.clone();
    other.traces.iter_mut().for_each(|trace| trace.experts.iter_mut().for_each(|expert| *expert = (*expert + 1) % 8));
    let other = soon(client.replay_routing(other)).await.unwrap().into_inner();
    assert!(other.perplexity > replayed.perplexity, "{} and {}", other.perplexity, replayed.perplexity);
    let refused: [(&str, Change<ReplayRoutingRequest>); 6] = [
        ("traces", &|r| r.traces.clear()),
        ("traces[0].experts", &|r| r.traces[0].experts.truncate(1)),
        ("traces", &|r| r.traces[0].experts[0] = 8),
        ("traces", &|r| r.traces[0].layers[0] = 17),
        ("weight_form", &|r| r.weight_form = Some(9)),
        ("input", &|r| r.input = None),
    ];
    for (name, change) in refused {
        let mut bad = replay.clone();
        change(&mut bad);
        // Layers that are not ascending have a field of their own.
        if bad.traces.first().is_some_and(|trace| trace.layers.first() == Some(&17)) {
            bad.traces[0].layers.sort_unstable();
        }
        let status = soon(client.replay_routing(bad)).await.unwrap_err();
        assert_eq!((status.code(), field(&status)), (Code::InvalidArgument, name.to_owned()));
    }
}

#[tokio::test]
async fn a_generation_tells_its_experts() {
    let server = TestServer::start(Options::demo()).await;
    let mut inference = server.client().await;
    let request = |trace| GenerateRequest { trace, prompt: Some(Prompt::Text(TEXT.into())), ..generate("", 12) };
    let bare = TraceOptions { omit_weights: true, omit_entropy: true, omit_near_ties: true };
    let (messages, end) = collect(soon(inference.generate(request(Some(bare)))).await.unwrap().into_inner()).await;
    assert!(end.is_none());
    let usage = messages.last().unwrap().finish.as_ref().unwrap().usage.unwrap();
    assert_eq!(usage.cached_prompt_tokens, 0);
    let mut next = 0;
    for trace in messages.iter().filter_map(|message| message.trace.as_ref()) {
        assert_eq!(trace.first_position, next);
        assert_eq!(trace.experts.len(), (trace.num_tokens * trace.experts_per_token) as usize * trace.layers.len());
        assert!(trace.weights.is_empty() && trace.entropy.is_empty() && trace.near_ties.is_empty());
        next += trace.num_tokens;
    }
    assert_eq!(next, usage.prompt_tokens + usage.generated_tokens - 1, "the last token is not read");
    let ids = |messages: &[proto::GenerateResponse]| messages.iter().flat_map(|m| m.token_ids.clone()).collect::<Vec<_>>();
    let (silent, _) = collect(soon(inference.generate(request(None))).await.unwrap().into_inner()).await;
    assert!(silent.iter().all(|message| message.trace.is_none()));
    assert_eq!(ids(&silent), ids(&messages));
}

#[tokio::test]
async fn the_routing_in_force_is_changed_while_it_serves() {
    let server = TestServer::start(Options { routing: RoutingChoice::TopK { k: 1, weight_form: None }.into(), ..Options::demo() }).await;
    let mut client = client(&server).await;
    let mut inference = server.client().await;
    let get = || GetRoutingPolicyRequest::default();
    let before = soon(client.get_routing_policy(get())).await.unwrap().into_inner();
    assert_eq!(before.serving, Some(rule("top-1")));
    assert!(before.reference.is_some());
    let layers = before.layers.len();
    let ks: Vec<String> = (0..layers).map(|layer| (1 + layer % 2).to_string()).collect();
    let mixed = format!("top-{}", ks.join(","));

    let score = || ScoreRequest { input: Some(score_request::Input::Text(TEXT.into())), ..ScoreRequest::default() };
    let first = soon(inference.score(score())).await.unwrap().into_inner();
    for text in [mixed.as_str(), "mass-0.8:2", "soft:0.7", "native"] {
        let set = SetRoutingPolicyRequest { serving: Some(rule(text)), ..SetRoutingPolicyRequest::default() };
        let previous = soon(client.set_routing_policy(set)).await.unwrap().into_inner().previous;
        assert!(previous.is_some());
        assert_eq!(server.metric("hardmax_routing_info", &[("serving", text)]).await, Some(1.0));
        assert_eq!(soon(client.get_routing_policy(get())).await.unwrap().into_inner().serving, Some(rule(text)));
        // What says nothing is served as what asks for it.
        let silent = soon(inference.score(score())).await.unwrap().into_inner();
        let asked = soon(inference.score(ScoreRequest { routing: Some(rule(text)), ..score() })).await.unwrap().into_inner();
        assert_eq!(silent.tokens, asked.tokens, "{text}");
    }
    let info = soon(inference.get_model_info(GetModelInfoRequest::default())).await.unwrap().into_inner();
    assert_eq!(info.moe_layers.len(), layers);
    let back = SetRoutingPolicyRequest { serving: Some(rule("top-1")), ..SetRoutingPolicyRequest::default() };
    assert_eq!(soon(client.set_routing_policy(back)).await.unwrap().into_inner().previous, Some(rule("native")));
    assert_eq!(soon(inference.score(score())).await.unwrap().into_inner().tokens, first.tokens);

    for (serving, name) in [
        (None, "serving"),
        (Some(RoutingPolicy { policy: None }), "serving.policy"),
        (Some(rule("top-1,2,1,2,1,2,1,2,1,2,1,2,1,2,1,2,1")), "serving.layer_top_k.k"),
        (Some(rule("top-99")), "serving.top_k.k"),
        (Some(rule("mass-1.5")), "serving.mass.threshold"),
    ] {
        let status = soon(client.set_routing_policy(SetRoutingPolicyRequest { serving, ..Default::default() })).await.unwrap_err();
        assert_eq!((status.code(), field(&status)), (Code::InvalidArgument, name.to_owned()));
    }
    let other = SetRoutingPolicyRequest { model: "other".into(), serving: Some(rule("top-1")) };
    assert_eq!(soon(client.set_routing_policy(other)).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_fixed_routing_stays() {
    let server = TestServer::start(Options { runtime_routing: false, ..Options::default() }).await;
    let mut client = client(&server).await;
    let set = SetRoutingPolicyRequest { serving: Some(rule("top-1")), ..SetRoutingPolicyRequest::default() };
    let status = soon(client.set_routing_policy(set)).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("--runtime-routing"), "{}", status.message());
}

/// Whatever was asked for, in whatever company: every layer gives each token to as many experts as its routing says.
#[tokio::test]
async fn every_route_is_counted_once() {
    let server = TestServer::start(Options::demo()).await;
    let mut client = client(&server).await;
    let asked = [("top-1", 1), ("top-2", 2), ("top-3:raw", 3), ("soft", 8)];
    let mut calls = Vec::new();
    for (routing, k) in asked.into_iter().cycle().take(12) {
        let mut inference = server.client().await;
        let request = GenerateRequest { routing: Some(rule(routing)), prompt: Some(Prompt::Text(TEXT.into())), ..generate("", 9) };
        calls.push(tokio::spawn(async move {
            let (messages, end) = collect(inference.generate(request).await.unwrap().into_inner()).await;
            assert!(end.is_none());
            let usage = messages.last().unwrap().finish.as_ref().unwrap().usage.unwrap();
            // Neither what was in the cache nor the last token is read.
            let read = usage.prompt_tokens - usage.cached_prompt_tokens + usage.generated_tokens - 1;
            (u64::from(read), u64::from(read) * k)
        }));
    }
    let (mut tokens, mut routes) = (0, 0);
    for call in calls {
        let (read, routed) = soon(call).await.unwrap();
        (tokens, routes) = (tokens + read, routes + routed);
    }
    let load = |scope: Scope| GetExpertLoadRequest { scope: scope.into(), ..GetExpertLoadRequest::default() };
    for scope in [Scope::Window, Scope::Total] {
        let load = soon(client.get_expert_load(load(scope))).await.unwrap().into_inner();
        assert!(load.generation == 1 && load.layers.len() >= 4 && load.seconds > 0.0);
        for layer in &load.layers {
            assert_eq!((layer.tokens, layer.expert_tokens.iter().sum::<u64>()), (tokens, routes), "layer {}", layer.layer);
            let mean = layer.utilization.iter().sum::<f64>() / layer.utilization.len() as f64;
            assert!((mean - 1.0).abs() < 1e-9 && layer.router_entropy > 0.0 && layer.load_cv > 0.0 && layer.balancedness <= 1.0);
        }
    }
    soon(client.reset_statistics(ResetStatisticsRequest::default())).await.unwrap();
    let total = soon(client.get_expert_load(load(Scope::Total))).await.unwrap().into_inner();
    assert!(total.layers.iter().all(|layer| layer.tokens == 0 && layer.dead_experts == 0), "no traffic is no dead expert");
    let counted = server.metric("hardmax_expert_tokens_total", &[("layer", "0"), ("expert", "0")]).await.unwrap();
    assert!(counted > 0.0, "counters go on");
    let status = soon(client.get_expert_load(GetExpertLoadRequest { scope: 9, ..Default::default() })).await.unwrap_err();
    assert_eq!((status.code(), field(&status)), (Code::InvalidArgument, "scope".to_owned()));
}

fn measure(policies: &[&str], window: u32) -> MeasureFidelityRequest {
    MeasureFidelityRequest {
        input: Some(measure_fidelity_request::Input::Text(TEXT.repeat(3))),
        policies: policies.iter().map(|text| rule(text)).collect(),
        window_tokens: Some(window),
        ..MeasureFidelityRequest::default()
    }
}

#[tokio::test]
async fn the_gap_of_a_text_is_measured_beside_requests() {
    let server = TestServer::start(Options::demo()).await;
    let mut client = client(&server).await;
    let mut busy = server.client().await;
    let other = tokio::spawn(async move { collect(busy.generate(generate(TEXT, 60)).await.unwrap().into_inner()).await });
    let mut stream = soon(client.measure_fidelity(measure(&["top-1", "top-8", "soft", "mass-0.9:4"], 40))).await.unwrap().into_inner();
    let mut messages = Vec::new();
    while let Some(message) = soon(stream.message()).await.unwrap() {
        messages.push(message);
    }
    assert!(soon(other).await.unwrap().1.is_none());
    assert!(messages.windows(2).all(|pair| pair[0].tokens_done < pair[1].tokens_done && !pair[0].done));
    let last = messages.last().unwrap();
    assert!(last.done && last.tokens_done == last.tokens_total && last.generation == 1);
    assert_eq!(last.reference, Some(rule("soft:1")));
    let kl = |at: usize| last.policies[at].output.as_ref().unwrap().kl.unwrap().mean;
    assert!(kl(0) > 1e-4, "hard is not soft: {}", kl(0));
    assert!(kl(1) < 1e-9 && kl(2) < 1e-9, "all experts are the mixture: {} {}", kl(1), kl(2));
    assert!(kl(3) < kl(0), "{} and {}", kl(3), kl(0));
    for policy in &last.policies {
        let output = policy.output.as_ref().unwrap();
        assert_eq!((output.tokens, output.non_finite), (u64::from(last.tokens_total), 0));
        assert!(policy.layers.len() >= 4 && output.reference_perplexity > 1.0);
    }
    let layer = &last.policies[0].layers[0];
    let (l2_rel, missed) = (layer.l2_rel.unwrap(), layer.missed_mass.unwrap());
    assert!(l2_rel.p50 <= l2_rel.p95 && l2_rel.p95 <= l2_rel.max && missed.mean > 0.0 && layer.overlap > 0.5);

    // Without a word about policies it is the routing in force.
    let silent = soon(client.measure_fidelity(measure(&[], 40))).await.unwrap().into_inner();
    let silent: Vec<_> = tokio_stream::StreamExt::collect(silent).await;
    assert_eq!(silent.last().unwrap().as_ref().unwrap().policies[0].policy, Some(rule("native")));
}

fn ids(tokens: usize) -> Option<measure_fidelity_request::Input> {
    Some(measure_fidelity_request::Input::TokenIds(TokenIds { ids: vec![5; tokens] }))
}

#[tokio::test]
async fn measurements_are_bounded() {
    let engine =
        EngineConfig { measure: MeasureConfig { max_requests: 1, max_tokens: 1000, ..MeasureConfig::default() }, ..Options::demo().engine };
    let server = TestServer::start(Options { engine, ..Options::demo() }).await;
    let mut client = client(&server).await;
    let refused: [(&str, Code, Change<MeasureFidelityRequest>); 9] = [
        ("input", Code::InvalidArgument, &|r| r.input = None),
        ("input", Code::InvalidArgument, &|r| r.input = ids(1)),
        ("input", Code::OutOfRange, &|r| r.input = ids(1001)),
        ("window_tokens", Code::InvalidArgument, &|r| r.window_tokens = Some(1)),
        ("window_tokens", Code::OutOfRange, &|r| r.window_tokens = Some(1 << 20)),
        ("policies[1].top_k.k", Code::InvalidArgument, &|r| r.policies = vec![rule("top-1"), rule("top-99")]),
        ("reference.mass.threshold", Code::InvalidArgument, &|r| r.reference = Some(rule("mass-7"))),
        // Counted before they are looked at.
        ("policies", Code::OutOfRange, &|r| r.policies = vec![rule("top-99"); 9]),
        // Nine routings, in a fourth of a cache of 4096 tokens.
        ("window_tokens", Code::OutOfRange, &|r| (r.input, r.policies, r.window_tokens) = (ids(1000), vec![rule("top-1"); 8], Some(120))),
    ];
    for (name, code, change) in refused {
        let mut bad = measure(&["top-1"], 32);
        change(&mut bad);
        let status = soon(client.measure_fidelity(bad)).await.unwrap_err();
        assert_eq!((status.code(), field(&status)), (code, name.to_owned()));
    }
    // One at a time; whoever leaves makes room.
    let long = || MeasureFidelityRequest { input: ids(1000), ..measure(&["top-1", "top-2"], 8) };
    let first = soon(client.measure_fidelity(long())).await.unwrap();
    let second = soon(client.measure_fidelity(long())).await.unwrap_err();
    assert_eq!(second.code(), Code::ResourceExhausted);
    assert!(second.get_details_retry_info().is_some());
    let too_long = MeasureFidelityRequest { input: ids(1001), ..long() };
    let status = soon(client.measure_fidelity(too_long)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "who has no place is not even read");
    drop(first);
    let again = async {
        while client.measure_fidelity(measure(&["top-1"], 32)).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    soon(again).await;
}
