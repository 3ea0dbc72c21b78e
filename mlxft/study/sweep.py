"""mlxft sweep: trials of a recipe with other settings, the worse ones stopped early; the best as a recipe.

runs/NAME/sweep.db       Optuna's trials: a sweep that was killed goes on
         /trials/N/      each trial's run, without checkpoints; of pruned and failed ones only what was measured
         /best.yaml      the best trial as a recipe, which trains to the figure reported
         /history.png, importance.png
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import io
import json
import math
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import blake2b
from itertools import islice, product
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from mlxft.build import load_base, make_objective, prepare, settled
from mlxft.check import check_trains
from mlxft.config import (
    DEFAULT_TRIALS,
    PAIRS,
    Config,
    Range,
    SweepSettings,
    all_keys,
    dump_yaml,
    flat,
    load_config,
    nearest_key,
    override,
    parse_config,
    put,
    read_recipe,
    seconds,
)
from mlxft.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MlxftError,
    ModelError,
    TrainingError,
    missing_extra,
    nearest,
)
from mlxft.files import (
    check_replaceable,
    claim,
    digest,
    empty,
    hold,
    is_empty,
    is_of_kind,
    read_mark,
    remove,
    write_text,
)
from mlxft.model.load import Loaded, base_fingerprint, copy_sharing_arrays
from mlxft.objectives.base import Objective
from mlxft.run import total_steps, train_config
from mlxft.runs import FREE_ON_RESUME
from mlxft.study import plots
from mlxft.text import Event, make_console, parse_json
from mlxft.trainer.loop import validate
from mlxft.trainer.report import Stopped

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial, TrialState


# --- sweep store ------------------------------------------------------------------------------------------------------
# A sweep's finished trials in an SQLite file, by Optuna; one process at a time. Not in Optuna's journal file: a line
# that a full disk cuts short makes all that is appended later unreadable.

_FILE = "sweep.db"
STARTUP = 5  # trials at random before TPE learns from them
WHOLE = 2  # trials that the median pruner waits for
MOST_COMBINATIONS = 10_000


def _check_installed() -> None:
    """ConfigError without Optuna."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(missing_extra("optuna", "sweep"))


@contextmanager
def reachable(file: Path) -> Iterator[None]:
    """Turn a failure of the database into a CheckpointError that says why."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as e:
        reason = str(getattr(e, "orig", None) or e.__cause__ or e).splitlines()[0]
        hints = {"locked": "close what has it open", "full": "free some space, and the same command goes on"}
        begin = "begin again with --overwrite, or another --name"
        hint = next((hint for word, hint in hints.items() if word in reason), begin)
        raise CheckpointError(f"can not use {file}: {reason}; {hint}") from e


class Store:
    """The finished trials of one sweep, and how often the next one was begun.

    A trial that has not finished lives in memory only, among copies of the finished ones: whatever the sampler or the
    pruner notes in it is gone after a kill, and the trial that is begun again is the same in every number. A finished
    one is written in a single transaction.

    Args:
        seed: of the sampler. A trial depends on it, on its own number and on the trials before.
        about: the settings that all trials share, dotted; a sweep that goes on must have the same.
    Raises:
        ConfigError: the sweep in the folder has other settings.
        CheckpointError: the file can not be used.
    """

    def __init__(self, folder: Path, sweep: SweepSettings, seed: int, about: Mapping[str, Any]) -> None:
        import optuna
        from sqlalchemy import URL

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.sweep, self.seed = sweep, seed
        url = URL.create("sqlite", database=str(folder / _FILE)).render_as_string()
        self.study: Study = optuna.create_study(
            storage=optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 5}}),
            study_name="sweep",
            direction="minimize" if sweep.minimize else "maximize",
            load_if_exists=True,
        )
        stored = self.study.user_attrs.get("about")
        if stored is None:
            self.study.set_user_attr("about", dict(about))
        elif stored != dict(about):
            keys = [k for k in {**stored, **about} if stored.get(k) != about.get(k)]
            lines = [f"{k}: the sweep has {_short(stored.get(k))}, asked for is {_short(about.get(k))}" for k in keys]
            raise ConfigError(
                f"{folder} is a sweep of another recipe; begin again with --overwrite, or give another --name:\n  "
                + "\n  ".join(lines)
            )

    def _pruner(self) -> Any:
        from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner

        if self.sweep.pruner == "halving":
            return SuccessiveHalvingPruner(min_resource=self.sweep.grace, reduction_factor=2)
        if self.sweep.pruner == "median":
            return MedianPruner(n_startup_trials=WHOLE, n_warmup_steps=self.sweep.grace)
        return NopPruner()

    def _sampler(self, number: int) -> BaseSampler:
        from optuna.samplers import BruteForceSampler, RandomSampler, TPESampler

        seed = random.Random(f"{self.seed} {number}").randrange(2**32)
        if self.sweep.sampler == "tpe":
            return TPESampler(n_startup_trials=STARTUP, seed=seed)
        if self.sweep.sampler == "random":
            return RandomSampler(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is experimental
            return BruteForceSampler(seed)

    def trials(self) -> list[FrozenTrial]:
        """Return copies of all that are finished: complete, pruned or failed."""
        done = [t for t in self.study.get_trials() if t.state.is_finished()]
        for number, trial in enumerate(done):  # an earlier version wrote down what it began, and may have left one
            trial.number = number
        return done

    def ask(self) -> tuple[Trial, dict[str, Any]]:
        """Begin the next trial, in memory, and return it with its settings."""
        import optuna

        done = self.trials()
        study = optuna.create_study(
            direction=self.study.direction, sampler=self._sampler(len(done)), pruner=self._pruner()
        )
        study.add_trials(done)
        trial = study.ask()
        return trial, {key: _suggest(trial, key, r) for key, r in self.sweep.space.items()}

    def attempts(self, number: int) -> int:
        """Return how often a trial was begun that has not finished."""
        begun, count = self.study.user_attrs.get("attempts", (None, 0))
        return int(count) if begun == number else 0

    def begin(self, number: int, attempts: int) -> None:
        """Note how often a trial was begun."""
        self.study.set_user_attr("attempts", [number, attempts])

    def finish(self, trial: Trial, state: TrialState, value: float | None, facts: Mapping[str, Any]) -> None:
        """Write down how a trial ended, whole or, where a kill comes in between, not at all."""
        done = trial.study.get_trials()[-1]
        done.state, done.datetime_complete = state, datetime.now()
        done.value, done.user_attrs = value, dict(facts)
        self.study.add_trial(done)

    def params(self, trial: FrozenTrial) -> dict[str, Any]:
        """Return a trial's settings as a recipe has them, in the recipe's order."""
        return {k: _plain(trial.params[k], r) for k, r in self.sweep.space.items() if k in trial.params}

    def importance(self) -> dict[str, float]:
        """Return the share of each setting in which trials are among the best (PED-ANOVA, Watanabe et al. 2023).

        Pruned trials count by their last validation. Largest first; {} where fewer than 4 trials or one setting tell
        nothing. fANOVA, Optuna's other evaluator, needs scikit-learn.
        """
        import optuna

        known = [t for t in self.trials() if t.params and t.value is not None and math.isfinite(t.value)]
        if len(known) < 4 or len(self.sweep.space) < 2:
            return {}
        study = optuna.create_study(direction=self.study.direction)
        for t in known:  # the evaluator passes over what is not complete
            study.add_trial(optuna.trial.create_trial(params=t.params, distributions=t.distributions, value=t.value))
        share = max(0.1, min(0.5, 5 / len(known)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is experimental, and warns where all trials are alike
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=share)
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        return {k: float(v) for k, v in found.items()}


def grid_size(sweep: SweepSettings) -> int:
    """Return the number of combinations of a grid.

    Raises:
        ConfigError: there is no end of them in sight.
    """
    count = math.prod(len(r.value) if r.kind == "choice" else r.value[1] - r.value[0] + 1 for r in sweep.space.values())
    if count > MOST_COMBINATIONS:
        raise ConfigError(f"sweep.sampler: the grid has {count:,} combinations; give choices, or use tpe or random")
    return count


def _suggest(trial: Trial, key: str, r: Range) -> Any:
    if r.kind == "choice":
        return _plain(trial.suggest_categorical(key, [_stored(v) for v in r.value]), r)
    low, high = r.value
    if r.kind in ("int", "log_int"):
        return trial.suggest_int(key, low, high, log=r.kind == "log_int")
    return trial.suggest_float(key, low, high, log=r.kind == "log")


def _stored(value: Any) -> Any:
    """A choice as a database takes it: lists and mappings as text."""
    return value if isinstance(value, (str, int, float, type(None))) else f"yaml:{yaml.safe_dump(value)}"


def _plain(value: Any, r: Range) -> Any:
    return next(v for v in r.value if _stored(v) == value) if r.kind == "choice" else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- sweep report -----------------------------------------------------------------------------------------------------
# What a sweep found: on the way, as a table, as JSON, as pictures and as a recipe.

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
class SweepResult:
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


class _Progress:
    """A line for each trial that is done; in a terminal a bar below them with the one at hand and the time left."""

    def __init__(self, console: Console, count: int | None, done: int) -> None:
        self._console = console
        columns = (TextColumn("[bold]trials"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, TextColumn("{task.fields[now]}"), console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("trials", total=count, completed=done, now="")

    def __enter__(self) -> _Progress:
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


def draw(result: SweepResult, console: Console) -> None:
    """history.png and importance.png beside the trials."""
    if importlib.util.find_spec("matplotlib") is None:
        console.print(f"no pictures: {missing_extra('matplotlib', 'plots')}", markup=False, highlight=False)
        return
    rows = [asdict(o) for o in result.trials]
    history = result.dir / "history.png"
    plots.sweep_history(rows, history, metric=result.metric, lower_is_better=result.minimize)
    if result.importance:
        plots.importance(result.importance, result.dir / "importance.png", metric=result.metric)


def best_recipe(result: SweepResult, raw: Mapping[str, Any], config: Config) -> str:
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


# --- sweep ------------------------------------------------------------------------------------------------------------

ENDS = 64  # combinations of the ends of ranges that are looked at before the first trial
EVALS = 8  # validations of a trial where the recipe does not say: pruning needs some
ATTEMPTS = 3  # of a trial whose process was killed in the midst of it, perhaps by it
# They change how or where a figure is measured, or nothing that is learnt.
FIXED = {"objective", "versions", "data.valid", "data.cache", "run.name", "run.dir", "run.save_every", "run.keep"}
FIXED |= {"run.report_every", "run.eval_every", "run.eval_at_start", "run.sample_prompts", "run.sample_tokens"}
FIXED_SECTIONS = ("sweep.", "report.", "memory.")
# What may be another when a sweep goes on.
FREE = {*FREE_ON_RESUME, "sweep.trials", "sweep.time", "memory.limit", "memory.cache", "report.to", "report.project"}


def sweep(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    trials: int | None = None,
    limit: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> SweepResult:
    """Run the sweep of a recipe, or go on with it.

    Args:
        trials: in all, with those of earlier calls; default: the recipe's.
        limit: longest time of this call, such as 2h; default: the recipe's.
        name: of the folder below run.dir; default: the run's.
        overwrite: begin anew.
    Raises:
        ConfigError, DataError, ModelError: the recipe or its sweep is wrong; nothing was tried.
        CheckpointError: another sweep holds the folder, or its database can not be used.
        TrainingError: no trial gave a figure.
        KeyboardInterrupt: interrupted; the same call goes on.
    """
    _check_installed()
    options = {"sweep.trials": trials, "sweep.time": limit}
    overrides = [*overrides, *(f"{key}={value}" for key, value in options.items() if value is not None)]
    overrides += [] if name is None else [override("run.name", name)]
    config = load_config(path, overrides)
    raw = read_recipe(path, overrides)[0]
    if not config.sweep.space:
        raise ConfigError(f"{path}: sweep.space is needed: what to vary, e.g. {{optim.lr: {{log: [1e-5, 1e-3]}}}}")
    longest = math.inf if config.sweep.time is None else seconds(config.sweep.time)
    check_grid(config, raw, str(path))
    folder = config.run_dir
    _check_folder(folder, overwrite)
    with hold(folder):
        made = is_empty(folder)
        job = _Job(config, raw, folder, console or make_console())
        _check_folder(folder, overwrite)
        if overwrite:
            empty(folder)
        if is_empty(folder):
            claim(folder, "sweep")
        try:
            with reachable(folder / _FILE):
                return job.run(longest)
        except ConfigError:
            if made:  # nothing was learnt from it
                remove(folder)
            raise


def check_grid(config: Config, raw: Mapping[str, Any], origin: str) -> None:
    """Hold the settings that are varied, and the values at the ends of their ranges, against what a recipe may say.

    Raises:
        ConfigError: every problem, one a line.
    """
    space, keys, problems = config.sweep.space, all_keys(type(config)), []
    for key, r in space.items():
        place = f"{origin}: sweep.space.{key}"
        if key not in keys:
            problems.append(f"{place}: no such setting{nearest_key(key, type(config))}")
        elif key in FIXED or key.startswith(FIXED_SECTIONS):
            problems.append(f"{place}: can not be varied: it is no part of what is learnt, or of how it is measured")
        else:
            for value in r.value:
                try:
                    parse_config(with_values(raw, {key: value}), "")
                except ConfigError as e:
                    said = "; ".join(line.removeprefix(": ") for line in str(e).splitlines())
                    problems.append(f"{place}: with {value!r}: {said}")
                    break
    for one, other in PAIRS:
        if one in space and other in space:
            problems.append(f"{origin}: sweep.space: {one} and {other} exclude each other; vary one")
    if problems:
        raise ConfigError("\n".join(problems))
    if config.sweep.sampler == "grid":
        grid_size(config.sweep)


def with_values(raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without its sweep, and with these settings."""
    found = {k: copy.deepcopy(v) for k, v in raw.items() if k != "sweep"}
    for key, value in values.items():
        put(found, key, value, set(values), f"sweep.space.{key}")
    return found


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that is something else."""
    if overwrite:
        check_replaceable(folder, "sweep")
    elif folder.exists() and not is_of_kind(folder, "sweep", _FILE):
        raise ConfigError(f"{folder} exists and is no sweep that this version of mlxft made; give another --name")


class Watch:
    """Follow a trial: report each validation to the pruner, and end what is not worth going on with.

    Args:
        deadline: by time.monotonic().
    """

    def __init__(self, trial: Trial, metric: str, deadline: float, progress: _Progress) -> None:
        self._trial, self._metric, self._deadline, self._progress = trial, metric, deadline, progress
        self.step, self.total, self.evals = 0, 0, 0
        self.value: float | None = None  # of the weights that the run keeps
        self.last: float | None = None

    def event(self, event: Event) -> None:
        kind = event["event"]
        if kind == "start":
            self.total = event["steps"]
        elif kind in ("train", "eval"):
            self.step = event["step"]
            self._progress.now(self._trial.number, self.step, self.total, event.get("loss"))
            if kind == "eval" and self.step:
                self._judge(event)
            if time.monotonic() > self._deadline and self.step < self.total:
                raise Stopped("the time of the sweep is up", "interrupted")

    def close(self) -> None:
        pass

    def _judge(self, event: Event) -> None:
        value = find_metric(event, self._metric)
        if not math.isfinite(value):
            raise TrainingError(f"step {self.step}: {self._metric} is {value}")
        self.evals, self.last = self.evals + 1, value
        if event["best"]:
            self.value = value
        self._trial.report(value, self.evals)
        if self.step < self.total and self._trial.should_prune():
            raise Stopped(f"pruned at step {self.step} of {self.total}: {self._metric} {value:.4g}")


def find_metric(reported: Mapping[str, Any], metric: str) -> float:
    """The number of a validation by its name.

    Raises:
        ConfigError: there is none.
    """
    known = [k for k, v in reported.items() if isinstance(v, (int, float)) and k not in ("step", "elapsed_s", "best")]
    if metric not in known:
        raise ConfigError(
            f"sweep.metric: {metric} is not what validation reports{nearest(metric, known)}; it reports "
            f"{', '.join(known)}"
        )
    return float(reported[metric])


class _Job:
    """One call of a sweep."""

    def __init__(self, config: Config, raw: dict[str, Any], folder: Path, console: Console) -> None:
        self.config, self.raw, self.folder, self.console = config, raw, folder, console
        space = config.sweep.space
        whole = config.tune.method == "full" or "full" in getattr(space.get("tune.method"), "value", ())
        # Whole weights that are trained are twice in memory beside a base that is kept.
        self._keeps = not whole and not any(k.startswith("model.") for k in space)
        self._loaded = load_base(config, lazy=True)
        if self._keeps:
            try:
                copy_sharing_arrays(self._loaded)
            except TypeError:  # no copy of this architecture: each trial loads its own
                self._keeps = False
        plain = settled(config, resume=False)
        objective = make_objective(plain, self._loaded.tokenizer)
        if not objective.summary().validates:
            raise ConfigError("a sweep compares by validation, and there is no validation data; give data.valid (0.05)")
        self._check_trials(objective)
        self._data = objective.fingerprint()
        self._totals = {self._length_key({}): total_steps(plain, objective)}

    def _check_trials(self, objective: Objective) -> None:
        """Refuse what would fail in every trial: with the ends of all ranges, one after the other, until some train.

        Raises:
            ConfigError, DataError, ModelError: none does.
        """
        space, refused = self.config.sweep.space, None
        ends = [
            dict(zip(space, values, strict=True))
            for values in islice(product(*(r.value for r in space.values())), ENDS + 1)
        ]
        for params in ends[:ENDS]:
            try:
                config, own = self._trial(params)
                check_trains(config, own or objective)
            except (ConfigError, DataError, ModelError) as error:
                refused = refused or type(error)(f"no trial could be trained; with {_said(params)}: {error}")
            else:
                self._check_metric(config, own or objective)
                return
        if refused is not None and len(ends) <= ENDS:
            raise refused

    def _check_metric(self, config: Config, objective: Objective) -> None:
        """Refuse a metric that validation does not report.

        Raises:
            ConfigError: so.
        """
        if self.config.sweep.metric == "loss":  # which all report
            return
        loaded = load_base(config, lazy=True)
        prepare(config, loaded)
        objective.prepare(loaded.model, base_fingerprint(loaded))
        find_metric(validate(loaded.model, objective), self.config.sweep.metric)

    def _trial(self, params: Mapping[str, Any]) -> tuple[Config, Objective | None]:
        """A trial's recipe, and its objective where that is not the recipe's own."""
        config = settled(parse_config(with_values(self.raw, params), "trial"), resume=False)
        if self._length_key(params) == self._length_key({}):
            return config, None
        same = not any(k.startswith("model.") for k in params)
        tokenizer = self._loaded.tokenizer if same else load_base(config, lazy=True).tokenizer
        return config, make_objective(config, tokenizer)

    def run(self, longest: float) -> SweepResult:
        """All trials; pictures and recipe of the best.

        Raises:
            As `sweep`.
        """
        sweep, began = self.config.sweep, time.monotonic()
        about = {k: v for k, v in flat(_shared(self.config)).items() if k not in FREE} | {"data": self._data}
        self.store = Store(self.folder, sweep, self.config.run.seed, parse_json(json.dumps(about)))
        count = sweep.trials or (None if sweep.time else DEFAULT_TRIALS)
        if sweep.sampler == "grid":
            count = min(count or MOST_COMBINATIONS, grid_size(sweep))
        before = len(self.store.trials())
        with _Progress(self.console, count, before) as self.progress:
            if before or self.store.attempts(0):
                self.progress.say(f"going on with {self.folder}: {before} trials are finished")
            try:
                while (count is None or len(self.store.trials()) < count) and time.monotonic() - began < longest:
                    if not self._try(*self.store.ask(), began + longest):
                        break
            except KeyboardInterrupt:
                self.progress.say(f"interrupted after {len(self.store.trials())} trials; the same command goes on")
                raise
        self._settle()  # a kill may have come before it did so
        result = self.result(self.store.importance())
        if result.best is None:
            failed = next((o.error for o in result.trials if o.error), "the time was up before one was finished")
            raise TrainingError(f"no trial of {self.folder} gave a figure: {failed}")
        draw(result, self.console)
        return result

    def result(self, importance: dict[str, float] | None = None) -> SweepResult:
        """What is known by now."""
        sweep = self.config.sweep
        found = [Outcome.of(t, self.store.params(t)) for t in self.store.trials()]
        return SweepResult(self.folder, sweep.metric, sweep.minimize, found, importance or {})

    def _try(self, trial: Trial, params: dict[str, Any], deadline: float) -> bool:
        """Train one trial and record what came of it. False: the time is up, and it is not finished."""
        from optuna.trial import TrialState

        place = self.folder / "trials" / str(trial.number)
        _take_away(place)
        attempts = self.store.attempts(trial.number)
        self.store.begin(trial.number, attempts + 1)
        watch = Watch(trial, self.config.sweep.metric, deadline, self.progress)
        began = time.monotonic()
        state, error = TrialState.COMPLETE, None
        try:
            if attempts >= ATTEMPTS:
                raise TrainingError(f"its process ended {attempts} times in the midst of it: out of memory?")
            config = self._recipe(trial.number, params)
            train_config(config, console=make_console(file=io.StringIO()), base=self._base(), sinks=[watch])
            if watch.value is None:
                raise TrainingError("no validation gave a finite loss")
        except (KeyboardInterrupt, Stopped) as e:
            if not isinstance(e, Stopped) or e.run_status == "interrupted":
                self.store.begin(trial.number, attempts)  # it is not the trial's doing
                _take_away(place)
                if isinstance(e, Stopped):
                    return False
                raise
            state = TrialState.PRUNED
        except (CheckpointError, OSError):  # a full disk fails every trial, and none for good
            _take_away(place)
            self.store.begin(trial.number, attempts)
            raise
        except (MlxftError, RuntimeError, MemoryError) as e:
            state, error = TrialState.FAIL, str(e) or type(e).__name__
        facts = {"steps": watch.step, "total": watch.total, "seconds": time.monotonic() - began, "error": error}
        value = {TrialState.COMPLETE: watch.value, TrialState.PRUNED: watch.last}.get(state)
        self.store.finish(trial, state, value, facts)
        result = self._settle()
        self.progress.done(next(o for o in result.trials if o.number == trial.number), self.config.sweep.metric)
        return True

    def _settle(self) -> SweepResult:
        """Write the best recipe; leave no weights but those of complete trials (of whole models: of the best)."""
        result = self.result()
        if result.best is not None:
            self._write_best(best_recipe(result, with_values(self.raw, self._values(result.best.params)), self.config))
        for o in result.trials:
            place, is_best = self.folder / "trials" / str(o.number), result.best is o
            gone = ["checkpoints", *([] if o.state == "complete" else ["adapter"]), *([] if is_best else ["model"])]
            for name in gone:
                if read_mark(place) is not None:
                    empty(place, name)
        gc.collect()
        mx.clear_cache()
        return result

    def _write_best(self, text: str) -> None:
        """best.yaml, unless somebody has changed it since it was written."""
        file = self.folder / "best.yaml"
        known = self.store.study.user_attrs.get("written", [])
        if file.exists() and known and digest(file) not in known:
            self.progress.say(
                f"{file} was changed by hand and is left as it is; rename it to have the new best written"
            )
            return
        # Known before it is written: a kill may come in between.
        mine = blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()
        self.store.study.set_user_attr("written", [*known[-1:], mine])
        write_text(file, text)

    def _base(self) -> Loaded | None:
        return copy_sharing_arrays(self._loaded) if self._keeps else None

    def _length_key(self, params: Mapping[str, Any]) -> str:
        """What a run's number of steps may depend on."""
        return json.dumps({k: v for k, v in params.items() if not k.startswith(("optim.", "tune."))}, default=str)

    def _values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """A trial's settings, and how often it validates where the recipe leaves that open."""
        if self.config.run.eval_every is not None:
            return dict(params)
        key = self._length_key(params)
        if key not in self._totals:
            config, objective = self._trial(params)
            assert objective is not None, "the recipe's own total is known"
            self._totals[key] = total_steps(config, objective)
        return {**params, "run.eval_every": math.ceil(self._totals[key] / EVALS)}

    def _recipe(self, number: int, params: Mapping[str, Any]) -> Config:
        config = parse_config(with_values(self.raw, self._values(params)), f"trial {number}")
        run = {"name": str(number), "dir": self.folder / "trials", "save_every": 2**62, "keep": 1}
        return config.model_copy(update={"run": config.run.model_copy(update=run)})


def _said(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in params.items())


def _take_away(trial: Path) -> None:
    """Remove the run of a trial that is begun again.

    Raises:
        ConfigError: it holds what mlxft did not make.
    """
    check_replaceable(trial, "run")
    if trial.exists():
        remove(trial)


def _shared(config: Config) -> dict[str, Any]:
    """What all trials of a sweep have in common."""
    space: dict[str, Range] = config.sweep.space
    about = config.model_dump(mode="json", exclude={"versions", "sweep"})
    about["sweep"] = config.sweep.model_dump(mode="json", exclude={"space"})
    about["sweep"]["space"] = {k: f"{r.kind} {r.value}" for k, r in space.items()}
    return about
