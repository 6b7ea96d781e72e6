//! Cells gathered for people: by task and mode, seeds of an arm together.

use std::fmt;

use super::{
    arm::Arm,
    results::{CellRecord, CellResult, Outcome, Results},
    spec::{Budget, Mode, TaskName},
};
use crate::moe::estimator::{EstimatorSpec, Purpose};

/// What one task and mode came to.
#[derive(Clone, Debug)]
pub struct Table<'a> {
    /// On what.
    pub task: TaskName,
    /// From where.
    pub mode: Mode,
    /// Estimators, best hard top-1 first; those without one last.
    pub estimators: Vec<Runs<'a>>,
    /// Controls, likewise.
    pub controls: Vec<Runs<'a>>,
}

/// One arm over its seeds.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    /// What was compared.
    pub arm: &'a Arm,
    /// With equal steps; by seed.
    pub steps: Vec<&'a CellResult>,
    /// With equal expert-FLOPs; empty where that is the same.
    pub flops: Vec<&'a CellResult>,
    /// Cells that ended with an error.
    pub failed: usize,
}

/// Median and range over seeds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Of an even count, the mean of the two in the middle.
    pub median: f64,
    /// The smallest.
    pub low: f64,
    /// The largest.
    pub high: f64,
    /// Values that there were.
    pub count: usize,
}

/// The tables of all tasks and modes with trained cells, in the order of the report.
pub fn tables(results: &Results) -> Vec<Table<'_>> {
    // The same arms at several rates are no rows of one table; see `rates`.
    let tasks = TaskName::ALL.into_iter().filter(|task| *task != TaskName::Rates);
    let places = tasks.flat_map(|task| [Mode::Scratch, Mode::Tune].map(|mode| (task, mode)));
    places.filter_map(|(task, mode)| table(results, task, mode)).collect()
}

fn table(results: &Results, task: TaskName, mode: Mode) -> Option<Table<'_>> {
    let cells = results.cells.iter().filter(|cell| cell.spec.task == task && cell.spec.mode == mode && !cell.spec.is_teacher());
    let mut runs: Vec<Runs<'_>> = Vec::new();
    for cell in cells {
        let at = runs.iter().position(|runs| runs.arm.name == cell.spec.arm.name).unwrap_or_else(|| {
            runs.push(Runs { arm: &cell.spec.arm, steps: Vec::new(), flops: Vec::new(), failed: 0 });
            runs.len() - 1
        });
        runs[at].take(cell);
    }
    runs.retain(|runs| runs.failed > 0 || !runs.steps.is_empty());
    let last = f64::INFINITY;
    let order = |runs: &Runs<'_>| runs.hard1().map_or(last, |spread| spread.median);
    runs.sort_by(|a, b| order(a).total_cmp(&order(b)));
    let (controls, estimators): (Vec<_>, Vec<_>) = runs.into_iter().partition(|runs| runs.arm.route.is_control());
    (!controls.is_empty() || !estimators.is_empty()).then_some(Table { task, mode, estimators, controls })
}

impl<'a> Runs<'a> {
    fn take(&mut self, cell: &'a CellRecord) {
        match (&cell.outcome, cell.spec.budget) {
            (Outcome::Trained(result), Budget::Steps) => self.steps.push(result),
            (Outcome::Trained(result), Budget::Flops) => self.flops.push(result),
            (Outcome::Failed(_), _) => self.failed += 1,
            (Outcome::Gradient(_), _) => {}
        }
    }

    /// A figure over the seeds, equal steps. Seeds without it are left out.
    pub fn spread(&self, value: impl Fn(&CellResult) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.steps.iter().filter_map(|result| value(result)))
    }

    /// Hard top-1 loss in units of the best constant prediction.
    pub fn hard1(&self) -> Option<Spread> {
        self.spread(|result| result.relative(result.loss.hard1))
    }

    /// Experts per token in training; `None` where the estimator has no k, and for controls without one.
    pub fn k(&self, experts: usize) -> Option<usize> {
        EstimatorSpec::new(&self.arm.estimator, experts, 1, Purpose::Laboratory).ok()?.k()
    }

    /// Runs that ended with something that is not finite.
    pub fn diverged(&self) -> usize {
        self.steps.iter().filter(|result| result.diverged).count()
    }
}

impl CellResult {
    /// A loss in units of the best constant prediction.
    pub fn relative(&self, loss: Option<f64>) -> Option<f64> {
        loss.map(|loss| loss / self.trivial).filter(|ratio| ratio.is_finite())
    }
}

impl Table<'_> {
    /// Estimators, then controls.
    pub fn all(&self) -> impl Iterator<Item = &Runs<'_>> {
        self.estimators.iter().chain(&self.controls)
    }

    /// The row of a name.
    pub fn find(&self, name: &str) -> Option<&Runs<'_>> {
        self.all().find(|runs| runs.arm.name == name)
    }

    /// As headings and files have it: `equal`, or `equal-tune`.
    pub fn id(&self) -> String {
        match self.mode {
            Mode::Scratch => self.task.id().to_owned(),
            Mode::Tune => format!("{}-tune", self.task.id()),
        }
    }
}

impl Spread {
    /// Of the finite values; `None` if there is none.
    pub fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.filter(|value| value.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (*sorted.first()?, *sorted.last()?);
        let count = sorted.len();
        Some(Self { median: 0.5 * (sorted[(count - 1) / 2] + sorted[count / 2]), low, high, count })
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.low == self.high {
            true => f.write_str(&figure(self.median)),
            false => write!(f, "{} [{}..{}]", figure(self.median), figure(self.low), figure(self.high)),
        }
    }
}

/// Three significant digits; a whole number as such.
pub fn figure(value: f64) -> String {
    let size = value.abs();
    if value.fract() == 0.0 && size < 1e5 {
        format!("{:.0}", value + 0.0)
    } else if (1e-3..1e5).contains(&size) {
        let decimals = (2.0 - size.log10().floor()).clamp(0.0, 5.0) as usize;
        format!("{value:.decimals$}")
    } else {
        format!("{value:.1e}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits() {
        let shown = [-0.0, 0.001234, 0.12345, 1.0, 1.004, 12.34, 123.4, 99_999.0, -0.5, 1e-5, 2.5e7].map(figure);
        assert_eq!(shown, ["0", "0.00123", "0.123", "1", "1.00", "12.3", "123", "99999", "-0.500", "1.0e-5", "2.5e7"]);
    }

    #[test]
    fn spreads() {
        let spread = |values: &[f64]| Spread::of(values.iter().copied()).map(|spread| spread.to_string());
        assert_eq!(spread(&[3.0, 1.0, 2.0]).unwrap(), "2 [1..3]");
        assert_eq!(spread(&[1.0, 2.0, 4.0, 3.0, f64::NAN]).unwrap(), "2.50 [1..4]");
        assert_eq!(spread(&[0.5]).unwrap(), "0.500");
        assert_eq!(spread(&[]), None);
    }
}
