//! The dispatch plan: routes sorted by expert, and the way back.

use std::ops::Range;

use super::{RoutingStats, SparseRouting};

/// Routes of all tokens, sorted by expert (counting sort, stable in token order).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DispatchPlan {
    /// `[E + 1]`: sorted rows of expert e are `offsets[e] .. offsets[e + 1]`.
    pub offsets: Vec<usize>,
    /// `[R]`: token of each sorted row.
    pub tokens: Vec<u32>,
    /// `[R]`: weight of each sorted row.
    pub weights: Vec<f32>,
    /// `[T + 1]`: routes of each token, in `positions`.
    token_offsets: Vec<u32>,
    /// `[R]`: sorted row of each route, in token order.
    positions: Vec<u32>,
}

impl DispatchPlan {
    /// Sorts `routing` by expert in O(R + E).
    pub fn new(routing: &SparseRouting, num_experts: usize) -> Self {
        let mut plan = Self::default();
        plan.fill(routing, num_experts);
        plan
    }

    /// [`DispatchPlan::new`] in the memory of another plan.
    pub(super) fn fill(&mut self, routing: &SparseRouting, num_experts: usize) {
        let Self { offsets, tokens, weights, token_offsets, positions } = self;
        let routes = routing.expert_ids.len();
        offsets.clear();
        offsets.resize(num_experts + 1, 0);
        routing.expert_ids.iter().for_each(|&expert| offsets[expert as usize + 1] += 1);
        for expert in 0..num_experts {
            offsets[expert + 1] += offsets[expert];
        }
        tokens.resize(routes, 0);
        weights.resize(routes, 0.0);
        positions.resize(routes, 0);
        for token in 0..routing.num_tokens() {
            for route in routing.routes(token) {
                let row = &mut offsets[routing.expert_ids[route] as usize];
                tokens[*row] = token as u32;
                weights[*row] = routing.weights[route];
                positions[route] = *row as u32;
                *row += 1;
            }
        }
        // Each has moved on to where the next one started.
        offsets.copy_within(..num_experts, 1);
        offsets[0] = 0;
        token_offsets.clone_from(&routing.offsets);
    }

    /// Tokens, T.
    pub fn num_tokens(&self) -> usize {
        self.token_offsets.len() - 1
    }

    /// Experts with at least one row, with their sorted rows.
    pub fn active(&self) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
        self.offsets.windows(2).enumerate().filter(|(_, w)| w[0] < w[1]).map(|(expert, w)| (expert, w[0]..w[1]))
    }

    /// (sorted row, weight) of each route of a token, in the token's order.
    pub fn routes(&self, token: usize) -> impl Iterator<Item = (usize, f32)> + '_ {
        let range = self.token_offsets[token] as usize..self.token_offsets[token + 1] as usize;
        self.positions[range].iter().map(|&row| (row as usize, self.weights[row as usize]))
    }

    /// The load that this plan puts on each expert. Entropy and non-finite counts are not known here.
    pub fn load(&self) -> RoutingStats {
        let mut stats = RoutingStats::default();
        self.load_into(&mut stats);
        stats
    }

    /// [`DispatchPlan::load`] in the memory of other stats.
    pub(super) fn load_into(&self, stats: &mut RoutingStats) {
        let num_experts = self.offsets.len() - 1;
        stats.clear(num_experts);
        stats.tokens = self.num_tokens() as u64;
        stats.routes = self.tokens.len() as u64;
        for (expert, rows) in self.active() {
            stats.expert_tokens[expert] = rows.len() as u64;
            stats.expert_weights[expert] = self.weights[rows].iter().map(|&w| f64::from(w)).sum();
        }
    }
}
