//! A model that draws tokens itself: who lets it, who asks for rows, and that nobody can tell the difference.

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::{
    cache::{nothing_is_left, sums},
    *,
};
use crate::model::{Drawn, RowChoice, TokenDraw, draw};

/// In few blocks and small steps; with how many sequences lose their place and go on.
async fn crowded<T>(requests: &[Request], collect: impl AsyncFn(EventStream, &Request) -> T) -> (Vec<T>, f64) {
    let metrics = metrics();
    let config = EngineConfig { max_step_tokens: 7, max_queue_requests: 1000, ..fake::config() };
    let engine = start_with(FakeModel::new(noise).with_cache(4, 12).drawing(), config, metrics.clone());
    let streams: Vec<EventStream> = requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
    let mut answers = Vec::new();
    for (stream, request) in streams.into_iter().zip(requests) {
        answers.push(collect(stream, request).await);
    }
    nothing_is_left(&engine, &metrics).await;
    (answers, series(&metrics, "hardmax_preemptions_total"))
}

fn choices(request: &Request) -> usize {
    if let Task::Generate(params) = &request.task { params.n } else { 1 }
}

/// Of everything that can be asked for, greedy, twice each.
fn greedy_requests() -> Vec<Request> {
    let kinds: [fn(&mut GenerateParams); 9] = [
        |_| (),
        |p| p.n = 3,
        |p| p.stop = vec!["a".into(), "Q".into(), "7".into()],
        |p| (p.min_new_tokens, p.stop_token_ids) = (4, (0..200).collect()),
        |p| p.logprobs = Some(2),
        |p| p.repetition_penalty = 1.3,
        |p| (p.presence_penalty, p.frequency_penalty) = (0.4, 0.2),
        |p| p.logit_bias = vec![(3, 2.0), (90, -3.0)],
        |p| p.allowed_token_ids = vec![1, 5, 9, 200],
    ];
    let request = |n: u32| {
        let prompt: Vec<u32> = (0..2 + n).map(|i| i * 5 + n).collect();
        let mut request = generate(&prompt, |p| {
            (p.max_new_tokens, p.ignore_eos) = (Some(12), true);
            kinds[n as usize % kinds.len()](p);
        });
        request.trace = n % 4 == 3;
        request
    };
    (0..18).map(request).collect()
}

#[tokio::test]
async fn greedy_answers_are_those_of_a_model_that_hands_out_rows() {
    let requests = greedy_requests();
    let engine = start(FakeModel::new(noise), fake::config());
    let (drawn, preempted) = crowded(&requests, async |stream, request| collect_choices(stream, choices(request)).await).await;
    for (request, drawn) in requests.into_iter().zip(drawn) {
        let n = choices(&request);
        let rows = collect_choices(engine.submit(request.clone()).unwrap(), n).await;
        for (rows, drawn) in rows.iter().zip(&drawn) {
            assert_eq!((&rows.ids, &rows.text, &rows.logprobs), (&drawn.ids, &drawn.text, &drawn.logprobs), "{request:?}");
            assert_eq!((&rows.finished().reason, &rows.trace), (&drawn.finished().reason, &drawn.trace), "{request:?}");
        }
    }
    assert!(preempted > 3.0, "{preempted} preempted");
}

fn sampled(prompt: &[u32], seed: u64, change: impl FnOnce(&mut GenerateParams)) -> Request {
    generate(prompt, |p| {
        (p.temperature, p.seed, p.max_new_tokens, p.ignore_eos) = (0.9, seed, Some(15), true);
        change(p);
    })
}

/// What each choice says by definition, where all of its tokens are drawn by the model.
fn by_definition(request: &Request) -> Vec<Vec<u32>> {
    let Task::Generate(params) = &request.task else { unreachable!() };
    let &GenerateParams { n, temperature, top_k, top_p, min_p, .. } = params;
    let choice = |choice| {
        let (mut numbers, mut history) = (StdRng::seed_from_u64(params.seed_of(choice)), request.prompt.clone());
        for _ in 0..params.max_new_tokens.unwrap() {
            let draw = TokenDraw { temperature, min_p, top_k: top_k as u32, top_p, uniform: numbers.random() };
            match draw::reference(&noise(&history), &draw) {
                Drawn::Token(token) => history.push(token),
                other => panic!("{other:?}"),
            }
        }
        history.split_off(request.prompt.len())
    };
    (0..n).map(choice).collect()
}

#[tokio::test]
async fn each_token_has_one_number_of_its_sequence() {
    let filters: [fn(&mut GenerateParams); 6] = [
        |_| (),
        |p| p.top_k = 20,
        |p| p.top_p = 0.8,
        |p| p.min_p = 0.2,
        |p| (p.top_k, p.top_p, p.min_p) = (60, 0.9, 0.05),
        |p| (p.temperature, p.top_p) = (3.0, 0.99),
    ];
    let requests: Vec<Request> = (0..24u32)
        .map(|n| {
            let prompt: Vec<u32> = (0..1 + n % 7).map(|i| i * 3 + n).collect();
            sampled(&prompt, n.into(), |p| {
                filters[n as usize % 6](p);
                p.n = 1 + n as usize % 5 / 3;
                // Their rows come to the sampler, which draws alike.
                p.logprobs = (n % 5 == 2).then_some(1);
            })
        })
        .collect();
    let (answers, preempted) = crowded(&requests, async |stream, request| collect_choices(stream, choices(request)).await).await;
    for (request, answers) in requests.iter().zip(answers) {
        let ids: Vec<Vec<u32>> = answers.into_iter().map(|answer| answer.ids).collect();
        assert_eq!(ids, by_definition(request), "{request:?}");
    }
    assert!(preempted > 3.0, "{preempted} preempted");
}

#[tokio::test]
async fn a_seed_gives_the_same_text_under_penalties_too() {
    let requests: Vec<Request> = (0..8)
        .map(|seed| {
            sampled(&[4, 9], seed, |p| match seed % 4 {
                0 => p.repetition_penalty = 1.2,
                1 => (p.min_new_tokens, p.stop_token_ids) = (6, (0..40).collect()),
                2 => p.logit_bias = vec![(7, 3.0)],
                _ => p.allowed_token_ids = (0..99).collect(),
            })
        })
        .collect();
    let (together, _) = crowded(&requests, async |stream, _| collect(stream).await.ids).await;
    let engine = start(FakeModel::new(noise).drawing(), fake::config());
    for (request, together) in requests.into_iter().zip(together) {
        assert_eq!(ask(&engine, request).await.ids, together);
    }
}

#[tokio::test]
async fn tokens_come_as_often_whoever_draws_them() {
    const LIKELY: [(u32, f32); 4] = [(3, 6.0), (70, 7.0), (71, 6.5), (259, 5.0)];
    let mut row = vec![0.0; VOCAB];
    LIKELY.iter().for_each(|&(token, logit)| row[token as usize] = logit);
    let weights: Vec<f64> = row.iter().map(|&logit| (f64::from(logit) / 0.9).exp()).collect();
    let total: f64 = weights.iter().sum();
    let model = || {
        FakeModel::new({
            let row = row.clone();
            move |_| row.clone()
        })
    };
    for model in [model(), model().drawing()] {
        let engine = start(model, fake::config());
        let (mut counts, mut draws) = (vec![0usize; VOCAB], 0);
        for seed in 0..25 {
            let request = sampled(&[1], seed, |p| (p.n, p.max_new_tokens) = (8, Some(30)));
            for answer in collect_choices(engine.submit(request).unwrap(), 8).await {
                answer.ids.iter().for_each(|&token| counts[token as usize] += 1);
                draws += answer.ids.len();
            }
        }
        for (token, _) in LIKELY {
            let (expected, found) = (draws as f64 * weights[token as usize] / total, counts[token as usize] as f64);
            assert!((found - expected).abs() < 5.0 * expected.sqrt(), "token {token}: {found} of {draws} instead of {expected}");
        }
    }
}

/// What a step asks of each of its rows: a token or not.
fn asked(batch: &Batch) -> Vec<bool> {
    batch.choices.iter().map(|choice| matches!(choice, RowChoice::Token(_))).collect()
}

#[tokio::test]
async fn a_step_asks_row_by_row() {
    let (model, control) = FakeModel::sum().drawing().gated();
    let engine = start(model, fake::config());
    let first = engine.submit(tokens(&[1], 3)).unwrap();
    let batch = control.step();
    assert_eq!(batch.choices, [RowChoice::Token(TokenDraw::LIKELIEST)]);
    assert!(!batch.routes);
    let logprobs = engine.submit(generate(&[2], |p| (p.logprobs, p.max_new_tokens) = (Some(0), Some(2)))).unwrap();
    let score = engine.submit(Request { task: Task::Score { alternatives: 0 }, ..fake::request(&[5; 3]) }).unwrap();
    let traced = engine.submit(Request { trace: true, ..tokens(&[3, 3], 2) }).unwrap();
    let early = generate(&[4], |p| (p.min_new_tokens, p.max_new_tokens) = (1, Some(2)));
    let early = engine.submit(early).unwrap();
    control.decide(Verdict::Go);
    let batch = control.go();
    assert_eq!(asked(&batch), [true, false, false, false, false, false, true], "one, one, not yet; of longer ones all of a score, one");
    assert!(batch.routes);
    let batch = control.go();
    assert_eq!(asked(&batch), [true, false, true, true]);
    assert_eq!(collect(first).await.ids, sums(&[1], 3));
    assert_eq!(collect(logprobs).await.logprobs.len(), 2);
    assert_eq!(collect(score).await.finished().prompt_logprobs.len(), 3);
    assert_eq!(collect(traced).await.trace.unwrap().num_tokens(), 3);
    assert_eq!(collect(early).await.ids, sums(&[4], 2));
}

#[tokio::test]
async fn a_row_that_is_not_finite_fails_alone() {
    let metrics = metrics();
    let model = FakeModel::new(|history| if history.contains(&200) { vec![f32::NAN; VOCAB] } else { noise(history) });
    let engine = start_with(model.drawing(), fake::config(), metrics.clone());
    let well = engine.submit(sampled(&[1], 3, |_| ())).unwrap();
    let greedy = ask(&engine, tokens(&[200], 3)).await;
    let random = ask(&engine, sampled(&[200, 1], 1, |p| p.n = 2)).await;
    let score = ask(&engine, Request { task: Task::Score { alternatives: 0 }, ..fake::request(&[1, 200, 1]) }).await;
    for bad in [greedy, random, score] {
        assert!(matches!(bad.end, Err(Error::NonFinite)), "{bad:?}");
    }
    assert_eq!(collect(well).await.ids.len(), 15);
    nothing_is_left(&engine, &metrics).await;
}

/// The answers of a greedy request, one with log-probabilities and a score to what `answer` says of their four rows.
async fn answered(answer: Vec<Drawn>) -> [Answer; 3] {
    let metrics = metrics();
    let (model, control) = FakeModel::sum().drawing().gated();
    let engine = start_with(model, fake::config(), metrics.clone());
    let first = engine.submit(tokens(&[9], 1)).unwrap();
    control.step();
    let plain = engine.submit(tokens(&[1], 2)).unwrap();
    let logprobs = engine.submit(generate(&[2], |p| (p.logprobs, p.max_new_tokens) = (Some(0), Some(1)))).unwrap();
    let score = engine.submit(Request { task: Task::Score { alternatives: 0 }, ..fake::request(&[3; 2]) }).unwrap();
    control.decide(Verdict::Go);
    assert_eq!(asked(&control.step()), [true, false, false, false]);
    control.decide(Verdict::Answer(answer));
    drop(control);
    let answers = [collect(plain).await, collect(logprobs).await, collect(score).await];
    assert_eq!(collect(first).await.ids, [9]);
    nothing_is_left(&engine, &metrics).await;
    answers
}

#[tokio::test]
async fn answers_that_were_not_asked_for() {
    const ROW: Drawn = Drawn::Row;
    let refused = |answer: &Answer, part: &str| match &answer.end {
        Err(Error::Internal(message)) => assert!(message.contains(part), "{message}"),
        other => panic!("{other:?}"),
    };
    let [plain, logprobs, score] = answered(vec![Drawn::Token(77), ROW, ROW, ROW]).await;
    assert_eq!((plain.ids, logprobs.ids), (vec![77, 78], vec![0]));
    score.finished();
    for stray in [VOCAB as u32, u32::MAX] {
        let [plain, logprobs, score] = answered(vec![Drawn::Token(stray), ROW, ROW, ROW]).await;
        refused(&plain, &format!("token {stray} of a vocabulary of 260"));
        assert!(logprobs.end.is_ok() && score.end.is_ok());
    }
    let [plain, logprobs, score] = answered(vec![ROW, Drawn::Token(1), Drawn::Token(2), ROW]).await;
    assert_eq!(plain.ids, [0, 1], "a row is as good as a token");
    refused(&logprobs, "its row was asked for");
    refused(&score, "Token(2)");
    let [plain, logprobs, score] = answered(vec![Drawn::NonFinite, ROW, ROW, Drawn::NonFinite]).await;
    assert!(matches!((&plain.end, &score.end), (Err(Error::NonFinite), Err(Error::NonFinite))) && logprobs.end.is_ok());
    for answer in answered(vec![Drawn::Token(1); 3]).await {
        refused(&answer, "3 rows of logits answered instead of 4");
    }
}
