"""A sweep's trials in an SQLite file, by Optuna; one process at a time."""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mlxft.errors import CheckpointError, ConfigError, missing_extra
from mlxft.search import Range, Sweep

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial, TrialState

FILE = "sweep.db"
STARTUP = 5  # trials at random before TPE learns from them
WHOLE = 2  # trials that the median pruner waits for
MOST_COMBINATIONS = 10_000


def check_installed() -> None:
    """ConfigError without Optuna."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(missing_extra("optuna", "sweep"))


@contextmanager
def reachable(file: Path) -> Iterator[None]:
    """A database that fails is a CheckpointError that says why."""
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
    """The trials of one sweep.

    Args:
        seed: of the sampler. A trial depends on it, on its own number and on those before, so that a sweep that was
            killed and went on has the trials of one that was not.
        about: the settings that all of its trials share, dotted; those of a sweep that goes on must be the same.
    Raises:
        ConfigError: the sweep there is has other settings.
        CheckpointError: the file can not be used.
    """

    def __init__(self, folder: Path, sweep: Sweep, seed: int, about: Mapping[str, Any]) -> None:
        import optuna
        from sqlalchemy import URL

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.sweep, self.seed = sweep, seed
        self._levels = {k: _levels(r) for k, r in sweep.space.items()} if sweep.sampler == "grid" else {}
        url = URL.create("sqlite", database=str(folder / FILE)).render_as_string()
        self.study: Study = optuna.create_study(
            storage=optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 5}}),
            study_name="sweep",
            direction="minimize" if sweep.minimize else "maximize",
            pruner=self._pruner(),
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
        from optuna.samplers import RandomSampler, TPESampler

        seed = random.Random(f"{self.seed} {number}").randrange(2**32)
        return (
            RandomSampler(seed) if self.sweep.sampler == "random" else TPESampler(n_startup_trials=STARTUP, seed=seed)
        )

    def trials(self) -> list[FrozenTrial]:
        """All that are finished: complete, pruned or failed."""
        return [t for t in self.study.get_trials(deepcopy=False) if t.state.is_finished()]

    def unfinished(self) -> list[FrozenTrial]:
        """Those that a killed or interrupted sweep had begun."""
        from optuna.trial import TrialState

        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def ask(self) -> tuple[Trial, dict[str, Any]] | None:
        """The next trial and its settings: first what was not finished, as it was. None: the grid has no more."""
        from optuna.trial import Trial, TrialState

        begun = self.unfinished()
        number = begun[0].number if begun else len(self.study.get_trials(deepcopy=False))
        self.study.sampler = self._sampler(number)
        if begun:
            trial = Trial(self.study, begun[0]._trial_id)
        else:
            if self._levels and not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                if number >= self.combinations:
                    return None
                self.study.enqueue_trial(self._combination(number))
            trial = self.study.ask()
        return trial, {key: _suggest(trial, key, r) for key, r in self.sweep.space.items()}

    def rival(self) -> Trial:
        """A trial in memory among copies of those that are finished, to be reported to and judged by the pruner.

        The pruner notes in a trial which rungs it has passed. In the file such a note would outlive a kill, and the
        trial that is begun anew would be judged by another rung than the first time.
        """
        import optuna

        study = optuna.create_study(direction=self.study.direction, pruner=self._pruner())
        study.add_trials(self.trials())
        return study.ask()

    def tell(self, trial: Trial, rival: Trial, value: float | None, state: TrialState) -> None:
        """Record how a trial ended, with what its rival was told and what the pruner noted there.

        A kill in the midst of it leaves an unfinished trial: it is run again, and the same is written once more.
        """
        judged = rival.study.get_trials(deepcopy=False)[-1]
        storage, told = self.study._storage, self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        for step, seen in judged.intermediate_values.items():
            if step not in told:
                trial.report(seen, step)
        for key, noted in judged.system_attrs.items():
            storage.set_trial_system_attr(trial._trial_id, key, noted)
        self.study.tell(trial, value, state)

    @property
    def combinations(self) -> int:
        """Of a grid."""
        return math.prod(len(v) for v in self._levels.values())

    def _combination(self, number: int) -> dict[str, Any]:
        # Not one setting after the other: a sweep that ends early has seen something of all.
        order = list(range(self.combinations))
        random.Random(self.seed).shuffle(order)
        rest, found = order[number], {}
        for key, values in self._levels.items():
            rest, i = divmod(rest, len(values))
            found[key] = values[i]
        return found

    def params(self, trial: FrozenTrial) -> dict[str, Any]:
        """A trial's settings as a recipe has them, in the recipe's order."""
        return {k: _plain(trial.params[k], r) for k, r in self.sweep.space.items() if k in trial.params}

    def importance(self) -> dict[str, float]:
        """Share of each setting in which trials are among the best (PED-ANOVA, Watanabe et al. 2023), largest first;
        pruned trials count by their last validation. {} where fewer than 4 trials or one setting tell nothing."""
        import warnings

        import optuna

        def last(t: FrozenTrial) -> float | None:
            found = t.value if t.value is not None else t.intermediate_values.get(t.last_step or 0)
            return found if found is not None and math.isfinite(found) else None

        known = [(t, v) for t in self.trials() if t.params and (v := last(t)) is not None]
        if len(known) < 4 or len(self.sweep.space) < 2:
            return {}
        study = optuna.create_study(direction=self.study.direction)
        for t, value in known:
            made = optuna.trial.create_trial(params=t.params, distributions=t.distributions, value=value)
            study.add_trial(made)
        share = max(0.1, min(0.5, 5 / len(known)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=share)
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        return {k: float(v) for k, v in found.items()}


def _levels(r: Range) -> Sequence[Any]:
    """The values of a setting in a grid, as Optuna has them."""
    return [_stored(v) for v in r.value] if r.kind == "choice" else range(r.value[0], r.value[1] + 1)


def check_grid(sweep: Sweep) -> None:
    """ConfigError where a grid has no end in sight."""
    if sweep.sampler == "grid":
        count = math.prod(len(_levels(r)) for r in sweep.space.values())
        if count > MOST_COMBINATIONS:
            raise ConfigError(f"sweep.sampler: the grid has {count:,} combinations; give choices, or use tpe or random")


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
