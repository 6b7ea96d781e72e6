//! The pictures of a comparison.

use std::path::Path;

use super::{
    results::{CellResult, GradientQuality, Outcome, Results},
    spec::{Mode, TaskName},
    table::{Runs, Spread, Table, tables},
};
use crate::{
    error::Result,
    plot::{Axis, Chart, Colour, ColourBar, Figure, Form, HeatMap, Legend, Panel, Series},
};

/// A picture that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Name of the file without extension; there is a `.svg` and a `.png`.
    pub stem: String,
    /// What is to be seen.
    pub caption: String,
}

/// Curves in one picture, besides controls.
const CURVES: usize = 8;
/// Tints in one picture of curves: more would hide one another.
const TINTS: usize = 3;
/// Estimators whose load is shown, and what is done for it; suffixes of arms.
const TREATED: [&str; 3] = ["onehot", "raw_topk", "ste"];
const TREATMENTS: [&str; 5] = ["", "+switch", "+bias", "+reinit", "+remedies"];
/// A relative distance that is rounding, and no gap.
const NO_GAP: f64 = 1e-3;
/// What is smaller is drawn here on a logarithmic axis of bias or deviation: an exact 0 has no other place.
const FLOOR: f64 = 0.01;

/// A picture that could be drawn, if the results have what it shows.
type Drawn = Option<(String, String, Figure)>;

/// Draws what the results have something for into `folder`, which exists.
pub fn draw(results: &Results, folder: &Path) -> Result<Vec<Picture>> {
    let tables = tables(results);
    let scratch = || tables.iter().filter(|table| table.mode == Mode::Scratch);
    let of = |task: TaskName| scratch().find(|table| table.task == task);
    let mut drawn: Vec<Drawn> = scratch().map(losses).collect();
    drawn.push(of(TaskName::Equal).and_then(gap));
    drawn.push(of(TaskName::Equal).and_then(router_gradient));
    drawn.push(gradient_quality(results, of(TaskName::Equal)));
    drawn.push(of(TaskName::Collapsed).and_then(loads));
    drawn.push(quality_fidelity(&tables));
    drawn.push(cost(&tables));
    let mut pictures = Vec::new();
    for (stem, caption, figure) in drawn.into_iter().flatten() {
        figure.save(&folder.join(&stem))?;
        pictures.push(Picture { stem, caption });
    }
    Ok(pictures)
}

/// Hard top-1 loss over steps: the best estimators and the controls.
fn losses(table: &Table<'_>) -> Drawn {
    let value = |result: &CellResult, i: usize| result.relative(*result.curves.hard1.get(i)?);
    let mut series = curves(table.estimators.iter().take(CURVES), &value);
    for (i, runs) in table.controls.iter().enumerate() {
        let colour = Colour::new([[60; 3], [110; 3], [150; 3], [185; 3]][i % 4]);
        series.push(Series {
            name: runs.arm.name.clone(),
            colour,
            form: Form::Dashed(curve(runs, &value).into_iter().map(|(x, s)| (x, s.median)).collect()),
        });
    }
    let chart = Chart {
        title: format!("{}: hard top-1 loss, best {CURVES} and controls", table.task.id()),
        x: Axis::linear("step"),
        y: Axis::log("test loss / best constant"),
        series,
        legend: Legend::Right,
    };
    let caption = format!(
        "Test loss of task `{}` under hard top-1 over the run, in units of the best constant prediction: median over seeds of the \
         {CURVES} best estimators and (dashed) the controls; tints from the best to the worst seed, of the best {TINTS}.",
        table.task.id()
    );
    single(format!("loss-{}", table.id()), caption, (860.0, 480.0), chart)
}

/// Temperature against gap, a point for each evaluation of the run.
fn gap(table: &Table<'_>) -> Drawn {
    let points = |runs: &Runs<'_>| -> Vec<(f64, f64)> {
        let of = |result: &&CellResult| {
            let pairs = result.curves.sharpness.iter().zip(&result.curves.gap);
            pairs.filter_map(|(sharpness, gap)| Some(((*sharpness)?, (*gap)?))).filter(|(_, gap)| *gap > NO_GAP).collect::<Vec<_>>()
        };
        runs.steps.iter().flat_map(of).collect()
    };
    let mut shown: Vec<(&Runs<'_>, Vec<(f64, f64)>)> = table.estimators.iter().map(|runs| (runs, points(runs))).collect();
    shown.retain(|(_, points)| !points.is_empty());
    shown.sort_by(|a, b| a.0.arm.name.cmp(&b.0.arm.name));
    let dots =
        |i: usize, name: &str, points| Series { name: name.to_owned(), colour: Colour::nth(i).with_alpha(0.7), form: Form::Dots(points) };
    let series = shown.into_iter().enumerate().map(|(i, (runs, points))| dots(i, &runs.arm.name, points)).collect();
    let chart = Chart {
        title: "temperature against gap".into(),
        x: Axis::log("temperature or width in force"),
        y: Axis::log("‖y − y hard top-1‖ / ‖y‖"),
        series,
        legend: Legend::Right,
    };
    let caption = "What hardening changes, at every evaluation of the runs of task `equal`, against the temperature (or width) in force: pooled \
                   relative L2 distance between the outputs of the training routing and of hard top-1.";
    single("gap-temperature".into(), caption.into(), (860.0, 480.0), chart)
}

/// Norm of the task's gradient at the router over steps.
fn router_gradient(table: &Table<'_>) -> Drawn {
    let value = |result: &CellResult, i: usize| *result.curves.grad_norm.get(i)?;
    let broken = ["onehot", "renorm_topk"];
    let best = table.estimators.iter().filter(|runs| !broken.contains(&runs.arm.name.as_str())).take(CURVES);
    let chart = Chart {
        title: "gradient that reaches the router".into(),
        x: Axis::linear("step"),
        y: Axis::log("mean norm"),
        series: curves(best, &value),
        legend: Legend::Right,
    };
    let caption = format!(
        "Mean norm of the task's gradient at the router's weights, task `equal`, the {CURVES} best estimators. Un-weighted one-hot and \
         renormalised top-1 are not there: theirs is exactly 0."
    );
    single("router-gradient".into(), caption, (860.0, 420.0), chart)
}

/// Bias against deviation of the router's gradient: of one token by enumeration, and along the runs of `equal`.
fn gradient_quality(results: &Results, equal: Option<&Table<'_>>) -> Drawn {
    let enumerated = |pick: fn(&super::results::GradientResult) -> GradientQuality| -> Vec<(f64, f64, String)> {
        let of = |cell: &super::results::CellRecord| match &cell.outcome {
            Outcome::Gradient(gradient) => {
                let quality = pick(gradient);
                Some((quality.bias?, quality.std?, cell.spec.arm.name.clone()))
            }
            _ => None,
        };
        let mut dots: Vec<(f64, f64, String)> = results.cells.iter().filter_map(of).collect();
        dots.dedup_by(|a, b| a.2 == b.2);
        dots
    };
    let along = |runs: &Runs<'_>| {
        let median = |value: fn(&CellResult) -> Option<f64>| runs.spread(value).map(|spread| spread.median);
        Some((median(|result| result.router_grad.bias)?, median(|result| result.router_grad.std)?, runs.arm.name.clone()))
    };
    let panels = [
        ("one token, squared error", enumerated(|gradient| gradient.quadratic)),
        ("one token, cross-entropy", enumerated(|gradient| gradient.cross_entropy)),
        ("task equal, over the run", equal.map(|table| table.estimators.iter().filter_map(along).collect()).unwrap_or_default()),
    ];
    let panels: Vec<Panel> = panels.into_iter().filter(|(_, dots)| !dots.is_empty()).map(|(title, dots)| bias_panel(title, dots)).collect();
    let figure = Figure {
        title: "router gradient against the exact one".into(),
        panel: (520.0, 460.0),
        columns: panels.len().max(1),
        panels,
        bar: None,
    };
    let caption = format!(
        "Quality of the router's gradient: relative bias of its mean and relative standard deviation of a single draw, both against the exact \
         gradient of the expected loss by enumeration. What is {FLOOR} or less stands at {FLOOR}: deterministic estimators on the bottom line, \
         unbiased ones at the left."
    );
    (!figure.panels.is_empty()).then_some(("gradient-quality".into(), caption, figure))
}

fn bias_panel(title: &str, dots: Vec<(f64, f64, String)>) -> Panel {
    let dots = dots.into_iter().map(|(bias, std, name)| (bias.max(FLOOR), std.max(FLOOR), name)).collect();
    Panel::Chart(Chart {
        title: title.into(),
        x: Axis::log("bias"),
        y: Axis::log("standard deviation"),
        series: vec![Series { name: String::new(), colour: Colour::nth(0), form: Form::Named(dots) }],
        legend: Legend::None,
    })
}

/// Load of each expert over the run, one map for each arm, of the first seed: a row for each estimator, untreated first.
fn loads(table: &Table<'_>) -> Drawn {
    let experts = table.task.experts() as f64;
    let map = |name: String| {
        let result = table.find(&name)?.steps.first()?;
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
    let figure = Figure { title, panel: (236.0, 176.0), columns: TREATMENTS.len(), panels, bar };
    let caption = "Share of the tokens that hard top-1 gives each expert over the run, times the number of experts (1 is fair), first seed of task \
                   `collapsed`, in which expert 0 starts far ahead. The darkest colour is half of all tokens.";
    (!figure.panels.is_empty()).then_some(("load-collapsed".into(), caption.into(), figure))
}

/// Distance from the teacher against loss, in tuning.
fn quality_fidelity(tables: &[Table<'_>]) -> Drawn {
    let of = |table: &Table<'_>| {
        let dots = |runs: &Runs<'_>| {
            let distance = runs.spread(|result| result.fidelity?.rel_l2)?;
            Some((distance.median, runs.hard1()?.median, runs.arm.name.clone()))
        };
        scatter(table, Axis::linear("distance to the teacher's soft output (relative L2)"), dots)
    };
    let panels: Vec<Panel> = tables.iter().filter(|table| table.mode == Mode::Tune).filter_map(of).collect();
    let figure = Figure { title: String::new(), panel: (860.0, 520.0), columns: 1, panels, bar: None };
    let caption = "Tuning a soft-trained model: what is near to the teacher (left) and what has the lower loss (bottom) are not the same.";
    (!figure.panels.is_empty()).then_some(("quality-fidelity".into(), caption.into(), figure))
}

/// Experts executed per token against loss.
fn cost(tables: &[Table<'_>]) -> Drawn {
    let of = |table: &Table<'_>| {
        let dots = |runs: &Runs<'_>| {
            let executed = runs.spread(|result| Some(result.executed_per_token))?;
            Some((executed.median, runs.hard1()?.median, runs.arm.name.clone()))
        };
        scatter(table, Axis::log("experts executed per token in training, counted"), dots)
    };
    let shown = |table: &&Table<'_>| table.mode == Mode::Scratch && matches!(table.task, TaskName::Equal | TaskName::Text);
    let panels: Vec<Panel> = tables.iter().filter(shown).filter_map(of).collect();
    let figure = Figure { title: String::new(), panel: (860.0, 560.0), columns: 1, panels, bar: None };
    let caption =
        "What a lower loss costs: experts executed per token in the training forward against the loss under hard top-1, at equal steps.";
    (!figure.panels.is_empty()).then_some(("cost".into(), caption.into(), figure))
}

/// A named dot for each arm, controls grey.
fn scatter(table: &Table<'_>, x: Axis, dot: impl Fn(&Runs<'_>) -> Option<(f64, f64, String)>) -> Option<Panel> {
    let estimators: Vec<_> = table.estimators.iter().filter_map(&dot).collect();
    let controls: Vec<_> = table.controls.iter().filter_map(&dot).collect();
    if estimators.is_empty() {
        return None;
    }
    let series = [("estimators", Colour::nth(0), estimators), ("controls", Colour::GREY, controls)];
    let series = series.map(|(name, colour, dots)| Series { name: name.into(), colour, form: Form::Named(dots) }).into();
    let title = format!("{}: hard top-1 loss", table.id());
    Some(Panel::Chart(Chart { title, x, y: Axis::log("test loss / best constant"), series, legend: Legend::Right }))
}

/// Median curves with a tint from the least to the largest, in turn the colours of the palette.
fn curves<'a>(arms: impl Iterator<Item = &'a Runs<'a>>, value: &impl Fn(&CellResult, usize) -> Option<f64>) -> Vec<Series> {
    let mut series = Vec::new();
    for (i, runs) in arms.enumerate() {
        let points = curve(runs, value);
        let colour = Colour::nth(i);
        let band = points.iter().map(|(x, spread)| (*x, spread.low, spread.high)).collect();
        if i < TINTS {
            series.push(Series { name: String::new(), colour, form: Form::Band(band) });
        }
        let line = points.into_iter().map(|(x, spread)| (x, spread.median)).collect();
        series.push(Series { name: runs.arm.name.clone(), colour, form: Form::Line(line) });
    }
    series
}

/// A value over the steps, spread over the seeds.
fn curve(runs: &Runs<'_>, value: &impl Fn(&CellResult, usize) -> Option<f64>) -> Vec<(f64, Spread)> {
    let steps = runs.steps.iter().map(|result| &result.curves.step).max_by_key(|steps| steps.len());
    let at = |(i, step): (usize, &usize)| {
        let spread =
            Spread::of(runs.steps.iter().filter(|result| result.curves.step.get(i) == Some(step)).filter_map(|result| value(result, i)))?;
        Some((*step as f64, spread))
    };
    steps.into_iter().flatten().enumerate().filter_map(at).collect()
}

fn single(stem: String, caption: String, size: (f64, f64), chart: Chart) -> Drawn {
    let something = chart.series.iter().any(|series| match &series.form {
        Form::Line(points) | Form::Dashed(points) | Form::Dots(points) => !points.is_empty(),
        Form::Band(points) => !points.is_empty(),
        Form::Named(points) => !points.is_empty(),
    });
    something.then(|| (stem, caption, Figure::single(size, Panel::Chart(chart))))
}
