"""Text in and out: JSON and small files read with limits, and the one place that prints, without control characters or
markup.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


# --- text -------------------------------------------------------------------------------------------------------------
# Text on its way to a terminal, into JSON, and out of small files.
#
# What a row, a model or a name holds must not steer the terminal it is shown on. All that mlxft prints goes through
# `echo`, or through a console of `make_console`; tests/test_layout.py holds it to that.

# Control characters but \n and \t (ESC among them, and C1, which some terminals obey alike), what reorders or breaks
# lines (bidi embeddings, overrides and isolates, U+2028), what is there and not seen (zero-width space, tags), and
# halves of characters. What emoji, Persian or Hebrew need to look right (joiners, the marks of direction) stays.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_format_warning = warnings.formatwarning
_MOST = 1 << 18  # characters of a recipe, template or schema: a thousand times what one has


def printable(text: str) -> str:
    """Return a text with each character that would steer or deceive a terminal as U+FFFD."""
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)


def echo(text: str = "", *, nl: bool = True, err: bool = False) -> None:
    """Print a text, printable."""
    import click

    click.echo(printable(text), nl=nl, err=err)


def echo_completion(piece: str) -> None:
    """Print a piece of what a model writes: printable on a terminal, to a pipe or file as it is."""
    import click

    piece = printable(piece) if sys.stdout.isatty() else piece
    click.echo(piece, nl=False, color=True)  # without color, click takes escape codes out


def make_console(**options: Any) -> Console:
    """Make the console that a command prints to: what it is given is text, neither markup nor control characters.

    Args:
        options: rich's.
    """
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Printable(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Any:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else printable(text), style, control)

        def render_str(self, text: str, **options: Any) -> Any:  # before it is measured
            return super().render_str(printable(text), **options)

    return Printable(markup=False, emoji=False, highlight=False, **options)


def guard_messages() -> None:
    """Let what others print in this process be printable: log lines and warnings of libraries, a traceback."""
    import logging
    import traceback

    class Record(logging.LogRecord):
        def getMessage(self) -> str:
            return printable(super().getMessage())

    logging.setLogRecordFactory(Record)
    warnings.formatwarning = lambda *args, **options: printable(_format_warning(*args, **options))
    sys.excepthook = lambda *error: echo("".join(traceback.format_exception(*error)), nl=False, err=True)


def json_text(value: Any, indent: int | None = None, default: Any = None) -> str:
    """Return a value as JSON that is fit for a terminal and a UTF-8 file: what is not `printable` stands escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=default)
    return _UNSAFE.sub(lambda found: json.dumps(found[0])[1:-1], text)


def home_path(path: str | Path) -> Path:
    """Return a path with ~ as the home; as in a shell, ~ of nobody stays as it is, which pathlib takes for an error."""
    return Path(os.path.expanduser(path))


class TooDeep(ValueError):
    """JSON is nested deeper than Python can follow."""


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Parse JSON out of a file.

    Args:
        options: of json.loads, which nothing else calls.
    Raises:
        ValueError: it is no JSON, or nested deeper than Python can follow.
    """
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise TooDeep("it is nested too deep") from error


def _refuse_endless(path: Path) -> None:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file")


def read_file(path: Path) -> bytes:
    """Read a file that a program wrote into a folder.

    Raises:
        OSError: it can not be read, or is a device or a pipe, which may have no end.
    """
    _refuse_endless(path)
    return path.read_bytes()


def read_small(path: Path) -> str:
    """Read a text file that people write: a recipe, a template, a schema.

    Raises:
        OSError: it can not be read, or is a device or a pipe, which may have no end.
        ValueError: it is not UTF-8, or far longer than what people write.
    """
    _refuse_endless(path)
    with path.open(encoding="utf-8") as file:
        text = file.read(_MOST + 1)
    if len(text) > _MOST:
        raise ValueError(f"it has more than {_MOST:,} characters")
    return text


# --- bar --------------------------------------------------------------------------------------------------------------


@contextmanager
def bar(console: Console | None, total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere. Yields what is to be told of how many more are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn())
    shown = console is not None and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=total)
        yield lambda n: progress.advance(task, n)
