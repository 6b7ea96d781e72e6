//! What a router wants, as opposed to what ran: the same choice without what training adds to it.

use super::{Estimator, Relaxation, RoutedBatch, Selection, StepContext, relax};
use crate::moe::{choices::Choices, draw::Draw};

/// Choices of a batch without noise, exploration and capacity: what collapse is judged by.
///
/// Exploration gives every expert some rows, and re-routing fills each up to its capacity, however dead the router
/// holds it to be. Jitter has gone into the router outputs already and stays.
#[derive(Clone, Debug, PartialEq)]
pub struct Preference {
    /// [`Estimator::k`] of every token, under [`Selection::Support`] those with a weight; none of a token whose router
    /// outputs are not finite. The selection bias takes part: an expert that it keeps busy learns.
    pub choices: Choices,
    /// `[T, E]`, what a bias is added to for the choice: router logits, their sigmoids under [`Relaxation::Sigmoid`],
    /// the weights under [`Relaxation::SmoothStep`].
    pub scores: Vec<f64>,
}

impl Estimator {
    /// The preference behind `routed`, from the router outputs `z [T, G]` it was made of.
    pub fn preference(&self, z: &[f64], routed: &RoutedBatch) -> Preference {
        let bias = (!routed.bias.is_empty()).then_some(&routed.bias[..]);
        let clean = self.route(z, routed.experts, &StepContext { bias, ..StepContext::evaluate(Draw::new(0, 0, 0)) });
        let choices = match self.selection {
            // In order of weight: the first are those that hard routing would choose.
            Selection::All => Choices::from_rows((0..clean.tokens).map(|t| {
                let all = clean.rows().of(t);
                &all[..self.k().min(all.len())]
            })),
            Selection::TopK { .. } | Selection::Support => clean.wanted,
        };
        let mut scores = clean.seen;
        if let Relaxation::Sigmoid { temperature } = self.relaxation {
            scores.iter_mut().for_each(|z| *z = relax::sigmoid(*z / temperature));
        }
        Preference { choices, scores }
    }
}
