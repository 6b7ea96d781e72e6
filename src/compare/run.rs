//! Runs a plan: a process for every cell, several at once, the longest first; what is there already stays.
//!
//! A cell is a process of its own so that its peak memory is its own, so that a crash costs one cell, and so that its
//! result does not depend on how many run at once: each has one thread.

use std::{
    collections::{HashMap, HashSet},
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{Condvar, Mutex, PoisonError, mpsc},
    thread,
    time::Instant,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Deserialize;

use super::{
    cell,
    plan::Folder,
    process::{self, Ended},
    results::{By, CellRecord, Machine, Outcome, RESULTS_VERSION, Results},
    spec::{CellSpec, LAB_VERSION},
};
use crate::{
    durable,
    error::{Error, Result},
};

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

/// Most cells at once: far beyond the cores that a machine has, and far below the threads that a system gives.
pub const MAX_JOBS: usize = 256;

impl Run {
    /// # Errors
    /// [`Error::InvalidArgument`] on what cannot be, before anything is made.
    pub fn check(&self) -> Result<()> {
        match self.jobs.get() {
            1..=MAX_JOBS => Ok(()),
            _ => Err(Error::invalid("--jobs", format!("must be at most {MAX_JOBS}"))),
        }
    }

    /// Takes the folder, which is made if it is not there, for this run alone.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] if another run has it.
    pub fn lock(&self) -> Result<durable::Lock> {
        fs::create_dir_all(&self.folder.0).map_err(|error| Error::io(&self.folder.0, error))?;
        durable::Lock::take(&self.folder.lock(), "choose another one with --out")
    }

    /// Runs what is missing of `cells`, and returns everything. A failed cell is a result; files that cannot be written
    /// are errors, and end the run.
    pub fn run(&self, cells: &[CellSpec]) -> Result<Results> {
        let started = Instant::now();
        let folder = self.folder.cells();
        fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, error))?;
        remove_partial(&folder)?;
        durable::write_json(&self.folder.plan(), &cells)?;
        let queue = Queue::new(cells, &folder)?;
        match left_by_others(&queue.slugs(), &folder)? {
            0 => {}
            count => tracing::info!("{count} cells in {} are of another version of the laboratory, and are run again", folder.display()),
        }
        tracing::info!(
            "{} cells, {} of them done; about {} to go with {} at once",
            cells.len(),
            cells.len() - queue.open(),
            minutes(queue.estimate() / self.jobs.get() as f64),
            self.jobs
        );
        self.work(&queue, cells.len())?;
        let mut records = queue.into_records()?;
        let record = |spec: &CellSpec| {
            let missing = || failed(spec, "was not run");
            Ok(records.remove(&spec.id()?).unwrap_or_else(missing))
        };
        let By { git, cpu } = By::this();
        Ok(Results {
            version: RESULTS_VERSION,
            lab: LAB_VERSION,
            machine: Machine {
                cpu,
                cores: thread::available_parallelism().map_or(1, NonZeroUsize::get),
                jobs: self.jobs.get(),
                hardmax: env!("CARGO_PKG_VERSION").into(),
                git,
            },
            command: self.command.clone(),
            seconds: started.elapsed().as_secs_f64(),
            cells: cells.iter().map(record).collect::<Result<_>>()?,
        })
    }

    /// A thread for each job takes cells until there are none; this one draws the bar.
    fn work(&self, queue: &Queue, planned: usize) -> Result<()> {
        let bar = progress_bar(planned, planned - queue.open());
        let jobs = self.jobs.get().min(queue.open());
        let (send, receive) = mpsc::sync_channel::<String>(jobs);
        thread::scope(|scope| {
            let workers: Vec<_> = (0..jobs)
                .map(|_| {
                    let send = send.clone();
                    scope.spawn(move || {
                        while let Some(job) = queue.take() {
                            // A receiver that is gone only means that nobody looks at the bar.
                            let _ = send.send(job.id.clone());
                            match self.child(&job) {
                                Ok(record) => queue.done(job, record),
                                Err(error) => queue.abort(error),
                            }
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

    fn child(&self, job: &Job) -> Result<CellRecord> {
        let cells = self.folder.cells();
        let ran = process::run(&self.program, &cells, &job.spec);
        match (cell::finished(&job.spec, &cells), ran) {
            (Ok(Some(record)), _) => Ok(record),
            (_, Err(error)) => Ok(failed(&job.spec, error.to_string())),
            (_, Ok(ended)) => Ok(CellRecord::new(job.spec.clone(), By::this(), unfinished(failure(&job.spec, &cells), ended)?)),
        }
    }
}

fn failed(spec: &CellSpec, why: impl Into<String>) -> CellRecord {
    CellRecord::new(spec.clone(), By::this(), Outcome::Failed(why.into()))
}

/// What a child without a result comes to: the error in its file, or in its last words.
///
/// # Errors
/// It could not write its files, and others will fare no better.
fn unfinished(failure: Option<Outcome>, ended: Ended) -> Result<Outcome> {
    let Ended { status, said } = ended;
    if status.code() == Some(i32::from(cell::UNWRITABLE)) {
        let message = format!("a cell cannot write its files, so the run ends here: {said}; when that is mended, the same command goes on");
        return Err(Error::FailedPrecondition(message));
    }
    Ok(failure.unwrap_or_else(|| Outcome::Failed(format!("{status}: {said}"))))
}

/// How many of the cells of these slugs the folder has a file of, from another version of the laboratory.
fn left_by_others(slugs: &HashSet<String>, folder: &Path) -> Result<usize> {
    /// The part of a cell's file that every version has had.
    #[derive(Deserialize)]
    struct Stamped {
        spec: Stamp,
    }
    #[derive(Deserialize)]
    struct Stamp {
        lab: u32,
    }
    let mut left = HashSet::new();
    for entry in fs::read_dir(folder).map_err(|error| Error::io(folder, error))? {
        let path = entry.map_err(|error| Error::io(folder, error))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".json"));
        let Some((slug, _)) = name.and_then(|name| name.rsplit_once('-')).filter(|(slug, _)| slugs.contains(*slug)) else { continue };
        let stamped = fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Stamped>(&text).ok());
        if stamped.is_some_and(|stamped| stamped.spec.lab != LAB_VERSION) {
            left.insert(slug.to_owned());
        }
    }
    Ok(left.len())
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
    /// Of the cells that are done.
    records: HashMap<String, CellRecord>,
    started: HashMap<String, Instant>,
    /// Why no more cells are to be run.
    aborted: Option<Error>,
}

impl Queue {
    fn new(cells: &[CellSpec], folder: &Path) -> Result<Self> {
        let mut records = HashMap::new();
        let mut waiting = Vec::new();
        for spec in cells {
            let id = spec.id()?;
            match cell::finished(spec, folder)? {
                Some(record) => {
                    records.insert(id, record);
                }
                None => {
                    let teacher = spec.teacher().map(|teacher| teacher.id()).transpose()?;
                    waiting.push(Job { id, teacher, seconds: spec.estimated_seconds(), spec: spec.clone() });
                }
            }
        }
        // Teachers first, since others wait for them; then the longest, so that none of those is left to the end alone.
        waiting.sort_by(|a, b| a.spec.is_teacher().cmp(&b.spec.is_teacher()).then(a.seconds.total_cmp(&b.seconds)));
        let (running, started) = (HashSet::new(), HashMap::new());
        let state = Waiting { waiting, running, running_seconds: 0.0, spent: [0.0; 2], records, started, aborted: None };
        Ok(Self { state: Mutex::new(state), changed: Condvar::new() })
    }

    /// The next cell that is ready; waits for teachers; `None` when nothing waits any more, or nothing is to be run.
    fn take(&self) -> Option<Job> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            state.fail_orphans();
            if state.waiting.is_empty() || state.aborted.is_some() {
                return None;
            }
            let ready = |job: &Job| job.teacher.as_ref().is_none_or(|teacher| state.records.contains_key(teacher));
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

    fn done(&self, job: Job, record: CellRecord) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.running.remove(&job.id);
        state.running_seconds -= job.seconds;
        let real = state.started.remove(&job.id).map_or(0.0, |started| started.elapsed().as_secs_f64());
        state.spent[0] += job.seconds;
        state.spent[1] += real;
        if let Outcome::Failed(error) = &record.outcome {
            tracing::warn!("{} failed: {error}", job.id);
        }
        state.records.insert(job.id, record);
        self.changed.notify_all();
    }

    /// Lets nobody take another cell. The first error counts.
    fn abort(&self, error: Error) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.aborted.get_or_insert(error);
        self.changed.notify_all();
    }

    /// Readable names of the cells that wait.
    fn slugs(&self) -> HashSet<String> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting.iter().map(|job| job.spec.slug()).collect()
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

    fn into_records(self) -> Result<HashMap<String, CellRecord>> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        state.aborted.map_or(Ok(state.records), Err)
    }
}

impl Waiting {
    /// Cells whose teacher failed cannot run, nor can those whose teacher is not there at all.
    fn fail_orphans(&mut self) {
        let lost = |teacher: &String| match self.records.get(teacher) {
            Some(record) => matches!(record.outcome, Outcome::Failed(_)),
            None => !self.running.contains(teacher) && !self.waiting.iter().any(|job| job.id == *teacher),
        };
        let is_lost = |job: &Job| job.teacher.as_ref().is_some_and(lost);
        let orphans: HashSet<String> = self.waiting.iter().filter(|job| is_lost(job)).map(|job| job.id.clone()).collect();
        let (lost, waiting) = std::mem::take(&mut self.waiting).into_iter().partition(|job| orphans.contains(&job.id));
        self.waiting = waiting;
        let lost: Vec<Job> = lost;
        self.records.extend(lost.into_iter().map(|job| (job.id, failed(&job.spec, "its teacher failed"))));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

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
            let record = CellRecord::new(first.spec.clone(), By::default(), outcome.clone());
            queue.done(first, record);
            match outcome {
                Outcome::Failed(_) => assert!(queue.take().is_none()),
                _ => assert!(queue.take().is_some_and(|job| job.spec.mode == Mode::Tune)),
            }
            let failed = queue
                .into_records()
                .expect("nobody aborted")
                .values()
                .filter(|record| matches!(record.outcome, Outcome::Failed(_)))
                .count();
            assert_eq!(failed, if matches!(outcome, Outcome::Failed(_)) { cells.len() } else { 0 });
        }
    }

    #[test]
    fn finished_cells_are_not_run_again_and_failed_ones_are() {
        let folder = tempfile::tempdir().expect("a folder");
        let cells = plan(&Request { modes: vec![Mode::Scratch], ..request() }).expect("sound");
        let write = |spec: &CellSpec, outcome: Outcome| {
            let record = CellRecord::new(spec.clone(), By::default(), outcome);
            durable::write_json(&spec.file(folder.path()).expect("a name"), &record).expect("writable");
        };
        write(&cells[0], Outcome::Trained(Box::new(CellResult { steps: 7, ..CellResult::default() })));
        write(&cells[1], Outcome::Failed("no memory".into()));
        fs::write(cells[2].file(folder.path()).expect("a name"), "{").expect("writable");
        let queue = Queue::new(&cells, folder.path()).expect("readable");
        assert_eq!(queue.open(), cells.len() - 1);
        let records = queue.into_records().expect("nobody aborted");
        let outcomes: Vec<&Outcome> = records.values().map(|record| &record.outcome).collect();
        assert!(matches!(outcomes[0], Outcome::Trained(result) if result.steps == 7));
    }

    #[test]
    fn cells_of_another_version_or_with_other_defaults_are_not_taken() {
        let folder = tempfile::tempdir().expect("a folder");
        let cells = plan(&Request { modes: vec![Mode::Scratch], ..request() }).expect("sound");
        let old = CellSpec { lab: LAB_VERSION - 1, ..cells[0].clone() };
        assert_eq!((old.slug(), old.id().expect("JSON") == cells[0].id().expect("JSON")), (cells[0].slug(), false));
        let record = CellRecord::new(old.clone(), By::default(), trained());
        durable::write_json(&old.file(folder.path()).expect("a name"), &record).expect("writable");
        // Its name says that it is this cell; what is in it says otherwise.
        durable::write_json(&cells[1].file(folder.path()).expect("a name"), &record).expect("writable");
        let queue = Queue::new(&cells, folder.path()).expect("readable");
        assert_eq!(queue.open(), cells.len());
        assert_eq!(left_by_others(&queue.slugs(), folder.path()).expect("readable"), 2);
        assert_eq!(left_by_others(&HashSet::new(), folder.path()).expect("readable"), 0, "what is done again is not counted again");
    }

    #[test]
    fn a_teacher_runs_again_when_its_weights_are_not_those_it_wrote() {
        let folder = tempfile::tempdir().expect("a folder");
        let spec = plan(&request()).expect("sound").into_iter().find(CellSpec::is_teacher).expect("a teacher");
        let weights = spec.weights(folder.path()).expect("a name");
        let finished = || cell::finished(&spec, folder.path()).expect("readable").is_some();
        fs::write(&weights, "weights").expect("writable");
        let mut record = CellRecord::new(spec.clone(), By::default(), trained());
        for (of, is) in [(None, false), (Some(durable::sha256(&weights).expect("readable")), true)] {
            record.weights = of;
            durable::write_json(&spec.file(folder.path()).expect("a name"), &record).expect("writable");
            assert_eq!(finished(), is, "{:?}", record.weights);
        }
        fs::write(&weights, "weight").expect("writable");
        assert!(!finished(), "damaged");
        fs::remove_file(&weights).expect("removable");
        assert!(!finished(), "gone");
    }

    #[test]
    fn a_run_has_at_most_as_many_jobs_as_there_is_work() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = |jobs| Run {
            folder: Folder(folder.path().to_owned()),
            jobs: NonZeroUsize::new(jobs).expect("above 0"),
            program: "no-such-program-of-this-name".into(),
            command: "test".into(),
        };
        assert!(run(usize::MAX).check().expect_err("too many").to_string().starts_with("--jobs: must be at most 256"));
        assert!(run(MAX_JOBS).check().is_ok());
        let cells = plan(&Request { modes: vec![Mode::Scratch], ..request() }).expect("sound");
        assert_eq!(run(usize::MAX).run(&cells).expect("results all the same").cells.len(), cells.len());
    }

    #[test]
    fn a_disk_that_is_full_ends_the_run_with_one_error() {
        let ended = |code: i32| Ended { status: ExitStatusExt::from_raw(code << 8), said: "No space left on device".into() };
        let error = unfinished(None, ended(i32::from(cell::UNWRITABLE))).expect_err("cannot go on").to_string();
        assert!(error.contains("the run ends here: No space left on device; when that is mended"), "{error}");
        assert!(matches!(unfinished(None, ended(1)), Ok(Outcome::Failed(said)) if said.contains("No space")));

        let folder = tempfile::tempdir().expect("a folder");
        let queue = Queue::new(&plan(&request()).expect("sound"), folder.path()).expect("readable");
        let _teacher = queue.take().expect("a cell");
        queue.abort(Error::FailedPrecondition("first".into()));
        queue.abort(Error::FailedPrecondition("second".into()));
        assert!(queue.take().is_none(), "nothing more is begun");
        assert_eq!(queue.into_records().expect_err("aborted").to_string(), "first");
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
