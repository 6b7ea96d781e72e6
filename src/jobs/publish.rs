//! Candidates become generations, and generations come into force.

use std::{
    fs,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::{MissedTickBehavior, interval};

use super::{
    Inner,
    audit::now,
    folder::{self, Current},
    guard::{Guarded, Reason, judge, live_gap},
    job::{Job, JobId, Who},
    live::{Live, lock},
    state::JobState,
};
use crate::{
    checkpoint::{self, Delta, RoutingBlock},
    durable,
    engine::{FIRST_GENERATION, Generation, InFlight, Switched},
    error::{Error, Result},
    memory,
    model::load::ServingModel,
    telemetry::metrics::{PublishOutcome, RollbackReason},
    tune::{evaluate::Figures, gates::Verdict},
};

/// How often a published generation is looked at.
const GUARD_PERIOD: Duration = Duration::from_millis(250);

/// Longest watch over one.
const MOST_WATCH_SECONDS: f64 = 86_400.0;

/// Puts the candidate of a job in force.
#[derive(Clone, Debug)]
pub struct Publish {
    /// The job.
    pub id: JobId,
    /// Also where a gate does not hold, or was measured under another routing than the one in force.
    pub override_gates: bool,
    /// What becomes of the requests inside.
    pub in_flight: InFlight,
    /// How long it is watched; `None`: as the server was told; 0: not at all.
    pub watch_seconds: Option<f64>,
    /// The routing in force where a request chooses none, as `--routing` spells it.
    pub serving: String,
    /// Who asks.
    pub who: Who,
}

/// Puts another generation in force.
#[derive(Clone, Debug)]
pub struct Rollback {
    /// Which; `None`: the one that the generation in force was made from.
    pub generation: Option<u64>,
    /// What becomes of the requests inside.
    pub in_flight: InFlight,
    /// Who asks.
    pub who: Who,
}

/// A generation that has come into force.
#[derive(Clone, Debug, PartialEq)]
pub struct Published {
    /// Its number.
    pub generation: u64,
    /// The one that was in force before.
    pub previous: u64,
    /// How the candidate stood at the gates; empty of a rollback.
    pub verdicts: Vec<Verdict>,
    /// Requests inside that end on older generations.
    pub staying: usize,
    /// Requests inside that go on under the new one.
    pub migrated: usize,
    /// How long the engine did nothing else, seconds.
    pub seconds: f64,
}

/// A generation that is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerationRecord {
    /// Names its weights, and no others, ever.
    pub number: u64,
    /// The generation that it was tuned from; `None` of the checkpoint.
    pub parent: Option<u64>,
    /// The job that made it; `None` of the checkpoint.
    pub job: Option<JobId>,
    /// When it first came into force, seconds since 1970; of the checkpoint, when the server was started.
    pub published: f64,
    /// Tensors that differ from the checkpoint.
    pub tensors: usize,
    /// Their size.
    pub bytes: u64,
    /// Figures on held-out text, under the gates.
    pub figures: Option<Figures>,
    /// Whether it is in force.
    #[serde(skip)]
    pub current: bool,
    /// Whether its weights are in memory.
    #[serde(skip)]
    pub resident: bool,
    /// Requests that have ended on it since the server was started.
    #[serde(skip)]
    pub requests: u64,
}

/// As what a generation is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Export {
    /// A checkpoint of its own, in the layout of the one that is served.
    Checkpoint,
    /// What differs from that one, in one file.
    Delta,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// A folder, or a file.
    pub path: PathBuf,
    /// Size of its weights.
    pub bytes: u64,
    /// Of the file with its weights.
    pub sha256: String,
}

/// A candidate that may come into force.
struct Candidate {
    live: Arc<Live>,
    job: Job,
    /// Why it should not, which is overridden.
    problem: Option<String>,
}

/// A generation on disk and in memory, before it comes into force.
pub(super) struct Prepared {
    pub(super) record: GenerationRecord,
    pub(super) model: ServingModel,
}

// === impl GenerationRecord ===

impl GenerationRecord {
    /// The weights as they were loaded.
    pub(super) fn checkpoint() -> Self {
        Self {
            number: FIRST_GENERATION,
            parent: None,
            job: None,
            published: now(),
            tensors: 0,
            bytes: 0,
            figures: None,
            current: false,
            resident: false,
            requests: 0,
        }
    }
}

impl Inner {
    // === publish ===

    pub(super) async fn publish(self: Arc<Self>, request: Publish) -> Result<Published> {
        let watched = self.watch_length(&request)?;
        let _switching = self.switching.lock().await;
        let asked = request.clone();
        let candidate = self.blocking(move |inner| inner.candidate(&asked)).await?;
        let outcome = if candidate.problem.is_none() { PublishOutcome::Published } else { PublishOutcome::Overridden };
        let result = self.put_in_force(&request, candidate, watched).await;
        self.engine.metrics().published(if result.is_ok() { outcome } else { PublishOutcome::Failed });
        if let Err(error) = &result {
            let why = error.to_string();
            self.blocking(move |inner| inner.discard(&request, &why)).await?;
        }
        result
    }

    fn watch_length(&self, request: &Publish) -> Result<Duration> {
        let Some(seconds) = request.watch_seconds else { return Ok(self.shelf.setup.guard.watch) };
        if (0.0..=MOST_WATCH_SECONDS).contains(&seconds) {
            return Ok(Duration::from_secs_f64(seconds));
        }
        Err(Error::invalid("watch_seconds", format!("{seconds} is not from 0 to {MOST_WATCH_SECONDS}, a day")))
    }

    /// Checks that the job has one which may be put in force.
    fn candidate(&self, request: &Publish) -> Result<Candidate> {
        let live = self.live(request.id)?;
        let (job, id) = (live.job(), request.id);
        if job.state != JobState::Done {
            let message =
                format!("job {id} is {}, and has no candidate: wait for its end, or stop it and keep what it has", job.state.name());
            return Err(Error::FailedPrecondition(message));
        }
        let book = lock(&self.book);
        if let Some(number) = job.generation.filter(|number| book.generations.contains_key(number)) {
            return Err(Error::FailedPrecondition(format!("job {id} was published as generation {number}: roll back to that one")));
        }
        let current = book.current.generation;
        drop(book);
        if job.base_generation != current {
            let base = job.base_generation;
            let message =
                format!("job {id} was begun on generation {base}, and {current} is in force: start another job, or roll back to {base}");
            return Err(Error::FailedPrecondition(message));
        }
        let problem = self.problem(&job, &request.serving);
        if let Some(problem) = &problem
            && !request.override_gates
        {
            self.engine.metrics().published(PublishOutcome::Refused);
            self.shelf.audit.note("publish refused", &request.who, json!({ "job": id, "why": problem, "verdicts": job.verdicts }));
            return Err(Error::FailedPrecondition(format!("{problem}, or override the gates")));
        }
        Ok(Candidate { live, job, problem })
    }

    /// Why a candidate should not come into force where requests are routed as `serving`, and what to do about it.
    fn problem(&self, job: &Job, serving: &str) -> Option<String> {
        let (id, measured) = (job.id, measured_under(job));
        if !job.verdicts.iter().all(|verdict| verdict.passed) {
            return Some(refusal(id, &job.verdicts));
        }
        (!self.serves(measured)).then(|| {
            format!(
                "the candidate of job {id} was measured under {measured}, and {serving} is in force: tune for {serving}, put {measured} in force"
            )
        })
    }

    /// Whether a routing is the one in force.
    fn serves(&self, routing: &str) -> bool {
        let choices = routing.parse().and_then(|rule| self.engine.spec().layer_choices(&rule, "serving"));
        choices.is_ok_and(|choices| self.engine.serves(&choices))
    }

    async fn put_in_force(self: &Arc<Self>, request: &Publish, candidate: Candidate, watched: Duration) -> Result<Published> {
        let Candidate { live, job, problem } = candidate;
        // What came of what it replaces, while that is still in force.
        let guarded = (!watched.is_zero()).then(|| Guarded {
            before: self.gap_before(&job),
            serving: request.serving.clone(),
            until: now() + watched.as_secs_f64(),
        });
        let prepared = {
            let (job, guarded) = (job.clone(), guarded.clone());
            self.blocking(move |inner| inner.prepare(&job, guarded.as_ref())).await?
        };
        let number = prepared.record.number;
        let switched = self.switch(number, prepared.model, request.in_flight, Some(prepared.record)).await?;
        let published = published(number, job.verdicts, switched);
        let about = json!({
            "job": request.id, "generation": number, "previous": published.previous, "overridden": problem,
            "verdicts": published.verdicts, "before": job.before, "after": job.latest,
        });
        let who = request.who.clone();
        self.blocking(move |inner| {
            inner.shelf.audit.note("publish", &who, about);
            if let Err(error) = live.conclude(|job| job.generation = Some(number), || {}) {
                tracing::warn!(job = %live.id, %error, "that a job was published stands in its generation only");
            }
            live.announce();
            inner.retain_generations();
            memory::give_back();
            Ok(())
        })
        .await?;
        if let Some(guarded) = guarded {
            self.watch_over(number, guarded);
        }
        Ok(published)
    }

    /// Takes a number, writes the generation of a candidate and builds its model.
    pub(super) fn prepare(&self, job: &Job, guarded: Option<&Guarded>) -> Result<Prepared> {
        // Of an earlier one, where that could not be done then.
        self.remove_pending()?;
        let delta = self.shelf.own(Delta::read(&folder::candidate(&self.shelf.folder.job(job.id)))?)?;
        let model = self.shelf.base.with_tensors(&delta.tensors)?;
        // The number is taken on disk before there is anything that it names.
        let current = lock(&self.book).current;
        let number = current.next;
        self.write_current(current.reserved())?;
        lock(&self.book).current = current.reserved();
        let dir = self.shelf.folder.generation(number);
        folder::make_dir(&dir)?;
        delta.write(&self.shelf.folder.delta(number))?;
        let record = GenerationRecord {
            number,
            parent: Some(job.base_generation),
            job: Some(job.id),
            published: now(),
            tensors: delta.tensors.len(),
            bytes: delta.tensors.values().map(|tensor| (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64).sum(),
            figures: job.latest.clone(),
            ..GenerationRecord::checkpoint()
        };
        if let Some(guarded) = guarded {
            durable::write_json(&folder::guard_json(&dir), guarded)?;
        }
        durable::write_json(&folder::generation_json(&dir), &record)?;
        Ok(Prepared { record, model })
    }

    /// Notes that a publish failed, and removes what is left of it. Its number is never used again.
    fn discard(&self, request: &Publish, why: &str) -> Result<()> {
        self.shelf.audit.note("publish failed", &request.who, json!({ "job": request.id, "error": why }));
        if let Err(error) = self.remove_pending() {
            tracing::warn!(%error, "what is left of a generation stays until the next publish or start");
        }
        Ok(())
    }

    /// Removes what is there of a generation that is not in force, once the disk is sure not to say that it is.
    pub(super) fn remove_pending(&self) -> Result<()> {
        let (current, unsure) = {
            let book = lock(&self.book);
            (book.current, book.unsure)
        };
        let Some(number) = current.pending else { return Ok(()) };
        if unsure {
            self.write_current(current)?;
        }
        let dir = self.shelf.folder.generation(number);
        folder::remove(&dir, &folder::generation_json(&dir))
    }

    // === rollback ===

    pub(super) async fn rollback(self: Arc<Self>, request: Rollback) -> Result<Published> {
        let _switching = self.switching.lock().await;
        let target = self.target(request.generation)?;
        let published = self.back_to(target, request.in_flight, &request.who, json!(null)).await?;
        self.engine.metrics().rolled_back(RollbackReason::Asked);
        Ok(published)
    }

    fn target(&self, asked: Option<u64>) -> Result<u64> {
        let book = lock(&self.book);
        let current = book.current.generation;
        let none = || Error::FailedPrecondition(format!("there is no generation before {current} to roll back to: name one"));
        let target = asked.map_or_else(|| book.previous().ok_or_else(none), Ok)?;
        if target == current {
            return Err(Error::FailedPrecondition(format!("generation {target} is in force already")));
        }
        if !book.generations.contains_key(&target) {
            return Err(Error::NotFound(format!("no generation {target}: ListGenerations has those that there are")));
        }
        Ok(target)
    }

    /// Puts a generation that is kept in force; `why` is for the audit log.
    async fn back_to(self: &Arc<Self>, number: u64, in_flight: InFlight, who: &Who, why: Value) -> Result<Published> {
        let model = self.blocking(move |inner| inner.model(number)).await?.0;
        let published = published(number, Vec::new(), self.switch(number, model, in_flight, None).await?);
        let about = json!({ "generation": number, "previous": published.previous, "why": why });
        let who = who.clone();
        self.blocking(move |inner| {
            inner.shelf.audit.note("rollback", &who, about);
            // Somebody wants it, whatever came of it before: a restart does not watch it again.
            if let Err(error) = folder::remove_file(&folder::guard_json(&inner.shelf.folder.generation(number))) {
                tracing::warn!(%error, generation = number, "a restart watches the generation once more");
            }
            memory::give_back();
            Ok(())
        })
        .await?;
        Ok(published)
    }

    // === the switch ===

    /// Puts `model` in force as `number`: on disk, then in the engine; where either fails the disk is as it was, if it can be written.
    pub(super) async fn switch(
        self: &Arc<Self>,
        number: u64,
        model: ServingModel,
        in_flight: InFlight,
        new: Option<GenerationRecord>,
    ) -> Result<Switched> {
        let before = lock(&self.book).current;
        let generation = Generation { number, weights: model.shared(), source: Some(Box::new(model.clone())) };
        let switched = match self.blocking(move |inner| inner.write_current(before.at(number))).await {
            Ok(()) => self.engine.publish(generation, in_flight).await,
            Err(error) => Err(error),
        };
        let switched = match switched {
            Ok(switched) => switched,
            Err(error) => {
                self.blocking(move |inner| {
                    inner.undo(before);
                    Ok(())
                })
                .await?;
                return Err(error);
            }
        };
        // Only now: who looks up what is in force finds it with its model.
        lock(&self.book).in_force(number, model, new);
        Ok(switched)
    }

    /// Where this fails the disk may say what it said before, or this.
    fn write_current(&self, current: Current) -> Result<()> {
        let written = durable::write_json(&self.shelf.folder.current(), &current);
        lock(&self.book).unsure = written.is_err();
        written
    }

    fn undo(&self, before: Current) {
        if let Err(error) = self.write_current(before) {
            let generation = before.generation;
            tracing::error!(%error, "the disk may not say that generation {generation} is in force: a restart may serve another one");
        }
    }

    /// Generations are kept up to a number, the newest, and whatever is needed.
    fn retain_generations(&self) {
        let old: Vec<u64> = {
            let mut book = lock(&self.book);
            let mut needed = vec![FIRST_GENERATION, book.current.generation];
            needed.extend(book.previous());
            needed.extend(book.jobs.values().map(|live| live.job()).filter(|job| !job.state.is_final()).map(|job| job.base_generation));
            let many = (book.generations.len() - 1).saturating_sub(self.shelf.setup.keep);
            let old: Vec<u64> = book.generations.keys().copied().filter(|number| !needed.contains(number)).take(many).collect();
            old.iter().for_each(|number| _ = book.generations.remove(number));
            old
        };
        for number in old {
            let dir = self.shelf.folder.generation(number);
            if let Err(error) = folder::remove(&dir, &folder::generation_json(&dir)) {
                tracing::warn!(%error, "an old generation stays on disk");
            }
        }
    }

    // === the guard ===

    /// Live gap of what is in force, where enough was measured; else that of the held-out text of the job, where it is of the same routing.
    fn gap_before(&self, job: &Job) -> Option<f64> {
        let held_out =
            || job.before.as_ref().and_then(Figures::serving).filter(|_| self.serves(measured_under(job))).map(|serving| serving.kl);
        live_gap(&self.engine.tally(job.base_generation)).or_else(held_out)
    }

    /// Goes on with the watch over the generation in force, which the end of the server has cut.
    pub(super) fn watch_again(self: &Arc<Self>) {
        let number = lock(&self.book).current.generation;
        match folder::read::<Guarded>(&folder::guard_json(&self.shelf.folder.generation(number))) {
            Ok(Some(guarded)) => self.watch_over(number, guarded),
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, generation = number, "the generation in force is not watched"),
        }
    }

    /// Watches a generation in force, as long as it is, and takes it back if it is worse.
    fn watch_over(self: &Arc<Self>, number: u64, guarded: Guarded) {
        let (inner, until) = (Arc::downgrade(self), Instant::now() + guarded.rest(MOST_WATCH_SECONDS));
        self.runtime.spawn(async move {
            let mut ticks = interval(GUARD_PERIOD);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            while Instant::now() < until {
                ticks.tick().await;
                let Some(inner) = inner.upgrade() else { return };
                let status = inner.engine.status();
                if status.generation != number || status.draining || !status.alive {
                    return;
                }
                // Gaps of two routings say nothing of each other.
                let before = guarded.before.filter(|_| inner.serves(&guarded.serving));
                if let Some(reason) = judge(before, &inner.engine.tally(number), &inner.shelf.setup.guard) {
                    return inner.take_back(number, reason).await;
                }
            }
        });
    }

    async fn take_back(self: Arc<Self>, number: u64, reason: Reason) {
        let _switching = self.switching.lock().await;
        let (current, previous) = {
            let book = lock(&self.book);
            (book.current.generation, book.previous())
        };
        let Some(previous) = previous.filter(|_| current == number) else { return };
        tracing::error!(generation = number, ?reason, "the generation is worse in use than what it replaced: rolling back to {previous}");
        match self.back_to(previous, InFlight::Finish, &Who::server("guard"), json!(reason)).await {
            Ok(_) => self.engine.metrics().rolled_back(match reason {
                Reason::Gap { .. } => RollbackReason::Gap,
                Reason::Errors { .. } => RollbackReason::Errors,
            }),
            Err(error) => tracing::error!(%error, generation = number, "the automatic rollback failed"),
        }
    }

    // === what there is ===

    /// All generations that are kept, oldest first.
    pub(super) fn generations(&self) -> Vec<GenerationRecord> {
        let book = lock(&self.book);
        let told = |record: &GenerationRecord| {
            let (number, tally) = (record.number, self.engine.tally(record.number));
            GenerationRecord {
                current: number == book.current.generation,
                resident: number == FIRST_GENERATION || book.models.contains_key(&number),
                requests: tally.finished + tally.failed,
                ..record.clone()
            }
        };
        book.generations.values().map(told).collect()
    }

    /// A generation, and how its routers were trained.
    pub(super) fn model(&self, number: u64) -> Result<(ServingModel, Option<RoutingBlock>)> {
        let known = lock(&self.book).models.get(&number).cloned();
        match known {
            Some(model) if number != FIRST_GENERATION => Ok((model, Some(self.shelf.delta(number)?.routing))),
            _ => self.shelf.model(number),
        }
    }

    /// Number and model of the generation in force.
    pub(super) fn current_model(&self) -> (u64, ServingModel) {
        let book = lock(&self.book);
        let number = book.current.generation;
        (number, book.models.get(&number).unwrap_or(&self.shelf.base).clone())
    }

    pub(super) fn export(&self, number: u64, form: Export, name: &str, who: &Who) -> Result<Exported> {
        check_name(name)?;
        if !lock(&self.book).generations.contains_key(&number) {
            return Err(Error::NotFound(format!("no generation {number}: ListGenerations has those that there are")));
        }
        if number == FIRST_GENERATION {
            let message = "generation 1 is the checkpoint that the server was started with: copy that";
            return Err(Error::FailedPrecondition(message.into()));
        }
        let path = self.shelf.folder.exports().join(name);
        if path.exists() {
            return Err(Error::FailedPrecondition(format!("{} is there already: choose another name", path.display())));
        }
        let weights = match form {
            Export::Checkpoint => {
                checkpoint::export(&self.shelf.checkpoint, &path, &self.shelf.delta(number)?)?;
                path.join("model.safetensors")
            }
            Export::Delta => {
                self.shelf.delta(number)?.write(&path)?;
                path.clone()
            }
        };
        let bytes = fs::metadata(&weights).map_err(|error| Error::io(&weights, error))?.len();
        let exported = Exported { sha256: durable::sha256(&weights)?, path, bytes };
        self.shelf.audit.note("export", who, json!({ "generation": number, "path": exported.path, "sha256": exported.sha256 }));
        Ok(exported)
    }
}

/// The routing that the figures of a job are of.
fn measured_under(job: &Job) -> &str {
    job.config.run.serving.as_deref().unwrap_or("native")
}

fn published(generation: u64, verdicts: Vec<Verdict>, switched: Switched) -> Published {
    let Switched { previous, staying, migrated, took } = switched;
    Published { generation, previous, verdicts, staying, migrated, seconds: took.as_secs_f64() }
}

fn refusal(id: JobId, verdicts: &[Verdict]) -> String {
    let failed = verdicts.iter().filter(|verdict| !verdict.passed);
    let failed: Vec<String> = failed.map(|v| format!("{} is {:.4} and may be {:.4}", v.gate, v.candidate, v.limit)).collect();
    format!("the candidate of job {id} is not better: {}; tune longer or otherwise", failed.join(", "))
}

/// One part of a path, of letters that mean the same everywhere.
fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !name.is_empty() && name.len() <= 100 && !name.starts_with(['.', '-']) && name.chars().all(plain) {
        return Ok(());
    }
    let message = format!("'{name}' is no name: letters, digits, '.', '_' and '-', at most 100, the first a letter, a digit or '_'");
    Err(Error::invalid("name", message))
}
