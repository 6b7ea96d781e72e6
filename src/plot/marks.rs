//! What a picture consists of, once laid out. Coordinates are logical pixels from the upper left.

/// A place.
pub(super) type At = (f64, f64);

/// A colour with its opacity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Colour {
    /// Red, green, blue.
    pub rgb: [u8; 3],
    /// 0 is invisible, 1 is opaque.
    pub alpha: f64,
}

/// Colours that can be told apart, also by most colour-blind readers.
const PALETTE: [[u8; 3]; 10] = [
    [31, 119, 180],
    [214, 97, 23],
    [44, 140, 60],
    [197, 43, 57],
    [124, 84, 172],
    [121, 85, 61],
    [216, 112, 182],
    [28, 40, 120],
    [160, 158, 24],
    [14, 164, 180],
];

impl Colour {
    /// Text and axes.
    pub const INK: Self = Self::new([40, 40, 40]);
    /// Grid lines.
    pub const FAINT: Self = Self::new([222, 222, 222]);
    /// Controls and other things to be set off from the rest.
    pub const GREY: Self = Self::new([140, 140, 140]);
    /// Paper.
    pub const WHITE: Self = Self::new([255, 255, 255]);

    /// Opaque.
    pub const fn new(rgb: [u8; 3]) -> Self {
        Self { rgb, alpha: 1.0 }
    }

    /// One of ten, over and over.
    pub fn nth(i: usize) -> Self {
        Self::new(PALETTE[i % PALETTE.len()])
    }

    /// The same, to be seen through.
    pub fn with_alpha(self, alpha: f64) -> Self {
        Self { alpha, ..self }
    }

    /// A value in [0, 1] on a scale from light to dark that also a grey copy keeps in order. Others go to the ends.
    pub fn heat(value: f64) -> Self {
        const STOPS: [[f64; 3]; 5] =
            [[255.0, 255.0, 240.0], [250.0, 214.0, 130.0], [236.0, 120.0, 70.0], [160.0, 34.0, 90.0], [36.0, 10.0, 66.0]];
        let value = if value.is_nan() { 0.0 } else { value.clamp(0.0, 1.0) };
        let at = value * (STOPS.len() - 1) as f64;
        let low = (at as usize).min(STOPS.len() - 2);
        let mix = |i: usize| (STOPS[low][i] + (STOPS[low + 1][i] - STOPS[low][i]) * (at - low as f64)).round() as u8;
        Self::new([mix(0), mix(1), mix(2)])
    }
}

/// A rectangle.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Area {
    pub(super) left: f64,
    pub(super) top: f64,
    pub(super) width: f64,
    pub(super) height: f64,
}

impl Area {
    pub(super) fn right(&self) -> f64 {
        self.left + self.width
    }

    pub(super) fn bottom(&self) -> f64 {
        self.top + self.height
    }

    /// The parts of a line that are inside.
    pub(super) fn cut(&self, points: &[At]) -> Vec<Vec<At>> {
        let mut parts: Vec<Vec<At>> = Vec::new();
        for pair in points.windows(2) {
            let Some((from, to)) = self.inside(pair[0], pair[1]) else { continue };
            match parts.last_mut() {
                Some(part) if part.last() == Some(&from) => part.push(to),
                _ => parts.push(vec![from, to]),
            }
        }
        parts
    }

    /// The part of a polygon that is inside (Sutherland and Hodgman 1974).
    pub(super) fn cut_polygon(&self, points: &[At]) -> Vec<At> {
        // How far inside each of the four edges a place is.
        let edges: [&dyn Fn(At) -> f64; 4] =
            [&|at| at.0 - self.left, &|at| self.right() - at.0, &|at| at.1 - self.top, &|at| self.bottom() - at.1];
        edges.into_iter().fold(points.to_vec(), |polygon, inside| {
            let next = polygon.iter().cycle().skip(1);
            let kept = polygon.iter().zip(next).flat_map(|(&from, &to)| {
                let (a, b) = (inside(from), inside(to));
                let crossing = || (from.0 + (to.0 - from.0) * a / (a - b), from.1 + (to.1 - from.1) * a / (a - b));
                [(a >= 0.0).then_some(from), ((a >= 0.0) != (b >= 0.0)).then(crossing)].into_iter().flatten()
            });
            kept.collect()
        })
    }

    /// The part of a segment that is inside (Liang and Barsky 1984).
    fn inside(&self, from: At, to: At) -> Option<(At, At)> {
        let (mut enters, mut leaves) = (0.0_f64, 1.0_f64);
        for (from, to, low, high) in [(from.0, to.0, self.left, self.right()), (from.1, to.1, self.top, self.bottom())] {
            if from == to {
                if from < low || from > high {
                    return None;
                }
                continue;
            }
            let [a, b] = [low, high].map(|end| (end - from) / (to - from));
            (enters, leaves) = (enters.max(a.min(b)), leaves.min(a.max(b)));
        }
        let at = |share: f64| (from.0 + (to.0 - from.0) * share, from.1 + (to.1 - from.1) * share);
        // Ends that are inside stay what they are, to the last bit: the next segment begins there.
        (enters < leaves).then(|| (if enters > 0.0 { at(enters) } else { from }, if leaves < 1.0 { at(leaves) } else { to }))
    }
}

/// Which part of a text is at its place. Vertically that is always the middle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    Start,
    Middle,
    End,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Mark {
    Line {
        points: Vec<At>,
        width: f64,
        colour: Colour,
    },
    Polygon {
        points: Vec<At>,
        colour: Colour,
    },
    Rect {
        area: Area,
        colour: Colour,
    },
    Dot {
        at: At,
        radius: f64,
        colour: Colour,
    },
    /// `turned`: upwards, as at a vertical axis.
    Text {
        at: At,
        text: String,
        size: f64,
        align: Align,
        colour: Colour,
        turned: bool,
    },
}

/// Marks, later ones above earlier ones.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Canvas {
    pub(super) marks: Vec<Mark>,
}

impl Canvas {
    pub(super) fn text(&mut self, at: At, text: &str, size: f64, align: Align) {
        self.marks.push(Mark::Text { at, text: text.to_owned(), size, align, colour: Colour::INK, turned: false });
    }

    pub(super) fn turned_text(&mut self, at: At, text: &str, size: f64) {
        self.marks.push(Mark::Text { at, text: text.to_owned(), size, align: Align::Middle, colour: Colour::INK, turned: true });
    }

    pub(super) fn line(&mut self, points: Vec<At>, width: f64, colour: Colour) {
        if points.len() > 1 {
            self.marks.push(Mark::Line { points, width, colour });
        }
    }

    /// A line in parts: lengths of what is drawn and of gaps, in turn.
    pub(super) fn dashed(&mut self, points: &[At], lengths: &[f64], width: f64, colour: Colour) {
        dashes(points, lengths).into_iter().for_each(|dash| self.line(dash, width, colour));
    }

    pub(super) fn rect(&mut self, area: Area, colour: Colour) {
        self.marks.push(Mark::Rect { area, colour });
    }

    pub(super) fn frame(&mut self, area: Area, colour: Colour) {
        let (l, t, r, b) = (area.left, area.top, area.right(), area.bottom());
        self.line(vec![(l, t), (r, t), (r, b), (l, b), (l, t)], 1.0, colour);
    }
}

/// Cuts a line into the parts that are drawn: lengths of what is drawn and of gaps in turn, over and over.
fn dashes(points: &[At], lengths: &[f64]) -> Vec<Vec<At>> {
    let mut turns = lengths.iter().copied().cycle();
    let (mut done, mut on, mut left) = (Vec::new(), true, turns.next().unwrap_or(f64::INFINITY));
    let mut dash: Vec<At> = points.first().copied().into_iter().collect();
    for pair in points.windows(2) {
        let (mut from, to) = (pair[0], pair[1]);
        let mut length = (to.0 - from.0).hypot(to.1 - from.1);
        while length > left {
            let share = left / length;
            from = (from.0 + (to.0 - from.0) * share, from.1 + (to.1 - from.1) * share);
            length -= left;
            if on {
                dash.push(from);
                done.push(std::mem::take(&mut dash));
            } else {
                dash = vec![from];
            }
            on = !on;
            left = turns.next().unwrap_or(f64::INFINITY);
        }
        left -= length;
        if on {
            dash.push(to);
        }
    }
    if on && dash.len() > 1 {
        done.push(dash);
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dashes_go_round_corners() {
        let cut = dashes(&[(0.0, 0.0), (8.0, 0.0), (8.0, 7.0)], &[6.0, 4.0]);
        assert_eq!(cut, [vec![(0.0, 0.0), (6.0, 0.0)], vec![(8.0, 2.0), (8.0, 7.0)]]);
        assert_eq!(dashes(&[(0.0, 0.0), (3.0, 0.0), (5.0, 0.0)], &[6.0, 4.0]), [vec![(0.0, 0.0), (3.0, 0.0), (5.0, 0.0)]]);
        assert!(dashes(&[(1.0, 1.0)], &[6.0, 4.0]).is_empty() && dashes(&[], &[6.0, 4.0]).is_empty());
        let mixed = dashes(&[(0.0, 0.0), (12.0, 0.0)], &[4.0, 2.0, 1.0, 2.0]);
        assert_eq!(mixed, [vec![(0.0, 0.0), (4.0, 0.0)], vec![(6.0, 0.0), (7.0, 0.0)], vec![(9.0, 0.0), (12.0, 0.0)]]);
    }

    #[test]
    fn lines_are_cut_where_they_leave() {
        let area = Area { left: 0.0, top: 0.0, width: 10.0, height: 10.0 };
        assert_eq!(area.cut(&[(1.0, 1.0), (2.0, 5.0), (9.0, 5.0)]), [vec![(1.0, 1.0), (2.0, 5.0), (9.0, 5.0)]], "inside: whole");
        let out_and_in = area.cut(&[(2.0, 5.0), (4.0, 15.0), (6.0, 5.0)]);
        assert_eq!(out_and_in, [vec![(2.0, 5.0), (3.0, 10.0)], vec![(5.0, 10.0), (6.0, 5.0)]]);
        assert_eq!(area.cut(&[(-10.0, 5.0), (20.0, 5.0)]), [vec![(0.0, 5.0), (10.0, 5.0)]], "through it");
        assert!(area.cut(&[(1.0, 11.0), (9.0, 11.0)]).is_empty() && area.cut(&[(5.0, 5.0)]).is_empty());
        let triangle = [(2.0, 5.0), (4.0, 15.0), (6.0, 5.0)];
        assert_eq!(area.cut_polygon(&triangle), [(2.0, 5.0), (3.0, 10.0), (5.0, 10.0), (6.0, 5.0)]);
        assert!(area.cut_polygon(&triangle.map(|(x, y)| (x, y + 9.0))).is_empty() && area.cut_polygon(&[]).is_empty());
    }

    #[test]
    fn the_heat_scale_darkens() {
        let light = |value: f64| Colour::heat(value).rgb.iter().map(|&c| u32::from(c)).sum::<u32>();
        let lights: Vec<u32> = (0..=20).map(|i| light(f64::from(i) / 20.0)).collect();
        assert!(lights.windows(2).all(|w| w[1] < w[0]), "{lights:?}");
        assert_eq!((Colour::heat(-1.0), Colour::heat(f64::NAN).rgb), (Colour::heat(0.0), Colour::heat(0.0).rgb));
    }
}
