"""Frozen models beside the one that is trained: what they say is what they said, and the plan counts what they hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from rich.console import Console

import mlxft
from mlxft.build import base_skeleton, load_base, prepare
from mlxft.config import parse_config
from mlxft.model.frozen import FrozenModels, FrozenSource, frozen_residents
from mlxft.model.load import base_fingerprint

Make = Callable[..., dict[str, Any]]
IDS = mx.array([[5, 9, 12, 40, 3]])


def policy(settings: dict[str, Any]) -> tuple[Any, FrozenModels]:
    """A model in training, as a recipe has it, and the frozen models beside it."""
    config = parse_config(settings)
    loaded = load_base(config)
    prepare(config, loaded)
    models = FrozenModels(loaded.model, base_fingerprint(loaded), config.model.path)
    loaded.model.train()
    return loaded.model, models


def disturb(model: Any) -> None:
    """As training does: new arrays in the places of those that are trained."""
    moved = {name: value + 0.1 for name, value in tree_flatten(model.trainable_parameters())}
    model.load_weights(list(moved.items()), strict=False)


@pytest.mark.parametrize("where", ["the same base", "another base", "a whole model"])
def test_a_teacher_says_what_it_said_alone(
    where: str, recipe: Make, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """As a role on the trained base, or as a model of its own; the model that is trained stays what it is."""
    teacher = recipe(**{"run.name": "teacher"})
    if where != "the same base":
        teacher["model"] = {"path": str(make_model_dir(tmp_path / "other", hidden_size=48)), "dtype": "float32"}
    if where == "a whole model":
        teacher |= {"tune": {"method": "full"}, "optim": {"lr": 1e-3}}
    run = mlxft.train(teacher, console=Console(quiet=True))
    wanted = mlxft.load(run).model(IDS)
    settings = recipe(**{"tune.dropout": 0.5})
    config, (model, models) = parse_config(settings), policy(settings)
    disturb(model)
    model.eval()
    before = model(IDS)
    model.train()
    frozen = models.open(FrozenSource("teacher", run.result))
    assert frozen.shared == (where == "the same base")
    for _ in range(2):
        with frozen.reading() as split:
            assert mx.allclose(split.model(IDS), wanted, atol=1e-5).item()
        disturb(model)
    model.eval()
    assert not mx.array_equal(model(IDS), before).item()
    # The plan counts it without loading it; notes name a base of its own.
    planned = frozen_residents([FrozenSource("teacher", run.result)], config, base_skeleton(config))
    held = sum(value.nbytes for value in frozen.arrays())
    assert planned.frozen["teacher"] == pytest.approx(held, abs=4096)  # a file has a header
    assert planned.apart == (frozenset() if frozen.shared else {"teacher"})
    assert bool(planned.notes) is not frozen.shared


@pytest.mark.parametrize("tune", [{"rank": 2}, {"method": "full"}], ids=["lora", "full"])
def test_what_training_started_from_stays(tune: dict[str, Any], recipe: Make) -> None:
    settings = recipe(tune=tune)
    config, (model, models) = parse_config(settings), policy(settings)
    model.eval()
    before = model(IDS)
    reference = models.start("reference", config)
    disturb(model)
    assert not mx.allclose(model(IDS), before, atol=1e-3).item()
    with reference.reading() as split:
        assert mx.array_equal(split.model(IDS), before).item()
    planned = frozen_residents([FrozenSource("reference")], config, base_skeleton(config)).frozen["reference"]
    trained = sum(value.nbytes for _, value in tree_flatten(model.trainable_parameters()))
    assert planned == (trained if tune.get("method") == "full" else 0), "a fresh adapter's base is there anyway"
