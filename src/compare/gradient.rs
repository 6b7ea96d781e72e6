//! The task `gradient`: one token, eight experts with fixed outputs, everything enumerated. Nothing is trained.
//!
//! The exact gradient is `p ⊙ (f - <p, f>)`, p = softmax(z): that of the expected loss when the expert is drawn from the
//! softmax, whatever temperature an estimator uses. Its draws are rows of one batch.

use super::{
    metric::median,
    probe::{Quality, compare, expected_loss_gradient, is_random},
    random::Random,
    results::{GradientQuality, GradientResult, finite},
    spec::CellSpec,
    task::Targets,
};
use crate::{
    error::Result,
    moe::{
        draw::Draw,
        estimator::{Baseline, Combine, Estimator, EstimatorSpec, Gradient, Purpose, RoutedBatch, StepContext},
    },
};

/// Outputs of an expert; classes, for the cross-entropy.
const OUTPUTS: usize = 4;
/// Deviation of the logits.
const SPREAD: f64 = 1.0;

/// One token.
struct Problem {
    z: Vec<f64>,
    /// `[E, O]`.
    outputs: Vec<f64>,
    targets: Targets,
}

/// Measures the cell's estimator on both losses.
pub fn run(spec: &CellSpec) -> Result<GradientResult> {
    let experts = spec.task.experts();
    let estimator =
        EstimatorSpec::new(&spec.arm.estimator, experts, spec.size.steps, Purpose::Laboratory)?.at(spec.size.steps, spec.size.steps);
    let measure = |make: fn(&mut Random) -> Targets, purpose| {
        let mut random = Random::new(spec.seed, purpose);
        let qualities = (0..spec.size.test).map(|i| {
            let problem =
                Problem { z: random.normals(experts, SPREAD), outputs: random.normals(experts * OUTPUTS, 1.0), targets: make(&mut random) };
            problem.quality(&estimator, spec.size.batch, Draw::new(spec.seed, i, 0))
        });
        medians(&qualities.collect::<Vec<_>>())
    };
    Ok(GradientResult {
        quadratic: measure(|random| Targets::Values(random.normals(OUTPUTS, 1.0)), "quadratic"),
        cross_entropy: measure(|random| Targets::Classes(vec![random.below(OUTPUTS)]), "cross-entropy"),
    })
}

impl Problem {
    fn experts(&self) -> usize {
        self.z.len()
    }

    fn quality(&self, estimator: &Estimator, draws: usize, draw: Draw) -> Quality {
        let mut unused = [0.0; OUTPUTS];
        let f: Vec<f64> = self.outputs.chunks_exact(OUTPUTS).map(|y| self.loss(y, &mut unused)).collect();
        let exact = expected_loss_gradient(&self.z, 1.0, &f);
        let draws = if is_random(estimator) { draws } else { 1 };
        compare(&exact, &self.gradients(estimator, draws, draw))
    }

    /// The estimator's gradient of every draw, by the first E router outputs.
    fn gradients(&self, estimator: &Estimator, draws: usize, draw: Draw) -> Vec<Vec<f64>> {
        let (experts, width) = (self.experts(), estimator.router_width(self.experts()));
        let copies = estimator.copies();
        let mut row = self.z.clone();
        row.resize(width, 0.0);
        let z = row.repeat(draws * copies);
        let sampled = match estimator.gradient {
            Gradient::Score { samples, .. } => samples,
            _ => 1,
        };
        // Copies of one draw lie `draws` rows apart, the greedy ones last.
        let greedy_from = if sampled < copies { sampled * draws } else { usize::MAX };
        let routed = estimator.route(&z, experts, &StepContext { greedy_from, ..StepContext::train(draw) });
        let (losses, credit) = self.credit(estimator, &routed);
        let mut dz = vec![0.0; z.len()];
        estimator.vjp(&z, &routed, &credit, &mut dz);
        if let Gradient::Score { baseline, samples } = estimator.gradient {
            let exact_mean = || {
                let mut unused = [0.0; OUTPUTS];
                let f: Vec<f64> = self.outputs.chunks_exact(OUTPUTS).map(|y| self.loss(y, &mut unused)).collect();
                let weights = estimator.route(&row, experts, &StepContext::evaluate(draw));
                weights.relaxed().iter().zip(f).map(|(p, f)| p * f).sum::<f64>()
            };
            let advantage: Vec<f64> = (0..draws * copies)
                .map(|i| {
                    let (copy, of) = (i / draws, i % draws);
                    let subtract = match baseline {
                        Baseline::None => 0.0,
                        Baseline::MovingAverage { .. } => exact_mean(),
                        Baseline::LeaveOneOut => {
                            let all: f64 = (0..samples).map(|copy| losses[copy * draws + of]).sum();
                            (all - losses[i]) / (samples.max(2) - 1) as f64
                        }
                        Baseline::SelfCritical => losses[samples * draws + of],
                    };
                    if copy < samples { losses[i] - subtract } else { 0.0 }
                })
                .collect();
            estimator.score(&z, &routed, &advantage, &mut dz);
        }
        let of_draw = |of: usize| {
            let mut gradient = vec![0.0; experts];
            for copy in 0..sampled {
                let row = &dz[(copy * draws + of) * width..][..experts];
                gradient.iter_mut().zip(row).for_each(|(g, d)| *g += d / sampled as f64);
            }
            gradient
        };
        (0..draws).map(of_draw).collect()
    }

    /// Loss of every row, and the credit of its weights.
    fn credit(&self, estimator: &Estimator, routed: &RoutedBatch) -> (Vec<f64>, Vec<f64>) {
        let experts = self.experts();
        // Means stand in exactly: the outputs do not change. Linear experts merge as their outputs do.
        let dense = matches!(estimator.combine, Combine::Means { .. } | Combine::Merged)
            || routed.execution == crate::moe::estimator::Execution::All;
        let mut losses = Vec::with_capacity(routed.tokens);
        let mut credit = vec![0.0; routed.tokens * experts];
        for (t, (weights, credit)) in routed.weights.chunks_exact(experts).zip(credit.chunks_exact_mut(experts)).enumerate() {
            let (mut y, mut dy) = ([0.0; OUTPUTS], [0.0; OUTPUTS]);
            for (weight, output) in weights.iter().zip(self.outputs.chunks_exact(OUTPUTS)) {
                y.iter_mut().zip(output).for_each(|(y, o)| *y += weight * o);
            }
            losses.push(self.loss(&y, &mut dy));
            let chosen = routed.rows().of(t);
            for (e, (credit, output)) in credit.iter_mut().zip(self.outputs.chunks_exact(OUTPUTS)).enumerate() {
                if dense || chosen.contains(&(e as u32)) {
                    *credit = dy.iter().zip(output).map(|(d, o)| d * o).sum();
                }
            }
        }
        (losses, credit)
    }

    fn loss(&self, y: &[f64], dy: &mut [f64]) -> f64 {
        self.targets.loss(y, OUTPUTS, dy).iter().sum()
    }
}

fn medians(qualities: &[Quality]) -> GradientQuality {
    let middle =
        |value: fn(&Quality) -> f64| median(&qualities.iter().map(value).filter(|x| x.is_finite()).collect::<Vec<_>>()).and_then(finite);
    GradientQuality { bias: middle(|q| q.bias), cosine: middle(|q| q.cosine), std: middle(|q| q.std) }
}
