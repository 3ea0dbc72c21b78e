"""Writes a model folder that mlx-lm and transformers read; whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxft.data.chat import thinking_of
from mlxft.errors import CheckpointError, ConfigError, ExportError
from mlxft.model.declared import read_object
from mlxft.owned import check_replaceable, check_writable, claim, is_empty, note, remove
from mlxft.temporary import clear

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# Beside the weights: a tokenizer of a quarter of a million tokens, and some air.
_SLACK_BYTES = 48 << 20


def save_folder(
    dst: Path,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    config: dict[str, Any],
    *,
    overwrite: bool = False,
    source: Path | None = None,
    beside: Callable[[Path], None] | None = None,
) -> Path:
    """Write config.json, model*.safetensors, tokenizer files and generation_config.json to `dst`.

    Everything is written to a hidden folder beside `dst` and renamed at the end. The model stays as it is; lazily
    loaded weights are read on the way, also from `dst` itself.

    Args:
        overwrite: replace `dst` if it is a model folder that mlxft made.
        source: what the model came from: a folder's generation settings, and the code of a model that has its own,
            are carried over.
        beside: writes what else belongs into the folder.
    Raises:
        ConfigError: `dst` exists and may not be replaced.
        ExportError: the disk is too small, or writing failed; then nothing is left behind.
    """
    check_destination(dst, overwrite)
    check_space(dst, weight_bytes(model))
    with replace_folder(dst, "model") as part:
        _write(part, model, tokenizer, config, source)
        if beside is not None:
            beside(part)
    return dst


@contextmanager
def replace_folder(dst: Path, kind: str) -> Iterator[Path]:
    """A hidden folder beside `dst`, to be filled inside the block; at its end it takes the name of `dst`.

    Args:
        kind: of mlxft.owned.KINDS.
    Raises:
        ConfigError: `dst` is there, and is not one of its kind that mlxft made.
        ExportError: writing failed; nothing is left of it, and `dst` is as it was.
    """
    part = dst.with_name(f".{dst.name}.partial-{os.getpid()}")
    try:
        clear(dst.parent)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        claim(part, kind)  # by which `clear` knows it for ours after a kill
        yield part
        claim(part, kind, (p.relative_to(part).as_posix() for p in part.rglob("*") if p.is_file()))
        check_replaceable(dst, kind)  # again: what was written may have taken hours
        _swap(part, dst)
        note(dst)
    # MLX's writer raises RuntimeError where the disk is full.
    except (OSError, RuntimeError, CheckpointError) as error:
        said = f"{dst}: writing failed, nothing is left of it: {error}"
        raise ExportError(said.replace(str(part), str(dst))) from error
    except ExportError as error:  # a file in it has no room
        if str(part) not in str(error):
            raise
        raise ExportError(str(error).replace(str(part), str(dst))) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, read or not yet."""
    return sum(value.nbytes for _, value in tree_flatten(model.parameters()))


def check_destination(dst: Path, overwrite: bool, kind: str = "model") -> None:
    """Refuse a folder that may not be written: it is there, and not empty or `overwrite` and of its kind and ours.

    Args:
        kind: of mlxft.owned.KINDS.
    Raises:
        ConfigError: so it is.
    """
    if dst.name in ("", ".."):
        raise ConfigError(f"{str(dst)!r}: give the name of a folder to write")
    if not overwrite and os.path.isdir(dst) and not is_empty(dst):
        raise ConfigError(f"{dst}: exists already; give another name, or overwrite it (--overwrite)")
    check_replaceable(dst, kind)
    check_writable(dst, "OUT")
    if "\udc80" <= max(str(dst.absolute())) <= "\udcff":  # MLX writes under UTF-8 names alone
        raise ConfigError(f"{dst}: is not UTF-8; give another name")


def check_unused(dst: Path, used: Iterable[Path | None]) -> None:
    """ExportError if one of the files or folders that `dst` is made of would be gone with what `dst` replaces."""
    gone = dst.resolve()
    for source in used:
        if source is not None and gone in (path := source.resolve(), *path.parents):
            raise ExportError(
                f"{dst}: what it is made of lies there ({source}) and would be lost; give another name for it"
            )


def check_space(dst: Path, weights: int) -> None:
    """ExportError unless the disk of `dst` has room for `weights` bytes and the small files beside them."""
    existing = next(folder for folder in (dst.absolute().parent, *dst.absolute().parents) if folder.exists())
    free, needed = shutil.disk_usage(existing).free, weights + _SLACK_BYTES
    if free < needed:
        raise ExportError(
            f"{dst}: needs about {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on its disk; "
            "free some, write elsewhere, or quantise"
        )


def _write(folder: Path, model: nn.Module, tokenizer: Any, config: dict[str, Any], source: Path | None) -> None:
    from mlx_lm.utils import save_config, save_model

    save_model(folder, model, donate_model=False)
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if written < weight_bytes(model):
        raise OSError(f"only {written} of {weight_bytes(model)} bytes of weights were written")
    # save_config drops keys from what it is given; a vision tower's model can not be loaded without them.
    keep_vision = "vision_tower" in getattr(model, "model", {})
    ends = sorted(tokenizer.eos_token_ids)
    config = copy.deepcopy(config)
    if ends:
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if not thinking_of(tokenizer):
        config["mlxft"] = {"enable_thinking": False}
    save_config(config, folder / "config.json", keep_vision_config=keep_vision)
    tokenizer.save_pretrained(str(folder))
    generation = generation_settings(source)
    for code in source.glob("*.py") if source is not None else ():
        shutil.copy(code, folder)
    for name in ("bos_token_id", "pad_token_id"):
        if config.get(name) is not None:
            generation.setdefault(name, config[name])
    generation["eos_token_id"] = ends
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n", "utf-8")


def generation_settings(folder: Path | None) -> dict[str, Any]:
    """How a model's makers would sample: generation_config.json, or nothing where there is none.

    Raises:
        ModelError: it is no JSON object.
    """
    file = folder / "generation_config.json" if folder is not None else None
    if file is None or not file.is_file():
        return {}
    return read_object(file)


def _swap(part: Path, dst: Path) -> None:
    """`part` takes the name of `dst`; what was there before goes only after that."""
    old = dst.with_name(f".{dst.name}.old-{os.getpid()}")
    if dst.exists():
        dst.rename(old)
    try:
        part.rename(dst)
    except OSError:
        if old.exists():
            old.rename(dst)
        raise
    if old.exists():
        with suppress(OSError):  # what has a new name is in its place
            remove(old)
