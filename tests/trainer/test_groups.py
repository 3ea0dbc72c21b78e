"""optim.groups through whole runs: rates reported, layers that learn by their rate, exact resume, refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from rich.console import Console

from mlxft.config import load_config
from mlxft.errors import ConfigError
from mlxft.model.load import copy_sharing_arrays, load
from mlxft.run import train
from mlxft.runs import open_run

QUIET = Console(quiet=True)


def test_layers_learn_by_their_rate(recipe: Callable[..., dict[str, Any]], tiny_model_dir: Path) -> None:
    """Adam's first update is the rate: layer 1 moves by lr, layer 0 by a tenth of it, embeddings by 1e-4."""
    groups = [{"match": "layers.0", "scale": 0.1}, {"match": "embed_tokens", "lr": 1e-4}]
    optim = {"lr": 1e-2, "groups": groups, "warmup": 0, "weight_decay": 0.0, "schedule": "constant"}
    run = train(recipe(tune={"method": "full"}, optim=optim, **{"run.steps": 1}), console=QUIET)
    event = run.metrics("train")[0]
    assert (event["lr"], event["lr/layers.0"], event["lr/embed_tokens"]) == pytest.approx((1e-2, 1e-3, 1e-4))
    before = dict(tree_flatten(load(str(tiny_model_dir), dtype="float32").model.parameters()))
    after = dict(tree_flatten(load(str(run.result), dtype="float32").model.parameters()))
    moved = {n: mx.abs(after[n] - before[n]).max().item() for n in before}
    for part, rate in (("layers.0.", 1e-3), ("layers.1.", 1e-2), ("embed_tokens", 1e-4)):
        assert max(v for n, v in moved.items() if part in n) == pytest.approx(rate, rel=0.01), part


@pytest.mark.parametrize("tune", [{"rank": 4}, {"method": "full"}], ids=["lora", "full"])
def test_a_run_with_groups_goes_on_exactly(tune: dict[str, Any], recipe: Callable[..., dict[str, Any]]) -> None:
    groups = [{"match": "layers.0", "scale": 0.1, "weight_decay": 0.3}, {"match": "q_proj", "lr": 0.05}]
    optim = {"lr": 1e-2, "groups": groups}
    changes = {"tune": tune, "optim": optim, "run.save_every": 2, "run.keep": 9}
    whole = train(recipe(**changes), console=QUIET)
    wanted = next(whole.result.glob("*.safetensors")).read_bytes()
    shutil.rmtree(whole.dir / "checkpoints/step-4")
    shutil.rmtree(whole.result)
    train(recipe(**changes), resume=True, console=QUIET)
    assert next(whole.result.glob("*.safetensors")).read_bytes() == wanted
    other = {**optim, "groups": groups[:1]}
    with pytest.raises(ConfigError, match=r"cannot resume with other settings.*\n.*optim.groups"):
        train(recipe(**{**changes, "optim": other}), resume=True, console=QUIET)


def test_a_run_with_lora_plus_says_its_rate_and_goes_on_exactly(recipe: Callable[..., dict[str, Any]]) -> None:
    """Adam's first update is the rate: A does not move, since B is zero; B moves by 4 times optim.lr."""
    optim = {"lr": 1e-3, "warmup": 0, "weight_decay": 0.0, "schedule": "constant"}
    changes = {"tune": {"rank": 4, "lora_plus": 4}, "optim": optim, "run.save_every": 1, "run.keep": 9}
    run = train(recipe(**changes), console=QUIET)
    event = run.metrics("train")[0]
    assert (event["lr"], event["lr/lora_b"]) == pytest.approx((1e-3, 4e-3))
    first = mx.load(str(run.dir / "checkpoints/step-1/weights.safetensors"))
    assert isinstance(first, dict)
    moved = [mx.abs(value).max().item() for name, value in first.items() if name.endswith("lora_b")]
    assert moved == pytest.approx([4e-3] * len(moved), rel=0.01)
    wanted = next(run.result.glob("*.safetensors")).read_bytes()
    for step in (3, 4):
        shutil.rmtree(run.dir / f"checkpoints/step-{step}")
    shutil.rmtree(run.result)
    train(recipe(**changes), resume=True, console=QUIET)
    assert next(run.result.glob("*.safetensors")).read_bytes() == wanted
    with pytest.raises(ConfigError, match=r"cannot resume with other settings.*\n.*tune.lora_plus"):
        train(recipe(**changes | {"tune": {"rank": 4}}), resume=True, console=QUIET)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tune": {"method": "full", "lora_plus": 16}}, "method full has no lora_plus"),
        ({"tune.lora_plus": 0.5}, "tune.lora_plus: "),
        ({"tune.lora_plus": 16, "optim.name": "sgd"}, r"tune.lora_plus .16. is for optimisers whose updates do not"),
    ],
)
def test_where_lora_plus_has_no_meaning_it_is_refused(
    recipe: Callable[..., dict[str, Any]], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        train(recipe(**changes), console=QUIET)


def test_a_group_of_nothing_is_refused_before_anything_is_written(recipe: Callable[..., dict[str, Any]]) -> None:
    settings = recipe(**{"optim.groups": [{"match": "lora_c", "scale": 2.0}]})
    with pytest.raises(ConfigError, match=r"optim.groups: 'lora_c' matches no parameter.*did you mean lora_[ab]"):
        train(settings, console=QUIET)
    assert not (Path(settings["run"]["dir"]) / "a").exists()


def test_a_twin_is_trained_and_the_base_stays(recipe: Callable[..., dict[str, Any]], tiny_model_dir: Path) -> None:
    """Two runs over one loaded base are those of two loads, bit by bit."""
    base = load(str(tiny_model_dir), dtype="float32", lazy=True)
    runs = []
    for name, given in (("one", copy_sharing_arrays(base)), ("two", copy_sharing_arrays(base)), ("own", None)):
        settings = recipe(**{"run.name": name, "tune.train": ["model.norm"], "tune.dropout": 0.2})
        runs.append(train(settings, model=given, console=QUIET))
    weights = [(r.result / "adapters.safetensors").read_bytes() for r in runs]
    assert weights[0] == weights[1] == weights[2]
    names = [n for n, _ in tree_flatten(base.model.parameters())]
    assert not [n for n in names if "lora" in n]
    fresh = dict(tree_flatten(load(str(tiny_model_dir), dtype="float32").model.parameters()))
    assert all(mx.array_equal(v, fresh[n]).item() for n, v in tree_flatten(base.model.parameters()))
    assert open_run(runs[0].dir).metrics("end")


def test_the_recipe_of_layers_that_learn_by_their_depth(make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """configs/transfer-groups.yaml on a model of twelve layers."""
    base = make_model_dir(tmp_path / "deep", num_hidden_layers=12)
    root = Path(__file__).parents[2]
    rows = f"data.train={root / 'mlxft/demo/rows.jsonl'}"
    overrides = [f"model.path={base}", rows, f"run.dir={tmp_path}", "run.epochs=null", "run.steps=1", "batch.rows=2"]
    run = train(load_config(root / "configs/transfer-groups.yaml", overrides), console=QUIET)
    event = run.metrics("train")[0]
    rates = [v for k, v in event.items() if k.startswith("lr/")]
    assert len(rates) > 1
    assert 0 < min(rates) < max(rates) <= event["lr"]
