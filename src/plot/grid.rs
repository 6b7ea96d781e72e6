//! Values over two named dimensions, as coloured cells.

use super::{
    font,
    marks::{Align, Area, Canvas, Colour},
};

/// Values over two named dimensions, for example the load of each expert in each layer. The colours are those of a
/// [`ColourBar`](super::ColourBar) with the same `most`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Grid {
    /// Above it.
    pub title: String,
    /// Below it: what goes from left to right.
    pub x_label: String,
    /// Beside it: what goes from top to bottom.
    pub y_label: String,
    /// Names of the columns; where there is no room for all, some are left out.
    pub columns: Vec<String>,
    /// Names of the rows, likewise.
    pub rows: Vec<String>,
    /// A row each, from top to bottom; values from left to right. What is not finite has the colour of nothing.
    pub values: Vec<Vec<f64>>,
    /// The value of the darkest colour; 0 has the lightest.
    pub most: f64,
}

const TITLE: f64 = 13.0;
const SMALL: f64 = 10.0;
/// Between names.
const GAP: f64 = 6.0;

impl Grid {
    pub(super) fn draw(&self, canvas: &mut Canvas, whole: Area) {
        let names = self.rows.iter().map(|name| font::width(name, SMALL)).fold(0.0, f64::max);
        let (left, top) = (names + if self.y_label.is_empty() { 12.0 } else { 28.0 }, 28.0);
        let area = Area {
            left: whole.left + left,
            top: whole.top + top,
            width: (whole.width - left - 10.0).max(1.0),
            height: (whole.height - top - if self.x_label.is_empty() { 20.0 } else { 36.0 }).max(1.0),
        };
        self.draw_cells(canvas, area);
        canvas.frame(area, Colour::GREY);
        let middle = (area.left + area.width / 2.0, area.top + area.height / 2.0);
        canvas.text((middle.0, area.top - 13.0), &self.title, TITLE, Align::Middle);
        canvas.text((middle.0, area.bottom() + 26.0), &self.x_label, SMALL + 1.0, Align::Middle);
        canvas.turned_text((whole.left + 9.0, middle.1), &self.y_label, SMALL + 1.0);
        self.draw_names(canvas, area);
    }

    fn cell(&self, area: Area) -> (f64, f64) {
        let columns = self.values.iter().map(Vec::len).max().unwrap_or(0).max(1);
        (area.width / columns as f64, area.height / self.values.len().max(1) as f64)
    }

    fn draw_cells(&self, canvas: &mut Canvas, area: Area) {
        let (width, height) = self.cell(area);
        for (row, values) in self.values.iter().enumerate() {
            for (column, &value) in values.iter().enumerate() {
                let (left, top) = (area.left + column as f64 * width, area.top + row as f64 * height);
                let known = value.is_finite() && self.most > 0.0;
                let colour = if known { Colour::heat(value / self.most) } else { Colour::FAINT };
                canvas.rect(Area { left, top, width, height }, colour);
            }
        }
    }

    fn draw_names(&self, canvas: &mut Canvas, area: Area) {
        let (width, height) = self.cell(area);
        let widest = self.columns.iter().map(|name| font::width(name, SMALL)).fold(0.0, f64::max) + GAP;
        let every = |room: f64, need: f64| (need / room).ceil().max(1.0) as usize;
        for (column, name) in self.columns.iter().enumerate().step_by(every(width, widest)) {
            canvas.text((area.left + (column as f64 + 0.5) * width, area.bottom() + 11.0), name, SMALL, Align::Middle);
        }
        for (row, name) in self.rows.iter().enumerate().step_by(every(height, SMALL + 2.0)) {
            canvas.text((area.left - 5.0, area.top + (row as f64 + 0.5) * height), name, SMALL, Align::End);
        }
    }
}
