//! The `routing` block of config.json: how a router was trained, what fidelity is measured against, and how to serve.
//!
//! Other loaders keep or ignore the key. The architecture fields of config.json stay authoritative; `serve` may change
//! only `k` and `weight_form`, and its other fields are a record that must agree with the family.

use std::{collections::BTreeMap, path::Path};

use serde::Serialize;
use serde_json::Value;

use super::{CheckpointError, fields::Fields};
use crate::{
    model::{FeedForwardSpec, ModelSpec, MoeSpec, ReferenceRouting},
    moe::policy::WeightForm,
};

type Result<T> = std::result::Result<T, CheckpointError>;

const WEIGHT_FORMS: &[(&str, WeightForm)] = &[("raw", WeightForm::Raw), ("renorm", WeightForm::Renorm), ("unit", WeightForm::Unit)];

/// The whole block.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RoutingBlock {
    /// Version of the format; always [`RoutingBlock::VERSION`].
    pub version: usize,
    /// How the router was trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train: Option<TrainRecord>,
    /// What fidelity is measured against; absent, the layers' own top-k is assumed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<ReferenceRecord>,
    /// Default serving routing, where it differs from the family's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serve: Option<ServeRecord>,
    /// Exceptions by decoder layer, from 0.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub per_layer: BTreeMap<usize, LayerRecord>,
    /// The last measured fidelity gap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fidelity: Option<FidelityRecord>,
}

/// How the router was trained. A record, except for `score` and `temperature.folded`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TrainRecord {
    /// For example `gumbel_soft`, `soft`, `ste`, `raw_topk`, `renorm_topk`.
    pub estimator: String,
    /// Experts in the training forward; `None` is all.
    pub k: Option<usize>,
    /// Score function; only `softmax` can be served.
    pub score: Option<String>,
    /// Parameter of the score function, whatever it needs.
    pub param: Value,
    /// Temperature and its schedule.
    pub temperature: Option<TemperatureRecord>,
    /// Noise on the router logits.
    pub noise: Option<NoiseRecord>,
    /// Weights of the experts in the training forward.
    pub weight_form: Option<WeightForm>,
    /// Auxiliary losses.
    pub loss: Option<LossRecord>,
    /// Rows per expert over fair share; `None` is dropless.
    pub capacity_factor: Option<f64>,
    /// Optimizer steps up to this checkpoint.
    pub steps: Option<usize>,
    /// The router was not trained.
    pub frozen_router: Option<bool>,
}

/// Temperature of the training forward.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TemperatureRecord {
    /// For example `exp`, `linear`, `constant`.
    pub schedule: Option<String>,
    /// At the first step.
    pub init: Option<f64>,
    /// At the last step.
    #[serde(rename = "final")]
    pub end: Option<f64>,
    /// When this checkpoint was written.
    pub at_save: Option<f64>,
    /// The router on disk is already divided by `at_save`, so that the reference temperature is 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub folded: Option<bool>,
}

/// Noise that the estimator adds to the router logits of the training forward.
///
/// What a run adds besides to any estimator is exploration and not recorded: jitter of the router's input,
/// epsilon-greedy choices, hidden experts.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct NoiseRecord {
    /// This program writes `none`, `gumbel`, `gaussian`, or `softplus`, which is normal with a deviation that the
    /// router gave; it reads any word, such as `input_jitter`.
    pub kind: Option<String>,
    /// Factor on the noise when this checkpoint was written: 0 without, and under `softplus` that on the deviation.
    pub scale_at_save: Option<f64>,
}

/// Auxiliary losses of the training forward.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LossRecord {
    /// Kind of load-balancing loss, for example `switch`; of several the one with the largest weight at the end of the
    /// run.
    pub balance: Option<String>,
    /// `normalised` (1 at balance) or `per_slot` (k at balance); it makes `balance_coef` unambiguous. `None` where the
    /// loss is neither at balance: `importance` and `load` are 0 there, and entropies have one form only.
    pub convention: Option<String>,
    /// Coefficient of that loss in the recipe at the end of the run, on its mean over layers.
    pub balance_coef: Option<f64>,
    /// Coefficient of the router z-loss.
    pub z_coef: Option<f64>,
    /// Rate of a selection bias.
    pub bias_rate: Option<f64>,
}

/// Soft or hard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ReferenceMode {
    /// All experts, by the softmax at a temperature.
    Soft,
    /// Top-k.
    Hard,
}

/// What fidelity is measured against.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReferenceRecord {
    /// Soft or hard.
    pub mode: ReferenceMode,
    /// With [`ReferenceMode::Soft`]: above 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// With [`ReferenceMode::Hard`]: experts per token; `None` is as served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub k: Option<usize>,
    /// `none`: a noisy reference is not supported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub noise: Option<String>,
}

/// Default serving routing.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ServeRecord {
    /// `hard`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// Experts per token; `None` is the family's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub k: Option<usize>,
    /// Weights of the chosen experts; `None` is the family's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_form: Option<WeightForm>,
    /// `softmax_topk`: the softmax is over all experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<String>,
    /// `lowest_index`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tie_break: Option<String>,
    /// `f32`: dtype of router logits and softmax.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// True: no token loses an expert to a full one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropless: Option<bool>,
}

/// Exceptions of one layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LayerRecord {
    /// Over the block's `serve`.
    pub serve: ServeRecord,
}

/// A measured fidelity gap. Informative.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FidelityRecord {
    /// Hash of the text it was measured on.
    pub corpus_sha256: Option<String>,
    /// Tokens of that text.
    pub tokens: Option<usize>,
    /// Mean KL divergence of next-token distributions, in nats.
    pub kl: Option<f64>,
    /// Share of positions with the same most likely token.
    pub top1_agree: Option<f64>,
    /// Relative difference of perplexity.
    pub ppl_gap: Option<f64>,
    /// KL divergence of the noise floor.
    pub floor_kl: Option<f64>,
    /// Program and version.
    pub measured_by: Option<String>,
}

// === impl RoutingBlock ===

impl Default for RoutingBlock {
    fn default() -> Self {
        Self { version: Self::VERSION, train: None, reference: None, serve: None, per_layer: BTreeMap::new(), fidelity: None }
    }
}

impl RoutingBlock {
    /// The version of the format that this program reads and writes.
    pub const VERSION: usize = 1;

    pub(super) fn read(block: &Fields<'_>) -> Result<Self> {
        let version = block.count("version")?.ok_or_else(|| block.wrong("version", format!("the version, {}", Self::VERSION)))?;
        if version > Self::VERSION {
            return Err(block.unsupported("version", format!("known up to {}; a newer hardmax reads it", Self::VERSION)));
        }
        let read = Self {
            version,
            train: block.object("train")?.map(|f| TrainRecord::read(&f)).transpose()?,
            reference: block.object("reference")?.map(|f| ReferenceRecord::read(&f)).transpose()?,
            serve: block.object("serve")?.map(|f| ServeRecord::read(&f)).transpose()?,
            per_layer: block.object("per_layer")?.map(|f| read_layers(&f)).transpose()?.unwrap_or_default(),
            fidelity: block.object("fidelity")?.map(|f| FidelityRecord::read(&f)).transpose()?,
        };
        block.warn_unused();
        Ok(read)
    }

    /// Sets what the block decides: serving routing, reference and estimator. `file` is for messages.
    pub(super) fn apply(&self, file: &Path, spec: &mut ModelSpec) -> Result<()> {
        let wrong = |field: String, found: String, expected: String| CheckpointError::Field { path: file.into(), field, found, expected };
        if let Some(record) = &self.serve {
            for layer in &mut spec.layers {
                if let FeedForwardSpec::Moe(moe) = &mut layer.feed_forward {
                    record.apply(moe).map_err(|(found, expected)| wrong("routing.serve.k".into(), found, expected))?;
                }
            }
        }
        let count = spec.layers.len();
        for (index, record) in &self.per_layer {
            let at = format!("routing.per_layer.{index}");
            match spec.layers.get_mut(*index).map(|layer| &mut layer.feed_forward) {
                None => return Err(wrong(at, "an override".into(), format!("a layer from 0 to {}", count.saturating_sub(1)))),
                Some(FeedForwardSpec::Dense { .. }) => {
                    return Err(wrong(at, "an override".into(), "a layer with experts; this one is dense".into()));
                }
                Some(FeedForwardSpec::Moe(moe)) => {
                    let serve = &record.serve;
                    serve.apply(moe).map_err(|(found, expected)| wrong(format!("{at}.serve.k"), found, expected))?;
                }
            }
        }
        spec.reference = self.resolve_reference(spec).map_err(|(field, found, expected)| wrong(field.into(), found, expected))?;
        if let Some(train) = &self.train {
            spec.estimator.clone_from(&train.estimator);
        }
        Ok(())
    }

    /// The reference routing, or what is wrong: (field, found, expected).
    fn resolve_reference(&self, spec: &ModelSpec) -> std::result::Result<ReferenceRouting, (&'static str, String, String)> {
        let Some(record) = &self.reference else { return Ok(ReferenceRouting::OwnTopK { assumed: true }) };
        let moe = || spec.moe_layers().map(|(_, moe)| moe);
        match record.mode {
            ReferenceMode::Soft => {
                let temperature = record.temperature.unwrap_or(1.0);
                let folded = self.train.as_ref().and_then(|train| train.temperature.as_ref()?.folded).unwrap_or(false);
                if folded && temperature != 1.0 {
                    let expected = "1, because routing.train.temperature.folded is true";
                    return Err(("routing.reference.temperature", temperature.to_string(), expected.into()));
                }
                Ok(ReferenceRouting::Soft { temperature: temperature as f32 })
            }
            ReferenceMode::Hard => match record.k {
                Some(k) if moe().any(|moe| k > moe.num_experts) => {
                    Err(("routing.reference.k", k.to_string(), "at most the number of experts".into()))
                }
                Some(k) if moe().any(|moe| k != moe.top_k) => Ok(ReferenceRouting::TopK { k }),
                _ => Ok(ReferenceRouting::OwnTopK { assumed: false }),
            },
        }
    }
}

fn read_layers(layers: &Fields<'_>) -> Result<BTreeMap<usize, LayerRecord>> {
    let mut read = BTreeMap::new();
    for key in layers.keys() {
        // 1 has one spelling: with 01 beside it, the order of keys would decide.
        let index = key.parse().ok().filter(|index: &usize| index.to_string() == key);
        let index = index.ok_or_else(|| layers.wrong(key, "a key that is a layer index from 0"))?;
        let Some(layer) = layers.object(key)? else { continue };
        let serve = layer.object("serve")?.map(|f| ServeRecord::read(&f)).transpose()?.unwrap_or_default();
        layer.warn_unused();
        read.insert(index, LayerRecord { serve });
    }
    Ok(read)
}

// === impl TrainRecord ===

impl TrainRecord {
    fn read(train: &Fields<'_>) -> Result<Self> {
        let score = train.string("score")?;
        if score.is_some_and(|score| score != "softmax") {
            return Err(train.unsupported("score", "only \"softmax\" can be served"));
        }
        let record = Self {
            estimator: train.string("estimator")?.unwrap_or("unknown").to_string(),
            k: train.count("k")?,
            score: score.map(str::to_string),
            param: train.get("param").cloned().unwrap_or_default(),
            temperature: train.object("temperature")?.map(|f| TemperatureRecord::read(&f)).transpose()?,
            noise: train.object("noise")?.map(|f| NoiseRecord::read(&f)).transpose()?,
            weight_form: train.choice("weight_form", WEIGHT_FORMS)?,
            loss: train.object("loss")?.map(|f| LossRecord::read(&f)).transpose()?,
            capacity_factor: train.positive("capacity_factor")?,
            steps: train.integer("steps")?,
            frozen_router: train.boolean("frozen_router")?,
        };
        train.warn_unused();
        Ok(record)
    }
}

impl TemperatureRecord {
    fn read(temperature: &Fields<'_>) -> Result<Self> {
        let record = Self {
            schedule: owned(temperature, "schedule")?,
            init: temperature.positive("init")?,
            end: temperature.positive("final")?,
            at_save: temperature.positive("at_save")?,
            folded: temperature.boolean("folded")?,
        };
        temperature.warn_unused();
        Ok(record)
    }
}

impl NoiseRecord {
    fn read(noise: &Fields<'_>) -> Result<Self> {
        let record = Self { kind: owned(noise, "kind")?, scale_at_save: noise.number("scale_at_save")? };
        noise.warn_unused();
        Ok(record)
    }
}

impl LossRecord {
    fn read(loss: &Fields<'_>) -> Result<Self> {
        let record = Self {
            balance: owned(loss, "balance")?,
            convention: owned(loss, "convention")?,
            balance_coef: loss.number("balance_coef")?,
            z_coef: loss.number("z_coef")?,
            bias_rate: loss.number("bias_rate")?,
        };
        loss.warn_unused();
        Ok(record)
    }
}

fn owned(fields: &Fields<'_>, key: &str) -> Result<Option<String>> {
    Ok(fields.string(key)?.map(str::to_string))
}

// === impl ReferenceRecord ===

impl ReferenceRecord {
    fn read(reference: &Fields<'_>) -> Result<Self> {
        let modes = [("soft", ReferenceMode::Soft), ("hard", ReferenceMode::Hard)];
        let mode = reference.choice("mode", &modes)?.ok_or_else(|| reference.wrong("mode", "\"soft\" or \"hard\""))?;
        let temperature = reference.positive_f32("temperature")?;
        let noise = owned(reference, "noise")?;
        if noise.as_deref().is_some_and(|noise| noise != "none") {
            return Err(reference.unsupported("noise", "only \"none\""));
        }
        if mode == ReferenceMode::Soft && temperature.is_none() {
            return Err(reference.wrong("temperature", "a number above 0, because mode is \"soft\""));
        }
        let record = Self { mode, temperature, k: reference.count("k")?, noise };
        reference.warn_unused();
        Ok(record)
    }
}

// === impl ServeRecord ===

impl ServeRecord {
    fn read(serve: &Fields<'_>) -> Result<Self> {
        for (key, only) in [("mode", "hard"), ("order", "softmax_topk"), ("tie_break", "lowest_index"), ("dtype", "f32")] {
            if serve.string(key)?.is_some_and(|stated| stated != only) {
                return Err(serve.unsupported(key, format!("only \"{only}\", which is how the family is served")));
            }
        }
        if serve.boolean("dropless")? == Some(false) {
            return Err(serve.unsupported("dropless", "only true: no token is dropped"));
        }
        let record = Self {
            mode: owned(serve, "mode")?,
            k: serve.count("k")?,
            weight_form: serve.choice("weight_form", WEIGHT_FORMS)?,
            order: owned(serve, "order")?,
            tie_break: owned(serve, "tie_break")?,
            dtype: owned(serve, "dtype")?,
            dropless: serve.boolean("dropless")?,
        };
        serve.warn_unused();
        Ok(record)
    }

    /// Changes `moe`, or says what is wrong with k: (found, expected).
    fn apply(&self, moe: &mut MoeSpec) -> std::result::Result<(), (String, String)> {
        if let Some(k) = self.k {
            if k == 0 || k > moe.num_experts {
                return Err((k.to_string(), format!("from 1 to the number of experts, {}", moe.num_experts)));
            }
            moe.top_k = k;
        }
        moe.weight_form = self.weight_form.unwrap_or(moe.weight_form);
        Ok(())
    }
}

// === impl FidelityRecord ===

impl FidelityRecord {
    fn read(fidelity: &Fields<'_>) -> Result<Self> {
        let record = Self {
            corpus_sha256: owned(fidelity, "corpus_sha256")?,
            tokens: fidelity.integer("tokens")?,
            kl: fidelity.number("kl")?,
            top1_agree: fidelity.number("top1_agree")?,
            ppl_gap: fidelity.number("ppl_gap")?,
            floor_kl: fidelity.number("floor_kl")?,
            measured_by: owned(fidelity, "measured_by")?,
        };
        fidelity.warn_unused();
        Ok(record)
    }
}
