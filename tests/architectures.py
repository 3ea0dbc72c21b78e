"""Tiny models of mlx-lm's architectures, with random weights."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_flatten, tree_unflatten

from mlxft.model.load import repaired

# What mlx-lm's architectures call their sizes; each takes those that its ModelArgs has.
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "num_vocab": 64,
    "vocab_size_per_layer_input": 64,
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
    "exaone4": {"sliding_window_pattern": "LG", "layer_types": ["sliding_attention", "full_attention"]},
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

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
_INDEX = {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 4, "topk_method": "noaux_tc"}
_LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "ffn_hidden_size": 48,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 16,
    "zero_expert_num": 1,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "num_layers": 2,
}
_MAMBA = {"mamba_d_conv": 4, "mamba_d_state": 8, "mamba_expand": 2}
_BAILING = {"num_shared_experts": 1, "layer_group_size": 2, "group_norm_size": 2}


_KIMI = {"kda_layers": [1], "full_attn_layers": [2], "num_heads": 4, "head_dim": 32, "short_conv_kernel_size": 4}
_GEMMA4 = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 8,
}
_LFM2 = {
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 32,
    "block_ff_dim": 48,
    "block_multiple_of": 16,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "layer_types": ["conv", "full_attention"],
}
_BLOCK = {
    "attention": {"n_heads_in_group": 2},
    "ffn": {"ffn_mult": 1.5},
}


def _text(name: str, **settings: Any) -> dict[str, Any]:
    """The settings of a model with a text model inside."""
    return {"text_config": {**SIZES, "model_type": name, **settings}}


# Of these only tests of every architecture build tiny ones.
MORE: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim": 32, "num_kv_reuse_layers": 1, "num_heads": 4, "num_kv_heads": 2, "num_layers": 3},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2, "tie_word_embeddings": False},
    "bailing_hybrid": _BAILING,
    "bailing_moe": {"num_shared_experts": 1, "first_k_dense_replace": 1},
    "bailing_moe_linear": _BAILING,
    "bailing_moe_v3": {},
    "dbrx": {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    },
    "deepseek_v32": _INDEX,
    "deepseek_v41": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone_moe": {"num_shared_experts": 1, "is_moe_layer": [False, True], "layer_types": ["full_attention"] * 2},
    "gear": {},
    "gemma3": _text("gemma3_text"),
    "gemma3n": _text(
        "gemma3n",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_local_base_freq=10000.0,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        altup_coef_clip=120.0,
        altup_correct_scale=False,
        altup_active_idx=0,
        laurel_rank=4,
    ),
    "gemma4": _text("gemma4_text", **_GEMMA4),
    "gemma4_text": _GEMMA4,
    "gemma4_text moe": {
        **_GEMMA4,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "glm4_moe_lite": {},
    "glm_moe_dsa": {**_INDEX, "rope_parameters": _ROPE},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 16,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_proj_bias": False,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
    },
    "hunyuan": {
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        **_MAMBA,
    },
    "kimi_k3": _text(
        "kimi_linear",
        hidden_act="situ",
        num_experts_per_token=2,
        num_shared_experts=1,
        first_k_dense_replace=1,
        attn_res_block_size=2,
        mla_use_output_gate=True,
        linear_attn_config=_KIMI,
    ),
    "kimi_linear": {
        "model_max_length": 128,
        "linear_attn_config": _KIMI,
    },
    "laguna": {},
    "lfm2": _LFM2,
    "lfm2-vl": _text("lfm2", **_LFM2),
    "lfm2_moe": {
        "use_expert_bias": True,
        "num_dense_layers": 1,
        "conv_bias": False,
        "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention"],
    },
    "lille-130m": {"block_size": 128, "n_kv_heads": 2, "n_embd": 128},
    "llama4_text": {"intermediate_size_mlp": 48, "no_rope_layers": [1, 0], "use_qk_norm": True},
    "llama4": _text(
        "llama4_text",
        num_experts_per_tok=1,
        num_hidden_layers=4,
        layer_types=["full_attention"] * 4,
        attention_chunk_size=16,
        interleave_moe_layer_step=1,
        intermediate_size_mlp=48,
        use_qk_norm=True,
    ),
    "kimi_k25": _text("deepseek_v3", rope_scaling=_YARN, topk_method="noaux_tc"),
    "kimi_vl": _text("deepseek_v3", rope_scaling=_YARN, topk_method="noaux_tc"),
    "mistral4": {"rope_parameters": {**_ROPE, **_YARN, "llama_4_scaling_beta": 0.1}},
    "nemotron-nas": {"block_configs": [_BLOCK, _BLOCK]},
    "pixtral": _text("llama"),
    "longcat_flash_ngram": {
        **_LONGCAT,
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 2,
        "emb_split_num": 2,
    },
    "longcat_flash": _LONGCAT,
    "mellum": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 4,
        "topk_method": "noaux_tc",
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "minimax": {"shared_intermediate_size": 16},
    "minimax_m3_vl": _text(
        "minimax_m3", dense_intermediate_size=48, shared_intermediate_size=16, mlp_layer_types=["dense", "sparse"]
    ),
    "ministral3": {
        "rope_parameters": {
            **_ROPE,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral3": _text("llama"),
    "muse_glimmer": {},
    "nanbeige": {},
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 8,
        "n_groups": 1,
        "num_hidden_layers": 4,
        "hybrid_override_pattern": "M*-E",
        "moe_shared_expert_intermediate_size": 16,
        "time_step_limit": (0.0, 100.0),
    },
    "olmo_hybrid": {
        **_LINEAR,
        "linear_allow_neg_eigval": True,
        "linear_num_key_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "openelm": {
        "num_transformer_layers": 2,
        "model_dim": 32,
        "ffn_dim_divisor": 16,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 2.0],
    },
    "phi3small": {
        "vocab_size": 100352,  # it sets logits of tokens by their number
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 48,
        "gegelu_limit": 20.0,
    },
    "phixtral": {"model_dim": 32, "num_heads": 4, "num_layers": 2, "rotary_dim": 4},
    "plamo": {"n_shared_head": 2},
    "plamo2": {},
    "plamo3": {},
    "qwen": {"kv_channels": 8},
    "qwen2_vl": {**SIZES, **_text("qwen2")},
    "qwen3_5": _text("qwen3_5", **_LINEAR, full_attention_interval=2, rope_parameters=_ROPE),
    "qwen3_5_moe": _text("qwen3_5_moe", **_LINEAR, full_attention_interval=2, rope_parameters=_ROPE),
    "qwen3_next": {**_LINEAR, "full_attention_interval": 2},
    "qwen3_vl": _text("qwen3_vl"),
    "qwen3_vl_moe": _text("qwen3_vl_moe", **UNTIED),  # mlx-lm 0.32 reads no other
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
    },
    "solar_open": {},
    "spark2_5": {"rope_parameters": {"full_attention": _ROPE}, "hidden_act": "gelu"},
    "step3p5": {
        "num_attention_groups": 2,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 16,
        "moe_layers_enum": "1",
    },
    "talkie": {},
}

# Which of mlx-lm's are not built, and why.
NOT = {
    "bitnet": "its layers are a Metal kernel over packed weights, which has no gradient and which LoRA cannot wrap",
    "muse_spark": "its norms, positions and routing are Metal kernels without a gradient",
    "olmo": "mlx-lm ends the process where the package ai2-olmo is not installed",
    "prism_hadamard_qwen35": "its packed layers rotate their input, and LoRA cannot wrap them; else it is qwen3_5",
}


def names() -> list[str]:
    """Every module of mlx-lm that has an architecture; none is imported, for olmo's ends the process."""
    found = sorted(Path(mlx_lm.models.__path__[0]).glob("*.py"))
    return [f.stem for f in found if {"Model", "ModelArgs"} <= set(re.findall(r"\w+", f.read_text("utf-8")))]


def settings(name: str, **sizes: Any) -> dict[str, Any]:
    """config.json of a tiny model of an architecture of mlx-lm; `sizes` beat those of all."""
    module = importlib.import_module(f"mlx_lm.models.{name.split(' ')[0]}")
    known = {field.name for field in dataclasses.fields(module.ModelArgs)}
    own = {**MORE, **ARCHITECTURES}[name]
    if "text_config" in own:
        own = own | {"text_config": own["text_config"] | sizes}
    return {k: v for k, v in (SIZES | sizes).items() if k in known} | {"model_type": name.split(" ")[0]} | own


def build(name: str, **sizes: Any) -> nn.Module:
    """A tiny model of these `settings`, with random weights."""
    module = importlib.import_module(f"mlx_lm.models.{name.split(' ')[0]}")
    model = module.Model(module.ModelArgs.from_dict(settings(name, **sizes)))
    scatter(repaired(model), seed=1)
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
