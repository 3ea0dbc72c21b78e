"""Attention and SwiGLU for MLX's CPU backend, where an exponential is the dearest operation of all.

`mx.exp` and what is made of it (softmax, sigmoid) take 12 to 18 ns an element there, two thirds of a training step in
float32; `mx.power(2, x)` takes 4 to 6. On a GPU nothing here is used.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

LOG2E = math.log2(math.e)
BLOCK = 64  # queries of one attention block
KEEP = 1024  # keys up to which a block's weights are kept for the gradient: computing them again is dearer
_HIDDEN = -1e30  # a masked score: finite, so that a row that sees nothing is no NaN


def on_cpu() -> bool:
    """Whether new arrays are computed by the CPU backend."""
    return mx.default_device().type == mx.DeviceType.cpu


def exp(x: mx.array) -> mx.array:
    """e^x of float32, by the quicker operation of the device."""
    return mx.power(2.0, x * LOG2E) if on_cpu() else mx.exp(x)


def logsumexp(x: mx.array) -> mx.array:
    """log of the sum of e^x over the last axis, float32."""
    if not on_cpu():
        return mx.logsumexp(x, axis=-1)
    largest = mx.stop_gradient(x.max(axis=-1, keepdims=True))
    return mx.log(exp(x - largest).sum(axis=-1)) + largest.squeeze(-1)


@partial(mx.compile, shapeless=True)
def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    # Bounded, or the gradient where the power is infinite is a NaN; beyond, the sigmoid is below 1e-18.
    return gate * x / (1.0 + mx.power(2.0, mx.minimum(-LOG2E * gate, 60.0)))


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x (Shazeer 2020), any one shape."""
    return _swiglu(gate, x) if gate.dtype == mx.float32 else _mlx_lm("activations").swiglu(gate, x)


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Softmax attention as mlx-lm's models call it; what is not covered here goes on to mlx-lm's own.

    A block of queries at a time, so that under the causal mask later keys are left out instead of being hidden. For
    long rows the gradient computes the weights again from their normaliser (Dao et al. 2022).

    Args:
        queries: (B, H, T, D).  keys: (B, G, S, D), values: (B, G, S, E), where G divides H.
        mask: "causal", boolean (T, S) or (B, 1, T, S), or None.
    """
    plain = queries.dtype != mx.float32 or sinks is not None or hasattr(cache, "bits")
    if plain or not _covered(mask, queries.shape[2], keys.shape[2]):
        return _mlx_lm("base").scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    blocks = _Blocks(scale, mask)

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, ...]:
        return blocks.forward(q, k, v)

    @attend.vjp
    def attend_vjp(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, ...]:
        return blocks.backward(*primals, cotangents[0], *outputs)

    return attend(queries, keys, values)[0]  # type: ignore[index]


def _covered(mask: mx.array | str | None, queries: int, keys: int) -> bool:
    if queries == 1:  # one token after many: a block would gain nothing
        return False
    if isinstance(mask, mx.array):
        return mask.dtype == mx.bool_ and (mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1] == 1))
    return mask is None or queries == keys


class _Blocks:
    """Attention by blocks of queries. Heads that share keys are rows of one product."""

    def __init__(self, scale: float, mask: mx.array | str | None) -> None:
        self.scale, self.mask = scale, mask

    def forward(self, q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, ...]:
        """Output (B, H, T, E), each query's normaliser (B, H, T) to base 2, and the weights of blocks that are kept."""
        outs, norms, kept = list[mx.array](), list[mx.array](), list[mx.array]()
        for start, stop, end in self._spans(q, k):
            rows = _after(_rows(q, k, start, stop), outs)
            scores = self._scores(rows, k, start, stop, end)
            largest = scores.max(axis=-1, keepdims=True)
            powers = mx.power(2.0, scores - largest)
            total = powers.sum(axis=-1, keepdims=True)
            weights = powers / total
            outs.append(weights @ v[:, :, :end])
            norms.append(largest + mx.log2(total))
            if end <= KEEP:
                kept.append(weights)
        return _join(outs, q), _join(norms, q).squeeze(-1), *kept

    def backward(
        self, q: mx.array, k: mx.array, v: mx.array, slope: mx.array, out: mx.array, norm: mx.array, *kept: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Gradients in q, k and v, from the output's and from what `forward` gave."""
        even = (slope * out).sum(axis=-1, keepdims=True)
        to_q, to_k, to_v = list[mx.array](), mx.zeros_like(k), mx.zeros_like(v)
        for number, (start, stop, end) in enumerate(self._spans(q, k)):
            rows, slopes, mean = (_rows(a, k, start, stop) for a in (q, slope, even))
            rows = _after(rows, [*to_q[-1:], to_k, to_v])
            if number < len(kept):
                weights = kept[number]
            else:
                largest = _rows(mx.expand_dims(norm, -1), k, start, stop)
                weights = mx.power(2.0, self._scores(rows, k, start, stop, end) - largest)
            inner = weights * (slopes @ v[:, :, :end].swapaxes(-1, -2) - mean) * self.scale
            to_q.append(inner @ k[:, :, :end])
            to_k = _add(to_k, inner.swapaxes(-1, -2) @ rows)
            to_v = _add(to_v, weights.swapaxes(-1, -2) @ slopes)
        return _join(to_q, q), to_k, to_v

    def _spans(self, q: mx.array, k: mx.array) -> Iterator[tuple[int, int, int]]:
        """Blocks of queries, and the key up to which they see."""
        length = q.shape[2]
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            yield start, stop, stop if isinstance(self.mask, str) else k.shape[2]

    def _scores(self, rows: mx.array, k: mx.array, start: int, stop: int, end: int) -> mx.array:
        scores = (rows * (self.scale * LOG2E)) @ k[:, :, :end].swapaxes(-1, -2)
        if self.mask is None:
            return scores
        if isinstance(self.mask, str):
            seen = mx.arange(end)[None] <= mx.arange(start, stop)[:, None]
        else:
            seen = self.mask[..., start:stop, :]
            seen = seen if seen.ndim == 2 else seen[:, :, None]
        b, groups, _, _ = scores.shape
        split = scores.reshape(b, groups, -1, stop - start, end)
        return mx.where(seen, split, _HIDDEN).reshape(scores.shape)


def _rows(a: mx.array, k: mx.array, start: int, stop: int) -> mx.array:
    """(B, H, T, D) -> (B, G, H/G * t, D): the queries of one block, by group of heads."""
    return a[:, :, start:stop].reshape(a.shape[0], k.shape[1], -1, a.shape[-1])


def _join(blocks: list[mx.array], q: mx.array) -> mx.array:
    """Blocks of `_rows` back as (B, H, T, D)."""
    b, heads = q.shape[:2]
    return mx.concatenate([block.reshape(b, heads, -1, block.shape[-1]) for block in blocks], axis=2)


def _after(rows: mx.array, done: list[mx.array]) -> mx.array:
    """`rows`, not before the last block is done: MLX would else compute all blocks at once."""
    return mx.depends([rows], done[-3:])[0] if done else rows


def _add(total: mx.array, part: mx.array) -> mx.array:
    """`part` added to the first positions of axis 2."""
    missing = total.shape[2] - part.shape[2]
    return total + (mx.pad(part, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else part)


def _mlx_lm(name: str) -> ModuleType:
    return importlib.import_module(f"mlx_lm.models.{name}")


@contextmanager
def quicker(model: nn.Module) -> Iterator[None]:
    """On the CPU, the model's own code calls the functions above inside the block; nothing changes elsewhere."""
    replaced: list[tuple[ModuleType, str, Any]] = []
    for name, home, function in OURS if on_cpu() else ():
        theirs = getattr(_mlx_lm(home), name)
        for module in _modules(model):
            if getattr(module, name, None) is theirs:
                replaced.append((module, name, theirs))
                setattr(module, name, function)
    try:
        yield
    finally:
        for module, name, theirs in replaced:
            setattr(module, name, theirs)


OURS = (("swiglu", "activations", swiglu), ("scaled_dot_product_attention", "base", attention))


def _modules(model: nn.Module) -> list[ModuleType]:
    """Those of mlx-lm's that define the model's layers."""
    classes = {kind for part in model.modules() for kind in type(part).__mro__}
    names = {kind.__module__ for kind in classes if kind.__module__.startswith("mlx_lm.models.")}
    return [sys.modules[name] for name in sorted(names)]
