//! A routing under measurement, by name.

use crate::{
    error::Result,
    model::ModelSpec,
    moe::policy::{LayerChoices, RoutingChoice, RoutingPolicy, RoutingRule},
};

/// A routing under measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// For people, as `top-1`.
    pub name: String,
    /// What each layer is asked for.
    pub choices: LayerChoices,
}

impl From<RoutingChoice> for Case {
    fn from(choice: RoutingChoice) -> Self {
        Self { name: choice.to_string(), choices: choice.into() }
    }
}

impl Case {
    /// Top-k with a k of its own in each MoE layer, in order of depth.
    ///
    /// Fails with `InvalidArgument` on `field` where there are not as many numbers as MoE layers, or one is no k.
    pub fn layer_k(field: &str, spec: &ModelSpec, ks: &[usize]) -> Result<Self> {
        let rule = RoutingRule::LayerTopK { k: ks.into(), weight_form: None };
        let choices = spec.layer_choices(&rule, field)?;
        let name = format!("k {}", ks.iter().map(usize::to_string).collect::<Vec<_>>().join(","));
        Ok(Self { name, choices })
    }

    /// One choice in one decoder layer and another in the rest.
    pub fn only(layer: usize, choice: RoutingChoice, rest: RoutingChoice, spec: &ModelSpec) -> Self {
        let choices = (0..spec.layers.len()).map(|at| if at == layer { choice } else { rest }).collect();
        Self { name: format!("{choice} in layer {layer}"), choices: LayerChoices::Each(choices) }
    }

    /// The policy of each MoE layer, in order of depth. Fails where a layer cannot do what it is asked for.
    pub fn policies(&self, spec: &ModelSpec) -> Result<Vec<RoutingPolicy>> {
        spec.moe_layers().map(|(layer, moe)| moe.resolve(self.choices.at(layer), spec.reference)).collect()
    }

    /// Experts of a token in each MoE layer.
    pub fn experts_per_token(&self, spec: &ModelSpec) -> Result<Vec<usize>> {
        let policies = self.policies(spec)?;
        Ok(spec.moe_layers().zip(policies).map(|((_, moe), policy)| policy.experts_per_token(moe.num_experts)).collect())
    }
}
