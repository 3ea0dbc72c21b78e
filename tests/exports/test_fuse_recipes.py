"""`mlxft fuse --recipe`: the fused model quantised by mlx-lm's own tools, and what that keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

import mlxft
from mlxft.errors import ConfigError
from mlxft.exports.fuse import Fused, Meter, fuse_sources
from mlxft.model.layers import QUANTIZED

Recipe = Callable[..., dict[str, Any]]
Maker = Callable[..., Path]
IDS = mx.array([[3, 40, 77, 5, 21, 9]])


def train(settings: dict[str, Any]) -> Path:
    return mlxft.train({**settings, "optim": {"lr": 0.05, "schedule": "constant", "warmup": 0}}).dir


def check(fused: Fused, run: Path) -> dict[str, int]:
    """The folder, as mlx-lm and as mlxft load it, is the model that was measured; bits of its layers."""
    loaded = mlxft.load(fused.out)
    assert mx.allclose(mlx_lm.load(str(fused.out))[0](IDS), loaded.model(IDS), atol=1e-4)
    meter = Meter(loaded, fused.probe)
    gap = meter.gap(Meter(mlxft.load(run), fused.probe).read(), meter.read())
    assert gap.divergence == pytest.approx(fused.chosen.gap.divergence, rel=1e-3)
    config = json.loads((fused.out / "config.json").read_text("utf-8"))
    assert config["quantization"] == config["quantization_config"]
    assert fused.bytes == fused.chosen.bytes
    return {path: m.bits for path, m in loaded.model.named_modules() if isinstance(m, QUANTIZED)}


@pytest.mark.parametrize(("recipe_name", "found"), [("mixed", {4, 5}), ("awq", {4}), ("gptq", {4, 6}), ("dwq", {4})])
def test_each(recipe_name: str, found: set[int], recipe: Recipe, tmp_path: Path) -> None:
    run = train(recipe())
    fused = fuse_sources(run, tmp_path / "out", recipe=recipe_name, keep=0.5)
    assert set(check(fused, run).values()) == found
    assert [trial.name for trial in fused.trials][:2] == ["float", "plain 4 bits"]


def test_what_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    run = train(recipe())
    with pytest.raises(ConfigError, match="--dequantize writes float"):
        fuse_sources(run, tmp_path / "out", recipe="dwq", dequantize=True)
    with pytest.raises(ConfigError, match="gptq takes 2, 4, 8 bits"):
        fuse_sources(run, tmp_path / "out", recipe="gptq", bits=5)
    with pytest.raises(ConfigError, match="--rows is what a --recipe calibrates on"):
        fuse_sources(run, tmp_path / "out", rows="rows.jsonl")
