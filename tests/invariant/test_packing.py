"""batch.pack changes how much is computed, never what is learnt."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import mlxft
from mlxft.errors import ConfigError, ModelError
from mlxft.objectives import sft
from mlxft.runs import Run
from mlxft.trainer import report

Recipe = Callable[..., dict[str, Any]]


def train(settings: dict[str, Any], **options: Any) -> Run:
    return mlxft.train(settings, console=Console(file=io.StringIO(), width=1000), **options)


def events(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [e for e in found if e["event"] == kind]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("checkpoint", ["on", "off"])
def test_a_packed_run_learns_the_same(recipe: Recipe, tmp_path: Path, method: str, checkpoint: str) -> None:
    """With all rows in one step their order is no matter: loss and gradient are the same, step by step."""
    tune = {"method": "full"} if method == "full" else {"rank": 4}
    common = {
        "tune": tune,
        "memory.checkpoint": checkpoint,
        "data.valid": 0.2,
        "run.eval_every": 2,
        "optim.lr": 1e-3,
        "optim.eps": 1e-4,
        "batch.rows": 24,
    }
    runs = []
    for pack in (False, True):
        settings = recipe(30, **common, **{"batch.pack": pack, "run.name": f"pack-{pack}"})
        runs.append(train(settings).dir)
    plain, packed = (events(run) for run in runs)
    for one, other in zip(plain, packed, strict=True):
        for name in ("tokens", "trained_tokens"):
            assert one[name] == other[name]
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    assert packed[-1]["loss"] < packed[0]["loss"]
    evals = [[e["loss"] for e in events(run, "eval")] for run in runs]
    assert evals[1] == pytest.approx(evals[0], rel=1e-4)
    shares = [events(run, "start")[0]["data"]["padding share"] for run in runs]
    assert shares[1] < shares[0]


def test_resumed_amid_an_epoch(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe(60, **{"batch.pack": True, "batch.rows": None, "batch.tokens": 512, "run.steps": 12})
    whole = train(settings).dir
    assert len({e["tokens"] for e in events(whole)}) == 12
    real = report.EventFile.event

    def event(self: report.EventFile, e: dict[str, Any]) -> None:
        real(self, e)
        if e["event"] == "train" and e["step"] == 5 and self._path.name == "metrics.jsonl":
            signal.raise_signal(signal.SIGINT)

    other = {**settings, "run": {**settings["run"], "name": "b"}}
    with monkeypatch.context() as patch:
        patch.setattr(report.EventFile, "event", event)
        with pytest.raises(KeyboardInterrupt):
            train(other)
    # Resumed with nothing in the token cache.
    monkeypatch.setenv("MLXFT_CACHE", str(tmp_path / "another-cache"))
    resumed = train(other, resume=True).dir
    names = ("step", "loss", "grad_norm", "tokens", "trained_tokens")
    assert [[e[n] for n in names] for e in events(whole)] == [[e[n] for n in names] for e in events(resumed)]
    adapters = [(run / "adapter" / "adapters.safetensors").read_bytes() for run in (whole, resumed)]
    assert adapters[0] == adapters[1]


def test_an_architecture_that_can_not_is_refused_before_anything_is_written(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.models.cache import ArraysCache
    from mlx_lm.models.llama import Model

    monkeypatch.setattr(Model, "make_cache", lambda self: [ArraysCache(2) for _ in self.layers])
    with pytest.raises(ModelError, match=r"^batch\.pack: llama carries more than keys and values .*ArraysCache"):
        train(recipe(**{"batch.pack": True}))
    assert not (tmp_path / "runs").exists()


def test_an_objective_that_can_not_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one is that knows nothing of packing."""
    summary = sft.SFT.summary
    monkeypatch.setattr(sft.SFT, "summary", lambda self: replace(summary(self), packed=0))
    with pytest.raises(ConfigError, match=r"^batch\.pack: objective sft does not pack rows"):
        train(recipe(**{"batch.pack": True}))


def test_the_token_cache_changes_nothing(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First start, second start and one without the cache: the same run."""
    folder = tmp_path / "tokens"
    monkeypatch.setenv("MLXFT_CACHE", str(folder))
    losses = []
    for name, cache in (("a", False), ("b", True), ("c", True)):
        losses.append([e["loss"] for e in events(train(recipe(**{"data.cache": cache, "run.name": name})).dir)])
        assert folder.exists() == cache
    assert losses[0] == losses[1] == losses[2]
    assert len(list(folder.iterdir())) == 1
