"""REINFORCE (Williams 1992) with a baseline: the rollout's mean reward, or a moving average over rollouts before."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mlxft.config import Config
from mlxft.errors import ConfigError
from mlxft.objectives.onpolicy.critic_free import InReward, Reinforced
from mlxft.objectives.onpolicy.group import Floats
from mlxft.objectives.onpolicy.rolled import sections
from mlxft.objectives.onpolicy.rollout import Rollout

DECAY = 0.9


class ReinforceSettings(InReward):
    """Settings of objective reinforce."""

    kl_coef: float = Field(0.05, ge=0, description="What a nat of KL to the reference costs, of the reward.")
    baseline: Literal["batch", "average"] = Field(
        "batch",
        description="What is taken off a reward: the rollout's mean; or an exponential moving average of the rollouts "
        "before, which works with one completion too.",
    )
    decay: float | None = Field(
        None, ge=0, lt=1, description=f"What the moving average keeps of itself at each rollout; default {DECAY}."
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
                "reinforce.baseline: a rollout of one completion is its own mean, and nothing would be learnt; raise "
                "rollout.prompts or rollout.samples, or set baseline: average"
            )

    def worth(self, rollout: Rollout) -> tuple[Floats, dict[str, float]]:
        rewards = self.rewards_of(rollout)
        mean = float(rewards.mean())
        if self.settings.baseline == "batch":
            return rewards - rewards.mean(), {}
        # The first rollout has none before it; its own mean is nearer to what is to be expected than 0.
        before = mean if self.average is None else self.average
        decay = DECAY if self.settings.decay is None else self.settings.decay
        self.average = decay * before + (1 - decay) * mean
        return (rewards - before).astype("float32"), {"baseline": before}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.average = state["average"]
