//! What a forward must do at least: bytes to read and floating-point operations, from the spec and what was routed.
//!
//! Bytes: the weights of every linear map once per forward, of experts only those that some token reached; one row of
//! the embedding per token; the keys and values that the queries may see, and those that are written. Activations are
//! not counted: they stay in caches. Operations: two for each weight and row, and the two products of attention. Norms,
//! rotations and softmax are left out.

use std::ops::AddAssign;

use serde::Serialize;

use crate::{
    model::{Batch, FeedForwardSpec, ModelSpec, QkNorm, Span},
    moe::RoutingStats,
};

/// Sizes of elements in memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ElementSizes {
    /// Of the large weights, scales of quantised blocks included.
    pub weights: f64,
    /// Of the weights of routed experts.
    pub experts: f64,
    /// Of cached keys and values.
    pub cache: f64,
}

/// Work of one forward, or of several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Tokens that went in.
    pub tokens: u64,
    /// Bytes of weights.
    pub weight_bytes: f64,
    /// Bytes of keys and values.
    pub cache_bytes: f64,
    /// Floating-point operations.
    pub flops: f64,
    /// Distinct experts that were read, over layers and forwards.
    pub experts: u64,
    /// Layers with experts, over forwards.
    pub moe_layers: u64,
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.tokens += other.tokens;
        self.weight_bytes += other.weight_bytes;
        self.cache_bytes += other.cache_bytes;
        self.flops += other.flops;
        self.experts += other.experts;
        self.moe_layers += other.moe_layers;
    }
}

impl Cost {
    /// The work of one forward of `batch`. `routed` has what each MoE layer did, in order of depth.
    pub fn of<'a>(spec: &ModelSpec, sizes: ElementSizes, batch: &Batch, routed: impl IntoIterator<Item = &'a RoutingStats>) -> Self {
        let (tokens, d) = (batch.tokens.len() as f64, spec.hidden_size as f64);
        let rows = batch.logit_rows().len() as f64;
        let mut tally = Tally { sizes, cost: Self { tokens: batch.tokens.len() as u64, ..Self::default() } };
        tally.cost.weight_bytes += tokens * d * sizes.weights;
        if rows > 0.0 {
            tally.linear(spec.vocab_size as f64 * d, rows);
            tally.plain(d);
        }
        let mut routed = routed.into_iter();
        for layer in &spec.layers {
            attention(&mut tally, spec, layer.sliding_window, batch, tokens);
            match &layer.feed_forward {
                FeedForwardSpec::Dense { width } => tally.linear(3.0 * d * *width as f64, tokens),
                FeedForwardSpec::Moe(moe) => {
                    tally.plain(d * moe.num_experts as f64);
                    tally.cost.flops += 2.0 * d * moe.num_experts as f64 * tokens;
                    if let Some(width) = moe.shared_expert_width {
                        tally.linear(3.0 * d * width as f64, tokens);
                        tally.plain(d);
                    }
                    let Some(stats) = routed.next() else { continue };
                    let (expert, read) = (3.0 * d * moe.expert_width as f64, moe.num_experts - stats.dead());
                    tally.cost.weight_bytes += expert * read as f64 * sizes.experts;
                    tally.cost.flops += 2.0 * expert * stats.routes as f64;
                    tally.cost.experts += read as u64;
                    tally.cost.moe_layers += 1;
                }
            }
        }
        tally.cost
    }

    /// All bytes.
    pub fn bytes(&self) -> f64 {
        self.weight_bytes + self.cache_bytes
    }

    /// All bytes, per token.
    pub fn bytes_per_token(&self) -> f64 {
        self.bytes() / self.tokens.max(1) as f64
    }

    /// Operations per token.
    pub fn flops_per_token(&self) -> f64 {
        self.flops / self.tokens.max(1) as f64
    }

    /// Experts that one layer read in one forward, on average.
    pub fn experts_per_layer(&self) -> f64 {
        self.experts as f64 / self.moe_layers.max(1) as f64
    }
}

struct Tally {
    sizes: ElementSizes,
    cost: Cost,
}

impl Tally {
    /// A map with `weights` weights, over `rows` rows.
    fn linear(&mut self, weights: f64, rows: f64) {
        self.cost.weight_bytes += weights * self.sizes.weights;
        self.cost.flops += 2.0 * weights * rows;
    }

    /// Weights that are f32 whatever the dtype: norms, biases, routers.
    fn plain(&mut self, weights: f64) {
        self.cost.weight_bytes += weights * 4.0;
    }
}

fn attention(tally: &mut Tally, spec: &ModelSpec, window: Option<usize>, batch: &Batch, tokens: f64) {
    let d = spec.hidden_size as f64;
    let (q, kv) = ((spec.num_heads * spec.head_dim) as f64, (spec.num_kv_heads * spec.head_dim) as f64);
    tally.linear(d * (2.0 * q + 2.0 * kv), tokens);
    let bias = if spec.qkv_bias { q + 2.0 * kv } else { 0.0 } + if spec.out_bias { d } else { 0.0 };
    let norms = match spec.qk_norm {
        QkNorm::None => 0.0,
        QkNorm::PerHead => 2.0 * spec.head_dim as f64,
        QkNorm::Full => q + kv,
    };
    tally.plain(2.0 * d + bias + norms);
    for span in &batch.spans {
        let (seen, pairs) = reach(span, window);
        tally.cost.cache_bytes += 2.0 * kv * tally.sizes.cache * (seen + span.new) as f64;
        tally.cost.flops += 4.0 * q * pairs as f64;
    }
}

/// Positions that any query of a span sees, and pairs of a query and a position that it sees.
fn reach(span: &Span, window: Option<usize>) -> (usize, usize) {
    let window = window.unwrap_or(usize::MAX);
    let seen = (span.past + span.new).min(span.new.saturating_add(window) - 1);
    (seen, (span.past..span.past + span.new).map(|position| (position + 1).min(window)).sum())
}

#[cfg(test)]
mod tests {
    use super::{super::synthetic::SyntheticSpec, *};
    use crate::{model::LogitRows, moe::policy::RoutingChoice};

    const BF16: ElementSizes = ElementSizes { weights: 2.0, experts: 2.0, cache: 4.0 };

    fn spec() -> ModelSpec {
        "layers=3,hidden=8,heads=2,kv-heads=1,head-dim=4,experts=4,expert-width=16,top-k=2,vocab=10"
            .parse::<SyntheticSpec>()
            .unwrap()
            .model()
    }

    fn batch(spans: &[(usize, usize)]) -> Batch {
        let mut batch = Batch::default();
        for &(past, new) in spans {
            batch.push(&[0; 64], &vec![0; new], past, RoutingChoice::Native, LogitRows::Last);
        }
        batch
    }

    fn stats(expert_tokens: &[u64]) -> RoutingStats {
        let routes = expert_tokens.iter().sum();
        RoutingStats { routes, expert_tokens: expert_tokens.to_vec(), ..RoutingStats::new(expert_tokens.len()) }
    }

    /// One token: every weight that it uses is read once, and costs two operations.
    #[test]
    fn one_token_reads_the_active_parameters() {
        let spec = spec();
        let layer = stats(&[1, 0, 1, 0]);
        let cost = Cost::of(&spec, BF16, &batch(&[(0, 1)]), [&layer, &layer, &layer]);
        let (d, q, kv, experts, width) = (8.0, 8.0, 4.0, 4.0, 16.0);
        let linear = 3.0 * (d * (2.0 * q + 2.0 * kv) + 2.0 * 3.0 * d * width) + 10.0 * d;
        let plain = 3.0 * (2.0 * d + d * experts) + d;
        assert_eq!(cost.weight_bytes, 2.0 * (linear + d) + 4.0 * plain, "d for the row of the embedding");
        let (_, active) = spec.parameters();
        assert_eq!(linear + plain + 10.0 * d, active as f64, "but for the embedding, the same as the spec says");
        assert_eq!(cost.flops, 2.0 * (linear + 3.0 * d * experts) + 3.0 * 4.0 * q);
        assert_eq!(cost.cache_bytes, 3.0 * 2.0 * kv * 4.0 * 2.0, "read and written");
        assert_eq!((cost.tokens, cost.experts, cost.experts_per_layer()), (1, 6, 2.0));
    }

    #[test]
    fn a_batch_shares_experts_and_not_caches() {
        let spec = spec();
        let (same, different) = (stats(&[2, 0, 2, 0]), stats(&[1, 1, 1, 1]));
        let one = Cost::of(&spec, BF16, &batch(&[(5, 1)]), [&stats(&[1, 0, 1, 0]); 3]);
        let shared = Cost::of(&spec, BF16, &batch(&[(5, 1), (5, 1)]), [&same; 3]);
        let apart = Cost::of(&spec, BF16, &batch(&[(5, 1), (5, 1)]), [&different; 3]);
        assert_eq!(shared.weight_bytes - one.weight_bytes, 2.0 * 8.0, "one more row of the embedding");
        assert_eq!(apart.weight_bytes - shared.weight_bytes, 3.0 * 2.0 * 3.0 * 8.0 * 16.0 * 2.0);
        assert_eq!(shared.cache_bytes, 2.0 * one.cache_bytes);
        assert_eq!((shared.flops, apart.flops), (2.0 * one.flops, 2.0 * one.flops));
        assert_eq!(shared.flops_per_token(), one.flops_per_token());
        let mut sum = one;
        sum += shared;
        assert_eq!((sum.tokens, sum.bytes()), (3, one.bytes() + shared.bytes()));
        assert_eq!(sum.bytes_per_token(), sum.bytes() / 3.0);
    }

    #[test]
    fn queries_see_what_causality_and_window_allow() {
        let span = |past, new| batch(&[(past, new)]).spans.remove(0);
        assert_eq!(reach(&span(0, 4), None), (4, 1 + 2 + 3 + 4));
        assert_eq!(reach(&span(10, 2), None), (12, 11 + 12));
        assert_eq!(reach(&span(10, 2), Some(4)), (5, 8));
        assert_eq!(reach(&span(0, 3), Some(2)), (3, 1 + 2 + 2));
    }
}
