"""mlxft selftest: it passes here, and what is wrong fails it."""

from __future__ import annotations

import json
import math
from typing import Any

import mlx.core as mx
import pytest

from mlxft import selftest
from mlxft.selftest import Check


@pytest.mark.slow
def test_the_command_passes_here(mlxft: Any) -> None:
    """Each operation, and each kind of training: its JSON holds the machine and the checks."""
    done = mlxft("selftest", "--json")
    found = json.loads(done.out)
    failed = [check for check in found["checks"] if not check["passed"]]
    assert (done.code, failed) == (0, [])
    names = " ".join(check["name"] for check in found["checks"])
    for part in (
        "attention",
        "4-bit",
        "experts",
        "cross entropy",
        "delta",
        "SFT",
        "DPO",
        "PPO",
        "resumed",
        "fused",
        "memory",
    ):
        assert part in names
    assert found["machine"]["mlx"]


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device alone: what the CPU computes is the reference."""
    right = mx.fast.scaled_dot_product_attention
    calls = iter(range(100))

    def wrong(*args: Any, **how: Any) -> mx.array:
        out = right(*args, **how)
        return out if next(calls) < 3 else 1.01 * out  # the reference comes first

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", wrong)
    assert selftest._attention(mx.float32, 64) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    ("check", "passed"),
    [
        (Check("a", 0.01, 0.02), True),
        (Check("a", 0.03, 0.02), False),
        (Check("a", math.nan, 0.02), False),
        (Check("a", error="RuntimeError: no kernel"), False),
    ],
)
def test_what_passes(check: Check, passed: bool) -> None:
    assert check.passed is passed


def test_a_nan_is_no_small_difference() -> None:
    one = mx.array([1.0, 2.0])
    assert math.isnan(selftest._difference([one, mx.array([math.nan, 0.0])], [one, one]))
    assert selftest._difference([one], [mx.array([1.0, 2.5])]) == pytest.approx(0.2)


def test_an_error_is_told_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> float:
        raise RuntimeError("[metal::malloc] no")

    monkeypatch.setattr(selftest, "_operations", lambda: iter([("broken", 0.1, broken), ("sound", 0.1, lambda: 0.0)]))
    monkeypatch.setattr(selftest, "_trainings", lambda folder: iter([]))
    told: list[Check] = []
    found = selftest.selftest(told.append)
    assert [(c.name, c.passed) for c in found] == [("broken", False), ("sound", True)]
    assert found == told
    assert found[0].error == "RuntimeError: [metal::malloc] no"
