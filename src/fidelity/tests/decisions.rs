//! Verdicts, advice, and what is told of experts and text.

use std::collections::HashMap;

use crate::fidelity::{
    advice::{LayerCost, factor, opposite, plan, predict},
    corpus::{Corpus, most_frequent, occurrences},
    experts::ExpertUse,
    floor::Floor,
    measure::LogitGap,
    run::OutputValues,
    verdict::{Direction, Judged, KL, Level, Verdict},
};

#[test]
fn levels_need_a_material_gap() {
    assert_eq!([0.01, 0.0101, 0.05, 0.0501, f64::NAN].map(|kl| Judged::new(kl, KL, None).level), {
        use Level::{Amber, Green, Red};
        [Green, Amber, Amber, Red, Red]
    });
    let noisy = Judged::new(0.04, KL, Some(0.02));
    assert_eq!((noisy.material, noisy.level), (false, Level::Green));
    assert_eq!(Judged::new(0.0601, KL, Some(0.02)).level, Level::Red);
}

fn verdict(kl: f64, agree: bool, difference: f64, floor: Option<&Floor>) -> Verdict {
    let mut values = OutputValues::default();
    for token in 0..1000 {
        let gap = LogitGap { kl, js: 0.0, logit_l2: 0.0, top1_agree: agree || token % 10 > 0, top5_overlap: 1.0 };
        values.add_gap(&gap, Some((3.0, 3.0 + difference + if token % 2 == 0 { 0.01 } else { -0.01 })));
    }
    Verdict::new(&values.gaps(), floor)
}

#[test]
fn fidelity_and_quality_are_two_answers() {
    let levels = |verdict: Verdict| (verdict.fidelity.level, verdict.quality.level, verdict.quality.direction);
    assert_eq!(levels(verdict(0.001, true, 0.0, None)), (Level::Green, Level::Green, Direction::Same));
    assert_eq!(levels(verdict(0.001, false, 0.0, None)).0, Level::Red, "one likeliest token in ten is another");
    assert_eq!(levels(verdict(0.3, true, -0.1, None)), (Level::Red, Level::Green, Direction::Better), "another function, and a better one");
    assert_eq!(levels(verdict(0.03, true, 0.1, None)), (Level::Amber, Level::Red, Direction::Worse));
    assert_eq!(levels(verdict(0.001, true, 0.01, None)), (Level::Green, Level::Amber, Direction::Worse));
    let floor = Floor { kl: 0.2, top1_disagree: 0.1, perplexity_gap: 0.1, tokens_flipped: 0.5 };
    assert_eq!(levels(verdict(0.3, false, 0.1, Some(&floor))), (Level::Green, Level::Green, Direction::Same), "all of it may be rounding");
    let sentence = verdict(0.3, true, 0.1, None).sentence("top-1");
    assert!(sentence.contains("tune the router, or serve a larger k"), "{sentence}");
}

fn costs() -> Vec<LayerCost> {
    let cost = |layer, alone, squared: [f64; 4]| LayerCost { layer, alone, squared: squared.to_vec() };
    vec![cost(0, 0.1, [0.4, 0.2, 0.1, 0.0]), cost(1, 0.9, [0.2, 0.1, 0.05, 0.0]), cost(2, 0.01, [0.9, 0.0, 0.0, 0.0])]
}

#[test]
fn the_budget_goes_where_it_saves_most() {
    let costs = costs();
    assert_eq!(plan(&costs, 1.0, 1.0).k, [1, 1, 1]);
    assert_eq!(plan(&costs, 1.34, 1.0).k, [1, 2, 1]);
    assert_eq!(plan(&costs, 5.0 / 3.0, 1.0).k, [1, 3, 1], "a third expert where it counts before a second elsewhere");
    assert_eq!(plan(&costs, 2.4, 1.0).k, [2, 4, 1]);
    assert_eq!(plan(&costs, 100.0, 1.0).k, [4, 4, 4], "no more than was measured");
    assert_eq!(plan(&costs, 2.99, 1.0).k.iter().sum::<usize>(), 8, "within the budget");
    let factor = factor(&costs, 2.02);
    assert!((factor - 2.0).abs() < 1e-12 && (predict(&costs, &[1, 1, 1], factor) - 2.02).abs() < 1e-12);
    assert!((plan(&costs, 4.0 / 3.0, factor).predicted_kl - 2.0 * (0.1 + 0.45 + 0.01)).abs() < 1e-12);
    // Every other choice of the same budget is expected to be worse.
    let best = plan(&costs, 2.0, factor);
    for k in (0..64).map(|i| [1 + i % 4, 1 + i / 4 % 4, 1 + i / 16]).filter(|k| k.iter().sum::<usize>() <= 6) {
        assert!(predict(&costs, &k, factor) >= best.predicted_kl - 1e-12, "{k:?} against {:?}", best.k);
    }
}

#[test]
fn the_opposite_has_the_same_budget() {
    assert_eq!(opposite(&[1, 3, 2]), [3, 1, 2]);
    assert_eq!(opposite(&[1, 1, 2, 1]).iter().sum::<usize>(), 5);
    assert_ne!(opposite(&[1, 1, 2, 1]), [1, 1, 2, 1]);
    assert_eq!(opposite(&[2, 2]), [2, 2]);
}

#[test]
fn nothing_to_gain_is_no_plan_that_fails() {
    let flat = vec![LayerCost { layer: 0, alone: 0.0, squared: vec![0.0] }];
    assert_eq!(factor(&flat, 0.0), 1.0);
    assert_eq!(plan(&flat, 3.0, 1.0).k, [1]);
    assert_eq!(plan(&[], 2.0, 1.0).k, [0usize; 0]);
}

#[test]
fn experts_that_go_together_and_the_tokens_they_take() {
    let mut usage = ExpertUse::new(4, &[7, 9]);
    for turn in 0..300u32 {
        // 0 and 1 lead together, 2 and 3 likewise; token 7 goes to expert 0.
        let (token, logits) = if turn % 2 == 0 { (7, [4.0, 3.0, 0.0, 1.0]) } else { (1000 + turn % 3, [0.0, 1.0, 3.0, 4.0]) };
        usage.add(token, &[if turn % 2 == 0 { 0 } else { 3 }], &logits);
    }
    usage.add(5, &[], &[f32::NAN; 4]);
    let together = usage.coactivation();
    assert!(together[0][1] > 2.5 && together[2][3] > 2.5 && together[0][2] == 0.0 && together[0][0] == 0.0, "{together:?}");
    assert_eq!(together[1][0], together[0][1]);
    assert_eq!(usage.followed(), [vec![1.0, 0.0, 0.0, 0.0], vec![0.0; 4]]);
    let counts = HashMap::from([(7, 150), (1000, 50), (1001, 50), (1002, 50)]);
    let typical = usage.typical(2, &counts);
    assert_eq!((typical[0].len(), typical[0][0].token, typical[0][0].count, typical[0][0].share), (1, 7, 150, 1.0));
    assert!(typical[1].is_empty() && typical[3].len() == 2);
}

#[test]
fn memory_of_tokens_is_bounded_and_keeps_the_frequent() {
    let mut usage = ExpertUse::new(2, &[]);
    for turn in 0..100_000u32 {
        usage.add(if turn % 10 == 0 { 3 } else { 10 + turn % 5000 }, &[0], &[1.0, 0.0]);
    }
    let typical = usage.typical(1, &HashMap::from([(3, 10_000)]));
    assert_eq!(typical[0][0].token, 3);
    assert!(typical[0][0].count <= 10_000 && typical[0][0].count > 8_000, "no count is too high: {:?}", typical[0]);
}

#[test]
fn text_is_cut_into_windows() {
    let folder = tempfile::tempdir().unwrap();
    let [one, two, bad] = ["one", "two", "bad"].map(|name| folder.path().join(name));
    std::fs::write(&one, "[1, 2, 3,4\n5]").unwrap();
    std::fs::write(&two, "6 7 8").unwrap();
    std::fs::write(&bad, "6 seven").unwrap();
    let mut corpus = Corpus::new(4);
    corpus.add_token_ids(&[one, two]).unwrap();
    let windows = corpus.windows(100);
    assert_eq!(windows, [&[1u32, 2, 3, 4][..], &[6, 7, 8]], "a window of one token predicts nothing, and documents do not meet");
    assert_eq!(corpus.windows(6), [&[1u32, 2, 3, 4][..], &[6, 7]]);
    let facts = corpus.facts(&windows);
    assert_eq!((facts.tokens, facts.windows, facts.window, facts.sha256.len()), (7, 2, 4, 64));
    assert_eq!(most_frequent(&occurrences(&[&[1, 2, 2, 3, 3]]), 2), [2, 3]);
    let error = Corpus::new(4).add_token_ids(&[bad]).unwrap_err().to_string();
    assert!(error.starts_with("--token-ids: ") && error.contains("'seven'"), "{error}");
}
