//! Schedules: pure functions of the step.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, MapAccess, Visitor, value::MapAccessDeserializer},
};

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
///
/// Recipes write a number (a constant), or `{ schedule, init, final }` with the ends of the way either as shares of the
/// run (`hold_start`, `hold_end`, 0.1 each unless stated) or as steps (`begin`, `until`).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(into = "Written")]
pub struct Schedule {
    /// Form of the way.
    pub schedule: Shape,
    /// Value at the start.
    pub init: f64,
    /// Value at the end.
    pub end: f64,
    /// Share of the run before the way begins; unused once `begin` or `until` is given.
    pub hold_start: f64,
    /// Share of the run after it has ended; unused once `begin` or `until` is given.
    pub hold_end: f64,
    /// Step at which the way begins; 0 if only `until` is given.
    pub begin: Option<usize>,
    /// Step from which `final` holds; the length of the run if only `begin` is given.
    pub until: Option<usize>,
}

/// A schedule as a recipe has it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default)]
    schedule: Shape,
    init: f64,
    #[serde(rename = "final")]
    end: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hold_start: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hold_end: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    begin: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    until: Option<usize>,
}

const DEFAULT_HOLD: f64 = 0.1;

/// Most that any number of a recipe may be: what it is multiplied with stays finite in f32.
pub const MOST: f64 = 1e30;

/// Least that a number may be that must not be 0: what it divides stays finite in f32.
pub const LEAST: f64 = 1e-30;

impl Schedule {
    /// `value` at every step.
    pub fn constant(value: f64) -> Self {
        Self::new(Shape::Constant, value, value)
    }

    /// From `init` to `end`, a tenth of the run held at each.
    pub fn new(schedule: Shape, init: f64, end: f64) -> Self {
        Self { schedule, init, end, hold_start: DEFAULT_HOLD, hold_end: DEFAULT_HOLD, begin: None, until: None }
    }

    /// The value at `step` of `steps`.
    pub fn at(&self, step: usize, steps: usize) -> f64 {
        let u = self.progress(step, steps);
        match self.schedule {
            Shape::Constant => self.init,
            Shape::Linear => self.init + (self.end - self.init) * u,
            Shape::Exp => geometric(self.init, self.end, u),
            Shape::Cosine => self.end + 0.5 * (self.init - self.end) * (1.0 + (std::f64::consts::PI * u).cos()),
        }
    }

    /// Share of the way that lies behind `step`.
    fn progress(&self, step: usize, steps: usize) -> f64 {
        if self.in_steps() {
            let begin = self.begin.unwrap_or(0);
            let way = self.until.unwrap_or(steps).saturating_sub(begin).max(1);
            return (step.saturating_sub(begin) as f64 / way as f64).min(1.0);
        }
        let share = step as f64 / steps.max(1) as f64;
        let way = (1.0 - self.hold_start - self.hold_end).max(f64::EPSILON);
        ((share - self.hold_start) / way).clamp(0.0, 1.0)
    }

    fn in_steps(&self) -> bool {
        self.begin.is_some() || self.until.is_some()
    }

    /// The value after the last step.
    pub fn last(&self) -> f64 {
        if self.schedule == Shape::Constant { self.init } else { self.end }
    }

    /// The smallest value that it takes.
    pub fn least(&self) -> f64 {
        if self.schedule == Shape::Constant { self.init } else { self.init.min(self.end) }
    }

    /// The same schedule for a run of `share` times the length: ends in steps move with it.
    pub fn scaled(&self, share: f64) -> Self {
        let scale = |at: usize| (at as f64 * share).round() as usize;
        Self { begin: self.begin.map(scale), until: self.until.map(scale), ..*self }
    }

    /// What would be taken no notice of.
    fn unused(&self) -> Option<String> {
        let constant = self.schedule == Shape::Constant;
        if constant && self.end != self.init {
            Some(format!("a constant schedule stays at init = {}: make final the same, or choose another schedule", self.init))
        } else if constant && self.in_steps() {
            Some("a constant schedule has no way, and `begin` and `until` no effect: remove them".into())
        } else {
            None
        }
    }

    /// What makes the schedule unusable in a run of `steps`, if anything. `positive`: no value may be 0.
    pub fn problem(&self, positive: bool, steps: usize) -> Option<String> {
        let finite = self.init.is_finite() && self.end.is_finite();
        let shares = self.hold_start >= 0.0 && self.hold_end >= 0.0 && self.hold_start + self.hold_end < 1.0;
        if !finite || self.least() < 0.0 {
            Some("init and final must be finite and not negative".into())
        } else if self.least() < LEAST && (positive || self.schedule == Shape::Exp) {
            Some(format!("init and final must be at least {LEAST:e} (an exponential schedule cannot reach 0: use linear)"))
        } else if self.init.max(self.end) > MOST {
            Some(format!("init and final must be at most {MOST:e}"))
        } else if let Some(unused) = self.unused() {
            Some(unused)
        } else if self.in_steps() {
            self.misplaced(steps)
        } else if !shares {
            Some("hold_start and hold_end must be at least 0 and below 1 together".into())
        } else {
            None
        }
    }

    fn misplaced(&self, steps: usize) -> Option<String> {
        let past = |name: &str, at: usize| format!("`{name}` = {at} is past the end of the run, {steps} steps");
        match (self.begin, self.until) {
            (_, Some(until)) if until > steps => Some(past("until", until)),
            (Some(begin), None) if begin >= steps => Some(past("begin", begin)),
            (begin, Some(until)) if begin.unwrap_or(0) >= until => {
                Some(format!("`begin` = {} is not before `until` = {until}", begin.unwrap_or(0)))
            }
            _ => None,
        }
    }
}

impl From<Schedule> for Written {
    fn from(s: Schedule) -> Self {
        let hold = |share| (!s.in_steps()).then_some(share);
        Self {
            schedule: s.schedule,
            init: s.init,
            end: s.end,
            hold_start: hold(s.hold_start),
            hold_end: hold(s.hold_end),
            begin: s.begin,
            until: s.until,
        }
    }
}

impl<'de> Deserialize<'de> for Schedule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NumberOrTable)
    }
}

/// Reads both spellings. By hand: an untagged enum would say of every mistake only that nothing matched.
struct NumberOrTable;

impl<'de> Visitor<'de> for NumberOrTable {
    type Value = Schedule;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, or a table with init and final")
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Schedule, E> {
        Ok(Schedule::constant(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Schedule, E> {
        Ok(Schedule::constant(value as f64))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Schedule, E> {
        Ok(Schedule::constant(value as f64))
    }

    fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<Schedule, M::Error> {
        let written = Written::deserialize(MapAccessDeserializer::new(map))?;
        let (shares, steps) = (written.hold_start.or(written.hold_end), written.begin.or(written.until));
        if shares.is_some() && steps.is_some() {
            return Err(de::Error::custom("begin and until take the place of hold_start and hold_end: give one pair"));
        }
        Ok(Schedule {
            hold_start: written.hold_start.unwrap_or(DEFAULT_HOLD),
            hold_end: written.hold_end.unwrap_or(DEFAULT_HOLD),
            begin: written.begin,
            until: written.until,
            ..Schedule::new(written.schedule, written.init, written.end)
        })
    }
}

/// `from · (to / from)^u`, u in [0, 1]: exact at both ends, finite wherever both are.
fn geometric(from: f64, to: f64, u: f64) -> f64 {
    match u {
        0.0 => from,
        1.0 => to,
        _ => ((1.0 - u) * from.ln() + u * to.ln()).exp(),
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
        Schedule::new(shape, 2.0, 0.5)
    }

    #[test]
    fn holds_both_ends_and_is_monotone_between() {
        for shape in [Shape::Linear, Shape::Exp, Shape::Cosine] {
            let values: Vec<f64> = (0..=100).map(|step| schedule(shape).at(step, 100)).collect();
            assert_eq!((values[0], values[10]), (2.0, 2.0), "{shape:?}");
            assert!((values[90] - 0.5).abs() < 1e-12 && (values[100] - 0.5).abs() < 1e-12, "{shape:?}");
            assert!(values.windows(2).all(|w| w[1] <= w[0] + 1e-12), "{shape:?}");
        }
        assert_eq!(Schedule::constant(2.0).at(100, 100), 2.0);
        assert!((schedule(Shape::Exp).at(50, 100) - 1.0).abs() < 1e-12, "geometric middle of 2 and 0.5");
    }

    #[test]
    fn problems_are_found() {
        assert!(schedule(Shape::Exp).problem(true, 100).is_none());
        assert!(Schedule { end: 0.0, ..schedule(Shape::Exp) }.problem(false, 100).is_some());
        assert!(Schedule { end: 0.0, ..schedule(Shape::Linear) }.problem(false, 100).is_none());
        assert!(Schedule { end: 0.0, ..schedule(Shape::Linear) }.problem(true, 100).is_some());
        assert!(Schedule { end: 1e-60, ..schedule(Shape::Linear) }.problem(true, 100).is_some(), "0 in f32");
        assert!(Schedule { hold_start: 0.9, ..schedule(Shape::Linear) }.problem(true, 100).is_some());
        assert!(Schedule { init: f64::NAN, ..schedule(Shape::Linear) }.problem(true, 100).is_some());
        assert!(Schedule::constant(MOST).problem(true, 100).is_none() && Schedule::constant(LEAST).problem(true, 100).is_none());
        for (schedule, message) in [
            (Schedule::constant(2e30), "init and final must be at most 1e30"),
            (Schedule { init: 1e300, ..schedule(Shape::Linear) }, "init and final must be at most 1e30"),
            (Schedule::constant(2e-38), "init and final must be at least 1e-30"),
            (schedule(Shape::Constant), "a constant schedule stays at init = 2: make final the same"),
            (Schedule { until: Some(9), ..Schedule::constant(1.0) }, "a constant schedule has no way"),
        ] {
            assert!(schedule.problem(true, 100).unwrap().starts_with(message), "{schedule:?}");
        }
    }

    #[test]
    fn the_widest_way_is_finite_at_every_step() {
        let wide = Schedule::new(Shape::Exp, LEAST, MOST);
        assert!(wide.problem(true, 1000).is_none());
        let values: Vec<f64> = (0..=1000).map(|step| Schedule { init: 1e-30, end: 1e300, ..wide }.at(step, 1000)).collect();
        assert!(values.iter().all(|value| value.is_finite()) && values.windows(2).all(|pair| pair[0] <= pair[1]), "{values:?}");
        assert!((wide.at(500, 1000) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn ends_in_steps() {
        let schedule = Schedule { begin: Some(20), until: Some(60), ..schedule(Shape::Linear) };
        let at = |step| schedule.at(step, 100);
        assert_eq!((at(0), at(20), at(40), at(60), at(99)), (2.0, 2.0, 1.25, 0.5, 0.5));
        assert!(schedule.problem(true, 100).is_none());
        assert_eq!(schedule.problem(true, 50).unwrap(), "`until` = 60 is past the end of the run, 50 steps");
        let crossed = Schedule { until: Some(20), ..schedule };
        assert_eq!(crossed.problem(true, 100).unwrap(), "`begin` = 20 is not before `until` = 20");
        let open = Schedule { until: None, ..schedule };
        assert_eq!(open.at(60, 100), 1.25, "until the last step");
        assert_eq!(open.problem(true, 20).unwrap(), "`begin` = 20 is past the end of the run, 20 steps");
        assert_eq!((schedule.scaled(0.5).begin, schedule.scaled(0.5).until), (Some(10), Some(30)));
    }

    #[test]
    fn both_spellings_are_read_and_written_back() {
        let read = |text: &str| serde_json::from_str::<Schedule>(text).map_err(|error| error.to_string());
        assert_eq!(read("0.5").unwrap(), Schedule::constant(0.5));
        assert_eq!(read("2").unwrap(), Schedule::constant(2.0));
        assert_eq!(read(r#"{"init": 2.0, "final": 0.5}"#).unwrap(), schedule(Shape::Exp));
        let in_steps = Schedule { begin: Some(3), until: Some(9), ..schedule(Shape::Cosine) };
        for schedule in [schedule(Shape::Linear), Schedule::constant(0.25), in_steps] {
            assert_eq!(read(&serde_json::to_string(&schedule).unwrap()).unwrap(), schedule);
        }
        for (text, message) in [
            (r#"{"init": 2.0, "final": 0.5, "hold_end": 0.2, "until": 9}"#, "give one pair"),
            (r#"{"init": 2.0, "final": 0.5, "hald_end": 0.2}"#, "unknown field `hald_end`"),
            (r#"{"init": 2.0}"#, "missing field `final`"),
            (r#""warm""#, "a number, or a table with init and final"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn learning_rate_rises_then_falls() {
        let rates: Vec<f64> = (0..100).map(|step| learning_rate(step, 100, 10, 1.0, 0.1)).collect();
        assert_eq!(rates[9], 1.0);
        assert!(rates[..10].windows(2).all(|w| w[1] > w[0]) && rates[10..].windows(2).all(|w| w[1] < w[0]));
        assert!(rates[99] > 0.1 && rates[99] < 0.11);
    }
}
