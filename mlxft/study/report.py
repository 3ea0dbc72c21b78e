"""Reports on runs: comparison, tables, and one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from mlxft import __version__
from mlxft.errors import DataError, MlxftError
from mlxft.files import check_file, read_mark
from mlxft.runs import RunInfo, find_run, finite, now, read_events, read_run_settings, run_info
from mlxft.text import Event, counted, parse_json, printable, read_file, with_value

# --- compare ----------------------------------------------------------------------------------------------------------
# One run in detail, and runs side by side: differences in settings and results.

_OWN = ("run.name", "run.dir", "data.date", "versions")  # settings of a single run, which are not compared
_COSTS = ("tokens", "trained_tokens", "peak_memory_gb", "elapsed_s")  # totals in a training report
_NOT_RESULTS = {"event", "step", "best", "epoch", "elapsed_s", "lr", "rollout", "tokens", "trained_tokens"}


@dataclass(frozen=True)
class Sample:
    """A run's first completion of one prompt, and that of the weights that were kept: the best, else the last."""

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
        differs: the settings that differ from their defaults.
        before, kept, last: the validation event of the untrained model, that of the kept weights, and the last training
            report; {} where there is none.
        speed: median of the reports' trained_tokens_per_s.
        files: name -> size in bytes, folders as one.
        evaluations: the results.json of each `mlxft eval`.
    """

    info: RunInfo
    start: Event
    settings: dict[str, Any]
    differs: dict[str, Any]
    before: Event
    kept: Event
    last: Event
    speed: float | None
    samples: list[Sample]
    files: dict[str, int]
    events: list[Event]
    evaluations: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return everything but the events, which metrics.jsonl holds."""
        names = ("settings", "differs", "before", "kept", "last", "files", "evaluations")
        parts = {k: getattr(self, k) for k in names}
        samples = [vars(s) for s in self.samples]
        data = {k: v for k, v in self.start.items() if k not in ("event", "step", "text")}
        return {**self.info.to_json(), "start": data, **parts, "speed": self.speed, "samples": samples}


def details(folder: Path, name: str | None = None) -> Details:
    """Read a run folder; what is missing or broken is left out, and info.note names it.

    Args:
        name: the run's name; default: the folder's, which need not be unique.
    """
    events = read_events(folder)
    try:
        from mlxft.config import flat  # it imports pydantic, which listing does not need

        settings = flat(read_run_settings(folder))
    except MlxftError:
        settings = {}
    evals, trains = ([with_value(e) for e in events if e["event"] == kind] for kind in ("eval", "train"))
    speeds = sorted(v for e in trains if (v := finite(e.get("trained_tokens_per_s"))) is not None)
    best = [e for e in evals if e.get("best") is True]
    return Details(
        info=run_info(folder, name),
        start=next((e for e in events if e["event"] == "start"), {}),
        settings=settings,
        differs=_unlike_default(settings),
        before=next((e for e in evals if e.get("step") == 0), {}),
        kept=(best or evals or [{}])[-1],
        last=(trains or [{}])[-1],
        speed=speeds[len(speeds) // 2] if speeds else None,
        samples=_samples(events, (best or [{}])[-1].get("step")),
        files=_files(folder),
        events=events,
        evaluations=_evaluations(folder),
    )


def _unlike_default(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from this version's defaults; all if the objective is not known."""
    from mlxft.config import config_class, flat

    objective = str(settings.get("objective", "sft"))
    needed = {"objective": objective, "model": {"path": "x"}, "data": {"train": "x", "format": "messages"}}
    try:
        default = flat(config_class(objective, opened=True).model_validate(needed).model_dump(mode="json"))
    except MlxftError:  # an objective of another version
        default = {}
    default |= {"objective": "sft", "model.path": None, "data.train": None, "data.format": None}
    return {k: v for k, v in settings.items() if not k.startswith(_OWN) and (k not in default or default[k] != v)}


def _samples(events: Sequence[Event], kept: int | None) -> list[Sample]:
    found: dict[str, list[Event]] = {}
    for event in events:
        if event["event"] == "sample" and "prompt" in event and "answer" in event:
            found.setdefault(_as_text(event["prompt"]), []).append(event)
    pairs = {
        prompt: (every[0], next((e for e in every if kept is not None and e.get("step") == kept), every[-1]))
        for prompt, every in found.items()
    }
    return [
        Sample(prompt, a.get("step", 0), _as_text(a["answer"]), b.get("step", 0), _as_text(b["answer"]))
        for prompt, (a, b) in pairs.items()
    ]


def _as_text(value: Any) -> str:
    if isinstance(value, list):  # messages
        return "\n".join(f"{m['role']}: {m['content']}" for m in value if isinstance(m, dict) and {*m} >= {"role"})
    return str(value)


def _files(folder: Path) -> dict[str, int]:
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
        settings, results: name -> a value for each run, None where a run has none; the settings that differ, and all
            results.
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
    """Compare settings and results of runs."""
    keys = dict.fromkeys(k for r in runs for k in r.settings if not k.startswith(("run.name", "run.dir")))
    settings = {k: [r.settings.get(k) for r in runs] for k in keys}
    results = [_results(r) for r in runs]
    names = dict.fromkeys(k for r in results for k in r)
    return Comparison(
        runs=[r.info for r in runs],
        settings={k: v for k, v in settings.items() if any(x != v[0] for x in v[1:])},
        results={k: [r.get(k) for r in results] for k in names},
    )


def _results(run: Details) -> dict[str, Any]:
    """Return the validation of the kept weights, the last report, and what the run cost."""
    kept, last = run.kept, run.last
    found: dict[str, Any] = {"status": run.info.status, "steps": run.info.step}
    if kept:
        found["best step"] = kept.get("step")
        found |= {f"validation {k}": v for k, v in kept.items() if k not in _NOT_RESULTS and finite(v) is not None}
    known = dict.fromkeys([k for k in kept if k not in _NOT_RESULTS] + ["loss", "accuracy", "reward", "kl"])
    found |= {f"training {k}": last[k] for k in known if finite(last.get(k)) is not None}
    found |= {k: run.start[k] for k in ("trainable_parameters",) if k in run.start}
    found |= {k: last[k] for k in _COSTS if k in last}
    for result in run.evaluations:
        for task in result["tasks"]:
            found |= {f"{result['place']} {name}": figure["value"] for name, figure in task["figures"].items()}
    return found if run.speed is None else found | {"trained_tokens_per_s": run.speed}


def plot_runs(names: Sequence[str], place: Path, out: Path | None, overwrite: bool = False) -> list[Path]:
    """Draw the curves of one run, or of several runs in one picture.

    Args:
        out: .png, .svg or .pdf; default: the run's name, or the names, .png in the working directory.
        overwrite: replace the file.
    Raises:
        ConfigError: there is no such run, the suffix is another, matplotlib is not installed, or the file exists.
        DataError: a run has no metrics.
    """
    from mlxft.study.plots import check_suffix, curves, overlay

    folders = {name: find_run(name, place) for name in names}
    unique = len({Path(name).name for name in names}) == len(names)
    titles = {Path(name).name if unique else name: folder for name, folder in folders.items()}
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
# Runs on the terminal: a list, one in detail, several side by side.

_STYLES = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow"}
_MOST_NAMES = 4  # of the runs that share one note
_WIDE = 100  # columns from which whole dates and methods are shown
_PLAIN: dict[str, Any] = {"box": None, "pad_edge": False, "header_style": "bold", "padding": (0, 2, 0, 0)}


def _when(iso: str, short: bool = False) -> str:
    """Return a time of status.json in the local time zone."""
    try:
        at = datetime.fromisoformat(iso).astimezone()
    except ValueError:
        return ""
    return at.strftime("%m-%d %H:%M" if short else "%Y-%m-%d %H:%M")


def show_value(v: Any) -> str:
    """Return a setting or a figure as text."""
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


def _counts(start: Event) -> str:
    data = start.get("data")
    found = data.items() if isinstance(data, Mapping) else ()
    return ", ".join(f"{k} {v:.1%}" if isinstance(v, float) else f"{k} {show_value(v)}" for k, v in found)


def _trained(start: Event) -> str:
    trained, total = start.get("trainable_parameters"), start.get("total_parameters")
    return "" if finite(trained) is None or finite(total) is None else f"{trained:,} of {total:,} parameters"


def _status(run: RunInfo) -> Text:
    progress = f" {run.step}/{run.steps}" if run.status not in ("done", "half-written") and run.steps else ""
    return Text(f"{run.status}{progress}", style=_STYLES.get(run.status, "dim"))


def show_list(console: Console, runs: Sequence[RunInfo]) -> None:
    """Print a table of runs, and below it notes on some."""
    wide = console.width >= _WIDE
    table = Table(
        Column("name", ratio=3, min_width=12, overflow="fold"),
        Column("status", min_width=11, overflow="fold"),
        Column("objective", overflow="fold"),
        Column("base", ratio=2, min_width=8, overflow="ellipsis", no_wrap=True),
        Column("best", min_width=17, overflow="fold"),
        Column("started", no_wrap=True),
        **_PLAIN,
    )
    notes: dict[str, list[str]] = {}
    for run in runs:
        what = f"{run.objective} {run.method}" if wide else run.objective
        base = run.base.rstrip("/").rpartition("/")[2]
        cells = (what, base, str(run.best or "-"), _when(run.started, short=not wide))
        table.add_row(Text(run.name), _status(run), *map(Text, cells))
        if run.error or run.note:
            notes.setdefault(run.error.splitlines()[0] if run.error else run.note, []).append(run.name)
    console.print(table)
    for why, names in notes.items():
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        line = f"{', '.join(names[:_MOST_NAMES])}{more}: {why}"
        console.print(Text(line, style="dim"), soft_wrap=not console.is_terminal)


def show_details(console: Console, run: Details) -> None:
    """Print one run in detail."""
    info = run.info
    console.print(Text.assemble((info.name, "bold"), "  ", _status(info), f"  {info.dir}"), soft_wrap=True)
    if info.error or info.note:
        console.print(Text(info.error or info.note, style="red" if info.error else "yellow"))
    _show_pairs(console, "", _facts(run))
    columns, rows = _numbers(run)
    if columns:
        numeric = {k: row for k, row in rows.items() if any(isinstance(v, (int, float)) for v in row)}
        console.print(_table(columns, numeric))
    for result in run.evaluations:
        for task in result["tasks"]:
            title, ((columns, figures), *_) = evaluation_tables(result, task)
            console.print(Text(f"\n{title} ({result['place']})", style="bold"))
            console.print(_table(columns, {name: cells for name, *cells in figures}))
    _show_pairs(console, "settings that are not the default", run.differs)
    for sample in run.samples:
        console.print(Text(f"\n{sample.prompt}", style="bold"))
        if sample.first_step != sample.last_step:
            console.print(Text(f"step {sample.first_step}: {sample.first}"))
        console.print(Text(f"step {sample.last_step}: {sample.last}"))
    _show_pairs(console, "files", {k: decimal(v) for k, v in run.files.items()})


def _facts(run: Details) -> dict[str, Any]:
    info = run.info
    facts = {
        "objective": info.objective,
        "base": info.base,
        "method": info.method,
        "steps": f"{info.step:,} of {info.steps:,}" if info.steps else "",
        "best": info.best,
        "started": _when(info.started),
        "ended": _when(info.ended),
        "training took": span(t) if (t := run.last.get("elapsed_s")) else "",
        "trained": _trained(run.start),
        "data": _counts(run.start),
    }
    return {k: v for k, v in facts.items() if v}


def _numbers(run: Details) -> tuple[list[str], dict[str, list[Any]]]:
    """Return columns and rows of numbers: validation before training and of the kept weights, and the last report."""
    named = {
        "untrained": run.before,
        f"kept, step {run.kept.get('step', 0)}": run.kept if run.kept is not run.before else {},
        f"last report, step {run.last.get('step', 0)}": run.last,
    }
    events = {k: e for k, e in named.items() if e}
    keys = dict.fromkeys(k for e in events.values() for k in e)
    shown = [k for k in keys if k not in ("event", "best", "step", "text", "rollout")]
    return list(events), {k: [e.get(k) for e in events.values()] for k in shown}


def show_comparison(console: Console, found: Comparison) -> None:
    """Print the settings that differ, then the results, for two runs with their differences."""
    names = [r.name for r in found.runs]
    console.print(Text("settings that differ", style="bold"))
    console.print(_table(names, found.settings) if found.settings else "none")
    console.print(Text("\nresults", style="bold"))
    two = len(names) == 2
    rows = {key: [*values, _change(values)] if two else values for key, values in found.results.items()}
    console.print(_table([*names, "difference"] if two else names, rows))


def _change(values: Sequence[Any]) -> str:
    """Return the second number minus the first, with its sign; "" if they are not both numbers."""
    if any(not isinstance(v, (int, float)) or isinstance(v, bool) for v in values):
        return ""
    change = values[1] - values[0]
    return f"{change:+,.0f}" if abs(change) >= 1000 else f"{change:+.4g}"


def _table(columns: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> Table:
    numbers = (Column(Text(name), overflow="fold", justify="right") for name in columns)
    table = Table(Column("", overflow="fold"), *numbers, **_PLAIN)
    for name, values in rows.items():
        table.add_row(name, *map(show_value, values))
    return table


def _show_pairs(console: Console, title: str, pairs: Mapping[str, Any]) -> None:
    if not pairs:
        return
    if title:
        console.print(Text(f"\n{title}", style="bold"))
    grid = Table.grid(padding=(0, 2))
    for name, v in pairs.items():
        grid.add_row(Text(name, style="dim"), Text(show_value(v), overflow="fold"))
    console.print(grid)


def ending(run: RunInfo) -> str:
    """Return the state of a run in one line."""
    best = f"; {run.best}" if run.best else ""
    why = f": {run.error.splitlines()[0]}" if run.error else f" ({run.note})" if run.note else ""
    return f"{run.name}: {run.status} after step {run.step}{why}{best}"


# --- html -------------------------------------------------------------------------------------------------------------


def write_report(folder: Path, out: Path | None = None, overwrite: bool = False) -> Path:
    """Write the HTML page of a run.

    Args:
        out: the file; default: report.html in the run folder, where one that mlxft wrote is replaced.
        overwrite: replace the file.
    Raises:
        ConfigError: matplotlib is not installed, or the file exists.
        CheckpointError: the file cannot be written.
    """
    from mlxft.files import text_writer, write_result

    overwrite = overwrite or (out is None and read_mark(folder) is not None)
    out = out or folder / "report.html"
    check_file(out, overwrite)
    write_result(out, text_writer(render(details(folder))))
    return out


def render(run: Details) -> str:
    """Return the HTML page of a run."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from mlxft.study.plots import svg_panels

    environment = Environment(
        loader=PackageLoader("mlxft.study", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda v: printable(v) if type(v) is str else v,  # Markup is the template's own
    )
    curves, no_curves = {}, ""
    try:
        curves = svg_panels(run.events)
    except DataError as e:
        no_curves = str(e)
    return environment.get_template("report.html.jinja").render(
        **page_parts(run), curves=curves, no_curves=no_curves, version=__version__, written=_when(now())
    )


def page_parts(run: Details) -> dict[str, Any]:
    """Return what a page shows of a run, its curves aside: name of the part -> texts."""
    columns, rows = _numbers(run)
    return {
        "run": run.info,
        "facts": ", ".join(f"{name} {show_value(v)}" for name, v in _facts(run).items()),
        "tiles": _tiles(run),
        "columns": columns,
        "numbers": {k: ["" if v is None else show_value(v) for v in row] for k, row in rows.items()},
        "evaluations": [
            {"title": f"{title} ({found['place']})", "tables": tables, "notes": task.get("notes", [])}
            for found in run.evaluations
            for task in found["tasks"]
            for title, tables in [evaluation_tables(found, task)]
        ],
        "samples": run.samples,
        "differs": _shown(run.differs),
        "settings": _shown(run.settings),
        "messages": [str(e["text"]) for e in run.events if e["event"] in ("message", "failed") and "text" in e],
        "files": {k: decimal(v) for k, v in run.files.items()},
    }


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return the results.json of each `mlxft eval` in the run folder, and its `place` there.

    Other files of that name are skipped.
    """
    every = []
    for path in sorted(folder.glob("**/results.json")):
        try:
            found = parse_json(read_file(path))
            for task in found["tasks"]:
                evaluation_tables(found, task)
            every.append(found | {"place": str(path.parent.relative_to(folder))})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
    return every


Cells = list[str]


def evaluation_tables(found: dict[str, Any], task: dict[str, Any]) -> tuple[str, list[tuple[Cells, list[Cells]]]]:
    """Return the title of a task of results.json, and tables of its figures and of differences from another model.

    Returns:
        the title, and for each table its columns and rows; a row begins with its name, which has no column.
    """
    models = [("model", task["figures"], task.get("intervals", {}))]
    if "against" in task:
        models.append((found["against"], task["against"], task.get("against_intervals", {})))
    figures = [
        [name, *(_with_error(of[name]) + _bounds(around.get(name)) for _, of, around in models)]
        for name in task["figures"]
    ]
    about = f", {found['confidence']:.0%} interval" if "intervals" in task else ""
    tables = [([f"{name} ± standard error{about}" for name, *_ in models], figures)]
    if pairs := task.get("paired"):
        columns = ["difference", f"{found['confidence']:.0%} interval", "won/lost/tied"]
        rows = []
        for pair in pairs:
            interval = "-" if pair["low"] is None else f"[{pair['low']:+.4f}, {pair['high']:+.4f}]"
            difference = f"{pair['difference']:+.4f} ± {_figure(pair['se'])}"
            rows.append([pair["metric"], difference, interval, f"{pair['won']}/{pair['lost']}/{pair['tied']}"])
        tables.append((columns, rows))
    shots = f", {found['shots']} shots" if found.get("shots") else ""
    return f"{task['task']} on {Path(found['file']).name}: {counted(task['rows'], 'rows')}{shots}", tables


def _with_error(figure: dict[str, Any]) -> str:
    return f"{_figure(figure['value'])} ± {_figure(figure['se'])}"


def _bounds(around: Sequence[float | None] | None) -> str:
    return "" if around is None else f" [{_figure(around[0])}, {_figure(around[1])}]"


def _figure(v: float | None) -> str:
    """Format with four digits after the point, fewer for large numbers."""
    if v is None:
        return "-"
    return f"{v:,.4f}" if abs(v) < 100 else f"{v:,.2f}" if abs(v) < 1e6 else f"{v:.3g}"


def _tiles(run: Details) -> dict[str, str]:
    info, last, best = run.info, run.last, run.info.best
    tiles: dict[str, str] = {}
    if best:
        of = "" if best.of == "validation" else "training "
        tiles[f"{of}{best.metric}, step {best.step:,}"] = show_value(best.value)
        if best.step > 0 and (untrained := finite(run.before.get(best.metric))) is not None:
            tiles[f"{best.metric}, untrained"] = show_value(untrained)
    if (kl := finite(run.kept.get("kl", last.get("kl")))) is not None:
        tiles["KL to the reference"] = show_value(kl)
    tiles["steps"] = f"{info.step:,}" + (f" / {info.steps:,}" if info.steps and info.steps != info.step else "")
    if run.speed is not None:
        tiles["trained tokens / s"] = show_value(round(run.speed))
    if (peak := finite(last.get("peak_memory_gb"))) is not None:
        tiles["peak memory"] = f"{peak:.3g} GB"
    return tiles


def _shown(settings: Mapping[str, Any]) -> dict[str, str]:
    return {k: "null" if v is None else show_value(v) for k, v in settings.items()}
