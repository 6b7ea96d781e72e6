//! The small net's backward against finite differences, for every way of running and combining experts; what every arm
//! executes and is charged; what balancing and distillation are for.

use std::path::Path;

use super::{
    arm::{Arm, Route},
    arms::arms,
    cell,
    expert::ExpertShape,
    net::{Means, Net, Shape},
    plan::{RATE, Request, plan},
    random::Random,
    results::{CellResult, Expected, Outcome, brief},
    spec::{Budget, CellSpec, LAB_VERSION, Mode, Size, TaskName},
    step::{Step, StepInput, step},
    task::{self, Batch, Targets},
    training::Training,
};
use crate::{
    moe::{
        draw::Draw,
        estimator::{Combine, Estimator, Execution, Gradient, Noise, Relaxation, Selection, StepContext, Weights},
        policy::WeightForm,
    },
    schedule::Schedule,
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

/// A cell of a plan with another size, run in this process.
fn result_of(spec: &CellSpec, cells: &Path) -> CellResult {
    let name = format!("{:?} {:?} {:?} {}", spec.task, spec.mode, spec.budget, spec.arm.name);
    match cell::run(spec, cells).expect("a folder to write to") {
        Outcome::Trained(result) => *result,
        other => panic!("{name}: {other:?}"),
    }
}

/// Two steps of every built-in arm on every task of the small net, tuning included: no failure, experts counted as they
/// should be.
#[test]
fn every_arm_trains_and_executes_what_it_should() {
    let cells = tempfile::tempdir().expect("a folder");
    let tasks = vec![TaskName::Equal, TaskName::Unequal, TaskName::Collapsed, TaskName::Digits, TaskName::Rates];
    let request = Request { tasks, seeds: Some(1), quick: true, steps_scale: 1e-9, ..Request::default() };
    for spec in plan(&request).expect("sound") {
        let size = |size: Size| Size { steps: 2 * size.steps.min(1), batch: 16, test: 32, points: 1, ..size };
        let spec = CellSpec { size: size(spec.size), teacher_size: spec.teacher_size.map(size), ..spec };
        let name = format!("{:?} {:?} {:?} {}", spec.task, spec.mode, spec.budget, spec.arm.name);
        let result = result_of(&spec, cells.path());
        assert!(!result.diverged && result.loss.hard1.is_some(), "{name}");
        // Of `digits` the test rows are more than those of a point, whatever the size.
        let end = result.curves.hard1.last().copied().flatten();
        assert!(
            spec.task == TaskName::Digits || end == result.loss.hard1.and_then(brief),
            "{name}: a point is of all rows where there are few"
        );
        let executed = result.executed_per_token;
        match result.executed_expected {
            Expected::Exactly(n) => assert!((executed - n).abs() < 1e-12, "{name}: {executed}, not {n}"),
            Expected::AtMost(n) => assert!(executed <= n, "{name}: {executed}"),
            Expected::Merged => assert_eq!(executed, 1.0, "{name}"),
        }
        if spec.task == TaskName::Collapsed && spec.arm.route.has_router() {
            assert_eq!(result.curves.load[0][0], 1.0, "{name}: every token begins at expert 0");
        }
        let learns = spec.arm.route == Route::Learned;
        let slower = if spec.mode == Mode::Tune { 0.3 } else { 1.0 };
        let rates = (result.settings.rate, result.settings.router_rate);
        assert!(!learns || rates == (spec.size.rate, slower * spec.size.rate), "{name}: {rates:?}");
    }
}

/// A cell from scratch, or in tuning, on a small budget.
fn small(task: TaskName, mode: Mode, arm: &str, seed: u64, steps: usize) -> CellSpec {
    let arm = arms(task, mode).into_iter().find(|candidate| candidate.name == arm).expect(arm);
    let size = Size { steps, batch: 128, test: 1024, points: 4, rate: RATE };
    let teacher_size = (mode == Mode::Tune).then_some(size);
    CellSpec { lab: LAB_VERSION, task, mode, budget: Budget::Steps, arm, seed, size, teacher_size }
}

#[test]
fn products_are_those_that_were_computed() {
    let cells = tempfile::tempdir().expect("a folder");
    let products = |mode, arm| result_of(&small(TaskName::Equal, mode, arm, 1, 2), cells.path()).products_per_token;
    for (arm, expected) in [
        ("raw_topk", 3.0),
        ("frozen", 3.0),
        ("hash", 3.0),
        ("raw_topk_k2", 6.0),
        // All run, one learns.
        ("ste", 8.0 + 2.0),
        ("soft", 3.0 * 8.0),
        // Four draws.
        ("reinforce", 4.0 * 3.0),
        // Adding experts up is the work of running them.
        ("smear", 3.0 * 9.0),
        // One step of two is soft.
        ("experts_only", (24.0 + 3.0) / 2.0),
    ] {
        assert_eq!(products(Mode::Scratch, arm), expected, "{arm}");
    }
    result_of(&small(TaskName::Equal, Mode::Tune, "ste", 1, 2).teacher().expect("one"), cells.path());
    assert_eq!(products(Mode::Tune, "ste+distill"), 10.0 + 8.0, "the teacher ran too");
    assert_eq!(products(Mode::Tune, "ste+router_kl"), 10.0, "its router alone");
}

#[test]
fn equal_expert_flops_end_after_equal_products() {
    let cells = tempfile::tempdir().expect("a folder");
    let steps = |arm: &str| {
        let spec = CellSpec { budget: Budget::Flops, ..small(TaskName::Equal, Mode::Scratch, arm, 1, 120) };
        result_of(&spec, cells.path()).steps
    };
    assert_eq!((steps("raw_topk"), steps("ste"), steps("soft")), (120, 36, 15));
    // A third of the products are those of soft steps, of 8 units each: 5 of them, and then 80 sparse ones.
    assert_eq!(steps("experts_only"), 5 + 80);
}

#[test]
fn every_point_of_a_curve_is_of_the_same_rows() {
    let cells = tempfile::tempdir().expect("a folder");
    // Nothing moves at a learning rate of 0.
    let still = |spec: CellSpec| CellSpec { size: Size { rate: 0.0, ..spec.size }, ..spec };
    let result = result_of(&still(small(TaskName::Equal, Mode::Scratch, "ste", 1, 8)), cells.path());
    assert_eq!(result.curves.hard1, [result.curves.hard1[0]; 5]);
    assert_ne!(result.curves.hard1[0], result.loss.hard1.and_then(brief), "the figures of the tables are of all rows");
}

#[test]
fn a_gradient_is_compared_with_the_exact_one_where_the_choice_is_the_estimators() {
    let cells = tempfile::tempdir().expect("a folder");
    for arm in arms(TaskName::Collapsed, Mode::Scratch).into_iter().filter(|arm| arm.estimator.name == "raw_topk") {
        let plain = ["raw_topk", "raw_topk+switch", "raw_topk+switch_0.1"].contains(&&*arm.name);
        let result = result_of(&small(TaskName::Collapsed, Mode::Scratch, &arm.name, 1, 4), cells.path());
        assert_eq!(result.router_grad.bias.is_some(), plain, "{}", arm.name);
        assert!(result.router_grad.norm.is_some(), "{}", arm.name);
    }
}

#[test]
fn a_cell_of_another_version_is_refused() {
    let cells = tempfile::tempdir().expect("a folder");
    let spec = CellSpec { lab: LAB_VERSION + 1, ..small(TaskName::Equal, Mode::Scratch, "ste", 1, 1) };
    let error = cell::run(&spec, cells.path()).expect_err("not measured").to_string();
    assert!(error.starts_with("--cell: is of laboratory"), "{error}");
    assert_eq!(std::fs::read_dir(cells.path()).expect("a folder").count(), 0, "nothing is left of it");
}

/// Auxiliary and loss-free balancing keep every expert alive where the run without them loses some: `raw_topk` with seeds
/// 1 and 2 on the collapsed start as it is by default, `onehot` with seed 1 on a shorter one.
#[test]
fn balancers_keep_alive_what_dies_without_them() {
    let cells = tempfile::tempdir().expect("a folder");
    for (alone, seed, steps, batch) in [("onehot", 1, 1200, 128), ("raw_topk", 1, 3000, 256), ("raw_topk", 2, 3000, 256)] {
        let dead = |arm: &str| {
            let spec = small(TaskName::Collapsed, Mode::Scratch, arm, seed, steps);
            result_of(&CellSpec { size: Size { batch, test: 4096, ..spec.size }, ..spec }, cells.path()).dead
        };
        assert!(dead(alone) > 0, "{alone}, seed {seed}: where nothing dies nothing is shown");
        for with in ["switch_0.1", "bias"] {
            assert_eq!(dead(&format!("{alone}+{with}")), 0, "{alone}+{with}, seed {seed}");
        }
    }
}

/// A student that is held to the teacher's router stays nearer to it than one that is not.
#[test]
fn the_router_is_held_to_that_of_the_teacher() {
    let cells = tempfile::tempdir().expect("a folder");
    let free = small(TaskName::Equal, Mode::Tune, "ste", 1, 200);
    let held = Arm { losses: [("router_kl".to_owned(), Schedule::constant(1000.0))].into(), ..free.arm.clone() };
    let held = CellSpec { arm: held, ..free.clone() };
    let untouched = CellSpec { size: Size { steps: 0, ..free.size }, ..free.clone() };
    result_of(&free.teacher().expect("one"), cells.path());
    let [teacher, held, free] = [untouched, held, free].map(|spec| {
        let task = task::open(spec.task, spec.seed, spec.size).expect("a task of the small net");
        Training::new(&spec, &*task, cells.path()).expect("sound").run().expect("it trains").1.router
    });
    let apart = |router: &[f64]| router.iter().zip(&teacher).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
    assert!(apart(&held) < 0.5 * apart(&free), "{} and {}", apart(&held), apart(&free));
}

/// What a cell computes may change, and then cells of before must not be taken for ones of now. If this fails for a reason
/// that is meant: raise `LAB_VERSION`, and write the new figures here.
///
/// Text is in f32, whose sums depend on the instructions of the processor.
#[test]
fn a_version_computes_what_it_computed() {
    const VERSION: u32 = 3;
    let cells = tempfile::tempdir().expect("a folder");
    let expected = [
        (TaskName::Equal, "soft", 0.8848919338125978, 1e-6),
        (TaskName::Collapsed, "raw_topk+bias", 0.8114190105913252, 1e-6),
        (TaskName::Digits, "ste", 1.8044088763079968, 1e-6),
        (TaskName::Text, "raw_topk", 5.219124099349387, 1e-4),
        (TaskName::Gradient, "gumbel_st", 0.44891784618788777, 1e-6),
    ];
    let found = expected.map(|(task, arm, ..)| {
        let size = |size: Size| match task {
            TaskName::Text => Size { batch: 2, test: 4, ..size },
            TaskName::Gradient => Size { batch: 50, test: 4, ..size },
            _ => size,
        };
        let spec = small(task, Mode::Scratch, arm, 1, if task == TaskName::Text { 3 } else { 40 });
        let figure = match cell::run(&CellSpec { size: size(spec.size), ..spec }, cells.path()).expect("a folder to write to") {
            Outcome::Trained(result) => result.loss.hard1,
            Outcome::Gradient(result) => result.quadratic.bias,
            Outcome::Failed(error) => panic!("{arm}: {error}"),
        };
        (task, arm, figure.expect("finite"))
    });
    let same = found.iter().zip(&expected).all(|(found, expected)| (found.2 / expected.2 - 1.0).abs() < expected.3);
    assert!(same && LAB_VERSION == VERSION, "{found:?} of version {LAB_VERSION}");
}
