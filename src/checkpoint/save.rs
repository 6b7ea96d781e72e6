//! Writes a complete folder in the published Mixtral layout, so that other programs load it unchanged.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{BufWriter, Write as _},
    path::Path,
};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::{
    CONFIG, CheckpointError, GENERATION_CONFIG, GenerationDefaults, ROUTING, RoutingBlock, TOKENIZER, TOKENIZER_CONFIG, check_tokenizer,
    config::Config,
    family::{FAMILIES, Family},
    names::{LayerWeight, Source, Weight, weights},
    swap::Swap,
};
use crate::{
    model::{
        FeedForwardSpec, ModelSpec, MoeSpec, QkNorm, RopeScaling,
        weights::{FeedForwardWeights, LayerWeights, ModelWeights},
    },
    moe::policy::WeightForm,
};

type Result<T> = std::result::Result<T, CheckpointError>;

pub(super) const WEIGHTS: &str = "model.safetensors";

/// What is to be written.
#[derive(Clone, Copy, Debug)]
pub struct SaveRequest<'a> {
    /// In the shape of Mixtral: every layer routed with the same E, F and k, no biases, no query or key norm, no shared
    /// expert. Its serving routing, reference and estimator must be those that `routing` gives.
    pub spec: &'a ModelSpec,
    /// Of any dtype and on any device; finite.
    pub weights: &'a ModelWeights,
    /// Goes into config.json and into the metadata of the weights.
    pub routing: Option<&'a RoutingBlock>,
    /// With ids below `spec.vocab_size`.
    pub tokenizer: Option<&'a Tokenizer>,
    /// Goes into generation_config.json; the token ids into config.json as well.
    pub generation: &'a GenerationDefaults,
    /// On disk: F32, BF16 or F16. Norms and routers stay f32.
    pub dtype: DType,
}

/// Writes `request` as the folder `dir`, replacing a checkpoint that is there.
///
/// Files of an old folder that are no part of a checkpoint (a model card, say) move to the new one. Fails where `dir` is
/// something else than a checkpoint or an empty folder, where the model does not fit the layout, where a weight is not
/// finite, and on I/O errors. Then `dir` is as before, except where only the move of such files failed: what is left of
/// them is in the old folder, which the error names.
pub fn save(dir: &Path, request: &SaveRequest<'_>) -> Result<()> {
    let family = family()?;
    let config = config_json(request)?;
    check_representable(&config, request.spec)?;
    let tensors = Tensors::new(family, request)?;
    if let Some(tokenizer) = request.tokenizer {
        check_tokenizer(&dir.join(TOKENIZER), tokenizer, request.spec.vocab_size)?;
    }
    let swap = Swap::new(dir)?;
    let write = || {
        let path = |name: &str| swap.partial.join(name);
        tensors.write(&path(WEIGHTS), request)?;
        write_json(&path(CONFIG), &config)?;
        write_json(&path(GENERATION_CONFIG), &request.generation.to_json())?;
        if let Some(tokenizer) = request.tokenizer {
            let file = path(TOKENIZER);
            let text = tokenizer.to_string(false).map_err(|e| CheckpointError::malformed(&file, format!("cannot be written: {e}")))?;
            write_file(&file, text.as_bytes())?;
            write_json(&path(TOKENIZER_CONFIG), &tokenizer_config(request, tokenizer))?;
        }
        swap.commit(dir)
    };
    let written = write();
    if written.is_err() {
        // Best effort: the error that matters is the one above.
        let _ = fs::remove_dir_all(&swap.partial);
    }
    written
}

fn family() -> Result<&'static Family> {
    FAMILIES.first().ok_or_else(|| not_savable("the family", "unknown", "mixtral"))
}

fn not_savable(field: &str, found: impl ToString, expected: impl ToString) -> CheckpointError {
    CheckpointError::NotSavable { field: field.to_string(), found: found.to_string(), expected: expected.to_string() }
}

// === config.json ===

fn config_json(request: &SaveRequest<'_>) -> Result<Value> {
    let spec = request.spec;
    let moe = mixtral_moe(spec)?;
    let (bos, eos) = request.generation.token_ids();
    let ids = request.generation.eos_token_ids.iter().chain(&request.generation.bos_token_id);
    if let Some(id) = ids.into_iter().find(|id| **id as usize >= spec.vocab_size) {
        return Err(not_savable("an id among the special tokens", id, format!("ids below vocab_size, {}", spec.vocab_size)));
    }
    let mut config = json!({
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": moe.expert_width,
        "num_hidden_layers": spec.layers.len(),
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_context,
        "sliding_window": spec.layers.first().and_then(|layer| layer.sliding_window),
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope.theta,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "tie_word_embeddings": spec.tied_head,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "output_router_logits": false,
        "use_cache": true,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype(request.dtype)?.1,
    });
    if let Value::Object(map) = &mut config {
        if let Some(scaling) = rope_scaling(&spec.rope.scaling) {
            map.insert("rope_scaling".into(), scaling);
        }
        if let Some(block) = request.routing {
            map.insert(ROUTING.into(), routing_json(block)?);
        }
    }
    Ok(config)
}

pub(super) fn routing_json(block: &RoutingBlock) -> Result<Value> {
    serde_json::to_value(block).map_err(|e| not_savable("the routing block", e, "plain values"))
}

/// The one kind of MoE layer that all layers have.
fn mixtral_moe(spec: &ModelSpec) -> Result<&MoeSpec> {
    let must = |right: bool, field: &str, found: String, expected: &str| match right {
        true => Ok(()),
        false => Err(not_savable(field, found, expected)),
    };
    must(spec.qk_norm == QkNorm::None, "qk_norm", format!("{:?}", spec.qk_norm), "none")?;
    must(!spec.qkv_bias && !spec.out_bias, "a bias of attention", "set".into(), "none")?;
    must(spec.clip_qkv.is_none(), "clip_qkv", format!("{:?}", spec.clip_qkv), "none")?;
    let mut moe = spec.moe_layers().map(|(_, moe)| moe);
    let first = moe.next().ok_or_else(|| not_savable("the number of layers", 0, "at least one routed layer"))?;
    let window = spec.layers.first().and_then(|layer| layer.sliding_window);
    for (index, layer) in spec.layers.iter().enumerate() {
        let field = |what: &str| format!("{what} of layer {index}");
        let FeedForwardSpec::Moe(moe) = &layer.feed_forward else {
            return Err(not_savable(&field("the feed-forward part"), "dense", "experts in every layer"));
        };
        must(layer.sliding_window == window, &field("the sliding window"), format!("{:?}", layer.sliding_window), "one for all layers")?;
        must(moe.shared_expert_width.is_none(), &field("the shared expert"), format!("{:?}", moe.shared_expert_width), "none")?;
        let same = (moe.num_experts, moe.expert_width) == (first.num_experts, first.expert_width);
        must(same, &field("(experts, width)"), format!("({}, {})", moe.num_experts, moe.expert_width), "the same in all layers")?;
    }
    Ok(first)
}

/// What is written must read back as the same model: the routing block has to account for every difference from Mixtral.
fn check_representable(config: &Value, spec: &ModelSpec) -> Result<()> {
    let back = Config::parse(Path::new("config.json of the model being saved"), config)?.spec;
    let unlike = |field: &str, found: String, expected: String| Err(not_savable(field, found, expected));
    if back.reference != spec.reference {
        return unlike("reference", format!("{:?}", spec.reference), format!("{:?}, as the routing block says", back.reference));
    }
    if back.estimator != spec.estimator {
        return unlike("estimator", spec.estimator.clone(), format!("{}, as the routing block says", back.estimator));
    }
    for ((index, own), (_, read)) in spec.moe_layers().zip(back.moe_layers()) {
        let form = |moe: &MoeSpec| format!("top-{} ({})", moe.top_k, moe.weight_form);
        if own != read {
            let why = if own.weight_form == WeightForm::Renorm { "routing.per_layer" } else { "routing.serve.weight_form" };
            return unlike(&format!("the serving routing of layer {index}"), form(own), format!("{}, unless {why} says so", form(read)));
        }
    }
    match (ModelSpec { family: spec.family.clone(), ..back }) == *spec {
        true => Ok(()),
        false => unlike("the model", "another one when read back".into(), "values that config.json can state".into()),
    }
}

fn rope_scaling(scaling: &RopeScaling) -> Option<Value> {
    match scaling {
        RopeScaling::None => None,
        RopeScaling::Linear { factor } => Some(json!({ "rope_type": "linear", "factor": factor })),
        RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, attention_factor, truncate } => {
            let mut yarn = json!({
                "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original_max_position,
                "beta_fast": beta_fast, "beta_slow": beta_slow, "truncate": truncate,
            });
            if let (Value::Object(map), Some(factor)) = (&mut yarn, attention_factor) {
                map.insert("attention_factor".into(), json!(factor));
            }
            Some(yarn)
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => Some(json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor, "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position,
        })),
    }
}

fn tokenizer_config(request: &SaveRequest<'_>, tokenizer: &Tokenizer) -> Value {
    let token = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id));
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": request.spec.max_context,
        "clean_up_tokenization_spaces": false,
        "bos_token": token(request.generation.bos_token_id),
        "eos_token": token(request.generation.eos_token_ids.first().copied()),
    })
}

// === model.safetensors ===

/// The format on disk and its name in config.json.
fn dtype(dtype: DType) -> Result<(Dtype, &'static str)> {
    match dtype {
        DType::F32 => Ok((Dtype::F32, "float32")),
        DType::BF16 => Ok((Dtype::BF16, "bfloat16")),
        DType::F16 => Ok((Dtype::F16, "float16")),
        other => Err(CheckpointError::UnsupportedDtype(other)),
    }
}

/// Weights, and the tensors on disk that each becomes; shapes checked.
struct Tensors<'a>(Vec<(&'a Tensor, Source)>);

impl<'a> Tensors<'a> {
    fn new(family: &Family, request: &SaveRequest<'a>) -> Result<Self> {
        let (spec, layout) = (request.spec, family.names.published());
        let mut all = Vec::new();
        for weight in weights(spec) {
            let source = family.names.source(spec, weight, layout);
            let name = source.parts.first().map(|part| part.name.clone()).unwrap_or_default();
            let Some(tensor) = tensor_of(request.weights, weight) else {
                return Err(not_savable(&name, "absent from the weights", "a tensor, because the model has one"));
            };
            if tensor.dims() != source.shape.as_slice() {
                return Err(not_savable(&name, format!("{:?}", tensor.dims()), format!("shape {:?}", source.shape)));
            }
            all.push((tensor, source));
        }
        // Wide formats first, so that every tensor is aligned.
        all.sort_by_key(|(_, source)| !source.f32);
        match request.weights.layers.len() == spec.layers.len() && request.weights.head.is_none() == spec.tied_head {
            true => Ok(Self(all)),
            false => Err(not_savable("the weights", "of another model", "the layers and head of the spec")),
        }
    }

    fn write(&self, path: &Path, request: &SaveRequest<'_>) -> Result<()> {
        let io = |e| CheckpointError::io(path, e);
        let mut header = self.header(path, request)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut file = BufWriter::with_capacity(1 << 20, File::create_new(path).map_err(io)?);
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
        file.write_all(&header).map_err(io)?;
        for (tensor, source) in &self.0 {
            let bytes = bytes_of(path, tensor, source, if source.f32 { DType::F32 } else { request.dtype })?;
            file.write_all(&bytes).map_err(io)?;
        }
        let file = file.into_inner().map_err(|e| io(e.into_error()))?;
        file.sync_all().map_err(io)
    }

    fn header(&self, path: &Path, request: &SaveRequest<'_>) -> Result<Vec<u8>> {
        let mut metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        if let Some(block) = request.routing {
            metadata.insert(ROUTING.to_string(), routing_json(block)?.to_string());
        }
        let big = dtype(request.dtype)?.0;
        let (mut infos, mut offset) = (Vec::new(), 0);
        for (_, source) in &self.0 {
            let dtype = if source.f32 { Dtype::F32 } else { big };
            for part in &source.parts {
                let end = offset + part.shape.iter().product::<usize>() * dtype.bitsize() / 8;
                infos.push((part.name.clone(), TensorInfo { dtype, shape: part.shape.clone(), data_offsets: (offset, end) }));
                offset = end;
            }
        }
        let header = Metadata::new(Some(metadata), infos).map_err(|e| CheckpointError::malformed(path, e))?;
        serde_json::to_vec(&header).map_err(|e| CheckpointError::malformed(path, e))
    }
}

/// The elements of a weight in order, which is also the order of the tensors it becomes.
pub(super) fn bytes_of(path: &Path, tensor: &Tensor, source: &Source, dtype: DType) -> Result<Vec<u8>> {
    let values = tensor.to_device(&Device::Cpu).and_then(|t| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>());
    let name = |element: usize| {
        let each = source.parts.first().map_or(1, |part| part.shape.iter().product::<usize>()).max(1);
        source.parts.get(element / each).map(|part| part.name.clone()).unwrap_or_default()
    };
    let values = values.map_err(|source| CheckpointError::Tensor { tensor: name(0), source })?;
    let finite = |value: &f32| match dtype {
        DType::BF16 => bf16::from_f32(*value).is_finite(),
        DType::F16 => f16::from_f32(*value).is_finite(),
        _ => value.is_finite(),
    };
    if let Some(index) = values.iter().position(|value| !finite(value)) {
        let message = format!("a model with it cannot be served, or {dtype:?} cannot hold it");
        return Err(CheckpointError::NonFinite { path: path.into(), tensor: name(index), index, message });
    }
    Ok(match dtype {
        DType::BF16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    })
}

fn tensor_of(weights: &ModelWeights, weight: Weight) -> Option<&Tensor> {
    match weight {
        Weight::Embedding => Some(&weights.embedding),
        Weight::FinalNorm => Some(&weights.final_norm),
        Weight::Head => weights.head.as_ref(),
        Weight::Layer(index, weight) => layer_tensor_of(weights.layers.get(index)?, weight),
    }
}

fn layer_tensor_of(layer: &LayerWeights, weight: LayerWeight) -> Option<&Tensor> {
    let attention = &layer.attention;
    let dense = || match &layer.feed_forward {
        FeedForwardWeights::Dense(dense) => Some(dense),
        FeedForwardWeights::Moe(_) => None,
    };
    let moe = || match &layer.feed_forward {
        FeedForwardWeights::Moe(moe) => Some(moe),
        FeedForwardWeights::Dense(_) => None,
    };
    match weight {
        LayerWeight::AttentionNorm => Some(&layer.attention_norm),
        LayerWeight::Query => Some(&attention.query),
        LayerWeight::Key => Some(&attention.key),
        LayerWeight::Value => Some(&attention.value),
        LayerWeight::Output => Some(&attention.output),
        LayerWeight::QueryBias => attention.qkv_bias.as_ref().map(|[query, _, _]| query),
        LayerWeight::KeyBias => attention.qkv_bias.as_ref().map(|[_, key, _]| key),
        LayerWeight::ValueBias => attention.qkv_bias.as_ref().map(|[_, _, value]| value),
        LayerWeight::OutputBias => attention.output_bias.as_ref(),
        LayerWeight::QueryNorm => attention.qk_norm.as_ref().map(|[query, _]| query),
        LayerWeight::KeyNorm => attention.qk_norm.as_ref().map(|[_, key]| key),
        LayerWeight::FeedForwardNorm => Some(&layer.feed_forward_norm),
        LayerWeight::DenseGateUp => dense().map(|dense| &dense.gate_up),
        LayerWeight::DenseDown => dense().map(|dense| &dense.down),
        LayerWeight::Router => moe().map(|moe| &moe.router),
        LayerWeight::ExpertsGateUp => moe().map(|moe| &moe.gate_up),
        LayerWeight::ExpertsDown => moe().map(|moe| &moe.down),
        LayerWeight::SharedGateUp => moe()?.shared.as_ref().map(|shared| &shared.expert.gate_up),
        LayerWeight::SharedDown => moe()?.shared.as_ref().map(|shared| &shared.expert.down),
        LayerWeight::SharedGate => moe()?.shared.as_ref().map(|shared| &shared.gate),
    }
}

// === small files ===

pub(super) fn write_json(path: &Path, value: &Value) -> Result<()> {
    write_file(path, format!("{value:#}\n").as_bytes())
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create_new(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| CheckpointError::io(path, e))
}
