//! What the learning rate matters: the task `rates` is `equal` at several of them.
//!
//! Tables have one rate for all arms, so an arm could owe its place to that. Here every arm has the rates of
//! [`super::plan::RATES`]; the one with the lowest loss on validation rows is chosen, and what counts is its loss on test
//! rows, which had no part in the choice.

use super::{
    plan::{RATE, RATES},
    results::{CellResult, Outcome, Results},
    spec::TaskName,
    table::{Spread, figure},
};

/// One arm at all rates.
#[derive(Clone, Debug, PartialEq)]
pub struct Swept<'a> {
    /// Its name.
    pub arm: &'a str,
    /// Whether it is a control.
    pub control: bool,
    /// By rate, as in [`RATES`]; those without a finite loss, or at which a seed diverged, are not there.
    pub at: Vec<AtRate>,
}

/// One arm at one rate: hard top-1 losses over seeds, in units of the best constant prediction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AtRate {
    /// The learning rate.
    pub rate: f64,
    /// On rows to choose by.
    pub validation: Spread,
    /// On rows to report.
    pub test: Spread,
}

impl Swept<'_> {
    /// At the rate that validation rows choose.
    pub fn chosen(&self) -> Option<&AtRate> {
        self.at.iter().min_by(|a, b| a.validation.median.total_cmp(&b.validation.median))
    }

    /// At a rate.
    pub fn at(&self, rate: f64) -> Option<&AtRate> {
        self.at.iter().find(|at| at.rate == rate)
    }
}

/// Every arm of the task, the best of its chosen rates first.
pub fn swept(results: &Results) -> Vec<Swept<'_>> {
    let cells = || results.cells.iter().filter(|cell| cell.spec.task == TaskName::Rates);
    let mut arms: Vec<Swept<'_>> = Vec::new();
    for cell in cells() {
        let (arm, control) = (&*cell.spec.arm.name, cell.spec.arm.route.is_control());
        if arms.iter().any(|swept| swept.arm == arm) {
            continue;
        }
        let at = |rate: f64| {
            let of_rate = cells().filter(|cell| cell.spec.arm.name == arm && cell.spec.size.rate == rate);
            let trained: Vec<&CellResult> = of_rate
                .filter_map(|cell| match &cell.outcome {
                    Outcome::Trained(result) => Some(&**result),
                    _ => None,
                })
                .collect();
            // A rate at which a seed diverges is none to choose, however well the others do.
            if trained.iter().any(|result| result.diverged) {
                return None;
            }
            let spread =
                |value: fn(&CellResult) -> Option<f64>| Spread::of(trained.iter().filter_map(|result| result.relative(value(result))));
            Some(AtRate { rate, validation: spread(|result| result.validation)?, test: spread(|result| result.loss.hard1)? })
        };
        arms.push(Swept { arm, control, at: RATES.into_iter().filter_map(at).collect() });
    }
    let standing = |swept: &Swept<'_>| swept.chosen().map_or(f64::INFINITY, |at| at.test.median);
    arms.sort_by(|a, b| a.control.cmp(&b.control).then(standing(a).total_cmp(&standing(b))));
    arms
}

/// The section of the report, as Markdown; empty where the task was not run.
pub fn section(results: &Results) -> String {
    let arms = swept(results);
    if arms.is_empty() {
        return String::new();
    }
    let titles = RATES.map(|rate| format!("rate {rate}")).join(" | ");
    let rows: String = arms.iter().map(|swept| row(swept, &arms)).collect();
    format!(
        "## Learning rates\n\nTask `equal` at {} learning rates, hard top-1 on test rows. The chosen rate is the best on rows that are neither \
         trained on nor tested. Places are among estimators, at the rate of the tables ({RATE}) and at the chosen ones: where they differ much, \
         the place in the tables is that of the rate. A rate at which a seed diverged is not chosen. (end): the best may lie beyond the rates that \
         were tried.\n\n\
         | arm | {titles} | chosen | hard top-1 at the chosen | place at {RATE}, at the chosen |\n|---|{}---|---|---|\n{rows}\n",
        RATES.len(),
        "---|".repeat(RATES.len()),
    )
}

fn row(swept: &Swept<'_>, arms: &[Swept<'_>]) -> String {
    let dash = || "-".to_owned();
    let losses = RATES.map(|rate| swept.at(rate).map_or_else(dash, |at| figure(at.test.median))).join(" | ");
    let place = |of: &dyn Fn(&Swept<'_>) -> Option<f64>| {
        let own = of(swept).filter(|_| !swept.control)?;
        Some(1 + arms.iter().filter(|other| !other.control).filter_map(of).filter(|loss| *loss < own).count())
    };
    let places = [place(&|swept| Some(swept.at(RATE)?.test.median)), place(&|swept| Some(swept.chosen()?.test.median))];
    let places = places.map(|place| place.map_or_else(dash, |place| place.to_string())).join(", ");
    let chosen =
        swept.chosen().map_or_else(|| format!("{} | {}", dash(), dash()), |at| format!("{}{} | {}", at.rate, edge(at.rate), at.test));
    format!("| `{}` | {losses} | {chosen} | {places} |\n", swept.arm)
}

/// What has to be said of a choice beyond which nothing was tried: the best may lie there.
fn edge(rate: f64) -> &'static str {
    if [RATES.first(), RATES.last()].contains(&Some(&rate)) { " (end)" } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::{
        plan::{Request, plan},
        results::{By, ByRouting, CellRecord, Machine, RESULTS_VERSION},
        spec::{CellSpec, LAB_VERSION},
    };

    fn outcome(spec: &CellSpec) -> Outcome {
        let hard1 = match (&*spec.arm.name, spec.size.rate) {
            ("ste", 1e-2) => 0.3,
            ("ste", 3e-2) => 0.1,
            ("raw_topk", 1e-2) => 0.2,
            ("raw_topk", 1e-1) => 0.01,
            _ => 0.5,
        };
        // At the smallest rate of `ste` validation is wrong about the test; nobody may notice.
        let validation = if spec.arm.name == "ste" && spec.size.rate == 3e-3 { 0.05 } else { hard1 };
        let loss = ByRouting { hard1: Some(hard1), ..ByRouting::default() };
        // The lowest loss of all is one seed's, at a rate at which the other came to nothing.
        let diverged = hard1 == 0.01 && spec.seed == 2;
        Outcome::Trained(Box::new(CellResult { loss, validation: Some(validation), diverged, trivial: 1.0, ..CellResult::default() }))
    }

    fn results(arms: &[&str]) -> Results {
        let arms = arms.iter().map(|arm| (*arm).to_owned()).collect();
        let request = Request { arms, tasks: vec![TaskName::Rates], seeds: Some(2), steps_scale: 1.0, ..Request::default() };
        let cells = plan(&request).expect("sound").into_iter().map(|spec| CellRecord::new(spec.clone(), By::default(), outcome(&spec)));
        let machine = Machine { cpu: String::new(), cores: 1, jobs: 1, hardmax: String::new(), git: String::new() };
        let (version, lab, command) = (RESULTS_VERSION, LAB_VERSION, String::new());
        Results { version, lab, machine, command, seconds: 0.0, cells: cells.collect() }
    }

    #[test]
    fn validation_chooses_and_the_test_is_reported() {
        let results = results(&["ste", "raw_topk"]);
        let swept = swept(&results);
        assert_eq!(swept.iter().map(|swept| swept.arm).take(2).collect::<Vec<_>>(), ["raw_topk", "ste"]);
        let of = |arm: &str| swept.iter().find(|swept| swept.arm == arm).expect("a row");
        assert_eq!(of("ste").chosen().map(|at| (at.rate, at.test.median)), Some((3e-3, 0.5)));
        assert_eq!(of("raw_topk").chosen().map(|at| (at.rate, at.test.median, at.test.count)), Some((1e-2, 0.2, 2)));
        let section = section(&results);
        assert!(section.contains("| `raw_topk` | 0.500 | 0.200 | 0.500 | - | 0.01 | 0.200 | 1, 1 |"), "{section}");
        assert!(section.contains("| `ste` | 0.500 | 0.300 | 0.100 | 0.500 | 0.003 (end) | 0.500 | 2, 2 |"), "{section}");
        assert!(section.contains("| `frozen` |") && section.contains("| -, - |"), "controls have no place: {section}");
    }

    #[test]
    fn without_the_task_there_is_no_section() {
        assert_eq!(section(&Results { cells: Vec::new(), ..results(&["ste"]) }), "");
    }
}
