//! Which cells a run has: arms times tasks, modes, budgets and seeds, and what each is given.

use std::path::PathBuf;

use serde::Deserialize;

use super::{
    arm::{Arm, Route},
    arms::{arms, controls},
    spec::{Budget, CellSpec, LAB_VERSION, Mode, Size, TaskName},
};
use crate::{
    error::{Error, Result},
    moe::estimator::Expected,
};

/// What a run is asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// Arms by their names, or by the names of their estimators; empty: all. Controls run in any case.
    pub arms: Vec<String>,
    /// Empty: all.
    pub tasks: Vec<TaskName>,
    /// Empty: both.
    pub modes: Vec<Mode>,
    /// Seeds of every arm; `None`: what the task has by default.
    pub seeds: Option<u64>,
    /// Factor on all steps, above 0.
    pub steps_scale: f64,
    /// One seed and few steps.
    pub quick: bool,
    /// Arms to compare instead of the built-in ones.
    pub own_arms: Option<Vec<Arm>>,
}

/// Arms of one's own, a TOML file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArmsFile {
    /// The arms.
    pub arm: Vec<Arm>,
}

/// What a task is given by default.
struct Allowance {
    /// Of a run from scratch.
    size: Size,
    /// Its steps with `--quick`.
    quick_steps: usize,
    seeds: u64,
    /// Seeds at equal expert-FLOPs; 0: no such cells.
    flops_seeds: u64,
    /// Seconds of a step at one expert per token, and more for every expert executed; measured on one core, for the order
    /// of cells and the estimate of what is left.
    step_seconds: [f64; 2],
}

/// Points of the curves.
const POINTS: usize = 40;
/// Steps of tuning over those from scratch.
const TUNING_STEPS: f64 = 1.0 / 3.0;

fn allowance(task: TaskName) -> Allowance {
    let size = |steps, batch, test, rate| Size { steps, batch, test, points: POINTS, rate };
    match task {
        TaskName::Equal => {
            Allowance { size: size(3000, 256, 4096, 1e-2), quick_steps: 300, seeds: 5, flops_seeds: 3, step_seconds: [2e-4, 4e-5] }
        }
        TaskName::Unequal => Allowance { flops_seeds: 3, ..allowance(TaskName::Equal) },
        TaskName::Collapsed => Allowance { flops_seeds: 0, ..allowance(TaskName::Equal) },
        TaskName::Digits => {
            Allowance { size: size(1500, 128, 0, 3e-3), quick_steps: 100, seeds: 3, flops_seeds: 3, step_seconds: [4e-4, 2e-4] }
        }
        TaskName::Text => Allowance {
            size: Size { points: 10, ..size(300, 8, 64, 3e-3) },
            quick_steps: 15,
            seeds: 3,
            flops_seeds: 2,
            step_seconds: [1.2e-2, 3e-3],
        },
        TaskName::Gradient => Allowance {
            size: Size { points: 0, ..size(1, 2000, 100, 0.0) },
            quick_steps: 1,
            seeds: 1,
            flops_seeds: 0,
            step_seconds: [0.5, 0.2],
        },
    }
}

/// All cells of a run, in the order of the report: tasks, modes, arms, budgets, seeds. Teachers come before what is tuned.
///
/// # Errors
/// [`Error::InvalidArgument`] on a name that is not there and on every setting that an arm cannot have.
pub fn plan(request: &Request) -> Result<Vec<CellSpec>> {
    if !(request.steps_scale.is_finite() && request.steps_scale > 0.0) {
        return Err(Error::invalid("--steps-scale", "must be above 0"));
    }
    if request.seeds == Some(0) {
        return Err(Error::invalid("--seeds", "must be at least 1"));
    }
    check_names(request)?;
    let mut cells = Vec::new();
    for task in TaskName::ALL.into_iter().filter(|task| request.tasks.is_empty() || request.tasks.contains(task)) {
        for mode in task.modes().iter().filter(|mode| request.modes.is_empty() || request.modes.contains(mode)) {
            for arm in chosen_arms(request, task, *mode) {
                cells.extend(cells_of_arm(request, task, *mode, &arm)?);
            }
        }
    }
    let teachers: Vec<CellSpec> = cells.iter().filter_map(CellSpec::teacher).collect();
    for teacher in teachers {
        if !cells.contains(&teacher) {
            let first = cells.iter().position(|cell| cell.task == teacher.task).unwrap_or(0);
            cells.insert(first, teacher);
        }
    }
    match cells.is_empty() {
        true => Err(Error::invalid("--tasks", "none of them is run in these modes")),
        false => Ok(cells),
    }
}

fn chosen_arms(request: &Request, task: TaskName, mode: Mode) -> Vec<Arm> {
    let wanted = |arm: &Arm| {
        let named = |name: &String| *name == arm.name || (!arm.route.is_control() && *name == arm.estimator.name);
        request.arms.is_empty() || arm.route.is_control() || request.arms.iter().any(named)
    };
    let all = match &request.own_arms {
        Some(own) if task == TaskName::Gradient => own.clone(),
        Some(own) => own.iter().cloned().chain(controls(mode)).collect(),
        None => arms(task, mode),
    };
    all.into_iter().filter(wanted).collect()
}

fn check_names(request: &Request) -> Result<()> {
    let all: Vec<Arm> =
        TaskName::ALL.iter().flat_map(|task| task.modes().iter().flat_map(|mode| chosen_from(request, *task, *mode))).collect();
    for name in &request.arms {
        if !all.iter().any(|arm| arm.name == *name || arm.estimator.name == *name) {
            return Err(Error::invalid("--arms", format!("'{name}' is unknown; `hardmax compare --list` has all names")));
        }
    }
    if let Some(own) = &request.own_arms {
        for (i, arm) in own.iter().enumerate() {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_+.".contains(c);
            if arm.name.is_empty() || !arm.name.chars().all(plain) {
                return Err(Error::invalid(format!("arm[{i}].name"), "lower case letters, digits, _, + and . only"));
            }
            let taken = own[..i].iter().any(|other| other.name == arm.name) || controls(Mode::Tune).iter().any(|c| c.name == arm.name);
            if taken || arm.name == Arm::teacher().name {
                return Err(Error::invalid(format!("arm[{i}].name"), format!("'{}' is taken", arm.name)));
            }
        }
    }
    Ok(())
}

fn chosen_from(request: &Request, task: TaskName, mode: Mode) -> Vec<Arm> {
    chosen_arms(&Request { arms: Vec::new(), ..request.clone() }, task, mode)
}

fn cells_of_arm(request: &Request, task: TaskName, mode: Mode, arm: &Arm) -> Result<Vec<CellSpec>> {
    let allowance = allowance(task);
    let scratch = scaled(&allowance, request, 1.0);
    let mut size = if mode == Mode::Tune { scaled(&allowance, request, TUNING_STEPS) } else { scratch };
    let of_arm = |error: Error| match error {
        Error::InvalidArgument { field, message } => Error::invalid(format!("{}.{field}", arm.name), message),
        other => other,
    };
    let checked = arm.check(task.experts(), size.steps).map_err(of_arm)?;
    if arm.route == Route::Untouched {
        size.steps = 0;
    }
    let cell = |budget, seed| CellSpec {
        lab: LAB_VERSION,
        task,
        mode,
        budget,
        arm: arm.clone(),
        seed,
        size,
        teacher_size: (mode == Mode::Tune).then_some(scratch),
    };
    let seeds = |default: u64| request.seeds.unwrap_or(if request.quick { 1 } else { default });
    let mut cells: Vec<CellSpec> = (1..=seeds(allowance.seeds)).map(|seed| cell(Budget::Steps, seed)).collect();
    let estimator = checked.estimator.at(0, size.steps);
    let sparse = estimator.executed_per_token(task.experts()) == Expected::Exactly(1) && !matches!(arm.route, Route::ExpertsAfter { .. });
    if mode == Mode::Scratch && allowance.flops_seeds > 0 && !sparse {
        cells.extend((1..=seeds(allowance.flops_seeds)).map(|seed| cell(Budget::Flops, seed)));
    }
    Ok(cells)
}

fn scaled(allowance: &Allowance, request: &Request, share: f64) -> Size {
    let steps = if request.quick { allowance.quick_steps } else { allowance.size.steps };
    let steps = ((steps as f64 * share * request.steps_scale).round() as usize).max(1);
    // Tasks that train nothing have draws instead of steps.
    let batch = if allowance.size.rate == 0.0 && request.quick { allowance.size.batch / 10 } else { allowance.size.batch };
    Size { steps, batch, ..allowance.size }
}

impl CellSpec {
    /// Roughly how long it takes, in seconds of one core: for the order of cells and the estimate of what is left.
    pub fn estimated_seconds(&self) -> f64 {
        let allowance = allowance(self.task);
        let Ok(checked) = self.arm.check(self.task.experts(), self.size.steps.max(1)) else { return 0.0 };
        let estimator = checked.estimator.at(0, self.size.steps);
        let executed = match estimator.executed_per_token(self.task.experts()) {
            Expected::Exactly(n) | Expected::AtMost(n) => n as f64,
            // Adding up the parameters of a decoder's experts, token by token, is memory traffic.
            Expected::Merged if self.task == TaskName::Text => 10.0 * self.task.experts() as f64,
            Expected::Merged => self.task.experts() as f64,
        };
        let steps = match self.budget {
            Budget::Steps => self.size.steps as f64,
            Budget::Flops => self.size.steps as f64 / executed.max(1.0),
        };
        0.05 + steps * (allowance.step_seconds[0] * estimator.copies() as f64 + allowance.step_seconds[1] * executed)
    }
}

/// Where a run puts its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder(pub PathBuf);

impl Folder {
    /// One file for each cell.
    pub fn cells(&self) -> PathBuf {
        self.0.join("cells")
    }

    /// Pictures.
    pub fn plots(&self) -> PathBuf {
        self.0.join("plots")
    }

    /// The plan, before anything has run.
    pub fn plan(&self) -> PathBuf {
        self.0.join("plan.json")
    }

    /// What was measured.
    pub fn results(&self) -> PathBuf {
        self.0.join("results.json")
    }

    /// For people.
    pub fn report(&self) -> PathBuf {
        self.0.join("report.md")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn request() -> Request {
        Request { steps_scale: 1.0, ..Request::default() }
    }

    #[test]
    fn cells_are_unique_and_tuning_has_its_teacher() {
        let cells = plan(&request()).expect("the defaults are sound");
        let ids: HashSet<String> = cells.iter().map(|cell| cell.id().expect("JSON")).collect();
        assert_eq!(ids.len(), cells.len());
        for (i, cell) in cells.iter().enumerate() {
            if let Some(teacher) = cell.teacher() {
                let at = cells.iter().position(|other| *other == teacher).expect("the teacher is a cell");
                assert!(at < i && teacher.is_teacher() && teacher.seed == cell.seed);
            }
        }
    }

    #[test]
    fn dense_arms_run_at_equal_expert_flops_too_and_sparse_ones_do_not() {
        let cells = plan(&Request { tasks: vec![TaskName::Equal], modes: vec![Mode::Scratch], ..request() }).expect("sound");
        let has = |arm: &str| cells.iter().any(|cell| cell.arm.name == arm && cell.budget == Budget::Flops);
        assert!(has("ste") && has("renorm_topk_k2") && has("entmax") && has("smear") && has("experts_only"));
        assert!(!has("raw_topk") && !has("default_moe") && !has("oracle"));
    }

    #[test]
    fn a_choice_of_arms_keeps_the_controls() {
        let cells = plan(&Request { arms: vec!["ste".into()], tasks: vec![TaskName::Collapsed], ..request() }).expect("sound");
        let names: HashSet<&str> = cells.iter().map(|cell| cell.arm.name.as_str()).collect();
        assert!(["ste", "ste+switch", "frozen", "hash", "oracle", "experts_only"].iter().all(|name| names.contains(name)));
        assert!(!names.contains("soft"));
    }

    #[test]
    fn what_is_asked_wrongly_is_named() {
        for (request, message) in [
            (Request { arms: vec!["stee".into()], ..request() }, "--arms: 'stee' is unknown"),
            (Request { seeds: Some(0), ..request() }, "--seeds: must be at least 1"),
            (Request { steps_scale: 0.0, ..request() }, "--steps-scale: must be above 0"),
            (Request { steps_scale: f64::NAN, ..request() }, "--steps-scale: must be above 0"),
            (Request { tasks: vec![TaskName::Unequal], modes: vec![Mode::Tune], ..request() }, "--tasks: none of them is run"),
        ] {
            let error = plan(&request).expect_err(message).to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }

    #[test]
    fn arms_of_ones_own_are_checked() {
        for (text, message) in [
            ("[[arm]]\nname = 'x'\nestimator = { name = 'stee' }", "x.routing.estimator: 'stee' is unknown; did you mean ste?"),
            ("[[arm]]\nname = 'x'\nestimator = { name = 'soft', params = { temperature = 0.0 } }", "x.routing.temperature: 0 is no value"),
            ("[[arm]]\nname = 'x'\nestimator = { name = 'ste', k = 9 }", "x.routing.k: 9 is more than the 8 experts"),
            ("[[arm]]\nname = 'x'\nestimator = { name = 'ste' }\nlosses = { swich = 0.1 }", "x.losses.swich: is unknown"),
            ("[[arm]]\nname = 'x'\nestimator = { name = 'ste' }\nlosses = { switch = -0.1 }", "x.losses.switch: must not be negative"),
            ("[[arm]]\nname = 'x'\nestimator = { name = 'soft' }\nbias_rate = 0.1", "x.estimator: does not choose"),
            ("[[arm]]\nname = 'oracle'\nestimator = { name = 'soft' }", "arm[0].name: 'oracle' is taken"),
            ("[[arm]]\nname = 'A'\nestimator = { name = 'soft' }", "arm[0].name: lower case"),
        ] {
            let file: ArmsFile = toml::from_str(text).expect(text);
            let error = plan(&Request { own_arms: Some(file.arm), ..request() }).expect_err(message).to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }

    #[test]
    fn quick_is_short() {
        let quick = plan(&Request { quick: true, ..request() }).expect("sound");
        let seconds: f64 = quick.iter().map(CellSpec::estimated_seconds).sum();
        assert!(seconds < 240.0, "{seconds} s of one core");
    }
}
