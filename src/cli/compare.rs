//! `hardmax compare`: every estimator on small tasks, side by side.

use std::{fs, io::Read as _, num::NonZeroUsize, path::PathBuf, thread};

use crate::{
    compare::{
        cell, compare, list,
        plan::{ArmsFile, Folder, Request},
        results::{Outcome, Results},
        run::Run,
        spec::{CellSpec, Mode, TaskName},
    },
    error::{Error, Result},
};

/// Compare estimators: train each on small tasks with several seeds, and report fidelity, stability, cost and needs.
///
/// Writes one folder: `report.md`, `results.json`, `plan.json`, `plots/` and `cells/` with a file for each training. Called again with
/// the same folder it runs only what is missing, so an interrupted run continues. Controls (frozen, hash and oracle router, experts only)
/// run in any case. Everything is on the CPU, one thread for each training; results do not depend on --jobs, times do.
#[derive(clap::Args, Debug)]
pub struct CompareArgs {
    /// Folder of the results.
    #[arg(long, default_value = "compare")]
    pub out: PathBuf,
    /// Only these arms, by name or by the name of their estimator; see --list.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub arms: Vec<String>,
    /// Only these tasks: equal, unequal, collapsed, digits, text, rates, gradient.
    #[arg(long, value_delimiter = ',', value_parser = task, value_name = "NAMES")]
    pub tasks: Vec<TaskName>,
    /// Only these modes: scratch, or tune, which starts from a soft-trained teacher.
    #[arg(long, value_delimiter = ',', value_parser = mode, value_name = "NAMES")]
    pub modes: Vec<Mode>,
    /// Seeds of every arm, at most 100; left out: 5 on the synthetic tasks, 3 on the others.
    #[arg(long)]
    pub seeds: Option<u64>,
    /// Factor on the steps of every training.
    #[arg(long, default_value_t = 1.0)]
    pub steps_scale: f64,
    /// One seed and few steps: shows that everything runs, in under 3 minutes on 2 cores. The numbers mean nothing.
    #[arg(long)]
    pub quick: bool,
    /// Trainings at once, at most 256; left out: as many as there are cores.
    #[arg(long)]
    pub jobs: Option<NonZeroUsize>,
    /// Arms of one's own instead of the built-in ones, a TOML file of `[[arm]]`.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// List estimators with their settings, and the arms of every task, and stop.
    #[arg(long)]
    pub list: bool,
    /// Run the one cell whose specification is on the standard input, for the cells in this folder.
    #[arg(long, hide = true, value_name = "DIR")]
    pub cell: Option<PathBuf>,
}

/// Lists, runs one cell, or compares.
pub fn run(args: CompareArgs) -> Result<()> {
    if args.list {
        print!("{}", list::list());
        return Ok(());
    }
    if let Some(cells) = &args.cell {
        return run_cell(cells);
    }
    let run = Run {
        folder: Folder(args.out.clone()),
        jobs: args.jobs.unwrap_or_else(cores),
        program: std::env::current_exe().map_err(|error| Error::Internal(format!("this program has no path: {error}")))?,
        command: std::iter::once("hardmax".to_owned()).chain(std::env::args().skip(1)).collect::<Vec<_>>().join(" "),
    };
    let results = compare(&args.request()?, &run)?;
    tracing::info!("{}", run.folder.report().display());
    failures(&results)
}

impl CompareArgs {
    fn request(&self) -> Result<Request> {
        let own_arms = match &self.config {
            None => None,
            Some(path) => {
                let text = fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
                let file: ArmsFile = toml::from_str(&text).map_err(|error| Error::invalid("--config", error.to_string()))?;
                Some(file.arm)
            }
        };
        Ok(Request {
            arms: self.arms.clone(),
            tasks: self.tasks.clone(),
            modes: self.modes.clone(),
            seeds: self.seeds,
            steps_scale: self.steps_scale,
            quick: self.quick,
            own_arms,
        })
    }
}

fn run_cell(cells: &std::path::Path) -> Result<()> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).map_err(|error| Error::io("standard input", error))?;
    let spec: CellSpec = serde_json::from_str(&text).map_err(|error| Error::invalid("--cell", error.to_string()))?;
    match cell::run(&spec, cells) {
        Ok(Outcome::Failed(error)) => Err(Error::FailedPrecondition(error)),
        Ok(Outcome::Trained(_) | Outcome::Gradient(_)) => Ok(()),
        // Whoever runs the cells has to know this from a cell that failed.
        Err(error @ Error::Io { .. }) => {
            eprintln!("error: {error}");
            std::process::exit(i32::from(cell::UNWRITABLE))
        }
        Err(error) => Err(error),
    }
}

fn failures(results: &Results) -> Result<()> {
    let failed = results.cells.iter().filter(|cell| matches!(cell.outcome, Outcome::Failed(_))).count();
    match failed {
        0 => Ok(()),
        _ => Err(Error::FailedPrecondition(format!("{failed} of {} cells failed: the report says why", results.cells.len()))),
    }
}

fn cores() -> NonZeroUsize {
    thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

fn task(name: &str) -> std::result::Result<TaskName, String> {
    let names = TaskName::ALL.map(TaskName::id).join(", ");
    TaskName::ALL.into_iter().find(|task| task.id() == name).ok_or_else(|| format!("one of {names}"))
}

fn mode(name: &str) -> std::result::Result<Mode, String> {
    [Mode::Scratch, Mode::Tune].into_iter().find(|mode| mode.id() == name).ok_or_else(|| "scratch or tune".to_owned())
}
