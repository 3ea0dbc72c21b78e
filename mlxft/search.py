"""The `sweep:` section: which settings `mlxft sweep` varies, within what, and what it looks for."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mlxft.settings import Settings

UNITS = {"h": 3600, "m": 60, "s": 1}
LOWER_IS_BETTER = ("loss", "perplexity")
DEFAULT_TRIALS = 20


class Range(Settings):
    """What one setting may be: exactly one of these."""

    log: tuple[float, float] | None = Field(None, description="[low, high], evenly in the logarithm: learning rates.")
    float_: tuple[float, float] | None = Field(None, alias="float", description="[low, high], evenly.")
    int_: tuple[int, int] | None = Field(None, alias="int", description="[low, high], whole numbers, both included.")
    log_int: tuple[int, int] | None = Field(None, description="[low, high], whole numbers, evenly in the logarithm.")
    choice: list[Any] | None = Field(None, description="The values themselves.")

    @model_validator(mode="after")
    def _consistent(self) -> Range:
        given = {k.rstrip("_"): v for k, v in self if v is not None}
        if len(given) != 1:
            seen = f"seen {', '.join(given)}" if given else "none is given"
            raise ValueError(f"give exactly one of log, float, int, log_int, choice; {seen}")
        ((kind, value),) = given.items()
        if kind == "choice":
            different = {json.dumps(v, sort_keys=True, default=str) for v in value}
            if len(different) < len(value):
                raise ValueError(f"choice names a value twice: {value}")
            if len(value) < 2:
                raise ValueError(f"a choice of {len(value)} leaves nothing to vary; give at least 2 values, or set it")
            return self
        low, high = value
        if not low < high:
            raise ValueError(f"the range {kind}: [{low:g}, {high:g}] is empty; give [low, high] with low below high")
        if kind.startswith("log") and low <= 0:
            raise ValueError(f"{kind}: [{low:g}, {high:g}] begins at {low:g}, which has no logarithm; begin above 0")
        return self

    @property
    def kind(self) -> str:
        """Which one it is: log, float, int, log_int or choice."""
        return next(k.rstrip("_") for k, v in self if v is not None)

    @property
    def value(self) -> Any:
        """[low, high], or the choices."""
        return next(v for _, v in self if v is not None)


class Sweep(Settings):
    """What `mlxft sweep` varies and looks for; `mlxft train` takes no recipe that has it."""

    space: dict[str, Range] = Field(
        default_factory=dict,
        description="Setting -> its range, e.g. optim.lr: {log: [1e-5, 1e-3]}, tune.rank: {choice: [4, 16, 64]}.",
    )
    metric: str = Field(
        "loss", min_length=1, description="A number of validation (`eval` in metrics.jsonl), of the weights kept."
    )
    direction: Literal["minimize", "maximize"] | None = Field(
        None, description="What is better; loss and perplexity: minimize, others have to say."
    )
    sampler: Literal["tpe", "random", "grid"] = Field(
        "tpe", description="Where trials lie: learnt from those before (TPE), at random, or every combination."
    )
    pruner: Literal["halving", "median", "none"] = Field(
        "halving",
        description="Trials stopped at a validation: those not among the better half of all that came so far (after "
        "1, 2, 4, 8 ... validations), or worse than the median of finished ones at the same point.",
    )
    grace: int = Field(1, ge=1, description="Validations each trial has before it may be stopped.")
    trials: int | None = Field(
        None, ge=1, le=10**6, description=f"Trials in all; default {DEFAULT_TRIALS}, with time: no limit."
    )
    time: str | None = Field(None, description="Longest time of one call, e.g. 2h, 30m, 1h30m.")

    @field_validator("time", mode="before")
    @classmethod
    def _is_time(cls, value: Any) -> Any:
        if value is not None:
            seconds(value)
        return None if value is None else str(value)

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        given = self.model_fields_set
        if given and not self.space:
            raise ValueError("space is needed: the settings to vary, e.g. space: {optim.lr: {log: [1e-5, 1e-3]}}")
        if given and self.direction is None and not self.metric.endswith(LOWER_IS_BETTER):
            raise ValueError(f"direction is needed for metric {self.metric}: minimize or maximize")
        if self.pruner == "none" and "grace" in given:
            raise ValueError(f"grace ({self.grace}) is for a pruner; leave it out with pruner: none")
        if self.sampler == "grid":
            endless = [k for k, r in self.space.items() if r.kind in ("log", "float")]
            if endless:
                raise ValueError(f"grid has every combination of int and choice; {', '.join(endless)}: give a choice")
        return self

    @property
    def minimize(self) -> bool:
        """Whether less is better."""
        return self.direction != "maximize"


def seconds(text: Any) -> float:
    """Of a length of time such as 90s, 30m, 2h or 1h30m.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", str(text).strip())
    total = sum(float(v) * u for v, u in zip(found.groups(), UNITS.values()) if v) if found else 0.0
    if total <= 0:
        raise ValueError(f"{text!r} is no length of time; expected such as 2h, 30m, 1h30m or 90s")
    return total
