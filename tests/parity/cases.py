"""The checkpoints under test: each family, each option of a family, each way to write a config, each file layout.

A config here is what config.json holds, in the words of the released checkpoints (`rope_theta` and `rope_scaling` at
the top level) or of newer exports (`rope_parameters`).
"""

from __future__ import annotations

from checkpoints import Case

VOCABULARY = 80
HIDDEN = 24


def config(model_type: str, architecture: str, **more) -> dict:
    base = {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "max_position_embeddings": 128,
        "model_type": model_type,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }
    return {key: value for key, value in (base | more).items() if value is not ...}


def mixtral(**more) -> dict:
    return config("mixtral", "MixtralForCausalLM", **{
        "intermediate_size": 8, "num_experts_per_tok": 2, "num_local_experts": 5, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    } | more)


def olmoe(**more) -> dict:
    return config("olmoe", "OlmoeForCausalLM", **{
        "attention_bias": False, "clip_qkv": None, "intermediate_size": 8, "norm_topk_prob": False,
        "num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 4, "pad_token_id": 1,
        "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
    } | more)


def qwen2(**more) -> dict:
    return config("qwen2_moe", "Qwen2MoeForCausalLM", **{
        "decoder_sparse_step": 1, "intermediate_size": 28, "max_window_layers": 2, "mlp_only_layers": [],
        "moe_intermediate_size": 8, "norm_topk_prob": False, "num_experts": 6, "num_experts_per_tok": 3,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 14, "sliding_window": 32768, "use_sliding_window": False,
    } | more)


def qwen3(**more) -> dict:
    return config("qwen3_moe", "Qwen3MoeForCausalLM", **{
        "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 8, "intermediate_size": 28,
        "max_window_layers": 2, "mlp_only_layers": [], "moe_intermediate_size": 8, "norm_topk_prob": True,
        "num_experts": 6, "num_experts_per_tok": 3, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False,
    } | more)


CASES = [
    Case("mixtral_gqa", mixtral(), differs=(("rope_theta", 1e4), ("rms_norm_eps", 0.1))),
    Case(
        "mixtral_fused_sliding",
        # As transformers 5 writes it.
        mixtral(sliding_window=7, head_dim=8, rope_theta=..., dtype="float32",
                rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}),
        fused=True,
        differs=(("sliding_window", None), ("sliding_window", 6), ("rope_parameters.rope_theta", 1e6)),
    ),
    Case("mixtral_odd_heads", mixtral(num_attention_heads=3, num_key_value_heads=1, head_dim=10, num_local_experts=5)),
    Case("mixtral_top1", mixtral(num_experts_per_tok=1, num_key_value_heads=4, num_local_experts=4)),
    Case(
        "mixtral_llama3_rope_sharded",
        mixtral(num_attention_heads=2, num_key_value_heads=1, rope_theta=10000.0, max_position_embeddings=256,
                rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 32}),
        shard="20KB",
        differs=(("rope_scaling", None), ("rope_scaling.low_freq_factor", 2.0)),
    ),
    Case("mixtral_bf16", mixtral(num_local_experts=8), dtype="bfloat16"),
    Case("olmoe_clip", olmoe(clip_qkv=0.9), differs=(("clip_qkv", None), ("norm_topk_prob", True))),
    Case(
        "olmoe_norm_bias_fused",
        olmoe(norm_topk_prob=True, attention_bias=True, num_key_value_heads=2,
              rope_scaling={"type": "linear", "factor": 4.0}),
        fused=True,
        differs=(("rope_scaling", None), ("norm_topk_prob", False)),
    ),
    Case("olmoe_f16_sharded", olmoe(num_experts_per_tok=2), dtype="float16", shard="12KB"),
    Case(
        "qwen2_shared_sparse_step",
        qwen2(num_hidden_layers=4, num_experts=5, decoder_sparse_step=2, use_sliding_window=True, sliding_window=5,
              max_window_layers=3),
        differs=(("use_sliding_window", False), ("max_window_layers", 2), ("norm_topk_prob", True)),
    ),
    Case(
        "qwen2_norm_fused",
        qwen2(norm_topk_prob=True, num_attention_heads=5, num_key_value_heads=1, hidden_size=30, qkv_bias=False,
              use_sliding_window=True, sliding_window=6, layer_types=["full_attention", "sliding_attention"],
              rope_theta=..., rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}),
        fused=True,
        differs=(("norm_topk_prob", False), ("layer_types", ["full_attention", "full_attention"])),
    ),
    Case("qwen2_bf16", qwen2(num_key_value_heads=4), dtype="bfloat16"),
    Case(
        "qwen3_mlp_only",
        qwen3(mlp_only_layers=[0], num_hidden_layers=3),
        differs=(("norm_topk_prob", False), ("rope_theta", 1e4)),
    ),
    Case(
        "qwen3_yarn_tied",
        qwen3(norm_topk_prob=False, tie_word_embeddings=True, head_dim=12, num_key_value_heads=1,
              rope_theta=10000.0, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
              max_position_embeddings=1024),
        differs=(("rope_scaling", None), ("rope_scaling.original_max_position_embeddings", 1024),
                 ("norm_topk_prob", True)),
    ),
    Case(
        "qwen3_fused_sliding_bias",
        # As transformers 5 writes it: `num_local_experts`, `rope_parameters`.
        qwen3(num_experts=..., num_local_experts=6, attention_bias=True, use_sliding_window=True, sliding_window=9,
              rope_theta=..., rope_scaling=...,
              rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 16.0,
                               "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False,
                               "original_max_position_embeddings": 256}),
        fused=True,
        differs=(("use_sliding_window", False), ("rope_parameters.attention_factor", None),
                 ("rope_parameters.truncate", True), ("rope_parameters.beta_fast", 32.0)),
    ),
    Case("qwen3_f16_fused", qwen3(norm_topk_prob=True, num_experts_per_tok=2), fused=True, dtype="float16"),
]
