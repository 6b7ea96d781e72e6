//! Curves and points over two axes.

use super::{
    axis::{Axis, Fitted},
    font,
    marks::{Align, Area, At, Canvas, Colour, Mark},
};

/// Curves and points over two axes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chart {
    /// Above it.
    pub title: String,
    /// Along the bottom.
    pub x: Axis,
    /// Along the left.
    pub y: Axis,
    /// Drawn in order, later ones above earlier ones; in the legend as well.
    pub series: Vec<Series>,
    /// Where names are.
    pub legend: Legend,
}

/// Something to be seen in a [`Chart`].
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// In the legend; empty for what is not to be in it.
    pub name: String,
    /// Of all of it.
    pub colour: Colour,
    /// Values. Those that are not finite, or have no place on a logarithmic axis, are left out; a curve has a gap there.
    /// Beyond fixed ends of an axis curves and tints are cut off, dots are drawn at its end.
    pub form: Form,
}

/// How values are shown.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// A curve through (x, y).
    Line(Vec<(f64, f64)>),
    /// The same, in parts.
    Dashed(Vec<(f64, f64)>, Dash),
    /// A tint between two curves, (x, from, to).
    Band(Vec<(f64, f64, f64)>),
    /// A dot at each (x, y).
    Dots(Vec<(f64, f64)>),
}

/// How a line is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dash {
    /// Long dashes.
    Long,
    /// Short ones.
    Short,
    /// Dots.
    Dotted,
    /// A long dash and a dot in turn.
    Mixed,
}

impl Dash {
    fn lengths(self) -> &'static [f64] {
        match self {
            Self::Long => &[10.0, 4.0],
            Self::Short => &[5.0, 3.0],
            Self::Dotted => &[1.5, 2.5],
            Self::Mixed => &[10.0, 3.0, 1.5, 3.0],
        }
    }
}

/// Where the names of a chart's series are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Legend {
    /// Nowhere.
    None,
    /// In the upper right corner, above the curves.
    #[default]
    Inside,
    /// Beside the chart.
    Right,
}

const TITLE: f64 = 15.0;
const TEXT: f64 = 12.0;
const SMALL: f64 = 11.0;
const LINE: f64 = 16.0;
const DOT: f64 = 3.5;

/// A chart whose axes have found their place.
struct Frame<'a> {
    chart: &'a Chart,
    area: Area,
    x: Fitted,
    y: Fitted,
}

impl Chart {
    pub(super) fn draw(&self, canvas: &mut Canvas, area: Area) {
        let frame = self.frame(area);
        frame.draw_axes(canvas, area);
        self.series.iter().for_each(|series| frame.draw_form(canvas, series));
        frame.draw_legend(canvas);
    }

    fn frame(&self, area: Area) -> Frame<'_> {
        let margin = if self.series.iter().any(|series| matches!(series.form, Form::Dots(_))) { 0.06 } else { 0.0 };
        let x = self.x.fit(self.places().map(|(x, _)| x), margin);
        let y = self.y.fit(self.places().map(|(_, y)| y), 0.05);
        let ticks = y.ticks(5).iter().map(|tick| font::width(&tick.label, SMALL)).fold(0.0, f64::max);
        let (left, top) = (ticks + if self.y.label.is_empty() { 14.0 } else { 34.0 }, if self.title.is_empty() { 12.0 } else { 32.0 });
        let right = if self.legend == Legend::Right { self.legend_width() + 14.0 } else { 16.0 };
        let bottom = if self.x.label.is_empty() { 26.0 } else { 44.0 };
        let area = Area {
            left: area.left + left,
            top: area.top + top,
            width: (area.width - left - right).max(1.0),
            height: (area.height - top - bottom).max(1.0),
        };
        Frame { chart: self, area, x, y }
    }

    /// All values that have a place on both axes.
    fn places(&self) -> impl Iterator<Item = At> + '_ {
        let of = |series: &Series| -> Vec<At> {
            match &series.form {
                Form::Line(points) | Form::Dashed(points, _) | Form::Dots(points) => points.clone(),
                Form::Band(points) => points.iter().flat_map(|&(x, from, to)| [(x, from), (x, to)]).collect(),
            }
        };
        self.series.iter().flat_map(of).filter(|(x, y)| self.x.has(*x) && self.y.has(*y))
    }

    fn named(&self) -> impl Iterator<Item = &Series> {
        self.series.iter().filter(|series| !series.name.is_empty())
    }

    fn legend_width(&self) -> f64 {
        self.named().map(|series| font::width(&series.name, TEXT)).fold(0.0, f64::max) + 34.0
    }
}

impl Frame<'_> {
    /// A place within the frame: at its edge for what is beyond.
    fn at(&self, at: At) -> At {
        let (x, y) = self.anywhere(at);
        (x.clamp(self.area.left, self.area.right()), y.clamp(self.area.top, self.area.bottom()))
    }

    fn anywhere(&self, (x, y): At) -> At {
        (self.area.left + self.x.share(x) * self.area.width, self.area.bottom() - self.y.share(y) * self.area.height)
    }

    fn has(&self, (x, y): At) -> bool {
        self.chart.x.has(x) && self.chart.y.has(y)
    }

    fn draw_axes(&self, canvas: &mut Canvas, whole: Area) {
        let area = self.area;
        for tick in self.x.ticks((area.width / 80.0) as usize) {
            let x = area.left + tick.share * area.width;
            canvas.line(vec![(x, area.top), (x, area.bottom())], 1.0, Colour::FAINT);
            canvas.text((x, area.bottom() + 11.0), &tick.label, SMALL, Align::Middle);
        }
        for tick in self.y.ticks(5) {
            let y = area.bottom() - tick.share * area.height;
            canvas.line(vec![(area.left, y), (area.right(), y)], 1.0, Colour::FAINT);
            canvas.text((area.left - 6.0, y), &tick.label, SMALL, Align::End);
        }
        canvas.frame(area, Colour::GREY);
        let middle = (area.left + area.width / 2.0, area.top + area.height / 2.0);
        canvas.text((middle.0, area.top - 15.0), &self.chart.title, TITLE, Align::Middle);
        canvas.text((middle.0, area.bottom() + 29.0), &self.chart.x.label, TEXT, Align::Middle);
        canvas.turned_text((whole.left + 12.0, middle.1), &self.chart.y.label, TEXT);
    }

    fn draw_form(&self, canvas: &mut Canvas, series: &Series) {
        match &series.form {
            Form::Line(points) => self.pieces(points).into_iter().for_each(|piece| canvas.line(piece, 2.0, series.colour)),
            Form::Dashed(points, dash) => {
                self.pieces(points).iter().for_each(|piece| canvas.dashed(piece, dash.lengths(), 1.6, series.colour));
            }
            Form::Band(points) => {
                let there = |(x, from, to): &(f64, f64, f64)| self.has((*x, *from)) && self.has((*x, *to));
                let edge =
                    |pick: fn(&(f64, f64, f64)) -> At| points.iter().filter(|point| there(point)).map(pick).map(|at| self.anywhere(at));
                let mut outline: Vec<At> = edge(|&(x, from, _)| (x, from)).collect();
                outline.extend(edge(|&(x, _, to)| (x, to)).collect::<Vec<_>>().into_iter().rev());
                let points = self.area.cut_polygon(&outline);
                if points.len() > 2 {
                    canvas.marks.push(Mark::Polygon { points, colour: series.colour.with_alpha(0.15) });
                }
            }
            Form::Dots(points) => points.iter().for_each(|&at| self.dot(canvas, at, series.colour)),
        }
    }

    /// Runs of values that have a place, cut where they leave the frame.
    fn pieces(&self, points: &[At]) -> Vec<Vec<At>> {
        let cut = |run: &[At]| self.area.cut(&run.iter().map(|&at| self.anywhere(at)).collect::<Vec<_>>());
        points.split(|&at| !self.has(at)).flat_map(cut).collect()
    }

    fn dot(&self, canvas: &mut Canvas, at: At, colour: Colour) {
        if self.has(at) {
            canvas.marks.push(Mark::Dot { at: self.at(at), radius: DOT, colour: colour.with_alpha(0.85) });
        }
    }

    fn draw_legend(&self, canvas: &mut Canvas) {
        let (rows, width) = (self.chart.named().count() as f64, self.chart.legend_width());
        if rows == 0.0 {
            return;
        }
        let (left, top) = match self.chart.legend {
            Legend::None => return,
            Legend::Inside => (self.area.right() - width - 6.0, self.area.top + 6.0),
            Legend::Right => (self.area.right() + 8.0, self.area.top),
        };
        canvas.rect(Area { left, top, width, height: rows * LINE + 4.0 }, Colour::WHITE.with_alpha(0.8));
        for (i, series) in self.chart.named().enumerate() {
            let y = top + 2.0 + LINE * (i as f64 + 0.5);
            let line = [(left + 4.0, y), (left + 24.0, y)];
            match &series.form {
                Form::Line(_) => canvas.line(line.to_vec(), 2.0, series.colour),
                Form::Dashed(_, dash) => canvas.dashed(&line, dash.lengths(), 1.6, series.colour),
                Form::Band(_) => {
                    canvas.rect(Area { left: left + 4.0, top: y - 5.0, width: 20.0, height: 10.0 }, series.colour.with_alpha(0.3));
                }
                Form::Dots(_) => canvas.marks.push(Mark::Dot { at: (left + 14.0, y), radius: DOT, colour: series.colour }),
            }
            canvas.text((left + 29.0, y), &series.name, TEXT, Align::Start);
        }
    }
}
