//! Tuning jobs of a server: what they are told, where they are, what becomes of their candidates.
//!
//! [`Registry`] is the folder on disk (`--tuning-dir`), opened before the engine so that the generation in force is loaded at once.
//! [`Jobs`] is the handle of the async side over registry and engine. A running job has a [`thread`] of its own, on which a
//! [`Tuner`](crate::tune::tuner::Tuner) computes in turns that the engine gives it; what it does can be watched ([`watch`]). A candidate
//! is [published](publish) as a generation, which a [`guard`] watches for a while and takes back if it is worse in use. All that is
//! done is written to an [`audit`] log.
//!
//! Everything durable is a file that is renamed into place ([`folder`]), so a server that is killed at any moment opens its folder again,
//! and the job that ran goes on by itself. Nobody waits for the engine with a lock in hand that another call needs, but for the one that
//! lets publications follow one another.

mod audit;
mod control;
mod data;
mod folder;
mod guard;
mod job;
mod live;
mod publish;
mod registry;
mod report;
mod state;
mod thread;
mod watch;

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use tokio::runtime::Handle;

use self::{
    folder::Current,
    live::{Live, lock},
    registry::Shelf,
};
pub use self::{
    guard::GuardConfig,
    job::{Job, JobId, Who},
    publish::{Export, Exported, GenerationRecord, Publish, Published, Rollback},
    registry::Registry,
    state::{JobPhase, JobState},
    watch::{Entry, Watch, What},
};
use crate::{
    engine::{Engine, FIRST_GENERATION, Share},
    error::{Error, Result},
    model::load::ServingModel,
    tune::{
        config::TuneConfig,
        data::{Corpus, DataShape},
        memory::MemoryPlan,
    },
};

/// What an operator allows.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Folder of jobs, generations and exports.
    pub dir: PathBuf,
    /// Folders below which text may be read that a client names.
    pub data: Vec<PathBuf>,
    /// Tokens of one job.
    pub max_tokens: usize,
    /// Bytes that one job may need; `None`: what the machine has.
    pub max_memory: Option<u64>,
    /// Finished jobs, and generations, that are kept. At least 1.
    pub keep: usize,
    /// When a published generation is taken back.
    pub guard: GuardConfig,
}

/// Handle to the jobs of a server; clones are the same jobs.
#[derive(Clone, Debug)]
pub struct Jobs(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    shelf: Shelf,
    engine: Engine,
    runtime: Handle,
    /// Held for as long as it takes to look something up.
    book: Mutex<Book>,
    /// Held while other weights come into force: one after the other.
    switching: tokio::sync::Mutex<()>,
    /// Held while a generation is written elsewhere: who finds a name free has it.
    exporting: tokio::sync::Mutex<()>,
}

/// What there is.
#[derive(Debug)]
struct Book {
    jobs: BTreeMap<JobId, Arc<Live>>,
    /// No job has ever had it.
    next_job: u64,
    /// The one that runs, or is about to.
    running: Option<JobId>,
    /// Of the one that ran last.
    thread: Option<JoinHandle<()>>,
    current: Current,
    /// The disk may say otherwise: a write of it has failed.
    unsure: bool,
    generations: BTreeMap<u64, GenerationRecord>,
    /// The one in force and the one before, but for the first, which the shelf has.
    models: BTreeMap<u64, ServingModel>,
    /// The server ends: nothing begins any more.
    leaving: bool,
}

impl Jobs {
    /// Over `registry` and the engine that was started with its current generation. A job that ran when the server ended goes on, and so
    /// does the watch over that generation. To be called in a tokio runtime.
    pub fn new(registry: Registry, engine: Engine) -> Self {
        let Registry { shelf, current, model, generations, jobs, next_job } = registry;
        let jobs = jobs.into_iter().map(|(id, file)| (id, Live::open(shelf.folder.job(id), file))).collect();
        let mut book = Book {
            jobs,
            next_job,
            running: None,
            thread: None,
            current,
            unsure: false,
            generations,
            models: BTreeMap::new(),
            leaving: false,
        };
        book.in_force(current.generation, model, None);
        let jobs = Self(Arc::new(Inner {
            shelf,
            engine,
            runtime: Handle::current(),
            book: Mutex::new(book),
            switching: tokio::sync::Mutex::default(),
            exporting: tokio::sync::Mutex::default(),
        }));
        jobs.0.go_on();
        jobs.0.watch_again();
        jobs.0.count_jobs();
        jobs
    }

    /// Checks all of a start that does not depend on text, before any is read: whether a job runs, the settings, the memory but for that
    /// of the text.
    ///
    /// # Errors
    /// `InvalidArgument` that names the field (`routing.estimator`), `FailedPrecondition` where a job runs, the model cannot be tuned, or
    /// there is too little memory.
    pub fn check(&self, config: &TuneConfig, share: Share) -> Result<MemoryPlan> {
        share.check()?;
        self.0.check_free()?;
        self.0.plan(config, 0).map(|(_, _, memory, _)| memory)
    }

    /// How the text of a job with these settings is cut, for [`Corpus::build`].
    ///
    /// # Errors
    /// Those of [`TuneConfig::plan`].
    pub fn shape(&self, config: &TuneConfig) -> Result<DataShape> {
        let (_, plan, ..) = self.0.plan(config, 0)?;
        Ok(DataShape {
            window: plan.window,
            heldout_share: config.run.heldout_share,
            end: self.0.engine.eos_token_ids().first().copied(),
            vocab: self.0.engine.spec().vocab_size,
            most_tokens: self.0.shelf.setup.max_tokens,
        })
    }

    /// The files that a client names in `field`, which must be below the allowed folders. Looks at the disk.
    ///
    /// # Errors
    /// `InvalidArgument` on `FIELD[N]`; `FailedPrecondition` where the server allows no folder.
    pub fn files(&self, field: &str, paths: &[String]) -> Result<Vec<PathBuf>> {
        data::files(&self.0.shelf.setup.data, field, paths)
    }

    /// Starts a job over the generation in force. Returns once it is on disk, as it was then.
    ///
    /// # Errors
    /// Those of [`Jobs::check`]; `OutOfRange` on `data`; `ResourceExhausted` where the disk is full.
    pub async fn start(&self, config: TuneConfig, share: Share, corpus: Corpus, who: Who) -> Result<Job> {
        self.0.blocking(move |inner| inner.start(config, share, &corpus, who)).await
    }

    /// Asks a job to save its state and to give its memory back. Returns once it has.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` where it does not run.
    pub async fn pause(&self, id: JobId, who: Who) -> Result<Job> {
        self.0.blocking(move |inner| inner.pause(id, &who)).await?.done().await
    }

    /// Lets a paused job go on, with another share if one is given; with one, also changes that of a running job.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` where it cannot go on, or another job runs; `InvalidArgument` on `share.duty_cycle`.
    pub async fn resume(&self, id: JobId, share: Option<Share>, who: Who) -> Result<Job> {
        self.0.blocking(move |inner| inner.resume(id, share, &who)).await
    }

    /// Ends a job. With `keep` it ends as done, with what it has learned so far as its candidate; else nothing is left. Returns once it
    /// has ended.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` where it has ended already.
    pub async fn stop(&self, id: JobId, keep: bool, who: Who) -> Result<Job> {
        self.0.blocking(move |inner| inner.stop(id, keep, &who)).await?.done().await
    }

    /// A job.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, id: JobId) -> Result<Job> {
        self.0.live(id).map(|live| live.job())
    }

    /// All jobs that are kept, oldest first.
    pub fn list(&self) -> Vec<Job> {
        self.0.jobs()
    }

    /// The job that runs.
    pub fn running(&self) -> Option<JobId> {
        lock(&self.0.book).running
    }

    /// What a job did after the entry number `after` (0: all of it that is kept), and what it does from now on.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn watch(&self, id: JobId, after: u64) -> Result<Watch> {
        self.0.live(id).map(|live| live.log.watch(after))
    }

    /// Puts the candidate of a job in force. Goes on to its end though nobody waits for it any more.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` where the job is not done, was published or was begun on another generation, or where a gate does
    /// not hold, or was measured under another routing than the one in force, and that is not overridden; `InvalidArgument` on
    /// `watch_seconds`; `ResourceExhausted` where the disk is full.
    pub async fn publish(&self, request: Publish) -> Result<Published> {
        self.0.to_its_end(Arc::clone(&self.0).publish(request)).await
    }

    /// Puts an older generation in force again, or a newer one that was taken back. Goes on to its end though nobody waits for it.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` where it is in force, or there is none before it.
    pub async fn rollback(&self, request: Rollback) -> Result<Published> {
        self.0.to_its_end(Arc::clone(&self.0).rollback(request)).await
    }

    /// All generations that are kept, oldest first. The first is the checkpoint as it was loaded.
    pub fn generations(&self) -> Vec<GenerationRecord> {
        self.0.generations()
    }

    /// Where a rollback that names no generation leads.
    pub fn previous(&self) -> Option<u64> {
        lock(&self.0.book).previous()
    }

    /// Writes a generation below the tuning folder. Goes on to its end though nobody waits for it any more.
    ///
    /// # Errors
    /// `NotFound`; `InvalidArgument` on `name`; `FailedPrecondition` where the name is taken; `ResourceExhausted` where the disk is full.
    pub async fn export(&self, generation: u64, form: Export, name: &str, who: Who) -> Result<Exported> {
        let (inner, name) = (Arc::clone(&self.0), name.to_owned());
        let export = async move {
            let _exporting = inner.exporting.lock().await;
            inner.blocking(move |inner| inner.export(generation, form, &name, &who)).await
        };
        self.0.to_its_end(export).await
    }

    /// The end of the server: the running job saves its state and leaves, to go on at the next start; watches end. Waits for the step that
    /// is under way, for as long as the engine gives turns.
    pub fn leave(&self) {
        self.0.leave();
    }
}

impl Inner {
    /// Runs `work`, which waits for files, where it keeps no socket waiting.
    async fn blocking<T: Send + 'static>(self: &Arc<Self>, work: impl FnOnce(&Arc<Self>) -> Result<T> + Send + 'static) -> Result<T> {
        let inner = Arc::clone(self);
        let task = self.runtime.spawn_blocking(move || work(&inner));
        task.await.map_err(|error| Error::Internal(format!("work of the tuning folder failed: {error}")))?
    }

    /// Waits for `work`, which goes on where nobody waits for it any more.
    async fn to_its_end<T: Send + 'static>(&self, work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        let task = self.runtime.spawn(work);
        task.await.map_err(|error| Error::Internal(format!("work on generations failed: {error}")))?
    }
}

impl Book {
    /// Fails where a job runs, or the server ends.
    fn check_free(&self) -> Result<()> {
        match self.running {
            _ if self.leaving => Err(Error::Draining),
            None => Ok(()),
            Some(running) => {
                Err(Error::FailedPrecondition(format!("job {running} runs, and one can at a time: pause or stop it, or wait for its end")))
            }
        }
    }

    /// The generation that the one in force was made from, where it is kept.
    fn previous(&self) -> Option<u64> {
        self.generations.get(&self.current.generation)?.parent.filter(|parent| self.generations.contains_key(parent))
    }

    /// A generation has come into force.
    fn in_force(&mut self, number: u64, model: ServingModel, new: Option<GenerationRecord>) {
        self.current = self.current.at(number);
        if let Some(record) = new {
            self.generations.insert(number, record);
        }
        if number != FIRST_GENERATION {
            self.models.insert(number, model);
        }
        let previous = self.previous();
        self.models.retain(|&kept, _| kept == number || Some(kept) == previous);
    }
}
