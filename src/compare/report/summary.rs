//! The table of the four questions: fidelity, stability, cost, needs.

use super::{heading, line, tables::as_expected};
use crate::{
    compare::{
        results::CellResult,
        spec::{Mode, TaskName},
        table::{Runs, Spread, Table, figure},
    },
    moe::estimator::{EstimatorSpec, Purpose},
};

/// One arm in all tasks from scratch.
struct Arm<'a> {
    name: &'a str,
    places: Vec<(&'a Table<'a>, &'a Runs<'a>)>,
}

/// The section; empty without a task.
pub(super) fn write(tables: &[Table<'_>]) -> String {
    let mut arms = gather(tables);
    if arms.is_empty() {
        return String::new();
    }
    arms.sort_by(|a, b| a.loss().total_cmp(&b.loss()));
    let titles = [
        "arm",
        "hard top-1, mean over tasks",
        "**fidelity**: gap top-1, median and worst task",
        "**stability**: worst seed over median; gradient std; diverged",
        "**cost**: experts/token of 8; step over raw_topk's; peak MiB",
        "**needs**",
    ];
    let base = step_of(tables);
    let row =
        |arm: &Arm<'_>| line([format!("`{}`", arm.name), figure(arm.loss()), arm.fidelity(), arm.stability(), arm.cost(base), arm.needs()]);
    let (controls, estimators): (Vec<_>, Vec<_>) = arms.iter().partition(|arm| arm.is_control());
    let rows = |arms: Vec<&Arm<'_>>| arms.into_iter().map(row).collect::<String>();
    let rule = line(["*controls*", "", "", "", "", ""]);
    format!(
        "## The four questions\n\nOver the tasks from scratch at equal steps. Arms with balance losses, biases or remedies are in the tables of their \
         tasks.\n\n{}{}{rule}{}\n{}",
        heading(&titles),
        rows(estimators),
        rows(controls),
        executed(tables)
    )
}

/// Arms that are an estimator or a control and nothing besides.
fn gather<'a>(tables: &'a [Table<'a>]) -> Vec<Arm<'a>> {
    let mut arms: Vec<Arm<'a>> = Vec::new();
    for table in tables.iter().filter(|table| table.mode == Mode::Scratch && table.task != TaskName::Collapsed) {
        for runs in table.all().filter(|runs| !runs.steps.is_empty() && !runs.arm.name.contains('+')) {
            match arms.iter_mut().find(|arm| arm.name == runs.arm.name) {
                Some(arm) => arm.places.push((table, runs)),
                None => arms.push(Arm { name: &runs.arm.name, places: vec![(table, runs)] }),
            }
        }
    }
    arms
}

/// Median step of `raw_topk` in each task: the unit of step times.
fn step_of<'a>(tables: &'a [Table<'a>]) -> impl Fn(&Table<'_>) -> Option<f64> + Copy + 'a {
    move |of: &Table<'_>| {
        let table = tables.iter().find(|table| table.task == of.task && table.mode == of.mode)?;
        Some(table.find("raw_topk")?.spread(|result| Some(result.step_ms.median))?.median)
    }
}

impl Arm<'_> {
    fn is_control(&self) -> bool {
        self.places.iter().any(|(_, runs)| runs.arm.route.is_control())
    }

    /// Medians of a figure, one for each task.
    fn medians(&self, value: impl Fn(&CellResult) -> Option<f64>) -> Vec<f64> {
        self.places.iter().filter_map(|(_, runs)| Some(runs.spread(&value)?.median)).collect()
    }

    /// Geometric, so that no task outweighs another. Endless without a figure.
    fn loss(&self) -> f64 {
        let losses = self.medians(|result| result.relative(result.loss.hard1));
        match losses.is_empty() {
            true => f64::INFINITY,
            false => (losses.iter().map(|loss| loss.max(1e-12).ln()).sum::<f64>() / losses.len() as f64).exp(),
        }
    }

    fn fidelity(&self) -> String {
        match Spread::of(self.medians(|result| result.relative(result.gap().hard1)).into_iter()) {
            Some(gap) => format!("{}; {}", figure(gap.median), figure(gap.high)),
            None => "-".to_owned(),
        }
    }

    fn stability(&self) -> String {
        let ratio = |runs: &Runs<'_>| runs.hard1().map(|spread| spread.high / spread.median);
        let worst = self.places.iter().filter_map(|(_, runs)| ratio(runs)).filter(|ratio| ratio.is_finite()).fold(0.0, f64::max);
        let std = Spread::of(self.medians(|result| result.router_grad.std).into_iter());
        let diverged: usize = self.places.iter().map(|(_, runs)| runs.diverged()).sum();
        let failed: usize = self.places.iter().map(|(_, runs)| runs.failed).sum();
        let std = std.map_or("-".to_owned(), |std| figure(std.median));
        format!("{}; {std}; {}", if worst > 0.0 { figure(worst) } else { "-".to_owned() }, diverged + failed)
    }

    fn cost(&self, base: impl Fn(&Table<'_>) -> Option<f64>) -> String {
        let of_8 = self.places.iter().filter(|(table, _)| table.task.experts() == 8);
        let executed = Spread::of(of_8.filter_map(|(_, runs)| Some(runs.spread(|result| Some(result.executed_per_token))?.median)));
        let ratio =
            |(table, runs): &(&Table<'_>, &Runs<'_>)| Some(runs.spread(|result| Some(result.step_ms.median))?.median / base(table)?);
        let step = Spread::of(self.places.iter().filter_map(ratio));
        let peak = self.medians(|result| result.peak_bytes.map(|bytes| bytes as f64 / f64::from(1 << 20))).into_iter().fold(0.0, f64::max);
        let or_dash = |spread: Option<Spread>| spread.map_or("-".to_owned(), |spread| figure(spread.median));
        format!("{}; {}; {}", or_dash(executed), or_dash(step), figure(peak))
    }

    fn needs(&self) -> String {
        let Some((table, runs)) = self.places.first() else { return String::new() };
        if self.is_control() {
            return "a control".to_owned();
        }
        let Ok(spec) = EstimatorSpec::new(&runs.arm.estimator, table.task.experts(), 1, Purpose::Laboratory) else { return String::new() };
        let needs = spec.at(0, 1).needs();
        let words = [
            (needs.dense, "all experts run"),
            (needs.noise, "noise"),
            (needs.state, "state"),
            (needs.outputs, "further router outputs"),
            (needs.backward, "own backward"),
            (needs.merge, "merged weights"),
            (!spec.row().exports(), "no checkpoint"),
        ];
        let needed: Vec<&str> = words.into_iter().filter_map(|(needed, word)| needed.then_some(word)).collect();
        if needed.is_empty() { "nothing".to_owned() } else { needed.join(", ") }
    }
}

/// Whether every arm executed what its method should take.
fn executed(tables: &[Table<'_>]) -> String {
    let mut wrong: Vec<String> = Vec::new();
    let mut cells = 0;
    for table in tables {
        for runs in table.all() {
            cells += runs.steps.len() + runs.flops.len();
            if runs.steps.iter().chain(&runs.flops).any(|result| !as_expected(table.task.experts(), runs.arm, result)) {
                wrong.push(format!("`{}` ({})", runs.arm.name, table.id()));
            }
        }
    }
    match wrong.is_empty() {
        true => format!("Experts executed per token, counted, are what the method should take in all {cells} trained cells.\n\n"),
        false => format!("Experts executed per token differ from what the method should take: {}.\n\n", wrong.join(", ")),
    }
}
