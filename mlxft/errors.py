"""Every error a user can meet, in one tree.

    MlxftError            exit code 1
      ConfigError         a recipe, an override or an option is wrong; exit code 2
      DataError           a data file, row or tokenizer does not fit
      ModelError          weights, architecture, quantisation or adapter do not fit
      CheckpointError     a run folder or checkpoint can not be read, written or continued
      ExportError         a result can not be written in the wanted form
      TrainingError       training can not go on: numbers have run away
      RewardError         a reward gives no usable number for a completion

All are ValueErrors: they say that something given to mlxft is wrong, and what to do about it. A mistake of
mlxft itself is an AssertionError.
"""

from __future__ import annotations

from collections.abc import Iterable


class MlxftError(ValueError):
    """Base of all errors that a user can mend."""

    exit_code = 1


class ConfigError(MlxftError):
    """A recipe, an override or a command-line option is wrong."""

    exit_code = 2


class DataError(MlxftError):
    """A data file or a row does not fit."""


class ModelError(MlxftError):
    """Weights, architecture, quantisation or adapter do not fit."""


class CheckpointError(MlxftError):
    """A run folder or checkpoint can not be read, written or continued."""


class ExportError(MlxftError):
    """A result can not be written in the wanted form."""


class TrainingError(MlxftError):
    """Training can not go on: a loss or a gradient is no longer a number, or the policy has run away."""


class RewardError(MlxftError):
    """A reward gives no usable number for a completion."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """' (did you mean X?)' for the choice closest to `word`, or '' where none is close."""
    import difflib

    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""


def missing_extra(package: str, extra: str) -> str:
    """The sentence for a package that an extra would bring."""
    return f"this needs the package {package}: pip install 'mlxft[{extra}]'"
