"""Make, open, list, watch and remove run folders, read their status, and load the trained adapter or model.

Listing runs needs neither mlx nor pydantic, so imports that need them are inside functions.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from rich.console import Console

from mlxft.errors import CheckpointError, ConfigError, MlxftError, ModelError, nearest, switch
from mlxft.files import (
    Held,
    check_replaceable,
    claim,
    clear,
    empty,
    hold,
    is_empty,
    is_held,
    read_mark,
    refuse_if_held,
    remove,
    temporary,
)
from mlxft.text import Event, home_path, parse_json, read_file, validation_figure

if TYPE_CHECKING:
    from mlxft.config import Config
    from mlxft.model.load import Loaded


# --- rundir -----------------------------------------------------------------------------------------------------------
# Open a run folder, check that it may be written, and load its adapter or model for use.

# Settings that may differ when a run is resumed; any other would make it another run.
FREE_ON_RESUME = {
    "model.trust_remote_code",
    "run.report_every",
    "run.save_every",
    "run.keep",
    "run.keep_awake",
    "memory.measure",
    "distributed.ranks",
    "distributed.weights",
    "distributed.timeout",
    "run.dir",
    "run.name",
    "run.sample_prompts",
    "run.sample_tokens",
    "report.to",
    "report.project",
}


@dataclass(frozen=True, repr=False)
class Run:
    """A run folder."""

    dir: Path
    config: Config

    @property
    def result(self) -> Path:
        """Return the folder of the trained adapter or model."""
        return self.dir / ("model" if self.config.tune.method == "full" else "adapter")

    @property
    def template(self) -> Path | None:
        """Return the file of the chat template that the run was trained with, if it keeps one; see `kept_template`."""
        from mlxft.model.adapters import kept_template

        return kept_template(self.dir, None)

    @property
    def resume(self) -> str:
        """Return the command that resumes the run."""
        from mlxft.config import function_override, is_foreign, override

        function = getattr(getattr(self.config, "rewards", None), "function", None)
        given = [] if function is None else [function_override(function)]
        given += [override("objective", self.config.objective)] if is_foreign(self.config.objective) else []
        met = getattr(getattr(self.config, "environment", None), "path", None)
        given += [override("environment.path", met)] if ":" in str(met) else []
        return shlex.join(["mlxft", "train", "--resume", str(self.dir), *given])

    def metrics(self, event: str | None = None) -> list[dict[str, Any]]:
        """Return the events of metrics.jsonl, all or of one kind."""
        lines = read_file(self.dir / "metrics.jsonl").decode().splitlines()
        found = [parse_json(line) for line in lines if line.endswith("}")]
        return [e for e in found if event in (None, e["event"])]

    def _facts(self) -> dict[str, Any]:
        """What it is, and how far it has come."""
        config = self.config
        facts: dict[str, Any] = {"objective": config.objective, "base": config.model.path}
        events = self.metrics() if (self.dir / "metrics.jsonl").exists() else []
        if trained := [e for e in events if e["event"] == "train"]:
            facts |= {"step": trained[-1]["step"], "loss": round(trained[-1]["loss"], 4)}
            facts["curve"] = [(e["step"], e["loss"]) for e in trained]
        if evals := [e for e in events if e["event"] == "eval"]:
            name, value = validation_figure(min(evals, key=lambda e: e["loss"]))
            facts[f"validation {name}"] = round(value, 4)
        return facts

    def __repr__(self) -> str:
        facts = {name: value for name, value in self._facts().items() if name != "curve"}
        return f"Run({str(self.dir)!r}, {', '.join(f'{name}: {value}' for name, value in facts.items())})"

    def next_commands(self) -> list[str]:
        """Return three commands for the trained model."""
        name, held_out = shlex.quote(str(self.dir)), self.config.data.held_out
        if self.config.objective == "reward":
            rows = shlex.quote(held_out.path if held_out and isinstance(held_out.path, str) else "pairs.jsonl")
            return [f"mlxft eval {name} {rows}", f"mlxft score {name} {rows}", f"mlxft runs report {name}"]
        fused = shlex.quote(f"{self.dir.name}-fused")
        asked = prompt_argument(self.config.run.sample_prompts)
        return [f"mlxft compare {asked}--models base,{name}", f"mlxft serve {name}", f"mlxft fuse {name} {fused}"]

    def _repr_html_(self) -> str:
        """For notebooks: what it is, and the curve of the training loss."""
        from mlxft.trainer.report import curve_svg

        facts = self._facts()
        curve = facts.pop("curve", [])
        cells = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in facts.items()
        )
        return f"<b>{escape(str(self.dir))}</b><table>{cells}</table>{curve_svg(curve)}"


def prompt_argument(prompts: list[str], kept: bool = True) -> str:
    """Return an argument of `mlxft compare` and a space: the first short prompt; "" if the run has kept longer ones."""
    short = [p for p in prompts if p.isprintable() and len(p) <= 100 and p.strip(" -") == p]
    return f"{shlex.quote(short[0])} " if short else "" if prompts and kept else "'a prompt' "


_version = cache(importlib.metadata.version)  # it parses a file each time


def versions() -> dict[str, str]:
    """Return the versions of Python and the main packages."""
    names = ("mlxft", "mlx", "mlx-lm", "transformers", "numpy")
    return {"python": platform.python_version()} | {n: _version(n) for n in names}


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run folder and not a model folder."""
    return (folder / "config.yaml").is_file() and not (folder / "config.json").exists()


def named_run(name: str | Path, place: Path = Path("runs")) -> Path:
    """Return the run folder `place`/NAME for the bare name of a run, if nothing of that name is here; else the path."""
    path, run = home_path(name), place / name
    with suppress(OSError):  # too long for a path
        if not path.exists() and may_be_run(run):
            return run
    return path


def find_adapter(path: Path) -> Path:
    """Return the adapter folder of a run, or the folder itself."""
    inside = path / "adapter"
    return inside if (inside / "adapter_config.json").exists() else path


_HUB_ALONE = re.compile(r"[\w-][\w.-]{0,95}(?<!\.gguf)", re.ASCII)  # a name without an owner, perhaps of a run


class Located(NamedTuple):
    """Where a model that a user names leads.

    Attributes:
        path: the model, or what an adapter stands in or on.
        adapter: folder of an adapter; None: none.
        head: file of a reward model's head.
    """

    path: str | Path
    adapter: Path | None
    head: Path | None


def locate(path: str | Path | Run, adapter: str | Path | None = None, *, scores: bool = False) -> Located:
    """Find a run, an adapter folder, a fused or any other model; arguments and errors as for `load_run`."""
    path = path.dir if isinstance(path, Run) else path
    folder = home_path(path)
    if adapter is None and is_run(folder):
        run = open_run(folder)
        if not run.result.exists():
            raise ModelError(f"{folder} has no trained weights yet; resume it with {run.resume}")
        path, adapter = (run.result, None) if run.config.tune.method == "full" else (path, run.result)
    elif adapter is None and (folder / "adapter_config.json").exists():
        adapter = folder
    found = None if adapter is None else find_adapter(home_path(adapter))
    if found is None and _HUB_ALONE.fullmatch(str(path)) and not folder.exists() and (there := runs_there(path)):
        from huggingface_hub import try_to_load_from_cache

        from mlxft.model.load import ALIASES

        if path not in ALIASES and not isinstance(try_to_load_from_cache(str(path), "config.json"), str):
            raise ModelError(f"{path}: no such run{there}; a model of the hub is named as OWNER/NAME")
    return Located(path, found, _checked_head(found or home_path(path), scores))


def load_run(
    path: str | Path | Run, adapter: str | Path | None = None, *, scores: bool = False, **options: Any
) -> Loaded:
    """Load a run, an adapter folder, a fused or any other model for use, with an adapter if one is given.

    Args:
        path: a path, or a Run as `train` and `open_run` return it.
        scores: load a reward model with its head; without it, a reward model is refused.
        options: options of mlxft.model.load.load; they override what the run or adapter records about its base.
    Raises:
        ModelError: the path does not exist, the adapter belongs to another base, or the model is of the wrong kind.
    """
    from mlxft.data.dataset import end_completions, turn_end
    from mlxft.model.adapters import load_with_adapter
    from mlxft.model.heads import load_head
    from mlxft.model.load import base_fingerprint
    from mlxft.model.load import load as load_model
    from mlxft.model.logits import Split

    at, found, head = locate(path, adapter, scores=scores)
    loaded = load_model(str(at), **options) if found is None else load_with_adapter(at, found, options)
    if head is not None:
        load_head(Split(loaded.model), head, base_fingerprint(loaded))
        loaded.model.eval()
    # The EOS tokens of a base model may not match the chat template that it is used with.
    end_completions(loaded.tokenizer, turn_end(loaded.tokenizer))
    return loaded


def _checked_head(folder: Path, scores: bool) -> Path | None:
    """Return the head file in a folder, which must exist if and only if `scores` are wanted."""
    from mlxft.model.adapters import read_adapter_config
    from mlxft.model.heads import HEAD_FILE

    head = folder / HEAD_FILE if (folder / HEAD_FILE).is_file() else None
    about = read_adapter_config(folder).get("mlxft", {}) if (folder / "adapter_config.json").is_file() else {}
    if head is None and about.get("objective") == "reward":
        raise ModelError(f"{folder} is a reward model's adapter without its head: {HEAD_FILE} is missing")
    if scores and head is None:
        raise ModelError(
            f"{folder} gives text, not scores: it has no {HEAD_FILE}; give a run with objective: reward (for other "
            "runs use mlxft generate)"
        )
    if head is not None and not scores:
        raise ModelError(
            f"{folder} is a reward model: it gives scores, not text; use mlxft score, export it as --format seq-cls, "
            "or give another run"
        )
    return head


def open_run(folder: str | Path) -> Run:
    """Return the run in a folder.

    Raises:
        CheckpointError: the folder is not a run folder.
    """
    from mlxft.config import load_config

    folder = home_path(folder)
    try:
        config = load_config(folder / "config.yaml", looked_at=True)
    except MlxftError as e:
        raise CheckpointError(f"{folder} is not a run folder: {e}") from e
    run = config.run.model_copy(update={"dir": folder.resolve().parent, "name": folder.resolve().name})
    return Run(folder, config.model_copy(update={"run": run}))


def check_folder(run: Run, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that may not be written: before anything is loaded, and again before anything is written."""
    if resume and overwrite:
        raise ConfigError(f"give {switch('resume')} or {switch('overwrite')}, not both")
    if run.dir.exists() and not run.dir.is_dir():
        raise ConfigError(f"run.name: {run.dir} is a file")
    if not run.dir.exists():
        return
    if overwrite:
        check_replaceable(run.dir, "run")
        _check_unused(run)
    elif is_empty(run.dir):
        return
    elif not resume:
        raise ConfigError(
            f"{run.dir} exists; resume it with {switch('resume')}, replace it with {switch('overwrite')}, or choose "
            "another run.name"
        )
    else:
        _check_resumable(run)


def _check_resumable(run: Run) -> None:
    """Refuse to resume in a folder that no run made, or with other settings."""
    from mlxft.config import load_config

    file = run.dir / "config.yaml"
    stored = load_config(file, looked_at=True) if file.is_file() else None
    # A run of an older version has no mark, but its config.yaml has `versions`, which no user writes into a recipe.
    mark = read_mark(run.dir)
    if not (stored and stored.versions) if mark is None else mark.kind != "run":
        raise ConfigError(f"{run.dir}: is not a run folder that mlxft made, so nothing is written there")
    if run.config.tune.method == "full":
        check_replaceable(run.result, "model")
    for folder in (run.result, run.dir / "checkpoints"):
        if folder.is_symlink():
            raise ConfigError(
                f"{folder}: is a link, and its target is neither replaced nor removed; move the folder itself back here"
            )
    if stored is not None:
        _check_same(stored, run)


def _check_unused(run: Run) -> None:
    """Refuse to replace a folder that contains the files to train on."""
    model, data = run.config.model, run.config.data
    used: dict[str, Any] = {
        "model.path": model.path,
        "model.adapter": model.adapter,
        "model.chat_template": model.chat_template,
        "data.valid": data.held_out and data.held_out.path,
        **{"data.train" if name == "train" else f"data.mix.{name}.path": s.path for name, s in data.sources.items()},
    }
    replaced = run.dir.resolve()
    paths = [(k, path) for k, v in used.items() for path in (v if isinstance(v, list) else [v]) if path is not None]
    inside = list(dict.fromkeys(k for k, v in paths if replaced in (p := Path(v).absolute(), *p.parents)))
    if inside:
        raise ConfigError(f"{run.dir}: {', '.join(inside)} is in this run folder; choose another run.name")


def _check_same(before: Config, run: Run) -> None:
    """Refuse settings that would make it another run, and name them."""
    from mlxft.config import flat

    now, free, lengths = run.config, set(FREE_ON_RESUME), {"run.steps", "run.epochs"}
    old, new = flat(before.begun.model_dump(mode="json")), flat(now.model_dump(mode="json"))
    if now.optim.schedule == "constant" and (now.optim.warmup == 0 or now.optim.warmup >= 1):
        free |= lengths  # the learning rate does not depend on the length then
    keys = [k for k in {**old, **new} if k not in free and not k.startswith("versions") and old.get(k) != new.get(k)]
    if keys:
        lines = [f"{k}: the run has {old.get(k)!r}, the recipe has {new.get(k)!r}" for k in keys]
        text = "cannot resume with other settings:\n  " + "\n  ".join(lines)
        raise ConfigError(text + (_way_to_extend(before.begun, run) if {*keys} <= lengths else ""))


def _way_to_extend(before: Config, run: Run) -> str:
    """Return how a run whose rates hang on its length is trained further."""
    config, optim, full = run.config, run.config.optim, run.config.tune.method == "full"
    first, now = before.run, config.run
    more = [
        f"run.{name}={after - length if length is not None and after > length else after:g}"  # what is left, or all
        for name, length, after in (("steps", first.steps, now.steps), ("epochs", first.epochs, now.epochs))
        if after is not None
    ]
    # An adapter has its own rank and targets, so the section tune is left out.
    begin = [f"model.path={run.result}"] if full else ["tune={}", f"model.adapter={run.dir}"]
    command = ["mlxft", "train", str(run.dir / "config.yaml"), *begin, f"run.name={run.dir.name}-2", *more]
    warmup = f" and optim.warmup: {optim.warmup:g}, a share" if 0 < optim.warmup < 1 else ""
    return (
        f"\nthe rates of a run with optim.schedule: {optim.schedule}{warmup} hang on its length; only constant rates, "
        f"after a warm-up in steps, can be extended. Train its result further in a new run: {shlex.join(command)}"
    )


def make_folder(run: Run, resume: bool, overwrite: bool) -> None:
    """Prepare the run folder, which is held, for writing; with `overwrite`, delete what an earlier run left in it."""
    try:
        check_folder(run, resume, overwrite)
        if overwrite:
            empty(run.dir)
        if not resume or is_empty(run.dir):
            claim(run.dir, "run")
        for folder in (run.dir, run.result, run.dir / "checkpoints"):
            clear(folder)
    except OSError as e:
        raise ConfigError(f"run.dir: cannot write to {run.dir}: {e.strerror or e}") from e


# --- status -----------------------------------------------------------------------------------------------------------
# status.json of a run folder: whether the run is running, done, interrupted or failed, and since when.
#
# Reading it needs only the standard library, so that hundreds of runs are listed at once.

STATUS_FILE = "status.json"


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return the content of status.json; None if it is missing (a run of an older version) or not valid."""
    try:
        found = parse_json(read_file(folder / STATUS_FILE))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("status"), str) else None


def now() -> str:
    """Return the time in UTC, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@contextmanager
def recorded(held: Held) -> Iterator[None]:
    """Record in status.json that a run is training in a folder, and how it ends.

    An exception may set the status by an attribute `run_status`.
    """
    from mlxft.files import write_text

    folder = held.folder

    def write(**changes: Any) -> None:
        held.check()
        record.update(changes)
        write_text(folder / STATUS_FILE, json.dumps(record, indent=2) + "\n")

    before = read_status(folder) or {}
    record: dict[str, Any] = {"pid": os.getpid(), "host": platform.node(), "started": before.get("started") or now()}
    write(status="running", locked=held.locked, **({"resumed": now()} if before else {}))
    try:
        yield
    except BaseException as e:
        status = getattr(e, "run_status", "interrupted" if isinstance(e, KeyboardInterrupt) else "failed")
        message = str(e) or type(e).__name__
        with suppress(CheckpointError):  # on a full disk the first error is the one to report
            write(status=status, ended=now(), **({"error": message} if status == "failed" else {}))
        raise
    write(status="done", ended=now())


# --- runs -------------------------------------------------------------------------------------------------------------
# List run folders with their progress and best metric, without heavy imports.
#
# Only the needed lines of metrics.jsonl are parsed, so that hundreds of runs take less than a second.

_PARTS = (
    "config.yaml",
    "metrics.jsonl",
    "status.json",
    "checkpoints",
    "adapter",
)  # any of these makes a folder a run folder
INSIDE = {"adapter", "model", "checkpoints", "eval", "wandb", "tensorboard"}  # folders in a run that contain no runs
# The metric that a run is compared by is the first of these that a validation has.
HEADLINES = ("reward", "accuracy", "loss")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Best:
    """The main metric of the kept weights, from their validation, else from the last training report."""

    metric: str
    value: float
    step: int
    of: str  # validation or training

    def __str__(self) -> str:
        return f"{'train ' if self.of == 'training' else ''}{self.metric} {self.value:.4g} @ {self.step}"


@dataclass(frozen=True)
class RunInfo:
    """Summary of a run folder.

    Args:
        status: running, done, interrupted or failed; half-written if files are missing; unfinished for a run of an
            older version that may have been killed.
        note: what is unusual about the folder.
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
        """Return the summary as JSON."""
        return {k: v for k, v in asdict(self).items() if k != "record"} | {"dir": str(self.dir)}


def may_be_run(folder: Path) -> bool:
    """Return whether a folder is a run folder, or was about to become one."""
    return any(os.path.exists(folder / part) for part in _PARTS)


def list_runs(place: Path, every: bool = False) -> list[RunInfo]:
    """Return the runs in a folder, oldest first.

    Args:
        every: include runs in subfolders, such as the trials of a sweep.
    """
    found = [run_info(folder, str(folder.relative_to(place))) for folder in _folders(place, every)]
    return sorted(found, key=lambda r: (r.started, r.name))


def _folders(place: Path, every: bool) -> Iterator[Path]:
    inside: list[Path] = []
    with suppress(PermissionError), os.scandir(place) as entries:  # other folders may be readable
        inside = [Path(e.path) for e in entries if e.is_dir() and not e.name.startswith(".")]
    for folder in inside:
        if may_be_run(folder):
            yield folder
        if every and folder.name not in INSIDE and not folder.is_symlink():  # links may form a loop
            yield from _folders(folder, every)


def find_run(name: str, place: Path) -> Path:
    """Return the run folder that a user names, below `place` or by its path.

    Raises:
        ConfigError: there is no such run; the message names the nearest one.
    """
    for folder in (place / name, home_path(name)):
        if folder.is_dir() and may_be_run(folder):
            return folder
    what = "is not a run folder" if (place / name).exists() or Path(name).exists() else "no such run"
    raise ConfigError(f"{name}: {what} in {place}{runs_there(name, place)}; mlxft runs --all lists them")


def runs_there(name: str | Path, place: Path = Path("runs")) -> str:
    """Return the runs in a folder, and which is nearest to another name, for a message; "" without runs."""
    there = sorted(str(f.relative_to(place)) for f in _folders(place, True)) if place.is_dir() else []
    more = f" and {len(there) - 8} more" if len(there) > 8 else ""
    return f"{nearest(Path(name).name, there)}; runs here: {', '.join(there[:8])}{more}" if there else ""


def read_run_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in config.yaml, unvalidated, whatever version wrote them.

    Raises:
        CheckpointError: the file is missing or not a mapping.
    """
    from mlxft.config import read_yaml  # it imports pydantic, which listing does not need

    try:
        found = read_yaml(read_file(folder / "config.yaml"), "config.yaml", _Loader)
    except (OSError, ValueError) as e:
        reason = " ".join((getattr(e, "strerror", None) or str(e)).split())
        raise CheckpointError(f"{folder}: config.yaml cannot be read: {reason}") from e
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder}: config.yaml is not a recipe")
    return found


def read_events(folder: Path) -> list[Event]:
    """Return the events of metrics.jsonl without lines cut short by a kill; [] if there is no file."""
    try:
        return parse_events(read_file(folder / "metrics.jsonl"))
    except OSError:
        return []


def parse_events(text: bytes) -> list[Event]:
    """Return the events in some lines of metrics.jsonl."""
    return [event for line in text.split(b"\n") if (event := _event(line)) is not None]


def _event(line: bytes) -> Event | None:
    try:
        found = parse_json(line)
    except ValueError:
        return None
    sound = isinstance(found, dict) and isinstance(found.get("event"), str) and type(found.get("step", 0)) is int
    return found if sound else None


def finite(value: Any) -> float | None:
    """Return a value as a finite float, else None; numbers that were not finite are stored as strings."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def headline(event: Event, of: str) -> Best | None:
    """Return the main metric of an event."""
    for metric in HEADLINES:
        if (value := finite(event.get(metric))) is not None:
            return Best(metric, value, int(event.get("step", 0)), of)
    return None


class _Metrics:
    """Find single events in the bytes of metrics.jsonl."""

    def __init__(self, folder: Path) -> None:
        try:
            self.text = read_file(folder / "metrics.jsonl")
        except OSError:
            self.text = b""

    def first(self) -> Event:
        """Return the first event, {} if there is none."""
        return _event(self.text[: self.text.find(b"\n") + 1]) or {}

    def last(self, mark: bytes = b'{"event"') -> Event:
        """Return the last complete event whose line contains `mark`, {} if there is none."""
        at = len(self.text)
        while (at := self.text.rfind(mark, 0, at)) >= 0:
            begin, end = self.text.rfind(b"\n", 0, at) + 1, self.text.find(b"\n", at)
            if end >= 0 and (event := _event(self.text[begin:end])) is not None:
                return event
        return {}

    def best(self) -> Best | None:
        """Return the main metric of the validation whose weights were kept, or of the last report."""
        evaluated = self.last(b'"best": true') or self.last(b'{"event": "eval"')
        found = headline(evaluated, "validation") if evaluated else None
        return found or headline(self.last(b'{"event": "train"'), "training")


def run_info(folder: Path, name: str | None = None) -> RunInfo:
    """Return the summary of a run folder; never raise an error, whatever is in it."""
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
    """Return the settings in config.yaml and what is wrong with it; parse it only if the events do not suffice."""
    try:
        text = read_file(folder / "config.yaml")
    except OSError as e:
        return {}, "no config.yaml" if e.errno == errno.ENOENT else f"config.yaml cannot be read: {e.strerror}"
    if complete and b"\nversions:" in text:  # the last section is there, so nothing was cut off
        return {}, ""
    try:
        return read_run_settings(folder), "" if complete else "no metrics yet"
    except CheckpointError as e:
        return {}, str(e).partition(": ")[2]


def _leaf(settings: dict[str, Any], section: str, key: str) -> str:
    found = settings.get(section)
    return str(found.get(key) or "") if isinstance(found, dict) else ""


def _status(folder: Path, record: dict[str, Any] | None, last: Event) -> tuple[str, str]:
    """Return the status of a run and a note."""
    if record is None:
        known = {"end": "done", "interrupted": "interrupted", "failed": "failed"}
        damaged = (folder / "status.json").exists()
        note = "status.json cannot be read" if damaged else "written by an older version: no status.json"
        return known.get(str(last.get("event")), "running" if is_held(folder) else "unfinished"), note
    status = str(record["status"])
    if status == "running" and not (is_held(folder) if record.get("locked", True) else _lives(record)):
        return "interrupted", "its process was killed"
    return status, ""


def _lives(record: dict[str, Any]) -> bool:
    """Return whether the run's process exists, for file systems without locks."""
    try:
        os.kill(int(record["pid"]), 0)
    except PermissionError:
        return True
    except (KeyError, TypeError, ValueError, OSError):
        return False
    return True


def _changed(folder: Path) -> str:
    """Return when a run of an older version began, estimated from its files."""
    for name in ("config.yaml", "metrics.jsonl", "."):
        try:
            at = (folder / name).stat().st_mtime
        except OSError:
            continue
        return datetime.fromtimestamp(at, timezone.utc).isoformat(timespec="seconds")
    return ""


def sure_place(place: Path) -> Path:
    """Return `place` if it is a folder.

    Raises:
        ConfigError: `place` is not a folder.
    """
    if not place.is_dir():
        raise ConfigError(f"--dir {place}: no such folder")
    return place


def find_removable(names: list[str], place: Path) -> dict[Path, int]:
    """Return the run folders below `place` that a user names, with their sizes in bytes.

    Raises:
        ConfigError: one is not a run folder below `place`, is a link, or contains files that mlxft did not make.
        CheckpointError: one is being trained.
    """
    folders = dict.fromkeys(_below(name, place) for name in names)
    for folder in folders:
        check_replaceable(folder, "run")
        refuse_if_held(folder)
    return {f: sum(p.lstat().st_size for p in f.rglob("*") if not p.is_dir()) for f in folders}


def _below(name: str, place: Path) -> Path:
    """Return the run folder with this name or path, below `place`."""
    top = Path(os.path.abspath(place))
    for found in (place / name, home_path(name)):
        folder = Path(os.path.abspath(found))
        if top not in folder.parents or not os.path.lexists(folder):
            continue
        if link := next(
            (p for p in (folder, *folder.parents) if p != top and top in p.parents and p.is_symlink()), None
        ):
            raise ConfigError(f"{name}: {link} is a link, and its target is not removed; remove the link yourself")
        return Path(os.path.abspath(find_run(str(folder), place)))
    if os.path.lexists(place / name):
        raise ConfigError(
            f"{name!r}: is not below {place}; give a run that is, or another folder with mlxft runs --dir"
        )
    find_run(name, place)
    raise ConfigError(f"{name}: is not below {place}; give --dir {Path(name).parent}")


def remove_run(folder: Path) -> None:
    """Remove a run folder. It is moved away at once, or stays complete.

    Raises:
        ConfigError: the folder now contains files that mlxft did not make.
        CheckpointError: the run is now being trained, or the folder cannot be removed.
    """
    away = temporary(folder)
    with hold(folder):
        check_replaceable(folder, "run")
        try:
            folder.rename(away)
            remove(away)
        except OSError as e:
            raise CheckpointError(f"{folder}: cannot be removed: {e.strerror or e}") from e


# --- watch ------------------------------------------------------------------------------------------------------------

EARLIER = 10  # number of earlier events to print when a log begins


class Tail:
    """Follow the events of a metrics.jsonl. A resumed run replaces the file; then it is read from its start."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._file = path, 0, 0

    def read(self) -> tuple[list[Event], bool]:
        """Return the events of complete lines since the last call, and whether the file was replaced."""
        try:
            found = self._path.stat()
            replaced = found.st_ino != self._file or found.st_size < self._at
            if replaced:
                self._at, self._file = 0, found.st_ino
            with self._path.open("rb") as file:
                file.seek(self._at)
                text = file.read()
        except OSError:
            return [], False
        whole = text[: text.rfind(b"\n") + 1]
        self._at += len(whole)
        return parse_events(whole), replaced


def watch(folder: Path, console: Console, every: float = 0.5) -> RunInfo:
    """Show a run until it ends: as the live view on a terminal, else as lines.

    Args:
        every: seconds between two reads of the files.
    Returns:
        The summary of the run at its end.
    """
    tail = Tail(folder / "metrics.jsonl")
    before, _ = tail.read()
    info = run_info(folder)
    from mlxft.trainer.report import LiveView, terminal

    sink = terminal(console, info.steps or 0, info.step) if info.status == "running" else None
    try:
        if isinstance(sink, LiveView):
            sink.recall(before)
        elif sink is not None:
            for event in before[-EARLIER:]:
                sink.event(event)
        while sink is not None:
            # Read the status first, then the events, so that the events before the end are shown.
            info = run_info(folder)
            events, replaced = tail.read()
            if replaced and isinstance(sink, LiveView):
                sink.recall(events)
            else:
                for event in events[-EARLIER:] if replaced else events:
                    sink.event(event)
            if info.status != "running":
                break
            time.sleep(every)
    finally:
        if sink is not None:
            sink.close()
    return info
