//! The flags of tuning inside a server.

use std::{num::NonZeroUsize, path::PathBuf, time::Duration};

use clap::Args;

use super::serve::{seconds, share};
use crate::jobs::{GuardConfig, Setup};

/// Tuning: jobs that train beside requests, and generations that come of them.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Tuning")]
pub struct TuningArgs {
    /// Folder of tuning jobs, of the generations that they made, and of which one is in force: the server goes on from there. It is made
    /// if it is not there, and belongs to the weights of --model. Default: this server tunes nothing.
    #[arg(long, env = "HARDMAX_TUNING_DIR", value_name = "DIR", conflicts_with = "delta")]
    pub tuning_dir: Option<PathBuf>,
    /// Folders below which a job may read text that its client names. Default: clients send all text themselves.
    #[arg(long, env = "HARDMAX_TUNING_DATA", value_name = "DIR,...", value_delimiter = ',', num_args = 1..)]
    pub tuning_data: Vec<PathBuf>,
    /// Tokens that one job may have. More are refused with OUT_OF_RANGE.
    #[arg(long, env = "HARDMAX_MAX_TUNING_TOKENS", value_name = "N", default_value = "67108864")]
    pub max_tuning_tokens: NonZeroUsize,
    /// Memory that one job may take besides the model. One that would take more is refused with FAILED_PRECONDITION. Default: what the
    /// machine, or the container, has left.
    #[arg(long, env = "HARDMAX_MAX_TUNING_MEMORY", value_name = "BYTES")]
    pub max_tuning_memory: Option<u64>,
    /// Ended jobs that are kept, and generations. Older ones are removed, but for the generation in force and the one before it.
    #[arg(long, env = "HARDMAX_TUNING_KEEP", value_name = "N", default_value = "16")]
    pub tuning_keep: NonZeroUsize,
    /// How long a published generation is watched, to be taken back by itself if it is worse in use; 0: not at all. A Publish may say
    /// otherwise.
    #[arg(long, env = "HARDMAX_PUBLISH_WATCH", value_name = "SECONDS", default_value = "300", value_parser = watch)]
    pub publish_watch: Duration,
    /// It is taken back where the mean fidelity gap of its traffic is above so many times that of the generation before. Needs shadow
    /// samples, at least 8.
    #[arg(long, env = "HARDMAX_PUBLISH_MAX_GAP_RATIO", value_name = "RATIO", default_value = "1.5", value_parser = ratio)]
    pub publish_max_gap_ratio: f64,
    /// It is taken back where more than this share of its requests fails, of at least 20.
    #[arg(long, env = "HARDMAX_PUBLISH_MAX_ERROR_RATE", value_name = "SHARE", default_value = "0.05", value_parser = share)]
    pub publish_max_error_rate: f64,
}

impl TuningArgs {
    /// What jobs are allowed; `None`: there are none.
    pub(super) fn setup(&self) -> Option<Setup> {
        Some(Setup {
            dir: self.tuning_dir.clone()?,
            // Nothing, as of an empty variable, is no folder.
            data: self.tuning_data.iter().filter(|path| !path.as_os_str().is_empty()).cloned().collect(),
            max_tokens: self.max_tuning_tokens.get(),
            max_memory: self.max_tuning_memory,
            keep: self.tuning_keep.get(),
            guard: GuardConfig {
                watch: self.publish_watch,
                max_gap_ratio: self.publish_max_gap_ratio,
                max_error_rate: self.publish_max_error_rate,
            },
        })
    }
}

/// At most a day.
fn watch(text: &str) -> Result<Duration, String> {
    seconds(text).and_then(|time| if time <= Duration::from_secs(86_400) { Ok(time) } else { Err("must be 0 to 86400 seconds".into()) })
}

fn ratio(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if value > 0.0 && value.is_finite() { Ok(value) } else { Err("must be above 0".into()) }
}
