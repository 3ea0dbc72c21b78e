"""Standard errors and intervals next to scipy's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxft.study.stats import bootstrap, mean

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/bootstrap.json").read_text("utf-8"))
CASES = GOLDEN["cases"]


@pytest.mark.parametrize("name", CASES)
def test_a_mean_and_its_standard_error_are_scipys(name: str) -> None:
    case: dict[str, Any] = CASES[name]
    found = mean(case["a"], case.get("weights"))
    assert (found.value, found.se) == pytest.approx((case["mean"], case["sem"]), rel=1e-12)
    assert found.n == len(case["a"])
    apart = np.array(case["a"]) - np.array(case["b"])
    assert mean(apart, case.get("weights")).se == pytest.approx(case["sem_difference"], rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_paired_bootstrap_is_scipys(name: str) -> None:
    """The same draws from the same seed, and the same correction for bias and acceleration."""
    case = CASES[name]
    found = bootstrap(case["a"], case["b"], case.get("weights"), seed=3)
    assert found == pytest.approx((case["difference"], *case["bca95"]), abs=1e-12)
    fewer = bootstrap(case["a"], case["b"], case.get("weights"), seed=4, confidence=0.9, resamples=2000)
    assert fewer[1:] == pytest.approx(case["bca90"], abs=1e-12)


def test_resamples_drawn_in_parts_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["f1"]
    monkeypatch.setattr("mlxft.study.stats._CHUNK", 25 * 7)
    assert bootstrap(case["a"], case["b"], seed=3)[1:] == pytest.approx(case["bca95"], abs=1e-12)


def test_what_one_row_or_equal_rows_leave_unknown() -> None:
    assert math.isnan(mean([0.5]).se)
    assert math.isnan(bootstrap([1.0], [0.0], seed=0).low)
    assert bootstrap([1.0, 0.5], [0.5, 0.0], seed=0) == (0.5, 0.5, 0.5)
    assert mean([1.0, 1.0]).se == 0


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 200 samples of 60 rows with a true difference of 0.2, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        b = rng.normal(0, 1, 60)
        found = bootstrap(b + rng.normal(0.2, 0.5, 60), b, seed=seed, resamples=999)
        held += found.low <= 0.2 <= found.high
    assert 180 <= held <= 199
