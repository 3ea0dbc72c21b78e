"""Several adapters on one base at once: their changes to the weights, each times a number, add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxft.model.adapters import load_adapter
from mlxft.model.lora import LowRank, plain, shift

Change = Callable[[], mx.array]  # of a weight, in its shape, float32


class Merged(LowRank):
    """A layer whose weight is the base's plus the sum of changes, which may be of any rank."""

    def __init__(self, base: nn.Module, changes: Sequence[Change]) -> None:
        super().__init__(scale=1.0, dropout=0.0)
        if hasattr(base, "as_linear"):
            self.embedding = base
        else:
            self.linear = base
        # Functions: what a module holds as a module or in a list is part of its weights.
        self._changes = lambda: changes
        self._kind = lambda: base  # whatever stands in for the base

    def delta(self) -> mx.array:
        total = mx.zeros((), dtype=mx.float32)
        for change in self._changes():
            total = total + change()
        return total

    def _layer(self, kind: Any) -> nn.Module:
        layer = plain(self._kind(), self.delta().astype(kind))
        layer.pop("bias", None)  # the base has added it
        return layer

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
        y = self.base(x, *args, **options)
        return y + self._layer(y.dtype)(x, *args, **options).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """The embedding as the output layer."""
        y = self.base.as_linear(x)
        return y + self._layer(y.dtype).as_linear(x).astype(y.dtype)

    def __getattr__(self, key: str) -> Any:
        # Mixture blocks ask their experts for sizes.
        if key in ("input_dims", "output_dims", "num_experts"):
            return getattr(self.base, key)
        return super().__getattr__(key)


def merge_adapters(model: nn.Module, adapters: Sequence[tuple[Path, float]], base: str) -> int:
    """Put the weighted sum of adapters onto their base; modules that one trained whole count by what they changed.

    Args:
        adapters: folders and the number that each one's change is multiplied by.
        base: fingerprint of the model.
    Returns:
        How many parameters changed by modules that were trained whole.
    Raises:
        ModelError: an adapter of another base, or one that does not fit.
    """
    changes: dict[str, list[Change]] = {}
    whole: dict[str, list[Change]] = {}
    for folder, weight in adapters:
        for path, change in _changes(model, folder, weight, base, whole).items():
            changes.setdefault(path, []).append(change)
    modules = dict(model.named_modules())
    for path in changes:  # one adapter trained whole what another has a low-rank layer on
        changes[path] += whole.pop(f"{path}.weight", [])
    model.update_modules(tree_unflatten([(path, Merged(modules[path], given)) for path, given in changes.items()]))
    there = dict(tree_flatten(model.parameters()))
    for name, given in whole.items():
        total = there[name].astype(mx.float32)
        for change in given:
            total = total + change()
        model.load_weights([(name, total.astype(there[name].dtype))], strict=False)
    return len(whole)


def _changes(
    model: nn.Module, folder: Path, weight: float, base: str, whole: dict[str, list[Change]]
) -> dict[str, Change]:
    """One adapter's changes: of its low-rank layers returned, of what it trained whole into `whole`.

    The adapter is loaded onto the model, which checks it, and taken off again.
    """
    modules = dict(model.named_modules())
    before = dict(tree_flatten(model.parameters()))
    load_adapter(model, folder, base)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, LowRank)}
    after = dict(tree_flatten(model.parameters()))
    model.update_modules(tree_unflatten([(path, modules[path]) for path in layers]))
    moved = {n: v for n, v in after.items() if n in before and v is not before[n]}
    model.load_weights([(name, before[name]) for name in moved], strict=False)
    for name, value in moved.items():
        whole.setdefault(name, []).append(partial(_difference, value, before[name], weight))
    return {path: partial(_weighted, layer, weight) for path, layer in layers.items()}


def _difference(new: mx.array, old: mx.array, weight: float) -> mx.array:
    return weight * (new.astype(mx.float32) - old.astype(mx.float32))


def _weighted(layer: LowRank, weight: float) -> mx.array:
    return weight * shift(layer)
