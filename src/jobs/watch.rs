//! What a job did, and what it does as it does it, for any number of watchers.
//!
//! There is one list for each job, not a queue for each watcher: a watcher reads on from the last number it has seen, and is woken when
//! there is more. So a slow one costs nothing, and one that comes late reads the same.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::Write as _,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::job::Job;
use crate::{
    durable,
    error::{Error, Result},
    tune::tuner::Event,
};

/// Most steps that are kept of a job: from there on every second one is left out.
const KEPT_STEPS: usize = 4096;

/// Most evaluations, each of which has a share for every expert.
const KEPT_EVALUATIONS: usize = 256;

/// Most entries that a watcher holds at once.
const HANDED_OUT: usize = 64;

/// Something that happened.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Grows from one entry to the next, with gaps.
    pub sequence: u64,
    /// It happened before this watcher came.
    pub history: bool,
    /// What.
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum What {
    /// A step or an evaluation.
    Event(Event),
    /// The job is in another state or phase. Only the last one is kept.
    Job(Box<Job>),
}

/// Reads what happens to a job.
#[derive(Debug)]
pub struct Watch {
    log: Arc<Log>,
    changed: watch::Receiver<Told>,
    after: u64,
    /// Up to here it is history.
    known: u64,
    ready: VecDeque<Entry>,
}

/// How far a log is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Told {
    last: u64,
    /// Nothing follows.
    ended: bool,
}

/// What happened to a job.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    kept: Mutex<Kept>,
    told: watch::Sender<Told>,
}

#[derive(Debug, Default)]
struct Kept {
    steps: Thinned<KEPT_STEPS>,
    evaluations: Thinned<KEPT_EVALUATIONS>,
    job: Option<(u64, Box<Job>)>,
    last: u64,
    /// Open while the job runs.
    file: Option<File>,
}

/// A list of at most `MOST`.
#[derive(Debug, Default)]
struct Thinned<const MOST: usize>(Vec<(u64, Event)>);

/// A line of the file: a number that is taken, and what has it, where that is kept.
#[derive(Serialize, Deserialize)]
struct Line<E> {
    sequence: u64,
    #[serde(flatten)]
    event: Option<E>,
}

// === impl Watch ===

impl Watch {
    /// The next entry; `None` once the job has ended, or the server does.
    pub async fn next(&mut self) -> Option<Entry> {
        loop {
            if let Some(entry) = self.ready.pop_front() {
                self.after = entry.sequence;
                return Some(entry);
            }
            let told = *self.changed.borrow_and_update();
            self.ready = self.log.after(self.after, self.known);
            // The end is marked after the last entry.
            if self.ready.is_empty() && (told.ended || self.changed.changed().await.is_err()) {
                return None;
            }
        }
    }
}

// === impl Log ===

impl Log {
    /// The log of `job` that the file `path` keeps, from as much of it as can be read.
    pub(super) fn open(path: PathBuf, job: &Job) -> Self {
        let mut kept = Kept::default();
        for line in fs::read_to_string(&path).unwrap_or_default().lines() {
            // Who is killed while writing leaves half a line.
            let Ok(Line { sequence, event }) = serde_json::from_str::<Line<Event>>(line) else { continue };
            kept.add(sequence, event);
        }
        kept.last += 1;
        kept.job = Some((kept.last, Box::new(job.clone())));
        let told = Told { last: kept.last, ended: job.state.is_final() };
        Self { path, kept: Mutex::new(kept), told: watch::Sender::new(told) }
    }

    /// A watcher from `after` on.
    pub(super) fn watch(self: &Arc<Self>, after: u64) -> Watch {
        let changed = self.told.subscribe();
        let known = changed.borrow().last;
        Watch { log: Arc::clone(self), changed, after, known, ready: VecDeque::new() }
    }

    /// The job goes on after `step` steps: what was noted of later ones is done again.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub(super) fn resume(&self, step: usize) -> Result<()> {
        let mut kept = self.lock();
        let earlier = |(_, event): &(u64, Event)| step_of(event).is_none_or(|of| of <= step);
        kept.steps.0.retain(earlier);
        kept.evaluations.0.retain(earlier);
        self.rewrite(&mut kept)
    }

    /// Writes what is kept as a file of its own, to be gone on with.
    fn rewrite(&self, kept: &mut Kept) -> Result<()> {
        let mut content = Vec::new();
        for (sequence, event) in kept.events(0) {
            line(&mut content, sequence, Some(event))?;
        }
        line(&mut content, kept.last, None)?;
        durable::write(&self.path, &content)?;
        kept.file = Some(File::options().append(true).open(&self.path).map_err(|error| Error::io(&self.path, error))?);
        Ok(())
    }

    /// Notes an event. That it cannot be written fails no job: it is told once.
    pub(super) fn event(&self, event: Event) {
        let mut kept = self.lock();
        let sequence = kept.last + 1;
        self.write(&mut kept, sequence, Some(&event));
        // The file stays as short as the list.
        if kept.add(sequence, Some(event))
            && kept.file.is_some()
            && let Err(error) = self.rewrite(&mut kept)
        {
            tracing::warn!(%error, "the history of a job stays long");
        }
        drop(kept);
        self.tell(sequence, false);
    }

    /// The job is this now.
    pub(super) fn job(&self, job: Job) {
        let mut kept = self.lock();
        let sequence = kept.last + 1;
        let ended = job.state.is_final();
        self.write(&mut kept, sequence, None);
        kept.last = sequence;
        kept.job = Some((sequence, Box::new(job)));
        if ended {
            kept.file = None;
        }
        drop(kept);
        self.tell(sequence, ended);
    }

    /// Adds a line to the file, where one is open.
    fn write(&self, kept: &mut Kept, sequence: u64, event: Option<&Event>) {
        let Some(file) = &mut kept.file else { return };
        let mut text = Vec::new();
        let written = line(&mut text, sequence, event).and_then(|()| file.write_all(&text).map_err(|error| Error::io(&self.path, error)));
        if let Err(error) = written {
            tracing::warn!(%error, "the history of a job is not written any more");
            kept.file = None;
        }
    }

    /// Ends all watches: the server does.
    pub(super) fn close(&self) {
        self.told.send_modify(|told| told.ended = true);
    }

    fn tell(&self, last: u64, ended: bool) {
        self.told.send_modify(|told| *told = Told { last: last.max(told.last), ended: ended || told.ended });
    }

    /// The next entries after the number `after`; none where there is nothing yet.
    fn after(&self, after: u64, known: u64) -> VecDeque<Entry> {
        let kept = self.lock();
        let entry = |sequence, what| Entry { sequence, history: sequence <= known, what };
        let events = kept.events(after).take(HANDED_OUT);
        let mut entries: Vec<Entry> = events.map(|(sequence, event)| entry(sequence, What::Event(event.clone()))).collect();
        entries.extend(kept.job.iter().filter(|(sequence, _)| *sequence > after).map(|(s, job)| entry(*s, What::Job(job.clone()))));
        entries.sort_by_key(|entry| entry.sequence);
        // What is left out comes after these, and is found when they have been read.
        entries.truncate(HANDED_OUT);
        entries.into()
    }

    /// What is kept is whole after a panic elsewhere.
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn line(to: &mut Vec<u8>, sequence: u64, event: Option<&Event>) -> Result<()> {
    let written = serde_json::to_writer(&mut *to, &Line { sequence, event });
    written.map_err(|error| Error::Internal(format!("an event has no JSON form: {error}")))?;
    to.push(b'\n');
    Ok(())
}

/// The step that an event is of.
fn step_of(event: &Event) -> Option<usize> {
    match event {
        Event::Step(step) => Some(step.step),
        Event::Evaluation { step, .. } => Some(*step),
        Event::Phase(_) | Event::Evaluated(_) | Event::Baseline(_) => None,
    }
}

// === impl Kept ===

impl Kept {
    /// Whether something was left out for it.
    fn add(&mut self, sequence: u64, event: Option<Event>) -> bool {
        self.last = self.last.max(sequence);
        match event {
            Some(event @ Event::Step(_)) => self.steps.push(sequence, event),
            Some(event @ Event::Evaluation { .. }) => self.evaluations.push(sequence, event),
            Some(Event::Phase(_) | Event::Evaluated(_) | Event::Baseline(_)) | None => false,
        }
    }

    /// Steps and evaluations after the number `after`, in order.
    fn events(&self, after: u64) -> impl Iterator<Item = (u64, &Event)> {
        let (mut steps, mut evaluations) = (self.steps.after(after).peekable(), self.evaluations.after(after).peekable());
        std::iter::from_fn(move || match (steps.peek(), evaluations.peek()) {
            (Some(step), Some(evaluation)) if step.0 < evaluation.0 => steps.next(),
            (Some(_), None) => steps.next(),
            _ => evaluations.next(),
        })
    }
}

// === impl Thinned ===

impl<const MOST: usize> Thinned<MOST> {
    /// Whether others were left out for it.
    fn push(&mut self, sequence: u64, event: Event) -> bool {
        let full = self.0.len() >= MOST;
        if full {
            let mut index = 0;
            self.0.retain(|_| {
                index += 1;
                index % 2 == 1
            });
        }
        self.0.push((sequence, event));
        full
    }

    fn after(&self, after: u64) -> impl Iterator<Item = (u64, &Event)> {
        let from = self.0.partition_point(|(sequence, _)| *sequence <= after);
        self.0[from..].iter().map(|(sequence, event)| (*sequence, event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: usize) -> Event {
        let json = serde_json::json!({ "step": {
            "step": step, "loss": 1.5, "lm_loss": 1.0, "losses": {}, "skipped": 0, "learning_rate": 0.1, "sharpness": 1.0, "loads": [],
            "tokens_per_second": 9.0, "eta_seconds": 1.0,
        } });
        serde_json::from_value(json).unwrap()
    }

    fn kept(path: &std::path::Path) -> Kept {
        let mut kept = Kept::default();
        for line in fs::read_to_string(path).unwrap().lines() {
            let Line { sequence, event } = serde_json::from_str::<Line<Event>>(line).unwrap();
            kept.add(sequence, event);
        }
        kept
    }

    fn evaluation(step: usize) -> Event {
        let json =
            serde_json::json!({ "evaluation": { "step": step, "figures": { "tokens": 9, "reference_perplexity": 2.0, "routings": [] } } });
        serde_json::from_value(json).unwrap()
    }

    #[tokio::test]
    async fn a_watcher_holds_a_part_of_the_history_at_a_time_and_reads_all_of_it() {
        let log = Arc::new(Log { path: "none".into(), kept: Mutex::default(), told: watch::Sender::default() });
        (1..=1000).for_each(|number| log.event(if number % 2 == 0 { step(number) } else { evaluation(number) }));
        log.close();
        let counts = |kept: &Kept| (kept.steps.0.len(), kept.evaluations.0.len());
        let (steps, evaluations) = counts(&log.lock());
        assert!(steps == 500 && evaluations <= KEPT_EVALUATIONS, "{steps}, {evaluations}");
        assert_eq!(log.after(0, 0).len(), HANDED_OUT);
        let expected: Vec<u64> = log.lock().events(0).map(|(sequence, _)| sequence).collect();
        let mut watch = log.watch(0);
        let mut read = Vec::new();
        while let Some(entry) = watch.next().await {
            assert!(watch.ready.len() < HANDED_OUT);
            read.push(entry.sequence);
        }
        assert!(read == expected && read.is_sorted());
    }

    #[test]
    fn a_long_history_is_thinned_in_memory_and_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("progress.jsonl");
        let log = Log { path: path.clone(), kept: Mutex::default(), told: watch::Sender::default() };
        log.resume(0).unwrap();
        (1..=10_000).for_each(|number| log.event(step(number)));
        let steps = |kept: &Kept| kept.events(0).map(|(_, event)| step_of(event).unwrap()).collect::<Vec<_>>();
        let told = steps(&log.lock());
        assert!(told.len() <= KEPT_STEPS && told.is_sorted(), "{}", told.len());
        assert_eq!((told[0], told[told.len() - 1]), (1, 10_000));
        assert_eq!(steps(&kept(&path)), told);
        // It goes on after an earlier step, with numbers that nobody has seen.
        log.resume(9_000).unwrap();
        assert!(steps(&log.lock()).iter().all(|step| *step <= 9_000));
        log.event(step(9_001));
        let last = kept(&path);
        assert_eq!((last.last, steps(&last).last()), (10_001, Some(&9_001)));
    }
}
