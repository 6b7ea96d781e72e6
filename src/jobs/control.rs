//! Jobs are started, paused, resumed and ended; one runs at a time.

use std::{pin::Pin, sync::Arc};

use serde_json::json;

use super::{
    Inner,
    audit::now,
    folder::{self, JobFile},
    job::{Job, JobId, Who},
    live::{Live, Order, lock},
    report,
    state::{Change, JobState, next},
    thread,
};
use crate::{
    durable,
    engine::Share,
    error::{Error, Result},
    model::{load::ServingModel, weights::ModelWeights},
    tune::{config::TuneConfig, data::Corpus, memory::MemoryPlan, plan::TunePlan},
};

/// Detail of a job that has ended without a candidate because somebody wanted that.
pub(super) const STOPPED: &str = "stopped without a candidate";

/// A wish that a job has been told.
pub(super) struct Asked {
    live: Arc<Live>,
    /// Resolves once it has come about.
    ended: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Asked {
    fn now(live: &Arc<Live>, order: Order) -> Self {
        let asked = Self { live: Arc::clone(live), ended: Box::pin(live.ended()) };
        live.order(order);
        asked
    }

    /// The job, once it has come about.
    ///
    /// # Errors
    /// `Draining` where the server ends first.
    pub(super) async fn done(self) -> Result<Job> {
        self.ended.await;
        let job = self.live.job();
        // Its thread is gone, and it is to go on.
        if job.state == JobState::Running { Err(Error::Draining) } else { Ok(job) }
    }
}

impl Inner {
    /// The checked settings over the generation in force, and what they take with so many tokens.
    pub(super) fn plan(&self, config: &TuneConfig, tokens: usize) -> Result<(u64, TunePlan, MemoryPlan, Arc<ModelWeights>)> {
        let (generation, model) = self.current_model();
        let weights = tensors(&model)?;
        let plan = config.plan(model.spec(), &weights)?;
        let memory = config.memory(model.spec(), &weights, &plan, tokens);
        self.check_memory(config, &memory)?;
        Ok((generation, plan, memory, weights))
    }

    fn check_memory(&self, config: &TuneConfig, plan: &MemoryPlan) -> Result<()> {
        let allowed = [self.shelf.setup.max_memory, config.run.max_memory_bytes];
        plan.check(allowed.into_iter().flatten().min(), self.shelf.base.on_device())
    }

    /// Fails where a job runs, or the server ends.
    pub(super) fn check_free(&self) -> Result<()> {
        lock(&self.book).check_free()
    }

    pub(super) fn start(self: &Arc<Self>, config: TuneConfig, share: Share, corpus: &Corpus, who: Who) -> Result<Job> {
        share.check()?;
        let id = self.claim_new()?;
        let started = self.begin(id, config, share, corpus, who);
        if started.is_err() {
            self.release(id);
            lock(&self.book).jobs.remove(&id);
            let dir = self.shelf.folder.job(id);
            if let Err(error) = folder::remove(&dir, &folder::job_json(&dir)) {
                tracing::warn!(%error, "what is left of a job that was not started stays");
            }
        }
        self.count_jobs();
        started
    }

    fn begin(self: &Arc<Self>, id: JobId, config: TuneConfig, share: Share, corpus: &Corpus, who: Who) -> Result<Job> {
        let most = self.shelf.setup.max_tokens;
        let tokens = corpus.train.len() + corpus.heldout.len();
        if tokens > most {
            return Err(Error::out_of_range("data", format!("{tokens} tokens are more than the {most} that this server takes")));
        }
        let (base_generation, plan, memory, weights) = self.plan(&config, tokens)?;
        let learns = |(name, tensor): &(String, &candle_core::Tensor)| plan.selection.names.contains(name).then(|| tensor.elem_count());
        let trained_parameters = weights.named().iter().filter_map(learns).sum::<usize>() as u64;
        let job = Job {
            id,
            state: JobState::Running,
            phase: None,
            detail: String::new(),
            steps: config.run.steps,
            config,
            share,
            base_generation,
            generation: None,
            created: now(),
            ended: None,
            step: 0,
            skipped: 0,
            train_tokens: corpus.train.len() as u64,
            heldout_tokens: corpus.heldout.len() as u64,
            data_sha256: corpus.sha256.clone(),
            memory,
            before: None,
            latest: None,
            verdicts: Vec::new(),
            trained: plan.selection.names.into_iter().collect(),
            trained_parameters,
            eta_seconds: None,
        };
        let dir = self.shelf.folder.job(id);
        folder::make_dir(&dir)?;
        corpus.write(&folder::tokens(&dir))?;
        let file = JobFile::new(who.clone(), job.clone());
        durable::write_json(&folder::job_json(&dir), &file)?;
        let live = Live::open(dir, file);
        let about =
            json!({ "job": id, "config": job.config, "share": share, "base_generation": base_generation, "data_sha256": job.data_sha256 });
        self.shelf.audit.note("start", &who, about);
        self.launch(&live, Order::Go)?;
        Ok(job)
    }

    pub(super) fn pause(&self, id: JobId, who: &Who) -> Result<Asked> {
        let live = self.live(id)?;
        let _deciding = lock(&live.deciding);
        next(id, live.job().state, Change::Pause)?;
        self.shelf.audit.note("pause", who, json!({ "job": id }));
        Ok(Asked::now(&live, Order::Pause))
    }

    pub(super) fn stop(self: &Arc<Self>, id: JobId, keep: bool, who: &Who) -> Result<Asked> {
        let live = self.live(id)?;
        let _deciding = lock(&live.deciding);
        let (order, change) = if keep { (Order::Finish, Change::Finish) } else { (Order::Stop, Change::Stop) };
        let state = live.job().state;
        next(id, state, change)?;
        self.shelf.audit.note("stop", who, json!({ "job": id, "keep": keep }));
        if state == JobState::Paused {
            if keep { self.run_again(&live, None, order)? } else { self.stop_paused(&live)? }
        }
        Ok(Asked::now(&live, order))
    }

    pub(super) fn resume(self: &Arc<Self>, id: JobId, share: Option<Share>, who: &Who) -> Result<Job> {
        let live = self.live(id)?;
        let _deciding = lock(&live.deciding);
        share.map_or(Ok(()), Share::check)?;
        match (live.job().state, share) {
            (JobState::Running, Some(share)) => self.set_share(&live, share)?,
            _ => self.run_again(&live, share, Order::Go)?,
        }
        self.shelf.audit.note("resume", who, json!({ "job": id, "share": share }));
        Ok(live.job())
    }

    /// Gives a paused job a thread again.
    fn run_again(self: &Arc<Self>, live: &Arc<Live>, share: Option<Share>, order: Order) -> Result<()> {
        let (id, job) = (live.id, live.job());
        let change = if order == Order::Finish { Change::Finish } else { Change::Resume };
        next(id, job.state, change)?;
        self.check_memory(&job.config, &job.memory)?;
        self.claim(id)?;
        let edit = |job: &mut Job| {
            (job.state, job.phase, job.detail) = (JobState::Running, None, String::new());
            job.share = share.unwrap_or(job.share);
        };
        if let Err(error) = live.change(edit).and_then(|()| self.launch(live, order)) {
            self.release(id);
            self.put_back(live, error.to_string());
            return Err(error);
        }
        self.count_jobs();
        Ok(())
    }

    /// A job that could not be resumed is as it was.
    fn put_back(&self, live: &Live, why: String) {
        if live.job().state != JobState::Running {
            return;
        }
        let paused = |job: &mut Job| (job.state, job.detail) = (JobState::Paused, why.clone());
        if let Err(error) = live.conclude(paused, || {}) {
            tracing::warn!(job = %live.id, %error, "that a job is paused is not on disk: it goes on when the server is started again");
        }
        live.announce();
    }

    fn set_share(&self, live: &Live, share: Share) -> Result<()> {
        live.change_running(|job| job.share = share)?;
        let book = lock(&self.book);
        if book.running == Some(live.id) { self.engine.set_share(Some(share)) } else { Ok(()) }
    }

    /// Goes on with what ran when the server ended.
    pub(super) fn go_on(self: &Arc<Self>) {
        let running = lock(&self.book).jobs.values().find(|live| live.job().state == JobState::Running).cloned();
        let Some(live) = running else { return };
        match self.claim(live.id).and_then(|()| self.launch(&live, Order::Go)) {
            Ok(()) => tracing::info!(job = %live.id, "the job goes on"),
            Err(error) => {
                self.release(live.id);
                self.put_back(&live, error.to_string());
            }
        }
    }

    /// Ends a job that has no thread.
    fn stop_paused(&self, live: &Live) -> Result<()> {
        let ended = Some(now());
        let stop = || live.change(|job| (job.state, job.detail, job.ended) = (JobState::Stopped, STOPPED.into(), ended));
        // Where the disk is full, what it no longer needs makes room.
        stop().or_else(|error| if durable::is_full(&error) { folder::sweep(&live.dir).and(stop()) } else { Err(error) })?;
        folder::sweep(&live.dir)?;
        self.show(&live.job());
        Ok(())
    }

    /// The place of the one that runs, for a job that has no number yet.
    fn claim_new(&self) -> Result<JobId> {
        let mut book = lock(&self.book);
        book.check_free()?;
        let id = JobId(book.next_job);
        (book.next_job, book.running) = (id.0 + 1, Some(id));
        Ok(id)
    }

    /// The place of the one that runs.
    fn claim(&self, id: JobId) -> Result<()> {
        let mut book = lock(&self.book);
        book.check_free()?;
        book.running = Some(id);
        Ok(())
    }

    /// Gives that place back, and the machine to requests.
    pub(super) fn release(&self, id: JobId) {
        let mut book = lock(&self.book);
        if book.running == Some(id) {
            book.running = None;
            // An engine that has stopped gives nothing to anybody.
            let _ = self.engine.set_share(None);
        }
    }

    fn launch(self: &Arc<Self>, live: &Arc<Live>, order: Order) -> Result<()> {
        let mut book = lock(&self.book);
        if book.leaving {
            return Err(Error::Draining);
        }
        self.engine.set_share(Some(live.job().share))?;
        book.jobs.insert(live.id, Arc::clone(live));
        live.begin(order);
        book.thread = Some(thread::spawn(self, live).inspect_err(|_| live.end())?);
        Ok(())
    }

    pub(super) fn leave(&self) {
        let (running, thread) = {
            let mut book = lock(&self.book);
            book.leaving = true;
            (book.running.and_then(|id| book.jobs.get(&id).cloned()), book.thread.take())
        };
        if let Some(live) = running {
            live.order(Order::Leave);
        }
        if let Some(thread) = thread {
            // What it did not survive it has told.
            let _ = thread.join();
        }
        lock(&self.book).jobs.values().for_each(|live| live.log.close());
    }

    /// Finished jobs are kept up to a number, those that ended last: `last` is the very last, whatever the clock says.
    fn retain_jobs(&self, last: JobId) {
        let old: Vec<Arc<Live>> = {
            let mut book = lock(&self.book);
            let mut finished: Vec<Job> = book.jobs.values().map(|live| live.job()).filter(|job| job.state.is_final()).collect();
            finished.sort_by(|a, b| a.ended.unwrap_or(0.0).total_cmp(&b.ended.unwrap_or(0.0)));
            let many = finished.len().saturating_sub(self.shelf.setup.keep);
            finished.iter().filter(|job| job.id != last).take(many).filter_map(|job| book.jobs.remove(&job.id)).collect()
        };
        for live in old {
            if let Err(error) = folder::remove(&live.dir, &folder::job_json(&live.dir)) {
                tracing::warn!(%error, "an old job stays on disk");
            }
        }
    }

    /// Shows that a job has come to a halt.
    pub(super) fn show(&self, job: &Job) {
        self.engine.metrics().tuning(&report::snapshot(job, None));
        self.retain_jobs(job.id);
        self.count_jobs();
    }

    pub(super) fn count_jobs(&self) {
        let jobs = self.jobs();
        self.engine.metrics().set_tuning_jobs(|of| jobs.iter().filter(|job| report::state(job.state) == of).count());
    }

    /// All jobs, oldest first.
    pub(super) fn jobs(&self) -> Vec<Job> {
        let jobs: Vec<Arc<Live>> = lock(&self.book).jobs.values().cloned().collect();
        jobs.iter().map(|live| live.job()).collect()
    }

    pub(super) fn live(&self, id: JobId) -> Result<Arc<Live>> {
        lock(&self.book)
            .jobs
            .get(&id)
            .cloned()
            .ok_or_else(|| Error::NotFound(format!("no job '{id}': ListTunings has those that there are")))
    }
}

/// Of a model that can be tuned.
fn tensors(model: &ServingModel) -> Result<Arc<ModelWeights>> {
    let weights = model.weights().map(Arc::clone);
    weights.ok_or_else(|| Error::FailedPrecondition("8-bit weights cannot be tuned: start the server with --dtype f32 or bf16".into()))
}
