"""A config.json's hyper-parameters as the metadata of a .gguf file, and the tensors that belong to the rope."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlxft.errors import ExportError
from mlxft.model.gguf_config import llama3_divisors
from mlxft.model.gguf_names import (
    ARCHITECTURES,
    GEMMA_SCALED_BY_WIDTH,
    MODEL_TYPES,
    ROPE_FREQS,
    ROPE_LONG,
    ROPE_SHORT,
    Architecture,
)

Get = Callable[..., Any]  # (name, default)
# Whose rope llama.cpp scales by each rule.
_SCALABLE = {
    "linear": ("llama", "qwen2", "qwen3", "gemma3"),
    "llama3": ("llama",),
    "yarn": ("llama", "qwen2", "qwen3"),
    "longrope": ("phi3",),
}


def family(config: dict[str, Any]) -> Architecture:
    """The family that a config belongs to.

    Raises:
        ExportError: not one that is written as .gguf here.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ExportError(
            f"architecture {kind!r} is not written as .gguf, only {', '.join(MODEL_TYPES)}; use the fused folder "
            "(mlxft fuse), which mlx-lm and LM Studio load, and llama.cpp's own convert_hf_to_gguf.py reads"
        )
    return ARCHITECTURES[MODEL_TYPES[kind]]


def lookup(model: Any, config: dict[str, Any]) -> Get:
    """Hyper-parameters by name: as mlx-lm runs the model, and from its config.json what mlx-lm has no use for."""
    args = getattr(model, "language_model", model).args
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config

    def get(key: str, default: Any = None) -> Any:
        found = getattr(args, key, None)
        found = text.get(key) if found is None else found
        return default if found is None else found

    return get


def settings(arch: Architecture, get: Get) -> dict[str, Any]:
    """Metadata under `<architecture>.`; Python's int, float, bool and str say how a value is stored.

    Raises:
        ExportError: a setting that llama.cpp has not, by name.
    """
    heads, own, head_dim = get("num_attention_heads"), _own_width(get), head_width(arch, get)
    out: dict[str, Any] = {
        "context_length": get("max_position_embeddings", 8192),
        "embedding_length": get("hidden_size"),
        "block_count": get("num_hidden_layers"),
        "feed_forward_length": get("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": get("num_key_value_heads", heads),
        "attention.layer_norm_rms_epsilon": float(get("rms_norm_eps")),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": int(head_dim * get("partial_rotary_factor", 1.0)) if arch.name == "phi3" else head_dim,
        "rope.freq_base": float(get("rope_theta", 10000.0)),
    }
    if get("rope_traditional"):
        raise ExportError("rope_traditional is set, which .gguf files of this family can not say; use the fused folder")
    if "sliding_attention" in (get("layer_types") or []) and arch.name in ("llama", "qwen2", "qwen3"):
        raise ExportError(f"layers with sliding attention are not written for {arch.name}; use the fused folder")
    if arch.name.startswith("gemma"):
        out.update(_gemma(arch, get, head_dim, own))
    if arch.name == "phi3":
        out["rope.scaling.original_context_length"] = get("original_max_position_embeddings", out["context_length"])
        out["attention.sliding_window"] = get("sliding_window", 0)
    out.update(_scaling(arch, get, out))
    return {f"{arch.name}.{key}": value for key, value in out.items()}


def _own_width(get: Get) -> int:
    return int(get("hidden_size") // get("num_attention_heads"))


def head_width(arch: Architecture, get: Get) -> int:
    """Width of an attention head."""
    own = _own_width(get)
    return own if arch.name in ("qwen2", "phi3") else int(get("head_dim", own))


def _gemma(arch: Architecture, get: Get, head_dim: int, own: int) -> dict[str, Any]:
    scaled = own if get("num_hidden_layers") == GEMMA_SCALED_BY_WIDTH[arch.name] else head_dim
    if get("query_pre_attn_scalar") != scaled:
        raise ExportError(
            f"query_pre_attn_scalar is {get('query_pre_attn_scalar')}; llama.cpp takes {scaled} for a {arch.name} of "
            f"{get('num_hidden_layers')} layers, and a .gguf file can not say otherwise; use the fused folder"
        )
    out: dict[str, Any] = {"attention.sliding_window": get("sliding_window", 4096)}
    if arch.name == "gemma2":
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            out[name] = float(get(name))
        return out
    out["rope.freq_base_swa"] = float(get("rope_local_base_freq"))
    out["attention.sliding_window_pattern"] = get("sliding_window_pattern")
    return out


def _rope_kind(scaling: Any) -> tuple[str, dict[str, Any]]:
    scaling = scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return {"su": "longrope"}.get(kind, kind), scaling


def _scaling(arch: Architecture, get: Get, out: dict[str, Any]) -> dict[str, Any]:
    kind, scaling = _rope_kind(get("rope_scaling"))
    if kind == "default":
        return {}
    if arch.name not in _SCALABLE.get(kind, ()):
        known = [k for k, names in _SCALABLE.items() if arch.name in names]
        raise ExportError(
            f"rope scaling {kind!r} of {arch.name} is not written as .gguf, only {', '.join(known) or 'none'}; use the "
            "fused folder (mlxft fuse)"
        )
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        usual = {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0}
        odd = [k for k, v in usual.items() if scaling.get(k, v) != v] + ["attention_factor"] * (
            scaling.get("attention_factor") is not None
        )
        if odd:
            raise ExportError(f"rope scaling 'yarn' with {', '.join(odd)} of its own is not written as .gguf")
        original = scaling.get("original_max_position_embeddings", 4096)
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling["factor"]),
            "rope.scaling.original_context_length": original,
        }
    if kind == "longrope":
        original = out["rope.scaling.original_context_length"]
        stretch = out["context_length"] / original
        loudness = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        return {"rope.scaling.attn_factor": loudness}
    return {}


def rope_tensors(arch: Architecture, get: Get) -> dict[str, mx.array]:
    """What llama.cpp keeps of the rope as tensors, float32: Llama 3's divisors, Phi 3's long and short factors."""
    kind, scaling = _rope_kind(get("rope_scaling"))
    if kind == "llama3":
        divisors = llama3_divisors(scaling, float(get("rope_theta", 10000.0)), head_width(arch, get))
        return {ROPE_FREQS: mx.array(divisors, dtype=mx.float32)}
    if kind == "longrope" and arch.name == "phi3":
        pairs = ((ROPE_LONG, "long_factor"), (ROPE_SHORT, "short_factor"))
        return {name: mx.array(scaling[key], dtype=mx.float32) for name, key in pairs}
    return {}
