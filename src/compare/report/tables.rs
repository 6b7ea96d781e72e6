//! A table for each task and mode, and one of gradients.

use super::{expected, heading, line};
use crate::compare::{
    arm::{Arm, Route},
    results::{CellResult, Expected, GradientQuality, Outcome, Results},
    spec::{Mode, TaskName},
    table::{Runs, Spread, Table, figure},
};

/// A column: its title, and what it says of an arm.
type Column = (&'static str, fn(&Table<'_>, &Runs<'_>) -> String);

const NAME: Column = ("arm", |_, runs| match runs.diverged() {
    0 => format!("`{}`", runs.arm.name),
    n => format!("`{}` ({n} of {} diverged)", runs.arm.name, runs.steps.len()),
});
const K: Column = ("k", |table, runs| match runs.arm.route.is_control() {
    true => "1".to_owned(),
    false => runs.k(table.task.experts()).map_or("-".to_owned(), |k| k.to_string()),
});
const TRAIN: Column = ("training routing", |_, runs| shown(runs.spread(|result| result.relative(result.loss.train))));
const HARD1: Column = ("hard top-1", |_, runs| shown(runs.hard1()));
const HARD2: Column = ("hard top-2", |_, runs| shown(runs.spread(|result| result.relative(result.loss.hard2))));
const GAP: Column = ("gap top-1", |_, runs| shown(runs.spread(|result| result.relative(result.gap().hard1))));
const ACCURACY: Column = ("accuracy, training / top-1", |_, runs| {
    let percent =
        |pick: fn(&CellResult) -> Option<f64>| runs.spread(pick).map_or("-".to_owned(), |spread| format!("{:.1} %", spread.median * 100.0));
    format!("{} / {}", percent(|result| result.accuracy?.train), percent(|result| result.accuracy?.hard1))
});
const AGREEMENT: Column = ("agreement / NMI", |_, runs| {
    let median = |pick: fn(&CellResult) -> Option<f64>| runs.spread(pick).map_or("-".to_owned(), |spread| format!("{:.2}", spread.median));
    format!("{} / {}", median(|result| result.agreement), median(|result| result.nmi))
});
const DEAD: Column = ("dead, MaxVio", |_, runs| {
    format!("{}, {}", shown(runs.spread(|result| Some(result.dead as f64))), median(runs.spread(|result| result.max_vio)))
});
const GRADIENT: Column = ("router gradient: norm, bias, std", |_, runs| {
    let of = |pick: fn(&CellResult) -> Option<f64>| median(runs.spread(pick));
    format!("{}, {}, {}", of(|result| result.router_grad.norm), of(|result| result.router_grad.bias), of(|result| result.router_grad.std))
});
const EXECUTED: Column = ("experts/token", |table, runs| {
    let experts = table.task.experts();
    let Some(result) = runs.steps.first() else { return "-".to_owned() };
    let Some(counted) = runs.spread(|result| Some(result.executed_per_token)) else { return "-".to_owned() };
    let text = format!("{} ({})", figure(counted.median), expected(due(experts, runs.arm, result)));
    if runs.steps.iter().all(|result| as_expected(experts, runs.arm, result)) { text } else { format!("**{text}**") }
});
const STEP: Column = ("step, ms", |_, runs| median(runs.spread(|result| Some(result.step_ms.median))));
const PEAK: Column =
    ("peak, MiB", |_, runs| median(runs.spread(|result| result.peak_bytes.map(|bytes| bytes as f64 / f64::from(1 << 20)))));
const FLOPS: Column = ("equal expert-FLOPs", |_, runs| {
    let flops = Spread::of(runs.flops.iter().filter_map(|result| result.relative(result.loss.hard1)));
    if runs.flops.is_empty() { "=".to_owned() } else { shown(flops) }
});
const FIDELITY: Column = ("fidelity: rel. L2 to the teacher", |table, runs| ranked(table, runs, distance));
const QUALITY: Column = ("quality: hard top-1", |table, runs| ranked(table, runs, |runs| runs.hard1()));
const TEACHER: Column = ("KL, agreement with the teacher", |_, runs| {
    let of = |pick: fn(&CellResult) -> Option<f64>| median(runs.spread(pick));
    format!("{}, {}", of(|result| result.fidelity?.kl), of(|result| result.fidelity?.agreement))
});
const ENTROPY: Column = ("load entropy, Gini", |_, runs| {
    format!("{}, {}", median(runs.spread(|result| result.load_entropy)), median(runs.spread(|result| result.gini)))
});
const REMEDIES: Column = ("remedies that acted", |_, runs| match runs.spread(|result| Some(result.remedy_actions as f64)) {
    Some(actions) if !runs.arm.remedies.is_empty() => shown(Some(actions)),
    _ => "-".to_owned(),
});

/// The section of a task in a mode.
pub(super) fn section(table: &Table<'_>) -> String {
    let classes = table.all().any(|runs| runs.steps.iter().any(|result| result.accuracy.is_some()));
    let flops = table.all().any(|runs| !runs.flops.is_empty());
    let accuracy = classes.then_some(ACCURACY);
    let columns: Vec<Column> = match (table.mode, table.task) {
        (Mode::Tune, _) => {
            [NAME, QUALITY, FIDELITY, TEACHER, TRAIN, HARD2].into_iter().chain(accuracy).chain([AGREEMENT, DEAD, EXECUTED]).collect()
        }
        (Mode::Scratch, TaskName::Collapsed) => vec![NAME, K, HARD1, DEAD, ENTROPY, AGREEMENT, REMEDIES, TRAIN, GAP, EXECUTED],
        (Mode::Scratch, _) => {
            let losses = [NAME, K, TRAIN, HARD1, HARD2, GAP].into_iter().chain(accuracy);
            losses.chain([AGREEMENT, DEAD, GRADIENT, EXECUTED, STEP, PEAK]).chain(flops.then_some(FLOPS)).collect()
        }
    };
    let titles: Vec<&str> = columns.iter().map(|(title, _)| *title).collect();
    let rows = |runs: &[Runs<'_>]| runs.iter().map(|runs| line(columns.iter().map(|(_, cell)| cell(table, runs)))).collect::<String>();
    let rule = line(columns.iter().enumerate().map(|(i, _)| if i == 0 { "*controls*" } else { "" }));
    let controls = if table.controls.is_empty() { String::new() } else { rule + &rows(&table.controls) };
    format!("## {}\n\n{}\n\n{}{}{controls}\n", title(table), about(table), heading(&titles), rows(&table.estimators))
}

fn title(table: &Table<'_>) -> String {
    match table.mode {
        Mode::Scratch => format!("Task `{}`", table.task.id()),
        Mode::Tune => format!("Task `{}`, tuning a soft-trained model", table.task.id()),
    }
}

fn about(table: &Table<'_>) -> String {
    let all = || table.all().flat_map(|runs| &runs.steps);
    let trivial = Spread::of(all().map(|result| result.trivial)).map_or(String::new(), |spread| format!(", a constant {spread}"));
    let steps = all().map(|result| result.steps).max().unwrap_or(0);
    let seeds = table.all().map(|runs| runs.steps.len()).max().unwrap_or(0);
    let experts = table.task.experts();
    format!("{experts} experts, {steps} steps, {seeds} seeds; best routing: {}{trivial}.", table.task.optimum())
}

fn distance(runs: &Runs<'_>) -> Option<Spread> {
    runs.spread(|result| result.fidelity?.rel_l2)
}

/// A spread with its rank among the estimators of the table; controls have none.
fn ranked(table: &Table<'_>, runs: &Runs<'_>, value: fn(&Runs<'_>) -> Option<Spread>) -> String {
    let Some(spread) = value(runs) else { return "-".to_owned() };
    if runs.arm.route.is_control() {
        return spread.to_string();
    }
    let better = table.estimators.iter().filter_map(value).filter(|other| other.median < spread.median).count();
    format!("{spread} ({})", better + 1)
}

/// Experts per token that a run of this arm should execute: those of its estimator, fewer where capacity drops rows or
/// nothing was trained, and all of them while the control `experts_only` has its router prepared.
fn due(experts: usize, arm: &Arm, result: &CellResult) -> Expected {
    match (result.executed_expected, arm.route) {
        (_, Route::ExpertsAfter { share }) => {
            let dense = (experts as f64 - 1.0) * (share * result.steps as f64).ceil() / result.steps.max(1) as f64;
            Expected::AtMost(1.0 + dense)
        }
        (Expected::Exactly(n), _) if arm.capacity.is_some() || result.steps == 0 => Expected::AtMost(n),
        (expected, _) => expected,
    }
}

/// Whether as many experts ran as should.
pub(super) fn as_expected(experts: usize, arm: &Arm, result: &CellResult) -> bool {
    let counted = result.executed_per_token;
    match due(experts, arm, result) {
        Expected::Exactly(n) => (counted - n).abs() < 1e-9 * n.max(1.0),
        Expected::AtMost(n) => counted <= n * (1.0 + 1e-9),
        Expected::Merged => (counted - 1.0).abs() < 1e-9,
    }
}

fn shown(spread: Option<Spread>) -> String {
    spread.map_or("-".to_owned(), |spread| spread.to_string())
}

fn median(spread: Option<Spread>) -> String {
    spread.map_or("-".to_owned(), |spread| figure(spread.median))
}

/// Quality of gradients on one token, estimators in the order of the plan.
pub(super) fn gradients(results: &Results) -> String {
    let mut seen: Vec<&str> = Vec::new();
    let mut rows = String::new();
    for cell in &results.cells {
        let Outcome::Gradient(gradient) = &cell.outcome else { continue };
        if seen.contains(&cell.spec.arm.name.as_str()) {
            continue;
        }
        seen.push(&cell.spec.arm.name);
        let pair = |pick: fn(&GradientQuality) -> Option<f64>| {
            let one = |quality: &GradientQuality| pick(quality).map_or("-".to_owned(), figure);
            format!("{} / {}", one(&gradient.quadratic), one(&gradient.cross_entropy))
        };
        let name = format!("`{}`", cell.spec.arm.name);
        rows += &line([name, pair(|quality| quality.bias), pair(|quality| quality.cosine), pair(|quality| quality.std)]);
    }
    if rows.is_empty() {
        return rows;
    }
    let titles = ["arm", "relative bias", "cosine", "relative std of a draw"];
    format!(
        "## Gradients of one token\n\nEight experts with fixed outputs, everything enumerated: squared error / cross-entropy, medians over random \
         problems.\n\n{}{rows}\n",
        heading(&titles)
    )
}
