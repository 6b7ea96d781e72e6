//! Pictures: charts, rows of dots and heat maps, as SVG for documents and PNG for everything else.
//!
//! A [`Figure`] is laid out once into a list of marks (`marks`) in logical pixels, which two small writers know how to
//! draw: `svg` as text, `raster` through plotters' bitmap backend. Text is measured and drawn with the font in this
//! folder, so that a picture does not depend on what is installed.

mod axis;
mod chart;
mod dots;
mod font;
mod grid;
mod heat;
mod marks;
mod raster;
mod svg;

use std::path::Path;

use self::marks::{Align, Area, Canvas};
pub use self::{
    axis::{Axis, Scale},
    chart::{Chart, Dash, Form, Legend, Series},
    dots::{Dot, DotColumn, DotPlot, DotSeries},
    grid::Grid,
    heat::{ColourBar, HeatMap},
    marks::Colour,
};
use crate::error::{Error, Result};

/// A picture: panels in a grid.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// Above all panels; empty for none.
    pub title: String,
    /// Width and height of one panel in logical pixels.
    pub panel: (f64, f64),
    /// Panels next to each other; the rest goes below.
    pub columns: usize,
    /// Row by row.
    pub panels: Vec<Panel>,
    /// What colours mean, at the right.
    pub bar: Option<ColourBar>,
}

/// One cell of a [`Figure`].
#[derive(Clone, Debug, PartialEq)]
pub enum Panel {
    /// Curves and points over two axes.
    Chart(Chart),
    /// Dots in named rows.
    Dots(DotPlot),
    /// Values as colours.
    Heat(HeatMap),
    /// The same over two named dimensions.
    Grid(Grid),
}

const TITLE: f64 = 30.0;

/// Marks and size of a laid-out figure.
#[derive(Debug)]
struct Laid {
    canvas: Canvas,
    size: (f64, f64),
}

impl Figure {
    /// One panel.
    pub fn single(size: (f64, f64), panel: Panel) -> Self {
        Self { title: String::new(), panel: size, columns: 1, panels: vec![panel], bar: None }
    }

    /// Writes `stem.svg` and `stem.png`. `stem` has no extension of its own.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, stem: &Path) -> Result<()> {
        let laid = self.lay_out();
        for (extension, bytes) in
            [("svg", svg::write(&laid.canvas, laid.size).into_bytes()), ("png", raster::png(&laid.canvas, laid.size)?)]
        {
            let path = stem.with_extension(extension);
            std::fs::write(&path, bytes).map_err(|source| Error::io(&path, source))?;
        }
        Ok(())
    }

    fn lay_out(&self) -> Laid {
        let columns = self.columns.max(1);
        let rows = self.panels.len().div_ceil(columns);
        let (width, height) = self.panel;
        let top = if self.title.is_empty() { 0.0 } else { TITLE };
        let inner = width * columns.min(self.panels.len().max(1)) as f64;
        let size = (if self.bar.is_some() { inner + heat::BAR } else { inner }, height * rows as f64 + top);
        let mut canvas = Canvas::default();
        if !self.title.is_empty() {
            canvas.text((size.0 / 2.0, TITLE / 2.0 + 4.0), &self.title, 17.0, Align::Middle);
        }
        for (i, panel) in self.panels.iter().enumerate() {
            let (column, row) = ((i % columns) as f64, (i / columns) as f64);
            let area = Area { left: column * width, top: top + row * height, width, height };
            match panel {
                Panel::Chart(chart) => chart.draw(&mut canvas, area),
                Panel::Dots(dots) => dots.draw(&mut canvas, area),
                Panel::Heat(heat) => heat.draw(&mut canvas, area),
                Panel::Grid(grid) => grid.draw(&mut canvas, area),
            }
        }
        if let Some(bar) = &self.bar {
            bar.draw(&mut canvas, Area { left: inner, top, width: heat::BAR, height: size.1 - top });
        }
        Laid { canvas, size }
    }
}

#[cfg(test)]
mod tests;
