//! Values over time and index, as colours.

use super::marks::{Align, Area, Canvas, Colour};

/// Columns of values, for example the load of each expert at points of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeatMap {
    /// Above it.
    pub title: String,
    /// Below it: what goes from left to right.
    pub x_label: String,
    /// Beside it: what goes from top to bottom.
    pub y_label: String,
    /// First and last place along the bottom.
    pub x_ends: (String, String),
    /// One for each column, from left to right; values from top to bottom.
    pub columns: Vec<Vec<f64>>,
    /// The value of the darkest colour; 0 has the lightest.
    pub most: f64,
}

const TITLE: f64 = 13.0;
const SMALL: f64 = 11.0;

/// What the colours of heat maps mean: a bar at the right of a figure.
#[derive(Clone, Debug, PartialEq)]
pub struct ColourBar {
    /// What the values are.
    pub label: String,
    /// [`HeatMap::most`] of all maps in the figure.
    pub most: f64,
}

/// Width of a colour bar with its labels.
pub(super) const BAR: f64 = 64.0;

impl HeatMap {
    pub(super) fn draw(&self, canvas: &mut Canvas, whole: Area) {
        let (left, top) = (34.0, 28.0);
        let area = Area {
            left: whole.left + left,
            top: whole.top + top,
            width: (whole.width - left - 10.0).max(1.0),
            height: (whole.height - top - 32.0).max(1.0),
        };
        self.draw_cells(canvas, area);
        canvas.frame(area, Colour::GREY);
        let (x, y) = (area.left + area.width / 2.0, area.top + area.height / 2.0);
        canvas.text((x, area.top - 12.0), &self.title, TITLE, Align::Middle);
        canvas.text((x, area.bottom() + 13.0), &self.x_label, SMALL, Align::Middle);
        canvas.text((area.left, area.bottom() + 13.0), &self.x_ends.0, SMALL, Align::Start);
        canvas.text((area.right(), area.bottom() + 13.0), &self.x_ends.1, SMALL, Align::End);
        self.draw_rows(canvas, area);
        canvas.turned_text((whole.left + 9.0, y), &self.y_label, SMALL);
    }

    /// Neighbours of one colour become one rectangle: a long run has thousands of cells.
    fn draw_cells(&self, canvas: &mut Canvas, area: Area) {
        let rows = self.rows();
        let width = area.width / self.columns.len().max(1) as f64;
        let height = area.height / rows.max(1) as f64;
        for row in 0..rows {
            let colour = |column: usize| self.columns.get(column)?.get(row).map(|&value| self.colour(value));
            let mut first = 0;
            for column in 1..=self.columns.len() {
                if colour(column) == colour(first) {
                    continue;
                }
                if let Some(colour) = colour(first) {
                    let (left, run) = (area.left + first as f64 * width, (column - first) as f64 * width);
                    canvas.rect(Area { left, top: area.top + row as f64 * height, width: run, height }, colour);
                }
                first = column;
            }
        }
    }

    fn draw_rows(&self, canvas: &mut Canvas, area: Area) {
        let rows = self.rows();
        let every = rows.div_ceil(8).max(1);
        for row in (0..rows).step_by(every) {
            let y = area.top + (row as f64 + 0.5) * area.height / rows as f64;
            canvas.text((area.left - 4.0, y), &row.to_string(), SMALL - 1.0, Align::End);
        }
    }

    fn rows(&self) -> usize {
        self.columns.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// In 32 steps, so that neighbours can be equal. What is not finite has the colour of nothing.
    fn colour(&self, value: f64) -> Colour {
        let share = if value.is_finite() && self.most > 0.0 { value / self.most } else { return Colour::FAINT };
        Colour::heat((share.clamp(0.0, 1.0) * 32.0).round() / 32.0)
    }
}

impl ColourBar {
    /// Into an area of width [`BAR`].
    pub(super) fn draw(&self, canvas: &mut Canvas, area: Area) {
        const STEPS: usize = 48;
        let bar = Area { left: area.left + 6.0, top: area.top + 28.0, width: 13.0, height: (area.height - 60.0).max(1.0) };
        let height = bar.height / STEPS as f64;
        for i in 0..STEPS {
            let top = bar.bottom() - (i + 1) as f64 * height;
            canvas.rect(Area { top, height, ..bar }, Colour::heat((i as f64 + 0.5) / STEPS as f64));
        }
        canvas.frame(bar, Colour::GREY);
        let most = format!("{:.1}", self.most);
        canvas.text((bar.right() + 4.0, bar.bottom() - 4.0), "0", SMALL, Align::Start);
        canvas.text((bar.right() + 4.0, bar.top + 4.0), &most, SMALL, Align::Start);
        canvas.turned_text((bar.right() + 12.0, bar.top + bar.height / 2.0), &self.label, SMALL);
    }
}
