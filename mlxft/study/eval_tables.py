"""An evaluation on the terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxft.study.evaluate import Paired
from mlxft.study.evaluation import Compared, Evaluation
from mlxft.study.stats import Figure


def number(value: float) -> str:
    """Four digits after the point, fewer of large numbers; a dash for what is not known."""
    if math.isnan(value):
        return "-"
    return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.2f}" if abs(value) < 1e6 else f"{value:.3g}"


def with_error(figure: Figure) -> str:
    """A figure and its standard error."""
    return f"{number(figure.value)} ± {number(figure.se)}"


def show(console: Console, found: Evaluation) -> None:
    """A table for each task, and what there is to say of its rows."""
    for task in found.tasks:
        shots = f", {found.asking.shots} shots" if found.asking.shots else ""
        console.print(
            Text(f"{task.result.task}: {len(task.result.rows):,} rows{shots}, ± standard error", style="bold")
        )
        console.print(_table(found, task))
        for note in task.result.notes:
            console.print(Text(f"note: {note}"))
        for note in task.other.notes if task.other else []:
            console.print(Text(f"note ({found.against}): {note}"))


def _table(found: Evaluation, task: Compared) -> Table:
    table = Table()
    table.add_column("")
    table.add_column("model", justify="right")
    pairs = {pair.metric: pair for pair in task.paired}
    if task.other is not None:
        table.add_column(Text(found.against or ""), justify="right", overflow="fold")
        table.add_column(f"difference [{found.asking.confidence:.0%}]", justify="right")
        table.add_column("won/lost/tied", justify="right")
    others = task.other.figures() if task.other else {}
    for name, figure in task.result.figures().items():
        row = [name, with_error(figure)]
        if task.other is not None:
            row += [with_error(others[name]), *_difference(pairs.get(name))]
        table.add_row(*(Text(cell) for cell in row))
    return table


def _difference(pair: Paired | None) -> tuple[str, str]:
    if pair is None:
        return "", ""
    ends = f"[{pair.low:+.4f}, {pair.high:+.4f}]" if not math.isnan(pair.low) else "[-]"
    return f"{pair.difference:+.4f} {ends}", f"{pair.won}/{pair.lost}/{pair.tied}"
