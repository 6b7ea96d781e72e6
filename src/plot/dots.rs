//! Dots in named rows: what a scatter plot with dozens of names would crowd.

use super::{
    axis::{Axis, Fitted},
    font,
    marks::{Align, Area, Canvas, Colour, Mark},
};

/// Names down the left, and for each of them a dot in every column. Columns have an axis of their own.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DotPlot {
    /// Above it.
    pub title: String,
    /// Of the rows, from top to bottom.
    pub names: Vec<String>,
    /// Rows from here on are set off by a line, and grey; the number of rows for none.
    pub set_off: usize,
    /// From left to right.
    pub columns: Vec<DotColumn>,
}

/// Dots over one axis.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DotColumn {
    /// Along the bottom. What is beyond fixed ends is a triangle at the end.
    pub axis: Axis,
    /// Side by side within a row; those of the first column are in the legend.
    pub series: Vec<DotSeries>,
}

/// A dot for each row.
#[derive(Clone, Debug, PartialEq)]
pub struct DotSeries {
    /// In the legend; empty for what is not to be in it.
    pub name: String,
    /// Of all but the rows that are set off.
    pub colour: Colour,
    /// As many as there are rows; `None` where there is nothing to show.
    pub dots: Vec<Option<Dot>>,
}

/// What is shown in a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Dot {
    /// A value and its range. 0 on a logarithmic axis is at its left end.
    At {
        /// The dot.
        middle: f64,
        /// Where its line begins.
        low: f64,
        /// Where it ends.
        high: f64,
    },
    /// Somewhere below: a line up to there, without a dot.
    Below(f64),
}

const TITLE: f64 = 15.0;
const TEXT: f64 = 12.0;
const SMALL: f64 = 11.0;
/// Height of a row.
const ROW: f64 = 15.0;
/// Space above the rows, for title and legend; below them, for ticks and labels.
const ABOVE: f64 = 30.0;
const LEGEND: f64 = 20.0;
const BELOW: f64 = 46.0;
/// Between columns.
const GAP: f64 = 16.0;
const RADIUS: f64 = 3.5;
/// Between the series of a row.
const APART: f64 = 5.0;

impl DotPlot {
    /// Height at which rows have their natural distance.
    pub fn height(&self) -> f64 {
        self.above() + ROW * self.names.len() as f64 + BELOW
    }

    pub(super) fn draw(&self, canvas: &mut Canvas, whole: Area) {
        let names = self.names.iter().map(|name| font::width(name, SMALL)).fold(0.0, f64::max);
        let area = Area {
            left: whole.left + names + 16.0,
            top: whole.top + self.above(),
            width: (whole.width - names - 30.0).max(1.0),
            height: (whole.height - self.above() - BELOW).max(1.0),
        };
        canvas.text((whole.left + whole.width / 2.0, whole.top + 15.0), &self.title, TITLE, Align::Middle);
        self.draw_legend(canvas, (area.left, whole.top + ABOVE + 5.0));
        for (i, name) in self.names.iter().enumerate() {
            canvas.text((area.left - 8.0, self.row(area, i)), name, SMALL, Align::End);
        }
        let count = self.columns.len().max(1) as f64;
        let width = (area.width - GAP * (count - 1.0)) / count;
        for (i, column) in self.columns.iter().enumerate() {
            self.draw_column(canvas, Area { left: area.left + (width + GAP) * i as f64, width, ..area }, column);
        }
    }

    fn above(&self) -> f64 {
        if self.legend().next().is_some() { ABOVE + LEGEND } else { ABOVE }
    }

    fn legend(&self) -> impl Iterator<Item = &DotSeries> {
        self.columns.iter().take(1).flat_map(|column| &column.series).filter(|series| !series.name.is_empty())
    }

    fn draw_legend(&self, canvas: &mut Canvas, (mut x, y): (f64, f64)) {
        for series in self.legend() {
            canvas.marks.push(Mark::Dot { at: (x + RADIUS, y), radius: RADIUS, colour: series.colour });
            canvas.text((x + 12.0, y), &series.name, TEXT, Align::Start);
            x += font::width(&series.name, TEXT) + 34.0;
        }
    }

    /// Middle of a row.
    fn row(&self, area: Area, i: usize) -> f64 {
        area.top + area.height * (i as f64 + 0.5) / self.names.len().max(1) as f64
    }

    fn draw_column(&self, canvas: &mut Canvas, area: Area, column: &DotColumn) {
        let axis = column.fit();
        for i in 0..self.names.len() {
            let y = self.row(area, i);
            canvas.line(vec![(area.left, y), (area.right(), y)], 0.5, Colour::FAINT);
        }
        for tick in axis.ticks((area.width / 55.0) as usize) {
            let x = area.left + tick.share * area.width;
            canvas.line(vec![(x, area.top), (x, area.bottom())], 1.0, Colour::FAINT);
            canvas.text((x, area.bottom() + 11.0), &tick.label, SMALL, Align::Middle);
        }
        canvas.frame(area, Colour::GREY);
        if (1..self.names.len()).contains(&self.set_off) {
            let y = area.top + area.height * self.set_off as f64 / self.names.len() as f64;
            canvas.line(vec![(area.left, y), (area.right(), y)], 1.0, Colour::GREY);
        }
        canvas.text((area.left + area.width / 2.0, area.bottom() + 30.0), &column.axis.label, TEXT, Align::Middle);
        let middle = (column.series.len().max(1) - 1) as f64 / 2.0;
        for (n, series) in column.series.iter().enumerate() {
            for (i, dot) in series.dots.iter().enumerate() {
                let colour = if i < self.set_off { series.colour } else { Colour::GREY };
                let y = self.row(area, i) + APART * (n as f64 - middle);
                dot.iter().for_each(|dot| column.draw_dot(canvas, (&axis, area), y, *dot, colour));
            }
        }
    }
}

impl DotColumn {
    fn fit(&self) -> Fitted {
        let ends = |dot: &Dot| match *dot {
            Dot::At { middle, low, high } => [middle, low, high],
            Dot::Below(value) => [value; 3],
        };
        self.axis.fit(self.series.iter().flat_map(|series| series.dots.iter().flatten()).flat_map(ends), 0.04)
    }

    fn draw_dot(&self, canvas: &mut Canvas, (axis, area): (&Fitted, Area), y: f64, dot: Dot, colour: Colour) {
        let place = |value: f64| {
            let share = if self.axis.has(value) { axis.share(value) } else { 0.0 };
            area.left + share.clamp(0.0, 1.0) * area.width
        };
        let range = |canvas: &mut Canvas, from: f64, to: f64| canvas.line(vec![(from, y), (to, y)], 2.0, colour.with_alpha(0.5));
        match dot {
            Dot::At { middle, .. } if middle == 0.0 && !self.axis.has(middle) => {
                canvas.marks.push(Mark::Dot { at: (area.left, y), radius: RADIUS, colour });
            }
            Dot::At { middle, low, high } if self.axis.has(middle) => {
                range(canvas, place(low), place(high));
                let (at, share) = ((place(middle), y), axis.share(middle));
                // Ends of a fitted axis are found by sums: a value may be beyond them by a rounding.
                if (-1e-9..=1.0 + 1e-9).contains(&share) {
                    canvas.marks.push(Mark::Dot { at, radius: RADIUS, colour });
                } else {
                    canvas.marks.push(triangle(at, if share < 0.0 { 1.0 } else { -1.0 }, colour));
                }
            }
            Dot::Below(value) if self.axis.has(value) => {
                range(canvas, area.left, place(value));
                canvas.line(vec![(place(value), y - RADIUS), (place(value), y + RADIUS)], 1.5, colour);
            }
            Dot::At { .. } | Dot::Below(_) => {}
        }
    }
}

/// With its tip at a place and its base to the left (-1) or to the right (1) of that.
fn triangle((x, y): (f64, f64), base: f64, colour: Colour) -> Mark {
    let back = x + base * 2.0 * RADIUS;
    Mark::Polygon { points: vec![(x, y), (back, y - RADIUS), (back, y + RADIUS)], colour }
}
