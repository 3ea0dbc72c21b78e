"""The range test: its arithmetic by hand, curves whose answer is known, and the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxft.config import parse_config
from mlxft.errors import ConfigError
from mlxft.study.lr_find import has_diverged, lr_find, rate_at, smooth, suggest_rate, valley


def test_rates_rise_evenly_in_the_logarithm() -> None:
    assert [rate_at(k, 4, 1e-3, 1.0) for k in range(4)] == pytest.approx([1e-3, 1e-2, 1e-1, 1.0])


def test_the_running_mean_by_hand() -> None:
    """2, then (0.9 * 0.1 * 2 + 0.1 * 4) / (1 - 0.81) = 0.58 / 0.19."""
    assert smooth([2.0, 4.0]) == pytest.approx([2.0, 0.58 / 0.19])


def test_the_suggestion_is_a_tenth_of_the_valleys_rate() -> None:
    """The loss falls from 3 to 1 at rate 0.01 and rises on both sides as the squared logarithm: the running mean lags
    behind by less than its ten steps, which are a third of a decade here."""
    rates = [rate_at(k, 151, 1e-5, 1.0) for k in range(151)]
    losses = [1 + 2 * min(1.0, abs(math.log10(r / 0.01)) / 2) ** 2 for r in rates]
    found = suggest_rate(rates, losses, False)
    assert found.suggestion is not None
    assert 1e-3 <= found.suggestion <= 1e-3 * 10 ** (1 / 3)
    assert found.steepest is not None
    assert 1e-4 < found.steepest < 1e-2
    assert found.note == ""


@pytest.mark.parametrize(
    ("smoothed", "wanted"),
    [
        # A dip by less than a quarter of the whole fall is noise; what comes after the first great rise is no matter.
        ([4.0] * 12 + [3.5, 3.9, 3.0, 2.0, 2.2, 2.9, 1.9], 15),
        ([4.0] * 12 + [3.5, 3.9, 3.0, 2.0, 2.2, 2.4, 1.9], 18),
    ],
)
def test_the_first_valley(smoothed: list[float], wanted: int) -> None:
    assert valley(smoothed) == wanted


def test_what_runs_away() -> None:
    """From 4 to 1: twice the lowest is 2, but as much as it has fallen is 3 more: 4.01 has run away, 3.9 has not."""
    course = [4.0] * 10 + [1.0]
    assert not has_diverged([*course, 3.9])
    assert has_diverged([*course, 4.01])
    assert not has_diverged([1.0, 5.0]), "too early to tell"


def test_a_loss_that_does_not_fall_or_still_falls_is_said() -> None:
    rates = [rate_at(k, 40, 1e-5, 1e-3) for k in range(40)]
    flat = suggest_rate(rates, [2.0 + 0.01 * k for k in range(40)], False)
    assert (flat.suggestion, flat.steepest) == (None, None)
    assert "never fell" in flat.note
    falling = suggest_rate(rates, [2.0 - 0.01 * k for k in range(40)], False)
    assert falling.suggestion == pytest.approx(1e-4)
    assert "higher --max" in falling.note


def test_the_command_suggests_a_rate_and_leaves_nothing_but_the_picture(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(30, **{"data.valid": 0.2})), "utf-8")
    before = sorted(p.name for p in tmp_path.iterdir())
    command = [sys.executable, "-m", "mlxft", "lr-find", "r.yaml", "--min", "1e-5", "--steps", "50", "--plot", "lr.png"]
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["rates"][0] == 1e-5
    assert found["rates"] == sorted(found["rates"])
    assert 1e-4 < found["suggestion"] < 1e-1
    assert found["losses"][0] > min(found["smoothed"])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "lr.png"])


def test_rates_that_end_the_test_early(recipe: Callable[..., dict[str, Any]]) -> None:
    """SGD of all weights without clipping at rates up to 1e9 runs away, which is no error here."""
    config = parse_config(recipe(30, tune={"method": "full"}, optim={"name": "sgd", "clip": None}))
    found = lr_find(config, 1e-3, 1e9, 60)
    assert found.diverged
    assert len(found.losses) < 60


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"low": 1.0, "high": 0.1}, "expected 0 < min < max"),
        ({"low": 0.0}, "expected 0 < min < max"),
        ({"steps": 5}, "needs at least 20"),
        ({"plot": Path("x.gif")}, "gif"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str, recipe: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=said):
        lr_find(parse_config(recipe()), **options)
