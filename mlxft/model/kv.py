"""mlx-lm's caches with several sequences in them: made, filled with prompts, and their rows taken.

Prompts of one length go through a model's own caches, which take any number of rows: exact for every architecture,
recurrent state included. Prompts of unequal length need caches that know the padding, and a model that heeds it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from mlxft.errors import ModelError
from mlxft.model.declared import NO_NUMBERS

PREFILL = 4096  # most tokens, padding included, that go through the model in one call
_PADDING = 64  # tokens of padding that cost less than one more call of the model
_PADDED = (KVCache, RotatingKVCache)
_ROWS = (KVCache, RotatingKVCache, ChunkedKVCache, ArraysCache)
_TRIED: dict[frozenset[type], bool] = {}


def pads(model: nn.Module) -> bool:
    """Whether prompts of unequal length can stand in one batch: tried once for each set of parts.

    mlx-lm's batched caches hold an array where its plain ones hold a number, the offset; an architecture that counts
    with the number fails, or gives other logits.
    """
    caches = make_prompt_cache(model)
    kind = frozenset(type(part) for part in (*model.modules(), *caches))
    if kind not in _TRIED:
        _TRIED[kind] = all(type(cache) in _PADDED for cache in caches) and _agrees(model)
    return _TRIED[kind]


def _agrees(model: nn.Module) -> bool:
    # So much padding that a place counted from its beginning is far off: afm7's layers that share keys do that.
    # Of the two tokens that every model has: beyond its embedding MLX reads whatever lies in memory.
    prompts = [[1, 0, 0, 1] * 8, [0, 1, 0, 0, 1]]
    try:
        _, together = prefill(model, prompts)
        alone = mx.concatenate([prefill(model, [prompt])[1] for prompt in prompts])
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        return False
    if mx.isnan(alone).any().item():  # nothing to learn from, for models of the same parts
        raise ModelError(NO_NUMBERS)
    apart = mx.abs(together.astype(mx.float32) - alone.astype(mx.float32)).max()
    # What rounding may do; a wrong mask or position does more.
    rounding = 1e-2 if alone.dtype == mx.float32 else 5e-2
    return bool((apart <= rounding * mx.abs(alone).max()).item())


def takes_rows(model: nn.Module) -> bool:
    """Whether several sequences can stand in the model's own caches; otherwise it is one at a time."""

    def known(cache: Any) -> bool:
        return all(map(known, cache.caches)) if type(cache) is CacheList else type(cache) in _ROWS

    return all(map(known, make_prompt_cache(model)))


def prefill(model: nn.Module, prompts: Sequence[Sequence[int]]) -> tuple[list[Any], mx.array]:
    """Caches that hold P prompts, right-aligned, and the logits (P, V) of what follows each.

    Unequal lengths are for models that `pads` is true of; they cost least where neighbours are of like length.
    """
    lengths = [len(prompt) - 1 for prompt in prompts]
    if min(lengths) == max(lengths):
        caches = make_prompt_cache(model)
        _fill(model, caches, [prompt[:-1] for prompt in prompts], lengths[0])
    else:
        caches = []
        for run in _runs(lengths):
            own = [cache.merge([cache] * len(lengths[run])) for cache in make_prompt_cache(model)]
            _fill_padded(model, own, [prompt[:-1] for prompt in prompts[run]])
            for cache, more in zip(caches, own):
                cache.extend(more)
            caches = caches or own
    return caches, step(model, caches, mx.array([prompt[-1] for prompt in prompts]))


def _runs(lengths: Sequence[int]) -> Iterator[slice]:
    """Neighbours that go through the model together: little of it is padding, or too little for a call of its own."""
    start = 0
    for end in range(1, len(lengths) + 1):
        together = lengths[start : end + 1]
        padding = max(together) * len(together) - sum(together)
        if end == len(lengths) or padding > max(_PADDING, sum(together) // 10):
            yield slice(start, end)
            start = end


def _fill_padded(model: nn.Module, caches: list[Any], prompts: Sequence[Sequence[int]]) -> None:
    lengths = [len(prompt) for prompt in prompts]
    # A rotating cache takes a single column for a step of decoding, for which it is not ready before `finalize`.
    width = max(*lengths, 2)
    for cache in caches:
        cache.prepare(lengths=lengths, right_padding=[width - length for length in lengths])
    _fill(model, caches, [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], width)
    for cache in caches:
        cache.finalize()
    mx.eval([cache.state for cache in caches])


def _fill(model: nn.Module, caches: list[Any], prompts: Sequence[Sequence[int]], width: int) -> None:
    """`width` tokens of each prompt, in calls of bounded size."""
    if width:
        ids = mx.array([list(prompt) for prompt in prompts])
        for part in _columns(width, len(prompts)):
            model(ids[:, part], cache=caches)
            # The logits are never evaluated: MLX computes only what is asked for.
            mx.eval([cache.state for cache in caches])
            mx.clear_cache()


def _columns(width: int, rows: int) -> list[slice]:
    """`width` columns in parts of nearly one size, none of them a single column where there are two."""
    most = max(3, PREFILL // rows)
    parts = -(-width // most)
    edges = [width * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def step(model: nn.Module, caches: list[Any], ids: mx.array) -> mx.array:
    """(B,) ids, one further token of each sequence -> (B, V) logits of what follows."""
    logits: mx.array = model(ids[:, None], cache=caches)
    return logits[:, -1]


def take(caches: Sequence[Any], rows: mx.array) -> list[Any]:
    """Caches of these rows, in this order, a row as often as it is named. The given ones stay as they are."""
    return [_take(cache, rows) for cache in caches]


def _take(cache: Any, rows: mx.array) -> Any:
    taken = copy.copy(cache)
    if type(cache) is CacheList:
        taken.caches = tuple(_take(part, rows) for part in cache.caches)
    elif isinstance(cache, (BatchKVCache, BatchRotatingKVCache, ArraysCache)):
        taken.filter(rows)
    elif cache.keys is not None:
        taken.keys, taken.values = cache.keys[rows], cache.values[rows]
    return taken


def clone(caches: Sequence[Any]) -> list[Any]:
    """Caches with the same content, which go on by themselves. For those of which no rows can be taken."""
    return copy.deepcopy(list(caches))
