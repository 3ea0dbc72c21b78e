"""Faster operations for CPUs, computed only there, and the gated delta rule by chunks."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from types import ModuleType
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxft.device import planned_backend

# --- delta ------------------------------------------------------------------------------------------------------------
# The gated delta rule (Yang et al. 2024, "Gated Delta Networks") a chunk of tokens at a time.
#
# mlx-lm trains these layers by a Python loop over tokens: some 90 operations per token and layer, with several states
# per token kept for the gradient. Within a chunk of C tokens the rule is linear algebra: a layer takes T / C steps.

CHUNK = 64  # tokens; a chunk's matrices have CHUNK x CHUNK numbers per head
CHUNK_BY_CHANNEL = 16  # where each channel has its own decay they have CHUNK x CHUNK x Dk
_LEAST = 1e-30  # smallest decay, because its logarithm is taken
_FUSED = {(24, 24), (32, 32), (16, 16), (16, 32), (16, 48), (16, 64)}  # (Hk, Hv) of Metal's kernel


def gated_delta(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: Any = None, mask: Any = None
) -> tuple[mx.array, mx.array]:
    """Read a sequence by the gated delta rule; replaces mlx-lm's `gated_delta_ops`.

    For each token: S <- S * g;  S <- S + beta (v - S k) k^T;  y = S q. Sums are in float32.

    Args:
        q, k: (B, T, Hk, Dk).  v: (B, T, Hv, Dv), where Hk divides Hv.
        g: decay of a head (B, T, Hv) or of each channel (B, T, Hv, Dk), above 0 and at most 1.
        beta: (B, T, Hv).
        state: S before the first token, (B, Hv, Dv, Dk) float32; None: zeros.
        mask: (B, T) bool; tokens where it is false leave S unchanged, and their outputs mean nothing.
    Returns:
        y, (B, T, Hv, Dv) of q's type, and S after the last token, float32.
    """
    b, length, heads, width = *v.shape[:3], q.shape[3]
    has_kernel = q.shape[3] == v.shape[3] == 128 and (q.shape[2], v.shape[2]) in _FUSED
    if mask is None and g.ndim == 3 and has_kernel and planned_backend() == "metal":
        return tuple(mx.fast.gated_delta_update(q, k, v, g, beta, state))
    if mask is not None:
        g = mx.where(mask.reshape(b, length, *[1] * (g.ndim - 2)), g, 1.0)
        beta = mx.where(mask[..., None], beta, 0.0)
    chunk = min(CHUNK if g.ndim == 3 else CHUNK_BY_CHANNEL, length)
    repeats = heads // q.shape[2]
    log_g = mx.log(mx.maximum(g.astype(mx.float32), _LEAST))
    parts = [_chunks(x, chunk) for x in (q, k, v, beta[..., None], log_g if g.ndim == 4 else log_g[..., None])]
    queries, keys, values, rates, decays = (mx.repeat(p, repeats, 2) if i < 2 else p for i, p in enumerate(parts))
    # Within a chunk, without the S before it: row i decays what row j wrote by the decays of the rows after j.
    row, column = np.ogrid[:chunk, :chunk]
    later, seen = mx.array(row > column), mx.array(row >= column)[..., None]
    between = mx.cumsum(mx.where(later[..., None], decays[..., None, :], 0.0), axis=-3)  # (..., i, j, 1 or Dk)
    fading = mx.exp(mx.where(seen, between, -mx.inf))
    since = mx.cumsum(decays, axis=-2)  # from the chunk's beginning to row i
    overlaps = _products(keys, keys, fading)
    inverse = _inverse(mx.where(later, rates * overlaps, 0.0))
    # What each row writes: from its own value, and from what the S before the chunk has at its key.
    own, through = inverse @ (rates * values), inverse @ (rates * keys * mx.exp(since))
    rest = (keys * mx.exp(mx.cumsum(decays, axis=-2, reverse=True, inclusive=False))).swapaxes(-1, -2)
    whole = mx.exp(since[..., -1:, :]).swapaxes(-1, -2)  # (..., 1 or Dk, 1)
    turned = mx.zeros((b, heads, width, v.shape[3])) if state is None else state.astype(mx.float32).swapaxes(-1, -2)
    s, before, written = turned[None], [], []
    for mine, by_s, fades, kept in zip(*(mx.split(x, x.shape[0]) for x in (own, through, whole, rest))):
        before.append(s)
        written.append(mine - by_s @ s)
        s = s * fades + kept @ written[-1]
    read = (queries * mx.exp(since)) @ mx.concatenate(before)
    y = read + _products(queries, keys, fading) @ mx.concatenate(written)
    y = y.transpose(1, 0, 3, 2, 4).reshape(b, -1, heads, v.shape[3])[:, :length]
    return y.astype(q.dtype), s[0].swapaxes(-1, -2)


def _chunks(x: mx.array, size: int) -> mx.array:
    """Split (B, T, H, D) into (T / size, B, H, size, D) float32; the zeros of the padding write nothing and keep S."""
    b, length, heads, width = x.shape
    x = mx.pad(x.astype(mx.float32), [(0, 0), (0, -length % size), (0, 0), (0, 0)])
    return x.reshape(b, -1, size, heads, width).transpose(1, 0, 3, 2, 4)


def _products(a: mx.array, b: mx.array, fading: mx.array) -> mx.array:
    """Return (..., i, j), a_i times b_j with the decay between them; fading is (..., i, j, 1 or Dk)."""
    if fading.shape[-1] == 1:
        return (a @ b.swapaxes(-1, -2)) * fading[..., 0]
    return ((a[..., :, None, :] * fading) * b[..., None, :, :]).sum(axis=-1)


def _inverse(a: mx.array) -> mx.array:
    """Return (I + a)^-1 of a strictly lower triangular a, (..., C, C).

    Two inverted diagonal blocks make one of twice the size. It is as stable as forward substitution; powers of `a` are
    not when keys are similar.
    """
    still = mx.stop_gradient(a)
    row, column = np.ogrid[: a.shape[-1], : a.shape[-1]]
    out, half = mx.array(np.eye(a.shape[-1], dtype=np.float32)), 1
    while half < a.shape[-1]:
        joint = (row // (2 * half) == column // (2 * half)) & (row // half % 2 > column // half % 2)
        out = out - out @ mx.where(mx.array(joint), still, 0.0) @ out
        half *= 2
    # a - still is zero: the term keeps the value and adds the gradient, -out^T G out^T.
    return out - out @ (a - still) @ out


# --- cpu --------------------------------------------------------------------------------------------------------------

LOG2E = math.log2(math.e)
_BLOCK = 64  # queries of one attention block
_HIDDEN = -1e30  # a masked score; finite, so that a row that sees nothing does not become NaN
_T = TypeVar("_T")


def on_cpu() -> bool:
    """Return whether to use the CPU's faster operations: new arrays are computed there and MLXFT_CPU is not off."""
    return planned_backend() == "cpu" and os.environ.get("MLXFT_CPU") != "off"


def exp(x: mx.array) -> mx.array:
    """Compute e^x of float32 by the device's faster operation."""
    return mx.power(2.0, x * LOG2E) if on_cpu() else mx.exp(x)


def logsumexp(x: mx.array) -> mx.array:
    """Compute log(sum(e^x)) over the last axis, float32."""
    if not on_cpu():
        return mx.logsumexp(x, axis=-1)
    largest = mx.stop_gradient(x.max(axis=-1, keepdims=True))
    return mx.log(exp(x - largest).sum(axis=-1)) + largest.squeeze(-1)


def cross_entropy(logits: mx.array, labels: mx.array) -> mx.array:
    """Return -log softmax of (n, V) logits at (n,) labels as (n,) float32, by the fused kernel where there is one."""
    if on_cpu():
        logits = logits.astype(mx.float32)
        return logsumexp(logits) - mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    # The kernels sum in float32; a CPU sums in the input's type.
    return mx.fast.cross_entropy(logits.astype(mx.float32) if planned_backend() == "cpu" else logits, labels)


def as_trained(read: Callable[[], _T]) -> _T:
    """Return what `read` returns, computed by the kernels that training uses.

    MLX uses other attention kernels while a gradient is traced (depending on the mask, the heads' width and, on CUDA,
    the number of tokens); in bfloat16 their log-probabilities differ by up to 0.3 nats. Numbers that training compares
    with its own (a reference's, a rollout's) must come from the same kernels.
    """
    found: list[_T] = []

    def inside(x: mx.array) -> mx.array:
        found.append(read())
        return x

    mx.vjp(inside, [mx.array(0.0)], [mx.array(0.0)])
    return found[0]


@partial(mx.compile, shapeless=True)
def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    # Bounded, because an infinite power has a gradient of NaN; beyond the bound the sigmoid is below 1e-18.
    return gate * x / (1.0 + mx.power(2.0, mx.minimum(-LOG2E * gate, 60.0)))


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Compute silu(gate) * x (Shazeer 2020) of two arrays of one shape."""
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
    """Compute softmax attention as mlx-lm's models call it; pass what is not covered on to mlx-lm's own.

    It works in blocks of queries, so that the causal mask leaves later keys out instead of hiding them.

    Args:
        queries: (B, H, T, D).  keys: (B, G, S, D), values: (B, G, S, E), where G divides H.
        mask: "causal", boolean (T, S) or (B, 1, T, S), or None.
    """
    plain = queries.dtype != mx.float32 or sinks is not None or hasattr(cache, "bits")
    if plain or not _covered(mask, queries.shape[2], keys.shape[2]):
        return _mlx_lm("base").scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    b, heads, length, _ = queries.shape
    groups, hiding = keys.shape[1], _hiding(mask, queries.shape[2])
    outs: list[mx.array] = []
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        end = stop if isinstance(mask, str) else keys.shape[2]
        # Heads that share keys become rows of one product.
        rows = queries[:, :, start:stop].reshape(b, groups, -1, queries.shape[-1]) * (scale * LOG2E)
        if outs:  # one block at a time; otherwise MLX would hold the scores of all
            (rows,) = mx.depends([rows], [mx.stop_gradient(outs[-1])])
        scores = rows @ keys[:, :, :end].swapaxes(-1, -2)
        if hiding is not None:
            split = scores.reshape(b, groups, -1, stop - start, end)
            scores = (split + hiding[..., start:stop, :end]).reshape(scores.shape)
        # Divide after the product, so that the gradient needs no other array of this size than the powers.
        powers = mx.power(2.0, scores - mx.stop_gradient(scores.max(axis=-1, keepdims=True)))
        out = (powers @ values[:, :, :end]) / powers.sum(axis=-1, keepdims=True)
        outs.append(out.reshape(b, heads, stop - start, -1))
    return mx.concatenate(outs, axis=2)


def _hiding(mask: mx.array | str | None, length: int) -> mx.array | None:
    """Return what is added to scores, 0 where a key is seen. The gradient of an addition costs nothing."""
    if mask is None:
        return None
    if isinstance(mask, str):
        mask = mx.arange(length)[None] <= mx.arange(length)[:, None]
    hiding = mx.where(mask, 0.0, _HIDDEN)
    return hiding if hiding.ndim == 2 else hiding[:, :, None]


def _covered(mask: mx.array | str | None, queries: int, keys: int) -> bool:
    if queries == 1:  # one token after many, where blocks gain nothing
        return False
    if isinstance(mask, mx.array):
        return mask.dtype == mx.bool_ and (mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1] == 1))
    return mask is None or queries == keys


def _mlx_lm(name: str) -> ModuleType:
    return importlib.import_module(f"mlx_lm.models.{name}")


def gated_delta_update(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    **own: Any,
) -> tuple[mx.array, mx.array]:
    """Apply `gated_delta` as mlx-lm's layers call it; a single token is passed on to mlx-lm's own."""
    theirs = _mlx_lm("gated_delta")
    if q.shape[1] == 1:
        own |= {"lower_bound": lower_bound, "allow_neg_eigval": allow_neg_eigval}
        return cast(Any, theirs.gated_delta_update(q, k, v, a, b, A_log, dt_bias, state, mask, **own))
    beta = mx.sigmoid(b) * (2.0 if allow_neg_eigval else 1.0)
    if lower_bound is None:
        g = theirs.compute_g(A_log, a, dt_bias)
    else:
        g = theirs.compute_lower_bound_g(A_log, a, dt_bias, lower_bound)
    return gated_delta(q, k, v, g, beta, state, mask)


def quicker(model: nn.Module) -> AbstractContextManager[None]:
    """Let the model's own code call the functions above inside the block, where they suit the device."""
    classes = {kind.__module__ for part in model.modules() for kind in type(part).__mro__}
    modules = [sys.modules[name] for name in sorted(classes) if name.startswith("mlx_lm.models.")]
    replaced: list[tuple[ModuleType, str, Any]] = []
    for name, home, function in (*DELTA, *(OURS if on_cpu() else ())):
        theirs = getattr(_mlx_lm(home), name)
        replaced += [(module, name, function) for module in modules if getattr(module, name, None) is theirs]
    for module in modules:
        if module.__name__.rpartition(".")[2] in INDICES:
            replaced.append((module, "mx", _constant_indices()))
    return patched(replaced)


@contextmanager
def patched(replaced: Iterable[tuple[ModuleType, str, Any]]) -> Iterator[None]:
    """Set attributes of modules, given as (module, name, value), inside the block."""
    replaced = list(replaced)
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


# On every device mlx-lm 0.32 trains the delta rule by a loop over tokens.
DELTA = (("gated_delta_update", "gated_delta", gated_delta_update),)
# Files of mlx-lm 0.32 that differentiate the indices of the chosen experts, which have no gradient.
INDICES = ("deepseek_v41",)
OURS = (("swiglu", "activations", swiglu), ("scaled_dot_product_attention", "base", attention))


@cache
def _constant_indices() -> ModuleType:
    """Return a copy of mlx.core whose `argpartition` is a constant of the gradient."""
    ours = ModuleType("mlx.core")
    vars(ours).update(vars(mx))
    ours.argpartition = lambda *a, **k: mx.stop_gradient(mx.argpartition(*a, **k))  # type: ignore[attr-defined]
    return ours
