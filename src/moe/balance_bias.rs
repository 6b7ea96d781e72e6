//! Loss-free balancing: a bias on the selection score of each expert, moved against its load (Wang et al. 2024,
//! arXiv:2408.15664; DeepSeek-V3). It takes part in the choice and in nothing else: no weight, no gradient, no statistic.

use super::choices::ChoiceRows;

/// `b_e += rate · sign(mean n - n_e)`, once for each global batch; n are rows of `wanted`, the choices before capacity:
/// an expert that is full to its limit still has too many.
pub fn update(bias: &mut [f64], wanted: ChoiceRows<'_>, rate: f64) {
    let counts = wanted.counts(0..wanted.tokens(), bias.len());
    let mean = counts.iter().sum::<f64>() / counts.len().max(1) as f64;
    for (b, n) in bias.iter_mut().zip(counts) {
        let gap = mean - n;
        if gap != 0.0 {
            *b += rate * gap.signum();
        }
    }
}

/// What is left of a bias that was raised by hand after a step without loss-free balancing: half after 69 steps.
pub const FADE: f64 = 0.99;

/// Lets a bias that was raised by hand fade: `b_e *= keep` each step ([`FADE`]), for runs without loss-free balancing. The router is
/// then served, without bias, as it ended its training.
pub fn fade(bias: &mut [f64], keep: f64) {
    bias.iter_mut().for_each(|b| *b *= keep);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::choices::Choices;

    /// So many rows for each expert.
    fn rows(counts: [usize; 4]) -> Choices {
        Choices::from_rows(counts.iter().enumerate().flat_map(|(e, &n)| std::iter::repeat_n([e as u32], n)))
    }

    #[test]
    fn the_bias_moves_against_the_load() {
        let mut bias = [0.5, 0.0, 0.0, 0.0];
        update(&mut bias, rows([70, 10, 20, 0]).rows(), 0.01);
        assert_eq!(bias, [0.49, 0.01, 0.01, 0.01]);
        update(&mut bias, rows([25, 25, 25, 25]).rows(), 0.01);
        assert_eq!(bias, [0.49, 0.01, 0.01, 0.01], "an even load moves nothing");
        fade(&mut bias, 0.5);
        assert_eq!(bias, [0.245, 0.005, 0.005, 0.005]);
    }

    /// Tokens whose logits all prefer expert 0 by 1 to 2; the bias alone must even out top-1.
    #[test]
    fn top_1_becomes_even_without_a_gradient() {
        let logits: Vec<[f64; 4]> = (0..400)
            .map(|t| [2.0 + 0.01 * f64::from(t % 7), 0.3 * f64::from(t % 5), 0.25 * f64::from(t % 6), 0.4 * f64::from(t % 4)])
            .collect();
        let counts = |bias: &[f64; 4]| {
            let mut counts = [0; 4];
            for z in &logits {
                counts[(1..4).fold(0, |best, e| if z[e] + bias[e] > z[best] + bias[best] { e } else { best })] += 1;
            }
            counts
        };
        let mut bias = [0.0; 4];
        assert_eq!(counts(&bias), [400, 0, 0, 0]);
        for _ in 0..400 {
            let counts = counts(&bias);
            update(&mut bias, rows(counts).rows(), 0.01);
        }
        assert!(counts(&bias).iter().all(|&n| (50..=150).contains(&n)), "{:?}", counts(&bias));
    }
}
