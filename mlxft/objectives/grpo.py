"""Critic-free on-policy objectives: GRPO, RLOO and REINFORCE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Generic, Literal, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from pydantic import Field, model_validator

from mlxft.config import Config
from mlxft.errors import ConfigError
from mlxft.model.cpu import as_trained
from mlxft.model.heads import body_width
from mlxft.model.layers import probing
from mlxft.model.logits import hidden_kl, hidden_logprobs, rows_hidden
from mlxft.model.memory import Beside, Outline, ShapeSplit
from mlxft.objectives import functional as F
from mlxft.objectives.base import MicroBatch, Terms
from mlxft.objectives.functional import Floats, equal_groups, group_relative, leave_one_out
from mlxft.objectives.rollouts import (
    Drawn,
    OnPolicy,
    OnPolicySettings,
    Piece,
    Rollout,
    RolloutBatch,
    resample,
    sections,
)

_M = TypeVar("_M", bound=OnPolicySettings)


class CriticFree(OnPolicy[_M], Generic[_M]):
    """An on-policy objective with one advantage per completion. A subclass gives advantages and the loss."""

    def compute_advantages(self, rollout: Rollout) -> tuple[Floats, dict[str, float]]:
        """Return (B,) advantages, and numbers to report."""
        raise AssertionError(f"{type(self).__name__} has no advantages")

    def set_advantages(self, rollout: Rollout, micro: Sequence[Piece]) -> dict[str, float]:
        advantages, event = self.compute_advantages(rollout)
        rollout.tokens["advantages"] = [np.full(n, a, np.float32) for n, a in zip(rollout.sizes, advantages)]
        return {"advantage_mean": float(advantages.mean()), "advantage_std": float(advantages.std()), **event}

    def make(self, rollout: Rollout, rows: Sequence[int]) -> list[MicroBatch]:
        (batch,) = super().make(rollout, rows)
        sizes = rollout.sizes[list(rows)]
        data = replace(
            batch.data,
            owners=mx.array(np.repeat(np.arange(len(rows)), sizes).astype(np.int32)),
            advantages=mx.array(np.array([rollout.tokens["advantages"][i][0] for i in rows])),
        )
        return [replace(batch, data=data)]

    def policy_loss(
        self,
        data: RolloutBatch,
        clip: float | tuple[float, float] | None,
        how: F.Aggregation,
        penalty: F.KLPenalty | None = None,
        logprobs: mx.array | None = None,
    ) -> Terms:
        """Return the term `policy` and its metrics; `logprobs` are the tokens', where they are known."""
        assert data.advantages is not None
        logprobs, how = self.logprobs(data) if logprobs is None else logprobs, how._replace(owners=data.owners)
        mask = mx.ones_like(logprobs)
        sums = F.policy_loss(logprobs, data.old_logprobs, data.advantages, mask, clip, how=how, penalty=penalty)
        return Terms({"policy": sums.total}, sums.metrics)


class InReward(OnPolicySettings):
    """Settings of methods with KL in the reward."""

    ratio: Literal["completion", "token"] = Field(
        "completion",
        description="Ratio to the policy that sampled, which is clipped: of a completion's probability or of each "
        "token's. Without effect where a rollout is one step.",
    )
    clip: float | None = Field(
        0.2, gt=0, description="The ratio has no gradient beyond 1 - clip and 1 + clip; null: no clipping."
    )


R = TypeVar("R", bound=InReward)


class Reinforced(CriticFree[R], Generic[R]):
    """Policy gradient (Williams 1992) with rewards of whole completions, each minus a baseline.

    The loss is a sum over a completion's tokens and a mean over completions: with one step per rollout its gradient is
    -A grad log pi(completion), that of reward - kl_coef KL itself.
    """

    def compute_rewards(self, rollout: Rollout) -> Floats:
        """Return (B,) score - kl_coef x (log pi - log reference) of the completion."""
        if not self.kl_coef:
            return rollout.scores
        return (rollout.scores - self.kl_coef * self.kls(rollout)).astype(np.float32)

    def per(self, rollout: Rollout, rows: Sequence[int]) -> dict[str, float]:
        return {"policy": float(len(rows))}

    def loss(self, model: nn.Module, data: RolloutBatch) -> Terms:
        how = F.Aggregation("constant", ratio=self.settings.ratio)
        return self.policy_loss(data, self.settings.clip, how)


# --- grpo -------------------------------------------------------------------------------------------------------------
# Group relative policy optimisation (Shao et al. 2024) and what was made of it.
#
# The completions of a prompt are each other's baseline. KL to the reference is a term of the loss, as published, or of
# the advantages, which is exact.

# What each published form sets. DAPO's soft penalty on overlong completions is a rule of kind length.
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {},  # the defaults
    # Liu et al. 2025, section 3: neither division, no KL
    "dr_grpo": {"scale": "none", "baseline": "group", "loss": "constant", "kl_coef": 0.0},
    # Yu et al. 2025, section 3; verl's recipe samples up to 10 times
    "dapo": {
        "loss": "token",
        "clip": 0.2,
        "clip_high": 0.28,
        "kl_coef": 0.0,
        "skip_equal": True,
        "resample": 9,
        "mask_truncated": True,
    },
    # Zheng et al. 2025, equation 5 and section 5.1; without KL, as its authors trained
    "gspo": {"ratio": "sequence", "loss": "sequence", "clip": 3e-4, "clip_high": 4e-4, "kl_coef": 0.0},
    # MiniMax 2025, equation 4, without a lower bound; the upper one, 5, is of Khatri et al. 2025
    "cispo": {"surrogate": "weighted", "loss": "token", "clip": 1.0, "clip_high": 4.0, "kl_coef": 0.0},
}


class GRPOSettings(OnPolicySettings):
    """Settings of objective grpo."""

    variant: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = Field(
        "grpo",
        description="Published form, which sets the parts that it is known for: scale, baseline, loss, ratio, "
        "surrogate, clip, clip_high, kl_coef, skip_equal, resample, mask_truncated. A part that the recipe sets "
        "itself takes precedence; grpo: the defaults.",
    )
    kl_coef: float = Field(0.04, ge=0, description="Weight of KL to the reference; 0: no such term.")
    kl_in: Literal["loss", "advantages"] = Field(
        "loss",
        description="loss: as published, a term of each token alone. It ignores that a token also decides the KL of "
        "later tokens, so its optimum is not that of reward - kl_coef x KL. advantages: the completion's KL, minus the "
        "mean of its group's others, is subtracted from each token's advantage, which is exact: with scale: none, "
        "loss: constant and one step per rollout the gradient is that of reward - kl_coef x KL.",
    )
    kl_estimator: Literal["k2", "k3", "exact"] = Field(
        "k2",
        description="Estimator of a token's KL with kl_in: loss (Schulman 2020). k2's gradient, weighted by the ratio "
        "so that it is right in later passes too, is that of the token's KL(policy || reference); k3's, as published, "
        "is that of KL(reference || policy), which has another optimum. exact: KL(policy || reference) over the whole "
        "vocabulary, without sampling noise, for the time of two more output layers and a pass of the reference.",
    )
    scale: Literal["group", "batch", "none"] = Field(
        "group", description="Divide advantages by the standard deviation of the group or batch; none: Dr. GRPO."
    )
    baseline: Literal["group", "others"] | None = Field(
        None,
        description="Mean that is subtracted from a score: of its whole group, as published, or of the others in it. "
        "The first scales advantages by (samples - 1) / samples; default: others where scale is none.",
    )
    loss: Literal["sequence", "token", "constant"] = Field(
        "sequence",
        description="sequence: mean over a completion's tokens, then over completions; token (DAPO): mean over all "
        "tokens; constant (Dr. GRPO): their sum divided by completions x rollout.max_tokens.",
    )
    ratio: Literal["token", "sequence"] = Field(
        "token",
        description="Ratio to the policy that sampled: of each token; or of the sequence, the geometric mean over a "
        "completion's tokens, which stands for each of them (GSPO). Without effect where a rollout is one step.",
    )
    surrogate: Literal["clipped", "weighted"] = Field(
        "clipped",
        description="clipped: no gradient beyond the bounds. weighted (CISPO): the clipped ratio is a constant weight "
        "of advantage x log-probability, so that every token keeps its gradient.",
    )
    clip: float = Field(
        0.2, gt=0, description="Bounds 1 - clip and 1 + clip of the ratio; from 1 on there is no lower bound."
    )
    clip_high: float | None = Field(
        None, gt=0, description="Upper bound 1 + clip_high of the ratio (DAPO: 0.28); default: clip."
    )
    skip_equal: bool = Field(False, description="Leave out groups of equal scores, whose advantages are 0 (DAPO).")
    resample: int = Field(
        0,
        ge=0,
        description="Most further rounds of sampling per rollout, which replace groups of equal scores by those of "
        "other prompts (DAPO's dynamic sampling); 0: none.",
    )
    mask_truncated: bool = Field(
        False, description="Leave out completions that were cut off (DAPO's overlong filtering)."
    )

    @model_validator(mode="before")
    @classmethod
    def _of_variant(cls, given: Any) -> Any:
        return {**VARIANTS.get(str(given.get("variant")), {}), **given} if isinstance(given, dict) else given

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
                "skip_equal: with kl_in: advantages groups of equal scores have advantages too, from their KL; leave "
                "one of the two out"
            )
        return self

    def variant_note(self) -> str:
        """Return what the variant sets, and which of its parts the recipe sets itself."""
        parts = VARIANTS[self.variant]
        own = ", ".join(name for name, value in parts.items() if getattr(self, name) != value)
        text = ", ".join(f"{name}: {getattr(self, name)}" for name in parts)
        return f"grpo.variant: {self.variant} is {text}{f' (by the recipe: {own})' if own else ''}"

    @property
    def others(self) -> bool:
        """Return whether the baseline leaves a completion's own score out."""
        return self.scale == "none" if self.baseline is None else self.baseline == "others"


class GRPO(CriticFree[GRPOSettings]):
    """GRPO."""

    sections = sections({"grpo": GRPOSettings})
    learning_rate = 1e-6  # of full fine-tuning, as TRL's GRPOConfig

    grouped = True

    def __init__(self, config: Config, tokenizer: Any) -> None:
        super().__init__(config, tokenizer, GRPOSettings)
        self.exact = self.settings.kl_estimator == "exact"
        self.needs_reference = self.settings.kl_coef > 0 and self.settings.kl_in == "loss" and not self.exact
        if self.settings.variant != "grpo":
            self.notes.append(self.settings.variant_note())
        if self.settings.resample and self.rollouts.prompts >= len(self.prompts):
            raise ConfigError(
                f"grpo.resample: a rollout has all {len(self.prompts)} prompts (rollout.prompts is "
                f"{self.rollouts.prompts}), so none is left as a replacement; lower rollout.prompts, or set it to 0"
            )

    def prepare(self, model: nn.Module, base: str = "") -> None:
        super().prepare(model, base)
        self.outfit(self.config, model)

    @classmethod
    def outfit(cls, config: Config, model: nn.Module) -> None:
        if config.section("grpo", GRPOSettings).kl_estimator == "exact":
            body_width(ShapeSplit(model), "grpo.kl_estimator: exact")

    def make(self, rollout: Rollout, rows: Sequence[int]) -> list[MicroBatch]:
        (batch,) = super().make(rollout, rows)
        return [batch.with_finish(self._with_reference) if self.exact else batch]

    def _with_reference(self, data: RolloutBatch) -> RolloutBatch:
        assert self.reference is not None
        with self.reference.reading() as split:
            hidden = as_trained(lambda: rows_hidden(split, data.ids, data.positions))
        mx.async_eval(hidden)  # before the policy's pass, whose activations must not stand beside the reference's
        return replace(data, ref_hidden=hidden)

    @classmethod
    def outline(cls, config: Config) -> Outline:
        exact = config.section("grpo", GRPOSettings).kl_estimator == "exact"
        return Outline("logprobs and kl" if exact else "logprobs")

    def beside(self, model: nn.Module) -> Beside:
        around = super().beside(model)
        if not self.exact:
            return around
        # The reference's hidden states at all tokens of a step.
        with probing(model):
            one = ShapeSplit(model).hidden(mx.array([[0]])).nbytes
        tokens = self.config.batch.accumulate * max(sum(s.trained for s, _ in step) for step in self._largest_steps())
        frozen = around.residents.frozen
        frozen = {**frozen, "reference": frozen["reference"] + tokens * one}
        return around._replace(residents=around.residents._replace(frozen=frozen))

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
            f"{rollouts} consecutive rollouts have nothing to learn from: by {' and '.join(on)} all of their "
            "completions are left out (see equal_groups and eos_share in metrics.jsonl). The prompts are too "
            "easy or too hard for this reward, or rollout.max_tokens is too small; the last checkpoint is kept"
        )

    def compute_advantages(self, rollout: Rollout) -> tuple[Floats, dict[str, float]]:
        s, size = self.settings, self.rollouts.samples
        event = {"equal_groups": float(equal_groups(rollout.scores, size).mean())}
        if s.skip_equal or s.mask_truncated:
            event["trained_share"] = len(self.kept(rollout)) / len(rollout)
        advantages = group_relative(rollout.scores, size, s.scale, s.others)
        if s.kl_in == "advantages":
            advantages -= self.kl_coef * leave_one_out(self.kls(rollout), size)
        return advantages, event

    def per(self, rollout: Rollout, rows: Sequence[int]) -> dict[str, float]:
        if self.settings.loss == "token":
            return super().per(rollout, rows)
        return {"policy": float(len(rows) * (self.rollouts.max_tokens if self.settings.loss == "constant" else 1))}

    def loss(self, model: nn.Module, data: RolloutBatch) -> Terms:
        s, penalty, logprobs = self.settings, None, None
        if self.needs_reference:
            assert data.ref_logprobs is not None
            penalty = F.KLPenalty(data.ref_logprobs, self.kl_coef, s.kl_estimator)
        if data.ref_hidden is not None:
            hidden = rows_hidden(self.split, data.ids, data.positions)
            logprobs = hidden_logprobs(self.split, hidden, data.labels, grad=True, draw=self.how)
            (behind,) = mx.depends([hidden], [logprobs])  # or logits would be in memory twice
            kl = hidden_kl(self.split, behind, data.ref_hidden, self._ref_logits, grad=True, draw=self.how)
            penalty = F.KLPenalty(kl, self.kl_coef, "exact")
        how = F.Aggregation(s.loss, self.rollouts.max_tokens, s.ratio, weighted=s.surrogate == "weighted")
        return self.policy_loss(data, (s.clip, s.clip_high or s.clip), how, penalty, logprobs)

    def _ref_logits(self, hidden: mx.array) -> mx.array:
        assert self.reference is not None
        with self.reference.reading() as split:
            return split.logits(hidden)


# --- rloo -------------------------------------------------------------------------------------------------------------
# REINFORCE leave-one-out (Ahmadian et al. 2024): a completion's baseline is the mean reward of its prompt's others.


class RLOOSettings(InReward):
    """Settings of objective rloo."""

    kl_coef: float = Field(0.05, ge=0, description="Cost of a nat of KL to the reference in the reward.")


class RLOO(Reinforced[RLOOSettings]):
    """RLOO."""

    sections = sections({"rloo": RLOOSettings})
    learning_rate = 1e-6  # of full fine-tuning, as TRL's RLOOConfig

    grouped = True

    def __init__(self, config: Config, tokenizer: Any) -> None:
        super().__init__(config, tokenizer, RLOOSettings)

    def compute_advantages(self, rollout: Rollout) -> tuple[Floats, dict[str, float]]:
        return leave_one_out(self.compute_rewards(rollout), self.rollouts.samples), {}


# --- reinforce --------------------------------------------------------------------------------------------------------

DECAY = 0.9


class ReinforceSettings(InReward):
    """Settings of objective reinforce."""

    kl_coef: float = Field(0.05, ge=0, description="Cost of a nat of KL to the reference in the reward.")
    baseline: Literal["batch", "average"] = Field(
        "batch",
        description="Subtracted from a reward: the rollout's mean, or an exponential moving average over earlier "
        "rollouts, which also works with a single completion.",
    )
    decay: float | None = Field(
        None, ge=0, lt=1, description=f"Weight of the moving average's old value at each rollout; default {DECAY}."
    )

    @model_validator(mode="after")
    def _consistent(self) -> ReinforceSettings:
        if self.decay is not None and self.baseline != "average":
            raise ValueError(f"decay ({self.decay:g}) is for baseline: average; set that, or leave decay out")
        return self


class Reinforce(Reinforced[ReinforceSettings]):
    """REINFORCE."""

    sections = sections({"reinforce": ReinforceSettings})
    learning_rate = 1e-6  # of full fine-tuning, as TRL's RLOOConfig

    def __init__(self, config: Config, tokenizer: Any) -> None:
        super().__init__(config, tokenizer, ReinforceSettings)
        self.average: float | None = None
        count = min(self.rollouts.prompts, len(self.prompts)) * self.rollouts.samples
        if self.settings.baseline == "batch" and count < 2:
            raise ConfigError(
                "reinforce.baseline: a rollout of one completion has its own reward as the mean, so advantages are 0; "
                "raise rollout.prompts or rollout.samples, or set baseline: average"
            )

    def compute_advantages(self, rollout: Rollout) -> tuple[Floats, dict[str, float]]:
        rewards = self.compute_rewards(rollout)
        mean = float(rewards.mean())
        if self.settings.baseline == "batch":
            return rewards - rewards.mean(), {}
        # The first rollout starts the average: its mean is a better guess than 0.
        before = mean if self.average is None else self.average
        decay = DECAY if self.settings.decay is None else self.settings.decay
        self.average = decay * before + (1 - decay) * mean
        return (rewards - before).astype("float32"), {"baseline": before}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.average = state["average"]
