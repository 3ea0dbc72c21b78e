"""A streamed run trains the weights that a run in memory trains, also after a kill, in whatever it was doing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxft.errors import ConfigError
from mlxft.runs import open_run

from .test_resume import assert_same, command, kill_when, killed, last_step, result, train, write_recipe

Recipe = Callable[..., dict[str, Any]]


def streamed(recipe: Recipe, tmp_path: Path, rows: int = 30, **changes: Any) -> dict[str, Any]:
    """A recipe of three epochs' beginning: data.train once, and half of another source."""
    recipe(rows=12)  # writes the other source
    mix = {"other": {"path": str(tmp_path / "rows-12.jsonl"), "weight": 0.5}}
    settings = {"batch.rows": None, "batch.tokens": 150, "run.steps": 40, "run.save_every": 7, "data.mix": mix}
    return recipe(rows=rows, **{**settings, "data.stream": True, **changes})


def test_streamed_is_in_memory(recipe: Recipe, tmp_path: Path) -> None:
    run = train(streamed(recipe, tmp_path, **{"data.valid": str(tmp_path / "rows-12.jsonl"), "run.eval_every": 9}))
    other = {"data.stream": False, "run.name": "b", "data.valid": str(tmp_path / "rows-12.jsonl"), "run.eval_every": 9}
    train(streamed(recipe, tmp_path, **other))
    assert_same(tmp_path / "runs/a", tmp_path / "runs/b")
    last = run.metrics("train")[-1]
    epochs = last["epoch"]
    assert epochs > 2
    # Within an epoch batches are drawn from all sources.
    assert last["rows/train"] == pytest.approx(30 * epochs, abs=8)
    assert last["rows/other"] == pytest.approx(6 * epochs, abs=5)
    assert last["trained_tokens"] == last["trained_tokens/train"] + last["trained_tokens/other"]


def test_killed_is_uninterrupted(recipe: Recipe, tmp_path: Path) -> None:
    """Before the first checkpoint, at one, and in the second and third epoch."""
    train(streamed(recipe, tmp_path))
    for at in (1, 7, 15, 33):
        other = streamed(recipe, tmp_path, **{"run.name": f"b{at}"})
        killed(at, other)
        train(other, resume=True)
        places = [tmp_path / "runs/a", tmp_path / f"runs/b{at}"]
        assert_same(*places)
        names = ("rows/train", "rows/other", "trained_tokens/train", "trained_tokens/other")
        counted = [[[e[n] for n in names] for e in open_run(place).metrics("train")] for place in places]
        assert counted[0] == counted[1]


def test_killed_while_it_encodes_and_while_it_trains(recipe: Recipe, tmp_path: Path) -> None:
    """By the command, in processes of their own; a kill in the encoding leaves nothing that is read."""
    settings = streamed(recipe, tmp_path, rows=3000, **{"batch.tokens": 800})
    path = write_recipe(tmp_path / "b.yaml", {**settings, "run": {**settings["run"], "name": "b"}})
    cache = Path(os.environ["MLXFT_CACHE"])
    cache.mkdir(parents=True, exist_ok=True)

    def encoding() -> bool:
        return any(cache.glob(".tmp-*"))

    kill_when(command("train", path, "--resume"), encoding)
    assert list(cache.glob(".tmp-*"))
    assert not (tmp_path / "runs/b/metrics.jsonl").exists()
    kill_when(command("train", path, "--resume"), lambda: last_step(tmp_path / "runs/b") >= 20)
    assert not list(cache.glob(".tmp-*"))
    train({**settings, "run": {**settings["run"], "name": "b"}}, resume=True)
    train(settings)
    assert_same(tmp_path / "runs/a", tmp_path / "runs/b")


def test_another_way_to_read_or_weigh_is_another_run(recipe: Recipe, tmp_path: Path) -> None:
    settings = streamed(recipe, tmp_path, **{"run.steps": 2})
    train(settings)
    for change, named in (
        ({"data.stream": False}, "data.stream: the run has True"),
        ({"data.mix": {"other": {**settings["data"]["mix"]["other"], "weight": 2}}}, r"data\.mix\.other\.weight"),
    ):
        with pytest.raises(ConfigError, match=named):
            train(streamed(recipe, tmp_path, **{"run.steps": 2, **change}), resume=True)
    before = result(tmp_path / "runs/a")
    train(settings, resume=True)
    assert result(tmp_path / "runs/a") == before
