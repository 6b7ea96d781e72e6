//! The states of a job, and what may be asked of it in each.

use serde::{Deserialize, Serialize};

use super::job::JobId;
use crate::error::{Error, Result};

/// Where a job is between its start and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// It has a thread, or goes on by itself when the server is started again.
    Running,
    /// Its state is on disk, and it holds no memory.
    Paused,
    /// It has left a candidate.
    Done,
    /// It was ended by somebody, and has left nothing.
    Stopped,
    /// It could not go on.
    Failed,
}

/// What a running job is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobPhase {
    /// Waits for the end of the requests inside: it has asked for all of the machine.
    Draining,
    /// Figures of the model before.
    Baseline,
    /// Steps.
    Training,
    /// Figures on the way or after the last step.
    Evaluating,
    /// Writes its candidate.
    Saving,
}

/// What happens to a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Somebody asks it to wait, or the disk is full.
    Pause,
    /// Somebody asks it to go on.
    Resume,
    /// Somebody ends it without a candidate.
    Stop,
    /// It leaves a candidate, at its last step or because somebody asks for one now.
    Finish,
    /// It cannot go on.
    Fail,
}

impl JobState {
    /// All of them, in the order of a life.
    pub const ALL: [Self; 5] = [Self::Running, Self::Paused, Self::Done, Self::Stopped, Self::Failed];

    /// As in messages and labels.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Done => "done",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }

    /// Nothing happens to it any more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Stopped | Self::Failed)
    }
}

impl JobPhase {
    /// As in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Baseline => "baseline",
            Self::Training => "training",
            Self::Evaluating => "evaluating",
            Self::Saving => "saving",
        }
    }
}

/// The state after `change`.
///
/// # Errors
/// `FailedPrecondition` that says the state, and what can be done in it.
pub(super) fn next(id: JobId, state: JobState, change: Change) -> Result<JobState> {
    use JobState::{Done, Failed, Paused, Running, Stopped};
    match (state, change) {
        (Running, Change::Pause) => Ok(Paused),
        (Paused, Change::Resume) => Ok(Running),
        (Running | Paused, Change::Stop) => Ok(Stopped),
        // A paused one runs once more for it.
        (Running, Change::Finish) => Ok(Done),
        (Paused, Change::Finish) => Ok(Running),
        (Running | Paused, Change::Fail) => Ok(Failed),
        (Running, Change::Resume) => refused(id, "runs already: give another share to change how much of the machine it has"),
        (Paused, Change::Pause) => refused(id, "is paused already: resume or stop it"),
        (Done, _) => refused(id, "is done: publish its candidate, or start another job"),
        (Stopped, _) => refused(id, "was stopped: start another job"),
        (Failed, _) => refused(id, "has failed: its detail says why; start another job"),
    }
}

fn refused(id: JobId, why: &str) -> Result<JobState> {
    Err(Error::FailedPrecondition(format!("job {id} {why}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn every_change_in_every_state() {
        use JobState::{Done, Failed, Paused, Running, Stopped};
        let changes = [Change::Pause, Change::Resume, Change::Stop, Change::Finish, Change::Fail];
        let table = [
            (Running, [Some(Paused), None, Some(Stopped), Some(Done), Some(Failed)]),
            (Paused, [None, Some(Running), Some(Stopped), Some(Running), Some(Failed)]),
            (Done, [None; 5]),
            (Stopped, [None; 5]),
            (Failed, [None; 5]),
        ];
        for (state, expected) in table {
            for (change, expected) in changes.into_iter().zip(expected) {
                let found = next(JobId(7), state, change);
                assert_eq!(found.as_ref().ok().copied(), expected, "{state:?}, {change:?}");
                if let Err(error) = found {
                    let (kind, message) = (error.kind(), error.to_string());
                    assert!(kind == ErrorKind::FailedPrecondition && message.starts_with("job t7 "), "{message}");
                }
            }
            assert_eq!(state.is_final(), expected == [None; 5]);
        }
    }
}
