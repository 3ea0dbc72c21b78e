"""Read JSON and small files with limits, and print everything without control characters or markup."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Event = dict[str, Any]  # one line of metrics.jsonl


# --- text -------------------------------------------------------------------------------------------------------------
# Text to a terminal, into JSON, and from small files.
#
# Text from a row, a model or a name must not control the terminal on which it is shown. Everything that mlxft prints
# goes through `echo` or a console of `make_console`; tests/test_layout.py checks this.

# Control characters except \n and \t (with ESC, and C1, which some terminals also obey), characters that reorder or
# break lines (bidi embeddings, overrides and isolates, U+2028), invisible ones (zero-width space, tags), and halves of
# characters. What emoji, Persian or Hebrew need for display (joiners, direction marks) is kept.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_format_warning = warnings.formatwarning
_MOST = 1 << 18  # characters in a recipe, template or schema, a thousand times the usual number


def printable(text: str) -> str:
    """Return a text in which U+FFFD replaces each character that could control or deceive a terminal."""
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)


def counted(count: int, text: str) -> str:
    """Return a number with what there is of it, such as `3 rows are left out`, or `1 row is left out`."""
    if count == 1:
        text = re.sub(r"s\b(?<!ss)(?<!us)", "", text, count=1)
        verbs = {"are": "is", "were": "was", "have": "has", "leave": "leaves", "seem": "seems"}
        text = re.sub(rf"\b({'|'.join(verbs)})\b", lambda verb: verbs[verb[0]], text)
    return f"{count:,} {text}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: the first column begins at the left, the others, which are numbers, end together."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))]).rstrip()
        for first, *cells in rows
    ]


def echo(text: str = "", *, nl: bool = True, err: bool = False) -> None:
    """Print a text through `printable`."""
    import click

    click.echo(printable(text), nl=nl, err=err)


def echo_completion(piece: str) -> None:
    """Print a piece of a completion: through `printable` on a terminal, unchanged to a pipe or file."""
    import click

    piece = printable(piece) if sys.stdout.isatty() else piece
    click.echo(piece, nl=False, color=True)  # with color=None, click would remove escape codes


def make_console(**options: Any) -> Console:
    """Return the console that a command prints to; it prints markup and control characters as plain text.

    Args:
        options: options of rich's Console.
    """
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Printable(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Any:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else printable(text), style, control)

        def render_str(self, text: str, **options: Any) -> Any:  # before rich measures the text
            return super().render_str(printable(text), **options)

    if "file" in options:  # in a notebook, rich shows everything there, whatever the file
        options.setdefault("force_jupyter", False)
    return Printable(markup=False, emoji=False, highlight=False, **options)


def notebook_place(console: Console | None) -> Callable[[str], None] | None:
    """Return a function that shows HTML at one place of a notebook, again and again; None outside notebooks."""
    if console is None or not console.is_jupyter or console.file not in (sys.stdout, sys.stderr):
        return None
    from IPython.display import HTML, display

    handle = display(HTML(""), display_id=True)
    return lambda text: handle.update(HTML(text))


def guard_messages() -> None:
    """Make log lines and warnings of libraries, and tracebacks, printable in this process."""
    import logging
    import traceback

    class Record(logging.LogRecord):
        def getMessage(self) -> str:
            return printable(super().getMessage())

    logging.setLogRecordFactory(Record)
    warnings.formatwarning = lambda *args, **options: printable(_format_warning(*args, **options))
    sys.excepthook = lambda *error: echo("".join(traceback.format_exception(*error)), nl=False, err=True)


def json_text(value: Any, indent: int | None = None, default: Any = None) -> str:
    """Return a value as JSON that is safe for a terminal and a UTF-8 file: unsafe characters are escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=default)
    return _UNSAFE.sub(lambda found: json.dumps(found[0])[1:-1], text)


def home_path(path: str | Path) -> Path:
    """Return a path with ~ expanded. As in a shell, an unknown ~user stays as it is; pathlib would raise an error."""
    return Path(os.path.expanduser(path))


class TooDeep(ValueError):
    """JSON is nested deeper than Python can parse."""


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Parse the JSON text of a file.

    Args:
        options: options of json.loads, which is called only here.
    Raises:
        ValueError: the text is not JSON, or nested deeper than Python can parse.
    """
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise TooDeep("the JSON is nested too deep") from error


def _refuse_endless(path: Path) -> None:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file")


def read_file(path: Path) -> bytes:
    """Read a file that a program wrote into a folder.

    Raises:
        OSError: the file cannot be read, or is a device or a pipe, which may have no end.
    """
    _refuse_endless(path)
    return path.read_bytes()


def read_small(path: Path) -> str:
    """Read a text file that people write: a recipe, a template, a schema.

    Raises:
        OSError: the file cannot be read, or is a device or a pipe, which may have no end.
        ValueError: the text is not UTF-8, or far longer than what people write.
    """
    _refuse_endless(path)
    with path.open(encoding="utf-8") as file:
        text = file.read(_MOST + 1)
    if len(text) > _MOST:
        raise ValueError(f"the file has more than {_MOST:,} characters")
    return text


# --- bar --------------------------------------------------------------------------------------------------------------


@contextmanager
def bar(console: Console | None, total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal or in a notebook. Yields a function to call with the number just done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if (show := notebook_place(console)) is not None:
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            show(progress_html(done, total, what))

        yield advance
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn())
    shown = console is not None and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=total)
        yield lambda n: progress.advance(task, n)


def progress_html(done: int, total: int, what: str) -> str:
    """Return a progress bar as HTML."""
    return f'<progress value="{done}" max="{total}" aria-label="{what}"></progress> {done:,}/{total:,} {what}'


# --- events -----------------------------------------------------------------------------------------------------------

VALUE = "reward_less_kl_cost"  # what on-policy methods maximise; its negative is their `loss` in metrics.jsonl


def with_value(event: Mapping[str, Any]) -> Event:
    """Return a validation event of an on-policy method with VALUE in place of `loss`; any other as it is."""
    valued = VALUE in event or {"reward", "eos_share"} <= {*event}  # older versions wrote no VALUE
    if event.get("event") != "eval" or "loss" not in event or not valued:
        return {**event}
    loss = event["loss"]  # a number that was not finite is a text
    named = {VALUE if k == "loss" else k: v for k, v in event.items() if k != VALUE}
    return named | {VALUE: -loss if isinstance(loss, int | float) else loss}


def validation_figure(event: Event) -> tuple[str, float]:
    """Return the name and the value of what a validation is compared by."""
    found = with_value(event)
    return ("reward less KL cost", found[VALUE]) if VALUE in found else ("loss", found["loss"])
