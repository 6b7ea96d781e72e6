//! The tuning folder at the start of a server: what is in force, and what was left.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use super::{
    GenerationRecord, Setup,
    audit::Audit,
    folder::{self, BaseFile, Current, Folder, JobFile},
    job::JobId,
    state::JobState,
};
use crate::{
    checkpoint::{Checkpoint, Delta, RoutingBlock},
    durable::{self, Lock},
    engine::FIRST_GENERATION,
    error::{Error, Result},
    model::load::ServingModel,
};

/// The folder, opened, and the generation in force.
#[derive(Debug)]
pub struct Registry {
    pub(super) shelf: Shelf,
    pub(super) current: Current,
    pub(super) model: ServingModel,
    pub(super) generations: BTreeMap<u64, GenerationRecord>,
    pub(super) jobs: BTreeMap<JobId, JobFile>,
    /// No job has ever had it.
    pub(super) next_job: u64,
}

/// What does not change as long as the server runs.
#[derive(Debug)]
pub(super) struct Shelf {
    pub(super) setup: Setup,
    pub(super) folder: Folder,
    pub(super) audit: Audit,
    pub(super) checkpoint: Checkpoint,
    /// Of its weights.
    pub(super) digest: String,
    /// The checkpoint as it was loaded.
    pub(super) base: ServingModel,
    _lock: Lock,
}

impl Registry {
    /// Opens the folder of `setup`, or makes it, for the weights of `checkpoint`, which `model` has. Reads all of the weights.
    ///
    /// # Errors
    /// `FailedPrecondition` where another server has the folder, it belongs to other weights, or a file of the generation in force is
    /// damaged; `InvalidArgument` where a folder with text is none.
    pub fn open(mut setup: Setup, checkpoint: Checkpoint, model: ServingModel) -> Result<Self> {
        setup.data = setup.data.iter().map(|path| data_folder(path)).collect::<Result<_>>()?;
        let folder = Folder::make(&setup.dir)?;
        let lock = Lock::take(&folder.lock(), "choose another one with --tuning-dir")?;
        let digest = checkpoint.digest()?;
        check_base(&folder, &digest, &checkpoint)?;
        let current = read_current(&folder)?;
        let mut generations = read_generations(&folder, current)?;
        generations.insert(FIRST_GENERATION, GenerationRecord::checkpoint());
        let (jobs, next_job) = read_jobs(&folder, &generations)?;
        let audit = Audit::open(&folder.audit())?;
        let shelf = Shelf { setup, folder, audit, checkpoint, digest, base: model, _lock: lock };
        let (model, _) = shelf.model(current.generation)?;
        tracing::info!(generation = current.generation, jobs = jobs.len(), dir = %shelf.folder.root().display(), "tuning");
        Ok(Self { shelf, current, model, generations, jobs, next_job })
    }

    /// Number and model of the generation in force.
    pub fn current(&self) -> (u64, ServingModel) {
        (self.current.generation, self.model.clone())
    }
}

impl Shelf {
    /// A generation from disk, and how its routers were trained.
    pub(super) fn model(&self, number: u64) -> Result<(ServingModel, Option<RoutingBlock>)> {
        if number == FIRST_GENERATION {
            return Ok((self.base.clone(), self.checkpoint.routing().cloned()));
        }
        let delta = self.delta(number)?;
        Ok((self.base.with_tensors(&delta.tensors)?, Some(delta.routing)))
    }

    /// What a generation has in other values than the checkpoint.
    pub(super) fn delta(&self, number: u64) -> Result<Delta> {
        self.own(Delta::read(&self.folder.delta(number))?)
    }

    /// `delta`, if it is over these weights.
    pub(super) fn own(&self, delta: Delta) -> Result<Delta> {
        if delta.base == self.digest {
            return Ok(delta);
        }
        let message = format!("the delta is over weights with the digest {}, and these have {}", delta.base, self.digest);
        Err(Error::FailedPrecondition(message))
    }
}

fn data_folder(path: &Path) -> Result<PathBuf> {
    let found = path.canonicalize().ok().filter(|path| path.is_dir());
    found.ok_or_else(|| Error::invalid("--tuning-data", format!("{} is no folder", path.display())))
}

/// The folder belongs to weights, not to their place.
fn check_base(folder: &Folder, digest: &str, checkpoint: &Checkpoint) -> Result<()> {
    match folder::read::<BaseFile>(&folder.base())? {
        Some(base) if base.digest == digest => Ok(()),
        Some(base) => Err(Error::FailedPrecondition(format!(
            "{} belongs to the weights of {} (digest {}), and {} has others (digest {digest}): choose another folder with --tuning-dir",
            folder.root().display(),
            base.checkpoint,
            base.digest,
            checkpoint.dir().display()
        ))),
        None => durable::write_json(&folder.base(), &BaseFile::new(digest.into(), checkpoint.dir().display().to_string())),
    }
}

fn read_current(folder: &Folder) -> Result<Current> {
    let last = folder.list_generations()?.last().copied();
    let begin_again = |problem: String| {
        // A number that was given out must not be given out again: what is cached under it would be taken for what is not.
        let fresh = serde_json::to_string(&Current::after(last.unwrap_or(FIRST_GENERATION))).unwrap_or_default();
        Error::FailedPrecondition(format!("{problem}: to begin again with the checkpoint as it is, write {fresh} to it"))
    };
    match folder::read::<Current>(&folder.current()) {
        Ok(Some(current)) => Ok(current),
        Ok(None) if last.is_none() => {
            let current = Current::first();
            durable::write_json(&folder.current(), &current)?;
            Ok(current)
        }
        Ok(None) => Err(begin_again(format!("{} is not there, though generations are", folder.current().display()))),
        Err(error @ Error::FailedPrecondition(_)) => Err(begin_again(error.to_string())),
        Err(error) => Err(error),
    }
}

/// Those that are whole. What a killed publish left is removed.
fn read_generations(folder: &Folder, current: Current) -> Result<BTreeMap<u64, GenerationRecord>> {
    let mut generations = BTreeMap::new();
    for number in folder.list_generations()? {
        let dir = folder.generation(number);
        let mark = folder::generation_json(&dir);
        let in_force = number == current.generation;
        match folder::read::<GenerationRecord>(&mark) {
            Ok(Some(record)) if in_force || current.pending != Some(number) => _ = generations.insert(number, record),
            Err(error) if in_force => return Err(error),
            Err(error) => tracing::warn!(%error, "a generation is passed over"),
            Ok(None) if in_force => {
                return Err(Error::FailedPrecondition(format!("{} is not there, and {number} is in force", mark.display())));
            }
            Ok(_) => folder::remove(&dir, &mark)?,
        }
    }
    if current.generation != FIRST_GENERATION && !generations.contains_key(&current.generation) {
        let message =
            format!("generation {} is in force, and {} is not there", current.generation, folder.generation(current.generation).display());
        return Err(Error::FailedPrecondition(message));
    }
    Ok(generations)
}

/// Jobs that can be read, and the first number that none has had. What a killed start left is removed.
fn read_jobs(folder: &Folder, generations: &BTreeMap<u64, GenerationRecord>) -> Result<(BTreeMap<JobId, JobFile>, u64)> {
    let mut jobs = BTreeMap::new();
    let mut next = 1;
    for id in folder.list_jobs()? {
        let dir = folder.job(id);
        match folder::read::<JobFile>(&folder::job_json(&dir)) {
            Ok(Some(file)) => _ = jobs.insert(id, file),
            Ok(None) => {
                folder::remove(&dir, &folder::job_json(&dir))?;
                continue;
            }
            Err(error) => tracing::warn!(%error, "a job is passed over"),
        }
        next = next.max(id.0 + 1);
    }
    for record in generations.values() {
        // The generation is written before the job that made it.
        if let Some(file) = record.job.and_then(|id| jobs.get_mut(&id)) {
            file.job.generation = Some(record.number);
        }
    }
    only_one_runs(&mut jobs);
    Ok((jobs, next))
}

fn only_one_runs(jobs: &mut BTreeMap<JobId, JobFile>) {
    let running = jobs.values_mut().filter(|file| file.job.state == JobState::Running);
    for file in running.skip(1) {
        file.job.state = JobState::Paused;
        file.job.detail = "another job ran when the server was started".into();
    }
}
