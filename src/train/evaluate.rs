//! Held-out perplexity and load under a routing: the serving forward on present weights.

use crate::{
    error::Result,
    model::{Batch, Decoder, LogitRows},
    moe::{RoutingStats, policy::RoutingChoice},
};

/// What one pass over held-out text says.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// `exp` of the mean negative log-likelihood per predicted token.
    pub perplexity: f64,
    /// Predicted tokens.
    pub tokens: usize,
    /// Load of each MoE layer.
    pub layers: Vec<RoutingStats>,
}

/// Scores `tokens` in windows of `length`, each alone, under `routing`.
pub fn evaluate(decoder: &Decoder, tokens: &[u32], length: usize, routing: RoutingChoice) -> Result<Evaluation> {
    const WINDOWS_PER_BATCH: usize = 4;
    let mut layers: Vec<RoutingStats> = decoder.spec().moe_layers().map(|(_, moe)| RoutingStats::new(moe.num_experts)).collect();
    let (mut loss, mut predicted) = (0f64, 0usize);
    let windows: Vec<&[u32]> = tokens.chunks(length).filter(|window| window.len() > 1).collect();
    for group in windows.chunks(WINDOWS_PER_BATCH) {
        let mut batch = Batch::default();
        for window in group {
            batch.push(&[], window, 0, routing, LogitRows::All);
        }
        let forward = decoder.serve(&batch, None)?;
        layers.iter_mut().zip(&forward.layers).for_each(|(sum, layer)| sum.add(&layer.stats));
        let rows = forward.logits.to_vec2::<f32>()?;
        let mut start = 0;
        for window in group {
            for (i, &next) in window[1..].iter().enumerate() {
                loss -= log_softmax_at(&rows[start + i], next as usize);
                predicted += 1;
            }
            start += window.len();
        }
    }
    Ok(Evaluation { perplexity: (loss / predicted.max(1) as f64).exp(), tokens: predicted, layers })
}

/// `log softmax(row)[index]`, in f64.
pub(super) fn log_softmax_at(row: &[f32], index: usize) -> f64 {
    let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = row.iter().map(|&z| (f64::from(z) - max).exp()).sum();
    f64::from(row[index]) - max - sum.ln()
}
