"""An evaluation on the terminal."""

from __future__ import annotations

import math

from rich import text
from rich.console import Console
from rich.table import Column, Table

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
    """A table for each task, one more for the differences, and what there is to say of the rows."""
    for task in found.tasks:
        shots = f", {found.asking.shots} shots" if found.asking.shots else ""
        console.print(
            text.Text(f"{task.result.task}: {len(task.result.rows):,} rows{shots}, ± standard error", style="bold")
        )
        console.print(_figures(found, task))
        if task.paired:
            console.print(_differences(found, task))
        for note in task.result.notes:
            console.print(text.Text(f"note: {note}"))
        for note in task.other.notes if task.other else []:
            console.print(text.Text(f"note ({found.against}): {note}"))


def _figures(found: Evaluation, task: Compared) -> Table:
    others = task.other.figures() if task.other else {}
    table = Table("", Column("model", justify="right"))
    if others:
        table.add_column(text.Text(found.against or ""), justify="right", overflow="fold")
    for name, figure in task.result.figures().items():
        cells = [name, with_error(figure)] + ([with_error(others[name])] if others else [])
        table.add_row(*map(text.Text, cells))
    return table


def _differences(found: Evaluation, task: Compared) -> Table:
    """Of the model less the other; less loss is better."""
    heads = ("difference", f"{found.asking.confidence:.0%} interval", "won/lost/tied")
    table = Table("", *(Column(head, justify="right") for head in heads))
    for pair in task.paired:
        interval = "-" if math.isnan(pair.low) else f"[{pair.low:+.4f}, {pair.high:+.4f}]"
        rows = f"{pair.won}/{pair.lost}/{pair.tied}"
        table.add_row(*map(text.Text, (pair.metric, f"{pair.difference:+.4f} ± {number(pair.se)}", interval, rows)))
    return table
