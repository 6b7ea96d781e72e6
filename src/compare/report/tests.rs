//! The report says what the results hold, and pictures exist for what they hold.

use std::{collections::BTreeMap, fs};

use super::*;
use crate::{
    compare::{
        arm::{Arm, Route},
        plots,
        results::{
            By, ByRouting, CellRecord, CellResult, Curves, DomainLoss, Fidelity, GradientQuality, GradientResult, Hardened, Machine,
            RESULTS_VERSION,
        },
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
    CellRecord::new(spec, by(), outcome)
}

/// What the last run was made by.
fn by() -> By {
    By { git: "abc1234".into(), cpu: "a processor".into() }
}

/// A result with a hard top-1 loss, one fifth above the training routing's, and everything else that can be shown.
fn trained(hard1: f64, executed: f64) -> CellResult {
    let column = |scale: f64| vec![Some(scale), Some(0.5 * scale), Some(0.25 * scale)];
    CellResult {
        loss: ByRouting { train: Some(hard1 / 1.2), hard1: Some(hard1), hard2: Some(1.1 * hard1) },
        trivial: 2.0,
        accuracy: Some(ByRouting { train: Some(0.9), hard1: Some(0.8), hard2: None }),
        rel_l2: Hardened { hard1: Some(0.25), hard2: Some(0.125) },
        missed_mass: Some(0.4),
        utilisation: vec![0.5, 2.04, 0.46, 1.0],
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
    let bias_quartiles = Some([0.5 * bias, 2.0 * bias]);
    GradientQuality { bias: Some(bias), cosine: Some(0.5), std: Some(0.0), bias_quartiles, std_quartiles: Some([0.0; 2]) }
}

/// Half the loss on prose, hardening for nothing there.
fn domains(hard1: f64) -> Vec<DomainLoss> {
    let of =
        |domain: &str, loss| DomainLoss { domain: domain.into(), loss: ByRouting { train: Some(loss), hard1: Some(loss), hard2: None } };
    vec![of("prose", 0.5 * hard1), of("code", hard1)]
}

fn results() -> Results {
    let done = |result: CellResult| Outcome::Trained(Box::new(result));
    let (ste, soft, raw) = (arm("ste", Some(1)), arm("soft", None), arm("raw_topk", Some(1)));
    let frozen = Arm { route: Route::Frozen, name: "frozen".into(), ..arm("onehot", Some(1)) };
    let treated = Arm { remedies: vec!["reinit".into()], ..arm("raw_topk+reinit", Some(1)) };
    let untouched = Arm { route: Route::Untouched, name: "untouched".into(), ..arm("soft", None) };
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
    let flops = CellSpec { budget: Budget::Flops, ..cells[1].spec.clone() };
    cells.push(CellRecord::new(flops, by(), done(CellResult { steps: 12, ..trained(1.0, 8.0) })));
    cells.push(cell(TaskName::Collapsed, Mode::Scratch, &treated, 1, done(trained(0.6, 1.0))));
    let counted = CellResult { executed_expected: Expected::Exactly(1.0), ..trained(0.5, 2.0) };
    cells.push(cell(TaskName::Collapsed, Mode::Scratch, &raw, 1, done(counted)));
    let drop = Capacity { factor: 1.0, overflow: Overflow::Drop, order: Order::Position };
    let dropping = Arm { capacity: Some(drop), ..arm("raw_topk+drop", Some(1)) };
    let dropped = CellResult { executed_expected: Expected::AtMost(1.0), ..trained(0.5, 0.7) };
    cells.push(cell(TaskName::Collapsed, Mode::Scratch, &dropping, 1, done(dropped)));
    let prepared = Arm { route: Route::ExpertsAfter { share: 1.0 / 3.0 }, name: "experts_only".into(), ..arm("onehot", Some(1)) };
    let dense_first = CellResult { executed_expected: Expected::AtMost(3.38), ..trained(0.5, 3.38) };
    cells.push(cell(TaskName::Collapsed, Mode::Scratch, &prepared, 1, done(dense_first)));
    cells.push(cell(TaskName::Equal, Mode::Tune, &ste, 1, tuned(0.2, 0.5)));
    cells.push(cell(TaskName::Equal, Mode::Tune, &raw, 1, tuned(0.4, 0.1)));
    cells.push(cell(TaskName::Equal, Mode::Tune, &untouched, 1, tuned(0.9, 0.01)));
    let gradient = GradientResult { sharpness: Some(1.0), quadratic: quality(1.6), cross_entropy: quality(0.9), ..Default::default() };
    cells.push(cell(TaskName::Gradient, Mode::Scratch, &ste, 1, Outcome::Gradient(gradient)));
    let noisy = GradientQuality { std: Some(4.0), ..quality(0.5) };
    let drawn = GradientResult { sharpness: Some(0.5), noise: Some(1.0), quadratic: noisy, cross_entropy: quality(0.4) };
    cells.push(cell(TaskName::Gradient, Mode::Scratch, &arm("gumbel_st", Some(1)), 1, Outcome::Gradient(drawn)));
    cells.push(cell(TaskName::Gradient, Mode::Scratch, &arm("remoe", Some(1)), 1, Outcome::Failed("no".into())));
    let told = |hard1: f64| done(CellResult { domains: domains(hard1), ..trained(hard1, 1.0) });
    cells.push(cell(TaskName::Text, Mode::Scratch, &soft, 1, Outcome::Failed("out of\npaper".into())));
    cells.push(cell(TaskName::Text, Mode::Scratch, &soft, 2, told(1.0)));
    cells.push(cell(TaskName::Text, Mode::Scratch, &soft, 3, done(CellResult { diverged: true, steps: 7, ..trained(9.0, 1.0) })));
    cells.push(cell(TaskName::Text, Mode::Scratch, &ste, 1, told(1.2)));
    cells.push(cell(TaskName::Text, Mode::Scratch, &raw, 1, told(1.4)));
    cells.push(cell(TaskName::Text, Mode::Scratch, &frozen, 1, told(0.8)));
    cells.push(cell(TaskName::Equal, Mode::Scratch, &arm("ste_k2", Some(2)), 1, done(trained(0.3, 2.0))));
    Results {
        version: RESULTS_VERSION,
        lab: LAB_VERSION,
        machine: Machine { cpu: "a processor".into(), cores: 2, jobs: 2, hardmax: "0.1.0".into(), git: "abc1234".into() },
        command: "hardmax compare --tasks equal".into(),
        seconds: 125.0,
        cells,
    }
}

/// What is between a heading and the next one of its rank.
fn section<'a>(report: &'a str, title: &str) -> &'a str {
    let rank = title.split(' ').next().unwrap();
    let section = report.split_once(title).unwrap_or_else(|| panic!("no {title} in {report}")).1;
    section.split(&format!("\n{rank} ")).next().unwrap()
}

/// The row of an arm in a section.
fn row<'a>(section: &'a str, arm: &str) -> &'a str {
    section.lines().find(|line| line.starts_with(&format!("| `{arm}`"))).unwrap_or_else(|| panic!("no {arm} in {section}"))
}

#[test]
fn the_report_says_what_the_results_hold() {
    let report = write(&results(), &[]);
    for said in [
        "`hardmax compare --tasks equal`",
        "a processor, 2 cores, 2 cells",
        "| seeds | 1, 2, 3 |",
        "2 min 5 s",
        "of which 2 failed and 1 diverged",
        "* text, scratch, equal steps, `soft`, seed 1: out of paper\n",
        "* text, scratch, equal steps, `soft`, seed 3: not finite after 7 steps\n",
    ] {
        assert!(report.contains(said), "{said}");
    }
    let equal = section(&report, "## Task `equal`\n");
    let about = "8 experts; 100 steps of 8 tokens, learning rate 0.01 at its peak; 3 seeds (1 at equal expert-FLOPs).";
    assert!(equal.contains(about) && equal.contains("go by the best routing, known in closed form."), "{equal}");
    let ste = row(section(equal, "### Quality"), "ste");
    assert!(ste.starts_with("| `ste` | 1 | 0.110 [0.100..0.250] |"), "losses over the best constant: {ste}");
    assert!(row(section(equal, "### Quality"), "soft").starts_with("| `soft` | - |"), "no k");
    let cost = section(equal, "### Cost");
    let titles =
        "| arm | experts/token | step, ms | hard top-1 at equal expert-FLOPs | there against `frozen` | there against `raw_topk` |";
    assert!(cost.contains(titles), "without the peak, which no arm has: {cost}");
    assert!(row(cost, "ste").ends_with("| 8 (8) | 16 | 0.500 after 12 steps | -0.100, 1 of 1 | 0.300, 0 of 1 |"), "{cost}");
    let raw = row(cost, "raw_topk");
    assert!(raw.ends_with("| 0.200 after all steps | -0.400, 1 of 1 | - |"), "of the one seed that others have there: {raw}");
    let ste = row(section(equal, "### Quality"), "ste");
    assert!(ste.contains("| 0.250 | 0.125 | 0.400 |"), "how far hardening moves outputs: {ste}");
    assert!(ste.contains("| 90.0 % / 80.0 % / - |"), "{ste}");
    assert!(row(section(equal, "### Routing"), "ste").contains("| 2.0 1 0.50 0.46 |"), "loads, busiest first: {equal}");
    assert!(section(&report, "## Task `text`\n").contains("the domain of the text: a label, not an optimum"));
}

#[test]
fn the_summary_has_fidelity_of_outputs_and_equal_expert_flops() {
    // Without `text`, all arms of which are at equal steps only.
    let equal = results().cells.into_iter().filter(|cell| cell.spec.task == TaskName::Equal).collect();
    let report = write(&Results { cells: equal, ..results() }, &[]);
    let summary = section(&report, "## The four questions");
    assert!(summary.contains("| **fidelity**: rel. L2, median task | worst task | loss gap, worst task |"), "{summary}");
    let ste = row(summary, "ste");
    assert!(ste.starts_with("| `ste` | 1 | 0.110 | 0.250 | 0.250 | 0.0183 |"), "{ste}");
    assert!(ste.contains("| 8 | 4 | 0.500 | 8 |"), "first at equal steps, last at equal expert-FLOPs: {ste}");
    assert!(row(summary, "raw_topk").contains("| 1 | 2 | 0.200 | 1 |"), "{summary}");
}

#[test]
fn cells_of_earlier_builds_are_said() {
    let mut results = results();
    assert!(!write(&results, &[]).contains("left by an earlier run"));
    results.cells[0].by = By { git: "unknown".into(), cpu: "another processor".into() };
    let report = write(&results, &[]);
    assert!(report.contains("| left by an earlier run | 1 cells: an unknown commit"), "{report}");
    assert!(report.contains("another processor |\n"), "{report}");
}

#[test]
fn arms_are_sorted_and_controls_set_off() {
    let report = write(&results(), &[]);
    let quality = section(section(&report, "## Task `equal`\n"), "### Quality");
    let names = ["`ste`", "`ste_k2`", "`raw_topk`", "`soft`", "*controls*", "`frozen`"];
    let places: Vec<usize> = names.iter().map(|name| quality.find(&format!("| {name} |")).unwrap()).collect();
    assert!(places.is_sorted(), "{places:?}");
}

#[test]
fn only_arms_of_every_task_are_ranked_together() {
    let report = write(&results(), &[]);
    let summary = section(&report, "## The four questions");
    let (whole, partial) = summary.split_once("### Arms that ran on fewer tasks").unwrap();
    assert!(whole.contains("tasks `equal`, `text`,") && !whole.contains("| `ste_k2`") && !summary.contains("reinit"), "{summary}");
    // First in `equal`, first in `text`, where two of three seeds of `soft` are lost.
    let ste = row(whole, "ste");
    assert!(ste.starts_with("| `ste` | 1 | "), "{ste}");
    assert!(
        ste.contains("| 2.27 | - | 8 | - | - | 4.5 [1..8] | - | all experts run, own backward |"),
        "worst seed, no std, cost, no peak: {ste}"
    );
    assert!(row(whole, "soft").starts_with("| `soft` (4 of 6 seeds: 1 diverged, 1 failed) | 3 |"), "{whole}");
    assert!(row(whole, "frozen").contains("| 2.50 [1..4] |"), "a control has the rank that it would have: {whole}");
    assert!(partial.contains("*on `equal`:*"), "{partial}");
    assert!(row(partial, "ste_k2").contains("| `ste_k2` | 2 |"), "between the arms of the other table: {partial}");
}

#[test]
fn differences_are_paired_and_doubtful_ones_slanted() {
    let report = write(&results(), &[]);
    let quality = section(section(&report, "## Task `equal`\n"), "### Quality");
    assert!(row(quality, "ste").contains("| -0.500, 3 of 3 | -0.100, 3 of 3 |"), "{quality}");
    assert!(row(quality, "frozen").contains("| - | 0.400, 0 of 3 |"), "not with itself: {quality}");
}

#[test]
fn lost_seeds_are_said_wherever_figures_are() {
    let report = write(&results(), &[]);
    let text = section(&report, "## Task `text`\n");
    for block in ["### Quality", "### Routing", "### Cost", "### Perplexity"] {
        let soft = row(section(text, block), "soft");
        assert!(soft.starts_with("| `soft` (1 of 3 seeds: 1 diverged, 1 failed) |"), "{soft}");
    }
    let quality = section(text, "### Quality");
    assert!(quality.find("| `soft`") > quality.find("| `raw_topk`"), "its median is lost: {quality}");
    assert!(quality.contains("| 0.500 |"), "the figure is of the seed that is left: {quality}");
}

#[test]
fn perplexities_are_by_domain() {
    let report = write(&results(), &[]);
    let perplexity = section(section(&report, "## Task `text`\n"), "### Perplexity");
    assert!(perplexity.contains("| arm | all text | prose | code |"), "{perplexity}");
    // exp(1.2), exp(1.2 - 1.0), exp(0.6), exp(1.2).
    assert!(row(perplexity, "ste").contains("| 3.32 (+22.1 %) | 1.82 (+0.0 %) | 3.32 (+0.0 %) |"), "{perplexity}");
    assert!(!section(&report, "## Task `equal`\n").contains("### Perplexity"));
}

#[test]
fn gradients_say_what_is_in_force_and_what_is_below_the_noise() {
    let report = write(&results(), &[]);
    let gradients = section(&report, "## Gradients of one token");
    assert!(
        row(gradients, "ste").contains("| temperature 1 | 1.60 [0.800..3.20] / 0.900 [0.450..1.80] | 0.500 / 0.500 | 0 / 0 |"),
        "{gradients}"
    );
    // 4 / √8 draws is the error of the mean.
    assert!(row(gradients, "gumbel_st").contains("| temperature 0.500, noise 1 | < 1.41 / 0.400 [0.200..0.800] |"), "{gradients}");
    assert!(row(gradients, "remoe").contains("(0 of 1 seeds: 1 failed) | - | - / - |"), "{gradients}");
    let without = Results { cells: results().cells.into_iter().filter(|cell| cell.spec.task == TaskName::Equal).collect(), ..results() };
    assert!(section(&write(&without, &[]), "## Gradients of one token").contains("Not run"));
}

#[test]
fn quality_and_fidelity_have_ranks_of_their_own() {
    let report = write(&results(), &[]);
    let tuning = section(section(&report, "tuning a soft-trained model"), "### Quality");
    assert!(tuning.contains("| arm | k | quality: hard top-1 | distance: rel. L2 to the teacher | agreement with the teacher |"), "no KL");
    assert!(row(tuning, "ste").starts_with("| `ste` | 1 | 0.100 (1) | 0.500 (2) | 0.900 |"), "{tuning}");
    assert!(row(tuning, "raw_topk").starts_with("| `raw_topk` | 1 | 0.200 (2) | 0.100 (1) |"), "{tuning}");
    assert!(row(tuning, "untouched").starts_with("| `untouched` | - | 0.450 | 0.0100 |"), "a control has no rank: {tuning}");
}

#[test]
fn experts_that_should_not_have_run_are_seen() {
    let report = write(&results(), &[]);
    assert!(report.contains("differ from what the method should take: `raw_topk` (collapsed).\n"), "{report}");
    let collapsed = section(&report, "## Task `collapsed`");
    let cost = section(collapsed, "### Cost");
    assert!(row(cost, "raw_topk").contains("**2 (1)**"));
    assert!(row(cost, "raw_topk+drop").contains("| 0.700 (at most 1) |"), "full experts take no more");
    assert!(row(cost, "experts_only").contains("| 3.38 (at most 3.38) |"), "34 of 100 steps are soft");
    assert!(row(cost, "raw_topk+reinit").contains("| 1 (1) |"), "{cost}");
    let routing = section(collapsed, "### Routing");
    assert!(row(routing, "raw_topk+reinit").ends_with("| 3 |") && row(routing, "raw_topk").ends_with("| - |"), "actions: {routing}");
}

#[test]
fn pictures_show_the_arms() {
    let folder = tempfile::tempdir().unwrap();
    let results = results();
    // What another run drew, of a task that this one has not, and what is none of its own.
    for name in ["loss-digits.svg", "loss-digits.png", "gradient-quality-equal.svg", "mine.svg"] {
        fs::write(folder.path().join(name), "old").unwrap();
    }
    let pictures = plots::draw(&results, folder.path()).unwrap();
    let stems: Vec<&str> = pictures.iter().map(|picture| picture.stem.as_str()).collect();
    let expected = [
        "loss-equal",
        "cost-equal",
        "gap-temperature",
        "router-gradient",
        "fidelity-equal",
        "loss-collapsed",
        "load-collapsed",
        "loss-text",
        "cost-text",
        "load-text",
        "gradient-quality",
    ];
    assert_eq!(stems, expected);
    let left = |name: &str| folder.path().join(name).exists();
    assert!(left("mine.svg") && ["loss-digits.svg", "loss-digits.png", "gradient-quality-equal.svg"].iter().all(|name| !left(name)));
    let report = write(&results, &pictures);
    let svg = |stem: &str| fs::read_to_string(folder.path().join(stem).with_extension("svg")).unwrap();
    for stem in stems {
        let arm = match stem {
            _ if stem.ends_with("collapsed") => "raw_topk+reinit",
            // The only one whose temperature moves.
            "gap-temperature" => "soft",
            _ => "ste",
        };
        assert!(svg(stem).contains(&format!(">{arm}<")), "{stem}");
        assert!(fs::metadata(folder.path().join(stem).with_extension("png")).unwrap().len() > 1000, "{stem}");
        assert_eq!(report.matches(&format!("](plots/{stem}.svg)")).count(), 1, "{stem}");
    }
    assert!(svg("cost-text").contains(">soft (1 of 3 seeds)<") && svg("loss-text").contains(">soft (1 of 3 seeds)<"));
    let names = svg("loss-equal");
    let place = |name: &str| names.find(&format!(">{name}<")).unwrap();
    assert!(place("frozen") < place("soft") && place("soft") < place("ste"), "names are in the order of the ends, highest first");
}

#[test]
fn nothing_at_all_is_a_report_too() {
    let nothing = Results { cells: Vec::new(), ..results() };
    let folder = std::env::temp_dir();
    assert!(plots::draw(&nothing, &folder).unwrap().is_empty());
    let report = write(&nothing, &[]);
    assert!(report.starts_with("# Estimators compared") && !report.contains("## Task") && !report.contains("four questions"));
    assert!(section(&report, "## Gradients of one token").contains("Not run"));
}
