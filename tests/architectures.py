"""Tiny models of mlx-lm's architectures, with random weights."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

# What mlx-lm's architectures call their sizes; each takes those that its ModelArgs has.
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "rope_traditional": False,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "rotary_pct": 0.5,
    "rotary_dim": 4,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "bias": False,
    "hidden_act": "silu",
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "layer_types": ["full_attention", "full_attention"],
    # gpt-2 and kin
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "n_ctx": 128,
    "n_inner": 48,
    "num_layers": 2,
    # mixtures
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "softmax",
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # state-space models
    "state_size": 8,
    "conv_kernel": 4,
    "expand": 2,
    "time_step_rank": 4,
    "use_conv_bias": True,
    # what some scale or cap by
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 3.0,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.2,
    "logits_scaling": 8.0,
    "logit_scale": 0.0625,
    "dim_model_base": 16,
    "scale_depth": 1.4,
    "scale_emb": 12,
    "use_qkv_bias": False,
}
_YARN = {
    "type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
}
UNTIED = {"tie_word_embeddings": False}
PLAIN = (
    "Klear afmoe cohere cohere2 deepseek dots1 ernie4_5 exaone falcon_h1 gemma gemma2 gemma3_text glm glm4 gpt2 "
    "gpt_bigcode gptj granite granitemoe helium hunyuan_v1_dense internlm2 internlm3 iquestloopcoder llama mamba mimo "
    "minicpm mixtral nanochat nemotron olmo2 olmoe phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 "
    "stablelm starcoder2 telechat3 youtu_llm"
)
# Name -> what differs from SIZES.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{name: {} for name in PLAIN.split()},
    "llama untied": UNTIED,
    "minicpm untied": UNTIED,
    "granite untied": UNTIED,
    "apertus": {"post_norm": False, "qk_norm": True},
    "deepseek_v2": {"rope_scaling": _YARN, "topk_method": "greedy"},
    "deepseek_v3": {"rope_scaling": _YARN, "topk_method": "noaux_tc"},
    "exaone4": {"sliding_window_pattern": "LG"},
    "glm4_moe": {"use_qk_norm": True},
    "gpt_neox": {"rotary_emb_base": 10000},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "time_step_limit": [0.0, 100.0]},
    "minicpm3": {
        "rope_scaling": {"original_max_position_embeddings": 64, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    },
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "rwkv7": {"a_low_rank_dim": 4, "v_low_rank_dim": 4, "gate_low_rank_dim": 4, "decay_low_rank_dim": 4},
}


def build(name: str) -> nn.Module:
    """A tiny model of an architecture of mlx-lm, with random weights."""
    module = importlib.import_module(f"mlx_lm.models.{name.split(' ')[0]}")
    known = {field.name for field in dataclasses.fields(module.ModelArgs)}
    settings = {k: v for k, v in SIZES.items() if k in known} | {"model_type": name} | ARCHITECTURES[name]
    model = module.Model(module.ModelArgs.from_dict(settings))
    scatter(model, seed=1)
    model.eval()
    return model


def scatter(model: nn.Module, seed: int, only: str = "") -> None:
    """Random values for matrices whose name holds `only` (heads and LoRA's B may be zero at first)."""
    key, leaves = mx.random.key(seed), []
    for name, value in sorted(tree_flatten(model.parameters())):
        key, now = mx.random.split(key)
        if value.ndim > 1 and only in name:
            leaves.append((name, 0.2 * mx.random.normal(value.shape, key=now)))
    model.update(tree_unflatten(leaves))
