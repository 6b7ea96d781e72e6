//! Auxiliary losses on router logits, and their gradients. One layer at a time, f64, plain slices.
//!
//! Legend: T tokens, E experts, k choices per token; `z` logits; `p = softmax(z / τ)`; `n_e` chosen rows of expert e,
//! `f_e = n_e / Σ n`, which is `n_e / (k T)` where k is the same for all; `P_e = mean_t p_te`; `H` entropy in nats.
//! Counts, `f` and thresholds are constants: only `p` (or `z` itself) carries gradient. The mean over layers, and the
//! weight, are the caller's.

mod balance;
mod config;
mod distill;
mod entropy;
mod softmax;
mod variation;

use std::{fmt, ops::Range};

use self::softmax::{Sink, View};
pub use self::{
    config::{LossContext, LossTerm, loss_terms},
    distill::distill_kl,
};
use super::choices::ChoiceRows;
use crate::error::{Error, Result};

/// What the losses of one layer are computed from.
#[derive(Clone, Copy, Debug)]
pub struct LossInput<'a> {
    /// `[T, G]`, row-major; the first E columns are the logits of the experts, G is what T rows leave.
    pub z: &'a [f64],
    /// E.
    pub experts: usize,
    /// τ of the softmax that `p` is, above 0.
    pub temperature: f64,
    /// Choices of the T tokens with the noise and the exploration of the step, but before capacity, so that a full
    /// expert still counts as wanted: GShard and Switch define f on the router's choice.
    pub choices: ChoiceRows<'a>,
    /// Choices that a token is to make, for [`AuxLoss::Load`] and [`AuxLoss::ReluL1`]; others count those that it made.
    /// Losses that count all of them ([`AuxLoss::counts_choices`]) mean nothing where every expert is chosen.
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
    /// `E Σ_e f_e P_e` \[1\], f from the largest logit (Switch Transformer, Fedus et al. 2021, eq. 4).
    Switch,
    /// `E Σ_e f_e P_e` \[1\], f from all k choices (Megatron-LM).
    TopK,
    /// The same without dividing by k \[k, or the mean number of choices\], as transformers' `load_balancing_loss_func`;
    /// of one layer, not of all pooled.
    HuggingFace,
    /// `E² mean_e(f_e P_e)` \[1\], f from the first choice (GShard, Lepikhin et al. 2020; V-MoE).
    GShard,
    /// [`AuxLoss::TopK`] with f of all micro-batches of the step \[1\] (Qiu et al. 2025, arXiv:2501.11873). Every step of
    /// `hardmax train` is one batch, so that there it is the same.
    GlobalBatch,
    /// [`AuxLoss::TopK`] within each sequence, the mean over sequences \[1\] (DeepSeek-V2 and V3).
    Sequence,
    /// `CV²(Σ_t p_t)` \[0\], population variance over squared mean (Shazeer et al. 2017).
    Importance,
    /// `CV²(mean_t Φ((z_te - thr_t) / σ_te))` \[0\]: the chance of each expert to be chosen, were its noise drawn anew.
    /// thr is the k-th largest noisy logit, a constant as σ is (V-MoE, Riquelme et al. 2021).
    Load,
    /// `mean_t logsumexp(z_t)²` (ST-MoE, Zoph et al. 2022): keeps logits small. Of z itself, whatever τ.
    RouterZ,
    /// `mean_t H(p_t)`: sharpens the router. With a negative scale the entropy bonus of score-function training.
    TokenEntropy,
    /// `-H(mean_t p_t)` [-ln E]: spreads the router over the experts, token by token it may be sharp.
    MarginalEntropy,
    /// `mean_t H(p_t) - H(mean_t p_t)` [-ln E if sharp]: minus the mutual information of token and expert (Mod-Squad,
    /// Chen et al. 2022; DS-MoE).
    MutualInformation,
    /// `mean_t KL(p_ref ‖ p_t)` [0 at the teacher]: the router of a soft teacher to a hard student.
    RouterKl,
    /// `E Σ_e n_e/(k T) mean_t max(z_te, 0)`, n from all choices (ReMoE, Wang et al. 2024): few active experts, evenly.
    ReluL1,
}

impl AuxLoss {
    /// Every one, in the order in which they are listed to people.
    pub const ALL: [Self; 14] = [
        Self::Switch,
        Self::TopK,
        Self::HuggingFace,
        Self::GShard,
        Self::GlobalBatch,
        Self::Sequence,
        Self::Importance,
        Self::Load,
        Self::RouterZ,
        Self::TokenEntropy,
        Self::MarginalEntropy,
        Self::MutualInformation,
        Self::RouterKl,
        Self::ReluL1,
    ];

    /// As recipes and reports spell it.
    pub fn id(self) -> &'static str {
        match self {
            Self::Switch => "switch",
            Self::TopK => "top_k",
            Self::HuggingFace => "hugging_face",
            Self::GShard => "gshard",
            Self::GlobalBatch => "global_batch",
            Self::Sequence => "sequence",
            Self::Importance => "importance",
            Self::Load => "load",
            Self::RouterZ => "router_z",
            Self::TokenEntropy => "token_entropy",
            Self::MarginalEntropy => "marginal_entropy",
            Self::MutualInformation => "mutual_information",
            Self::RouterKl => "router_kl",
            Self::ReluL1 => "relu_l1",
        }
    }

    /// Whether a larger weight evens out the load: what the remedy that raises the balance weight may raise.
    pub fn balances(self) -> bool {
        !matches!(self, Self::RouterZ | Self::TokenEntropy | Self::RouterKl | Self::ReluL1)
    }

    /// How a balance loss counts, as checkpoints record it beside its weight: `normalised`, 1 at an even load, or
    /// `per_slot`, k there. `None` for losses without a product of shares and probabilities.
    pub fn convention(self) -> Option<&'static str> {
        match self {
            Self::Switch | Self::TopK | Self::GShard | Self::GlobalBatch | Self::Sequence => Some("normalised"),
            Self::HuggingFace => Some("per_slot"),
            _ => None,
        }
    }

    /// Whether f is that of all choices, so that it is the same for every expert, and the loss a constant, where all
    /// experts are chosen.
    pub fn counts_choices(self) -> bool {
        matches!(self, Self::TopK | Self::HuggingFace | Self::GlobalBatch | Self::Sequence)
    }

    /// The value; adds `scale · ∂value/∂z` to `dz [T, G]`. 0 for no token.
    ///
    /// A token whose logits are not finite is left out of every sum, T included.
    ///
    /// # Errors
    /// Slices whose lengths disagree, and input that lacks what this loss is made of: noise for `load`, a teacher for
    /// `router_kl`.
    pub fn value_and_grad(self, input: &LossInput<'_>, scale: f64, dz: &mut [f64]) -> Result<f64> {
        let view = View::new(input)?;
        if dz.len() != input.z.len() {
            return Err(Error::Internal(format!("a gradient of {} values for {} logits", dz.len(), input.z.len())));
        }
        let mut sink = Sink { scale, dz };
        Ok(match self {
            Self::Switch => balance::switch(&view, &mut sink),
            Self::TopK => balance::top_k(&view, &mut sink),
            Self::HuggingFace => balance::per_slot(&view, &mut sink),
            Self::GShard => balance::gshard(&view, &mut sink),
            Self::GlobalBatch => balance::global_batch(&view, &mut sink)?,
            Self::Sequence => balance::sequence(&view, &mut sink),
            Self::Importance => variation::importance(&view, &mut sink),
            Self::Load => variation::load(&view, &mut sink)?,
            Self::RouterZ => entropy::router_z(&view, &mut sink),
            Self::TokenEntropy => entropy::token(&view, &mut sink),
            Self::MarginalEntropy => entropy::marginal(&view, &mut sink),
            Self::MutualInformation => entropy::token(&view, &mut sink) + entropy::marginal(&view, &mut sink),
            Self::RouterKl => distill::router_kl(&view, &mut sink)?,
            Self::ReluL1 => balance::relu_l1(&view, &mut sink),
        })
    }
}

impl fmt::Display for AuxLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id())
    }
}

fn lacks(loss: AuxLoss, what: &str) -> Error {
    Error::Internal(format!("the loss {loss} was asked for without {what}"))
}

#[cfg(test)]
mod tests;
