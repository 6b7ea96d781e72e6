//! A row for each arm: what a scatter plot of dozens of arms would hide.

use super::{ALONG, BELOW_BEST, Drawn, ONE_TOKEN, Picture, WIDTH, picture};
use crate::{
    compare::{
        quality::{Bias, Quality, along, cross_entropy, one_token as measured, quadratic},
        results::{GradientQuality, GradientResult, Results},
        spec::{Mode, TaskName},
        table::{Runs, Spread, Table},
    },
    plot::{Axis, Colour, Dot, DotColumn, DotPlot, DotSeries, Figure, Panel},
};

/// A column of an arm's spread.
type Column = (Axis, fn(&Runs<'_>) -> Option<Spread>);

/// Loss and what it costs.
pub(super) fn cost(table: &Table<'_>) -> Drawn {
    let columns: [Column; 3] = [
        (losses(table), |runs| runs.steps.hard1()),
        (Axis::linear("experts per token in training"), |runs| runs.steps.spread(|result| Some(result.executed_per_token))),
        (Axis::log("milliseconds of a step"), |runs| runs.steps.spread(|result| Some(result.step_ms.median))),
    ];
    let caption = format!(
        "What a lower loss costs in task `{}`, from scratch at equal steps: median and range over seeds, lowest median first, controls below the line. \
         A triangle is beyond the axis.",
        table.task.id()
    );
    arms(table, &format!("{}: hard top-1 loss and its cost", table.task.id()), columns)
        .map(|figure| (picture(&format!("cost-{}", table.id()), caption, table), figure))
}

/// Loss and distance from the teacher.
pub(super) fn fidelity(table: &Table<'_>) -> Drawn {
    let columns: [Column; 3] = [
        (losses(table), |runs| runs.steps.hard1()),
        (Axis::linear("relative L2 to the teacher"), |runs| runs.steps.spread(|result| result.fidelity?.rel_l2)),
        (Axis::log("KL to the teacher, nats"), |runs| runs.steps.spread(|result| result.fidelity?.kl)),
    ];
    let caption = format!(
        "Tuning a soft-trained model on task `{}`: what has the lower loss under hard top-1 (left, and the order of the rows) is not what stays nearest \
         to the teacher's soft outputs. Median and range over seeds, controls below the line. A triangle is beyond the axis.",
        table.task.id()
    );
    arms(table, &format!("{}: quality and fidelity after tuning", table.task.id()), columns)
        .map(|figure| (picture(&format!("fidelity-{}", table.task.id()), caption, table), figure))
}

/// Far enough for the best estimator, not for controls that are better by orders.
fn losses(table: &Table<'_>) -> Axis {
    let axis = Axis::log("test loss / best constant");
    let all = Spread::of(table.all().filter_map(|runs| runs.steps.hard1()).flat_map(|spread| [spread.low, spread.high]));
    let best = Spread::of(table.estimators.iter().filter_map(|runs| runs.steps.hard1()).map(|spread| spread.low));
    match (all, best) {
        (Some(all), Some(best)) if all.low < BELOW_BEST * best.low => axis.from_to(BELOW_BEST * best.low, 1.1 * all.high),
        _ => axis,
    }
}

/// Estimators, then controls; columns without a dot are left out.
fn arms<const N: usize>(table: &Table<'_>, title: &str, columns: [Column; N]) -> Option<Figure> {
    let dot = |spread: Spread| Dot::At { middle: spread.median, low: spread.low, high: spread.high };
    let column = |(axis, value): Column| {
        let dots: Vec<Option<Dot>> = table.all().map(|runs| value(runs).map(dot)).collect();
        let series = vec![DotSeries { name: String::new(), colour: Colour::nth(0), dots }];
        DotColumn { axis, series }
    };
    let columns: Vec<DotColumn> = columns.into_iter().map(column).filter(shows).collect();
    let plot = DotPlot { title: title.into(), names: table.all().map(Runs::label).collect(), set_off: table.estimators.len(), columns };
    figure(plot)
}

fn shows(column: &DotColumn) -> bool {
    column.series.iter().any(|series| series.dots.iter().any(Option::is_some))
}

fn figure(plot: DotPlot) -> Option<Figure> {
    let size = (WIDTH, plot.height());
    plot.columns.iter().any(shows).then(|| Figure::single(size, Panel::Dots(plot)))
}

const BIAS: &str = "relative bias";
const STD: &str = "relative std of one draw";

/// Quality of the router's gradient along the runs.
pub(super) fn along_the_run(table: &Table<'_>) -> Drawn {
    let mut rows: Vec<(String, Quality)> = table.estimators.iter().filter_map(|runs| Some((runs.label(), along(runs)?))).collect();
    rows.sort_by(|a, b| a.1.bias.most().total_cmp(&b.1.bias.most()));
    let of = |dot: fn(Quality) -> Dot| vec![series("", 0, rows.iter().map(|(_, quality)| Some(dot(*quality))).collect())];
    let columns = vec![DotColumn { axis: Axis::log(BIAS), series: of(bias) }, DotColumn { axis: Axis::log(STD), series: of(std) }];
    let title = "router gradient against the exact one, task equal".into();
    let plot = DotPlot { title, set_off: rows.len(), names: rows.into_iter().map(|(name, _)| name).collect(), columns };
    let caption = format!(
        "Quality of the router's gradient over the runs of task `equal`, against the exact gradient of the expected loss by enumeration: {QUALITY}"
    );
    Some((picture(ALONG, caption, table), figure(plot)?))
}

/// Quality of the gradient of one token.
pub(super) fn one_token(results: &Results) -> Drawn {
    let mut rows = measured(results);
    rows.retain(|row| row.quality(quadratic).is_some());
    let column = |dot: fn(Quality) -> Dot| {
        let dots = |loss: fn(&GradientResult) -> GradientQuality| rows.iter().map(|row| row.quality(loss).map(dot)).collect();
        vec![series("squared error", 0, dots(quadratic)), series("cross-entropy", 1, dots(cross_entropy))]
    };
    let columns = vec![DotColumn { axis: Axis::log(BIAS), series: column(bias) }, DotColumn { axis: Axis::log(STD), series: column(std) }];
    let names = rows.iter().map(|row| row.arm().name.clone()).collect();
    let plot = DotPlot { title: "gradient of one token against the exact one".into(), set_off: rows.len(), names, columns };
    let caption = format!(
        "Quality of the gradient of one token, by enumeration: {QUALITY} Dots are medians over the problems, lines go from the first to the third quartile."
    );
    let picture = Picture { stem: ONE_TOKEN.into(), caption, task: TaskName::Gradient, mode: Mode::Scratch };
    Some((picture, figure(plot)?))
}

/// What the two columns of gradients mean.
const QUALITY: &str = "relative bias, without the noise of its measurement, and relative standard deviation of a single draw, least bias first. A \
                       line that ends in a bar: the bias is somewhere below, less than the noise of the mean. On the left edge, 0: estimators that draw nothing.";

fn bias(quality: Quality) -> Dot {
    match quality.bias {
        Bias::Seen(middle) => {
            let [low, high] = quality.quartiles.map_or([middle; 2], |of| of.bias.map(Bias::most));
            Dot::At { middle, low, high }
        }
        Bias::BelowFloor(floor) => Dot::Below(floor),
    }
}

fn std(quality: Quality) -> Dot {
    let [low, high] = quality.quartiles.map_or([quality.std; 2], |of| of.std);
    Dot::At { middle: quality.std, low, high }
}

fn series(name: &str, colour: usize, dots: Vec<Option<Dot>>) -> DotSeries {
    DotSeries { name: name.into(), colour: Colour::nth(colour), dots }
}
