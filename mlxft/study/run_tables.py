"""Runs on the terminal: a list, one in detail, several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxft.study.runs import RunInfo
from mlxft.text import printable

if TYPE_CHECKING:
    from mlxft.study.compare import Comparison, Details

STYLES = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow"}
MOST_NAMES = 4  # in one remark
WIDE = 100  # columns, from which dates are whole and methods are shown


def when(iso: str, short: bool = False) -> str:
    """A time of status.json in the time of this place."""
    try:
        at = datetime.fromisoformat(iso).astimezone()
    except ValueError:
        return ""
    return at.strftime("%m-%d %H:%M" if short else "%Y-%m-%d %H:%M")


def value(v: Any) -> str:
    """A setting or a number in few characters."""
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
    """A time in words."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def size(n: int) -> str:
    """Bytes in words."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n} bytes"


def counted(data: Mapping[str, Any]) -> str:
    """A start event's counts and shares of the rows."""
    return ", ".join(f"{k} {v:.1%}" if isinstance(v, float) else f"{k} {value(v)}" for k, v in data.items())


def status(run: RunInfo) -> Text:
    """The status, and how far a run is that has not ended as it should."""
    far = run.status not in ("done", "half-written") and run.steps
    share = f" {run.step}/{run.steps}" if far else ""
    return Text(f"{run.status}{share}", style=STYLES.get(run.status, "dim"))


def show_list(console: Console, runs: Sequence[RunInfo]) -> None:
    """A table of runs, and below it what is odd about some."""
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
    """All of one run."""
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
    """The second less the first, with its sign."""
    change = pair[1] - pair[0]
    return f"{change:+,.0f}" if abs(change) >= 1000 else f"{change:+.4g}"


def show_comparison(console: Console, found: Comparison) -> None:
    """What differs in settings, then what came of it; of two runs also the difference of each number."""
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
    """How a run stands, in a line."""
    best = f"; {run.best}" if run.best else ""
    why = f": {run.error.splitlines()[0]}" if run.error else f" ({run.note})" if run.note else ""
    return f"{run.name}: {run.status} after step {run.step}{why}{best}"
