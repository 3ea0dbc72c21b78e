"""A run that trains elsewhere, seen from another terminal."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from mlxft.study.runs import Event, RunInfo, parse_events, run_info
from mlxft.trainer.report import LiveView, terminal

EARLIER = 10  # events that a log is shown of what was before


class Tail:
    """The events of a metrics.jsonl as they come. A resumed run replaces the file; then it is read anew."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._file = path, 0, 0

    def read(self) -> tuple[list[Event], bool]:
        """Whole lines since the last call, and whether the file is another one than then."""
        try:
            found = self._path.stat()
            replaced = found.st_ino != self._file or found.st_size < self._at
            if replaced:
                self._at, self._file = 0, found.st_ino
            with self._path.open("rb") as file:
                file.seek(self._at)
                text = file.read()
        except OSError:
            return [], False
        whole = text[: text.rfind(b"\n") + 1]
        self._at += len(whole)
        return parse_events(whole), replaced


def watch(folder: Path, console: Console, every: float = 0.5) -> RunInfo:
    """Show a run until it ends: the view of training at a terminal, else its lines.

    Args:
        every: seconds between looks.
    Returns:
        How it ended.
    """
    tail = Tail(folder / "metrics.jsonl")
    before, _ = tail.read()
    info = run_info(folder)
    sink = terminal(console, info.steps or 0, info.step) if info.status == "running" else None
    try:
        if isinstance(sink, LiveView):
            sink.recall(before)
        elif sink is not None:
            for event in before[-EARLIER:]:
                sink.event(event)
        while sink is not None:
            # In this order: what was written before the end is shown.
            info = run_info(folder)
            events, replaced = tail.read()
            if replaced and isinstance(sink, LiveView):
                sink.recall(events)
            else:
                for event in events[-EARLIER:] if replaced else events:
                    sink.event(event)
            if info.status != "running":
                break
            time.sleep(every)
    finally:
        if sink is not None:
            sink.close()
    return info
