"""The terminal that answers are judged at: single keys, and answers side by side."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_NARROW = 80  # columns below which answers stand one below the other
_COLUMN = 30  # columns an answer needs
_ESCAPE = 0.05  # seconds in which the rest of an arrow key comes
_ARROWS = {b"[D": "l", b"[C": "r"}


class Keys:
    """Keys of standard input: at a terminal each as it is pressed, from a pipe the first letter of each line.

    The terminal is as before when the context ends, also by SIGTERM.
    """

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._before: list[Any] = []
        self._on_term: Any = None

    def __enter__(self) -> Keys:
        if self._fd is not None:
            self._before = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
            self._on_term = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._fd is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
            signal.signal(signal.SIGTERM, self._on_term)

    def forget(self) -> None:
        """Drop what was typed so far: it was meant for what stood there before."""
        if self._fd is not None:
            termios.tcflush(self._fd, termios.TCIFLUSH)

    def key(self) -> str:
        """The next key, in lower case; an arrow is l or r; the end of input is q."""
        if self._fd is None:
            line = sys.stdin.readline()
            return line.strip().lower()[:1] if line else "q"
        pressed = os.read(self._fd, 1)
        if pressed in (b"", b"\x04"):
            return "q"
        if pressed == b"\x1b":
            rest = os.read(self._fd, 8) if select.select([self._fd], [], [], _ESCAPE)[0] else b""
            return _ARROWS.get(rest, "")
        return pressed.decode("ascii", "ignore").lower()

    def line(self, ask: Callable[[], None]) -> str:
        """A line of text, typed with the terminal's own editing once `ask` has asked for it."""
        if self._fd is None:
            ask()
            return sys.stdin.readline().strip()
        now = termios.tcgetattr(self._fd)
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
        try:
            ask()
            return os.read(self._fd, 4096).decode("utf-8", "replace").strip()
        finally:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, now)


def show(console: Console, title: str, prompt: str | list[dict[str, Any]], answers: Sequence[str]) -> None:
    """A prompt and the answers to it, in the order given: side by side where there is room for that."""
    console.rule(Text(title))
    turns = [prompt] if isinstance(prompt, str) else [f"{m['role']}: {m['content']}" for m in prompt]
    console.print(Text("\n".join(turns), style="bold"))
    names = ["left (l)", "right (r)"] if len(answers) == 2 else [str(i) for i in range(1, len(answers) + 1)]
    texts: list[RenderableType] = [Text(answer) for answer in answers]
    if console.width < max(_NARROW, _COLUMN * len(answers)):
        for name, text in zip(names, texts):
            console.print(Panel(text, title=name, title_align="left"))
        return
    table = Table(expand=True, show_lines=True)
    for name in names:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*texts)
    console.print(table)


def choices(count: int) -> dict[str, int]:
    """Key -> place of the answer it chooses."""
    digits = {str(i + 1): i for i in range(count)}
    return {"l": 0, "r": 1, **digits} if count == 2 else digits


def keys_help(count: int) -> str:
    """The line that says which keys there are."""
    choose = "l or r" if count == 2 else f"1 to {count}"
    return f"{choose} choose   t tie   s skip   u undo   n note   q quit"
