"""The compiled step: the run that an eager one is, no more traces than are allowed, and the same bits when resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxft import measure
from mlxft.errors import ConfigError, ModelError
from mlxft.model.adapters import LoRASpec, prepare_adapter
from mlxft.model.load import Loaded
from mlxft.objectives.base import Batch, LossSum, OffPolicy
from mlxft.objectives.sft import one_of_few
from mlxft.recipe import load_config, parse_config
from mlxft.run import assemble, load_base, make_objective, train
from mlxft.train import gradient as module
from mlxft.train.gradient import TRACES, CompiledGradient, Gradients, gradient

Make = Callable[..., dict[str, Any]]
PACKED = {"batch": {"rows": 1, "pack": True}, "data.max_length": 64}
CHANGES: dict[str, dict[str, Any]] = {
    "sft": {"batch": {"rows": 10}},
    "packed": PACKED,
    "checkpointed": {**PACKED, "memory.checkpoint": "on"},
    "4 bits": {"batch": {"rows": 10}, "model.quantize": 4, "model.group_size": 32},
    "full": {"batch": {"rows": 10}, "tune": {"method": "full"}, "optim.lr": 1e-3},
    "dora and head": {"batch": {"rows": 10}, "tune": {"method": "dora", "train": ["embed_tokens"]}},
    "dpo": {"objective": "preference"},
    "kto": {"objective": "preference", "preference": {"loss": "kto"}},
    "reward": {"objective": "reward"},
}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[CompiledGradient]:
    """Every compiled gradient that is made."""
    found: list[CompiledGradient] = []
    own = CompiledGradient.__init__

    def made(self: CompiledGradient, *args: Any) -> None:
        own(self, *args)
        found.append(self)

    monkeypatch.setattr(CompiledGradient, "__init__", made)
    return found


@pytest.fixture
def settings(recipe: Make, tmp_path: Path) -> Make:
    def make(**changes: Any) -> dict[str, Any]:
        if "objective" in changes:
            rows = [{"prompt": "the in on", "chosen": f"and {w}", "rejected": f"is {w}"} for w in ("of", "to", "at")]
            (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
            changes |= {"data": {"train": str(tmp_path / "pairs.jsonl"), "format": "preference"}, "batch": {"rows": 3}}
        return recipe(**{"optim.schedule": "constant", "optim.warmup": 0, "memory.measure": False, **changes})

    return make


def weights(run: Any) -> dict[str, mx.array]:
    return mx.load(str(next(p for p in run.result.iterdir() if p.suffix == ".safetensors" and "head" not in p.name)))


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_compiled_run_is_the_eager_run(
    changes: dict[str, Any], settings: Make, traced: list[CompiledGradient]
) -> None:
    runs = [train(settings(**changes, **{"run.compile": c, "run.name": c})) for c in ("off", "on")]
    assert len(traced) == 1 and traced[0].traces >= 1
    one, other = map(weights, runs)
    began = weights(train(settings(**changes, **{"run.name": "one", "run.steps": 1})))
    for name, value in one.items():
        moved = float(mx.abs(value - began[name]).max())
        assert moved > 0
        assert float(mx.abs(value - other[name]).max()) <= 1e-3 * moved + 1e-6, name
    losses = [[e["loss"] for e in run.metrics("train")] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [load_config(run.dir / "config.yaml").run.compile for run in runs] == ["off", "on"]
