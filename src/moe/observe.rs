//! Watching the MoE layers of a forward: what each was given, what its router said, and what its experts would have
//! made of other routes. Nothing is computed for a forward that nobody watches.

use std::fmt::{self, Debug};

use super::{SparseRouting, plan::DispatchPlan};
use crate::{error::Result, model::MoeSpec};

/// Sees every MoE layer of a serving forward.
pub trait MoeObserver: Debug + Send {
    /// Called once for each MoE layer, in order of depth, when its experts have run. An error ends the forward.
    fn layer(&mut self, layer: &ObservedLayer<'_>) -> Result<()>;
}

/// One MoE layer in one forward.
pub struct ObservedLayer<'a> {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// What it is.
    pub spec: &'a MoeSpec,
    /// `[T, D]`: what router and experts read.
    pub x: &'a [f32],
    /// `[T, E]`.
    pub router_logits: &'a [f32],
    /// The routing in force. A token with non-finite router logits has no route.
    pub routing: &'a SparseRouting,
    /// What the experts made of the routes in force, sorted as the plan says: `[R, D]`. `None`: nobody kept it.
    pub(crate) computed: Option<(&'a DispatchPlan, &'a [f32])>,
    pub(crate) experts: &'a dyn ExpertOutputs,
}

/// Runs routes through the experts of a layer, on the rows that it was given.
pub(crate) trait ExpertOutputs {
    /// `[R, D]` f32, in the order of the routes. Weights are not looked at.
    fn outputs(&self, routing: &SparseRouting) -> Result<Vec<f32>>;
}

impl ObservedLayer<'_> {
    /// Model width, D.
    pub fn width(&self) -> usize {
        self.x.len() / self.routing.num_tokens().max(1)
    }

    /// What the experts make of `routing` on the rows of this layer, without weights and without the shared expert: `[R, D]` in
    /// the order of its routes. What the forward has computed is not computed again.
    pub fn expert_outputs(&self, routing: &SparseRouting) -> Result<Vec<f32>> {
        let Some((plan, rows)) = self.computed else { return self.experts.outputs(routing) };
        let d = self.width();
        let mut out = vec![0f32; routing.expert_ids.len() * d];
        let mut missing = SparseRouting { offsets: vec![0], ..SparseRouting::default() };
        let mut places = Vec::new();
        for token in 0..routing.num_tokens() {
            let known = || self.routing.expert_ids[self.routing.routes(token)].iter().zip(plan.routes(token));
            for route in routing.routes(token) {
                let expert = routing.expert_ids[route];
                match known().find(|(id, _)| **id == expert) {
                    Some((_, (row, _))) => out[route * d..][..d].copy_from_slice(&rows[row * d..][..d]),
                    None => {
                        missing.expert_ids.push(expert);
                        missing.weights.push(1.0);
                        places.push(route);
                    }
                }
            }
            missing.offsets.push(missing.expert_ids.len() as u32);
        }
        if !places.is_empty() {
            let computed = self.experts.outputs(&missing)?;
            for (place, row) in places.into_iter().zip(computed.chunks_exact(d)) {
                out[place * d..][..d].copy_from_slice(row);
            }
        }
        Ok(out)
    }
}

impl Debug for ObservedLayer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObservedLayer").field("layer", &self.layer).field("tokens", &self.routing.num_tokens()).finish_non_exhaustive()
    }
}
