//! What a cell leaves behind, and `results.json`. NaN and infinity never reach JSON: such a value is absent.

use serde::{Deserialize, Serialize};

use super::spec::{CellSpec, Settings};
use crate::moe::estimator;

/// Version of the form of `results.json`.
pub const RESULTS_VERSION: u32 = 1;

/// Everything that was measured: `results.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`RESULTS_VERSION`].
    pub version: u32,
    /// [`super::spec::LAB_VERSION`].
    pub lab: u32,
    /// On what it ran.
    pub machine: Machine,
    /// The command line, as it was given.
    pub command: String,
    /// Seconds from start to end of the last run; what earlier runs left behind is not in it.
    pub seconds: f64,
    /// Every planned cell, in the order of the plan.
    pub cells: Vec<CellRecord>,
}

/// What the figures depend on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Model name of the processor.
    pub cpu: String,
    /// Logical processors.
    pub cores: usize,
    /// Cells that ran at once.
    pub jobs: usize,
    /// Version of hardmax.
    pub hardmax: String,
    /// Commit it was built from, or `unknown`.
    #[serde(default)]
    pub git: String,
}

/// A cell and what became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CellRecord {
    /// What it was.
    pub spec: CellSpec,
    /// What measured it: not always what the last run was made by.
    #[serde(default)]
    pub by: By,
    /// Of a teacher: SHA-256 of the file of its weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
    /// What came out.
    pub outcome: Outcome,
}

/// The program and the processor that figures are from.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct By {
    /// Commit that the program was built from, or `unknown`.
    pub git: String,
    /// Model name of the processor.
    pub cpu: String,
}

impl CellRecord {
    /// Of a cell that leaves no weights.
    pub fn new(spec: CellSpec, by: By, outcome: Outcome) -> Self {
        Self { spec, by, weights: None, outcome }
    }
}

impl By {
    /// This program, here.
    pub fn this() -> Self {
        let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = text.lines().find_map(|line| line.strip_prefix("model name")).and_then(|rest| rest.split_once(':'));
        let cpu = name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned());
        Self { git: env!("HARDMAX_GIT").to_owned(), cpu }
    }
}

/// What became of a cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It trained and was measured.
    Trained(Box<CellResult>),
    /// It measured gradients ([`super::spec::TaskName::Gradient`]).
    Gradient(GradientResult),
    /// It ended with this error.
    Failed(String),
}

/// Measures of a trained cell. Losses are means over test rows: squared error per output, or nats.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CellResult {
    /// What it was run with.
    pub settings: Settings,
    /// Test loss.
    pub loss: ByRouting,
    /// Hard top-1 loss on rows that are neither trained on nor tested, where a task has some: to choose settings by.
    pub validation: Option<f64>,
    /// Share of right classes, where there are classes; of right next bytes for text.
    pub accuracy: Option<ByRouting>,
    /// Loss of the best constant prediction: the unit in which tables show losses.
    pub trivial: f64,
    /// Loss on the test rows of each domain, where the task has such: text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub domains: Vec<DomainLoss>,
    /// Relative distance of hard outputs from those of the training routing without noise: `‖y - y_hard‖ / ‖y‖`, pooled.
    pub rel_l2: Hardened,
    /// Routing weight outside the top-1, mean over tokens, under the training routing without noise.
    pub missed_mass: Option<f64>,
    /// Share of test tokens whose top-1 is the optimum, experts matched to regions as well as possible.
    pub agreement: Option<f64>,
    /// Normalised mutual information of top-1 and region.
    pub nmi: Option<f64>,
    /// Load of hard top-1 over fair share, `[E]`, on the test set; mean over layers.
    pub utilisation: Vec<f64>,
    /// Experts with a utilisation below 0.05; sum over layers.
    pub dead: usize,
    /// `max n / mean n - 1`; worst layer.
    pub max_vio: Option<f64>,
    /// Gini coefficient of the load; worst layer.
    pub gini: Option<f64>,
    /// `H(load) / ln E`; worst layer.
    pub load_entropy: Option<f64>,
    /// Mean entropy of `softmax(z)` per token, nats.
    pub router_entropy: Option<f64>,
    /// Gradient of the task's loss that reached the router.
    pub router_grad: RouterGradient,
    /// Rows pushed through experts in training forwards, counted, per token of a batch.
    pub executed_per_token: f64,
    /// What it should be in this run.
    pub executed_expected: Expected,
    /// Products of rows with experts in training, forward and backward, counted, per token of a batch: 3 where one expert
    /// runs and learns. What equal expert-FLOPs are equal in.
    pub products_per_token: f64,
    /// CPU time of one update, data included.
    pub step_ms: Duration,
    /// Growth of the process's resident memory while it trained, bytes, evaluation after the end apart; absent where the
    /// system does not say.
    pub peak_bytes: Option<u64>,
    /// Updates done.
    pub steps: usize,
    /// Seconds of the cell's process.
    pub seconds: f64,
    /// A loss or gradient was not finite: the run ended there.
    pub diverged: bool,
    /// What remedies did, one line each, at most 50.
    pub remedies: Vec<String>,
    /// Actions of remedies, all of them.
    pub remedy_actions: usize,
    /// Distance from the teacher's soft output ([`super::spec::Mode::Tune`]).
    pub fidelity: Option<Fidelity>,
    /// Over the run.
    pub curves: Curves,
}

/// A figure under three routings. Absent: not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ByRouting {
    /// The training routing, without noise.
    pub train: Option<f64>,
    /// Hard top-1.
    pub hard1: Option<f64>,
    /// Hard top-2.
    pub hard2: Option<f64>,
}

/// Test loss on a part of the data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DomainLoss {
    /// Which part.
    pub domain: String,
    /// Mean over its test rows.
    pub loss: ByRouting,
}

/// A figure under the two hard routings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Hardened {
    /// Top-1.
    pub hard1: Option<f64>,
    /// Top-2.
    pub hard2: Option<f64>,
}

/// Gradient of the router's weights: its size over the run, and its quality where the exact one can be enumerated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RouterGradient {
    /// Mean L2 norm over the steps, before clipping.
    pub norm: Option<f64>,
    /// `‖mean - exact‖ / ‖exact‖`, the mean over [`super::probe::DRAWS`] draws; it holds the noise of that mean,
    /// [`super::quality::Bias`] does not.
    pub bias: Option<f64>,
    /// Cosine of mean and exact.
    pub cosine: Option<f64>,
    /// `√(E‖g - mean‖²) / ‖exact‖` of a single draw; 0 for deterministic estimators.
    pub std: Option<f64>,
}

/// Experts that a training forward should execute per token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Expected {
    /// As many.
    Exactly(f64),
    /// Between 0 and as many: the estimator decides per token.
    AtMost(f64),
    /// One, whose weights are merged from all.
    Merged,
}

/// Milliseconds of CPU time. Cells share caches and memory, so the median says more than the mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Duration {
    /// Half of the steps took longer.
    pub median: f64,
    /// A tenth of the steps took longer.
    pub p90: f64,
}

/// Hard top-1 output against the soft output of the teacher.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Fidelity {
    /// Pooled relative L2 distance of outputs (logits, where there are classes).
    pub rel_l2: Option<f64>,
    /// Mean `KL(teacher ‖ student)` of classes, nats.
    pub kl: Option<f64>,
    /// Share of rows with the teacher's most probable class.
    pub agreement: Option<f64>,
}

/// Values along the run, on a part of the test rows, the same at every point; all columns as long as `step`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Curves {
    /// Updates done.
    pub step: Vec<usize>,
    /// Test loss under the training routing.
    pub loss: Vec<Option<f64>>,
    /// Test loss under hard top-1.
    pub hard1: Vec<Option<f64>>,
    /// Pooled relative L2 distance between the two.
    pub gap: Vec<Option<f64>>,
    /// Temperature, width or whatever sharpens the estimator; absent if nothing does.
    pub sharpness: Vec<Option<f64>>,
    /// Mean norm of the router's gradient since the point before.
    pub grad_norm: Vec<Option<f64>>,
    /// Share of hard top-1 per expert, `[E]` each; first routed layer.
    pub load: Vec<Vec<f64>>,
}

/// Quality of an estimator's gradient on [`super::spec::TaskName::Gradient`]: medians over the problems.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GradientResult {
    /// Temperature or width in force: schedules stand half-way. Absent where there is none.
    pub sharpness: Option<f64>,
    /// Factor on the noise in force; absent where there is none to set.
    pub noise: Option<f64>,
    /// Squared error.
    pub quadratic: GradientQuality,
    /// Cross-entropy.
    pub cross_entropy: GradientQuality,
}

/// Against the exact gradient of the expected loss under random routing, `p ⊙ (f - <p, f>)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GradientQuality {
    /// `‖mean - exact‖ / ‖exact‖`, the mean over as many draws as the cell's batch; it holds the noise of that mean,
    /// [`super::quality::Bias`] does not.
    pub bias: Option<f64>,
    /// Cosine of mean and exact; a mean of 0 counts as 0, and is absent if all are.
    pub cosine: Option<f64>,
    /// `√(E‖g - mean‖²) / ‖exact‖`; 0 for deterministic estimators.
    pub std: Option<f64>,
    /// First and third quartile of [`Self::bias`] over the problems.
    #[serde(default)]
    pub bias_quartiles: Option<[f64; 2]>,
    /// First and third quartile of [`Self::std`] over the problems.
    #[serde(default)]
    pub std_quartiles: Option<[f64; 2]>,
}

/// `x`, if JSON has a form for it.
pub fn finite(x: f64) -> Option<f64> {
    x.is_finite().then_some(x)
}

/// `x` to five digits, if JSON has a form for it: for curves, which are many numbers to look at.
pub fn brief(x: f64) -> Option<f64> {
    finite(x).and_then(|x| format!("{x:.4e}").parse().ok())
}

impl CellResult {
    /// Growth of memory, MiB.
    pub fn peak_mib(&self) -> Option<f64> {
        self.peak_bytes.map(|bytes| bytes as f64 / f64::from(1 << 20))
    }

    /// What hardening costs: hard loss minus the loss of the training routing, per kind.
    pub fn gap(&self) -> Hardened {
        let over = |hard: Option<f64>| Some(hard? - self.loss.train?);
        Hardened { hard1: over(self.loss.hard1), hard2: over(self.loss.hard2) }
    }
}

impl Default for Expected {
    fn default() -> Self {
        Self::Exactly(0.0)
    }
}

impl From<estimator::Expected> for Expected {
    fn from(expected: estimator::Expected) -> Self {
        match expected {
            estimator::Expected::Exactly(n) => Self::Exactly(n as f64),
            estimator::Expected::AtMost(n) => Self::AtMost(n as f64),
            estimator::Expected::Merged => Self::Merged,
        }
    }
}
