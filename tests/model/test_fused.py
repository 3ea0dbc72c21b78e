"""Plans for a GPU made without one: kernels that MLX's exporter does not know have stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest
from architectures import build

from mlxft.device import UNKNOWN, machine_bytes, planning_for, usable_bytes
from mlxft.errors import ModelError
from mlxft.model.adapters import LoRASpec, attach, select_targets
from mlxft.model.cpu import quicker
from mlxft.model.fused import HEADS
from mlxft.model.logits import Split, rows_nll
from mlxft.model.memory import checkpoint_layers
from mlxft.model.plan import Job, plan

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "qwen3_5", "gpt_oss")
WIDE = {"head_dim": 64, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}


def by_blocks(
    attention: Callable[..., mx.array], how: dict[str, Any]
) -> tuple[Callable[..., mx.array], Callable[..., tuple[mx.array, ...]]]:
    """Attention and its gradient, of 16 queries at a time: as a kernel does, it never holds the scores of all."""

    def rows(q: mx.array, k: mx.array, v: mx.array, start: int) -> mx.array:
        end = k.shape[2] if how.get("mask") is None else start + q.shape[2]
        return attention(q, k[:, :, :end], v[:, :, :end], **how)

    def forward(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        outs: list[mx.array] = []
        for start in range(0, q.shape[2], 16):
            part = mx.depends([q[:, :, start : start + 16]], outs[-1:])[0] if outs else q[:, :, :16]
            outs.append(rows(part, k, v, start))
        return mx.concatenate(outs, axis=2)

    def back(primals: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
        q, k, v = primals
        slopes: list[mx.array] = []
        sums = [mx.zeros_like(k), mx.zeros_like(v)]
        for start in range(0, q.shape[2], 16):
            part, c = (x[:, :, start : start + 16] for x in (q, cotangent))
            if slopes:
                (part,) = mx.depends([part], [slopes[-1], *sums])
            _, (slope, *more) = mx.vjp(lambda *a, s=start: [rows(*a, s)], [part, k, v], [c])
            slopes.append(slope)
            sums = [a + b for a, b in zip(sums, more)]
        return (mx.concatenate(slopes, axis=2), *sums)

    return forward, back


@contextmanager
def opaque() -> Iterator[None]:
    """MLX as it is on a GPU: kernels whose gradient its exporter does not know, in the cases that have kernels."""
    attention, delta = mx.fast.scaled_dot_product_attention, mx.fast.gated_delta_update
    entropy = mx.fast.cross_entropy

    def sealed(function: Callable[..., Any], *arrays: mx.array, back: Callable[..., Any] | None = None) -> Any:
        kernel: Any = mx.custom_function(function)

        @kernel.vjp
        def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
            if back is not None:
                return back(primals, cotangents, outputs)
            return tuple(map(mx.zeros_like, primals))

        return kernel(*arrays)

    def slopes(primals: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
        logits, labels = primals
        kept = output[:, None] + mx.take_along_axis(logits, labels[:, None], axis=-1)  # the kernel's log of the sum
        grad = mx.exp(logits - kept) * cotangent[:, None]
        return grad, mx.zeros_like(labels)

    def fused(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, sinks: Any = None, **how: Any) -> mx.array:
        how |= {"mask": mask, "sinks": sinks}
        if sinks is not None or isinstance(mask, mx.array) or q.shape[-1] not in HEADS:
            return attention(q, k, v, **how)
        forward, back = by_blocks(attention, how)
        return sealed(forward, q, k, v, back=back)

    mx.fast.scaled_dot_product_attention = fused  # type: ignore[assignment]
    mx.fast.gated_delta_update = lambda *a: sealed(lambda *b: tuple(delta(*b)), *(x for x in a if x is not None))  # type: ignore[assignment]
    mx.fast.cross_entropy = lambda *a: sealed(entropy, *a, back=slopes)  # type: ignore[assignment]
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention, mx.fast.gated_delta_update = attention, delta
        mx.fast.cross_entropy = entropy


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


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_with_kernels_takes_what_is_planned(name: str, checkpoint: bool) -> None:
    """To a tenth, with LoRA on every layer: the step measured with kernels that compute and hold what a GPU's would."""
    model = model_of(name)
    model.freeze()
    attach(model, LoRASpec(tuple(select_targets(model, "all-linear", "all", False)), 4, 2.0, 0.0, False))
    ids = mx.zeros((4, 256), dtype=mx.int32)
    mx.eval(model.parameters(), ids)
    with opaque(), planning_for("metal"):
        found = plan(Job(model, 0), 4, 256, checkpoint)
        taken = measured(model, ids, checkpoint)
    assert found.activations + found.logits + found.gradients == pytest.approx(taken, rel=0.1)


def measured(model: Any, ids: mx.array, checkpoint: bool, segments: mx.array | None = None) -> int:
    """Bytes that a gradient of all its tokens takes beside the weights, without working ahead."""
    split, places, weights = Split(model), mx.arange(ids.size), mx.ones(ids.size)
    if segments is not None:
        assert split.packing

    def loss(parameters: Any) -> mx.array:
        model.update(parameters)
        return rows_nll(split, ids, places, mx.zeros_like(places), weights, grad=True, segments=segments)

    checkpoint_layers(model, checkpoint)
    mx.eval(places, weights)
    before = mx.get_active_memory()
    limit = mx.set_memory_limit(before)  # MLX works ahead of itself as long as there is room
    mx.reset_peak_memory()
    try:
        with quicker(model):
            mx.eval(mx.value_and_grad(loss)(model.trainable_parameters()))
    finally:
        mx.set_memory_limit(limit)
        checkpoint_layers(model, False)
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("device", ["cpu", "metal"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_packed_rows_are_planned_with_their_mask(name: str, device: Any) -> None:
    """No kernel is fused for it: on a GPU it costs the scores that attention without it does not keep."""
    model = model_of(name)
    model.freeze()
    attach(model, LoRASpec(tuple(select_targets(model, "all-linear", "all", False)), 4, 2.0, 0.0, False))
    ids = mx.zeros((2, 512), dtype=mx.int32)
    segments = mx.broadcast_to(mx.repeat(mx.arange(1, 5), 128), ids.shape) + 0
    mx.eval(model.parameters(), ids, segments)
    with opaque(), planning_for(device):
        plain, packed = (plan(Job(model, 0, packed=p), 2, 512, False) for p in (False, True))
        taken = measured(model, ids, False, segments)
    assert packed.activations + packed.logits + packed.gradients == pytest.approx(taken, rel=0.15)
    assert packed.activations > 1.03 * plain.activations
    if (name, device) == ("llama", "metal"):
        assert packed.activations - plain.activations > 2 * 2 * 2 * 512 * 512 * 4  # layers, heads, rows of float32


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
