//! The task `gradient`: one token, eight experts with fixed outputs, everything enumerated. Nothing is trained.
//!
//! The exact gradient is `p ⊙ (f - <p, f>)`, p = softmax(z): that of the expected loss when the expert is drawn from the
//! softmax, whatever temperature an estimator uses. Its draws are rows of one batch.
//!
//! Schedules stand half-way, with the temperature and the noise that are in force there: at the end the noise of
//! `gumbel_soft` is 0, which it has trained under at no other time.

use super::{
    probe::{Quality, compare, expected_loss_gradient, is_random, medians},
    random::Random,
    results::GradientResult,
    spec::CellSpec,
    task::Targets,
};
use crate::{
    error::{Error, Result},
    moe::{
        advantage::Draws,
        draw::Draw,
        estimator::{Combine, Estimator, EstimatorSpec, Execution, Gradient, Purpose, Relaxation, RoutedBatch, StepContext},
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
    let (experts, steps) = (spec.task.experts(), spec.size.steps);
    let schedules = EstimatorSpec::new(&spec.arm.estimator, experts, steps, Purpose::Laboratory)?;
    let estimator = schedules.at(steps / 2, steps);
    let in_force = |name: &str| schedules.number_at(name, steps / 2, steps);
    if matches!(estimator.relaxation, Relaxation::SmoothStep { .. }) {
        return Err(Error::invalid("arm.estimator", "the task `gradient` needs a router with an output for each expert"));
    }
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
        sharpness: in_force("temperature").or_else(|| in_force("width")),
        noise: in_force("noise"),
        quadratic: measure(|random| Targets::Values(random.normals(OUTPUTS, 1.0)), "quadratic"),
        cross_entropy: measure(|random| Targets::Classes(vec![random.below(OUTPUTS)]), "cross-entropy"),
    })
}

impl Problem {
    fn experts(&self) -> usize {
        self.z.len()
    }

    fn quality(&self, estimator: &Estimator, draws: usize, draw: Draw) -> Quality {
        let mut p = vec![0.0; self.experts()];
        Relaxation::Softmax { temperature: 1.0 }.value(&self.z, &mut p);
        let exact = expected_loss_gradient(&p, 1.0, &self.losses());
        let draws = if is_random(estimator) { draws } else { 1 };
        compare(&exact, &self.gradients(estimator, draws, draw))
    }

    /// The estimator's gradient of every draw, by the first E router outputs.
    fn gradients(&self, estimator: &Estimator, draws: usize, draw: Draw) -> Vec<Vec<f64>> {
        let (experts, width) = (self.experts(), estimator.router_width(self.experts()));
        let (copies, sampled) = (estimator.copies(), estimator.gradient.samples());
        let mut row = self.z.clone();
        row.resize(width, 0.0);
        let z = row.repeat(draws * copies);
        let routed = estimator.route(&z, experts, &StepContext { copy_rows: draws, ..StepContext::train(draw) });
        let (losses, credit) = self.credit(estimator, &routed);
        let mut dz = vec![0.0; z.len()];
        estimator.vjp(&z, &routed, &credit, &mut dz);
        if let Gradient::Score { baseline, samples } = estimator.gradient {
            let drawn = Draws { losses: &losses, rows: draws, samples };
            // A moving average is at best the expected loss.
            let p = estimator.route(&row, experts, &StepContext::evaluate(draw));
            let expected: f64 = p.relaxed().iter().zip(self.losses()).map(|(p, f)| p * f).sum();
            estimator.score(&z, &routed, &drawn.above(baseline, expected), &mut dz);
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

    /// Loss of every expert alone.
    fn losses(&self) -> Vec<f64> {
        let mut unused = [0.0; OUTPUTS];
        self.outputs.chunks_exact(OUTPUTS).map(|y| self.loss(y, &mut unused)).collect()
    }

    /// Loss of every row, and the credit of its weights.
    fn credit(&self, estimator: &Estimator, routed: &RoutedBatch) -> (Vec<f64>, Vec<f64>) {
        let experts = self.experts();
        // Means stand in exactly: the outputs do not change. Linear experts merge as their outputs do.
        let dense = matches!(estimator.combine, Combine::Means { .. } | Combine::Merged) || routed.execution == Execution::All;
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::compare::{
        arm::Arm,
        spec::{Budget, LAB_VERSION, Mode, Size, TaskName},
    };
    use crate::moe::estimator::{
        EstimatorConfig, Param,
        catalog::{self, KRange},
    };

    fn measured(name: &str, params: &[(&str, Param)]) -> GradientResult {
        let k = catalog::find(name).and_then(|row| (row.k != KRange::None).then_some(1));
        measured_at(name, k, params, [1000, 15])
    }

    fn measured_at(name: &str, k: Option<usize>, params: &[(&str, Param)], [batch, test]: [usize; 2]) -> GradientResult {
        let params: BTreeMap<String, Param> = params.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        let arm = Arm::new(name, EstimatorConfig { name: name.into(), k, params });
        run(&CellSpec {
            lab: LAB_VERSION,
            task: TaskName::Gradient,
            mode: Mode::Scratch,
            budget: Budget::Steps,
            arm,
            seed: 3,
            size: Size { steps: 2, batch, test, points: 0, rate: 0.0 },
            teacher_size: None,
        })
        .expect("it can be measured")
    }

    #[test]
    fn every_arm_of_the_task_is_measured() {
        for arm in crate::compare::arms::arms(TaskName::Gradient, Mode::Scratch) {
            let params: Vec<(&str, Param)> = arm.estimator.params.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
            let result = measured_at(&arm.estimator.name, arm.estimator.k, &params, [20, 2]);
            assert!(result.quadratic.bias.is_some() && result.cross_entropy.bias.is_some(), "{}", arm.name);
        }
    }

    #[test]
    fn noise_is_that_of_training() {
        let soft = measured("gumbel_soft", &[]);
        assert_eq!(soft.noise, Some(0.5), "half-way from 1 to 0");
        assert!((soft.sharpness.expect("a temperature") - 0.6_f64.sqrt()).abs() < 1e-12, "half-way from 2 to 0.3: {soft:?}");
        for (name, noise) in [("gumbel_soft", Some(0.5)), ("gumbel_st", Some(1.0)), ("noisy_topk", None), ("reinmax", None)] {
            let result = measured(name, &[]);
            assert_eq!(result.noise, noise, "{name}");
            assert!(result.quadratic.std.is_some_and(|std| std > 0.0), "{name} draws: {result:?}");
        }
    }

    #[test]
    fn what_has_no_gradient_is_all_bias() {
        for name in ["onehot", "renorm_topk"] {
            let result = measured(name, &[]);
            assert_eq!((result.quadratic.bias, result.quadratic.std), (Some(1.0), Some(0.0)), "{name}");
            assert_eq!(result.quadratic.cosine, None, "{name}");
        }
    }

    #[test]
    fn unbiased_estimators_are_within_the_error_of_the_mean() {
        // The mean of n draws is off by std/√n, whatever the problem; medians over problems are near that.
        let error = |std: Option<f64>| 2.0 * std.expect("random") / 1000_f64.sqrt();
        for baseline in ["none", "moving_average", "leave_one_out", "self_critical"] {
            let result = measured("reinforce", &[("baseline", Param::Word(baseline.into()))]);
            for quality in [result.quadratic, result.cross_entropy] {
                assert!(quality.bias.expect("finite") < error(quality.std), "{baseline}: {quality:?}");
            }
        }
        let reinmax = measured("reinmax", &[]).quadratic;
        assert!(reinmax.bias.expect("finite") < error(reinmax.std), "{reinmax:?}");
        let ste = measured("ste", &[]).quadratic;
        assert!(ste.bias.expect("finite") > 0.5 && ste.std == Some(0.0), "{ste:?}");
    }

    #[test]
    fn baselines_lower_the_variance() {
        let std = |baseline: &str| measured("reinforce", &[("baseline", Param::Word(baseline.into()))]).quadratic.std.expect("random");
        for baseline in ["moving_average", "leave_one_out", "self_critical"] {
            assert!(std(baseline) < std("none"), "{baseline}");
        }
    }
}
