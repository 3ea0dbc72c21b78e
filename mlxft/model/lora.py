"""Low-rank layers: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024) around a frozen layer.

Parameters carry mlx-lm's names (`lora_a`, `lora_b`, `m`, and the base below `linear` or `embedding`), so that an
adapter saved here loads there. Two things differ: the scale is an array, so that a compiled function sees it
change, and the float32 matrices are cast to the activations' type, so that they do not promote bfloat16 ones.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlxft.model.random import Dropout

LINEAR = (nn.Linear, nn.QuantizedLinear)
SWITCH = (SwitchLinear, QuantizedSwitchLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
LEAVES = ("lora_a", "lora_b", "m")


def dropouts(*modules: nn.Module) -> list[nn.Dropout]:
    """The dropout that acts in modules and what they hold."""
    return [m for module in modules for m in module.modules() if isinstance(m, nn.Dropout) and m._p_1 < 1]


def without_dropout(*modules: nn.Module) -> bool:
    """Take the dropout out of modules and what they hold; whether there was any."""
    found = dropouts(*modules)
    for dropout in found:
        dropout._p_1 = 1.0
    return bool(found)


def dense_weight(base: nn.Module, exact: bool = False) -> mx.array:
    """The weight of a layer, dequantised if it is quantised.

    Args:
        exact: in float32, also while it is unpacked, so that nothing is rounded on the way; else as the scales are.
    """
    weight = base.weight
    if isinstance(base, QUANTIZED):
        scales, biases = base.scales, base.get("biases")
        if exact and biases is not None:  # the other modes have scales of 8 bits
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        weight = mx.dequantize(weight, scales, biases, group_size=base.group_size, bits=base.bits, mode=base.mode)
    return weight.astype(mx.float32) if exact else weight


class LowRank(nn.Module):
    """What LoRA layers share: dropout and scale. `base` is the frozen layer they wrap."""

    def __init__(self, scale: float, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(p=dropout)
        # Underscored: part of the state that a compiled function reads, but not a parameter.
        self._scale = mx.array(scale, dtype=mx.float32)

    @property
    def base(self) -> nn.Module:
        """The wrapped layer."""
        return self.embedding if "embedding" in self else self.linear

    @property
    def scale(self) -> float:
        """Multiplier of the update."""
        return float(self._scale)

    def delta(self) -> mx.array:
        """The update to the base's weight, in its shape, float32."""
        raise AssertionError(f"{type(self).__name__} has no delta")

    def fused_weight(self, exact: bool = False) -> mx.array:
        """Base weight plus update, float32; `exact` as for `dense_weight`."""
        return dense_weight(self.base, exact).astype(mx.float32) + self.delta()


class LoRALinear(LowRank):
    """y = W x + b + scale * B A x; with `dora`, rows of W + scale * B A are rescaled to the norms `m`."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float, dora: bool = False) -> None:
        super().__init__(scale, dropout)
        out_dims, in_dims = dense_weight(base).shape
        self.linear = base
        bound = 1 / math.sqrt(in_dims)
        self.lora_a = mx.random.uniform(-bound, bound, (in_dims, rank))
        self.lora_b = mx.zeros((rank, out_dims))
        if dora:
            self._norm2 = dense_weight(base).astype(mx.float32).square().sum(axis=1)
            self.m = self._norm2.sqrt()

    def __call__(self, x: mx.array) -> mx.array:
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        update = ((self.dropout(x) @ a) * self._scale.astype(x.dtype)) @ b
        if "m" not in self:
            return self.linear(x) + update
        out = (self.m / self._adapted_norm()).astype(x.dtype) * (self._product(x) + update)
        return out + self.linear.bias if "bias" in self.linear else out

    def _product(self, x: mx.array) -> mx.array:
        """W x, without the bias."""
        base = self.linear
        if not isinstance(base, nn.QuantizedLinear):
            return x @ base.weight.T
        options = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
        return mx.quantized_matmul(x, base.weight, base.scales, base.get("biases"), transpose=True, **options)

    def _adapted_norm(self) -> mx.array:
        """Row norms of W + scale * B A, (out,), a constant of the gradient (Liu et al. 2024, section 4.3).

        Expanded, so that the adapted weight is never formed: |w|^2 + 2 s <w, d> + s^2 |d|^2 with d = B A.
        """
        a, b, s = (mx.stop_gradient(v) for v in (self.lora_a, self.lora_b, self._scale))
        compute = self.linear.scales.dtype if "scales" in self.linear else self.linear.weight.dtype
        wa = self._product(a.T.astype(compute)).astype(mx.float32)  # (rank, out)
        cross = (wa * b).sum(axis=0)
        own = (b * ((a.T @ a) @ b)).sum(axis=0)
        return (self._norm2 + 2 * s * cross + s * s * own).sqrt()

    def delta(self) -> mx.array:
        return self._scale * (self.lora_b.T @ self.lora_a.T)

    def fused_weight(self, exact: bool = False) -> mx.array:
        weight = super().fused_weight(exact)
        if "m" in self:
            weight = weight * (self.m / weight.square().sum(axis=1).sqrt())[:, None]
        return weight


class LoRASwitchLinear(LowRank):
    """LoRA on the experts of a mixture: one A (rank, in) and B (out, rank) for each."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(scale, dropout)
        self.linear = base
        experts, in_dims, out_dims = base.num_experts, base.input_dims, base.output_dims
        bound = 1 / math.sqrt(in_dims)
        self.lora_a = mx.random.uniform(-bound, bound, (experts, rank, in_dims))
        self.lora_b = mx.zeros((experts, out_dims, rank))

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        z = self.dropout(x)
        for factor in (self.lora_a, self.lora_b):
            z = mx.gather_mm(
                z,
                factor.astype(x.dtype).swapaxes(-1, -2),
                rhs_indices=indices,
                sorted_indices=sorted_indices,
            )
        return y + z * self._scale.astype(x.dtype)

    def __getattr__(self, key: str) -> Any:
        # Mixture blocks ask their experts for sizes.
        if key in ("input_dims", "output_dims", "num_experts"):
            return getattr(self["linear"], key)
        return super().__getattr__(key)

    def delta(self) -> mx.array:
        return self._scale * (self.lora_b @ self.lora_a)


class LoRAEmbedding(LowRank):
    """LoRA on an embedding, also where it serves as the output head."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(scale, dropout)
        count, dims = dense_weight(base).shape
        self.embedding = base
        bound = 1 / math.sqrt(count)
        self.lora_a = mx.random.uniform(-bound, bound, (count, rank))
        self.lora_b = mx.zeros((rank, dims))

    def __call__(self, ids: mx.array) -> mx.array:
        y = self.embedding(ids)
        z = self.dropout(self.lora_a[ids] @ self.lora_b)
        return y + (self._scale * z).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        return self.embedding.as_linear(x) + ((self.dropout(x) @ b.T) * self._scale.astype(x.dtype)) @ a.T

    @property
    def weight(self) -> mx.array:
        """The adapted weight, (tokens, D), without dropout, for architectures whose output layer reads it (minicpm)."""
        weight = dense_weight(self.embedding)
        return weight + self.delta().astype(weight.dtype)

    def delta(self) -> mx.array:
        return self._scale * (self.lora_a @ self.lora_b)


def shift(layer: LowRank) -> mx.array:
    """What fusing adds to the base's weight, in its shape, float32; DoRA's rescaling is part of it."""
    return layer.fused_weight() - dense_weight(layer.base).astype(mx.float32) if "m" in layer else layer.delta()


def adaptable(module: nn.Module) -> bool:
    """Whether a low-rank layer can wrap `module`."""
    # mlx-lm's fused layers are linear ones that give several outputs; they say so by having LoRA of their own.
    return isinstance(module, LINEAR + SWITCH + EMBEDDING) and not hasattr(module, "to_lora")


def wrap(module: nn.Module, rank: int, scale: float, dropout: float, dora: bool) -> LowRank:
    """The low-rank layer for `module`; `dora` is for linear layers."""
    if isinstance(module, LINEAR):
        return LoRALinear(module, rank, scale, dropout, dora)
    assert not dora, "select_targets refuses DoRA elsewhere"
    kind = LoRASwitchLinear if isinstance(module, SWITCH) else LoRAEmbedding
    return kind(module, rank, scale, dropout)


def plain(base: nn.Module, weight: mx.array) -> nn.Module:
    """A layer without quantisation that has `weight` and the base's bias."""
    if isinstance(base, EMBEDDING):
        layer = nn.Embedding(1, 1)
    elif isinstance(base, SWITCH):
        layer = SwitchLinear(1, 1, 1, bias=False)
    else:
        layer = nn.Linear(1, 1, bias=False)
    layer.weight = weight
    if "bias" in base:
        layer.bias = base.bias
    return layer
