//! What a run should execute, and what it is charged when arms are given equal expert-FLOPs.
//!
//! A row costs one product of an expert's weights forward and two backward: for the weights, and for what was put in, as in
//! a net with layers below. An expert that runs for the router's gradient alone has weight 0: the small net leaves its
//! backward out, the decoder, which runs all experts as one matmul, does not. Both are charged what they do.

use super::{
    arm::Route,
    results::Expected,
    spec::{Budget, CellSpec, TaskName},
};
use crate::moe::estimator::{self, Combine, Estimator, Weights};

/// Products of a row that runs and learns: the cost of a token of a sparse top-1 arm, and the unit of
/// [`Budget::Flops`].
pub const OF_A_ROW: f64 = 3.0;

/// Rows through experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// That ran.
    pub forward: u64,
    /// Of these, those whose backward ran too.
    pub backward: u64,
    /// Through the experts of a teacher that was asked.
    pub teacher: u64,
}

impl Rows {
    /// Their products. Merging experts is as much work as running them all, forward and backward.
    pub fn products(self, estimator: &Estimator, experts: usize) -> f64 {
        let each = if estimator.combine == Combine::Merged { 1 + experts } else { 1 };
        each as f64 * (self.forward as f64 + 2.0 * self.backward as f64) + self.teacher as f64
    }
}

/// Experts per token that a run of `updates` updates should have executed.
pub fn expected(spec: &CellSpec, estimator: &Estimator, updates: usize) -> Expected {
    let experts = spec.task.experts();
    match (estimator.executed_per_token(experts), spec.arm.route) {
        _ if updates == 0 => Expected::Exactly(0.0),
        (_, Route::ExpertsAfter { share }) => {
            let dense = dense_updates(spec, share).min(updates);
            Expected::Exactly((dense * experts + (updates - dense)) as f64 / updates as f64)
        }
        // Full experts take no more.
        (estimator::Expected::Exactly(n), _) if spec.arm.capacity.is_some() => Expected::AtMost(n as f64),
        (expected, _) => expected.into(),
    }
}

/// Updates in which soft routing prepares the router; each counts for as many as there are experts in [`Budget::Flops`].
fn dense_updates(spec: &CellSpec, share: f64) -> usize {
    let clock = share * spec.size.steps as f64;
    match spec.budget {
        Budget::Steps => clock.ceil() as usize,
        Budget::Flops => (clock / spec.task.experts() as f64).ceil() as usize,
    }
}

/// Roughly what a step of an arm costs over one of a sparse top-1 arm.
pub fn estimated(task: TaskName, estimator: &Estimator) -> f64 {
    let experts = task.experts();
    let forward = match estimator.executed_per_token(experts) {
        estimator::Expected::Exactly(n) | estimator::Expected::AtMost(n) => n,
        estimator::Expected::Merged => 1 + experts,
    };
    let every_row_learns = task == TaskName::Text || estimator.weights == Weights::Relaxed;
    let backward = if every_row_learns { forward } else { forward.min(estimator.k() * estimator.copies()) };
    (forward + 2 * backward) as f64 / OF_A_ROW
}
