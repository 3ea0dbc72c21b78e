"""Several rows in one sequence, each seeing only itself: attention with a block-diagonal mask.

mlx-lm's models ask the cache that they are given for the mask (`create_attention_mask`), for the offset of positions
and for keys and values. A cache that keeps nothing and answers with a mask of one's own is thus all it takes, without
a change to the model. Rotary positions are relative, so a row may begin anywhere; whether an architecture really keeps
rows apart is tried on a few tokens.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxft.errors import ModelError
from mlxft.model.random import probing

ATTENTION = ("KVCache", "RotatingKVCache")  # of keys and values only: what a mask hides is not seen
# Rows of the trial, by sequence: unequal numbers and lengths, and padding behind the second's.
_TRIAL = ((7, 5), (4, 3, 3))


class PackCache:
    """Stands in for a layer's KV cache: keeps nothing, and masks the rows of a sequence from each other.

    Args:
        segments: (B, T) integers; a token sees those before it with its own number, and itself.
        axes: of heads, between B and T x T in the model's scores: 1, or 2 where query heads are grouped by hand.
        offset: position of the first token.
    """

    def __init__(self, segments: mx.array, axes: int = 1, offset: int = 0) -> None:
        self.offset = offset
        at = mx.arange(segments.shape[1])
        self._distance = at[:, None] - at
        mask = (segments[:, :, None] == segments[:, None, :]) & (self._distance >= 0)
        self._mask = mx.expand_dims(mask, tuple(range(1, 1 + axes)))

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """(B, 1, T, T) bool, true where a query (axis -2) sees a key."""
        assert self._mask.shape[-1] == N, f"{N} tokens, segments for {self._mask.shape[-1]}"
        return self._mask if window_size is None else self._mask & (self._distance < window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The sequence's own keys and values: nothing came before."""
        return keys, values


def _kind(model: nn.Module) -> str:
    return str(getattr(model, "model_type", type(model).__name__))


def refuse_states(model: nn.Module) -> int:
    """Refuse to pack rows for what keeps more than keys and values, which is known without weights.

    Returns:
        How many layers keep such.
    Raises:
        ModelError: so it is.
    """
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(model)
    others = sorted({type(c).__name__ for c in caches} - set(ATTENTION))
    if others:
        raise ModelError(
            f"batch.pack: {_kind(model)} carries more than keys and values from token to token ({', '.join(others)}): "
            "a state that no mask divides, so that rows would see the ones before them; leave batch.pack out"
        )
    return len(caches)


class Packing:
    """How a model takes packed rows.

    Args:
        model: any mlx-lm model, with or without adapters.
        width: positions that there will be; where given, the trial reaches up to there.
        weights: whether the model has weights; without, only shapes are tried.
    Raises:
        ModelError: the model can not keep the rows of a sequence apart.
    """

    def __init__(self, model: nn.Module, width: int = 0, weights: bool = True) -> None:
        kind, self._count = _kind(model), refuse_states(model)
        with probing(model):
            trial = self._trial if weights else self._shapes
            reasons = [trial(model, axes, width) for axes in (1, 2)]
        if all(reasons):
            raise ModelError(f"batch.pack: {kind} does not keep packed rows apart: {reasons[0]}; leave batch.pack out")
        self._axes = 1 + reasons.index("")

    def caches(self, segments: mx.array) -> list[Any]:
        """What the model takes as `cache` to keep apart the rows that `segments` (B, T) numbers; 0 is padding."""
        return [PackCache(segments, self._axes)] * self._count

    def _shapes(self, model: nn.Module, axes: int, width: int) -> str:
        """Why the model does not take a mask of so many axes of heads; empty if it does. Nothing is computed."""
        ids = mx.zeros((3, 5), dtype=mx.int32)
        try:
            model(ids, cache=[PackCache(ids, axes)] * self._count)
        except Exception as e:  # whatever a model's own code raises on being called so
            return _said(e)
        return ""

    def _trial(self, model: nn.Module, axes: int, width: int) -> str:
        """What is wrong with packed logits next to those of each row alone; empty if nothing."""
        length = max(sum(lengths) for lengths in _TRIAL)
        ids = np.random.default_rng(0).integers(0, 8, (len(_TRIAL), length)).astype(np.int32)
        segments = np.zeros_like(ids)
        alone: list[mx.array] = []
        where: list[tuple[int, slice]] = []
        for b, lengths in enumerate(_TRIAL):
            for i, n in enumerate(lengths):
                part = slice(sum(lengths[:i]), sum(lengths[:i]) + n)
                segments[b, part] = i + 1
                where.append((b, part))
        try:
            alone = [model(mx.array(ids[b : b + 1, part]))[0] for b, part in where]
            # The second time at the far end: positions that scale attention, or that end, show there.
            for offset in (0, width - length) if width > length else (0,):
                caches = [PackCache(mx.array(segments), axes, offset)] * self._count
                packed = model(mx.array(ids), cache=caches)
                wrong = max(_difference(packed[b, part], one) for one, (b, part) in zip(alone, where))
                # Noise of half precision is some 1e-2; rotations by a large angle are exact to 1e-3 in float32.
                bound = 5e-2 if packed.dtype != mx.float32 else 1e-2 if offset else 1e-3
                if not wrong <= bound:
                    return f"logits of a packed row differ by {wrong:.1%} from those of the row alone"
        except Exception as e:  # whatever a model's own code raises on being called so
            return _said(e)
        return ""


def _said(error: Exception) -> str:
    cause = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
    return f"its own code fails where a mask stands in for its layers' caches ({cause})"


def _difference(a: mx.array, b: mx.array) -> float:
    """Mean over tokens of |a - b| / |b|."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return float((mx.linalg.norm(a - b, axis=-1) / mx.linalg.norm(b, axis=-1)).mean())
