"""How long a run will take: a few real steps, of which nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import mlx.core as mx

from mlxft.config import Config
from mlxft.model.memory import checkpoint_layers, limits
from mlxft.objectives.base import Batch
from mlxft.planning import amount, decide_checkpointing
from mlxft.train.loop import Event, Hooks, Loop, Progress
from mlxft.train.optim import Optimizer

STEPS = 4  # the first one is not timed: it compiles
LOOKED_AT = 64  # batches among which the largest is found


@dataclass(frozen=True)
class TimedSteps:
    """What a few steps took.

    Attributes:
        seconds: expected for the whole run, without validation and saving.
        tokens_per_s: real tokens, padding not counted.
        peak: measured, in bytes.
    """

    seconds: float
    tokens_per_s: float
    peak: int

    def to_json(self) -> dict[str, float]:
        """As JSON."""
        return {"expected_s": self.seconds, "tokens_per_s": self.tokens_per_s, "measured_peak": self.peak}

    def lines(self, predicted: int | None) -> list[str]:
        """In words."""
        beside = f" (predicted: {amount(predicted)})" if predicted is not None else ""
        return [
            f"time: about {duration(self.seconds)} at {self.tokens_per_s:,.0f} tokens/s, without validation and saving",
            f"measured peak memory: {amount(self.peak)}{beside}",
        ]


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def timed_steps(config: Config, objective: Any, total: int) -> TimedSteps:
    """Load the weights, take a few steps of a run of `total`, and tell from them how long all will take.

    Raises:
        ModelError: the weights can not be loaded.
        TrainingError: the loss is no number.
    """
    from mlxft.run import load_base, prepare  # which imports planning

    loaded = load_base(config, lazy=True)
    prepare(config, loaded)
    on, _ = decide_checkpointing(config, loaded.model, objective)
    mx.eval(loaded.model.parameters())
    checkpoint_layers(loaded.model, on)
    events: list[Event] = []
    settings = {"report_every": 1, "eval_at_start": False, "eval_every": None, "patience": None}
    config = config.model_copy(update={"run": config.run.model_copy(update=settings)})
    hooks = Hooks(events.append, lambda p: None, lambda p: None, lambda p: None)
    optimizer = Optimizer(config.optim, loaded.model, objective.parts())
    steps = _Few(objective, loaded.model, STEPS * config.batch.accumulate)
    mx.reset_peak_memory()
    with limits(config.memory.limit, config.memory.cache):
        Loop(loaded.model, steps, optimizer, config, STEPS, Progress(), hooks).run()
    first, last = events[0], events[-1]
    seconds = last["elapsed_s"] - first["elapsed_s"]
    tokens_per_s = (last["tokens"] - first["tokens"]) / seconds
    per_step = objective.summary().counts["tokens"] / objective.steps_per_epoch(config.batch.accumulate)
    return TimedSteps(total * per_step / tokens_per_s, tokens_per_s, mx.get_peak_memory())


class _Few:
    """An objective's first batches, the largest first, over and over; it validates nothing."""

    def __init__(self, objective: Any, model: Any, count: int) -> None:
        self._objective = objective
        seen = list(islice(objective.batches(model), max(LOOKED_AT, count)))
        largest = max(seen, key=lambda b: sum(a.nbytes for a in b.arrays.values()))
        self._batches = [largest, *(b for b in seen if b is not largest)][:count]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def batches(self, model: Any) -> Iterator[Batch]:
        while True:
            yield from self._batches

    def valid_batches(self, model: Any) -> Iterator[Batch]:
        return iter(())

    def evaluate(self, model: Any) -> None:
        return None
