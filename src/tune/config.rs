//! What a tuning run is told: a recipe in TOML, every field of which has a default.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{gates::Gates, select::Target};
use crate::{
    moe::estimator::Param,
    schedule::{Schedule, Shape},
    train::config::OptimizerConfig,
};

/// A tuning run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TuneConfig {
    /// What learns: `router`, `router+experts`, `all`, or names.
    pub target: Target,
    /// How routers learn.
    pub routing: TuneRouting,
    /// AdamW.
    pub optimizer: TuneOptimizer,
    /// Length, text, evaluation.
    pub run: TuneRun,
    /// The model as it was, under its reference routing, as the teacher. Left out: the next token is all that is learned from.
    pub distill: Option<Distill>,
    /// Ends a run that has stopped to get better. Left out: it runs to its last step, and the last weights are the result.
    pub stop: Option<EarlyStop>,
    /// What the result must be to be served.
    pub gates: Gates,
}

/// How routers learn. Keys that are none of these fields are parameters of the estimator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TuneRouting {
    /// A row of the catalogue.
    pub estimator: String,
    /// Experts per token in training, where the estimator has a choice; left out: its default.
    pub k: Option<usize>,
    /// Weights of auxiliary losses by name, each the mean over layers whose router learns.
    pub losses: BTreeMap<String, Schedule>,
    /// Parameters of the estimator by name. The temperature of `soft`, where it is none of them, falls from 1 to [`COLDEST`]: at a
    /// constant one the mixture becomes better and the own gap stays.
    #[serde(flatten)]
    pub params: BTreeMap<String, Param>,
}

/// Where the temperature of `soft` ends, unless it is set.
pub const COLDEST: f64 = 0.1;

/// AdamW and its learning rates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TuneOptimizer {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Learning rate of routers over it.
    pub router_rate: f64,
    /// Learning rate of routed experts over it.
    pub expert_rate: f64,
    /// Last learning rate over the peak.
    pub final_ratio: f64,
    /// Steps of linear warm-up; left out: a tenth of the steps, at most 10.
    pub warmup_steps: Option<usize>,
    /// Decoupled; matrices only.
    pub weight_decay: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Gradients are scaled down to this global norm.
    pub clip_norm: f64,
}

/// Length, text, evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TuneRun {
    /// Optimizer steps.
    pub steps: usize,
    /// Windows of text per step.
    pub windows: usize,
    /// Windows that are run together: fewer take less memory. The loss is the mean over such parts, which is the same but for rounding where it
    /// is a mean over tokens; balance losses see one part at a time, and what is drawn is drawn otherwise.
    pub micro_windows: usize,
    /// Tokens of a window; left out: the context of the model, at most 512.
    pub window_tokens: Option<usize>,
    /// Of everything random.
    pub seed: u64,
    /// Steps between evaluations.
    pub eval_every: usize,
    /// Held-out tokens of an evaluation during the run. Before and after it takes all.
    pub eval_tokens: usize,
    /// Steps between saved states, where they are kept.
    pub save_every: usize,
    /// Share of the text that is held out, where no text of its own is.
    pub heldout_share: f64,
    /// Steps in a row without finite gradients after which the run fails.
    pub skip_limit: usize,
    /// What of a forward is worked out again for the backward instead of kept.
    pub recompute: Recompute,
    /// The run ends after so many seconds of training, whatever the step: what it learned then depends on the clock.
    pub max_seconds: Option<f64>,
    /// A run that would take more is refused; left out: what the machine has.
    pub max_memory_bytes: Option<u64>,
    /// The routing that is to be served, as `--routing` spells it; left out: the model's own.
    pub serving: Option<String>,
    /// What the model is to be true to; left out: what the checkpoint says that it was trained under, and `soft:1` where it says nothing.
    pub reference: Option<String>,
}

impl TuneConfig {
    /// The same without what leaves the weights alone: how often one looks at them, where that does not end the run, and when it is
    /// given up.
    pub fn essence(&self) -> Self {
        let mut run = TuneRun { save_every: 0, skip_limit: 0, max_seconds: None, max_memory_bytes: None, ..self.run.clone() };
        if self.stop.is_none() {
            (run.eval_every, run.eval_tokens) = (0, 0);
        }
        Self { run, gates: Gates::default(), ..self.clone() }
    }
}

/// What of a forward is worked out again for the backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// Nothing: all activations are kept.
    #[default]
    None,
    /// Each layer from its input, which alone is kept: a third more time, and the activations of one layer instead of all.
    Layer,
}

/// When a run has stopped to get better: by the loss on held-out text under the serving routing, at each evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EarlyStop {
    /// The run ends after so many evaluations in a row that were not better than the best. The best weights are the result.
    pub patience: usize,
    /// By how much the loss must fall to be better, nats per token.
    pub min_change: f64,
}

impl Default for EarlyStop {
    fn default() -> Self {
        Self { patience: 3, min_change: 0.0 }
    }
}

/// Learning from the model as it was.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Distill {
    /// Of `KL(teacher ‖ student)`, above 0.
    pub weight: f64,
    /// Of the loss on next tokens beside it; with 0 no labels count.
    pub lm_weight: f64,
}

impl Default for TuneRouting {
    fn default() -> Self {
        Self { estimator: "soft".into(), k: None, losses: BTreeMap::new(), params: BTreeMap::new() }
    }
}

impl TuneRouting {
    /// The parameters, with what stands for those that are not set.
    pub fn params(&self) -> BTreeMap<String, Param> {
        let mut params = self.params.clone();
        if self.estimator == "soft" {
            params.entry("temperature".into()).or_insert(Param::Schedule(Schedule::new(Shape::Exp, 1.0, COLDEST)));
        }
        params
    }
}

impl Default for TuneOptimizer {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            router_rate: 1.0,
            expert_rate: 0.3,
            final_ratio: 0.05,
            warmup_steps: None,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.95,
            clip_norm: 1.0,
        }
    }
}

impl TuneOptimizer {
    /// What AdamW is told for a run of `steps`.
    pub fn adam(&self, steps: usize) -> OptimizerConfig {
        let &Self { learning_rate, final_ratio, warmup_steps, weight_decay, beta1, beta2, clip_norm, .. } = self;
        let warmup_steps = warmup_steps.unwrap_or((steps / 10).min(10));
        OptimizerConfig { learning_rate, final_ratio, warmup_steps, weight_decay, beta1, beta2, clip_norm }
    }
}

impl Default for TuneRun {
    fn default() -> Self {
        Self {
            steps: 300,
            windows: 16,
            micro_windows: 1,
            window_tokens: None,
            seed: 0,
            eval_every: 50,
            eval_tokens: 8192,
            save_every: 25,
            heldout_share: 0.05,
            skip_limit: 20,
            recompute: Recompute::None,
            max_seconds: None,
            max_memory_bytes: None,
            serving: None,
            reference: None,
        }
    }
}

impl Default for Distill {
    fn default() -> Self {
        Self { weight: 1.0, lm_weight: 1.0 }
    }
}
