"""mlxft lr-find: the learning-rate range test (Smith 2015), which records the loss while the rate rises."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mlxft.build import is_open, load_base, make_objective, settled
from mlxft.config import Config
from mlxft.errors import ConfigError, TrainingError, missing_extra
from mlxft.model.layers import aside, limits
from mlxft.run import assemble
from mlxft.study.plots import check_suffix, lr_curve
from mlxft.text import Event, make_console
from mlxft.trainer.loop import Hooks, Loop, Progress
from mlxft.trainer.report import Stopped, sparkline

SMOOTHING = 0.9  # weight of the past in the running mean, which is then over about ten steps
WARMUP = 10  # steps before the running mean can be relied on
LEAST_STEPS = 20
RISE = 0.25  # share of the loss's whole fall; a smaller rise is noise
RULE = "a tenth of the rate at which the smoothed loss was lowest before it first rose by a quarter of its whole fall"


@dataclass(frozen=True)
class RateRange:
    """Result of a range test.

    Attributes:
        suggestion: rate by RULE; None if the loss did not fall.
        steepest: rate at which the smoothed loss fell fastest; None if it did not fall.
        diverged: whether the loss diverged before the highest rate.
        note: a doubt about the result, or "".
        rates, losses, smoothed: values of each step, up to the last one before the test ended.
    """

    suggestion: float | None
    steepest: float | None
    diverged: bool
    note: str
    rates: list[float]
    losses: list[float]
    smoothed: list[float]

    def to_json(self) -> dict[str, Any]:
        return {"rule": RULE, **asdict(self)}

    def lines(self) -> list[str]:
        """Return the result as lines for a terminal."""
        shape = sparkline(self.smoothed[:: max(1, len(self.smoothed) // 60)])
        lines = [f"loss {shape} at rates {self.rates[0]:.1e} to {self.rates[-1]:.1e}, {len(self.rates)} steps"]
        if self.suggestion is not None:
            lines.append(f"suggestion: optim.lr={self.suggestion:.2g} ({RULE}); steepest fall at {self.steepest:.2g}")
        return lines + ([f"note: {self.note}"] if self.note else [])


def rate_at(step: int, steps: int, low: float, high: float) -> float:
    """Return the rate of a step (from 0): evenly spaced in the logarithm from low to high."""
    return low * (high / low) ** (step / (steps - 1))


def smooth(losses: list[float]) -> list[float]:
    """Return the exponential running mean, corrected for its start at 0 as in Adam."""
    mean, found = 0.0, []
    for k, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**k))
    return found


def has_diverged(smoothed: list[float]) -> bool:
    """Return whether the last value exceeds the lowest by as much as the lowest, and by as much as the whole fall."""
    low = min(smoothed)
    return len(smoothed) > WARMUP and smoothed[-1] > low + max(abs(low), smoothed[0] - low)


def valley(smoothed: list[float]) -> int:
    """Return the index of the lowest loss before its first rise by RISE of its whole fall; later values are ignored."""
    rise = RISE * (smoothed[0] - min(smoothed))
    low = 0
    for k, loss in enumerate(smoothed):
        if loss < smoothed[low]:
            low = k
        elif loss > smoothed[low] + rise and low > WARMUP:
            break
    return low


def suggest_rate(rates: list[float], losses: list[float], diverged: bool) -> RateRange:
    """Suggest a rate from the losses at rising rates."""
    smoothed = smooth(losses)
    low = valley(smoothed)
    slopes = [(b - a, r) for a, b, r in zip(smoothed[WARMUP:low], smoothed[WARMUP + 1 : low + 1], rates[WARMUP + 1 :])]
    slope, steepest = min(slopes, default=(0.0, None))
    if slope >= 0:
        note = "the loss never fell: try a lower --min, more --steps, or look at the rows with mlxft check"
        return RateRange(None, None, diverged, note, rates, losses, smoothed)
    note = ""
    if not diverged and low > 0.9 * (len(smoothed) - 1):
        note = "the loss was still falling at the highest rate: a higher --max may find more"
    return RateRange(rates[low] / 10, steepest, diverged, note, rates, losses, smoothed)


@aside()
def lr_find(
    config: Config,
    low: float = 1e-7,
    high: float = 1.0,
    steps: int = 100,
    plot: Path | None = None,
    console: Console | None = None,
) -> RateRange:
    """Train for some steps at rising rates, record the losses, and discard the training.

    Args:
        low, high: first and last rate.
        plot: file for a plot: .png, .svg or .pdf.
    Raises:
        ConfigError, DataError, ModelError: as for training; or low, high or steps do not make a range.
        TrainingError: the loss is NaN or infinite from the start.
        KeyboardInterrupt: the test was interrupted.
    """
    if not 0 < low < high < math.inf:
        raise ConfigError(f"--min {low:g} --max {high:g}: expected 0 < min < max")
    if steps < LEAST_STEPS:
        raise ConfigError(f"--steps {steps}: a range test needs at least {LEAST_STEPS} steps")
    if plot is not None:
        check_suffix(plot)
        if importlib.util.find_spec("matplotlib") is None:
            raise ConfigError(f"--plot: {missing_extra('matplotlib', 'plots')}")
    found = suggest_rate(*_train(config, low, high, steps, console or make_console()))
    if plot is not None:
        lr_curve(found.rates, found.smoothed, found.suggestion, plot)
    return found


def _train(
    config: Config, low: float, high: float, steps: int, console: Console
) -> tuple[list[float], list[float], bool]:
    """Return the rates, the losses, and whether they diverged."""
    rates: list[float] = []
    losses: list[float] = []

    class Rising(Loop):
        def rate(self) -> float:
            return rate_at(self.progress.step, steps, low, high)

    def on_event(event: Event) -> None:
        if event["event"] != "train":
            return
        rates.append(event["lr"])
        losses.append(event["loss"])
        status.update(f"step {event['step']} of {steps}: rate {event['lr']:.1e}, loss {event['loss']:.4f}")
        if has_diverged(smooth(losses)):
            raise Stopped("the loss has diverged")
        if len(losses) == steps:  # the loop itself would validate after its last step
            raise Stopped("done", "done")

    correct, config = is_open(config), settled(config, resume=False)
    loaded = load_base(config, lazy=True)
    objective = make_objective(config, loaded.tokenizer)
    _, optimizer, config, _ = assemble(objective.config, loaded, objective, correct)
    run = {
        "report_every": 1,
        "eval_at_start": False,
        "patience": None,
        "eval_every": steps + 1,
        "save_every": steps + 1,
    }
    config = config.model_copy(update={"run": config.run.model_copy(update=run)})
    hooks = Hooks(on_event, *[lambda progress: None] * 3)
    with limits(config.memory.limit, config.memory.cache), console.status("range test") as status:
        try:
            Rising(loaded.model, objective, optimizer, config, steps, Progress(), hooks).run()
        except Stopped as e:
            return rates, losses, e.run_status != "done"
        except TrainingError:
            if len(losses) <= WARMUP:
                raise
            return rates, losses, True
    raise KeyboardInterrupt  # the loop returns only when it was interrupted
