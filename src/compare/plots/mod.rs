//! The pictures of a comparison.

mod curves;
mod rows;

use std::{fs, io, path::Path};

use super::{
    results::{CellResult, Results},
    spec::{Mode, TaskName},
    table::{Runs, Spread, Table, tables},
};
use crate::{
    error::{Error, Result},
    plot::{ColourBar, Figure, HeatMap, Panel},
};

/// A picture that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Name of the file without extension; there is a `.svg` and a `.png`.
    pub stem: String,
    /// What is to be seen.
    pub caption: String,
    /// Of which task.
    pub task: TaskName,
    /// In which mode.
    pub mode: Mode,
}

/// A picture and what it shows, if the results have that.
type Drawn = Option<(Picture, Figure)>;

/// Width of a picture, pixels.
const WIDTH: f64 = 880.0;
/// Arms whose load over the run is shown: a row for each estimator, a column for each of what is done for it; by suffixes.
struct Shown {
    estimators: &'static [&'static str],
    treatments: &'static [&'static str],
}

const COLLAPSED: Shown =
    Shown { estimators: &["onehot", "raw_topk", "ste"], treatments: &["", "+switch", "+bias", "+reinit", "+remedies"] };
const TEXT: Shown = Shown { estimators: &["raw_topk", "ste"], treatments: &["", "+switch", "+bias"] };
/// Arms that are much better than all estimators, as an oracle may be, are beyond the axis of losses, which ends at this
/// share of the best estimator's.
const BELOW_BEST: f64 = 0.3;

/// Draws what the results have something for into `folder`, which exists. In the order of the report.
pub fn draw(results: &Results, folder: &Path) -> Result<Vec<Picture>> {
    let tables = tables(results);
    let mut drawn: Vec<Drawn> = tables.iter().flat_map(of_table).collect();
    drawn.push(rows::one_token(results));
    let mut pictures = Vec::new();
    for (picture, figure) in drawn.into_iter().flatten() {
        figure.save(&folder.join(&picture.stem))?;
        pictures.push(picture);
    }
    remove_stale(folder, &pictures)?;
    Ok(pictures)
}

/// Removes what earlier runs with other tasks drew: the report would not speak of it. Files of other names stay.
fn remove_stale(folder: &Path, pictures: &[Picture]) -> Result<()> {
    for stem in stems().filter(|stem| pictures.iter().all(|picture| picture.stem != *stem)) {
        for extension in ["svg", "png"] {
            let path = folder.join(format!("{stem}.{extension}"));
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io(&path, error)),
                _ => {}
            }
        }
    }
    Ok(())
}

/// Every name that a picture may have.
fn stems() -> impl Iterator<Item = String> {
    let of_task = |task: TaskName| ["loss", "cost", "load", "fidelity"].map(|kind| format!("{kind}-{}", task.id()));
    let others = [GAP, ROUTER_GRADIENT, ALONG, ONE_TOKEN].map(str::to_owned);
    TaskName::ALL.into_iter().flat_map(of_task).chain(others)
}

/// Names of the pictures that are there once.
const GAP: &str = "gap-temperature";
const ROUTER_GRADIENT: &str = "router-gradient";
const ALONG: &str = "gradient-quality-equal";
const ONE_TOKEN: &str = "gradient-quality";

fn of_table(table: &Table<'_>) -> Vec<Drawn> {
    match (table.mode, table.task) {
        (Mode::Tune, _) => vec![rows::fidelity(table)],
        (_, TaskName::Equal) => {
            vec![curves::losses(table), rows::cost(table), curves::gap(table), curves::router_gradient(table), rows::along_the_run(table)]
        }
        (_, TaskName::Collapsed) => vec![curves::losses(table), loads(table, &COLLAPSED)],
        (_, TaskName::Text) => vec![curves::losses(table), rows::cost(table), loads(table, &TEXT)],
        _ => vec![curves::losses(table), rows::cost(table)],
    }
}

fn picture(stem: &str, caption: impl Into<String>, table: &Table<'_>) -> Picture {
    Picture { stem: stem.into(), caption: caption.into(), task: table.task, mode: table.mode }
}

/// Load of each expert over the run, one map for each arm, of the first seed: a row for each estimator, untreated first.
fn loads(table: &Table<'_>, shown: &Shown) -> Drawn {
    let (task, experts) = (table.task.id(), table.task.experts() as f64);
    let map = |name: String| {
        let (_, result) = table.find(&name)?.steps.sound.first()?;
        Some(Panel::Heat(HeatMap {
            title: name,
            x_label: "step".into(),
            y_label: "expert".into(),
            x_ends: ("0".into(), result.curves.step.last()?.to_string()),
            columns: result.curves.load.iter().map(|load| load.iter().map(|share| share * experts).collect()).collect(),
            most: experts / 2.0,
        }))
    };
    let row = |estimator: &&str| shown.treatments.iter().map(|treatment| map(format!("{estimator}{treatment}"))).collect::<Vec<_>>();
    let panels: Vec<Panel> = shown.estimators.iter().flat_map(row).flatten().collect();
    let bar = Some(ColourBar { label: "load / fair share".into(), most: experts / 2.0 });
    let title = format!("load of each expert, task {task}");
    let columns = shown.treatments.len();
    let figure = Figure { title, panel: ((WIDTH - 64.0) / columns as f64, 172.0), columns, panels, bar };
    let note = match table.task {
        TaskName::Collapsed => ", in which expert 0 starts far ahead",
        TaskName::Text => ", in the first layer that has experts",
        _ => "",
    };
    let caption = format!(
        "Share of the tokens that hard top-1 gives each expert over the run, times the number of experts (1 is fair), first seed of task `{task}`{note}. \
         The darkest colour is half of all tokens."
    );
    (!figure.panels.is_empty()).then(|| (picture(&format!("load-{task}"), caption, table), figure))
}

/// A value over the steps, spread over the seeds.
fn curve(runs: &Runs<'_>, value: impl Fn(&CellResult, usize) -> Option<f64>) -> Vec<(f64, Spread)> {
    let sound = || runs.steps.sound.iter().map(|(_, result)| *result);
    let steps = sound().map(|result| &result.curves.step).max_by_key(|steps| steps.len());
    let at = |(i, step): (usize, &usize)| {
        let there = sound().filter(|result| result.curves.step.get(i) == Some(step));
        Some((*step as f64, Spread::of(there.filter_map(|result| value(result, i)))?))
    };
    steps.into_iter().flatten().enumerate().filter_map(at).collect()
}
