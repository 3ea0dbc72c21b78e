"""REINFORCE leave-one-out (Ahmadian et al. 2024): a completion's baseline is the mean reward of its prompt's others."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mlxft.config import Config
from mlxft.objectives.onpolicy.critic_free import InReward, Reinforced
from mlxft.objectives.onpolicy.group import Floats, leave_one_out
from mlxft.objectives.onpolicy.rolled import sections
from mlxft.objectives.onpolicy.rollout import Rollout


class RLOOSettings(InReward):
    """Settings of objective rloo."""

    kl_coef: float = Field(0.05, ge=0, description="What a nat of KL to the reference costs, of the reward.")


class RLOO(Reinforced[RLOOSettings]):
    """RLOO."""

    sections = sections({"rloo": RLOOSettings})
    learning_rate = 1e-6  # of full fine-tuning, as TRL's RLOOConfig

    grouped = True

    def __init__(self, config: Config, tokenizer: Any) -> None:
        super().__init__(config, tokenizer, RLOOSettings)

    def worth(self, rollout: Rollout) -> tuple[Floats, dict[str, float]]:
        return leave_one_out(self.rewards_of(rollout), self.rollouts.samples), {}
