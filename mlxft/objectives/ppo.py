"""Proximal policy optimisation (Schulman et al. 2017) as in RLHF (Ziegler et al. 2019, Stiennon et al. 2020).

Each token's reward is -kl_coef x its KL to the reference, plus the completion's score at the last one (of an episode,
each turn's reward at the turn's last one); a critic and GAE turn rewards into advantages. The critic is a role over the
same base, or a head on the policy's trunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from pydantic import Field, model_validator

from mlxft.config import Config
from mlxft.model.heads import CRITIC, ScoreHead, body_width
from mlxft.model.layers import LEAVES, probing
from mlxft.model.logits import Split, hidden_entropy, hidden_logprobs, hidden_logprobs_entropy, rows_hidden
from mlxft.model.memory import ShapeSplit
from mlxft.model.prefix import Completions
from mlxft.model.roles import Roles
from mlxft.objectives import functional as F
from mlxft.objectives.base import MicroBatch, Terms
from mlxft.objectives.rollouts import OnPolicy, OnPolicySettings, Piece, Rollout, RolloutBatch, sections

# --- critic -----------------------------------------------------------------------------------------------------------

_ROLE = "value"


class Critic(nn.Module):
    """A scalar head, and the value role's own parameters.

    They stand here while the policy is active, so that the loop trains both and one update by parameter name reaches
    them. To be read they are put into the role's layers, and the role into the model.

    Args:
        weights: full name -> value of the role's parameters; empty for a head on the policy's trunk.
    Attributes:
        offset: added to the head's values, since the head has no bias: the mean of normalised rewards.
    """

    offset = 0.0

    def __init__(self, weights: dict[str, mx.array], head: ScoreHead) -> None:
        super().__init__()
        self.head = head
        # An update built from names would take dots for paths.
        self.role = {name.replace(".", "/"): value for name, value in weights.items()}

    def values(self, split: Split, roles: Roles, ids: mx.array, positions: mx.array) -> mx.array:
        """Return (N,) float32 values at positions of (B, T) ids, by the value role."""
        weights = {name.replace("/", "."): value for name, value in tree_flatten(self.role)}
        role = roles[_ROLE]
        for name, value in weights.items():
            path, _, leaf = name.rpartition(".")
            if path in role.layers and leaf in LEAVES:
                role.layers[path][leaf] = value
            else:
                role.whole[name] = value
        try:
            with roles.use(_ROLE):
                return self.head(rows_hidden(split, ids, positions)) + self.offset
        finally:
            role.whole.clear()  # or replaced arrays would stay in memory


def add_critic(model: nn.Module, split: Split, roles: Roles, start: str | None, width: int) -> Critic:
    """Attach a critic to a model whose policy is active.

    Args:
        start: the role that it starts as, with that role's head if it has one; None: a head on the policy's trunk.
        width: of the hidden states.
    """
    head = ScoreHead.of(mx.zeros((1, width)))  # all values 0: the first advantages come from rewards alone
    weights: dict[str, mx.array] = {}
    if start is not None:
        role = roles.copy(start, _ROLE)
        if role.head is not None:
            head, role.head = role.head, None
        # An output layer does not reach the values; weight decay would only shrink it.
        inside = next(name for name, module in model.named_modules() if module is split.body) + "."
        role.layers = {path: layer for path, layer in role.layers.items() if path.startswith(inside)}
        role.whole = {name: value for name, value in role.whole.items() if name.startswith(inside)}
        weights = roles.weights(_ROLE)
    critic = Critic(weights, head)
    setattr(model, CRITIC, critic)
    return critic


def is_critic(name: str) -> bool:
    """Return whether a parameter of the model is the critic's."""
    return name.startswith(f"{CRITIC}.")


def of_policy(name: str) -> bool:
    return not is_critic(name)


def explained_variance(values: Any, returns: Any) -> float:
    """Return 1 - var(returns - values) / var(returns); 0 for constant returns."""
    spread = float(returns.var())
    return 1.0 - float((returns - values).var()) / spread if spread > 0 else 0.0


# --- ppo --------------------------------------------------------------------------------------------------------------


class PPOSettings(OnPolicySettings):
    """The section `ppo`."""

    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k1", description="Estimator of a token's KL (Schulman 2020): k1 is unbiased, k2 and k3 are never below 0."
    )
    kl_target: float | None = Field(
        None, gt=0, description="Adapt kl_coef towards this KL, in nats a completion; default: kl_coef is fixed."
    )
    kl_horizon: int | None = Field(
        None, ge=1, description="Completions over which kl_coef adapts, with kl_target; default 10000."
    )
    epochs: int = Field(4, ge=1, le=10**4, description="Passes over each rollout.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount of later rewards.")
    lam: float = Field(0.95, ge=0, le=1, description="GAE's lambda: 0 relies on the critic, 1 on the rewards.")
    clip: float = Field(0.2, gt=0, description="The ratio has no gradient beyond 1 - clip and 1 + clip.")
    dual_clip: float | None = Field(
        None, gt=1, description="Bound of the ratio where an advantage is negative (Ye et al. 2020); 3 is usual."
    )
    value_clip: float | None = Field(
        0.2, gt=0, description="Values have no gradient farther than this from their old ones; null: no clipping."
    )
    value_coef: float = Field(0.5, gt=0, description="Weight of the critic's loss.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the policy's entropy, which is maximised.")
    whiten: bool = Field(
        True,
        description="Shift and scale a rollout's advantages to mean 0 and variance 1, unless it has one completion.",
    )
    critic: Literal["separate", "shared"] = Field(
        "separate", description="A role that starts from the reward role, or a head on the policy's trunk."
    )
    critic_lr: float | None = Field(None, gt=0, description="Learning rate of the critic; default: optim.lr.")
    critic_warmup: int = Field(0, ge=0, description="First rollouts, which train the critic only.")

    @model_validator(mode="after")
    def _consistent(self) -> PPOSettings:
        if self.kl_horizon is not None and self.kl_target is None:
            raise ValueError(f"kl_horizon ({self.kl_horizon}) is for an adaptive kl_coef; give kl_target too")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target: a kl_coef of 0 cannot adapt; start with one above 0")
        return self


class PPO(OnPolicy[PPOSettings]):
    """PPO with a critic and GAE."""

    sections = sections({"ppo": PPOSettings})
    learning_rate = 3e-6  # of full fine-tuning, as TRL's PPOConfig

    reads = ("old_logprobs", "advantages", "values", "returns")

    def __init__(self, config: Config, tokenizer: Any) -> None:
        super().__init__(config, tokenizer, PPOSettings)
        self.first_whole = self.settings.critic_warmup
        self._critic: Critic | None = None

    @property
    def critic(self) -> Critic:
        """Return the critic, once `prepare` was called."""
        assert self._critic is not None
        return self._critic

    def prepare(self, model: nn.Module, base: str = "") -> None:
        super().prepare(model, base)
        start = None if self.settings.critic == "shared" else self.rewards.role or "policy"
        critic = self._critic = add_critic(model, self.split, self.roles, start, body_width(self.split))
        if start is not None and start == self.rewards.role:
            # Values are of rewards, not of raw scores.
            critic.head.weight = critic.head.weight * self.rewards.slope
            critic.offset = self.rewards.offset

    def clip_groups(self) -> dict[str, float]:
        rate = self.settings.critic_lr
        return {f"{CRITIC}.": 1.0 if rate is None else rate / self.config.optim.lr}

    @classmethod
    def separate_critic(cls, config: Config) -> bool:
        return config.section("ppo", PPOSettings).critic == "separate"

    @classmethod
    def outfit(cls, config: Config, model: nn.Module) -> None:
        body_width(ShapeSplit(model))  # which refuses as training does

    def read_policy(self, a: Completions) -> dict[str, mx.array]:
        if self.settings.critic == "separate":
            return super().read_policy(a)
        hidden = rows_hidden(self.split, a.ids, a.positions)
        logprobs, entropy = hidden_logprobs_entropy(self.split, hidden, a.labels, draw=self.how)
        return {"old_logprobs": logprobs, "entropy": entropy, "values": self.critic.head(hidden)}

    def _values(self, a: Completions | RolloutBatch) -> mx.array:
        """Return (N,) values by the current separate critic."""
        return self.critic.values(self.split, self.roles, a.ids, a.positions)

    def set_advantages(self, rollout: Rollout, micro: Sequence[Piece]) -> dict[str, float]:
        s = self.settings
        if s.critic == "separate":
            with probing(self.split.model):
                self.record(rollout, self.prompts, micro, lambda a: {"values": self._values(a)})
        values, mask = rollout.grid("values"), rollout.mask
        rewards = mx.zeros(mask.shape)
        if self.kl_coef:
            apart = F.kl(rollout.grid("old_logprobs"), rollout.grid("ref_logprobs"), s.kl_estimator)
            rewards = -self.kl_coef * apart * mask
        rewards = rewards + rollout.rewards
        advantages, returns = F.gae(rewards, values, mask, s.gamma, s.lam)
        # Minus its own mean, the sign of a single completion's advantages would be lost.
        whitened = F.whiten(advantages, mask) if s.whiten and len(rollout) > 1 else advantages
        rollout.set_grid("advantages", whitened)
        rollout.set_grid("returns", returns)
        flat = np.array(advantages)[np.array(mask) > 0]
        seen = [np.concatenate(rollout.tokens[name]) for name in ("values", "returns")]
        return {
            "advantage_mean": float(flat.mean()),
            "advantage_std": float(flat.std()),
            "explained_variance": explained_variance(*seen),
        }

    def after_rollout(self, kl: float, count: int) -> None:
        s = self.settings
        if s.kl_target is not None:
            horizon = s.kl_horizon or 10000
            # A rollout counts as at most one horizon: five of them could turn the coefficient's sign.
            self.kl_coef = F.adaptive_kl(self.kl_coef, kl, s.kl_target, horizon, min(count, horizon))

    def _warming(self, rollout: Rollout) -> bool:
        return rollout.number < self.settings.critic_warmup

    def make(self, rollout: Rollout, rows: Sequence[int]) -> list[MicroBatch]:
        """Return one micro-batch where policy and critic share a trunk, else one for each, to save memory."""
        (whole,) = super().make(rollout, rows)
        if self.settings.critic == "shared":
            data = replace(whole.data, advantages=None) if self._warming(rollout) else whole.data
            return [replace(whole, data=data, trains=is_critic if self._warming(rollout) else None)]
        # Each has only the data of its own loss.
        policy = replace(whole.data, values=None, returns=None)
        critic = replace(whole.data, advantages=None)
        if self._warming(rollout):
            return [replace(whole, data=critic, trains=is_critic)]
        return [replace(whole, data=policy, trains=of_policy), MicroBatch(critic, 0, 0, trains=is_critic)]

    def per(self, rollout: Rollout, rows: Sequence[int]) -> dict[str, float]:
        tokens = super().per(rollout, rows)["policy"]
        return {"value": tokens} if self._warming(rollout) else {"policy": tokens, "value": tokens}

    def loss(self, model: nn.Module, data: RolloutBatch) -> Terms:
        if self.settings.critic == "separate":
            if data.advantages is None:
                return self._value_loss(self._values(data), data)
            return self._policy_loss(rows_hidden(self.split, data.ids, data.positions), data)
        hidden = rows_hidden(self.split, data.ids, data.positions)
        value = self._value_loss(self.critic.head(hidden), data)
        if data.advantages is None:
            return value
        policy = self._policy_loss(hidden, data)
        return Terms(policy.losses | value.losses, policy.metrics | value.metrics)

    def _policy_loss(self, hidden: mx.array, data: RolloutBatch) -> Terms:
        assert data.advantages is not None
        s = self.settings
        logprobs = hidden_logprobs(self.split, hidden, data.labels, grad=True, draw=self.how)
        mask = mx.ones_like(logprobs)
        total, _, metrics = F.policy_loss(logprobs, data.old_logprobs, data.advantages, mask, s.clip, s.dual_clip)
        if s.entropy_coef:
            (behind,) = mx.depends([hidden], [logprobs])  # or logits would be in memory twice
            entropy = hidden_entropy(self.split, behind, grad=True, draw=self.how)
            total = total - s.entropy_coef * entropy.sum()
        return Terms({"policy": total}, metrics)

    def _value_loss(self, values: mx.array, data: RolloutBatch) -> Terms:
        assert data.values is not None
        assert data.returns is not None
        mask = mx.ones_like(values)
        total, _, more = F.value_loss(values, data.values, data.returns, mask, self.settings.value_clip)
        return Terms({"value": self.settings.value_coef * total}, {"value_loss": total, **more})
