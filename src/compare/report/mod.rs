//! `report.md`: what was run, the four questions, and a table for each task.

mod summary;
mod tables;

use std::fmt::Write as _;

use super::{
    plots::Picture,
    rates,
    results::{Expected, Outcome, Results},
    spec::{Mode, TaskName},
    table::{self, Table},
};

/// The report as Markdown. `pictures` are in the folder `plots` beside it.
pub fn write(results: &Results, pictures: &[Picture]) -> String {
    let tables = table::tables(results);
    let mut out = head(results);
    out += &summary::write(&tables);
    for table in &tables {
        out += &tables::section(table);
        let (loss, more) = (format!("loss-{}", table.id()), of_table(table));
        out +=
            &pictures.iter().filter(|picture| picture.stem == loss || more.contains(&picture.stem.as_str())).map(shown).collect::<String>();
    }
    out += &rates::section(results);
    out += &tables::gradients(results);
    let placed = |stem: &str| tables.iter().any(|table| stem == format!("loss-{}", table.id()) || of_table(table).contains(&stem));
    let rest = pictures.iter().filter(|picture| !placed(&picture.stem));
    out += &rest.map(shown).collect::<String>();
    out + &failures(results) + LEGEND
}

/// Pictures that belong to a task's section besides that of its losses.
fn of_table(table: &Table<'_>) -> &'static [&'static str] {
    match (table.task, table.mode) {
        (TaskName::Equal, Mode::Scratch) => &["gap-temperature", "router-gradient", "cost"],
        (TaskName::Collapsed, Mode::Scratch) => &["load-collapsed"],
        _ => &[],
    }
}

fn shown(picture: &Picture) -> String {
    format!("![{1}](plots/{1}.svg)\n\n*{0}*\n\n", picture.caption, picture.stem)
}

fn head(results: &Results) -> String {
    let mut seeds: Vec<u64> = results.cells.iter().map(|cell| cell.spec.seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    let seeds = seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    let failed = results.cells.iter().filter(|cell| matches!(cell.outcome, Outcome::Failed(_))).count();
    let machine = &results.machine;
    let (minutes, seconds) = ((results.seconds / 60.0) as u64, (results.seconds % 60.0) as u64);
    format!(
        "# Estimators compared\n\n\
         | | |\n|---|---|\n\
         | command | `{}` |\n\
         | hardmax | {} at {} (laboratory {}) |\n\
         | machine | {}, {} cores, {} cells at once |\n\
         | cells | {}, of which {failed} failed |\n\
         | seeds | {seeds} |\n\
         | last run | {minutes} min {seconds} s |\n\n\
         Figures are medians over seeds with [least..most]. Losses are test losses in units of the best constant prediction: 1 is useless, 0 is \
         perfect. The columns are explained at the end.\n\n",
        results.command,
        machine.hardmax,
        machine.git,
        results.lab,
        machine.cpu,
        machine.cores,
        machine.jobs,
        results.cells.len(),
    )
}

fn failures(results: &Results) -> String {
    let failed = results.cells.iter().filter_map(|cell| match &cell.outcome {
        Outcome::Failed(error) => Some((&cell.spec, error)),
        _ => None,
    });
    let mut out = String::new();
    for (spec, error) in failed {
        if out.is_empty() {
            out += "## Cells that failed\n\n";
        }
        let (task, mode, arm, seed) = (spec.task.id(), spec.mode.id(), &spec.arm.name, spec.seed);
        // Writing to a String cannot fail.
        let _ = writeln!(out, "* {task}, {mode}, `{arm}`, seed {seed}: {}", error.replace('\n', " "));
    }
    if out.is_empty() { out } else { out + "\n" }
}

/// As a column has it.
fn expected(expected: Expected) -> String {
    match expected {
        Expected::Exactly(n) => table::figure(n),
        Expected::AtMost(n) => format!("at most {}", table::figure(n)),
        Expected::Merged => "1 merged".to_owned(),
    }
}

/// A line of a Markdown table.
fn line<S: AsRef<str>>(cells: impl IntoIterator<Item = S>) -> String {
    cells.into_iter().fold(String::from("|"), |line, cell| line + " " + cell.as_ref() + " |") + "\n"
}

/// Heading and rule of a Markdown table.
fn heading<S: AsRef<str>>(titles: &[S]) -> String {
    line(titles) + "|" + &"---|".repeat(titles.len()) + "\n"
}

const LEGEND: &str = "\
## What the columns mean

* **k**: experts per token in training; `-`: the estimator has none.
* **training routing**, **hard top-1**, **hard top-2**: test loss when the trained model routes as in training (without noise), or hard. \
A control without a router has no top-2.
* **gap**: hard top-1 minus training routing. Below 0: the hard model is the better one.
* **agreement**, **NMI**: share of test tokens whose top-1 expert is that of the best routing, experts matched to regions as well as \
possible; normalised mutual information of expert and region. 1 is perfect.
* **dead**, **MaxVio**: experts with less than 0.05 of a fair load under hard top-1; load of the busiest expert over the fair one, minus 1.
* **router gradient**: mean norm over the run of the task's gradient at the router; relative bias and standard deviation of a draw against the \
exact gradient of the expected loss, by enumeration, where that exists: for k = 1 on the synthetic tasks.
* **experts/token**: rows pushed through experts in training forwards, counted, per token; in brackets what the method should take. \
**Bold**: the two disagree.
* **step**: milliseconds of CPU time of an update, median. Cells share caches and memory, so small differences mean nothing.
* **peak**: growth of the process's memory while it trained, at its highest, MiB.
* **equal expert-FLOPs**: hard top-1 when the arm has so many fewer steps as its step takes more products of experts than that of a sparse \
top-1 arm: one for a row that runs, two more where it learns; `=`: it takes as many.
* Below the line are controls: `frozen` a random router that never learns, `hash` a hash of the token, `oracle` the best routing (digits and \
text: the rotation, the domain), `experts_only` the router of a soft-trained model, kept while the experts learn to be routed hard.
";

#[cfg(test)]
mod tests;
