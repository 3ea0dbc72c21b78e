"""Layers that mlxft puts into a model, and the modes of a model: random state, routers, gradient checkpointing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import count
from typing import Any, Literal, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

from mlxft.device import backend, usable_bytes
from mlxft.errors import ConfigError, ModelError

# --- random -----------------------------------------------------------------------------------------------------------
# MLX's global random state, a part of it drawn again, and probes of a model that leave no trace.
#
# Randomness within a forward pass (dropout) comes from the global generator. A pass that is computed twice, for its
# gradient, must draw the same both times: it notes `position` first, and the second time runs inside
# `again(position)`. Restoring MLX's global state would wait for the device, so `again` draws from a second generator,
# which gives the same keys.

_replays: list[mx.array] = []  # keys of the generators beside the global one; the last is in use


def random_state() -> list[int]:
    """Return the key of the global generator, two 32-bit numbers. Waits for the device."""
    return cast(list[int], _global().tolist())


def set_random_state(state: list[int]) -> None:
    """Restore a state that `random_state` returned: a 64-bit seed is the key, upper half first."""
    mx.random.seed(state[0] << 32 | state[1])
    assert random_state() == list(state), "this mlx makes keys from seeds in another way"


def position() -> mx.array:
    """Return the generator's current key, (2,) uint32, lazy."""
    return _replays[-1] if _replays else _global()


@contextmanager
def again(position: mx.array) -> Iterator[None]:
    """Let `Dropout` draw inside the block what it drew from `position` on; the global generator is not touched."""
    _replays.append(mx.stop_gradient(position))
    try:
        yield
    finally:
        _replays.pop()


class Dropout(nn.Dropout):
    """MLX's dropout with a mask that can be drawn `again`."""

    def __call__(self, x: mx.array) -> mx.array:
        if not _replays or self._p_1 == 1 or not self.training:
            return super().__call__(x)
        _replays[-1], key = mx.random.split(_replays[-1])  # as the global generator takes its keys
        mask = mx.random.bernoulli(self._p_1, x.shape, key=key)
        return (mask * x) * (1 / self._p_1)


def repeatable(model: nn.Module) -> None:
    """Let all of a model's dropout be drawn `again`, including its architecture's own."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout


@contextmanager
def aside() -> Iterator[None]:
    """Restore the global random state after the block."""
    before = _global()
    try:
        yield
    finally:
        if _global() is not before:
            set_random_state(cast(list[int], before.tolist()))


@contextmanager
def evaluating(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Switch dropout and the like off inside the block, or on with `training`; then restore every module's flag."""
    flags = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags:
            module._training = flag


@contextmanager
def probing(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Set the mode as `evaluating` does, and restore the random state after the block."""
    with aside(), evaluating(model, training):
        yield


def _global() -> mx.array:
    key: mx.array = mx.random.state[0]  # type: ignore[index]
    return key


# --- lora -------------------------------------------------------------------------------------------------------------
# Low-rank layers: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024) around a frozen layer.
#
# Parameters have mlx-lm's names (`lora_a`, `lora_b`, `m`, and the base below `linear` or `embedding`), so that mlx-lm
# loads an adapter saved here. Two things differ: the scale is an array, so that a compiled function sees it change,
# and the float32 matrices are cast to the activations' type, so that they do not promote bfloat16 ones.
#
# A layer with a `form` is trained quantisation-aware: it computes with the adapted weight as it will be written, and
# the gradient goes straight through the rounding (Bengio et al. 2013), dL/dW = dL/dQ(W). For the factors that is the
# gradient of a layer that is not rounded, with the input as a constant: no gradient of a dense weight is formed.

LINEAR = (nn.Linear, nn.QuantizedLinear)
SWITCH = (SwitchLinear, QuantizedSwitchLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)  # each after its plain kind below
LEAVES = ("lora_a", "lora_b", "m")
INPUTS = "inputs"  # beside them, in layers whose weight is rounded: what `measure_inputs` finds; never trained
SAVED = (*LEAVES, INPUTS)  # what an adapter folder has of a layer


def dropouts(*modules: nn.Module) -> list[nn.Dropout]:
    """Return the active dropout layers in modules."""
    return [m for module in modules for m in module.modules() if isinstance(m, nn.Dropout) and m._p_1 < 1]


def without_dropout(*modules: nn.Module) -> bool:
    """Take the dropout out of modules, and return whether there was any."""
    found = dropouts(*modules)
    for dropout in found:
        dropout._p_1 = 1.0
    return bool(found)


def dense_weight(base: nn.Module, exact: bool = False) -> mx.array:
    """Return the weight of a layer, dequantised; with `exact` in float32, so that nothing is rounded on the way."""
    weight = base.weight
    if isinstance(base, QUANTIZED):
        scales, biases = base.scales, base.get("biases")
        if exact and biases is not None:  # the other modes have scales of 8 bits
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        weight = mx.dequantize(weight, scales, biases, group_size=base.group_size, bits=base.bits, mode=base.mode)
    return weight.astype(mx.float32) if exact else weight


@dataclass(frozen=True)
class WeightForm:
    """How an adapted weight is written; 0 bits: float. `same`: as the base is, because its update is zero."""

    bits: int
    group_size: int = 0
    mode: str = "affine"
    same: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What mlx's functions and a config.json say of it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def layer(self, adapted: LowRank) -> nn.Module:
        """Return the plain layer with an adapted weight in this form; nothing is computed yet."""
        base = adapted.base
        if self.same:
            return base
        if not self.bits:
            return plain_layer(base, adapted.fused_weight().astype(dense_weight(base).dtype))
        return _packed_layer(base, self, self.rounded(adapted))

    def rounded(self, adapted: LowRank) -> tuple[mx.array, ...]:
        """Return an adapted weight as packed numbers, scales and, if the mode has them, biases.

        Rounded again, a base would lose more than a small update adds: the groups' ranges are no longer those of its
        first rounding. So a base that has this form keeps its scales and biases. Its numbers lie on their grid, where
        the nearest one to a small update is none: each is rounded up or down with odds by its distance to both, by a
        noise that is always the same. So the mean of many is the update, and what has no update stays as it is. A group
        that its update takes more than half a step out of its range gets a wider grid and the nearest numbers. So do
        the numbers of 4 bits with an exponent (mxfp4, nvfp4); in other modes all are the nearest ones.

        What is left of the error is an error of the layer's outputs, most of it along few directions of its inputs.
        Where these are known, the biases of the groups take it out (`_shifts`).
        """
        base = adapted.base
        if form_of(base) == self and self.mode == "affine":
            arrays = self._on_grid(adapted)
        else:
            weight = adapted.adapted_weight()
            arrays = tuple(
                mx.quantize(weight.astype(dense_weight(base).dtype), self.group_size, self.bits, mode=self.mode)
            )
            if form_of(base) == self and self.bits == 4:
                arrays = self._on_float_grid(weight, base, arrays)
        if self.mode != "affine" or INPUTS not in adapted:
            return arrays
        packed, scales, biases = arrays
        exact = (packed, scales.astype(mx.float32), biases.astype(mx.float32))
        error = mx.dequantize(*exact, self.group_size, self.bits) - adapted.adapted_weight(exact=True)
        shifts = _shifts(error, adapted[INPUTS], self.group_size)
        return packed, scales, (exact[2] + shifts).astype(biases.dtype)

    def _on_grid(self, adapted: LowRank) -> tuple[mx.array, ...]:
        """Return `rounded` with the scales and biases of a base that has this form."""
        base = adapted.base
        most, kind = 2**self.bits - 1, base.scales.dtype
        scales, biases = (each[..., None].astype(mx.float32) for each in (base.scales, base.biases))
        ones, zeros = mx.ones(base.scales.shape), mx.zeros(base.scales.shape)
        numbers = mx.dequantize(base.weight, ones, zeros, self.group_size, self.bits).reshape(*scales.shape[:-1], -1)
        numbers = numbers + shift(adapted).reshape(numbers.shape) / mx.where(scales == 0, mx.inf, scales)
        low = mx.minimum(numbers.min(axis=-1, keepdims=True) + 0.5, 0)
        high = mx.maximum(numbers.max(axis=-1, keepdims=True) - 0.5, most)
        wider = (low < 0) | (high > most)
        new_scales = mx.where(wider, scales * (high - low) / most, scales).astype(kind)
        new_biases = mx.where(wider, biases + scales * low, biases).astype(kind)
        again = (numbers * scales + (biases - new_biases.astype(mx.float32))) / new_scales.astype(mx.float32) + 0.5
        # Not quite 0 or 1, so that a number without an update, exact to some 1e-6 of a step, is never changed.
        noise = mx.random.uniform(2.0**-16, 1 - 2.0**-16, numbers.shape, key=mx.random.key(0))
        found = mx.clip(mx.floor(mx.where(wider, again, numbers + noise)), 0, most)
        packed = pack_codes(found.reshape(*base.scales.shape[:-1], -1), self.bits)
        return packed, new_scales.squeeze(-1), new_biases.squeeze(-1)

    def _on_float_grid(self, weight: mx.array, base: nn.Module, nearest: Sequence[mx.array]) -> tuple[mx.array, ...]:
        """Return `rounded` on numbers of 4 bits with an exponent (e2m1): 0 to 2 by halves, then 3, 4 and 6."""
        ones = mx.full(base.weight.shape, 0x22222222, dtype=mx.uint32)  # eight times the code of 1
        units = mx.dequantize(ones, base.scales, None, self.group_size, 4, self.mode).astype(mx.float32)
        numbers = weight.astype(mx.float32) / mx.where(units == 0, mx.inf, units)
        size = mx.minimum(mx.abs(numbers), 6)
        step = mx.where(size < 2, 0.5, mx.where(size < 4, 1, 2))
        noise = mx.random.uniform(2.0**-16, 1 - 2.0**-16, numbers.shape, key=mx.random.key(0))
        found = mx.minimum(mx.floor(size / step + noise) * step, 6)
        codes = mx.where(found < 2, 2 * found, mx.where(found < 4, found + 2, found / 2 + 4))
        packed = pack_codes(codes + 8 * ((numbers < 0) & (codes > 0)), 4)
        wider = mx.abs(numbers).reshape(*base.scales.shape, -1).max(axis=-1) > 7
        words = [each.reshape(*base.scales.shape, -1) for each in (nearest[0], packed)]
        chosen = mx.where(wider[..., None], *words).reshape(packed.shape)
        return chosen, mx.where(wider, nearest[1], base.scales)


FLOAT = WeightForm(0)


def form_of(base: nn.Module, bits: int | None = None) -> WeightForm | None:
    """Return the form of a layer, or the one with other bits; None if its width does not divide into groups."""
    own = WeightForm(base.bits, base.group_size, base.mode) if isinstance(base, QUANTIZED) else FLOAT
    if bits in (None, own.bits):
        return own
    if bits == 0:
        return FLOAT
    width = dense_weight(base).shape[-1]
    # Other modes have few widths: affine replaces them.
    groups = (own.group_size if own.mode == "affine" else 32,) if own.bits else (64, 32)
    return next((WeightForm(bits, size) for size in groups if width % size == 0), None)


def quantization_of(model: nn.Module, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the `quantization` of a model's config.json: the form that most layers have, and by name those of others.

    Args:
        known: what a config.json says of the model before it was changed, whose order and usual form are kept.
    """
    able = {path: m for path, m in model.named_modules() if isinstance(m, QUANTIZED) or hasattr(m, "to_quantized")}
    forms: dict[str, dict[str, Any] | Literal[False]] = {
        path: own.settings if (own := form_of(m)) and own.bits else False for path, m in able.items()
    }
    packed = [form for form in forms.values() if form is not False]
    found: dict[str, Any] = {**(known or max(packed, key=packed.count))}
    usual = {"mode": "affine"} | {key: value for key, value in found.items() if key in ("group_size", "bits", "mode")}
    for path, form in forms.items():
        said = found.get(path, usual)
        if form != (usual | said if isinstance(said, dict) else said and usual):
            found[path] = form
    return found


def pack_codes(numbers: mx.array, bits: int) -> mx.array:
    """Pack numbers (..., N) below 2^bits as MLX does: one after the other in the bits of uint32 words."""
    kind = mx.uint32 if bits <= 4 else mx.uint64
    eights = numbers.astype(kind).reshape(*numbers.shape[:-1], -1, 8)
    words = mx.left_shift(eights, mx.arange(0, 8 * bits, bits).astype(kind)).sum(axis=-1, keepdims=True)
    used = words.astype(kind).view(mx.uint8)[..., :bits]
    return used.reshape(*numbers.shape[:-1], -1).view(mx.uint32)


def _packed_layer(base: nn.Module, form: WeightForm, arrays: Sequence[mx.array]) -> nn.Module:
    """Return a quantised layer of the kind of `base`, with its bias."""
    plain = (nn.Linear, nn.Embedding, SwitchLinear)
    kind = next((packed for each, packed in zip(plain, QUANTIZED) if isinstance(base, (each, packed))), QUANTIZED[0])
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)  # their own draws weights from the random state
    layer.bits, layer.group_size, layer.mode = form.bits, form.group_size, form.mode
    layer.weight, layer.scales, *biases = arrays
    layer.biases = biases[0] if biases else None
    if isinstance(layer, nn.QuantizedEmbedding):
        layer.num_embeddings, layer.dims = dense_weight(layer).shape
    elif isinstance(layer, QuantizedSwitchLinear):
        layer.global_scale = None
    if "bias" in base:
        layer.bias = base["bias"]
    layer.freeze()
    return layer


class LowRank(nn.Module):
    """Base class of LoRA layers, with dropout and scale. `base` is the frozen layer that is wrapped.

    Attributes:
        form: how the adapted weight is rounded in training; None: it is not.
    """

    def __init__(self, scale: float, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(p=dropout)
        # Underscored, so that it is part of the state that a compiled function reads, but not a parameter.
        self._scale = mx.array(scale, dtype=mx.float32)
        self.form: WeightForm | None = None
        self._held: tuple[mx.array, ...] | None = None

    @property
    def base(self) -> nn.Module:
        """The wrapped layer."""
        return self.embedding if "embedding" in self else self.linear

    @property
    def scale(self) -> float:
        """The multiplier of the update."""
        return float(self._scale)

    def delta(self) -> mx.array:
        """Return the update of the base's weight, in its shape, float32."""
        raise AssertionError(f"{type(self).__name__} has no delta")

    def adapted_weight(self, exact: bool = False) -> mx.array:
        """Return base weight plus update, float32 and not rounded; `exact` as for `dense_weight`."""
        return dense_weight(self.base, exact).astype(mx.float32) + self.delta()

    def fused_weight(self, exact: bool = False) -> mx.array:
        """Return the weight that the layer computes with, float32; `exact` as for `dense_weight`."""
        if self.form is None:
            return self.adapted_weight(exact)
        return dense_weight(self.form.layer(self), exact).astype(mx.float32)

    def rounded(self) -> nn.Module:
        """Return the plain layer with the rounded weight, a constant of the gradient."""
        assert self.form is not None
        arrays = self._held or tuple(map(mx.stop_gradient, self.form.rounded(self)))
        return _packed_layer(self.base, self.form, arrays)


def _straight(value: mx.array, through: mx.array) -> mx.array:
    """Return `value` with the gradient of `through` added to its own."""
    return value + (through - mx.stop_gradient(through)).astype(value.dtype)


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Leave the rounding of quantisation-aware layers out inside the block."""
    forms = [(m, m.form) for m in model.modules() if isinstance(m, LowRank)]
    for layer, _ in forms:
        layer.form = None
    try:
        yield
    finally:
        for layer, form in forms:
            layer.form = form


@contextmanager
def rounded_once(model: nn.Module) -> Iterator[None]:
    """Round the weights of quantisation-aware layers once for all calls inside the block, which trains nothing."""
    layers = [m for m in model.modules() if isinstance(m, LowRank) and m.form is not None]
    try:
        for layer in layers:
            assert layer.form is not None
            layer._held = layer.form.rounded(layer)
            mx.eval(layer._held)  # one dense weight at a time
        yield
    finally:
        for layer in layers:
            layer._held = None


class LoRALinear(LowRank):
    """y = W x + b + scale * B A x; with `dora`, rows of W + scale * B A are rescaled to the norms `m`."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float, dora: bool = False) -> None:
        super().__init__(scale, dropout)
        if dora and hasattr(base, "cut"):
            raise ModelError("DoRA needs whole weights, and those of a sharded base are cut: attach it before sharding")
        out_dims, in_dims = dense_weight(base).shape
        self.linear = base
        bound = 1 / math.sqrt(in_dims)
        self.lora_a = mx.random.uniform(-bound, bound, (in_dims, rank))
        self.lora_b = mx.zeros((rank, out_dims))
        if dora:
            self._norm2 = dense_weight(base).astype(mx.float32).square().sum(axis=1)
            self.m = self._norm2.sqrt()

    def __call__(self, x: mx.array) -> mx.array:
        if self.form is not None:
            still = mx.stop_gradient(x)
            return _straight(self.rounded()(x), self._rescaled(still) if "m" in self else self._update(still))
        if "m" not in self:
            return self.linear(x) + self._update(x)
        out = self._rescaled(x)
        return out + self.linear.bias if "bias" in self.linear else out

    def _update(self, x: mx.array) -> mx.array:
        """Compute scale * B A x."""
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        return ((self.dropout(x) @ a) * self._scale.astype(x.dtype)) @ b

    def _rescaled(self, x: mx.array) -> mx.array:
        """Compute DoRA's product without the bias."""
        return (self.m / self._adapted_norm()).astype(x.dtype) * (self._product(x) + self._update(x))

    def _product(self, x: mx.array) -> mx.array:
        """Compute W x without the bias."""
        base = self.linear
        if not isinstance(base, nn.QuantizedLinear):
            return x @ base.weight.T
        options = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
        return mx.quantized_matmul(x, base.weight, base.scales, base.get("biases"), transpose=True, **options)

    def _adapted_norm(self) -> mx.array:
        """Return row norms of W + scale * B A, (out,), a constant of the gradient (Liu et al. 2024, section 4.3).

        The square is expanded, so that the adapted weight is never formed: |w|^2 + 2 s <w, d> + s^2 |d|^2 with d = B A.
        """
        a, b, s = (mx.stop_gradient(v) for v in (self.lora_a, self.lora_b, self._scale))
        compute = self.linear.scales.dtype if "scales" in self.linear else self.linear.weight.dtype
        wa = self._product(a.T.astype(compute)).astype(mx.float32)  # (rank, out)
        cross = (wa * b).sum(axis=0)
        own = (b * ((a.T @ a) @ b)).sum(axis=0)
        return (self._norm2 + 2 * s * cross + s * s * own).sqrt()

    def delta(self) -> mx.array:
        return self._scale * (self.lora_b.T @ self.lora_a.T)

    def adapted_weight(self, exact: bool = False) -> mx.array:
        weight = super().adapted_weight(exact)
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
        if self.form is not None:
            y = self.rounded()(x, indices, sorted_indices=sorted_indices)
            return _straight(y, self._update(mx.stop_gradient(x), indices, sorted_indices))
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        return y + self._update(x, indices, sorted_indices)

    def _update(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        z = self.dropout(x)
        for factor in (self.lora_a, self.lora_b):
            transposed = factor.astype(x.dtype).swapaxes(-1, -2)
            z = mx.gather_mm(z, transposed, rhs_indices=indices, sorted_indices=sorted_indices)
        return z * self._scale.astype(x.dtype)

    def __getattr__(self, key: str) -> Any:
        # Mixture blocks ask their experts for sizes.
        if key in ("input_dims", "output_dims", "num_experts"):
            return getattr(self["linear"], key)
        return super().__getattr__(key)

    def delta(self) -> mx.array:
        return self._scale * (self.lora_b @ self.lora_a)


class LoRAEmbedding(LowRank):
    """LoRA on an embedding, which may also be the output head."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(scale, dropout)
        count, dims = dense_weight(base).shape
        self.embedding = base
        bound = 1 / math.sqrt(count)
        self.lora_a = mx.random.uniform(-bound, bound, (count, rank))
        self.lora_b = mx.zeros((rank, dims))

    def __call__(self, ids: mx.array) -> mx.array:
        update = self._scale * self.dropout(self.lora_a[ids] @ self.lora_b)
        if self.form is not None:
            return _straight(self.rounded()(ids), update)
        y = self.embedding(ids)
        return y + update.astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        if self.form is not None:
            return _straight(self.rounded().as_linear(x), self._product(mx.stop_gradient(x)))
        return self.embedding.as_linear(x) + self._product(x)

    def _product(self, x: mx.array) -> mx.array:
        """Compute the update's part of the logits."""
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        return ((self.dropout(x) @ b.T) * self._scale.astype(x.dtype)) @ a.T

    @property
    def weight(self) -> mx.array:
        """The adapted weight, (tokens, D), without dropout, for architectures whose output layer reads it (minicpm)."""
        if self.form is not None:
            return _straight(dense_weight(self.rounded()), self.delta())
        weight = dense_weight(self.embedding)
        return weight + self.delta().astype(weight.dtype)

    def delta(self) -> mx.array:
        return self._scale * (self.lora_a @ self.lora_b)


def shift(layer: LowRank) -> mx.array:
    """Return what fusing adds to the base's weight before any rounding, float32, with DoRA's rescaling."""
    if "m" not in layer:
        return layer.delta()
    return layer.adapted_weight(exact=True) - dense_weight(layer.base, exact=True)


def adaptable(module: nn.Module) -> bool:
    """Return whether a low-rank layer can wrap `module`."""
    # mlx-lm's fused layers are linear layers with several outputs; they can be recognised by their own `to_lora`.
    return isinstance(module, LINEAR + SWITCH + EMBEDDING) and not hasattr(module, "to_lora")


def wrap(module: nn.Module, rank: int, scale: float, dropout: float, dora: bool) -> LowRank:
    """Return the low-rank layer for `module`; `dora` is for linear layers."""
    if isinstance(module, LINEAR):
        return LoRALinear(module, rank, scale, dropout, dora)
    assert not dora, "select_targets refuses DoRA elsewhere"
    kind = LoRASwitchLinear if isinstance(module, SWITCH) else LoRAEmbedding
    return kind(module, rank, scale, dropout)


def plain_layer(base: nn.Module, weight: mx.array) -> nn.Module:
    """Return an unquantised layer with `weight` and the base's bias."""
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


# --- stand-ins --------------------------------------------------------------------------------------------------------
# Layers of a model replaced for a while, such as packed ones by dense ones.


def low_rank_of(model: nn.Module) -> dict[str, LowRank]:
    """Return path -> layer of all low-rank layers."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LowRank)}


def standins(model: nn.Module, forms: Mapping[str, WeightForm]) -> dict[str, nn.Module]:
    """Return the fused layers in these forms, each computed at each use."""

    def standin(layer: LowRank, form: WeightForm) -> Standin:
        return Standin(layer.base, lambda: dense_weight(form.layer(layer)))

    return {path: standin(layer, forms[path]) for path, layer in low_rank_of(model).items() if path in forms}


class Standin(nn.Module):
    """Replaces the layer `base` by one whose dense weight is computed at each use, so no second model is held."""

    def __init__(self, base: nn.Module, weight: Callable[[], mx.array]) -> None:
        super().__init__()
        self._now = lambda: plain_layer(base, weight())
        self._base = lambda: base
        if "bias" in base:
            self["bias"] = base["bias"]  # not by setattr, which would look it up in the base

    def __call__(self, *args: Any, **options: Any) -> mx.array:
        return self._now()(*args, **options)

    def as_linear(self, x: mx.array) -> mx.array:
        """Apply the embedding as the output layer."""
        return self._now().as_linear(x)

    def __getattr__(self, key: str) -> Any:
        if key == "weight":
            return self._now().weight
        return self[key] if key in self else getattr(self._base(), key)


@contextmanager
def standing_in(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace the modules at these paths inside the block."""
    modules = dict(model.named_modules())
    before = [(path, modules[path]) for path in layers]
    model.update_modules(tree_unflatten(list(layers.items())))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(before))


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Compute with dequantised weights inside the block.

    The function stays the same, all forms of a model are measured with the same arithmetic, and on a CPU it is 10
    times as fast as products of packed weights.
    """
    aware = standins(model, {path: m.form for path, m in low_rank_of(model).items() if m.form is not None})
    inside = tuple(f"{path}." for path in aware)
    packed = {
        path: Standin(m, partial(dense_weight, m))
        for path, m in model.named_modules()
        if isinstance(m, QUANTIZED) and not path.startswith(inside)
    }
    with standing_in(model, packed | aware):
        yield


class Recorder(nn.Module):
    """Stands in for a layer, and shows its inputs, and the experts that get them, to a function."""

    def __init__(self, layer: nn.Module, see: Callable[..., None]) -> None:
        super().__init__()
        self._layer, self._see = lambda: layer, see

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
        self._see(x, *args)
        return self._layer()(x, *args, **options)

    def __getattr__(self, key: str) -> Any:
        return getattr(self._layer(), key)


# --- inputs -----------------------------------------------------------------------------------------------------------
# The directions in which a layer's inputs are strong, and how biases of groups correct a rounded weight along them.
#
# An error E (out, in) of a weight adds E x to the output, of mean square trace(E M E^T) with M the mean of x x^T. M is
# close to a multiple of F F^T + I with F (in, 8), since few directions hold most of the square. Shifts t (out, groups)
# of the biases add t P^T, P (in, groups) being 1 where an input is in a group. The least trace is at
#
#     t = -m - (E - m P^T) F (P^T F)^T (g I + P^T F F^T P)^-1 = -m - (E - m P^T) F (g I + (P^T F)^T P^T F)^-1 (P^T F)^T
#
# with the group size g and each group's mean error m = E P / g. `measure_inputs` rotates F, which leaves F F^T as it
# is, so that (P^T F)^T P^T F is diagonal, and nothing is inverted here.

DIRECTIONS = 8
_SKETCHED = 64  # random directions, or twice the rank, from whose images the strong ones are found (Nystroem)
_LEAST_REST = 1e-7  # of the largest square, so that inputs of few dimensions divide by no zero


def _shifts(error: mx.array, directions: mx.array, group_size: int) -> mx.array:
    """Return shifts (..., out, groups) of the biases that correct an error (..., out, in) along directions (in, 8)."""
    grouped = error.reshape(*error.shape[:-1], -1, group_size)
    mean = grouped.mean(axis=-1, keepdims=True)
    left = (grouped - mean).reshape(error.shape) @ directions
    sums = directions.reshape(-1, group_size, DIRECTIONS).sum(axis=1)  # P^T F, (groups, 8)
    return -mean.squeeze(-1) - (left / (group_size + sums.square().sum(axis=0))) @ sums.T


class _Sketch:
    """Adds up x^T x of inputs (..., in) times random directions, and the squares of x."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.squares, self.random, self.images = mx.zeros(()), mx.zeros((1, 1)), mx.zeros((1, 1))

    def see(self, x: mx.array, *_: Any) -> None:
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        if self.random.size == 1:
            self.random = mx.random.normal((x.shape[-1], self.count), key=mx.random.key(0))
        self.squares = self.squares + rows.square().sum()
        self.images = self.images + rows.T @ (rows @ self.random)
        mx.eval(self.squares, self.images)

    @cached_property
    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """The strong directions (in, at most `count`), orthonormal, and the sum of squares of x along each."""
        images, drawn = (np.array(each).astype(np.float64) for each in (self.images, self.random))
        values, vectors = np.linalg.eigh((drawn.T @ images + images.T @ drawn) / 2)
        kept = values > 1e-7 * values[-1]
        found, squares, _ = np.linalg.svd(images @ (vectors[:, kept] / np.sqrt(values[kept])), full_matrices=False)
        return found, np.square(squares)

    def directions(self, group_size: int) -> mx.array:
        """Return F, (in, 8) float32."""
        found, squares = self.found
        strength, total = squares[:DIRECTIONS], float(self.squares)
        rest = max((total - strength.sum()) / max(len(found) - DIRECTIONS, 1), _LEAST_REST * total)
        strong = np.zeros((len(found), DIRECTIONS))
        strong[:, : len(strength)] = found[:, :DIRECTIONS] * np.sqrt(strength / rest)
        sums = strong.reshape(-1, group_size, DIRECTIONS).sum(axis=1)
        return mx.array((strong @ np.linalg.svd(sums.T @ sums)[0]).astype(np.float32))

    def projected(self, factor: mx.array) -> mx.array:
        """Project rows (..., in) on the strong directions, scaled so that their products with x stay as large."""
        found, squares = self.found
        basis, share = mx.array(found.astype(np.float32)), squares.sum() / max(float(self.squares), 1e-30)
        return (factor @ basis) @ basis.T / math.sqrt(share) if share else factor


def bias_group(layer: LowRank) -> int | None:
    """Return the size of the groups that have a bias each where a layer is rounded; None if it has no such groups."""
    form = layer.form or form_of(layer.base, 3)  # whatever the mode of the base: a form of other bits is affine
    return form.group_size if form is not None and form.mode == "affine" and "embedding" not in layer else None


def measure_inputs(model: nn.Module, rows: Iterable[list[int]], begin: bool = False) -> None:
    """Note in a model's low-rank layers in which directions their inputs are strong, for `WeightForm.rounded`.

    Layers that know theirs keep them.

    Args:
        rows: ids of some texts.
        begin: let A of an update that is still zero begin within the strong directions. A part of it along which inputs
            are weak would add little to an update's effect, and as much as any other to the noise of its rounding.
    """
    layers = {path: m for path, m in low_rank_of(model).items() if bias_group(m)}
    unknown = {path: m for path, m in layers.items() if INPUTS not in m or not mx.any(m[INPUTS]).item()}
    sketches = {path: _Sketch(max(_SKETCHED, 2 * m.lora_a.shape[1] if begin else 0)) for path, m in unknown.items()}
    if not sketches:
        return
    with probing(model), unpacked(model):
        modules = dict(model.named_modules())
        with standing_in(model, {path: Recorder(modules[path], sketch.see) for path, sketch in sketches.items()}):
            for ids in rows:
                mx.eval(model(mx.array(ids)[None]))
    for path, sketch in sketches.items():
        if sketch.random.size > 1:  # or the model never calls the layer
            layer = layers[path]
            layer[INPUTS] = sketch.directions(cast(int, bias_group(layer)))
            layer.freeze(recurse=False, keys=[INPUTS])
            if begin and not mx.any(layer.lora_b).item():
                turned = isinstance(layer, LoRALinear)  # its A is (in, rank), that of experts (experts, rank, in)
                factor = sketch.projected(layer.lora_a.T if turned else layer.lora_a)
                layer.lora_a = factor.T if turned else factor


# --- routers ----------------------------------------------------------------------------------------------------------
# Routers of mixtures of experts: which layers they are, and their choices while a model runs.

# Names of the router in mlx-lm's mixtures; gate_proj and shared_expert_gate are other layers.
_NAMES = ("gate", "router")
# Files of mlx-lm whose routers choose experts by a softmax over all of them, and are balanced by nothing else.
SOFTMAX = (
    *("deepseek", "deepseek_v2", "gemma4_text", "gpt_oss", "granitemoe", "granitemoehybrid", "hunyuan", "jamba"),
    *("mellum", "mixtral", "olmoe", "phimoe", "phixtral", "qwen2_moe", "qwen3_moe", "qwen3_next"),
)

Masks = Mapping[tuple[int, ...], mx.array]


class _Watch(NamedTuple):
    """What is collected: masks by the shape (B, T) of a call, and block -> the (2, E) sums of its router."""

    masks: Masks
    seen: dict[str, mx.array]


_watch: _Watch | None = None


def is_router(path: str) -> bool:
    """Return whether a module, by its full name, is a router or part of one."""
    return any(part in _NAMES for part in path.split("."))


@contextmanager
def watching(masks: Masks | None) -> Iterator[dict[str, mx.array]]:
    """Collect the routers' choices inside the block, in training mode, in a model prepared by `watch_routers`.

    Args:
        masks: (B, T) -> a mask of that shape, 1 where a token is real. None: nothing is collected.
    Yields:
        Block -> (2, E) float32, sums over the real tokens: how often each expert was chosen, and its probability. The
        gradient flows through the second.
    """
    global _watch
    before, _watch = _watch, None if masks is None else _Watch(masks, {})
    try:
        yield {} if _watch is None else _watch.seen
    finally:
        _watch = before


def _collect(seen: Mapping[str, mx.array]) -> None:
    if _watch is not None:
        for name, sums in seen.items():
            _watch.seen[name] = _watch.seen[name] + sums if name in _watch.seen else sums


def watch_routers(model: nn.Module, setting: str) -> None:
    """Let `watching` collect the choices of a model's routers; call it before its blocks are checkpointed.

    Raises:
        ConfigError: it has no routers, or their balance is not that of a softmax; the message names `setting`.
    """
    modules = dict(model.named_modules())
    kinds = {_file_of(m) for m in modules.values() if isinstance(m, nn.Module) and any(n in m for n in _NAMES)}
    if not kinds:
        raise ConfigError(f"{setting}: this model has no routers to balance: it is not a mixture of experts")
    if wrong := sorted(kinds.difference(SOFTMAX)):
        raise ConfigError(
            f"{setting}: supports routers that choose by a softmax over all experts and are balanced by nothing else "
            f"({', '.join(SOFTMAX)}); those of {', '.join(wrong)} are not known to: leave it out"
        )
    for path, experts in modules.items():
        if not isinstance(experts, (SwitchGLU, SwitchMLP)):
            continue
        name = path
        while not any(n in modules[name] for n in _NAMES):
            name = name.rpartition(".")[0]
        block = modules[name]
        block._name, block._experts = name, path[len(name) + 1 :]
        block.__class__ = _watched(block.__class__)


def _file_of(module: nn.Module) -> str:
    return type(module).__module__.rpartition(".")[2]


@cache
def _watched(kind: type) -> type:
    """Return a subclass of a mixture's class that collects its router's logits and choices."""

    def call(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        if _watch is None or not self.training:  # a probe of the model runs in eval mode
            return kind.__call__(self, x, *args, **kwargs)
        logits, chosen = list[mx.array](), list[mx.array]()
        # The router is looked up at each call, because a role may have replaced it.
        (routers, name, router), (owner, inner, experts) = _at(self, _router_path(self)), _at(self, self._experts)

        def routed(x: mx.array, *args: Any, **kwargs: Any) -> Any:
            out = router(x, *args, **kwargs)
            logits.append(out if isinstance(router, (*LINEAR, LowRank)) else x @ router.weight.T)
            return out

        def expert(x: mx.array, indices: mx.array, *args: Any, **kwargs: Any) -> Any:
            chosen.append(indices)
            return experts(x, indices, *args, **kwargs)

        with intercepted(routers, name, routed), intercepted(owner, inner, expert):
            out = kind.__call__(self, x, *args, **kwargs)
        mask = _watch.masks[tuple(x.shape[:2])].reshape(-1).astype(mx.float32)
        _collect({self._name: _sums(logits[0], chosen[0], mask)})
        return out

    return type(kind.__name__, (kind,), {"__call__": call})


def _at(block: nn.Module, path: str) -> tuple[Any, str, Any]:
    """Return the owner, the name and the layer at a path within a block."""
    *parents, name = path.split(".")
    owner: Any = block
    for part in parents:
        owner = owner[part]
    return owner, name, owner[name]


def _router_path(block: nn.Module) -> str:
    """Return the path of the layer that computes a router's logits within its block."""
    # The router is a linear layer, or contains one, or neither.
    name = next(n for n in _NAMES if n in block)
    linear = (p for p, m in block[name].named_modules() if isinstance(m, (*LINEAR, LowRank)))
    inner = min(linear, key=len, default="")
    return f"{name}.{inner}" if inner else name


def _sums(logits: mx.array, chosen: mx.array, mask: mx.array) -> mx.array:
    """Return (2, E) sums from (..., E) logits, (..., k) indices of the chosen experts, and a mask of the N tokens."""
    count = logits.shape[-1]
    chosen = mx.stop_gradient(chosen).reshape(len(mask), -1)
    often = mx.zeros(count).at[chosen.reshape(-1)].add(mx.repeat(mask, chosen.shape[1]))
    shares = mx.softmax(logits.reshape(len(mask), count).astype(mx.float32), axis=-1)
    return mx.stack([mx.stop_gradient(often), (shares * mask[:, None]).sum(axis=0)])


class _StandIn:
    """A substitute for a layer: calls `call`, and is the layer in everything else."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        self._layer, self._call = layer, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


@contextmanager
def intercepted(owner: nn.Module, name: str, call: Callable[..., Any]) -> Iterator[None]:
    """Let a model call `call` instead of its layer `name` of `owner` inside the block."""
    layer = owner[name]
    # Without nn.Module's own setter, which would change what counts as its parameters.
    dict.__setitem__(owner, name, _StandIn(layer, call))
    try:
        yield
    finally:
        dict.__setitem__(owner, name, layer)


# --- noise ------------------------------------------------------------------------------------------------------------


def token_embedding(model: nn.Module) -> nn.Module:
    """Return the layer that embeds a model's tokens: the first that is called with their ids, in a trial.

    Raises:
        ConfigError: none is.
    """
    ids, found = mx.array([[0, 0]]), list[nn.Module]()

    def watched(layer: nn.Module) -> Callable[..., mx.array]:
        def call(given: mx.array, *args: Any) -> mx.array:
            found.extend([layer] if given.shape == ids.shape else [])
            return layer(given, *args)

        return call

    with probing(model), ExitStack() as stack:
        for owner in list(model.modules()):
            for name, layer in list(owner.items()):
                if isinstance(layer, (*EMBEDDING, LoRAEmbedding)) and not isinstance(owner, LoRAEmbedding):
                    stack.enter_context(intercepted(owner, name, watched(layer)))
        model(ids)
    if not found:
        raise ConfigError("tune.neftune: this model has no layer of its own that embeds tokens; leave it out")
    return found[0]


@contextmanager
def noisy_embedding(embedding: nn.Module, alpha: float, lengths: mx.array) -> Iterator[None]:
    """Add noise to what an embedding returns in training mode inside the block (NEFTune, Jain et al. 2023).

    Uniform in +-alpha / sqrt(L D), L the tokens of a row and D the embedding's width. It is drawn from the global
    generator, once: an embedding stands before the blocks, which gradient checkpointing computes again.

    Args:
        lengths: (B, T) L of each token's row, for ids of this shape.
    """
    kind = type(embedding)

    def call(self: nn.Module, ids: mx.array) -> mx.array:
        out = kind.__call__(self, ids)
        if not self.training:  # a probe of the model
            return out
        bound = alpha / mx.sqrt(lengths[..., None] * out.shape[-1])
        return out + (bound * mx.random.uniform(-1, 1, out.shape)).astype(out.dtype)

    # Not a stand-in: the head may read the embedding's weight, and the update of parameters goes through it.
    embedding.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    try:
        yield
    finally:
        embedding.__class__ = kind


# --- memory -----------------------------------------------------------------------------------------------------------


@cache
def _checkpointed(kind: type) -> type:
    """Return a subclass of a layer's class that keeps only its inputs, and computes again for the gradient.

    A class may say itself how, by a method `recomputed` that is used as `mx.checkpoint`.
    """

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return kind.__call__(self, *args, **kwargs)

        # For the gradient it is called again, when the block may have another role and nobody watches.
        own, masks, calls = _contents(self), None if _watch is None else _watch.masks, count()

        def inner(params: Any, drawn: mx.array, *inputs: Any, **named: Any) -> Any:
            before = _contents(self)
            _put(own)
            try:
                self.update(params)
                with again(drawn) if next(calls) else nullcontext(), watching(masks) as seen:
                    return kind.__call__(self, *inputs, **named), seen
            finally:
                _put(before)  # removes tracers, and restores the role

        # As an argument, the position makes dropout masks wait until the block's output exists.
        recomputed = self.recomputed(inner) if hasattr(kind, "recomputed") else mx.checkpoint(inner)
        out, seen = recomputed(self.trainable_parameters(), position(), *args, **kwargs)
        _collect(seen)
        return out

    return type(kind.__name__, (kind,), {"__call__": call, "checkpointed": kind})


def _contents(part: Any) -> list[tuple[Any, Any]]:
    """Return a module and every part of it that holds parameters or modules, each with what it holds now."""
    held = list(part) if isinstance(part, list) else dict(part)
    found = [(part, held)]
    for child in held if isinstance(held, list) else held.values():
        if isinstance(child, (dict, list)):
            found += _contents(child)
    return found


def _put(contents: list[tuple[Any, Any]]) -> None:
    """Restore contents that `_contents` returned."""
    for part, held in contents:
        if isinstance(part, list):
            part[:] = held
        else:  # past the module's own setters
            dict.clear(part)
            dict.update(part, held)


def checkpoint_layers(model: nn.Module, on: bool = True) -> None:
    """Switch gradient checkpointing of the model's blocks on or off; other models of the same classes are not affected.

    Each block becomes an instance of a subclass of its own class, so blocks may have different classes.
    """
    repeatable(model)
    for layer in model.layers:
        kind = getattr(type(layer), "checkpointed", None)
        if on and kind is None:
            layer.__class__ = _checkpointed(layer.__class__)
        elif not on and kind is not None:
            layer.__class__ = kind


def is_checkpointed(model: nn.Module) -> bool:
    """Return whether the model's blocks are checkpointed."""
    return all(hasattr(type(layer), "checkpointed") for layer in model.layers)


@contextmanager
def limits(limit_gb: float | None, cache_gb: float | None) -> Iterator[None]:
    """Limit MLX's memory inside the block; enter it once the weights are loaded.

    The memory limit makes MLX wait for running work before it allocates more, and return freed buffers that it keeps
    for reuse; a limit of these alone would make it allocate again in each step. The wired limit keeps weights resident
    on Metal.
    """
    limit = usable_bytes(limit_gb)
    before = [(mx.set_memory_limit, mx.set_memory_limit(limit))]
    if cache_gb is not None:
        before.append((mx.set_cache_limit, mx.set_cache_limit(int(cache_gb * 1e9))))
    if backend() == "metal":
        before.append((mx.set_wired_limit, mx.set_wired_limit(min(limit, usable_bytes()))))
    try:
        yield
    finally:
        for restore, value in before:
            restore(value)
