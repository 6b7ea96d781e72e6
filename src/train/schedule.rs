//! Schedules: pure functions of the step.

use serde::{Deserialize, Serialize};

/// Form of the way from `init` to `final`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// `init` for ever.
    Constant,
    /// Straight.
    Linear,
    /// Geometric; both ends must be above 0.
    #[default]
    Exp,
    /// Half a cosine.
    Cosine,
}

impl Shape {
    /// As recipes and `routing` blocks spell it.
    pub fn id(self) -> &'static str {
        match self {
            Self::Constant => "constant",
            Self::Linear => "linear",
            Self::Exp => "exp",
            Self::Cosine => "cosine",
        }
    }
}

/// A value that changes over a run: held at `init`, then on the way, then held at `final`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Form of the way.
    #[serde(default)]
    pub schedule: Shape,
    /// Value at the start.
    pub init: f64,
    /// Value at the end.
    #[serde(rename = "final")]
    pub end: f64,
    /// Share of the run before the way begins.
    #[serde(default = "default_hold")]
    pub hold_start: f64,
    /// Share of the run after it has ended.
    #[serde(default = "default_hold")]
    pub hold_end: f64,
}

fn default_hold() -> f64 {
    0.1
}

impl Schedule {
    /// The value at `step` of `steps`.
    pub fn at(&self, step: usize, steps: usize) -> f64 {
        let share = step as f64 / steps.max(1) as f64;
        let way = (1.0 - self.hold_start - self.hold_end).max(f64::EPSILON);
        let u = ((share - self.hold_start) / way).clamp(0.0, 1.0);
        match self.schedule {
            Shape::Constant => self.init,
            Shape::Linear => self.init + (self.end - self.init) * u,
            Shape::Exp => self.init * (self.end / self.init).powf(u),
            Shape::Cosine => self.end + 0.5 * (self.init - self.end) * (1.0 + (std::f64::consts::PI * u).cos()),
        }
    }

    /// The value after the last step.
    pub fn last(&self) -> f64 {
        if self.schedule == Shape::Constant { self.init } else { self.end }
    }

    /// What makes the schedule unusable, if anything. `positive`: no value may be 0.
    pub fn problem(&self, positive: bool) -> Option<String> {
        let finite = self.init.is_finite() && self.end.is_finite();
        let shares = self.hold_start >= 0.0 && self.hold_end >= 0.0 && self.hold_start + self.hold_end < 1.0;
        let least = if self.schedule == Shape::Constant { self.init } else { self.init.min(self.end) };
        if !finite || least < 0.0 {
            Some("init and final must be finite and not negative".into())
        } else if least < f64::from(f32::MIN_POSITIVE) && (positive || self.schedule == Shape::Exp) {
            // In f32, too, the precision in which values are used.
            Some("init and final must be above 0 (an exponential schedule cannot reach 0: use linear)".into())
        } else if !shares {
            Some("hold_start and hold_end must be at least 0 and below 1 together".into())
        } else {
            None
        }
    }
}

/// Learning rate: linear warm-up over `warmup` steps, then half a cosine to `floor · peak`.
pub fn learning_rate(step: usize, steps: usize, warmup: usize, peak: f64, floor: f64) -> f64 {
    if step < warmup {
        return peak * (step + 1) as f64 / warmup as f64;
    }
    let u = (step - warmup) as f64 / (steps.saturating_sub(warmup)).max(1) as f64;
    peak * (floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * u.min(1.0)).cos()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: Shape) -> Schedule {
        Schedule { schedule: shape, init: 2.0, end: 0.5, hold_start: 0.1, hold_end: 0.1 }
    }

    #[test]
    fn holds_both_ends_and_is_monotone_between() {
        for shape in [Shape::Linear, Shape::Exp, Shape::Cosine] {
            let values: Vec<f64> = (0..=100).map(|step| schedule(shape).at(step, 100)).collect();
            assert_eq!((values[0], values[10]), (2.0, 2.0), "{shape:?}");
            assert!((values[90] - 0.5).abs() < 1e-12 && (values[100] - 0.5).abs() < 1e-12, "{shape:?}");
            assert!(values.windows(2).all(|w| w[1] <= w[0] + 1e-12), "{shape:?}");
        }
        assert_eq!(schedule(Shape::Constant).at(100, 100), 2.0);
        assert!((schedule(Shape::Exp).at(50, 100) - 1.0).abs() < 1e-12, "geometric middle of 2 and 0.5");
    }

    #[test]
    fn problems_are_found() {
        assert!(schedule(Shape::Exp).problem(true).is_none());
        assert!(Schedule { end: 0.0, ..schedule(Shape::Exp) }.problem(false).is_some());
        assert!(Schedule { end: 0.0, ..schedule(Shape::Linear) }.problem(false).is_none());
        assert!(Schedule { end: 0.0, ..schedule(Shape::Linear) }.problem(true).is_some());
        assert!(Schedule { end: 1e-60, ..schedule(Shape::Linear) }.problem(true).is_some(), "0 in f32");
        assert!(Schedule { hold_start: 0.9, ..schedule(Shape::Linear) }.problem(true).is_some());
        assert!(Schedule { init: f64::NAN, ..schedule(Shape::Linear) }.problem(true).is_some());
    }

    #[test]
    fn learning_rate_rises_then_falls() {
        let rates: Vec<f64> = (0..100).map(|step| learning_rate(step, 100, 10, 1.0, 0.1)).collect();
        assert_eq!(rates[9], 1.0);
        assert!(rates[..10].windows(2).all(|w| w[1] > w[0]) && rates[10..].windows(2).all(|w| w[1] < w[0]));
        assert!(rates[99] > 0.1 && rates[99] < 0.11);
    }
}
