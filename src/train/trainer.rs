//! The training loop.

use std::{path::PathBuf, sync::Arc, time::Instant};

use candle_core::{DType, Device};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokenizers::Tokenizer;

use super::{
    config::TrainConfig,
    data,
    evaluate::{Evaluation, evaluate},
    learner::{Learner, Setup, StepReport, Text},
    log::{self, EvaluationRecord, FindingRecord, Log, Record, RemedyRecord, StepRecord},
    optimizer::Outcome,
    state::{Progress, StateDir},
    tokenizer,
    trainable::Trainable,
};
use crate::{
    checkpoint,
    durable::Lock,
    error::{Error, Result},
    model::{
        Decoder, ModelSpec,
        weights::{FeedForwardWeights, ModelWeights},
    },
    moe::{RoutingStats, estimator::Estimator, policy::RoutingChoice},
    schedule::learning_rate,
};

/// A run: data, weights, optimizer, and how far it has come.
#[derive(Debug)]
pub struct Trainer {
    config: TrainConfig,
    tokenizer: Tokenizer,
    train: Vec<u32>,
    heldout: Vec<u32>,
    learner: Learner,
    progress: Progress,
    state: StateDir,
    log: Log,
    _lock: Lock,
}

/// What stands at the end of a run.
#[derive(Debug)]
pub struct Trained {
    /// Shape of the model.
    pub spec: Arc<ModelSpec>,
    /// Final weights; the router is as trained, not yet divided by its temperature.
    pub model: Trainable,
    /// Trained on the same text.
    pub tokenizer: Tokenizer,
    /// What routers were trained under at the end.
    pub estimator: Estimator,
    /// What routers are divided by when saved.
    pub folding: f64,
    /// On all held-out text.
    pub evaluation: EvaluationRecord,
}

impl Trainer {
    /// Reads the text, trains the tokenizer, and makes weights or, with `resume`, loads the saved state.
    ///
    /// Fails if a state is there and `resume` is false, and, before any work is done, if the result could not be saved.
    pub fn new(config: TrainConfig, resume: bool) -> Result<Self> {
        Self::on(&Device::Cpu, DType::F32, config, resume)
    }

    /// [`Trainer::new`] with the weights on `device`, where products take `products`. A state is that of a run on any device, but goes on
    /// with other last bits on another.
    pub fn on(device: &Device, products: DType, config: TrainConfig, resume: bool) -> Result<Self> {
        std::fs::create_dir_all(&config.work).map_err(|source| Error::io(&config.work, source))?;
        let lock = Lock::take(&config.work.join("lock"), "end it")?;
        checkpoint::check_target(&config.output)?;
        let text = |field, files| read_text(field, files, &config.data.separator);
        let (documents, heldout) = (text("data.train", &config.data.train)?, text("data.heldout", &config.data.heldout)?);
        let state = StateDir::new(&config, &documents)?;
        state.recover()?;
        let tokenizer = match state.exists() && resume {
            true => state.tokenizer()?,
            false => tokenizer::train(documents.iter().map(String::as_str), config.data.vocab_size)?,
        };
        let end = tokenizer
            .token_to_id(tokenizer::END_OF_TEXT)
            .ok_or_else(|| Error::Internal("the tokenizer lost its end-of-text token".into()))?;
        let train = data::tokenize(&documents, &tokenizer, end)?;
        let heldout = data::tokenize(&heldout, &tokenizer, end)?;
        if train.len() <= config.model.context {
            let message = format!("{} tokens do not fill one window of {}", train.len(), config.model.context);
            return Err(Error::invalid("data.train", message));
        }

        let plan = config.plan()?;
        let spec = Arc::new(config.spec(&plan, tokenizer.get_vocab_size(true)));
        let setup = Setup { spec, plan, optimizer: config.optimizer.clone(), seed: config.run.seed };
        let mut learner = Learner::on(device, products, setup)?;
        let progress = match (state.exists(), resume) {
            (true, true) => state.load(&mut learner)?,
            (true, false) => {
                let message =
                    format!("{} holds the state of a run: continue it with --resume, or remove the folder", state.path().display());
                return Err(Error::FailedPrecondition(message));
            }
            (false, _) => Progress::default(),
        };
        let log = Log::open(&log_path(&config), progress.step)?;
        Ok(Self { config, tokenizer, train, heldout, learner, progress, state, log, _lock: lock })
    }

    /// What the run is about to do, in one line.
    pub fn summary(&self) -> String {
        let (all, active) = self.learner.spec().parameters();
        format!(
            "{all} parameters ({active} active at top-{}), {} training and {} held-out tokens, step {} of {}",
            self.config.routing.serve_k,
            self.train.len(),
            self.heldout.len(),
            self.progress.step,
            self.config.run.steps
        )
    }

    /// Trains to the last step.
    ///
    /// # Errors
    /// `FailedPrecondition` once `run.skip_limit` steps in a row had no finite gradients.
    pub fn run(mut self) -> Result<Trained> {
        let steps = self.config.run.steps;
        self.run_until(steps)?;
        if self.progress.skipped > 0 {
            tracing::warn!("{} of {steps} steps were skipped: their gradients were not finite", self.progress.skipped);
        }
        let evaluation = self.evaluate(None)?;
        tracing::info!("{}", describe(&evaluation));
        self.log.write(&Record::Evaluation(evaluation.clone()))?;
        let plan = self.learner.plan();
        Ok(Trained {
            spec: Arc::clone(self.learner.spec()),
            model: self.learner.model().clone(),
            tokenizer: self.tokenizer,
            estimator: plan.estimator(steps),
            folding: plan.folding(steps),
            evaluation,
        })
    }

    /// Trains until `last` steps are done, evaluating and saving on the way.
    pub(super) fn run_until(&mut self, last: usize) -> Result<()> {
        let steps = self.config.run.steps;
        let bar = progress_bar(steps, self.progress.step);
        while self.progress.step < last {
            let record = self.step()?;
            bar.set_position(self.progress.step as u64);
            bar.set_message(format!("loss {:.3}  τ {:.2}  {:.0} tok/s", record.lm_loss, record.temperature, record.tokens_per_second));
            self.log.write(&Record::Step(record))?;
            self.check_skips()?;
            let done = self.progress.step;
            if done.is_multiple_of(self.config.run.eval_every) {
                let evaluation = self.evaluate(Some(self.config.run.eval_tokens))?;
                bar.suspend(|| tracing::info!("{}", describe(&evaluation)));
                self.log.write(&Record::Evaluation(evaluation))?;
            }
            if done.is_multiple_of(self.config.run.save_every) || done == steps {
                self.state.save(self.progress, &self.tokenizer, &self.learner)?;
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    fn step(&mut self) -> Result<StepRecord> {
        let start = Instant::now();
        let (run, optimizer) = (&self.config.run, &self.config.optimizer);
        let (step, context) = (self.progress.step, self.config.model.context);
        let (inputs, targets) = data::windows(&self.train, run.batch, context, run.seed, step);
        let rate = learning_rate(step, run.steps, optimizer.warmup_steps, optimizer.learning_rate, optimizer.final_ratio);
        let text = Text { inputs: &inputs, targets: &targets, length: context, route: None, teacher: None };
        let report = self.learner.step(step, text, rate)?;
        self.log_changes(step, &report)?;
        self.count(step, report.outcome);
        Ok(self.record(step, rate, &report, inputs.len() as f64 / start.elapsed().as_secs_f64()))
    }

    /// What was found, and done about it: on a line each.
    fn log_changes(&mut self, step: usize, report: &StepReport) -> Result<()> {
        for &(layer, finding) in &report.findings {
            match finding.is_sound() {
                true => tracing::info!(step, layer, "{finding}"),
                false => tracing::warn!(step, layer, "{finding}"),
            }
            self.log.write(&Record::Finding(FindingRecord { step, layer, finding, text: finding.to_string() }))?;
        }
        for &(layer, action) in &report.actions {
            self.log.write(&Record::Remedy(RemedyRecord { step, layer, action, text: action.to_string() }))?;
        }
        Ok(())
    }

    fn count(&mut self, step: usize, outcome: Outcome) {
        self.progress.step += 1;
        if outcome == Outcome::Skipped {
            self.progress.skipped += 1;
            self.progress.skipped_in_a_row += 1;
            tracing::warn!(step, "a gradient is not finite: step skipped");
        } else {
            self.progress.skipped_in_a_row = 0;
        }
    }

    /// Weights that give no finite gradients for one text after the other will not recover by themselves.
    fn check_skips(&self) -> Result<()> {
        let (Progress { step, skipped_in_a_row, .. }, limit) = (self.progress, self.config.run.skip_limit);
        if skipped_in_a_row < limit {
            return Ok(());
        }
        let message = format!(
            "no gradient was finite in the last {skipped_in_a_row} steps (run.skip_limit = {limit}), so nothing has been learned since step \
             {}: train anew in another work folder with a lower optimizer.learning_rate, a lower optimizer.clip_norm, more \
             optimizer.warmup_steps, or a higher final routing temperature",
            step - skipped_in_a_row
        );
        Err(Error::FailedPrecondition(message))
    }

    fn record(&self, step: usize, learning_rate: f64, report: &StepReport, tokens_per_second: f64) -> StepRecord {
        let (grad_norm, router_grad_norm) = match report.outcome {
            Outcome::Updated { grad_norm, router_norm } => (Some(grad_norm), Some(router_norm)),
            Outcome::Skipped => (None, None),
        };
        let tokens = self.config.run.batch * self.config.model.context * report.layers.len();
        let (plan, memory) = (self.learner.plan(), self.learner.memory());
        let (noise, explore) = (report.estimator.noise, plan.exploration(step));
        let total = |of: fn(&RoutingStats) -> u64| report.layers.iter().map(of).sum::<u64>();
        let watches = || self.learner.spec().moe_layers().map(|(layer, _)| layer).zip(&memory.watch);
        StepRecord {
            step,
            lm_loss: report.lm_loss,
            losses: report.losses.iter().map(|(loss, value)| (loss.id().to_owned(), *value)).collect(),
            learning_rate,
            temperature: plan.sharpness(step),
            noise: noise.scale,
            noise_kind: log::noise_kind(noise.kind).into(),
            jitter: plan.jitter(step),
            epsilon: explore.epsilon,
            dropout: explore.dropout,
            selection_bias: memory.layers.iter().flat_map(|layer| &layer.bias).fold(0.0, |most, bias| bias.abs().max(most)),
            grad_norm,
            router_grad_norm,
            executed_per_token: total(|stats| stats.executed) as f64 / tokens.max(1) as f64,
            dropped: total(|stats| stats.dropped),
            rerouted: total(|stats| stats.rerouted),
            health: memory.watch.iter().filter_map(|watch| watch.finding.health).max(),
            dead_routers: watches().filter(|(_, watch)| watch.finding.dead_router).map(|(layer, _)| layer).collect(),
            tokens_per_second,
        }
    }

    /// Held-out perplexity of the present weights on the first `tokens`, or on all for the end of the run; the router
    /// divided by the present temperature as when saved.
    fn evaluate(&self, tokens: Option<usize>) -> Result<EvaluationRecord> {
        let weights = folded(self.learner.model(), self.learner.plan().folding(self.progress.step))?;
        let decoder = Decoder::new(Arc::clone(self.learner.spec()), weights, self.learner.kernel())?;
        let decoder = decoder.with_products(self.learner.model().products());
        let text = &self.heldout[..self.heldout.len().min(tokens.unwrap_or(usize::MAX))];
        let under = |routing| evaluate(&decoder, text, self.config.model.context, routing);
        let hard = |k| RoutingChoice::TopK { k, weight_form: None };
        let reference = self.learner.spec().reference.choice();
        let (soft, top2, top1) = (under(reference)?, under(hard(2))?, under(hard(1))?);
        Ok(EvaluationRecord {
            step: self.progress.step,
            tokens: top1.tokens,
            complete: tokens.is_none(),
            reference_perplexity: soft.perplexity,
            top2_perplexity: top2.perplexity,
            top1_perplexity: top1.perplexity,
            utilization: utilization(&top1),
        })
    }
}

/// The documents of the files that `field` of the recipe names.
fn read_text(field: &str, files: &[PathBuf], separator: &str) -> Result<Vec<String>> {
    let documents = data::read_documents(files, separator)?;
    if documents.is_empty() { Err(Error::invalid(field, "the files hold no text")) } else { Ok(documents) }
}

/// The weights with every router divided by `temperature`, so that the soft mixture they were trained as is the plain
/// softmax, for every loader. Router outputs that are no expert's, such as the scales of noise, are left out.
pub fn folded(model: &Trainable, temperature: f64) -> Result<ModelWeights> {
    let mut weights = model.detached();
    for layer in &mut weights.layers {
        if let FeedForwardWeights::Moe(moe) = &mut layer.feed_forward {
            moe.router = (moe.router.narrow(0, 0, moe.gate_up.dim(0)?)? / temperature)?;
        }
    }
    Ok(weights)
}

/// Where the log of a run is.
pub fn log_path(config: &TrainConfig) -> PathBuf {
    config.work.join("training-log.jsonl")
}

fn utilization(evaluation: &Evaluation) -> Vec<Vec<f64>> {
    evaluation.layers.iter().map(|stats| stats.utilization()).collect()
}

fn describe(e: &EvaluationRecord) -> String {
    let all = e.utilization.iter().flatten().copied();
    let (low, high) = (all.clone().fold(f64::INFINITY, f64::min), all.fold(0.0, f64::max));
    format!(
        "step {}: held-out perplexity {:.3} under the reference routing, top-2 {:.3}, top-1 {:.3} ({:+.2} %), utilisation {low:.2} to {high:.2}",
        e.step,
        e.reference_perplexity,
        e.top2_perplexity,
        e.top1_perplexity,
        (e.top1_perplexity / e.reference_perplexity - 1.0) * 100.0
    )
}

fn progress_bar(steps: usize, done: usize) -> ProgressBar {
    // indicatif draws on stderr, and only if that is a terminal.
    let bar = ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::stderr_with_hz(2)).with_position(done as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}  eta {eta}") {
        bar.set_style(style);
    }
    bar
}
