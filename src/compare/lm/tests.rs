//! Every arm of the text task, for a step or two: what it runs, what it moves, what it starts from.

use std::path::Path;

use super::*;
use crate::compare::{
    arms::arms,
    results::Expected,
    spec::{LAB_VERSION, Mode, Size, TaskName},
};

fn spec(arm: Arm, mode: Mode, steps: usize) -> CellSpec {
    let size = Size { steps, batch: 2, test: 4, points: 2, rate: 3e-3 };
    let teacher_size = (mode == Mode::Tune).then_some(Size { steps: 2, ..size });
    CellSpec { lab: LAB_VERSION, task: TaskName::Text, mode, budget: Budget::Steps, arm, seed: 1, size, teacher_size }
}

fn named(mode: Mode, name: &str) -> Arm {
    arms(TaskName::Text, mode).into_iter().find(|arm| arm.name == name).unwrap()
}

fn untimed(mut result: CellResult) -> CellResult {
    result.step_ms = Duration::default();
    result
}

#[test]
fn every_arm_runs_as_many_experts_as_it_says() {
    for arm in arms(TaskName::Text, Mode::Scratch) {
        let name = arm.name.clone();
        let result = run(&spec(arm, Mode::Scratch, 2), Path::new("unused")).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(!result.diverged && result.steps == 2, "{name}");
        assert!(result.loss.train.is_some() && result.loss.hard1.is_some(), "{name}: {:?}", result.loss);
        let (end, all) = (result.curves.hard1.last().copied().flatten().unwrap(), result.loss.hard1.unwrap());
        assert!((end - all).abs() < 1e-9 * all, "{name}: curves end at the figures of the tables: {end}, {all}");
        let by_domain = result.domains.iter().filter_map(|of| of.loss.hard1).sum::<f64>() / result.domains.len() as f64;
        assert!((by_domain - all).abs() < 1e-9 * all, "{name}: domains have equally many windows: {by_domain}, {all}");
        match (result.executed_expected, name.as_str()) {
            // Two steps of which the first is soft.
            (_, "experts_only") => assert_eq!(result.executed_per_token, 2.5, "{name}"),
            (Expected::Exactly(n), _) => assert_eq!(result.executed_per_token, n, "{name}"),
            (Expected::AtMost(n), _) => assert!(result.executed_per_token > 0.0 && result.executed_per_token <= n, "{name}"),
            (Expected::Merged, _) => assert_eq!(result.executed_per_token, 1.0, "{name}"),
        }
        if name == "onehot" {
            assert_eq!(result.router_grad.norm, Some(0.0), "nothing tells the router anything");
        }
        if name == "oracle" {
            assert_eq!((result.agreement, result.loss.hard2), (Some(1.0), None));
        }
    }
}

#[test]
fn one_specification_has_one_result() {
    let cell = || untimed(run(&spec(named(Mode::Scratch, "reinforce"), Mode::Scratch, 2), Path::new("unused")).unwrap());
    assert_eq!(cell(), cell());
}

#[test]
fn tuning_begins_at_the_teacher() {
    let cells = tempfile::tempdir().unwrap();
    let teacher = spec(named(Mode::Tune, "untouched"), Mode::Tune, 0).teacher().unwrap();
    let trained = run(&teacher, cells.path()).unwrap();
    let untouched = run(&spec(named(Mode::Tune, "untouched"), Mode::Tune, 0), cells.path()).unwrap();
    assert_eq!((untouched.loss, untouched.steps), (trained.loss, 0));
    for arm in arms(TaskName::Text, Mode::Tune) {
        let name = arm.name.clone();
        let tuned = run(&spec(arm, Mode::Tune, 1), cells.path()).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(tuned.fidelity.is_some_and(|fidelity| fidelity.kl.is_some()), "{name}");
    }
    let lost = run(&spec(named(Mode::Tune, "ste"), Mode::Tune, 1), &cells.path().join("elsewhere")).unwrap_err();
    assert!(lost.to_string().contains(".teacher"), "{lost}");
}
