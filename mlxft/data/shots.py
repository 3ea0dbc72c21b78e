"""A few rows of many: seeded, as many of each label as of any other.

A row's label is the field that `data.label` names. Without one it is its answer (the completion, the last assistant
turn, or whether a judged answer is good), if the rows have no more than MOST_LABELS different ones and at least twice
as many rows as those; else rows have no labels.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from mlxft.data.formats import Completion, Conversation, Example, Item, Judged
from mlxft.errors import ConfigError, DataError, nearest

MOST_LABELS = 20


class Shots(NamedTuple):
    """The chosen rows' indices, in order; and what was done, in a sentence."""

    rows: list[int]
    note: str


def answer_of(item: Item) -> str | None:
    """What a row answers: its completion, its last assistant turn, or whether its answer is good; else None."""
    if isinstance(item, Completion):
        return item.completion.strip()
    if isinstance(item, Judged):
        return "good" if item.label else "bad"
    if isinstance(item, Conversation) and item.messages[-1]["role"] == "assistant":
        return str(item.messages[-1]["content"]).strip()
    return None


def few_of(answers: Sequence[str | None]) -> list[str] | None:
    """The answers as labels: every row has one, and they are few."""
    labels = [answer for answer in answers if answer is not None]
    different = len(set(labels))
    few = different <= MOST_LABELS and 2 * different <= len(labels)
    return labels if few and len(labels) == len(answers) else None


def labels_of(
    examples: Sequence[Example], rows: Sequence[dict[str, Any]] | None = None, field: str | None = None
) -> list[str] | None:
    """A label for each row, or None where rows have none.

    Args:
        rows: the examples' rows as they were read; needed with `field`.
        field: the rows' field that holds it, as a text, a number, or true or false.
    Raises:
        ConfigError: no row has the field. DataError: some rows lack it.
    """
    if field is None:
        return few_of([answer_of(item) for _, item in examples])
    assert rows is not None, "the field is in the rows"
    assert len(rows) == len(examples), "each example comes from a row"
    found: list[str] = []
    for (where, _), row in zip(examples, rows):
        value = row.get(field)
        if value is None or isinstance(value, (list, dict)):
            names = sorted({name for row in rows for name in row})
            if field not in names:
                seen = f"no row has{nearest(field, names)}; rows have {', '.join(names)}"
                raise ConfigError(f"data.label is {field!r}, which {seen}")
            seen = "missing" if value is None else json.dumps(value)[:40]
            raise DataError(f"{where}: {field} is {seen}; data.label: {field} wants a text or a number")
        found.append(value if isinstance(value, str) else json.dumps(value))
    return found


def choose(labels: Sequence[str] | None, count: int, shots: int, seed: int, setting: str) -> Shots:
    """`shots` rows of each label, or of all where there are none. Fewer shots of the same seed are among more.

    Args:
        count: rows there are.
        setting: what asks for them, for messages.
    Raises:
        ConfigError: there are not as many.
    """
    rng = random.Random(seed)
    order = rng.sample(range(count), count)
    if labels is None:
        if shots > count:
            raise ConfigError(f"{setting}: {shots} rows are asked for, and there are {count}")
        return Shots(sorted(order[:shots]), f"{shots:,} of {count:,} rows are used ({setting})")
    groups = grouped(labels, order)
    short = [f"{len(rows)} of {name!r}" for name, rows in groups.items() if len(rows) < shots]
    if short:
        raise ConfigError(
            f"{setting}: {shots} rows of each label are asked for, and there are only {', '.join(short)}; there are "
            f"{count} rows of {len(groups)} labels"
        )
    rows = sorted(row for group in groups.values() for row in group[:shots])
    names = ", ".join(repr(name) for name in groups)
    return Shots(rows, f"{len(rows):,} of {count:,} rows are used: {shots} of each label, {names} ({setting})")


def balanced(labels: Sequence[str] | None, count: int, shots: int, seed: int, setting: str) -> list[int]:
    """`shots` rows in all, mixed; the labels' numbers differ by one at most. Fewer of the same seed are among more.

    Raises:
        ConfigError: there are not as many rows, or not as many of a label.
    """
    rng = random.Random(seed)
    order = rng.sample(range(count), count)
    if shots > count:
        raise ConfigError(f"{setting}: {shots} shots are asked for, and there are {count} rows to take them from")
    if labels is None:
        return order[:shots]
    groups = grouped(labels, order)
    # Which label has one more than another is left to the seed.
    turns = rng.sample(sorted(groups), len(groups))
    wanted = {name: len(range(i, shots, len(turns))) for i, name in enumerate(turns)}
    short = [f"{len(groups[name])} of {name!r}" for name, most in wanted.items() if len(groups[name]) < most]
    if short:
        raise ConfigError(
            f"{setting}: {shots} shots of {len(turns)} labels are asked for, and there are only {', '.join(short)} to "
            "take them from"
        )
    chosen = [groups[turns[i % len(turns)]][i // len(turns)] for i in range(shots)]
    # The labels must not take turns: a model would see the pattern and go on with it.
    rng.shuffle(chosen)
    return chosen


def grouped(labels: Sequence[str], order: Sequence[int]) -> dict[str, list[int]]:
    """The rows of each label, in `order`; labels in alphabetical order."""
    groups: dict[str, list[int]] = {name: [] for name in sorted(set(labels))}
    for row in order:
        groups[labels[row]].append(row)
    return groups
