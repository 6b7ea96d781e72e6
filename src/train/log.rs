//! What a run reports: JSON lines for programs, a progress bar for people.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::Write,
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    moe::remedy::Action,
};

/// One line of `training-log.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// One optimizer step.
    Step(StepRecord),
    /// One evaluation on held-out text.
    Evaluation(EvaluationRecord),
    /// A remedy for collapse acted.
    Remedy(RemedyRecord),
}

/// A remedy that acted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RemedyRecord {
    /// The step after which it did.
    pub step: usize,
    /// Decoder layer, from 0.
    pub layer: usize,
    /// What it did.
    #[serde(flatten)]
    pub action: Action,
    /// The same in words.
    pub text: String,
}

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Steps done before it.
    pub step: usize,
    /// Language-model loss, nats per token.
    pub lm_loss: f64,
    /// Auxiliary losses by name, means over layers, before their weights.
    #[serde(default)]
    pub losses: BTreeMap<String, f64>,
    /// In force.
    pub learning_rate: f64,
    /// Temperature or width of the relaxation in force; 1 for estimators that have neither.
    pub temperature: f64,
    /// In force; 0 without noise.
    pub noise: f64,
    /// Global norm before clipping; `None` for a skipped step.
    pub grad_norm: Option<f64>,
    /// Norm over the routers alone, before clipping.
    #[serde(default)]
    pub router_grad_norm: Option<f64>,
    /// Rows pushed through experts per token and layer, counted.
    #[serde(default)]
    pub executed_per_token: f64,
    /// Tokens trained on per second, this step.
    pub tokens_per_second: f64,
}

/// One evaluation on held-out text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRecord {
    /// Steps done.
    pub step: usize,
    /// Predicted tokens.
    pub tokens: usize,
    /// At the end of the run, on all held-out text; the others take `run.eval_tokens` of it.
    #[serde(default)]
    pub complete: bool,
    /// Perplexity under the reference routing: all experts mixed as in training without noise, or, for estimators that
    /// were trained with hard routing, that.
    #[serde(alias = "soft_perplexity")]
    pub reference_perplexity: f64,
    /// Perplexity under hard top-2, the two weighted in the form in which the checkpoint is served: by the softmax of
    /// the saved router as it is, renormalised over them, or 1/2 each. Whatever `serve_k` is.
    pub top2_perplexity: f64,
    /// Perplexity under hard top-1, weighted in the same form.
    pub top1_perplexity: f64,
    /// Load over fair share under hard top-1, per layer and expert.
    pub utilization: Vec<Vec<f64>>,
}

/// Appends records to a file.
#[derive(Debug)]
pub struct Log {
    file: File,
}

impl Log {
    /// Opens `path` for a run that starts at `first_step`, and drops what that run will write (again).
    pub fn open(path: &Path, first_step: usize) -> Result<Self> {
        let io = |source| Error::io(path, source);
        let kept: Vec<Record> = read(path)?.into_iter().filter(|record| record.stays(first_step)).collect();
        let mut log = Self { file: OpenOptions::new().create(true).write(true).truncate(true).open(path).map_err(io)? };
        kept.iter().try_for_each(|record| log.write(record))?;
        Ok(log)
    }

    /// One line.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let line = serde_json::to_string(record).map_err(|error| Error::Internal(format!("writing the log: {error}")))?;
        writeln!(self.file, "{line}").map_err(|source| Error::io("training-log.jsonl", source))
    }
}

impl Record {
    /// Whether a run that continues after `first_step` will not write it again. The evaluation at the end is always made
    /// anew.
    fn stays(&self, first_step: usize) -> bool {
        match self {
            Self::Step(step) => step.step < first_step,
            Self::Remedy(remedy) => remedy.step < first_step,
            Self::Evaluation(evaluation) => evaluation.step <= first_step && !evaluation.complete,
        }
    }
}

/// The records of a log; lines cut short by a crash are left out. No file is no record.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(Error::io(path, source)),
    }
}
