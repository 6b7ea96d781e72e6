//! Axes: from values to places, and where the ticks are.

/// How values are spread along an axis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scale {
    /// Evenly.
    #[default]
    Linear,
    /// By their logarithm; values that are not above 0 have no place.
    Log,
}

/// One axis of a chart.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Axis {
    /// What is along it, with its unit.
    pub label: String,
    /// How.
    pub scale: Scale,
    /// From where to where; `None`: as far as the values go, and a little more.
    pub range: Option<(f64, f64)>,
}

impl Axis {
    /// A linear axis as long as its values.
    pub fn linear(label: impl Into<String>) -> Self {
        Self { label: label.into(), ..Self::default() }
    }

    /// A logarithmic axis as long as its values.
    pub fn log(label: impl Into<String>) -> Self {
        Self { label: label.into(), scale: Scale::Log, range: None }
    }

    /// The same axis with fixed ends.
    pub fn from_to(self, from: f64, to: f64) -> Self {
        Self { range: Some((from, to)), ..self }
    }

    /// Whether a value has a place.
    pub(super) fn has(&self, value: f64) -> bool {
        value.is_finite() && (self.scale == Scale::Linear || value > 0.0)
    }

    /// Fits the axis to values, with `margin` of its length to spare at both ends.
    pub(super) fn fit(&self, values: impl Iterator<Item = f64>, margin: f64) -> Fitted {
        let (low, high) = match self.range {
            Some((from, to)) => (self.forward(from), self.forward(to)),
            None => {
                let values = values.filter(|&v| self.has(v)).map(|v| self.forward(v));
                let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
                let spare = margin * (high - low);
                (low - spare, high + spare)
            }
        };
        let (low, high) = match (low.is_finite() && high.is_finite(), high > low) {
            (true, true) => (low, high),
            (true, false) => (low - 0.5, low + 0.5),
            (false, _) => (0.0, 1.0),
        };
        Fitted { scale: self.scale, low, high }
    }

    fn forward(&self, value: f64) -> f64 {
        self.scale.forward(value)
    }
}

impl Scale {
    fn forward(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Log => value.log10(),
        }
    }
}

/// An axis whose ends are known; for [`Scale::Log`] as logarithms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Fitted {
    scale: Scale,
    low: f64,
    high: f64,
}

/// A place on an axis with its label; small ticks have none.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tick {
    /// From 0 to 1.
    pub(super) share: f64,
    pub(super) label: String,
}

impl Fitted {
    /// Share of the axis, 0 to 1 within its ends.
    pub(super) fn share(&self, value: f64) -> f64 {
        (self.scale.forward(value) - self.low) / (self.high - self.low)
    }

    /// About `wanted` ticks at round values.
    pub(super) fn ticks(&self, wanted: usize) -> Vec<Tick> {
        match self.scale {
            Scale::Linear => self.linear_ticks(self.low, self.high, wanted),
            Scale::Log => {
                let ticks = self.log_ticks(wanted);
                let [low, high] = [self.low, self.high].map(|exponent| 10f64.powf(exponent));
                // Within a part of a decade there are too few values of one digit, and even steps look even enough.
                if ticks.len() < 3 && self.high - self.low < 1.0 { self.linear_ticks(low, high, wanted) } else { ticks }
            }
        }
    }

    fn linear_ticks(&self, low: f64, high: f64, wanted: usize) -> Vec<Tick> {
        let step = round_step((high - low) / wanted.max(1) as f64);
        let decimals = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
        let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
        (first..=last).map(|i| self.tick(i as f64 * step, format!("{:.decimals$}", i as f64 * step + 0.0))).collect()
    }

    fn log_ticks(&self, wanted: usize) -> Vec<Tick> {
        let decades = self.high - self.low;
        let (first, last) = (self.low.floor() as i32, self.high.ceil() as i32);
        // As many powers of ten as fit; from three on there is no need for anything between them.
        let powers = (self.high + 1e-9).floor() - (self.low - 1e-9).ceil() + 1.0;
        let factors: &[f64] = if decades < 1.0 {
            &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0]
        } else if decades < 2.5 || powers < 3.0 {
            &[1.0, 2.0, 5.0]
        } else {
            &[1.0]
        };
        let every = ((decades / wanted.max(1) as f64).ceil() as i32).max(1);
        let exponents = (first..=last).filter(|exponent| exponent.rem_euclid(every) == 0);
        let values = exponents.flat_map(|exponent| factors.iter().map(move |factor| factor * 10f64.powi(exponent)));
        values.map(|value| self.tick(value, plain(value))).filter(|tick| (-1e-9..=1.0 + 1e-9).contains(&tick.share)).collect()
    }

    fn tick(&self, value: f64, label: String) -> Tick {
        Tick { share: self.share(value), label: label.replace('-', "\u{2212}") }
    }
}

/// The smallest of 1, 2, 5 times a power of ten that is not below `least`.
fn round_step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|factor| factor * power).find(|step| *step >= least * (1.0 - 1e-9)).unwrap_or(10.0 * power)
}

/// Without more digits than a round value has.
fn plain(value: f64) -> String {
    if (1e-4..1e6).contains(&value) {
        let text = format!("{value:.6}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        format!("{value:e}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis, values: &[f64]) -> Vec<String> {
        axis.fit(values.iter().copied(), 0.0).ticks(5).into_iter().map(|tick| tick.label).collect()
    }

    #[test]
    fn ticks_are_round() {
        let linear = Axis::linear("");
        assert_eq!(labels(&linear, &[0.0, 1000.0]), ["0", "200", "400", "600", "800", "1000"]);
        assert_eq!(labels(&linear, &[-0.031, 0.021]), ["\u{2212}0.02", "0.00", "0.02"]);
        assert_eq!(labels(&linear, &[3.0, 3.0]), ["2.6", "2.8", "3.0", "3.2", "3.4"], "a single value has room around it");
        assert_eq!(labels(&linear, &[f64::NAN]), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"], "nothing to show");
        let log = Axis::log("");
        assert_eq!(labels(&log, &[0.001, 10.0, -1.0, 0.0]), ["0.001", "0.01", "0.1", "1", "10"]);
        assert_eq!(labels(&log, &[0.85, 1.05]), ["0.85", "0.90", "0.95", "1.00", "1.05"]);
        assert_eq!(labels(&log, &[0.1, 2.0]), ["0.1", "0.2", "0.5", "1", "2"]);
        assert_eq!(
            labels(&log, &[0.0022, 0.87]),
            ["0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5"],
            "two powers of ten, none at the ends"
        );
        assert_eq!(labels(&log, &[1e-10, 1.0]), ["1e\u{2212}10", "1e\u{2212}8", "1e\u{2212}6", "0.0001", "0.01", "1"]);
    }

    #[test]
    fn values_have_their_place() {
        let fitted = Axis::log("").from_to(0.01, 100.0).fit(std::iter::empty(), 0.05);
        assert_eq!((fitted.share(0.01), fitted.share(1.0), fitted.share(100.0)), (0.0, 0.5, 1.0));
        let fitted = Axis::linear("").fit([1.0, 2.0].into_iter(), 0.1);
        assert!((fitted.share(1.0) - 0.1 / 1.2).abs() < 1e-12);
        assert!(!Axis::log("").has(0.0) && !Axis::linear("").has(f64::INFINITY));
    }
}
