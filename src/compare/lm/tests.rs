//! Every arm of the text task, for a step or two: what it runs, what it moves, what it starts from.

use std::path::Path;

use super::*;
use crate::compare::{
    arms::arms,
    results::{CellResult, Expected},
    spec::{Budget, LAB_VERSION, Mode, Size, TaskName},
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
    result.step_ms = Default::default();
    result.peak_bytes = None;
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
        assert!((end - all).abs() < 1e-4 * all, "{name}: points of the curves are of all windows, where there are so few: {end}, {all}");
        let by_domain = result.domains.iter().filter_map(|of| of.loss.hard1).sum::<f64>() / result.domains.len() as f64;
        assert!((by_domain - all).abs() < 1e-9 * all, "{name}: domains have equally many windows: {by_domain}, {all}");
        match result.executed_expected {
            Expected::Exactly(n) => assert_eq!(result.executed_per_token, n, "{name}"),
            Expected::AtMost(n) => assert!(result.executed_per_token > 0.0 && result.executed_per_token <= n, "{name}"),
            Expected::Merged => assert_eq!(result.executed_per_token, 1.0, "{name}"),
        }
        // Two steps of which the first is soft.
        if name == "experts_only" {
            assert_eq!(result.executed_per_token, 2.5);
        }
        let each = if name == "smear" { 5.0 } else { 1.0 };
        assert_eq!(result.products_per_token, 3.0 * each * result.executed_per_token, "{name}");
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

#[test]
fn the_oracle_of_tuning_has_the_teachers_experts_where_they_are_at_home() {
    let cells = tempfile::tempdir().unwrap();
    let oracle = spec(named(Mode::Tune, "oracle"), Mode::Tune, 0);
    let teacher = oracle.teacher().unwrap();
    run(&teacher, cells.path()).unwrap();
    let weights = teacher::read(&teacher.weights(cells.path()).unwrap()).unwrap();
    let cell = Cell::new(&oracle, cells.path()).unwrap();
    let windows = cell.corpus.batch(oracle.seed, 0, MATCHING_WINDOWS);
    let order = teacher::order(cell.teacher.as_ref().unwrap(), &windows, 4).unwrap();
    assert_eq!(order.len(), 2, "each layer has its own");
    for (layer, order) in order.iter().enumerate() {
        for part in ["gate_up", "down"] {
            let name = format!("layers.{layer}.experts.{part}");
            let own = cell.learner.model().parameters().iter().find(|p| p.name == name).unwrap();
            let row = |tensor: &candle_core::Tensor, expert| tensor.get(expert).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (domain, expert) in order.iter().enumerate() {
                assert_eq!(row(&own.var, domain), row(&weights[&name], *expert), "{name}, domain {domain}");
            }
        }
    }
}

#[test]
fn a_teacher_that_is_asked_is_charged() {
    let cells = tempfile::tempdir().unwrap();
    let tuned = |arm: &str| spec(named(Mode::Tune, arm), Mode::Tune, 1);
    run(&tuned("ste").teacher().unwrap(), cells.path()).unwrap();
    let products = |arm: &str| run(&tuned(arm), cells.path()).unwrap().products_per_token;
    assert_eq!([products("raw_topk"), products("raw_topk+router_kl"), products("ste+distill")], [3.0, 7.0, 16.0]);
}
