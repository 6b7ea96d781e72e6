//! Exploration: what keeps a router from never trying an expert. Training only.
//!
//! Random numbers come in as functions of the column, so that the same draw can be made again in the backward pass.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Rates in force at one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Exploration {
    /// Probability, in [0, 1), that all k experts of a token are drawn evenly without replacement instead of chosen.
    /// The method weighs them as it weighs those that it chooses itself.
    pub epsilon: f64,
    /// Probability, in [0, 1), that an expert is hidden from a token's choice; the last k are never hidden. It is left
    /// out of the relaxation too, whose normaliser then has the others only.
    pub dropout: f64,
}

impl Exploration {
    /// No exploration.
    pub const NONE: Self = Self { epsilon: 0.0, dropout: 0.0 };

    /// Refuses rates outside [0, 1). `field` is the path of the settings.
    pub fn check(&self, field: &str) -> Result<()> {
        for (name, rate) in [("epsilon", self.epsilon), ("dropout", self.dropout)] {
            if !(0.0..1.0).contains(&rate) {
                return Err(Error::invalid(format!("{field}.{name}"), "must be at least 0 and below 1"));
            }
        }
        Ok(())
    }

    /// Experts hidden from one token, `hidden [E]` overwritten: those whose `uniform` in (0, 1) is below the rate, but
    /// for the `k` with the largest.
    pub fn hide(&self, hidden: &mut [bool], k: usize, uniform: impl Fn(usize) -> f64) {
        hidden.fill(false);
        if self.dropout <= 0.0 {
            return;
        }
        let mut order: Vec<(f64, usize)> = (0..hidden.len()).map(|e| (uniform(e), e)).collect();
        order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let most = hidden.len().saturating_sub(k);
        order.iter().take(most).filter(|(u, _)| *u < self.dropout).for_each(|&(_, e)| hidden[e] = true);
    }

    /// `k` experts drawn evenly without replacement, with probability `epsilon`; `None` leaves the choice as it is.
    ///
    /// `coin` and `uniform` are independent, in (0, 1).
    pub fn draw(&self, experts: usize, k: usize, coin: f64, uniform: impl Fn(usize) -> f64) -> Option<Vec<u32>> {
        if coin >= self.epsilon {
            return None;
        }
        let mut order: Vec<(f64, u32)> = (0..experts).map(|e| (uniform(e), e as u32)).collect();
        order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        Some(order.into_iter().take(k).map(|(_, e)| e).collect())
    }
}

/// Multiplies each value of the first `rows` rows of `x [T, columns]` by `U(1 - width, 1 + width)` (Switch
/// Transformer). For the router's copy of the tokens: experts see what came in.
///
/// `uniform` of row and column is in (0, 1). Rows after the first ones are those of a greedy copy, see
/// [`super::estimator::Estimator::greedy_from`].
pub fn jitter(x: &mut [f64], columns: usize, width: f64, rows: usize, uniform: impl Fn(u64, u64) -> f64) {
    if width <= 0.0 {
        return;
    }
    for (row, x) in x.chunks_mut(columns.max(1)).take(rows).enumerate() {
        x.iter_mut().enumerate().for_each(|(i, x)| *x *= 1.0 + width * (2.0 * uniform(row as u64, i as u64) - 1.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hash of i in (0, 1).
    fn uniform(i: usize) -> f64 {
        let x = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let x = (x ^ (x >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((x ^ (x >> 29)) >> 12) as f64 + 0.5) / (1u64 << 52) as f64
    }

    #[test]
    fn dropout_hides_its_share_and_leaves_k() {
        let rate = |dropout: f64, k: usize| {
            let exploration = Exploration { dropout, ..Exploration::NONE };
            let (mut all, mut least) = (0, 8);
            for token in 0..1000 {
                let mut hidden = [true; 8];
                exploration.hide(&mut hidden, k, |e| uniform(token * 8 + e));
                let count = hidden.iter().filter(|hidden| **hidden).count();
                (all, least) = (all + count, least.min(8 - count));
            }
            (f64::from(all as u32) / 8000.0, least)
        };
        assert_eq!(rate(0.0, 1), (0.0, 8));
        let (share, _) = rate(0.1, 1);
        assert!((share - 0.1).abs() < 0.015, "{share}");
        assert_eq!(rate(1.0 - 1e-15, 2), (0.75, 2), "the last two stay");
    }

    #[test]
    fn epsilon_draws_evenly_and_without_repeating() {
        let exploration = Exploration { epsilon: 0.25, ..Exploration::NONE };
        let mut counts = [0u32; 4];
        let mut draws = 0;
        for token in 0..4000 {
            let drawn = exploration.draw(4, 2, uniform(7 * token), |e| uniform(1_000_003 * token + 31 * e));
            draws += u32::from(drawn.is_some());
            for row in drawn.iter() {
                assert!(row.len() == 2 && row[0] != row[1]);
                row.iter().for_each(|&e| counts[e as usize] += 1);
            }
        }
        assert!(draws.abs_diff(1000) < 100, "{draws}");
        assert!(counts.iter().all(|n| n.abs_diff(draws / 2) < draws / 8), "{counts:?} of {draws}");
        assert!(Exploration::NONE.draw(4, 2, 1e-300, uniform).is_none());
    }

    #[test]
    fn jitter_stays_in_its_width() {
        let at = |row: u64, column: u64| uniform((8 * row + column) as usize);
        let mut x = vec![2.0; 1000];
        jitter(&mut x, 8, 0.1, usize::MAX, at);
        assert!(x.iter().all(|x| (1.8..=2.2).contains(x)) && (x.iter().sum::<f64>() / 1000.0 - 2.0).abs() < 0.02);
        assert!(x.iter().any(|x| *x < 1.81) && x.iter().any(|x| *x > 2.19), "all of it");
        let before = x.clone();
        jitter(&mut x, 8, 0.0, usize::MAX, at);
        assert_eq!(x, before);
        jitter(&mut x, 8, 0.1, 100, at);
        assert_ne!(x[..800], before[..800]);
        assert_eq!(x[800..], before[800..], "rows of the greedy copy");
    }

    #[test]
    fn rates_are_checked() {
        assert!(Exploration { epsilon: 0.5, dropout: 0.0 }.check("explore").is_ok());
        for (exploration, field) in [
            (Exploration { epsilon: 1.0, dropout: 0.0 }, "explore.epsilon"),
            (Exploration { epsilon: f64::NAN, dropout: 0.0 }, "explore.epsilon"),
            (Exploration { epsilon: 0.0, dropout: -0.1 }, "explore.dropout"),
        ] {
            let error = exploration.check("explore").unwrap_err().to_string();
            assert_eq!(error, format!("{field}: must be at least 0 and below 1"));
        }
    }
}
