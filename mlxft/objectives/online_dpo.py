"""Online direct preference optimisation (Guo et al. 2024): DPO on pairs of the policy's own completions.

The reward says which completion of a pair is the better one. Pairs of equal rewards teach nothing and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from pydantic import Field

from mlxft.config import Config
from mlxft.errors import ConfigError
from mlxft.model.logits import row_sums
from mlxft.model.memory import Outline
from mlxft.objectives import functional as F
from mlxft.objectives.base import MicroBatch, Terms
from mlxft.objectives.pairs import halves, implicit_rewards
from mlxft.objectives.rollouts import FAR, OnPolicy, OnPolicySettings, Piece, Rollout, RolloutBatch, sections


class OnlineDPOSettings(OnPolicySettings):
    """Settings of objective online_dpo."""

    kl_coef: float = Field(
        0.1,
        gt=0,
        description="DPO's beta: how strongly the policy is held to the reference. Where preferences follow "
        "Bradley-Terry in the rewards, the optimum is that of reward - kl_coef x KL.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Assumed share of pairs whose rewards are in the wrong order."
    )
    pairs: Literal["disjoint", "extremes"] = Field(
        "disjoint",
        description="disjoint: each completion of a prompt is in one pair, as it was sampled. extremes: one pair of a "
        "prompt, its best completion against its worst.",
    )


class OnlineDPO(OnPolicy[OnlineDPOSettings]):
    """Online DPO. The completions of a pair are neighbours in all lists, the better one first."""

    sections = sections({"online_dpo": OnlineDPOSettings})
    learning_rate = 1e-6  # of full fine-tuning, as for objective preference

    grouped = True
    together = 2
    needs_reference = True
    reads = ("old_logprobs",)

    def __init__(self, config: Config, tokenizer: Any) -> None:
        super().__init__(config, tokenizer, OnlineDPOSettings)
        samples = self.rollouts.samples
        if self.settings.pairs == "disjoint" and samples % 2:
            raise ConfigError(
                f"rollout.samples: {samples} completions of a prompt cannot be split into pairs; give an even number, "
                "or set online_dpo.pairs: extremes"
            )

    @classmethod
    def outline(cls, config: Config) -> Outline:
        return Outline("logprobs", cls.together)

    @property
    def per_prompt(self) -> int:
        return 1 if self.settings.pairs == "extremes" else super().per_prompt

    def pairs(self, rollout: Rollout) -> list[tuple[int, int]]:
        """Return the better and the worse completion of each pair, ties included."""
        size = self.rollouts.samples if self.settings.pairs == "extremes" else self.together
        groups = rollout.scores.reshape(-1, size)
        best, worst = (pick(groups, axis=1) + size * np.arange(len(groups)) for pick in (np.argmax, np.argmin))
        return list(zip(best.tolist(), worst.tolist()))

    def kept(self, rollout: Rollout) -> list[int]:
        scores = rollout.scores
        return [i for better, worse in self.pairs(rollout) if scores[better] > scores[worse] for i in (better, worse)]

    def why_idle(self, rollouts: int) -> str:
        return (
            f"{rollouts} consecutive rollouts have nothing to learn from: the rewards of every pair are equal (see "
            "ties in metrics.jsonl). The prompts are too easy or too hard for this reward, or it has too few values; "
            "the last checkpoint is kept"
        )

    def set_advantages(self, rollout: Rollout, micro: Sequence[Piece]) -> dict[str, float]:
        kept = rollout.scores[self.kept(rollout)]
        trained, every = len(kept) // 2, len(self.pairs(rollout))
        gap = float((kept[::2] - kept[1::2]).mean()) if trained else 0.0
        return {"pairs": trained, "ties": every - trained, "reward_gap": gap}

    def make(self, rollout: Rollout, rows: Sequence[int]) -> list[MicroBatch]:
        (batch,) = super().make(rollout, rows)
        owners = np.repeat(np.arange(len(rows)), rollout.sizes[list(rows)]).astype(np.int32)
        return [replace(batch, data=replace(batch.data, owners=mx.array(owners)))]

    def per(self, rollout: Rollout, rows: Sequence[int]) -> dict[str, float]:
        return {"preference": len(rows) / 2}

    def loss(self, model: nn.Module, data: RolloutBatch) -> Terms:
        assert data.owners is not None
        assert data.ref_logprobs is not None
        s, owners, count = self.settings, data.owners, data.ids.shape[0]
        order = mx.concatenate([mx.arange(0, count, 2), mx.arange(1, count, 2)])  # the better ones first
        tokens = self.logprobs(data)
        sums, ref = (row_sums(x, owners, count)[order] for x in (tokens, data.ref_logprobs))
        losses = F.dpo(*halves(sums), *halves(ref), s.kl_coef, s.label_smoothing)
        size = s.kl_coef * (mx.abs(sums) + mx.abs(ref))
        metrics = implicit_rewards(F.implicit_reward(sums, ref, s.kl_coef), size, mx.ones(count // 2))
        moved = row_sums(F.kl(data.old_logprobs, mx.stop_gradient(tokens), "k3"), owners, count)
        a_token = moved / row_sums(mx.ones(tokens.shape), owners, count)
        return Terms({"preference": losses.sum()}, metrics | {FAR: a_token.sum() / 2})
