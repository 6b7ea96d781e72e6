//! Which requests are measured beside being served, and which of those are not after all. Pure: no clock of its own, no tensor.
//!
//! A sample is the tokens of a request that ended well, prompt and continuation, with the routing that it was served under. It waits in a
//! short queue until there is time for it; where there is none, it is dropped, and that is counted. Nobody waits for a sample.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

/// A sample that has waited for so long is not begun any more.
const PATIENCE: Duration = Duration::from_secs(60);

/// Fewer tokens predict nothing.
const LEAST_TOKENS: usize = 2;

/// How much of the traffic is measured, and at what cost.
#[derive(Clone, Debug, PartialEq)]
pub struct ShadowConfig {
    /// Share of the requests that say nothing about it, from 0 to 1. Each choice of a request counts as one.
    pub rate: f64,
    /// Share of the time in which requests are worked on that may be spent beside it; at 0 nothing is ever measured.
    pub budget: f64,
    /// Samples that may wait. At most half of them, rounded up, are of requests that ask for it, so that those that are drawn have a place.
    pub queue: usize,
    /// Tokens of a sample, the first ones: positions begin at 0. At least 2.
    pub max_tokens: usize,
    /// A sample with a larger mean `KL(reference ‖ served)`, in nats, is told in the log.
    pub outlier_kl: f64,
}

/// What a request says about being measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ShadowChoice {
    /// As often as the server does.
    #[default]
    Sampled,
    /// If there is room in the queue and time.
    Always,
    /// Never.
    Never,
}

/// Why a sample is not measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// Too many waited.
    Queue,
    /// It waited for too long.
    Late,
    /// Either, of a request that asked for it: nothing that says how well the traffic is sampled.
    Asked,
    /// It has fewer than two tokens.
    Short,
}

/// The samples `S` that wait.
#[derive(Debug)]
pub struct Shadow<S> {
    config: ShadowConfig,
    rng: StdRng,
    waiting: VecDeque<Waiting<S>>,
}

#[derive(Debug)]
struct Waiting<S> {
    since: Instant,
    /// The request asked for it.
    asked: bool,
    sample: S,
}

impl Default for ShadowConfig {
    fn default() -> Self {
        Self { rate: 0.01, budget: 0.01, queue: 4, max_tokens: 512, outlier_kl: 1.0 }
    }
}

impl ShadowConfig {
    /// Nothing is measured.
    pub fn off() -> Self {
        Self { budget: 0.0, ..Self::default() }
    }

    /// Whether anything can be measured.
    pub fn is_on(&self) -> bool {
        self.budget > 0.0
    }
}

impl<S> Shadow<S> {
    /// Nothing waits. The seed decides which requests are taken.
    pub fn new(config: ShadowConfig, seed: u64) -> Self {
        Self { config, rng: StdRng::seed_from_u64(seed), waiting: VecDeque::new() }
    }

    /// As given.
    pub fn config(&self) -> &ShadowConfig {
        &self.config
    }

    /// Whether a request that has ended well becomes a sample.
    pub fn takes(&mut self, choice: ShadowChoice) -> bool {
        self.config.is_on()
            && match choice {
                ShadowChoice::Never => false,
                ShadowChoice::Always => true,
                ShadowChoice::Sampled => self.config.rate > 0.0 && self.rng.random::<f64>() < self.config.rate,
            }
    }

    /// Puts a sample of a request with so many tokens in the queue.
    pub fn push(&mut self, choice: ShadowChoice, tokens: usize, now: Instant, sample: impl FnOnce() -> S) -> Result<(), Dropped> {
        if tokens < LEAST_TOKENS {
            return Err(Dropped::Short);
        }
        let asked = choice == ShadowChoice::Always;
        let full = self.waiting.len() >= self.config.queue;
        if asked && (full || self.waiting.iter().filter(|waiting| waiting.asked).count() >= self.config.queue.div_ceil(2)) {
            return Err(Dropped::Asked);
        }
        if full {
            return Err(Dropped::Queue);
        }
        self.waiting.push_back(Waiting { since: now, asked, sample: sample() });
        Ok(())
    }

    /// Drops what has waited for too long.
    pub fn expire(&mut self, now: Instant) -> Vec<Dropped> {
        let late = self.waiting.iter().take_while(|waiting| now.saturating_duration_since(waiting.since) > PATIENCE).count();
        self.waiting.drain(..late).map(|waiting| if waiting.asked { Dropped::Asked } else { Dropped::Late }).collect()
    }

    /// Of those that were drawn the one that has waited longest; without one, of those that asked. Else a client that asks all the time
    /// would take the budget of those that were drawn, and they would expire.
    pub fn pop(&mut self) -> Option<S> {
        let drawn = self.waiting.iter().position(|waiting| !waiting.asked);
        self.waiting.remove(drawn.unwrap_or(0)).map(|waiting| waiting.sample)
    }

    /// Drops everything; how many.
    pub fn clear(&mut self) -> usize {
        self.waiting.drain(..).count()
    }

    /// Samples that wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// None waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shadow(config: ShadowConfig) -> Shadow<usize> {
        Shadow::new(config, 7)
    }

    fn after(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn the_rate_is_kept_and_a_seed_repeats_it() {
        for rate in [0.0, 0.01, 0.3, 1.0] {
            let taken = || {
                let mut shadow = shadow(ShadowConfig { rate, ..ShadowConfig::default() });
                (0..20_000).map(|_| shadow.takes(ShadowChoice::Sampled)).collect::<Vec<bool>>()
            };
            let share = taken().iter().filter(|&&taken| taken).count() as f64 / 20_000.0;
            assert!((share - rate).abs() < 0.01, "{rate}: {share}");
            assert!(rate > 0.0 || share == 0.0);
            assert!(rate < 1.0 || share == 1.0);
            assert_eq!(taken(), taken());
        }
    }

    #[test]
    fn a_request_may_decide_for_itself_unless_shadow_is_off() {
        let mut none = shadow(ShadowConfig { rate: 0.0, ..ShadowConfig::default() });
        assert_eq!([ShadowChoice::Sampled, ShadowChoice::Always, ShadowChoice::Never].map(|c| none.takes(c)), [false, true, false]);
        let mut all = shadow(ShadowConfig { rate: 1.0, ..ShadowConfig::default() });
        assert!(!all.takes(ShadowChoice::Never));
        let mut off = shadow(ShadowConfig { rate: 1.0, ..ShadowConfig::off() });
        assert!(!off.takes(ShadowChoice::Always) && !off.takes(ShadowChoice::Sampled));
    }

    #[test]
    fn the_queue_is_bounded_and_in_order() {
        let now = Instant::now();
        let mut shadow = shadow(ShadowConfig { queue: 2, ..ShadowConfig::default() });
        let pushed: Vec<_> = (0..1000).map(|n| shadow.push(ShadowChoice::Sampled, 5, now, || n)).collect();
        assert_eq!(pushed[..3], [Ok(()), Ok(()), Err(Dropped::Queue)]);
        assert!(shadow.len() == 2 && shadow.waiting.capacity() < 16, "what is refused takes no memory");
        assert_eq!([shadow.pop(), shadow.pop(), shadow.pop()], [Some(0), Some(1), None]);
        assert_eq!(shadow.push(ShadowChoice::Sampled, 1, now, || 9), Err(Dropped::Short));
        assert!(shadow.is_empty());
    }

    #[test]
    fn those_that_ask_leave_places_to_those_that_are_drawn() {
        use ShadowChoice::{Always, Sampled};
        let start = Instant::now();
        for (queue, asked, drawn) in [(0, 0, 0), (1, 1, 0), (4, 2, 2), (5, 3, 2)] {
            let mut shadow = shadow(ShadowConfig { queue, ..ShadowConfig::default() });
            let mut taken = |choice| (0..1000).filter(|&n| shadow.push(choice, 5, start, || n).is_ok()).count();
            assert_eq!((taken(Always), taken(Sampled)), (asked, drawn), "{queue}");
            assert_eq!(shadow.push(Always, 5, start, || 0), Err(Dropped::Asked));
            assert_eq!(shadow.push(Sampled, 5, start, || 0), Err(Dropped::Queue));
            let late = shadow.expire(after(start, 61));
            let of = |kind| late.iter().filter(|&&dropped| dropped == kind).count();
            assert_eq!((of(Dropped::Asked), of(Dropped::Late)), (asked, drawn));
        }
        let mut shadow = shadow(ShadowConfig { queue: 4, ..ShadowConfig::default() });
        assert_eq!((0..1000).filter(|&n| shadow.push(Sampled, 5, start, || n).is_ok()).count(), 4, "they may have all of them");
        assert_eq!(shadow.clear(), 4);
        for (n, choice) in [Always, Sampled, Always, Sampled].into_iter().enumerate() {
            shadow.push(choice, 5, start, || n).unwrap();
        }
        assert_eq!([(); 5].map(|()| shadow.pop()), [Some(1), Some(3), Some(0), Some(2), None], "and they go first");
    }

    #[test]
    fn what_waits_too_long_is_dropped() {
        let start = Instant::now();
        let mut shadow = shadow(ShadowConfig::default());
        for (n, seconds) in [0, 30, 50].into_iter().enumerate() {
            shadow.push(ShadowChoice::Sampled, 5, after(start, seconds), || n).unwrap();
        }
        assert_eq!((shadow.expire(after(start, 60)), shadow.expire(after(start, 91))), (vec![], vec![Dropped::Late; 2]));
        assert_eq!(shadow.len(), 1);
        assert_eq!((shadow.clear(), shadow.len()), (1, 0));
    }
}
