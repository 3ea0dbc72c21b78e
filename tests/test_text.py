"""What strangers' texts may not do to a terminal, by the real commands."""

from __future__ import annotations

import io
import json
import sys

import pytest

from mlxft.text import counted, echo, echo_completion, guard_messages, json_text, make_console, printable

# ESC and its 8-bit form (a title, a cleared screen, a link), BEL, DEL, bidi override and isolate, line separator, tags.
HOSTILE = (
    "\x1b]0;owned\x07 \x1b[2J \x9b31m \x7f \r \u202eabc\u202c \u2066x\u2069 \u2028 \u200b \U000e0041 \ud83d "
    "[red] [/] :bomb:"
)
HARMFUL = set(HOSTILE) - set(printable(HOSTILE))
HONEST = (
    "a\tb\n\u00e9 \u4f60\u597d \u05e9\u05dc\u05d5\u05dd\u200f \u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 "
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 1\u00a0000 \u3000"
)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_printable_replaces_what_steers_and_keeps_what_scripts_need() -> None:
    assert len(HARMFUL) == 13, "each of them is seen"
    assert len(printable(HOSTILE)) == len(HOSTILE), "a character for a character: spans and columns stay"
    assert printable(HONEST) == HONEST
    every = "".join(map(chr, range(0x11000)))
    left = {c for c in printable(every) if ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000}
    assert left == {"\n", "\t"}


def test_json_stays_json_and_harmless() -> None:
    value = {"a": [HOSTILE, HONEST], HOSTILE: None}
    text = json_text(value)
    assert json.loads(text) == value
    assert not HARMFUL & set(text)
    assert "\u4f60" in text, "what is harmless is left readable"


@pytest.mark.parametrize("width", [20, 80])
def test_a_console_shows_text_as_text(width: int) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    out = io.StringIO()
    console = make_console(file=out, width=width)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE))
    for what in (HOSTILE, Text(HOSTILE), table, Panel(HOSTILE)):
        console.print(what)
    console.rule(HOSTILE)
    assert not HARMFUL & set(out.getvalue())
    assert "[red]" in out.getvalue()
    assert ":bomb:" in out.getvalue()
    widths = {len(line) for line in out.getvalue().splitlines()}
    assert max(widths) <= width, "what is replaced is measured as it is shown"


@pytest.mark.parametrize("terminal", [True, False])
def test_completions_are_verbatim_but_for_a_terminal(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Screen() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    for piece in HOSTILE:
        echo_completion(piece)
    assert out.getvalue() == (printable(HOSTILE) if terminal else HOSTILE)


def test_what_libraries_say(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Log lines of transformers name what stands in a model's files, and so do warnings and tracebacks."""
    import logging
    import warnings

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    before = logging.getLogRecordFactory()
    try:
        guard_messages()
        logging.getLogger("transformers").warning("%s", HOSTILE)
        said = warnings.formatwarning(HOSTILE, UserWarning, "x.py", 1, "")
        sys.excepthook(ValueError, ValueError(HOSTILE), None)
    finally:
        logging.setLogRecordFactory(before)
    for text in (caplog.text, said, capsys.readouterr().err):
        assert printable(HOSTILE) in text
        assert not HARMFUL & set(text)


def test_echo(capsys: pytest.CaptureFixture[str]) -> None:
    echo(HOSTILE)
    echo(HOSTILE, err=True)
    shown = capsys.readouterr()
    assert shown.out == shown.err == printable(HOSTILE) + "\n"


def test_one_of_something_is_singular() -> None:
    assert counted(1234, "rows are left out") == "1,234 rows are left out"
    assert counted(1, "empty rows were cut and have no end") == "1 empty row was cut and has no end"
