"""The hyper-parameters of a .gguf file as a config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxft.errors import ModelError
from mlxft.model.gguf_names import GEMMA_SCALED_BY_WIDTH, ROPE_FREQS, ROPE_LONG, ROPE_SHORT, Architecture


@dataclass
class GgufFile:
    """A file as read: tensors under llama.cpp's names, and the key-value metadata."""

    path: Path
    tensors: dict[str, mx.array]
    metadata: dict[str, Any]
    architecture: Architecture

    def has(self, key: str) -> bool:
        return self._full(key) in self.metadata

    def _full(self, key: str) -> str:
        common = key.startswith(("general.", "tokenizer.", "split."))
        return key if common else f"{self.metadata['general.architecture']}.{key}"

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value as Python has it; ModelError where it is missing and has no default."""
        full = self._full(key)
        if full not in self.metadata:
            if default is None:
                raise ModelError(f"{self.path}: the metadata has no {full}; the file is incomplete, convert it anew")
            return default
        found = self.metadata[full]
        return found.tolist() if isinstance(found, mx.array) else found

    def integer(self, key: str, default: int | None = None) -> int:
        found = self.value(key, default)
        if not isinstance(found, int):
            raise ModelError(f"{self.path}: {self._full(key)} is not one whole number: {found}")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        # Stored as float32: 7 digits give back the 1e-05 that was meant.
        return float(f"{self.value(key, default):.7g}")


def config(file: GgufFile) -> dict[str, Any]:
    """A config.json that transformers and mlx-lm both read (rope under its older, common names)."""
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path}: no token_embd.weight; this is not a language model's file")
    hidden, heads = file.integer("embedding_length"), file.integer("attention.head_count")
    theta = file.number("rope.freq_base", 10000.0)
    phi3 = file.architecture.name == "phi3"
    # Phi 3 turns only a part of each head.
    rope_dims = None if phi3 else file.integer("rope.dimension_count", hidden // heads)
    head_dim = file.integer("attention.key_length", rope_dims or hidden // heads)
    out: dict[str, Any] = {
        "architectures": [file.architecture.hf_class],
        "model_type": file.architecture.model_type,
        "hidden_size": hidden,
        "intermediate_size": file.integer("feed_forward_length"),
        "num_hidden_layers": file.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": file.integer("context_length"),
        "rope_theta": int(theta) if theta.is_integer() else theta,
        "rope_scaling": _phi3_scaling(file) if phi3 else _rope_scaling(file, theta, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "float16",
    }
    out.update(_FAMILIES.get(file.architecture.name, lambda *_: {})(file, out))
    for name in ("bos", "eos", "padding"):
        if file.has(f"tokenizer.ggml.{name}_token_id"):
            out[f"{'pad' if name == 'padding' else name}_token_id"] = file.integer(f"tokenizer.ggml.{name}_token_id")
    if len(stops := eos_ids(file)) > 1:
        out["eos_token_id"] = stops
    return out


def eos_ids(file: GgufFile) -> list[int]:
    """Ids that end an answer: end of text and, where the file has one of its own, end of turn."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return list(dict.fromkeys(file.integer(key) for key in keys if file.has(key)))


def _gemma(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    layers = GEMMA_SCALED_BY_WIDTH[file.architecture.name]
    by_width = config["num_hidden_layers"] == layers
    own = config["hidden_size"] // config["num_attention_heads"] if by_width else config["head_dim"]
    out = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": own,
        "sliding_window": file.integer("attention.sliding_window", 4096),
    }
    if file.architecture.name == "gemma2":
        out["attn_logit_softcapping"] = file.number("attn_logit_softcapping", 50.0)
        out["final_logit_softcapping"] = file.number("final_logit_softcapping", 30.0)
    else:
        out["rope_local_base_freq"] = file.number("rope.freq_base_swa", 10000.0)
        out["sliding_window_pattern"] = file.integer("attention.sliding_window_pattern", 6)
    return out


def _phi3(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    turned = file.integer("rope.dimension_count", config["head_dim"])
    out: dict[str, Any] = {
        "original_max_position_embeddings": file.integer(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
        "partial_rotary_factor": turned / config["head_dim"],
    }
    if window := file.integer("attention.sliding_window", 0):
        out["sliding_window"] = window
    return out


_FAMILIES = {"gemma2": _gemma, "gemma3": _gemma, "phi3": _phi3}


def _phi3_scaling(file: GgufFile) -> dict[str, Any] | None:
    """The divisors of the rope, which stand in tensors of their own."""
    if ROPE_LONG not in file.tensors:
        return None
    factors = {
        name: file.tensors[key].astype(mx.float32).tolist()
        for name, key in (("long_factor", ROPE_LONG), ("short_factor", ROPE_SHORT))
    }
    return {"type": "longrope", **factors}


def _rope_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    kind = file.value("rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.number("rope.scaling.factor")}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": file.number("rope.scaling.factor"),
            "original_max_position_embeddings": file.integer("rope.scaling.original_context_length"),
        }
    if kind != "none":
        raise ModelError(f"{file.path}: rope scaling {kind!r} is not read from .gguf files; use the safetensors folder")
    if ROPE_FREQS not in file.tensors:
        return None
    # llama.cpp stores only the resulting divisors. Llama 3.1 to 3.3 share all constants but the factor.
    seen = file.tensors[ROPE_FREQS].astype(mx.float32)
    factor, original = float(mx.max(seen).item()), 8192  # type: ignore[arg-type]
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    expected = llama3_divisors(scaling, theta, head_dim)
    if seen.shape != (head_dim // 2,) or not mx.allclose(seen, mx.array(expected), rtol=1e-3).item():
        raise ModelError(f"{file.path}: {ROPE_FREQS} does not follow Llama 3's rule; use the safetensors folder")
    return scaling


def llama3_divisors(scaling: dict[str, Any], theta: float, head_dim: int) -> list[float]:
    """What the frequencies of a rope are divided by (Llama 3.1's rope): long waves are stretched by the factor, short
    ones not, those between smoothly. head_dim / 2 numbers.
    """
    factor, original = scaling["factor"], scaling.get("original_max_position_embeddings", 8192)
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    out = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(float(factor))
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return out
