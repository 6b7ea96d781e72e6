//! Medians and percentiles: a shared machine is noisy, so nothing here is a mean.

use serde::Serialize;

/// Values in the order in which they were measured, of which medians and percentiles are asked.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Sample(Vec<f64>);

/// What is told of a latency, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Values that this is made of.
    pub count: usize,
    /// Half are below.
    pub p50: f64,
    /// Nine of ten are below.
    pub p90: f64,
    /// 99 of 100 are below.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Sample {
    /// One more value.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// All values of another sample.
    pub fn extend(&mut self, other: &Self) {
        self.0.extend_from_slice(&other.0);
    }

    /// As they came.
    pub fn values(&self) -> &[f64] {
        &self.0
    }

    /// No value yet.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The middle value, between the two middle ones of an even number. `None` of nothing.
    pub fn median(&self) -> Option<f64> {
        self.percentile(50.0)
    }

    /// The value below which `percent` of all lie, linearly between neighbours. `None` of nothing.
    pub fn percentile(&self, percent: f64) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        percentile_of_sorted(&sorted, percent)
    }

    /// Percentiles of a latency; zeros of nothing.
    pub fn latency(&self) -> Latency {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |percent| percentile_of_sorted(&sorted, percent).unwrap_or(0.0);
        Latency { count: sorted.len(), p50: at(50.0), p90: at(90.0), p99: at(99.0), max: at(100.0) }
    }
}

impl FromIterator<f64> for Sample {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

fn percentile_of_sorted(sorted: &[f64], percent: f64) -> Option<f64> {
    let place = percent.clamp(0.0, 100.0) / 100.0 * sorted.len().checked_sub(1)? as f64;
    let (low, part) = (place.floor() as usize, place.fract());
    let below = sorted.get(low).copied()?;
    let above = sorted.get(low + 1).copied().unwrap_or(below);
    Some(below + (above - below) * part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_lie_between_neighbours() {
        let sample: Sample = [5.0, 1.0, 4.0, 2.0, 3.0].into_iter().collect();
        assert_eq!((sample.median(), sample.percentile(0.0), sample.percentile(100.0)), (Some(3.0), Some(1.0), Some(5.0)));
        assert_eq!(sample.percentile(90.0), Some(4.6));
        assert_eq!([2.0, 1.0].into_iter().collect::<Sample>().median(), Some(1.5));
        assert_eq!(sample.values(), [5.0, 1.0, 4.0, 2.0, 3.0], "kept as they came");
    }

    #[test]
    fn nothing_has_no_median() {
        assert_eq!(Sample::default().median(), None);
        assert_eq!(Sample::default().latency(), Latency::default());
    }

    #[test]
    fn a_latency_of_a_hundred() {
        let latency = (0..=100).map(f64::from).collect::<Sample>().latency();
        assert_eq!(latency, Latency { count: 101, p50: 50.0, p90: 90.0, p99: 99.0, max: 100.0 });
    }
}
