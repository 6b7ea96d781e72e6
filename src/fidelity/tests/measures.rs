//! Measures and summaries, on plain numbers.

use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::fidelity::{
    measure::{LogitCompare, OutputGap, RouteAgreement, disagreement, margin, missed_mass, mix, nll},
    summary::{KEPT, Paired, Values},
};

#[test]
fn outputs() {
    let gap = OutputGap::new(&[3.0, 4.0], &[3.0, 0.0]);
    assert_eq!((gap.l2_rel(), gap.norm_ratio()), (0.8, 0.6));
    assert!((gap.cosine_distance() - 0.4).abs() < 1e-15);
    let shorter = OutputGap::new(&[3.0, 4.0], &[1.5, 2.0]);
    assert_eq!((shorter.cosine_distance(), shorter.norm_ratio(), shorter.l2_rel()), (0.0, 0.5, 0.5), "cosine is blind to length");
    let nothing = OutputGap::new(&[0.0], &[0.0]);
    assert_eq!((nothing.l2_rel(), nothing.cosine_distance(), nothing.norm_ratio()), (0.0, 0.0, 1.0));
    assert_eq!(OutputGap::new(&[0.0], &[1.0]).l2_rel(), f64::INFINITY);
    let mut pooled = gap;
    pooled.add(&OutputGap::new(&[0.0, 12.0], &[0.0, 12.0]));
    assert!((pooled.l2_rel() - 4.0 / 13.0).abs() < 1e-15, "long outputs count more");
}

#[test]
fn routes() {
    let (ids, weights) = ([2u32, 0, 1], [0.5f32, 0.25, 0.25]);
    assert_eq!(missed_mass(ids.iter().zip(&weights), &[2, 1]), 0.25);
    assert_eq!(missed_mass(ids.iter().zip(&weights), &ids), 0.0);
    assert_eq!(missed_mass(ids.iter().zip(&[0.5f32, 0.5, 0.0]), &[2]), 0.5, "of weights that are not probabilities too");
    let logits = [1.0, 0.5, 4.0];
    assert_eq!([1, 2, 3, 0].map(|k| margin(&logits, &[2, 0, 1], k, 0.5)), [Some(6.0), Some(1.0), None, None]);
    let agreement = RouteAgreement::new(&[1, 4], &[4, 2]);
    assert_eq!((agreement.overlap, agreement.exact, agreement.first), (0.5, false, false));
    let agreement = RouteAgreement::new(&[1, 4], &[4, 1]);
    assert_eq!((agreement.overlap, agreement.exact, agreement.first), (1.0, true, false));
    assert_eq!(disagreement(&[3.0, 4.0], &[0.0, 4.0]), (3.0, 5.0));
}

#[test]
fn logits() {
    let (p, q) = ([0.5f64, 0.25, 0.25], [0.25f64, 0.25, 0.5]);
    // Any shift of a row is the same distribution.
    let row = |p: [f64; 3], shift: f64| p.map(|p| (p.ln() + shift) as f32);
    let gap = LogitCompare::default().gap(&row(p, 3.0), &row(q, -7.0)).unwrap();
    assert!((gap.kl - 0.25 * 2f64.ln()).abs() < 1e-6);
    let m = [0.375f64, 0.25, 0.375];
    let kl = |a: [f64; 3]| a.iter().zip(m).map(|(a, m)| a * (a / m).ln()).sum::<f64>();
    assert!((gap.js - 0.5 * (kl(p) + kl(q))).abs() < 1e-6);
    assert!(!gap.top1_agree && gap.top5_overlap == 1.0);
    let same = LogitCompare::default().gap(&row(p, 0.0), &row(p, 1.0)).unwrap();
    assert!(same.kl < 1e-6 && same.js < 1e-6 && same.logit_l2 < 1e-6 && same.top1_agree);
    let many: Vec<f32> = (0..9).map(|i| i as f32).collect();
    let turned: Vec<f32> = many.iter().map(|z| (z - 5.0).abs()).collect();
    // The five largest are 8 7 6 5 4, and 0 1 2 8 3: of equal logits the lower id first.
    assert_eq!(LogitCompare::default().gap(&many, &turned).unwrap().top5_overlap, 0.2);
    assert!(LogitCompare::default().gap(&[f32::NAN, 0.0], &[0.0, 0.0]).is_none());
    assert!((nll(&row(p, 5.0), 1) - 4f64.ln()).abs() < 1e-6);
}

/// `y_ref - y_h = r (ŷ_R - ŷ_S)` for weights renormalised to the total of the reference, `r ŷ_R` for weights as they are.
#[test]
fn the_gap_is_missed_mass_times_disagreement() {
    let mut rng = StdRng::seed_from_u64(5);
    for case in 0..200 {
        let (experts, width) = (2 + case % 7, 1 + case % 5);
        let rows: Vec<Vec<f32>> = (0..experts).map(|_| (0..width).map(|_| rng.random_range(-2.0..2.0)).collect()).collect();
        // Sparse, dense, and with any total.
        let weights: Vec<f32> =
            (0..experts).map(|e| if e > 1 && rng.random_bool(0.3) { 0.0 } else { rng.random_range(0.01..1.0) }).collect();
        let k = rng.random_range(1..experts);
        let chosen: Vec<u32> = (0..k as u32).collect();
        let sum = |range: std::ops::Range<usize>| weights[range].iter().map(|&w| f64::from(w)).sum::<f64>();
        let (total, inside) = (sum(0..experts), sum(0..k));
        let mixed = |range: std::ops::Range<usize>, scale: f64| {
            let mut out = vec![0.0; width];
            mix(weights[range.clone()].iter().map(|&w| f64::from(w) * scale), rows[range].iter().map(Vec::as_slice), &mut out);
            out
        };
        let reference = mixed(0..experts, 1.0);
        let ids: Vec<u32> = (0..experts as u32).collect();
        let r = total * missed_mass(ids.iter().zip(&weights), &chosen);
        assert!((r - (total - inside)).abs() < 1e-12);
        let outside = if total > inside { mixed(k..experts, 1.0 / (total - inside)) } else { vec![0.0; width] };
        let mean = mixed(0..k, 1.0 / inside);
        for (name, served, expected) in [
            ("renormalised", mixed(0..k, total / inside), outside.iter().zip(&mean).map(|(o, m)| r * (o - m)).collect::<Vec<_>>()),
            ("raw", mixed(0..k, 1.0), outside.iter().map(|o| r * o).collect()),
        ] {
            for ((reference, served), expected) in reference.iter().zip(&served).zip(&expected) {
                assert!((reference - served - expected).abs() < 1e-12, "{name}, case {case}");
            }
            let gap = OutputGap::new(&reference, &served);
            let norm = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
            assert!((gap.difference.sqrt() - norm(&expected)).abs() < 1e-12);
        }
        // The bound that follows from it.
        let served = mixed(0..k, total / inside);
        let wide = |row: &[f32]| row.iter().zip(&served).map(|(&a, b)| (f64::from(a) * total - b).powi(2)).sum::<f64>().sqrt();
        let farthest = rows[k..].iter().map(|row| wide(row)).fold(0.0, f64::max);
        let bound = (r / total) * farthest / reference.iter().map(|x| x * x).sum::<f64>().sqrt();
        assert!(OutputGap::new(&reference, &served).l2_rel() <= bound + 1e-9, "case {case}");
    }
}

#[test]
fn quantiles_are_exact_until_memory_ends() {
    let mut values = Values::default();
    assert_eq!(values.summary().count, 0);
    (0..100).rev().for_each(|i| values.push(f64::from(i)));
    values.push(f64::NAN);
    let summary = values.summary();
    assert_eq!((summary.count, summary.mean, summary.p50, summary.p95, summary.p99, summary.max), (100, 49.5, 49.0, 94.0, 98.0, 99.0));
    let (mut many, mut again) = (Values::default(), Values::default());
    for i in 0..20 * KEPT {
        many.push((i * 7919 % (20 * KEPT)) as f64 / (20 * KEPT) as f64);
        again.push((i * 7919 % (20 * KEPT)) as f64 / (20 * KEPT) as f64);
    }
    let summary = many.summary();
    assert_eq!(summary, again.summary(), "the same values, the same report");
    assert!((summary.p50 - 0.5).abs() < 0.02 && (summary.p95 - 0.95).abs() < 0.01 && summary.count == 20 * KEPT as u64);
}

#[test]
fn the_perplexity_gap_has_an_interval() {
    let mut rng = StdRng::seed_from_u64(1);
    let mut paired = Paired::default();
    assert_eq!((paired.gap().gap, paired.gap().interval), (0.0, None));
    for _ in 0..4000 {
        let reference = rng.random_range(0.0..6.0);
        paired.push(reference, reference + 0.01 + rng.random_range(-0.1..0.1));
    }
    let gap = paired.gap();
    let [low, high] = gap.interval.unwrap();
    assert!((gap.gap - 0.01f64.exp_m1()).abs() < 0.005 && low < gap.gap && gap.gap < high && low > 0.0 && high < 0.02, "{gap:?}");
    assert_eq!(paired.gap(), gap, "the seed is fixed");
    let mut long = Paired::default();
    (0..600_000).for_each(|_| long.push(2.0, 1.0));
    assert!((long.gap().gap - (-1f64).exp_m1()).abs() < 1e-12 && long.gap().tokens == 600_000, "blocks are merged, nothing is lost");
}
