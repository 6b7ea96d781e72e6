//! Whatever bytes a client sends, the server answers with some status and goes on.

use prost::Message as _;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};

use hardmax::service::proto::{
    self, DetokenizeRequest, GenerateRequest, RoutingPolicy, ScoreRequest, TokenIds, TokenizeRequest,
    routing_policy::{Policy, TopK},
    sampling_params::LogitBias,
    score_request::Input,
};

use crate::support::{Options, RawCall, TestServer, collect, generate};

const METHODS: [&str; 5] = ["Generate", "Score", "Tokenize", "Detokenize", "GetModelInfo"];

fn random_bytes(random: &mut StdRng) -> Vec<u8> {
    let length = random.random_range(0..200);
    (0..length).map(|_| random.random()).collect()
}

/// A valid message, so that its damaged copies get deeper than the decoder.
fn valid(method: &str) -> Vec<u8> {
    let routing = Some(RoutingPolicy { policy: Some(Policy::TopK(TopK { k: 2, weight_form: Some(1) })) });
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
    let ids = TokenIds { ids: vec![1, 2, 300] };
    match method {
        "Generate" => {
            GenerateRequest { sampling: Some(sampling), routing, priority: 3, timeout_seconds: Some(5.0), ..generate("Größe", 3) }
                .encode_to_vec()
        }
        "Score" => ScoreRequest { input: Some(Input::TokenIds(ids)), routing, alternatives: Some(2), ..Default::default() }.encode_to_vec(),
        "Tokenize" => TokenizeRequest { text: "Größe".into(), ..Default::default() }.encode_to_vec(),
        "Detokenize" => DetokenizeRequest { token_ids: ids.ids, ..Default::default() }.encode_to_vec(),
        _ => proto::GetModelInfoRequest { model: "fake".into() }.encode_to_vec(),
    }
}

fn damaged(method: &str, random: &mut StdRng) -> Vec<u8> {
    let mut bytes = valid(method);
    for _ in 0..random.random_range(1..4) {
        let at = random.random_range(0..bytes.len());
        bytes[at] = random.random();
    }
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_bytes_stop_the_server() {
    let server = TestServer::start(Options::default()).await;
    let mut random = StdRng::seed_from_u64(20);
    for round in 0..400 {
        let method = *METHODS.choose(&mut random).unwrap();
        let mut body = if random.random_bool(0.5) { damaged(method, &mut random) } else { random_bytes(&mut random) };
        let mut call = RawCall::raw(method, body.clone());
        if random.random_bool(0.2) {
            // Not even framed.
            body.truncate(60);
            call = call.unframed();
        }
        let answer = call.send(&server).await;
        assert!(answer.code().is_some(), "round {round}: {method} {body:?}: {answer:?}");
        assert!(!answer.message().contains("panicked"), "round {round}: {method} {body:?}: {answer:?}");
    }
    let mut client = server.client().await;
    let (messages, end) = collect(client.generate(generate("a", 4)).await.unwrap().into_inner()).await;
    assert!(end.is_none() && messages.last().unwrap().finish.is_some());
    assert_eq!(server.metric("hardmax_engine_panics_total", &[]).await, Some(0.0));
}
