"""The gated delta rule (Yang et al. 2024, "Gated Delta Networks") a chunk of tokens at a time.

mlx-lm trains these layers by a Python loop over tokens: some 90 operations a token and layer, with several states a
token kept for the gradient. Within a chunk of C tokens the rule is linear algebra, so that a layer takes T / C steps.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxft.device import planned_backend

CHUNK = 64  # tokens; a chunk's matrices have CHUNK x CHUNK numbers a head
CHUNK_BY_CHANNEL = 16  # where each channel decays by itself they have CHUNK x CHUNK x Dk
_LEAST = 1e-30  # of a decay: its logarithm is taken
_FUSED = {(24, 24), (32, 32), (16, 16), (16, 32), (16, 48), (16, 64)}  # (Hk, Hv) of Metal's kernel


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Read a sequence by the gated delta rule; as mlx-lm's `gated_delta_ops`, whose place it takes.

    For each token: S <- S * g;  S <- S + beta (v - S k) k^T;  y = S q. Sums are in float32.

    Args:
        q, k: (B, T, Hk, Dk).  v: (B, T, Hv, Dv), where Hk divides Hv.
        g: decay, of a head (B, T, Hv) or of each channel (B, T, Hv, Dk), above 0 and at most 1.
        beta: (B, T, Hv).
        state: S before the first token, (B, Hv, Dv, Dk) float32; None: zeros.
        mask: (B, T) bool; tokens that are not there leave S as it is, and what is given for them means nothing.
    Returns:
        y, (B, T, Hv, Dv) of q's type, and S behind the last token, float32.
    """
    b, length, heads, width = *v.shape[:3], q.shape[3]
    if mask is None and g.ndim == 3 and _is_fused(q, v):
        return tuple(mx.fast.gated_delta_update(q, k, v, g, beta, state))
    if mask is not None:
        g = mx.where(mask.reshape(b, length, *[1] * (g.ndim - 2)), g, 1.0)
        beta = mx.where(mask[..., None], beta, 0.0)
    chunk = min(CHUNK if g.ndim == 3 else CHUNK_BY_CHANNEL, length)
    repeats = heads // q.shape[2]
    log_g = mx.log(mx.maximum(g.astype(mx.float32), _LEAST))
    parts = [_chunks(x, chunk) for x in (q, k, v, beta[..., None], log_g if g.ndim == 4 else log_g[..., None])]
    queries, keys, values, rates, decays = (mx.repeat(p, repeats, 2) if i < 2 else p for i, p in enumerate(parts))
    # Within a chunk, S before it aside: row i decays what row j has written by the decays of the rows behind j.
    row, column = np.ogrid[:chunk, :chunk]
    later, seen = mx.array(row > column), mx.array(row >= column)[..., None]
    between = mx.cumsum(mx.where(later[..., None], decays[..., None, :], 0.0), axis=-3)  # (..., i, j, 1 or Dk)
    fading = mx.exp(mx.where(seen, between, -mx.inf))
    since = mx.cumsum(decays, axis=-2)  # from the chunk's begin to row i
    overlaps = _products(keys, keys, fading)
    inverse = _inverse(mx.where(later, rates * overlaps, 0.0))
    # What each row writes: by its own value, and by what S before the chunk has at its key.
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


def _is_fused(q: mx.array, v: mx.array) -> bool:
    """Whether Metal has a kernel for it, forward and backward."""
    return planned_backend() == "metal" and q.shape[3] == v.shape[3] == 128 and (q.shape[2], v.shape[2]) in _FUSED


def _chunks(x: mx.array, size: int) -> mx.array:
    """(B, T, H, D) -> (T / size, B, H, size, D) float32, filled up with zeros: which write nothing, and keep S."""
    b, length, heads, width = x.shape
    x = mx.pad(x.astype(mx.float32), [(0, 0), (0, -length % size), (0, 0), (0, 0)])
    return x.reshape(b, -1, size, heads, width).transpose(1, 0, 3, 2, 4)


def _products(a: mx.array, b: mx.array, fading: mx.array) -> mx.array:
    """(..., i, j): a_i times b_j, with what fades in between; fading (..., i, j, 1 or Dk)."""
    if fading.shape[-1] == 1:
        return (a @ b.swapaxes(-1, -2)) * fading[..., 0]
    return ((a[..., :, None, :] * fading) * b[..., None, :, :]).sum(axis=-1)


def _inverse(a: mx.array) -> mx.array:
    """(I + a)^-1 of a strictly lower triangular a, (..., C, C).

    Two diagonal blocks that are inverted make one of twice the size: as stable as forward substitution, which powers of
    `a` are not where keys are alike.
    """
    still = mx.stop_gradient(a)
    row, column = np.ogrid[: a.shape[-1], : a.shape[-1]]
    out, half = mx.array(np.eye(a.shape[-1], dtype=np.float32)), 1
    while half < a.shape[-1]:
        joint = (row // (2 * half) == column // (2 * half)) & (row // half % 2 > column // half % 2)
        out = out - out @ mx.where(mx.array(joint), still, 0.0) @ out
        half *= 2
    # a - still is zero: the term leaves the value and brings the gradient, -out^T G out^T.
    return out - out @ (a - still) @ out
