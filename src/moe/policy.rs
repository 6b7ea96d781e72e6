//! Routing policies: the rule from router logits to expert weights, and its result.
//!
//! The only difference between soft and hard routing is decided here. Router logits are f32 whatever the dtype of the
//! model; ties go to the lowest expert index.

use std::{fmt, str::FromStr, sync::Arc};

use super::{
    estimator::{Combine, Estimator, Execution, Gradient, Noise, Relaxation, Selection, Weights},
    trace::RoutingTrace,
};
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
    /// Hard: experts by descending logit until their softmax probabilities reach `threshold`, as top-p sampling takes tokens
    /// (Huang et al. 2024, "Harder tasks need more experts").
    Mass {
        /// In (0, 1].
        threshold: f32,
        /// At most so many, from 1 to the number of experts.
        max_k: usize,
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
            Self::Mass { threshold, max_k, weight_form } => write!(f, "mass {threshold}, at most {max_k} ({weight_form})"),
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
            // Nobody trains under a threshold: to a trainer it is the most that it may take.
            Self::TopK { k, weight_form } | Self::Mass { max_k: k, weight_form, .. } => Estimator {
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
    /// Hard: the fewest experts that hold a share of the router's probability.
    Mass {
        /// In (0, 1].
        threshold: f32,
        /// At most so many; the layer's own k unless stated.
        max_k: Option<usize>,
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
            Self::TopK { k, weight_form } => write!(f, "top-{k}{}", Options(None, *weight_form)),
            Self::Mass { threshold, max_k, weight_form } => write!(f, "mass-{threshold}{}", Options(*max_k, *weight_form)),
            Self::Soft { temperature: None } => f.write_str("soft"),
            Self::Soft { temperature: Some(t) } => write!(f, "soft:{t}"),
        }
    }
}

/// What follows the head of a choice in text: `:2`, `:raw`, `:2:raw` or nothing.
struct Options(Option<usize>, Option<WeightForm>);

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |max_k| write!(f, ":{max_k}"))?;
        self.1.map_or(Ok(()), |form| write!(f, ":{form}"))
    }
}

impl FromStr for WeightForm {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::Raw, Self::Renorm, Self::Unit]
            .into_iter()
            .find(|form| form.to_string() == text)
            .ok_or_else(|| Error::invalid("routing", format!("'{text}' is none of raw, renorm, unit")))
    }
}

/// Reads `native`, `top-K`, `top-K:raw|renorm|unit`, `mass-P`, `mass-P:MAX_K`, `mass-P:MAX_K:raw|renorm|unit`, `soft` or
/// `soft:TEMPERATURE`.
impl FromStr for RoutingChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        parse_choice(text).ok_or_else(|| {
            let forms = "native, top-K, top-K:raw|renorm|unit, mass-P, mass-P:MAX_K, mass-P:MAX_K:raw|renorm|unit, soft, soft:TEMPERATURE";
            Error::invalid("routing", format!("'{text}' is none of {forms}"))
        })
    }
}

fn parse_choice(text: &str) -> Option<RoutingChoice> {
    let mut parts = text.split(':');
    let head = parts.next()?;
    let options: Vec<&str> = parts.collect();
    if let Some(k) = head.strip_prefix("top-") {
        let weight_form = match options[..] {
            [] => None,
            [form] => Some(form.parse().ok()?),
            _ => return None,
        };
        return Some(RoutingChoice::TopK { k: k.parse().ok()?, weight_form });
    }
    if let Some(threshold) = head.strip_prefix("mass-") {
        let threshold = threshold.parse().ok()?;
        let (max_k, weight_form) = match options[..] {
            [] => (None, None),
            [max_k] => (Some(max_k.parse().ok()?), None),
            [max_k, form] => (Some(max_k.parse().ok()?), Some(form.parse().ok()?)),
            _ => return None,
        };
        return Some(RoutingChoice::Mass { threshold, max_k, weight_form });
    }
    match (head, &options[..]) {
        ("native", []) => Some(RoutingChoice::Native),
        ("soft", []) => Some(RoutingChoice::Soft { temperature: None }),
        ("soft", [temperature]) => Some(RoutingChoice::Soft { temperature: Some(temperature.parse().ok()?) }),
        _ => None,
    }
}

/// What a whole model is asked for by somebody who need not know its layers. [`ModelSpec::layer_choices`] applies it.
///
/// [`ModelSpec::layer_choices`]: crate::model::ModelSpec::layer_choices
#[derive(Clone, Debug, PartialEq)]
pub enum RoutingRule {
    /// The same of every MoE layer.
    Same(RoutingChoice),
    /// Hard top-k with a k of its own in each MoE layer.
    LayerTopK {
        /// One for each MoE layer, in order of depth.
        k: Arc<[usize]>,
        /// Overrides the weight form of the layers.
        weight_form: Option<WeightForm>,
    },
}

impl Default for RoutingRule {
    fn default() -> Self {
        Self::Same(RoutingChoice::Native)
    }
}

impl From<RoutingChoice> for RoutingRule {
    fn from(choice: RoutingChoice) -> Self {
        Self::Same(choice)
    }
}

impl fmt::Display for RoutingRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Same(choice) => choice.fmt(f),
            Self::LayerTopK { k, weight_form } => {
                let k = k.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
                write!(f, "top-{k}{}", Options(None, *weight_form))
            }
        }
    }
}

/// Reads what a [`RoutingChoice`] reads, and `top-K,K,...` with one k for each MoE layer.
impl FromStr for RoutingRule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let Some((ks, form)) = text.strip_prefix("top-").filter(|rest| rest.contains(',')).map(|rest| {
            let (ks, form) = rest.split_once(':').map_or((rest, None), |(ks, form)| (ks, Some(form)));
            (ks.split(',').map(str::parse).collect::<Result<Arc<[usize]>, _>>(), form)
        }) else {
            return Ok(Self::Same(text.parse()?));
        };
        let k = ks.map_err(|_| Error::invalid("routing", format!("'{text}': top-K,K,... takes one number for each MoE layer")))?;
        Ok(Self::LayerTopK { k, weight_form: form.map(str::parse).transpose()? })
    }
}

/// What a sequence asks for, layer by layer.
#[derive(Clone, Debug, PartialEq)]
pub enum LayerChoices {
    /// The same of every MoE layer.
    Same(RoutingChoice),
    /// One for each decoder layer, in order of depth; those of dense layers say nothing.
    Each(Arc<[RoutingChoice]>),
    /// Given experts, whatever the router says.
    Replay {
        /// Experts of the sequence from its position 0 on.
        replay: Arc<Replay>,
        /// Position of the first token that is routed.
        first: usize,
    },
}

/// The experts of the first tokens of a sequence, and the routing of the others.
#[derive(Clone, Debug, PartialEq)]
pub struct Replay {
    /// From position 0 on, all MoE layers. Without weights, those of the experts' softmax probabilities count.
    pub trace: RoutingTrace,
    /// How probabilities become weights; the form of the layer unless stated.
    pub weight_form: Option<WeightForm>,
    /// Of tokens behind the trace. Not a replay.
    pub rest: LayerChoices,
}

/// What the experts of one token of a replay are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Replayed<'a> {
    pub(crate) experts: &'a [u16],
    /// As many as experts, or none.
    pub(crate) weights: &'a [f32],
    pub(crate) weight_form: Option<WeightForm>,
}

impl Default for LayerChoices {
    fn default() -> Self {
        Self::Same(RoutingChoice::Native)
    }
}

impl LayerChoices {
    /// The choice of a decoder layer, from 0. A layer that nobody spoke of is native.
    pub fn at(&self, layer: usize) -> RoutingChoice {
        match self {
            Self::Same(choice) => *choice,
            Self::Each(choices) => choices.get(layer).copied().unwrap_or_default(),
            Self::Replay { replay, .. } => replay.rest.at(layer),
        }
    }

    /// The same for the tokens of a sequence from position `first` on.
    pub fn from_position(&self, first: usize) -> Self {
        match self {
            Self::Replay { replay, .. } => Self::Replay { replay: Arc::clone(replay), first },
            other => other.clone(),
        }
    }

    /// The given experts of the `token`th routed token, where it has some.
    pub(crate) fn replayed(&self, layer: usize, token: usize) -> Option<Replayed<'_>> {
        let Self::Replay { replay, first } = self else { return None };
        let row = replay.trace.row(first + token, layer)?;
        Some(Replayed { experts: row.experts, weights: row.weights, weight_form: replay.weight_form })
    }
}

impl From<RoutingChoice> for LayerChoices {
    fn from(choice: RoutingChoice) -> Self {
        Self::Same(choice)
    }
}
