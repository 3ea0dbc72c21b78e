"""Read .gguf files: header, names, settings, tokenizer and tensors."""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxft.errors import ModelError
from mlxft.model.folder import ModelConfig, check_schema
from mlxft.text import parse_json

# --- gguf header ------------------------------------------------------------------------------------------------------
# The head of a .gguf file: its metadata, and the table of tensors.
#
# The gguf package has a reader too, which takes 6 s for the 98,000 tokens and merges of SmolLM2; this one takes 0.2 s.
# Its own check of the table is what MLX's reader lacks: that one believes whatever a file says.
# Layout: ggml/docs/gguf.md, versions 2 and 3, little-endian.

# Format of a metadata value by its type number; 8 is a string, 9 an array.
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
_STRING, _ARRAY = 8, 9
_MOST = 1 << 24  # bytes of a string or of an array's numbers, strings of an array; a broken file may claim petabytes
MOST_DIMENSIONS = 4  # of a tensor, as in ggml


class Entry(NamedTuple):
    """A line of the table: type of a tensor ("Q4_1"; "type 99" where it has no name), shape, place in the file."""

    kind: str
    shape: tuple[int, ...]
    offset: int


def read_gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Read a file's metadata, as Python has it, and its table: tensor name -> entry.

    Raises:
        ValueError: not GGUF of version 2 or 3, cut off within its head, or its table is not true to the file.
    """
    with open(path, "rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(f"not a GGUF file: it starts with {magic!r}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            head, end = _Head(data, 4), len(data)
            version, tensors, pairs = head.numbers("IQQ")
            if version not in (2, 3):
                raise ValueError(f"GGUF version {version}; only 2 and 3 are known")
            metadata = _once((head.string(), head.value(*head.numbers("I"))) for _ in range(pairs))
            table = _once(head.tensor() for _ in range(tensors))
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
        if name in out:  # MLX might read the other one, which nobody has checked
            raise ValueError(f"broken: {name[:80]!r} stands in it twice")
        out[name] = value
    return out


def _check_places(table: dict[str, Entry], free: int, end: int) -> None:
    from gguf import GGML_QUANT_SIZES

    sizes = {kind.name: size for kind, size in GGML_QUANT_SIZES.items()}
    for name, (kind, shape, offset) in sorted(table.items(), key=lambda item: item[1].offset):
        if offset < free:
            raise ValueError(f"broken: the tensor {name[:80]!r} overlaps another one")
        items, size = sizes.get(kind, (1, 0))
        free = offset + -(-math.prod(shape) // items) * size
        if free > end:
            raise ValueError(f"broken or cut off: the tensor {name[:80]!r} reaches beyond the file's end")


@dataclass
class _Head:
    """A file and how far it is read; what is not there is a ValueError."""

    data: mmap.mmap
    at: int

    def take(self, length: int) -> bytes:
        found = self.data[self.at : self.at + length] if length <= _MOST else b""
        if len(found) != length:
            raise ValueError("cut off or broken within its head")
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
        if inner == _ARRAY:  # nobody writes them, and MLX's reader calls itself for each level
            raise ValueError("broken: an array of arrays in its metadata")
        if count > _MOST:
            raise ValueError("cut off or broken within its head")
        if inner in _NUMBERS:
            return list(self.numbers(f"{count}{_NUMBERS[inner]}"))
        return [self.value(inner) for _ in range(count)]

    def tensor(self) -> tuple[str, Entry]:
        from gguf import GGMLQuantizationType

        name = self.string()
        (dimensions,) = self.numbers("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"broken: a tensor of {dimensions:,} dimensions; expected at most {MOST_DIMENSIONS}")
        shape = self.numbers(f"{dimensions}Q")[::-1]  # the innermost comes first
        number, offset = self.numbers("IQ")
        kind = next((t.name for t in GGMLQuantizationType if t == number), f"type {number}")
        return name, Entry(kind, shape, offset)


# --- gguf names -------------------------------------------------------------------------------------------------------
# Layouts of the model families in .gguf files, for reading and writing alike. The names of their tensors are the gguf
# package's.
#
# Source of the layouts: llama.cpp's convert_hf_to_gguf.py.

# Tensors that belong to the rope; in a config they are settings.
ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)


@dataclass(frozen=True)
class Architecture:
    """One value of `general.architecture`: how its tensors are called and laid out.

    Attributes:
        permuted: projections whose rows llama.cpp reorders for its rope -> the config key of their number of heads.
        shifted: norms that the model adds 1 to are stored with the 1 added.
    """

    name: str
    model_type: str
    hf_class: str
    permuted: dict[str, str] = field(default_factory=dict)
    shifted: bool = False

    def theirs(self, ours: str, layers: int) -> str | None:
        """Their name of one of our modules, without .weight or .bias; None where the family has no such."""
        return _names(self.name, layers).get_name(ours.removeprefix("language_model."))

    def heads(self, theirs: str, config: dict[str, Any]) -> int | None:
        """How many heads the rows of a tensor are reordered within; None where they are not."""
        key = self.permuted.get(theirs.rpartition(".")[0].rpartition(".")[2])
        return None if key is None else int(config.get(key) or config["num_attention_heads"])

    def is_shifted(self, theirs: str) -> bool:
        """Whether a tensor is a norm's that is stored with 1 added."""
        return self.shifted and theirs.endswith("_norm.weight")


@lru_cache
def _names(arch: str, layers: int) -> Any:
    from gguf import MODEL_ARCH, get_tensor_name_map

    return get_tensor_name_map(MODEL_ARCH[arch.upper()], layers)


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture(
            "llama",
            "llama",
            "LlamaForCausalLM",
            {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
        ),
        Architecture("qwen2", "qwen2", "Qwen2ForCausalLM"),
        Architecture("qwen3", "qwen3", "Qwen3ForCausalLM"),
        Architecture("gemma2", "gemma2", "Gemma2ForCausalLM", shifted=True),
        Architecture("gemma3", "gemma3_text", "Gemma3ForCausalLM", shifted=True),
        Architecture("phi3", "phi3", "Phi3ForCausalLM"),
    )
}
# model_type in config.json -> general.architecture
MODEL_TYPES = {a.model_type: a.name for a in ARCHITECTURES.values()} | {"mistral": "llama", "gemma3": "gemma3"}
# Gemma sets the scale of its attention itself; llama.cpp knows it by the number of layers: these take hidden / heads,
# all others the width of a head.
GEMMA_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


def permute(tensor: mx.array, heads: int) -> mx.array:
    """Rows (heads, 2, half) to (heads, half, 2): Hugging Face's rope turns halves, llama.cpp's turns neighbours.

    Packed weights, scales, biases and bias vectors all have the output rows first, so one rule serves them.
    """
    rows = tensor.shape[0]
    return tensor.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def unpermute(tensor: mx.array, heads: int) -> mx.array:
    """The way back from `permute`."""
    rows = tensor.shape[0]
    return tensor.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def architecture(name: object, what: str) -> Architecture:
    """The family of a `general.architecture`.

    Raises:
        ModelError: not one of those known here; `what` says where it stands.
    """
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ModelError(
            f"{what}: architecture {name!r} is not read from .gguf files, only {', '.join(ARCHITECTURES)}; "
            "use the model's safetensors folder or hub id instead"
        )
    return ARCHITECTURES[name]


# --- gguf config ------------------------------------------------------------------------------------------------------
# The hyper-parameters of a .gguf file as a config.json.


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
        return self.metadata[full]

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


# --- gguf pretokenizers -----------------------------------------------------------------------------------------------
# What `tokenizer.ggml.pre` stands for, in the steps of the `tokenizers` library; read in both directions.
#
# Source of the patterns: llama.cpp's src/llama-vocab.cpp and the tokenizer.json files of the models it names.


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before byte-level BPE.

    Attributes:
        steps: the pre-tokenizers, in their order.
        ignore_merges: a piece that is a token is taken whole.
        add_bos: what llama.cpp does where a file does not say.
    """

    steps: Callable[[], list[Any]]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


def _byte_level_split(regex: bool) -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def _smollm() -> list[Any]:
    from tokenizers import pre_tokenizers

    return [pre_tokenizers.Digits(individual_digits=True), _byte_level_split(True)]


_SHORT_FORMS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# The same, as some files spell it.
_SPELLED_OUT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> Callable[[], list[Any]]:
    def steps() -> list[Any]:
        from tokenizers import Regex, pre_tokenizers

        return [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), _byte_level_split(False)]

    return steps


def _gpt4(digits: str) -> Callable[[], list[Any]]:
    """GPT-4's pattern; families differ in how many digits stand together."""
    return _split(_SHORT_FORMS + _LETTERS + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n" + _SPACES)


def _gpt4o(short_forms: str, digits: str) -> Callable[[], list[Any]]:
    """GPT-4o's pattern, which parts words at a change from small to capital letters."""
    start, capitals, small = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    words = f"{start}{capitals}*{small}+{short_forms}|{start}{capitals}+{small}*{short_forms}|"
    return _split(words + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n/" + _SPACES)


_LLAMA3 = PreTokenizer(_gpt4(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
# The first name of several that mean the same is the one that is written.
PRE_TOKENIZERS = {
    "smollm": PreTokenizer(_smollm),
    "gpt-2": PreTokenizer(lambda: [_byte_level_split(True)]),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": PreTokenizer(_gpt4(r"\p{N}"), nfc=True),
    "deepseek-r1-qwen": PreTokenizer(_gpt4(r"\p{N}")),
    "dbrx": PreTokenizer(_gpt4(r"\p{N}{1,3}")),
    "tekken": PreTokenizer(_gpt4o("", r"\p{N}"), ignore_merges=True, add_bos=True),
    "gpt-4o": PreTokenizer(_gpt4o(f"{_SHORT_FORMS}?", r"\p{N}{1,3}")),
}


def recognise(tokenizer: dict[str, Any]) -> str | None:
    """The name of the pre-tokenizer in a tokenizer.json, by what it does; None where it is none of these."""
    seen = signature(tokenizer.get("pre_tokenizer"))
    ignoring = bool(tokenizer["model"].get("ignore_merges"))
    found = [
        name for name, rule in PRE_TOKENIZERS.items() if rule.ignore_merges == ignoring and seen == signature_of(rule)
    ]
    # llama.cpp does not compose letters and their marks (NFC) for any; the name keeps who does.
    nfc = "NFC" in json.dumps(tokenizer.get("normalizer"))
    return min(found, key=lambda name: PRE_TOKENIZERS[name].nfc != nfc, default=None)


def signature(step: dict[str, Any] | None) -> list[Any]:
    """What steps of a tokenizer.json do, whatever else they say."""
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
    """The same of one of those above."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    probe = Tokenizer(models.BPE())
    probe.pre_tokenizer = pre_tokenizers.Sequence(rule.steps())
    return signature(parse_json(probe.to_str())["pre_tokenizer"])


# --- gguf tokenizer ---------------------------------------------------------------------------------------------------
# The tokenizer in a .gguf file: byte-level BPE, or SentencePiece's BPE by its scores.

# token_type in the file: 3 is a control token, 4 one that the maker added as it stands.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"  # how SentencePiece writes a space


def tokenizer(file: GgufFile) -> Any:
    """The file's tokenizer, as mlx-lm's TokenizerWrapper around a transformers one.

    Raises:
        ModelError: a vocabulary or pre-tokenizer that is not known here.
    """
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer, TokenizerWrapper
    from transformers import PreTrainedTokenizerFast

    tokens = file.value("tokenizer.ggml.tokens")
    names: dict[str, str] = {}
    for role, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        if file.has(f"tokenizer.ggml.{key}_token_id"):
            names[f"{role}_token"] = tokens[file.integer(f"tokenizer.ggml.{key}_token_id")]
    kind = file.value("tokenizer.ggml.model")
    if kind not in _BACKENDS:
        raise ModelError(
            f"{file.path}: a {kind!r} vocabulary is not read from .gguf files, only byte-level BPE ('gpt2') and "
            "SentencePiece's BPE ('llama'); use the model's safetensors folder or hub id"
        )
    backend, add_bos = _BACKENDS[kind](file, tokens)
    _add_marks(file, backend, tokens)
    if (bos := names.get("bos_token")) is not None and file.value("tokenizer.ggml.add_bos_token", add_bos):
        _begin_with(backend, bos, tokens.index(bos))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=file.integer("context_length"),
        clean_up_tokenization_spaces=False,
        **names,
    )
    if file.has("tokenizer.chat_template"):
        fast.chat_template = file.value("tokenizer.chat_template")
    pieces = partial(SPMStreamingDetokenizer, trim_space=_prefixed(file))
    streaming = BPEStreamingDetokenizer if kind == "gpt2" else pieces
    return TokenizerWrapper(fast, streaming, eos_token_ids=eos_ids(file))


def _types(file: GgufFile, tokens: list[str]) -> list[int]:
    return list(file.value("tokenizer.ggml.token_type", [NORMAL] * len(tokens)))


def _vocab(file: GgufFile, tokens: list[str]) -> dict[str, int]:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ModelError(f"{file.path}: the vocabulary has tokens twice; convert it anew")
    return vocab


def _byte_level(file: GgufFile, tokens: list[str]) -> tuple[Any, bool]:
    """Byte-level BPE with the file's merges and pre-tokenizer; whether it begins with bos by itself."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = file.value("tokenizer.ggml.pre", "none")
    if pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"{file.path}: pre-tokenizer {pre!r} is not known, only {', '.join(PRE_TOKENIZERS)}; "
            "use the model's safetensors folder or hub id"
        )
    rule = PRE_TOKENIZERS[pre]
    merges = [tuple(merge.split(" ", 1)) for merge in file.value("tokenizer.ggml.merges")]
    if any(len(pair) != 2 for pair in merges):
        raise ModelError(f"{file.path}: the vocabulary has a merge that is not of two; convert it anew")
    model = models.BPE(vocab=_vocab(file, tokens), merges=merges, fuse_unk=False, ignore_merges=rule.ignore_merges)
    out = Tokenizer(model)
    out.pre_tokenizer = pre_tokenizers.Sequence(rule.steps())
    out.decoder = decoders.ByteLevel()
    if rule.nfc:
        out.normalizer = normalizers.NFC()
    return out, rule.add_bos


def _sentencepiece(file: GgufFile, tokens: list[str]) -> tuple[Any, bool]:
    """SentencePiece's BPE: the pair whose token scores highest is merged first; unknown letters become bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    types, vocab = _types(file, tokens), _vocab(file, tokens)
    unknown = tokens[types.index(UNKNOWN)] if UNKNOWN in types else None
    scores = file.value("tokenizer.ggml.scores")
    merges = _merges(vocab, types, scores)
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
    """Whether text is given a space before it, which is taken off again where tokens become text."""
    return bool(file.value("tokenizer.ggml.add_space_prefix", True))


def _merges(vocab: dict[str, int], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, in the order in which its score lets them merge."""
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


def _add_marks(file: GgufFile, backend: Any, tokens: list[str]) -> None:
    """Tokens that are never cut: special ones, and those that the maker added."""
    from tokenizers import AddedToken

    types = _types(file, tokens)
    control = [token for token, kind in zip(tokens, types) if kind in (CONTROL, UNKNOWN)]
    # Phi 3's marks take the space behind them with them; the file says so by its name alone, as for llama.cpp.
    phi3 = re.search("phi-?3", str(file.value("general.name", "")), re.IGNORECASE) is not None
    greedy = [phi3 and token not in ("<unk>", "<s>", "<|endoftext|>") for token in control]
    marks = [AddedToken(token, normalized=False, special=True, rstrip=g) for token, g in zip(control, greedy)]
    backend.add_special_tokens(marks)
    # Runs of spaces would never be met as they stand: the normalizer writes spaces otherwise, and merges make them.
    added = [token for token, kind in zip(tokens, types) if kind == USER_DEFINED and token.strip(f" {SPACE}")]
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])


def _begin_with(backend: Any, bos: str, number: int) -> None:
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
    )


# --- gguf -------------------------------------------------------------------------------------------------------------

__all__ = [
    "ARCHITECTURES",
    "GgufFile",
    "config",
    "eos_ids",
    "model_from_gguf",
    "own_dtype",
    "read_gguf",
    "tokenizer",
    "weights",
]

GROUP_SIZE = 32
# MLX reads these, packed ones packed. It reads more types, some of them wrongly (in 0.32.4 Q4_K), and BF16 by way of
# float16, where large numbers become infinite: the gguf package reads those.
_OF_MLX = {"F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_0"}


def read_gguf(path: Path) -> GgufFile:
    """Read the whole file: packed as it is where MLX has a form for all of its types, else unpacked to float16.

    Raises:
        ModelError: not a GGUF file, truncated, split, of an architecture or quantisation that is not read here.
    """
    try:
        metadata, table = read_gguf_header(path)
        kinds = {entry.kind for entry in table.values()}
        if odd := sorted(kind for kind in kinds if not _readable(kind)):
            raise ModelError(
                f"{path}: holds tensors in {', '.join(odd)}, which can not be read; take a file in another "
                "quantisation, or the model's safetensors"
            )
        loaded: Any = mx.load(str(path)) if kinds <= _OF_MLX else {}
        loaded |= {name: _unpacked(path, e) for name, e in table.items() if name not in loaded or e.kind == "BF16"}
    except OSError as error:
        raise ModelError(f"{path}: can not be read: {error.strerror or error}") from error
    except (ValueError, OverflowError, RuntimeError) as error:
        text = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(f"{path}: {text}; download it again") from error
    file_ = GgufFile(path, loaded, metadata, architecture(metadata.get("general.architecture"), str(path)))
    if metadata.get("general.type") == "adapter":
        raise ModelError(f"{path}: is an adapter, not a model: llama.cpp takes it beside its base (--lora)")
    if file_.integer("split.count", 1) > 1:
        raise ModelError(f"{path}: one part of {file_.integer('split.count')}; join them with llama-gguf-split --merge")
    if file_.integer("expert_count", 0) > 0:
        raise ModelError(f"{path}: a mixture of experts, which is not read from .gguf files; use its safetensors")
    return file_


def _readable(kind: str) -> bool:
    """Whether the gguf package can unpack a type: it says so by trying."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        number = GGMLQuantizationType[kind]
        dequantize(np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except (KeyError, NotImplementedError):
        return False
    return True


def _unpacked(path: Path, entry: Entry) -> mx.array:
    """A tensor as the gguf package unpacks it: F32 and BF16 in their own numbers, all others in float16.

    Raises:
        ValueError: a shape that its blocks do not fill, or numbers that are not finite.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quant_shape_to_byte_shape

    kind = GGMLQuantizationType[entry.kind]
    shape = quant_shape_to_byte_shape(entry.shape or (1,), kind)
    packed = np.fromfile(path, np.uint8, math.prod(shape), offset=entry.offset).reshape(shape)
    with np.errstate(all="ignore"):
        value = mx.array(dequantize(packed, kind)).reshape(entry.shape)
    value = value.astype({"F32": mx.float32, "BF16": mx.bfloat16}.get(entry.kind, mx.float16))
    mx.eval(value)
    if entry.kind not in _OF_MLX and not mx.isfinite(value).all().item():
        raise ValueError(f"broken: a tensor in {entry.kind} holds numbers that are not finite")
    return value


def weights(file: GgufFile, config: dict[str, Any], model: nn.Module) -> dict[str, mx.array]:
    """All tensors under the model's names; llama.cpp's order of the rows of q and k, and the 1 it adds to the norms of
    some families, are undone.
    """
    out: dict[str, mx.array] = {}
    unknown: list[str] = []
    layers = config["num_hidden_layers"]
    ours = {file.architecture.theirs(path, layers): path for path, _ in model.named_modules()}
    for name, tensor in file.tensors.items():
        if name in ROPE_TENSORS:
            continue
        stem, _, part = name.rpartition(".")
        if stem not in ours:
            unknown.append(name)
            continue
        if (heads := file.architecture.heads(name, config)) is not None:
            tensor = unpermute(tensor, heads)
        out[f"{ours[stem]}.{part}"] = tensor.astype(mx.float32) - 1 if file.architecture.is_shifted(name) else tensor
    if unknown:
        shown = ", ".join(sorted(unknown)[:5])
        raise ModelError(f"{file.path}: {len(unknown)} tensors that {config['model_type']} has not ({shown})")
    return out


def own_dtype(file: GgufFile) -> Any:
    """What a file's floats are loaded as: bfloat16 where most of them are, else float16."""
    sizes = {mx.bfloat16: 0, mx.float16: 0}
    for tensor in file.tensors.values():
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += tensor.size
    return mx.bfloat16 if sizes[mx.bfloat16] > sizes[mx.float16] else mx.float16


def model_from_gguf(file: GgufFile) -> tuple[nn.Module, dict[str, Any]]:
    """The mlx-lm model with the file's own tensors (packed where they are packed), and its config."""
    import importlib

    settings = config(file)
    check_schema(ModelConfig, settings, file.path)
    module = importlib.import_module(f"mlx_lm.models.{settings['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(settings))
    tensors = weights(file, settings, model)
    if hasattr(model, "sanitize"):
        tensors = model.sanitize(tensors)
    layers: dict[str, int] = {}
    for path, layer in model.named_modules():
        if f"{path}.scales" in tensors:
            layers[path] = tensors[f"{path}.weight"].shape[1] * 32 // layer.weight.shape[1]
    if layers:
        # Most layers' bits stand on top, as in any MLX folder; the others stand by name.
        bits = max(set(layers.values()), key=list(layers.values()).count)
        quantization: dict[str, Any] = {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}
        for path, own in layers.items():
            if own != bits:
                quantization[path] = {"group_size": GROUP_SIZE, "bits": own, "mode": "affine"}
        shape = {path: {"group_size": GROUP_SIZE, "bits": own} for path, own in layers.items()}
        nn.quantize(model, group_size=GROUP_SIZE, bits=bits, class_predicate=lambda path, _: shape.get(path, False))
        settings["quantization"] = quantization
    try:
        model.load_weights(list(tensors.items()), strict=True)
    except ValueError as error:
        raise ModelError(f"{file.path}: the tensors do not fit the metadata: {error}") from error
    return model, settings
