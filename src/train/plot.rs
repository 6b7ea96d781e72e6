//! The curves of a run as a picture: loss, held-out perplexity soft and hard, what hardening costs, the schedules.

use std::path::Path;

use plotters::{coord::Shift, prelude::*};

use super::log::{EvaluationRecord, Record, StepRecord};
use crate::error::{Error, Result};

/// Curves with a name and a colour.
type Curve<'a> = (&'a str, RGBColor, Vec<(f64, f64)>);

const BLUE_TONE: RGBColor = RGBColor(31, 119, 180);
const ORANGE_TONE: RGBColor = RGBColor(214, 97, 23);
const GREEN_TONE: RGBColor = RGBColor(44, 140, 60);

/// Draws `records` to an SVG file. Nothing to draw is no error: the panels stay empty.
pub fn curves(records: &[Record], path: &Path) -> Result<()> {
    let steps: Vec<&StepRecord> = records.iter().filter_map(|r| if let Record::Step(s) = r { Some(s) } else { None }).collect();
    // The last one is of another text: it does not belong on the curve.
    let evaluations: Vec<&EvaluationRecord> =
        records.iter().filter_map(|r| if let Record::Evaluation(e) = r { (!e.complete).then_some(e) } else { None }).collect();
    let of_step = |f: fn(&StepRecord) -> f64| steps.iter().map(|s| (s.step as f64, f(s))).collect::<Vec<_>>();
    let of_evaluation = |f: fn(&EvaluationRecord) -> f64| evaluations.iter().map(|e| (e.step as f64, f(e))).collect::<Vec<_>>();
    let panels: [(&str, Vec<Curve<'_>>); 4] = [
        ("training loss (nats per token)", vec![("language model", BLUE_TONE, smoothed(of_step(|s| s.lm_loss)))]),
        (
            "held-out perplexity",
            vec![
                ("soft", BLUE_TONE, of_evaluation(|e| e.soft_perplexity)),
                ("hard top-2", GREEN_TONE, of_evaluation(|e| e.top2_perplexity)),
                ("hard top-1", ORANGE_TONE, of_evaluation(|e| e.top1_perplexity)),
            ],
        ),
        (
            "what hardening costs: held-out perplexity over soft (%)",
            vec![
                ("hard top-2", GREEN_TONE, of_evaluation(|e| (e.top2_perplexity / e.soft_perplexity - 1.0) * 100.0)),
                ("hard top-1", ORANGE_TONE, of_evaluation(|e| (e.top1_perplexity / e.soft_perplexity - 1.0) * 100.0)),
            ],
        ),
        (
            "router temperature and Gumbel noise",
            vec![("temperature", BLUE_TONE, of_step(|s| s.temperature)), ("noise", ORANGE_TONE, of_step(|s| s.noise))],
        ),
    ];
    let root = SVGBackend::new(path, (1000, 660)).into_drawing_area();
    let drawn = root
        .fill(&WHITE)
        .map_err(|error| error.to_string())
        .and_then(|()| root.split_evenly((2, 2)).iter().zip(&panels).try_for_each(|(area, (title, curves))| panel(area, title, curves)));
    drawn.and_then(|()| root.present().map_err(|error| error.to_string())).map_err(|error| Error::io(path, std::io::Error::other(error)))
}

fn panel(area: &DrawingArea<SVGBackend<'_>, Shift>, title: &str, curves: &[Curve<'_>]) -> std::result::Result<(), String> {
    let points = || curves.iter().flat_map(|(_, _, points)| points).filter(|(_, y)| y.is_finite());
    let right = points().map(|(x, _)| *x).fold(1.0, f64::max);
    let top = points().map(|(_, y)| *y).fold(f64::NEG_INFINITY, f64::max);
    let low = points().map(|(_, y)| *y).fold(f64::INFINITY, f64::min);
    let (low, top) = if top > low { (low - 0.05 * (top - low), top + 0.05 * (top - low)) } else { (0.0, 1.0) };
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 17))
        .margin(12)
        .x_label_area_size(32)
        .y_label_area_size(46)
        .build_cartesian_2d(0.0..right, low..top)
        .map_err(|error| error.to_string())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_labels(5)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .x_desc("step")
        .draw()
        .map_err(|error| error.to_string())?;
    for (name, colour, points) in curves {
        let colour = *colour;
        let line = LineSeries::new(points.iter().copied().filter(|(_, y)| y.is_finite()), colour.stroke_width(2));
        let drawn = chart.draw_series(line).map_err(|error| error.to_string())?;
        drawn.label(*name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(TRANSPARENT)
        .label_font(("sans-serif", 13))
        .draw()
        .map_err(|error| error.to_string())
}

/// Exponential moving average: single steps are too noisy to see a curve in.
fn smoothed(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let mut mean: Option<f64> = None;
    points
        .into_iter()
        .map(|(x, y)| {
            let next = mean.map_or(y, |mean| 0.95 * mean + 0.05 * y);
            mean = Some(next);
            (x, next)
        })
        .collect()
}
