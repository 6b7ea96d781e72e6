//! Steps that are looked into: whose routes are told, whose layers an observer sees, or whose experts only the host knows. They wait for the device
//! in every layer.

use super::step::Policies;
use crate::{
    error::{Error, Result},
    moe::{RoutingStats, SparseRouting, observe::MoeObserver},
};

/// Who wants what of a step.
#[derive(Debug)]
pub(super) struct Watch<'a> {
    routes: bool,
    pub(super) observer: Option<&'a mut dyn MoeObserver>,
    /// The host routes: some sequence replays its experts.
    pub(super) on_host: bool,
    layers: Vec<SeenLayer>,
}

/// What was seen of a MoE layer.
#[derive(Debug, Default)]
pub(super) struct SeenLayer {
    /// `[T, E]`.
    pub(super) router_logits: Vec<f32>,
    pub(super) routing: SparseRouting,
    /// Where the host routed.
    pub(super) stats: Option<RoutingStats>,
}

impl<'a> Watch<'a> {
    pub(super) fn new(routes: bool, observer: Option<&'a mut dyn MoeObserver>, policies: &Policies) -> Self {
        // Lent for as long as the step: a trait object behind an `Option` does not shorten its lifetime by itself.
        let observer = observer.map(|observer| observer as &mut dyn MoeObserver);
        Self { routes, observer, on_host: policies.on_host, layers: Vec::new() }
    }

    /// Whether routes are to be read of the device.
    pub(super) fn looks(&self) -> bool {
        self.routes || self.observer.is_some() || self.on_host
    }

    /// The next MoE layer.
    pub(super) fn saw(&mut self, layer: SeenLayer) {
        self.layers.push(layer);
    }

    /// Who observes, and what was seen of the last layer.
    pub(super) fn observed(&mut self) -> Option<(&mut dyn MoeObserver, &SeenLayer)> {
        // Lent for as long as the call: see `new`.
        let observer = self.observer.as_mut().map(|observer| &mut **observer as &mut dyn MoeObserver)?;
        Some((observer, self.layers.last()?))
    }

    /// In order of depth; none where nobody looked.
    pub(super) fn into_layers(self) -> impl Iterator<Item = SeenLayer> {
        self.layers.into_iter()
    }
}

/// The routes of slots: `expert_ids`, `weights [T, slots]`, of which those with `num_experts` are unused.
pub(super) fn routing_of(expert_ids: &[u32], weights: &[f32], slots: usize, num_experts: usize) -> SparseRouting {
    let mut routing = SparseRouting { offsets: vec![0], ..SparseRouting::default() };
    for (ids, weights) in expert_ids.chunks_exact(slots).zip(weights.chunks_exact(slots)) {
        for (&id, &weight) in ids.iter().zip(weights).filter(|(id, _)| (**id as usize) < num_experts) {
            routing.expert_ids.push(id);
            routing.weights.push(weight);
        }
        routing.offsets.push(routing.expert_ids.len() as u32);
    }
    routing
}

/// The other way: slots of `routing`. Tokens of `non_finite` have none, and weights of NaN, so that their outputs say what happened.
///
/// Fails where a token has more routes than there are slots.
pub(super) fn slots_of(routing: &SparseRouting, non_finite: &[u32], slots: usize, num_experts: usize) -> Result<(Vec<u32>, Vec<f32>)> {
    let tokens = routing.num_tokens();
    let (mut expert_ids, mut weights) = (vec![num_experts as u32; tokens * slots], vec![0f32; tokens * slots]);
    for token in 0..tokens {
        let range = routing.routes(token);
        if range.len() > slots {
            return Err(Error::Internal(format!("a token has {} routes for {slots} slots", range.len())));
        }
        expert_ids[token * slots..][..range.len()].copy_from_slice(&routing.expert_ids[range.clone()]);
        weights[token * slots..][..range.len()].copy_from_slice(&routing.weights[range]);
    }
    for &token in non_finite {
        weights[token as usize * slots..][..slots].fill(f32::NAN);
    }
    Ok((expert_ids, weights))
}
