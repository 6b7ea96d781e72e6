//! `hardmax tune`: closes the fidelity gap of a checkpoint on text of its own.

mod args;
mod remote;
mod show;

use std::{
    io::{self, Write as _},
    path::Path,
    sync::Arc,
};

use self::show::{Memory, Progress, Report, table};
pub use self::{args::TuneArgs, remote::RemoteArgs};
use crate::{
    checkpoint::{self, Checkpoint, Delta, LoadOptions},
    durable,
    error::{Error, Result},
    memory::{self, Watermark},
    model::load::ServingModel,
    tune::{
        candidate::Candidate,
        config::TuneConfig,
        data::{Corpus, DataShape},
        gates::Verdict,
        store::{Store, recipe},
        tuner::{AtOnce, Base, Ended, Event, Tuner},
    },
};

/// Trains, measures, and writes what was asked for.
///
/// # Errors
/// Besides those of the run: `FailedPrecondition` where a gate does not hold, once everything is written, unless `--override` is given.
pub fn run(args: TuneArgs) -> Result<()> {
    if let Some(url) = &args.remote.server {
        return remote::run(&args, url);
    }
    let config = args.config()?;
    args.check_results()?;
    let model = args.model.as_ref().ok_or_else(|| Error::invalid("--model", "is not set"))?;
    let checkpoint = Checkpoint::open(model)?;
    let digest = checkpoint.digest()?;
    let (tuner, corpus_sha256, before) = prepare(&args, &checkpoint, &digest, &config)?;
    announce(&tuner, &config);
    let planned = *tuner.memory();
    let mut progress = Progress::new(config.run.steps);
    let mut events = Vec::new();
    let ended = tuner.run(&mut AtOnce, &mut |event| {
        progress.show(&event);
        if matches!(event, Event::Step(_) | Event::Evaluation { .. }) {
            events.push(event);
        }
    })?;
    progress.finish();
    let memory = Memory { planned, growth: before.growth() };
    let Ended::Done(candidate) = ended else {
        return Err(Error::Internal("a run that nobody asked to leave has left".into()));
    };
    write(&args, &checkpoint, digest, &candidate)?;
    if let Some(path) = &args.json {
        durable::write_json(path, &Report::new(&config, &candidate, &corpus_sha256, memory, &events))?;
    }
    let Candidate { before, after, verdicts, steps, .. } = &*candidate;
    print(&table(before, after, verdicts, *steps))?;
    check_gates(verdicts, args.override_gates)
}

fn announce(tuner: &Tuner, config: &TuneConfig) {
    let plan = tuner.plan();
    if plan.assumed {
        let guess = &plan.reference_case.name;
        tracing::warn!("the checkpoint does not say what it was trained under: {guess} is assumed; --reference says otherwise");
    }
    tracing::info!("{} values of {} tensors learn ({})", tuner.parameters(), plan.selection.names.len(), config.target);
    tracing::info!("{}", tuner.memory());
    if tuner.done() > 0 {
        tracing::info!("goes on from step {} of {}", tuner.done(), config.run.steps);
    }
}

fn print(text: &str) -> Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        // The reader of a pipe may leave early.
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Error::io("stdout", e)),
        _ => Ok(()),
    }
}

/// Fails where a gate does not hold, unless that is to be overridden.
fn check_gates(verdicts: &[Verdict], override_gates: bool) -> Result<()> {
    let refused: Vec<&str> = verdicts.iter().filter(|verdict| !verdict.passed).map(|verdict| verdict.gate.as_str()).collect();
    if refused.is_empty() || override_gates {
        return Ok(());
    }
    let message = format!(
        "the result is there, and is not better on held-out text: {}. Do not serve it; tune longer or otherwise, or say --override",
        refused.join(", ")
    );
    Err(Error::FailedPrecondition(message))
}

/// The run, the hash of its text, and the memory that was there before it.
fn prepare(args: &TuneArgs, checkpoint: &Checkpoint, digest: &str, config: &TuneConfig) -> Result<(Tuner, String, Watermark)> {
    let options = args.compute.options();
    let device = options.device.open()?;
    options.check()?;
    let weights = checkpoint.load(&LoadOptions { dtype: options.weights.dtype(options.device), device, progress: true })?;
    let plan = config.plan(checkpoint.spec(), &weights)?;
    let end = checkpoint.generation().eos_token_ids.first().copied();
    let (window, vocab) = (plan.window, checkpoint.spec().vocab_size);
    let shape = DataShape { window, heldout_share: config.run.heldout_share, end, vocab, most_tokens: usize::MAX };
    let sources = args.sources();
    let [documents, heldout] = sources.documents(shape.most_tokens);
    let corpus = Corpus::build(documents, heldout, &checkpoint.tokenizer()?, shape)?;
    tracing::info!("{} tokens to learn from, {} held out", corpus.train.len(), corpus.heldout.len());
    let model = ServingModel::new(Arc::new(checkpoint.spec().clone()), weights, options)?;
    let sha256 = corpus.sha256.clone();
    let base = Base { model, routing: checkpoint.routing().cloned() };
    let recipe = recipe(config, digest, &sha256, base.model.dtype())?;
    let store = args.work.as_ref().map(|dir| store(dir, args.resume, recipe)).transpose()?;
    memory::return_large_blocks();
    memory::give_back();
    let before = Watermark::set();
    Ok((Tuner::new(base, corpus, config.clone(), store)?, sha256, before))
}

/// Where the run is kept.
fn store(dir: &Path, resume: bool, recipe: String) -> Result<Store> {
    let store = Store::open(dir, recipe)?;
    if store.has_state()? && !resume {
        let message = format!("{} holds the state of a run: continue it with --resume, or choose another folder", dir.display());
        return Err(Error::FailedPrecondition(message));
    }
    Ok(store)
}

fn write(args: &TuneArgs, checkpoint: &Checkpoint, digest: String, candidate: &Candidate) -> Result<()> {
    if args.delta.is_none() && args.output.is_none() {
        return Ok(());
    }
    let delta: Delta = candidate.delta(digest);
    if let Some(path) = &args.delta {
        delta.write(path)?;
        tracing::info!("saved {}", path.display());
    }
    if let Some(dir) = &args.output {
        checkpoint::export(checkpoint, dir, &delta)?;
        tracing::info!("saved {}", dir.display());
    }
    Ok(())
}
