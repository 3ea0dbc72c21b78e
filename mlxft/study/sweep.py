"""mlxft sweep: trials of a recipe with other settings, the worse ones stopped early; the best as a recipe.

runs/NAME/sweep.db       Optuna's trials: a sweep that was killed goes on
         /trials/N/      each trial's run, without checkpoints; of pruned and failed ones only what was measured
         /best.yaml      the best trial as a recipe, which trains to the figure reported
         /history.png, importance.png
"""

from __future__ import annotations

import copy
import gc
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from rich.console import Console

from mlxft.check import check_trains
from mlxft.config import Config
from mlxft.errors import CheckpointError, ConfigError, DataError, MlxftError, ModelError, TrainingError, nearest
from mlxft.explain import all_keys, nearest_key
from mlxft.model.load import Loaded, base_fingerprint
from mlxft.model.twin import twin
from mlxft.objectives.base import Objective
from mlxft.owned import check_replaceable, claim, empty, hold, is_empty, is_of_kind, read_mark, remove
from mlxft.parts import load_base, make_objective, prepare
from mlxft.planning import settled
from mlxft.recipe import PAIRS, flat, load_config, override, parse_config, put, read_recipe
from mlxft.run import total_steps, train
from mlxft.rundir import FREE_ON_RESUME
from mlxft.search import DEFAULT_TRIALS, Range, seconds
from mlxft.study.sweep_report import Outcome, Progress, Result, best_recipe, draw
from mlxft.study.sweep_store import FILE, Store, check_grid, check_installed, reachable
from mlxft.text import make_console, parse_json
from mlxft.trainer.files import digest, write_text
from mlxft.trainer.report import Event, Stopped
from mlxft.trainer.validate import validate

if TYPE_CHECKING:
    from optuna.trial import Trial

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
) -> Result:
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
    check_installed()
    options = {"sweep.trials": trials, "sweep.time": limit}
    overrides = [*overrides, *(f"{key}={value}" for key, value in options.items() if value is not None)]
    overrides += [] if name is None else [override("run.name", name)]
    config = load_config(path, overrides)
    raw = read_recipe(path, overrides)[0]
    if not config.sweep.space:
        raise ConfigError(f"{path}: sweep.space is needed: what to vary, e.g. {{optim.lr: {{log: [1e-5, 1e-3]}}}}")
    longest = math.inf if config.sweep.time is None else seconds(config.sweep.time)
    check_space(config, raw, str(path))
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
            with reachable(folder / FILE):
                return job.run(longest)
        except ConfigError:
            if made:  # nothing was learnt from it
                remove(folder)
            raise


def check_space(config: Config, raw: Mapping[str, Any], origin: str) -> None:
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
    check_grid(config.sweep)


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
    elif folder.exists() and not is_of_kind(folder, "sweep", FILE):
        raise ConfigError(f"{folder} exists and is no sweep that this version of mlxft made; give another --name")


class Watch:
    """Follows a trial: tells its rival of each validation, and ends what is not worth going on with.

    Args:
        number: of the trial.
        rival: see `Store.rival`.
        deadline: by time.monotonic().
    """

    def __init__(self, number: int, rival: Trial, metric: str, deadline: float, progress: Progress) -> None:
        self._number, self._metric, self._deadline, self._progress = number, metric, deadline, progress
        self.rival = rival
        self.step, self.total, self.evals = 0, 0, 0
        self.value: float | None = None  # of the weights that the run keeps

    def event(self, event: Event) -> None:
        kind = event["event"]
        if kind == "start":
            self.total = event["steps"]
        elif kind in ("train", "eval"):
            self.step = event["step"]
            self._progress.now(self._number, self.step, self.total, event.get("loss"))
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
        self.evals += 1
        if event["best"]:
            self.value = value
        self.rival.report(value, self.evals)
        if self.step < self.total and self.rival.should_prune():
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
                twin(self._loaded)
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

    def run(self, longest: float) -> Result:
        """All trials; pictures and recipe of the best.

        Raises:
            As `sweep`.
        """
        sweep, began = self.config.sweep, time.monotonic()
        about = {k: v for k, v in flat(_shared(self.config)).items() if k not in FREE} | {"data": self._data}
        self.store = Store(self.folder, sweep, self.config.run.seed, parse_json(json.dumps(about)))
        count = sweep.trials or (None if sweep.time else DEFAULT_TRIALS)
        if sweep.sampler == "grid":
            count = min(count or self.store.combinations, self.store.combinations)
        before = len(self.store.trials())
        with Progress(self.console, count, before) as self.progress:
            if before or self.store.unfinished():
                self.progress.say(f"going on with {self.folder}: {before} trials are finished")
            try:
                while (count is None or len(self.store.trials()) < count) and time.monotonic() - began < longest:
                    asked = self.store.ask()
                    if asked is None or not self._try(*asked, began + longest):
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

    def result(self, importance: dict[str, float] | None = None) -> Result:
        """What is known by now."""
        sweep = self.config.sweep
        found = [Outcome.of(t, self.store.params(t)) for t in self.store.trials()]
        return Result(self.folder, sweep.metric, sweep.minimize, found, importance or {})

    def _try(self, trial: Trial, params: dict[str, Any], deadline: float) -> bool:
        """Train one trial and record what came of it. False: the time is up, and it is not finished."""
        from optuna.trial import TrialState

        place = self.folder / "trials" / str(trial.number)
        _take_away(place)
        attempts = trial.user_attrs.get("attempts", 0)
        trial.set_user_attr("attempts", attempts + 1)
        watch = Watch(trial.number, self.store.rival(), self.config.sweep.metric, deadline, self.progress)
        began = time.monotonic()
        state, error = TrialState.COMPLETE, None
        try:
            if attempts >= ATTEMPTS:
                raise TrainingError(f"its process ended {attempts} times in the midst of it: out of memory?")
            config = self._recipe(trial.number, params)
            train(config, console=make_console(file=io.StringIO()), base=self._base(), sinks=[watch])
            if watch.value is None:
                raise TrainingError("no validation gave a finite loss")
        except (KeyboardInterrupt, Stopped) as e:
            if not isinstance(e, Stopped) or e.run_status == "interrupted":
                trial.set_user_attr("attempts", attempts)  # it is not the trial's doing
                _take_away(place)
                if isinstance(e, Stopped):
                    return False
                raise
            state = TrialState.PRUNED
        except (CheckpointError, OSError):  # a full disk fails every trial, and none for good
            _take_away(place)
            trial.set_user_attr("attempts", attempts)
            raise
        except (MlxftError, RuntimeError, MemoryError) as e:
            state, error = TrialState.FAIL, str(e) or type(e).__name__
        facts = {"steps": watch.step, "total": watch.total, "seconds": time.monotonic() - began, "error": error}
        for key, value in facts.items():
            trial.set_user_attr(key, value)
        self.store.tell(trial, watch.rival, watch.value if state == TrialState.COMPLETE else None, state)
        result = self._settle()
        self.progress.done(next(o for o in result.trials if o.number == trial.number), self.config.sweep.metric)
        return True

    def _settle(self) -> Result:
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
        return twin(self._loaded) if self._keeps else None

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
