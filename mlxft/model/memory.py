"""Gradient checkpointing and limits; plan.py says what a job will need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxft.device import backend, usable_bytes
from mlxft.model.random import again, position, repeatable
from mlxft.model.routers import collect, watched_masks, watching

_CHECKPOINTED: dict[type, type] = {}


def _checkpointed(kind: type) -> type:
    """A subclass of a layer's class that keeps only its inputs, and computes the rest again for the gradient."""
    if kind not in _CHECKPOINTED:

        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not self.training:
                return kind.__call__(self, *args, **kwargs)

            # For the gradient it is called again, when another role may stand in the block and nobody watches.
            own, masks, calls = _contents(self), watched_masks(), count()

            def inner(params: Any, drawn: mx.array, *inputs: Any, **named: Any) -> Any:
                before = _contents(self)
                _put(own)
                try:
                    self.update(params)
                    with again(drawn) if next(calls) else nullcontext(), watching(masks) as seen:
                        return kind.__call__(self, *inputs, **named), seen
                finally:
                    _put(before)  # no tracers are left, and the role that was there

            # Given as an argument, the position is not there before the block's output: masks wait for their turn.
            out, seen = mx.checkpoint(inner)(self.trainable_parameters(), position(), *args, **kwargs)
            collect(seen)
            return out

        _CHECKPOINTED[kind] = type(kind.__name__, (kind,), {"__call__": call, "checkpointed": kind})
    return _CHECKPOINTED[kind]


def _contents(part: Any) -> list[tuple[Any, Any]]:
    """A module and all in it that holds parameters or modules, each with what it holds now."""
    held = list(part) if isinstance(part, list) else dict(part)
    found = [(part, held)]
    for child in held if isinstance(held, list) else held.values():
        if isinstance(child, (dict, list)):
            found += _contents(child)
    return found


def _put(contents: list[tuple[Any, Any]]) -> None:
    """Give all of them back what they held."""
    for part, held in contents:
        if isinstance(part, list):
            part[:] = held
        else:  # past the module's own setters
            dict.clear(part)
            dict.update(part, held)


def checkpoint_layers(model: nn.Module, on: bool = True) -> None:
    """Switch gradient checkpointing of the model's blocks on or off; other models of the same classes are untouched.

    Each block becomes an instance of a subclass of its own class, so any mix of classes will do, and switching
    twice is switching once.
    """
    repeatable(model)
    for layer in model.layers:
        kind = getattr(type(layer), "checkpointed", None)
        if on and kind is None:
            layer.__class__ = _checkpointed(type(layer))
        elif not on and kind is not None:
            layer.__class__ = kind


def is_checkpointed(model: nn.Module) -> bool:
    """Whether the model's blocks are checkpointed."""
    return all(hasattr(type(layer), "checkpointed") for layer in model.layers)


@contextmanager
def limits(limit_gb: float | None, cache_gb: float | None) -> Iterator[None]:
    """Hold MLX to limits inside the block; to be entered once the weights are loaded.

    The memory limit makes MLX wait for running work before it allocates more, and give back freed buffers that it keeps
    for reuse; a limit of these alone would have it allocate anew each step. The wired limit keeps weights resident on
    Metal.
    """
    limit = usable_bytes(limit_gb)
    memory = mx.set_memory_limit(limit)
    cache = mx.set_cache_limit(int(cache_gb * 1e9)) if cache_gb is not None else None
    wired = mx.set_wired_limit(min(limit, usable_bytes())) if backend() == "metal" else None
    try:
        yield
    finally:
        mx.set_memory_limit(memory)
        if cache is not None:
            mx.set_cache_limit(cache)
        if wired is not None:
            mx.set_wired_limit(wired)
