//! What each RPC answers, over a real socket: the good answers, and the table of statuses.

use std::time::Duration;

use hardmax::{
    engine::EngineConfig,
    service::proto::{
        self, DetokenizeRequest, Finish, FinishReason, GenerateRequest, GetModelInfoRequest, RoutingPolicy, SamplingParams, ScoreRequest,
        TokenIds, TokenizeRequest,
        finish::Matched,
        generate_request::Prompt,
        routing_policy::{Native, Policy, Soft, TopK},
        sampling_params::LogitBias,
        score_request::Input,
    },
};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

use crate::support::{EOS, MAX_TOKENIZE, MODEL, Options, PANIC, POISON, RawCall, SCRIPT, TestServer, VOCAB, collect, generate, said, soon};

fn field(status: &Status) -> String {
    let bad = status.get_details_bad_request().expect("BadRequest details");
    assert_eq!(bad.field_violations.len(), 1);
    assert!(!bad.field_violations[0].description.is_empty());
    bad.field_violations[0].field.clone()
}

fn retry_after(status: &Status) -> Option<Duration> {
    status.get_details_retry_info()?.retry_delay
}

fn sampling(change: impl FnOnce(&mut SamplingParams)) -> GenerateRequest {
    let mut request = generate("a", 4);
    change(request.sampling.as_mut().unwrap());
    request
}

fn routed(policy: Option<Policy>) -> GenerateRequest {
    GenerateRequest { routing: Some(RoutingPolicy { policy }), ..generate("a", 4) }
}

fn tokens(ids: Vec<u32>) -> GenerateRequest {
    GenerateRequest { prompt: Some(Prompt::TokenIds(TokenIds { ids })), ..generate("", 4) }
}

#[tokio::test]
async fn a_generation_streams_whole_characters() {
    let server = TestServer::start(Options::default()).await;
    let mut client = server.client().await;
    let response = soon(client.generate(generate("ab", 60))).await.unwrap();
    let (messages, end) = collect(response.into_inner()).await;
    assert!(end.is_none());

    let expected = said(2, 60);
    let ids: Vec<u8> = messages.iter().flat_map(|m| &m.token_ids).map(|&id| id as u8).collect();
    assert_eq!(ids, expected);
    let text: String = messages.iter().map(|m| m.text.as_str()).collect();
    assert_eq!(text, String::from_utf8_lossy(&expected));
    let pieces = messages.iter().filter(|m| m.text.contains('\u{fffd}')).count();
    assert!(pieces <= 1, "only the cut at the end may leave half a character");

    let (last, others) = messages.split_last().unwrap();
    assert!(others.iter().all(|m| m.finish.is_none()));
    let finish = last.finish.as_ref().unwrap();
    assert_eq!((finish.reason(), &finish.matched), (FinishReason::Length, &None));
    assert_eq!(finish.usage, Some(proto::Usage { prompt_tokens: 2, generated_tokens: 60, cached_prompt_tokens: 0 }));
    assert_eq!(finish.generation, 1);
    let timing = finish.timing.unwrap();
    assert!(timing.queue_seconds >= 0.0 && timing.prefill_seconds > 0.0 && timing.decode_seconds > 0.0);
}

#[tokio::test]
async fn a_generation_ends_before_its_stop_string() {
    let server = TestServer::start(Options::default()).await;
    let mut client = server.client().await;
    let request = sampling(|s| (s.stop, s.max_new_tokens) = (vec!["of a".into()], None));
    let (messages, _) = collect(client.generate(request).await.unwrap().into_inner()).await;
    let text: String = messages.iter().map(|m| m.text.as_str()).collect();
    assert_eq!(text, "Größe 🙂 ");
    assert_eq!(messages.last().unwrap().finish.as_ref().unwrap().matched, Some(Matched::StopString("of a".into())));
    assert_eq!(messages.last().unwrap().finish.as_ref().unwrap().reason(), FinishReason::Stop);

    let stop_token = u32::from(b'm');
    let request = sampling(|s| (s.stop_token_ids, s.max_new_tokens) = (vec![stop_token], None));
    let (messages, _) = collect(client.generate(request).await.unwrap().into_inner()).await;
    assert_eq!(messages.last().unwrap().finish.as_ref().unwrap().matched, Some(Matched::StopTokenId(stop_token)));
}

/// The text of one choice, once it has finished.
async fn text(server: &TestServer, request: GenerateRequest) -> String {
    let stream = soon(server.client().await.generate(request)).await.unwrap().into_inner();
    let (messages, end) = collect(stream).await;
    assert!(end.is_none() && messages.last().unwrap().finish.is_some(), "{end:?}");
    messages.iter().map(|m| m.text.as_str()).collect()
}

fn bias(token_id: u32, bias: f32) -> LogitBias {
    LogitBias { token_id, bias }
}

#[tokio::test]
async fn nothing_ends_a_generation_before_its_least_length() {
    let server = TestServer::start(Options::default()).await;
    let least = SCRIPT.len() as u32;
    let stopped = sampling(|s| (s.stop, s.min_new_tokens, s.max_new_tokens) = (vec!["of a".into()], Some(least), None));
    assert_eq!(text(&server, stopped).await, format!("{SCRIPT}Größe 🙂 "));
    let ended = sampling(|s| {
        (s.allowed_token_ids, s.logit_bias) = (vec![u32::from(b'x'), EOS], vec![bias(EOS, 1.0)]);
        s.min_new_tokens = Some(2);
    });
    assert_eq!(text(&server, ended).await, "xx");
}

#[tokio::test]
async fn penalties_bias_and_allowed_tokens_change_what_is_said() {
    let server = TestServer::start(Options::default()).await;
    let [a, b] = [u32::from(b'a'), u32::from(b'b')];
    let cases: [(GenerateRequest, &str); 6] = [
        (sampling(|s| s.logit_bias = vec![bias(a, 9.0)]), "aaaa"),
        (sampling(|s| s.logit_bias = vec![bias(a, 7.0)]), "Grö"),
        (sampling(|s| s.allowed_token_ids = vec![b, a]), "aaaa"),
        (sampling(|s| (s.allowed_token_ids, s.presence_penalty) = (vec![a, b], Some(1.0))), "abaa"),
        (sampling(|s| (s.allowed_token_ids, s.frequency_penalty) = (vec![a, b], Some(1.0))), "abab"),
        (sampling(|s| (s.allowed_token_ids, s.frequency_penalty) = (vec![b, a], Some(-1.0))), "aaaa"),
    ];
    for (request, expected) in cases {
        assert_eq!(text(&server, request.clone()).await, expected, "{request:?}");
    }
}

#[tokio::test]
async fn the_seed_decides_whatever_else_is_in_the_batch() {
    let server = TestServer::start(Options::default()).await;
    let seeded = |seed| {
        let tuned = |s: &mut SamplingParams| {
            (s.temperature, s.seed, s.max_new_tokens) = (Some(3.0), Some(seed), Some(40));
            (s.top_k, s.top_p, s.presence_penalty) = (Some(200), Some(0.99), Some(0.5));
        };
        sampling(tuned)
    };
    let alone = text(&server, seeded(5)).await;
    assert_ne!(alone, text(&server, seeded(6)).await);
    let (first, second, third, fourth) = tokio::join!(
        text(&server, seeded(7)),
        text(&server, seeded(5)),
        text(&server, sampling(|s| (s.temperature, s.max_new_tokens, s.top_k) = (Some(2.0), Some(50), Some(100)))),
        text(&server, seeded(5)),
    );
    assert_eq!((&second, &fourth), (&alone, &alone));
    assert!(first != alone && third != alone);
}

/// Texts and ends of the choices of a request, by index. Checks the stream on the way.
async fn choices(server: &TestServer, request: GenerateRequest) -> Vec<(String, Finish)> {
    let stream = soon(server.client().await.generate(request.clone())).await.unwrap().into_inner();
    let (messages, end) = collect(stream).await;
    assert!(end.is_none(), "{end:?}");
    let n = request.sampling.and_then(|s| s.n).unwrap_or(1);
    let of = |index| messages.iter().filter(move |m| m.index == index);
    let whole = |index| {
        let text: String = of(index).map(|m| m.text.as_str()).collect();
        let (last, others) = of(index).collect::<Vec<_>>().split_last().map(|(last, others)| (*last, others.len())).unwrap();
        assert_eq!(of(index).position(|m| m.finish.is_some()), Some(others), "the last message of choice {index} and no other");
        let finish = last.finish.clone().unwrap();
        assert_eq!(finish.usage.unwrap().generated_tokens as usize, of(index).map(|m| m.token_ids.len()).sum::<usize>());
        (text, finish)
    };
    assert!(messages.iter().all(|m| m.index < n));
    (0..n).map(whole).collect()
}

#[tokio::test]
async fn several_choices_share_a_stream() {
    // More choices than places in the batch, too.
    for max_batch_requests in [4, 2, 1] {
        let engine = EngineConfig { max_batch_requests, ..Options::default().engine };
        let server = TestServer::start(Options { engine, ..Options::default() }).await;
        let same = choices(&server, sampling(|s| (s.n, s.max_new_tokens) = (Some(3), Some(30)))).await;
        let said = String::from_utf8_lossy(&said(1, 30)).into_owned();
        for (text, finish) in &same {
            assert_eq!((text, finish.reason()), (&said, FinishReason::Length));
            assert_eq!(finish.usage.map(|u| (u.prompt_tokens, u.generated_tokens)), Some((1, 30)));
        }

        let seeded = |n, seed| {
            let tuned = |s: &mut SamplingParams| {
                (s.n, s.temperature, s.seed, s.max_new_tokens) = (Some(n), Some(3.0), Some(seed), Some(24));
                s.allowed_token_ids = (97..123).collect();
            };
            sampling(tuned)
        };
        let texts = |choices: Vec<(String, Finish)>| choices.into_iter().map(|(text, _)| text).collect::<Vec<_>>();
        let four = texts(choices(&server, seeded(4, 9)).await);
        assert!((0..4).all(|i| (0..i).all(|j| four[i] != four[j])), "{four:?}");
        let (two, again, _) = tokio::join!(choices(&server, seeded(2, 9)), choices(&server, seeded(4, 9)), choices(&server, seeded(3, 1)));
        assert_eq!(texts(two), four[..2]);
        assert_eq!(texts(again), four);
        assert_eq!(texts(choices(&server, seeded(1, 9)).await), four[..1]);
    }
}

#[tokio::test]
async fn each_choice_has_its_own_end() {
    let server = TestServer::start(Options::default()).await;
    let tuned = |s: &mut SamplingParams| {
        (s.n, s.temperature, s.seed) = (Some(4), Some(1.0), Some(3));
        (s.allowed_token_ids, s.stop, s.max_new_tokens) = (vec![97, 98, 99], vec!["ab".into()], Some(12));
        (s.stop_token_ids, s.logprobs, s.min_new_tokens) = (vec![99], Some(1), Some(1));
    };
    let ends = choices(&server, sampling(tuned)).await;
    for (text, finish) in &ends {
        assert!(!text.contains("ab") && !text.contains('c'), "{text}");
        match &finish.matched {
            Some(Matched::StopTokenId(id)) => assert_eq!(*id, 99),
            Some(Matched::StopString(stop)) => assert_eq!(stop, "ab"),
            None => assert_eq!((finish.reason(), text.len()), (FinishReason::Length, 12)),
        }
    }
    let lengths: std::collections::HashSet<usize> = ends.iter().map(|(text, _)| text.len()).collect();
    assert!(lengths.len() > 1, "{ends:?}");
}

#[tokio::test]
async fn a_deadline_ends_all_choices_that_go_on() {
    let server = TestServer::start(Options::endless()).await;
    let request = sampling(|s| (s.n, s.max_new_tokens) = (Some(3), Some(1 << 20)));
    let request = GenerateRequest { timeout_seconds: Some(0.2), ..request };
    let (messages, end) = collect(server.client().await.generate(request).await.unwrap().into_inner()).await;
    assert_eq!(end.unwrap().code(), Code::DeadlineExceeded);
    assert!((0..3).all(|index| messages.iter().any(|m| m.index == index)));
    server.metric_reaches("hardmax_requests_total", &[("method", "Generate"), ("code", "DEADLINE_EXCEEDED")], 1.0).await;
    assert_eq!(text(&server, generate("a", 2)).await, "Gr");
}

#[tokio::test]
async fn what_was_computed_before_is_told() {
    let server = TestServer::start(Options::default()).await;
    let long = generate(&"z".repeat(100), 3);
    let usages = [choices(&server, long.clone()).await, choices(&server, long).await].map(|choices| choices[0].1.usage.unwrap());
    assert_eq!(usages.map(|u| (u.prompt_tokens, u.generated_tokens)), [(100, 3); 2]);
    assert_eq!(usages[0].cached_prompt_tokens, 0);
    assert!((64..100).contains(&usages[1].cached_prompt_tokens), "{usages:?}");
}

#[tokio::test]
async fn a_queue_is_full_by_tokens_as_well() {
    let engine = EngineConfig { max_batch_requests: 1, max_queue_tokens: 10, ..Options::default().engine };
    let server = TestServer::start(Options { engine, gate_open: false, ..Options::default() }).await;
    let mut client = server.client().await;
    let running = client.generate(generate("a", 2)).await.unwrap();
    server.gate.step(1).await;
    let waiting = client.generate(generate("aaaaaa", 2)).await.unwrap();
    let status = client.generate(generate("aaaaaa", 2)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(retry_after(&status).is_some_and(|delay| !delay.is_zero()) && status.message().contains("10 prompt tokens"), "{status:?}");
    assert!(client.generate(generate("aaaa", 2)).await.is_ok());
    server.gate.open();
    for accepted in [running, waiting] {
        assert!(collect(accepted.into_inner()).await.1.is_none());
    }
}

#[tokio::test]
async fn any_priority_is_served() {
    let server = TestServer::start(Options::default()).await;
    for priority in [i32::MIN, -1, 0, 1, i32::MAX] {
        assert_eq!(text(&server, GenerateRequest { priority, ..generate("a", 2) }).await, "Gr");
        let score = ScoreRequest { input: Some(Input::Text("ab".into())), priority, ..Default::default() };
        assert!(soon(server.client().await.score(score)).await.is_ok());
    }
}

#[tokio::test]
async fn logprobs_come_with_their_tokens() {
    let server = TestServer::start(Options::default()).await;
    let mut client = server.client().await;
    let (messages, _) = collect(client.generate(sampling(|s| s.logprobs = Some(2))).await.unwrap().into_inner()).await;
    for message in &messages {
        assert_eq!(message.logprobs.len(), message.token_ids.len());
        for (token, id) in message.logprobs.iter().zip(&message.token_ids) {
            assert_eq!((token.token_id, token.alternatives.len()), (*id, 2));
            assert!((token.logprob.unwrap() - expected_logprob()).abs() < 1e-4);
        }
    }
}

/// Of the token that the model says: `log(e^8 / (e^8 + V - 1))`.
fn expected_logprob() -> f32 {
    let e8 = 8f64.exp();
    (e8 / (e8 + (VOCAB - 1) as f64)).ln() as f32
}

#[tokio::test]
async fn a_score_is_the_sum_of_its_tokens() {
    let server = TestServer::start(Options::default()).await;
    let mut client = server.client().await;
    // The first byte follows nothing; the model says the others.
    let text = format!("x{}", &SCRIPT[..2]);
    let request = ScoreRequest { input: Some(Input::Text(text)), alternatives: Some(1), ..Default::default() };
    let score = soon(client.score(request)).await.unwrap().into_inner();
    assert_eq!(score.tokens.len(), 3);
    assert_eq!(score.tokens[0].logprob, None);
    let sum: f64 = score.tokens.iter().filter_map(|t| t.logprob).map(f64::from).sum();
    assert!((score.logprob_sum - sum).abs() < 1e-9);
    assert!((score.logprob_sum - 2.0 * f64::from(expected_logprob())).abs() < 1e-4);
    assert!((score.perplexity - (-sum / 2.0).exp()).abs() < 1e-9);
    assert_eq!(score.tokens[1].alternatives[0].token_id, u32::from(SCRIPT.as_bytes()[0]));
    assert!(score.timing.is_some() && score.generation == 1);

    let single = ScoreRequest { input: Some(Input::TokenIds(TokenIds { ids: vec![7] })), ..Default::default() };
    let score = soon(client.score(single)).await.unwrap().into_inner();
    assert_eq!((score.tokens.len(), score.logprob_sum, score.perplexity), (1, 0.0, 1.0));
}

#[tokio::test]
async fn text_survives_tokens() {
    let server = TestServer::start(Options::default()).await;
    let mut client = server.client().await;
    let long = "Größe 🙂".repeat(20_000);
    for text in ["", "plain", "Größe 🙂", "nul \0 and \r\n and \u{feff}", "<eos> in the text", &long] {
        let request = TokenizeRequest { text: text.into(), ..Default::default() };
        let answer = soon(client.tokenize(request)).await.unwrap().into_inner();
        for token in answer.tokens.iter().take(100) {
            assert!(token.start < token.end && token.end as usize <= text.len(), "{token:?}");
        }
        let token_ids = answer.tokens.iter().map(|t| t.id).collect();
        let request = DetokenizeRequest { token_ids, skip_special_tokens: Some(false), ..Default::default() };
        let answer = soon(client.detokenize(request)).await.unwrap().into_inner();
        assert!(answer.text == text, "{} bytes became {}", text.len(), answer.text.len());
    }
    let request = DetokenizeRequest { token_ids: vec![u32::from(b'a'), EOS], ..Default::default() };
    assert_eq!(client.detokenize(request).await.unwrap().into_inner().text, "a");
    let request = TokenizeRequest { text: "é".into(), ..Default::default() };
    let token = &client.tokenize(request).await.unwrap().into_inner().tokens[0];
    assert_eq!((token.id, token.token.as_str()), (0xc3, "Ã"));
}

#[tokio::test]
async fn the_model_describes_itself() {
    let routing = "top-1:raw".parse().unwrap();
    let server = TestServer::start(Options { routing, ..Options::default() }).await;
    let mut client = server.client().await;
    let info = client.get_model_info(GetModelInfoRequest { model: MODEL.into() }).await.unwrap().into_inner();
    assert_eq!((info.model.as_str(), info.family.as_str(), info.device.as_str(), info.dtype.as_str()), (MODEL, "fake_moe", "cpu", "f32"));
    assert_eq!((info.vocab_size as usize, info.num_layers, info.generation), (VOCAB, 1, 1));
    assert_eq!(info.eos_token_ids, [EOS]);
    assert_eq!(info.trained_with, "gumbel_softmax");
    let raw = proto::WeightForm::Raw;
    let top_1 = RoutingPolicy { policy: Some(Policy::TopK(TopK { k: 1, weight_form: Some(raw.into()) })) };
    assert_eq!((info.moe_layers[0].num_experts, &info.moe_layers[0].serving_routing), (4, &Some(top_1)));
    assert_eq!(info.reference_routing, Some(RoutingPolicy { policy: Some(Policy::Soft(Soft { temperature: Some(0.5) })) }));
    // Three of four experts of 3 · D · F parameters rest.
    assert_eq!(info.parameters - info.active_parameters, 3 * 3 * 4 * 8);
    let limits = info.limits.unwrap();
    assert_eq!((limits.max_context_tokens, limits.max_batch_requests, limits.max_queue_requests), (256, 4, 8));
    assert_eq!((limits.max_queue_tokens, limits.cache_block_tokens), (1 << 20, 16));
    assert!(limits.cache_tokens >= 256);
    assert_eq!((limits.max_receive_message_bytes, limits.max_tokenize_bytes, limits.max_choices), (4 << 20, MAX_TOKENIZE as u64, 4));
    assert_eq!(info.server_version, env!("CARGO_PKG_VERSION"));
}

#[tokio::test]
async fn requests_have_an_id() {
    let server = TestServer::start(Options::default()).await;
    let mut client = server.client().await;

    let response = client.generate(GenerateRequest { request_id: "from-field".into(), ..generate("a", 2) }).await.unwrap();
    assert_eq!(response.metadata().get("x-request-id").unwrap(), "from-field");
    let (messages, _) = collect(response.into_inner()).await;
    assert!(messages.iter().all(|m| m.request_id == "from-field"));

    let mut request = Request::new(ScoreRequest { input: Some(Input::Text("ab".into())), ..Default::default() });
    request.metadata_mut().insert("x-request-id", "from-metadata".parse().unwrap());
    let response = client.score(request).await.unwrap();
    assert_eq!(response.metadata().get("x-request-id").unwrap(), "from-metadata");
    assert_eq!(response.get_ref().request_id, "from-metadata");

    let response = client.generate(generate("a", 1)).await.unwrap();
    let made = response.metadata().get("x-request-id").unwrap().to_str().unwrap().to_owned();
    assert_eq!(made.len(), 16);

    let refused = client.generate(GenerateRequest { request_id: "mine".into(), ..generate("", 1) }).await.unwrap_err();
    assert_eq!(refused.metadata().get("x-request-id").unwrap(), "mine");

    for bad in ["a b", "é", "\n", &"x".repeat(129)] {
        let status = client.generate(GenerateRequest { request_id: bad.into(), ..generate("a", 1) }).await.unwrap_err();
        assert_eq!((status.code(), field(&status).as_str()), (Code::InvalidArgument, "request_id"));
    }
}

#[tokio::test]
async fn bad_arguments_name_their_field() {
    let server = TestServer::start(Options::default()).await;
    let mut client = server.client().await;
    let cases = [
        (GenerateRequest { prompt: None, ..generate("", 1) }, "prompt"),
        (generate("", 1), "prompt"),
        (tokens(vec![1, VOCAB as u32]), "token_ids[1]"),
        (tokens(vec![u32::MAX]), "token_ids[0]"),
        (sampling(|s| s.max_new_tokens = Some(0)), "sampling.max_new_tokens"),
        (sampling(|s| s.temperature = Some(-1.0)), "sampling.temperature"),
        (sampling(|s| s.temperature = Some(f32::NAN)), "sampling.temperature"),
        (sampling(|s| s.top_p = Some(0.0)), "sampling.top_p"),
        (sampling(|s| s.top_p = Some(1.5)), "sampling.top_p"),
        (sampling(|s| s.min_p = Some(1.0)), "sampling.min_p"),
        (sampling(|s| s.repetition_penalty = Some(0.0)), "sampling.repetition_penalty"),
        (sampling(|s| s.repetition_penalty = Some(f32::INFINITY)), "sampling.repetition_penalty"),
        (sampling(|s| s.n = Some(0)), "sampling.n"),
        (sampling(|s| s.min_new_tokens = Some(5)), "sampling.min_new_tokens"),
        (sampling(|s| s.presence_penalty = Some(f32::NAN)), "sampling.presence_penalty"),
        (sampling(|s| s.presence_penalty = Some(2.5)), "sampling.presence_penalty"),
        (sampling(|s| s.frequency_penalty = Some(f32::NEG_INFINITY)), "sampling.frequency_penalty"),
        (sampling(|s| s.frequency_penalty = Some(-2.5)), "sampling.frequency_penalty"),
        (sampling(|s| s.logit_bias = vec![bias(7, 1.0), bias(8, f32::NAN)]), "sampling.logit_bias[1].bias"),
        (sampling(|s| s.logit_bias = vec![bias(7, 101.0)]), "sampling.logit_bias[0].bias"),
        (sampling(|s| s.logit_bias = vec![bias(VOCAB as u32, 1.0)]), "sampling.logit_bias[0].token_id"),
        (sampling(|s| s.logit_bias = vec![bias(7, 1.0), bias(7, 1.0)]), "sampling.logit_bias[1].token_id"),
        (sampling(|s| s.logit_bias = vec![bias(7, 1.0); 2000]), "sampling.logit_bias"),
        (sampling(|s| s.allowed_token_ids = vec![1, VOCAB as u32]), "sampling.allowed_token_ids[1]"),
        (sampling(|s| s.allowed_token_ids = vec![1, 2, 1]), "sampling.allowed_token_ids[2]"),
        (sampling(|s| (s.allowed_token_ids, s.min_new_tokens) = (vec![EOS], Some(1))), "sampling.allowed_token_ids"),
        (sampling(|s| s.stop_token_ids = vec![1; 2000]), "sampling.stop_token_ids"),
        (GenerateRequest { timeout_seconds: Some(0.0), ..generate("a", 1) }, "timeout_seconds"),
        (GenerateRequest { timeout_seconds: Some(-1.0), ..generate("a", 1) }, "timeout_seconds"),
        (GenerateRequest { timeout_seconds: Some(f64::NAN), ..generate("a", 1) }, "timeout_seconds"),
        (GenerateRequest { timeout_seconds: Some(f64::INFINITY), ..generate("a", 1) }, "timeout_seconds"),
        (sampling(|s| s.logprobs = Some(21)), "sampling.logprobs"),
        (sampling(|s| s.stop = vec![String::new()]), "sampling.stop[0]"),
        (sampling(|s| s.stop_token_ids = vec![u32::MAX]), "sampling.stop_token_ids[0]"),
        (routed(None), "routing.policy"),
        (routed(Some(Policy::TopK(TopK { k: 0, weight_form: None }))), "routing.top_k.k"),
        (routed(Some(Policy::TopK(TopK { k: 5, weight_form: None }))), "routing.top_k.k"),
        (routed(Some(Policy::TopK(TopK { k: 1, weight_form: Some(99) }))), "routing.top_k.weight_form"),
        (routed(Some(Policy::Soft(Soft { temperature: Some(0.0) }))), "routing.soft.temperature"),
    ];
    for (request, expected) in cases {
        let status = soon(client.generate(request.clone())).await.expect_err(&format!("{request:?}"));
        assert_eq!((status.code(), field(&status).as_str()), (Code::InvalidArgument, expected), "{status:?}");
    }
    let no_input = soon(client.score(ScoreRequest::default())).await.unwrap_err();
    assert_eq!((no_input.code(), field(&no_input).as_str()), (Code::InvalidArgument, "input"));
    let request = ScoreRequest { input: Some(Input::Text("ab".into())), alternatives: Some(21), ..Default::default() };
    assert_eq!(field(&soon(client.score(request)).await.unwrap_err()), "alternatives");
    let request = ScoreRequest { input: Some(Input::Text("ab".into())), timeout_seconds: Some(f64::NAN), ..Default::default() };
    assert_eq!(field(&soon(client.score(request)).await.unwrap_err()), "timeout_seconds");
    let status = client.detokenize(DetokenizeRequest { token_ids: vec![0, 257], ..Default::default() }).await.unwrap_err();
    assert_eq!((status.code(), field(&status).as_str()), (Code::InvalidArgument, "token_ids[1]"));
}

#[tokio::test]
async fn every_routing_of_the_protocol_is_served() {
    let server = TestServer::start(Options::default()).await;
    let mut client = server.client().await;
    let policies = [
        Policy::Native(Native {}),
        Policy::TopK(TopK { k: 1, weight_form: None }),
        Policy::TopK(TopK { k: 4, weight_form: Some(3) }),
        Policy::Soft(Soft { temperature: None }),
        Policy::Soft(Soft { temperature: Some(2.0) }),
    ];
    for policy in policies {
        let (messages, end) = collect(client.generate(routed(Some(policy))).await.unwrap().into_inner()).await;
        assert!(end.is_none() && messages.last().unwrap().finish.is_some());
    }
}

#[tokio::test]
async fn another_model_is_not_found() {
    let server = TestServer::start(Options::default()).await;
    let mut client = server.client().await;
    let model = || "other".to_owned();
    let statuses = [
        client.generate(GenerateRequest { model: model(), ..generate("a", 1) }).await.unwrap_err(),
        client.score(ScoreRequest { model: model(), ..Default::default() }).await.unwrap_err(),
        client.tokenize(TokenizeRequest { model: model(), ..Default::default() }).await.unwrap_err(),
        client.detokenize(DetokenizeRequest { model: model(), ..Default::default() }).await.unwrap_err(),
        client.get_model_info(GetModelInfoRequest { model: model() }).await.unwrap_err(),
    ];
    for status in statuses {
        assert_eq!(status.code(), Code::NotFound);
        assert!(status.message().contains(MODEL), "{}", status.message());
    }
    collect(client.generate(GenerateRequest { model: MODEL.into(), ..generate("a", 1) }).await.unwrap().into_inner()).await;
}

#[tokio::test]
async fn what_is_too_long_is_out_of_range() {
    let server = TestServer::start(Options { max_receive_bytes: 1024, ..Options::default() }).await;
    let mut client = server.client().await;
    let status = client.generate(generate(&"a".repeat(256), 1)).await.unwrap_err();
    assert_eq!((status.code(), field(&status).as_str()), (Code::OutOfRange, "prompt"));
    let status = client.generate(generate("a", u32::MAX)).await.unwrap_err();
    assert_eq!((status.code(), field(&status).as_str()), (Code::OutOfRange, "sampling.max_new_tokens"));
    let status = client.generate(sampling(|s| s.n = Some(u32::MAX))).await.unwrap_err();
    assert_eq!((status.code(), field(&status).as_str()), (Code::OutOfRange, "sampling.n"));
    let status = client.generate(sampling(|s| (s.min_new_tokens, s.max_new_tokens) = (Some(256), None))).await.unwrap_err();
    assert_eq!((status.code(), field(&status).as_str()), (Code::OutOfRange, "sampling.min_new_tokens"));
    let status = client.generate(generate(&"a".repeat(2000), 1)).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "a message above the limit: {status:?}");
    assert!(status.message().contains("1024"), "{}", status.message());
}

#[tokio::test]
async fn the_length_of_a_huge_text_is_known_from_its_beginning() {
    let server = TestServer::start(Options::default()).await;
    let mut client = server.client().await;
    let text = "é".repeat(1_900_000);
    let status = soon(client.generate(generate(&text, 1))).await.unwrap_err();
    assert_eq!((status.code(), field(&status).as_str()), (Code::OutOfRange, "prompt"));
    assert_eq!(status.message(), "prompt: more than the 256 tokens of the model's context");
    let status = soon(client.score(ScoreRequest { input: Some(Input::Text(text)), ..Default::default() })).await.unwrap_err();
    assert_eq!((status.code(), field(&status).as_str()), (Code::OutOfRange, "input"));
    server.metric_reaches("hardmax_admission_rejections_total", &[("reason", "too_long")], 2.0).await;
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let engine = EngineConfig { max_batch_requests: 1, max_queue_requests: 1, ..Options::default().engine };
    let server = TestServer::start(Options { engine, gate_open: false, ..Options::default() }).await;
    let mut client = server.client().await;
    let running = client.generate(generate("a", 4)).await.unwrap();
    let waiting = client.generate(generate("a", 4)).await.unwrap();
    let status = client.generate(generate("a", 4)).await.unwrap_err();
    assert_eq!((status.code(), retry_after(&status)), (Code::ResourceExhausted, Some(Duration::from_secs(1))));
    assert_eq!(status.metadata().get("grpc-retry-pushback-ms").unwrap(), "1000");
    server.gate.open();
    for accepted in [running, waiting] {
        let (messages, end) = collect(accepted.into_inner()).await;
        assert!(end.is_none() && messages.last().unwrap().finish.is_some());
    }
    assert!(client.generate(generate("a", 4)).await.is_ok());
}

#[tokio::test]
async fn a_deadline_before_the_answer() {
    let server = TestServer::start(Options { gate_open: false, ..Options::default() }).await;
    let score = ScoreRequest { input: Some(Input::Text("ab".into())), ..Default::default() };
    // Zero, below the resolution of timers, and several that make tonic's own timer race.
    for timeout in ["0n", "500u", "1m", "2m", "3m", "5m", "8m", "13m", "21m", "40m"] {
        let answer = RawCall::new("Score", &score).header("grpc-timeout", timeout).send(&server).await;
        assert_eq!(answer.code(), Some(Code::DeadlineExceeded), "{timeout}: {answer:?}");
    }
    for timeout in ["", "5", "x", "123456789S"] {
        let answer = RawCall::new("Score", &score).header("grpc-timeout", timeout).send(&server).await;
        assert_eq!(answer.code(), Some(Code::InvalidArgument), "{timeout:?}");
    }
    server.gate.open();
    let answer = RawCall::new("Score", &score).header("grpc-timeout", "99999999H").send(&server).await;
    assert_eq!(answer.code(), Some(Code::Ok), "{answer:?}");
    server.metric_reaches("hardmax_requests_total", &[("method", "Score"), ("code", "DEADLINE_EXCEEDED")], 10.0).await;
    server.metric_reaches("hardmax_request_finished_total", &[("reason", "length")], 1.0).await;
    assert_eq!(server.metric("hardmax_request_finished_total", &[("reason", "cancelled")]).await, Some(0.0));
}

#[tokio::test]
async fn a_deadline_in_mid_stream() {
    let server = TestServer::start(Options::endless()).await;
    let mut client = server.client().await;
    let mut request = Request::new(generate("a", 1 << 20));
    request.set_timeout(Duration::from_millis(150));
    let (messages, end) = collect(client.generate(request).await.unwrap().into_inner()).await;
    assert_eq!(end.unwrap().code(), Code::DeadlineExceeded);
    assert!(!messages.is_empty() && messages.iter().all(|m| m.finish.is_none()));
    server.metric_reaches("hardmax_request_finished_total", &[("reason", "deadline")], 1.0).await;
}

#[tokio::test]
async fn a_timeout_in_the_message_is_a_deadline() {
    let server = TestServer::start(Options::endless()).await;
    let mut client = server.client().await;
    let hurried = |seconds| GenerateRequest { timeout_seconds: Some(seconds), ..generate("a", 1 << 20) };
    let (messages, end) = collect(client.generate(hurried(0.15)).await.unwrap().into_inner()).await;
    assert_eq!(end.unwrap().code(), Code::DeadlineExceeded);
    assert!(!messages.is_empty() && messages.iter().all(|m| m.finish.is_none()));

    // The earlier one counts, whichever it is.
    let mut request = Request::new(hurried(1e6));
    request.set_timeout(Duration::from_millis(100));
    let (_, end) = collect(client.generate(request).await.unwrap().into_inner()).await;
    assert_eq!(end.unwrap().code(), Code::DeadlineExceeded);
    let mut request = Request::new(hurried(0.1));
    request.set_timeout(Duration::from_secs(1000));
    let (_, end) = collect(client.generate(request).await.unwrap().into_inner()).await;
    assert_eq!(end.unwrap().code(), Code::DeadlineExceeded);
    server.metric_reaches("hardmax_request_finished_total", &[("reason", "deadline")], 3.0).await;

    let patient = GenerateRequest { timeout_seconds: Some(1e300), ..generate("a", 2) };
    let (messages, end) = collect(client.generate(patient).await.unwrap().into_inner()).await;
    assert!(end.is_none() && messages.last().unwrap().finish.is_some());
}

#[tokio::test]
async fn a_timeout_in_the_message_ends_a_score_in_the_middle_of_a_step() {
    let server = TestServer::start(Options { gate_open: false, ..Options::default() }).await;
    let score = ScoreRequest { input: Some(Input::Text("ab".into())), timeout_seconds: Some(0.05), ..Default::default() };
    assert_eq!(soon(server.client().await.score(score)).await.unwrap_err().code(), Code::DeadlineExceeded);
}

#[tokio::test]
async fn a_long_text_is_tokenised_in_parts() {
    let server = TestServer::start(Options::default()).await;
    let mut client = server.client().await;
    let request = |bytes| TokenizeRequest { text: "a".repeat(bytes), ..Default::default() };
    assert_eq!(soon(client.tokenize(request(MAX_TOKENIZE))).await.unwrap().into_inner().tokens.len(), MAX_TOKENIZE);
    let status = soon(client.tokenize(request(MAX_TOKENIZE + 1))).await.unwrap_err();
    assert_eq!((status.code(), field(&status).as_str()), (Code::OutOfRange, "text"));
    let request = |count| DetokenizeRequest { token_ids: vec![97; count], ..Default::default() };
    assert_eq!(soon(client.detokenize(request(MAX_TOKENIZE))).await.unwrap().into_inner().text.len(), MAX_TOKENIZE);
    let status = soon(client.detokenize(request(MAX_TOKENIZE + 1))).await.unwrap_err();
    assert_eq!((status.code(), field(&status).as_str()), (Code::OutOfRange, "token_ids"));
}

#[tokio::test]
async fn what_the_server_cannot_read_is_counted_as_that() {
    let server = TestServer::start(Options::default()).await;
    let answer = RawCall::new("Score", &ScoreRequest::default()).header("grpc-encoding", "br").send(&server).await;
    assert_eq!(answer.code(), Some(Code::Unimplemented), "{answer:?}");
    server.metric_reaches("hardmax_requests_total", &[("method", "Score"), ("code", "UNIMPLEMENTED")], 1.0).await;
}

#[tokio::test]
async fn a_failed_request_fails_alone() {
    let server = TestServer::start(Options::default()).await;
    let mut client = server.client().await;
    for culprit in [POISON, PANIC] {
        let (_, end) = collect(client.generate(tokens(vec![1, culprit])).await.unwrap().into_inner()).await;
        assert_eq!(end.unwrap().code(), Code::Internal);
        let (messages, end) = collect(client.generate(generate("a", 4)).await.unwrap().into_inner()).await;
        assert!(end.is_none() && messages.last().unwrap().finish.is_some());
    }
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_slot() {
    let engine = EngineConfig { max_batch_requests: 1, ..Options::default().engine };
    let server = TestServer::start(Options { engine, ..Options::endless() }).await;
    let mut client = server.client().await;
    let finishes = async |mut other: proto::inference_client::InferenceClient<_>| {
        let (messages, end) = collect(soon(other.generate(generate("a", 4))).await.unwrap().into_inner()).await;
        end.is_none() && messages.last().unwrap().finish.is_some()
    };

    // The stream is dropped: one reset on a connection that lives.
    let mut stream = client.generate(generate("a", 1 << 20)).await.unwrap().into_inner();
    soon(stream.message()).await.unwrap();
    drop(stream);
    assert!(finishes(client.clone()).await);

    // The connection is dropped.
    let mut other = server.client().await;
    let mut stream = other.generate(generate("a", 1 << 20)).await.unwrap().into_inner();
    soon(stream.message()).await.unwrap();
    drop((stream, other));
    assert!(finishes(client.clone()).await);

    // A unary call is given up.
    let endless = ScoreRequest { input: Some(Input::Text("a".repeat(1 << 20))), ..Default::default() };
    let mut other = server.client().await;
    let mut score = Box::pin(other.score(endless));
    tokio::select! {
        answer = &mut score => panic!("{answer:?}"),
        () = server.metric_reaches("hardmax_requests_running", &[], 1.0) => {}
    }
    drop(score);
    assert!(finishes(client.clone()).await);

    server.metric_reaches("hardmax_request_finished_total", &[("reason", "cancelled")], 3.0).await;
    server.metric_reaches("hardmax_requests_total", &[("method", "Generate"), ("code", "CANCELLED")], 2.0).await;
    server.metric_reaches("hardmax_requests_total", &[("method", "Score"), ("code", "CANCELLED")], 1.0).await;
}

#[tokio::test]
async fn compressed_requests_are_read_within_the_limit() {
    let server = TestServer::start(Options { max_receive_bytes: 4096, ..Options::default() }).await;
    let mut client = server.client().await.send_compressed(tonic::codec::CompressionEncoding::Gzip);
    let request = TokenizeRequest { text: "a".repeat(2000), ..Default::default() };
    assert_eq!(client.tokenize(request).await.unwrap().into_inner().tokens.len(), 2000);
    let bomb = TokenizeRequest { text: "a".repeat(1 << 20), ..Default::default() };
    let code = client.tokenize(bomb).await.unwrap_err().code();
    assert!(matches!(code, Code::OutOfRange | Code::ResourceExhausted), "{code:?}");
}
