//! The table of the four questions: fidelity, stability, cost, needs.

use super::{
    heading, line, listed, median, or_dash, rule,
    tables::{RAW, as_expected},
};
use crate::{
    compare::{
        results::CellResult,
        spec::{Mode, TaskName},
        table::{Runs, Seeds, Spread, Table, figure, rough},
    },
    moe::estimator::{EstimatorSpec, Purpose},
};

/// One arm in the tasks in which it ran from scratch.
struct Arm<'a> {
    name: &'a str,
    places: Vec<(&'a Table<'a>, &'a Runs<'a>)>,
}

/// What arms are compared on.
struct Field<'a> {
    tables: Vec<&'a Table<'a>>,
    arms: Vec<Arm<'a>>,
}

/// A column: its title, and what it says of an arm.
type Column = (&'static str, fn(&Field<'_>, &Arm<'_>) -> String);

/// A loss below is solved: how far below is the optimizer's, and would rule a mean.
const SOLVED: f64 = 1e-3;

const COLUMNS: [Column; 14] = [
    ("arm", |_, arm| arm.named()),
    ("mean rank [best..worst]", |field, arm| or_dash(field.ranks(arm, at_equal_steps).map(|ranks| ranks.to_string()))),
    ("hard top-1, geometric mean", |_, arm| or_dash(arm.loss(at_equal_steps).map(figure))),
    ("**fidelity**: rel. L2, median task", |_, arm| median(arm.moved())),
    ("worst task", |_, arm| or_dash(arm.moved().map(|moved| figure(moved.high)))),
    ("loss gap, worst task", |_, arm| or_dash(arm.gap().map(|gap| figure(gap.high)))),
    ("**stability**: worst seed / median", |_, arm| or_dash(arm.worst_seed().map(figure))),
    ("gradient std, median task", |_, arm| median(arm.over_tasks(|result| result.router_grad.std))),
    ("**cost**: experts/token of 8", |_, arm| median(arm.executed_of_8())),
    ("at equal expert-FLOPs: mean rank", |field, arm| or_dash(field.ranks(arm, at_equal_flops).map(|ranks| ranks.to_string()))),
    ("geometric mean", |_, arm| or_dash(arm.loss(at_equal_flops).map(figure))),
    ("step / `raw_topk`'s", |_, arm| or_dash(arm.step().map(|step| step.roughly()))),
    ("peak MiB, worst task", |_, arm| or_dash(arm.over_tasks(CellResult::peak_mib).map(|peak| rough(peak.high)))),
    ("**needs**", |_, arm| arm.needs()),
];

/// The runs of an arm that count, of those that it has in a task.
type Budgeted = for<'a> fn(&Table<'a>, &Runs<'a>) -> Option<Seeds<'a>>;

fn at_equal_steps<'a>(_: &Table<'a>, runs: &Runs<'a>) -> Option<Seeds<'a>> {
    Some(runs.steps.clone())
}

fn at_equal_flops<'a>(table: &Table<'a>, runs: &Runs<'a>) -> Option<Seeds<'a>> {
    table.at_equal_flops(runs)
}

/// The section; empty without a task.
pub(super) fn write(tables: &[Table<'_>]) -> String {
    let field = Field::new(tables);
    if field.arms.is_empty() {
        return String::new();
    }
    let titles = COLUMNS.map(|(title, _)| title);
    let rows = |arms: Vec<&Arm<'_>>| field.sorted(arms).into_iter().map(|arm| field.row(arm)).collect::<String>();
    let (controls, estimators): (Vec<_>, Vec<_>) = field.arms.iter().filter(|arm| field.is_whole(arm)).partition(|arm| arm.is_control());
    let names = listed(field.tables.iter().map(|table| table.task.id()));
    format!(
        "## The four questions\n\nArms that ran on every one of the tasks {names}, from scratch, at equal steps. They are ordered by their mean rank \
         (rank by hard top-1 within each task, ties shared), because that gives every task one voice: a mean of losses is ruled by the tasks on which \
         losses differ by factors. Ranks in turn do not know small differences from large ones: whether an arm is better than its neighbour is in the \
         paired differences of each task. Losses below {SOLVED} count as {SOLVED} here. Task `{}` is no vote: it begins broken. \
         Fidelity is how far hardening moves the outputs; a loss gap near 0 does not tell that they stay. What an arm gets for what its steps cost is \
         in the columns at equal expert-FLOPs.\n\n{}{}{}{}\n{}{}",
        TaskName::Collapsed.id(),
        heading(&titles),
        rows(estimators),
        rule("*controls, ranked as if among them*", titles.len()),
        rows(controls),
        field.partial(),
        executed(tables)
    )
}

impl<'a> Field<'a> {
    fn new(tables: &'a [Table<'a>]) -> Self {
        let votes = |table: &&Table<'_>| table.mode == Mode::Scratch && table.task != TaskName::Collapsed;
        let tables: Vec<&Table<'_>> = tables.iter().filter(votes).collect();
        let mut arms: Vec<Arm<'_>> = Vec::new();
        for (table, runs) in tables.iter().flat_map(|table| table.all().map(move |runs| (*table, runs))) {
            if runs.steps.sound.is_empty() {
                continue;
            }
            match arms.iter_mut().find(|arm| arm.name == runs.arm.name) {
                Some(arm) => arm.places.push((table, runs)),
                None => arms.push(Arm { name: &runs.arm.name, places: vec![(table, runs)] }),
            }
        }
        Self { tables, arms }
    }

    /// Whether an arm has figures in every task.
    fn is_whole(&self, arm: &Arm<'_>) -> bool {
        arm.places.len() == self.tables.len()
    }

    /// Ranks of an arm in its tasks, among the estimators that have one in every task.
    fn ranks(&self, arm: &Arm<'_>, budgeted: Budgeted) -> Option<Ranks> {
        let of = |(table, runs): &(&Table<'_>, &Runs<'_>)| {
            let standing = |runs: &Runs<'_>| budgeted(table, runs).map(|seeds| seeds.standing());
            let others = self.arms.iter().filter(|other| self.is_whole(other) && !other.is_control() && other.name != arm.name);
            let own = standing(runs)?;
            let standings = others.filter_map(|other| standing(table.find(other.name)?));
            Some(standings.fold(1.0, |rank, other| {
                rank + if other < own {
                    1.0
                } else if other == own {
                    0.5
                } else {
                    0.0
                }
            }))
        };
        let ranks: Vec<f64> = arm.places.iter().map(of).collect::<Option<_>>()?;
        let mean = ranks.iter().sum::<f64>() / ranks.len() as f64;
        Spread::of(ranks.into_iter()).map(|spread| Ranks { mean, best: spread.low, worst: spread.high })
    }

    fn sorted<'b>(&self, mut arms: Vec<&'b Arm<'b>>) -> Vec<&'b Arm<'b>> {
        let rank = |arm: &Arm<'_>| self.ranks(arm, at_equal_steps).map_or(f64::INFINITY, |ranks| ranks.mean);
        let loss = |arm: &Arm<'_>| arm.loss(at_equal_steps).unwrap_or(f64::INFINITY);
        arms.sort_by(|a, b| rank(a).total_cmp(&rank(b)).then(loss(a).total_cmp(&loss(b))));
        arms
    }

    fn row(&self, arm: &Arm<'_>) -> String {
        line(COLUMNS.map(|(_, cell)| cell(self, arm)))
    }

    /// Arms that ran on some of the tasks only, by the tasks they ran on.
    fn partial(&self) -> String {
        let mut groups: Vec<(String, Vec<&Arm<'_>>)> = Vec::new();
        for arm in self.arms.iter().filter(|arm| !self.is_whole(arm)) {
            let tasks = listed(arm.places.iter().map(|(table, _)| table.task.id()));
            match groups.iter_mut().find(|(of, _)| *of == tasks) {
                Some((_, arms)) => arms.push(arm),
                None => groups.push((tasks, vec![arm])),
            }
        }
        if groups.is_empty() {
            return String::new();
        }
        let titles = COLUMNS.map(|(title, _)| title);
        let mut out = format!(
            "### Arms that ran on fewer tasks\n\nNot to be compared with the arms above across tasks: figures are over the tasks that each part \
             names, and ranks are those that an arm would have there among the arms above.\n\n{}",
            heading(&titles)
        );
        for (tasks, arms) in groups {
            out += &rule(&format!("*on {tasks}:*"), titles.len());
            out += &self.sorted(arms).into_iter().map(|arm| self.row(arm)).collect::<String>();
        }
        out + "\n"
    }
}

/// Of an arm over tasks.
struct Ranks {
    mean: f64,
    best: f64,
    worst: f64,
}

impl std::fmt::Display for Ranks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.best == self.worst {
            true => f.write_str(&figure(self.mean)),
            false => write!(f, "{} [{}..{}]", figure(self.mean), figure(self.best), figure(self.worst)),
        }
    }
}

impl Arm<'_> {
    fn is_control(&self) -> bool {
        self.places.iter().any(|(_, runs)| runs.arm.route.is_control())
    }

    /// With the seeds that are missing in all tasks together.
    fn named(&self) -> String {
        let all = self.places.iter().fold(Seeds::default(), |mut all, (_, runs)| {
            all.sound.extend(&runs.steps.sound);
            all.diverged += runs.steps.diverged;
            all.failed += runs.steps.failed;
            all
        });
        all.lost().map_or_else(|| format!("`{}`", self.name), |lost| format!("`{}` ({lost})", self.name))
    }

    /// Of the medians of a figure, one for each task.
    fn over_tasks(&self, value: impl Fn(&CellResult) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.places.iter().filter_map(|(_, runs)| Some(runs.steps.spread(&value)?.median)))
    }

    /// Geometric mean over tasks; `None` without a figure in one of them.
    fn loss(&self, budgeted: Budgeted) -> Option<f64> {
        let of = |(table, runs): &(&Table<'_>, &Runs<'_>)| Some(budgeted(table, runs)?.hard1()?.median.max(SOLVED).ln());
        let losses: Vec<f64> = self.places.iter().map(of).collect::<Option<_>>()?;
        Some((losses.iter().sum::<f64>() / losses.len() as f64).exp())
    }

    /// How far hard top-1 moves the outputs of the training routing.
    fn moved(&self) -> Option<Spread> {
        self.over_tasks(|result| result.rel_l2.hard1)
    }

    fn gap(&self) -> Option<Spread> {
        self.over_tasks(|result| result.relative(result.gap().hard1))
    }

    /// The largest ratio over tasks.
    fn worst_seed(&self) -> Option<f64> {
        let ratio = |runs: &Runs<'_>| runs.steps.hard1().map(|spread| spread.high.max(SOLVED) / spread.median.max(SOLVED));
        self.places.iter().filter_map(|(_, runs)| ratio(runs)).max_by(f64::total_cmp)
    }

    fn executed_of_8(&self) -> Option<Spread> {
        let of_8 = self.places.iter().filter(|(table, _)| table.task.experts() == 8);
        Spread::of(of_8.filter_map(|(_, runs)| Some(runs.steps.spread(|result| Some(result.executed_per_token))?.median)))
    }

    /// Over the median step of `raw_topk` in the same task.
    fn step(&self) -> Option<Spread> {
        let step = |runs: &Runs<'_>| Some(runs.steps.spread(|result| Some(result.step_ms.median))?.median);
        Spread::of(self.places.iter().filter_map(|(table, runs)| Some(step(runs)? / step(table.find(RAW)?)?)))
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
    for (table, runs) in tables.iter().flat_map(|table| table.all().map(move |runs| (table, runs))) {
        let all = || runs.steps.sound.iter().chain(&runs.flops.sound);
        cells += all().count();
        if !all().all(|(_, result)| as_expected(result)) {
            wrong.push(format!("`{}` ({})", runs.arm.name, table.id()));
        }
    }
    match wrong.is_empty() {
        true => format!("Experts executed per token, counted, are what the method should take in all {cells} trained cells.\n\n"),
        false => format!("Experts executed per token differ from what the method should take: {}.\n\n", wrong.join(", ")),
    }
}
