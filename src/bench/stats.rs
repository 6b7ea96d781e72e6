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

/// Values of which a bounded number is kept: every one at first, then every second, fourth and so on. For runs of any length, whose own
/// memory must not grow.
#[derive(Clone, Debug)]
pub struct BoundedSample {
    kept: Vec<f64>,
    stride: usize,
    count: usize,
    max: f64,
}

/// Values that a [`BoundedSample`] keeps, at most.
const MOST_KEPT: usize = 1024;

impl Default for BoundedSample {
    fn default() -> Self {
        Self { kept: Vec::new(), stride: 1, count: 0, max: 0.0 }
    }
}

impl BoundedSample {
    /// One more value.
    pub fn push(&mut self, value: f64) {
        if self.count.is_multiple_of(self.stride) {
            self.kept.push(value);
        }
        self.count += 1;
        self.max = self.max.max(value);
        if self.kept.len() == MOST_KEPT {
            let mut index = 0;
            self.kept.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            self.stride *= 2;
        }
    }

    /// Percentiles over samples that were taken alike; count and maximum are exact.
    pub fn latency<'a>(all: impl Iterator<Item = &'a Self>) -> Latency {
        let (mut kept, mut count, mut max) = (Sample::default(), 0, 0f64);
        for sample in all {
            sample.kept.iter().for_each(|&value| kept.push(value));
            count += sample.count;
            max = max.max(sample.max);
        }
        Latency { count, max, ..kept.latency() }
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
    fn a_bounded_sample_keeps_its_shape() {
        let mut samples = [BoundedSample::default(), BoundedSample::default()];
        (0..200_000).for_each(|i| samples[i % 2].push(f64::from((i as u32 * 7919) % 100_000)));
        let latency = BoundedSample::latency(samples.iter());
        assert_eq!((latency.count, latency.max), (200_000, 99_999.0));
        assert!((latency.p50 - 50_000.0).abs() < 3000.0 && (latency.p99 - 99_000.0).abs() < 1000.0, "{latency:?}");
        assert!(samples.iter().all(|sample| sample.kept.len() < MOST_KEPT));
        assert_eq!(BoundedSample::latency(std::iter::empty()), Latency::default());
    }

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
