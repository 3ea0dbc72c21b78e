"""Rows into batches: rows of like length share one, so that little is padding.

An epoch's rows are shuffled and cut into windows; within a window they are sorted by length and cut into batches, and
then all batches are shuffled. So neighbours in length meet, but other ones each epoch, and no length is trained in
one go.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WINDOW = 64  # batches; sorting more rows together pads less, and mixes them less
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Slot:
    """One batch to be: indices of its rows, and the width they are padded to."""

    rows: tuple[int, ...]
    width: int


def plan_epoch(
    lengths: IntArray, *, tokens: int | None = None, rows: int | None = None, seed: int | None, epoch: int = 0
) -> list[Slot]:
    """Batches of one epoch: every row once.

    Args:
        lengths: tokens of each row.
        tokens: budget of a batch, rows x width; a row longer than it is a batch of its own.
        rows: rows a batch, in place of `tokens`.
        seed: order of rows and of batches, together with `epoch`; None sorts all by length, for validation.
    """
    assert (tokens is None) != (rows is None), "one of tokens and rows"
    size = rows if rows is not None else (tokens or 0) / float(lengths.mean())
    if seed is None:
        return _cut(np.argsort(lengths, kind="stable"), lengths, tokens, rows)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    # Two windows at least: one would group the same neighbours in every epoch.
    count = max(2, round(len(order) / (WINDOW * max(1.0, size))))
    # All but the last of a window's batches are full, so windows are cut to whole batches where rows are counted.
    step = -(-len(order) // count)
    if rows is not None:
        step = max(rows, step - step % rows)
    slots: list[Slot] = []
    for start in range(0, len(order), step):
        window = order[start : start + step]
        slots += _cut(window[np.argsort(lengths[window], kind="stable")], lengths, tokens, rows)
    return [slots[i] for i in rng.permutation(len(slots))]


def _cut(order: IntArray, lengths: IntArray, tokens: int | None, rows: int | None) -> list[Slot]:
    """Cut rows, shortest first, into batches."""
    slots: list[Slot] = []
    batch: list[int] = []
    for row in order.tolist():
        full = len(batch) >= rows if rows is not None else (len(batch) + 1) * int(lengths[row]) > (tokens or 0)
        if batch and full:
            slots.append(Slot(tuple(batch), int(lengths[batch[-1]])))
            batch = []
        batch.append(row)
    if batch:
        slots.append(Slot(tuple(batch), int(lengths[batch[-1]])))
    return slots


def padding_share(slots: list[Slot], lengths: IntArray) -> float:
    """Share of the computed tokens that are padding."""
    computed = sum(len(s.rows) * s.width for s in slots)
    return 1.0 - sum(int(lengths[list(s.rows)].sum()) for s in slots) / computed
