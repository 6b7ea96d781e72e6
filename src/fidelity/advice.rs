//! What a k of its own for each layer would buy: who is to blame, and a choice under a budget.
//!
//! The model behind it: a KL is quadratic in a small perturbation, so the part of a layer is what it costs alone at k = 1, scaled by how
//! much of its squared local gap is left at a larger k; parts add up, but for one factor that the run with k = 1 everywhere gives. That
//! is a guess until it is run, and the report runs it.

use serde::Serialize;

/// What is known of a layer before a choice.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerCost {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// Mean KL where only this layer is served at k = 1 and the rest as the reference.
    pub alone: f64,
    /// Pooled squared relative gap of its output for equal input at k = 1, 2, ...
    pub squared: Vec<f64>,
}

impl LayerCost {
    /// Part of the KL at a k, before the common factor. Beyond what was measured nothing changes.
    fn at(&self, k: usize) -> f64 {
        let (first, last) = (self.squared.first().copied().unwrap_or(0.0), self.squared.len());
        let squared = self.squared.get(k.clamp(1, last.max(1)) - 1).copied().unwrap_or(0.0);
        if first > 0.0 { self.alone * squared / first } else { 0.0 }
    }
}

/// A k for each MoE layer, in order of depth.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// Experts per token.
    pub k: Vec<usize>,
    /// Mean KL that is expected, nats per token.
    pub predicted_kl: f64,
}

impl Plan {
    /// Mean k over layers.
    pub fn mean_k(&self) -> f64 {
        mean(&self.k)
    }
}

/// Mean k over layers; 0 of none.
pub fn mean(ks: &[usize]) -> f64 {
    ks.iter().sum::<usize>() as f64 / ks.len().max(1) as f64
}

/// The factor between the sum of what layers cost alone and what all of them cost together; 1 where they cost nothing.
pub fn factor(layers: &[LayerCost], together: f64) -> f64 {
    let sum: f64 = layers.iter().map(|layer| layer.at(1)).sum();
    if sum > 0.0 && together > 0.0 { together / sum } else { 1.0 }
}

/// The mean KL that `ks` is expected to have. `factor` as [`factor`] gives it.
pub fn predict(layers: &[LayerCost], ks: &[usize], factor: f64) -> f64 {
    factor * layers.iter().zip(ks).map(|(layer, &k)| layer.at(k)).sum::<f64>()
}

/// The best choice of k with a mean of at most `mean_k`: from 1 everywhere, again and again one more where it saves most. Local gaps
/// shrink ever less with k, so that is the best choice under the model and not only a good one.
pub fn plan(layers: &[LayerCost], mean_k: f64, factor: f64) -> Plan {
    let budget = (mean_k * layers.len() as f64 + 1e-9).floor() as usize;
    let mut ks = vec![1; layers.len()];
    for _ in layers.len()..budget.max(layers.len()) {
        let gain = |at: usize| layers[at].at(ks[at]) - layers[at].at(ks[at] + 1);
        let open = (0..layers.len()).filter(|&at| ks[at] < layers[at].squared.len());
        let Some(best) = open.reduce(|best, at| if gain(at) > gain(best) { at } else { best }) else { break };
        ks[best] += 1;
    }
    Plan { predicted_kl: predict(layers, &ks, factor), k: ks }
}

/// The same ks the wrong way round: the largest where `plan` has the smallest. What advice is worth shows against it.
pub fn opposite(plan: &[usize]) -> Vec<usize> {
    let mut places: Vec<usize> = (0..plan.len()).collect();
    places.sort_by_key(|&at| plan[at]);
    let mut ks = plan.to_vec();
    for (from, to) in places.iter().zip(places.iter().rev()) {
        ks[*to] = plan[*from];
    }
    ks
}
