"""Read .gguf files: header, settings, tokenizer and tensors; and the tables of names that writing them uses, too."""

from __future__ import annotations

import importlib
import json
import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer, TokenizerWrapper
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mlxft.errors import ModelError
from mlxft.model.folder import ModelConfig, check_schema
from mlxft.model.layers import WeightForm, pack_codes, quantization_of
from mlxft.text import parse_json

# --- gguf header ------------------------------------------------------------------------------------------------------
# The header of a .gguf file: its metadata, and the table of tensors.
#
# The gguf package's own reader takes 6 s for the 98,000 tokens and merges of SmolLM2; this one takes 0.2 s. It also
# checks the table, because MLX's reader trusts whatever a file claims.
# Layout: ggml/docs/gguf.md, versions 2 and 3, little-endian.

# struct format of a metadata value by its type number; 8 is a string, 9 an array.
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
_STRING, _ARRAY = 8, 9
# Most bytes of a string or of an array's numbers, and most strings of an array: a broken file may claim petabytes.
_MOST = 1 << 24
_MOST_DIMENSIONS = 4  # of a tensor in ggml


class Entry(NamedTuple):
    """A tensor in the table: its type ("Q4_1", or "type 99" without a name), shape and place in the file.

    Nothing of it is in memory before it is read.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> mx.Dtype:
        """The type in which its numbers are read: what F32 and BF16 say, for MXFP4 one that holds all, else float16."""
        return {"F32": mx.float32, "BF16": mx.bfloat16, "MXFP4": mx.bfloat16}.get(self.kind, mx.float16)

    def read(self) -> mx.array:
        """Return its numbers, unpacked; raises as `parts`."""
        return self.parts()["weight"]

    def parts(self, form: WeightForm | None = None) -> dict[str, mx.array]:
        """Read a tensor as the parameters of a layer: weight, and if it is packed scales and biases.

        It is read some rows at a time, so that little more than what is returned is in memory.

        Raises:
            ValueError: the shape does not consist of whole blocks, or values are not finite.
        """
        from gguf import GGMLQuantizationType
        from gguf.quants import quant_shape_to_byte_shape

        width, rows = (self.shape or (1,))[-1], math.prod(self.shape[:-1])
        if not width * rows:
            raise ValueError(f"broken: a tensor of shape {self.shape}")
        size = quant_shape_to_byte_shape((width,), GGMLQuantizationType[self.kind])[0]
        out: dict[str, mx.array] = {}
        step = max(1, _SLICE // width)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            data = np.fromfile(self.path, np.uint8, count * size, offset=self.offset + start * size)
            for part, value in _unpacked(self.kind, data.reshape(count, size), form, self.dtype).items():
                if count == rows:
                    out[part] = value
                else:
                    out.setdefault(part, mx.zeros((rows, value.shape[-1]), value.dtype))[start : start + count] = value
            mx.eval(out)
        return {part: value.reshape(*self.shape[:-1], -1) for part, value in out.items()}

    def outline(self, form: WeightForm | None = None) -> dict[str, mx.array]:
        """Return what `parts` returns as lazy zeros; nothing is read."""
        zeros = mx.zeros(self.shape, self.dtype)
        return {"weight": zeros} if form is None else pack_parts(zeros, form, self.dtype)


def read_gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Read a file's metadata as Python values, and its table: tensor name -> entry.

    Raises:
        ValueError: the file is not GGUF of version 2 or 3, its header is cut off, or its table does not fit the file.
    """
    with open(path, "rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(f"not a GGUF file: it starts with {magic!r}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            head, end = _Head(data, 4), len(data)
            version, tensors, pairs = head.numbers("IQQ")
            if version not in (2, 3):
                raise ValueError(f"GGUF version {version}; expected 2 or 3")
            metadata = _once((head.string(), head.value(*head.numbers("I"))) for _ in range(pairs))
            table = _once(head.tensor(path) for _ in range(tensors))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"broken: it aligns its data to {str(alignment)[:80]} bytes")
    # Offsets count from where the data begins, on a full multiple.
    start = -(-head.at // alignment) * alignment
    table = {name: entry._replace(offset=start + entry.offset) for name, entry in table.items()}
    _check_places(table, start, end)
    return metadata, table


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out:  # MLX might read the other one, which is not checked
            raise ValueError(f"broken: it has {name[:80]!r} twice")
        out[name] = value
    return out


def _check_places(table: dict[str, Entry], free: int, end: int) -> None:
    from gguf import GGML_QUANT_SIZES

    sizes = {kind.name: size for kind, size in GGML_QUANT_SIZES.items()}
    for name, (_, kind, shape, offset) in sorted(table.items(), key=lambda item: item[1].offset):
        if offset < free:
            raise ValueError(f"broken: the tensor {name[:80]!r} overlaps another one")
        items, size = sizes.get(kind, (1, 0))
        free = offset + -(-math.prod(shape) // items) * size
        if free > end:
            raise ValueError(f"broken or cut off: the tensor {name[:80]!r} reaches beyond the file's end")


@dataclass
class _Head:
    """Reads a header from a position onwards; raises ValueError at its end."""

    data: mmap.mmap
    at: int

    def take(self, length: int) -> bytes:
        found = self.data[self.at : self.at + length] if length <= _MOST else b""
        if len(found) != length:
            raise ValueError("the header is cut off or broken")
        self.at += length
        return found

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def string(self) -> str:
        return self.take(*self.numbers("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind])[0]
        if kind != _ARRAY:
            raise ValueError(f"broken: a metadata value of type {kind}")
        inner, count = self.numbers("IQ")
        if inner == _ARRAY:  # no program writes them, and MLX's reader recurses for each level
            raise ValueError("broken: an array of arrays in its metadata")
        if count > _MOST:
            raise ValueError("the header is cut off or broken")
        if inner in _NUMBERS:
            return list(self.numbers(f"{count}{_NUMBERS[inner]}"))
        return [self.value(inner) for _ in range(count)]

    def tensor(self, path: Path) -> tuple[str, Entry]:
        from gguf import GGMLQuantizationType

        name = self.string()
        (dimensions,) = self.numbers("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"broken: a tensor of {dimensions:,} dimensions; expected at most {_MOST_DIMENSIONS}")
        shape = self.numbers(f"{dimensions}Q")[::-1]  # the innermost comes first
        number, offset = self.numbers("IQ")
        kind = next((t.name for t in GGMLQuantizationType if t == number), f"type {number}")
        return name, Entry(path, kind, shape, offset)


# --- gguf names -------------------------------------------------------------------------------------------------------
# Layouts of the model families in .gguf files, for reading and writing, as llama.cpp's converters and loaders have
# them. The names of tensors are the gguf package's.

# Tensors of the rope, which are settings in a config.
ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)

Get = Callable[..., Any]  # (setting's name in config.json, default)


def getter(config: dict[str, Any], args: Any = None) -> Get:
    """Return a function that gives settings by name: as mlx-lm runs the model (`args`), else from its config.json."""
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config

    def get(key: str, default: Any = None) -> Any:
        found = getattr(args, key, None)
        found = text.get(key) if found is None else found
        return default if found is None else found

    return get


class Setting(NamedTuple):
    """A hyper-parameter under both names.

    Attributes:
        ours, theirs: the key in config.json, and in the metadata after the architecture's name.
        default: where it is left out, on either side; None: it stays out.
    """

    ours: str
    theirs: str
    kind: type = int
    default: Any = ...


@dataclass(frozen=True)
class TensorLayout:
    """How llama.cpp stores a tensor differently, and the way back; both also get the model's settings.

    Attributes:
        axis: along which blocks are reordered, if nothing else changes: packed numbers and LoRA's factors follow.
    """

    out: Callable[[mx.array, Get], mx.array]
    back: Callable[[mx.array, Get], mx.array]
    axis: int | None = None


def _reordered(order: Callable[[int, Get], np.ndarray], axis: int = 0) -> TensorLayout:
    """Return the layout with blocks in another order along an axis; `order` is given the axis' length."""

    def turn(value: mx.array, order: np.ndarray) -> mx.array:
        at = axis % value.ndim
        blocks = value.reshape(*value.shape[:at], len(order), -1, *value.shape[at + 1 :])
        return mx.take(blocks, mx.array(order), at).reshape(value.shape)

    return TensorLayout(
        lambda value, get: turn(value, order(value.shape[axis], get)),
        lambda value, get: turn(value, np.argsort(order(value.shape[axis], get))),
        axis,
    )


def _rope_pairs(key: str) -> TensorLayout:
    """Return the order (heads, half, 2) of rows (heads, 2, half): llama.cpp's rope rotates neighbours, not halves."""

    def order(rows: int, get: Get) -> np.ndarray:
        return np.arange(rows).reshape(get(key) or get("num_attention_heads"), 2, -1).swapaxes(1, 2).ravel()

    return _reordered(order)


def _value_heads(_: int, get: Get) -> np.ndarray:
    """Return the order of linear attention's value heads: by their place within a key head before the key head."""
    return np.arange(get("linear_num_value_heads")).reshape(get("linear_num_key_heads"), -1).T.ravel()


def _query_key_value(_: int, get: Get) -> np.ndarray:
    before = 2 * get("linear_num_key_heads")  # heads of queries and keys, which are as wide as those of values
    return np.concatenate([np.arange(before), before + _value_heads(0, get)])


def _query_key_value_rows(get: Get) -> int:
    keys, values = (get(f"linear_num_{n}_heads") * get(f"linear_{n}_head_dim") for n in ("key", "value"))
    return int(2 * keys + values)


def _by_part(rows: int, get: Get) -> np.ndarray:
    """Return the order of rows that stand by key head (each: q, k, v, z) when all q stand first, then k, v and z."""
    keys, wide = get("linear_num_key_heads"), get("linear_key_head_dim")
    values = get("linear_num_value_heads") // keys * get("linear_value_head_dim")
    by_head = np.split(np.arange(rows).reshape(keys, -1), np.cumsum([wide, wide, values]), axis=1)
    return np.concatenate([part.ravel() for part in by_head])


_ADDED = TensorLayout(lambda value, _: value + 1, lambda value, _: value.astype(mx.float32) - 1)
# Some files have it as a vector.
_ROW = TensorLayout(lambda value, _: value, lambda value, _: value.reshape(1, -1), axis=0)
_CONV = TensorLayout(lambda value, _: value.squeeze(-1), lambda value, _: value[..., None])
# In float64, so that little is lost on the way there and back.
_DECAY = TensorLayout(
    lambda value, _: mx.array(-np.exp(np.array(value.astype(mx.float32), np.float64)), mx.float32),
    lambda value, _: mx.array(np.log(-np.array(value.astype(mx.float32), np.float64)), mx.float32),
)
_LLAMA = {"attn_q": (_rope_pairs("num_attention_heads"),), "attn_k": (_rope_pairs("num_key_value_heads"),)}
_GATED = {"ffn_gate_inp_shexp": (_ROW,)}
_HEADS = _reordered(_value_heads)
_DELTA = {
    "attn_qkv": (_reordered(_query_key_value),),
    "ssm_conv1d": (_reordered(_query_key_value), _CONV),
    "ssm_a": (_HEADS, _DECAY),
    "ssm_out": (_reordered(_value_heads, axis=-1),),
    **dict.fromkeys(("attn_gate", "ssm_alpha", "ssm_beta", "ssm_dt"), (_HEADS,)),
}

# Names of mlx-lm's modules -> those that the gguf package knows.
_MODULES = (
    ("block_sparse_moe.switch_mlp", "mlp.experts"),
    ("switch_mlp", "experts"),
    ("experts.switch_glu", "mlp.experts"),
)
# Parameters that are neither weight nor bias -> name of the module for the gguf package, and suffix in the file.
_LEAVES = {
    "A_log": ("{}.A_log", ""),
    "dt_bias": ("{}.dt_proj", ".bias"),
    "sinks": ("{}.sinks", ".weight"),
    "layer_scalar": ("{}.layer_scalar", ".weight"),
    "e_score_correction_bias": ("{}.e_score_correction", ".bias"),
    "scale": ("{}.proj", ".scale"),
    "per_expert_scale": ("{}.experts.down_proj", ".scale"),
}
_QKV = frozenset(("attn_q", "attn_k", "attn_v", "attn_qkv"))


@dataclass(frozen=True)
class Architecture:
    """A model family: names, settings and layout of its tensors.

    Attributes:
        name: value of `general.architecture`.
        settings: what it has beside `COMMON`.
        fixed: settings that llama.cpp takes for granted.
        layout: llama.cpp's name of a tensor, without layer and suffix -> how it is stored, in the order of writing.
        joined: a module whose rows are several tensors in the file -> names of modules that stand for these.
        shifted: whether norms are stored with 1 added, which the model itself adds.
        biases: names of tensors that may have a bias.
        rotary: share of a head that the rope rotates, if a config may say so: the default.
        square: whether a head is hidden / heads wide, whatever the config says.
        traditional: whether the rope of mlx-lm's model rotates neighbours, as llama.cpp's does.
        ropes: kinds of rope scaling that both have.
        headed: whether llama.cpp wants an output head that is not the embedding.
        nested: whether the settings stand under `text_config`.
    """

    name: str
    model_type: str
    hf_class: str
    settings: tuple[Setting, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)
    layout: Mapping[str, tuple[TensorLayout, ...]] = field(default_factory=dict)
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shifted: bool = False
    biases: frozenset[str] = _QKV
    rotary: float | None = None
    square: bool = False
    traditional: bool = False
    ropes: tuple[str, ...] = ()
    headed: bool = False
    nested: bool = False

    @property
    def mixture(self) -> bool:
        """Whether it has experts."""
        return any(s.theirs == "expert_count" for s in self.settings)

    def theirs(self, ours: str, layers: int) -> str | None:
        """Return llama.cpp's name of a module, without .weight or .bias; None if the family has no such module."""
        ours = ours.removeprefix("language_model.")
        for mlx, known in _MODULES:
            ours = ours.replace(mlx, known)
        found = _names(self.name, layers).get_name(ours)
        # The package knows these of Gemma 4 in one tensor only; llama.cpp takes both forms.
        return found or (_names("llama", layers).get_name(ours) if ".mlp.experts." in ours else None)

    def tensors(self, ours: str, layers: int) -> tuple[str, ...]:
        """Return the names in the file of a parameter, in the order of its rows; none if the family has no place."""
        path, _, leaf = ours.rpartition(".")
        stem, _, module = path.rpartition(".")
        if module in self.joined:
            found = [self.theirs(f"{stem}.{part}", layers) for part in self.joined[module]]
            return tuple(f"{name}.{leaf}" for name in found if name)
        pattern, suffix = _LEAVES.get(leaf, ("{}", f".{leaf}"))
        name = self.theirs(pattern.format(stem if leaf == "per_expert_scale" else path), layers)
        odd = name is None or (leaf == "bias" and _tail(name) not in self.biases)
        return () if odd else (f"{name}{suffix}",)

    def cut(self, value: mx.array, names: tuple[str, ...], get: Get) -> list[mx.array]:
        """Return the tensors of the file, of these names, that a stored parameter consists of."""
        rows = _query_key_value_rows(get) if len(names) > 1 else 0
        return [value[:rows], value[rows:]] if rows else [value]

    def layouts(self, name: str) -> tuple[TensorLayout, ...]:
        """Return how a tensor of the file is stored, in the order of writing."""
        shifted = (_ADDED,) if self.shifted and name.endswith("_norm.weight") else ()
        return shifted or self.layout.get(_tail(name.partition(".weight")[0].removesuffix(".bias")), ())


def _tail(name: str) -> str:
    return name.rpartition(".")[2]


@lru_cache
def _names(arch: str, layers: int) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    return get_tensor_name_map({name: number for number, name in MODEL_ARCH_NAMES.items()}[arch], layers)


def always_float(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether llama.cpp has a tensor in float32 whatever the type of the file: vectors, routers and biases."""
    kept = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight")
    return len(shape) < 2 or not name.endswith(".weight") or name.endswith(kept)


COMMON = (
    Setting("max_position_embeddings", "context_length", default=8192),
    Setting("hidden_size", "embedding_length"),
    Setting("num_hidden_layers", "block_count"),
    Setting("num_attention_heads", "attention.head_count"),
    Setting("rms_norm_eps", "attention.layer_norm_rms_epsilon", float),
)
_WIDE = Setting("intermediate_size", "feed_forward_length")
_USED = Setting("num_experts_per_tok", "expert_used_count")
_MIXTURE = (
    Setting("num_experts", "expert_count"),
    _USED,
    Setting("moe_intermediate_size", "expert_feed_forward_length"),
)
_SHARED = Setting("shared_expert_intermediate_size", "expert_shared_feed_forward_length")
_LINEAR = (
    Setting("linear_conv_kernel_dim", "ssm.conv_kernel"),
    Setting("linear_key_head_dim", "ssm.state_size"),
    Setting("linear_num_key_heads", "ssm.group_count"),
    Setting("linear_num_value_heads", "ssm.time_step_rank"),
    Setting("full_attention_interval", "full_attention_interval", default=4),
)
_MLP = frozenset(("attn_output", "ffn_gate", "ffn_up", "ffn_down"))
_LONG = ("linear", "yarn")
_EVERY = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}

_FAMILIES = (
    Architecture(
        "llama", "llama", "LlamaForCausalLM", (_WIDE,), layout=_LLAMA, biases=_QKV | _MLP, ropes=(*_LONG, "llama3")
    ),
    Architecture(
        "llama",
        "mixtral",
        "MixtralForCausalLM",
        (_WIDE, Setting("num_local_experts", "expert_count"), _USED),
        layout=_LLAMA,
        square=True,
    ),
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", (_WIDE,), square=True, ropes=_LONG),
    Architecture(
        "qwen2moe",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        (_WIDE, *_MIXTURE, _SHARED),
        layout=_GATED,
        square=True,
        headed=True,
    ),
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", (_WIDE,), ropes=_LONG),
    Architecture("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", (_WIDE, *_MIXTURE), _EVERY),
    Architecture(
        "qwen3next",
        "qwen3_next",
        "Qwen3NextForCausalLM",
        (_WIDE, *_MIXTURE, _SHARED, *_LINEAR),
        _EVERY,
        {**_GATED, "attn_qkv": (_reordered(_by_part),), "ssm_conv1d": (_CONV,), "ssm_a": (_DECAY,)},
        joined={"in_proj_qkvz": ("in_proj_qkv", "in_proj_z")},
        rotary=0.25,
    ),
    Architecture(
        "qwen35",
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        (_WIDE, *_LINEAR),
        layout=_DELTA,
        rotary=0.25,
        nested=True,
    ),
    Architecture(
        "qwen35moe",
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        (_WIDE._replace(default=None), *_MIXTURE, _SHARED, *_LINEAR),
        {"norm_topk_prob": True},
        _GATED | _DELTA,
        rotary=0.25,
        nested=True,
    ),
    Architecture("gemma2", "gemma2", "Gemma2ForCausalLM", (_WIDE,), shifted=True),
    Architecture("gemma3", "gemma3_text", "Gemma3ForCausalLM", (_WIDE,), shifted=True, ropes=("linear",)),
    Architecture(
        "gemma4",
        "gemma4_text",
        "Gemma4ForCausalLM",
        (
            Setting("num_kv_shared_layers", "attention.shared_kv_layers", default=0),
            Setting("hidden_size_per_layer_input", "embedding_length_per_layer_input", default=0),
            Setting("sliding_window", "attention.sliding_window"),
            *(s._replace(default=None) for s in (*_MIXTURE[::2], _USED._replace(ours="top_k_experts"))),
        ),
    ),
    Architecture("phi3", "phi3", "Phi3ForCausalLM", (_WIDE,), rotary=1.0, square=True, ropes=("longrope",)),
    Architecture(
        "gpt-oss",
        "gpt_oss",
        "GptOssForCausalLM",
        (
            _WIDE,
            _WIDE._replace(theirs="expert_feed_forward_length"),
            Setting("num_local_experts", "expert_count"),
            _USED,
            Setting("sliding_window", "attention.sliding_window"),
        ),
        biases=_QKV | {"attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"},
        ropes=("yarn",),
        headed=True,
    ),
    Architecture("glm4", "glm4", "Glm4ForCausalLM", (_WIDE,), rotary=0.5, traditional=True),
    Architecture(
        "glm4moe",
        "glm4_moe",
        "Glm4MoeForCausalLM",
        (
            _WIDE,
            _MIXTURE[0]._replace(ours="n_routed_experts"),
            *_MIXTURE[1:],
            Setting("n_shared_experts", "expert_shared_count"),
            Setting("first_k_dense_replace", "leading_dense_block_count", default=0),
            Setting("routed_scaling_factor", "expert_weights_scale", float, 1.0),
            Setting("norm_topk_prob", "expert_weights_norm", bool, False),
            Setting("n_group", "expert_group_count", default=1),
            Setting("topk_group", "expert_group_used_count", default=1),
        ),
        {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        rotary=0.5,
    ),
    Architecture("smollm3", "smollm3", "SmolLM3ForCausalLM", (_WIDE,), layout=_LLAMA, ropes=_LONG),
    Architecture(
        "granite",
        "granite",
        "GraniteForCausalLM",
        (
            _WIDE,
            Setting("attention_multiplier", "attention.scale", float),
            Setting("embedding_multiplier", "embedding_scale", float),
            Setting("residual_multiplier", "residual_scale", float),
            Setting("logits_scaling", "logit_scale", float),
        ),
        layout=_LLAMA,
        biases=_QKV | _MLP,
        square=True,
        ropes=(*_LONG, "llama3"),
    ),
    Architecture("olmo2", "olmo2", "Olmo2ForCausalLM", (_WIDE,), ropes=_LONG, headed=True),
)
ARCHITECTURES = {a.model_type: a for a in _FAMILIES}
# Other values of model_type in config.json, of models that hold one of these.
MODEL_TYPES = {name: name for name in ARCHITECTURES} | {
    "mistral": "llama",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_text",
}
# Gemma's attention has a scale of its own, which llama.cpp derives from the number of layers: models with these numbers
# use hidden / heads, all others the width of a head.
GEMMA_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


def rope_sections(pairs: int, given: list[int] | None = None) -> list[int]:
    """Return how many of a Qwen 3.5's rotated pairs count time, height and width; all are the same for text."""
    usual = [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3]
    return [*(given if given and len(given) == 3 and sum(given) == pairs else usual), 0]


# Layers without rope in a SmolLM 3, and layers with sliding attention in a gpt-oss, for llama.cpp.
NO_ROPE_EVERY, SLIDING_EVERY = 4, 2

# --- gguf config ------------------------------------------------------------------------------------------------------
# The hyper-parameters of a .gguf file as a config.json.


@dataclass
class GgufFile:
    """Content of a file: tensors under llama.cpp's names, unread, and metadata."""

    path: Path
    tensors: dict[str, Entry]
    metadata: dict[str, Any]
    architecture: Architecture

    def _full(self, key: str) -> str:
        common = key.startswith(("general.", "tokenizer.", "split."))
        return key if common else f"{self.metadata['general.architecture']}.{key}"

    def value(self, key: str, default: Any = None) -> Any:
        """Return a metadata value; raise a ModelError if it is missing and has no default."""
        found = self.metadata.get(self._full(key), default)
        if found is None:
            raise ModelError(f"{self.path}: the metadata has no {self._full(key)}; convert the model again")
        return found

    def integer(self, key: str, default: int | None = None) -> int:
        found = self.value(key, default)
        if isinstance(found, list) and len(set(found)) == 1:  # one for each layer
            found = found[0]
        if not isinstance(found, int):
            raise ModelError(f"{self.path}: {self._full(key)} is {str(found)[:80]}; expected a whole number")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        # Stored as float32: 7 digits restore 1e-05.
        return float(f"{self.value(key, default):.7g}")

    def per_layer(self, key: str, layers: int, default: list[Any] | None = None) -> list[Any]:
        """Return a metadata value for each layer, which the file may have once for all."""
        found = self.value(key, default)
        out = found if isinstance(found, list) else [found] * layers
        if len(out) != layers:
            raise ModelError(f"{self.path}: {self._full(key)} is for {len(out)} layers; the model has {layers}")
        return out

    def setting(self, own: Setting) -> Any:
        """Return a setting of the model; None if it may be left out, and is."""
        default = None if own.default is ... else own.default
        if own.default is None and self._full(own.theirs) not in self.metadata:
            return None
        read: Any = {"float": self.number, "bool": self.value}.get(own.kind.__name__, self.integer)
        return read(own.theirs, default)


def config(file: GgufFile) -> dict[str, Any]:
    """Return a config.json that transformers and mlx-lm both read (with the rope's older names)."""
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path}: no token_embd.weight; this is not a language model's file")
    arch = file.architecture
    seen = {s.ours: file.setting(s) for s in (*COMMON, *arch.settings)}
    hidden, heads = seen["hidden_size"], seen["num_attention_heads"]
    theta = file.number("rope.freq_base", 10000.0)
    # Some rotate only a part of each head.
    rope_dims = None if arch.rotary else file.integer("rope.dimension_count", hidden // heads)
    head_dim = file.integer("attention.key_length", rope_dims or hidden // heads)
    out: dict[str, Any] = {
        "architectures": [arch.hf_class],
        "model_type": arch.model_type,
        **{k: v for k, v in seen.items() if v is not None},
        **arch.fixed,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "rope_theta": int(theta) if theta.is_integer() else theta,
        "rope_scaling": _rope_scaling(file, theta, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "float16",
    }
    # Layers that predict further tokens at once, which mlx-lm does not run.
    out["num_hidden_layers"] -= file.integer("nextn_predict_layers", 0)
    if arch.rotary:
        out["partial_rotary_factor"] = file.integer("rope.dimension_count", int(head_dim * arch.rotary)) / head_dim
    check_schema(ModelConfig, {"num_hidden_layers": out["num_hidden_layers"]}, file.path)  # lists are made of it
    if arch.name != "gemma4":
        out["num_key_value_heads"] = file.integer("attention.head_count_kv", heads)
    out.update(_OWN.get(arch.name, lambda *_: {})(file, out))
    for name in ("bos", "eos", "padding"):
        if f"tokenizer.ggml.{name}_token_id" in file.metadata:
            out[f"{'pad' if name == 'padding' else name}_token_id"] = file.integer(f"tokenizer.ggml.{name}_token_id")
    if len(stops := eos_ids(file)) > 1:
        out["eos_token_id"] = stops
    if arch.nested:
        whole = ("architectures", "model_type", "torch_dtype", "tie_word_embeddings", *(f"{n}_token_id" for n in _IDS))
        text = {**out, "model_type": f"{arch.model_type}_text"}
        out = {k: out[k] for k in whole if k in out} | {"text_config": text}
    return out


_IDS = ("bos", "eos", "pad")


def eos_ids(file: GgufFile) -> list[int]:
    """Return the ids that end a completion: end of text and, if the file has them, end of turn and of message."""
    keys = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom")]
    return list(dict.fromkeys(file.integer(key) for key in keys if key in file.metadata))


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
        if file.number("final_logit_softcapping", 0.0):
            raise ModelError(f"{file.path}: caps its logits, which mlx-lm's gemma3 does not; use another model")
        out["rope_local_base_freq"] = file.number("rope.freq_base_swa", 10000.0)
        slides = file.integer("attention.sliding_window", 0) > 0  # else all layers see everything
        out["sliding_window_pattern"] = file.integer("attention.sliding_window_pattern", 6) if slides else 1
    return out


def _gemma4(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    sliding = file.per_layer("attention.sliding_window_pattern", layers)
    wide = file.per_layer("feed_forward_length", layers)
    kv = file.per_layer("attention.head_count_kv", layers)
    full = next((i for i, slides in enumerate(sliding) if not slides), 0)
    factors = np.array(file.tensors[ROPE_FREQS].read().astype(mx.float32)) if ROPE_FREQS in file.tensors else np.ones(1)
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": [_SLIDING if slides else _FULL for slides in sliding],
        "head_dim": file.integer("attention.key_length_swa"),
        "global_head_dim": config["head_dim"],
        "num_key_value_heads": next((n for n, slides in zip(kv, sliding) if slides), kv[0]),
        "num_global_key_value_heads": kv[full],
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in file.tensors,
        "intermediate_size": wide[0],
        "use_double_wide_mlp": wide[-1] != wide[0],
        "vocab_size_per_layer_input": config["vocab_size"],
        "enable_moe_block": "num_experts" in config,
        "final_logit_softcapping": file.number("final_logit_softcapping", 30.0) or None,
        "rope_parameters": {
            # What is not rotated is divided by a huge number.
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": config["rope_theta"],
                "partial_rotary_factor": float((factors < 2).mean()),
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": file.number("rope.freq_base_swa", 10000.0)},
        },
    }


def _phi3(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    original = file.integer("rope.scaling.original_context_length", config["max_position_embeddings"])
    out: dict[str, Any] = {"original_max_position_embeddings": original}
    if window := file.integer("attention.sliding_window", 0):
        out["sliding_window"] = window
    return out


def _qwen35(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    every, layers = config["full_attention_interval"], config["num_hidden_layers"]
    linear = [(i + 1) % every != 0 for i in range(layers)]
    if file.value("attention.recurrent_layers", linear)[:layers] != linear:
        raise ModelError(f"{file.path}: its layers of linear attention do not follow an interval; mlx-lm needs one")
    out = {"linear_value_head_dim": file.integer("ssm.inner_size") // config["linear_num_value_heads"]}
    if file.architecture.nested:
        pairs = int(config["head_dim"] * config["partial_rotary_factor"]) // 2
        sections = file.value("rope.dimension_sections", rope_sections(pairs))
        kind = {"type": "default", "rope_type": "default", "mrope_section": sections[:3]}
        rope = {key: config[key] for key in ("rope_theta", "partial_rotary_factor")}
        out["rope_parameters"] = kind | {"mrope_interleaved": True} | rope
    return out


def _gpt_oss(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    usual = [i % SLIDING_EVERY == 0 for i in range(layers)]
    sliding = file.per_layer("attention.sliding_window_pattern", layers, usual)
    return {"layer_types": [_SLIDING if slides else _FULL for slides in sliding]}


def _glm4_moe(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    if file.integer("expert_gating_func", SIGMOID) != SIGMOID:
        raise ModelError(f"{file.path}: routes by something else than a sigmoid, which mlx-lm's model does not")
    return {"use_qk_norm": "blk.0.attn_q_norm.weight" in file.tensors}


_SLIDING, _FULL = "sliding_attention", "full_attention"
SIGMOID = 2  # of llama.cpp's ways to weight experts
_OWN = {
    "gemma2": _gemma,
    "gemma3": _gemma,
    "gemma4": _gemma4,
    "phi3": _phi3,
    "qwen3next": _qwen35,
    "qwen35": _qwen35,
    "qwen35moe": _qwen35,
    "gpt-oss": _gpt_oss,
    "glm4moe": _glm4_moe,
}


def _rope_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    arch = file.architecture
    if arch.name == "phi3":  # its divisors are tensors
        named = {"long_factor": ROPE_LONG, "short_factor": ROPE_SHORT} if ROPE_LONG in file.tensors else {}
        factors = {name: file.tensors[key].read().astype(mx.float32).tolist() for name, key in named.items()}
        return {"type": "longrope", **factors} if factors else None
    kind = file.value("rope.scaling.type", "none")
    if kind in ("linear", "yarn") and kind in arch.ropes:
        found = {"rope_type": kind, "factor": file.number("rope.scaling.factor")}
        if kind == "yarn":
            found["original_max_position_embeddings"] = file.integer("rope.scaling.original_context_length")
        if arch.name == "gpt-oss":
            found |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
        return found
    if kind != "none":
        raise ModelError(f"{file.path}: rope scaling {kind!r} is not read from .gguf files; use the safetensors folder")
    if ROPE_FREQS not in file.tensors or arch.name == "gemma4":
        return None
    # llama.cpp stores only the resulting divisors. Llama 3.1 to 3.3 differ only in the factor.
    seen = file.tensors[ROPE_FREQS].read().astype(mx.float32)
    scaling = {
        "rope_type": "llama3",
        "factor": float(mx.max(seen).item()),  # type: ignore[arg-type]
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = llama3_divisors(scaling, theta, head_dim)
    if seen.shape != (head_dim // 2,) or not mx.allclose(seen, mx.array(expected), rtol=1e-3).item():
        raise ModelError(f"{file.path}: {ROPE_FREQS} does not follow Llama 3's rule; use the safetensors folder")
    return scaling


def llama3_divisors(scaling: dict[str, Any], theta: float, head_dim: int) -> list[float]:
    """Return the head_dim / 2 divisors of Llama 3.1's rope frequencies.

    Long waves are stretched by the factor, short ones are not, and those between smoothly.
    """
    factor, original = scaling["factor"], scaling.get("original_max_position_embeddings", 8192)
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    waves = original / (2 * np.pi * theta ** (2 * np.arange(head_dim // 2) / head_dim))  # in the original context
    smooth = np.clip((waves - low) / (high - low), 0, 1)
    found: list[float] = (1 / ((1 - smooth) / factor + smooth)).tolist()
    return found


# --- gguf pretokenizers -----------------------------------------------------------------------------------------------
# The meaning of `tokenizer.ggml.pre` as pre-tokenizers of the `tokenizers` library, for reading and writing.
#
# Source of the patterns: llama.cpp's src/llama-vocab.cpp and the tokenizer.json files of the models it names.


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split before byte-level BPE.

    Attributes:
        splits: the pre-tokenizers in their order; the last is byte-level.
        ignore_merges: whether a piece that is a token is taken whole.
        add_bos: llama.cpp's default if a file does not say.
        nfc: whether letters and their marks are composed first.
    """

    splits: tuple[Any, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_SHORT_FORMS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# The same pattern as some files write it.
_SPELLED_OUT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level_split(regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def _split(pattern: str) -> tuple[Any, ...]:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated"), _byte_level_split(False)


def _gpt4(digits: str, letters: str = r"\p{L}") -> tuple[Any, ...]:
    """Return GPT-4's split; families differ in how many digits stay together, and in what belongs to a word."""
    words = letters if letters == r"\p{L}" else f"[{letters}]"
    words = rf"|[^\r\n\p{{L}}\p{{N}}]?{words}+|"
    return _split(_SHORT_FORMS + words + digits + rf"| ?[^\s{letters}\p{{N}}]+[\r\n" + _SPACES)


def _gpt4o(short_forms: str, digits: str) -> tuple[Any, ...]:
    """Return GPT-4o's split, which also splits words where small letters are followed by capital ones."""
    start, capitals, small = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    words = f"{start}{capitals}*{small}+{short_forms}|{start}{capitals}+{small}*{short_forms}|"
    return _split(words + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n/" + _SPACES)


# Of several names for the same split, the first one is written.
PRE_TOKENIZERS = {
    name: rule
    for names, rule in {
        "smollm refact starcoder command-r codeshell exaone minerva-7b mellum2": PreTokenizer(
            (pre_tokenizers.Digits(individual_digits=True), _byte_level_split(True))
        ),
        "gpt-2 phi-2 olmo mpt jais exaone4 mellum trillion granite-docling": PreTokenizer((_byte_level_split(True),)),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": PreTokenizer(
            _gpt4(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True
        ),
        "glm4": PreTokenizer(_gpt4(r"\p{N}{1,3}"), ignore_merges=True),
        "qwen2": PreTokenizer(_gpt4(r"\p{N}"), nfc=True),
        "deepseek-r1-qwen stablelm2 megrez hunyuan kormo": PreTokenizer(_gpt4(r"\p{N}")),
        "qwen35": PreTokenizer(_gpt4(r"\p{N}", r"\p{L}\p{M}"), nfc=True),
        "dbrx smaug-bpe chatglm-bpe": PreTokenizer(_gpt4(r"\p{N}{1,3}")),
        "tekken": PreTokenizer(_gpt4o("", r"\p{N}"), ignore_merges=True, add_bos=True),
        "gpt-4o llama4 kanana2": PreTokenizer(_gpt4o(f"{_SHORT_FORMS}?", r"\p{N}{1,3}")),
    }.items()
    for name in names.split()
}


def pre_tokenizer_of(tokenizer: dict[str, Any]) -> str | None:
    """Return the name of the pre-tokenizer in a tokenizer.json by what it does; None if it is not in the table."""
    seen = signature(tokenizer.get("pre_tokenizer"))
    ignoring = bool(tokenizer["model"].get("ignore_merges"))
    found = [n for n, rule in PRE_TOKENIZERS.items() if rule.ignore_merges == ignoring and seen == signature_of(rule)]
    # llama.cpp never composes letters and their marks (NFC); the name records whether the tokenizer does.
    nfc = "NFC" in json.dumps(tokenizer.get("normalizer"))
    return min(found, key=lambda name: PRE_TOKENIZERS[name].nfc != nfc, default=None)


def signature(step: dict[str, Any] | None) -> list[Any]:
    """Return what the steps of a tokenizer.json do, without what makes no difference."""
    if step is None:
        return []
    kind = step["type"]
    if kind == "Sequence":
        return [part for inner in step["pretokenizers"] for part in signature(inner)]
    if kind == "Split":
        pattern = step["pattern"].get("Regex", step["pattern"].get("String"))
        return [(kind, pattern.replace(_SPELLED_OUT, _SHORT_FORMS), step["behavior"], step["invert"])]
    if kind == "ByteLevel":
        return [(kind, step["add_prefix_space"], step.get("use_regex", True))]
    return [(kind, json.dumps({k: v for k, v in sorted(step.items()) if k != "type"}))]


def signature_of(rule: PreTokenizer) -> list[Any]:
    """Return the signature of a pre-tokenizer of the table."""
    return [part for split in rule.splits for part in signature(parse_json(split.__getstate__()))]


# --- gguf tokenizer ---------------------------------------------------------------------------------------------------
# The tokenizer in a .gguf file: byte-level BPE, or SentencePiece's BPE by its scores.

# token_type in the file; user-defined tokens are never split, like control tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"  # how SentencePiece writes a space
GEMMA4 = "gemma4"  # kind of a vocabulary of SentencePiece with its merges


def tokenizer(file: GgufFile) -> Any:
    """Build the file's tokenizer: mlx-lm's TokenizerWrapper around one of transformers.

    Raises:
        ModelError: the vocabulary or pre-tokenizer is not known here.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = file.value("tokenizer.ggml.tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ModelError(f"{file.path}: the vocabulary has a token twice; convert the model again")
    types = file.value("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    names: dict[str, str] = {}
    for role, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        if f"tokenizer.ggml.{key}_token_id" in file.metadata:
            names[f"{role}_token"] = tokens[file.integer(f"tokenizer.ggml.{key}_token_id")]
    kind = file.value("tokenizer.ggml.model")
    if kind not in _BACKENDS:
        raise ModelError(
            f"{file.path}: a vocabulary of kind {kind!r} is not read from .gguf files, only byte-level BPE ('gpt2') "
            "and SentencePiece's BPE ('llama', 'gemma4'); use the model's safetensors folder or hub id"
        )
    backend, add_bos = _BACKENDS[kind](file, vocab, types)
    _add_marks(file, backend, vocab, types)
    if (bos := names.get("bos_token")) is not None and file.value("tokenizer.ggml.add_bos_token", add_bos):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=file.integer("context_length"),
        clean_up_tokenization_spaces=False,
        **names,
    )
    if (template := file.metadata.get("tokenizer.chat_template")) is not None:
        fast.chat_template = template
    pieces = partial(SPMStreamingDetokenizer, trim_space=_prefixed(file))
    streaming = BPEStreamingDetokenizer if kind == "gpt2" else pieces
    return TokenizerWrapper(fast, streaming, eos_token_ids=eos_ids(file))


def _byte_level(file: GgufFile, vocab: dict[str, int], types: list[int]) -> tuple[Any, bool]:
    """Return byte-level BPE with the file's merges and pre-tokenizer, and whether bos is added by default."""
    pre = file.value("tokenizer.ggml.pre", "none")
    if pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"{file.path}: pre-tokenizer {pre!r} is unknown; expected one of {', '.join(PRE_TOKENIZERS)}; "
            "use the model's safetensors folder or hub id"
        )
    rule = PRE_TOKENIZERS[pre]
    merges = _listed_merges(file)
    out = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=rule.ignore_merges))
    out.pre_tokenizer = pre_tokenizers.Sequence(list(rule.splits))
    out.decoder = decoders.ByteLevel()
    if rule.nfc:
        out.normalizer = normalizers.NFC()
    return out, rule.add_bos


def _sentencepiece(file: GgufFile, vocab: dict[str, int], types: list[int]) -> tuple[Any, bool]:
    """Return SentencePiece's BPE: the pair with the highest score merges first, and unknown letters become bytes."""
    unknown = next((token for token, kind in zip(vocab, types) if kind == UNKNOWN), None)
    merges = _listed_merges(file) if _lists_merges(file) else _merges(vocab, types, file.value("tokenizer.ggml.scores"))
    out = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = _prefixed(file)
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefixed else []
    out.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        undo.append(decoders.Strip(" ", 1, 0))
    out.decoder = decoders.Sequence(undo)
    return out, True


def _prefixed(file: GgufFile) -> bool:
    """Return whether a space is put before the text, and removed when tokens become text."""
    return bool(file.value("tokenizer.ggml.add_space_prefix", not _lists_merges(file)))


def _lists_merges(file: GgufFile) -> bool:
    """Return whether SentencePiece's merges are listed, as Gemma 4's are, not only scored."""
    return bool(file.value("tokenizer.ggml.model") == GEMMA4)


def _listed_merges(file: GgufFile) -> list[tuple[str, str]]:
    merges = [(m[: m.find(" ", 1)], m[m.find(" ", 1) + 1 :]) for m in file.value("tokenizer.ggml.merges")]
    if any(" " not in m[1:] for m in file.value("tokenizer.ggml.merges")):
        raise ModelError(f"{file.path}: the vocabulary has a merge that is not a pair; convert the model again")
    return merges


def _merges(vocab: dict[str, int], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Return all pairs of tokens that make a token, in the order of its score."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, number in vocab.items():
        if types[number] != NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[number], left, right, token[:cut], token[cut:]))
    return [(left, right) for *_, left, right in sorted(found)]


_BACKENDS = {"gpt2": _byte_level, "llama": _sentencepiece, GEMMA4: _sentencepiece}


def _add_marks(file: GgufFile, backend: Any, vocab: dict[str, int], types: list[int]) -> None:
    """Add the tokens that are never split: special and user-defined ones."""
    control = [token for token, kind in zip(vocab, types) if kind in (CONTROL, UNKNOWN)]
    # Phi 3's marks include the space behind them; as in llama.cpp, only the file's name shows that.
    phi3 = re.search("phi-?3", str(file.value("general.name", "")), re.IGNORECASE) is not None
    greedy = [phi3 and token not in ("<unk>", "<s>", "<|endoftext|>") for token in control]
    marks = [AddedToken(token, normalized=False, special=True, rstrip=g) for token, g in zip(control, greedy)]
    backend.add_special_tokens(marks)
    # Not runs of spaces: the normalizer rewrites spaces, and merges make the runs.
    added = [token for token, kind in zip(vocab, types) if kind == USER_DEFINED and token.strip(f" {SPACE}")]
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])


# --- gguf -------------------------------------------------------------------------------------------------------------

_SLICE = 1 << 22  # numbers that are unpacked at once
_GROUP = 32  # numbers that share a scale in the types of _AFFINE
# Types that are scale * code + bias in groups of 32, as MLX packs weights -> bits of a code. The scales of K types are
# products, which float16 rounds; all other numbers stay what they are.
_AFFINE = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q8_0": 8}


def read_gguf(path: Path) -> GgufFile:
    """Read a file's metadata and table; its tensors are read when they are used.

    Raises:
        ModelError: the file is not GGUF, cut off or split, or its architecture or quantisation is not read here.
    """
    metadata, table = _joined(path)
    if odd := sorted(kind for kind in {entry.kind for entry in table.values()} if not _readable(kind)):
        raise ModelError(
            f"{path}: has tensors in {', '.join(odd)}, which cannot be read; take a file in another "
            "quantisation, or the model's safetensors"
        )
    file = GgufFile(path, table, metadata, _architecture(path, metadata))
    if metadata.get("general.type") == "adapter":
        raise ModelError(f"{path}: is an adapter, not a model: llama.cpp loads it beside its base (--lora)")
    return file


_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def shards(path: Path) -> list[Path]:
    """Return the files that a file's name belongs to: NAME-00001-of-00003.gguf and so on, or only itself."""
    if not (named := _SHARD.fullmatch(path.name)):
        return [path]
    return [path.with_name(f"{named[1]}-{i:05}-of-{named[3]}.gguf") for i in range(1, int(named[3]) + 1)]


def _joined(path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Read the header of a file, or of all files that it is a part of."""
    with _reading(path):
        metadata, table = read_gguf_header(path)
    keys = ("split.no", "split.count", "split.tensors.count")
    _, count, total = (metadata.get(key) for key in keys)
    if count in (None, 0, 1):
        return metadata, table
    if len(shards(path)) != count:
        raise ModelError(
            f"{path}: is one of {str(count)[:20]} parts, and its name does not say so; name all as they were "
            "(NAME-00001-of-00003.gguf and so on), or join them with llama-gguf-split --merge"
        )
    metadata, table = {}, {}
    for number, part in enumerate(shards(path)):
        if not part.is_file():
            raise ModelError(f"{part}: is missing, and {path.name} is one of {count} parts; download it, too")
        with _reading(part):
            own, tensors = read_gguf_header(part)
        metadata = metadata or own
        seen = [own.get(key) for key in keys]
        twice = sorted(set(table) & set(tensors))
        if seen != [number, count, total] or twice:
            what = f"holds {twice[0][:80]!r} again" if twice else f"says {dict(zip(keys, seen))}"
            raise ModelError(
                f"{part}: is not part {number + 1} of the {count} that {path.name} belongs to, with {total} tensors: "
                f"it {what}; download it again"
            )
        _check_kin(part, own, tensors, metadata, table)
        table |= tensors
    if len(table) != total:
        raise ModelError(f"{path}: its {count} parts hold {len(table)} tensors; expected {total}; download them again")
    return metadata, table


def _check_kin(
    part: Path, own: dict[str, Any], tensors: dict[str, Entry], metadata: dict[str, Any], table: dict[str, Entry]
) -> None:
    """Refuse a part that is not of the file whose other parts' settings and tensors are given.

    Only the first part says what the model is. Another's matrices show it: within a file some kinds of matrices have
    other types or shapes in other layers, but not all of them at once.
    """
    said = next((key for key in own if key != "split.no" and own[key] != metadata.get(key, own[key])), None)
    one, two = _forms(table), _forms(tensors)
    both = [name for name in one if len(one[name]) == len(two.get(name, ())) == 1]
    apart = len(both) > 2 and all(one[name] != two[name] for name in both)
    if not apart and said is None:
        return
    if said is None:
        (kind, shape), (other, form) = (next(iter(forms[both[0]])) for forms in (two, one))
        seen = f"holds {both[0]} as {kind} {shape}, the parts before it as {other} {form}"
    else:
        seen = f"says {str(own[said])[:40]} for {said[:80]}, the first part {str(metadata[said])[:40]}"
    raise ModelError(
        f"{part}: is a part of another file: it {seen}; download it again, or if it is right join the parts with "
        "llama-gguf-split --merge"
    )


def _forms(tensors: Mapping[str, Entry]) -> dict[str, set[tuple[str, tuple[int, ...]]]]:
    """Return the types and shapes that each kind of packed or half-precision matrix of a layer has in some layers."""
    found: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for name, entry in tensors.items():
        if (layer := re.match(r"blk\.\d+\.(.+)", name)) and len(entry.shape) > 1 and entry.kind != "F32":
            found.setdefault(layer[1], set()).add((entry.kind, entry.shape))
    return found


def _architecture(path: Path, metadata: dict[str, Any]) -> Architecture:
    name = metadata.get("general.architecture")
    mixture = bool(metadata.get(f"{name}.expert_count"))
    found = [a for a in ARCHITECTURES.values() if a.name == name]
    if not found:
        raise ModelError(
            f"{path}: architecture {str(name)[:80]!r} is not read from .gguf files, only "
            f"{', '.join(dict.fromkeys(a.name for a in ARCHITECTURES.values()))}; use the model's safetensors folder "
            "or hub id instead"
        )
    fitting = [a for a in found if a.mixture == mixture or not mixture]
    if not fitting:
        raise ModelError(f"{path}: a mixture of experts of {name} is not read from .gguf files; use its safetensors")
    return fitting[0]


def _readable(kind: str) -> bool:
    """Return whether the gguf package can unpack a type, by trying it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        number = GGMLQuantizationType[kind]
        dequantize(np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except (KeyError, NotImplementedError):
        return False
    return True


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what reading a damaged file raises into a ModelError."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, OverflowError, RuntimeError) as error:
        text = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(f"{path}: {text}; download it again") from error


def _unpacked(kind: str, data: Any, form: WeightForm | None, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Return rows of bytes (n, bytes) as floats, or packed; in the type's own form, codes stay what they are."""
    if kind == "MXFP4" and form == _own_form(kind):
        return _microscaled(data)
    if kind in _AFFINE:
        weight, *scales = _affine(kind, data)
        own = {"weight": weight, **{k: v.astype(dtype) for k, v in zip(("scales", "biases"), scales)}}
        _check_finite(kind, own["scales"], own["biases"])
        if form == _own_form(kind):
            return own
        if form is None and not kind.endswith("_K"):  # with the packed form's rounding: both are one model
            scales = [own["scales"], own["biases"]]
        value = mx.dequantize(weight, scales[0], scales[1], _GROUP, _AFFINE[kind])
        return {"weight": value.astype(dtype)} if form is None else pack_parts(value, form, dtype)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):
        value = mx.array(dequantize(data, GGMLQuantizationType[kind]))
    if form is not None:
        return pack_parts(value, form, dtype)
    value = value.astype(dtype)
    if kind not in ("F32", "F16", "BF16"):
        _check_finite(kind, value)
    return {"weight": value}


def _check_finite(kind: str, *values: mx.array) -> None:
    if not all(mx.isfinite(value).all().item() for value in values):
        raise ValueError(f"broken: a tensor in {kind} has values that are not finite")


def pack_parts(value: mx.array, form: WeightForm, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Quantise floats to the parameters of a packed layer, with scales and biases in `dtype`."""
    weight, *scales = mx.quantize(value, form.group_size, form.bits, mode=form.mode)
    affine = form.mode == "affine"
    return {"weight": weight, **{k: v.astype(dtype) if affine else v for k, v in zip(("scales", "biases"), scales)}}


def _affine(kind: str, data: Any) -> tuple[mx.array, mx.array, mx.array]:
    """Return rows of a type in _AFFINE as MLX packs them: weight, and float32 scales and biases.

    Source: the layouts of ggml/src/ggml-common.h. A block is its scales, then the fifth bits, then the lower four.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import Q4_K

    bits, rows, blocks = _AFFINE[kind], len(data), data.reshape(-1, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1])
    count, by_four = len(blocks), np.array([0, 4], np.uint8).reshape(2, 1)
    first, second = (np.ascontiguousarray(blocks[:, i : i + 2]).view(np.float16).astype(np.float32) for i in (0, 2))
    if kind.endswith("_K"):  # eight groups of 32
        scale, low = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
        scales, biases = first * scale, -second * low
        codes = (blocks[:, -128:].reshape(count, 4, 1, 32) >> by_four & 15).reshape(count, 8, 32)
        high = blocks[:, 16:48].reshape(count, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(8, 1) & 1
    else:
        scales, biases = first, second if kind.endswith("_1") else -(1 << bits - 1) * first
        codes = (blocks[:, -16:].reshape(count, 1, 16) >> by_four & 15).reshape(count, 1, 32)
        high = np.unpackbits(blocks[:, -20:-16].copy(), axis=-1, bitorder="little").reshape(count, 1, -1)
    if bits == 8:
        codes = blocks[:, 2:] ^ 128
    elif bits == 5:
        codes = codes | high << 4
    packed = pack_codes(mx.array(codes.reshape(rows, -1)), bits)
    return packed, mx.array(scales.reshape(rows, -1)), mx.array(biases.reshape(rows, -1))


def _microscaled(data: Any) -> dict[str, mx.array]:
    """Return rows of MXFP4 blocks (a scale, 16 bytes of codes) as MLX's form of the same name."""
    blocks = data.reshape(len(data), -1, 17)
    codes = (blocks[:, :, None, 1:] >> np.array([0, 4], np.uint8).reshape(2, 1) & 15).reshape(len(data), -1)
    return {"weight": pack_codes(mx.array(codes), 4), "scales": mx.array(np.ascontiguousarray(blocks[:, :, 0]))}


def _own_form(kind: str) -> WeightForm | None:
    """Return the form in which MLX holds a type as it is, if it has one."""
    if kind == "MXFP4":
        return WeightForm(4, _GROUP, "mxfp4")
    return WeightForm(_AFFINE[kind], _GROUP) if kind in _AFFINE else None


def _bits(kind: str) -> int:
    """Return the fewest bits of MLX's that hold a type's codes; 16 for floats."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind in _AFFINE:
        return _AFFINE[kind]
    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return next((bits for bits in (2, 3, 4, 5, 6, 8) if numbers > 1 and 8 * size // numbers <= bits), 16)


def weights(
    file: GgufFile,
    config: dict[str, Any],
    model: nn.Module,
    read: Callable[[str, Entry], dict[str, mx.array]],
    outline: bool = False,
) -> dict[str, mx.array]:
    """Return all tensors under the model's names, in the model's layout.

    Args:
        read: (module's path, tensor of its weight) -> weight, and if it is packed scales and biases.
        outline: whether these are lazy zeros, which must not be computed.
    """
    out, used, arch, get = dict[str, mx.array](), set[str](), file.architecture, getter(config)
    layers = get("num_hidden_layers")
    for ours, _ in tree_flatten(model.parameters()):
        path, _, leaf = ours.rpartition(".")
        names = arch.tensors(ours, layers)
        stored = [_halved(file, name) for name in names]
        if not names or any(name not in file.tensors for name, _ in stored):
            continue  # what is missing is named when the model is loaded
        used.update(name for name, _ in stored)
        pieces = []
        for name, half in stored:
            with _reading(file.path):
                found = read(path, file.tensors[name]) if leaf == "weight" else {leaf: file.tensors[name].read()}
            pieces.append(
                found if half is None else {k: mx.contiguous(v.split(2, axis=1)[half]) for k, v in found.items()}
            )
        try:
            whole = {k: mx.concatenate([piece[k] for piece in pieces]) for k in pieces[0]}
            for layout in reversed(arch.layouts(names[0])):
                whole = {k: layout.back(v, get) for k, v in whole.items()}
        except (KeyError, ValueError) as error:  # pieces packed in several ways, or blocks that are wider than a head
            raise ModelError(f"{file.path}: {names[0]} cannot be kept packed; read it as floats") from error
        if not outline:
            mx.eval(whole)  # so that no tensor is in memory in both layouts
        out |= {f"{path}.{key}": value for key, value in whole.items()}
    if unknown := set(file.tensors) - used - set(ROPE_TENSORS) - _predicting(file, layers):
        shown = ", ".join(sorted(unknown)[:5])
        raise ModelError(f"{file.path}: has {len(unknown)} tensors unknown to {arch.model_type} ({shown})")
    return out


def _halved(file: GgufFile, name: str) -> tuple[str, int | None]:
    """Return which tensor of the file holds one, and which half: experts' gate and up may be one tensor."""
    for at, half in enumerate(("ffn_gate_exps", "ffn_up_exps")):
        both = name.replace(half, "ffn_gate_up_exps")
        if name not in file.tensors and both != name and both in file.tensors:
            return both, at
    return name, None


def _predicting(file: GgufFile, layers: int) -> set[str]:
    """Return the tensors of layers that predict further tokens, which mlx-lm's models do not have."""
    numbers = {name: re.match(r"blk\.(\d{1,9})\.", name) for name in file.tensors}
    beyond = file.integer("nextn_predict_layers", 0) > 0
    return {name for name, number in numbers.items() if beyond and number and int(number[1]) >= layers}


def _numbers(file: GgufFile, kind: Callable[[Entry], Any]) -> Counter[Any]:
    """Count a file's numbers by a kind of its tensors."""
    sizes: Counter[Any] = Counter()
    for entry in file.tensors.values():
        sizes[kind(entry)] += math.prod(entry.shape)
    return sizes


def own_dtype(file: GgufFile) -> Any:
    """Return the type in which a file's floats are loaded: bfloat16 if most of them are, else float16."""
    sizes = _numbers(file, lambda entry: entry.dtype)
    return mx.bfloat16 if sizes[mx.bfloat16] > sizes[mx.float16] else mx.float16


def usual_bits(file: GgufFile) -> tuple[int, int]:
    """Return in how many bits MLX holds most of a file's numbers (16: floats), and how many numbers it has."""
    sizes = _numbers(file, lambda entry: _bits(entry.kind))
    return sizes.most_common(1)[0][0], sizes.total()


def _chooser(
    file: GgufFile, model: nn.Module, bits: int | None, group_size: int | None
) -> Callable[[str, Entry], WeightForm | None]:
    """Return which tensors are packed, and how; see `model_from_gguf`."""
    modules, rule = dict(model.named_modules()), getattr(model, "quant_predicate", None)
    as_it_is = bits is None or (usual_bits(file)[0] == bits and group_size in (None, _GROUP))

    def form(path: str, entry: Entry) -> WeightForm | None:
        group = _GROUP if as_it_is else group_size or 64
        if bits == 0 or not hasattr(modules[path], "to_quantized") or entry.shape[-1] % group:
            return None
        if as_it_is:
            own, needed = _own_form(entry.kind), _bits(entry.kind)
            return own or (WeightForm(max(needed, bits), _GROUP) if bits and needed < 16 else None)
        chosen: Any = True if rule is None else rule(path, modules[path])
        if isinstance(chosen, dict):
            return WeightForm(chosen["bits"], chosen["group_size"], chosen.get("mode", "affine"))
        return WeightForm(bits or 4, group) if chosen else None

    return form


def model_from_gguf(
    file: GgufFile, bits: int | None = 0, group_size: int | None = None, *, outline: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Return mlx-lm's model with the file's tensors, and its config.

    Args:
        bits: of the layers' weights: 0 for floats, None for the file's own where MLX has the same form. If most numbers
            of the file have so many bits, tensors keep their form where MLX has it, and others get as many bits as they
            have, at least `bits`; else all are quantised again.
        group_size: of numbers that share a scale; None: 32 for what keeps its own bits, else 64.
        outline: read no weights; the model's arrays are lazy zeros.
    """
    settings = config(file)
    check_schema(ModelConfig, settings, file.path)
    module = importlib.import_module(f"mlx_lm.models.{settings['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(settings))
    choose, layers = _chooser(file, model, bits, group_size), dict[str, WeightForm | None]()

    def read(path: str, entry: Entry) -> dict[str, mx.array]:
        layers.setdefault(path, choose(path, entry))  # one form for all tensors of a joined layer
        return entry.outline(layers[path]) if outline else entry.parts(layers[path])

    tensors = weights(file, settings, model, read, outline)
    if hasattr(model, "sanitize"):
        tensors = model.sanitize(tensors)
    if packed := {path: own.settings for path, own in layers.items() if own is not None}:
        nn.quantize(model, class_predicate=lambda path, _: packed.get(path, False))
        usual = [form for form in packed.values() if form["bits"] == bits] or [*packed.values()]
        settings["quantization"] = quantization_of(model, max(usual, key=usual.count))
    try:
        model.load_weights(list(tensors.items()), strict=True)
    except ValueError as error:
        raise ModelError(f"{file.path}: the tensors do not fit the metadata: {error}") from error
    return model, settings
