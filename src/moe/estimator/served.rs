//! How a trained router is served, and what a checkpoint says of its training.

use super::{Combine, Estimator, Execution, Gradient, Noise, NoiseKind, Relaxation, Selection, Weights};
use crate::{model::ReferenceRouting, moe::policy::WeightForm};

impl Estimator {
    /// What is served: the `k` largest logits without noise (under [`Relaxation::SmoothStep`] the `k` largest weights),
    /// ties to the lowest index, weighted as [`Estimator::serve`] says. Draws from masked softmaxes keep their own
    /// weights.
    ///
    /// Weights are those of the relaxation. A checkpoint has the softmax only, so that beyond top-1 it is another
    /// function for relaxations that are none, unless they serve with equal weights: see [`Relaxation::Entmax`].
    pub fn hard(&self, k: usize) -> Self {
        let weights = match (self.weights, self.serve) {
            (weights @ Weights::Corrected { .. }, _) => weights,
            (_, WeightForm::Raw) => Weights::Chosen,
            (_, WeightForm::Renorm) => Weights::Renorm,
            (_, WeightForm::Unit) => Weights::Unit,
        };
        let relaxation = match self.relaxation {
            Relaxation::Softmax { .. } => Relaxation::Softmax { temperature: self.folding() },
            other => other,
        };
        Self {
            relaxation,
            noise: Noise { scale: 0.0, dropout: 0.0, ..self.noise },
            selection: Selection::TopK { k },
            weights,
            gradient: Gradient::Zero,
            combine: Combine::Mixture(Execution::Chosen),
            ..*self
        }
    }

    /// What the router is divided by when it is saved, so that the plain softmax of what is on disk has the
    /// probabilities that it was trained with. 1 for relaxations that are no softmax.
    pub fn folding(&self) -> f64 {
        if matches!(self.relaxation, Relaxation::Softmax { .. }) { self.temperature() } else { 1.0 }
    }

    /// τ of the `softmax(z / τ)` that the method routes by: of what it draws from, where it draws its experts; else of
    /// its relaxation, if that is a softmax; else 1.
    ///
    /// A method may have a temperature that shapes its gradient alone: `gumbel_st` draws from `softmax(z / noise)`, and
    /// ReinMax from `softmax(z)`.
    pub fn temperature(&self) -> f64 {
        match (self.noise, self.relaxation) {
            (Noise { kind: NoiseKind::Gumbel, scale, .. }, _) if scale > 0.0 && self.chooses_top_k() => scale,
            (
                _,
                Relaxation::Softmax { temperature } | Relaxation::MaskedSoftmax { temperature, .. } | Relaxation::KHot { temperature, .. },
            ) => temperature,
            _ => 1.0,
        }
    }

    /// What a checkpoint that is served with `serve_k` experts is compared with, its router divided by
    /// [`Estimator::folding`]: the mixture that was trained where it is one of the softmax, else hard routing to
    /// [`Estimator::k`] experts. That is the limit of a steep sigmoid or a soft top-k, whose mixture no checkpoint can
    /// hold.
    pub fn reference(&self, serve_k: usize) -> ReferenceRouting {
        match (self.relaxation, self.selection, self.weights) {
            (Relaxation::Softmax { .. }, Selection::All, Weights::Relaxed) => ReferenceRouting::Soft { temperature: 1.0 },
            _ if self.k() != serve_k => ReferenceRouting::TopK { k: self.k() },
            _ => ReferenceRouting::OwnTopK { assumed: false },
        }
    }
}
