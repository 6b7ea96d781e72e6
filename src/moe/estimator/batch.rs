//! The result of a forward: who is chosen, with which weight, and what the backward needs of it.

use super::{Execution, relax};
use crate::moe::{
    RoutingStats,
    capacity::CapacityReport,
    choices::{ChoiceRows, Choices},
};

/// A routed batch of T rows. Matrices are row-major.
#[derive(Clone, Debug)]
pub struct RoutedBatch {
    /// E.
    pub experts: usize,
    /// T.
    pub tokens: usize,
    /// `[T, E]`, weights of the forward.
    pub weights: Vec<f64>,
    /// `[T + 1]`; the chosen of token t are `chosen[offsets[t] .. offsets[t + 1]]`, after capacity.
    pub offsets: Vec<u32>,
    /// `[R]`, within a token in order of choice. None of a token whose router outputs are not finite.
    pub chosen: Vec<u32>,
    /// Which experts have to run; has no meaning under [`Combine::Merged`](super::Combine::Merged).
    pub execution: Execution,
    /// What capacity changed.
    pub capacity: CapacityReport,
    /// Choices before capacity.
    pub(super) wanted: Choices,
    /// `[T, E]`, relaxed weights p.
    pub(super) relaxed: Vec<f64>,
    /// `[T, E]`, where p was evaluated; `[T, G]` under [`SmoothStep`](super::Relaxation::SmoothStep).
    pub(super) point: Vec<f64>,
    /// `[T, E]`, what the choice was made on, without bias; of draws one after the other, the first.
    pub(super) seen: Vec<f64>,
    /// `[T, E]`, standard normals times scale; only of learned noise.
    pub(super) normals: Vec<f64>,
    /// Deviation of learned noise, `[T, E]`; empty for other noise or none.
    pub(super) deviation: Vec<f64>,
    /// `[E]`, bias of the choice; empty for none.
    pub(super) bias: Vec<f64>,
    /// Every expert is chosen everywhere, so that the choice tells nothing about load.
    pub(super) dense: bool,
}

impl RoutedBatch {
    /// The chosen, as rows.
    pub fn rows(&self) -> ChoiceRows<'_> {
        ChoiceRows { offsets: &self.offsets, chosen: &self.chosen }
    }

    /// What was chosen before capacity took from it: the load that balancing is about.
    pub fn wanted(&self) -> ChoiceRows<'_> {
        self.wanted.rows()
    }

    /// Relaxed weights `[T, E]`.
    pub fn relaxed(&self) -> &[f64] {
        &self.relaxed
    }

    /// Logits `[T, E]` that the choice was made on, with noise and without bias.
    pub fn seen(&self) -> &[f64] {
        &self.seen
    }

    /// `[T, E]`, standard deviation of the normal noise in [`RoutedBatch::seen`]. `None` for other noise or none.
    pub fn deviation(&self) -> Option<&[f64]> {
        (!self.deviation.is_empty()).then_some(&self.deviation)
    }

    /// Load of the routed batch, from the router outputs `z` it was made of.
    ///
    /// Where all experts are chosen, a token counts for the one with its largest weight, which hard top-1 would choose.
    pub fn stats(&self, z: &[f64]) -> RoutingStats {
        let CapacityReport { dropped, rerouted } = self.capacity;
        let mut stats = RoutingStats { dropped, rerouted, ..RoutingStats::new(self.experts) };
        let width = z.len().checked_div(self.tokens).unwrap_or(0);
        let mut p = vec![0.0; self.experts];
        for (row, z) in z.chunks_exact(width.max(1)).enumerate() {
            stats.tokens += 1;
            if !finite(z) {
                stats.non_finite += 1;
                continue;
            }
            let chosen = self.rows().of(row);
            for &e in if self.dense { chosen.get(..1).unwrap_or(&[]) } else { chosen } {
                stats.routes += 1;
                stats.expert_tokens[e as usize] += 1;
            }
            let weights = &self.weights[row * self.experts..][..self.experts];
            stats.expert_weights.iter_mut().zip(weights).for_each(|(sum, w)| *sum += w);
            // Router outputs that are no logits have no softmax: then it is the entropy of the weights.
            if self.point.len() == self.relaxed.len() {
                relax::softmax(&z[..self.experts], 1.0, &mut p);
            } else {
                p.copy_from_slice(&self.relaxed[row * self.experts..][..self.experts]);
            }
            stats.entropy_sum += p.iter().map(|&p| if p > 0.0 { -p * p.ln() } else { 0.0 }).sum::<f64>();
        }
        stats
    }
}

impl RoutedBatch {
    pub(super) fn relaxed_row(&self, token: usize) -> &[f64] {
        &self.relaxed[token * self.experts..][..self.experts]
    }

    pub(super) fn weights_row(&self, token: usize) -> &[f64] {
        &self.weights[token * self.experts..][..self.experts]
    }

    pub(super) fn point_row(&self, token: usize) -> &[f64] {
        let width = self.point.len().checked_div(self.tokens).unwrap_or(0);
        &self.point[token * width..][..width]
    }
}

/// Relaxed weight of the chosen together.
pub(super) fn mass(p: &[f64], chosen: &[u32]) -> f64 {
    chosen.iter().map(|&e| p[e as usize]).sum()
}

pub(super) fn finite(z: &[f64]) -> bool {
    z.iter().all(|z| z.is_finite())
}
