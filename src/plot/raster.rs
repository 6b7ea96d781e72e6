//! Marks as PNG: drawn three times as large by plotters' bitmap backend, then averaged, which smooths every edge.

use plotters::{
    backend::{BitMapBackend, DrawingBackend},
    style::{
        Color, FontTransform, RGBAColor, TextStyle,
        text_anchor::{HPos, Pos, VPos},
    },
};

use super::{
    font,
    marks::{Align, At, Canvas, Colour, Mark},
};
use crate::error::{Error, Result};

/// Pixels drawn for each pixel of the result, each way.
const FINE: usize = 3;

/// The file, opaque on white.
pub(super) fn png(canvas: &Canvas, (width, height): (f64, f64)) -> Result<Vec<u8>> {
    let (width, height) = ((width.ceil() as usize).max(1), (height.ceil() as usize).max(1));
    let mut fine = vec![255u8; width * height * FINE * FINE * 3];
    draw(canvas, &mut fine, ((width * FINE) as u32, (height * FINE) as u32))
        .map_err(|error| Error::Internal(format!("drawing: {error}")))?;
    encode(&averaged(&fine, width, height), width as u32, height as u32).map_err(|error| Error::Internal(format!("writing a PNG: {error}")))
}

fn draw(canvas: &Canvas, fine: &mut [u8], size: (u32, u32)) -> std::result::Result<(), String> {
    let mut backend = BitMapBackend::with_buffer(fine, size);
    for mark in &canvas.marks {
        draw_mark(&mut backend, mark)?;
    }
    backend.present().map_err(|error| error.to_string())
}

fn draw_mark<B: DrawingBackend>(backend: &mut B, mark: &Mark) -> std::result::Result<(), String> {
    let drawn = match mark {
        Mark::Line { points, width, colour } => {
            let style = paint(*colour).stroke_width((width * FINE as f64).round().max(1.0) as u32);
            backend.draw_path(points.iter().map(place), &style)
        }
        Mark::Polygon { points, colour } => backend.fill_polygon(points.iter().map(place), &paint(*colour)),
        Mark::Rect { area, colour } => {
            let (from, to) = (place(&(area.left, area.top)), place(&(area.right(), area.bottom())));
            backend.draw_rect(from, to, &paint(*colour), true)
        }
        Mark::Dot { at, radius, colour } => backend.draw_circle(place(at), (radius * FINE as f64).round() as u32, &paint(*colour), true),
        Mark::Text { at, text, size, align, colour, turned } => {
            let transform = if *turned { FontTransform::Rotate270 } else { FontTransform::None };
            let font = font::font(size * FINE as f64).transform(transform);
            let (horizontal, vertical) = match (turned, align) {
                (true, _) => (HPos::Center, VPos::Center),
                (false, Align::Start) => (HPos::Left, VPos::Center),
                (false, Align::Middle) => (HPos::Center, VPos::Center),
                (false, Align::End) => (HPos::Right, VPos::Center),
            };
            let paint = paint(*colour);
            let style = TextStyle::from(font).color(&paint).pos(Pos::new(horizontal, vertical));
            backend.draw_text(text, &style, place(at))
        }
    };
    drawn.map_err(|error| error.to_string())
}

fn place(at: &At) -> (i32, i32) {
    let pixel = |x: f64| (x * FINE as f64).round() as i32;
    (pixel(at.0), pixel(at.1))
}

fn paint(colour: Colour) -> RGBAColor {
    let [r, g, b] = colour.rgb;
    RGBAColor(r, g, b, colour.alpha)
}

/// Means of squares of `FINE` by `FINE` pixels.
fn averaged(fine: &[u8], width: usize, height: usize) -> Vec<u8> {
    let mut sums = vec![0u16; width * height * 3];
    for (y, row) in fine.chunks_exact(width * FINE * 3).enumerate() {
        let sums = &mut sums[y / FINE * width * 3..][..width * 3];
        for (sums, pixels) in sums.chunks_exact_mut(3).zip(row.chunks_exact(FINE * 3)) {
            for pixel in pixels.chunks_exact(3) {
                sums.iter_mut().zip(pixel).for_each(|(sum, &value)| *sum += u16::from(value));
            }
        }
    }
    sums.into_iter().map(|sum| (sum / (FINE * FINE) as u16) as u8).collect()
}

fn encode(rgb: &[u8], width: u32, height: u32) -> std::result::Result<Vec<u8>, png::EncodingError> {
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header()?.write_image_data(rgb)?;
    Ok(out)
}
