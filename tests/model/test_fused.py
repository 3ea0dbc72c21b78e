"""Plans for a GPU made without one: kernels that MLX's exporter does not know have stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest
from architectures import build

from mlxft.device import UNKNOWN, Backend, machine_bytes, planning_for, usable_bytes
from mlxft.errors import ModelError
from mlxft.model import memory
from mlxft.model.adapters import LoRASpec, attach, select_targets
from mlxft.model.cpu import quicker
from mlxft.model.layers import checkpoint_layers
from mlxft.model.logits import Split, rows_nll
from mlxft.model.memory import HEADS, Job, plain_attention, plan

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


@pytest.mark.parametrize(("own", "kind"), [("metal", "cuda"), ("metal", "cpu"), ("cuda", "cpu"), ("cuda", "metal")])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_gpu_plans_for_another_machine_as_any_machine_does(
    name: str, own: Backend, kind: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the other has no kernel (CUDA for 100 tokens, a CPU in bfloat16), this one's must not be in the graph."""
    monkeypatch.setenv("MLXFT_CPU", "off")  # the loss, too, is then a kernel's on this machine
    model = model_of(name)
    model.set_dtype(mx.bfloat16)
    with planning_for(kind):
        here = plan(Job(model, 0), 2, 100, False)
    monkeypatch.setattr(memory, "backend", lambda: own)
    with opaque(), planning_for(kind):
        assert plan(Job(model, 0), 2, 100, False) == here


MASKS: dict[str, Any] = {
    "none": None,
    "causal": "causal",
    "bool": mx.arange(5)[:, None] + 2 >= mx.arange(7),
    "bool of rows": (mx.arange(70).reshape(2, 1, 5, 7) % 3) != 1,
    "bool of heads": (mx.arange(280).reshape(2, 4, 5, 7) % 3) != 1,
    "added": mx.sin(mx.arange(70)).reshape(2, 1, 5, 7),
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_in_operations_is_mlxs_own(mask: str, sinks: bool, heads: int, dtype: mx.Dtype) -> None:
    """Value and gradients, where mx.fast is operations too."""
    key = mx.random.key(0)
    shapes = [(2, 4, 5, 8), (2, heads, 7, 8), (2, heads, 7, 6), (4,)][: 4 if sinks else 3]
    given = [mx.random.normal(s, key=k).astype(dtype) for s, k in zip(shapes, mx.random.split(key, 4))]
    hiding = MASKS[mask].astype(dtype) if mask == "added" else MASKS[mask]

    def read(attention: Callable[..., mx.array]) -> list[mx.array]:
        def values(q: mx.array, k: mx.array, v: mx.array, s: mx.array | None = None) -> list[mx.array]:
            return [attention(q, k, v, scale=0.3, mask=hiding, sinks=s)]

        cotangent = mx.cos(mx.arange(2 * 4 * 5 * 6)).reshape(2, 4, 5, 6).astype(dtype)
        (out,), slopes = mx.vjp(values, given, [cotangent])
        return [out, *slopes]

    with mx.stream(mx.cpu):
        for ours, theirs in zip(read(plain_attention), read(mx.fast.scaled_dot_product_attention), strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            assert mx.allclose(ours, theirs, rtol=1e-5, atol=1e-6 if dtype == mx.float32 else 2e-2)


def test_without_stand_ins_it_could_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFT_CPU", "off")
    with opaque(), pytest.raises(ModelError, match="memory cannot be predicted"):
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
    limit = mx.set_memory_limit(before)  # MLX works ahead of itself as long as there is room, and always by a little:
    taken = []  # the least of several is nearest to what must be
    try:
        with quicker(model):
            for _ in range(4):
                mx.reset_peak_memory()
                mx.eval(mx.value_and_grad(loss)(model.trainable_parameters()))
                taken.append(mx.get_peak_memory() - before)
    finally:
        mx.set_memory_limit(limit)
        checkpoint_layers(model, False)
    return min(taken)


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
        scores = 2 * 2 * 2 * 512 * 512 * 4  # of layers, heads and rows, in float32
        assert packed.activations - plain.activations > 0.9 * scores


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
