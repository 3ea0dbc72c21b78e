"""Write .gguf files: settings, vocabulary, tensors, and adapters for llama.cpp."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxft import __version__
from mlxft.data.dataset import turn_end
from mlxft.errors import CheckpointError, ConfigError, ExportError
from mlxft.exports.fuse import find_probe, recipe_of
from mlxft.exports.llama_cpp import (
    HOW,
    KEPT,
    QUANTISED,
    Fidelity,
    Importance,
    find_importance,
    find_quantiser,
    quantise,
    write_importance,
)
from mlxft.files import check_file, explained, is_stream, note, temporary, write_beside
from mlxft.model import gguf
from mlxft.model.adapters import read_adapter_config, trained_weights
from mlxft.model.folder import check_space, check_unused, foreign
from mlxft.model.layers import QUANTIZED, SAVED, LoRALinear, LoRASwitchLinear, LowRank, dense_weight
from mlxft.model.load import ALIASES, Loaded, resolve
from mlxft.runs import find_adapter, load_run
from mlxft.text import parse_json

# --- gguf settings ----------------------------------------------------------------------------------------------------
# The hyper-parameters of a config.json as the metadata of a .gguf file, and the tensors of its rope.


def _family(config: dict[str, Any]) -> gguf.Architecture:
    kind = config.get("model_type")
    if kind not in gguf.MODEL_TYPES:
        raise ExportError(
            f"architecture {kind!r} is not written as .gguf, only {', '.join(gguf.MODEL_TYPES)}; use the fused folder "
            "(mlxft fuse), which mlx-lm and LM Studio load and llama.cpp's own convert_hf_to_gguf.py reads"
        )
    return gguf.ARCHITECTURES[gguf.MODEL_TYPES[kind]]


def _args(model: Any) -> Any:
    """Return mlx-lm's settings of a model, of the language model in it."""
    return getattr(model, "language_model", model).args


def _settings(arch: gguf.Architecture, get: gguf.Get) -> dict[str, Any]:
    """Return the metadata under `<architecture>.`; Python's int, float, bool and str say how a value is stored."""
    _check_fixed(arch, get)
    heads, head_dim = get("num_attention_heads"), _head_width(arch, get)
    out: dict[str, Any] = {}
    dense = get("enable_moe_block") is False  # sizes of experts that are not there
    for s in (*gguf.COMMON, *arch.settings):
        value = None if dense and "expert" in s.theirs else get(s.ours, None if s.default is ... else s.default)
        if value is None and s.default is ...:
            raise ExportError(f"the config has no {s.ours}, which a {arch.name} .gguf needs")
        if value is not None:
            out[s.theirs] = s.kind(value)
    out |= {
        "attention.head_count_kv": get("num_key_value_heads", heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": int(head_dim * get("partial_rotary_factor", arch.rotary)) if arch.rotary else head_dim,
        "rope.freq_base": float(get("rope_theta", 10000.0)),
    }
    out.update(_OWN.get(arch.name, lambda *_: {})(arch, get, out))
    out.update(_scaling(arch, get, out["context_length"]))
    return {f"{arch.name}.{key}": value for key, value in out.items()}


def _check_fixed(arch: gguf.Architecture, get: gguf.Get) -> None:
    """Raise ExportError if a model is not what llama.cpp takes a model of its family for."""
    if bool(get("rope_traditional", arch.traditional)) != arch.traditional:
        raise ExportError("rope_traditional is set, which a .gguf of this family cannot express; use the fused folder")
    for key, value in arch.fixed.items():
        if get(key, value) != value:
            raise ExportError(
                f"{key} is {get(key)}; llama.cpp takes {value} for granted in a {arch.name}; use the fused folder"
            )
    if "sliding_attention" in (get("layer_types") or []) and arch.name not in ("gemma3", "gemma4", "gpt-oss"):
        raise ExportError(f"layers with sliding attention are not written for {arch.name}; use the fused folder")


def _head_width(arch: gguf.Architecture, get: gguf.Get) -> int:
    own = int(get("hidden_size") // get("num_attention_heads"))
    return own if arch.square else int(get("head_dim", own))


def _gemma(arch: gguf.Architecture, get: gguf.Get, out: dict[str, Any]) -> dict[str, Any]:
    by_width = get("num_hidden_layers") == gguf.GEMMA_SCALED_BY_WIDTH[arch.name]
    scaled = get("hidden_size") // get("num_attention_heads") if by_width else out["attention.key_length"]
    if get("query_pre_attn_scalar") != scaled:
        raise ExportError(
            f"query_pre_attn_scalar is {get('query_pre_attn_scalar')}; llama.cpp uses {scaled} for a {arch.name} of "
            f"{get('num_hidden_layers')} layers, and a .gguf file cannot set it; use the fused folder"
        )
    found: dict[str, Any] = {"attention.sliding_window": get("sliding_window", 4096)}
    if arch.name == "gemma2":
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            found[name] = float(get(name))
        return found
    if get("sliding_window_pattern") == 1:
        return {}
    found["rope.freq_base_swa"] = float(get("rope_local_base_freq"))
    found["attention.sliding_window_pattern"] = get("sliding_window_pattern")
    return found


def _gemma4(arch: gguf.Architecture, get: gguf.Get, out: dict[str, Any]) -> dict[str, Any]:
    layers, head_dim = get("num_hidden_layers"), int(get("head_dim"))
    full, rope = int(get("global_head_dim") or head_dim), get("rope_parameters")
    sliding = [kind == "sliding_attention" for kind in get("layer_types")]
    shared, kv, wide = get("num_kv_shared_layers"), get("num_key_value_heads"), get("intermediate_size")
    full_kv = (get("attention_k_eq_v") and get("num_global_key_value_heads")) or kv
    doubled = get("use_double_wide_mlp") and 0 < shared < layers
    if get("hidden_size_per_layer_input") and get("vocab_size_per_layer_input") != get("vocab_size"):
        raise ExportError("vocab_size_per_layer_input is not vocab_size, as llama.cpp has it; use the fused folder")
    kinds = [rope[key].get("rope_type", "default") for key in ("full_attention", "sliding_attention")]
    if kinds != ["proportional", "default"] or rope["full_attention"].get("factor", 1) != 1:
        raise ExportError(f"a rope of the kinds {', '.join(kinds)} is not written for gemma4; use the fused folder")
    return {
        "feed_forward_length": [wide * (2 if doubled and i >= layers - shared else 1) for i in range(layers)],
        "attention.head_count_kv": [kv if slides else full_kv for slides in sliding],
        "attention.key_length": full,
        "attention.value_length": full,
        "attention.key_length_swa": head_dim,
        "attention.value_length_swa": head_dim,
        "attention.sliding_window_pattern": sliding,
        "rope.dimension_count": full,
        "rope.dimension_count_swa": head_dim,
        "rope.freq_base": float(rope["full_attention"].get("rope_theta", 10000.0)),
        "rope.freq_base_swa": float(rope["sliding_attention"].get("rope_theta", 10000.0)),
        "final_logit_softcapping": float(get("final_logit_softcapping") or 0),
    }


def _phi3(arch: gguf.Architecture, get: gguf.Get, out: dict[str, Any]) -> dict[str, Any]:
    return {
        "rope.scaling.original_context_length": get("original_max_position_embeddings", out["context_length"]),
        "attention.sliding_window": get("sliding_window", 0),
    }


def _qwen35(arch: gguf.Architecture, get: gguf.Get, out: dict[str, Any]) -> dict[str, Any]:
    if get("linear_value_head_dim") != get("linear_key_head_dim"):
        raise ExportError(
            f"linear_value_head_dim is {get('linear_value_head_dim')}; llama.cpp has it equal to linear_key_head_dim, "
            f"{get('linear_key_head_dim')}; use the fused folder"
        )
    found: dict[str, Any] = {"ssm.inner_size": get("linear_value_head_dim") * get("linear_num_value_heads")}
    if arch.nested:
        given = (get("rope_parameters") or {}).get("mrope_section")
        found["rope.dimension_sections"] = gguf.rope_sections(out["rope.dimension_count"] // 2, given)
    return found


def _gpt_oss(arch: gguf.Architecture, get: gguf.Get, out: dict[str, Any]) -> dict[str, Any]:
    layers = get("num_hidden_layers")
    usual = [i % gguf.SLIDING_EVERY == 0 for i in range(layers)]
    sliding = [kind == "sliding_attention" for kind in get("layer_types") or []] or usual
    return {} if sliding == usual else {"attention.sliding_window_pattern": sliding}


def _glm4_moe(arch: gguf.Architecture, get: gguf.Get, out: dict[str, Any]) -> dict[str, Any]:
    return {"expert_gating_func": gguf.SIGMOID}


def _smollm3(arch: gguf.Architecture, get: gguf.Get, out: dict[str, Any]) -> dict[str, Any]:
    usual = [int((i + 1) % gguf.NO_ROPE_EVERY != 0) for i in range(get("num_hidden_layers"))]
    if (get("no_rope_layers") or usual) != usual:
        raise ExportError(
            f"no_rope_layers is {get('no_rope_layers')}; llama.cpp leaves out the rope of every "
            f"{gguf.NO_ROPE_EVERY}th layer of a smollm3, and a .gguf file cannot say otherwise; use the fused folder"
        )
    return {}


def _olmo2(arch: gguf.Architecture, get: gguf.Get, out: dict[str, Any]) -> dict[str, Any]:
    if out["attention.key_length"] * out["attention.head_count"] != out["embedding_length"]:
        raise ExportError(
            f"head_dim is {out['attention.key_length']}; llama.cpp has heads of an olmo2 as wide as hidden_size "
            f"together, {out['embedding_length']}; use the fused folder"
        )
    return {}


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
    "olmo2": _olmo2,
    "smollm3": _smollm3,
}


def _rope_kind(scaling: Any) -> tuple[str, dict[str, Any]]:
    scaling = scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return {"su": "longrope"}.get(kind, kind), scaling


def _scaling(arch: gguf.Architecture, get: gguf.Get, context: int) -> dict[str, Any]:
    kind, scaling = _rope_kind(get("rope_scaling"))
    out: dict[str, Any] = {}
    if kind == "default":
        return out
    if kind not in arch.ropes:
        raise ExportError(
            f"rope scaling {kind!r} of {arch.name} is not written as .gguf, only {', '.join(arch.ropes) or 'none'}; "
            "use the fused folder (mlxft fuse)"
        )
    if kind in ("linear", "yarn"):
        out = {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        usual = {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0}
        odd = [k for k, v in usual.items() if scaling.get(k, v) != v]
        odd += ["attention_factor"] if scaling.get("attention_factor") is not None else []
        if odd:
            raise ExportError(f"rope scaling 'yarn' with {', '.join(odd)} of its own is not written as .gguf")
        out["rope.scaling.original_context_length"] = scaling.get("original_max_position_embeddings", 4096)
    if kind == "longrope":
        original = get("original_max_position_embeddings", context)
        stretch = context / original
        factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        out = {"rope.scaling.attn_factor": factor}
    return out


def _rope_tensors(arch: gguf.Architecture, get: gguf.Get) -> dict[str, mx.array]:
    """Return what llama.cpp stores of the rope as tensors: divisors of Llama 3 and Gemma 4, Phi 3's long and short."""
    kind, scaling = _rope_kind(get("rope_scaling"))
    if kind == "llama3":
        divisors = gguf.llama3_divisors(scaling, float(get("rope_theta", 10000.0)), _head_width(arch, get))
        return {gguf.ROPE_FREQS: mx.array(divisors, dtype=mx.float32)}
    if kind == "longrope" and arch.name == "phi3":
        pairs = ((gguf.ROPE_LONG, "long_factor"), (gguf.ROPE_SHORT, "short_factor"))
        return {name: mx.array(scaling[key], dtype=mx.float32) for name, key in pairs}
    if arch.name == "gemma4":
        half = int(get("global_head_dim") or get("head_dim")) // 2
        turned = int(2 * half * get("rope_parameters")["full_attention"].get("partial_rotary_factor", 1.0)) // 2
        return {gguf.ROPE_FREQS: mx.array([1.0] * turned + [1e30] * (half - turned), dtype=mx.float32)}
    return {}


# --- gguf vocab -------------------------------------------------------------------------------------------------------
# A tokenizer as llama.cpp reads it from a .gguf file: tokens, their kinds, merges or scores, chat template.

# Marks of a Gemma 4 within an assistant's turn.
_SEEN = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
_NO_SCORE = -1e6  # of a token that no merge makes; far below any rank


def vocabulary(tokenizer: Any, rows: int, family: str = "") -> dict[str, Any]:
    """Return the `tokenizer.*` metadata.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper, or transformers' own.
        rows: of the embedding; unused ids get a placeholder, tokens beyond are left out.
        family: llama.cpp's name of the model's architecture; Gemma 4's has a form of its own.
    Raises:
        ExportError: llama.cpp does not have this kind of tokenizer, or would tokenise differently.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError("the tokenizer has no tokenizer.json (it is not a fast one); .gguf files need it")
    spec: dict[str, Any] = parse_json(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise ExportError(f"the tokenizer is of the kind {model['type']}; .gguf files are written for BPE only")
    added = {token["id"]: token for token in spec["added_tokens"]}
    by_id = {i: token for token, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    if any(i >= rows and i not in added for i in by_id):
        raise ExportError(f"the tokenizer has {max(by_id) + 1} tokens, the embedding {rows} rows; they do not fit")
    tokens = [by_id.get(i) for i in range(rows)]
    types = [_kind(i, token, added, model) for i, token in enumerate(tokens)]
    texts = [token if token is not None else f"[PAD{i}]" for i, token in enumerate(tokens)]
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        out = _sentencepiece(spec, texts, types, merges, chat_template(tokenizer) is not None)
        if family == gguf.GEMMA4:
            del out["tokenizer.ggml.scores"]
            out |= {"tokenizer.ggml.model": family, "tokenizer.ggml.merges": [" ".join(pair) for pair in merges]}
            # As in llama.cpp's converter: its parser of chats has to see them.
            types = [gguf.USER_DEFINED if text in _SEEN else kind for text, kind in zip(texts, types)]
    else:
        out = _byte_level(spec, merges)
    out["tokenizer.ggml.tokens"] = texts
    out["tokenizer.ggml.token_type"] = types
    return out | _marks(tokenizer, rows)


def _kind(number: int, token: str | None, added: dict[int, dict[str, Any]], model: dict[str, Any]) -> int:
    if token is None:
        return gguf.UNUSED
    if token == model.get("unk_token") and model.get("byte_fallback"):
        return gguf.UNKNOWN
    if number in added:
        return gguf.CONTROL if added[number]["special"] or _looks_special(token) else gguf.USER_DEFINED
    if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return gguf.BYTE
    return gguf.NORMAL


def _looks_special(token: str) -> bool:
    """Return whether a token is special by its look, if not by its declaration, as llama.cpp's converter does."""
    fences = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        token.startswith(left) and token.endswith(right) for left, right in fences
    )


def _byte_level(spec: dict[str, Any], merges: list[Any]) -> dict[str, Any]:
    name = gguf.pre_tokenizer_of(spec)
    normal = _flat(spec.get("normalizer"), "normalizers")
    if name is None or any(step["type"] != "NFC" for step in normal):
        what = json.dumps(spec.get("pre_tokenizer") if name is None else spec["normalizer"])
        raise ExportError(
            f"the tokenizer splits text in a way that llama.cpp has no known name for: {what[:200]}; known are "
            f"{', '.join(gguf.PRE_TOKENIZERS)}. llama.cpp's own convert_hf_to_gguf.py may know it: give it the fused "
            "folder (mlxft fuse)"
        )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }


def _sentencepiece(
    spec: dict[str, Any], texts: list[str], types: list[int], merges: list[Any], chats: bool
) -> dict[str, Any]:
    # llama.cpp merges the pair whose token scores highest: scores fall with the first merge that makes a token.
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    scores = [0.0] * len(texts)
    for i, (text, kind) in enumerate(zip(texts, types)):
        if kind == gguf.NORMAL:
            scores[i] = -float(ranks[text]) if text in ranks else _NO_SCORE
        elif kind == gguf.USER_DEFINED:
            texts[i] = text.replace(gguf.SPACE, " ")
    steps = [*_flat(spec.get("normalizer"), "normalizers"), *_flat(spec.get("pre_tokenizer"), "pretokenizers")]
    known = ("Prepend", "Replace", "Metaspace", "Split")
    odd = [step["type"] for step in steps if step["type"] not in known]
    if odd:
        raise ExportError(
            f"the tokenizer changes text by {', '.join(odd)} before it splits it, which llama.cpp's SentencePiece "
            "vocabulary does not do; use the fused folder (mlxft fuse)"
        )
    # llama.cpp adds a space before every stretch of text or before none. Metaspace's "first" adds one at the very
    # start only, where chats have a special token, so none is right.
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
    """Return the special ids, what an encoded text begins and ends with, and the chat template."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    roles = {"bos": bos, "eos": eos, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    roles["eot"] = _end_of_turn(tokenizer)
    out: dict[str, Any] = {
        f"tokenizer.ggml.{role}_token_id": int(number)
        for role, number in roles.items()
        if number is not None and number < rows
    }
    ids = list(tokenizer.encode("a"))
    out["tokenizer.ggml.add_bos_token"] = bos is not None and ids[0] == bos
    out["tokenizer.ggml.add_eos_token"] = len(ids) > 1 and eos is not None and ids[-1] == eos
    if (template := chat_template(tokenizer)) is not None:
        out["tokenizer.chat_template"] = template
    return out


def chat_template(tokenizer: Any) -> str | None:
    """Return the tokenizer's Jinja template, the default one of several."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default") or next(iter(found.values()), None)
    return found or None


def _end_of_turn(tokenizer: Any) -> int | None:
    """Return the token that ends a completion in the chat template, if it is not eos."""
    others = set(getattr(tokenizer, "eos_token_ids", ())) - {tokenizer.eos_token_id}
    if not others or chat_template(tokenizer) is None:
        return None
    if len(others) == 1:
        return int(next(iter(others)))
    # If the template refuses to render, llama.cpp finds the token by its name.
    return next((end for end in turn_end(tokenizer) if end in others), None)


# --- gguf tensors -----------------------------------------------------------------------------------------------------
# A model's weights one by one, as a .gguf file stores them.

_BLOCK = 32  # numbers that share a scale in packed kinds
# Bytes of a block in the packed kinds that the gguf package writes; of a number in the others.
_PACKED = {"q8_0": 34, "q5_1": 24, "q5_0": 22, "q4_1": 20, "q4_0": 18}
_KEPT = KEPT.lower()
_BLOCKS = {**_PACKED, _KEPT: 17}
_FLOATS = {"f32": 4, "f16": 2, "bf16": 2}
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, **QUANTISED}  # general.file_type
_STORED = {"f32": "float32", "f16": "float16", "bf16": "uint16"}


class _Tensor(NamedTuple):
    """A tensor of a file; `read` returns it as numpy, in its kind."""

    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], Any]

    @property
    def bytes(self) -> int:
        numbers = math.prod(self.shape)
        return numbers * _FLOATS[self.kind] if self.kind in _FLOATS else numbers // _BLOCK * _BLOCKS[self.kind]


def _weights(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], Callable[[], mx.array]]]:
    """Yield name, unpacked shape and reader (float32, adapters fused) of every weight.

    The reader removes the weight from the model, so that at most one is unpacked in memory.
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
            yield f"{path}.{leaf}", tuple(shape), partial(_take, module, base, leaf)


def _take(module: nn.Module, base: nn.Module, leaf: str) -> mx.array:
    if leaf != "weight":
        return base.pop(leaf).astype(mx.float32)
    # Unpacked in float32, so that only the file's own format rounds.
    value = module.fused_weight(exact=True) if isinstance(module, LowRank) else dense_weight(base, exact=True)
    mx.eval(value)
    for owner in (module, base):
        for own in ("weight", "scales", "biases", "lora_a", "lora_b", "m"):
            owner.pop(own, None)
    return value


def _encode(value: mx.array, kind: str, name: str) -> Any:
    """Return a float32 array as numpy in a kind: bf16 as uint16, packed kinds as rows of bytes."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    value = value.astype({"f16": mx.float16, "bf16": mx.bfloat16}.get(kind, mx.float32))
    if not mx.isfinite(value).all().item():
        hint = "its numbers are too large for f16, use bf16" if kind == "f16" else "the model is broken"
        raise ExportError(f"{name}: holds numbers that are not finite as {kind}; {hint}")
    if kind in _PACKED:
        return quantize(np.array(value), GGMLQuantizationType[kind.upper()])
    return np.array(value.view(mx.uint16) if kind == "bf16" else value)


def _kept(base: nn.Module) -> Any:
    """Return a layer's codes and scales as MXFP4's blocks: a scale, then 16 bytes of two codes half a block apart."""
    weight = np.array(base.pop("weight")).view(np.uint8)
    codes = np.stack([weight & 15, weight >> 4], axis=-1).reshape(*weight.shape[:-1], -1, 2, _BLOCK // 2)
    blocks = [np.array(base.pop("scales"))[..., None], codes[..., 0, :] | codes[..., 1, :] << 4]
    return np.concatenate(blocks, axis=-1).reshape(*weight.shape[:-1], -1)


# --- gguf adapter -----------------------------------------------------------------------------------------------------
# A LoRA adapter as a .gguf file for llama.cpp's --lora.
#
# Layout, by llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp: NAME.weight.lora_a (rank, in) and .lora_b
# (out, rank), whose product is scaled by alpha / rank.

_WHOLE = "export the whole model instead (without --lora), or fuse it (mlxft fuse)"


def _adapter_tensors(
    run: Path, loaded: Loaded, arch: gguf.Architecture, kind: str
) -> tuple[list[_Tensor], dict[str, Any], list[str]]:
    """Return an adapter's tensors and metadata, and a note."""
    folder = find_adapter(run)
    if not (folder / "adapter_config.json").is_file():
        raise ExportError(f"--lora: {run} holds no adapter; leave --lora out")
    tuned = read_adapter_config(folder)["fine_tune_type"]
    if tuned != "lora":
        what = "DoRA rescales rows of the base" if tuned == "dora" else "it was fully fine-tuned"
        raise ExportError(f"--lora: {folder}: {what}, which a .gguf adapter cannot express; {_WHOLE}")
    trained = [n for n in trained_weights(loaded.model) if n.rpartition(".")[2] not in SAVED]
    if trained:
        raise ExportError(
            f"--lora: {trained[0]} was trained whole, and a .gguf adapter holds low-rank updates only; {_WHOLE}"
        )
    tensors: list[_Tensor] = []
    scales, ranks = set(), set()
    get = gguf.getter(loaded.config, _args(loaded.model))
    modules = dict(loaded.model.named_modules())
    for path, layer in modules.items():
        if not isinstance(layer, LowRank):
            continue
        names = arch.tensors(f"{path}.weight", get("num_hidden_layers"))
        if not isinstance(layer, LoRALinear | LoRASwitchLinear) or not names:
            raise ExportError(f"--lora: {path} is not a linear layer that llama.cpp adapts; {_WHOLE}")
        scales.add(layer.scale)
        ranks.add(layer.lora_a.shape[1])
        tensors += _pairs(layer, names, arch, get, kind, modules.get(f"{path.partition('.experts.')[0]}.router"))
    if not tensors:
        raise ExportError(f"--lora: {folder} adapts no layer")
    scale, rank = scales.pop(), ranks.pop()
    if scale == 0:
        raise ExportError("--lora: the adapter's scale is 0, so it does nothing, and llama.cpp would read 0 as 1")
    assert not scales | ranks, "an adapter has one scale and one rank"
    metadata = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(scale * rank)}
    base = loaded.path.name if loaded.path is not None and loaded.path.suffix == ".gguf" else "BASE.gguf"
    said = [f"use it on the base: llama-cli -m {base} --lora FILE ({len(tensors) // 2} layers)"]
    if any(layer.form is not None for layer in modules.values() if isinstance(layer, LowRank)):
        said.append(
            "trained with rounded weights (tune.quantize_aware), as llama.cpp does not round them with --lora: the "
            "model that was trained is written without --lora"
        )
    return tensors, metadata, said


def _pairs(
    layer: LowRank, names: tuple[str, ...], arch: gguf.Architecture, get: gguf.Get, kind: str, router: nn.Module | None
) -> Iterator[_Tensor]:
    """Yield a layer's factors, (experts, rank, in) and (experts, out, rank), in the order of the base's tensors."""
    experts = isinstance(layer, LoRASwitchLinear)
    down, up = (layer.lora_a, layer.lora_b) if experts else (layer.lora_a.T, layer.lora_b.T)
    if router is not None and "per_expert_scale" in router and ".ffn_down_exps." in names[0]:
        up = up * router.per_expert_scale[:, None, None]  # llama.cpp scales what the base gives only
    for layout in arch.layouts(names[0]):
        assert layout.axis is not None, "no matrix that multiplies is stored otherwise"
        down, up = (layout.out(down, get), up) if layout.axis < 0 else (down, layout.out(up, get))
    for name, rows in zip(names, arch.cut(up, names, get)):
        for part, value in (("lora_a", down), ("lora_b", rows)):
            full = f"{name}.{part}"
            yield _Tensor(full, value.shape, kind, partial(_encode, value, kind, full))


# --- gguf -------------------------------------------------------------------------------------------------------------

_MADE_BY = "mlxft.version"  # key of the metadata that marks a file as ours
_IMPORTANT = 32_768  # tokens of an importance matrix
_SOURCE = "f16"  # what llama.cpp's quantiser is given


@dataclass(frozen=True)
class GgufForm:
    """What .gguf files of a model are to hold.

    Attributes:
        kinds: of the matrices, a file each: f32, f16, bf16, or one of QUANTISED; vectors are always f32.
        lora: the adapter alone, for llama.cpp's --lora.
        imatrix: rows by whose importance matrix llama.cpp rounds: a file, "train" or "valid" for the run's own.
        measure: whether the files are compared with the model in float, in llama.cpp.
        probe: rows to measure on, as for `fuse`.
    """

    kinds: tuple[str, ...]
    lora: bool = False
    imatrix: str | None = None
    measure: bool = False
    probe: str | None = None

    @classmethod
    def of(cls, kind: str | Sequence[str], **others: Any) -> GgufForm:
        """Return the form of one or several kinds, checked.

        Raises:
            ExportError: it cannot be written.
        """
        form = cls(tuple(dict.fromkeys([kind] if isinstance(kind, str) else kind)), **others)
        form._check()
        return form

    def files(self, out: Path) -> dict[str, Path]:
        """Return the file of each kind: `out`, or if there are several one beside it with the kind in its name."""
        several = len(self.kinds) > 1
        return {kind: out.with_name(f"{out.stem}-{kind}{out.suffix}") if several else out for kind in self.kinds}

    def _check(self) -> None:
        for kind in self.kinds:
            if kind not in _FILE_TYPES:
                raise ExportError(f"type {kind!r} is not written as .gguf, only {', '.join(_FILE_TYPES)}")
            if self.lora and kind not in _FLOATS:
                what = f"not {kind}: its rows are too short to pack"
                raise ExportError(f"a .gguf adapter is written as f16, bf16 or f32, {what}")
            if not _is_direct(kind) and find_quantiser() is None:
                known = ", ".join((*_FLOATS, *_PACKED))
                raise ExportError(
                    f"type {kind!r} needs llama.cpp's quantiser, not found here: {HOW}. Without it: {known}"
                )
        if self.lora and (self.imatrix or self.measure):
            raise ExportError("--imatrix and --measure are for a whole model: leave them out, or --lora")
        if self.imatrix and all(map(_is_direct, self.kinds)):
            unused = any(kind in _FLOATS or kind == "q8_0" for kind in self.kinds)
            why = f"which {self.kinds[0]} is not made with" if unused else f"not found here: {HOW}"
            raise ExportError(f"--imatrix is for llama.cpp's quantiser, {why}")


def _is_direct(kind: str) -> bool:
    """Return whether a kind is written here, not by llama.cpp's quantiser."""
    return kind in _FLOATS or kind == "q8_0" or (kind in _PACKED and find_quantiser() is None)


class Exported(list[str]):
    """What was done, a sentence each; `figures` has the files, and what was measured."""

    def __init__(self, lines: Sequence[str], figures: dict[str, Any]) -> None:
        super().__init__(lines)
        self.figures = figures


def export_gguf(
    run: Path,
    out: Path,
    *,
    kind: str | Sequence[str] = "f16",
    model: str | None = None,
    overwrite: bool = False,
    tell: Callable[[str], object] = lambda text: None,
    **form: Any,
) -> Exported:
    """Write a run, an adapter on its base, or any model that mlxft loads as a .gguf file, or one of each kind.

    Args:
        run: a run or adapter folder, a model folder, a .gguf file, a hub id or an alias.
        out: the file, ending in .gguf; with several kinds, NAME.gguf stands for NAME-KIND.gguf of each.
        model: the base, if the adapter does not name it or it has moved.
        overwrite: replace a .gguf file that mlxft wrote.
        tell: called with what is being done.
        kind, form: the fields of GgufForm.
    Raises:
        ConfigError: a file may not be written, or there are no rows to measure on.
        ExportError: .gguf cannot hold the architecture, tokenizer, adapter or kind; or there is no space.
        ModelError: the model is missing, or the adapter has another base.
    """
    wanted = GgufForm.of(kind, **form)
    if out.suffix != ".gguf":
        raise ConfigError(f"{out}: the file's name must end in .gguf, which other programs expect; try {out}.gguf")
    files = wanted.files(out)
    for file in files.values():
        _check_output(file, overwrite)
    loaded = open_model(run, model)
    for file in files.values():
        check_unused(file, [loaded.path])
    done = write_gguf(run, model, loaded, files, wanted, tell)
    for file in files.values():
        note(file)
    if len(files) == 1 and not wanted.lora:
        done.append(f"next: llama-cli -m {out}")
    return done


class _Content(NamedTuple):
    """What a file of one kind holds, and what there is to say of it; its tensors are read when it is filled."""

    arch: gguf.Architecture
    metadata: dict[str, Any]
    tensors: list[_Tensor]
    said: list[str]

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self.tensors)

    @property
    def uneven(self) -> list[int]:
        """Lengths of rows that K types, which pack 256 weights at a time, have no place for."""
        widths = {t.shape[-1] for t in self.tensors if t.name.startswith("blk.") and len(t.shape) > 1}
        return sorted(width for width in widths if width % 256)

    def fill(self, file: Path) -> None:
        """Write the file. The model that it is read from is used up."""
        # The rope's tensors first, as llama.cpp's converter writes them.
        ordered = sorted(self.tensors, key=lambda t: t.name not in gguf.ROPE_TENSORS)
        _fill(file, arch=self.arch.name, metadata=self.metadata, tensors=ordered)


def _content(run: Path, loaded: Loaded, kind: str, form: GgufForm) -> _Content:
    arch = _family(loaded.config)
    name = (run.stem if run.suffix == ".gguf" else run.resolve().name) or arch.name
    metadata = {
        _MADE_BY: __version__,  # first, so that the head of the file shows it
        "general.type": "model",
        "general.name": _fitting_name(name, loaded.tokenizer),
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
    }
    if form.lora:
        tensors, own, said = _adapter_tensors(run, loaded, arch, kind)
        return _Content(arch, metadata | own, tensors, said)
    get = gguf.getter(loaded.config, _args(loaded.model))
    tensors, said = _model_tensors(loaded.model, arch, get, kind)
    rows = next(t.shape[0] for t in tensors if t.name == "token_embd.weight")
    own = {f"{arch.name}.vocab_size": rows, **_settings(arch, get), **vocabulary(loaded.tokenizer, rows, arch.name)}
    return _Content(arch, metadata | own, tensors, said + _notes(loaded, own, tensors))


def write_gguf(
    run: Path,
    model: str | None,
    loaded: Loaded,
    files: Mapping[str, Path],
    form: GgufForm,
    tell: Callable[[str], object] = lambda text: None,
) -> Exported:
    """Write an adapter alone, or a whole model with its adapter fused; see `export_gguf`. The model is used up.

    Args:
        files: where each kind goes, all in one folder.
    """
    direct = [kind for kind in files if _is_direct(kind)]
    quantised = [kind for kind in files if kind not in direct]
    floats = [_SOURCE] if quantised and _SOURCE not in direct else []
    planned = {kind: _content(run, loaded, kind, form) for kind in [*direct, *floats]}
    plan, out = [*planned.values()][-1], next(iter(files.values()))
    need = sum(content.bytes for content in planned.values())
    for kind in quantised:
        bits = int(next(c for c in kind if c.isdigit())) + (3 if plan.uneven else 1)
        need += planned[_SOURCE].bytes * min(bits, 16) // 16
    check_space(out, need)
    matrix, fidelity, figures = _looked_at(run, loaded, plan.arch, form, tell)
    alone = _beside_the_base(loaded) if any(kind not in _FLOATS for kind in files) else []
    first = iter([True])  # each file uses a model up

    def fill(kind: str, file: Path) -> None:
        tell(f"writing {kind}")
        content = planned[kind] if next(first, False) else _content(run, open_model(run, model), kind, form)
        content.fill(file)

    for kind in direct:
        with _failing(files[kind]):
            write_beside(files[kind], partial(fill, kind))
    if quantised:
        _quantised({kind: files[kind] for kind in quantised}, files.get(_SOURCE), partial(fill, _SOURCE), matrix, tell)
    found: list[dict[str, Any]] = [
        {"path": str(file), "type": kind, "bytes": file.stat().st_size} for kind, file in files.items()
    ]
    said = [
        f"wrote {file['path']} ({file['bytes'] / 1e6:,.1f} MB, {len(plan.tensors)} tensors, {file['type']})"
        for file in found
    ]
    said += [*plan.said, *_about_kinds(plan, direct, quantised)]
    if seen := figures.get("imatrix"):
        said.append(f"importance matrix of {seen['tokens']:,} tokens in {seen['rows']:,} rows ({seen['source']})")
    if fidelity is not None:
        for file in found:
            tell(f"measuring {file['type']} in llama.cpp")
            file |= fidelity.measure(Path(file["path"]))
        said += fidelity.lines(found)
    elif any(kind not in _FLOATS for kind in files):
        said.append("what the type costs is not measured: --measure does, in llama-cpp-python (mlxft[llama-cpp])")
    return Exported(said + alone, {"files": found, **figures})


def _beside_the_base(loaded: Loaded) -> list[str]:
    """Say that an adapter on a .gguf file loses nothing if it stays an adapter."""
    low_rank = [m for m in loaded.model.modules() if isinstance(m, LowRank)]
    plain = all(isinstance(m, LoRALinear | LoRASwitchLinear) and m.form is None and "m" not in m for m in low_rank)
    if not low_rank or not plain or loaded.path is None or loaded.path.suffix != ".gguf":
        return []
    return [f"the base is a .gguf file, {loaded.path.name}: the adapter alone (--lora), used beside it, is not rounded"]


def _about_kinds(plan: _Content, direct: Sequence[str], quantised: Sequence[str]) -> list[str]:
    """Say where matrices are not in the type that was asked for, or all of them are."""
    said = []
    if coarse := [kind for kind in direct if kind in _PACKED and kind != "q8_0"]:
        said.append(f"every matrix is {' or '.join(coarse)}; llama.cpp's quantiser keeps some finer: {HOW}")
    uneven = ", ".join(map(str, plan.uneven))
    if uneven and (wide := [kind for kind in quantised if "_k" in kind or kind == "iq4_xs"]):
        packs = "packs" if len(wide) == 1 else "pack"
        said.append(
            f"{', '.join(wide)} {packs} 256 weights at a time: llama.cpp keeps rows of {uneven} in larger types"
        )
    return said


@contextmanager
def _failing(out: Path) -> Iterator[None]:
    """Turn a failure to write a file into an ExportError that names the reason."""
    try:
        yield
    except (OSError, CheckpointError) as error:
        reason = error.__cause__ or explained(error, out.parent)
        raise ExportError(f"{out}: writing failed, nothing is left of it: {reason}") from error


def _looked_at(
    run: Path, loaded: Loaded, arch: gguf.Architecture, form: GgufForm, tell: Callable[[str], object]
) -> tuple[tuple[dict[str, Importance], int], Fidelity | None, dict[str, Any]]:
    """Return the importance matrix with its number of tokens, what files are compared with, and figures of both."""
    configs = [config for config in [recipe_of(run)] if config is not None]
    fidelity, matrix, tokens, figures = None, dict[str, Importance](), 0, dict[str, Any]()
    if form.measure:
        tell("measuring the model in float")
        fidelity = Fidelity(loaded, find_probe(configs, loaded.tokenizer, form.probe))
        figures |= fidelity.to_json()
    if form.imatrix:
        rows = find_probe(configs, loaded.tokenizer, form.imatrix, budget=_IMPORTANT, option="--imatrix")
        tokens = sum(len(row.ids) for row in rows.rows)
        get = gguf.getter(loaded.config, _args(loaded.model))
        names = lambda path: arch.tensors(f"{path}.weight", get("num_hidden_layers"))  # noqa: E731
        for name, part in find_importance(loaded.model, names, rows.rows, tell).items():
            sums = mx.array(part.sums)
            for layout in (y for y in arch.layouts(name) if y.axis == -1):  # the inputs' order in the file
                sums = layout.out(sums, get)
            matrix[name] = part._replace(sums=np.array(sums))
        figures["imatrix"] = {"source": rows.source, "rows": len(rows.rows), "tokens": tokens}
    return (matrix, tokens), fidelity, figures


def _quantised(
    files: Mapping[str, Path],
    source: Path | None,
    fill: Callable[[Path], None],
    matrix: tuple[dict[str, Importance], int],
    tell: Callable[[str], object],
) -> None:
    """Let llama.cpp quantise `source` to each file; without one, floats beside them, which are removed."""
    out = next(iter(files.values()))
    floats, weighed = (temporary(out.with_name(f"{what}-{out.name}")) for what in ("floats", "imatrix"))
    try:
        with _failing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            if source is None:
                fill(floats)
            if matrix[0]:
                write_importance(weighed, *matrix)
        for kind, file in files.items():
            with _failing(file):
                write_beside(file, partial(quantise, source or floats, kind, weighed if matrix[0] else None, tell))
    finally:
        floats.unlink(missing_ok=True)
        weighed.unlink(missing_ok=True)


def _check_output(out: Path, overwrite: bool) -> None:
    check_file(out, overwrite, "OUT")
    if is_stream(out):
        raise ConfigError(f"{out}: is a device or a pipe, which a .gguf cannot be written to; give a file's name")
    if out.is_file():
        with out.open("rb") as file:
            head = file.read(4096)
        if not head.startswith(b"GGUF") or _MADE_BY.encode() not in head:
            raise ConfigError(
                f"{out}: is not a .gguf file that this version of mlxft wrote, so it is not overwritten; give another "
                "name, or remove it yourself"
            )


def open_model(run: Path, model: str | None) -> Loaded:
    """Open what is to be written, its weights unread.

    A .gguf file is opened packed, not in the float16 that it runs in, so that it keeps its own numbers.
    """
    if model is not None:
        folder = find_adapter(run)
        if not (folder / "adapter_config.json").is_file():
            raise ExportError(f"--model: {run} holds no adapter that needs a base; leave it out")
        return load_run(model, folder, lazy=True)
    if run.suffix == ".gguf" or str(run) in ALIASES:
        where = resolve(str(run))
        with foreign(f"model {str(run)!r}: its metadata cannot be used"):
            file = gguf.read_gguf(where)
            network, config = gguf.model_from_gguf(file, None)
            return Loaded(network, gguf.tokenizer(file), config, str(run), where)
    return load_run(run, lazy=True)


def _fitting_name(name: str, tokenizer: Any) -> str:
    """Return a model name that makes llama.cpp tokenise as the tokenizer does.

    Phi 3's special tokens strip the space after them; llama.cpp does so only by the name (phi-3 or phi3), and cannot
    load a file of that name without these tokens.
    """
    marks = [t for t in tokenizer.added_tokens_decoder.values() if t.content in ("<|user|>", "<|assistant|>")]
    vocab = tokenizer.get_vocab()
    is_phi3 = any(t.rstrip for t in marks) and all(t in vocab for t in ("</s>", "<unk>", "<s>", "<|endoftext|>"))
    says_so = re.search("phi-?3", name, re.IGNORECASE) is not None
    if is_phi3 == says_so:
        return name
    return f"{name} (phi-3)" if is_phi3 else re.sub("(?i)(phi)-?3", r"\1 3", name)


def _model_tensors(
    model: nn.Module, arch: gguf.Architecture, get: gguf.Get, kind: str
) -> tuple[list[_Tensor], list[str]]:
    """Return all tensors of a model in llama.cpp's names and layout, and notes. But for f32, MXFP4 stays what it is."""
    modules = dict(model.named_modules())
    packed = sum(isinstance(m, QUANTIZED) for m in modules.values())
    adapted = sum(isinstance(m, LowRank) for m in model.modules())
    tensors: list[_Tensor] = []
    unknown = []
    for ours, shape, take in _weights(model):
        names = arch.tensors(ours, get("num_hidden_layers"))
        unknown += [] if names else [ours]
        shapes = [value.shape for value in _stored(mx.zeros(shape), names, arch, get)]
        read = _Pieces(take, names, arch, get).read
        for at, (name, stored) in enumerate(zip(names, shapes)):
            own = "f32" if gguf.always_float(name, stored) else kind
            if own in _PACKED and stored[-1] % _BLOCK:
                raise ExportError(
                    f"{name}: rows of {stored[-1]} numbers cannot be packed as {own}, which packs {_BLOCK} at a time; "
                    "use f16 or bf16"
                )
            base = modules[ours.rpartition(".")[0]]
            if kind != "f32" and name.endswith("_exps.weight") and getattr(base, "mode", None) == _KEPT:
                tensors.append(_Tensor(name, stored, _KEPT, partial(_kept, base)))
            else:
                tensors.append(_Tensor(name, stored, own, partial(read, at, own)))
    if unknown:
        shown = ", ".join(unknown[:5])
        raise ExportError(f"{len(unknown)} weights that a {arch.name} .gguf has no place for ({shown})")
    if arch.headed and all(t.name != "output.weight" for t in tensors):
        raise ExportError(f"llama.cpp has no {arch.name} whose head is its embedding; use the fused folder")
    for name, value in _rope_tensors(arch, get).items():
        tensors.append(_Tensor(name, value.shape, "f32", partial(_encode, value, "f32", name)))
    said = [f"the adapter is fused into {adapted} layers"] if adapted else []
    kept = sum(t.kind == _KEPT for t in tensors)
    if kept:
        said.append(f"{kept} layers of experts stay in {_KEPT}")
    if packed > kept:
        said.append(f"the base is quantised: {packed - kept} layers were dequantised first")
    return tensors, said


def _stored(value: mx.array, names: tuple[str, ...], arch: gguf.Architecture, get: gguf.Get) -> list[mx.array]:
    """Return a parameter as llama.cpp stores it: one tensor, or the several whose rows it holds."""
    if not names:
        return []
    for layout in arch.layouts(names[0]):
        value = layout.out(value, get)
    return arch.cut(value, names, get)


class _Pieces:
    """Reads a parameter when its first tensor is written, and keeps what belongs to further ones until then."""

    def __init__(self, take: Callable[[], mx.array], names: tuple[str, ...], arch: gguf.Architecture, get: gguf.Get):
        self._take, self._rest = take, dict[int, mx.array]()
        self._names, self._arch, self._get = names, arch, get

    def read(self, at: int, kind: str) -> Any:
        if not self._rest:
            self._rest = dict(enumerate(_stored(self._take(), self._names, self._arch, self._get)))
        return _encode(self._rest.pop(at), kind, self._names[at])


def _notes(loaded: Loaded, metadata: dict[str, Any], tensors: list[_Tensor]) -> list[str]:
    """Say what llama.cpp will do differently from mlx-lm."""
    said, tokenizer = [], loaded.tokenizer
    if (beyond := len(tokenizer) - len(metadata["tokenizer.ggml.tokens"])) > 0:
        said.append(f"{beyond} tokens that the embedding has no row for are left out")
    if "text_config" in loaded.config:
        said.append("only the language model is written, without its vision part")
    start = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False)[:1])
    if metadata.get("tokenizer.ggml.add_space_prefix") is False and start[0].startswith(gguf.SPACE):
        said.append(
            "llama.cpp tokenises chats as mlx-lm does; plain text, without the chat template, begins without a space"
        )
    if window := metadata.get("gemma2.attention.sliding_window"):
        said.append(
            f"every other layer of a Gemma 2 sees only the last {window} tokens in llama.cpp, and all in mlx-lm: "
            "beyond that length their completions differ"
        )
    if any(t.name == gguf.ROPE_LONG for t in tensors):
        original = loaded.config.get("original_max_position_embeddings", 4096)
        said.append(
            f"mlx-lm uses the long rope factors at every length; llama.cpp does if its context (-c) is over "
            f"{original}: use a longer one for the same completions"
        )
    return said


def _fill(file: Path, *, arch: str, metadata: dict[str, Any], tensors: list[_Tensor]) -> None:
    """Write a file, one tensor in memory at a time."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

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
            shape = (*t.shape[:-1], t._replace(shape=t.shape[-1:]).bytes) if t.kind in _BLOCKS else t.shape
            kind = GGMLQuantizationType[t.kind.upper()]
            writer.add_tensor_info(t.name, shape, np.dtype(_STORED.get(t.kind, "uint8")), t.bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in tensors:
            writer.write_tensor_data(t.read())
            mx.clear_cache()
    finally:
        writer.close()
