"""Quantisation-aware LoRA: what is trained is what is fused, and the gradient goes straight through the rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlxft.exports.fuse import fuse_layers, uniform
from mlxft.model.adapters import LoRASpec, prepare_adapter, select_targets
from mlxft.model.layers import (
    INPUTS,
    QUANTIZED,
    LoRALinear,
    LowRank,
    WeightForm,
    dense_weight,
    measure_inputs,
    plain_layer,
    rounded_once,
    standing_in,
    unrounded,
    wrap,
)
from mlxft.model.load import load

Maker = Callable[..., Path]
IDS = mx.array([[3, 40, 77, 5, 21, 9, 250, 3]])
UNTIED = {"tie_word_embeddings": False}
KINDS = [
    ("llama", {}, "all-linear", False),
    ("llama", {"attention_bias": True, "mlp_bias": True}, "all-linear", True),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 4}, "all-linear", False),  # no router decides
    ("llama", {}, ["embed_tokens"], False),
    ("llama", UNTIED, ["embed_tokens", "lm_head"], False),
]


def aware(folder: Path, targets: Any, dora: bool, bits: int = 4, size: float = 0.02, **options: Any) -> nn.Module:
    """A model with an adapter that has been moved, trained for so many bits."""
    model = load(str(folder), **{"dtype": "float32", **options}).model
    mx.random.seed(0)
    paths = select_targets(model, targets, "all", dora)
    prepare_adapter(model, LoRASpec(tuple(paths), 4, 2.0, 0.0, dora, bits), [])
    leaves = [
        (name, value + size * mx.random.normal(value.shape, key=mx.random.key(i)))
        for i, (name, value) in enumerate(sorted(tree_flatten(model.trainable_parameters())))
    ]
    model.update(tree_unflatten(leaves))
    model.eval()
    return model


def low_rank(model: nn.Module) -> dict[str, LowRank]:
    return {path: m for path, m in model.named_modules() if isinstance(m, LowRank)}


@pytest.mark.parametrize(("kind", "settings", "targets", "dora"), KINDS)
@pytest.mark.parametrize("options", [{"quantize": 4, "group_size": 32}, {"quantize": 8, "group_size": 32}, {}])
def test_trained_is_fused(
    kind: str, settings: Any, targets: Any, dora: bool, options: Any, tmp_path: Path, make_model_dir: Maker
) -> None:
    """On a base with as many bits, with more, and on a float one; and rounded once for all calls."""
    model = aware(make_model_dir(tmp_path / kind, kind, **settings), targets, dora, **options)
    trained, paths = model(IDS), list(low_rank(model))
    with unrounded(model):
        assert mx.abs(model(IDS) - trained).max() > 1e-3
    with rounded_once(model):
        assert mx.array_equal(model(IDS), trained)
    forms = fuse_layers(model)
    assert {form.bits for form in forms.values()} == {4}
    fused = dict(model.named_modules())
    assert all(isinstance(fused[path], QUANTIZED) and fused[path].bits == 4 for path in paths)
    assert mx.allclose(model(IDS), trained, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_base_keeps_its_grid(bits: int, tiny_model_dir: Path) -> None:
    """Without an update nothing moves; a small one moves few numbers, by one, and its mean stays."""
    model = aware(tiny_model_dir, "all-linear", False, bits, 0.0, quantize=bits, group_size=32)
    for layer in low_rank(model).values():
        assert layer.form is not None
        for given, own in zip(layer.form.rounded(layer), (layer.base.weight, layer.base.scales, layer.base.biases)):
            assert mx.array_equal(given, own)
    (layer, *_) = (m for m in low_rank(model).values() if isinstance(m, LoRALinear))
    layer.pop(INPUTS)  # or biases move too
    step = mx.abs(layer.base.scales).min()
    layer.lora_a, layer.lora_b = mx.ones(layer.lora_a.shape), mx.full(layer.lora_b.shape, step / 80)  # a tenth
    moved = layer.fused_weight() - dense_weight(layer.base)
    by_one = mx.abs(moved).reshape(*layer.base.scales.shape, -1) / mx.abs(layer.base.scales)[..., None]
    assert mx.all((by_one < 1e-4) | (mx.abs(by_one - 1) < 1e-4))
    assert 0 < by_one.mean() < 0.12
    inside = 1 - 2.0**-bits  # what is at the end of its group's range cannot move out of it
    assert float(moved.mean() / step) == pytest.approx(0.1 * inside, rel=0.3)


@pytest.mark.parametrize(("mode", "group"), [("mxfp4", 32), ("nvfp4", 16)])
@pytest.mark.parametrize("experts", [False, True])
def test_numbers_with_an_exponent_keep_their_grid(mode: str, group: int, experts: bool) -> None:
    """Each is one of the two of its grid that are nearest, and the mean of many is the update; or its group is new."""
    mx.random.seed(2)
    layer = SwitchLinear(64, 256, 3, bias=False) if experts else nn.Linear(64, 768, bias=False)
    layer = layer.to_quantized(group_size=group, bits=4, mode=mode)
    low = wrap(layer, 4, 1.0, 0.0, False)
    low.form = WeightForm(4, group, mode)
    base = np.array(dense_weight(layer, exact=True)).reshape(-1, group)
    assert np.array_equal(np.array(low.fused_weight()).reshape(-1, group), base)
    assert mx.array_equal(low.form.rounded(low)[1], layer.scales)
    low.lora_b = 0.002 * mx.random.normal(low.lora_b.shape)
    wanted = np.array(low.adapted_weight(exact=True), np.float64).reshape(-1, group)
    found = np.array(low.fused_weight(), np.float64).reshape(-1, group)
    kept = np.array(low.form.rounded(low)[1] == layer.scales).reshape(-1)
    assert kept.mean() > 0.9
    ones = mx.full(layer.weight.shape, 0x22222222, dtype=mx.uint32)
    unit = np.array(mx.dequantize(ones, layer.scales, None, group, 4, mode, dtype=mx.float32)).reshape(-1, group)
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    size, got = np.abs(wanted / unit), np.abs(found / unit)
    at = np.clip(np.searchsorted(grid, size, side="right") - 1, 0, 6)
    near = np.minimum(np.abs(got - grid[at]), np.abs(got - grid[at + 1]))
    assert near[kept].max() < 1e-5
    moved, meant = found - base, wanted - base
    inner = kept[:, None] & (np.abs(base) < 5.9 * unit)
    assert (np.abs(moved[inner]) > 0).mean() < 0.1
    assert (moved[inner] * meant[inner]).sum() == pytest.approx(np.square(meant[inner]).sum(), rel=0.2)
    low.lora_b = 10_000 * low.lora_b  # most groups leave their range, and are rounded anew
    nearest = mx.quantize(low.adapted_weight().astype(mx.bfloat16), group, 4, mode=mode)
    out = np.array(mx.abs(low.adapted_weight())).reshape(-1, group).max(axis=-1) > 7.01 * unit[:, 0]
    assert out.mean() > 0.5
    for one, other in zip(low.form.rounded(low), nearest):
        assert np.array_equal(*(np.array(each).reshape(len(out), -1)[out] for each in (one, other)))


@pytest.mark.parametrize("options", [{"quantize": 4, "group_size": 32}, {}])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_biases_take_out_the_error_along_strong_inputs(
    kind: str, options: Any, tmp_path: Path, make_model_dir: Maker
) -> None:
    """The shifts of the biases are those of least squares over inputs with the moments that were measured."""
    model = aware(make_model_dir(tmp_path / kind, kind), "all-linear", False, **options)
    for layer in low_rank(model).values():
        assert not mx.any(layer[INPUTS])
    measure_inputs(model, [[3, 40, 77, 5, 21, 9, 250, 3], [8, 9, 10, 11, 12, 13, 200, 100, 3]])
    noted = {path: layer[INPUTS] for path, layer in low_rank(model).items()}
    measure_inputs(model, [[1, 2]])
    assert all(layer[INPUTS] is noted[path] for path, layer in low_rank(model).items()), "known ones stay"
    for path, layer in low_rank(model).items():
        form = layer.form
        assert form is not None
        shifted = form.rounded(layer)
        directions = layer.pop(INPUTS)
        plain, wanted = form.rounded(layer), np.array(layer.adapted_weight(exact=True), np.float64)
        assert all(mx.array_equal(one, other) for one, other in zip(shifted[:2], plain[:2]))
        error = np.array(mx.dequantize(*plain, form.group_size, form.bits), np.float64) - wanted
        f = np.array(directions, np.float64)
        assert np.linalg.matrix_rank(f) == 8, path
        moments = f @ f.T + np.eye(len(f))
        groups = np.kron(np.eye(len(f) // form.group_size), np.ones((form.group_size, 1)))
        least = -error @ moments @ groups @ np.linalg.inv(groups.T @ moments @ groups)
        found = np.array(shifted[2] - plain[2], np.float64)
        assert np.allclose(found, least, atol=1e-6 + 1e-3 * np.abs(least).max()), path


def test_strong_directions_are_found() -> None:
    """Inputs with three strong directions: of the error of other inputs like them little is left."""
    mx.random.seed(1)
    base = nn.Linear(256, 32, bias=False)
    layer = wrap(base, 4, 1.0, 0.0, False)
    layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
    layer.form = WeightForm(3, 32)
    strong = mx.array([30.0, 10.0, 5.0])[:, None] * mx.random.normal((3, 256))
    x = mx.random.normal((500, 3)) @ strong + mx.random.normal((500, 256))

    def loss() -> float:
        return float((layer.rounded()(x) - x @ layer.adapted_weight().T).square().mean())

    model = nn.Sequential(lambda ids: x[ids], layer)
    before = loss()
    measure_inputs(model, [list(range(250))])
    assert loss() < before / 50


class Fed(nn.Module):
    """Feeds rows of x to a layer; experts take turns."""

    def __init__(self, layer: nn.Module, x: mx.array) -> None:
        super().__init__()
        self.layer, self.x, self.dense = layer, x, isinstance(layer, LoRALinear)

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.x[ids][0]
        if self.dense:
            return self.layer(x)
        return self.layer(x[:, None, None], mx.arange(len(x))[:, None] % 3)


@pytest.mark.parametrize("experts", [False, True])
def test_a_new_update_begins_along_its_inputs(experts: bool) -> None:
    """Of inputs of 20 directions: A has no other part, and A x is as large; what has learnt something stays."""
    mx.random.seed(3)
    layer = wrap(
        SwitchLinear(256, 32, 3, bias=False) if experts else nn.Linear(256, 32, bias=False), 4, 1.0, 0.0, False
    )
    x = mx.random.normal((400, 20)) @ (mx.arange(1.0, 21)[:, None] * mx.random.normal((20, 256)))
    rows, model = [list(range(400))], Fed(layer, x)

    def factor() -> np.ndarray:
        return np.array(layer.lora_a if experts else layer.lora_a.T).reshape(-1, 256)

    drawn, inputs = factor(), np.array(x)
    basis = np.linalg.svd(inputs, full_matrices=False)[2][:20]
    measure_inputs(model, rows, begin=True)
    begun = factor()
    assert np.allclose(begun, drawn @ basis.T @ basis, atol=1e-4)
    assert np.linalg.norm(begun) < 0.4 * np.linalg.norm(drawn)
    assert np.allclose(begun @ inputs.T, drawn @ inputs.T, rtol=1e-2, atol=1e-2 * np.abs(drawn @ inputs.T).max())
    layer.pop(INPUTS)
    layer.lora_a, layer.lora_b = mx.ones(layer.lora_a.shape), mx.ones(layer.lora_b.shape)
    measure_inputs(model, rows, begin=True)
    assert INPUTS in layer
    assert np.all(factor() == 1)


@pytest.mark.parametrize("options", [{"quantize": 4, "group_size": 32}, {}])
@pytest.mark.parametrize(("kind", "settings", "targets", "dora"), KINDS)
def test_gradient_goes_straight_through(
    kind: str, settings: Any, targets: Any, dora: bool, options: Any, tmp_path: Path, make_model_dir: Maker
) -> None:
    """Against finite differences of its definition: f(Q + W(t) - W(0)), W(t) not rounded, with DoRA's norm held."""
    model = aware(make_model_dir(tmp_path / kind, kind, **settings), targets, dora, **options)
    layers = low_rank(model)
    norms = {p: layer._adapted_norm() for p, layer in layers.items() if isinstance(layer, LoRALinear) and dora}

    def loss(model: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(model(IDS[:, :-1]), IDS[:, 1:]).mean()

    def weights() -> dict[str, mx.array]:
        found = {}
        for path, layer in layers.items():
            plain = dense_weight(layer.base) + layer.delta()
            found[path] = plain * (layer.m / norms[path])[:, None] if dora else plain
        return found

    _, gradient = nn.value_and_grad(model, loss)(model)
    start = dict(tree_flatten(model.trainable_parameters()))
    way = {n: mx.random.normal(v.shape, key=mx.random.key(i)) for i, (n, v) in enumerate(start.items())}
    rounded, before = {p: layer.fused_weight() for p, layer in layers.items()}, weights()
    mx.eval(rounded, before)

    def at(t: float) -> float:
        model.update(tree_unflatten([(n, v + t * way[n]) for n, v in start.items()]))
        moved = {p: plain_layer(layers[p].base, rounded[p] + w - before[p]) for p, w in weights().items()}
        with standing_in(model, moved):
            return float(loss(model))

    h = 2e-3
    expected = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    found = sum(float((g * way[n]).sum()) for n, g in tree_flatten(gradient))
    assert found == pytest.approx(expected, rel=0.01, abs=2e-4)


def test_half_precision_and_other_modes_fuse_as_trained(tiny_model_dir: Path, tmp_path: Path) -> None:
    for options in ({"dtype": "bfloat16", "quantize": 4, "group_size": 32}, {"dtype": "bfloat16"}):
        model = aware(tiny_model_dir, "all-linear", False, **options)
        trained = model(IDS)
        fuse_layers(model, forms=uniform(model, 4))
        assert mx.array_equal(model(IDS), trained)
