"""Group relative policy optimisation (Shao et al. 2024), with the switches of Dr. GRPO (Liu et al. 2025) and DAPO
(Yu et al. 2025).

Several completions of a prompt are each other's baseline; KL to the reference is a term of the loss, as published, or
of the advantages, which is exact.
Dr. GRPO is scale: none with loss: constant; DAPO is loss: token with clip_high: 0.28, kl_coef: 0, resample, skip_equal
and mask_truncated (or, for its soft punishment of overlong answers, a rule of kind length).
"""

from __future__ import annotations

from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from pydantic import Field, model_validator

from mlxft.config import Config
from mlxft.errors import ConfigError
from mlxft.objectives import functional as F
from mlxft.objectives.base import Batch, LossSum
from mlxft.objectives.onpolicy.base import FAR
from mlxft.objectives.onpolicy.critic_free import CriticFree
from mlxft.objectives.onpolicy.draw import Drawn, resample
from mlxft.objectives.onpolicy.group import Floats, equal_groups, group_relative, kl_loss, leave_one_out, surrogate
from mlxft.objectives.onpolicy.prompts import Method
from mlxft.objectives.onpolicy.rolled import sections
from mlxft.objectives.onpolicy.rollout import Rollout


class GRPOSettings(Method):
    """Settings of objective grpo."""

    kl_coef: float = Field(0.04, ge=0, description="Weight of KL to the reference; 0: no such term.")
    kl_in: Literal["loss", "advantages"] = Field(
        "loss",
        description="loss: as published, a term of each token by itself. It leaves out that a token also decides the "
        "KL of the tokens to come, so its optimum is not that of reward - kl_coef x KL. advantages: the completion's "
        "KL, less the mean of its group's others, is taken off each token's advantage, which is exact: with scale: "
        "none, loss: constant and one step a rollout the gradient is that of reward - kl_coef x KL.",
    )
    kl_estimator: Literal["k2", "k3"] = Field(
        "k2",
        description="With kl_in: loss: how a token's KL is estimated (Schulman 2020). k2's gradient, weighed by the "
        "ratio so that it is right in later passes too, is that of the token's own KL(policy || reference); k3's, as "
        "published, that of KL(reference || policy), which has another optimum.",
    )
    scale: Literal["group", "batch", "none"] = Field(
        "group", description="Standard deviation that advantages are divided by; none: Dr. GRPO."
    )
    baseline: Literal["group", "others"] | None = Field(
        None,
        description="Mean that a score is held against: of its whole group, as published, or of the others in it. The "
        "first makes advantages (samples - 1) / samples as large beside kl_coef; default: others where scale is none.",
    )
    loss: Literal["sequence", "token", "constant"] = Field(
        "sequence",
        description="sequence: mean over a completion's tokens, then over completions; token (DAPO): mean over all "
        "tokens; constant (Dr. GRPO): their sum, over completions times rollout.max_tokens.",
    )
    clip: float = Field(0.2, gt=0, description="The ratio's gradient ends at 1 - clip and 1 + clip.")
    clip_high: float | None = Field(
        None, gt=0, description="Another bound above, 1 + clip_high (DAPO: 0.28); default: clip."
    )
    skip_equal: bool = Field(
        False, description="Leave groups of equal scores out of the loss, whose advantages are 0 (as DAPO does)."
    )
    resample: int = Field(
        0,
        ge=0,
        description="Further draws a rollout, at most, in which groups of equal scores give way to those of other "
        "prompts (DAPO's dynamic sampling); 0: none.",
    )
    mask_truncated: bool = Field(
        False, description="Leave completions that were cut off out of the loss (DAPO's overlong filtering)."
    )

    @model_validator(mode="after")
    def _consistent(self) -> GRPOSettings:
        if self.kl_coef == 0 and self.kl_estimator != "k2":
            raise ValueError(f"kl_estimator ({self.kl_estimator}) has nothing to act on where kl_coef is 0")
        if self.kl_coef == 0 and self.kl_in != "loss":
            raise ValueError(f"kl_in ({self.kl_in}) has nothing to act on where kl_coef is 0")
        if self.kl_in == "advantages" and self.kl_estimator != "k2":
            raise ValueError(f"kl_estimator ({self.kl_estimator}) is for kl_in: loss; leave it out")
        if self.kl_in == "advantages" and self.skip_equal:
            raise ValueError(
                "skip_equal: with kl_in: advantages groups of equal scores have advantages too, those of their KL; "
                "leave one of the two out"
            )
        return self

    @property
    def others(self) -> bool:
        """Whether the baseline leaves a completion's own score out."""
        return self.scale == "none" if self.baseline is None else self.baseline == "others"


class GRPO(CriticFree[GRPOSettings]):
    """GRPO."""

    sections = sections({"grpo": GRPOSettings})
    learning_rate = 1e-6  # of full fine-tuning, as TRL's GRPOConfig

    grouped = True

    def __init__(self, config: Config, tokenizer: Any) -> None:
        super().__init__(config, tokenizer, GRPOSettings)
        self.needs_reference = self.settings.kl_coef > 0 and self.settings.kl_in == "loss"
        if self.settings.resample and self.rollouts.prompts >= len(self.prompts):
            raise ConfigError(
                f"grpo.resample: a rollout asks all {len(self.prompts)} prompts (rollout.prompts is "
                f"{self.rollouts.prompts}), and none is left to replace one with; lower rollout.prompts"
            )

    def draw(self, number: int) -> Drawn:
        first = super().draw(number)
        return resample(self, first, self.settings.resample) if self.settings.resample else first

    def kept(self, rollout: Rollout) -> list[int]:
        s, size = self.settings, self.rollouts.samples
        keep = np.ones(len(rollout), dtype=bool)
        if s.skip_equal:
            keep &= ~np.repeat(equal_groups(rollout.scores, size), size)
        if s.mask_truncated:
            keep &= np.array(rollout.finished)
        return [int(i) for i in np.flatnonzero(keep)]

    def why_idle(self, rollouts: int) -> str:
        on = [f"grpo.{name}" for name in ("skip_equal", "mask_truncated") if getattr(self.settings, name)]
        return (
            f"{rollouts} rollouts one after the other have nothing to learn from: by {' and '.join(on)} all of their "
            "completions are left out (equal_groups and eos_share in metrics.jsonl say why). The prompts are too easy "
            "or too hard for this reward, or rollout.max_tokens is too small; the last checkpoint is kept"
        )

    def worth(self, rollout: Rollout) -> tuple[Floats, dict[str, float]]:
        s, size = self.settings, self.rollouts.samples
        event = {"equal_groups": float(equal_groups(rollout.scores, size).mean())}
        if s.skip_equal or s.mask_truncated:
            event["trained_share"] = len(self.kept(rollout)) / len(rollout)
        advantages = group_relative(rollout.scores, size, s.scale, s.others)
        if s.kl_in == "advantages":
            advantages -= self.kl_coef * leave_one_out(self.kls(rollout), size)
        return advantages, event

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        a, s = batch.arrays, self.settings
        logprobs = self.logprobs(a)
        log_ratio = logprobs - a["old_logprobs"]
        losses, metrics = surrogate(log_ratio, a["advantages"], s.clip, s.clip_high or s.clip)
        metrics |= {"approx_kl": -log_ratio, FAR: F.kl(a["old_logprobs"], logprobs, "k3")}
        highest = mx.stop_gradient(metrics["ratio_mean"].max())
        if self.needs_reference:
            apart = kl_loss(logprobs, a["old_logprobs"], a["ref_logprobs"], s.kl_estimator)
            losses = losses + self.kl_coef * apart
            metrics["kl_loss"] = apart
        still = {name: mx.stop_gradient(values) for name, values in metrics.items()}
        total, weight, sums = self._over(losses, still, a)
        return LossSum(total, weight, {**sums, "ratio_max": highest})

    def _over(
        self, losses: mx.array, metrics: dict[str, mx.array], a: dict[str, mx.array]
    ) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        """Total, weight and metrics over the same items, whatever one item is: so that micro-batches add up."""
        count = a["lengths"].shape[0]
        if self.settings.loss == "token":
            return losses.sum(), a["lengths"].sum(), {name: values.sum() for name, values in metrics.items()}
        means = {name: self.row_means(values, a).sum() for name, values in metrics.items()}
        if self.settings.loss == "sequence":
            return self.row_means(losses, a).sum(), mx.array(float(count)), means
        # Metrics are means over tokens as elsewhere: only the loss is over tokens that might have been.
        most = self.rollouts.max_tokens
        return losses.sum(), mx.array(float(count * most)), {name: most * value for name, value in means.items()}
