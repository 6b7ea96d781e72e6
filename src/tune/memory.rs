//! What a run will take of memory, worked out before it begins.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{
    config::{Recompute, TuneConfig},
    plan::TunePlan,
};
use crate::{
    error::{Error, Result},
    memory::available,
    model::{FeedForwardSpec, ModelSpec, MoeSpec, weights::ModelWeights},
    moe::estimator::{Combine, Estimator, Execution, Expected},
};

/// Bytes of an f32.
const F32: u64 = 4;

/// What code, threads, their arenas and the buffers of products take whatever the run is.
const FIXED: u64 = 16 << 20;

/// Values for each token and expert of what is known of a routing: outputs, scores, weights, choices, most of them in f64.
const ROUTING: u64 = 24;

/// Percent of the rest that allocators waste.
const WASTE: u64 = 15;

/// Bytes that a run takes at most beside the model that is served, by what they are for. Not all of it is there at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// f32 copies of the tensors that learn.
    pub variables: u64,
    /// Both moments of AdamW.
    pub moments: u64,
    /// Their sum over micro-batches, and those of the backward in progress.
    pub gradients: u64,
    /// The tensors as they will be served: of the candidate, and of the best so far with early stopping.
    pub candidate: u64,
    /// Of the layers in the graph of one micro-batch.
    pub activations: u64,
    /// Of one micro-batch, and what its losses make of them.
    pub logits: u64,
    /// Its forward over one micro-batch.
    pub teacher: u64,
    /// Logits, caches and buffers of one window, of the model before and of the candidate.
    pub evaluation: u64,
    /// A state on its way to disk.
    pub saving: u64,
    /// Tokens.
    pub data: u64,
    /// The most that is there at one time.
    pub total: u64,
}

impl MemoryPlan {
    /// Checks that there is so much, of which no more than `most` is allowed. `on_device`: of the machine's own memory only what is saved
    /// there is counted; what a device has, it tells when it is asked for more.
    ///
    /// # Errors
    /// `FailedPrecondition` that says what it would be for, and how to take less.
    pub fn check(&self, most: Option<u64>, on_device: bool) -> Result<()> {
        let on_host = if on_device { self.saving + self.candidate + self.data + FIXED } else { self.total };
        let (allowed, room) = (most.filter(|&most| most < self.total), available().filter(|&room| room < on_host));
        let limit = match (allowed, room) {
            (None, None) => return Ok(()),
            (Some(most), room) if room.is_none_or(|room| most <= room) => format!("{} MiB are allowed", most >> 20),
            (_, room) => format!("{} MiB are available", room.unwrap_or(0) >> 20),
        };
        let message = format!(
            "the run needs {self}, and {limit}: choose fewer micro windows, fewer tokens in a window, recomputation by layer, or fewer \
             tensors as target"
        );
        Err(Error::FailedPrecondition(message))
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        write!(f, "at most {} MiB beside the model", mib(self.total))?;
        let mut parts = [
            ("variables", self.variables),
            ("moments", self.moments),
            ("gradients", self.gradients),
            ("candidate", self.candidate),
            ("activations", self.activations),
            ("logits", self.logits),
            ("teacher", self.teacher),
            ("evaluation", self.evaluation),
            ("saving", self.saving),
            ("data", self.data),
        ];
        parts.sort_by_key(|&(_, bytes)| std::cmp::Reverse(bytes));
        let parts: Vec<String> =
            parts.iter().filter(|part| part.1 >> 20 > 0).map(|&(name, bytes)| format!("{name} {}", mib(bytes))).collect();
        if parts.is_empty() { Ok(()) } else { write!(f, " ({})", parts.join(", ")) }
    }
}

impl TuneConfig {
    /// What a run of this takes that keeps its state, over `weights` and `tokens` of text. An estimate from above, by what each part of
    /// the step keeps.
    pub fn memory(&self, spec: &ModelSpec, weights: &ModelWeights, plan: &TunePlan, tokens: usize) -> MemoryPlan {
        let named = weights.named();
        let chosen = || named.iter().filter(|(name, _)| plan.selection.names.contains(name));
        let values: u64 = chosen().map(|(_, tensor)| tensor.elem_count() as u64).sum();
        let largest = chosen().map(|(_, tensor)| tensor.elem_count() as u64).max().unwrap_or(0);
        let served: u64 = chosen().map(|(_, tensor)| (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64).sum();
        let estimator = plan.routing.estimator(0);
        let micro = (self.run.micro_windows * plan.window) as u64;
        let step = StepSize { spec, plan, estimator, tokens: micro * estimator.copies() as u64, on_device: weights.on_device() };
        let vocab = spec.vocab_size as u64;
        // The logits, their gradient and one value in between; a teacher has its own gradient, row by row and together.
        let of_logits = if self.distill.is_some() { 6 } else { 3 };
        let mut memory = MemoryPlan {
            variables: F32 * values,
            moments: 2 * F32 * values,
            // The backward adds what reaches a tensor to zeros.
            gradients: F32 * (2 * values + 2 * largest),
            candidate: served * if self.stop.is_some() { 2 } else { 1 },
            activations: F32 * step.activations(self.run.recompute),
            logits: F32 * of_logits * step.tokens * vocab,
            teacher: self.distill.map_or(0, |_| F32 * (micro * vocab + step.serving(micro))),
            evaluation: F32 * (3 * plan.window as u64 * vocab + 2 * step.serving(plan.window as u64) + step.caches()),
            // A copy of the moments, and all of the file.
            saving: 2 * F32 * values + 3 * F32 * values + if self.stop.is_some() { served } else { 0 },
            // All of it, and the inputs and targets of a step.
            data: F32 * (tokens + 2 * self.run.windows * plan.window) as u64,
            total: 0,
        };
        let step = memory.gradients + memory.activations + memory.logits + self.distill.map_or(0, |_| F32 * micro * vocab);
        let most = step.max(memory.teacher).max(memory.evaluation).max(memory.saving);
        let all = memory.variables + memory.moments + memory.candidate + memory.data + most;
        memory.total = all + all * WASTE / 100 + FIXED;
        memory
    }
}

/// What the experts of a layer take.
struct Experts {
    /// In the graph, for each token.
    kept: u64,
    /// For a moment of the backward, for each token.
    passing: u64,
    /// For all tokens together, in both.
    weights: u64,
}

/// A micro-batch. What it takes is counted in values.
struct StepSize<'a> {
    spec: &'a ModelSpec,
    plan: &'a TunePlan,
    estimator: Estimator,
    /// Rows of a forward.
    tokens: u64,
    /// Operations are those of a device, which make more in between; some of it is narrower than what is counted here.
    on_device: bool,
}

impl StepSize<'_> {
    fn learns(&self, name: &str) -> bool {
        self.plan.selection.names.contains(name)
    }

    /// The first layer that is in the graph: above it everything is.
    fn first(&self) -> usize {
        if self.learns("embedding") {
            return 0;
        }
        let learns = |layer: &usize| {
            let prefix = format!("layers.{layer}.");
            self.plan.selection.names.iter().any(|name| name.starts_with(&prefix))
        };
        (0..self.spec.layers.len()).find(learns).unwrap_or(self.spec.layers.len())
    }

    fn activations(&self, recompute: Recompute) -> u64 {
        let layers: Vec<(u64, u64)> = (self.first()..self.spec.layers.len()).map(|layer| self.layer(layer)).collect();
        // Gradients on their way down: those of one layer.
        let passing = layers.iter().map(|layer| layer.1).max().unwrap_or(0);
        let routed = self.spec.moe_layers().map(|(_, moe)| ROUTING * moe.num_experts as u64).sum::<u64>();
        let inputs = self.tokens * ((self.spec.hidden_size * (self.spec.layers.len() + 1)) as u64 + routed);
        passing
            + match recompute {
                Recompute::None => layers.iter().map(|layer| layer.0).sum::<u64>(),
                Recompute::Layer => inputs + layers.iter().map(|layer| layer.0).max().unwrap_or(0),
            }
    }

    /// What the graph of a layer keeps, and what its backward takes for a moment.
    fn layer(&self, layer: usize) -> (u64, u64) {
        let spec = self.spec;
        let [d, q, kv] = [spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim].map(|width| width as u64);
        // Norms, projections, rotated in four products, what attention returns, two sums.
        let body = 10 * d + 6 * q + 8 * kv;
        let Experts { kept, passing, weights } = match &spec.layers[layer].feed_forward {
            FeedForwardSpec::Dense { width } => Experts { kept: 3 * *width as u64, passing: 7 * *width as u64, weights: 0 },
            FeedForwardSpec::Moe(moe) => self.experts(layer, moe),
        };
        // All scores of all heads at once, and what becomes of them; loops have those of one head.
        let scores = if self.on_device { 5 * (spec.num_heads * self.plan.window) as u64 } else { 0 };
        (self.tokens * (body + kept) + weights, self.tokens * (12 * d + passing + scores) + weights)
    }

    fn experts(&self, layer: usize, moe: &MoeSpec) -> Experts {
        let [d, e, f] = [self.spec.hidden_size, moe.num_experts, moe.expert_width].map(|width| width as u64);
        let estimator = self.plan.served.get(layer).copied().flatten().unwrap_or(self.estimator);
        let shared = moe.shared_expert_width.map_or(0, |width| 3 * width as u64 + d);
        let routing = ROUTING * e + shared;
        let run = match estimator.executed_per_token(moe.num_experts) {
            Expected::Exactly(run) | Expected::AtMost(run) => (run / estimator.copies()) as u64,
            Expected::Merged => {
                let merged = 3 * f * d + 4 * f;
                return Experts { kept: routing + merged, passing: 3 * merged, weights: 0 };
            }
        };
        // Where all run, learned weights are laid out anew; a device rounds all of them.
        let again = match self.learns(&format!("layers.{layer}.experts.down")) {
            _ if self.on_device => 2 * e * d * f,
            true => e * d * f,
            false => 0,
        };
        // The backward of an operation has what comes to it, what it returns, zeros to add that to, and the sum: of hidden values, 2 F for
        // each expert, after F that came.
        match estimator.combine {
            Combine::Mixture(Execution::All) => Experts { kept: routing + e * 3 * f, passing: routing + e * 7 * f, weights: again },
            _ => Experts { kept: routing + run * (2 * d + 3 * f), passing: routing + run * (6 * d + 7 * f), weights: 0 },
        }
    }

    /// A forward without a graph, all experts in one layer at a time.
    fn serving(&self, tokens: u64) -> u64 {
        let d = self.spec.hidden_size as u64;
        let experts = |moe: &MoeSpec| moe.num_experts as u64 * (2 * d + 3 * moe.expert_width as u64);
        tokens * (6 * d + self.spec.moe_layers().map(|(_, moe)| experts(moe)).max().unwrap_or(0))
    }

    /// Keys and values of one window in two models.
    fn caches(&self) -> u64 {
        (2 * 2 * self.spec.layers.len() * self.spec.num_kv_heads * self.spec.head_dim * self.plan.window) as u64
    }
}
