"""Checkpoints that resume exactly: checkpoints/step-N/, whole or not there.

weights.safetensors      trained parameters
optimizer.safetensors    its state and master weights
objective.safetensors    a rollout that is in use, where there is one
state.json               step, data position, counters, best so far, random state
digests.json             a hash of each of these
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxft.errors import CheckpointError, switch
from mlxft.files import (
    CHECKPOINT,
    check_room,
    clear,
    digest,
    discard,
    flush,
    remove_files,
    save_arrays,
    temporary,
    writing,
)
from mlxft.text import parse_json

FORMAT = 3
DIGESTS = "digests.json"
PARTS = ("weights.safetensors", "optimizer.safetensors", "state.json")  # in every checkpoint


@dataclass
class Snapshot:
    """What a checkpoint holds."""

    weights: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    state: dict[str, Any]
    objective: dict[str, mx.array] = field(default_factory=dict)


def save(folder: Path, step: int, snapshot: Snapshot, keep: int, say: Callable[[str], None] = lambda _: None) -> Path:
    """Write checkpoints/step-N and drop all but the newest `keep`; what mlxft did not write there stays.

    Args:
        say: hears what stays.
    Raises:
        CheckpointError: it can not be written; the older ones stay.
    """
    final = folder / f"step-{step}"
    beside = temporary(final)
    try:
        with writing(final):
            folder.mkdir(parents=True, exist_ok=True)
            clear(folder)
            beside.mkdir()
            arrays = {"weights.safetensors": snapshot.weights, "optimizer.safetensors": snapshot.optimizer}
            if snapshot.objective:
                arrays["objective.safetensors"] = snapshot.objective
            check_room(folder, sum(v.nbytes for tree in arrays.values() for v in tree.values()))
            for name, tree in arrays.items():
                save_arrays(beside / name, tree)
            state = {"format": FORMAT, "step": step, **snapshot.state}
            (beside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
            hashes = {name: digest(beside / name) for name in (*arrays, "state.json")}
            (beside / DIGESTS).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
            for file in beside.iterdir():
                flush(file)
            _drop(final, say)  # only there when a damaged one is being replaced
            if os.path.lexists(final):
                aside = next(
                    p for n in itertools.count(1) if not os.path.lexists(p := folder / f"{final.name}.kept-{n}")
                )
                final.rename(aside)
                say(f"{final} was in the way of a checkpoint, and is {aside.name} now")
            beside.rename(final)
            flush(folder)
    finally:
        discard(beside)
    found = [p for p in checkpoints(folder) if p.is_dir() and not p.is_symlink()]
    now = found.index(final)
    # Those of later steps are damaged ones that a resume has passed over: they must not count as the newest.
    for unwanted in found[: max(0, now + 1 - keep)] + found[now + 1 :]:
        _drop(unwanted, say)
    return final


def _drop(path: Path, say: Callable[[str], None]) -> None:
    others: list[str] = []
    with suppress(OSError):  # what can not be removed is no reason to end a training
        others = remove_files(path, CHECKPOINT) if path.is_dir() and not path.is_symlink() else []
    if others:
        say(f"{path}: the checkpoint is removed, and what mlxft did not write there stays: {', '.join(others)}")


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first; one in which only the user's files are left is none."""
    found = [p for p in folder.glob("step-*") if p.name[5:].isdigit()] if folder.is_dir() else []
    return sorted((p for p in found if not _is_left(p)), key=lambda p: int(p.name[5:]))


def _is_left(path: Path) -> bool:
    with suppress(OSError):
        names = os.listdir(path)
        return bool(names) and set(names).isdisjoint(CHECKPOINT)
    return False


def load_newest(folder: Path, say: Callable[[str], None]) -> Snapshot | None:
    """The newest whole checkpoint; None where there is none. `say` hears of each that is damaged.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    clear(folder)
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return load(path)
        except CheckpointError as e:
            older = path != found[0]
            say(f"{e}; {'using the one before it' if older else 'there is none before it'}")
    if found:
        raise CheckpointError(f"{folder}: no checkpoint is whole; start again with {switch('overwrite')}")
    return None


def load(path: Path) -> Snapshot:
    """Read one checkpoint.

    Raises:
        CheckpointError: a file is missing, cut short or changed, or something else stands in its place.
    """
    own = "objective.safetensors"
    try:
        if path.is_symlink():
            raise CheckpointError(f"checkpoint {path.name} is damaged: it is a link")
        for name in (DIGESTS, "state.json"):
            _check_file(path / name)
        state, files = (parse_json((path / name).read_text(encoding="utf-8")) for name in ("state.json", DIGESTS))
        if state.get("format") != FORMAT:
            raise CheckpointError(f"checkpoint {path.name} has format {state.get('format')}, this mlxft reads {FORMAT}")
        for name in {*PARTS, *files}:
            _check_file(path / name)
            if digest(path / name) != files[name]:
                raise CheckpointError(f"checkpoint {path.name} is damaged: {name} is not what was written")
        held: list[Any] = [mx.load(str(path / name)) for name in PARTS[:2]]
        held.append(mx.load(str(path / own)) if own in files else {})
    except CheckpointError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as e:
        said = f"{e.args[0]!r} is missing" if isinstance(e, KeyError) else str(e)
        raise CheckpointError(f"checkpoint {path.name} is damaged: {said}") from e
    weights, optimizer, objective = held
    return Snapshot(weights, optimizer, state, objective)


def _check_file(file: Path) -> None:
    """CheckpointError for what is not a plain file: a link may lead anywhere, and a pipe never ends."""
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise CheckpointError(f"checkpoint {file.parent.name} is damaged: {file.name} is not a file")
