"""The compiled step: the run that an eager one is, no more traces than are allowed, and the same bits when resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxft import build
from mlxft.build import load_base, make_objective
from mlxft.check import check_trains
from mlxft.config import load_config, parse_config
from mlxft.errors import ConfigError, ModelError
from mlxft.objectives.base import MicroBatch, Objective, Step, Terms, arrays_of
from mlxft.objectives.sft import SFTBatch, one_of_few
from mlxft.run import assemble, train
from mlxft.trainer import loop as module
from mlxft.trainer.loop import PLAIN_SCALES, TRACES, CompiledGradient, Gradients, Progress, gradient

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
    assert len(traced) == 1
    assert traced[0].traces
    one, other = map(weights, runs)
    began = weights(train(settings(**changes, **{"run.name": "one", "run.steps": 1})))
    for name, value in one.items():
        moved = float(mx.abs(value - began[name]).max())
        assert moved > 0
        assert float(mx.abs(value - other[name]).max()) <= 1e-2 * moved + 1e-6, name  # Adam divides what is near 0
    losses = [[e["loss"] for e in run.metrics("train")] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [load_config(run.dir / "config.yaml").run.compile for run in runs] == ["off", "on"]


def test_a_resumed_run_compiles_what_the_whole_one_does(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes that were seen before the interruption count after it: eager and compiled differ in the last bits."""
    asked: list[str] = []
    own = CompiledGradient.__call__
    monkeypatch.setattr(
        CompiledGradient, "__call__", lambda self, batch: asked.append(" ".join(batch.rows)) or own(self, batch)
    )
    changes = {"run.compile": "on", "batch": {"rows": 1}}
    whole = train(settings(**changes, **{"run.name": "whole", "run.steps": 18}))
    expected = list(asked)
    train(settings(**changes, **{"run.steps": 14}))
    asked.clear()
    resumed = train(settings(**changes, **{"run.steps": 18}), resume=True)
    assert 0 < len(asked) < len(expected)
    assert asked == expected[-len(asked) :]
    states = [
        json.loads((r.dir / "checkpoints/step-18/state.json").read_text("utf-8"))["progress"] for r in (whole, resumed)
    ]
    for name in ("shapes_seen", "shapes_compiled"):
        assert states[0][name] == states[1][name] != []
    one, other = weights(whole), weights(resumed)
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)


@dataclass(frozen=True)
class Numbers:
    x: mx.array


class Sums(Objective):
    """The loss is w times the sum of a micro-batch's numbers."""

    traceable = compiled = True

    def __init__(self) -> None:
        pass

    def steps(self, model: Any) -> Iterator[Step]:
        raise AssertionError

    def loss(self, model: Any, data: Numbers) -> Terms:
        return Terms({"w": (model.w * data.x).sum()}, {"sum": data.x.sum()})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Number(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = mx.array(2.0)


def batch_of(size: int) -> MicroBatch:
    return MicroBatch(Numbers(mx.arange(size).astype(mx.float32)), size, size)


@pytest.mark.parametrize(("sizes", "traces"), [(range(1, 41), TRACES), ((5, 6, 7), 3)])
def test_traces_are_bounded(sizes: Any, traces: int) -> None:
    """Forty shapes that come four times each, and three; and each gradient is that of its own batch and weights."""
    model, once, again = Number(), list[str](), list[str]()
    gradients = Gradients(model, Sums(), None, Progress(shapes_seen=once, shapes_compiled=again))
    assert gradients.compiled is not None
    for turn in range(4):
        for size in sizes:
            model.w = mx.array(float(size + turn))
            found, sums, grads = gradients(batch_of(size), {"w": size})
            total = size * (size - 1) / 2
            assert (grads["w"].item(), sums.metrics["sum"].item()) == (total, total)
            assert found.item() == sums.losses["w"].item() == (size + turn) * total
            assert model.w.item() == size + turn  # no tracer is left
        assert len(gradients.compiled.traces) == (0 if turn == 0 else traces)
    assert gradients.compiled.traces == again
    assert len(again) == traces
    assert len(once) == len(sizes) - traces


def test_shapes_that_never_come_again_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 3)
    once, again = list[str](), list[str]()
    gradients = Gradients(Number(), Sums(), None, Progress(shapes_seen=once, shapes_compiled=again))
    for size in (1, 2, 3, 4, 1, 4):
        gradients(batch_of(size), {"w": size})
    assert (len(once), len(again)) == (2, 1), "1 was forgotten when it came again, 4 was not"


def test_of_a_batch_that_trains_a_part_nothing_is_compiled() -> None:
    model = Number()
    gradients = Gradients(model, Sums(), None, Progress())
    for _ in range(3):
        gradients(replace(batch_of(3), trains=lambda name: True), {"w": 3})
    assert gradients.compiled is not None
    assert gradients.compiled.traces == []


def test_a_loss_that_reads_numbers_is_refused_and_leaves_no_tracer() -> None:
    class Reads(Sums):
        def loss(self, model: Any, data: Numbers) -> Terms:
            return super().loss(model, data) if model.w.item() > 0 else Terms({"w": model.w}, {})

    model = Number()
    with pytest.raises(ModelError, match=r"Number cannot be compiled, it reads numbers .* set it to off"):
        CompiledGradient(model, Reads())(batch_of(3))
    assert model.w.item() == 2.0


def test_frozen_weights_are_not_copied(settings: Make, make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """Beside what stood there a gradient of four tokens takes less than a tenth of them."""
    folder = make_model_dir(tmp_path / "wide", hidden_size=256, intermediate_size=1024, head_dim=64)
    changes = {"tune": {"rank": 1, "targets": ["q_proj"]}, "batch": {"rows": 1}, "run.compile": "on"}
    config = parse_config(settings(**changes, **{"model.path": str(folder)}))
    loaded = load_base(config)
    objective = make_objective(config, loaded.tokenizer)
    assemble(config, loaded, objective)
    loaded.model.train()
    numbers = mx.array([1, 2, 0, 3])
    places = {"positions": numbers, "labels": numbers, "weights": mx.ones(4), "lengths": mx.array([4])}
    batch = MicroBatch(SFTBatch(ids=numbers[None], **places), 4, 4)
    compiled = CompiledGradient(loaded.model, objective)
    mx.eval(arrays_of(batch.data), loaded.model.parameters())
    for _ in range(2):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(compiled(batch))
        taken = mx.get_peak_memory() - before
    assert taken < 0.1 * sum(v.nbytes for _, v in tree_flatten(loaded.model.parameters())), taken
    assert len(compiled.traces) == 1


def test_filled_up_batches_are_the_same_batches(settings: Make) -> None:
    config = parse_config(settings(**PACKED))
    loaded = load_base(config)
    objective = make_objective(config, loaded.tokenizer)
    assemble(config, loaded, objective)
    loaded.model.train()
    plain = objective.largest(loaded.model)[0]().micro_batches[0]
    objective.compiled = True
    filled = objective.largest(loaded.model)[0]().micro_batches[0]
    assert filled.data.labels.size == one_of_few(plain.trained_tokens) > plain.trained_tokens
    assert filled.trained_tokens == plain.trained_tokens
    one, other = (gradient(loaded.model, objective, batch, PLAIN_SCALES) for batch in (plain, filled))
    assert one[0].item() == pytest.approx(other[0].item(), rel=1e-5)
    assert all(mx.allclose(one[2][name], other[2][name], rtol=1e-4, atol=1e-6).item() for name in one[2])


def test_few_numbers_are_few_and_near() -> None:
    found = [one_of_few(n) for n in range(1, 5000)]
    assert all(n <= size < n * 17 / 16 for n, size in enumerate(found, 1))
    assert all(one_of_few(size) == size for size in found)
    assert len({size for size in found if 1024 < size <= 2048}) == 16
    assert one_of_few(0) == 0


@pytest.mark.parametrize(("compiled_s", "kept"), [(0.5, "on"), (0.99, "off")])
def test_on_a_gpu_the_measured_gradient_decides(
    compiled_s: float, kept: str, settings: Make, traced: list[CompiledGradient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is decided is written down, and holds for a resume, which does not measure."""
    asked: list[bool] = []

    def seconds(config: Any, model: Any, objective: Any, compiled: bool) -> float:
        asked.append(compiled)
        return compiled_s if compiled else 1.0

    monkeypatch.setattr(build, "backend", lambda: "cuda")
    monkeypatch.setattr(build, "gradient_seconds", seconds)
    changes = {"memory.measure": True, "batch": {"rows": 10}}
    run = train(settings(**changes, **{"run.steps": 2}))
    assert asked == [False, True]
    assert load_config(run.dir / "config.yaml").run.compile == kept
    made = len(traced)
    train(settings(**changes, **{"run.steps": 4}), resume=True)
    assert asked == [False, True]
    assert load_config(run.dir / "config.yaml").run.compile == kept
    assert len(traced) - made == (kept == "on")


def test_what_is_not_measured_is_not_compiled(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "gradient_seconds", lambda *args: 1 / 0)
    run = train(settings(**{"memory.measure": True, "run.steps": 1}))  # a CPU
    assert load_config(run.dir / "config.yaml").run.compile == "off"
    monkeypatch.setattr(build, "backend", lambda: "metal")
    run = train(settings(**{"run.steps": 1, "run.name": "b"}))
    assert load_config(run.dir / "config.yaml").run.compile == "off"


def test_a_compiled_step_that_does_not_fit_stays_eager(
    settings: Make, traced: list[CompiledGradient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "backend", lambda: "metal")
    monkeypatch.setattr(build, "measured_bytes", lambda c, m, objective, o: 1 << (62 if objective.compiled else 20))
    monkeypatch.setattr(build, "gradient_seconds", lambda *args: 1 / 0)
    run = train(settings(**{"memory.measure": True, "run.steps": 1}))
    assert load_config(run.dir / "config.yaml").run.compile == "off"
    assert not traced


def test_both_gradients_are_timed_and_leave_no_trace(settings: Make) -> None:
    config = parse_config(settings())
    loaded = load_base(config)
    objective = make_objective(config, loaded.tokenizer)
    assemble(config, loaded, objective)
    before, key = dict(tree_flatten(loaded.model.trainable_parameters())), mx.random.state[0].tolist()
    assert all(build.gradient_seconds(config, loaded.model, objective, on) > 0 for on in (False, True))
    after = dict(tree_flatten(loaded.model.trainable_parameters()))
    assert all(mx.array_equal(before[name], after[name]).item() for name in before)
    assert mx.random.state[0].tolist() == key


RULES = {"rewards": {"rules": [{"kind": "length", "max": 2}]}, "rollout": {"prompts": 2, "samples": 2, "max_tokens": 4}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"tune.dropout": 0.1}, "dropout draws new masks"),
    "router_aux": ({"tune.router_aux": 0.01}, "tune.router_aux reads more"),
    "neftune": ({"tune.neftune": 5.0}, "tune.neftune draws new noise"),
    "on-policy": ({"objective": "grpo", **RULES}, "the loss of objective grpo reads more"),
}


@pytest.mark.parametrize(("changes", "why"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_compiled_is_refused_and_left_eager(
    changes: dict[str, Any],
    why: str,
    recipe: Make,
    make_model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the in on"}\n{"prompt": "of"}\n', "utf-8")
    common: dict[str, Any] = {"model.path": str(make_model_dir(tmp_path / "moe", "qwen3_moe")), "run.steps": 1}
    if "objective" in changes:
        common |= {"data": {"train": str(tmp_path / "prompts.jsonl"), "format": "prompts"}, "batch": {}}
    settings = recipe(**common, **changes)
    asking = {**settings, "run": {**settings["run"], "compile": "on"}}
    with pytest.raises(ConfigError, match=rf"^run.compile: on: .*{why}"):
        train(asking)
    config = parse_config(asking)
    with pytest.raises(ConfigError, match=why):
        check_trains(config, make_objective(config, load_base(config).tokenizer))
    monkeypatch.setattr(build, "backend", lambda: "metal")
    monkeypatch.setattr(build, "gradient_seconds", lambda *args: 1 / 0)
    run = train(settings)
    assert load_config(run.dir / "config.yaml").run.compile == "off"
