//! The curves of a run as a picture: loss, held-out perplexity soft and hard, what hardening costs, the schedules.

use std::path::Path;

use super::log::{EvaluationRecord, Record, StepRecord};
use crate::{
    error::Result,
    plot::{Axis, Chart, Colour, Figure, Form, Panel, Series},
};

/// A curve's name and points.
type Curve<'a> = (&'a str, Vec<(f64, f64)>);

/// Draws `records` to `stem.svg` and `stem.png`. Nothing to draw is no error: the panels stay empty.
pub fn curves(records: &[Record], stem: &Path) -> Result<()> {
    let steps: Vec<&StepRecord> = records.iter().filter_map(|r| if let Record::Step(s) = r { Some(s) } else { None }).collect();
    // The last one is of another text: it does not belong on the curve.
    let evaluations: Vec<&EvaluationRecord> =
        records.iter().filter_map(|r| if let Record::Evaluation(e) = r { (!e.complete).then_some(e) } else { None }).collect();
    let of_step = |f: fn(&StepRecord) -> f64| steps.iter().map(|s| (s.step as f64, f(s))).collect::<Vec<_>>();
    let of_evaluation = |f: fn(&EvaluationRecord) -> f64| evaluations.iter().map(|e| (e.step as f64, f(e))).collect::<Vec<_>>();
    let last = steps.iter().map(|s| s.step as f64).chain(evaluations.iter().map(|e| e.step as f64)).fold(1.0, f64::max);
    let panels = vec![
        panel("training loss (nats per token)", last, vec![("language model", smoothed(of_step(|s| s.lm_loss)))]),
        panel(
            "held-out perplexity",
            last,
            vec![
                ("reference", of_evaluation(|e| e.reference_perplexity)),
                ("hard top-1", of_evaluation(|e| e.top1_perplexity)),
                ("hard top-2", of_evaluation(|e| e.top2_perplexity)),
            ],
        ),
        panel(
            "what hardening costs: held-out perplexity over the reference (%)",
            last,
            vec![
                ("hard top-1", of_evaluation(|e| (e.top1_perplexity / e.reference_perplexity - 1.0) * 100.0)),
                ("hard top-2", of_evaluation(|e| (e.top2_perplexity / e.reference_perplexity - 1.0) * 100.0)),
            ],
        ),
        panel("router temperature and noise", last, vec![("temperature", of_step(|s| s.temperature)), ("noise", of_step(|s| s.noise))]),
    ];
    Figure { title: String::new(), panel: (500.0, 330.0), columns: 2, panels, bar: None }.save(stem)
}

/// Curves over the steps of the run. One name has the same colour in every panel of this picture.
fn panel(title: &str, last: f64, curves: Vec<Curve<'_>>) -> Panel {
    let colour = |name: &str| match name {
        "hard top-1" | "noise" => Colour::nth(1),
        "hard top-2" => Colour::nth(2),
        _ => Colour::nth(0),
    };
    let series = curves.into_iter().map(|(name, points)| Series { name: name.into(), colour: colour(name), form: Form::Line(points) });
    let series = series.collect();
    Panel::Chart(Chart { title: title.into(), x: Axis::linear("step").from_to(0.0, last), series, ..Chart::default() })
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
