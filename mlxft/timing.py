"""How long a run will take: a few real steps, of which nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import mlx.core as mx

from mlxft.config import Config
from mlxft.model.memory import limits
from mlxft.model.random import aside
from mlxft.objectives.base import Batch
from mlxft.objectives.onpolicy.base import OnPolicy
from mlxft.objectives.onpolicy.memory import rollout_steps
from mlxft.parts import load_base
from mlxft.planning import amount
from mlxft.run import assemble, total_steps
from mlxft.trainer.loop import Event, Hooks, Loop, Progress

STEPS = 4  # the first one is not timed: it compiles
LOOKED_AT = 64  # batches among which the largest is found


@dataclass(frozen=True)
class TimedSteps:
    """What a few steps took.

    Attributes:
        seconds: expected for the whole run, without validation and saving.
        tokens_per_s: real tokens, padding not counted.
        peak: measured, in bytes.
        rollout: seconds of one, by phase; empty where completions are not the model's own.
    """

    seconds: float
    tokens_per_s: float
    peak: int
    rollout: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        found: dict[str, Any] = {"expected_s": self.seconds, "tokens_per_s": self.tokens_per_s}
        return found | {"measured_peak": self.peak} | ({"rollout": self.rollout} if self.rollout else {})

    def lines(self, predicted: int | None) -> list[str]:
        """In words."""
        beside = f" (predicted: {amount(predicted)})" if predicted is not None else ""
        phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.rollout.items())
        return [
            f"time: about {duration(self.seconds)} at {self.tokens_per_s:,.0f} tokens/s, without validation and saving",
            *([f"a rollout: {phases}"] if phases else []),
            f"measured peak memory: {amount(self.peak)}{beside}",
        ]


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@aside()
def timed_steps(config: Config, objective: Any, correct: bool) -> TimedSteps:
    """Load the weights, take a few steps, and tell from them how long a run will take.

    Of on-policy training it is the steps of one whole rollout, which is sampled and scored for it.

    Args:
        correct: see `assemble`.
    Raises:
        ModelError: the weights can not be loaded.
        RewardError: a reward gives no number.
        TrainingError: the loss is no number.
    """
    loaded = load_base(config, lazy=True)
    _, optimizer, config, _ = assemble(config, loaded, objective, correct)
    total = total_steps(config, objective)
    events: list[Event] = []
    settings = {"report_every": 1, "eval_at_start": False, "eval_every": None, "patience": None}
    config = config.model_copy(update={"run": config.run.model_copy(update=settings)})
    hooks = Hooks(events.append, lambda p: None, lambda p: None, lambda p: None)
    rolls = isinstance(objective, OnPolicy)
    count = rollout_steps(objective) if rolls else STEPS
    steps = _Unvalidated(objective) if rolls else _Few(objective, loaded.model, STEPS * config.batch.accumulate)
    mx.reset_peak_memory()
    with limits(config.memory.limit, config.memory.cache):
        Loop(loaded.model, steps, optimizer, config, count, Progress(), hooks).run()
    if rolls:
        return _of_rollout(events, total / count, mx.get_peak_memory())
    first, last = events[0], events[-1]
    seconds = last["elapsed_s"] - first["elapsed_s"]
    tokens_per_s = (last["tokens"] - first["tokens"]) / seconds
    per_step = objective.summary().counts["tokens"] / objective.steps_per_epoch(config.batch.accumulate)
    return TimedSteps(total * per_step / tokens_per_s, tokens_per_s, mx.get_peak_memory())


def _of_rollout(events: list[Event], rollouts: float, peak: int) -> TimedSteps:
    """What one rollout and its steps say of as many."""
    rolled, last = events[0], events[-1]
    seconds = last["elapsed_s"]
    phases = {"sampling": rolled["sampling_s"], "scoring": rolled["scoring_s"]}
    phases["training"] = seconds - sum(phases.values())
    return TimedSteps(rollouts * seconds, last["tokens"] / seconds, peak, phases)


class _Unvalidated:
    """An objective that validates nothing."""

    def __init__(self, objective: Any) -> None:
        self._objective = objective

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def valid_batches(self, model: Any) -> Iterator[Batch]:
        return iter(())

    def evaluate(self, model: Any) -> None:
        return None


class _Few(_Unvalidated):
    """An objective's first batches, the largest first, over and over."""

    def __init__(self, objective: Any, model: Any, count: int) -> None:
        super().__init__(objective)
        seen = list(islice(objective.batches(model), max(LOOKED_AT, count)))
        largest = max(seen, key=lambda b: sum(a.nbytes for a in b.arrays.values()))
        self._batches = [largest, *(b for b in seen if b is not largest)][:count]

    def batches(self, model: Any) -> Iterator[Batch]:
        while True:
            yield from self._batches
