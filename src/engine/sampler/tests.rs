//! The order of operations, each of them, and their extremes.

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::*;
use crate::model::Drawn;

const ROW: [f32; 6] = [0.5, 3.0, -1.0, 3.0, 2.0, 0.0];

fn draws(params: &GenerateParams, row: &[f32], n: usize) -> Vec<u32> {
    let mut sampler = self::sampler(params, &[]);
    (0..n).map(|_| sampler.sample(row).unwrap()).collect()
}

/// A sampler at the end of `prompt`, where token 5 ends a text.
fn sampler(params: &GenerateParams, prompt: &[u32]) -> Sampler {
    Sampler::new(params, prompt, 0, &HashSet::from([5]), Drawer::Sampler)
}

fn hot() -> GenerateParams {
    GenerateParams { temperature: 1.0, seed: 7, ..GenerateParams::default() }
}

#[test]
fn greedy_takes_the_lowest_of_equals() {
    assert_eq!(draws(&GenerateParams::default(), &ROW, 3), [1, 1, 1]);
    assert_eq!(draws(&GenerateParams { top_k: 1, ..hot() }, &ROW, 3), [1, 1, 1]);
}

#[test]
fn the_seed_decides() {
    assert_eq!(draws(&hot(), &ROW, 50), draws(&hot(), &ROW, 50));
    assert_ne!(draws(&hot(), &ROW, 50), draws(&GenerateParams { seed: 8, ..hot() }, &ROW, 50));
}

fn support(params: GenerateParams) -> Vec<u32> {
    let mut tokens = draws(&params, &ROW, 2000);
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

#[test]
fn filters_keep_what_they_should() {
    assert_eq!(support(hot()), [0, 1, 2, 3, 4, 5]);
    assert_eq!(support(GenerateParams { top_k: 2, ..hot() }), [1, 3]);
    assert_eq!(support(GenerateParams { top_k: 3, ..hot() }), [1, 3, 4]);
    assert_eq!(support(GenerateParams { top_k: 99, ..hot() }), [0, 1, 2, 3, 4, 5]);
    assert_eq!(support(GenerateParams { top_p: 0.5, ..hot() }), [1, 3]);
    assert_eq!(support(GenerateParams { top_p: 1e-9, ..hot() }), [1]);
    assert_eq!(support(GenerateParams { min_p: 0.3, ..hot() }), [1, 3, 4]);
    assert_eq!(support(GenerateParams { min_p: 0.999, ..hot() }), [1, 3]);
    assert_eq!(support(GenerateParams { top_k: 3, top_p: 0.99, min_p: 0.5, ..hot() }), [1, 3]);
}

#[test]
fn top_p_is_a_share_of_what_top_k_left() {
    let row = [2.0, 2.0, 1.9, 1.9, 1.9, 1.9, 1.9, 1.9];
    let mut tokens = draws(&GenerateParams { top_k: 2, top_p: 0.6, ..hot() }, &row, 200);
    tokens.sort_unstable();
    tokens.dedup();
    assert_eq!(tokens, [0, 1]);
    assert!(draws(&GenerateParams { top_k: 2, top_p: 0.4, ..hot() }, &row, 200).iter().all(|&token| token == 0));
}

#[test]
fn extremes_do_not_fail() {
    let rows = [vec![f32::MAX, f32::MIN, 0.0, 1.0], vec![f32::MIN; 4], vec![1e30, 1e30, -1e30, 3.0], vec![0.0]];
    for row in &rows {
        for temperature in [0.0, f32::MIN_POSITIVE, 1e-6, 1e-3, 1.0, f32::MAX] {
            for (repetition_penalty, min_p, top_p, top_k) in [
                (1.0, 0.0, 1.0, 0),
                (f32::MIN_POSITIVE, 0.999_999_9, f32::MIN_POSITIVE, 2),
                (f32::MAX, f32::MIN_POSITIVE, 0.999, usize::MAX),
            ] {
                let params = GenerateParams { temperature, repetition_penalty, min_p, top_p, top_k, ..hot() };
                let mut sampler = self::sampler(&params, &[0, 1, 99]);
                for _ in 0..4 {
                    assert!((sampler.sample(row).unwrap() as usize) < row.len(), "{params:?} {row:?}");
                }
            }
        }
    }
}

#[test]
fn a_penalty_counts_each_token_once() {
    let params = GenerateParams { repetition_penalty: 2.0, ..GenerateParams::default() };
    let mut sampler = self::sampler(&params, &[1, 1, 1, 2]);
    assert_eq!(sampler.sample(&[1.0, 2.1, -1.0, 1.04]).unwrap(), 1, "2.1 / 2 is still the largest");
    assert_eq!(sampler.sample(&[-3.0, -1.0, -4.0, -2.1]).unwrap(), 1, "-1 · 2 is still the largest");
    assert_eq!(sampler.sample(&[-1.9, -1.0, -4.0, -2.1]).unwrap(), 0);
    assert_eq!(sampler.sample(&[-1.9, -1.0, -4.0, -2.1]).unwrap(), 1, "token 0 is seen now");
}

#[test]
fn logprobs_are_a_log_softmax() {
    let row = [1.0f32, 2.0, 3.0, 3.0];
    let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
    let entry = logprob(&row, 0, 3);
    assert_eq!(entry.token, 0);
    assert!((f64::from(entry.logprob.unwrap()) - (1.0 - sum.ln())).abs() < 1e-6);
    assert_eq!(entry.alternatives.iter().map(|&(token, _)| token).collect::<Vec<_>>(), [2, 3, 1]);
    assert!(logprob(&row, 0, 0).alternatives.is_empty());
    let total: f64 = (0..4).map(|t| f64::from(logprob(&row, t, 20).logprob.unwrap()).exp()).sum();
    assert!((total - 1.0).abs() < 1e-6);
    assert_eq!(logprob(&row, 0, 20).alternatives.len(), 4);
}

#[test]
fn choices_draw_differently_and_the_first_like_a_single_one() {
    let params = GenerateParams { n: 3, ..hot() };
    let choice = |choice| {
        let mut sampler = Sampler::new(&params, &[], choice, &HashSet::new(), Drawer::Sampler);
        (0..50).map(|_| sampler.sample(&ROW).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(choice(0), draws(&hot(), &ROW, 50));
    assert_ne!(choice(1), choice(0));
    assert_ne!(choice(1), choice(2));
    assert_eq!(choice(1), choice(1));
    let next = GenerateParams { seed: params.seed + 1, ..params.clone() };
    assert_ne!(params.seed_of(1), next.seed_of(0));
    assert_ne!(params.seed_of(2), next.seed_of(1));
}

/// A row of noise, with a few logits high above it in blocks of their own.
fn long_row(len: usize, seed: u64) -> Vec<f32> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut row: Vec<f32> = (0..len).map(|_| random.random_range(-8.0..0.0)).collect();
    for _ in 0..6 {
        row[random.random_range(0..len)] = random.random_range(3.0..6.0);
    }
    row
}

#[test]
fn a_long_row_is_drawn_by_its_probabilities() {
    let row = long_row(3000, 1);
    let weights: Vec<f64> = row.iter().map(|&logit| f64::from(logit / 1.5).exp()).collect();
    let total: f64 = weights.iter().sum();
    const DRAWS: usize = 6000;
    for top_p in [1.0, 0.9999] {
        let mut counts = vec![0usize; row.len()];
        for token in draws(&GenerateParams { temperature: 1.5, top_p, ..hot() }, &row, DRAWS) {
            counts[token as usize] += 1;
        }
        let mut rest = (0.0, 0);
        for (&weight, &count) in weights.iter().zip(&counts) {
            let expected = DRAWS as f64 * weight / total;
            if expected > 50.0 {
                assert!((count as f64 - expected).abs() < 5.0 * expected.sqrt(), "{count} of {expected}");
            } else {
                rest = (rest.0 + expected, rest.1 + count);
            }
        }
        assert!(rest.0 > 1000.0 && (rest.1 as f64 - rest.0).abs() < 5.0 * rest.0.sqrt(), "{rest:?}");
    }
}

#[test]
fn presence_and_frequency_count_the_continuation_alone() {
    let greedy = GenerateParams::default();
    let row = [1.0, 0.9, 0.5, 0.0, 0.0, 0.0];
    assert_eq!(draws(&GenerateParams { presence_penalty: 0.3, ..greedy.clone() }, &row, 4), [0, 1, 0, 0], "once, however often");
    assert_eq!(draws(&GenerateParams { frequency_penalty: 0.3, ..greedy.clone() }, &row, 5), [0, 1, 0, 1, 2], "each time");
    assert_eq!(draws(&GenerateParams { frequency_penalty: -2.0, ..greedy.clone() }, &row, 3), [0, 0, 0]);
    let params = GenerateParams { presence_penalty: 2.0, frequency_penalty: 2.0, ..greedy.clone() };
    assert_eq!(sampler(&params, &[0, 0, 0]).sample(&row).unwrap(), 0, "the prompt does not count");
    let params = GenerateParams { repetition_penalty: 2.0, presence_penalty: 0.1, ..greedy };
    let mut both = self::sampler(&params, &[0, 1]);
    assert_eq!(both.sample(&[1.0, 0.9, 0.47, 0.0, 0.0, 0.0]).unwrap(), 0, "1 / 2");
    assert_eq!(both.sample(&[1.0, 0.8, 0.41, 0.0, 0.0, 0.0]).unwrap(), 2, "1 / 2 - 0.1, 0.8 / 2");
}

#[test]
fn bias_comes_on_top_of_penalties() {
    let biased = |logit_bias: Vec<(u32, f32)>| GenerateParams { logit_bias, ..GenerateParams::default() };
    assert_eq!(draws(&biased(vec![(4, 1.5), (1, -100.0)]), &ROW, 2), [4, 4]);
    assert_eq!(draws(&biased(vec![(99, 100.0)]), &ROW, 1), [1], "a token that the row does not have");
    let params = GenerateParams { repetition_penalty: 10.0, ..biased(vec![(0, 2.6)]) };
    assert_eq!(sampler(&params, &[0]).sample(&ROW).unwrap(), 1, "0.5 / 10 + 2.6");
    let params = GenerateParams { repetition_penalty: 10.0, ..biased(vec![(0, 2.99)]) };
    assert_eq!(sampler(&params, &[0]).sample(&ROW).unwrap(), 0, "0.5 / 10 + 2.99");
}

#[test]
fn only_allowed_tokens_are_drawn() {
    let allowed = |ids: &[u32]| GenerateParams { allowed_token_ids: ids.to_vec(), ..hot() };
    assert_eq!(support(allowed(&[4, 0, 2])), [0, 2, 4]);
    assert_eq!(support(GenerateParams { top_k: 2, ..allowed(&[4, 0, 2]) }), [0, 4]);
    assert_eq!(support(GenerateParams { top_p: 0.5, ..allowed(&[4, 0, 2]) }), [4]);
    assert_eq!(support(GenerateParams { min_p: 0.2, ..allowed(&[4, 0, 2]) }), [0, 4]);
    assert_eq!(draws(&GenerateParams { temperature: 0.0, ..allowed(&[3, 2, 1]) }, &ROW, 1), [1], "the lowest of equals");
    assert_eq!(draws(&GenerateParams { temperature: 0.0, logit_bias: vec![(2, 9.0)], ..allowed(&[2, 1]) }, &ROW, 1), [2]);
    let many = GenerateParams { allowed_token_ids: (0..3000).rev().step_by(2).collect(), ..hot() };
    assert!(draws(&many, &long_row(3000, 2), 500).iter().all(|token| token % 2 == 1));
}

#[test]
fn ends_wait_for_the_least_number_of_tokens() {
    let row = [0.0, 1.0, 0.0, 5.0, 0.0, 9.0];
    let params = GenerateParams { min_new_tokens: 2, stop_token_ids: vec![3], ..GenerateParams::default() };
    assert_eq!(draws(&params, &row, 4), [1, 1, 5, 5]);
    assert_eq!(draws(&GenerateParams { ignore_eos: true, ..params.clone() }, &row, 3), [5, 5, 5], "5 ends nothing");
    let random = draws(&GenerateParams { temperature: 1.0, min_new_tokens: 300, ..params }, &row, 300);
    assert!(random.iter().all(|token| ![3, 5].contains(token)));
}

#[test]
fn nothing_left_is_an_error_and_the_draw_goes_on() {
    for temperature in [0.0, 1.0] {
        let ends = GenerateParams { temperature, min_new_tokens: 1, ..hot() };
        for params in [
            GenerateParams { allowed_token_ids: vec![5], ..ends.clone() },
            GenerateParams { stop_token_ids: (0..6).collect(), ..ends.clone() },
            GenerateParams { allowed_token_ids: vec![99], ..hot() },
        ] {
            assert!(matches!(sampler(&params, &[]).sample(&ROW), Err(Error::Internal(_))), "{params:?}");
        }
        assert!(matches!(sampler(&ends, &[]).sample(&[]), Err(Error::Internal(_))));
    }
}

#[test]
fn a_row_that_is_not_finite_is_refused_whatever_is_done_to_it() {
    let plain = GenerateParams::default();
    for params in [
        plain.clone(),
        hot(),
        GenerateParams { top_p: 0.5, ..hot() },
        GenerateParams { allowed_token_ids: vec![0], ..plain.clone() },
        GenerateParams { logit_bias: vec![(1, 1.0)], ..plain },
    ] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(matches!(sampler(&params, &[]).sample(&[1.0, bad, 0.0]), Err(Error::NonFinite)), "{params:?} {bad}");
        }
    }
}

#[test]
fn a_row_that_comes_here_is_drawn_as_the_model_would() {
    let mut random = StdRng::seed_from_u64(5);
    let (mut draws, mut differ) = (0, 0);
    for len in [6, 255, 256, 257, 3000] {
        for (temperature, min_p, top_k, top_p) in [
            (1.0, 0.0, 0, 1.0),
            (0.3, 0.0, 0, 1.0),
            (2.0, 0.1, 0, 1.0),
            (1.0, 0.0, 40, 1.0),
            (1.0, 0.0, 0, 0.9),
            (1.5, 0.001, 700, 0.8),
            (1.0, 0.0, usize::MAX, 1.0),
        ] {
            let params = GenerateParams { temperature, min_p, top_k, top_p, seed: random.random(), ..GenerateParams::default() };
            let mut sampler = Sampler::new(&params, &[], 0, &HashSet::new(), Drawer::Model);
            for _ in 0..60 {
                let (row, draw) = (long_row(len, random.random()), sampler.by_model().unwrap());
                let found = sampler.sample(&row).unwrap();
                draws += 1;
                // Sums of f32 come within rounding of a share once in a while.
                differ += usize::from(crate::model::draw::reference(&row, &draw) != Drawn::Token(found));
                assert_ne!(sampler.by_model().unwrap().uniform, draw.uniform, "each token has its own number");
            }
        }
    }
    assert!(differ <= draws / 500, "{differ} of {draws}");
}

#[test]
fn the_model_draws_where_its_row_is_not_touched() {
    let by_model = |params: &GenerateParams| Sampler::new(params, &[1], 0, &HashSet::from([5]), Drawer::Model).by_model();
    let plain = GenerateParams::default;
    for greedy in [plain(), GenerateParams { temperature: 1e-7, ..plain() }, GenerateParams { top_k: 1, ..hot() }] {
        assert_eq!(by_model(&greedy), Some(TokenDraw::LIKELIEST));
    }
    let params = GenerateParams { top_k: usize::MAX, top_p: 0.5, min_p: 0.25, ..hot() };
    let draw = by_model(&params).unwrap();
    assert_eq!(draw, TokenDraw { temperature: 1.0, top_k: 0, top_p: 0.5, min_p: 0.25, uniform: draw.uniform });
    assert!((0.0..1.0).contains(&draw.uniform));
    for touched in [
        GenerateParams { repetition_penalty: 1.1, ..hot() },
        GenerateParams { logit_bias: vec![(1, 1.0)], ..plain() },
        GenerateParams { allowed_token_ids: vec![1], ..plain() },
        GenerateParams { min_new_tokens: 1, ..plain() },
    ] {
        assert_eq!(by_model(&touched), None, "{touched:?}");
    }
    let mut later = Sampler::new(&GenerateParams { min_new_tokens: 1, ..plain() }, &[], 0, &HashSet::from([5]), Drawer::Model);
    assert_eq!(later.by_model(), None, "5 may not come yet");
    let mut once = Sampler::new(&GenerateParams { presence_penalty: 1.0, ..plain() }, &[], 0, &HashSet::new(), Drawer::Model);
    assert_eq!(once.by_model(), Some(TokenDraw::LIKELIEST), "nothing has been seen yet");
    once.take(3);
    assert_eq!(once.by_model(), None);
    later.take(2);
    assert_eq!(later.by_model(), Some(TokenDraw::LIKELIEST));
}
