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
from typing import Any


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


def shorten(text: str, most: int = 200) -> str:
    """Cut what somebody gave to what a message has room for."""
    return text if len(text) <= most else f"{text[: most - 30]}... ({len(text):,} characters)"


def missing_extra(package: str, extra: str) -> str:
    """The sentence for a package that an extra would bring."""
    return f"this needs the package {package}: pip install 'mlxft[{extra}]'"


def half_character(value: Any, name: str = "") -> str | None:
    """Say where texts within a value hold half of a character, or return None where all are whole.

    JSON and YAML can write one half of an emoji alone ("\\ud83d"), as programs do that cut UTF-16 texts. It stands for
    nothing: no tokenizer takes it, and UTF-8 has no form for it.

    Args:
        value: a text, or lists and mappings of them; what is none of these holds no text.
        name: what the value is called, if it has a name.
    """
    if _whole(value):
        return None
    todo: list[tuple[Any, str]] = [(value, name)]
    while True:
        found, at = todo.pop()
        if isinstance(found, str):
            if (half := _first_half(found)) is not None:
                return f"{at or 'the text'} holds {_half(found, half)}"
        elif isinstance(found, dict):
            for key in found:
                if isinstance(key, str) and (half := _first_half(key)) is not None:
                    return f"the name {key!a} in {at or 'the row'} holds {_half(key, half)}"
            todo += [(below, f"{at}.{key}" if at else str(key)) for key, below in reversed(found.items())]
        elif isinstance(found, list | tuple):
            todo += [(below, f"{at}[{i}]") for i, below in reversed(list(enumerate(found)))]


def _whole(value: Any) -> bool:
    """Whether no text in a value holds half of a character; quick, since every row of every file is asked."""
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
        f"half of a character (U+{ord(text[at]):04X} at {at}); the text was cut within an emoji or the like: write the "
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
