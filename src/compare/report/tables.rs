//! The tables of a task in a mode: quality, routing, cost.

use super::{NOTHING, expected, framed, line, median, or_dash};
use crate::compare::{
    quality::along,
    results::{CellResult, Expected},
    spec::{Mode, TaskName},
    table::{Runs, Seeds, Spread, Table, figure, rough},
};

/// A column: its title, and what it says of an arm.
type Column = (&'static str, fn(&Table<'_>, &Runs<'_>) -> String);

/// Arms that others are compared with, seed by seed: no router that learns, and the plainest one that does.
pub(super) const FROZEN: &str = "frozen";
pub(super) const RAW: &str = "raw_topk";

const NAME: Column = ("arm", |_, runs| named(runs));
const K: Column = ("k", |table, runs| or_dash(runs.k(table.task.experts()).map(|k| k.to_string())));
const TRAIN: Column = ("training routing", |_, runs| spread(&runs.steps, |result| result.relative(result.loss.train)));
const HARD1: Column = ("hard top-1", |_, runs| spread(&runs.steps, CellResult::hard1));
const HARD2: Column = ("hard top-2", |_, runs| spread(&runs.steps, |result| result.relative(result.loss.hard2)));
const MOVED1: Column = ("fidelity: rel. L2, top-1", |_, runs| spread(&runs.steps, |result| result.rel_l2.hard1));
const MOVED2: Column = ("top-2", |_, runs| median(runs.steps.spread(|result| result.rel_l2.hard2)));
const MISSED: Column = ("missed mass", |_, runs| median(runs.steps.spread(|result| result.missed_mass)));
const GAP: Column = ("loss gap top-1", |_, runs| spread(&runs.steps, |result| result.relative(result.gap().hard1)));
const TO_FROZEN: Column = ("against `frozen`", |table, runs| against(table, runs, FROZEN, |runs| Some(runs.steps.clone())));
const TO_RAW: Column = ("against `raw_topk`", |table, runs| against(table, runs, RAW, |runs| Some(runs.steps.clone())));
const ACCURACY: Column = ("accuracy, training / top-1 / top-2", |_, runs| {
    let percent = |pick: fn(&CellResult) -> Option<f64>| runs.steps.spread(pick).map(|spread| format!("{:.1} %", spread.median * 100.0));
    let all =
        [percent(|result| result.accuracy?.train), percent(|result| result.accuracy?.hard1), percent(|result| result.accuracy?.hard2)];
    if all.iter().all(Option::is_none) { NOTHING.to_owned() } else { all.map(or_dash).join(" / ") }
});
const AGREEMENT: Column = ("agreement / NMI", |_, runs| {
    let median = |pick: fn(&CellResult) -> Option<f64>| Some(format!("{:.2}", runs.steps.spread(pick)?.median));
    let both = median(|result| result.agreement).zip(median(|result| result.nmi));
    or_dash(both.map(|(agreement, nmi)| format!("{agreement} / {nmi}")))
});
const DEAD: Column = ("dead", |_, runs| spread(&runs.steps, |result| Some(result.dead as f64)));
const LOAD: Column = ("load of each expert, busiest first", |_, runs| {
    let loads: Vec<Vec<f64>> = runs.steps.sound.iter().map(|(_, result)| busiest_first(&result.utilisation)).collect();
    let experts = loads.first().map_or(0, Vec::len);
    let middle = |i: usize| Spread::of(loads.iter().filter_map(|load| load.get(i).copied())).map(|spread| rough(spread.median));
    if experts == 0 { NOTHING.to_owned() } else { (0..experts).map(|i| or_dash(middle(i))).collect::<Vec<_>>().join(" ") }
});
const MAX_VIO: Column = ("MaxVio", |_, runs| spread(&runs.steps, |result| result.max_vio));
const ENTROPY: Column = ("load entropy", |_, runs| median(runs.steps.spread(|result| result.load_entropy)));
const GINI: Column = ("Gini", |_, runs| median(runs.steps.spread(|result| result.gini)));
const REMEDIES: Column = ("remedies that acted", |_, runs| match runs.arm.remedies.is_empty() {
    true => NOTHING.to_owned(),
    false => spread(&runs.steps, |result| Some(result.remedy_actions as f64)),
});
const NORM: Column = ("router gradient: norm", |_, runs| median(runs.steps.spread(|result| result.router_grad.norm)));
const BIAS: Column = ("bias", |_, runs| or_dash(along(runs).map(|quality| quality.bias.to_string())));
const STD: Column = ("std of a draw", |_, runs| or_dash(along(runs).map(|quality| figure(quality.std))));
const EXECUTED: Column = ("experts/token", |_, runs| {
    let Some((_, result)) = runs.steps.sound.first() else { return NOTHING.to_owned() };
    let text = format!("{} ({})", median(runs.steps.spread(|result| Some(result.executed_per_token))), expected(result.executed_expected));
    if runs.steps.sound.iter().all(|(_, result)| as_expected(result)) { text } else { format!("**{text}**") }
});
const STEP: Column = ("step, ms", |_, runs| roughly(runs.steps.spread(|result| (result.steps > 0).then_some(result.step_ms.median))));
const PEAK: Column = ("peak, MiB", |_, runs| roughly(runs.steps.spread(CellResult::peak_mib)));
const FLOPS: Column = ("hard top-1 at equal expert-FLOPs", |table, runs| {
    let Some((seeds, hard1)) = table.at_equal_flops(runs).and_then(|seeds| seeds.hard1().map(|hard1| (seeds, hard1))) else {
        return NOTHING.to_owned();
    };
    let steps = if runs.flops.planned() == 0 { "all".to_owned() } else { median(seeds.spread(|result| Some(result.steps as f64))) };
    let lost = seeds.lost().map_or(String::new(), |lost| format!(" ({lost})"));
    format!("{hard1} after {steps} steps{lost}")
});
const FLOPS_TO_FROZEN: Column = ("there against `frozen`", |table, runs| against(table, runs, FROZEN, |runs| table.at_equal_flops(runs)));
const FLOPS_TO_RAW: Column = ("there against `raw_topk`", |table, runs| against(table, runs, RAW, |runs| table.at_equal_flops(runs)));
const QUALITY: Column = ("quality: hard top-1", |table, runs| ranked(table, runs, |seeds| seeds.hard1()));
const TO_TEACHER: Column =
    ("distance: rel. L2 to the teacher", |table, runs| ranked(table, runs, |seeds| seeds.spread(|result| result.fidelity?.rel_l2)));
const KL: Column = ("KL", |_, runs| spread(&runs.steps, |result| result.fidelity?.kl));
const SAME_CLASS: Column = ("agreement with the teacher", |_, runs| spread(&runs.steps, |result| result.fidelity?.agreement));

/// The section of a task in a mode.
pub(super) fn section(table: &Table<'_>) -> String {
    let quality: &[Column] = match table.mode {
        Mode::Scratch => &[NAME, K, HARD1, TO_FROZEN, TO_RAW, TRAIN, MOVED1, MOVED2, MISSED, GAP, HARD2, ACCURACY],
        Mode::Tune => {
            &[NAME, K, QUALITY, TO_TEACHER, KL, SAME_CLASS, TO_FROZEN, TO_RAW, TRAIN, MOVED1, MOVED2, MISSED, GAP, HARD2, ACCURACY]
        }
    };
    let blocks = [
        ("Quality", quality),
        ("Routing", &[NAME, AGREEMENT, DEAD, LOAD, MAX_VIO, ENTROPY, GINI, REMEDIES, NORM, BIAS, STD][..]),
        ("Cost", &[NAME, EXECUTED, STEP, PEAK, FLOPS, FLOPS_TO_FROZEN, FLOPS_TO_RAW][..]),
    ];
    let blocks = blocks.map(|(title, columns)| block(table, title, columns)).concat();
    format!("## {}\n\n{}\n\n{blocks}", title(table), about(table))
}

fn title(table: &Table<'_>) -> String {
    match table.mode {
        Mode::Scratch => format!("Task `{}`", table.task.id()),
        Mode::Tune => format!("Task `{}`, tuning a soft-trained model", table.task.id()),
    }
}

/// Estimators, a line, controls; without the columns in which no row says anything.
fn block(table: &Table<'_>, title: &str, columns: &[Column]) -> String {
    let columns: Vec<&Column> = columns.iter().filter(|(_, cell)| table.all().any(|runs| cell(table, runs) != NOTHING)).collect();
    if columns.len() < 2 {
        return String::new();
    }
    let titles: Vec<&str> = columns.iter().map(|(title, _)| *title).collect();
    format!("### {title}\n\n{}", framed(table, &titles, |runs| line(columns.iter().map(|(_, cell)| cell(table, runs)))))
}

fn about(table: &Table<'_>) -> String {
    let size = table.size;
    let (rows, loss) = match table.task {
        TaskName::Digits => ("images", "nats"),
        TaskName::Text => ("windows", "nats per byte"),
        _ => ("tokens", "squared error"),
    };
    let seeds = |of: fn(&Runs<'_>) -> usize| table.all().map(of).max().unwrap_or(0);
    let flops = match seeds(|runs| runs.flops.planned()) {
        0 => String::new(),
        count => format!(" ({count} at equal expert-FLOPs)"),
    };
    let trivial = Spread::of(table.all().flat_map(|runs| &runs.steps.sound).map(|(_, result)| result.trivial));
    let trivial = trivial.map_or(String::new(), |spread| format!(" The best constant prediction has a loss of {spread} ({loss})."));
    format!(
        "{} experts; {} steps of {} {rows}, learning rate {} at its peak; {} seeds{flops}.{trivial} `oracle`, agreement and NMI go by {}.",
        table.task.experts(),
        size.steps,
        size.batch,
        size.rate,
        seeds(|runs| runs.steps.planned()),
        table.task.optimum()
    )
}

/// Name of an arm with what has to be said of its seeds.
pub(super) fn named(runs: &Runs<'_>) -> String {
    match runs.steps.lost() {
        Some(lost) => format!("`{}` ({lost})", runs.arm.name),
        None => format!("`{}`", runs.arm.name),
    }
}

/// A figure with its spread, and of how many seeds it is where others have none.
fn spread(seeds: &Seeds<'_>, value: impl Fn(&CellResult) -> Option<f64>) -> String {
    or_dash(seeds.spread(value).map(|spread| match spread.count == seeds.sound.len() {
        true => spread.to_string(),
        false => format!("{spread} (in {} of {})", spread.count, seeds.sound.len()),
    }))
}

/// The runs that `seeds` picks against those of another arm.
fn against<'a>(table: &Table<'a>, runs: &Runs<'a>, other: &str, seeds: impl Fn(&Runs<'a>) -> Option<Seeds<'a>>) -> String {
    let other = table.find(other).filter(|other| other.arm.name != runs.arm.name);
    let both = other.and_then(|other| Some((seeds(runs)?, seeds(other)?)));
    or_dash(both.and_then(|(own, other)| own.against(&other)).map(|paired| paired.to_string()))
}

/// Loads of experts have no order of their own: seeds are compared by their places.
fn busiest_first(load: &[f64]) -> Vec<f64> {
    let mut load = load.to_vec();
    load.sort_by(|a, b| b.total_cmp(a));
    load
}

/// In two digits, with its range: times and memory are not known to more.
fn roughly(spread: Option<Spread>) -> String {
    or_dash(spread.map(|spread| spread.roughly()))
}

/// A spread with its rank among the estimators of the table; controls have none.
fn ranked(table: &Table<'_>, runs: &Runs<'_>, value: fn(&Seeds<'_>) -> Option<Spread>) -> String {
    let Some(spread) = value(&runs.steps) else { return NOTHING.to_owned() };
    if runs.arm.route.is_control() {
        return spread.to_string();
    }
    let better = table.estimators.iter().filter_map(|runs| value(&runs.steps)).filter(|other| other.median < spread.median).count();
    format!("{spread} ({})", better + 1)
}

/// Whether as many experts ran as should.
pub(super) fn as_expected(result: &CellResult) -> bool {
    let counted = result.executed_per_token;
    match result.executed_expected {
        Expected::Exactly(n) => (counted - n).abs() < 1e-9 * n.max(1.0),
        Expected::AtMost(n) => counted <= n * (1.0 + 1e-9),
        Expected::Merged => (counted - 1.0).abs() < 1e-9,
    }
}
