"""Every error a user can meet, in one tree.

    MlxftError            exit code 1
      ConfigError         a recipe, an override or an option is wrong; exit code 2
      DataError           a data file, row or tokenizer does not fit
      ModelError          weights, architecture, quantisation or adapter do not fit
      CheckpointError     a run folder or checkpoint cannot be read, written or resumed
      ExportError         a model or adapter cannot be written in the wanted format
      TrainingError       training cannot continue: the numbers have diverged
      RewardError         a reward gives no usable number for a completion
      EpisodeError        an environment fails, or replies with what cannot be used

All are ValueErrors: they say that something given to mlxft is wrong, and what to do about it. A bug in mlxft
itself is an AssertionError.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class MlxftError(ValueError):
    """Base class of all errors that a user can fix."""

    exit_code = 1


class ConfigError(MlxftError):
    """A recipe, an override or a command-line option is wrong."""

    exit_code = 2


class DataError(MlxftError):
    """A data file or a row does not fit."""


class ModelError(MlxftError):
    """Weights, architecture, quantisation or adapter do not fit."""


class CheckpointError(MlxftError):
    """A run folder or checkpoint cannot be read, written or resumed."""


class ExportError(MlxftError):
    """A model or adapter cannot be written in the wanted format."""


class TrainingError(MlxftError):
    """Training cannot continue: a loss or gradient is not a number, or the policy has diverged."""


class RewardError(MlxftError):
    """A reward gives no usable number for a completion."""


class EpisodeError(MlxftError):
    """An environment fails, or replies with what cannot be used."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ' (did you mean X?)' for the choice closest to `word`, or '' if none is close."""
    import difflib

    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""


def shorten(text: str, most: int = 200) -> str:
    """Cut a text that a user gave to a length that fits into a message."""
    return text if len(text) <= most else f"{text[: most - 30]}... ({len(text):,} characters)"


def missing_extra(package: str, extra: str) -> str:
    """Return the message about a missing package that an extra installs."""
    return f"this needs the package {package}: pip install 'mlxft[{extra}]'"


def half_character(value: Any, name: str = "") -> str | None:
    """Return a message about the first half of a character (lone surrogate) in the texts of a value, else None.

    JSON and YAML can hold half of an emoji ("\\ud83d"), written by programs that cut UTF-16 texts. It has no meaning:
    no tokenizer accepts it, and UTF-8 cannot encode it.

    Args:
        value: a text, or nested lists and mappings of texts; other values are ignored.
        name: name of the value, if it has one.
    """
    if _whole(value):
        return None
    todo: list[tuple[Any, str]] = [(value, name)]
    while True:
        found, at = todo.pop()
        if isinstance(found, str):
            if (half := _first_half(found)) is not None:
                return f"{at or 'the text'} contains {_half(found, half)}"
        elif isinstance(found, dict):
            for key in found:
                if isinstance(key, str) and (half := _first_half(key)) is not None:
                    return f"the name {key!a} in {at or 'the row'} contains {_half(key, half)}"
            todo += [(below, f"{at}.{key}" if at else str(key)) for key, below in reversed(found.items())]
        elif isinstance(found, list | tuple):
            todo += [(below, f"{at}[{i}]") for i, below in reversed(list(enumerate(found)))]


def _whole(value: Any) -> bool:
    """Return whether no text in a value contains half of a character; fast, since it runs on every row."""
    todo = [value]
    while todo:
        found = todo.pop()
        if isinstance(found, str):
            if _first_half(found) is not None:
                return False
        elif isinstance(found, dict):
            todo.extend(found)
            todo.extend(found.values())
        elif isinstance(found, list | tuple):
            todo.extend(found)
    return True


def _first_half(text: str) -> int | None:
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        return exc.start
    return None


def _half(text: str, at: int) -> str:
    return (
        f"half of a character (U+{ord(text[at]):04X} at {at}): the text was cut inside an emoji or similar; write the "
        "whole character, or U+FFFD in its place"
    )


_flags = False  # whether messages name command-line options


def speak_flags(on: bool) -> None:
    """Let messages name options as the command line has them, in place of Python's arguments."""
    global _flags
    _flags = on


def switch(name: str) -> str:
    """Return how a switch is given: `--overwrite` on the command line, `overwrite=True` in Python."""
    return f"--{name}" if _flags else f"{name.replace('-', '_')}=True"
