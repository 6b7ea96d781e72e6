//! The weights of a decoder in one canonical form, whatever names and layout they have on disk.
//!
//! Shapes: V vocabulary, D model width, Q = heads · head_dim, K = kv_heads · head_dim, E experts, F hidden width.
//! Linear weights are `[out, in]`. Norms, biases, the router and the gate of the shared expert are f32; the rest has
//! the dtype of the model.

use candle_core::Tensor;

/// All weights of a model.
#[derive(Clone, Debug)]
pub struct ModelWeights {
    /// `[V, D]`.
    pub embedding: Tensor,
    /// In order of depth.
    pub layers: Vec<LayerWeights>,
    /// `[D]`.
    pub final_norm: Tensor,
    /// `[V, D]`; `None` where the head is the embedding.
    pub head: Option<Tensor>,
}

/// One decoder layer.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// `[D]`, before attention.
    pub attention_norm: Tensor,
    /// Attention.
    pub attention: AttentionWeights,
    /// `[D]`, before the feed-forward part.
    pub feed_forward_norm: Tensor,
    /// Dense or routed.
    pub feed_forward: FeedForwardWeights,
}

/// Attention projections.
#[derive(Clone, Debug)]
pub struct AttentionWeights {
    /// `[Q, D]`.
    pub query: Tensor,
    /// `[K, D]`.
    pub key: Tensor,
    /// `[K, D]`.
    pub value: Tensor,
    /// `[D, Q]`.
    pub output: Tensor,
    /// `[Q]`, `[K]`, `[K]`.
    pub qkv_bias: Option<[Tensor; 3]>,
    /// `[D]`.
    pub output_bias: Option<Tensor>,
    /// Weights of the query and key norms: `[head_dim]` each per head, `[Q]` and `[K]` over the whole projection.
    pub qk_norm: Option<[Tensor; 2]>,
}

/// The feed-forward part of a layer.
#[derive(Clone, Debug)]
pub enum FeedForwardWeights {
    /// One SwiGLU.
    Dense(SwiGluWeights),
    /// Routed experts.
    Moe(MoeWeights),
}

/// `down(silu(gate x) ⊙ up x)`.
#[derive(Clone, Debug)]
pub struct SwiGluWeights {
    /// `[2F, D]`: F rows of gate, then F rows of up.
    pub gate_up: Tensor,
    /// `[D, F]`.
    pub down: Tensor,
}

/// Router and experts of one layer.
#[derive(Clone, Debug)]
pub struct MoeWeights {
    /// `[E, D]` f32.
    pub router: Tensor,
    /// `[E, 2F, D]`: in each expert F rows of gate, then F rows of up.
    pub gate_up: Tensor,
    /// `[E, D, F]`.
    pub down: Tensor,
    /// The expert that every token takes.
    pub shared: Option<SharedExpertWeights>,
}

/// `sigmoid(gate · x) * swiglu(x)`, for every token.
#[derive(Clone, Debug)]
pub struct SharedExpertWeights {
    /// The expert.
    pub expert: SwiGluWeights,
    /// `[1, D]` f32.
    pub gate: Tensor,
}
