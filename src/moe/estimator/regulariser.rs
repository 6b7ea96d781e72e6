//! What a method adds to the loss by its own definition, besides the auxiliary losses that a run chooses.

use super::{RoutedBatch, batch::finite, dselect};
use crate::{
    error::Result,
    moe::loss::{AuxLoss, LossInput},
    schedule::MOST,
};

/// A term of the loss, one layer at a time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Regulariser {
    /// No term.
    None,
    /// Minus the mean entropy of the softmax: keeps a sampled router exploring (REINFORCE).
    EntropyBonus {
        /// Times this.
        weight: f64,
    },
    /// The entropy of the selectors, and what keeps them on codes that are experts (DSelect-k).
    Selectors {
        /// Times this.
        weight: f64,
        /// Width of the smoothed step.
        gamma: f64,
        /// Selectors.
        k: usize,
    },
    /// The penalty on active experts, with a weight that [`Regulariser::adapt`] moves (ReMoE).
    Sparsity {
        /// First weight.
        initial: f64,
        /// By which the weight changes each step.
        factor: f64,
        /// Active experts per token to arrive at.
        k: usize,
    },
}

impl Regulariser {
    /// The weight before the first step, for whoever keeps it from step to step.
    pub fn initial_weight(&self) -> f64 {
        match *self {
            Self::None => 0.0,
            Self::EntropyBonus { weight } | Self::Selectors { weight, .. } => weight,
            Self::Sparsity { initial, .. } => initial,
        }
    }

    /// The weight of the next step. `weight` is that of this one; `active` is the mean number of chosen experts per token,
    /// over layers and micro-batches.
    ///
    /// Only the penalty has a memory: it grows while more than k experts are active, and else falls.
    pub fn adapt(&self, weight: f64, active: f64) -> f64 {
        match *self {
            Self::Sparsity { factor, k, .. } if active > k as f64 => (weight * factor).min(MOST),
            Self::Sparsity { factor, .. } => (weight / factor).max(f64::MIN_POSITIVE),
            _ => self.initial_weight(),
        }
    }

    /// The term at `weight` for `z [T, G]` and what it was routed to; `dz += ∂/∂z`.
    ///
    /// # Errors
    /// `z` or `dz` does not fit `routed`.
    pub fn value_and_grad(&self, weight: f64, z: &[f64], routed: &RoutedBatch, dz: &mut [f64]) -> Result<f64> {
        let input = LossInput {
            z,
            experts: routed.experts,
            temperature: 1.0,
            choices: routed.wanted(),
            k: 1,
            sequences: &[],
            global_load: None,
            noise: None,
            teacher: None,
        };
        match *self {
            Self::None => Ok(0.0),
            Self::EntropyBonus { .. } => Ok(-weight * AuxLoss::TokenEntropy.value_and_grad(&input, -weight, dz)?),
            Self::Selectors { gamma, k, .. } => Ok(dselect::regulariser(z, routed.experts, gamma, k, weight, dz)),
            Self::Sparsity { k, .. } => {
                let input = LossInput { k, ..input };
                Ok(weight * AuxLoss::ReluL1.value_and_grad(&input, weight, dz)?)
            }
        }
    }
}

impl RoutedBatch {
    /// Mean number of chosen experts of the tokens whose router outputs `z` are finite, before capacity.
    pub fn active(&self, z: &[f64]) -> f64 {
        let width = z.len().checked_div(self.tokens).unwrap_or(0).max(1);
        let live = z.chunks_exact(width).filter(|z| finite(z)).count();
        self.wanted().chosen.len() as f64 / live.max(1) as f64
    }
}
