//! `report.md`: what was run, the four questions, and tables for each task.

mod domains;
mod gradients;
mod summary;
mod tables;

use std::{collections::BTreeMap, fmt::Write as _};

use super::{
    plots::Picture,
    rates,
    results::{By, Expected, Outcome, Results},
    spec::{Mode, TaskName},
    table::{self, Runs, Spread, Table},
};

/// The report as Markdown. `pictures` are in the folder `plots` beside it.
pub fn write(results: &Results, pictures: &[Picture]) -> String {
    let tables = table::tables(results);
    let of = |task: TaskName, mode: Mode| pictures.iter().filter(move |p| (p.task, p.mode) == (task, mode)).map(shown).collect::<String>();
    let mut out = head(results);
    out += &summary::write(&tables);
    for table in &tables {
        out += &tables::section(table);
        out += &domains::block(table);
        out += &of(table.task, table.mode);
    }
    out += &rates::section(results);
    out += &gradients::section(results);
    out += &of(TaskName::Gradient, Mode::Scratch);
    out + &failures(results) + LEGEND
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
    let diverged = results.cells.iter().filter(|cell| matches!(&cell.outcome, Outcome::Trained(result) if !result.is_sound())).count();
    let machine = &results.machine;
    let (minutes, seconds) = ((results.seconds / 60.0) as u64, (results.seconds % 60.0) as u64);
    format!(
        "# Estimators compared\n\n\
         | | |\n|---|---|\n\
         | command | `{}` |\n\
         | hardmax | {} at {} (laboratory {}) |\n\
         | machine | {}, {} cores, {} cells at once |\n\
         | cells | {}, of which {failed} failed and {diverged} diverged |\n{}\
         | seeds | {seeds} |\n\
         | last run | {minutes} min {seconds} s |\n\n\
         Figures are medians over seeds with [least..most]. Losses are test losses in units of the best constant prediction: 1 is useless, 0 is \
         perfect. Arms of which seeds failed or diverged say so by their name: their figures are of the other seeds, and they are ordered as if \
         those had lost. The columns are explained at the end.\n\n",
        results.command,
        machine.hardmax,
        in_words(&machine.git),
        results.lab,
        machine.cpu,
        machine.cores,
        machine.jobs,
        results.cells.len(),
        others(results),
    )
}

/// Cells that earlier runs left, by another program or on another processor: times may differ for that alone.
fn others(results: &Results) -> String {
    let last = By { git: results.machine.git.clone(), cpu: results.machine.cpu.clone() };
    let mut counts: BTreeMap<&By, usize> = BTreeMap::new();
    results.cells.iter().filter(|cell| cell.by != last).for_each(|cell| *counts.entry(&cell.by).or_default() += 1);
    counts.iter().map(|(by, count)| format!("| left by an earlier run | {count} cells: {}, {} |\n", in_words(&by.git), by.cpu)).collect()
}

/// A commit, or how a build is told.
fn in_words(commit: &str) -> &str {
    match commit {
        "unknown" => "an unknown commit (built without HARDMAX_GIT=$(git rev-parse --short HEAD))",
        commit => commit,
    }
}

fn failures(results: &Results) -> String {
    let what = |outcome: &Outcome| match outcome {
        Outcome::Failed(error) => Some(error.replace('\n', " ")),
        Outcome::Trained(result) if !result.is_sound() => Some(format!("not finite after {} steps", result.steps)),
        Outcome::Trained(_) | Outcome::Gradient(_) => None,
    };
    let mut out = String::new();
    for (spec, what) in results.cells.iter().filter_map(|cell| Some((&cell.spec, what(&cell.outcome)?))) {
        if out.is_empty() {
            out += "## Cells that failed or diverged\n\n";
        }
        let (task, mode, budget, arm, seed) = (spec.task.id(), spec.mode.id(), spec.budget.id(), &spec.arm.name, spec.seed);
        // Writing to a String cannot fail.
        let _ = writeln!(out, "* {task}, {mode}, equal {budget}, `{arm}`, seed {seed}: {what}");
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

fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| NOTHING.to_owned())
}

fn median(spread: Option<Spread>) -> String {
    or_dash(spread.map(|spread| table::figure(spread.median)))
}

/// Names of arms or tasks in a sentence.
fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// A line of a Markdown table.
fn line<S: AsRef<str>>(cells: impl IntoIterator<Item = S>) -> String {
    cells.into_iter().fold(String::from("|"), |line, cell| line + " " + cell.as_ref() + " |") + "\n"
}

/// Heading and rule of a Markdown table.
fn heading<S: AsRef<str>>(titles: &[S]) -> String {
    line(titles) + "|" + &"---|".repeat(titles.len()) + "\n"
}

/// A line that sets off what is below it.
fn rule(words: &str, columns: usize) -> String {
    line(std::iter::once(words).chain(std::iter::repeat_n("", columns - 1)))
}

/// A table of all arms, controls set off.
fn framed(table: &Table<'_>, titles: &[&str], row: impl Fn(&Runs<'_>) -> String) -> String {
    let rows = |runs: &[Runs<'_>]| runs.iter().map(&row).collect::<String>();
    let controls = if table.controls.is_empty() { String::new() } else { rule("*controls*", titles.len()) + &rows(&table.controls) };
    format!("{}{}{controls}\n", heading(titles), rows(&table.estimators))
}

/// A figure that there is not.
const NOTHING: &str = "-";

const LEGEND: &str = "\
## What the columns mean

* **k**: experts per token in training; `-`: the estimator has none.
* **training routing**, **hard top-1**, **hard top-2**: test loss when the trained model routes as in training (without noise), or hard. \
A control without a router has no top-2.
* **against** another arm: hard top-1 minus that arm's, seed by seed, since arms share the data and the start of a seed: the median of these \
differences (below 0: better), and in how many seeds it was better. *Slanted*: seeds disagree on the sign, so the difference is not told from \
chance. Where three seeds agree, chance does that too in one case of four, where five agree in one of sixteen.
* **fidelity**: relative L2 distance of the outputs under hard top-1 (and top-2) from those of the training routing, pooled over test rows: what \
a caller sees of hardening. **missed mass**: routing weight outside the top-1, mean over tokens. **loss gap**: hard top-1 minus training routing. \
Below 0: the hard model is the better one, which does not mean that it answers alike.
* **agreement**, **NMI**: share of test tokens whose top-1 expert is that of the regions or labels that the section names, experts matched to \
them as well as possible; normalised mutual information of expert and region. 1 is the same partition.
* **dead**, **MaxVio**: experts with less than 0.05 of a fair load under hard top-1; load of the busiest expert over the fair one, minus 1.
* **load of each expert**: over a fair share, under hard top-1: median over seeds of the busiest, of the second, and so on.
* **load entropy**, **Gini**: of the load under hard top-1; even load has 1 and 0.
* **router gradient**: mean norm over the run of the task's gradient at the router; relative bias and standard deviation of a draw against the \
exact gradient of the expected loss, by enumeration, where that exists: for k = 1 on the tasks of the small net. None of arms whose choice something \
else changes in training (bias, jitter, exploration, capacity, remedies): the exact gradient would be that of another choice.
* **bias**: from a mean over finitely many draws, whose own error (std / √draws) is taken out: √max(0, distance² − std²/draws). **<**: it is \
below that error, which is what is printed; more cannot be said. The median over seeds of the medians over five points of the run (or over \
problems).
* **experts/token**: rows pushed through experts in training forwards, counted, per token; in brackets what the method should take. \
**Bold**: the two disagree.
* **step**: milliseconds of CPU time of an update, median over the steps, then over seeds. Cells share caches and memory: the same step takes half as \
long again beside another cell, so that differences below 50 % mean nothing.
* **peak**: growth of the process's memory while it trained, at its highest, MiB.
* **equal expert-FLOPs**: hard top-1 when an arm stops as soon as it has spent as many products of a token with an expert, forward and backward, \
as a top-1 arm that runs and trains one expert per token spends in all steps; and after how many steps that was. Of an arm that is such an arm, *all*: its runs at equal steps. All are of the same seeds, \
which may be fewer than those at equal steps, so that differences are paired.
* **distance**, **KL**, **agreement with the teacher**: hard top-1 outputs against the soft outputs of the teacher: pooled relative L2 distance, \
nats, share of rows with the same most probable class.
* **perplexity**: e to the mean loss per byte: 1 is perfect, 256 is a byte drawn evenly.
* Below the line are controls: `frozen` a random router that never learns, `hash` a hash of the token, `oracle` the regions or labels that the \
section names, `experts_only` the router of a soft-trained model, kept while the experts learn to be routed hard, `untouched` the soft-trained \
model that tuning starts from, as it is.
";

#[cfg(test)]
mod tests;
