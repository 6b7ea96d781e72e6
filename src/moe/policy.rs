//! Routing policies: the rule from router logits to expert weights, and its result.
//!
//! The only difference between soft and hard routing is decided here. Router logits are f32 whatever the dtype of the
//! model; ties go to the lowest expert index.

use std::{fmt, str::FromStr, sync::Arc};

use super::estimator::{Combine, Estimator, Execution, Gradient, Noise, Relaxation, Selection, Weights};
use crate::error::{Error, Result};

/// How the softmax probabilities of the chosen experts become their weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightForm {
    /// The probability as it is; the sum is below 1 (OLMoE, Qwen2-MoE, Switch).
    Raw,
    /// Scaled to sum to 1 over the chosen experts (Mixtral, Qwen3-MoE). At k = 1 the weight is 1.
    Renorm,
    /// The same for each, 1 over the number of the chosen: `1/k`, and 1 at k = 1 (straight-through training).
    Unit,
}

impl fmt::Display for WeightForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Renorm => "renorm",
            Self::Unit => "unit",
        })
    }
}

/// The rule in force for one MoE layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RoutingPolicy {
    /// Hard: the `k` experts with the largest logits.
    TopK {
        /// Experts per token, from 1 to the number of experts.
        k: usize,
        /// Weights of the chosen experts.
        weight_form: WeightForm,
    },
    /// All experts, weighted by `softmax(z / temperature)`.
    Soft {
        /// Above 0.
        temperature: f32,
    },
    /// An estimator of the catalogue, which says both what is computed and how the router learns from it. Where nothing
    /// is trained it routes as in evaluation: without noise, exploration or capacity.
    Estimator(Estimator),
}

impl fmt::Display for RoutingPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TopK { k, weight_form } => write!(f, "top-{k} ({weight_form})"),
            Self::Soft { temperature } => write!(f, "soft (temperature {temperature})"),
            Self::Estimator(estimator) => write!(f, "{estimator:?}"),
        }
    }
}

impl RoutingPolicy {
    /// The policy as an estimator: hard and soft routing with their exact gradients.
    pub fn estimator(self) -> Estimator {
        let softmax = |temperature: f64| Relaxation::Softmax { temperature };
        let plain = Estimator {
            relaxation: softmax(1.0),
            noise: Noise::NONE,
            selection: Selection::All,
            weights: Weights::Relaxed,
            gradient: Gradient::Exact,
            combine: Combine::Mixture(Execution::All),
            serve: WeightForm::Renorm,
        };
        match self {
            Self::TopK { k, weight_form } => Estimator {
                selection: Selection::TopK { k },
                weights: match weight_form {
                    WeightForm::Raw => Weights::Chosen,
                    WeightForm::Renorm => Weights::Renorm,
                    WeightForm::Unit => Weights::Unit,
                },
                combine: Combine::Mixture(Execution::Chosen),
                serve: weight_form,
                ..plain
            },
            Self::Soft { temperature } => Estimator { relaxation: softmax(f64::from(temperature)), ..plain },
            Self::Estimator(estimator) => estimator,
        }
    }

    /// Experts that a token of a layer with `experts` has at most.
    pub fn experts_per_token(self, experts: usize) -> usize {
        match self.estimator().selection {
            Selection::TopK { k } => k.min(experts),
            Selection::All | Selection::Support => experts,
        }
    }
}

/// What a request, a flag or a checkpoint asks for; every MoE layer resolves it to its own [`RoutingPolicy`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum RoutingChoice {
    /// The layer's serving routing.
    #[default]
    Native,
    /// Hard top-k; the weight form of the layer unless stated.
    TopK {
        /// Experts per token.
        k: usize,
        /// Overrides the weight form of the layer.
        weight_form: Option<WeightForm>,
    },
    /// All experts; at the temperature of the reference routing unless stated.
    Soft {
        /// Overrides the temperature.
        temperature: Option<f32>,
    },
}

impl fmt::Display for RoutingChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Native => f.write_str("native"),
            Self::TopK { k, weight_form: None } => write!(f, "top-{k}"),
            Self::TopK { k, weight_form: Some(form) } => write!(f, "top-{k}:{form}"),
            Self::Soft { temperature: None } => f.write_str("soft"),
            Self::Soft { temperature: Some(t) } => write!(f, "soft:{t}"),
        }
    }
}

/// What a sequence asks for, layer by layer.
#[derive(Clone, Debug, PartialEq)]
pub enum LayerChoices {
    /// The same of every MoE layer.
    Same(RoutingChoice),
    /// One for each decoder layer, in order of depth; those of dense layers say nothing.
    Each(Arc<[RoutingChoice]>),
}

impl LayerChoices {
    /// The choice of a decoder layer, from 0. A layer that nobody spoke of is native.
    pub fn at(&self, layer: usize) -> RoutingChoice {
        match self {
            Self::Same(choice) => *choice,
            Self::Each(choices) => choices.get(layer).copied().unwrap_or_default(),
        }
    }
}

impl From<RoutingChoice> for LayerChoices {
    fn from(choice: RoutingChoice) -> Self {
        Self::Same(choice)
    }
}

/// Reads `native`, `top-K`, `top-K:raw|renorm|unit`, `soft` or `soft:TEMPERATURE`.
impl FromStr for RoutingChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::invalid("routing", format!("'{text}' is none of native, top-K, top-K:raw|renorm|unit, soft, soft:TEMPERATURE"));
        let (head, option) = match text.split_once(':') {
            Some((head, option)) => (head, Some(option)),
            None => (text, None),
        };
        match (head, option) {
            ("native", None) => Ok(Self::Native),
            ("soft", option) => {
                let temperature = option.map(str::parse).transpose().map_err(|_| bad())?;
                Ok(Self::Soft { temperature })
            }
            (head, option) => {
                let k = head.strip_prefix("top-").and_then(|k| k.parse().ok()).ok_or_else(bad)?;
                let weight_form = match option {
                    None => None,
                    Some("raw") => Some(WeightForm::Raw),
                    Some("renorm") => Some(WeightForm::Renorm),
                    Some("unit") => Some(WeightForm::Unit),
                    Some(_) => return Err(bad()),
                };
                Ok(Self::TopK { k, weight_form })
            }
        }
    }
}
