//! Values over the run.

use super::{BELOW_BEST, Drawn, GAP, ROUTER_GRADIENT, WIDTH, curve, picture};
use crate::{
    compare::{
        arm::Route,
        results::CellResult,
        table::{Runs, Spread, Table},
    },
    moe::estimator::catalog,
    plot::{Axis, Chart, Colour, Dash, Figure, Form, Legend, Panel, Series},
};

/// Curves in one picture, besides controls.
const CURVES: usize = 8;
/// A relative distance that is rounding, and no gap.
const NO_GAP: f64 = 1e-3;
/// The axis of losses leaves out this share of the run at its beginning, when all arms fall alike.
const BEGINNING: f64 = 0.1;

/// A curve of the picture.
struct Curve {
    name: String,
    colour: Colour,
    /// Dashed: of a control.
    dash: Option<Dash>,
    /// Whether its range over seeds is tinted.
    tinted: bool,
    points: Vec<(f64, Spread)>,
}

/// Hard top-1 loss over steps: the best estimators and the controls.
pub(super) fn losses(table: &Table<'_>) -> Drawn {
    let value = |result: &CellResult, i: usize| result.relative(*result.curves.hard1.get(i)?);
    let mut curves = best(table.estimators.iter(), value);
    curves.extend(table.controls.iter().map(|runs| Curve {
        name: runs.label(),
        colour: Colour::new([70; 3]),
        dash: Some(dash(runs.arm.route)),
        tinted: false,
        points: curve(runs, value),
    }));
    let (low, high) = window(&curves)?;
    let axis = Axis::log("test loss / best constant prediction").from_to(low, high);
    let caption = format!(
        "Test loss of task `{0}` under hard top-1 over the run, in units of the best constant prediction, on a part of the test rows, so that the ends are near the figures \
         of the table and not the same. Medians over seeds of the {CURVES} best estimators and (dashed) the controls; the tint is from the best to the worst seed \
         of the best one. The axis leaves out the first tenth of the run, and what is below {BELOW_BEST} of the best estimator.",
        table.task.id()
    );
    let chart = chart(format!("{}: hard top-1 loss", table.task.id()), Axis::linear("step"), axis, curves);
    Some((picture(&format!("loss-{}", table.id()), caption, table), single(chart)))
}

/// A control looks the same in every picture.
fn dash(route: Route) -> Dash {
    match route {
        Route::Oracle => Dash::Long,
        Route::Frozen => Dash::Short,
        Route::Hash => Dash::Dotted,
        Route::ExpertsAfter { .. } | Route::Untouched | Route::Learned => Dash::Mixed,
    }
}

/// Ends of the axis of losses; `None` of nothing.
fn window(curves: &[Curve]) -> Option<(f64, f64)> {
    let last = curves.iter().flat_map(|curve| &curve.points).map(|(step, _)| *step).fold(0.0, f64::max);
    let late = |curve: &Curve| -> Vec<f64> {
        curve.points.iter().filter(|(step, _)| *step >= BEGINNING * last).map(|(_, spread)| spread.median).collect()
    };
    let all = Spread::of(curves.iter().flat_map(late))?;
    let estimators = Spread::of(curves.iter().filter(|curve| curve.dash.is_none()).flat_map(late)).unwrap_or(all);
    let low = all.low.max(BELOW_BEST * estimators.low);
    let margin = (all.high / low).powf(0.05);
    Some((low / margin, all.high * margin))
}

/// An arm's name, and (temperature, gap) in the order of the run.
type Way = (String, Vec<(f64, f64)>);

/// What hardening changes against the temperature in force, over the run.
pub(super) fn gap(table: &Table<'_>) -> Drawn {
    // Of others what sharpens is a width, which is no temperature.
    let has_temperature = |runs: &&Runs<'_>| {
        catalog::find(&runs.arm.estimator.name).is_some_and(|row| row.params.iter().any(|param| param.name == "temperature"))
    };
    let ways = table.estimators.iter().filter(has_temperature).map(|runs| (runs.label(), hardening(runs)));
    let shown: Vec<Way> = ways.filter(|way| !way.1.is_empty()).collect();
    let (moving, still): (Vec<Way>, Vec<Way>) = shown.into_iter().partition(|(_, points)| points.iter().any(|at| at.0 != points[0].0));
    let end = |points: &[(f64, f64)]| points.last().copied().into_iter().collect::<Vec<_>>();
    let grey = Colour::new([190; 3]);
    let unnamed = |form: Form| Series { name: String::new(), colour: grey, form };
    let mut series: Vec<Series> = still.iter().map(|(_, points)| unnamed(Form::Dots(end(points)))).collect();
    series.extend(moving.iter().skip(CURVES).map(|(_, points)| unnamed(Form::Line(points.clone()))));
    let mut named: Vec<(usize, &Way)> = moving.iter().take(CURVES).enumerate().collect();
    let last = |way: &Way| way.1.last().map_or(0.0, |(_, gap)| *gap);
    named.sort_by(|(_, a), (_, b)| last(b).total_cmp(&last(a)));
    for (i, (name, points)) in named {
        let colour = Colour::nth(i);
        series.push(Series { name: name.clone(), colour, form: Form::Line(points.clone()) });
        series.push(Series { name: String::new(), colour, form: Form::Dots(end(points)) });
    }
    if series.is_empty() {
        return None;
    }
    let chart = Chart {
        title: "temperature against gap, task equal".into(),
        x: Axis::log("temperature in force"),
        y: Axis::log("‖y − y hard top-1‖ / ‖y‖"),
        series,
        legend: Legend::Right,
    };
    let caption = format!(
        "What hardening changes over the runs of task `equal`, which go from the right to a dot at their end: relative L2 distance between the outputs \
         of the training routing and of hard top-1 against the temperature in force, medians over seeds. Named: of the estimators whose \
         temperature changes, the {CURVES} with the lowest loss, in the order of their ends. Grey: the others, those of a constant temperature as a \
         dot at their end."
    );
    Some((picture(GAP, caption, table), single(chart)))
}

/// (temperature, gap) in the order of the run, medians over seeds.
fn hardening(runs: &Runs<'_>) -> Vec<(f64, f64)> {
    let temperatures = curve(runs, |result, i| *result.curves.sharpness.get(i)?);
    let gaps = curve(runs, |result, i| *result.curves.gap.get(i)?);
    let gap_at = |step: f64| gaps.iter().find(|(of, gap)| *of == step && gap.median > NO_GAP).map(|(_, gap)| gap.median);
    temperatures.iter().filter_map(|(step, temperature)| Some((temperature.median, gap_at(*step)?))).collect()
}

/// Norm of the task's gradient at the router over steps.
pub(super) fn router_gradient(table: &Table<'_>) -> Drawn {
    let value = |result: &CellResult, i: usize| *result.curves.grad_norm.get(i)?;
    let learns = |runs: &&Runs<'_>| curve(runs, value).iter().any(|(_, spread)| spread.median > 0.0);
    let curves = best(table.estimators.iter().filter(learns), value);
    if curves.is_empty() {
        return None;
    }
    let title = "gradient that reaches the router, task equal".into();
    let chart = chart(title, Axis::linear("step"), Axis::log("L2 norm, mean over the steps since the point before"), curves);
    let caption = format!(
        "Norm of the task's gradient at the router's weights, task `equal`: medians over seeds of the {CURVES} best estimators, the tint from the \
         least to the largest seed of the best one. Estimators whose router gets no gradient at all have no curve."
    );
    Some((picture(ROUTER_GRADIENT, caption, table), single(chart)))
}

/// The first of the arms in turn the colours of the palette.
fn best<'a>(arms: impl Iterator<Item = &'a Runs<'a>>, value: impl Fn(&CellResult, usize) -> Option<f64> + Copy) -> Vec<Curve> {
    let curve = |(i, runs): (usize, &Runs<'_>)| Curve {
        name: runs.label(),
        colour: Colour::nth(i),
        dash: None,
        tinted: i == 0,
        points: curve(runs, value),
    };
    arms.take(CURVES).enumerate().map(curve).filter(|curve| !curve.points.is_empty()).collect()
}

/// Tints below curves; names in the order in which curves end, from the top.
fn chart(title: String, x: Axis, y: Axis, mut curves: Vec<Curve>) -> Chart {
    let end = |curve: &Curve| curve.points.last().map_or(0.0, |(_, spread)| spread.median);
    curves.sort_by(|a, b| end(b).total_cmp(&end(a)));
    let tint = |curve: &Curve| Series {
        name: String::new(),
        colour: curve.colour,
        form: Form::Band(curve.points.iter().map(|(step, spread)| (*step, spread.low, spread.high)).collect()),
    };
    let line = |curve: &Curve| {
        let points = curve.points.iter().map(|(step, spread)| (*step, spread.median)).collect();
        let form = match curve.dash {
            None => Form::Line(points),
            Some(dash) => Form::Dashed(points, dash),
        };
        Series { name: curve.name.clone(), colour: curve.colour, form }
    };
    let tints = curves.iter().filter(|curve| curve.tinted).map(tint);
    Chart { title, x, y, series: tints.chain(curves.iter().map(line)).collect(), legend: Legend::Right }
}

fn single(chart: Chart) -> Figure {
    Figure::single((WIDTH, 480.0), Panel::Chart(chart))
}
