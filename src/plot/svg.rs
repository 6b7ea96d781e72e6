//! Marks as SVG.

use std::fmt::Write;

use super::marks::{Align, At, Canvas, Colour, Mark};

/// A document of `size`, on white.
pub(super) fn write(canvas: &Canvas, (width, height): (f64, f64)) -> String {
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\" viewBox=\"0 0 {0} {1}\" \
         font-family=\"DejaVu Sans, Verdana, sans-serif\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n",
        number(width),
        number(height)
    );
    for mark in &canvas.marks {
        // Writing to a String cannot fail.
        let _ = write_mark(&mut out, mark);
    }
    out + "</svg>\n"
}

fn write_mark(out: &mut String, mark: &Mark) -> std::fmt::Result {
    match mark {
        Mark::Line { points, width, colour } => writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke-width=\"{}\"{} stroke-linejoin=\"round\"/>",
            path(points),
            number(*width),
            paint("stroke", *colour)
        ),
        Mark::Polygon { points, colour } => writeln!(out, "<polygon points=\"{}\"{}/>", path(points), paint("fill", *colour)),
        Mark::Rect { area, colour } => writeln!(
            out,
            "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"{} shape-rendering=\"crispEdges\"/>",
            number(area.left),
            number(area.top),
            number(area.width),
            number(area.height),
            paint("fill", *colour)
        ),
        Mark::Dot { at: (x, y), radius, colour } => {
            writeln!(out, "<circle cx=\"{}\" cy=\"{}\" r=\"{}\"{}/>", number(*x), number(*y), number(*radius), paint("fill", *colour))
        }
        Mark::Text { at: (x, y), text, size, align, colour, turned } => {
            let anchor = match align {
                Align::Start => "start",
                Align::Middle => "middle",
                Align::End => "end",
            };
            let place = match turned {
                true => format!("transform=\"translate({} {}) rotate(-90)\"", number(*x), number(*y)),
                false => format!("x=\"{}\" y=\"{}\"", number(*x), number(*y)),
            };
            let (size, fill) = (number(*size), paint("fill", *colour));
            writeln!(out, "<text {place} dy=\"0.36em\" font-size=\"{size}\" text-anchor=\"{anchor}\"{fill}>{}</text>", escaped(text))
        }
    }
}

fn path(points: &[At]) -> String {
    points.iter().map(|(x, y)| format!("{},{}", number(*x), number(*y))).collect::<Vec<_>>().join(" ")
}

/// At most two decimals, none that say nothing.
fn number(x: f64) -> String {
    let text = format!("{x:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn paint(what: &str, colour: Colour) -> String {
    let [r, g, b] = colour.rgb;
    let opacity = if colour.alpha < 1.0 { format!(" {what}-opacity=\"{}\"", number(colour.alpha)) } else { String::new() };
    format!(" {what}=\"#{r:02x}{g:02x}{b:02x}\"{opacity}")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
