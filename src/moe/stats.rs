//! What a layer's routing did, for telemetry, fidelity and auxiliary losses.

/// Expert load of one layer in one forward.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoutingStats {
    /// Tokens, T.
    pub tokens: u64,
    /// Routed rows: the sum of `expert_tokens`.
    pub routes: u64,
    /// Tokens that each expert received, `[E]`.
    pub expert_tokens: Vec<u64>,
    /// Rows that were pushed through an expert, counted where that is done: more than `routes` where experts run for the
    /// router's gradient only, fewer where capacity dropped some. 0 where nobody counts (serving runs what it routes).
    pub executed: u64,
    /// Sum of the routing weights that each expert received, `[E]`.
    pub expert_weights: Vec<f64>,
    /// Sum over tokens of the entropy of `softmax(router logits)`, in nats.
    pub entropy_sum: f64,
    /// Tokens whose router logits are not finite: they reach no expert, and their logits are NaN.
    pub non_finite: u64,
}

impl RoutingStats {
    /// No load on `num_experts` experts.
    pub fn new(num_experts: usize) -> Self {
        Self { expert_tokens: vec![0; num_experts], expert_weights: vec![0.0; num_experts], ..Self::default() }
    }

    /// Adds the load of another forward of the same layer.
    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.routes += other.routes;
        self.executed += other.executed;
        self.entropy_sum += other.entropy_sum;
        self.non_finite += other.non_finite;
        self.expert_tokens.iter_mut().zip(&other.expert_tokens).for_each(|(a, b)| *a += b);
        self.expert_weights.iter_mut().zip(&other.expert_weights).for_each(|(a, b)| *a += b);
    }

    /// Load over fair share, `[E]`: 1 is fair, 0 is dead. All zero before the first token.
    pub fn utilization(&self) -> Vec<f64> {
        let fair = self.routes as f64 / self.expert_tokens.len() as f64;
        self.expert_tokens.iter().map(|&n| if self.routes == 0 { 0.0 } else { n as f64 / fair }).collect()
    }

    /// Experts without a token.
    pub fn dead(&self) -> usize {
        self.expert_tokens.iter().filter(|&&n| n == 0).count()
    }

    /// Mean load over maximal load: 1 is even, 1/E is one expert only. 0 before the first token.
    pub fn balancedness(&self) -> f64 {
        let max = self.expert_tokens.iter().copied().max().unwrap_or(0);
        if max == 0 { 0.0 } else { self.routes as f64 / self.expert_tokens.len() as f64 / max as f64 }
    }

    /// Coefficient of variation of the load: 0 is even. 0 before the first token.
    pub fn load_cv(&self) -> f64 {
        let utilization = self.utilization();
        if self.routes == 0 {
            return 0.0;
        }
        (utilization.iter().map(|u| (u - 1.0).powi(2)).sum::<f64>() / utilization.len() as f64).sqrt()
    }
}
