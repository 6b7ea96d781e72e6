//! What a run tells while it goes on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::evaluate::{Figures, number, numbers};

/// What a run does, as it does it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// Something else begins.
    Phase(Phase),
    /// So many held-out tokens more were evaluated.
    Evaluated(usize),
    /// On all held-out text, of the model before.
    Baseline(Figures),
    /// A step is done.
    Step(Step),
    /// Figures after so many steps, on the first held-out tokens.
    Evaluation {
        /// Steps done.
        step: usize,
        /// Of the model as it would be served now.
        figures: Figures,
    },
}

/// What a run is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Figures of the model before.
    Baseline,
    /// Steps.
    Training,
    /// Figures on the way or after the last step.
    Evaluating,
    /// Its state goes to disk.
    Saving,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Steps done, this one included.
    pub step: usize,
    /// What was minimised: all losses with their weights. This and the next two in nats per token.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// Of the language model.
    #[serde(deserialize_with = "number")]
    pub lm_loss: f64,
    /// From the teacher, with its weight; `None` without one.
    pub distill_loss: Option<f64>,
    /// Auxiliary losses before their weights, by name.
    #[serde(deserialize_with = "numbers")]
    pub losses: BTreeMap<String, f64>,
    /// Before clipping; `None` where it was not finite and the step was skipped.
    pub grad_norm: Option<f64>,
    /// Of the routers alone.
    pub router_grad_norm: Option<f64>,
    /// Steps that were skipped, from the first on.
    pub skipped: usize,
    /// Peak learning rate at this step.
    pub learning_rate: f64,
    /// Temperature or width of the relaxation.
    pub sharpness: f64,
    /// By MoE layer: what the busiest expert received over its fair share. 1 is even.
    pub loads: Vec<f64>,
    /// Learned from in this step, over the time it took.
    pub tokens_per_second: f64,
    /// Until the last step, at the pace of this run so far.
    pub eta_seconds: f64,
}
