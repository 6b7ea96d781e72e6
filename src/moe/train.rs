//! The training forward of a MoE layer: router logits to weights by an estimator, and the experts that it asks for.

use super::{capacity::Capacity, estimator::Phase, explore::Exploration};

/// What a step adds to the policy, the same in all layers, and what layers remember from step to step.
#[derive(Clone, Debug)]
pub struct TrainState {
    /// Of all noise. Noise is a function of seed, step, layer, row and column: no generator is carried along.
    pub seed: u64,
    /// Steps done before this one.
    pub step: usize,
    /// Evaluation is without noise, exploration and capacity, and leaves the layers' memory alone.
    pub phase: Phase,
    /// Random changes of the choice.
    pub explore: Exploration,
    /// The router sees `x ⊙ u`, u uniform in `1 ± jitter` (Switch Transformer); the experts see x. 0 is none.
    pub jitter: f64,
    /// Most rows of an expert; `None` is dropless.
    pub capacity: Option<Capacity>,
    /// Rows from here on see no noise: the greedy copy of a self-critical baseline. `usize::MAX` is none.
    pub greedy_from: usize,
    /// By decoder layer, from 0; grows with the first forward.
    pub layers: Vec<LayerState>,
}

/// What one layer remembers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerState {
    /// `[E]`, added to the scores that experts are selected by, and to nothing else; empty is none.
    pub bias: Vec<f64>,
    /// `[E, D]`, running mean outputs of the experts; empty before the first step that needs them.
    pub means: Vec<f32>,
    /// `[E]`, whether an expert has had a row, so that its mean means anything.
    pub seen: Vec<bool>,
}
