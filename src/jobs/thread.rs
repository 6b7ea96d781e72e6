//! The thread of a running job. All its tensors are made and dropped there, and it computes in turns that the engine gives it; with a
//! model on a device it does nothing to a tensor outside of them, but for what a turn that is refused, or a panic, leaves in the middle of a step.

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Instant,
};

use serde_json::json;

use super::{
    Inner,
    audit::now,
    control::STOPPED,
    folder,
    job::{Job, Who},
    live::{Live, Order},
    report,
    state::{Change, JobPhase, next},
};
use crate::{
    checkpoint::Delta,
    durable,
    engine::{FIRST_GENERATION, Share, Turns},
    error::{Error, ErrorKind, Result},
    memory,
    tune::{
        candidate::Candidate,
        data::Corpus,
        store::{self, Store},
        tuner::{Base, Ended, Event, Flow, Pace, Phase, Step, Tuner},
    },
};

/// Name of the thread, as the system shows it.
const THREAD_NAME: &str = "hardmax-tune";

/// Backward passes recurse over the graph.
const STACK_BYTES: usize = 64 << 20;

/// Detail of a job that somebody has paused.
const ASKED: &str = "paused as asked";

/// What became of a run.
#[derive(Debug)]
enum End {
    /// The candidate is on disk, and its tensors only there.
    Done(Box<Candidate>),
    /// It can go on; why it does not.
    Paused(String),
    /// The server ends: it goes on at the next start.
    Left,
    /// It was ended, and leaves nothing.
    Stopped,
    Failed(String),
}

/// Starts the thread of `live`, which has been given its order.
pub(super) fn spawn(inner: &Arc<Inner>, live: &Arc<Live>) -> Result<JoinHandle<()>> {
    let (inner, live) = (Arc::clone(inner), Arc::clone(live));
    let thread = thread::Builder::new().name(THREAD_NAME.into()).stack_size(STACK_BYTES).spawn(move || run(&inner, &live));
    thread.map_err(|error| Error::Internal(format!("the thread of a job cannot be started: {error}")))
}

fn run(inner: &Arc<Inner>, live: &Live) {
    let seat = Seat { inner, live, held: Cell::new(true) };
    let result = catch_unwind(AssertUnwindSafe(|| work(inner, live)));
    let result = result.unwrap_or_else(|_| Err(Error::Internal("the thread of the job panicked".into())));
    let end = judge(result, live.ordered(), inner.engine.status().alive);
    memory::give_back();
    settle(&seat, &end);
}

/// The place of the one that runs, and its share of the machine. It is given back when this is dropped, however that comes about.
struct Seat<'a> {
    inner: &'a Arc<Inner>,
    live: &'a Live,
    held: Cell<bool>,
}

impl Seat<'_> {
    /// Once: the next one on it may be the same job.
    fn give_back(&self) {
        if self.held.replace(false) {
            self.inner.release(self.live.id);
        }
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.give_back();
        self.live.end();
    }
}

/// What became of a run that has come to `result` under `order`.
fn judge(result: Result<End>, order: Order, engine_lives: bool) -> End {
    match result {
        Ok(end @ End::Done(_)) => end,
        // Nothing of it is wanted.
        _ if order == Order::Stop => End::Stopped,
        Ok(end) => end,
        Err(error) if error.kind() == ErrorKind::ResourceExhausted || durable::is_full(&error) => End::Paused(error.to_string()),
        // It is the engine that failed.
        Err(_) if !engine_lives => End::Left,
        Err(error) => End::Failed(error.to_string()),
    }
}

/// Writes down what became of the job, then lets others have the machine, then tells.
fn settle(seat: &Seat<'_>, end: &End) {
    let Seat { inner, live, .. } = seat;
    if let End::Left = end {
        seat.give_back();
        live.log.close();
        tracing::info!(job = %live.id, "the job goes on when the server is started again");
        return;
    }
    let at = now();
    let written = live.conclude(|job| ended(job, end, at), || seat.give_back());
    let job = live.job();
    match written.or_else(|error| retry(&live.dir, &error, || live.conclude(|_| {}, || {}))) {
        Err(error) => {
            tracing::error!(job = %live.id, %error, "what became of the job is not on disk: it goes on when the server is started again");
        }
        Ok(()) if job.state.is_final() => {
            if let Err(error) = folder::sweep(&live.dir) {
                tracing::warn!(job = %live.id, %error, "what an ended job needs no more stays on disk");
            }
        }
        Ok(()) => {}
    }
    let about = json!({ "job": job.id, "state": job.state, "detail": job.detail, "step": job.step, "verdicts": job.verdicts });
    inner.shelf.audit.note("job ended", &Who::server("job"), about);
    inner.show(&job);
    live.announce();
}

/// Tries once more to write what has failed with `error`, with all the room on disk that can be made: as long as the end of a job is not
/// there, it is to go on after a restart.
fn retry(dir: &Path, error: &Error, write: impl FnOnce() -> Result<()>) -> Result<()> {
    if durable::is_full(error) {
        folder::make_room(dir)?;
    }
    write()
}

fn ended(job: &mut Job, end: &End, at: f64) {
    let (change, detail) = match end {
        End::Done(candidate) => {
            (job.before, job.latest) = (Some(candidate.before.clone()), Some(candidate.after.clone()));
            job.verdicts.clone_from(&candidate.verdicts);
            (Change::Finish, format!("ended after {} steps: {}", candidate.steps, candidate.reason))
        }
        End::Paused(why) => (Change::Pause, why.clone()),
        End::Stopped => (Change::Stop, STOPPED.into()),
        End::Failed(why) => (Change::Fail, why.clone()),
        End::Left => return,
    };
    // A job with a thread runs, and may come to any of these.
    job.state = next(job.id, job.state, change).unwrap_or(job.state);
    job.ended = job.state.is_final().then_some(at);
    (job.phase, job.eta_seconds, job.detail) = (None, None, detail);
}

fn work(inner: &Arc<Inner>, live: &Live) -> Result<End> {
    let job = live.job();
    if job.share == Share::Exclusive {
        live.tell(|job| job.phase = Some(JobPhase::Draining));
        wait_for_requests(inner, live);
    }
    match live.ordered() {
        Order::Go | Order::Finish => {}
        Order::Pause => return Ok(End::Paused(ASKED.into())),
        Order::Stop => return Ok(End::Stopped),
        Order::Leave => return Ok(End::Left),
    }
    // Nothing is wrong with a job that cannot begin in these circumstances.
    let tuner = match prepare(inner, live, &job) {
        Ok(tuner) => tuner,
        Err(Error::Draining) => return Ok(End::Left),
        Err(error) => return Ok(End::Paused(error.to_string())),
    };
    let mut pace = EnginePace { turns: inner.engine.turns(), inner, live };
    let step_tokens = job.config.run.windows * tuner.plan().window;
    let mut teller = Teller { inner, live, step_tokens, skipped: job.skipped, last: None };
    match tuner.run(&mut pace, &mut |event| teller.hear(event))? {
        Ended::Paused => Ok(End::Paused(ASKED.into())),
        Ended::Left => Ok(End::Left),
        Ended::Done(mut candidate) => {
            live.tell(|job| job.phase = Some(JobPhase::Saving));
            save(inner, live, job.base_generation, &candidate)?;
            candidate.tensors.clear();
            Ok(End::Done(candidate))
        }
    }
}

/// Until no request is inside, or the job is to do something else.
fn wait_for_requests(inner: &Inner, live: &Live) {
    inner.runtime.block_on(async {
        tokio::select! {
            () = inner.engine.drained() => {}
            () = live.called() => {}
        }
    });
}

fn prepare(inner: &Inner, live: &Live, job: &Job) -> Result<Tuner> {
    let (model, routing) = in_place(inner, || inner.model(job.base_generation))?;
    let corpus = Corpus::load(&folder::tokens(&live.dir))?;
    // A number never names two sets of weights.
    let base = format!("{}/{}", inner.shelf.digest, job.base_generation);
    let recipe = store::recipe(&job.config, &base, &corpus.sha256, model.dtype())?;
    let store = Store::open(&live.dir, recipe)?;
    // What its text took while it was tokenised is free by now.
    memory::return_large_blocks();
    memory::give_back();
    let tuner = in_place(inner, || Tuner::new(Base { model, routing }, corpus, job.config.clone(), Some(store)))?;
    live.log.resume(tuner.done())?;
    if tuner.done() < job.step {
        tracing::info!(job = %live.id, from = tuner.done(), "steps after the last saved state are done again");
    }
    live.tell(|job| job.step = tuner.done());
    Ok(tuner)
}

/// `make`, which makes tensors: on a device in a turn.
fn in_place<T>(inner: &Inner, make: impl FnOnce() -> Result<T>) -> Result<T> {
    if inner.shelf.base.on_device() { inner.engine.turns().run(make)? } else { make() }
}

/// Writes the candidate with all that differs from the checkpoint: what its base had changed already, too.
fn save(inner: &Inner, live: &Live, base_generation: u64, candidate: &Candidate) -> Result<()> {
    let mut delta: Delta = candidate.delta(inner.shelf.digest.clone());
    if base_generation != FIRST_GENERATION {
        for (name, tensor) in inner.shelf.delta(base_generation)?.tensors {
            delta.tensors.entry(name).or_insert(tensor);
        }
    }
    delta.write(&folder::candidate(&live.dir))
}

/// Computes when the engine lets it.
struct EnginePace<'a> {
    turns: Turns,
    inner: &'a Inner,
    live: &'a Live,
}

impl Pace for EnginePace<'_> {
    fn turn(&mut self, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        if self.live.ordered() == Order::Stop {
            // Nothing is to be saved: it need not come to the next step.
            return Err(Error::Draining);
        }
        let (result, took) = self.turns.run(|| {
            let begun = Instant::now();
            // What a device is still at when a turn ends would be paid for by requests.
            let result = work().and_then(|()| self.inner.shelf.base.synchronize());
            (result, begun.elapsed())
        })?;
        self.inner.engine.metrics().turn(took);
        result
    }

    fn release(&mut self, drop: &mut dyn FnMut()) {
        // Without an engine there is nobody to wait for.
        if self.turns.run(&mut *drop).is_err() {
            drop();
        }
    }

    fn flow(&mut self) -> Flow {
        match self.live.ordered() {
            // The next turn ends it.
            Order::Go | Order::Stop => Flow::Go,
            Order::Pause => Flow::Pause,
            Order::Finish => Flow::Finish,
            Order::Leave => Flow::Leave,
        }
    }
}

/// Passes on what a run tells.
struct Teller<'a> {
    inner: &'a Inner,
    live: &'a Live,
    step_tokens: usize,
    /// Steps that were skipped so far.
    skipped: usize,
    last: Option<Step>,
}

impl Teller<'_> {
    fn hear(&mut self, event: Event) {
        match event {
            Event::Phase(phase) => {
                let phase = Some(phase_of(phase));
                if self.live.job().phase != phase {
                    self.live.tell(|job| job.phase = phase);
                }
            }
            Event::Evaluated(_) => {}
            Event::Baseline(figures) => self.figures(|job| job.before = Some(figures.clone())),
            Event::Step(step) => self.step(step),
            Event::Evaluation { step, figures } => {
                self.live.log.event(Event::Evaluation { step, figures: figures.clone() });
                self.figures(|job| job.latest = Some(figures.clone()));
            }
        }
    }

    /// Also on disk: they are not measured again.
    fn figures(&self, edit: impl Fn(&mut Job)) {
        if let Err(error) = self.live.conclude(edit, || {}) {
            tracing::warn!(job = %self.live.id, %error, "figures of a job are not on disk");
        }
        self.live.announce();
        self.show();
    }

    fn step(&mut self, step: Step) {
        let skipped = step.skipped > self.skipped;
        self.skipped = step.skipped;
        self.live.note(|job| (job.step, job.skipped, job.eta_seconds) = (step.step, step.skipped, Some(step.eta_seconds)));
        self.inner.engine.metrics().tuning_step(if skipped { 0 } else { self.step_tokens }, skipped);
        self.live.log.event(Event::Step(step.clone()));
        self.last = Some(step);
        self.show();
    }

    fn show(&self) {
        self.inner.engine.metrics().tuning(&report::snapshot(&self.live.job(), self.last.as_ref()));
    }
}

fn phase_of(phase: Phase) -> JobPhase {
    match phase {
        Phase::Baseline => JobPhase::Baseline,
        Phase::Training => JobPhase::Training,
        Phase::Evaluating => JobPhase::Evaluating,
        Phase::Saving => JobPhase::Saving,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_job_whose_end_is_not_on_disk_can_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let states = ["state-00000002-b.safetensors", "state-00000004-a.safetensors"];
        for name in ["job.json", "tokens.bin", "lock", "progress.jsonl", states[0], states[1]] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        let there = |name: &str| dir.path().join(name).exists();
        let full = || Error::DiskFull { path: "job.json".into() };
        let broken = Error::Internal("a panic".into());
        assert!(retry(dir.path(), &broken, || Err(full())).is_err() && states.into_iter().all(there), "no room was missing");
        let asked = || {
            assert!(!there(states[0]), "there is more room than before");
            Err(full())
        };
        assert!(retry(dir.path(), &full(), asked).is_err());
        assert!(there("tokens.bin") && there(states[1]), "what it needs to go on");
        assert!(retry(dir.path(), &full(), || Ok(())).is_ok());
    }

    #[test]
    fn a_full_disk_or_a_dead_engine_is_no_fault_of_the_job() {
        let full = || Err(Error::DiskFull { path: "state".into() });
        let broken = || Err(Error::Internal("a panic".into()));
        assert!(matches!(judge(full(), Order::Go, true), End::Paused(why) if why.contains("the disk is full")));
        assert!(matches!(judge(full(), Order::Leave, true), End::Paused(_)));
        assert!(matches!(judge(full(), Order::Stop, true), End::Stopped));
        assert!(matches!(judge(broken(), Order::Go, true), End::Failed(why) if why.starts_with("a panic")));
        assert!(matches!(judge(broken(), Order::Go, false), End::Left));
        assert!(matches!(judge(Ok(End::Left), Order::Leave, true), End::Left));
        assert!(matches!(judge(Ok(End::Left), Order::Stop, true), End::Stopped), "the turns of one that is stopped are refused");
        assert!(matches!(judge(Ok(End::Paused(ASKED.into())), Order::Stop, true), End::Stopped));
    }
}
