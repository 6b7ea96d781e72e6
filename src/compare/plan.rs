//! Which cells a run has: arms times tasks, modes, budgets and seeds, and what each is given.

use std::path::PathBuf;

use serde::Deserialize;

use super::{
    arm::{Arm, Route},
    arms::{arms, controls, left_out},
    cost,
    spec::{Budget, CellSpec, LAB_VERSION, Mode, Size, TaskName},
};
use crate::{
    error::{Error, Result},
    moe::estimator::{Expected, distance},
    train::routing::RoutingPlan,
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

/// Most letters of an arm's name: it is a part of the names of files, which systems limit.
const LONGEST_NAME: usize = 64;
/// Most seeds of an arm: with all tasks it is a day's work, and more says nothing new.
const MAX_SEEDS: u64 = 100;
/// Learning rate of the synthetic tasks.
pub const RATE: f64 = 1e-2;
/// Learning rates of the task `rates`.
pub const RATES: [f64; 4] = [3e-3, RATE, 3e-2, 1e-1];
/// Points of the curves.
const POINTS: usize = 20;
/// Steps of tuning over those from scratch.
const TUNING_STEPS: f64 = 1.0 / 3.0;

fn allowance(task: TaskName) -> Allowance {
    let size = |steps, batch, test, rate| Size { steps, batch, test, points: POINTS, rate };
    match task {
        TaskName::Equal => {
            Allowance { size: size(3000, 256, 4096, RATE), quick_steps: 300, seeds: 5, flops_seeds: 3, step_seconds: [2e-4, 4e-5] }
        }
        TaskName::Unequal | TaskName::Collapsed => allowance(TaskName::Equal),
        TaskName::Rates => Allowance { quick_steps: 100, seeds: 2, flops_seeds: 0, ..allowance(TaskName::Equal) },
        TaskName::Digits => {
            Allowance { size: size(1500, 128, 0, 3e-3), quick_steps: 100, seeds: 3, flops_seeds: 3, step_seconds: [4e-4, 2e-4] }
        }
        TaskName::Text => Allowance {
            size: Size { points: 8, ..size(300, 8, 64, 3e-3) },
            quick_steps: 15,
            seeds: 3,
            flops_seeds: 3,
            step_seconds: [1.2e-2, 3e-3],
        },
        TaskName::Gradient => Allowance {
            // Schedules stand half-way.
            size: Size { points: 0, ..size(2, 2000, 100, 0.0) },
            quick_steps: 2,
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
    if request.seeds.is_some_and(|seeds| !(1..=MAX_SEEDS).contains(&seeds)) {
        return Err(Error::invalid("--seeds", format!("must be at least 1 and at most {MAX_SEEDS}")));
    }
    let places = places(request);
    check_own_arms(request)?;
    check_choice(request, &places)?;
    let mut cells = Vec::new();
    for (task, mode) in places {
        for arm in chosen_arms(request, task, mode) {
            cells.extend(cells_of_arm(request, task, mode, &arm)?);
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

/// Tasks and modes that are asked for, in the order of the report.
fn places(request: &Request) -> Vec<(TaskName, Mode)> {
    let asked = |(task, mode): &(TaskName, Mode)| {
        (request.tasks.is_empty() || request.tasks.contains(task)) && (request.modes.is_empty() || request.modes.contains(mode))
    };
    everywhere().filter(asked).collect()
}

fn everywhere() -> impl Iterator<Item = (TaskName, Mode)> {
    TaskName::ALL.into_iter().flat_map(|task| task.modes().iter().map(move |mode| (task, *mode)))
}

/// Every arm of a place.
fn all_arms(request: &Request, task: TaskName, mode: Mode) -> Vec<Arm> {
    match &request.own_arms {
        Some(own) if task == TaskName::Gradient => own.clone(),
        Some(own) => own.iter().cloned().chain(controls(mode)).collect(),
        None => arms(task, mode),
    }
}

fn chosen_arms(request: &Request, task: TaskName, mode: Mode) -> Vec<Arm> {
    let chosen = |arm: &Arm| request.arms.is_empty() || arm.route.is_control() || request.arms.iter().any(|name| is_named(arm, name));
    all_arms(request, task, mode).into_iter().filter(chosen).collect()
}

fn is_named(arm: &Arm, name: &str) -> bool {
    name == arm.name || (!arm.route.is_control() && name == arm.estimator.name)
}

/// Every name of `--arms` must be that of something which is going to run.
fn check_choice(request: &Request, places: &[(TaskName, Mode)]) -> Result<()> {
    let has = |(task, mode): (TaskName, Mode), name: &str| all_arms(request, task, mode).iter().any(|arm| is_named(arm, name));
    for name in &request.arms {
        if places.iter().any(|place| has(*place, name)) {
            continue;
        }
        let elsewhere: Vec<String> =
            everywhere().filter(|place| has(*place, name)).map(|(task, mode)| format!("{}, {}", task.id(), mode.id())).collect();
        let reason = places.iter().find_map(|(task, _)| left_out(*task).iter().find(|(estimator, _)| estimator == name));
        let message = match (reason, elsewhere.as_slice()) {
            (Some((_, reason)), _) => format!("'{name}' has no place in what is asked for: {reason}"),
            (None, []) => format!("'{name}' is unknown; {}`hardmax compare --list` has all names", near_misses(request, name)),
            (None, elsewhere) => format!("'{name}' is not compared in what is asked for, but in: {}", elsewhere.join("; ")),
        };
        return Err(Error::invalid("--arms", message));
    }
    Ok(())
}

/// `did you mean a, b or c? `, the nearest first; empty where nothing is near.
fn near_misses(request: &Request, name: &str) -> String {
    let mut names: Vec<(usize, String)> = everywhere()
        .flat_map(|(task, mode)| all_arms(request, task, mode))
        .map(|arm| (distance(name, &arm.name), arm.name))
        .filter(|(distance, other)| *distance <= 2.max(other.len() / 3))
        .collect();
    names.sort();
    names.dedup();
    let names: Vec<String> = names.into_iter().take(3).map(|(_, name)| name).collect();
    if names.is_empty() { String::new() } else { format!("did you mean {}? ", names.join(" or ")) }
}

fn check_own_arms(request: &Request) -> Result<()> {
    let own = request.own_arms.as_deref().unwrap_or(&[]);
    for (i, arm) in own.iter().enumerate() {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_+.".contains(c);
        if arm.name.is_empty() || !arm.name.chars().all(plain) {
            return Err(Error::invalid(format!("arm[{i}].name"), "lower case letters, digits, _, + and . only"));
        }
        if arm.name.len() > LONGEST_NAME {
            return Err(Error::invalid(
                format!("arm[{i}].name"),
                format!("at most {LONGEST_NAME} letters, since files are named after it"),
            ));
        }
        let taken = own[..i].iter().any(|other| other.name == arm.name) || controls(Mode::Tune).iter().any(|c| c.name == arm.name);
        if taken || arm.name == Arm::teacher().name {
            return Err(Error::invalid(format!("arm[{i}].name"), format!("'{}' is taken", arm.name)));
        }
    }
    Ok(())
}

fn cells_of_arm(request: &Request, task: TaskName, mode: Mode, arm: &Arm) -> Result<Vec<CellSpec>> {
    let allowance = allowance(task);
    let scratch = scaled(&allowance, request, 1.0);
    let mut size = if mode == Mode::Tune { scaled(&allowance, request, TUNING_STEPS) } else { scratch };
    let of_arm = |error: Error| match error {
        Error::InvalidArgument { field, message } => Error::invalid(format!("{}.{field}", arm.name), message),
        other => other,
    };
    if let Some((name, reason)) = left_out(task).iter().find(|(name, _)| *name == arm.estimator.name) {
        let message = format!("{name} has no place in the task {}: {reason}; name the other tasks with --tasks", task.id());
        return Err(Error::invalid(format!("{}.estimator", arm.name), message));
    }
    let checked = arm.check(task.experts(), size.steps, mode).map_err(of_arm)?;
    if arm.route == Route::Untouched {
        size.steps = 0;
    }
    let cell = |budget, size, seed| CellSpec {
        lab: LAB_VERSION,
        task,
        mode,
        budget,
        arm: arm.clone(),
        seed,
        size,
        teacher_size: (mode == Mode::Tune).then_some(scratch),
    };
    let seeds = |default: u64| 1..=request.seeds.unwrap_or(if request.quick { default.min(1) } else { default });
    let rates = if task == TaskName::Rates { RATES.to_vec() } else { vec![size.rate] };
    let at_rate = |rate| seeds(allowance.seeds).map(move |seed| (Size { rate, ..size }, seed));
    let mut cells: Vec<CellSpec> = rates.into_iter().flat_map(at_rate).map(|(size, seed)| cell(Budget::Steps, size, seed)).collect();
    // What quick is for, these cells of tuning have no part in that those from scratch have not.
    let flops_seeds = if request.quick && mode == Mode::Tune { 0 } else { allowance.flops_seeds };
    if flops_seeds > 0 && size.steps > 0 && !is_sparse(arm, &checked, task) {
        cells.extend(seeds(flops_seeds).map(|seed| cell(Budget::Flops, size, seed)));
    }
    Ok(cells)
}

/// Whether a step costs what it does with one expert, so that equal steps are equal expert-FLOPs.
fn is_sparse(arm: &Arm, plan: &RoutingPlan, task: TaskName) -> bool {
    let one = plan.estimator(0).executed_per_token(task.experts()) == Expected::Exactly(1);
    let prepared = matches!(arm.route, Route::ExpertsAfter { share } if share > 0.0);
    // A decoder's routers are known only by running it; that of the small net by itself.
    let teacher = arm.distill > 0.0 || (task == TaskName::Text && arm.follows_router());
    one && !prepared && !teacher
}

fn scaled(allowance: &Allowance, request: &Request, share: f64) -> Size {
    // Tasks that train nothing have draws instead of steps.
    if allowance.size.rate == 0.0 {
        return Size { batch: allowance.size.batch / if request.quick { 10 } else { 1 }, ..allowance.size };
    }
    let steps = if request.quick { allowance.quick_steps } else { allowance.size.steps };
    let steps = ((steps as f64 * share * request.steps_scale).round() as usize).max(1);
    Size { steps, ..allowance.size }
}

impl CellSpec {
    /// Roughly how long it takes, in seconds of one core: for the order of cells and the estimate of what is left.
    pub fn estimated_seconds(&self) -> f64 {
        let allowance = allowance(self.task);
        let Ok(checked) = self.arm.check(self.task.experts(), self.size.steps.max(1), self.mode) else { return 0.0 };
        let estimator = checked.estimator(0);
        let executed = match estimator.executed_per_token(self.task.experts()) {
            Expected::Exactly(n) | Expected::AtMost(n) => n as f64,
            // Adding up the parameters of a decoder's experts, token by token, is memory traffic.
            Expected::Merged if self.task == TaskName::Text => 10.0 * self.task.experts() as f64,
            Expected::Merged => self.task.experts() as f64,
        };
        let steps = match self.budget {
            Budget::Steps => self.size.steps as f64,
            Budget::Flops => self.size.steps as f64 / cost::estimated(self.task, &estimator).max(1.0),
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

    /// Who writes here holds its lock.
    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
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
    fn equal_expert_flops_have_seeds_enough_to_be_compared() {
        let cells = plan(&request()).expect("sound");
        for (task, mode) in everywhere().filter(|(task, _)| !matches!(task, TaskName::Rates | TaskName::Gradient)) {
            let seeds = |budget| {
                let of = cells.iter().filter(|cell| (cell.task, cell.mode, cell.budget) == (task, mode, budget) && cell.arm.name == "soft");
                of.map(|cell| cell.seed).collect::<Vec<_>>()
            };
            assert_eq!(seeds(Budget::Flops), [1, 2, 3], "{} {}", task.id(), mode.id());
            assert!(seeds(Budget::Steps).starts_with(&[1, 2, 3]), "the same ones, so that they can be paired");
        }
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
            (Request { arms: vec!["stee".into()], ..request() }, "--arms: 'stee' is unknown; did you mean ste or steep"),
            (Request { arms: vec!["ste".into(), "zzz".into()], ..request() }, "--arms: 'zzz' is unknown; `hardmax compare --list`"),
            (
                Request { arms: vec!["steep_0.3".into()], tasks: vec![TaskName::Digits], ..request() },
                "--arms: 'steep_0.3' is not compared in what is asked for, but in: equal, scratch",
            ),
            (
                Request { arms: vec!["dselect_k".into()], tasks: vec![TaskName::Gradient], ..request() },
                "--arms: 'dselect_k' has no place in what is asked for: its router has no output for each expert",
            ),
            (Request { seeds: Some(0), ..request() }, "--seeds: must be at least 1 and at most 100"),
            (Request { seeds: Some(u64::MAX), ..request() }, "--seeds: must be at least 1 and at most 100"),
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
        let long = format!("[[arm]]\nname = '{}'\nestimator = {{ name = 'soft' }}", "x".repeat(65));
        for (text, message) in [
            ("[[arm]]\nname = 'x'\nestimator = { name = 'stee' }", "x.routing.estimator: 'stee' is unknown; did you mean ste?"),
            ("[[arm]]\nname = 'x'\nestimator = { name = 'soft', params = { temperature = 0.0 } }", "x.routing.temperature: 0 is no value"),
            ("[[arm]]\nname = 'x'\nestimator = { name = 'ste', k = 9 }", "x.routing.k: 9 is more than the 8 experts"),
            ("[[arm]]\nname = 'x'\nestimator = { name = 'ste' }\nlosses = { swich = 0.1 }", "x.losses.swich: is unknown"),
            ("[[arm]]\nname = 'x'\nestimator = { name = 'ste' }\nlosses = { switch = -0.1 }", "x.losses.switch: must not be negative"),
            (
                "[[arm]]\nname = 'x'\nestimator = { name = 'soft' }\nlosses = { top_k = 0.1 }",
                "x.losses.top_k: counts the chosen experts, and soft",
            ),
            ("[[arm]]\nname = 'x'\nestimator = { name = 'dselect_k' }\nlosses = { switch = 0.1 }", "x.losses.switch: is a loss on a logit"),
            ("[[arm]]\nname = 'x'\nestimator = { name = 'reinmax' }\nbias_rate = 0.1", "x.bias_rate: reinmax draws its experts"),
            (
                "[[arm]]\nname = 'x'\nestimator = { name = 'reinforce' }\nexplore = { epsilon = 0.1 }",
                "x.explore.epsilon: reinforce draws its experts",
            ),
            ("[[arm]]\nname = 'x'\nestimator = { name = 'soft' }\nbias_rate = 0.1", "x.bias_rate: needs an estimator that chooses"),
            (
                "[[arm]]\nname = 'x'\nestimator = { name = 'dselect_k' }",
                "x.estimator: dselect_k has no place in the task collapsed: its router",
            ),
            ("[[arm]]\nname = 'x'\nestimator = { name = 'ste' }\nlosses = { router_kl = 0.1 }", "x.losses.router_kl: needs a teacher"),
            ("[[arm]]\nname = 'oracle'\nestimator = { name = 'soft' }", "arm[0].name: 'oracle' is taken"),
            ("[[arm]]\nname = 'A'\nestimator = { name = 'soft' }", "arm[0].name: lower case"),
            (&long, "arm[0].name: at most 64 letters"),
        ] {
            let file: ArmsFile = toml::from_str(text).expect(text);
            let error = plan(&Request { own_arms: Some(file.arm), ..request() }).expect_err(message).to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }

    /// What would panic, or be measured as if it had been done.
    #[test]
    fn settings_without_an_effect_are_refused() {
        let other_outputs = "x.route: a router with one logit for each expert takes part, and";
        let no_router = "x.route: a control has no learning router";
        for (mode, lines, message) in [
            (Mode::Scratch, "estimator = { name = 'noisy_topk' }\nroute = { experts_after = { share = 0.5 } }", other_outputs),
            (Mode::Tune, "estimator = { name = 'noisy_topk' }\nroute = 'oracle'", other_outputs),
            (Mode::Scratch, "estimator = { name = 'dselect_k' }\nroute = 'hash'", other_outputs),
            (Mode::Scratch, "estimator = { name = 'ste' }\njitter = 1.5", "x.jitter: must be at least 0 and below 1"),
            (Mode::Scratch, "estimator = { name = 'ste' }\njitter = -0.5", "x.jitter: init and final must be finite and not negative"),
            (Mode::Scratch, "estimator = { name = 'ste' }\nexplore = { dropout = 1.0 }", "x.explore.dropout: must be at least 0"),
            (
                Mode::Scratch,
                "estimator = { name = 'dselect_k' }\nexplore = { dropout = 0.1 }",
                "x.explore.dropout: the weights of dselect_k",
            ),
            (Mode::Scratch, "estimator = { name = 'noisy_topk' }\nremedies = ['reinit']", "x.remedies: 'reinit' needs routers"),
            (
                Mode::Scratch,
                "estimator = { name = 'ste' }\nlosses = { switch = 0.0 }\nremedies = ['raise_balance']",
                "x.remedies: 'raise_balance' needs a balance loss with a weight above 0",
            ),
            (
                Mode::Scratch,
                "estimator = { name = 'ste' }\nlosses = { switch = 0.1 }\nremedies = ['raise_balance']",
                "x.remedies: 'raise_balance' has no effect",
            ),
            (Mode::Scratch, "estimator = { name = 'ste' }\ndistill = 1.0", "x.distill: needs a teacher"),
            (Mode::Tune, "estimator = { name = 'ste' }\ndistill = 1.0\nroute = 'untouched'", "x.distill: needs a teacher"),
            (Mode::Tune, "estimator = { name = 'ste' }\ndistill = -1.0", "x.distill: must be at least 0"),
            (Mode::Scratch, "estimator = { name = 'ste' }\nroute = 'frozen'\nlosses = { switch = 0.1 }", no_router),
            (Mode::Scratch, "estimator = { name = 'ste' }\nroute = 'hash'\njitter = 0.1", no_router),
            (Mode::Scratch, "estimator = { name = 'ste' }\nroute = 'frozen'\nbias_rate = 0.1", no_router),
        ] {
            let file: ArmsFile = toml::from_str(&format!("[[arm]]\nname = 'x'\n{lines}")).expect(lines);
            let (tasks, modes) = (vec![TaskName::Equal], vec![mode]);
            let error = plan(&Request { own_arms: Some(file.arm), tasks, modes, ..request() }).expect_err(lines).to_string();
            assert!(error.starts_with(message), "{lines}: {error}");
        }
        for lines in ["estimator = { name = 'noisy_topk' }\nroute = 'frozen'", "estimator = { name = 'soft' }\nremedies = ['reinit']"] {
            let file: ArmsFile = toml::from_str(&format!("[[arm]]\nname = 'x'\n{lines}")).expect(lines);
            plan(&Request { own_arms: Some(file.arm), tasks: vec![TaskName::Equal], ..request() }).expect(lines);
        }
    }

    /// By the estimates that order cells, which are of one machine: it tells that somebody made the plan much longer, and
    /// not how long it takes. That is measured where the whole plan runs.
    #[test]
    fn plans_are_estimated_to_take_minutes() {
        let seconds =
            |quick| -> f64 { plan(&Request { quick, ..request() }).expect("sound").iter().map(CellSpec::estimated_seconds).sum() };
        assert!(seconds(true) < 240.0, "{} s of one core", seconds(true));
        assert!(seconds(false) < 60.0 * 60.0, "{} s of one core", seconds(false));
    }
}
