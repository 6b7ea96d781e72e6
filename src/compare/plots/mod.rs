//! The pictures of a comparison.

mod curves;
mod rows;

use std::path::Path;

use super::{
    results::{CellResult, Results},
    spec::{Mode, TaskName},
    table::{Runs, Spread, Table, tables},
};
use crate::{
    error::Result,
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
/// Estimators whose load is shown, and what is done for it; suffixes of arms.
const TREATED: [&str; 3] = ["onehot", "raw_topk", "ste"];
const TREATMENTS: [&str; 5] = ["", "+switch", "+bias", "+reinit", "+remedies"];
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
    Ok(pictures)
}

fn of_table(table: &Table<'_>) -> Vec<Drawn> {
    match (table.mode, table.task) {
        (Mode::Tune, _) => vec![rows::fidelity(table)],
        (_, TaskName::Equal) => {
            vec![curves::losses(table), rows::cost(table), curves::gap(table), curves::router_gradient(table), rows::along_the_run(table)]
        }
        (_, TaskName::Collapsed) => vec![curves::losses(table), loads(table)],
        _ => vec![curves::losses(table), rows::cost(table)],
    }
}

fn picture(stem: &str, caption: impl Into<String>, table: &Table<'_>) -> Picture {
    Picture { stem: stem.into(), caption: caption.into(), task: table.task, mode: table.mode }
}

/// Load of each expert over the run, one map for each arm, of the first seed: a row for each estimator, untreated first.
fn loads(table: &Table<'_>) -> Drawn {
    let experts = table.task.experts() as f64;
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
    let row = |estimator: &str| TREATMENTS.map(|treatment| map(format!("{estimator}{treatment}")));
    let panels: Vec<Panel> = TREATED.into_iter().flat_map(row).flatten().collect();
    let bar = Some(ColourBar { label: "load / fair share".into(), most: experts / 2.0 });
    let title = "load of each expert, task collapsed".into();
    let columns = TREATMENTS.len();
    let figure = Figure { title, panel: ((WIDTH - 64.0) / columns as f64, 172.0), columns, panels, bar };
    let caption = "Share of the tokens that hard top-1 gives each expert over the run, times the number of experts (1 is fair), first seed of task \
                   `collapsed`, in which expert 0 starts far ahead. The darkest colour is half of all tokens.";
    (!figure.panels.is_empty()).then(|| (picture("load-collapsed", caption, table), figure))
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
