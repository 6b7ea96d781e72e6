//! Detection of collapse: the shape of a layer's load, a verdict on it, and a monitor that forms one over a run.
//!
//! Thresholds are proposals, not constants of nature: a load with MaxVio 1 has one expert with twice its share.

use serde::{Deserialize, Serialize};

use super::choices::ChoiceRows;

/// State of a layer's routing. Ordered: later is worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// MaxVio below 1, load entropy above 0.9, no expert dead.
    Healthy,
    /// Uneven, or an expert dead: MaxVio up to 3, load entropy down to 0.75.
    Skewed,
    /// MaxVio above 3, load entropy below 0.75, or more than an eighth of the experts dead.
    Collapsing,
    /// More than half of the experts dead, or MaxVio within a third of its largest value.
    Collapsed,
}

impl Health {
    /// The verdict on a load of `k` choices per token. `dead` is below 0.05 of a fair share.
    ///
    /// With few experts per choice (`E/k` up to 4) MaxVio cannot grow large and says little: there dead experts and
    /// entropy decide alone.
    pub fn of(load: &[f64], k: usize) -> Self {
        let experts = load.len() as f64;
        let (dead, entropy, vio) = (shape::below(load, DEAD) as f64, shape::entropy(load), shape::max_vio(load));
        let worst = experts / k.max(1) as f64 - 1.0;
        let vio = if worst <= 3.0 { None } else { Some(vio) };
        let above = |limit: f64| vio.is_some_and(|vio| vio > limit);
        if dead > experts / 2.0 || above(0.7 * worst) {
            Self::Collapsed
        } else if above(3.0) || dead > experts / 8.0 || entropy < 0.75 {
            Self::Collapsing
        } else if above(1.0) || dead > 0.0 || entropy < 0.9 {
            Self::Skewed
        } else {
            Self::Healthy
        }
    }
}

/// Below this share of a fair load an expert counts as dead.
pub const DEAD: f64 = 0.05;

/// Tokens that a fair expert is expected to have had before a verdict.
const EXPECTED: f64 = 50.0;

/// Steps for which the task's gradient must have been negligible before the router counts as dead.
const SILENT_STEPS: usize = 50;

/// Task gradient over auxiliary gradient, below which the router learns balance and nothing else.
const SILENT: f64 = 1e-3;

/// Watches the load of one layer over a run: counts that forget, and how long the task has not moved the router.
///
/// The load is what the router prefers ([`super::estimator::Preference`]), not what ran.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Monitor {
    /// Choices per token.
    k: usize,
    /// Tokens after which a count has fallen to 1/e.
    window: f64,
    /// `[E]` rows, older ones for less.
    load: Vec<f64>,
    /// Tokens, older ones for less.
    tokens: f64,
    /// Steps in a row with a silent task gradient.
    silent: usize,
}

impl Monitor {
    /// Of a layer with `experts`, of which a token prefers `k` ([`super::estimator::Estimator::k`]: 1 where all are
    /// mixed and the method has no k). It forgets over `window` tokens, at least twice the `50 E/k` that a verdict
    /// takes.
    pub fn new(experts: usize, k: usize, window: usize) -> Self {
        let k = k.max(1);
        let least = 2.0 * EXPECTED * experts as f64 / k as f64;
        Self { k, window: (window as f64).max(least), load: vec![0.0; experts], tokens: 0.0, silent: 0 }
    }

    /// Takes in the preferences of one forward. Choices of experts that the layer does not have are not of this layer
    /// and leave it as it was.
    pub fn observe(&mut self, preferred: ChoiceRows<'_>) {
        if preferred.chosen.iter().any(|&e| e as usize >= self.load.len()) {
            return;
        }
        let tokens = preferred.tokens();
        let keep = (-(tokens as f64) / self.window).exp();
        self.tokens = self.tokens * keep + tokens as f64;
        let counts = preferred.counts(0..tokens, self.load.len());
        self.load.iter_mut().zip(counts).for_each(|(load, n)| *load = *load * keep + n);
    }

    /// Takes in the norms of the router's gradient from the task and from auxiliary losses, of one step.
    pub fn observe_gradients(&mut self, task: f64, auxiliary: f64) {
        self.silent = if auxiliary > 0.0 && task < SILENT * auxiliary { self.silent + 1 } else { 0 };
    }

    /// Whether for 50 steps only auxiliary losses have moved the router: perfectly even load is then no sign of health.
    pub fn router_is_dead(&self) -> bool {
        self.silent >= SILENT_STEPS
    }

    /// The verdict; `None` until a fair expert would have had 50 tokens.
    pub fn health(&self) -> Option<Health> {
        let enough = self.tokens * self.k as f64 >= EXPECTED * self.load.len() as f64;
        enough.then(|| Health::of(&self.load, self.k))
    }

    /// Experts below 0.05 of a fair share, ascending; none until there is a verdict.
    pub fn dead(&self) -> Vec<usize> {
        match self.health() {
            Some(_) => shape::utilization(&self.load).enumerate().filter(|(_, u)| *u < DEAD).map(|(e, _)| e).collect(),
            None => Vec::new(),
        }
    }

    /// The expert with the largest load, ties to the lowest index.
    pub fn busiest(&self) -> usize {
        (1..self.load.len()).fold(0, |best, e| if self.load[e] > self.load[best] { e } else { best })
    }

    /// `[E]` rows, older ones for less.
    pub fn load(&self) -> &[f64] {
        &self.load
    }

    /// Choices per token.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Forgets the load: after experts were changed, what they had before says nothing.
    pub fn reset(&mut self) {
        self.load.fill(0.0);
        self.tokens = 0.0;
    }
}

/// Measures of a load `[E]`, in any unit. An empty load counts as even.
pub mod shape {
    /// Load over fair share.
    pub fn utilization(load: &[f64]) -> impl Iterator<Item = f64> + '_ {
        let fair = load.iter().sum::<f64>() / load.len().max(1) as f64;
        load.iter().map(move |n| if fair > 0.0 { n / fair } else { 1.0 })
    }

    /// Experts with less than `share` of a fair load.
    pub fn below(load: &[f64], share: f64) -> usize {
        utilization(load).filter(|u| *u < share).count()
    }

    /// Standard deviation over mean.
    pub fn variation(load: &[f64]) -> f64 {
        (utilization(load).map(|u| (u - 1.0).powi(2)).sum::<f64>() / load.len().max(1) as f64).sqrt()
    }

    /// `H / ln E`.
    pub fn entropy(load: &[f64]) -> f64 {
        if load.len() < 2 {
            return 1.0;
        }
        let share = |u: f64| u / load.len() as f64;
        let entropy: f64 = utilization(load).map(share).map(|f| if f > 0.0 { -f * f.ln() } else { 0.0 }).sum();
        entropy / (load.len() as f64).ln()
    }

    /// `max / mean - 1`.
    pub fn max_vio(load: &[f64]) -> f64 {
        utilization(load).fold(1.0, f64::max) - 1.0
    }

    /// `Σ_ij |n_i - n_j| / (2 E² mean)`, from the sorted load.
    pub fn gini(load: &[f64]) -> f64 {
        let mut sorted: Vec<f64> = utilization(load).collect();
        sorted.sort_by(f64::total_cmp);
        let e = load.len() as f64;
        let sum: f64 = sorted.iter().enumerate().map(|(i, u)| (2.0 * (i as f64 + 1.0) - e - 1.0) * u).sum();
        if sum > 0.0 { sum / (e * e) } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::choices::Choices;

    #[test]
    fn verdicts() {
        let skewed = [2.4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8];
        for (load, k, expected) in [
            ([1.0; 8], 1, Health::Healthy),
            ([1.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.7], 1, Health::Healthy),
            (skewed, 1, Health::Skewed),
            ([1.1, 1.2, 1.1, 1.2, 1.1, 1.1, 1.2, 0.0], 1, Health::Skewed),
            ([1.3, 1.3, 1.3, 1.3, 1.4, 1.4, 0.0, 0.0], 1, Health::Collapsing),
            ([4.2, 0.8, 0.8, 0.8, 0.4, 0.4, 0.3, 0.3], 1, Health::Collapsing),
            ([7.0, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1], 1, Health::Collapsed),
            ([3.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0], 1, Health::Collapsed),
            // Two of eight: the largest MaxVio is 3, so that it says nothing, and five dead say enough.
            ([4.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5], 2, Health::Skewed),
            ([4.0, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], 2, Health::Collapsed),
        ] {
            assert_eq!(Health::of(&load, k), expected, "{load:?} k={k}");
        }
        assert!(Health::Healthy < Health::Collapsed);
    }

    /// So many tokens that prefer each expert.
    fn tokens(counts: &[usize]) -> Choices {
        Choices::from_rows(counts.iter().enumerate().flat_map(|(e, &n)| std::iter::repeat_n([e as u32], n)))
    }

    #[test]
    fn the_monitor_waits_and_forgets() {
        let mut monitor = Monitor::new(8, 1, 1000);
        monitor.observe(tokens(&[399, 0, 0, 0, 0, 0, 0, 0]).rows());
        assert_eq!((monitor.health(), monitor.dead()), (None, vec![]), "399 of 400 tokens");
        monitor.observe(tokens(&[0, 256, 0, 0, 0, 0, 0, 0]).rows());
        assert_eq!((monitor.health(), monitor.dead(), monitor.busiest()), (Some(Health::Collapsed), (2..8).collect(), 0));
        for _ in 0..40 {
            monitor.observe(tokens(&[32; 8]).rows());
        }
        assert_eq!((monitor.health(), monitor.dead()), (Some(Health::Healthy), vec![]), "ten windows later");
        monitor.observe(tokens(&[0, 0, 0, 0, 0, 0, 0, 0, 1000]).rows());
        assert_eq!(monitor.health(), Some(Health::Healthy), "another layer's load");
        monitor.reset();
        assert_eq!(monitor.health(), None);
    }

    #[test]
    fn a_window_too_short_for_a_verdict_is_lengthened() {
        let mut monitor = Monitor::new(8, 1, 1);
        for _ in 0..100 {
            monitor.observe(tokens(&[8; 8]).rows());
        }
        assert_eq!(monitor.health(), Some(Health::Healthy));
    }

    #[test]
    fn a_router_that_only_balance_moves_is_dead() {
        let mut monitor = Monitor::new(4, 1, 100);
        for step in 0..60 {
            monitor.observe_gradients(if step == 5 { 1.0 } else { 0.0 }, 0.1);
            assert_eq!(monitor.router_is_dead(), step >= 55, "step {step}");
        }
        monitor.observe_gradients(0.0, 0.0);
        assert!(!monitor.router_is_dead(), "a router that nothing moves is frozen, not dead");
    }
}
