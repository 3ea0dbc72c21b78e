"""What a sweep found: on the way, as a table, as JSON, as pictures and as a recipe."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from mlxft.config import Config
from mlxft.errors import missing_extra
from mlxft.recipe import dump_yaml
from mlxft.study import plots

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


@dataclass(frozen=True)
class Outcome:
    """A finished trial.

    Attributes:
        state: complete, pruned or failed.
        value: the metric of the weights kept; of a pruned trial at its last validation.
        steps, total: taken, and what all of it would have been (0: it failed before that was known).
    """

    number: int
    state: str
    value: float | None
    params: dict[str, Any]
    steps: int
    total: int
    seconds: float
    error: str | None

    @classmethod
    def of(cls, trial: FrozenTrial, params: dict[str, Any]) -> Outcome:
        """From what is stored of it."""
        known = trial.user_attrs
        state = STATES[trial.state.name]
        value = trial.value if state != "failed" else None
        numbers = known.get("steps", 0), known.get("total", 0), known.get("seconds", 0.0)
        return cls(trial.number, state, value, params, *numbers, known.get("error"))

    def settings(self) -> str:
        """Its settings in one line."""
        return " ".join(f"{k}={shown(v)}" for k, v in self.params.items())


@dataclass(frozen=True)
class Result:
    """What a sweep found.

    Attributes:
        importance: setting -> share, {} where the trials are too few to tell.
    """

    dir: Path
    metric: str
    minimize: bool
    trials: list[Outcome]
    importance: dict[str, float]

    @property
    def best(self) -> Outcome | None:
        """The best of the complete trials; the first of equals."""
        done = [o for o in self.trials if o.state == "complete" and o.value is not None]
        sign = 1 if self.minimize else -1
        return min(done, key=lambda o: (sign * (o.value or 0.0), o.number)) if done else None

    @property
    def recipe(self) -> Path:
        """The best as a recipe."""
        return self.dir / "best.yaml"

    def steps(self) -> dict[str, float]:
        """Steps of complete and pruned trials: taken, of all, and the share that pruning saved."""
        judged = [o for o in self.trials if o.state != "failed"]
        taken, of = sum(o.steps for o in judged), sum(o.total for o in judged)
        # An early stop by run.patience saves steps, too, but is not pruning's doing.
        saved = sum(o.total - o.steps for o in judged if o.state == "pruned")
        return {"taken": taken, "all": of, "saved": saved / of if of else 0.0}

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        best = self.best
        found: dict[str, Any] = {"number": best.number, "value": best.value, "params": best.params} if best else {}
        return {
            "dir": str(self.dir),
            "metric": self.metric,
            "direction": "minimize" if self.minimize else "maximize",
            "trials": [asdict(o) for o in self.trials],
            "best": {**found, "recipe": str(self.recipe)} if found else None,
            "steps": self.steps(),
            "importance": self.importance,
        }

    def print(self, console: Console) -> None:
        """As a table, and what follows from it."""
        console.print(self.table())
        steps, best = self.steps(), self.best
        lines = [f"{steps['taken']:,} of {steps['all']:,} steps taken; pruning saved {steps['saved']:.0%}"]
        if self.importance:
            lines.append("what matters: " + ", ".join(f"{k} {v:.2f}" for k, v in self.importance.items()))
        if best is not None:
            lines.append(f"best: trial {best.number}, {self.metric} {best.value:.6g}, {best.settings()}")
            lines.append(f"train it with: mlxft train {self.recipe}")
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def table(self) -> Table:
        """A row a trial."""
        keys = list(dict.fromkeys(k for o in self.trials for k in o.params))
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("trial", *keys, self.metric):
            table.add_column(column, justify="right", overflow="fold")
        table.add_column("state")
        table.add_column("steps", justify="right")
        table.add_column("time", justify="right")
        best = self.best
        for o in self.trials:
            value = "" if o.value is None else f"{o.value:.4f}"
            cells = [str(o.number), *(shown(o.params.get(k, "")) for k in keys), value]
            state = "best" if best is not None and o.number == best.number else o.state
            cells += [state, f"{o.steps}/{o.total}" if o.total else "", f"{o.seconds:.0f} s"]
            table.add_row(*map(Text, cells), style="bold green" if state == "best" else "")
        return table


def shown(value: Any) -> str:
    """A setting for people."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Progress:
    """A line for each trial that is done; in a terminal a bar below them with the one at hand and the time left."""

    def __init__(self, console: Console, count: int | None, done: int) -> None:
        self._console = console
        columns = (TextColumn("[bold]trials"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, TextColumn("{task.fields[now]}"), console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("trials", total=count, completed=done, now="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def now(self, number: int, step: int, total: int, loss: float | None) -> None:
        """Where the trial at hand is."""
        at = f"trial {number}: step {step} of {total}" + ("" if loss is None else f", loss {loss:.4f}")
        self._bar.update(self._task, now=at)

    def done(self, o: Outcome, metric: str) -> None:
        """A trial is finished."""
        value = "" if o.value is None else f" {metric} {o.value:.4f}"
        why = f": {o.error.splitlines()[0]}" if o.error else ""
        at = f" at step {o.steps} of {o.total}" if o.state == "pruned" else ""
        self.say(f"trial {o.number} {o.state}{at}{value} ({o.settings()}, {o.seconds:.0f} s){why}")
        self._bar.advance(self._task)


def draw(result: Result, console: Console) -> None:
    """history.png and importance.png beside the trials."""
    if importlib.util.find_spec("matplotlib") is None:
        console.print(f"no pictures: {missing_extra('matplotlib', 'plots')}", markup=False, highlight=False)
        return
    rows = [asdict(o) for o in result.trials]
    history = result.dir / "history.png"
    plots.sweep_history(rows, history, metric=result.metric, lower_is_better=result.minimize)
    if result.importance:
        plots.importance(result.importance, result.dir / "importance.png", metric=result.metric)


def best_recipe(result: Result, raw: Mapping[str, Any], config: Config) -> str:
    """The text of best.yaml: the recipe with the best trial's settings, usable from any folder.

    Args:
        raw: that recipe.
        config: the sweep's own, whose paths are whole.
    """
    best = result.best
    assert best is not None
    assert config.run.name is not None
    recipe = {k: dict(v) if isinstance(v, Mapping) else v for k, v in raw.items() if v is not None}
    run = {"name": f"{config.run.name}-best", "dir": str(config.run.dir.absolute())}
    recipe["run"] = {**run, **{k: v for k, v in recipe.get("run", {}).items() if k not in run}}
    for section, keys in (("model", ("path", "adapter", "chat_template")), ("data", ("train", "valid"))):
        for key in keys:
            if key in recipe[section] and f"{section}.{key}" not in best.params:
                value = getattr(getattr(config, section), key)
                recipe[section][key] = str(value) if isinstance(value, Path) else value
    text = dump_yaml(recipe)
    place = repr(str(result.dir))  # a line break in it would end the comment
    said = f"# Trial {best.number} of the sweep {place}: {result.metric} {best.value!r}, which this trains to.\n"
    return said + text
