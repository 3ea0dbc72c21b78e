"""The load-balancing loss of mixtures of experts, added to whatever an objective's loss is."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxft.model.routers import watching
from mlxft.objectives.base import Batch, LossSum, Objective
from mlxft.objectives.functional import load_balance


def balanced_loss(objective: Objective, model: nn.Module, batch: Batch, weight: float) -> LossSum:
    """The objective's loss with `weight` times the balance of its routers, mean over the layers that have one.

    Micro-batches are balanced each by itself, and count as much as their items do: the choice of experts has to be
    known of all tokens that are balanced together.

    Returns:
        The objective's LossSum; metric router_aux is the balance, 1 where tokens are spread evenly.
    """
    with watching(real_tokens(batch)) as seen:
        sums = objective.loss(model, batch)
    balance = mx.stack([load_balance(chosen, shares) for chosen, shares in seen.values()]).mean()
    added = balance * mx.stop_gradient(sums.weight)
    return LossSum(sums.total + weight * added, sums.weight, sums.metrics | {"router_aux": mx.stop_gradient(added)})


def real_tokens(batch: Batch) -> dict[tuple[int, ...], mx.array]:
    """Masks of a batch's tokens by the shape of what goes through the model: rows, or prompts and answers to them."""
    a = batch.arrays
    ids = a["ids"]
    if "prompts" in a:
        masks = [_before(a["prompts"], a["begins"]), _before(ids, a["lengths"])]
    else:
        masks = [_before(ids, a["last"] + 1 if "last" in a else mx.array(batch.lengths))]
    return {mask.shape: mask for mask in masks}


def _before(ids: mx.array, lengths: mx.array) -> mx.array:
    """(B, T), whether a token is one of its row's first `lengths`."""
    return mx.arange(ids.shape[1]) < lengths[:, None]
