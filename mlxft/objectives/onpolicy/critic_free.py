"""What on-policy methods without a critic share: one advantage a completion, from its score and those of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Generic, Literal, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from pydantic import Field

from mlxft.model.logprobs import row_sums
from mlxft.objectives import functional as F
from mlxft.objectives.base import Batch, LossSum
from mlxft.objectives.onpolicy.base import FAR, OnPolicy
from mlxft.objectives.onpolicy.group import Floats, surrogate
from mlxft.objectives.onpolicy.prompts import Method
from mlxft.objectives.onpolicy.rollout import Rollout

M = TypeVar("M", bound=Method)


class CriticFree(OnPolicy[M], Generic[M]):
    """An on-policy objective that gives each completion one advantage. A subclass says which, and the loss."""

    def worth(self, rollout: Rollout) -> tuple[Floats, dict[str, float]]:
        """(B,) advantages, and what is worth reporting."""
        raise AssertionError(f"{type(self).__name__} has no advantages")

    def advise(self, rollout: Rollout, micro: Sequence[Sequence[int]]) -> dict[str, float]:
        advantages, event = self.worth(rollout)
        rollout.tokens["advantages"] = [np.full(n, a, np.float32) for n, a in zip(rollout.sizes, advantages)]
        return {"advantage_mean": float(advantages.mean()), "advantage_std": float(advantages.std()), **event}

    def micro(self, rollout: Rollout, rows: Sequence[int]) -> list[Batch]:
        (batch,) = super().micro(rollout, rows)
        sizes = rollout.sizes[list(rows)]
        arrays = {
            "owners": mx.array(np.repeat(np.arange(len(rows)), sizes).astype(np.int32)),
            "lengths": mx.array(sizes.astype(np.float32)),
            "gains": mx.array(np.array([rollout.tokens["advantages"][i][0] for i in rows])),
        }
        return [replace(batch, arrays=batch.arrays | arrays)]

    @staticmethod
    def of_rows(values: mx.array, a: dict[str, mx.array]) -> mx.array:
        """(N,) numbers of a batch's tokens -> (B,) sums over completions."""
        return row_sums(values, a["owners"], a["lengths"].shape[0])

    def row_means(self, values: mx.array, a: dict[str, mx.array]) -> mx.array:
        """(B,) means over a completion's tokens, exactly 1 of ones."""
        return self.of_rows(values, a) / a["lengths"]


class InReward(Method):
    """Settings of methods whose KL is part of the reward."""

    ratio: Literal["completion", "token"] = Field(
        "completion",
        description="What is compared with the policy that sampled, and clipped: a completion's probability or each "
        "token's. All the same where a rollout is one step.",
    )
    clip: float | None = Field(
        0.2, gt=0, description="The ratio's gradient ends at 1 - clip and 1 + clip; null: no clipping."
    )


R = TypeVar("R", bound=InReward)


class Reinforced(CriticFree[R], Generic[R]):
    """Policy gradient (Williams 1992) with rewards of whole completions, each less a baseline.

    The loss is a sum over a completion's tokens, mean over completions: with one step a rollout its gradient is
    -A grad log pi(completion), that of the objective reward - kl_coef KL itself.
    """

    def rewards_of(self, rollout: Rollout) -> Floats:
        """(B,) score - kl_coef x (log pi - log reference) of the completion."""
        if not self.kl_coef:
            return rollout.scores
        return (rollout.scores - self.kl_coef * self.kls(rollout)).astype(np.float32)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        a, clip = batch.arrays, self.settings.clip
        logprobs = self.logprobs(a)
        log_ratio = logprobs - a["old_logprobs"]
        if self.settings.ratio == "completion":
            losses, metrics = surrogate(self.of_rows(log_ratio, a), a["gains"], clip, clip)
        else:
            losses, metrics = surrogate(log_ratio, a["advantages"], clip, clip)
        highest = metrics["ratio_mean"].max()
        if self.settings.ratio == "token":
            metrics = {name: self.row_means(values, a) for name, values in metrics.items()}
        metrics["approx_kl"] = self.row_means(-log_ratio, a)
        metrics[FAR] = self.row_means(F.kl(a["old_logprobs"], logprobs, "k3"), a)
        sums = {name: mx.stop_gradient(values).sum() for name, values in metrics.items()}
        weight = mx.array(float(a["lengths"].shape[0]))
        return LossSum(losses.sum(), weight, {**sums, "ratio_max": mx.stop_gradient(highest)})
