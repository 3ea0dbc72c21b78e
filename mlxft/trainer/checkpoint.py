"""Save and load checkpoints that resume exactly. A folder checkpoints/step-N/ is complete or does not exist.

weights.safetensors      trained parameters
optimizer.safetensors    state of the optimiser, and master weights
objective.safetensors    the current rollout, if there is one
state.json               step, data position, counters, best validation so far, random state
digests.json             a hash of each of these files
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
_PARTS = ("weights.safetensors", "optimizer.safetensors", "state.json")  # in every checkpoint


@dataclass
class Snapshot:
    """Content of a checkpoint."""

    weights: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    state: dict[str, Any]
    objective: dict[str, mx.array] = field(default_factory=dict)


def save_checkpoint(
    folder: Path, step: int, snapshot: Snapshot, keep: int, say: Callable[[str], None] = lambda _: None
) -> Path:
    """Write checkpoints/step-N, and remove all but the newest `keep`; files that mlxft did not write stay.

    Args:
        say: called with a message about what stays.
    Raises:
        CheckpointError: the checkpoint cannot be written; the older ones stay.
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
            _drop(final, say)  # it only exists if it is damaged and being replaced
            if os.path.lexists(final):
                aside = next(
                    p for n in itertools.count(1) if not os.path.lexists(p := folder / f"{final.name}.kept-{n}")
                )
                final.rename(aside)
                say(f"{final} was in the way of a checkpoint, and is now {aside.name}")
            beside.rename(final)
            flush(folder)
    finally:
        discard(beside)
    found = [p for p in checkpoints(folder) if p.is_dir() and not p.is_symlink()]
    now = found.index(final)
    # Checkpoints of later steps are damaged ones that a resume skipped: they must not count as the newest.
    for unwanted in found[: max(0, now + 1 - keep)] + found[now + 1 :]:
        _drop(unwanted, say)
    return final


def _drop(path: Path, say: Callable[[str], None]) -> None:
    others: list[str] = []
    with suppress(OSError):  # a checkpoint that cannot be removed is no reason to end training
        others = remove_files(path, CHECKPOINT) if path.is_dir() and not path.is_symlink() else []
    if others:
        say(f"{path}: the checkpoint is removed, but files that mlxft did not write stay: {', '.join(others)}")


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first, without those in which only the user's files are left."""
    found = [p for p in folder.glob("step-*") if p.name[5:].isdigit()] if folder.is_dir() else []
    return sorted((p for p in found if not _has_only_other_files(p)), key=lambda p: int(p.name[5:]))


def _has_only_other_files(path: Path) -> bool:
    with suppress(OSError):
        names = os.listdir(path)
        return bool(names) and set(names).isdisjoint(CHECKPOINT)
    return False


def load_newest(folder: Path, say: Callable[[str], None]) -> Snapshot | None:
    """Load the newest complete checkpoint; None if there is none. `say` is called about each damaged one.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    clear(folder)
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return load_checkpoint(path)
        except CheckpointError as e:
            older = path != found[0]
            say(f"{e}; {'using the one before it' if older else 'there is no older one'}")
    if found:
        raise CheckpointError(f"{folder}: all checkpoints are damaged; start over with {switch('overwrite')}")
    return None


def load_checkpoint(path: Path) -> Snapshot:
    """Read one checkpoint.

    Raises:
        CheckpointError: a file is missing, cut short, changed or not a plain file.
    """
    own = "objective.safetensors"
    try:
        if path.is_symlink():
            raise CheckpointError(f"checkpoint {path.name} is damaged: it is a link")
        for name in (DIGESTS, "state.json"):
            _check_file(path / name)
        state, files = (parse_json((path / name).read_text(encoding="utf-8")) for name in ("state.json", DIGESTS))
        if state.get("format") != FORMAT:
            raise CheckpointError(
                f"checkpoint {path.name} has format {state.get('format')}; this version of mlxft reads {FORMAT}"
            )
        for name in {*_PARTS, *files}:
            _check_file(path / name)
            if digest(path / name) != files[name]:
                raise CheckpointError(f"checkpoint {path.name} is damaged: {name} is not what was written")
        held: list[Any] = [mx.load(str(path / name)) for name in _PARTS[:2]]
        held.append(mx.load(str(path / own)) if own in files else {})
    except CheckpointError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as e:
        reason = f"{e.args[0]!r} is missing" if isinstance(e, KeyError) else str(e)
        raise CheckpointError(f"checkpoint {path.name} is damaged: {reason}") from e
    weights, optimizer, objective = held
    return Snapshot(weights, optimizer, state, objective)


def _check_file(file: Path) -> None:
    """Raise a CheckpointError for anything but a plain file: a link may lead anywhere, and a pipe never ends."""
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise CheckpointError(f"checkpoint {file.parent.name} is damaged: {file.name} is not a file")
