"""Plans for a GPU made without one: kernels that MLX's exporter does not know have stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest
from architectures import build
from mlx.utils import tree_flatten

from mlxft.device import UNKNOWN, machine_bytes, planning_for, usable_bytes
from mlxft.errors import ModelError
from mlxft.model.cpu import quicker
from mlxft.model.fused import HEADS, fused_on
from mlxft.model.logits import Split, rows_nll
from mlxft.model.plan import Job, plan

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "qwen3_5", "gpt_oss")
WIDE = {"head_dim": 64, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}


@contextmanager
def opaque() -> Iterator[None]:
    """MLX as it is on a GPU: kernels whose gradient its exporter does not know, in the cases that have kernels."""
    attention, delta = mx.fast.scaled_dot_product_attention, mx.fast.gated_delta_update

    def sealed(function: Callable[..., Any], *arrays: mx.array) -> Any:
        kernel: Any = mx.custom_function(function)

        @kernel.vjp
        def back(primals: Any, cotangents: Any, outputs: Any) -> Any:
            return tuple(map(mx.zeros_like, primals))

        return kernel(*arrays)

    def fused(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, sinks: Any = None, **how: Any) -> mx.array:
        def call(*a: mx.array) -> mx.array:
            return attention(*a, mask=mask, sinks=sinks, **how)

        plain = sinks is None and not isinstance(mask, mx.array) and q.shape[-1] in HEADS
        return sealed(call, q, k, v) if plain else call(q, k, v)

    mx.fast.scaled_dot_product_attention = fused  # type: ignore[assignment]
    mx.fast.gated_delta_update = lambda *a: sealed(lambda *b: tuple(delta(*b)), *(x for x in a if x is not None))  # type: ignore[assignment]
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention, mx.fast.gated_delta_update = attention, delta


def model_of(name: str) -> Any:
    model = build(name, **WIDE)
    model.train()
    return model


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_gpu_is_planned_where_its_kernels_can_not_be_exported(name: str, checkpoint: bool) -> None:
    job = Job(model_of(name), 0)
    own = plan(job, 4, 128, checkpoint)
    with opaque(), planning_for("metal"):
        found = plan(job, 4, 128, checkpoint)
    assert (found.weights, found.gradients) == (own.weights, own.gradients)
    assert 0.4 * own.activations < found.activations <= 1.1 * own.activations


def test_without_stand_ins_it_could_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFT_CPU", "off")
    with opaque(), pytest.raises(ModelError, match="memory can not be predicted"):
        plan(Job(model_of("llama"), 0), 2, 16, False)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_what_a_stand_in_holds_is_what_is_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in which the stand-ins are computed takes what the plan says, to a tenth."""
    monkeypatch.setenv("MLXFT_CPU", "off")
    model = model_of(name)
    mx.eval(model.parameters())
    ids = mx.zeros((4, 128), dtype=mx.int32)
    mx.eval(ids)
    split, places, weights = Split(model), mx.arange(ids.size), mx.ones(ids.size)

    def loss(parameters: Any) -> mx.array:
        model.update(parameters)
        return rows_nll(split, ids, places, mx.zeros_like(places), weights, grad=True)

    with planning_for("metal"):
        found = plan(Job(model, 0), 4, 128, False)
    before = mx.get_active_memory()
    limit = mx.set_memory_limit(before)  # MLX works ahead of itself as long as there is room
    mx.reset_peak_memory()
    try:
        with quicker(model), fused_on("metal"):
            value, slopes = mx.value_and_grad(loss)(model.trainable_parameters())
            mx.eval(value, slopes)
    finally:
        mx.set_memory_limit(limit)
    taken = mx.get_peak_memory() - before
    planned = found.activations + found.logits + found.gradients
    assert sum(v.nbytes for _, v in tree_flatten(slopes)) == found.gradients
    assert planned == pytest.approx(taken, rel=0.1)


def test_scores_are_not_kept_where_attention_is_fused() -> None:
    """Twice the tokens take twice the memory, not four times; with an array mask, as packed rows have, they do."""
    model = model_of("llama")
    with planning_for("metal"):
        one, two = (plan(Job(model, 0), 1, n, False).activations for n in (1024, 2048))
    assert two == pytest.approx(2 * one, rel=0.1)


def test_cuda_fuses_multiples_of_128_tokens() -> None:
    model = model_of("llama")
    with planning_for("cuda"):
        even, odd = (plan(Job(model, 0), 1, n, False).activations for n in (1024, 1023))
    assert odd > 1.5 * even


def test_another_machines_memory_is_not_known() -> None:
    assert machine_bytes() < UNKNOWN
    with planning_for("metal"):
        assert machine_bytes() == usable_bytes() == UNKNOWN
        assert usable_bytes(16.0) == 16 * 10**9
