//! What the services say about themselves, and what they do where a request says nothing.

use crate::{
    checkpoint::GenerationDefaults,
    error::Result,
    model::ModelSpec,
    moe::policy::RoutingRule,
    telemetry::metrics::{MetricsConfig, SeriesOptions},
};

/// What the service says about itself, and what it does where a request says nothing.
#[derive(Clone, Debug)]
pub struct ServiceConfig {
    /// The name that clients may give, and that responses carry.
    pub model_name: String,
    /// As `cpu`, for people.
    pub device: String,
    /// As `f32`, for people.
    pub dtype: String,
    /// Routing of requests that choose none, at first.
    pub routing: RoutingRule,
    /// Whether `SetRoutingPolicy` may change it.
    pub runtime_routing: bool,
    /// Sampling of requests that choose none.
    pub sampling: SamplingDefaults,
    /// Largest request message, in bytes; larger ones are refused before they are read.
    pub max_receive_bytes: usize,
    /// Longest text of a Tokenize, in bytes, and most tokens of a Detokenize.
    pub max_tokenize_bytes: usize,
    /// Largest response message, in bytes.
    pub max_send_bytes: usize,
    /// Which of the optional series its metrics have.
    pub series: SeriesOptions,
}

/// Sampling parameters of requests that choose none. The default is greedy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingDefaults {
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// 0: off.
    pub top_k: usize,
    /// 1: off.
    pub top_p: f32,
    /// 1: off.
    pub repetition_penalty: f32,
}

// === impl ServiceConfig ===

impl ServiceConfig {
    /// The facts about this server that its metrics show.
    ///
    /// Fails where a layer of the model cannot follow [`ServiceConfig::routing`].
    pub fn metrics(&self, spec: &ModelSpec) -> Result<MetricsConfig> {
        let choices = spec.layer_choices(&self.routing, "routing")?;
        Ok(MetricsConfig {
            model: self.model_name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            git: env!("HARDMAX_GIT").into(),
            device: self.device.clone(),
            dtype: self.dtype.clone(),
            estimator: spec.estimator.clone(),
            serving: self.routing.to_string(),
            reference: spec.reference.choice().to_string(),
            num_layers: spec.layers.len(),
            layers: spec.moe_layers().map(|(layer, moe)| (layer, moe.num_experts)).collect(),
            top_k: spec.most_experts_per_token(&choices)?,
            max_context: spec.max_context,
            series: self.series,
            ..MetricsConfig::default()
        })
    }
}

// === impl SamplingDefaults ===

impl Default for SamplingDefaults {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0 }
    }
}

impl From<&GenerationDefaults> for SamplingDefaults {
    /// A checkpoint that does not say that it wants to be sampled is greedy; its other numbers are for clients that
    /// ask for a temperature.
    fn from(checkpoint: &GenerationDefaults) -> Self {
        let greedy = Self::default();
        let sampled = checkpoint.do_sample == Some(true);
        Self {
            temperature: if sampled { checkpoint.temperature.unwrap_or(1.0) } else { greedy.temperature },
            top_k: checkpoint.top_k.unwrap_or(greedy.top_k),
            top_p: checkpoint.top_p.unwrap_or(greedy.top_p),
            repetition_penalty: checkpoint.repetition_penalty.unwrap_or(greedy.repetition_penalty),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_greedy_unless_it_says_otherwise() {
        let silent = GenerationDefaults::default();
        assert_eq!(SamplingDefaults::from(&silent), SamplingDefaults::default());
        let sampled = GenerationDefaults { do_sample: Some(true), top_k: Some(50), ..silent.clone() };
        assert_eq!(SamplingDefaults::from(&sampled), SamplingDefaults { temperature: 1.0, top_k: 50, ..Default::default() });
        let unsampled = GenerationDefaults { do_sample: Some(false), temperature: Some(0.6), ..silent };
        assert_eq!(SamplingDefaults::from(&unsampled).temperature, 0.0);
    }
}
