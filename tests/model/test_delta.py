"""The gated delta rule by chunks against mlx-lm's loop over tokens: values, gradients, and what a step is made of."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import SIZES, scatter
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import gated_delta as loop
from mlx_lm.models import qwen3_5

from mlxft.model import cpu
from mlxft.model.cpu import gated_delta, gated_delta_update, quicker
from mlxft.model.memory import trace

TODAY = 139_635  # operations of the loop, forward and backward, of the model below


def draw(
    b: int, t: int, heads: tuple[int, int], widths: tuple[int, int], channels: bool, alike: bool
) -> list[mx.array]:
    """q, k, v, a, b, A_log, dt_bias and a state, as a layer gives them."""
    mx.random.seed(0)
    (few, many), (dk, dv) = heads, widths
    k = mx.random.normal((b, t, few, dk))
    if alike:  # the same token again and again
        k = k[:, :1] + 1e-2 * k
    q, k = loop.normalize_qk(mx.random.normal((b, t, few, dk)), k, inv_scale=dk**-0.5, eps=1e-6)
    gate = (dk,) if channels else ()
    return [
        *(q, k, mx.random.normal((b, t, many, dv)), 3 * mx.random.normal((b, t, many, *gate))),
        *(mx.random.normal((b, t, many)), mx.random.normal((many, *([1] if channels else [])))),
        *(mx.random.normal((many, *gate)), mx.random.normal((b, many, dv, dk))),
    ]


@pytest.mark.parametrize("how", [{}, {"allow_neg_eigval": True}, {"lower_bound": -5.0}], ids=str)
@pytest.mark.parametrize(
    ("length", "heads", "widths", "channels", "alike"),
    [
        (200, (2, 4), (16, 24), False, False),
        (64, (1, 3), (16, 16), False, True),
        (256, (2, 2), (32, 32), False, True),
        (7, (2, 2), (16, 16), False, False),
        (50, (2, 2), (16, 24), True, False),
        (40, (1, 2), (16, 16), True, True),
    ],
)
def test_chunks_are_the_loop(
    length: int, heads: tuple[int, int], widths: tuple[int, int], channels: bool, alike: bool, how: dict[str, Any]
) -> None:
    """To 1e-5 of the largest number: value, state, and the gradient in all that a layer gives."""
    arrays = draw(2, length, heads, widths, channels, alike)
    weights = mx.random.normal((2, length, heads[1], widths[1]))
    found = []
    for update in (loop.gated_delta_update, gated_delta_update):

        def scalar(*a: mx.array, update: Any = update) -> Any:
            y, state = update(*a, **how)
            return (y * weights).sum() + state.square().sum(), y, state

        found.append(mx.value_and_grad(scalar, argnums=tuple(range(8)))(*arrays))
    (_, y, state), slopes = found[0]
    (_, other_y, other_state), other_slopes = found[1]
    for one, other in [(y, other_y), (state, other_state), *zip(slopes, other_slopes)]:
        assert mx.abs(one - other).max() <= 1e-5 * mx.abs(one).max()


def test_tokens_that_are_not_there_change_nothing() -> None:
    q, k, v, *_ = draw(2, 90, (2, 2), (16, 16), False, False)
    g, beta = mx.random.uniform(0.5, 1, (2, 90, 2)), mx.random.uniform(0, 1, (2, 90, 2))
    there = mx.arange(90)[None] < mx.array([[50], [90]])
    y, state = gated_delta(q, k, v, g, beta, mask=there)
    short, end = gated_delta(*(x[:1, :50] for x in (q, k, v, g, beta)))
    assert mx.allclose(y[:1, :50], short, atol=1e-6)
    assert mx.allclose(state[:1], end, atol=1e-6)
    expected, its = loop.gated_delta_ops(q, k, v, g, beta, None, there)
    assert mx.allclose(y[1:], expected[1:], atol=1e-5)
    assert mx.allclose(state, its, atol=1e-5)


def test_a_sequence_in_two_parts_is_the_whole() -> None:
    """The state goes on; float16 and bfloat16 come back as they are, sums are in float32."""
    arrays = [x.astype(mx.bfloat16) for x in draw(1, 100, (2, 4), (16, 16), False, False)[:7]]
    whole, end = gated_delta_update(*arrays)
    first, between = gated_delta_update(*(x[:, :33] for x in arrays[:5]), *arrays[5:])
    second, last = gated_delta_update(*(x[:, 33:] for x in arrays[:5]), *arrays[5:], between)
    assert (whole.dtype, end.dtype) == (mx.bfloat16, mx.float32)
    assert mx.allclose(mx.concatenate([first, second], axis=1), whole, atol=1e-2)
    assert mx.allclose(last, end, atol=1e-4)


def test_metals_kernel_takes_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 wide with the heads of Qwen 3.5; elsewhere, and with a mask, chunks: what is not fused there is the loop."""
    asked: list[tuple[int, ...]] = []
    fused = mx.fast.gated_delta_update

    def watched(q: mx.array, *args: Any) -> Any:
        asked.append(q.shape)
        return fused(q, *args)

    monkeypatch.setattr(mx.fast, "gated_delta_update", watched)
    monkeypatch.setattr(cpu, "planned_backend", lambda: "metal")
    for heads, width, mask in (((16, 32), 128, None), ((16, 32), 64, None), ((16, 16), 128, mx.ones((1, 3), mx.bool_))):
        q, k, v, *_ = draw(1, 3, heads, (width, width), False, False)
        g = beta = mx.full((1, 3, heads[1]), 0.5)
        y, _ = gated_delta(q, k, v, g, beta, mask=mask)
        assert mx.allclose(y, loop.gated_delta_ops(q, k, v, g, beta, None)[0], atol=1e-5)
    assert asked == [(1, 3, 16, 128)]


def test_a_step_has_few_operations_and_the_loops_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers of the delta rule and one of attention, 512 tokens: at most 2 % of the loop's operations."""
    settings = {
        **SIZES,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_experts": 0,
        "linear_num_value_heads": 4,
        "rms_norm_eps": 1e-6,
    }
    settings |= {"linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
    settings |= {"linear_conv_kernel_dim": 4, "full_attention_interval": 4, "model_type": "qwen3_5_text"}
    settings["rope_parameters"] = {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    known = qwen3_5.TextModelArgs.__dataclass_fields__
    model = qwen3_5.TextModel(qwen3_5.TextModelArgs(**{k: v for k, v in settings.items() if k in known}))
    scatter(model, seed=1)
    model.update(tree_map(lambda v: 0.25 * v if v.ndim > 1 else v, model.parameters()))  # larger ones amplify rounding
    model.train()
    ids = mx.array(np.random.default_rng(0).integers(0, 64, (1, 512)))
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]

    def loss(model: nn.Module, ids: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean()

    def step(ids: mx.array) -> list[mx.array]:
        _, slopes = nn.value_and_grad(model, loss)(model, ids)
        return [v for _, v in tree_flatten(slopes)]

    count = {}
    for switch in ("on", "off"):
        monkeypatch.setenv("MLXFT_CPU", switch)
        count[switch] = len(trace(model, step, [ids])[0].ops)
    assert count["off"] <= 0.02 * TODAY, count
    assert count["on"] <= 0.0225 * TODAY, "attention of its own takes some on a CPU"
    found = [step(ids)]
    with quicker(model):
        found.append(step(ids))
    for name, one, other in zip(names, *found):
        assert mx.linalg.norm((one - other).reshape(-1)) <= 1e-5 * mx.linalg.norm(one.reshape(-1)), name
