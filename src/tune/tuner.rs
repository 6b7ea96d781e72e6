//! A run from start to candidate.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use candle_core::{Device, Tensor};

pub use super::record::{Event, Phase, Step};
use super::{
    candidate::{Candidate, fidelity_record, routing_block},
    config::{Recompute, TuneConfig},
    data::{self, Corpus},
    evaluate::{Evaluation, Figures},
    gates::judge,
    memory::MemoryPlan,
    plan::TunePlan,
    store::{Best, Progress, Saved, Store},
    teacher::{Taught, Teacher},
};
use crate::{
    checkpoint::RoutingBlock,
    error::{Error, Result},
    memory,
    model::{load::ServingModel, weights::ModelWeights},
    moe::{RoutingStats, loss::AuxLoss},
    schedule::learning_rate,
    train::{
        data::windows,
        learner::{Distillation, Learner, Micro, Start, StepReport, Text, in_turn},
        optimizer::Outcome,
        trainable::{Parameter, Part, Trainable},
    },
};

/// The model that a run starts from.
#[derive(Clone, Debug)]
pub struct Base {
    /// As it is served.
    pub model: ServingModel,
    /// How the checkpoint says that it was trained.
    pub routing: Option<RoutingBlock>,
}

/// What a run is to do next. It is asked before every step and every window of an evaluation; but for `Go`, the answer stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The next step.
    Go,
    /// Save the state and leave.
    Pause,
    /// No more steps: evaluate what there is.
    Finish,
    /// Save the state and leave, because the process ends.
    Leave,
}

/// When a run computes, and how far it goes.
///
/// A model on a device shares its one stream with whoever serves, who may be recording what goes there. So with tensors of a device a run does
/// nothing outside of turns: it makes them, copies them to the host and drops them there too, and only host tensors leave a turn. What
/// is relied on: one stream for all threads, so that what one thread has launched precedes what the next one launches, and a turn
/// that ends before the other thread goes on.
pub trait Pace {
    /// Calls `work` once, when the machine is the run's. All computing is in turns, none of which waits for anything: one forward and
    /// backward of some windows, one update, one window of an evaluation under one routing. Files and hashing are outside.
    ///
    /// # Errors
    /// Those of `work`; [`Error::Draining`] where there will be no more turns, which ends the run as [`Flow::Leave`] does, but
    /// without saving: its last state is on disk.
    fn turn(&mut self, work: &mut dyn FnMut() -> Result<()>) -> Result<()>;

    /// Calls `drop`, which drops tensors of a device, once: in a turn, also where [`Pace::turn`] refuses them to a run that is to end, or at
    /// once where nobody else computes any more.
    fn release(&mut self, drop: &mut dyn FnMut()) {
        drop();
    }

    /// What is to be done next.
    fn flow(&mut self) -> Flow;
}

/// Nobody else needs the machine.
#[derive(Clone, Copy, Debug)]
pub struct AtOnce;

impl Pace for AtOnce {
    fn turn(&mut self, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        work()
    }

    fn flow(&mut self) -> Flow {
        Flow::Go
    }
}

/// How a run ended.
#[derive(Debug)]
pub enum Ended {
    /// With a candidate.
    Done(Box<Candidate>),
    /// Where it was asked to pause; its state is in the store.
    Paused,
    /// Where it was asked to leave; its state is in the store.
    Left,
}

/// Why a stage of a run has not come to its end.
enum Stop {
    Failed(Error),
    Pause,
    Leave,
    /// In the middle of a step, of which nothing may be saved.
    Cut,
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        match error {
            Error::Draining => Self::Cut,
            error => Self::Failed(error),
        }
    }
}

/// A run.
#[derive(Debug)]
pub struct Tuner {
    base: Base,
    weights: Arc<ModelWeights>,
    corpus: Corpus,
    config: TuneConfig,
    plan: TunePlan,
    memory: MemoryPlan,
    learner: Learner,
    teacher: Option<Teacher>,
    progress: Progress,
    /// With early stopping: the best tensors so far, as they would be served.
    best: Option<BTreeMap<String, Tensor>>,
    store: Option<Store>,
}

/// Who is told.
pub type Tell<'a> = dyn FnMut(Event) + 'a;

/// Says which phase begins. What the one before has freed goes back to the system: the next makes blocks of other sizes.
fn begin(phase: Phase, tell: &mut Tell<'_>) {
    memory::give_back();
    tell(Event::Phase(phase));
}

impl Tuner {
    /// Checks everything, and copies the tensors that learn. With a store, goes on from the newest state in it, and saves there.
    ///
    /// With a model on a device it is a turn's work: see [`Pace`].
    ///
    /// # Errors
    /// Those of [`TuneConfig::plan`]; `FailedPrecondition` for 8-bit weights, and where there is not enough memory; `InvalidArgument` on `data` where a token is none of the
    /// model's, or there is too little text for the window.
    pub fn new(base: Base, corpus: Corpus, config: TuneConfig, store: Option<Store>) -> Result<Self> {
        let spec = Arc::clone(base.model.spec());
        let Some(weights) = base.model.weights().map(Arc::clone) else {
            return Err(Error::FailedPrecondition("8-bit weights cannot be tuned: load the model with --dtype f32 or bf16".into()));
        };
        let plan = config.plan(&spec, &weights)?;
        if let Some(token) = corpus.train.iter().chain(&corpus.heldout).find(|&&token| token as usize >= spec.vocab_size) {
            return Err(data::unknown("data", *token, spec.vocab_size));
        }
        if corpus.train.len() <= plan.window {
            let message = format!("{} tokens do not fill one window of {}", corpus.train.len(), plan.window);
            return Err(Error::invalid("data", message));
        }
        let memory = config.memory(&spec, &weights, &plan, corpus.train.len() + corpus.heldout.len());
        memory.check(config.run.max_memory_bytes, base.model.on_device())?;
        let model = Trainable::over(&weights, &plan.selection.names)?;
        scale_routers(&model, 1.0 / plan.temperature)?;
        let mut learner = Learner::over(Start {
            spec: Arc::clone(&spec),
            plan: plan.routing.clone(),
            optimizer: plan.optimizer.clone(),
            expert_rate: plan.expert_rate,
            seed: config.run.seed,
            model,
            served: Arc::clone(&plan.served),
            recompute: config.run.recompute == Recompute::Layer,
        })?;
        let of_reference = (plan.reference, plan.temperature);
        let teacher = config.distill.map(|_| Teacher::new(&spec, &weights, learner.kernel(), of_reference)).transpose()?;
        let (mut progress, mut best) = (Progress::default(), None);
        if let Some(saved) = store.as_ref().map(Store::load).transpose()?.flatten() {
            learner.reinstate(saved.captured)?;
            (progress, best) = (saved.progress, saved.best);
        }
        Ok(Self { base, weights, corpus, config, plan, memory, learner, teacher, progress, best, store })
    }

    /// The run, checked.
    pub fn plan(&self) -> &TunePlan {
        &self.plan
    }

    /// What it takes at most.
    pub fn memory(&self) -> &MemoryPlan {
        &self.memory
    }

    /// Steps that an earlier run has done.
    pub fn done(&self) -> usize {
        self.progress.step
    }

    /// Values that learn.
    pub fn parameters(&self) -> usize {
        self.learner.model().len()
    }

    /// Trains to the last step, or until the time is up, nothing gets better any more or `pace` says so, and evaluates before and after.
    ///
    /// # Errors
    /// `FailedPrecondition` once `run.skip_limit` steps in a row had no finite gradients; `DiskFull` where the state cannot be saved.
    pub fn run(mut self, pace: &mut dyn Pace, tell: &mut Tell<'_>) -> Result<Ended> {
        let ended = match self.stages(pace, tell) {
            Ok(candidate) => Ok(Ended::Done(Box::new(candidate))),
            Err(Stop::Failed(error)) => Err(error),
            Err(Stop::Cut) => Ok(Ended::Left),
            Err(Stop::Pause) => self.save(pace, tell).map(|()| Ended::Paused),
            Err(Stop::Leave) => self.save(pace, tell).map(|()| Ended::Left),
        };
        if self.base.model.on_device() {
            let mut own = Some(self);
            pace.release(&mut || drop(own.take()));
        }
        ended
    }

    /// `work` on tensors that is no computing to speak of: with those of a device in a turn, else at once.
    fn touch<T>(&self, pace: &mut dyn Pace, work: impl FnOnce() -> Result<T>) -> Result<T> {
        match self.base.model.on_device() {
            true => in_turn(&mut |work: &mut dyn FnMut() -> Result<()>| pace.turn(work), work),
            false => work(),
        }
    }

    /// Drops what holds tensors, whatever came of it.
    fn release<T>(&self, pace: &mut dyn Pace, value: T) {
        if self.base.model.on_device() {
            let mut value = Some(value);
            pace.release(&mut || drop(value.take()));
        }
    }

    fn stages(&mut self, pace: &mut dyn Pace, tell: &mut Tell<'_>) -> Result<Candidate, Stop> {
        let before = self.baseline(pace, tell)?;
        begin(Phase::Training, tell);
        let reason = self.train(pace, tell)?;
        begin(Phase::Evaluating, tell);
        let (tensors, steps) = match (self.best.clone(), &self.progress.best) {
            (Some(tensors), Some(best)) => (tensors, best.step),
            _ => (self.touch(pace, || self.tensors())?, self.progress.step),
        };
        let model = self.touch(pace, || self.base.model.with_tensors(&tensors))?;
        let after = self.figures(&model, usize::MAX, pace, tell);
        self.release(pace, model);
        let after = after?;
        let mut routing = routing_block(self.base.routing.as_ref(), &self.plan, &self.config.routing.estimator, steps);
        routing.fidelity = fidelity_record(&after, &self.corpus.sha256);
        let verdicts = judge(&self.config.gates, &before, &after);
        Ok(Candidate { tensors, routing, before, after, verdicts, steps, reason })
    }

    /// Figures of the model before: those of the state, where it has them.
    fn baseline(&mut self, pace: &mut dyn Pace, tell: &mut Tell<'_>) -> Result<Figures, Stop> {
        let figures = match self.progress.before.clone() {
            Some(figures) => figures,
            None => {
                begin(Phase::Baseline, tell);
                self.figures(&self.base.model, usize::MAX, pace, tell)?
            }
        };
        self.progress.before = Some(figures.clone());
        tell(Event::Baseline(figures.clone()));
        Ok(figures)
    }

    /// Steps, with evaluations and states on the way; why there are no more.
    fn train(&mut self, pace: &mut dyn Pace, tell: &mut Tell<'_>) -> Result<&'static str, Stop> {
        let (start, first) = (Instant::now(), self.progress.step);
        loop {
            if self.evaluation_is_due() {
                self.evaluate(pace, tell)?;
            }
            let reason = match (self.why_end(), pace.flow()) {
                (_, Flow::Pause) => return Err(Stop::Pause),
                (_, Flow::Leave) => return Err(Stop::Leave),
                (None, Flow::Go) => None,
                (None, Flow::Finish) => Some("asked"),
                (reason, _) => reason,
            };
            if let Some(reason) = reason {
                self.save(pace, tell)?;
                return Ok(reason);
            }
            let began = Instant::now();
            let mut step = self.one_step(pace)?;
            self.progress.seconds += began.elapsed().as_secs_f64();
            let (done, all) = (self.progress.step, self.config.run.steps);
            step.eta_seconds = start.elapsed().as_secs_f64() / (done - first) as f64 * (all - done) as f64;
            tell(Event::Step(step));
            self.check_skips()?;
            if done.is_multiple_of(self.config.run.save_every) && done < all {
                self.save(pace, tell)?;
                begin(Phase::Training, tell);
            }
        }
    }

    /// Before the last step as often as asked for; at it where the best counts, and not the last.
    fn evaluation_is_due(&self) -> bool {
        let Progress { step, evaluated, .. } = self.progress;
        let due = if step == self.config.run.steps { self.config.stop.is_some() } else { step.is_multiple_of(self.config.run.eval_every) };
        due && step > evaluated
    }

    fn evaluate(&mut self, pace: &mut dyn Pace, tell: &mut Tell<'_>) -> Result<(), Stop> {
        begin(Phase::Evaluating, tell);
        let step = self.progress.step;
        let model = self.touch(pace, || self.base.model.with_tensors(&self.lent()?))?;
        let figures = self.figures(&model, self.config.run.eval_tokens, pace, tell);
        self.release(pace, model);
        let figures = figures?;
        self.progress.evaluated = step;
        self.compare_with_best(&figures, pace)?;
        tell(Event::Evaluation { step, figures });
        begin(Phase::Training, tell);
        Ok(())
    }

    fn compare_with_best(&mut self, figures: &Figures, pace: &mut dyn Pace) -> Result<()> {
        let (Some(stop), Some(serving)) = (self.config.stop, figures.serving()) else { return Ok(()) };
        let loss = serving.perplexity.ln();
        let better = self.progress.best.as_ref().is_none_or(|best| loss < best.loss - stop.min_change);
        if better && loss.is_finite() {
            self.best = Some(self.touch(pace, || self.tensors())?);
            self.progress.best = Some(Best { step: self.progress.step, loss });
            self.progress.not_better = 0;
        } else {
            self.progress.not_better += 1;
        }
        Ok(())
    }

    /// Why there is to be no other step.
    fn why_end(&self) -> Option<&'static str> {
        let (Progress { step, seconds, not_better, .. }, run) = (&self.progress, &self.config.run);
        match () {
            () if self.config.stop.is_some_and(|stop| *not_better >= stop.patience) => Some("patience"),
            () if *step == run.steps => Some("steps"),
            () if run.max_seconds.is_some_and(|most| *seconds >= most) => Some("time"),
            () => None,
        }
    }

    fn save(&self, pace: &mut dyn Pace, tell: &mut Tell<'_>) -> Result<()> {
        let Some(store) = &self.store else { return Ok(()) };
        begin(Phase::Saving, tell);
        let captured = self.touch(pace, || self.learner.capture())?;
        store.save(&Saved { captured, progress: self.progress.clone(), best: self.best.clone() })
    }

    fn one_step(&mut self, pace: &mut dyn Pace) -> Result<Step> {
        let (start, step, run, window) = (Instant::now(), self.progress.step, &self.config.run, self.plan.window);
        let (inputs, targets) = windows(&self.corpus.train, run.windows, window, run.seed, step);
        let (part, of, optimizer) = (run.micro_windows * window, run.windows / run.micro_windows, &self.plan.optimizer);
        let rate = learning_rate(step, run.steps, optimizer.warmup_steps, optimizer.learning_rate, optimizer.final_ratio);
        for (index, (inputs, targets)) in inputs.chunks(part).zip(targets.chunks(part)).enumerate() {
            let taught = match &self.teacher {
                Some(teacher) => {
                    Some(in_turn(&mut |work: &mut dyn FnMut() -> Result<()>| pace.turn(work), || self.taught(teacher, inputs))?)
                }
                None => None,
            };
            let teacher = taught.as_ref().zip(self.config.distill).map(|(taught, distill)| Distillation {
                logits: &taught.logits,
                weight: distill.weight,
                lm_weight: distill.lm_weight,
                routers: &taught.routers,
            });
            let text = Text { inputs, targets, length: window, route: None, teacher };
            let done = self.learner.accumulate(Micro { step, index, of }, text, &mut |work| pace.turn(work));
            self.release(pace, taught);
            done?;
        }
        let report = in_turn(&mut |work: &mut dyn FnMut() -> Result<()>| pace.turn(work), || self.learner.apply(step, rate))?;
        let skipped = report.outcome == Outcome::Skipped;
        self.progress.step += 1;
        self.progress.skipped += usize::from(skipped);
        self.progress.skipped_in_a_row = if skipped { self.progress.skipped_in_a_row + 1 } else { 0 };
        Ok(self.told(&report, rate, inputs.len() as f64 / start.elapsed().as_secs_f64()))
    }

    fn taught(&self, teacher: &Teacher, inputs: &[u32]) -> Result<Taught> {
        let routers = self.plan.routing.losses.iter().any(|term| term.loss == AuxLoss::RouterKl);
        teacher.teach(inputs, self.plan.window, routers)
    }

    fn told(&self, report: &StepReport, learning_rate: f64, tokens_per_second: f64) -> Step {
        let (grad_norm, router_grad_norm) = match report.outcome {
            Outcome::Updated { grad_norm, router_norm } => (Some(grad_norm), Some(router_norm)),
            Outcome::Skipped => (None, None),
        };
        let busiest = |stats: &RoutingStats| stats.utilization().into_iter().fold(0.0, f64::max);
        Step {
            step: self.progress.step,
            loss: report.loss,
            lm_loss: report.lm_loss,
            distill_loss: report.distill_loss,
            losses: report.losses.iter().map(|(loss, value)| (loss.id().to_owned(), *value)).collect(),
            grad_norm,
            router_grad_norm,
            skipped: self.progress.skipped,
            learning_rate,
            sharpness: self.plan.routing.sharpness(self.progress.step - 1),
            loads: report.layers.iter().map(busiest).collect(),
            tokens_per_second,
            eta_seconds: 0.0,
        }
    }

    fn check_skips(&self) -> Result<()> {
        if self.progress.skipped_in_a_row < self.config.run.skip_limit {
            return Ok(());
        }
        let message = format!(
            "no gradient was finite in the last {} steps (run.skip_limit): nothing is learned any more; begin again with a lower \
             optimizer.learning_rate or a higher final temperature",
            self.progress.skipped_in_a_row
        );
        Err(Error::FailedPrecondition(message))
    }

    /// Of `model` on the first `most` held-out tokens.
    fn figures(&self, model: &ServingModel, most: usize, pace: &mut dyn Pace, tell: &mut Tell<'_>) -> Result<Figures, Stop> {
        let windows = self.corpus.heldout_windows(self.plan.window, most);
        let longest = windows.iter().map(|window| window.len()).max().unwrap_or(1);
        let (models, routings) = ([model, &self.base.model], (&self.plan.reference_case, &self.plan.routed[..]));
        let mut evaluation = self.touch(pace, || Evaluation::new(models, routings, longest))?;
        let done = windows.into_iter().try_for_each(|window| {
            match pace.flow() {
                Flow::Pause => return Err(Stop::Pause),
                Flow::Leave => return Err(Stop::Leave),
                Flow::Go | Flow::Finish => {}
            }
            evaluation.add(window, &mut |work| pace.turn(work))?;
            tell(Event::Evaluated(window.len()));
            Ok(())
        });
        let figures = evaluation.figures();
        self.release(pace, evaluation);
        done.map(|()| figures)
    }

    /// The tensors that learn as they are to be served now. Some share the storage of variables: for a look, not for keeping.
    fn lent(&self) -> Result<BTreeMap<String, Tensor>> {
        // The router was divided by the reference's temperature before, and learned under the estimator's.
        let scale = self.plan.temperature / self.learner.plan().folding(self.progress.step);
        let parameters = self.learner.model().parameters().iter();
        let tensor = |parameter: &Parameter| {
            let value = parameter.var.as_detached_tensor();
            let value = if parameter.part == Part::Router && scale != 1.0 { (value * scale)? } else { value };
            Ok((parameter.name.clone(), value))
        };
        parameters.map(tensor).collect()
    }

    /// [`Tuner::lent`] as copies on the host, in the element type of what they replace.
    fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let own: BTreeMap<String, &Tensor> = self.weights.named().into_iter().collect();
        let copy = |(name, tensor): (String, Tensor)| {
            let Some(place) = own.get(&name) else { return Err(Error::Internal(format!("{name} is no tensor of the model"))) };
            let tensor = tensor.to_dtype(place.dtype())?;
            Ok((name, if tensor.device().is_cpu() { tensor.copy()? } else { tensor.to_device(&Device::Cpu)? }))
        };
        self.lent()?.into_iter().map(copy).collect()
    }
}

/// Multiplies every router that learns.
fn scale_routers(model: &Trainable, by: f64) -> Result<()> {
    for parameter in model.parameters().iter().filter(|parameter| by != 1.0 && parameter.part == Part::Router) {
        parameter.var.set(&(parameter.var.as_detached_tensor() * by)?)?;
    }
    Ok(())
}
