"""Rows into batches: rows of like length share one, or several share a sequence, so that little is padding.

An epoch's rows are shuffled and cut into windows; within a window they are sorted by length and cut into batches, and
then all batches are shuffled. So neighbours in length meet, but other ones each epoch, and no length is trained in
one go. Packed rows fill sequences of one width, each the fullest that it still fits into.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WINDOW = 64  # batches; sorting more rows together pads less, and mixes them less
WIDTHS = (512, 1024, 2048)  # of packed sequences: attention over longer ones costs more than their padding saves
SAMPLE = 4096  # rows by which a width is chosen
PADDING = 0.05  # share of a width's tokens that is good enough
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Slot:
    """One batch to be: the rows' indices in each of its sequences, and the width that these are padded to."""

    sequences: tuple[tuple[int, ...], ...]  # of one row each, unless packed
    width: int

    @property
    def rows(self) -> tuple[int, ...]:
        """All rows, in order."""
        return tuple(row for sequence in self.sequences for row in sequence)


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
            slots.append(Slot(tuple((r,) for r in batch), int(lengths[batch[-1]])))
            batch = []
        batch.append(row)
    if batch:
        slots.append(Slot(tuple((r,) for r in batch), int(lengths[batch[-1]])))
    return slots


def pack_width(lengths: IntArray, tokens: int | None = None) -> int:
    """Width of packed sequences, no less than the longest row: the least of few that leaves little padding.

    Args:
        lengths: tokens of each row.
        tokens: budget of a batch, of which the sequences take as much as can be.
    """
    longest = int(lengths.max())
    # Whole tiles are quicker, unless the budget says otherwise.
    least = -(-longest // 32) * 32
    if tokens is not None and least > tokens:
        least = longest
    sample = lengths[np.linspace(0, len(lengths) - 1, min(len(lengths), SAMPLE)).astype(np.int64)]
    order = np.argsort(-sample, kind="stable")
    best: tuple[float, int] | None = None
    for wanted in WIDTHS:
        width = max(least, wanted)
        if tokens is not None:
            part = tokens // max(1, tokens // width)
            width = max(least, part - part % 32)
        width = min(width, max(least, int(lengths.sum())))  # few rows do not fill a wide one
        padding = 1 - int(sample.sum()) / (len(_best_fit(order, sample, width)) * width)
        if padding <= PADDING:
            return width
        best = min(best or (padding, width), (padding, width))
    assert best is not None
    return best[1]


def pack_epoch(
    lengths: IntArray, *, width: int, tokens: int | None = None, rows: int | None = None, seed: int, epoch: int = 0
) -> list[Slot]:
    """Batches of packed sequences for one epoch: every row once. All are of one shape, but the last may be smaller.

    Args:
        lengths: tokens of each row, at most `width`.
        width: of every sequence.
        tokens: budget of a batch, sequences x width; one sequence at least.
        rows: sequences a batch, in place of `tokens`.
        seed: order of rows and of sequences, together with `epoch`.
    """
    assert (tokens is None) != (rows is None), "one of tokens and rows"
    rng = np.random.default_rng([seed, epoch])
    # Long rows first leave the short ones to fill gaps; with some noise, or the same rows would always meet.
    order = np.argsort(-lengths * rng.uniform(0.8, 1.25, len(lengths)))
    packs = _best_fit(order, lengths, width)
    packs = [packs[i] for i in rng.permutation(len(packs))]
    count = rows if rows is not None else max(1, (tokens or 0) // width)
    return [Slot(tuple(packs[i : i + count]), width) for i in range(0, len(packs), count)]


def _best_fit(order: IntArray, lengths: IntArray, width: int) -> list[tuple[int, ...]]:
    """Rows, one after the other, into the sequence where they leave the least room; a new one where none has any."""
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(width + 1)]
    rooms = 0  # bit r is set where a sequence has room for r tokens: the least that will do is found in one step
    for row in order.tolist():
        length = int(lengths[row])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = width, len(packs)
            packs.append([])
        packs[pack].append(row)
        if room > length:
            by_room[room - length].append(pack)
            rooms |= 1 << (room - length)
    return [tuple(pack) for pack in packs]


def padding_share(slots: list[Slot], lengths: IntArray) -> float:
    """Share of the computed tokens that are padding."""
    computed = sum(len(s.sequences) * s.width for s in slots)
    return 1.0 - sum(int(lengths[list(s.rows)].sum()) for s in slots) / computed
