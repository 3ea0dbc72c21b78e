"""A short text by which an adapter's base is known again: its structure, its settings, and a look at its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
# Settings that change what the same weights give, by mlx-lm's names. To add one is to change the hash of every model
# that has it, and adapters written before would be refused.
_SETTINGS = (
    *("rope_traditional", "rope_local_base_freq", "rotary_emb_base", "rotary_pct", "rotary_dim"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "logit_scale", "logits_scaling"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "scale_emb", "scale_depth"),
    *("sliding_window", "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor"),
)
# What each rule of the rope goes by, and the values of what may be left out.
_ROPE = {
    "linear": ("factor",),
    "dynamic": ("factor", "alpha"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("long_factor", "short_factor"),
}
_USUAL = {"low_freq_factor": 1, "high_freq_factor": 4, "beta_fast": 32, "beta_slow": 1, "mscale": 1}


# Of the weights: of so many matrices so many rows, whose sums with random signs are above 0 or not. Rounding to 4 bits
# turns one in thirty such answers, to 2 bits one in six, and training few; of weights drawn anew every other one.
_MATRICES, _ROWS = 8, 16
_TURNED = 36  # of the 128


def fingerprint(config: Mapping[str, Any], model: nn.Module, *, weights: bool = True) -> str:
    """STRUCTURE-SETTINGS-WEIGHTS: of architecture, sizes, names and shapes; of rope, norms, scales; of some weights.

    The same for every place that the weights come from and every way to write the settings; and alike, as `fits_base`
    has it, for every dtype and quantisation: an adapter trained on a 4-bit base fits the float one too. So do those of
    a fine-tune, whose weights are nearly the base's. A part that there is nothing to read of is empty.

    Args:
        model: without adapters.
        weights: false for a skeleton, which has none to look at.
    """
    text = config.get("text_config")
    sizes = {**config, **(text if isinstance(text, Mapping) else {})}
    structure = {
        "model_type": config.get("model_type"),
        "sizes": {key: sizes.get(key) for key in _SIZES},
        "weights": sorted((name, list(shape)) for name, shape in logical_shapes(model).items()),
    }
    found = _settings(model)
    parts = [_hash(structure), _hash(found) if found else "", _signs(model) if weights else ""]
    return "-".join(parts).rstrip("-")


def fits_base(recorded: str | None, base: str) -> bool:
    """Whether what was trained on `recorded` fits `base`. Adapters of older versions say less: what they say counts."""
    if not recorded:
        return True
    (structure, settings, signs), (mine, own, here) = (_parts(text) for text in (recorded, base))
    turned = (int(signs, 16) ^ int(here, 16)).bit_count() if signs and here else 0
    return structure == mine and (not settings or not own or settings == own) and turned <= _TURNED


def without_weights(text: str) -> str:
    """A fingerprint for what stands beside whole weights of its own, which may have gone far from the base's."""
    return "-".join(_parts(text)[:2]).rstrip("-")


def _parts(text: str) -> tuple[str, str, str]:
    structure, settings, signs = [*text.split("-"), "", ""][:3]
    return structure, settings, signs


def _signs(model: nn.Module) -> str:
    """128 bits in hex, of the matrices that stand evenly apart among all; empty where there is none."""
    named = [(name, m) for name, m in model.named_modules() if "weight" in m and m.weight.ndim >= 2]
    named.sort(key=lambda item: item[0])
    places = np.linspace(0, len(named) - 1, min(_MATRICES, len(named))).round().astype(int)
    sums = [_row_sums(named[place][1]) for place in places]
    return np.packbits(np.concatenate([np.array(part) > 0 for part in sums])).tobytes().hex() if sums else ""


def _row_sums(module: nn.Module) -> mx.array:
    """Of some rows of a matrix, as they are unpacked: their sums with signs that are the same for every model."""

    def of(part: mx.array) -> mx.array:
        flat = part.reshape(-1, part.shape[-1])
        return flat[mx.array(np.linspace(0, flat.shape[0] - 1, _ROWS).round().astype(np.int32))]

    weight = of(module.weight)
    if is_packed(module):
        biases = module.get("biases")
        packing = {"group_size": module.group_size, "bits": module.bits, "mode": getattr(module, "mode", "affine")}
        weight = mx.dequantize(weight, of(module.scales), None if biases is None else of(biases), **packing)
    # A bit of Knuth's multiplicative hash: a generator's numbers may be others in its next version.
    odd = (np.arange(weight.shape[-1], dtype=np.uint32) * np.uint32(2654435761)) >> 16 & 1
    return (weight.astype(mx.float32) * mx.array(1 - 2 * odd.astype(np.float32))).sum(axis=-1)


def _hash(found: Any) -> str:
    return hashlib.blake2b(json.dumps(found, sort_keys=True).encode(), digest_size=8).hexdigest()


def _settings(model: nn.Module) -> dict[str, Any]:
    """By name, as the model computes with them: what a config.json leaves out stands here as mlx-lm's default."""
    args = getattr(getattr(model, "language_model", model), "args", None)
    inner = getattr(args, "text_config", None)
    args = inner if dataclasses.is_dataclass(inner) else args
    found = {name: _plain(getattr(args, name, None)) for name in _SETTINGS}
    return {k: v for k, v in (found | _rope(args)).items() if v is not None}


def _rope(args: Any) -> dict[str, Any]:
    """Base and scaling, from the older keys (rope_theta, rope_scaling) or the one of today (rope_parameters)."""
    given = {**(getattr(args, "rope_parameters", None) or {}), **(getattr(args, "rope_scaling", None) or {})}
    if any(isinstance(v, Mapping) for v in given.values()):  # of kinds of layers, each for itself
        return {"rope": _plain(given)}
    out = {key: _plain(given.get(key, getattr(args, key, None))) for key in ("rope_theta", "partial_rotary_factor")}
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = {"su": "longrope"}.get(kind, kind)
    if kind != "default":
        keys = _ROPE.get(kind, tuple(sorted(given)))
        out["rope"] = [kind, *(_plain(given.get(key, _USUAL.get(key))) for key in keys)]
    return out


def _plain(value: Any) -> Any:
    """A value that is written alike wherever it was stored: 1e-5 and its float32, 10000 and 10000.0 are the same."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return f"{value:.6g}" if isinstance(value, (int, float)) else value


def logical_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all weights as they are unpacked; the scales and biases of packed ones are left out."""
    packed = {name: module for name, module in model.named_modules() if is_packed(module)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in tree_flatten(model.parameters()):
        stem, _, part = name.rpartition(".")
        if stem in packed and part in ("scales", "biases"):
            continue
        width = value.shape[-1:]
        if stem in packed and part == "weight":
            width = (value.shape[-1] * 32 // packed[stem].bits,)
        shapes[name] = (*value.shape[:-1], *width)
    return shapes


def is_packed(module: nn.Module) -> bool:
    """Whether the weights of a module are quantised."""
    return "scales" in module and hasattr(module, "bits")
