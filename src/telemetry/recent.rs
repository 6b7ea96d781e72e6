//! A sliding window over sums that only grow: it keeps what they were at the beginning of each step, and the caller subtracts.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Steps of a window.
const STEPS: u64 = 20;

/// States of some sums `T`, by which the last while can be told from all.
#[derive(Debug)]
pub(super) struct Recent<T> {
    /// Length of a step.
    step: Duration,
    begin: Instant,
    /// (number of a step, the sums at its first change), ascending; at most [`STEPS`].
    states: VecDeque<(u64, T)>,
}

impl<T: Clone> Recent<T> {
    /// A window of `span` that begins now.
    pub(super) fn new(span: Duration, now: Instant) -> Self {
        Self { step: span / STEPS as u32, begin: now, states: VecDeque::new() }
    }

    /// The sums are about to change.
    pub(super) fn before_change(&mut self, sums: &T, now: Instant) {
        let step = self.number(now);
        while self.states.front().is_some_and(|(number, _)| number + STEPS <= step) {
            self.states.pop_front();
        }
        if self.states.back().is_none_or(|(number, _)| *number < step) {
            self.states.push_back((step, sums.clone()));
        }
    }

    /// What the sums were when the window began; `None` where they have not changed since.
    pub(super) fn base(&self, now: Instant) -> Option<&T> {
        let step = self.number(now);
        self.states.iter().find(|(number, _)| number + STEPS > step).map(|(_, sums)| sums)
    }

    /// The time that the window covers: up to its span, in steps.
    pub(super) fn covered(&self, now: Instant) -> Duration {
        let first = self.number(now).saturating_sub(STEPS - 1);
        now.saturating_duration_since(self.begin + self.step * u32::try_from(first).unwrap_or(u32::MAX))
    }

    /// Nothing counts but what comes from now on.
    pub(super) fn restart(&mut self, now: Instant) {
        self.begin = now;
        self.states.clear();
    }

    fn number(&self, now: Instant) -> u64 {
        (now.saturating_duration_since(self.begin).as_millis() / self.step.as_millis()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sum, which grows by one at each of `seconds`, under a window of 20 s; what the window has of it at the end.
    fn counted(seconds: &[u64], end: u64) -> (u64, u64) {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let (mut recent, mut sum) = (Recent::new(Duration::from_secs(STEPS), start), 0);
        for &second in seconds {
            recent.before_change(&sum, after(second));
            sum += 1;
        }
        assert!(recent.states.len() <= STEPS as usize);
        (sum - recent.base(after(end)).unwrap_or(&sum), recent.covered(after(end)).as_secs())
    }

    #[test]
    fn what_is_older_than_the_window_does_not_count() {
        assert_eq!(counted(&[], 5), (0, 5));
        assert_eq!(counted(&[0, 1, 1], 1), (3, 1));
        assert_eq!(counted(&[0, 3, 3, 15], 19), (4, 19));
        assert_eq!(counted(&[0, 3, 3, 15], 20), (3, 19));
        assert_eq!(counted(&[0, 3, 3, 15], 23), (1, 19));
        assert_eq!(counted(&[0, 3, 3, 15], 90), (0, 19));
        let every_second: Vec<u64> = (0..500).collect();
        assert_eq!(counted(&every_second, 499), (STEPS, 19));
    }

    #[test]
    fn it_can_begin_anew() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut recent = Recent::new(Duration::from_secs(STEPS), start);
        recent.before_change(&7, start);
        assert_eq!(recent.base(after(1)), Some(&7));
        recent.restart(after(2));
        assert_eq!((recent.base(after(3)), recent.covered(after(3)).as_secs()), (None, 1));
        recent.before_change(&8, after(4));
        assert_eq!(recent.base(after(5)), Some(&8));
    }
}
