"""The cells of `mlxft fewshot`, the numbers of examples it is asked for, and its table: as JSON, text and picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from mlxft.errors import ConfigError
from mlxft.study.crossed import Estimate, crossed
from mlxft.study.stats import Interval, bootstrap

DEFAULT = "0,1,4,16"
ALL = "all"
METHODS = ("zero-shot", "in context", "tuned", "both")
BOUNDED = ("accuracy", "accuracy_norm", "exact_match", "contains", "regex", "number", "f1", "json")
K = int | str


class Cell(NamedTuple):
    """A method, its number of examples (tuned: of each label) and which of the seeds."""

    method: str
    k: K
    seed: int

    @property
    def name(self) -> str:
        """Its file's."""
        return f"{self.method.replace(' ', '-')}-{self.k}-{self.seed}"

    @property
    def option(self) -> str:
        """What asks for it, for messages."""
        return f"{_option(self.method)} or --k"


class Line(NamedTuple):
    """A line of the table: a method at a number of examples, over its seeds.

    Attributes:
        against: the difference to zero-shot on the same rows, None for zero-shot itself.
        trained_rows: what was trained on, 0 where nothing was.
    """

    method: str
    k: K
    seeds: int
    rows: int
    trained_rows: int
    estimate: Estimate
    against: Interval | None

    def to_json(self) -> dict[str, Any]:
        """As fewshot.json has it."""
        e, a = self.estimate, self.against
        line: dict[str, Any] = {"method": self.method, "k": self.k, "seeds": self.seeds, "rows": self.rows}
        line |= {"trained_rows": self.trained_rows, "value": e.value, "se": e.se, "low": e.low, "high": e.high}
        return line | {"against_zero_shot": a and a._asdict()}


@dataclass(frozen=True)
class Study:
    """A finished study."""

    metric: str
    lines: list[Line]
    notes: list[str]
    out: Path

    def to_json(self) -> dict[str, Any]:
        """As fewshot.json has it."""
        table = [line.to_json() for line in self.lines]
        return {"metric": self.metric, "confidence": 0.95, "table": table, "notes": self.notes, "out": str(self.out)}


def read_ks(ks: str | None, given: Mapping[str, str | None]) -> tuple[list[int], list[K], list[int]]:
    """Numbers of examples shown, trained on, and both.

    Args:
        ks: `--k`, for every method that is not in `given`; without it only those that are given are run.
        given: in_context, tuned and both, None where not given.
    Raises:
        ConfigError: what is no number of examples.
    """
    common = ks if ks is not None else DEFAULT if not any(given.values()) else ""

    def numbers(name: str) -> list[K]:
        text = given[name]
        found = _numbers(common, "--k") if text is None else _numbers(text, _option(name))
        return [k for k in found if k != 0]  # none is zero-shot, which is always run

    def shown(name: str) -> list[int]:
        found = numbers(name)
        if ALL in found and given[name] is not None:
            raise ConfigError(f"{_option(name)}: all rows can not be shown in a prompt; give numbers")
        return [k for k in found if isinstance(k, int)]

    return shown("in_context"), numbers("tuned"), shown("both")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-').replace(' ', '-')}"


def _numbers(text: str, option: str) -> list[K]:
    numbers: list[K] = []
    for part in (p.strip() for p in text.split(",") if p.strip()):
        if part != ALL and not (part.isascii() and part.isdigit()):
            raise ConfigError(f"{option}: {part!r} is no number of examples; expected numbers with commas, or all")
        k = ALL if part == ALL else int(part)
        if k in numbers:
            raise ConfigError(f"{option}: {part} is given twice")
        numbers.append(k)
    if text.strip() and not numbers:
        raise ConfigError(f"{option}: {text!r} has no numbers; expected some, with commas between")
    return numbers


def show(console: Console, study: Study) -> None:
    """The table, and what there is to say of it."""
    head, *rows = cells_of(study)
    # 80 columns have room for these; fewshot.md has them all.
    kept = [i for i, name in enumerate(head) if name not in ("trained rows", "rows")]
    table = Table(box=None, pad_edge=False)
    for i in kept:
        table.add_column(head[i], justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[i] for i in kept))
    console.print(table)
    counts = sorted({line.rows for line in study.lines})
    console.print(f"over {' to '.join(f'{n:,}' for n in counts[:: max(1, len(counts) - 1)])} rows, and all seeds")
    for note in study.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=not console.is_terminal)


def draw(study: Study) -> str:
    """Draw the table beside it. Returns where it all is, or why there is no picture."""
    from mlxft.study.plots import fewshot as plot

    rows = [
        {"k": 0 if line.method == "zero-shot" else line.k, "method": line.method}
        | {"value": line.estimate.value, "low": line.estimate.low, "high": line.estimate.high}
        for line in study.lines
    ]
    try:
        picture = plot(rows, study.out / "fewshot.png", metric=study.metric)
    except ConfigError as e:  # matplotlib is an extra
        return f"table: {study.out / 'fewshot.json'}, fewshot.md; no picture: {e}"
    return f"table: {study.out / 'fewshot.json'}, fewshot.md; picture: {picture}"


def tabulate(cells: dict[Cell, dict[str, Any]]) -> tuple[str, list[Line]]:
    """The metric, and a line for each method and number of examples, over the rows that all its seeds answered."""
    groups: dict[tuple[str, K], list[dict[str, Any]]] = {}
    for cell, found in cells.items():
        groups.setdefault((cell.method, cell.k), []).append(found)
    metric = next(iter(next(iter(cells.values()))["rows"][0]["scores"]))
    scores = {key: [_scores(found, metric) for found in group] for key, group in groups.items()}
    zero = scores["zero-shot", 0][0]
    lines = []
    for (method, k), seeds in scores.items():
        rows = [row for row in seeds[0] if all(row in own for own in seeds)]
        matrix = np.array([[own[row] for row in rows] for own in seeds])
        estimate = crossed(matrix, bounds=(0.0, 1.0) if metric in BOUNDED else None)
        against = None
        if method != "zero-shot":
            both = [i for i, row in enumerate(rows) if row in zero]
            against = bootstrap(matrix.mean(axis=0)[both], [zero[rows[i]] for i in both], seed=0)
        trained = groups[method, k][0]["trained_rows"]
        lines.append(Line(method, k, len(seeds), len(rows), trained, estimate, against))
    lines.sort(key=lambda line: (METHODS.index(line.method), math.inf if isinstance(line.k, str) else line.k))
    return metric, lines


def _scores(found: dict[str, Any], metric: str) -> dict[str, float]:
    return {row["row"]: float(row["scores"][metric]) for row in found["rows"]}


def cells_of(study: Study) -> list[list[str]]:
    """The table as texts: a header, then a line for each method and number of examples."""
    table = [["method", "examples", "trained rows", "seeds", "rows", study.metric, "95 % interval", "to zero-shot"]]
    for line in study.lines:
        e, a = line.estimate, line.against
        gain = "" if a is None else f"{a.difference:+.3f} [{a.low:+.3f}, {a.high:+.3f}]"
        each = line.method == "tuned" and line.k != ALL and line.trained_rows > int(line.k)
        few = f"{line.k} a label" if each else str(line.k)
        interval = f"[{e.low:.3f}, {e.high:.3f}]"
        trained = f"{line.trained_rows:,}" if line.trained_rows else ""
        table.append([line.method, few, trained, str(line.seeds), str(line.rows), f"{e.value:.3f}", interval, gain])
    return table


def markdown(study: Study) -> str:
    """The table and its notes for a README."""
    head, *rows = cells_of(study)
    lines = [head, ["---"] * len(head), *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return table + "".join(f"\n{note}\n" for note in study.notes)
