"""Checkpoints that resume exactly: checkpoints/step-N/, whole or not there.

weights.safetensors      trained parameters
optimizer.safetensors    its state and master weights
objective.safetensors    a rollout that is in use, where there is one
state.json               step, data position, counters, best so far, random state, hashes of the files
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxft.errors import CheckpointError
from mlxft.train.files import digest, flush, save_arrays, writing

FORMAT = 2


@dataclass
class Snapshot:
    """What a checkpoint holds."""

    weights: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    state: dict[str, Any]
    objective: dict[str, mx.array] = field(default_factory=dict)


def save(folder: Path, step: int, snapshot: Snapshot, keep: int) -> Path:
    """Write checkpoints/step-N and drop all but the newest `keep`.

    Raises:
        CheckpointError: it can not be written; the older ones stay.
    """
    final, beside = folder / f"step-{step}", folder / f".tmp-step-{step}"
    try:
        with writing(final):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            arrays = {"weights.safetensors": snapshot.weights, "optimizer.safetensors": snapshot.optimizer}
            if snapshot.objective:
                arrays["objective.safetensors"] = snapshot.objective
            for name, tree in arrays.items():
                save_arrays(beside / name, tree)
            hashes = {name: digest(beside / name) for name in arrays}
            state = {"format": FORMAT, "step": step, "files": hashes, **snapshot.state}
            (beside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
            for file in beside.iterdir():
                flush(file)
            shutil.rmtree(final, ignore_errors=True)  # only there when a damaged one is being replaced
            beside.rename(final)
            flush(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    found = checkpoints(folder)
    now = found.index(final)
    # Those of later steps are damaged ones that a resume has passed over: they must not count as the newest.
    for unwanted in found[: max(0, now + 1 - keep)] + found[now + 1 :]:
        shutil.rmtree(unwanted, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = [p for p in folder.glob("step-*") if p.name[5:].isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name[5:]))


def load_newest(folder: Path, say: Callable[[str], None]) -> Snapshot | None:
    """The newest whole checkpoint; None where there is none. `say` hears of each that is damaged.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    for leftover in folder.glob(".tmp-step-*") if folder.is_dir() else ():
        shutil.rmtree(leftover, ignore_errors=True)
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return load(path)
        except CheckpointError as e:
            older = path != found[0]
            say(f"{e}; {'using the one before it' if older else 'there is none before it'}")
    if found:
        raise CheckpointError(f"{folder}: no checkpoint is whole; start again with --overwrite")
    return None


def load(path: Path) -> Snapshot:
    """Read one checkpoint.

    Raises:
        CheckpointError: a file is missing, cut short or changed.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = state["files"]
        for name, expected in files.items():
            if digest(path / name) != expected:
                raise CheckpointError(f"checkpoint {path.name} is damaged: {name} is not what was written")
        held: list[Any] = [mx.load(str(path / name)) for name in ("weights.safetensors", "optimizer.safetensors")]
        own = "objective.safetensors"
        held.append(mx.load(str(path / own)) if own in files else {})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {path.name} is damaged: {e}") from e
    if state.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path.name} has format {state.get('format')}, this mlxft reads {FORMAT}")
    weights, optimizer, objective = held
    return Snapshot(weights, optimizer, state, objective)
