"""How a policy does on prompts that it is not trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxft.objectives.functional import wins
from mlxft.objectives.onpolicy.rewards import Scores

if TYPE_CHECKING:
    from mlxft.objectives.onpolicy.base import OnPolicy

SHOWN = 4  # completions that are shown


class HeldOut:
    """Held-out prompts, answered by policy and reference, always with the same random numbers."""

    def __init__(self, objective: OnPolicy[Any]) -> None:
        self._objective = objective
        self._before: Scores | None = None  # the reference's

    def measure(self) -> dict[str, Any]:
        """Reward, KL and win rate against the reference by the reward, and some completions with their scores.

        KL where the reference is asked for it, the win rate where it can still be had.
        """
        o = self._objective
        every = list(range(len(o.valid)))
        seed = o.seed_of(0, valid=True)
        rollout = o.sample(o.valid, every, 1, 0, seed)
        scores = o.score(rollout, o.valid)
        lengths = rollout.sizes + np.array([len(p.ids) for p in o.valid])
        entropy = o.measure(rollout, o.valid, o.cut(every, lengths))
        reward, kl = float(scores.total.mean()), o.kl_of(rollout)
        return {
            # Lower is better, and what is optimised: by it the best weights are kept.
            "loss": o.settings.kl_coef * kl.get("kl", 0.0) - reward,
            "reward": reward,
            **{f"reward/{name}": float(values.mean()) for name, values in scores.components.items()},
            **kl,
            "entropy": entropy,
            "response_tokens": float(rollout.sizes.mean()),
            "eos_share": float(np.mean(rollout.finished)),
            **(self._against(scores, seed) if o.has_reference else {}),
            "samples": [
                {
                    "prompt": o.valid[i].text,
                    "answer": o.text(rollout.replies[i], o.opening(o.valid[i])),
                    "score": float(scores.total[i]),
                }
                for i in every[:SHOWN]
            ],
        }

    def _against(self, scores: Scores, seed: int) -> dict[str, float]:
        """The scores beside those of the reference's completions."""
        o = self._objective
        if self._before is None:
            with o.roles.use(o.reference):
                self._before = o.score(o.sample(o.valid, list(range(len(o.valid))), 1, 0, seed), o.valid)
        now, before = scores.total, self._before.total
        won = wins(mx.array(now - before), mx.array(np.abs(now) + np.abs(before)))
        return {
            "win_rate": float(won.mean()),
            "reference_reward": float(before.mean()),
            "reference_reward_std": float(before.std()),
        }
