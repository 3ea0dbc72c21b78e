"""Held-out loss and metrics: the whole set, the same each time, weighted by items."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxft.model.cpu import as_trained
from mlxft.model.random import probing
from mlxft.objectives.base import LossSum, Objective


def validate(model: nn.Module, objective: Objective) -> dict[str, Any]:
    """Loss and metrics over the validation set, {} if there is none. Dropout is off; randomness is left as it was.

    An objective may have a way of its own.
    """
    sums: LossSum | None = None
    with probing(model):
        own = objective.evaluate(model)
        if own is not None:
            return own
        for batch in objective.valid_batches(model):
            part = as_trained(partial(objective.loss, model, batch))
            sums = part if sums is None else sums.plus(part)
            mx.eval(sums)  # one batch's activations at a time
    if sums is None:
        return {}
    weight = float(sums.weight)
    means = {"loss": float(sums.total) / weight} | {k: float(v) / weight for k, v in sums.metrics.items()}
    return objective.validated(means)
