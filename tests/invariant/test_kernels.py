"""What training compares is read by the same kernels: MLX takes other ones while a gradient is traced.

Here attention is made to differ by as much as it does in bfloat16 on a GPU, where a row's reading has a gradient and
where it has none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxft.model.cpu import as_trained
from mlxft.run import train

Recipe = Callable[..., dict[str, Any]]


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Attention as on a GPU. Returns, of each call, whether a gradient was traced."""
    monkeypatch.setenv("MLXFT_CPU", "off")
    depth, calls, attention = [0], list[bool](), mx.fast.scaled_dot_product_attention

    def inside(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    def fused(q: mx.array, k: mx.array, v: mx.array, **how: Any) -> mx.array:
        calls.append(depth[0] > 0)
        return attention(q if calls[-1] else 1.05 * q, k, v, **how)

    vjp, value_and_grad = mx.vjp, mx.value_and_grad
    monkeypatch.setattr(mx, "vjp", inside(vjp))
    monkeypatch.setattr(mx, "value_and_grad", lambda *args, **kwargs: inside(value_and_grad(*args, **kwargs)))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", fused)
    return calls


def test_a_reading_is_made_as_with_a_gradient(apart: list[bool]) -> None:
    x = mx.random.normal((1, 2, 3, 8))

    def read() -> mx.array:
        return mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0)

    as_trained(read)
    read()
    assert apart == [True, False]


@pytest.mark.parametrize("shared", [False, True], ids=["rows", "shared prompts"])
@pytest.mark.parametrize("loss", ["dpo", "kto", "ipo"])
def test_preference_training_begins_where_its_reference_is(
    loss: str, shared: bool, apart: list[bool], recipe: Recipe, tmp_path: Path
) -> None:
    """A new adapter changes nothing: every log-ratio is 0, in training and in validation."""
    rows = [{"prompt": f"{i} in " * (9 if shared else 1), "chosen": "and or a", "rejected": "is of"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    settings = recipe(
        **{
            "objective": "preference",
            "preference": {"loss": loss},
            "data": {"train": str(tmp_path / "pairs.jsonl"), "valid": 0.25, "format": "preference"},
            "run.steps": 1,
            "run.eval_at_start": True,
        }
    )
    run = train(settings)
    for kind in ("train", "eval"):
        first = run.metrics(kind)[0]
        assert first["kl"] == pytest.approx(0, abs=1e-6)
        if loss == "dpo":
            assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert any(apart)


@pytest.mark.parametrize(("objective", "own"), [("ppo", {"critic": "shared"}), ("ppo", {}), ("grpo", {"kl_coef": 0.1})])
def test_the_first_ratio_is_one(
    objective: str, own: dict[str, Any], apart: list[bool], recipe: Recipe, tmp_path: Path
) -> None:
    file, code = tmp_path / "prompts.jsonl", tmp_path / "r.py"
    file.write_text("".join(json.dumps({"prompt": "the " * (1 + i % 3) + "in"}) + "\n" for i in range(8)))
    code.write_text("def f(prompts, completions, rows):\n    return [c.count('a') for c in completions]\n")
    settings = recipe(
        **{
            "objective": objective,
            objective: own,
            "data": {"train": str(file), "format": "prompts"},
            "rollout": {"prompts": 4, "samples": 2, "max_tokens": 5},
            "rewards": {"function": f"{code}:f"},
            "run.steps": 1,
        }
    )
    (step,) = train(settings).metrics("train")
    assert (step["ratio_mean"], step["ratio_max"]) == (1.0, 1.0)
    assert step["kl"] == pytest.approx(0, abs=1e-6)
    assert any(apart)
    assert not all(apart), "sampling is as it was"
