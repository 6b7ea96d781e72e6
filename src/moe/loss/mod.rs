//! Auxiliary losses on router logits, and their gradients. One layer at a time, f64, plain slices.
//!
//! Legend: T tokens, E experts, k choices per token; `z` logits; `p = softmax(z / τ)`; `n_e` chosen rows of expert e,
//! `f_e = n_e / (k T)`; `P_e = mean_t p_te`; `H` entropy in nats. Counts, `f` and thresholds are constants: only `p` (or
//! `z` itself) carries gradient. The mean over layers, and the weight, are the caller's.

mod balance;
mod softmax;

use std::ops::Range;

use super::choices::ChoiceRows;
use crate::error::Result;

/// What the losses of one layer are computed from.
#[derive(Clone, Copy, Debug)]
pub struct LossInput<'a> {
    /// `[T, G]`, row-major; the first E columns are the logits of the experts, G is what T rows leave.
    pub z: &'a [f64],
    /// E.
    pub experts: usize,
    /// τ of the softmax that `p` is, above 0.
    pub temperature: f64,
    /// Choices of the T tokens; before capacity, so that a full expert still counts as wanted.
    pub choices: ChoiceRows<'a>,
    /// Choices that a token makes. Losses that count choices mean nothing where all experts are chosen.
    pub k: usize,
    /// Token ranges of the sequences, for [`AuxLoss::Sequence`]; none: the batch is one sequence.
    pub sequences: &'a [Range<usize>],
    /// `[E]` rows over all micro-batches of the step, for [`AuxLoss::GlobalBatch`]; `None`: those of this batch.
    pub global_load: Option<&'a [f64]>,
    /// The noise of the choice, for [`AuxLoss::Load`].
    pub noise: Option<LossNoise<'a>>,
    /// `[T, E]` router probabilities of a teacher, for [`AuxLoss::RouterKl`].
    pub teacher: Option<&'a [f64]>,
}

/// Normal noise that was added to the logits before the choice.
#[derive(Clone, Copy, Debug)]
pub struct LossNoise<'a> {
    /// `[T, E]` logits with noise: what the choice was made on.
    pub seen: &'a [f64],
    /// Its standard deviation, `[1]` for all or `[T, E]`; above 0.
    pub std: &'a [f64],
}

/// An auxiliary loss. Values at an even load in brackets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AuxLoss {
    /// `E Σ_e f_e P_e` [1], f from the largest logit (Switch Transformer, Fedus et al. 2021, eq. 4).
    Switch,
    /// `mean_t logsumexp(z_t)²` (ST-MoE, Zoph et al. 2022): keeps logits small. Of z itself, whatever τ.
    RouterZ,
}

impl AuxLoss {
    /// Every one, in the order in which they are listed to people.
    pub const ALL: [Self; 2] = [Self::Switch, Self::RouterZ];

    /// As recipes and reports spell it.
    pub fn id(self) -> &'static str {
        match self {
            Self::Switch => "switch",
            Self::RouterZ => "router_z",
        }
    }

    /// The value; adds `scale · ∂value/∂z` to `dz [T, G]`. 0 for no token.
    ///
    /// A token whose logits are not finite is left out of every sum, T included.
    ///
    /// # Errors
    /// `z` is not T rows of at least E columns.
    pub fn value_and_grad(self, input: &LossInput<'_>, scale: f64, dz: &mut [f64]) -> Result<f64> {
        let view = softmax::View::new(input)?;
        let mut sink = softmax::Sink { scale, dz };
        Ok(match self {
            Self::Switch => balance::switch(&view, &mut sink),
            Self::RouterZ => balance::router_z(&view, &mut sink),
        })
    }
}

#[cfg(test)]
mod tests;
