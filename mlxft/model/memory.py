"""Gradient checkpointing, limits, and (plan.py) what a job will need."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

_CHECKPOINTED: dict[type, type] = {}


def _checkpointed(kind: type) -> type:
    """A subclass of a layer's class that keeps only its inputs, and computes the rest again for the gradient."""
    if kind not in _CHECKPOINTED:

        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not self.training:
                return kind.__call__(self, *args, **kwargs)

            def inner(params: Any, *inputs: Any, **named: Any) -> Any:
                self.update(params)
                return kind.__call__(self, *inputs, **named)

            params = self.trainable_parameters()
            out = mx.checkpoint(inner)(params, *args, **kwargs)
            self.update(params)  # not the tracers that `inner` left
            return out

        _CHECKPOINTED[kind] = type(kind.__name__, (kind,), {"__call__": call, "checkpointed": kind})
    return _CHECKPOINTED[kind]


def checkpoint_layers(model: nn.Module, on: bool = True) -> None:
    """Switch gradient checkpointing of the model's blocks on or off; other models of the same classes are untouched.

    Each block becomes an instance of a subclass of its own class, so any mix of classes will do, and switching
    twice is switching once.
    """
    for layer in model.layers:
        kind = getattr(type(layer), "checkpointed", None)
        if on and kind is None:
            layer.__class__ = _checkpointed(type(layer))
        elif not on and kind is not None:
            layer.__class__ = kind


def is_checkpointed(model: nn.Module) -> bool:
    """Whether the model's blocks are checkpointed."""
    return all(hasattr(type(layer), "checkpointed") for layer in model.layers)
