//! Whether what was published is worse in use than what it replaced.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::audit::now;
use crate::engine::Tally;

/// Fewer samples say nothing of the gap.
const SAMPLES: u64 = 8;
/// Fewer requests say nothing of errors.
const REQUESTS: u64 = 20;
/// A smaller gap than this, nats per token, is as good as none: three times nothing is not much.
const FLOOR: f64 = 0.01;

/// When a generation is taken back by itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GuardConfig {
    /// How long a published generation is watched; zero: not at all.
    pub watch: Duration,
    /// Most that the mean live gap may be over that of the generation before.
    pub max_gap_ratio: f64,
    /// Largest share of failed requests.
    pub max_error_rate: f64,
}

/// How a published generation is watched. It is on disk as long as it may be: a restart goes on with the watch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Guarded {
    /// Gap of the generation before, nats per token; `None`: nothing that the live one could be compared to is known.
    pub(super) before: Option<f64>,
    /// The routing that both gaps are of, as `--routing` spells it.
    pub(super) serving: String,
    /// When the watch ends, seconds since 1970.
    pub(super) until: f64,
}

impl Guarded {
    /// How long from now, at most `most` seconds: clocks are set.
    pub(super) fn rest(&self, most: f64) -> Duration {
        Duration::from_secs_f64((self.until - now()).clamp(0.0, most))
    }
}

/// Why a generation was taken back.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Reason {
    /// The live gap is too large.
    Gap {
        /// Mean of its samples, nats per token.
        found: f64,
        /// The most that is let pass.
        limit: f64,
    },
    /// Too many requests fail.
    Errors {
        /// Share that failed.
        found: f64,
        /// The most that is let pass.
        limit: f64,
    },
}

/// Mean gap of the samples of a generation, where there are enough to say.
pub(super) fn live_gap(tally: &Tally) -> Option<f64> {
    (tally.samples >= SAMPLES && tally.tokens > 0).then(|| tally.kl / tally.tokens as f64)
}

/// Whether a generation with this tally is to be taken back; `before` is the gap of the one before it, nats per token, where the two can
/// be compared.
pub(super) fn judge(before: Option<f64>, now: &Tally, config: &GuardConfig) -> Option<Reason> {
    let total = now.finished + now.failed;
    let errors = now.failed as f64 / total.max(1) as f64;
    if total >= REQUESTS && errors > config.max_error_rate {
        return Some(Reason::Errors { found: errors, limit: config.max_error_rate });
    }
    let before = before?;
    let (gap, limit) = (live_gap(now)?, config.max_gap_ratio * if before > FLOOR { before } else { FLOOR });
    // What is no number is no gap that may pass.
    (gap.is_nan() || gap > limit).then_some(Reason::Gap { found: gap, limit })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: GuardConfig = GuardConfig { watch: Duration::from_secs(300), max_gap_ratio: 1.5, max_error_rate: 0.05 };

    fn gap(samples: u64, mean: f64) -> Tally {
        Tally { samples, tokens: 10 * samples, kl: mean * 10.0 * samples as f64, ..Tally::default() }
    }

    #[test]
    fn a_larger_gap_is_seen_once_there_are_samples() {
        let taken_back = |before, now: Tally| matches!(judge(Some(before), &now, &CONFIG), Some(Reason::Gap { .. }));
        assert!(!taken_back(0.1, gap(7, 9.0)), "too few samples");
        assert!(taken_back(0.1, gap(8, 0.16)) && !taken_back(0.1, gap(8, 0.14)));
        assert!(!taken_back(0.0, gap(8, 0.014)) && taken_back(0.0, gap(8, 0.016)), "as good as no gap");
        assert!(!taken_back(f64::NAN, gap(8, 0.014)) && taken_back(f64::NAN, gap(8, 0.016)), "nothing known of before");
        assert!(taken_back(0.1, gap(8, f64::NAN)) && taken_back(0.1, gap(8, f64::INFINITY)));
        assert_eq!(judge(None, &gap(8, 9.0), &CONFIG), None, "there is nothing to compare it to");
    }

    #[test]
    fn what_is_left_of_a_watch_is_never_more_than_allowed() {
        let rest = |until: f64| Guarded { before: None, serving: "native".into(), until }.rest(60.0);
        assert_eq!((rest(0.0), rest(now() + 1e9), rest(f64::INFINITY)), (Duration::ZERO, Duration::from_secs(60), Duration::from_secs(60)));
    }

    #[test]
    fn errors_count_once_there_are_requests() {
        let judged = |finished, failed| judge(None, &Tally { finished, failed, ..Tally::default() }, &CONFIG);
        assert_eq!(judged(0, 19), None);
        assert_eq!(judged(19, 1), None, "5 % are let pass");
        assert_eq!(judged(18, 2), Some(Reason::Errors { found: 0.1, limit: 0.05 }));
        assert_eq!(judged(1000, 0), None);
    }
}
