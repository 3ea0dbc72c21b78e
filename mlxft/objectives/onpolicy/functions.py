"""Rewards by a function of the user's: loaded from a file, called on batches, and what it returns looked at closely."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxft.errors import ConfigError, RewardError, nearest
from mlxft.text import home_path

if TYPE_CHECKING:
    from mlxft.objectives.onpolicy.rewards import Item

# Components that are no functions.
MODEL, MISSING_EOS = "reward_model", "missing_eos"
CALL = "name(prompts, completions, rows) -> list of floats"


class ScoredFunction:
    """A reward function ready to score.

    Attributes:
        name: as it is called in reports.
        spec: file.py:name.
    """

    def __init__(self, name: str, spec: str, weight: float, function: Callable[..., Any]) -> None:
        self.name, self.spec, self.weight = name, spec, weight
        self._function = function

    def score(self, items: Sequence[Item]) -> list[float]:
        """A value for each completion.

        Raises:
            RewardError: it raised, or did not return a finite number for each.
        """
        try:
            result = self._call(items)
        except (Exception, SystemExit) as error:  # sys.exit(0) would end the run as if it were done
            raise self._located(items, error) from error
        values = self._listed(result, len(items))
        found = []
        for item, value in zip(items, values):
            number = as_number(value)
            if number is None:
                raise RewardError(
                    f"{self.spec}: {item.where}: returned {_shown(value)} for the completion "
                    f"{_short(item.completion)}; expected a finite number"
                )
            found.append(number)
        return found

    def _call(self, items: Sequence[Item]) -> Any:
        # The function's own lists and mappings: what it changes there is not ours.
        rows = [dict(item.row) for item in items]
        return self._function([item.prompt for item in items], [item.completion for item in items], rows)

    def _located(self, items: Sequence[Item], error: BaseException) -> RewardError:
        """The error with the row that it comes from: the first that raises when it is asked for alone."""
        for item in items:
            try:
                self._call([item])
            except (Exception, SystemExit) as alone:
                return RewardError(
                    f"{self.spec}: {item.where}: raised {_told(alone)} for the completion {_short(item.completion)}"
                )
        first = f" from {items[0].where} on" if items else ""
        return RewardError(
            f"{self.spec}: raised {_told(error)} for {len(items)} completions{first}, and for none of them alone"
        )

    def _listed(self, result: Any, count: int) -> Sequence[Any]:
        what = f"a list of {count} numbers, one for each completion"
        if result is None:
            raise RewardError(f"{self.spec}: returned None; expected {what} (is a return missing?)")
        listed = hasattr(result, "__len__") and hasattr(result, "__iter__") and getattr(result, "ndim", 1) > 0
        if not listed or isinstance(result, str | bytes | dict | set):
            raise RewardError(f"{self.spec}: returned {_shown(result)}; expected {what}")
        if len(result) != count:
            raise RewardError(f"{self.spec}: returned {len(result)} values for {count} completions; expected {what}")
        return list(result)


def as_number(value: Any) -> float | None:
    """A finite float of float32's range; None for what is none. Arrays of one element count as their number."""
    if not isinstance(value, bool | int | float) and callable(item := getattr(value, "item", None)):
        try:
            value = item()
        except Exception:  # of several elements: each library has its own error for it
            return None
    if not isinstance(value, bool | int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= float(np.finfo(np.float32).max) else None


def load_functions(given: str | dict[str, float] | None) -> list[ScoredFunction]:
    """The functions of `rewards.function`, each file run once.

    Raises:
        ConfigError: no such file or function, or the file can not be run.
    """
    weights = {given: 1.0} if isinstance(given, str) else dict(given or {})
    modules: dict[Path, ModuleType] = {}
    names = [spec.rpartition(":")[2] for spec in weights]
    found = []
    for (spec, weight), name in zip(weights.items(), names):
        path, colon, _ = spec.rpartition(":")
        if not (path and colon and name):
            raise ConfigError(f"rewards.function: {spec!r} names no function; expected file.py:name, called as {CALL}")
        file = home_path(path)
        if file not in modules:
            modules[file] = _run_file(spec, file)
        # A plain name is easier to read in reports, where it can mean one function only.
        shown = spec if names.count(name) > 1 or name in (MODEL, MISSING_EOS) else name
        found.append(ScoredFunction(shown, spec, weight, _named(spec, modules[file], name)))
    return found


def _run_file(spec: str, file: Path) -> ModuleType:
    """A file as a module that nothing else can meet: of a name of its own, without bytecode left beside it.

    While it runs, what stands beside it can be imported, as by a script.
    """
    if not file.is_file():
        near = nearest(file.name, [p.name for p in file.parent.glob("*.py")]) if file.parent.is_dir() else ""
        raise ConfigError(f"rewards.function: {spec}: no such file {file}{near}; looked in {file.absolute().parent}")
    name = f"mlxft_rewards_{blake2b(str(file.absolute()).encode(), digest_size=6).hexdigest()}"
    loader = importlib.machinery.SourceFileLoader(name, str(file.absolute()))
    module_spec = importlib.util.spec_from_loader(name, loader)
    assert module_spec is not None
    module = importlib.util.module_from_spec(module_spec)
    # Dataclasses and pickled things look their module up by its name.
    before = sys.modules.get(name)
    sys.modules[name] = module
    beside = str(file.absolute().parent)
    sys.path.append(beside)  # last: a file called json.py is nobody else's json
    try:
        exec(loader.source_to_code(loader.get_data(loader.path), loader.path), module.__dict__)
    except BaseException as error:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ConfigError(f"rewards.function: {spec}: {file} can not be run: {_told(error)}") from error
    finally:
        if beside in sys.path:
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(beside)]
    return module


def _named(spec: str, module: ModuleType, name: str) -> Callable[..., Any]:
    there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if not hasattr(module, name):
        has = f"it has {', '.join(sorted(there))}" if there else "it has no function"
        raise ConfigError(f"rewards.function: {spec}: no function {name!r} in it{nearest(name, there)}; {has}")
    found = getattr(module, name)
    if not callable(found):
        kind = type(found).__name__
        raise ConfigError(f"rewards.function: {spec}: {name} is {kind}, not a function; expected {CALL}")
    function: Callable[..., Any] = found
    return function


def _told(error: BaseException) -> str:
    """An error's kind, words, and the line of the user's file where it happened."""
    words = " ".join(str(error).split())[:300]
    line, at = None, error.__traceback__
    while at is not None:
        if at.tb_frame.f_globals.get("__name__", "").startswith("mlxft_rewards_"):
            line = at.tb_lineno
        at = at.tb_next
    return type(error).__name__ + (f": {words}" if words else "") + (f" (line {line})" if line else "")


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"{text[:60]} ({type(value).__name__})"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
