"""Every row once an epoch, within the budget, little padding, another order each epoch; packed and not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlxft.data.dataset import PADDING, WIDTHS, IntArray, Plan, Slot, pack_epoch, pack_width, padding_share, plan_epoch


def alpaca_like(rows: int, seed: int = 0) -> IntArray:
    """Lengths as of Alpaca: lognormal with mean 200, from 20 to 750."""
    spread = 0.6
    lengths = np.random.default_rng(seed).lognormal(np.log(200) - spread**2 / 2, spread, rows)
    return np.clip(lengths, 20, 750).astype(np.int64)


def packed(lengths: IntArray, **options: Any) -> Plan:
    return pack_epoch(lengths, width=pack_width(lengths, options.get("tokens")), **options)


MAKERS: list[Callable[..., Plan]] = [plan_epoch, packed]
BUDGETS: list[dict[str, int]] = [{"tokens": 2048}, {"tokens": 900}, {"rows": 1}, {"rows": 7}]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 13, 500])
def test_every_row_once_within_the_budget(make: Callable[..., Plan], budget: dict[str, int], rows: int) -> None:
    lengths = alpaca_like(rows)
    for epoch in range(3):
        slots = make(lengths, **budget, seed=0, epoch=epoch)
        assert sorted(row for slot in slots for row in slot.rows) == list(range(rows))
        for slot in slots:
            assert all(int(lengths[list(s)].sum()) <= slot.width for s in slot.sequences)
            if "tokens" in budget:
                assert len(slot.sequences) * slot.width <= budget["tokens"]
            else:
                assert len(slot.sequences) <= budget["rows"]


@pytest.mark.parametrize("make", MAKERS)
def test_a_row_over_the_budget_is_still_trained(make: Callable[..., Plan]) -> None:
    slots = make(np.array([10, 90, 20]), tokens=50, seed=0)
    assert sorted(row for slot in slots for row in slot.rows) == [0, 1, 2]
    (longest,) = [slot for slot in slots if 1 in slot.rows]
    assert (len(longest.sequences), longest.width) == (1, 90)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("tokens", [2048, 4096])
def test_little_padding_on_alpaca_like_lengths(make: Callable[..., Plan], tokens: int) -> None:
    lengths = alpaca_like(2000)
    for epoch in range(2):
        slots = make(lengths, tokens=tokens, seed=0, epoch=epoch)
        assert padding_share(slots, lengths) <= 0.05


def test_padding_share_by_hand() -> None:
    lengths = np.array([3, 5, 4])
    # 2 x 5 computed for 3 + 5, and 1 x 4 for 4.
    order, starts, stops = np.arange(3, dtype=np.int32), np.array([0, 2]), np.array([2, 3])
    plain = Plan(order, starts, stops, np.array([5, 4]))
    assert list(plain) == [Slot(((0,), (1,)), 5), Slot(((2,),), 4)]
    assert padding_share(plain, lengths) == pytest.approx(2 / 14)
    # Packed: 1 x 10 computed for 3 + 5, and 1 x 10 for 4.
    tight = Plan(order, np.array([0, 1]), np.array([1, 2]), np.array([10, 10]), starts, stops)
    assert list(tight) == [Slot(((0, 1),), 10), Slot(((2,),), 10)]
    assert padding_share(tight, lengths) == pytest.approx(8 / 20)


@pytest.mark.parametrize("make", MAKERS)
def test_orders_differ_by_epoch_and_seed_only(make: Callable[..., Plan]) -> None:
    lengths = alpaca_like(300)
    first = make(lengths, tokens=2048, seed=3, epoch=0)
    assert make(lengths, tokens=2048, seed=3, epoch=0) == first
    for other in (make(lengths, tokens=2048, seed=3, epoch=1), make(lengths, tokens=2048, seed=4, epoch=0)):
        # Not only another order of batches: other rows meet.
        meetings = [{frozenset(slot.rows) for slot in slots} for slots in (first, other)]
        assert len(meetings[0] & meetings[1]) < 0.2 * len(first)


@pytest.mark.parametrize("make", MAKERS)
def test_lengths_are_mixed_over_the_epoch(make: Callable[..., Plan]) -> None:
    """Neither the long rows first nor the short ones: the thirds of an epoch have like mean lengths."""
    lengths = alpaca_like(20000)
    slots = make(lengths, tokens=1024, seed=0)
    means = [float(np.mean(lengths[list(slot.rows)])) for slot in slots]
    thirds = [np.mean(part) for part in np.array_split(np.array(means), 3)]
    assert max(thirds) < 1.1 * min(thirds)


def test_validation_is_sorted_and_the_same_each_time() -> None:
    lengths = alpaca_like(100)
    slots = plan_epoch(lengths, tokens=2048, seed=None)
    assert [lengths[row] for slot in slots for row in slot.rows] == sorted(lengths.tolist())
    assert slots == plan_epoch(lengths, tokens=2048, seed=None, epoch=5)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_packed_batches_have_at_most_two_shapes(budget: dict[str, int]) -> None:
    lengths = alpaca_like(1000)
    shapes = [(len(s.sequences), s.width) for epoch in range(3) for s in packed(lengths, **budget, seed=0, epoch=epoch)]
    assert len({width for _, width in shapes}) == 1
    for epoch in range(3):
        counts = [len(s.sequences) for s in packed(lengths, **budget, seed=0, epoch=epoch)]
        assert sum(c != max(counts) for c in counts) <= 1


def test_packing_computes_less_where_rows_are_few() -> None:
    """Among few rows hardly any are of like length."""
    lengths = alpaca_like(20)
    plain, tight = (make(lengths, tokens=2048, seed=0) for make in MAKERS)
    computed = [sum(len(s.sequences) * s.width for s in slots) for slots in (plain, tight)]
    assert computed[1] < 0.9 * computed[0]


@pytest.mark.parametrize(
    ("lengths", "tokens", "width"),
    [
        ([3000], 2048, 3000),  # over the budget: not a token more
        ([3000], None, 3008),  # whole tiles of 32
        ([10, 20], 2048, 32),  # no wider than all rows together, but for the tile
        ([500] * 100, 2048, 512),
        ([340] * 100, 2048, 1024),  # three to a sequence; one in 512 would leave a third empty
        ([200] * 100, 3000, 1472),  # of two sequences, seven rows; five in 1024 would do no better than 992
    ],
)
def test_width(lengths: list[int], tokens: int | None, width: int) -> None:
    assert pack_width(np.array(lengths), tokens) == width


def test_width_of_alpaca_like_lengths_is_narrow() -> None:
    lengths = alpaca_like(2000)
    width = pack_width(lengths)
    assert lengths.max() <= width <= WIDTHS[1]
    assert padding_share(pack_epoch(lengths, width=width, rows=1, seed=0), lengths) <= PADDING
