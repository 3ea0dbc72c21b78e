"""One run in detail, and runs side by side: what differs in their settings and in what came of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxft.errors import DataError, MlxftError
from mlxft.owned import check_file
from mlxft.recipe import flat
from mlxft.study.runs import Event, RunInfo, find_run, finite, read_events, read_settings, run_info

OWN = ("run.name", "run.dir", "data.date", "versions")  # of each run by itself: neither settings to compare nor to tune
# Of a training report: sums and speeds, which say what a run took.
COSTS = ("tokens", "trained_tokens", "tokens_per_s", "peak_memory_gb", "elapsed_s")
NOT_RESULTS = {"event", "step", "best", "epoch", "elapsed_s", "lr", "rollout", "tokens", "trained_tokens"}


@dataclass(frozen=True)
class Sample:
    """What a run answered to one prompt, first and last."""

    prompt: str
    first_step: int
    first: str
    last_step: int
    last: str


@dataclass(frozen=True)
class Details:
    """All that a run folder tells.

    Args:
        settings: dotted name -> value, in the order of config.yaml.
        differs: those that are not the default.
        before, kept, last: events: the validation of the untrained model, that of the weights that were kept, and the
            last training report; {} where there is none.
        speed: median of the reports' trained_tokens_per_s.
        files: what lies in the folder -> size in bytes.
    """

    info: RunInfo
    start: Event
    settings: dict[str, Any] = field(default_factory=dict)
    differs: dict[str, Any] = field(default_factory=dict)
    before: Event = field(default_factory=dict)
    kept: Event = field(default_factory=dict)
    last: Event = field(default_factory=dict)
    speed: float | None = None
    samples: list[Sample] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As JSON, without the events, which metrics.jsonl holds."""
        parts = {k: getattr(self, k) for k in ("settings", "differs", "before", "kept", "last", "files")}
        samples = [vars(s) for s in self.samples]
        data = {k: v for k, v in self.start.items() if k not in ("event", "step", "text")}
        return {**self.info.to_json(), "start": data, **parts, "speed": self.speed, "samples": samples}


def details(folder: Path, name: str | None = None) -> Details:
    """All that a run folder tells; what is missing or broken is left out, and said in info.note.

    Args:
        name: what to call the run; default: as its folder, which several may be called.
    """
    info, events = run_info(folder, name), read_events(folder)
    try:
        settings = flat(read_settings(folder))
    except MlxftError:
        settings = {}
    evals, trains = ([e for e in events if e["event"] == kind] for kind in ("eval", "train"))
    speeds = sorted(v for e in trains if (v := finite(e.get("trained_tokens_per_s"))) is not None)
    best = [e for e in evals if e.get("best") is True]
    return Details(
        info=info,
        start=next((e for e in events if e["event"] == "start"), {}),
        settings=settings,
        differs=unlike_default(settings),
        before=next((e for e in evals if e.get("step") == 0), {}),
        kept=(best or evals or [{}])[-1],
        last=(trains or [{}])[-1],
        speed=speeds[len(speeds) // 2] if speeds else None,
        samples=samples(events),
        files=_files(folder),
        events=events,
    )


def unlike_default(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not the default of this version; all, where the objective is not known."""
    from mlxft.config import config_class

    needed = {"model": {"path": "x"}, "data": {"train": "x", "format": "messages"}}
    objective = str(settings.get("objective", "sft"))
    try:
        default = flat(
            config_class(objective).model_validate(needed | {"objective": objective}).model_dump(mode="json")
        )
    except MlxftError:  # of another version
        default = {}
    default |= {"objective": "sft", "model.path": None, "data.train": None, "data.format": None}
    own = {k for k in settings if k.startswith(OWN)}
    return {k: v for k, v in settings.items() if k not in own and (k not in default or default[k] != v)}


def samples(events: Sequence[Event]) -> list[Sample]:
    """The first and the last answer to each prompt that was answered on the way."""
    found: dict[str, list[Event]] = {}
    for event in events:
        if event["event"] == "sample" and "prompt" in event and "answer" in event:
            found.setdefault(_text(event["prompt"]), []).append(event)
    return [
        Sample(prompt, e[0].get("step", 0), _text(e[0]["answer"]), e[-1].get("step", 0), _text(e[-1]["answer"]))
        for prompt, e in found.items()
    ]


def _text(value: Any) -> str:
    """A prompt may be a list of messages."""
    if isinstance(value, list):
        return "\n".join(f"{m['role']}: {m['content']}" for m in value if isinstance(m, dict) and {*m} >= {"role"})
    return str(value)


def _files(folder: Path) -> dict[str, int]:
    """What lies in a run folder, folders as one, and bytes."""
    found = {}
    for path in sorted(folder.iterdir()):
        files = [p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()]
        if files and not path.name.startswith("."):
            found[path.name + ("/" if path.is_dir() else "")] = sum(p.stat().st_size for p in files)
    return found


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Args:
        settings, results: name -> a value for each run, None where a run has none. Of the settings only those that
            differ; of the results all.
    """

    runs: list[RunInfo]
    settings: dict[str, list[Any]]
    results: dict[str, list[Any]]

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        names = [r.name for r in self.runs]
        return {
            "runs": names,
            "settings": {k: dict(zip(names, v)) for k, v in self.settings.items()},
            "results": {k: dict(zip(names, v)) for k, v in self.results.items()},
        }


def compare(runs: Sequence[Details]) -> Comparison:
    """What differs between runs in settings and result."""
    keys = dict.fromkeys(k for r in runs for k in r.settings if not k.startswith(("run.name", "run.dir")))
    settings = {k: [r.settings.get(k) for r in runs] for k in keys}
    results = [result(r) for r in runs]
    names = dict.fromkeys(k for r in results for k in r)
    return Comparison(
        runs=[r.info for r in runs],
        settings={k: v for k, v in settings.items() if any(x != v[0] for x in v[1:])},
        results={k: [r.get(k) for r in results] for k in names},
    )


def result(run: Details) -> dict[str, Any]:
    """What came of a run: the validation of the weights that were kept, the last report, and what it took."""
    kept, last, start = run.kept, run.last, run.start
    found: dict[str, Any] = {"status": run.info.status, "steps": run.info.step}
    if kept:
        found["best step"] = kept.get("step")
        found |= {f"validation {k}": v for k, v in kept.items() if k not in NOT_RESULTS and finite(v) is not None}
    known = dict.fromkeys([k for k in kept if k not in NOT_RESULTS] + ["loss", "accuracy", "reward", "kl"])
    found |= {f"training {k}": last[k] for k in known if finite(last.get(k)) is not None}
    found |= {k: start[k] for k in ("trainable_parameters",) if k in start}
    found |= {k: last[k] for k in COSTS if k in last and k != "tokens_per_s"}
    if run.speed is not None:
        found["trained_tokens_per_s"] = run.speed
    return found


def plot_runs(names: Sequence[str], place: Path, out: Path | None, overwrite: bool = False) -> list[Path]:
    """Draw the curves of one run, or of several in one picture.

    Args:
        out: .png, .svg or .pdf; default: the run's name, or the names, .png in the working directory.
        overwrite: replace the file.
    Raises:
        ConfigError: no such run, another suffix, matplotlib is not installed, or the file is there.
        DataError: a run has no metrics.
    """
    from mlxft.study.drawing import check_suffix
    from mlxft.study.plots import curves, overlay

    folders = {name: find_run(name, place) for name in names}
    titles = {
        Path(name).name if len({Path(n).name for n in names}) == len(names) else name: f for name, f in folders.items()
    }
    out = check_suffix(out or Path("-".join(t.replace("/", "-") for t in titles) + ".png"))
    check_file(out, overwrite)
    runs = {title: read_events(folder) for title, folder in titles.items()}
    try:
        if len(runs) == 1:
            ((title, events),) = runs.items()
            return curves(events, out, title=title)
        return overlay(runs, out)
    except DataError as e:
        raise DataError(f"{', '.join(names)}: {e}" if len(runs) == 1 else str(e)) from e
