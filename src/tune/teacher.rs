//! The model as it was, under its reference routing: what tuning can learn from where it has no labels.

use std::sync::Arc;

use candle_core::Tensor;

use crate::{
    error::Result,
    model::{Batch, Decoder, LogitRows, ModelSpec, weights::ModelWeights},
    moe::{kernel::ExpertKernel, policy::RoutingChoice},
};

/// Not tracked, over the weights that the student shares.
#[derive(Debug)]
pub struct Teacher {
    decoder: Decoder,
    routing: RoutingChoice,
    /// Of its reference.
    temperature: f64,
}

/// What a teacher says about some windows.
#[derive(Debug)]
pub struct Taught {
    /// `[T, V]` f32, where the model is.
    pub logits: Tensor,
    /// By MoE layer, `[T, E]`: probabilities of its routers.
    pub routers: Vec<Vec<f64>>,
}

impl Teacher {
    /// Routed by `routing`, whose softmax has this temperature.
    pub fn new(
        spec: &Arc<ModelSpec>,
        weights: &ModelWeights,
        kernel: &Arc<dyn ExpertKernel>,
        (routing, temperature): (RoutingChoice, f64),
    ) -> Result<Self> {
        Ok(Self { decoder: Decoder::new(Arc::clone(spec), weights.detached(), kernel)?, routing, temperature })
    }

    /// `inputs [T]` in windows of `length`, each alone. `routers` are worked out only if asked for.
    pub fn teach(&self, inputs: &[u32], length: usize, routers: bool) -> Result<Taught> {
        let mut batch = Batch::default();
        for window in inputs.chunks(length) {
            batch.push(&[], window, 0, self.routing, LogitRows::All);
        }
        let forward = self.decoder.serve(&batch, None)?;
        let layers = if routers { &forward.layers[..] } else { &[] };
        let probabilities = layers.iter().map(|layer| probabilities(&layer.router_logits, self.temperature));
        Ok(Taught { routers: probabilities.collect::<Result<_>>()?, logits: forward.logits })
    }
}

/// `softmax(z / temperature)`, f64.
fn probabilities(logits: &Tensor, temperature: f64) -> Result<Vec<f64>> {
    let mut all = Vec::with_capacity(logits.elem_count());
    for row in logits.to_vec2::<f32>()? {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let powers: Vec<f64> = row.iter().map(|&z| (f64::from(z - max) / temperature).exp()).collect();
        let sum: f64 = powers.iter().sum();
        all.extend(powers.into_iter().map(|power| power / sum));
    }
    Ok(all)
}
