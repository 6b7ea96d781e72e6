//! Exploration: what keeps a router from never trying an expert. Training only.
//!
//! Random numbers come in as functions of the column, so that the same draw can be made again in the backward pass.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Rates in force at one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Exploration {
    /// Probability, in [0, 1), that a token's experts are drawn evenly instead of chosen.
    pub epsilon: f64,
    /// Probability, in [0, 1), that an expert is hidden from a token's choice; the last k are never hidden.
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

/// Multiplies each value by `U(1 - width, 1 + width)` (Switch Transformer). For the router's copy of the token: experts
/// see what came in.
pub fn jitter(x: &mut [f64], width: f64, uniform: impl Fn(usize) -> f64) {
    if width > 0.0 {
        x.iter_mut().enumerate().for_each(|(i, x)| *x *= 1.0 + width * (2.0 * uniform(i) - 1.0));
    }
}
