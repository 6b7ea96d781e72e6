//! Cells gathered for people: by task and mode, seeds of an arm together.

use std::fmt;

use super::{
    arm::Arm,
    metric::median,
    results::{CellRecord, CellResult, Outcome, Results},
    spec::{Budget, Mode, Size, TaskName},
};
use crate::moe::estimator::{EstimatorSpec, Purpose};

/// What one task and mode came to.
#[derive(Clone, Debug)]
pub struct Table<'a> {
    /// On what.
    pub task: TaskName,
    /// From where.
    pub mode: Mode,
    /// What every arm was given that trained at all.
    pub size: Size,
    /// Estimators, by their [`Seeds::standing`] at equal steps; those without one last.
    pub estimators: Vec<Runs<'a>>,
    /// Controls, likewise.
    pub controls: Vec<Runs<'a>>,
}

/// One arm over its seeds.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    /// What was compared.
    pub arm: &'a Arm,
    /// With equal steps.
    pub steps: Seeds<'a>,
    /// With equal expert-FLOPs; none where that is the same, see [`Table::at_equal_flops`].
    pub flops: Seeds<'a>,
}

/// The cells of an arm that differ only by their seed.
#[derive(Clone, Debug, Default)]
pub struct Seeds<'a> {
    /// Those that came to their end with losses that are finite: seed and result. All figures are of these.
    pub sound: Vec<(u64, &'a CellResult)>,
    /// Cells in which something was not finite.
    pub diverged: usize,
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

/// Hard top-1 losses of two arms, seed by seed: the same data and the same start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Paired {
    /// Of this arm's loss minus the other's, in units of the best constant prediction.
    pub median: f64,
    /// Seeds in which this arm's is the lower one.
    pub better: usize,
    /// Seeds in which it is the higher one.
    pub worse: usize,
    /// Seeds that both have.
    pub seeds: usize,
}

/// The tables of all tasks and modes in which something is trained, in the order of the report.
pub fn tables(results: &Results) -> Vec<Table<'_>> {
    // The same arms at several rates are no rows of one table; see `rates`.
    let trained = TaskName::ALL.into_iter().filter(|task| !matches!(task, TaskName::Gradient | TaskName::Rates));
    let places = trained.flat_map(|task| [Mode::Scratch, Mode::Tune].map(|mode| (task, mode)));
    places.filter_map(|(task, mode)| table(results, task, mode)).collect()
}

fn table(results: &Results, task: TaskName, mode: Mode) -> Option<Table<'_>> {
    let cells = || results.cells.iter().filter(|cell| cell.spec.task == task && cell.spec.mode == mode && !cell.spec.is_teacher());
    let mut runs: Vec<Runs<'_>> = Vec::new();
    for cell in cells() {
        let at = runs.iter().position(|runs| runs.arm.name == cell.spec.arm.name).unwrap_or_else(|| {
            runs.push(Runs { arm: &cell.spec.arm, steps: Seeds::default(), flops: Seeds::default() });
            runs.len() - 1
        });
        match cell.spec.budget {
            Budget::Steps => runs[at].steps.take(cell),
            Budget::Flops => runs[at].flops.take(cell),
        }
    }
    runs.sort_by(|a, b| a.steps.standing().total_cmp(&b.steps.standing()));
    let size = cells().map(|cell| cell.spec.size).max_by_key(|size| size.steps)?;
    let (controls, estimators) = runs.into_iter().partition(|runs| runs.arm.route.is_control());
    Some(Table { task, mode, size, estimators, controls })
}

impl<'a> Seeds<'a> {
    fn take(&mut self, cell: &'a CellRecord) {
        match &cell.outcome {
            Outcome::Trained(result) if result.is_sound() => self.sound.push((cell.spec.seed, result)),
            Outcome::Trained(_) => self.diverged += 1,
            Outcome::Failed(_) => self.failed += 1,
            Outcome::Gradient(_) => {}
        }
    }

    /// Cells that there should be.
    pub fn planned(&self) -> usize {
        self.sound.len() + self.diverged + self.failed
    }

    /// A figure over the seeds. Those without it are left out.
    pub fn spread(&self, value: impl Fn(&CellResult) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.sound.iter().filter_map(|(_, result)| value(result)))
    }

    /// Hard top-1 loss in units of the best constant prediction.
    pub fn hard1(&self) -> Option<Spread> {
        self.spread(CellResult::hard1)
    }

    /// Hard top-1 loss by which arms are ordered: the median over all seeds that were planned, one that diverged or failed
    /// being worse than any other. A lucky seed of many does not make an arm the best.
    pub fn standing(&self) -> f64 {
        let mut losses: Vec<f64> = self.sound.iter().map(|(_, result)| result.hard1().unwrap_or(f64::INFINITY)).collect();
        losses.resize(self.planned(), f64::INFINITY);
        median(&losses).unwrap_or(f64::INFINITY)
    }

    /// Hard top-1 of these against those of another arm; `None` without a common seed.
    pub fn against(&self, other: &Seeds<'_>) -> Option<Paired> {
        let of_other = |seed: u64| other.sound.iter().find(|(of, _)| *of == seed).and_then(|(_, result)| result.hard1());
        let apart: Vec<f64> = self.sound.iter().filter_map(|(seed, result)| Some(result.hard1()? - of_other(*seed)?)).collect();
        let count = |is: fn(&f64) -> bool| apart.iter().filter(|apart| is(apart)).count();
        let median = median(&apart)?;
        Some(Paired { median, better: count(|apart| *apart < 0.0), worse: count(|apart| *apart > 0.0), seeds: apart.len() })
    }

    /// What has to be said where figures are of fewer seeds than were planned: `4 of 5 seeds: 1 diverged`.
    pub fn lost(&self) -> Option<String> {
        let why = [(self.diverged, "diverged"), (self.failed, "failed")].into_iter().filter(|(count, _)| *count > 0);
        let why: Vec<String> = why.map(|(count, what)| format!("{count} {what}")).collect();
        (!why.is_empty()).then(|| format!("{} of {} seeds: {}", self.sound.len(), self.planned(), why.join(", ")))
    }
}

impl Runs<'_> {
    /// Experts per token in training; `None` where the estimator has no k.
    pub fn k(&self, experts: usize) -> Option<usize> {
        EstimatorSpec::new(&self.arm.estimator, experts, 1, Purpose::Laboratory).ok()?.k()
    }

    /// Name of the arm, for pictures: with what has to be said of its seeds.
    pub fn label(&self) -> String {
        let Seeds { sound, .. } = &self.steps;
        match self.steps.planned() {
            planned if planned == sound.len() => self.arm.name.clone(),
            planned => format!("{} ({} of {planned} seeds)", self.arm.name, sound.len()),
        }
    }
}

impl CellResult {
    /// A loss in units of the best constant prediction.
    pub fn relative(&self, loss: Option<f64>) -> Option<f64> {
        loss.map(|loss| loss / self.trivial).filter(|ratio| ratio.is_finite())
    }

    /// Hard top-1 loss in units of the best constant prediction.
    pub fn hard1(&self) -> Option<f64> {
        self.relative(self.loss.hard1)
    }

    /// Whether training came to its end, with losses that are finite.
    pub fn is_sound(&self) -> bool {
        !self.diverged && self.loss.train.is_some() && self.loss.hard1.is_some()
    }
}

impl<'a> Table<'a> {
    /// Estimators, then controls.
    pub fn all(&self) -> impl Iterator<Item = &Runs<'a>> {
        self.estimators.iter().chain(&self.controls)
    }

    /// An arm at equal expert-FLOPs. Where equal steps are that, its runs of equal steps, of those seeds that others have at
    /// equal expert-FLOPs, so that they can be compared; `None` where no arm has any.
    pub fn at_equal_flops(&self, runs: &Runs<'a>) -> Option<Seeds<'a>> {
        if runs.flops.planned() > 0 {
            return Some(runs.flops.clone());
        }
        let seeds: Vec<u64> = self.all().flat_map(|other| &other.flops.sound).map(|(seed, _)| *seed).collect();
        let sound: Vec<_> = runs.steps.sound.iter().copied().filter(|(seed, _)| seeds.contains(seed)).collect();
        (!seeds.is_empty()).then_some(Seeds { sound, ..Seeds::default() })
    }

    /// The row of a name.
    pub fn find(&self, name: &str) -> Option<&Runs<'a>> {
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
        let values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
        let (low, high) = (values.iter().copied().reduce(f64::min)?, values.iter().copied().reduce(f64::max)?);
        Some(Self { median: median(&values)?, low, high, count: values.len() })
    }

    /// In two digits, for what is not known to more: times and memory.
    pub fn roughly(&self) -> String {
        self.in_words(rough)
    }

    fn in_words(&self, figure: fn(f64) -> String) -> String {
        match self.low == self.high {
            true => figure(self.median),
            false => format!("{} [{}..{}]", figure(self.median), figure(self.low), figure(self.high)),
        }
    }
}

impl Paired {
    /// Whether all seeds say the same.
    pub fn agrees(&self) -> bool {
        [self.better, self.worse, self.seeds - self.better - self.worse].contains(&self.seeds)
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.in_words(figure))
    }
}

/// `-0.780, 5 of 5`; slanted where seeds disagree on the sign.
impl fmt::Display for Paired {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.agrees() { "" } else { "*" };
        write!(f, "{mark}{}, {} of {}{mark}", figure(self.median), self.better, self.seeds)
    }
}

/// Three significant digits; a whole number as such.
pub fn figure(value: f64) -> String {
    digits(value, 3)
}

/// Two significant digits; a whole number as such.
pub fn rough(value: f64) -> String {
    digits(value, 2)
}

fn digits(value: f64, digits: i32) -> String {
    if value.fract() == 0.0 && value.abs() < 1e5 {
        return format!("{:.0}", value + 0.0);
    }
    if !(1e-3..1e5).contains(&value.abs()) {
        return format!("{value:.1e}");
    }
    // Rounded first: 0.9996 becomes 1.00, and 17132.4 becomes 17100.
    let last = digits - 1;
    let unit = 10f64.powi(value.abs().log10().floor() as i32 - last);
    let rounded = (value / unit).round() * unit;
    let decimals = (last - rounded.abs().log10().floor() as i32).clamp(0, 5) as usize;
    format!("{rounded:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        compare::{
            results::{By, ByRouting, Machine, RESULTS_VERSION},
            spec::{CellSpec, LAB_VERSION},
        },
        moe::estimator::EstimatorConfig,
    };

    #[test]
    fn figures_have_three_digits() {
        let shown = [-0.0, 0.001234, 0.12345, 1.0, 1.004, 12.34, 123.4, 0.9996, 99_999.0, 17_132.4, -0.5, 1e-5, 2.5e7].map(figure);
        assert_eq!([0.0999, 1.04, 12.34, 0.999, 17_132.4, -0.5].map(rough), ["0.10", "1.0", "12", "1.0", "17000", "-0.50"]);
        assert_eq!(shown, ["0", "0.00123", "0.123", "1", "1.00", "12.3", "123", "1.00", "99999", "17100", "-0.500", "1.0e-5", "2.5e7"]);
    }

    #[test]
    fn spreads() {
        let spread = |values: &[f64]| Spread::of(values.iter().copied()).map(|spread| spread.to_string());
        assert_eq!(spread(&[3.0, 1.0, 2.0]).unwrap(), "2 [1..3]");
        assert_eq!(spread(&[1.0, 2.0, 4.0, 3.0, f64::NAN]).unwrap(), "2.50 [1..4]");
        assert_eq!(spread(&[0.5]).unwrap(), "0.500");
        assert_eq!(Spread::of([1.23, 4.56, 8.0].into_iter()).unwrap().roughly(), "4.6 [1.2..8]");
        assert_eq!(spread(&[]), None);
    }

    /// A cell of `equal` with that hard top-1 loss; not finite: one that diverged; `None`: one that failed.
    fn cell(name: &str, seed: u64, loss: Option<f64>) -> CellRecord {
        let arm = Arm::new(name, EstimatorConfig { name: "ste".into(), k: Some(1), params: Default::default() });
        let size = Size { steps: 10, batch: 8, test: 8, points: 1, rate: 0.01 };
        let spec = CellSpec {
            lab: LAB_VERSION,
            task: TaskName::Equal,
            mode: Mode::Scratch,
            budget: Budget::Steps,
            arm,
            seed,
            size,
            teacher_size: None,
        };
        let trained = |loss: f64| {
            let loss = ByRouting { train: Some(1.0), hard1: super::super::results::finite(loss), hard2: None };
            Outcome::Trained(Box::new(CellResult { loss, trivial: 1.0, ..CellResult::default() }))
        };
        CellRecord::new(spec, By::default(), loss.map_or_else(|| Outcome::Failed("no".into()), trained))
    }

    fn results(arms: &[(&str, &[Option<f64>])]) -> Results {
        let cells = arms.iter().flat_map(|(name, losses)| (1..).zip(*losses).map(|(seed, loss)| cell(name, seed, *loss)));
        let machine = Machine { cpu: String::new(), cores: 1, jobs: 1, hardmax: String::new(), git: String::new() };
        let (version, lab, command) = (RESULTS_VERSION, LAB_VERSION, String::new());
        Results { version, lab, machine, command, seconds: 0.0, cells: cells.collect() }
    }

    #[test]
    fn lost_seeds_are_said_and_stand_last() {
        let nan = Some(f64::NAN);
        let results = results(&[
            ("steady", &[Some(0.5), Some(0.6), Some(0.7)]),
            ("lucky", &[None, nan, Some(0.1)]),
            ("mostly", &[nan, Some(0.2), Some(0.3)]),
            ("gone", &[None, None, None]),
        ]);
        let tables = tables(&results);
        let names: Vec<&str> = tables[0].estimators.iter().map(|runs| &*runs.arm.name).collect();
        assert_eq!(names, ["mostly", "steady", "lucky", "gone"], "0.3, 0.6, and no median");
        let runs = |name| tables[0].find(name).expect("a row");
        assert_eq!(runs("steady").steps.lost(), None);
        assert_eq!(runs("lucky").steps.lost().expect("two are lost"), "1 of 3 seeds: 1 diverged, 1 failed");
        assert_eq!(runs("mostly").steps.hard1().expect("two").median, 0.25, "figures are of those that are there");
        assert_eq!((runs("steady").label(), runs("gone").label()), ("steady".to_owned(), "gone (0 of 3 seeds)".to_owned()));
    }

    #[test]
    fn equal_expert_flops_are_compared_over_the_same_seeds() {
        let mut results = results(&[("dense", &[Some(0.5), Some(0.6), Some(0.7)]), ("sparse", &[Some(0.1), Some(0.2), Some(9.0)])]);
        let sparse = |results: &Results| {
            let tables = tables(results);
            tables[0].at_equal_flops(tables[0].find("sparse").expect("a row")).map(|seeds| seeds.hard1().expect("some").to_string())
        };
        assert_eq!(sparse(&results), None, "nothing to compare with");
        for (seed, loss) in [(1, 0.3), (2, 0.1)] {
            let mut cell = cell("dense", seed, Some(loss));
            cell.spec.budget = Budget::Flops;
            results.cells.push(cell);
        }
        assert_eq!(sparse(&results).expect("two seeds"), "0.150 [0.100..0.200]", "the third seed has no part in it");
        let tables = tables(&results);
        let at = |name| tables[0].at_equal_flops(tables[0].find(name).expect("a row")).expect("seeds");
        assert_eq!(at("dense").against(&at("sparse")).expect("two").to_string(), "*0.0500, 1 of 2*");
    }

    #[test]
    fn differences_are_seed_by_seed() {
        let results = results(&[
            ("base", &[Some(0.5), Some(1.0), Some(2.0), None]),
            ("better", &[Some(0.4), Some(0.5), Some(1.0), Some(9.0)]),
            ("mixed", &[Some(0.6), Some(0.5), None, Some(9.0)]),
            ("alone", &[None, None, None, Some(1.0)]),
        ]);
        let tables = tables(&results);
        let against = |name: &str| tables[0].find(name).expect("a row").steps.against(&tables[0].find("base").expect("a row").steps);
        assert_eq!(against("better").expect("three").to_string(), "-0.500, 3 of 3");
        assert_eq!(against("mixed").expect("two").to_string(), "*-0.200, 1 of 2*", "the sign is not the same");
        assert_eq!(against("base").expect("itself").to_string(), "0, 0 of 3");
        assert_eq!(against("alone"), None);
    }
}
