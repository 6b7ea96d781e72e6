//! The supported families, one row of data each. Defaults are those of the configuration classes of Hugging Face
//! transformers 5.23, which apply where config.json leaves a field out.

use super::names::WeightNames;
use crate::model::QkNorm;

/// What distinguishes a family, as far as config.json and tensor names show it.
#[derive(Debug)]
pub(super) struct Family {
    /// `model_type` in config.json.
    pub(super) model_type: &'static str,
    /// The one class in `architectures` whose weights have a language-model head.
    pub(super) architecture: &'static str,
    /// Tensor names.
    pub(super) names: WeightNames,
    /// Values of absent fields.
    pub(super) defaults: Defaults,
    /// Field of the width of an expert.
    pub(super) expert_width_field: &'static str,
    /// Which layers are routed.
    pub(super) placement: Placement,
    /// Which projections of attention have a bias.
    pub(super) bias: Bias,
    /// Normalisation of queries and keys.
    pub(super) qk_norm: QkNorm,
    /// Reads `clip_qkv`.
    pub(super) clip_qkv: bool,
    /// How expert weights are made.
    pub(super) renorm: Renorm,
    /// Which layers have a sliding window.
    pub(super) window: Window,
    /// Width of the shared expert where config.json does not state it; `None` in families without one.
    pub(super) shared_expert_width: Option<usize>,
}

/// Values of absent fields.
#[derive(Debug)]
pub(super) struct Defaults {
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) num_layers: usize,
    pub(super) num_heads: usize,
    /// `None`: as many as query heads.
    pub(super) num_kv_heads: Option<usize>,
    pub(super) max_context: usize,
    pub(super) rms_norm_eps: f64,
    pub(super) rope_theta: f64,
    pub(super) num_experts: usize,
    pub(super) top_k: usize,
    pub(super) expert_width: usize,
    pub(super) dense_width: usize,
    pub(super) bos_token_id: Option<u32>,
    pub(super) eos_token_id: Option<u32>,
}

/// Which layers are routed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placement {
    /// All of them.
    Every,
    /// `decoder_sparse_step` and `mlp_only_layers` decide.
    Sparse,
}

/// Which projections of attention have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bias {
    /// None.
    Never,
    /// Query, key and value where `qkv_bias`, on by default.
    QkvField,
    /// All four where `attention_bias`, off by default.
    AttentionField,
}

/// How expert weights are made of the softmax over all experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Renorm {
    /// Scaled to sum to 1 over the chosen ones.
    Always,
    /// So where `norm_topk_prob`, off by default.
    Field,
}

/// Which layers have a sliding window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Window {
    /// None has.
    Never,
    /// All, where `sliding_window` is stated.
    Plain,
    /// All, where `use_sliding_window`; its width is 4096 by default.
    Switched,
    /// Where `use_sliding_window`: those that `layer_types` names, by default every other one below `max_window_layers` (28).
    PerLayer,
}

/// All supported families.
pub(super) const FAMILIES: &[Family] = &[
    Family {
        model_type: "mixtral",
        architecture: "MixtralForCausalLM",
        names: WeightNames { moe: &["block_sparse_moe", "mlp"], experts: ["w1", "w3", "w2"] },
        defaults: Defaults {
            vocab_size: 32_000,
            hidden_size: 4096,
            num_layers: 32,
            num_heads: 32,
            num_kv_heads: Some(8),
            max_context: 131_072,
            rms_norm_eps: 1e-5,
            rope_theta: 1e6,
            num_experts: 8,
            top_k: 2,
            expert_width: 14_336,
            dense_width: 0,
            bos_token_id: Some(1),
            eos_token_id: Some(2),
        },
        expert_width_field: "intermediate_size",
        placement: Placement::Every,
        bias: Bias::Never,
        qk_norm: QkNorm::None,
        clip_qkv: false,
        renorm: Renorm::Always,
        window: Window::Plain,
        shared_expert_width: None,
    },
    Family {
        model_type: "olmoe",
        architecture: "OlmoeForCausalLM",
        names: WeightNames { moe: &["mlp"], experts: ["gate_proj", "up_proj", "down_proj"] },
        defaults: Defaults {
            vocab_size: 50_304,
            hidden_size: 2048,
            num_layers: 16,
            num_heads: 16,
            num_kv_heads: None,
            max_context: 4096,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            num_experts: 64,
            top_k: 8,
            expert_width: 2048,
            dense_width: 0,
            bos_token_id: None,
            eos_token_id: Some(50_279),
        },
        expert_width_field: "intermediate_size",
        placement: Placement::Every,
        bias: Bias::AttentionField,
        qk_norm: QkNorm::Full,
        clip_qkv: true,
        renorm: Renorm::Field,
        window: Window::Never,
        shared_expert_width: None,
    },
    Family {
        model_type: "qwen2_moe",
        architecture: "Qwen2MoeForCausalLM",
        names: WeightNames { moe: &["mlp"], experts: ["gate_proj", "up_proj", "down_proj"] },
        defaults: Defaults {
            vocab_size: 151_936,
            hidden_size: 2048,
            num_layers: 24,
            num_heads: 16,
            num_kv_heads: Some(16),
            max_context: 32_768,
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            num_experts: 60,
            top_k: 4,
            expert_width: 1408,
            dense_width: 5632,
            bos_token_id: None,
            eos_token_id: None,
        },
        expert_width_field: "moe_intermediate_size",
        placement: Placement::Sparse,
        bias: Bias::QkvField,
        qk_norm: QkNorm::None,
        clip_qkv: false,
        renorm: Renorm::Field,
        window: Window::PerLayer,
        shared_expert_width: Some(5632),
    },
    Family {
        model_type: "qwen3_moe",
        architecture: "Qwen3MoeForCausalLM",
        names: WeightNames { moe: &["mlp"], experts: ["gate_proj", "up_proj", "down_proj"] },
        defaults: Defaults {
            vocab_size: 151_936,
            hidden_size: 2048,
            num_layers: 24,
            num_heads: 32,
            num_kv_heads: Some(4),
            max_context: 32_768,
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            num_experts: 128,
            top_k: 8,
            expert_width: 768,
            dense_width: 6144,
            bos_token_id: None,
            eos_token_id: None,
        },
        expert_width_field: "moe_intermediate_size",
        placement: Placement::Sparse,
        bias: Bias::AttentionField,
        qk_norm: QkNorm::PerHead,
        clip_qkv: false,
        renorm: Renorm::Field,
        window: Window::Switched,
        shared_expert_width: None,
    },
];

/// Fields of other families (or of other software) that would change the function, with the only values that do not.
/// A field that the family at hand reads by itself is not looked up here.
pub(super) const NEUTRAL: &[(&str, &[&str])] = &[
    ("quantization_config", &["null"]),
    ("compression_config", &["null"]),
    ("attention_bias", &["false"]),
    ("qkv_bias", &["false"]),
    ("mlp_bias", &["false"]),
    ("lm_head_bias", &["false"]),
    ("router_bias", &["false"]),
    ("clip_qkv", &["null"]),
    ("sliding_window", &["null"]),
    ("use_sliding_window", &["false", "null"]),
    ("decoder_sparse_step", &["1"]),
    ("mlp_only_layers", &["[]", "null"]),
    ("mlp_layer_types", &["null"]),
    ("first_k_dense_replace", &["0"]),
    ("moe_layer_freq", &["1"]),
    ("norm_topk_prob", &["true"]),
    ("shared_expert_intermediate_size", &["0", "null"]),
    ("n_shared_experts", &["0", "null"]),
    ("num_shared_experts", &["0", "null"]),
    ("routed_scaling_factor", &["1", "1.0", "null"]),
    ("n_group", &["1", "null"]),
    ("topk_group", &["1", "null"]),
    ("scoring_func", &["\"softmax\"", "null"]),
    ("topk_method", &["\"greedy\"", "null"]),
    ("embedding_multiplier", &["1", "1.0", "null"]),
    ("residual_multiplier", &["1", "1.0", "null"]),
    ("attention_multiplier", &["null"]),
    ("logits_scaling", &["1", "1.0", "null"]),
    ("final_logit_softcapping", &["null"]),
    ("attn_logit_softcapping", &["null"]),
    ("num_nextn_predict_layers", &["0", "null"]),
    ("per_layer_config", &["null"]),
    ("is_encoder_decoder", &["false"]),
];

/// Fields that say nothing about inference.
pub(super) const HARMLESS: &[&str] = &[
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "attention_dropout",
    "attn_dropout",
    "chunk_size_feed_forward",
    "dtype",
    "finetuning_task",
    "gradient_checkpointing",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "router_z_loss_coef",
    "sep_token_id",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "unk_token_id",
    "use_bfloat16",
    "use_cache",
];
