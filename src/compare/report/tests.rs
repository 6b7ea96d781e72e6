//! The report says what the results hold, and pictures exist for what they hold.

use std::{collections::BTreeMap, fs};

use super::*;
use crate::{
    compare::{
        arm::{Arm, Route},
        plots,
        results::{ByRouting, CellRecord, CellResult, Curves, Fidelity, GradientQuality, GradientResult, Machine, RESULTS_VERSION},
        spec::{Budget, CellSpec, LAB_VERSION, Size},
    },
    moe::{
        capacity::{Capacity, Order, Overflow},
        estimator::EstimatorConfig,
    },
};

fn arm(name: &str, k: Option<usize>) -> Arm {
    let estimator = name.split('+').next().unwrap_or(name).to_owned();
    Arm::new(name, EstimatorConfig { name: estimator, k, params: BTreeMap::new() })
}

fn cell(task: TaskName, mode: Mode, arm: &Arm, seed: u64, outcome: Outcome) -> CellRecord {
    let size = Size { steps: 100, batch: 8, test: 8, points: 3, rate: 0.01 };
    let spec = CellSpec { lab: LAB_VERSION, task, mode, budget: Budget::Steps, arm: arm.clone(), seed, size, teacher_size: None };
    CellRecord { spec, outcome }
}

/// A result with a hard top-1 loss, one fifth above the training routing's, and everything else that can be shown.
fn trained(hard1: f64, executed: f64) -> CellResult {
    let column = |scale: f64| vec![Some(scale), Some(0.5 * scale), Some(0.25 * scale)];
    CellResult {
        loss: ByRouting { train: Some(hard1 / 1.2), hard1: Some(hard1), hard2: Some(1.1 * hard1) },
        trivial: 2.0,
        agreement: Some(0.75),
        nmi: Some(0.5),
        dead: 1,
        max_vio: Some(1.5),
        executed_per_token: executed,
        executed_expected: Expected::Exactly(executed),
        step_ms: crate::compare::results::Duration { median: 2.0 * executed, p90: 9.0 },
        steps: 100,
        remedies: vec!["step 50: something".into()],
        remedy_actions: 3,
        curves: Curves {
            step: vec![0, 50, 100],
            loss: column(hard1),
            hard1: column(hard1),
            gap: column(0.9),
            sharpness: column(1.0),
            grad_norm: column(0.1),
            load: vec![vec![0.125; 8]; 3],
        },
        ..CellResult::default()
    }
}

fn quality(bias: f64) -> GradientQuality {
    GradientQuality { bias: Some(bias), cosine: Some(0.5), std: Some(0.0) }
}

fn results() -> Results {
    let done = |result: CellResult| Outcome::Trained(Box::new(result));
    let (ste, soft, raw) = (arm("ste", Some(1)), arm("soft", None), arm("raw_topk", Some(1)));
    let frozen = Arm { route: Route::Frozen, name: "frozen".into(), ..arm("onehot", Some(1)) };
    let treated = Arm { remedies: vec!["reinit".into()], ..arm("raw_topk+reinit", Some(1)) };
    let tuned = |hard1: f64, distance: f64| {
        let fidelity = Some(Fidelity { rel_l2: Some(distance), kl: None, agreement: Some(0.9) });
        done(CellResult { fidelity, ..trained(hard1, 1.0) })
    };
    let mut cells = Vec::new();
    for (seed, shift) in [(1, 0.0), (2, 0.02), (3, 0.3)] {
        cells.push(cell(TaskName::Equal, Mode::Scratch, &soft, seed, done(trained(0.8 + shift, 8.0))));
        cells.push(cell(TaskName::Equal, Mode::Scratch, &ste, seed, done(trained(0.2 + shift, 8.0))));
        cells.push(cell(TaskName::Equal, Mode::Scratch, &raw, seed, done(trained(0.4 + shift, 1.0))));
        cells.push(cell(TaskName::Equal, Mode::Scratch, &frozen, seed, done(trained(1.2 + shift, 1.0))));
    }
    let flops = CellRecord {
        spec: CellSpec { budget: Budget::Flops, ..cells[1].spec.clone() },
        outcome: done(CellResult { steps: 12, ..trained(1.0, 8.0) }),
    };
    cells.push(flops);
    cells.push(cell(TaskName::Collapsed, Mode::Scratch, &treated, 1, done(trained(0.6, 1.0))));
    let counted = CellResult { executed_expected: Expected::Exactly(1.0), ..trained(0.5, 2.0) };
    cells.push(cell(TaskName::Collapsed, Mode::Scratch, &raw, 1, done(counted)));
    let drop = Capacity { factor: 1.0, overflow: Overflow::Drop, order: Order::Position };
    let dropping = Arm { capacity: Some(drop), ..arm("raw_topk+drop", Some(1)) };
    let dropped = CellResult { executed_expected: Expected::Exactly(1.0), ..trained(0.5, 0.7) };
    cells.push(cell(TaskName::Collapsed, Mode::Scratch, &dropping, 1, done(dropped)));
    let prepared = Arm { route: Route::ExpertsAfter { share: 1.0 / 3.0 }, name: "experts_only".into(), ..arm("onehot", Some(1)) };
    let dense_first = CellResult { executed_expected: Expected::Exactly(1.0), ..trained(0.5, 3.38) };
    cells.push(cell(TaskName::Collapsed, Mode::Scratch, &prepared, 1, done(dense_first)));
    cells.push(cell(TaskName::Equal, Mode::Tune, &ste, 1, tuned(0.2, 0.5)));
    cells.push(cell(TaskName::Equal, Mode::Tune, &raw, 1, tuned(0.4, 0.1)));
    let gradient = GradientResult { quadratic: quality(1.6), cross_entropy: quality(0.9), ..GradientResult::default() };
    cells.push(cell(TaskName::Gradient, Mode::Scratch, &ste, 1, Outcome::Gradient(gradient)));
    cells.push(cell(TaskName::Digits, Mode::Scratch, &soft, 1, Outcome::Failed("out of\npaper".into())));
    Results {
        version: RESULTS_VERSION,
        lab: LAB_VERSION,
        machine: Machine { cpu: "a processor".into(), cores: 2, jobs: 2, hardmax: "0.1.0".into(), git: "abc1234".into() },
        command: "hardmax compare --tasks equal".into(),
        seconds: 125.0,
        cells,
    }
}

/// The row of an arm in the first table after a heading.
fn row<'a>(report: &'a str, after: &str, arm: &str) -> &'a str {
    let section = report.split_once(after).unwrap_or_else(|| panic!("no {after} in {report}")).1;
    section.lines().find(|line| line.starts_with(&format!("| `{arm}`"))).unwrap_or_else(|| panic!("no {arm} in {section}"))
}

#[test]
fn the_report_says_what_the_results_hold() {
    let report = write(&results(), &[]);
    for said in
        ["`hardmax compare --tasks equal`", "a processor, 2 cores, 2 cells", "| seeds | 1, 2, 3 |", "2 min 5 s", "of which 1 failed"]
    {
        assert!(report.contains(said), "{said}");
    }
    assert!(report.contains("* digits, scratch, `soft`, seed 1: out of paper"));
    let ste = row(&report, "## Task `equal`\n", "ste");
    assert!(ste.contains("| 1 | 0.0917 [0.0833..0.208] | 0.110 [0.100..0.250] |"), "losses over the best constant: {ste}");
    assert!(ste.contains("| 8 (8) | 16 | - | 0.500 |"), "the last is the loss at equal expert-FLOPs: {ste}");
    assert!(row(&report, "## Task `equal`\n", "soft").starts_with("| `soft` | - |"), "no k");
    assert!(row(&report, "## Gradients of one token", "ste").contains("1.60 / 0.900"));
}

#[test]
fn arms_are_sorted_and_controls_set_off() {
    let report = write(&results(), &[]);
    let section = report.split_once("## Task `equal`\n").unwrap().1;
    let places: Vec<usize> =
        ["`ste`", "`raw_topk`", "`soft`", "*controls*", "`frozen`"].iter().map(|name| section.find(name).unwrap()).collect();
    assert!(places.is_sorted(), "{places:?}");
    let summary = report.split_once("## The four questions").unwrap().1.split_once("## Task").unwrap().0;
    assert!(summary.contains("| `ste` |") && summary.contains("| `frozen` |") && !summary.contains("reinit"), "{summary}");
    let ste = row(&report, "## The four questions", "ste");
    assert!(ste.contains("| 0.0183; 0.0183 | 2.27; -; 0 | 8; 8; 0 | all experts run, own backward |"), "{ste}");
}

#[test]
fn quality_and_fidelity_have_ranks_of_their_own() {
    let report = write(&results(), &[]);
    let of = |arm| row(&report, "tuning a soft-trained model", arm);
    assert!(of("ste").starts_with("| `ste` | 0.100 (1) | 0.500 (2) |"), "{}", of("ste"));
    assert!(of("raw_topk").starts_with("| `raw_topk` | 0.200 (2) | 0.100 (1) |"), "{}", of("raw_topk"));
}

#[test]
fn experts_that_should_not_have_run_are_seen() {
    let report = write(&results(), &[]);
    assert!(report.contains("differ from what the method should take: `raw_topk` (collapsed).\n"), "{report}");
    assert!(row(&report, "## Task `collapsed`", "raw_topk").contains("**2 (1)**"));
    assert!(row(&report, "## Task `collapsed`", "raw_topk+drop").contains("| 0.700 (at most 1) |"), "full experts take no more");
    assert!(row(&report, "## Task `collapsed`", "experts_only").contains("| 3.38 (at most 3.38) |"), "34 of 100 steps are soft");
    let treated = row(&report, "## Task `collapsed`", "raw_topk+reinit");
    assert!(treated.contains("| 3 |") && treated.contains("| 1 (1) |"), "three actions: {treated}");
}

#[test]
fn pictures_show_the_arms() {
    let folder = std::env::temp_dir().join(format!("hardmax-report-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let results = results();
    let pictures = plots::draw(&results, &folder).unwrap();
    let stems: Vec<&str> = pictures.iter().map(|picture| picture.stem.as_str()).collect();
    let expected = [
        "loss-equal",
        "loss-collapsed",
        "gap-temperature",
        "router-gradient",
        "gradient-quality",
        "load-collapsed",
        "quality-fidelity",
        "cost",
    ];
    assert_eq!(stems, expected);
    let report = write(&results, &pictures);
    for stem in stems {
        let svg = fs::read_to_string(folder.join(stem).with_extension("svg")).unwrap();
        let arm = if stem.ends_with("collapsed") { "raw_topk+reinit" } else { "ste" };
        assert!(svg.contains(&format!(">{arm}<")), "{stem}");
        assert!(fs::metadata(folder.join(stem).with_extension("png")).unwrap().len() > 1000, "{stem}");
        assert_eq!(report.matches(&format!("](plots/{stem}.svg)")).count(), 1, "{stem}");
    }
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn nothing_at_all_is_a_report_too() {
    let nothing = Results { cells: Vec::new(), ..results() };
    let folder = std::env::temp_dir();
    assert!(plots::draw(&nothing, &folder).unwrap().is_empty());
    let report = write(&nothing, &[]);
    assert!(report.starts_with("# Estimators compared") && !report.contains("## Task") && !report.contains("four questions"));
}
