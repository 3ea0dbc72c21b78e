"""Low-rank layers: what they compute, next to the definition and to mlx-lm's layers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding as TheirEmbedding
from mlx_lm.tuner.lora import LoRALinear as TheirLinear
from mlx_lm.tuner.lora import LoRASwitchLinear as TheirSwitch

from mlxft.model.layers import LoRALinear, LowRank, adaptable, dense_weight, plain_layer, wrap

RANK, SCALE = 3, 1.5


def linear(bias: bool = False, bits: int | None = None, dtype: Any = mx.float32) -> nn.Module:
    mx.random.seed(5)
    layer = nn.Linear(64, 32, bias=bias)
    if bias:
        layer.bias = mx.random.normal((32,))
    layer.set_dtype(dtype)
    return layer.to_quantized(32, bits) if bits else layer


def experts(bias: bool = False, bits: int | None = None) -> nn.Module:
    mx.random.seed(6)
    layer = SwitchLinear(64, 32, 4, bias=bias)
    if bias:
        layer.bias = mx.random.normal((4, 32))
    return layer.to_quantized(32, bits) if bits else layer


def trained(base: nn.Module, dora: bool = False, dropout: float = 0.0) -> LowRank:
    """A low-rank layer that does something."""
    layer = wrap(base, RANK, SCALE, dropout, dora)
    layer.lora_b = 0.3 * mx.random.normal(layer.lora_b.shape)
    if dora:
        layer.m = layer.m * mx.random.uniform(0.5, 1.5, layer.m.shape)
    layer.eval()
    return layer


X = mx.random.normal((2, 5, 64), key=mx.random.key(0))
IDS = mx.array([[3, 1, 0], [7, 7, 2]])
PICKS = mx.array([[[0, 2], [1, 3], [3, 3], [0, 1], [2, 0]]] * 2)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_by_its_definition(bias: bool, dora: bool, bits: int | None) -> None:
    """LoRA: x (W + s (A B)^T)^T + b; DoRA rescales each row of the sum to m first."""
    layer = trained(linear(bias, bits), dora)
    weight = dense_weight(layer.base) + SCALE * (layer.lora_a @ layer.lora_b).T
    if dora:
        weight = weight * (layer.m / mx.linalg.norm(weight, axis=1, stream=mx.cpu))[:, None]
    wanted = X @ weight.T + (layer.base.bias if bias else 0.0)
    assert mx.allclose(layer(X), wanted, atol=1e-4)
    assert mx.allclose(layer.fused_weight(), weight, atol=1e-5)
    fused = plain_layer(layer.base, layer.fused_weight())
    assert mx.allclose(fused(X), wanted, atol=1e-4)
    assert fused.weight.dtype == mx.float32


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dora", [False, True])
def test_linear_is_mlx_lms(dora: bool, bits: int | None) -> None:
    base = linear(True, bits)
    ours = trained(base, dora)
    theirs = (DoRALinear if dora else TheirLinear).from_base(base, r=RANK, scale=SCALE)
    names = {name for name, _ in tree_flatten(ours.parameters())}
    assert names == {name for name, _ in tree_flatten(theirs.parameters())}
    theirs.update(ours.parameters())
    assert mx.allclose(ours(X), theirs(X), atol=1e-4)
    ours_w, theirs_w = ours.fused_weight(), dense_weight(theirs.fuse(dequantize=True))
    assert mx.allclose(ours_w, theirs_w, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_experts_are_mlx_lms_and_fuse(bias: bool, bits: int | None) -> None:
    base = experts(bias, bits)
    ours = trained(base)
    theirs = TheirSwitch.from_base(base, r=RANK, scale=SCALE)
    theirs.update(ours.parameters())
    x = X[:, :, None, None]
    wanted = theirs(x, PICKS)
    assert mx.allclose(ours(x, PICKS), wanted, atol=1e-4)
    assert (ours.num_experts, ours.input_dims, ours.output_dims) == (4, 64, 32)
    assert mx.allclose(plain_layer(base, ours.fused_weight())(x, PICKS), wanted, atol=1e-4)
    with pytest.raises(AttributeError):
        _ = ours.nonsense


@pytest.mark.parametrize("bits", [None, 4])
def test_embedding_is_mlx_lms_and_fuses_both_ways(bits: int | None) -> None:
    mx.random.seed(7)
    base: nn.Module = nn.Embedding(40, 64)
    base = base.to_quantized(32, bits) if bits else base
    ours = trained(base)
    theirs = TheirEmbedding.from_base(base, r=RANK, scale=SCALE)
    theirs.update(ours.parameters())
    fused = plain_layer(base, ours.fused_weight())
    for layer in (theirs, fused):
        assert mx.allclose(ours(IDS), layer(IDS), atol=1e-4)
        assert mx.allclose(ours.as_linear(X), layer.as_linear(X), atol=1e-3)


def test_experts_of_a_long_batch_are_sorted() -> None:
    """mlx-lm sorts long batches by expert: rows and their adapter must stay together."""
    ours = trained(experts())
    picks = mx.array([0, 0, 1, 2, 3, 3])
    x = mx.random.normal((6, 1, 64))
    weight = ours.fused_weight()
    wanted = mx.stack([weight[i] @ row[0] for i, row in zip(picks.tolist(), x)])
    assert mx.allclose(ours(x, picks, sorted_indices=True)[:, 0], wanted, atol=1e-4)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing(dora: bool, bits: int | None) -> None:
    base = linear(bits=bits)
    assert mx.array_equal(wrap(base, RANK, SCALE, 0.0, dora)(X), base(X))
    biased = linear(True, bits)
    # DoRA adds the bias after the product, where nn.Linear does both at once.
    assert mx.allclose(wrap(biased, RANK, SCALE, 0.0, dora)(X), biased(X), atol=1e-6 if dora else 0.0, rtol=0.0)


def test_dora_norm_is_the_norm_of_the_adapted_weight() -> None:
    for bits in (None, 4):
        layer = trained(linear(bits=bits), dora=True)
        assert isinstance(layer, LoRALinear)
        adapted = dense_weight(layer.base) + layer.delta()
        assert mx.allclose(layer._adapted_norm(), mx.linalg.norm(adapted, axis=1, stream=mx.cpu), rtol=1e-5)


def test_dora_norm_is_a_constant_of_the_gradient() -> None:
    """Section 4.3: the gradient in B is (m / |W'|) x the one of the layer without it."""
    layer = trained(linear(), dora=True)
    ratio = layer.m / layer._adapted_norm()

    def of(b: mx.array) -> mx.array:
        layer.lora_b = b
        return layer(X)[..., 3].sum()

    b = layer.lora_b
    found = mx.grad(of)(b)
    layer.lora_b = b
    wanted = ratio[3] * SCALE * (X @ layer.lora_a).sum(axis=(0, 1))
    assert mx.allclose(found[:, 3], wanted, rtol=1e-4, atol=1e-4)
    assert mx.array_equal(found[:, :3], mx.zeros((RANK, 3)))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_activations_keep_their_type(dora: bool, bits: int | None) -> None:
    layer = trained(linear(True, bits, mx.bfloat16), dora)
    assert {layer.lora_a.dtype, layer.lora_b.dtype} == {mx.float32}
    assert layer(X.astype(mx.bfloat16)).dtype == mx.bfloat16


def test_activations_keep_their_type_elsewhere() -> None:
    half = X.astype(mx.float16)
    mixture, embedding = experts(), nn.Embedding(40, 64)
    mixture.set_dtype(mx.float16)
    embedding.set_dtype(mx.float16)
    assert trained(mixture)(half[:, :, None, None], PICKS).dtype == mx.float16
    layer = trained(embedding)
    assert layer(IDS).dtype == layer.as_linear(half).dtype == mx.float16


@pytest.mark.parametrize("dora", [False, True])
def test_a_compiled_function_sees_a_changed_scale(dora: bool) -> None:
    layer = trained(linear(), dora)
    compiled = mx.compile(lambda x: layer(x), inputs=[layer.state])
    before = compiled(X)
    layer._scale = mx.array(0.5)
    assert layer.scale == 0.5
    assert mx.allclose(compiled(X), layer(X), atol=1e-5)
    assert not mx.allclose(compiled(X), before, atol=1e-2)
    assert "_scale" not in dict(tree_flatten(layer.parameters()))


def test_dropout_acts_in_training_on_the_update_only() -> None:
    base = linear()
    layer = trained(base, dropout=0.5)
    still = layer(X)
    assert mx.array_equal(layer(X), still)
    layer.train()
    assert not mx.array_equal(layer(X), layer(X))
    # Kept inputs are scaled up: the mean over many draws is the update without dropout.
    mean = mx.mean(mx.stack([layer(X) for _ in range(4000)]), axis=0)
    assert mx.allclose(mean, still, atol=0.15)
    layer.lora_b = mx.zeros_like(layer.lora_b)
    assert mx.array_equal(layer(X), base(X))


def test_what_can_be_adapted() -> None:
    assert all(adaptable(m) for m in (linear(), linear(bits=4), experts(), experts(bits=4), nn.Embedding(2, 2)))
    assert not adaptable(nn.RMSNorm(4))
    assert not adaptable(wrap(linear(), RANK, SCALE, 0.0, False))
