"""A micro-batch's gradient: as the loss is written or, where shapes come again, by a function compiled for them."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxft.errors import ModelError
from mlxft.objectives.balance import balanced_loss
from mlxft.objectives.base import Batch, LossSum, Objective

TRACES = 16  # most shapes that a run compiles: each trace is a graph that stays in memory
REMEMBERED = 1024  # shapes that were seen once; where none comes again they would become as many as batches
Found = tuple[LossSum, dict[str, mx.array]]


def gradient(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    aux: float | None,
    params: dict[str, mx.array] | None = None,
) -> Found:
    """The sums of a micro-batch, and the gradient of their total in what it trains, by name.

    Args:
        aux: tune.router_aux.
        params: stand in for the model's own while it is traced.
    """

    def loss(params: dict[str, mx.array]) -> LossSum:
        model.update(tree_unflatten(list(params.items())))
        if aux is not None:
            return balanced_loss(objective, model, batch, aux)
        return objective.loss(model, batch)

    own = dict(tree_flatten(model.trainable_parameters()))
    if batch.trains is not None:
        own = {n: v for n, v in own.items() if batch.trains(n)}
    try:
        sums, grads = mx.value_and_grad(loss)(own if params is None else params)
    finally:
        model.update(tree_unflatten(list(own.items())))  # no tracers are left
    return sums, grads


def summed(grads: dict[str, mx.array], more: dict[str, mx.array]) -> dict[str, mx.array]:
    """The gradients of micro-batches so far, and those of one more."""
    # In float32: a sum in bfloat16 has 8 bits, and stands still at 256 times what is added to it.
    return grads | {n: grads[n].astype(mx.float32) + g if n in grads else g for n, g in more.items()}


class CompiledGradient:
    """`gradient` of an objective that is `traceable`, compiled: once for each set of shapes.

    What is trained goes in with the batch's arrays, since it changes. All else that is read, the frozen weights among
    it, is part of the trace, by reference.

    Attributes:
        traces: the shapes of each that there is, as `shapes_of`.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self._model, self._objective = model, objective
        self._known: set[str] = set()
        self.traces = traces = list[str]()

        # No method: what is compiled keeps what it reads, and a model that is done with should go at once.
        def traced(params: dict[str, mx.array], arrays: dict[str, mx.array]) -> Found:
            batch = Batch(arrays, 0, 0, ())  # nothing else of it: the trace would keep it for all that are to come
            traces.append(shapes_of(batch))
            return gradient(model, objective, batch, None, params)

        self._function: Callable[..., Any] = mx.compile(traced)

    def __call__(self, batch: Batch) -> Found:
        """As `gradient`.

        Raises:
            ModelError: the model reads numbers while it is computed, so that it can not be traced.
        """
        key = shapes_of(batch)
        if key not in self._known:
            # Whatever is found out by trying (how a model is taken apart) must be known before: in a trace nothing
            # can be evaluated. The graph is thrown away, not computed.
            gradient(self._model, self._objective, batch, None)
            self._known.add(key)
        try:
            found: Found = self._function(dict(tree_flatten(self._model.trainable_parameters())), batch.arrays)
        except ValueError as error:
            if "function transformations" not in str(error):
                raise
            name = getattr(self._model, "model_type", type(self._model).__name__)
            why = "reads numbers while it is computed"
            raise ModelError(f"run.compile: {name} can not be compiled, it {why} ({error}); set it to off") from error
        return found


class Gradients:
    """The gradients of a run: compiled for shapes that are seen again, up to TRACES of them; eager for all others.

    Args:
        aux: tune.router_aux.
        once: shapes that were seen once, oldest first; changed in place.
        again: those that are compiled; changed in place. Compiled and eager differ in the last bits, so a run that
            is resumed needs both lists as they were.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, aux: float | None, once: list[str], again: list[str]
    ) -> None:
        self._model, self._objective, self._aux, self._once, self._again = model, objective, aux, once, again
        self.compiled = CompiledGradient(model, objective) if objective.compiled else None

    def __call__(self, batch: Batch) -> Found:
        """As `gradient`."""
        if self.compiled is not None and batch.trains is None and self._comes_again(shapes_of(batch)):
            return self.compiled(batch)
        return gradient(self._model, self._objective, batch, self._aux)

    def _comes_again(self, key: str) -> bool:
        if key in self._again:
            return True
        if len(self._again) == TRACES:
            return False
        if key in self._once:
            self._once.remove(key)
            self._again.append(key)
            return True
        self._once.append(key)
        del self._once[:-REMEMBERED]
        return False


def shapes_of(batch: Batch) -> str:
    """A digest of the names, shapes and types of its arrays."""
    about = sorted((name, value.shape, str(value.dtype)) for name, value in batch.arrays.items())
    return blake2b(repr(about).encode(), digest_size=8).hexdigest()
