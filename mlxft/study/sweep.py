"""mlxft sweep: train a recipe with different settings, stop the worse trials early, and write the best as a recipe.

runs/NAME/sweep.db       Optuna's trials, from which a sweep that was killed is resumed
         /trials/N/      each trial's run, without checkpoints; of pruned and failed trials only the metrics
         /best.yaml      the best trial as a recipe, which trains to the reported value
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
from mlxft.errors import CheckpointError, ConfigError, MlxftError, TrainingError, missing_extra, nearest, shorten
from mlxft.files import check_replaceable, claim, digest, empty, hold, is_empty, is_of_kind, remove, write_text
from mlxft.model.load import base_fingerprint, copy_sharing_arrays
from mlxft.objectives.base import Objective
from mlxft.run import total_steps, train_config
from mlxft.runs import FREE_ON_RESUME
from mlxft.study import plots
from mlxft.text import Event, make_console
from mlxft.trainer.loop import validate
from mlxft.trainer.report import Stopped

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial, TrialState


# --- sweep store ------------------------------------------------------------------------------------------------------
# Optuna keeps a sweep's finished trials in an SQLite file, for one process at a time. Its journal file will not do: a
# line that a full disk cuts short makes everything that is appended later unreadable.

_FILE = "sweep.db"
STARTUP = 5  # random trials before TPE learns from them
WHOLE = 2  # complete trials that the median pruner needs
MOST_COMBINATIONS = 10_000


@contextmanager
def _reachable(file: Path) -> Iterator[None]:
    """Turn a failure of the database into a CheckpointError that names the reason."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as e:
        reason = str(getattr(e, "orig", None) or e.__cause__ or e).splitlines()[0]
        hints = {"locked": "close the program that has it open", "full": "free some space and give the same command"}
        default = "start over with --overwrite, or give another --name"
        hint = next((hint for word, hint in hints.items() if word in reason), default)
        raise CheckpointError(f"cannot use {file}: {reason}; {hint}") from e


class Store:
    """The finished trials of one sweep, and how often the next one was begun.

    An unfinished trial is in memory only, among copies of the finished ones: what the sampler or the pruner records in
    it is lost in a kill, and the trial that is begun again has the same numbers. A finished trial is written in one
    transaction.

    Args:
        seed: seed of the sampler. A trial depends on it, on its own number and on the trials before.
        about: the settings that all trials share, dotted; a sweep that is resumed must have the same.
    Raises:
        ConfigError: the sweep in the folder has other settings.
        CheckpointError: the file cannot be used.
    """

    def __init__(self, folder: Path, sweep: SweepSettings, seed: int, about: dict[str, Any]) -> None:
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
            self.study.set_user_attr("about", about)
        elif keys := [k for k in {**stored, **about} if stored.get(k) != about.get(k)]:
            seen, wanted = ({k: shorten(repr(of.get(k)), 80) for k in keys} for of in (stored, about))
            raise ConfigError(
                f"{folder} is a sweep of another recipe; start over with --overwrite, or give another --name:\n  "
                + "\n  ".join(f"{k}: the sweep has {seen[k]}, the recipe has {wanted[k]}" for k in keys)
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
        """Return copies of all finished trials: complete, pruned or failed."""
        done = [t for t in self.study.get_trials() if t.state.is_finished()]
        for number, trial in enumerate(done):  # an earlier version also stored trials that it began
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
        """Return how often an unfinished trial was begun."""
        begun, count = self.study.user_attrs.get("attempts", (None, 0))
        return int(count) if begun == number else 0

    def begin(self, number: int, attempts: int) -> None:
        """Record how often a trial was begun."""
        self.study.set_user_attr("attempts", [number, attempts])

    def finish(self, trial: Trial, state: TrialState, value: float | None, facts: Mapping[str, Any]) -> None:
        """Record how a trial ended, completely or, in a kill, not at all."""
        done = trial.study.get_trials()[-1]
        done.state, done.datetime_complete = state, datetime.now()
        done.value, done.user_attrs = value, dict(facts)
        self.study.add_trial(done)

    def outcomes(self) -> list[Outcome]:
        """Return the finished trials, with settings in the recipe's order and form."""
        return [
            Outcome(
                t.number,
                STATES[t.state.name],
                t.value,
                {k: _plain(t.params[k], r) for k, r in self.sweep.space.items() if k in t.params},
                **t.user_attrs,
            )
            for t in self.trials()
        ]

    def importance(self) -> dict[str, float]:
        """Return the importance of each setting for being among the best (PED-ANOVA, Watanabe et al. 2023).

        Pruned trials count by their last validation. Largest first; {} with fewer than 4 trials or 2 settings.
        Optuna's other evaluator, fANOVA, needs scikit-learn.
        """
        import optuna

        known = [t for t in self.trials() if t.params and t.value is not None and math.isfinite(t.value)]
        if len(known) < 4 or len(self.sweep.space) < 2:
            return {}
        study = optuna.create_study(direction=self.study.direction)
        for t in known:  # the evaluator ignores trials that are not complete
            study.add_trial(optuna.trial.create_trial(params=t.params, distributions=t.distributions, value=t.value))
        share = max(0.1, min(0.5, 5 / len(known)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is experimental, and warns if all trials are equal
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=share)
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        return {k: float(v) for k, v in found.items()}


def _grid_size(sweep: SweepSettings) -> int:
    """Return the number of combinations of a grid; raise a ConfigError if there are too many."""
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
    """Return a choice as the database takes it: lists and mappings as text."""
    return value if isinstance(value, (str, int, float, type(None))) else f"yaml:{yaml.safe_dump(value)}"


def _plain(value: Any, r: Range) -> Any:
    return next(v for v in r.value if _stored(v) == value) if r.kind == "choice" else value


# --- sweep results ----------------------------------------------------------------------------------------------------

STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


@dataclass(frozen=True)
class Outcome:
    """A finished trial.

    Attributes:
        state: complete, pruned or failed.
        value: metric of the kept weights; of a pruned trial, metric of its last validation.
        steps, total: steps taken, and steps of the whole run (0: it failed before that was known).
    """

    number: int
    state: str
    value: float | None
    params: dict[str, Any]
    steps: int = 0
    total: int = 0
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep; `importance` is {} if there are too few trials."""

    dir: Path
    metric: str
    minimize: bool
    trials: list[Outcome]
    importance: dict[str, float]

    @property
    def best(self) -> Outcome | None:
        """Return the best complete trial, the first of equal ones."""
        done = [o for o in self.trials if o.state == "complete" and o.value is not None]
        sign = 1 if self.minimize else -1
        return min(done, key=lambda o: (sign * (o.value or 0.0), o.number)) if done else None

    @property
    def recipe(self) -> Path:
        """Return the path of the best trial's recipe."""
        return self.dir / "best.yaml"

    def steps(self) -> dict[str, float]:
        """Return the steps of complete and pruned trials: taken, all, and the share that pruning saved."""
        counted = [o for o in self.trials if o.state != "failed"]
        taken, of = sum(o.steps for o in counted), sum(o.total for o in counted)
        # run.patience saves steps, too, but that is not pruning.
        saved = sum(o.total - o.steps for o in counted if o.state == "pruned")
        return {"taken": taken, "all": of, "saved": saved / of if of else 0.0}

    def to_json(self) -> dict[str, Any]:
        best = self.best
        found = {"number": best.number, "value": best.value, "params": best.params} if best else {}
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
        """Print a table of the trials, the best trial, and how to train it."""
        keys = list(dict.fromkeys(k for o in self.trials for k in o.params))
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("trial", *keys, self.metric):
            table.add_column(column, justify="right", overflow="fold")
        table.add_column("state")
        table.add_column("steps", justify="right")
        table.add_column("time", justify="right")
        steps, best = self.steps(), self.best
        for o in self.trials:
            value = "" if o.value is None else f"{o.value:.4f}"
            cells = [str(o.number), *(_shown(o.params.get(k, "")) for k in keys), value]
            cells += ["best" if o is best else o.state, f"{o.steps}/{o.total}" if o.total else "", f"{o.seconds:.0f} s"]
            table.add_row(*map(Text, cells), style="bold green" if o is best else "")
        console.print(table)
        lines = [f"{steps['taken']:,} of {steps['all']:,} steps taken; pruning saved {steps['saved']:.0%}"]
        if self.importance:
            lines.append("importance: " + ", ".join(f"{k} {v:.2f}" for k, v in self.importance.items()))
        if best is not None:
            lines.append(f"best: trial {best.number}, {self.metric} {best.value:.6g}, {_settings(best.params)}")
            lines.append(f"train it with: mlxft train {self.recipe}")
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _settings(params: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={_shown(v)}" for k, v in params.items())


# --- sweep ------------------------------------------------------------------------------------------------------------

ENDS = 64  # combinations of the ends of ranges that are checked before the first trial
EVALS = 8  # validations of a trial where the recipe leaves their number open: pruning needs some
ATTEMPTS = 3  # attempts at a trial during which the process was killed, perhaps because of the trial
# Settings that change how or where the metric is measured, or nothing that is learnt.
FIXED = {
    "objective",
    "versions",
    "data.valid",
    "data.cache",
    "data.stream",
    "run.name",
    "run.dir",
    "run.save_every",
    "run.keep",
}
FIXED |= {"run.report_every", "run.eval_every", "run.eval_at_start", "run.sample_prompts", "run.sample_tokens"}
FIXED |= {"distill.teacher", "distill.teacher_prompt", "distill.quantize", "distill.align", "distill.cache"}
FIXED |= {"distill.top_k"}
FIXED_SECTIONS = ("sweep.", "report.", "memory.", "environment.")
# Settings that decide what the validation loss is; another metric may be compared across their values.
OF_LOSS = {"distill.divergence", "distill.beta", "distill.temperature"}
# Settings that may change when a sweep is resumed.
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
    """Run or resume the sweep of a recipe.

    Args:
        trials: total number of trials, with those of earlier calls (default: the recipe's).
        limit: time limit of this call, such as 2h (default: the recipe's).
        name: name of the folder in run.dir (default: the run's).
        overwrite: delete the existing trials and start over.
    Raises:
        ConfigError, DataError, ModelError: the recipe or its sweep is wrong; nothing was trained.
        CheckpointError: another process sweeps in the folder, or its database cannot be used.
        TrainingError: no trial was completed.
        KeyboardInterrupt: the sweep was interrupted; the same call resumes it.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(missing_extra("optuna", "sweep"))
    options = {"sweep.trials": trials, "sweep.time": limit}
    overrides = [*overrides, *(f"{key}={value}" for key, value in options.items() if value is not None)]
    overrides += [] if name is None else [override("run.name", name)]
    config = load_config(path, overrides)
    raw = read_recipe(path, overrides)[0]
    if not config.sweep.space:
        raise ConfigError(f"{path}: sweep.space is needed: what to vary, e.g. {{optim.lr: {{log: [1e-5, 1e-3]}}}}")
    longest = math.inf if config.sweep.time is None else seconds(config.sweep.time)
    _check_space(config, raw, str(path))
    folder = config.run_dir
    if overwrite:
        check_replaceable(folder, "sweep")
    elif folder.exists() and not is_of_kind(folder, "sweep", _FILE):
        raise ConfigError(f"{folder} exists and is not a sweep that this version of mlxft made; give another --name")
    with hold(folder):
        made = is_empty(folder)
        job = _Job(config, raw, folder, console or make_console())
        if overwrite:
            empty(folder)
        if is_empty(folder):
            claim(folder, "sweep")
        try:
            with _reachable(folder / _FILE):
                return job.run(longest)
        except ConfigError:
            if made:  # nothing was learnt from it
                remove(folder)
            raise


def _check_space(config: Config, raw: Mapping[str, Any], origin: str) -> None:
    """Raise a ConfigError with every setting that does not exist or may not vary, or whose range has invalid ends."""
    space, keys, problems = config.sweep.space, all_keys(type(config)), []
    for key, r in space.items():
        place = f"{origin}: sweep.space.{key}"
        if key not in keys:
            problems.append(f"{place}: no such setting{nearest_key(key, type(config))}")
            continue
        if key in FIXED or key.startswith(FIXED_SECTIONS):
            problems.append(f"{place}: cannot be varied: trials differ in what is learnt, and are measured in one way")
            continue
        if key in OF_LOSS and config.sweep.metric == "loss":
            problems.append(
                f"{place}: changes what the loss is; compare by another metric, e.g. sweep.metric: agreement"
            )
            continue
        for value in r.value:
            try:
                parse_config(_with_values(raw, {key: value}), "")
            except ConfigError as e:
                reasons = "; ".join(line.removeprefix(": ") for line in str(e).splitlines())
                problems.append(f"{place}: with {value!r}: {reasons}")
                break
    for one, other in PAIRS:
        if one in space and other in space:
            problems.append(f"{origin}: sweep.space: {one} and {other} exclude each other; vary one")
    if problems:
        raise ConfigError("\n".join(problems))
    if config.sweep.sampler == "grid":
        _grid_size(config.sweep)


def _with_values(raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with these settings, and without its sweep."""
    found = {k: copy.deepcopy(v) for k, v in raw.items() if k != "sweep"}
    for key, value in values.items():
        put(found, key, value, set(values), f"sweep.space.{key}")
    return found


class _Watch:
    """The sink of a trial's run: it reports each validation to the pruner, and stops a trial that is not promising."""

    def __init__(self, trial: Trial, deadline: float, job: _Job) -> None:
        self._trial, self._deadline, self._job = trial, deadline, job
        self.step, self.total, self.evals = 0, 0, 0
        self.value: float | None = None  # of the weights that the run keeps
        self.last: float | None = None

    def event(self, event: Event) -> None:
        kind = event["event"]
        if kind == "start":
            self.total = event["steps"]
        elif kind in ("train", "eval"):
            self.step = event["step"]
            loss = f", loss {event['loss']:.4f}" if event.get("loss") is not None else ""
            self._job.show(f"trial {self._trial.number}: step {self.step} of {self.total}{loss}")
            if kind == "eval" and self.step:
                self._judge(event)
            if time.monotonic() > self._deadline and self.step < self.total:
                raise Stopped("the time of the sweep is up", "interrupted")

    def close(self) -> None:
        pass

    def _judge(self, event: Event) -> None:
        metric = self._job.config.sweep.metric
        value = _find_metric(event, metric)
        if not math.isfinite(value):
            raise TrainingError(f"step {self.step}: {metric} is {value}")
        self.evals, self.last = self.evals + 1, value
        if event["best"]:
            self.value = value
        self._trial.report(value, self.evals)
        if self.step < self.total and self._trial.should_prune():
            raise Stopped(f"pruned at step {self.step} of {self.total}: {metric} {value:.4g}")


def _find_metric(reported: Mapping[str, Any], metric: str) -> float:
    """Return a metric of a validation; raise a ConfigError if it is not reported."""
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
        full = config.tune.method == "full" or "full" in getattr(space.get("tune.method"), "value", ())
        # With full fine-tuning, a base that is kept would be a second copy of the weights.
        self._keeps_base = not full and not any(k.startswith("model.") for k in space)
        self._loaded = load_base(config, lazy=True)
        if self._keeps_base:
            try:
                copy_sharing_arrays(self._loaded)
            except TypeError:  # this architecture cannot be copied: each trial loads its own
                self._keeps_base = False
        plain = settled(config, resume=False)
        objective = make_objective(plain, self._loaded.tokenizer)
        if not objective.summary().validates:
            raise ConfigError("a sweep compares by validation, and there is no validation data; give data.valid (0.05)")
        self._check_trials(objective)
        self._data = objective.fingerprint()
        self._totals = {_length_key({}): total_steps(plain, objective)}
        columns = (TextColumn("[bold]trials"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, TextColumn("{task.fields[now]}"), console=console, disable=not console.is_terminal)

    def _check_trials(self, objective: Objective) -> None:
        """Check combinations of the ends of all ranges until one would train; raise the first error if none would."""
        space, refused = self.config.sweep.space, None
        ends = list(islice(product(*(r.value for r in space.values())), ENDS + 1))
        for values in ends[:ENDS]:
            params = dict(zip(space, values, strict=True))
            try:
                config = self._trial_config(params)
                own = objective if _length_key(params) == _length_key({}) else self._objective(config, params)
                check_trains(config, own)
            except MlxftError as error:
                refused = refused or type(error)(f"no trial could be trained; with {_settings(params)}: {error}")
            else:
                if self.config.sweep.metric != "loss":  # which all validations report
                    loaded = load_base(config, lazy=True)
                    prepare(config, loaded)
                    own.prepare(loaded.model, base_fingerprint(loaded))
                    _find_metric(validate(loaded.model, own), self.config.sweep.metric)
                return
        if refused is not None and len(ends) <= ENDS:
            raise refused

    def _trial_config(self, params: Mapping[str, Any]) -> Config:
        return settled(parse_config(_with_values(self.raw, params), "trial"), resume=False)

    def _objective(self, config: Config, params: Mapping[str, Any]) -> Objective:
        own = any(k.startswith("model.") for k in params)
        return make_objective(config, (load_base(config, lazy=True) if own else self._loaded).tokenizer)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, now: str) -> None:
        """Show beside the bar where the current trial is."""
        self._bar.update(self._bar.task_ids[0], now=now)

    def run(self, longest: float) -> SweepResult:
        """Run all trials; draw the result, and write the recipe of the best. Raises what `sweep` does."""
        sweep, began = self.config.sweep, time.monotonic()
        self.store = Store(self.folder, sweep, self.config.run.seed, _about(self.config) | {"data": self._data})
        count = sweep.trials or (None if sweep.time else DEFAULT_TRIALS)
        if sweep.sampler == "grid":
            count = min(count or MOST_COMBINATIONS, _grid_size(sweep))
        before = len(self.store.trials())
        self._bar.add_task("trials", total=count, completed=before, now="")
        with self._bar:
            if before or self.store.attempts(0):
                self.say(f"resuming {self.folder}: {before} trials are finished")
            try:
                while (count is None or len(self.store.trials()) < count) and time.monotonic() - began < longest:
                    if not self._try(*self.store.ask(), began + longest):
                        break
            except KeyboardInterrupt:
                self.say(f"interrupted after {len(self.store.trials())} trials; the same command resumes the sweep")
                raise
        result = self._clean_up(self.store.importance())  # a kill may have come before it
        if result.best is None:
            failed = next((o.error for o in result.trials if o.error), "the time was up before one was finished")
            raise TrainingError(f"no trial of {self.folder} was completed: {failed}")
        try:
            history, metric = self.folder / "history.png", sweep.metric
            rows = [asdict(o) for o in result.trials]
            plots.sweep_history(rows, history, metric=metric, lower_is_better=sweep.minimize)
            if result.importance:
                plots.importance(result.importance, self.folder / "importance.png", metric=metric)
        except ConfigError as e:  # matplotlib is an extra
            self.say(f"no plots: {e}")
        return result

    def _try(self, trial: Trial, params: dict[str, Any], deadline: float) -> bool:
        """Train one trial and record its outcome. Return False if the time was up before it was finished."""
        from optuna.trial import TrialState

        attempts = self.store.attempts(trial.number)
        self._restart(trial.number, attempts + 1)
        watch = _Watch(trial, deadline, self)
        began = time.monotonic()
        state, error = TrialState.COMPLETE, None
        try:
            if attempts >= ATTEMPTS:
                raise TrainingError(f"the process ended {attempts} times during this trial: out of memory?")
            config = parse_config(_with_values(self.raw, self._values(params)), f"trial {trial.number}")
            run = {"name": str(trial.number), "dir": self.folder / "trials", "save_every": 2**62, "keep": 1}
            config = config.model_copy(update={"run": config.run.model_copy(update=run)})
            base = copy_sharing_arrays(self._loaded) if self._keeps_base else None
            train_config(config, console=make_console(file=io.StringIO()), base=base, sinks=[watch])
            if watch.value is None:
                raise TrainingError("no validation gave a finite loss")
        except Stopped as e:
            if e.run_status == "interrupted":
                self._restart(trial.number, attempts)
                return False
            state = TrialState.PRUNED
        except (KeyboardInterrupt, CheckpointError, OSError):  # not the trial's fault: a full disk fails every trial
            self._restart(trial.number, attempts)
            raise
        except (MlxftError, RuntimeError, MemoryError) as e:
            state, error = TrialState.FAIL, str(e) or type(e).__name__
        facts = {"steps": watch.step, "total": watch.total, "seconds": time.monotonic() - began, "error": error}
        value = {TrialState.COMPLETE: watch.value, TrialState.PRUNED: watch.last}.get(state)
        self.store.finish(trial, state, value, facts)
        o = self._clean_up().trials[trial.number]
        at = f" at step {o.steps} of {o.total}" if o.state == "pruned" else ""
        figure = "" if o.value is None else f" {self.config.sweep.metric} {o.value:.4f}"
        why = f": {o.error.splitlines()[0]}" if o.error else ""
        self.say(f"trial {o.number} {o.state}{at}{figure} ({_settings(o.params)}, {o.seconds:.0f} s){why}")
        self._bar.advance(self._bar.task_ids[0])
        return True

    def _restart(self, number: int, attempts: int) -> None:
        """Remove the run of a trial that is not finished, and record the attempts at it."""
        trial = self.folder / "trials" / str(number)
        check_replaceable(trial, "run")
        if trial.exists():
            remove(trial)
        self.store.begin(number, attempts)

    def _clean_up(self, importance: dict[str, float] | None = None) -> SweepResult:
        """Write the best recipe; keep the weights of complete trials only (of whole models: of the best)."""
        sweep = self.config.sweep
        result = SweepResult(self.folder, sweep.metric, sweep.minimize, self.store.outcomes(), importance or {})
        if result.best is not None:
            self._write_best(self._best_recipe(result.best))
        for o in result.trials:
            folder = self.folder / "trials" / str(o.number)
            if folder.exists():  # a trial that failed early has none
                unused = {"checkpoints": True, "adapter": o.state != "complete", "model": o is not result.best}
                for name in [name for name, is_unused in unused.items() if is_unused]:
                    empty(folder, name)
        gc.collect()
        mx.clear_cache()
        return result

    def _best_recipe(self, best: Outcome) -> str:
        """Return the text of best.yaml: the recipe with the best trial's settings, usable from any folder."""
        config, raw = self.config, _with_values(self.raw, self._values(best.params))
        recipe = {k: dict(v) if isinstance(v, Mapping) else v for k, v in raw.items() if v is not None}
        run = {"name": f"{config.run.name}-best", "dir": str(config.run.dir.absolute())}
        recipe["run"] = run | {k: v for k, v in recipe.get("run", {}).items() if k not in run}
        for section, keys in (("model", ("path", "adapter", "chat_template")), ("data", ("train", "valid"))):
            for key in keys:
                if key in recipe[section] and f"{section}.{key}" not in best.params:
                    value = getattr(getattr(config, section), key)
                    recipe[section][key] = str(value) if isinstance(value, Path) else value
        place = repr(str(self.folder))  # a line break in it would end the comment
        reached = f"{config.sweep.metric} {best.value!r}, which this trains to"
        return f"# Trial {best.number} of the sweep {place}: {reached}.\n{dump_yaml(recipe)}"

    def _write_best(self, text: str) -> None:
        """Write best.yaml, unless a user has changed it."""
        file = self.folder / "best.yaml"
        known = self.store.study.user_attrs.get("written", [])
        if file.exists() and known and digest(file) not in known:
            self.say(f"{file} was changed by hand and is kept; rename it to have the new best written")
            return
        # Record the digest before the file is written: a kill may come in between.
        mine = blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()
        self.store.study.set_user_attr("written", [*known[-1:], mine])
        write_text(file, text)

    def _values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return a trial's settings, with how often it validates if the recipe leaves that open."""
        if self.config.run.eval_every is not None:
            return dict(params)
        key = _length_key(params)
        if key not in self._totals:
            config = self._trial_config(params)
            self._totals[key] = total_steps(config, self._objective(config, params))
        return {**params, "run.eval_every": math.ceil(self._totals[key] / EVALS)}


def _length_key(params: Mapping[str, Any]) -> str:
    """Return the settings that a run's number of steps may depend on, as a key."""
    return json.dumps({k: v for k, v in params.items() if not k.startswith(("optim.", "tune."))}, default=str)


def _about(config: Config) -> dict[str, Any]:
    """Return the settings that all trials of a sweep share, dotted."""
    about = config.model_dump(mode="json", exclude={"versions": True, "sweep": {"space"}})
    about["sweep"]["space"] = {k: f"{r.kind} {r.value}" for k, r in config.sweep.space.items()}
    return {k: v for k, v in flat(about).items() if k not in FREE}
