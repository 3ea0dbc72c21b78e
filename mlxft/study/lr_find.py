"""mlxft lr-find: the learning-rate range test (Smith 2015): the loss while the rate rises step by step."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mlxft.build import is_open, load_base, make_objective, settled
from mlxft.config import Config
from mlxft.errors import ConfigError, TrainingError, missing_extra
from mlxft.model.layers import aside, limits
from mlxft.run import assemble
from mlxft.study import plots
from mlxft.study.plots import check_suffix
from mlxft.text import Event, make_console
from mlxft.trainer.loop import Hooks, Loop, Progress
from mlxft.trainer.report import Stopped, sparkline

SMOOTHING = 0.9  # of the running mean: about ten steps count
WARMUP = 10  # steps before the running mean is judged
LEAST_STEPS = 20
RISE = 0.25  # of the loss's whole fall; less is noise
RULE = "a tenth of the rate at which the smoothed loss was lowest before it first rose by a quarter of its whole fall"


@dataclass(frozen=True)
class RateRange:
    """What a range test found.

    Attributes:
        rates, losses, smoothed: of each step, up to where the loss ran away.
        suggestion: by RULE; None where the loss did not fall.
        steepest: the rate at which the smoothed loss fell fastest; None where it did not.
        diverged: whether the loss ran away before the highest rate.
        note: what to think of it, where that is in doubt.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float | None
    steepest: float | None
    diverged: bool
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        names = ("suggestion", "steepest", "diverged", "note", "rates", "losses", "smoothed")
        return {"rule": RULE, **{k: getattr(self, k) for k in names}}

    def lines(self) -> list[str]:
        """In words."""
        shape = sparkline(self.smoothed[:: max(1, len(self.smoothed) // 60)])
        said = [f"loss {shape} at rates {self.rates[0]:.1e} to {self.rates[-1]:.1e}, {len(self.rates)} steps"]
        if self.suggestion is not None:
            said.append(f"suggestion: optim.lr={self.suggestion:.2g} ({RULE}); steepest fall at {self.steepest:.2g}")
        return said + ([f"note: {self.note}"] if self.note else [])


def rate_at(step: int, steps: int, low: float, high: float) -> float:
    """Rate of `step` (from 0) of `steps`: from low to high, evenly in the logarithm."""
    return low * (high / low) ** (step / (steps - 1))


def smooth(losses: list[float]) -> list[float]:
    """Running mean with weight SMOOTHING on what was, corrected for its start at 0 (as in Adam)."""
    mean, found = 0.0, []
    for k, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**k))
    return found


def ran_away(smoothed: list[float]) -> bool:
    """Whether the last value is above the lowest by as much as the lowest itself, or as much as the loss has fallen,
    whichever is more."""
    low = min(smoothed)
    return len(smoothed) > WARMUP and smoothed[-1] > low + max(abs(low), smoothed[0] - low)


def valley(smoothed: list[float]) -> int:
    """Where the loss was lowest before it first rose by RISE of its whole fall: what it does at rates far beyond is no
    matter."""
    rise = RISE * (smoothed[0] - min(smoothed))
    low = 0
    for k, loss in enumerate(smoothed):
        if loss < smoothed[low]:
            low = k
        elif loss > smoothed[low] + rise and low > WARMUP:
            break
    return low


def suggest_rate(rates: list[float], losses: list[float], diverged: bool) -> RateRange:
    """A suggestion from the course of the loss."""
    smoothed = smooth(losses)
    low = valley(smoothed)
    slopes = [(b - a, r) for a, b, r in zip(smoothed[WARMUP:low], smoothed[WARMUP + 1 : low + 1], rates[WARMUP + 1 :])]
    fell = low > WARMUP and slopes and min(slopes)[0] < 0
    if not fell:
        note = "the loss never fell: try a lower --min, more --steps, or look at the rows with mlxft check"
        return RateRange(rates, losses, smoothed, None, None, diverged, note)
    note = ""
    if not diverged and low > 0.9 * (len(smoothed) - 1):
        note = "the loss was still falling at the highest rate: a higher --max may find more"
    return RateRange(rates, losses, smoothed, rates[low] / 10, min(slopes)[1], diverged, note)


class _Rising(Loop):
    """The loop, with a rate that rises and without validation."""

    def __init__(self, *parts: Any, low: float, high: float) -> None:
        super().__init__(*parts)
        self._low, self._high = low, high

    def rate(self) -> float:
        return rate_at(self.progress.step, self.total_steps, self._low, self._high)


@aside()
def lr_find(
    config: Config,
    low: float = 1e-7,
    high: float = 1.0,
    steps: int = 100,
    plot: Path | None = None,
    console: Console | None = None,
) -> RateRange:
    """Train for some steps at rising rates, and look where the loss falls; nothing of it is kept.

    Args:
        low, high: first and last rate.
        plot: a picture, .png, .svg or .pdf.
    Raises:
        ConfigError, DataError, ModelError: as training would; bounds that hold no range.
        TrainingError: the first loss is no number already.
        KeyboardInterrupt: interrupted.
    """
    if not 0 < low < high < math.inf:
        raise ConfigError(f"--min {low:g} --max {high:g}: expected 0 < min < max")
    if steps < LEAST_STEPS:
        raise ConfigError(f"--steps {steps}: at least {LEAST_STEPS} are needed to see a course")
    if plot is not None:
        check_suffix(plot)
        if importlib.util.find_spec("matplotlib") is None:
            raise ConfigError(f"--plot: {missing_extra('matplotlib', 'plots')}")
    rates, losses, diverged = _rise(config, low, high, steps, console or make_console())
    found = suggest_rate(rates, losses, diverged)
    if plot is not None:
        plots.lr_curve(found.rates, found.smoothed, found.suggestion, plot)
    return found


def _rise(
    config: Config, low: float, high: float, steps: int, console: Console
) -> tuple[list[float], list[float], bool]:
    """Rates, losses, and whether they ran away."""
    rates: list[float] = []
    losses: list[float] = []

    def hear(event: Event) -> None:
        if event["event"] != "train":
            return
        rates.append(event["lr"])
        losses.append(event["loss"])
        if console.is_terminal:
            status.update(f"step {event['step']} of {steps}: rate {event['lr']:.1e}, loss {event['loss']:.4f}")
        # The loop would validate after its last step.
        if ran_away(smooth(losses)):
            raise Stopped("the loss runs away")
        if len(losses) == steps:
            raise Stopped("done", "done")

    correct, config = is_open(config), settled(config, resume=False)
    loaded = load_base(config, lazy=True)
    objective = make_objective(config, loaded.tokenizer)
    _, optimizer, config, _ = assemble(config, loaded, objective, correct)
    run: dict[str, Any] = {"report_every": 1, "eval_at_start": False, "patience": None}
    run |= {"eval_every": steps + 1, "save_every": steps + 1}
    config = config.model_copy(update={"run": config.run.model_copy(update=run)})
    hooks = Hooks(hear, lambda p: None, lambda p: None, lambda p: None)
    with limits(config.memory.limit, config.memory.cache), console.status("range test") as status:
        try:
            parts = (loaded.model, objective, optimizer, config, steps, Progress(), hooks)
            _Rising(*parts, low=low, high=high).run()
        except Stopped as e:
            return rates, losses, e.run_status != "done"
        except TrainingError:
            if len(losses) <= WARMUP:
                raise
            return rates, losses, True
    raise KeyboardInterrupt  # the loop ends by itself only where it is asked to
