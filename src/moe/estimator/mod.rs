//! Estimators: ways to train a router whose choice is hard, as data.
//!
//! For every estimator the experts' outputs enter the loss through weights, `y_t = Σ_e w_te Y_te`, and the gradient of the
//! weights is the *credit* `c_te = <∂L/∂y_t, Y_te>`. What remains is a rule from router outputs to weights (the forward)
//! and a linear map from credit to the gradient of the router outputs (the backward). Both are made of the same few parts,
//! which [`Estimator`] names; [`catalog`] is the table of the methods with a name.
//!
//! Plain f64 on slices: the numbers are T·E per layer, so they cost nothing, and training, laboratory and tests run the
//! same code. Schedules are resolved before: the maths sees numbers. Noise is a function of its place
//! ([`Draw`]).
//!
//! | rule | forward weights `w` | backward, `J` the vector-Jacobian product of the relaxation `p` |
//! |---|---|---|
//! | [`Weights::Relaxed`] | `p` | [`Gradient::Exact`]: `J c` |
//! | [`Weights::Chosen`] | `p ⊙ m`, m = 1 where chosen | [`Gradient::Exact`]: `J (c ⊙ m)` |
//! | [`Weights::Renorm`] | `g = p ⊙ m / n`, n their sum | [`Gradient::Exact`]: `J (((c - <g,c>) ⊙ m) / n)` |
//! | [`Weights::Unit`] | `m / n`, n the number of the chosen | [`Gradient::Exact`]: 0 |
//! | any | | [`Gradient::Zero`]: 0 |
//! | any | | [`Gradient::StraightThrough`]: `J c`, of the chosen `J (c ⊙ m)` |
//! | [`Weights::Unit`] | | [`Gradient::ReinMax`]: `2 J(π) c - ½ J(p) c`, `π = ½ (p + m)` |
//! | [`Weights::Corrected`] | `s p̃`, one draw after the other, s 1 or ⅓ | [`Gradient::Corrected`]: `J (c ⊙ m)` of each draw, twice that if `star` |
//! | any | | [`Gradient::Score`]: as exact, and `advantage · ∇ log π` |

mod batch;
pub mod catalog;
mod config;
mod dselect;
mod entmax;
mod preference;
mod regulariser;
mod relax;
mod route;
mod select;
mod served;
mod soft_topk;
mod surrogate;
mod values;

use std::ops::Range;

pub(crate) use self::config::distance;
pub use self::{
    batch::RoutedBatch,
    catalog::Needs,
    config::{ChoiceChange, EstimatorConfig, EstimatorSpec, Param, Purpose},
    preference::Preference,
    regulariser::Regulariser,
};
use super::{capacity::Capacity, draw::Draw, explore::Exploration, policy::WeightForm};

/// One way to route and to differentiate it: parts and numbers, schedules already resolved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimator {
    /// Differentiable weights `p(z)` of all experts, and their vector-Jacobian product.
    pub relaxation: Relaxation,
    /// What is added to the router logits, and who sees it.
    pub noise: Noise,
    /// Which experts are chosen.
    pub selection: Selection,
    /// What the output of a chosen expert is multiplied by.
    pub weights: Weights,
    /// The gradient of the router outputs, from the credit.
    pub gradient: Gradient,
    /// How outputs of experts become the output of the layer.
    pub combine: Combine,
    /// Weights of the chosen when the trained router is served with hard top-k.
    pub serve: WeightForm,
}

/// Weights of all experts as a differentiable function of the router outputs. All numbers are above 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Relaxation {
    /// `softmax(z / temperature)`.
    Softmax {
        /// 1 is the plain softmax; towards 0 it becomes one-hot.
        temperature: f64,
    },
    /// `σ(z / temperature)`, each expert by itself.
    Sigmoid {
        /// Width of the step.
        temperature: f64,
    },
    /// `σ((z - θ) / temperature)` over its sum, θ half-way between the k-th and the next logit.
    SteepSigmoid {
        /// Width of the step; towards 0 the k largest get 1/k each.
        temperature: f64,
        /// Experts above the threshold, below E.
        k: usize,
    },
    /// α-entmax (Peters et al. 2019): `[(α-1) z / temperature - t]_+^(1/(α-1))`, t such that the sum is 1.
    ///
    /// Its experts per token are its support: there is no k. Hard top-1 gives weight 1, as its limit does. Hard top-2
    /// is another function: it renormalises entmax over the two largest logits, and the second has weight 0 where the
    /// support is one expert. A checkpoint would renormalise the softmax over them instead, where neither weight is 0,
    /// and so is served with one.
    Entmax {
        /// In (1, 2]; 2 is sparsemax (Martins and Astudillo 2016).
        alpha: f64,
        /// As in softmax.
        temperature: f64,
    },
    /// `F((z - b) / width) / k`, b such that the sum is 1.
    SoftTopK {
        /// The distribution function F.
        kernel: Kernel,
        /// Width of the step; towards 0 the k largest get 1/k each.
        width: f64,
        /// Experts per token, below E.
        k: usize,
    },
    /// k softmaxes, each without what the ones before it took, summed and divided by k (Xie and Ermon 2019).
    KHot {
        /// Of each softmax.
        temperature: f64,
        /// Softmaxes.
        k: usize,
    },
    /// `softmax(z / temperature)` of the logits near the largest one (Liu et al. 2023), 0 elsewhere.
    MaskedSoftmax {
        /// How near: relative distance, half of it in either form of the mask.
        r: f64,
        /// As in softmax.
        temperature: f64,
        /// How the distance is measured.
        mask: Mask,
    },
    /// `Σ_s softmax(v)_s r_s`: k selectors, each a product of smoothed bits (Hazimeh et al. 2021). The router has
    /// `k (1 + ⌈log2 E⌉)` outputs: the k scores v, then the bits of each selector, lowest first.
    SmoothStep {
        /// Width of the smoothed step of a bit.
        gamma: f64,
        /// Selectors.
        k: usize,
    },
    /// `max(z, 0)` (Wang et al. 2024).
    Relu,
}

/// Distribution function of [`Relaxation::SoftTopK`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Of the Laplace distribution: LapSum (Struski et al. 2025).
    Laplace,
    /// The logistic function: entropic optimal transport (Xie et al. 2020).
    Logistic,
    /// The identity clipped to `[0, 1]`: SparseK (Lou et al. 2024). Gives exact zeros and ones.
    Clip,
}

/// Which logits [`Relaxation::MaskedSoftmax`] keeps; `z*` is the largest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// `(z* - z) / max(|z|, z*) <= 2r`, as in the code released with PhiMoE.
    Code,
    /// `z* - z <= r (|z| + |z*|)`, as in the paper on GRIN.
    Paper,
}

/// Randomness on the router logits, in training only.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Noise {
    /// Its distribution.
    pub kind: NoiseKind,
    /// Factor on the noise, at least 0.
    pub scale: f64,
    /// Who sees it.
    pub scope: Scope,
    /// Probability that an expert is left out for a token, in `[0, 1)`: its logit is -inf.
    pub dropout: f64,
}

/// Distribution of the noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoiseKind {
    /// Zero.
    None,
    /// Standard Gumbel: the largest noisy logit is then a draw from the softmax.
    Gumbel,
    /// Normal with a learned deviation, `softplus` of router outputs E..2E and 0.01 (Shazeer et al. 2017).
    ///
    /// Serving is without noise, so that a checkpoint holds rows 0..E of the router, the logits; rows E..2E are not
    /// saved, and training cannot go on from it.
    Learned,
}

/// Who sees the noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The choice of experts only.
    Selection,
    /// The relaxation too.
    Both,
}

/// Which experts are chosen. A sample from the softmax is Gumbel noise and top-1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    /// All.
    All,
    /// The k largest, ties by the lowest index.
    TopK {
        /// Experts per token.
        k: usize,
    },
    /// Those whose relaxed weight is above 0.
    Support,
}

/// Weights of the chosen in the training forward; m is 1 where an expert is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// `p`, of those not chosen too.
    Relaxed,
    /// `p ⊙ m`.
    Chosen,
    /// `p ⊙ m` over its sum.
    Renorm,
    /// 1 over the number of experts that the token has, the same for each: `1/k`, or more where capacity dropped some
    /// of the k. At k = 1 it is 1. No function of the router outputs.
    Unit,
    /// `s p̃`: the masked softmax at each draw, times 1 for the largest logit and otherwise 1 or ⅓ by a coin.
    Corrected {
        /// The variant with the halved logits: its coin comes up with probability ⅝ instead of ¼.
        star: bool,
    },
}

/// The rule for the gradient of the router outputs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gradient {
    /// None.
    Zero,
    /// Of the weights, with the choice held fixed.
    Exact,
    /// As if the weights had been the relaxation.
    StraightThrough {
        /// As if they had been the relaxation over the sum of the chosen: for [`Weights::Renorm`].
        normalised: bool,
    },
    /// Second order (Liu et al. 2023): Heun's method between the relaxation and the draw.
    ReinMax,
    /// Of the weights without the coin (Liu et al. 2024). In expectation over the coin the credit of a draw is integrated
    /// by Heun's third-order method from no output to its own, which makes it the gradient of the choice, of the starred
    /// variant that of the weight too; exact for cubic losses. The largest logit has no coin, and the gradient of its
    /// weight only, twice that if starred.
    Corrected {
        /// As in [`Weights::Corrected`].
        star: bool,
    },
    /// Of the weights, with the choice held fixed, and the score function of the choice (Williams 1992).
    Score {
        /// What is subtracted from the loss.
        baseline: Baseline,
        /// Draws per token.
        samples: usize,
    },
}

/// What a score function subtracts from the loss of a draw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Baseline {
    /// Nothing.
    None,
    /// A moving average over steps.
    MovingAverage {
        /// Weight of the past, in (0, 1).
        decay: f64,
    },
    /// The mean of the other draws of the same token; needs two at least.
    LeaveOneOut,
    /// The loss of the choice without noise; costs one more forward.
    SelfCritical,
}

/// How outputs of experts become the output of the layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Combine {
    /// `Σ_e w_e Y_e`.
    Mixture(Execution),
    /// The chosen run; of the others the running mean of their outputs stands in (Panda et al. 2025).
    Means {
        /// Weight of the past, in (0, 1).
        decay: f64,
    },
    /// One expert with the parameters `Σ_e w_e θ_e` (Muqeeth et al. 2023).
    Merged,
}

/// Which experts run in the training forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Execution {
    /// The chosen.
    Chosen,
    /// All: the others run for their credit, and get no gradient of their own where their weight is 0.
    All,
}

/// Training or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// With noise, exploration and capacity.
    Train,
    /// Without.
    Evaluate,
}

/// What the step adds: numbers of the run, not of the method.
#[derive(Clone, Copy, Debug)]
pub struct StepContext<'a> {
    /// Random numbers of this layer in this step.
    pub draw: Draw,
    /// Whether there is noise at all.
    pub phase: Phase,
    /// `[E]`, added for top-k selection only, never to weights: loss-free balancing (Wang et al. 2024).
    pub bias: Option<&'a [f64]>,
    /// Epsilon-greedy choice and expert dropout.
    pub explore: Exploration,
    /// Limit of tokens per expert, for top-k selection, in each copy of the data by itself.
    pub capacity: Option<Capacity>,
    /// Rows of one copy of the data, above 0, where the batch is several of them ([`Estimator::copies`]); else
    /// `usize::MAX`.
    pub copy_rows: usize,
}

impl StepContext<'_> {
    /// Training without exploration, bias or capacity.
    pub fn train(draw: Draw) -> Self {
        Self { phase: Phase::Train, ..Self::evaluate(draw) }
    }

    /// The noise-free routing; `draw` is not looked at.
    pub fn evaluate(draw: Draw) -> Self {
        Self { draw, phase: Phase::Evaluate, bias: None, explore: Exploration::default(), capacity: None, copy_rows: usize::MAX }
    }
}

/// Experts that run per token in the training forward, as the method's definition has it. What did run is counted by
/// whoever runs them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// So many.
    Exactly(usize),
    /// The support of the relaxation, at most so many.
    AtMost(usize),
    /// One, merged from all.
    Merged,
}

impl Noise {
    /// No noise.
    pub const NONE: Self = Self { kind: NoiseKind::None, scale: 0.0, scope: Scope::Selection, dropout: 0.0 };
}

impl Estimator {
    /// Outputs of the router for `experts` experts, G: E, or more where the method has further columns.
    pub fn router_width(&self, experts: usize) -> usize {
        match (self.relaxation, self.noise.kind) {
            (Relaxation::SmoothStep { k, .. }, _) => k * (1 + relax::bits(experts)),
            (_, NoiseKind::Learned) => 2 * experts,
            _ => experts,
        }
    }

    /// Router outputs whose rows begin at 0: those of learned noise, so that every expert begins with the same.
    pub fn noise_outputs(&self, experts: usize) -> Range<usize> {
        if self.noise.kind == NoiseKind::Learned { experts..2 * experts } else { 0..0 }
    }

    /// Experts per token; 1 for methods without a k.
    pub fn k(&self) -> usize {
        match (self.selection, self.relaxation) {
            (Selection::TopK { k }, _) => k,
            (
                _,
                Relaxation::SteepSigmoid { k, .. }
                | Relaxation::SoftTopK { k, .. }
                | Relaxation::KHot { k, .. }
                | Relaxation::SmoothStep { k, .. },
            ) => k,
            _ => 1,
        }
    }

    /// Whether a fixed number of experts is chosen by largest score: what bias, epsilon and capacity act on.
    pub fn chooses_top_k(&self) -> bool {
        matches!(self.selection, Selection::TopK { .. })
    }

    /// Forward passes per token of the data: draws of a score function, and its self-critical baseline.
    pub fn copies(&self) -> usize {
        match self.gradient {
            Gradient::Score { baseline: Baseline::SelfCritical, samples } => samples + 1,
            Gradient::Score { samples, .. } => samples,
            _ => 1,
        }
    }

    /// First row of the greedy copy in a batch of [`Estimator::copies`] of `copy_rows` rows each: from there on there
    /// is no noise, no jitter and no exploration. `usize::MAX` where no copy is greedy.
    pub fn greedy_from(&self, copy_rows: usize) -> usize {
        match self.gradient {
            Gradient::Score { baseline: Baseline::SelfCritical, samples } => samples.saturating_mul(copy_rows),
            _ => usize::MAX,
        }
    }

    /// Experts that run per token of the data in training, over all [`Estimator::copies`].
    pub fn executed_per_token(&self, experts: usize) -> Expected {
        match (self.combine, self.selection) {
            (Combine::Merged, _) => Expected::Merged,
            (Combine::Mixture(Execution::All), _) | (_, Selection::All) => Expected::Exactly(experts * self.copies()),
            (_, Selection::TopK { k }) => Expected::Exactly(k.min(experts) * self.copies()),
            (_, Selection::Support) => Expected::AtMost(experts * self.copies()),
        }
    }
}

#[cfg(test)]
mod tests;
