"""A run as one HTML page that stands by itself: no network, no script, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxft import __version__
from mlxft.errors import DataError
from mlxft.owned import check_file, read_mark
from mlxft.study.compare import Details, details
from mlxft.study.run_tables import counted, size, span, value, when
from mlxft.study.runs import finite
from mlxft.text import parse_json, printable, read_file
from mlxft.trainer.status import now

TEMPLATE = "report.html.jinja"
NOT_NUMBERS = ("event", "best", "step", "text", "rollout")


def write_report(folder: Path, out: Path | None = None, overwrite: bool = False) -> Path:
    """Write the page about a run.

    Args:
        out: the file; default: report.html in the run folder, where one that mlxft wrote is replaced.
        overwrite: replace the file.
    Raises:
        ConfigError: matplotlib is not installed, or the file is there.
        CheckpointError: the file can not be written.
    """
    from mlxft.trainer.files import text_writer, write_result

    check_file(out or folder / "report.html", overwrite or (out is None and read_mark(folder) is not None))
    text = render(details(folder))
    out = out or folder / "report.html"
    write_result(out, text_writer(text))
    return out


def render(run: Details) -> str:
    """The page's HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mlxft.study", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda v: printable(v) if type(v) is str else v,  # what is markup already is of this page
    )
    curves, no_curves = _curves(run)
    return environment.get_template(TEMPLATE).render(
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
    """The tables of what `mlxft eval` has left in the run folder; what is not its result is passed over."""
    tables = []
    for path in sorted(folder.glob("**/results.json")):
        try:
            found = parse_json(read_file(path))
            tables += [_evaluation(found, task) for task in found["tasks"]]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
    return tables


def _evaluation(found: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """One task on one file: each figure with its standard error, and next to another model if there was one."""
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
    """The pictures by title, and why there are none."""
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
    """The validation before and of the kept weights, and the last report, side by side."""
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
