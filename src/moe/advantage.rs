//! What the score of a draw is multiplied by in REINFORCE (Williams 1992): its loss above a baseline.

use super::estimator::{Baseline, Gradient};

/// Losses of the copies of a batch: all rows of the first draw, of the second, and so on; last those of the greedy copy,
/// where the baseline has one.
#[derive(Clone, Copy, Debug)]
pub struct Draws<'a> {
    /// `[copies · T]`.
    pub losses: &'a [f64],
    /// T.
    pub rows: usize,
    /// Copies that are draws.
    pub samples: usize,
}

impl Gradient {
    /// Copies of a row that are draws, without the greedy one: 1 but for score functions.
    pub fn samples(self) -> usize {
        match self {
            Self::Score { samples, .. } => samples.max(1),
            _ => 1,
        }
    }
}

impl Draws<'_> {
    /// Mean loss of the draws.
    pub fn mean(&self) -> f64 {
        let drawn = self.losses.get(..self.rows * self.samples).unwrap_or(self.losses);
        drawn.iter().sum::<f64>() / drawn.len().max(1) as f64
    }

    /// `(L - b) / (T · samples)` of each row, so that the sum over rows is the gradient of the mean loss; else as
    /// [`Draws::above`].
    pub fn advantages(&self, baseline: Baseline, average: f64) -> Vec<f64> {
        let share = 1.0 / (self.rows * self.samples).max(1) as f64;
        self.above(baseline, average).into_iter().map(|advantage| advantage * share).collect()
    }

    /// `L - b` of each row; 0 for the greedy copy. `average` is the moving average of the loss before this step.
    pub fn above(&self, baseline: Baseline, average: f64) -> Vec<f64> {
        let Self { losses, rows, samples } = *self;
        let others = |i: usize| {
            let of_row: f64 = (0..samples).filter_map(|copy| losses.get(copy * rows + i % rows)).sum();
            (of_row - losses[i]) / (samples.max(2) - 1) as f64
        };
        let advantage = |i: usize| {
            let subtracted = match baseline {
                Baseline::None => 0.0,
                Baseline::MovingAverage { .. } => average,
                Baseline::LeaveOneOut => others(i),
                Baseline::SelfCritical => losses.get(samples * rows + i % rows).copied().unwrap_or(0.0),
            };
            if i < rows * samples { losses[i] - subtracted } else { 0.0 }
        };
        (0..losses.len()).map(advantage).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn baselines() {
        let losses = [1.0, 2.0, 3.0, 5.0, 4.0, 4.5];
        let draws = Draws { losses: &losses, rows: 2, samples: 2 };
        assert_eq!(draws.mean(), 2.75);
        for (baseline, wanted) in [
            (Baseline::None, [1.0, 2.0, 3.0, 5.0, 0.0, 0.0]),
            (Baseline::MovingAverage { decay: 0.9 }, [0.5, 1.5, 2.5, 4.5, 0.0, 0.0]),
            (Baseline::LeaveOneOut, [-2.0, -3.0, 2.0, 3.0, 0.0, 0.0]),
            (Baseline::SelfCritical, [-3.0, -2.5, -1.0, 0.5, 0.0, 0.0]),
        ] {
            let found: Vec<f64> = draws.advantages(baseline, 0.5).iter().map(|a| a * 4.0).collect();
            assert_eq!(found, wanted, "{baseline:?}");
        }
        assert_eq!(Gradient::Exact.samples(), 1);
    }
}
