//! config.json to spec, without files. What needs a folder is tested in `tests/it/checkpoint.rs`.

use std::path::Path;

use serde_json::{Value, json};

use super::{CheckpointError, RoutingBlock, config::Config};
use crate::{
    model::{FeedForwardSpec, ModelSpec, QkNorm, ReferenceRouting, RopeScaling},
    moe::policy::WeightForm,
};

/// Small sizes, as the family's released files name them.
fn config(family: &str) -> Value {
    let common = json!({
        "model_type": family, "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 64, "num_experts_per_tok": 2, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 5e4, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    });
    let own = match family {
        "mixtral" => json!({ "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "intermediate_size": 24 }),
        "olmoe" => json!({ "architectures": ["OlmoeForCausalLM"], "num_experts": 4, "intermediate_size": 24, "norm_topk_prob": false }),
        "qwen2_moe" => json!({ "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 4, "intermediate_size": 40,
            "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20, "norm_topk_prob": false }),
        _ => json!({ "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "intermediate_size": 40,
            "moe_intermediate_size": 24, "norm_topk_prob": true, "head_dim": 8 }),
    };
    patched(common, own)
}

fn patched(mut value: Value, patch: Value) -> Value {
    let Value::Object(patch) = patch else { panic!("a patch is an object") };
    value.as_object_mut().expect("an object").extend(patch);
    value
}

fn parse(value: &Value) -> Result<Config, CheckpointError> {
    Config::parse(Path::new("dir/config.json"), value)
}

fn spec(family: &str, patch: Value) -> ModelSpec {
    parse(&patched(config(family), patch)).unwrap_or_else(|e| panic!("{family}: {e}")).spec
}

fn error(family: &str, patch: Value) -> String {
    match parse(&patched(config(family), patch.clone())) {
        Ok(_) => panic!("{family} with {patch} was accepted"),
        Err(e) => e.to_string(),
    }
}

fn windows(spec: &ModelSpec) -> Vec<Option<usize>> {
    spec.layers.iter().map(|layer| layer.sliding_window).collect()
}

fn routed(spec: &ModelSpec) -> Vec<usize> {
    spec.moe_layers().map(|(index, _)| index).collect()
}

fn serving(spec: &ModelSpec) -> Vec<(usize, WeightForm)> {
    spec.moe_layers().map(|(_, moe)| (moe.top_k, moe.weight_form)).collect()
}

#[test]
fn families_differ_where_they_should() {
    let mixtral = spec("mixtral", json!({ "num_key_value_heads": 2, "sliding_window": 8 }));
    assert_eq!((mixtral.num_kv_heads, mixtral.head_dim, mixtral.qk_norm), (2, 4, QkNorm::None));
    assert_eq!((windows(&mixtral), serving(&mixtral)), (vec![Some(8); 4], vec![(2, WeightForm::Renorm); 4]));

    let olmoe = spec("olmoe", json!({ "clip_qkv": 8.0, "attention_bias": true }));
    assert_eq!((olmoe.qk_norm, olmoe.clip_qkv, olmoe.qkv_bias, olmoe.out_bias), (QkNorm::Full, Some(8.0), true, true));
    assert_eq!(serving(&olmoe), [(2, WeightForm::Raw); 4]);

    let qwen2 = spec("qwen2_moe", json!({}));
    assert_eq!((qwen2.qkv_bias, qwen2.out_bias, qwen2.qk_norm), (true, false, QkNorm::None));
    assert!(qwen2.moe_layers().all(|(_, moe)| moe.shared_expert_width == Some(20) && moe.expert_width == 24));
    assert!(!spec("qwen2_moe", json!({ "qkv_bias": false })).qkv_bias);

    let qwen3 = spec("qwen3_moe", json!({ "decoder_sparse_step": 2, "mlp_only_layers": [3] }));
    assert_eq!((qwen3.head_dim, qwen3.qk_norm, routed(&qwen3)), (8, QkNorm::PerHead, vec![1]));
    assert_eq!(qwen3.layers[0].feed_forward, FeedForwardSpec::Dense { width: 40 });
    assert_eq!(serving(&qwen3), [(2, WeightForm::Renorm)]);
    assert_eq!(serving(&spec("qwen3_moe", json!({ "norm_topk_prob": null })))[0].1, WeightForm::Raw);
    assert_eq!(qwen3.reference, ReferenceRouting::OwnTopK { assumed: true });
}

#[test]
fn absent_fields_have_the_defaults_of_the_family() {
    for (family, sizes, theta, kv_heads) in [
        ("mixtral", (32_000, 4096, 32, 8, 2), 1e6, 8),
        ("olmoe", (50_304, 2048, 16, 64, 8), 1e4, 16),
        ("qwen2_moe", (151_936, 2048, 24, 60, 4), 1e4, 16),
        ("qwen3_moe", (151_936, 2048, 24, 128, 8), 1e4, 4),
    ] {
        let spec = parse(&json!({ "model_type": family })).unwrap_or_else(|e| panic!("{family}: {e}")).spec;
        let moe = spec.moe_layers().next().expect("routed layers").1.clone();
        assert_eq!((spec.vocab_size, spec.hidden_size, spec.layers.len(), moe.num_experts, moe.top_k), sizes, "{family}");
        assert_eq!((spec.rope.theta, spec.num_kv_heads), (theta, kv_heads), "{family}");
    }
}

#[test]
fn the_number_of_experts_goes_by_three_names() {
    for family in ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"] {
        for name in ["num_experts", "num_local_experts", "n_routed_experts"] {
            let mut value = patched(config(family), json!({ "num_experts": null, "num_local_experts": null }));
            value = patched(value, json!({ name: 6 }));
            let spec = parse(&value).unwrap_or_else(|e| panic!("{family} {name}: {e}")).spec;
            assert!(spec.moe_layers().all(|(_, moe)| moe.num_experts == 6));
        }
    }
}

#[test]
fn sliding_windows_follow_the_family() {
    let on = |patch| patched(json!({ "use_sliding_window": true, "sliding_window": 8 }), patch);
    // Mixtral has no switch, Qwen has one; the default width is 4096.
    assert_eq!(windows(&spec("mixtral", json!({}))), [None; 4]);
    assert_eq!(windows(&spec("qwen3_moe", json!({ "sliding_window": 8 }))), [None; 4]);
    assert_eq!(windows(&spec("qwen3_moe", on(json!({})))), [Some(8); 4]);
    assert_eq!(windows(&spec("qwen3_moe", json!({ "use_sliding_window": true }))), [Some(4096); 4]);
    // Qwen2: every other layer below max_window_layers, or as layer_types says.
    assert_eq!(windows(&spec("qwen2_moe", on(json!({})))), [Some(8), None, Some(8), None]);
    assert_eq!(windows(&spec("qwen2_moe", on(json!({ "max_window_layers": 2 })))), [Some(8), None, None, None]);
    let types = json!({ "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"] });
    assert_eq!(windows(&spec("qwen2_moe", on(types))), [None, Some(8), None, None]);
}

#[test]
fn rope_parameters_in_both_generations() {
    let scaling = |patch| spec("qwen3_moe", patch).rope;
    let plain = scaling(json!({}));
    assert_eq!((plain.theta, plain.scaling), (5e4, RopeScaling::None));
    // A theta inside wins over one at the top; an old name is as good as a new one.
    let inside = scaling(json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 7e5 } }));
    assert_eq!((inside.theta, inside.scaling), (7e5, RopeScaling::None));
    let linear = scaling(json!({ "rope_scaling": { "type": "linear", "factor": 2 } }));
    assert_eq!((linear.theta, linear.scaling), (5e4, RopeScaling::Linear { factor: 2.0 }));
    let yarn = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16 });
    let expected = RopeScaling::Yarn {
        factor: 4.0,
        original_max_position: 16,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
        truncate: true,
    };
    assert_eq!(scaling(json!({ "rope_scaling": yarn })).scaling, expected);
    assert_eq!(spec("qwen3_moe", json!({ "rope_scaling": yarn })).max_context, 64);
    let mscale = patched(yarn, json!({ "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": false, "beta_fast": 16 }));
    let RopeScaling::Yarn { attention_factor: Some(factor), truncate: false, beta_fast: 16.0, .. } =
        scaling(json!({ "rope_parameters": mscale })).scaling
    else {
        panic!("a stated truncate, beta_fast and a derived attention_factor")
    };
    assert!((factor - (0.1 * 4f64.ln() + 1.0) / (0.05 * 4f64.ln() + 1.0)).abs() < 1e-12);
    let llama3 = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0 });
    let expected = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 64 };
    assert_eq!(scaling(json!({ "rope_scaling": llama3 })).scaling, expected);
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    for (family, patch, parts) in [
        ("mixtral", json!({ "model_type": "deepseek_v3" }), &["model_type", "deepseek_v3", "mixtral, olmoe, qwen2_moe, qwen3_moe"][..]),
        ("mixtral", json!({ "model_type": null }), &["model_type", "null"]),
        ("mixtral", json!({ "architectures": ["MixtralForSequenceClassification"] }), &["architectures", "MixtralForCausalLM"]),
        ("mixtral", json!({ "hidden_act": "gelu" }), &["hidden_act", "gelu", "silu"]),
        ("mixtral", json!({ "quantization_config": { "quant_method": "gptq" } }), &["quantization_config", "gptq"]),
        ("mixtral", json!({ "attention_bias": true }), &["attention_bias", "true", "mixtral"]),
        ("mixtral", json!({ "norm_topk_prob": false }), &["norm_topk_prob"]),
        ("mixtral", json!({ "n_shared_experts": 1 }), &["n_shared_experts"]),
        ("mixtral", json!({ "routed_scaling_factor": 2.5 }), &["routed_scaling_factor", "2.5"]),
        ("mixtral", json!({ "clip_qkv": 8.0 }), &["clip_qkv"]),
        ("mixtral", json!({ "mlp_only_layers": [0] }), &["mlp_only_layers"]),
        ("olmoe", json!({ "sliding_window": 8 }), &["sliding_window"]),
        ("olmoe", json!({ "head_dim": 8 }), &["head_dim", "olmoe"]),
        ("mixtral", json!({ "partial_rotary_factor": 0.5 }), &["partial_rotary_factor", "0.5"]),
        ("mixtral", json!({ "rope_parameters": { "rope_type": "default", "partial_rotary_factor": 0.5 } }), &["rope_parameters.partial"]),
        ("mixtral", json!({ "rope_scaling": { "rope_type": "dynamic", "factor": 2.0 } }), &["rope_scaling.rope_type", "dynamic", "yarn"]),
        ("mixtral", json!({ "rope_scaling": { "type": "longrope" } }), &["rope_scaling.type", "longrope"]),
        (
            "mixtral",
            json!({ "layer_types": ["full_attention", "full_attention", "full_attention", "sliding_attention"] }),
            &["layer_types"],
        ),
        ("qwen2_moe", json!({ "attention_bias": true }), &["attention_bias"]),
        ("qwen3_moe", json!({ "decoder_sparse_step": 9 }), &["decoder_sparse_step", "at least one layer"]),
    ] {
        let message = error(family, patch.clone());
        assert!(message.contains("dir/config.json"), "{patch}: {message}");
        parts.iter().for_each(|part| assert!(message.contains(part), "{patch}: {message}"));
        assert!(message.contains("not supported") || patch["model_type"].is_null(), "{patch}: {message}");
    }
}

#[test]
fn values_that_cannot_be_right_are_refused_by_name() {
    for (family, patch, parts) in [
        ("mixtral", json!({ "hidden_size": 0 }), &["hidden_size is 0", "from 1"][..]),
        ("mixtral", json!({ "hidden_size": -16 }), &["hidden_size is -16"]),
        ("mixtral", json!({ "hidden_size": 16.5 }), &["hidden_size is 16.5"]),
        ("mixtral", json!({ "hidden_size": "16" }), &["hidden_size is \"16\""]),
        ("mixtral", json!({ "hidden_size": 18_446_744_073_709_551_615u64 }), &["hidden_size is 18446744073709551615"]),
        ("mixtral", json!({ "hidden_size": 2_000_000_000, "vocab_size": 2_000_000_000 }), &["parameters", "at most"]),
        ("mixtral", json!({ "num_hidden_layers": 100_000 }), &["num_hidden_layers", "4096"]),
        ("mixtral", json!({ "num_local_experts": 100_000 }), &["num_local_experts", "65536"]),
        ("mixtral", json!({ "num_hidden_layers": 4000, "num_local_experts": 60_000 }), &["num_hidden_layers", "experts in all layers"]),
        ("mixtral", json!({ "num_hidden_layers": 3, "num_local_experts": 65_536 }), &["num_hidden_layers is 3", "experts in all layers"]),
        ("mixtral", json!({ "num_key_value_heads": 3 }), &["num_key_value_heads is 3", "divisor"]),
        ("mixtral", json!({ "num_attention_heads": 3, "num_key_value_heads": 1 }), &["num_attention_heads is 3", "head_dim"]),
        ("qwen3_moe", json!({ "head_dim": 7 }), &["head_dim is 7", "even"]),
        ("mixtral", json!({ "num_experts_per_tok": 5 }), &["num_experts_per_tok is 5", "number of experts, 4"]),
        ("mixtral", json!({ "num_experts_per_tok": 0 }), &["num_experts_per_tok is 0"]),
        ("mixtral", json!({ "num_experts": 5 }), &["num_experts is 5"]),
        ("mixtral", json!({ "rms_norm_eps": 0 }), &["rms_norm_eps is 0"]),
        ("mixtral", json!({ "rms_norm_eps": -1e-5 }), &["rms_norm_eps"]),
        ("mixtral", json!({ "sliding_window": 0 }), &["sliding_window is 0"]),
        ("mixtral", json!({ "rope_theta": 0 }), &["rope_theta is 0"]),
        ("mixtral", json!({ "rope_theta": 1e-320 }), &["rope_theta is", "a number from 1"]),
        ("mixtral", json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 0.5 } }), &["rope_parameters.rope_theta is 0.5"]),
        ("mixtral", json!({ "rms_norm_eps": 1e308 }), &["rms_norm_eps is 1e+308"]),
        ("olmoe", json!({ "clip_qkv": 1e-60 }), &["clip_qkv is 1e-60"]),
        (
            "mixtral",
            json!({ "rope_scaling": { "type": "yarn", "factor": 2.0, "attention_factor": 1e308 } }),
            &["attention_factor is 1e+308"],
        ),
        ("mixtral", json!({ "rope_scaling": { "type": "yarn", "factor": 2.0, "mscale": 1e308, "mscale_all_dim": 1.0 } }), &["mscale is"]),
        ("mixtral", json!({ "rope_scaling": { "type": "linear" } }), &["rope_scaling.factor is absent"]),
        ("mixtral", json!({ "rope_scaling": { "type": "linear", "factor": 0.5 } }), &["rope_scaling.factor is 0.5"]),
        ("mixtral", json!({ "rope_scaling": { "type": "yarn" } }), &["rope_scaling.factor is absent"]),
        ("mixtral", json!({ "rope_scaling": { "type": "yarn", "factor": 2.0, "beta_fast": 0.5 } }), &["beta_fast"]),
        (
            "mixtral",
            json!({ "rope_parameters": { "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0 } }),
            &["rope_parameters.high_freq_factor"],
        ),
        ("mixtral", json!({ "rope_scaling": [2] }), &["rope_scaling is [2]", "an object"]),
        ("mixtral", json!({ "tie_word_embeddings": "no" }), &["tie_word_embeddings"]),
        ("mixtral", json!({ "eos_token_id": "two" }), &["eos_token_id"]),
        ("qwen3_moe", json!({ "decoder_sparse_step": 0 }), &["decoder_sparse_step is 0"]),
        ("qwen3_moe", json!({ "mlp_only_layers": [4] }), &["mlp_only_layers is [4]", "0 to 3"]),
        ("qwen3_moe", json!({ "mlp_only_layers": [-1] }), &["mlp_only_layers is [-1]"]),
        ("qwen3_moe", json!({ "use_sliding_window": true, "sliding_window": null }), &["sliding_window is null"]),
        ("qwen2_moe", json!({ "layer_types": ["full_attention"] }), &["layer_types"]),
        (
            "qwen2_moe",
            json!({ "layer_types": ["full_attention", "full_attention", "full_attention", "linear_attention"] }),
            &["layer_types"],
        ),
        (
            "qwen2_moe",
            json!({ "layer_types": ["full_attention", "full_attention", "full_attention", "sliding_attention"] }),
            &["layer_types", "use_sliding_window is false"],
        ),
        ("qwen2_moe", json!({ "shared_expert_intermediate_size": 0 }), &["shared_expert_intermediate_size is 0"]),
    ] {
        let message = error(family, patch.clone());
        parts.iter().for_each(|part| assert!(message.contains(part), "{patch}: {message}"));
    }
}

#[test]
fn the_routing_block_decides_serving_reference_and_estimator() {
    let block = json!({
        "version": 1,
        "train": { "estimator": "gumbel_soft", "k": null, "score": "softmax", "param": null,
            "temperature": { "schedule": "exp", "init": 2.0, "final": 0.3, "at_save": 0.3 },
            "noise": { "kind": "gumbel", "scale_at_save": 1.0 }, "weight_form": "raw",
            "loss": { "balance": "switch", "convention": "normalised", "balance_coef": 0.01, "z_coef": 0.001, "bias_rate": 0.0 },
            "capacity_factor": null, "steps": 12000, "frozen_router": false },
        "reference": { "mode": "soft", "temperature": 0.3, "noise": "none" },
        "serve": { "mode": "hard", "k": 1, "weight_form": "unit", "order": "softmax_topk", "tie_break": "lowest_index",
            "dtype": "f32", "dropless": true },
        "per_layer": { "3": { "serve": { "k": 2, "weight_form": "renorm" } } },
        "fidelity": { "corpus_sha256": "ab", "tokens": 65536, "kl": 0.013, "top1_agree": 0.981, "ppl_gap": 0.004,
            "floor_kl": 0.0006, "measured_by": "hardmax 0.1.0" },
    });
    let config = parse(&patched(config("mixtral"), json!({ "routing": block }))).expect("the block of the documentation");
    assert_eq!((config.spec.reference, config.spec.estimator.as_str()), (ReferenceRouting::Soft { temperature: 0.3 }, "gumbel_soft"));
    let unit = (1, WeightForm::Unit);
    assert_eq!(serving(&config.spec), [unit, unit, unit, (2, WeightForm::Renorm)]);
    // Written and read again it is the same, null for null.
    assert_eq!(serde_json::to_value(config.routing.expect("a block")).expect("plain values"), block);
}

#[test]
fn a_hard_reference_is_the_own_one_only_where_they_agree() {
    let reference = |routing: Value| spec("mixtral", json!({ "routing": routing })).reference;
    let hard = |k: usize| json!({ "mode": "hard", "k": k });
    assert_eq!(reference(json!({ "version": 1 })), ReferenceRouting::OwnTopK { assumed: true });
    assert_eq!(reference(json!({ "version": 1, "reference": { "mode": "hard" } })), ReferenceRouting::OwnTopK { assumed: false });
    assert_eq!(reference(json!({ "version": 1, "reference": hard(2) })), ReferenceRouting::OwnTopK { assumed: false });
    assert_eq!(reference(json!({ "version": 1, "reference": hard(2), "serve": { "k": 1 } })), ReferenceRouting::TopK { k: 2 });
    let folded = json!({ "version": 1, "train": { "estimator": "soft", "temperature": { "at_save": 0.3, "folded": true } },
        "reference": { "mode": "soft", "temperature": 1.0 } });
    assert_eq!(reference(folded), ReferenceRouting::Soft { temperature: 1.0 });
}

#[test]
fn a_broken_routing_block_is_refused_by_path() {
    let block = |patch| patched(json!({ "version": 1 }), patch);
    for (routing, parts) in [
        (json!([]), &["routing is []", "an object"][..]),
        (json!({}), &["routing.version is absent"]),
        (json!({ "version": 2 }), &["routing.version is 2", "not supported"]),
        (json!({ "version": "1" }), &["routing.version"]),
        (block(json!({ "serve": { "k": 5 } })), &["routing.serve.k is 5", "number of experts, 4"]),
        (block(json!({ "serve": { "k": 0 } })), &["routing.serve.k is 0"]),
        (block(json!({ "serve": { "weight_form": "softest" } })), &["routing.serve.weight_form", "\"renorm\""]),
        (block(json!({ "serve": { "mode": "soft" } })), &["routing.serve.mode", "\"hard\""]),
        (block(json!({ "serve": { "order": "topk_softmax" } })), &["routing.serve.order"]),
        (block(json!({ "serve": { "tie_break": "random" } })), &["routing.serve.tie_break"]),
        (block(json!({ "serve": { "dtype": "bf16" } })), &["routing.serve.dtype"]),
        (block(json!({ "serve": { "dropless": false } })), &["routing.serve.dropless"]),
        (block(json!({ "reference": {} })), &["routing.reference.mode is absent"]),
        (block(json!({ "reference": { "mode": "soft" } })), &["routing.reference.temperature is absent"]),
        (block(json!({ "reference": { "mode": "soft", "temperature": 0 } })), &["routing.reference.temperature is 0"]),
        (block(json!({ "reference": { "mode": "soft", "temperature": 1e-60 } })), &["routing.reference.temperature"]),
        (block(json!({ "reference": { "mode": "hard", "k": 9 } })), &["routing.reference.k is 9"]),
        (block(json!({ "reference": { "mode": "soft", "temperature": 1, "noise": "gumbel" } })), &["routing.reference.noise"]),
        (block(json!({ "train": { "score": "sigmoid" } })), &["routing.train.score", "sigmoid"]),
        (block(json!({ "train": { "temperature": { "final": -1 } } })), &["routing.train.temperature.final is -1"]),
        (
            block(json!({ "train": { "temperature": { "folded": true } }, "reference": { "mode": "soft", "temperature": 0.3 } })),
            &["routing.reference.temperature is 0.3", "folded"],
        ),
        (block(json!({ "per_layer": { "one": {} } })), &["routing.per_layer.one", "layer index"]),
        (block(json!({ "per_layer": { "01": {} } })), &["routing.per_layer.01", "layer index"]),
        (block(json!({ "per_layer": { "4": {} } })), &["routing.per_layer.4", "0 to 3"]),
        (block(json!({ "per_layer": { "1": { "serve": { "k": 7 } } } })), &["routing.per_layer.1.serve.k is 7"]),
    ] {
        let message = error("mixtral", json!({ "routing": routing }));
        parts.iter().for_each(|part| assert!(message.contains(part), "{routing}: {message}"));
    }
    let dense = error("qwen3_moe", json!({ "mlp_only_layers": [1], "routing": block(json!({ "per_layer": { "1": {} } })) }));
    assert!(dense.contains("routing.per_layer.1") && dense.contains("dense"), "{dense}");
    assert_eq!(RoutingBlock::default().version, RoutingBlock::VERSION);
}

#[test]
fn unknown_keys_are_warned_of_once_and_harmless_ones_are_not() {
    let captured = capture(|| {
        spec("mixtral", json!({ "use_cache": true, "flux_capacitor": 1, "routing": { "version": 1, "serve": { "kk": 1 } } }));
    });
    assert!(captured.contains("flux_capacitor") && captured.contains("routing.serve.kk"), "{captured}");
    assert!(!captured.contains("use_cache") && !captured.contains("torch_dtype"), "{captured}");
}

/// What `work` logs.
fn capture(work: impl FnOnce()) -> String {
    #[derive(Clone, Default)]
    struct Sink(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);
    impl std::io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("no panic while logging").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let sink = Sink::default();
    let writer = sink.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
    tracing::subscriber::with_default(subscriber, work);
    String::from_utf8_lossy(&sink.0.lock().expect("no panic while logging")).into_owned()
}
