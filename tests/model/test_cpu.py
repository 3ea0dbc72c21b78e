"""What stands in for MLX's own attention and SwiGLU on the CPU gives their numbers, and gradients."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import build
from mlx.utils import tree_flatten
from mlx_lm.models.activations import swiglu as plain_swiglu
from mlx_lm.models.base import scaled_dot_product_attention as plain_attention

from mlxft.device import planning_for
from mlxft.model import cpu
from mlxft.model.adapters import LoRASpec, attach, select_targets
from mlxft.model.load import load


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """Where there is a GPU, it is the default device, and these functions leave it alone."""
    with mx.stream(mx.cpu):
        yield


SHAPES = [(2, 4, 2, 150, 16), (1, 3, 3, 64, 8), (3, 6, 1, 65, 8), (1, 2, 1, 2, 8)]


def arrays(shape: tuple[int, ...]) -> list[mx.array]:
    b, heads, groups, length, width = shape
    mx.random.seed(length)
    sizes = [(b, heads, length, width), (b, groups, length, width), (b, groups, length, width + 4)]
    return [mx.random.normal(size) for size in sizes]  # larger ones blow rounding of the scores up, by the exponential


def with_gradients(function: Callable[..., mx.array], inputs: list[mx.array]) -> list[np.ndarray[Any, Any]]:
    weights = mx.random.normal(function(*inputs).shape, key=mx.random.key(5))
    value = function(*inputs)
    _, slopes = mx.value_and_grad(lambda *x: (function(*x) * weights).sum(), argnums=list(range(len(inputs))))(*inputs)
    return [np.array(x) for x in (value, *slopes)]


def masks(shape: tuple[int, ...]) -> dict[str, Any]:
    b, _, _, length, _ = shape
    own = mx.eye(length).astype(mx.bool_)  # a query that sees nothing is undefined
    plane = (mx.random.uniform(shape=(length, length), key=mx.random.key(1)) > 0.5) | own
    return {"causal": "causal", "none": None, "plane": plane, "rows": mx.broadcast_to(plane, (b, 1, length, length))}


@pytest.mark.parametrize("kind", ["causal", "none", "plane", "rows"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape: tuple[int, ...], kind: str) -> None:
    mask = masks(shape)[kind]
    if not cpu._covered(mask, shape[3], shape[3]):
        raise AssertionError("what is to be tested goes to MLX's own")
    found = with_gradients(lambda *x: cpu.attention(*x, None, 0.3, mask), arrays(shape))
    wanted = with_gradients(lambda *x: plain_attention(*x, None, 0.3, mask), arrays(shape))
    for ours, theirs in zip(found, wanted):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=3e-5)


def test_attention_passes_on_what_it_does_not_cover() -> None:
    q, k, v = arrays((1, 2, 1, 5, 8))
    calls = [
        ((q[:, :, :1], k, v), None, {}),  # one new token
        ((q[:, :, 2:], k, v), "causal", {}),  # a prompt continued
        ((q, k, v), mx.zeros((5, 5)), {}),  # an additive mask
        ((q, k, v), "causal", {"sinks": mx.zeros((2,))}),
        ((q.astype(mx.bfloat16), k.astype(mx.bfloat16), v.astype(mx.bfloat16)), "causal", {}),
    ]
    for inputs, mask, more in calls:
        ours = cpu.attention(*inputs, None, 0.3, mask, **more)
        theirs = plain_attention(*inputs, None, 0.3, mask, **more)
        assert ours.dtype == theirs.dtype
        assert mx.array_equal(ours, theirs)


def test_a_query_that_sees_nothing_is_no_nan() -> None:
    q, k, v = arrays((1, 2, 1, 5, 8))
    mask = mx.tril(mx.ones((5, 5))).astype(mx.bool_) & (mx.arange(5) > 0)[:, None]
    for array in with_gradients(lambda *x: cpu.attention(*x, None, 0.3, mask), [q, k, v]):
        assert np.isfinite(array).all()


def test_swiglu() -> None:
    mx.random.seed(0)
    gate = mx.concatenate([3 * mx.random.normal((200,)), mx.array([-1e4, -100.0, -88.0, 0.0, 88.0, 1e4])])
    x = mx.random.normal(gate.shape)
    for ours, theirs in zip(with_gradients(cpu.swiglu, [gate, x]), with_gradients(plain_swiglu, [gate, x])):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)
    assert cpu.swiglu(gate.astype(mx.bfloat16), x.astype(mx.bfloat16)).dtype == mx.bfloat16


def test_exponentials() -> None:
    x = np.linspace(-80, 80, 1001, dtype=np.float32)
    np.testing.assert_allclose(np.array(cpu.exp(mx.array(x))), np.exp(x.astype(np.float64)), rtol=1e-5)
    rows = mx.array(np.stack([x, x + 500, np.full_like(x, -mx.inf)]))
    rows[2, 7] = 3.0
    np.testing.assert_allclose(np.array(cpu.logsumexp(rows)), np.array(mx.logsumexp(rows, axis=-1)), rtol=1e-6)
    slope = mx.grad(lambda r: cpu.logsumexp(r).sum())(rows[:2])
    np.testing.assert_allclose(np.array(slope), np.array(mx.softmax(rows[:2], axis=-1)), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("device", ["cpu", "cpu off", "metal"])
def test_cross_entropy_of_each_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient; in bfloat16 a CPU sums in float32, and a GPU's kernel is given what there is."""
    given: list[mx.Dtype] = []
    kernel = mx.fast.cross_entropy
    monkeypatch.setattr(mx.fast, "cross_entropy", lambda x, y: given.append(x.dtype) or kernel(x, y))
    monkeypatch.setenv("MLXFT_CPU", "off" if device == "cpu off" else "on")
    logits, labels = mx.random.normal((5, 300)) * 4, mx.array([0, 299, 7, 7, 31])
    weights = mx.arange(1.0, 6.0)

    def plain(x: mx.array) -> mx.array:
        return (-nn.log_softmax(x)[mx.arange(5), labels] * weights).sum()

    def ours(x: mx.array) -> mx.array:
        return (cpu.cross_entropy(x, labels) * weights).sum()

    with planning_for("metal" if device == "metal" else "cpu"):
        for one, other in zip(mx.value_and_grad(ours)(logits), mx.value_and_grad(plain)(logits)):
            np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-5, atol=1e-5)
        half = cpu.cross_entropy(logits.astype(mx.bfloat16), labels)
    assert given == {"cpu": [], "cpu off": 2 * [mx.float32], "metal": [mx.float32, mx.bfloat16]}[device]
    assert half.dtype == mx.float32


def test_only_inside_the_block_and_only_where_the_model_looks(tiny_model_dir: Any) -> None:
    """The whole model gives the same logits by either; afterwards everything is as it was, an error notwithstanding."""
    model = load(str(tiny_model_dir)).model
    module = importlib.import_module(type(model).__module__)
    other = importlib.import_module("mlx_lm.models.qwen3" if "qwen3" not in module.__name__ else "mlx_lm.models.llama")
    before = (module.swiglu, module.scaled_dot_product_attention)
    assert before == (plain_swiglu, plain_attention)
    ids = mx.arange(40).reshape(2, 20) % 7
    plain = model(ids)

    def fails_amid() -> None:
        with cpu.quicker(model):
            assert (module.swiglu, module.scaled_dot_product_attention) == (cpu.swiglu, cpu.attention)
            assert other.swiglu is plain_swiglu
            raise RuntimeError("amid")

    with pytest.raises(RuntimeError, match="amid"):
        fails_amid()
    assert (module.swiglu, module.scaled_dot_product_attention) == before
    with cpu.quicker(model):
        with cpu.quicker(model):  # nested: the outer one's are left alone
            quick = model(ids)
        assert module.swiglu is cpu.swiglu
    assert (module.swiglu, module.scaled_dot_product_attention) == before
    assert not mx.array_equal(plain, quick)
    np.testing.assert_allclose(np.array(plain), np.array(quick), atol=1e-5)


def test_what_is_chosen_is_a_constant_of_the_gradient() -> None:
    """deepseek_v41 of mlx-lm 0.32.2 asks for the gradient of the numbers of experts."""
    model = build("deepseek_v41")
    ids, module = mx.array([[3, 40, 12, 5, 21, 9]]), importlib.import_module("mlx_lm.models.deepseek_v41")
    attach(model, LoRASpec(tuple(select_targets(model, "all-linear", "all")), 2, 2.0))

    def loss(params: Any) -> mx.array:
        model.update(params)
        return model(ids).sum()

    params = model.trainable_parameters()
    with pytest.raises(ValueError, match="VJP with respect to indices"):
        mx.grad(loss)(params)
    with cpu.quicker(model):
        slopes = dict(tree_flatten(mx.grad(loss)(params)))
    assert module.mx is mx
    # LoRA's A has none at first, and what chooses has none at all.
    assert all(mx.abs(v).max().item() > 0 for n, v in slopes.items() if n.endswith("lora_b") and "indexer" not in n)
