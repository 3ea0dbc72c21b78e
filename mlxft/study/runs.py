"""Run folders as a list: what each is, how far it is and how good, read without loading anything heavy.

Of metrics.jsonl only the lines that are needed are parsed, so that hundreds of runs take less than a second.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from mlxft.errors import CheckpointError, ConfigError, nearest
from mlxft.owned import check_replaceable, hold, is_held, refuse_if_held, remove
from mlxft.temporary import temporary
from mlxft.text import home_path, parse_json, read_file
from mlxft.trainer.status import read_status

Event = dict[str, Any]
PARTS = ("config.yaml", "metrics.jsonl", "status.json", "checkpoints", "adapter")  # one makes a folder a run's
INSIDE = {"adapter", "model", "checkpoints", "eval", "wandb", "tensorboard"}  # folders of a run that hold no runs
# What a run is judged by: the first of these that a validation has.
HEADLINES = ("reward", "accuracy", "loss")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Best:
    """The headline number of the weights that were kept: of their validation, else of the last training report."""

    metric: str
    value: float
    step: int
    of: str  # validation or training

    def __str__(self) -> str:
        return f"{'train ' if self.of == 'training' else ''}{self.metric} {self.value:.4g} @ {self.step}"


@dataclass(frozen=True)
class RunInfo:
    """A run folder at a glance.

    Args:
        status: running, done, interrupted, failed; half-written: parts are missing; unfinished: an older version's
            run, which may have been killed.
        note: what is odd about the folder.
    """

    name: str
    dir: Path
    status: str
    note: str = ""
    error: str = ""
    objective: str = ""
    base: str = ""
    method: str = ""
    step: int = 0
    steps: int | None = None
    best: Best | None = None
    started: str = ""  # UTC, ISO 8601
    ended: str = ""
    record: dict[str, Any] = field(default_factory=dict)  # status.json

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {k: v for k, v in asdict(self).items() if k != "record"} | {"dir": str(self.dir)}


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, or was about to become one."""
    return any(os.path.exists(folder / part) for part in PARTS)


def list_runs(place: Path, every: bool = False) -> list[RunInfo]:
    """The runs in a folder, oldest first.

    Args:
        every: also those further down, such as the trials of a sweep.
    """
    found = [run_info(folder, str(folder.relative_to(place))) for folder in _folders(place, every)]
    return sorted(found, key=lambda r: (r.started, r.name))


def _folders(place: Path, every: bool) -> Iterator[Path]:
    inside: list[Path] = []
    with suppress(PermissionError), os.scandir(place) as entries:  # other folders can be read
        inside = [Path(e.path) for e in entries if e.is_dir() and not e.name.startswith(".")]
    for folder in inside:
        if is_run(folder):
            yield folder
        if every and folder.name not in INSIDE and not folder.is_symlink():  # a link may lead round in a circle
            yield from _folders(folder, every)


def find_run(name: str, place: Path) -> Path:
    """The run folder that a user names: below `place`, or by its path.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    for folder in (place / name, home_path(name)):
        if folder.is_dir() and is_run(folder):
            return folder
    there = [str(f.relative_to(place)) for f in _folders(place, True)] if place.is_dir() else []
    what = "is no run folder" if (place / name).exists() or Path(name).exists() else "no such run"
    raise ConfigError(f"{name}: {what} in {place}{nearest(name, there)}; mlxft runs --all lists them")


def read_settings(folder: Path) -> dict[str, Any]:
    """config.yaml as it stands, of whatever version.

    Raises:
        CheckpointError: it is missing or no mapping.
    """
    from mlxft.recipe import read_yaml  # it takes pydantic, which listing has no need of

    try:
        found = read_yaml(read_file(folder / "config.yaml"), "config.yaml", _Loader)
    except (OSError, ValueError) as e:
        reason = " ".join((getattr(e, "strerror", None) or str(e)).split())
        raise CheckpointError(f"{folder}: config.yaml can not be read: {reason}") from e
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder}: config.yaml is no recipe")
    return found


def read_events(folder: Path) -> list[Event]:
    """The events of metrics.jsonl; lines that a kill has cut short are left out. [] without the file."""
    try:
        return parse_events(read_file(folder / "metrics.jsonl"))
    except OSError:
        return []


def parse_events(text: bytes) -> list[Event]:
    """The events in some lines of metrics.jsonl."""
    return [event for line in text.split(b"\n") if (event := _event(line)) is not None]


def _event(line: bytes) -> Event | None:
    try:
        found = parse_json(line)
    except ValueError:
        return None
    sound = isinstance(found, dict) and isinstance(found.get("event"), str) and type(found.get("step", 0)) is int
    return found if sound else None


def finite(value: Any) -> float | None:
    """A number that is one; what was not finite was written as text."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def headline(event: Event, of: str) -> Best | None:
    """What an event is judged by."""
    for metric in HEADLINES:
        if (value := finite(event.get(metric))) is not None:
            return Best(metric, value, int(event.get("step", 0)), of)
    return None


class _Metrics:
    """Single events out of the bytes of metrics.jsonl."""

    def __init__(self, folder: Path) -> None:
        try:
            self.text = read_file(folder / "metrics.jsonl")
        except OSError:
            self.text = b""

    def first(self) -> Event:
        """The first event, {} if there is none."""
        return _event(self.text[: self.text.find(b"\n") + 1]) or {}

    def last(self, mark: bytes = b'{"event"') -> Event:
        """The last whole event whose line holds `mark`, {} if there is none."""
        at = len(self.text)
        while (at := self.text.rfind(mark, 0, at)) >= 0:
            begin, end = self.text.rfind(b"\n", 0, at) + 1, self.text.find(b"\n", at)
            if end >= 0 and (event := _event(self.text[begin:end])) is not None:
                return event
        return {}

    def best(self) -> Best | None:
        """The headline of the validation whose weights were kept, or of the last report."""
        evaluated = self.last(b'"best": true') or self.last(b'{"event": "eval"')
        found = headline(evaluated, "validation") if evaluated else None
        return found or headline(self.last(b'{"event": "train"'), "training")


def run_info(folder: Path, name: str | None = None) -> RunInfo:
    """What a run folder is; never an error, whatever is in it."""
    metrics, record = _Metrics(folder), read_status(folder)
    start, last = metrics.first(), metrics.last()
    settings, damage = _settings(folder, complete=bool(start))
    status, note = _status(folder, record, last)
    if damage:
        status, note = ("half-written" if status in ("unfinished", "done") else status), damage
    record = record or {}
    return RunInfo(
        name=folder.name if name is None else name,
        dir=folder,
        status=status,
        note=note,
        error=str(record.get("error", "")) if status == "failed" else "",
        objective=str(start.get("objective") or settings.get("objective") or ""),
        base=str(start.get("base") or _leaf(settings, "model", "path")),
        method=str(start.get("method") or _leaf(settings, "tune", "method")),
        step=int(finite(last.get("step")) or 0),
        steps=int(steps) if (steps := finite(start.get("steps"))) is not None else None,
        best=metrics.best(),
        started=str(record.get("started") or _changed(folder)),
        ended=str(record.get("ended", "")) if status != "running" else "",
        record=record,
    )


def _settings(folder: Path, complete: bool) -> tuple[dict[str, Any], str]:
    """What is needed of config.yaml, and what is wrong with it. It is parsed only where events do not say the same."""
    try:
        text = read_file(folder / "config.yaml")
    except OSError as e:
        return {}, "no config.yaml" if e.errno == errno.ENOENT else f"config.yaml can not be read: {e.strerror}"
    if complete and b"\nversions:" in text:  # its last section: nothing was cut off
        return {}, ""
    try:
        return read_settings(folder), "" if complete else "no metrics yet"
    except CheckpointError as e:
        return {}, str(e).partition(": ")[2]


def _leaf(settings: dict[str, Any], section: str, key: str) -> str:
    found = settings.get(section)
    return str(found.get(key) or "") if isinstance(found, dict) else ""


def _status(folder: Path, record: dict[str, Any] | None, last: Event) -> tuple[str, str]:
    """Status and note."""
    if record is None:
        known = {"end": "done", "interrupted": "interrupted", "failed": "failed"}
        damaged = (folder / "status.json").exists()
        note = "status.json can not be read" if damaged else "by an older version: no status.json"
        return known.get(str(last.get("event")), "running" if is_held(folder) else "unfinished"), note
    status = str(record["status"])
    if status == "running" and not (is_held(folder) if record.get("locked", True) else _lives(record)):
        return "interrupted", "its process was killed"
    return status, ""


def _lives(record: dict[str, Any]) -> bool:
    """Whether the process is there, where a file system has no locks to tell."""
    try:
        os.kill(int(record["pid"]), 0)
    except PermissionError:
        return True
    except (KeyError, TypeError, ValueError, OSError):
        return False
    return True


def _changed(folder: Path) -> str:
    """When a run of an older version began, as far as its files tell."""
    for name in ("config.yaml", "metrics.jsonl", "."):
        try:
            at = (folder / name).stat().st_mtime
        except OSError:
            continue
        return datetime.fromtimestamp(at, timezone.utc).isoformat(timespec="seconds")
    return ""


def sure_place(place: Path) -> Path:
    """`place`, if it is a folder.

    Raises:
        ConfigError: it is none.
    """
    if not place.is_dir():
        raise ConfigError(f"--dir {place}: no such folder")
    return place


def find_removable(names: list[str], place: Path) -> dict[Path, int]:
    """The run folders below `place` that a user names -> bytes in them.

    Raises:
        ConfigError: one is no run folder below `place`, is a link, or holds what mlxft did not make.
        CheckpointError: one is being trained.
    """
    folders = dict.fromkeys(_below(name, place) for name in names)
    for folder in folders:
        check_replaceable(folder, "run")
        refuse_if_held(folder)
    return {f: sum(p.lstat().st_size for p in f.rglob("*") if not p.is_dir()) for f in folders}


def _below(name: str, place: Path) -> Path:
    """The run folder of this name, or with this path, below `place`."""
    top = Path(os.path.abspath(place))
    for found in (place / name, home_path(name)):
        folder = Path(os.path.abspath(found))
        if top not in folder.parents or not os.path.lexists(folder):
            continue
        if link := next(
            (p for p in (folder, *folder.parents) if p != top and top in p.parents and p.is_symlink()), None
        ):
            raise ConfigError(f"{name}: {link} is a link; what is behind it is not removed, remove the link yourself")
        return Path(os.path.abspath(find_run(str(folder), place)))
    if os.path.lexists(place / name):
        raise ConfigError(f"{name!r}: is not below {place}; name a run that is (mlxft runs --dir names another folder)")
    find_run(name, place)
    raise ConfigError(f"{name}: is not below {place}; give --dir {Path(name).parent}")


def remove_run(folder: Path) -> None:
    """Remove a run folder. It is gone from its place at once, or stays whole.

    Raises:
        ConfigError: there is something in it by now that mlxft did not make.
        CheckpointError: it is being trained by now, or can not be removed.
    """
    away = temporary(folder)
    with hold(folder):
        check_replaceable(folder, "run")
        try:
            folder.rename(away)
            remove(away)
        except OSError as e:
            raise CheckpointError(f"{folder}: can not be removed: {e.strerror or e}") from e
