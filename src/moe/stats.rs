//! What a layer's routing did, for telemetry, fidelity, auxiliary losses and the detection of collapse.

use super::collapse::shape;

/// Expert load of one layer in one forward.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoutingStats {
    /// Tokens, T.
    pub tokens: u64,
    /// Routed rows, after capacity: the sum of `expert_tokens`.
    pub routes: u64,
    /// Tokens that each expert received, `[E]`.
    pub expert_tokens: Vec<u64>,
    /// Rows that were pushed through an expert, counted where that is done: more than `routes` where experts run for the
    /// router's gradient only. 0 where nobody counts (serving runs what it routes).
    pub executed: u64,
    /// Choices that capacity left out. 0 in serving, which is dropless.
    pub dropped: u64,
    /// Choices that capacity gave to another expert.
    pub rerouted: u64,
    /// Sum of the routing weights that each expert received, `[E]`.
    pub expert_weights: Vec<f64>,
    /// Sum over tokens of the entropy of `softmax(router logits)`, in nats.
    pub entropy_sum: f64,
    /// Tokens whose router logits are not finite: they reach no expert, and their logits are NaN.
    pub non_finite: u64,
    /// Tokens whose last chosen and first refused router logit are less than [`NEAR_TIE`](super::route::NEAR_TIE) apart: rounding may
    /// choose the other expert. 0 in training, where noise chooses.
    pub near_ties: u64,
}

impl RoutingStats {
    /// No load on `num_experts` experts.
    pub fn new(num_experts: usize) -> Self {
        Self { expert_tokens: vec![0; num_experts], expert_weights: vec![0.0; num_experts], ..Self::default() }
    }

    /// Back to no load, on `num_experts` experts.
    pub(super) fn clear(&mut self, num_experts: usize) {
        let Self { tokens, routes, executed, dropped, rerouted, expert_tokens, expert_weights, entropy_sum, non_finite, near_ties } = self;
        (*tokens, *routes, *executed, *dropped, *rerouted, *non_finite, *near_ties) = (0, 0, 0, 0, 0, 0, 0);
        *entropy_sum = 0.0;
        expert_tokens.clear();
        expert_tokens.resize(num_experts, 0);
        expert_weights.clear();
        expert_weights.resize(num_experts, 0.0);
    }

    /// Adds the load of another forward of the same layer.
    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.routes += other.routes;
        self.executed += other.executed;
        self.dropped += other.dropped;
        self.rerouted += other.rerouted;
        self.entropy_sum += other.entropy_sum;
        self.non_finite += other.non_finite;
        self.near_ties += other.near_ties;
        self.expert_tokens.iter_mut().zip(&other.expert_tokens).for_each(|(a, b)| *a += b);
        self.expert_weights.iter_mut().zip(&other.expert_weights).for_each(|(a, b)| *a += b);
    }

    /// Tokens of each expert if all had the same number. 0 for a layer without experts.
    pub fn fair_share(&self) -> f64 {
        self.routes as f64 / self.expert_tokens.len().max(1) as f64
    }

    /// Load over fair share, `[E]`: 1 is fair, 0 is dead. All zero before the first token.
    pub fn utilization(&self) -> Vec<f64> {
        let fair = self.fair_share();
        self.expert_tokens.iter().map(|&n| if self.routes == 0 { 0.0 } else { n as f64 / fair }).collect()
    }

    /// Experts without a token.
    pub fn dead(&self) -> usize {
        self.expert_tokens.iter().filter(|&&n| n == 0).count()
    }

    /// Experts with less than `share` of a fair load: 0.2 is starved, 0.05 as good as dead.
    pub fn below(&self, share: f64) -> usize {
        self.utilization().iter().filter(|&&u| u < share).count()
    }

    /// Mean load over maximal load: 1 is even, 1/E is one expert only. 0 before the first token.
    pub fn balancedness(&self) -> f64 {
        let max = self.expert_tokens.iter().copied().max().unwrap_or(0);
        if max == 0 { 0.0 } else { self.fair_share() / max as f64 }
    }

    /// Coefficient of variation of the load: 0 is even. 0 before the first token.
    pub fn load_cv(&self) -> f64 {
        shape::variation(&self.load())
    }

    /// `H(load) / ln E`: 1 is even, 0 is one expert only. 1 before the first token.
    pub fn load_entropy(&self) -> f64 {
        shape::entropy(&self.load())
    }

    /// `max n / mean n - 1` (Wang et al. 2024): 0 is even, `E/k - 1` is k experts only. 0 before the first token.
    pub fn max_vio(&self) -> f64 {
        shape::max_vio(&self.load())
    }

    /// Gini coefficient of the load: 0 is even, `(E - 1)/E` is one expert only. 0 before the first token.
    pub fn gini(&self) -> f64 {
        shape::gini(&self.load())
    }

    /// Mean entropy of `softmax(router logits)` per token, in nats: `ln E` is undecided, 0 is sure. 0 before the first token.
    pub fn router_entropy(&self) -> f64 {
        let finite = self.tokens.saturating_sub(self.non_finite);
        if finite == 0 { 0.0 } else { self.entropy_sum / finite as f64 }
    }

    fn load(&self) -> Vec<f64> {
        self.expert_tokens.iter().map(|&n| n as f64).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(expert_tokens: &[u64]) -> RoutingStats {
        let routes: u64 = expert_tokens.iter().sum();
        RoutingStats { tokens: routes, routes, expert_tokens: expert_tokens.to_vec(), ..RoutingStats::new(expert_tokens.len()) }
    }

    #[test]
    fn measures_at_both_ends() {
        let even = stats(&[5, 5, 5, 5]);
        assert_eq!((even.dead(), even.below(0.2), even.load_cv(), even.max_vio(), even.gini()), (0, 0, 0.0, 0.0, 0.0));
        assert!((even.load_entropy() - 1.0).abs() < 1e-15);
        let one = stats(&[0, 20, 0, 0]);
        assert_eq!((one.dead(), one.below(0.2), one.load_entropy(), one.max_vio(), one.gini()), (3, 3, 0.0, 3.0, 0.75));
        assert!((one.load_cv() - 3f64.sqrt()).abs() < 1e-15);
        let none = stats(&[0, 0]);
        assert_eq!((none.load_cv(), none.load_entropy(), none.max_vio(), none.gini(), none.router_entropy()), (0.0, 1.0, 0.0, 0.0, 0.0));
    }

    #[test]
    fn measures_between() {
        let some = stats(&[1, 3, 0, 36]);
        assert_eq!((some.dead(), some.below(0.2), some.below(0.05)), (1, 2, 1));
        assert!((some.max_vio() - 2.6).abs() < 1e-15);
        // Σ|n_i - n_j| over ordered pairs is 2 (2+1+35+3+33+36) = 220; 2 E Σn is 320.
        assert!((some.gini() - 220.0 / 320.0).abs() < 1e-15);
        let entropy = -[1.0f64 / 40.0, 3.0 / 40.0, 36.0 / 40.0].iter().map(|f| f * f.ln()).sum::<f64>();
        assert!((some.load_entropy() - entropy / 4f64.ln()).abs() < 1e-15);
        let undecided = RoutingStats { entropy_sum: 39.0, non_finite: 1, ..some };
        assert_eq!(undecided.router_entropy(), 1.0, "of the 39 tokens that have one");
    }

    #[test]
    fn forwards_add_up() {
        let one = RoutingStats { executed: 4, dropped: 3, rerouted: 2, non_finite: 1, near_ties: 5, entropy_sum: 0.5, ..stats(&[1, 2]) };
        let mut sum = one.clone();
        sum.add(&one);
        let twice = RoutingStats { executed: 8, dropped: 6, rerouted: 4, non_finite: 2, near_ties: 10, entropy_sum: 1.0, ..stats(&[2, 4]) };
        assert_eq!(sum, twice);
        sum.clear(2);
        assert_eq!(sum, RoutingStats::new(2));
    }
}
