"""Reports on runs: comparison, tables, and one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxft import __version__
from mlxft.errors import DataError, MlxftError
from mlxft.files import check_file, read_mark
from mlxft.runs import RunInfo, find_run, finite, now, read_events, read_run_settings, run_info
from mlxft.text import Event, parse_json, printable, read_file

if TYPE_CHECKING:
    pass


# --- compare ----------------------------------------------------------------------------------------------------------
OWN = ("run.name", "run.dir", "data.date", "versions")  # settings of a single run, which are not compared
# Sums and speeds of a training report.
COSTS = ("tokens", "trained_tokens", "tokens_per_s", "peak_memory_gb", "elapsed_s")
NOT_RESULTS = {"event", "step", "best", "epoch", "elapsed_s", "lr", "rollout", "tokens", "trained_tokens"}


@dataclass(frozen=True)
class Sample:
    """A run's first and last completion of one prompt."""

    prompt: str
    first_step: int
    first: str
    last_step: int
    last: str


@dataclass(frozen=True)
class Details:
    """The content of a run folder.

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
        """Return it as JSON, without the events, which are in metrics.jsonl."""
        parts = {k: getattr(self, k) for k in ("settings", "differs", "before", "kept", "last", "files")}
        samples = [vars(s) for s in self.samples]
        data = {k: v for k, v in self.start.items() if k not in ("event", "step", "text")}
        return {**self.info.to_json(), "start": data, **parts, "speed": self.speed, "samples": samples}


def details(folder: Path, name: str | None = None) -> Details:
    """Read a run folder; missing or broken parts are left out and named in info.note.

    Args:
        name: what to call the run; default: as its folder, which several may be called.
    """
    info, events = run_info(folder, name), read_events(folder)
    try:
        from mlxft.config import flat  # it needs pydantic, which listing runs does not

        settings = flat(read_run_settings(folder))
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
    """Return the settings that differ from this version's defaults; all if the objective is unknown."""
    from mlxft.config import config_class, flat

    needed = {"model": {"path": "x"}, "data": {"train": "x", "format": "messages"}}
    objective = str(settings.get("objective", "sft"))
    try:
        default = flat(
            config_class(objective, opened=True)
            .model_validate(needed | {"objective": objective})
            .model_dump(mode="json")
        )
    except MlxftError:  # of another version
        default = {}
    default |= {"objective": "sft", "model.path": None, "data.train": None, "data.format": None}
    own = {k for k in settings if k.startswith(OWN)}
    return {k: v for k, v in settings.items() if k not in own and (k not in default or default[k] != v)}


def samples(events: Sequence[Event]) -> list[Sample]:
    """Return the first and last completion of each sample prompt."""
    found: dict[str, list[Event]] = {}
    for event in events:
        if event["event"] == "sample" and "prompt" in event and "answer" in event:
            found.setdefault(_text(event["prompt"]), []).append(event)
    return [
        Sample(prompt, e[0].get("step", 0), _text(e[0]["answer"]), e[-1].get("step", 0), _text(e[-1]["answer"]))
        for prompt, e in found.items()
    ]


def _text(value: Any) -> str:
    """Return a prompt as text; it may be a list of messages."""
    if isinstance(value, list):
        return "\n".join(f"{m['role']}: {m['content']}" for m in value if isinstance(m, dict) and {*m} >= {"role"})
    return str(value)


def _files(folder: Path) -> dict[str, int]:
    """Return the entries of a run folder with their bytes, each folder as one."""
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
        """Return it as JSON."""
        names = [r.name for r in self.runs]
        return {
            "runs": names,
            "settings": {k: dict(zip(names, v)) for k, v in self.settings.items()},
            "results": {k: dict(zip(names, v)) for k, v in self.results.items()},
        }


def compare_runs(runs: Sequence[Details]) -> Comparison:
    """Return what differs between runs in settings and results."""
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
    """Return a run's results: the validation of the kept weights, the last report, time and memory."""
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
    """Draw the curves of one run, or of several runs in one picture.

    Args:
        out: .png, .svg or .pdf; default: the run's name, or the names, .png in the working directory.
        overwrite: replace the file.
    Raises:
        ConfigError: no such run, another suffix, matplotlib is not installed, or the file is there.
        DataError: a run has no metrics.
    """
    from mlxft.study.plots import check_suffix, curves, overlay

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


# --- run tables -------------------------------------------------------------------------------------------------------
STYLES = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow"}
MOST_NAMES = 4  # in one note
WIDE = 100  # columns from which full dates and methods are shown


def when(iso: str, short: bool = False) -> str:
    """Return a time of status.json in local time."""
    try:
        at = datetime.fromisoformat(iso).astimezone()
    except ValueError:
        return ""
    return at.strftime("%m-%d %H:%M" if short else "%Y-%m-%d %H:%M")


def value(v: Any) -> str:
    """Format a setting or number in few characters."""
    if v is None:
        return "-"
    if isinstance(v, bool):
        return str(v).lower()
    if isinstance(v, int):
        return f"{v:,}"
    if isinstance(v, float):
        return f"{v:,.0f}" if 1000 <= abs(v) < 1e15 else f"{v:.4g}"
    return printable(str(v)).replace("\n", " ")


def span(seconds: float | None) -> str:
    """Format a duration."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def size(n: int) -> str:
    """Format a number of bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n} bytes"


def counted(data: Mapping[str, Any]) -> str:
    """Format the row counts of a start event."""
    return ", ".join(f"{k} {v:.1%}" if isinstance(v, float) else f"{k} {value(v)}" for k, v in data.items())


def status(run: RunInfo) -> Text:
    """Return the status, and the progress of a run that has not ended normally."""
    far = run.status not in ("done", "half-written") and run.steps
    share = f" {run.step}/{run.steps}" if far else ""
    return Text(f"{run.status}{share}", style=STYLES.get(run.status, "dim"))


def show_list(console: Console, runs: Sequence[RunInfo]) -> None:
    """Print a table of runs, and notes below it."""
    wide = console.width >= WIDE
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name, options in (
        ("name", {"ratio": 3, "min_width": 12, "overflow": "fold"}),
        ("status", {"min_width": 11, "overflow": "fold"}),
        ("objective", {"overflow": "fold"}),
        ("base", {"ratio": 2, "min_width": 8, "overflow": "ellipsis", "no_wrap": True}),
        ("best", {"min_width": 17, "overflow": "fold"}),
        ("started", {"no_wrap": True}),
    ):
        table.add_column(name, **options)
    for run in runs:
        what = f"{run.objective} {run.method}" if wide else run.objective
        base = run.base.rstrip("/").rpartition("/")[2]
        best = str(run.best) if run.best else "-"
        cells = (run.name, status(run), what, base, best, when(run.started, short=not wide))
        table.add_row(*(c if isinstance(c, Text) else Text(c) for c in cells))
    console.print(table)
    odd: dict[str, list[str]] = {}
    for run in runs:
        if run.error or run.note:
            odd.setdefault(run.error.splitlines()[0] if run.error else run.note, []).append(run.name)
    for why, names in odd.items():
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        line = f"{', '.join(names[:MOST_NAMES])}{more}: {why}"
        console.print(Text(line, style="dim"), soft_wrap=not console.is_terminal)


def show_details(console: Console, run: Details) -> None:
    """Print one run in detail."""
    info = run.info
    console.print(Text.assemble((info.name, "bold"), "  ", status(info), f"  {info.dir}"), soft_wrap=True)
    if info.error or info.note:
        console.print(Text(info.error or info.note, style="red" if info.error else "yellow"))
    _pairs(console, "", _facts(run))
    numbers = {"untrained": run.before, "kept": run.kept, "last training report": run.last}
    shown = {k: e for k, e in numbers.items() if e}
    keys = dict.fromkeys(k for e in shown.values() for k in e if k not in ("event", "best", "text"))
    if shown:
        table = _table(["", *shown])
        for key in keys:
            row = [e.get(key) for e in shown.values()]
            if any(isinstance(v, (int, float)) for v in row):
                table.add_row(key, *map(value, row))
        console.print(table)
    _pairs(console, "settings that are not the default", run.differs)
    for sample in run.samples:
        console.print(Text(f"\n{sample.prompt}", style="bold"))
        if sample.first_step != sample.last_step:
            console.print(Text(f"step {sample.first_step}: {sample.first}"))
        console.print(Text(f"step {sample.last_step}: {sample.last}"))
    _pairs(console, "files", {k: size(v) for k, v in run.files.items()})


def _facts(run: Details) -> dict[str, Any]:
    info, start = run.info, run.start
    facts: dict[str, Any] = {
        "objective": info.objective or None,
        "base": info.base or None,
        "method": info.method or None,
        "steps": f"{info.step:,} of {info.steps:,}" if info.steps else None,
        "best": info.best,
        "started": when(info.started) or None,
        "ended": when(info.ended) or None,
        "training took": span(t) if (t := run.last.get("elapsed_s")) else None,
    }
    if "trainable_parameters" in start and "total_parameters" in start:
        facts["trained"] = f"{start['trainable_parameters']:,} of {start['total_parameters']:,} parameters"
    if isinstance(data := start.get("data"), Mapping):
        facts["data"] = counted(data)
    return {k: v for k, v in facts.items() if v is not None}


def change_of(pair: Sequence[float]) -> str:
    """Format the second minus the first, with its sign."""
    change = pair[1] - pair[0]
    return f"{change:+,.0f}" if abs(change) >= 1000 else f"{change:+.4g}"


def show_comparison(console: Console, found: Comparison) -> None:
    """Print differing settings, then results; for two runs also the difference of each number."""
    names = [r.name for r in found.runs]
    console.print(Text("settings that differ", style="bold"))
    if found.settings:
        table = _table(["", *names])
        for key, values in found.settings.items():
            table.add_row(key, *map(value, values))
        console.print(table)
    else:
        console.print("none")
    console.print(Text("\nresults", style="bold"))
    table = _table(["", *names, *(["difference"] if len(names) == 2 else [])])
    for key, values in found.results.items():
        numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        change = [change_of(numbers)] if len(names) == len(numbers) == 2 else [""] * (len(names) == 2)
        table.add_row(key, *map(value, values), *change)
    console.print(table)


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(Text(name), overflow="fold", justify="left" if i == 0 else "right")
    return table


def _pairs(console: Console, title: str, pairs: Mapping[str, Any]) -> None:
    if not pairs:
        return
    if title:
        console.print(Text(f"\n{title}", style="bold"))
    grid = Table.grid(padding=(0, 2))
    for name, v in pairs.items():
        grid.add_row(Text(name, style="dim"), Text(value(v), overflow="fold"))
    console.print(grid)


def ending(run: RunInfo) -> str:
    """Return a run's status in a line."""
    best = f"; {run.best}" if run.best else ""
    why = f": {run.error.splitlines()[0]}" if run.error else f" ({run.note})" if run.note else ""
    return f"{run.name}: {run.status} after step {run.step}{why}{best}"


# --- html -------------------------------------------------------------------------------------------------------------

_TEMPLATE = "report.html.jinja"
NOT_NUMBERS = ("event", "best", "step", "text", "rollout")


def write_report(folder: Path, out: Path | None = None, overwrite: bool = False) -> Path:
    """Write the HTML page of a run.

    Args:
        out: the file; default: report.html in the run folder, where one that mlxft wrote is replaced.
        overwrite: replace the file.
    Raises:
        ConfigError: matplotlib is not installed, or the file is there.
        CheckpointError: the file cannot be written.
    """
    from mlxft.files import text_writer, write_result

    check_file(out or folder / "report.html", overwrite or (out is None and read_mark(folder) is not None))
    text = render(details(folder))
    out = out or folder / "report.html"
    write_result(out, text_writer(text))
    return out


def render(run: Details) -> str:
    """Return the page's HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mlxft.study", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda v: printable(v) if type(v) is str else v,  # markup comes from this page
    )
    curves, no_curves = _curves(run)
    return environment.get_template(_TEMPLATE).render(
        run=run.info,
        sentence=_sentence(run),
        tiles=_tiles(run),
        curves=curves,
        no_curves=no_curves,
        numbers=_numbers(run),
        evaluations=_evaluations(run.info.dir),
        samples=run.samples,
        differs=_shown(run.differs),
        settings=_shown(run.settings),
        messages=[str(e["text"]) for e in run.events if e["event"] in ("message", "failed") and "text" in e],
        files={k: size(v) for k, v in run.files.items()},
        version=__version__,
        written=when(now()),
    )


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return the tables of `mlxft eval`'s results in the run folder; other files are skipped."""
    tables = []
    for path in sorted(folder.glob("**/results.json")):
        try:
            found = parse_json(read_file(path))
            tables += [_evaluation(found, task) for task in found["tasks"]]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
    return tables


def _evaluation(found: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """Return the table of one task on one file: figures with standard errors, and another model's."""
    other, pairs = task.get("against"), {pair["metric"]: pair for pair in task.get("paired", ())}
    shots = f", {found['shots']} shots" if found.get("shots") else ""
    columns = ["", "this run ± standard error"]
    if other is not None:
        columns += [f"{found['against']} ± standard error", f"difference [{found['confidence']:.0%}]", "won/lost/tied"]
    rows = []
    for name, figure in task["figures"].items():
        row = [name, _with_error(figure)]
        if other is not None:
            row += [_with_error(other[name]), *_difference(pairs.get(name))]
        rows.append(row)
    title = f"{task['task']} on {Path(found['file']).name}: {value(task['rows'])} rows{shots}"
    return {"title": title, "columns": columns, "rows": rows, "notes": task.get("notes", [])}


def _with_error(figure: dict[str, Any]) -> str:
    return f"{value(figure['value'])} ± {value(figure['se'])}"


def _difference(pair: dict[str, Any] | None) -> tuple[str, str]:
    if pair is None:
        return "", ""
    ends = "" if pair["low"] is None else f" [{pair['low']:+.4f}, {pair['high']:+.4f}]"
    return f"{pair['difference']:+.4f}{ends}", f"{pair['won']}/{pair['lost']}/{pair['tied']}"


def _curves(run: Details) -> tuple[dict[str, str], str]:
    """Return the pictures by title, and why there are none."""
    from mlxft.study.plots import svg_panels

    try:
        return svg_panels(run.events), ""
    except DataError as e:
        return {}, str(e)


def _sentence(run: Details) -> str:
    info, start = run.info, run.start
    if not info.objective:
        return ""
    parts = [f"{info.objective} of {info.base} by {info.method or '?'}"]
    if finite(start.get("trainable_parameters")) and finite(start.get("total_parameters")):
        parts.append(f"{start['trainable_parameters']:,} of {start['total_parameters']:,} parameters are trained")
    if isinstance(data := start.get("data"), Mapping):
        parts.append(counted(data))
    if info.started:
        parts.append(f"started {when(info.started)}")
    return ", ".join(parts)


def _tiles(run: Details) -> dict[str, str]:
    info, last = run.info, run.last
    tiles: dict[str, str] = {}
    if info.best:
        of = "" if info.best.of == "validation" else "training "
        tiles[f"{of}{info.best.metric}, step {info.best.step:,}"] = value(info.best.value)
    untrained = finite(run.before.get(info.best.metric)) if info.best else None
    if untrained is not None and info.best and info.best.step > 0:
        tiles[f"{info.best.metric}, untrained"] = value(untrained)
    if (kl := finite(run.kept.get("kl", last.get("kl")))) is not None:
        tiles["KL to the reference"] = value(kl)
    tiles["steps"] = f"{info.step:,}" + (f" / {info.steps:,}" if info.steps and info.steps != info.step else "")
    if (elapsed := finite(last.get("elapsed_s"))) is not None:
        tiles["training took"] = span(elapsed)
    if run.speed is not None:
        tiles["trained tokens / s"] = value(round(run.speed))
    if (peak := finite(last.get("peak_memory_gb"))) is not None:
        tiles["peak memory"] = f"{peak:.3g} GB"
    return tiles


def _numbers(run: Details) -> dict[str, Any]:
    """Return the first validation, that of the kept weights, and the last report."""
    named = {
        "untrained": run.before,
        f"kept, step {run.kept.get('step', 0)}": run.kept if run.kept is not run.before else {},
        f"last report, step {run.last.get('step', 0)}": run.last,
    }
    columns = {k: e for k, e in named.items() if e}
    keys = dict.fromkeys(k for e in columns.values() for k in e if k not in NOT_NUMBERS)
    rows = {k: ["" if e.get(k) is None else value(e[k]) for e in columns.values()] for k in keys}
    return {"columns": list(columns), "rows": rows}


def _shown(settings: Mapping[str, Any]) -> dict[str, str]:
    return {k: "null" if v is None else value(v) for k, v in settings.items()}
