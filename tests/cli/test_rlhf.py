"""`mlxft rlhf`: the whole road, by the command, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxft.demo.rlhf import Review, distinct2, pairs_of, read_reviews
from mlxft.errors import DataError


def test_the_whole_road(make_model_dir: Callable[..., Path], shell: Callable[..., Any], tmp_path: Path) -> None:
    """Three runs, each from what the one before left; a fused folder; a table of before and after."""
    base = make_model_dir(tmp_path / "base", "llama", max_position_embeddings=1024)
    settings = ["model.path=" + str(base), "model.dtype=float32", "data.max_length=600", "run.steps=2"]
    overrides = [f"{run}:{setting}" for run in ("sft", "reward", "ppo") for setting in settings]
    done = shell("rlhf", "--dir", "out", *overrides, "ppo:run.report_every=1")
    assert done.code == 0, done.err
    out = tmp_path / "out"
    assert (out / "fused" / "config.json").exists()
    lines = [json.loads(line) for line in (out / "ppo" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [e["rollout"] for e in lines if e["event"] == "rollout"] == [0]
    steps = [e for e in lines if e["event"] == "train"]
    assert [e["step"] for e in steps] == [1, 2]
    assert (steps[0]["ratio_mean"], steps[0]["approx_kl"], steps[0]["clip_fraction"]) == (1.0, 0.0, 0.0)
    evals = [e for e in lines if e["event"] == "eval"]
    assert evals[0]["kl"] == 0.0  # the policy is its own reference before the first step
    assert evals[0]["win_rate"] == 0.5
    assert evals[0]["reward"] == evals[0]["reference_reward"]
    shown = [json.loads(line) for line in (out / "ppo" / "samples.jsonl").read_text("utf-8").splitlines()]
    assert {s["step"] for s in shown} == {0, 2}
    assert "distinct-2" in done.out


@pytest.mark.parametrize("override", ["run.steps=2", "dpo:run.steps=2", "ppo:steps"])
def test_an_override_names_its_run(override: str, refused: Callable[..., str], tmp_path: Path) -> None:
    said = refused(2, "rlhf", "--dir", str(tmp_path / "out"), override)
    assert f"{override}: expected RUN:KEY=VALUE with a run of sft, reward, ppo" in said


def test_reviews_of_another_kind_are_refused(tmp_path: Path):
    file = tmp_path / "reviews.jsonl"
    file.write_text('{"text": "a", "label": "great"}\n', "utf-8")
    with pytest.raises(DataError, match=r"reviews\.jsonl:1: expected a text `review` and a `label`"):
        read_reviews(str(file))
    file.write_text('{"review": "one two three four five six seven eight", "label": "great"}\n', "utf-8")
    with pytest.raises(DataError, match="1 great and 0 other reviews"):
        read_reviews(str(file))


def test_pairs_are_of_like_length():
    great = [Review("x" * n, True) for n in (10, 30)]
    other = [Review("y" * n, False) for n in (29, 11, 90)]
    pairs = pairs_of([*great, *other])
    assert [(len(p["chosen"]), len(p["rejected"])) for p in pairs] == [(11, 12), (31, 30)]


def test_distinct2_by_hand():
    """a b a b: three pairs, two different."""
    assert distinct2(["a b a b"]) == pytest.approx(2 / 3)
    assert distinct2(["a b c", "a b"]) == pytest.approx(2 / 3)
