"""Adapters to be exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxft.model.adapters import LoRASpec, adapter_config, attach, select_targets, trained_weights
from mlxft.model.load import load


@pytest.fixture
def save_adapter() -> Callable[..., Any]:
    """`save_adapter(model_dir, folder, targets="all-linear", dora=False, rank=4)`: see below."""
    return _save_adapter


def _save_adapter(model_dir: Path, folder: Path, targets: Any = "all-linear", dora: bool = False, rank: int = 4) -> Any:
    """An adapter with random weights as a run leaves it; gives the adapted model."""
    loaded = load(str(model_dir), dtype="float32")
    spec = LoRASpec(tuple(select_targets(loaded.model, targets, "all", dora)), rank, 2.5, 0.0, dora)
    attach(loaded.model, spec)
    noise = [
        (name, value + 0.05 * mx.random.normal(value.shape, key=mx.random.key(i)))
        for i, (name, value) in enumerate(tree_flatten(loaded.model.trainable_parameters()))
    ]
    loaded.model.update(tree_unflatten(noise))
    loaded.model.eval()
    base = {"base": {"model": str(model_dir), "fingerprint": loaded.fingerprint, "dtype": "float32"}}
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(spec, loaded.model, base)), "utf-8")
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained_weights(loaded.model))
    return loaded.model
