//! config.json to [`ModelSpec`]. Rules and defaults are those of transformers 5.23; whatever would change the function
//! and is not implemented is an error, and unknown keys are warned of.

use std::path::Path;

use serde_json::Value;

use super::{
    CheckpointError,
    family::{Bias, FAMILIES, Family, HARMLESS, NEUTRAL, Placement, Renorm, Window},
    fields::Fields,
    generation::TokenIds,
    rope::{RopeContext, read_rope},
    routing_block::RoutingBlock,
};
use crate::{
    model::{FeedForwardSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm, ReferenceRouting},
    moe::policy::WeightForm,
};

type Result<T> = std::result::Result<T, CheckpointError>;

const MAX_LAYERS: usize = 4096;
const MAX_EXPERTS: usize = 1 << 16;
/// Experts of all layers together: names are made for each. Five times those of the largest published model.
const MAX_ALL_EXPERTS: usize = 1 << 17;
/// Parameters of a model that is no mistake: 280 trillion.
const MAX_PARAMETERS: u128 = 1 << 48;

/// What config.json says.
#[derive(Debug)]
pub(super) struct Config {
    pub(super) family: &'static Family,
    pub(super) spec: ModelSpec,
    pub(super) routing: Option<RoutingBlock>,
    pub(super) tokens: TokenIds,
}

impl Config {
    /// Reads the content of `file`.
    pub(super) fn parse(file: &Path, value: &Value) -> Result<Self> {
        let config = Fields::new(file, value)?;
        let family = read_family(&config)?;
        refuse_foreign(&config, family)?;
        let mut spec = read_spec(&config, family)?;
        let tokens = TokenIds::read(&config, spec.vocab_size)?.or_defaults(&config, family, spec.vocab_size);
        let routing = config.object("routing")?.map(|block| RoutingBlock::read(&block)).transpose()?;
        if let Some(block) = &routing {
            block.apply(file, &mut spec)?;
        }
        warn_unknown(&config);
        Ok(Self { family, spec, routing, tokens })
    }
}

fn read_family(config: &Fields<'_>) -> Result<&'static Family> {
    let supported = || FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", ");
    let Some(model_type) = config.string("model_type")? else {
        return Err(config.wrong("model_type", format!("one of {}", supported())));
    };
    let family = FAMILIES.iter().find(|family| family.model_type == model_type);
    let family = family.ok_or_else(|| config.unsupported("model_type", format!("supported are {}", supported())))?;
    let architectures = config.list("architectures", "a list of strings", Value::as_str)?;
    if architectures.is_some_and(|classes| !classes.is_empty() && !classes.contains(&family.architecture)) {
        return Err(config.unsupported("architectures", format!("{model_type} needs {}", family.architecture)));
    }
    Ok(family)
}

/// Fields that this family does not read, with a value that would change the function.
fn refuse_foreign(config: &Fields<'_>, family: &Family) -> Result<()> {
    let own = |key: &str| match key {
        "attention_bias" => family.bias == Bias::AttentionField,
        "qkv_bias" => family.bias == Bias::QkvField,
        "clip_qkv" => family.clip_qkv,
        "sliding_window" => family.window != Window::Never,
        "use_sliding_window" => matches!(family.window, Window::Switched | Window::PerLayer),
        "decoder_sparse_step" | "mlp_only_layers" => family.placement == Placement::Sparse,
        "norm_topk_prob" => family.renorm == Renorm::Field,
        "shared_expert_intermediate_size" => family.shared_expert_width.is_some(),
        _ => false,
    };
    for (key, neutral) in NEUTRAL.iter().filter(|(key, _)| !own(key)) {
        if let Some(value) = config.get(key)
            && !neutral.contains(&value.to_string().as_str())
        {
            return Err(config.unsupported(key, format!("{} allows only {}", family.model_type, neutral.join(" or "))));
        }
    }
    Ok(())
}

fn warn_unknown(config: &Fields<'_>) {
    let unknown: Vec<_> = config.unused().into_iter().filter(|key| !HARMLESS.contains(key)).collect();
    if !unknown.is_empty() {
        tracing::warn!(file = %config.file().display(), keys = unknown.join(", "), "unknown keys have no effect");
    }
}

fn read_spec(config: &Fields<'_>, family: &Family) -> Result<ModelSpec> {
    let defaults = &family.defaults;
    refuse_activation(config)?;
    let heads = read_heads(config, family)?;
    let max_context = config.count("max_position_embeddings")?.unwrap_or(defaults.max_context);
    let spec = ModelSpec {
        family: family.model_type.to_string(),
        vocab_size: config.count("vocab_size")?.unwrap_or(defaults.vocab_size),
        hidden_size: heads.hidden_size,
        num_heads: heads.num_heads,
        num_kv_heads: heads.num_kv_heads,
        head_dim: heads.head_dim,
        qkv_bias: match family.bias {
            Bias::Never => false,
            Bias::QkvField => config.boolean("qkv_bias")?.unwrap_or(true),
            Bias::AttentionField => config.boolean("attention_bias")?.unwrap_or(false),
        },
        out_bias: family.bias == Bias::AttentionField && config.boolean("attention_bias")?.unwrap_or(false),
        qk_norm: family.qk_norm,
        clip_qkv: if family.clip_qkv { config.positive_f32("clip_qkv")?.map(|clip| clip as f32) } else { None },
        rms_norm_eps: config.positive_f32("rms_norm_eps")?.unwrap_or(defaults.rms_norm_eps),
        rope: read_rope(config, &RopeContext { default_theta: defaults.rope_theta, max_context })?,
        max_context,
        tied_head: config.boolean("tie_word_embeddings")?.unwrap_or(false),
        layers: read_layers(config, family)?,
        reference: ReferenceRouting::OwnTopK { assumed: true },
        estimator: "unknown".to_string(),
    };
    refuse_absurd(config, &spec)?;
    Ok(spec)
}

fn refuse_activation(config: &Fields<'_>) -> Result<()> {
    match config.string("hidden_act")? {
        None | Some("silu") => Ok(()),
        Some(_) => Err(config.unsupported("hidden_act", "only \"silu\"")),
    }
}

struct Heads {
    hidden_size: usize,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

fn read_heads(config: &Fields<'_>, family: &Family) -> Result<Heads> {
    let defaults = &family.defaults;
    let hidden_size = config.count("hidden_size")?.unwrap_or(defaults.hidden_size);
    let num_heads = config.count("num_attention_heads")?.unwrap_or(defaults.num_heads);
    let absent = if config.has("num_key_value_heads") { None } else { defaults.num_kv_heads };
    let num_kv_heads = config.count("num_key_value_heads")?.or(absent).unwrap_or(num_heads);
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(config.wrong("num_key_value_heads", format!("a divisor of num_attention_heads, {num_heads}")));
    }
    let head_dim = match config.integer("head_dim")?.filter(|width| *width > 0) {
        Some(width) => width,
        None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            return Err(config.wrong("num_attention_heads", format!("a divisor of hidden_size, {hidden_size}, or an explicit head_dim")));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(config.wrong("head_dim", format!("an even width for rotation, not {head_dim}")));
    }
    if family.qk_norm == QkNorm::Full && num_heads.checked_mul(head_dim) != Some(hidden_size) {
        return Err(config.unsupported("head_dim", format!("{} needs hidden_size / num_attention_heads", family.model_type)));
    }
    Ok(Heads { hidden_size, num_heads, num_kv_heads, head_dim })
}

fn read_layers(config: &Fields<'_>, family: &Family) -> Result<Vec<LayerSpec>> {
    let count = config.count("num_hidden_layers")?.unwrap_or(family.defaults.num_layers);
    if count > MAX_LAYERS {
        return Err(config.wrong("num_hidden_layers", format!("at most {MAX_LAYERS}")));
    }
    let moe = read_moe(config, family)?;
    if moe.num_experts.saturating_mul(count) > MAX_ALL_EXPERTS {
        return Err(config.wrong("num_hidden_layers", format!("at most {MAX_ALL_EXPERTS} experts in all layers together")));
    }
    let routed = read_placement(config, family, count)?;
    let dense = if routed.contains(&false) {
        FeedForwardSpec::Dense { width: config.count("intermediate_size")?.unwrap_or(family.defaults.dense_width) }
    } else {
        config.get("intermediate_size");
        FeedForwardSpec::Moe(moe.clone())
    };
    let windows = read_windows(config, family, count)?;
    let layer = |(routed, sliding_window): (&bool, Option<usize>)| LayerSpec {
        sliding_window,
        feed_forward: if *routed { FeedForwardSpec::Moe(moe.clone()) } else { dense.clone() },
    };
    Ok(routed.iter().zip(windows).map(layer).collect())
}

fn read_moe(config: &Fields<'_>, family: &Family) -> Result<MoeSpec> {
    let defaults = &family.defaults;
    let num_experts = read_num_experts(config)?.unwrap_or(defaults.num_experts);
    let top_k = config.count("num_experts_per_tok")?.unwrap_or(defaults.top_k);
    if top_k > num_experts {
        return Err(config.wrong("num_experts_per_tok", format!("at most the number of experts, {num_experts}")));
    }
    let renorm = family.renorm == Renorm::Always || config.boolean("norm_topk_prob")?.unwrap_or(false);
    let shared_expert_width = match family.shared_expert_width {
        Some(default) => Some(config.count("shared_expert_intermediate_size")?.unwrap_or(default)),
        None => None,
    };
    Ok(MoeSpec {
        num_experts,
        expert_width: config.count(family.expert_width_field)?.unwrap_or(defaults.expert_width),
        top_k,
        weight_form: if renorm { WeightForm::Renorm } else { WeightForm::Raw },
        shared_expert_width,
    })
}

/// The number of experts goes by three names, whatever the family.
fn read_num_experts(config: &Fields<'_>) -> Result<Option<usize>> {
    let mut found: Option<usize> = None;
    for key in ["num_local_experts", "num_experts", "n_routed_experts"] {
        let Some(count) = config.count(key)? else { continue };
        if count > MAX_EXPERTS {
            return Err(config.wrong(key, format!("at most {MAX_EXPERTS}")));
        }
        if found.is_some_and(|other| other != count) {
            return Err(config.wrong(key, format!("{}, as another field for the number of experts says", found.unwrap_or(count))));
        }
        found = Some(count);
    }
    Ok(found)
}

/// For each layer whether it is routed.
fn read_placement(config: &Fields<'_>, family: &Family, count: usize) -> Result<Vec<bool>> {
    if family.placement == Placement::Every {
        return Ok(vec![true; count]);
    }
    let step = config.count("decoder_sparse_step")?.unwrap_or(1);
    let dense = config.integers("mlp_only_layers")?.unwrap_or_default();
    if dense.iter().any(|layer| *layer >= count) {
        return Err(config.wrong("mlp_only_layers", format!("layers from 0 to {}", count - 1)));
    }
    let routed: Vec<_> = (0..count).map(|layer| !dense.contains(&layer) && (layer + 1).is_multiple_of(step)).collect();
    if !routed.contains(&true) {
        let key = if step > count { "decoder_sparse_step" } else { "mlp_only_layers" };
        return Err(config.unsupported(key, "at least one layer must have experts"));
    }
    Ok(routed)
}

/// For each layer its sliding window.
fn read_windows(config: &Fields<'_>, family: &Family, count: usize) -> Result<Vec<Option<usize>>> {
    let types = read_layer_types(config, count)?;
    let every = |window: Option<usize>| {
        let windows = vec![window; count];
        match &types {
            Some(types) if types.iter().any(|sliding| *sliding != window.is_some()) => {
                Err(config.unsupported("layer_types", format!("{} treats all layers alike", family.model_type)))
            }
            _ => Ok(windows),
        }
    };
    let switched = || -> Result<Option<usize>> {
        if !config.boolean("use_sliding_window")?.unwrap_or(false) {
            config.get("sliding_window");
            return Ok(None);
        }
        match config.count("sliding_window")? {
            None if config.has("sliding_window") => Err(config.wrong("sliding_window", "a width, because use_sliding_window is true")),
            stated => Ok(Some(stated.unwrap_or(4096))),
        }
    };
    match family.window {
        Window::Never => every(None),
        Window::Plain => every(config.count("sliding_window")?),
        Window::Switched => {
            let window = switched()?;
            if window.is_none() {
                config.get("max_window_layers");
            }
            every(window)
        }
        Window::PerLayer => {
            let (window, below) = (switched()?, config.integer("max_window_layers")?.unwrap_or(28));
            match (types, window) {
                (Some(types), None) if types.contains(&true) => {
                    Err(config.wrong("layer_types", "no sliding_attention, because use_sliding_window is false"))
                }
                (Some(types), window) => Ok(types.into_iter().map(|sliding| window.filter(|_| sliding)).collect()),
                (None, window) => Ok((0..count).map(|layer| window.filter(|_| layer.is_multiple_of(2) && layer < below)).collect()),
            }
        }
    }
}

/// For each layer whether `layer_types` makes it sliding.
fn read_layer_types(config: &Fields<'_>, count: usize) -> Result<Option<Vec<bool>>> {
    let expected = format!("a list of {count} times \"full_attention\" or \"sliding_attention\"");
    let types = config.list("layer_types", &expected, |value| match value.as_str()? {
        "full_attention" => Some(false),
        "sliding_attention" => Some(true),
        _ => None,
    })?;
    match types {
        Some(types) if types.len() != count => Err(config.wrong("layer_types", expected)),
        types => Ok(types),
    }
}

/// Products of sizes stay far from overflow in everything downstream.
fn refuse_absurd(config: &Fields<'_>, spec: &ModelSpec) -> Result<()> {
    let wide = |n: usize| n as u128;
    let (d, heads) = (wide(spec.hidden_size), wide(spec.num_heads) * wide(spec.head_dim));
    let mut parameters = 2 * wide(spec.vocab_size) * d;
    for layer in &spec.layers {
        parameters += 4 * d * heads;
        parameters += match &layer.feed_forward {
            FeedForwardSpec::Dense { width } => 3 * d * wide(*width),
            FeedForwardSpec::Moe(moe) => {
                let shared = wide(moe.shared_expert_width.unwrap_or(0));
                d * wide(moe.num_experts) + 3 * d * (wide(moe.num_experts) * wide(moe.expert_width) + shared)
            }
        };
    }
    if parameters <= MAX_PARAMETERS {
        return Ok(());
    }
    Err(CheckpointError::Field {
        path: config.file().into(),
        field: "the product of its sizes".to_string(),
        found: format!("{parameters} parameters"),
        expected: format!("at most {MAX_PARAMETERS}"),
    })
}
