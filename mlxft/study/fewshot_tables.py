"""What `mlxft fewshot` is asked, in numbers of examples, and what it shows: a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from mlxft.errors import ConfigError
from mlxft.study.fewshot import ALL, K, Study, cells_of

DEFAULT = "0,1,4,16"


def read_ks(ks: str | None, given: Mapping[str, str | None]) -> tuple[list[int], list[K], list[int]]:
    """Numbers of examples shown, trained on, and both.

    Args:
        ks: `--k`, for every method that is not in `given`; without it only those that are given are run.
        given: in_context, tuned and both, None where not given.
    Raises:
        ConfigError: what is no number of examples.
    """
    common = ks if ks is not None else DEFAULT if not any(given.values()) else ""
    options = {name: (f"--{name.replace('_', '-')}", text) for name, text in given.items()}
    found: dict[str, list[K]] = {}
    for name, (option, text) in options.items():
        own = text if text is not None else common
        numbers = _numbers(own, option if text is not None else "--k")
        if ALL in numbers and name != "tuned":
            if text is not None:
                raise ConfigError(f"{option}: all rows can not be shown in a prompt; give numbers")
            numbers.remove(ALL)
        found[name] = [k for k in numbers if k != 0]  # none is zero-shot, which is always run
    whole: Any = (found["in_context"], found["tuned"], found["both"])
    numbers_only: tuple[list[int], list[K], list[int]] = whole
    return numbers_only


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
