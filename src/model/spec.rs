//! What a model is, as data. A checkpoint family is a way to fill in a [`ModelSpec`]; the decoder reads nothing else.

use crate::{
    error::{Error, Result},
    moe::policy::{LayerChoices, RoutingChoice, RoutingPolicy, RoutingRule, WeightForm},
};

/// A decoder-only transformer with Mixture-of-Experts layers.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of config.json, for people and for `_info` metrics.
    pub family: String,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream, D.
    pub hidden_size: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Bias on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the output projection of attention.
    pub out_bias: bool,
    /// Normalisation of queries and keys before RoPE.
    pub qk_norm: QkNorm,
    /// Queries, keys and values are clamped to ± this after `qk_norm` (OLMoE).
    pub clip_qkv: Option<f32>,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: RopeSpec,
    /// Longest sequence, prompt and continuation together, in tokens.
    pub max_context: usize,
    /// The head is the embedding.
    pub tied_head: bool,
    /// One for each decoder layer.
    pub layers: Vec<LayerSpec>,
    /// The routing that the checkpoint was trained under.
    pub reference: ReferenceRouting,
    /// `train.estimator` of the routing block; `unknown` without one.
    pub estimator: String,
}

/// One decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// A query sees this many positions, itself included; `None` sees all.
    pub sliding_window: Option<usize>,
    /// What follows attention.
    pub feed_forward: FeedForwardSpec,
}

/// The feed-forward part of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForwardSpec {
    /// One SwiGLU of the given width.
    Dense {
        /// Hidden width.
        width: usize,
    },
    /// Routed experts.
    Moe(MoeSpec),
}

/// Routed experts of one layer: SwiGLU each, all of one width.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeSpec {
    /// Number of experts, E.
    pub num_experts: usize,
    /// Hidden width of an expert, F.
    pub expert_width: usize,
    /// Experts per token under the serving routing.
    pub top_k: usize,
    /// How the family weighs the chosen experts (or the routing block, where it says otherwise).
    pub weight_form: WeightForm,
    /// An expert that every token takes, scaled by a sigmoid (Qwen2-MoE).
    pub shared_expert_width: Option<usize>,
}

/// RMSNorm on queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None (Mixtral, Qwen2-MoE).
    None,
    /// Over each head, weights of width `head_dim` (Qwen3-MoE).
    PerHead,
    /// Over the whole projection (OLMoE).
    Full,
}

/// Rotary embedding: inverse frequencies and the scale of cos and sin.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are changed for long contexts.
    pub scaling: RopeScaling,
}

/// RoPE scaling variants. Formulas as in Hugging Face transformers, `modeling_rope_utils`.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// YaRN (Peng et al. 2023).
    Yarn {
        /// Context extension factor.
        factor: f64,
        /// Context of pre-training, in tokens.
        original_max_position: usize,
        /// Upper rotation bound, usually 32.
        beta_fast: f64,
        /// Lower rotation bound, usually 1.
        beta_slow: f64,
        /// Scale of cos and sin; `None` is `0.1 ln(factor) + 1`.
        attention_factor: Option<f64>,
        /// Whether the correction range is rounded outwards to whole dimensions.
        truncate: bool,
    },
    /// Llama 3.
    Llama3 {
        /// Context extension factor.
        factor: f64,
        /// Divides the original context: longest wavelength kept.
        low_freq_factor: f64,
        /// Divides the original context: shortest wavelength scaled.
        high_freq_factor: f64,
        /// Context of pre-training, in tokens.
        original_max_position: usize,
    },
}

/// The routing that fidelity is measured against.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ReferenceRouting {
    /// All experts at a temperature.
    Soft {
        /// Above 0.
        temperature: f32,
    },
    /// The layers' own top-k. `assumed` without a routing block.
    OwnTopK {
        /// Nobody said so: the checkpoint has no routing block.
        assumed: bool,
    },
    /// Hard top-k other than the layers' own.
    TopK {
        /// Experts per token.
        k: usize,
    },
}

impl ReferenceRouting {
    /// The same as a choice that a layer can resolve.
    pub fn choice(self) -> RoutingChoice {
        match self {
            Self::Soft { temperature } => RoutingChoice::Soft { temperature: Some(temperature) },
            Self::OwnTopK { .. } => RoutingChoice::Native,
            Self::TopK { k } => RoutingChoice::TopK { k, weight_form: None },
        }
    }
}

impl MoeSpec {
    /// The policy of this layer for a choice.
    ///
    /// Fails with `InvalidArgument` on field `routing...` where k is 0 or above the number of experts, or the temperature is not a positive number.
    pub fn resolve(&self, choice: RoutingChoice, reference: ReferenceRouting) -> Result<RoutingPolicy> {
        match choice {
            RoutingChoice::Native => Ok(RoutingPolicy::TopK { k: self.top_k, weight_form: self.weight_form }),
            RoutingChoice::TopK { k, .. } if k == 0 || k > self.num_experts => {
                Err(Error::invalid("routing.top_k.k", format!("{k} is not from 1 to {}, the number of experts", self.num_experts)))
            }
            RoutingChoice::TopK { k, weight_form } => Ok(RoutingPolicy::TopK { k, weight_form: weight_form.unwrap_or(self.weight_form) }),
            RoutingChoice::Mass { threshold, .. } if !(threshold > 0.0 && threshold <= 1.0) => {
                Err(Error::invalid("routing.mass.threshold", format!("{threshold} is not above 0 and at most 1")))
            }
            RoutingChoice::Mass { max_k: Some(k), .. } if k == 0 || k > self.num_experts => {
                Err(Error::invalid("routing.mass.max_k", format!("{k} is not from 1 to {}, the number of experts", self.num_experts)))
            }
            RoutingChoice::Mass { threshold, max_k, weight_form } => Ok(RoutingPolicy::Mass {
                threshold,
                max_k: max_k.unwrap_or(self.top_k),
                weight_form: weight_form.unwrap_or(self.weight_form),
            }),
            RoutingChoice::Soft { temperature } => {
                let default = match reference {
                    ReferenceRouting::Soft { temperature } => temperature,
                    _ => 1.0,
                };
                let temperature = temperature.unwrap_or(default);
                if !(temperature.is_finite() && temperature >= f32::MIN_POSITIVE) {
                    return Err(Error::invalid("routing.soft.temperature", format!("{temperature} is not a positive number")));
                }
                Ok(RoutingPolicy::Soft { temperature })
            }
        }
    }
}

impl ModelSpec {
    /// The MoE layers, as (decoder layer from 0, spec).
    pub fn moe_layers(&self) -> impl Iterator<Item = (usize, &MoeSpec)> {
        self.layers.iter().enumerate().filter_map(|(index, layer)| match &layer.feed_forward {
            FeedForwardSpec::Moe(moe) => Some((index, moe)),
            FeedForwardSpec::Dense { .. } => None,
        })
    }

    /// What `rule` asks of each layer.
    ///
    /// Fails with `InvalidArgument` on `field` where it has not one k for each MoE layer, or a layer cannot do what it is asked for.
    pub fn layer_choices(&self, rule: &RoutingRule, field: &str) -> Result<LayerChoices> {
        let (k, weight_form) = match rule {
            RoutingRule::LayerTopK { k, weight_form } => (k, *weight_form),
            RoutingRule::Same(choice) => {
                let choices = LayerChoices::Same(*choice);
                return self.check_routing(&choices).map(|()| choices);
            }
        };
        let layers = self.moe_layers().count();
        if k.len() != layers {
            return Err(Error::invalid(field, format!("{} numbers for {layers} MoE layers: give one for each", k.len())));
        }
        let mut choices = vec![RoutingChoice::Native; self.layers.len()];
        for ((layer, moe), &k) in self.moe_layers().zip(k.iter()) {
            if k == 0 || k > moe.num_experts {
                let experts = moe.num_experts;
                return Err(Error::invalid(field, format!("{k} for layer {layer} is not from 1 to {experts}, its experts")));
            }
            choices[layer] = RoutingChoice::TopK { k, weight_form };
        }
        Ok(LayerChoices::Each(choices.into()))
    }

    /// Checks that every MoE layer can do what it is asked for.
    pub fn check_routing(&self, choices: &LayerChoices) -> Result<()> {
        self.moe_layers().try_for_each(|(layer, moe)| moe.resolve(choices.at(layer), self.reference).map(drop))
    }

    /// Most experts that a token has in any layer under `choices`. Fails where a layer cannot do what it is asked for.
    pub fn most_experts_per_token(&self, choices: &LayerChoices) -> Result<usize> {
        self.moe_layers().try_fold(0, |most, (layer, moe)| {
            let policy = moe.resolve(choices.at(layer), self.reference)?;
            Ok(policy.experts_per_token(moe.num_experts).max(most))
        })
    }

    /// Number of parameters: (all, used by one token under the serving routing). The embedding counts in both.
    pub fn parameters(&self) -> (u64, u64) {
        let d = self.hidden_size as u64;
        let (q, kv) = ((self.num_heads * self.head_dim) as u64, (self.num_kv_heads * self.head_dim) as u64);
        let bias = if self.qkv_bias { q + 2 * kv } else { 0 } + if self.out_bias { d } else { 0 };
        let norms = match self.qk_norm {
            QkNorm::None => 0,
            QkNorm::PerHead => 2 * self.head_dim as u64,
            QkNorm::Full => q + kv,
        };
        let outside = self.vocab_size as u64 * d * if self.tied_head { 1 } else { 2 } + d;
        let (mut all, mut active) = (outside, outside);
        for layer in &self.layers {
            let attention = d * (2 * q + 2 * kv) + bias + norms + 2 * d;
            let (layer_all, layer_active) = match &layer.feed_forward {
                FeedForwardSpec::Dense { width } => (3 * d * *width as u64, 3 * d * *width as u64),
                FeedForwardSpec::Moe(moe) => {
                    let expert = 3 * d * moe.expert_width as u64;
                    let shared = moe.shared_expert_width.map_or(0, |width| 3 * d * width as u64 + d);
                    let router = d * moe.num_experts as u64;
                    (router + shared + expert * moe.num_experts as u64, router + shared + expert * moe.top_k as u64)
                }
            };
            all += attention + layer_all;
            active += attention + layer_active;
        }
        (all, active)
    }
}
