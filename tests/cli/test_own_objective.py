"""The objective that CONTRIBUTING.md shows, outside the package: trained, resumed, planned, checked, searched."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import yaml

import mlxft as api

ROOT = Path(__file__).parents[2]
CODE = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL)
Recipe = Callable[..., dict[str, Any]]


@pytest.fixture
def own(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """`own(**{"smooth.epsilon": 0.2})`: a recipe of objective smooth.py:Smooth, which stands in the working folder."""
    assert CODE is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smooth.py").write_text(CODE[1], "utf-8")
    more = {"objective": "smooth.py:Smooth", "data.valid": 0.3, "run.steps": 6, "run.save_every": 3}
    return lambda **changes: recipe(20, **{**more, **changes})


def weights(run: api.Run) -> dict[str, mx.array]:
    return mx.load(str(run.result / "adapters.safetensors"))


def test_it_uses_public_names_alone() -> None:
    assert CODE is not None
    (names,) = re.findall(r"^from mlxft import (.*)$", CODE[1], re.MULTILINE)
    assert set(names.split(", ")) <= set(api.__all__)
    assert len(re.findall(r"mlxft", CODE[1])) == 1


def test_it_learns_and_is_validated(own: Recipe) -> None:
    run = api.train(own(**{"run.steps": 40, "run.eval_every": 20, "optim.lr": 1e-2}))
    losses = [e["loss"] for e in run.metrics("train")]
    assert losses[-1] < 0.8 * losses[0]
    assert len(run.metrics("eval")) == 2
    assert all("target_logprob" in e for e in run.metrics("eval"))


def test_the_second_term_is_a_mean_over_rows(own: Recipe) -> None:
    """A random model's log-partitions are near the logarithm of its vocabulary, and the z-loss near their square."""
    runs = [api.train(own(**{"run.name": f"z{z}", "run.steps": 1, "smooth.z": z})) for z in (0.0, 1.0)]
    plain, with_z = (run.metrics("train")[0]["loss"] for run in runs)
    vocabulary = api.load(own()["model"]["path"]).config["vocab_size"]
    assert with_z - plain == pytest.approx(math.log(vocabulary) ** 2, rel=0.2)


def test_killed_and_resumed_is_uninterrupted(own: Recipe) -> None:
    whole = api.train(own())
    half = {**own(**{"run.name": "b"}), "optim": {**own()["optim"], "schedule": "constant", "warmup": 0}}
    again = {**half, "run": {**half["run"], "name": "c"}}
    api.train({**half, "run": {**half["run"], "steps": 3}})
    resumed, straight = api.train(half, resume=True), api.train(again)
    one, other = weights(resumed), weights(straight)
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)
    assert whole.metrics("end")


def test_a_run_folder_does_not_choose_python_by_itself(own: Recipe, mlxft: Callable[..., Any]) -> None:
    """As with rewards.function: whoever opens a run need not run its objective, and resuming asks."""
    Path("recipe.yaml").write_text(yaml.safe_dump(own()), "utf-8")
    assert mlxft("train", "recipe.yaml").code == 0
    refused = mlxft("train", "--resume", "runs/a")
    assert refused.code == 2
    assert "objective: the run folder names Python code to run" in refused.err
    assert mlxft("train", "--resume", "runs/a", "objective=smooth.py:Smooth").code == 0
    Path("smooth.py").write_text("raise SystemExit('it was run')", "utf-8")
    assert api.open_run("runs/a").config.objective == "smooth.py:Smooth"
    assert api.load("runs/a").model is not None


def test_it_is_checked_planned_and_searched(own: Recipe, mlxft: Callable[..., Any]) -> None:
    settings = own(**{"run.steps": 4, "run.eval_every": 2})
    Path("recipe.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    found = mlxft("check", "recipe.yaml", "--json")
    assert found.code == 0, found.err
    facts = json.loads(found.out)
    assert facts["memory"]["needed"] > 0
    assert facts["data"]["rows"] == 14
    search = {"space": {"smooth.epsilon": {"choice": [0.0, 0.3]}}, "trials": 2}
    Path("sweep.yaml").write_text(yaml.safe_dump({**settings, "sweep": search}), "utf-8")
    done = mlxft("sweep", "sweep.yaml")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ("nowhere.py:Smooth", "no such file"),
        ("smooth.py:Rough", "no class 'Rough' in it"),
        ("smooth.py:np", "np is module, not a class"),
        ("smooth.py:SmoothBatch", "SmoothBatch is not a subclass of mlxft.Objective"),
        ("mlxft:Objective", "Objective lacks load_state_dict, loss, state_dict, steps"),
        ("no_such_package.mine:Mine", "no_such_package.mine cannot be imported"),
        ("smoth", "one of your own is file.py:Class"),
    ],
)
def test_what_is_no_objective_is_refused(own: Recipe, objective: str, says: str) -> None:
    with pytest.raises(api.errors.ConfigError, match=re.escape(says)):
        api.train(own(objective=objective))


def test_a_file_that_was_changed_is_read_again(own: Recipe) -> None:
    mlxft_run = api.train(own(**{"run.steps": 1}))
    file = Path("smooth.py")
    file.write_text(file.read_text("utf-8").replace('"target_logprob"', '"renamed"'), "utf-8")
    again = api.train(own(**{"run.steps": 1, "run.name": "b"}))
    assert "target_logprob" in mlxft_run.metrics("train")[0]
    assert "renamed" in again.metrics("train")[0]
