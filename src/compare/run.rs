//! Runs a plan: a process for every cell, several at once, the longest first; what is there already stays.
//!
//! A cell is a process of its own so that its peak memory is its own, so that a crash costs one cell, and so that its
//! result does not depend on how many run at once: each has one thread.

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::Write as _,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Condvar, Mutex, PoisonError, mpsc},
    thread,
    time::Instant,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{
    cell, files,
    plan::Folder,
    results::{CellRecord, Machine, Outcome, RESULTS_VERSION, Results},
    spec::{CellSpec, LAB_VERSION},
};
use crate::error::{Error, Result};

/// How a plan is run.
#[derive(Clone, Debug)]
pub struct Run {
    /// Everything goes here.
    pub folder: Folder,
    /// Cells at once.
    pub jobs: NonZeroUsize,
    /// The program that runs a cell: it is called with `compare --cell <cells>` and reads the specification from its
    /// standard input. Normally this very program.
    pub program: PathBuf,
    /// The command line, for the report.
    pub command: String,
}

/// Sets threads of a child to one.
const ONE_THREAD: [&str; 2] = ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"];
/// What is kept of a crashed child's last words.
const LAST_WORDS: usize = 400;

impl Run {
    /// Runs what is missing of `cells`, and returns everything. A failed cell is a result; files that cannot be written
    /// are errors.
    pub fn run(&self, cells: &[CellSpec]) -> Result<Results> {
        let started = Instant::now();
        let folder = self.folder.cells();
        fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, error))?;
        remove_partial(&folder)?;
        files::write_json(&self.folder.plan(), &cells)?;
        let queue = Queue::new(cells, &folder)?;
        tracing::info!(
            "{} cells, {} of them done; about {} to go with {} at once",
            cells.len(),
            cells.len() - queue.open(),
            minutes(queue.estimate() / self.jobs.get() as f64),
            self.jobs
        );
        self.work(&queue, cells.len())?;
        let outcomes = queue.into_outcomes();
        let record = |spec: &CellSpec| {
            let missing = || Outcome::Failed("was not run".into());
            Ok(CellRecord { spec: spec.clone(), outcome: outcomes.get(&spec.id()?).cloned().unwrap_or_else(missing) })
        };
        Ok(Results {
            version: RESULTS_VERSION,
            lab: LAB_VERSION,
            machine: Machine {
                cpu: cpu_name(),
                cores: thread::available_parallelism().map_or(1, NonZeroUsize::get),
                jobs: self.jobs.get(),
                hardmax: env!("CARGO_PKG_VERSION").into(),
                git: env!("HARDMAX_GIT").into(),
            },
            command: self.command.clone(),
            seconds: started.elapsed().as_secs_f64(),
            cells: cells.iter().map(record).collect::<Result<_>>()?,
        })
    }

    /// A thread for each job takes cells until there are none; this one draws the bar.
    fn work(&self, queue: &Queue, planned: usize) -> Result<()> {
        let bar = progress_bar(planned, planned - queue.open());
        let (send, receive) = mpsc::sync_channel::<String>(self.jobs.get());
        thread::scope(|scope| {
            let workers: Vec<_> = (0..self.jobs.get())
                .map(|_| {
                    let send = send.clone();
                    scope.spawn(move || {
                        while let Some(job) = queue.take() {
                            // A receiver that is gone only means that nobody looks at the bar.
                            let _ = send.send(job.id.clone());
                            let outcome = self.child(&job);
                            queue.done(job, outcome);
                        }
                    })
                })
                .collect();
            drop(send);
            for id in receive {
                bar.set_position((planned - queue.open()) as u64);
                bar.set_message(format!("{id}, about {} to go", minutes(queue.estimate() / self.jobs.get() as f64)));
            }
            workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| Error::Internal("a worker panicked".into())))
        })?;
        bar.finish_and_clear();
        Ok(())
    }

    fn child(&self, job: &Job) -> Outcome {
        let cells = self.folder.cells();
        let ran = run_child(&self.program, &cells, &job.spec);
        match (cell::finished(&job.spec, &cells), ran) {
            (Ok(Some(outcome)), _) => outcome,
            (_, Err(error)) => Outcome::Failed(error.to_string()),
            (_, Ok(ended)) => failure(&job.spec, &cells).unwrap_or(Outcome::Failed(ended)),
        }
    }
}

/// Runs one cell; returns how the process ended.
fn run_child(program: &Path, cells: &Path, spec: &CellSpec) -> Result<String> {
    let error = |error| Error::io(program, error);
    let json = serde_json::to_vec(spec).map_err(|error| Error::Internal(format!("a cell has no JSON form: {error}")))?;
    let mut command = Command::new(program);
    command.arg("compare").arg("--cell").arg(cells).envs(ONE_THREAD.map(|name| (name, "1"))).env("RUST_BACKTRACE", "0");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(error)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A child that died before reading says why on its standard error.
        let _ = stdin.write_all(&json);
    }
    let output = child.wait_with_output().map_err(error)?;
    let said = String::from_utf8_lossy(&output.stderr);
    let tail: String = said.chars().skip(said.chars().count().saturating_sub(LAST_WORDS)).collect();
    Ok(format!("{}: {}", output.status, tail.trim()))
}

/// The error that a cell left in its file.
fn failure(spec: &CellSpec, cells: &Path) -> Option<Outcome> {
    let record: CellRecord = serde_json::from_slice(&fs::read(spec.file(cells).ok()?).ok()?).ok()?;
    (record.spec == *spec).then_some(record.outcome)
}

/// What an interrupted run had not finished writing.
fn remove_partial(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(|error| Error::io(folder, error))? {
        let path = entry.map_err(|error| Error::io(folder, error))?.path();
        if path.extension().is_some_and(|extension| extension == "partial") {
            fs::remove_file(&path).map_err(|error| Error::io(&path, error))?;
        }
    }
    Ok(())
}

fn progress_bar(planned: usize, done: usize) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(planned as u64), ProgressDrawTarget::stderr_with_hz(2)).with_position(done as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}") {
        bar.set_style(style);
    }
    bar
}

fn minutes(seconds: f64) -> String {
    if seconds < 90.0 { format!("{seconds:.0} s") } else { format!("{:.0} min", seconds / 60.0) }
}

fn cpu_name() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")).and_then(|rest| rest.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// A cell that waits or runs.
#[derive(Clone, Debug)]
struct Job {
    id: String,
    spec: CellSpec,
    /// The cell that must be done before.
    teacher: Option<String>,
    seconds: f64,
}

/// Cells that wait, shared by the workers.
struct Queue {
    state: Mutex<Waiting>,
    /// A cell was done: another may have become ready.
    changed: Condvar,
}

struct Waiting {
    /// The next one last.
    waiting: Vec<Job>,
    running: HashSet<String>,
    /// Estimated seconds of what is running.
    running_seconds: f64,
    /// Estimated and real seconds of what was run: how wrong estimates are here.
    spent: [f64; 2],
    outcomes: HashMap<String, Outcome>,
    started: HashMap<String, Instant>,
}

impl Queue {
    fn new(cells: &[CellSpec], folder: &Path) -> Result<Self> {
        let mut outcomes = HashMap::new();
        let mut waiting = Vec::new();
        for spec in cells {
            let id = spec.id()?;
            match cell::finished(spec, folder)? {
                // A teacher without its weights must run again for those who start from it.
                Some(outcome) if !spec.is_teacher() || spec.weights(folder)?.exists() => {
                    outcomes.insert(id, outcome);
                }
                _ => {
                    let teacher = spec.teacher().map(|teacher| teacher.id()).transpose()?;
                    waiting.push(Job { id, teacher, seconds: spec.estimated_seconds(), spec: spec.clone() });
                }
            }
        }
        // Teachers first, since others wait for them; then the longest, so that none of those is left to the end alone.
        waiting.sort_by(|a, b| a.spec.is_teacher().cmp(&b.spec.is_teacher()).then(a.seconds.total_cmp(&b.seconds)));
        let running = HashSet::new();
        let state = Waiting { waiting, running, running_seconds: 0.0, spent: [0.0; 2], outcomes, started: HashMap::new() };
        Ok(Self { state: Mutex::new(state), changed: Condvar::new() })
    }

    /// The next cell that is ready; waits for teachers; `None` when nothing waits any more.
    fn take(&self) -> Option<Job> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            state.fail_orphans();
            if state.waiting.is_empty() {
                return None;
            }
            let ready = |job: &Job| job.teacher.as_ref().is_none_or(|teacher| state.outcomes.contains_key(teacher));
            if let Some(at) = state.waiting.iter().rposition(ready) {
                let job = state.waiting.remove(at);
                state.running.insert(job.id.clone());
                state.running_seconds += job.seconds;
                state.started.insert(job.id.clone(), Instant::now());
                return Some(job);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn done(&self, job: Job, outcome: Outcome) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.running.remove(&job.id);
        state.running_seconds -= job.seconds;
        let real = state.started.remove(&job.id).map_or(0.0, |started| started.elapsed().as_secs_f64());
        state.spent[0] += job.seconds;
        state.spent[1] += real;
        if let Outcome::Failed(error) = &outcome {
            tracing::warn!("{} failed: {error}", job.id);
        }
        state.outcomes.insert(job.id, outcome);
        self.changed.notify_all();
    }

    /// Cells that are not done.
    fn open(&self) -> usize {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting.len() + state.running.len()
    }

    /// Seconds of one core that are left.
    fn estimate(&self) -> f64 {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let left: f64 = state.waiting.iter().map(|job| job.seconds).sum::<f64>() + 0.5 * state.running_seconds;
        // Trust what was seen only once it is more than a few cells.
        let [estimated, real] = state.spent;
        if estimated > 10.0 { left * real / estimated } else { left }
    }

    fn into_outcomes(self) -> HashMap<String, Outcome> {
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).outcomes
    }
}

impl Waiting {
    /// Cells whose teacher failed cannot run, nor can those whose teacher is not there at all.
    fn fail_orphans(&mut self) {
        let lost = |teacher: &String| match self.outcomes.get(teacher) {
            Some(outcome) => matches!(outcome, Outcome::Failed(_)),
            None => !self.running.contains(teacher) && !self.waiting.iter().any(|job| job.id == *teacher),
        };
        let orphans: Vec<String> =
            self.waiting.iter().filter(|job| job.teacher.as_ref().is_some_and(lost)).map(|job| job.id.clone()).collect();
        self.waiting.retain(|job| !orphans.contains(&job.id));
        self.outcomes.extend(orphans.into_iter().map(|id| (id, Outcome::Failed("its teacher failed".into()))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::{
        plan::{Request, plan},
        results::CellResult,
        spec::{Mode, TaskName},
    };

    fn request() -> Request {
        Request {
            arms: vec!["ste".into()],
            tasks: vec![TaskName::Equal],
            modes: vec![Mode::Tune],
            seeds: Some(1),
            steps_scale: 0.01,
            ..Request::default()
        }
    }

    fn trained() -> Outcome {
        Outcome::Trained(Box::default())
    }

    #[test]
    fn tuning_waits_for_its_teacher_and_falls_with_it() {
        let folder = tempfile::tempdir().expect("a folder");
        for outcome in [trained(), Outcome::Failed("no".into())] {
            let cells = plan(&request()).expect("sound");
            let queue = Queue::new(&cells, folder.path()).expect("readable");
            let first = queue.take().expect("a teacher");
            assert!(first.spec.is_teacher());
            queue.done(first, outcome.clone());
            match outcome {
                Outcome::Failed(_) => assert!(queue.take().is_none()),
                _ => assert!(queue.take().is_some_and(|job| job.spec.mode == Mode::Tune)),
            }
            let failed = queue.into_outcomes().values().filter(|outcome| matches!(outcome, Outcome::Failed(_))).count();
            assert_eq!(failed, if matches!(outcome, Outcome::Failed(_)) { cells.len() } else { 0 });
        }
    }

    #[test]
    fn finished_cells_are_not_run_again_and_failed_ones_are() {
        let folder = tempfile::tempdir().expect("a folder");
        let cells = plan(&Request { modes: vec![Mode::Scratch], ..request() }).expect("sound");
        let write = |spec: &CellSpec, outcome: Outcome| {
            let record = CellRecord { spec: spec.clone(), outcome };
            files::write_json(&spec.file(folder.path()).expect("a name"), &record).expect("writable");
        };
        write(&cells[0], Outcome::Trained(Box::new(CellResult { steps: 7, ..CellResult::default() })));
        write(&cells[1], Outcome::Failed("no memory".into()));
        fs::write(cells[2].file(folder.path()).expect("a name"), "{").expect("writable");
        let queue = Queue::new(&cells, folder.path()).expect("readable");
        assert_eq!(queue.open(), cells.len() - 1);
        assert!(matches!(queue.into_outcomes().values().next(), Some(Outcome::Trained(result)) if result.steps == 7));
    }

    #[test]
    fn a_child_that_cannot_start_or_says_nothing_is_a_failed_cell() {
        let folder = tempfile::tempdir().expect("a folder");
        let cells = plan(&Request { modes: vec![Mode::Scratch], ..request() }).expect("sound");
        let run = |program: &str| Run {
            folder: Folder(folder.path().to_owned()),
            jobs: NonZeroUsize::MIN,
            program: program.into(),
            command: "test".into(),
        };
        for program in ["no-such-program-of-this-name", "false"] {
            let results = run(program).run(&cells).expect("results all the same");
            assert!(results.cells.iter().all(|cell| matches!(cell.outcome, Outcome::Failed(_))), "{program}");
            assert_eq!(results.cells.len(), cells.len());
        }
    }
}
