"""Stand-ins for what a GPU computes in one kernel, so that a step's graph can be had and planned on any machine.

MLX's exporter does not know the gradients of these kernels, and on a CPU they are many operations. A stand-in computes
something else of the same shapes: what it keeps for its gradient, and what it makes, is as much as the kernel's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlxft.device import Backend, backend

HEADS = (64, 72, 80, 96, 128, 192, 256)  # widths of the heads whose attention is fused for a gradient too (MLX 0.32)
CUDA_TOKENS = 128  # there only for a multiple of so many queries


def _sum(x: mx.array) -> mx.array:
    """(B, H, T, D) -> (B, H, 1, 1), which needs x for its gradient."""
    return mx.square(x).sum(axis=(-2, -1), keepdims=True)


def _as_wide(x: mx.array, width: int) -> mx.array:
    return x[..., :width] if width <= x.shape[-1] else mx.concatenate([x] * -(-width // x.shape[-1]), -1)[..., :width]


def plain_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    **other: Any,
) -> mx.array:
    """Attention in the operations that MLX takes where it has no kernel for it; arguments as of mx.fast's."""
    dtype = mx.result_type(q, k, v)
    q, k, v = q.astype(dtype) * mx.array(scale, dtype), k.astype(dtype), v.astype(dtype)
    groups, repeats = k.shape[1], q.shape[1] // k.shape[1]
    queries, keys = q.shape[2], k.shape[2]
    if isinstance(mask, mx.array):
        mask = mx.broadcast_to(mask, (*q.shape[:3], keys))
        mask = mask if repeats == 1 else mx.unflatten(mask, 1, (groups, repeats))
    elif mask is not None:  # "causal" is the only one that there is
        mask = mx.arange(keys - queries, keys)[:, None] >= mx.arange(keys)[None]
    if repeats > 1:
        q, k, v = mx.unflatten(q, 1, (groups, repeats)), mx.expand_dims(k, 2), mx.expand_dims(v, 2)
    scores = q @ k.swapaxes(-1, -2)
    if mask is not None:
        hidden = mx.array(mx.finfo(dtype).min, dtype)
        scores = mx.where(mask, scores, hidden) if mask.dtype == mx.bool_ else scores + mask.astype(dtype)
    if sinks is not None:  # one more column, seen by all
        column = mx.expand_dims(sinks.astype(dtype), (0, 2, 3))
        column = column if repeats == 1 else mx.unflatten(column, 1, (groups, repeats))
        scores = mx.concatenate([mx.broadcast_to(column, (*scores.shape[:-1], 1)), scores], axis=-1)
    weights = mx.softmax(scores, axis=-1, precise=True)
    out = (weights if sinks is None else weights[..., 1:]) @ v
    return out if repeats == 1 else mx.flatten(out, 1, 2)


def _attention(kind: Backend, plain: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def attention(
        q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, sinks: Any = None, **how: Any
    ) -> mx.array:
        fused = sinks is None and not isinstance(mask, mx.array) and {q.shape[-1], v.shape[-1]} <= set(HEADS)
        if not fused or (kind == "cuda" and q.shape[2] % CUDA_TOKENS):
            return plain(q, k, v, mask=mask, sinks=sinks, **how)
        factor = mx.repeat(_sum(k) * _sum(v), q.shape[1] // k.shape[1], axis=1)
        return mx.exp(_as_wide(q, v.shape[-1]) * factor)  # whose gradient needs the output, as the kernel's does

    return attention


def _cross_entropy(logits: mx.array, targets: mx.array, **other: Any) -> mx.array:
    return mx.logsumexp(logits, axis=-1).astype(mx.float32)  # its gradient is as large as the logits, and of their type


def _plain_cross_entropy(logits: mx.array, targets: mx.array, **other: Any) -> mx.array:
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)


def _gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    gamma: mx.array,
    beta: mx.array,
    initial_state: mx.array | None = None,
    mask: mx.array | None = None,
    **other: Any,
) -> list[mx.array]:
    factor = mx.square(q).sum() * mx.square(k).sum() * mx.square(gamma).sum() * mx.square(beta).sum()
    y = mx.exp(v * factor.astype(v.dtype))
    b, _, heads, width = v.shape
    state = mx.zeros((b, heads, width, q.shape[-1])) if initial_state is None else initial_state
    return [y, state * y.sum()]


@contextmanager
def fused_on(kind: Backend) -> Iterator[None]:
    """Inside the block `mx.fast` stands for the kernels of this backend; nothing changes for a CPU's own."""
    theirs: dict[str, Callable[..., Any]] = {}
    if kind != "cpu":
        # What this machine has a kernel for is not what another has: where that has none, it is operations.
        plain = mx.fast.scaled_dot_product_attention if kind == backend() else plain_attention
        theirs["scaled_dot_product_attention"] = _attention(kind, plain)
        theirs["cross_entropy"] = _cross_entropy
    elif backend() != "cpu":
        theirs["scaled_dot_product_attention"] = plain_attention
        theirs["cross_entropy"] = _plain_cross_entropy
    if kind == "metal":
        theirs["gated_delta_update"] = _gated_delta
    before = {name: getattr(mx.fast, name) for name in theirs}
    for name, stand_in in theirs.items():
        setattr(mx.fast, name, stand_in)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(mx.fast, name, function)
