"""How often a step waits for the device: once, for the step before. A GPU that is waited for has nothing to do next."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxft.model.logits import ahead
from mlxft.run import train
from mlxft.trainer.optim import Optimizer

Recipe = Callable[..., dict[str, Any]]
# What returns only when an array is computed. `mx.async_eval` does not, and a function of arrays is lazy.
READS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "__complex__", "__array__", "__dlpack__")
READS += ("__repr__", "__format__")
WORDS = ["the", "in", "on", "and", "or", "a", "is", "of", "to", "at"]


class Waits:
    """Counts the waits for the device from when it is made, and how many there were at each update."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.steps: list[int] = []  # waits before each update
        self.rollouts: set[int] = set()  # numbers of the steps, from 0, that began with sampling
        for name in ("eval", "synchronize", "save_safetensors"):
            patch.setattr(mx, name, self._counted(getattr(mx, name), f"mx.{name}"))
        for name in READS:
            patch.setattr(mx.array, name, self._counted(getattr(mx.array, name), f"array.{name}"))
        # numpy reads by the buffer protocol, which no method stands for in this Python.
        for name in ("array", "asarray", "ascontiguousarray", "concatenate", "stack"):
            patch.setattr(np, name, self._counted(getattr(np, name), f"np.{name}", _has_array))
        real = Optimizer.step

        def step(optimizer: Optimizer, *args: Any) -> Any:
            self.steps.append(len(self.seen))
            return real(optimizer, *args)

        patch.setattr(Optimizer, "step", step)

    def _counted(
        self, real: Callable[..., Any], name: str, waits: Callable[[Any], bool] = lambda first: True
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if waits(args[:1]):
                self.seen.append(name)
            return real(*args, **kwargs)

        return call

    def event(self, event: dict[str, Any]) -> None:
        if event["event"] == "rollout":
            self.rollouts.add(event["step"] - 1)

    def close(self) -> None:
        pass

    def between(self) -> list[list[str]]:
        """Of each step from the third on that began without sampling: what it waited for since the update before."""
        return [
            self.seen[self.steps[i - 1] : self.steps[i]] for i in range(2, len(self.steps)) if i not in self.rollouts
        ]


def _has_array(value: Any) -> bool:
    return isinstance(value, mx.array) or (isinstance(value, (list, tuple)) and any(map(_has_array, value)))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    return Waits(monkeypatch)


def test_each_kind_of_wait_is_seen(waits: Waits) -> None:
    x = mx.array([1.0, 2.0])
    mx.eval(x)
    mx.synchronize()
    ways: list[Callable[[], object]] = [
        x[0].item,
        x.tolist,
        lambda: float(x[0]),
        lambda: int(x[0]),
        lambda: bool(x[0]),
        lambda: 1 if x[0] > 0 else 2,
        lambda: max(0.0, x[0]),
        lambda: range(mx.array(3)),  # type: ignore[call-overload]
        lambda: np.array(x),
        lambda: np.asarray(x),
        lambda: np.concatenate([x, x]),  # type: ignore[list-item]
        lambda: np.from_dlpack(x),
        lambda: f"{x[0]:.2f} {x}",
    ]
    for way in ways:
        before = len(waits.seen)
        way()
        assert len(waits.seen) > before
    before = len(waits.seen)
    mx.async_eval(mx.maximum(x.sum() / 2, 0.0))
    np.array([1.0])
    assert len(waits.seen) == before


def test_scoring_asks_for_the_next_batch_before_it_waits_for_one() -> None:
    done: list[str] = []

    def read(x: int) -> mx.array:
        done.append(f"ask {x}")
        return mx.array(x) + 1

    for key, value in ahead(((str(x), x) for x in range(3)), read):
        done.append(f"got {key}: {value.item()}")
    assert done == ["ask 0", "ask 1", "got 0: 1", "ask 2", "got 1: 2", "got 2: 3"]


def pairs(path: Path, count: int) -> str:
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            good, bad = (" ".join(rng.choices(WORDS, k=rng.randint(2, 6))) for _ in range(2))
            file.write(json.dumps({"prompt": f"{i} in", "chosen": good, "rejected": f"{bad} z"}) + "\n")
    return str(path)


# What is measured before the first step is not a step's: it updates, too.
STEPS = {"run.steps": 6, "run.report_every": 100, "memory.measure": False}
OFF_POLICY: list[dict[str, Any]] = [
    {},
    {"tune.method": "full", "tune.rank": None, "memory.checkpoint": True},
    {"batch.pack": True, "batch.rows": None, "batch.tokens": 64, "run.steps": 4},
    {"run.compile": "on", "batch.pack": True, "batch.rows": None, "batch.tokens": 64, "run.steps": 7},
    *({"objective": "preference", "preference": {"loss": loss}} for loss in ("dpo", "kto", "simpo")),
    {"objective": "preference", "preference": {"loss": "dpo", "precompute": True}},
    {"objective": "reward"},
]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("changes", OFF_POLICY, ids=lambda c: json.dumps(c)[:60])
def test_a_step_waits_once(
    recipe: Recipe, waits: Waits, tmp_path: Path, changes: dict[str, Any], accumulate: int
) -> None:
    """For the step before, so that the queue is short; not for its reference's numbers, nor for KTO's point."""
    rows = 2 * 2 * 8 * accumulate
    if "objective" in changes:
        changes = {"data.train": pairs(tmp_path / "pairs.jsonl", rows), "data.format": "preference", **changes}
    train(recipe(rows, **{"batch.accumulate": accumulate, **STEPS, **changes}), sinks=[waits])
    assert waits.between() == [["mx.eval"]] * (len(waits.steps) - 2)
    assert len(waits.steps) > 3


@pytest.mark.parametrize(
    ("objective", "own"),
    [
        ("ppo", {}),
        ("ppo", {"critic": "shared"}),
        ("grpo", {}),
        ("grpo", {"kl_in": "advantages"}),
        ("grpo", {"kl_estimator": "exact"}),
        ("online_dpo", {}),
        ("rloo", {}),
        ("reinforce", {"baseline": "average"}),
    ],
)
def test_a_step_on_policy_waits_once_beside_sampling(
    recipe: Recipe, waits: Waits, tmp_path: Path, objective: str, own: dict[str, Any]
) -> None:
    """Two rollouts, of four steps each and of two micro-batches a step."""
    file, code = tmp_path / "prompts.jsonl", tmp_path / "r.py"
    file.write_text("".join(json.dumps({"prompt": "the " * (1 + i % 3) + "in"}) + "\n" for i in range(16)))
    code.write_text("def f(prompts, completions, rows):\n    return [c.count('a') for c in completions]\n")
    settings = recipe(
        **{
            "objective": objective,
            objective: {"epochs": 2, "minibatches": 2, **own},
            "data": {"train": str(file), "format": "prompts", "max_length": 60},
            "rollout": {"prompts": 4, "samples": 2, "max_tokens": 5},
            "rewards": {"function": f"{code}:f"},
            **STEPS,
            "run.steps": 8,
        }
    )
    train(settings, sinks=[waits])
    assert waits.rollouts == {0, 4}
    # After sampling the device has nothing else to do: the step there has none before it to wait for.
    assert waits.between() == [["mx.eval"], ["mx.eval"], [], ["mx.eval"], ["mx.eval"]]
