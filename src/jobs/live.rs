//! A job of this server: what is known of it, on disk and in memory, and what it is asked to do.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use super::{
    folder::{self, JobFile},
    job::{Job, JobId, Who},
    state::JobState,
    watch::Log,
};
use crate::{
    durable,
    error::{Error, Result},
};

/// What the thread of a job is to do. A later one outweighs an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Order {
    /// Go on.
    Go,
    /// Save the state, and give memory back.
    Pause,
    /// Leave what has been learned so far as the candidate.
    Finish,
    /// End, and leave nothing.
    Stop,
    /// The server ends: save the state, to go on when it is started again.
    Leave,
}

/// A job.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) id: JobId,
    pub(super) dir: PathBuf,
    who: Who,
    /// Held while it is decided what the job is to do: one wish after the other.
    pub(super) deciding: Mutex<()>,
    /// Held for as long as it takes to copy.
    job: Mutex<Job>,
    /// Held while the file is written, so that the last to write is the last to change.
    writing: Mutex<()>,
    pub(super) log: Arc<Log>,
    order: watch::Sender<Order>,
    threads: watch::Sender<Threads>,
}

/// Threads that have had a job.
#[derive(Clone, Copy, Debug, Default)]
struct Threads {
    begun: u64,
    over: u64,
}

impl Live {
    /// With its history, as far as it is on disk.
    pub(super) fn open(dir: PathBuf, file: JobFile) -> Arc<Self> {
        let JobFile { who, job, .. } = file;
        let log = Arc::new(Log::open(folder::progress(&dir), &job));
        Arc::new(Self {
            id: job.id,
            dir,
            who,
            deciding: Mutex::default(),
            job: Mutex::new(job),
            writing: Mutex::default(),
            log,
            order: watch::Sender::new(Order::Go),
            threads: watch::Sender::default(),
        })
    }

    /// As it is now.
    pub(super) fn job(&self) -> Job {
        lock(&self.job).clone()
    }

    /// Changes what is known, in memory: what a restart finds again by itself.
    pub(super) fn note(&self, edit: impl FnOnce(&mut Job)) {
        edit(&mut lock(&self.job));
    }

    /// [`Live::note`] that watchers are told.
    pub(super) fn tell(&self, edit: impl FnOnce(&mut Job)) {
        self.note(edit);
        self.announce();
    }

    /// Tells watchers what the job is now.
    pub(super) fn announce(&self) {
        self.log.job(self.job());
    }

    /// Changes what is known, on disk first. Where that fails nothing has changed.
    pub(super) fn change(&self, edit: impl Fn(&mut Job)) -> Result<()> {
        let _writing = lock(&self.writing);
        self.write(&edit)?;
        self.tell(edit);
        Ok(())
    }

    /// [`Live::change`] of a job that runs.
    ///
    /// # Errors
    /// `FailedPrecondition` where it does not, or no longer.
    pub(super) fn change_running(&self, edit: impl Fn(&mut Job)) -> Result<()> {
        let _writing = lock(&self.writing);
        let state = self.job().state;
        if state != JobState::Running {
            return Err(Error::FailedPrecondition(format!("job {} is {}", self.id, state.name())));
        }
        self.write(&edit)?;
        self.tell(edit);
        Ok(())
    }

    /// Changes what is known though the disk may not take it; the result is that of the disk. `between` is called before anybody can see
    /// the change in memory, and watchers are not told.
    pub(super) fn conclude(&self, edit: impl Fn(&mut Job), between: impl FnOnce()) -> Result<()> {
        let _writing = lock(&self.writing);
        let written = self.write(&edit);
        between();
        self.note(edit);
        written
    }

    fn write(&self, edit: impl Fn(&mut Job)) -> Result<()> {
        let mut job = self.job();
        edit(&mut job);
        durable::write_json(&folder::job_json(&self.dir), &JobFile::new(self.who.clone(), job))
    }

    /// Tells the thread what to do, unless it was told something that outweighs it.
    pub(super) fn order(&self, order: Order) {
        self.order.send_if_modified(|known| {
            let more = order > *known;
            *known = order.max(*known);
            more
        });
    }

    /// What the thread is to do.
    pub(super) fn ordered(&self) -> Order {
        *self.order.borrow()
    }

    /// Resolves once it is to do anything but to go on.
    pub(super) async fn called(&self) {
        // The sender is part of `self`: waiting cannot fail.
        let _ = self.order.subscribe().wait_for(|order| *order != Order::Go).await;
    }

    /// A thread has it from now on, with this order.
    pub(super) fn begin(&self, order: Order) {
        self.order.send_replace(order);
        self.threads.send_modify(|threads| threads.begun += 1);
    }

    /// A thread is at its end.
    pub(super) fn end(&self) {
        self.threads.send_modify(|threads| threads.over += 1);
    }

    /// Resolves once the threads that had it when this was called are at their end.
    pub(super) fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut threads = self.threads.subscribe();
        let begun = threads.borrow().begun;
        async move {
            // Where the sender is gone the job is, and its threads with it.
            let _ = threads.wait_for(|threads| threads.over >= begun).await;
        }
    }
}

/// What these locks hold is whole after a panic elsewhere.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
