"""Validation: the whole set, weighted by tokens, and nothing of the run is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxft.config import parse_config
from mlxft.model.adapters import LoRASpec, prepare_adapter, select_targets, trained_weights
from mlxft.model.layers import random_state
from mlxft.model.load import Loaded
from mlxft.objectives.sft import SFT
from mlxft.trainer.loop import validate

Recipe = Callable[..., dict[str, Any]]


def objective(settings: dict[str, Any], loaded: Loaded) -> SFT:
    return SFT(parse_config(settings), loaded.tokenizer)


def test_it_is_the_mean_over_all_tokens(recipe: Recipe, tiny_model: Loaded):
    """Not the mean of batch means: 7 rows of unequal length in batches of 2, against each row by itself."""
    found = objective(recipe(rows=14, **{"data.valid": 0.5}), tiny_model)
    assert found.valid is not None
    total, count = 0.0, 0
    for row in found.valid.rows:
        ids = mx.array(row.ids)[None]
        nll = nn.losses.cross_entropy(tiny_model.model(ids[:, :-1]).astype(mx.float32), ids[:, 1:])[0]
        total += float((nll * mx.array(row.trained[1:].astype(np.float32))).sum())
        count += int(row.trained.sum())
    assert validate(tiny_model.model, found)["loss"] == pytest.approx(total / count, rel=1e-5)


def test_what_is_left_out_of_it_is_said(recipe: Recipe, tiny_model: Loaded):
    settings = recipe(rows=14, **{"data.valid": 0.5, "data.overflow": "drop", "data.max_length": 35})
    found = objective(settings, tiny_model)
    assert found.valid is not None
    short = 7 - len(found.valid.rows)
    assert 0 < short < 7
    assert f"validation: {short} rows were longer than data.max_length and are left out" in found.summary().notes


def test_it_does_not_depend_on_the_batch_size(recipe: Recipe, tiny_model: Loaded):
    losses = [
        validate(tiny_model.model, objective(recipe(rows=14, **{"data.valid": 0.5, "batch.rows": n}), tiny_model))
        for n in (1, 3, 7)
    ]
    assert [x["loss"] for x in losses] == pytest.approx([losses[0]["loss"]] * 3, rel=1e-5)


def test_dropout_is_off_and_nothing_is_left_changed(recipe: Recipe, tiny_model: Loaded):
    model = tiny_model.model
    paths = tuple(select_targets(model, "all-linear", "all"))
    prepare_adapter(model, LoRASpec(paths, rank=4, scale=2.0, dropout=0.5), ())
    for name, module in model.named_modules():
        if name in paths:
            module.lora_b = mx.random.normal(module.lora_b.shape)
    found = objective(recipe(**{"data.valid": 0.5}), tiny_model)
    model.train()
    mx.random.seed(7)
    state, weights = random_state(), {n: v.tolist() for n, v in trained_weights(model).items()}
    first, second = validate(model, found), validate(model, found)
    assert first == second
    assert model.training
    assert random_state() == state
    assert {n: v.tolist() for n, v in trained_weights(model).items()} == weights
    model.eval()
    assert validate(model, found) == first
    assert not model.training


def test_without_held_out_rows_there_is_nothing_to_say(recipe: Recipe, tiny_model: Loaded):
    assert validate(tiny_model.model, objective(recipe(), tiny_model)) == {}
