//! What a run reports: JSON lines for programs, a progress bar for people.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write},
    path::Path,
};

use serde::{Deserialize, Deserializer, Serialize};

use super::finding::Finding;
use crate::{
    error::{Error, Result},
    moe::{collapse::Health, estimator::NoiseKind, remedy::Action},
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
    /// A layer's routing became better or worse.
    Finding(FindingRecord),
}

/// A change of what is found about a layer's routing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FindingRecord {
    /// The step after which it was seen.
    pub step: usize,
    /// Decoder layer, from 0.
    pub layer: usize,
    /// What holds from now on.
    #[serde(flatten)]
    pub finding: Finding,
    /// The same in words.
    pub text: String,
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

/// One optimizer step. What older logs lack is read as its default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Steps done before it.
    pub step: usize,
    /// Language-model loss, nats per token.
    #[serde(deserialize_with = "number")]
    pub lm_loss: f64,
    /// Auxiliary losses by name, means over layers, before their weights.
    #[serde(default, deserialize_with = "numbers")]
    pub losses: BTreeMap<String, f64>,
    /// In force.
    pub learning_rate: f64,
    /// Temperature or width of the relaxation in force; 1 for estimators that have neither.
    pub temperature: f64,
    /// Factor on the estimator's noise on router logits in force; 0 without noise.
    pub noise: f64,
    /// Distribution of that noise: `none`, `gumbel`, `gaussian`, or `softplus`, which is normal with a learned deviation.
    #[serde(default)]
    pub noise_kind: String,
    /// `explore.jitter` in force.
    #[serde(default)]
    pub jitter: f64,
    /// `explore.epsilon` in force.
    #[serde(default)]
    pub epsilon: f64,
    /// `explore.dropout` in force.
    #[serde(default)]
    pub dropout: f64,
    /// The largest selection bias of an expert, without its sign; the next step has it. Served is a router without bias.
    #[serde(default)]
    pub selection_bias: f64,
    /// Global norm before clipping; `None` for a skipped step.
    pub grad_norm: Option<f64>,
    /// Norm over the routers alone, before clipping.
    #[serde(default)]
    pub router_grad_norm: Option<f64>,
    /// Rows pushed through experts per token and layer, counted.
    #[serde(default)]
    pub executed_per_token: f64,
    /// Choices that capacity left out, in all layers together.
    #[serde(default)]
    pub dropped: u64,
    /// Choices that capacity gave to another expert, in all layers together.
    #[serde(default)]
    pub rerouted: u64,
    /// The worst of the layers' loads; `None` until one has been judged.
    #[serde(default)]
    pub health: Option<Health>,
    /// Decoder layers whose router only auxiliary losses move.
    #[serde(default)]
    pub dead_routers: Vec<usize>,
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
    #[serde(alias = "soft_perplexity", deserialize_with = "number")]
    pub reference_perplexity: f64,
    /// Perplexity under hard top-2, the two weighted in the form in which the checkpoint is served: by the softmax of
    /// the saved router as it is, renormalised over them, or 1/2 each. Whatever `serve_k` is.
    #[serde(deserialize_with = "number")]
    pub top2_perplexity: f64,
    /// Perplexity under hard top-1, weighted in the same form.
    #[serde(deserialize_with = "number")]
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
    /// Opens `path` for a run that starts at `first_step`, and drops what that run will write (again). What is kept is
    /// written beside it and takes its place at once, so that a crash leaves the old log or the new one.
    ///
    /// # Errors
    /// As [`read`], and whatever the file system says.
    pub fn open(path: &Path, first_step: usize) -> Result<Self> {
        let io = |source| Error::io(path, source);
        let kept: Vec<Record> = read(path)?.into_iter().filter(|record| record.stays(first_step)).collect();
        let temporary = path.with_extension("partial");
        let mut log = Self { file: File::create(&temporary).map_err(io)? };
        kept.iter().try_for_each(|record| log.write(record))?;
        log.file.sync_all().map_err(io)?;
        fs::rename(&temporary, path).map_err(io)?;
        Ok(Self { file: OpenOptions::new().append(true).open(path).map_err(io)? })
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
            Self::Finding(finding) => finding.step < first_step,
            Self::Evaluation(evaluation) => evaluation.step <= first_step && !evaluation.complete,
        }
    }
}

/// The records of a log. No file is no record; a last line that a crash cut short is left out; `null` in the place of a
/// number is one that was not finite, and comes back as NaN.
///
/// # Errors
/// `InvalidArgument` for any other line that is no record: opening the log would drop it for good.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let text = match fs::read(path) {
        // The cut may lie within a character.
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(Error::io(path, source)),
    };
    let (whole, last) = text.rsplit_once('\n').unwrap_or(("", &text));
    let record = |(index, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|error| {
            let message = format!("line {} is no record of a training log ({error}): repair it, or move the file away", index + 1);
            Error::invalid(path.display().to_string(), message)
        })
    };
    let mut records = whole.lines().enumerate().map(record).collect::<Result<Vec<_>>>()?;
    records.extend(serde_json::from_str::<Record>(last));
    Ok(records)
}

/// A distribution of noise as logs and checkpoints spell it.
pub(super) fn noise_kind(kind: NoiseKind) -> &'static str {
    match kind {
        NoiseKind::None => "none",
        NoiseKind::Gumbel => "gumbel",
        NoiseKind::Learned => "softplus",
    }
}

/// A number, or NaN where `null` stands for one that was not finite.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// [`number`]s by name.
fn numbers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, f64>, D::Error> {
    let read = BTreeMap::<String, Option<f64>>::deserialize(deserializer)?;
    Ok(read.into_iter().map(|(name, value)| (name, value.unwrap_or(f64::NAN))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: &str = r#"{"kind":"step","step":0,"lm_loss":null,"losses":{"switch":null},"learning_rate":0.1,"temperature":1.0,"noise":0.0,"grad_norm":null,"tokens_per_second":5.0}"#;
    const EVALUATION: &str = r#"{"kind":"evaluation","step":1,"tokens":9,"soft_perplexity":null,"top2_perplexity":null,"top1_perplexity":2.0,"utilization":[[1.0]]}"#;

    fn log(text: impl AsRef<[u8]>) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("training-log.jsonl");
        fs::write(&path, text).unwrap();
        (dir, path)
    }

    #[test]
    fn what_was_not_finite_stays_in_the_log() {
        let (_dir, path) = log(format!("{STEP}\n{EVALUATION}\n"));
        let records = read(&path).unwrap();
        let [Record::Step(step), Record::Evaluation(evaluation)] = &records[..] else { panic!("{records:?}") };
        assert!(step.lm_loss.is_nan() && step.losses["switch"].is_nan() && step.grad_norm.is_none());
        assert!(evaluation.reference_perplexity.is_nan() && evaluation.top2_perplexity.is_nan());
        let mut again = Log::open(&path, 1).unwrap();
        again.write(&records[0]).unwrap();
        assert_eq!(read(&path).unwrap().len(), 3, "two kept, one appended");
    }

    #[test]
    fn a_line_cut_short_is_left_out() {
        for cut in [STEP.len() - 1, 10, 1] {
            let (_dir, path) = log(format!("{EVALUATION}\n{}", &STEP[..cut]));
            assert_eq!(read(&path).unwrap().len(), 1, "{cut}");
            drop(Log::open(&path, 1).unwrap());
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.ends_with("}\n") && text.lines().count() == 1, "{text}");
        }
        let (_dir, path) = log([EVALUATION.as_bytes(), b"\n{\"text\":\"\xCF"].concat());
        assert_eq!(read(&path).unwrap().len(), 1, "within a character");
    }

    #[test]
    fn another_line_that_is_no_record_is_not_dropped() {
        let (_dir, path) = log(format!("{STEP}\nnonsense\n{EVALUATION}\n"));
        let refused = Log::open(&path, 1).unwrap_err().to_string();
        assert!(refused.contains("line 2 is no record of a training log"), "{refused}");
        assert!(fs::read_to_string(&path).unwrap().contains("nonsense"));
    }

    #[test]
    fn the_log_is_whole_while_it_is_opened() {
        let (dir, path) = log(format!("{STEP}\n{EVALUATION}\n"));
        // What a crash left before the rename.
        fs::write(path.with_extension("partial"), "{\"kind\":").unwrap();
        drop(Log::open(&path, 1).unwrap());
        assert_eq!(read(&path).unwrap().len(), 2);
        let files: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(files, ["training-log.jsonl"]);
        // Where the copy cannot be made, the log is as it was.
        fs::create_dir(path.with_extension("partial")).unwrap();
        assert!(Log::open(&path, 0).is_err());
        assert_eq!(read(&path).unwrap().len(), 2);
    }
}
