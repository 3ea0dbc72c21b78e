"""Write .gguf files: settings, vocabulary, tensors, and adapters for llama.cpp."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxft import __version__
from mlxft.data.dataset import turn_end
from mlxft.errors import CheckpointError, ConfigError, ExportError
from mlxft.files import check_file, is_stream, note, write_beside
from mlxft.model import gguf
from mlxft.model.adapters import read_adapter_config, trainable_weights
from mlxft.model.folder import check_space, check_unused, foreign
from mlxft.model.gguf import (
    ARCHITECTURES,
    BYTE,
    CONTROL,
    GEMMA_SCALED_BY_WIDTH,
    MODEL_TYPES,
    NORMAL,
    PRE_TOKENIZERS,
    ROPE_FREQS,
    ROPE_LONG,
    ROPE_SHORT,
    ROPE_TENSORS,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Architecture,
    llama3_divisors,
    permute,
    recognise,
)
from mlxft.model.layers import LEAVES, QUANTIZED, LoRALinear, LowRank, dense_weight
from mlxft.model.load import ALIASES, Loaded, resolve
from mlxft.runs import find_adapter, load_run
from mlxft.text import parse_json

# --- gguf settings ----------------------------------------------------------------------------------------------------
# A config.json's hyper-parameters as the metadata of a .gguf file, and the tensors that belong to the rope.

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


# --- gguf vocab -------------------------------------------------------------------------------------------------------
# A tokenizer as llama.cpp wants it in a .gguf file: tokens, their kinds, merges or scores, chat template.

# Of a token that no merge makes; far below any rank.
_NO_SCORE = -1e6


def vocabulary(tokenizer: Any, rows: int) -> dict[str, Any]:
    """The `tokenizer.*` metadata.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper, or transformers' own.
        rows: of the embedding; ids that the tokenizer does not use are filled up, tokens beyond are left out.
    Raises:
        ExportError: a tokenizer of a kind that llama.cpp does not have, or one that it would run otherwise.
    """
    spec = _spec(tokenizer)
    model = spec["model"]
    if model["type"] != "BPE":
        raise ExportError(f"the tokenizer is of the kind {model['type']}; .gguf files are written for BPE only")
    added = {token["id"]: token for token in spec["added_tokens"]}
    tokens = _tokens(model["vocab"], added, rows)
    types = [_kind(i, token, added, model) for i, token in enumerate(tokens)]
    texts = [token if token is not None else f"[PAD{i}]" for i, token in enumerate(tokens)]
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        out = _sentencepiece(spec, texts, types, merges, chat_template(tokenizer) is not None)
    else:
        out = _byte_level(spec, merges)
    out["tokenizer.ggml.tokens"] = texts
    out["tokenizer.ggml.token_type"] = types
    return out | _marks(tokenizer, rows)


def _spec(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer.json."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError("the tokenizer has no tokenizer.json (it is not a fast one); .gguf files need it")
    spec: dict[str, Any] = parse_json(backend.to_str())
    return spec


def _tokens(vocab: dict[str, int], added: dict[int, dict[str, Any]], rows: int) -> list[str | None]:
    """Text of each id of the embedding, None where none has it."""
    by_id = {i: token for token, i in vocab.items()} | {i: token["content"] for i, token in added.items()}
    beyond = [i for i in by_id if i >= rows and i not in added]
    if beyond:
        raise ExportError(f"the tokenizer has {max(by_id) + 1} tokens, the embedding {rows} rows; they do not fit")
    return [by_id.get(i) for i in range(rows)]


def _kind(number: int, token: str | None, added: dict[int, dict[str, Any]], model: dict[str, Any]) -> int:
    if token is None:
        return UNUSED
    if token == model.get("unk_token") and model.get("byte_fallback"):
        return UNKNOWN
    if number in added:
        return CONTROL if added[number]["special"] or _looks_special(token) else USER_DEFINED
    if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return BYTE
    return NORMAL


def _looks_special(token: str) -> bool:
    """Marks that some makers did not declare special; llama.cpp's converter takes them for such, too."""
    fences = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        token.startswith(left) and token.endswith(right) for left, right in fences
    )


def _byte_level(spec: dict[str, Any], merges: list[Any]) -> dict[str, Any]:
    name = recognise(spec)
    normal = _flat(spec.get("normalizer"), "normalizers")
    if name is None or any(step["type"] != "NFC" for step in normal):
        what = json.dumps(spec.get("pre_tokenizer") if name is None else spec["normalizer"])
        raise ExportError(
            f"the tokenizer cuts text in a way that has no name in llama.cpp here: {what[:200]}; known are "
            f"{', '.join(PRE_TOKENIZERS)}. llama.cpp's own convert_hf_to_gguf.py may know it: give it the fused folder "
            "(mlxft fuse)"
        )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }


def _sentencepiece(
    spec: dict[str, Any], texts: list[str], types: list[int], merges: list[Any], chats: bool
) -> dict[str, Any]:
    """llama.cpp merges the pair whose token scores highest: scores fall with the first merge that makes a token."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    scores = [0.0] * len(texts)
    for i, (text, kind) in enumerate(zip(texts, types)):
        if kind == NORMAL:
            scores[i] = -float(ranks[text]) if text in ranks else _NO_SCORE
        elif kind == USER_DEFINED:
            texts[i] = text.replace(SPACE, " ")
    steps = [*_flat(spec.get("normalizer"), "normalizers"), *_flat(spec.get("pre_tokenizer"), "pretokenizers")]
    known = ("Prepend", "Replace", "Metaspace", "Split")
    odd = [step["type"] for step in steps if step["type"] not in known]
    if odd:
        raise ExportError(
            f"the tokenizer changes text by {', '.join(odd)} before it cuts it, which llama.cpp's SentencePiece "
            "vocabulary does not do; use the fused folder (mlxft fuse)"
        )
    # llama.cpp sets a space before every stretch of text or before none. Metaspace's "first" sets one at the very
    # start only: with a chat template a mark stands there, so none is right.
    always = "always" if chats else "first"
    prefixed = any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") in ("always", always))
        for step in steps
    )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefixed,
    }


def _flat(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [part for s in step[inner] for part in _flat(s, inner)] if step["type"] == "Sequence" else [step]


def _marks(tokenizer: Any, rows: int) -> dict[str, Any]:
    """Ids with a meaning, what an encoded text begins and ends with, and the chat template."""
    out: dict[str, Any] = {}
    eos = tokenizer.eos_token_id
    roles = {"bos": tokenizer.bos_token_id, "eos": eos, "unknown": tokenizer.unk_token_id}
    roles["padding"] = tokenizer.pad_token_id
    if (turn := _end_of_turn(tokenizer)) is not None:
        roles["eot"] = turn
    for role, number in roles.items():
        if number is not None and number < rows:
            out[f"tokenizer.ggml.{role}_token_id"] = int(number)
    ids = list(tokenizer.encode("a"))
    out["tokenizer.ggml.add_bos_token"] = roles["bos"] is not None and ids[0] == roles["bos"]
    out["tokenizer.ggml.add_eos_token"] = len(ids) > 1 and eos is not None and ids[-1] == eos
    if (template := chat_template(tokenizer)) is not None:
        out["tokenizer.chat_template"] = template
    return out


def chat_template(tokenizer: Any) -> str | None:
    """The tokenizer's Jinja template, the default one of several."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default") or next(iter(found.values()), None)
    return found or None


def _end_of_turn(tokenizer: Any) -> int | None:
    """The token that ends an answer in the chat template, where it is another than eos."""
    others = set(getattr(tokenizer, "eos_token_ids", ())) - {tokenizer.eos_token_id}
    if not others or chat_template(tokenizer) is None:
        return None
    if len(others) == 1:
        return int(next(iter(others)))
    # Where the template refuses to be asked, llama.cpp finds the token by its name.
    return next((end for end in turn_end(tokenizer) if end in others), None)


# --- gguf tensors -----------------------------------------------------------------------------------------------------
# A model's weights one by one, in the numbers of a .gguf file.

_BLOCK = 32  # numbers that share a scale in q8_0
_Q8_BYTES = _BLOCK + 2
# Bytes of a number; general.file_type as llama.cpp counts them.
_KINDS = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": _Q8_BYTES / _BLOCK}
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}


@dataclass(frozen=True)
class Weight:
    """One array of a model: its name without wrappers, its shape unpacked, and how to get it (float32, fused)."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], mx.array]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file; `read` gives it as numpy, in its kind."""

    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], Any]


def model_weights(model: nn.Module) -> Iterator[Weight]:
    """All weights, adapters fused and packed layers unpacked, none of them read yet.

    What `read` gives is taken out of the model, so that no more than one stands in memory unpacked.
    """
    inside: tuple[str, ...] = ()
    for path, module in list(model.named_modules()):
        if path.startswith(inside) and inside:
            continue
        base = module
        if isinstance(module, LowRank):
            inside = (*inside, f"{path}.")
            base = module.base
        packed = isinstance(base, QUANTIZED)
        for leaf in [k for k, v in base.items() if isinstance(v, mx.array) and not k.startswith("_")]:
            if packed and leaf in ("scales", "biases"):
                continue
            shape = dense_weight(base).shape if leaf == "weight" and packed else base[leaf].shape
            yield Weight(f"{path}.{leaf}", tuple(shape), _reader(module, base, leaf))


def _reader(module: nn.Module, base: nn.Module, leaf: str) -> Callable[[], mx.array]:
    def read() -> mx.array:
        if leaf != "weight":
            return base.pop(leaf).astype(mx.float32)
        # Unpacked in float32: the file's own rounding is to be the only one.
        value = module.fused_weight(exact=True) if isinstance(module, LowRank) else dense_weight(base, exact=True)
        mx.eval(value)
        for owner in {id(m): m for m in (module, base)}.values():
            for own in ("weight", "scales", "biases", "lora_a", "lora_b", "m"):
                owner.pop(own, None)
        return value

    return read


def stored_kind(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The kind that a tensor is stored in: vectors (norms, biases) stay float32.

    Raises:
        ExportError: rows that q8_0's blocks do not fill.
    """
    if len(shape) < 2:
        return "f32"
    if kind == "q8_0" and shape[-1] % _BLOCK:
        raise ExportError(
            f"{name}: rows of {shape[-1]} numbers can not be packed as q8_0, which takes {_BLOCK} at a time; "
            "take f16 or bf16"
        )
    return kind


def stored_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor in a file."""
    return int(np.prod(shape) * _KINDS[kind])


def _encode(value: mx.array, kind: str, name: str) -> Any:
    """A float32 array as numpy has a kind: bf16 as uint16, q8_0 as rows of bytes.

    Raises:
        ExportError: numbers that are not finite in this kind.
    """
    if kind == "q8_0":
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        _check_finite(value, name, kind)
        return quantize(np.array(value), GGMLQuantizationType.Q8_0)
    if kind == "bf16":
        value = value.astype(mx.bfloat16)
        _check_finite(value, name, kind)
        return np.array(value.view(mx.uint16))
    value = value.astype(mx.float16 if kind == "f16" else mx.float32)
    _check_finite(value, name, kind)
    return np.array(value)


def _check_finite(value: mx.array, name: str, kind: str) -> None:
    if mx.isfinite(value).all().item():
        return
    hint = "; its numbers are too large for f16, take bf16" if kind == "f16" else "; the model is broken"
    raise ExportError(f"{name}: holds numbers that are not finite as {kind}{hint}")


# --- gguf adapter -----------------------------------------------------------------------------------------------------
# A LoRA adapter as a .gguf file for llama.cpp's --lora.
#
# Layout: llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp: NAME.weight.lora_a (rank, in) and .lora_b
# (out, rank), whose product counts alpha / rank times.

_WHOLE = "export the whole model instead (without --lora), or fuse it (mlxft fuse)"


def adapter_tensors(
    run: Path, loaded: Loaded, arch: Architecture, kind: str
) -> tuple[list[Tensor], dict[str, Any], list[str]]:
    """Tensors, metadata and what is to be said of an adapter.

    Raises:
        ExportError: no adapter, or one that llama.cpp has no form for.
    """
    folder = find_adapter(run)
    if not (folder / "adapter_config.json").is_file():
        raise ExportError(f"--lora: {run} holds no adapter; leave --lora out")
    tuned = read_adapter_config(folder)["fine_tune_type"]
    if tuned != "lora":
        what = "DoRA rescales rows of the base" if tuned == "dora" else "its weights were trained whole"
        raise ExportError(f"--lora: {folder}: {what}, which a .gguf adapter can not say; {_WHOLE}")
    trained = [n for n in trainable_weights(loaded.model) if n.rpartition(".")[2] not in LEAVES]
    if trained:
        raise ExportError(
            f"--lora: {trained[0]} was trained whole, and a .gguf adapter holds low-rank updates only; {_WHOLE}"
        )
    tensors: list[Tensor] = []
    scales, ranks = set(), set()
    for path, layer in loaded.model.named_modules():
        if not isinstance(layer, LowRank):
            continue
        theirs = arch.theirs(path, len(loaded.model.layers))
        if not isinstance(layer, LoRALinear) or theirs is None:
            raise ExportError(f"--lora: {path} is no linear layer that llama.cpp adapts; {_WHOLE}")
        scales.add(layer.scale)
        ranks.add(layer.lora_a.shape[1])
        tensors += _pair(layer, f"{theirs}.weight", arch, loaded.config, kind)
    if not tensors:
        raise ExportError(f"--lora: {folder} adapts no layer")
    scale, rank = scales.pop(), ranks.pop()
    if scale == 0:
        raise ExportError("--lora: the adapter's scale is 0: it does nothing, and llama.cpp would read 0 as 1")
    assert not scales | ranks, "an adapter has one scale and one rank"
    metadata = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(scale * rank)}
    return tensors, metadata, [f"use it on the base: llama-cli -m BASE.gguf --lora FILE ({len(tensors) // 2} layers)"]


def _pair(layer: LoRALinear, name: str, arch: Architecture, config: dict[str, Any], kind: str) -> list[Tensor]:
    (width, rank), height = layer.lora_a.shape, layer.lora_b.shape[1]
    heads = arch.heads(name, config)

    def down() -> Any:
        return _encode(layer.lora_a.T.astype(mx.float32), kind, f"{name}.lora_a")

    def up() -> Any:
        value = layer.lora_b.T.astype(mx.float32)
        return _encode(value if heads is None else permute(value, heads), kind, f"{name}.lora_b")

    pair: tuple[tuple[str, tuple[int, ...], Callable[[], Any]], ...] = (
        ("lora_a", (rank, width), down),
        ("lora_b", (height, rank), up),
    )
    return [Tensor(f"{name}.{part}", shape, kind, read) for part, shape, read in pair]


# --- gguf -------------------------------------------------------------------------------------------------------------

MADE_BY = "mlxft.version"  # key of the metadata that marks a file as ours


def export_gguf(
    run: Path, out: Path, *, kind: str, lora: bool = False, model: str | None = None, overwrite: bool = False
) -> list[str]:
    """Write a run, an adapter on its base, or any model that mlxft loads as a .gguf file.

    Args:
        run: a run or adapter folder, a model folder, a .gguf file, a hub id or an alias.
        out: the file, ending in .gguf.
        kind: of the matrices: f32, f16, bf16 or q8_0; vectors are f32 always.
        lora: write the adapter alone, for llama.cpp's --lora.
        model: the base, where the adapter does not say or it has moved.
        overwrite: replace `out` if it is a .gguf file that mlxft wrote.
    Returns:
        What was done, a sentence each.
    Raises:
        ConfigError: `out` is no file that may be written.
        ExportError: an architecture, tokenizer, adapter or kind that .gguf can not hold; no space.
        ModelError: nothing there, or an adapter of another base.
    """
    check_arguments(kind, lora)
    check_output(out, overwrite)
    loaded = open_model(run, model)
    check_unused(out, [loaded.path])
    said = write_adapter(run, loaded, out, kind) if lora else write_model(run, loaded, out, kind)
    note(out)
    return said


def write_model(run: Path, loaded: Loaded, out: Path, kind: str) -> list[str]:
    """Write a whole model, its adapter fused; see `export_gguf`. The model is used up."""
    arch, get = family(loaded.config), lookup(loaded.model, loaded.config)
    tensors, said = model_tensors(loaded.model, arch, get, kind)
    rows = next(t.shape[0] for t in tensors if t.name == "token_embd.weight")
    own = {f"{arch.name}.vocab_size": rows, **settings(arch, get), **vocabulary(loaded.tokenizer, rows)}
    said += notes(loaded, own, tensors)
    size = _write(out, arch.name, about(run, arch, kind, loaded.tokenizer) | own, tensors)
    return [f"wrote {out} ({size / 1e6:,.1f} MB, {len(tensors)} tensors, {kind})", *said]


def write_adapter(run: Path, loaded: Loaded, out: Path, kind: str) -> list[str]:
    """Write the adapter alone; see `export_gguf`."""
    arch = family(loaded.config)
    tensors, own, said = adapter_tensors(run, loaded, arch, kind)
    size = _write(out, arch.name, about(run, arch, kind, loaded.tokenizer) | own, tensors)
    return [f"wrote {out} ({size / 1e6:,.1f} MB, {len(tensors)} tensors, {kind})", *said]


def check_arguments(kind: str, lora: bool = False) -> None:
    """ExportError for what can not be written, before anything is loaded."""
    if kind not in _KINDS:
        raise ExportError(
            f"type {kind!r} is not written as .gguf, only {', '.join(_KINDS)}; llama-quantize makes others"
        )
    if lora and kind == "q8_0":
        raise ExportError("a .gguf adapter is written as f16, bf16 or f32, not q8_0: its rows are too short to pack")


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse a file that may not be written.

    Raises:
        ConfigError: its name has another ending; or it is there, and not `overwrite` and a file that mlxft wrote.
    """
    if out.suffix != ".gguf":
        raise ConfigError(f"{out}: the file's name must end in .gguf, so that others know it; try {out}.gguf")
    check_file(out, overwrite, "OUT")
    if is_stream(out):
        raise ConfigError(f"{out}: is a device or a pipe, which a .gguf can not be written to; give a file's name")
    if out.is_file():
        with out.open("rb") as file:
            head = file.read(4096)
        if not head.startswith(b"GGUF") or MADE_BY.encode() not in head:
            raise ConfigError(
                f"{out}: is not a .gguf file that this version of mlxft wrote, so it is not overwritten; give another "
                "name, or remove it yourself"
            )


def open_model(run: Path, model: str | None) -> Loaded:
    """What is to be written, its weights unread.

    A .gguf file alone keeps its own numbers: it is opened packed, not by way of the float16 that it runs in.
    """
    if model is not None:
        folder = find_adapter(run)
        if not (folder / "adapter_config.json").is_file():
            raise ExportError(f"--model: {run} holds no adapter that would want a base; leave it out")
        return load_run(model, folder, lazy=True)
    if run.suffix == ".gguf" or str(run) in ALIASES:
        where = resolve(str(run))
        with foreign(f"model {str(run)!r}: its metadata cannot be used"):
            file = gguf.read_gguf(where)
            network, config = gguf.model_from_gguf(file)
            return Loaded(network, gguf.tokenizer(file), config, str(run), where)
    return load_run(run, lazy=True)


def about(run: Path, arch: Architecture, kind: str, tokenizer: Any) -> dict[str, Any]:
    """Metadata that every file has."""
    name = (run.stem if run.suffix == ".gguf" else run.resolve().name) or arch.name
    return {
        "general.type": "model",
        "general.name": fitting_name(name, tokenizer),
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
    }


def fitting_name(name: str, tokenizer: Any) -> str:
    """A model's name that llama.cpp draws the right conclusion from.

    Phi 3's marks take the space behind them with them; llama.cpp knows that by the name alone (phi-3 or phi3), and
    can not load a file of that name without these tokens.
    """
    marks = [t for t in tokenizer.added_tokens_decoder.values() if t.content in ("<|user|>", "<|assistant|>")]
    vocab = tokenizer.get_vocab()
    is_phi3 = any(t.rstrip for t in marks) and all(t in vocab for t in ("</s>", "<unk>", "<s>", "<|endoftext|>"))
    says_so = re.search("phi-?3", name, re.IGNORECASE) is not None
    if is_phi3 == says_so:
        return name
    return f"{name} (phi-3)" if is_phi3 else re.sub("(?i)(phi)-?3", r"\1 3", name)


def model_tensors(model: nn.Module, arch: Architecture, get: Get, kind: str) -> tuple[list[Tensor], list[str]]:
    """All tensors of a model in llama.cpp's names and layout, and what is to be said of them."""
    packed = sum(isinstance(m, QUANTIZED) for m in model.modules())
    adapted = sum(isinstance(m, LowRank) for m in model.modules())
    heads = {"num_attention_heads": get("num_attention_heads"), "num_key_value_heads": get("num_key_value_heads")}
    tensors, unknown = [], []
    for weight in model_weights(model):
        path, _, part = weight.name.rpartition(".")
        theirs = arch.theirs(path, get("num_hidden_layers"))
        if theirs is None:
            unknown.append(weight.name)
            continue
        name = f"{theirs}.{part}"
        stored = stored_kind(name, weight.shape, kind)
        tensors.append(Tensor(name, weight.shape, stored, _tensor_reader(weight, name, stored, arch, heads)))
    if unknown:
        shown = ", ".join(unknown[:5])
        raise ExportError(f"{len(unknown)} weights that a {arch.name} .gguf has no place for ({shown})")
    for name, value in rope_tensors(arch, get).items():
        tensors.append(Tensor(name, value.shape, "f32", partial(_encode, value, "f32", name)))
    said = [f"the adapter is fused into {adapted} layers"] if adapted else []
    if packed:
        said.append(f"the base is quantised: {packed} layers were dequantised, then written as {kind}")
    return tensors, said


def _tensor_reader(
    weight: Weight, name: str, kind: str, arch: Architecture, config: dict[str, Any]
) -> Callable[[], Any]:
    def read() -> Any:
        value = weight.read()
        if (heads := arch.heads(name, config)) is not None:
            value = permute(value, heads)
        if arch.is_shifted(name):
            value = value + 1
        return _encode(value, kind, name)

    return read


def notes(loaded: Loaded, metadata: dict[str, Any], tensors: list[Tensor]) -> list[str]:
    """What llama.cpp will do otherwise than mlx-lm."""
    said, tokenizer = [], loaded.tokenizer
    if (beyond := len(tokenizer) - len(metadata["tokenizer.ggml.tokens"])) > 0:
        said.append(f"{beyond} tokens that the embedding has no row for are left out")
    if "text_config" in loaded.config:
        said.append("only the language model is written; its eyes are not")
    start = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False)[:1])
    if metadata.get("tokenizer.ggml.add_space_prefix") is False and start[0].startswith(SPACE):
        said.append(
            "llama.cpp cuts chats as mlx-lm does; plain text, without the chat template, it begins without a space"
        )
    if window := metadata.get("gemma2.attention.sliding_window"):
        said.append(
            f"every other layer of a Gemma 2 sees the last {window} tokens only in llama.cpp, and all in mlx-lm: "
            "beyond that length their answers differ"
        )
    if any(t.name == ROPE_LONG for t in tensors):
        original = loaded.config.get("original_max_position_embeddings", 4096)
        said.append(
            f"mlx-lm turns by the long rope factors at every length; llama.cpp does where its context (-c) is over "
            f"{original}: give it more for the same answers"
        )
    return said


def _write(out: Path, arch: str, metadata: dict[str, Any], tensors: list[Tensor]) -> int:
    """Write a file, one tensor in memory at a time; whole or not at all. Returns its bytes.

    Raises:
        ExportError: no space, or writing failed; nothing is left of it.
    """
    check_space(out, sum(stored_bytes(t.shape, t.kind) for t in tensors))
    # The rope's tensors first, as llama.cpp's converter has them.
    ordered = sorted(tensors, key=lambda t: t.name not in ROPE_TENSORS)
    try:
        # The first, so that a look at the file's head tells whose it is.
        metadata = {MADE_BY: __version__, **metadata}
        write_beside(out, lambda part: _fill(part, arch, metadata, ordered))
    except CheckpointError as error:
        raise ExportError(f"{out}: writing failed, nothing is left of it: {error.__cause__}") from error
    return out.stat().st_size


def _fill(file: Path, arch: str, metadata: dict[str, Any], tensors: list[Tensor]) -> None:
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    stored = {"f32": "float32", "f16": "float16", "bf16": "uint16", "q8_0": "uint8"}
    of = GGUFValueType
    types = {bool: of.BOOL, int: of.UINT32, float: of.FLOAT32, str: of.STRING}
    writer = GGUFWriter(file, arch)
    try:
        for key, value in metadata.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            else:
                writer.add_key_value(key, value, types[type(value)])
        for t in tensors:
            size = stored_bytes(t.shape, t.kind)
            shape = (*t.shape[:-1], stored_bytes(t.shape[-1:], t.kind)) if t.kind == "q8_0" else t.shape
            writer.add_tensor_info(t.name, shape, np.dtype(stored[t.kind]), size, GGMLQuantizationType[t.kind.upper()])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in tensors:
            writer.write_tensor_data(t.read())
            mx.clear_cache()
    finally:
        writer.close()
