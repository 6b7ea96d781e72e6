//! The pictures of a report.

use std::path::Path;

use super::{ExpertReport, LayerReport, PlanReport, PolicyReport, Report};
use crate::{
    error::Result,
    plot::{Axis, Chart, Colour, ColourBar, Dash, Figure, Form, Grid, Legend, Panel, Series},
};

/// Layers that have a panel of their own in one picture.
const PANELS: usize = 8;
/// The darkest colour of loads and of experts that go together, in fair shares.
const MOST: f64 = 3.0;
/// Columns of panels.
const COLUMNS: usize = 4;

/// A number of a layer.
type OfLayer = fn(&LayerReport) -> f64;

pub(super) fn draw(report: &Report, folder: &Path) -> Result<Vec<String>> {
    let figures = [
        ("gap-by-layer", Some(gaps(&report.policies))),
        ("load", Some(load(report))),
        ("coactivation", Some(coactivation(&report.experts))),
        ("tokens", Some(tokens(report))),
        ("advice", report.advice.as_ref().map(advice)),
    ];
    let mut names = Vec::new();
    for (name, figure) in figures {
        if let Some(figure) = figure {
            figure.save(&folder.join(name))?;
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// What each layer does to its own output, why, and what it is given.
fn gaps(policies: &[PolicyReport]) -> Figure {
    let panels: [(&str, &str, OfLayer); 3] = [
        ("local gap", "‖y_ref − y‖ / ‖y_ref‖, pooled", |layer| layer.l2_rel_pooled),
        ("missed mass", "reference weight not served", |layer| layer.missed_mass.mean),
        ("drift, free-running", "relative L2 of the input", |layer| layer.input_drift),
    ];
    let chart = |(title, label, value): (&str, &str, OfLayer)| {
        let curves = policies.iter().enumerate().flat_map(|(i, policy)| {
            let points: Vec<(f64, f64)> = policy.layers.iter().map(|layer| (layer.layer as f64, value(layer))).collect();
            let series = |name: &str, form| Series { name: name.to_owned(), colour: Colour::nth(i), form };
            [series(&policy.name, Form::Line(points.clone())), series("", Form::Dots(points))]
        });
        let series: Vec<Series> = curves.collect();
        let most = policies.iter().flat_map(|policy| policy.layers.iter().map(value)).fold(1e-6, f64::max);
        Panel::Chart(Chart {
            title: title.to_owned(),
            x: Axis::linear("layer"),
            y: Axis::linear(label).from_to(0.0, 1.35 * most),
            series,
            legend: Legend::Inside,
        })
    };
    Figure { title: String::new(), panel: (380.0, 300.0), columns: 3, panels: panels.map(chart).into(), bar: None }
}

/// Layers x experts.
fn load(report: &Report) -> Figure {
    let experts = report.experts.iter().map(|layer| layer.utilization.len()).max().unwrap_or(0);
    let grid = Grid {
        title: format!("load under {}", report.watched),
        x_label: "expert".into(),
        y_label: "layer".into(),
        columns: numbers(experts),
        rows: report.experts.iter().map(|layer| layer.layer.to_string()).collect(),
        values: report.experts.iter().map(|layer| layer.utilization.clone()).collect(),
        most: MOST,
    };
    let height = 90.0 + 26.0 * report.experts.len().min(48) as f64;
    let bar = Some(ColourBar { label: "tokens over fair share".into(), most: MOST });
    Figure { bar, ..Figure::single((620.0, height.max(180.0)), Panel::Grid(grid)) }
}

/// Experts x experts, a panel for each layer.
fn coactivation(experts: &[ExpertReport]) -> Figure {
    let panel = |layer: &ExpertReport| {
        let without_diagonal = |(row, values): (usize, &Vec<f64>)| {
            values.iter().enumerate().map(|(column, &value)| if column == row { f64::NAN } else { value }).collect()
        };
        Panel::Grid(Grid {
            title: format!("layer {}", layer.layer),
            x_label: "expert".into(),
            y_label: "expert".into(),
            columns: numbers(layer.utilization.len()),
            rows: numbers(layer.utilization.len()),
            values: layer.coactivation.iter().enumerate().map(without_diagonal).collect(),
            most: MOST,
        })
    };
    let panels: Vec<Panel> = some(experts).map(panel).collect();
    let bar = Some(ColourBar { label: "together, over chance".into(), most: MOST });
    Figure { title: "which experts the router puts first together".into(), panel: (240.0, 250.0), columns: COLUMNS, panels, bar }
}

/// Frequent tokens x experts, a panel for each layer.
fn tokens(report: &Report) -> Figure {
    let rows: Vec<String> = report.followed.iter().map(|text| printable(text)).collect();
    let panel = |layer: &ExpertReport| {
        Panel::Grid(Grid {
            title: format!("layer {}", layer.layer),
            x_label: "expert".into(),
            y_label: String::new(),
            columns: numbers(layer.utilization.len()),
            rows: rows.clone(),
            values: layer.followed.clone(),
            most: 1.0,
        })
    };
    let panels: Vec<Panel> = some(&report.experts).map(panel).collect();
    let height = 90.0 + 13.0 * rows.len() as f64;
    let bar = Some(ColourBar { label: "share of the token".into(), most: 1.0 });
    Figure {
        title: format!("who takes the most frequent tokens, {}", report.watched),
        panel: (250.0, height),
        columns: COLUMNS,
        panels,
        bar,
    }
}

/// Mean k against KL: what was expected and what came.
fn advice(advice: &super::AdviceReport) -> Figure {
    let measured = |plans: &[&PlanReport]| -> Vec<(f64, f64)> { plans.iter().map(|plan| (plan.mean_k, plan.measured_kl)).collect() };
    let plans: Vec<&PlanReport> = advice.plans.iter().collect();
    let opposites: Vec<&PlanReport> = advice.opposites.iter().collect();
    let uniform = [&advice.top_1, &advice.top_2];
    let mut way: Vec<&PlanReport> = plans.iter().copied().chain(uniform).collect();
    way.sort_by(|a, b| a.mean_k.total_cmp(&b.mean_k));
    let expected = way.iter().map(|plan| (plan.mean_k, plan.predicted_kl)).collect();
    let most = way.iter().chain(&opposites).map(|plan| plan.measured_kl.max(plan.predicted_kl)).fold(0.0, f64::max);
    let series = |name: &str, i: usize, form| Series { name: name.to_owned(), colour: Colour::nth(i), form };
    let chart = Chart {
        title: "what a k for each layer buys".into(),
        x: Axis::linear("mean k over layers"),
        y: Axis::linear("KL, nats per token").from_to(0.0, 1.1 * most),
        series: vec![
            series("expected", 0, Form::Dashed(expected, Dash::Short)),
            series("top-1 and top-2 everywhere", 0, Form::Dots(measured(&uniform))),
            series("advice, measured", 2, Form::Dots(measured(&plans))),
            series("wrong way round, measured", 3, Form::Dots(measured(&opposites))),
        ],
        legend: Legend::Right,
    };
    Figure::single((720.0, 320.0), Panel::Chart(chart))
}

/// A few layers, evenly, first and last among them.
fn some(experts: &[ExpertReport]) -> impl Iterator<Item = &ExpertReport> {
    let (all, shown) = (experts.len(), experts.len().min(PANELS));
    (0..shown).filter_map(move |i| experts.get(if shown > 1 { i * (all - 1) / (shown - 1) } else { 0 }))
}

fn numbers(n: usize) -> Vec<String> {
    (0..n).map(|i| i.to_string()).collect()
}

/// In quotes, and in letters that the font of pictures has.
fn printable(text: &str) -> String {
    format!("{text:?}").chars().map(|c| if c.is_ascii() { c } else { '?' }).take(14).collect()
}
