//! What is known of a job.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::state::{JobPhase, JobState};
use crate::{
    engine::Share,
    error::{Error, Result},
    tune::{config::TuneConfig, evaluate::Figures, gates::Verdict, memory::MemoryPlan},
};

/// Names a job: `t1`, `t2`, and so on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct JobId(pub(super) u64);

/// Who asks for something, for the audit log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Who {
    /// Address that the call came from.
    pub peer: String,
    /// As the caller says.
    pub actor: String,
    /// Of the call.
    pub request_id: String,
}

/// A job as it is at a moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Names it.
    pub id: JobId,
    /// Where it is.
    pub state: JobState,
    /// What it is at, while it runs.
    pub phase: Option<JobPhase>,
    /// Why it paused, failed or ended; empty while it runs.
    pub detail: String,
    /// What it was told.
    pub config: TuneConfig,
    /// How much of the machine it has.
    pub share: Share,
    /// Generation that it was begun on.
    pub base_generation: u64,
    /// Generation that its candidate was published as.
    pub generation: Option<u64>,
    /// When it was started, seconds since 1970.
    pub created: f64,
    /// When it ended, seconds since 1970; `None` as long as it has not.
    pub ended: Option<f64>,
    /// Steps done.
    pub step: usize,
    /// Steps that it was told to do.
    pub steps: usize,
    /// Steps without finite gradients.
    pub skipped: usize,
    /// Tokens to learn from.
    pub train_tokens: u64,
    /// Tokens to measure on.
    pub heldout_tokens: u64,
    /// Of both.
    pub data_sha256: String,
    /// What it was thought to need before it was started.
    pub memory: MemoryPlan,
    /// Of the model before, on all held-out tokens.
    pub before: Option<Figures>,
    /// Of what it has made so far.
    pub latest: Option<Figures>,
    /// How its candidate stands at the gates; empty before it has one.
    pub verdicts: Vec<Verdict>,
    /// Names of the tensors that learn.
    pub trained: Vec<String>,
    /// Values in them.
    pub trained_parameters: u64,
    /// Until its last step.
    pub eta_seconds: Option<f64>,
}

// === impl JobId ===

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "t{}", self.0)
    }
}

impl FromStr for JobId {
    type Err = Error;

    /// Fails with `NotFound`: what is spelled otherwise names no job.
    fn from_str(text: &str) -> Result<Self> {
        // As it is written, and no other way: no sign, no leading zero.
        let number = text.strip_prefix('t').and_then(|digits| digits.parse().ok()).map(JobId).filter(|id| id.to_string() == text);
        number.ok_or_else(|| Error::NotFound(format!("no job '{text}': ListTunings has those that there are")))
    }
}

impl From<JobId> for String {
    fn from(id: JobId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for JobId {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

// === impl Who ===

impl Who {
    /// The server itself, in the role of `actor`.
    pub(super) fn server(actor: &str) -> Self {
        Self { peer: "server".into(), actor: actor.into(), request_id: String::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_has_one_spelling() {
        assert_eq!("t12".parse::<JobId>().unwrap(), JobId(12));
        for other in ["", "t", "12", "t-1", "t+1", "t01", "t1 ", "T1", "t99999999999999999999"] {
            assert!(matches!(other.parse::<JobId>(), Err(Error::NotFound(_))), "{other}");
        }
        assert_eq!(serde_json::to_string(&JobId(3)).unwrap(), "\"t3\"");
    }
}
