"""What a rollout is made of; and dynamic sampling (DAPO, Yu et al. 2025, section 3.2), which draws more of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlxft.objectives.onpolicy.group import equal_groups
from mlxft.objectives.onpolicy.rewards import Scores
from mlxft.objectives.onpolicy.rollout import Rollout

if TYPE_CHECKING:
    from mlxft.objectives.onpolicy.base import OnPolicy


class Drawn(NamedTuple):
    """What a rollout is made of.

    Attributes:
        tokens, seconds: that were sampled for it, and the time that took.
        event: what is worth reporting.
    """

    rollout: Rollout
    scores: Scores
    tokens: int
    seconds: float
    event: dict[str, float]

    def plus(self, more: Drawn) -> Drawn:
        """With what another one took."""
        return self._replace(tokens=self.tokens + more.tokens, seconds=self.seconds + more.seconds)


def resample(objective: OnPolicy[Any], first: Drawn, most: int) -> Drawn:
    """A rollout in whose groups the scores differ, as far as `most` further draws find such.

    Each draw asks as many other prompts as there are groups of equal scores, and those that came out better take their
    places: the rollout keeps its size. Which prompts are asked follows from seed and rollout alone, so that a resumed
    run asks the same. A prompt is asked once a rollout; when all were, it ends.

    Args:
        first: completions of the rollout's own prompts; it is changed.
    Returns:
        The rollout, with all that was sampled counted, and in its event:
        resampled: groups replaced; groups_sampled: groups that were sampled; reward_sampled: their mean reward, which
        no choice has made better or worse.
    """
    size, number = objective.rollouts.samples, first.rollout.number
    asked = set(first.rollout.prompts)
    order = np.random.default_rng([objective.config.run.seed, 5, number]).permutation(len(objective.prompts))
    left = [int(i) for i in order if int(i) not in asked]
    replaced, every = 0, [first.scores.total.copy()]
    drawn = first
    for turn in range(most):
        dull = np.flatnonzero(equal_groups(first.scores.total, size))
        chosen, left = left[: len(dull)], left[len(dull) :]
        if not chosen:
            break
        more = objective.sampled(chosen, number, objective.seed_of(number, turn + 1))
        good = np.flatnonzero(~equal_groups(more.scores.total, size))
        for to, of in zip(dull, good):
            _put(first, more, slice(to * size, (to + 1) * size), slice(of * size, (of + 1) * size))
        replaced += len(good)
        every.append(more.scores.total)
        drawn = drawn.plus(more)
    event = {
        "resampled": replaced,
        "groups_sampled": sum(map(len, every)) // size,
        "reward_sampled": float(np.concatenate(every).mean()),
    }
    return drawn._replace(event={**drawn.event, **event})


def _put(drawn: Drawn, more: Drawn, to: slice, of: slice) -> None:
    """Completions of one rollout in the places of another's, with their scores."""
    old, new = drawn.rollout, more.rollout
    old.prompts[to], old.replies[to], old.finished[to] = new.prompts[of], new.replies[of], new.finished[of]
    drawn.scores.total[to] = more.scores.total[of]
    for name, values in drawn.scores.components.items():
        values[to] = more.scores.components[name][of]
