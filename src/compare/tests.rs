//! The small net's backward against finite differences, for every way of running and combining experts.

use super::{
    arm::Route,
    cell,
    expert::ExpertShape,
    net::{Means, Net, Shape},
    plan::{Request, plan},
    random::Random,
    results::{Expected, Outcome, brief},
    spec::{CellSpec, Size, TaskName},
    step::{Step, StepInput, step},
    task::{Batch, Targets},
};
use crate::moe::{
    draw::Draw,
    estimator::{Combine, Estimator, Execution, Gradient, Noise, Relaxation, Selection, StepContext, Weights},
    policy::WeightForm,
};

const EXPERTS: usize = 3;
const FEATURES: usize = 4;
const OUTPUTS: usize = 2;
const ROWS: usize = 6;

fn estimator(selection: Selection, weights: Weights, combine: Combine) -> Estimator {
    Estimator {
        relaxation: Relaxation::Softmax { temperature: 1.0 },
        noise: Noise::NONE,
        selection,
        weights,
        gradient: Gradient::Exact,
        combine,
        serve: WeightForm::Unit,
    }
}

struct Problem {
    net: Net,
    batch: Batch,
    means: Means,
    teacher: Vec<f64>,
}

impl Problem {
    fn new(hidden: usize, targets: Targets) -> Self {
        let mut random = Random::new(5, "problem");
        let shape = Shape { experts: EXPERTS, router_width: EXPERTS, expert: ExpertShape { features: FEATURES, hidden, outputs: OUTPUTS } };
        let mut net = Net::new(shape, 11, &[0.0; EXPERTS]);
        net.router = random.normals(net.router.len(), 1.0);
        let x = random.normals(ROWS * FEATURES, 1.0);
        let batch = Batch { features: FEATURES, outputs: OUTPUTS, x, targets, region: vec![0, 1, 2, 0, 1, 2] };
        let mut means = Means::new(EXPERTS, OUTPUTS);
        means.outputs = random.normals(EXPERTS * OUTPUTS, 1.0);
        Self { net, batch, means, teacher: random.normals(ROWS * OUTPUTS, 1.0) }
    }

    fn step(&self, net: &Net, estimator: &Estimator) -> Step {
        step(&StepInput {
            net,
            estimator,
            route: Route::Learned,
            batch: &self.batch,
            context: StepContext::train(Draw::new(1, 2, 0)),
            jitter: 0.0,
            means: &self.means,
            average_loss: 0.0,
            teacher: Some((&self.teacher, 0.5)),
        })
    }

    /// Largest difference of the gradients from the slopes, over the largest slope.
    fn error(&self, estimator: &Estimator) -> f64 {
        let gradients = self.step(&self.net, estimator).gradients;
        let slopes = |part: fn(&mut Net) -> &mut Vec<f64>, n: usize| {
            let slope = |i: usize| {
                let at = |h: f64| {
                    let mut net = self.net.clone();
                    part(&mut net)[i] += h;
                    self.step(&net, estimator).loss
                };
                (at(1e-6) - at(-1e-6)) / 2e-6
            };
            (0..n).map(slope).collect::<Vec<f64>>()
        };
        let slopes =
            [slopes(|net| &mut net.router, self.net.router.len()), slopes(|net| &mut net.experts, self.net.experts.len())].concat();
        let ours = [gradients.router, gradients.experts].concat();
        let largest = slopes.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
        slopes.iter().zip(&ours).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / largest
    }
}

#[test]
fn gradients_are_slopes() {
    let mixture = Combine::Mixture;
    let cases = [
        ("soft", estimator(Selection::All, Weights::Relaxed, mixture(Execution::All))),
        ("sparse", estimator(Selection::TopK { k: 2 }, Weights::Renorm, mixture(Execution::Chosen))),
        ("means", estimator(Selection::TopK { k: 1 }, Weights::Relaxed, Combine::Means { decay: 0.9 })),
        ("merged", estimator(Selection::All, Weights::Relaxed, Combine::Merged)),
    ];
    for hidden in [0, 5] {
        for targets in [Targets::Values(Random::new(2, "y").normals(ROWS * OUTPUTS, 1.0)), Targets::Classes(vec![0, 1, 1, 0, 1, 0])] {
            let problem = Problem::new(hidden, targets);
            for (name, estimator) in &cases {
                let error = problem.error(estimator);
                assert!(error < 1e-7, "{name}, {hidden} hidden units: {error}");
            }
        }
    }
}

#[test]
fn merged_linear_experts_are_the_soft_mixture() {
    let problem = Problem::new(0, Targets::Classes(vec![0, 1, 1, 0, 1, 0]));
    let soft = problem.step(&problem.net, &estimator(Selection::All, Weights::Relaxed, Combine::Mixture(Execution::All)));
    let merged = problem.step(&problem.net, &estimator(Selection::All, Weights::Relaxed, Combine::Merged));
    let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
    assert!(close(&soft.forward.y, &merged.forward.y));
    assert!(close(&soft.gradients.router, &merged.gradients.router) && close(&soft.gradients.experts, &merged.gradients.experts));
    assert_eq!((soft.forward.executed, merged.forward.executed), (ROWS * EXPERTS, ROWS));
}

#[test]
fn means_start_at_the_first_outputs_and_then_follow() {
    let problem = Problem::new(0, Targets::Classes(vec![0, 1, 1, 0, 1, 0]));
    let estimator = estimator(Selection::TopK { k: 1 }, Weights::Relaxed, Combine::Means { decay: 0.75 });
    let ran = problem.step(&problem.net, &estimator);
    let all = problem.net.all_outputs(&problem.batch.x);
    let expert = ran.routed.chosen[0] as usize;
    let rows: Vec<usize> = (0..ROWS).filter(|t| ran.routed.chosen[*t] as usize == expert).collect();
    let mean = rows.iter().map(|t| all[(t * EXPERTS + expert) * OUTPUTS]).sum::<f64>() / rows.len() as f64;
    let mut means = Means::new(EXPERTS, OUTPUTS);
    means.update(&ran.forward, 0.75);
    assert!((means.outputs[expert * OUTPUTS] - mean).abs() < 1e-12);
    means.outputs[expert * OUTPUTS] = 4.0 + mean;
    means.update(&ran.forward, 0.75);
    assert!((means.outputs[expert * OUTPUTS] - (3.0 + mean)).abs() < 1e-12);
    assert_eq!(ran.forward.executed, ROWS);
}

#[test]
fn forced_routes_run_what_they_name_and_leave_the_router_alone() {
    let problem = Problem::new(0, Targets::Classes(vec![0, 1, 1, 0, 1, 0]));
    let onehot =
        Estimator { gradient: Gradient::Zero, ..estimator(Selection::TopK { k: 1 }, Weights::Unit, Combine::Mixture(Execution::Chosen)) };
    let run = |route| {
        step(&StepInput {
            net: &problem.net,
            estimator: &onehot,
            route,
            batch: &problem.batch,
            context: StepContext::train(Draw::new(1, 2, 0)),
            jitter: 0.0,
            means: &problem.means,
            average_loss: 0.0,
            teacher: None,
        })
    };
    let oracle = run(Route::Oracle);
    assert_eq!(oracle.routed.chosen, [0, 1, 2, 0, 1, 2]);
    assert!(oracle.gradients.router.iter().all(|g| *g == 0.0));
    let hash = run(Route::Hash);
    assert_eq!(hash.routed.chosen, run(Route::Hash).routed.chosen);
    assert!(hash.gradients.router.iter().all(|g| *g == 0.0) && hash.gradients.experts.iter().any(|g| *g != 0.0));
}

/// Two steps of every built-in arm on every task of the small net, tuning included: no failure, experts counted as they
/// should be.
#[test]
fn every_arm_trains_and_executes_what_it_should() {
    let cells = tempfile::tempdir().expect("a folder");
    let tasks = vec![TaskName::Equal, TaskName::Unequal, TaskName::Collapsed, TaskName::Digits];
    let request = Request { tasks, seeds: Some(1), quick: true, steps_scale: 1e-9, ..Request::default() };
    for spec in plan(&request).expect("sound") {
        let size = |size: Size| Size { steps: 2 * size.steps.min(1), batch: 16, test: 32, points: 1, ..size };
        let spec = CellSpec { size: size(spec.size), teacher_size: spec.teacher_size.map(size), ..spec };
        let name = format!("{:?} {:?} {}", spec.task, spec.mode, spec.arm.name);
        let Outcome::Trained(result) = cell::run(&spec, cells.path()).expect("a folder to write to") else {
            panic!("{name}: {:?}", cell::finished(&spec, cells.path()));
        };
        assert!(!result.diverged && result.loss.hard1.is_some(), "{name}");
        assert_eq!(result.curves.hard1.last(), Some(&result.loss.hard1.and_then(brief)), "{name}: curves end at the figures of the tables");
        // Soft routing prepares the router of experts_only; a token may lack an expert where capacity drops.
        let mixed = matches!(spec.arm.route, Route::ExpertsAfter { .. }) || spec.arm.capacity.is_some() || result.steps == 0;
        match result.executed_expected {
            _ if mixed => {}
            Expected::Exactly(n) => assert_eq!(result.executed_per_token, n, "{name}"),
            Expected::AtMost(n) => assert!(result.executed_per_token <= n, "{name}: {}", result.executed_per_token),
            Expected::Merged => assert_eq!(result.executed_per_token, 1.0, "{name}"),
        }
    }
}
