"""Read .gguf files: header, settings, tokenizer and tensors; and the tables of names that writing them uses, too."""

from __future__ import annotations

import importlib
import json
import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer, TokenizerWrapper
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mlxft.errors import ModelError
from mlxft.model.folder import ModelConfig, check_schema
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


class PackedForm(NamedTuple):
    """How MLX packs a layer's weights."""

    bits: int
    group_size: int
    mode: str = "affine"


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

    def parts(self, form: PackedForm | None = None) -> dict[str, mx.array]:
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

    def outline(self, form: PackedForm | None = None) -> dict[str, mx.array]:
        """Return what `parts` returns as lazy zeros; nothing is read."""
        zeros = mx.zeros(self.shape, self.dtype)
        return {"weight": zeros} if form is None else pack(zeros, form, self.dtype)


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
# Layouts of the model families in .gguf files, for reading and writing, as llama.cpp's convert_hf_to_gguf.py has them.
# The names of tensors are the gguf package's.

# Tensors of the rope, which are settings in a config.
ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)


@dataclass(frozen=True)
class Architecture:
    """Names and layout of the tensors for one value of `general.architecture`.

    Attributes:
        permuted: projections whose rows llama.cpp reorders for its rope -> the config key of their number of heads.
        shifted: whether norms are stored with 1 added, which the model itself adds.
    """

    name: str
    model_type: str
    hf_class: str
    permuted: dict[str, str] = field(default_factory=dict)
    shifted: bool = False

    def theirs(self, ours: str, layers: int) -> str | None:
        """Return llama.cpp's name of a module, without .weight or .bias; None if the family has no such module."""
        return _names(self.name, layers).get_name(ours.removeprefix("language_model."))

    def heads(self, theirs: str, config: dict[str, Any]) -> int | None:
        """Return the number of heads within which a tensor's rows are reordered; None if they are not."""
        key = self.permuted.get(theirs.rpartition(".")[0].rpartition(".")[2])
        return None if key is None else int(config.get(key) or config["num_attention_heads"])

    def is_shifted(self, theirs: str) -> bool:
        """Return whether a tensor belongs to a norm that is stored with 1 added."""
        return self.shifted and theirs.endswith("_norm.weight")


@lru_cache
def _names(arch: str, layers: int) -> Any:
    from gguf import MODEL_ARCH, get_tensor_name_map

    return get_tensor_name_map(MODEL_ARCH[arch.upper()], layers)


_LLAMA_HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("llama", "llama", "LlamaForCausalLM", _LLAMA_HEADS),
        Architecture("qwen2", "qwen2", "Qwen2ForCausalLM"),
        Architecture("qwen3", "qwen3", "Qwen3ForCausalLM"),
        Architecture("gemma2", "gemma2", "Gemma2ForCausalLM", shifted=True),
        Architecture("gemma3", "gemma3_text", "Gemma3ForCausalLM", shifted=True),
        Architecture("phi3", "phi3", "Phi3ForCausalLM"),
    )
}
# model_type in config.json -> general.architecture
MODEL_TYPES = {a.model_type: a.name for a in ARCHITECTURES.values()} | {"mistral": "llama", "gemma3": "gemma3"}
# Gemma's attention has a scale of its own, which llama.cpp derives from the number of layers: models with these numbers
# use hidden / heads, all others the width of a head.
GEMMA_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


def permute(tensor: mx.array, heads: int) -> mx.array:
    """Reorder rows from (heads, 2, half) to (heads, half, 2): the rope rotates halves, and in llama.cpp neighbours.

    Packed weights, scales, biases and bias vectors all have the output rows first, so one rule covers them.
    """
    rows = tensor.shape[0]
    return tensor.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def unpermute(tensor: mx.array, heads: int) -> mx.array:
    """Undo `permute`."""
    rows = tensor.shape[0]
    return tensor.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(tensor.shape)


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
        if not isinstance(found, int):
            raise ModelError(f"{self.path}: {self._full(key)} is {str(found)[:80]}; expected a whole number")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        # Stored as float32: 7 digits restore 1e-05.
        return float(f"{self.value(key, default):.7g}")


def config(file: GgufFile) -> dict[str, Any]:
    """Return a config.json that transformers and mlx-lm both read (with the rope's older names)."""
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path}: no token_embd.weight; this is not a language model's file")
    hidden, heads = file.integer("embedding_length"), file.integer("attention.head_count")
    theta = file.number("rope.freq_base", 10000.0)
    phi3 = file.architecture.name == "phi3"
    # Phi 3 rotates only a part of each head.
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
        "rope_scaling": _rope_scaling(file, theta, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "float16",
    }
    out.update(_FAMILIES.get(file.architecture.name, lambda *_: {})(file, out))
    for name in ("bos", "eos", "padding"):
        if f"tokenizer.ggml.{name}_token_id" in file.metadata:
            out[f"{'pad' if name == 'padding' else name}_token_id"] = file.integer(f"tokenizer.ggml.{name}_token_id")
    if len(stops := eos_ids(file)) > 1:
        out["eos_token_id"] = stops
    return out


def eos_ids(file: GgufFile) -> list[int]:
    """Return the ids that end a completion: end of text and, if the file has one, end of turn."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
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


def _rope_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    if file.architecture.name == "phi3":  # its divisors are tensors
        named = {"long_factor": ROPE_LONG, "short_factor": ROPE_SHORT} if ROPE_LONG in file.tensors else {}
        factors = {name: file.tensors[key].read().astype(mx.float32).tolist() for name, key in named.items()}
        return {"type": "longrope", **factors} if factors else None
    kind = file.value("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        found = {"rope_type": kind, "factor": file.number("rope.scaling.factor")}
        if kind == "yarn":
            found["original_max_position_embeddings"] = file.integer("rope.scaling.original_context_length")
        return found
    if kind != "none":
        raise ModelError(f"{file.path}: rope scaling {kind!r} is not read from .gguf files; use the safetensors folder")
    if ROPE_FREQS not in file.tensors:
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
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level_split(regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def _split(pattern: str) -> tuple[Any, ...]:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated"), _byte_level_split(False)


def _gpt4(digits: str) -> tuple[Any, ...]:
    """Return GPT-4's split; families differ in how many digits stay together."""
    return _split(_SHORT_FORMS + _LETTERS + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n" + _SPACES)


def _gpt4o(short_forms: str, digits: str) -> tuple[Any, ...]:
    """Return GPT-4o's split, which also splits words where small letters are followed by capital ones."""
    start, capitals, small = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    words = f"{start}{capitals}*{small}+{short_forms}|{start}{capitals}+{small}*{short_forms}|"
    return _split(words + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n/" + _SPACES)


_LLAMA3 = PreTokenizer(_gpt4(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
# Of several names for the same split, the first one is written.
PRE_TOKENIZERS = {
    "smollm": PreTokenizer((pre_tokenizers.Digits(individual_digits=True), _byte_level_split(True))),
    "gpt-2": PreTokenizer((_byte_level_split(True),)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": PreTokenizer(_gpt4(r"\p{N}"), nfc=True),
    "deepseek-r1-qwen": PreTokenizer(_gpt4(r"\p{N}")),
    "dbrx": PreTokenizer(_gpt4(r"\p{N}{1,3}")),
    "tekken": PreTokenizer(_gpt4o("", r"\p{N}"), ignore_merges=True, add_bos=True),
    "gpt-4o": PreTokenizer(_gpt4o(f"{_SHORT_FORMS}?", r"\p{N}{1,3}")),
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
            "and SentencePiece's BPE ('llama'); use the model's safetensors folder or hub id"
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
    merges = [tuple(merge.split(" ", 1)) for merge in file.value("tokenizer.ggml.merges")]
    if any(len(pair) != 2 for pair in merges):
        raise ModelError(f"{file.path}: the vocabulary has a merge that is not a pair; convert the model again")
    out = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=rule.ignore_merges))
    out.pre_tokenizer = pre_tokenizers.Sequence(list(rule.splits))
    out.decoder = decoders.ByteLevel()
    if rule.nfc:
        out.normalizer = normalizers.NFC()
    return out, rule.add_bos


def _sentencepiece(file: GgufFile, vocab: dict[str, int], types: list[int]) -> tuple[Any, bool]:
    """Return SentencePiece's BPE: the pair with the highest score merges first, and unknown letters become bytes."""
    unknown = next((token for token, kind in zip(vocab, types) if kind == UNKNOWN), None)
    merges = _merges(vocab, types, file.value("tokenizer.ggml.scores"))
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
    return bool(file.value("tokenizer.ggml.add_space_prefix", True))


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


_BACKENDS = {"gpt2": _byte_level, "llama": _sentencepiece}


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
    with _reading(path):
        metadata, table = read_gguf_header(path)
    if odd := sorted(kind for kind in {entry.kind for entry in table.values()} if not _readable(kind)):
        raise ModelError(
            f"{path}: has tensors in {', '.join(odd)}, which cannot be read; take a file in another "
            "quantisation, or the model's safetensors"
        )
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ModelError(
            f"{path}: architecture {name!r} is not read from .gguf files, only {', '.join(ARCHITECTURES)}; "
            "use the model's safetensors folder or hub id instead"
        )
    file = GgufFile(path, table, metadata, ARCHITECTURES[name])
    if metadata.get("general.type") == "adapter":
        raise ModelError(f"{path}: is an adapter, not a model: llama.cpp loads it beside its base (--lora)")
    if (parts := file.integer("split.count", 1)) > 1:
        raise ModelError(f"{path}: is one of {parts} parts; join them with llama-gguf-split --merge")
    if file.integer("expert_count", 0) > 0:
        raise ModelError(f"{path}: a mixture of experts is not read from .gguf files; use its safetensors")
    return file


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


def _unpacked(kind: str, data: Any, form: PackedForm | None, dtype: mx.Dtype) -> dict[str, mx.array]:
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
        return {"weight": value.astype(dtype)} if form is None else pack(value, form, dtype)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):
        value = mx.array(dequantize(data, GGMLQuantizationType[kind]))
    if form is not None:
        return pack(value, form, dtype)
    value = value.astype(dtype)
    if kind not in ("F32", "F16", "BF16"):
        _check_finite(kind, value)
    return {"weight": value}


def _check_finite(kind: str, *values: mx.array) -> None:
    if not all(mx.isfinite(value).all().item() for value in values):
        raise ValueError(f"broken: a tensor in {kind} has values that are not finite")


def pack(value: mx.array, form: PackedForm, dtype: mx.Dtype) -> dict[str, mx.array]:
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
    packed = _packed(codes.reshape(rows, -1), bits)
    return packed, mx.array(scales.reshape(rows, -1)), mx.array(biases.reshape(rows, -1))


def _packed(codes: Any, bits: int) -> mx.array:
    """Return codes (n, width) of 4, 5 or 8 bits as MLX stores them: a stream of bits, the lowest first, in uint32."""
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    elif bits == 5:
        stream = codes[..., None] >> np.arange(5, dtype=np.uint8) & 1
        codes = np.packbits(stream.reshape(len(codes), -1), axis=-1, bitorder="little")
    return mx.array(np.ascontiguousarray(codes).view(np.uint32))


def _microscaled(data: Any) -> dict[str, mx.array]:
    """Return rows of MXFP4 blocks (a scale, 16 bytes of codes) as MLX's form of the same name."""
    blocks = data.reshape(len(data), -1, 17)
    codes = (blocks[:, :, None, 1:] >> np.array([0, 4], np.uint8).reshape(2, 1) & 15).reshape(len(data), -1)
    return {"weight": _packed(codes, 4), "scales": mx.array(np.ascontiguousarray(blocks[:, :, 0]))}


def _own_form(kind: str) -> PackedForm | None:
    """Return the form in which MLX holds a type as it is, if it has one."""
    if kind == "MXFP4":
        return PackedForm(4, _GROUP, "mxfp4")
    return PackedForm(_AFFINE[kind], _GROUP) if kind in _AFFINE else None


def _bits(kind: str) -> int:
    """Return the fewest bits of MLX's that hold a type's codes; 16 for floats."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind in _AFFINE:
        return _AFFINE[kind]
    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return next((bits for bits in (2, 3, 4, 5, 6, 8) if numbers > 1 and 8 * size // numbers <= bits), 16)


def weights(
    file: GgufFile, config: dict[str, Any], model: nn.Module, read: Callable[[str, Entry], dict[str, mx.array]]
) -> dict[str, mx.array]:
    """Return all tensors under the model's names, without llama.cpp's order of rows and shifted norms.

    Args:
        read: (module's path, tensor of its weight) -> weight, and if it is packed scales and biases.
    """
    out, unknown = dict[str, mx.array](), list[str]()
    layers = config["num_hidden_layers"]
    ours = {file.architecture.theirs(path, layers): path for path, _ in model.named_modules()}
    for name, entry in file.tensors.items():
        if name in ROPE_TENSORS:
            continue
        stem, _, part = name.rpartition(".")
        if stem not in ours:
            unknown.append(name)
            continue
        with _reading(file.path):
            found = read(ours[stem], entry) if part == "weight" else {part: entry.read()}
        for leaf, value in found.items():
            if (heads := file.architecture.heads(name, config)) is not None:
                value = unpermute(value, heads)
            shifted = file.architecture.is_shifted(name)
            out[f"{ours[stem]}.{leaf}"] = value.astype(mx.float32) - 1 if shifted else value
    if unknown:
        shown = ", ".join(sorted(unknown)[:5])
        raise ModelError(f"{file.path}: has {len(unknown)} tensors unknown to {config['model_type']} ({shown})")
    return out


def own_dtype(file: GgufFile) -> Any:
    """Return the type in which a file's floats are loaded: bfloat16 if most of them are, else float16."""
    sizes: Counter[Any] = Counter()
    for entry in file.tensors.values():
        sizes[entry.dtype] += math.prod(entry.shape)
    return mx.bfloat16 if sizes[mx.bfloat16] > sizes[mx.float16] else mx.float16


def _chooser(
    file: GgufFile, model: nn.Module, bits: int | None, group_size: int | None
) -> Callable[[str, Entry], PackedForm | None]:
    """Return which tensors are packed, and how; see `model_from_gguf`."""
    sizes: Counter[int] = Counter()
    for entry in file.tensors.values():
        sizes[_bits(entry.kind)] += math.prod(entry.shape)
    modules, rule = dict(model.named_modules()), getattr(model, "quant_predicate", None)
    as_it_is = bits is None or (sizes.most_common(1)[0][0] == bits and group_size in (None, _GROUP))

    def form(path: str, entry: Entry) -> PackedForm | None:
        group = _GROUP if as_it_is else group_size or 64
        if bits == 0 or not hasattr(modules[path], "to_quantized") or entry.shape[-1] % group:
            return None
        if as_it_is:
            own, needed = _own_form(entry.kind), _bits(entry.kind)
            return own or (PackedForm(max(needed, bits), _GROUP) if bits and needed < 16 else None)
        chosen: Any = True if rule is None else rule(path, modules[path])
        if isinstance(chosen, dict):
            return PackedForm(chosen["bits"], chosen["group_size"], chosen.get("mode", "affine"))
        return PackedForm(bits or 4, group) if chosen else None

    return form


def model_from_gguf(
    file: GgufFile, bits: int | None = 0, group_size: int | None = None, *, outline: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Return mlx-lm's model with the file's tensors, and its config.

    Args:
        bits: of the layers' weights: 0 for floats, None for the file's own where MLX has the same form. If most numbers
            of the file have so many bits, each tensor keeps its own, but gets `bits` if it has fewer; else all are
            quantised again.
        group_size: of numbers that share a scale; None: 32 for what keeps its own bits, else 64.
        outline: read no weights; the model's arrays are lazy zeros.
    """
    settings = config(file)
    check_schema(ModelConfig, settings, file.path)
    module = importlib.import_module(f"mlx_lm.models.{settings['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(settings))
    choose, layers = _chooser(file, model, bits, group_size), dict[str, PackedForm | None]()

    def read(path: str, entry: Entry) -> dict[str, mx.array]:
        layers[path] = choose(path, entry)
        return entry.outline(layers[path]) if outline else entry.parts(layers[path])

    tensors = weights(file, settings, model, read)
    if hasattr(model, "sanitize"):
        tensors = model.sanitize(tensors)
    if kinds := Counter(own for own in layers.values() if own is not None):
        # As in any MLX folder, the most common form is on top, and other layers are listed by name.
        most = max(kinds, key=lambda own: (own.bits == bits, kinds[own]))._asdict()
        able = {path for path, layer in model.named_modules() if hasattr(layer, "to_quantized")}
        forms = {path: own._asdict() if own else False for path, own in layers.items() if path in able}
        nn.quantize(model, class_predicate=lambda path, _: forms.get(path, False))
        settings["quantization"] = most | {path: own for path, own in forms.items() if own != most}
    try:
        model.load_weights(list(tensors.items()), strict=True)
    except ValueError as error:
        raise ModelError(f"{file.path}: the tensors do not fit the metadata: {error}") from error
    return model, settings
